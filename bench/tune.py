"""Find the fastest launch settings of every kernel on this GPU, and keep them for this user.

``vitup-fast tune`` tries candidates in what a kernel does inside the network, at its size there, timed as one CUDA
graph. A candidate counts only if the result is as exact as that of eager PyTorch allows; one that does not compile,
does not fit or ends its process is passed over. What is found is written after every kernel, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import (
    DTYPES,
    Stopwatch,
    check_device,
    judge,
    stopwatch_for,
    tensors,
    write_json,
)

from vitup_fast import ViTUpConfig
from vitup_fast.errors import KernelError, expected, require
from vitup_fast.ops.implementations import resolve
from vitup_fast.ops.primitives import LAYER_NORM_EPS
from vitup_fast.testing import (
    OPERATIONS,
    Arguments,
    Sizes,
    cast,
    differentiable_tensors,
    with_tensors,
)

Settings = dict[str, int]
Run = Callable[[], list[Tensor]]
REPEATS = 15
# Queries that the narrow tiles are for.
FEW_QUERIES = {"linear_narrow": 4096, "linear_few_rows": 1000}


class Trial(NamedTuple):
    """What a kernel does in the network, on given inputs.

    Attributes:
        run: what is timed.
        check: its result as it is judged.
        define: the same by the definition, computed in a dtype.
    """

    run: Run
    check: Run
    define: Callable[[torch.dtype], list[Tensor]]


class Variant(NamedTuple):
    """A kernel's variant: how to try it, and which of its settings are worth a try.

    Attributes:
        trial: makes what is timed and judged of sizes, dtype and device.
        candidates: values to try per setting.
        by_head: whether settings depend on the width of a head, not on that of the network.
    """

    trial: Callable[[Sizes, torch.dtype, torch.device], Trial]
    candidates: Mapping[str, Sequence[int]]
    by_head: bool = False


def product_trial(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    widths: tuple[int, int],
    gelu: bool = False,
    residual: bool = False,
    norm: bool = False,
) -> Trial:
    """A product of the network: LayerNorm and GELU around it, or the residual, its LayerNorm and row moments.

    Args:
        sizes: rows N and width D.
        dtype: compute type.
        device: where.
        widths: of its input and output, in units of D.
        gelu: a first layer: LayerNorm before the product, GELU after it.
        residual: a second layer: the residual is added, and the moments of its rows returned.
        norm: a LayerNorm of complete rows before the residual.
    """
    from vitup_fast.kernels.triton.common import measure_moments
    from vitup_fast.kernels.triton.linear import fold, linear

    generator = torch.Generator().manual_seed(0)
    M, (K, N) = sizes.B * sizes.N, (width * sizes.D for width in widths)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return (values * std + mean).to(device, dtype)

    x, added = normal(M, K), normal(M, N)
    weight, bias = normal(N, K, std=K**-0.5), normal(N, std=0.2)
    before = (normal(K, std=0.2, mean=1.0), normal(K, std=0.2)) if gelu else ()
    after = (normal(N, std=0.2, mean=1.0), normal(N, std=0.2)) if norm else None
    layer, moments = fold(weight, bias, *before), measure_moments(x) if gelu else None
    # As in the network: in memory that is there, and over the residual.
    out, scratch = (
        torch.empty(M, N, dtype=dtype, device=device),
        torch.empty(M, N, dtype=dtype, device=device),
    )
    wide = torch.promote_types(dtype, torch.float32)
    out_moments = torch.empty(M, 2 * max(1, N // 32), dtype=wide, device=device)

    def run() -> list[Tensor]:
        given = {"gelu": gelu, "residual": added if residual else None, "out_norm": after}
        rows, parts = linear(
            *(x, layer, moments),
            **given,
            want_moments=residual,
            out=out,
            out_moments=out_moments,
            scratch=scratch,
        )
        return [rows] if parts is None else [rows, parts]

    def check() -> list[Tensor]:
        out.fill_(torch.nan)
        out_moments.fill_(torch.nan)
        rows, *parts = run()
        if not parts:
            return [rows]
        mean, squares = parts[0].unbind(-1)  # [M, parts] each
        total = mean.mean(1)
        between = (mean - total[:, None]).square().sum(1) * (N // mean.shape[1])
        return [rows, total, (squares.sum(1) + between) / N]

    def define(kind: torch.dtype) -> list[Tensor]:
        to = lambda *given: [t.to(kind) for t in given]  # noqa: E731
        rows = F.layer_norm(*to(x), (K,), *to(*before), LAYER_NORM_EPS) if gelu else x.to(kind)
        rows = F.linear(rows, *to(weight, bias))
        rows = F.gelu(rows) if gelu else rows
        if after is not None:
            rows = F.layer_norm(rows, (N,), *to(*after), LAYER_NORM_EPS)
        if not residual:
            return [rows]
        rows = rows + added.to(kind)
        measured = rows.to(torch.promote_types(kind, torch.float32))
        return [rows, measured.mean(1), measured.var(1, correction=0)]

    return Trial(torch.no_grad()(run), torch.no_grad()(check), torch.no_grad()(define))


def whole_rows_trial(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Trial:
    """Both products of complete rows: of an MLP, and of the FiLM MLP, which normalises them."""
    both = [
        product_trial(sizes, dtype, device, widths=(4, 1), residual=True, norm=norm) for norm in (False, True)
    ]
    return Trial(
        lambda: [t for trial in both for t in trial.run()],
        lambda: [t for trial in both for t in trial.check()],
        lambda kind: [t for trial in both for t in trial.define(kind)],
    )


def attention_trial(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Trial:
    """Attention as the network launches it, judged with the projection behind it."""
    from vitup_fast.kernels.triton.common import measure_moments
    from vitup_fast.kernels.triton.rope_cross_attention import attend, fold_query

    operation = OPERATIONS["rope_cross_attention"]
    arguments = operation.inputs(sizes, torch.Generator().manual_seed(0), dtype=dtype, device=device)
    x, weights = arguments["x"], arguments["weights"]
    moments = measure_moments(x.view(-1, sizes.D))
    layer = fold_query(*weights[:4], sizes.D // sizes.heads)
    rest = (arguments[name] for name in ("coords", "key", "value", "inv_freq", "token_grid"))
    fixed, out = (x, moments, layer, *rest), torch.empty_like(x)
    whole = runner("rope_cross_attention", arguments, "triton", False)

    def define(kind: torch.dtype) -> list[Tensor]:
        given = arguments if kind == dtype else cast(arguments, kind)
        return runner("rope_cross_attention", given, "reference", False)()

    return Trial(torch.no_grad()(lambda: [attend(*fixed, out=out).attended]), whole, define)


def backward_trial(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, operation: str) -> Trial:
    """An operation with its backward pass."""
    arguments = OPERATIONS[operation].inputs(
        sizes, torch.Generator().manual_seed(0), dtype=dtype, device=device
    )
    run = runner(operation, arguments, "triton", True)

    def define(kind: torch.dtype) -> list[Tensor]:
        given = arguments if kind == dtype else cast(arguments, kind)
        return runner(operation, given, "reference", True)()

    return Trial(run, run, define)


def _products(tiles: Sequence[int] = (), warps: Sequence[int] = (4, 8)) -> dict[str, Sequence[int]]:
    """Settings of a matrix product."""
    return {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64),
        **({"TILES": tiles} if tiles else {}),
        "num_warps": warps,
        "num_stages": (2, 3, 4),
    }


_ATTENTION = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
_second = functools.partial(product_trial, widths=(4, 1), residual=True)
_backward = {
    name: functools.partial(backward_trial, operation=name)
    for name in ("residual_mlp", "rope_cross_attention")
}
VARIANTS: dict[str, Variant] = {
    # 128 x 256 spills with 8 warps, not with 16.
    "linear": Variant(
        functools.partial(product_trial, widths=(1, 4), gelu=True), _products((1,), warps=(4, 8, 16))
    ),
    "linear_rows": Variant(whole_rows_trial, _products((1, 3), warps=(4, 8, 16))),
    "linear_narrow": Variant(_second, {**_products((1,)), "BLOCK_M": (32, 64), "BLOCK_N": (64, 128)}),
    "linear_few_rows": Variant(_second, {**_products((1,)), "BLOCK_M": (32, 64), "BLOCK_N": (32, 64)}),
    "attention": Variant(attention_trial, {**_ATTENTION, "BLOCK_K": (32, 64)}, by_head=True),
    "hidden_backward": Variant(_backward["residual_mlp"], _products()),
    "weight_gradient": Variant(_backward["residual_mlp"], _products()),
    "attention_query_backward": Variant(_backward["rope_cross_attention"], _ATTENTION, by_head=True),
    "attention_key_backward": Variant(_backward["rope_cross_attention"], _ATTENTION, by_head=True),
}


def candidates(variant: Variant) -> Iterator[Settings]:
    """Every combination whose accumulators fit the registers of a block."""
    for values in itertools.product(*variant.candidates.values()):
        settings = dict(zip(variant.candidates, values, strict=True))
        sums = settings["BLOCK_M"] * settings["BLOCK_N"] * settings.get("TILES", 1)
        if sums <= min(192 * 32 * settings["num_warps"], 49152):
            yield settings


def runner(operation: str, arguments: Arguments, impl: str, backward: bool) -> Run:
    """An operation, forward or with its backward pass."""
    function = OPERATIONS[operation].function
    if not backward:
        return torch.no_grad()(lambda: tensors(function(**arguments, impl=impl)))
    leaves = {n: t.clone().requires_grad_() for n, t in differentiable_tensors(arguments).items()}
    arguments = with_tensors(arguments, leaves)

    def run() -> list[Tensor]:
        output = function(**arguments, impl=impl)
        return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))]

    return run


class Task(NamedTuple):
    """A variant at the sizes of a network."""

    name: str
    sizes: Sizes
    dtype: torch.dtype
    device: torch.device


@functools.lru_cache(maxsize=1)
def prepared(task: Task) -> tuple[Trial, list[Tensor], list[Tensor]]:
    """Its trial, and the results of eager PyTorch and of float64; the last one asked for."""
    trial = VARIANTS[task.name].trial(task.sizes, task.dtype, task.device)
    return trial, trial.define(task.dtype), trial.define(torch.float64)


def compile_candidate(task: Task, settings: Settings) -> None:
    """Run a variant once with some settings, so that Triton's cache, which processes share, holds what it needs."""
    from vitup_fast.kernels.triton import common

    trial = VARIANTS[task.name].trial(task.sizes, task.dtype, task.device)
    with contextlib.suppress(KernelError), common.overridden_settings({task.name: settings}, task.name):
        trial.run()


