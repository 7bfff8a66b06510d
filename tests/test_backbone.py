from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitup_fast.errors import InputError
from vitup_fast.network import backbone as backbone_module
from vitup_fast.network.backbone import Backbone
from vitup_fast.network.checkpoint import attach_lora, load_backbone, merge_lora, split_published
from vitup_fast.network.config import ViTUpConfig

timm = pytest.importorskip("timm")
load_file = pytest.importorskip("safetensors.torch").load_file

PATHS = [backbone_module._embed_folded, backbone_module._embed_strips]
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
    got = embed(images, weight, bias, size, torch.float64)
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
    error = (embed(images, weight, bias, size, torch.float64) - want).abs().max()
    assert error < 1e-12 * (weight.abs().sum() + 1)


def test_strips_of_several_rows_and_without_bias(monkeypatch):
    monkeypatch.setattr(backbone_module, "_STRIP_ELEMENTS", 2 * 3 * 4 * 16**2 * 2)
    images = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    weight, _ = random_embedding()
    got = backbone_module._embed_strips(images, weight, None, (5, 4), torch.float64)
    assert relative_error(got, naive_embed(images, weight, None, (5, 4))) < 1e-12


def test_published_sizes_fold_and_never_hold_the_resized_image():
    weight = torch.randn(384, 3, 16, 16)
    for source, folds in [((448, 448), True), ((896, 896), True), ((480, 640), True), ((449, 449), False)]:
        assert backbone_module._folding_pays(torch.empty(1, 3, *source), weight, (224, 224)) is folds

    model = random_model("vit_small_plus_patch16_dinov3_qkvb", depth=1, swiglu_align_to=8).float()
    backbone = Backbone(model, (0,)).requires_grad_(False)
    for source in [(448, 448), (449, 451)]:
        with LargestTensor() as largest:
            grid = backbone.patch_grid(torch.randn(1, 3, *source), (224, 224))
        resized = 3 * 3584 * 3584 * 4
        assert max(largest.bytes, 4 * grid.numel()) == 4 * grid.numel() < resized / 10


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
    backbone_module._fold_axis.cache_clear()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    weight, bias = random_embedding()
    with torch.inference_mode():
        backbone_module._embed_folded(images, weight, bias, (4, 4), torch.float64)
    backbone_module._embed_folded(images, weight, bias, (4, 4), torch.float64).sum().backward()
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
            assert relative_error(a, b) < 1e-12
        assert relative_error(Backbone(model, (0,)).patch_grid(images, (10, 6)), want_grid) < 1e-12
        (second,) = Backbone(model, (2,)).hidden_states(images, size)
        assert relative_error(second, want[2]) < 1e-12


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
    with pytest.raises(InputError, match=r"vit_small_plus.*\(no network\).*backbone=PATH"):
        Backbone.create(ViTUpConfig.preset("tiny"), pretrained=True)
