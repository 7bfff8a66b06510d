"""Adaptive windows: cells that are computed are those of the whole run, and the others are near them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiling_inputs import DIM, WINDOW, make_head, make_model, pixels, save

from vitup_fast import InputError, cli, tiling
from vitup_fast.tiling import plan, work

zarr = pytest.importorskip("zarr")
ASKED = {
    "scores": {"scores": True, "head": make_head()},
    "features": {
        "features": "int8",
        "similar": torch.randn(2, DIM, generator=torch.Generator().manual_seed(1)),
    },
    "several": {"labels": True, "scores": True, "pca": 3, "head": make_head()},
}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def start(tmp_path, model, monkeypatch):
    """A run of small blocks; its answers in float64, and its summary."""
    monkeypatch.setattr(plan, "BLOCK_STEPS", 2)
    runs = iter(range(1000))

    def start(size, output=None, **options):
        path = tmp_path / f"{size}.npy"
        if not path.exists():
            save(path, pixels(*size))
        output = tmp_path / (output or f"run {next(runs)}")
        summary = tiling.upsample(path, output, model, **{"window": WINDOW} | options)
        found = {n: zarr.open_array(str(p / "0"))[:].astype(np.float64) for n, p in summary.outputs.items()}
        if "features" in found:
            found["features"] *= zarr.open_array(str(summary.outputs["features"] / "scale"))[:]
        return found, summary

    return start


def relative_error(found, expected):
    return np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())


@pytest.mark.parametrize(("size", "batch"), [((64, 96), 1), ((75, 90), 3), ((20, 70), 2)], ids=str)
@pytest.mark.parametrize("asked", ASKED)
def test_near_the_whole_run_for_fewer_queries(start, asked, size, batch):
    expected, _ = start(size, **ASKED[asked])
    found, summary = start(size, tolerance=0.3, batch=batch, **ASKED[asked])
    (error,) = summary.spent.error
    assert summary.spent.share < 0.5
    assert 0 < error < 0.3
    for name in found.keys() - {"labels", "pca"}:
        # Windows are blended, which averages their errors.
        assert 0 < relative_error(found[name], expected[name]) < 1.5 * error
    if "pca" in found:
        assert np.abs(found["pca"] - expected["pca"]).mean() < 10
        assert (found["labels"] != expected["labels"]).mean() < 0.1


@pytest.mark.parametrize("stride", [1, "3/4"])
def test_what_is_computed_is_exact(start, stride):
    """Of windows side by side, as many cells are those of the whole run as were asked for."""
    expected, _ = start((64, 96), overlap=0, stride=stride, **ASKED["scores"])
    found, summary = start((64, 96), overlap=0, stride=stride, tolerance=0.3, **ASKED["scores"])
    distance = np.abs(found["scores"] - expected["scores"]).max(0)
    assert (distance < 1e-5 * np.abs(expected["scores"]).max()).sum() == sum(summary.spent.queries)
    assert summary.spent.cells == distance.size


def test_tolerance_0_computes_all(start):
    expected, whole = start((75, 90), **ASKED["several"])
    found, summary = start((75, 90), tolerance=0, **ASKED["several"])
    assert whole.spent is None
    assert summary.spent.share == 1
    assert summary.spent.error == (0.0,)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_labels_alone_are_asked_for_where_classes_meet(start):
    labels = {"labels": True, "head": make_head()}
    expected, _ = start((75, 90), **labels)
    wrong = []
    for tolerance in (1e-6, 1.0, 6.0):
        found, summary = start((75, 90), tolerance=tolerance, **labels)
        wrong.append((found["labels"] != expected["labels"]).mean())
        if tolerance == 1:
            assert summary.spent.share < 0.5
            assert wrong[-1] < 3 * summary.spent.error[0]
    assert wrong[0] == 0 < wrong[2] < 0.2
    assert wrong[1] < 0.02


def test_borders_of_windows_show_no_more(start):
    """A border is seen by one window alone, while elsewhere errors are averaged; changes across it are as elsewhere."""
    size = (75, 170)
    expected, _ = start(size, **ASKED["scores"])
    found, _ = start(size, tolerance=0.3, **ASKED["scores"])
    starts = [*range(0, size[1] - WINDOW, WINDOW // 2), size[1] - WINDOW]
    edges = [b for s in starts for b in (s, s + WINDOW) if 0 < b < size[1]]
    at = np.zeros(size[1] - 1, bool)
    at[[b - 1 for b in edges]] = True
    error = np.abs(found["scores"] - expected["scores"]).mean((0, 1))
    beside = at | np.r_[False, at[:-1]]
    assert error[:-1][beside].mean() < 2**0.5 * error[:-1][~beside].mean()
    changes, usual = (np.abs(np.diff(run["scores"], axis=2)).mean((0, 1)) for run in (found, expected))
    assert changes[at].mean() / usual[at].mean() < 1.1 * changes[~at].mean() / usual[~at].mean()


def test_interrupted_it_ends_with_the_same_numbers(start, tmp_path, monkeypatch):
    options = {"tolerance": 0.3, **ASKED["several"]}
    expected, whole = start((75, 90), **options)

    class Stop(BaseException):
        pass

    calls, function = iter(range(1000)), work.Worker._write

    def stops(*arguments):
        if next(calls) == 3:
            raise Stop
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work.Worker, "_write", stops)
        with pytest.raises(Stop):
            start((75, 90), "out", **options)
    assert 0 < len(list((tmp_path / "out" / "parts").iterdir())) < 12
    found, summary = start((75, 90), "out", **options)
    assert summary.spent == whole.spent
    assert 0 < summary.windows < whole.windows
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    _, again = start((75, 90), "out", **options)
    assert again.spent == whole.spent
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert facts["spent"]["queries"] == list(whole.spent.queries)
    assert (facts["windows"], facts["background windows"]) == (whole.windows, 0)


def test_another_tolerance_is_refused_by_name(start):
    start((40, 40), "out", tolerance=0.5, stride=2, **ASKED["scores"])
    with pytest.raises(InputError, match=r"tolerance 0.5, now 0.25"):
        start((40, 40), "out", tolerance=0.25, stride=2, **ASKED["scores"])
    with pytest.raises(InputError, match=r"tolerance 0.5, now None"):
        start((40, 40), "out", stride=2, **ASKED["scores"])
    with pytest.raises(InputError, match="tolerance: expected None or a finite number"):
        start((40, 40), "other", tolerance=-1, **ASKED["scores"])


def test_command_line(tmp_path, capsys):
    image = save(tmp_path / "image.npy", pixels(40, 50))
    np.savez(tmp_path / "head.npz", weight=make_head()[0].numpy())
    (tmp_path / "points.csv").write_text("x,y\n3,4\n")

    def run(*arguments):
        options = ("--model", "tiny", "--weights", "random", "--device", "cpu", "--tolerance", 1)
        size = ("--hidden-layer-img-size", WINDOW, WINDOW)
        return cli.main([str(a) for a in ("giga", image, "-o", *arguments, *options, *size)])

    labels = (tmp_path / "labels.zarr", "--labels", "--head", tmp_path / "head.npz")
    assert run(*labels, "--dry-run") == 0
    assert "less what the tolerance saves, which only the image decides" in capsys.readouterr().out
    assert run(*labels) == 0
    shown = capsys.readouterr()
    assert "% of the 6,144 cells of all windows computed, the rest interpolated" in shown.out
    assert "6/6" in shown.err
    assert run(tmp_path / "points.csv", "--points", tmp_path / "points.csv") == cli.USER_ERROR
    assert "--points: expected no --tolerance beside it" in capsys.readouterr().err


def test_lattices_are_in_the_budget(start):
    estimates = []

    class Told(Exception):
        pass

    def announce(estimate):
        estimates.append(estimate)
        raise Told

    for tolerance in (None, 0, 0.3):
        with pytest.raises(Told):
            start((75, 90), tolerance=tolerance, announce=announce, **ASKED["features"])
    assert estimates[0].memory == estimates[1].memory
    assert estimates[2].memory > estimates[0].memory + 24 * WINDOW**2
    with pytest.raises(InputError, match="--max-memory: expected at least"):
        start((75, 90), tolerance=0.3, max_memory=1000, **ASKED["features"])
