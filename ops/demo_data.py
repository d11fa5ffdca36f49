"""The dialogue that the demo model learns from: an endless seeded stream of questions with true answers.

It knows tasks, operands and the held-out split; it knows neither tokens nor torch. A question is held out when the hash
of its operands (for words: of the word, for fixed answers: of the way of asking) says so, so that no training run with
any seed ever sees it, in any phrasing.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import demo_phrases as phrases

HELD_OUT_SHARE = 0.10
MAX_WORD_LETTERS = 10
# Tasks and their share of the questions: first broadly, then more of what is hard to learn.
EARLY = {
    "add": 0.44,
    "subtract": 0.07,
    "larger": 0.08,
    "is_greater": 0.08,
    "reverse": 0.14,
    "spell": 0.05,
    "project": 0.07,
    "other": 0.07,
}
LATE = {
    "add": 0.35,
    "subtract": 0.17,
    "larger": 0.10,
    "is_greater": 0.11,
    "reverse": 0.09,
    "spell": 0.04,
    "project": 0.10,
    "other": 0.04,
}


@dataclass(frozen=True)
class Question:
    """One question, its only right answer, and the task it belongs to."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation: an optional system text and the questions in order."""

    system: str | None
    turns: tuple[Question, ...]


def is_held_out(*key: object) -> bool:
    """True for the fixed tenth of all keys that training never sees."""
    digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_OUT_SHARE


