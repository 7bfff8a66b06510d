from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import vitup_fast
from vitup_fast import InputError, Upsampler, ViTUp, ViTUpConfig
from vitup_fast.images import MEAN, STD, normalise
from vitup_fast.network.backbone import Backbone
from vitup_fast.network.checkpoint import load_backbone, merge_lora, split_published
from vitup_fast.sources import WeightsUnavailableError, seeded_network

GOLDEN = Path(__file__).parent / "data" / "dinov3_lora_tiny.safetensors"
TINY = ViTUpConfig.preset("tiny")


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def prefixed(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def files(golden, tmp_path) -> tuple[Path, Path]:
    weights, backbone = tmp_path / "published.safetensors", tmp_path / "dinov3.safetensors"
    save_file(prefixed(golden, "published."), weights)
    save_file(prefixed(golden, "hf."), backbone)
    return weights, backbone


@pytest.fixture
def model() -> Upsampler:
    network, vit = seeded_network(TINY)
    return Upsampler(network, vit).eval().requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(3))


def coords(batch: int, count: int) -> torch.Tensor:
    return torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(4))


def test_golden_from_pixels_with_lora(golden):
    config = dataclasses.replace(TINY, patch_grid_density=2)
    network, vit = ViTUp(config), Backbone.create(config)
    published = split_published(prefixed(golden, "published."))
    network.load_state_dict(published.vit_up)
    load_backbone(vit, prefixed(golden, "hf."))
    merge_lora(vit, published.lora)
    model = Upsampler(network, vit).double().eval()
    with torch.no_grad():
        outputs = model(golden["pixel_values"].double(), golden["coords"].double(), return_all_layers=True)
    for i, output in enumerate(outputs):
        assert relative(output, golden[f"outputs.{i}"]) < 1e-6


def test_load_reads_published_files(files, golden):
    weights, backbone = files
    model = vitup_fast.load("tiny", weights, backbone, device="cpu", dtype=torch.float64)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model_config["weights"] == str(weights)
    hidden = model.backbone.hidden_states(golden["pixel_values"].double(), (64, 64))
    for i, state in enumerate(hidden):
        assert relative(state, golden[f"hidden_states.{i}"]) < 1e-6


def test_load_reads_training_checkpoints_with_their_backbone(golden, tmp_path):
    state = {
        f"vit_up._orig_mod.{k}": v for k, v in split_published(prefixed(golden, "published.")).vit_up.items()
    }
    state |= {k: v for k, v in prefixed(golden, "published.").items() if k.startswith("backbone.")}
    state |= {f"backbone.base_model.model.{k}": v for k, v in prefixed(golden, "hf.").items()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    model = vitup_fast.load("tiny", path, device="cpu", dtype=torch.float64)
    hidden = model.backbone.hidden_states(golden["pixel_values"].double(), (64, 64))
    assert relative(hidden[-1], golden["hidden_states.2"]) < 1e-6


def test_random_weights_are_seeded_and_announced():
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="random"):
        first = vitup_fast.load("tiny", "random", device="cpu")
    assert torch.equal(torch.rand(1), expected_next)  # the global generator is left alone
    with pytest.warns(UserWarning, match="random"):
        second = vitup_fast.load("vit_up_tiny", "random", device="cpu")
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_unreachable_weights_say_what_to_pass(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsUnavailableError, match=r"vit_up_dinov3_splus\.safetensors.*no network.*PATH"):
        vitup_fast.load("splus", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "dinov9"}, "model: expected one of"),
        ({"model": "tiny", "weights": "random", "device": "abacus"}, "device: expected a torch device"),
        ({"model": "tiny", "weights": "random", "dtype": "bf16"}, "dtype: expected a floating torch.dtype"),
        (
            {"model": "tiny", "weights": "random", "hidden_layer_img_size": 100},
            "multiples of the patch size 16",
        ),
        ({"model": "tiny", "weights": "random", "hidden_layer_img_size": (64, 0)}, "two positive integers"),
        ({"model": "tiny", "weights": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_load_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        vitup_fast.load(**{"device": "cpu", **arguments})


def test_load_refuses_a_checkpoint_of_another_size(files):
    with pytest.raises(InputError, match=r"vit_up_blocks.*"):
        vitup_fast.load("splus", files[0], files[1], device="cpu")


def test_calls_agree(model, images):
    query = coords(2, 9)
    direct = model(images, query)
    assert direct.shape == (2, 9, TINY.dim)
    model.set_images(images)
    torch.testing.assert_close(model(None, query), direct)
    assert torch.equal(model(query_coords=query), model(None, query))
    layers = model(None, query, return_all_layers=True)
    assert len(layers) == TINY.num_layers
    torch.testing.assert_close(layers[-1], direct)
    torch.testing.assert_close(model(None, query, query_chunk_size=2), direct)
    pixels = query * torch.tensor((70.0, 50.0))
    torch.testing.assert_close(model.points(pixels), direct, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.points(pixels[0])[0], direct[0], rtol=1e-4, atol=1e-4)
    cache = model.get_cache_data()
    torch.testing.assert_close(model.vit_up(cache[1], query[1:])[0], direct[1])


def test_single_images_and_pil(model):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    tensor = (
        torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)
    ) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalise(picture)[0], tensor)
    query = coords(1, 5)
    torch.testing.assert_close(model(picture, query), model(tensor, query))
    assert model.dense(picture).shape == (1, 40, 60, TINY.dim)
    grey = picture.convert("L")
    assert torch.isfinite(model(grey, query)).all()


