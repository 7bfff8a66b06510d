from __future__ import annotations

import copy
import itertools
import pickle
import re
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import FAST_IMPLS, FLOAT64_IMPLS, IMPLS, query_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from vitup_fast import ImageCache, InputError, ViTUp, ViTUpConfig
from vitup_fast.network import grid
from vitup_fast.testing import (
    assert_within_budget,
    poisoned_allocations,
    random_coords,
    random_image,
    random_network,
)
from vitup_fast.walks import operators
from vitup_fast.walks.plan import CHUNK_QUERIES

GOLDEN = Path(__file__).parent / "data" / "vitup_tiny.safetensors"
GOLDEN_CONFIG = ViTUpConfig(dim=64, num_heads=2, layer_indices=(0, 1, 2, 3))
SAME_TOKEN_FROM = 11  # earlier queries lie on cell borders, where float32 may round to the other token
CPU_IMPLS = [name for name in FAST_IMPLS if name in ("torch", "cpu")]
property_test = settings(max_examples=25, deadline=None)


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def to(image, dtype):
    hidden_states, patch_grid = image
    return [h.to(dtype) for h in hidden_states], patch_grid.to(dtype)


# The golden file


@pytest.fixture(scope="session")
def float32_case(network, image):
    """The network and the images rounded to float32."""
    return copy.deepcopy(network).float(), to(image, torch.float32)


@pytest.fixture(scope="module")
def golden():
    return pytest.importorskip("safetensors.torch").load_file(GOLDEN)


def golden_network(golden, dtype):
    network = ViTUp(GOLDEN_CONFIG)
    weights = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    network.load_state_dict(weights, strict=True)
    return network.to(dtype)


def golden_image(golden, dtype):
    return to(([golden[f"hidden_states.{i}"] for i in range(4)], golden["patch_grid"]), dtype)


@pytest.mark.parametrize(
    ("impl", "chunk"),
    [*itertools.product(IMPLS, (1, 10, 37, 100)), *((impl, 20) for impl in FLOAT64_IMPLS)],
)
def test_golden_outputs(golden, impl, chunk):
    network = golden_network(golden, torch.float64)
    with torch.no_grad():
        cache = network.prepare(*golden_image(golden, torch.float64), impl=impl)
        outputs = network(cache, golden["coords"], return_all_layers=True, query_chunk_size=chunk, impl=impl)
    assert len(outputs) == 4
    for i, output in enumerate(outputs):
        assert relative(output, golden[f"outputs.{i}"]) < 1e-9
        assert (output - golden[f"outputs.{i}"]).abs().max() < 1e-8


