"""The door: what a chat job may ask for. Every bad body is a typed error that names the field; good ones pass whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferfleet.tasks.contracts import (
    MAX_TOKENS,
    UNSERVED,
    ChatCompletionRequest,
    JobRequest,
    body_hash,
    check_card,
    parse_chat,
    parse_job,
)
from inferfleet.tasks.errors import (
    ContextLengthExceeded,
    FleetError,
    InvalidJSON,
    InvalidRequest,
    RequestError,
    UnsupportedFeature,
)

USER = {"role": "user", "content": "hi"}
GOOD = {"model": "m", "messages": [USER]}


def body(**changes):
    return json.dumps(GOOD | changes).encode()


def refusal(parse, raw):
    with pytest.raises(RequestError) as caught:
        parse(raw)
    return caught.value


# Bytes that are no JSON, or JSON that no contract should see ---------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "line 1 column 1"),
        (b"nope", "line 1 column 1"),
        (b'{"model": "m",}', "line 1"),
        (b'{"model": "m"} {}', "Extra data"),
        (b"[" * 100_000, "deeper than 64"),
        (b'{"a":' * 100_000, "deeper than 64"),
        (b"[" * 65 + b"]" * 65, "deeper than 64"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e400}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"temperature": 0.' + b"9" * 5000 + b"}", "too long"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"model": "\xff"}', "UTF-8; byte 11"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-8"),
        (json.dumps(GOOD).encode("utf-8-sig"), "byte order mark"),
    ],
)
def test_bytes_that_are_no_clean_json_are_invalid_json(raw, said):
    for parse in (parse_chat, parse_job):
        error = refusal(parse, raw)
        assert (error.status, error.code) == (400, "invalid_json")
        assert said in error.message


def test_sixty_four_levels_are_read():
    raw = b'{"a":' + b"[" * 63 + b"]" * 63 + b"}"
    assert refusal(parse_chat, raw).code == "invalid_request"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"model": "m", "model": "n", "messages": []}', "model"),
        (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "b"),
        (b'{"model": "m\\u0000x", "messages": []}', "model"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a\\u0000"}]}', "messages.0.content"),
    ],
)
def test_doubled_keys_and_nul_are_refused_by_name(raw, param):
    error = refusal(parse_chat, raw)
    assert (error.status, error.code, error.param) == (422, "invalid_request", param)


def test_a_whole_surrogate_pair_is_a_character():
    raw = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert parse_chat(raw).messages[0].content == "\U0001f600"


@pytest.mark.parametrize("value", [[], 1, "x", None, True])
def test_a_body_must_be_an_object(value):
    assert refusal(parse_chat, json.dumps(value).encode()).code == "invalid_request"


# Fields --------------------------------------------------------------------------------------------------------------

BAD = [
    ({"temprature": 1}, "temprature", "unknown field"),
    ({"model": ""}, "model", "at least 1"),
    ({"model": "m" * 257}, "model", "at most 256"),
    ({"model": 3}, "model", "string"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [USER] * 4097}, "messages", "at most 4096"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'user'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "list"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
    ({"messages": [USER | {"weight": 1}]}, "messages.0.weight", "unknown field"),
    ({"messages": [USER | {"tool_calls": [{}]}]}, "messages.0.tool_calls", "None"),
    ({"n": True}, "n", "integer"),
    ({"n": 1_000_000}, "n", "less than or equal to 8"),
    ({"n": -1}, "n", "greater than or equal to 1"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": "1"}, "n", "integer"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**9}, "max_tokens", str(MAX_TOKENS)),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    ({"max_tokens": MAX_TOKENS, "n": 2}, "max_tokens", str(MAX_TOKENS)),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens = 4"),
    ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "1"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
    ({"top_k": -1}, "top_k", "greater than or equal to 0"),
    ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"presence_penalty": -2.1}, "presence_penalty", "-2"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "2"),
    ({"seed": 2**64}, "seed", str(2**63 - 1)),
    ({"seed": -1}, "seed", "0"),
    ({"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias", "300"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
    ({"logit_bias": {"cat": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias", "twice"),
    ({"stop": ["x"] * 10_000}, "stop", "at most 8"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"stop": ""}, "stop", "at least 1"),
    ({"stop": "x" * 65}, "stop", "at most 64"),
    ({"stop": 3}, "stop", "list"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", "0"),
    ({"stop_token_ids": list(range(33))}, "stop_token_ids", "32"),
    ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs", "20"),
    ({"top_logprobs": 1}, "top_logprobs", "logprobs = true"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
    ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "unknown field"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "unknown field"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "text"),
    ({"user": "x" * 513}, "user", "512"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
    ({"metadata": {"k": "x" * 513}}, "metadata.k", "512"),
    ({"metadata": {"k": 1}}, "metadata.k", "string"),
    ({"priority": 101}, "priority", "100"),
    ({"priority": -101}, "priority", "-100"),
    ({"priority": 0.5}, "priority", "integer"),
    ({"service_tier": "gold"}, "service_tier", "'flex'"),
    ({"deadline": 1_767_225_600_000}, "deadline", "4102444800"),
    ({"deadline": -1}, "deadline", "0"),
]


@pytest.mark.parametrize(("change", "param", "said"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_refused_with_its_path_and_its_limit(change, param, said):
    error = refusal(parse_chat, body(**change))
    assert (error.status, error.code, error.param) == (422, "invalid_request", param)
    assert said in error.message
    # the same inside a job, under its path there
    inside = refusal(parse_job, json.dumps({"body": GOOD | change}).encode())
    assert inside.param == f"body.{param}"


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_is_refused_and_not_ignored(name):
    error = refusal(parse_chat, body(**{name: [1]}))
    assert (type(error), error.param) == (UnsupportedFeature, name)
    for same in (None, *UNSERVED[name][0]):
        assert parse_chat(body(**{name: same})) == parse_chat(body())


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_a_part_that_is_not_text_is_refused_and_not_ignored(kind):
    error = refusal(parse_chat, body(messages=[{"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]}]))
    assert (type(error), error.param) == (UnsupportedFeature, "messages.0.content.0")


def test_a_schema_is_refused_however_it_looks():
    for schema in ({"$ref": "http://169.254.169.254/"}, {"pattern": "(a)\\1"}, {"type": "stirng"}):
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert isinstance(refusal(parse_chat, body(response_format=form)), UnsupportedFeature)


def test_an_error_repeats_no_content():
    error = refusal(parse_chat, body(messages=[{"role": "user", "content": {"secret": "canary"}}]))
    assert "canary" not in error.message


def test_a_full_request_passes_and_says_what_the_engine_needs():
    request = parse_chat(
        body(
            messages=[
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
                {"role": "tool", "content": "d", "tool_call_id": "call_1"},
            ],
            temperature=1,
            top_p=0.5,
            top_k=3,
            stop="END",
            logprobs=True,
            top_logprobs=2,
            logit_bias={"7": -100},
            max_completion_tokens=9,
            seed=2**63 - 1,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            response_format={"type": "text"},
            chat_template_kwargs={"enable_thinking": False},
            store=None,
        )
    )
    assert request.sampling() == {
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": 3,
        "stop": ["END"],
        "logprobs": 2,
        "logit_bias": {"7": -100.0},
        "max_tokens": 9,
        "seed": 2**63 - 1,
        "n": 2,
    }
    assert request.plain_messages()[2] == {"role": "assistant", "content": "c"}


def test_sampling_names_only_fields_that_the_engine_has():
    from inferfleet.engine.sampling_params import SamplingParams

    everything = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": 1}
    request = parse_chat(body(**everything, stop=["x"], stop_token_ids=[1], ignore_eos=True, min_tokens=1, seed=3))
    assert SamplingParams.from_dict(request.sampling()).top_k == 1


def test_logprobs_without_top_asks_for_the_picked_token_only():
    assert parse_chat(body(logprobs=True)).sampling()["logprobs"] == 0
    assert "logprobs" not in parse_chat(body(logprobs=False)).sampling()


# Jobs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"method": "GET"}, "method"),
        ({"url": "/v1/embeddings"}, "url"),
        ({"webhook": "http://127.1/"}, "webhook"),
        ({"custom_id": ""}, "custom_id"),
        ({"start_timeout": 0}, "start_timeout"),
        ({"execution_timeout": 10**9}, "execution_timeout"),
        ({"body": None}, "body"),
        ({"priority": True}, "priority"),
    ],
)
def test_a_bad_job_option_is_refused_by_name(change, param):
    error = refusal(parse_job, json.dumps({"body": GOOD} | change).encode())
    assert (error.status, error.param) == (422, param)


@pytest.mark.parametrize(
    ("outer", "inner", "priority"),
    [
        ({}, {}, 0),
        ({}, {"priority": 7}, 7),
        ({"priority": -3}, {"priority": 7}, -3),
        ({"service_tier": "flex"}, {}, 50),
        ({}, {"service_tier": "priority"}, -50),
        ({"service_tier": "flex"}, {"priority": 1}, 1),
        ({"service_tier": "auto"}, {}, 0),
    ],
)
def test_priority_comes_from_the_job_then_its_body_then_the_tier(outer, inner, priority):
    assert parse_job(json.dumps({"body": GOOD | inner} | outer).encode()).effective_priority == priority


def test_the_earlier_deadline_counts_in_milliseconds():
    job = parse_job(json.dumps({"body": GOOD | {"deadline": 1767225600.5}, "deadline": 1767225601}).encode())
    assert job.deadline_ms == 1767225600500


def test_equal_requests_make_equal_envelopes_and_others_do_not():
    one = parse_job(b'{"body": {"model": "m", "messages": [{"content": "hi", "role": "user"}], "n": 1, "seed": null}}')
    two = JobRequest.from_body(parse_chat(body(n=1)))
    assert one.envelope() == two.envelope()
    assert body_hash(one.envelope()) != body_hash(JobRequest.from_body(parse_chat(body(n=2))).envelope())


@settings(max_examples=50, deadline=None)
@given(
    content=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
    temperature=st.none() | st.floats(0, 2),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.none() | st.lists(st.text("abc", min_size=1, max_size=5), max_size=8),
)
def test_an_envelope_reads_back_as_the_request_that_made_it(content, temperature, seed, stop):
    changes = {"messages": [{"role": "user", "content": content}], "temperature": temperature, "seed": seed}
    job = JobRequest.from_body(parse_chat(body(stop=stop, **changes)))
    assert parse_job(job.envelope()) == job


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([*ChatCompletionRequest.model_fields, "what"]),
)
def test_any_value_in_any_field_is_accepted_or_refused_with_a_typed_error(value, name):
    try:
        parse_chat(json.dumps(GOOD | {name: value}).encode())
    except FleetError as error:
        assert error.status in (400, 422)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused_with_a_typed_error(raw):
    with pytest.raises((InvalidJSON, InvalidRequest)):
        parse_chat(raw)


# One model's limits --------------------------------------------------------------------------------------------------

CARD = {"vocab_size": 100, "max_model_len": 20, "max_token_bytes": 4}


@pytest.mark.parametrize(
    ("change", "kind", "param", "limit"),
    [
        ({"logit_bias": {"100": 1}}, InvalidRequest, "logit_bias", "100"),
        ({"stop_token_ids": [100]}, InvalidRequest, "stop_token_ids", "100"),
        ({"max_tokens": 20}, ContextLengthExceeded, "max_tokens", "20"),
        ({"messages": [{"role": "user", "content": "é" * 41}]}, ContextLengthExceeded, "messages", "20"),
        ({"messages": [USER | {"content": "x" * 44}], "max_tokens": 10}, ContextLengthExceeded, "messages", "20"),
    ],
)  # fmt: skip
def test_a_request_beyond_its_model_is_refused_with_the_limit(change, kind, param, limit):
    with pytest.raises(kind) as caught:
        check_card(parse_chat(body(**change)), CARD)
    assert type(caught.value) is kind
    assert caught.value.param == param
    assert limit in caught.value.message


def test_a_slice_is_checked_where_the_card_lists_them_and_only_there():
    sliced = CARD | {"matformer_slices": ["small", "large"]}
    check_card(parse_chat(body(matformer_slice="large")), sliced)
    check_card(parse_chat(body(matformer_slice="large")), {"state": "unserved"})
    for card, said in ((sliced, "its slices are 'small', 'large'"), (CARD | {"matformer_slices": []}, "it has none")):
        with pytest.raises(InvalidRequest, match=said) as caught:
            check_card(parse_chat(body(matformer_slice="tiny")), card)
        assert caught.value.param == "matformer_slice"


def test_a_request_within_its_model_passes_and_an_empty_card_refuses_nothing():
    fits = parse_chat(body(logit_bias={"99": 1}, stop_token_ids=[99], max_tokens=19))
    check_card(fits, CARD)
    check_card(parse_chat(body(logit_bias={"100": 1}, max_tokens=99)), {})
