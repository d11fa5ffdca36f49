"""What is wrong with a field is said in our words: its name, what it must be, its limit, and never what was sent."""

import json

import pytest

from inferfleet.tasks.contracts import parse_chat, parse_images
from inferfleet.tasks.errors import InvalidRequest

SECRET = "do not repeat"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
IMAGE = {"model": "m", "prompt": "a circle"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages must not be empty"),
        ({"messages": {}}, "messages must be a list"),
        ({"messages": [SECRET]}, "messages.0 must be an object"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content: must be a string or a list"),
        ({"messages": [{"role": SECRET, "content": "x"}]},
         "messages.0.role must be 'system', 'developer', 'user', 'assistant' or 'tool'"),
        ({"n": True}, "n must be a whole number"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"n": 9}, "n must be at most 8"),
        ({"n": 0}, "n must be at least 1"),
        ({"top_p": 0}, "top_p must be greater than 0"),
        ({"temperature": SECRET}, "temperature must be a number"),
        ({"stream": SECRET}, "stream must be true or false"),
        ({"stop": ["x"] * 9}, "stop must have at most 8 entries"),
        ({"stop": ""}, "stop must not be empty"),
        ({"user": "x" * 513}, "user must have at most 512 characters"),
        ({"user": 7}, "user must be a string"),
        ({SECRET: 1}, f"unknown field {SECRET}"),
    ],
)  # fmt: skip
def test_a_chats_field_is_named_with_what_it_must_be(change, message):
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(json.dumps(CHAT | change).encode())

    assert caught.value.message == message


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 17, "height": 64}, "width must be a multiple of 16"), ({"prompt": None}, "prompt must be a string")],
)
def test_an_images_field_is_named_with_what_it_must_be(change, message):
    with pytest.raises(InvalidRequest) as caught:
        parse_images(json.dumps(IMAGE | change).encode())

    assert caught.value.message == message
