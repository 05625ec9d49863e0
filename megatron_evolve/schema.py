"""Schemas for people and for programs: every field of a file with its meaning, its range and its default."""

from typing import Any

from pydantic import BaseModel

from megatron_evolve.campaign import Campaign
from megatron_evolve.constitution import Constitution
from megatron_evolve.delta import Delta
from megatron_evolve.policy import SearchPolicy
from megatron_evolve.site import Site
from megatron_evolve.standing import Standing
from megatron_evolve.substrate.frozen import nearest
from megatron_evolve.substrate.settings import Settings

DOCUMENTS: dict[str, type[BaseModel]] = {
    "delta": Delta,
    "policy": SearchPolicy,
    "constitution": Constitution,
    "campaign": Campaign,
    "site": Site,
    "settings": Settings,
    "status": Standing,
}
BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minLength": "length >=",
    "maxLength": "length <=",
    "minItems": "entries >=",
}


def model_of(name: str) -> type[BaseModel]:
    """The record that a file of this kind holds. Raises ValueError with the nearest name."""
    if name not in DOCUMENTS:
        raise ValueError(f"no schema called {name!r}{nearest(name, list(DOCUMENTS))}")
    return DOCUMENTS[name]


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a file. A delta's also carries that of the settings its paths reach."""
    schema = model_of(name).model_json_schema()
    if name == "delta":
        schema["settings"] = Settings.model_json_schema()
    return schema


def describe(name: str) -> str:
    """The schema as lines of text: path, type and range, default, meaning."""
    lines = [f"{name}: {(model_of(name).__doc__ or '').strip().splitlines()[0]}", ""]
    lines += _lines(model_of(name).model_json_schema(), "")
    if name == "delta":
        lines += ["", "paths that `change` may name (the campaign's constitution may allow fewer):", ""]
        lines += _lines(Settings.model_json_schema(), "")
    return "\n".join(lines)


def _lines(schema: dict[str, Any], prefix: str, root: dict[str, Any] | None = None) -> list[str]:
    root = root or schema
    lines: list[str] = []
    for name, field in schema.get("properties", {}).items():
        path = f"{prefix}.{name}" if prefix else name
        inner, place = _inside(field, root)
        if variants := _variants(field, root):
            lines.append(f"{path}  ({_default(field)})  {field.get('description', '')}".rstrip())
            for one in variants:
                tag = one["properties"]["kind"]
                kind = " or ".join(tag.get("enum", [tag.get("const")]))
                lines.append(f"{path}  (kind {kind})  {_first_line(one.get('description', ''))}".rstrip())
                lines += _lines(one, path, root)
        elif inner is not None:
            meaning = field.get("description") or inner.get("description", "")
            bounds = f"{_bounds(field)}  ".lstrip()
            lines.append(f"{path}{place}  {bounds}({_default(field)})  {_first_line(meaning)}".rstrip())
            lines += _lines(inner, f"{path}{place}", root)
        else:
            shown = f"{path}.NAME" if _is_mapping(field) else path
            lines.append(f"{shown}  {_kind(field, root)}  ({_default(field)})  {field.get('description', '')}".rstrip())
    return lines


def _inside(field: dict[str, Any], root: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The record that a field holds, if it does, and where: the field itself, under a name or in a list."""
    for option in [field, *field.get("anyOf", [])]:
        for held, place in ((option, ""), (option.get("additionalProperties"), ".NAME"), (option.get("items"), "[]")):
            record = _record(held, root)
            if record is not None and "properties" in record:
                return record, place
    return None, ""


def _variants(field: dict[str, Any], root: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a union that is told apart by `kind`."""
    for option in [field, *field.get("anyOf", [])]:
        if "discriminator" in option:
            return [root["$defs"][one["$ref"].rsplit("/", 1)[1]] for one in option["oneOf"]]
    return []


def _record(field: Any, root: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(field, dict):
        return None
    for option in [field, *field.get("anyOf", []), *field.get("allOf", [])]:
        if "$ref" in option:
            return root["$defs"][option["$ref"].rsplit("/", 1)[1]]
    return None


def _is_mapping(field: dict[str, Any]) -> bool:
    return field.get("type") == "object" and "additionalProperties" in field


def _kind(field: dict[str, Any], root: dict[str, Any]) -> str:
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_kind(option, root) for option in field["anyOf"]))
    if "$ref" in field:
        return _first_line(_record(field, root).get("title", "any"))
    kind = "none" if field.get("type") == "null" else field.get("type", "any")
    if _is_mapping(field):
        values = field["additionalProperties"]
        kind = _kind(values, root) if isinstance(values, dict) else "any"
    if kind == "array":
        items = field.get("items") or {}
        kind = f"list of {_kind(items, root)}" if items else "list"
    return f"{kind} {_bounds(field)}".strip()


def _bounds(field: dict[str, Any]) -> str:
    return ", ".join(f"{sign} {_number(field[key])}" for key, sign in BOUNDS.items() if key in field)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "required"
    value = field["default"]
    return "default none" if value is None else f"default {value}" if not isinstance(value, dict) else "has defaults"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
