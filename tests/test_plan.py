"""What a model needs, planned from its configuration alone, and that it is what the loader then finds."""

import gc
import json

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import CONFIG, checkpoint
from test_families import PUBLISHED
from tiny_engine import CONTEXT, TinyModel, tiny_engine

from inferfleet.engine.errors import LoadError
from inferfleet.engine.families import load_model
from inferfleet.engine.layers.slots import Weighted
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.plan import Needs, plan
from inferfleet.engine.sizing import num_snapshots
from inferfleet.kernels.quantized import KINDS, quantise, quantised_bytes

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: Worked out by hand from the published configurations: KiB of cache a token, beyond every window and chunk.
BY_HAND = {
    "Gemma 4 E2B": 6,
    "Gemma 4 E4B": 16,
    "Gemma 4 31B": 80,
    "Gemma 4 26B-A4B": 20,
    "Gemma 3n E4B": 8,
    "Qwen3-VL 8B": 144,
    "Qwen3-Next 80B-A3B": 24,
    "DeepSeek V3": 68.625,
    "DeepSeek V2": 67.5,
    "DeepSeek V2-Lite": 30.375,
    "Phi-3.5-MoE": 128,
    "Llama 4 Scout": 48,
}
#: And the bytes of state that a sequence has: 36 layers with 32 matrices in float32, and 3 inputs of 8192 channels.
STATES = {"Qwen3-Next 80B-A3B": 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)}


def folder_of(tmp_path, name, **changes):
    """A folder with nothing but the configuration of a published model."""
    architecture, config = PUBLISHED[name][:2]
    config = config | changes
    whole = {"text_config": config} if "Conditional" in architecture else config
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "dtype": "bfloat16", **whole}))
    return str(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_has_the_bytes_that_the_layers_store(tmp_path, name):
    billions, cache = PUBLISHED[name][2:]
    found = plan(folder_of(tmp_path, name), gpu_memory=1 << 44)
    numbers, resident = found["weights"]["numbers"], found["weights"]["resident_bytes"]
    assert numbers / 1e9 == pytest.approx(billions, rel=2e-3)
    # Two bytes for each number, and two more for the few that stay in float32.
    assert 2 * numbers <= resident <= 2.01 * numbers
    spans = {span["tokens"]: span["bytes_per_token"] for span in found["cache"]["spans"]}
    assert spans | {None: found["cache"]["bytes_per_token"]} == cache
    assert found["cache"]["bytes_per_token"] == BY_HAND.get(name, cache[None] / KIB) * KIB
    assert found["cache"]["bytes_per_sequence"] == STATES.get(name, 0)
    # The layers say it again, kind by kind.
    layers = [layer for layer in found["cache"]["layers"] if "span" in layer]
    for span, size in cache.items():
        assert sum(layer["bytes_per_token"] for layer in layers if layer["span"] == span) == size
    # And in memory without end, the whole context fits.
    assert found["memory"]["longest_context"] == found["max_positions"]


def test_a_context_takes_its_state_and_the_copy_for_the_prefix_cache(tmp_path):
    # Given three layers with a state before one with keys and values,
    found = plan(folder_of(tmp_path, "Qwen3-Next 80B-A3B", num_hidden_layers=4), max_model_len=16)
    state = found["cache"]["bytes_per_sequence"]
    assert state == STATES["Qwen3-Next 80B-A3B"] // 12
    # then a context of one block takes the state twice, that block and the one that is never used.
    (short,) = (context for context in found["contexts"] if context["tokens"] == 16)
    assert short["cache_bytes"] == 2 * state + 2 * 16 * 2 * KIB


def test_weights_that_stay_in_float32_are_counted_as_such(tmp_path):
    # DeepSeek V3's routers do, behind three dense layers: [256, 7168] and a correction for each expert.
    found = plan(folder_of(tmp_path, "DeepSeek V3", num_hidden_layers=5))["weights"]
    assert found["resident_bytes"] - 2 * found["numbers"] == 2 * 2 * (256 * 7168 + 256)


def tensors_alive():
    """Memory of every tensor that there is in this process, by its address."""
    gc.collect()
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) is torch.Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}


@pytest.mark.parametrize("quantization", [None, *KINDS])
def test_the_weights_take_what_was_planned(tmp_path, monkeypatch, quantization):
    # Given a checkpoint and its plan,
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    checkpoint(tmp_path, architectures=["Qwen3MoeForCausalLM"], tie_word_embeddings=False, hidden_size=128, **experts)
    planned = plan(str(tmp_path), quantization=quantization)["weights"]["resident_bytes"]
    # when it is loaded but not packed for this machine,
    monkeypatch.setattr(Weighted, "pack", lambda layer: None)
    monkeypatch.setattr(Weighted, "finalize", lambda layer: None)
    before = tensors_alive()
    model = load_model(str(tmp_path), device="cpu", quantization=quantization).model
    taken = {address: size for address, size in tensors_alive().items() if address not in before}
    # then that many bytes are there, beside a few for the positions.
    assert model is not None
    assert planned <= sum(taken.values()) < planned + 200


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [7, 33, 1023, 1024, 1500])
def test_the_bytes_of_codes_are_known_before_a_weight_is_coded(kind, inputs):
    assert quantised_bytes(5, inputs, kind) == quantise(torch.randn(5, inputs), kind).nbytes


