from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vitup_fast
from vitup_fast import cli
from vitup_fast.cli import outputs, upsample
from vitup_fast.files import digest_tensors
from vitup_fast.images import read_image, write_atomically
from vitup_fast.upsampler import Upsampler

RANDOM = ["--model", "tiny", "--weights", "random", "--device", "cpu"]
SMALL = ["--size", "3", "4", *RANDOM]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(1).integers(0, 256, (36, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def draw(path: Path, seed: int = 1) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


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
    assert names(out) == ["photo.npy", "photo.vitup.json", "photo_pca.png"]
    captured = capsys.readouterr()
    assert "9 x 13 x 64" in captured.out
    assert "117/117" in captured.err  # progress


def test_upsample_safetensors_in_bfloat16_at_full_size(photo, tmp_path):
    arguments = ("--save", "safetensors", "--dtype", "bfloat16", "--hidden-layer-img-size", 48, 64)
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
    assert [n for n in names(out) if not n.endswith(".json")] == ["other.npy", "photo.npy", "writable"]
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


def test_models_of_files_and_of_timm(photo, tmp_path, capsys):
    with pytest.warns(UserWarning, match="random"):
        model = vitup_fast.load("tiny", "random", device="cpu", hidden_layer_img_size=(48, 80))
    model.save_pretrained(tmp_path / "net")
    arguments = ["upsample", photo, "-o", tmp_path / "out", "--size", 3, 4, "--device", "cpu"]
    assert run(*arguments, "--model", tmp_path / "net") == 0
    want = model.dense(read_image(photo), (3, 4))[0]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "photo.npy"), want, rtol=1e-5, atol=1e-5)
    assert run(*arguments, "--model", "vit_tiny_patch16_224", "--weights", "random") == 0
    assert np.load(tmp_path / "out" / "photo.npy").shape == (3, 4, 192)
    capsys.readouterr()
    assert run(*arguments, "--model", tmp_path) == cli.USER_ERROR
    assert "the folder holds no model.safetensors" in one_sentence(capsys)
    assert run(*arguments, "--model", "vit_tiny_patch16_224") == cli.USER_ERROR
    assert "weights: expected a file for vit_tiny_patch16_224" in one_sentence(capsys)


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
        tmp_path / "out": "expected a folder with pictures in it",
        Path(os.devnull): "expected an image file",
    }
    (tmp_path / "out").mkdir()
    for path, message in cases.items():
        assert run("upsample", path, "-o", tmp_path / "out", *RANDOM) == cli.USER_ERROR
        assert message in one_sentence(capsys)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0", "3"], "size: expected two positive integers"),
        (["--size", "x", "3"], "invalid int value"),
        (["--hidden-layer-img-size", "50", "64"], "multiples of the patch size 16"),
        (["--hidden-size", "50", "64"], "multiples of the patch size 16"),  # its name in earlier versions
        (["--weights", "gone.safetensors"], "gone.safetensors: no such file"),
        (["--model", "giant"], "model: expected one of"),
        (["--device", "abacus"], "device: expected a torch device"),
        (["--save", "jpeg"], "invalid choice: 'jpeg'"),
        (["--backbone-weights", "gone.safetensors"], "gone.safetensors: no such file"),
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
    assert names(tmp_path / "out") == []
    assert "interrupted" in one_sentence(capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_finished_files(tmp_path, monkeypatch, capsys, number):
    images = [draw(tmp_path / name) for name in ("a.png", "b.png")]
    before = signal.getsignal(number)
    compute = upsample._compute

    def interrupted(target, *arguments):
        if target.image.name == "b.png":
            signal.raise_signal(number)
        return compute(target, *arguments)

    monkeypatch.setattr(upsample, "_compute", interrupted)
    assert run("upsample", *images, "-o", tmp_path / "out", *SMALL) == 128 + number
    assert names(tmp_path / "out") == ["a.npy", "a.vitup.json"]
    assert np.load(tmp_path / "out" / "a.npy").shape == (3, 4, 64)
    assert "interrupted" in one_sentence(capsys)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_importing(tmp_path, number):
    # PyTorch's import loses exceptions now and then; this one always does.
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\nwhile True:\n"
        "    try:\n        time.sleep(60)\n    except BaseException:\n        pass\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(vitup_fast.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, vitup_fast_start; sys.exit(vitup_fast_start.main())"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == "vitup-fast: interrupted.\n"


@pytest.mark.parametrize(
    "way", ["name", "spelling", "symbolic link", "hard link", "linked folder", "features", "case"]
)
def test_results_never_replace_an_image(tmp_path, monkeypatch, capsys, way):
    image, victim = draw(tmp_path / "a.png"), draw(tmp_path / "a_pca.png", 2)
    out = Path(".")
    monkeypatch.chdir(tmp_path)
    if way == "spelling":
        victim, out = Path("..", tmp_path.name, ".", "a_pca.png"), tmp_path
    elif way in ("symbolic link", "hard link"):
        out = tmp_path / "out"
        out.mkdir()
        (os.symlink if way == "symbolic link" else os.link)(victim, out / "a_pca.png")
    elif way == "linked folder":
        out = tmp_path / "out"
        out.symlink_to(tmp_path)
    elif way == "features":
        victim = draw(tmp_path / "a.tif").rename("a.npy")
    elif way == "case":
        victim = victim.rename(tmp_path / "A_PCA.png")
        monkeypatch.setattr(outputs, "_identity", lambda path: path.name.casefold())
    content = victim.read_bytes()
    assert run("upsample", image, victim, "-o", out, "--pca", *SMALL) == cli.USER_ERROR
    message = one_sentence(capsys)
    assert (
        "--output: expected a folder where results replace no image" in message
        or "different names" in message
    )
    assert victim.read_bytes() == content
    assert not Path("a_pca.npy").exists()


def test_results_of_two_images_never_meet(tmp_path, capsys):
    first, second = draw(tmp_path / "a.png"), draw(tmp_path / "a.bmp")
    assert run("upsample", first, second, "-o", tmp_path / "out", *SMALL) == cli.USER_ERROR
    assert "files of different names" in one_sentence(capsys)
    upper, composed, apart = tmp_path / "A.png", tmp_path / "e\u0301.png", tmp_path / "\u00e9.png"
    for pair in ((first, upper), (composed, apart)):
        assert len(outputs.name_targets(pair, tmp_path / "out", "npy", True, False)) == 2
        with pytest.raises(vitup_fast.InputError, match="files of different names"):
            outputs.name_targets(pair, tmp_path / "out", "npy", True, True)


def test_an_image_given_twice_counts_once(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert run("upsample", "a.png", "./a.png", tmp_path / "a.png", tmp_path, "-o", "out", *SMALL) == 0
    assert capsys.readouterr().out.count("->") == 1


def test_folders_stand_for_their_pictures(tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "inside.png").mkdir(parents=True)
    draw(folder / "inside.png" / "left alone.png")
    for name in ("b.png", "a.JPG", ".hidden.png"):
        draw(folder / name)
    for name in ("notes.txt", "labels.json", "data.h5"):
        (folder / name).write_text("no picture")
    assert run("upsample", folder, "-o", folder, "--pca", *SMALL) == 0
    assert [p.name for p in outputs.find_images([folder])] == ["a.JPG", "b.png"]  # and not what was drawn
    assert run("upsample", folder, "-o", folder, "--pca", "--skip-existing", *SMALL) == 0
    assert capsys.readouterr().out.count("done before") == 2


def test_images_that_fail_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    good = [draw(tmp_path / name) for name in ("a.png", "gone.png", "z.png")]
    text = tmp_path / "text.png"
    text.write_text("no image")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(good[0].read_bytes()[:200])
    load = upsample.load_model

    def load_and_lose(args):
        good[1].unlink()
        return load(args)

    monkeypatch.setattr(upsample, "load_model", load_and_lose)
    code = run("upsample", text, *good, truncated, tmp_path / "missing.png", "-o", tmp_path / "out", *SMALL)
    assert code == cli.SOME_FAILED == 3
    error = capsys.readouterr().err
    assert "Traceback" not in error
    summary = error[error.index("4 of 6 images failed:") :]
    for name in ("text.png", "gone.png", "truncated.png", "missing.png"):
        assert f"{name}: cannot be read" in summary
    assert names(tmp_path / "out") == ["a.npy", "a.vitup.json", "z.npy", "z.vitup.json"]
    assert run("upsample", text, truncated, "-o", tmp_path / "out", *SMALL) == cli.USER_ERROR


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
    ],
)
def test_too_little_memory_for_one_image(tmp_path, monkeypatch, capsys, error):
    dense = Upsampler.dense

    def lacking(self, image, size, **options):
        if image.width == 12:
            raise error
        return dense(self, image, size, **options)

    monkeypatch.setattr(Upsampler, "dense", lacking)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    images = [draw(tmp_path / "large.png"), tmp_path / "small.png"]
    assert run("upsample", *images, "-o", tmp_path / "out", *SMALL) == cli.SOME_FAILED
    assert "large.png: expected enough memory" in one_sentence(capsys)
    assert "small.npy" in names(tmp_path / "out")


