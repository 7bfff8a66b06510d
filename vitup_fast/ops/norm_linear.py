"""LayerNorm followed by a linear layer: the decoder, and the projections of keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..config import LAYER_NORM_EPS
from . import checks
from .dispatch import Kernels, Operator, autocast, lazy_kernels, resolve, run_reference
from .primitives import layer_norm, layer_norm_backward, linear, linear_backward


def norm_linear_reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Definition of :func:`norm_linear`."""
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, LAYER_NORM_EPS), weight, bias)


def _forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(layer_norm(x, norm_weight, norm_bias), weight, bias)


def norm_linear_backward(
    grad: Tensor,  # [..., E]
    x: Tensor,  # [..., D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    weight: Tensor,  # [E, D]
    needs_grad: list[bool],
) -> list[Tensor | None]:
    """Gradients of ``W LN(x) + b`` for x, the norm's weight and bias, W and b."""
    normed = layer_norm(x, norm_weight, norm_bias)
    grad_normed, *grads_linear = linear_backward(grad, normed, weight, (any(needs_grad[:3]), *needs_grad[3:]))
    grads_norm = (None, None, None)
    if grad_normed is not None:
        grads_norm = layer_norm_backward(grad_normed, x, norm_weight, needs_grad[:3])
    return [*grads_norm, *grads_linear]


def _backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    grads = norm_linear_backward(grad, x, norm_weight, norm_bias, weight, needs_grad)
    return [g.contiguous() for g in grads if g is not None]


_operator = Operator(
    "norm_linear",
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias",
    differentiable=5,
    output_shape=lambda x, norm_weight, norm_bias, weight, bias: (*x.shape[:-1], weight.shape[0]),
    kernels={"torch": Kernels(_forward, _backward), "triton": lazy_kernels("norm_linear")},
)


def norm_linear(
    x: Tensor,  # [B, N, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    weight: Tensor,  # [E, D]
    bias: Tensor,  # [E]
    *,
    impl: str = "auto",
) -> Tensor:  # [B, N, E]
    """Apply LayerNorm and a linear layer: ``W LN(x) + b``.

    Args:
        x: query states or tokens, any floating dtype.
        norm_weight: LayerNorm's scale.
        norm_bias: LayerNorm's shift.
        weight: matrix of the linear layer.
        bias: bias of the linear layer.
        impl: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Projected features in the dtype of ``x``; differentiable for every argument.

    Raises:
        InputError: wrong shape, dtype or device, or an ``impl`` that cannot run.
    """
    checks.check_features("x", x, "(B, N, D)")
    x, norm_weight, norm_bias, weight, bias = autocast(x, norm_weight, norm_bias, weight, bias)
    dim, width = x.shape[-1], weight.shape[0]
    checks.check_weight("norm_weight", norm_weight, (dim,), x)
    checks.check_weight("norm_bias", norm_bias, (dim,), x)
    checks.check_weight("weight", weight, (width, dim), x)
    checks.check_weight("bias", bias, (width,), x)
    impl = resolve(impl, x, {"the width D": dim})
    if impl == "reference":
        return run_reference(norm_linear_reference, x, norm_weight, norm_bias, weight, bias)
    return _operator(x, norm_weight, norm_bias, weight, bias, impl=impl)
