"""Where networks come from: any timm backbone, backbone files of every origin, saved models, the hub."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

import vitup_fast
from vitup_fast import CheckpointError, InputError, Upsampler, ViTUpConfig, WeightsUnavailableError, sources
from vitup_fast.errors import MissingPackageError
from vitup_fast.network.backbone import Backbone, config_for
from vitup_fast.network.checkpoint import load_backbone, read_tensors, split_published
from vitup_fast.network.config import PRESETS
from vitup_fast.sources import seeded_network

timm = pytest.importorskip("timm")
huggingface_hub = pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).parents[1]
TINY = ViTUpConfig.preset("tiny")
SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2}
DINOV2 = "vit_small_patch14_dinov2"
REGISTERS = "vit_small_patch14_reg4_dinov2"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].view(bits[a[n].itemsize]), b[n].view(bits[b[n].itemsize]))
        for n in a
    )


def small_dinov2(name: str = DINOV2, **options: object) -> Backbone:
    config = ViTUpConfig(64, 2, (0, 3), name, tuple({**SMALL, "img_size": 56, **options}.items()))
    torch.manual_seed(0)
    backbone = Backbone.create(config)
    for parameter in backbone.parameters():  # LayerScale starts near zero, where nothing shows
        nn.init.normal_(parameter, std=0.2)
    return backbone


def adapted(seed: int = 1) -> Upsampler:
    """A model with adapters that do something."""
    network, vit = seeded_network(TINY)
    vit.add_lora(3, scaling=0.75)
    generator = torch.Generator().manual_seed(seed)
    for parameter in vit.lora_parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return Upsampler(network, vit)


def hugging_face_names(own_names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of timm's DINOv2, or its authors', as Hugging Face's Dinov2Model calls them."""
    tensors = {"embeddings.mask_token": torch.ones(1, 64)}
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "reg_token": "embeddings.register_tokens",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    }
    for name, tensor in own_names.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = rows
            continue
        own = next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name)
        own = re.sub(r"^blocks\.", "encoder.layer.", own).replace(".attn.proj.", ".attention.output.dense.")
        tensors[re.sub(r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1", own)] = tensor
    return tensors


@pytest.mark.parametrize(
    ("name", "options", "patch", "prefix", "mean"),
    [
        (DINOV2, {**SMALL, "img_size": 56}, 14, 1, 0.485),
        (REGISTERS, {**SMALL, "img_size": 56}, 14, 5, 0.485),
        ("vit_base_patch16_siglip_224", SMALL, 16, 0, 0.5),
        ("vit_base_patch16_clip_224", SMALL, 16, 1, 0.48145466),
        ("vit_tiny_patch16_224", SMALL, 16, 1, 0.5),
        ("vit_small_patch8_224", SMALL, 8, 1, 0.485),
        ("eva02_tiny_patch14_224", SMALL, 14, 1, 0.48145466),
        ("vit_small_patch16_dinov3", SMALL, 16, 5, 0.485),
        ("vit_base_patch16_rope_ape_224", SMALL, 16, 1, 0.485),
    ],
)
def test_any_vision_transformer(name, options, patch, prefix, mean):
    model = Upsampler.create(
        name, (0, 1, 3), backbone_weights="random", backbone_options=options, device="cpu",
        hidden_layer_img_size=4 * patch,
    )  # fmt: skip
    config = model.vit_up.config
    assert (config.dim, config.num_heads, config.layer_indices) == (64, 2, (0, 1, 3))
    assert config.hidden_layer_img_size == 448
    assert model.backbone.patch_size == patch
    assert model.backbone.model.num_prefix_tokens == prefix
    assert model.backbone.mean[0] == pytest.approx(mean)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    image = torch.randn(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    model(image, torch.rand(1, 5, 2), return_all_layers=True)[-1].square().sum().backward()
    assert all(p.grad is not None for n, p in model.vit_up.named_parameters() if "decoder_mlp.2" in n)
    assert model.get_cache_data().token_grid == (4, 4)
    # The tokens of the last depth are what timm itself calls the model's features.
    side = 4 * patch
    resized = nn.functional.interpolate(image, (side, side), mode="bilinear")
    tokens = model.backbone.model.forward_features(resized)[:, prefix:]
    hidden = model.backbone.hidden_states(image, (side, side))[-1]
    torch.testing.assert_close(hidden.flatten(1, 2), tokens)


def test_depths_and_sizes_are_found_out():
    assert config_for("vit_tiny_patch16_224").layer_indices == (0, 2, 4, 6, 8, 10, 12)
    large = config_for("vit_large_patch14_dinov2", backbone_options=(("img_size", 518),))
    assert large.layer_indices == (0, 4, 8, 12, 16, 20, 24)
    assert (large.dim, large.num_heads) == (1024, 16)
    assert config_for("vit_tiny_patch16_224", backbone_options=SMALL.items()).layer_indices == (0, 1, 2, 3)
    small = config_for(DINOV2, (0, 4, 8, 12), backbone_options=(("img_size", 518),))
    assert small == ViTUpConfig.preset("dinov2_small")
    assert config_for("vit_base_patch32_224").hidden_layer_img_size == 448


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet18"}, "backbone: timm could not build 'resnet18'"),
        ({"backbone": "no_such_model"}, "backbone: timm could not build 'no_such_model'"),
        ({"backbone": 3}, "backbone: expected the name of a timm model, got 3"),
        ({"backbone": ""}, "backbone: expected the name of a timm model"),
        ({"depths": (0, 13)}, "depths: expected depths from 0 to 12"),
        ({"depths": (1, 2)}, "layer_indices: expected at least two ascending depths from 0"),
        ({"dtype": "float32"}, "dtype: expected a floating torch.dtype"),
        ({"device": "abacus"}, "device: expected a torch device"),
        ({"hidden_layer_img_size": 100}, "hidden_layer_img_size: expected multiples of the patch size 16"),
        ({"backbone_weights": 3}, "backbone_weights: expected the path of a file"),
        ({"weights": "gone.safetensors"}, "gone.safetensors: no such file"),
    ],
)
def test_create_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        Upsampler.create(
            **{"backbone": "vit_tiny_patch16_224", "backbone_weights": "random", "device": "cpu", **arguments}
        )


def test_create_takes_a_configuration():
    config = dataclasses.replace(ViTUpConfig.preset("tiny"), patch_grid_density=4)
    upsampler = Upsampler.create(config, backbone_weights="random", device="cpu")
    assert upsampler.vit_up.config == config
    assert upsampler.backbone.layer_indices == config.layer_indices
    for name, value in (("depths", config.layer_indices), ("backbone_options", {})):
        with pytest.raises(InputError, match=f"{name}: expected None beside a configuration"):
            Upsampler.create(config, backbone_weights="random", device="cpu", **{name: value})
    with pytest.raises(InputError, match="backbone: expected a configuration that names its backbone"):
        Upsampler.create(dataclasses.replace(config, backbone=None), backbone_weights="random", device="cpu")


def test_models_of_a_hub_repository(tmp_path, monkeypatch):
    options = {**SMALL, "img_size": 56}
    torch.manual_seed(3)
    model = timm.create_model(DINOV2, num_classes=0, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    described = {"architecture": DINOV2, "num_classes": 0, "num_features": 64, "model_args": options}
    described["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(described))

    asked = []

    def download(repo_id, filename, revision=None, **_):
        assert repo_id == "someone/small-dinov2"
        asked.append(revision)
        if not (tmp_path / filename).exists():
            raise OSError(f"no {filename}")
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    upsampler = Upsampler.create("hf-hub:someone/small-dinov2", (0, 3), device="cpu")
    assert same(upsampler.backbone.model.state_dict(), model.state_dict())
    assert upsampler.backbone.mean == (0.1, 0.2, 0.3)
    assert (upsampler.vit_up.config.dim, upsampler.vit_up.config.backbone) == (
        64,
        "hf-hub:someone/small-dinov2",
    )
    assert set(asked) == {None}
    asked.clear()
    pinned = Upsampler.create("hf-hub:someone/small-dinov2@v1", (0, 3), device="cpu")
    assert set(asked) == {"v1"}
    assert pinned.vit_up.config.backbone == "hf-hub:someone/small-dinov2@v1"
    assert same(pinned.backbone.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("prefix", ["", "backbone.", "dinov2."])
def test_dinov2_under_hugging_faces_names(prefix):
    want, backbone = small_dinov2(), small_dinov2()
    tensors = {prefix + name: tensor for name, tensor in hugging_face_names(want.model.state_dict()).items()}
    if prefix:
        tensors |= {"classifier.weight": torch.ones(2, 2), "decoder.bias": torch.ones(2)}
    for parameter in backbone.parameters():
        nn.init.zeros_(parameter)
    load_backbone(backbone, tensors)
    assert same(backbone.state_dict(), want.state_dict())
    name = f"{prefix}encoder.layer.1.attention.attention.key.bias"
    with pytest.raises(CheckpointError, match=r"1 missing \(k bias of layer.1\)"):
        load_backbone(backbone, {n: t for n, t in tensors.items() if n != name})


def test_dinov2_with_registers_and_its_authors_names():
    backbone = small_dinov2(REGISTERS)
    tensors = backbone.model.state_dict()
    # Its authors add a position to the class token in every call; timm has added it beforehand.
    position = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(2))
    original = {
        **tensors,
        "cls_token": tensors["cls_token"] - position,
        "pos_embed": torch.cat((position, tensors["pos_embed"]), 1),
        "register_tokens": tensors["reg_token"],
        "mask_token": torch.ones(1, 64),
    }
    del original["reg_token"]
    for named in (original, hugging_face_names(original)):
        again = small_dinov2(REGISTERS)
        for parameter in again.parameters():
            nn.init.zeros_(parameter)
        load_backbone(again, named)
        for name, tensor in again.model.state_dict().items():
            torch.testing.assert_close(tensor, tensors[name])


def test_gated_dinov2_under_its_authors_names():
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4.0}
    want, backbone = small_dinov2(**gated), small_dinov2(**gated)
    tensors = {
        n.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): t
        for n, t in want.model.state_dict().items()
    }
    for parameter in backbone.parameters():
        nn.init.zeros_(parameter)
    load_backbone(backbone, tensors)
    assert same(backbone.state_dict(), want.state_dict())


def test_dinov3_under_its_authors_names():
    want, backbone = Backbone.create(TINY), Backbone.create(TINY)
    for parameter in want.parameters():
        nn.init.normal_(parameter)
    own = want.model.state_dict()
    names = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3", "reg_token": "storage_tokens"}
    original = {"mask_token": torch.ones(1, 64), "rope_embed.periods": torch.ones(8)}
    for name, tensor in own.items():
        renamed = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        original[re.sub("|".join(names), lambda match: names[match[0]], renamed)] = tensor
    masked = dict(original)
    for n in range(4):
        q, v = (original.pop(f"blocks.{n}.attn.{part}_bias") for part in "qv")
        joined, ones = f"blocks.{n}.attn.qkv.bias", torch.ones(64)
        original[joined] = torch.cat((q, torch.zeros(64), v))
        masked[joined] = torch.cat((q, torch.full((64,), 7.0), v))
        masked[f"{joined}_mask"] = torch.cat((ones, 0 * ones, ones))
        del masked[f"blocks.{n}.attn.q_bias"], masked[f"blocks.{n}.attn.v_bias"]
    for tensors in (original, masked):
        for parameter in backbone.parameters():
            nn.init.zeros_(parameter)
        load_backbone(backbone, tensors)
        assert same(backbone.state_dict(), want.state_dict())
    unmasked = {name: t for name, t in masked.items() if not name.endswith("_mask")}
    with pytest.raises(CheckpointError, match=r"the k bias of layer\.0 is not zero"):
        load_backbone(backbone, unmasked)
    with pytest.raises(CheckpointError, match="'reg_token' is there twice"):
        load_backbone(backbone, original | {"reg_token": own["reg_token"]})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {}, r"patch 16, width 64, blocks 3, .*backbone \(patch 14, width 64, blocks 3"),
        (DINOV2, {"embed_dim": 128}, r"\(patch 14, width 128, blocks 3, MLP width 512\).*\(patch 14, width 64"),
        (DINOV2, {"depth": 5}, r"\(patch 14, width 64, blocks 5\) than the backbone \(.*blocks 3\)\.$"),
        (DINOV2, {"mlp_ratio": 2.0}, r"MLP width 128\) than .*MLP width 256\)"),
        (REGISTERS, {}, r"register tokens 4\) than .*register tokens 0\)"),
        (DINOV2, {"img_size": 70}, r"position table 5 x 5\) than .*table 4 x 4\)\. Build the model for"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("names", ["timm", "hugging face"])
def test_a_file_of_another_backbone_is_named_as_such(tmp_path, name, options, message, names):
    other = small_dinov2(name, **options).model
    tensors = hugging_face_names(other.state_dict()) if names == "hugging face" else other.state_dict()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: holds another model .*") as caught:
        load_backbone(small_dinov2(), tmp_path / "other.safetensors")
    assert re.search(message, str(caught.value))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def onnx_file(path: Path, model: nn.Module) -> None:
    """Write a DINOv2 as PyTorch's exporter does: matrices transposed and anonymous, the position table in two."""
    onnx = pytest.importorskip("onnx")
    helper, initializers, nodes = onnx.helper, {}, []
    for name, tensor in hugging_face_names(model.state_dict()).items():
        if name == "embeddings.position_embeddings":
            initializers["onnx::Concat_7"] = tensor[:, :1]
            initializers["onnx::Reshape_8"] = tensor[:, 1:]
        elif name.endswith(".weight") and tensor.ndim == 2 and ".layer." in name:
            matrix, bias = f"onnx::MatMul_{len(nodes)}", f"backbone.{name.removesuffix('weight')}bias"
            initializers[matrix] = tensor.T
            product, order = f"/product_{len(nodes)}", -1 if len(nodes) % 4 else 1
            nodes.append(helper.make_node("MatMul", ["x", matrix], [product]))
            nodes.append(helper.make_node("Add", [bias, product][::order], [f"/sum_{len(nodes)}"]))
        elif "mask_token" not in name:
            initializers[f"backbone.{name}"] = tensor
    initializers["decoder.weight"] = torch.ones(2, 2)
    tables = [
        onnx.numpy_helper.from_array(t.contiguous().numpy(), name=name) for name, t in initializers.items()
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "dinov2", [helper.make_tensor_value_info("x", kind, [1, 3, 56, 56])],
        [helper.make_tensor_value_info(nodes[-1].output[0], kind, None)], tables,
    )  # fmt: skip
    onnx.save(helper.make_model(graph), path)


def test_onnx_files(tmp_path):
    want, backbone = small_dinov2(), small_dinov2()
    onnx_file(tmp_path / "dinov2.onnx", want.model)
    for parameter in backbone.parameters():
        nn.init.zeros_(parameter)
    load_backbone(backbone, tmp_path / "dinov2.onnx")
    assert same(backbone.state_dict(), want.state_dict())
    with pytest.raises(CheckpointError, match=r"dinov2\.onnx: holds another model .*blocks 3.*blocks 5"):
        load_backbone(small_dinov2(depth=5), tmp_path / "dinov2.onnx")
    content = (tmp_path / "dinov2.onnx").read_bytes()
    for name, damaged in (("cut", content[: len(content) // 2]), ("text", b"no protobuf"), ("empty", b"")):
        (tmp_path / f"{name}.onnx").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{name}\.onnx: "):
            load_backbone(backbone, tmp_path / f"{name}.onnx")
    assert same(backbone.state_dict(), want.state_dict())


def test_onnx_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"1")
    with pytest.raises(MissingPackageError, match=r"pip install 'vitup-fast\[onnx\]'"):
        load_backbone(small_dinov2(), tmp_path / "a.onnx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["none", "beside", "merged"])
@pytest.mark.parametrize("single", [False, True])
def test_saved_models_come_back_bit_for_bit(tmp_path, dtype, adapters, single):
    model = adapted() if adapters != "none" else Upsampler(*seeded_network(TINY))
    model = model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / ("net.safetensors" if single else "net")
    model.save_pretrained(path, merge_adapters=adapters == "merged")
    assert same(model.state_dict(), before)
    files = ["net.safetensors"] if single else ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path if single else path).iterdir()) == files
    loaded = vitup_fast.load(path, device="cpu", dtype=dtype, merge_adapters=False)
    if adapters == "merged":
        model.backbone.merge_lora()
    assert bool(loaded.backbone.lora_parameters()) == (adapters == "beside")
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.backbone.lora_scaling == model.backbone.lora_scaling
    assert loaded.vit_up.config == TINY
    assert not any(p.requires_grad for p in loaded.parameters())
    again = tmp_path / "again.safetensors"
    loaded.save_pretrained(again)
    assert same(read_tensors(again), read_tensors(path if single else path / "model.safetensors"))


def test_adapters_beside_have_their_published_names(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "net.safetensors")
    tensors = load_file(tmp_path / "net.safetensors")
    parts = split_published(tensors)
    assert same(parts.lora, model.backbone.lora_state_dict())
    assert {n for n in tensors if ".lora_" in n} == parts.lora.keys()
    assert "backbone.base_model.model.layer.1.attention.q_proj.lora_A.default.weight" in tensors
    assert same(parts.vit_up, model.vit_up.state_dict())
    base = seeded_network(TINY)[1]
    assert same(parts.backbone, base.model.state_dict())
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        header = json.loads(file.metadata()["vitup_fast"])
    assert header["lora_scaling"] == 0.75
    assert ViTUpConfig.from_dict(header["config"]) == TINY


def test_loading_merges_adapters_or_keeps_them(tmp_path):
    model, image, query = adapted().requires_grad_(False), torch.randn(1, 3, 50, 70), torch.rand(1, 9, 2)
    model.save_pretrained(tmp_path)
    merged = Upsampler.from_pretrained(tmp_path, device="cpu")
    kept = Upsampler.from_pretrained(tmp_path, device="cpu", merge_adapters=False)
    exact = model(image, query)
    assert torch.equal(kept(image, query), exact)
    torch.testing.assert_close(merged(image, query), exact, rtol=1e-4, atol=1e-5)
    with kept.backbone.adapters_disabled():
        assert (kept(image, query) - exact).norm() > 0.01 * exact.norm()
    with pytest.raises(InputError, match="include_backbone: expected True, since adapters are merged"):
        merged.save_pretrained(tmp_path / "small.safetensors", include_backbone=False)
    merged.save_pretrained(tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match=r"backbone_weights: expected the backbone in .*merged.safetensors"):
        vitup_fast.load(tmp_path / "merged.safetensors", backbone_weights="random", device="cpu")


def test_models_are_saved_in_another_dtype(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "net.safetensors", dtype=torch.bfloat16)
    loaded = vitup_fast.load(
        tmp_path / "net.safetensors", device="cpu", dtype=torch.bfloat16, merge_adapters=False
    )
    assert model.dtype == torch.float32
    assert same(loaded.state_dict(), model.to(torch.bfloat16).state_dict())
    assert load_file(tmp_path / "net.safetensors")["rel_pos_enc.freqs"].dtype == torch.float32
    with pytest.raises(InputError, match=r"dtype: expected a floating torch\.dtype"):
        model.save_pretrained(tmp_path / "b.safetensors", dtype=torch.int8)
    with torch.no_grad():
        model.float().vit_up.decoder_mlp[0].mlp[1].bias[0] = 7e4
    with pytest.raises(CheckpointError, match=r"numbers too large for torch\.float16"):
        model.save_pretrained(tmp_path / "b.safetensors", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_saved_files_may_be_read_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    Upsampler(*seeded_network(TINY)).save_pretrained(tmp_path / "net")
    modes = {path.stat().st_mode for path in (tmp_path / "other", *(tmp_path / "net").iterdir())}
    assert len(modes) == 1


def test_adapters_scaled_to_nothing_stay_so(tmp_path):
    network, vit = seeded_network(TINY)
    vit.add_lora(2, scaling=0.0)
    Upsampler(network, vit).save_pretrained(tmp_path)
    loaded = vitup_fast.load(tmp_path, device="cpu", merge_adapters=False)
    assert loaded.backbone.lora_scaling == 0


def test_files_without_the_backbone_take_it_from_where_it_is_named(tmp_path, monkeypatch):
    model = adapted()
    model.save_pretrained(tmp_path / "net.safetensors", include_backbone=False)
    base = seeded_network(TINY)[1]
    save_file(base.model.state_dict(), tmp_path / "base.safetensors")
    loaded = vitup_fast.load(
        tmp_path / "net.safetensors", None, tmp_path / "base.safetensors", "cpu", merge_adapters=False
    )
    assert same(loaded.state_dict(), model.state_dict())
    trained = Upsampler.create(
        TINY.backbone, TINY.layer_indices, tmp_path / "net.safetensors", tmp_path / "base.safetensors", "cpu",
        backbone_options=dict(TINY.backbone_options),
    )  # fmt: skip
    assert same(trained.state_dict(), model.state_dict())
    assert {id(p) for p in trained.parameters() if p.requires_grad} == {
        id(p) for p in (*trained.vit_up.parameters(), *trained.backbone.lora_parameters())
    }

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsUnavailableError, match=r"no network.*backbone_weights=PATH"):
        vitup_fast.load(tmp_path / "net.safetensors", device="cpu")


def test_the_configuration_travels_with_the_file(tmp_path):
    network, vit = seeded_network(TINY)
    Upsampler(network, vit, hidden_layer_img_size=(48, 80)).save_pretrained(tmp_path / "net")
    loaded = vitup_fast.load(str(tmp_path / "net"), device="cpu")
    assert loaded.hidden_layer_img_size == (48, 80)
    assert loaded.model_config["weights"] == str(tmp_path / "net")
    assert vitup_fast.load(
        tmp_path / "net", device="cpu", hidden_layer_img_size=64
    ).hidden_layer_img_size == (64, 64)
    assert vitup_fast.load("tiny", weights=tmp_path / "net", device="cpu").hidden_layer_img_size == (48, 80)
    written = json.loads((tmp_path / "net" / "config.json").read_text())
    assert ViTUpConfig.from_dict(written["config"]) == TINY
    card = (tmp_path / "net" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vitup_fast\n")
    assert "48 x 80 pixels" in card
    assert "| in | float32 |" in card
    (tmp_path / "net" / "README.md").write_text("my own words")
    loaded.save_pretrained(tmp_path / "net")
    assert (tmp_path / "net" / "README.md").read_text() == "my own words"


def test_a_timm_name_with_its_weights(tmp_path):
    model = Upsampler.create("vit_tiny_patch16_224", (0, 6, 12), backbone_weights="random", device="cpu")
    model.save_pretrained(tmp_path)
    loaded = vitup_fast.load("vit_tiny_patch16_224", weights=tmp_path, device="cpu")
    assert same(loaded.state_dict(), model.state_dict())
    with pytest.warns(UserWarning, match="vit_tiny_patch16_224: these are seeded random weights"):
        random = vitup_fast.load("vit_tiny_patch16_224", "random", device="cpu")
    assert random.vit_up.config.layer_indices == (0, 2, 4, 6, 8, 10, 12)
    with pytest.raises(
        InputError, match=r"weights: expected a file for vit_tiny_patch16_224.*Upsampler\.create"
    ):
        vitup_fast.load("vit_tiny_patch16_224", device="cpu")


def test_the_model_that_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SHIPPED_FOLDER", tmp_path)
    with pytest.raises(WeightsUnavailableError, match=r"vit_up_dinov2_small\.safetensors is missing"):
        vitup_fast.load("vit_up_dinov2_small", device="cpu")
    preset = ViTUpConfig.preset("dinov2_small")
    assert (preset.dim, preset.num_heads, preset.layer_indices) == (384, 6, (0, 4, 8, 12))
    options = tuple({**SMALL, **dict(preset.backbone_options)}.items())
    small = dataclasses.replace(
        preset, dim=64, num_heads=2, layer_indices=(0, 1, 3), backbone_options=options
    )
    monkeypatch.setitem(PRESETS, "dinov2_small", small)
    model = Upsampler.create(
        DINOV2, (0, 1, 3), backbone_weights="random", backbone_options=dict(options), device="cpu"
    )
    model.to(torch.bfloat16).save_pretrained(
        tmp_path / "vit_up_dinov2_small.safetensors", include_backbone=False
    )
    save_file(model.backbone.model.state_dict(), tmp_path / "backbone.safetensors")
    loaded = vitup_fast.load(
        "vit_up_dinov2_small", backbone_weights=tmp_path / "backbone.safetensors", device="cpu", dtype=torch.bfloat16
    )  # fmt: skip
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.hidden_layer_img_size == (448, 448)
    assert loaded.model_config["weights"] == "vit_up_dinov2_small"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    adapted().save_pretrained(path)
    return path


def test_files_of_another_kind_are_named_as_such(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds a network for dim 64, .*, not for dim 384"):
        vitup_fast.load("splus", saved, device="cpu")
    save_file(seeded_network(TINY)[1].model.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no ViT-Up network.*pass it as backbone_weights"):
        vitup_fast.load("tiny", tmp_path / "backbone.safetensors", device="cpu")
    with pytest.raises(CheckpointError, match=r"does not say which model it holds; name it"):
        vitup_fast.load(tmp_path / "backbone.safetensors", device="cpu")
    shallow = {n: t for n, t in load_file(saved / "model.safetensors").items() if ".blocks" not in n}
    shallow = {n: t for n, t in shallow.items() if "vit_up_blocks.1" not in n}
    save_file(shallow, tmp_path / "shallow.safetensors")
    with pytest.raises(CheckpointError, match=r"The checkpoint has 1 blocks, the network 2"):
        vitup_fast.load("tiny", tmp_path / "shallow.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere/", "model: expected one of"),
        ("./nowhere", "nowhere: no such file"),
        ("nowhere.safetensors", "nowhere.safetensors: no such file"),
        (Path("nowhere"), "nowhere: no such file"),
        ("no such model", "model: expected one of"),
        ("a/b/c", "model: expected one of"),
        ("", "model: expected one of"),
    ],
)
def test_models_that_are_nowhere(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        vitup_fast.load(model, device="cpu")
    with pytest.raises(InputError, match=message.replace("model:", "pretrained_model_name_or_path:")):
        Upsampler.from_pretrained(model, device="cpu")


def test_folders_and_arguments_that_do_not_fit(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"the folder holds no model\.safetensors"):
        vitup_fast.load(tmp_path, device="cpu")
    with pytest.raises(InputError, match="weights: expected None, since the model is a file"):
        vitup_fast.load(saved, "random", device="cpu")
    for name in ("model", "weights"):
        with pytest.raises(InputError, match=f"{name}: expected no such argument"):
            Upsampler.from_pretrained(saved, **{name: "tiny"})


@pytest.mark.parametrize(
    "change",
    [
        lambda h: "no JSON",
        lambda h: json.dumps([h]),
        lambda h: json.dumps({**h, "config": {**h["config"], "dim": 63}}),
        lambda h: json.dumps({**h, "config": {**h["config"], "depth_of_thought": 2}}),
        lambda h: json.dumps({n: v for n, v in h.items() if n != "config"}),
        lambda h: json.dumps({**h, "hidden_layer_img_size": [0, 448]}),
        lambda h: json.dumps({**h, "hidden_layer_img_size": [448]}),
        lambda h: json.dumps({**h, "lora_scaling": "much"}),
        lambda h: json.dumps({**h, "adapters_merged": "perhaps"}),
        lambda h: json.dumps({**h, "of_a_later_version": 1}),
    ],
)
def test_headers_that_make_no_sense(saved, tmp_path, change):
    with safetensors.safe_open(saved / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["vitup_fast"])
    path = tmp_path / "changed.safetensors"
    save_file(load_file(saved / "model.safetensors"), path, {"vitup_fast": change(header)})
    with pytest.raises(CheckpointError, match=r"changed\.safetensors: its configuration is none that"):
        vitup_fast.load(path, device="cpu")


def test_models_that_a_file_cannot_hold(tmp_path):
    def refused(model: Upsampler, message: str) -> None:
        with pytest.raises(InputError, match=message):
            model.save_pretrained(tmp_path / "net.safetensors")
        assert list(tmp_path.iterdir()) == []

    model = adapted()
    parametrizations.weight_norm(model.vit_up.decoder_mlp[0].mlp[1])
    refused(model, "network: expected plain layers")
    network, vit = seeded_network(TINY)
    with torch.no_grad():
        network.decoder_mlp[0].mlp[1].bias[0] = math.nan
    refused(Upsampler(network, vit), r"NaN, infinity .*decoder_mlp\.0\.mlp\.1\.bias")
    model = adapted()
    parametrizations.weight_norm(model.backbone.model.blocks[0].mlp.fc2)
    refused(
        model, r"backbone: expected plain layers and adapters, got a parametrization of blocks\.0\.mlp\.fc2"
    )
    refused(adapted().to("meta"), "holds values")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be made a folder"):
        adapted().save_pretrained(tmp_path / "file")


def test_a_compiled_network_is_saved_under_its_own_names(tmp_path):
    model = adapted()
    want = model.state_dict()
    model.vit_up = torch.compile(model.vit_up, backend="eager")
    model.save_pretrained(tmp_path)
    assert same(vitup_fast.load(tmp_path, device="cpu", merge_adapters=False).state_dict(), want)


def test_the_hub(tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    asked = {}

    def create_repo(self, repo_id, **options):
        asked["create"] = {"repo_id": repo_id, **options}
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        asked["upload"] = {"repo_id": repo_id, **options}
        shutil.copytree(folder_path, hub / repo_id)
        return "https://hub/commit"

    def download(repo_id, filename, **options):
        asked["download"] = options
        return str(hub / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = adapted()
    address = model.push_to_hub("me/net", merge_adapters=True, private=True, commit_message="first")
    assert address == "https://hub/commit"
    assert asked["create"]["private"] is True
    assert asked["upload"]["commit_message"] == "first"
    assert sorted(p.name for p in (hub / "me/net").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = huggingface_hub.ModelCard.load(hub / "me/net/README.md")
    assert card.data.library_name == "vitup_fast"
    assert "vit_small_plus_patch16_dinov3" in card.text
    assert 'vitup_fast.load("me/net")' in card.text
    loaded = Upsampler.from_pretrained("me/net", revision="v1", token="t", device="cpu")
    assert asked["download"] == {
        "revision": "v1", "token": "t", "cache_dir": None, "force_download": False, "local_files_only": False
    }  # fmt: skip
    model.backbone.merge_lora()
    assert same(loaded.state_dict(), model.state_dict())
    assert same(vitup_fast.load("me/net", device="cpu").state_dict(), model.state_dict())
    assert loaded.model_config["weights"] == "me/net@v1"
    commit = hub / "me" / "net" / "snapshots" / "0123abc"
    commit.mkdir(parents=True)
    shutil.copy(hub / "me/net/model.safetensors", commit)
    cached = lambda repo_id, filename, **options: asked.update(options) or str(commit / filename)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    for model_of in (vitup_fast.load, Upsampler.from_pretrained):
        assert model_of("me/net", revision="v2", device="cpu").model_config["weights"] == "me/net@0123abc"
        assert asked.pop("revision") == "v2"

    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsUnavailableError, match=r"model\.safetensors from me/net@main \(no network\)"):
        vitup_fast.load("me/net", device="cpu")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    with pytest.raises(InputError, match=r"repo_id: cannot push to me/net \(no network\)"):
        model.push_to_hub("me/net")


@pytest.mark.parametrize("entry", ["vit_up_dinov3_splus", "vit_up_dinov3_base", "vit_up_dinov2_small"])
def test_torch_hub_entry_points(monkeypatch, entry):
    calls = []
    monkeypatch.setattr(vitup_fast, "load", lambda *names, **options: calls.append((*names, options)))
    load = lambda *args, **kw: torch.hub.load(str(ROOT), entry, *args, source="local", **kw)  # noqa: E731
    load()
    load("cpu", True, False, 224, 1000)
    plain = {"device": None, "dtype": torch.bfloat16, "hidden_layer_img_size": 448, "query_chunk_size": None}
    chosen = {"device": "cpu", "dtype": torch.float32, "hidden_layer_img_size": 224, "query_chunk_size": 1000}
    assert calls == [(entry, plain), (entry, chosen)]
    with pytest.raises(InputError, match="pretrained: expected True"):
        load(pretrained=False)


@pytest.mark.skipif(not (ROOT / "hubconf.py").exists(), reason="needs a checkout")
def test_torch_hub_runs_from_a_checkout(tmp_path):
    ignored = shutil.ignore_patterns("_C*", "__pycache__", "weights")
    for room in ("vitup_fast", "kernels"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=ignored)
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    code = f"import torch; torch.hub.load({str(tmp_path)!r}, 'vit_up_dinov2_small', source='local', device='cpu')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path.parent)
    message = f"vit_up_dinov2_small.safetensors is missing from this installation of vitup_fast ({tmp_path}"
    assert message in result.stderr
