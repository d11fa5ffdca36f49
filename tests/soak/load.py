"""Clients that never give up: each asks again with the same key until it is answered, and notes what was accepted."""

import random
import threading
import time
import uuid

import httpx2
from invariants import Accepted
from live_batches import jsonl, line

#: An answer that tells to come again, with the same key.
AGAIN = {429, 502, 503, 504}
PATIENCE = 40
#: The words of an engine that ends its process each time: that job must become a dead letter.
POISON = "tokens=40 exit=3"


class Load:
    """Threads of clients, from `start` to `stop`."""

    def __init__(self, url, seed, webhooks, clients=5):
        self.url, self.webhooks = url, webhooks
        self.accepted: list[Accepted] = []
        #: Batch id -> custom_id -> what it must say.
        self.batches: dict[str, dict] = {}
        self.complaints: list[str] = []
        self.repeats = 0
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        work = [(self._jobs, (random.Random(f"{seed}.{number}"), number == 0)) for number in range(clients)]
        work.append((self._batches, (random.Random(f"{seed}.batches"),)))
        self._threads = [threading.Thread(target=self._guarded, args=each, daemon=True) for each in work]

    def start(self):
        for thread in self._threads:
            thread.start()

    def stop(self):
        """All that was begun is accepted or refused."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)
            if thread.is_alive():
                self.complaints.append("a client still waits for an answer")

    def _guarded(self, work, arguments):
        try:
            with httpx2.Client(base_url=self.url, trust_env=False, timeout=10) as http:
                work(http, *arguments)
        except Exception as error:
            self.complaints.append(f"a client ended with {type(error).__name__}: {error}")

    def request(self, http, method, path, **options):
        """The answer of a fleet that may be away for a while."""
        deadline = time.monotonic() + PATIENCE
        last = None
        while time.monotonic() < deadline:
            try:
                answer = http.request(method, path, **options)
            except httpx2.TransportError as error:
                last = type(error).__name__
            else:
                if answer.status_code not in AGAIN:
                    return answer
                last = f"{answer.status_code} {answer.text[:200]}"
            self.repeats += 1
            time.sleep(0.1)
        raise AssertionError(f"{method} {path} had no answer in {PATIENCE} s: {last}")

    # Jobs ------------------------------------------------------------------------------------------------------------

    def _jobs(self, http, chosen, poison):
        if poison:
            self._submit(http, Accepted("", frozenset({"failed"}), tokens=40), POISON, "m")
        while not self._stopping.wait(chosen.uniform(0.02, 0.3)):
            job = Accepted("", webhook=chosen.choice([None, *self.webhooks]))
            if chosen.random() < 0.2:
                self._submit(http, job, "a red circle step=0.02", "p")
            else:
                job.tokens = chosen.randrange(2, 80)
                self._submit(http, job, f"tokens={job.tokens} step={chosen.choice([0.002, 0.01, 0.03])}", "m")
            if chosen.random() < 0.1:
                time.sleep(chosen.uniform(0, 0.5))
                self._cancel(http, job)

    def _submit(self, http, job, words, model):
        body = {"model": model, "messages": [{"role": "user", "content": words}]}
        values = {"body": body}
        if model == "p":
            values = {"url": "/v1/images/generations", "body": {"model": model, "prompt": words}}
        if job.webhook:
            values["webhook"] = job.webhook
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        answer = self.request(http, "POST", "/v1/jobs", json=values, headers=headers)
        if answer.status_code != 202:
            self.complaints.append(f"a job was answered {answer.status_code}: {answer.text[:300]}")
            return
        job.id = answer.json()["id"]
        job.ids.add(job.id)
        again = self.request(http, "POST", "/v1/jobs", json=values, headers=headers)
        if again.status_code == 202:
            job.ids.add(again.json()["id"])
        else:
            self.complaints.append(f"the repeat of {job.id} was answered {again.status_code}: {again.text[:300]}")
        with self._lock:
            self.accepted.append(job)

    def _cancel(self, http, job):
        """A cancel that was accepted is final; one that comes too late says so."""
        if not job.id:
            return
        first = self.request(http, "POST", f"/v1/jobs/{job.id}/cancel")
        if first.status_code == 202:
            job.ends = frozenset({"cancelled"})
        elif first.status_code != 409:
            self.complaints.append(f"the cancel of {job.id} was answered {first.status_code}: {first.text[:300]}")

    # Batches ---------------------------------------------------------------------------------------------------------

    def _batches(self, http, chosen):
        while not self._stopping.wait(chosen.uniform(1, 4)):
            lines = {f"l{n}": (chosen.randrange(1 << 30), chosen.randrange(1, 20)) for n in range(40)}
            raw = [line(name, f"tokens={size}", model="m", seed=seed) for name, (seed, size) in lines.items()]
            raw.append(line("bad", "fail", model="m"))
            lines["bad"] = None
            key = uuid.uuid4().hex
            files = {"file": ("in.jsonl", jsonl(raw)), "purpose": (None, "batch")}
            made = self.request(http, "POST", "/v1/files", files=files, headers={"Idempotency-Key": f"{key}-f"})
            if made.status_code != 200:
                self.complaints.append(f"a file was answered {made.status_code}: {made.text[:300]}")
                continue
            wanted = {"input_file_id": made.json()["id"], "endpoint": "/v1/chat/completions",
                      "completion_window": "24h"}  # fmt: skip
            batch = self.request(http, "POST", "/v1/batches", json=wanted, headers={"Idempotency-Key": key})
            if batch.status_code != 200:
                self.complaints.append(f"a batch was answered {batch.status_code}: {batch.text[:300]}")
                continue
            self.batches[batch.json()["id"]] = lines
