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
from typing import Any, NamedTuple

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
from vitup_fast.bench.launches import CALLS, network_launches
from vitup_fast.kernels.triton import bilinear_sample, common, film_mlp, linear
from vitup_fast.kernels.triton import rope_cross_attention as attention

from vitup_fast import ViTUpConfig
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


class Coverage(NamedTuple):
    """Networks and calls whose launches are compiled."""

    presets: tuple[str, ...]
    calls: tuple[str, ...]


_ALL, _INFERENCE = tuple(CALLS), tuple(name for name in CALLS if name != "training")
# What the report covers: the shipped settings in the sizes that the goals name, on the GPUs of three generations.
COVERED = {
    ("bfloat16", 90): Coverage(("dinov3_splus", "dinov3_base"), _ALL),
    ("bfloat16", 80): Coverage(("dinov3_splus",), _ALL),
    ("bfloat16", 100): Coverage(("dinov3_splus",), _INFERENCE),
    # With 100 KiB of shared memory; 8.9 has the settings of 8.6.
    ("bfloat16", 86): Coverage(("dinov3_splus",), ("dense 448", "scattered 4096")),
    ("bfloat16", 120): Coverage(("dinov3_splus",), ("dense 448", "scattered 4096")),
    ("float16", 90): Coverage(("dinov3_splus",), _INFERENCE),
    ("float32", 90): Coverage(("dinov3_splus",), _INFERENCE),
}
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_MATRIX = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCOMMA": "tcgen05", "HMMA": "mma"}


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
        elif not kernel.params[kernel.arg_names.index(name)].do_not_specialize and value % 16:
            raise expected(name, "a multiple of 16 where code depends on it", value)
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
        # Of the sizes given at run time, code depends on K alone, which is always a multiple of 64.
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
    """Every compilation that the launches of networks need, for selected dtypes and architectures."""
    found: dict[str, Unit] = {}
    for (dtype, sm), (presets, calls) in COVERED.items():
        for preset in presets if selected(dtype, sm) else ():
            recorded = network_launches(ViTUpConfig.preset(preset), getattr(torch, dtype), sm, calls)
            for launches in recorded.values():
                for launch in launches:
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


def compile_all(
    wanted: Sequence[Unit], workers: int, keep: Callable[[dict[str, dict[str, Any]]], None]
) -> dict[str, dict[str, Any]]:
    """Compile units side by side; entries by name, which ``keep`` is given as they come."""
    entries: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(workers) as pool:
        for number, (unit, result) in enumerate(zip(wanted, pool.map(compile_unit, wanted), strict=True), 1):
            entries[unit.name] = {"source": digest(unit), **result}
            print(f"[{number}/{len(wanted)}] {unit.name}: {summary(result)}", flush=True)
            keep(entries)
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
    dtypes, architectures = ({key[i] for key in COVERED} for i in (0, 1))
    add("--sm", nargs="+", type=int, choices=sorted(architectures), default=sorted(architectures))
    add("--dtype", nargs="+", choices=sorted(dtypes), default=sorted(dtypes))
    add("--kernel", help="only kernels whose name contains this")
    add("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise expected("--workers", "a positive integer", options.workers)
    version, report = triton_version(), read_report()
    known = report.get(version, {})
    everything = options.kernel is None and dtypes <= {*options.dtype} and architectures <= {*options.sm}
    chosen = [
        u
        for u in units(lambda dtype, sm: dtype in options.dtype and sm in options.sm)
        if options.kernel is None or options.kernel in u.kernel
    ]
    wanted = [u for u in chosen if options.recompile or not is_current(u, known.get(u.name))]
    failed = False
    if options.write:
        before = dict(known)
        known = compile_all(
            wanted, options.workers, lambda entries: write_report({**report, version: before | entries})
        )
        known = before | known
        if everything:  # what nothing launches any more goes
            known = {u.name: known[u.name] for u in chosen}
        write_report({**report, version: known})
    elif options.recompile:
        for name, entry in compile_all(wanted, options.workers, lambda entries: None).items():
            if known.get(name) != entry:
                failed = True
                print(f"differs from the report: {name}: {summary(entry)}")
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
