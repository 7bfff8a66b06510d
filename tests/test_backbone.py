from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitup_fast.errors import InputError
from vitup_fast.network import patch_grid
from vitup_fast.network.backbone import Backbone
from vitup_fast.network.checkpoint import attach_lora, load_backbone, merge_lora, split_published
from vitup_fast.network.config import ViTUpConfig
from vitup_fast.ops import bilinear_sample

timm = pytest.importorskip("timm")
load_file = pytest.importorskip("safetensors.torch").load_file


def embed_folded(images, weight, bias, size, *, fold=True):
    embedding = patch_grid.Embedding(weight, bias, images.dtype)
    return patch_grid.embed_grid(images, embedding, size, lambda tokens, rows: tokens, fold=fold)


PATHS = [embed_folded, partial(embed_folded, fold=False)]
SIZES = [
    ((28, 28), (14, 14)),  # 448 -> 3584 at small scale
    ((56, 56), (14, 14)),  # 896 -> 3584
    ((15, 20), (7, 7)),  # 480 x 640 -> 3584
    ((7, 9), (14, 3)),
    ((1, 1), (3, 5)),
    ((1, 6), (4, 4)),
    ((48, 32), (3, 2)),  # no resize
    ((100, 70), (3, 2)),  # downscaling
    ((37, 5), (2, 9)),  # both
]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parent / "data" / "dinov3_lora_tiny.safetensors")


