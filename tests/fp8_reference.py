"""What MLPs with 8-bit products compute, in PyTorch: the same roundings, exact sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from vitup_fast.kernels.cuda import FP8_CHUNK, NORMED_SCALE, QuantisedMLP, quantise_mlp

from vitup_fast.ops.film_mlp import FilmWeights
from vitup_fast.ops.primitives import LAYER_NORM_EPS, MLPWeights


def quantised(weights: MLPWeights) -> QuantisedMLP:
    """Fold the LayerNorm and quantise."""
    norm_weight, norm_bias, weight1, bias1, weight2, bias2 = (t.float() for t in weights)
    folded = (weight1 * norm_weight).to(weights.weight1.dtype)
    return quantise_mlp(folded, bias1 + weight1 @ norm_bias, weight2, bias2)


def columns_of_operand() -> list[int]:
    """Hidden column of a chunk that a thread holds where the product wants column k of its operand.

    PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk32": of the four threads of a row, thread t holds sums of
    columns 2 t and 2 t + 1 of every eight, and of the operand's columns 4 t ... 4 t + 3 of every sixteen.
    """
    sums = [[8 * piece + 2 * t + i for piece in range(4) for i in range(2)] for t in range(4)]
    operand = [[16 * half + 4 * t + i for half in range(2) for i in range(4)] for t in range(4)]
    order = [0] * FP8_CHUNK
    for own, wanted in zip(sums, operand, strict=True):
        for column, k in zip(own, wanted, strict=True):
            order[k] = column
    return order


def mlp_fp8(x: Tensor, weights: MLPWeights, dtype: torch.dtype = torch.float64) -> Tensor:
    """``W2 gelu(W1 LN(x) + b1) + b2`` in ``dtype``."""
    mlp = quantised(weights)
    weight2 = torch.empty(x.shape[-1], len(mlp.weight2), FP8_CHUNK, dtype=dtype)
    weight2[..., columns_of_operand()] = mlp.weight2.to(dtype).transpose(0, 1)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=LAYER_NORM_EPS) * NORMED_SCALE
    normed = normed.to(torch.float8_e4m3fn).to(dtype)
    hidden = F.gelu(F.linear(normed, mlp.weight1.to(dtype)) * mlp.scale1.to(dtype) + mlp.bias1)
    hidden = (hidden * mlp.hidden_scale).float().to(torch.float8_e4m3fn).to(dtype)
    return F.linear(hidden, weight2.flatten(1)) * mlp.scale2.to(dtype) + mlp.bias2


def residual_mlp_fp8(x: Tensor, weights: MLPWeights, dtype: torch.dtype = torch.float64) -> Tensor:
    """The result of the residual MLP before it is rounded, in ``dtype``."""
    return x.to(dtype) + mlp_fp8(x, weights, dtype)


def film_mlp_fp8(
    x: Tensor,  # [B, N, D]
    tokens: Tensor,  # [B, h, w, D]
    modulation: tuple[Tensor, Tensor, Tensor],  # [R, 2 D], indices of tokens and of its rows, [B, N] each
    weights: FilmWeights,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # [B, N, D]
    """The result of the FiLM MLP before it is rounded, in ``dtype``."""
    gamma_beta, token, row = modulation
    gamma, beta = gamma_beta[row].chunk(2, -1)
    gathered = tokens.flatten(1, 2).gather(1, token[..., None].expand_as(x)).float()
    modulated = (gathered + gathered * gamma + beta).to(x.dtype)
    local = mlp_fp8(modulated, weights.mlp, dtype)
    norm = (t.to(dtype) for t in weights[1:])
    return x.to(dtype) + F.layer_norm(local, x.shape[-1:], *norm, eps=LAYER_NORM_EPS)