def test_a_coded_checkpoint_is_about_as_large_as_its_files(tmp_path):
    # Given a checkpoint whose files hold a byte a weight, as its configuration says,
    tensors = checkpoint(tmp_path)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    coding = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": coding}))
    found = plan(str(tmp_path))
    # then that is what it takes, or half of it on each of two ranks.
    weights = found["weights"]
    assert found["quantization"].startswith("fp8")
    assert weights["resident_bytes"] == weights["stored"]["num_bytes"] == weights["numbers"]
    half = plan(str(tmp_path), tensor_parallel_size=2)["weights"]["resident_bytes"]
    assert weights["numbers"] / 2 <= half < 0.51 * weights["numbers"]
    with pytest.raises(UnsupportedModel, match="quantization int4 was asked for, but the checkpoint is fp8"):
        plan(str(tmp_path), quantization="int4")


def test_ranks_share_weights_and_cache(tmp_path, monkeypatch):
    # Given Scout on 1 and on 8 GPUs, each with one of its 8 key/value heads,
    folder = folder_of(tmp_path, "Llama 4 Scout")
    alone, split = plan(folder), plan(folder, tensor_parallel_size=8)
    assert split["cache"]["bytes_per_token"] == alone["cache"]["bytes_per_token"] // 8
    # then a GPU holds an eighth of the weights and little beside (norms and routers).
    assert split["weights"]["numbers"] == alone["weights"]["numbers"]
    share = alone["weights"]["resident_bytes"] / 8
    assert share < split["weights"]["resident_bytes"] < 1.01 * share
    with pytest.raises(LoadError, match="cannot be split over tensor_parallel_size 3"):
        plan(folder, tensor_parallel_size=3)
    # And a family that cannot be split says so.
    monkeypatch.setattr("inferfleet.engine.models.llama4.Llama4ForCausalLM.can_split", False)
    with pytest.raises(UnsupportedModel, match="leave tensor_parallel_size at 1"):
        plan(folder, tensor_parallel_size=8)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16])
@pytest.mark.parametrize("rooms", [0.02, 0.3, 0.7])
def test_the_longest_context_that_is_planned_is_the_one_that_is_served(tmp_path, monkeypatch, max_num_seqs, rooms):
    # Given a model on paper, and memory for a part of its context,
    model = TinyModel()
    needs = Needs(0, 0, model.cache_spec, torch.float32)
    budget = int(needs.cache(CONTEXT, max_num_seqs) * rooms)
    monkeypatch.setattr("inferfleet.engine.loader.cache_budget", lambda *_, **__: budget)
    # when an engine is made for it with the settings that a plan assumes,
    settings = {"kv_cache_tokens": None, "block_size": 16, "max_num_seqs": max_num_seqs, "model": model}
    planned = needs.longest(budget, max_num_seqs, CONTEXT)
    if planned == 0:
        with pytest.raises(LoadError, match="left for the KV cache"):
            tiny_engine(tmp_path, **settings)
        return
    # then it serves what was planned, to the last block.
    served = tiny_engine(tmp_path, **settings).admission.max_model_len
    assert served == planned


def test_as_many_contexts_fit_as_memory_holds_with_their_windows(tmp_path):
    # Given the demo of a windowed model and 10 GiB for its cache,
    needs = Needs(0, 0, TinyModel.cache_spec, torch.float32)
    count = needs.sequences(10 * GIB, 1024)
    # then a cache for so many seats is within it, and one for another is not.
    assert needs.cache(count * 1024, count) <= 10 * GIB < needs.cache((count + 1) * 1024, count + 1)
    assert needs.sequences(needs.costs.context(1024) - 1, 1024) == 0


def test_copies_of_states_have_their_share_of_the_cache():
    assert num_snapshots(state_bytes=10, budget=400, max_num_seqs=32) == 10
    assert num_snapshots(state_bytes=10, budget=400, max_num_seqs=4) == 4
    assert num_snapshots(state_bytes=10, budget=0, max_num_seqs=4) == 1


def test_an_impossible_context_has_its_price(tmp_path):
    # Given Scout's ten million tokens and a GPU that does not even hold its weights,
    found = plan(
        folder_of(tmp_path, "Llama 4 Scout", max_position_embeddings=10_485_760),
        gpu_memory=80 * GIB,
        max_model_len=10_485_760,
    )
    (context,) = found["contexts"]
    assert (context["fits"], context["sequences"], found["memory"]["longest_context"]) == (False, 0, 0)
    # then the plan names 480 GiB of the unbounded layers, a chunk and a step of the others,
    bounded = context["cache_bytes"] - 480 * GIB
    assert 8192 * 144 * KIB <= bounded <= (8192 + 2048 + 64) * 144 * KIB
    # and the GPU that would hold it does.
    enough = plan(str(tmp_path), gpu_memory=context["gpu_bytes"], max_model_len=10_485_760)
    assert enough["contexts"][0]["fits"] and enough["contexts"][0]["sequences"] == 1
    less = plan(str(tmp_path), gpu_memory=context["gpu_bytes"] - MIB, max_model_len=10_485_760)
    assert not less["contexts"][0]["fits"] and less["memory"]["longest_context"] < 10_485_760
