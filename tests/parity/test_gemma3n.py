"""MatFormer slices of Gemma 3n: each is the model that transformers builds from the cut weights, alone and together."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from parity.checkpoints.gemma3n import SHAPES, build
from parity.checkpoints.writing import Reference
from parity.device import DEVICE
from parity.direct import Direct
from torch import Tensor

from inferfleet.engine.errors import InvalidRequest, LoadError
from inferfleet.engine.families import Model, load_model
from inferfleet.engine.matformer import read_table
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
HEADER = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"


@dataclass(frozen=True)
class Slice:
    name: str
    widths: tuple[int, ...]
    skipped: tuple[int, ...] = ()

    @property
    def line(self) -> str:
        skipped = f'"{list(self.skipped)}"' if self.skipped else ""
        return f'{self.name},{len(self.widths)},0.1,50.0%,"{list(self.widths)}",{skipped}\n'


#: By shape. The first has owners 0 to 3 (3 windowed and 2 full are read from above) and sharing layers 4 to 6; the
#: second's owners are 0 to 4. Widths on and off the borders of the packed weights' panels of 64, one odd.
SLICES = {
    0: (
        Slice("main", (224,) * 7),
        Slice("narrow", (96, 128, 64, 97, 96, 224, 32)),
        Slice("short", (224, 100, 224, 224, 111), (1, 5)),
        Slice("least", (33, 65, 64, 1, 96), (0, 4)),
    ),
    1: (Slice("half", (144,) * 10), Slice("lower", (288, 70, 70, 288, 144, 96, 96), (1, 6, 9))),
    3: (Slice("odd", (512, 400, 301, 200, 512, 512, 77, 512, 100, 512), (2, 9)),),
}
CASES = [(seed, one) for seed, slices in SLICES.items() for one in slices]


def table(folder: Path, slices: Sequence[Slice]) -> str:
    path = folder / "slices.csv"
    path.write_text(HEADER + "".join(one.line for one in slices))
    return str(path)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory) -> Callable[..., Model]:
    """sliced(judge, slices, default): our model with these slices on offer."""
    loaded: dict[tuple, Model] = {}

    def get(judge: Reference, slices: tuple[Slice, ...], default: str | None = None) -> Model:
        key = (judge.folder, slices, default)
        if key not in loaded:
            path = table(tmp_path_factory.mktemp("slices"), slices)
            offered = read_table(path, default)
            loaded[key] = load_model(str(judge.folder), dtype="float32", device=str(DEVICE), slices=offered).model
        return loaded[key]

    return get


def cut(judge: Reference, seed: int, one: Slice) -> Reference:
    """The judge of a slice: transformers' model of fewer layers and narrower MLPs, with the first of the weights."""
    shape = SHAPES[seed]
    kept = [index for index in range(shape["num_hidden_layers"]) if index not in one.skipped]
    config = judge.model.config.get_text_config()
    first_shared = shape["num_hidden_layers"] - shape["num_kv_shared_layers"]
    small = build(
        shape
        | {
            "num_hidden_layers": len(kept),
            "layer_types": [config.layer_types[index] for index in kept],
            "intermediate_size": list(one.widths),
            "activation_sparsity_pattern": [config.activation_sparsity_pattern[index] for index in kept],
            "num_kv_shared_layers": sum(index >= first_shared for index in kept),
        }
    )
    given = judge.model.state_dict()
    small.load_state_dict({name: donated(name, tensor, given, kept) for name, tensor in small.state_dict().items()})
    small.set_attn_implementation("eager")
    return Reference(small.eval(), judge.tolerance, judge.vocab_size, judge.folder)


def donated(name: str, wanted: Tensor, given: dict[str, Tensor], kept: list[int]) -> Tensor:
    """What the whole model gives for a tensor of the slice."""
    before, dot, after = name.partition("layers.")
    if "per_layer" in name and not dot:
        whole = given[name]
        if name.endswith("projection_norm.weight"):
            return whole
        dim = 1 if "embed" in name else 0
        size = wanted.shape[dim] // len(kept)
        return whole.unflatten(dim, (-1, size)).index_select(dim, torch.tensor(kept)).flatten(dim, dim + 1)
    if dot:
        number, _, rest = after.partition(".")
        name = f"{before}layers.{kept[int(number)]}.{rest}"
    return given[name][tuple(slice(size) for size in wanted.shape)]


def prompts(vocab_size: int, seed: int, lengths: Sequence[int]) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(vocab_size) for _ in range(length)] for length in lengths]


def worst(ours: Tensor, judge: Reference, ids: list[int]) -> float:
    return float((ours - judge.logits(ids)).abs().max())


