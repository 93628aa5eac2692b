"""Dataclasses that refuse what they do not know: unknown keys, wrong types, nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' with the member of `valid` nearest to `name`, or ''."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def require(condition: bool, rule: str, got: object) -> None:
    """Raises a ValueError that says `rule` and the value found, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{rule}, got {got!r}")


def _type_name(hint: Any) -> str:
    """Says a type in words: `an integer`, `a list of …`, `null or a number`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"a list, each {_type_name(arguments[0])}"
    if origin is dict:
        return f"a mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return words.get(hint, "null" if hint is types.NoneType else f"a {hint.__name__}")


def _integer_key(key: Any) -> Any:
    """Undoes what JSON does to the keys of a mapping."""
    return int(key) if isinstance(key, str) and key.strip().isdecimal() else key


def _checked(value: Any, hint: Any, key: str) -> Any:
    """Returns `value` as `hint` asks, with mappings turned into the dataclass that hint names.

    Raises:
        TypeError: if the value has another type; the message begins with `key`.
        ValueError: if it has the type but is none of the choices.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = TypeError(f"{key} must be {_type_name(hint)}, got {value!r}")
    if origin is Literal:
        if value in arguments:
            return value
        if isinstance(value, str):
            raise ValueError(f"{wrong}{suggestion(value, map(str, arguments))}")
        raise wrong
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        rest = [argument for argument in arguments if argument is not types.NoneType]
        if len(rest) == 1:
            return _checked(value, rest[0], key)
        raise wrong
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise wrong
        return origin(
            _checked(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value)
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return {
            _checked(
                _integer_key(name) if arguments[0] is int else name, arguments[0], f"a key of {key}"
            ): _checked(item, arguments[1], f"{key}[{name!r}]")
            for name, item in value.items()
        }
    if isinstance(hint, type) and issubclass(hint, Strict):
        return value if isinstance(value, hint) else hint.from_dict(value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:  # bool is an int to Python, not to a reader
        raise wrong
    if not isinstance(value, hint):
        raise wrong
    return value


class Strict:
    """Base of dataclasses whose fields are checked against their annotations when they are made.

    Annotations may be int, float, str, bool, Literal, another Strict class, `X | None`,
    `tuple[X, ...]`, `list[X]` and `dict[X, Y]`. Subclasses check values in `validate`.
    """

    def __post_init__(self) -> None:
        """Checks the type of every field, then `validate`.

        Raises:
            TypeError: naming the first field that has another type than its annotation.
            ValueError: naming the first field that is out of range.
        """
        hints = typing.get_type_hints(type(self))
        for name in self.keys():
            object.__setattr__(self, name, _checked(getattr(self, name), hints[name], name))
        self.validate()

    def validate(self) -> None:
        """Refuses values that have the right type but no meaning."""

    @classmethod
    def keys(cls) -> list[str]:
        """Returns the names of all fields."""
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Any, where: str = "config") -> Self:
        """Makes the object from a mapping.

        Args:
            data: A mapping with some or all fields; nested sections are mappings themselves.
            where: Path that error messages begin with, as ``config.schedule``.

        Raises:
            TypeError: if `data` is no mapping, or a value has the wrong type.
            ValueError: for an unknown key or a value out of range; the message names the path and
                the nearest valid key.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"{where} must be a mapping, got {data!r}")
        for key in data:
            if key not in cls.keys():
                raise ValueError(
                    f"{where}.{key} is not a known key{suggestion(str(key), cls.keys())}; "
                    f"valid keys: {', '.join(cls.keys())}"
                )
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
            if not optional and field.name not in data:
                raise ValueError(f"{where}.{field.name} is missing")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            # The inner object names its field; each level puts its own path before it.
            raise type(error)(f"{where}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists and scalars from which `from_dict` makes an equal object."""

        def plain(value: Any) -> Any:
            if isinstance(value, Strict):
                return value.to_dict()
            if isinstance(value, tuple | list):
                return [plain(item) for item in value]
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value

        return {name: plain(getattr(self, name)) for name in self.keys()}
