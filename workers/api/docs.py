"""`/docs` without a CDN: the OpenAPI document as one plain page, rendered here, no script, no asset."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark }
h2 { font-size: 1.05rem; margin: 2rem 0 .2rem; font-family: ui-monospace, monospace }
b { display: inline-block; min-width: 4.5rem }
td { text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top }
code { font-family: ui-monospace, monospace } p { margin: .2rem 0 }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """One HTML page: every route with its parameters, body and answers; links to /openapi.json for tools."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{escape(document['info'].get('description', ''))}</p>"
        '<p>The same as a document for tools: <a href="/openapi.json">/openapi.json</a></p>'
        + "".join(_routes(document))
        + "".join(_schemas(document))
        + "</html>"
    )


def _routes(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield f"<h2><b>{method.upper()}</b>{escape(path)}</h2>"
            yield f"<p>{escape(route.get('description') or route.get('summary', ''))}</p><table>"
            for parameter in route.get("parameters", []):
                where = f"{parameter['in']}{' (required)' if parameter.get('required') else ''}"
                yield _row(parameter["name"], where, parameter.get("description", ""))
            for media, content in route.get("requestBody", {}).get("content", {}).items():
                yield _row("body", media, _link(content.get("schema", {})))
            for status, answer in route.get("responses", {}).items():
                schemas = ", ".join(_link(content.get("schema", {})) for content in answer.get("content", {}).values())
                yield f"<tr><td>{escape(status)}<td>{escape(answer.get('description', ''))}<td>{schemas}</tr>"
            yield "</table>"


def _row(name: str, where: str, text: str) -> str:
    shown = text if text.startswith("<a ") else escape(text)
    return f"<tr><td><code>{escape(name)}</code><td>{escape(where)}<td>{shown}</tr>"


def _link(schema: Mapping[str, Any]) -> str:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    return f'<a href="#{escape(name)}">{escape(name)}</a>' if name else ""


def _schemas(document: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        yield f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{escape(schema.get("description", ""))}</p><table>'
        required = schema.get("required", [])
        for field, facts in schema.get("properties", {}).items():
            yield _row(field, _kind(facts) + (" (required)" if field in required else ""), _text(facts))
        yield "</table>"


def _kind(facts: Mapping[str, Any]) -> str:
    if "anyOf" in facts:
        return " | ".join(_kind(option) for option in facts["anyOf"])
    if "$ref" in facts:
        return str(facts["$ref"]).rpartition("/")[2]
    if "const" in facts:
        return repr(facts["const"])
    if facts.get("type") == "array":
        return f"array of {_kind(facts.get('items', {}))}"
    return "file" if facts.get("format") == "binary" else str(facts.get("type", "any"))


def _text(facts: Mapping[str, Any]) -> str:
    names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxLength", "maxItems", "default")
    limits = [f"{name} {facts[name]}" for name in names if facts.get(name) is not None]
    return " · ".join(filter(None, [str(facts.get("description", "")), *limits]))
