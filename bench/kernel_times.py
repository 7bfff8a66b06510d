"""Where the time of a dense pass goes: the profiler's table of kernels, one pass per implementation.

``python -m vitup_fast.bench.kernel_times --device cuda --json kernels.json``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.harness import (
    DTYPES,
    PRESETS,
    check_device,
    check_implementations,
    device_name,
    versions,
    write_json,
)

from vitup_fast import ViTUpConfig
from vitup_fast.errors import expected
from vitup_fast.testing import random_image, random_network


@dataclass(frozen=True)
class KernelTimes:
    """Kernels of one dense pass, ``prepare`` included, the longest first.

    Attributes:
        title: what was computed, and by which implementation.
        device: where.
        versions: of all that the figures depend on.
        seconds: time in all kernels; on the CPU in all operators.
        kernels: per kernel its name, number of calls, and seconds of all calls.
    """

    title: str
    device: str
    versions: dict[str, str]
    seconds: float
    kernels: list[dict[str, str | int | float]]

    def table(self, rows: int = 30) -> str:
        """Lay the longest kernels out for a terminal."""
        lines = [f"{self.title}: {1e3 * self.seconds:.2f} ms in kernels, {self.device}"]
        lines.append(f"  {'ms':>9}{'share':>8}{'calls':>7}{'us/call':>10}  kernel")
        for kernel in self.kernels[:rows]:
            seconds, calls = kernel["seconds"], kernel["calls"]
            share = f"{100 * seconds / max(self.seconds, 1e-12):.1f} %"
            mean = 1e6 * seconds / calls
            lines.append(f"  {1e3 * seconds:>9.3f}{share:>8}{calls:>7}{mean:>10.1f}  {kernel['name'][:100]}")
        return "\n".join(lines)


def kernel_times(
    config: ViTUpConfig, side: int, impl: str, device: torch.device, dtype: torch.dtype
) -> KernelTimes:
    """Profile one dense pass of ``side`` x ``side`` queries after two that warm up."""
    generator = torch.Generator().manual_seed(0)
    net = random_network(config, generator, dtype=dtype, device=device)
    image = random_image(config, generator, dtype=dtype, device=device)

    def once() -> None:
        with torch.no_grad():
            net.dense(net.prepare(*image, impl=impl), (side, side), impl=impl)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once()
    once()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        once()
    kernels = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            kernels.append({"name": event.key, "calls": event.count, "seconds": spent / 1e6})
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    kind = str(dtype).removeprefix("torch.")
    return KernelTimes(
        title=f"ViT-Up D={config.dim}, dense {side} x {side}, {kind}, {impl}",
        device=device_name(device),
        versions=versions(),
        seconds=sum(kernel["seconds"] for kernel in kernels),
        kernels=kernels,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print; see ``--help``.

    Raises:
        InputError: a device or an implementation that is not there, a size below 1, a path that cannot be written.
    """
    parser = argparse.ArgumentParser(description="Kernel times of a dense pass.")
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--preset", nargs="+", choices=PRESETS, default=[PRESETS[0]], help="sizes (default: S+)")
    add("--side", type=int, default=448, help="rows and columns of the output (default: 448)")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="compute type (default: bfloat16)")
    add("--impl", nargs="+", metavar="NAME", help="implementations (default: all that run on the device)")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    options = parser.parse_args(argv)
    device = check_device(options.device)
    impls = check_implementations(options.impl, device)
    if options.side < 1:
        raise expected("--side", "a positive integer", options.side)
    if options.json is not None:
        check_writable(options.json)
    found = []
    for preset in options.preset:
        for impl in impls:
            config = ViTUpConfig.preset(preset)
            found.append(kernel_times(config, options.side, impl, device, DTYPES[options.dtype]))
            print(found[-1].table(), flush=True)
            if options.json is not None:
                write_json(options.json, [asdict(times) for times in found])
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
