"""Where the results of a run go: their names, what they must not replace, and a record of what made them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, brief, expected, require
from ..files import byte_size, read_record, write_json
from ..pictures import is_picture

PICTURE_SUFFIX = "_pca.png"
RECORD_SUFFIX = ".vitup.json"
SOFTWARE = "vitup_fast"  # the text "Software" of pictures that the library drew


class Target(NamedTuple):
    """An image, the files made of it, and the record of what made them."""

    image: Path
    files: tuple[Path, ...]  # features, then the picture if one is drawn
    record: Path


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Replace folders by the pictures in them, sorted; folders inside are left alone, and so is what we drew.

    Raises:
        InputError: a folder that cannot be read or holds no pictures.
    """
    images: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
            images.append(path)
            continue
        try:
            found = sorted(entry for entry in path.iterdir() if not entry.is_dir() and _is_picture(entry))
        except OSError as error:
            raise InputError(f"{shown(path)}: cannot be listed ({error.strerror or error}).") from error
        if not found:
            raise expected(
                shown(path), "a folder with pictures in it", "none", "Name files, or a folder inside."
            )
        images += found
    return images


def _is_picture(path: Path) -> bool:
    """Whether a file's suffix says that Pillow can read it, unless it is hidden or drawn by this library."""
    if not is_picture(path.name):
        return False
    if not path.name.endswith(PICTURE_SUFFIX):
        return True
    pillow = require("PIL.Image", "demo", "reading an image file")
    try:
        with pillow.open(path) as image:
            return image.info.get("Software") != SOFTWARE
    except Exception:
        return True  # it will be named among the failures


def make_folder(folder: Path) -> bool:
    """Make the folder for the results, try to write in it, and return whether it takes a.npy and A.npy for one file.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(folder)}: cannot be made a folder ({_reason(error)}).") from error
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".vitup-", suffix=".part") as probe:
            path = Path(probe.name)
            return path.with_name(path.name.upper()).exists()
    except OSError as error:
        raise InputError(f"{shown(folder)}: cannot be written ({_reason(error)}).") from error


def name_targets(
    images: Sequence[Path], folder: Path, kind: str, picture: bool, ignores_case: bool
) -> list[Target]:
    """Name the results of every image; an image given twice counts once.

    Args:
        images: image files, which need not exist.
        folder: where the results go.
        kind: suffix of the features, without its dot.
        picture: name pictures as well.
        ignores_case: what :func:`make_folder` returned.

    Raises:
        InputError: two images would have the same results, or a result would replace an image.
    """
    inputs = {_identity(image): image for image in images}
    targets: dict[str, Target] = {}
    for image in images:
        features = folder / f"{image.stem}.{kind}"
        drawn = (folder / f"{image.stem}{PICTURE_SUFFIX}",) if picture else ()
        target = Target(image, (features, *drawn), _record(folder, image.stem))
        name = unicodedata.normalize("NFC", features.name).casefold() if ignores_case else features.name
        other = targets.setdefault(name, target).image
        if _identity(other) != _identity(image):
            raise expected(
                "IMAGE",
                "files of different names",
                f"{shown(other)} and {shown(image)}, which would both become {shown(features)}",
                "Rename one, or write them to different folders.",
            )
        for file in (*target.files, target.record):
            if (replaced := inputs.get(_identity(file))) is not None:
                raise expected(
                    "--output",
                    "a folder where results replace no image",
                    f"{shown(folder)}: {file.name} would replace {shown(replaced)}",
                    "Choose another folder.",
                )
    return list(targets.values())


def _identity(path: Path) -> object:
    """Return what identifies a file under all its names, or the path if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return path
    return found.st_dev, found.st_ino


def _name_limit(folder: Path) -> int:
    """Return how many bytes a name in a folder may have."""
    limit = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 0
    return limit if limit > 0 else 255


def _record(folder: Path, stem: str) -> Path:
    """Name the record of an image's results; a long name gives way to its digest."""
    name = stem + RECORD_SUFFIX
    if len(os.fsencode(name)) > _name_limit(folder):
        name = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16] + RECORD_SUFFIX
    return folder / name


def check_names(target: Target) -> None:
    """Check that the results of an image can be written under their names.

    Raises:
        InputError: a name is too long, or a folder's.
    """
    for file in target.files:
        excess = len(os.fsencode(file.name)) - _name_limit(file.parent)
        if excess > 0:
            got = f"{brief(file.name)}, {excess} bytes too long"
            raise expected(
                shown(target.image), "a name that leaves room for its results'", got, "Rename the image."
            )
        if file.is_dir():
            raise expected(shown(file), "a place for a file", "a folder", "Choose another output folder.")


def check_space(folder: Path, files: Iterable[tuple[Path, int]]) -> None:
    """Check that files of so many bytes fit on the disk, one after the other, each written before it replaces another.

    Raises:
        InputError: they do not fit.
    """
    total = peak = 0
    for path, size in files:
        peak = max(peak, total + size)
        total += size - (path.stat().st_size if path.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if peak > free:
        raise expected(
            shown(folder),
            f"{byte_size(peak)} of free space for the features",
            byte_size(free),
            "Choose a smaller --size, fewer images, or another disk.",
        )


def shown(path: Path) -> str:
    """Show a path in a message."""
    return brief(path, 500)


def is_made(target: Target, settings: dict[str, Any]) -> bool:
    """Whether all results of an image are there and were made with these settings."""
    made = read_record(target.record)
    return all(
        file.is_file() and made.get(file.name) == {**settings, "bytes": file.stat().st_size}
        for file in target.files
    )


def forget(target: Target) -> None:
    """Take the results off the record, before they are written anew.

    Raises:
        InputError: the record cannot be written.
    """
    made = read_record(target.record)
    names = {file.name for file in target.files}
    if names & made.keys():
        write_json(target.record, {name: made[name] for name in made.keys() - names})


def remember(target: Target, settings: dict[str, Any]) -> None:
    """Record what made the results that lie there now.

    Raises:
        InputError: the record cannot be written.
    """
    made = read_record(target.record)
    made |= {file.name: {**settings, "bytes": file.stat().st_size} for file in target.files}
    write_json(target.record, made)


def _reason(error: Exception) -> str:
    """Say why the system refused."""
    return getattr(error, "strerror", None) or str(error)
