"""Measure providers of the same result side by side: accuracy first, then time, beside the machine's peaks.

A *provider* is a named callable. All providers of a case are judged against float64 before anything is timed;
one whose error exceeds :data:`ERROR_LIMIT` times that of plain eager PyTorch gets no time. The others run
round robin with probes of the machine's peaks (matrix product, memory copy, on a GPU also a copy within its L2
cache), so that noise hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from vitup_fast.bench.command import check_writable, write_text
from vitup_fast.bench.roofline import draw

from vitup_fast import ViTUpConfig, __version__, extension
from vitup_fast.errors import expected, require
from vitup_fast.ops import implementations
from vitup_fast.ops.implementations import GPU_NAMES, interpreted
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
# Implementations that compute in fewer bits than the dtype has pass by this cosine to float64 of every query instead.
COSINE_LIMITS = {"cpu_int8": 0.999, "cuda_fp8": 0.995}
# A backward pass costs two matrix products for each of the forward pass; recomputation is not counted.
BACKWARD_FACTOR = 3
# A median of more than this many times the least time is marked.
UNSTEADY = 1.3
# Rounds that are measured however long they take.
LEAST_ROUNDS = 3
# Providers that are not this library's.
YARDSTICKS = ("eager", "compiled", "reference", "reference, compiled")
PRESETS = ("dinov3_splus", "dinov3_base", "tiny")
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
        matrix: rate of the fastest matrix product, on a CPU or of multiply-adds alone, in FLOP/s.
        matrix_probe: which of these that was.
        copy: rate of a memory copy in bytes/s, read plus written.
        l2: the same of copies that stay in a GPU's L2 cache; None on the CPU.
    """

    matrix: float
    matrix_probe: str
    copy: float
    l2: float | None = None

    def least_seconds(self, work: Work) -> float:
        """Time of the work at these peaks, computation and traffic overlapping."""
        return max(work.flops / self.matrix, work.bytes / self.copy)


@dataclass(frozen=True)
class Goal:
    """What is aimed at for a case on one kind of device.

    Attributes:
        device: the device it is meant for.
        seconds: time of a run.
        floor: time of a run at the machine's matrix peak; None if nobody worked it out.
        speedup: how many times faster than the compiled reference.
        memory: bytes beyond output, weights and image cache.
    """

    device: str
    seconds: float | None = None
    floor: float | None = None
    speedup: float | None = None
    memory: int | None = None


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
        exact: what is judged, in float64 from the same inputs, widened.
        baseline: provider to which times are compared.
        device: where it runs.
        dtype: compute type.
        detail: further facts for the report.
        checks: per provider, how to get what ``exact`` returns, where its run returns something else.
        refused: providers that shall not run, with the reason.
        cache_bytes: memory of the image cache that every run fills, which its peak memory leaves out.
        goal: what is aimed at on this device.
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
    checks: Mapping[str, Run] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int = 0
    goal: Goal | None = None


