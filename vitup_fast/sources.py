"""Which network a name or path means, where its weights come from, and how its parts are built of them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import CheckpointError, InputError, brief, expected, require
from .network.backbone import Backbone, config_for, plain_defaults
from .network.checkpoint import (
    Header,
    PublishedTensors,
    attach_lora,
    check_file,
    checkpoint_path,
    load_backbone,
    load_strict,
    merge_lora,
    read_header,
    read_tensors,
    split_published,
)
from .network.config import ViTUpConfig
from .network.model import ViTUp

HUB_REPOSITORY = "Krispin/vit-up"
HUB_REVISION = "main"
WEIGHTS_NAME = "model.safetensors"
RANDOM = "random"
RANDOM_SEED = 0
RANDOM_UPDATE = 0.05

PRESET_OF = {
    "vit_up_dinov3_splus": "dinov3_splus",
    "vit_up_dinov3_base": "dinov3_base",
    "vit_up_dinov2_small": "dinov2_small",
    "vit_up_tiny": "tiny",
}
ALIASES = {
    "splus": "vit_up_dinov3_splus",
    "dinov3_splus": "vit_up_dinov3_splus",
    "base": "vit_up_dinov3_base",
    "dinov3_base": "vit_up_dinov3_base",
    "dinov2_small": "vit_up_dinov2_small",
    "tiny": "vit_up_tiny",
}
SHIPPED = ("vit_up_dinov2_small",)
_SHIPPED_FOLDER = Path(__file__).parent / "weights"
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx")


class WeightsUnavailableError(InputError):
    """Weights could not be fetched or found; the message says why and what to pass instead."""


class Source(NamedTuple):
    """What to build a network of.

    Attributes:
        name: what the user calls it.
        config: its configuration.
        path: the file of its weights; None for a random network.
        header: what the file says of itself; None for one that this library did not write.
        label: where the weights come from, for the user.

    """

    name: str
    config: ViTUpConfig
    path: Path | None
    header: Header | None
    label: str


def find_model(
    model: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    revision: str = HUB_REVISION,
    fetch: bool = True,
) -> Source:
    """Find out what the arguments of :func:`vitup_fast.load` mean.

    Args:
        model: a preset's name, a timm model, a file or folder, or a repository of the hub.
        weights: a file or folder with weights for a name, ``"random"``, or None.
        revision: commit, tag or branch of the hub's repository.
        fetch: look for the weights of presets; the configuration is known without.

    Raises:
        WeightsUnavailableError: published weights cannot be fetched.
        CheckpointError: a file cannot be read, or is for another model.
        InputError: an argument that does not fit.
    """
    random = isinstance(weights, str) and weights == RANDOM
    path = None if weights is None or random else model_file("weights", weights)
    label = RANDOM if path is None else str(path)
    name = ALIASES.get(model, model) if isinstance(model, str) else None
    if name in PRESET_OF:
        config = ViTUpConfig.preset(PRESET_OF[name])
        if weights is None and fetch and name in SHIPPED:
            path, label = _shipped(name), name
        elif weights is None and fetch:
            remedy = "Pass weights=PATH to a local file, or weights='random' to try the library out."
            path = fetch_file(HUB_REPOSITORY, f"{name}.safetensors", revision, remedy)
            label = hub_label(HUB_REPOSITORY, path, revision)
        return checked_source(name, config, path, label)
    if isinstance(model, str) and _is_backbone(model):
        if weights is None:
            remedy = "Upsampler.create makes one that can be trained."
            raise expected("weights", f"a file for {brief(model)}, or 'random'", None, remedy)
        header = path and read_header(path)
        config = header.config if header and header.config.backbone == model else config_for(model)
        return checked_source(model, config, path, label)
    path = existing_file("model", model)
    if weights is not None:
        raise expected("weights", "None, since the model is a file", repr(weights))
    if path is not None:
        return file_source(path, str(model))
    path = fetch_model(model, revision)
    return file_source(path, hub_label(model, path, revision))


def file_source(path: Path, label: str) -> Source:
    """Return what a file says that it holds.

    Raises:
        CheckpointError: it cannot be read, or does not say.
    """
    header = read_header(path)
    if header is None:
        check_file(path)
        raise CheckpointError(
            f"{brief(path, 300)}: the file does not say which model it holds; name it, as in "
            "load('vit_up_dinov3_splus', weights=PATH)."
        )
    return Source("custom", header.config, path, header, label)


def checked_source(name: str, config: ViTUpConfig, path: Path | None, label: str) -> Source:
    """Return a model with its file, if that does not say that it is for another one.

    Raises:
        CheckpointError: it does, or cannot be read.
    """
    header = None if path is None else read_header(path)
    if header is None:
        return Source(name, config, path, None, label)
    traits = ("backbone", "dim", "num_heads", "layer_indices", "patch_grid_density")
    differing = [trait for trait in traits if getattr(header.config, trait) != getattr(config, trait)]
    if differing:
        holds, wanted = (
            ", ".join(f"{trait} {getattr(c, trait)}" for trait in differing) for c in (header.config, config)
        )
        raise CheckpointError(f"{brief(path, 300)}: holds a network for {holds}, not for {wanted}.")
    return Source(name, header.config, path, header, label)


def model_file(argument: str, path: str | os.PathLike[str]) -> Path:
    """Return the path of a file, or of the model's file in a folder that ``save_pretrained`` wrote."""
    path = checkpoint_path(argument, path)
    return path / WEIGHTS_NAME if _is(Path.is_dir, path) and _is(Path.is_file, path / WEIGHTS_NAME) else path


