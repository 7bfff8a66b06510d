from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vitup_fast import InputError, ViTUpConfig, cli
from vitup_fast.evaluation import (
    Journal,
    LabelledFolder,
    faithfulness_table,
    make_scenes,
    measure_faithfulness,
    measure_matching,
    measure_segmentation,
    read_pairs,
    scenes,
    segmentation,
)
from vitup_fast.evaluation.features import hidden_states, methods_of
from vitup_fast.matching import find_matches
from vitup_fast.pictures import read_sound
from vitup_fast.sources import seeded_network
from vitup_fast.upsampler import Upsampler

TINY = ViTUpConfig.preset("tiny")


def one_sentence(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def model() -> Upsampler:
    network, vit = seeded_network(TINY)
    return Upsampler(network, vit).eval().requires_grad_(False)


def smooth_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Coloured clouds, whose detail a few tokens can hold."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


# Matching


def waves(coords: torch.Tensor) -> torch.Tensor:
    """Features that tell every place from every other, smooth on the scale of a tenth of the image."""
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(5)) * 6
    return torch.cat(((coords @ directions).sin(), (coords @ directions).cos()), dim=-1)


def cell_centres(h: int, w: int) -> torch.Tensor:
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    return torch.stack((x, y), dim=-1)  # [h, w, 2]


@pytest.mark.parametrize(
    ("size", "coarse"), [((448, 448), (64, 64)), ((150, 500), (20, 30)), ((7, 9), (14, 18))]
)
def test_matches_are_found_to_a_fraction_of_a_pixel(size, coarse):
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.004, 0.5]])
    places = torch.cat((torch.rand(1100, 2, generator=torch.Generator().manual_seed(6)), corners))
    found, similarity = find_matches(waves(places), waves(cell_centres(*coarse)), waves, size)
    distance = (found - places) * torch.tensor(size[::-1])
    assert distance.norm(dim=1).max() < 0.06
    assert distance[:-4].norm(dim=1).median() < 0.01
    assert similarity.min() > 0.999
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_matches_stay_in_the_middle_of_what_is_alike():
    tokens = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(7))

    def nearest(coords: torch.Tensor) -> torch.Tensor:
        return tokens[(coords[:, 1] * 4).long().clamp(max=3), (coords[:, 0] * 5).long().clamp(max=4)]

    found, _ = find_matches(tokens.flatten(0, 1), tokens, nearest, (80, 100))
    torch.testing.assert_close(found, cell_centres(4, 5).flatten(0, 1))


def test_the_best_cell_of_the_coarse_map_need_not_win():
    """A narrow peak between cells, right, beside a broad one that is nearly right."""
    narrow, broad = torch.tensor([0.25, 0.5]), torch.tensor([0.8, 0.55])

    def features(coords: torch.Tensor) -> torch.Tensor:
        angle = torch.minimum(
            12 * (coords - narrow).norm(dim=-1), 0.3 + 3 * (coords - broad).square().sum(dim=-1)
        )
        return torch.stack((angle.cos(), angle.sin()), dim=-1)

    coarse, wanted = features(cell_centres(10, 10)), torch.tensor([[1.0, 0.0]])
    assert (coarse @ wanted[0]).argmax() % 10 > 5
    found, similarity = find_matches(wanted, coarse, features, (200, 200))
    assert (found[0] - narrow).norm() < 0.001
    assert similarity > 0.9999


def test_no_points_have_no_matches():
    found, similarity = find_matches(waves(torch.zeros(0, 2)), waves(cell_centres(4, 4)), waves, (8, 8))
    assert found.shape == (0, 2)
    assert similarity.shape == (0,)


