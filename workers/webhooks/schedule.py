"""What follows from an attempt: when the next one is made, or that none is. Knows no network and no clock."""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from inferfleet.tasks.webhooks import Taken, Verdict
from inferfleet.workers.webhooks.sender import Answer

#: Seconds before each attempt, counted from the one before: a good day and a half in all.
SCHEDULE = (0.0, 5.0, 60.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 86_400.0)
#: Receivers that come back must not be met by everybody at once.
JITTER = 0.2
MAX_RETRY_AFTER = 86_400.0
GONE = 410


def judge(taken: Taken, answer: Answer, *, spread: float | None = None) -> Verdict:
    """The verdict on attempt number `taken.attempts` + 1. `spread`: -1 to 1, random unless given."""
    status, error = answer.status, answer.error
    if status is not None and 200 <= status < 300:
        return Verdict("delivered", status, answer=answer.text)
    if status == GONE:
        return Verdict("gone", status, "gone", answer.text)
    if status is not None:
        error = "redirect" if 300 <= status < 400 else "bad_status"
    wait = retry_after(answer.retry_after, taken.now_ms)
    pause_ms = round(wait * 1000)
    done = taken.attempts + 1
    if done >= allowed(taken):
        return Verdict("failed", status, error, answer.text, pause_ms=pause_ms)
    spread = random.uniform(-1, 1) if spread is None else spread
    delay = max(SCHEDULE[done] * (1 + JITTER * spread), wait)
    return Verdict("again", status, error, answer.text, round(delay * 1000), pause_ms)


def allowed(taken: Taken) -> int:
    """Attempts that a delivery gets."""
    return len(SCHEDULE) if taken.tries is None else min(taken.tries, len(SCHEDULE))


def retry_after(value: str | None, now_ms: int) -> float:
    """Seconds that a Retry-After header asks for, 0 to a day; 0 for none and for one that nobody can read."""
    if value is None:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return min(MAX_RETRY_AFTER, float(value[:20]))
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    seconds = (at - datetime.fromtimestamp(now_ms / 1000, UTC)).total_seconds()
    return min(MAX_RETRY_AFTER, max(0.0, seconds))