def existing_file(argument: str, model: object) -> Path | None:
    """Return the file that a path names, or None for a repository ``owner/name`` of the hub.

    Raises:
        CheckpointError: there is no such file, or none in the folder.
        InputError: it is neither a path nor a repository.
    """
    if isinstance(model, str | os.PathLike) and not isinstance(model, bytes) and str(model):
        path = model_file(argument, model)
        if _is(Path.is_dir, path):
            raise CheckpointError(f"{brief(path, 300)}: the folder holds no {WEIGHTS_NAME}.")
        if _is(Path.exists, path):
            return path
        named = (
            not isinstance(model, str) or path.suffix in _FILE_SUFFIXES or model.startswith(("/", ".", "~"))
        )
        if named:
            check_file(path)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
            return None
    known = (
        f"one of {sorted((*PRESET_OF, *ALIASES))}, a timm model, a file or folder, or 'owner/name' on the hub"
    )
    raise expected(argument, known, repr(model))


def fetch_model(repository: str, revision: str | None, **options: Any) -> Path:
    """Fetch the file of a repository that ``push_to_hub`` filled; errors as for :func:`fetch_file`."""
    return fetch_file(
        repository, WEIGHTS_NAME, revision, "Pass the path of a local folder or file.", **options
    )


def fetch_file(repository: str, name: str, revision: str | None, remedy: str, **options: Any) -> Path:
    """Fetch a file of a repository from the hub, or from its cache.

    Args:
        repository: ``owner/name``.
        name: of the file.
        revision: commit, tag or branch; None means the newest.
        remedy: what to do where it cannot be fetched, a sentence.
        options: further arguments for ``huggingface_hub.hf_hub_download``.

    Raises:
        WeightsUnavailableError: it cannot be fetched.
        MissingPackageError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hub", "fetching published weights")
    try:
        return Path(hub.hf_hub_download(repository, name, revision=revision, **options))
    except Exception as error:
        reason = brief(str(error).partition("\n")[0], 300) or type(error).__name__
        place = f"{brief(repository)}@{brief(revision or HUB_REVISION)}"
        raise WeightsUnavailableError(
            f"weights: cannot fetch {name} from {place} ({reason}). {remedy}"
        ) from error


def hub_label(repository: str, path: Path, revision: str | None) -> str:
    """Say which commit a fetched file is of, as its place in the hub's cache tells, or else which was asked for."""
    in_cache = path.parent.parent.name == "snapshots"
    return f"{repository}@{path.parent.name if in_cache else revision or HUB_REVISION}"


def backbone_source(backbone_weights: object) -> Path | str | None:
    """Return the path that an argument names, or ``"random"``, or None.

    Raises:
        InputError: it is no path.
    """
    if backbone_weights is None or (isinstance(backbone_weights, str) and backbone_weights == RANDOM):
        return backbone_weights
    return checkpoint_path("backbone_weights", backbone_weights)


def read_parts(
    source: Source, backbone_weights: Path | str | None, *, merge_adapters: bool
) -> tuple[ViTUp, Backbone]:
    """Build network and backbone, and fill them from the source's file or, if it has none, with seeded numbers.

    Args:
        source: what to build.
        backbone_weights: see :func:`build_backbone`.
        merge_adapters: fold adapters into the backbone, or keep them apart.

    Raises:
        WeightsUnavailableError: weights of the backbone cannot be fetched.
        CheckpointError: a file cannot be read, or does not fit.
    """
    if source.path is None:
        network, backbone = seeded_network(source.config)
        if isinstance(backbone_weights, Path):
            load_backbone(backbone, backbone_weights)
        return network, backbone
    published, shown = split_published(read_tensors(source.path)), brief(source.path, 300)
    if not any(name.startswith("vit_up_blocks.") for name in published.vit_up):
        _refuse_other_contents(published, shown)
    merged = source.header is not None and source.header.adapters_merged
    if merged and (backbone_weights is not None or not published.backbone):
        got = "none in the file" if backbone_weights is None else "another"
        raise expected("backbone_weights", f"the backbone in {shown}, into which adapters are merged", got)
    network = ViTUp(source.config)
    load_strict(network, published.vit_up, shown)
    backbone = build_backbone(source.config, backbone_weights, published)
    backbone.adapters_merged = merged
    if published.lora:
        scaling = {} if source.header is None else {"scaling": source.header.lora_scaling}
        (merge_lora if merge_adapters else attach_lora)(backbone, published.lora, **scaling)
    return network, backbone


