"""An OpenAPI document as one HTML page that needs nothing else: no script, no other host. PURE.

Law: everything that comes from the document is escaped. It must not know what the document is of.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any, Final

# Nothing may be loaded, and nothing run: the page is text and its own style.
POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STYLE: Final = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid #8884; border-radius: 6px; }
details { border: 1px solid #8884; border-radius: 6px; margin: .4rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
.method { display: inline-block; min-width: 3.5rem; font-weight: 700; }
dt { font-weight: 600; margin-top: .4rem; }
dd { margin-left: 1.2rem; }
"""
_METHODS: Final = ("get", "post", "put", "delete", "patch")


def page(document: dict[str, Any]) -> str:
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    operations = [
        _operation(document, method, path, item)
        for path, item in document["paths"].items()
        for method in _METHODS
        if method in item
    ]
    schemas = [
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        f"<pre>{escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre></details>"
        for name, schema in document["components"]["schemas"].items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{escape(info['summary'])}</p>"
        '<p>The same for machines: <a href="/openapi.json">/openapi.json</a></p>'
        f"<h2>Paths</h2>{''.join(operations)}<h2>Schemas</h2>{''.join(schemas)}</body></html>"
    )


def _operation(document: dict[str, Any], method: str, path: str, item: dict[str, Any]) -> str:
    operation = item[method]
    rows = []
    for parameter in [*item.get("parameters", ()), *operation.get("parameters", ())]:
        found = _resolved(document, parameter)
        rows.append(_row(f"{found['in']} {found['name']}", found.get("description", "")))
    if "requestBody" in operation:
        rows.append(_row("body", "", operation["requestBody"]["content"]))
    for status, response in sorted(operation["responses"].items()):
        found = _resolved(document, response)
        rows.append(_row(status, found["description"], found["content"]))
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><span class="method">{method.upper()}</span> '
        f"<code>{escape(path)}</code> {escape(operation['summary'])}</summary><dl>{''.join(rows)}</dl></details>"
    )


def _row(name: str, text: str, content: dict[str, Any] | None = None) -> str:
    kinds = [f"<code>{escape(kind)}</code> {_link(media['schema'])}" for kind, media in (content or {}).items()]
    said = " · ".join([*([escape(text)] if text else []), *kinds])
    return f"<dt>{escape(name)}</dt><dd>{said}</dd>"


def _link(schema: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    return f'<a href="#{escape(name)}">{escape(name)}</a>' if name else escape(schema.get("description", ""))


def _resolved(document: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    found: Any = item
    if "$ref" in item:
        found = document
        for part in item["$ref"].removeprefix("#/").split("/"):
            found = found[part]
    named: dict[str, Any] = found
    return named
