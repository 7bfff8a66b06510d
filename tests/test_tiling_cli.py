from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiling_inputs import DIM, WINDOW, make_head, pixels, save

from vitup_fast import cli
from vitup_fast.tiling import work

zarr = pytest.importorskip("zarr")
MODEL = [
    "--model",
    "tiny",
    "--weights",
    "random",
    "--device",
    "cpu",
    "--hidden-layer-img-size",
    WINDOW,
    WINDOW,
]


def run(*arguments):
    return cli.main([str(a) for a in ("giga", *arguments, *MODEL)])


@pytest.fixture
def image(tmp_path):
    return save(tmp_path / "image.npy", pixels(70, 80))


@pytest.fixture
def head(tmp_path):
    weight, bias = make_head()
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


def test_estimate_results_and_resumption(image, head, tmp_path, capsys):
    arguments = (image, "-o", tmp_path / "out", "--head", head, "--labels", "--pca", 3, "--stride", 8)
    assert run(*arguments, "--dry-run") == 0
    assert "16 windows at most" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--shard", "1/2") == 0
    assert "0 windows computed; 1 parts are left" in capsys.readouterr().out
    assert run(*arguments) == 0
    shown = capsys.readouterr()
    assert "labels -> " in shown.out
    assert "16/16" in shown.err
    assert zarr.open_array(str(tmp_path / "out" / "labels.ome.zarr" / "0")).shape == (9, 10)
    assert run(*arguments) == 0
    assert "16/16" not in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(image, head, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(work.Worker, "_blend", interrupted)
    out = tmp_path / "out.zarr"
    assert run(image, "-o", out, "--head", head, "--labels", "--stride", 8) == cli.INTERRUPTED
    error = capsys.readouterr().err
    assert f"the same command goes on from {out}" in error
    assert "Traceback" not in error


def test_points(image, tmp_path, capsys):
    (tmp_path / "points.csv").write_text("x,y\n3,4\n50,60.5\n")
    out = tmp_path / "features.safetensors"
    points = ("--points", tmp_path / "points.csv")
    assert run(image, "-o", out, *points, "--mask", "otsu") == cli.USER_ERROR
    assert "--mask" in capsys.readouterr().err
    assert run(image, "-o", out, *points, "--pca", 3) == cli.USER_ERROR
    assert "pca.safetensors of an earlier run" in capsys.readouterr().err
    assert run(image, "-o", out, "--points", tmp_path / "points.csv") == 0
    assert "points -> " in capsys.readouterr().out


def test_broken_tiles_are_listed_with_exit_code_3(head, tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels(70, 80), photometric="rgb", tile=(32, 32), compression="zlib")
    path.write_bytes(path.read_bytes()[:-20])
    arguments = (path, "-o", tmp_path / "out.zarr", "--head", head, "--labels", "--stride", 8)
    assert run(*arguments) == cli.SOME_FAILED
    error = capsys.readouterr().err
    assert "1 tiles could not be decoded" in error
    assert "image.tif: level 0, tile at row 64, column 64" in error
    assert run(path, "-o", tmp_path / "b.zarr", "--head", head, "--labels", "--stride", 8, "--strict") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "at least one of labels"),
        (("--labels",), "--head"),
        (("--pca", "3", "--shard", "3"), "--shard"),
        (("--pca", "3", "--max-memory", "much"), "--max-memory"),
        (("--pca", "none.safetensors"), "none.safetensors"),
        (("--pca", "3", "--level", "1", "--mpp", "1"), "--level"),
        (("--pca", "3", "--bands", "1", "2"), "--bands"),
        (("--pca", "3", "--mask", "none.png"), "none.png"),
    ],
)
def test_mistakes_are_one_sentence(image, tmp_path, capsys, arguments, message):
    assert run(image, "-o", tmp_path / "out", *arguments) == cli.USER_ERROR
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vitup-fast: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_labels_job_writes_little(image, tmp_path):
    weight = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "head.npz", weight=weight.numpy())
    sizes = {}
    for name, asked in (
        ("labels", ("--labels", "--head", tmp_path / "head.npz")),
        ("features", ("--features", "float16")),
    ):
        assert run(image, "-o", tmp_path / f"{name}.zarr", "--stride", 1, *asked) == 0
        files = (tmp_path / f"{name}.zarr" / "0").rglob("*")
        sizes[name] = sum(f.stat().st_size for f in files if f.is_file())
    # Compressed: 2 x 384 bytes of features are 64 numbers here.
    assert sizes["labels"] * 300 / (384 / DIM) < sizes["features"]
