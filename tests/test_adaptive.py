"""Adaptive maps: exact where the network was asked, interpolated elsewhere, whatever bounds the pass."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import CONFIG, FAST_IMPLS, IMPLS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitup_fast import InputError
from vitup_fast.network.adaptive import Refinement
from vitup_fast.testing import poisoned_allocations, random_image

SIZE = (40, 70)  # ten cells a token
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene(network):
    """Images of a few tokens each, so that there is something between the tokens to interpolate."""
    image = random_image(
        CONFIG,
        torch.Generator().manual_seed(5),
        batch=2,
        token_grid=(4, 7),
        patch_grid=(4, 7),
        dtype=torch.float64,
    )
    with torch.no_grad():
        return network.prepare(*image)


@pytest.fixture(scope="module")
def whole(network, scene):
    with torch.no_grad():
        return network.dense(scene, SIZE)


def adapt(network, cache, size, tolerance, **options):
    """The map and its report."""
    reports = []
    with torch.no_grad():
        out = network.dense(cache, size, tolerance=tolerance, report=reports.append, **options)
    (report,) = reports
    return out, report


def equal_cells(a, b, tolerance=1e-9):
    """Which cells hold the same numbers.  # [B, H, W]"""
    return (a - b).abs().amax(-1) <= tolerance


def filled_by(function, size, token_grid, tolerance, by_margin=False, most=50):
    """A map of a function of cells, the cells that were asked for, and the error to be expected."""
    cells = size[0] * size[1]
    asked = []

    def ask(part):
        asked.append(part)
        return [function(part)]

    layer = torch.full_like(function(torch.arange(cells)), torch.nan)
    spent, error = Refinement(size, token_grid, CPU).fill([layer], ask, tolerance, by_margin, most)
    asked = torch.cat(asked)
    assert spent == len(asked) == len(asked.unique()), "a cell was asked for twice"
    assert layer.isfinite().all()
    return layer, asked, error.item()


# What is asked for is exact


@pytest.mark.parametrize("tolerance", [0.2, 0.5])
def test_asked_cells_are_those_of_the_whole_map(network, scene, whole, tolerance):
    out, report = adapt(network, scene, SIZE, tolerance)
    exact = equal_cells(out, whole).flatten(1).sum(1)
    assert report.cells == math.prod(SIZE)
    # A cell may be exact by interpolation, but hardly.
    assert [n.item() for n in exact] == list(report.queries)
    assert 0.05 < report.share < 0.9


@pytest.mark.parametrize(
    "impl", [name for name in ("reference", "torch", "cpu") if name in (*IMPLS, *FAST_IMPLS)]
)
def test_every_implementation(network, scene, impl):
    single = copy.deepcopy(network).float() if impl == "cpu" else network
    with torch.no_grad():
        cache = scene.to(single.dtype)
        size = (20, 28)
        expected = single.dense(cache, size, impl=impl)
    out, report = adapt(single, cache, size, 0.4, impl=impl)
    assert [n.item() for n in equal_cells(out, expected, 1e-5).flatten(1).sum(1)] == list(report.queries)
    assert report.share < 1


def test_compiled_kernels_give_the_same_bits(network, scene):
    if "cpu" not in FAST_IMPLS:
        pytest.skip("the C++ kernels are not built")
    single = copy.deepcopy(network).float()
    cache = scene.to(torch.float32)
    size = (40, 70)
    with torch.no_grad():
        expected = single.dense(cache, size, impl="cpu")
    out, report = adapt(single, cache, size, 0.3, impl="cpu")
    same = (out == expected).all(-1).flatten(1).sum(1)
    assert [n.item() for n in same] == list(report.queries)
    for chunk in (7, 64, 5000):
        again, other = adapt(single, cache, size, 0.3, impl="cpu", query_chunk_size=chunk)
        assert other == report
        assert torch.equal(again, out)


def test_tolerance_0_is_the_whole_map(network, scene, whole):
    out, report = adapt(network, scene, SIZE, 0)
    assert torch.equal(out, whole)
    assert report.queries == (report.cells,) * 2
    assert report.error == (0.0, 0.0)
    assert report.share == 1


def test_a_tiny_tolerance_asks_for_all(network, scene, whole):
    out, report = adapt(network, scene, SIZE, 1e-9)
    assert report.share == 1
    assert equal_cells(out, whole).all()


def test_error_and_cost_fall_and_rise_with_the_tolerance(network, scene, whole):
    errors, shares = [], []
    for tolerance in (0.05, 0.1, 0.2, 0.4, 0.8, 4):
        out, report = adapt(network, scene, SIZE, tolerance)
        errors.append((out - whole).square().mean().sqrt().item())
        shares.append(report.share)
    assert errors == sorted(errors)
    assert shares == sorted(shares, reverse=True)
    assert errors[-1] > errors[0]
    assert shares[0] > 3 * shares[-1]