def part(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def golden_backbone(golden) -> Backbone:
    backbone = Backbone.create(ViTUpConfig.preset("tiny")).double()
    load_backbone(backbone, part(golden, "hf."))
    return backbone


def relative_error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def random_model(name, depth=3, **options):
    torch.manual_seed(3)
    model = timm.create_model(
        name, num_classes=0, dynamic_img_size=True, embed_dim=32, depth=depth, num_heads=2, **options
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_embedding(channels=3, dim=6, patch=16):
    weight = torch.randn(dim, channels, patch, patch, dtype=torch.float64, requires_grad=True)
    return weight, torch.randn(dim, dtype=torch.float64)


def naive_embed(images, weight, bias, size):
    """[B, C, H, W] -> [B, P, Q, D], by the definition."""
    patch = weight.shape[-1]
    resized = F.interpolate(images, (size[0] * patch, size[1] * patch), mode="bilinear", align_corners=False)
    return F.conv2d(resized, weight, bias, stride=patch).permute(0, 2, 3, 1)


class LargestTensor(TorchDispatchMode):
    """Record the largest storage any operation returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("load_lora", [merge_lora, attach_lora])
def test_golden_hidden_states_and_patch_grid(golden, load_lora):
    backbone = golden_backbone(golden)
    load_lora(backbone, split_published(part(golden, "published.")).lora)
    images = golden["pixel_values"].double()
    with torch.no_grad():
        states = backbone.hidden_states(images, (64, 64))
        grid = backbone.patch_grid(images, (8, 8))
    for i, state in enumerate(states):
        assert relative_error(state, golden[f"hidden_states.{i}"]) < 1e-6
    assert relative_error(grid, golden["patch_grid"]) < 1e-12


def test_adapters_disabled_is_the_base_model(golden):
    base, adapted = golden_backbone(golden), golden_backbone(golden)
    attach_lora(adapted, split_published(part(golden, "published.")).lora)
    images = golden["pixel_values"].double()
    want = [*base.hidden_states(images, (64, 64)), base.patch_grid(images, (8, 8))]
    with adapted.adapters_disabled():
        with adapted.adapters_disabled():
            pass
        got = [*adapted.hidden_states(images, (64, 64)), adapted.patch_grid(images, (8, 8))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert relative_error(adapted.patch_grid(images, (8, 8)), want[-1]) > 0.1


@pytest.mark.parametrize("embed", PATHS)
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_patch_grid_paths_and_their_gradients_meet_the_definition(embed, source, size):
    images = torch.randn(2, 3, *source, dtype=torch.float64, requires_grad=True)
    weight, bias = random_embedding()
    want = naive_embed(images, weight, bias, size)
    got = embed(images, weight, bias, size)
    assert relative_error(got, want) < 1e-12
    cotangent = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, (images, weight), cotangent)
    got_grads = torch.autograd.grad(got, (images, weight), cotangent)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert relative_error(a, b) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    patch=st.sampled_from([1, 3, 8, 14]),
    embed=st.sampled_from(PATHS),
    seed=st.integers(0, 2**31),
)
def test_patch_grid_paths_for_any_size(source, size, patch, embed, seed):
    torch.manual_seed(seed)
    images = torch.randn(1, 2, *source, dtype=torch.float64)
    weight, bias = random_embedding(channels=2, dim=3, patch=patch)
    weight = weight.detach()
    want = naive_embed(images, weight, bias, size)
    error = (embed(images, weight, bias, size) - want).abs().max()
    assert error < 1e-12 * (weight.abs().sum() + 1)


def test_strips_of_several_rows_and_without_bias(monkeypatch):
    monkeypatch.setattr(patch_grid, "_STRIP_ELEMENTS", 2 * 3 * 4 * 16**2 * 2)
    images = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    weight, _ = random_embedding()
    for embed, grad in itertools.product(PATHS, (True, False)):
        with torch.set_grad_enabled(grad):
            got = embed(images, weight, None, (5, 4))
        assert got.requires_grad is grad
        assert relative_error(got, naive_embed(images, weight, None, (5, 4))) < 1e-12


def test_small_images_fold_and_the_resized_image_never_exists():
    for source, folds in [((448, 448), True), ((480, 640), True), ((449, 449), True), ((2999, 99), False)]:
        assert patch_grid.folding_pays(torch.empty(1, 3, *source), 16, (224, 224)) is folds

    model = random_model("vit_small_plus_patch16_dinov3_qkvb", depth=1, swiglu_align_to=8).float()
    backbone = Backbone(model, (0,)).requires_grad_(False)
    for source in [(448, 448), (449, 451)]:
        with LargestTensor() as largest:
            grid = backbone.patch_grid(torch.randn(1, 3, *source), (224, 224))
        resized = 3 * 3584 * 3584 * 4
        assert max(largest.bytes, 4 * grid.numel()) == 4 * grid.numel() < resized / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["rows folded", "rows interpolated", "a kernel for each row", "places"])
def test_patch_grids_are_as_exact_as_plain_pytorch(monkeypatch, dtype, way):
    """Errors against float64, in units of those of resizing and convolving in the same dtype."""
    # The compiled way is in tests/test_cpu_kernels.py.
    monkeypatch.setattr(patch_grid, "_takes_compiled", lambda *_: False)
    torch.manual_seed(5)
    source, size = ((57, 90) if way == "a kernel for each row" else (60, 90)), (40, 48)
    images, weight = torch.randn(2, 3, *source), torch.randn(96, 3, 16, 16)
    bias = torch.randn(96)
    exact = naive_embed(images.double(), weight.double(), bias.double(), size)
    images, weight, bias = images.to(dtype), weight.to(dtype), bias.to(dtype)
    plain = (naive_embed(images, weight, bias, size).double() - exact).norm()
    embedding, wide = patch_grid.Embedding(weight, bias, dtype), images.float()
    if way == "places":
        every = torch.ones(2, *size).nonzero()
        got = patch_grid.embed_places(wide, embedding, size, every, lambda tokens, *place: tokens)
    else:
        fold = way != "rows interpolated"
        got = patch_grid.embed_grid(wide, embedding, size, lambda tokens, rows: tokens, fold=fold)
    assert got.dtype == dtype
    assert (got.double() - exact).norm() < 1.5 * plain


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("grad", [True, False])
def test_patches_that_coordinates_touch(name, grad):
    backbone = Backbone(random_model(name), (0,))
    images = torch.randn(2, 3, 31, 44, dtype=torch.float64)
    coords = torch.cat(
        (torch.rand(2, 9, 2) * 1.4 - 0.2, torch.tensor([[[0.0, 1.0], [0.5, torch.nan]]] * 2)), 1
    )
    with torch.set_grad_enabled(grad):
        whole, some = (backbone.patch_grid(images, (12, 20), at) for at in (None, coords))
        sampled = [bilinear_sample(grid, coords[:, :-1]) for grid in (whole, some)]
    assert relative_error(sampled[1], sampled[0]) < 1e-12
    computed = some.ne(0).any(-1)
    assert relative_error(some[computed], whole[computed]) < 1e-12
    assert 8 < computed.sum() < 100
    if grad:
        for grid in (whole, some):
            grid.square().sum().backward()
        with pytest.raises(InputError, match="coords: expected batch size 2"):
            backbone.patch_grid(images, (12, 20), coords[:1])


def test_patch_grid_trains_the_patch_embedding_adapter(golden):
    backbone = golden_backbone(golden)
    backbone.add_lora(rank=2)
    images = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    for parameter in backbone.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for source_size, size in [(images, (16, 24)), (images[..., :29, :31], (5, 7))]:
        backbone.zero_grad()
        backbone.patch_grid(source_size, size).square().sum().backward()
        got = [parameter.grad for parameter in backbone.lora_parameters()[:2]]
        backbone.zero_grad()
        proj = backbone.model.patch_embed.proj
        naive_embed(source_size, proj.weight, proj.bias, size).square().sum().backward()
        for a, parameter in zip(got, backbone.lora_parameters()[:2], strict=True):
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(a, parameter.grad, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for n, p in backbone.named_parameters() if "lora_" not in n)


def test_patch_grid_in_low_precision_and_autocast():
    backbone = Backbone(random_model("vit_tiny_patch16_224"), (0,)).requires_grad_(False)
    images = torch.rand(1, 3, 20, 24)
    want = backbone.patch_grid(images, (10, 12))
    assert want.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(backbone.float().patch_grid(images, (10, 12)), want) < 0.02
    got = backbone.bfloat16().patch_grid(images, (10, 12))
    assert got.dtype == torch.bfloat16
    assert relative_error(got.double(), want) < 0.02


def test_a_first_call_in_inference_mode_does_not_spoil_training():
    patch_grid.plan_axis.cache_clear()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    weight, bias = random_embedding()
    with torch.inference_mode():
        embed_folded(images, weight, bias, (4, 4))
    embed_folded(images, weight, bias, (4, 4)).sum().backward()
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("vit_small_patch14_reg4_dinov2", 14),
        ("vit_tiny_patch16_224", 16),
        ("vit_base_patch16_clip_224", 16),
        ("eva02_tiny_patch14_224", 14),
    ],
)
def test_hidden_states_and_patch_grid_with_learned_positions(name, patch):
    model = random_model(name).eval()
    images = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    size = (3 * patch, 5 * patch)

    def embedding(resized, rows, columns):
        """Walk through the model's own modules; prefix tokens and what timm adds to every token."""
        tokens = model.patch_embed(resized).reshape(len(resized), rows, columns, -1)
        tokens = model._pos_embed(tokens)
        tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
        return model.norm_pre(tokens), rope

    def spatial(tokens, rows, columns):
        return tokens[:, model.num_prefix_tokens :].reshape(len(tokens), rows, columns, -1)

    with torch.no_grad():
        tokens, rope = embedding(F.interpolate(images, size, mode="bilinear"), 3, 5)
        want = [spatial(tokens, 3, 5)]
        for i, block in enumerate(model.blocks):
            tokens = block(tokens) if rope is None else block(tokens, rope=rope)
            norm = model.blocks[i + 1].norm1 if i + 1 < len(model.blocks) else model.norm
            want.append(spatial(norm(tokens), 3, 5))
        big = F.interpolate(images, (10 * patch, 6 * patch), mode="bilinear")
        want_grid = spatial(embedding(big, 10, 6)[0], 10, 6)

        got = Backbone(model, (0, 1, 2, 3)).hidden_states(images, size)
        for a, b in zip(got, want, strict=True):
            assert a.shape == (2, 3, 5, 32)
            assert relative_error(a, b) < 1e-7  # timm resizes positions in float32
        assert relative_error(Backbone(model, (0,)).patch_grid(images, (10, 6)), want_grid) < 1e-7
        (second,) = Backbone(model, (2,)).hidden_states(images, size)
        assert relative_error(second, want[2]) < 1e-7


def test_hidden_states_stop_at_the_deepest_depth():
    backbone = Backbone(random_model("vit_tiny_patch16_224"), (0, 2))
    ran = []
    for i, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    backbone.hidden_states(torch.randn(1, 3, 32, 32), (32, 32))
    assert ran == [0, 1]


def test_lora_starts_without_effect_trains_and_merges(golden):
    backbone = golden_backbone(golden)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = backbone.hidden_states(images, (32, 32))[-1]
    backbone.add_lora(rank=3)
    torch.testing.assert_close(backbone.hidden_states(images, (32, 32))[-1], before)
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == {
        n for n, _ in backbone.named_parameters() if "lora_" in n
    }
    for parameter in backbone.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = backbone.hidden_states(images, (32, 32))[-1]
    assert relative_error(adapted, before) > 1e-2
    adapted.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in backbone.lora_parameters())

    published = backbone.lora_state_dict()
    names = set(backbone.state_dict())
    backbone.merge_lora()
    torch.testing.assert_close(backbone.hidden_states(images, (32, 32))[-1], adapted, rtol=1e-12, atol=1e-12)
    assert backbone.lora_parameters() == []
    assert not any("lora_" in name for name in backbone.state_dict())
    assert any("lora_" in name for name in names)

    other = golden_backbone(golden)
    attach_lora(other, published)
    torch.testing.assert_close(other.hidden_states(images, (32, 32))[-1], adapted, rtol=1e-12, atol=1e-12)
    assert published.keys() == split_published(part(golden, "published.")).lora.keys()


def test_lora_errors(golden):
    backbone = golden_backbone(golden)
    with pytest.raises(InputError, match="rank"):
        backbone.add_lora(rank=0)
    backbone.add_lora(rank=1)
    with pytest.raises(InputError, match="merge_lora"):
        backbone.add_lora(rank=1)
    unfused = Backbone(random_model("eva02_tiny_patch14_224", qkv_fused=False), (0, 1))
    with pytest.raises(InputError, match="qkv_fused"):
        unfused.add_lora(rank=1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), "images: expected shape"),
        (torch.rand(1, 4, 8, 8), "images: expected shape"),
        (torch.rand(1, 3, 0, 8), "images: expected shape"),
        (torch.rand(0, 3, 8, 8), "images: expected shape"),
        (torch.ones(1, 3, 8, 8, dtype=torch.uint8), "images: expected a floating dtype"),
    ],
)
def test_bad_images(images, message):
    backbone = Backbone(random_model("vit_tiny_patch16_224"), (0, 1))
    with pytest.raises(InputError, match=message):
        backbone.hidden_states(images, (32, 32))
    with pytest.raises(InputError, match=message):
        backbone.patch_grid(images, (2, 2))