def build_backbone(
    config: ViTUpConfig, backbone_weights: Path | str | None, published: PublishedTensors | None = None
) -> Backbone:
    """Build a backbone.

    Args:
        config: names it.
        backbone_weights: the file of its weights, ``"random"``, or None for those of the checkpoint or of timm.
        published: a checkpoint that may hold the backbone.

    Raises:
        WeightsUnavailableError: timm cannot fetch its weights.
        CheckpointError: weights cannot be read, or do not fit.
    """
    if backbone_weights == RANDOM:
        return Backbone.create(config)
    source = backbone_weights or (published and published.backbone) or None
    if source is None:
        try:
            return Backbone.create(config, pretrained=True)
        except InputError as error:
            raise WeightsUnavailableError(str(error)) from error
    backbone = Backbone.create(config)
    load_backbone(backbone, source)
    return backbone


def seeded_network(config: ViTUpConfig) -> tuple[ViTUp, Backbone]:
    """Make a seeded random network, the same whatever PyTorch's defaults are, leaving its generators as they were.

    Every part is active, but a query moves little on its walk and the decoders are close to the identity, so that
    features show the image as a random patch embedding sees it.
    """
    with plain_defaults(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(RANDOM_SEED)
        network, vit = ViTUp(config), Backbone.create(config)
        for block in network.vit_up_blocks:
            nn.init.trunc_normal_(block.featx.gamma_beta_mlp.mlp[-1].weight, std=0.02)
            updates = (block.transition_mlp.mlp[-1], block.cross_attention.out_proj, block.mlp.mlp[-1])
            for weight in (*(layer.weight for layer in updates), block.norm_h_local.weight):
                weight.mul_(RANDOM_UPDATE)
        for decoder in network.decoder_mlp:
            linear = decoder.mlp[-1].weight
            linear.mul_(RANDOM_UPDATE).add_(torch.eye(config.dim, dtype=linear.dtype, device=linear.device))
        return network, vit


def model_card(header: Header, tensors: dict[str, Tensor], place: str) -> str:
    """Write the card of a saved model: what it is, how to use it, what its file holds.

    Args:
        header: of the file.
        tensors: in the file, under their published names.
        place: path or repository from which the model is loaded.
    """
    config = header.config
    parts = {"the network": 0, "adapters": 0, "the backbone": 0}
    for name, tensor in tensors.items():
        part = (
            "adapters"
            if ".lora_" in name
            else "the backbone"
            if name.startswith("backbone.")
            else "the network"
        )
        parts[part] += tensor.numel()
    holds = ", ".join(f"{part} ({count / 1e6:.1f} M)" for part, count in parts.items() if count)
    if header.adapters_merged:
        holds += "; adapters are merged into the backbone"
    absence = "" if parts["the backbone"] else "; they are not in the file"
    largest = max(tensors.values(), key=Tensor.numel)
    return f"""---
library_name: vitup_fast
pipeline_tag: image-feature-extraction
tags:
- feature-upsampling
- vision-transformer
- vit-up
---
# ViT-Up for {config.backbone}

Features of `{config.backbone}` at any continuous image coordinate
([ViT-Up](https://arxiv.org/abs/2606.14024)), for the library `vitup_fast`.

```python
import vitup_fast

model = vitup_fast.load("{place}")
features = model.dense(image, size=(448, 448))  # [1, 448, 448, {config.dim}]
```

| | |
| --- | --- |
| width, heads | {config.dim}, {config.num_heads} |
| depths of the backbone | {", ".join(map(str, config.layer_indices))} |
| image for hidden states | {" x ".join(map(str, header.hidden_layer_img_size))} pixels |
| the file holds | {holds} |
| in | {str(largest.dtype).removeprefix("torch.")} |

The backbone's weights are their authors', under their licence{absence}.
What the network was trained on, how well it does and its own licence are not known to the program that wrote this card:
please say so here.
"""


def _refuse_other_contents(published: PublishedTensors, shown: str) -> None:
    """Say what a file holds that holds no ViT-Up network."""
    marks = ("blocks.", "patch_embed.", "embeddings.", "layer.", "encoder.", "dinov3_vit.")
    is_backbone = published.backbone or any(name.startswith(marks) for name in published.vit_up)
    remedy = " It looks like a backbone: pass it as backbone_weights." if is_backbone else ""
    raise CheckpointError(f"{shown}: holds no ViT-Up network (no vit_up_blocks among its tensors).{remedy}")


def _shipped(name: str) -> Path:
    """Return the file of a model that is part of this package."""
    path = _SHIPPED_FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise WeightsUnavailableError(
            f"weights: {path.name} is missing from this installation of vitup_fast ({brief(path.parent, 300)}). "
            "Install it again, or pass weights=PATH to a local file."
        )
    return path


def _is_backbone(name: str) -> bool:
    """Whether a name is that of a model that timm can build."""
    if name.startswith("hf-hub:"):
        return True
    return bool(re.fullmatch(r"[\w.]+", name)) and require("timm", "timm", "building a backbone").is_model(
        name
    )


def _is(test: Any, path: Path) -> bool:
    """Whether a test of a path holds; no for what is no path to this system."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False