def candidate_seconds(task: Task, settings: Settings | None, stopwatch: Stopwatch | None = None) -> float:
    """Time of a variant with some settings, or with those in use; infinite if it does not run or is not exact.

    On a GPU it is that of a CUDA graph, so that Python is not timed.
    """
    from vitup_fast.kernels.triton import common

    from vitup_fast.walks.gpu import record

    trial, eager, exact = prepared(task)
    chosen = {} if settings is None else {task.name: settings}
    try:
        with common.overridden_settings(chosen, task.name):
            if not judge(task.name, trial.check(), eager, exact).accurate:
                return float("inf")
            run: Callable[[], Any] = trial.run
            if task.device.type == "cuda":
                trial.run()
                run = record(trial.run, task.device)
            measure = stopwatch or stopwatch_for(task.device)
            return statistics.median(measure(run) for _ in range(REPEATS))
    except KernelError:
        return float("inf")


class Worker:
    """Calls functions in a process of their own, a new one after each that crashed.

    Args:
        processes: that work side by side in :meth:`each`.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(self, function: Callable[..., Any], *arguments: object) -> Any:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, mp_context=context)
        return self._pool.submit(function, *arguments)

    def call(self, function: Callable[..., Any], *arguments: object, otherwise: Any) -> Any:
        """Result of a call, or ``otherwise`` where it raised or its process ended: a GPU's errors outlive a call."""
        try:
            return self._submit(function, *arguments).result()
        except (BrokenProcessPool, RuntimeError) as error:
            print(f"passed over: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
            self._drop()
            return otherwise

    def each(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[object, ...]],
        progress: Callable[[], Any],
    ) -> None:
        """Call a function with each of many arguments side by side, whatever becomes of single calls."""
        done: set[int] = set()
        try:
            futures = {self._submit(function, *given): i for i, given in enumerate(arguments)}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    done.add(futures[future])
                    progress()
        except BrokenProcessPool:
            pass
        if len(done) < len(arguments):  # one of them ended its process: the others one by one
            self._drop()
            for i, given in enumerate(arguments):
                if i not in done:
                    self.call(function, *given, otherwise=None)
                    progress()


