from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_IMPLS

from vitup_fast import InputError
from vitup_fast.ops import FilmTable, film_mlp
from vitup_fast.ops.coordinates import nearest_token, position_code
from vitup_fast.ops.film_mlp import film_gamma_beta
from vitup_fast.testing import Sizes, assert_within_budget, cast, film_mlp_inputs, film_table_inputs


def test_position_code_order():
    freqs = torch.exp(torch.linspace(0, math.log(10.0), 16)).tolist()
    rx, ry = 0.3, -0.45
    expected = [rx, ry]
    for function in (math.sin, math.cos):
        for r in (rx, ry):
            expected += [function(math.pi * r * f) for f in freqs]
    actual = position_code(torch.tensor([rx, ry], dtype=torch.float64), torch.tensor(freqs))
    assert actual.shape == (66,)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", [(5, 7), (28, 28), (1, 1), (1, 9)], ids=str)
def test_nearest_token_by_brute_force(generator, grid, dtype):
    h, w = grid
    coords = torch.rand(500, 2, generator=generator, dtype=dtype) * 1.4 - 0.2
    token, relative = nearest_token(coords, grid)
    position = coords.double() * torch.tensor((w, h))
    x, y = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (w, h))
    col, row = ((position[:, axis, None] - centre).abs().argmin(1) for axis, centre in enumerate((x, y)))
    assert torch.equal(token, row * w + col)
    expected = position - torch.stack((x[col], y[row]), dim=-1)
    torch.testing.assert_close(relative.double(), expected, rtol=0, atol=2e-5)
    assert relative.dtype == dtype
    outside = ((coords < 0) | (coords > 1)).any(-1)
    assert (relative[outside].abs().amax(-1) > 0.5).all()


def test_ties_go_to_the_even_token():
    borders = torch.arange(9) / 8  # between tokens i - 1 and i of 8
    coords = torch.stack((borders, torch.full((9,), 0.5)), dim=-1)
    token, relative = nearest_token(coords, (1, 8))
    assert token.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 7]
    assert relative[:, 0].tolist() == [-0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5, 0.5]


def test_bad_coordinates_get_a_token():
    coords = torch.tensor([[math.nan, 0.5], [math.inf, 0.5], [-math.inf, 0.5], [1e20, 0.5], [-1e20, 0.5]])
    token, relative = nearest_token(coords, (1, 8))
    assert token.tolist() == [0, 7, 0, 7, 0]
    assert relative[0, 0].isnan()
    assert not relative[:, 1].any()


def test_against_the_formula(generator, impl):
    a = film_mlp_inputs(Sizes(), generator, dtype=torch.float64)
    position, weights, D = a["position"], a["weights"], 32
    token, relative = nearest_token(a["coords"], (5, 7))
    code = position_code(relative, a["freqs"])
    gamma_beta = F.gelu(code @ position.weight1.T + position.bias1) @ position.weight2.T + position.bias2
    nearest = torch.stack([a["tokens"][b].flatten(0, 1)[token[b]] for b in range(2)])
    m = (1 + gamma_beta[..., :D]) * nearest + gamma_beta[..., D:]
    m = F.layer_norm(m, (D,), weights.mlp.norm_weight, weights.mlp.norm_bias, 1e-5)
    m = F.gelu(m @ weights.mlp.weight1.T + weights.mlp.bias1) @ weights.mlp.weight2.T + weights.mlp.bias2
    expected = a["x"] + F.layer_norm(m, (D,), weights.out_norm_weight, weights.out_norm_bias, 1e-5)
    torch.testing.assert_close(film_mlp(**a, impl=impl), expected, rtol=1e-11, atol=1e-11)


def test_table_stands_for_its_coordinates(generator):
    a = film_table_inputs(Sizes(N=300, token_grid=(4, 8)), generator, dtype=torch.float64)
    without = film_mlp(**{**a, "table": None})
    torch.testing.assert_close(film_mlp(**a), without, rtol=1e-11, atol=1e-11)
    assert torch.equal(film_mlp(**a, impl="reference"), film_mlp(**{**a, "table": None}, impl="reference"))
    moved = a["table"]._replace(gamma_beta=a["table"].gamma_beta + 1)
    assert not torch.allclose(film_mlp(**{**a, "table": moved}), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_the_table(generator, dtype):
    a = film_table_inputs(Sizes(N=500, D=64, token_grid=(4, 8)), generator, dtype=dtype)
    cotangent = torch.randn(2, 500, 64, generator=generator).to(dtype)
    steps = (torch.arange(4) - 1.5) / 4
    relative = torch.cartesian_prod(steps, steps)

    def gradients(arguments, table):
        leaves = [t.detach().requires_grad_() for t in arguments["position"]]
        position = type(arguments["position"])(*leaves)
        arguments = {**arguments, "position": position, "table": None}
        if table:
            wide = type(position)(*(t.float() for t in position))
            gamma_beta = film_gamma_beta(relative, a["freqs"], wide)
            arguments["table"] = a["table"]._replace(gamma_beta=gamma_beta)
        impl = "torch" if table else "reference"
        return torch.autograd.grad(film_mlp(**arguments, impl=impl), leaves, cotangent.to(leaves[0].dtype))

    exact, eager = gradients(cast(a, torch.float64), False), gradients(a, False)
    for field, *grads in zip(a["position"]._fields, gradients(a, True), eager, exact, strict=True):
        assert_within_budget(*grads, factor=1.5, name=field)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": torch.zeros(2, 36, 2)}, "coords: expected 37 queries, got 36 in shape"),
        ({"tokens": torch.zeros(2, 5, 7, 31)}, r"tokens: expected shape \(B, h, w, D\) with last size 32"),
        ({"tokens": torch.zeros(2, 35, 32)}, r"tokens: expected shape \(B, h, w, D\), got \(2, 35, 32\)"),
        (
            {"tokens": torch.zeros(1, 5, 7, 32)},
            r"tokens: expected shape \(2, 5, 7, 32\), got \(1, 5, 7, 32\)",
        ),
        ({"tokens": torch.zeros(2, 0, 7, 32)}, r"tokens: expected at least one token, got \(2, 0, 7, 32\)"),
        (
            {"tokens": torch.zeros(2, 5, 7, 32).half()},
            "tokens: expected dtype torch.float32 .*got torch.float16",
        ),
        ({"freqs": torch.ones(15)}, r"position.weight1: expected shape \(32, 62\), got \(32, 66\)"),
    ],
)
def test_errors(generator, change, message):
    with pytest.raises(InputError, match=message):
        film_mlp(**{**film_mlp_inputs(Sizes(), generator), **change})