def test_match_finds_points_of_an_image_in_itself(model):
    image = smooth_picture((90, 120), 1)
    points = torch.tensor([[30.0, 20.0], [71.3, 55.6], [100.2, 80.9]], dtype=torch.float64)
    found, similarity = model.match(points, image, image, coarse_size=(36, 48))
    assert found.dtype == torch.float64
    assert (found - points).norm(dim=1).max() < 0.3
    assert similarity.min() > 0.999
    again, _ = model.match(points, None, image, coarse_size=(36, 48))
    assert torch.equal(found, again)
    assert model.get_cache_data().batch_size == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), "image", "image"), "points: expected shape (N, 2)"),
        ((torch.zeros(3, 2, dtype=torch.bfloat16), "image", "image"), "points: expected dtype float32"),
        ((torch.full((1, 2), math.nan), "image", "image"), "points: expected finite"),
        (([[1, 2]], "image", "image"), "points: expected a tensor"),
        ((torch.zeros(1, 2), "image", None), "image_b: expected an image"),
        (
            (torch.zeros(1, 2), torch.zeros(2, 3, 64, 64), "image"),
            "image_a: expected one image, got a batch of 2",
        ),
        ((torch.zeros(1, 2), "image", "image", (0, 4)), "coarse_size: expected"),
    ],
)
def test_match_refuses(model, arguments, words):
    image = smooth_picture((40, 40), 1)
    arguments = [image if isinstance(a, str) else a for a in arguments]
    with pytest.raises(InputError) as error:
        model.match(*arguments)
    assert str(error.value).startswith(words)


