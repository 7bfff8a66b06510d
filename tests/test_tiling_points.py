from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiling_inputs import DIM, WINDOW, make_head, make_model, pixels, save

from vitup_fast import InputError, tiling
from vitup_fast.images import normalise
from vitup_fast.tiling import points as points_module
from vitup_fast.tiling.answers import fit_basis, save_basis
from vitup_fast.tiling.points import group, read_points

SIZE = (150, 170)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def image(tmp_path):
    return save(tmp_path / "image.npy", pixels(*SIZE))


def scattered(count=60):
    return np.random.default_rng(2).uniform((0, 0), SIZE[::-1], (count, 2))


def exact(model, xy):
    """Features of one point, in a window of its own that is found by looking at all."""
    image, step = pixels(*SIZE), WINDOW // 2
    corners = {
        (min(max(y, 0), SIZE[0] - WINDOW), min(max(x, 0), SIZE[1] - WINDOW))
        for y in range(-WINDOW, SIZE[0], step)
        for x in range(-WINDOW, SIZE[1], step)
    }
    middle = WINDOW / 2
    top, left = min(corners, key=lambda c: max(abs(c[0] + middle - xy[1]), abs(c[1] + middle - xy[0])))
    part = Image.fromarray(image[top : top + WINDOW, left : left + WINDOW])
    tensor = normalise(part, model.backbone.mean, model.backbone.std)
    coords = torch.from_numpy((xy - (left, top)) / WINDOW).float().reshape(1, 1, 2)
    return model(tensor, coords)[0, 0].numpy()


