"""Under which licence an image model comes, and whether the operator has accepted it. Knows files and settings only.

The tag is what the model's card (README.md) says: `license_name`, else `license` of its front matter. It travels with
every picture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from inferfleet.engine.errors import LoadError

#: Licences that ask nothing of the operator of a guided model.
PERMISSIVE = frozenset(
    {
        "apache-2.0",
        "mit",
        "cc0-1.0",
        "cc-by-4.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "unlicense",
        "openrail",
        "openrail++",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
    }
)
#: The licence of FLUX.1 dev, which is what guided models come from.
DEV = "flux-1-dev-non-commercial-license"
UNKNOWN = "unknown"
PAGE = "https://huggingface.co/"
_NON_COMMERCIAL = re.compile(r"non-?commercial|(?<![a-z0-9])nc(?![a-z0-9])")
_FRONT_MATTER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_ENTRY = re.compile(r"^(license|license_name)\s*:\s*(.*?)\s*(?:\s#.*)?$", re.MULTILINE)
#: A card is a page of text; no more of it is read.
MAX_CARD_CHARS = 1 << 20
MAX_TAG_CHARS = 100


@dataclass(frozen=True, slots=True)
class Licence:
    """What the model's card says, and where to read and accept it."""

    tag: str
    url: str
    #: Whether the operator's settings have to name it.
    needs_acceptance: bool

    def refuse_unaccepted(self, accepted: str | None) -> None:
        """LoadError unless the setting names the tag of a licence that has to be accepted."""
        if not self.needs_acceptance or accepted == self.tag:
            return
        said = f"; it is {accepted!r} now" if accepted is not None else ""
        raise LoadError(
            f"the model's licence is {self.tag}, which has to be accepted: read and accept it on {self.url}, run"
            f' `inferfleet login` with the account that did, and write accept_licence = "{self.tag}" into the model\'s'
            f" image settings{said}",
            param="accept_licence",
        )


def read_licence(folder: Path, *, guided: bool) -> Licence:
    """guided: whether the model reads a guidance value, as FLUX.1 dev does."""
    tag = _tag(folder) or (DEV if guided else UNKNOWN)
    unlike_permissive = guided and tag not in PERMISSIVE
    needs = unlike_permissive or _NON_COMMERCIAL.search(tag) is not None
    return Licence(tag, PAGE + (repository_of(folder) or "black-forest-labs/FLUX.1-dev"), needs)


def repository_of(folder: Path) -> str | None:
    """The hub id that a snapshot's folder belongs to; None for a folder that did not come from the hub."""
    kind, _, rest = folder.parent.parent.name.partition("--")
    owner, _, name = rest.partition("--")
    is_snapshot = folder.parent.name == "snapshots" and kind == "models" and owner and name
    return f"{owner}/{name}" if is_snapshot else None


def _plain(value: str) -> str:
    """An entry's text in small letters, short enough and printable: it goes into cards, answers and pictures."""
    return "".join(character for character in value.strip("\"'").lower() if character.isprintable())[:MAX_TAG_CHARS]


def _tag(folder: Path) -> str | None:
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            front = _FRONT_MATTER.match(file.read(MAX_CARD_CHARS))
    except OSError:
        return None
    if front is None:
        return None
    found = {name: _plain(value) for name, value in _ENTRY.findall(front[1])}
    return found.get("license_name") or found.get("license") or None
