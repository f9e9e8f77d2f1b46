"""A resolved recipe as rows: each setting with its value and with what it would be if nobody had said anything. Pure.

Works on plain values, so that a recipe of another version of this program, with fields that are gone or new, is shown
as far as it is understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

from engine.recipe import Recipe

NO_DEFAULT = "required"
UNKNOWN = "not known to this version"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """``learner.lr``"""
    value: str
    default: str
    """As ``value``; ``NO_DEFAULT`` or ``UNKNOWN`` when there is none."""

    @property
    def is_default(self) -> bool:
        return self.value == self.default


def settings(recipe: Mapping[str, Any]) -> list[Setting]:
    """Every leaf of ``recipe.json``, in its order."""
    return list(_section(recipe, inspect.type_info(Recipe), msgspec.UNSET, ""))


def _section(section: Mapping[str, Any], kind: inspect.Type, parent: object, prefix: str) -> Iterator[Setting]:
    struct = _struct_for(kind, section)
    fields = {field.encode_name: field for field in struct.fields} if struct is not None else {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        if struct is not None and name == struct.tag_field:
            yield Setting(path=path, value=_text(value), default=NO_DEFAULT)
            continue
        field = fields.get(name)
        default = _default(field, name, parent)
        if isinstance(value, Mapping) and field is not None and _struct_for(field.type, value) is not None:
            yield from _section(value, field.type, default, f"{path}.")
        elif field is None:
            yield Setting(path=path, value=_text(value), default=UNKNOWN)
        else:
            yield Setting(
                path=path, value=_text(value), default=NO_DEFAULT if default is msgspec.UNSET else _text(default)
            )


def _struct_for(kind: inspect.Type, value: Mapping[str, Any]) -> inspect.StructType | None:
    """The struct that ``value`` is one of; of several, the one whose tag it carries."""
    if isinstance(kind, inspect.UnionType):
        found = [struct for option in kind.types if (struct := _struct_for(option, value)) is not None]
        return found[0] if found else None
    if not isinstance(kind, inspect.StructType):
        return None
    if kind.tag_field is not None and value.get(kind.tag_field) != kind.tag:
        return None
    return kind


def _default(field: inspect.Field | None, name: str, parent: object) -> object:
    """What the section that is there by default has, else what the field has; UNSET when neither is."""
    if isinstance(parent, msgspec.Struct):
        return getattr(parent, name, msgspec.UNSET)
    if field is None:
        return msgspec.UNSET
    if field.default is not msgspec.NODEFAULT:
        return field.default
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return msgspec.UNSET


def _text(value: object) -> str:
    """As JSON, text without its quotes where nothing is lost by that."""
    if isinstance(value, str) and value and value == value.strip() and value.isprintable():
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"
    return msgspec.json.encode(value).decode()
