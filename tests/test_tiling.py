from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tiling_inputs import DIM, WINDOW, make_head, make_model, pixels, save

from vitup_fast import InputError, tiling
from vitup_fast.images import normalise
from vitup_fast.tiling import plan, report, work
from vitup_fast.tiling import read as read_module
from vitup_fast.tiling.answers import Answers

zarr = pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def head():
    return make_head()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two window steps, so that small images have several, and pieces no wider than a window."""
    monkeypatch.setattr(plan, "BLOCK_STEPS", 2)
    monkeypatch.setattr(work, "PIECE_BYTES", 4000)


def read(path: Path, name: str = "0") -> np.ndarray:
    return zarr.open_array(str(path / name), mode="r")[:]


def starts(size: int, step: int) -> list[int]:
    found = []
    start = 0
    while start + WINDOW < size:
        found.append(start)
        start += step
    return [*found, max(0, size - WINDOW)]


def blended(model, image, stride, head, overlap=0.5, window=WINDOW):
    """Features, scores and normalised features, blended in float64 by one loop over windows."""
    from PIL import Image

    H, W = image.shape[:2]
    step = round(window * (1 - overlap))
    centres_y, centres_x = (
        [(i + 0.5) * stride for i in range(2 * n) if (i + 0.5) * stride < n] for n in (H, W)
    )
    shape = len(centres_y), len(centres_x)
    sums = {n: np.zeros((*shape, c)) for n, c in (("features", DIM), ("scores", len(head[0])), ("unit", DIM))}
    norm = np.zeros(shape)
    ramp = min(window - step, window / 2)

    def weight(t):
        return 1.0 if ramp == 0 else float(np.sin(np.pi / 2 * min(1, t / ramp, (window - t) / ramp)) ** 2)

    for top in starts(H, step):
        for left in starts(W, step):
            part = image[top : top + window, left : left + window]
            part = np.pad(
                part, ((0, window - part.shape[0]), (0, window - part.shape[1]), (0, 0)), mode="edge"
            )
            rows = [i for i, y in enumerate(centres_y) if top <= y < top + window]
            columns = [j for j, x in enumerate(centres_x) if left <= x < left + window]
            points = [[centres_x[j] - left, centres_y[i] - top] for i in rows for j in columns]
            coords = torch.tensor([points], dtype=torch.float64) / window
            normalised = normalise(Image.fromarray(part), model.backbone.mean, model.backbone.std)
            features = model(normalised, coords.float())[0].double().numpy()
            features = features.reshape(len(rows), len(columns), DIM)
            weights = np.array(
                [[weight(centres_y[i] - top) * weight(centres_x[j] - left) for j in columns] for i in rows]
            )
            place = np.ix_(rows, columns)
            norm[place] += weights
            sums["features"][place] += weights[..., None] * features
            scores = features @ head[0].double().numpy().T + head[1].double().numpy()
            sums["scores"][place] += weights[..., None] * scores
            unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
            sums["unit"][place] += weights[..., None] * unit
    return {name: values / norm[..., None] for name, values in sums.items()}


@pytest.mark.parametrize(
    ("stride", "size", "overlap"),
    [(4, (75, 90), 0.5), (3, (70, 101), 0.5), ("2/3", (33, 40), 0.5), (8, (20, 70), 0.75), (4, (64, 77), 0)],
)
def test_blending_is_that_of_float64(model, head, tmp_path, small_blocks, stride, size, overlap):
    image = pixels(*size)
    exact = blended(model, image, float(Fraction(stride)), head, overlap)
    vectors = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    answers = {"labels": True, "scores": True, "head": head, "similar": vectors, "features": "int8"}
    summary = tiling.upsample(
        save(tmp_path / "image.npy", image),
        tmp_path / "out",
        model,
        stride=stride,
        window=WINDOW,
        overlap=overlap,
        **answers,
    )
    assert summary.missing == 0
    scores = read(summary.outputs["scores"]).transpose(1, 2, 0)
    largest = np.abs(exact["scores"]).max()
    np.testing.assert_allclose(scores, exact["scores"], atol=2e-5 * largest)
    labels = read(summary.outputs["labels"])
    ordered = np.sort(exact["scores"], axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 1e-4 * largest
    assert clear.mean() > 0.95
    assert (labels == exact["scores"].argmax(-1))[clear].all()
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).double().numpy()
    np.testing.assert_allclose(
        read(summary.outputs["similar"]).transpose(1, 2, 0), exact["unit"] @ unit.T, atol=1e-5
    )
    scale = read(summary.outputs["features"], "scale")
    features = read(summary.outputs["features"]).transpose(1, 2, 0) * scale[..., None]
    assert (np.abs(features - exact["features"]) <= 0.501 * scale[..., None] + 1e-6).all()


def test_a_head_alone_never_makes_features(model, head, tmp_path, small_blocks, monkeypatch):
    widths = []
    of_windows = Answers.of_windows

    def spy(*arguments):
        out = of_windows(*arguments)
        widths.append(out.shape[-1])
        return out

    monkeypatch.setattr(Answers, "of_windows", spy)
    image = pixels(75, 90)
    exact = blended(model, image, 4, head)["scores"]
    path = save(tmp_path / "image.npy", image)
    summary = tiling.upsample(
        path, tmp_path / "scores.zarr", model, head=head, scores=True, stride=4, window=WINDOW
    )
    scores = read(summary.outputs["scores"]).transpose(1, 2, 0)
    np.testing.assert_allclose(scores, exact, atol=2e-5 * np.abs(exact).max())
    assert set(widths) == {5}


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder but records of what was computed when."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() and path.suffix != ".json") or path.name == "zarr.json"
    }


@pytest.fixture
def job(tmp_path, head, model, small_blocks):
    """A run of a small image with many blocks."""
    path = save(tmp_path / "image.npy", pixels(90, 110))

    def start(output="out", **changes):
        arguments = {"head": head, "labels": True, "scores": True, "pca": 3, "stride": 4, "window": WINDOW}
        return tiling.upsample(path, tmp_path / output, model, **arguments | changes)

    return start


def test_broken_blocks_are_found_and_made_again(job, tmp_path):
    whole = job("whole")
    assert whole.windows > 30
    job("out")
    before = digests(tmp_path / "out")
    assert before == digests(tmp_path / "whole")
    again = job("out")
    assert (again.windows, again.missing) == (0, 0)
    assert again.outputs == {n: tmp_path / "out" / p.name for n, p in whole.outputs.items()}
    out = tmp_path / "out"
    shards = sorted((out / "scores.ome.zarr" / "0" / "c").rglob("*"))
    torn, lost = [p for p in shards if p.is_file()][:2]
    torn.write_bytes(torn.read_bytes()[:-7])
    lost.unlink()
    (out / "parts" / "00001-00001.json").write_text('{"files": ')
    repaired = job("out")
    assert 0 < repaired.windows < whole.windows
    assert digests(out) == before


def test_an_interruption_anywhere_leaves_what_can_be_continued(job, tmp_path, monkeypatch):
    job("whole")

    class Stop(BaseException):
        pass

    for name in ("_write", "_blend_batch"):
        calls = iter(range(1000))
        function = getattr(work.Worker, name)

        def stops(*arguments, calls=calls, function=function):
            if next(calls) == 3:
                raise Stop
            return function(*arguments)

        monkeypatch.setattr(work.Worker, name, stops)
        with pytest.raises(Stop):
            job("out")
        monkeypatch.setattr(work.Worker, name, function)
        assert not (tmp_path / "out" / "summary.json").exists()
        assert not (tmp_path / "out" / "labels.ome.zarr" / "zarr.json").exists()
    finished = len(list((tmp_path / "out" / "parts").iterdir()))
    assert finished >= 3
    assert job("out").missing == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tiling_inputs import make_head, make_model
from vitup_fast import tiling
from vitup_fast.tiling import plan
from vitup_fast.tiling.answers import Answers
plan.BLOCK_STEPS = 2
model, random = make_model(), random.Random(3)

def attempt():
    tiling.upsample("image.npy", "killed", model, head=make_head(), labels=True, scores=True, pca=3,
                    stride=4, window=32)

kills = 0
while True:
    child = os.fork()
    if not child:
        attempt()
        os._exit(0)
    time.sleep(random.uniform(0.05, 0.5))
    if kills < {kills}:
        os.kill(child, signal.SIGKILL)
        kills += 1
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
print(kills)
"""


