from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitup_fast import extension

pytestmark = pytest.mark.skipif(extension.obstacle("cpu") is not None, reason="needs the kernels for CPUs")

# Around a line of 64 bytes, a block of 64 KiB, and nothing at all.
SIZES = [0, 1, 7, 63, 64, 65, 127, 4096, 65535, 65536, 65537, 200_003]


@pytest.fixture(params=extension.load().cpu.instruction_sets() if extension.obstacle("cpu") is None else [])
def cpu(request) -> Iterator:
    cpu = extension.load().cpu
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield cpu
    cpu.use_instruction_set(before)


def fingerprint(cpu, *regions: Tensor, stride: int = 0, threads: int = 2) -> int:
    addresses, sizes = [r.data_ptr() for r in regions], [r.nbytes for r in regions]
    return cpu.fingerprint(addresses, sizes, stride, threads=threads)


def random_bytes(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cpu", generator=generator)


@pytest.mark.parametrize("size", SIZES)
def test_every_bit_counts_wherever_memory_begins(cpu, size):
    memory = random_bytes(size + 5)
    here, moved = memory[5:], memory[5:].clone()
    before = fingerprint(cpu, here)
    assert fingerprint(cpu, moved) == before
    places = {0, size - 1, size // 2, *random.Random(size).sample(range(size), min(size, 40))}
    seen = {before}
    for place in places if size else ():
        for bit in (0, 7):
            moved[place] ^= 1 << bit
            seen.add(fingerprint(cpu, moved))
            moved[place] ^= 1 << bit
    assert len(seen) == 1 + 2 * len(places if size else ())
    memory[:5] += 1  # bytes before the region
    assert fingerprint(cpu, here) == before


def changes() -> dict[str, object]:
    """Changes of two regions of numbers that sums, exclusive or, or sums of squares would miss."""

    def at(place: slice | int, change) -> object:
        def apply(x: Tensor, y: Tensor) -> None:
            x[place] = change(x[place])

        return apply

    def swap_numbers(i: int, j: int) -> object:
        return lambda x, y: x.__setitem__([i, j], x[[j, i]])

    def swap_regions(x: Tensor, y: Tensor) -> None:
        x[:], y[:] = y.clone(), x.clone()

    def move_value(x: Tensor, y: Tensor) -> None:
        x[3], y[3] = y[3].clone(), x[3].clone()

    return {
        **{f"rotate by {n}": at(slice(None), lambda x, n=n: x.roll(n)) for n in (1, 2, 16, 32, 16384, -1)},
        **{f"swap 0 and {n}": swap_numbers(0, n) for n in (1, 2, 16, 17, 32, 16384, 20000)},
        "reverse": at(slice(None), lambda x: x.flip(0)),
        "negate all": at(slice(None), torch.neg),
        **{f"negate 0 and {n}": at([0, n], torch.neg) for n in (1, 2, 16, 32, 48, 16384)},
        "negate a line": at(slice(16, 32), torch.neg),
        "negate a block": at(slice(16384, 32768), torch.neg),
        "zero": at(slice(None), torch.zeros_like),
        "one value": at(5, torch.zeros_like),
        "last place of one value": at(5, lambda v: torch.nextafter(v, v + 1)),
        "one more": at(slice(None), lambda x: x + 1),
        "swap regions": swap_regions,
        "swap across regions": move_value,
    }


@pytest.mark.parametrize("fill", ["random", "zeros", "ones", "counting"])
def test_order_and_signs_count(cpu, fill):
    def regions() -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cpu").manual_seed(1)
        x, y = torch.randn(2, 40_000, dtype=torch.float32, device="cpu", generator=generator)
        if fill == "counting":
            x = torch.arange(len(x), dtype=torch.float32, device="cpu")
        elif fill != "random":
            x = torch.full_like(x, float(fill == "ones"))
        return x, y

    before = fingerprint(cpu, *regions())
    seen, distinct = {before}, 1
    for change in changes().values():
        x, y = regions()
        change(x, y)
        if any(
            torch.any(a.view(torch.int32) != b.view(torch.int32))
            for a, b in zip((x, y), regions(), strict=True)
        ):
            distinct += 1
            seen.add(fingerprint(cpu, x, y))
    assert len(seen) == distinct > 8


def test_the_same_on_any_threads_and_instruction_set():
    cpu = extension.load().cpu
    regions = [random_bytes(size, size) for size in SIZES]
    first = cpu.instruction_set()
    try:
        for stride in (0, 64, 100, 4096, 1 << 32):
            seen = set()
            for isa in cpu.instruction_sets():
                cpu.use_instruction_set(isa)
                seen |= {fingerprint(cpu, *regions, stride=stride, threads=t) for t in (1, 2, 3, 16)}
            assert len(seen) == 1
    finally:
        cpu.use_instruction_set(first)


def test_where_regions_end_counts(cpu):
    memory = random_bytes(1000)
    whole, halves = [memory], [memory[:512], memory[512:]]
    empty = memory[:0]
    sets = [[], [empty], [empty, empty], whole, halves, halves[::-1], [*whole, empty], [empty, *whole]]
    zeros = torch.zeros(130, dtype=torch.uint8, device="cpu")
    sets += [[zeros[:n]] for n in (1, 63, 64, 65, 128, 129)]
    assert len({fingerprint(cpu, *regions) for regions in sets}) == len(sets)
    assert cpu.fingerprint([0], [0], threads=2) == fingerprint(
        cpu, empty
    )  # an empty tensor's address is null


@pytest.mark.parametrize("stride", [64, 65, 100, 4096, 70_000])
def test_a_stride_reads_the_first_line_of_each_step(cpu, stride):
    memory = random_bytes(200_003)
    before = fingerprint(cpu, memory, stride=stride)
    if stride == 64:
        assert before == fingerprint(cpu, memory)
    for place in [*range(0, 140, 7), *range(199_990, 200_003), *range(4000, 180_000, 4177)]:
        memory[place] ^= 1
        assert (fingerprint(cpu, memory, stride=stride) != before) == (place % stride < 64), place
        memory[place] ^= 1


def test_arguments_are_checked(cpu):
    with pytest.raises(ValueError, match="sizes_in_bytes: expected one for each address"):
        cpu.fingerprint([0, 0], [0], threads=1)
    with pytest.raises(ValueError, match="sizes_in_bytes: expected no negative number"):
        cpu.fingerprint([0], [-1], threads=1)
    for stride in (-64, 1, 63, (1 << 32) + 1):
        with pytest.raises(ValueError, match="stride: expected"):
            cpu.fingerprint([0], [0], stride, threads=1)
