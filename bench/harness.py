"""Measure providers of the same result side by side: accuracy first, then time, beside the machine's peaks.

A *provider* is a named callable. All providers of a case are judged against float64 before anything is timed;
one whose error exceeds :data:`ERROR_LIMIT` times that of plain eager PyTorch gets no time. The others run
round robin with probes of the machine's peaks (matrix product, memory copy), so that noise hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitup_fast import InputError, ViTUpConfig, __version__
from vitup_fast.errors import expected
from vitup_fast.ops.primitives import linear, pack
from vitup_fast.testing import (
    OPERATIONS,
    Arguments,
    Sizes,
    cast,
    differentiable_tensors,
    relative_error,
    tensors_of,
    with_tensors,
)

# How many times the error of plain eager PyTorch a provider may have.
ERROR_LIMIT = 1.5
# A backward pass costs two matrix products for each of the forward pass; recomputation is not counted.
BACKWARD_FACTOR = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Run = Callable[[], Tensor | Sequence[Tensor]]
Stopwatch = Callable[[Run], float]


class Work(NamedTuple):
    """What a task needs at the least, however it is done.

    Attributes:
        flops: floating-point operations of its matrix products.
        bytes: bytes read and written once.
    """

    flops: float
    bytes: float = 0.0


@dataclass(frozen=True)
class Peaks:
    """What the machine reached in the same run.

    Attributes:
        matrix: rate of the fastest matrix product in FLOP/s.
        matrix_probe: which call that was.
        copy: rate of a memory copy in bytes/s, read plus written.
    """

    matrix: float
    matrix_probe: str
    copy: float

    def least_seconds(self, work: Work) -> float:
        """Time of the work at these peaks, computation and traffic overlapping."""
        return max(work.flops / self.matrix, work.bytes / self.copy)


@dataclass(frozen=True)
class Case:
    """One result and those who provide it.

    Attributes:
        title: what is computed.
        count: units per run, for the rate.
        unit: name of these units.
        work: what the result needs at the least.
        eager: plain PyTorch in the same dtype: a provider, and the yardstick of accuracy.
        providers: the others; each returns the same tensors as ``eager``.
        exact: the same tensors in float64 from the same inputs, widened.
        baseline: provider to which times are compared.
        device: where it runs.
        dtype: compute type.
        detail: further facts for the report.
    """

    title: str
    count: int
    unit: str
    work: Work
    eager: Run
    providers: Mapping[str, Run]
    exact: Run
    baseline: str
    device: torch.device
    dtype: torch.dtype
    detail: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What is known of one provider; times are None if it is too inaccurate to be timed.

    Attributes:
        provider: its name.
        error: largest relative error of its tensors against float64.
        error_ratio: largest error in units of eager's for the same tensor, up to :data:`ERROR_LIMIT`.
        accurate: whether it passed.
        seconds: median time of a run.
        fastest_seconds: least time of a run.
        rate: units per second.
        speedup: how many times faster than the baseline, by medians.
        fraction_of_peak: least time of the work at the measured peaks, as a fraction of the median.
    """

    provider: str
    error: float
    error_ratio: float
    accurate: bool
    seconds: float | None = None
    fastest_seconds: float | None = None
    rate: float | None = None
    speedup: float | None = None
    fraction_of_peak: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything measured in one case, ready for the terminal or JSON."""

    title: str
    dtype: str
    device: str
    threads: int
    versions: dict[str, str]
    count: int
    unit: str
    work: dict[str, float]
    repeats: int
    baseline: str
    peaks: Peaks
    detail: dict[str, object]
    rows: list[Row]

    def table(self) -> str:
        """Lay the report out for a terminal."""
        work = Work(**self.work)
        facts = ", ".join(f"{name} {value}" for name, value in self.detail.items())
        lines = [
            f"{self.title}, {self.dtype}: {work.flops / 1e9:.2f} GFLOP, {work.bytes / 1e6:.1f} MB"
            + (f" ({facts})" if facts else ""),
            f"  {self.device}; matrix peak {self.peaks.matrix / 1e9:.0f} GFLOP/s "
            f"({self.peaks.matrix_probe}), copy {self.peaks.copy / 1e9:.1f} GB/s; {self.repeats} rounds",
            f"  {'provider':<24}{'median ms':>10}{'min ms':>10}{self.unit + '/s':>14}"
            f"{'x ' + self.baseline:>12}{'% of peak':>11}{'error':>11}{'x eager':>9}",
        ]
        for row in self.rows:
            accuracy = f"{row.error:>11.2e}{row.error_ratio:>9.2f}"
            if row.seconds is None:
                lines.append(f"  {row.provider:<24}{f'inaccurate: over {ERROR_LIMIT} x eager':>57}{accuracy}")
                continue
            speedup = f"{row.speedup:.2f}" if row.speedup is not None else "-"
            lines.append(
                f"  {row.provider:<24}{1e3 * row.seconds:>10.2f}{1e3 * row.fastest_seconds:>10.2f}"
                f"{row.rate:>14.0f}{speedup:>12}{100 * row.fraction_of_peak:>11.1f}{accuracy}"
            )
        return "\n".join(lines)


def cpu_stopwatch(run: Run) -> float:
    """Time one run on the CPU in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_stopwatch(device: torch.device) -> Stopwatch:
    """Return a stopwatch for a GPU that starts every run with a cold L2 cache.

    The flush also keeps the GPU busy while the CPU launches the run, so that launch latency counts only where
    it exceeds the GPU's work.
    """
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * cache_bytes, 1 << 26), dtype=torch.int8, device=device)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time_one(run: Run) -> float:
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            flush.zero_()
            start.record()
            run()
            stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return time_one


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return the stopwatch of a device."""
    return cuda_stopwatch(device) if device.type == "cuda" else cpu_stopwatch


def interleave(
    runs: Mapping[str, Run], stopwatch: Stopwatch, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time all runs round robin: each once, then each once again, and so on.

    Returns:
        Seconds of the ``repeats`` rounds after ``warmup`` uncounted ones, per name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + repeats):
        for name, run in runs.items():
            seconds = stopwatch(run)
            if i >= warmup:
                times[name].append(seconds)
    return times


def peak_probes(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Run, Work]]:
    """Return runs that show what the machine can do, with their work: products in ``dtype``, and a copy."""
    size, copied = (8192, 1 << 29) if device.type == "cuda" else (2048, 1 << 27)
    x, weight = torch.randn(2, size, size, device=device).to(dtype).unbind()
    packed, transposed = pack(weight), weight.t()
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    product = Work(flops=2 * size**3)
    probes: dict[str, tuple[Run, Work]] = {
        "torch.mm": (lambda: torch.mm(x, transposed), product),
        "F.linear": (lambda: F.linear(x, weight), product),
        "memory copy": (lambda: target.copy_(source), Work(0, 2 * copied)),
    }
    if packed is not weight:
        probes["oneDNN, packed"] = (lambda: linear(x, packed, None), product)
    return probes


def tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a provider's result, in the dtype they came in."""
    return [result] if isinstance(result, Tensor) else list(result)