@dataclass(frozen=True)
class Row:
    """What is known of one provider; times are None if it is too inaccurate to be timed, or fails.

    Attributes:
        provider: its name.
        error: largest relative error of its tensors against float64; None if there is no result.
        error_ratio: largest error in units of eager's for the same tensor, at most :data:`ERROR_LIMIT` to pass.
        accurate: whether it passed.
        failure: why there is no time.
        memory: on a GPU, peak bytes of a run beyond its result and the image cache.
        kept: on a GPU, bytes that the first run left allocated for later ones: folded weights, workspaces, graphs.
        seconds: median time of a run.
        fastest_seconds: least time of a run.
        quartiles: times below which a quarter and three quarters of the runs lie.
        rate: units per second.
        speedup: how many times faster than the baseline, by medians.
        fraction_of_peak: least time of the work at the measured peaks, as a fraction of the median.
    """

    provider: str
    error: float | None
    error_ratio: float | None
    accurate: bool
    failure: str | None = None
    memory: int | None = None
    kept: int | None = None
    seconds: float | None = None
    fastest_seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    rate: float | None = None
    speedup: float | None = None
    fraction_of_peak: float | None = None

    @property
    def unsteady(self) -> bool:
        """Whether the median says more about the machine's other work than about the provider."""
        return self.seconds is not None and self.seconds > UNSTEADY * self.fastest_seconds


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
    goal: Goal | None
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Whether every provider of this library was timed."""
        return all(row.failure is None for row in self.rows if row.provider not in YARDSTICKS)

    def table(self) -> str:
        """Lay the report out for a terminal."""
        work, peaks, goal = Work(**self.work), self.peaks, self.goal
        facts = ", ".join(f"{name} {value}" for name, value in self.detail.items())
        l2 = "" if peaks.l2 is None else f", L2 {peaks.l2 / 1e9:.0f} GB/s"
        lines = [
            f"{self.title}, {self.dtype}: {work.flops / 1e9:.2f} GFLOP, {work.bytes / 1e6:.1f} MB"
            + (f" ({facts})" if facts else ""),
            f"  {self.device}; matrix peak {peaks.matrix / 1e9:.0f} GFLOP/s "
            f"({peaks.matrix_probe}), copy {peaks.copy / 1e9:.1f} GB/s{l2}; {self.repeats} rounds",
        ]
        with_memory = any(row.memory is not None for row in self.rows)
        with_goal = goal is not None and goal.seconds is not None
        if goal is not None:
            lines.append("  " + goal_line(goal))
        lines.append(
            f"  {'provider':<24}{'median ms':>10}{'goal ms' if with_goal else '':>{10 * with_goal}}{'min ms':>10}"
            f"{'quartiles ms':>20}"
            f"{self.unit + '/s':>14}{'x ' + self.baseline:>{max(12, len(self.baseline) + 4)}}{'% of peak':>11}"
            f"{'MB beyond   MB kept' if with_memory else '':>{22 * with_memory}}{'error':>11}{'x eager':>9}"
        )
        for row in self.rows:
            accuracy = "" if row.error is None else f"{row.error:>11.2e}{row.error_ratio:>9.2f}"
            if row.seconds is None:
                lines.append(f"  {row.provider:<24}{row.failure} {accuracy}".rstrip())
                continue
            ours = row.provider not in YARDSTICKS
            aim = f"{1e3 * goal.seconds:>10.2f}" if with_goal and ours else " " * 10 * with_goal
            memory = f"{row.memory / 1e6:>12.1f}{row.kept / 1e6:>10.1f}" if row.memory is not None else ""
            speedup = f"{row.speedup:.2f}" if row.speedup is not None else "-"
            spread = " - ".join(f"{1e3 * quartile:.2f}" for quartile in row.quartiles)
            lines.append(
                f"  {row.provider:<24}{1e3 * row.seconds:>9.2f}{'!' if row.unsteady else ' '}{aim}"
                f"{1e3 * row.fastest_seconds:>10.2f}{spread:>20}{row.rate:>14.0f}"
                f"{speedup:>{max(12, len(self.baseline) + 4)}}"
                f"{100 * row.fraction_of_peak:>11.1f}{memory}{accuracy}"
            )
        if any(row.unsteady for row in self.rows):
            lines.append(f"  ! median over {UNSTEADY} x minimum: the machine has other work")
        return "\n".join(lines)


def goal_line(goal: Goal) -> str:
    """Put a goal in words, with units."""
    parts = []
    if goal.seconds is not None:
        floor = "" if goal.floor is None else f" (floor {1e3 * goal.floor:.1f})"
        parts.append(f"{1e3 * goal.seconds:.1f} ms{floor}")
    if goal.speedup is not None:
        parts.append(f"{goal.speedup} x the compiled reference")
    if goal.memory is not None:
        parts.append(f"{goal.memory / 1e6:.0f} MB beyond output, weights and image cache")
    return f"goal on {goal.device}: {', '.join(parts)}"


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
    runs: Mapping[str, Run],
    stopwatch: Stopwatch,
    repeats: int,
    warmup: int = 1,
    patience: float = math.inf,
) -> dict[str, list[float]]:
    """Time all runs round robin: each once, then each once again, and so on.

    Args:
        runs: what to time, by name.
        stopwatch: times one run.
        repeats: rounds to measure.
        warmup: rounds before them that do not count.
        patience: seconds after which no further round begins, once there are :data:`LEAST_ROUNDS`.

    Returns:
        Seconds of the measured rounds, per name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for i in range(warmup + repeats):
        if i >= warmup + LEAST_ROUNDS and time.perf_counter() - begin > patience:
            break
        for name, run in runs.items():
            seconds = stopwatch(run)
            if i >= warmup:
                times[name].append(seconds)
    return times


