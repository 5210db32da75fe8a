"""Names and what they hold while a template runs: scopes, the loop variable, macros."""

from __future__ import annotations

from typing import Any

from jinja2 import Undefined, nodes

from edge.template_limits import Meter
from edge.template_methods import GLOBALS
from edge.template_values import Function, comparable


class Scope:
    """Names of one block and the scope around it."""

    __slots__ = ("names", "parent")

    def __init__(self, parent: Scope | None, names: dict[str, Any]) -> None:
        self.parent = parent
        self.names = names

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return GLOBALS.get(name) or Undefined(name=name)


class Loop:
    """The ``loop`` variable."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.at = 0
        self.last_seen: Any = None

    def field(self, name: str) -> Any:
        n, at = len(self.items), self.at
        if name == "previtem":
            return self.items[at - 1] if at else Undefined("there is no previous item")
        if name == "nextitem":
            return self.items[at + 1] if at + 1 < n else Undefined("there is no next item")
        if name == "cycle":
            return Function("cycle", lambda meter, *args: args[at % len(args)])
        if name == "changed":
            return Function("changed", self._changed)
        values = {
            "index": at + 1,
            "index0": at,
            "revindex": n - at,
            "revindex0": n - at - 1,
            "first": at == 0,
            "last": at == n - 1,
            "length": n,
            "depth": 1,  # Jinja counts recursive loops only
            "depth0": 0,
        }
        return values[name] if name in values else Undefined(obj=self, name=name)

    def _changed(self, meter: Meter, *value: Any) -> bool:
        comparable(value, meter)
        changed = self.last_seen != value
        self.last_seen = value
        return bool(changed)


class Macro:
    """A macro, with the scope it was defined in."""

    def __init__(self, node: nodes.Macro | nodes.CallBlock, name: str, scope: Scope) -> None:
        self.node = node
        self.name = name
        self.scope = scope
        self.wants = {n.name for n in node.find_all(nodes.Name)} & {"caller", "varargs", "kwargs"}
