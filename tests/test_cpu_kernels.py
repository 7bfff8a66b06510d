"""The compiled CPU kernels on every instruction set that this CPU runs: numbers, memory, threads, and refusals."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
import torch.nn.functional as F
from conftest import query_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from vitup_fast.kernels import cpu as cpu_kernels
from vitup_fast.kernels.cpu.context import Context, smallest_scratch
from vitup_fast.kernels.cpu.film_mlp import Film, pack_position
from vitup_fast.kernels.cpu.residual_mlp import pack_mlp
from vitup_fast.kernels.cpu.rope_cross_attention import pack_attention, pack_image

from vitup_fast import InputError, ViTUpConfig, extension
from vitup_fast.network import patch_grid
from vitup_fast.ops import FilmTable, MLPWeights, norm_linear, norm_linear_argmax
from vitup_fast.ops.coordinates import rope_angles, rotate_pairs, token_positions
from vitup_fast.testing import (
    OPERATIONS,
    Sizes,
    assert_within_budget,
    cast,
    differentiable_tensors,
    film_mlp_inputs,
    norm_linear_inputs,
    poisoned_allocations,
    random_coords,
    random_image,
    random_network,
    relative_error,
    residual_mlp_inputs,
    rope_cross_attention_inputs,
    tensors_of,
    with_tensors,
)

implementations = importlib.import_module("vitup_fast.ops.implementations")

if extension.obstacle("cpu") is not None:
    pytest.skip(extension.obstacle("cpu"), allow_module_level=True)

KERNELS = extension.load().cpu
BEST, *OTHERS = KERNELS.instruction_sets()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_IMPLS = ["cpu"] if implementations._cpu_obstacle(int8=True) else ["cpu", "cpu_int8"]
# 8-bit products run with one instruction set alone.
PAIRS = [*((name, "cpu") for name in (BEST, *OTHERS)), *((BEST, name) for name in CPU_IMPLS[1:])]
needs_int8 = pytest.mark.skipif("cpu_int8" not in CPU_IMPLS, reason="no 8-bit products on this CPU")

# Sizes at and beside the edges of vectors (16), row blocks (6), panels (64), hidden chunks (256), key blocks (1024).
CASES = {
    "one query": Sizes(B=40, N=1, D=16, heads=1, token_grid=(1, 1), patch_grid=(1, 1), expansion=1),
    "few queries": Sizes(B=40, N=5, D=64, heads=1, token_grid=(1, 5), patch_grid=(1, 9), expansion=5),
    "odd sizes": Sizes(B=3, N=97, D=48, heads=3, token_grid=(5, 7), expansion=3),
    "many tokens": Sizes(B=1, N=29, D=128, heads=1, token_grid=(22, 50), expansion=2),
    "ViT-S": Sizes(B=2, N=97, D=384, heads=6, token_grid=(28, 28), patch_grid=(40, 30), expansion=4),
    "ViT-B": Sizes(B=1, N=40, D=768, heads=12, token_grid=(28, 28), patch_grid=(16, 16), expansion=4),
}
CONFIG = ViTUpConfig(dim=64, num_heads=2, layer_indices=(0, 1, 2))
TOKENS, PATCHES, COUNT = (5, 7), (10, 14), 97


@pytest.fixture(params=[BEST, *OTHERS])
def instruction_set(request):
    KERNELS.use_instruction_set(request.param)
    yield request.param
    KERNELS.use_instruction_set(BEST)


@pytest.fixture
def threads():
    """Sets the number of threads for the rest of a test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(arguments, mean):
    """The arguments with their features around another mean."""
    features = {n: t + mean for n, t in tensors_of(arguments).items() if n in ("x", "tokens", "grid")}
    return with_tensors(arguments, features)


def table_sizes(name, sizes):
    """Sizes at which a table means what its coordinates do: powers of two hold them exactly."""
    if name != "film_mlp_table":
        return sizes
    return sizes._replace(token_grid=tuple(1 << (n.bit_length() - 1) for n in sizes.token_grid))


@functools.cache
def judged(name, case, dtype, mean=0.0):
    """Arguments of an operation, eager PyTorch's result and the exact one."""
    operation = OPERATIONS[name]
    sizes = table_sizes(name, CASES[case])
    arguments = moved(operation.inputs(sizes, seeded(), dtype=dtype), mean)
    eager = operation.function(**arguments, impl="reference")
    return arguments, eager, operation.function(**cast(arguments, torch.float64), impl="reference")


def gradients(name, arguments, cotangent, impl):
    leaves = {n: t.detach().requires_grad_() for n, t in differentiable_tensors(arguments).items()}
    output = OPERATIONS[name].function(**with_tensors(arguments, leaves), impl=impl)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype), allow_unused=True)
    return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


@functools.cache
def judged_gradients(name, case, dtype):
    arguments, eager, _ = judged(name, case, dtype)
    cotangent = torch.randn(eager.shape, generator=seeded(1)).to(dtype)
    exact = gradients(name, cast(arguments, torch.float64), cotangent, "reference")
    return arguments, cotangent, gradients(name, arguments, cotangent, "reference"), exact


def make_network(dtype=torch.float32, seed=0):
    return random_network(CONFIG, seeded(seed), dtype=dtype)


def make_image(dtype=torch.float32, seed=1, batch=3):
    return random_image(CONFIG, seeded(seed), batch=batch, token_grid=TOKENS, patch_grid=PATCHES, dtype=dtype)


def make_coords(seed=2, batch=3, count=COUNT):
    return random_coords(seeded(seed), batch, count)


def widened(image):
    hidden_states, grid = image
    return [hidden.double() for hidden in hidden_states], grid.double()


def query(network, cache, coords, impl="cpu", **options):
    with torch.no_grad():
        return network(cache, coords, impl=impl, **options)


def prepared(network, image, impl="cpu"):
    with torch.no_grad():
        return network.prepare(*image, impl=impl)


# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_are_as_exact_as_eager(instruction_set, name, case, dtype, threads):
    arguments, eager, exact = judged(name, case, dtype)
    threads(2)
    with poisoned_allocations():
        actual = OPERATIONS[name].function(**arguments, impl="cpu")
    assert_within_budget(actual, eager, exact, factor=1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "bilinear_sample"])
