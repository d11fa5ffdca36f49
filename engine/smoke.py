"""The first forward passes of a loaded engine: a model that cannot answer is refused before anybody waits for it.

They also have every kernel compiled, which happens on first use and must not happen to the first job. What is said
does not matter here, only that it can be said.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inferfleet.engine.engine import Engine
from inferfleet.engine.errors import EngineError, LoadError
from inferfleet.engine.text.prompt import PromptEncoder

TEXT = "The first words"
#: A prompt of more tokens than this would make loading slower and prove nothing more.
MAX_TOKENS = 8


def smoke(engine: Engine, prompts: PromptEncoder) -> None:
    """Computes a short prompt and decodes one token. Raises LoadError when the logits are not those of a model."""
    longest, vocab_size = engine.admission.max_model_len, engine.admission.vocab_size
    prompt = _prompt(prompts, vocab_size)[: max(1, min(MAX_TOKENS, longest - 1))]
    try:
        logits = engine.score(prompt, num_decoded=min(1, longest - len(prompt)))
    except EngineError:
        raise
    except Exception as error:
        raise LoadError(f"the smoke forward failed: {type(error).__name__}: {error}") from error
    _check(logits, prompt, vocab_size)


def _prompt(prompts: PromptEncoder, vocab_size: int) -> list[int]:
    """As the model is used to read, its first special token included; some tokenizers know ids that the model lacks."""
    return [token for token in prompts.encode_text(TEXT) if token < vocab_size] or [0]


def _check(logits: Tensor, prompt: Sequence[int], vocab_size: int) -> None:
    if logits.shape[-1] != vocab_size:
        width = logits.shape[-1]
        raise LoadError(f"the smoke forward gave {width} logits a token, but config.json says vocab_size {vocab_size}")
    # As the sampler sees it: an id may be ruled out with -inf, but the best one must be a number.
    best = logits.amax(dim=-1)
    bad = (~best.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = bad[0]
        kind = "NaN" if best[first].isnan() else "infinity"
        # Not at which token of a prompt: attention spreads a NaN over all tokens that are computed together.
        place = f"in a prompt of {len(prompt)} tokens" if first < len(prompt) else "at the first decoded token"
        raise LoadError(
            f"the smoke forward gave {kind} {place}: these weights do not make a working model;"
            " fetch the checkpoint again, or set another dtype"
        )
