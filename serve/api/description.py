"""What the API says about itself: `/openapi.json`, and a page for people that fetches nothing from elsewhere."""

from __future__ import annotations

from html import escape
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from starlette.responses import HTMLResponse

from serve.api.embeddings import EmbeddingRequest
from serve.api.schemas import ChatRequest

PATHS: dict[str, tuple[str, str, type[BaseModel] | None]] = {
    "/v1/chat/completions": ("post", "Ask about pictures; whole or streamed.", ChatRequest),
    "/v1/embeddings": ("post", "Vectors of pictures and texts.", EmbeddingRequest),
    "/v1/models": ("get", "The adapters, with what each can do.", None),
    "/v1/models/{model}": ("get", "One of them.", None),
    "/health": ("get", "Status, version and adapters.", None),
    "/metrics": ("get", "Figures for Prometheus.", None),
}
_ALONE = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #8886}"
    "code{font-family:ui-monospace,monospace}"
)


def openapi(*, key_needed: bool) -> dict[str, Any]:
    """The API in OpenAPI 3.1.

    Args:
        key_needed: clients must send a key.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, (method, says, body) in PATHS.items():
        entry: dict[str, Any] = {
            "summary": says,
            "responses": {"200": {"description": "done"}, "4XX": {"$ref": "#/components/responses/Error"}},
        }
        if body is not None:
            schemas |= _schema(body)
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
            entry["requestBody"] = {"required": True, "content": content}
        if "{model}" in path:
            entry["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {method: entry}
    error = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
            }
        },
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "querybridge", "version": version("querybridge")},
        "paths": paths,
        "components": {
            "schemas": schemas | {"Error": error},
            "responses": {
                "Error": {
                    "description": "what is wrong",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
        },
    }
    if key_needed:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def description_page() -> HTMLResponse:
    """The endpoints and the fields of a request, for people."""
    rows = "".join(
        f"<tr><td><code>{method.upper()} {escape(path)}</code></td><td>{escape(says)}</td></tr>"
        for path, (method, says, _) in PATHS.items()
    )
    text = "<h1>querybridge</h1><p>An OpenAI-compatible API (<a href='/openapi.json'>openapi.json</a>).</p>"
    text += f"<table>{rows}</table>"
    for path, (_, _, body) in PATHS.items():
        if body is not None:
            fields = "".join(
                f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(values))}</td></tr>"
                for name, values in body.model_json_schema()["properties"].items()
            )
            text += f"<h2><code>{escape(path)}</code></h2><table>{fields}</table>"
    head = f"<meta charset='utf-8'><title>querybridge API</title><style>{_STYLE}</style>"
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{text}</body></html>"
    return HTMLResponse(page, headers={"Content-Security-Policy": _ALONE})


def _schema(body: type[BaseModel]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    return {body.__name__: schema, **schema.pop("$defs", {})}


def _kind(values: dict[str, Any]) -> str:
    """What a field takes, in a few words."""
    kinds = []
    for one in values.get("anyOf", [values]):
        bounds = [f"{word} {one[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in one]
        name = one.get("type") or one.get("$ref", "").rpartition("/")[2] or "any"
        kinds.append(" ".join([str(name), *bounds]))
    return " or ".join(kind for kind in kinds if kind != "null")
