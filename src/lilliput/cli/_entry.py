"""What can be said of a method, an architecture or a task: its docstrings, settings and papers."""

from __future__ import annotations

import importlib
import inspect
import re
from textwrap import fill, indent
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..core.registry import Entry
from .list_ import as_dict

_SETTING = re.compile(r"^    (\w+): ((?:.+\n?)(?:^     +.+\n?)*)", re.MULTILINE)


def describe(entry: Entry) -> dict[str, Any]:
    """Everything about an entry of the catalogue, JSON-ready."""
    thing = entry.load()
    doc = inspect.getdoc(thing) or ""
    settings = _fields(thing, doc) if entry.kind == "method" else _parameters(thing, doc)
    about = inspect.getdoc(importlib.import_module(entry.module)) or ""
    source = f"{entry.module}:{entry.attribute}"
    return {**as_dict(entry), "source": source, "about": about, "doc": doc, "settings": settings}


def render(content: dict[str, Any]) -> str:
    """The description as text."""
    called = "Settings" if content["kind"] == "method" else "Arguments"
    settings = "\n".join(map(_setting, content["settings"])) or "none"
    return (
        f"{content['name']} ({content['kind']}, {content['source']})\n{content['summary']}\n\n"
        f"{content['about']}\n\n{called}\n{indent(settings, '  ')}\n\n{_example(content['doc'])}"
    ).rstrip()


def _setting(setting: dict[str, Any]) -> str:
    default = "required" if setting["required"] else f"by default {_as_yaml(setting['default'])}"
    head = f"{setting['name']}: {setting['type']}; {default}"
    return f"{head}\n{indent(fill(setting['description'], 90), '    ')}"


def _fields(cls: type[BaseModel], doc: str) -> list[dict[str, Any]]:
    meanings = explained(doc)
    schemas = cls.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "type": type_in_words(schemas[name]),
            "required": field.is_required(),
            "default": None if field.is_required() else _plain(field),
            "description": meanings.get(name, ""),
        }
        for name, field in cls.model_fields.items()
    ]


def _plain(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _parameters(function: Any, doc: str) -> list[dict[str, Any]]:
    meanings = explained(doc)
    return [
        {
            "name": name,
            "type": str(parameter.annotation),
            "required": parameter.default is parameter.empty,
            "default": None if parameter.default is parameter.empty else parameter.default,
            "description": meanings.get(name, ""),
        }
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def explained(doc: str) -> dict[str, str]:
    r"""The entries of a docstring's ``Attributes`` or ``Args`` section.

    Example:
        >>> explained("A line.\n\nArgs:\n    bits: of one\n        code.\n    init: how.\n")
        {'bits': 'of one code.', 'init': 'how.'}
    """
    section = re.search(r"^(?:Attributes|Args):\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    found = _SETTING.finditer(section[1]) if section else ()
    return {match[1]: " ".join(match[2].split()) for match in found}


def type_in_words(schema: dict[str, Any]) -> str:
    """A JSON schema as a reader of recipes says it.

    Example:
        >>> type_in_words({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
        'integer >= 1 or null'
    """
    if "anyOf" in schema:
        return " or ".join(type_in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {type_in_words(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"{{pattern: {type_in_words(schema['additionalProperties'])}}}"
    return " ".join([schema.get("type", "any"), *_bounds(schema)])


def _bounds(schema: dict[str, Any]) -> list[str]:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]


def _as_yaml(value: Any) -> str:
    """A default as a recipe would say it."""
    if isinstance(value, dict):
        inside = (f"{k}: {_as_yaml(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(inside) + "}"
    return {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))


def _example(doc: str) -> str:
    found = re.search(r"^Example:\n.*", doc, re.MULTILINE | re.DOTALL)
    return found[0].replace("Example:", "In Python", 1) if found else ""
