"""Reads a table of MatFormer slices: how wide a slice's MLPs are and which layers it leaves out. Knows no model.

A MatFormer is trained so that the first rows of its MLPs are models of their own. The table is the CSV that is
published beside Gemma 3n: its "FFN Hidden Dims" name a width for every *kept* layer, its "Layers Skipped" the others.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from inferfleet.engine.errors import LoadError

COLUMNS = ("name", "# Layers", "# Effective Params (B)", "MMLU PT accuracy", "FFN Hidden Dims", "Layers Skipped")
NAME, COUNT, WIDTHS, SKIPPED = COLUMNS[0], COLUMNS[1], COLUMNS[4], COLUMNS[5]
#: A real table is some kilobytes; a wrong path should not fill the memory.
MAX_BYTES = 1 << 20

_WHOLE = re.compile(r"\d(?:_?\d){0,11}")


@dataclass(frozen=True, slots=True)
class SliceRow:
    """One line of the table."""

    name: str
    #: MLP width of each kept layer, in order.
    widths: tuple[int, ...]
    #: Numbers of the layers left out.
    skipped: frozenset[int]


@dataclass(frozen=True, slots=True)
class SliceTable:
    """The slices that an operator offers; `default` answers whoever names none (None: the whole model does)."""

    rows: tuple[SliceRow, ...]
    default: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.rows)


def read_table(path: str, default: str | None = None) -> SliceTable:
    """Reads a table; LoadError names the line at fault, or the known names where `default` is none of them."""
    rows = [_row(path, line, values) for line, values in _lines(path)]
    table = SliceTable(tuple(rows), default)
    if not rows:
        raise _bad(f"{path} names no slice")
    doubled = [name for name in dict.fromkeys(table.names) if table.names.count(name) > 1]
    if doubled:
        raise _bad(f"{path} names the slice {doubled[0]!r} twice")
    if default is not None and default not in table.names:
        raise LoadError(
            f"matformer_slice_name {default!r} is not in {path}; known are {', '.join(map(repr, table.names))}",
            param="matformer_slice_name",
        )
    return table


def _lines(path: str) -> list[tuple[int, dict[str, str]]]:
    """(line number, values by column) of every line after the header."""
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"{path} cannot be read: {error}") from error
    if len(raw) > MAX_BYTES:
        raise _bad(f"{path} is larger than {MAX_BYTES} bytes, so it is no table of slices")
    try:
        reader = csv.reader(io.StringIO(text), strict=True)
        lines = [(reader.line_num, values) for values in reader if any(value.strip() for value in values)]
    except csv.Error as error:
        raise _bad(f"{path} is not readable as CSV: {error}") from error
    if not lines or tuple(value.strip() for value in lines[0][1]) != COLUMNS:
        raise _bad(f"{path} must begin with the columns {','.join(COLUMNS)}")
    # The last column may be left out: a trailing comma is easily lost.
    short = [line for line, values in lines[1:] if not len(COLUMNS) - 1 <= len(values) <= len(COLUMNS)]
    if short:
        raise _bad(f"{path}, line {short[0]}: a line has {len(COLUMNS)} columns")
    return [(line, dict(zip(COLUMNS, [*values, ""], strict=False))) for line, values in lines[1:]]


def _row(path: str, line: int, values: dict[str, str]) -> SliceRow:
    where = f"{path}, line {line}"
    name, count = values[NAME].strip(), values[COUNT].strip()
    if not name:
        raise _bad(f"{where}: a slice needs a name")
    widths = [_product(item, f"{where}: {WIDTHS}") for item in _items(values[WIDTHS], f"{where}: {WIDTHS}")]
    skipped = [_whole(item, f"{where}: {SKIPPED}") for item in _items(values[SKIPPED] or "[]", f"{where}: {SKIPPED}")]
    if count and _whole(count, f"{where}: {COUNT}") != len(widths):
        raise _bad(f"{where}: {COUNT} is {count}, but {WIDTHS} holds {len(widths)} widths")
    if len(set(skipped)) < len(skipped):
        raise _bad(f"{where}: {SKIPPED} names a layer twice")
    return SliceRow(name, tuple(widths), frozenset(skipped))


def _items(text: str, where: str) -> list[str]:
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise _bad(f"{where} must be a list in square brackets, not {text[:40]!r}")
    inner = text[1:-1].strip()
    return [item.strip() for item in inner.split(",")] if inner else []


def _product(text: str, where: str) -> int:
    """A whole number, or a product of whole numbers like 2_048 * 4."""
    return math.prod(_whole(factor.strip(), where) for factor in text.split("*"))


def _whole(text: str, where: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _bad(f"{where}: {text[:40]!r} is not a whole number or a product of them")
    return int(text)


def _bad(message: str) -> LoadError:
    return LoadError(message, param="matformer_config_path")
