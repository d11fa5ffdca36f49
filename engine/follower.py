"""A rank of a split model behind rank 0: `python -m inferfleet.engine.follower --fd N`.

It loads its share, builds rank 0's batches again and runs them. It plans nothing, samples nothing and knows no text.
The end of the wire is the end of the process, also where a collective hangs: no follower outlives its rank 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
from pathlib import Path

import torch

from inferfleet.engine import frames
from inferfleet.engine.batch import Batch
from inferfleet.engine.errors import EngineError
from inferfleet.engine.families import LoadedModel, load_model
from inferfleet.engine.json_log import start_logging
from inferfleet.engine.layout import CacheLayout
from inferfleet.engine.matformer import read_table
from inferfleet.engine.ranks import Ranks
from inferfleet.engine.sizing import free_memory
from inferfleet.engine.wire import Closed, Message, Wire, watch
from inferfleet.kernels import threads

#: How long a step may go on without rank 0.
END_SECONDS = 1.0

log = logging.getLogger("inferfleet.engine.follower")


def follow(wire: Wire) -> None:
    """Load, then take part in every step until the wire ends."""
    order = wire.hear()
    threads.use(order["threads"])
    group = Ranks(order["rank"], order["size"])
    loaded = _load(wire, order, group)
    wire.tell("loaded", free=free_memory(loaded.device))
    order_of_cache = wire.hear()
    layout = CacheLayout(**order_of_cache["layout"])
    cache = layout.cache(loaded.model.cache_spec, loaded.dtype, loaded.device)
    builder = layout.builder(cache, loaded.device)
    wire.tell("ready")
    group.connect(Path(order_of_cache["meeting_point"]), loaded.device, order["seconds"])
    while True:
        _step(loaded, frames.unpack(builder, wire.receive()))


def _load(wire: Wire, order: Message, group: Ranks) -> LoadedModel:
    try:
        table = order["matformer"]
        slices = None if table is None else read_table(*table)
        return load_model(order["path"], group=group, slices=slices, **order["settings"])
    except Exception as error:
        param = error.param if isinstance(error, EngineError) else None
        wire.tell("failed", message=str(error) or type(error).__name__, param=param)
        raise


@torch.inference_mode()
def _step(loaded: LoadedModel, batch: Batch) -> None:
    hidden = loaded.model.forward(batch.input_ids, batch.positions, batch)
    if len(batch.logits_index):
        loaded.model.compute_logits(hidden[batch.logits_index])


def _end_soon(_: int) -> None:
    """In the watching thread: rank 0 is gone."""
    time.sleep(END_SECONDS)
    os._exit(0)


def main() -> int:
    """Exit status 0 when rank 0 is gone, 1 when the share could not be loaded or a step failed."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.engine.follower", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited socket that rank 0 speaks over")
    options = parser.parse_args()
    start_logging()
    os.set_inheritable(options.fd, False)
    wire = Wire(socket.socket(fileno=options.fd), seconds=60.0)
    watch([wire], _end_soon)
    try:
        follow(wire)
    except Closed:
        os._exit(0)  # nothing to tidy up, and rank 0 waits for it
    except Exception:
        log.exception("a rank ends")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