@pytest.mark.parametrize(
    ("impl", "chunk"), [*itertools.product(IMPLS, (10, 37)), *((impl, 20) for impl in FLOAT64_IMPLS)]
)
def test_golden_gradients(golden, impl, chunk):
    network = golden_network(golden, torch.float64)
    hidden_states, patch_grid = golden_image(golden, torch.float64)
    leaves = {f"hidden_states.{i}": h.requires_grad_() for i, h in enumerate(hidden_states)}
    leaves["patch_grid"] = patch_grid.requires_grad_()
    coords = golden["coords"].double().requires_grad_()
    leaves |= {f"weights.{name}": p for name, p in network.named_parameters()}
    cache = network.prepare(hidden_states, patch_grid, impl=impl)
    outputs = network(cache, coords, return_all_layers=True, query_chunk_size=chunk, impl=impl)
    loss = sum((o * golden[f"cotangents.{i}"]).sum() for i, o in enumerate(outputs))
    names = [n.removeprefix("grads.") for n in golden if n.startswith("grads.")]
    assert {*leaves, "coords"} == set(names)
    grads = torch.autograd.grad(loss, [coords, *leaves.values()], allow_unused=True)
    close(
        grads[0][:, SAME_TOKEN_FROM:],
        golden["grads.coords"][:, SAME_TOKEN_FROM:].double(),
        tolerance=1e-7 * golden["grads.coords"].abs().max().item(),
    )
    for name, grad in zip(leaves, grads[1:], strict=True):
        exact = golden[f"grads.{name}"].double()
        if not exact.any():  # the first hidden state is not read
            assert grad is None or not grad.any(), name
        else:
            assert relative(grad, exact) < 1e-7, name


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_gradient_of_the_fine_grid_is_not_copied(golden, impl):
    """It is by far the largest tensor of a training step."""
    network = golden_network(golden, torch.float32)
    hidden_states, patch_grid = golden_image(golden, torch.float32)
    hidden_states, patch_grid = [h[:1] for h in hidden_states], patch_grid[:1].requires_grad_()
    cache = network.prepare(hidden_states, patch_grid, impl=impl)
    features = network(cache, golden["coords"][:1], impl=impl)
    with torch.profiler.profile(record_shapes=True) as profile:
        features.sum().backward()
    assert patch_grid.grad.any()
    whole = [*patch_grid.shape]
    passes = [event.name for event in profile.events() if event.input_shapes[:1] == [whole]]
    assert not {"aten::fill_", "aten::copy_", "aten::add", "aten::add_"} & {*passes}, passes


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_golden_in_low_precision(golden, dtype, impl):
    """The budget holds against the golden outputs: rounding of weights and inputs counts for both alike."""
    network = golden_network(golden, dtype)
    with torch.no_grad():
        actual, eager = (
            network(
                network.prepare(*golden_image(golden, dtype), impl=name),
                golden["coords"],
                return_all_layers=True,
                impl=name,
            )
            for name in (impl, "reference")
        )
    for i in range(4):
        layers = (layer[i][:, SAME_TOKEN_FROM:] for layer in (actual, eager))
        exact = golden[f"outputs.{i}"][:, SAME_TOKEN_FROM:]
        factor = 1.5 if dtype == torch.float32 else 1.0
        assert_within_budget(*layers, exact, factor=factor, name=f"depth {i}")


