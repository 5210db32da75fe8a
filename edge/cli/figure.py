"""PNG figures of commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashload.errors import ArgumentError, DiskError


@contextmanager
def png(path: Path, extra: str, dpi: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (figure, axes) of ``pyplot.subplots(**options)``, and writes them to ``path`` at the end.

    Args:
        extra: the optional dependencies that bring matplotlib.

    Raises:
        ArgumentError: matplotlib is not installed.
        DiskError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ArgumentError(
            f"--figure: drawing a PNG needs matplotlib, found none; pip install 'edge[{extra}]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained", **options)
    try:
        yield figure, axes
        figure.savefig(path, dpi=dpi, format="png")
    except OSError as error:
        raise DiskError(f"{path}: the figure cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
