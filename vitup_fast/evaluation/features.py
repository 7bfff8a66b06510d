"""Ways to get features of an image at any size, behind one interface, so that all are judged alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import expected
from ..images import normalise
from ..network.backbone import Backbone
from ..network.image_cache import ImageCache
from ..network.model import ViTUp
from ..ops.checks import FEATURE_DTYPES
from ..upsampler import Upsampler

if TYPE_CHECKING:
    from PIL.Image import Image

BUILT_IN = NEAREST, BILINEAR, VIT_UP = "nearest", "bilinear", "ViT-Up"

Size: TypeAlias = tuple[int, int]
Head: TypeAlias = tuple[Tensor, Tensor]  # weight [C, D], bias [C]

FeatureFunction: TypeAlias = "Callable[[Image, Size, Size], Tensor | Sequence[Tensor]]"
"""Any upsampler: from an image, rows and columns (H, W) of the features, and height and width in pixels at which its
backbone may see the image, to features ``[H, W, D]``, or to a list of those of several depths, the last one last."""

Method: TypeAlias = "Callable[[Image], ImageFeatures]"
"""A way to get features: looks at an image once and answers as often as it is asked."""


class ImageFeatures:
    """Features of one image; a subclass says what they are at the cells of a grid, and the rest follows.

    Attributes:
        coarse_size: rows and columns of a map that shows all there is to find, before it is looked at closely.
    """

    coarse_size: Size

    def layers(self, size: Size) -> list[Tensor]:
        """Return the features of all depths there are at the cell centres of a grid.  # [H, W, D] each"""
        raise NotImplementedError

    def dense(self, size: Size) -> Tensor:
        """Return the features of the last depth at the cell centres of a grid.  # [H, W, D]"""
        return self.layers(size)[-1]

    def points(self, coords: Tensor) -> Tensor:
        """Return the features of the last depth at coordinates (x, y) in [0, 1].  # [N, 2] -> [N, D]"""
        raise NotImplementedError

    def scores(self, size: Size, head: Head) -> Tensor:
        """Return the scores of a linear head at the cell centres of a grid.  # [H, W, C]"""
        weight, bias = head
        return F.linear(self.dense(size).to(weight), weight, bias)


class TokenFeatures(ImageFeatures):
    """The backbone's own tokens, interpolated.

    Args:
        hidden_states: of every depth.  # [h, w, D] each
        mode: ``NEAREST`` or ``BILINEAR``.
    """

    def __init__(self, hidden_states: Sequence[Tensor], mode: str) -> None:
        self.hidden_states, self.mode = [h.to(torch.float32) for h in hidden_states], mode
        h, w, _ = hidden_states[-1].shape
        # Within a token all that is nearest to it is alike.
        self.coarse_size = (h, w) if mode == NEAREST else (2 * h, 2 * w)

    def layers(self, size: Size) -> list[Tensor]:
        """Interpolate the tokens of every depth."""
        return [self._enlarge(hidden, size) for hidden in self.hidden_states]

    def dense(self, size: Size) -> Tensor:
        """Interpolate the tokens of the last depth."""
        return self._enlarge(self.hidden_states[-1], size)

    def points(self, coords: Tensor) -> Tensor:
        """Interpolate the tokens of the last depth."""
        return sample(self.hidden_states[-1], coords, self.mode)

    def scores(self, size: Size, head: Head) -> Tensor:
        """Interpolate scores, which is the same as scoring what was interpolated."""
        weight, bias = head
        return self._enlarge(F.linear(self.hidden_states[-1].to(weight), weight, bias), size)

    def _enlarge(self, tokens: Tensor, size: Size) -> Tensor:
        # Of two equally near tokens "nearest-exact" takes the later, like a pixel whose centre lies on a border.
        options = (
            {"mode": "nearest-exact"}
            if self.mode == NEAREST
            else {"mode": "bilinear", "align_corners": False}
        )
        return F.interpolate(tokens.permute(2, 0, 1)[None], size, **options)[0].permute(1, 2, 0)


class UpsampledFeatures(ImageFeatures):
    """What a ViT-Up network makes of an image.

    Args:
        network: the network.
        cache: the image as its ``prepare`` returns it.
        budget: what bounds the memory of a pass, as keyword arguments of the network.
    """

    def __init__(self, network: ViTUp, cache: ImageCache, budget: dict[str, int | None]) -> None:
        self.network, self.cache, self.budget = network, cache, budget
        h, w = cache.token_grid
        self.coarse_size = (2 * h, 2 * w)

    def layers(self, size: Size) -> list[Tensor]:
        """Ask the network for all depths."""
        return [y[0] for y in self.network.dense(self.cache, size, return_all_layers=True, **self.budget)]

    def dense(self, size: Size) -> Tensor:
        """Ask the network for the last depth."""
        return self.network.dense(self.cache, size, **self.budget)[0]

    def points(self, coords: Tensor) -> Tensor:
        """Ask the network at these coordinates."""
        return self.network(self.cache, coords[None], **self.budget)[0]

    def scores(self, size: Size, head: Head) -> Tensor:
        """Fold the head into the network."""
        return self.network.dense(self.cache, size, head=head, **self.budget)[0]


