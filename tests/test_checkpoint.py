from __future__ import annotations

import contextlib
import os
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import default_dtype
from torch import nn
from torch._subclasses import FakeTensorMode

import vitup_fast.network.checkpoint as checkpoint_module
from vitup_fast import load
from vitup_fast.errors import CheckpointError, InputError
from vitup_fast.network.backbone import Backbone
from vitup_fast.network.checkpoint import (
    attach_lora,
    load_backbone,
    load_strict,
    merge_lora,
    read_tensors,
    split_published,
    timm_names,
)
from vitup_fast.network.config import ViTUpConfig
from vitup_fast.sources import seeded_network

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
    with pytest.raises(CheckpointError, match=r"the [qv] bias of layer\.0 is not zero"):
        load_backbone(without, base)
    zero = {
        n: torch.zeros_like(t) if n.endswith(("q_proj.bias", "v_proj.bias")) else t for n, t in base.items()
    }
    load_backbone(without, zero)
    key_bias = {"layer.2.attention.k_proj.bias": torch.zeros(64)}
    load_backbone(tiny_backbone(), base | key_bias)
    with pytest.raises(CheckpointError, match=r"the k bias of layer\.2 is not zero"):
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
        (without(key), r"missing \(k weight of layer.1\)"),
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
    assert not any("mask" in name for name in timm_names(base, backbone.model))
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


