"""A small deterministic model of our own behind the engine's seams, and engines around it that take milliseconds."""

from __future__ import annotations

import functools
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from inferfleet.engine.cache_spec import CacheSpec, KeyValues
from inferfleet.engine.config import ModelConfig
from inferfleet.engine.engine import Engine
from inferfleet.engine.families import LoadedModel
from inferfleet.engine.loader import EngineSpec, build_engine
from inferfleet.engine.output import StepOutput
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.sight import Sight
from inferfleet.engine.text.tokenizer import Tokenizer

HIDDEN, HEADS, HEAD_DIM = 32, 4, 8
#: Bytes 0..255, then <eos>, then ids that the tokenizer does not know, as vocabularies are padded.
EOS, VOCAB = 256, 260
CONTEXT = 256


class TinyModel:
    """Three attention layers, one windowed, and a fourth that reads the first's keys and values."""

    border = None
    cache_spec = CacheSpec((KeyValues(2, HEAD_DIM), KeyValues(1, HEAD_DIM, Sight(window=11)), KeyValues(4, HEAD_DIM)))

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.weights = [torch.randn(HIDDEN, 3 * HIDDEN, generator=generator) * HIDDEN**-0.5 for _ in range(4)]
        #: Token id whose hidden state becomes NaN, as a broken weight or an overflow would do.
        self.spoiled_token: int | None = None
        #: Raised by the next forward passes, one each.
        self.errors: list[Exception] = []
        self.num_forwards = 0

    def forward(self, input_ids: Tensor, positions: Tensor, batch) -> Tensor:
        self.num_forwards += 1
        if self.errors:
            raise self.errors.pop(0)
        x = self.embedding[input_ids] + torch.sin(positions[:, None] * torch.arange(1, HIDDEN + 1) * 0.1)
        if self.spoiled_token is not None:
            x = torch.where((input_ids == self.spoiled_token)[:, None], float("nan"), x)
        for number, weight in enumerate(self.weights):
            q, k, v = (x @ weight).split(HIDDEN, dim=-1)
            owner = number % 3
            heads = self.cache_spec.layers[owner].num_kv_heads
            k, v = (part[:, : heads * HEAD_DIM].view(-1, heads, HEAD_DIM).contiguous() for part in (k, v))
            keys, values = (None, None) if number == 3 else (k, v)
            out = batch.attend(owner, q.reshape(-1, HEADS, HEAD_DIM), keys, values, scale=HEAD_DIM**-0.5)
            x = torch.nn.functional.rms_norm(x + out.reshape(-1, HIDDEN), (HIDDEN,))
        return x

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.T * 0.3


@functools.cache
def tokenizer_json() -> str:
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return backend.to_str()


def tiny_engine(folder: Path, *, model=None, **settings) -> Engine:
    """An engine around a TinyModel, or `model`.

    Its cache is NaN where nothing was written, so that no stale slot goes unseen.
    """
    (folder / "tokenizer.json").write_text(tokenizer_json())
    config = ModelConfig("Tiny", {}, VOCAB, CONTEXT, (EOS,), None, None, "float32", {})
    loaded = LoadedModel(model or TinyModel(), config, "tiny", folder, None, torch.float32, torch.device("cpu"), {})
    defaults = {"path": str(folder), "block_size": 4, "kv_cache_tokens": 1024, "max_num_seqs": 16}
    engine, _ = build_engine(loaded, Tokenizer(folder), EngineSpec(**(defaults | settings)))
    for tensor in chain.from_iterable(engine.builder.cache.blocks.values()):
        tensor.fill_(float("nan"))
    return engine


def run(engine: Engine, limit: int = 1000) -> dict[str, dict[int, dict]]:
    """Steps to the end: by id and answer its token_ids, text, finish_reason, logprobs; errors by id under -1."""
    answers: dict[str, dict[int, dict]] = {}
    steps = 0
    while engine.has_work:
        steps += 1
        assert steps < limit, "no end in sight"
        gather(answers, engine.step())
    return answers


def gather(answers: dict[str, dict[int, dict]], out: StepOutput) -> None:
    for delta in out.deltas:
        answer = answers.setdefault(delta.id, {}).setdefault(
            delta.index, {"token_ids": [], "text": "", "finish_reason": None, "logprobs": []}
        )
        assert answer["finish_reason"] is None, "news after the end"
        answer["token_ids"] += delta.token_ids
        answer["text"] += delta.text
        answer["finish_reason"] = delta.finish_reason
        answer["logprobs"] += delta.logprobs or []
    for name, error in out.errors:
        answers.setdefault(name, {})[-1] = {"error": error}
    for name, usage in out.finished:
        answers.setdefault(name, {})[-1] = {"usage": usage}


def greedy(max_tokens: int = 12, **fields) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def seeded(seed: int, max_tokens: int = 12, **fields) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, **{"ignore_eos": True, **fields})
