"""Benchmark of the whole upsampler: from hidden states and fine patch grid to features.

``python -m vitup_fast.bench.end_to_end --device cpu``

Providers, from the same random weights and inputs, ``prepare`` included in every run:

- ``eager``: a plain transcription of the definition, all queries in one chunk. As in the authors' code, keys,
  values and the decoders of all depths are computed for each chunk of queries.
- ``compiled``: ``torch.compile`` of exactly that.
- ``vitup_fast``: this library; ``dense`` on a grid, ``forward`` at scattered coordinates.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from vitup_fast.bench.harness import (
    BACKWARD_FACTOR,
    Case,
    Run,
    Work,
    device_name,
    exit_code,
    make_parser,
    measure,
    parse,
    versions,
    write_json,
)

from vitup_fast import ViTUp, ViTUpConfig
from vitup_fast.errors import expected
from vitup_fast.testing import random_image, random_network

TOKEN_GRID = (28, 28)
PATCH_GRID = (224, 224)
DENSE_SIDE = 448
MEMORY_GOAL = 512 * 10**6

Features = Callable[[ViTUp, list[Tensor], Tensor, Tensor], list[Tensor]]


def query_flops(config: ViTUpConfig, tokens: int, position_mlp: bool) -> int:
    """Count FLOPs of one query in all blocks: transition, projections, attention, featx and mlp.

    Args:
        config: sizes of the network.
        tokens: tokens h * w attended to.
        position_mlp: count the position MLP, which queries of a grid share.
    """
    D = config.dim
    block = (8 + 4 + 16 + 16) * D**2 + 4 * tokens * D
    return (config.num_layers - 1) * (block + (4 * D**2 + 132 * D if position_mlp else 0))


def least_work(
    config: ViTUpConfig, tokens: int, queries: int, position_mlp: bool, all_layers: bool = False
) -> Work:
    """Return what the features of one image need: blocks, one decoder or all, keys and values once."""
    D, L = config.dim, config.num_layers
    decoders = 2 * D**2 * (L if all_layers else 1)
    prepare = (L - 1) * 4 * D**2 * tokens
    return Work(queries * (query_flops(config, tokens, position_mlp) + decoders) + prepare)


def grid_coords(side: int, device: torch.device) -> Tensor:
    """Return cell centres of a square grid, row by row, in float64: ``[1, side * side, 2]``."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack((x, y), dim=-1).view(1, -1, 2).to(device)


def by_definition(net: ViTUp, hidden: list[Tensor], grid: Tensor, coords: Tensor) -> list[Tensor]:
    """Compute features of all depths as the definition does, in one chunk: L times ``[1, N, D]``."""
    cache = net.prepare(hidden, grid, impl="reference")
    return net(cache, coords, return_all_layers=True, impl="reference", query_chunk_size=coords.shape[1])


def by_library(side: int | None, chunk: int | None, all_layers: bool) -> Features:
    """Return this library's way: ``dense`` on a grid of ``side`` rows, without one ``forward``."""

    def features(net: ViTUp, hidden: list[Tensor], grid: Tensor, coords: Tensor) -> list[Tensor]:
        cache = net.prepare(hidden, grid)
        options = {"return_all_layers": all_layers, "query_chunk_size": chunk}
        output = net(cache, coords, **options) if side is None else net.dense(cache, (side, side), **options)
        layers = output if all_layers else [output]
        return [layer.view(1, -1, layer.shape[-1]) for layer in layers]

    return features