def state_of(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def one_sentence(error):
    text = str(error.value)
    return text.isprintable() and len(text) < 1500


WEIGHT = "decoder_mlp.0.mlp.1.weight"
WITHOUT_NUMBERS = {
    "sparse": (lambda t: t.to_sparse(), "dense tensor, got layout torch.sparse_coo"),
    "compressed": (lambda t: t.flatten(1).to_sparse_csr(), "dense tensor, got layout torch.sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "dense tensor, got a nested tensor"),
    "jagged": (lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged), "got a nested tensor"),
    "oneDNN": (lambda t: t.to_mkldnn(), "dense tensor, got layout torch._mkldnn"),
    "meta": (lambda t: t.to("meta"), "holds values, got one on the meta device"),
    "fake": (lambda t: FakeTensorMode().from_tensor(t), "holds values, got one that is fake"),
    "lazy": (lambda t: nn.UninitializedParameter(), "holds values, got one not yet made"),
    "None": (lambda t: None, "named tensors, got NoneType as"),
    "list": (lambda t: t.tolist(), "named tensors, got list as"),
    "NumPy": (lambda t: t.numpy(), "named tensors, got ndarray as"),
    "integer": (lambda t: t.int(), "torch.int32"),
    "boolean": (lambda t: t.bool(), "torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "torch.complex64"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "torch.qint8"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "NaN": (
        lambda t: t.masked_fill(torch.arange(t.numel()).view(t.shape) == 1, float("nan")),
        "NaN, infinity",
    ),
    "infinite": (lambda t: t - float("inf"), "NaN, infinity"),
    "1e39": (lambda t: t.double() + 1e39, "too large for torch.float32"),
    "huge": (lambda t: t.flatten()[:1].expand(10**9, 10**9), r"\(1000000000, 1000000000\)"),
}


@pytest.mark.parametrize(("spoil", "message"), WITHOUT_NUMBERS.values(), ids=WITHOUT_NUMBERS)
def test_tensors_without_finite_numbers_change_nothing(base, lora, published, spoil, message):
    wanted = split_published(published).vit_up
    module = network(wanted)
    backbone, first = tiny_backbone(), next(iter(lora))
    before = state_of(module), state_of(backbone)
    for call in (
        lambda: load_strict(module, wanted | {WEIGHT: spoil(wanted[WEIGHT])}, "a file"),
        lambda: load_backbone(backbone, base | {"norm.weight": spoil(base["norm.weight"][None])}),
        lambda: load_backbone(
            backbone,
            base
            | {n: spoil(base[n]) for n in base if n.startswith("layer.3.attention.") and "k_proj.w" in n},
        ),
        lambda: load_backbone(backbone, base | {"layer.1.attention.k_proj.bias": spoil(torch.ones(1, 64))}),
        lambda: merge_lora(backbone, lora | {first: spoil(lora[first])}),
        lambda: attach_lora(backbone, lora | {first: spoil(lora[first])}),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert one_sentence(caught)
    assert same(module.state_dict(), before[0])
    assert same(backbone.state_dict(), before[1])
    with pytest.raises(CheckpointError, match=f"a file: .*{message}"):
        load_strict(module, wanted | {WEIGHT: spoil(wanted[WEIGHT])}, "a file")


@pytest.mark.parametrize(
    "view",
    [
        nn.Parameter,
        lambda t: t.double(),
        lambda t: t.bfloat16(),
        lambda t: t.t().contiguous().t(),
        lambda t: t[:, :1].expand(-1, 64),
        lambda t: torch.complex(t, t).conj().imag,
        lambda t: t.as_subclass(type("Mine", (torch.Tensor,), {})),
    ],
)
def test_any_dense_view_of_floats_is_loaded(published, view):
    wanted = split_published(published).vit_up
    module, value = network(wanted), view(wanted[WEIGHT])
    load_strict(module, wanted | {WEIGHT: value}, "file")
    loaded = module.state_dict()
    torch.testing.assert_close(
        loaded[WEIGHT], value.detach().as_subclass(torch.Tensor).resolve_neg().float(), rtol=0, atol=0
    )
    assert all(torch.equal(loaded[name], t) for name, t in wanted.items() if name != WEIGHT)


def test_tensors_that_are_each_others_memory():
    """A network's own tensors under swapped names, and tensors of one storage, are read before anything is written."""
    module = network({"a.weight": torch.empty(3, 4), "b.weight": torch.empty(3, 4)})
    a, b = (t.clone() for t in module.state_dict().values())
    load_strict(module, {"a.weight": module.b.weight, "b.weight": module.a.weight}, "file")
    assert same(module.state_dict(), {"a.weight": b, "b.weight": a})
    module.b.weight = module.a.weight
    with pytest.raises(CheckpointError, match=r"file: cannot write a.weight \(it shares memory"):
        load_strict(module, {"a.weight": a, "b.weight": b}, "file")
    assert torch.equal(module.a.weight, b)
    load_strict(module, {"a.weight": a, "b.weight": a}, "file")
    assert torch.equal(module.b.weight, a)


def test_a_copy_that_fails_takes_back_those_before_it(published):
    wanted = split_published(published).vit_up
    module = network(wanted)
    module.decoder_mlp.get_submodule("1.mlp.1").weight = nn.Parameter(torch.zeros(1, 64).expand(64, -1))
    before = state_of(module)
    with pytest.raises(
        CheckpointError, match=r"a file: cannot write decoder_mlp.1.mlp.1.weight \(unsupported"
    ) as caught:
        load_strict(module, wanted, "a file")
    assert one_sentence(caught)
    assert same(module.state_dict(), before)
    with pytest.raises(
        CheckpointError, match=r"a file: .* of the network is on the meta device; call to_empty"
    ):
        load_strict(network(wanted).to("meta"), wanted, "a file")


@pytest.mark.parametrize(
    ("dtype", "number", "fits"),
    [
        (torch.float64, 1e39, True),
        (torch.float32, 1e39, False),
        (torch.float32, 1e30, True),
        (torch.bfloat16, 1e30, True),
        (torch.bfloat16, 3.4e38, False),
        (torch.float16, 65504, True),
        (torch.float16, 70000, False),
    ],
)
def test_numbers_too_large_for_a_dtype(dtype, number, fits):
    module = nn.Linear(2, 2, dtype=dtype)
    before = state_of(module)
    tensors = {"weight": torch.full((2, 2), number, dtype=torch.float64), "bias": torch.ones(2)}
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(CheckpointError, match=f"large for {dtype} in weight")
    ):
        load_strict(module, tensors, "file")
    assert same(module.state_dict(), before) is not fits


STRANGE_KEYS = [
    "_orig_mod",
    "_orig_mod._orig_mod",
    "model",
    "model.",
    "",
    ".",
    "..",
    "\n\x1b[31m",
    "x" * 5000,
    "\udcff",
]


@pytest.mark.parametrize("key", [*STRANGE_KEYS, "backbone", "vit_up", 3, None, (1, 2), b"weight"], ids=repr)
def test_strange_keys_are_named_in_short(base, lora, published, tmp_path, key):
    wanted = split_published(published).vit_up
    module, backbone = network(wanted), tiny_backbone()
    torch.save(published | {key: torch.ones(2)}, tmp_path / "file.pt")
    for call in (
        lambda: load_strict(module, wanted | {key: torch.ones(2)}, "file"),
        lambda: load_backbone(backbone, base | {key: torch.ones(2)}),
        lambda: merge_lora(backbone, lora | {key: torch.ones(2)}),
        lambda: (
            load("tiny", weights=tmp_path / "file.pt")
            if key != "backbone"
            else load_strict(module, {}, "file")
        ),
    ):
        with pytest.raises(CheckpointError, match=r"unexpected|expected named|missing") as caught:
            call()
        assert one_sentence(caught)


def test_many_strange_keys_are_a_few(published):
    wanted = split_published(published).vit_up
    with pytest.raises(CheckpointError, match=r"1000 unexpected \(.*, \.\.\.\)") as caught:
        load_strict(network(wanted), wanted | {f"{i}\n" * 1000: torch.ones(1) for i in range(1000)}, "file")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"state_dict": {"a": torch.ones(1)}}}, "got dict as 'state_dict'"),
        (
            {"state_dict": {"a": torch.ones(1)}, "block.weight": torch.ones(1)},
            "beside its state_dict: block.weight",
        ),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": 3}, "got int as 'state_dict'"),
        ({"model": {"a": torch.ones(1)}}, "got dict as 'model'"),
        ({0: torch.ones(1)}, "got Tensor as int 0"),
        (torch.ones(3), "got Tensor"),
        (None, "got NoneType"),
    ],
)
def test_torch_files_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=f"file.pt: .*{message}") as caught:
        read_tensors(tmp_path / "file.pt")
    assert one_sentence(caught)