# Scenes


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.array(
        Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of cut-outs in two classes (discs in one, squares in the other), and of photographs."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    y, x = np.mgrid[:150, :160]
    shapes = {
        "disc": (x - 80) ** 2 + (y - 70) ** 2 < 60**2,
        "square": (abs(x - 70) < 55) & (abs(y - 80) < 55),
    }
    for name, shape in shapes.items():
        (root / "cutouts" / name / "inside").mkdir(parents=True)
        for index in range(4):
            pixels = texture(rng, 150, 160)
            pixels[:, :, 0 if name == "disc" else 2] //= 4
            rgba = np.dstack((pixels, 255 * shape.astype(np.uint8)))
            place = root / "cutouts" / name / ("inside" if index else "") / f"{index}.png"
            Image.fromarray(rgba).save(place)
    (root / "cutouts" / "few").mkdir()
    Image.fromarray(rgba).save(root / "cutouts" / "few" / "only.png")
    Image.fromarray(pixels).save(root / "cutouts" / "square" / "opaque.png")
    (root / "photographs").mkdir()
    for index in range(4):
        Image.fromarray(texture(rng, 120, 180)).save(root / "photographs" / f"{index}.jpg")
    return root / "cutouts", root / "photographs"


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "scenes"
    make_scenes(*pictures, path, scenes=8, seed=4, size=96)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_scenes_are_the_same_bit_for_bit(pictures, folder, tmp_path):
    done = []
    (tmp_path / "again").mkdir()
    make_scenes(*pictures, tmp_path / "again", scenes=8, seed=4, size=96, progress=done.append)
    assert contents(tmp_path / "again") == contents(folder)
    assert sum(done) == 8
    make_scenes(*pictures, tmp_path / "other", scenes=8, seed=5, size=96)
    assert contents(tmp_path / "other").keys() == contents(folder).keys()
    assert contents(tmp_path / "other")["images/00000.png"] != contents(folder)["images/00000.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


def test_scenes_name_everything_and_hold_out_what_they_say(folder):
    record = json.loads((folder / "scenes.json").read_text())
    assert record["classes"] == ["background", "disc", "square"]
    assert record["seed"] == 4
    assert record["left_out"] == ["few/only.png", "square/opaque.png"]
    used: dict[str, set[str]] = {"train": set(), "held-out": set()}
    for scene in record["scenes"]:
        used[scene["split"]] |= {scene["photograph"], *(o["cutout"] for o in scene["objects"])}
    assert not used["train"] & used["held-out"]
    assert [scene["split"] for scene in record["scenes"]] == ["train"] * 6 + ["held-out"] * 2


def test_masks_are_what_the_matrices_say(pictures, folder):
    """Every pixel's centre is taken back into the cut-out's file, whose alpha says what lies there."""
    record = json.loads((folder / "scenes.json").read_text())
    y, x = np.mgrid[:96, :96] + 0.5
    compared = 0
    for scene in record["scenes"]:
        mask = np.array(Image.open(folder / scene["mask"]))
        exact, unsure = np.zeros_like(mask), np.zeros(mask.shape, dtype=bool)
        for placed in scene["objects"]:
            matrix = np.array(placed["matrix"])
            places = np.linalg.inv(matrix[:, :2]) @ (np.stack((x, y)).reshape(2, -1) - matrix[:, 2:])
            alpha = torch.from_numpy(
                np.array(Image.open(pictures[0] / placed["cutout"]))[:, :, 3].astype(np.float64)
            )
            height, width = alpha.shape
            grid = torch.from_numpy(2 * places.T / (width, height) - 1)[None, None]
            sampled = (
                F.grid_sample(alpha[None, None], grid, align_corners=False)[0, 0, 0].view(96, 96).numpy()
            )
            covered = sampled >= 128
            edge = torch.from_numpy(covered.astype(np.float32))[None, None]
            border = (F.max_pool2d(edge, 3, 1, 1) != -F.max_pool2d(-edge, 3, 1, 1))[0, 0].numpy()
            exact[covered], unsure = placed["class"], (unsure | border)
        assert (mask == exact)[~unsure].all()
        assert (mask == exact).mean() > 0.97
        compared += (exact > 0)[~unsure].sum()
    assert compared > 2000


def test_cutouts_land_where_their_matrix_says():
    """A bright dot's centre of mass, before and after."""
    y, x = np.mgrid[:220, :260] + 0.5
    dot = 255 * np.exp(-((x - 151.3) ** 2 + (y - 64.8) ** 2) / (2 * 5**2))
    image = Image.fromarray(
        np.dstack((*(dot.round().astype(np.uint8),) * 3, np.full(dot.shape, 255, np.uint8)))
    )
    rng = np.random.default_rng(1)
    for _ in range(5):
        cutout = scenes._Cutout(image, (30, 11), np.zeros((0, 2)))
        layer, matrix = scenes._place(rng, cutout, 300, central=True)
        weight = np.array(layer)[:, :, 0].astype(np.float64)
        y, x = np.mgrid[:300, :300] + 0.5
        centre = np.array(((weight * x).sum(), (weight * y).sum())) / weight.sum()
        np.testing.assert_allclose(centre, matrix[:, :2] @ (151.3 + 30, 64.8 + 11) + matrix[:, 2], atol=0.03)


def test_correspondences_are_exact(folder):
    record = json.loads((folder / "scenes.json").read_text())
    by_name = {Path(scene["image"]).name: scene for scene in record["scenes"]}
    pairs = json.loads((folder / "pairs.json").read_text())
    assert len(pairs) >= 3
    for pair in pairs:
        places = []
        for side in ("src", "trg"):
            scene = by_name[pair[f"{side}_imname"]]
            shared = scene["objects"][-1]
            assert pair[f"{side}_bndbox"] == shared["box"]
            matrix = np.array(shared["matrix"])
            points = np.array(pair[f"{side}_kps"]) + 0.5
            mask = np.array(Image.open(folder / scene["mask"]))
            column, row = np.floor(points).astype(int).T
            assert (mask[row, column] == shared["class"]).all()
            places.append(np.linalg.inv(matrix[:, :2]) @ (points.T - matrix[:, 2:]))
        np.testing.assert_allclose(*places, atol=1e-9)
        assert places[0].shape[1] >= 3


def test_broken_pictures_are_left_out_as_long_as_they_are_few(pictures, tmp_path):
    cutouts, photographs = pictures
    (tmp_path / "photographs").mkdir()
    for path in photographs.iterdir():
        (tmp_path / "photographs" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photographs" / "broken.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"broken\.jpg: cannot be read .* It is left out \(1 so far\)"):
        make_scenes(cutouts, tmp_path / "photographs", tmp_path / "out", scenes=2, size=64)
    (tmp_path / "photographs" / "broken2.jpg").write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(InputError, match=r"2 of 6 pictures are broken, the last: .*broken2\.jpg"),
    ):
        make_scenes(cutouts, tmp_path / "photographs", tmp_path / "out2", scenes=2, size=64)
    assert not (tmp_path / "out2").exists()


def test_make_scenes_refuses(pictures, tmp_path):
    cutouts, photographs = pictures
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "empty").mkdir()
    cases = [
        ((cutouts, photographs, tmp_path / "full"), {}, "output: expected a new or empty folder"),
        ((tmp_path / "empty", photographs, tmp_path / "out"), {}, "cutouts: expected a folder with pictures"),
        ((tmp_path / "none", photographs, tmp_path / "out"), {}, "cutouts: expected a folder of pictures"),
        ((photographs, photographs, tmp_path / "out"), {}, "cutouts: expected folders, one a class"),
        ((cutouts, photographs, tmp_path / "out"), {"scenes": 3}, "scenes: expected an even number"),
        ((cutouts, photographs, tmp_path / "out"), {"size": 8}, "size: expected at least 64"),
        ((cutouts, photographs, tmp_path / "out"), {"seed": -1}, "seed: expected an integer of at least 0"),
    ]
    for arguments, options, words in cases:
        with pytest.raises(InputError) as error:
            make_scenes(*arguments, **options)
        assert str(error.value).startswith(words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_a_full_disk_is_named_before_anything_is_made(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(InputError, match="output: expected 12 MiB of free space, got 0 MiB"):
        make_scenes(*pictures, tmp_path / "out", scenes=16)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(pictures, tmp_path):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(*pictures, tmp_path / "out", scenes=2, size=64, progress=stop)
    assert not list(tmp_path.iterdir())


# Faithfulness


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    for index, size in enumerate(((150, 130), (128, 200))):
        smooth_picture(size, index).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def test_faithfulness_of_known_methods(model, photographs, tmp_path):
    def teacher(image, size, input_size):
        return hidden_states(model.backbone, image, (128, 128))

    def half(image, size, input_size):
        tokens = hidden_states(model.backbone, image, input_size)[-1]
        times = size[0] // tokens.shape[0]
        return tokens.repeat_interleave(times, 0).repeat_interleave(times, 1)

    rows = measure_faithfulness(
        model, photographs, functions={"teacher": teacher, "repeated": half}, drawings=tmp_path
    )
    methods = {"nearest", "bilinear", "ViT-Up", "teacher", "repeated", "128 px"}
    assert {row.method for row in rows if row.scale == 2} == methods
    assert {row.method for row in rows if row.scale == 4} == {*methods, "64 px, bilinear"}
    assert {row.picture for row in rows} == {str(path) for path in photographs}
    by_key = {(row.picture, row.scale, row.method, row.depth): row for row in rows}
    assert {row.depth for row in rows if row.method == "repeated"} == {4}
    assert {row.depth for row in rows if row.method == "ViT-Up"} == {0, 2, 4}
    for row in rows:
        assert row.seconds > 0
        if row.method in ("teacher", "128 px"):
            assert row.cosine == pytest.approx(1, abs=1e-6)
            assert row.error == pytest.approx(0, abs=1e-6)
        if row.method == "repeated":
            nearest = by_key[(row.picture, row.scale, "nearest", 4)]
            assert row.cosine == pytest.approx(nearest.cosine, abs=1e-6)
            assert row.error == pytest.approx(nearest.error, abs=1e-6)
        if row.method == "64 px, bilinear":
            assert row.cosine == pytest.approx(
                by_key[(row.picture, 2, "bilinear", row.depth)].cosine, abs=1e-6
            )
    table = faithfulness_table(rows)
    mean = np.mean([by_key[(str(path), 4, "bilinear", 4)].cosine for path in photographs])
    assert f"{mean:.3f} |" in next(line for line in table.splitlines()[10:] if line.startswith("| bilinear"))
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 2
    with Image.open(drawn[0]) as picture:
        assert picture.height > 4 * 224
        assert len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) > 100


def test_faithfulness_is_that_of_the_definition(model, photographs):
    """The network's own features at the teacher's token centres, compared in float64."""
    row = next(
        row
        for row in measure_faithfulness(model, photographs[:1], scales=(2,))
        if row.method == "ViT-Up" and row.depth == 4
    )
    image = Image.open(photographs[0]).crop((0, 10, 130, 140)).resize((128, 128), Image.Resampling.LANCZOS)
    truth = hidden_states(model.backbone, image, (128, 128))[-1].double().flatten(0, 1)
    features = model(image, cell_centres(8, 8).view(1, 64, 2))[0].double()
    assert row.cosine == pytest.approx(F.cosine_similarity(features, truth, dim=-1).mean().item(), abs=1e-5)
    assert row.error == pytest.approx(((features - truth).norm() / truth.norm()).item(), abs=1e-5)


def test_faithfulness_refuses(model, photographs, tmp_path):
    def refused(words, pictures=photographs, **options):
        with pytest.raises(InputError) as error:
            measure_faithfulness(options.pop("model", model), pictures, **options)
        assert words in str(error.value)

    refused("scales: expected even numbers that divide the teacher's 8 tokens, got 3", scales=(3,))
    refused(
        "hidden_layer_img_size", model=Upsampler(model.vit_up, model.backbone, hidden_layer_img_size=(64, 32))
    )
    refused("got nearest", functions={"nearest": lambda *_: None})
    refused(
        "method 'flat': expected features of shape (8, 8, 'D')", functions={"flat": lambda *_: torch.zeros(3)}
    )
    refused(
        "method 'wide': expected features of shape (8, 8, 64)",
        functions={"wide": lambda i, s, _: torch.ones(*s, 3)},
    )
    nan = {"nan": lambda i, s, _: torch.full((*s, 64), math.nan)}
    refused("method 'nan': expected finite features", functions=nan)
    broken = tmp_path / "broken.png"
    broken.write_bytes(photographs[0].read_bytes()[:500])
    refused("1 of 1 pictures are broken", pictures=[broken])


def test_merged_adapters_need_another_teacher(photographs):
    network, vit = seeded_network(TINY)
    vit.add_lora(2)
    with torch.no_grad():
        for parameter in vit.lora_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    adapted = Upsampler(network, vit).eval()
    rows = measure_faithfulness(adapted, photographs[:1], scales=(2,))
    vit.merge_lora()
    with pytest.raises(InputError, match="teacher: expected the backbone without adapters"):
        measure_faithfulness(adapted, photographs[:1], scales=(2,))
    teacher = seeded_network(TINY)[1]
    merged = measure_faithfulness(adapted, photographs[:1], scales=(2,), teacher=teacher)
    for apart, other in zip(rows, merged, strict=True):
        assert apart[:4] == other[:4]
        assert apart.cosine == pytest.approx(other.cosine, abs=1e-4)
    wrong = type(teacher)(teacher.model, (0, 4))
    with pytest.raises(InputError, match="teacher: expected width 64 and depths"):
        measure_faithfulness(adapted, photographs[:1], teacher=wrong)


def test_a_journal_goes_on_where_it_was(model, photographs, tmp_path):
    calls = []

    def method(image, size, input_size):
        if len(calls) == 2 and image.size == (128, 128) and "stopped" not in calls:
            calls.append("stopped")
            raise KeyboardInterrupt
        calls.append(image)
        return torch.ones(*size, 64)

    def measure():
        journal = Journal(tmp_path / "journal.jsonl", {"weights": "a"})
        options = {"scales": (2,), "functions": {"other": method}}
        return measure_faithfulness(model, photographs, journal=journal, **options)

    with pytest.raises(KeyboardInterrupt):
        measure()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('["cut off in the mid')
    rows = measure()
    assert len(calls) == 5  # twice for each picture, and once in vain
    assert measure() == rows
    assert len(calls) == 5
    with pytest.warns(UserWarning, match=r"made with other settings \(weights\); starting anew"):
        assert Journal(tmp_path / "journal.jsonl", {"weights": "b"}).done == {}


def test_read_sound_stops_at_once_when_nothing_can_be_read():
    def read(source):
        raise InputError(f"{source}: broken.")

    with pytest.raises(InputError, match="1 of 1 pictures are broken"):
        list(read_sound(["a"], read))


# Segmentation


def test_a_head_is_the_optimum(generator):
    x = torch.randn(300, 5, generator=generator) * torch.tensor([1, 2, 3, 0.1, 10.0]) + 4
    targets = torch.softmax(torch.randn(300, 3, generator=generator), dim=1)
    weight, bias = segmentation.fit_head(x, targets)
    deviation = x.double().std(0, unbiased=False)
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    loss = F.cross_entropy(F.linear(x.double(), weight, bias), targets.double())
    loss = loss + segmentation.WEIGHT_PENALTY / 2 * (weight * deviation).square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max((gradients[0] / deviation).abs().max(), gradients[1].abs().max()) < 1e-5
    again = segmentation.fit_head(x, targets)
    assert torch.equal(again[0], weight.float())


def test_segmentation_of_features_that_hold_the_answer(model, folder):
    labelled = LabelledFolder.read(folder)
    assert labelled.classes == ["background", "disc", "square"]
    masks = {
        Image.open(p.image).convert("RGB").tobytes(): np.array(Image.open(p.mask)) for p in labelled.pictures
    }

    def perfect(image, size, input_size):
        mask = torch.from_numpy(masks[image.tobytes()]).long()
        one_hot = F.one_hot(mask, 3).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(one_hot, size, mode="nearest-exact")[0].permute(1, 2, 0)
        return torch.cat((pixels, torch.zeros(*size, 61)), dim=-1)

    done = []
    scores = measure_segmentation(model, labelled, functions={"perfect": perfect}, progress=done.append)
    by_key = {(s.method, s.trained_at): s for s in scores}
    assert set(by_key) == {
        (m, t) for m in ("nearest", "bilinear", "ViT-Up", "perfect") for t in ("tokens", "pixels")
    }
    assert by_key[("perfect", "pixels")].mean_iou > 0.9  # nearest pixels of a coarser map on the way
    assert by_key[("perfect", "pixels")].accuracy > by_key[("nearest", "pixels")].accuracy
    assert sum(done) == 6 + 4 * 8


def test_segmentation_counts_pixels(model, folder):
    """Intersection over union and accuracy, counted again by hand."""
    labelled = LabelledFolder.read(folder)
    (score,) = (
        s
        for s in measure_segmentation(model, labelled, size=(24, 32))
        if (s.method, s.trained_at) == ("bilinear", "tokens")
    )
    training = [p for p in labelled.pictures if not p.held_out]
    tokens, targets = [], []
    for picture in training:
        tokens.append(hidden_states(model.backbone, Image.open(picture.image), (64, 64))[-1].flatten(0, 1))
        mask = np.array(Image.open(picture.mask)).reshape(4, 24, 4, 24)
        targets.append(np.stack([(mask == c).mean((1, 3)) for c in range(3)], axis=-1).reshape(16, 3))
    weight, bias = segmentation.fit_head(torch.cat(tokens), torch.from_numpy(np.concatenate(targets)))
    truth, found = [], []
    for picture in labelled.pictures:
        if picture.held_out:
            hidden = hidden_states(model.backbone, Image.open(picture.image), (64, 64))[-1].permute(2, 0, 1)
            features = F.interpolate(hidden[None], (24, 32), mode="bilinear")[0].permute(1, 2, 0)
            found.append((features @ weight.T + bias).argmax(-1).numpy())
            truth.append(np.array(Image.open(picture.mask))[2::4][:, 1::3])
    truth, found = np.stack(truth), np.stack(found)
    iou = {
        name: ((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum()
        for c, name in enumerate(labelled.classes)
        if ((truth == c) | (found == c)).any()
    }
    assert score.iou == pytest.approx(iou, abs=0.01)
    assert score.mean_iou == pytest.approx(np.mean(list(iou.values())), abs=0.01)
    assert score.accuracy == pytest.approx((truth == found).mean(), abs=0.01)


@pytest.fixture
def plain(tmp_path) -> Path:
    """Pictures with masks, without a list."""
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for index in range(3):
        smooth_picture((40, 50), index).save(tmp_path / "data" / "images" / f"{index}.jpg")
        mask = np.zeros((40, 50), dtype=np.uint8)
        mask[:20], mask[:5] = 2, 255
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{index}.png")
    return tmp_path / "data"


def test_a_folder_without_a_list(model, plain):
    labelled = LabelledFolder.read(plain)
    assert labelled.classes == ["0", "1", "2"]
    assert [picture.held_out for picture in labelled.pictures] == [False, False, True]
    scores = measure_segmentation(model, labelled, size=(10, 10))
    assert all(set(score.iou) <= {"0", "2"} for score in scores)


def damage(folder: Path, what: str) -> None:
    mask = folder / "masks" / "1.png"
    if what == "missing":
        mask.unlink()
    elif what == "size":
        Image.new("L", (50, 41)).save(mask)
    elif what == "colours":
        Image.new("RGB", (50, 40)).save(mask)
    elif what == "broken":
        mask.write_bytes(b"no picture")
    elif what == "images":
        for path in (folder / "images").iterdir():
            path.unlink()
    elif what == "one":
        for index in (1, 2):
            (folder / "images" / f"{index}.jpg").unlink()
    elif what == "unlabelled":
        for path in (folder / "masks").iterdir():
            Image.new("L", (50, 40), 255).save(path)
    else:
        names = ["background", "thing"] if what == "unknown" else None
        scenes = [
            {"image": f"images/{i}.jpg", "mask": f"masks/{i}.png", "split": "held-out" if i == 2 else "train"}
            for i in range(3)
        ]
        record = {"classes": names, "scenes": scenes} if what != "text" else "text"
        text = "{" if what == "json" else json.dumps(record)
        (folder / "scenes.json").write_text(text)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "1.png: cannot be read as a mask (no such file)"),
        ("size", "1.png: expected the 50 x 40 pixels of its picture, got 50 x 41"),
        ("colours", "1.png: expected class indices"),
        ("broken", "1.png: cannot be read as a mask"),
        ("images", "images: expected a folder with pictures in it"),
        ("one", "folder: expected pictures to train on and others to judge by"),
        ("unlabelled", "folder: expected labelled pixels"),
        ("unknown", "0.png: expected class indices below 2 (background, thing), or 255 for none, got 2"),
        ("text", "scenes.json: expected 'classes', and 'scenes'"),
        ("json", "scenes.json: is no JSON"),
    ],
)
def test_labelled_folders_that_are_refused(plain, what, words):
    damage(plain, what)
    with pytest.raises(InputError) as error:
        LabelledFolder.read(plain)
    assert words in str(error.value)


