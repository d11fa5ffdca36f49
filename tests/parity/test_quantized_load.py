"""Weights that are coded while they are read: against transformers with the decoded weights, so that only our own
rounding of sums is left; which weights are coded; and how much memory that takes on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.writing import Reference, write_tokenizer
from parity.device import CPU, DEVICE
from parity.direct import Direct
from parity.memory import PeakMemory
from parity.test_parity_logits import prompts
from parity.threads_as_ranks import Meeting, ThreadGroup, load_split, on_every_rank
from safetensors.torch import load_file, save_file

from inferfleet.engine.config import read_config
from inferfleet.engine.families import find_family, load_model
from inferfleet.engine.group import ALONE, Group
from inferfleet.engine.place import Place
from inferfleet.kernels.quantized import KINDS, quantise

NAMES = list(ARCHITECTURES)
#: What the last parts of quantised weights' names may be, in all families together. A weight that turns up beside
#: these is either a new projection, to be added, or a router that forgot `place.exact`.
PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("in_proj_qkvz", "out_proj"),
    *("w1", "w2", "w3"),
    *("linear_left", "linear_right", "embedding_projection"),
    *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
}

#: The matrices whose inputs are split where a model is.
BEHIND = {"o_proj", "out_proj", "down_proj", "w2"}


def leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def quantised_names(folder, kind="int8") -> set[str]:
    """Checkpoint names of the weights that would be coded."""
    config = read_config(folder)
    place = Place(torch.float32, torch.device("meta"), quantization=kind)
    slots = find_family(config.architecture)[1](config.raw, place=place).checkpoint_slots()
    found = {name for name, slot in slots.tensors.items() if slot.quantization == kind}
    return found | {name for name, (slot, _) in slots.stacks.items() if slot.quantization == kind}


@pytest.mark.parametrize("name", NAMES)
def test_only_projections_are_quantised_and_no_router_is(name, reference):
    for seed in range(len(ARCHITECTURES[name].shapes)):
        assert {leaf(found) for found in quantised_names(reference(name, seed).folder)} <= PROJECTIONS


def decoded(name: str, tensor: torch.Tensor, kind, shares) -> torch.Tensor:
    """The tensor after coding and decoding; stacked experts one by one, along the side that is the input."""
    if tensor.dim() == 2:
        means = torch.empty_like(tensor)
        for share in shares(name, tensor.shape[1]):
            inputs = torch.cat([torch.arange(*some) for some in share.stretches])
            means[:, inputs] = quantise(tensor[:, inputs], kind).dequantised()
        return means
    flip = name.endswith(_TRANSPOSED)
    experts = [decoded(name, expert.T if flip else expert, kind, shares) for expert in tensor]
    return torch.stack([expert.T if flip else expert for expert in experts]).contiguous()


#: Stacks that hold [inputs, outputs] in the reference too.
_TRANSPOSED = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")


def shares_of(judge, ranks):
    """shares(name, inputs): those that the ranks code each on its own, of a matrix behind a split one."""
    groups = [ThreadGroup(rank, Meeting(ranks)) for rank in range(ranks)]
    is_combed = "Gemma3n" in type(judge.model).__name__

    def shares(name, inputs):
        cut = Group.comb if is_combed and leaf(name) == "down_proj" else Group.width
        return [cut(group, inputs, name) for group in (groups if leaf(name) in BEHIND else [ALONE])]

    return shares


def with_decoded_weights(judge, kind, folder, ranks=1):
    """transformers' model of the same checkpoint with every quantised weight replaced by what its codes mean."""
    names = quantised_names(judge.folder, kind)
    tensors = load_file(judge.folder / "model.safetensors")
    assert names & set(tensors)
    if names & set(tensors) <= set(judge.model.state_dict()):
        return decoded_in_place(judge, names & set(tensors), kind, shares_of(judge, ranks))
    for name in names & set(tensors):
        tensors[name] = decoded(name, tensors[name], kind, shares_of(judge, ranks))
    for path in judge.folder.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_text(path.read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return judge.loaded_from(folder)


def decoded_in_place(judge, names, kind, shares):
    """A copy of the reference; for checkpoints that name weights as it does, not all of which it can read itself."""
    model = copy.deepcopy(judge.model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in names:
                tensor.copy_(decoded(name, tensor, kind, shares))
    return Reference(model, judge.tolerance, judge.vocab_size, judge.folder)


def matrix():
    for name in NAMES:
        for seed in range(len(ARCHITECTURES[name].shapes)):
            for kind in KINDS:
                sample = seed == 0 and kind == KINDS[NAMES.index(name) % 3]
                yield pytest.param(name, seed, kind, marks=() if sample else pytest.mark.slow)


@pytest.mark.parametrize(("name", "seed", "kind"), list(matrix()))
def test_quantised_logits_equal_the_reference_with_the_decoded_weights(name, seed, kind, reference, tmp_path):
    # Given a checkpoint, and the reference with each coded weight replaced by what its codes mean,
    judge = reference(name, seed)
    exact = with_decoded_weights(judge, kind, tmp_path)
    tokens = prompts(judge.vocab_size, seed, 10)
    # when the checkpoint is quantised while it is read,
    model = load_model(str(judge.folder), dtype="float32", device=str(DEVICE), quantization=kind).model
    scores = Direct(model).score(tokens, 16)
    # then every logit is that reference's, and not the unquantised one's.
    worst = max(float((ours - exact.logits(ids)).abs().max()) for ours, ids in zip(scores, tokens, strict=True))
    # Here each sum is rounded once more, when the scale of its codes comes to it.
    assert worst <= 3 * judge.tolerance
    assert max(float((ours - judge.logits(ids)).abs().max()) for ours, ids in zip(scores, tokens, strict=True)) > worst


SPLIT = {"qwen3": "int8", "qwen3-moe": "int4", "llama4-scout": "fp8", "qwen3-next": "int8", "gemma3n": "int4"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if SPLIT.get(name) == kind else pytest.mark.slow)
        for name in NAMES
        for kind in KINDS
    ],
)
def test_each_rank_of_a_split_model_quantises_its_share(name, kind, reference, tmp_path):
    # Given the reference with the weights that the codes of two ranks mean,
    judge = reference(name, 0)
    exact = with_decoded_weights(judge, kind, tmp_path, ranks=2)
    tokens = prompts(judge.vocab_size, 0, 4)
    # when two ranks quantise their shares while they read them,
    models = load_split(judge.folder, 2, quantization=kind)
    found = on_every_rank(2, lambda rank: Direct(models[rank], device=CPU).score(tokens, 16))
    # then both have that reference's logits.
    for scores in found:
        for ours, ids in zip(scores, tokens, strict=True):
            assert float((ours - exact.logits(ids)).abs().max()) <= 3 * judge.tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantised_while_it_is_read_and_never_exists_whole(kind, tmp_path):
    # Given a checkpoint whose layers are many and large beside everything else,
    shape = {**ARCHITECTURES["qwen3"].shapes[0], "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12}
    write_shape(tmp_path, shape)
    numbers = {name: t.numel() for name, t in load_file(tmp_path / "model.safetensors").items()}
    coded = {name for name in quantised_names(tmp_path, kind) if name in numbers}
    plain = 4 * sum(count for name, count in numbers.items() if name not in coded)
    bits = {"int8": 8, "int4": 4 + 48 / 32, "fp8": 8}[kind]
    expected = plain + sum(numbers[name] * bits / 8 for name in coded)
    largest = 4 * max(numbers[name] for name in coded)
    # when it is read and quantised in float32,
    with PeakMemory() as memory:
        loaded = load_model(str(tmp_path), dtype="float32", device=str(DEVICE), quantization=kind)
    # then at no time did more exist than the quantised model and a few copies of one tensor,
    whole = 4 * sum(numbers.values())
    assert memory.peak < 1.1 * expected + plain + 6 * largest < 0.75 * whole
    # and what is left is the quantised model (a tied head is packed beside its embedding).
    assert memory.now < 1.1 * expected + plain
    assert loaded.quantization == kind


def write_shape(folder, shape) -> None:
    """A checkpoint of the qwen3 family with a shape of its own."""
    model = ARCHITECTURES["qwen3"].build(shape)
    model.save_pretrained(folder)
    write_tokenizer(folder)
