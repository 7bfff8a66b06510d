"""What the machine can do: products, multiply-adds and copies in one run, beside versions and implementations.

``python -m vitup_fast.bench.peaks --device cuda --json peaks.json``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.harness import (
    DTYPES,
    Work,
    check_device,
    device_name,
    interleave,
    multiply_adds_probe,
    peak_probes,
    peaks_of,
    stopwatch_for,
    versions,
    write_json,
)

from vitup_fast.errors import expected
from vitup_fast.ops import implementations


def rates_of(
    probes: Mapping[str, tuple[object, Work]], times: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """FLOP/s of every probe of products in its fastest run."""
    return {name: work.flops / min(times[name]) for name, (_, work) in probes.items() if work.flops}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see ``--help``.

    Raises:
        InputError: a device that is not there, no round, a path that cannot be written.
    """
    parser = argparse.ArgumentParser(description="Measured peaks of a device.")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9, help="rounds, of which the fastest counts")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    options = parser.parse_args(argv)
    device = check_device(options.device)
    if options.repeats < 1:
        raise expected("--repeats", "a positive integer", options.repeats)
    if options.json is not None:
        check_writable(options.json)
    found = {}
    for name in options.dtype:
        probes = peak_probes(device, DTYPES[name])
        times = interleave({n: run for n, (run, _) in probes.items()}, stopwatch_for(device), options.repeats)
        found[name] = peaks = peaks_of(probes, {n: min(seconds) for n, seconds in times.items()})
        rates = (f"{probe} {rate / 1e12:.3g}" for probe, rate in rates_of(probes, times).items())
        l2 = "" if peaks.l2 is None else f", within L2 {peaks.l2 / 1e9:.0f} GB/s"
        print(
            f"{device_name(device)}, {name}, TFLOP/s: {', '.join(rates)}; copy {peaks.copy / 1e9:.1f} GB/s{l2}",
            flush=True,
        )
    if device.type == "cpu" and any(impl.name == "cpu_int8" and impl.available for impl in implementations()):
        probes = {"multiply-adds": multiply_adds_probe(torch.float32, int8=True)}
        times = interleave({n: run for n, (run, _) in probes.items()}, stopwatch_for(device), options.repeats)
        rate = rates_of(probes, times)["multiply-adds"]
        print(f"{device_name(device)}, 8-bit integers, TOP/s: multiply-adds {rate / 1e12:.3g}", flush=True)
    if options.json is not None:
        content = {
            "device": device_name(device),
            "versions": versions(),
            "implementations": [impl._asdict() for impl in implementations()],
            "peaks": {name: asdict(peaks) for name, peaks in found.items()},
        }
        write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