def peak_probes(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], Work]]:
    """Return runs that show what the machine can do, with their work: products in ``dtype``, and copies.

    On a CPU the compiled kernels' multiply-adds too, which wait for no memory: no product can be faster.
    """
    size, copied = (8192, 1 << 29) if device.type == "cuda" else (2048, 1 << 27)
    x, weight = torch.randn(2, size, size, dtype=torch.float32, device=device).to(dtype).unbind()
    packed, transposed = pack(weight), weight.t()
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    product = Work(flops=2 * size**3)
    probes: dict[str, tuple[Callable[[], object], Work]] = {
        "torch.mm": (lambda: torch.mm(x, transposed), product),
        "F.linear": (lambda: F.linear(x, weight), product),
        "memory copy": (lambda: target.copy_(source), Work(0, 2 * copied)),
    }
    if packed is not weight:
        probes["oneDNN, packed"] = (lambda: linear(x, packed, None), product)
    if device.type == "cuda":
        probes["L2 copy"] = l2_probe(device)
    elif extension.obstacle("cpu") is None:
        probes["multiply-adds"] = multiply_adds_probe(dtype)
    return probes


def multiply_adds_probe(dtype: torch.dtype, *, int8: bool = False) -> tuple[Callable[[], float], Work]:
    """Multiply-adds of the compiled kernels on operands that stay in registers, on every thread of PyTorch."""
    cpu, name = extension.load().cpu, str(dtype).removeprefix("torch.")

    def run(rounds: int = 1 << 19) -> float:
        return cpu.multiply_adds(name, int8, rounds, threads=torch.get_num_threads())

    return run, Work(flops=(1 << 19) * run(1))


