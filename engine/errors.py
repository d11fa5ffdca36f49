"""What can go wrong inside the engine. `code` is what a job's error says; the message is for whoever sent it.

EngineError                    engine_error
├── LoadError                  load_failed              the model's files or settings do not make an engine
├── InvalidRequest             invalid_request          a field of the request is outside its limits
│   └── ContextLengthExceeded  context_length_exceeded  prompt and answer can never fit
├── NumericalError             nan_logits               a row's logits were not finite
├── OutOfMemory                out_of_memory            a step needed more memory than there is
├── GroupBroken                engine_error             a rank of a split model is gone: no later step can run either
└── SchedulerStuck             engine_error             a bug in us: work, but no step that advances it
"""

from __future__ import annotations


class EngineError(Exception):
    """The engine failed at this request."""

    code = "engine_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """param: the field at fault, where there is one."""
        super().__init__(message)
        self.message = message
        self.param = param


class LoadError(EngineError):
    """The model cannot be served as asked."""

    code = "load_failed"


class InvalidRequest(EngineError):
    """A field of the request is outside its limits."""

    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and answer together are longer than this engine can ever hold."""

    code = "context_length_exceeded"


class NumericalError(EngineError):
    """The model's logits for this request were not finite."""

    code = "nan_logits"


class OutOfMemory(EngineError):
    """The step needed more memory than the device has."""

    code = "out_of_memory"


class GroupBroken(EngineError):
    """The ranks of a split model do not compute together any more; the engine has to be loaded again."""


class SchedulerStuck(EngineError):
    """There is work, but no plan advances any of it."""
