"""What made a file, and what is known of one: digests, and records in JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, brief
from .images import write_atomically


def digest_file(path: Path) -> str:
    """Digest of a file's bytes, or of all files in a folder with their names.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    buffer = memoryview(bytearray(1 << 20))
    try:
        for file in files:
            if path.is_dir():
                digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer):
                    digest.update(buffer[:count])
    except OSError as error:
        raise InputError(f"{brief(path, 500)}: cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def digest_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of tensors: names, dtypes, shapes and values; of a model, those of its ``state_dict().items()``."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: missing, unreadable, or no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{brief(path, 500)}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{brief(path, 500)}: is no JSON ({error}).") from error


def read_record(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds; an empty one if it is missing or broken."""
    try:
        value = read_json(path)
    except InputError:
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all, and let it reach the disk."""
    text = json.dumps(value, indent=1) + "\n"

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)


def byte_size(count: float) -> str:
    """Show a number of bytes in a message."""
    unit, size = next(
        (u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if count >= s or s == 2**10
    )
    return f"{count / size:,.1f} {unit}"
