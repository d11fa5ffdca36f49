"""The quality report of quantised weights against figures made here in other ways, and the folder that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inferfleet.engine import quality, quality_scores
from inferfleet.engine.config import Fields, read_config
from inferfleet.engine.errors import EngineError, InvalidRequest, NumericalError
from inferfleet.engine.layers.experts import Experts
from inferfleet.engine.model_errors import ModelUnavailable, UnsupportedModel
from inferfleet.engine.offline import LLM
from inferfleet.engine.quality import Task, quantise_and_report
from inferfleet.engine.quality_prompts import MAX_PROMPT_LENGTH, MAX_PROMPTS, PROMPTS, read_prompts
from inferfleet.engine.quantized import artefact
from inferfleet.engine.quantized.artefact import ArtefactError, check_target, write_artefact
from inferfleet.engine.quantized.compressed import CompressedTensors
from inferfleet.engine.quantized.packing import quantization_config, tensors_of
from inferfleet.kernels.quantized import KINDS, quantise

if importlib.util.find_spec("transformers") is None and os.environ.get("CI") != "true":
    pytest.skip("the checkpoints are written by the judge of the parity tests", allow_module_level=True)

from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.writing import write

TEXTS = ["The kettle is on.", "Wer fragt, der lernt.", "for i in range(3): print(i)", "1 + 1 = 2, 2 + 2 = 4"]
SETTINGS = {"device": "cpu", "max_model_len": 320, "prefix_caching": False}
#: Plain, stacked, transposed and square stacks of experts; the rest is for the long run.
SAMPLE = {("qwen3", "int8"), ("gemma4-26b-a4b", "fp8"), ("llama4-scout", "int4"), ("qwen3-vl-moe", "int4")}
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in SAMPLE else pytest.mark.slow)
    for name in ARCHITECTURES
    for kind in KINDS
]


DENSE = {"qwen3", "qwen3-vl", "gemma3n", "gemma4-e2b", "gemma4-e4b", "gemma4-31b"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(name): a tiny random checkpoint's folder."""
    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            write(name, 0, written[name])
        return written[name]

    return get


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def report_on(folder, kind, texts, tmp_path, **more):
    task = Task(path=str(folder), kind=kind, device="cpu", prompts=texts, report=tmp_path / "report", **more)
    return quantise_and_report(task)


