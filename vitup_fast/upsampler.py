"""From an image to features at any coordinate: the object most users hold, and how it is loaded."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError, brief, expected, require
from .heads import Head
from .images import normalise
from .network.backbone import Backbone, config_for, plain_defaults
from .network.checkpoint import (
    PublishedTensors,
    attach_lora,
    check_finite,
    checkpoint_path,
    load_backbone,
    load_strict,
    merge_lora,
    read_tensors,
    split_published,
)
from .network.config import ViTUpConfig
from .network.image_cache import ImageCache
from .network.model import ViTUp, check_size
from .network.weights import Snapshot, ordinary_tensors, parameters_and_buffers, recordable
from .ops.checks import COORDINATE_DTYPES, FEATURE_DTYPES, are_plain, check_budget, check_coords

if TYPE_CHECKING:
    from PIL.Image import Image

HUB_REPOSITORY = "Krispin/vit-up"
HUB_REVISION = "main"
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


class WeightsUnavailableError(InputError):
    """Published weights could not be fetched; the message says why and what to pass instead."""


class _CurrentImages(NamedTuple):
    """Images, and what was computed of them by which weights."""

    pixels: Tensor  # [B, 3, H, W] normalised, not resized
    cache: ImageCache | None = None
    source: Snapshot | None = None
    dtype: torch.dtype | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]


class Upsampler(nn.Module):
    """A backbone and its ViT-Up network: features of images at any continuous coordinate.

    Calls like the wrapper of the paper's authors (``set_images``, ``model(images, query_coords)``), except that
    coordinates keep float32 and gradients flow unless the caller disables them.

    Args:
        vit_up: the network.
        backbone: the vision transformer whose features are upsampled.
        hidden_layer_img_size: height and width in pixels, or one number for both, to which images are resized
            for the hidden states; multiples of the patch size. The fine patch grid is eight times as dense.
        query_chunk_size: queries walked through the network at once.
        max_memory: bytes a pass may use beyond weights, cache and output, instead of a chunk size.
        model_name: what :attr:`model_config` says.
        weights: what :attr:`model_config` says.

    Raises:
        InputError: the parts or sizes do not fit each other.
    """

    def __init__(
        self,
        vit_up: ViTUp,
        backbone: Backbone,
        *,
        hidden_layer_img_size: int | tuple[int, int] | None = None,
        query_chunk_size: int | None = None,
        max_memory: int | None = None,
        model_name: str = "custom",
        weights: str = "custom",
    ) -> None:
        super().__init__()
        if backbone.dim != vit_up.config.dim or backbone.layer_indices != vit_up.config.layer_indices:
            raise expected(
                "backbone",
                f"width {vit_up.config.dim} and depths {vit_up.config.layer_indices} like the network",
                f"width {backbone.dim} and depths {backbone.layer_indices}",
            )
        size = vit_up.config.hidden_layer_img_size if hidden_layer_img_size is None else hidden_layer_img_size
        if hasattr(size, "__index__") and not isinstance(size, bool):
            size = (size, size)
        self.hidden_layer_img_size = check_size("hidden_layer_img_size", size)
        patch = backbone.patch_size
        if self.hidden_layer_img_size[0] % patch or self.hidden_layer_img_size[1] % patch:
            raise expected(
                "hidden_layer_img_size", f"multiples of the patch size {patch}", self.hidden_layer_img_size
            )
        density = vit_up.config.patch_grid_density
        self.patch_grid_size = tuple(side // patch * density for side in self.hidden_layer_img_size)
        self.vit_up = vit_up
        self.backbone = backbone
        self.query_chunk_size, self.max_memory = check_budget(query_chunk_size, max_memory)
        self._names = {"model_name": model_name, "weights": weights}
        self._current: _CurrentImages | None = None

    @classmethod
    def create(
        cls,
        backbone: str,
        depths: Iterable[int] | None = None,
        weights: str | os.PathLike[str] | None = None,
        backbone_weights: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        hidden_layer_img_size: int | tuple[int, int] | None = None,
        query_chunk_size: int | None = None,
        max_memory: int | None = None,
        backbone_options: Mapping[str, object] | None = None,
    ) -> Upsampler:
        """Make a network for any timm vision transformer, ready to be trained: the backbone alone is frozen.

        Width, heads, patch size, prefix tokens, mean and deviation are found out.

        Args:
            backbone: name of a timm model, or ``"hf-hub:owner/name"``.
            depths: backbone depths to read, ascending from 0; None means seven, evenly spread.
            weights: None leaves the network as initialised from PyTorch's generator; a path reads a ViT-Up file.
            backbone_weights: None lets timm fetch its published weights; a path reads a file of the backbone as
                :func:`load` does; ``"random"`` leaves it as initialised.
            device: None takes a GPU if there is one.
            dtype: of all parameters.
            hidden_layer_img_size: see :class:`Upsampler`; None means the multiple of the patch size closest to 448.
            query_chunk_size: see :class:`Upsampler`.
            max_memory: see :class:`Upsampler`.
            backbone_options: keyword arguments for ``timm.create_model`` beyond the name.

        Raises:
            WeightsUnavailableError: published backbone weights cannot be fetched.
            CheckpointError: a file cannot be read, or does not fit.
            InputError: an argument that does not fit.
            MissingPackageError: an optional package is needed.
        """
        _check_dtype(dtype)
        device = _usable_device(device)
        options = tuple((backbone_options or {}).items())
        config = config_for(backbone, depths, backbone_options=options)
        published = PublishedTensors({}, {}, {})
        if weights is not None:
            weights = checkpoint_path("weights", weights)
            published = split_published(read_tensors(weights))
        with plain_defaults():
            network = ViTUp(config)
            if weights is not None:
                load_strict(network, published.vit_up, brief(weights, 300))
            vit = _load_vit(config, _backbone_source(backbone_weights), published)
            if published.lora:
                attach_lora(vit, published.lora)
            else:
                vit.requires_grad_(False)
            upsampler = cls(
                network,
                vit,
                hidden_layer_img_size=hidden_layer_img_size,
                query_chunk_size=query_chunk_size,
                max_memory=max_memory,
                weights="none" if weights is None else str(weights),
            )
            return upsampler.to(device, dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Leave images out: files and other processes get the model alone."""
        return {**self.__dict__, "_current": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Upsampler:
        """Copy the model; a copy computes the images anew, by its own weights, when it is asked."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        if self._current is not None:
            copied._current = _CurrentImages(self._current.pixels.detach())
        return copied

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.vit_up.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network, of its features, and of the backbone."""
        return self.vit_up.dtype

    @property
    def model_config(self) -> dict[str, Any]:
        """What was loaded, and how it runs."""
        return {
            **self._names,
            "backbone": self.vit_up.config.backbone,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "hidden_layer_img_size": self.hidden_layer_img_size,
            "query_chunk_size": self.query_chunk_size,
            "max_memory": self.max_memory,
            "dim": self.vit_up.config.dim,
            "layer_indices": self.vit_up.config.layer_indices,
        }

    def set_images(self, images: Tensor | Image) -> None:
        """Run the backbone on images and keep what queries need of them, replacing earlier images.

        When weights change afterwards as PyTorch counts it, the images are computed anew in the next call.

        Args:
            images: ``[3, H, W]`` or ``[B, 3, H, W]``, already normalised; or one PIL image, which is normalised
                here. Any size and proportion.

        Raises:
            InputError: not an image.
        """
        self._set_images(images)

    def get_cache_data(self) -> ImageCache | None:
        """Return the cache of the images set last, or None."""
        return None if self._current is None else self._known_images().cache

    def forward(
        self,
        images: Tensor | Image | None = None,
        query_coords: Tensor | None = None,  # [B, N, 2]
        query_chunk_size: int | None = None,
        return_all_layers: bool = False,
        *,
        head: Head | None = None,
        labels: bool = False,
    ) -> Tensor | list[Tensor]:  # [B, N, D]
        """Predict features at continuous coordinates.

        Args:
            images: new images as for :meth:`set_images`; None keeps those set last.
            query_coords: (x, y) in [0, 1] over the image, x to the right, float32 or float64, on any device.
            query_chunk_size: overrides that of the constructor.
            return_all_layers: return the list of features of all L depths.
            head: linear head folded into the decoder (``nn.Linear``, 1x1 ``nn.Conv2d`` or (weight, bias)); the
                output is then its C scores per query.
            labels: return the index of the head's largest score instead: uint8 up to 256 classes.

        Returns:
            Features ``[B, N, D]``, scores ``[B, N, C]``, labels ``[B, N]``, or the list of features.

        Raises:
            InputError: an argument that does not fit, or no images yet.
        """
        if query_coords is None:
            raise expected("query_coords", "a tensor of shape (B, N, 2)", None)
        check_coords(query_coords)
        cache = self._images(images).cache
        options = self._budget(query_chunk_size)
        coords = self._moved("query_coords", query_coords)
        outputs = {"return_all_layers": return_all_layers, "head": head, "labels": labels}
        return self.vit_up(cache, coords, **outputs, **options)

    def dense(
        self,
        images: Tensor | Image | None = None,
        size: tuple[int, int] | None = None,
        *,
        return_all_layers: bool = False,
        head: Head | None = None,
        labels: bool = False,
        query_chunk_size: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor | list[Tensor]:  # [B, H, W, D]
        """Predict features at the cell centres of an H x W grid over the image.

        Args:
            images: new images as for :meth:`set_images`; None keeps those set last.
            size: rows and columns (H, W) of the output; None means one feature per image pixel.
            return_all_layers: see :meth:`forward`.
            head: see :meth:`forward`.
            labels: see :meth:`forward`.
            query_chunk_size: overrides that of the constructor.
            progress: called after every chunk with the number of grid cells done in it.

        Returns:
            Features ``[B, H, W, D]``, scores ``[B, H, W, C]``, labels ``[B, H, W]``, or the list of features.

        Raises:
            InputError: an argument that does not fit, or no images yet.
        """
        current = self._images(images)
        size = current.size if size is None else size
        return self.vit_up.dense(
            current.cache,
            size,
            return_all_layers=return_all_layers,
            head=head,
            labels=labels,
            progress=progress,
            **self._budget(query_chunk_size),
        )

    def points(
        self,
        pixels: Tensor,  # [B, N, 2] or [N, 2]
        images: Tensor | Image | None = None,
        *,
        return_all_layers: bool = False,
        head: Head | None = None,
        labels: bool = False,
        query_chunk_size: int | None = None,
    ) -> Tensor | list[Tensor]:  # [B, N, D]
        """Predict features at positions given in pixels of the image.

        Args:
            pixels: (x, y) in pixels from the image's upper left corner, float32 or float64: the pixel in column j
                and row i has its centre at (j + 0.5, i + 0.5). ``[N, 2]`` means the same points in every image.
            images: new images as for :meth:`set_images`; None keeps those set last.
            return_all_layers: see :meth:`forward`.
            head: see :meth:`forward`.
            labels: see :meth:`forward`.
            query_chunk_size: overrides that of the constructor.

        Returns:
            Features ``[B, N, D]``, scores ``[B, N, C]``, labels ``[B, N]``, or the list of features.

        Raises:
            InputError: an argument that does not fit, or no images yet.
        """
        current = self._images(images)
        if isinstance(pixels, Tensor) and pixels.dim() == 2:
            pixels = pixels.expand(len(current.pixels), -1, -1)
        if not isinstance(pixels, Tensor) or pixels.dim() != 3 or pixels.shape[-1] != 2:
            got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise expected("pixels", "a tensor of shape (B, N, 2) or (N, 2)", got)
        if pixels.dtype not in COORDINATE_DTYPES:
            raise expected("pixels", "dtype float32 or float64", pixels.dtype)
        height, width = current.size
        coords = self._moved("pixels", pixels / pixels.new_tensor((width, height)))
        outputs = {"return_all_layers": return_all_layers, "head": head, "labels": labels}
        return self.vit_up(current.cache, coords, **outputs, **self._budget(query_chunk_size))

    def _images(self, images: Tensor | Image | None) -> _CurrentImages:
        """Compute new images if there are any, else return those set last.

        A call works on what this returns, whatever other threads set meanwhile.
        """
        if images is not None:
            return self._set_images(images)
        if self._current is None:
            raise expected("images", "images, or a call of set_images before", None)
        return self._known_images()

    def _set_images(self, images: Tensor | Image) -> _CurrentImages:
        """Check images, compute and remember them."""
        if not isinstance(images, Tensor):
            if not hasattr(images, "convert"):
                raise expected("images", "a tensor or a PIL image", type(images).__name__)
            images = normalise(images, self.backbone.mean, self.backbone.std)
        if images.dim() == 3:
            images = images.unsqueeze(0)
        if images.dim() != 4:
            raise expected("images", "shape (3, H, W) or (B, 3, H, W)", tuple(images.shape))
        return self._compute(self._moved("images", images))

    def _known_images(self) -> _CurrentImages:
        """The images set last, computed anew if weights or the compute type have changed since."""
        current = self._current
        if torch.compiler.is_compiling() and current.cache is not None:
            return current
        unchanged = current.source is not None and current.source.holds(parameters_and_buffers(self))
        if unchanged and current.dtype == self.vit_up.compute_dtype:
            return current
        return self._compute(current.pixels.to(self.device))

    def _compute(self, pixels: Tensor) -> _CurrentImages:  # [B, 3, H, W]
        """Run the backbone and prepare the network."""
        # What PyTorch traces or transforms means nothing in a later call.
        remembers = are_plain(pixels)
        with ordinary_tensors() if remembers else nullcontext():
            pixels = recordable(pixels)
            hidden_states = self.backbone.hidden_states(pixels, self.hidden_layer_img_size)
            patch_grid = self.backbone.patch_grid(pixels, self.patch_grid_size)
            cache = self.vit_up.prepare(hidden_states, patch_grid)
        if not remembers:
            return _CurrentImages(pixels, cache)
        source = Snapshot(parameters_and_buffers(self))
        current = self._current = _CurrentImages(pixels, cache, source, self.vit_up.compute_dtype)
        return current

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        """Move an argument to the network's device; one without values cannot be."""
        if self.device.type != "meta" and tensor.is_meta:
            raise expected(name, "a tensor that holds values", "one on the meta device")
        return tensor.to(self.device)

    def _budget(self, query_chunk_size: int | None) -> dict[str, int | None]:
        """Chunk size or memory budget of one pass."""
        if query_chunk_size is not None:
            return {"query_chunk_size": query_chunk_size}
        return {"query_chunk_size": self.query_chunk_size, "max_memory": self.max_memory}


def load(
    model: str = "vit_up_dinov3_splus",
    weights: str | os.PathLike[str] | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    hidden_layer_img_size: int | tuple[int, int] | None = None,
    query_chunk_size: int | None = None,
    max_memory: int | None = None,
    revision: str = HUB_REVISION,
) -> Upsampler:
    """Load a ViT-Up model for inference: parameters frozen, LoRA merged into the backbone.

    The model is the same whatever PyTorch's default dtype and device are, and inside of autocast or inference mode.

    Args:
        model: ``"vit_up_dinov3_splus"``, ``"vit_up_dinov3_base"`` (or ``"splus"``, ``"base"``), or ``"tiny"``.
        weights: None fetches the published file from the Hugging Face hub (``HF_HUB_OFFLINE=1`` restricts that
            to its cache); a path reads a published safetensors file or a training checkpoint; ``"random"`` makes
            a seeded random network, for trying things out, and warns about it.
        backbone_weights: None uses the backbone inside a training checkpoint, or lets timm fetch its published
            weights; a path reads public DINOv3 or DINOv2 weights (safetensors, a torch checkpoint, ONNX) or a timm
            state dict; ``"random"`` leaves the backbone as initialised.
        device: None takes a GPU if there is one.
        dtype: None means bfloat16 on a GPU and float32 on a CPU. Coordinates stay float32 in any case.
        hidden_layer_img_size: see :class:`Upsampler`; None means 448, as published.
        query_chunk_size: see :class:`Upsampler`.
        max_memory: see :class:`Upsampler`.
        revision: commit, tag or branch of the hub's repository.

    Raises:
        WeightsUnavailableError: published weights cannot be fetched.
        CheckpointError: a file cannot be read, or does not fit the model.
        InputError: an argument that does not fit.
        MissingPackageError: an optional package is needed.
    """
    name = ALIASES.get(model, model) if isinstance(model, str) else None
    if name not in PRESET_OF:
        raise expected("model", f"one of {sorted((*PRESET_OF, *ALIASES))}", repr(model))
    if dtype is not None:
        _check_dtype(dtype)
    random = isinstance(weights, str) and weights == "random"
    if weights is not None and not random:
        weights = checkpoint_path("weights", weights)
    backbone_weights = _backbone_source(backbone_weights)
    device = _usable_device(device)
    query_chunk_size, max_memory = check_budget(query_chunk_size, max_memory)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = ViTUpConfig.preset(PRESET_OF[name])

    with plain_defaults():
        if random:
            network, vit = seeded_network(config)
            if isinstance(backbone_weights, Path):
                load_backbone(vit, backbone_weights)
            warnings.warn(
                f"{name}: these are seeded random weights, good for trying the library out; the features mean nothing.",
                stacklevel=2,
            )
        else:
            path = _fetch(name, revision) if weights is None else weights
            published = split_published(read_tensors(path))
            network = ViTUp(config)
            load_strict(network, published.vit_up, brief(path, 300))
            vit = _load_vit(config, backbone_weights, published)
            if published.lora:
                merge_lora(vit, published.lora)
        upsampler = Upsampler(
            network,
            vit,
            hidden_layer_img_size=hidden_layer_img_size,
            query_chunk_size=query_chunk_size,
            max_memory=max_memory,
            model_name=name,
            weights=f"{HUB_REPOSITORY}@{revision}" if weights is None else str(weights),
        )
        upsampler = upsampler.to(device, dtype).eval().requires_grad_(False)
        check_finite(upsampler.state_dict(), f"weights as {dtype}")
    return upsampler


def _check_dtype(dtype: object) -> None:
    """Refuse what is no dtype of a network."""
    if not isinstance(dtype, torch.dtype) or dtype not in FEATURE_DTYPES:
        raise expected("dtype", "a floating torch.dtype of 16, 32 or 64 bits", repr(dtype))


def _backbone_source(backbone_weights: object) -> Path | str | None:
    """Return the path that the argument names, or "random", or None."""
    if backbone_weights is None or (isinstance(backbone_weights, str) and backbone_weights == "random"):
        return backbone_weights
    return checkpoint_path("backbone_weights", backbone_weights)


def _usable_device(device: str | torch.device | int | None) -> torch.device:
    """Return a device on which this PyTorch can hold numbers; None takes a GPU if there is one."""
    try:
        usable = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        if usable.type != "meta":
            torch.empty(0, dtype=torch.float32, device=usable)
            return usable
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, ImportError) as error:
        raise expected(
            "device", "a torch device that this PyTorch can use, such as 'cpu' or 'cuda'", repr(device)
        ) from error
    raise expected("device", "a torch device that holds numbers, such as 'cpu' or 'cuda'", repr(device))


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


def _fetch(name: str, revision: str) -> Path:
    """Fetch a published file from the hub, or from its cache."""
    hub = require("huggingface_hub", "hub", "fetching published weights")
    try:
        return Path(hub.hf_hub_download(HUB_REPOSITORY, f"{name}.safetensors", revision=revision))
    except Exception as error:
        reason = brief(str(error).partition("\n")[0], 300) or type(error).__name__
        raise WeightsUnavailableError(
            f"weights: cannot fetch {name}.safetensors from {HUB_REPOSITORY}@{brief(revision)} ({reason}). "
            "Pass weights=PATH to a local file, or weights='random' to try the library out."
        ) from error


def _load_vit(
    config: ViTUpConfig, backbone_weights: Path | str | None, published: PublishedTensors
) -> Backbone:
    """Build the backbone from a file, from the checkpoint itself, from timm's published weights, or at random."""
    if backbone_weights == "random":
        return Backbone.create(config)
    source = backbone_weights or published.backbone or None
    if source is None:
        try:
            return Backbone.create(config, pretrained=True)
        except InputError as error:
            raise WeightsUnavailableError(str(error)) from error
    vit = Backbone.create(config)
    load_backbone(vit, source)
    return vit
