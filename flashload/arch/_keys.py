"""Typed reads of a checkpoint's configuration: every value proven, every error names file, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashload.errors import ModelFileError

_ABSENT = object()


class Keys:
    """A mapping of untrusted values, read by type; ``null`` counts as absent.

    Attributes:
        where: the file, for messages.
        prefix: put before every name (GGUF keys begin with the architecture's name).
    """

    def __init__(self, where: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.where = where
        self.values = values
        self.prefix = prefix

    def get(self, *names: str) -> Any:
        """The first of ``names`` that has a value, or None."""
        for name in names:
            value = self.values.get(self.prefix + name)
            if value is not None:
                return value
        return None

    def bad(self, name: str, expected: str, found: object) -> ModelFileError:
        """The error for a value that is not what it must be."""
        text = repr(found)
        shown = text if len(text) <= 80 else text[:77] + "..."
        return ModelFileError(f"{self.where}: {self.prefix}{name}: expected {expected}, found {shown}")

    def _value(self, names: tuple[str, ...], default: Any, expected: str) -> Any:
        value = self.get(*names)
        if value is None:
            if default is _ABSENT:
                raise self.bad(names[0], expected, None)
            return default
        return value

    def integer(self, *names: str, low: int = 1, high: int = 1 << 40, default: Any = _ABSENT) -> int:
        """An integer in low..high; raises ModelFileError when absent without ``default``."""
        expected = f"an integer in {low}..{high}"
        value = self._value(names, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(names[0], expected, value)
        return value

    def number(self, *names: str, low: float, high: float, default: Any = _ABSENT) -> float:
        """A finite number in low..high; raises ModelFileError when absent without ``default``."""
        expected = f"a number in {low:g}..{high:g}"
        value = self._value(names, default, expected)
        # Compared before it is converted: JSON integers may be beyond any float, and NaN compares false.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise self.bad(names[0], expected, value)
        return float(value)

    def flag(self, *names: str, default: Any = _ABSENT) -> bool:
        """True or false; raises ModelFileError when absent without ``default``."""
        value = self._value(names, default, "true or false")
        if not isinstance(value, bool):
            raise self.bad(names[0], "true or false", value)
        return value

    def text(self, *names: str, default: Any = _ABSENT) -> str:
        """A string; raises ModelFileError when absent without ``default``."""
        value = self._value(names, default, "a string")
        if not isinstance(value, str):
            raise self.bad(names[0], "a string", value)
        return value

    def items(self, name: str, kind: type, length: int | None = None) -> list[Any] | None:
        """A list of ``kind`` (of ``length`` values), or None when absent."""
        value = self.get(name)
        if value is None:
            return None
        right = isinstance(value, list) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in value
        )
        if not right or (length is not None and len(value) != length):
            size = "" if length is None else f"{length} "
            raise self.bad(name, f"a list of {size}{kind.__name__}", value)
        return list(value)

    def numbers(self, name: str) -> list[float]:
        """A list of numbers; raises ModelFileError when absent or anything else."""
        value = self.get(name)
        if not isinstance(value, list) or not all(type(v) in (int, float) and abs(v) < 1e38 for v in value):
            raise self.bad(name, "a list of numbers", value)
        return [float(v) for v in value]

    def section(self, name: str) -> Keys | None:
        """A nested object as Keys, or None when absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, "an object", value)
        return Keys(f"{self.where}: {name}", value)
