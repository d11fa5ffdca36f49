"""What the language models here share beside their layers: where weights go, when they are packed, and the head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from inferfleet.engine.border import Border
from inferfleet.engine.layers.embedding import Head
from inferfleet.engine.layers.slots import Slots, Weight, Weighted, all_slots, fill


class Decoder(nn.Module):
    """Base of a family's model: its modules carry the checkpoint's names, so loading needs no table of renames."""

    #: What the checkpoint puts before every tensor of the text model except the head.
    prefix = "model."
    #: Whether the model's layers take shares, so that several ranks can hold it together.
    can_split = False
    #: Whether a step that only decodes does the same whatever is in it: it asks nothing of a batch but tensors, reads
    #: none of them on the host and updates no state, so that it can be recorded once and replayed.
    can_replay = False
    #: The norm behind the last block, and the head that reads it: every family has both under these names.
    norm: nn.Module
    lm_head: Head

    @property
    def border(self) -> Border | None:
        """Beyond which length another variant computes a sequence; None for most models."""
        return None

    def skipped_tensors(self) -> Iterable[str]:
        """Regular expressions (whole names) of tensors that a checkpoint may hold and this model has no use for."""
        yield r".*\.rotary_emb\.inv_freq"  # old uploads stored what the configuration says
        if self.lm_head.is_tied:
            yield r"(language_model\.)?lm_head\.weight"  # some uploads of tied models hold the embedding again

    def load(self, weights: Iterable[tuple[str, Weight]]) -> None:
        """Fills every weight from (checkpoint name, tensor); raises WeightsMismatch with all differences."""
        fill(self.checkpoint_slots(), weights, self.skipped_tensors())

    def checkpoint_slots(self) -> Slots:
        """What takes each tensor of a checkpoint."""
        return all_slots(self).named(self._checkpoint_name)

    def finalize(self) -> None:
        """Packs what loading could not: layers without tensors of their own, such as a tied head."""
        for module in self.modules():
            if isinstance(module, Weighted):
                module.pack()

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] of `forward` -> float32 [N, V]. The final norm is here: only sampled rows need it."""
        return self.lm_head(self.norm(hidden))

    def _checkpoint_name(self, name: str) -> str:
        return name if name.startswith("lm_head.") else self.prefix + name
