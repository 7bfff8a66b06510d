"""LayerNorm followed by a linear layer: the decoder, and the projections of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .implementations import resolve
from .operator import NAMESPACE, Kernels, Operator, autocast, run_reference, uncompiled, without_autocast
from .primitives import LAYER_NORM_EPS, layer_norm, layer_norm_backward, linear, linear_backward


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


def torch_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Gradients for every argument, by PyTorch."""
    grads = norm_linear_backward(grad, x, norm_weight, norm_bias, weight, needs_grad)
    return [g.contiguous() for g in grads if g is not None]


_operator = Operator(
    "norm_linear",
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias",
    differentiable=5,
    output_shape=lambda x, norm_weight, norm_bias, weight, bias: (*x.shape[:-1], weight.shape[0]),
    torch_kernels=Kernels(_forward, torch_backward),
)


def label_dtype(count: int) -> torch.dtype:
    """Smallest integer dtype for labels of ``count`` classes: uint8 up to 256, int16 up to 32768, else int32."""
    return torch.uint8 if count <= 256 else torch.int16 if count <= 1 << 15 else torch.int32


@uncompiled
def _argmax(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, impl: str
) -> Tensor:
    dtype = label_dtype(weight.shape[0])
    with without_autocast(x):
        kernels = _operator.kernels(impl)
        if kernels.argmax is not None:
            return kernels.argmax(x, norm_weight, norm_bias, weight, bias, dtype)
        return kernels.forward(x, norm_weight, norm_bias, weight, bias).argmax(-1).to(dtype)


torch.library.define(
    f"{NAMESPACE}::norm_linear_argmax",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(f"{NAMESPACE}::norm_linear_argmax", "default", _argmax)
torch.library.register_fake(
    f"{NAMESPACE}::norm_linear_argmax",
    lambda x, norm_weight, norm_bias, weight, bias, impl: x.new_empty(
        x.shape[:-1], dtype=label_dtype(weight.shape[0])
    ),
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
        impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

    Returns:
        Projected features in the dtype of ``x``; differentiable for every argument.

    Raises:
        InputError: wrong shape, dtype or device, or an ``impl`` that cannot run.
    """
    x, *layer = _checked(x, norm_weight, norm_bias, weight, bias)
    impl = resolve(impl, x, {"the width D": x.shape[-1]}, tensors=layer)
    if impl == "reference":
        return run_reference(norm_linear_reference, x, *layer)
    return _operator(x, *layer, impl=impl)


def norm_linear_argmax(
    x: Tensor,  # [B, N, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    weight: Tensor,  # [E, D]
    bias: Tensor,  # [E]
    *,
    impl: str = "auto",
) -> Tensor:  # [B, N]
    """Return the index of the largest of the E outputs of :func:`norm_linear`, the first of equals.

    Args:
        x: see :func:`norm_linear`.
        norm_weight: see :func:`norm_linear`.
        norm_bias: see :func:`norm_linear`.
        weight: matrix of a classifier with E classes.
        bias: bias of the classifier.
        impl: ``"auto"`` or a name of :func:`vitup_fast.ops.implementations`.

    Returns:
        Labels: uint8 up to 256 classes, int16 up to 32768, else int32. Not differentiable.

    Raises:
        InputError: wrong shape, dtype or device, no class, or an ``impl`` that cannot run.
    """
    with torch.no_grad():
        x, *layer = (t.detach() for t in _checked(x, norm_weight, norm_bias, weight, bias))
        if weight.shape[0] == 0:
            raise checks.expected("weight", "at least one class", tuple(weight.shape))
        impl = resolve(impl, x, {"the width D": x.shape[-1]})
        if impl == "reference":
            scores = run_reference(norm_linear_reference, x, *layer)
            return scores.argmax(-1).to(label_dtype(weight.shape[0]))
        return torch.ops.vitup_fast.norm_linear_argmax(x, *layer, impl)


def _checked(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Check the arguments and cast them under autocast."""
    checks.check_features("x", x, "(B, N, D)")
    x, norm_weight, norm_bias, weight, bias = autocast(x, norm_weight, norm_bias, weight, bias)
    checks.check_matrix("weight", weight, "(E, D)")
    dim, width = x.shape[-1], weight.shape[0]
    checks.check_weight("norm_weight", norm_weight, (dim,), x)
    checks.check_weight("norm_bias", norm_bias, (dim,), x)
    checks.check_weight("weight", weight, (width, dim), x)
    checks.check_weight("bias", bias, (width,), x)
    return x, norm_weight, norm_bias, weight, bias
