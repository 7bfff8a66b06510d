"""Checkpoints: read, give every tensor its one name, load strictly, merge or attach LoRA."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, brief, expected, require
from ..images import write_atomically
from ..ops.checks import FEATURE_DTYPES, check_count, check_plain, check_values
from .backbone import (
    PUBLISHED_LORA_SCALING,
    Backbone,
    LoRASite,
    check_scaling,
    lora_key,
    lora_shapes,
    lora_sites,
    merged_weight,
)
from .config import PRESETS, ViTUpConfig
from .onnx_file import PATCH_EMBEDDING, read_onnx

_HEADER_KEY = "vitup_fast"
_LISTED_NAMES = 8
_TRAINING_PREFIXES = {"model", "module", "vit_up", "vit_up_pl", "vit_up_pl_v2"}
_OLD_NAMES = (
    (r"img_encoder\.", "query_embedding."),
    (r"q_proj\.(\d+)\.", r"vit_up_blocks.\1.transition_mlp."),
    (r"local_feature_decoder\.(\d+)\.", r"vit_up_blocks.\1.featx."),
    (r"global_local_cross_attention\.(\d+)\.global_cross_attention\.", r"vit_up_blocks.\1.cross_attention."),
    (r"global_local_cross_attention\.(\d+)\.", r"vit_up_blocks.\1."),
)
_LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_QKV_NAME = re.compile(
    r"(?:encoder\.)?layer\.(\d+)\.attention\.(?:attention\.)?(q|k|v|query|key|value)(?:_proj)?\.(weight|bias)"
)
_AUTHORS_NAMES = (  # of DINOv2, then of DINOv3 alone
    (r"(?:register|storage)_tokens", "reg_token"),
    (r"(.+\.mlp)\.w12\.(.+)", r"\1.fc1.\2"),
    (r"(.+\.mlp)\.w3\.(.+)", r"\1.fc2.\2"),
    (r"(.+\.mlp)\.w1\.(.+)", r"\1.fc1_g.\2"),
    (r"(.+\.mlp)\.w2\.(.+)", r"\1.fc1_x.\2"),
    (r"(.+)\.ls([12])\.gamma", r"\1.gamma_\2"),
)
_AUTHORS_BIAS = re.compile(r"blocks\.(\d+)\.attn\.qkv\.bias")
_UNUSED_NAMES = re.compile(r"mask_token|rope_embed\..+|local_cls_norm\..+|.+\.bias_mask")
_WIDTH_NAMES = ("decoder_mlp.0.mlp.0.weight", "norm.weight")


class PublishedTensors(NamedTuple):
    """The three parts of a published or training checkpoint.

    Attributes:
        vit_up: the upsampler's tensors under their published names.
        lora: the adapters, ``backbone.base_model.model.<module>.lora_{A,B}.default.weight``.
        backbone: the base backbone's tensors under the public DINOv3 names, if the file carries them.

    """

    vit_up: dict[str, Tensor]
    lora: dict[str, Tensor]
    backbone: dict[str, Tensor]


def checkpoint_path(argument: str, path: str | bytes | os.PathLike[str]) -> Path:
    """Return the path that an argument names, with ``~`` as the home folder.

    Raises:
        InputError: it is no path.

    """
    try:
        if name := os.fsdecode(path):
            return Path(name).expanduser()
    except (TypeError, RuntimeError) as error:  # RuntimeError: a user's home folder that is not there
        raise expected(argument, "the path of a file", repr(path)) from error
    raise expected(argument, "the path of a file", "an empty one")


def check_file(path: Path) -> None:
    """Check that a path leads to a file with something in it.

    Raises:
        CheckpointError: it does not.

    """
    shown = brief(path, 300)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{shown}: " + ("a link to no file." if path.is_symlink() else "no such file.")
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown}: not a readable checkpoint ({_reason(error)}).") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise CheckpointError(f"{shown}: expected a checkpoint file, got {kind}.")
    if not status.st_size:
        raise CheckpointError(f"{shown}: the file is empty.")


def read_tensors(path: str | bytes | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` or ``.onnx`` file, or of a torch checkpoint, onto the CPU.

    A ``{"state_dict": ...}`` around the tensors is opened and what lies beside it is left alone. Code inside
    a torch checkpoint never runs (``weights_only=True``). The tensors may be mapped from the file: do not
    overwrite it while they are in use.

    Raises:
        CheckpointError: the file is missing, empty, damaged, or holds anything but named tensors with values.
        InputError: ``path`` is no path.
        MissingPackageError: safetensors or onnx is needed and not installed.

    """
    path = checkpoint_path("path", path)
    shown = brief(path, 300)
    check_file(path)
    try:
        if path.suffix == ".onnx":
            content = read_onnx(path)
        elif path.suffix == ".safetensors":
            content = require("safetensors.torch", "timm", "reading .safetensors files").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise CheckpointError(f"{shown}: not a readable checkpoint ({_reason(error)}).") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        beside = [n for n, value in content.items() if isinstance(value, Tensor) and "." in str(n)]
        if beside:
            raise CheckpointError(f"{shown}: holds tensors beside its state_dict: {_listing('', beside)}.")
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{shown}: expected named tensors, got {type(content).__name__}.")
    if not content:
        raise CheckpointError(f"{shown}: holds no tensors.")
    return _named_tensors(content, shown)


