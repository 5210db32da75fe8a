"""Counts and clocks of requests: what :attr:`edge.Completion.stats` says."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edge import speculation
from flashload.machine import peak_rss_bytes

if TYPE_CHECKING:
    from edge.engine import Engine


class Meter:
    """Of one request; made when it begins."""

    def __init__(self, engine: Engine, seed: int, speculators: speculation.Speculators | None) -> None:
        self._engine = engine
        self._seed = seed
        self._speculators = speculators
        self._speculated = None if speculators is None else speculators.stats()
        self._n_changes = len(engine.memory_changes)
        self._start = time.perf_counter()
        self._prefill_end: float | None = None
        self._before = engine.stats()
        self._decode_before = self._before
        self._n_prompt = 0
        self.reused = 0

    def prefilled(self, n_prompt: int) -> None:
        self._n_prompt = n_prompt
        self._prefill_end = time.perf_counter()
        self._decode_before = self._engine.stats()

    def stats(self, generated: int) -> dict[str, Any]:
        """After ``generated`` drawn tokens."""
        now = time.perf_counter()
        after = self._engine.stats()
        prefill_end = self._prefill_end or now
        prefill_seconds, decode_seconds = prefill_end - self._start, now - prefill_end
        # The first token costs no pass of its own: it comes from the prompt's last row.
        passes = max(0, generated - 1)
        flash = after["flash_bytes"] - self._decode_before["flash_bytes"]
        plan = self._engine.plan
        return {
            "prompt_tokens": self._n_prompt,
            "reused_tokens": self.reused,
            "generated_tokens": generated,
            "seed": self._seed,
            "load_seconds": self._engine.load_seconds,
            "prefill_seconds": prefill_seconds,
            "decode_seconds": decode_seconds,
            "prefill_tokens_per_second": _rate(self._n_prompt - self.reused, prefill_seconds),
            "decode_tokens_per_second": _rate(passes, decode_seconds),
            "flash_bytes": after["flash_bytes"] - self._before["flash_bytes"],
            "flash_bytes_per_token": flash // passes if passes else 0,
            "flash_wait_seconds": after["wait_seconds"] - self._before["wait_seconds"],
            **{key: after[key] - self._before[key] for key in ("experts_guessed", "experts_guessed_right")},
            "peak_memory_bytes": peak_rss_bytes(),
            "budget_bytes": plan.memory_bytes,
            "placement": plan.placement,
            "neuron_mode": plan.neuron_mode,
            "isa": after["isa"],
            "speculation": speculation.spent(
                self._speculated, None if self._speculators is None else self._speculators.stats()
            ),
            "memory_changes": self._engine.memory_changes[self._n_changes :],
        }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
