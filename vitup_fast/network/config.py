"""The sizes of a ViT-Up network and its published presets (arXiv 2606.14024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import expected
from ..ops.checks import check_count

ROPE_BASE = 100.0
POSITION_CODE_BANDS = 16
POSITION_CODE_MAX_RESOLUTION = 10.0
TRANSITION_EXPANSION = 2
MLP_EXPANSION = 4


@dataclass(frozen=True)
class ViTUpConfig:
    """Sizes of a ViT-Up network.

    Attributes:
        dim: feature width D of the backbone and of the queries.
        num_heads: attention heads Hh; the head width ``dim / num_heads`` must be a multiple of 4 (2D RoPE).
        layer_indices: backbone depths read, ascending from 0; 0 is the embedding, i the output of block i.
        backbone: name of the timm model whose features are upsampled.
        backbone_options: keyword arguments for ``timm.create_model`` beyond the name.
        hidden_layer_img_size: side in pixels of the image from which hidden states are computed.
        patch_grid_density: patches of the fine patch grid per hidden-state token, along each axis.

    Raises:
        InputError: a size is no integer of its range, or the sizes do not fit each other.
    """

    dim: int
    num_heads: int
    layer_indices: tuple[int, ...]
    backbone: str | None = None
    backbone_options: tuple[tuple[str, object], ...] = ()
    hidden_layer_img_size: int = 448
    patch_grid_density: int = 8

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "hidden_layer_img_size", "patch_grid_density"):
            self._set(name, check_count(name, getattr(self, name)))
        if self.dim % (4 * self.num_heads):
            raise expected(
                "dim", "a positive multiple of 4 * num_heads", f"dim={self.dim}, num_heads={self.num_heads}"
            )
        if isinstance(self.layer_indices, str | bytes) or not isinstance(self.layer_indices, Iterable):
            raise expected("layer_indices", "at least two ascending depths from 0", repr(self.layer_indices))
        self._set("layer_indices", tuple(check_count("layer_indices", i, 0) for i in self.layer_indices))
        ascending = all(a < b for a, b in zip(self.layer_indices, self.layer_indices[1:], strict=False))
        if len(self.layer_indices) < 2 or self.layer_indices[0] != 0 or not ascending:
            raise expected("layer_indices", "at least two ascending depths from 0", self.layer_indices)
        if self.backbone is not None and not isinstance(self.backbone, str):
            raise expected("backbone", "the name of a timm model, or None", repr(self.backbone))
        options = self.backbone_options
        valid = isinstance(options, tuple | list) and all(
            isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in options
        )
        if not valid or len({name for name, _ in options}) < len(options):
            raise expected("backbone_options", 'pairs such as (("depth", 4),), one for a name', repr(options))
        self._set("backbone_options", tuple((name, value) for name, value in options))

    def _set(self, name: str, value: object) -> None:
        """Set a field of this frozen class while it is made."""
        object.__setattr__(self, name, value)

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.dim // self.num_heads

    @property
    def num_layers(self) -> int:
        """Number L of backbone depths read; the network has L - 1 blocks and L decoders."""
        return len(self.layer_indices)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them: lists for tuples, an object for the options."""
        fields = {**dataclasses.asdict(self), "backbone_options": dict(self.backbone_options)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ViTUpConfig:
        """Make a configuration of what :meth:`to_dict` returned, also when JSON has been between.

        Raises:
            InputError: a field is missing, unknown, or does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, Mapping) or sorted(fields) != sorted(names):
            got = list(fields) if isinstance(fields, Mapping) else type(fields).__name__
            raise expected("config", f"the fields {', '.join(names)}", got)
        options = fields["backbone_options"]
        if not isinstance(options, Mapping):
            raise expected("backbone_options", "named options", repr(options))
        return cls(**{**fields, "backbone_options": tuple((n, _frozen(v)) for n, v in options.items())})

    @classmethod
    def preset(cls, name: str) -> ViTUpConfig:
        """Return a configuration by name.

        Args:
            name: the published ``"dinov3_splus"`` and ``"dinov3_base"``, ``"dinov2_small"``, or ``"tiny"`` for tests.

        Raises:
            InputError: the name is unknown.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise expected("name", f"one of {sorted(PRESETS)}", repr(name))
        return PRESETS[name]


def _frozen(value: object) -> object:
    """Return tuples for JSON's lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


PRESETS = {
    "dinov3_splus": ViTUpConfig(
        dim=384,
        num_heads=6,
        layer_indices=(0, 2, 4, 6, 8, 10, 12),
        backbone="vit_small_plus_patch16_dinov3_qkvb",
    ),
    "dinov3_base": ViTUpConfig(
        dim=768,
        num_heads=12,
        layer_indices=(0, 2, 4, 6, 8, 10, 12),
        backbone="vit_base_patch16_dinov3_qkvb",
    ),
    "dinov2_small": ViTUpConfig(
        dim=384,
        num_heads=6,
        layer_indices=(0, 4, 8, 12),
        backbone="vit_small_patch14_dinov2",
        backbone_options=(("img_size", 518),),
    ),
    "tiny": ViTUpConfig(
        dim=64,
        num_heads=2,
        layer_indices=(0, 2, 4),
        backbone="vit_small_plus_patch16_dinov3_qkvb",
        backbone_options=(
            ("embed_dim", 64),
            ("depth", 4),
            ("num_heads", 2),
            ("mlp_ratio", 2.0),
            ("swiglu_align_to", 8),
        ),
        hidden_layer_img_size=64,
    ),
}
