"""Dataclass fields that users set: help text and allowed values as metadata, and conversion from text and JSON."""

import ast
import dataclasses
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from lavie_jax.errors import UserError, suggest, user_location

LARGEST = sys.float_info.max  # a larger whole number has no float
MAX_SEED = 2**32 - 1  # a seed is a 32-bit word that keys the noise of a sample or of a run
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class Rule(NamedTuple):
    """Metadata of a field.

    Attributes:
        help: help text for the command line.
        low: the smallest value allowed.
        high: the largest value allowed.
        below: an exclusive upper bound.
        or_zero: whether 0 is allowed in addition to the range.
        choices: all values allowed.
        hidden: set by the program, not by a user.
        path: whether it is a path or `KIND:PATH`, or a list of those, in which `~` is expanded.
        metavar: placeholder of the value on a command line.
        flag: name of the flag on a command line; "" derives it from the field's name, None offers no flag.
    """

    help: str = ""
    low: float | None = None
    high: float | None = None
    below: float | None = None
    or_zero: bool = False
    choices: tuple[str, ...] = ()
    hidden: bool = False
    path: bool = False
    metavar: str | None = None
    flag: str | None = ""


def field(help: str, *, default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """Returns a dataclass field with a `Rule`; without a default it is required."""
    return dataclasses.field(default=default, metadata={"rule": Rule(help, **rule)})


def rule_of(declared: dataclasses.Field) -> Rule:
    """Returns the rule of a field, or an empty rule if it has none."""
    return declared.metadata.get("rule", Rule())


@functools.cache
def settable(cls: type) -> dict[str, dataclasses.Field]:
    """Returns the fields of a dataclass that a user may set, by name."""
    hidden = {f.name for f in dataclasses.fields(cls) if rule_of(f).hidden}
    return {f.name: f for f in dataclasses.fields(cls) if f.name not in hidden}


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """Returns the annotated types of a dataclass, by field."""
    return typing.get_type_hints(cls)


def check_rules(cls: type, values: Mapping[str, Any], label: str = "config field '{}'") -> None:
    """Raises UserError for the first of `values`, {field of the dataclass `cls`: value}, that breaks its rule.

    None is not checked. `label` is a format string for the field's name in errors.
    """
    for declared in dataclasses.fields(cls):
        value, rule = values.get(declared.name), rule_of(declared)
        if value is None:
            continue
        name = label.format(declared.name)
        if rule.choices and value not in rule.choices:
            raise UserError(f"{name}: unknown value {value!r}{suggest(str(value), rule.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be finite, not {value}.")
        if rule.or_zero and value == 0:
            continue
        low = rule.low is None or value >= rule.low
        high = (rule.high is None or value <= rule.high) and (rule.below is None or value < rule.below)
        if not (low and high):
            raise UserError(f"{name} must be {_range(rule)}, not {value}.")


def _range(rule: Rule) -> str:
    if rule.high is not None:
        return f"from {rule.low} to {rule.high}"
    upper = "" if rule.below is None else f" and below {rule.below}"
    return f"at least {rule.low}{upper}{', or 0' if rule.or_zero else ''}"


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither a bool nor beyond what a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def short(number: float) -> str:
    """Returns the shortest text that reads back as the same number: "1" for 1.0."""
    return repr(float(number)).removesuffix(".0")


def describe(kind: Any) -> str:
    """Describes a type in words: "a whole number or None", "a list of text"."""
    inner, optional = without_none(kind)
    if optional:
        return f"{describe(inner)} or None"
    if typing.get_origin(inner) is not tuple:
        return NAMES[inner]
    parts = typing.get_args(inner)
    if parts[-1] is ...:
        return f"a list of {describe(parts[0]).removeprefix('a ')}" + ("s" if parts[0] in (int, float) else "")
    return f"({', '.join(map(describe, parts))})"


def convert(where: str, value: Any, kind: Any) -> Any:
    """Returns `value` as the type `kind`: int, float, str, bool, tuples of those, or one of them or None.

    Lists become tuples, and whole floats become ints where ints are needed.

    Raises:
        UserError: `value` is of another type; the message starts with `where`.
    """
    inner, optional = without_none(kind)
    if value is None and optional:
        return None
    wrong = UserError(f"{where} takes {describe(kind)}, not {value!r}.")
    if typing.get_origin(inner) is tuple:
        parts = typing.get_args(inner)
        if not isinstance(value, list | tuple):
            raise wrong
        if parts[-1] is ...:
            parts = (parts[0],) * len(value)
        if len(parts) != len(value):
            raise wrong
        try:
            return tuple(convert(where, x, part) for x, part in zip(value, parts))
        except UserError:
            raise wrong from None
    if inner is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, (int, float) if inner is float else inner) or isinstance(value, bool) != (inner is bool):
        raise wrong
    if isinstance(value, int) and abs(value) > LARGEST:
        raise wrong
    return inner(value)


def expanded(declared: dataclasses.Field, value: Any) -> Any:
    """Returns the value of a field with `~` expanded, if it is a path or a list of paths."""
    if not rule_of(declared).path or not value:
        return value
    return user_location(value) if isinstance(value, str) else tuple(map(user_location, value))


def parse_text(where: str, text: str, kind: Any) -> Any:
    """Parses `text` from a command line to a value of type `kind`.

    "None" and "" become None where that is allowed; for a list, "" is the empty list. Lists are written as in Python
    or JSON; lists of numbers also as `1,2`. For a list of texts, any other text is its only entry, commas included.

    Raises:
        UserError: the text is not a value of this type; the message starts with `where`.
    """
    inner, optional = without_none(kind)
    if optional and text in ("", "None"):
        return None
    if inner is str:
        return text
    if inner is bool:
        return convert(where, BOOLEANS.get(text.lower(), text), kind)
    value = _literal(text)
    if typing.get_origin(inner) is tuple and not isinstance(value, list | tuple):
        if not text.strip():
            return ()
        if typing.get_args(inner)[0] is not str:
            value = (value,) if isinstance(value, int | float) else text
        elif text.strip()[0] + text.strip()[-1] not in ("()", "[]"):
            value = (value if isinstance(value, str) else text,)
    return convert(where, value, kind)


def _literal(text: str) -> Any:
    """Parses `text` as a Python or JSON value; returns `text` itself if it is neither."""
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def without_none(kind: Any) -> tuple[Any, bool]:
    """Splits an optional type into (the type without None, whether None is allowed)."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return inner, True
    return kind, False
