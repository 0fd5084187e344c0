"""All settings with type, default and meaning, taken from the fields of config.py; and the same as JSON Schema."""

import ast
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_origin

from prefcache.pipeline import config
from prefcache.pipeline.config import Config, Section
from prefcache.pipeline.config_errors import section_at


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    type: str
    default: str | None  # as YAML has it; None: required
    meaning: str
    is_section: bool


def settings(section: type[Section] = Config, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting below a section, sections before their own keys, in the order in which they are documented."""
    meanings = field_meanings(section)
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        # The keys of named entries are those of prepare.data, where they are listed.
        inner = None if get_origin(field.annotation) is dict else section_at(key.split("."))
        default = None if field.is_required() else _as_yaml(field.get_default(call_default_factory=True), inner)
        spec = schema["properties"][name]
        yield Setting(key, _type_of(spec, schema.get("$defs", {})), default, meanings[name], inner is not None)
        if inner is not None:
            yield from settings(inner, f"{key}.")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, with each field's meaning as its description."""
    schema = Config.model_json_schema()
    for name, definition in [("Config", schema), *schema["$defs"].items()]:
        section = getattr(config, name)
        definition["description"] = inspect.getdoc(section) if section.__doc__ and section is not Config else ""
        definition.pop("title", None)
        for field, meaning in field_meanings(section).items():
            spec = definition["properties"][field]
            spec.pop("title", None)
            spec["description"] = meaning
        if not definition["description"]:
            del definition["description"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "prefcache config", **schema}


@functools.cache
def field_meanings(section: type[Section]) -> dict[str, str]:
    """Return the docstring below each field of a section."""
    statements = _classes()[section.__name__].body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(statements)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@functools.cache
def _classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)}


def _as_yaml(default: Any, section: type[Section] | None) -> str:
    if section is not None:
        return "not set" if default is None or isinstance(default, tuple) else ""
    match default:
        case None:
            return "not set"
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g}"
        case tuple():
            return f"[{', '.join(map(str, default))}]"
        case _:
            return str(default)


def _type_of(spec: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Put the type of a JSON Schema into a few words, such as `integer >= 1` or `cosine | linear | constant`."""
    if "$ref" in spec:
        definition = definitions[spec["$ref"].rpartition("/")[2]]
        return "mapping" if definition.get("type") == "object" else _type_of(definition, definitions)
    if "enum" in spec:
        return " | ".join(map(str, spec["enum"]))
    if "const" in spec:
        return str(spec["const"])
    if alternatives := spec.get("anyOf"):
        kinds = [_type_of(each, definitions) for each in alternatives if each.get("type") != "null"]
        return " | ".join(dict.fromkeys(kinds))
    kind = {"string": spec.get("format", "text"), "object": "mapping", "array": "list"}.get(
        str(spec.get("type")), str(spec.get("type", "any"))
    )
    if kind == "list" and isinstance(spec.get("items"), dict) and spec["items"]:
        kind = f"list of {_type_of(spec['items'], definitions)}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {spec[bound]:g}" for bound, sign in bounds.items() if bound in spec]
    return f"{kind} {', '.join(limits)}" if limits else kind
