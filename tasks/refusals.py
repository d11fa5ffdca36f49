"""Why a job is not accepted: what the script that submits says, as errors. Knows no Redis."""

import random
from collections.abc import Sequence

from inferfleet.tasks.call import integer, text
from inferfleet.tasks.errors import DeadlineUnmeetable, FleetError, InvalidRequest, QuotaExceeded

MAX_RETRY_AFTER = 60.0

#: The field to make smaller where one job asks for more than a whole quota.
PARAMS = {"tokens_per_minute": "max_tokens", "tokens_per_day": "max_tokens"}


def refusal(verdict: str, answer: Sequence[bytes | int]) -> FleetError:
    """The error of a verdict quota, beyond or late, and what follows it in the script's answer."""
    name, *numbers = answer
    what = text(name) if isinstance(name, bytes) else str(name)
    if verdict == "late":
        (eta_ms,) = (integer(number) or 0 for number in numbers)
        param = "start_timeout" if what == "start_timeout" else "deadline"
        seconds = round(eta_ms / 1000, 3)
        message = f"at the present pace of its queue the job would start in {seconds:g} s, after its {param}"
        return DeadlineUnmeetable(message, param=param, facts={"eta_seconds": seconds})
    limit, count, *rest = (integer(number) for number in numbers)
    if verdict == "beyond":
        message = f"the job counts {count} against the quota {what} of {limit}"
        return InvalidRequest(message, param=PARAMS.get(what, "body"), facts={"quota": what, "limit": limit})
    (wait_ms,) = rest  # None: nobody knows when a job of the tenant will end
    wait = retry_after(1, None) if wait_ms is None else max(0.001, wait_ms / 1000)
    message = f"the quota {what} of {limit} is used up: {count} are used"
    return QuotaExceeded(message, retry_after=wait, facts={"quota": what, "limit": limit, "used": count})


def retry_after(waiting: int, gap_ms: int | None) -> float:
    """Seconds until a full queue has drained at its present pace, bounded and spread so that callers do not return
    all at once."""
    seconds = 5.0 if gap_ms is None else waiting * gap_ms / 1000
    return round(min(MAX_RETRY_AFTER, max(1.0, seconds)) * random.uniform(0.8, 1.2), 1)
