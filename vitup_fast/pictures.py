"""Folders of pictures: which files are pictures, and how many of them may be broken."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from .errors import InputError, brief, expected, require

S = TypeVar("S")
T = TypeVar("T")

MOST_BROKEN = 0.1  # of all pictures; one at least
_NO_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow names and cannot decode


def is_picture(name: str) -> bool:
    """Whether a file's name says that Pillow can decode it, and that it is not hidden."""
    pillow = require("PIL.Image", "demo", "reading pictures")
    path = Path(name)
    kind = pillow.registered_extensions().get(path.suffix.lower())
    return not path.name.startswith(".") and kind in pillow.OPEN and kind not in _NO_PICTURES


def pictures_below(folder: str | os.PathLike[str], what: str) -> list[Path]:
    """List the pictures in a folder and in those inside it, in an order that does not depend on the machine.

    Raises:
        InputError: no folder, one that cannot be listed, or none in it.
    """
    path, shown = Path(folder), brief(folder, 500)
    if not path.is_dir():
        kind = "a file" if path.exists() else "no such folder"
        raise expected(what, "a folder of pictures", f"{shown} ({kind})")

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{what}: {brief(error.filename, 500)} cannot be listed ({error.strerror})."
        ) from error

    found = sorted(
        (
            Path(place, file)
            for place, _, files in os.walk(path, onerror=refuse)
            for file in files
            if is_picture(file)
        ),
        key=lambda file: file.relative_to(path).as_posix(),
    )
    if not found:
        raise expected(what, "a folder with pictures in it", f"{shown} without any")
    return found


class BrokenPictures:
    """Counts pictures that cannot be read, and gives up when they are too many.

    Args:
        total: pictures there are.

    Attributes:
        errors: what is wrong with each, by the keys they were added with.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.errors: dict[object, str] = {}
        self._lock = threading.Lock()

    def add(self, key: object, error: InputError) -> None:
        """Remember a broken picture.

        Raises:
            InputError: more than a tenth of all are broken, or all.
        """
        with self._lock:
            self.errors[key] = str(error)
            broken = len(self.errors)
            if broken > max(1, int(MOST_BROKEN * self.total)) or broken == self.total:
                raise InputError(
                    f"{broken} of {self.total} pictures are broken, the last: {error} Mend or remove them."
                ) from error


def read_sound(sources: Sequence[S], read: Callable[[S], T]) -> Iterator[tuple[S, T]]:
    """Read one picture after another, leaving out broken ones with a warning, as long as they are few.

    Raises:
        InputError: none could be read, or more than a tenth could not.
    """
    broken = BrokenPictures(len(sources))
    for index, source in enumerate(sources):
        try:
            content = read(source)
        except InputError as error:
            broken.add(index, error)
            warnings.warn(f"{error} It is left out ({len(broken.errors)} so far).", stacklevel=2)
            continue
        yield source, content