# Real sizes


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize(
    ("dim", "dtype", "cosine"),
    [(384, torch.float32, 0.9999999), (384, torch.bfloat16, 0.9999), (768, torch.bfloat16, 0.9999)],
    ids=str,
)
def test_real_sizes(dim, dtype, cosine, impl):
    config = ViTUpConfig(dim=dim, num_heads=dim // 64, layer_indices=(0, 2, 4, 6, 8, 10, 12))
    generator = torch.Generator().manual_seed(dim)
    network = random_network(config, generator, dtype=dtype)
    image = random_image(config, generator, dtype=dtype)
    coords = random_coords(generator, 1, 64)
    with torch.no_grad():
        eager = network(network.prepare(*image, impl="reference"), coords, impl="reference")
        with poisoned_allocations():
            actual = network(network.prepare(*image, impl=impl), coords, impl=impl)
        network = network.double()
        exact = network(network.prepare(*to(image, torch.float64)), coords)
    # In float32 oneDNN sums products in one chain, plain PyTorch in blocks: within the limit, not at the aim.
    assert_within_budget(actual, eager, exact, factor=1.5 if dtype == torch.float32 else 1.0)
    assert torch.cosine_similarity(actual.double(), exact, dim=-1).min() > cosine


# Properties


def query(network, cache, coords, **options):
    with torch.no_grad():
        return network(cache, coords, **options)


@property_test
@given(chunk=st.integers(1, 100))
def test_chunks_do_not_matter(network, cache, coords, chunk):
    whole = query(network, cache, coords, return_all_layers=True, query_chunk_size=10**6)
    for a, b in zip(
        query(network, cache, coords, return_all_layers=True, query_chunk_size=chunk), whole, strict=True
    ):
        close(a, b)


@property_test
@given(order=st.permutations(range(29)))
def test_order_of_queries_does_not_matter(network, cache, coords, order):
    close(query(network, cache, coords[:, order]), query(network, cache, coords)[:, order])


@property_test
@given(images=st.lists(st.integers(-3, 2), min_size=1, max_size=5))
def test_images_do_not_mix(network, cache, coords, images):
    expected = query(network, cache, coords)[images]
    close(query(network, cache[images], coords[images]), expected)
    close(query(network, cache[torch.tensor(images)], coords[images]), expected)
    for b, image in enumerate(images):
        close(query(network, cache[image], coords[image].unsqueeze(0)), expected[b : b + 1])


@property_test
@given(numerator=st.integers(1, 20))
def test_memory_budget_does_not_change_the_result(network, cache, coords, numerator):
    per_query = query_bytes(network, "torch")
    close(
        query(network, cache, coords, max_memory=per_query * numerator),
        query(network, cache, coords, query_chunk_size=10**6),
    )


def cell_centres(H, W):
    y, x = torch.meshgrid(
        (torch.arange(H) + 0.5).double() / H, (torch.arange(W) + 0.5).double() / W, indexing="ij"
    )
    return torch.stack((x, y), dim=-1).flatten(0, 1)


# Odd ratios put no cell centre on a token's border, where the definition rounds to either side.
sides = st.integers(1, 9).flatmap(lambda n: st.sampled_from([n, 2 * n + 1]))


@property_test
@given(H=sides, W=sides, chunk=st.integers(3, 80), all_layers=st.booleans())
def test_dense_is_forward_at_the_cell_centres(network, cache, H, W, chunk, all_layers):
    cache = cache[1:]
    coords = cell_centres(H, W).expand(2, -1, -1)
    with torch.no_grad():
        dense = network.dense(cache, (H, W), query_chunk_size=chunk, return_all_layers=all_layers)
        forward = network(cache, coords, return_all_layers=all_layers)
    for a, b in zip(*((layers if all_layers else [layers]) for layers in (dense, forward)), strict=True):
        assert a.shape == (2, H, W, 32)
        agree = (a.flatten(1, 2) - b).abs().amax(dim=(0, 2)) < 1e-10
        assert agree[~on_border(coords[0])].all()


def on_border(coords):
    """Queries midway between two tokens, of a 5 x 7 grid."""
    position = coords * torch.tensor((7, 5))
    return ((position - position.round()).abs() < 1e-9).any(-1)


@pytest.mark.parametrize("size", [(20, 28), (15, 35), (33, 29), (5, 63), (80, 14)], ids=str)
@pytest.mark.parametrize("chunk", [10, 64, 3000])
def test_dense_in_float32_is_as_exact_as_eager(float32_case, size, chunk):
    low, image = float32_case
    wide = copy.deepcopy(low).double()
    with torch.no_grad():
        cache, exact_cache = low.prepare(*image), wide.prepare(*to(image, torch.float64))
        actual = low.dense(cache, size, query_chunk_size=chunk)
        eager = low.dense(cache, size, impl="reference")
        exact = wide.dense(exact_cache, size)
    inside = ~on_border(cell_centres(*size)).view(size)
    assert_within_budget(actual[:, inside], eager[:, inside], exact[:, inside], factor=1.5)


def test_dense_runs_the_position_mlp_once_per_relative_position(network, image, monkeypatch):
    rows = []
    original = grid.film_gamma_beta
    monkeypatch.setattr(grid, "film_gamma_beta", lambda r, *rest: rows.append(len(r)) or original(r, *rest))
    low = copy.deepcopy(network).float()
    with torch.no_grad():
        low.dense(low.prepare(*image), (20, 28), query_chunk_size=64)
    assert rows == [16, 16]


# What runs


def test_only_the_decoders_asked_for_run(network, image, coords):
    changed = copy.deepcopy(network)
    with torch.no_grad():
        expected = network(network.prepare(*image), coords)
        for decoder in changed.decoder_mlp[:-1]:
            for parameter in decoder.parameters():
                parameter.fill_(torch.nan)
        close(changed(changed.prepare(*image), coords), expected)


def test_number_of_decodings(network, cache, coords, monkeypatch):
    calls = []
    original = operators.norm_linear
    monkeypatch.setattr(operators, "norm_linear", lambda *a, **k: calls.append(a) or original(*a, **k))
    query(network, cache, coords, query_chunk_size=1000)
    assert len(calls) == 1
    query(network, cache, coords, query_chunk_size=1000, return_all_layers=True)
    assert len(calls) == 1 + 3


def test_no_memory_is_read_before_it_is_written(network, image, coords):
    low = copy.deepcopy(network).float()
    with torch.no_grad(), poisoned_allocations():
        cache = low.prepare(*image)
        outputs = [*low(cache, coords, return_all_layers=True, query_chunk_size=5)]
        outputs.append(low.dense(cache, (6, 9), query_chunk_size=4))
    assert all(output.isfinite().all() for output in outputs)


# The cache


def test_cache_of_images(cache):
    assert len(cache) == cache.batch_size == 3
    assert cache.token_grid == (5, 7)
    tensors = (*cache.keys, *cache.values, *cache.tokens, cache.patch_grid)
    assert cache.nbytes == sum(t.numel() * 8 for t in tensors)
    assert len(cache[1:]) == len(cache[[0, 2]]) == 2
    assert len(cache[-1]) == 1
    assert torch.equal(cache[-1].patch_grid, cache.patch_grid[2:])
    assert torch.equal(cache[1].keys[0], cache.keys[0][1:2])
    assert [len(one) for one in cache] == [1, 1, 1]
    for one in (np.int64(2), torch.tensor(2), -1):
        assert torch.equal(cache[one].keys[0], cache.keys[0][2:])
    for bad in (3, -4):
        with pytest.raises(IndexError, match=f"image {bad} of a cache of 3"):
            cache[bad]
    low = cache.to(torch.float32)
    assert isinstance(low, ImageCache)
    assert {t.dtype for t in (*low.keys, *low.values, *low.tokens, low.patch_grid)} == {torch.float32}
    assert low.nbytes == cache.nbytes // 2
    assert not cache.requires_grad


@pytest.mark.parametrize("size", [0, 4])
def test_no_images_or_no_queries(network, cache, coords, size):
    for some_cache, some_coords in ((cache[:0], coords[:0, :size]), (cache, coords[:, :0])):
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                output = network(some_cache, some_coords, query_chunk_size=2)
            assert output.shape == (*some_coords.shape[:2], 32)
            assert output.dtype == torch.float64
            if context is torch.enable_grad:
                output.sum().backward()


def test_constants_survive_the_meta_device():
    with torch.device("meta"):
        network = ViTUp(ViTUpConfig(dim=32, num_heads=2, layer_indices=(0, 1)))
    ready = network.to_empty(device="cpu")
    fresh = ViTUp(network.config)
    assert torch.equal(ready.rope.inv_freq, fresh.rope.inv_freq)
    assert torch.equal(ready.rel_pos_enc.freqs, fresh.rel_pos_enc.freqs)


def test_a_cache_of_another_dtype_is_refused(network, cache, coords):
    with pytest.raises(
        InputError, match=r"cache: expected dtype torch\.float64 of the network, got torch\.float32"
    ):
        network(cache.to(torch.float32), coords)


# Gradients and weights that change


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_agree(network, image, coords, context):
    low = copy.deepcopy(network).float()
    expected = low(low.prepare(*image), coords)
    assert expected.requires_grad
    with context():
        actual = low(low.prepare(*image), coords, query_chunk_size=7)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low(low.prepare(*image), coords), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [5, 100])
