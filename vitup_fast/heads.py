"""Linear heads folded into the decoder, and the principal components shown as colours."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from .errors import expected
from .ops.checks import FEATURE_DTYPES, check_layer, check_plain

Head: TypeAlias = nn.Linear | nn.Conv2d | tuple[Tensor, Tensor | None]


def head_parameters(head: Head, dim: int) -> tuple[Tensor, Tensor | None]:
    """Return weight ``[C, D]`` and bias ``[C]`` (or None) of a linear head.

    Args:
        head: ``nn.Linear``, 1x1 ``nn.Conv2d``, or a tuple (weight, bias or None).
        dim: feature width D the head must take.

    Raises:
        InputError: not a linear head of that width with at least one class; a layer with hooks or a ``forward`` of its
            own, or a convolution with a larger kernel, stride, padding or groups. Parametrizations are honoured.
    """
    if isinstance(head, nn.Linear | nn.Conv2d):
        check_layer("head", head, nn.Linear if isinstance(head, nn.Linear) else nn.Conv2d)
        weight, bias = head.weight, head.bias
    elif isinstance(head, tuple) and len(head) == 2 and isinstance(head[0], Tensor):
        weight, bias = head
    else:
        kind = type(head)
        got = f"{kind.__module__}.{kind.__qualname__}" if isinstance(head, nn.Module) else kind.__name__
        raise expected("head", "nn.Linear, 1x1 nn.Conv2d or (weight, bias)", got)
    if isinstance(head, nn.Conv2d):
        steps = {"stride": head.stride, "padding": head.padding, "groups": head.groups}
        if head.stride != (1, 1) or head.groups != 1 or head.padding not in ((0, 0), "valid", "same"):
            got = ", ".join(f"{name} {value}" for name, value in steps.items())
            raise expected("head", "a 1x1 convolution with stride 1, no padding and one group", got)
    _check_numbers("head", weight)
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.dim() != 2 or weight.shape[1] != dim:
        raise expected("head", f"a weight of shape (C, {dim})", tuple(weight.shape))
    if not weight.shape[0]:
        raise expected("head", "at least one class", f"a weight of shape {tuple(weight.shape)}")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise expected("head", "a tensor or None as bias", type(bias).__name__)
        _check_numbers("head's bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise expected("head", f"a bias of shape ({weight.shape[0]},)", tuple(bias.shape))
    return weight, bias


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Check that a weight is dense, holds values and has a floating dtype."""
    check_plain(name, tensor)
    if tensor.is_meta:
        raise expected(name, "a tensor that holds values", "one on the meta device")
    if tensor.dtype not in FEATURE_DTYPES:
        raise expected(name, "a floating dtype of 16, 32 or 64 bits", tensor.dtype)


def fold_head(head: Head, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a linear head into the decoder's linear layer, in float32 or better; differentiable.

    Args:
        head: linear head from D features to C scores.
        weight: the decoder's matrix.  # [D, D]
        bias: the decoder's bias.  # [D]

    Returns:
        Matrix ``[C, D]`` and bias ``[C]`` of ``head(W x + b)``, in the decoder's dtype.

    Raises:
        InputError: not a linear head of that width.
    """
    head_weight, head_bias = head_parameters(head, weight.shape[0])
    wide = torch.promote_types(torch.promote_types(weight.dtype, head_weight.dtype), torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        matrix = head_weight.to(weight.device, wide)  # [C, D]
        folded_bias = matrix @ bias.to(wide)
        if head_bias is not None:
            folded_bias = folded_bias + head_bias.to(weight.device, wide)
        return (matrix @ weight.to(wide)).to(weight.dtype), folded_bias.to(weight.dtype)
