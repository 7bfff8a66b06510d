"""The authors' implementation as a provider, from the checkout that ``VITUP_REFERENCE`` points at.

Nothing of it is part of this project: its modules are imported from that path when a benchmark asks for them,
assembled in the sizes of the network under test, and given the same weights, hidden states and patch grid.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from vitup_fast import ViTUp
from vitup_fast.errors import expected
from vitup_fast.network.config import (
    MLP_EXPANSION,
    POSITION_CODE_BANDS,
    POSITION_CODE_MAX_RESOLUTION,
    ROPE_BASE,
    TRANSITION_EXPANSION,
)

VARIABLE = "VITUP_REFERENCE"
WINDOW = 32
EXPECTATION = (
    "a checkout of the authors' repository (krispinwandel/vit-up), with vit_up/model/vit_up.py in it"
)


def checkout() -> Path | None:
    """Return the path that ``VITUP_REFERENCE`` names, or None where it is not set.

    Raises:
        InputError: no such checkout there.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    path = Path(value).expanduser()
    if not (path / "vit_up" / "model" / "vit_up.py").is_file():
        raise expected(VARIABLE, EXPECTATION, repr(value))
    return path.resolve()


@contextlib.contextmanager
def _search_first(path: Path) -> Iterator[None]:
    """Let imports look into a folder first."""
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))


def _modules(path: Path) -> dict[str, ModuleType]:
    """Import its building blocks, all of them from the checkout."""
    names = (
        "model.vit_up",
        *(
            f"layers.{n}"
            for n in ("query_encoder", "pos_enc", "continuous_rope", "cross_attention", "film", "mlp")
        ),
    )
    try:
        with _search_first(path):
            modules = {name: importlib.import_module(f"vit_up.{name}") for name in names}
    except ImportError as error:
        raise expected(VARIABLE, f"{EXPECTATION}, and the packages it needs", f"{path}: {error}") from error
    for module in modules.values():
        if not Path(module.__file__).resolve().is_relative_to(path):
            raise expected(VARIABLE, f"the only package 'vit_up' in this process, at {path}", module.__file__)
    return modules


class _Cast(nn.Module):
    """Casts sampled features to the compute type, which the walk of the queries then keeps."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def build(path: Path, net: ViTUp) -> nn.Module:
    """Assemble the authors' network in the sizes of ``net``, with its weights and on its device.

    Matrices have the dtype of ``net``; norms and buffers are float32, as autocast computes with them.

    Args:
        path: the checkout.
        net: the network to copy; every parameter must have its counterpart.

    Raises:
        InputError: a checkout that lacks a part, whose parts take other arguments, or whose parameters differ.
    """
    m = _modules(path)
    config, D = net.config, net.config.dim

    def mlp(*widths: int, norm: bool = False, residual: bool = False) -> nn.Module:
        return m["layers.mlp"].SimpleMLP(list(widths), input_layernorm=norm, use_residual=residual)

    def block() -> nn.Module:
        film = m["layers.film"].SimpleFiLMV2(
            input_module=nn.LayerNorm(D),
            gamma_beta_mlp=mlp(2 + 4 * POSITION_CODE_BANDS, D, 2 * D),
            post_mlp=mlp(D, MLP_EXPANSION * D, D, norm=True),
        )
        attention = m["layers.cross_attention"].CrossAttention(
            D, num_heads=config.num_heads, cross_attn_window_size=WINDOW
        )
        return m["model.vit_up"].ViTUpBlock(
            transition_mlp=mlp(D, TRANSITION_EXPANSION * D, D, norm=True, residual=True),
            cross_attention=attention,
            featx=film,
            mlp=mlp(D, MLP_EXPANSION * D, D),
            dim=D,
            dim_h=D,
        )

    pixels = config.hidden_layer_img_size * config.patch_grid_density
    try:
        reference = m["model.vit_up"].ViTUp(
            layer_indices=list(config.layer_indices),
            query_embedding=m["layers.query_encoder"].QueryEncoder(pixels, out_proj_module=_Cast(net.dtype)),
            rel_pos_enc=m["layers.pos_enc"].FourierPositionalEncoding(
                POSITION_CODE_BANDS, POSITION_CODE_MAX_RESOLUTION
            ),
            vit_up_blocks=nn.ModuleList(block() for _ in range(config.num_layers - 1)),
            decoder_mlp=nn.ModuleList(mlp(D, D, norm=True) for _ in range(config.num_layers)),
            q_rope_embeddings=m["layers.continuous_rope"].ContinuousRoPE2D(config.head_dim, ROPE_BASE),
        )
        reference.load_state_dict(net.state_dict(), strict=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise expected(VARIABLE, f"{EXPECTATION} and the published parameters", f"{path}: {why}") from error
    reference = reference.eval().to(net.device)
    for layer in reference.modules():
        if isinstance(layer, nn.Linear):
            layer.to(net.dtype)
    return reference


def features(reference: nn.Module, hidden: list[Tensor], grid: Tensor, coords: Tensor) -> list[Tensor]:
    """Compute features of all depths, L times ``[1, N, D]``, from hidden states and patch grid.

    In half precision it runs under autocast, as its authors do, but with float32 coordinates, which they round: also
    to the dtype of the patch grid, so that is widened.
    """
    cache = {
        "layer_hidden_states_hwc": hidden,
        "query_embedding_cache_data": {"last_hidden_state_hwc": grid.float()},
    }
    dtype = grid.dtype
    lowered = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(coords.device.type, dtype) if lowered else contextlib.nullcontext():
        return reference(None, coords, cache_data=cache)