def tune_role(
    task: Task,
    seconds: Callable[[Task, Settings | None], float],
    progress: Callable[[], object] = lambda: None,
) -> tuple[Settings | None, float, float]:
    """Find the fastest exact settings of one variant.

    Args:
        task: the variant and its sizes.
        seconds: measures settings, None for those in use; see :func:`candidate_seconds`.
        progress: called after every candidate.

    Returns:
        Settings, None if those in use are the fastest, their time, and that of those in use, in seconds.
    """
    best, least = None, seconds(task, None)
    before = least
    for settings in candidates(VARIANTS[task.name]):
        time = seconds(task, settings)
        if time < least:
            best, least = settings, time
        progress()
    return best, least, before


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the tuner; see ``--help``.

    Args:
        argv: command line without the program's name; None takes that of the process.
        prog: the program's name in messages; None takes that of the process.

    Raises:
        InputError: a device on which the kernels cannot run, or settings that cannot be read.
    """
    from vitup_fast.kernels.triton import common

    from vitup_fast.walks.plan import gpu_chunk

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog=prog)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda (default) or cuda:N")
    presets = ("dinov3_splus", "dinov3_base")
    add("--preset", nargs="+", choices=presets, default=list(presets), help="sizes (default: both)")
    kinds = ("bfloat16", "float32")
    add(
        "--dtype",
        nargs="+",
        choices=kinds,
        default=list(kinds),
        help="float16 takes the settings of bfloat16",
    )
    add(
        "--variants",
        nargs="+",
        choices=tuple(VARIANTS),
        default=list(VARIANTS),
        help="kernels to tune (default: all)",
    )
    add("--queries", type=int, help="queries per chunk (default: those of the network)")
    add(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that compile (default: up to 8)",
    )
    add("--again", action="store_true", help="tune also what an earlier run has tuned")
    add("--output", type=Path, metavar="PATH", help="settings file (default: where the library looks)")
    options = parser.parse_args(argv)
    for count in ("queries", "workers"):
        if getattr(options, count) is not None and getattr(options, count) < 1:
            raise expected(f"--{count}", "a positive integer", getattr(options, count))
    device = check_device(options.device)
    anything = torch.empty(0, dtype=torch.float32, device=device)
    resolve("triton", anything, {})
    tqdm = require("tqdm", "demo", "The progress of the tuner").tqdm
    device_name, _ = common.target_of(anything)
    path = options.output or common.user_settings_path(device_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise expected(
            "--output", "a file in a folder that can be made", f"{path} ({error.strerror})"
        ) from error
    version = ".".join(common.triton.__version__.split(".")[:2])
    found = common.read_settings(path) if path.exists() else {}
    with Worker(options.workers) as compilers, Worker() as timer:

        def seconds(task: Task, settings: Settings | None) -> float:
            if device.type != "cuda":
                return candidate_seconds(task, settings, stopwatch_for(device))
            return timer.call(candidate_seconds, task, settings, otherwise=float("inf"))

        for dtype_name, preset, name in itertools.product(options.dtype, options.preset, options.variants):
            config, dtype, variant = ViTUpConfig.preset(preset), DTYPES[dtype_name], VARIANTS[name]
            kind = "half" if dtype.itemsize == 2 else "float32"
            width = config.head_dim if variant.by_head else config.dim
            by_width = found.setdefault(version, {}).setdefault(kind, {}).setdefault(name, {})
            if str(width) in by_width and not options.again:
                continue
            queries = options.queries or gpu_chunk(common.multiprocessors(anything.device), config.dim)
            queries = min(queries, FEW_QUERIES.get(name, queries))
            task = Task(
                name, Sizes(1, queries, config.dim, config.num_heads, (28, 28), (224, 224), 4), dtype, device
            )
            every = [(task, settings) for settings in candidates(variant)]
            title = f"{dtype_name} {name} {width}"
            with tqdm(total=len(every), desc=f"{title}: compile") as bar:
                compilers.each(compile_candidate, every, bar.update)
            with tqdm(total=len(every), desc=f"{title}: time") as bar:
                best, least, before = tune_role(task, seconds, bar.update)
            prepared.cache_clear()
            if least == float("inf"):
                print(f"{dtype_name} {name}, width {width}: no settings work; nothing kept", file=sys.stderr)
                continue
            if best is None:
                used = torch.empty(0, dtype=dtype, device=device)
                best = common.settings_for(name, used, width)
            by_width[str(width)] = best
            by_width.setdefault("default", best)
            write_json(path, found)
            print(
                f"{dtype_name} {name}, width {width}: {1e3 * least:.3f} ms (was {1e3 * before:.3f} ms) with {best}"
            )
    for cached in (common._tables, common._setting):
        cached.cache_clear()
    print(f"settings for {device_name} with Triton {version}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
