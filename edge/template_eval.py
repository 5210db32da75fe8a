"""Evaluates a parsed Jinja template, one syntax-tree node at a time.

Jinja itself turns a template into Python code and runs it. Here only its parser is used: no code is made from
a file that came with a model, every step is counted, and every string keeps its origin.
Scoping follows Jinja 3: loops, macros, ``with`` and ``filter`` blocks open a scope, ``if`` does not.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from jinja2 import Undefined, nodes

from edge import template_builtins as builtins
from edge import template_methods as methods_of
from edge import template_text as tt
from edge.template_limits import Meter
from edge.template_scope import Loop, Macro, Scope
from edge.template_values import (
    Function,
    Lazy,
    Namespace,
    comparable,
    items_of,
    key,
    percent,
    to_text,
    type_name,
)
from flashload.errors import TemplateError


def _gone(value: Any) -> int:
    """Characters of a string that only one variable of the caller still refers to, else 0.

    Templates that build a prompt by ``ns.text = ns.text + more`` drop each text for the next; if all counted,
    a long conversation would look like a padding bomb.
    """
    return len(value) if isinstance(value, str) and sys.getrefcount(value) <= _ONE_VARIABLE else 0


def _references(value: Any) -> int:
    return sys.getrefcount(value)


def _references_of_one_variable() -> int:
    value = "".join(["one", "variable"])
    return _references(value)


_ONE_VARIABLE = _references_of_one_variable()  # it differs between Python versions


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


_BINARY: dict[type[nodes.Node], Callable[[Any, Any], Any]] = {
    nodes.Sub: operator.sub,
    nodes.Div: operator.truediv,
    nodes.FloorDiv: operator.floordiv,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}


def _bound(method: Callable[..., Any], value: Any, meter: Meter, *args: Any, **kwargs: Any) -> Any:
    return method(meter, value, *args, **kwargs)


class Evaluator:
    """One rendering of one template."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.line = 0
        self._out_chars = 0

    # Statements: each appends to ``out``.

    def run(self, body: list[nodes.Node], scope: Scope, out: list[str]) -> None:
        """Execute ``body``; text goes to ``out``."""
        for node in body:
            self.meter.step()
            self.line = node.lineno
            method = self._STATEMENTS.get(type(node))
            if method is None:
                raise TypeError(f"{type(node).__name__.lower()} blocks are not supported")
            method(self, node, scope, out)

    def _block(self, body: list[nodes.Node], scope: Scope) -> str:
        """The text of ``body`` as one string."""
        out: list[str] = []
        self.run(body, scope, out)
        self.meter.text(sum(map(len, out)))
        return tt.join(out)

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for part in node.nodes:
            self.line = part.lineno
            if isinstance(part, nodes.TemplateData):
                text: str = part.data
            else:
                text = to_text(self.value(part, scope), self.meter)
            self._out_chars += len(text)
            if self._out_chars > self.meter.limits.made_chars:
                raise self.meter.stop(f"texts of more than {self.meter.limits.made_chars} characters in all")
            self.meter.step(len(text) >> 10)
            if text:
                out.append(text)

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.value(branch.test, scope):
                return self.run(branch.body, scope, out)
        self.run(node.else_, scope, out)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        if node.recursive:
            raise TypeError("recursive loops are not supported")
        items = items_of(self.value(node.iter, scope), self.meter)
        if node.test is not None:
            kept: list[Any] = []
            for item in items:
                inner = Scope(scope, {})
                self._bind(node.target, item, inner)
                if self.value(node.test, inner):
                    kept.append(item)
            items = kept
        loop = Loop(items)
        for at, item in enumerate(items):
            self.meter.step()
            loop.at = at
            inner = Scope(scope, {"loop": loop})
            self._bind(node.target, item, inner)
            try:
                self.run(node.body, inner, out)
            except _Continue:
                continue
            except _Break:
                break
        if not items:
            self.run(node.else_, Scope(scope, {}), out)

    def _bind(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            self._replace(scope.names, target.name, value)
        elif isinstance(target, nodes.NSRef):
            namespace = scope.find(target.name)
            if not isinstance(namespace, Namespace):
                raise TypeError("cannot assign attribute on non-namespace object")
            self._replace(namespace.values, target.attr, value)
        elif isinstance(target, nodes.Tuple):
            values = items_of(value, self.meter)
            if len(values) != len(target.items):
                raise ValueError(f"expected {len(target.items)} values to unpack, got {len(values)}")
            for part, item in zip(target.items, values, strict=True):
                self._bind(part, item, scope)
        else:
            raise TypeError(f"cannot assign to {type(target).__name__.lower()}")

    def _replace(self, names: dict[str, Any], name: str, value: Any) -> None:
        old = names.pop(name, None)
        names[name] = value
        if old is not value:
            self.meter.freed(_gone(old))

    def _assign(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        self._bind(node.target, self.value(node.node, scope), scope)

    def _assign_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        value: Any = self._block(node.body, Scope(scope, {}))
        if node.filter is not None:
            value = self._filtered(node.filter, value, scope)
        self._bind(node.target, value, scope)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope, {})
        out.append(to_text(self._filtered(node.filter, self._block(node.body, inner), inner), self.meter))

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope, {})
        values = [self.value(value, scope) for value in node.values]
        for target, value in zip(node.targets, values, strict=True):
            self._bind(target, value, inner)
        self.run(node.body, inner, out)

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope.names[node.name] = Macro(node, node.name, scope)

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        caller = Macro(node, "caller", scope)
        out.append(to_text(self._call(node.call, scope, {"caller": caller}), self.meter))

    def _loop_control(self, node: nodes.Node, scope: Scope, out: list[str]) -> None:
        raise _Break if isinstance(node, nodes.Break) else _Continue

    def _scoped(self, node: nodes.Scope, scope: Scope, out: list[str]) -> None:
        self.run(node.body, Scope(scope, {}), out)

    _STATEMENTS: ClassVar[dict[type[nodes.Node], Callable[..., None]]] = {
        nodes.Output: _output,
        nodes.If: _if,
        nodes.For: _for,
        nodes.Assign: _assign,
        nodes.AssignBlock: _assign_block,
        nodes.FilterBlock: _filter_block,
        nodes.With: _with,
        nodes.Macro: _macro,
        nodes.CallBlock: _call_block,
        nodes.Break: _loop_control,
        nodes.Continue: _loop_control,
        nodes.Scope: _scoped,
    }

    # Expressions.

    def value(self, node: nodes.Node, scope: Scope) -> Any:
        """The value of an expression."""
        self.meter.step()
        method = self._EXPRESSIONS.get(type(node))
        if method is None:
            raise TypeError(f"{type(node).__name__.lower()} expressions are not supported")
        return method(self, node, scope)

    def _const(self, node: nodes.Const, scope: Scope) -> Any:
        return self.meter.integer(node.value)

    def _data(self, node: nodes.TemplateData, scope: Scope) -> str:
        return node.data

    def _name(self, node: nodes.Name, scope: Scope) -> Any:
        return scope.find(node.name)

    def _list(self, node: nodes.List | nodes.Tuple, scope: Scope) -> Any:
        self.meter.items(len(node.items))
        values = [self.value(item, scope) for item in node.items]
        return tuple(values) if isinstance(node, nodes.Tuple) else values

    def _dict(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for pair in node.items:
            made[key(self.value(pair.key, scope))] = self.value(pair.value, scope)
        return made

    def _getattr(self, node: nodes.Getattr, scope: Scope) -> Any:
        value, name = self.value(node.node, scope), node.attr
        if isinstance(value, Undefined):
            return value._fail_with_undefined_error()
        return self._field(value, name)

    def _field(self, value: Any, name: str) -> Any:
        """``value.name``: a method first, then an item, as Jinja looks them up."""
        if isinstance(value, Namespace):
            return value.values[name] if name in value.values else Undefined(obj=value, name=name)
        if isinstance(value, Loop):
            return value.field(name)
        method = self._method(value, name)
        return builtins.attribute(value, name) if method is None else method

    def _getitem(self, node: nodes.Getitem, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        if isinstance(node.arg, nodes.Slice):
            return self._slice(value, node.arg, scope)
        name = self.value(node.arg, scope)
        found = builtins.attribute(value, name)
        if isinstance(found, Undefined) and isinstance(name, str):
            return self._field(value, name)
        return found

    def _slice(self, value: Any, node: nodes.Slice, scope: Scope) -> Any:
        bounds = [None if b is None else self.value(b, scope) for b in (node.start, node.stop, node.step)]
        where = slice(*(None if isinstance(b, Undefined) else b for b in bounds))
        if isinstance(value, Undefined):
            return value._fail_with_undefined_error()
        if isinstance(value, str):
            self.meter.text(len(value))
            return tt.cut(value, where)
        if not isinstance(value, (list, tuple, range)):
            return Undefined(obj=value, name="slice")
        self.meter.items(len(value))
        return value[where]

    def _method(self, value: Any, name: str) -> Any:
        """A method of ``value``, or None where Python has none of that name."""
        for kind, methods in (
            (str, methods_of.STR_METHODS),
            (dict, methods_of.DICT_METHODS),
            ((list, tuple), methods_of.LIST_METHODS),
        ):
            if isinstance(value, kind):
                if name in methods:
                    return Function(name, functools.partial(_bound, methods[name], value))
                if hasattr(str if isinstance(value, str) else type(value), name):
                    raise TypeError(f"{type_name(value)}.{name} is not allowed in templates")
        return None

    def _arguments(self, node: Any, scope: Scope) -> tuple[list[Any], dict[str, Any]]:
        positional = [self.value(arg, scope) for arg in node.args]
        named = {pair.key: self.value(pair.value, scope) for pair in node.kwargs}
        if node.dyn_args is not None:
            positional += items_of(self.value(node.dyn_args, scope), self.meter)
        if node.dyn_kwargs is not None:
            named |= self.value(node.dyn_kwargs, scope)
        return positional, named

    def _call(self, node: nodes.Call, scope: Scope, extra: dict[str, Any] | None = None) -> Any:
        target = self.value(node.node, scope)
        positional, named = self._arguments(node, scope)
        named |= extra or {}
        if isinstance(target, Function):
            return target.call(self.meter, *positional, **named)
        if isinstance(target, Macro):
            return self._call_macro(target, positional, named)
        if isinstance(target, Undefined):
            return target._fail_with_undefined_error()
        raise TypeError(f"a {type_name(target)} cannot be called")

    def _call_macro(self, macro: Macro, positional: list[Any], named: dict[str, Any]) -> str:
        if self.meter.depth >= self.meter.limits.depth:
            raise self.meter.stop(f"macro calls more than {self.meter.limits.depth} deep")
        parameters, inner = macro.node.args, Scope(macro.scope, {})
        required = len(parameters) - len(macro.node.defaults)
        for i, parameter in enumerate(parameters):
            if i < len(positional):
                value = positional[i]
            elif parameter.name in named:
                value = named.pop(parameter.name)
            elif i >= required:
                value = self.value(macro.node.defaults[i - required], inner)
            else:
                value = Undefined(f"parameter {parameter.name!r} was not provided", name=parameter.name)
            inner.names[parameter.name] = value
        if "caller" in macro.wants:
            inner.names.setdefault(
                "caller", named.pop("caller", Undefined("No caller defined", name="caller"))
            )
        if "kwargs" in macro.wants:
            inner.names["kwargs"] = named
        elif named:
            raise TypeError(f"macro {macro.name!r} takes no keyword argument {next(iter(named))!r}")
        if "varargs" in macro.wants:
            inner.names["varargs"] = tuple(positional[len(parameters) :])
        elif len(positional) > len(parameters):
            raise TypeError(f"macro {macro.name!r} takes not more than {len(parameters)} argument(s)")
        self.meter.depth += 1
        line = self.line
        try:
            return self._block(macro.node.body, inner)
        finally:
            self.meter.depth -= 1
            self.line = line

    def _filter(self, node: nodes.Filter, scope: Scope) -> Any:
        if node.node is None:
            raise TypeError("a filter without a value")
        return self._filtered(node, self.value(node.node, scope), scope)

    def _filtered(self, node: nodes.Filter, value: Any, scope: Scope) -> Any:
        if isinstance(node.node, nodes.Filter) and node.node.node is None:
            value = self._filtered(node.node, value, scope)
        positional, named = self._arguments(node, scope)
        return self._apply_filter(node.name, value, positional, named)

    def _apply_filter(self, name: str, value: Any, positional: list[Any], named: dict[str, Any]) -> Any:
        self.meter.step()
        if name in ("map", "select", "reject", "selectattr", "rejectattr"):
            return self._apply_to_each(name, value, positional, named)
        function = builtins.FILTERS.get(name)
        if function is None:
            raise TypeError(f"no filter named {name!r}")
        return function(self.meter, value, *positional, **named)

    def _apply_to_each(self, name: str, value: Any, positional: list[Any], named: dict[str, Any]) -> Lazy:
        items = items_of(value, self.meter) if value else []
        if name == "map":
            if not positional:
                path, default = named["attribute"], named.get("default", Undefined())
                found = [builtins.path_of(item, path) for item in items]
                return Lazy(default if isinstance(item, Undefined) else item for item in found)
            return Lazy(
                [self._apply_filter(positional[0], item, positional[1:], dict(named)) for item in items]
            )
        subjects = items
        if name.endswith("attr"):
            path, *positional = positional
            subjects = [builtins.path_of(item, path) for item in items]
        wanted = name.startswith("select")
        kept: list[Any] = []
        for item, subject in zip(items, subjects, strict=True):
            verdict = bool(
                self._apply_test(positional[0], subject, positional[1:], named) if positional else subject
            )
            if verdict == wanted:
                kept.append(item)
        return Lazy(kept)

    def _test(self, node: nodes.Test, scope: Scope) -> bool:
        positional, named = self._arguments(node, scope)
        return bool(self._apply_test(node.name, self.value(node.node, scope), positional, named))

    def _apply_test(self, name: str, value: Any, positional: list[Any], named: dict[str, Any]) -> Any:
        self.meter.step()
        function = builtins.TESTS.get(name)
        if function is None:
            raise TypeError(f"no test named {name!r}")
        return function(self.meter, value, *positional, **named)

    def _compare(self, node: nodes.Compare, scope: Scope) -> Any:
        left = self.value(node.expr, scope)
        result: Any = True
        for operand in node.ops:
            right = self.value(operand.expr, scope)
            if operand.op in ("in", "notin"):
                result = builtins.contains(self.meter, right, left) == (operand.op == "in")
            else:
                result = _COMPARE[operand.op](comparable(left, self.meter), comparable(right, self.meter))
            if not result:
                return result
            left = right
        return result

    def _and(self, node: nodes.And, scope: Scope) -> Any:
        left = self.value(node.left, scope)
        return self.value(node.right, scope) if left else left

    def _or(self, node: nodes.Or, scope: Scope) -> Any:
        left = self.value(node.left, scope)
        return left if left else self.value(node.right, scope)

    def _not(self, node: nodes.Not, scope: Scope) -> bool:
        return not self.value(node.node, scope)

    def _cond(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.value(node.test, scope):
            return self.value(node.expr1, scope)
        if node.expr2 is None:
            return Undefined("the inline if-expression evaluated to false and no else section was defined.")
        return self.value(node.expr2, scope)

    def _concat(self, node: nodes.Concat, scope: Scope) -> str:
        parts = [to_text(self.value(part, scope), self.meter) for part in node.nodes]
        self.meter.text(sum(map(len, parts)))
        return tt.join(parts)

    def _unary(self, node: nodes.Neg | nodes.Pos, scope: Scope) -> Any:
        value = self.value(node.node, scope)
        return self.meter.integer(-value if isinstance(node, nodes.Neg) else +value)

    def _add(self, node: nodes.Add, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(left, str) and isinstance(right, str):
            self.meter.text(len(left) + len(right))
            text = tt.join([left, right])
            self.meter.freed(_gone(left) + _gone(right))
            return text
        if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            self.meter.items(len(left) + len(right))
        return self.meter.integer(left + right)

    def _mul(self, node: nodes.Mul, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(right, (str, list, tuple)):
            left, right = right, left
        if isinstance(left, str) and isinstance(right, int):
            self.meter.text(len(left) * max(right, 0))
            return tt.make(str.__mul__(left, right), tt.mask_of(left) * right)
        if isinstance(left, (list, tuple)) and isinstance(right, int):
            self.meter.items(len(left) * max(right, 0))
        return self.meter.integer(left * right)

    def _mod(self, node: nodes.Mod, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return percent(self.meter, left, right) if isinstance(left, str) else left % right

    def _pow(self, node: nodes.Pow, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        if isinstance(left, int) and isinstance(right, int) and right > 0 and left.bit_length() * right > 128:
            raise self.meter.stop("an integer beyond 64 bits")
        return self.meter.integer(left**right)

    def _arithmetic(self, node: nodes.BinExpr, scope: Scope) -> Any:
        left, right = self.value(node.left, scope), self.value(node.right, scope)
        return self.meter.integer(_BINARY[type(node)](left, right))

    _EXPRESSIONS: ClassVar[dict[type[nodes.Node], Callable[..., Any]]] = {
        nodes.Const: _const,
        nodes.TemplateData: _data,
        nodes.Name: _name,
        nodes.List: _list,
        nodes.Tuple: _list,
        nodes.Dict: _dict,
        nodes.Getattr: _getattr,
        nodes.Getitem: _getitem,
        nodes.Call: _call,
        nodes.Filter: _filter,
        nodes.Test: _test,
        nodes.Compare: _compare,
        nodes.And: _and,
        nodes.Or: _or,
        nodes.Not: _not,
        nodes.CondExpr: _cond,
        nodes.Concat: _concat,
        nodes.Neg: _unary,
        nodes.Pos: _unary,
        nodes.Add: _add,
        nodes.Mul: _mul,
        nodes.Mod: _mod,
        nodes.Pow: _pow,
        nodes.Sub: _arithmetic,
        nodes.Div: _arithmetic,
        nodes.FloorDiv: _arithmetic,
    }


def evaluate(tree: nodes.Template, meter: Meter, names: dict[str, Any]) -> list[str]:
    """Render ``tree``; returns the pieces of its text.

    Raises:
        TemplateError: the template failed or exceeded a limit; the message names the template and the line.
    """
    evaluator = Evaluator(meter)
    out: list[str] = []
    try:
        evaluator.run(tree.body, Scope(None, names), out)
        if sum(map(len, out)) > meter.limits.output_chars:
            raise meter.stop(f"a text of more than {meter.limits.output_chars} characters")
    except TemplateError as error:
        raise TemplateError(f"{error} (line {evaluator.line})") from None
    except RecursionError:
        raise meter.stop(f"nested too deep (line {evaluator.line})") from None
    except (_Break, _Continue):
        raise TemplateError(f"chat template {meter.name!r}: break or continue outside a loop") from None
    except Exception as error:
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise TemplateError(f"chat template {meter.name!r}, line {evaluator.line}: {what}") from error
    return out
