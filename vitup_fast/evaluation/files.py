"""What evaluations keep: digests, tables, and results that outlive an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError, brief
from ..images import write_atomically

T = TypeVar("T")


def shown(path: str | os.PathLike[str]) -> str:
    """Show a path in a message."""
    return brief(path, 500)


def digest(*parts: object) -> str:
    """Return a short digest of files (paths) and other values (as JSON)."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        try:
            found.update(part.read_bytes() if isinstance(part, Path) else json.dumps(part).encode())
        except OSError as error:
            raise InputError(f"{shown(part)}: cannot be read ({error.strerror or error}).") from error
        found.update(b"\0")
    return found.hexdigest()


class Journal:
    """Results of finished steps, kept in a file, so that a run that was cut off goes on where it was.

    Args:
        path: a JSON-lines file; None keeps nothing.
        settings: what the results depend on; a file that was made with others is started anew, with a warning.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.done = path, {}
        if path is None:
            return
        settings = json.loads(json.dumps(settings))
        before, self.done = self._read()
        if before != settings:
            if before is not None:
                changed = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
                warnings.warn(
                    f"{shown(path)}: made with other settings ({', '.join(changed)}); starting anew.",
                    stacklevel=2,
                )
            self.done = {}
        lines = [json.dumps(settings), *(json.dumps(entry) for entry in self.done.items())]
        write_atomically(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", "utf-8"))

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return settings and results of a former run; what its end cut off is left out."""
        try:
            first, *rest = self.path.read_text("utf-8").splitlines()
            settings, done = json.loads(first), {}
        except (OSError, ValueError):
            return None, {}
        for line in rest:
            try:
                key, value = json.loads(line)
            except ValueError:
                break
            done[key] = value
        return settings, done

    def __call__(self, key: str, compute: Callable[[], T]) -> T:
        """Return the result of a step (numbers, text, lists and dicts), computing it if it is not there."""
        if key not in self.done:
            value = compute()
            if self.path is not None:
                try:
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([key, value]) + "\n")
                except OSError as error:
                    raise InputError(
                        f"{shown(self.path)}: cannot be written ({error.strerror or error})."
                    ) from error
            self.done[key] = value
        return self.done[key]

    def finish(self) -> None:
        """Remove the file: the results are elsewhere now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Draw a table in Markdown, numbers with three digits after the point."""
    lines = [header, ["---"] * len(header)]
    lines += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
