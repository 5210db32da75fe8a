"""The values a template computes with, and the operations that need care: text, repr, JSON, formatting.

Only these types occur: None, bool, int, float, str (plain or Mixed), list, tuple, dict and its views, range,
and the classes below. Nothing else can be reached from a template, so there is nothing to escape into.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Undefined

from edge import template_text as tt
from edge.template_limits import Meter
from edge.template_text import Mixed

ITEM_CHARS = 64  # a small string in a list costs about this many bytes
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class Namespace:
    """``namespace()``: the one value whose attributes a template may set."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class Function:
    """A built-in function or a method bound to its value."""

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
        self.call = call


class Lazy:
    """What ``map``, ``select`` and their like return: true as a condition, iterated once, no length."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self._items


_ITERABLES: Any = (list, tuple, dict, range, Lazy, Undefined, *_VIEWS)
_FLAT: Any = (list, tuple, *_VIEWS)


def iterate(value: Any) -> Iterator[Any]:
    """Iterate as Python does, but characters keep their origin. Raises TypeError for what has no items."""
    if isinstance(value, str):
        return tt.chars(value)
    if isinstance(value, _ITERABLES):
        items: Iterable[Any] = value
        return iter(items)
    raise TypeError(f"{type_name(value)} is not iterable")


def items_of(value: Any, meter: Meter) -> list[Any]:
    """The items of ``value`` as a list, paid for one by one."""
    items: list[Any] = []
    for item in iterate(value):
        if not len(items) & 255:
            meter.items(256)
        meter.step()
        items.append(item)
    return items


def type_name(value: Any) -> str:
    """The type as an error message names it."""
    return "str" if isinstance(value, str) else type(value).__name__.lower()


def is_tainted(value: Any, meter: Meter) -> bool:
    """Whether any string inside ``value`` is untrusted; also bounds how deep and wide ``value`` is."""
    tainted = False
    stack = [value]
    while stack:
        meter.step()
        item = stack.pop()
        if isinstance(item, str):
            tainted = tainted or isinstance(item, Mixed)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, _FLAT):
            stack.extend(item)
        elif isinstance(item, Namespace):
            stack.extend(item.values.values())
    return tainted


def plain(value: Any, meter: Meter) -> str:
    """``repr(value)`` at bounded cost (lists that share items can be far larger than their memory)."""
    meter.step()
    if isinstance(value, str):
        meter.text(len(value))
        return repr(str.__str__(value))
    if isinstance(value, dict):
        pairs = [f"{plain(k, meter)}: {plain(v, meter)}" for k, v in value.items()]
        meter.text(sum(map(len, pairs)))
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, _FLAT):
        texts = [plain(item, meter) for item in value]
        meter.text(sum(map(len, texts)))
        inner = ", ".join(texts)
        if isinstance(value, list):
            return f"[{inner}]"
        if isinstance(value, tuple):
            return f"({inner},)" if len(texts) == 1 else f"({inner})"
        return f"{type(value).__name__}([{inner}])"
    if value is None or isinstance(value, (bool, int, float, range, Undefined)):
        return repr(value)
    return f"<{type_name(value)}>"


def to_text(value: Any, meter: Meter) -> str:
    """``str(value)``: a string as it is, any structure that holds untrusted text untrusted throughout."""
    if isinstance(value, str):
        return value
    if isinstance(value, Undefined):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    return tt.taint_if(is_tainted(value, meter), plain(value, meter))


def comparable(value: Any, meter: Meter) -> Any:
    """``value``, once comparing it is known to be affordable."""
    if isinstance(value, str):
        meter.step(len(value) >> 10)
    elif not (value is None or isinstance(value, (bool, int, float))):
        is_tainted(value, meter)
    return value


def equal(value: Any, other: Any, meter: Meter) -> bool:
    """``value == other``; costs at most the size of ``value``."""
    return bool(comparable(value, meter) == other)


def key(value: Any) -> Any:
    """``value`` as a mapping key: text, number, bool or None (hashing nested tuples can take for ever)."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a mapping cannot have a {type_name(value)} as key")