class Header(NamedTuple):
    """What a file that this library wrote says of itself, in the metadata of its safetensors header.

    Attributes:
        config: sizes of the network, name and options of the backbone.
        hidden_layer_img_size: height and width in pixels of the image from which hidden states are computed.
        lora_scaling: alpha / r of the adapters in the file.
        adapters_merged: whether adapters are folded into the backbone that the file holds.

    """

    config: ViTUpConfig
    hidden_layer_img_size: tuple[int, int]
    lora_scaling: float = PUBLISHED_LORA_SCALING
    adapters_merged: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return {**self._asdict(), "config": self.config.to_dict()}


def read_header(path: Path) -> Header | None:
    """Read what a file says of itself; None for one that does not come from this library.

    Raises:
        CheckpointError: the file is no safetensors file, or says what this version does not understand.

    """
    if path.suffix != ".safetensors":
        return None
    safetensors = require("safetensors", "timm", "reading .safetensors files")
    check_file(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise CheckpointError(f"{brief(path, 300)}: not a readable checkpoint ({_reason(error)}).") from error
    if text is None:
        return None
    try:
        fields = json.loads(text)
        height, width = (check_count("hidden_layer_img_size", n) for n in fields.pop("hidden_layer_img_size"))
        header = Header(ViTUpConfig.from_dict(fields.pop("config")), (height, width), **fields)
        check_scaling(header.lora_scaling)
        if not isinstance(header.adapters_merged, bool):
            raise expected("adapters_merged", "true or false", repr(header.adapters_merged))
    except (InputError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{brief(path, 300)}: its configuration is none that this version of vitup_fast reads ({_reason(error)})."
        ) from error
    return header


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write tensors, bit for bit, and a header to a safetensors file, whole or not at all.

    Raises:
        InputError: the file cannot be written, the configuration does not fit into JSON, or tensors hold no values
            or NaN or infinity, with which they could not be loaded.
        MissingPackageError: safetensors is not installed.

    """
    safetensors = require("safetensors.torch", "timm", "writing .safetensors files")
    shown = brief(path, 300)
    tensors = _named_tensors(tensors, shown)
    check_finite(tensors, shown)
    try:
        text = json.dumps(header.to_dict())
    except (TypeError, ValueError) as error:
        raise expected("backbone_options", "values that JSON knows", f"others ({_reason(error)})") from error
    # Copies, because files know no shared memory.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        """Write to a path, and let what the writer raises be an OSError."""
        try:
            safetensors.save_file(plain, temporary, {"format": "pt", _HEADER_KEY: text})
        except require("safetensors", "timm", "writing .safetensors files").SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)


def split_published(tensors: Mapping[str, Tensor]) -> PublishedTensors:
    """Give every tensor its present name and sort upsampler, adapters and backbone.

    Undoes the older names, a leading ``vit_up.``, and what training puts around: ``model.``, ``module.``,
    ``vit_up_pl.``, ``vit_up_pl_v2.``, ``_orig_mod.`` segments, and peft's ``base_model.model`` and
    ``base_layer``.

    Raises:
        CheckpointError: two keys lead to one name, or anything but named tensors with values.

    """
    parts = PublishedTensors({}, {}, {})
    origins: dict[tuple[int, str], str] = {}
    for key, tensor in _named_tensors(tensors, "checkpoint").items():
        part, name = _published_name(key)
        if (part, name) in origins:
            first, second, both = (f"{brief(n)!r}" for n in (origins[part, name], key, name))
            raise CheckpointError(f"checkpoint: {first} and {second} are both {both}.")
        origins[part, name] = key
        parts[part][name] = tensor
    return parts


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into all parameters and persistent buffers of a module, or change nothing.

    Args:
        module: the network to fill; the tensors are cast to its dtypes.
        tensors: one tensor for every name in the module's state dict.
        source: where the tensors come from, for the message.

    Raises:
        CheckpointError: names are missing or unexpected, shapes or kinds of dtype differ, or values are not
            finite in the module's dtypes; all of it is in the message.

    """
    own = module.state_dict()
    tensors = _named_tensors(tensors, source)
    misfits = [
        f"{brief(name)} {_described(tensors[name])} instead of {_described(own[name])}"
        for name in own
        if name in tensors and not _alike(tensors[name], own[name])
    ]
    problems = [
        _listing("missing", [name for name in own if name not in tensors]),
        _listing("unexpected", [name for name in tensors if name not in own]),
        _listing("misshapen", misfits),
    ]
    if any(problems):
        fault = "; ".join(filter(None, problems))
        raise CheckpointError(f"{source}: does not fit the network: {fault}.{_size_hint(own, tensors)}")
    _copy_all({name: (target, tensors[name]) for name, target in own.items()}, source)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors hold finite numbers; ``source`` is where they come from, for the message.

    Raises:
        CheckpointError: NaN or infinity, with the first names.

    """
    faulty = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if faulty:
        dtypes = sorted({str(tensors[name].dtype) for name in faulty})
        raise CheckpointError(
            f"{source}: NaN, infinity or numbers too large for {' and '.join(dtypes)} in {_listing('', faulty)}."
        )


def timm_names(
    tensors: Mapping[str, Tensor], model: nn.Module, source: str = "backbone"
) -> dict[str, Tensor]:
    """Give the tensors of a backbone file the names that timm's model of it has.

    Args:
        tensors: under the public names of DINOv3 or DINOv2 (Hugging Face's ``Dinov2Model``), whatever stands before
            them, or under timm's names or those of the models' authors.
        model: the timm model; one without q and v biases takes zero biases only.
        source: where the tensors come from, for the message.

    Returns:
        The tensors under timm's names, q, k and v fused.

    Raises:
        CheckpointError: the tensors belong to another model, a name is unknown or doubled, q, k or v is missing, or a
            nonzero bias has no place.

    """
    tensors = _named_tensors(tensors, source)
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    projections: dict[tuple[str, str, str], Tensor] = {}
    unknown = []
    if any(name.startswith(("blocks.", "patch_embed.")) for name in tensors):
        renamed, projections = _authors_names(tensors, source)
    else:
        public = _public_names(tensors, source)
        gated = any(".mlp.gate_proj." in name for name in public)
        for name, tensor in public.items():
            if match := _QKV_NAME.fullmatch(name):
                layer, part, kind = match.groups()
                projections[layer, part[0], kind] = tensor
            elif target := _timm_name(name, gated):
                renamed[target] = tensor
            else:
                unknown.append(name)
    _check_identity(renamed, own, {layer for layer, _, _ in projections}, source)
    if unknown:
        raise CheckpointError(
            f"{source}: not weights of DINOv3 or DINOv2: {_listing('unexpected', unknown)}."
        )
    if "reg_token" in own and "pos_embed" in own and {"cls_token", "pos_embed"} <= renamed.keys():
        cls, table = renamed["cls_token"], renamed["pos_embed"]
        _, positions, width = own["pos_embed"].shape
        # timm has added the class token's position beforehand.
        if cls.shape == (1, 1, width) and table.shape == (1, positions + 1, width):
            renamed |= {"cls_token": cls + table[:, :1], "pos_embed": table[:, 1:]}
    return renamed | _fused_projections(projections, own, source)


def load_backbone(backbone: Backbone, source: str | bytes | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Load base weights into a backbone without adapters, strictly.

    Args:
        backbone: the backbone to fill.
        source: a file (safetensors, a torch checkpoint, or ONNX), or tensors; under the names that :func:`timm_names`
            knows.

    Raises:
        CheckpointError: the file cannot be read or its tensors do not fit.
        InputError: the backbone has adapters.

    """
    if backbone.lora_parameters():
        raise expected("backbone", "a model without adapters", "one with", "Load its weights first.")
    tensors = source if isinstance(source, Mapping) else read_tensors(source)
    name = "backbone" if isinstance(source, Mapping) else brief(os.fsdecode(source), 300)
    load_strict(backbone.model, timm_names(tensors, backbone.model, name), name)


def merge_lora(
    backbone: Backbone, lora_tensors: Mapping[str, Tensor], scaling: float = PUBLISHED_LORA_SCALING
) -> None:
    """Add published adapters to the weights for good: ``W + scaling * B A`` in float64, rounded once.

    Args:
        backbone: a backbone without adapters.
        lora_tensors: adapters as :func:`split_published` returns them, two for every adapted projection.
        scaling: alpha / r, a finite number.

    Raises:
        CheckpointError: adapters are missing or unexpected, have wrong shapes, or are not finite once merged.
        InputError: the backbone has adapters, its attention no fused qkv, or layers with hooks or wrappers.

    """
    scaling = check_scaling(scaling)
    merged = {
        ", ".join(site.names): (
            site.module.weight.detach(),
            merged_weight(site.module.weight, lora_a, lora_b, scaling),
        )
        for site, lora_a, lora_b in _matched_adapters(backbone, lora_tensors)
    }
    _copy_all(merged, "LoRA adapters merged into the backbone")
    backbone.adapters_merged = True


def attach_lora(
    backbone: Backbone, lora_tensors: Mapping[str, Tensor], scaling: float = PUBLISHED_LORA_SCALING
) -> None:
    """Add published adapters to a backbone and keep them apart, trainable (see :meth:`Backbone.add_lora`).

    Args:
        backbone: a backbone without adapters.
        lora_tensors: adapters as :func:`split_published` returns them, two for every adapted projection.
        scaling: alpha / r, a finite number.

    Raises:
        CheckpointError: adapters are missing or unexpected, have wrong shapes, or are not finite.
        InputError: the backbone has adapters, its attention no fused qkv, or layers with hooks or wrappers.

    """
    scaling = check_scaling(scaling)
    adapters = _matched_adapters(backbone, lora_tensors)
    backbone.add_lora(adapters[0][1].shape[1], scaling)
    with torch.no_grad():
        for site, lora_a, lora_b in adapters:
            (adapter,) = site.module.parametrizations.weight
            adapter.lora_A.copy_(lora_a)
            adapter.lora_B.copy_(lora_b)


def _published_name(key: str) -> tuple[int, str]:
    """Return the field of PublishedTensors to which a key belongs, and its name there."""
    segments = [segment for segment in key.split(".") if segment != "_orig_mod"] or [key]
    while segments[0] in _TRAINING_PREFIXES and len(segments) > 1:
        segments.pop(0)
    name = ".".join(segments)
    if segments[0] != "backbone":
        for old, new in _OLD_NAMES:
            name, count = re.subn(f"^{old}", new, name)
            if count:
                break
        return 0, name
    name = _public_name(name.removeprefix("backbone.").removeprefix("base_model.model."))
    if match := _LORA_NAME.fullmatch(name):
        return 1, lora_key(*match.groups())
    return 2, name.replace(".base_layer.", ".")


def _public_name(key: str) -> str:
    """Strip what some exports put before the public DINOv3 names."""
    return key.removeprefix("dinov3_vit.").removeprefix("model.")


def _public_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors of the backbone in a file, without what stands before their names.

    A model around a DINOv2 backbone has a decoder or classifier beside it, which is left out.
    """
    embedding = next((match for name in tensors if (match := PATCH_EMBEDDING.fullmatch(name))), None)
    public: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if embedding and not key.startswith(embedding[1]):
            continue
        name = key.removeprefix(embedding[1]) if embedding else _public_name(key)
        if name in public:
            raise CheckpointError(f"{source}: {brief(name)!r} is there twice, with and without a prefix.")
        public[name] = tensor
    public.pop("embeddings.mask_token", None)
    return public


def _authors_names(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[tuple[str, str, str], Tensor]]:
    """Give tensors of timm, or of the authors of DINOv2 and DINOv3, timm's names; return biases of q, k and v apart."""
    dinov3 = "storage_tokens" in tensors
    rules = _AUTHORS_NAMES if dinov3 else _AUTHORS_NAMES[:3]
    renamed: dict[str, Tensor] = {}
    biases: dict[tuple[str, str, str], Tensor] = {}
    for name, tensor in tensors.items():
        if _UNUSED_NAMES.fullmatch(name):
            continue
        match = _AUTHORS_BIAS.fullmatch(name) if dinov3 else None
        if match and tensor.ndim == 1:
            mask = tensors.get(f"{name}_mask")  # hides the bias of k
            bias = tensor.where(mask == 1, 0) if mask is not None and mask.shape == tensor.shape else tensor
            biases |= {(match[1], part, "bias"): t for part, t in zip("qkv", bias.chunk(3), strict=False)}
            continue
        target = next((m.expand(new) for old, new in rules if (m := re.fullmatch(old, name))), name)
        if target in renamed:
            raise CheckpointError(f"{source}: {brief(target)!r} is there twice, under different names.")
        renamed[target] = tensor
    return renamed, biases


def _timm_name(name: str, gated: bool) -> str | None:
    """Return timm's name of a public tensor other than q, k and v; None for an unknown one."""
    up = "fc1_x" if gated else "fc1"
    rules = (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
        (r"(?:layer)?norm\.(weight|bias)", r"norm.\1"),
        (r"(?:encoder\.)?layer\.(\d+)\.(norm[12]\.(?:weight|bias))", r"blocks.\1.\2"),
        (r"layer\.(\d+)\.attention\.o_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
        (r"layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.gamma_\2"),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"layer\.(\d+)\.mlp\.gate_proj\.(weight|bias)", r"blocks.\1.mlp.fc1_g.\2"),
        (r"layer\.(\d+)\.mlp\.up_proj\.(weight|bias)", rf"blocks.\1.mlp.{up}.\2"),
        (r"layer\.(\d+)\.mlp\.down_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.layer\.(\d+)\.mlp\.(?:fc1|weights_in)\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layer\.(\d+)\.mlp\.(?:fc2|weights_out)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    )
    for public, timm in rules:
        if match := re.fullmatch(public, name):
            return match.expand(timm)
    return None


def _check_identity(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], layers: Iterable[str], source: str
) -> None:
    """Say that a file holds another model than the one to fill, by what tells vision transformers apart.

    Args:
        tensors: of the file, under timm's names.
        own: of the model.
        layers: numbers of further blocks in the file.
        source: of the tensors, for the message.
    """
    there, wanted = _identity(tensors, layers), _identity(own)
    differing = [trait for trait, value in there.items() if value is not None and value != wanted[trait]]
    if differing:
        shown = dict.fromkeys((*("patch", "width", "blocks"), *differing))
        holds, has = (", ".join(f"{trait} {traits[trait]}" for trait in shown) for traits in (there, wanted))
        remedy = ""
        if differing == ["position table"]:
            remedy = " Build the model for the image size of that table (timm's img_size)."
        raise CheckpointError(f"{source}: holds another model ({holds}) than the backbone ({has}).{remedy}")


def _identity(tensors: Mapping[str, Tensor], layers: Iterable[str] = ()) -> dict[str, object]:
    """Return what tells vision transformers apart; None where the tensors do not say."""

    def size(name: str, axis: int, ndim: int, absent: object = None) -> object:
        """Return the size of one axis of a tensor."""
        if name not in tensors:
            return absent
        return tensors[name].shape[axis] if tensors[name].ndim == ndim else None

    names = [name.split(".") for name in tensors if re.match(r"blocks\.\d+\.", name)]
    blocks = {int(segments[1]) for segments in names} | set(map(int, layers))
    table = size("pos_embed", 1, 3)
    return {
        "patch": size("patch_embed.proj.weight", -1, 4),
        "width": size("patch_embed.proj.weight", 0, 4),
        "blocks": len(blocks) or None,
        "MLP width": size("blocks.0.mlp.fc2.weight", 1, 2),
        "register tokens": size("reg_token", 1, 3, 0),
        "position table": None if table is None else f"{math.isqrt(table)} x {math.isqrt(table)}",
    }


def _fused_projections(
    projections: Mapping[tuple[str, str, str], Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Stack q, k and v of every layer, or say which one is missing or different.

    Args:
        projections: by layer, part ("q", "k" or "v") and kind ("weight" or "bias").
        own: the model's tensors.
        source: of the tensors, for the message.
    """
    fused = {}
    largest = max(t.numel() for t in own.values())
    for layer, kind in dict.fromkeys((layer, kind) for layer, _, kind in projections):
        name = f"blocks.{layer}.attn.qkv.{kind}"
        present = {part: t for part in "qkv" if (t := projections.get((layer, part, kind))) is not None}
        if kind == "bias" and name not in own:
            for part, tensor in present.items():
                bias = f"blocks.{layer}.attn.{part}_bias"
                if bias in own and part != "k":
                    fused[bias] = tensor
                elif tensor.dtype not in FEATURE_DTYPES or tensor.numel() > largest or tensor.count_nonzero():
                    what = "not zero" if tensor.dtype in FEATURE_DTYPES else tensor.dtype
                    raise CheckpointError(
                        f"{source}: the {part} bias of layer.{layer} is {what}, and the model has no {bias}."
                    )
            continue
        missing = [f"{part} {kind} of layer.{layer}" for part in "qkv" if part not in present]
        if missing:
            raise CheckpointError(f"{source}: {_listing('missing', missing)}.")
        parts = list(present.values())
        shapes = ", ".join(_described(part) for part in parts)
        if len({part.shape for part in parts}) > 1:
            raise CheckpointError(f"{source}: q, k and v of layer.{layer} differ in shape: {shapes}.")
        if name not in own:
            fused[name] = parts[0]  # refused by its name
            continue
        rows, *columns = own[name].shape
        shape = (rows // 3, *columns)
        if not all(_alike(part, own[name], shape) for part in parts):
            raise CheckpointError(f"{source}: q, k and v of layer.{layer} are {shapes} instead of {shape}.")
        fused[name] = torch.cat(parts)  # [3 D, ...]
    return fused


def _matched_adapters(
    backbone: Backbone, tensors: Mapping[str, Tensor]
) -> list[tuple[LoRASite, Tensor, Tensor]]:
    """Return every site with its A [parts, r, in] and B [parts, out / parts, r], or say what does not fit."""
    sites = lora_sites(backbone)
    tensors = _named_tensors(tensors, "LoRA adapters")
    first = tensors.get(lora_key(sites[0].names[0], "A"))
    rank = len(first) if first is not None and first.ndim else 0
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        for name in site.names:
            a_shape, b_shape = lora_shapes(site.module.weight.shape, len(site.names), rank)
            shapes |= {lora_key(name, "A"): a_shape, lora_key(name, "B"): b_shape}
    problems = [
        _listing("missing", [key for key in shapes if key not in tensors]),
        _listing("unexpected", [key for key in tensors if key not in shapes]),
        _listing(
            "misshapen",
            [
                f"{brief(key)} {_described(tensors[key])} instead of {shape}"
                for key, shape in shapes.items()
                if rank and key in tensors and not _alike(tensors[key], sites[0].module.weight, shape)
            ],
        ),
    ]
    if not 0 < rank <= sites[0].module.weight[0].numel() or any(problems):
        fault = "; ".join(filter(None, problems)) or f"rank {rank} in {lora_key(sites[0].names[0], 'A')}"
        raise CheckpointError(f"LoRA adapters do not fit the backbone: {fault}.")
    dtype = sites[0].module.weight.dtype
    check_finite({key: tensors[key].to(dtype) for key in shapes}, "LoRA adapters")

    def stacked(site: LoRASite, matrix: str) -> Tensor:
        """Stack one matrix of the site's parts."""
        return torch.stack([tensors[lora_key(name, matrix)].flatten(1) for name in site.names])

    return [(site, stacked(site, "A"), stacked(site, "B")) for site in sites]


def _named_tensors(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a dictionary of plain, dense tensors that hold values, or name what is something else."""
    for name, value in tensors.items():
        shown = f"{brief(name)!r}" if isinstance(name, str) else f"{type(name).__name__} {brief(name)}"
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: expected named tensors, got {type(value).__name__} as {shown}.")
        try:
            check_values(shown, value)
            check_plain(shown, value)
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from error
    return dict(tensors)


@torch.no_grad()
def _copy_all(copies: Mapping[str, tuple[Tensor, Tensor]], source: str) -> None:
    """Copy values into targets, by name (target, value), all of them or none."""
    for name, (target, _) in copies.items():
        if target.is_meta:
            raise CheckpointError(
                f"{source}: {brief(name)} of the network is on the meta device; call to_empty first."
            )
    written = {target.untyped_storage().data_ptr() for target, _ in copies.values()}
    cast = {
        name: value.to(target.device, target.dtype, copy=value.untyped_storage().data_ptr() in written)
        for name, (target, value) in copies.items()
    }
    check_finite(cast, source)
    done: list[tuple[Tensor, Tensor]] = []
    name = ""
    try:
        for name, (target, _) in copies.items():
            before = target.clone()
            target.copy_(cast[name])
            done.append((target, before))
        for name, (target, _) in copies.items():
            if not torch.equal(target, cast[name]):
                raise ValueError("it shares memory with another that gets other values")
    except BaseException as error:
        for target, before in reversed(done):
            target.copy_(before)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{source}: cannot write {brief(name)} ({_reason(error)}).") from error


def _alike(tensor: Tensor, own: Tensor, shape: Sequence[int] | None = None) -> bool:
    """Whether a tensor has the shape of the network's own and a dtype that may be cast to its dtype."""
    dtypes = FEATURE_DTYPES if own.dtype in FEATURE_DTYPES else (own.dtype,)
    return tensor.shape == (own.shape if shape is None else shape) and tensor.dtype in dtypes


def _listing(label: str, names: Iterable[str]) -> str:
    """Return ``"2 missing (a, b)"`` with the first few names, or nothing for none; without a label the names."""
    names = list(names)
    more = ", ..." if len(names) > _LISTED_NAMES else ""
    listed = (
        ", ".join(brief(name, 200) if name.strip() else repr(name) for name in names[:_LISTED_NAMES]) + more
    )
    if not label:
        return listed
    return f"{len(names)} {label} ({listed})" if names else ""


def _described(tensor: Tensor) -> str:
    """Return a tensor's shape, and its dtype where that is none of a network's."""
    return f"{tuple(tensor.shape)}" + ("" if tensor.dtype in FEATURE_DTYPES else f" {tensor.dtype}")


def _size_hint(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Say so if the checkpoint belongs to a network of another width or number of blocks."""
    for name in _WIDTH_NAMES:
        if name in own and name in tensors and own[name].shape != tensors[name].shape:
            got, wanted = (
                f"D = {width}" + "".join(f" ({preset})" for preset, c in PRESETS.items() if c.dim == width)
                for width in (tensors[name].numel(), own[name].numel())
            )
            return f" The checkpoint is for {got}, the network has {wanted}."
    got, wanted = (
        len({name.split(".")[1] for name in names if name.startswith("vit_up_blocks.")})
        for names in (tensors, own)
    )
    return f" The checkpoint has {got} blocks, the network {wanted}." if got != wanted else ""


def _reason(error: Exception) -> str:
    """Return the first sentence of an error."""
    if isinstance(error, pickle.UnpicklingError):
        return "not tensors alone, in a format that torch.load takes with weights_only=True"
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return brief(text.rstrip(". "), 300)
