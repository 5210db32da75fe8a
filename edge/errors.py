"""The errors of :mod:`edge`; every one is an :class:`EdgeError` with a one-line message."""

from flashload.errors import (
    ArgumentError,
    BudgetError,
    CancelledError,
    ContextOverflowError,
    CorruptError,
    DiskError,
    EdgeError,
    ModelFileError,
    TemplateError,
    TokenizerError,
    UnsupportedModelError,
)

__all__ = [
    "ArgumentError",
    "BudgetError",
    "CancelledError",
    "ContextOverflowError",
    "CorruptError",
    "DiskError",
    "EdgeError",
    "ModelFileError",
    "TemplateError",
    "TokenizerError",
    "UnsupportedModelError",
]
