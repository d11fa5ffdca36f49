"""The moves that ledger tests are made of, with one tenant, one model and one worker unless told otherwise."""

from inferfleet.tasks.names import DELTA

PAST, FAR = 1, 4_000_000_000_000


def submit(ledger, job_id="job_1", **options):
    return ledger.submit(job_id, b"{}", **({"model": "m", "tenant": "a", "body_hash": "h"} | options))


def claim(ledger, token="t", **options):
    return ledger.claim("m", **({"worker": "w", "token": token} | options))


def delta(text):
    return {"type": DELTA, "index": 0, "delta": text}


def types(ledger, job_id="job_1"):
    return [event["type"] for event in ledger.events(job_id)]
