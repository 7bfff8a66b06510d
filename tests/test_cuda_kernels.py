"""The CUDA kernels without a GPU: their source on the host, what the compiler made of them, and when they run."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAST_IMPLS

if "cuda" not in FAST_IMPLS:
    pytest.skip("the extension is not built, or Triton cannot be used here", allow_module_level=True)

from vitup_fast.bench.choose_compiled import choose, main, reports_in
from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.cuda import compiled_kernels, launch_compiled
from vitup_fast.kernels.triton import common
from vitup_fast.kernels.triton.bilinear_sample import backward, sample, sample_moments
from vitup_fast.kernels.triton.film_mlp import FilmBuffers, Modulation, film_mlp, modulate
from vitup_fast.kernels.triton.linear import fold, linear
from vitup_fast.kernels.triton.residual_mlp import fold_mlp, residual_mlp

from vitup_fast import extension
from vitup_fast.errors import InputError, KernelError
from vitup_fast.ops.bilinear_sample import bilinear_sample_reference
from vitup_fast.ops.coordinates import nearest_token
from vitup_fast.testing import (
    OPERATIONS,
    Sizes,
    assert_within_budget,
    poisoned_allocations,
    random_coords,
    random_image,
    random_network,
)

implementations = importlib.import_module("vitup_fast.ops.implementations")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = DTYPES[1:]
# Every shape of the row kernels, widths between two of them, and rows beyond the capacity of the largest.
WIDTHS = (64, 72, 128, 192, 320, 384, 440, 512, 768, 1024, 1544, 2112)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(
    extension.obstacle("cuda") is not None or not torch.cuda.is_available(),
    reason="needs a GPU and the compiled CUDA kernels",
)


@pytest.fixture(autouse=True)
def compiled_everywhere():
    with compiled_kernels(implementations.COMPILED), poisoned_allocations():
        yield


def grid_and_coords(generator, dtype, D, B=2, N=37, P=9, Q=12, device=CPU):
    inputs = OPERATIONS["bilinear_sample"].inputs
    sizes = Sizes(B=B, N=N, D=D, patch_grid=(P, Q))
    return inputs(sizes, generator, dtype=dtype, device=device).values()


def film(generator, dtype, D, table, B=2, N=37, h=5, w=7, device=CPU):
    """Query states of the right shape, tokens, and where gamma and beta come from."""
    wide = torch.promote_types(dtype, torch.float32)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tokens = normal(B, h, w, D).to(device, dtype)
    x = torch.empty(B, N, D, dtype=dtype, device=device)
    if table:
        row, token = (torch.randint(n, (N,), generator=generator).to(device) for n in (11, h * w))
        return x, tokens, Modulation(normal(11, 2 * D).to(device, wide), None, row, token)
    coords = random_coords(generator, B, N, device=device).to(wide)
    return x, tokens, Modulation(normal(B * N, 2 * D).to(device, wide), coords, None, None)


def modulated_exactly(tokens, source, x):
    """``(1 + gamma) token + beta`` in float64."""
    B, h, w, D = tokens.shape
    if source.row is None:
        token, _ = nearest_token(source.coords, (h, w))  # [B, N]
        gamma_beta = source.gamma_beta.view(B, -1, 2 * D)
    else:
        token, gamma_beta = source.token.expand(B, -1), source.gamma_beta[source.row]
    nearest = tokens.flatten(1, 2).double().gather(1, token.unsqueeze(-1).expand(-1, -1, D))
    gamma, beta = gamma_beta.double().chunk(2, dim=-1)
    return ((1 + gamma) * nearest + beta).flatten(0, 1)


def assert_as_exact_as(eager, actual, exact, name="output"):
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)
    else:
        assert_within_budget(actual, eager, exact, factor=1.5, name=name)


def assert_moments_of(moments, rows):
    rows = rows.double()
    exact = torch.stack((rows.mean(-1), rows.var(-1, unbiased=False) * rows.shape[-1]), -1)
    eps = torch.finfo(moments.dtype).eps
    torch.testing.assert_close(moments[:, 0].double(), exact, rtol=40 * eps, atol=8 * eps)


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampling_is_as_exact_as_eager(generator, dtype, D):
    grid, coords = grid_and_coords(generator, dtype, D)
    moments = sample_moments(grid, coords.shape[1])
    actual = sample(grid, coords, moments=moments)
    exact = bilinear_sample_reference(grid.double(), coords)
    assert_as_exact_as(bilinear_sample_reference(grid, coords), actual, exact)
    assert_moments_of(moments, actual.flatten(0, 1))
    assert torch.equal(actual, sample(grid, coords))


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_sampling_are_as_exact_as_eager(generator, dtype, D):
    leaves = grid, coords = [t.requires_grad_() for t in grid_and_coords(generator, dtype, D)]
    grad = torch.randn(2, 37, D, generator=generator).to(dtype)
    eager = torch.autograd.grad(bilinear_sample_reference(grid, coords), leaves, grad)
    actual = backward(grad, grid.detach(), coords.detach(), [True, True])
    wide_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(bilinear_sample_reference(*wide_leaves), wide_leaves, grad.double())
    for name, mine, theirs, truth in zip(("grid", "coords"), actual, eager, exact, strict=True):
        assert_as_exact_as(theirs, mine, truth, name)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_is_exact_up_to_rounding(generator, dtype, D, table):
    x, tokens, source = film(generator, dtype, D, table)
    actual, moments = modulate(x, tokens, source)
    exact = modulated_exactly(tokens, source, x)
    wide = torch.promote_types(dtype, torch.float32)
    eager = modulated_exactly(tokens.to(wide), source, x).to(dtype)
    assert_as_exact_as(eager, actual, exact)
    assert_moments_of(moments, actual)


def run_modulate_backward(x, tokens, source, grad, film_dtype):
    (B, N, D), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    outputs = (
        torch.empty(B * N, D, dtype=wide, device=x.device),
        torch.empty(B * N, 2 * D, dtype=film_dtype, device=x.device),
        torch.empty(B * N, dtype=torch.int64, device=x.device),
    )
    sizes = (B * N, N, *tokens.shape[1:3])
    launch_compiled(
        "modulate_backward_kernel",
        (1,),
        (grad, tokens, source.gamma_beta, *source.pointers(), *outputs, *sizes),
        {"D": D, "TABLE": source.row is not None},
    )
    return outputs


@pytest.mark.parametrize("wide_film", [False, True])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("D", [64, 384, 768, 1024, 1544])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_modulation(generator, dtype, D, table, wide_film):
    x, tokens, source = film(generator, dtype, D, table)
    grad = torch.randn(x.shape[0] * x.shape[1], D, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    film_dtype = wide if wide_film else dtype
    grad_token, grad_film, index = run_modulate_backward(x, tokens, source, grad, film_dtype)
    B, h, w, _ = tokens.shape
    token = nearest_token(source.coords, (h, w))[0] if not table else source.token.expand(B, -1)
    where = (torch.arange(B).unsqueeze(-1) * (h * w) + token).flatten()
    assert torch.equal(index, where)
    g, nearest = grad.double(), tokens.flatten(0, 2).double()[where]
    gamma = (source.gamma_beta[source.row].repeat(B, 1) if table else source.gamma_beta)[:, :D].double()
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(grad_token.double(), g * (1 + gamma), rtol=2 * eps, atol=2 * eps)
    exact = torch.cat((g * nearest, g), dim=-1)
    film_eps = torch.finfo(film_dtype).eps
    torch.testing.assert_close(grad_film.double(), exact, rtol=film_eps, atol=1e-7)


def test_nearest_tokens_on_the_borders_between_them(generator):
    """Ties go to the even index; float32 holds these coordinates exactly."""
    h, w = 4, 8
    rows, columns = torch.arange(-1, h + 2) / h, torch.arange(-1, w + 2) / w
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    coords = torch.stack((x, y), -1).flatten(0, 1)[None]
    N = coords.shape[1]
    tokens = torch.randn(1, h, w, 8, generator=generator)
    source = Modulation(torch.randn(N, 16, generator=generator), coords, None, None)
    grad = torch.randn(N, 8, generator=generator)
    _, _, index = run_modulate_backward(torch.empty(1, N, 8), tokens, source, grad, torch.float32)
    assert torch.equal(index, nearest_token(coords, (h, w))[0][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 128, 136, 768])
def test_segments_empty_and_long(generator, dtype, D):
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.randn(500, D, generator=generator).to(wide)
    index = torch.randint(7, (500,), generator=generator)
    index[(index == 3) | (index == 6)] = 1  # some have none, the last among them
    actual = common.segment_sum(values, index, 7, dtype)
    exact = torch.zeros(7, D, dtype=torch.float64).index_add_(0, index, values.double())
    eager = torch.zeros(7, D, dtype=wide).index_add_(0, index, values).to(dtype)
    assert_as_exact_as(eager, actual, exact)
    assert not actual[[3, 6]].any()


@pytest.mark.parametrize("N", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_query_and_one(generator, dtype, N):
    grid, coords = grid_and_coords(generator, dtype, 64, B=3, N=N, P=1, Q=1)
    moments = sample_moments(grid, N)
    assert torch.equal(sample(grid, coords, moments=moments), grid.flatten(1, 2).expand(3, N, 64))
    grad = torch.ones(3, N, 64, dtype=dtype)
    grad_grid, grad_coords = backward(grad, grid, coords, [True, True])
    assert torch.equal(grad_grid, torch.full_like(grid, N))
    assert torch.equal(grad_coords, torch.zeros_like(coords))
    x, tokens, source = film(generator, dtype, 64, table=False, N=N)
    assert modulate(x, tokens, source)[0].isfinite().all()


def shifted(tensor):
    """The same numbers at an address that no vector may be loaded from."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    memory[1:] = tensor.flatten()
    moved = memory[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved


@pytest.mark.parametrize("D", [64, 384, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(generator, dtype, D):
    grid, coords = grid_and_coords(generator, dtype, D)
    grad = torch.randn(2, 37, D, generator=generator).to(dtype)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    close = {"rtol": 64 * eps, "atol": 64 * eps}
    assert torch.equal(sample(shifted(grid), shifted(coords)), sample(grid, coords))
    moved = backward(shifted(grad), shifted(grid), shifted(coords), [True, True])
    for mine, other in zip(moved, backward(grad, grid, coords, [True, True]), strict=True):
        torch.testing.assert_close(mine, other, **close)
    x, tokens, source = film(generator, dtype, D, table=False)
    rows, moments = modulate(x, tokens, source)
    moved, moved_moments = modulate(
        x,
        shifted(tokens),
        source._replace(gamma_beta=shifted(source.gamma_beta)),
        shifted(torch.empty_like(rows)),
    )
    assert torch.equal(moved, rows)
    torch.testing.assert_close(moved_moments, moments, **close)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_coordinates_change_no_other_row(generator, dtype, bad):
    grid, coords = grid_and_coords(generator, dtype, 64)
    wrong = coords.clone()
    wrong[1, 2] = bad
    others = torch.ones(2, 37, dtype=torch.bool)
    others[1, 2] = False
    good, actual = sample(grid, coords), sample(grid, wrong)
    assert torch.equal(actual[others], good[others])
    assert actual[1, 2].isnan().all() if bad != bad else actual[1, 2].isfinite().all()
    grad = torch.randn(2, 37, 64, generator=generator).to(dtype)
    grads = [backward(grad, grid, c, [False, True])[0] for c in (coords, wrong)]
    assert torch.equal(grads[0][others], grads[1][others])
    grad_grid, _ = backward(grad, grid, wrong, [True, True])
    assert torch.equal(grad_grid[0], backward(grad, grid, coords, [True, False])[0][0])
    assert not grad_grid[1, 2:-2].isnan().any()
    assert not grad_grid[1, :, 2:-2].isnan().any()
    x, tokens, source = film(generator, dtype, 64, table=False)
    wrong = source.coords.clone()
    wrong[1, 2] = bad
    rows = [modulate(x, tokens, source._replace(coords=c))[0].view(2, 37, 64) for c in (source.coords, wrong)]
    assert torch.equal(rows[0][others], rows[1][others])
    column = row = 0 if not bad > 0 else None
    corner = tokens[1, row or 0, column or 0] if not bad > 0 else tokens[1, -1, -1]
    gamma, beta = source.gamma_beta.view(2, 37, 128)[1, 2].chunk(2)
    expected = (corner.to(gamma) * gamma + beta + corner.to(gamma)).to(dtype)
    torch.testing.assert_close(rows[1][1, 2], expected)


def test_coordinates_keep_float64(generator):
    """A grid so wide that float32 cannot tell neighbouring cells apart."""
    Q = 1 << 22
    grid = torch.arange(Q, dtype=torch.float32).view(1, 1, Q, 1).expand(1, 1, Q, 8).contiguous()
    column = torch.tensor([5.25, 1234567.75, Q - 2.5], dtype=torch.float64)
    coords = torch.stack(((column + 0.5) / Q, torch.full_like(column, 0.5)), -1)[None]
    assert torch.equal(sample(grid, coords)[0, :, 0], column.float())


def float32_bits():
    """Random numbers of all magnitudes, ties of both 16-bit formats and their neighbours, infinities and NaN."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 200_000, dtype=np.uint64)
    ties = (random.integers(0, 1 << 16, 50_000, dtype=np.uint64) << 16) + 0x8000
    half = (
        random.standard_normal(50_000).astype(np.float16).astype(np.float32).view(np.uint32).astype(np.uint64)
        + 0x1000
    )
    tiny = (
        (random.integers(0, 1 << 11, 4_000) * 2.0**-25).astype(np.float32).view(np.uint32).astype(np.uint64)
    )
    edges = np.array(
        [0, 1, 0x7F800000, 0x7FC00000, 0x7F7FFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x33000000]
    )
    near = np.concatenate([ties - 1, ties, ties + 1, half - 1, half, half + 1, tiny, edges.astype(np.uint64)])
    every = np.concatenate([bits, near, near | 0x80000000]).astype(np.uint32)
    return torch.from_numpy(every[: len(every) // 8 * 8].view(np.float32).copy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_host_rounds_as_pytorch_does(dtype):
    values = float32_bits()
    D = len(values)
    tokens, zeros = torch.zeros(1, 1, 1, D, dtype=dtype), torch.zeros(1, D)
    source = Modulation(torch.cat((zeros, values[None]), -1), torch.full((1, 1, 2), 0.5), None, None)
    rounded, _ = modulate(torch.empty(1, 1, D, dtype=dtype), tokens, source)
    expected = values.to(dtype)
    same = (rounded[0].view(torch.int16) == expected.view(torch.int16)) | (
        rounded[0].isnan() & expected.isnan()
    )
    # Minus zero plus zero is zero.
    assert (same | (rounded[0] == expected)).all()
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 1, -1)
    copied = sample(every, torch.full((1, 1, 2), 0.5))
    assert torch.equal(copied[every[0].isfinite()], every[0][every[0].isfinite()])
    assert copied[every[0].isnan()].isnan().all()


def test_lanes_add_up_in_the_order_of_the_gpu(generator):
    """Each lane adds its vectors in turn; then lanes at distance 8, 4, 2, 1 add their sums."""
    D, lanes, rounds, vector = 384, 16, 3, 8
    grid, coords = grid_and_coords(generator, torch.bfloat16, D, B=1, N=1)
    moments = sample_moments(grid, 1)
    row = sample(grid, coords, moments=moments).float().numpy().reshape(rounds, lanes, vector)

    def reduced(values, add):
        totals = np.zeros(lanes, np.float32)
        for r in range(rounds):
            for j in range(vector):
                totals = add(totals, values[r, :, j])
        for offset in (8, 4, 2, 1):
            totals = totals + totals[np.arange(lanes) ^ offset]
        assert len(set(totals.tolist())) == 1
        return totals[0]

    mean = reduced(row, lambda total, x: total + x) / np.float32(D)
    # A product of two float32 numbers is exact in float64, and so is one rounding of the sum.
    fused = lambda total, x: (total.astype(np.float64) + x.astype(np.float64) ** 2).astype(np.float32)  # noqa: E731
    squares = reduced(row - mean, fused)
    assert moments.flatten().tolist() == [mean, squares]


def test_threads_do_not_disturb_each_other(generator):
    grid, coords = grid_and_coords(generator, torch.float32, 384, N=200)
    expected = sample(grid, coords)
    results = [None] * 4

    def run(i):
        with compiled_kernels(implementations.COMPILED):
            results[i] = [sample(grid, coords) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, expected) for result in results for r in result)


def test_other_threads_keep_tritons_kernels(monkeypatch):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(compiled.runs_compiled("modulate_kernel")))
    assert compiled.runs_compiled("modulate_kernel")
    thread.start()
    thread.join()
    assert seen == [False]


def test_offsets_beyond_31_bits():
    """The grid has more than 2^31 elements; memory that nobody touches costs nothing."""
    D, P, Q = 64, 4, (1 << 23) + 8
    torch.utils.deterministic.fill_uninitialized_memory = False
    grid = torch.empty(1, P, Q, D, dtype=torch.float16)
    columns = torch.tensor([3, Q - 2])
    values = torch.randn(2, D, dtype=torch.float16)
    for row in (P - 2, P - 1):
        grid[0, row, columns], grid[0, row, columns + 1] = values, values
    centre = ((columns.double() + 1.0) / Q, torch.full((2,), (P - 1) / P, dtype=torch.float64))
    torch.testing.assert_close(sample(grid, torch.stack(centre, -1)[None])[0], values, rtol=1e-3, atol=1e-3)


def test_wrong_arguments_are_named(generator):
    grid, coords = grid_and_coords(generator, torch.float32, 64)
    with pytest.raises(KernelError, match=r"bilinear_sample_kernel: out: expected float32, got bfloat16"):
        sample(grid, coords, out=torch.empty(2, 37, 64, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match=r"bilinear_sample_kernel: coords: expected float32 or float64"):
        sample(grid, coords.half())
    with pytest.raises(KernelError, match=r"bilinear_sample_kernel: the width 60 is not a multiple of 8"):
        sample(grid[..., :60].contiguous(), coords)
    with pytest.raises(KernelError, match=r"bilinear_sample_kernel: grid: expected floating-point features"):
        sample(grid.long(), coords)
    x, tokens, source = film(generator, torch.float32, 64, table=True)
    with pytest.raises(KernelError, match=r"modulate_kernel: gamma_beta: expected float32, got float16"):
        modulate(x, tokens, source._replace(gamma_beta=source.gamma_beta.half()))
    with pytest.raises(KernelError, match=r"modulate_kernel: table_row: expected int64"):
        modulate(x, tokens, source._replace(row=source.row.int()))


CONFIG_SIZES = {"token_grid": (5, 7), "patch_grid": (10, 14), "dtype": torch.float64}


def test_network_runs_with_compiled_kernels(monkeypatch):
    from vitup_fast import ViTUpConfig

    generator = torch.Generator().manual_seed(1)
    network = random_network(ViTUpConfig(64, 2, (0, 1)), generator, dtype=torch.float64)
    launched = []
    run = common.launch_compiled
    monkeypatch.setattr(
        common, "launch_compiled", lambda name, *rest: launched.append(name) or run(name, *rest)
    )
    with torch.no_grad(), compiled_kernels(()):
        cache = network.prepare(
            *random_image(network.config, generator, batch=2, **CONFIG_SIZES), impl="reference"
        )
        coords = random_coords(generator, 2, 19)
        for call in (
            lambda impl: network(cache, coords, impl=impl),
            lambda impl: network.dense(cache, (8, 9), impl=impl),
        ):
            torch.testing.assert_close(call("cuda"), call("reference"), rtol=1e-9, atol=1e-9)
        assert {"bilinear_sample_kernel", "modulate_kernel"} == set(launched)
        launched.clear()
        network(cache, coords, impl="triton")
    assert launched == []


@pytest.fixture
def hopper_calls(monkeypatch):
    """What the kernels for compute capability 9.0 are given, which no CPU runs."""
    calls = []

    class Host:
        types = extension.load().host.types
        residual_mlp_sm90 = staticmethod(lambda *args: calls.append(args))
        film_mlp_sm90 = staticmethod(lambda *args: calls.append(args))

    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(host=Host))
    monkeypatch.setattr(compiled, "fits_one_kernel", lambda operation, hidden, x, *others: True)
    return calls


def given(*tensors):
    """Addresses and numbers of types of bfloat16, float32 and int64 tensors."""
    types = extension.load().host.types
    return tuple((t.data_ptr(), types.index(str(t.dtype).removeprefix("torch."))) for t in tensors)


@pytest.mark.parametrize("want_moments", [False, True])
def test_residual_mlp_in_one_kernel(generator, hopper_calls, want_moments):
    """Rows, folded weights and buffers."""
    arguments = OPERATIONS["residual_mlp"].inputs(Sizes(B=1, N=5, D=384), generator, dtype=torch.bfloat16)
    layers = fold_mlp(*arguments["weights"])
    x, state, memory = arguments["x"][0], torch.empty(9, 384, dtype=torch.bfloat16), torch.empty(99)
    result, moments = residual_mlp(x, None, layers, out=state, out_moments=memory, want_moments=want_moments)
    last = given(memory)[0] if want_moments else None
    tensors = given(x, *layers.first[:2], *layers.second[:2], state)
    assert hopper_calls == [(*tensors, last, 5, 384, 768, 0, 0)]
    assert result.shape == (5, 384)
    assert result.data_ptr() == state.data_ptr()
    assert (
        (moments.shape, moments.data_ptr()) == ((5, 1, 2), memory.data_ptr())
        if want_moments
        else moments is None
    )


@pytest.mark.parametrize("want_moments", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_film_mlp_in_one_kernel(generator, hopper_calls, table, want_moments):
    """The same, and tokens, modulation and the last LayerNorm; nothing else is launched."""
    x, tokens, source = film(generator, torch.bfloat16, 384, table, N=9)
    weights = OPERATIONS["film_mlp"].inputs(Sizes(D=384, expansion=4), generator, dtype=torch.bfloat16)[
        "weights"
    ]
    layers, out_norm = fold_mlp(*weights.mlp), weights[1:]
    state, memory = torch.empty(20, 384, dtype=torch.bfloat16), torch.empty(99)
    buffers = FilmBuffers(out=state, out_moments=memory)
    result, moments = film_mlp(x, tokens, source, layers, out_norm, buffers, want_moments)
    tensors = given(x, *layers.first[:2], *layers.second[:2], state)
    read = given(tokens, source.gamma_beta, *source.pointers(), *out_norm)
    last = given(memory)[0] if want_moments else None
    assert hopper_calls == [(*tensors, last, *read, 18, 384, 1536, 9, 5, 7, table, 0, 0)]
    assert (result.shape, result.data_ptr()) == ((18, 384), state.data_ptr())
    assert (moments is not None) == want_moments


@pytest.mark.parametrize("operation", ["residual_mlp", "film_mlp"])
def test_where_mlps_run_in_one_kernel(fake_gpu, operation):
    def fits(operations=implementations.COMPILED, hidden=1536, other=512, **changes):
        facts = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (16896, 384), "device": None}
        facts |= {"data_ptr": lambda: 256, **changes}
        facts["numel"] = lambda: math.prod(facts["shape"])
        with compiled_kernels(operations):
            weight = SimpleNamespace(data_ptr=lambda: other)
            return compiled.fits_one_kernel(operation, hidden, SimpleNamespace(**facts), weight)

    assert fits()
    assert not fits(operations=set(implementations.COMPILED) - {operation})
    assert not fits(is_cuda=False)
    assert not fits(dtype=torch.float16)
    assert not fits(shape=(16896, 768))
    # Two thirds of 66 clusters of 256 rows, in one wave or two.
    for rows, enough in ((43 * 256, False), (43 * 256 + 1, True), (67 * 256, False), (88 * 256, True)):
        assert fits(shape=(2, rows // 2, 384) if rows % 2 == 0 else (rows, 384)) == enough
    assert not fits(hidden=96)
    assert not fits(data_ptr=lambda: 258)
    assert not fits(other=520)
    fake_gpu.architectures = lambda: ["80", "100a"]
    assert not fits()


@pytest.fixture
def given_linear(monkeypatch):
    """What the product for compute capability 9.0 is given, wherever it would run: the calls."""
    calls = []

    class Host:
        types = extension.load().host.types
        linear_sm90 = staticmethod(lambda *args: calls.append(args))

    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(host=Host))
    monkeypatch.setattr(compiled, "fits_linear", lambda *args: 256)
    return calls


def test_linear_in_one_kernel(given_linear):
    """Rows, folded weights, moments of three tiles of 256 results; the residual is also the result's memory."""
    bf16, f32 = (extension.load().host.types.index(name) for name in ("bfloat16", "float32"))
    x, state, memory = torch.empty(5, 3072).bfloat16(), torch.empty(9, 768).bfloat16(), torch.empty(99)
    layer = fold(torch.ones(768, 3072).bfloat16(), torch.ones(768).bfloat16())
    result, moments = linear(x, layer, residual=state[:5], out=state, out_moments=memory, want_moments=True)
    kinds = (bf16, bf16, f32, f32)
    given = [(t.data_ptr(), kind) for t, kind in zip((x, *layer), kinds, strict=True)]
    own = (state.data_ptr(), bf16)
    assert given_linear == [
        (*given, None, own, own, (memory.data_ptr(), f32), 5, 768, 3072, 0, 256, False, 0, 0)
    ]
    assert (result.shape, result.data_ptr()) == ((5, 768), state.data_ptr())
    assert (moments.shape, moments.data_ptr()) == ((5, 3, 2), memory.data_ptr())


def test_linear_before_gelu_in_one_kernel(given_linear):
    bf16, f32 = (extension.load().host.types.index(name) for name in ("bfloat16", "float32"))
    x, before = torch.empty(5, 768).bfloat16(), torch.empty(5, 3, 2)
    layer = fold(torch.ones(3072, 768).bfloat16(), torch.ones(3072).bfloat16())
    result, moments = linear(x, layer, before, gelu=True)
    (call,) = given_linear
    assert call[4:8] == ((before.data_ptr(), f32), None, (result.data_ptr(), bf16), None)
    assert call[8:14] == (5, 3072, 768, 3, 256, True)
    assert moments is None


def test_layer_norm_of_a_compiled_product(given_linear):
    """It takes a pass of its own, which reads what the product wrote, adds the residual and measures."""
    x, scratch, state = (torch.empty(5, n).bfloat16() for n in (1536, 768, 768))
    layer, norm = fold(torch.ones(768, 1536).bfloat16(), torch.ones(768).bfloat16()), (torch.ones(768),) * 2
    with common.recorded_launches(("", 90)) as launches:
        result, moments = linear(
            x, layer, out_norm=norm, residual=state, out=state, scratch=scratch, want_moments=True
        )
    (call,), (launch,) = given_linear, launches
    assert call[4:6] == (None, None)
    assert call[6][0] == scratch.data_ptr()
    assert call[7] is None
    assert launch.kernel is common.add_layer_norm_kernel
    y, _, _, residual, out, out_moments = launch.arguments[:6]
    assert [t.data_ptr() for t in (y, residual, out)] == [t.data_ptr() for t in (scratch, state, state)]
    assert result.data_ptr() == state.data_ptr()
    assert moments is out_moments
    assert moments.shape == (5, 1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"gelu": True, "residual": torch.empty(5, 256).bfloat16()},
        {"moments": torch.empty(5, 1, 2), "residual": torch.empty(5, 256).bfloat16()},
        {"want_moments": True},
    ],
)
def test_what_the_compiled_product_lacks(given_linear, options):
    """Triton's has all that stands around a product at once."""
    layer = fold(torch.ones(256, 256).bfloat16(), torch.ones(256).bfloat16())
    with common.recorded_launches(("", 90)) as launches:
        linear(torch.empty(5, 256).bfloat16(), layer, **options)
    assert len(launches) == 1
    assert not given_linear


def test_where_products_run_compiled(fake_gpu):
    aligned = SimpleNamespace(data_ptr=lambda: 512)

    def fits(operations=("norm_linear",), N=3072, out_dtype=torch.bfloat16, other=aligned, **changes):
        facts = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (8448, 768), "device": None}
        facts |= {"data_ptr": lambda: 256, **changes}
        with compiled_kernels(operations):
            return compiled.fits_linear(
                "norm_linear", SimpleNamespace(**facts), N, out_dtype, 132, None, other
            )

    assert fits() == 256
    assert fits(operations=implementations.COMPILED) == 256
    assert fits(operations=("residual_mlp",)) is None
    assert fits(is_cuda=False) is None
    assert fits(dtype=torch.float16) is None
    assert fits(out_dtype=torch.float32) is None
    assert fits(N=320) is None
    assert fits(shape=(8448, 800)) is None
    assert fits(shape=(8448, 128)) is None
    assert fits(data_ptr=lambda: 264) is None
    assert fits(other=SimpleNamespace(data_ptr=lambda: 264)) is None
    fake_gpu.architectures = lambda: ["80", "100a"]
    assert fits() is None


