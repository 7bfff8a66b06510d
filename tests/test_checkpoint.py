from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vitup_fast.errors import CheckpointError, InputError
from vitup_fast.network.backbone import Backbone
from vitup_fast.network.checkpoint import (
    attach_lora,
    dinov3_to_timm,
    load_backbone,
    load_strict,
    merge_lora,
    read_tensors,
    split_published,
)
from vitup_fast.network.config import ViTUpConfig

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

GOLDEN = Path(__file__).parent / "data" / "dinov3_lora_tiny.safetensors"


@pytest.fixture(scope="module")
def golden():
    return safetensors.load_file(GOLDEN)


@pytest.fixture(scope="module")
def published(golden):
    return {name.removeprefix("published."): t for name, t in golden.items() if name.startswith("published.")}


@pytest.fixture(scope="module")
def base(golden):
    return {name.removeprefix("hf."): t for name, t in golden.items() if name.startswith("hf.")}


@pytest.fixture(scope="module")
def lora(published):
    return split_published(published).lora


def tiny_backbone(**options) -> Backbone:
    config = ViTUpConfig.preset("tiny")
    options = dict(config.backbone_options) | options
    model = timm.create_model(config.backbone, num_classes=0, dynamic_img_size=True, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return Backbone(model, config.layer_indices)


def network(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """A module whose state dict has these names and shapes, random."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for segment in path:
            if segment not in dict(module.named_children()):
                module.add_module(segment, nn.Module())
            module = getattr(module, segment)
        module.register_parameter(leaf, nn.Parameter(torch.randn(tensor.shape)))
    return root


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def renamed(tensors, *rules):
    out = dict(tensors)
    for old, new in rules:
        out = {name.replace(old, new): t for name, t in out.items()}
    return out


def test_read_safetensors_and_torch_files(published, tmp_path):
    assert same(read_tensors(GOLDEN), safetensors.load_file(GOLDEN))
    torch.save(published, tmp_path / "plain.pth")
    torch.save({"state_dict": published, "epoch": 3, "optimizer": {"lr": 1.0}}, tmp_path / "lightning.ckpt")
    torch.save(published, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("plain.pth", "lightning.ckpt", "legacy.pt"):
        assert same(read_tensors(str(tmp_path / name)), published)


def test_unreadable_files(published, tmp_path):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(1, 200)))
    (tmp_path / "noise.pt").write_bytes(bytes(range(1, 200)))
    (tmp_path / "cut.safetensors").write_bytes(GOLDEN.read_bytes()[:5000])
    torch.save(published, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    torch.save({"weights": 3}, tmp_path / "number.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "code.pt")
    for name, cause in {
        "": "got a directory",
        "absent.safetensors": "no such file",
        "empty.safetensors": "is empty",
        "noise.safetensors": "not a readable checkpoint",
        "noise.pt": "not a readable checkpoint",
        "cut.safetensors": "not a readable checkpoint",
        "cut.pt": "not a readable checkpoint",
        "number.pt": "got int as 'weights'",
        "list.pt": "got list",
        "nothing.pt": "holds no tensors",
        "code.pt": "not a readable checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=cause) as caught:
            read_tensors(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "vit_up.",
        "model.",
        "module.",
        "vit_up_pl.",
        "vit_up_pl_v2.",
        "_orig_mod.",
        "module.vit_up_pl_v2.model._orig_mod.vit_up.",
    ],
)
def test_prefixes(published, prefix):
    parts = split_published({prefix + name: t for name, t in published.items()})
    assert (len(parts.vit_up), len(parts.lora), len(parts.backbone)) == (89, 34, 0)
    assert same(parts.vit_up | parts.lora, published)


def test_orig_mod_inside(published):
    compiled = renamed(
        published, ("vit_up_blocks.0.", "vit_up_blocks.0._orig_mod."), (".layer.", "._orig_mod.layer.")
    )
    assert same(split_published(compiled).vit_up, split_published(published).vit_up)
    assert same(split_published(compiled).lora, split_published(published).lora)


def test_old_names(published):
    old = {}
    for name, tensor in published.items():
        if name.startswith("vit_up_blocks."):
            _, b, rest = name.split(".", 2)
            for part, old_name in {
                "transition_mlp.": f"q_proj.{b}.",
                "featx.": f"local_feature_decoder.{b}.",
                "cross_attention.": f"global_local_cross_attention.{b}.global_cross_attention.",
                "": f"global_local_cross_attention.{b}.",
            }.items():
                if rest.startswith(part):
                    name = old_name + rest.removeprefix(part)
                    break
        old[name] = tensor
    assert not any(name.startswith("vit_up_blocks") for name in old)
    assert same(split_published(old).vit_up, split_published(published).vit_up)
    assert list(split_published({"vit_up.img_encoder.proj.bias": torch.ones(1)}).vit_up) == [
        "query_embedding.proj.bias"
    ]


@pytest.mark.parametrize(
    "rules", [[("base_model.model.", "")], [(".default", "")], [("base_model.model.", ""), (".default", "")]]
)
def test_adapter_names(published, rules):
    assert same(split_published(renamed(published, *rules)).lora, split_published(published).lora)


def test_training_checkpoint_with_its_backbone(published, base):
    adapted = {name.split(".lora_")[0] for name in published if ".lora_" in name}
    training = {f"model.vit_up.{name}": t for name, t in published.items()}
    for name, tensor in base.items():
        module, leaf = f"backbone.base_model.model.{name}".rsplit(".", 1)
        inner = ".base_layer" if module in adapted else ""
        training[f"model.vit_up.{module}{inner}.{leaf}"] = tensor
    assert any("base_layer" in name for name in training)
    parts = split_published(training)
    assert same(parts.backbone, base)
    assert same(parts.vit_up | parts.lora, published)


def test_two_keys_for_one_name(published):
    name = "decoder_mlp.0.mlp.0.bias"
    with pytest.raises(CheckpointError, match=f"'{name}' and 'module.{name}' are both"):
        split_published(published | {f"module.{name}": published[name]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_load_strict_casts(published, dtype, tmp_path):
    wanted = split_published(published).vit_up
    module = network(wanted)
    safetensors.save_file({name: t.to(dtype) for name, t in wanted.items()}, tmp_path / "model.safetensors")
    load_strict(module, read_tensors(tmp_path / "model.safetensors"), "model.safetensors")
    assert same(module.state_dict(), {name: t.to(dtype).float() for name, t in wanted.items()})


def test_load_strict_names_everything_and_changes_nothing(published):
    wanted = split_published(published).vit_up
    module = network(wanted)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    tensors = {name: t for name, t in wanted.items() if not name.startswith("vit_up_blocks.1.")}
    tensors["surplus.weight"] = torch.randn(2)
    tensors["rel_pos_enc.freqs"] = torch.randn(17)
    tensors["decoder_mlp.1.mlp.1.bias"] = torch.ones(64, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, tensors, "a.safetensors")
    message = str(caught.value)
    assert message.startswith("a.safetensors: does not fit the network: 38 missing (vit_up_blocks.1.")
    assert message.count("vit_up_blocks.1.") == 8
    assert "1 unexpected (surplus.weight)" in message
    assert "2 misshapen" in message
    assert "rel_pos_enc.freqs (17,) instead of (16,)" in message
    assert "decoder_mlp.1.mlp.1.bias (64,) torch.int8 instead of (64,)" in message
    assert "The checkpoint is for" not in message
    assert same(module.state_dict(), before)


def test_load_strict_recognises_another_preset():
    name = "decoder_mlp.0.mlp.0.weight"
    module = network({name: torch.empty(384)})
    with pytest.raises(
        CheckpointError, match=r"D = 768 \(dinov3_base\), the network has D = 384 \(dinov3_splus\)"
    ):
        load_strict(module, {name: torch.ones(768)}, "base.safetensors")


def test_load_strict_fills_persistent_buffers_only():
    module = nn.BatchNorm1d(3)
    module.register_buffer("table", torch.randn(2), persistent=False)
    tensors = {name: torch.randn(t.shape) for name, t in module.state_dict().items()}
    tensors["num_batches_tracked"] = torch.tensor(5)
    load_strict(module, tensors, "file")
    assert same(module.state_dict(), tensors)


@pytest.mark.parametrize("prefix", ["", "model.", "dinov3_vit."])
def test_load_backbone(base, prefix, tmp_path):
    want = tiny_backbone()
    load_backbone(want, base)
    backbone = tiny_backbone()
    safetensors.save_file({prefix + name: t for name, t in base.items()}, tmp_path / "dinov3.safetensors")
    load_backbone(backbone, tmp_path / "dinov3.safetensors")
    assert same(backbone.state_dict(), want.state_dict())
    assert torch.equal(backbone.model.blocks[1].attn.v_bias, base["layer.1.attention.v_proj.bias"])
    again = tiny_backbone()
    load_backbone(again, want.model.state_dict())
    assert same(again.state_dict(), want.state_dict())


def test_biases_that_the_model_lacks(base):
    without = tiny_backbone(qkv_bias=False)
    with pytest.raises(CheckpointError, match=r"layer\.0\.attention\.[qv]_proj\.bias is not zero"):
        load_backbone(without, base)
    zero = {
        n: torch.zeros_like(t) if n.endswith(("q_proj.bias", "v_proj.bias")) else t for n, t in base.items()
    }
    load_backbone(without, zero)
    key_bias = {"layer.2.attention.k_proj.bias": torch.zeros(64)}
    load_backbone(tiny_backbone(), base | key_bias)
    with pytest.raises(CheckpointError, match=r"layer\.2\.attention\.k_proj\.bias is not zero"):
        load_backbone(tiny_backbone(), base | {name: t + 1 for name, t in key_bias.items()})


def test_plain_mlp(base):
    plain = {name: t for name, t in base.items() if "gate_proj" not in name}
    backbone = tiny_backbone(swiglu_mlp=False, swiglu_align_to=0)
    load_backbone(backbone, plain)
    assert torch.equal(backbone.model.blocks[3].mlp.fc1.weight, base["layer.3.mlp.up_proj.weight"])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1_g"):
        load_backbone(backbone, base)


def test_backbone_weights_that_do_not_fit(base, lora):
    backbone = tiny_backbone()
    without = lambda *names: {name: t for name, t in base.items() if name not in names}  # noqa: E731
    key = "layer.1.attention.k_proj.weight"
    for tensors, message in [
        (without(key), rf"missing \({key}\)"),
        (without("norm.bias"), r"1 missing \(norm.bias\)"),
        (without("layer.0.attention.q_proj.bias"), r"1 missing \(blocks.0.attn.q_bias\)"),
        (base | {"head.weight": torch.ones(2)}, r"1 unexpected \(head.weight\)"),
        (base | {key: torch.ones(32, 64)}, "differ in shape"),
        (base | {"model.norm.bias": base["norm.bias"]}, "'norm.bias' is there twice"),
        (base | {"norm.weight": torch.ones(32)}, "norm.weight .32,. instead of .64,."),
        ({name.replace("layer.3", "layer.4"): t for name, t in base.items()}, r"blocks\.4"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_backbone(backbone, tensors)
    assert "embeddings.mask_token" in base
    assert not any("mask" in name for name in dinov3_to_timm(base, backbone.model))
    attach_lora(backbone, lora)
    with pytest.raises(InputError, match="without adapters"):
        load_backbone(backbone, base)


def test_merge_lora_formulas(base, lora):
    backbone = tiny_backbone()
    load_backbone(backbone, base)
    merge_lora(backbone, lora, scaling=0.5)
    module = "backbone.base_model.model.{}.lora_{}.default.weight"

    def pair(name):
        return (lora[module.format(name, matrix)].double() for matrix in "AB")

    a, b = pair("embeddings.patch_embeddings")
    weight = base["embeddings.patch_embeddings.weight"].double()
    want = weight + 0.5 * torch.einsum("or,rchw->ochw", b[:, :, 0, 0], a)
    assert torch.equal(backbone.model.patch_embed.proj.weight, want.float())
    a, b = pair("layer.2.attention.k_proj")
    want = base["layer.2.attention.k_proj.weight"].double() + 0.5 * b @ a
    assert torch.equal(backbone.model.blocks[2].attn.qkv.weight[64:128], want.float())
    a, b = pair("layer.3.attention.o_proj")
    want = base["layer.3.attention.o_proj.weight"].double() + 0.5 * b @ a
    assert torch.equal(backbone.model.blocks[3].attn.proj.weight, want.float())


def test_merging_attached_adapters_is_merging(base, lora, tmp_path):
    merged, attached = tiny_backbone(), tiny_backbone()
    for backbone in (merged, attached):
        load_backbone(backbone, base)
    merge_lora(merged, lora)
    attach_lora(attached, lora)
    safetensors.save_file(attached.lora_state_dict(), tmp_path / "lora.safetensors")
    assert same(read_tensors(tmp_path / "lora.safetensors"), lora)
    attached.merge_lora()
    assert same(attached.state_dict(), merged.state_dict())


@pytest.mark.parametrize("load", [merge_lora, attach_lora])
def test_adapters_that_do_not_fit(lora, load):
    backbone = tiny_backbone()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    key = "backbone.base_model.model.layer.1.attention.v_proj.lora_B.default.weight"
    first = "backbone.base_model.model.embeddings.patch_embeddings.lora_A.default.weight"
    stray = key.replace("layer.1", "layer.9")
    for tensors, message in [
        ({n: t for n, t in lora.items() if n != key}, rf"1 missing \({key}\)"),
        ({n: t for n, t in lora.items() if n != first}, rf"1 missing \({first}\)"),
        (lora | {stray: lora[key]}, rf"1 unexpected \({stray}\)"),
        (lora | {key: torch.ones(64, 3)}, r"1 misshapen \(.*v_proj.* \(64, 3\) instead of \(64, 4\)"),
        (lora | {first: torch.ones(0, 3, 16, 16)}, "rank 0"),
        ({}, "34 missing"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load(backbone, tensors)
    assert same(backbone.state_dict(), before)
    attach_lora(backbone, lora)
    with pytest.raises(InputError, match="without adapters"):
        load(backbone, lora)
