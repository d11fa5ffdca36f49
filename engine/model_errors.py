"""Why a model cannot be served: errors of finding, reading and filling a checkpoint. Each says what to do next.

ModelError
├── ModelUnavailable      the folder or hub repository cannot be read (missing, offline, bad revision)
│   ├── LoginNeeded       gated or private, and nobody is logged in
│   └── TermsNotAccepted  gated, and whoever is logged in has not been let in
├── UnsupportedModel      it can be read, but this engine does not run it (architecture, format, own code)
├── BadModelConfig        config.json lacks a field or holds a value that no such model can have
├── BadAdapter            a LoRA adapter's file is damaged, of another kind, or made for another model
└── WeightsMismatch       tensors are missing, unknown or of another shape than the configuration says
"""

from __future__ import annotations

from collections.abc import Sequence

from inferfleet.engine.errors import LoadError

#: An error message names at most this many tensors of each kind; the counts are always whole.
NAMES_SHOWN = 12


class ModelError(LoadError):
    """A model cannot be loaded."""


class ModelUnavailable(ModelError):
    """The model's files cannot be found or fetched."""


class LoginNeeded(ModelUnavailable):
    """The hub shows the model only to somebody who is logged in."""


class TermsNotAccepted(ModelUnavailable):
    """The hub shows the model only to those who accepted its terms."""


class UnsupportedModel(ModelError):
    """The model's files are there, but this engine does not run such a model."""


class BadModelConfig(ModelError):
    """A configuration file lacks a field or holds an impossible value."""


class BadAdapter(ModelError):
    """A LoRA adapter cannot be applied to the model; the message names the adapter and the tensor."""


class WeightsMismatch(ModelError):
    """The tensors of a checkpoint do not fit its configuration: every difference, in one error."""

    def __init__(self, missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]) -> None:
        self.missing, self.extra, self.misshapen = tuple(missing), tuple(extra), tuple(misshapen)
        kinds = (("missing", missing), ("not part of this model", extra), ("misshapen", misshapen))
        parts = [f"{len(names)} {kind}: {_shown(names)}" for kind, names in kinds if names]
        super().__init__("the checkpoint does not fit its config.json; " + "; ".join(parts))


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