def test_weight_errors(generator):
    a = film_mlp_inputs(Sizes(), generator)
    bad = torch.zeros(33, 31)
    for field in a["position"]._fields:
        with pytest.raises(InputError, match=rf"position\.{field}: expected shape .*, got \(33, 31\)"):
            film_mlp(**{**a, "position": a["position"]._replace(**{field: bad})})
    for field in a["weights"].mlp._fields:
        weights = a["weights"]._replace(mlp=a["weights"].mlp._replace(**{field: bad}))
        with pytest.raises(InputError, match=rf"weights\.mlp\.{field}: expected shape .*, got \(33, 31\)"):
            film_mlp(**{**a, "weights": weights})
    for field in ("out_norm_weight", "out_norm_bias"):
        with pytest.raises(InputError, match=rf"weights\.{field}: expected shape \(32,\), got \(33, 31\)"):
            film_mlp(**{**a, "weights": a["weights"]._replace(**{field: bad})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gamma_beta": torch.zeros(16, 32)},
            r"table.gamma_beta: expected shape \(R, 2 \* D\) with last size 64",
        ),
        ({"gamma_beta": torch.zeros(16, 64).int()}, "table.gamma_beta: expected a floating dtype"),
        ({"row": torch.zeros(36).long()}, r"table.row: expected \(37,\) int64, got \(36,\) torch.int64"),
        ({"token": torch.zeros(37).int()}, r"table.token: expected \(37,\) int64, got \(37,\) torch.int32"),
    ],
)
def test_table_errors(generator, change, message):
    a = film_table_inputs(Sizes(), generator)
    assert isinstance(a["table"], FilmTable)
    with pytest.raises(InputError, match=message):
        film_mlp(**{**a, "table": a["table"]._replace(**change)})


@pytest.mark.parametrize("index", [-1, 16, 10**9, -(10**18)])
@pytest.mark.parametrize("field", ["row", "token"])
@pytest.mark.parametrize("impl", [*FAST_IMPLS, "auto"])
def test_indices_out_of_range(generator, impl, field, index):
    D = 64 if impl in ("triton", "cuda") else 32
    a = film_table_inputs(Sizes(D=D, N=5, token_grid=(4, 4), expansion=1), generator)
    indices = getattr(a["table"], field).clone()
    indices[3] = index
    a["table"] = a["table"]._replace(**{field: indices})
    with pytest.raises(InputError, match=rf"table\.{field}: expected indices from 0 to 15, got .*{index}"):
        film_mlp(**a, impl=impl)


def test_indices_out_of_range_in_compiled_code(generator):
    torch._dynamo.reset()
    a = film_table_inputs(Sizes(token_grid=(4, 4)), generator)
    compiled = torch.compile(
        lambda row: film_mlp(**{**a, "table": a["table"]._replace(row=row)}), backend="eager"
    )
    torch.testing.assert_close(compiled(a["table"].row), film_mlp(**a))
    with pytest.raises(InputError, match=r"table\.row: expected indices from 0 to 15"):
        compiled(a["table"].row + 16)


@pytest.mark.parametrize(
    ("freqs", "message"),
    [
        (torch.ones(16).int(), "freqs: expected a floating dtype, got torch.int32"),
        (torch.ones(16).cfloat(), "freqs: expected a floating dtype, got torch.complex64"),
        (torch.ones(16, 1), r"freqs: expected shape \(F,\) with at least one frequency, got \(16, 1\)"),
        (torch.ones(0), r"freqs: expected shape \(F,\) with at least one frequency, got \(0,\)"),
        ([1.0], r"freqs: expected a tensor of shape \(F,\), got list"),
    ],
)
def test_frequency_errors(generator, freqs, message):
    with pytest.raises(InputError, match=message):
        film_mlp(**{**film_mlp_inputs(Sizes(), generator), "freqs": freqs})


@pytest.mark.parametrize("impl", ["reference", *(i for i in FAST_IMPLS if i not in ("triton", "cuda"))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_frequencies_are_float32_numbers(generator, impl, dtype):
    a = film_mlp_inputs(Sizes(), generator)
    freqs = (a["freqs"].double() * (1 + 1e-9)).to(dtype)
    for coords in (a["coords"], a["coords"].double()):
        expected = film_mlp(**{**a, "coords": coords, "freqs": freqs.float()}, impl=impl)
        assert torch.equal(film_mlp(**{**a, "coords": coords, "freqs": freqs}, impl=impl), expected)
