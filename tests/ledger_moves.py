"""The moves that ledger tests are made of, with one tenant, one model and one worker unless told otherwise."""

from inferfleet.tasks.names import DELTA
from inferfleet.tasks.records import Work

PAST, FAR = 1, 4_000_000_000_000


def submit(ledger, job_id="job_1", **options):
    given = {name: options.pop(name) for name in ("tokens", "cost", "affinity") if name in options}
    usual = {"model": "m", "tenant": "a", "body_hash": "h", "work": Work(**given)}
    return ledger.submit(job_id, b"{}", **(usual | options))


def claim(ledger, token="t", **options):
    return ledger.claim("m", **({"worker": "w", "token": token} | options))


def delta(text):
    return {"type": DELTA, "index": 0, "delta": text}


def types(ledger, job_id="job_1"):
    return [event["type"] for event in ledger.events(job_id)]
