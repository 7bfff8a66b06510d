"""The modules of the network under their published names: they hold parameters, and are read, not called."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..ops.coordinates import rope_inv_freq
from ..ops.primitives import LAYER_NORM_EPS
from .config import (
    MLP_EXPANSION,
    POSITION_CODE_BANDS,
    POSITION_CODE_MAX_RESOLUTION,
    ROPE_BASE,
    TRANSITION_EXPANSION,
)


class FixedPrecision(nn.Module):
    """Holds a constant buffer that follows the module's device but never its dtype, nor a meta device.

    Args:
        name: of the buffer.
        make: computes it, on the CPU.
        persistent: whether it belongs to the state dict.
    """

    def __init__(self, name: str, make: Callable[[], Tensor], persistent: bool) -> None:
        super().__init__()
        device = torch.get_default_device()
        self.register_buffer(name, make().to(device), persistent=persistent)
        self._name, self._make = name, make

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = getattr(self, self._name)
        super()._apply(fn, recurse)
        device = getattr(self, self._name).device
        if before.device.type == "meta" and device.type != "meta":
            before = self._make()
        setattr(self, self._name, before if device.type == "meta" else before.to(device))
        return self


def _position_code_freqs() -> Tensor:
    """Frequencies of the position code: by definition these float32 numbers, computed on the CPU."""
    end = math.log(POSITION_CODE_MAX_RESOLUTION)
    return torch.exp(torch.linspace(0.0, end, POSITION_CODE_BANDS, dtype=torch.float32, device="cpu"))


class PositionCode(FixedPrecision):
    """Frequencies f of the code of relative positions, ``freqs`` ``[F]``."""

    def __init__(self) -> None:
        super().__init__("freqs", _position_code_freqs, persistent=True)


class RotaryFrequencies(FixedPrecision):
    """Frequencies of the rotary positions of one axis, ``inv_freq`` ``[d / 4]``."""

    def __init__(self, head_dim: int) -> None:
        super().__init__("inv_freq", partial(rope_inv_freq, head_dim, ROPE_BASE), persistent=False)


class MLP(nn.Module):
    """Two linear layers with GELU between, behind a LayerNorm if ``norm``."""

    def __init__(self, dim: int, hidden: int, out: int, norm: bool) -> None:
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out)]
        self.mlp = nn.Sequential(*([nn.LayerNorm(dim, LAYER_NORM_EPS)] if norm else []), *layers)


class CrossAttention(nn.Module):
    """Projections of the cross-attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)


class Film(nn.Module):
    """The FiLM-modulated MLP of the nearest token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_input = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.gamma_beta_mlp = MLP(2 + 4 * POSITION_CODE_BANDS, dim, 2 * dim, norm=False)
        self.post_mlp = MLP(dim, MLP_EXPANSION * dim, dim, norm=True)
        # Training starts without modulation.
        nn.init.zeros_(self.gamma_beta_mlp.mlp[-1].weight)
        nn.init.zeros_(self.gamma_beta_mlp.mlp[-1].bias)


class Block(nn.Module):
    """One step of a query from one backbone depth to the next."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.transition_mlp = MLP(dim, TRANSITION_EXPANSION * dim, dim, norm=True)
        self.norm_q_global = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.norm_h_global = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.cross_attention = CrossAttention(dim)
        self.featx = Film(dim)
        self.norm_h_local = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.norm_post = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = MLP(dim, MLP_EXPANSION * dim, dim, norm=False)


class Decoder(nn.Module):
    """LayerNorm and linear layer from a query to the feature of its depth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim, LAYER_NORM_EPS), nn.Linear(dim, dim))
