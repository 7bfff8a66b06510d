"""The frozen vision transformer: from an image to its hidden states and its fine patch grid (ViT-Up, arXiv 2606.14024).

Any timm model with ``patch_embed``, ``blocks`` and ``norm`` will do; the published networks read DINOv3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError, brief, expected, require
from ..images import MEAN, STD
from ..ops.checks import FEATURE_DTYPES, check_coords, check_count, check_layer, check_plain
from .config import ViTUpConfig
from .patch_grid import Embedding, embed_grid, embed_places, interpolation_dtype, touched_places

LORA_PREFIX = "backbone.base_model.model."
PUBLISHED_LORA_SCALING = 2.0
# Columns of the fine grid whose learned positions are interpolated by one matrix.
_POSITION_BLOCK = 32


class Backbone(nn.Module):
    """A timm vision transformer, read at several depths.

    Args:
        model: timm model made with ``dynamic_img_size=True``; kept as ``.model``.
        layer_indices: depths to read; 0 is the embedding, i the output of block i (counted from 1).

    Attributes:
        adapters_merged: whether adapters have been folded into the weights, which then are no published ones.

    Raises:
        InputError: the model is no vision transformer with square patches, has too few blocks, or layers whose
            parameters are read (the patch embedding) do not compute what these say: wrappers, hooks.

    """

    def __init__(self, model: nn.Module, layer_indices: Iterable[int]) -> None:
        super().__init__()
        _check_model(model)
        self.layer_indices = tuple(check_count("layer_indices", index, 0) for index in layer_indices)
        depth = len(model.blocks)
        if not self.layer_indices or max(self.layer_indices) > depth:
            raise expected("layer_indices", f"depths from 0 to {depth}, the model's last", self.layer_indices)
        self.model = model
        self.adapters_merged = False

    @classmethod
    def create(cls, config: ViTUpConfig, *, pretrained: bool = False) -> Backbone:
        """Build the backbone that a configuration names, with the same values whatever PyTorch's defaults are.

        Args:
            config: names the timm model, its options and the depths to read.
            pretrained: let timm fetch its published weights; ``HF_HUB_OFFLINE=1`` restricts it to its cache.

        Raises:
            InputError: timm cannot build the model, or cannot get its weights.
            MissingPackageError: timm is not installed.

        """
        if config.backbone is None:
            raise expected("config.backbone", "the name of a timm model", None)
        with plain_defaults():
            model = _timm_model(config.backbone, config.backbone_options, pretrained)
        return cls(model, config.layer_indices).to(torch.get_default_device(), torch.get_default_dtype())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move or cast the model; the rotary periods keep at least their precision."""
        rope = getattr(self.model, "rope", None)
        before = dict(rope.named_buffers()) if isinstance(rope, nn.Module) else {}
        super()._apply(fn, recurse)
        for name, periods in before.items():
            cast = rope.get_buffer(name)
            if periods.is_meta and not cast.is_meta:
                raise expected(
                    "backbone",
                    "rotary periods that hold values",
                    "a model built on the meta device",
                    "Build the model on the CPU, then move it.",
                )
            owner, _, leaf = name.rpartition(".")
            wide = torch.promote_types(cast.dtype, periods.dtype)
            setattr(rope.get_submodule(owner), leaf, periods.to(cast.device, wide))
        return self

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.patch_embed.proj.kernel_size[0]

    @property
    def dim(self) -> int:
        """Feature width D."""
        return self.model.patch_embed.proj.out_channels

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each colour in [0, 1] that the model was trained with; ImageNet's where it does not say."""
        return self._pixel_statistic("mean", MEAN)

    @property
    def std(self) -> tuple[float, ...]:
        """Deviation of each colour that the model was trained with; ImageNet's where it does not say."""
        return self._pixel_statistic("std", STD)

    def hidden_states(
        self,
        images: Tensor,  # [B, 3, H, W]
        size: tuple[int, int],
    ) -> list[Tensor]:
        """Compute the hidden states of the chosen depths.

        Depth 0 is the embedding output; depth i the output of block i through the next block's first
        LayerNorm, or through the final norm after the last block. Prefix tokens are dropped.

        Args:
            images: normalised images, [B, 3, H, W], any floating dtype.
            size: height and width in pixels to which the images are resized, multiples of the patch size.

        Returns:
            One tensor [B, h, w, D] per layer index, with h, w = size / patch_size.

        Raises:
            InputError: images or size do not fit, or a layer whose parameters are read has hooks or a wrapper.

        """
        _check_layers(self.model)
        self._check_images(images)
        patches = _checked_size(size, self.patch_size)
        weight = self.model.patch_embed.proj.weight
        images = images.to(interpolation_dtype(images, weight))
        if images.shape[-2:] != tuple(size):
            images = F.interpolate(images, tuple(size), mode="bilinear", align_corners=False)
        images = images.to(weight.dtype)  # [B, 3, size]

        states = {}
        with _plain_factories():  # timm places its rotary angles by PyTorch's defaults
            if 0 in self.layer_indices:
                tokens = self.model.patch_embed(images)
                positions = self._positions(patches)
                if positions is not None:
                    positions = positions.rows(
                        torch.arange(patches[0], dtype=torch.int64, device=tokens.device)
                    )
                tokens = tokens.reshape(len(images), *patches, self.dim)
                states[0] = self._embedding_output(tokens, positions)
            depths = sorted(set(self.layer_indices) - {0})
            if depths:
                outputs = self.model.forward_intermediates(
                    images,
                    indices=[depth - 1 for depth in depths],
                    stop_early=True,
                    output_fmt="NLC",
                    intermediates_only=True,
                )
                for depth, output in zip(depths, outputs, strict=True):
                    states[depth] = self._norm_after(depth)(output).unflatten(1, patches)  # [B, h, w, D]
        return [states[depth] for depth in self.layer_indices]

    def patch_grid(
        self,
        images: Tensor,  # [B, 3, H, W]
        size: tuple[int, int],
        coords: Tensor | None = None,  # [B, N, 2]
    ) -> Tensor:
        """Embed the patches of the enlarged image, without ever holding that image.

        Equal to the embedding output (no blocks) of the image resized bilinearly to
        ``(P * patch_size, Q * patch_size)``, computed strip by strip. Gradients flow to the images and to the
        patch embedding.

        Args:
            images: normalised images, [B, 3, H, W], any floating dtype.
            size: rows P and columns Q of patches.
            coords: (x, y) in [0, 1], float32 or float64; only the patches that bilinear sampling reads there are
                computed, and the others are zeros. None computes all.

        Returns:
            Patch embeddings [B, P, Q, D], in the autocast dtype where autocast is on, else in the weights'.

        Raises:
            InputError: images or size do not fit, or a layer whose parameters are read has hooks or a wrapper.

        """
        _check_layers(self.model)
        self._check_images(images)
        size = _checked_size(size, 1)
        if coords is not None:
            check_coords(coords, batch=len(images))
        embed = self.model.patch_embed
        weight = embed.proj.weight
        device = images.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        embedding = Embedding(weight, embed.proj.bias, dtype)
        positions = self._positions(size)
        finished = lambda tokens, places: self._embedding_output(embed.norm(tokens), places)  # noqa: E731
        with _plain_factories():
            if coords is None:
                return embed_grid(
                    images, embedding, size, lambda t, rows: finished(t, positions and positions.rows(rows))
                )
            places = touched_places(coords, size)
            return embed_places(
                images, embedding, size, places, lambda t, *at: finished(t, positions and positions.at(*at))
            )

    def add_lora(self, rank: int, scaling: float = PUBLISHED_LORA_SCALING) -> None:
        """Freeze the model and add trainable low-rank adapters, at first without effect.

        They sit on the patch embedding and on q, k, v and o of every block, as parametrizations of the
        weights. An adapter that lives in weight space cannot have the authors' dropout of its input, which is
        left out.

        Args:
            rank: rank r of every adapter.
            scaling: alpha / r.

        Raises:
            InputError: adapters are there already, rank or scaling are no such numbers, or a layer that takes
                adapters is missing (q, k and v must be fused), wrapped, hooked or parametrized.

        """
        rank, scaling = check_count("rank", rank), check_scaling(scaling)
        sites = lora_sites(self)
        self.model.requires_grad_(False)
        for site in sites:
            adapter = LoRA(site.module.weight, site.names, rank, scaling)
            parametrize.register_parametrization(site.module, "weight", adapter)

    def merge_lora(self) -> None:
        """Fold the adapters into the weights, in float64, and remove them.

        Raises:
            InputError: a merged weight is not finite in the weights' dtype; nothing has changed.
        """
        if not self._adapters():
            return
        for module, weight in self._merged_weights().items():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            with torch.no_grad():
                module.weight.copy_(weight)
        self.adapters_merged = True

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Run the model without its adapters inside the ``with`` block (the teacher in training)."""
        adapters = self._adapters()
        before = [adapter.enabled for adapter in adapters]
        try:
            for adapter in adapters:
                adapter.enabled = False
            yield
        finally:
            for adapter, enabled in zip(adapters, before, strict=True):
                adapter.enabled = enabled

    def lora_parameters(self) -> list[nn.Parameter]:
        """Return the adapters' parameters, empty without adapters."""
        return [parameter for adapter in self._adapters() for parameter in adapter.parameters()]

    def lora_state_dict(self) -> dict[str, Tensor]:
        """Return copies of the adapters under their published names; empty without any."""
        tensors = {}
        for adapter in self._adapters():
            lora_a, lora_b = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
            for name, a, b in zip(adapter.names, lora_a, lora_b, strict=True):
                a_shape, b_shape = lora_shapes(adapter.weight_shape, len(adapter.names), len(a))
                tensors[lora_key(name, "A")] = a.view(a_shape)
                tensors[lora_key(name, "B")] = b.view(b_shape)
        return tensors

    def weights_state_dict(self, *, merge_adapters: bool = False) -> dict[str, Tensor]:
        """Return the model's tensors under timm's names, whether it has adapters or not.

        Args:
            merge_adapters: return weights into which the adapters are folded; the model keeps them apart.

        Raises:
            InputError: a layer is parametrized by something else than adapters, or a merged weight is not finite.
        """
        merged = self._merged_weights() if merge_adapters and self._adapters() else {}
        folded = {f"{name}.weight": merged[m] for name, m in self.model.named_modules() if m in merged}
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            owner, _, rest = name.partition(".parametrizations.")
            if rest:
                if rest.startswith("weight.0.lora_"):
                    continue
                made = self.model.get_submodule(owner).parametrizations
                if rest != "weight.original" or not isinstance(made.weight[0], LoRA) or len(made.weight) > 1:
                    raise expected("backbone", "plain layers and adapters", f"a parametrization of {owner}")
                name = f"{owner}.weight"
            tensors[name] = folded.get(name, tensor.detach())
        return tensors

    @property
    def lora_scaling(self) -> float | None:
        """The scaling alpha / r of the adapters; None without any.

        Raises:
            InputError: adapters have different scalings, which no file can say.
        """
        scalings = {adapter.scaling for adapter in self._adapters()}
        if len(scalings) > 1:
            raise expected("adapters", "one scaling", sorted(scalings))
        return scalings.pop() if scalings else None

    def _merged_weights(self) -> dict[nn.Module, Tensor]:
        """Return the weights of all adapted layers with their adapters folded in."""
        merged = {}
        for module, names in _sites(self.model):
            original, (adapter,) = module.parametrizations.weight.original, module.parametrizations.weight
            merged[module] = merged_weight(original, adapter.lora_A, adapter.lora_B, adapter.scaling)
            if not merged[module].isfinite().all():
                raise expected("adapters", "finite merged weights", f"NaN or infinity in {names[0]}")
        return merged

    def _adapters(self) -> list[LoRA]:
        """List the adapters in the order of their layers."""
        return [module for module in self.model.modules() if isinstance(module, LoRA)]

    def _pixel_statistic(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Read three numbers of timm's ``pretrained_cfg``; refuse a model of other than three channels."""
        channels = self.model.patch_embed.proj.in_channels
        if channels != 3:
            remedy = "Pass a normalised tensor (B, C, H, W)."
            raise expected("images", f"the {channels} channels of this backbone", "an RGB picture", remedy)
        values = (getattr(self.model, "pretrained_cfg", None) or {}).get(name)
        if values is None:
            return default
        values = tuple(float(value) for value in values)
        sound = len(values) == 3 and all(map(math.isfinite, values)) and (name == "mean" or min(values) > 0)
        if not sound:
            raise expected(f"pretrained_cfg[{name!r}]", "three numbers, deviations above zero", values)
        return values

    def _norm_after(self, depth: int) -> nn.Module:
        """Return the norm that reads the output of a depth."""
        blocks = self.model.blocks
        return blocks[depth].norm1 if depth < len(blocks) else self.model.norm

    def _positions(self, size: tuple[int, int]) -> _Positions | None:
        """Return the learned positions of a grid of patches; None if the model has none."""
        model = self.model
        if getattr(model, "pos_embed", None) is None:
            return None
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        table = model.pos_embed[0, prefix:].unflatten(0, tuple(model.patch_embed.grid_size))
        return _Positions.resampled(table, size)

    def _embedding_output(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Add what timm puts between patch embedding and first block: absolute positions and a norm."""
        tokens = tokens if positions is None else tokens + positions
        return self.model.norm_pre(tokens) if hasattr(self.model, "norm_pre") else tokens

    def _check_images(self, images: Tensor) -> None:
        """Refuse what is not a batch of floating-point images with the model's channels."""
        channels = self.model.patch_embed.proj.in_channels
        if not isinstance(images, Tensor):
            raise expected("images", f"a tensor of shape (B, {channels}, H, W)", type(images).__name__)
        check_plain("images", images)
        shape = tuple(images.shape)
        if images.ndim != 4 or shape[1] != channels or 0 in shape:
            raise expected("images", f"shape (B, {channels}, H, W), none of them zero", shape)
        if images.dtype not in FEATURE_DTYPES:
            raise expected("images", "a floating dtype", images.dtype, "Convert and normalise them first.")
        device = next(self.model.parameters()).device
        if images.device != device:
            raise expected("images", f"device {device} like the backbone", images.device)


def config_for(
    backbone: str,
    depths: Iterable[int] | None = None,
    *,
    backbone_options: Iterable[tuple[str, object]] = (),
    hidden_layer_img_size: int | None = None,
    patch_grid_density: int = 8,
) -> ViTUpConfig:
    """Find out the configuration of a network for a timm vision transformer.

    Args:
        backbone: name of a timm model, or ``"hf-hub:owner/name"``.
        depths: backbone depths to read, ascending from 0; None means seven, evenly spread.
        backbone_options: keyword arguments for ``timm.create_model`` beyond the name.
        hidden_layer_img_size: see :class:`ViTUpConfig`; None means the multiple of the patch size closest to 448.
        patch_grid_density: see :class:`ViTUpConfig`.

    Returns:
        The configuration, as wide as the backbone and with as many heads.

    Raises:
        InputError: timm cannot build the model, it is no vision transformer that :class:`Backbone` takes, or an
            argument does not fit it.
        MissingPackageError: timm is not installed.

    """
    if not isinstance(backbone, str) or not backbone.strip():
        raise expected("backbone", "the name of a timm model", repr(backbone))
    options = tuple(backbone_options)
    with plain_defaults(), torch.device("meta"):
        model = Backbone(_timm_model(backbone, options, pretrained=False), (0,))
    last = len(model.model.blocks)
    if depths is None:
        depths = sorted({round(i * last / 6) for i in range(7)})
    if hidden_layer_img_size is None:
        hidden_layer_img_size = max(1, round(448 / model.patch_size)) * model.patch_size
    num_heads = getattr(getattr(model.model.blocks[0], "attn", None), "num_heads", None)
    if num_heads is None:
        raise expected("backbone", "attention that tells its number of heads", backbone)
    config = ViTUpConfig(
        dim=model.dim,
        num_heads=num_heads,
        layer_indices=depths,
        backbone=backbone,
        backbone_options=options,
        hidden_layer_img_size=hidden_layer_img_size,
        patch_grid_density=patch_grid_density,
    )
    if config.layer_indices[-1] > last:
        raise expected("depths", f"depths from 0 to {last}, the last of {backbone}", config.layer_indices)
    return config


class LoRA(nn.Module):
    """Low-rank update ``weight + scaling * B A`` of a weight whose rows come in equal named parts (q, k, v).

    ``lora_A`` [parts, r, in] starts as in peft (Kaiming uniform), ``lora_B`` [parts, out / parts, r] at zero.
    """

    def __init__(self, weight: Tensor, names: tuple[str, ...], rank: int, scaling: float) -> None:
        super().__init__()
        self.names = names
        self.weight_shape = weight.shape
        rows, columns = weight.flatten(1).shape
        self.scaling = scaling
        self.enabled = True
        self.lora_A = nn.Parameter(weight.new_empty(len(names), rank, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(len(names), rows // len(names), rank))
        nn.init.uniform_(self.lora_A, -(columns**-0.5), columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, or the weight itself while disabled."""
        if not self.enabled:
            return weight
        return weight + (self.scaling * (self.lora_B @ self.lora_A)).view_as(weight)


class LoRASite(NamedTuple):
    """A layer that carries adapters, and the published name of each part of its rows."""

    module: nn.Module
    names: tuple[str, ...]


def lora_key(name: str, matrix: str) -> str:
    """Return the published key of matrix ``"A"`` or ``"B"`` of the adapter on a module."""
    return f"{LORA_PREFIX}{name}.lora_{matrix}.default.weight"


def lora_shapes(weight_shape: torch.Size, parts: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the published shapes of A [r, in...] and B [out / parts, r, 1...] for one part of a weight."""
    rows, *columns = weight_shape
    return (rank, *columns), (rows // parts, rank, *[1] * (len(columns) - 1))


def lora_sites(backbone: Backbone) -> list[LoRASite]:
    """List the layers that take adapters: patch embedding, then q, k, v and o of every block.

    Raises:
        InputError: adapters are there already, the model's attention has no fused qkv, or a layer is wrapped,
            hooked or parametrized.

    """
    if backbone.lora_parameters():
        raise expected("backbone", "a model without adapters", "one with", "Call merge_lora() before.")
    for n, block in enumerate(backbone.model.blocks):
        if getattr(getattr(block, "attn", None), "qkv", None) is None:
            raise expected(
                "backbone",
                f"one fused qkv layer in block {n}",
                "none",
                "Build the timm model with qkv_fused=True.",
            )
    sites = _sites(backbone.model)
    for module, names in sites:
        if not isinstance(module, nn.Linear | nn.Conv2d) or "weight" not in dict(module.named_parameters()):
            raise expected(
                names[0],
                "a layer with a weight of its own",
                f"{type(module).__module__}.{type(module).__qualname__}",
                "Merge or remove what wraps it or makes its weight (weight_norm, prune, a parametrization).",
            )
    return sites


def check_scaling(scaling: object) -> float:
    """Return the scaling alpha / r of adapters, a finite number."""
    if not isinstance(scaling, Real) or not math.isfinite(scaling):
        raise expected("scaling", "a finite number", repr(scaling))
    return float(scaling)


def _timm_model(name: str, options: Iterable[tuple[str, object]], pretrained: bool) -> nn.Module:
    """Build a timm model without its classifier, for images of any size."""
    timm = require("timm", "timm", "building a backbone")
    options = {"num_classes": 0, "dynamic_img_size": True, **dict(options)}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        reason = brief(str(error).partition("\n")[0], 300) or type(error).__name__
        if pretrained:
            raise InputError(
                f"backbone: timm could not get the pretrained weights of {name!r} ({reason}); "
                "pass a local file instead: backbone_weights=PATH."
            ) from error
        raise InputError(f"backbone: timm could not build {name!r} ({reason}).") from error


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Build modules as in a fresh process: in float32 on the CPU, outside of autocast and inference mode."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), _plain_factories():
        yield


@contextmanager
def _float32_on_cpu() -> Iterator[None]:
    """Make float32 and the CPU PyTorch's defaults."""
    dtype = torch.get_default_dtype()
    with torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _defaults_are_plain() -> bool:
    """Whether calls that name no dtype or device make float32 on the CPU."""
    return torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"


# The compiler guards these defaults itself, and compiles again when they change.
_defaults_are_plain._dynamo_marked_constant = True


def _plain_factories() -> AbstractContextManager[None]:
    """Let calls that name no dtype or device make float32 on the CPU, whatever PyTorch's defaults are."""
    return nullcontext() if _defaults_are_plain() else _float32_on_cpu()


@torch.no_grad()
def merged_weight(
    weight: Tensor,  # [out, ...]
    lora_a: Tensor,  # [parts, r, in]
    lora_b: Tensor,  # [parts, out / parts, r]
    scaling: float,
) -> Tensor:
    """Return ``weight + scaling * B A``, computed in float64 and rounded once to the weight's dtype."""
    update = lora_b.to(weight.device, torch.float64) @ lora_a.to(weight.device, torch.float64)
    return (weight.double() + scaling * update.view_as(weight)).to(weight.dtype)


def _sites(model: nn.Module) -> list[LoRASite]:
    """List the layers of a checked model that take adapters."""
    sites = [LoRASite(model.patch_embed.proj, ("embeddings.patch_embeddings",))]
    for n, block in enumerate(model.blocks):
        attention = f"layer.{n}.attention."
        sites.append(LoRASite(block.attn.qkv, tuple(f"{attention}{part}_proj" for part in "qkv")))
        sites.append(LoRASite(block.attn.proj, (f"{attention}o_proj",)))
    return sites


class _Positions(NamedTuple):
    """Learned positions, resized as timm does, bicubic with antialiasing, by a small matrix for each axis.

    Attributes:
        table: the learned positions.  # [R, C, D]
        of_rows: None where the table has the grid's size.  # [P, R]
        of_columns: see ``of_rows``.  # [Q, C]
        bands: ``of_columns`` in blocks of neighbours, which read few columns of the table.  # [blocks, block, band]
        seen: which these are.  # [blocks, band]
    """

    table: Tensor
    of_rows: Tensor | None = None
    of_columns: Tensor | None = None
    bands: Tensor | None = None
    seen: Tensor | None = None

    @classmethod
    def resampled(cls, table: Tensor, size: tuple[int, int]) -> _Positions:
        """Resize a table to a grid of ``size``."""
        if tuple(table.shape[:2]) == size:
            return cls(table)
        of_rows, of_columns = (
            F.interpolate(
                torch.eye(source, dtype=torch.float64, device=table.device)[None, None],
                (target, source),
                mode="bicubic",
                antialias=True,
            )[0, 0].to(torch.promote_types(table.dtype, torch.float32))  # [target, source]
            for source, target in zip(table.shape[:2], size, strict=True)
        )
        columns = table.shape[1]
        block = max(n for n in range(1, _POSITION_BLOCK + 1) if size[1] % n == 0)
        # Bicubic interpolation reads two neighbours on either side, scaled where the table is reduced.
        reach = math.ceil(2 * max(1, columns / size[1])) + 1
        first = [math.floor((i + 0.5) * columns / size[1] - 0.5) - reach for i in range(0, size[1], block)]
        band = min(columns, math.ceil(block * columns / size[1]) + 2 * reach + 1)
        first = torch.tensor(first, dtype=torch.int64, device=table.device).clamp(0, columns - band)
        seen = first[:, None] + torch.arange(band, dtype=torch.int64, device=table.device)  # [blocks, band]
        blocks = of_columns.unflatten(0, (-1, block))  # [blocks, block, C]
        bands = blocks.gather(2, seen[:, None].expand(-1, block, -1))
        return cls(table, of_rows, of_columns, bands, seen)

    def rows(self, rows: Tensor) -> Tensor:
        """Positions of some rows of the grid; ``[..., Q, D]``."""
        if self.of_rows is None:
            return self.table[rows]
        with torch.autocast(self.table.device.type, enabled=False):
            near = self._along(self.of_rows[rows])[..., self.seen, :]  # [..., blocks, band, D]
            return (self.bands @ near).flatten(-3, -2).to(self.table.dtype)

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Positions of single patches; ``[n, D]``."""
        if self.of_rows is None:
            return self.table[row, column]
        rows, counts = row.unique_consecutive(return_counts=True)
        with torch.autocast(self.table.device.type, enabled=False):
            columns = self.of_columns[column].split(counts.tolist())  # [n of the row, C] each
            along = self._along(self.of_rows[rows])  # [rows, C, D]
            return torch.cat([c @ a for c, a in zip(columns, along, strict=True)]).to(self.table.dtype)

    def _along(self, of_rows: Tensor) -> Tensor:
        """Interpolate rows; ``[..., R] -> [..., C, D]``."""
        table = self.table.to(of_rows.dtype)
        return (of_rows @ table.flatten(1)).unflatten(-1, table.shape[1:])


def _check_model(model: nn.Module) -> None:
    """Refuse a model whose hidden states or patch grid could not be computed."""
    parts = ("patch_embed", "blocks", "norm", "forward_intermediates")
    missing = [part for part in parts if not hasattr(model, part)]
    if missing:
        raise expected("model", "a timm vision transformer", f"one without {', '.join(missing)}")
    if not all(hasattr(block, "norm1") for block in model.blocks):
        raise expected("model", "blocks that begin with a norm1", type(model.blocks[0]).__name__)
    require("timm.layers", "timm", "a backbone")
    _check_layers(model)
    proj = model.patch_embed.proj
    square = proj.kernel_size == proj.stride and len(set(proj.stride)) == 1
    padded = proj.padding not in ("valid", (0, 0)) or proj.dilation != (1, 1)
    if not square or padded or proj.groups != 1:
        raise expected("model", "a convolution over square patches as patch_embed.proj", proj)
    if not getattr(model, "dynamic_img_size", False):
        raise expected(
            "model", "a timm model for any image size", "a fixed size", "Build it with dynamic_img_size=True."
        )


def _check_layers(model: nn.Module) -> None:
    """Check the layers whose parameters are read here, or by timm, without a call."""
    from timm.layers import PatchEmbed

    check_layer("model", model, type(model))
    check_layer("model.patch_embed", model.patch_embed, PatchEmbed)
    check_layer("model.patch_embed.proj", model.patch_embed.proj, nn.Conv2d)
    for n, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        biased = getattr(attention, "q_bias", None) is not None  # timm joins three biases to the fused weight
        if biased and attention.qkv is not None and not getattr(attention, "qkv_bias_separate", False):
            check_layer(f"model.blocks.{n}.attn.qkv", attention.qkv, nn.Linear)


def _checked_size(size: tuple[int, int], unit: int) -> tuple[int, int]:
    """Return a size in units, or refuse one that is not two positive multiples."""
    integers = isinstance(size, Sequence) and all(
        isinstance(n, Integral) and not isinstance(n, bool) for n in size
    )
    if not integers or len(size) != 2 or any(n < 1 or n % unit for n in size):
        raise expected("size", "two positive integers" + (f", multiples of {unit}" if unit > 1 else ""), size)
    return int(size[0]) // unit, int(size[1]) // unit
