"""Whether speculation ever changes a text: every drafter against plain decoding, token for token, in every placement.

``python -m bench identity [--prompts 200] [--tokens 256] [--log FILE]``

Each prompt is written once with all weights in memory and without speculation; then with every drafter the model has,
and with drafters that are always right, never right or full of nonsense, in every placement. Prompts take turns at how
they end: at a number of tokens, at an end of text, at a stop string, at the end of the context; the last kind is drawn
at a temperature. ``--log`` keeps what was compared, so that a run that was interrupted goes on where it was. The first
text that differs ends the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.scripted import adversaries, guessing

_OPENINGS = (
    "Once upon a time there was", "One day,", "Tom and Lily saw", "The old man had", "In the forest lived",
    "Mum said to", "It was raining and", "There was a big", "Ben did not like", "On the hill stood",
    "A long time ago", "The little girl found", "Every morning", "Do you know", "Sam wanted to help",
)  # fmt: skip
_GOES_ON = (
    " a cat and a dog. The cat was", " a red ball in the park", " who loved to sing", " the bird and its friends. They",
    " a box. In the box was", " a very small boat", " something strange", " a kind king", ' "Hello," said', " the sea",
    " three apples: one, two,", " his friend. His friend", " an old house", " flowers and trees and flowers and",
)  # fmt: skip
#: Shipped models -> what drafts for them; others draft for themselves.
_DRAFTS = {"story": "story-draft", "story-draft": None, "story-moe": "story-draft"}
#: Budgets that are tried until not all is in memory, as shares of what lies between the floor and everything.
_SHARES = (0.5, 0.35, 0.2, 0.1, 0.0)
_CONTEXT = 400


@dataclass
class Found:
    """What was compared so far."""

    texts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)

    def add(self, entry: dict[str, Any]) -> None:
        group = f"{entry['model']} {entry['placement']} {entry['drafter']}"
        self.texts[group] += 1
        self.tokens[group] += entry["tokens"]
        self.passes[group] += entry["passes"]
        self.ends[entry["end"]] += 1
        self.keys.add(entry["key"])


def prompts(n: int) -> list[str]:
    """The first ``n`` beginnings of stories."""
    return [opening + more for more, opening in product(_GOES_ON, _OPENINGS)][:n]


def asked(number: int, n_tokens: int, plain: str = "") -> dict[str, Any]:
    """How prompt ``number`` ends; a stop string is taken from its ``plain`` text."""
    config: dict[str, Any] = {"temperature": 0, "max_tokens": n_tokens, "ignore_eos": True}
    kind = number % 5
    if kind == 1:
        config["ignore_eos"] = False
    elif kind == 2 and len(plain) > 40:
        at = len(plain) * 2 // 3
        config["stop"] = plain[at : at + 5]
    elif kind == 3:
        config["max_tokens"] = None
    elif kind == 4:
        config |= {"temperature": 0.8, "seed": number, "repetition_penalty": 1.1}
    return config


def engines(model: str, draft: str | None, threads: int | None) -> Iterator[Any]:
    """A model with everything in memory, then with less: streamed, windowed, or with a cache of experts."""
    import edge
    from edge.errors import BudgetError

    load: dict[str, Any] = {"context": _CONTEXT, "exact": True, "pressure": "off", "threads": threads}
    with edge.load(model, draft=draft, **load) as engine:
        yield engine
    # Only now: the first load of a process takes more, for its modules.
    with edge.load(model, **load) as engine:
        full = int(engine.plan.predicted_peak_bytes)
    try:
        edge.load(model, memory=1, **load).close()
    except BudgetError as refusal:
        floor = refusal.floor_bytes
    for share in _SHARES:
        with edge.load(model, memory=int(floor + share * (full - floor)), draft=draft, **load) as engine:
            if engine.plan.placement != "resident":
                yield engine
                return
    # A model smaller than what a process's memory varies by may fit whatever it is given.
    print(f"{model}: compared in memory only: no budget was found at which not all fits", file=sys.stderr)


def _drafters(engine: Any) -> dict[str, Any]:
    """Those the model has: by the controller's choice, and each alone with a fixed depth, whether it pays or not."""
    from edge.speculation import DRAFTERS

    fixed = {name: {"drafters": name, "depth": 5} for name in DRAFTERS if engine.can_draft(name)}
    return {"auto": "auto", **fixed}


