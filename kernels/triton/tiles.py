"""Which tile a product runs with: of a ladder from wide to narrow the one whose estimated time is least.

A thread block reads its rows and its columns once from the L2 cache, so wide tiles read less in all; but where few of
them are needed, most multiprocessors stay idle. The estimate weighs both; its rates are those of datasheets and of the
measurements in bench/NOTES.md, and only their ratios decide.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# Widest first. Whole rows begin at the first, where LayerNorm and moments need no other block.
RUNGS = ("linear_rows", "linear", "linear_narrow", "linear_few_rows")
# Filling the pipeline of a block, and writing its results where no other block computes meanwhile, in seconds.
START_SECONDS = 1.0e-6
# Elements that a multiprocessor takes through an epilogue in a second: 128 lanes, 16 instructions, 1.7 GHz.
EPILOGUE_RATE = 128 * 1.7e9 / 16
# Bytes that one multiprocessor reads from the L2 cache in a second: 64 in a cycle of 1.7 GHz.
MULTIPROCESSOR_L2 = 64 * 1.7e9


class Rates(NamedTuple):
    """What all multiprocessors of a GPU do together."""

    half: float  # FLOP/s of products in 16 bits
    single: float  # FLOP/s of products in float32 and wider
    l2: float  # bytes/s
    copy: float  # bytes/s of memory


# By compute capability; what is not listed takes those of the next older one.
RATES = {
    80: Rates(312e12, 19.5e12, 4.0e12, 1.5e12),
    90: Rates(798e12, 60e12, 5.5e12, 3.0e12),
    100: Rates(1600e12, 75e12, 9e12, 7e12),
}
SHARED_BYTES = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}


class Tile(NamedTuple):
    """Rows and columns of a thread block's result, and what it computes them with."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Product(NamedTuple):
    """A product ``[M, K] x [K, N]`` with its LayerNorm of complete rows, if it ends with one."""

    M: int
    N: int
    K: int
    itemsize: int
    out_itemsize: int
    norm: bool


def of_capability(table: dict[int, object], capability: int) -> object:
    """The entry of the newest capability that is not newer, else of the oldest."""
    known = [sm for sm in table if sm <= capability]
    return table[max(known) if known else min(table)]


def resident(tile: Tile, itemsize: int, capability: int) -> int:
    """Blocks that a multiprocessor holds at a time, as far as sums and stages tell."""
    shared = tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize + 1024
    registers = tile.rows * tile.columns + 32 * tile.warps * 64
    return max(1, min(of_capability(SHARED_BYTES, capability) // shared, 65536 // registers))


def seconds(
    product: Product, tile: Tile, multiprocessors: int, capability: int, rates: Rates | None = None
) -> float:
    """Estimated time of a product.

    Args:
        product: its sizes.
        tile: the tile of a thread block.
        multiprocessors: of the GPU.
        capability: its compute capability, such as 90.
        rates: of all multiprocessors; None takes those of the capability.
    """
    M, N, K, itemsize, out_itemsize, norm = product
    if not M * N:
        return 0.0
    if rates is None:
        rates = of_capability(RATES, capability)
    columns = -(-N // tile.columns)
    blocks = -(-M // tile.rows) * columns
    most = -(-blocks // multiprocessors)  # blocks of the busiest multiprocessor
    together = min(most, resident(tile, itemsize, capability))
    # Half as many warps as the matrix units want leave half of them idle.
    busy = min(1.0, together * tile.warps / 8)
    matrix = (rates.half if itemsize == 2 else rates.single) / multiprocessors * busy
    area = tile.rows * min(tile.columns, N)
    traffic = (tile.rows + min(tile.columns, N)) * K * itemsize + area * out_itemsize
    cache = min(rates.l2 / min(blocks, multiprocessors), MULTIPROCESSOR_L2)
    inner = max(2 * area * K / matrix, traffic / cache)
    outer = START_SECONDS + area / EPILOGUE_RATE
    rounds = -(-most // together)
    time = most * inner + rounds * outer if together == 1 else most * max(inner, outer) + outer
    if norm and columns > 1:  # a pass of its own
        time += 2 * START_SECONDS + M * N * (itemsize + 2 * out_itemsize) / rates.copy
    return time


@lru_cache(maxsize=1 << 14)
def fastest(product: Product, tiles: tuple[Tile, ...], multiprocessors: int, capability: int) -> int:
    """Number of the tile that is estimated to be fastest, the widest of equals."""
    times = [seconds(product, tile, multiprocessors, capability) for tile in tiles]
    return min(range(len(tiles)), key=times.__getitem__)