def test_dense_is_forward_at_the_cell_centres(model, images):
    dense = model.dense(images, (6, 10))
    y, x = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(10) + 0.5) / 10, indexing="ij")
    centres = torch.stack((x, y), -1).flatten(0, 1).expand(2, -1, -1)
    torch.testing.assert_close(dense.flatten(1, 2), model(None, centres), rtol=1e-4, atol=1e-5)
    done: list[int] = []
    model.dense(None, (6, 10), query_chunk_size=20, progress=done.append)
    assert sum(done) == 60
    assert len(done) == 3


def test_images_need_not_be_square(images):
    network, vit = seeded_network(TINY)
    model = Upsampler(network, vit, hidden_layer_img_size=(48, 64)).requires_grad_(False)
    model.set_images(images)
    cache = model.get_cache_data()
    assert cache.token_grid == (3, 4)
    assert cache.patch_grid.shape[1:3] == (24, 32)
    assert model.dense(None, (5, 8)).shape == (2, 5, 8, TINY.dim)


def test_head_is_folded(model, images):
    head = nn.Linear(TINY.dim, 5)
    query = coords(2, 7)
    torch.testing.assert_close(
        model(images, query, head=head), head(model(None, query)), rtol=1e-4, atol=1e-5
    )
    scores = model.dense(None, (4, 6), head=nn.Conv2d(TINY.dim, 3, 1))
    assert scores.shape == (2, 4, 6, 3)


def test_labels_are_the_largest_scores(model, images):
    head, query = nn.Linear(TINY.dim, 5), coords(2, 7)
    pixels = query[0] * torch.tensor(images.shape[:1:-1])
    with torch.no_grad():
        for call in (
            lambda **options: model(images, query, **options),
            lambda **options: model.dense(None, (4, 6), **options),
            lambda **options: model.points(pixels, **options),
        ):
            labels, scores = call(head=head, labels=True), call(head=head)
            assert labels.dtype == torch.uint8
            assert torch.equal(labels.long(), scores.argmax(-1))


def test_gradients_flow_unless_disabled(model, images):
    pixels, query = images.requires_grad_(), coords(2, 6).requires_grad_()
    model(pixels, query).square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert query.grad.abs().sum() > 0
    with torch.no_grad():
        assert not model(images, query).requires_grad
    head = nn.Linear(TINY.dim, 2)
    model(images.detach(), query.detach(), head=head).sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_budgets_are_honoured(images):
    network, vit = seeded_network(TINY)
    plain = Upsampler(network, vit).requires_grad_(False)
    query = coords(2, 33)
    exact = plain(images, query)
    for budget in ({"query_chunk_size": 4}, {"max_memory": 200_000}):
        torch.testing.assert_close(Upsampler(network, vit, **budget)(images, query), exact)


