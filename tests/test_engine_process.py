import json
import os
import signal
import subprocess

import pytest
from engine_child import DEVICE, PATIENCE, Child
from parity.checkpoints.writing import write

from inferfleet.engine.offline import LLM
from inferfleet.engine.process import usable_cores
from inferfleet.engine.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    write("qwen3", 0, folder)
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def child(folder, log):
    with log.open("wb") as stderr:
        child = Child(stderr)
        child.card = child.load(folder)["card"]
        yield child
        assert child.close() == 0


@pytest.fixture(scope="module")
def expected(folder):
    """What the offline engine answers to the same chat."""
    llm = LLM(folder, device=DEVICE, dtype="float32", max_model_len=256, kv_cache_tokens=4096)

    def answer(text, **sampling):
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling)
        return llm.chat([{"role": "user", "content": text}], params)[0]

    return answer


def test_the_card_says_what_was_loaded(child):
    assert child.card["max_model_len"] == 256
    assert child.card["kv_cache_tokens"] == 4096
    assert child.card["architecture"] == "Qwen3ForCausalLM"
    assert child.card["load_seconds"]["read"] >= 0


def test_while_it_loads_it_says_how_far_it_is(child, folder):
    phases = [(told["phase"], told["done"] == told["total"]) for told in child.progress]
    size = (folder / "model.safetensors").stat().st_size
    assert [phase for phase, _ in phases] == ["find", "read", "read", "engine", "smoke"]
    first, last = (told for told in child.progress if told["phase"] == "read")
    assert (first["done"], last["done"], last["total"]) == (0, size, size)


def test_requests_are_answered_together_as_the_offline_engine_answers_them(child, expected):
    for name in ("one", "two", "three"):
        child.add(name, name)
    told, steps = child.until_end("one", "two", "three")
    for name in told:
        output = expected(name)
        assert told[name]["token_ids"] == output.outputs[0].token_ids
        assert told[name]["text"] == output.outputs[0].text
        assert told[name]["usage"]["prompt_tokens"] == len(output.prompt_token_ids)
        assert told[name]["usage"]["completion_tokens"] == 8
    # Steps count up and carry the figures of the engine; the last one left nothing behind.
    numbers = [step["step"] for step in steps]
    assert numbers == sorted(numbers)
    assert steps[-1]["stats"]["running"] == steps[-1]["stats"]["waiting"] == 0
    assert set(steps[0]["stats"]) == {
        "running",
        "waiting",
        "kv_usage",
        "preemptions",
        "prefix_queries",
        "prefix_hits",
        "batch_tokens",
    }


def test_a_resumed_request_tells_only_what_was_not_published(child, expected):
    whole = expected("go on", max_tokens=12).outputs[0]
    text = expected("go on", max_tokens=5).outputs[0].text.rstrip("\ufffd")
    resume = {"0": {"token_ids": whole.token_ids[:5], "text": text}}
    child.add("resumed", "go on", sampling={"max_tokens": 12}, resume=resume)
    told, _ = child.until_end("resumed")
    assert told["resumed"]["token_ids"] == whole.token_ids[5:]
    assert text + told["resumed"]["text"] == whole.text


def test_a_cancelled_request_ends_with_its_usage(child):
    child.add("endless", sampling={"max_tokens": 200})
    first = child.receive()
    assert first["deltas"][0]["id"] == "endless"
    child.send("cancel", id="endless")
    told, _ = child.until_end("endless")
    assert told["endless"]["reason"] == "cancelled"
    assert 0 < told["endless"]["usage"]["completion_tokens"] < 200


