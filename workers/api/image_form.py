"""A picture edit as a form: fields of text, as the OpenAI SDK writes them, become the values of its JSON body.

Form fields have no types, so each is read as the contract's field of that name wants it, and strictly: what is no
number, or no true or false, is refused by name here; whether the value is allowed is the contract's business.
"""

import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from inferfleet.tasks import strict_json
from inferfleet.tasks.contracts import ImageEditRequest, data_url, validated
from inferfleet.tasks.errors import FleetError, InvalidRequest, UnsupportedFeature
from inferfleet.tasks.picture_header import NoPicture, read_header
from inferfleet.workers.api.multipart import Part

INTEGER = re.compile(r"-?[0-9]{1,40}")
NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")
#: name[], name[key], name[][key] and name[0][key]: how the SDK and others write lists and objects into forms.
BRACKETS = re.compile(r"([^\[\]]+)(\[[^\[\]]*\])(\[[^\[\]]+\])?")
#: Fields of OpenAI's that the contract only knows to refuse, where their harmless values are no text.
UNSERVED_KINDS: dict[str, type] = {"stream": bool, "partial_images": int}
IMAGE, MASK = "image", "mask"


def parse_edit_form(parts: Sequence[Part]) -> ImageEditRequest:
    """Raises InvalidRequest or UnsupportedFeature, naming the field."""
    values = _values([part for part in parts if not part.is_file])
    # Read back strictly: a form can hold NUL characters as well as JSON can.
    values = strict_json.loads(json.dumps(values).encode())
    return validated(ImageEditRequest, values | _files([part for part in parts if part.is_file]))


def _files(parts: Sequence[Part]) -> dict[str, str]:
    """The image as a data URL."""
    images = [part for part in parts if part.name in (IMAGE, f"{IMAGE}[]")]
    for part in parts:
        if part.name == MASK:
            raise UnsupportedFeature(
                "mask is not served: a whole picture is changed: use image and strength", param=MASK
            )
        if part not in images:
            raise InvalidRequest(f"{part.name} is no file: only image is", param=part.name)
    if len(images) > 1:
        raise UnsupportedFeature(f"{len(images)} images were sent; an edit starts from one", param=IMAGE)
    if not images:
        raise InvalidRequest("image is missing: a file of the form, PNG, JPEG or WebP", param=IMAGE)
    data = bytes(images[0].data)
    try:
        # Of the two, the bytes are right: many clients name no type, or guess one from the file's ending.
        return {IMAGE: data_url(data, read_header(data).content_type)}
    except NoPicture as error:
        raise InvalidRequest(f"image: {error}", param=IMAGE) from None


def _values(parts: Sequence[Part]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    bracketed: dict[str, list[tuple[str, str, str]]] = {}
    for part in parts:
        if found := BRACKETS.fullmatch(part.name):
            name, first, second = found[1], found[2][1:-1], (found[3] or "")[1:-1]
            bracketed.setdefault(name, []).append((first, second, part.text))
        elif part.name == IMAGE:
            raise InvalidRequest(
                "image must be a file of the form, with a file name (curl: -F image=@FILE)", param=IMAGE
            )
        elif part.name in values:
            raise InvalidRequest(f"{part.name} is given twice", param=part.name)
        else:
            values[part.name] = _converted(part.name, part.text)
    for name, entries in bracketed.items():
        if name in values:
            raise InvalidRequest(f"{name} is given twice", param=name)
        values[name] = _put_together(name, entries)
    return values


def _put_together(name: str, entries: Sequence[tuple[str, str, str]]) -> Any:
    """The list or object that fields name[...] describe."""
    if all(second for _, second, _ in entries):
        return _rows(name, entries)
    if any(second for _, second, _ in entries) or len({first for first, _, _ in entries}) < len(entries) != 1:
        raise InvalidRequest(f"{name} is not one list or one object; send it as JSON in one field", param=name)
    if entries[0][0]:
        return {first: text for first, _, text in entries}
    return [text for _, _, text in entries]


def _rows(name: str, entries: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """name[0][key] says which row is meant; name[][key] does not, so there every row must give the same keys."""
    columns: dict[str, list[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for first, key, text in entries:
        column = columns.setdefault(key, [])
        row = rows.setdefault(first or str(len(column)), {})
        if key in row:
            raise InvalidRequest(f"{name}[{first}][{key}] is given twice", param=name)
        row[key] = _converted(key, text, f"{name}.{key}")
        column.append(text)
    if any(not first for first, _, _ in entries) and len({len(column) for column in columns.values()}) > 1:
        raise InvalidRequest(
            f"{name}: a form does not tell which entry a field belongs to; give all of them the same fields, or send "
            f"{name} as JSON in one field",
            param=name,
        )
    return list(rows.values())


def _converted(name: str, text: str, path: str | None = None) -> Any:
    """A field's text as a value of the kind that the contract wants. Unknown names stay text: it refuses them."""
    kind = KINDS.get(name, str)
    if kind is str:
        return text
    noun, read = READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError, FleetError):
        raise InvalidRequest(f"{path or name} must be {noun}, not {text[:40]!r}", param=path or name) from None


def _integer(text: str) -> int:
    if not INTEGER.fullmatch(text):
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    if not NUMBER.fullmatch(text):
        raise ValueError
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _json(text: str) -> Any:
    return strict_json.loads(text.encode())


READERS: dict[type, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", _integer),
    float: ("a number", _number),
    bool: ("true or false", _truth),
    list: ("a list in JSON", _json),
    dict: ("an object in JSON", _json),
}


def kinds_of(contract: type[BaseModel]) -> Mapping[str, type]:
    """Field -> int, float, bool, list, dict, or str for all that is text."""
    return {name: _kind(field.annotation) for name, field in contract.model_fields.items()}


def _kind(annotation: Any) -> type:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return _kind(next(option for option in get_args(annotation) if option is not type(None)))
    if origin is Literal:
        return str
    kind = origin or annotation
    return kind if kind in READERS else str


#: `scale` is a field of a LoRA, the only object in the form that has one which is no text.
KINDS: dict[str, type] = {**kinds_of(ImageEditRequest), **UNSERVED_KINDS, "scale": float}