def test_coordinate_gradients_from_a_cache_without(network, image, coords, frozen, chunk):
    low = copy.deepcopy(network).float().requires_grad_(not frozen)
    with torch.no_grad():
        cache = low.prepare(*image)
        low(cache, coords)
    leaf, exact = coords.clone().requires_grad_(), coords.double().requires_grad_()
    low(cache, leaf, query_chunk_size=chunk).square().sum().backward()
    with torch.no_grad():
        exact_cache = network.prepare(*image)
    network(exact_cache, exact).square().sum().backward()
    assert relative(leaf.grad.double(), exact.grad) < 1e-3
    network.zero_grad()


def test_dense_gradients_equal_forward_gradients(network, image):
    low = copy.deepcopy(network).float()
    parameters = dict(low.named_parameters())
    coords = cell_centres(10, 14).float().expand(3, -1, -1)
    cotangent = torch.randn(3, 140, 32, generator=torch.Generator().manual_seed(0))
    inside = ~on_border(coords[0].double()) * 1.0
    cotangent *= inside[:, None]
    grads = []
    for output in (
        low.dense(low.prepare(*image), (10, 14), query_chunk_size=30).flatten(1, 2),
        low(low.prepare(*image), coords),
    ):
        grads.append(torch.autograd.grad(output, list(parameters.values()), cotangent, allow_unused=True))
    for name, a, b in zip(parameters, *grads, strict=True):
        assert (a is None) == (b is None) == (name.startswith("decoder_mlp") and ".2." not in name), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def change_by_optimizer(network, weights):
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(network.parameters(), lr=0.01).step()


