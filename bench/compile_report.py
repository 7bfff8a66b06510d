"""Compile every kernel ahead of time for every architecture, without a GPU, and judge what came out.

``python -m vitup_fast.bench.compile_report --write`` brings ``compile_report.json`` up to date; without ``--write`` the
report is checked: complete, made from the present sources, and without faults. A fault is a register spill inside a
loop, shared memory or registers beyond the architecture, or matrix instructions that ptxas serialised (C7510 - C7515).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter compiles nothing

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from vitup_fast.bench.command import exit_code, write_text
from vitup_fast.kernels.triton import bilinear_sample, common, film_mlp, linear, norm_linear, residual_mlp
from vitup_fast.kernels.triton import rope_cross_attention as attention

from vitup_fast.errors import expected

REPORT = Path(__file__).parent / "compile_report.json"


@dataclass(frozen=True)
class Architecture:
    """Limits of a compute capability, in bytes and registers (CUDA C++ Programming Guide, table of capabilities)."""

    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int


ARCHITECTURES = {
    80: Architecture(163 << 10, 164 << 10, 2048),
    86: Architecture(99 << 10, 100 << 10, 1536),
    89: Architecture(99 << 10, 100 << 10, 1536),
    90: Architecture(227 << 10, 228 << 10, 2048),
    100: Architecture(227 << 10, 228 << 10, 2048),
    120: Architecture(99 << 10, 100 << 10, 1536),
}


def blocks_that_fit(limits: Architecture, registers: int, shared: int, threads: int) -> int:
    """Thread blocks that a multiprocessor holds at a time."""
    return min(
        65536 // (-(-registers // 8) * 8 * threads),
        limits.shared_per_multiprocessor // (shared + 1024),
        limits.threads_per_multiprocessor // threads,
    )


# What the report covers: every architecture in bfloat16, the commonest ones in the other dtypes as well.
DTYPES = {"bfloat16": tuple(ARCHITECTURES), "float32": (80, 90, 120), "float16": (80, 90)}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_MATRIX = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCOMMA": "tcgen05", "HMMA": "mma"}


def network_launches(dim: int, dtype: torch.dtype, target: int) -> list[common.Launch]:
    """Every launch of a forward and backward pass of a network of width ``dim`` with 28 x 28 tokens."""
    B, N, h, w, P, heads, M = 1, 8448, 28, 28, 224, dim // 64, 8448

    def empty(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    def mlp_weights(expansion: int) -> tuple[Tensor, ...]:
        hidden = expansion * dim
        return empty(dim), empty(dim), empty(hidden, dim), empty(hidden), empty(dim, hidden), empty(dim)

    float32 = torch.float32
    x, coords = empty(B, N, dim), empty(B, N, 2, like=float32)
    grid, tokens, key = empty(B, P, P, dim), empty(B, h, w, dim), empty(B, heads, h * w, 64)
    freqs, inv_freq = empty(16, like=float32), empty(16, like=float32)
    position = (empty(dim, 66), empty(dim), empty(2 * dim, dim), empty(2 * dim))
    table, index = empty(256, 2 * dim, like=float32), empty(N, like=torch.int64)
    norm, square = (empty(dim), empty(dim)), (empty(dim, dim), empty(dim))
    film = (*mlp_weights(4), *norm)
    scattered, gridded = (None, freqs, None, None), (table, None, index, index)
    with common.recorded_launches(("", target)) as launches:
        # Inference, as the schedule of the network launches it: moments come from the producer.
        moments = common.measure_moments(x.view(M, dim))
        bilinear_sample.sample(grid, coords, moments=bilinear_sample.sample_moments(grid, N))
        rows = x.view(M, dim)
        for expansion in (2, 4):
            layers = residual_mlp.fold_mlp(*mlp_weights(expansion))
            _, moments = residual_mlp.residual_mlp(rows, moments, layers, want_moments=True)
        query = attention.fold_query(*norm, *square, 64)
        attention.attend(x, moments, query, coords, key, key, inv_freq, (h, w))
        linear.linear(rows, linear.fold(*square), residual=rows, want_moments=True)
        for where, table_or_freqs in ((None, gridded), (coords, scattered)):
            source, _ = film_mlp.film_modulation(where, tokens, position, *table_or_freqs)
            film_mlp.film_mlp(
                x, tokens, source, residual_mlp.fold_mlp(*mlp_weights(4)), norm, want_moments=True
            )
        decoder = linear.fold(*square, *norm)
        linear.linear(rows, decoder, moments)
        head = linear.fold(empty(150, dim), empty(150), *norm)
        linear.linear(rows, head, moments)
        linear.linear_argmax(rows, head, moments, empty(M, like=torch.uint8))
        # Few queries.
        few, few_moments = rows[:100], moments[:100]
        layers = residual_mlp.fold_mlp(*mlp_weights(4))
        residual_mlp.residual_mlp(few, few_moments, layers, want_moments=True)
        linear.linear(few, linear.fold(*square), residual=few, want_moments=True)
        linear.linear(few, layers.first, few_moments, gelu=True)
        film_mlp.film_mlp(x[:, :100], tokens, source, layers, norm, want_moments=True)
        linear.linear(few, decoder, few_moments)
        # Training.
        bilinear_sample.backward(x, grid, coords, [True, True])
        residual_mlp.forward(x, *mlp_weights(4))
        residual_mlp.backward(x, x, *mlp_weights(4), [True] * 7)
        attended = (x, coords, key, key, *norm, *square, *square, inv_freq, h, w)
        attention.forward(*attended)
        attention.backward(x, *attended, [True] * 10)
        for width in (32, 128) if dim == 384 else ():
            key = empty(B, dim // width, h * w, width)
            inverse = empty(width // 4, like=float32)
            attention.backward(x, x, coords, key, key, *norm, *square, *square, inverse, h, w, [True] * 10)
        film_mlp.forward(x, coords, tokens, *position, *film, *scattered)
        film_mlp.backward(x, x, coords, tokens, *position, *film, *scattered, [True] * 15 + [False])
        none = (None,) * 4
        film_mlp.backward(
            x, x, None, tokens, *none, *film, *gridded, [True, False, True] + [False] * 4 + [True] * 9
        )
        norm_linear.forward(x, *norm, *square)
        norm_linear.backward(x, x, *norm, *square, [True] * 5)
    return launches


@dataclass(frozen=True)
class Unit:
    """One kernel with everything that decides its code."""

    kernel: str
    variant: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]
    sm: int

    @property
    def name(self) -> str:
        """What tells this unit from the others, for people."""
        constants = " ".join(f"{k}={_plain(v)}" for k, v in self.constants if k not in ("ACC",))
        options = " ".join(f"{k}={v}" for k, v in self.options)
        dtype = next((t for _, t in self.signature if t in ("*bf16", "*fp16")), "*fp32").removeprefix("*")
        return f"sm_{self.sm} {self.kernel} {dtype} {constants} {options}"


def _plain(value: object) -> object:
    """A constant as it is written in the report."""
    value = value.value if isinstance(value, tl.constexpr) else value
    return int(value) if isinstance(value, bool) else str(value) if isinstance(value, tl.dtype) else value


def unit_of(launch: common.Launch, sm: int) -> Unit:
    """The compilation that a launch needs."""
    kernel = launch.kernel
    options = {k: v for k, v in launch.options.items() if k in common.OPTIONS}
    constants = {k: v for k, v in launch.options.items() if k not in common.OPTIONS}
    arguments = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    signature = []
    for name in kernel.arg_names:
        if name in constants:
            continue
        value = arguments[name]
        if isinstance(value, Tensor):
            signature.append((name, _TYPES[value.dtype]))
        else:
            signature.append((name, "i32" if value < 2**31 else "i64"))
    return Unit(
        kernel.fn.__name__,
        launch.variant,
        tuple(signature),
        tuple(constants.items()),
        tuple(sorted(options.items())),
        sm,
    )


def kernel_named(name: str) -> JITFunction:
    """The kernel of a given function name."""
    for module in (common, linear, bilinear_sample, attention, film_mlp):
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(name)


def digest(unit: Unit) -> str:
    """Digest of all that decides a unit's code: its arguments, and the sources of its kernel and of what that uses."""
    seen: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        seen[function.fn.__name__] = function.src
        for word in set(re.findall(r"\w+", function.src)):
            used = function.fn.__globals__.get(word)
            if isinstance(used, JITFunction) and used.fn.__name__ not in seen:
                visit(used)
            elif isinstance(used, tl.constexpr):
                seen[word] = str(used.value)

    visit(kernel_named(unit.kernel))
    return hashlib.sha256(json.dumps([unit.signature, seen], sort_keys=True).encode()).hexdigest()[:16]


