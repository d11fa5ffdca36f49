"""What loads and yet cannot answer is refused before it is called ready."""

import pytest
import torch
from small_checkpoint import checkpoint, rewrite
from tiny_engine import VOCAB, tiny_engine

from inferfleet.engine import smoke as smoke_module
from inferfleet.engine.errors import LoadError
from inferfleet.engine.loader import EngineSpec, load_engine
from inferfleet.engine.smoke import TEXT, smoke
from inferfleet.engine.text.prompt import PromptEncoder


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def load(folder, **settings):
    defaults = {"path": str(folder), "device": "cpu", "kv_cache_tokens": 512, "threads": 1}
    return load_engine(EngineSpec(**(defaults | settings)))


def tried(engine, folder):
    prompts = PromptEncoder(folder)
    smoke(engine, prompts)
    return [token for token in prompts.encode_text(TEXT) if token < VOCAB][: smoke_module.MAX_TOKENS]


def test_a_sound_checkpoint_is_ready_after_its_smoke_forward(folder):
    checkpoint(folder)
    engine = load(folder).engine
    # A prompt and a decoded token have been computed, and nothing is left of them.
    assert not engine.has_work
    stats = engine.stats()
    assert (stats["running"], stats["kv_usage"], stats["prefix_queries"]) == (0, 0.0, 0)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "NaN|infinity")])
def test_a_weight_that_is_no_number_is_found_before_the_model_is_ready(folder, value, kind):
    # Given a checkpoint in which one element of one matrix was spoiled,
    tensors = checkpoint(folder)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    rewrite(folder, tensors)
    # when it is loaded, then it is refused with the place and what to do.
    with pytest.raises(LoadError, match=f"smoke forward gave ({kind}) in a prompt of .* fetch the checkpoint"):
        load(folder)


def test_a_spoiled_token_of_the_prompt_is_found(folder):
    engine = tiny_engine(folder)
    prompt = tried(engine, folder)
    engine.model.spoiled_token = prompt[3]
    with pytest.raises(LoadError, match=f"gave NaN in a prompt of {len(prompt)} tokens"):
        tried(engine, folder)


def test_a_decode_that_fails_is_told_from_the_prompt(folder, monkeypatch):
    # Given a model that reads prompts and is lost at a single token.
    engine = tiny_engine(folder)
    whole = engine.model.compute_logits
    monkeypatch.setattr(engine.model, "compute_logits", lambda h: whole(h) / (len(h) > 1))
    with pytest.raises(LoadError, match=r"gave (NaN|infinity) at the first decoded token"):
        tried(engine, folder)


def test_logits_of_another_width_than_the_vocabulary_are_refused(folder, monkeypatch):
    engine = tiny_engine(folder)
    whole = engine.model.compute_logits
    monkeypatch.setattr(engine.model, "compute_logits", lambda hidden: whole(hidden)[:, :-3])
    with pytest.raises(LoadError, match=f"gave {VOCAB - 3} logits a token, but config.json says vocab_size {VOCAB}"):
        tried(engine, folder)


def test_an_id_that_the_model_rules_out_is_no_fault(folder, monkeypatch):
    engine = tiny_engine(folder)
    whole = engine.model.compute_logits
    ruled_out = torch.zeros(VOCAB).index_fill(0, torch.tensor([7]), float("-inf"))
    monkeypatch.setattr(engine.model, "compute_logits", lambda hidden: whole(hidden) + ruled_out)
    before = engine.model.num_forwards
    tried(engine, folder)
    assert engine.model.num_forwards == before + 2


def test_a_forward_that_breaks_is_a_load_error_with_its_reason(folder):
    engine = tiny_engine(folder)
    engine.model.errors = [ValueError("shape mismatch somewhere")]
    with pytest.raises(LoadError, match="the smoke forward failed: ValueError: shape mismatch somewhere"):
        tried(engine, folder)


@pytest.mark.parametrize("longest", [1, 2])
def test_a_context_too_short_for_a_prompt_and_a_token_is_tried_as_far_as_it_goes(folder, longest):
    engine = tiny_engine(folder, max_model_len=longest)
    before = engine.model.num_forwards
    smoke(engine, PromptEncoder(folder))
    assert engine.model.num_forwards - before == longest


def test_scoring_goes_on_with_the_likeliest_tokens(folder):
    # Given a prompt of several chunks,
    engine = tiny_engine(folder, max_num_batched_tokens=7)
    prompt = list(range(20))
    # when two more tokens are decoded, then their logits are those of the longer prompt.
    logits = engine.score(prompt, num_decoded=2)
    said = logits[19:21].argmax(-1).tolist()
    torch.testing.assert_close(logits, engine.score([*prompt, *said]))