def test_products_run_compiled_where_their_operation_does(generator, monkeypatch):
    """What was measured of an operation decides over its own products, and norm_linear over all others."""
    asked = []
    monkeypatch.setattr(compiled, "fits_linear", lambda operation, *_: asked.append(operation))
    sizes = Sizes(B=1, N=5, D=768)
    with common.recorded_launches(("", 90)):
        for name in ("residual_mlp", "norm_linear"):
            given = OPERATIONS[name].inputs(sizes, generator, dtype=torch.bfloat16)
            OPERATIONS[name].function(**given, impl="triton")
        mlp = fold_mlp(*OPERATIONS["residual_mlp"].inputs(sizes, generator, dtype=torch.bfloat16)["weights"])
        rows, grid = torch.empty(1, 5, 768).bfloat16(), torch.empty(1, 2, 2, 768).bfloat16()
        modulation = Modulation(torch.empty(5, 1536), torch.empty(1, 5, 2), None, None)
        film_mlp(rows, grid, modulation, mlp, (mlp.first.bias, mlp.first.bias), FilmBuffers())
    assert asked == ["residual_mlp", "residual_mlp", "norm_linear", "film_mlp", "film_mlp"]


# Of tiles of 256 rows for 66 clusters: the width whose rounds are full, and none where most clusters would idle.
@pytest.mark.parametrize(
    ("M", "N", "columns"),
    [
        (8448, 3072, 256),  # 6 rounds of 66 tiles, or 8
        (8448, 768, 192),  # a round and a half, or 2 rounds
        (16_896, 768, 256),  # 3 rounds or 4
        (16_896, 384, 192),
        (4096, 768, 192),
        (4096, 384, None),
        (1, 3072, None),
        (1 << 20, 1024, 256),
    ],
)
def test_tiles_of_compiled_products(M, N, columns):
    assert compiled.linear_columns(M, N, 768, 132) == columns
    assert compiled.linear_columns(M, N, 768, 1) is None