def disassembled(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction of each function in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", re.M)
    functions = (part.split("\n", 1) for part in text.split("Function : ")[1:])
    return {name.strip(): [(int(a, 16), t) for a, t in pattern.findall(body)] for name, body in functions}


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of every instruction of a cubin with one function."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = disassembled(Path(file.name)).values()
    return code


def loops(code: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """First and last address of every loop: a branch backwards and where it goes."""
    for address, text in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            yield int(branch[1], 16), address


def local_in_loops(code: Sequence[tuple[int, str]]) -> int:
    """Number of instructions inside loops that touch local memory."""
    inside = list(loops(code))
    return sum(
        bool(re.search(r"\b(LDL|STL)\b", text)) and any(a <= address <= b for a, b in inside)
        for address, text in code
    )


def ptxas_messages(ptx: str, sm: int, options: dict[str, int]) -> str:
    """What ptxas says of a kernel: registers, spills and warnings."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = f"sm_{sm}" + ("a" if sm >= 90 else "")
        command = [get_ptxas(sm).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        if "maxnreg" in options:
            command.insert(1, f"--maxrregcount={options['maxnreg']}")
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def compile_unit(unit: Unit) -> dict[str, Any]:
    """Compile one unit and describe the result; ``faults`` names what must not be."""
    kernel = kernel_named(unit.kernel)
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | dict(unit.signature)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        # K is the one size given at run time that is always a multiple of 64.
        if signature[name].startswith("*") or (name == "K" and signature[name] == "i32")
    }
    constants = {k: v.value if isinstance(v, tl.constexpr) else v for k, v in unit.constants}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(unit.options)
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", unit.sm, 32), options={**options, "enable_fp_fusion": True}
        )
    except Exception as error:  # whatever the compiler raises is the finding
        first = str(error).strip().splitlines()
        return {"faults": [f"does not compile: {type(error).__name__}: {' '.join(first[-3:])[:200]}"]}
    messages = ptxas_messages(compiled.asm["ptx"], unit.sm, options)
    code = instructions(compiled.asm["cubin"])
    limits, threads = ARCHITECTURES[unit.sm], 32 * compiled.metadata.num_warps
    registers = int(re.search(r"Used (\d+) registers", messages)[1])
    spills = [
        int(n) for n in re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", messages).groups()
    ]
    local = local_in_loops(code)
    matrix: dict[str, int] = {}
    for _, text in code:
        word = re.search(r"\b(HGMMA|UTCHMMA|UTCOMMA|HMMA)\b", text)
        if word:
            matrix[_MATRIX[word[1]]] = matrix.get(_MATRIX[word[1]], 0) + 1
    shared = compiled.metadata.shared
    blocks = blocks_that_fit(limits, registers, shared, threads)
    faults = []
    if local:
        faults.append(f"{local} local-memory instructions inside loops")
    if shared > limits.shared_per_block:
        faults.append(f"{shared} bytes of shared memory, {limits.shared_per_block} fit")
    elif blocks == 0:
        faults.append("no block fits a multiprocessor")
    faults += sorted(set(re.findall(r"C751[0-5]", messages)))
    dots = "tl.dot" in kernel.src or "attend_block" in kernel.src or "gradient_block" in kernel.src
    low = any(t in ("*bf16", "*fp16") for _, t in unit.signature)
    if dots and low and not matrix:
        faults.append("no matrix instructions")
    return {
        "registers": registers,
        "spilled": spills[0],
        "shared": shared,
        "blocks": blocks,
        "matrix": matrix,
        "instructions": len(code),
        "faults": faults,
    }


def units(selected: Callable[[str, int], bool] = lambda dtype, sm: True) -> list[Unit]:
    """Every compilation that the shipped settings need with this Triton, for selected dtypes and architectures."""
    found: dict[str, Unit] = {}
    for dtype, architectures in DTYPES.items():
        for sm in architectures:
            if not selected(dtype, sm):
                continue
            for dim in (384, 768):
                for launch in network_launches(dim, getattr(torch, dtype), sm):
                    unit = unit_of(launch, sm)
                    found.setdefault(unit.name, unit)
    return list(found.values())


def triton_version() -> str:
    """Major and minor version of the running Triton."""
    return ".".join(triton.__version__.split(".")[:2])


def read_report() -> dict[str, dict[str, dict[str, Any]]]:
    """The report as committed: entries by Triton version and unit."""
    return json.loads(REPORT.read_text()) if REPORT.exists() else {}


def write_report(report: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write the report, a line for each compilation."""
    blocks = []
    for version, entries in report.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))
        blocks.append(f"  {json.dumps(version)}: {{\n{lines}\n  }}")
    write_text(REPORT, "{\n" + ",\n".join(blocks) + "\n}\n")


