"""Which licence an image model has, and that one which asks for it is accepted before the model is served."""

from __future__ import annotations

import pytest

from inferfleet.engine.diffusion.licence import DEV, UNKNOWN, read_licence
from inferfleet.engine.errors import LoadError


def licence_of(folder, card: str | None, *, guided: bool):
    if card is not None:
        (folder / "README.md").write_text(card)
    return read_licence(folder, guided=guided)


@pytest.mark.parametrize(
    ("card", "guided", "tag", "needs_acceptance"),
    [
        ("---\nlicense: apache-2.0\n---\n# Schnell", False, "apache-2.0", False),
        ("---\nlicense: apache-2.0\n---\n# Dev", True, "apache-2.0", False),
        ("---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\n---\n", True, DEV, True),
        ("---\r\nlicense: other\r\nlicense_name: flux-1-dev-non-commercial-license\r\n---\r\n", True, DEV, True),
        ('---\nlicense: "MIT"  # as is\n---\n', True, "mit", False),
        (
            "---\ntags:\n- a\nlicense_name: some-non-commercial\nlicense: other\n---\n",
            False,
            "some-non-commercial",
            True,
        ),
        ("---\nlicense: cc-by-nc-4.0\n---\n", False, "cc-by-nc-4.0", True),
        ("---\nlicense: cc-by-4.0\n---\n", False, "cc-by-4.0", False),
        ("---\nlicense: other\n---\n", True, "other", True),
        ("---\nlicense: other\n---\n", False, "other", False),
        ("---\nmodel:\n  license: mit\n---\n", True, DEV, True),
        ("# license: mit, says the text", True, DEV, True),
        ("---\nlicense_name: " + "Long\x1b" * 99 + "\n---\n", False, "long" * 25, False),
        ("", False, UNKNOWN, False),
        (None, True, DEV, True),
        (None, False, UNKNOWN, False),
    ],
)
def test_the_card_says_the_licence_and_a_guided_model_without_one_is_as_dev(
    tmp_path, card, guided, tag, needs_acceptance
):
    licence = licence_of(tmp_path, card, guided=guided)

    assert (licence.tag, licence.needs_acceptance) == (tag, needs_acceptance)


def test_a_licence_that_is_not_accepted_is_refused_with_every_step_to_take(tmp_path):
    folder = tmp_path / "models--black-forest-labs--FLUX.1-Krea-dev" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    licence = licence_of(folder, None, guided=True)

    for said in (None, "apache-2.0"):
        with pytest.raises(LoadError) as caught:
            licence.refuse_unaccepted(said)
        assert caught.value.param == "accept_licence"
        for word in (
            DEV,
            "https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev",
            "`inferfleet login`",
            f'accept_licence = "{DEV}"',
        ):
            assert word in caught.value.message
    licence.refuse_unaccepted(DEV)


def test_a_permissive_licence_needs_no_word_of_the_operator(tmp_path):
    licence = licence_of(tmp_path, "---\nlicense: apache-2.0\n---\n", guided=True)

    licence.refuse_unaccepted(None)
    licence.refuse_unaccepted("something else")

    assert licence.url == "https://huggingface.co/black-forest-labs/FLUX.1-dev"
