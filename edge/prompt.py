"""What a request continues: text or ids, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from edge.tokenizer import Tokenizer
from flashload.errors import ArgumentError, ContextOverflowError


def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of a prompt, at least one: text as the model wants it, ids as they are.

    Raises:
        ArgumentError: something else, an id out of range, or nothing at all.
    """
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, add_special_tokens=True)
    elif isinstance(prompt, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        tokens = [int(t) for t in prompt]
    else:
        raise ArgumentError(f"prompt: expected text or a list of token ids, found {type(prompt).__name__}")
    if not tokens and tokenizer.bos_id is not None:
        tokens = [tokenizer.bos_id]
    if not tokens:
        raise ArgumentError(
            "prompt: expected at least one token, found none (and the model has no BOS token)"
        )
    out_of_range = [t for t in tokens if not 0 <= t < vocab_size]
    if out_of_range:
        raise ArgumentError(f"prompt: expected ids in 0..{vocab_size - 1}, found {out_of_range[0]}")
    return tokens


def has_begun(tokens: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a text goes on: one of special tokens alone has not begun, its first word takes no space before it."""
    return not set(tokens) <= set(tokenizer.special_ids)


def check_context(n_prompt: int, max_tokens: int, context: int) -> None:
    """Raises:
    ContextOverflowError: prompt and answer exceed the context; names the numbers.
    """
    if n_prompt + max_tokens > context:
        asked = f"{n_prompt} prompt tokens" + (f" + {max_tokens} to generate" if max_tokens else "")
        raise ContextOverflowError(
            f"context: {asked} exceed the context of {context} tokens; "
            "raise it (context=, --context) or drop old text (overflow='shift')"
        )