# Keypoints


def test_matching_of_a_shifted_picture(model, tmp_path):
    """Features that are the picture's own colours find every point; a map of tokens cannot."""
    (tmp_path / "images" / "thing").mkdir(parents=True)
    picture = smooth_picture((96, 96), 8)
    picture.save(tmp_path / "images" / "thing" / "a.png")
    shifted = Image.new("RGB", (96, 96))
    shifted.paste(picture, (7, 4))
    shifted.save(tmp_path / "images" / "b.png")
    points = [[20.0, 30.5], [50.25, 40.0], [70.0, 80.75]]
    record = {
        "src_imname": "a.png",
        "trg_imname": "b.png",
        "category": "thing",
        "trg_bndbox": [10, 10, 60, 90],
        "src_kps": points,
        "trg_kps": [[x + 7, y + 4] for x, y in points],
    }
    (tmp_path / "one.json").write_text(json.dumps(record))
    (pair,) = read_pairs(tmp_path / "one.json")
    assert pair.box_side == 80
    assert pair.points_a[0] == (20.5, 31.0)

    def colours(image, size, input_size):
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255 - 0.5
        features = F.interpolate(pixels, size, mode="bilinear")[0].permute(1, 2, 0)
        return torch.cat((features, torch.full((*size, 1), 0.3), features.square()), dim=-1)

    done = []
    scores = measure_matching(model, [pair, pair], functions={"colours": colours}, progress=done.append)
    by_name = {score.method: score for score in scores}
    assert by_name["colours"].pck == {"0.1": 1, "0.05": 1, "0.01": 1}
    assert by_name["colours"].pck_per_pair == {"0.1": 1, "0.05": 1, "0.01": 1}
    assert by_name["colours"].median_pixels < 0.5
    assert by_name["nearest"].pck["0.01"] < 0.5
    assert sum(done) == 2


