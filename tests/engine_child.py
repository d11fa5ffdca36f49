"""The engine process as its parent sees it."""

import json
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

PATIENCE = 60
#: Where engines run: a CPU, or a GPU with INFERFLEET_TEST_DEVICE=cuda.
DEVICE = os.environ.get("INFERFLEET_TEST_DEVICE", "cpu")


class Child:
    """One engine process; `load`, `add` and the like say what its parent would."""

    def __init__(self, stderr):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "inferfleet.engine.process", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=stderr,
            )
        self.wire = Connection(ours.detach())

    def send(self, op, **fields):
        self.wire.send_bytes(json.dumps({"op": op, **fields}).encode())

    def receive(self):
        assert self.wire.poll(PATIENCE), "no message"
        return json.loads(self.wire.recv_bytes())

    def load(self, folder, **spec):
        defaults = {"path": str(folder), "device": DEVICE, "dtype": "float32", "max_model_len": 256}
        self.send("load", model="tiny", spec=defaults | {"kv_cache_tokens": 4096, "threads": 1} | spec)
        self.progress = []
        while (message := self.receive())["op"] == "loading":
            self.progress.append(message)
        return message

    def add(self, name, text="hello", *, sampling=None, **fields):
        message = {
            "id": name,
            "messages": [{"role": "user", "content": text}],
            "chat_template_kwargs": {},
            "sampling": {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | (sampling or {}),
            "cache_salt": "tenant",
            "priority": 0,
            "resume": {},
        }
        self.send("add", **message | fields)

    def until_end(self, *names):
        """All step messages until each id has finished or failed; per id its tokens, text and end."""
        told = {name: {"token_ids": [], "text": "", "reason": None, "usage": None, "error": None} for name in names}
        steps = []
        while any(one["usage"] is None and one["error"] is None for one in told.values()):
            message = self.receive()
            assert message["op"] == "step"
            steps.append(message)
            for delta in message["deltas"]:
                one = told[delta["id"]]
                one["token_ids"] += delta["token_ids"]
                one["text"] += delta["text"]
                one["reason"] = delta["finish_reason"]
            for end in message["finished"]:
                told[end["id"]]["usage"] = end["usage"]
            for error in message["errors"]:
                told[error["id"]]["error"] = error
        return told, steps

    def kill(self):
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self):
        self.wire.close()
        return self.process.wait(PATIENCE)