def scores(folder, **settings):
    """Logits after each token of each text, and what the routers chose in each layer, token by token."""
    llm = LLM(str(folder), **SETTINGS, **settings)
    chosen: dict[str, list[set[int]]] = {}
    for name, module in llm.engine.model.named_modules():
        if isinstance(module, Experts):
            own = chosen.setdefault(name, [])
            module.recorder = lambda ids, own=own: own.extend(set(row) for row in ids.tolist())
    ids = [llm.tokenizer.encode(text, add_special_tokens=True) for text in TEXTS]
    return torch.cat([llm.score(tokens) for tokens in ids]), chosen


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "int8"), ("qwen3-moe", "int4")])
def test_the_figures_are_those_of_scoring_both_models_by_hand(name, kind, checkpoint, texts, tmp_path):
    folder = checkpoint(name)
    # Given the logits and the routes of the full and of the quantised model,
    full, routes = scores(folder)
    ours, other_routes = scores(folder, quantization=kind)
    divergence = torch.nn.functional.kl_div(
        ours.double().log_softmax(1), full.double().log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    # when the report is made,
    report = report_on(folder, kind, texts, tmp_path)
    # then its divergence and agreement are theirs,
    assert report["kl"]["mean"] == pytest.approx(float(divergence.mean()), abs=2e-6)
    assert report["kl"]["max"] == pytest.approx(float(divergence.max()), abs=2e-6)
    assert report["kl"]["mean"] > 1e-4
    assert report["positions"] == len(full)
    assert report["greedy"]["agreement"] == pytest.approx(float((full.argmax(1) == ours.argmax(1)).double().mean()))
    # and so is each layer's share of experts that a token had not gone to before.
    expected = {
        layer: sum(len(now - before) for before, now in zip(rows, other_routes[layer], strict=True))
        for layer, rows in routes.items()
    }
    found = report["router"]["layers"] if report["router"] else []
    assert {layer["layer"]: layer["flips"] for layer in found} == expected
    assert all(layer["choices"] == 2 * len(full) for layer in found)
    assert bool(found) == (name == "qwen3-moe") == (sum(expected.values()) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_gets_its_figures(name, checkpoint, texts, tmp_path):
    report = report_on(checkpoint(name), "int8", texts, tmp_path)
    assert 0 < report["kl"]["mean"] < 1
    assert (report["router"] is not None) == (name not in DENSE)
    assert report["weights"]["bytes_after"] < report["weights"]["bytes_before"]
    assert json.loads((tmp_path / "report").read_text())["kl"] == report["kl"]


def test_a_large_vocabulary_is_compared_over_its_likeliest_tokens_and_the_rest(monkeypatch):
    # Given fewer kept tokens than there are,
    monkeypatch.setattr(quality_scores, "LIKELIEST", 3)
    full, ours = torch.tensor([[3.0, 1.0, 0.0, 2.0, -1.0]]), torch.tensor([[2.0, 1.5, 0.5, 2.0, -torch.inf]])
    best, ids, logprobs, rest = quality_scores._kept(full)
    # when the divergence is taken,
    found = quality_scores._divergence(ours, ids, logprobs, rest)
    # then it is that of four outcomes: three tokens, and the other two as one.
    p, q = full.double().softmax(1)[0], ours.double().softmax(1)[0]
    p, q = ((x[0], x[3], x[1], x[2] + x[4]) for x in (p, q))
    assert float(found[0]) == pytest.approx(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)), abs=1e-6)
    assert best.tolist() == [0]


@pytest.mark.parametrize(
    ("full", "ours", "flips"),
    [
        ([[0, 1], [2, 3]], [[1, 0], [3, 2]], 0),  # another order is the same choice
        ([[0, 1], [2, 3]], [[0, 5], [4, 6]], 3),
        ([[0], [1], [2]], [[1], [1], [2]], 1),
    ],
)
def test_a_flip_is_a_choice_that_the_full_model_did_not_make_for_that_token(full, ours, flips):
    assert quality_scores._flips(torch.tensor(full), torch.tensor(ours)) == (torch.tensor(ours).numel(), flips)


