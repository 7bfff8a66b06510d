"""Residual MLP: two products, the first with LayerNorm and GELU, the second with the residual, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import cuda
from .common import layer_norm_backward, measure_moments, normalize, wide
from .linear import Folded, column_sum, fold, fold_backward, in_buffer, linear, mlp_backward


class FoldedMLP(NamedTuple):
    """Both layers of an MLP, LayerNorm folded into the first."""

    first: Folded
    second: Folded
    quantised: cuda.QuantisedMLP | None = None  # where products take 8 bits

    @property
    def one_kernel(self) -> tuple[Tensor, ...]:
        """As the kernels that hold both layers take it."""
        return self.quantised or (*self.first[:2], *self.second[:2])


def fold_mlp(
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    fp8: bool = False,
) -> FoldedMLP:
    """Fold the LayerNorm of an MLP into its first layer, and with ``fp8`` quantise both."""
    first, second = fold(weight1, bias1, norm_weight, norm_bias), fold(weight2, bias2)
    return FoldedMLP(first, second, cuda.quantise_mlp(*first[:2], *second[:2]) if fp8 else None)


def residual_mlp(
    x: Tensor,  # [M, D]
    moments: Tensor,  # [M, parts, 2]
    layers: FoldedMLP,
    hidden: Tensor | None = None,
    out: Tensor | None = None,
    out_moments: Tensor | None = None,
    want_moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``x + W2 gelu(W1 LN(x) + b1) + b2`` and the moments of its rows; buffers as for :func:`linear`."""
    E = layers.first.weight.shape[0]
    if layers.quantised is not None or cuda.fits_one_kernel("residual_mlp", E, x, layers.second.weight):
        result, new_moments = in_buffer(out, x.shape, x.dtype, x), None
        if want_moments:
            new_moments = in_buffer(out_moments, (len(x), 1, 2), wide(x.dtype), x)
        cuda.residual_mlp(x, layers.one_kernel, result, new_moments)
        return result, new_moments
    part = {"operation": "residual_mlp"}
    hidden, _ = linear(x, layers.first, moments, gelu=True, out=hidden, **part)  # [M, E]
    return linear(
        hidden, layers.second, residual=x, out=out, out_moments=out_moments, want_moments=want_moments, **part
    )


def forward(x: Tensor, *weights: Tensor) -> Tensor:
    """Forward pass of :func:`vitup_fast.ops.residual_mlp`."""
    rows = x.contiguous().view(-1, x.shape[-1])  # [M, D]
    return residual_mlp(rows, measure_moments(rows), fold_mlp(*weights))[0].view(x.shape)


def forward_fp8(x: Tensor, *weights: Tensor) -> Tensor:
    """The same with 8-bit products."""
    rows = cuda.aligned(x.contiguous()).view(-1, x.shape[-1])  # [M, D]
    result = rows.new_empty(rows.shape)
    cuda.residual_mlp(rows, fold_mlp(*weights, fp8=True).one_kernel, result, None)
    return result.view(x.shape)


def normed_mlp_backward(
    grad: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    weights: tuple[Tensor, ...],
    needs_x: bool,
    residual: Tensor | None = None,  # [M, D]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``W2 gelu(W1 LN(x) + b1) + b2`` for x (plus a residual's) and the six weights."""
    norm_weight, norm_bias, weight1, bias1, weight2, _ = weights
    first = fold(weight1, bias1, norm_weight, norm_bias)
    normed = normalize(x)
    grads = mlp_backward(grad, normed, first.weight, first.bias, weight2.contiguous(), needs_x)
    del normed
    grad_x = layer_norm_backward(grads.x, x, residual=residual)[0] if needs_x else None
    first_grads = fold_backward(grads.weight1, grads.bias1, weight1, norm_weight, norm_bias)
    return grad_x, *first_grads, grads.weight2.to(x.dtype), column_sum(grad).to(x.dtype)


def backward(grad: Tensor, x: Tensor, *weights_and_needs: Tensor | list[bool]) -> list[Tensor]:
    """Gradients for x and the six weights, as far as they are needed; the hidden layer is recomputed."""
    *weights, needs_grad = weights_and_needs
    rows, grad_rows = x.contiguous().view(-1, x.shape[-1]), grad.view(-1, x.shape[-1])
    grads = normed_mlp_backward(grad_rows, rows, tuple(weights), needs_grad[0], residual=grad_rows)
    arguments = (x, *weights)
    return [g.view(a.shape) for g, a, needed in zip(grads, arguments, needs_grad, strict=True) if needed]
