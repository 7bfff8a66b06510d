"""Compile the CUDA kernels of ``csrc/cuda`` for every architecture, without a GPU, and judge what came out.

``python -m vitup_fast.bench.cuda_report --write`` brings ``cuda_report.json`` up to date with the nvcc at hand; without
``--write`` the report is checked, which takes no nvcc: complete, made from the present sources, and without faults. A
fault is local memory inside a loop, a block that does not fit a multiprocessor, an instruction that should be there and
is not, or matrix instructions that ptxas serialised (C7510 - C7515).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vitup_fast.bench import compile_report
from vitup_fast.bench.command import exit_code, write_text

from vitup_fast.errors import MissingPackageError

REPORT = Path(__file__).parent / "cuda_report.json"
SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
# As CMakeLists.txt has them.
ARCHITECTURES = ("80", "90a", "100a", "120")
FLAGS = ("-std=c++17", "-O3")
# Where host and GPU shall agree bit by bit, multiply-adds are explicit.
EXACT = ("bilinear_sample.cu", "film_mlp.cu", "residual_mlp.cu")

Entry = dict[str, Any]


class Expectation(NamedTuple):
    """What a kernel shall be like.

    Attributes:
        threads: of a block.
        instructions: what its code shall hold.
        dynamic_shared: bytes of shared memory asked for at launch.
        only: architectures that it is written for; elsewhere it is empty.
    """

    threads: int
    instructions: tuple[str, ...] = ()
    dynamic_shared: int = 0
    only: tuple[str, ...] = ARCHITECTURES


# By the beginning of a kernel's name; the first that fits counts.
EXPECTATIONS: Mapping[str, Expectation] = {
    r"rows_kernel<\w+, Shape<\d+, \d+, true>": Expectation(128, ("LDG.E.128", "STG.E")),
    r"rows_kernel<": Expectation(128),
    r"segment_sum_kernel<\w+, Shape<\d+, \d+, true>": Expectation(256, ("LDG.E.128",)),
    r"segment_sum_kernel<": Expectation(256),
    r"(residual|film)_mlp_fp8_sm90_kernel": Expectation(
        384, ("QGMMA", "UTMALDG"), dynamic_shared=225280, only=("90a",)
    ),
    r"linear_sm90_kernel<\w+<256": Expectation(
        384, ("HGMMA.64x256x16", "UTMALDG.2D.MULTICAST"), dynamic_shared=197632, only=("90a",)
    ),
    r"linear_sm90_kernel<\w+<192": Expectation(
        384, ("HGMMA.64x192x16", "UTMALDG.2D.MULTICAST"), dynamic_shared=205824, only=("90a",)
    ),
    r"residual_mlp_sm90_kernel": Expectation(384, ("HGMMA", "UTMALDG"), dynamic_shared=222208, only=("90a",)),
    r"film_mlp_sm90_kernel": Expectation(
        384, ("HGMMA", "UTMALDG", "LDG.E.128"), dynamic_shared=222208, only=("90a",)
    ),
}


def digest(source: Path) -> str:
    """Digest of a source file, of all that it includes from its folder, and of the compiler's flags."""
    seen: dict[str, str] = {}

    def visit(path: Path) -> None:
        seen[path.name] = path.read_text()
        for name in re.findall(r'^#include "([^"]+)"', seen[path.name], re.M):
            if name not in seen and (path.parent / name).is_file():
                visit(path.parent / name)

    visit(source)
    return hashlib.sha256(json.dumps([flags(source), seen], sort_keys=True).encode()).hexdigest()[:16]


def flags(source: Path) -> list[str]:
    """What a source file is compiled with."""
    return [*FLAGS, *(["-fmad=false"] if source.name in EXACT else [])]


def expectation(kernel: str) -> Expectation | None:
    """What is expected of a kernel."""
    return next((e for pattern, e in EXPECTATIONS.items() if re.match(pattern, kernel)), None)


def demangled(names: Sequence[str]) -> list[str]:
    """Names of kernels as a person writes them, without namespaces and arguments."""
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    plain = (re.sub(r"vitup::\w+::|\(anonymous namespace\)::|^void ", "", line) for line in text.splitlines())
    return [re.sub(r" >", ">", name.split("(")[0]) for name in plain]


