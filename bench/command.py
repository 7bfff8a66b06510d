"""What the commands of the benchmarks share: files that are written whole, and mistakes told in one sentence."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vitup_fast.errors import InputError, MissingPackageError, expected


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name in the same directory, then rename: nobody sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(path: Path, option: str = "--json") -> None:
    """Check before the measurement that its result can be written.

    Raises:
        InputError: the path is a directory, or its parent is none or not writable.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise expected(option, "a file in an existing, writable directory", repr(str(path)))


def exit_code(main: Callable[[], int]) -> int:
    """Run a command; a user's mistake or a missing package becomes one sentence on the error stream and exit code 2."""
    try:
        return main()
    except (InputError, MissingPackageError) as error:
        print(error, file=sys.stderr)
        return 2
