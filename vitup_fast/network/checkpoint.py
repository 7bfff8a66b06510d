"""Checkpoints: read, give every tensor its one name, load strictly, merge or attach LoRA."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, expected, require
from .backbone import (
    PUBLISHED_LORA_SCALING,
    Backbone,
    LoRASite,
    lora_key,
    lora_shapes,
    lora_sites,
    merged_weight,
)
from .config import PRESETS

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
_QKV_NAME = re.compile(r"layer\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)")
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


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, or of a torch checkpoint, onto the CPU.

    A ``{"state_dict": ...}`` around the tensors is opened and what lies beside it is left alone. Code inside
    a torch checkpoint never runs (``weights_only=True``). The tensors may be mapped from the file: do not
    overwrite it while they are in use.

    Raises:
        CheckpointError: the file is missing, empty, damaged, or holds anything but named tensors.
        MissingPackageError: safetensors is needed and not installed.

    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file.")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, got a directory.")
    try:
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: the file is empty.")
        if path.suffix == ".safetensors":
            content = require("safetensors.torch", "timm", "reading .safetensors files").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (CheckpointError, ImportError):
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise CheckpointError(f"{path}: not a readable checkpoint ({_reason(error)}).") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected named tensors, got {type(content).__name__}.")
    if not content:
        raise CheckpointError(f"{path}: holds no tensors.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: expected named tensors, got {type(value).__name__} as {name!r}.")
    return dict(content)


def split_published(tensors: Mapping[str, Tensor]) -> PublishedTensors:
    """Give every tensor its present name and sort upsampler, adapters and backbone.

    Undoes the older names, a leading ``vit_up.``, and what training puts around: ``model.``, ``module.``,
    ``vit_up_pl.``, ``vit_up_pl_v2.``, ``_orig_mod.`` segments, and peft's ``base_model.model`` and
    ``base_layer``.

    Raises:
        CheckpointError: two keys lead to one name.

    """
    parts = PublishedTensors({}, {}, {})
    origins: dict[tuple[int, str], str] = {}
    for key, tensor in tensors.items():
        part, name = _published_name(key)
        if (part, name) in origins:
            raise CheckpointError(f"checkpoint: {origins[part, name]!r} and {key!r} are both {name!r}.")
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
        CheckpointError: names are missing or unexpected, or shapes differ; all of it is in the message.

    """
    own = module.state_dict()
    misfits = [
        f"{name} {_described(tensors[name])} instead of {_described(own[name])}"
        for name in own
        if name in tensors
        and (
            tensors[name].shape != own[name].shape
            or tensors[name].is_floating_point() != own[name].is_floating_point()
        )
    ]
    problems = [
        _listing("missing", [name for name in own if name not in tensors]),
        _listing("unexpected", [name for name in tensors if name not in own]),
        _listing("misshapen", misfits),
    ]
    if any(problems):
        fault = "; ".join(filter(None, problems))
        raise CheckpointError(f"{source}: does not fit the network: {fault}.{_width_hint(own, tensors)}")
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name])