def test_features_that_are_not_finite_are_no_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Upsampler, "dense", lambda *_, **__: torch.full((1, 3, 4, 64), torch.nan))
    assert run("upsample", draw(tmp_path / "a.png"), "-o", tmp_path / "out", *SMALL) == cli.USER_ERROR
    assert "finite features" in one_sentence(capsys)
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("size", [(100_000, 100_000), (10**20, 3), (1, 10**13)])
def test_maps_larger_than_memory_are_refused_at_once(tmp_path, monkeypatch, capsys, size, kind):
    monkeypatch.setattr(upsample, "load_model", None)
    arguments = ("-o", tmp_path / "out", "--save", kind, *RANDOM, "--size", *size)
    assert run("upsample", draw(tmp_path / "a.png"), *arguments) == cli.USER_ERROR
    assert "--size: expected features that fit into" in one_sentence(capsys)


def test_an_image_larger_than_memory_fails_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(upsample, "available_memory", lambda: 64 * 4 * 8 * 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    images = [draw(tmp_path / "large.png"), tmp_path / "small.png"]
    assert (
        run("upsample", *images, "-o", tmp_path / "out", *RANDOM) == cli.USER_ERROR
    )  # the patch grid is too large
    assert "--hidden-layer-img-size: expected features that fit" in one_sentence(capsys)
    monkeypatch.setattr(upsample, "available_memory", lambda: 64 * 4 * 32 * 32)
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    assert run("upsample", *images, "-o", tmp_path / "out", *RANDOM) == cli.SOME_FAILED
    assert "large.png: expected features that fit" in one_sentence(capsys)


def test_a_disk_too_small_is_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    images = [draw(tmp_path / name) for name in ("a.png", "b.png")]
    needed = 3 * 4 * 64 * 4
    arguments = ("upsample", *images, "-o", tmp_path / "out", *SMALL)

    def with_free(count: int) -> int:
        usage = shutil.disk_usage(tmp_path)._replace(free=count)
        with monkeypatch.context() as patch:
            patch.setattr(outputs.shutil, "disk_usage", lambda _: usage)
            return run(*arguments)

    monkeypatch.setattr(upsample, "load_model", None)
    assert with_free(2 * needed - 1) == cli.USER_ERROR
    assert "of free space" in one_sentence(capsys)
    monkeypatch.undo()
    assert with_free(2 * needed) == 0
    assert with_free(needed) == 0  # what is replaced gives its space back, though only afterwards
    assert with_free(needed - 200) == cli.USER_ERROR


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
@pytest.mark.parametrize("kind", ["npy", "safetensors", "png"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, capsys, kind):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"
    save = upsample._save

    def fill(path, result):
        if path.suffix == f".{kind}":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        save(path, result)

    monkeypatch.setattr(upsample, "_save", fill)
    images = [draw(tmp_path / name) for name in ("a.png", "b.png")]
    arguments = ["--save", "npy", "--pca"] if kind == "png" else ["--save", kind]
    try:
        code = run("upsample", *images, "-o", out, *arguments, *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == cli.USER_ERROR
    assert (
        "a_pca.png: cannot be written"
        if kind == "png"
        else f"a.{kind}: cannot be written" in one_sentence(capsys)
    )
    assert names(out) == (["a.npy"] if kind == "png" else [])


def test_skip_existing_takes_nothing_made_otherwise(tmp_path, capsys):
    image, out = draw(tmp_path / "a.png"), tmp_path / "out"
    arguments = ["upsample", image, "-o", out, "--skip-existing", *RANDOM, "--size", 3]

    def done(*more: object) -> bool:
        """Whether the image was skipped."""
        capsys.readouterr()
        assert run(*arguments, *more) == 0
        return "done before" in capsys.readouterr().out

    assert not done(4)
    assert not done(5)
    assert not done(4)
    assert not done(4, "--dtype", "bfloat16")
    assert not done(4, "--hidden-layer-img-size", 64, 96)
    assert not done(4, "--save", "safetensors")
    assert done(4, "--hidden-layer-img-size", 64, 96)  # its own file, still there
    assert not done(4)
    assert not done(4, "--pca")
    assert done(4)
    (out / "a_pca.png").unlink()
    assert done(4)
    assert not done(4, "--pca")
    draw(image, 2)
    assert not done(4)
    os.utime(image)
    assert done(4)
    with (out / "a.npy").open("ab") as file:
        file.truncate(1000)
    assert not done(4)
    assert done(4)
    for record in ("[]", '{"a.npy": 3}', "\0", "[" * 100_000):
        (out / "a.vitup.json").write_text(record)
        assert not done(4)


def test_skip_existing_compares_weights(tmp_path):
    with pytest.warns(UserWarning, match="random"):
        model = vitup_fast.load("tiny", "random", device="cpu")
    before = digest_tensors(model.state_dict().items())
    assert digest_tensors(model.state_dict().items()) == before
    for tensor in list(model.state_dict().values())[::7]:
        value = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] += 1
        assert digest_tensors(model.state_dict().items()) != before
        tensor.view(-1)[-1] = value
    assert digest_tensors(model.state_dict().items()) == before


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path, monkeypatch, capsys):
    image, out = draw(tmp_path / "a.png"), tmp_path / "out"
    arguments = ("upsample", image, "-o", out, "--pca", "--skip-existing", *RANDOM, "--size", 3)
    assert run(*arguments, 4) == 0

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupt)
        assert run(*arguments, 5) == cli.INTERRUPTED
    assert json.loads((out / "a.vitup.json").read_text()) == {}
    capsys.readouterr()
    assert run(*arguments, 4) == 0
    assert "done before" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Linux and macOS")
