"""What a model's name stands for: a shipped model, or a file; and the pack behind it."""

from __future__ import annotations

import os
from pathlib import Path

from edge.watch import Progress
from flashload.errors import ArgumentError, DiskError
from flashload.format import PackFile

_BUILTIN = Path(__file__).parent / "builtin"


def builtin_models() -> list[str]:
    """Names of the models that ship with edge."""
    return sorted(path.stem for path in _BUILTIN.glob("*.edge"))


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A shipped model's bare name, or a path.

    Raises:
        ArgumentError: neither.
        DiskError: a folder that may not be read.
    """
    if isinstance(model, str) and model in builtin_models():
        return _BUILTIN / f"{model}.edge"
    try:
        path = Path(model).expanduser()
        found = bool(str(model)) and path.exists()
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise DiskError(f"{path}: the folder cannot be read: Permission denied")
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DiskError(f"{str(model)[:200]}: cannot be looked up: {reason}") from None
    if not found:
        names = ", ".join(builtin_models()) or "none"
        raise ArgumentError(
            f"model: expected a file, a folder or a shipped model ({names}), found {str(model)[:200]!r}"
        )
    return path


def open_pack(
    model: str | os.PathLike[str], *, weights: str = "keep", on_pack: Progress | None = None
) -> PackFile:
    """The pack behind a model; other files are packed once into the cache."""
    from flashload.cache import ensure_packed

    return PackFile(ensure_packed(resolve_model(model), weights=weights, progress=on_pack))
