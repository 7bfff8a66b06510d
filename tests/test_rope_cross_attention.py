from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitup_fast import InputError
from vitup_fast.ops import rope_cross_attention
from vitup_fast.ops.coordinates import (
    rope_angles,
    rope_inv_freq,
    rotate_pairs,
    token_centres,
    token_positions,
)
from vitup_fast.testing import Sizes, rope_cross_attention_inputs


def rotate_by_hand(x, x_position, y_position, inv_freq):
    """Rotate one head's channels with complex numbers, channel pair by channel pair."""
    d = len(x)
    rotated = torch.empty(d, dtype=torch.float64)
    for half, position in enumerate((x_position, y_position)):
        for k in range(d // 4):
            first = half * d // 2 + 2 * k
            z = complex(x[first], x[first + 1]) * complex(
                math.cos(2 * math.pi * position * inv_freq[k]), math.sin(2 * math.pi * position * inv_freq[k])
            )
            rotated[first], rotated[first + 1] = z.real, z.imag
    return rotated


def test_rotation_by_complex_numbers(generator):
    channels = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    position = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 28
    inv_freq = rope_inv_freq(16, 100.0)
    actual = rotate_pairs(channels, rope_angles(position, inv_freq))
    for row in range(3):
        expected = rotate_by_hand(channels[row].tolist(), *position[row].tolist(), inv_freq.tolist())
        torch.testing.assert_close(actual[row], expected, rtol=1e-12, atol=1e-12)


def test_frequencies():
    inv_freq = rope_inv_freq(64, 100.0)
    assert inv_freq.dtype == torch.float32
    expected = torch.tensor([100.0 ** (-k / 16) for k in range(16)])
    torch.testing.assert_close(inv_freq, expected, rtol=2e-7, atol=0)
    assert torch.equal(inv_freq, 1.0 / (100.0 ** (torch.arange(16, dtype=torch.float32) / 16)))


def test_positions_are_in_token_units():
    assert token_positions(torch.tensor([0.5, 0.25]), (8, 12)).tolist() == [6.0, 2.0]
    centres = token_centres((2, 3), torch.float64, torch.device("cpu"))
    assert centres.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5]]


def test_against_the_formula(generator, impl):
    sizes = Sizes(B=2, N=6, D=16, heads=2, token_grid=(2, 3))
    a = rope_cross_attention_inputs(sizes, generator, dtype=torch.float64)
    x, w, inv_freq = a["x"], a["weights"], a["inv_freq"].tolist()
    query = F.layer_norm(x, (16,), w.norm_weight, w.norm_bias, 1e-5) @ w.query_weight.T + w.query_bias
    expected = torch.empty_like(x)
    for b in range(2):
        for n in range(6):
            x_position, y_position = (a["coords"][b, n] * torch.tensor((3, 2))).tolist()
            heads = []
            for head in range(2):
                channels = query[b, n, 8 * head : 8 * head + 8].tolist()
                rotated = rotate_by_hand(channels, x_position, y_position, inv_freq)
                score = torch.exp(a["key"][b, head] @ rotated / math.sqrt(8))
                heads.append((score / score.sum()) @ a["value"][b, head])
            expected[b, n] = x[b, n] + w.out_weight @ torch.cat(heads) + w.out_bias
    torch.testing.assert_close(rope_cross_attention(**a, impl=impl), expected, rtol=1e-11, atol=1e-11)


def test_moving_queries_and_keys_together_changes_nothing(generator, impl):
    a = rope_cross_attention_inputs(Sizes(token_grid=(4, 8)), generator, dtype=torch.float64)
    moved = rotate_pairs(a["key"], rope_angles(torch.tensor([2.0, -1.0]).double(), a["inv_freq"]))
    shift = torch.tensor([2.0 / 8, -1.0 / 4])
    torch.testing.assert_close(
        rope_cross_attention(**{**a, "coords": a["coords"] + shift, "key": moved}, impl=impl),
        rope_cross_attention(**a, impl=impl),
        rtol=1e-9,
        atol=1e-9,
    )


