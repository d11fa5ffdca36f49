"""Reads a batch's input once: whether it is valid, and in which order its lines run. Pure: knows no Redis and no store.

What is wrong with the file fails the whole batch, as with OpenAI: a line that is no JSON, has no id of its own, or goes
elsewhere. What is wrong with one line's body fails that line alone, when its turn comes.
"""

import hashlib
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from inferfleet.tasks import strict_json
from inferfleet.tasks.contracts.batches import MAX_LINES
from inferfleet.tasks.errors import FleetError
from inferfleet.workers.batches.spool import Spool

MAX_ERRORS = 100
MAX_CUSTOM_ID = 512
#: Prompts that agree in so many of their first characters are neighbours: the longer they agree the closer.
PREFIXES = (64, 256, 1024, 4096, 16384)
DIGEST = 12


@dataclass
class Plan:
    """The lines of a valid input. A line is named by its place among those that are not blank, from 0."""

    #: model -> its lines in the order in which they run: those that share a prompt's beginning follow each other.
    order: dict[str, "array[int]"] = field(default_factory=dict)
    #: code, line (in the file, from 1), message, param; not empty = the batch fails.
    errors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(len(lines) for lines in self.order.values())

    @property
    def model(self) -> str | None:
        """The model of all lines, if it is one."""
        return next(iter(self.order)) if len(self.order) == 1 else None


class Wrong(Exception):
    """A line that fails the batch."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def told(self, number: int | None) -> dict[str, Any]:
        """As the batch object tells it."""
        return {"code": self.code, "line": number, "message": str(self), "param": self.param}


@dataclass(frozen=True)
class Rules:
    """What a batch's lines have to fit."""

    endpoint: str
    models: Collection[str]
    max_line: int
    #: Whether a line is one of this batch's at all: (place, custom_id); a retry runs some.
    wanted: Callable[[int, str], bool] = lambda place, custom_id: True


def make_plan(spool: Spool, rules: Rules, tick: Callable[[], None] = lambda: None) -> Plan:
    """Read all lines. `tick` is called for each and may raise to stop."""
    plan = Plan()
    seen: set[bytes] = set()
    found: dict[str, list[tuple[bytes, int]]] = {}
    place = -1
    for place, (number, raw) in enumerate(spool.scan(rules.max_line)):
        tick()
        try:
            if place >= MAX_LINES:
                raise Wrong("too_many_lines", f"a batch has at most {MAX_LINES} lines", None)
            custom_id, body = check_line(raw, rules, seen)
        except Wrong as wrong:
            complain(plan, number, wrong)
            if place >= MAX_LINES or len(plan.errors) >= MAX_ERRORS:
                return plan
            continue
        if rules.wanted(place, custom_id):
            found.setdefault(body["model"], []).append((prefix_key(body), place))
    if place < 0:
        complain(plan, None, Wrong("empty_file", "the file has no lines", None))
    if not plan.errors and not found:
        complain(plan, None, Wrong("nothing_to_run", "custom_ids names no line that failed", "custom_ids"))
    plan.order = {model: array("L", [place for _, place in sorted(lines)]) for model, lines in found.items()}
    return plan


def complain(plan: Plan, number: int | None, wrong: Wrong) -> None:
    plan.errors.append(wrong.told(number))


def check_line(raw: bytes, rules: Rules, seen: set[bytes]) -> tuple[str, dict[str, Any]]:
    """The custom_id and the body of a line. Raises Wrong."""
    if len(raw) > rules.max_line:
        raise Wrong("line_too_large", f"a line has at most {rules.max_line} bytes (max_body_bytes)", None)
    try:
        line = strict_json.loads(raw)
    except FleetError as error:
        raise Wrong("invalid_json_line", error.message, error.param) from None
    if not isinstance(line, dict):
        raise Wrong("invalid_json_line", "a line is one JSON object", None)
    for name in ("custom_id", "method", "url", "body"):
        if name not in line:
            raise Wrong("missing_required_parameter", f"{name} is missing", name)
    custom_id, body = line["custom_id"], line["body"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise Wrong("invalid_custom_id", f"custom_id is a text of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    digest = hashlib.blake2b(custom_id.encode(), digest_size=DIGEST).digest()
    if digest in seen:
        raise Wrong("duplicate_custom_id", f"custom_id {custom_id[:80]!r} is not the first of its name", "custom_id")
    seen.add(digest)
    if line["method"] != "POST":
        raise Wrong("invalid_method", "method must be POST", "method")
    if line["url"] != rules.endpoint:
        raise Wrong("invalid_url", f"url must be the batch's endpoint, {rules.endpoint}", "url")
    if not isinstance(body, dict):
        raise Wrong("invalid_body", "body is a JSON object", "body")
    model = body.get("model")
    if not isinstance(model, str):
        raise Wrong("missing_required_parameter", "body.model is missing or no text", "body.model")
    if model not in rules.models:
        raise Wrong("model_not_found", f"no worker serves {model[:100]!r} and no setting names it", "body.model")
    return custom_id, body


def prefix_key(body: dict[str, Any]) -> bytes:
    """Equal beginnings give keys with equal beginnings, so that sorted lines find what the one before left cached."""
    text = beginning(body)
    cuts = (text[:length].encode() for length in PREFIXES)
    return b"".join(hashlib.blake2b(cut, digest_size=4).digest() for cut in cuts)


def beginning(body: dict[str, Any]) -> str:
    """The beginning of what the model reads: of a picture's prompt, a chat's messages, a response's input."""
    if "input" in body:
        asked = body["input"]
        messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        return prompt_text([{"role": "system", "content": body.get("instructions")}, *messages])
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, str) else prompt_text(body.get("messages"))


def prompt_text(messages: Any) -> str:
    """The beginning of a dialogue as one text."""
    pieces: list[str] = []
    size = 0
    for message in messages if isinstance(messages, list) else ():
        piece = f"{message.get('role')}\n{message.get('content')}\n" if isinstance(message, dict) else ""
        pieces.append(piece[: PREFIXES[-1]])
        size += len(piece)
        if size >= PREFIXES[-1]:
            break
    return "".join(pieces)
