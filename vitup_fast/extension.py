"""Finds the compiled extension ``vitup_fast._C``, and says in one sentence why it or a part of it is missing."""

from __future__ import annotations

import importlib
import json
import platform
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from .errors import MissingPackageError

FOLDER = Path(__file__).parent
KERNELS = {"cpu": "C++ kernels for CPUs", "cuda": "CUDA kernels"}
BUILD = "pip install --force-reinstall --no-deps --no-cache-dir ."


def load() -> ModuleType:
    """Return the compiled extension.

    Raises:
        MissingPackageError: there is none, or it cannot be used; says why and what mends it.
    """
    found = _find()
    if isinstance(found, ModuleType):
        return found
    raise MissingPackageError(found or f"the extension is not built: {summary()} (in a checkout: {BUILD})")


def obstacle(part: str) -> str | None:
    """Why a part of the extension, ``"cpu"`` or ``"cuda"``, cannot be used, in one sentence, or None."""
    found = _find()
    if hasattr(found, part):
        return None
    if isinstance(found, str):
        return found
    reason = _report().get(part) or summary()
    return f"the {KERNELS[part]} are not built: {reason} (in a checkout: VITUP_FAST_{part.upper()}=1 {BUILD})"


# What torch.compiler.assume_constant_result does, without loading the compiler.
obstacle._dynamo_marked_constant = True


def summary() -> str:
    """What the installation built and why not the rest, in one line."""
    by_hand = isinstance(_find(), ModuleType)
    return _report().get("summary") or (
        "built by hand" if by_hand else "no installation has tried to build it"
    )


@cache
def _find() -> ModuleType | str | None:
    """Return the extension, or why it cannot be used, or None if there is none."""
    from . import __version__

    name = f"{__package__}._C"
    # In this folder only: an editable installation would offer the module of another copy of the package.
    spec = PathFinder.find_spec(name, [str(FOLDER)])
    if spec is None:
        others = " and ".join(
            sorted(path.name for path in FOLDER.glob("_C.*") if path.suffix in (".so", ".pyd"))
        )
        python = f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
        if not others:
            return None
        return f"the extension is built for another Python than {python}: {others} (in a checkout: {BUILD})"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"the extension cannot be loaded: {error} (in a checkout: {BUILD})"
    if module.version != __version__:
        return f"{spec.origin} is of vitup_fast {module.version}, not {__version__} (in a checkout: {BUILD})"
    return module


@cache
def _report() -> dict[str, str | None]:
    """What setup.py wrote down, or nothing."""
    try:
        return json.loads((FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}
