"""Our text encoders and tokenizers of FLUX against transformers, in float32 on tiny random checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from parity.checkpoints.flux import SHAPES, Shape, reference, write
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from inferfleet.engine.diffusion.filling import load_module
from inferfleet.engine.diffusion.tokenizers import ClipTokenizer, T5Tokenizer
from inferfleet.engine.models.clip_text import ClipText
from inferfleet.engine.models.t5_encoder import T5Encoder
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import Checkpoint

TOLERANCE = 1e-5
CPU = torch.device("cpu")

NASTY = [
    "",
    " ",
    "a red circle on the blue background",
    "A  RED\tCircle,\n on the\u00a0Blue background!!",
    "don't it's we'll they're you've I'm he'd",
    "DON'T",
    "'s 'T '",
    "3 cats and 1234567890 dogs, 2½ ³",
    "café naïve ÅNGSTRÖM e\u0301 \u212b ﬁ İstanbul ß ẞ",
    "красный круг 赤い円 دائرة حمراء लाल वृत्त 🔴🟥👩‍👩‍👧",
    "<|endoftext|> after <|startoftext|>",
    "<|ENDOFTEXT|>red<|endoftext|>red",
    "</s> <pad> <unk> <extra_id_7> <extra_id_700>",
    "a</w>red",
    "\u200b zero\u200bwidth \ufeff\u2028\u2029 \x00\x1f\x7f",
    "under_score --- ... ?!?! (a)[b]{c} a.b.c x=1+1;",
    "\ud7ff\U0010ffff",
    "▁a ▁red▁circle",
    "word" * 300,
    "red " * 200,
]


def loaded(encoder, folder):
    load_module(encoder, Checkpoint.open(folder), CPU, Progress(), encoder.rename)
    return encoder


def clip_of(folder, dtype=torch.float32) -> ClipText:
    return loaded(ClipText(json.loads((folder / "config.json").read_text()), dtype=dtype), folder)


def t5_of(folder, dtype=torch.float32) -> T5Encoder:
    return loaded(T5Encoder(json.loads((folder / "config.json").read_text()), dtype=dtype), folder)


@pytest.mark.parametrize("seed", range(6))
def test_clip_gives_the_pooled_vector_of_transformers(tmp_path, seed):
    shape = write(tmp_path, seed)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    ours = clip_of(tmp_path / "text_encoder")
    tokenizer = ClipTokenizer(tmp_path / "tokenizer")
    ids = torch.tensor([tokenizer.encode(text) for text in NASTY])

    with torch.no_grad():
        found, wanted = ours(ids), theirs(ids).pooler_output

    assert found.shape == (len(NASTY), shape.clip_hidden)
    assert wanted.std() > 0.5
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("eos", [2, None])
def test_an_end_inside_the_prompt_is_where_clip_is_pooled(tmp_path, eos):
    write(tmp_path, 3, clip_eos=eos)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    ours = clip_of(tmp_path / "text_encoder")
    tokenizer = ClipTokenizer(tmp_path / "tokenizer")
    short, cut = (torch.tensor([tokenizer.encode(t)]) for t in ("a red", "a red<|endoftext|> circle"))

    with torch.no_grad():
        torch.testing.assert_close(ours(cut), theirs(cut).pooler_output, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours(cut), ours(short), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu", "gelu", "gated-silu", "gated-relu"])
@pytest.mark.parametrize("seed", range(3))
def test_t5_gives_the_hidden_states_of_transformers(tmp_path, seed, feed_forward):
    shape = write(tmp_path, seed, t5_feed_forward=feed_forward, shards=1 + seed)
    theirs = T5EncoderModel.from_pretrained(tmp_path / "text_encoder_2").eval()
    ours = t5_of(tmp_path / "text_encoder_2")
    tokenizer = T5Tokenizer(tmp_path / "tokenizer_2")
    for text, length in (("a red circle on the blue background", 12), ("cat " * 90, 200), ("", 1), ("a cat", 64)):
        ids = torch.tensor([tokenizer.pad(tokenizer.encode(text), length)])

        with torch.no_grad():
            found, wanted = ours(ids), theirs(ids).last_hidden_state

        assert found.shape == (1, ids.shape[1], shape.t5_model)
        assert wanted.std() > 0.5
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_encoders_stay_near_full_precision(tmp_path, dtype):
    write(tmp_path, 0)
    clip, t5 = tmp_path / "text_encoder", tmp_path / "text_encoder_2"
    pad = T5Tokenizer(tmp_path / "tokenizer_2")
    ids = torch.tensor([pad.pad(pad.encode("a red circle"), 32)])
    words = torch.tensor([ClipTokenizer(tmp_path / "tokenizer").encode("a red circle")])

    with torch.no_grad():
        hidden, vector = t5_of(t5, dtype)(ids), clip_of(clip, dtype)(words)
        exact, exact_vector = t5_of(t5)(ids), clip_of(clip)(words)

    assert hidden.dtype == vector.dtype == dtype
    assert (hidden - exact).pow(2).mean().sqrt() < 0.05 * exact.std()
    assert (vector - exact_vector).pow(2).mean().sqrt() < 0.05 * exact_vector.std()


def test_t5_survives_numbers_beyond_float16(tmp_path):
    """The published model's feed-forward results reach a hundred thousand."""
    write(tmp_path, 0)
    ours = t5_of(tmp_path / "text_encoder_2", torch.float16)
    with torch.no_grad():
        ours.encoder.block[0].layer[1].DenseReluDense.wo.weight *= 1e5

        hidden = ours(torch.tensor([[5, 6, 7, 1]]))

    assert hidden.isfinite().all()


