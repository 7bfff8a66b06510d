"""Residual MLP with its LayerNorm: ``x + W2 gelu(W1 LN(x) + b1) + b2`` (ViT-Up, arXiv 2606.14024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import checks
from .implementations import resolve
from .operator import Kernels, Operator, autocast, run_reference
from .primitives import LAYER_NORM_EPS, MLPWeights, mlp, mlp_backward


def residual_mlp_reference(x: Tensor, weights: MLPWeights) -> Tensor:
    """Definition of :func:`residual_mlp`."""
    normed = F.layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS)
    hidden = F.gelu(F.linear(normed, weights.weight1, weights.bias1))  # [..., E]
    return x + F.linear(hidden, weights.weight2, weights.bias2)  # [..., D]


def _forward(x: Tensor, *weights: Tensor) -> Tensor:
    return mlp(x, MLPWeights(*weights), residual=x)


def _backward(grad: Tensor, x: Tensor, *weights_and_needs: Tensor | list[bool]) -> list[Tensor]:
    *weights, needs_grad = weights_and_needs
    grads = mlp_backward(grad, x, MLPWeights(*weights), needs_grad)
    if grads[0] is not None:
        grads[0] = grads[0] + grad
    return [g.contiguous() for g in grads if g is not None]


_operator = Operator(
    "residual_mlp",
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2",
    differentiable=7,
    output_shape=lambda x, *_: x.shape,
    torch_kernels=Kernels(_forward, _backward),
)


def check_mlp(name: str, weights: MLPWeights, x: Tensor) -> None:
    """Check that an MLP maps the width of ``x`` to itself, in its dtype and on its device."""
    checks.check_matrix(f"{name}.weight1", weights.weight1, "(E, D)")
    dim, hidden = x.shape[-1], weights.weight1.shape[0]
    if hidden == 0:
        raise checks.expected(f"{name}.weight1", "a hidden width of at least 1", tuple(weights.weight1.shape))
    shapes = ((dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,))
    for field, weight, shape in zip(MLPWeights._fields, weights, shapes, strict=True):
        checks.check_weight(f"{name}.{field}", weight, shape, x)


def residual_mlp(
    x: Tensor,  # [B, N, D]
    weights: MLPWeights,
    *,
    impl: str = "auto",
) -> Tensor:  # [B, N, D]
    """Apply an MLP with LayerNorm, exact GELU and residual: ``x + W2 gelu(W1 LN(x) + b1) + b2``.

    Args:
        x: query states, any floating dtype.
        weights: parameters of the MLP, widths D -> E -> D, in the dtype of ``x``.
        impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

    Returns:
        New query states in the dtype of ``x``; differentiable for ``x`` and every weight.

    Raises:
        InputError: wrong shape, dtype or device, or an ``impl`` that cannot run.
    """
    checks.check_features("x", x, "(B, N, D)")
    x, *cast = autocast(x, *weights)
    weights = MLPWeights(*cast)
    check_mlp("weights", weights, x)
    widths = {"the width D": x.shape[-1], "the hidden width": weights.weight1.shape[0]}
    impl = resolve(impl, x, widths, operation="residual_mlp", tensors=weights)
    if impl == "reference":
        return run_reference(residual_mlp_reference, x, weights)
    return _operator(x, *weights, impl=impl)
