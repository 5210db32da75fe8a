"""Chat templates: a conversation becomes text that knows which parts a model's markup may take literally.

A template is data that came with a model, so it gets a bounded evaluator, not Jinja's compiler (see
``template_eval``). Rendered text is what Hugging Face's ``apply_chat_template`` gives; beside it stands, for
each run of characters, whether the template wrote it (trusted) or the conversation did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge import template_text as tt
from edge.template_eval import evaluate
from edge.template_limits import Limits, Meter, limits_for
from flashload.errors import ArgumentError, TemplateError

MAX_TEMPLATE_CHARS = 1 << 18
_MAX_DEPTH = 64  # of JSON values in a conversation

#: Roles a template may build markup from (``'<|' + role + '|>'``); any other role is text like a message's.
KNOWN_ROLES = frozenset({"assistant", "developer", "documents", "function", "ipython", "model"})
KNOWN_ROLES |= {"observation", "system", "tool", "user"}


class _GenerationTag(Extension):
    """``{% generation %}`` marks what training should learn; for prompts it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The parser's settings, those of transformers. Nothing is ever compiled or run by it."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )


class ChatTemplate:
    """A parsed chat template. Immutable, so threads may share it."""

    def __init__(self, source: str, name: str = "chat_template", limits: Limits | None = None) -> None:
        """Parse ``source``.

        Args:
            name: how errors call it.
            limits: what one rendering may cost for an empty conversation; it grows with the conversation.

        Raises:
            TemplateError: it does not parse, or is longer than 256 Ki characters.
        """
        if not isinstance(source, str):
            raise ArgumentError(f"chat template {name!r}: expected text, found {type(source).__name__}")
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"chat template {name!r}: {len(source)} characters, at most {MAX_TEMPLATE_CHARS} allowed"
            )
        self.name = name
        self.source = source
        self.limits = limits or Limits()
        try:
            self._tree = _environment().parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template {name!r}, line {error.lineno}: {error.message}") from None
        except (RecursionError, ValueError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
            raise TemplateError(f"chat template {name!r} does not parse: {reason}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
        **variables: Any,
    ) -> list[tuple[str, bool]]:
        """Render a conversation as ``(text, trusted)`` runs; joined, they are the prompt.

        Every string of ``messages``, ``tools``, ``documents`` and ``variables`` is untrusted wherever the
        template puts it, except a message's role when it is one of :data:`KNOWN_ROLES`.

        Args:
            special_tokens: names to spellings (``bos_token``, ``eos_token``...), trusted.
            variables: further template variables, such as ``enable_thinking=False``.

        Raises:
            ArgumentError: the conversation holds a value that JSON could not.
            TemplateError: the template fails, refuses the conversation, or exceeds its limits.
        """
        size = _Size()
        names: dict[str, Any] = {
            "messages": [_message(message, f"messages[{i}]", size) for i, message in enumerate(messages)],
            "tools": _data(tools, "tools", size),
            "documents": _data(documents, "documents", size),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        names |= {name: _data(value, name, size) for name, value in variables.items()}
        names |= dict(special_tokens or {})
        meter = Meter(self.name, limits_for(self.limits, size.values, size.chars))
        return tt.segments(evaluate(self._tree, meter, names))


def render_text(segments: Sequence[tuple[str, bool]]) -> str:
    """The text of rendered segments, without their trust."""
    return "".join(text for text, _ in segments)


class _Size:
    """How much a conversation holds; the limits of a rendering grow with it."""

    def __init__(self) -> None:
        self.values = 0
        self.chars = 0


def _message(message: Any, where: str, size: _Size) -> dict[Any, Any]:
    if not isinstance(message, Mapping):
        raise ArgumentError(f"{where}: expected a mapping, found {type(message).__name__}")
    converted: dict[Any, Any] = _data(message, where, size)
    role = message.get("role")
    if isinstance(role, str) and role in KNOWN_ROLES:
        converted["role"] = str(role)
    return converted


def _data(value: Any, where: str, size: _Size, depth: int = 0) -> Any:
    """A copy of a JSON-like value with every string untrusted."""
    size.values += 1
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise ArgumentError(f"{where}: an integer beyond 64 bits")
        return int(value)
    if isinstance(value, str):
        size.chars += len(value)
        return tt.untrusted(value)
    if depth == _MAX_DEPTH:
        raise ArgumentError(f"{where}: nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        copy: dict[Any, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArgumentError(f"{where}: keys must be text, found {type(key).__name__}")
            size.chars += len(key)
            copy[tt.untrusted(key)] = _data(item, f"{where}.{key[:40]}", size, depth + 1)
        return copy
    if isinstance(value, (list, tuple)):
        return [_data(item, f"{where}[{i}]", size, depth + 1) for i, item in enumerate(value)]
    raise ArgumentError(f"{where}: expected text, numbers, lists or mappings, found {type(value).__name__}")
