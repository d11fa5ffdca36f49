"""Checks that the settings of both kinds of model share. LoadError names the field and its limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from inferfleet.engine.errors import LoadError
from inferfleet.kernels.quantized import KINDS


def check_counts(spec: object, names: Iterable[str], *, optional: Iterable[str] = (), least: int = 1) -> None:
    """Whole numbers of at least `least`; the optional ones may be None."""
    given = [name for name in optional if getattr(spec, name) is not None]
    for name in (*names, *given):
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LoadError(f"{name} must be a whole number of at least {least}, not {value!r}", param=name)


def check_quantization(kind: object) -> None:
    if kind not in (None, *KINDS):
        raise LoadError(f"quantization must be one of {', '.join(KINDS)}, not {kind!r}", param="quantization")


def refuse_unknown(spec: Any, values: Mapping[str, Any], whose: str) -> None:
    """spec: the class of the settings; whose: "an engine"."""
    unknown = sorted(set(values) - {field.name for field in fields(spec)})
    if unknown:
        raise LoadError(f"{unknown[0]} is not a setting of {whose}", param=unknown[0])
