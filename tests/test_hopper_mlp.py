"""The Hopper kernel of the residual MLP without a GPU: its source in an emulator, and what the compiler makes of it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton, whose module folds the weights, cannot be used here", allow_module_level=True)

from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.triton.residual_mlp import fold_mlp

from vitup_fast import extension
from vitup_fast.ops import residual_mlp
from vitup_fast.testing import Sizes, assert_within_budget, cast, residual_mlp_inputs

D, GUARD = 384, 300


def emulate(emulator, x, weights, *, clusters=1, seed=0, in_place=False, fault="none"):
    """Results and moments of the kernel for rows ``[N, D]``, and what it did to memory beyond them."""
    layers = fold_mlp(*weights)
    rows, hidden = x.shape[0], layers.first.weight.shape[0]
    tensors = (x, layers.first.weight, layers.second.weight, layers.first.bias, layers.second.bias)
    written, error = emulator("residual_mlp", tensors, (rows, hidden, int(in_place)), clusters, seed, fault)
    if error is not None:
        return SimpleNamespace(error=error)
    split = (rows + GUARD) * D * 2
    results, moments = (
        written[:split].view(torch.bfloat16).view(-1, D),
        written[split:].view(torch.float32).view(-1, 2),
    )
    beyond = (results[rows:].isnan() & moments[rows:, :1].isnan()).all()
    return SimpleNamespace(error=None, results=results[:rows], moments=moments[:rows], untouched=beyond)


def inputs(rows, hidden, seed, mean=0.0):
    """Rows ``[N, D]`` in bfloat16 and weights of a hidden width."""
    generator = torch.Generator().manual_seed(seed)
    arguments = residual_mlp_inputs(Sizes(B=1, N=rows, D=D, expansion=4), generator, dtype=torch.bfloat16)
    weights = arguments["weights"]
    weights = weights._replace(
        weight1=weights.weight1[:hidden].contiguous(),
        bias1=weights.bias1[:hidden].contiguous(),
        weight2=(weights.weight2[:, :hidden] * (4 * D / hidden) ** 0.5).contiguous(),
    )
    return arguments["x"] + mean, weights


# Rows: one, a tile's, one more, one consumer without any, a last tile that only the first thread block sees.
@pytest.mark.parametrize(
    ("rows", "hidden", "clusters", "mean"),
    [(1, 64, 1, 0), (256, 32, 1, 0), (257, 96, 1, 0), (192, 160, 1, 50), (700, 128, 2, 0), (300, 1536, 1, 0)],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_against_float64(emulator, rows, hidden, clusters, mean, in_place):
    x, weights = inputs(rows, hidden, seed=rows, mean=mean)
    emulated = emulate(emulator, x[0], weights, clusters=clusters, seed=rows, in_place=in_place)
    assert emulated.error is None
    assert emulated.untouched
    arguments = {"x": x, "weights": weights}
    exact = residual_mlp(**cast(arguments, torch.float64), impl="reference")[0]
    eager = residual_mlp(**arguments, impl="reference")[0]
    # One row's error is a matter of chance, and that of rows that dwarf what is added to them one of rounding alone.
    assert_within_budget(emulated.results, eager, exact, factor=1.1 if rows == 1 or mean else 1.0)
    deviation = exact - exact.mean(1, keepdim=True)
    error = (emulated.moments[:, 0] - exact.mean(1)).abs() / exact.std(1)
    assert error.max() < 1e-3
    torch.testing.assert_close(emulated.moments[:, 1].double(), deviation.square().sum(1), rtol=1e-2, atol=0)


def test_schedules(emulator):
    """Whatever comes first, the results are the same."""
    x, weights = inputs(300, 96, seed=1)
    runs = [emulate(emulator, x[0], weights, seed=seed) for seed in range(8)]
    assert [r.error for r in runs] == [None] * len(runs)
    assert all(torch.equal(r.results, runs[0].results) for r in runs)
    assert all(torch.equal(r.moments, runs[0].moments) for r in runs)


@pytest.mark.parametrize("fault", ["count", "warps", "bytes", "wait", "fence", "exit"])
def test_mistakes_show(emulator, fault):
    x, weights = inputs(600, 128, seed=1)
    runs = [emulate(emulator, x[0], weights, seed=seed, fault=fault) for seed in range(3)]
    assert all(r.error is not None and r.error.startswith("emulator: ") for r in runs)


def test_registers(ptxas_output):
    output = ptxas_output("residual_mlp.cu")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in output
    # What 384 threads may have at the start; consumers then take what producers give.
    assert re.search(r"Used 168 registers", output)


def test_products_are_not_serialised(ptxas_output):
    assert not re.findall(r"C75\d\d", ptxas_output("residual_mlp.cu"))


@pytest.mark.skipif(extension.obstacle("cuda") is not None, reason="the CUDA kernels are not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dim": 768}, "expected rows of 384 numbers"),
        ({"hidden": 40}, "expected a hidden width that is a positive multiple of 32"),
        ({"rows": -1}, "expected no negative number of rows"),
        ({"x": 520}, "expected x aligned to 16 bytes"),
        ({"kind": "float32"}, "x: expected bfloat16, got float32"),
    ],
)
def test_refusals(changed, message):
    """Errors name the kernel, and come before anything is asked of a GPU."""
    call = {"x": 512, "kind": "bfloat16", "rows": 5, "dim": D, "hidden": 768, **changed}
    library = extension.load().cuda
    half, single = library.types.index("bfloat16"), library.types.index("float32")
    tensors = [(call["x"], library.types.index(call["kind"]))]
    tensors += [(512, kind) for kind in (half, single, half, single, half)]
    with pytest.raises(ValueError, match=rf"residual_mlp_sm90_kernel.*{message}"):
        library.residual_mlp_sm90(*tensors, None, call["rows"], call["dim"], call["hidden"], 0, 0)


@pytest.mark.skipif(
    extension.obstacle("cuda") is not None or not torch.cuda.is_available(),
    reason="needs a GPU and the compiled CUDA kernels",
)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (255, 768), (4096, 1536), (100_003, 768)])
def test_on_a_gpu(rows, hidden):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    x, weights = inputs(rows, hidden, seed=rows)
    x, weights = x.cuda(), type(weights)(*(t.cuda() for t in weights))
    layers, arguments = fold_mlp(*weights), {"x": x, "weights": weights}
    exact = residual_mlp(**cast(arguments, torch.float64), impl="reference")[0]
    eager = residual_mlp(**arguments, impl="reference")[0]
    results = torch.full((rows + GUARD, D), torch.nan, dtype=x.dtype, device="cuda")
    moments = torch.full((rows + GUARD, 1, 2), torch.nan, device="cuda")
    compiled.residual_mlp(x[0], (*layers.first[:2], *layers.second[:2]), results[:rows], moments[:rows])
    assert_within_budget(results[:rows], eager, exact, factor=1.1 if rows == 1 else 1.0)
    assert results[rows:].isnan().all()
    assert moments[rows:].isnan().all()
    torch.testing.assert_close(moments[:rows, 0, 0].double(), exact.mean(1), rtol=0, atol=1e-2)
