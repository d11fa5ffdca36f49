"""What a failed step tells the requests that were in it."""

from __future__ import annotations

import logging

import torch

from inferfleet.engine.errors import EngineError, GroupBroken, OutOfMemory

log = logging.getLogger(__name__)


def explain(error: Exception, device: torch.device) -> EngineError:
    """The error of each request in the step. Raises what no later step could survive either."""
    log.error("a step failed", exc_info=error)
    if isinstance(error, GroupBroken):
        raise error
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises again if the device itself is broken: this process has to end
    if isinstance(error, EngineError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("a step with this request needed more memory than the device has")
    return EngineError(f"the step with this request failed: {type(error).__name__}")


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