def test_killed_at_random_it_ends_with_the_same_bytes(job, tmp_path):
    job("whole")
    script = KILLED.format(tests=str(Path(__file__).parent), kills=5)
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 1
    found, expected = digests(tmp_path / "killed"), digests(tmp_path / "whole")
    assert {n: d for n, d in found.items() if not n.endswith((".part", ".partial"))} == expected


def test_other_settings_are_refused_by_name(job, tmp_path, model, head):
    job()
    with pytest.raises(InputError, match=r"stride 4, now 8"):
        job(stride=8)
    with pytest.raises(InputError, match=r"window 32, now 48"):
        job(window=48)
    with pytest.raises(InputError, match="answers"):
        job(head=(head[0] + 1, head[1]))
    save(tmp_path / "image.npy", pixels(90, 110, seed=1))
    with pytest.raises(InputError, match="input"):
        job()
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(InputError, match=r"mine.zarr, which is something else"):
        tiling.upsample(tmp_path / "image.npy", tmp_path / "mine.zarr", model, features="int8", stride=8)
    assert not (tmp_path / "mine.zarr.vitup").exists()


def test_shares_workers_and_dask_write_the_same_bytes(job, tmp_path, monkeypatch):
    job("whole")
    expected = digests(tmp_path / "whole")
    first = job("shares", shard=(2, 3))
    assert first.missing > 0
    assert first.outputs == {}
    assert job("shares", shard=(1, 3)).missing > 0
    # Another plan would choose smaller blocks; those of a run that was begun stay.
    with monkeypatch.context() as smaller:
        smaller.setattr(plan, "BLOCK_STEPS", 1)
        assert job("shares", shard=(3, 3)).missing == 0
    assert digests(tmp_path / "shares") == expected
    assert job("workers", workers=2).missing == 0
    assert digests(tmp_path / "workers") == expected
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        assert job("dask", dask=cluster.scheduler_address).missing == 0
    assert digests(tmp_path / "dask") == expected


