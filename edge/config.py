"""What one request asks for, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edge import speculation
from flashload.errors import ArgumentError

_OVERFLOW = ("error", "shift")


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling and stopping of one request.

    Attributes:
        max_tokens: tokens to generate; None generates until the context is full.
        temperature: 0 takes the most likely token.
        top_k, top_p, min_p, typical_p: filters of the distribution; 0, 1, 0 and 1 turn them off.
        repetition_penalty: divides (or multiplies) logits of tokens seen; 1 is off (Keskar et al. 2019).
        presence_penalty, frequency_penalty: subtracted once, or once per occurrence.
        penalty_last_n: how many of the latest tokens the penalties see; -1 is all of them.
        logit_bias: token id -> value added to its logit.
        seed: the text is a function of prompt, settings and seed; None draws one.
        stop: strings that end the text; they are not part of it.
        ignore_eos: go on after an end-of-text token.
        logprobs: how many alternatives to report for each token; None reports nothing, 0 the token alone.
        overflow: "error", or "shift" to drop the oldest text when the context is full.
        speculation: "auto", "off", the name of a drafter, or the fields of :class:`edge.speculation.Speculation`;
            the text is the same.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 256
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] | str = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    overflow: str = "error"
    speculation: str | Mapping[str, Any] = "auto"

    def __post_init__(self) -> None:
        """Checks types and ranges of what the core does not check itself.

        Raises:
            ArgumentError: names the parameter, the range and the value found.
        """
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, 1 << 40)
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, 100)
        _integer("top_k", self.top_k, 0, 1 << 30)
        _integer("penalty_last_n", self.penalty_last_n, -1, 1 << 40)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            _number(name, getattr(self, name))
        if not isinstance(self.logit_bias, Mapping):
            raise ArgumentError(
                f"logit_bias: expected a mapping of token id to number, found {self.logit_bias!r}"
            )
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token", token, 0, 1 << 30)
            _number(f"logit_bias[{token}]", bias)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ArgumentError(f"stop: expected strings that are not empty, found {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stops))
        if self.overflow not in _OVERFLOW:
            raise ArgumentError(f"overflow: expected one of {', '.join(_OVERFLOW)}, found {self.overflow!r}")
        speculation.parse(self.speculation)

    def sampling(self, seed: int) -> dict[str, Any]:
        """The core's half of the settings."""
        return {
            "temperature": float(self.temperature),
            "top_k": self.top_k,
            "top_p": float(self.top_p),
            "min_p": float(self.min_p),
            "typical_p": float(self.typical_p),
            "repetition_penalty": float(self.repetition_penalty),
            "presence_penalty": float(self.presence_penalty),
            "frequency_penalty": float(self.frequency_penalty),
            "penalty_last_n": self.penalty_last_n,
            "logit_bias": [(int(token), float(bias)) for token, bias in self.logit_bias.items()],
            "seed": seed,
            "n_logprobs": -1 if self.logprobs is None else self.logprobs,
        }


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ArgumentError(f"{name}: expected an integer in {low}..{high}, found {value!r}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(f"{name}: expected a finite number, found {value!r}")


def config_from(settings: dict[str, Any]) -> GenerationConfig:
    """The settings of one request, by name.

    Raises:
        ArgumentError: an unknown name, or a value out of range.
    """
    try:
        return GenerationConfig(**settings)
    except TypeError as error:
        known = ", ".join(asdict(GenerationConfig()))
        unknown = ", ".join(sorted(set(settings) - set(asdict(GenerationConfig()))))
        raise ArgumentError(f"generate: unknown setting {unknown}; expected {known}") from error