class FunctionFeatures(ImageFeatures):
    """What any function makes of an image; between the cells of a grid it is interpolated bilinearly.

    Args:
        function: see :data:`FeatureFunction`.
        image: the image.
        input_size: height and width at which the backbone may see it.
    """

    def __init__(self, name: str, function: FeatureFunction, image: Image, input_size: Size) -> None:
        self.name, self.function, self.image, self.input_size = name, function, image, input_size
        self.coarse_size = tuple(max(1, n // 8) for n in input_size)

    def layers(self, size: Size) -> list[Tensor]:
        """Call the function, and check what it returns."""
        features = self.function(self.image, size, self.input_size)
        features = [features] if isinstance(features, Tensor) else list(features)
        if not features or not all(
            isinstance(f, Tensor)
            and f.dim() == 3
            and tuple(f.shape[:2]) == tuple(size)
            and f.dtype in FEATURE_DTYPES
            for f in features
        ):
            got = [tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__ for f in features]
            raise expected(f"method {self.name!r}", f"features of shape {(*size, 'D')}", got)
        if not all(f.isfinite().all() for f in features):
            raise expected(f"method {self.name!r}", "finite features", "NaN or infinity")
        return [f.detach() for f in features]

    @cached_property
    def _map(self) -> Tensor:
        return self.dense(self.input_size)

    def points(self, coords: Tensor) -> Tensor:
        """Interpolate a map with a cell for each pixel of the input."""
        return sample(self._map, coords, BILINEAR)


def sample(features: Tensor, coords: Tensor, mode: str) -> Tensor:
    """Sample a map at coordinates (x, y) in [0, 1], clamped to its borders; ``[H, W, D], [N, 2] -> [N, D]``."""
    grid = (2 * coords.to(features.device, torch.float32) - 1)[None, None]  # [1, 1, N, 2]
    maps = features.to(torch.float32).permute(2, 0, 1)[None]  # [1, D, H, W]
    sampled = F.grid_sample(maps, grid, mode=mode, padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T


def hidden_states(backbone: Backbone, image: Image, size: Size) -> list[Tensor]:
    """Hidden states of an image without the backbone's adapters.  # [h, w, D] each"""
    parameter = next(backbone.parameters())
    pixels = normalise(image, backbone.mean, backbone.std).to(parameter.device)
    with torch.no_grad(), backbone.adapters_disabled():
        return [h[0] for h in backbone.hidden_states(pixels, size)]


def frozen_backbone(model: Upsampler, teacher: Backbone | None) -> Backbone:
    """Return the backbone whose features are the truth: that of the model, unless adapters are merged into it.

    Raises:
        InputError: they are, and no other backbone is given; or it does not fit.
    """
    if teacher is None and model.backbone.adapters_merged:
        got = "none, and the adapters of the model's backbone are merged"
        raise expected("teacher", "the backbone without adapters", got, "Pass its published weights.")
    backbone = model.backbone if teacher is None else teacher
    if backbone.dim != model.backbone.dim or backbone.layer_indices != model.backbone.layer_indices:
        wanted = (
            f"width {model.backbone.dim} and depths {model.backbone.layer_indices} like the model's backbone"
        )
        raise expected("teacher", wanted, f"width {backbone.dim} and depths {backbone.layer_indices}")
    return backbone


def methods_of(
    model: Upsampler,
    size: Size | None = None,
    teacher: Backbone | None = None,
    functions: Mapping[str, FeatureFunction] | None = None,
) -> dict[str, Method]:
    """Return the ways to get features that are compared: nearest token, bilinear, ViT-Up, and any others.

    Args:
        model: the network, and its backbone.
        size: height and width in pixels at which the backbone sees the image; None means the model's own.
        teacher: the backbone without adapters, if that of the model has them merged.
        functions: other upsamplers by their names.

    Raises:
        InputError: a size that is no multiple of the patch size, or a name that is taken.
    """
    size = model.hidden_layer_img_size if size is None else size
    at_size = Upsampler(model.vit_up, model.backbone, hidden_layer_img_size=size)
    budget = {"query_chunk_size": model.query_chunk_size, "max_memory": model.max_memory}
    frozen = frozen_backbone(model, teacher)

    def upsampled(image: Image) -> UpsampledFeatures:
        with torch.no_grad():
            at_size.set_images(image)
            return UpsampledFeatures(model.vit_up, at_size.get_cache_data(), budget)

    methods: dict[str, Method] = {
        mode: lambda image, mode=mode: TokenFeatures(hidden_states(frozen, image, size), mode)
        for mode in (NEAREST, BILINEAR)
    }
    methods[VIT_UP] = upsampled
    for name, function in (functions or {}).items():
        if name in methods:
            raise expected("method", f"another name than {sorted(methods)}", name)
        methods[name] = partial(FunctionFeatures, name, function, input_size=size)
    return methods
