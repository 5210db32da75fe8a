"""Architectures are data: one file per family beside this one.

Adding a family is adding a file with a ``FAMILY``; files that begin with ``_`` hold what they share.
"""

from __future__ import annotations

import importlib
import pkgutil

from flashload.arch._config import DecoderConfig
from flashload.arch._family import Family, Tensors
from flashload.arch._keys import Keys
from flashload.errors import UnsupportedModelError

__all__ = ["FAMILIES", "DecoderConfig", "Family", "Keys", "Tensors", "family_of_gguf", "family_of_hf"]


def _load() -> dict[str, Family]:
    names = sorted(
        module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )
    families = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.name: family for family in families}


FAMILIES: dict[str, Family] = _load()


def _unknown(where: str, found: str, known: set[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: architecture: expected one of {', '.join(sorted(known))}, found {found!r}"
    )


def family_of_hf(keys: Keys) -> Family:
    """The family of a config.json.

    Raises:
        UnsupportedModelError: an architecture edge does not run; the message lists those it does.
    """
    names = keys.items("architectures", str) or []
    for family in FAMILIES.values():
        if any(name in family.hf_architectures for name in names):
            return family
    model_type = keys.text("model_type", default="none named")
    if not names:
        for family in FAMILIES.values():
            if family.hf_model_type == model_type:
                return family
    known = {name for family in FAMILIES.values() for name in family.hf_architectures}
    raise _unknown(keys.where, ", ".join(names) or model_type, known)


def family_of_gguf(keys: Keys, architecture: str) -> Family:
    """The family of a GGUF file; ``keys`` carries the prefix of ``architecture``.

    Raises:
        UnsupportedModelError: an architecture edge does not run; the message lists those it does.
    """
    for family in FAMILIES.values():
        if architecture in family.gguf_architectures and family.gguf_when(keys):
            return family
    known = {name for family in FAMILIES.values() for name in family.gguf_architectures}
    raise _unknown(keys.where, architecture, known)