def test_pck_counts_points_and_pairs():
    from vitup_fast.evaluation.keypoints import _score

    score = _score("m", [[0.0, 5.0, 11.0], [1.0]], [100.0, 10.0])
    assert score.pck == {"0.1": 0.75, "0.05": 0.5, "0.01": 0.25}
    assert score.pck_per_pair == pytest.approx({"0.1": (2 / 3 + 1) / 2, "0.05": 1 / 3, "0.01": 1 / 6})


def test_pairs_of_a_folder(folder, tmp_path):
    (tmp_path / "annotations").mkdir()
    pairs = json.loads((folder / "pairs.json").read_text())
    for index, pair in enumerate(pairs):
        (tmp_path / "annotations" / f"{index}.json").write_text(json.dumps(pair))
    assert read_pairs(tmp_path / "annotations", folder / "images") == read_pairs(folder / "pairs.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trg_kps": [[1, 2]]}, "as many keypoints in both"),
        ({"src_kps": [], "trg_kps": []}, "as many keypoints in both"),
        ({"src_kps": "abc"}, "as SPair-71k has them"),
        ({"trg_bndbox": [5, 5, 5, 5]}, "a box (left, top, right, bottom)"),
        ({"trg_bndbox": None}, "as SPair-71k has them"),
        ({"src_imname": "none.png"}, "expected the picture none.png"),
        ({"src_kps": [[1, 2], [1, 500]], "trg_kps": [[1, 2], [1, 5]]}, "keypoints within the 96 x 96 pixels"),
        ({"src_kps": [[1, math.nan]], "trg_kps": [[1, 2]]}, "keypoints within the 96 x 96 pixels"),
    ],
)
def test_pairs_that_are_refused(folder, tmp_path, change, words):
    pair = json.loads((folder / "pairs.json").read_text())[0] | change
    (tmp_path / "pairs.json").write_text(json.dumps([pair]))
    with pytest.raises(InputError) as error:
        read_pairs(tmp_path / "pairs.json", folder / "images")
    assert words in str(error.value)


