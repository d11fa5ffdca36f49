"""The error tree: every code once, every class drawn, nothing lost on the way through JSON."""

import json
import re

import pytest

from inferfleet.tasks import errors
from inferfleet.tasks.errors import BY_CODE, FleetError, error_classes, from_dict

#: The contract with clients: changing a line here breaks somebody.
CODES = {
    "invalid_json": 400,
    "invalid_request": 422,
    "context_length_exceeded": 422,
    "unsupported_feature": 422,
    "unauthorized": 401,
    "forbidden": 403,
    "invalid_signature": 403,
    "url_expired": 403,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "url_not_allowed": 422,
    "model_not_found": 404,
    "job_not_found": 404,
    "response_not_found": 404,
    "output_not_found": 404,
    "batch_not_found": 404,
    "batch_state": 409,
    "file_not_found": 404,
    "file_in_use": 409,
    "output_damaged": 500,
    "object_changed": 500,
    "webhook_endpoint_not_found": 404,
    "webhook_delivery_not_found": 404,
    "webhook_endpoint_disabled": 409,
    "too_many_webhook_endpoints": 409,
    "no_webhook_worker": 503,
    "webhook_receiver_failed": 502,
    "idempotency_key_reuse": 409,
    "already_terminal": 409,
    "not_terminal": 409,
    "not_queued": 409,
    "queue_full": 429,
    "ledger_unavailable": 503,
    "store_unavailable": 503,
    "store_misconfigured": 503,
    "redis_misconfigured": 500,
    "settings_error": 500,
    "deadline_exceeded": 504,
    "start_timeout": 504,
    "execution_timeout": 504,
    "cancelled": 409,
    "worker_lost": 500,
    "engine_error": 500,
    "out_of_memory": 500,
    "nan_logits": 500,
    "event_log_full": 500,
    "result_too_large": 500,
}


def test_every_documented_code_has_its_status():
    assert {code: BY_CODE[code].status for code in CODES} == CODES


def test_no_two_classes_share_a_code():
    own = [cls.code for cls in error_classes() if "code" in vars(cls)]
    assert sorted(own) == sorted(set(own))


def test_the_drawing_shows_every_class_under_its_parent_with_its_status_and_code():
    lines = [line for line in errors.__doc__.splitlines() if re.search(r"[├└]──|^ {4}FleetError", line)]
    drawn = {}
    parents = []
    for line in lines:
        name, *figures = re.sub(r"[│├└─]", " ", line).split()
        depth = line.index(name) // 4
        parents[depth - 1 :] = [name]
        drawn[name] = (parents[-2] if len(parents) > 1 else "Exception", figures)
    for cls in error_classes():
        if cls.__module__ != errors.__name__:
            continue  # a room's own error, of a module that another test has imported
        parent, figures = drawn.pop(cls.__name__)
        assert parent == cls.__bases__[0].__name__
        if cls.code in CODES:
            assert figures == [str(cls.status), cls.code]
    assert drawn == {}


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_error_survives_json(code):
    error = BY_CODE[code]("what happened", param="messages.0")
    again = from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(again) is type(error)
    assert again.to_dict() == error.to_dict()


def test_an_unknown_code_becomes_the_base_class_with_its_message():
    error = from_dict({"code": "of_a_newer_version", "message": "kept"})
    assert (type(error), error.message) == (FleetError, "kept")


def test_a_class_says_its_docstring_where_no_message_is_given():
    for cls in error_classes():
        assert str(cls()) == cls.__doc__.strip()
        assert cls.__doc__.strip().endswith(".")
