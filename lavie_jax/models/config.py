"""Builds the models' frozen dataclasses from JSON, with errors that name the field."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from lavie_jax.errors import UserError, suggest

Config = TypeVar("Config")


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Returns an instance of the dataclass `cls` from its `dataclasses.asdict`, as JSON stores it.

    Lists become tuples; bool, int, float, str, and tuples of those are checked.

    Raises:
        UserError: a name is unknown, a required field is missing, or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{cls.__name__} must be a JSON object, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{cls.__name__} has no field {name!r}{suggest(name, fields)}")
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise UserError(f"{cls.__name__}: missing {', '.join(missing)}")
    types = typing.get_type_hints(cls)
    return cls(**{n: checked(f"{cls.__name__}.{n}", v, types[n]) for n, v in values.items()})


def checked(where: str, value: Any, kind: Any) -> Any:
    """Converts `value` to `kind` (a type, optional, or `tuple[X, ...]`); a UserError names `where` it came from."""
    if args := typing.get_args(kind):
        if typing.get_origin(kind) is tuple:
            if not isinstance(value, list | tuple):
                raise UserError(f"{where} must be a list, not {value!r}")
            return tuple(checked(where, v, args[0]) for v in value)
        if type(None) in args and value is None:
            return None
        kind = next(a for a in args if a is not type(None))
        return checked(where, value, kind)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return kind(value)


def check_positive(where: str, **values: int) -> None:
    """Raises UserError for the first of `values` that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{where}.{name} must be at least 1, not {value}")


def only_supported(where: str, given: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raises UserError when a field of `given` differs from its only supported value. Absent fields are fine."""
    for name, value in supported.items():
        if (actual := given.get(name, value)) != value:
            raise UserError(f"{where}: {name} = {actual!r} is not supported; only {value!r} is")
