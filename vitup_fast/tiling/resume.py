"""What was done before: a record of all that determines a result, and a sidecar for every finished part of it.

A part's files are written under temporary names and renamed, and its sidecar last: a part without a sidecar, or whose
files differ from it, is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputError, brief, expected
from ..files import digest_file, read_record, write_json

RECORD = "settings.json"
PARTS = "parts"
SUMMARY = "summary.json"
LOCK = ".lock"


def digest_input(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Identify an input by its bytes; those of a file whose size and time are on record are not read again."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    known = record.get("input stamp") == stamp and record.get("input path") == str(path.resolve())
    content = record["input"] if known and not path.is_dir() else digest_file(path)
    return {"input": content, "input stamp": stamp, "input path": str(path.resolve())}


class Progress:
    """The parts of a run that are finished, in a folder that any number of workers may share.

    Args:
        home: the folder of the run's own files.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def begin(self, settings: dict[str, Any], notes: dict[str, Any]) -> None:
        """Record what determines the result, or check that what lies there was made by the same.

        Args:
            settings: all that determines the result.
            notes: recorded beside it, and not compared.

        Raises:
            InputError: the folder holds a result of other settings, which are named; or it cannot be written.
        """
        path = self.home / RECORD
        settings = json.loads(json.dumps(settings))
        before = read_record(path)
        if not before:
            if path.exists():
                raise InputError(f"{brief(path, 500)}: is broken; choose another output, or remove it.")
            make_folder(self.home / PARTS)
            write_json(path, {**notes, "settings": settings})
            return
        made = before.get("settings", {})
        names = [n for n in {**made, **settings} if made.get(n) != settings.get(n)]
        if names:
            changes = "; ".join(f"{n} {brief(made.get(n))}, now {brief(settings.get(n))}" for n in names)
            raise expected(
                "--output",
                f"the settings that {brief(self.home, 300)} was begun with",
                changes,
                "Repeat them, or choose another output.",
            )

    def record(self) -> dict[str, Any]:
        """Return what :meth:`begin` wrote; nothing before that."""
        return read_record(self.home / RECORD)

    def _sidecar(self, part: str) -> Path:
        return self.home / PARTS / f"{part}.json"

    def finish(self, part: str, root: Path, files: Iterable[Path], facts: dict[str, Any]) -> None:
        """Let a part's files reach the disk, and write its sidecar.

        Args:
            part: its name.
            root: the folder that holds its files.
            files: those files; one that does not exist holds nothing but background.
            facts: what else to remember of it.
        """
        digests = {}
        for file in files:
            if file.exists():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                digests[str(file.relative_to(root))] = digest_file(file)
            else:
                digests[str(file.relative_to(root))] = None
        write_json(self._sidecar(part), {**facts, "files": digests})

    def finished(self, part: str, root: Path) -> dict[str, Any] | None:
        """Return a part's sidecar if its files are what it says, else None."""
        sidecar = read_record(self._sidecar(part))
        if not isinstance(sidecar.get("files"), dict):
            return None
        for name, digest in sidecar["files"].items():
            file = root / name
            if (digest_file(file) if file.exists() else None) != digest:
                return None
        return sidecar


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Let one process at a time make the final files, where the system can lock them; the end of a process unlocks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (home / LOCK).open("w") as file:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_folder(folder: Path) -> None:
    """Make a folder.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{brief(folder, 500)}: cannot be made a folder ({error.strerror or error})."
        ) from error
