"""`inferfleet models plan` as a person meets it: rows, exit status, refusals; and what it asks of a hub."""

import json
import os
import subprocess
import sys

import pytest
from fakehub import COMMIT, FakeHub
from rich.console import Console
from small_checkpoint import CONFIG, checkpoint
from test_families import PUBLISHED

from inferfleet.engine import plan as planner
from inferfleet.workers import cli, cli_models, cli_output
from inferfleet.workers.cli_models import parse_size

MIB = 1 << 20


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run("--json", path) -> (exit status, stdout, stderr) of the command, whose planner is this process."""

    def plan_here(command, **_):
        monkeypatch.setattr(sys, "argv", ["plan", *command[len(cli_models.PLANNER) :]])
        planner.main()
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out)

    def call(*arguments):
        monkeypatch.setattr(cli_models.subprocess, "run", plan_here)
        monkeypatch.setattr(sys, "argv", ["inferfleet", "models", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert "Traceback" not in told.out + told.err
        return int(ended.value.code or 0), told.out, told.err

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def tiny(tmp_path):
    checkpoint(tmp_path / "tiny")
    return "tiny"


@pytest.fixture
def scout(tmp_path):
    """The configuration of Llama 4 Scout alone."""
    architecture, config, *_ = PUBLISHED["Llama 4 Scout"]
    text = config | {"max_position_embeddings": 10_485_760}
    whole = {"architectures": [architecture], "dtype": "bfloat16", "text_config": text}
    (tmp_path / "scout").mkdir()
    (tmp_path / "scout" / "config.json").write_text(json.dumps(whole))
    return "scout"


def facts(out):
    """The rows of a plan by their names."""
    rows = (line.split("  ", 1) for line in out.splitlines())
    return {name: fact.strip() for name, fact in rows}


def test_a_plan_is_one_fact_a_line_in_binary_units(run, tiny):
    code, out, err = run(tiny, "--gpu-memory", "2GiB")
    assert (code, err) == (0, "")
    assert facts(out) == {
        "model": "tiny",
        "family": "qwen3 (Qwen3ForCausalLM)",
        "weights": "188.8 KiB in float32: 48.32 thousand numbers in all",
        "files": "188.8 KiB of safetensors (F32)",
        "2 layers": "keys and values: 256 bytes a token",
        "a token": "256 bytes of cache beyond every window and chunk",
        # 512 tokens in 32 blocks, and the block that is never used.
        "512 tokens": "132 KiB of cache, on a GPU of 1.1 GiB; 6552 fit at once",
        "GPU memory": "2 GiB, of which 819 MiB for the cache",
        "longest": "512 of 512 tokens with max_num_seqs 1; 512 with a worker's usual 32",
    }


def test_a_plan_as_json_is_whole(run, tiny):
    code, out, _ = run("--json", tiny, "--max-num-seqs", "4", "--tensor-parallel-size", "2")
    found = json.loads(out)
    assert (code, found["max_num_seqs"], found["tensor_parallel_size"]) == (0, 4, 2)
    assert found["cache"]["bytes_per_token"] == 128  # of one of two ranks
    assert found["weights"]["stored"]["numbers"] == {"F32": found["weights"]["numbers"]}
    _, out, _ = run(tiny, "--quantization", "int8")
    assert " in float32 and int8: 48.32 thousand numbers in all" in facts(out)["weights"]


def test_a_context_that_cannot_be_says_what_it_would_need(run, scout):
    # Given Scout and an 80 GiB GPU, when ten million tokens are asked for,
    code, out, err = run(scout, "--max-model-len", "10485760", "--gpu-memory", "80GiB")
    # then the status says no, and one line why and what would do.
    assert code == 1
    assert err == (
        "a context of 10485760 tokens needs 481.4 GiB of cache, but the weights alone need 200.7 GiB, more than the"
        " 80 GiB there are; the longest that fits is 0, and a GPU of 736.8 GiB would hold it\n"
    )
    assert facts(out)["12 layers"] == "keys and values: 48 KiB a token"
    assert facts(out)["36 layers"] == "keys and values of a chunk: 144 KiB a token, for the last 8192 tokens"
    # On eight of them the figures are those of each.
    code, out, err = run(scout, "--max-model-len", "10485760", "--gpu-memory", "80GiB", "--tensor-parallel-size", "8")
    assert code == 1 and "48.4 GiB are left for it beside 25.1 GiB of weights" in err
    assert err.endswith("and 8 GPUs of 93.1 GiB would hold it\n")
    assert facts(out)["GPUs"].startswith("8;")


def test_the_status_says_whether_what_was_asked_for_can_be_served(run, tiny):
    assert run(tiny, "--max-model-len", "512")[0] == 0
    code, _, err = run(tiny, "--max-model-len", "513")
    assert (code, err) == (1, "max_model_len 513 is more than the 512 positions of this model\n")
    # Room for a part of the model's own context is enough, as long as nobody asked for all of it.
    some = str((1 << 30) * 10 // 9 + 250_000)
    assert run(tiny, "--gpu-memory", some)[0] == 0
    code, _, err = run(tiny, "--gpu-memory", some, "--max-model-len", "512")
    assert code == 1 and "a context of 512 tokens needs 132 KiB of cache" in err
    # No room at all is not.
    code, _, err = run(tiny, "--gpu-memory", "1MiB")
    assert code == 1 and "0 bytes are left for it beside 188.8 KiB of weights; the longest that fits is 0" in err


def test_a_narrow_terminal_folds_a_plan_and_loses_nothing(run, scout, monkeypatch):
    monkeypatch.setattr(cli_output, "out", Console(highlight=False, force_terminal=True, width=50))
    _, out, _ = run(scout)
    assert max(map(len, out.splitlines())) <= 50
    assert "10485760 tokens  481.4 GiB of cache, on a GPU of" in out
    assert "144 KiB a token, for the last 8192 tokens" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "there is no folder nowhere, and it is not a hub id of the form owner/name"),
        (("/no/such",), "there is no folder /no/such"),
        (("tiny/config.json",), "tiny/config.json is a file; a model is a folder"),
        (("empty",), "there is no config.json in"),
        (("torn",), "config.json cannot be read as JSON"),
        (("foreign",), "no family runs the architecture 'FooForCausalLM'; known are"),
        (("headless",), "config.json: the field num_attention_heads is missing"),
        (("tiny", "--dtype", "int4"), "dtype 'int4' is not one of bfloat16, float16, float32"),
        (("tiny", "--tensor-parallel-size", "3"), "cannot be split over tensor_parallel_size 3"),
        (("damaged",), "model.safetensors is not a readable safetensors file"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_few_lines(run, tiny, tmp_path, arguments, words):
    for name in ("empty", "torn", "foreign", "headless", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["FooForCausalLM"]}))
    headless = {name: value for name, value in CONFIG.items() if name != "num_attention_heads"}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(headless))
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    told, why, hint = err.splitlines()
    assert told.startswith("error: ") and words in told
    assert why == "  why: plan_failed" and hint.startswith("  try: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu-memory", "lots"), "'lots' is not a size such as 80GiB"),
        (("--gpu-memory", "-5"), "'-5' is not a size"),
        (("--gpu-memory", "0"), "'0' is no memory at all"),
        (("--gpu-memory", "9" * 400), "is not a size"),
        (("--max-model-len", "0"), "--max-model-len"),
        (("--max-num-seqs", "none"), "--max-num-seqs"),
        (("--quantization", "int3"), "--quantization"),
    ],
)
def test_a_wrong_option_is_a_wrong_command_line(run, tiny, arguments, words):
    code, out, err = run(tiny, *arguments)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80G", 80 << 30), ("24GB", 24 * 10**9), ("7", 7), ("7 b", 7), ("1.5kib", 1536)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "5i", "5ib", "1e9", "80 GiB GiB", "inf", "８"])
def test_other_words_are_no_sizes(text):
    with pytest.raises(cli_models.typer.BadParameter):
        parse_size(text)


#: Does what is asked to each path in turn, in a process of its own: the hub's client reads its settings on import.
ASK = """
import json, sys
from inferfleet.engine.errors import LoadError
from inferfleet.engine.plan import plan
from inferfleet.engine.weights import find_folder
for asked in sys.argv[1:]:
    what, _, path = asked.partition("=")
    try:
        print(json.dumps(plan(path) if what == "plan" else str(find_folder(path))))
    except LoadError as error:
        print(json.dumps({"error": str(error)}))