def test_bad_sizes():
    backbone = Backbone(random_model("vit_tiny_patch16_224"), (0, 1))
    images = torch.rand(1, 3, 8, 8)
    for size in [(32, 33), (0, 32), (32,), 32, (32.0, 32.0)]:
        with pytest.raises(InputError, match="multiples of 16"):
            backbone.hidden_states(images, size)
    for size in [(0, 1), (-1, 1), (1, 2, 3)]:
        with pytest.raises(InputError, match="size: expected two positive integers"):
            backbone.patch_grid(images, size)


def test_bad_models():
    model = random_model("vit_tiny_patch16_224")
    with pytest.raises(InputError, match="layer_indices: expected depths from 0 to 3"):
        Backbone(model, (0, 4))
    with pytest.raises(InputError, match="patch_embed, blocks"):
        Backbone(torch.nn.Linear(2, 2), (0,))
    with pytest.raises(InputError, match="square patches"):
        Backbone(random_model("vit_tiny_patch16_224", patch_size=(16, 8)), (0,))
    with pytest.raises(InputError, match="dynamic_img_size=True"):
        Backbone(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), (0,))


def test_create():
    backbone = Backbone.create(ViTUpConfig.preset("tiny"))
    assert (backbone.patch_size, backbone.dim, backbone.layer_indices) == (16, 64, (0, 2, 4))
    sizes = {"dim": 32, "num_heads": 2, "layer_indices": (0, 1)}
    with pytest.raises(InputError, match=r"config\.backbone"):
        Backbone.create(ViTUpConfig(**sizes))
    with pytest.raises(InputError, match="could not build 'no_such_model'"):
        Backbone.create(ViTUpConfig(**sizes, backbone="no_such_model"))