def test_estimated_error_is_near_the_true_one(network, scene, whole):
    out, report = adapt(network, scene, SIZE, 0.4)
    true = ((out - whole).square().mean((1, 2, 3)) / whole.square().mean((1, 2, 3))).sqrt()
    for error, estimate in zip(true.tolist(), report.error, strict=True):
        assert estimate / 2 < error < 2 * estimate


# Where it asks


def test_a_constant_function_costs_the_coarse_lattice_alone():
    size, tokens = (161, 97), (20, 12)  # eight cells a token: lattices of 4, 2, 1
    layer, asked, error = filled_by(lambda cells: torch.ones(len(cells), 3), size, tokens, 1e-6)
    assert error == 0
    assert (layer == 1).all()
    assert sorted(asked.tolist()) == [y * 97 + x for y in range(0, 161, 4) for x in range(0, 97, 4)]


@pytest.mark.parametrize("size", [(33, 49), (31, 47), (1, 53), (37, 1), (2, 90), (3, 3), (13, 200)], ids=str)
def test_linear_functions_are_interpolated_exactly(size):
    def plane(cells):
        y, x = cells // size[1], cells % size[1]
        return torch.stack((y + 0.5 * x, 3.0 - x), dim=-1).double()

    layer, asked, error = filled_by(plane, size, (2, 2), 1e-3)
    torch.testing.assert_close(layer, plane(torch.arange(len(layer))), rtol=1e-5, atol=1e-5)
    assert error < 1e-3
    if min(size) > 8:
        assert len(asked) < 0.3 * len(layer)


