"""How long a GPU should take for what the network really launches: a model, to compare with a profile.

``python -m vitup_fast.bench.model --preset dinov3_splus --call "dense 448"``

The launches are the network's own, recorded (:mod:`vitup_fast.bench.launches`); no GPU is needed. Everything that is
assumed of the machine is an option, to be replaced by what ``vitup_fast.bench.peaks`` measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.harness import DTYPES, PRESETS, write_json
from vitup_fast.bench.launches import CALLS, Operation, network_launches, training_launches
from vitup_fast.kernels import cuda
from vitup_fast.kernels.triton import common, tiles

from vitup_fast import ViTUpConfig
from vitup_fast.ops.coordinates import nearest_token


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU; those of an H100 SXM by default.

    Attributes:
        matrix: rate of products in 16 bits, in FLOP/s; measured by cuBLAS at 8192 cubed.
        single: rate of products in float32, in FLOP/s.
        l2: what all multiprocessors read of the L2 cache, in bytes/s; 5.5e12 to 7.8e12 are published.
        copy: memory, in bytes/s.
        cache: what stays in the L2 cache between two kernels, in bytes: of 50 MB what two halves hold of both.
        multiprocessors: number of them.
        clock: cycles per second.
        latency: of a read from the L2 cache with its waiting, in seconds.
        shared: bytes that a multiprocessor reads or writes of its shared memory in a cycle.
        turn: cycles in which one consumer of an MLP in one kernel hands the matrix unit to the other: guessed.
        gap: between two kernels of a graph, in seconds.
    """

    matrix: float = 798e12
    single: float = 60e12
    l2: float = 5.5e12
    copy: float = 3.0e12
    cache: float = 30e6
    multiprocessors: int = common.TYPICAL_MULTIPROCESSORS
    clock: float = 1.7e9
    latency: float = 0.5e-6
    shared: float = 128.0
    turn: float = 50.0
    gap: float = 0.8e-6

    @property
    def rates(self) -> tiles.Rates:
        """The same as the choice of tiles takes them."""
        return tiles.Rates(self.matrix, self.single, self.l2, self.copy)


@dataclass(frozen=True)
class Cost:
    """One launch.

    Attributes:
        kernel: name, and what tells its role.
        flops: of its products.
        l2: bytes that all of its blocks read and write together.
        memory: bytes that do not stay in the L2 cache.
        waves: blocks of the busiest multiprocessor over those that it holds at a time.
        seconds: what it takes.
    """

    kernel: str
    flops: float
    l2: float
    memory: float
    waves: float
    seconds: float


def beyond_cache(machine: Machine, *sizes: float) -> float:
    """Bytes of tensors that do not fit what stays in the L2 cache."""
    return sum(size for size in sizes if size > machine.cache)


