"""What needs libraries that not everyone has: those of an extra, mostly `[ct]`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from deeplesion.errors import UserError, install


def module(name: str, use: str) -> ModuleType:
    """`ct_volumes.<name>`; `use` says what it is for.

    Raises UserError that says how to install the library that is missing.
    """
    try:
        return importlib.import_module(f"ct_volumes.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ct_volumes"):
            raise
        raise UserError(f"{use} needs {error.name}: {install('ct')}") from None


def need(use: str, *libraries: str, extra: str = "ct") -> None:
    """Raises UserError, '`use` pydicom and nibabel: pip install ...', for libraries of `extra` that
    are not there, before any work is done."""
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise UserError(f"{use} {' and '.join(missing)}: {install(extra)}")
