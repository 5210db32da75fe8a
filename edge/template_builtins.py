"""The filters and tests chat templates may use; semantics are Jinja 3's.

Each takes the meter first and pays before it makes anything large. What is not listed does not exist.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined

from edge import template_text as tt
from edge.template_limits import Meter
from edge.template_text import Mixed
from edge.template_values import (
    ITEM_CHARS,
    Function,
    Lazy,
    Namespace,
    comparable,
    equal,
    items_of,
    iterate,
    key,
    percent,
    to_json,
    to_text,
    type_name,
)

Builtin = Callable[..., Any]


def attribute(value: Any, name: str | int) -> Any:
    """``environment.getitem`` for data: an item, else Undefined."""
    if isinstance(value, Undefined):
        return value[name]
    try:
        if isinstance(value, str):
            return tt.char(value, name) if isinstance(name, int) else Undefined(obj=value, name=name)
        if isinstance(value, dict):
            return value[key(name)]
        if isinstance(value, (list, tuple, range)):
            return value[name]  # type: ignore[index]
    except (TypeError, LookupError):
        pass
    return Undefined(obj=value, name=str(name) if isinstance(name, (str, int)) else type_name(name))


def path_of(value: Any, path: Any) -> Any:
    """``attribute="a.b.0"`` as map, sort and their like take it."""
    for part in str(path).split(".")[:16] if isinstance(path, str) else [path]:
        value = attribute(value, int(part) if isinstance(part, str) and part.isdecimal() else part)
    return value


def _sort_key(meter: Meter, value: Any, case_sensitive: bool) -> Any:
    meter.step(2)
    return value.lower() if isinstance(value, str) and not case_sensitive else comparable(value, meter)


def _length(meter: Meter, value: Any) -> int:
    if isinstance(value, (Lazy, Namespace, Function)):
        raise TypeError("the value has no length")
    return len(value)


def _default(meter: Meter, value: Any, default: Any = "", boolean: bool = False) -> Any:
    return default if isinstance(value, Undefined) or (boolean and not value) else value


def _trim(meter: Meter, value: Any, chars: str | None = None) -> str:
    return tt.strip(_text(meter, value), chars)


def _text(meter: Meter, value: Any) -> str:
    text = to_text(value, meter)
    meter.text(len(text))
    return text


def recase(method: Builtin) -> Builtin:
    def change(meter: Meter, value: Any) -> str:
        text = _text(meter, value)
        return tt.recased(text, method(str.__str__(text)))

    return change


def _title(text: str) -> str:
    return "".join(word[:1].upper() + word[1:].lower() for word in re.split(r"([-\s({\[<]+)", text) if word)


def join(meter: Meter, value: Any, between: Any = "", attribute: Any = None) -> str:
    """``join``, with an optional attribute path."""
    items = items_of(value, meter)
    parts = [to_text(item if attribute is None else path_of(item, attribute), meter) for item in items]
    gap = to_text(between, meter)
    meter.text(sum(map(len, parts)) + len(gap) * len(parts))
    return tt.join(parts, gap)


def replace(meter: Meter, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    """``replace``; the result is paid for before it is built."""
    text, old, new = _text(meter, value), to_text(old, meter), to_text(new, meter)
    times = str.count(text, old) if count is None or count < 0 else min(count, str.count(text, old))
    meter.text(len(text) + times * len(new) + times * ITEM_CHARS)
    return tt.replace(text, old, new, -1 if count is None else count)


def _first(meter: Meter, value: Any) -> Any:
    return next(iterate(value), Undefined(obj=value, name="first"))


def _last(meter: Meter, value: Any) -> Any:
    if isinstance(value, Lazy):
        raise TypeError("the value cannot be reversed")
    if isinstance(value, (str, list, tuple, range)):
        return attribute(value, -1)
    items = items_of(value, meter)
    return items[-1] if items else Undefined(obj=value, name="last")


def _reverse(meter: Meter, value: Any) -> Any:
    if isinstance(value, str):
        meter.text(len(value))
        return tt.cut(value, slice(None, None, -1))
    return Lazy(reversed(items_of(value, meter)))


def _items(meter: Meter, value: Any) -> Any:
    if isinstance(value, Undefined):
        return Lazy(())
    if not isinstance(value, dict):
        raise TypeError("items needs a mapping")
    return Lazy(value.items())


def _dictsort(
    meter: Meter, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> Any:
    if not isinstance(value, dict) or by not in ("key", "value"):
        raise TypeError("dictsort needs a mapping, sorted by key or value")
    at = 0 if by == "key" else 1
    meter.items(len(value))
    return sorted(
        value.items(), key=lambda item: _sort_key(meter, item[at], case_sensitive), reverse=bool(reverse)
    )


def _sort(
    meter: Meter, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> list[Any]:
    paths = attribute.split(",") if isinstance(attribute, str) else [attribute]

    def rank(item: Any) -> Any:
        found = [item if path is None else path_of(item, path) for path in paths]
        return [_sort_key(meter, part, case_sensitive) for part in found]

    return sorted(items_of(value, meter), key=rank, reverse=bool(reverse))


def _unique(meter: Meter, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Lazy:
    seen: set[Any] = set()
    kept: list[Any] = []
    for item in items_of(value, meter):
        rank = _sort_key(meter, item if attribute is None else path_of(item, attribute), case_sensitive)
        if rank not in seen:
            seen.add(rank)
            kept.append(item)
    return Lazy(kept)


def _int(meter: Meter, value: Any, default: int = 0, base: int = 10) -> int:
    meter.step(len(value) if isinstance(value, str) else 1)
    try:
        if isinstance(value, str):
            return int(meter.integer(int(value, base)))
        return int(meter.integer(int(value)))
    except (TypeError, ValueError, OverflowError):
        try:
            return int(meter.integer(int(float(value))))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(meter: Meter, value: Any, default: float = 0.0) -> float:
    meter.step(len(value) if isinstance(value, str) else 1)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _round(meter: Meter, value: float, precision: int = 0, method: str = "common") -> float:
    if method != "common" or not -16 <= precision <= 16:
        raise ValueError("round takes a precision of -16 to 16 and the method common")
    return round(value, precision)


def _sum(meter: Meter, value: Any, attribute: Any = None, start: float = 0) -> Any:
    total = start
    for item in items_of(value, meter):
        number = item if attribute is None else path_of(item, attribute)
        if not isinstance(number, (int, float)) or not isinstance(total, (int, float)):
            raise TypeError("sum needs numbers")
        total = meter.integer(total + number)
    return total


def _extreme(choose: Builtin) -> Builtin:
    def pick(meter: Meter, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        def rank(item: Any) -> Any:
            return _sort_key(meter, item if attribute is None else path_of(item, attribute), case_sensitive)

        items = items_of(value, meter)
        return choose(items, key=rank) if items else Undefined("no aggregated item, sequence was empty")

    return pick


def _indent(meter: Meter, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text = tt.join([_text(meter, value), "\n"])
    gap = width if isinstance(width, str) else " " * min(max(int(width), 0), 64)
    meter.text(len(text) + (len(gap) + ITEM_CHARS) * tt.count_lines(text))
    lines = tt.splitlines(text)
    parts = [lines[0]]
    for line in lines[1:]:
        parts.append("\n" + gap if line or blank else "\n")
        parts.append(line)
    return tt.join([gap, *parts] if first else parts)


def _escape(meter: Meter, value: Any) -> str:
    text = _text(meter, value)
    meter.text(6 * len(text))
    return tt.taint_if(
        isinstance(text, Mixed), html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
    )


def pad(left: bool, right: bool) -> Builtin:
    def pad(meter: Meter, value: Any, width: int = 80, fill: str = " ") -> str:
        text = _text(meter, value)
        meter.text(max(width, 0))
        space = str.center("\0" * len(text), width, fill) if left and right else ""
        before = space.find("\0") if "\0" in space else (max(width - len(text), 0) if left else 0)
        after = max(width - len(text), 0) - before
        return tt.join([fill * before, text, fill * after])

    return pad


FILTERS: dict[str, Builtin] = {
    "abs": lambda meter, value: meter.integer(abs(value)),
    "center": pad(True, True),
    "capitalize": recase(str.capitalize),
    "count": _length,
    "d": _default,
    "default": _default,
    "dictsort": _dictsort,
    "e": _escape,
    "escape": _escape,
    "first": _first,
    "float": _float,
    "format": lambda meter, value, *args: percent(meter, _text(meter, value), args),
    "indent": _indent,
    "int": _int,
    "items": _items,
    "join": join,
    "last": _last,
    "length": _length,
    "list": lambda meter, value: items_of(value, meter),
    "lower": recase(str.lower),
    "max": _extreme(max),
    "min": _extreme(min),
    "replace": replace,
    "reverse": _reverse,
    "round": _round,
    # With autoescape off, marking text as safe changes nothing in what is printed.
    "safe": _text,
    "sort": _sort,
    "string": _text,
    "sum": _sum,
    "title": recase(_title),
    "tojson": to_json,
    "trim": _trim,
    "unique": _unique,
    "upper": recase(str.upper),
    "wordcount": lambda meter, value: len(re.findall(r"\w+", _text(meter, value))),
}

_SEQUENCES = (str, list, tuple, dict, range, Undefined)

TESTS: dict[str, Builtin] = {
    "boolean": lambda meter, value: value is True or value is False,
    "callable": lambda meter, value: isinstance(value, Function) or type(value).__name__ == "Macro",
    "defined": lambda meter, value: not isinstance(value, Undefined),
    "divisibleby": lambda meter, value, number: value % number == 0,
    "eq": lambda meter, value, other: comparable(value, meter) == comparable(other, meter),
    "even": lambda meter, value: value % 2 == 0,
    "false": lambda meter, value: value is False,
    "filter": lambda meter, value: isinstance(value, str) and value in FILTERS,
    "float": lambda meter, value: isinstance(value, float),
    "ge": lambda meter, value, other: comparable(value, meter) >= comparable(other, meter),
    "gt": lambda meter, value, other: comparable(value, meter) > comparable(other, meter),
    "in": lambda meter, value, other: contains(meter, other, value),
    "integer": lambda meter, value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": lambda meter, value: (
        not (
            value is None
            or isinstance(value, (int, float, Function))
            or type(value).__name__ in ("Macro", "Namespace")
        )
    ),
    "le": lambda meter, value, other: comparable(value, meter) <= comparable(other, meter),
    "lower": lambda meter, value: _text(meter, value).islower(),
    "lt": lambda meter, value, other: comparable(value, meter) < comparable(other, meter),
    "mapping": lambda meter, value: isinstance(value, dict),
    "ne": lambda meter, value, other: comparable(value, meter) != comparable(other, meter),
    "none": lambda meter, value: value is None,
    "number": lambda meter, value: isinstance(value, (int, float)),
    "odd": lambda meter, value: value % 2 == 1,
    "sameas": lambda meter, value, other: value is other,
    "sequence": lambda meter, value: isinstance(value, _SEQUENCES),
    "string": lambda meter, value: isinstance(value, str),
    "test": lambda meter, value: isinstance(value, str) and value in TESTS,
    "true": lambda meter, value: value is True,
    "undefined": lambda meter, value: isinstance(value, Undefined),
    "upper": lambda meter, value: _text(meter, value).isupper(),
}
TESTS |= {
    "equalto": TESTS["eq"],
    "==": TESTS["eq"],
    "!=": TESTS["ne"],
    "lessthan": TESTS["lt"],
    "<": TESTS["lt"],
}
TESTS |= {"greaterthan": TESTS["gt"], ">": TESTS["gt"], ">=": TESTS["ge"], "<=": TESTS["le"]}


def contains(meter: Meter, container: Any, item: Any) -> bool:
    """``item in container``."""
    if isinstance(container, str):
        meter.step(len(container) >> 8)
        if not isinstance(item, str):
            raise TypeError("'in <string>' requires string as left operand")
        return str.__contains__(container, item)
    if isinstance(container, dict):
        return key(item) in container
    return any(equal(item, other, meter) for other in iterate(container))
