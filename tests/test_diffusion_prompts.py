"""Prompts of image jobs: counted, embedded alone, remembered within bytes; encoders that stay or come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_pipeline import SHAPES, save, write

from inferfleet.engine.diffusion.licence import DEV
from inferfleet.engine.diffusion.pipeline import load_pipeline
from inferfleet.engine.diffusion.prompts import Embeddings, PromptCache, PromptEmbedder
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import InvalidRequest, NumericalError
from inferfleet.engine.model_errors import ModelUnavailable
from inferfleet.engine.progress import Progress

#: "a red circle" is three words of the small vocabulary, and the end.
PROMPT, COUNT = "a red circle", 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    write(path, 0, shards=2)
    return path


def prompts_of(folder: Path, device: str = "cpu", **settings) -> PromptEmbedder:
    spec = DiffusionSpec(path=str(folder), device=device, **{"accept_licence": DEV} | settings)
    return load_pipeline(spec, Progress()).prompts


def same(one: Embeddings, other: Embeddings) -> bool:
    return torch.equal(one.t5, other.t5) and torch.equal(one.pooled, other.pooled)


def test_a_prompt_becomes_a_sequence_and_a_vector(folder):
    prompts = prompts_of(folder)

    found = prompts.embed(PROMPT, 32)

    assert found.num_tokens == prompts.count(PROMPT) == COUNT
    assert found.t5.shape == (32, SHAPES[0].t5_model)
    assert found.pooled.shape == (SHAPES[0].clip_hidden,)
    # The sequence's length is part of what the transformer reads: padding takes part.
    assert not torch.equal(found.t5[:COUNT], prompts.embed(PROMPT, 16).t5[:COUNT])


def test_a_prompt_longer_than_the_sequence_is_refused_with_both_numbers(folder):
    prompts = prompts_of(folder)
    prompts.embed(PROMPT, COUNT)

    with pytest.raises(
        InvalidRequest, match=f"the prompt has {COUNT} tokens, more than max_sequence_length 3"
    ) as caught:
        prompts.embed(PROMPT, COUNT - 1)

    assert caught.value.param == "prompt"


def test_what_is_no_text_is_refused(folder):
    prompts = prompts_of(folder)
    for ask in (prompts.count, lambda prompt: prompts.embed(prompt, 32)):
        with pytest.raises(InvalidRequest, match="no Unicode text at character 4") as caught:
            ask("red \ud800")
        assert caught.value.param == "prompt"


def test_the_empty_prompt_is_a_prompt(folder):
    found = prompts_of(folder).embed("", 8)

    assert found.num_tokens == 1
    assert found.t5.isfinite().all() and found.pooled.isfinite().all()


def test_a_prompt_is_computed_once_and_does_not_depend_on_its_neighbours(folder):
    prompts, others = prompts_of(folder), prompts_of(folder)

    first = prompts.embed(PROMPT, 32)
    prompts.embed("a green cat", 32)
    others.embed("a green cat", 32)

    assert prompts.embed(PROMPT, 32) is first
    assert same(others.embed(PROMPT, 32), first)
    assert prompts.stats() == {
        "prompt_cache_entries": 2,
        "prompt_cache_bytes": 2 * first.num_bytes,
        "prompt_cache_hits": 1,
        "prompt_cache_misses": 2,
    }


def entry(size: int) -> Embeddings:
    return Embeddings(torch.zeros(size, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), 1)


def test_the_cache_forgets_what_was_not_used_for_longest_and_stays_within_its_bytes():
    cache = PromptCache(100)
    for name in "abc":
        cache.put((name, 1), entry(30))
    assert cache.get(("a", 1)) is not None

    cache.put(("d", 1), entry(40))

    assert [name for name in "abcd" if (name, 1) in cache] == ["a", "c", "d"]
    assert cache.num_bytes == 100
    # What is larger than all of it is not kept, and nothing makes room for it.
    cache.put(("e", 1), entry(101))
    assert ("e", 1) not in cache and len(cache) == 3


def test_a_cache_of_no_bytes_keeps_nothing(folder):
    prompts = prompts_of(folder, prompt_cache_bytes=0)

    first, second = prompts.embed(PROMPT, 32), prompts.embed(PROMPT, 32)

    assert first is not second and same(first, second)
    assert prompts.stats()["prompt_cache_entries"] == prompts.stats()["prompt_cache_bytes"] == 0


def test_offloaded_encoders_give_the_same_numbers_and_hold_none_between_prompts(folder):
    resident, offloaded = prompts_of(folder), prompts_of(folder, encoders="offloaded")

    def held() -> int:
        modules = (offloaded._clip, offloaded._t5)
        return sum(weight.nbytes for module in modules for weight in module.parameters() if not weight.is_meta)

    assert held() == 0
    for prompt in (PROMPT, "a green cat"):
        assert same(offloaded.embed(prompt, 32), resident.embed(prompt, 32))
        assert held() == 0


def test_an_offloaded_encoder_never_holds_more_than_one_of_its_parts(folder):
    offloaded = prompts_of(folder, encoders="offloaded")
    most = []
    for _, part in offloaded._t5.stages():
        part.register_forward_hook(
            lambda *_: most.append(sum(not weight.is_meta for weight in offloaded._t5.parameters())), prepend=True
        )

    offloaded.embed(PROMPT, 32)

    parts = [len(part.state_dict()) for _, part in offloaded._t5.stages()]
    assert most == parts
    assert sum(parts) == len(offloaded._t5.state_dict())


def test_offloaded_weights_that_went_away_are_named_and_come_back(tmp_path):
    write(tmp_path, 0)
    prompts = prompts_of(tmp_path, encoders="offloaded")
    path = tmp_path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)

    path.rename(path.with_suffix(".away"))
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors"):
        prompts.embed(PROMPT, 32)
    save(path.parent, "model", {name: tensor for name, tensor in tensors.items() if not name.endswith("wo.weight")})
    with pytest.raises(ModelUnavailable, match=r"has lost the tensor encoder.block.0.*wo.weight"):
        prompts.embed(PROMPT, 32)
    save(path.parent, "model", tensors | {"shared.weight": tensors["shared.weight"][:-1].clone()})
    with pytest.raises(ModelUnavailable, match=r"shared.weight has changed its shape"):
        prompts.embed(PROMPT, 32)
    assert all(weight.is_meta for weight in prompts._t5.parameters())

    path.with_suffix(".away").rename(path)

    assert same(prompts.embed(PROMPT, 32), prompts_of(tmp_path).embed(PROMPT, 32))


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_numbers_that_are_not_finite_are_an_error_and_are_not_remembered(tmp_path, component):
    write(tmp_path, 0)
    path = tmp_path / component / "model.safetensors"
    tensors = load_file(path)
    norm = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save(path.parent, "model", tensors | {norm: tensors[norm] * float("nan")})
    prompts = prompts_of(tmp_path)

    with pytest.raises(NumericalError, match="not finite"):
        prompts.embed(PROMPT, 32)

    assert prompts.stats()["prompt_cache_entries"] == 0


@pytest.mark.gpu
def test_offloaded_encoders_free_the_gpu_after_each_prompt(folder):
    resident = prompts_of(folder, device="cuda")
    expected = resident.embed(PROMPT, 32)
    del resident
    prompts = prompts_of(folder, device="cuda", encoders="offloaded")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    found = prompts.embed(PROMPT, 32)

    # Allocations are whole blocks of 512 bytes.
    assert torch.cuda.memory_allocated() - before <= found.num_bytes + 2 * 512
    torch.testing.assert_close(found.t5, expected.t5, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-5)