# Whether code for an architecture runs on GPUs of compute capability 8.6, 9.0, 10.0, 10.3, 12.1.
@pytest.mark.parametrize(
    ("architecture", "runs"),
    [
        ("80", "yyyyy"),
        ("90a", "nynnn"),
        ("100a", "nnynn"),
        ("100f", "nnyyn"),
        ("120", "nnnny"),
        ("80-real", "ynnnn"),
        ("90", "nyyyy"),
    ],
)
def test_where_architectures_run(architecture, runs):
    capabilities = [(8, 6), (9, 0), (10, 0), (10, 3), (12, 1)]
    assert "".join("ny"[implementations.runs_on([architecture], c)] for c in capabilities) == runs
    assert not implementations.runs_on([], (9, 0))


class FakeGPUTensor:
    """What is asked of features on a GPU."""

    is_cuda, dtype, shape = True, torch.bfloat16, (1, 8, 8, 384)
    device = SimpleNamespace(type="cuda", index=0)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine with an H100, as far as the choice of an implementation can tell."""
    monkeypatch.setattr(implementations, "interpreted", lambda: False)
    monkeypatch.setattr(implementations, "_triton_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA H100 80GB HBM3")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: properties)
    monkeypatch.setattr(extension, "obstacle", lambda part: None)
    cuda = SimpleNamespace(architectures=lambda: ["80", "90a"])
    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(cuda=cuda))
    return cuda


WIDTH = {"the width D": 384}


def refusal(impl="cuda", x=None, widths=WIDTH):
    with pytest.raises(InputError, match=r"impl: expected .* got 'cuda': ") as caught:
        implementations.resolve(impl, FakeGPUTensor() if x is None else x, widths)
    return str(caught.value)


def test_obstacles_are_named(fake_gpu, monkeypatch):
    assert implementations.resolve("cuda", FakeGPUTensor(), WIDTH) == "cuda"
    fake_gpu.architectures = lambda: ["100a", "120"]
    assert re.search(r"built for 100a, 120, and NVIDIA H100 80GB HBM3 has compute capability 9.0", refusal())
    fake_gpu.architectures = lambda: ["80"]
    assert "not a multiple of 64" in refusal(widths={"the width D": 72})
    x = FakeGPUTensor()
    x.dtype = torch.float64
    assert "not float64" in refusal(x=x)
    assert "not on a GPU" in refusal(x=torch.empty(1, 8, 64))
    monkeypatch.setattr(
        extension, "obstacle", lambda part: f"the {part} kernels are not built: nvcc is missing"
    )
    assert "the cuda kernels are not built: nvcc is missing" in refusal()
    found = {i.name: i for i in implementations.implementations()}
    assert not found["cuda"].available
    assert "nvcc is missing" in found["cuda"].reason
    monkeypatch.setattr(implementations, "_triton_obstacle", lambda: "no NVIDIA GPU is available")
    assert "no NVIDIA GPU is available" in refusal()


def result(operation, dtype, D, cuda, triton, device="NVIDIA H100 80GB HBM3"):
    """A benchmark's report, as far as the choice reads it."""
    rows = [{"provider": "torch", "seconds": 1.0}]
    rows += [{"provider": n, "seconds": s} for n, s in (("cuda", cuda), ("triton", triton)) if s != "absent"]
    return {"title": operation, "dtype": dtype, "device": device, "detail": {"N": 1, "D": D}, "rows": rows}


