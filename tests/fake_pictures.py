"""Image jobs of the scripted engine. A picture is a small PNG made of nothing but the request, so whoever paints it
again after a crash must paint the same.

It obeys words in the prompt: `step=S` (seconds a step), `fail`, `exit=N` and `hang=N` (at step N), `exit_once=FILE` and
`hang_once=FILE` (at step 3, unless FILE exists, which it makes), `last_words=FILE` (dies after its first picture,
once), `bytes=N` (makes the file so much larger), `lazy` (makes one picture less than asked).
"""

import base64
import hashlib
import os
import struct
import time
import zlib
from pathlib import Path

STEP_SECONDS = 0.002
DEFAULT_SIZE = 64
DEFAULT_STEPS = 4


def picture(seed, width=DEFAULT_SIZE, height=DEFAULT_SIZE, init_image=None, size=0):
    """A PNG of one colour that its seed and init image give."""
    digest = hashlib.sha256(f"{seed}".encode() + (init_image or b"")).digest()
    rows = (b"\0" + digest[:3] * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    padding = b"pad\0" + b"x" * size
    chunks = ((b"IHDR", header), (b"tEXt", padding), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


class Painting:
    """One running request: all its pictures move on at once."""

    def __init__(self, message):
        self.id = message["id"]
        self.wanted = wanted = message["image"]
        pairs = (word.partition("=") for word in wanted["prompt"].split())
        self.options = {name: value for name, _, value in pairs}
        self.n = wanted.get("n") or 1
        self.steps = wanted.get("num_inference_steps") or DEFAULT_STEPS
        self.width, self.height = wanted.get("width") or DEFAULT_SIZE, wanted.get("height") or DEFAULT_SIZE
        self.init_image = base64.b64decode(wanted.get("init_image") or "")
        self.num_done = self.num_painted = 0
        self.cancelled = False

    @property
    def num_rows(self):
        return self.n

    @property
    def step_seconds(self):
        return float(self.options.get("step", STEP_SECONDS))

    @property
    def num_wanted(self):
        return self.n - ("lazy" in self.options)

    @property
    def done(self):
        return self.cancelled or self.num_painted >= self.num_wanted

    @property
    def usage(self):
        return {"input_tokens": len(self.wanted["prompt"].split()), "output_tokens": 16 * self.num_painted}

    def step(self):
        """The deltas of one step: of all pictures, or one finished picture."""
        if self.cancelled:
            return []
        self.misbehave()
        if self.num_done < self.steps:
            self.num_done += 1
            return [self.progress(), *self.previews()]
        return [self.paint()]

    def progress(self):
        return {"kind": "progress", "id": self.id, "step": self.num_done * self.n, "steps": self.steps * self.n}

    def previews(self):
        every = self.wanted.get("preview_every")
        if not every or self.num_done % every:
            return []
        data = base64.b64encode(f"preview {self.num_done}".encode()).decode()
        told = {"kind": "preview", "id": self.id, "step": self.num_done, "content_type": "image/jpeg", "b64_json": data}
        return [told | {"index": index} for index in range(self.n)]

    def paint(self):
        index = self.num_painted
        self.num_painted += 1
        seed = self.wanted["seed"] + index
        data = picture(seed, self.width, self.height, self.init_image, int(self.options.get("bytes", 0)))
        told = {"kind": "picture", "id": self.id, "index": index, "seed": seed, "content_type": "image/png"}
        size = {"width": self.width, "height": self.height}
        return told | size | {"b64_json": base64.b64encode(data).decode()}

    def misbehave(self):
        if self.num_done >= int(self.options.get("exit", 1 << 30)):
            os._exit(9)
        if self.num_done >= int(self.options.get("hang", 1 << 30)):
            time.sleep(3600)
        deeds = {"exit_once": lambda: os._exit(9), "hang_once": lambda: time.sleep(3600)}
        for option, deed in deeds.items():
            self.once(option, self.num_done >= 3, deed)
        self.once("last_words", self.num_painted >= 1, lambda: os._exit(9))

    def once(self, option, due, deed):
        path = self.options.get(option)
        if path and due and not Path(path).exists():
            Path(path).touch()
            deed()
