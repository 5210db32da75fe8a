"""The methods and functions a chat template may call; semantics are those of Python and transformers."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from edge import template_text as tt
from edge.template_builtins import Builtin, join, pad, recase, replace
from edge.template_limits import Meter
from edge.template_values import ITEM_CHARS, Function, Namespace, brace_format, equal, items_of, key, to_text
from flashload.errors import TemplateError


def _split(right: bool) -> Builtin:
    def split(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        most = len(text) // 2 + 1 if sep is None else str.count(text, sep) + 1
        most = most if maxsplit < 0 else min(most, maxsplit + 1)
        if sep is None and most > 64:
            most = min(most, len(str.split(text, None, maxsplit)))
        meter.text(len(text) + ITEM_CHARS * most)
        return tt.split(text, sep, maxsplit, right)

    return split


def _splitlines(meter: Meter, text: str, keepends: bool = False) -> list[str]:
    meter.text(len(text) + ITEM_CHARS * tt.count_lines(text))
    return tt.splitlines(text, keepends)


def _partition(right: bool) -> Builtin:
    return lambda meter, text, sep: (meter.text(len(text)), tt.partition(text, sep, right))[1]


def _strip(left: bool, right: bool) -> Builtin:
    def strip(meter: Meter, text: str, chars: str | None = None) -> str:
        meter.text(len(text))
        return tt.strip(text, chars, left, right)

    return strip


def _asks(name: str) -> Builtin:
    method: Builtin = getattr(str, name)

    def ask(meter: Meter, text: str, *args: Any) -> Any:
        meter.step(len(text) >> 8)
        return method(text, *args)

    return ask


def _remove(prefix: bool) -> Builtin:
    def remove(meter: Meter, text: str, part: str) -> str:
        meter.text(len(text))
        if prefix:
            return tt.cut(text, slice(len(part), None)) if text.startswith(part) else text
        return tt.cut(text, slice(0, len(text) - len(part))) if part and text.endswith(part) else text

    return remove


STR_METHODS: dict[str, Builtin] = {
    "center": lambda meter, text, width, fill=" ": pad(True, True)(meter, text, width, fill),
    "format": lambda meter, text, *args, **kwargs: brace_format(meter, text, args, kwargs),
    "join": lambda meter, text, value: join(meter, value, text),
    "ljust": lambda meter, text, width, fill=" ": pad(False, True)(meter, text, width, fill),
    "lstrip": _strip(True, False),
    "partition": _partition(False),
    "removeprefix": _remove(True),
    "removesuffix": _remove(False),
    "replace": lambda meter, text, old, new, count=-1: replace(meter, text, old, new, count),
    "rjust": lambda meter, text, width, fill=" ": pad(True, False)(meter, text, width, fill),
    "rpartition": _partition(True),
    "rsplit": _split(True),
    "rstrip": _strip(False, True),
    "split": _split(False),
    "splitlines": _splitlines,
    "strip": _strip(True, True),
}
STR_METHODS |= {
    name: recase(getattr(str, name))
    for name in ["lower", "upper", "title", "capitalize", "swapcase", "casefold"]
}
STR_METHODS |= {
    name: _asks(name)
    for name in [
        "startswith",
        "endswith",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "isdigit",
        "isalpha",
        "isalnum",
        "isspace",
        "isupper",
        "islower",
        "isnumeric",
        "isdecimal",
        "istitle",
        "isidentifier",
    ]
}

DICT_METHODS: dict[str, Builtin] = {
    "copy": lambda meter, value: (meter.items(2 * len(value)), dict(value))[1],
    "get": lambda meter, value, name, default=None: value.get(key(name), default),
    "items": lambda meter, value: value.items(),
    "keys": lambda meter, value: value.keys(),
    "values": lambda meter, value: value.values(),
}

LIST_METHODS: dict[str, Builtin] = {
    "count": lambda meter, value, item: sum(equal(item, other, meter) for other in value),
    "index": lambda meter, value, item: next(i for i, other in enumerate(value) if equal(item, other, meter)),
}


def _raise_exception(meter: Meter, message: Any = "") -> None:
    line = " ".join(str(to_text(message, meter)[:2000]).split())[:500]
    raise TemplateError(f"chat template {meter.name!r} refuses the conversation: {line}")


def _strftime_now(meter: Meter, form: str) -> str:
    if not isinstance(form, str) or len(form) > 64 or re.search(r"%[-_0^#]*\d", form):
        raise ValueError("strftime_now takes a format of at most 64 characters without widths")
    return datetime.now().strftime(form)


def _range(meter: Meter, *args: int) -> range:
    value = range(*args)
    if len(value) > 100_000:
        raise meter.stop(f"a range of {len(value)} items, at most 100000 allowed")
    return value


def _dict(meter: Meter, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for source in args[:1]:
        for item in source.items() if isinstance(source, dict) else items_of(source, meter):
            name, value = item
            made[key(name)] = value
    meter.items(2 * len(made))
    return made | kwargs


def _namespace(meter: Meter, *args: Any, **kwargs: Any) -> Namespace:
    return Namespace(_dict(meter, *args, **kwargs))


GLOBALS: dict[str, Function] = {
    name: Function(name, call)
    for name, call in {
        "dict": _dict,
        "namespace": _namespace,
        "raise_exception": _raise_exception,
        "range": _range,
        "strftime_now": _strftime_now,
    }.items()
}
