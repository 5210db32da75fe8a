"""Training checkpoints: written whole or not at all, and proven undamaged before use."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from flashload.errors import CorruptError, DiskError, ModelFileError

_MAGIC = b"EDGETRN1"
_DIGEST_BYTES = 32


def write_atomic(path: Path, data: bytes) -> None:
    """Temporary file beside it, fsync, rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Magic, sha256 of the payload, payload (torch.save)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomic(path, _MAGIC + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The saved state; DiskError when the file is missing, CorruptError when any byte of it is damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DiskError(
            f"{path}: training checkpoint expected here, found none ({error.strerror})"
        ) from error
    start = len(_MAGIC) + _DIGEST_BYTES
    if data[: len(_MAGIC)] != _MAGIC:
        raise ModelFileError(f"{path}: expected a training checkpoint ({_MAGIC!r}), found {data[:8]!r}")
    if hashlib.sha256(data[start:]).digest() != data[len(_MAGIC) : start]:
        raise CorruptError(
            f"{path}: training checkpoint is damaged (its sha256 differs); delete it and start again"
        )
    state: dict[str, Any] = torch.load(io.BytesIO(data[start:]), weights_only=True)
    return state