def test_pretrained_weights_out_of_reach(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"vit_small_plus.*\(no network\).*backbone_weights=PATH"):
        Backbone.create(ViTUpConfig.preset("tiny"), pretrained=True)


class Adapter(nn.Module):
    """A wrapper as peft makes it: it shows the layer's parameters and computes something else."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x):
        return 1.5 * self.base_layer(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def patched(layer):
    layer.forward = lambda x: x
    return layer


def hooked(layer, register="register_forward_hook"):
    getattr(layer, register)(lambda *_: None)
    return layer


HOOKS = {
    name: lambda layer, name=name: hooked(layer, f"register_{name}")
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
}
CHANGES = {
    "a wrapper": (Adapter, "Adapter with a forward of its own"),
    "weight_norm": (weight_norm, "a hook before it: WeightNorm"),
    "spectral_norm": (spectral_norm, "a hook before it: SpectralNorm"),
    "prune": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "before it: RandomUnstructured"),
    "forward replaced": (patched, "with a forward of its own"),
    **{name: (change, "got a hook .*: <lambda>") for name, change in HOOKS.items()},
}
PLACES = ("patch_embed.proj", "blocks.1.attn.qkv", "patch_embed", "")


def tiny_model():
    return random_model("vit_small_plus_patch16_dinov3_qkvb", swiglu_align_to=8)


def replace(model, place, change):
    """Change a submodule, or the model itself for an empty place."""
    if not place:
        return change(model)
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, change(model.get_submodule(place)))
    return model


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_layers_that_are_read_compute_what_their_parameters_say(place, change, message):
    """In Backbone: of the patch embedding the weight is read; timm itself reads that of a qkv layer with biases."""
    makes_weight = change in (weight_norm, spectral_norm) or "Unstructured" in message
    if makes_weight and not hasattr(tiny_model().get_submodule(place), "weight"):
        pytest.skip("no weight there")
    if change is Adapter and not place:
        pytest.skip("a wrapper of the whole model shows its parts, which compute as before")
    images = torch.rand(1, 3, 8, 8)
    name = f"model{'.' * bool(place)}{place}: expected a plain .*{message}"
    backbone = Backbone(tiny_model(), (0, 1))
    replace(backbone.model, place, change)
    for call in (
        lambda: backbone.hidden_states(images, (32, 32)),
        lambda: backbone.patch_grid(images, (2, 2)),
        lambda: Backbone(replace(tiny_model(), place, change), (0, 1)),
    ):
        with pytest.raises(InputError, match=name) as caught:
            call()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        parametrizations.weight_norm,
        lambda layer: prune.remove(prune.random_unstructured(layer, "weight", 0.5), "weight"),
    ],
)
@pytest.mark.parametrize("place", PLACES[:2])
def test_parametrizations_of_read_layers_are_honoured(place, change):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    backbone = Backbone(replace(tiny_model(), place, change), (0, 3))
    plain = tiny_model()
    plain.get_submodule(place).weight.data.copy_(backbone.model.get_submodule(place).weight)
    want = Backbone(plain, (0, 3))
    for mine, exact in zip(
        [*backbone.hidden_states(images, (32, 32)), backbone.patch_grid(images, (4, 4))],
        [*want.hidden_states(images, (32, 32)), want.patch_grid(images, (4, 4))],
        strict=True,
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
    sum(t.sum() for t in backbone.hidden_states(images, (32, 32))).backward()
    assert all(p.grad is not None for p in backbone.model.get_submodule(place).parameters())


@pytest.mark.parametrize("place", ["blocks.1.attn.proj", "blocks.1.mlp.fc2", "blocks.1.norm1", "norm"])
def test_wrappers_and_hooks_of_called_layers_work(place):
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    want = Backbone(tiny_model(), (0, 3)).hidden_states(images, (32, 32))[-1]
    calls = []
    backbone = Backbone(tiny_model(), (0, 3))
    backbone.model.get_submodule(place).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(backbone.hidden_states(images, (32, 32))[-1], want, rtol=0, atol=0)
    assert calls
    wrapped = Backbone(replace(tiny_model(), place, Adapter), (0, 3))
    assert relative_error(wrapped.hidden_states(images, (32, 32))[-1], want) > 1e-3


@pytest.mark.parametrize("place", ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.2.attn.proj"])
@pytest.mark.parametrize("change", [Adapter, weight_norm, parametrizations.weight_norm, CHANGES["prune"][0]])
def test_adapters_need_layers_with_a_weight_of_their_own(place, change):
    backbone = Backbone(tiny_model(), (0, 1))
    replace(backbone.model, place, change)
    names = set(backbone.state_dict())
    with pytest.raises(
        InputError, match=r"(embeddings|layer)\..*: expected a layer with a weight of its own"
    ):
        backbone.add_lora(rank=1)
    assert set(backbone.state_dict()) == names


def test_patch_embeddings_that_compute_something_else():
    for changes in ({"stride": 16, "padding": 1}, {"stride": 16, "groups": 3}, {"stride": 16, "dilation": 2}):
        model = tiny_model()
        model.patch_embed.proj = nn.Conv2d(3, 33, 16, **changes)
        with pytest.raises(InputError, match=r"convolution over square patches"):
            Backbone(model, (0,))
    model = tiny_model()
    model.patch_embed.proj = Scaled(3, 32, 16, 16)
    with pytest.raises(InputError, match=r"model\.patch_embed\.proj: .*Scaled with a forward of its own"):
        Backbone(model, (0,))
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0, dynamic_img_size=True, depth=1)
    with pytest.raises(InputError, match=r"model\.patch_embed: expected a plain PatchEmbed.*HybridEmbed"):
        Backbone(hybrid, (0,))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t.to(torch.complex64),
        lambda t: t.to(torch.float8_e4m3fn),
        lambda t: torch.nested.nested_tensor([t[0], t[0]]),
        lambda t: t.numpy(),
        lambda t: None,
        lambda t: "image.png",
    ],
)
def test_images_that_are_no_dense_floats(spoil):
    backbone, images = Backbone(tiny_model(), (0, 1)), spoil(torch.rand(1, 3, 8, 8))
    for call in (
        lambda: backbone.hidden_states(images, (32, 32)),
        lambda: backbone.patch_grid(images, (2, 2)),
    ):
        with pytest.raises(InputError, match="images: expected"):
            call()


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "2", None])
def test_ranks_that_are_no_counts(rank):
    backbone = Backbone(tiny_model(), (0, 1))
    with pytest.raises(InputError, match="rank: expected a positive integer"):
        backbone.add_lora(rank=rank)
    with pytest.raises(InputError, match="scaling: expected a finite number"):
        backbone.add_lora(rank=1, scaling=rank if isinstance(rank, str) else float("nan"))
    assert not backbone.lora_parameters()
    backbone.add_lora(rank=np.int64(2))


@contextlib.contextmanager
def defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_create_follows_defaults_except_for_rotary_periods(dtype, device):
    config = ViTUpConfig.preset("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        want = Backbone.create(config)
        torch.manual_seed(1)
        with defaults(dtype, device):
            backbone = Backbone.create(config)
            assert torch.get_default_dtype() == dtype
    for (name, mine), (other, exact) in zip(
        backbone.named_parameters(), want.named_parameters(), strict=True
    ):
        assert (name, mine.dtype, mine.device.type) == (other, dtype, device)
        assert device == "meta" or torch.equal(mine, exact.to(dtype))
    periods = backbone.model.rope.periods
    assert periods.dtype == torch.promote_types(dtype, torch.float32)
    if device == "meta":
        with pytest.raises(InputError, match="backbone: expected rotary periods that hold values"):
            backbone.to_empty(device="cpu")
    else:
        assert torch.equal(periods, want.model.rope.periods.to(periods.dtype))


STATES = {
    "inference": torch.inference_mode,
    "bfloat16 by default": lambda: defaults(torch.bfloat16, "cpu"),
    "float64 by default": lambda: defaults(torch.float64, "cpu"),
    "meta by default": lambda: defaults(torch.float32, "meta"),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("source", [(32, 32), (29, 31)], ids=["folded", "strips"])
@pytest.mark.parametrize("name", ["vit_small_plus_patch16_dinov3_qkvb", "vit_tiny_patch16_224"])
def test_hidden_states_and_patch_grid_in_every_state(state, source, name):
    """What a first call computes and keeps is that of any other call, for gradients too."""
    patch_grid.plan_axis.cache_clear()
    backbone = Backbone(random_model(name, **({"swiglu_align_to": 8} if "plus" in name else {})), (0, 3))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *source, generator=generator, dtype=torch.float64)

    def outputs():
        return [*backbone.hidden_states(images, (48, 80)), backbone.patch_grid(images, (16, 20))]

    with state():
        first = outputs()
    backbone_outputs = outputs()
    patch_grid.plan_axis.cache_clear()
    for mine, later, exact in zip(first, backbone_outputs, outputs(), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(later, exact, rtol=0, atol=0)
    sum(t.square().sum() for t in backbone_outputs).backward()
    assert backbone.model.patch_embed.proj.weight.grad.abs().max() > 0


class Both(nn.Module):
    """The two outputs of a backbone as one forward."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone.hidden_states(images, (32, 48))[-1], self.backbone.patch_grid(images, (16, 20))


