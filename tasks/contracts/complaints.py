"""pydantic's complaints in the words of whoever sent the field: what it must be, and what its limit is."""

from collections.abc import Mapping
from typing import Any

#: Type of a complaint -> what follows the field's name; braces are filled from the complaint's own facts.
WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "none_required": "must be null",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_pattern_mismatch": "must match {pattern}",
}


def worded(complaint: Mapping[str, Any], name: str) -> str:
    """One of `ValidationError.errors()` as a sentence about the field `name`. Never holds the value that was sent."""
    facts = {name: _plain(value) for name, value in complaint.get("ctx", {}).items()}
    if facts.get("min_length") == 1:
        return f"{name} must not be empty"
    words = WORDS.get(complaint["type"])
    return f"{name}: {complaint['msg']}" if words is None else f"{name} {words.format_map(facts)}"


def _plain(value: Any) -> Any:
    """A limit of 2 of a number that may have a point comes as 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
