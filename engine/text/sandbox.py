"""The Jinja environment of chat templates: what Hugging Face gives them, and no more than text to reach for.

Templates come with models, so they are code of strangers: the sandbox keeps them from Python's internals and from
changing what they are given; the output is bounded by whoever runs them.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Longest string or list that a template may make by multiplying, highest exponent it may raise to.
MAX_REPEAT = 1_000_000
MAX_EXPONENT = 64


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks answers for training; for us it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        # A scope of its own, as in the reference, where the body is a call block: assignments stay inside.
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body)]


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Settings of Hugging Face's templates; also refuses to multiply text into gigabytes."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
            "dict": _Dict(),
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (not isinstance(right, int | float) or abs(right) > MAX_EXPONENT):
            raise SecurityError(f"a template may raise to powers up to {MAX_EXPONENT} only")
        if operator == "*" and max(_repeated(left, right), _repeated(right, left)) > MAX_REPEAT:
            raise SecurityError(f"a template may repeat text up to {MAX_REPEAT} characters only")
        return super().call_binop(context, operator, left, right)


def _repeated(sequence: Any, times: Any) -> int:
    return len(sequence) * times if isinstance(sequence, str | list | tuple) and isinstance(times, int) else 0


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time without a zone, as the reference does


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that keeps no underscored names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Jinja's own signature trick, so that namespace(self=1) works.
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template cannot keep {name!r} on a namespace")


def literals(source: str, environment: jinja2.Environment) -> set[str]:
    """Every piece of text that the template itself may write: its text and its string constants."""
    tree = environment.parse(source)
    texts: set[str] = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
    return texts | {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