def test_clip_reads_files_that_transformers_saves_and_whole_models(tmp_path):
    write(tmp_path / "hub", 0)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "hub" / "text_encoder").eval()
    theirs.save_pretrained(tmp_path / "saved")  # names without text_model.
    ids = torch.tensor([ClipTokenizer(tmp_path / "hub" / "tokenizer").encode("a cat")])

    with torch.no_grad():
        torch.testing.assert_close(clip_of(tmp_path / "saved")(ids), theirs(ids).pooler_output, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("max_length", [512, 16])
def test_tokens_are_those_of_transformers(tmp_path, max_length):
    write(tmp_path, 0, max_length=max_length)
    clip, t5 = ClipTokenizer(tmp_path / "tokenizer"), T5Tokenizer(tmp_path / "tokenizer_2")
    their_clip = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    their_t5 = T5TokenizerFast.from_pretrained(tmp_path / "tokenizer_2")
    for text in NASTY:
        wanted = their_clip(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert clip.encode(text) == wanted, text
        ids = t5.encode(text)
        assert ids == their_t5(text).input_ids, text
        if len(ids) <= max_length:
            wanted = their_t5(text, padding="max_length", max_length=max_length, truncation=True).input_ids
            assert t5.pad(ids, max_length) == wanted, text
    assert len({tuple(clip.encode(text)) for text in NASTY}) > 15
    assert clip.length == 77
    assert t5.max_length == max_length


def test_a_saved_clip_tokenizer_gives_the_ids_of_its_parts(tmp_path):
    write(tmp_path, 0)
    CLIPTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    apart, saved = ClipTokenizer(tmp_path / "tokenizer"), ClipTokenizer(tmp_path / "saved")

    assert [saved.encode(text) for text in NASTY] == [apart.encode(text) for text in NASTY]


def test_a_prompt_is_embedded_as_the_pipeline_of_diffusers_does(tmp_path):
    shape = write(tmp_path, 1)
    pipeline = reference(tmp_path)
    prompt = "a large red cat, and a dog on the left"
    hidden, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=48)
    clip, t5 = ClipTokenizer(tmp_path / "tokenizer"), T5Tokenizer(tmp_path / "tokenizer_2")

    with torch.no_grad():
        own = t5_of(tmp_path / "text_encoder_2")(torch.tensor([t5.pad(t5.encode(prompt), 48)]))
        own_pooled = clip_of(tmp_path / "text_encoder")(torch.tensor([clip.encode(prompt)]))

    assert isinstance(shape, Shape) and shape == SHAPES[1]
    torch.testing.assert_close(own, hidden, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(own_pooled, pooled, rtol=0, atol=TOLERANCE)
