from __future__ import annotations

import pytest
import torch

from vitup_fast import InputError
from vitup_fast.ops import norm_linear
from vitup_fast.testing import Sizes, norm_linear_inputs


def test_against_the_formula(generator, impl):
    arguments = norm_linear_inputs(Sizes(expansion=3), generator, dtype=torch.float64)
    x, norm_weight, norm_bias, weight, bias = arguments.values()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight + norm_bias
    actual = norm_linear(**arguments, impl=impl)
    assert actual.shape == (2, 37, 96)
    torch.testing.assert_close(actual, normed @ weight.T + bias, rtol=1e-12, atol=1e-12)


def test_shift_and_scale_of_the_input_do_not_matter(generator, impl):
    arguments = norm_linear_inputs(Sizes(), generator, dtype=torch.float64)
    moved = {**arguments, "x": arguments["x"] * 1000 + 7}
    torch.testing.assert_close(
        norm_linear(**moved, impl=impl), norm_linear(**arguments, impl=impl), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 32)}, r"x: expected shape \(B, N, D\), got \(2, 32\)"),
        ({"norm_weight": torch.zeros(31)}, r"norm_weight: expected shape \(32,\), got \(31,\)"),
        ({"norm_bias": torch.zeros(1, 32)}, r"norm_bias: expected shape \(32,\), got \(1, 32\)"),
        ({"weight": torch.zeros(64, 31)}, r"weight: expected shape \(64, 32\), got \(64, 31\)"),
        ({"bias": torch.zeros(1)}, r"bias: expected shape \(64,\), got \(1,\)"),
        (
            {"bias": torch.zeros(64).double()},
            r"bias: expected dtype torch.float32 like the .*got torch.float64",
        ),
        (
            {"weight": torch.zeros(64, 32, device="meta")},
            "weight: expected device cpu like the features, got meta",
        ),
    ],
)
def test_errors(generator, change, message):
    with pytest.raises(InputError, match=message):
        norm_linear(**{**norm_linear_inputs(Sizes(), generator), **change})