def to_json(
    meter: Meter,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """``tojson`` as transformers defines it: no HTML escapes, non-ASCII kept."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise meter.stop("tojson indents by 0 to 16 spaces")
    if separators is not None:
        separators = tuple(separators)
        if len(separators) != 2 or not all(isinstance(s, str) and len(s) <= 4 for s in separators):
            raise meter.stop("tojson takes two separators of at most 4 characters")
    tainted = is_tainted(value, meter)
    meter.text(_json_size(value, meter, 0, (indent or 0) + 1))
    text = json.dumps(
        value,
        ensure_ascii=bool(ensure_ascii),
        indent=indent,
        separators=separators,
        sort_keys=bool(sort_keys),
    )
    return tt.taint_if(tainted, text)


def _json_size(value: Any, meter: Meter, depth: int, indent: int) -> int:
    """About how long the JSON text will be."""
    meter.step()
    size = 8 + depth * indent
    if isinstance(value, str):
        return size + len(value)
    if isinstance(value, dict):
        return size + sum(
            _json_size(k, meter, depth, indent) + _json_size(v, meter, depth + 1, indent)
            for k, v in value.items()
        )
    if isinstance(value, (list, tuple)):
        return size + sum(_json_size(item, meter, depth + 1, indent) for item in value)
    return size


_PERCENT = re.compile(r"%([-+ 0#]*)(\d{0,3})((?:\.\d{1,2})?)([a-zA-Z%])")


def percent(meter: Meter, template: str, values: Any) -> str:
    """``template % values`` for ``%s %d %i %x %X %f %e %g %r %%``; widths to 999, precisions to 99."""
    arguments = list(values) if isinstance(values, tuple) else [values]
    parts: list[str] = []
    at = used = 0
    while (where := template.find("%", at)) >= 0:
        parts.append(tt.cut(template, slice(at, where)))
        match = _PERCENT.match(template, where)
        if match is None:
            raise ValueError("unsupported format in %")
        flags, width, precision, kind = match.groups()
        at = match.end()
        if kind == "%":
            parts.append("%")
            continue
        if kind not in "sdixXfeEgGr":
            raise ValueError(f"unsupported format %{kind}")
        if used == len(arguments):
            raise TypeError("not enough arguments for format string")
        value = arguments[used]
        used += 1
        if kind == "s" and not (flags or width or precision):
            parts.append(to_text(value, meter))
            continue
        if not isinstance(value, (int, float)):
            value = tt.taint_if(
                is_tainted(value, meter), plain(value, meter) if kind == "r" else to_text(value, meter)
            )
            kind = "s" if kind == "r" else kind
        text = f"%{flags}{width}{precision}{kind}" % value
        parts.append(tt.taint_if(isinstance(value, Mixed), text))
    if used < len(arguments) and isinstance(values, tuple):
        raise TypeError("not all arguments converted during string formatting")
    parts.append(tt.cut(template, slice(at, None)))
    meter.text(sum(map(len, parts)))
    return tt.join(parts)


_SPEC = re.compile(r"(?:.?[<>=^])?[-+ ]?#?0?\d{0,3}[,_]?(?:\.\d{1,2})?[a-zA-Z%]?\Z", re.DOTALL)


def brace_format(meter: Meter, template: str, positional: Sequence[Any], named: Mapping[str, Any]) -> str:
    """``template.format(...)`` with plain fields: ``{}``, ``{0}``, ``{name}``, short specs, no lookups."""
    parts: list[str] = []
    automatic = 0
    for literal, field, spec, conversion in string.Formatter().parse(str.__str__(template)):
        parts.append(tt.taint_if(isinstance(template, Mixed), literal))
        if field is None:
            continue
        if field == "" or field.isdecimal():
            index = automatic if field == "" else int(field[:4])
            automatic += field == ""
            value = positional[index]
        else:
            value = named[field]
        if conversion == "r":
            value = tt.taint_if(is_tainted(value, meter), plain(value, meter))
        elif conversion is not None or isinstance(value, (str, Undefined)) or not spec:
            value = to_text(value, meter)
        if spec:
            if not _SPEC.match(spec):
                raise ValueError(f"unsupported format spec {spec[:20]!r}")
            value = tt.taint_if(isinstance(value, Mixed), format(value, spec))
        parts.append(value)
    meter.text(sum(map(len, parts)))
    return tt.join(parts)