def test_numbers_beside_a_state_dict_are_left_alone(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "loss": torch.ones(1)}, tmp_path / "file.pt")
    assert list(read_tensors(tmp_path / "file.pt")) == ["a"]


def test_things_that_are_no_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "file.pt").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    cyclic = {}
    cyclic["state_dict"] = cyclic
    torch.save(cyclic, tmp_path / "cycle.pt")
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), tmp_path / "script.pt")
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    for name, cause in {
        "pipe.pt": "got a pipe, socket or device",
        "/dev/null": "got a pipe, socket or device",
        "link.pt": "a link to no file",
        "loop.pt": "not a readable checkpoint",
        "file.pt/inner.pt": "no such file",
        "archive.pt": "not a readable checkpoint",
        "cycle.pt": "got dict as 'state_dict'",
        "script.pt": "not a readable checkpoint",
        "long.safetensors": "not a readable checkpoint",
        "x" * 5000: "File name too long",
        "nul\0.pt": "null",
    }.items():
        for path in (tmp_path / name, os.fsencode(tmp_path / name)):
            with pytest.raises(CheckpointError, match=cause) as caught:
                read_tensors(path)
            assert one_sentence(caught)

    def fails(error):
        def raising(*args, **options):
            raise error

        return raising

    for error, cause in [
        (PermissionError(13, "Permission denied"), r"\(Permission denied\)"),
        (FileNotFoundError(2, "No such file or directory"), r"\(No such file or directory\)"),
        (MemoryError(), r"\(MemoryError\)"),
    ]:
        monkeypatch.setattr(torch, "load", fails(error))
        with pytest.raises(CheckpointError, match=f"file.pt: not a readable checkpoint {cause}"):
            read_tensors(tmp_path / "file.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "legacy"])
def test_damaged_files_never_raise_anything_else(published, tmp_path, suffix):
    tensors = {name: t for name, t in published.items() if name.startswith("decoder_mlp.0")}
    path = tmp_path / f"file.{suffix}"
    if suffix == "safetensors":
        safetensors.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=suffix == "pt")
    whole = path.read_bytes()
    random, messages = np.random.default_rng(0), []
    for i in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.integers(min(len(whole), 1500))] = random.integers(256)
        path.write_bytes(damaged[: random.integers(len(whole))] if i % 4 == 0 else damaged)
        try:
            read_tensors(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 15
    assert all(message.isprintable() for message in messages)


@pytest.mark.parametrize(
    "path", [3, None, 1.5, ["a.pt"], {"a": torch.ones(1)}, "", "~no-user-of-this-name/a.pt"]
)
def test_arguments_that_are_no_paths(path):
    if not isinstance(path, dict):
        with pytest.raises(InputError, match="path: expected the path of a file"):
            load_backbone(tiny_backbone(), path)
    if path is not None:
        with pytest.raises(InputError, match="weights: expected the path of a file"):
            load("tiny", weights=path)
        with pytest.raises(InputError, match="backbone_weights: expected the path of a file"):
            load("tiny", weights="random", backbone_weights=path)


@pytest.mark.parametrize("use", [merge_lora, attach_lora])
@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), "2", None, 1j, torch.ones(1)])
def test_scalings_that_are_no_numbers(lora, use, scaling):
    backbone = tiny_backbone()
    before = state_of(backbone)
    with pytest.raises(InputError, match="scaling: expected a finite number"):
        use(backbone, lora, scaling)
    assert same(backbone.state_dict(), before)