def change_by_loading(network, weights):
    network.load_state_dict(weights)


def change_behind_the_back(network, weights):
    for name, p in network.named_parameters():
        p.data.copy_(weights[name])


@pytest.mark.parametrize("change", [change_by_optimizer, change_by_loading, change_behind_the_back])
def test_changed_weights_are_honoured(network, image, coords, change):
    low = copy.deepcopy(network).float()
    with torch.no_grad():
        old_cache = low.prepare(*image)
    other = {n: t + 0.01 * torch.ones_like(t) if "freqs" not in n else t for n, t in low.state_dict().items()}
    before = query(low, old_cache, coords)
    change(low, other)
    if change is not change_behind_the_back:  # which only prepare can notice
        expected = low(old_cache, coords).detach()
        torch.testing.assert_close(query(low, old_cache, coords), expected, rtol=1e-4, atol=1e-5)
        assert relative(expected, before) > 1e-3
    with torch.no_grad():
        cache = low.prepare(*image)
    after = query(low, cache, coords)
    torch.testing.assert_close(after, low(cache, coords).detach(), rtol=1e-4, atol=1e-5)
    assert relative(after, before) > 1e-3


@pytest.mark.parametrize("cast", [ViTUp.bfloat16, ViTUp.half, ViTUp.double], ids=lambda f: f.__name__)
def test_frequencies_stay_float32(network, cast):
    low = cast(copy.deepcopy(network).float())
    assert low.dtype != torch.float32
    assert low.rel_pos_enc.freqs.dtype == low.rope.inv_freq.dtype == torch.float32
    assert torch.equal(low.rel_pos_enc.freqs, network.rel_pos_enc.freqs)
    assert torch.equal(low.rope.inv_freq, network.rope.inv_freq)
    assert set(low.state_dict()) == set(network.state_dict())
    assert "rope.inv_freq" not in low.state_dict()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_after_inference(network, image, coords, duplicate):
    low = copy.deepcopy(network).float()
    with torch.no_grad():
        expected = low(low.prepare(*image), coords)
        copied = duplicate(low)
        assert torch.equal(copied(copied.prepare(*image), coords), expected)
        for p in copied.parameters():
            p.zero_()
        assert torch.equal(low(low.prepare(*image), coords), expected)


def test_threads_share_a_network(network, image, coords):
    low = copy.deepcopy(network).float()
    with torch.no_grad():
        cache = low.prepare(*image)
    expected = query(low, cache, coords)
    results = [None] * 4

    def work(i):
        for _ in range(5):
            own = low.prepare(*image) if i % 2 else cache
            results[i] = query(low, own, coords)

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result, expected)


