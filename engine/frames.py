"""One step as bytes, from which the other ranks of a split model build the same batch. Knows no process.

4 bytes: length of the header    header: JSON    what lies in the arena: ids, positions, tables, ...
"""

from __future__ import annotations

import json
import struct

from inferfleet.engine.batch import Batch, BatchBuilder
from inferfleet.engine.request import Request
from inferfleet.engine.sampling_params import SamplingParams

_LENGTH = struct.Struct("<I")
_NO_SAMPLING = SamplingParams()


def pack(batch: Batch) -> bytes:
    """The batch that was built last, with its copies of states."""
    shapes, contents = batch.arena.contents()
    sampled = set(map(id, batch.sample_rows))
    header = {
        "shapes": shapes,
        "lens": batch.row_lens,
        "samples": [id(row) in sampled for row in batch.rows],
        "variants": [row.variant for row in batch.rows] if any(row.variant for row in batch.rows) else None,
        "moves": batch.moves,
    }
    words = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(words)), words, contents))


def unpack(builder: BatchBuilder, data: bytes) -> Batch:
    """The same batch over this process's arena and cache; its rows are strangers that know only their variant."""
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    header = json.loads(data[_LENGTH.size : end])
    tensors = builder.arena.adopt([tuple(shape) for shape in header["shapes"]], memoryview(data)[end:])
    variants = header["variants"] or [""] * len(header["lens"])
    rows = [Request("", [], _NO_SAMPLING, variant=variant) for variant in variants]
    lens, moves = ([(first, second) for first, second in header[name]] for name in ("lens", "moves"))
    return builder.rebuild(tensors, rows, header["samples"], lens, moves)