def is_current(unit: Unit, entry: dict[str, Any] | None) -> bool:
    """Whether an entry of the report was made from the present source; faults are looked at again."""
    return entry is not None and not entry["faults"] and entry["source"] == digest(unit)


def compile_all(wanted: Sequence[Unit], workers: int) -> dict[str, dict[str, Any]]:
    """Compile units side by side; entries by name."""
    entries = {}
    with ProcessPoolExecutor(workers) as pool:
        for number, (unit, result) in enumerate(zip(wanted, pool.map(compile_unit, wanted), strict=True), 1):
            entries[unit.name] = {"source": digest(unit), **result}
            print(f"[{number}/{len(wanted)}] {unit.name}: {summary(result)}", flush=True)
    return entries


def summary(entry: dict[str, Any]) -> str:
    """One entry in a few words."""
    if "registers" not in entry:
        return "; ".join(entry["faults"])
    text = (
        f"{entry['registers']} registers, {entry['spilled']} bytes spilled, {entry['shared'] >> 10} KiB shared, "
        f"{entry['blocks']} blocks, {entry['matrix'] or 'no matrix instructions'}"
    )
    return text + ("; FAULT: " + ", ".join(entry["faults"]) if entry["faults"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Check or write the report; exit code 1 if it is stale, incomplete or holds a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--write", action="store_true", help="compile what is new or changed and write the report")
    add(
        "--recompile",
        action="store_true",
        help="compile everything selected anew and compare it with the report",
    )
    add("--sm", nargs="+", type=int, choices=tuple(ARCHITECTURES), default=list(ARCHITECTURES))
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    add("--kernel", help="only kernels whose name contains this")
    add("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise expected("--workers", "a positive integer", options.workers)
    version, report = triton_version(), read_report()
    known = report.get(version, {})
    every = units()
    chosen = [
        u
        for u in units(lambda dtype, sm: dtype in options.dtype and sm in options.sm)
        if options.kernel is None or options.kernel in u.kernel
    ]
    wanted = [u for u in chosen if options.recompile or not is_current(u, known.get(u.name))]
    failed = False
    if options.write or options.recompile:
        entries = compile_all(wanted, options.workers)
        if options.recompile and not options.write:
            for name, entry in entries.items():
                if known.get(name) != entry:
                    failed = True
                    print(f"differs from the report: {name}: {summary(entry)}")
        else:
            names = {u.name for u in every}
            known = {n: e for n, e in {**known, **entries}.items() if n in names}
            write_report({**report, version: known})
    else:
        for unit in wanted:
            failed = True
            print(f"not in the report, or stale: {unit.name}")
    for unit in chosen:
        entry = known.get(unit.name)
        if entry is not None and entry["faults"]:
            failed = True
            print(f"FAULT: {unit.name}: {', '.join(entry['faults'])}")
    print(
        f"Triton {version}: {len(chosen)} compilations, {len(wanted)} looked at, {'FAILED' if failed else 'ok'}"
    )
    return int(failed)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(exit_code(main))