def test_bfloat16_keeps_coordinates_and_constants(images):
    network, vit = seeded_network(TINY)
    model = Upsampler(network, vit).to(torch.bfloat16).requires_grad_(False)
    assert model.vit_up.rel_pos_enc.freqs.dtype == torch.float32
    close = torch.tensor([[[0.501, 0.5], [0.502, 0.5]]])  # one number in bfloat16
    features = model(images[:1], close)
    assert features.dtype == torch.bfloat16
    assert not torch.equal(features[:, 0], features[:, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(None, coords(1, 3)), "images: expected images, or a call of set_images"),
        (lambda m: m.set_images("cat.png"), "images: expected a tensor or a PIL image, got str"),
        (lambda m: m.set_images(torch.rand(3)), r"images: expected shape \(3, H, W\)"),
        (lambda m: m.set_images(torch.rand(4, 9, 9)), "images: expected shape"),
        (lambda m: m.set_images(torch.rand(1, 3, 0, 9)), "images: expected"),
        (lambda m: m.set_images(torch.ones(3, 9, 9, dtype=torch.uint8)), "images: expected a floating dtype"),
        (lambda m: m(torch.rand(3, 9, 9)), "query_coords: expected a tensor"),
        (lambda m: m(torch.rand(3, 9, 9), torch.rand(3, 2)), r"coords: expected shape \(B, N, 2\)"),
        (lambda m: m(torch.rand(3, 9, 9), coords(1, 3).half()), "coords: expected dtype float32 or float64"),
        (lambda m: m(torch.rand(3, 9, 9), coords(2, 3)), "coords: expected batch size 1"),
        (lambda m: m.dense(torch.rand(3, 9, 9), (4,)), "size: expected two positive integers"),
        (lambda m: m.points(torch.rand(3), torch.rand(3, 9, 9)), "pixels: expected a tensor of shape"),
        (lambda m: m.points(torch.ones(3, 2).long(), torch.rand(3, 9, 9)), "pixels: expected dtype"),
        (lambda m: m(torch.rand(3, 9, 9), coords(1, 3), head=nn.Linear(3, 2)), "head: expected a weight"),
    ],
)
def test_call_errors(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_parts_must_fit():
    network, _ = seeded_network(TINY)
    _, vit = seeded_network(dataclasses.replace(TINY, layer_indices=(0, 1, 4)))
    with pytest.raises(InputError, match="backbone: expected width 64 and depths"):
        Upsampler(network, vit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["forward", "points"])
def test_few_points_of_new_images_embed_the_patches_they_touch(model, images, dtype, method, monkeypatch):
    """Whatever is asked next, features are those of the whole fine grid."""
    model = model.to(dtype)
    monkeypatch.setattr("vitup_fast.upsampler._POINT_PATCHES", 4)
    embedded = []
    whole_grid = type(model.backbone).patch_grid
    monkeypatch.setattr(
        type(model.backbone),
        "patch_grid",
        lambda self, images, size, coords=None: (
            embedded.append(coords) or whole_grid(self, images, size, coords)
        ),
    )

    def ask(new, at):
        if method == "forward":
            return model(new, at)
        return model.points(at * at.new_tensor((70, 50)), new)

    queries = [torch.rand(2, n, 2) * 1.2 - 0.1 for n in (3, 7, 300, 5)]
    given = images.clone()
    features = [ask(given, queries[0])]
    given.fill_(torch.nan)
    features += [ask(None, at) for at in queries[1:]]
    assert [coords is not None for coords in embedded] == [True, True, False]
    features.append(model.dense(size=(3, 4)))
    assert len(embedded) == 3

    model.set_images(images)
    assert embedded.pop() is None
    exact = [*(ask(None, at) for at in queries), model.dense(size=(3, 4))]
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]
    for mine, whole in zip(features, exact, strict=True):
        assert relative(mine, whole.double()) < limit


def test_a_whole_map_follows_few_points(model, images):
    few = model(images, coords(2, 2))
    assert model.get_cache_data().patch_grid.ne(0).any(-1).all()
    torch.testing.assert_close(model(None, coords(2, 2)), few)
    model(images[:1], coords(1, 2))
    model.vit_up.decoder_mlp[-1].mlp[1].bias.data.add_(1.0)
    found = model.dense(size=(2, 2))
    model.set_images(images[:1])
    torch.testing.assert_close(found, model.dense(size=(2, 2)))