def test_backward_in_slices_of_queries(generator, monkeypatch):
    a = rope_cross_attention_inputs(Sizes(N=23), generator, dtype=torch.float64)
    leaves = [a[n].requires_grad_() for n in ("x", "coords", "key", "value")]

    def gradients():
        return torch.autograd.grad(rope_cross_attention(**a, impl="torch").square().sum(), leaves)

    whole = gradients()
    module = importlib.import_module("vitup_fast.ops.rope_cross_attention")
    monkeypatch.setattr(module, "BACKWARD_SCORES", 4 * 2 * 2 * 35)
    for actual, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": torch.zeros(2, 36, 2)}, "coords: expected 37 queries, got 36 in shape"),
        ({"coords": torch.zeros(1, 37, 2)}, "coords: expected batch size 2, got 1 in shape"),
        ({"key": torch.zeros(2, 2, 34, 16)}, r"key: expected shape \(2, 2, 35, 16\), got \(2, 2, 34, 16\)"),
        ({"key": torch.zeros(2, 4, 35, 16)}, r"key: expected shape \(2, 4, 35, 8\), got \(2, 4, 35, 16\)"),
        ({"key": torch.zeros(2, 35, 32)}, r"key: expected shape \(B, Hh, h \* w, d\), got \(2, 35, 32\)"),
        (
            {"value": torch.zeros(1, 2, 35, 16)},
            r"value: expected shape \(2, 2, 35, 16\), got \(1, 2, 35, 16\)",
        ),
        (
            {"value": torch.zeros(2, 2, 35, 16).half()},
            "value: expected dtype torch.float32 .*got torch.float16",
        ),
        ({"token_grid": (5, 6)}, r"key: expected shape \(2, 2, 30, 16\), got \(2, 2, 35, 16\)"),
        ({"inv_freq": torch.zeros(3)}, r"inv_freq: expected 4 frequencies, got \(3,\)"),
        ({"inv_freq": torch.zeros(4).int()}, "inv_freq: expected a floating dtype, got torch.int32"),
        ({"inv_freq": torch.zeros(4).cfloat()}, "inv_freq: expected a floating dtype, got torch.complex64"),
        ({"inv_freq": torch.zeros(4, 1)}, r"inv_freq: expected shape \(F,\) with at least one frequency"),
        ({"inv_freq": None}, r"inv_freq: expected a tensor of shape \(F,\), got NoneType"),
        ({"token_grid": (0, 5)}, r"token_grid: expected at least one row and one column, got \(0, 5\)"),
        ({"token_grid": (-5, -7)}, r"token_grid: expected at least one row and one column, got \(-5, -7\)"),
        ({"token_grid": (5.0, 7)}, r"token_grid: expected two integers \(h, w\), got \(5.0, 7\)"),
        ({"token_grid": (35,)}, r"token_grid: expected two integers \(h, w\), got \(35,\)"),
        ({"token_grid": 35}, r"token_grid: expected two integers \(h, w\), got 35"),
        ({"token_grid": None}, r"token_grid: expected two integers \(h, w\), got None"),
        ({"key": torch.zeros(2, 2, 0, 16)}, r"key: expected shape \(2, 2, 35, 16\), got \(2, 2, 0, 16\)"),
        ({"key": torch.zeros(2, 0, 35, 16)}, r"key: expected heads of a width .* together D = 32 wide, got"),
        ({"key": torch.zeros(2, 3, 35, 10)}, r"key: expected heads of a width .* together D = 32 wide, got"),
        ({"key": torch.zeros(2, 16, 35, 2)}, r"key: expected heads of a width .* together D = 32 wide, got"),
        ({"key": torch.zeros(2, 64, 35, 0)}, r"key: expected a width of at least 1, got \(2, 64, 35, 0\)"),
    ],
)
def test_errors(generator, change, message):
    arguments = rope_cross_attention_inputs(Sizes(), generator)
    with pytest.raises(InputError, match=message):
        rope_cross_attention(**{**arguments, **change})


def test_any_two_integers_are_a_grid(generator, impl):
    arguments = rope_cross_attention_inputs(Sizes(), generator)
    expected = rope_cross_attention(**arguments, impl=impl)
    for grid in ([5, 7], torch.Size((5, 7)), np.array((5, 7)), (np.int64(5), 7), torch.tensor((5, 7))):
        assert torch.equal(rope_cross_attention(**{**arguments, "token_grid": grid}, impl=impl), expected)


def test_weight_errors(generator):
    arguments = rope_cross_attention_inputs(Sizes(), generator)
    for field in arguments["weights"]._fields:
        weights = arguments["weights"]._replace(**{field: torch.zeros(33, 32)})
        with pytest.raises(InputError, match=rf"weights\.{field}: expected shape \(32,.*\), got \(33, 32\)"):
            rope_cross_attention(**{**arguments, "weights": weights})
