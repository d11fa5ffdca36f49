"""Finding a model's files, and streaming its tensors into the slots that want them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from fakehub import COMMIT, FakeHub
from safetensors.torch import save, save_file

from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.slots import Slot, Slots, all_slots, fill
from inferfleet.engine.model_errors import ModelUnavailable, UnsupportedModel, WeightsMismatch
from inferfleet.engine.place import Place
from inferfleet.engine.weights import Checkpoint, commit_of, find_folder

#: Asks for each (hub id, revision) in turn, in a process of its own: the hub's client reads its settings on import.
ASK = """
import json, sys
from inferfleet.engine.model_errors import ModelError
from inferfleet.engine.weights import commit_of, find_folder
for path, revision in json.loads(sys.argv[1]):
    try:
        folder = find_folder(path, revision)
        print(json.dumps({"files": sorted(p.name for p in folder.iterdir()), "commit": commit_of(folder)}))
    except ModelError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}))
"""


def ask(wanted, hub_url, cache, **environment):
    env = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HOME": str(cache), "HF_TOKEN": "", **environment}
    command = [sys.executable, "-c", ASK, json.dumps(wanted)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_id_downloads_only_what_a_text_model_needs_and_every_failure_says_what_to_do(tmp_path):
    # Given a hub with one open repository, which also holds files of other frameworks and code,
    weights = save({"a": torch.ones(2)})
    files = {"config.json": b"{}", "model.safetensors": weights, "tokenizer.json": b"{ }"}
    unwanted = {"pytorch_model.bin": b"x", "modeling_tiny.py": b"x", "consolidated.safetensors": b"x", "a.gguf": b"x"}
    unwanted |= {"README.md": b"x", "vae/diffusion_pytorch_model.safetensors": b"x"}
    with FakeHub(files | unwanted) as hub:
        # when models are asked for online,
        wanted = [("tiny/open", "main"), ("tiny/open", "v9"), ("tiny/pickled", None), ("tiny/busy", None)]
        found, revision, pickled, busy = ask(wanted, hub.url, tmp_path)
        fetched = set(hub.fetched)
    # then the open one is there, at a commit that names it for ever, without the rest,
    assert found == {"files": sorted(files), "commit": COMMIT}
    assert fetched == set(files)
    # and each failure names the model and the remedy.
    assert "tiny/open has no revision v9" in revision["error"]
    assert pickled["kind"] == "UnsupportedModel"
    assert "tiny/pickled holds no safetensors (found pytorch_model.bin, training.pt: only safe" in pickled["error"]
    assert "tiny/busy is not in the local cache and the hub answered" in busy["error"] and "429" in busy["error"]
    # And when the hub is gone, what was fetched still loads, and what was not says how to get it.
    cached, missing = ask([("tiny/open", COMMIT), ("tiny/other", "v1")], hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert cached == found
    assert "`hf download tiny/other --revision v1`" in missing["error"]


@pytest.mark.parametrize(
    ("token", "gated", "unknown"),
    [
        ("", "LoginNeeded: gated and you are not logged in: run `inferfleet login`", "LoginNeeded: shows nobody"),
        ("hf_known", "TermsNotAccepted: accept the terms on http", "ModelUnavailable: has no repository tiny/none"),
        ("hf_wrong", "LoginNeeded: does not know your token", "LoginNeeded: does not know your token"),
    ],
)
def test_a_gated_a_private_and_a_missing_repository_each_have_their_own_remedy(tmp_path, token, gated, unknown):
    # Given a hub with a gated repository, when it and one that nobody sees are asked for with this login,
    with FakeHub({"config.json": b"{}", "model.safetensors": save({"a": torch.ones(2)})}) as hub:
        answers = ask([("tiny/gated", None), ("tiny/none", None)], hub.url, tmp_path, HF_TOKEN=token)
    # then each refusal is of its own kind and names the command or the page; none shows the token.
    for answer, expected in zip(answers, (gated, unknown), strict=True):
        kind, words = expected.split(": ", 1)
        assert answer["kind"] == kind and words in answer["error"]
        assert not token or token not in answer["error"]


def test_who_has_accepted_the_terms_gets_the_gated_files(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": save({"a": torch.ones(2)})}
    with FakeHub(files) as hub:
        (found,) = ask([("tiny/gated", None)], hub.url, tmp_path, HF_TOKEN="hf_accepted")
    assert found["files"] == sorted(files)


@pytest.mark.parametrize("path", ["no/such/folder", "../escape", "https://example.org/x", "just-a-name", "a/b c"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(ModelUnavailable, match="not a hub id of the form owner/name"):
        find_folder(path)


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(ModelUnavailable, match="is a file"):
        find_folder(str(tmp_path / "model.gguf"))


def test_a_local_folder_has_no_commit(tmp_path):
    assert commit_of(find_folder(str(tmp_path))) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pytorch_model.bin", "a pickle"),
        ("weights.pkl", "a pickle"),
        ("model.pt", "a pickle"),
        ("model.gguf", "only safetensors are read;"),
        ("tf_model.h5", "only safetensors are read;"),
    ],
)
def test_other_formats_than_safetensors_are_refused_with_what_to_do(tmp_path, name, why):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=f"found {name}: only safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert why in str(caught.value) and str(caught.value).endswith("in safetensors, or convert it)")


def test_a_folder_of_many_pickles_names_a_few(tmp_path):
    for number in range(9):
        (tmp_path / f"pytorch_model-{number}.bin").touch()
    with pytest.raises(UnsupportedModel, match=r"pytorch_model-3\.bin and 5 more: only"):
        Checkpoint.open(tmp_path)


def test_pickles_beside_safetensors_are_never_opened(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert [name for name, _ in Checkpoint.open(tmp_path).tensors()] == ["a"]


def test_tensors_of_all_shards_come_one_at_a_time(tmp_path):
    # Given a checkpoint in two shards,
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((3,), 2.0)}, tmp_path / "model-00002-of-00002.safetensors")
    shards = {"a": 1, "b": 1, "c": 2}
    weight_map = {name: f"model-{number:05d}-of-00002.safetensors" for name, number in shards.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # when it is read and each tensor is dropped before the next,
    seen, last = [], None
    for name, tensor in Checkpoint.open(tmp_path).tensors():
        # then the reader has kept none of those before.
        gc.collect()
        assert last is None or last() is None
        seen.append((name, float(tensor[0])))
        last = weakref.ref(tensor)
        del tensor
    assert sorted(seen) == [("a", 0.0), ("b", 1.0), ("c", 2.0)]


def test_missing_shards_are_named(tmp_path):
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelUnavailable, match=r"lacks 1 of 2 shards: model-00002-of-00002\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "weights.bin", ""])
def test_an_index_may_not_point_outside_its_folder(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UnsupportedModel, match="files of its own folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelUnavailable, match="not a readable index"):
        Checkpoint.open(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    whole = save({"a": torch.zeros(1000)})
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors is not a readable safetensors file"):
        list(Checkpoint.open(tmp_path).tensors())


def test_quantised_tensors_are_refused(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"tensor a is stored as torch\.int8"):
        list(Checkpoint.open(tmp_path).tensors())


def test_filling_converts_dtypes_into_parts_of_a_larger_tensor():
    # Given two slots in one matrix,
    stacked = torch.zeros(3, 2)
    slots = Slots({"q": Slot.into(stacked[:2]), "k": Slot.into(stacked[2:])})
    # when a bfloat16 checkpoint is read into them, then it lies there in float32.
    fill(slots, [("q", torch.full((2, 2), 0.5, dtype=torch.bfloat16)), ("k", torch.full((1, 2), 3.0))])
    assert stacked.tolist() == [[0.5, 0.5], [0.5, 0.5], [3.0, 3.0]]


def test_every_difference_is_named_in_one_error():
    # Given slots for a, b, and for c as one tensor or two,
    slots = Slots(
        {name: Slot.into(torch.zeros(2)) for name in ("a", "b", "c.0", "c.1")},
        {"c": (Slot.into(torch.zeros(2, 2)), ("c.0", "c.1"))},
    )
    # when the checkpoint lacks b and c, holds another a, and two tensors that nobody asked for,
    given = [("a", torch.zeros(3)), ("x", torch.zeros(1)), ("skipped.y", torch.zeros(1))]
    with pytest.raises(WeightsMismatch) as caught:
        fill(slots, given, [r"skipped\..*"])
    # then the error holds all of it, and not what was declared useless.
    assert caught.value.missing == ("c (or its 2 parts, c.0 and so on)", "b")
    assert caught.value.extra == ("x",)
    assert caught.value.misshapen == ("a is [3] and should be [2]",)
    assert "2 missing" in str(caught.value) and "1 not part of this model: x" in str(caught.value)


def test_a_stack_may_come_whole_or_in_parts_but_not_twice():
    def slots():
        whole = torch.zeros(2, 2)
        parts = {"c.0": Slot.into(whole[0]), "c.1": Slot.into(whole[1])}
        return Slots(parts, {"c": (Slot.into(whole), ("c.0", "c.1"))})

    fill(slots(), [("c", torch.ones(2, 2))])
    fill(slots(), [("c.0", torch.ones(2)), ("c.1", torch.ones(2))])
    with pytest.raises(WeightsMismatch, match=r"c\.1"):
        fill(slots(), [("c", torch.ones(2, 2)), ("c.1", torch.ones(2))])


def test_a_layer_is_packed_as_soon_as_its_last_tensor_is_there():
    # Given two layers whose tensors come one after another,
    place = Place(torch.float32, torch.device("cpu"))
    model = torch.nn.ModuleDict({"a": Linear(4, {"q": 3, "k": 2}, place=place), "b": Linear(4, {"o": 4}, place=place)})
    seen = []

    def stream():
        for name, rows in (("q", 3), ("k", 2), ("o", 4)):
            seen.append((model["a"].is_packed, model["b"].is_packed))
            yield f"{name}.weight", torch.ones(rows, 4)

    # when they are filled, then neither waits for the other: two unpacked layers never exist together.
    fill(all_slots(model), stream())
    assert seen == [(False, False), (False, False), (True, False)]
    assert model["b"].is_packed
    assert model["a"](torch.ones(1, 4)).tolist() == [[4.0] * 5]
