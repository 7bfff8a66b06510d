"""What goes wrong through a user's hand: one family of errors, each a sentence that says how to mend it."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An argument, a file or a setting that the library cannot use.

    The message names the argument, what was expected, what came, and where it helps, the remedy.
    """


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or that does not fit the network."""


class MissingPackageError(ImportError):
    """An optional package is needed and not installed; the message holds the command that installs it."""


class KernelError(RuntimeError):
    """A kernel does not compile, or does not fit the GPU; the message names kernel, settings and GPU."""


def brief(text: object, limit: int = 100) -> str:
    """Return text for one line of a message: control characters escaped, the middle left out beyond ``limit``."""
    shown = str(text)
    if len(shown) > limit:
        shown = f"{shown[: limit // 2]}...{shown[3 - limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def expected(argument: str, expectation: str, got: object, remedy: str = "") -> InputError:
    """Build the error for a bad argument: ``raise expected("coords", "shape (B, N, 2)", shape)``."""
    return InputError(
        f"{argument}: expected {expectation}, got {brief(got, 500)}." + (f" {remedy}" if remedy else "")
    )


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra of this package installs it.

    Raises:
        MissingPackageError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs the package {module!r}: pip install 'vitup-fast[{extra}]'"
        ) from error