@pytest.mark.parametrize("kind", ["parquet", "csv", "safetensors"])
def test_points_keep_their_order_and_lie_well_inside(model, image, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(points_module, "PART_WINDOWS", 8)
    monkeypatch.setattr(points_module, "ROWS", 7)
    monkeypatch.setattr(points_module, "MOST_POINTS", 2)
    points = scattered()
    encoded = []
    set_images = model.set_images
    monkeypatch.setattr(model, "set_images", lambda images: (encoded.append(len(images)), set_images(images)))
    output = tmp_path / f"points.{kind}"
    summary = tiling.upsample_points(image, points, output, model, batch=3)
    assert sum(encoded) == summary.windows == len(np.unique(group(points, SIZE, WINDOW)[1], axis=0))
    assert summary.outputs == {"points": output}
    if kind == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(output)
        features = np.stack(table["features"].to_numpy())
        found = np.stack([table["x"], table["y"]], axis=1)
    elif kind == "csv":
        rows = np.loadtxt(output, delimiter=",", skiprows=1)
        found, features = rows[:, :2], rows[:, 2:]
        assert output.read_text().startswith("x,y,f0,f1,")
    else:
        tensors = load_file(output)
        found, features = tensors["points"], tensors["features"]
    np.testing.assert_array_equal(found, points)
    assert features.shape == (60, DIM)
    # The nearest window may not be unique; the feature of most points is.
    errors = [np.abs(features[i] - exact(model, points[i])).max() for i in range(0, 60, 3)]
    assert np.median(errors) < 1e-5
    assert sum(e < 1e-5 for e in errors) >= 15


@pytest.mark.parametrize("kind", ["parquet", "csv", "safetensors", "h5ad"])
def test_all_answers_at_points_follow_from_their_features(model, image, tmp_path, kind, monkeypatch):
    if kind == "h5ad":
        pytest.importorskip("anndata")
    monkeypatch.setattr(points_module, "PART_WINDOWS", 8)
    monkeypatch.setattr(points_module, "ROWS", 7)
    points, head = scattered(), make_head()
    whole = tmp_path / "features.safetensors"
    tiling.upsample_points(image, points, whole, model, batch=3)
    features = load_file(whole)["features"]
    basis = fit_basis(torch.from_numpy(features), 3)
    save_basis(tmp_path / "pca.safetensors", basis)
    vectors = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    asked = {"head": head, "labels": True, "scores": True, "similar": vectors, "features": kind != "csv"}
    output = tmp_path / f"points.{kind}"
    asked["pca"] = tmp_path / "pca.safetensors"
    tiling.upsample_points(image, points, output, model, batch=3, **asked)
    if kind == "parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(output)
        assert str(table.schema.field("labels").type) == "uint8"
        found = {n: np.stack(table[n].to_numpy()) for n in table.column_names if n not in "xy"}
    elif kind == "csv":
        names = output.read_text().splitlines()[0].split(",")
        rows = np.loadtxt(output, delimiter=",", skiprows=1)
        assert names[2:5] == ["labels", "scores_0", "scores_1"]
        found = {"labels": rows[:, 2], "scores": rows[:, 3:8], "pca": rows[:, 8:11], "similar": rows[:, 11:]}
    elif kind == "safetensors":
        found = load_file(output)
    else:
        data = pytest.importorskip("anndata").read_h5ad(output)
        np.testing.assert_array_equal(data.obsm["spatial"], points)
        found = {**data.obsm, "labels": data.obs["labels"].to_numpy(), "features": data.X}
    scores = features @ head[0].numpy().T + head[1].numpy()
    np.testing.assert_array_equal(found["labels"], scores.argmax(axis=1))
    np.testing.assert_allclose(found["scores"], scores, atol=1e-4)
    projected = (features - basis.mean.numpy()) @ basis.components.numpy()
    share = (projected - basis.low.numpy()) / (basis.high - basis.low).numpy()
    np.testing.assert_allclose(found["pca"], 1 + 254 * share.clip(0, 1), atol=0.51)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ (vectors / vectors.norm(dim=1, keepdim=True)).numpy().T
    np.testing.assert_allclose(found["similar"], cosine, atol=1e-5)
    if kind != "csv":
        np.testing.assert_allclose(found["features"], features, atol=1e-5)


def test_points_lie_a_quarter_inside():
    points = np.random.default_rng(0).uniform((0, 0), (1000, 700), (5000, 2))
    order, origins, edges = group(points, (700, 1000), 64)
    assert sorted(order) == list(range(5000))
    for window in range(len(origins)):
        inside = points[order[edges[window] : edges[window + 1]]] - origins[window][::-1]
        assert (inside >= 0).all()
        assert (inside <= 64).all()
        top, left = origins[window]
        for axis, (start, end) in enumerate(((left, 1000), (top, 700))):
            if 0 < start < end - 64:
                assert (inside[:, axis] >= 16).all()
                assert (inside[:, axis] <= 48).all()


def test_points_go_on_after_an_interruption(model, image, tmp_path, monkeypatch):
    monkeypatch.setattr(points_module, "PART_WINDOWS", 8)
    points, whole, output = scattered(), tmp_path / "whole.csv", tmp_path / "points.csv"
    tiling.upsample_points(image, points, whole, model)
    write = points_module.PointWorker._write
    calls = iter(range(100))

    def stops(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(points_module.PointWorker, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        tiling.upsample_points(image, points, output, model)
    assert not output.exists()
    monkeypatch.setattr(points_module.PointWorker, "_write", write)
    before = tiling.upsample_points(image, points, whole, model)
    assert before.windows == 0
    again = tiling.upsample_points(image, points, output, model, shard=(1, 2))
    assert again.missing > 0
    summary = tiling.upsample_points(image, points, output, model)
    assert 0 < summary.windows < len(group(points, SIZE, WINDOW)[1])
    assert output.read_bytes() == whole.read_bytes()
    with pytest.raises(InputError, match="points"):
        tiling.upsample_points(image, points[::-1], output, model)


def test_reading_points(tmp_path):
    points = scattered(5)
    path = tmp_path / "points.csv"
    lines = ["id,Y, X,note", *(f'{i},{y},{x},"a, b"' for i, (x, y) in enumerate(points.tolist()))]
    path.write_text("\n".join(lines) + "\n")
    np.testing.assert_array_equal(read_points(path), points)
    ring = [[0, 0], [4, 0], [4, 2], [0, 2], [0, 0]]
    shapes = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3.5, 7]}},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}},
    ]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": shapes}))
    np.testing.assert_allclose(read_points(tmp_path / "a.geojson"), [[3.5, 7], [2, 1]])
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"y": points[:, 1], "x": points[:, 0], "other": list("abcde")})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    np.testing.assert_array_equal(read_points(tmp_path / "a.parquet"), points)


def test_bad_points_are_one_sentence(model, image, tmp_path):
    cases = {
        "a.csv": ("x,z\n1,2\n", "one column named y"),
        "b.csv": ("x,y\n1,two\n", "cannot be read as points"),
        "c.csv": ("x,y\n", "at least one point"),
        "d.geojson": ('[{"type": "LineString", "coordinates": []}]', "Point or Polygon"),
        "e.geojson": ("{", "cannot be read as points"),
        "f.txt": ("", ".geojson"),
        "g.csv": ("x,y\n1,nan\n", r"1 others, the first in row 1: \(1, nan\)"),
        "h.csv": ("x,y\n1,2\n171,3\n", r"the first in row 2: \(171, 3\)"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            tiling.upsample_points(image, tmp_path / name, tmp_path / "out.csv", model)
    with pytest.raises(InputError, match=r"No such file"):
        tiling.upsample_points(image, tmp_path / "none.csv", tmp_path / "out.csv", model)
    with pytest.raises(InputError, match="--output"):
        tiling.upsample_points(image, scattered(), tmp_path / "out.xlsx", model)
    assert not list(tmp_path.glob("out*"))