@pytest.mark.parametrize(("one", "other", "same"), [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2], 2), ([5], [6], 0)])
def test_texts_are_the_same_before_their_first_difference(one, other, same):
    assert quality._same(one, other) == same


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_written_model_is_the_one_that_quantising_while_loading_gives(name, kind, checkpoint, tmp_path):
    folder, out = checkpoint(name), tmp_path / "out"
    # Given a written model,
    write_artefact(folder, read_config(folder), kind, out)
    # when it is loaded like any other, then each logit is that of the model that is coded on the way in,
    ours, _ = scores(out)
    expected, _ = scores(folder, quantization=kind)
    assert torch.equal(ours, expected)
    # and its template and tokenizer are there, readable as the rest of the folder is.
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {path.name for path in out.iterdir()}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_experts_that_come_stacked_are_written_one_by_one_in_files_of_bounded_size(tmp_path, monkeypatch):
    # Given a checkpoint that has a layer's experts in one tensor, and small files,
    (folder := tmp_path / "in").mkdir()
    write("qwen3-moe", 0, folder, layout="stacked", shards=2, dtype=torch.bfloat16)
    monkeypatch.setattr(artefact, "SHARD_BYTES", 30_000)
    # when it is written,
    out = tmp_path / "out"
    write_artefact(folder, read_config(folder), "int4", out)
    # then every expert has its own tensors, every tensor is where the index says,
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.experts.7.down_proj.weight_packed" in weight_map
    assert not [name for name in weight_map if name.endswith("gate_up_proj")]
    files = {name: set(load_file(out / name)) for name in set(weight_map.values())}
    assert len(files) > 2
    assert all(name in files[file] for name, file in weight_map.items())
    # and it is the same model.
    assert torch.equal(scores(out)[0], scores(folder, quantization="int4")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_unlike_widths_are_read_back_by_the_rules_of_their_names(kind):
    # Given modules with groups of 128 and of 32 inputs, one of whose names differ by a number only,
    shapes = {"m.0.up": (9, 1040), "m.0.down": (40, 33), "m.1.down": (3, 64), "m.1.up": (8, 64), "m.0.k": (1, 32)}
    weights = {name: quantise(torch.randn(shape), kind) for name, shape in shapes.items()}
    config = quantization_config(kind, {name: weight.group for name, weight in weights.items()}, [])
    # when they are packed and read back, then they are what they were.
    scheme = CompressedTensors.read(Fields(config))
    for name, weight in weights.items():
        back = scheme.weight(name, tensors_of(weight))
        assert torch.equal(back.dequantised(), weight.dequantised()), name
        assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert len(config["config_groups"]) == (2 if kind == "int4" else 1)


def test_the_command_measures_and_writes_a_mixture_from_end_to_end(checkpoint, texts, tmp_path):
    # Given the command, when it quantises a mixture and writes it,
    out = tmp_path / "small" / ".." / "out"
    (tmp_path / "small").mkdir()
    done = command(checkpoint("qwen3-moe"), "--quantization", "fp8", "--prompts", texts, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    # then it tells what its report in the folder tells, with figures in their ranges.
    told = json.loads(done.stdout)
    written = json.loads((tmp_path / "out" / "quality_report.json").read_text())
    assert {key: told[key] for key in written if key != "seconds"} == {
        k: v for k, v in written.items() if k != "seconds"
    }
    assert 0 < told["kl"]["mean"] < min(1, told["kl"]["max"])
    assert 0.5 < told["greedy"]["agreement"] < 1
    assert 0 < told["greedy"]["same_before_difference"] <= 1
    assert told["greedy"]["continuations"] == len(TEXTS)
    assert 0 < told["router"]["flip_rate"] < 0.5
    assert 0.2 < told["weights"]["bytes_after"] / told["weights"]["bytes_before"] < 0.6
    assert set(told["seconds"]) == {"load", "score", "load_quantised", "score_quantised", "write"}


def test_the_command_refuses_in_one_clear_line(tmp_path):
    done = command(tmp_path / "nowhere", "--quantization", "int8")
    assert done.returncode == 1
    assert "there is no folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_knows_its_kinds(tmp_path):
    done = command(tmp_path, "--quantization", "int3")
    assert done.returncode == 2
    assert "int8" in done.stderr


def command(*arguments) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "inferfleet.workers.cli", "quantize", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def test_the_table_has_every_figure(monkeypatch, capsys, checkpoint, texts, tmp_path):
    from inferfleet.workers import cli_quantize

    # Given a report on a mixture, when it is shown to a person,
    report = report_on(checkpoint("qwen3-moe"), "int8", texts, tmp_path)
    monkeypatch.setattr(cli_quantize, "_ask", lambda arguments: report)
    cli_quantize.quantize("model", "int8")
    # then its figures and its layers are there.
    shown = capsys.readouterr().out
    for text in (f"mean {report['kl']['mean']:.5f}", f"{report['greedy']['agreement']:.1%}", "layers.0.mlp.experts"):
        assert text in shown


def test_a_report_goes_beside_the_model_unless_told_otherwise(checkpoint, tmp_path):
    folder = checkpoint("qwen3")
    task = Task(path=str(folder), kind="int8")
    assert quality.report_files(task, folder) == [folder / "quality_report.json"]
    assert quality.report_files(Task(path=str(folder), kind="int8", out=tmp_path / "out"), folder) == []
    elsewhere = tmp_path / "no" / "report"
    with pytest.raises(InvalidRequest, match="--report"):
        quality.report_files(Task(path=str(folder), kind="int8", report=elsewhere), folder)


@pytest.mark.parametrize("make", ["file", "full", "orphan"])
def test_a_place_where_something_is_takes_no_model(make, tmp_path):
    out = tmp_path / "out"
    if make == "file":
        out.write_text("")
    elif make == "full":
        out.mkdir()
        (out / "config.json").write_text("{}")
    else:
        out = tmp_path / "none" / "out"
    with pytest.raises(ArtefactError, match=r"no folder|not empty|not a folder"):
        check_target(out)


def test_an_empty_folder_is_filled(checkpoint, tmp_path):
    folder, out = checkpoint("qwen3"), tmp_path / "out"
    out.mkdir()
    write_artefact(folder, read_config(folder), "int8", out)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("failing", ["space", "write", "stop"])
def test_a_model_that_cannot_be_written_whole_leaves_nothing(failing, checkpoint, tmp_path, monkeypatch):
    # Given a disk that is full from the start or gets full, or somebody who ends the work,
    folder, out = checkpoint("qwen3"), tmp_path / "out"
    error: type[BaseException] = ArtefactError
    if failing == "space":
        monkeypatch.setattr(artefact, "ROOM", 1 << 60)
    elif failing == "write":
        monkeypatch.setattr(artefact, "save_file", raising(OSError(28, "No space left on device")))
    else:
        error = KeyboardInterrupt
        monkeypatch.setattr(artefact, "_copy_companions", raising(KeyboardInterrupt()))
    # when a model is written, then that is said and no part of it stays.
    with pytest.raises(error):
        write_artefact(folder, read_config(folder), "int8", out)
    assert list(tmp_path.iterdir()) == []


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_model_that_is_coded_already_is_refused_before_it_is_loaded(checkpoint, texts, tmp_path):
    folder, out = checkpoint("qwen3"), tmp_path / "out"
    write_artefact(folder, read_config(folder), "int8", out)
    with pytest.raises(UnsupportedModel, match="compressed-tensors-int8 already"):
        report_on(out, "int4", texts, tmp_path)


def test_an_unknown_path_and_a_spoiled_model_are_refused(checkpoint, texts, tmp_path):
    with pytest.raises(ModelUnavailable):
        report_on(tmp_path / "nowhere", "int8", texts, tmp_path)
    # Given a weight that is not a number,
    for path in checkpoint("qwen3").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # then there are no figures about it.
    with pytest.raises(EngineError, match="NaN"):
        report_on(tmp_path, "int8", texts, tmp_path)


def test_logits_that_are_not_finite_are_compared_with_nothing():
    class Broken:
        def score(self, ids):
            return torch.tensor([[0.0, torch.nan]])

    with pytest.raises(NumericalError, match="finite"):
        quality_scores._logits(Broken(), [1])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "holds 0 prompts"),
        (b"\n \n", "holds 0 prompts"),
        (b"\xff\xfe\n", "UTF-8"),
        (b"a\n" * (MAX_PROMPTS + 1), f"holds {MAX_PROMPTS + 1} prompts"),
        (b"a\n" + b"a" * (MAX_PROMPT_LENGTH + 1), "line 2"),
        (b"a" * (3 << 20), "larger"),
        (None, "not a readable"),
    ],
)
def test_a_prompts_file_outside_its_limits_is_refused(content, why, tmp_path):
    path = tmp_path / "texts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=why):
        read_prompts(path)


def test_the_prompts_that_come_along_are_a_few_dozen_short_texts():
    assert read_prompts(None) is PROMPTS
    assert 24 <= len(PROMPTS) <= 60
    assert len(set(PROMPTS)) == len(PROMPTS)
    assert max(map(len, PROMPTS)) < 200