def variant_rows(cache: Direct, asked: Sequence[tuple[str, list[int]]]) -> list:
    rows = []
    for slot, (variant, ids) in enumerate(asked):
        row = cache.request(slot, ids)
        row.variant = variant
        rows.append(row)
    return rows


@pytest.mark.parametrize(("seed", "one"), CASES, ids=lambda value: getattr(value, "name", None))
def test_a_slice_is_the_model_that_transformers_builds_from_the_cut_weights(seed, one, reference, sliced):
    # Given a slice among others of one resident model,
    whole = reference("gemma3n", seed)
    judge = cut(whole, seed, one)
    cache = Direct(sliced(whole, SLICES[seed]))
    # when prompts of several windows run on it, in chunks,
    asked = [(one.name, ids) for ids in prompts(whole.vocab_size, seed, (1, 9, 50, 90))]
    rows = variant_rows(cache, asked)
    scores: list[list[Tensor]] = [[] for _ in rows]
    while live := [row for row in rows if row.num_computed_tokens < row.num_tokens]:
        step = [(row, min(20, row.num_tokens - row.num_computed_tokens)) for row in live]
        for (row, _), logits in zip(step, cache.step(step), strict=True):
            scores[rows.index(row)].append(logits)
    # then every logit is that of the physically smaller model.
    for (_, ids), parts in zip(asked, scores, strict=True):
        assert worst(torch.cat(parts), judge, ids) <= judge.tolerance


def test_slices_and_the_whole_model_share_a_step_and_none_notices(reference, sliced):
    # Given one step with a chunk that ends its prompt, chunks that do not, and decodes, of four slices and the whole,
    whole = reference("gemma3n", 0)
    judges = {"": whole} | {one.name: cut(whole, 0, one) for one in SLICES[0]}
    cache = Direct(sliced(whole, SLICES[0]))
    names = ["short", "", "narrow", "least", "short", "main", "narrow"]
    asked = list(zip(names, prompts(whole.vocab_size, 5, (40, 33, 60, 25, 70, 41, 21)), strict=True))
    rows = variant_rows(cache, asked)
    cache.step([(row, 20) for row in rows])
    samples = [True, True, False, True, False, True, True]
    counts = [20, 13, 25, 5, 40, 21, 1]
    # when the tokens that end a prompt are picked,
    picked = cache.step(list(zip(rows, counts, strict=True)), samples)
    # then each is scored by its own slice, and so is what a step without any pick leaves behind.
    for row, logits in zip([row for row, one in zip(rows, samples, strict=True) if one], picked, strict=True):
        expected = judges[row.variant].logits(row.token_ids[: row.num_computed_tokens])[-1]
        assert float((logits - expected).abs().max()) <= whole.tolerance
    assert cache.step([(rows[2], 5), (rows[4], 9)], [False, False]) == []
    for row, logits in zip((rows[2], rows[4]), cache.step([(rows[2], 10), (rows[4], 1)], [True, True]), strict=True):
        expected = judges[row.variant].logits(row.token_ids)[-1]
        assert float((logits - expected).abs().max()) <= whole.tolerance


def test_slices_share_a_contiguous_cache_too(reference, sliced):
    # Given no paging at all, when two slices and the whole model run together, then each is its own judge's.
    whole = reference("gemma3n", 0)
    cache = Direct(sliced(whole, SLICES[0]), paged=False)
    asked = list(zip(["short", "", "narrow"], prompts(whole.vocab_size, 6, (30, 17, 45)), strict=True))
    rows = variant_rows(cache, asked)
    scores = cache.step([(row, row.num_tokens) for row in rows])
    judges = {"": whole} | {one.name: cut(whole, 0, one) for one in SLICES[0]}
    for (name, ids), logits in zip(asked, scores, strict=True):
        assert worst(logits, judges[name], ids) <= whole.tolerance


def bytes_of(model: torch.nn.Module) -> int:
    """Of every tensor that a model's layers hold, packed or not, each storage once."""
    storages: dict[int, int] = {}

    def look(value: object, depth: int = 0) -> None:
        if isinstance(value, Tensor) and value.is_mkldnn:  # opaque, but never shared here
            storages[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, list | tuple) and depth < 3:
            for item in value:
                look(item, depth + 1)
        elif type(value).__module__.startswith("inferfleet.") and depth < 4:
            for item in getattr(value, "__dict__", {}).values():
                look(item, depth + 1)

    for module in model.modules():
        for value in vars(module).values():
            look(value)
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_slices(reference, sliced, load):
    # Given a model without slices, with one and with four beside the whole,
    whole = reference("gemma3n", 0)
    plain, one, four = load(whole.folder), sliced(whole, SLICES[0][1:2]), sliced(whole, SLICES[0])
    # when each has computed with all it offers,
    for model, names in ((one, ["narrow"]), (four, [item.name for item in SLICES[0]])):
        cache = Direct(model)
        cache.step([(row, 9) for row in variant_rows(cache, [(name, list(range(9))) for name in names])])
    # then they hold the same number of bytes.
    assert bytes_of(one) == bytes_of(four) == bytes_of(plain) > 500_000


