"""Conversations: checked, rendered by the model's template, encoded so that no message can act as markup."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edge.template import KNOWN_ROLES, ChatTemplate
from edge.tokenizer import Tokenizer
from flashload.errors import ArgumentError, TemplateError

Message = Mapping[str, Any]

_NO_TEMPLATE = (
    "this model has no chat template, and none is assumed; give one (--template FILE, or template=...), "
    "or send plain text to be completed"
)


@functools.lru_cache(maxsize=8)
def _parsed(source: str, name: str) -> ChatTemplate:
    return ChatTemplate(source, name)


def choose_template(tokenizer: Tokenizer, template: str | None = None, tools: bool = False) -> ChatTemplate:
    """The template to use: the one given, else the model's (its ``tool_use`` one when there are tools).

    Raises:
        TemplateError: the model has none, or it does not parse.
    """
    if template is not None:
        if not isinstance(template, str):
            raise ArgumentError(f"template: expected text, found {type(template).__name__}")
        return _parsed(template, "given")
    named = tokenizer.config.get("chat_templates")
    named = named if isinstance(named, dict) else {}
    source = named["tool_use"] if tools and "tool_use" in named else tokenizer.config.get("chat_template")
    if isinstance(source, str) and source:
        return _parsed(source, "chat_template")
    if named:
        raise TemplateError(
            f"this model names chat templates ({', '.join(sorted(named))[:200]}) but no default; give one"
        )
    raise TemplateError(_NO_TEMPLATE)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the form templates expect: known roles, content as text, tool arguments as mappings.

    Lists of text parts become one text (joined by newlines); tool arguments given as JSON text are parsed.

    Raises:
        ArgumentError: says which message and which field, what was expected and what was found.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ArgumentError(f"messages: expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise ArgumentError("messages: expected at least one message, found none")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ArgumentError(
            f"{where}: expected a mapping with role and content, found {type(message).__name__}"
        )
    checked = dict(message)
    role = checked.get("role")
    if not isinstance(role, str) or role not in KNOWN_ROLES:
        found = repr(role)[:40] if "role" in checked else "none"
        raise ArgumentError(f"{where}.role: expected one of {', '.join(sorted(KNOWN_ROLES))}; found {found}")
    calls = checked.get("tool_calls")
    if calls is not None:
        if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
            raise ArgumentError(f"{where}.tool_calls: expected a list, found {type(calls).__name__}")
        checked["tool_calls"] = [
            _check_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    checked["content"] = _check_content(checked.get("content"), bool(calls), f"{where}.content")
    return checked


def _check_content(content: Any, may_be_none: bool, where: str) -> str | None:
    if isinstance(content, str):
        return content
    if content is None and may_be_none:
        return None
    if content is None or isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        found = "nothing" if content is None else type(content).__name__
        raise ArgumentError(f"{where}: expected text or a list of text parts, found {found}")
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise ArgumentError(
                f'{where}[{i}]: expected {{"type": "text", "text": ...}}, found {str(kind)[:40]!r}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _check_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ArgumentError(f"{where}: expected a mapping, found {type(call).__name__}")
    checked = dict(call)
    inner = checked.get("function", checked)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ArgumentError(f"{where}: expected a function with a name")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
    if "arguments" in inner:
        inner = {**inner, "arguments": arguments}
    return {**checked, "function": inner} if "function" in checked else dict(inner)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The spellings templates ask for by name; one the model lacks stays undefined."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
        "unk_token": tokenizer.unk_id,
        "pad_token": tokenizer.pad_id,
    }
    spelled = {name: tokenizer.id_to_token(i) for name, i in ids.items() if i is not None}
    return {name: token for name, token in spelled.items() if token is not None}


def prompt_segments(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[tuple[str, bool]]:
    """The prompt as ``(text, trusted)`` runs; joined, it is what ``apply_chat_template`` would give.

    Args:
        template: Jinja text to use instead of the model's own.
        tools: JSON descriptions of the functions the model may call.
        documents: passages for templates that take them.
        add_generation_prompt: end with the markup that opens the assistant's turn.
        variables: further variables of the template, such as ``enable_thinking=False``.

    Raises:
        ArgumentError: a malformed message. TemplateError: no template, or it fails or exceeds its limits.
    """
    chosen = choose_template(tokenizer, template, bool(tools))
    return chosen.render(
        check_messages(messages),
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        special_tokens=_special_tokens(tokenizer),
        **variables,
    )


def prompt_tokens(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
    """Token ids of the prompt of a conversation; no message text ever becomes a special token.

    The template writes BOS itself where the model wants it, so none is added. Options and errors as in
    :func:`prompt_segments`.
    """
    return tokenizer.encode_segments(prompt_segments(tokenizer, messages, **options))
