"""A scripted engine that speaks the real one's protocol: `python fake_engine.py --fd N`. No model, no torch.

Token n of answer i is a hash of (seed, i, n), so whoever goes on after a crash must say the same. It obeys words in the
last message: `tokens=N` (answer length), `cut` (ends as if by its limit), `step=S` (seconds a step while it runs),
`fail`, `exit=N` and `hang=N` (at token N), `exit_once=FILE` and `hang_once=FILE` (at token 3, unless FILE exists, which
it makes). The path of the model obeys too: `refuse` (cannot load), `die` (dies while loading), `load=S` (seconds),
`parts=N` (told so many times), `slices=A,B` (what its card offers). A request for a slice is answered as if its seed
were "slice:seed".

With `image` in its path it is an image model: see fake_pictures.py.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from fake_pictures import DEFAULT_SIZE, DEFAULT_STEPS, Painting

STEP_SECONDS = 0.002
MAX_MODEL_LEN = 4096


def token(seed, index, position):
    return int.from_bytes(hashlib.sha256(f"{seed}.{index}.{position}".encode()).digest()[:2], "big")


def text_of(token_id):
    return f"{token_id:x} "


def answer(seed, length, index=0):
    """What the engine says in the end, for tests to compare with."""
    return "".join(text_of(token(seed, index, position)) for position in range(length))


def words_of(message):
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def options_of(words):
    pairs = (word.partition("=") for word in words.split())
    return {name: value for name, _, value in pairs}


class Answer:
    """One running request."""

    num_rows = 1

    def __init__(self, message):
        self.id = message["id"]
        self.sampling = message["sampling"]
        slice_name = message.get("matformer_slice")
        self.seed = f"{slice_name}:{self.sampling['seed']}" if slice_name else self.sampling["seed"]
        self.options = options_of(words_of(message["messages"][-1]))
        self.num_prompt_tokens = sum(len(words_of(said).split()) for said in message["messages"])
        self.length = min(int(self.options.get("tokens", 8)), self.sampling.get("max_tokens", MAX_MODEL_LEN))
        resume = message["resume"]
        self.said = [len(resume.get(str(i), {}).get("token_ids", [])) for i in range(self.sampling.get("n", 1))]
        self.cancelled = False

    @property
    def step_seconds(self):
        return float(self.options.get("step", STEP_SECONDS))

    def misbehave(self):
        said = self.said[0]
        if said >= int(self.options.get("exit", 1 << 30)):
            os._exit(9)
        if said >= int(self.options.get("hang", 1 << 30)):
            time.sleep(3600)
        for option, deed in (("exit_once", lambda: os._exit(9)), ("hang_once", lambda: time.sleep(3600))):
            path = self.options.get(option)
            if path and said >= 3 and not Path(path).exists():
                Path(path).touch()
                deed()

    def step(self):
        """The deltas of one step."""
        if self.cancelled:
            unfinished = [i for i, said in enumerate(self.said) if said < self.length]
            return [self.delta(i, [], "cancelled") for i in unfinished]
        self.misbehave()
        deltas = []
        for index, said in enumerate(self.said):
            if said < self.length:
                self.said[index] += 1
                done = said + 1 == self.length
                end = "length" if "cut" in self.options else "stop"
                deltas.append(self.delta(index, [token(self.seed, index, said)], end if done else None))
            elif said == self.length and not deltas and self.done:
                deltas.append(self.delta(index, [], "stop"))
        return deltas

    def delta(self, index, token_ids, finish_reason):
        logprobs = None
        if self.sampling.get("logprobs") is not None:
            logprobs = [{"token": text_of(t), "logprob": -1.0, "bytes": None, "top_logprobs": []} for t in token_ids]
        text = "".join(map(text_of, token_ids))
        return {"id": self.id, "index": index, "token_ids": token_ids, "text": text, "logprobs": logprobs,
                "finish_reason": finish_reason}  # fmt: skip

    @property
    def done(self):
        return self.cancelled or all(said >= self.length for said in self.said)

    @property
    def usage(self):
        return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": sum(self.said), "cached_tokens": 0}


class FakeEngine:
    def __init__(self, connection):
        self.connection = connection
        self.running = {}
        self.num_steps = 0

    def send(self, **message):
        self.connection.send_bytes(json.dumps(message).encode())

    def load(self):
        message = json.loads(self.connection.recv_bytes())
        options = options_of(message["spec"]["path"])
        parts = int(options.get("parts", 0))
        for part in range(parts):
            self.send(op="loading", phase="read", done=part << 20, total=parts << 20)
            time.sleep(float(options.get("pause", 0.01)))
        time.sleep(float(options.get("load", 0)))
        if "refuse" in options:
            self.send(op="failed", code="load_failed", message="the scripted model refuses")
            return False
        if "die" in options:
            os._exit(7)
        self.max_num_seqs = message["spec"]["max_num_seqs"]
        if "image" in options:
            return self.load_image(message["spec"])
        card = {"kind": "text", "max_model_len": MAX_MODEL_LEN, "vocab_size": 65536, "max_token_bytes": 5,
                "family": "fake", "architecture": "Fake", "dtype": "none", "device": message["spec"]["device"],
                "kv_cache_tokens": 1,
                "load_seconds": {}, "matformer_slices": options["slices"].split(",") if "slices" in options else [],
                "matformer_slice": None}  # fmt: skip
        self.send(op="ready", card=card)
        return True

    def load_image(self, spec):
        self.max_num_seqs = (spec.get("image") or {}).get("max_batch_size", 8)
        card = {"kind": "image", "family": "flux", "architecture": "FluxPipeline", "guided": False,
                "licence": "apache-2.0", "commit": None, "dtype": "none", "device": spec["device"],
                "quantization": None, "loras": ["ink"], "default_size": DEFAULT_SIZE, "default_steps": DEFAULT_STEPS,
                "default_guidance": None, "max_sequence_length": 256, "max_pixels": 1 << 20, "max_side": 4096,
                "multiple_of": 16, "max_steps": 100, "max_batch_size": self.max_num_seqs,
                "load_seconds": {}}  # fmt: skip
        self.send(op="ready", card=card)
        return True

    def serve(self):
        while True:
            while self.connection.poll(0 if self.running else None):
                self.handle(json.loads(self.connection.recv_bytes()))
            self.step()

    def handle(self, message):
        if message["op"] == "stop":
            sys.exit(0)
        if message["op"] == "cancel":
            if message["id"] in self.running:
                self.running[message["id"]].cancelled = True
        elif message["op"] == "add":
            added = Painting(message) if "image" in message else Answer(message)
            if "fail" in added.options:
                error = {"id": added.id, "code": "nan_logits", "message": "scripted", "param": None}
                self.say(errors=[error])
            else:
                self.running[added.id] = added

    def step(self):
        batch, room = [], self.max_num_seqs
        for running in self.running.values():
            if running.num_rows <= room or not batch:
                batch.append(running)
                room -= running.num_rows
        time.sleep(max((answer.step_seconds for answer in batch), default=0))
        deltas, finished = [], []
        for running in batch:
            deltas += running.step()
            if running.done:
                finished.append({"id": running.id, "usage": running.usage})
                del self.running[running.id]
        self.say(deltas=deltas, finished=finished)

    def say(self, deltas=(), finished=(), errors=()):
        self.num_steps += 1
        stats = {"running": len(self.running), "waiting": 0, "kv_usage": 0.0, "preemptions": 0, "prefix_queries": 0,
                 "prefix_hits": 0, "batch_tokens": len(deltas)}  # fmt: skip
        self.send(op="step", step=self.num_steps, deltas=list(deltas), finished=list(finished), errors=list(errors),
                  stats=stats)  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    engine = FakeEngine(Connection(parser.parse_args().fd))
    try:
        if engine.load():
            engine.serve()
    except (EOFError, OSError):
        pass


if __name__ == "__main__":
    main()