def test_auto_follows_results(fake_gpu, monkeypatch, tmp_path):
    def chosen(*reports, operation="bilinear_sample"):
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / "h100.json").write_text(json.dumps(reports))
        (tmp_path / "results" / "other.json").write_text("{}")
        output = tmp_path / "compiled.json"
        assert main(["--results", str(tmp_path / "results"), "--output", str(output)]) == 0
        monkeypatch.setattr(compiled, "FASTER", output)
        compiled._faster.cache_clear()
        try:
            return implementations.resolve("auto", FakeGPUTensor(), WIDTH, operation=operation)
        finally:
            compiled._faster.cache_clear()

    faster = result("bilinear_sample", "bfloat16", 384, cuda=0.8, triton=1.0)
    assert chosen() == "triton"
    assert chosen(faster) == "cuda"
    assert chosen(faster, operation="film_mlp") == "triton"
    assert chosen(faster, operation=None) == "triton"
    assert chosen(result("film_mlp (grid)", "bfloat16", 384, 0.8, 1.0), operation="film_mlp") == "cuda"
    backward = result("bilinear_sample, forward and backward", "bfloat16", 384, 1.1, 1.0)
    assert chosen(faster, backward) == "triton"
    assert chosen(result("bilinear_sample", "bfloat16", 384, 0.99, 1.0)) == "triton"
    assert chosen(result("bilinear_sample", "bfloat16", 384, None, 1.0)) == "triton"
    assert chosen(result("bilinear_sample", "bfloat16", 384, 0.5, "absent")) == "triton"
    assert chosen(result("bilinear_sample", "bfloat16", 384, 0.5, None)) == "cuda"
    assert chosen(result("bilinear_sample", "float32", 384, 0.5, 1.0)) == "triton"
    assert chosen(result("bilinear_sample", "bfloat16", 768, 0.5, 1.0)) == "triton"
    assert chosen(result("bilinear_sample", "bfloat16", 384, 0.5, 1.0, device="NVIDIA H200")) == "triton"
    fake_gpu.architectures = lambda: ["100a"]
    assert chosen(faster) == "triton"


