"""What a run of the memory-budget benchmark consists of: cases, from the command line or from a suite file.

A suite file is JSON: settings for all (the options of ``python -m bench budget`` by name), and ``models``, a list of
objects that each name a ``model`` and may set anything otherwise; ``per_system`` changes ``prompt``, ``tokens``,
``runs`` and ``timeout`` for one system. Paths are relative to the folder of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import peers

_PER_SYSTEM = frozenset(("prompt", "tokens", "runs", "timeout"))
_PATHS = ("peer_model", "folder", "text")
_KEYS = {"model", "name", "budgets", "systems", "per_system", "process", "weights", *_PER_SYSTEM, *_PATHS}


@dataclass(frozen=True)
class Case:
    """One model at several limits in several systems.

    Attributes:
        percents: limits in percent of the model's size; 0 is a limit just below edge's floor.
        per_system: what ``count`` gives otherwise for one system.
        process_bytes: added to every limit.
    """

    model: Path
    name: str
    percents: tuple[float, ...]
    systems: tuple[str, ...]
    counts: Mapping[str, float]
    per_system: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    peer_model: Path | None = None
    folder: Path | None = None
    text: Path | None = None
    process_bytes: int = 0
    pack_weights: str = "keep"

    def count(self, system: str, key: str) -> float:
        """ "prompt", "tokens", "runs" or "timeout" (seconds) of one system."""
        return self.per_system.get(system, {}).get(key, self.counts[key])


def case_of(settings: Mapping[str, Any], models: Path) -> Case:
    """A case from its settings.

    Args:
        settings: all keys of a suite file but ``models``; those of :func:`defaults` must be there.
        models: folder that relative paths start from.

    Raises:
        ValueError: a setting is unknown or out of range; one line that names it.
    """
    for key in settings:
        if key not in _KEYS:
            raise ValueError(f"{key!r}: expected one of {', '.join(sorted(_KEYS))}")
    if not isinstance(settings.get("model"), str):
        raise ValueError(f"model: expected a file's name, found {settings.get('model')!r}")
    for system in settings["systems"]:
        _known(system, "systems")
    percents = tuple(_number("budgets", percent, 0, 1000) for percent in settings["budgets"])
    per_system = settings.get("per_system", {})
    for system, changes in per_system.items():
        _known(system, "per_system")
        if not _PER_SYSTEM.issuperset(changes):
            raise ValueError(
                f"per_system: {system!r}: expected a system with any of {', '.join(_PER_SYSTEM)}"
            )
    for counts in (settings, *per_system.values()):
        for key in _PER_SYSTEM.intersection(counts):
            _number(key, counts[key], 1, 1 << 20)
    found = {key: models / settings[key] for key in _PATHS if settings.get(key)}
    model = resolve(settings["model"], models)
    return Case(
        model=model,
        name=str(settings.get("name") or model.stem),
        percents=percents,
        systems=tuple(settings["systems"]),
        counts={key: settings[key] for key in _PER_SYSTEM},
        per_system=per_system,
        process_bytes=int(_number("process", settings.get("process", 0), 0, 1 << 20) * 2**20),
        pack_weights=settings.get("weights", "keep"),
        **found,
    )


def _known(system: str, key: str) -> None:
    try:
        peers.system_of(system)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _number(key: str, value: object, least: float, most: float) -> float:
    if not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{key}: expected {least:g} to {most:g}, found {value!r}")
    return float(value) if key == "budgets" else value


def resolve(model: str, models: Path) -> Path:
    """A file, or a model that ships with edge by its bare name."""
    from edge.models import builtin_models, resolve_model

    path = models / model
    return resolve_model(model) if model in builtin_models() and not path.exists() else path


def read_suite(path: Path, defaults: Mapping[str, Any], models: Path | None = None) -> list[Case]:
    """The cases of a suite file.

    Args:
        defaults: settings that the file may leave out.
        models: folder of the models; that of the file by default.

    Raises:
        ValueError: the file is no suite; one line that says where.
    """
    try:
        suite = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(suite, dict) or not isinstance(suite.get("models"), list):
        raise ValueError(f"{path}: expected an object with a list of models")
    common = {key: value for key, value in suite.items() if key != "models"}
    cases = []
    for number, one in enumerate(suite["models"]):
        try:
            if not isinstance(one, dict):
                raise ValueError(f"expected an object, found {one!r}")
            cases.append(case_of({**defaults, **common, **one}, models or path.parent))
        except ValueError as error:
            raise ValueError(f"{path}: models[{number}]: {error}") from None
    return cases
