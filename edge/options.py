"""What may be asked of loading, as one value that is checked in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields

from flashload.errors import ArgumentError
from flashload.machine import cpu_count, parse_bytes
from flashload.plan_kv import KV
from flashload.plan_neurons import LEAN_KEEP, Guess

#: Names of who may decide which neurons are active.
PREDICTOR: dict[str, Guess] = {"auto": True, "on": "on", "off": False, "lean": LEAN_KEEP}
SPARSITY = ("off", "on")
_DEVICES = ("auto", "cpu")
_PRESSURE = ("auto", "off")
_MOST_THREADS, _MOST_CONTEXT = 1024, 1 << 24
#: What every runtime takes, edge's own or another.
_OF_ALL = ("threads", "context", "backend", "whole_process")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def check_sizes(context: int | None, threads: int | None) -> None:
    """Raises ArgumentError for a context or a number of threads that is out of range; None is never."""
    for name, value, most, unit in (
        ("threads", threads, _MOST_THREADS, ""),
        ("context", context, _MOST_CONTEXT, " tokens"),
    ):
        bad = isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most
        if value is not None and bad:
            raise ArgumentError(f"{name}: expected 1..{most}{unit}, found {value!r}")


def guess_of(predictor: str | float) -> Guess:
    """What a plan makes of the argument ``predictor`` of :func:`edge.load`.

    Raises:
        ArgumentError: neither a name nor a share between 0 and 1.
    """
    if isinstance(predictor, str) and predictor in PREDICTOR:
        return PREDICTOR[predictor]
    if isinstance(predictor, float) and 0 < predictor < 1:
        return predictor
    names = ", ".join(PREDICTOR)
    raise ArgumentError(
        f"predictor: expected one of {names}, or a share between 0 and 1, found {predictor!r}"
    )


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of a plan; see :func:`edge.load`. Here ``predictor`` is what :func:`guess_of` made of it."""

    memory: int | str | None = None
    context: int | None = None
    threads: int | None = None
    kv: str = "auto"
    predictor: Guess = True

    @property
    def n_threads(self) -> int:
        """Those asked for, or the cores this process may use."""
        return cpu_count() if self.threads is None else self.threads

    def check(self) -> None:
        """Raises ArgumentError for what is out of range, ``memory`` aside."""
        check_sizes(self.context, self.threads)
        _one_of("kv", self.kv, KV)


@dataclass(frozen=True)
class LoadOptions:
    """The parameters of :func:`edge.load`, which says what each means."""

    memory: int | str | None = None
    device: str = "auto"
    threads: int | None = None
    context: int | None = None
    weights: str = "keep"
    isa: str = ""
    io: str = "auto"
    kv: str = "auto"
    kv_type: str = "f16"
    predictor: str | float = "auto"
    sparsity: str = "off"
    exact: bool = False
    draft: str | os.PathLike[str] | None = None
    pressure: str = "auto"
    prefix_disk: int | str | None = None
    backend: str = "edge"
    whole_process: bool = False

    def check(self) -> None:
        """Raises ArgumentError for what can be told from the options alone."""
        _one_of("device", self.device, _DEVICES)
        _one_of("sparsity", self.sparsity, SPARSITY)
        _one_of("pressure", self.pressure, _PRESSURE)
        guess_of(self.predictor)
        if self.prefix_disk is not None:
            parse_bytes(self.prefix_disk, "prefix_disk")

    @property
    def plan(self) -> PlanOptions:
        """The part of them that a plan is made from."""
        guess: Guess = False if self.exact else guess_of(self.predictor)
        return PlanOptions(self.memory, self.context, self.threads, self.kv, guess)

    @property
    def leaves_out_neurons(self) -> bool:
        """Whether the pack's thresholds are wanted."""
        return self.sparsity == "on" and not self.exact

    def of_edge_alone(self) -> Iterator[str]:
        """Names of the options that were given and that no other runtime takes."""
        for field in fields(self):
            if field.name not in _OF_ALL and getattr(self, field.name) != field.default:
                yield field.name
