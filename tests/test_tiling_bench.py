from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiling_inputs import WINDOW, make_model, pixels, save
from vitup_fast.bench import harness, windows
from vitup_fast.bench import tiling as bench

from vitup_fast import InputError, ViTUpConfig, cli, tiling

zarr = pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(("way", "overlap"), [("blended", 0.5), ("side by side", 0)])
def test_single_pixels_are_those_of_a_whole_run(model, tmp_path, way, overlap):
    image = save(tmp_path / "image.npy", pixels(70, 85))
    out = tiling.upsample(
        image, tmp_path / "out.zarr", model, features="float16", overlap=overlap, window=WINDOW
    )
    whole = zarr.open_array(str(out.outputs["features"] / "0"))[:].transpose(1, 2, 0)
    places = np.random.default_rng(0).integers(0, (70, 85), (200, 2))
    found = bench.features_at(model, image, places, WINDOW, way)
    np.testing.assert_allclose(found, whole[places[:, 0], places[:, 1]], atol=2e-3)


class Opinions(bench.Constant):
    """Windows agree on nothing but a slope."""

    def forward(self, images, coords):
        own = (images.mean(dim=(1, 2, 3)) * 1000).frac().view(-1, 1, 1)
        return (own + coords.sum(dim=-1, keepdim=True)).expand(-1, -1, 384)


def test_seams_are_seen_where_windows_are_not_blended(tmp_path):
    image = save(tmp_path / "image.npy", pixels(150, 140))
    model = Opinions(WINDOW)
    found = {way: bench.seams(model, image, WINDOW, way, 40) for way in bench.WAYS}
    blended, cropped, beside = (s.border / s.patch for s in found.values())
    assert blended < 1.2
    assert min(cropped, beside) > 3


def test_margins_are_cropped_to_the_nearest_window():
    starts, weights = bench.joined(100, 32, "cropped margins")
    assert starts == [0, 16, 32, 48, 64, 68]
    assert bench.borders(weights, 2) == [24, 40, 56, 72, 82]
    assert (weights.sum(axis=0) == 1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux")
def test_memory_of_a_run(tmp_path):
    pytest.importorskip("tifffile")
    run = bench.memory(tmp_path, 300, "64")
    assert run.windows == 1
    assert min(run.peak, run.before) > 1 << 20
    assert not (tmp_path / "300.tif").exists()


def test_what_is_around_the_network_is_told_from_it(model, tmp_path):
    Image.fromarray(pixels(60, 70)).save(tmp_path / "photo.png")
    bench.mosaic(tmp_path / "photo.png", 100, tmp_path / "mosaic.tif")
    start = time.perf_counter()
    run = bench.overhead(
        model, tmp_path / "mosaic.tif", tmp_path, "16", features="float16", progress=False, batch=2
    )
    seconds = time.perf_counter() - start
    assert run.windows == 36
    assert 0 < run.network < seconds
    assert 0 < run.around < seconds - run.network + 1e-3
    assert run.bytes > 7 * 7 * 64
    assert "forward" not in vars(model)


def test_windows_from_bytes_to_scores_agree():
    tiny, cpu = ViTUpConfig.preset("tiny"), torch.device("cpu")
    impls = harness.check_implementations(None, cpu)
    for dtype in (torch.float32, torch.bfloat16):
        case = windows.windows_case(tiny, 2, 8, cpu, dtype, impls=impls, compiled=False)
        rows = harness.judge_all(case, {"eager": case.eager, **case.providers})
        assert {row.provider: row.failure for row in rows} == dict.fromkeys(["eager", *impls])
        assert case.eager().shape == (2, 64, 8)
    with pytest.raises(InputError, match="--stride"):
        windows.windows_case(tiny, 1, 7, cpu, torch.float32)
    with pytest.raises(InputError, match="--backward"):
        windows.main(["--backward"])


def test_windows_are_a_workload_of_bench(monkeypatch, capsys):
    monkeypatch.setattr(
        harness,
        "peak_probes",
        lambda *_: {
            "F.linear": (lambda: None, harness.Work(1)),
            "memory copy": (lambda: None, harness.Work(0, 1)),
        },
    )
    arguments = [
        "--preset",
        "tiny",
        "--batch",
        "2",
        "--stride",
        "16",
        "--dtype",
        "float32",
        "--quick",
        "--no-compile",
    ]
    assert cli.main(["bench", "windows", *arguments, "--impl", "torch"]) == 0
    assert "2 windows of 64 pixels to 8 scores every 16 pixels, float32" in capsys.readouterr().out
    assert cli.main(["bench", "windows", *arguments, "--batch", "0"]) == cli.USER_ERROR
    assert "--batch" in capsys.readouterr().err
