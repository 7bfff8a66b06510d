from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vitup_fast
from vitup_fast import cli
from vitup_fast.images import feature_picture, principal_colours, read_image, write_atomically
from vitup_fast.upsampler import Upsampler

RANDOM = ["--model", "tiny", "--weights", "random", "--device", "cpu"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(1).integers(0, 256, (36, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def one_sentence(capsys) -> str:
    """The error on the last line of stderr, which is never a traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_upsample_writes_features_and_picture(photo, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run("upsample", photo, "-o", out, "--size", 9, 13, "--pca", *RANDOM) == 0
    features = np.load(out / "photo.npy")
    with pytest.warns(UserWarning, match="random"):
        model = vitup_fast.load("tiny", "random", device="cpu")
    np.testing.assert_allclose(features, model.dense(read_image(photo), (9, 13))[0], rtol=1e-5, atol=1e-5)
    with Image.open(out / "photo_pca.png") as picture:
        assert picture.width > 4 * 52
        assert len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) > 100
    assert sorted(p.name for p in out.iterdir()) == ["photo.npy", "photo_pca.png"]
    captured = capsys.readouterr()
    assert "9 x 13 x 64" in captured.out
    assert "117/117" in captured.err  # progress


def test_upsample_safetensors_in_bfloat16_at_full_size(photo, tmp_path):
    arguments = ("--save", "safetensors", "--dtype", "bfloat16", "--hidden-size", 48, 64)
    assert run("upsample", photo, "-o", tmp_path, *arguments, *RANDOM) == 0
    features = load_file(tmp_path / "photo.safetensors")["features"]
    assert features.shape == (36, 52, 64)
    assert features.dtype == torch.bfloat16
    assert torch.isfinite(features).all()


def test_upsample_several_and_skip_existing(photo, tmp_path, capsys):
    other = tmp_path / "other.png"
    Image.new("L", (20, 30), 90).save(other)
    out = tmp_path / "out"
    out.mkdir()
    (out / "writable").write_text("the user's own")
    arguments = ("upsample", photo, other, "-o", out, "--size", 3, 4, *RANDOM)
    assert run(*arguments) == 0
    before = (out / "other.npy").stat().st_mtime_ns
    (out / "photo.npy").unlink()
    assert run(*arguments, "--skip-existing") == 0
    assert (out / "photo.npy").exists()
    assert (out / "other.npy").stat().st_mtime_ns == before
    assert "done before" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["other.npy", "photo.npy", "writable"]
    assert (out / "writable").read_text() == "the user's own"


def test_unreachable_weights(photo, tmp_path, monkeypatch, capsys):
    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    arguments = (
        "upsample",
        photo,
        "-o",
        tmp_path / "out",
        "--size",
        2,
        2,
        "--model",
        "tiny",
        "--device",
        "cpu",
    )
    assert run(*arguments) == cli.USER_ERROR
    assert "no network" in one_sentence(capsys)
    assert run(*arguments, "--or-random") == 0
    assert "random weights" in capsys.readouterr().err


def bomb(path):
    """A PNG that claims 60 000 x 60 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    return path


def test_wrong_images(photo, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no image")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    cases = {
        tmp_path / "missing.png": "no such file",
        text: "cannot be read as an image",
        truncated: "cannot be read as an image",
        bomb(tmp_path / "bomb.png"): "expected at most 100,000,000 pixels",
        tmp_path: "cannot be read as an image",
    }
    for path, message in cases.items():
        assert run("upsample", path, "-o", tmp_path / "out", *RANDOM) == cli.USER_ERROR
        assert message in one_sentence(capsys)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0", "3"], "size: expected two positive integers"),
        (["--size", "x", "3"], "invalid int value"),
        (["--hidden-size", "50", "64"], "multiples of the patch size 16"),
        (["--weights", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--model", "giant"], "invalid choice: 'giant'"),
        (["--device", "abacus"], "device: expected a torch device"),
        (["--save", "jpeg"], "invalid choice: 'jpeg'"),
        (["--backbone", "gone.safetensors"], "gone.safetensors: no such file"),
    ],
)
def test_wrong_arguments(photo, tmp_path, capsys, arguments, message):
    try:
        code = run("upsample", photo, "-o", tmp_path / "out", *RANDOM, *arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == cli.USER_ERROR
    assert message in one_sentence(capsys)


def test_wrong_checkpoints(photo, tmp_path, capsys):
    empty, broken = tmp_path / "empty.safetensors", tmp_path / "broken.safetensors"
    empty.touch()
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for path in (empty, broken):
        code = run("upsample", photo, "-o", tmp_path / "out", "--model", "tiny", "--weights", path)
        assert code == cli.USER_ERROR
        assert str(path) in one_sentence(capsys)


def test_unwritable_output(photo, tmp_path, capsys):
    assert run("upsample", photo, "-o", photo, *RANDOM) == cli.USER_ERROR
    assert f"{photo}: cannot be made a folder" in one_sentence(capsys)
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / photo.name).write_bytes(photo.read_bytes())
    assert run("upsample", photo, twin / photo.name, "-o", tmp_path / "out", *RANDOM) == cli.USER_ERROR
    assert "files of different names" in one_sentence(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(photo, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert run("upsample", photo, "-o", locked, *RANDOM) == cli.USER_ERROR
    assert "cannot be written" in one_sentence(capsys)


def test_interrupt_leaves_no_half_written_file(photo, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupt)
    assert run("upsample", photo, "-o", tmp_path / "out", "--size", 2, 2, *RANDOM) == cli.INTERRUPTED
    assert list((tmp_path / "out").iterdir()) == []
    assert "interrupted" in one_sentence(capsys)


def test_failed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "features.npy"
    target.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(vitup_fast.InputError, match=r"features\.npy: cannot be written \(No space left"):
        write_atomically(target, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["features.npy"]
    assert target.read_text() == "old"


def test_out_of_order_subcommands(capsys):
    for arguments in ([], ["paint"], ["upsample"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == cli.USER_ERROR
        assert one_sentence(capsys).startswith("vitup-fast")


def test_info_names_versions_and_implementations(capsys):
    assert run("info") == 0
    text = capsys.readouterr().out
    for word in (vitup_fast.__version__, torch.__version__.split("+")[0], "cpu", "torch", "reference", "yes"):
        assert word in text


def test_tune_is_reached(capsys):
    pytest.importorskip("triton")
    with pytest.raises(SystemExit, match="0"):
        run("tune", "--help")
    assert "vitup-fast tune" in capsys.readouterr().out
    assert run("tune", "--device", "abacus") == cli.USER_ERROR


def test_bench_is_reached(capsys):
    with pytest.raises(SystemExit) as stop:
        run("bench", "--help")
    assert stop.value.code == 0
    assert "vitup-fast bench" in capsys.readouterr().out
    assert run("bench", "--device", "abacus") == cli.USER_ERROR
    assert "abacus" in one_sentence(capsys)


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "vitup_fast.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert vitup_fast.__version__ in done.stdout


def test_colours_are_reproducible_and_shared():
    features = torch.randn(500, 16, generator=torch.Generator().manual_seed(2))
    first, second = principal_colours(features), principal_colours(features.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, components, low, high = first
    torch.testing.assert_close(components.T @ components, torch.eye(3, dtype=torch.float64))
    assert (low < high).all()
    few = principal_colours(torch.randn(2, 16))  # fewer samples than components
    assert few[1].shape == (16, 3)
    picture = feature_picture(
        Image.new("RGB", (30, 20)), features[:6].view(2, 3, 16), features[:60].view(6, 10, 16)
    )
    assert picture.size[1] > 160


def test_progress_reaches_the_end_for_uneven_chunks(photo, monkeypatch):
    with pytest.warns(UserWarning, match="random"):
        model: Upsampler = vitup_fast.load("tiny", "random", device="cpu", query_chunk_size=7)
    done: list[int] = []
    model.dense(read_image(photo), (5, 11), progress=done.append)
    assert sum(done) == 55
    assert max(done) <= 7