def network_case(
    config: ViTUpConfig,
    queries: int,
    dense: bool,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    autocast: bool = False,
    compiled: bool = True,
    chunks: Sequence[int] = (),
    token_grid: tuple[int, int] = TOKEN_GRID,
    patch_grid: tuple[int, int] = PATCH_GRID,
) -> Case:
    """Set up the whole network for one image.

    Args:
        config: sizes of the network.
        queries: number N of queries; a square number if dense.
        dense: cell centres of a grid, else random coordinates.
        device: where to run.
        dtype: dtype of parameters and inputs; under autocast they are float32 and this is the compute type.
        backward: train: outputs of all depths, and gradients of all parameters and of the image.
        autocast: run every provider under autocast.
        compiled: include ``torch.compile``.
        chunks: also run this library with these chunk sizes.
        token_grid: rows and columns of the tokens.
        patch_grid: rows and columns of the fine patch grid.

    Raises:
        InputError: a dense case whose number of queries is no square.
    """
    side = math.isqrt(queries) if dense else None
    if side is not None and side**2 != queries:
        raise expected("--queries", "a square number, like 3136 for 56 x 56", queries)
    generator = torch.Generator().manual_seed(0)
    parameters = torch.float32 if autocast else dtype
    net = random_network(config, generator, dtype=parameters, device=device).requires_grad_(backward)
    image = random_image(
        config, generator, token_grid=token_grid, patch_grid=patch_grid, dtype=parameters, device=device
    )
    scattered = torch.rand(1, queries, 2, generator=generator).to(device)
    # Nobody but the float64 definition gets the cell centres of a grid exactly.
    exact_coords = scattered if side is None else grid_coords(side, device)
    layers = config.num_layers if backward else 1
    cotangents = [torch.randn(1, queries, config.dim, generator=generator).to(device) for _ in range(layers)]

    def runner(net: ViTUp, features: Features, cast: torch.dtype | None = None) -> Run:
        hidden, grid = [t.to(net.dtype) for t in image[0]], image[1].to(net.dtype)
        coords = exact_coords if net.dtype == torch.float64 else exact_coords.float()
        leaves = [*net.parameters(), *hidden[1:], grid]
        context = (lambda: torch.autocast(device.type, cast)) if cast is not None else contextlib.nullcontext
        if not backward:

            def infer() -> Tensor:
                with torch.no_grad(), context():
                    return features(net, hidden, grid, coords)[-1]

            return infer
        for leaf in leaves:
            leaf.requires_grad_()

        def train() -> list[Tensor]:
            with context():
                outputs = features(net, hidden, grid, coords)
            grads = torch.autograd.grad(
                outputs, leaves, [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
            )
            weights = len(grads) - len(hidden[1:]) - 1
            groups = (grads[:weights], grads[weights:-1], grads[-1:])
            flat = [torch.cat([g.flatten() for g in group]) for group in groups]
            return [*(y.detach() for y in outputs), *flat]

        return train

    cast = dtype if autocast else None
    providers = {}
    if compiled:
        providers["compiled"] = runner(net, torch.compile(by_definition, dynamic=False), cast)
    providers["vitup_fast"] = runner(net, by_library(side, None, backward), cast)
    for chunk in chunks:
        providers[f"vitup_fast, chunk {chunk}"] = runner(net, by_library(side, chunk, backward), cast)

    tokens = token_grid[0] * token_grid[1]
    factor = BACKWARD_FACTOR if backward else 1
    work = least_work(config, tokens, queries, position_mlp=not dense, all_layers=backward)
    where = f"grid {side} x {side}" if dense else f"{queries} scattered queries"
    mode = f"{', autocast' if autocast else ''}{', forward and backward' if backward else ''}"
    return Case(
        title=f"ViT-Up D={config.dim}, {where}{mode}",
        count=queries,
        unit="queries",
        work=Work(factor * work.flops),
        eager=runner(net, by_definition, cast),
        providers=providers,
        exact=runner(copy.deepcopy(net).double(), by_definition),
        baseline="compiled" if compiled else "eager",
        device=device,
        dtype=dtype,
        detail={
            "MFLOP/query with position MLP": round(query_flops(config, tokens, True) / 1e6, 1),
            "without": round(query_flops(config, tokens, False) / 1e6, 1),
        },
    )


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one dense pass in bytes.

    Attributes:
        title: what was computed.
        device: where.
        versions: of all that the figure depends on.
        resident: before the pass: network, packed weights, image cache, and on the CPU the Python process.
        weights: of this, the parameters; packed weights take as much again on the CPU.
        cache: of this, the image cache.
        output: the pass's result.
        beyond_output: peak during the pass minus ``resident`` and ``output``.
        goal: what ``beyond_output`` should not exceed.
    """

    title: str
    device: str
    versions: dict[str, str]
    resident: int
    weights: int
    cache: int
    output: int
    beyond_output: int
    goal: int = MEMORY_GOAL

    def table(self) -> str:
        """Lay the report out for a terminal."""
        resident, weights, cache, output, beyond, goal = (
            f"{n / 1e6:.0f} MB"
            for n in (self.resident, self.weights, self.cache, self.output, self.beyond_output, self.goal)
        )
        return (
            f"{self.title}: peak memory beyond the output {beyond} (goal: at most {goal})\n"
            f"  {self.device}; before the pass {resident} (parameters {weights}, image cache {cache}, "
            f"and on the CPU packed weights and the process); output {output}"
        )


def _resident_bytes(field: str) -> int:
    """Resident memory of this process from the kernel: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise expected("--memory", "a kernel that reports peak memory", f"no {field} in /proc/self/status")


def dense_memory(config: ViTUpConfig, side: int, device: torch.device, dtype: torch.dtype) -> MemoryReport:
    """Measure a dense pass of ``side`` x ``side`` queries in this process, which should be a fresh one.

    A pass over a single query comes first: it packs weights and starts threads, which later passes share.
    """
    generator = torch.Generator().manual_seed(0)
    net = random_network(config, generator, dtype=dtype, device=device)
    hidden, grid = random_image(config, generator, dtype=dtype, device=device)
    with torch.no_grad():
        cache = net.prepare(hidden, grid)
        del hidden, grid
        net.dense(cache, (1, 1))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            output = net.dense(cache, (side, side))
            peak = torch.cuda.max_memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = _resident_bytes("VmRSS")
            output = net.dense(cache, (side, side))
            peak = _resident_bytes("VmHWM")
    return MemoryReport(
        title=f"ViT-Up D={config.dim}, dense {side} x {side}, {str(dtype).removeprefix('torch.')}",
        device=device_name(device),
        versions=versions(),
        resident=before,
        weights=sum(p.nbytes for p in net.parameters()),
        cache=cache.nbytes,
        output=output.nbytes,
        beyond_output=peak - before - output.nbytes,
    )


def dense_memory_apart(
    config: ViTUpConfig, side: int, device: torch.device, dtype: torch.dtype
) -> MemoryReport:
    """Run :func:`dense_memory` in a fresh process, where no other memory stands by to be reused.

    Raises:
        InputError: a CPU measurement on a system other than Linux.
    """
    if device.type == "cpu" and sys.platform != "linux":
        raise expected("--memory", "Linux for peak memory on the CPU", sys.platform)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(dense_memory, config, side, device, dtype).result()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; see ``--help``.

    Args:
        argv: command line without the program's name; None takes that of the process.
        prog: the program's name in messages; None takes that of the process.

    Raises:
        InputError: a device that is not there, a count that does not fit, a JSON path that cannot be written.
    """
    parser = make_parser("Benchmark of the whole upsampler, on a grid and at scattered coordinates.")
    parser.prog = prog or parser.prog
    add = parser.add_argument
    add("--autocast", action="store_true", help="float32 parameters, --dtype is the autocast type")
    add("--chunks", nargs="+", type=int, default=[], metavar="N", help="also try these chunk sizes")
    add(
        "--memory",
        action="store_true",
        help=f"instead: peak memory of a dense pass, {DENSE_SIDE} x {DENSE_SIDE}",
    )
    options = parse(parser, argv)
    if options.autocast:
        options.dtype = [dtype for dtype in options.dtype if dtype != torch.float32]
        if not options.dtype:
            raise expected("--autocast", "--dtype bfloat16 or float16", "float32 alone")
    reports = []
    for dtype in options.dtype:
        if options.memory:
            side = DENSE_SIDE // 4 if options.quick else DENSE_SIDE
            reports.append(dense_memory_apart(options.config, side, options.device, dtype))
            print(reports[-1].table(), flush=True)
            continue
        for dense in (True, False):
            case = network_case(
                options.config,
                options.queries,
                dense,
                options.device,
                dtype,
                backward=options.backward,
                autocast=options.autocast,
                compiled=options.compile,
                chunks=options.chunks,
            )
            reports.append(measure(case, options.repeats))
            print(reports[-1].table(), flush=True)
    if options.json is not None:
        write_json(options.json, [asdict(report) for report in reports])
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
