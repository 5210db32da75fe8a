"""Every error edge raises, typed.

A message is one line that says what failed, where, what was expected and what was found. The compiled core
reports a status code; :data:`BY_CODE` maps each code to its class, so Python and C++ share one vocabulary.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Base of every error raised by edge."""


class ModelFileError(EdgeError):
    """A model, checkpoint or pack file is malformed, truncated or incomplete."""


class CorruptError(ModelFileError):
    """Stored bytes do not match their checksum."""


class UnsupportedModelError(ModelFileError):
    """The file is well formed, but holds an architecture, block type or option edge does not run."""


class DiskError(EdgeError):
    """The drive failed, is full, or a file shrank while it was read."""


class BudgetError(EdgeError, MemoryError):
    """The named memory does not hold the model; ``floor_bytes`` says what would.

    Attributes:
        floor_bytes: smallest budget in bytes that would be accepted, or 0 when unknown.
    """

    floor_bytes: int = 0


class ContextOverflowError(EdgeError, ValueError):
    """Prompt and requested tokens exceed the context; nothing is ever cut silently."""


class ArgumentError(EdgeError, ValueError):
    """A parameter has a wrong type or lies outside its range."""


class TemplateError(EdgeError):
    """A chat template is missing, malformed, or exceeded its limits."""


class TokenizerError(ModelFileError):
    """A vocabulary is malformed or of an unknown kind."""


class CancelledError(EdgeError):
    """The request was cancelled by its caller."""


#: Status code of the compiled core (``cpp/core/status.h``) -> exception class.
BY_CODE: dict[str, type[EdgeError]] = {
    "bad_file": ModelFileError,
    "corrupt": CorruptError,
    "disk_error": DiskError,
    "over_budget": BudgetError,
    "unsupported": UnsupportedModelError,
    "cancelled": CancelledError,
    "bad_argument": ArgumentError,
    "context_overflow": ContextOverflowError,
}
