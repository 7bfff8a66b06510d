from __future__ import annotations

import math

import pytest
import torch

from vitup_fast import InputError
from vitup_fast.ops import MLPWeights, residual_mlp
from vitup_fast.testing import Sizes, residual_mlp_inputs


def test_against_the_formula(generator, impl):
    x, weights = residual_mlp_inputs(Sizes(), generator, dtype=torch.float64).values()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = (normed * weights.norm_weight + weights.norm_bias) @ weights.weight1.T + weights.bias1
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = x + hidden @ weights.weight2.T + weights.bias2
    torch.testing.assert_close(residual_mlp(x, weights, impl=impl), expected, rtol=1e-12, atol=1e-12)


def test_zero_output_layer_is_the_identity(generator, impl):
    x, weights = residual_mlp_inputs(Sizes(), generator, dtype=torch.bfloat16).values()
    weights = weights._replace(
        weight2=torch.zeros_like(weights.weight2), bias2=torch.zeros_like(weights.bias2)
    )
    assert torch.equal(residual_mlp(x, weights, impl=impl), x)


def test_constant_rows_stay_finite(generator, impl):
    _, weights = residual_mlp_inputs(Sizes(), generator).values()
    assert residual_mlp(torch.full((1, 3, 32), 1e4), weights, impl=impl).isfinite().all()


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("norm_weight", (31,), r"weights.norm_weight: expected shape \(32,\), got \(31,\)"),
        ("norm_bias", (1,), r"weights.norm_bias: expected shape \(32,\), got \(1,\)"),
        ("weight1", (64, 31), r"weights.weight1: expected shape \(64, 32\), got \(64, 31\)"),
        ("bias1", (63,), r"weights.bias1: expected shape \(64,\), got \(63,\)"),
        ("weight2", (31, 64), r"weights.weight2: expected shape \(32, 64\), got \(31, 64\)"),
        ("bias2", (64,), r"weights.bias2: expected shape \(32,\), got \(64,\)"),
    ],
)
def test_width_errors(generator, field, shape, message):
    x, weights = residual_mlp_inputs(Sizes(), generator).values()
    with pytest.raises(InputError, match=message):
        residual_mlp(x, weights._replace(**{field: torch.zeros(shape)}))


def test_other_errors(generator):
    x, weights = residual_mlp_inputs(Sizes(), generator).values()
    with pytest.raises(InputError, match=r"x: expected shape \(B, N, D\), got \(37, 32\)"):
        residual_mlp(x[0], weights)
    with pytest.raises(
        InputError, match=r"weights.norm_weight: expected dtype torch.float16 like the features"
    ):
        residual_mlp(x.half(), weights)
    with pytest.raises(InputError, match=r"weights.bias2: expected device cpu like the features, got meta"):
        residual_mlp(x, MLPWeights(*weights[:-1], weights.bias2.to("meta")))