def test_merged_weights_must_stay_finite(base, lora):
    backbone = tiny_backbone()
    load_backbone(backbone, base)
    before = state_of(backbone)
    with pytest.raises(
        CheckpointError, match=r"LoRA adapters merged into the backbone: NaN, infinity .*patch_emb"
    ):
        merge_lora(backbone, lora, scaling=1e39)
    assert same(backbone.state_dict(), before)
    attach_lora(backbone, lora, scaling=1e39)
    attached = state_of(backbone)
    with pytest.raises(InputError, match="adapters: expected finite merged weights"):
        backbone.merge_lora()
    assert same(backbone.state_dict(), attached)


@pytest.mark.parametrize("scaling", [None, 0.25, -1.5, np.float32(3)])
def test_attached_adapters_compute_what_merged_ones_do(golden, base, lora, scaling):
    """Hidden states, fine grid, and adapters found again, at the published scaling and at others."""
    options = {} if scaling is None else {"scaling": scaling}
    backbones = [Backbone.create(ViTUpConfig.preset("tiny")).double() for _ in range(3)]
    _, attached, merged = backbones
    for backbone in backbones:
        load_backbone(backbone, base)
    attach_lora(attached, lora, **options)
    merge_lora(merged, lora, **options)
    images = golden["pixel_values"].double()
    with torch.no_grad():
        states = [[*b.hidden_states(images, (64, 64)), b.patch_grid(images, (8, 8))] for b in backbones]
        for unadapted, mine, exact in zip(*states, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)
            assert (exact - unadapted).norm() > 1e-3 * exact.norm()
        if scaling is None:
            for i, state in enumerate(states[1][:-1]):
                torch.testing.assert_close(state, golden[f"hidden_states.{i}"].double(), rtol=1e-5, atol=1e-5)
    attached.merge_lora()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(attached.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def everything():
    with default_device("meta"), default_dtype(torch.float64), torch.autocast("cpu"), torch.inference_mode():
        yield


STATES = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "with meta": lambda: torch.device("meta"),
    "default meta": lambda: default_device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "all": everything,
}


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    """A training checkpoint of the tiny network with its backbone and adapters in one file."""
    network, vit = seeded_network(ViTUpConfig.preset("tiny"))
    vit.add_lora(2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        adapters = {name: 0.01 * torch.randn(t.shape) for name, t in vit.lora_state_dict().items()}
    plain = seeded_network(ViTUpConfig.preset("tiny"))[1].model.state_dict()
    path = tmp_path_factory.mktemp("own") / "tiny.pt"
    torch.save({**network.state_dict(), **adapters, **{f"backbone.{n}": t for n, t in plain.items()}}, path)
    return path


@pytest.mark.parametrize("weights", ["random", "file"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_load_is_the_same_in_every_state(own_checkpoint, state, weights):
    def loaded():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return load("tiny", weights="random" if weights == "random" else own_checkpoint, device="cpu")

    def gradients(model):
        generator = torch.Generator().manual_seed(1)
        coords = torch.rand(1, 5, 2, generator=generator, requires_grad=True)
        model.requires_grad_(True)
        model(torch.rand(1, 3, 40, 56, generator=generator), coords).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return grads | {"coords": coords.grad}

    want = loaded()
    with state():
        defaults = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        model = loaded()
        assert defaults == (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
    assert same(model.state_dict(), want.state_dict())
    assert not any(t.is_inference() or t.is_meta for t in (*model.parameters(), *model.buffers()))
    for (name, mine), (other, exact) in zip(model.named_buffers(), want.named_buffers(), strict=True):
        assert name == other
        assert mine.dtype == exact.dtype
        assert torch.equal(mine, exact)
    grads, exact = gradients(model), gradients(want)
    assert len(grads) > 50
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-5, atol=1e-6)


def test_seeding_leaves_every_generator_alone(monkeypatch):
    def touched(*args):
        raise AssertionError("the generators of GPUs were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched)
    before = torch.get_rng_state()
    seeded_network(ViTUpConfig.preset("tiny"))
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_too_large_once_loaded(own_checkpoint, tmp_path):
    tensors = read_tensors(own_checkpoint)
    tensors[WEIGHT] = tensors[WEIGHT] + 70000
    torch.save(tensors, tmp_path / "large.pt")
    load("tiny", weights=tmp_path / "large.pt", device="cpu", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"too large for torch.float16 in vit_up\.{WEIGHT}\."):
        load("tiny", weights=tmp_path / "large.pt", device="cpu", dtype=torch.float16)


@pytest.mark.parametrize(
    "options",
    [
        *({"model": m} for m in (3, None, ["splus"], {}, b"tiny", "x" * 5000, "a\nb")),
        *({"device": d} for d in ("banana", "meta", "cuda:99", "xpu:99", 99, -1, 1.5, [], "lazy")),
        *(
            {"dtype": d}
            for d in ("float32", torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, float, [])
        ),
        *({"max_memory": n} for n in (-1, 0, True, 1.5, "1", float("nan"))),
        *({"query_chunk_size": n} for n in (-1, 0, True, 1.5, "1", torch.tensor(5), np.bool_(True))),
    ],
    ids=str,
)
def test_load_refuses_at_once(monkeypatch, options):
    monkeypatch.setattr(checkpoint_module, "read_tensors", None)
    with pytest.raises(InputError, match=f"{next(iter(options))}: expected") as caught:
        load(**{"model": "tiny", "weights": "absent.pt", **options})
    assert one_sentence(caught)


def test_load_takes_numpys_integers():
    with pytest.warns(UserWarning, match="random"):
        model = load("tiny", weights="random", device="cpu", query_chunk_size=np.int64(5))
    assert model.query_chunk_size == 5
    assert type(model.query_chunk_size) is int
