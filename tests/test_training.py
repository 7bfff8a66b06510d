import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vitup_fast
from vitup_fast import InputError
from vitup_fast.training import Run, TrainingConfig
from vitup_fast.training import loop as loop_module
from vitup_fast.training.configuration import TRAINING_PRESETS
from vitup_fast.training.data import Crops, Placement, find_pictures
from vitup_fast.training.loop import BAD_BATCH, CHECKPOINT, LOG, NETWORK, PICTURE, World, learning_rate
from vitup_fast.training.losses import cosine_distance, normalised_l2, similarity_divergence
from vitup_fast.training.start import start_as_interpolation
from vitup_fast.training.supervision import Batch, Geometry, accumulate_gradients
from vitup_fast.training.teacher import Cache, Teacher, pixels

SMALL = {
    "samples": 6,
    "crop_size": 128,
    "teacher_sizes": (32, 64, 128),
    "student_sizes": (64,),
    "steps": 6,
    "warmup_steps": 2,
    "blocks": 3,
    "blocks_per_backward": 2,
    "picture_every": 0,
    "save_every": 100,
    "seed": 7,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for n in range(4):
        coarse = rng.integers(0, 256, (7 + n, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((260, 190 + 10 * n), Image.Resampling.BICUBIC).save(
            folder / f"{n}.png"
        )
    return folder


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cutouts")
    piece = np.zeros((40, 60, 4), dtype=np.uint8)
    piece[5:35, 10:50] = (250, 20, 20, 255)
    Image.fromarray(piece).save(folder / "red.png")
    return folder


def settings(pictures, **changes):
    return TrainingConfig.preset("tiny").changed({**SMALL, "data": [str(pictures)], **changes})


def make_run(pictures, folder, resume=False, **changes):
    return Run(settings(pictures, **changes), folder, backbone_weights="random", device="cpu", resume=resume)


def trained(run):
    run.train(progress=False)
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def numpy_losses(student, teacher):
    """The three losses of one scale, token by token in float64."""
    squared, cosines, divergence = [], [], []
    for images, targets in zip(student, teacher, strict=True):
        for s, t in zip(images, targets, strict=True):
            deviation = math.sqrt(((t - t.mean()) ** 2).mean() + 1e-5)
            squared.append((((s - t.mean()) / deviation - (t - t.mean()) / deviation) ** 2).mean())
            cosines.append(1 - s @ t / (np.linalg.norm(s) * np.linalg.norm(t)))
        count = len(images)
        for i in range(count):
            logs = []
            for tokens in (images, targets):
                unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
                scores = np.array([unit[i] @ unit[j] / 0.5 for j in range(count) if j != i])
                logs.append(scores - np.log(np.exp(scores).sum()))
            divergence.append((np.exp(logs[1]) * (logs[1] - logs[0])).sum())
    normaliser = count * max(math.log(count), 1.0)
    return np.mean(squared), np.mean(cosines), np.sum(divergence) / len(student) / normaliser


@pytest.mark.parametrize("tokens", [2, 9])
def test_losses_are_the_definitions(tokens):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, tokens, 16, dtype=torch.float64, generator=generator) + 0.3
    want = numpy_losses(student.numpy(), teacher.numpy())
    got = [kind(student, teacher) for kind in (normalised_l2, cosine_distance, similarity_divergence)]
    for a, b in zip(got, want, strict=True):
        assert a.item() == pytest.approx(b, rel=1e-10)
    for kind in (normalised_l2, cosine_distance, similarity_divergence):
        assert kind(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_blocks_are_tokens_of_the_smallest_size():
    geometry = Geometry((2, 4, 8))
    assert (geometry.block, geometry.blocks) == (4, 4)
    blocks = torch.tensor([3, 0, 2])
    cells = geometry.cells(blocks)
    assert cells.shape == (3, 16, 2)
    fine = torch.randn(8, 8, 5)
    assert torch.equal(
        geometry.tokens(fine, blocks),
        torch.stack([fine[y, x] for x, y in cells.flatten(0, 1)]).view(3, 16, 5),
    )
    for side in (2, 4, 8):
        pooled = F.avg_pool2d(fine.permute(2, 0, 1), 8 // side).permute(1, 2, 0)
        got = geometry.pooled(geometry.tokens(fine, blocks), side)
        torch.testing.assert_close(got, geometry.tokens(pooled, blocks))


def test_queries_lie_where_the_crop_lies_in_its_container():
    config = settings(".", relative_size=(0.2, 0.7)).changed({"crop_size": 128})
    rng = np.random.default_rng(3)
    for _ in range(20):
        placement = Placement.draw(config, rng)
        assert 0.2 * 128 - 1 <= placement.side <= 0.7 * 128 + 1
        assert placement.left + placement.side <= 128
        container = placement.contain(torch.full((3, 128, 128), 5.0), rng)
        inside = (container - 5).abs().amax(0) < 1e-4
        assert inside.sum() == placement.side**2
        cells = torch.tensor([[0, 0], [7, 7]])
        x, y = (placement.coords(cells, 8) * 128).T
        step = placement.side / 8
        assert x.tolist() == pytest.approx(
            [placement.left + step / 2, placement.left + placement.side - step / 2]
        )
        assert y.tolist() == pytest.approx(
            [placement.top + step / 2, placement.top + placement.side - step / 2]
        )
    noise = container[:, ~inside]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_crops_are_the_same_whenever_they_are_made(pictures, cutouts):
    config = settings(pictures, cutouts=str(cutouts), cutout_probability=0.5)
    first, again = Crops(config), Crops(config)
    made = [first[k] for k in range(12)]
    assert all(torch.equal(again[k], made[k]) for k in (11, 0, 5))
    assert all(crop.shape == (3, 128, 128) and crop.dtype == torch.uint8 for crop in made)
    assert len({crop.numpy().tobytes() for crop in made}) == 12
    other = Crops(settings(pictures, seed=8))
    assert not torch.equal(other[0], made[0])
    assert first.digest == again.digest != other.digest


def test_pictures_of_shards_are_those_of_the_folder(pictures, tmp_path):
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as file:
        for path in sorted(pictures.iterdir()):
            file.add(path, path.name)
    folder, tar = (Crops(settings(data)) for data in (pictures, shard))
    assert len(tar.pictures) == 4
    assert all(torch.equal(folder[k], tar[k]) for k in range(5))


def test_broken_pictures_are_skipped_named_and_too_many_stop(pictures, tmp_path):
    for n in range(20):
        (tmp_path / f"{n:02d}.png").write_bytes((pictures / f"{n % 4}.png").read_bytes())
    (tmp_path / "03.png").write_bytes(b"no picture")
    crops = Crops(settings(tmp_path))
    for k in range(20):
        crops[k]
    assert [picture.path for picture in crops.broken.errors] == [str(tmp_path / "03.png")]
    for n in range(5):
        (tmp_path / f"{n:02d}.png").write_bytes(b"no picture")
    crops = Crops(settings(tmp_path))
    with pytest.raises(InputError, match=r"3 of 20 pictures are broken, the last: .*png"):
        [crops[k] for k in range(40)]


@pytest.mark.parametrize("source", ["missing", "empty", "file.txt", "broken.tar"])
def test_data_that_is_none_is_named(tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no picture")
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(InputError, match=rf"^data: .*{source}"):
        find_pictures([str(tmp_path / source)])


def test_settings_travel_through_yaml_and_mistakes_are_named(tmp_path, pictures):
    for name in TRAINING_PRESETS:
        config = TrainingConfig.preset(name)
        config.write(tmp_path / "c.yaml")
        assert TrainingConfig.read(tmp_path / "c.yaml") == config
    (tmp_path / "p.yaml").write_text("preset: tiny\nlearning_rate: 3e-5\nteacher_sizes: [64, 128]\n")
    read = TrainingConfig.read(tmp_path / "p.yaml")
    assert (read.learning_rate, read.teacher_sizes, read.network) == (3e-5, (64, 128), "tiny")
    for change, message in {
        "learning_rat": "Did you mean learning_rate",
        "steps": "steps: expected an integer",
        "crop_scale": "crop_scale: expected two",
        "teacher_sizes": "teacher_sizes: expected",
        "bfloat16": "true or false",
        "network": "network: expected one of",
        "relative_size": "ascending",
        "depth_weights": "depth_weights: expected 3 numbers",
    }.items():
        bad = {
            "steps": 1.5,
            "crop_scale": [0.1],
            "teacher_sizes": [64, 100],
            "bfloat16": "maybe",
            "network": "huge",
            "relative_size": [0.9, 0.1],
            "depth_weights": [1, 2],
        }
        with pytest.raises(InputError, match=message):
            settings(pictures, **{change: bad.get(change, 1)})
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is no YAML"):
        TrainingConfig.read(tmp_path / "bad.yaml")


def test_authors_numbers():
    config = TrainingConfig.preset("dinov3_splus")
    assert (config.lora_rank, config.batch_size, config.steps, config.warmup_steps) == (16, 24, 53381, 2669)
    assert learning_rate(config, 0) == pytest.approx(2e-6)
    assert learning_rate(config, 2669) == pytest.approx(2e-4)
    assert learning_rate(config, 53381) == pytest.approx(1e-6)
    assert learning_rate(config, (2669 + 53381) // 2) == pytest.approx(1.005e-4, rel=1e-3)


def test_training_learns_and_leaves_what_it_promises(pictures, tmp_path):
    run = make_run(pictures, tmp_path / "run", steps=40, start="random", learning_rate=3e-3, picture_every=20)
    path = run.train(progress=False)
    log = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [line["step"] for line in log] == [20, 40]
    assert log[1]["loss"] < 0.7 * log[0]["loss"]
    assert Image.open(tmp_path / "run" / PICTURE).size == (4 * 448 + 18, 470)
    assert path == tmp_path / "run" / NETWORK
    # The adapters learned too, and the teacher never sees them.
    assert any(p.abs().max() > 0 for name, p in run.parameters.items() if name.startswith("lora"))
    crops = torch.randn(1, 3, 128, 128)
    fresh = make_run(pictures, tmp_path / "other")
    for size, layers in run.teacher(crops).items():
        for layer, same in zip(layers, fresh.teacher(crops)[size], strict=True):
            assert torch.equal(layer, same)
    loaded = vitup_fast.load(path, backbone_weights="random", device="cpu", merge_adapters=False)
    for name, tensor in run.upsampler.vit_up.state_dict().items():
        assert torch.equal(loaded.vit_up.state_dict()[name], tensor)
    for name, tensor in run.upsampler.backbone.lora_state_dict().items():
        assert torch.equal(loaded.backbone.lora_state_dict()[name], tensor)


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "lora_rank": 0, "relative_size": (1.0, 1.0)}], ids=["lora", "ema"]
)
def test_resumed_runs_are_the_same_bit_by_bit(pictures, tmp_path, changes):
    changes = {**changes, "cache": str(tmp_path / "cache")}
    whole = make_run(pictures, tmp_path / "whole", **changes)
    expected = trained(whole)
    part = make_run(pictures, tmp_path / "part", **changes)
    begin = loop_module._any
    try:
        loop_module._any = lambda number, *_: signal.SIGTERM if part.step == 3 else 0
        with pytest.raises(vitup_fast.training.Interrupted, match="after step 3, and saved"):
            part.train(progress=False)
    finally:
        loop_module._any = begin
    with pytest.raises(InputError, match="--resume"):
        make_run(pictures, tmp_path / "part", **changes)
    with pytest.raises(InputError, match=r"learning_rate 0.001 -> 0.1"):
        make_run(pictures, tmp_path / "part", resume=True, **{**changes, "learning_rate": 0.1})
    rest = make_run(pictures, tmp_path / "part", resume=True, **changes)
    assert rest.step == 3
    got = trained(rest)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(torch.equal(rest.average[name], whole.average[name]) for name in whole.average)
    torch.save({"step": 1}, tmp_path / "part" / CHECKPOINT)
    with pytest.raises(InputError, match="is no checkpoint of a run"):
        make_run(pictures, tmp_path / "part", resume=True, **changes)


def test_two_processes_do_what_one_does_with_twice_the_batch(pictures, tmp_path):
    one = trained(make_run(pictures, tmp_path / "one", batch_size=4, steps=3))
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "from vitup_fast.training import Run, TrainingConfig\n"
        "config = TrainingConfig.read(sys.argv[1])\n"
        "run = Run(config, sys.argv[2], backbone_weights='random', device='cpu')\n"
        "run.train(progress=False)\n"
        "rank = os.environ['RANK']\n"
        "torch.save({n: p.detach() for n, p in run.parameters.items()}, f'{sys.argv[2]}/{rank}.pt')\n"
    )
    settings(pictures, batch_size=4, steps=3).write(tmp_path / "c.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(tmp_path / "c.yaml"), str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in (0, 1)]
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], value, rtol=2e-4, atol=2e-5)


def batch_of(run, seed=0):
    config, geometry = run.config, run.geometry
    crops = torch.stack([run.crops[k] for k in range(2)])
    features = run.teacher(pixels(crops, run.upsampler.backbone))
    rngs = [np.random.default_rng(seed + i) for i in range(2)]
    placements = [Placement.draw(config, rng) for rng in rngs]
    blocks = torch.arange(geometry.blocks).repeat(2, 1)
    return Batch(crops, features, placements, blocks, config.student_sizes[0], rngs)


def test_a_share_of_the_steps_sees_whole_pictures(pictures, tmp_path):
    seen = {}
    for share in (0.0, 0.4, 1.0):
        run = make_run(pictures, tmp_path / str(share), fill_probability=share, relative_size=(0.5, 0.8))
        examples = [next(run.examples.stream([k])) for k in range(2)]
        steps = []
        for run.step in range(40):
            batch = run._batch(examples, World(0, 1), 2)
            sides = {placement.side for placement in batch.placements}
            assert sides == {run.config.crop_size} or max(sides) <= 0.8 * run.config.crop_size + 1
            steps.append(sides == {run.config.crop_size})
        seen[share] = sum(steps)
    assert seen[0.0] == 0 < seen[0.4] < 40 == seen[1.0]


def test_memory_settings_do_not_change_gradients(pictures, tmp_path):
    gradients, losses = [], []
    for number, (blocks, checkpoint) in enumerate([(4, "op"), (4, "block"), (1, "op"), (3, "block")]):
        run = make_run(
            pictures,
            tmp_path / str(number),
            blocks_per_backward=blocks,
            checkpoint=checkpoint,
            similarity=0.0,
        )
        for p in run.upsampler.backbone.lora_parameters():
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
        losses.append(accumulate_gradients(run.upsampler, run.config, run.geometry, batch_of(run), 1.0))
        gradients.append({name: p.grad for name, p in run.parameters.items()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient.abs().max() > 0 or "gamma_beta" in name or "k_proj.bias" in name, name
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def saved_bytes(network, cache, coords, **options):
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = network(cache, coords, **options)
    owned = {p.untyped_storage().data_ptr() for p in network.parameters()}
    owned |= {b.untyped_storage().data_ptr() for b in network.buffers()}
    owned |= {t.untyped_storage().data_ptr() for t in (*cache.tensors, coords)}
    del output
    return sum(size for address, (size, _) in kept.items() if address not in owned)


def test_memory_kept_for_the_backward_pass():
    config = vitup_fast.ViTUpConfig(dim=384, num_heads=6, layer_indices=(0, 4, 8, 12))
    network = vitup_fast.ViTUp(config)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(1, 28, 28, 384, generator=generator) for _ in range(4)]
    cache = network.prepare(hidden, torch.randn(1, 56, 56, 384, generator=generator))
    coords = torch.rand(1, 512, 2, generator=generator)
    eager = saved_bytes(network, cache, coords, impl="reference")
    assert eager > 10 * saved_bytes(network, cache, coords, checkpoint="op")
    assert eager > 30 * saved_bytes(network, cache, coords, checkpoint="block")


def test_start_interpolates(pictures):
    torch.manual_seed(0)
    options = {"embed_dim": 128, "depth": 4, "num_heads": 2, "img_size": 518}
    upsampler = vitup_fast.Upsampler.create(
        "vit_small_patch14_dinov2",
        (0, 2, 4),
        backbone_weights="random",
        device="cpu",
        backbone_options=options,
    )
    network, backbone = upsampler.vit_up, upsampler.backbone
    crops = Crops(settings(pictures))
    images = [pixels(crops[k][None], backbone) for k in range(5)]
    start_as_interpolation(network, backbone, images[:4], (112, 112), (64, 64))
    with torch.no_grad():
        states = backbone.hidden_states(images[4], (112, 112))
        cache = network.prepare(states, backbone.patch_grid(images[4], (64, 64)))
        layers = network.dense(cache, (32, 32), return_all_layers=True)
        bilinear = F.interpolate(states[-1].permute(0, 3, 1, 2), (32, 32), mode="bilinear")
        cosine = F.cosine_similarity(layers[-1], bilinear.permute(0, 2, 3, 1), dim=-1)
        centres = network.dense(cache, (8, 8), return_all_layers=True)
        assert cosine.mean() > 0.8
        for state, centre in list(zip(states, centres, strict=True))[1:]:  # a query starts at no token
            assert F.cosine_similarity(centre, state, dim=-1).mean() > 0.9
        # Of what a query starts with little is left after its first step, however small patch embeddings are.
        other = network.dense(
            dataclasses.replace(cache, patch_grid=-cache.patch_grid), (32, 32), return_all_layers=True
        )
        for layer, same in list(zip(layers, other, strict=True))[1:]:
            assert F.cosine_similarity(layer, same, dim=-1).mean() > 0.85


def test_losses_that_are_not_finite_stop_with_their_batch(pictures, tmp_path):
    run = make_run(pictures, tmp_path / "run", steps=4, save_every=1)
    update = run._update

    def poisoned(batch, world):
        if run.step == 2:
            batch.features[128][-1].fill_(math.nan)
        return update(batch, world)

    run._update = poisoned
    with pytest.raises(InputError, match=r"loss nan at step 2.*last checkpoint is sound"):
        run.train(progress=False)
    saved = torch.load(tmp_path / "run" / BAD_BATCH)
    assert saved["step"] == 2
    assert saved["crops"].shape == (2, 3, 128, 128)
    assert torch.load(tmp_path / "run" / CHECKPOINT)["step"] == 2


def test_cached_features_are_the_teachers_and_broken_ones_are_named(pictures, tmp_path):
    run = make_run(pictures, tmp_path / "run", cache=str(tmp_path / "cache"))
    cache = run.examples.cache
    cache.fill([0, 3])
    assert cache.missing() == [1, 2, 4, 5]
    assert abs(cache.path(0).stat().st_size / cache.example_bytes - 1) < 0.05
    crop, features = cache[3]
    assert torch.equal(crop, run.crops[3])
    exact = run.teacher(pixels(crop[None], run.upsampler.backbone))
    for size, layers in features.items():
        for layer, same in zip(layers, exact[size], strict=True):
            assert torch.equal(layer, same[0].to(torch.bfloat16))
    cache.path(3).write_bytes(cache.path(3).read_bytes()[:1000])
    with pytest.raises(InputError, match="delete it"):
        cache[3]
    with pytest.raises(InputError, match="GiB free"):
        Cache(
            tmp_path / "large",
            run.crops,
            Teacher(run.upsampler.backbone, dataclasses.replace(run.config, samples=10**9)),
        ).fill(range(10**8))
    # Another seed makes other crops; none is taken for another.
    other = make_run(pictures, tmp_path / "other", cache=str(tmp_path / "cache"), seed=8)
    assert other.examples.cache.folder != cache.folder


def test_command_is_terminated_saved_and_resumed(pictures, tmp_path):
    settings(pictures, steps=400, save_every=1000).write(tmp_path / "c.yaml")
    command = [sys.executable, "-m", "vitup_fast.cli", "train", "--config", tmp_path / "c.yaml"]
    command += ["-o", tmp_path / "run", "--backbone-weights", "random", "--device", "cpu"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=variables)
    deadline = time.monotonic() + 120
    log = tmp_path / "run" / LOG
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "saved; go on with the same command and --resume" in errors
    step = torch.load(tmp_path / "run" / CHECKPOINT)["step"]
    assert step >= 20
    run = make_run(pictures, tmp_path / "run", resume=True, steps=400, save_every=1000)
    assert run.step == step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "learning_rat=1"], "Did you mean learning_rate"),
        (["--set", "steps"], "expected NAME=VALUE"),
        (["--data", "nowhere"], "data: expected folders of pictures"),
        ([], "data: expected folders of pictures, or tar files, got none"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, arguments, message):
    from vitup_fast.cli import main

    command = ["train", "--preset", "tiny", "-o", str(tmp_path / "run"), "--backbone-weights", "random"]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_are_printed(capsys):
    from vitup_fast.cli import main

    assert main(["train", "--preset", "tiny", "--settings", "--set", "steps=5"]) == 0
    assert "steps: 5\n" in capsys.readouterr().out
    assert main(["train", "--preset", "tiny"]) == 2
    assert "--output: expected a folder for the run" in capsys.readouterr().err
