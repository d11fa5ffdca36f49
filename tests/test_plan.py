"""What a model needs, planned from its configuration alone."""

import json

import pytest
from test_families import PUBLISHED

from inferfleet.engine.plan import plan
from inferfleet.workers.cli_models import parse_size


@pytest.mark.parametrize("name", ["Gemma 4 E2B", "Llama 4 Scout", "Qwen3 8B"])
def test_a_plan_has_the_bytes_that_the_layers_store(tmp_path, name):
    architecture, config, billions, cache = PUBLISHED[name]
    whole = {"text_config": config} if "Conditional" in architecture else config
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "dtype": "bfloat16", **whole}))
    found = plan(str(tmp_path), gpu_memory=1 << 40)
    assert found["weights"]["numbers"] / 1e9 == pytest.approx(billions, rel=2e-3)
    spans = {span["tokens"]: span["bytes_per_token"] for span in found["cache"]["spans"]}
    assert spans | {None: found["cache"]["bytes_per_token"]} == cache


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 << 30), ("80G", 80 << 30), ("24GB", 24 * 10**9), ("7", 7)])
def test_sizes_are_read(text, size):
    assert parse_size(text) == size
