"""What a request cost, in words and as fields, whichever runtime served it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flashload.machine import format_bytes

if TYPE_CHECKING:
    from edge.completion import TokenLogprob
    from edge.tokenizer import Tokenizer


def about(engine: Any) -> dict[str, Any]:
    """What a request's JSON says of the engine."""
    known = {"context": engine.context, "notes": list(engine.notes)}
    if hasattr(engine, "plan"):
        known |= {
            "threads": engine.plan.threads,
            "plan": engine.plan.to_dict(),
            "memory_by_use": engine.stats()["by_tag"],
        }
    return known


def summary(stats: dict[str, Any], reason: str) -> str:
    """One line of what a request cost."""
    peak = f"peak {format_bytes(stats['peak_memory_bytes'])}"
    if "backend" in stats:
        where = f"{peak} | {stats['backend']} {stats['version']}"
    else:
        from flashload.neuron_use import GUESSED

        lossy = ", lossy (--exact is not)" if stats.get("neuron_mode") in GUESSED else ""
        where = (
            f"{peak} of {format_bytes(stats['budget_bytes'])} | flash "
            f"{format_bytes(stats['flash_bytes_per_token'])}/token | {stats['placement']}{lossy}"
        )
    return (
        f"[{stats['generated_tokens']} tokens, {reason} | {stats['decode_tokens_per_second']:.1f} tok/s "
        f"(prompt {stats['prefill_tokens_per_second']:.0f}) | {where} | seed {stats['seed']}]"
    )


def logprob_fields(found: Iterable[TokenLogprob | None]) -> dict[str, Any]:
    """``logprobs`` of a request's JSON; nothing where none were asked for."""
    rows = [{"token": one.token, "logprob": one.logprob, "top": one.top} for one in found if one]
    return {"logprobs": rows} if rows else {}


def logprob_lines(tokenizer: Tokenizer, found: Iterable[TokenLogprob | None]) -> list[str]:
    """The same for people, a line a token: its log-probability, its text, and the likeliest instead."""

    def shown(token: int) -> str:
        return json.dumps(
            tokenizer.decode([token], skip_special_tokens=False, continues=True), ensure_ascii=False
        )

    return [
        f"{one.logprob:9.4f}  {shown(one.token)}"
        + "".join(f"   {shown(token)} {logprob:.4f}" for token, logprob in one.top)
        for one in found
        if one
    ]


def changes(stats: dict[str, Any]) -> list[str]:
    """What became of the budget meanwhile, in one line; none where nothing did."""
    from edge.live import describe

    found = stats.get("memory_changes")
    if not found:
        return []
    rest = f"; {len(found) - 1} changes before it" if len(found) > 1 else ""
    return [describe(found[-1]) + rest]


def details(stats: dict[str, Any]) -> list[str]:
    """What each phase and each drafter did, a line each."""
    from edge.live import describe

    if "backend" in stats:
        return [
            f"prompt: {stats['prompt_tokens']} tokens, {stats['prefill_seconds']:.3f} s; decode: "
            f"{stats['decode_seconds']:.3f} s; load: {stats['load_seconds']:.2f} s"
        ]
    spent = stats["speculation"]
    lines = [
        f"prompt: {stats['prompt_tokens']} tokens, {stats['reused_tokens']} of them known, "
        f"{stats['prefill_seconds']:.3f} s; decode: {stats['decode_seconds']:.3f} s, "
        f"{spent['tokens_per_pass']:.2f} tokens a pass; load: {stats['load_seconds']:.2f} s",
        f"speculation: {spent['passes']} passes over drafts, {spent['plain_passes']} over one token, "
        f"{spent['saved_seconds']:+.3f} s saved",
    ]
    if stats["experts_guessed"]:
        lines.append(
            f"experts: {stats['experts_guessed']} read before their layer had chosen, "
            f"{stats['experts_guessed_right']} of them rightly"
        )
    lines += [describe(change) for change in stats["memory_changes"]]
    for name, found in spent["drafters"].items():
        lines.append(
            f"{name}: {found['accepted']} of {found['tried']} guesses accepted ({found['acceptance']:.0%}), "
            f"{found['seconds']:.3f} s"
        )
    return lines