def test_shipped_choice_comes_from_committed_results():
    from vitup_fast.bench.choose_compiled import RESULTS

    assert json.loads(compiled.FASTER.read_text()) == choose(reports_in(RESULTS))


def report(*arguments):
    command = [sys.executable, "-m", "vitup_fast.bench.cuda_report", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )


def test_compile_report_is_true():
    """It covers every kernel and architecture, comes from the present sources, and holds no fault."""
    done = report()
    assert done.returncode == 0, done.stdout + done.stderr


JUDGEMENTS = """
from vitup_fast.bench import cuda_report
from vitup_fast.bench.cuda_report import Expectation, judged
cuda_report.EXPECTATIONS = {"whole": Expectation(128, ("HGMMA",), only=("90a",)), "plain": Expectation(1024)}
loop = [(0, "MOV R1, R2"), (16, "LDL R3, [R1]"), (32, "BRA 0x0"), (48, "STL [R1], R3")]
def faults(*arguments): return judged(*arguments)["faults"]
assert faults("plain", "80", loop, 40, 4, 0) == ["1 local-memory instructions inside loops"]
assert faults("plain", "80", loop[:1], 40, 0, 0) == []
assert faults("plain", "80", loop[:1], 72, 0, 0) == ["no block fits a multiprocessor"]
assert faults("plain", "120", loop[:1], 40, 0, 100 << 10) == ["no block fits a multiprocessor"]
assert faults("whole", "90a", loop[:1], 40, 0, 0) == ["no HGMMA"]
assert faults("whole", "90a", [(0, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]")], 40, 0, 0) == []
assert faults("whole", "80", loop[:1], 40, 0, 0) == []
assert "does not say" in faults("other", "80", [], 1, 0, 0)[0]
cuda_report.sources = lambda: [cuda_report.SOURCES / name for name in cuda_report.EXACT]
before = cuda_report.digest(cuda_report.SOURCES / "film_mlp.cu")
cuda_report.EXACT = ()
assert before != cuda_report.digest(cuda_report.SOURCES / "film_mlp.cu")
known = next(iter(cuda_report.read_report().values()))
cuda_report.EXACT = ("bilinear_sample.cu", "film_mlp.cu")
assert not cuda_report.missing(known)
name = next(n for n in known if n.split()[1] == "film_mlp")
known[name]["source"] = "another"
assert len(cuda_report.missing(known)) == 1
del known[name]
assert not cuda_report.missing(known)
assert len(cuda_report.missing({n: e for n, e in known.items() if not n.startswith("sm_120")})) == 2
"""