def judge(provider: str, result: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> Row:
    """Compare a provider's tensors with float64, in units of eager's error, or of rounding if larger."""
    errors, ratios = [], []
    for actual, plain, truth in zip(result, eager, exact, strict=True):
        rounding = relative_error(truth.to(plain.dtype), truth)
        shaped = actual.shape == truth.shape and actual.dtype == plain.dtype
        error = relative_error(actual, truth) if shaped else math.inf
        allowed = max(relative_error(plain, truth), rounding, torch.finfo(torch.float64).tiny)
        errors.append(error)
        ratios.append(error / allowed)
    # A NaN is an error of the worst kind; max alone may miss it.
    worst = math.inf if any(math.isnan(r) for r in ratios) else max(ratios)
    error = math.inf if any(math.isnan(e) for e in errors) else max(errors)
    return Row(provider, error, worst, worst <= ERROR_LIMIT)


def measure(case: Case, repeats: int, stopwatch: Stopwatch | None = None) -> Report:
    """Judge every provider of a case, then time those that passed and the machine's peaks side by side."""
    exact = [t.to(torch.float64) for t in tensors(case.exact())]
    providers = {"eager": case.eager, **case.providers}
    eager = tensors(case.eager())
    judged = [judge(name, tensors(run()), eager, exact) for name, run in providers.items()]
    del exact, eager
    probes = peak_probes(case.device, case.dtype)
    runs = {f"peak: {name}": run for name, (run, _) in probes.items()}
    runs.update({row.provider: providers[row.provider] for row in judged if row.accurate})
    times = interleave(runs, stopwatch or stopwatch_for(case.device), repeats)

    fastest = {name: min(times[f"peak: {name}"]) for name in probes}
    rates = {n: work.flops / fastest[n] for n, (_, work) in probes.items() if work.flops}
    probe = max(rates, key=rates.__getitem__)
    copy = probes["memory copy"][1].bytes / fastest["memory copy"]
    peaks = Peaks(rates[probe], probe, copy)
    baseline = statistics.median(times[case.baseline]) if case.baseline in times else None

    def timed(row: Row) -> Row:
        if not row.accurate:
            return row
        seconds = statistics.median(times[row.provider])
        return Row(
            row.provider,
            row.error,
            row.error_ratio,
            row.accurate,
            seconds=seconds,
            fastest_seconds=min(times[row.provider]),
            rate=case.count / seconds,
            speedup=None if baseline is None else baseline / seconds,
            fraction_of_peak=peaks.least_seconds(case.work) / seconds,
        )

    return Report(
        title=case.title,
        dtype=str(case.dtype).removeprefix("torch."),
        device=device_name(case.device),
        threads=torch.get_num_threads(),
        versions=versions(),
        count=case.count,
        unit=case.unit,
        work=case.work._asdict(),
        repeats=repeats,
        baseline=case.baseline,
        peaks=peaks,
        detail=dict(case.detail),
        rows=[timed(row) for row in judged],
    )


def versions() -> dict[str, str]:
    """Versions of all that a figure depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "vitup_fast": __version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name in the same directory, then rename: nobody sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def publish(reports: Sequence[Report], path: Path | None) -> None:
    """Print the tables, and write the reports to a JSON file if one is asked for."""
    print("\n\n".join(report.table() for report in reports))
    if path is not None:
        write_json(path, [asdict(report) for report in reports])


def make_parser(description: str) -> argparse.ArgumentParser:
    """Create the parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add(
        "--preset",
        choices=("dinov3_splus", "dinov3_base", "tiny"),
        default="dinov3_splus",
        help="sizes (default: S+)",
    )
    add(
        "--queries",
        type=int,
        help="queries (default: 3136 on the CPU, 200704 on a GPU, a quarter if --quick)",
    )
    add(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        default=["float32", "bfloat16"],
        help="compute types (default: float32 and bfloat16)",
    )
    add("--repeats", type=int, help="timed rounds (default: 15, 3 if --quick)")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    add("--backward", action="store_true", help="forward and backward pass together")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--quick", action="store_true", help="a smaller case and fewer rounds")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the shared options: a device in ``device``, dtypes in ``dtype``, sizes in ``config``.

    Raises:
        InputError: a device that is not there, a count below 1, a JSON path that cannot be written.
    """
    options = parser.parse_args(argv)
    options.device = check_device(options.device)
    options.dtype = [DTYPES[name] for name in options.dtype]
    options.config = ViTUpConfig.preset(options.preset)
    if options.queries is None:
        options.queries = (200704 if options.device.type == "cuda" else 3136) // (4 if options.quick else 1)
    if options.repeats is None:
        options.repeats = 3 if options.quick else 15
    for name in ("queries", "repeats"):
        if getattr(options, name) < 1:
            raise expected(f"--{name}", "a positive integer", getattr(options, name))
    if options.json is not None:
        check_writable(options.json)
    return options


def check_device(name: str) -> torch.device:
    """Return a device that a benchmark can run on.

    Raises:
        InputError: neither the CPU nor a GPU of this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise expected("--device", "cpu, cuda or cuda:N", repr(name)) from error
    if device.type not in ("cpu", "cuda"):
        raise expected("--device", "cpu, cuda or cuda:N", repr(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise expected(
            "--device", "a GPU of this machine", f"{name!r} with {torch.cuda.device_count()} GPUs visible"
        )
    return device


def check_writable(path: Path) -> None:
    """Check before the measurement that its result can be written.

    Raises:
        InputError: the path is a directory, or its parent is none or not writable.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise expected("--json", "a file in an existing, writable directory", repr(str(path)))


class OperationCase(NamedTuple):
    """One operation at one size.

    Attributes:
        operation: its key in :data:`vitup_fast.testing.OPERATIONS`.
        title: what is computed.
        sizes: sizes of its inputs.
        work: what its forward pass needs at the least.
    """

    operation: str
    title: str
    sizes: Sizes
    work: Work


def real_sizes(options: argparse.Namespace, expansion: int = 4) -> Sizes:
    """Sizes that an operation meets inside the network of a preset, for one image."""
    config = options.config
    return Sizes(1, options.queries, config.dim, config.num_heads, (28, 28), (224, 224), expansion)


def operation_case(
    case: OperationCase, device: torch.device, dtype: torch.dtype, backward: bool, compiled: bool
) -> Case:
    """Set up an operation: eager, compiled, ``torch``, and for inference ``torch`` with packed weights."""
    function, inputs = OPERATIONS[case.operation]
    arguments = inputs(case.sizes, torch.Generator().manual_seed(0), dtype=dtype, device=device)
    shape = function(**arguments).shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def runner(arguments: Arguments, impl: str, compiled: bool = False) -> Run:
        call = torch.compile(function, dynamic=False) if compiled else function
        if not backward:
            return torch.no_grad()(lambda: call(**arguments, impl=impl))
        # The definition does not read the table of film_mlp.
        leaves = {
            name: t.clone().requires_grad_()
            for name, t in differentiable_tensors(arguments).items()
            if not name.startswith("table.")
        }
        arguments = with_tensors(arguments, leaves)

        def run() -> list[Tensor]:
            output = call(**arguments, impl=impl)
            grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
            return [output.detach(), *grads]

        return run

    providers = {"compiled": runner(arguments, "reference", compiled=True)} if compiled else {}
    providers["torch"] = runner(arguments, "torch")
    packed = {n: pack(t) for n, t in tensors_of(arguments).items() if t.dim() == 2 and "weight" in n}
    if not backward and any(t.is_mkldnn for t in packed.values()):
        providers["torch, packed"] = runner(with_tensors(arguments, packed), "torch")
    factor = BACKWARD_FACTOR if backward else 1
    return Case(
        title=case.title + (", forward and backward" if backward else ""),
        count=case.sizes.B * case.sizes.N,
        unit="queries",
        work=Work(*(factor * x for x in case.work)),
        eager=runner(arguments, "reference"),
        providers=providers,
        exact=runner(cast(arguments, torch.float64), "reference"),
        baseline="compiled" if compiled else "eager",
        device=device,
        dtype=dtype,
        detail={"N": case.sizes.N, "D": case.sizes.D},
    )


def operation_main(
    description: str,
    cases: Callable[[argparse.Namespace, int], Sequence[OperationCase]],
    argv: Sequence[str] | None,
) -> int:
    """Run an operation's command line; ``cases(options, bytes per number)`` lists what to measure."""
    options = parse(make_parser(description), argv)
    reports = [
        measure(
            operation_case(case, options.device, dtype, options.backward, options.compile), options.repeats
        )
        for dtype in options.dtype
        for case in cases(options, dtype.itemsize)
    ]
    publish(reports, options.json)
    return 0


def exit_code(main: Callable[[], int]) -> int:
    """Run a command; a user's mistake becomes one sentence on the error stream and exit code 2."""
    try:
        return main()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