def test_cancelling_what_is_not_there_says_nothing(child):
    child.send("cancel", id="nobody")
    child.add("after")
    _, steps = child.until_end("after")
    assert {delta["id"] for step in steps for delta in step["deltas"]} == {"after"}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"sampling": {"temperature": 9.0}}, "invalid_request", "temperature"),
        ({"sampling": {"temprature": 1.0}}, "invalid_request", "temprature"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"text": "word " * 200}, "context_length_exceeded", "messages"),
        ({"matformer_slice": "small"}, "invalid_request", "matformer_slice"),
        ({"sampling": {"max_tokens": 256}}, "context_length_exceeded", "max_tokens"),
        ({"messages": [{"role": "user", "content": {"not": "text"}}], "resume": {"zero": {}}}, "engine_error", None),
    ],
)
def test_a_bad_request_is_refused_and_the_process_goes_on(child, fields, code, param):
    child.add("bad", **fields)
    told, _ = child.until_end("bad")
    assert (told["bad"]["error"]["code"], told["bad"]["error"]["param"]) == (code, param)
    child.add("good")
    assert child.until_end("good")[0]["good"]["usage"]["completion_tokens"] == 8


def test_ctrl_c_at_the_terminal_is_the_parents_business(child):
    child.process.send_signal(signal.SIGINT)
    child.add("still here")
    assert child.until_end("still here")[0]["still here"]["reason"] == "length"


def test_an_unknown_operation_is_logged_and_does_no_harm(child, log):
    child.send("sing")
    child.add("next")
    child.until_end("next")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["op"] for line in lines if line["event"] == "unknown operation"] == ["sing"]
    assert all({"timestamp", "level", "event"} <= set(line) for line in lines)
    # An operator sees which kernels run: compiled ones, or the references and why.
    assert [
        line["kernels"].split()[0].rstrip(":") in ("ready", "no", "failed") for line in lines if "kernels" in line
    ] == [True]


def test_stop_ends_the_process(folder):
    child = Child(None)
    assert child.load(folder)["op"] == "ready"
    child.send("stop")
    assert child.process.wait(PATIENCE) == 0


def test_a_parent_that_is_gone_ends_the_process_in_the_middle_of_work(folder):
    child = Child(None)
    child.load(folder)
    child.add("endless", sampling={"max_tokens": 240})
    child.receive()
    assert child.close() == 0


def test_a_model_that_cannot_be_loaded_is_told_and_ends_the_process(tmp_path):
    child = Child(subprocess.DEVNULL)
    message = child.load(tmp_path / "nothing")
    assert (message["op"], message["code"]) == ("failed", "load_failed")
    assert "there is no folder" in message["message"]
    assert child.process.wait(PATIENCE) == 1


@pytest.mark.parametrize("threads", [0, -1, "many"])
def test_a_bad_number_of_threads_refuses_the_load(tmp_path, threads):
    child = Child(subprocess.DEVNULL)
    message = child.load(tmp_path, threads=threads)
    assert message["op"] == "failed"
    assert "threads must be a whole number of at least 1" in message["message"]
    assert child.process.wait(PATIENCE) == 1


def test_without_a_setting_the_engine_uses_the_cores_it_may_use():
    assert 1 <= usable_cores() <= os.cpu_count()


def test_a_request_is_answered_by_the_slice_that_it_names(tmp_path):
    # Given Gemma 3n with a table of two slices, of which one is the default,
    write("gemma3n", 0, tmp_path)
    columns = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped"
    lines = [f'narrow,7,,,"{[64] * 7}",', f'short,6,,,"{[224] * 6}","[1]"']
    (tmp_path / "slices.csv").write_text("\n".join([columns, *lines]))
    spec = {"matformer_config_path": str(tmp_path / "slices.csv"), "matformer_slice_name": "narrow"}
    child = Child(None)
    card = child.load(tmp_path, **spec)["card"]
    assert (card["matformer_slices"], card["matformer_slice"]) == (["narrow", "short"], "narrow")
    # when requests name one, the other and none,
    for name, part in (("a", "narrow"), ("b", "short"), ("c", None)):
        child.add(name, matformer_slice=part)
    told, _ = child.until_end("a", "b", "c")
    child.close()
    # then each is answered by its own, as the offline engine does.
    offline = LLM(tmp_path, device=DEVICE, dtype="float32", max_model_len=256, kv_cache_tokens=4096, **spec)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for name, part in (("a", "narrow"), ("b", "short"), ("c", "narrow")):
        said = offline.chat([{"role": "user", "content": "hello"}], params, matformer_slice=part)[0].outputs[0]
        assert told[name]["token_ids"] == said.token_ids
    assert told["a"]["token_ids"] != told["b"]["token_ids"]