"""


def ask(*command, **environment):
    env = {**os.environ, "HF_TOKEN": "", **environment}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False, timeout=120)


def test_a_hub_id_is_planned_from_its_configuration_and_the_headers_of_its_files(tmp_path):
    # Given a repository of two files of megabytes each,
    tiny = tmp_path / "tiny"
    checkpoint(tiny, shards=2, vocab_size=16_384, tie_word_embeddings=False)
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    size = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    with FakeHub(files) as hub:
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        # when it is planned by its hub id,
        done = ask("-m", "inferfleet.workers.cli", "models", "plan", "tiny/open", "--json", **home)
        # then a part of each file came over the line, and nothing else but the configuration and the index,
        assert done.returncode == 0, done.stderr
        assert set(hub.fetched) == {name for name in files if name.endswith(".safetensors")} | {
            "config.json",
            "model.safetensors.index.json",
        }
        assert hub.sent < size / 4
        # and the plan is that of the folder, at a commit.
        found = json.loads(done.stdout)
        asked = [f"plan={path}" for path in (tiny, "tiny/gated", "tiny/busy", "tiny/unknown")]
        folder, *refused = map(json.loads, ask("-c", ASK, *asked, **home).stdout.splitlines())
        assert found == folder | {"path": "tiny/open", "commit": COMMIT}
    # What the hub does not give is named with the remedy.
    words = ["you are not logged in", "429", "shows nobody a repository"]
    for answer, word in zip(refused, words, strict=True):
        assert word in answer["error"], answer
    # Without a network, the half that is there is neither planned nor loaded, and what is not there is not either.
    asked = ["plan=tiny/open", "load=tiny/open", "plan=tiny/other"]
    offline = ask("-c", ASK, *asked, HF_HUB_OFFLINE="1", **home).stdout.splitlines()
    half, load, other = (json.loads(line)["error"] for line in offline)
    assert half.startswith("tiny/open could not be fetched from the hub: Cannot reach")
    assert load.startswith("tiny/open is not in the local cache and the hub cannot be reached")
    assert other.startswith("tiny/other is not in the local cache and the hub cannot be reached")
    assert other.endswith("run `hf download tiny/other`")


def test_a_planner_that_breaks_is_an_error_and_no_trace(run, tiny, monkeypatch):
    call = run
    monkeypatch.setattr(planner, "main", lambda: print("oops"))
    code, _, err = call(tiny)
    assert code == 1 and "the planner ended with status 0" in err