@pytest.mark.parametrize(
    ("name", "source"),
    [("vit_small_plus_patch16_dinov3_qkvb", (29, 31)), ("vit_tiny_patch16_224", (32, 32))],
    ids=["rotary, strips", "learned positions, folded"],
)
def test_backbones_are_exported_and_compiled(name, source):
    options = {"swiglu_align_to": 8} if "plus" in name else {}
    model = random_model(name, depth=1, **options).eval().requires_grad_(False)
    both = Both(Backbone(model, (0, 1)))
    images = torch.randn(1, 3, *source, dtype=torch.float64)
    want = both(images)
    patch_grid.plan_axis.cache_clear()
    exported = torch.export.export(both, (images,), strict=False).module()
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
    for got in (exported(images), compiled(images), both(images)):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_plans_of_the_fine_grid_hold_numbers_alone():
    for source, patches, patch in itertools.product((1, 5, 16, 37, 448), (1, 3, 14), (8, 14)):
        axis = patch_grid.plan_axis(source, patches, patch)
        leaves = tree_leaves(tuple(axis))
        assert all(type(leaf) is int for leaf in leaves)
        sums = axis.matrices(range(axis.period)).sum(-1)
        torch.testing.assert_close(
            sums, torch.ones(axis.period, patch, dtype=torch.float64), rtol=0, atol=1e-12
        )


