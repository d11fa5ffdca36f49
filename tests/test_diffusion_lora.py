"""LoRA adapters: chosen picture by picture, on exact and coded weights, and refused by name where they do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from fakehub import FakeHub
from lora_adapters import ORIGINAL, Made, linears_of, merge, write_diffusers, write_original, write_peft
from safetensors.torch import save_file
from small_pipeline import SHAPES
from test_diffusion_linears import BATCHES, WIDE, alone, inputs, made, ours, run

from inferfleet.engine.diffusion.linears import build_transformer
from inferfleet.engine.diffusion.lora import LoraBank, load_loras
from inferfleet.engine.diffusion.lora_files import read_adapter
from inferfleet.engine.diffusion.params import LoraChoice
from inferfleet.engine.model_errors import BadAdapter
from inferfleet.engine.place import Place
from inferfleet.kernels.quantized import KINDS, quantise


def chosen(*choices: tuple[str, float]) -> tuple[LoraChoice, ...]:
    return tuple(LoraChoice(name=name, scale=scale) for name, scale in choices)


@pytest.fixture
def judge():
    return made(SHAPES[1])[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_picture_with_adapters_is_the_same_whatever_the_others_chose(quantization, dtype, tmp_path):
    # Given three adapters of unlike formats and ranks,
    config, judge = made(SHAPES[1])
    sources = {
        "a": str(write_peft(tmp_path / "a", judge, 1).path.parent),
        "b": str(write_original(tmp_path / "b.safetensors", judge, 2, "kohya").path),
        "c": str(write_diffusers(tmp_path / "c.safetensors", judge, 3, rank=2, only="attn").path),
    }
    model = ours(config, judge, dtype=dtype, quantization=quantization)
    bare = ours(config, judge, dtype=dtype, quantization=quantization)
    bank = load_loras(model, sources)
    rows = [chosen(("a", 1.0)), (), chosen(("b", -0.5), ("a", 0.3)), chosen(("c", 2.0)), chosen(("a", 0.0))]
    batch = inputs(config, (5, *BATCHES[2][1:]), dtype=dtype)
    # when pictures with other choices are computed together,
    bank.select(rows)
    together = run(model, batch)
    # then each has the bits that it has alone, with or without an adapter,
    for index, row in enumerate(rows):
        bank.select([row])
        assert torch.equal(run(model, alone(batch, index))[0], together[index]), index
    # and those that chose nothing, or none of it, have those of a model without adapters.
    plain = run(bare, batch)
    assert [torch.equal(together[index], plain[index]) for index in range(5)] == [False, True, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_on_coded_weights_an_adapter_adds_the_same(kind, tmp_path):
    # Given coded weights, a model of the numbers that the codes stand for, and an adapter,
    config, judge = made(WIDE)
    adapter = write_peft(tmp_path, judge, 1)
    model = ours(config, judge, quantization=kind)
    for path, linear in linears_of(judge).items():
        if "blocks." in path:
            its_kind = "int8" if path.endswith(".linear") else kind
            linear.weight.copy_(quantise(linear.weight, its_kind).dequantised())
    # when it is chosen, then the numbers are those of that model with the adapter merged.
    bank = load_loras(model, {"a": str(adapter.path)})
    bank.select([chosen(("a", 1.0))] * 8)
    batch = inputs(config, BATCHES[1])
    before = run(judge, batch)
    merge(judge, adapter.changes, 1.0)
    assert (run(model, batch) - run(judge, batch)).abs().max() < 1e-4
    assert (run(model, batch) - before).abs().max() > 0.1


def test_an_original_name_is_what_diffusers_own_conversion_makes_of_it(tmp_path):
    # Given an adapter with kohya's names for all of the published transformer, of rank 1,
    modules = LoraBank(build_transformer({}, Place(torch.float32, torch.device("meta")))).modules
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for form, targets in ORIGINAL.items():
        for block in range((19 if "double" in form else 38) if "{}" in form else 1):
            names = [target.format(block) for target in targets]
            up = torch.randn(sum(modules[name][0] for name in names), 1, generator=random)
            at = f"lora_unet_{form.format(block).replace('.', '_')}"
            tensors |= {f"{at}.lora_up.weight": up, f"{at}.lora_down.weight": torch.ones(1, modules[names[0]][1])}
    save_file(tensors, tmp_path / "a.safetensors")
    # when it is read, then each module has the matrix that diffusers' conversion gives to it.
    pairs = read_adapter("a", str(tmp_path / "a.safetensors"), modules).pairs
    expected = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    expected = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()}
    ups = {name.removesuffix(".lora_B.weight"): up for name, up in expected.items() if "lora_B" in name}
    assert pairs.keys() == ups.keys()
    assert len(ups) == 19 * 14 + 38 * 6 + 6
    assert all(torch.equal(pair.up, ups[module]) and pair.factor == 1 for module, pair in pairs.items())


def test_settings_that_diffusers_keeps_in_the_header_count(judge, tmp_path):
    # Given a file whose header says alpha and rank,
    adapter = write_diffusers(tmp_path / "a.safetensors", judge, 1)
    modules = LoraBank(ours(*made(SHAPES[1]))).modules
    values = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_out": 2}}
    adapter.rewrite(lora_adapter_metadata=json.dumps(values | {"text_encoder.lora_alpha": 100}))
    # when it is read, then its factors are those.
    pairs = read_adapter("a", str(adapter.path), modules).pairs
    assert {pair.factor for pair in pairs.values()} == {2.0, 0.5}
    assert pairs["proj_out"].factor == pairs["single_transformer_blocks.0.proj_out"].factor == 0.5


def test_what_shares_a_matrix_in_the_file_shares_it_in_memory(judge, tmp_path):
    # Given an adapter with one A for q, k and v,
    adapter = write_original(tmp_path / "a.safetensors", judge, 1, "xlabs")
    bank = load_loras(ours(*made(SHAPES[1])), {"a": str(adapter.path)})
    # then its bytes are those of the file's matrices.
    assert bank.num_bytes == sum(tensor.nbytes for tensor in adapter.tensors.values())
    assert bank.names == ("a",)


def test_a_choice_for_another_number_of_pictures_is_an_error_of_ours(judge, tmp_path):
    config = made(SHAPES[1])[0]
    model = ours(config, judge)
    source = str(write_diffusers(tmp_path / "a.safetensors", judge, 1, only="to_q").path)
    load_loras(model, {"a": source}).select([chosen(("a", 1.0))])
    with pytest.raises(ValueError, match="selected for 1 pictures, and 2"):
        run(model, inputs(config, BATCHES[0]))


def _renamed(adapter: Made, change) -> None:
    adapter.tensors = {change(name): tensor for name, tensor in adapter.tensors.items()}


def _put(adapter: Made, name: str, tensor: torch.Tensor) -> None:
    adapter.tensors[name] = tensor


TO_Q = "transformer.transformer_blocks.0.attn.to_q"
SPOILED = {
    "dora": (lambda a: _put(a, f"{TO_Q}.lora_magnitude_vector", torch.ones(48)), "lora_magnitude_vector is DoRA's"),
    "dora-kohya": (lambda a: _put(a, f"{TO_Q}.dora_scale", torch.ones(48)), "DoRA"),
    "bias": (lambda a: _put(a, f"{TO_Q}.lora_B.bias", torch.ones(48)), "lora_B.bias changes a bias"),
    "diff": (lambda a: _put(a, "diffusion_model.img_in.diff", torch.ones(48)), "img_in.diff replaces"),
    "lokr": (lambda a: _put(a, "lycoris_x.lokr_w1", torch.ones(4, 4)), "another method"),
    "text": (lambda a: _put(a, "lora_te1_text_model_x.lora_down.weight", torch.ones(2, 4)), "for a text encoder"),
    "text-2": (lambda a: _put(a, "text_encoder.text_model.x.lora_A.weight", torch.ones(2, 4)), "for a text encoder"),
    "unknown": (lambda a: _renamed(a, lambda n: n.replace("blocks.0.", "blocks.7.")), r"blocks\.7\..* does not have"),
    "sdxl": (lambda a: _put(a, "lora_unet_down_blocks_1.lora_up.weight", torch.ones(2, 2)), "does not have"),
    "no-lora": (lambda a: _put(a, "transformer_blocks.0.attn.to_q.weight", torch.ones(2, 2)), "is no A, B or alpha"),
    "shape": (lambda a: _put(a, f"{TO_Q}.lora_A.weight", torch.ones(4, 40)), r"\[4, 40\] and should be \[4, 48\]"),
    "rank": (lambda a: _put(a, f"{TO_Q}.lora_A.weight", torch.ones(513, 48)), "rank 513, and 1 to 512"),
    "unequal": (lambda a: _put(a, f"{TO_Q}.lora_B.weight", torch.ones(48, 3)), r"\[48, 3\] and should be \[48, 4\]"),
    "vector": (lambda a: _put(a, f"{TO_Q}.lora_A.weight", torch.ones(48)), "should be a matrix"),
    "alpha": (lambda a: _put(a, f"{TO_Q}.alpha", torch.ones(2)), "should be one number"),
    "alone": (lambda a: a.tensors.pop(f"{TO_Q}.lora_B.weight"), "needs an A and a B"),
    "integers": (lambda a: _put(a, f"{TO_Q}.lora_A.weight", torch.ones(4, 48, dtype=torch.int8)), "torch.int8"),
    "nan": (lambda a: _put(a, f"{TO_Q}.lora_A.weight", torch.full((4, 48), torch.nan)), "not finite"),
    "doubled": (lambda a: _put(a, f"{TO_Q}.lora_down.weight", torch.ones(4, 48)), "are both for"),
    "crossed": (
        lambda a: a.tensors.update(
            {
                f"double_blocks.0.img_attn.qkv.lora_{x}.weight": torch.ones(n)
                for x, n in (("A", (4, 48)), ("B", (144, 4)))
            }
        ),
        "two of its pairs are for transformer_blocks.0.attn.to_k",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_file_that_cannot_be_applied_whole_is_refused_by_its_tensor(how, judge, tmp_path):
    adapter = write_diffusers(tmp_path / "a.safetensors", judge, 1)
    spoil, words = SPOILED[how]
    spoil(adapter)
    adapter.rewrite()
    with pytest.raises(BadAdapter, match=words) as caught:
        load_loras(ours(*made(SHAPES[1])), {"ink": str(adapter.path)})
    assert "the LoRA adapter ink (" in caught.value.message
    assert caught.value.param == "loras"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"peft_type": "LOKR"}, "peft_type"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_rslora": 1}, "use_rslora must be"),
        ({"r": 8}, "has rank 4, but the adapter's settings say 8"),
        ({"lora_alpha": -1}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": "2"}, "lora_alpha must be a number above 0"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "has the pattern"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
    ],
)
def test_settings_of_another_method_are_refused(config, words, judge, tmp_path):
    adapter = write_peft(tmp_path, judge, 1)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(BadAdapter, match=words.replace("(", r"\(")):
        load_loras(ours(*made(SHAPES[1])), {"ink": str(adapter.path)})


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({"a.safetensors": b"x" * 40}, "a.safetensors", "not a readable safetensors"),
        ({"a.bin": b"x"}, "a.bin", "can run code"),
        ({"a.txt": b"x"}, "a.txt", "is a .safetensors file"),
        ({"a.pt": b"x"}, "", "no safetensors file .*can run code"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "", "holds 2 safetensors files"),
        ({"adapter_model.safetensors": b"", "adapter_config.json": b"["}, "", "not a readable"),
        ({}, "nothing", "no such file or folder"),
        ({}, "../../x.safetensors", "no such file or folder"),
    ],
)
def test_a_source_that_is_no_adapter_says_what_one_is(files, source, words, judge, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadAdapter, match=words):
        load_loras(ours(*made(SHAPES[1])), {"ink": str(tmp_path / source)})


ASK = """
import json, sys
from inferfleet.engine.diffusion.lora_files import find_weights
for source in sys.argv[1:]:
    try:
        print(json.dumps(find_weights(source).name))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def ask(hub: FakeHub, cache: Path, *sources: str) -> list[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": ""}
    done = subprocess.run([sys.executable, "-c", ASK, *sources], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


def test_a_hub_id_fetches_one_adapter_and_nothing_else(tmp_path):
    # Given a repository with several steps of a training, and one with the usual name,
    with FakeHub({"step-1.safetensors": b"a", "step-2.safetensors": b"b", "train.bin": b"c"}) as hub:
        several, one, absent = ask(hub, tmp_path / "1", "tiny/open", "tiny/open/step-2.safetensors", "tiny/none")
        assert hub.fetched == ["step-2.safetensors"]
    with FakeHub({"pytorch_lora_weights.safetensors": b"a", "other.safetensors": b"b", "x.py": b"c"}) as hub:
        usual = ask(hub, tmp_path / "2", "tiny/open")
        assert hub.fetched == ["pytorch_lora_weights.safetensors"]
    with FakeHub({"only.safetensors": b"a", "x.py": b"c"}) as hub:
        only = ask(hub, tmp_path / "3", "tiny/open", "tiny/pickled")
        assert hub.fetched == ["only.safetensors"]
    # then the one that is meant is found, or asked for.
    assert "holds 2 safetensors files; name one, as in tiny/open/step-1.safetensors" in several
    assert one == "step-2.safetensors"
    assert "tiny/none" in absent
    assert usual == ["pytorch_lora_weights.safetensors"]
    assert only[0] == "only.safetensors"
    assert "can run code" in only[1]