def test_autocast_equals_a_low_precision_network(network, image, coords):
    low, cast = copy.deepcopy(network).float(), copy.deepcopy(network).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = low.prepare(*image)
        actual, dense = low(cache, coords), low.dense(cache, (10, 14))
    exact = query(network, network.prepare(*image), coords)
    eager = query(cast, cast.prepare(*image, impl="reference"), coords, impl="reference")
    assert actual.dtype == dense.dtype == torch.bfloat16
    assert_within_budget(actual, eager, exact, factor=1.0)


def test_compiles(network, image, coords):
    low = copy.deepcopy(network).float()
    cache = low.prepare(*image)
    expected = low(cache, coords)
    torch._dynamo.reset()
    actual = torch.compile(low, fullgraph=True, backend="aot_eager")(cache, coords)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.ones_like(actual)
    parameters = list(low.vit_up_blocks.parameters())
    for a, b in zip(
        torch.autograd.grad(actual, parameters, cotangent, retain_graph=True),
        torch.autograd.grad(expected, parameters, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Memory


def peak_memory(function):
    """Most bytes alive at once, beyond what was there before and the result."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    for output in result if isinstance(result, list) else [result]:
        assert sizes.count(output.nbytes) >= 1
        sizes.remove(output.nbytes)
    peak = live = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    assert peak > 0
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("megabytes", "blocks"), [(0.25, 1), (1, 2), (4, 6), (16, 2), (64, 1)])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_memory_stays_within_the_budget(dtype, megabytes, blocks, impl):
    config = ViTUpConfig(dim=384, num_heads=6, layer_indices=tuple(range(blocks + 1)))
    generator = torch.Generator().manual_seed(0)
    network = random_network(config, generator, dtype=dtype)
    budget = int(megabytes * 2**20)
    with torch.no_grad():
        cache = network.prepare(*random_image(config, generator, patch_grid=(56, 56)))
        network(cache, random_coords(generator, 1, 1), impl=impl)  # packs the weights
    largest = CHUNK_QUERIES * 3 // 2
    scattered = random_coords(generator, 1, min(largest, 2 * budget // query_bytes(network, impl)))

    def peak(run, *arguments, **options):
        return peak_memory(lambda: run(cache, *arguments, impl=impl, max_memory=budget, **options))

    forward = peak(network, scattered)
    assert forward <= budget
    # From 4 MB on the compiled kernels, from 64 MB on all have more than the largest chunk needs.
    assert forward > budget / 4 or megabytes >= (64 if impl == "torch" else 4)
    assert peak(network, scattered, return_all_layers=True) <= budget
    for size in ((scattered.shape[1] // 112 + 1, 112), (27, 40)):  # 4 relative positions a row; 270 in all
        assert peak(network.dense, size) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_grids_with_a_head_stay_within_the_budget(dtype, impl):
    """Narrow answers leave no room that tables of relative positions could be made in unnoticed."""
    config = ViTUpConfig(dim=384, num_heads=6, layer_indices=(0, 1, 2))
    generator = torch.Generator().manual_seed(0)
    network = random_network(config, generator, dtype=dtype)
    head = torch.randn(5, 384, generator=generator), None
    with torch.no_grad():
        cache = network.prepare(*random_image(config, generator, token_grid=(5, 6), patch_grid=(10, 12)))
        network(cache, random_coords(generator, 1, 1), impl=impl)  # packs the weights
    for budget in (560_000, 1_000_000) if dtype == torch.float32 else (700_000, 4_000_000):
        options = {"head": head, "labels": True, "impl": impl, "max_memory": budget}
        assert peak_memory(lambda options=options: network.dense(cache, (40, 40), **options)) <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_adaptive_maps_stay_within_the_budget(dtype, impl):
    config = ViTUpConfig(dim=192, num_heads=3, layer_indices=(0, 1))
    generator = torch.Generator().manual_seed(0)
    network = random_network(config, generator, dtype=dtype)
    head = torch.randn(5, 192, generator=generator), None
    size, spent = (96, 80), []
    with torch.no_grad():
        cache = network.prepare(*random_image(config, generator, token_grid=(6, 5), patch_grid=(6, 5)))
        network(cache, random_coords(generator, 1, 1), impl=impl)  # packs the weights
    labels = {"tolerance": 4.0, "head": head, "labels": True}
    for megabytes, options in ((1, {"tolerance": 0.5}), (4, {"tolerance": 0.5}), (4, labels)):
        options |= {"impl": impl, "max_memory": megabytes << 20, "report": spent.append}
        peak = peak_memory(lambda options=options: network.dense(cache, size, **options))
        assert peak <= megabytes << 20
    assert max(report.share for report in spent) < 1


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 3), (torch.bfloat16, 1)], ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_all_that_can_be_asked_stays_within_the_least_budget(dtype, batch, impl):
    """The least is what an error names; whatever is packed, folded or placed for the call is part of it."""
    config = ViTUpConfig(dim=64, num_heads=2, layer_indices=(0, 1))
    generator = torch.Generator().manual_seed(0)
    network = random_network(config, generator, dtype=dtype)
    coords = random_coords(generator, batch, 9)
    with torch.no_grad():
        cache = network.prepare(
            *random_image(config, generator, batch=batch, token_grid=(1, 2), patch_grid=(4, 8))
        )
        network(cache, coords, impl=impl)  # packs the weights
    heads = [
        (torch.randn(5, 64, generator=generator), None),
        (torch.ones(300, 64).to(dtype), torch.zeros(300)),
    ]
    asked = [
        {},
        {"return_all_layers": True},
        {"head": heads[0], "labels": True},
        {"head": heads[1]},
        {"head": heads[1], "labels": True},
    ]
    for options in asked:
        dense = partial(network.dense, cache, **options)
        calls = [partial(network, cache, coords, **options), partial(dense, (5, 6))]
        for call in (*calls, partial(dense, (6, 12), tolerance=0.5)):
            with torch.no_grad(), pytest.raises(InputError, match="max_memory: expected at least") as refused:
                call(impl=impl, max_memory=1)
            least = int(re.search(r"least (\d+) bytes", str(refused.value))[1])
            with torch.no_grad(), pytest.raises(InputError, match=f"at least {least} bytes"):
                call(impl=impl, max_memory=least - 1)
            for budget in (least, 3 * least):
                peak = peak_memory(lambda call=call, budget=budget: call(impl=impl, max_memory=budget))
                assert peak <= budget, (call, budget)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, g: (h[:2], g), r"hidden_states: expected 3 layers for depths \(0, 1, 2\), got 2"),
        (lambda h, g: (h, g[..., :8]), r"patch_grid: expected shape \(B, P, Q, D\) with last size 32"),
        (lambda h, g: (h, g[0]), r"patch_grid: expected shape \(B, P, Q, D\), got \(10, 14, 32\)"),
        (lambda h, g: ([h[0], h[1][..., :8], h[2]], g), r"hidden_states\[1\]: .* last size 32"),
        (lambda h, g: ([h[0], h[1], h[2][:, :4]], g), r"hidden_states\[2\]: expected the shape of"),
        (lambda h, g: (h, g[:2]), r"hidden_states\[0\]: expected .* the batch of patch_grid \(2, 10"),
        (lambda h, g: ([x[:, :0] for x in h], g), "hidden_states and patch_grid: expected no empty axis"),
        (lambda h, g: (h, g[:, :0]), "hidden_states and patch_grid: expected no empty axis"),
        (lambda h, g: (h, g.long()), "patch_grid: expected a floating dtype, got torch.int64"),
        (lambda h, g: ([*h[:2], h[2].to("meta")], g), r"hidden_states\[2\]: expected device cpu"),
    ],
)
def test_prepare_errors(network, image, change, message):
    with pytest.raises(InputError, match=message):
        network.prepare(*change(*image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": torch.zeros(3, 4, 3)}, r"coords: expected shape \(B, N, 2\) .*, got \(3, 4, 3\)"),
        ({"coords": torch.zeros(2, 4, 2)}, r"coords: expected batch size 3, got 2"),
        ({"coords": torch.zeros(3, 4, 2).bfloat16()}, r"coords: expected dtype float32 .* torch.bfloat16"),
        ({"coords": torch.zeros(3, 4, 2, device="meta")}, "coords: expected device cpu"),
        ({"cache": None}, "cache: expected an ImageCache from ViTUp.prepare, got NoneType"),
        ({"query_chunk_size": 0}, "query_chunk_size: expected a positive integer, got 0"),
        ({"query_chunk_size": True}, "query_chunk_size: expected a positive integer, got True"),
        ({"query_chunk_size": 2.0}, "query_chunk_size: expected a positive integer, got 2.0"),
        ({"query_chunk_size": 2, "max_memory": 10**9}, "query_chunk_size and max_memory: expected one"),
        ({"max_memory": 100}, r"max_memory: expected at least \d+ bytes, the need of one query, got 100"),
        ({"max_memory": "4 MB"}, "max_memory: expected a positive integer"),
        ({"impl": "fast"}, r"impl: expected 'auto' or one of \['triton', .*'reference'\], got 'fast'"),
        ({"head": torch.nn.Linear(32, 2), "return_all_layers": True}, "head: expected no head together"),
    ],
)
def test_forward_errors(network, cache, coords, options, message):
    arguments = {"cache": cache, "coords": coords, **options}
    with pytest.raises(InputError, match=message):
        network(arguments.pop("cache"), arguments.pop("coords"), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [100, True, "4 MB"])
def test_dense_memory_errors(network, cache, dtype, budget):
    low = copy.deepcopy(network).to(dtype)
    with pytest.raises(
        InputError, match=rf"max_memory: expected (at least \d+ bytes|a positive int).*, got '?{budget}'?"
    ):
        low.dense(cache.to(dtype), (9, 9), max_memory=budget)


@pytest.mark.parametrize("size", [(0, 4), (4,), 4, (4.0, 4), (True, 4)])
def test_dense_size_errors(network, cache, size):
    with pytest.raises(InputError, match=r"size: expected two positive integers \(rows, columns\), got"):
        network.dense(cache, size)


def test_cache_of_another_network(cache, coords):
    other = ViTUp(ViTUpConfig(dim=32, num_heads=2, layer_indices=(0, 1)))
    with pytest.raises(InputError, match="cache: expected 1 blocks of width 32, got 2 blocks of width 32"):
        other(cache, coords)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 36, "num_heads": 2}, "dim: expected a positive multiple of 4"),
        ({"layer_indices": (0,)}, "layer_indices: expected at least two ascending depths from 0"),
        ({"layer_indices": (1, 2)}, "layer_indices"),
        ({"layer_indices": (0, 2, 2)}, "layer_indices"),
    ],
)
def test_config_errors(sizes, message):
    with pytest.raises(InputError, match=message):
        ViTUpConfig(**{"dim": 32, "num_heads": 2, "layer_indices": (0, 1), **sizes})


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_dense_is_as_exact_as_eager_where_float32_holds_the_cells(network, image, float32_case, size):
    """On the first grid float32 rounds no cell centre, so that eager is off by rounding alone."""
    single, single_image = float32_case
    wide = copy.deepcopy(single).double()
    with torch.no_grad():
        exact = wide.dense(
            wide.prepare(*to(single_image, torch.float64), impl="reference"), size, impl="reference"
        )
        cache = single.prepare(*single_image, impl="reference")
        eager = single.dense(cache, size, impl="reference")
        assert_within_budget(single.dense(cache, size), eager, exact, factor=1.5)
