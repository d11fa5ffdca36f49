"""From a prompt to what the transformer reads of it: T5's hidden states and CLIP's vector, kept for the next job.

A prompt is embedded alone, so that its embeddings do not depend on its neighbours. Nothing is cut silently: a prompt
longer than the sequence is refused; CLIP's 77 tokens are cut, as FLUX was trained.

Shapes: L tokens of the sequence, padding included, D hidden size of T5, P of CLIP.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inferfleet.engine.diffusion.tokenizers import ClipTokenizer, T5Tokenizer
from inferfleet.engine.errors import InvalidRequest, NumericalError
from inferfleet.engine.models.clip_text import ClipText
from inferfleet.engine.models.t5_encoder import T5Encoder


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One prompt, embedded. Shared by all jobs with that prompt: never written to."""

    #: [L, D]
    t5: Tensor
    #: [P]
    pooled: Tensor
    #: Of T5, the end included and padding not.
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        return self.t5.nbytes + self.pooled.nbytes


class PromptCache:
    """The embeddings used last, within so many bytes of device memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._entries: OrderedDict[tuple[str, int], Embeddings] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._entries

    def get(self, key: tuple[str, int]) -> Embeddings | None:
        """Counts a hit or a miss."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return found

    def put(self, key: tuple[str, int], embeddings: Embeddings) -> None:
        """Forgets the longest unused ones to make room; what is larger than the cache is not kept."""
        if embeddings.num_bytes > self.max_bytes:
            return
        self.num_bytes += embeddings.num_bytes
        self._entries[key] = embeddings
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes


class PromptEmbedder:
    """Both encoders, both tokenizers and the cache."""

    def __init__(
        self,
        clip: ClipText,
        t5: T5Encoder,
        clip_tokenizer: ClipTokenizer,
        t5_tokenizer: T5Tokenizer,
        device: torch.device,
        *,
        cache_bytes: int,
        offloaded: bool,
    ) -> None:
        self._clip, self._t5 = clip, t5
        self._clip_tokenizer, self._t5_tokenizer = clip_tokenizer, t5_tokenizer
        self._device, self._offloaded = device, offloaded
        self._cache = PromptCache(cache_bytes)

    @property
    def stages(self) -> list[nn.Module]:
        """The parts of both encoders, in the order in which a prompt passes them."""
        return [part for encoder in (self._clip, self._t5) for _, part in encoder.stages()]

    def count(self, prompt: str) -> int:
        """T5's tokens of a prompt, the end included. InvalidRequest for text that is no Unicode."""
        return len(self._ids(prompt))

    def embed(self, prompt: str, max_sequence_length: int) -> Embeddings:
        """Computed, or found in the cache.

        Raises InvalidRequest for a prompt of more than max_sequence_length tokens, NumericalError if an encoder's
        results are not finite, ModelUnavailable if offloaded weights cannot be read again.
        """
        key = (prompt, max_sequence_length)
        if (found := self._cache.get(key)) is not None:
            return found
        ids = self._ids(prompt)
        if len(ids) > max_sequence_length:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens, more than max_sequence_length {max_sequence_length}", param="prompt"
            )
        embeddings = self._compute(prompt, ids, max_sequence_length)
        self._cache.put(key, embeddings)
        return embeddings

    def stats(self) -> dict[str, int]:
        cache = self._cache
        return {
            "prompt_cache_entries": len(cache),
            "prompt_cache_bytes": cache.num_bytes,
            "prompt_cache_hits": cache.hits,
            "prompt_cache_misses": cache.misses,
        }

    def _ids(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"prompt is no Unicode text at character {error.start}", param="prompt") from error
        return self._t5_tokenizer.encode(prompt)

    @torch.no_grad()
    def _compute(self, prompt: str, ids: list[int], length: int) -> Embeddings:
        words = torch.tensor([self._clip_tokenizer.encode(prompt)], device=self._device)
        padded = torch.tensor([self._t5_tokenizer.pad(ids, length)], device=self._device)
        try:
            pooled, hidden = self._clip(words)[0], self._t5(padded)[0]
        finally:
            if self._offloaded and self._device.type == "cuda":
                # Freed weights of odd sizes would stay reserved and lie in the transformer's way.
                torch.cuda.empty_cache()
        if not (pooled.isfinite().all() and hidden.isfinite().all()):
            raise NumericalError("a text encoder's results for this prompt are not finite")
        return Embeddings(hidden, pooled, len(ids))
