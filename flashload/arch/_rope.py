"""Rotary frequencies with every scaling folded in (Su et al. 2104.09864; YaRN: Peng et al. 2309.00071)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashload.arch._keys import Keys
from flashload.errors import UnsupportedModelError

_MAX_FACTOR = 1e6


@dataclass(frozen=True)
class Rope:
    """inv_freq: radians per position of each pair, as f32 values; magnitude: factor on cos and sin."""

    inv_freq: tuple[float, ...]
    magnitude: float = 1.0


def _as_f32(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(np.float32(value)) for value in values)


def _plain(theta: float, rotary_dim: int) -> list[float]:
    return [theta ** (-2.0 * i / rotary_dim) for i in range(rotary_dim // 2)]


def default(theta: float, rotary_dim: int) -> Rope:
    """No scaling: theta ** (-2 i / rotary_dim)."""
    return Rope(_as_f32(_plain(theta, rotary_dim)))


def linear(theta: float, rotary_dim: int, factor: float) -> Rope:
    """Position interpolation: every frequency divided by ``factor``."""
    return Rope(_as_f32([f / factor for f in _plain(theta, rotary_dim)]))


def by_factors(theta: float, rotary_dim: int, factors: Sequence[float]) -> Rope:
    """Each frequency divided by its own factor (GGUF's ``rope_freqs.weight``)."""
    return Rope(_as_f32([f / d for f, d in zip(_plain(theta, rotary_dim), factors, strict=True)]))


def llama3(
    theta: float, rotary_dim: int, factor: float, low_factor: float, high_factor: float, original: int
) -> Rope:
    """Llama 3.1: long waves divided by ``factor``, short ones kept, a linear blend between."""
    out = []
    for f in _plain(theta, rotary_dim):
        turns = original * f / (2 * math.pi)  # rotations within the original context
        if turns < low_factor:
            out.append(f / factor)
        elif turns > high_factor:
            out.append(f)
        else:
            blend = (turns - low_factor) / (high_factor - low_factor)
            out.append((1 - blend) * f / factor + blend * f)
    return Rope(_as_f32(out))


def yarn(
    theta: float,
    rotary_dim: int,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    magnitude: float,
) -> Rope:
    """YaRN: pairs of more than beta_fast turns are kept, below beta_slow interpolated, a ramp between."""

    def pair_with(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    out = []
    for i, f in enumerate(_plain(theta, rotary_dim)):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(f / factor * interpolated + f * (1 - interpolated))
    return Rope(_as_f32(out), magnitude)


def _yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def from_hf(keys: Keys, rotary_dim: int, max_positions: int, default_theta: float) -> Rope:
    """Rope of a Hugging Face config: ``rope_parameters`` (transformers 5), or theta and ``rope_scaling``.

    Raises:
        UnsupportedModelError: a kind that cannot be folded into fixed frequencies.
        ModelFileError: a value out of range.
    """
    section = keys.section("rope_parameters") or keys.section("rope_scaling")
    scaling = section or Keys(keys.where, {})
    theta_keys = scaling if scaling.get("rope_theta") is not None else keys
    theta = theta_keys.number("rope_theta", low=1.001, high=1e15, default=default_theta)
    partial = scaling.get("partial_rotary_factor") or keys.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UnsupportedModelError(f"{keys.where}: partial_rotary_factor: expected 1, found {partial!r}")
    kind = scaling.text("rope_type", "type", default="default")
    if kind in ("default", "dynamic"):  # dynamic NTK changes nothing within the trained context
        return default(theta, rotary_dim)
    if kind == "linear":
        return linear(theta, rotary_dim, scaling.number("factor", low=1e-3, high=_MAX_FACTOR))
    if kind not in ("llama3", "yarn"):
        raise UnsupportedModelError(
            f"{scaling.where}: rope_type: expected default, linear, dynamic, llama3 or yarn, found {kind!r}"
        )
    top = keys.get("original_max_position_embeddings")
    original_keys = keys if top is not None else scaling
    original = original_keys.integer("original_max_position_embeddings", default=max_positions)
    if kind == "llama3":
        low = scaling.number("low_freq_factor", low=1e-3, high=1e6)
        high = scaling.number("high_freq_factor", low=low * 1.000001, high=1e6)
        factor = scaling.number("factor", low=1e-3, high=_MAX_FACTOR)
        return llama3(theta, rotary_dim, factor, low, high, original)
    factor = scaling.number("factor", low=1e-3, high=_MAX_FACTOR, default=max_positions / original)
    mscale = scaling.number("mscale", low=0, high=1e3, default=0.0)
    mscale_all = scaling.number("mscale_all_dim", low=0, high=1e3, default=0.0)
    implied = _yarn_magnitude(factor)
    if mscale and mscale_all:
        implied = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all)
    return yarn(
        theta,
        rotary_dim,
        factor,
        original,
        scaling.number("beta_fast", low=1e-3, high=1e6, default=32.0),
        scaling.number("beta_slow", low=1e-3, high=1e6, default=1.0),
        scaling.flag("truncate", default=True),
        scaling.number("attention_factor", low=1e-3, high=1e3, default=implied),
    )


def from_gguf(keys: Keys, rotary_dim: int, max_positions: int, factors: Sequence[float] | None) -> Rope:
    """Rope of GGUF metadata; ``factors`` are the values of ``rope_freqs.weight`` when the file has it.

    Raises:
        UnsupportedModelError: a kind that cannot be folded into fixed frequencies.
        ModelFileError: a value out of range.
    """
    theta = keys.number("rope.freq_base", low=1.001, high=1e15, default=10000.0)
    # Files from before the kind had a name carry only a factor, and mean linear.
    kind = keys.text("rope.scaling.type", default="linear")
    factor = (
        keys.number("rope.scaling.factor", "rope.scale_linear", low=0, high=_MAX_FACTOR, default=1.0) or 1.0
    )
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{keys.where}: {keys.prefix}rope.scaling.type: expected none, linear or yarn, found {kind!r}"
        )
    if factors is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            raise UnsupportedModelError(
                f"{keys.where}: rope_freqs.weight: expected no scaling beside it, found {kind} x {factor:g}"
            )
        if len(factors) != rotary_dim // 2 or not all(math.isfinite(f) and f > 0 for f in factors):
            raise keys.bad("rope_freqs.weight", f"{rotary_dim // 2} factors above 0", list(factors))
        return by_factors(theta, rotary_dim, factors)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return default(theta, rotary_dim)
    if kind == "linear":
        return linear(theta, rotary_dim, factor)
    for name, neutral in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if keys.number(f"rope.scaling.{name}", low=-1e3, high=1e3, default=neutral) != neutral:
            raise UnsupportedModelError(
                f"{keys.where}: {keys.prefix}rope.scaling.{name}: expected {neutral:g}, found "
                f"{keys.get(f'rope.scaling.{name}')}"
            )
    names = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    return yarn(
        theta,
        rotary_dim,
        factor,
        keys.integer("rope.scaling.original_context_length", default=max_positions),
        keys.number("rope.scaling.yarn_beta_fast", low=1e-3, high=1e6, default=32.0),
        keys.number("rope.scaling.yarn_beta_slow", low=1e-3, high=1e6, default=1.0),
        True,
        keys.number(*names, low=1e-3, high=1e3, default=1.0) * _yarn_magnitude(factor),
    )