SIZES_OF_A_NETWORK = {"dim": 64, "num_heads": 2, "layer_indices": (0, 2)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, v) for name in ("dim", "num_heads", "hidden_layer_img_size", "patch_grid_density")
          for v in ("64", 64.0, True, 0, -64, None, float("nan"), [64], torch.tensor(64), np.float32(64))),
        *(("layer_indices", v) for v in ("012", b"\0\1", 3, None, (0, 1.0), ("0", "1"), (-1, 0), (0, True), (0, None))),
        *(("layer_indices", v) for v in ((), (0,), (1, 2), (0, 2, 2), (0, 3, 1), (float("nan"), 1))),
        *(("backbone", v) for v in (3, ["vit"], b"vit", nn.Identity())),
        *(("backbone_options", v) for v in (None, 3, {"ab": 1}, ("ab",), ((1, 2),), (("a", 1), ("a", 2)), "ab")),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_take_integers_that_fit(name, value):
    with pytest.raises(InputError, match=f"{name}: expected") as caught:
        ViTUpConfig(**SIZES_OF_A_NETWORK | {name: value})
    assert str(caught.value).isprintable()


def test_configurations_hold_plain_numbers():
    config = ViTUpConfig(
        np.int64(64),
        np.uint8(2),
        (i for i in np.array([0, 2])),
        backbone_options=[["depth", 4]],
        hidden_layer_img_size=np.int32(64),
    )
    assert config == ViTUpConfig(64, 2, (0, 2), backbone_options=(("depth", 4),), hidden_layer_img_size=64)
    assert {
        type(n) for n in (config.dim, config.num_heads, config.hidden_layer_img_size, *config.layer_indices)
    } == {int}
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("name", [3, None, [], {}, "large", "x" * 5000, "tiny\n"])
def test_presets_are_names(name):
    with pytest.raises(InputError, match="name: expected one of") as caught:
        ViTUpConfig.preset(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