def test_a_slice_chosen_at_load_equals_the_same_slice_chosen_by_a_request_and_holds_less(reference, sliced):
    # Given a table of one line that is also the default, so that the rest of the model is not even loaded,
    whole = reference("gemma3n", 0)
    short = SLICES[0][2]
    alone = sliced(whole, (short,), "short")
    shared = sliced(whole, SLICES[0])
    ids = prompts(whole.vocab_size, 8, (60,))[0]
    # when the same prompt runs on it and on that slice of the whole,
    scores = []
    for model in (alone, shared):
        cache = Direct(model)
        scores.append(cache.step([(variant_rows(cache, [("short", ids)])[0], 60)])[0])
    # then the logits are equal, and the first holds fewer layers, fewer bytes and fewer columns of the table.
    assert float((scores[0] - scores[1]).abs().max()) <= whole.tolerance
    assert worst(scores[0], cut(whole, 0, short), ids) <= whole.tolerance
    assert bytes_of(alone) < 0.9 * bytes_of(shared)
    assert len(alone.cache_spec.layers) == len(shared.cache_spec.layers) - 1
    assert alone.ple.embed_tokens_per_layer.weight.shape[1] == 5 * SHAPES[0]["hidden_size_per_layer_input"]


def llm(judge: Reference, path: str, **settings) -> LLM:
    defaults = {
        "dtype": "float32",
        "device": str(DEVICE),
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
        "block_size": 8,
    }
    sizes = {"max_model_len": 256, "kv_cache_tokens": 4096, "matformer_config_path": path}
    return LLM(str(judge.folder), **{**defaults, **sizes, **settings})


def test_a_batch_of_many_slices_writes_what_each_writes_alone_and_prefixes_never_cross(reference, tmp_path):
    # Given an engine with four slices,
    whole = reference("gemma3n", 0)
    engine = llm(whole, table(tmp_path, SLICES[0]))
    prompt = {"prompt_token_ids": prompts(whole.vocab_size, 9, (45,))[0]}
    names = [None, *(one.name for one in SLICES[0])]
    # when one prompt is answered by each of them and by the whole model, all in one batch,
    together = engine.generate([prompt] * 5, GREEDY, matformer_slice=names)
    # then nobody found a prefix, though all have the same tokens,
    assert [output.num_cached_tokens for output in together] == [0] * 5
    texts = [output.outputs[0].token_ids for output in together]
    # each text is its own judge's (the slice "main" is the whole model under a name),
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 4
    for one, text in zip(SLICES[0], texts[1:], strict=True):
        judge = cut(whole, 0, one)
        logits = judge.logits(prompt["prompt_token_ids"] + text)[44:-1]
        leads = logits.topk(2).values
        certain = (leads[:, 0] - leads[:, 1]) > 2 * judge.tolerance
        assert bool((logits.argmax(dim=1) == torch.tensor(text))[certain].all())
    # and asked twice more, each finds what it left itself a moment ago, never what the one before it left.
    for name, text in zip(names, texts, strict=True):
        cold, again = (engine.generate([prompt], GREEDY, matformer_slice=name)[0] for _ in range(2))
        assert (cold.num_cached_tokens, again.num_cached_tokens) == (0, 40)
        assert cold.outputs[0].token_ids == again.outputs[0].token_ids == text


@pytest.mark.slow
def test_two_processes_write_the_slices_that_one_writes(reference, tmp_path):
    # Given an engine in two processes with slices of widths that both have a part of,
    whole = reference("gemma3n", 0)
    path = table(tmp_path, SLICES[0])
    split, one = llm(whole, path, tensor_parallel_size=2), llm(whole, path)
    prompt = {"prompt_token_ids": prompts(whole.vocab_size, 9, (45,))[0]}
    names = [None, *(cut_.name for cut_ in SLICES[0])]
    # when each slice is asked for in one batch, then the texts are those of one process.
    ours, theirs = (engine.generate([prompt] * 5, GREEDY, matformer_slice=names) for engine in (split, one))
    split.close()
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.outputs[0].token_ids[:16] == b.outputs[0].token_ids[:16], names[number]


