"""What an engine says about how far it is with loading."""

import json
import os
import subprocess
import sys

import torch
from fakehub import FakeHub
from safetensors.torch import save
from small_checkpoint import checkpoint

from inferfleet.engine.loader import EngineSpec, load_engine
from inferfleet.engine.progress import Progress


def recorded(**options):
    told = []
    return told, Progress(lambda *word: told.append(word), **options)


def test_within_a_phase_words_are_rare_but_its_ends_are_always_told():
    told, progress = recorded(seconds=3600)
    progress.begin("read", 100)
    for done in range(50):
        progress.at(done, 100)
    progress.begin("engine")
    assert told == [("read", 0, 100), ("read", 100, 100), ("engine", 0, 0)]


def test_tensors_are_counted_and_none_is_held_on_to():
    told, progress = recorded(seconds=0)
    progress.begin("read", 44)
    seen = []
    for name, tensor in progress.counted((str(n), torch.zeros(n + 1)) for n in range(4)):
        seen.append((name, len(tensor)))
    assert seen == [("0", 1), ("1", 2), ("2", 3), ("3", 4)]
    assert [done for _, done, _ in told] == [0, 4, 12, 24, 40]


def test_a_load_tells_every_phase_in_order_and_all_bytes_of_its_shards(tmp_path):
    checkpoint(tmp_path, shards=3)
    told, progress = recorded(seconds=0)
    load_engine(EngineSpec(path=str(tmp_path), device="cpu", kv_cache_tokens=256, threads=1), progress)
    assert list(dict.fromkeys(phase for phase, _, _ in told)) == ["find", "read", "engine", "smoke"]
    read = [(done, total) for phase, done, total in told if phase == "read"]
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert read == sorted(read) and read[0] == (0, size) and read[-1] == (size, size)


FETCH = """
import json, sys
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import find_folder
find_folder("tiny/open", "main", Progress(lambda *word: print(json.dumps(word)), seconds=0))
"""


def test_a_download_tells_its_bytes_and_what_is_there_already_tells_nothing(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": save({"a": torch.zeros(1 << 18)})}
    with FakeHub(files) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
        first, again = (
            subprocess.run([sys.executable, "-c", FETCH], env=env, capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        )
    told = [json.loads(line) for line in first.splitlines()]
    size = sum(map(len, files.values()))
    assert {phase for phase, _, _ in told} == {"download"}
    assert told[-1] == ["download", size, size]
    assert again == ""