class Asker:
    """Draws questions of one side of the split: `held_out=False` for training, True for measuring.

    The early lessons have other shares of the tasks and fewer ways of asking.
    """

    def __init__(self, rng: random.Random, *, held_out: bool, early: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out
        self.mix = EARLY if early else LATE
        self.add_ways = phrases.ADD if early else phrases.ADD + phrases.MORE_ADD
        self.subtract_ways = phrases.SUBTRACT if early else phrases.SUBTRACT + phrases.MORE_SUBTRACT
        # Close and equal numbers are the hard comparisons and rare under a uniform draw, which measuring keeps to.
        self.close_pairs = 0.0 if held_out else 0.2 if early else 0.35
        self.ways = phrases.CANNED if early else {answer: phrases.all_ways(answer) for answer in phrases.CANNED}
        self.tasks: dict[str, Callable[[], Question]] = {
            "add": self.add,
            "subtract": self.subtract,
            "larger": self.larger,
            "is_greater": self.is_greater,
            "reverse": self.reverse,
            "spell": self.spell,
            "project": self.project,
            "other": self.other,
        }

    def ask(self, task: str | None = None) -> Question:
        """One question of `task`, or of a task drawn by its share."""
        return self.tasks[task or self.rng.choices(list(self.mix), list(self.mix.values()))[0]]()

    def dialogue(self) -> Dialogue:
        """One to eight turns, most often one; a system text in some of them."""
        rng = self.rng
        num_turns = rng.choices((1, 2, 3, rng.randint(4, 8)), (0.66, 0.18, 0.11, 0.05))[0]
        return Dialogue(self._system(), tuple(self.ask() for _ in range(num_turns)))

    # -- numbers

    def add(self) -> Question:
        a, b = self.pair("add")
        return self._question("add", self.add_ways, str(a + b), a=a, b=b)

    def subtract(self) -> Question:
        a, b = self.pair("subtract")
        return self._question("subtract", self.subtract_ways, str(a - b), a=a, b=b)

    def larger(self) -> Question:
        a, b = self.pair("compare")
        if self.rng.random() < 0.6:
            return self._question("larger", phrases.LARGER, self._extreme(a, b, max), a=a, b=b)
        return self._question("larger", phrases.SMALLER, self._extreme(a, b, min), a=a, b=b)

    def is_greater(self) -> Question:
        a, b = self.pair("compare")
        templates, holds = self.rng.choices(
            ((phrases.IS_GREATER, a > b), (phrases.IS_LESS, a < b), (phrases.IS_EQUAL, a == b)), (0.5, 0.35, 0.15)
        )[0]
        relation = "greater than" if a > b else "less than" if a < b else "equal to"
        answer = f"{'Yes' if holds else 'No'}, {a} is {relation} {b}."
        return self._question("is_greater", templates, answer, a=a, b=b)

    @staticmethod
    def _extreme(a: int, b: int, choose: Callable[[int, int], int]) -> str:
        return "They are equal." if a == b else str(choose(a, b))

    def pair(self, name: str) -> tuple[int, int]:
        """Two numbers below 100 on this side of the split; the split knows no order."""
        while True:
            a = self._number()
            b = self._number()
            if self.rng.random() < self.close_pairs:
                b = min(99, max(0, a + self.rng.choice((0, 0, *range(-9, 10)))))
            if is_held_out(name, min(a, b), max(a, b)) == self.held_out:
                return a, b

    def _number(self) -> int:
        return self.rng.randint(0, 9) if not self.held_out and self.rng.random() < 0.15 else self.rng.randint(0, 99)

    # -- words

    def reverse(self) -> Question:
        word = self._word()
        return self._question("reverse", phrases.REVERSE, word[::-1], w=word)

    def spell(self) -> Question:
        word = self._word()
        return self._question("spell", phrases.SPELL, "-".join(word), w=word)

    def _word(self) -> str:
        while True:
            word = self._any_word()
            if is_held_out("word", word.lower()) == self.held_out:
                return word

    def _any_word(self) -> str:
        rng = self.rng
        kind = rng.random()
        if kind < 0.35:
            word = rng.choice(phrases.WORDS)
        elif kind < 0.65:
            word = _syllables(rng)[:MAX_WORD_LETTERS]
        else:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, MAX_WORD_LETTERS)))
        case = rng.random()
        return word.capitalize() if case < 0.12 else word.upper() if case < 0.17 else word

    # -- fixed answers

    def project(self) -> Question:
        while True:
            answer = self.rng.choice(list(self.ways))
            ways = self.ways[answer]
            text = self.rng.choice(ways)
            # The plainest way, listed first, is always taught.
            if (text != ways[0] and is_held_out("asked", _plain(text))) == self.held_out:
                return self._question("project", (text,), answer, quote=False)

    def other(self) -> Question:
        rng = self.rng
        while True:
            template = self._noise() if rng.random() < 0.25 else rng.choice(phrases.OTHER)
            text = template.format(x=self._thing(), y=self._thing(), a=rng.randint(0, 99), b=rng.randint(0, 99))
            if is_held_out("other", text) == self.held_out:
                return Question("other", self._vary(text), phrases.FALLBACK)

    def _thing(self) -> str:
        return self.rng.choice(phrases.WORDS) if self.rng.random() < 0.8 else _syllables(self.rng)

    def _noise(self) -> str:
        rng = self.rng
        if rng.random() < 0.5:
            return " ".join(self._thing() for _ in range(rng.randint(2, 9)))
        letters = "".join(c for c in string.punctuation if c not in "{}") + string.ascii_letters + " " * 8
        if rng.random() < 0.5:
            letters = "".join(
                chr(rng.choice((0xE0, 0x400, 0x4E00, 0x3040, 0x600, 0x1F600)) + rng.randint(0, 60)) for _ in range(9)
            )
        return "".join(rng.choices(letters, k=rng.randint(3, 14))).strip() or "?"

    # -- wording

    def _question(
        self, task: str, templates: tuple[str, ...], answer: str, *, quote: bool = True, **slots: object
    ) -> Question:
        if quote and "w" in slots and self.rng.random() < 0.25:
            mark = self.rng.choice("\"'`")
            slots["w"] = f"{mark}{slots['w']}{mark}"
        return Question(task, self._vary(self.rng.choice(templates), keep_end="w" in slots).format(**slots), answer)

    def _vary(self, text: str, *, keep_end: bool = False) -> str:
        """The same question as people type it: other case, no full stop, a greeting before, a courtesy behind."""
        rng = self.rng
        if rng.random() < 0.25:
            text = text.rstrip("?.!")
        if rng.random() < 0.15:
            text = text.replace("? ", "?").replace(" + ", rng.choice(("+", " +", "+ ", "  +  "))).replace(" - ", "-")
        if rng.random() < 0.12:
            text = rng.choice(phrases.PREFIXES) + text
        if rng.random() < 0.12:
            joiner = " " if keep_end and text.endswith("}") else ""
            text = text + joiner + rng.choice(phrases.SUFFIXES)
        return self._recase(text).strip()

    def _recase(self, text: str) -> str:
        kind = self.rng.random()
        if kind < 0.18:
            return text.lower()
        if kind < 0.22:
            # Slots such as {a} are filled later and keep their names.
            return text if "{" in text else text.upper()
        return text[:1].lower() + text[1:] if kind < 0.3 else text

    def _system(self) -> str | None:
        kind = self.rng.random()
        if kind < 0.72:
            return None
        if kind < 0.9:
            return self.rng.choice(phrases.SYSTEM)
        return " ".join(self._thing() for _ in range(self.rng.randint(1, 14))) + self.rng.choice(("", ".", "!"))


def _plain(text: str) -> str:
    """The key of a way of asking: without case and end mark, which are varied."""
    return text.lower().rstrip("?.!")


def _syllables(rng: random.Random) -> str:
    parts = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "s", "t"))
        for _ in range(rng.randint(1, 4))
    )
    return "".join(parts)
