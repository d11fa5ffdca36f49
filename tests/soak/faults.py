"""What goes wrong in a soak, by a seed. Two things at once at most: one with a process, one on a wire."""

import random
import resource
import signal
import threading
import time
from collections import Counter
from contextlib import suppress

import psutil
import redis
from chaosproxy import Faults

from soak.parts import Parts

HOUR = 3600


class Chaos:
    """Two threads of faults over the parts, from `start` to `stop`; afterwards everything is whole again."""

    def __init__(self, parts: Parts, seed, say) -> None:
        self.parts, self.say = parts, say
        self.done: Counter = Counter()
        self.complaints: list[str] = []
        self._restarted: set[str] = set()
        self._stopping = threading.Event()
        process = (self.kill, self.kill, self.pause, self.kill_engine, self.kill_redis, self.stall_redis,
                   self.fill_the_disk, self.take_the_memory, self.refuse_writes)  # fmt: skip
        wire = (self.lose_replies, self.lose_one_reply, self.reset, self.slow, self.blackhole, self.bucket_slow,
                self.bucket_loses, self.bucket_damages, self.bucket_stops, self.bucket_dies)  # fmt: skip
        lanes = (("process", process), ("wire", wire))
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}.{name}"), faults), daemon=True)
            for name, faults in lanes
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            if thread.is_alive():
                self.complaints.append("a fault does not end")
        self.heal()

    def heal(self) -> None:
        for wire in [*self.parts.wires.values(), self.parts.bucket]:
            wire.faults = Faults()
        # A server of the bucket ends with the thread that started it (PR_SET_PDEATHSIG), so none of ours may.
        swift = self.parts.swift
        for kind in swift.nodes:
            if kind in self._restarted:
                swift.kill(kind)
                swift.start(kind)
                swift.wait_until_listening(kind)
        self._revive()

    def _revive(self) -> None:
        """As whatever watches over processes would: a part that meets a Redis that is away at its start ends."""
        for name in self.parts.revive():
            self.say(f"{name} had ended and is started again")

    def _run(self, chosen: random.Random, faults) -> None:
        while not self._stopping.is_set():
            # A deck, not dice: each kind comes before any comes again.
            for fault in chosen.sample(faults, len(faults)):
                if self._stopping.wait(chosen.uniform(0.2, 1.2)):
                    return
                try:
                    about = fault(chosen)
                    if faults[0] == self.kill:  # the lane of processes: the other one starts none
                        self._revive()
                except Exception as error:
                    self.complaints.append(f"the fault {fault.__name__} broke: {type(error).__name__}: {error}")
                    return
                self.done[fault.__name__] += 1
                self.say(f"{fault.__name__} {about}")

    def _hold(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    # Processes -------------------------------------------------------------------------------------------------------

    def kill(self, chosen) -> str:
        """kill -9, and another takes its place; a worker's clock is an hour off after it, or right."""
        name = chosen.choice(self.parts.names)
        self.parts.running[name].kill()
        shift = chosen.choice([0, HOUR, -HOUR])
        self.parts.clock_shift[name] = shift
        self._hold(chosen.uniform(0, 1.5))
        self.parts.start(name)
        return f"{name}, clock {shift:+} s" if name.startswith("worker") else name

    def kill_engine(self, chosen) -> str:
        engines = self.parts.engines()
        if not engines:
            return "none"
        engine = chosen.choice(engines)
        with suppress(psutil.NoSuchProcess):
            engine.kill()
        return str(engine.pid)

    def pause(self, chosen) -> str:
        """SIGSTOP for longer than a lease, and SIGCONT."""
        name = chosen.choice([name for name in self.parts.names if self.parts.running[name].alive])
        process, seconds = psutil.Process(self.parts.running[name].pid), chosen.uniform(2.5, 4.5)
        process.send_signal(signal.SIGSTOP)
        self._hold(seconds)
        process.send_signal(signal.SIGCONT)
        return f"{name} for {seconds:.1f} s"

    # Redis -----------------------------------------------------------------------------------------------------------

    def kill_redis(self, chosen) -> str:
        self.parts.redis.kill()
        self._hold(chosen.uniform(0.1, 2))
        self.parts.start_redis()
        return ""

    def stall_redis(self, chosen) -> str:
        seconds = chosen.uniform(1, 4)
        process = psutil.Process(self.parts.redis.process.pid)
        process.send_signal(signal.SIGSTOP)
        self._hold(seconds)
        process.send_signal(signal.SIGCONT)
        return f"for {seconds:.1f} s"

    def fill_the_disk(self, chosen) -> str:
        """No byte more goes into its append-only file: with `always` a Redis ends then, and is started again."""
        redis_process = self.parts.redis.process
        size = max(path.stat().st_size for path in self.parts.redis.folder.rglob("*.aof"))
        room = size + chosen.randrange(100, 5000)
        psutil.Process(redis_process.pid).rlimit(resource.RLIMIT_FSIZE, (room, room))
        deadline = time.monotonic() + 3
        while redis_process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = redis_process.poll()
        if ended is None:
            self.parts.redis.kill()
        self.parts.start_redis()
        return f"at {room} bytes; it {'was killed' if ended is None else 'ended by itself'}"

    def take_the_memory(self, chosen) -> str:
        return self._configured("maxmemory", "1mb", "0", chosen.uniform(0.5, 2))

    def refuse_writes(self, chosen) -> str:
        return self._configured("min-replicas-to-write", "1", "0", chosen.uniform(0.5, 2))

    def _configured(self, name: str, value: str, usual: str, seconds: float) -> str:
        with redis.Redis(port=self.parts.redis.port) as client:
            client.config_set(name, value)
            self._hold(seconds)
            client.config_set(name, usual)
        return f"{name} {value} for {seconds:.1f} s"

    # Wires -----------------------------------------------------------------------------------------------------------

    def _on_a_wire(self, chosen, seconds: float, **faults) -> str:
        name = chosen.choice(self.parts.names)
        return self._with(self.parts.wires[name], name, seconds, **faults)

    def _with(self, wire, name: str, seconds: float, **faults) -> str:
        wire.faults = Faults(**faults)
        self._hold(seconds)
        wire.faults = Faults()
        return f"{name} for {seconds:.1f} s"

    def lose_replies(self, chosen) -> str:
        return self._on_a_wire(chosen, chosen.uniform(1, 3), lose_chance=0.1)

    def lose_one_reply(self, chosen) -> str:
        return self._on_a_wire(chosen, 0.5, lose_replies=1)

    def slow(self, chosen) -> str:
        return self._on_a_wire(chosen, chosen.uniform(1, 2), latency=chosen.uniform(0.05, 0.2), slice=7)

    def blackhole(self, chosen) -> str:
        name = chosen.choice(self.parts.names)
        about = self._with(self.parts.wires[name], name, chosen.uniform(1, 4), mute=True)
        self.parts.wires[name].reset_all()  # what was swallowed would else be waited for
        return about

    def reset(self, chosen) -> str:
        name = chosen.choice(self.parts.names)
        self.parts.wires[name].reset_all()
        return name

    # The bucket ------------------------------------------------------------------------------------------------------

    def bucket_slow(self, chosen) -> str:
        return self._with(self.parts.bucket, "the bucket", chosen.uniform(1, 2), latency=0.3)

    def bucket_loses(self, chosen) -> str:
        return self._with(self.parts.bucket, "the bucket", chosen.uniform(1, 2), lose_chance=0.3)

    def bucket_damages(self, chosen) -> str:
        return self._with(self.parts.bucket, "the bucket", chosen.uniform(1, 2), spoil_replies=3, spoil_requests=3)

    def bucket_stops(self, chosen) -> str:
        seconds = chosen.uniform(2, 4)
        self.parts.swift.signal("object", signal.SIGSTOP)
        self._hold(seconds)
        self.parts.swift.signal("object", signal.SIGCONT)
        return f"for {seconds:.1f} s"

    def bucket_dies(self, chosen) -> str:
        kind = chosen.choice(["object", "container", "proxy"])
        self.parts.swift.kill(kind)
        self._hold(chosen.uniform(0.5, 2))
        self._restarted.add(kind)
        self.parts.swift.start(kind)
        self.parts.swift.wait_until_listening(kind)
        return kind
