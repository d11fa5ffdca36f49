"""Measures the demo model on questions that no training run has seen, through transformers and through our engine.

    .venv/bin/python ops/eval_demo_model.py ops/demo_model [--per-task 250]

An answer counts only when it is exactly right. Both sides answer greedily, so their tokens must agree as well.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_data import LATE, Asker, Question, is_held_out
from tokenizers import Tokenizer
from transformers import Gemma4ForCausalLM, PreTrainedTokenizerFast

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

Conversation = list[dict[str, str]]
MAX_ANSWER_TOKENS = 64
# Ways of asking that demo_phrases.py does not have.
NEW_WAYS = (
    "Give me the sum of {a} and {b}.",
    "What is the result of {a} + {b}?",
    "{a} added to {b}",
    "Hey! Could you sum {a} and {b}?",
    "how much do {a} and {b} make?",
)


@dataclass(frozen=True)
class Exam:
    """Conversations of one kind and the answer that each must end in."""

    name: str
    conversations: tuple[Conversation, ...]
    answers: tuple[str, ...]


def exams(per_task: int, seed: int = 1234) -> list[Exam]:
    """The held-out questions: every task, every held-out addition once, and additions in harder circumstances."""
    asker = Asker(random.Random(seed), held_out=True)
    tasks = [_exam(task, [[asker.ask(task)] for _ in range(per_task)]) for task in LATE]
    near = Asker(random.Random(seed + 1), held_out=True)
    near.close_pairs = 1.0
    close = [[near.ask(task)] for _ in range(per_task // 2) for task in ("larger", "is_greater")]
    later = [[asker.ask(), asker.ask(), asker.ask("add")] for _ in range(per_task)]
    reworded = [[_reworded(asker)] for _ in range(per_task)]
    return [
        *tasks,
        _exam("every held-out addition", [[question] for question in held_out_additions()]),
        _exam("larger and is_greater, numbers less than 10 apart", close),
        _exam("add, third turn of a dialogue", later),
        _exam("add, in ways of asking never taught", reworded),
    ]


def held_out_additions() -> list[Question]:
    """`What is a + b?` for all held-out ordered pairs of numbers below 100."""
    pairs = ((a, b) for a in range(100) for b in range(100) if is_held_out("add", min(a, b), max(a, b)))
    return [Question("add", f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def _reworded(asker: Asker) -> Question:
    a, b = asker.pair("add")
    return Question("add", asker.rng.choice(NEW_WAYS).format(a=a, b=b), str(a + b))


def _exam(name: str, dialogues: Sequence[Sequence[Question]]) -> Exam:
    return Exam(name, tuple(map(conversation, dialogues)), tuple(turns[-1].answer for turns in dialogues))


def conversation(turns: Sequence[Question]) -> Conversation:
    """Messages up to the last question, with the right answers to those before."""
    messages: Conversation = []
    for turn in turns:
        messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": turn.answer}]
    return messages[:-1]


class Transformers:
    """The reference: greedy answers by Gemma4ForCausalLM with eager attention."""

    def __init__(self, folder: Path) -> None:
        self.model = Gemma4ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.eos = set(self.model.generation_config.eos_token_id)

    def answers(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of each answer, without the token that ends it."""
        prompts = [
            self.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in conversations
        ]
        found: list[list[int]] = [[] for _ in prompts]
        # Prompts of equal length go together, so that nothing has to be padded.
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            for i, ids in zip(rows, self._generate([prompts[i] for i in rows]), strict=True):
                found[i] = ids
        return found

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        batch = torch.tensor(prompts)
        mask = torch.ones_like(batch)
        ids = self.model.generate(batch, attention_mask=mask, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        return [self._until_end(row) for row in ids[:, batch.shape[1] :].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos), len(ids))
        return ids[:end]


class Ours:
    """inferfleet's engine, as a user of the offline face sees it."""

    def __init__(self, folder: Path) -> None:
        self.llm = LLM(str(folder), dtype="float32", device="cpu")
        self.eos = set(self.llm.tokenizer.eos_token_ids)

    def answers(self, conversations: Sequence[Conversation], temperature: float = 0.0) -> list[list[int]]:
        """Token ids of each answer, without the token that ends it."""
        sampling = SamplingParams(temperature=temperature, max_tokens=MAX_ANSWER_TOKENS)
        outputs = self.llm.chat(list(conversations), sampling)
        return [[i for i in output.outputs[0].token_ids if i not in self.eos] for output in outputs]


def num_right(exam: Exam, tokenizer: Tokenizer, answers: Sequence[list[int]]) -> int:
    """How many answers are exactly right."""
    return sum(tokenizer.decode(ids) == right for ids, right in zip(answers, exam.answers, strict=True))


def table(folder: Path, per_task: int) -> str:
    """Markdown: right answers through both sides, and in how many of them the tokens are the same."""
    reference, ours = Transformers(folder), Ours(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = ["| held-out questions | asked | right (transformers) | right (inferfleet) | same tokens |"]
    lines.append("|---|---|---|---|---|")
    for exam in exams(per_task):
        theirs, mine = reference.answers(exam.conversations), ours.answers(exam.conversations)
        rights = [_share(exam, tokenizer, side) for side in (theirs, mine)]
        same = sum(a == b for a, b in zip(theirs, mine, strict=True))
        lines.append(f"| {exam.name} | {len(exam.answers)} | {rights[0]} | {rights[1]} | {same} |")
    sums = _exam("", [[question] for question in held_out_additions()])
    sampled = _share(sums, tokenizer, ours.answers(sums.conversations, temperature=1.0))
    lines += [
        "",
        f"Sampled at temperature 1 and no other limit, inferfleet answers {sampled} of the held-out additions.",
    ]
    return "\n".join(lines)


def _share(exam: Exam, tokenizer: Tokenizer, answers: Sequence[list[int]]) -> str:
    right = num_right(exam, tokenizer, answers)
    return f"{right} ({100 * right / len(exam.answers):.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-task", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(table(args.folder, args.per_task))


if __name__ == "__main__":
    main()
