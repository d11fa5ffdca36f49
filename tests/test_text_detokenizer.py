"""Text given out while tokens arrive is final, whole, and in all what decoding everything gives."""

import pytest
import text_models
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.engine.text.detokenizer import IncrementalDetokenizer
from inferfleet.engine.text.pieces import PieceDecoder, UnsupportedDecoder
from inferfleet.engine.text.tokenizer import Tokenizer

TEXTS = ["Größe 🙂🚀 你好", " two  spaces\n\tand tabs ", "def add(a, b):\n    return 1", "é", "", "▁ literal Ġ marks"]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """manner -> (the library's tokenizer, ours)."""
    built = {}
    for manner, build in text_models.BUILDERS.items():
        backend = build()
        folder = text_models.write_folder(tmp_path_factory.mktemp("tokenizer"), backend)
        built[manner] = backend, Tokenizer(folder)
    return built


def stream(tokenizer, ids, **kwargs):
    detokenizer = IncrementalDetokenizer(tokenizer, **kwargs)
    return [detokenizer.add([token]) for token in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("manner", text_models.BUILDERS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_streamed_text_is_what_the_library_decodes(vocabularies, manner, text):
    backend, tokenizer = vocabularies[manner]
    ids = backend.encode(text, add_special_tokens=False).ids
    assert "".join(stream(tokenizer, ids)) == backend.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 440), max_size=40), skip=st.booleans())
def test_random_byte_level_ids_decode_as_in_the_library(vocabularies, ids, skip):
    backend, tokenizer = vocabularies["byte_level"]
    known = [token for token in ids if token < tokenizer.vocab_size]
    expected = backend.decode(known, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == expected


@pytest.mark.parametrize("manner", ["byte_fallback", "prefix_space", "metaspace"])
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.characters(codec="utf-8"), st.integers(0, 470)), max_size=20), skip=st.booleans())
def test_random_byte_fallback_ids_decode_as_in_the_library_where_bytes_are_utf8(vocabularies, manner, parts, skip):
    backend, tokenizer = vocabularies[manner]
    ids = []
    # Spelt in bytes the sign for a space is itself; the library's Metaspace, which comes after the bytes, eats it.
    parts = [part for part in parts if part != "\u2581"]
    for part in parts:
        if isinstance(part, int):
            ids += [] if (backend.id_to_token(part) or "").startswith("<0x") else [part]
        else:
            ids += [backend.token_to_id(f"<0x{byte:02X}>") for byte in part.encode()]
    known = [token for token in ids if token < tokenizer.vocab_size]
    expected = backend.decode(known, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == expected


@pytest.mark.parametrize("manner", text_models.BUILDERS)
@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 480), max_size=40), cuts=st.lists(st.integers(1, 7), max_size=10))
def test_any_cut_of_any_ids_gives_the_decoded_text(vocabularies, manner, ids, cuts):
    _, tokenizer = vocabularies[manner]
    detokenizer, text, at = IncrementalDetokenizer(tokenizer), "", 0
    for size in [*cuts, len(ids)]:
        text += detokenizer.add(ids[at : at + size])
        at += size
    assert text + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("manner", ["byte_level", "byte_fallback"])
def test_a_code_point_appears_whole_or_not_at_all(vocabularies, manner):
    backend, tokenizer = vocabularies[manner]
    byte_tokens = {"byte_level": "ðŁļĢ", "byte_fallback": ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"]}[manner]
    ids = [backend.token_to_id(token) for token in byte_tokens]
    assert stream(tokenizer, ids) == ["", "", "", "🚀", ""]


def test_bytes_that_are_no_character_become_replacement_characters(vocabularies):
    backend, tokenizer = vocabularies["byte_fallback"]
    ids = [backend.token_to_id(token) for token in ("<0xE2>", "<0x82>", "a", "<0xF0>")]
    assert stream(tokenizer, ids) == ["", "", "��a", "", "�"]


def test_special_tokens_are_skipped_and_other_added_tokens_kept(vocabularies):
    backend, tokenizer = vocabularies["byte_level"]
    ids = backend.encode("<|im_start|><think>hello</think><|im_end|>").ids
    assert tokenizer.decode(ids) == "<think>hello</think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|><think>hello</think><|im_end|>"


@pytest.mark.parametrize("token", [-1, 10**6, 429])
def test_ids_beyond_the_tokenizer_are_no_text(vocabularies, token):
    _, tokenizer = vocabularies["byte_level"]
    assert tokenizer.vocab_size == 429  # the next id is padding of the model's vocabulary
    hello = tokenizer.encode("hello")
    assert tokenizer.decode([*hello, token, *hello]) == "hellohello"
    assert tokenizer.token_bytes(token) == b""


@pytest.mark.parametrize("manner", ["prefix_space", "metaspace"])
def test_the_space_before_a_sentencepiece_text_is_cut_once(vocabularies, manner):
    backend, tokenizer = vocabularies[manner]
    ids = backend.encode("the words", add_special_tokens=False).ids
    assert backend.id_to_token(ids[0]).startswith("▁")
    assert tokenizer.decode(ids) == "the words"
    assert tokenizer.decode([0, *ids, *ids]) == "the words the words"  # <unk> is special, so no first token


def test_a_tokenizer_without_a_decoder_joins_its_words_by_spaces(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    backend = Backend(WordLevel({"hello": 0, "world": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = Tokenizer(text_models.write_folder(tmp_path, backend))
    assert tokenizer.decode([0, 1, 1]) == backend.decode([0, 1, 1]) == "hello world world"


def test_a_decoder_that_cannot_stream_is_refused_by_name():
    with pytest.raises(UnsupportedDecoder, match="WordPiece"):
        PieceDecoder.from_json('{"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true}}')
