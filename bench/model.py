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
from typing import Any

import torch
from torch import Tensor
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.harness import DTYPES, PRESETS, write_json
from vitup_fast.bench.launches import CALLS, network_launches
from vitup_fast.kernels.triton import common, tiles

from vitup_fast import ViTUpConfig


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


def attention_cost(name: str, values: dict[str, Any], machine: Machine, capability: int) -> Cost:
    """Query projection, rotation and softmax; products and exponentials of different blocks overlap, others add up."""
    N, T, D, head = values["N"], values["T"], values["D"], values["HEAD"]
    images, itemsize = values["p_key"].shape[0], values["p_x"].itemsize
    rows, keys = values["BLOCK_M"], values["BLOCK_N"]
    blocks = -(-N // rows) * (D // head) * images
    most = -(-blocks // machine.multiprocessors)
    tile = tiles.Tile(rows, head + keys, head, values["num_warps"], values["num_stages"])
    together = min(most, tiles.resident(tile, itemsize, capability))
    busy = min(1.0, together * values["num_warps"] / 8)
    flops = 2.0 * rows * head * D + 4.0 * rows * T * head
    matrix = machine.matrix if itemsize == 2 else machine.single
    products = flops / (matrix / machine.multiprocessors * busy)
    # Sixteen exponentials in a cycle; maximum, difference, sum and rounding of a score in 128 lanes.
    softmax = rows * T * (1 / 16 + 4 / 128) / machine.clock
    rotation = rows * head / 2 * 60 / 128 / machine.clock
    traffic = (rows * D + head * D + 2 * T * head + rows * head) * itemsize
    share = min(machine.l2 / min(blocks, machine.multiprocessors), tiles.MULTIPROCESSOR_L2)
    # With two stages copies are awaited as soon as they are issued.
    exposed = 0.0 if values["num_stages"] > 2 else machine.latency * -(-T // keys)
    if together > 1:
        block = max(products, softmax, traffic / share, exposed / together) + rotation
    else:
        block = max(products + softmax, traffic / share) + exposed + rotation
    memory = beyond_cache(machine, values["p_x"].nbytes, values["p_out"].nbytes)
    return Cost(
        f"{name} {rows} x {keys}, {values['num_stages']} stages",
        flops * blocks,
        traffic * blocks,
        memory,
        most / together,
        max(most * block + tiles.START_SECONDS, memory / machine.copy),
    )


def rows_cost(name: str, values: dict[str, Any], machine: Machine) -> Cost:
    """A kernel that reads and writes each row once."""
    touched = {id(v): v for k, v in values.items() if isinstance(v, Tensor) and k != "p_grid"}
    sizes = [t.nbytes for t in touched.values()]
    if "p_grid" in values and "p_out" in values:  # four neighbours, of which most are shared
        sizes.append(2 * values["p_out"].nbytes)
    traffic, memory = float(sum(sizes)), beyond_cache(machine, *sizes)
    seconds = max((traffic - memory) / machine.l2, memory / machine.copy) + 2 * tiles.START_SECONDS
    return Cost(name, 0.0, traffic, memory, 1.0, seconds)


def cost(launch: common.Launch, machine: Machine, capability: int) -> Cost:
    """What a launch of the forward pass costs."""
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    if name in ("linear", "linear_argmax"):
        return product_cost(name, values, machine, capability)
    if name == "rope_cross_attention":
        return attention_cost(name, values, machine, capability)
    return rows_cost(name, values, machine)


@dataclass(frozen=True)
class Prediction:
    """A call of the network.

    Attributes:
        title: which.
        seconds: of all its launches, with the gaps between them.
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
    title: str, launches: Sequence[common.Launch], machine: Machine = Machine(), capability: int = 90
) -> Prediction:
    """Predict a call from its launches."""
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches:
        one = cost(launch, machine, capability)
        row = rows.setdefault(
            one.kernel, asdict(one) | {"launches": 0, "seconds": 0.0, "flops": 0.0, "l2": 0.0, "memory": 0.0}
        )
        row["launches"] += 1
        row["waves"] = max(row["waves"], one.waves)
        for name in ("seconds", "flops", "l2", "memory"):
            row[name] += getattr(one, name)
    kernels = sorted(rows.values(), key=lambda row: -row["seconds"])
    seconds = sum(row["seconds"] for row in kernels) + machine.gap * len(launches)
    return Prediction(title, seconds, sum(row["flops"] for row in kernels), len(launches), kernels)


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and print; see ``--help``.

    Raises:
        InputError: a path that cannot be written.
    """
    forward = [name for name in CALLS if name != "training"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", nargs="+", choices=PRESETS, default=list(PRESETS[:2]), help="sizes (default: S+ and B)")
    add("--call", nargs="+", choices=forward, default=["dense 448", "dense 1024", "scattered 4096"])
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="compute type (default: bfloat16)")
    add("--sm", type=int, default=90, help="compute capability (default: 90)")
    add("--json", type=Path, metavar="PATH", help="write the figures to this file")
    for one in fields(Machine):
        add(f"--{one.name}", type=type(one.default), default=one.default, help=f"default: {one.default:g}")
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    machine = Machine(**{one.name: getattr(options, one.name) for one in fields(Machine)})
    found = []
    for preset in options.preset:
        config = ViTUpConfig.preset(preset)
        recorded = network_launches(config, getattr(torch, options.dtype), options.sm, tuple(options.call))
        for call, launches in recorded.items():
            title = f"ViT-Up D={config.dim}, {call}, {options.dtype}"
            found.append(predict(title, launches, machine, options.sm))
            print(found[-1].table() + "\n", flush=True)
    if options.json is not None:
        write_json(options.json, {"machine": asdict(machine), "predictions": [asdict(p) for p in found]})
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
