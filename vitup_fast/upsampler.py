"""From an image to features at any coordinate: the object most users hold, and how it is loaded."""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError, brief, expected, require
from .heads import Head
from .images import normalise, write_atomically
from .matching import Matches, check_points, find_matches
from .network.adaptive import AdaptiveReport
from .network.backbone import PUBLISHED_LORA_SCALING, Backbone, config_for, plain_defaults
from .network.checkpoint import Header, check_finite, checkpoint_path, write_checkpoint
from .network.config import ViTUpConfig
from .network.image_cache import ImageCache
from .network.model import ViTUp, check_size
from .network.weights import Snapshot, ordinary_tensors, parameters_and_buffers, recordable
from .ops.checks import COORDINATE_DTYPES, FEATURE_DTYPES, are_plain, check_budget, check_coords
from .sources import (
    HUB_REVISION,
    WEIGHTS_NAME,
    Source,
    backbone_source,
    build_backbone,
    checked_source,
    existing_file,
    fetch_model,
    file_source,
    find_model,
    hub_label,
    model_card,
    model_file,
    read_parts,
)

if TYPE_CHECKING:
    from PIL.Image import Image


# Patches of the whole fine grid that cost as much as those which one point touches.
_POINT_PATCHES = 64


class _CurrentImages(NamedTuple):
    """Images, and what was computed of them by which weights."""

    pixels: Tensor  # [B, 3, H, W] normalised, not resized
    cache: ImageCache | None = None
    source: Snapshot | None = None
    dtype: torch.dtype | None = None
    points: int | None = (
        None  # how many were answered so far, if the fine grid holds the last call's patches alone
    )

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
        backbone: str | ViTUpConfig,
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
            backbone: name of a timm model, or ``"hf-hub:owner/name"``, with ``@`` and a commit, tag or branch behind it
                if its weights shall stay the same; or a configuration, which says all of this.
            depths: backbone depths to read, ascending from 0; None means seven, evenly spread.
            weights: None leaves the network as initialised from PyTorch's generator; a path reads a ViT-Up file.
            backbone_weights: None lets timm fetch its published weights; a path reads a file of the backbone as
                :func:`load` does; ``"random"`` leaves it as initialised.
            device: None takes a GPU if there is one.
            dtype: of all parameters.
            hidden_layer_img_size: see :class:`Upsampler`; None means what the file of weights says, or else the
                multiple of the patch size closest to 448.
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
        backbone_weights = backbone_source(backbone_weights)
        if isinstance(backbone, ViTUpConfig):
            config = backbone
            if config.backbone is None:
                raise expected(
                    "backbone", "a configuration that names its backbone", "one whose backbone is None"
                )
            for name, value in (("depths", depths), ("backbone_options", backbone_options)):
                if value is not None:
                    raise expected(name, "None beside a configuration, which has its own", value)
        else:
            config = config_for(backbone, depths, backbone_options=(backbone_options or {}).items())
        with plain_defaults():
            if weights is None:
                network, vit = ViTUp(config), build_backbone(config, backbone_weights)
            else:
                path = model_file("weights", weights)
                source = checked_source("custom", config, path, str(path))
                network, vit = read_parts(source, backbone_weights, merge_adapters=False)
                if hidden_layer_img_size is None and source.header is not None:
                    hidden_layer_img_size = source.header.hidden_layer_img_size
            if not vit.lora_parameters():
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

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Upsampler:
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote; its configuration is in the file.

        Args:
            pretrained_model_name_or_path: a folder, a safetensors file, or a repository ``owner/name`` of the hub.
            force_download: fetch the file again even if it is in the cache.
            token: access token of the hub; None takes the one that is logged in.
            cache_dir: folder of the hub's cache.
            local_files_only: take the file from the cache or not at all.
            revision: commit, tag or branch of the repository.
            options: as for :func:`load`, other than model, weights and revision.

        Raises:
            WeightsUnavailableError: the repository or its file cannot be fetched.
            CheckpointError: the file cannot be read, or does not carry its configuration.
            InputError: an argument that does not fit.
            MissingPackageError: an optional package is needed.
        """
        for name in ("model", "weights"):
            if name in options:
                raise expected(name, "no such argument", "one", "The file says which model it holds.")
        model = pretrained_model_name_or_path
        path, label = existing_file("pretrained_model_name_or_path", model), str(model)
        if path is None:
            hub_options = {
                "force_download": force_download,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
            }
            path = fetch_model(model, revision, **hub_options)
            label = hub_label(model, path, revision)
        return _load(cls, lambda: file_source(path, label), **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        merge_adapters: bool = False,
        include_backbone: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write network, adapters and backbone, with their configuration, as ``load(path)`` reads them.

        Args:
            save_directory: folder for ``model.safetensors``, ``config.json`` and a model card ``README.md`` (one
                that is there is left alone), made if it is missing; or a path that ends in ``.safetensors``, for
                the file alone.
            merge_adapters: fold adapters into the saved backbone instead of writing them beside it under their
                published names. The model itself is not changed.
            include_backbone: write the backbone's weights too. A small file without them needs the same backbone
                again, from timm's published weights or as ``backbone_weights``.
            dtype: of the saved parameters; None keeps this model's, bit for bit.

        Raises:
            InputError: a path that cannot be written, or a model that a file cannot describe.
            MissingPackageError: safetensors is not installed.
        """
        self._save(save_directory, "PATH", merge_adapters, include_backbone, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        merge_adapters: bool = False,
        include_backbone: bool = True,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face hub.

        Args:
            repo_id: the repository ``owner/name``, made if it is missing.
            merge_adapters: see :meth:`save_pretrained`.
            include_backbone: see :meth:`save_pretrained`.
            dtype: see :meth:`save_pretrained`.
            options: those of ``huggingface_hub.ModelHubMixin.push_to_hub``: commit_message, private, token, branch, ...

        Returns:
            The address of the commit.

        Raises:
            InputError: a model that a file cannot describe, or a failed upload.
            MissingPackageError: huggingface_hub or safetensors is not installed.
        """
        hub = require("huggingface_hub", "hub", "pushing to the hub")

        class Saved(hub.ModelHubMixin):
            """What the hub's mixin uploads."""

            def _save_pretrained(_, save_directory: Path) -> None:
                self._save(save_directory, repo_id, merge_adapters, include_backbone, dtype)

        try:
            return Saved().push_to_hub(repo_id, **options)
        except (InputError, ImportError, TypeError):
            raise
        except Exception as error:
            reason = brief(str(error).partition("\n")[0], 300) or type(error).__name__
            raise InputError(f"repo_id: cannot push to {brief(repo_id)} ({reason}).") from error

    def _save(
        self,
        save_directory: str | os.PathLike[str],
        place: str,
        merge_adapters: bool,
        include_backbone: bool,
        dtype: torch.dtype | None,
    ) -> None:
        """Write what :meth:`save_pretrained` says; the card says that it is loaded from ``place``."""
        target = checkpoint_path("save_directory", save_directory)
        scaling = self.backbone.lora_scaling
        header = Header(
            self.vit_up.config,
            self.hidden_layer_img_size,
            PUBLISHED_LORA_SCALING if scaling is None else scaling,
            self.backbone.adapters_merged or (merge_adapters and scaling is not None),
        )
        if dtype is not None:
            _check_dtype(dtype)
        tensors = self._saved_tensors(header, merge_adapters, include_backbone)
        if dtype is not None:
            constants = dict(self.vit_up.named_buffers())
            tensors = {name: t if name in constants else t.to(dtype) for name, t in tensors.items()}
        alone = target.suffix == ".safetensors"
        try:
            (target.parent if alone else target).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{brief(target, 300)}: cannot be made a folder ({error.strerror or error})."
            ) from error
        if alone:
            return write_checkpoint(target, tensors, header)
        write_checkpoint(target / WEIGHTS_NAME, tensors, header)
        _write_text(target / "config.json", json.dumps(header.to_dict(), indent=2) + "\n")
        if not (target / "README.md").exists():
            _write_text(target / "README.md", model_card(header, tensors, place))

    def _saved_tensors(
        self, header: Header, merge_adapters: bool, include_backbone: bool
    ) -> dict[str, Tensor]:
        """Return what a file shall hold, under the published names."""
        if header.config.backbone is None:
            raise expected("config.backbone", "the name of a timm model, for the file to say", None)
        if header.adapters_merged and not include_backbone:
            raise expected(
                "include_backbone",
                "True, since adapters are merged into the backbone",
                False,
                "Keep them apart: load(..., merge_adapters=False).",
            )
        tensors = {n.replace("_orig_mod.", ""): tensor for n, tensor in self.vit_up.state_dict().items()}
        with torch.device("meta"):
            unknown = tensors.keys() ^ ViTUp(header.config).state_dict().keys()
        if unknown:
            raise expected(
                "network", "plain layers", f"{min(unknown)} among its tensors", "Remove parametrizations."
            )
        if not merge_adapters:
            tensors |= self.backbone.lora_state_dict()
        if include_backbone:
            weights = self.backbone.weights_state_dict(merge_adapters=merge_adapters)
            tensors |= {f"backbone.{name}": tensor for name, tensor in weights.items()}
        return tensors

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

        Of new images that come with few coordinates only the patches they touch are embedded; features are the same up
        to rounding, and other calls for these images compute what they need.

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
        coords = self._moved("query_coords", query_coords)
        cache = self._images(images, lambda pixels: coords).cache
        options = self._budget(query_chunk_size)
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
        tolerance: float | None = None,
        query_chunk_size: int | None = None,
        progress: Callable[[int], object] | None = None,
        report: Callable[[AdaptiveReport], object] | None = None,
    ) -> Tensor | list[Tensor]:  # [B, H, W, D]
        """Predict features at the cell centres of an H x W grid over the image.

        Args:
            images: new images as for :meth:`set_images`; None keeps those set last.
            size: rows and columns (H, W) of the output; None means one feature per image pixel.
            return_all_layers: see :meth:`forward`.
            head: see :meth:`forward`.
            labels: see :meth:`forward`.
            tolerance: compute the cells alone where interpolation is expected to be off by more, and interpolate the
                others: 0.1 to 0.2 suit features, 0.5 to 2 labels; see :meth:`ViTUp.dense`. None computes every cell.
            query_chunk_size: overrides that of the constructor.
            progress: called after every chunk with the number of grid cells done in it.
            report: called with the :class:`AdaptiveReport` of a map with a tolerance.

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
            tolerance=tolerance,
            progress=progress,
            report=report,
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
        if not isinstance(pixels, Tensor) or pixels.dim() not in (2, 3) or pixels.shape[-1] != 2:
            got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise expected("pixels", "a tensor of shape (B, N, 2) or (N, 2)", got)
        if pixels.dtype not in COORDINATE_DTYPES:
            raise expected("pixels", "dtype float32 or float64", pixels.dtype)

        def coords_in(images: Tensor) -> Tensor:
            """The points as parts of the images' sides."""
            batched = pixels.expand(len(images), -1, -1) if pixels.dim() == 2 else pixels
            return self._moved("pixels", batched / pixels.new_tensor(images.shape[:1:-1]))

        current = self._images(images, coords_in)
        outputs = {"return_all_layers": return_all_layers, "head": head, "labels": labels}
        return self.vit_up(
            current.cache, coords_in(current.pixels), **outputs, **self._budget(query_chunk_size)
        )

    @torch.no_grad()
    def match(
        self,
        points: Tensor,  # [N, 2]
        image_a: Tensor | Image | None,
        image_b: Tensor | Image,
        coarse_size: tuple[int, int] | None = None,
    ) -> Matches:
        """Find points of one image in another: the best cell of a coarse map, refined to a fraction of a pixel.

        Args:
            points: (x, y) in pixels of ``image_a``, as for :meth:`points`.
            image_a: one image as for :meth:`set_images`; None takes the one set last.
            image_b: the image to search, from then on the one set last.
            coarse_size: rows and columns of the map that is searched first; None means two cells a token.

        Returns:
            Points ``[N, 2]`` in pixels of ``image_b``, in the dtype and on the device of ``points``, and the cosine
            ``[N]`` of the features there.

        Raises:
            InputError: an argument that does not fit, or several images.
        """
        check_points("points", points)
        size = None if coarse_size is None else check_size("coarse_size", coarse_size)
        if image_b is None:
            raise expected("image_b", "an image", None)
        a = self._one_image("image_a", image_a)
        b = self._one_image("image_b", image_b)
        budget = self._budget(None)
        features_at = lambda image, coords: self.vit_up(image.cache, coords[None], **budget)[0]  # noqa: E731
        wanted = features_at(a, self._moved("points", points / points.new_tensor(a.size[::-1])))  # [N, D]
        size = tuple(2 * n for n in b.cache.token_grid) if size is None else size
        coarse_map = self.vit_up.dense(b.cache, size, **budget)[0]  # [h, w, D]
        found, similarity = find_matches(wanted, coarse_map, partial(features_at, b), b.size)
        return Matches(found.to(points) * points.new_tensor(b.size[::-1]), similarity.to(points.device))

    def _one_image(self, name: str, image: Tensor | Image | None) -> _CurrentImages:
        """Compute an image that must be the only one, or return the one set last."""
        current = self._images(image)
        if len(current.pixels) != 1:
            raise expected(name, "one image", f"a batch of {len(current.pixels)}")
        return current

    def _images(
        self, images: Tensor | Image | None, coords_in: Callable[[Tensor], Tensor] | None = None
    ) -> _CurrentImages:
        """Compute new images if there are any, else return those set last, with all that a call needs.

        A call works on what this returns, whatever other threads set meanwhile. ``coords_in`` returns the points that
        the call asks for in images ``[B, 3, H, W]``: of few points only the patches they touch are embedded.
        """
        if images is not None:
            pixels = self._pixels(images)
            few = coords_in is not None and self._may_embed_few(pixels)
            return self._compute(pixels, coords_in(pixels) if few else None)
        if self._current is None:
            raise expected("images", "images, or a call of set_images before", None)
        return self._known_images(coords_in)

    def _set_images(self, images: Tensor | Image) -> _CurrentImages:
        """Check images, compute and remember them."""
        return self._compute(self._pixels(images))

    def _pixels(self, images: Tensor | Image) -> Tensor:  # [B, 3, H, W]
        """Check images, and move them to the network."""
        if not isinstance(images, Tensor):
            if not hasattr(images, "convert"):
                raise expected("images", "a tensor or a PIL image", type(images).__name__)
            images = normalise(images, self.backbone.mean, self.backbone.std)
        if images.dim() == 3:
            images = images.unsqueeze(0)
        if images.dim() != 4:
            raise expected("images", "shape (3, H, W) or (B, 3, H, W)", tuple(images.shape))
        return self._moved("images", images)

    def _known_images(self, coords_in: Callable[[Tensor], Tensor] | None = None) -> _CurrentImages:
        """The images set last, computed anew if weights or the compute type have changed since."""
        current = self._current
        complete = current.points is None
        if torch.compiler.is_compiling() and current.cache is not None and complete:
            return current
        unchanged = current.source is not None and current.source.holds(parameters_and_buffers(self))
        if not unchanged or current.dtype != self.vit_up.compute_dtype:
            return self._compute(current.pixels.to(self.device))
        if complete:
            return current
        coords = None if coords_in is None else coords_in(current.pixels)
        few = coords is not None and self._are_few(coords, current.points)
        with ordinary_tensors():
            grid = self.backbone.patch_grid(current.pixels, self.patch_grid_size, coords if few else None)
        cache = replace(current.cache, patch_grid=grid.to(current.cache.patch_grid.dtype).contiguous())
        points = current.points + coords.shape[1] if few else None
        current = self._current = current._replace(cache=cache, points=points)
        return current

    def _may_embed_few(self, pixels: Tensor) -> bool:
        """Whether the rest of the fine grid could be computed later, and no gradient flows through it."""
        gradients = torch.is_grad_enabled() and (
            pixels.requires_grad or any(p.requires_grad for p in self.backbone.parameters())
        )
        # Adapters may be enabled now and not then.
        return are_plain(pixels) and not gradients and not self.backbone.lora_parameters()

    def _are_few(self, coords: Tensor, before: int = 0) -> bool:
        """Whether embedding the patches that points touch is less work than the whole fine grid."""
        return (before + coords.shape[1]) * _POINT_PATCHES <= math.prod(self.patch_grid_size)

    def _compute(self, pixels: Tensor, coords: Tensor | None = None) -> _CurrentImages:  # [B, 3, H, W]
        """Run the backbone and prepare the network; of the fine grid take what few points need, if they are given."""
        # What PyTorch traces or transforms means nothing in a later call.
        remembers = are_plain(pixels)
        few = coords is not None and self._are_few(coords)
        with ordinary_tensors() if remembers else nullcontext():
            # The caller may write into the images before the rest of their fine grid is computed.
            pixels = pixels.clone() if few else recordable(pixels)
            hidden_states = self.backbone.hidden_states(pixels, self.hidden_layer_img_size)
            patch_grid = self.backbone.patch_grid(pixels, self.patch_grid_size, coords if few else None)
            cache = self.vit_up.prepare(hidden_states, patch_grid)
        if not remembers:
            return _CurrentImages(pixels, cache)
        source = Snapshot(parameters_and_buffers(self))
        points = coords.shape[1] if few else None
        current = self._current = _CurrentImages(pixels, cache, source, self.vit_up.compute_dtype, points)
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
    model: str | os.PathLike[str] = "vit_up_dinov3_splus",
    weights: str | os.PathLike[str] | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    hidden_layer_img_size: int | tuple[int, int] | None = None,
    query_chunk_size: int | None = None,
    max_memory: int | None = None,
    revision: str = HUB_REVISION,
    merge_adapters: bool = True,
    backbone: str | os.PathLike[str] | None = None,
) -> Upsampler:
    """Load a ViT-Up model for inference: parameters frozen, LoRA merged into the backbone.

    The model is the same whatever PyTorch's default dtype and device are, and inside of autocast or inference mode.

    Args:
        model: ``"vit_up_dinov3_splus"`` or ``"vit_up_dinov3_base"``, as published (or ``"splus"``, ``"base"``);
            ``"vit_up_dinov2_small"``, which ships with this library; ``"tiny"``; the path of a folder or file that
            :meth:`Upsampler.save_pretrained` wrote, or ``"owner/name"`` of one on the hub, which say themselves
            what they are; or the name of a timm vision transformer, with ``weights``.
        weights: None takes the shipped file or fetches the published one from the Hugging Face hub
            (``HF_HUB_OFFLINE=1`` restricts that to its cache); a path reads a safetensors file or a training
            checkpoint; ``"random"`` makes a seeded random network, for trying things out, and warns about it.
        backbone_weights: None uses the backbone inside a training checkpoint, or lets timm fetch its published
            weights; a path reads public DINOv3 or DINOv2 weights (safetensors, a torch checkpoint, ONNX) or a timm
            state dict; ``"random"`` leaves the backbone as initialised.
        device: None takes a GPU if there is one.
        dtype: None means bfloat16 on a GPU and float32 on a CPU. Coordinates stay float32 in any case.
        hidden_layer_img_size: see :class:`Upsampler`; None means what the file or the model's configuration says.
        query_chunk_size: see :class:`Upsampler`.
        max_memory: see :class:`Upsampler`.
        revision: commit, tag or branch of the hub's repository; ``model_config["weights"]`` names the commit that came.
            The backbone is timm's newest: pin it by a file, ``backbone_weights=hf_hub_download(..., revision=...)``.
        merge_adapters: False keeps LoRA apart from the backbone's weights (see :meth:`Backbone.merge_lora`).
        backbone: the earlier name of ``backbone_weights``.

    Raises:
        WeightsUnavailableError: weights cannot be fetched, or the shipped file is missing.
        CheckpointError: a file cannot be read, or does not fit the model.
        InputError: an argument that does not fit.
        MissingPackageError: an optional package is needed.
    """
    if backbone is not None:
        if backbone_weights is not None:
            raise expected("backbone", "nothing beside backbone_weights, whose earlier name it is", backbone)
        backbone_weights = backbone
    return _load(
        Upsampler,
        lambda: find_model(model, weights, revision),
        backbone_weights=backbone_weights,
        device=device,
        dtype=dtype,
        hidden_layer_img_size=hidden_layer_img_size,
        query_chunk_size=query_chunk_size,
        max_memory=max_memory,
        merge_adapters=merge_adapters,
    )