def test_it_asks_where_the_function_changes():
    side = 129

    def step(cells):
        y, x = cells // side, cells % side
        return ((x - 64) ** 2 + (y - 64) ** 2 < 40**2).float()[:, None] + 1

    layer, asked, _ = filled_by(step, (side, side), (16, 16), 0.1)
    y, x = asked // side, asked % side
    off_lattice = asked[(y % 4 != 0) | (x % 4 != 0)]
    distance = (((off_lattice % side - 64.0) ** 2 + (off_lattice // side - 64.0) ** 2).sqrt() - 40).abs()
    assert distance.max() < 8
    assert len(asked) < 0.35 * side**2
    assert torch.equal(layer, step(torch.arange(side**2)))


def test_labels_are_asked_for_at_borders_of_classes():
    side = 129

    def scores(cells):
        y, x = cells // side / side, cells % side / side
        wave = 0.03 * torch.sin(12 * y)
        return torch.stack((0.4 + wave - x, torch.zeros_like(x), x - 0.7 + wave), dim=-1)

    everywhere = scores(torch.arange(side**2))
    layer, asked, lost = filled_by(scores, (side, side), (16, 16), 1.0, by_margin=True)
    assert (layer.argmax(-1) != everywhere.argmax(-1)).float().mean() < 0.005
    assert lost < 0.01
    assert len(asked) < 0.15 * side**2


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tokens=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tolerance=st.floats(1e-3, 10),
    most=st.integers(1, 100),
    by_margin=st.booleans(),
)
def test_any_size_is_filled(size, tokens, tolerance, most, by_margin):
    def noise(cells):
        return torch.sin(cells[:, None] * torch.tensor([1.1, 2.3, 0.7], dtype=torch.float64))

    layer, asked, error = filled_by(noise, size, tokens, tolerance, by_margin, most)
    assert torch.equal(layer[asked], noise(asked))
    assert math.isfinite(error)
    again, same, _ = filled_by(noise, size, tokens, tolerance, by_margin, 10_000)
    assert torch.equal(again, layer)
    assert same.sort().values.equal(asked.sort().values)


# Batches, heads, layers


def test_images_do_not_mix(network, scene, whole):
    out, report = adapt(network, scene, SIZE, 0.3)
    assert len(set(report.queries)) == 2
    for i in range(2):
        alone, own = adapt(network, scene[i : i + 1], SIZE, 0.3)
        torch.testing.assert_close(alone[0], out[i], rtol=1e-9, atol=1e-9)
        assert own.queries == report.queries[i : i + 1]


def test_no_images(network, scene):
    out, report = adapt(network, scene[:0], SIZE, 0.3)
    assert out.shape == (0, *SIZE, CONFIG.dim)
    assert report.queries == ()
    assert report.share == 0


def test_scores_of_a_head(network, scene):
    head = nn.Linear(CONFIG.dim, 3).double()
    with torch.no_grad():
        expected = network.dense(scene, SIZE, head=head)
    head.requires_grad_(False)
    out, report = adapt(network, scene, SIZE, 0.3, head=head)
    assert out.shape == (2, *SIZE, 3)
    assert [n.item() for n in equal_cells(out, expected).flatten(1).sum(1)] == list(report.queries)
    assert report.share < 1


def test_labels(network, scene):
    head = torch.randn(5, CONFIG.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None
    with torch.no_grad():
        expected = network.dense(scene, SIZE, head=head, labels=True)
    disagreements = []
    for tolerance in (1e-6, 1.0, 8.0):
        out, report = adapt(network, scene, SIZE, tolerance, head=head, labels=True)
        assert out.dtype == torch.uint8
        disagreements.append((out != expected).float().mean().item())
        if tolerance == 1:
            assert report.share < 0.8
            assert sum(report.error) / 2 / 3 < disagreements[-1] < 3 * sum(report.error) / 2
    assert disagreements[0] == 0
    assert disagreements[0] < disagreements[1] < disagreements[2] < 0.3


def test_labels_of_a_single_class(network, scene):
    head = torch.ones(1, CONFIG.dim, dtype=torch.float64), None
    out, report = adapt(network, scene, SIZE, 1.0, head=head, labels=True)
    assert (out == 0).all()
    assert report.error == (0.0, 0.0)
    assert report.share < 0.1


def test_all_layers(network, scene):
    with torch.no_grad():
        expected = network.dense(scene, SIZE, return_all_layers=True)
    out, report = adapt(network, scene, SIZE, 0.4, return_all_layers=True)
    assert len(out) == len(expected)
    for layer, exact in zip(out, expected, strict=True):
        assert equal_cells(layer, exact).flatten(1).sum(1).ge(torch.tensor(report.queries)).all()
    last, alone = adapt(network, scene, SIZE, 0.4)
    assert report.share >= alone.share
    assert not torch.equal(last, out[-1]) or report == alone


# Bounds, dtypes, states of PyTorch


@settings(max_examples=5, deadline=None)
@given(chunk=st.integers(20, 400))
def test_chunks_do_not_matter(network, scene, chunk):
    size = (16, 21)
    out, report = adapt(network, scene, size, 0.3)
    again, other = adapt(network, scene, size, 0.3, query_chunk_size=chunk)
    assert other.queries == report.queries
    torch.testing.assert_close(again, out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("labels", [False, True])
def test_memory_budget(network, scene, labels):
    options = (
        {"head": (torch.eye(4, CONFIG.dim, dtype=torch.float64), None), "labels": True} if labels else {}
    )
    out, report = adapt(network, scene, SIZE, 0.5, **options)
    for budget in (300_000, 3_000_000):
        again, other = adapt(network, scene, SIZE, 0.5, max_memory=budget, **options)
        assert other.queries == report.queries
        torch.testing.assert_close(again, out, rtol=1e-9, atol=1e-9)
    with pytest.raises(
        InputError, match=r"max_memory: expected at least \d+ bytes, the need of an adaptive map"
    ):
        adapt(network, scene, SIZE, 0.5, max_memory=50_000, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(network, scene, whole, dtype):
    low = copy.deepcopy(network).to(dtype)
    cache = scene.to(dtype)
    out, report = adapt(low, cache, SIZE, 0.4)
    assert out.dtype == dtype
    wanted, exact = adapt(network, scene, SIZE, 0.4)
    assert report.share == pytest.approx(exact.share, rel=0.05)
    error = ((out.double() - whole).square().mean() / whole.square().mean()).sqrt()
    allowed = ((wanted - whole).square().mean() / whole.square().mean()).sqrt()
    assert error < 1.1 * allowed + 4 * torch.finfo(dtype).eps


def test_autocast(network, scene):
    single = copy.deepcopy(network).float()
    cache = scene.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, report = adapt(single, cache, SIZE, 0.4)
        with torch.no_grad():
            expected = single.dense(cache, SIZE)
    assert out.dtype == torch.bfloat16
    assert 0 < report.share < 1
    assert (out.float() - expected.float()).norm() < 0.5 * expected.float().norm()


def test_inference_mode(network, scene):
    out, report = adapt(network, scene, SIZE, 0.4)
    with torch.inference_mode():
        again, other = adapt(network, scene, SIZE, 0.4)
    assert torch.equal(again, out)
    assert other == report
    assert not again.is_inference()


def test_no_memory_is_read_before_it_is_written(network, scene):
    head = torch.randn(5, CONFIG.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None
    for options in ({}, {"head": head, "labels": True}):
        out, _ = adapt(network, scene, (13, 31), 0.5, **options)
        with poisoned_allocations():
            again, _ = adapt(network, scene, (13, 31), 0.5, **options)
        assert torch.equal(again, out)


def test_progress_adds_up(network, scene):
    done: list[int] = []
    adapt(network, scene, SIZE, 0.4, progress=done.append, query_chunk_size=100)
    assert sum(done) == math.prod(SIZE)
    assert min(done) > 0
    assert len(done) > 4


def test_gradients_are_refused(network, scene):
    free = copy.deepcopy(network).requires_grad_()
    with pytest.raises(InputError, match=r"tolerance: expected no gradient to be recorded.*no_grad"):
        free.dense(scene, SIZE, tolerance=0.1)
    with torch.no_grad():
        free.dense(scene, (8, 8), tolerance=0.1)
    frozen = copy.deepcopy(network).requires_grad_(False)
    assert not frozen.dense(scene, (8, 8), tolerance=0.1).requires_grad


def test_what_is_compiled_or_transformed_is_refused(network, scene, monkeypatch):
    frozen = copy.deepcopy(network).requires_grad_(False)
    call = lambda grid: frozen.dense(dataclasses.replace(scene, patch_grid=grid), (8, 8), tolerance=0.1)  # noqa: E731
    with pytest.raises(InputError, match="nothing traced or transformed"):
        torch.func.jvp(call, (scene.patch_grid,), (scene.patch_grid,))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(InputError, match="nothing traced or transformed"):
        call(scene.patch_grid)


@pytest.mark.parametrize(
    "tolerance", [-0.1, math.nan, math.inf, True, np.True_, "0.1", torch.tensor(0.1), [0.1], 1j], ids=repr
)
def test_bad_tolerances(network, scene, tolerance):
    with pytest.raises(InputError, match="tolerance: expected None or a finite number of at least 0"):
        network.dense(scene, SIZE, tolerance=tolerance)


def test_a_report_needs_a_tolerance(network, scene):
    with pytest.raises(InputError, match="report: expected a tolerance beside it"):
        network.dense(scene, SIZE, report=print)


@pytest.mark.parametrize("tolerance", [1, np.float32(0.5), np.int64(1)])
def test_numbers_of_all_kinds(network, scene, tolerance):
    out, _ = adapt(network, scene, (8, 8), tolerance)
    assert torch.equal(out, adapt(network, scene, (8, 8), float(tolerance))[0])


def test_weights_may_change(network, scene):
    changed = copy.deepcopy(network).requires_grad_(False)
    adapt(changed, scene, SIZE, 0.4)
    changed.decoder_mlp[-1].mlp[1].bias.add_(1.0)
    out, report = adapt(changed, scene, SIZE, 0.4)
    expected = changed.dense(scene, SIZE)
    assert [n.item() for n in equal_cells(out, expected).flatten(1).sum(1)] == list(report.queries)


def test_a_network_of_another_kind_starts_alike():
    """The first lattice follows the tokens: fewer cells a token, a finer one."""
    for cells, stride in ((1, 1), (2, 1), (3, 2), (5, 2), (6, 4), (14, 8), (16, 8), (56, 32)):
        start = Refinement((8 * cells, 8 * cells), (8, 8), CPU).start[0]
        assert (start[1] - start[0]).item() == stride
        assert start[-1] == 8 * cells - 1


def test_measurement(tmp_path, capsys):
    pytest.importorskip("timm")
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from vitup_fast.bench import adaptive_maps

    pictures = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pictures.append(str(tmp_path / f"{i}.png"))
        pillow.fromarray(pixels).resize((40, 30)).save(pictures[-1])
    options = [
        "--model",
        "tiny",
        "--weights",
        "random",
        "--device",
        "cpu",
        "--size",
        "48",
        "40",
        "--classes",
        "3",
    ]
    options += [
        "--tolerances",
        "0.1",
        "0.5",
        "--label-tolerances",
        "1",
        "--plot",
        str(tmp_path / "curve.png"),
    ]
    with pytest.warns(UserWarning, match="random"):
        assert adaptive_maps.main([*pictures, *options]) == 0
    report = capsys.readouterr().out
    assert "| 0.5 |" in report
    assert "**labels, 3 classes**" in report
    times = report.partition("relative to the whole map")[2].splitlines()
    differences = [float(line.split("|")[-2]) for line in times if line.startswith(("| 0 |", "| 1 |"))]
    assert len(differences) == 2
    assert max(differences) < 1e-3  # what the network fills is what was filled from its whole map
    assert pillow.open(tmp_path / "curve.png").width > 500
