"""Find the fastest launch settings of every kernel on this GPU, and keep them for this user.

``vitup-fast tune`` tries candidates inside whole operations of the real sizes. A candidate counts only if the result is
as exact as that of eager PyTorch allows; one that does not compile or does not fit is passed over. What is found is
written after every kernel, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
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
from vitup_fast.testing import (
    OPERATIONS,
    Arguments,
    Sizes,
    cast,
    differentiable_tensors,
    with_tensors,
)

Settings = dict[str, int]
REPEATS = 15
FEW_QUERIES = 1000


class Variant(NamedTuple):
    """A kernel's variant: the operation to time it in, and which of its settings are worth a try.

    Attributes:
        operation: name in :data:`vitup_fast.testing.OPERATIONS`.
        backward: time the backward pass as well.
        candidates: values to try per setting.
        few: time it with few queries.
    """

    operation: str
    backward: bool
    candidates: Mapping[str, Sequence[int]]
    few: bool = False


def _products(tiles: Sequence[int] = ()) -> dict[str, Sequence[int]]:
    """Settings of a matrix product."""
    return {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64),
        **({"TILES": tiles} if tiles else {}),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }


_ATTENTION = {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)}
VARIANTS: dict[str, Variant] = {
    "linear": Variant("residual_mlp", False, _products(tiles=(1,))),
    "linear_rows": Variant("film_mlp_table", False, _products(tiles=(1, 3))),
    "linear_few_rows": Variant(
        "film_mlp_table", False, {**_products(tiles=(1,)), "BLOCK_M": (32, 64)}, few=True
    ),
    "attention": Variant("rope_cross_attention", False, {**_ATTENTION, "BLOCK_K": (32, 64)}),
    "hidden_backward": Variant("residual_mlp", True, _products()),
    "weight_gradient": Variant("residual_mlp", True, _products()),
    "attention_query_backward": Variant("rope_cross_attention", True, _ATTENTION),
    "attention_key_backward": Variant("rope_cross_attention", True, _ATTENTION),
}


def candidates(variant: Variant) -> Iterator[Settings]:
    """Every combination whose accumulators fit the registers of a block."""
    for values in itertools.product(*variant.candidates.values()):
        settings = dict(zip(variant.candidates, values, strict=True))
        sums = settings["BLOCK_M"] * settings["BLOCK_N"] * settings.get("TILES", 1)
        if sums <= 192 * 32 * settings["num_warps"]:
            yield settings


def runner(variant: Variant, arguments: Arguments, impl: str) -> Callable[[], list[Tensor]]:
    """The operation of a variant, forward or with its backward pass."""
    function = OPERATIONS[variant.operation].function
    if not variant.backward:
        return torch.no_grad()(lambda: tensors(function(**arguments, impl=impl)))
    leaves = {n: t.clone().requires_grad_() for n, t in differentiable_tensors(arguments).items()}
    arguments = with_tensors(arguments, leaves)

    def run() -> list[Tensor]:
        output = function(**arguments, impl=impl)
        return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))]

    return run


def compile_candidate(
    name: str, settings: Settings, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> None:
    """Run a variant once with some settings, so that Triton's cache, which processes share, holds what it needs."""
    from vitup_fast.kernels.triton import common

    variant = VARIANTS[name]
    generator = torch.Generator().manual_seed(0)
    arguments = OPERATIONS[variant.operation].inputs(sizes, generator, dtype=dtype, device=device)
    with contextlib.suppress(KernelError), common.overridden_settings({name: settings}):
        runner(variant, arguments, "triton")()


def tune_role(
    name: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    stopwatch: Stopwatch,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Settings, float, float]:
    """Find the fastest exact settings of one variant.

    Args:
        name: variant in :data:`VARIANTS`.
        sizes: sizes of the operation.
        dtype: compute type.
        device: GPU.
        stopwatch: measures one run in seconds.
        progress: called after every candidate.

    Returns:
        Settings, their time and that of the settings in use so far, in seconds.
    """
    from vitup_fast.kernels.triton import common

    variant = VARIANTS[name]
    arguments = OPERATIONS[variant.operation].inputs(
        sizes, torch.Generator().manual_seed(0), dtype=dtype, device=device
    )
    small = OPERATIONS[variant.operation].inputs(
        sizes._replace(N=min(sizes.N, 300)), torch.Generator().manual_seed(1), dtype=dtype, device=device
    )
    eager = runner(variant, small, "reference")()
    exact = runner(variant, cast(small, torch.float64), "reference")()
    run, check = runner(variant, arguments, "triton"), runner(variant, small, "triton")

    def seconds(settings: Settings) -> float:
        try:
            with common.overridden_settings({name: settings}):
                if not judge(name, check(), eager, exact).accurate:
                    return float("inf")
                run()
                return statistics.median(stopwatch(run) for _ in range(REPEATS))
        except KernelError:
            return float("inf")

    current = common.settings_for(name, arguments["x"], sizes.D)
    best, least = current, seconds(current)
    before = least
    for settings in candidates(variant):
        time = seconds(settings)
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
    add("--queries", type=int, default=8448, help="queries per chunk (default: 8448)")
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
        if getattr(options, count) < 1:
            raise expected(f"--{count}", "a positive integer", getattr(options, count))
    device = check_device(options.device)
    resolve("triton", torch.empty(0, dtype=torch.float32, device=device), {})
    tqdm = require("tqdm", "demo", "The progress of the tuner").tqdm
    device_name, _ = common.target_of(torch.empty(0, dtype=torch.float32, device=device))
    path = options.output or common.user_settings_path(device_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise expected(
            "--output", "a file in a folder that can be made", f"{path} ({error.strerror})"
        ) from error
    version = ".".join(common.triton.__version__.split(".")[:2])
    found = common.read_settings(path) if path.exists() else {}
    stopwatch = stopwatch_for(device)
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for dtype_name, preset, name in itertools.product(options.dtype, options.preset, options.variants):
            config, dtype = ViTUpConfig.preset(preset), DTYPES[dtype_name]
            kind = "half" if dtype.itemsize == 2 else "float32"
            width = config.head_dim if VARIANTS[name].operation == "rope_cross_attention" else config.dim
            by_width = found.setdefault(version, {}).setdefault(kind, {}).setdefault(name, {})
            if str(width) in by_width and not options.again:
                continue
            queries = min(options.queries, FEW_QUERIES) if VARIANTS[name].few else options.queries
            sizes = Sizes(1, queries, config.dim, config.num_heads, (28, 28), (224, 224), 4)
            tasks = [(name, settings, sizes, dtype, device) for settings in candidates(VARIANTS[name])]
            title = f"{dtype_name} {name} {width}"
            with tqdm(total=len(tasks), desc=f"{title}: compile") as bar:
                for future in as_completed([pool.submit(compile_candidate, *task) for task in tasks]):
                    future.result()
                    bar.update()
            with tqdm(total=len(tasks), desc=f"{title}: time") as bar:
                best, least, before = tune_role(name, sizes, dtype, device, stopwatch, bar.update)
            if least == float("inf"):
                print(f"{dtype_name} {name}, width {width}: no settings work; nothing kept", file=sys.stderr)
                continue
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