def _load(
    cls: type[Upsampler],
    find: Callable[[], Source],
    *,
    backbone_weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    hidden_layer_img_size: int | tuple[int, int] | None = None,
    query_chunk_size: int | None = None,
    max_memory: int | None = None,
    merge_adapters: bool = True,
) -> Upsampler:
    """Check the arguments of :func:`load` and build what ``find`` finds then."""
    if dtype is not None:
        _check_dtype(dtype)
    backbone_weights = backbone_source(backbone_weights)
    device = _usable_device(device)
    query_chunk_size, max_memory = check_budget(query_chunk_size, max_memory)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with plain_defaults():
        source = find()
        network, vit = read_parts(source, backbone_weights, merge_adapters=merge_adapters)
        if hidden_layer_img_size is None and source.header is not None:
            hidden_layer_img_size = source.header.hidden_layer_img_size
        upsampler = cls(
            network,
            vit,
            hidden_layer_img_size=hidden_layer_img_size,
            query_chunk_size=query_chunk_size,
            max_memory=max_memory,
            model_name=source.name,
            weights=source.label,
        )
        upsampler = upsampler.to(device, dtype).eval().requires_grad_(False)
        check_finite(upsampler.state_dict(), f"weights as {dtype}")
    if source.path is None:
        warnings.warn(
            f"{source.name}: these are seeded random weights, good for trying the library out; "
            "the features mean nothing.",
            stacklevel=3,
        )
    return upsampler


def _check_dtype(dtype: object) -> None:
    """Refuse what is no dtype of a network."""
    if not isinstance(dtype, torch.dtype) or dtype not in FEATURE_DTYPES:
        raise expected("dtype", "a floating torch.dtype of 16, 32 or 64 bits", repr(dtype))


def _write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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
