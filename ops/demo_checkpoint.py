"""What a demo checkpoint consists of besides weights: tokenizer, chat template and the json files of the hub layout.

The tokenizer is a byte-fallback BPE without merges. Frequent words of the phrasings are whole tokens (`ignore_merges`
looks a piece up before it would merge); every other character is a token of its own, or its UTF-8 bytes. So digits and
the letters of a word to spell are always single tokens, and any text goes in and comes out unchanged.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import demo_phrases as phrases
from demo_data import Asker, Dialogue
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

PAD, EOS, BOS, UNK, TURN, END_TURN = "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"
SPECIAL_TOKENS = (PAD, EOS, BOS, UNK, TURN, END_TURN)
NUM_WHOLE_WORDS = 506
WORD_PIECE = " ?[A-Za-z]+"

# Gemma 4's wire format for text: no tools, no thinking, roles in any order.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}{%- for part in content -%}
{%- if part['type'] != 'text' -%}{{ raise_exception('this model reads text only') }}{%- endif -%}
{{ part['text'] | trim }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if message['role'] in ['system', 'developer'] -%}{%- set role = 'system' -%}
{%- elif message['role'] == 'assistant' -%}{%- set role = 'model' -%}
{%- elif message['role'] == 'user' -%}{%- set role = 'user' -%}
{%- else -%}{{ raise_exception('this model knows the roles system, user and assistant') }}{%- endif -%}
{{ '<|turn>' + role + '\\n' + text_of(message['content']) + '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}
"""


def wire(dialogue: Dialogue) -> str:
    """The dialogue as the chat template writes it; a test holds the two equal."""
    parts = [BOS]
    if dialogue.system is not None:
        parts.append(f"{TURN}system\n{dialogue.system}{END_TURN}\n")
    for turn in dialogue.turns:
        parts.append(f"{TURN}user\n{turn.text}{END_TURN}\n{TURN}model\n{turn.answer}{END_TURN}\n")
    return "".join(parts)


def build_tokenizer(seed: int) -> Tokenizer:
    """Specials, printable ASCII, 256 byte tokens, then the most frequent whole words of the training dialogue."""
    pieces = [*SPECIAL_TOKENS, *"\n\t", *(c for c in string.printable if c.isprintable())]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += _whole_words(seed)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True, ignore_merges=True, unk_token=UNK, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _whole_words(seed: int) -> list[str]:
    """Words by frequency, without those that the word tasks ask for: letters generalise to words never seen."""
    asker = Asker(random.Random(seed), held_out=False, early=True)
    asked = {word.lower() for word in phrases.WORDS}
    counts = Counter({"user": 10**9, "model": 10**9, "system": 10**9})
    for _ in range(20_000):
        for turn in asker.dialogue().turns:
            if turn.task not in ("reverse", "spell"):
                counts.update(re.findall(WORD_PIECE, turn.text + "\n" + turn.answer))
    for template in (*phrases.REVERSE, *phrases.SPELL, *phrases.SYSTEM):
        for piece in re.findall(WORD_PIECE, template.format(w="0")):
            counts[piece] += 100
            counts[piece[:1].lower() + piece[1:]] += 50
    counts["model"] += 1
    kept = [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    roles = {"user", "model", "system"}
    return [p for p in kept if len(p.strip()) > 1 and (p in roles or p.strip().lower() not in asked)][:NUM_WHOLE_WORDS]


def write_text_files(folder: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # Not GemmaTokenizer: transformers would rebuild that one from vocabulary and merges and lose the pre-tokenizer.
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_positions,
        },
    )
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids[BOS],
            "eos_token_id": [ids[EOS], ids[END_TURN]],
            "pad_token_id": ids[PAD],
            "do_sample": False,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