def test_features_around_50(instruction_set, name, dtype):
    arguments, eager, exact = judged(name, "odd sizes", dtype, 50.0)
    assert_within_budget(OPERATIONS[name].function(**arguments, impl="cpu"), eager, exact, factor=1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["few queries", "odd sizes", "many tokens", "ViT-S"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_as_exact_as_eager(instruction_set, name, case, dtype, threads):
    arguments, cotangent, eager, exact = judged_gradients(name, case, dtype)
    threads(2)
    with poisoned_allocations():
        actual = gradients(name, arguments, cotangent, "cpu")
    assert set(actual) == set(differentiable_tensors(arguments))
    for tensor in eager:
        assert_within_budget(actual[tensor], eager[tensor], exact[tensor], factor=1.5, name=tensor)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize(("B", "heads"), [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("N", [129, 300])
def test_groups_of_queries_in_the_gradient_of_attention(threads, N, B, heads, workers):
    """Where images and heads are fewer than threads, these share queries and each sums gradients of its own."""
    operation = OPERATIONS["rope_cross_attention"]
    arguments = operation.inputs(Sizes(B=B, N=N, D=16 * heads, heads=heads, token_grid=(4, 5)), seeded())
    cotangent = torch.randn(arguments["x"].shape, generator=seeded(1))
    exact = gradients("rope_cross_attention", cast(arguments, torch.float64), cotangent, "reference")
    eager = gradients("rope_cross_attention", arguments, cotangent, "reference")
    threads(workers)
    with poisoned_allocations():
        actual = gradients("rope_cross_attention", arguments, cotangent, "cpu")
    for tensor in ("x", "coords", "key", "value"):
        assert_within_budget(actual[tensor], eager[tensor], exact[tensor], factor=1.5, name=tensor)


@pytest.mark.parametrize("most", [0, 1 << 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["residual_mlp", "rope_cross_attention", "film_mlp"])
def test_long_calls_recompute_what_short_ones_keep(monkeypatch, name, dtype, most):
    monkeypatch.setattr("vitup_fast.ops.operator.KEPT_BYTES", most)
    arguments, cotangent, eager, exact = judged_gradients(name, "odd sizes", dtype)
    kept = []

    def keep(tensor):
        if tensor.dtype == torch.uint8:
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), poisoned_allocations():
        actual = gradients(name, arguments, cotangent, "cpu")
    assert bool(sum(kept)) == bool(most)
    for tensor in eager:
        assert_within_budget(actual[tensor], eager[tensor], exact[tensor], factor=1.5, name=tensor)


@pytest.mark.parametrize("width", [0, 1, 3, 15, 17, 64, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_output_width(instruction_set, width, dtype):
    arguments = norm_linear_inputs(Sizes(B=3, N=997, D=48, expansion=4), seeded(), dtype=dtype)
    arguments |= {"weight": arguments["weight"][:width], "bias": arguments["bias"][:width]}
    with poisoned_allocations():
        actual = norm_linear(**arguments, impl="cpu")
    assert actual.shape == (3, 997, width)
    if width:
        exact = norm_linear(**cast(arguments, torch.float64), impl="reference")
        assert_within_budget(actual, norm_linear(**arguments, impl="reference"), exact, factor=1.5)


@pytest.mark.parametrize("hidden", [16, 240, 256, 272, 528])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_any_hidden_width(impl, hidden):
    arguments = residual_mlp_inputs(Sizes(B=2, N=37, D=96, expansion=6), seeded())
    weights = arguments["weights"]
    arguments["weights"] = weights._replace(
        weight1=weights.weight1[:hidden],
        bias1=weights.bias1[:hidden],
        weight2=weights.weight2[:, :hidden],
    )
    function = OPERATIONS["residual_mlp"].function
    exact = function(**cast(arguments, torch.float64), impl="reference")
    actual = function(**arguments, impl=impl)
    if impl == "cpu":
        assert_within_budget(actual, function(**arguments, impl="reference"), exact, factor=1.5)
    else:
        assert relative_error(actual, exact) < 0.01


@pytest.mark.parametrize("bands", [1, 3, 16, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_bands(instruction_set, bands, dtype):
    D = 32
    arguments = film_mlp_inputs(Sizes(B=2, N=97, D=D), seeded(), dtype=dtype)
    weight = torch.randn(D, 2 + 4 * bands, generator=seeded(1)) * (2 + 4 * bands) ** -0.5
    position = arguments["position"]._replace(weight1=weight.to(dtype))
    arguments |= {"freqs": torch.logspace(0.0, 1.0, bands), "position": position}
    function = OPERATIONS["film_mlp"].function
    exact = function(**cast(arguments, torch.float64), impl="reference")
    with poisoned_allocations():
        actual = function(**arguments, impl="cpu")
    assert_within_budget(actual, function(**arguments, impl="reference"), exact, factor=1.5)


def in_255_steps(rows):
    """Rows as unsigned 8-bit numbers with a step each stand for them."""
    low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    zero = (-low / step).round()
    return ((rows / step + zero).round() - zero) * step


def signed(matrix, axis):
    """A matrix as 8-bit numbers with a step for each line along an axis stand for it."""
    step = matrix.abs().amax(axis, keepdim=True) / 127
    return (matrix / step).round() * step


def attention_in_8_bits(x, coords, key, value, weights, inv_freq, token_grid):
    """Attention of which every operand of a product has 8 bits, computed exactly otherwise."""
    normed = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, 1e-5)
    query = in_255_steps(normed) @ signed(weights.query_weight, 1).mT + weights.query_bias
    angles = rope_angles(token_positions(coords, token_grid), inv_freq).unsqueeze(2)
    rotated = rotate_pairs(query.unflatten(-1, (key.shape[1], key.shape[3])), angles)
    query = in_255_steps(rotated.flatten(-2)).view_as(rotated).transpose(1, 2)  # [B, Hh, N, d]
    score = query @ signed(key, 3).mT / key.shape[3] ** 0.5
    probability = (255 * torch.exp(score - score.amax(-1, keepdim=True))).round()
    attended = probability @ signed(value, 2) / probability.sum(-1, keepdim=True)
    out = in_255_steps(attended.transpose(1, 2).flatten(-2)) @ signed(weights.out_weight, 1).mT
    return x + out + weights.out_bias


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_in_8_bits_is_as_exact_as_its_operands(case, dtype, threads):
    arguments, eager, exact = judged("rope_cross_attention", case, dtype)
    threads(2)
    with poisoned_allocations():
        actual = OPERATIONS["rope_cross_attention"].function(**arguments, impl="cpu_int8")
    rounded = attention_in_8_bits(**cast(arguments, torch.float64))
    x = arguments["x"].double()
    error, budget = (relative_error(y.double() - x, exact - x) for y in (actual, rounded))
    assert error < 1.1 * math.hypot(budget, relative_error(eager.double() - x, exact - x))


@needs_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_bad_token_is_not_hidden_by_8_bits(name, bad):
    arguments = OPERATIONS["rope_cross_attention"].inputs(Sizes(B=2, N=50, D=64, heads=2), seeded())
    expected = OPERATIONS["rope_cross_attention"].function(**arguments, impl="cpu_int8")
    arguments[name][1, 1, 9, 5] = bad
    actual = OPERATIONS["rope_cross_attention"].function(**arguments, impl="cpu_int8")
    assert torch.equal(actual[0], expected[0])
    assert not actual[1].isfinite().any()


@pytest.mark.parametrize("name", ["bilinear_sample", "rope_cross_attention", "film_mlp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float64_coordinates(instruction_set, name, dtype):
    operation = OPERATIONS[name]
    sizes = Sizes(B=2, N=97, D=64, heads=2, token_grid=(40, 50), patch_grid=(300, 400))
    arguments = operation.inputs(sizes, seeded(), dtype=dtype)
    coords = torch.rand(2, 97, 2, generator=seeded(1), dtype=torch.float64) * 1.2 - 0.1
    arguments["coords"] = coords
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    eager = operation.function(**arguments, impl="reference")
    assert_within_budget(operation.function(**arguments, impl="cpu"), eager, exact, factor=1.5)


@pytest.mark.parametrize("name", ["bilinear_sample", "rope_cross_attention", "film_mlp"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1)], ids=str)
def test_smallest_grids(instruction_set, name, grid):
    operation = OPERATIONS[name]
    sizes = Sizes(B=2, N=97, D=48, heads=3, token_grid=grid, patch_grid=grid)
    arguments = operation.inputs(sizes, seeded())
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    eager = operation.function(**arguments, impl="reference")
    assert_within_budget(operation.function(**arguments, impl="cpu"), eager, exact, factor=1.5)
    cotangent = torch.randn(exact.shape, generator=seeded(1))
    exact = gradients(name, cast(arguments, torch.float64), cotangent, "reference")
    eager = gradients(name, arguments, cotangent, "reference")
    actual = gradients(name, arguments, cotangent, "cpu")
    rounding = torch.finfo(torch.float32).eps * max(grad.norm() for grad in exact.values())
    if name == "rope_cross_attention" and grid == (1, 1):
        # What passes through the score of the only token cancels: all that x gets is the residual's share.
        for found in (actual, eager, exact):
            found["x"] = found["x"] - cotangent
    for tensor, grad in actual.items():
        if exact[tensor].norm() > 1e-10:
            assert_within_budget(grad, eager[tensor], exact[tensor], factor=1.5, name=tensor)
        else:
            assert grad.norm() <= rounding


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(OPERATIONS)),
    B=st.integers(1, 4),
    N=st.integers(1, 110),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 48, 80]),
    token_grid=st.tuples(st.integers(0, 3), st.integers(0, 4)).map(lambda n: (1 << n[0], 1 << n[1])),
    patch_grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    expansion=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    chosen=st.sampled_from([BEST, *OTHERS]),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_no_size_is_computed_wrongly(
    name, B, N, heads, head_dim, token_grid, patch_grid, expansion, dtype, chosen, workers, seed
):
    operation = OPERATIONS[name]
    sizes = Sizes(B, N, heads * head_dim, heads, token_grid, patch_grid, expansion)
    arguments = operation.inputs(sizes, seeded(seed), dtype=dtype)
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    KERNELS.use_instruction_set(chosen)
    torch.set_num_threads(workers)
    try:
        with poisoned_allocations():
            actual = operation.function(**arguments, impl="cpu")
    finally:
        KERNELS.use_instruction_set(BEST)
        torch.set_num_threads(1)
    assert relative_error(actual, exact) < 4 * torch.finfo(dtype).eps


# Networks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_networks_are_as_exact_as_eager(instruction_set, dtype):
    network, image, coords = make_network(dtype), make_image(dtype), make_coords()
    eager_cache, cache = prepared(network, image, "reference"), prepared(network, image)
    wide = copy.deepcopy(network).double()
    exact_cache = prepared(wide, widened(image), "reference")
    with poisoned_allocations():
        actual = query(network, cache, coords, return_all_layers=True)
    eager = query(network, eager_cache, coords, "reference", return_all_layers=True)
    exact = query(wide, exact_cache, coords, "reference", return_all_layers=True)
    for depth, layers in enumerate(zip(actual, eager, exact, strict=True)):
        assert_within_budget(*layers, factor=1.5, name=f"depth {depth}")
    for size in ((8, 16), (15, 21)):  # computed query by query, and from tables
        with torch.no_grad(), poisoned_allocations():
            actual = network.dense(cache, size, impl="cpu")
            eager = network.dense(eager_cache, size, impl="reference")
            exact = wide.dense(exact_cache, size, impl="reference")
        assert_within_budget(actual, eager, exact, factor=1.5, name=f"grid of {size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_caches_are_as_exact_as_eager(instruction_set, dtype, threads):
    threads(3)
    network, image = make_network(dtype), make_image(dtype)
    with poisoned_allocations():
        actual = prepared(network, image)
    eager = prepared(network, image, "reference")
    exact = prepared(copy.deepcopy(network).double(), widened(image), "reference")
    assert actual.patch_grid.data_ptr() == image[1].data_ptr()
    for kind in ("keys", "values", "tokens"):
        for tensors in zip(*(getattr(cache, kind) for cache in (actual, eager, exact)), strict=True):
            assert tensors[0].is_contiguous()
            assert_within_budget(*tensors, factor=1.5, name=kind)


def embed_by_definition(images, weight, bias, size):
    """[B, C, H, W] -> [B, P, Q, D] through the enlarged image, resized in float32 or better."""
    patch, wide = weight.shape[-1], torch.promote_types(images.dtype, torch.float32)
    enlarged = F.interpolate(images.to(wide), (size[0] * patch, size[1] * patch), mode="bilinear")
    return F.conv2d(enlarged.to(weight.dtype), weight, bias, stride=patch).permute(0, 2, 3, 1)


def embed(images, weight, bias, size, fold, finish=lambda tokens, rows: tokens):
    embedding = patch_grid.Embedding(weight, bias, weight.dtype)
    return patch_grid.embed_grid(images, embedding, size, finish, fold=fold)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    source=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 30)),
    patch=st.sampled_from([7, 14, 16]),
    D=st.sampled_from([48, 80, 112]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    fold=st.booleans(),
    biased=st.booleans(),
    chosen=st.sampled_from([BEST, *OTHERS]),
    strip=st.integers(1, 300),
    workers=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_patches_of_enlarged_images(
    batch, channels, source, size, patch, D, dtypes, fold, biased, chosen, strip, workers, seed
):
    """Any size, grid, patch and dtype; strips, threads and what follows do not change a bit."""
    generator = seeded(seed)
    # Few folded weights have few roundings, which may all be large.
    fold = fold and min(source) >= 16 and size[1] >= 4
    images = torch.randn(batch, channels, *source, generator=generator).to(dtypes[0])
    weight = torch.randn(D, channels, patch, patch, generator=generator).to(dtypes[1])
    bias = torch.randn(D, generator=generator).to(dtypes[1]) if biased else None
    arguments = images, weight, bias, size
    with pytest.MonkeyPatch.context() as patched, poisoned_allocations():
        patched.setattr(patch_grid, "_takes_compiled", lambda *_: True)
        patched.setattr(patch_grid, "_STRIP_PATCHES", strip)
        KERNELS.use_instruction_set(chosen)
        try:
            actual = embed(*arguments, fold)
            torch.set_num_threads(workers)
            for finish in (lambda tokens, rows: tokens, lambda tokens, rows: tokens.clone()):
                assert torch.equal(embed(*arguments, fold, finish), actual)
            positions = torch.nn.Parameter(torch.zeros(D))
            trained = embed(*arguments, fold, lambda tokens, rows: tokens + positions)
            assert torch.equal(trained.detach(), actual)
            trained.sum().backward()
            assert positions.grad.eq(batch * size[0] * size[1]).all()
        finally:
            torch.set_num_threads(1)
            KERNELS.use_instruction_set(BEST)
    exact = embed_by_definition(*(t if t is size or t is None else t.double() for t in arguments))
    assert_within_budget(actual, embed_by_definition(*arguments), exact, factor=1.5)


def test_instruction_sets_agree():
    outputs = {}
    for name in (BEST, *OTHERS):
        KERNELS.use_instruction_set(name)
        try:
            network = make_network()
            outputs[name] = query(network, prepared(network, make_image()), make_coords())
        finally:
            KERNELS.use_instruction_set(BEST)
    for name in OTHERS:
        torch.testing.assert_close(outputs[name], outputs[BEST], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiply_adds_count_what_they_do(instruction_set, dtype):
    name = str(dtype).removeprefix("torch.")
    once = KERNELS.multiply_adds(name, False, 1, threads=1)
    assert once >= 2 * 4 * 8  # a multiplication and an addition in four lanes of eight registers
    assert KERNELS.multiply_adds(name, False, 1000, threads=2) == 2000 * once
    assert KERNELS.multiply_adds(name, False, 0, threads=1) == 0


@needs_int8
def test_narrow_multiply_adds_do_more_at_once():
    words = KERNELS.multiply_adds("float32", False, 1, threads=1)
    assert KERNELS.multiply_adds("bfloat16", False, 1, threads=1) == 2 * words
    assert KERNELS.multiply_adds("float32", True, 1, threads=1) == 4 * words


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match=r"instruction_set: expected one of .*, got 'mmx'"):
        KERNELS.use_instruction_set("mmx")
    assert KERNELS.instruction_set() == BEST


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_chunks_and_neighbours_do_not_matter(threads, dtype, impl):
    """To the last bit: each query goes through the same sums whatever shares its tile."""
    network, coords = make_network(dtype), make_coords()
    cache = prepared(network, make_image(dtype), impl)
    whole = query(network, cache, coords, impl, return_all_layers=True)
    with torch.no_grad():
        dense = network.dense(cache, (9, 12), impl=impl)
    for count in (2, 3, 7, 1):
        threads(count)
        again = prepared(network, make_image(dtype), impl)
        assert all(torch.equal(*keys) for keys in zip(again.keys, cache.keys, strict=True))
        for chunk in (1, 7, 50, 97, 200, 10**6):
            actual = query(network, cache, coords, impl, return_all_layers=True, query_chunk_size=chunk)
            assert all(torch.equal(*layers) for layers in zip(actual, whole, strict=True))
        with torch.no_grad():
            assert torch.equal(network.dense(cache, (9, 12), impl=impl, query_chunk_size=48), dense)
        order = torch.randperm(COUNT, generator=seeded(count))
        assert torch.equal(query(network, cache, coords[:, order], impl), whole[-1][:, order])
        for b in range(3):
            assert torch.equal(query(network, cache[b], coords[b : b + 1], impl), whole[-1][b : b + 1])
        assert torch.equal(query(network, cache[[2, 0]], coords[[2, 0]], impl), whole[-1][[2, 0]])


@pytest.mark.parametrize("count", [1, 5, 64])
def test_budgets_do_not_change_the_result(count):
    network, coords = make_network(), make_coords()
    cache = prepared(network, make_image())
    least = query_bytes(network, "cpu")
    budget = smallest_scratch(CONFIG.dim, len(network.rel_pos_enc.freqs)) + least * count
    assert torch.equal(query(network, cache, coords, max_memory=budget), query(network, cache, coords))
    with pytest.raises(InputError, match=rf"max_memory: expected at least {budget - least * (count - 1)}"):
        query(network, cache, coords, max_memory=budget - least * count)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_labels_are_the_largest_scores(impl):
    network, coords = make_network(torch.bfloat16), make_coords()
    cache = prepared(network, make_image(torch.bfloat16), impl)
    for classes, dtype in ((1, torch.uint8), (150, torch.uint8), (300, torch.int16)):
        generator = seeded(classes)
        head = torch.nn.Linear(64, classes, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        scores = query(network, cache, coords, impl, head=head)
        labels = query(network, cache, coords, impl, head=head, labels=True, query_chunk_size=11)
        assert scores.shape == (3, COUNT, classes)
        assert labels.dtype == dtype
        assert torch.equal(labels.long(), scores.argmax(-1))
        with torch.no_grad():
            dense = network.dense(cache, (5, 9), head=head, labels=True, impl=impl)
            scores = network.dense(cache, (5, 9), head=head, impl=impl)
        assert torch.equal(dense.long(), scores.argmax(-1))


def test_labels_of_the_operation():
    arguments = norm_linear_inputs(Sizes(B=2, N=97, D=48), seeded())
    scores = norm_linear(**arguments, impl="cpu")
    assert torch.equal(norm_linear_argmax(**arguments, impl="cpu").long(), scores.argmax(-1))


# Rows that are out of the ordinary


@pytest.mark.parametrize(("instruction_set", "impl"), PAIRS, indirect=["instruction_set"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e20, -1e20], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_bad_coordinate_stays_in_its_row(instruction_set, impl, bad, axis):
    network, coords = make_network(), make_coords(batch=1)
    cache = prepared(network, make_image(batch=1), impl)
    expected = query(network, cache, coords, impl)
    changed = coords.clone()
    changed[0, 40, axis] = bad
    actual = query(network, cache, changed, impl)
    others = torch.arange(COUNT) != 40
    assert torch.equal(actual[:, others], expected[:, others])
    if bad != bad:
        assert actual[0, 40].isnan().all()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("name", ["norm_linear", "residual_mlp", "rope_cross_attention", "film_mlp"])
def test_a_bad_feature_stays_in_its_row(impl, name, bad):
    arguments = OPERATIONS[name].inputs(Sizes(B=1, N=50, D=64), seeded())
    expected = OPERATIONS[name].function(**arguments, impl=impl)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][0, 20, 5] = bad
    actual = OPERATIONS[name].function(**arguments, impl=impl)
    others = torch.arange(50) != 20
    assert torch.equal(actual[:, others], expected[:, others])
    if bad != bad:
        assert actual[0, 20, 5].isnan()


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_constant_rows_outliers_and_zero_columns_stay_finite(impl):
    sizes = Sizes(B=1, N=12, D=64, expansion=5)
    x = torch.randn(1, 12, 64, generator=seeded())
    x[:, :4] = torch.tensor([0.0, 1e-30, 1.0, 1e4])[:, None]
    x[:, 4, 7], x[:, 5, 63], x[:, 6, 0] = 1e4, -1e6, 1e18
    for name in ("norm_linear", "residual_mlp", "rope_cross_attention", "film_mlp"):
        arguments = OPERATIONS[name].inputs(sizes, seeded(1)) | {"x": x}
        for scale in (1.0, 0.0, 1e-42):
            weights = {
                n: t.clone() for n, t in tensors_of(arguments).items() if "weight" in n and t.dim() == 2
            }
            for weight in weights.values():
                weight[:, ::3] *= scale
                weight[1::5] *= scale
            changed = with_tensors(arguments, weights)
            actual = OPERATIONS[name].function(**changed, impl=impl)
            exact = OPERATIONS[name].function(**cast(changed, torch.float64), impl="reference")
            assert actual.isfinite().all()
            for row in range(12):
                assert relative_error(actual[0, row], exact[0, row]) < (1e-5 if impl == "cpu" else 0.03)


def test_far_preactivations_of_gelu(instruction_set):
    """GELU far from zero is the identity or zero, to a small part of its input."""
    x, weights = residual_mlp_inputs(Sizes(B=1, N=8, D=16, expansion=1), seeded()).values()
    eye, zero = torch.eye(16), torch.zeros(16)
    for bias in (-1e30, -1e4, -50.0, -14.0, 14.0, 50.0, 1e4, 1e30):
        weights = MLPWeights(zero, zero, eye, torch.full((16,), bias), eye, zero)
        actual = OPERATIONS["residual_mlp"].function(torch.zeros_like(x), weights, impl="cpu")
        expected = torch.full_like(x, max(bias, 0.0))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-36 * min(abs(bias), 1e30))


@needs_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_weight_is_not_hidden_by_8_bits(bad):
    arguments = norm_linear_inputs(Sizes(B=1, N=7, D=64), seeded())
    expected = norm_linear(**arguments, impl="cpu_int8")
    arguments["weight"][5, 40] = bad
    actual = norm_linear(**arguments, impl="cpu_int8")
    assert not actual[..., 5].isfinite().any()
    others = torch.arange(128) != 5
    assert torch.equal(actual[..., others], expected[..., others])


# Memory


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_write_in_place(dtype, impl):
    """The network hands each operation's input as its output."""
    sizes, generator = Sizes(B=2, N=53, D=64, token_grid=(5, 7)), seeded()
    context = Context(dtype, 66, int8=impl == "cpu_int8")
    mlp_arguments = residual_mlp_inputs(sizes, generator, dtype=dtype)
    attention = rope_cross_attention_inputs(sizes, generator, dtype=dtype)
    film = film_mlp_inputs(sizes, generator, dtype=dtype)
    mlp, weights = pack_mlp(context, mlp_arguments["weights"]), pack_attention(context, attention["weights"])
    key, value = pack_image(context, attention["key"], attention["value"])
    film_weights = Film(
        pack_position(context, film["position"]),
        pack_mlp(context, film["weights"].mlp),
        context.norm(*film["weights"][1:]),
    )
    coords, tokens, freqs, inv_freq = film["coords"], film["tokens"], film["freqs"], attention["inv_freq"]
    table = torch.randn(3, 128, generator=generator)
    row, token = (torch.randint(n, (53,), generator=generator) for n in (3, 35))
    addresses = key.data_ptr(), value.data_ptr()
    runs = (
        lambda x, out: cpu_kernels.residual_mlp.residual_mlp(context, x, mlp, out),
        lambda x, out: cpu_kernels.rope_cross_attention.rope_cross_attention(
            context, x, coords, *addresses, weights, inv_freq, 2, (5, 7), out
        ),
        lambda x, out: cpu_kernels.film_mlp.film_mlp_at(context, x, coords, tokens, film_weights, freqs, out),
        lambda x, out: cpu_kernels.film_mlp.film_mlp_from_table(
            context, x, tokens, table, row, token, film_weights, out
        ),
    )
    for run in runs:
        x = torch.randn(2, 53, 64, generator=generator).to(dtype)
        out = torch.full_like(x, torch.nan)
        run(x, out)
        run(x, x)
        assert out.isfinite().all()
        assert torch.equal(out, x)


def guarded(shape, dtype):
    """A NaN tensor in the middle of a larger one of ones, and that one."""
    count = torch.Size(shape).numel()
    around = torch.ones(count + 128, dtype=dtype)
    inside = around[64 : 64 + count]
    inside.fill_(torch.nan)
    return inside.view(shape), around


@pytest.mark.parametrize("width", [1, 15, 63, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_beside_the_output(instruction_set, dtype, width):
    arguments = norm_linear_inputs(Sizes(B=2, N=7, D=32, expansion=4), seeded(), dtype=dtype)
    context = Context(dtype, 32)
    matrix = context.matrix(arguments["weight"][:width], arguments["bias"][:width])
    out, around = guarded((2, 7, width), dtype)
    cpu_kernels.norm_linear.norm_linear(
        context, arguments["x"], context.norm(arguments["norm_weight"], arguments["norm_bias"]), matrix, out
    )
    assert out.isfinite().all()
    assert (around[:64] == 1).all()
    assert (around[-64:] == 1).all()


@pytest.mark.parametrize(("instruction_set", "impl"), PAIRS, indirect=["instruction_set"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_does_not_matter(instruction_set, impl, name, dtype):
    function = OPERATIONS[name].function
    arguments = OPERATIONS[name].inputs(
        Sizes(B=2, N=23, D=48, heads=3, token_grid=(4, 4)), seeded(), dtype=dtype
    )
    expected = function(**arguments, impl=impl)

    def misaligned(t):
        return torch.cat((t.new_ones(1), t.flatten()))[1:].view(t.shape)

    def strided(t):
        return torch.stack((t, torch.zeros_like(t)), -1)[..., 0]

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (misaligned, strided, transposed):
        changed = with_tensors(arguments, {n: change(t) for n, t in tensors_of(arguments).items()})
        assert torch.equal(function(**changed, impl=impl), expected)
    expanded = {
        n: t[:1].expand_as(t) for n, t in tensors_of(arguments).items() if t.dim() > 2 and len(t) == 2
    }
    copied = with_tensors(arguments, {n: t.contiguous() for n, t in expanded.items()})
    actual = function(**with_tensors(arguments, expanded), impl=impl)
    assert torch.equal(actual, function(**copied, impl=impl))


def huge(shape, dtype):
    """Uninitialised memory that takes no room until it is written."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        pytest.skip("not enough address space")


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that takes no room until it is written")
def test_more_than_2_to_31_elements(instruction_set):
    P, Q, D, dtype = 3, 50_000_001, 16, torch.bfloat16
    grid = huge((1, P, Q, D), dtype)
    assert grid.numel() > 2**31
    row = torch.randn(4, D, generator=seeded()).to(dtype)
    grid[0, -1, -2:] = row[:2]
    grid[0, 0, :2] = row[2:]
    coords = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    sampled = OPERATIONS["bilinear_sample"].function(grid, coords, impl="cpu")
    assert torch.equal(sampled, row[1:3].unsqueeze(0))

    # FiLM reads the last of 150 million tokens.
    arguments = film_mlp_inputs(Sizes(B=1, N=2, D=D, token_grid=(1, 2)), seeded(), dtype=dtype)
    gamma_beta = torch.randn(1, 2 * D, generator=seeded(1))
    outputs = []
    for tokens in (row[:2].view(1, 1, 2, D), grid.view(1, 1, P * Q, D)):
        last = torch.tensor([tokens.shape[2] - 2, tokens.shape[2] - 1])
        table = FilmTable(gamma_beta, torch.zeros(2, dtype=torch.int64), last)
        coords = (
            torch.stack(((last + 0.5) / tokens.shape[2], torch.full((2,), 0.5)), -1).double().unsqueeze(0)
        )
        changed = {**arguments, "tokens": tokens, "coords": coords, "table": table}
        outputs.append(OPERATIONS["film_mlp"].function(**changed, impl="cpu"))
    assert torch.equal(*outputs)

    # Images of an output lie far apart.
    arguments = norm_linear_inputs(Sizes(B=2, N=3, D=D), seeded(), dtype=dtype)
    context = Context(dtype, D)
    norm = context.norm(arguments["norm_weight"], arguments["norm_bias"])
    matrix = context.matrix(arguments["weight"], arguments["bias"])
    out = grid.flatten()[: 2 * (2**31 // 2 + 8)].view(2, -1)[:, : 3 * 32].unflatten(1, (3, 32))
    assert out.stride(0) > 2**30
    cpu_kernels.norm_linear.norm_linear(context, arguments["x"], norm, matrix, out)
    assert torch.equal(out.contiguous(), norm_linear(**arguments, impl="cpu"))


# Threads and processes


def test_python_threads_share_a_network(threads):
    threads(3)
    network, image = make_network(), make_image()
    cache = prepared(network, image)
    fresh = make_network(seed=5)
    cases = [(network, make_coords(seed, count=20 + 30 * seed)) for seed in range(4)]
    expected = [query(n, cache, coords) for n, coords in cases]
    fresh_expected = query(copy.deepcopy(fresh), cache, cases[0][1])
    barrier, failures = Barrier(4), []

    def work(i):
        barrier.wait()
        torch.set_num_threads(1 + i)
        # All pack the weights of the fresh network at once.
        results = [torch.equal(query(fresh, cache, cases[0][1]), fresh_expected)]
        for _ in range(25):
            results.append(torch.equal(query(*cases[i][:1], cache, cases[i][1]), expected[i]))
        results.append(torch.equal(prepared(network, image).keys[0], cache.keys[0]))
        failures.extend([i] * results.count(False))

    workers = [Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert not failures


def test_other_python_threads_run_meanwhile():
    arguments = residual_mlp_inputs(Sizes(B=1, N=20000, D=256, expansion=4), seeded())
    context = Context(torch.float32, 256)
    mlp, out = pack_mlp(context, arguments["weights"]), torch.empty_like(arguments["x"])
    ticks, running = [], True

    def tick():
        while running:
            ticks.append(time.monotonic())
            time.sleep(0.001)

    clock = Thread(target=tick)
    clock.start()
    begin = time.monotonic()
    cpu_kernels.residual_mlp.residual_mlp(context, arguments["x"], mlp, out)
    duration = time.monotonic() - begin
    running = False
    clock.join()
    inside = [t for t in ticks if begin + 0.1 * duration < t < begin + 0.9 * duration]
    assert duration > 0.05
    assert len(inside) >= 5


FORK = """
import os, sys, threading
import torch
sys.path.insert(0, {tests!r})
import test_cpu_kernels as t

torch.set_num_threads(3)
network, coords = t.make_network(), t.make_coords()
cache = t.prepared(network, t.make_image())
expected = t.query(network, cache, coords)
stop = False

def work():
    while not stop:
        t.query(network, cache, coords)

busy = threading.Thread(target=work)
busy.start()  # the pool is at work in other threads when the process forks
failed = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        right = all(torch.equal(t.query(network, cache, coords), expected) for _ in range(3))
        os._exit(0 if right else 1)
    failed += os.waitpid(child, 0)[1] != 0
stop = True
busy.join()
assert torch.equal(t.query(network, cache, coords), expected)
sys.exit(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_processes_compute():
    script = FORK.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_calls_leave_nothing_behind(threads):
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def tasks():
        return len(os.listdir("/proc/self/task"))

    threads(2)
    network, image, coords = make_network(torch.bfloat16), make_image(torch.bfloat16), make_coords(count=10)
    arguments = residual_mlp_inputs(Sizes(N=40, D=64), seeded(), dtype=torch.bfloat16)

    def work(count):
        for i in range(count):
            OPERATIONS["residual_mlp"].function(**arguments, impl="cpu")
            if i % 10 == 0:  # packs keys and values
                cache = prepared(network, image)
            query(network, cache, coords, query_chunk_size=20)
            if i % 50 == 0:  # packs the weights
                network._walks.clear()

    work(200)
    memory, count = resident(), tasks()
    work(1000)
    assert tasks() == count
    # A cache with its packed form takes 0.2 MB, packed weights take 0.8 MB.
    assert resident() - memory < 8e6


# What changes between calls


def test_changed_weights_are_noticed():
    network, coords = make_network(), make_coords()
    cache = prepared(network, make_image())
    before = query(network, cache, coords)
    block = network.vit_up_blocks[0]

    def in_place():
        with torch.no_grad():
            block.mlp.mlp[0].weight.mul_(1.5)

    def replaced():
        block.mlp.mlp[2].weight = torch.nn.Parameter(block.mlp.mlp[2].weight * 1.5)

    def norm_replaced():
        block.norm_post.weight = torch.nn.Parameter(block.norm_post.weight * 1.5)

    def norm_in_place():
        with torch.no_grad():
            block.norm_q_global.bias.add_(1.0)

    for change in (in_place, replaced, norm_replaced, norm_in_place):
        change()
        after = query(network, cache, coords)
        assert relative_error(after, before) > 1e-3
        torch.testing.assert_close(after, query(network, cache, coords, "torch"), rtol=1e-4, atol=1e-4)
        before = after


@pytest.mark.parametrize("kind", ["keys", "values", "tokens", "patch_grid"])
def test_a_changed_cache_is_noticed(kind):
    network, coords = make_network(), make_coords()
    cache = prepared(network, make_image())
    before = query(network, cache, coords)
    tensors = [cache.patch_grid] if kind == "patch_grid" else getattr(cache, kind)
    for tensor in tensors:
        tensor[1].mul_(-1.0)
    after = query(network, cache, coords)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert relative_error(after[1], before[1]) > 1e-3
    torch.testing.assert_close(after, query(network, cache, coords, "torch"), rtol=1e-4, atol=1e-4)


def test_a_cache_at_another_ones_address_is_noticed():
    network, coords = make_network(), make_coords()
    for seed in range(20):
        cache = prepared(network, make_image(seed=seed))
        actual = query(network, cache, coords)
        torch.testing.assert_close(actual, query(network, cache, coords, "torch"), rtol=1e-4, atol=1e-4)
        del cache


def test_inference_mode():
    network, coords = make_network(), make_coords()
    expected = query(network, prepared(network, make_image()), coords)
    for outer in (torch.inference_mode, torch.no_grad):
        for inner in (torch.inference_mode, torch.no_grad):
            with outer():
                fresh = make_network()
                cache = fresh.prepare(*make_image(), impl="cpu")
                assert torch.equal(fresh(cache, coords, impl="cpu"), expected)
            with inner():
                assert torch.equal(fresh(cache, coords, impl="cpu"), expected)
                assert torch.equal(network(cache, coords, impl="cpu"), expected)


def test_autocast_of_a_network():
    network, low, coords = make_network(), make_network().bfloat16(), make_coords()
    with torch.autocast("cpu", torch.bfloat16):
        cache = prepared(network, make_image())
        actual = query(network, cache, coords)
    assert actual.dtype == torch.bfloat16
    with torch.no_grad():
        expected = query(low, cache.to(torch.bfloat16), coords)
    assert torch.equal(actual, expected)


# 8-bit integers


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_at_real_sizes(dtype):
    config = ViTUpConfig(dim=384, num_heads=6, layer_indices=(0, 2, 4, 6, 8, 10, 12))
    network = random_network(config, seeded(), dtype=dtype)
    image = random_image(config, seeded(1), patch_grid=(56, 56), dtype=dtype)
    coords = random_coords(seeded(2), 1, 196)
    actual = query(network, prepared(network, image, "cpu_int8"), coords, "cpu_int8")
    wide = network.double()
    exact = query(wide, prepared(wide, widened(image), "reference"), coords, "reference")
    assert torch.cosine_similarity(actual.double(), exact, dim=-1).min() > 0.999


@needs_int8
def test_int8_on_the_golden_network():
    from test_model import GOLDEN, SAME_TOKEN_FROM, golden_image, golden_network

    golden = pytest.importorskip("safetensors.torch").load_file(GOLDEN)
    network = golden_network(golden, torch.float32)
    cache = prepared(network, golden_image(golden, torch.float32), "cpu_int8")
    outputs = query(network, cache, golden["coords"], "cpu_int8", return_all_layers=True)
    for i, output in enumerate(outputs):
        exact = golden[f"outputs.{i}"][:, SAME_TOKEN_FROM:]
        cosine = torch.cosine_similarity(output[:, SAME_TOKEN_FROM:].double(), exact, dim=-1)
        assert cosine.min() > 0.999, f"depth {i}"


@needs_int8
def test_int8_has_no_gradients():
    arguments = residual_mlp_inputs(Sizes(), seeded())
    arguments["x"].requires_grad_()
    output = OPERATIONS["residual_mlp"].function(**arguments, impl="cpu_int8")
    with pytest.raises(InputError, match="impl: expected an implementation with gradients, got 'cpu_int8'"):
        output.sum().backward()
    network = make_network()
    with pytest.raises(InputError, match="impl: expected an implementation with gradients, got 'cpu_int8'"):
        network(prepared(network, make_image()), make_coords(), impl="cpu_int8").sum().backward()


@pytest.mark.skipif(BEST != "avx512_bf16", reason="no 8-bit products on this CPU in any case")
@pytest.mark.parametrize("chosen", OTHERS)
def test_int8_needs_its_instructions(chosen):
    arguments = residual_mlp_inputs(Sizes(), seeded())
    KERNELS.use_instruction_set(chosen)
    try:
        with pytest.raises(
            InputError, match=r"impl: .*'cpu_int8': 8-bit products need a CPU with AVX-512 VNNI"
        ):
            OPERATIONS["residual_mlp"].function(**arguments, impl="cpu_int8")
    finally:
        KERNELS.use_instruction_set(BEST)


# Choice and refusal


def impls_that_run(monkeypatch):
    """Record which implementation every operation and network resolves to."""
    chosen = []
    original = implementations.resolve
    import vitup_fast.network.model

    def resolve(*args, **kwargs):
        chosen.append(original(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(vitup_fast.network.model, "resolve", resolve)
    for name in ("bilinear_sample", "residual_mlp", "rope_cross_attention", "film_mlp", "norm_linear"):
        monkeypatch.setattr(sys.modules[f"vitup_fast.ops.{name}"], "resolve", resolve)
    return chosen


def test_auto_takes_the_kernels_where_they_are_faster(monkeypatch):
    chosen = impls_that_run(monkeypatch)
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            operation.function(**operation.inputs(Sizes(), seeded(), dtype=dtype))
            slower = implementations._onednn_is_faster(dtype)
            assert chosen.pop() == ("torch" if slower else "cpu"), name
    network = make_network()
    query(network, prepared(network, make_image(), "auto"), make_coords(), "auto")
    assert set(chosen) == {"torch" if implementations._onednn_is_faster(torch.float32) else "cpu"}


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        (Sizes(D=32), torch.float64, "the kernels take bfloat16, float16 and float32, not float64"),
        (Sizes(D=24), torch.float32, "the width D = 24 is not a multiple of 16"),
        (Sizes(D=40, heads=1), torch.bfloat16, "the width D = 40 is not a multiple of 16"),
    ],
)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_refusals(monkeypatch, impl, sizes, dtype, reason):
    chosen = impls_that_run(monkeypatch)
    for operation in OPERATIONS.values():
        arguments = operation.inputs(sizes, seeded(), dtype=dtype)
        with pytest.raises(InputError, match=f"impl: expected .* can run here, got '{impl}': {reason}"):
            operation.function(**arguments, impl=impl)
        operation.function(**arguments)
        assert chosen.pop() == "torch"


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_refusal_of_narrow_heads(impl):
    arguments = rope_cross_attention_inputs(Sizes(D=32, heads=4), seeded())
    function = OPERATIONS["rope_cross_attention"].function
    with pytest.raises(InputError, match="the head width = 8 is not a multiple of 16"):
        function(**arguments, impl=impl)
    assert torch.equal(function(**arguments), function(**arguments, impl="torch"))


def test_refusal_of_an_odd_hidden_width():
    x, weights = residual_mlp_inputs(Sizes(D=32), seeded()).values()
    weights = weights._replace(
        weight1=weights.weight1[:24], bias1=weights.bias1[:24], weight2=weights.weight2[:, :24]
    )
    function = OPERATIONS["residual_mlp"].function
    with pytest.raises(InputError, match="the hidden width = 24 is not a multiple of 16"):
        function(x, weights, impl="cpu")
    assert torch.equal(function(x, weights), function(x, weights, impl="torch"))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_refusal_of_another_device(impl):
    x = torch.empty(1, 2, 32, device="meta")
    with pytest.raises(InputError, match=f"'{impl}': the features are on meta, not on the CPU"):
        implementations.resolve(impl, x, {"the width D": 32})
    assert implementations.resolve("auto", x, {"the width D": 32}) == "torch"


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_without_the_extension(monkeypatch, impl):
    monkeypatch.setattr(extension, "obstacle", lambda part: f"the {part} kernels are not built")
    arguments = residual_mlp_inputs(Sizes(), seeded())
    function = OPERATIONS["residual_mlp"].function
    with pytest.raises(InputError, match=f"got '{impl}': the cpu kernels are not built. 'auto' picks one"):
        function(**arguments, impl=impl)
    assert torch.equal(function(**arguments), function(**arguments, impl="torch"))
    network = make_network()
    cache = prepared(network, make_image(), "auto")
    with pytest.raises(InputError, match="the cpu kernels are not built"):
        query(network, cache, make_coords(), impl)
    auto = query(network, cache, make_coords(), "auto")
    assert torch.equal(auto, query(network, cache, make_coords(), "torch"))


@pytest.mark.parametrize("N", [0, 1])
@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_nothing_to_do(impl, B, N):
    for operation in OPERATIONS.values():
        arguments = operation.inputs(Sizes(B=2, N=N), seeded())
        arguments = with_tensors(
            arguments,
            {n: t[:B] for n, t in tensors_of(arguments).items() if t.dim() > 2},
        )
        output = operation.function(**arguments, impl=impl)
        assert output.shape[:2] == (B, N)
        assert output.isfinite().all()
    network = make_network()
    cache = prepared(network, make_image(), impl)[:B]
    assert query(network, cache, make_coords(batch=B, count=N), impl).shape == (B, N, 64)
