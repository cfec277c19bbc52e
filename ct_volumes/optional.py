"""Modules of this package whose libraries, the extra `[ct]`, not everyone has."""

from __future__ import annotations

import importlib
from types import ModuleType

from deeplesion.errors import UserError


def module(name: str, use: str) -> ModuleType:
    """`ct_volumes.<name>`; `use` says what it is for.

    Raises UserError that says how to install the library that is missing.
    """
    try:
        return importlib.import_module(f"ct_volumes.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ct_volumes"):
            raise
        raise UserError(f"{use} needs {error.name}: pip install 'deeplesion-mmdet[ct]'") from None