def dinov3_to_timm(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename public DINOv3 tensors for a timm Eva model; timm's own names pass through.

    Args:
        tensors: under the public names, with or without a leading ``model.`` or ``dinov3_vit.``.
        model: the timm model; one without q and v biases takes zero biases only.

    Returns:
        The tensors under timm's names, q, k and v fused.

    Raises:
        CheckpointError: a name is unknown or doubled, q, k or v is missing, or a nonzero bias has no place.

    """
    if any(name.startswith(("blocks.", "patch_embed.")) for name in tensors):
        return dict(tensors)
    public: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _public_name(key)
        if name in public:
            raise CheckpointError(f"backbone: {name!r} is there twice, with and without a prefix.")
        public[name] = tensor
    public.pop("embeddings.mask_token", None)

    own = model.state_dict().keys()
    gated = any(".mlp.gate_proj." in name for name in public)
    renamed: dict[str, Tensor] = {}
    projections: dict[tuple[str, str], Tensor] = {}
    unknown = []
    for name, tensor in public.items():
        if match := _QKV_NAME.fullmatch(name):
            layer, part, kind = match.groups()
            bias = f"blocks.{layer}.attn.{part}_bias"
            if kind == "weight":
                projections[layer, part] = tensor
            elif bias in own:
                renamed[bias] = tensor
            elif tensor.count_nonzero():
                raise CheckpointError(f"backbone: {name} is not zero, and the model has no {bias}.")
        elif target := _timm_name(name, gated):
            renamed[target] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"backbone: not DINOv3 weights: {_listing('unexpected', unknown)}.")
    return renamed | _fused_projections(projections)


def load_backbone(backbone: Backbone, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
    """Load base weights into a backbone without adapters, strictly.

    Args:
        backbone: the backbone to fill.
        source: a file, or tensors; under the public DINOv3 names or under timm's.

    Raises:
        CheckpointError: the file cannot be read or its tensors do not fit.
        InputError: the backbone has adapters.

    """
    if backbone.lora_parameters():
        raise expected("backbone", "a model without adapters", "one with", "Load its weights first.")
    tensors = source if isinstance(source, Mapping) else read_tensors(source)
    name = "backbone" if isinstance(source, Mapping) else str(source)
    load_strict(backbone.model, dinov3_to_timm(tensors, backbone.model), name)


def merge_lora(
    backbone: Backbone, lora_tensors: Mapping[str, Tensor], scaling: float = PUBLISHED_LORA_SCALING
) -> None:
    """Add published adapters to the weights for good: ``W + scaling * B A`` in float64, rounded once.

    Args:
        backbone: a backbone without adapters.
        lora_tensors: adapters as :func:`split_published` returns them, two for every adapted projection.
        scaling: alpha / r.

    Raises:
        CheckpointError: adapters are missing or unexpected, or have wrong shapes.
        InputError: the backbone has adapters, or its attention no fused qkv.

    """
    with torch.no_grad():
        for site, lora_a, lora_b in _matched_adapters(backbone, lora_tensors):
            site.module.weight.copy_(merged_weight(site.module.weight, lora_a, lora_b, scaling))


def attach_lora(
    backbone: Backbone, lora_tensors: Mapping[str, Tensor], scaling: float = PUBLISHED_LORA_SCALING
) -> None:
    """Add published adapters to a backbone and keep them apart, trainable (see :meth:`Backbone.add_lora`).

    Args:
        backbone: a backbone without adapters.
        lora_tensors: adapters as :func:`split_published` returns them, two for every adapted projection.
        scaling: alpha / r.

    Raises:
        CheckpointError: adapters are missing or unexpected, or have wrong shapes.
        InputError: the backbone has adapters, or its attention no fused qkv.

    """
    adapters = _matched_adapters(backbone, lora_tensors)
    backbone.add_lora(adapters[0][1].shape[1], scaling)
    with torch.no_grad():
        for site, lora_a, lora_b in adapters:
            (adapter,) = site.module.parametrizations.weight
            adapter.lora_A.copy_(lora_a)
            adapter.lora_B.copy_(lora_b)


def _published_name(key: str) -> tuple[int, str]:
    """Return the field of PublishedTensors to which a key belongs, and its name there."""
    segments = [segment for segment in key.split(".") if segment != "_orig_mod"]
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


def _timm_name(name: str, gated: bool) -> str | None:
    """Return timm's name of a public DINOv3 tensor other than q, k and v; None for an unknown one."""
    up = "fc1_x" if gated else "fc1"
    rules = (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.patch_embeddings\.(weight|bias)", r"patch_embed.proj.\1"),
        (r"norm\.(weight|bias)", r"norm.\1"),
        (r"layer\.(\d+)\.(norm[12]\.(?:weight|bias))", r"blocks.\1.\2"),
        (r"layer\.(\d+)\.attention\.o_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
        (r"layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.gamma_\2"),
        (r"layer\.(\d+)\.mlp\.gate_proj\.(weight|bias)", r"blocks.\1.mlp.fc1_g.\2"),
        (r"layer\.(\d+)\.mlp\.up_proj\.(weight|bias)", rf"blocks.\1.mlp.{up}.\2"),
        (r"layer\.(\d+)\.mlp\.down_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    )
    for public, timm in rules:
        if match := re.fullmatch(public, name):
            return match.expand(timm)
    return None


def _fused_projections(projections: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Stack q, k and v of every layer, or say which one is missing or different."""
    fused = {}
    for layer in dict.fromkeys(layer for layer, _ in projections):
        names = [f"layer.{layer}.attention.{part}_proj.weight" for part in "qkv"]
        parts = [projections.get((layer, part)) for part in "qkv"]
        missing = [name for name, part in zip(names, parts, strict=True) if part is None]
        if missing:
            raise CheckpointError(f"backbone: {_listing('missing', missing)}.")
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(_described(part) for part in parts)
            raise CheckpointError(f"backbone: q, k and v of layer.{layer} differ in shape: {shapes}.")
        fused[f"blocks.{layer}.attn.qkv.weight"] = torch.cat(parts)  # [3 D, D]
    return fused


def _matched_adapters(
    backbone: Backbone, tensors: Mapping[str, Tensor]
) -> list[tuple[LoRASite, Tensor, Tensor]]:
    """Return every site with its A [parts, r, in] and B [parts, out / parts, r], or say what does not fit."""
    sites = lora_sites(backbone)
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
                f"{key} {_described(tensors[key])} instead of {shape}"
                for key, shape in shapes.items()
                if rank and key in tensors and tensors[key].shape != shape
            ],
        ),
    ]
    if not rank or any(problems):
        fault = "; ".join(filter(None, problems)) or f"rank 0 in {lora_key(sites[0].names[0], 'A')}"
        raise CheckpointError(f"LoRA adapters do not fit the backbone: {fault}.")

    def stacked(site: LoRASite, matrix: str) -> Tensor:
        """Stack one matrix of the site's parts."""
        return torch.stack([tensors[lora_key(name, matrix)].flatten(1) for name in site.names])

    return [(site, stacked(site, "A"), stacked(site, "B")) for site in sites]


def _listing(label: str, names: Iterable[str]) -> str:
    """Return ``"2 missing (a, b)"`` with the first few names, or nothing for none."""
    names = list(names)
    more = ", ..." if len(names) > _LISTED_NAMES else ""
    return f"{len(names)} {label} ({', '.join(names[:_LISTED_NAMES])}{more})" if names else ""


def _described(tensor: Tensor) -> str:
    """Return a tensor's shape, and its dtype where that is not a floating one."""
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}")


def _width_hint(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Say so if the checkpoint belongs to a network of another width."""
    for name in _WIDTH_NAMES:
        if name in own and name in tensors and own[name].shape != tensors[name].shape:
            got, wanted = (
                f"D = {width}" + "".join(f" ({preset})" for preset, c in PRESETS.items() if c.dim == width)
                for width in (tensors[name].numel(), own[name].numel())
            )
            return f" The checkpoint is for {got}, the network has {wanted}."
    return ""


def _reason(error: Exception) -> str:
    """Return the first sentence of an error."""
    if isinstance(error, pickle.UnpicklingError):
        return "not tensors alone, in a format that torch.load takes with weights_only=True"
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(". ")
