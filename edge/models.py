"""What a model's name stands for: a shipped model, or a file; and the pack behind it."""

from __future__ import annotations

import os
from pathlib import Path

from edge.watch import Progress
from flashload.errors import ArgumentError
from flashload.format import PackFile

_BUILTIN = Path(__file__).parent / "builtin"


def builtin_models() -> list[str]:
    """Names of the models that ship with edge."""
    return sorted(path.stem for path in _BUILTIN.glob("*.edge"))


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A shipped model's bare name, or a path.

    Raises:
        ArgumentError: neither.
    """
    if isinstance(model, str) and model in builtin_models():
        return _BUILTIN / f"{model}.edge"
    path = Path(model).expanduser()
    if not path.exists():
        names = ", ".join(builtin_models()) or "none"
        raise ArgumentError(
            f"model: expected a file, a folder or a shipped model ({names}), found {str(model)!r}"
        )
    return path


def open_pack(
    model: str | os.PathLike[str], *, weights: str = "keep", on_pack: Progress | None = None
) -> PackFile:
    """The pack behind a model; other files are packed once into the cache."""
    from flashload.cache import ensure_packed

    return PackFile(ensure_packed(resolve_model(model), weights=weights, progress=on_pack))
