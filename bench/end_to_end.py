"""Benchmark of the whole upsampler: from hidden states and fine patch grid to features.

``python -m vitup_fast.bench.end_to_end --device cpu``; ``--suite`` for the published list of sizes.

Providers, from the same random weights and inputs, ``prepare`` included in every run unless ``--prepared``:

- ``eager``: a plain transcription of the definition, up to 448 x 448 queries at once. As in the authors' code,
  keys, values and the decoders of all depths are computed for each of these chunks.
- ``compiled``: ``torch.compile`` of exactly that.
- ``reference`` and ``reference, compiled``: the authors' code, if ``VITUP_REFERENCE`` names a checkout of it.
- this library by implementation (``torch``, ...): ``dense`` on a grid, ``forward`` at scattered coordinates; in
  training also with what each ``checkpoint`` keeps.

Where there are many queries, a random sample of them is judged: the definition runs at their coordinates alone, and
their rows of each provider's whole result are compared. Gradients are compared for cotangents that are zero elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from vitup_fast.bench import reference
from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import (
    BACKWARD_FACTOR,
    Case,
    Goal,
    Report,
    Run,
    Work,
    device_name,
    finish,
    fresh_start,
    make_parser,
    measure,
    parse,
    refusals,
    versions,
    write_json,
)

from vitup_fast import ImageCache, ViTUp, ViTUpConfig
from vitup_fast.errors import expected
from vitup_fast.testing import random_image, random_network

TOKEN_GRID = (28, 28)
PATCH_GRID = (224, 224)
DENSE_SIDE = 448
MEMORY_GOAL = 512 * 10**6
# The authors' wrapper takes all queries at once; their evaluation settings take this many.
CHUNK_QUERIES = 448 * 448
# Queries whose features and gradients are judged, where there are more.
JUDGED_QUERIES = 4096
DENSE_SUITE = (224, 448, 896, 1024, 2048)
SPARSE_SUITE = (100, 1000, 4096)

# What is aimed at on one H100 in bfloat16, by feature width: seconds and floor of dense sides, seconds of counts of
# scattered queries, and of forward and backward.
GOAL_DEVICE = "H100"
GOAL_MEMORY = 128 * 10**6
DENSE_GOALS = {
    (384, 448): (17e-3, 12.6e-3),
    (384, 1024): (90e-3, 66e-3),
    (768, 448): (62e-3, 47e-3),
}
SPARSE_GOALS = {(384, 4096): 0.5e-3}
TRAINING_GOALS = {(384, 75000): 25e-3, (768, 75000): 94e-3}
SPEEDUP_GOALS = {384: 2.5, 768: 1.9}

Features = Callable[[nn.Module, list[Tensor], Tensor, Tensor], list[Tensor]]


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
    config: ViTUpConfig,
    tokens: int,
    queries: int,
    position_mlp: bool,
    all_layers: bool = False,
    tokens_prepared: int | None = None,
) -> Work:
    """Return what the features of one image need: blocks, one decoder or all, keys and values of all tokens once."""
    D, L = config.dim, config.num_layers
    decoders = 2 * D**2 * (L if all_layers else 1)
    prepare = (L - 1) * 4 * D**2 * (tokens if tokens_prepared is None else tokens_prepared)
    return Work(queries * (query_flops(config, tokens, position_mlp) + decoders) + prepare)


def pieces(count: int, limit: int = CHUNK_QUERIES) -> list[slice]:
    """Cut queries into the fewest pieces of at most ``limit`` that are equally long, or nearly where none are.

    Equal pieces matter to ``torch.compile``, which specialises for each length anew.
    """
    least = max(1, math.ceil(count / limit))
    number = next((n for n in range(least, 2 * least) if count % n == 0), least)
    return [slice(i * count // number, (i + 1) * count // number) for i in range(number)]


def grid_coords(side: int, device: torch.device) -> Tensor:
    """Return cell centres of a square grid, row by row, in float64: ``[1, side * side, 2]``."""
    centres = (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack((x, y), dim=-1).view(1, -1, 2).to(device)


def by_definition(net: ViTUp, hidden: list[Tensor], grid: Tensor, coords: Tensor) -> list[Tensor]:
    """Compute features of all depths as the definition does, in one chunk: L times ``[1, N, D]``."""
    cache = net.prepare(hidden, grid, impl="reference")
    return net(cache, coords, return_all_layers=True, impl="reference", query_chunk_size=coords.shape[1])


def in_pieces(step: Features, all_layers: bool) -> Features:
    """Walk queries in :func:`pieces`; keep the features of all depths, or those of the last."""

    def features(net: nn.Module, hidden: list[Tensor], grid: Tensor, coords: Tensor) -> list[Tensor]:
        kept = []
        for span in pieces(coords.shape[1]):
            layers = step(net, hidden, grid, coords[:, span])
            kept.append(layers if all_layers else layers[-1:])
        return kept[0] if len(kept) == 1 else [torch.cat(layer, dim=1) for layer in zip(*kept, strict=True)]

    return features


def by_library(
    impl: str,
    side: int | None,
    chunk: int | None,
    all_layers: bool,
    prepared: bool = False,
    checkpoint: str = "none",
) -> Features:
    """Return this library's way: ``dense`` on a grid of ``side`` rows, without one ``forward``.

    Where the image is ``prepared``, the first call with its hidden states does that for all that follow.
    ``forward`` keeps for a backward pass what ``checkpoint`` says.
    """
    caches: list[tuple[Tensor, ImageCache]] = []

    def prepare(net: ViTUp, hidden: list[Tensor], grid: Tensor) -> ImageCache:
        if not prepared:
            return net.prepare(hidden, grid, impl=impl)
        if not caches or caches[0][0] is not hidden[0]:
            caches[:] = [(hidden[0], net.prepare(hidden, grid, impl=impl))]
        return caches[0][1]

    def features(net: ViTUp, hidden: list[Tensor], grid: Tensor, coords: Tensor) -> list[Tensor]:
        cache = prepare(net, hidden, grid)
        options = {"return_all_layers": all_layers, "query_chunk_size": chunk, "impl": impl}
        if side is None:
            output = net(cache, coords, checkpoint=checkpoint, **options)
        else:
            output = net.dense(cache, (side, side), **options)
        layers = output if all_layers else [output]
        return [layer.view(1, -1, layer.shape[-1]) for layer in layers]

    return features


def goal_for(
    config: ViTUpConfig,
    queries: int,
    side: int | None,
    backward: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Goal | None:
    """Return what is aimed at, which is known for one GPU and bfloat16 only."""
    if device.type != "cuda" or dtype != torch.bfloat16 or GOAL_DEVICE not in device_name(device):
        return None
    D = config.dim
    if backward:
        seconds = TRAINING_GOALS.get((D, queries))
        return None if seconds is None else Goal(GOAL_DEVICE, seconds)
    if side is None:
        return Goal(GOAL_DEVICE, SPARSE_GOALS.get((D, queries)), memory=GOAL_MEMORY)
    seconds, floor = DENSE_GOALS.get((D, side), (None, None))
    return Goal(GOAL_DEVICE, seconds, floor, SPEEDUP_GOALS.get(D), GOAL_MEMORY)


@functools.lru_cache(maxsize=1)
def network_and_image(
    config: ViTUpConfig,
    dtype: torch.dtype,
    device: torch.device,
    token_grid: tuple[int, int],
    patch_grid: tuple[int, int],
) -> tuple[ViTUp, list[Tensor], Tensor]:
    """Draw a network, hidden states and patch grid; the last ones drawn serve all sizes of one preset."""
    generator = torch.Generator().manual_seed(0)
    net = random_network(config, generator, dtype=dtype, device=device)
    options = {"token_grid": token_grid, "patch_grid": patch_grid, "dtype": dtype, "device": device}
    return net, *random_image(config, generator, **options)


def network_case(
    config: ViTUpConfig,
    queries: int,
    dense: bool,
    device: torch.device,
    dtype: torch.dtype,
    *,
    impls: Sequence[str] = ("torch",),
    refused: Mapping[str, str] | None = None,
    backward: bool = False,
    autocast: bool = False,
    prepared: bool = False,
    compiled: bool = True,
    chunks: Sequence[int] = (),
    judged: int = JUDGED_QUERIES,
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
        impls: implementations of this library to include.
        refused: implementations that shall not run, with the reason.
        backward: train: outputs of all depths, and gradients of all parameters and of the image.
        autocast: run every provider under autocast.
        prepared: this library has prepared the image before, as for every set of queries but the first.
        compiled: include ``torch.compile``.
        chunks: also run this library with these chunk sizes.
        judged: queries to judge where there are more.
        token_grid: rows and columns of the tokens.
        patch_grid: rows and columns of the fine patch grid.

    Raises:
        InputError: a dense case whose number of queries is no square; ``VITUP_REFERENCE`` names no checkout.
    """
    side = math.isqrt(queries) if dense else None
    if side is not None and side**2 != queries:
        raise expected("--queries", "a square number, like 3136 for 56 x 56", queries)
    parameters = torch.float32 if autocast else dtype
    net, hidden, grid = network_and_image(config, parameters, device, token_grid, patch_grid)
    net.requires_grad_(backward)
    generator = torch.Generator().manual_seed(1)
    scattered = torch.rand(1, queries, 2, generator=generator, dtype=torch.float32, device="cpu").to(device)
    # Nobody but the float64 definition gets the cell centres of a grid exactly.
    exact_coords = scattered if side is None else grid_coords(side, device)
    sample = (
        torch.randperm(queries, generator=generator, dtype=torch.int64, device="cpu")[:judged]
        .sort()
        .values.to(device)
    )
    layers = config.num_layers if backward else 0
    cotangents = [
        torch.randn(1, queries, config.dim, generator=generator, dtype=torch.float32, device="cpu").to(device)
        for _ in range(layers)
    ]
    names = [name for name, _ in net.named_parameters()]
    cast = dtype if autocast else None

    def run_of(
        module: nn.Module,
        features: Features,
        coords: Tensor,
        cotangents: list[Tensor],
        kind: torch.dtype = parameters,
    ) -> Run:
        """Return the last features, or all of them and the gradients, from inputs of a dtype."""
        own = dict(module.named_parameters())
        weights = [own[name] for name in names]
        inputs = [h.to(kind) for h in hidden], grid.to(kind)
        coords = coords if kind == torch.float64 else coords.float()
        lowered = cast is not None and kind != torch.float64
        context = (lambda: torch.autocast(device.type, cast)) if lowered else contextlib.nullcontext
        if not backward:

            def infer() -> Tensor:
                with torch.no_grad(), context():
                    return features(module, *inputs, coords)[-1]

            return infer
        inputs = [h.detach().requires_grad_() for h in inputs[0]], inputs[1].detach().requires_grad_()
        leaves = [*weights, *inputs[0][1:], inputs[1]]

        def train() -> list[Tensor]:
            with context():
                outputs = features(module, *inputs, coords)
            seeds = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
            return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, seeds)]

        return train

    def judged_of(run: Run, kind: torch.dtype = parameters) -> Run:
        """Return the features of a run, and gradients of weights, hidden states and patch grid as one tensor each."""

        def judged() -> list[Tensor]:
            result = run()
            if isinstance(result, Tensor):
                return [result]
            outputs, grads = result[:layers], result[layers:]
            groups = (grads[: len(names)], grads[len(names) : -1], grads[-1:])
            return [*outputs, *(torch.cat([g.flatten().to(kind) for g in group]) for group in groups)]

        return judged

    def check_of(module: nn.Module, features: Features) -> Run:
        """Return the judged rows of a whole result, and the gradients of what is done with these rows."""

        def check() -> list[Tensor]:
            seeds = [torch.zeros_like(c).index_copy_(1, sample, c[:, sample]) for c in cotangents]
            result = judged_of(run_of(module, features, exact_coords, seeds))()
            outputs = max(1, layers)
            return [*(y[:, sample] for y in result[:outputs]), *result[outputs:]]

        return check

    ways: dict[str, tuple[nn.Module, Features]] = {}
    if compiled:
        ways["compiled"] = net, in_pieces(torch.compile(by_definition, dynamic=False), backward)
    baseline = "compiled" if compiled else "eager"
    path = reference.checkout()
    if path is not None:
        theirs = reference.build(path, net).requires_grad_(backward)
        ways["reference"] = theirs, in_pieces(reference.features, backward)
        baseline = "reference"
        if compiled:
            baseline = "reference, compiled"
            ways[baseline] = theirs, in_pieces(torch.compile(reference.features, dynamic=False), backward)
    refused = dict(refused or {})
    ours = copy.deepcopy(net)  # what a network keeps from its runs is counted anew in each case
    for impl in impls:
        ways[impl] = ours, by_library(impl, side, None, backward, prepared)
        for chunk in chunks:
            name = f"{impl}, chunk {chunk}"
            ways[name] = ours, by_library(impl, side, chunk, backward, prepared)
            if impl in refused:
                refused[name] = refused[impl]
        for kept in ("op", "block") if backward and side is None else ():
            name = f"{impl}, checkpoint {kept}"
            ways[name] = ours, by_library(impl, side, None, backward, prepared, kept)
            if impl in refused:
                refused[name] = refused[impl]

    few_coords, few_cotangents = exact_coords[:, sample], [c[:, sample] for c in cotangents]
    checks = {name: check_of(*way) for name, way in ways.items()}
    double = copy.deepcopy(net).double(), in_pieces(by_definition, backward)
    checks["eager"] = judged_of(run_of(net, in_pieces(by_definition, backward), few_coords, few_cotangents))

    D, tokens, itemsize = config.dim, token_grid[0] * token_grid[1], dtype.itemsize
    tokens_prepared = 0 if prepared else tokens
    work = least_work(config, tokens, queries, not dense, backward, tokens_prepared)
    patches = min(4 * queries, patch_grid[0] * patch_grid[1])
    numbers = (config.num_layers * tokens + patches + max(1, layers) * queries) * D
    traffic = (sum(p.numel() for p in net.parameters()) + numbers) * itemsize
    factor = BACKWARD_FACTOR if backward else 1
    where = f"grid {side} x {side}" if dense else f"{queries} scattered queries"
    modes = {"autocast": autocast, "forward and backward": backward, "image prepared before": prepared}
    mode = "".join(f", {name}" for name, on in modes.items() if on)
    return Case(
        title=f"ViT-Up D={D}, {where}{mode}",
        count=queries,
        unit="queries",
        work=Work(factor * work.flops, factor * traffic),
        eager=run_of(net, in_pieces(by_definition, backward), exact_coords, cotangents),
        providers={n: run_of(*way, exact_coords, cotangents) for n, way in ways.items()},
        exact=judged_of(run_of(*double, few_coords, few_cotangents, torch.float64), torch.float64),
        baseline=baseline,
        device=device,
        dtype=dtype,
        detail={
            "MFLOP/query with position MLP": round(query_flops(config, tokens, True) / 1e6, 1),
            "without": round(query_flops(config, tokens, False) / 1e6, 1),
            "judged queries": len(sample),
        },
        checks=checks,
        refused=refused,
        # Keys, values and normalised tokens; the patch grid is the caller's.
        cache_bytes=0 if backward else (config.num_layers - 1) * 3 * tokens * D * itemsize,
        goal=goal_for(config, queries, side, backward, device, dtype),
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
        first_pass: the same of the first pass in a process, which also brings program code into memory, starts threads
            and keeps their scratch for later ones.
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
    first_pass: int
    goal: int = MEMORY_GOAL

    def table(self) -> str:
        """Lay the report out for a terminal."""
        resident, weights, cache, output, beyond, first, goal = (
            f"{n / 1e6:.0f} MB"
            for n in (
                *(self.resident, self.weights, self.cache, self.output),
                *(self.beyond_output, self.first_pass, self.goal),
            )
        )
        return (
            f"{self.title}: peak memory beyond the output {beyond}, of the first pass in a process {first} "
            f"(goal: at most {goal})\n"
            f"  {self.device}; before the pass {resident} (parameters {weights}, image cache {cache}, "
            f"and on the CPU packed weights and the process); output {output}"
        )


def resident_bytes(field: str) -> int:
    """Resident memory of this process from the kernel: ``VmRSS`` now, ``VmHWM`` at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise expected("--memory", "a kernel that reports peak memory", f"no {field} in /proc/self/status")


def dense_memory(config: ViTUpConfig, side: int, device: torch.device, dtype: torch.dtype) -> MemoryReport:
    """Measure dense passes of ``side`` x ``side`` queries, the first and a later one, in this process.

    It should be a fresh one. The image is prepared before, which packs the weights.
    """
    generator = torch.Generator().manual_seed(0)
    net = random_network(config, generator, dtype=dtype, device=device)
    hidden, grid = random_image(config, generator, dtype=dtype, device=device)

    def measured_pass() -> tuple[int, int, int]:
        """Bytes before a pass, of its output, and at its peak beyond both."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            output = net.dense(cache, (side, side)).nbytes
            peak = torch.cuda.max_memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = resident_bytes("VmRSS")
            output = net.dense(cache, (side, side)).nbytes
            peak = resident_bytes("VmHWM")
        return before, output, peak - before - output

    with torch.no_grad():
        cache = net.prepare(hidden, grid)
        del hidden, grid
        *_, first_pass = measured_pass()
        before, output, beyond_output = measured_pass()
    return MemoryReport(
        title=f"ViT-Up D={config.dim}, dense {side} x {side}, {str(dtype).removeprefix('torch.')}",
        device=device_name(device),
        versions=versions(),
        resident=before,
        weights=sum(p.nbytes for p in net.parameters()),
        cache=cache.nbytes,
        output=output,
        beyond_output=beyond_output,
        first_pass=first_pass,
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
    parser = make_parser("Benchmark of the whole upsampler, on a grid and at scattered coordinates.", 448**2)
    parser.prog = prog or parser.prog
    add = parser.add_argument
    parser.epilog = (
        "vitup-fast bench windows: batches of windows, from bytes to scores. "
        "vitup-fast bench images: preparing images, part by part."
    )
    add("--dense", nargs="+", type=int, metavar="SIDE", help="grids of these sides instead of --queries")
    add("--sparse", nargs="+", type=int, metavar="N", help="these scattered queries instead of --queries")
    add(
        "--suite",
        action="store_true",
        help=f"--dense {' '.join(map(str, DENSE_SUITE))} --sparse {' '.join(map(str, SPARSE_SUITE))}",
    )
    add(
        "--tokens",
        nargs=2,
        type=int,
        default=TOKEN_GRID,
        metavar=("h", "w"),
        help="rows and columns of tokens (28 28)",
    )
    add("--autocast", action="store_true", help="float32 parameters, --dtype is the autocast type")
    add("--chunks", nargs="+", type=int, default=[], metavar="N", help="also try these chunk sizes")
    add("--prepared", action="store_true", help="this library has prepared the image before the clock starts")
    add(
        "--memory",
        action="store_true",
        help=f"instead: peak memory of a dense pass, {DENSE_SIDE} x {DENSE_SIDE}",
    )
    options = parse(parser, argv)
    if options.prepared and options.backward:
        raise expected("--prepared", "no --backward with it", "both", "Gradients flow through the image.")
    if options.autocast:
        options.dtype = [dtype for dtype in options.dtype if dtype != torch.float32]
        if not options.dtype:
            raise expected("--autocast", "--dtype bfloat16 or float16", "float32 alone")
    if min(options.tokens) < 1:
        raise expected("--tokens", "two positive integers", options.tokens)
    reference.checkout()  # a wrong path is told before anything is computed
    if options.memory:
        return memory_main(options)
    return finish(reports(options, sizes(options)), options)


def sizes(options: argparse.Namespace) -> list[tuple[int, bool]]:
    """List numbers of queries, each with whether they form a grid.

    Raises:
        InputError: a size below 1.
    """
    dense, sparse = options.dense, options.sparse
    if options.suite:
        dense, sparse = dense or DENSE_SUITE, sparse or SPARSE_SUITE
    if dense is None and sparse is None:
        return [(options.queries, True), (options.queries, False)]
    for name, values in (("--dense", dense), ("--sparse", sparse)):
        if min(values or (1,)) < 1:
            raise expected(name, "positive integers", list(values))
    return [*((side**2, True) for side in dense or ()), *((count, False) for count in sparse or ())]


def reports(options: argparse.Namespace, sizes: Sequence[tuple[int, bool]]) -> Iterator[Report]:
    """Measure one case after the other."""
    for config in options.configs.values():
        for dtype in options.dtype:
            for queries, dense in sizes:
                fresh_start()
                case = network_case(
                    config,
                    queries,
                    dense,
                    options.device,
                    dtype,
                    impls=options.impl,
                    refused=refusals(options, "network", dtype, config.dim),
                    backward=options.backward,
                    autocast=options.autocast,
                    prepared=options.prepared,
                    compiled=options.compile,
                    chunks=options.chunks,
                    token_grid=tuple(options.tokens),
                    patch_grid=tuple(config.patch_grid_density * n for n in options.tokens),
                )
                report = measure(case, options.repeats, patience=options.seconds)
                del case  # its tensors, before the next case is set up
                yield report


def memory_main(options: argparse.Namespace) -> int:
    """Report the memory of dense passes in fresh processes."""
    side = DENSE_SIDE // 4 if options.quick else DENSE_SIDE
    found = []
    for config in options.configs.values():
        for dtype in options.dtype:
            found.append(dense_memory_apart(config, side, options.device, dtype))
            print(found[-1].table(), flush=True)
    if options.json is not None:
        write_json(options.json, [asdict(report) for report in found])
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