def compare(
    engine: Any, texts: list[Any], model: str, found: Found, n_tokens: int
) -> Iterator[dict[str, Any]]:
    """Every prompt with every drafter; yields what was equal.

    Raises:
        RuntimeError: a text differs.
    """
    placement = engine.plan.placement
    for number, (prompt, config, plain) in enumerate(texts):
        whole = [*prompt, *plain.tokens]
        nonsense = adversaries([*whole, *([3] * 8)], engine.vocab_size)
        settings: list[tuple[str, Any, Any]] = [(n, s, nullcontext()) for n, s in _drafters(engine).items()]
        settings += [(f"({name})", "auto", guessing(propose)) for name, propose in nonsense.items()]
        for name, setting, guesses in settings:
            key = f"{model} {placement} {name} {number} {n_tokens}"
            if key in found.keys:
                continue
            with guesses:
                completion = engine.generate(prompt, speculation=setting, **config)
            equal = (completion.tokens, completion.text, completion.finish_reason) == (
                plain.tokens,
                plain.text,
                plain.finish_reason,
            )
            if not equal:
                raise RuntimeError(f"{key}: the text differs from the plain one")
            spent = completion.stats["speculation"]
            yield {
                "key": key,
                "model": model,
                "placement": placement,
                "drafter": name,
                "tokens": len(completion.tokens),
                "passes": spent["passes"] + spent["plain_passes"],
                "end": completion.finish_reason if number % 5 != 2 else "stop string",
            }


def _plain(engine: Any, args: argparse.Namespace) -> list[Any]:
    texts = []
    for number, text in enumerate(prompts(args.prompts)):
        prompt = engine.tokenizer.encode(text, add_special_tokens=True)
        first = engine.generate(prompt, speculation="off", **asked(number, args.tokens))
        config = asked(number, args.tokens, first.text)
        texts.append((prompt, config, engine.generate(prompt, speculation="off", **config)))
    return texts


def run(args: argparse.Namespace) -> Found:
    """Compares all that the log does not hold yet, until the time is up."""
    found, log = Found(), Path(args.log) if args.log else None
    if log is not None and log.exists():
        for line in log.read_text().splitlines():
            found.add(json.loads(line))
    end = time.monotonic() + 60 * args.minutes
    for path in args.model or _DRAFTS:
        model, texts = Path(path).stem, list[Any]()
        for engine in engines(path, args.draft or _DRAFTS.get(path, "self"), args.threads):
            texts = texts or _plain(engine, args)
            with log.open("a") if log is not None else nullcontext() as file:
                for entry in compare(engine, texts, model, found, args.tokens):
                    found.add(entry)
                    if file is not None:
                        print(json.dumps(entry), file=file, flush=True)
                    if time.monotonic() > end:
                        return found
            n, n_tokens = sum(found.texts.values()), sum(found.tokens.values())
            print(
                f"{model} {engine.plan.placement} done: {n} texts, {n_tokens} tokens equal", file=sys.stderr
            )
    return found


def show(document: dict[str, Any]) -> None:
    rows = [
        (r["group"], str(r["texts"]), str(r["tokens"]), report.figure(r["tokens"] / max(1, r["passes"])))
        for r in document["results"]
    ]
    ends = ", ".join(f"{n} ended by {end}" for end, n in sorted(document["ends"].items()))
    columns = ("model, placement, drafter", "texts", "tokens, all equal", "tokens/pass")
    report.print_table(
        "speculation against plain decoding", columns, rows, [ends, report.machine_line(document["machine"])]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench identity", description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="repeatable; default: those that ship")
    parser.add_argument("--draft", help="what drafts for them; default: its draft model, or a copy of itself")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many; the log knows where")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--log", help="JSON lines of what was compared")
    report.add_output(parser)
    args = parser.parse_args(argv)
    found = run(args)
    document = {
        "benchmark": "identity",
        "machine": machine.facts(),
        "prompts": args.prompts,
        "tokens": args.tokens,
        "ends": dict(found.ends),
        "results": [
            {"group": group, "texts": n, "tokens": found.tokens[group], "passes": found.passes[group]}
            for group, n in found.texts.items()
        ],
    }
    report.put_out("identity", document, show, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