def product_cost(name: str, values: dict[str, Any], machine: Machine, capability: int) -> Cost:
    """A product with its prologue and epilogue; see :func:`vitup_fast.kernels.triton.tiles.seconds`."""
    M, K, N = values["M"], values["K"], values["N"]
    x, out = values["p_x"], values.get("p_out")
    itemsize, out_itemsize = x.itemsize, 1 if out is None else out.itemsize
    columns = values["BLOCK_N"] * values.get("TILES", 1)
    tile = tiles.Tile(
        values["BLOCK_M"], columns, values["BLOCK_K"], values["num_warps"], values["num_stages"]
    )
    product = tiles.Product(M, N, K, itemsize, out_itemsize, False)
    seconds = tiles.seconds(product, tile, machine.multiprocessors, capability, machine.rates)
    blocks = -(-M // tile.rows) * -(-N // columns)
    residual = M * N * itemsize * bool(values.get("RESIDUAL"))
    traffic = blocks * (tile.rows + min(columns, N)) * K * itemsize + M * N * out_itemsize + residual
    memory = beyond_cache(machine, M * K * itemsize, M * N * out_itemsize, residual)
    waves = -(-blocks // machine.multiprocessors) / tiles.resident(tile, itemsize, capability)
    title = f"{name} {K} -> {N}, {tile.rows} x {columns}" + " norm" * bool(values.get("OUT_NORM"))
    return Cost(title, 2.0 * M * N * K, traffic, memory, waves, max(seconds, memory / machine.copy))


# The compiled product of csrc/cuda/linear_kernel.cuh: rows of a thread block's tile, inner columns of a slot, and slots
# that one consumer leads the other by in tiles of so many columns.
COMPILED_ROWS, COMPILED_DEPTH, COMPILED_LEAD = cuda.LINEAR_ROWS // 2, 64, {256: 2, 192: 3}
# Instructions for a number at the end of a tile, as in tiles.py; counted in the code of sm_90a 4 to 14 are executed.
EPILOGUE_INSTRUCTIONS = 16


def compiled_columns(values: dict[str, Any], machine: Machine, capability: int) -> int | None:
    """Columns of the tiles in which the compiled product takes what Triton's was recorded for, or None."""
    x, out = values["p_x"], values["p_out"]
    if capability != 90 or x.dtype != torch.bfloat16 or out.dtype != x.dtype or values["OUT_NORM"]:
        return None
    return cuda.linear_columns(values["M"], values["N"], values["K"], machine.multiprocessors)


def compiled_cost(values: dict[str, Any], columns: int, machine: Machine) -> Cost:
    """The compiled product: its matrix units, shared memory or traffic, and what of a tile's end nothing hides."""
    M, K, N = values["M"], values["K"], values["N"]
    steps, clusters = K // COMPILED_DEPTH, machine.multiprocessors // 2
    residual = bool(values["RESIDUAL"])
    area = COMPILED_ROWS * columns
    # Cycles are those of the clock at which the matrix units reach their rate, 2048 multiply-adds in each.
    clock = machine.matrix / machine.multiprocessors / 4096
    slot = area * COMPILED_DEPTH / 2048 / clock
    # A consumer's end of a tile runs behind the other's products of the slots that it lags by, alone at full rate.
    end = area / 2 * EPILOGUE_INSTRUCTIONS / 128 / clock
    matrix = steps * slot + max(0.0, end - COMPILED_LEAD[columns] * slot / 2)
    # Copies write rows and weights, products read the rows, and the weights for each consumer.
    shared = steps * (2 * COMPILED_ROWS + 3 * columns) * COMPILED_DEPTH * 2 / machine.shared / clock
    # Rows, and half of the weights: the other thread block of the cluster brings the rest.
    read = steps * (COMPILED_ROWS + columns / 2) * COMPILED_DEPTH * 2
    traffic = read + area * 2 * (1 + residual)

    def tile_seconds(busy: int) -> float:
        share = min(machine.l2 / (2 * busy), tiles.MULTIPROCESSOR_L2)
        return max(matrix, shared, traffic / share)

    in_all = -(-M // cuda.LINEAR_ROWS) * (N // columns)
    rounds, rest = divmod(in_all, clusters)
    seconds = (
        rounds * tile_seconds(clusters) + (tile_seconds(rest) if rest else 0.0) + end + tiles.START_SECONDS
    )
    memory = beyond_cache(machine, M * K * 2, M * N * 2, M * N * 2 * residual)
    title = f"linear_sm90 {K} -> {N}, {COMPILED_ROWS} x {columns}" + " + residual" * residual
    return Cost(
        title,
        2.0 * M * N * K,
        2 * in_all * traffic,
        memory,
        in_all / clusters,
        max(seconds, memory / machine.copy),
    )


def blocks_cost(
    title: str,
    machine: Machine,
    count: int,
    together: int,
    warps: int,
    itemsize: int,
    flops: float,
    traffic: float,
    lanes: float = 0.0,
    exposed: float = 0.0,
    alone: float = 0.0,
    memory: float = 0.0,
) -> Cost:
    """Equal blocks: products, the work of lanes and traffic of different blocks overlap, others add up.

    Args:
        title: the kernel.
        machine: the GPU.
        count: number of blocks.
        together: how many a multiprocessor can hold.
        warps: of a block.
        itemsize: bytes of an operand's number.
        flops: of a block's products.
        traffic: bytes that a block reads and writes.
        lanes: seconds of a block between its products.
        exposed: seconds in which a block awaits copies.
        alone: seconds of a block that nothing hides.
        memory: bytes of all blocks that do not stay in the L2 cache.
    """
    most = -(-count // machine.multiprocessors)
    together = min(most, together)
    busy = min(1.0, together * warps / 8)
    matrix = machine.matrix if itemsize == 2 else machine.single
    products = flops / (matrix / machine.multiprocessors * busy)
    share = min(machine.l2 / min(count, machine.multiprocessors), tiles.MULTIPROCESSOR_L2)
    if together > 1:
        block = max(products, lanes, traffic / share, exposed / together) + alone
    else:
        block = max(products + lanes, traffic / share) + exposed + alone
    seconds = max(most * block + tiles.START_SECONDS, memory / machine.copy)
    return Cost(title, flops * count, traffic * count, memory, most / together, seconds)


def attention_cost(name: str, values: dict[str, Any], machine: Machine, capability: int) -> Cost:
    """Attention forward, or its gradient for queries or for keys and values.

    Of a score sixteen exponentials in a cycle, and in 128 lanes: maximum, difference, sum and rounding; in a
    backward pass two differences, a product, a scale and roundings.
    """
    D, head, T, N = values["D"], values["HEAD"], values["T"], values["N"]
    images, itemsize = values["p_key"].shape[0], values["p_key"].itemsize
    queries, keys, warps, stages = (values[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    # Rotation of a pair: sine, cosine and floor as exponentials, beside other instructions; more for float32's digits.
    rotation = queries * head / 2 * ((8 if itemsize == 2 else 31) / 128 + 3 / 16) / machine.clock
    blocks = -(-N // queries) * (D // head) * images
    memory = beyond_cache(machine, *(values[n].nbytes for n in ("p_x", "p_out", "p_grad") if n in values))
    if name == "rope_cross_attention_key_backward":
        split = values["queries_per_split"]
        blocks = -(-T // keys) * (D // head) * images * -(-N // split)
        scores, products = split * keys, 4
        traffic = split * (2 * head * itemsize + 8) + keys * head * (2 * itemsize + 8)
        loops, rotation = -(-split // queries), 0.0
    else:
        scores, products = queries * T, 3 if "backward" in name else 2
        traffic = (2 * T * head + queries * head * (4 if "backward" in name else 1)) * itemsize
        loops = -(-T // keys)
    flops, lanes = 2.0 * products * scores * head, scores * (1 / 16 + (6 if "backward" in name else 4) / 128)
    if "p_weight" in values:  # the projection of queries
        flops += 2.0 * queries * head * D
        traffic += (queries + head) * D * itemsize
    tile = tiles.Tile(queries, head + keys, head, warps, stages)
    return blocks_cost(
        f"{name} {queries} x {keys}, {stages} stages",
        machine,
        blocks,
        tiles.resident(tile, itemsize, capability),
        warps,
        itemsize,
        flops,
        traffic,
        lanes / machine.clock,
        # With two stages copies are awaited as soon as they are issued.
        0.0 if stages > 2 else machine.latency * loops,
        rotation,
        memory,
    )


def hidden_backward_cost(name: str, values: dict[str, Any], machine: Machine) -> Cost:
    """Two products into two sums, whose registers leave room for one block, then GELU with its gradient."""
    M, E, inner = values["M"], values["E"], values["K"] + values["N"]
    rows, columns, itemsize = values["BLOCK_M"], values["BLOCK_N"], values["p_x"].itemsize
    return blocks_cost(
        f"{name} {values['K']} + {values['N']} -> {E}, {rows} x {columns}",
        machine,
        -(-M // rows) * (E // columns),
        1,
        values["num_warps"],
        itemsize,
        2.0 * rows * columns * inner,
        ((rows + columns) * inner + 2 * rows * columns) * itemsize,
        alone=tiles.START_SECONDS + 2 * rows * columns / tiles.EPILOGUE_RATE,
        memory=beyond_cache(
            machine, *(values[n].nbytes for n in ("p_x", "p_grad", "p_hidden", "p_grad_hidden"))
        ),
    )


def weight_gradient_cost(name: str, values: dict[str, Any], machine: Machine, capability: int) -> Cost:
    """A product over the rows, in as many splits as fill the GPU."""
    left, right, partial = values["p_left"], values["p_right"], values["p_out"]
    splits, P, Q = partial.shape
    tile = tiles.Tile(*(values[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")))
    product = tiles.Product(P * splits, Q, values["rows_per_split"], left.itemsize, partial.itemsize, False)
    seconds = tiles.seconds(product, tile, machine.multiprocessors, capability, machine.rates)
    blocks = -(-P // tile.rows) * -(-Q // tile.columns) * splits
    traffic = blocks * (tile.rows + tile.columns) * product.K * left.itemsize + partial.nbytes
    memory = beyond_cache(machine, left.nbytes, right.nbytes, partial.nbytes)
    waves = -(-blocks // machine.multiprocessors) / tiles.resident(tile, left.itemsize, capability)
    title = f"{name} {P} x {Q}, {splits} splits of {tile.rows} x {tile.columns}"
    flops = 2.0 * P * Q * values["M"]
    return Cost(title, flops, traffic, memory, waves, max(seconds, memory / machine.copy))


def rows_cost(name: str, values: dict[str, Any], machine: Machine) -> Cost:
    """A kernel that reads and writes each row once; a segment's reads wait for each other."""
    touched = {id(v): v for k, v in values.items() if isinstance(v, Tensor) and k != "p_grid"}
    sizes = [t.nbytes for t in touched.values()]
    if "p_grid" in values:  # four neighbours, of which most are shared
        sizes.append(2 * values["p_out" if "p_out" in values else "p_grad"].nbytes)
    traffic, memory = float(sum(sizes)), beyond_cache(machine, *sizes)
    seconds = max((traffic - memory) / machine.l2, memory / machine.copy) + 2 * tiles.START_SECONDS
    waves = 1.0
    if "p_order" in values:  # offsets, order, row; of a cell of the grid those of four neighbours
        segments = (values["p_offsets"].numel() - 1) * -(-values["D"] // values["BLOCK_D"])
        waves = segments / machine.multiprocessors / min(32, 64 // values["num_warps"])
        seconds += max(1.0, waves) * 3 * (4 if "p_grad_grid" in values else 1) * machine.latency
    return Cost(name, 0.0, traffic, memory, waves, seconds)


class OneKernelMLP(NamedTuple):
    """An MLP as one kernel (``csrc/cuda/residual_mlp*_kernel.cuh``), in the place of the launches of its parts.

    Attributes:
        rows: number of rows M.
        hidden: width E of the hidden layer.
        token: of the FiLM MLP, token of each row, else None.
        film: of the FiLM MLP, row of ``[gamma, beta]`` of each row, else None.
        fp8: whether its products are of 8-bit numbers.
    """

    rows: int
    hidden: int
    token: Tensor | None  # [M]
    film: Tensor | None  # [M]
    fp8: bool = False


# Its sizes, and instructions that a warp of it executes for a tile beside its products, counted in the code of sm_90a.
MLP_DIM, MLP_ROWS, MLP_CHUNK = 384, 128, 32
MLP_INSTRUCTIONS, FILM_INSTRUCTIONS = 3500, 7050
MLP_FP8_INSTRUCTIONS, FILM_FP8_INSTRUCTIONS = 3200, 5050


def values_of(launch: common.Launch) -> dict[str, Any]:
    """Arguments of a launch by name."""
    return dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options


def with_one_kernel_mlps(
    launches: Sequence[common.Launch], machine: Machine = Machine(), fp8: bool = False
) -> list[common.Launch | OneKernelMLP]:
    """The launches of ``impl="cuda"`` on Hopper: an MLP's are one where the kernel takes its dtype, width and rows.

    With ``fp8`` those of ``impl="cuda_fp8"``: all MLPs of that width are, with 8-bit products.
    """
    found: list[common.Launch | OneKernelMLP] = []
    # Both products of an MLP, gathering before and a LayerNorm in a pass of its own after them.
    waiting = list(launches)
    while waiting:
        launch = waiting.pop(0)
        first, second = values_of(launch), values_of(waiting[0]) if waiting else {}
        hidden = first.get("p_out")
        is_mlp = (
            first.get("GELU")
            and second.get("p_x") is not None
            and second["p_x"].data_ptr() == hidden.data_ptr()
            and first["p_x"].dtype == torch.bfloat16
            and first["K"] == second["N"] == MLP_DIM
        )
        before = values_of(found[-1]) if found and isinstance(found[-1], common.Launch) else {}
        gathers = "p_gamma_beta" in before and before["p_out"].data_ptr() == first["p_x"].data_ptr()
        if not is_mlp or not (fp8 or cuda.fills_waves(first["M"], machine.multiprocessors)):
            found.append(launch)
            continue
        waiting.pop(0)
        token = film = None
        if gathers:
            token, film = film_rows(before)
            found.pop()
            if not second["OUT_NORM"] and waiting[0].kernel.fn.__name__ == "add_layer_norm_kernel":
                waiting.pop(0)
        found.append(OneKernelMLP(first["M"], first["N"], token, film, fp8))
    return found


def film_rows(modulate: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token and row of ``[gamma, beta]`` of each row that ``modulate_kernel`` makes."""
    M, grid = modulate["M"], (modulate["token_h"], modulate["token_w"])
    if modulate["TABLE"]:
        images = M // modulate["N"]
        return modulate["p_token"].repeat(images), modulate["p_table_row"].repeat(images)
    rows = torch.arange(M, dtype=torch.int64, device="cpu")
    return nearest_token(modulate["p_coords"], grid)[0].flatten(), rows


def distinct(index: Tensor) -> float:
    """Different numbers among those of a tile, on average."""
    tiles_of = index[: max(1, len(index) // MLP_ROWS) * MLP_ROWS].view(-1, min(MLP_ROWS, len(index)))
    return 1.0 + tiles_of.sort(1).values.diff(dim=1).ne(0).sum(1).double().mean().item()


def mlp_cost(mlp: OneKernelMLP, machine: Machine) -> Cost:
    """An MLP in one kernel: chunk after chunk of hidden columns, each bound by products or shared memory.

    Cycles are those of the clock at which the matrix units reach their rate. Rows that the FiLM MLP gathers come from
    the L2 cache once for a tile: the L1 cache keeps the strip that neighbours share.
    """
    M, E, D, rows = mlp.rows, mlp.hidden, MLP_DIM, MLP_ROWS
    clock = machine.matrix / machine.multiprocessors / 4096  # 2048 multiply-adds a cycle
    tiles_of = -(-M // (2 * rows)) * 2  # in clusters of two
    waves = -(-tiles_of // (machine.multiprocessors // 2 * 2))
    share = min(machine.l2 / min(tiles_of, machine.multiprocessors), tiles.MULTIPROCESSOR_L2) / clock
    itemsize, turns, chunks = (1, 2, E / MLP_CHUNK + 1) if mlp.fp8 else (2, 4, E / MLP_CHUNK)
    weights = D * MLP_CHUNK * itemsize
    products = 2 * rows * D * MLP_CHUNK / (4096 / itemsize)
    # Both consumers of a block read their rows and W1's chunk, and W2's; copies write both chunks.
    shared = (rows * D * itemsize + 6 * weights) / machine.shared
    chunk = max(products, shared, weights / share) + turns * machine.turn
    # Four schedulers issue for a warp of each consumer.
    instructions, gathered = 2.0 * (MLP_FP8_INSTRUCTIONS if mlp.fp8 else MLP_INSTRUCTIONS), 0.0
    if mlp.film is not None:
        instructions = 2.0 * (FILM_FP8_INSTRUCTIONS if mlp.fp8 else FILM_INSTRUCTIONS)
        gathered = distinct(mlp.token) * D * 2 + distinct(mlp.film) * D * 8
    tile = chunks * chunk + instructions + gathered / share
    traffic = tiles_of * (2 * rows * D * 2 + E / MLP_CHUNK * weights + gathered)
    title = f"{'film' if gathered else 'residual'} mlp in one kernel {D} -> {E} -> {D}" + ", e4m3" * mlp.fp8
    memory = 2 * beyond_cache(machine, M * D * 2)
    return Cost(title, 4.0 * M * D * E, traffic, memory, waves, waves * tile / clock + tiles.START_SECONDS)


def operation_cost(operation: Operation, machine: Machine) -> Cost:
    """An operation of PyTorch, as one kernel."""
    memory = beyond_cache(machine, operation.nbytes)
    seconds = max(operation.nbytes / machine.l2, memory / machine.copy) + 2 * tiles.START_SECONDS
    return Cost("operations of PyTorch", 0.0, float(operation.nbytes), memory, 1.0, seconds)


def cost(
    launch: common.Launch | OneKernelMLP | Operation,
    machine: Machine,
    capability: int,
    compiled: bool = False,
) -> Cost:
    """What a launch costs, with ``compiled`` by the compiled product where that takes it."""
    if isinstance(launch, OneKernelMLP):
        return mlp_cost(launch, machine)
    if isinstance(launch, Operation):
        return operation_cost(launch, machine)
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    values = values_of(launch)
    columns = compiled_columns(values, machine, capability) if compiled and name == "linear" else None
    if columns is not None:
        return compiled_cost(values, columns, machine)
    if name in ("linear", "linear_argmax"):
        return product_cost(name, values, machine, capability)
    if name.startswith("rope_cross_attention"):
        return attention_cost(name, values, machine, capability)
    if name == "hidden_backward":
        return hidden_backward_cost(name, values, machine)
    if name == "weight_gradient":
        return weight_gradient_cost(name, values, machine, capability)
    return rows_cost(name, values, machine)


@dataclass(frozen=True)
class Prediction:
    """A call of the network.

    Attributes:
        title: which.
        seconds: of all its launches, with the gaps between them; beside others they take what these leave.
        flops: of all products.
        launches: their number.
        kernels: one row for each kernel and role, the longest first.
    """

    title: str
    seconds: float
    flops: float
    launches: int
    kernels: list[dict[str, Any]]

    def table(self) -> str:
        """Lay it out for a terminal, or as a table of Markdown."""
        lines = [
            f"{self.title}: {1e3 * self.seconds:.1f} ms, {self.launches} launches, "
            f"{self.flops / self.seconds / 1e12:.0f} TFLOP/s",
            "",
            "| kernel | launches | ms | TFLOP | L2 GB | memory GB | waves |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for k in self.kernels:
            lines.append(
                f"| {k['kernel']} | {k['launches']} | {1e3 * k['seconds']:.2f} | {k['flops'] / 1e12:.2f} | "
                f"{k['l2'] / 1e9:.1f} | {k['memory'] / 1e9:.2f} | {k['waves']:.1f} |"
            )
        return "\n".join(lines)


def predict(
    title: str,
    launches: Sequence[common.Launch | OneKernelMLP | Operation],
    machine: Machine = Machine(),
    capability: int = 90,
    compiled: bool = False,
) -> Prediction:
    """Predict a call from its launches, with ``compiled`` as if the compiled product took what it can of them.

    Those that may run beside others take no time of their own, as long as multiprocessors have room for both.
    """
    chains, busy = {False: 0.0, True: 0.0}, 0.0
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches:
        one = cost(launch, machine, capability, compiled)
        row = rows.setdefault(
            one.kernel, asdict(one) | {"launches": 0, "seconds": 0.0, "flops": 0.0, "l2": 0.0, "memory": 0.0}
        )
        chains[getattr(launch, "beside", False)] += one.seconds + machine.gap
        busy += one.seconds * min(1.0, one.waves)
        row["launches"] += 1
        row["waves"] = max(row["waves"], one.waves)
        for name in ("seconds", "flops", "l2", "memory"):
            row[name] += getattr(one, name)
    kernels = sorted(rows.values(), key=lambda row: -row["seconds"])
    seconds = max(*chains.values(), busy) if chains[True] else chains[False]
    return Prediction(title, seconds, sum(row["flops"] for row in kernels), len(launches), kernels)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and print; see ``--help``.

    Raises:
        InputError: a path that cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", nargs="+", choices=PRESETS, default=list(PRESETS[:2]), help="sizes (default: S+ and B)")
    add("--call", nargs="+", choices=CALLS, default=["dense 448", "dense 1024", "scattered 4096"])
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="compute type (default: bfloat16)")
    add("--sm", type=int, default=90, help="compute capability (default: 90)")
    add(
        "--one-kernel", action="store_true", help="MLPs in one kernel each, as impl='cuda' has them on Hopper"
    )
    add(
        "--fp8",
        action="store_true",
        help="the same in 8 bits, as impl='cuda_fp8' has them",
    )
    add("--compiled", action="store_true", help="with the compiled product for compute capability 9.0")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    for one in fields(Machine):
        add(f"--{one.name}", type=type(one.default), default=one.default, help=f"default: {one.default:g}")
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    machine = Machine(**{one.name: getattr(options, one.name) for one in fields(Machine)})
    found = []
    for preset in options.preset:
        config, dtype = ViTUpConfig.preset(preset), getattr(torch, options.dtype)
        forward = tuple(call for call in options.call if call != "training")
        recorded: dict[str, Sequence[common.Launch | Operation]] = {}
        recorded |= network_launches(config, dtype, options.sm, forward)
        if "training" in options.call:
            queries, launches = training_launches(config, dtype, options.sm)
            recorded[f"training, {queries} queries"] = launches
        for call, launches in recorded.items():
            title = f"ViT-Up D={config.dim}, {call}, {options.dtype}"
            if (options.one_kernel or options.fp8) and call in forward:
                launches = with_one_kernel_mlps(launches, machine, options.fp8)
                title += ", MLPs in one kernel" + ", in e4m3" * options.fp8
            found.append(predict(title, launches, machine, options.sm, options.compiled))
            print(found[-1].table() + "\n", flush=True)
    if options.json is not None:
        write_json(options.json, {"machine": asdict(machine), "predictions": [asdict(p) for p in found]})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