def test_the_configured_slice_answers_who_names_none(reference, tmp_path):
    # Given "short" as the default among four,
    whole = reference("gemma3n", 0)
    engine = llm(whole, table(tmp_path, SLICES[0]), matformer_slice_name="short")
    ids = prompts(whole.vocab_size, 10, (40,))[0]
    # when nothing is said, then it is "short" that scores; by its name "main", the whole model.
    assert worst(engine.score(ids), cut(whole, 0, SLICES[0][2]), ids) <= whole.tolerance
    assert worst(engine.score(ids, matformer_slice="main"), whole, ids) <= whole.tolerance
    assert (engine.card["matformer_slice"], engine.card["matformer_slices"]) == (
        "short",
        ["main", "narrow", "short", "least"],
    )


def test_a_request_for_a_slice_that_is_not_offered_is_refused_with_the_names(reference, tmp_path):
    whole = reference("gemma3n", 0)
    engine = llm(whole, table(tmp_path, SLICES[0]))
    with pytest.raises(InvalidRequest, match="'wide' is not one of 'main', 'narrow', 'short', 'least'") as caught:
        engine.generate([{"prompt_token_ids": [1, 2]}], GREEDY, matformer_slice="wide")
    assert caught.value.param == "matformer_slice"
    assert not engine.engine.has_work


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Slice("x", (224,) * 6, (3,)), "'x' skips layer 3, whose keys and values layer 4 reads"),
        (Slice("x", (224,) * 6, (2,)), "'x' skips layer 2, whose keys and values layer 6 reads"),
        (Slice("x", (224,) * 6), "'x' holds 6 widths for 7 kept layers"),
        (Slice("x", (224,) * 6, (7,)), "'x' skips layer 7, but the model has layers 0 to 6"),
        (Slice("x", (225, *(224,) * 6)), "'x' gives layer 0 the width 225; it must be from 1 to 224"),
        (Slice("x", (*(224,) * 6, 0)), "'x' gives layer 6 the width 0; it must be from 1 to 224"),
        (Slice("x", (), tuple(range(7))), "'x' keeps no layer"),
    ],
)
def test_a_slice_that_the_model_cannot_be_cut_to_is_refused_at_load(one, said, reference, sliced):
    whole = reference("gemma3n", 0)
    with pytest.raises(LoadError) as caught:
        sliced(whole, (SLICES[0][0], one))
    assert said in caught.value.message
    assert caught.value.param == "matformer_config_path"


def test_an_owner_may_be_skipped_once_nobody_is_left_who_reads_it(reference, sliced):
    # Given a slice that keeps neither the full layer 2 nor the full layer 6 that reads it, when it is asked for,
    whole = reference("gemma3n", 0)
    one = Slice("windows", (224,) * 5, (2, 6))
    cache = Direct(sliced(whole, (one,)))
    ids = prompts(whole.vocab_size, 12, (40,))[0]
    scores = cache.step([(variant_rows(cache, [("windows", ids)])[0], 40)])[0]
    # then it computes without them, as a model with no full layer does.
    assert worst(scores, cut(whole, 0, one), ids) <= whole.tolerance


def test_a_model_that_is_no_matformer_refuses_a_table(reference, tmp_path):
    other = reference("qwen3", 0)
    with pytest.raises(LoadError, match="qwen3 is no MatFormer") as caught:
        llm(other, table(tmp_path, SLICES[0]))
    assert caught.value.param == "matformer_config_path"


def test_slices_of_coded_weights_are_refused(reference, tmp_path):
    with pytest.raises(LoadError, match="quantization is int8 and matformer_config_path is set") as caught:
        llm(reference("gemma3n", 0), table(tmp_path, SLICES[0]), quantization="int8")
    assert caught.value.param == "quantization"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_sparsity_pattern": [0.5] * 6 + [1.0]}, "activation_sparsity_pattern"),
        ({"intermediate_size": [224] * 6}, "intermediate_size"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers"),
        ({"num_kv_shared_layers": 5}, "no owner of its kind"),
        ({"altup_num_inputs": 1}, "altup_num_inputs"),
        ({"layer_types": ["linear_attention"] * 7}, "layer_types"),
    ],
)
def test_a_configuration_that_no_such_model_can_have_is_refused_by_its_field(change, said, reference):
    from inferfleet.engine.config import Fields
    from inferfleet.engine.models.gemma3n import Gemma3nConfig

    values = copy.deepcopy(reference("gemma3n", 0).model.config.to_dict()) | change
    with pytest.raises(BadModelConfig, match=said):
        Gemma3nConfig.read(Fields(values))