def compile_source(source: Path, architecture: str) -> dict[str, Entry]:
    """Compile one file for one architecture and describe its kernels; ``faults`` names what must not be."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            *("nvcc", *flags(source), f"-arch=sm_{architecture}", "-cubin"),
            *("-Xptxas=-v", "-o", cubin, source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        messages = done.stdout + done.stderr
        if done.returncode:
            lines = [line for line in messages.splitlines() if "error" in line] or messages.splitlines()[-1:]
            return {
                f"sm_{architecture} {source.stem} {source.name}": {
                    "source": digest(source),
                    "faults": [f"does not compile: {' '.join(lines)[:200]}"],
                }
            }
        code = compile_report.disassembled(cubin)
    entries = {}
    for mangled, kernel in zip(code, demangled(list(code)), strict=True):
        said = re.search(
            rf"Function properties for {re.escape(mangled)}\n\s*\d+ bytes stack frame, (\d+) bytes spill stores"
            r".*?Used (\d+) registers([^\n]*)",
            messages,
            re.S,
        )
        shared = re.search(r"(\d+) bytes smem", said[3])
        entries[f"sm_{architecture} {source.stem} {kernel}"] = {
            "source": digest(source),
            **judged(
                kernel,
                architecture,
                code[mangled],
                int(said[2]),
                int(said[1]),
                int(shared[1]) if shared else 0,
            ),
        }
    serialised = sorted(set(re.findall(r"C751[0-5]", messages)))
    for entry in entries.values():
        entry["faults"] += serialised
    return entries


def judged(
    kernel: str,
    architecture: str,
    code: Sequence[tuple[int, str]],
    registers: int,
    spilled: int,
    static_shared: int,
) -> Entry:
    """Describe a kernel's code and name its faults."""
    wanted = expectation(kernel)
    if wanted is None:
        return {"faults": ["bench/cuda_report.py does not say what is expected of it"]}
    limits = compile_report.ARCHITECTURES[int(architecture.rstrip("af"))]
    shared, faults = static_shared + wanted.dynamic_shared, []
    written_for = architecture in wanted.only
    local = compile_report.local_in_loops(code)
    if local:
        faults.append(f"{local} local-memory instructions inside loops")
    blocks = compile_report.blocks_that_fit(limits, registers, shared, wanted.threads)
    if written_for and (blocks == 0 or shared > limits.shared_per_block):
        faults.append("no block fits a multiprocessor")
    held = {word: sum(word in text for _, text in code) for word in wanted.instructions}
    if written_for:
        faults += [f"no {word}" for word, count in held.items() if count == 0]
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "blocks": blocks,
        "holds": held,
        "instructions": len(code),
        "faults": faults,
    }


def sources() -> list[Path]:
    """The files with kernels."""
    return sorted(SOURCES.glob("*.cu"))


def nvcc_version() -> str:
    """Major and minor version of nvcc.

    Raises:
        MissingPackageError: there is none.
    """
    if shutil.which("nvcc") is None:
        raise MissingPackageError("compiling CUDA kernels needs nvcc: install CUDA's toolkit, 12.8 or newer")
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def read_report() -> dict[str, dict[str, Entry]]:
    """The report as committed: entries by version of nvcc and kernel."""
    return json.loads(REPORT.read_text()) if REPORT.exists() else {}


def missing(entries: Mapping[str, Entry]) -> list[tuple[Path, str]]:
    """Files and architectures that these entries do not cover, or not as the sources are now."""
    found = []
    for source in sources():
        current = digest(source)
        for architecture in ARCHITECTURES:
            own = [e for n, e in entries.items() if n.split()[:2] == [f"sm_{architecture}", source.stem]]
            if not own or any(e["source"] != current or e["faults"] for e in own):
                found.append((source, architecture))
    return found


def summary(entry: Entry) -> str:
    """One entry in a few words."""
    if "registers" not in entry:
        return "; ".join(entry["faults"])
    text = (
        f"{entry['registers']} registers, {entry['spilled']} bytes spilled, {entry['shared'] >> 10} KiB shared, "
        f"{entry['blocks']} blocks"
    )
    return text + ("; FAULT: " + ", ".join(entry["faults"]) if entry["faults"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Check or write the report; exit code 1 if it is stale, incomplete or holds a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--write", action="store_true", help="compile what is new or changed and write the report")
    add("--recompile", action="store_true", help="compile everything anew and compare it with the report")
    add("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(argv)
    report = read_report()
    failed = False
    if options.write or options.recompile:
        version = nvcc_version()
        known = report.get(version, {})
        every = [(source, architecture) for source in sources() for architecture in ARCHITECTURES]
        units = every if options.recompile else missing(known)
        fresh: dict[str, Entry] = {}
        with ThreadPoolExecutor(options.workers) as pool:
            for entries in pool.map(lambda unit: compile_source(*unit), units):
                fresh |= entries
        if options.write:
            renewed = [[f"sm_{architecture}", source.stem] for source, architecture in units]
            stems = {source.stem for source in sources()}
            kept = {n: e for n, e in known.items() if n.split()[1] in stems and n.split()[:2] not in renewed}
            # The report speaks of one compiler alone.
            report = {version: {**kept, **fresh}}
            lines = (f"    {json.dumps(n)}: {json.dumps(e)}" for n, e in sorted(report[version].items()))
            write_text(REPORT, f"{{\n  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }\n}\n")
        else:
            # Another compiler than the report's may make other code, but no faults.
            for name, entry in fresh.items():
                if entry["faults"] or (known and known.get(name) != entry):
                    failed = True
                    print(f"differs from the report: {name}: {summary(entry)}")
            print(f"nvcc {version}: {len(fresh)} kernels compiled")
    entries = next(iter(report.values()), {})
    for source, architecture in missing(entries):
        failed = True
        print(f"not in the report, stale or faulty: {source.name} for sm_{architecture}")
    for name, entry in entries.items():
        if entry["faults"]:
            print(f"FAULT: {name}: {', '.join(entry['faults'])}")
    print(f"report of nvcc {next(iter(report), '?')}: {len(entries)} kernels, {'FAILED' if failed else 'ok'}")
    return int(failed)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(exit_code(main))
