from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitup_fast import InputError
from vitup_fast.ops import bilinear_sample
from vitup_fast.testing import Sizes, bilinear_sample_inputs


@pytest.mark.parametrize("patch_grid", [(9, 12), (12, 9), (1, 5), (5, 1), (1, 1)], ids=str)
def test_equals_grid_sample(generator, impl, patch_grid):
    sizes = Sizes(N=200, patch_grid=patch_grid)
    arguments = bilinear_sample_inputs(sizes, generator, dtype=torch.float64)
    grid, coords = (t.requires_grad_() for t in arguments.values())
    expected = F.grid_sample(
        grid.permute(0, 3, 1, 2),
        2 * coords.unsqueeze(1) - 1,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )  # [B, D, 1, N]
    expected = expected.squeeze(2).transpose(1, 2)
    actual = bilinear_sample(grid, coords, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    for a, e in zip(
        *(torch.autograd.grad(o, (grid, coords), cotangent) for o in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_cell_centres_return_the_cells(generator, impl):
    grid = torch.randn(1, 4, 8, 3, generator=generator)
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(8) + 0.5) / 8, indexing="ij")
    coords = torch.stack((x, y), dim=-1).view(1, 32, 2)
    assert torch.equal(bilinear_sample(grid, coords, impl=impl), grid.view(1, 32, 3))


def test_clamps_outside_the_image(generator, impl):
    grid = torch.randn(1, 4, 8, 3, generator=generator)
    coords = torch.tensor([[[-3.0, -0.2], [1.7, -9.0], [-0.5, 1.1], [2.0, 2.0]]], requires_grad=True)
    corners = torch.stack((grid[0, 0, 0], grid[0, 0, -1], grid[0, -1, 0], grid[0, -1, -1]))
    sampled = bilinear_sample(grid, coords, impl=impl)
    assert torch.equal(sampled[0], corners)
    (grad,) = torch.autograd.grad(sampled.sum(), coords)
    assert not grad.any()


def test_is_exact_for_linear_functions(impl):
    """Bilinear interpolation returns a linear ramp as it is, between the outer cell centres."""
    x = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1).unsqueeze(0)  # [1, 16, 16, 2]
    coords = torch.linspace(1 / 32, 31 / 32, 50, dtype=torch.float64).view(1, 25, 2)
    torch.testing.assert_close(bilinear_sample(grid, coords, impl=impl), coords, rtol=1e-12, atol=1e-12)


def test_gradient_of_a_shared_cell_is_summed_in_float32():
    grid = torch.zeros(1, 2, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    bilinear_sample(grid, torch.full((1, 3000, 2), 0.25), impl="torch").sum().backward()
    assert grid.grad.flatten().tolist() == [torch.tensor(3000.0).bfloat16().item(), 0, 0, 0]


@pytest.mark.parametrize(
    ("grid", "coords", "message"),
    [
        (torch.zeros(4, 4, 8), torch.zeros(1, 3, 2), r"grid: expected shape \(B, P, Q, D\), got \(4, 4, 8\)"),
        (torch.zeros(1, 4, 0, 8), torch.zeros(1, 3, 2), r"grid: expected no empty axis .*got \(1, 4, 0, 8\)"),
        (
            torch.zeros(1, 4, 4, 8).int(),
            torch.zeros(1, 3, 2),
            "grid: expected a floating dtype, got torch.int32",
        ),
        ([1.0], torch.zeros(1, 3, 2), "grid: expected a tensor of shape .*, got list"),
        (torch.zeros(1, 4, 4, 8), torch.zeros(3, 2), r"coords: expected shape \(B, N, 2\) .*, got \(3, 2\)"),
        (torch.zeros(1, 4, 4, 8), torch.zeros(1, 3, 3), r"coords: expected shape .*, got \(1, 3, 3\)"),
        (torch.zeros(2, 4, 4, 8), torch.zeros(1, 3, 2), "coords: expected batch size 2, got 1 in shape"),
        (
            torch.zeros(1, 4, 4, 8),
            torch.zeros(1, 3, 2).half(),
            "float32 or float64, got torch.float16.*off by",
        ),
        (torch.zeros(1, 4, 4, 8), torch.zeros(1, 3, 2).bfloat16(), "coords: .*got torch.bfloat16"),
        (torch.zeros(1, 4, 4, 8), torch.zeros(1, 3, 2).long(), "coords: .*got torch.int64"),
        (torch.zeros(1, 4, 4, 8), [[0.5, 0.5]], "coords: expected a tensor of shape .*, got list"),
        (torch.zeros(1, 4, 4, 8), torch.zeros(1, 3, 2, device="meta"), "coords: expected device cpu"),
    ],
)
def test_errors(grid, coords, message):
    with pytest.raises(InputError, match=message):
        bilinear_sample(grid, coords)