def test_reading_computing_and_writing_overlap(job, monkeypatch):
    """Each of the three sleeps, mostly while another one sleeps too."""
    spans = {"_foreground": [], "_blend": [], "_write": []}
    for name, slept in spans.items():
        function = getattr(work.Worker, name)

        def slow(*arguments, function=function, slept=slept):
            start = time.perf_counter()
            time.sleep(0.03)
            slept.append((start, time.perf_counter()))
            return function(*arguments)

        monkeypatch.setattr(work.Worker, name, slow)
    monkeypatch.setattr(work.Worker, "_blend_batch", lambda *_: work.Spent())
    job()
    reading, computing, writing = spans.values()
    assert len(reading) == len(computing) > 15
    for mine, others in ((reading, computing), (writing, reading + computing)):
        shared = sum(max(0, min(b, d) - max(a, c)) for a, b in mine for c, d in others)
        assert shared > 0.5 * sum(b - a for a, b in mine)


def test_blending_leaves_no_seams(model, tmp_path, small_blocks, monkeypatch):
    """Windows that agree on nothing: no more changes at their borders than a pixel further in."""

    def of_windows(_, __, images, size, ___):
        means = images.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)
        return (means * torch.arange(1000, 1008)).frac().abs().expand(-1, *size, -1)

    monkeypatch.setattr(Answers, "of_windows", of_windows)
    head = torch.zeros(8, DIM), None
    path, ratios = save(tmp_path / "image.npy", pixels(107, 135)), {}
    for overlap in (0.5, 0.25, 0):
        arguments = {"head": head, "scores": True, "window": WINDOW, "overlap": overlap}
        scores = read(
            tiling.upsample(path, tmp_path / f"{overlap}.zarr", model, **arguments).outputs["scores"]
        )
        at, inside = [], []
        for axis in (1, 2):
            changes = np.abs(np.diff(scores, axis=axis)).mean(axis=(0, 3 - axis))
            borders = starts(scores.shape[axis], round(WINDOW * (1 - overlap)))[1:]
            at += [changes[b - 1] for b in borders]
            inside += [changes[b] for b in borders]
        ratios[overlap] = np.mean(at) / max(np.mean(inside), 1e-9)
    assert max(ratios[0.5], ratios[0.25]) < 1.05
    assert ratios[0] > 3


def test_memory_does_not_grow_with_the_image(model, head, tmp_path, monkeypatch):
    """A run of five times the windows holds no more at its peak: plan, schedule, buffers, pyramid and report."""
    for module, name, small in (
        (plan, "BLOCK_STEPS", 2),
        (work, "PIECE_BYTES", 1 << 18),
        (read_module, "AREA_BYTES", 1 << 20),
        (report, "OVERVIEW", 64),
    ):
        monkeypatch.setattr(module, name, small)
    monkeypatch.setattr(
        Answers, "of_windows", lambda _, __, images, size, ___: torch.zeros(len(images), *size, 5)
    )
    peaks = []
    for side in (96, 480, 1056):
        np.lib.format.open_memmap(tmp_path / f"{side}.npy", "w+", np.uint8, (side, side, 3))
        tracemalloc.start()
        tiling.upsample(
            tmp_path / f"{side}.npy", tmp_path / f"{side}", model, head=head, labels=True, stride=8, window=96
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first run is for what is imported and kept once.
    assert peaks[2] < 1.1 * peaks[1]