def test_pairs_of_nothing(tmp_path):
    for content, words in (("[]", "at least one pair"), ("{", "is no JSON"), ("3", "as SPair-71k has them")):
        (tmp_path / "pairs.json").write_text(content)
        with pytest.raises(InputError, match=words):
            read_pairs(tmp_path / "pairs.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "none.json")


# The command line

RANDOM = ("--model", "tiny", "--weights", "random", "--device", "cpu")


def run(*arguments: object) -> int:
    return cli.main([str(a) for a in ("eval", *arguments)])


def test_command_line_from_scenes_to_tables(pictures, photographs, tmp_path, capsys):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    assert run("make-scenes", *pictures, "-o", scenes, "--scenes", 4, "--size", 64, "--seed", 1) == 0
    peer = tmp_path / "peer.py"
    peer.write_text("import torch\ndef ones(image, size, input_size):\n    return torch.ones(*size, 64)\n")
    with_peer = ("--method", f"peer={peer}:ones", *RANDOM)
    assert run("segmentation", scenes, "-o", out, "--size", 16, 16, *with_peer) == 0
    assert run("matching", scenes / "pairs.json", "-o", out, *with_peer) == 0
    assert run("faithfulness", photographs[0].parent, "-o", out, "--scales", 2, *with_peer) == 0
    printed = capsys.readouterr()
    for name in ("segmentation", "matching", "faithfulness"):
        table = (out / f"{name}.md").read_text()
        assert "| peer |" in table
        assert table in printed.out
        results = json.loads((out / f"{name}.json").read_text())
        assert results["settings"]["dtype"] == "float32"
        assert {row["method"] for row in results["results"]} >= {"nearest", "bilinear", "ViT-Up", "peer"}
    assert len(list((out / "features").iterdir())) == 2
    assert not list(out.glob(".*"))
    assert "100%" in printed.err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("peer", "--method: expected NAME=FILE.py:FUNCTION"),
        ("peer=none.py:f", "--method: none.py:f cannot be imported"),
        ("peer=math:none", "--method: math:none cannot be imported"),
        ("peer=math:pi", "--method: expected a function at math:pi, got float"),
        ("nearest=math:sin", "method: expected another name than"),
    ],
)
def test_methods_that_are_refused(photographs, tmp_path, capsys, method, words):
    assert run("faithfulness", photographs[0], "-o", tmp_path, "--method", method, *RANDOM) == 2
    assert words in one_sentence(capsys)


def test_command_line_refuses(tmp_path, capsys):
    assert run("segmentation", tmp_path / "none", "-o", tmp_path / "out", *RANDOM) == 2
    assert "images: expected a folder of pictures" in one_sentence(capsys)
    assert run("matching", tmp_path / "none.json", "-o", tmp_path / "out", *RANDOM) == 2
    assert "none.json: cannot be read" in one_sentence(capsys)
    assert run("make-scenes", tmp_path, tmp_path, "-o", tmp_path / "out") == 2
    assert "cutouts: expected a folder with pictures" in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_methods_take_a_size(model):
    image = smooth_picture((64, 64), 2)
    for name, method in methods_of(model, (32, 48)).items():
        features = method(image)
        assert features.coarse_size == ((2, 3) if name == "nearest" else (4, 6))
        dense = features.dense((4, 7))
        points = features.points(cell_centres(4, 7).flatten(0, 1)).view(4, 7, -1)
        torch.testing.assert_close(dense, points, rtol=1e-3, atol=1e-3)
        head = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.arange(3.0)
        torch.testing.assert_close(
            features.scores((4, 7), head), F.linear(dense, *head), rtol=1e-3, atol=1e-3
        )
