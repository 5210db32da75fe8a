"""Times edge on one model, in a process of its own. Protocol: see ``protocol``."""

from __future__ import annotations

import json
import math
import random
import time
from typing import Any

import numpy as np

from bench.children.protocol import Spent, emit, read_bytes, run

#: How often a slow run says how far it came.
_TOLD_SECONDS = 1.0


def perplexity(engine: Any, path: str) -> float:
    """Of as much of a text as the context holds; a token's chances are those after all tokens before it.

    Lean, what is read depends on how many rows a pass has: so tokens come one at a time there, as in decoding.
    """
    with open(path, encoding="utf-8") as file:
        ids = engine.tokenizer.encode(file.read(1 << 16))[: engine.plan.context]
    if engine.plan.neuron_mode == "lean":
        scores = []
        for i in range(1, len(ids)):
            logits = engine.logits(ids[:i])
            top = float(logits.max())
            scores.append(float(logits[ids[i]] - top - np.log(np.exp(logits - top).sum())))
    else:
        scores = [score for score in engine.score(ids) if score is not None]
    return math.exp(-sum(scores) / len(scores))


def main(request: dict[str, Any]) -> None:
    # model, threads, context, prompt_tokens, tokens, seed, limit_bytes (0 = none), predictor (as edge.load takes it)
    import edge

    options: dict[str, Any] = {"threads": request["threads"], "context": request["context"]}
    if "predictor" in request:
        options["predictor"] = request["predictor"]
    if request["limit_bytes"]:
        options |= {"memory": request["limit_bytes"], "whole_process": True}
    opened = start = time.perf_counter()
    engine = edge.load(request["model"], **options)
    emit(
        event="loaded",
        seconds=time.perf_counter() - start,
        version=getattr(edge, "__version__", "unknown"),
        read_bytes=read_bytes(),
        placement=engine.plan.placement,
        neuron_mode=engine.plan.neuron_mode,
    )
    numbers = random.Random(request["seed"])
    # Ids every vocabulary here has; the first three are control tokens in many of them.
    prompt = [numbers.randrange(3, request["vocab"]) for _ in range(request["prompt_tokens"])]

    def generate(ids: list[int], n: int) -> tuple[list[int], dict[str, Any], Spent | None]:
        """Tokens, figures, and what is spent after the first token."""
        tokens: list[int] = []
        stats: dict[str, Any] = {}
        spent: Spent | None = None
        start = told = time.perf_counter()
        # Random weights go round in circles, which look-ups would make much of.
        settings = {"temperature": 0, "ignore_eos": True, "speculation": "off"}
        for chunk in engine.stream(ids, max_tokens=n, **settings):
            if chunk.token is not None:
                tokens.append(chunk.token)
            now = time.perf_counter()
            if tokens and spent is None:
                spent, start = Spent(), now
            elif len(tokens) > 1 and now > told + _TOLD_SECONDS:
                told = now
                emit(event="token", n=len(tokens) - 1, seconds=now - start)
            stats = dict(chunk.stats) or stats
        return tokens, stats, spent

    # The warm-up prompt differs in its first token, so that no prefix of it can be reused by the timed one.
    generate([3 if prompt[0] != 3 else 4, *prompt[1:]], 1)
    first_token_seconds = time.perf_counter() - opened
    emit(event="warm")
    start = time.perf_counter()
    tokens, stats, spent = generate(prompt, request["tokens"] + 1)
    seconds = time.perf_counter() - start
    assert spent is not None
    prefill_rate = float(stats["prefill_tokens_per_second"])
    # The second rate is from the outside: whole call less the prefill. The two must agree.
    outside = request["tokens"] / (seconds - len(prompt) / prefill_rate)
    emit(
        event="result",
        decode_tokens_per_second=float(stats["decode_tokens_per_second"]),
        decode_tokens_per_second_outside=outside,
        prefill_tokens_per_second=prefill_rate,
        first_token_seconds=first_token_seconds,
        tokens=tokens,
        info=json.dumps(stats, default=str),
        **spent.per_token(request["tokens"]),
        perplexity=perplexity(engine, request["text"]) if request.get("text") else None,
    )


if __name__ == "__main__":
    run(main)