@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("length", [1, 200, 240, 243])
def test_long_names(tmp_path, capsys, length, kind):
    image, out = draw(tmp_path / f"{'n' * length}.png"), tmp_path / "out"
    arguments = ("upsample", image, "-o", out, "--pca", "--save", kind, "--skip-existing", *SMALL)
    assert run(*arguments) == 0
    assert {f"{'n' * length}.{kind}", f"{'n' * length}_pca.png"} < set(names(out))
    assert run(*arguments) == 0
    assert "done before" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="limits of Linux and macOS")
def test_a_name_without_room_fails_alone(tmp_path, capsys):
    images = [draw(tmp_path / f"{'n' * 250}.png"), draw(tmp_path / "a.png")]
    assert run("upsample", *images, "-o", tmp_path / "out", *SMALL) == 0
    assert run("upsample", *images, "-o", tmp_path / "out", "--pca", *SMALL) == cli.SOME_FAILED
    assert "Rename the image" in one_sentence(capsys)


@pytest.mark.parametrize("name", ["\u00e9.png", "\u65e5\u672c.png", "a\x1b[31m\nb.png", "\udcff\udcfe.png"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_a_terminal_cannot_show(tmp_path, monkeypatch, name, encoding):
    try:
        draw(tmp_path / "plain.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("no such names on this disk")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert run("upsample", tmp_path / name, "-o", tmp_path / "out", "--pca", *SMALL) == 0
    assert written.getvalue().count(b"\n") == 1
    assert b"\x1b" not in written.getvalue()
    assert (tmp_path / "out" / f"{name[:-4]}_pca.png").exists()


def test_an_output_that_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run("info") == cli.USER_ERROR


def test_a_folder_in_the_place_of_a_result(tmp_path, capsys):
    (tmp_path / "out" / "a.npy").mkdir(parents=True)
    assert run("upsample", draw(tmp_path / "a.png"), "-o", tmp_path / "out", *SMALL) == cli.USER_ERROR
    assert "expected a place for a file, got a folder" in one_sentence(capsys)


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


def test_tolerance(photo, tmp_path, capsys):
    options = ("-o", tmp_path, "--size", 40, 40, *RANDOM)
    assert run("upsample", photo, *options, "--tolerance", 0.5) == 0
    assert "% of the queries" in capsys.readouterr().out
    features = np.load(tmp_path / "photo.npy")
    with pytest.warns(UserWarning, match="random"):
        model = vitup_fast.load("tiny", "random", device="cpu")
    expected = model.dense(read_image(photo), (40, 40), tolerance=0.5)[0]
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    assert run("upsample", photo, *options, "--tolerance", 0.5, "--skip-existing") == 0
    assert "done before" in capsys.readouterr().out
    assert run("upsample", photo, *options, "--skip-existing") == 0
    assert "done before" not in capsys.readouterr().out
    assert run("upsample", photo, *options, "--tolerance", "nan") == cli.USER_ERROR
    assert "tolerance: expected None or a finite number" in one_sentence(capsys)


def test_progress_reaches_the_end_for_uneven_chunks(photo, monkeypatch):
    with pytest.warns(UserWarning, match="random"):
        model: Upsampler = vitup_fast.load("tiny", "random", device="cpu", query_chunk_size=7)
    done: list[int] = []
    model.dense(read_image(photo), (5, 11), progress=done.append)
    assert sum(done) == 55
    assert max(done) <= 7
