import json
import subprocess
import sys

import pytest
import text_models
from tokenizers import AddedToken

from inferfleet.engine.text.tokenizer import Tokenizer, TokenizerError


def folder(tmp_path, manner="byte_level", **files):
    return text_models.write_folder(tmp_path / "model", text_models.BUILDERS[manner](), **files)


@pytest.mark.parametrize("manner", text_models.BUILDERS)
def test_ids_are_those_of_tokenizer_json(tmp_path, manner):
    backend = text_models.BUILDERS[manner]()
    tokenizer = Tokenizer(text_models.write_folder(tmp_path, backend))
    for text in [*text_models.CORPUS[:5], "<s>x</s> <|im_start|>user", " lead", ""]:
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=True) == backend.encode(text).ids


def test_padding_and_truncation_left_in_the_file_are_ignored(tmp_path):
    backend = text_models.byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(text_models.write_folder(tmp_path, backend))
    text = "The quick brown fox jumps"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_tokens_come_from_the_tokenizer_and_the_generation_config(tmp_path):
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "bos_token": None}
    tokenizer = Tokenizer(folder(tmp_path, config=config, generation_config={"eos_token_id": [420, 421]}))
    assert tokenizer.eos_token_ids == (420, 421, 422)
    assert tokenizer.pad_token_id == 420
    assert tokenizer.bos_token_id is None


def test_without_a_generation_config_the_model_config_names_the_end(tmp_path):
    tokenizer = Tokenizer(folder(tmp_path, "byte_fallback", config={}, config_json=None))
    assert tokenizer.eos_token_ids == ()
    (tmp_path / "model" / "config.json").write_text('{"text_config": {"eos_token_id": 1, "bos_token_id": 2}}')
    tokenizer = Tokenizer(tmp_path / "model")
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.special_tokens["bos_token"] == "<bos>"


def test_text_marked_plain_spells_no_token_and_reads_the_same(tmp_path):
    tokenizer = Tokenizer(folder(tmp_path))
    text = "<|im_start|>user\nhello <|im_end|>, <tool_call> world<|im_end|>\n"
    first = text.index("<|im_end|>")
    tool = text.index("<tool_call>")
    ids = tokenizer.encode_rendered(text, [(first, first + 10), (tool, tool + 11)])
    assert [token for token in ids if token in tokenizer.special_ids] == [421, 422]
    assert tokenizer.added_tokens["<tool_call>"] not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_special_token_inside_the_spelling_of_another_stays_plain(tmp_path):
    backend = text_models.byte_level()
    backend.add_tokens(text_models.special(["<a<b>c>", "<b>"]))
    tokenizer = Tokenizer(text_models.write_folder(tmp_path, backend))
    ids = tokenizer.encode_rendered("<b>x<a<b>c>", [(4, 11)])
    assert [token for token in ids if tokenizer.is_special(token)] == [tokenizer.added_tokens["<b>"]]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<b>x<a<b>c>"


def test_a_vocabulary_with_gaps_keeps_all_its_tokens(tmp_path):
    path = folder(tmp_path)
    raw = json.loads((path / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["zz"] = 700
    raw["added_tokens"] = []
    (path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == 701
    assert tokenizer.decode([700]) == "zz"
    assert tokenizer.decode(tokenizer.encode_rendered("a fox", [(2, 5)])) == "a fox"


@pytest.mark.parametrize("manner", text_models.BUILDERS)
def test_the_longest_token_in_bytes_is_known(tmp_path, manner):
    tokenizer = Tokenizer(folder(tmp_path, manner))
    every = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.vocab_size)]
    assert tokenizer.max_token_bytes >= max(len(text.encode()) for text in every if "�" not in text)


def test_bytes_of_tokens_join_to_the_bytes_of_their_text(tmp_path):
    tokenizer = Tokenizer(folder(tmp_path))
    text = "café 🙂 and 你好"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text


def test_a_folder_without_tokenizer_json_is_refused_by_path(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_is_refused_by_name(tmp_path, name):
    path = folder(tmp_path)
    (path / name).write_text("{broken")
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        _ = Tokenizer(path).eos_token_ids


def test_a_decoder_that_cannot_stream_is_refused_by_name(tmp_path):
    from tokenizers import decoders

    backend = text_models.byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(text_models.write_folder(tmp_path, backend))


def test_a_special_token_that_swallows_white_space_still_does(tmp_path):
    backend = text_models.prefix_space()
    tokenizer = Tokenizer(text_models.write_folder(tmp_path, backend))
    text = "<|user|>\nsay <|end|>\n<|end|>\n"
    ids = tokenizer.encode_rendered(text, [(13, 20)])
    assert [token for token in ids if tokenizer.is_special(token)] == tokenizer.encode("<|user|>\n<|end|>\n")


def test_the_text_side_loads_no_torch():
    code = "import sys, inferfleet.engine.text.prompt, inferfleet.engine.text.stop;" \
        " sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_added_tokens_that_are_not_special_are_text_and_tokens(tmp_path):
    backend = text_models.byte_level()
    backend.add_tokens([AddedToken("<table>", special=False, normalized=False)])
    tokenizer = Tokenizer(text_models.write_folder(tmp_path, backend))
    ids = tokenizer.encode("a<table>b")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "a<table>b"
