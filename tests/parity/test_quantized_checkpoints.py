"""Published quantised formats, packed here bit by bit from their descriptions, read back by the loader."""

from __future__ import annotations

import json

import pytest
import torch
from parity.device import CPU, DEVICE
from parity.direct import Direct
from parity.threads_as_ranks import load_split, on_every_rank
from safetensors.torch import load_file, save_file

from inferfleet.engine.families import load_model
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.plan import plan

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Numbers of a row, first lowest, into 32-bit words."""
    count = 32 // bits
    packed = []
    for row in rows:
        row = row + [0] * (-len(row) % count)
        packed.append([sum(n << bits * i for i, n in enumerate(row[w : w + count])) for w in range(0, len(row), count)])
    return torch.tensor([[n - (1 << 32) if n >= 1 << 31 else n for n in row] for row in packed]).to(torch.int32)


def grid(weight, bits, generator):
    """Codes [N, K], zeros and scales [N, G] of some grid near the weight, and the groups of the inputs in order."""
    groups = torch.arange(weight.shape[1]) // GROUP
    parts = weight.split(GROUP, dim=1)
    scales = torch.stack([part.abs().amax(1) for part in parts], 1) / (2 ** (bits - 1) - 1)
    low, high = (5, 11) if bits == 4 else (120, 136)
    zeros = torch.randint(low, high, scales.shape, generator=generator)
    codes = (weight / scales[:, groups]).round().long() + zeros[:, groups]
    return codes.clamp(0, 2**bits - 1), zeros, scales, groups


def gptq(weight, bits, generator, *, shift=1, ordered=False):
    codes, zeros, scales, groups = grid(weight, bits, generator)
    if ordered:
        groups = groups[torch.randperm(len(groups), generator=generator)]
    parts = {
        "qweight": words(codes.tolist(), bits).T.contiguous(),
        "qzeros": words((zeros.T - shift).tolist(), bits),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return parts, (codes - zeros[:, groups]) * scales[:, groups]


def awq(weight, bits, generator):
    codes, zeros, scales, groups = grid(weight, bits, generator)

    def mixed(rows):
        return [[row[w + AWQ_ORDER[i]] for w in range(0, len(row), 8) for i in range(8)] for row in rows]

    parts = {
        "qweight": words(mixed(codes.T.tolist()), 4),
        "qzeros": words(mixed(zeros.T.tolist()), 4),
        "scales": scales.T.contiguous(),
    }
    return parts, (codes - zeros[:, groups]) * scales[:, groups]


def compressed(weight, bits, generator, *, ordered=False):
    codes, zeros, scales, groups = grid(weight, bits, generator)
    if ordered:
        groups = groups[torch.randperm(len(groups), generator=generator)]
    parts = {
        "weight_packed": words(codes.tolist(), bits),
        "weight_zero_point": words(zeros.T.tolist(), bits).T.contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if ordered:
        parts["weight_g_idx"] = groups.int()
    return parts, (codes - zeros[:, groups]) * scales[:, groups]


def float8(weight, bits, generator, *, block=None, name="weight_scale"):
    rows, width = block or (1, weight.shape[1])
    scale = torch.rand(-(-weight.shape[0] // rows), -(-weight.shape[1] // width), generator=generator) / 50 + 0.01
    spread = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(width, 1)[:, : weight.shape[1]]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scale}, codes.float() * spread


def ct(bits, kind="int", strategy="group", **more):
    weights = {"num_bits": bits, "type": kind, "symmetric": kind == "float", "strategy": strategy, "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights | more}
    form = "float-quantized" if kind == "float" else "pack-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": group}, "ignore": ["lm_head"]}


def gptq_config(bits, stored="gptq"):
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": stored, "desc_act": True}


BLOCK = (16, 24)
FORMATS = {
    "gptq-4": (gptq_config(4), lambda w, g: gptq(w, 4, g)),
    "gptq-8": (gptq_config(8), lambda w, g: gptq(w, 8, g)),
    "gptq-v2-order": (gptq_config(4, "gptq_v2"), lambda w, g: gptq(w, 4, g, shift=0, ordered=True)),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        lambda w, g: awq(w, 4, g),
    ),
    "ct-4": (ct(4), lambda w, g: compressed(w, 4, g)),
    "ct-8-order": (ct(8), lambda w, g: compressed(w, 8, g, ordered=True)),
    "ct-fp8": (ct(8, "float", "channel"), lambda w, g: float8(w, 8, g)),
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
        lambda w, g: float8(w, 8, g, block=BLOCK, name="weight_scale_inv"),
    ),
}


def write_quantised(judge, form, packed, decoded):
    """The judge's checkpoint in a published format, and the plain one that it means."""
    config, pack = FORMATS[form]
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(judge.folder / "model.safetensors")
    coded = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        parts, means = pack(tensors[name].float(), generator)
        tensors[name] = means.float().contiguous()
        coded |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.weight")}
    for folder in (packed, decoded):
        folder.mkdir()
        for path in judge.folder.iterdir():
            if path.suffix == ".json":
                (folder / path.name).write_text(path.read_text())
    raw = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    save_file(rest | coded, packed / "model.safetensors")
    save_file(tensors, decoded / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_published_format_scores_as_the_reference_with_its_decoded_weights(form, name, reference, tmp_path):
    # Given a checkpoint whose projections, experts among them, are packed as the format says,
    judge = reference(name, 0)
    write_quantised(judge, form, tmp_path / "packed", tmp_path / "decoded")
    exact = judge.loaded_from(tmp_path / "decoded")
    ids = list(range(7, 60))
    # when it is loaded, then it scores as the reference over what the codes mean.
    loaded = load_model(str(tmp_path / "packed"), dtype="float32", device=str(DEVICE))
    scores = Direct(loaded.model).score([ids], 16)[0]
    assert float((scores - exact.logits(ids)).abs().max()) <= judge.tolerance
    assert loaded.quantization


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
@pytest.mark.parametrize("form", ["gptq-v2-order", "awq", "ct-8-order", "ct-fp8", "fp8-block"])
def test_two_ranks_cut_what_came_coded_and_lose_nothing(form, name, reference, tmp_path):
    # Given a packed checkpoint, where the ranks' shares fall between groups or through them,
    judge = reference(name, 0)
    write_quantised(judge, form, tmp_path / "packed", tmp_path / "decoded")
    exact = judge.loaded_from(tmp_path / "decoded")
    ids = list(range(7, 60))
    # when two ranks load it, then both score as the reference over what the whole codes mean.
    models = load_split(tmp_path / "packed", 2)
    for scores in on_every_rank(2, lambda rank: Direct(models[rank], device=CPU).score([ids], 16)[0]):
        assert float((scores - exact.logits(ids)).abs().max()) <= judge.tolerance


def test_a_plan_of_a_packed_checkpoint_counts_what_its_files_hold(reference, tmp_path):
    write_quantised(reference("qwen3", 0), "awq", tmp_path / "packed", tmp_path / "decoded")
    packed, plain = (plan(str(tmp_path / name))["weights"] for name in ("packed", "decoded"))
    assert packed["numbers"] == plain["numbers"]
    assert packed["resident_bytes"] == packed["stored"]["num_bytes"] < plain["resident_bytes"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
        (ct(8, "float", "tensor_group"), "strategy"),
        (ct(4) | {"format": "nvfp4-pack-quantized"}, "format"),
    ],
)
def test_a_format_that_is_not_read_is_refused_by_its_field(config, field, reference, tmp_path):
    folder = reference("qwen3", 0).folder
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))

    with pytest.raises(UnsupportedModel, match=field):
        load_model(str(tmp_path), device=str(DEVICE))