def test_compile_report_finds_faults():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", JUDGEMENTS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gpu_and_host_agree_bit_by_bit(generator, dtype, D):
    def same(on_gpu, on_host):
        for mine, other in zip(on_gpu, on_host, strict=True):
            assert torch.equal(mine.cpu(), other)

    grid, coords = grid_and_coords(generator, dtype, D)
    grad = torch.randn(2, 37, D, generator=generator).to(dtype)

    def run_all(device):
        g, c, cotangent = (t.to(device) for t in (grid, coords, grad))
        moments = sample_moments(g, 37)
        outputs = [sample(g, c, moments=moments), moments, *backward(cotangent, g, c, [True, True])]
        for table in (False, True):
            films = film(torch.Generator().manual_seed(3), dtype, D, table, device=device)
            outputs += modulate(*films)
            wide = torch.promote_types(dtype, torch.float32)
            grads = run_modulate_backward(*films, cotangent.view(-1, D), wide)
            outputs += [*grads, common.segment_sum(grads[0], grads[2], 2 * 35, dtype)]
        return outputs

    same(run_all(torch.device("cuda")), run_all(CPU))


@needs_gpu
def test_misaligned_tensors_on_the_gpu(generator):
    grid, coords = grid_and_coords(generator, torch.bfloat16, 384, device="cuda")
    assert torch.equal(sample(shifted(grid), shifted(coords)), sample(grid, coords))


@needs_gpu
def test_failed_launches_are_named(generator):
    grid, coords = grid_and_coords(generator, torch.bfloat16, 64, device="cuda")
    out = torch.empty(2, 37, 64, dtype=torch.bfloat16, device="cuda")
    arguments = (grid, coords, out, out, 1 << 40, 37, 9, 12)
    with pytest.raises(KernelError, match=r"bilinear_sample_kernel of \d+ rows of 64 numbers: "):
        launch_compiled("bilinear_sample_kernel", (1,), arguments, {"D": 64, "MOMENTS": False})