def l2_probe(device: torch.device, copies: int = 64) -> tuple[Run, Work]:
    """Copy a buffer of a quarter of the L2 cache many times within one graph, so that no launch is waited for."""
    count = torch.cuda.get_device_properties(device).L2_cache_size // 16
    source = torch.randint(1 << 30, (count,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    torch.neg(source, out=target)  # loads the kernel, which a graph cannot record
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(copies):
            torch.neg(source, out=target)

    def replay() -> Tensor:
        graph.replay()
        return target

    return replay, Work(0, 2 * source.nbytes * copies)


def peaks_of(probes: Mapping[str, tuple[object, Work]], fastest: Mapping[str, float]) -> Peaks:
    """Turn the least seconds of every probe into peaks."""
    rates = {n: work.flops / fastest[n] for n, (_, work) in probes.items() if work.flops}
    best = max(rates, key=rates.__getitem__)
    copies = {n: work.bytes / fastest[n] for n, (_, work) in probes.items() if not work.flops}
    return Peaks(rates[best], best, copies["memory copy"], copies.get("L2 copy"))


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
    limit = COSINE_LIMITS.get(provider.partition(",")[0])
    if limit is None:
        accurate, missed = worst <= ERROR_LIMIT, f"over {ERROR_LIMIT} x eager"
    else:
        cosines = (F.cosine_similarity(a.to(t), t, dim=-1) for a, t in zip(result, exact, strict=True))
        accurate = math.isfinite(error) and all((c >= limit).all() for c in cosines)
        missed = f"a cosine to float64 below {limit}"
    return Row(provider, error, worst, accurate, None if accurate else f"inaccurate: {missed}")


def reason(error: Exception) -> str:
    """Name a failure in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def allocated(device: torch.device) -> int:
    """Return bytes of GPU memory in use by tensors, garbage collected; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(case: Case, run: Run) -> int:
    """Run once on a GPU and return the peak of allocated bytes beyond the result and the image cache."""
    before = allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    result = sum(t.nbytes for t in tensors(run()))
    torch.cuda.synchronize(case.device)
    return torch.cuda.max_memory_allocated(case.device) - before - result - case.cache_bytes


def judge_all(case: Case, providers: Mapping[str, Run]) -> list[Row]:
    """Judge every provider of a case; one that raises or runs out of memory gets a row that says so."""
    exact = [t.to(torch.float64) for t in tensors(case.exact())]
    checks = {**providers, **case.checks}
    eager = tensors(checks["eager"]())

    def row_of(name: str) -> Row:
        row = Row(name, None, None, False, case.refused.get(name))
        if row.failure is not None:
            return row
        before = allocated(case.device)
        try:
            row = judge(name, eager if name == "eager" else tensors(checks[name]()), eager, exact)
            if not row.accurate or case.device.type != "cuda":
                return row
            kept = allocated(case.device) - before
            return replace(row, memory=peak_memory(case, providers[name]), kept=kept)
        except Exception as error:
            return replace(row, failure=reason(error))

    return [row_of(name) for name in providers]


def measure(
    case: Case, repeats: int, stopwatch: Stopwatch | None = None, patience: float = math.inf
) -> Report:
    """Judge every provider of a case, then time those that passed and the machine's peaks side by side.

    Args:
        case: what to measure.
        repeats: rounds.
        stopwatch: None takes that of the device.
        patience: see :func:`interleave`.

    A provider that raises, runs out of memory or is refused becomes a row that says so; only the check of eager,
    the yardstick of accuracy, must not fail.
    """
    providers = {"eager": case.eager, **case.providers}
    judged = judge_all(case, providers)
    probes = peak_probes(case.device, case.dtype)
    runs = {f"peak: {name}": run for name, (run, _) in probes.items()}
    runs.update({row.provider: providers[row.provider] for row in judged if row.failure is None})
    times = interleave(runs, stopwatch or stopwatch_for(case.device), repeats, patience=patience)

    peaks = peaks_of(probes, {name: min(times[f"peak: {name}"]) for name in probes})
    baseline = statistics.median(times[case.baseline]) if case.baseline in times else None

    def timed(row: Row) -> Row:
        if row.failure is not None:
            return row
        seconds = statistics.median(times[row.provider])
        return replace(
            row,
            seconds=seconds,
            fastest_seconds=min(times[row.provider]),
            quartiles=quartiles(times[row.provider]),
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
        repeats=len(next(iter(times.values()))),
        baseline=case.baseline,
        peaks=peaks,
        detail=dict(case.detail),
        goal=case.goal,
        rows=[timed(row) for row in judged],
    )


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """Times below which a quarter and three quarters of the runs lie, interpolated between them."""
    if len(times) == 1:
        return times[0], times[0]
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, third


def versions() -> dict[str, str]:
    """Versions of all that a figure depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "vitup_fast": __version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["triton"] = importlib.metadata.version("triton")
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
    """Write indented JSON with :func:`write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def publish(reports: Iterable[Report], path: Path | None) -> int:
    """Print each table as it comes, and rewrite the JSON file with all reports so far if one is asked for.

    Returns:
        Exit code: 1 if a provider of this library failed or is inaccurate, else 0.
    """
    done: list[Report] = []
    for report in reports:
        done.append(report)
        print(("\n" if len(done) > 1 else "") + report.table(), flush=True)
        if path is not None:
            write_json(path, [asdict(r) for r in done])
    return 0 if all(report.passed for report in done) else 1


def make_parser(description: str, gpu_queries: int = 50176) -> argparse.ArgumentParser:
    """Create the parser with the options that all benchmarks share, and its default of queries on a GPU."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add(
        "--preset",
        nargs="+",
        choices=PRESETS,
        default=[PRESETS[0]],
        help="sizes (default: S+)",
    )
    add("--dim", type=int, metavar="D", help="another width than the preset's")
    add("--heads", type=int, metavar="N", help="as many heads (default: of 64 channels each, with --dim)")
    add("--depths", nargs="+", type=int, metavar="I", help="other depths than the preset's, ascending from 0")
    add(
        "--queries",
        type=int,
        help=f"queries (default: 3136 on the CPU, {gpu_queries} on a GPU, a quarter if --quick)",
    )
    parser.set_defaults(gpu_queries=gpu_queries)
    add(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        default=["float32", "bfloat16"],
        help="compute types (default: float32 and bfloat16)",
    )
    add("--impl", nargs="+", metavar="NAME", help="implementations (default: all that run on the device)")
    add("--correctness", type=Path, metavar="PATH", help="time nothing that failed in this file of checks")
    add("--repeats", type=int, help="timed rounds (default: 15, 3 if --quick)")
    add("--seconds", type=float, default=60.0, help="begin no further round after these (default: 60)")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    add("--roofline", type=Path, metavar="PATH", help="draw the figures under the measured roofs (PNG)")
    add("--backward", action="store_true", help="forward and backward pass together")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--quick", action="store_true", help="a smaller case and fewer rounds")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the shared options.

    Returns:
        The options, with a device in ``device``, dtypes in ``dtype``, sizes per preset in ``configs``, names in
        ``impl``, and in ``failed`` what :func:`failed_checks` read.

    Raises:
        InputError: a device that is not there, a count below 1, an implementation that does not run there, a
            path that cannot be read or written.
        MissingPackageError: a roofline is asked for and matplotlib is not installed.
    """
    options = parser.parse_args(argv)
    options.device = check_device(options.device)
    options.dtype = [DTYPES[name] for name in options.dtype]
    options.configs = {name: configuration(name, options) for name in options.preset}
    options.impl = check_implementations(options.impl, options.device)
    options.failed = failed_checks(options.correctness)
    if options.queries is None:
        options.queries = (options.gpu_queries if options.device.type == "cuda" else 3136) // (
            4 if options.quick else 1
        )
    if options.repeats is None:
        options.repeats = 3 if options.quick else 15
    for name in ("queries", "repeats"):
        if getattr(options, name) < 1:
            raise expected(f"--{name}", "a positive integer", getattr(options, name))
    for name in ("json", "roofline"):
        if getattr(options, name) is not None:
            check_writable(getattr(options, name), f"--{name}")
    if options.roofline is not None:  # better told now than after the measurement
        require("matplotlib", "bench", "--roofline")
    return options


def configuration(preset: str, options: argparse.Namespace) -> ViTUpConfig:
    """Sizes of a preset, with what ``--dim``, ``--heads`` and ``--depths`` say instead.

    Raises:
        InputError: sizes that do not fit each other.
    """
    config = ViTUpConfig.preset(preset)
    if options.dim is None and options.heads is None and options.depths is None:
        return config
    heads = config.num_heads if options.dim is None else max(1, options.dim // 64)
    return ViTUpConfig(
        dim=config.dim if options.dim is None else options.dim,
        num_heads=heads if options.heads is None else options.heads,
        layer_indices=config.layer_indices if options.depths is None else options.depths,
    )


def check_implementations(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """Return implementations to measure: those named, or all that run on the device.

    Raises:
        InputError: a name that is none, or an implementation that does not run there.
    """
    obstacles = {
        impl.name: None if impl.available else impl.reason
        for impl in implementations()
        if impl.name != "reference"
    }
    for name, why in obstacles.items():
        if device.type == "cuda" and name.startswith("cpu"):
            obstacles[name] = "runs on a CPU"
        # The interpreter runs what is asked for.
        elif device.type == "cpu" and name in GPU_NAMES and not (names and interpreted()):
            obstacles[name] = why or "runs on a GPU"
    for name in names or ():
        if name not in obstacles:
            raise expected("--impl", f"one of {sorted(obstacles)}", repr(name))
        if obstacles[name] is not None:
            raise expected("--impl", f"an implementation for {device}", f"{name!r}: {obstacles[name]}")
    if names:
        return list(names)
    return [n for n, obstacle in obstacles.items() if obstacle is None and n not in COSINE_LIMITS]


class FailedCheck(NamedTuple):
    """A check of ``vitup_fast.bench.correctness`` that failed; see its ``Check``."""

    operation: str
    impl: str
    dtype: str
    direction: str
    width: int | None


def failed_checks(path: Path | None) -> frozenset[FailedCheck]:
    """Read which checks of ``vitup_fast.bench.correctness`` failed.

    Raises:
        InputError: not a file that the checks wrote.
    """
    if path is None:
        return frozenset()
    try:
        checks = json.loads(path.read_text())["checks"]
        return frozenset(FailedCheck(*(c[f] for f in FailedCheck._fields)) for c in checks if not c["passed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise expected("--correctness", "a JSON file of vitup_fast.bench.correctness", str(path)) from error


def refusals(options: argparse.Namespace, operation: str, dtype: torch.dtype, width: int) -> dict[str, str]:
    """Say why implementations shall not be timed: because this operation's own check failed at this width.

    Args:
        options: with ``failed``, ``impl`` and ``backward``.
        operation: its name, or ``"network"``.
        dtype: compute type.
        width: feature width D.
    """
    name = str(dtype).removeprefix("torch.")
    directions = ("forward", "backward") if options.backward else ("forward",)
    found = {}
    for failed in sorted(options.failed, key=str):
        own = (failed.operation, failed.dtype, failed.width) == (operation, name, width)
        if own and failed.impl in options.impl and failed.direction in directions:
            found[failed.impl] = f"failed the {failed.direction} check of {operation} at D = {width}"
    return found


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


def real_sizes(config: ViTUpConfig, queries: int, expansion: int = 4) -> Sizes:
    """Sizes that an operation meets inside the network, for one image."""
    return Sizes(1, queries, config.dim, config.num_heads, (28, 28), (224, 224), expansion)


def operation_case(
    case: OperationCase,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    compiled: bool = True,
    impls: Sequence[str] = ("torch",),
    refused: Mapping[str, str] | None = None,
) -> Case:
    """Set up an operation: eager, compiled, each implementation, and ``torch`` with packed weights.

    Args:
        case: the operation and its sizes.
        device: where to run.
        dtype: compute type.
        backward: also compute all gradients.
        compiled: include ``torch.compile`` of the definition.
        impls: implementations to include.
        refused: implementations that shall not run, with the reason.
    """
    function, inputs = OPERATIONS[case.operation]
    arguments = inputs(case.sizes, torch.Generator().manual_seed(0), dtype=dtype, device=device)
    with torch.no_grad():
        shape = function(**arguments, impl="reference").shape
    cotangent = torch.randn(
        shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32, device="cpu"
    ).to(device, dtype)

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
    for impl in impls:
        providers[impl] = runner(arguments, impl)
    packed = {n: pack(t) for n, t in tensors_of(arguments).items() if t.dim() == 2 and "weight" in n}
    if "torch" in impls and not backward and any(t.is_mkldnn for t in packed.values()):
        providers["torch, packed"] = runner(with_tensors(arguments, packed), "torch")
    refused = dict(refused or {})
    if "torch" in refused:
        refused["torch, packed"] = refused["torch"]
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
        refused=refused,
    )


def operation_main(
    description: str,
    cases: Callable[[ViTUpConfig, int, int], Sequence[OperationCase]],
    argv: Sequence[str] | None,
) -> int:
    """Run an operation's command line; ``cases(config, queries, bytes per number)`` lists what to measure."""
    options = parse(make_parser(description), argv)

    def reports() -> Iterable[Report]:
        for config in options.configs.values():
            for dtype in options.dtype:
                for case in cases(config, options.queries, dtype.itemsize):
                    fresh_start()
                    refused = refusals(options, case.operation, dtype, config.dim)
                    yield measure(
                        operation_case(
                            case,
                            options.device,
                            dtype,
                            backward=options.backward,
                            compiled=options.compile,
                            impls=options.impl,
                            refused=refused,
                        ),
                        options.repeats,
                        patience=options.seconds,
                    )

    return finish(reports(), options)


def finish(reports: Iterable[Report], options: argparse.Namespace) -> int:
    """Publish reports and draw them if asked to; return the exit code of :func:`publish`."""
    kept: list[Report] = []

    def keep() -> Iterable[Report]:
        for report in reports:
            kept.append(report)
            yield report

    code = publish(keep(), options.json)
    if options.roofline is not None:
        draw([asdict(report) for report in kept], options.roofline)
    return code


def fresh_start() -> None:
    """Free what the last case held, and forget its compiled code: specialisations pile up otherwise."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
