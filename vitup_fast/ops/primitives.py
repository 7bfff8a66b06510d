"""Building blocks of the ``torch`` implementation: LayerNorm, linear layers and MLPs, forward and backward.

On the CPU, linear layers go to oneDNN with bias, GELU or residual fused into the matrix product; weights may
then be given in oneDNN's blocked layout (see :func:`pack`), which spares a reordering in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5
# oneDNN sums float32 products one after the other, BLAS in blocks: over longer rows than this oneDNN's rounding
# error would exceed one and a half times that of plain PyTorch.
ONEDNN_FLOAT32_WIDTH = 512
# Rows for which oneDNN optimises the blocked layout; other row counts run too.
PACKING_ROWS = 1024


class MLPWeights(NamedTuple):
    """Parameters of ``W2 gelu(W1 LN(x) + b1) + b2``, widths D -> E -> D2."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    weight1: Tensor  # [E, D]
    bias1: Tensor  # [E]
    weight2: Tensor  # [D2, E]
    bias2: Tensor  # [D2]


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """Dtypes whose matrix products oneDNN runs natively on this CPU."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        dtypes.add(torch.float16)
    return frozenset(dtypes)


def _takes_onednn(x: Tensor, longest: int = ONEDNN_FLOAT32_WIDTH) -> bool:
    """Whether products over the last axis of ``x`` go to oneDNN."""
    if x.device.type != "cpu" or x.dtype not in _onednn_dtypes() or x.numel() == 0:
        return False
    return x.dtype != torch.float32 or x.shape[-1] <= longest


def pack(weight: Tensor, longest: int = ONEDNN_FLOAT32_WIDTH) -> Tensor:
    """Return the weight in oneDNN's blocked layout, or itself where oneDNN does not run it; ``[E, D]``.

    ``longest`` is the longest row of float32 for which oneDNN's rounding error is accepted.
    """
    if not _takes_onednn(weight, longest):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKING_ROWS)


def linear(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [E, D]
    bias: Tensor | None,  # [E]
    *,
    gelu: bool = False,
    residual: Tensor | None = None,  # [..., E]
) -> Tensor:  # [..., E]
    """Compute ``x W^T + b``, then GELU or the sum with a residual, fused where the device can."""
    if _takes_onednn(x) or (weight.is_mkldnn and x.numel()):
        rows = x.reshape(-1, x.shape[-1])
        bias = None if bias is None else bias.contiguous()  # oneDNN reads it without its stride
        if residual is not None:
            other = residual.reshape(-1, residual.shape[-1])
            y = torch.ops.mkldnn._linear_pointwise.binary(rows, other, weight, bias, "add")
        else:
            y = torch.ops.mkldnn._linear_pointwise(
                rows, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else ""
            )
        return y.view(*x.shape[:-1], weight.shape[0])
    if weight.is_mkldnn:
        weight = weight.to_dense()
    y = F.linear(x, weight, bias)
    if gelu:
        return F.gelu(y)
    return y if residual is None else residual + y


def linear_backward(
    grad: Tensor,  # [..., E]
    x: Tensor,  # [..., D]
    weight: Tensor,  # [E, D]
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x W^T + b`` for x, W and b, as far as they are needed."""
    rows = grad.flatten(0, -2)
    grad_x = grad @ weight if needs_grad[0] else None
    grad_weight = rows.t() @ x.flatten(0, -2) if needs_grad[1] else None
    grad_bias = rows.sum(0) if needs_grad[2] else None
    return grad_x, grad_weight, grad_bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last axis with float32 statistics; ``[..., D] -> [..., D]``."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


def layer_norm_backward(
    grad: Tensor,  # [..., D]
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of LayerNorm for x, weight and bias, recomputing its statistics in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width = x.shape[-1:]
    xw, ww = x.to(wide), weight.to(wide)
    _, mean, rstd = torch.native_layer_norm(xw, width, ww, ww, LAYER_NORM_EPS)
    grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), xw, width, mean, rstd, ww, ww, list(needs_grad)
    )
    return tuple(g.to(x.dtype) if n else None for g, n in zip(grads, needs_grad, strict=True))


def mlp(x: Tensor, weights: MLPWeights, residual: Tensor | None = None) -> Tensor:
    """Compute ``W2 gelu(W1 LN(x) + b1) + b2``, plus a residual if given; ``[..., D] -> [..., D2]``."""
    normed = layer_norm(x, weights.norm_weight, weights.norm_bias)
    hidden = linear(normed, weights.weight1, weights.bias1, gelu=True)  # [..., E]
    return linear(hidden, weights.weight2, weights.bias2, residual=residual)


def mlp_backward(
    grad: Tensor,  # [..., D2]
    x: Tensor,  # [..., D]
    weights: MLPWeights,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of :func:`mlp` for x and the six weights, recomputing the hidden layer."""
    normed = layer_norm(x, weights.norm_weight, weights.norm_bias)
    grad_normed, *grad_layers = two_layers_backward(
        grad, normed, *weights[2:], any(needs_grad[:3]), needs_grad[3:]
    )
    grads_norm = (None, None, None)
    if grad_normed is not None:
        grads_norm = layer_norm_backward(grad_normed, x, weights.norm_weight, needs_grad[:3])
    return [*grads_norm, *grad_layers]


def two_layers_backward(
    grad: Tensor,  # [..., D2]
    x: Tensor,  # [..., D]
    weight1: Tensor,  # [E, D]
    bias1: Tensor,  # [E]
    weight2: Tensor,  # [D2, E]
    bias2: Tensor,  # [D2]
    needs_x: bool,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``W2 gelu(W1 x + b1) + b2`` for x, W1, b1, W2 and b2, recomputing the hidden layer."""
    preactivation = F.linear(x, weight1, bias1)  # [..., E]
    needs_first = needs_x or needs_grad[0] or needs_grad[1]
    grad_hidden, grad_weight2, grad_bias2 = linear_backward(
        grad, F.gelu(preactivation), weight2, (needs_first, needs_grad[2], needs_grad[3])
    )
    grads_first = (None, None, None)
    if grad_hidden is not None:
        grad_preactivation = torch.ops.aten.gelu_backward(grad_hidden, preactivation)
        grads_first = linear_backward(grad_preactivation, x, weight1, (needs_x, *needs_grad[:2]))
    return (*grads_first, grad_weight2, grad_bias2)
