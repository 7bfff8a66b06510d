"""The Hopper kernel of linear layers without a GPU: its source in an emulator, and what the compiler makes of it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton, whose module folds the weights, cannot be used here", allow_module_level=True)

from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.triton import common
from vitup_fast.kernels.triton.linear import Folded, fold, linear

from vitup_fast import extension
from vitup_fast.testing import assert_within_budget

GUARD = 300  # rows behind the results


class Around(NamedTuple):
    """What stands around a product."""

    parts: int = 0  # of the moments that a LayerNorm before it reads; none without one
    gelu: bool = False
    residual: int = 0  # 1: added, 2: and overwritten
    moments: bool = False  # of the results


PLAIN, GELU, NORM, NORM_GELU = Around(), Around(gelu=True), Around(1), Around(3, gelu=True)
ADDED, IN_PLACE = Around(residual=1), Around(residual=2, moments=True)


def row_moments(rows, parts):
    """Mean and sum of squared deviations of equal parts of rows; ``[M, K] -> [M, parts, 2]``."""
    split = rows.double().view(len(rows), parts, -1)
    mean = split.mean(2, keepdim=True)
    return torch.cat((mean, (split - mean).square().sum(2, keepdim=True)), 2).float()


class Layer:
    """Random rows ``[M, K]`` and a layer of N results, in bfloat16."""

    def __init__(self, M, N, K, around, mean=0.0):
        generator = torch.Generator().manual_seed(M + N + K)

        def normal(*shape, scale=1.0, offset=0.0):
            return (torch.randn(shape, generator=generator) * scale + offset).bfloat16()

        self.around = around
        self.x, self.residual = normal(M, K, offset=mean), normal(M, N, offset=mean)
        self.weight, self.bias = normal(N, K, scale=K**-0.5), normal(N, scale=0.1)
        self.norm = (normal(K, scale=0.2, offset=1.0), normal(K, scale=0.2)) if around.parts else None

    def folded(self):
        return fold(self.weight, self.bias, *(self.norm or ()))

    def definition(self, dtype):
        """What is to be computed, in a dtype."""
        x, weight, bias, residual = (t.to(dtype) for t in (self.x, self.weight, self.bias, self.residual))
        if self.norm is not None:
            x = F.layer_norm(x, x.shape[1:], *(t.to(dtype) for t in self.norm), 1e-5)
        y = F.linear(x, weight, bias)
        if self.around.gelu:
            y = F.gelu(y)
        return y + residual if self.around.residual else y

    def check(self, results, moments):
        """Hold results and moments of their parts against the definition."""
        exact = self.definition(torch.float64)
        # Of a plain product eager PyTorch rounds as often as the kernel, and one row's error is a matter of chance.
        factor = 1.1 if self.around == PLAIN or len(self.x) == 1 else 1.0
        assert_within_budget(results, self.definition(torch.bfloat16), exact, factor=factor)
        if not self.around.moments:
            return
        split = exact.view(*moments.shape[:2], -1)
        error = (moments[..., 0] - split.mean(2)).abs() / split.std(2)
        assert error.max() < 5e-3
        squares = (split - split.mean(2, keepdim=True)).square().sum(2)
        torch.testing.assert_close(moments[..., 1].double(), squares, rtol=1e-2, atol=0)


def emulate(emulator, layer, *, columns=256, clusters=1, seed=0, fault="none"):
    """Results and moments of the kernel in tiles of some columns, and what it did to memory beyond them."""
    (M, K), N, around, folded = layer.x.shape, len(layer.weight), layer.around, layer.folded()
    given = row_moments(layer.x, around.parts) if around.parts else torch.empty(0)
    tensors = (layer.x, folded.weight, layer.residual, given, folded.bias, folded.row_sum)
    sizes = (M, N, K, around.parts, int(around.gelu), around.residual, int(around.moments), columns)
    written, error = emulator("linear", tensors, sizes, clusters, seed, fault)
    if error is not None:
        return SimpleNamespace(error=error)
    split = (M + GUARD) * N * 2
    results = written[:split].view(torch.bfloat16).view(-1, N)
    moments = written[split:].view(torch.float32).view(M + GUARD, -1, 2)
    beyond = results[M:].isnan().all() and moments[M if around.moments else 0 :].isnan().all()
    return SimpleNamespace(error=None, results=results[:M], moments=moments[:M], untouched=beyond)


# Rows: one, a tile's, one more, a last tile that only the first thread block sees; one tile a cluster and several.
@pytest.mark.parametrize(
    ("M", "N", "K", "around", "columns", "clusters"),
    [
        (1, 256, 192, NORM, 256, 1),
        (256, 256, 192, PLAIN, 256, 1),
        (257, 256, 256, NORM_GELU._replace(parts=4), 256, 1),
        (300, 768, 384, NORM_GELU, 256, 2),
        (65, 512, 320, GELU, 256, 1),
        (700, 256, 192, ADDED, 256, 2),
        (300, 512, 512, IN_PLACE, 256, 2),
        (300, 384, 192, NORM, 192, 1),
        (257, 192, 320, PLAIN, 192, 1),
        (65, 384, 384, NORM_GELU, 192, 2),
        (100, 192, 192, GELU, 192, 1),
        (300, 384, 512, IN_PLACE, 192, 2),
        (1, 192, 192, ADDED, 192, 1),
    ],
)
def test_against_float64(emulator, M, N, K, around, columns, clusters):
    layer = Layer(M, N, K, around)
    emulated = emulate(emulator, layer, columns=columns, clusters=clusters, seed=M)
    assert emulated.error is None
    assert emulated.untouched
    layer.check(emulated.results, emulated.moments)


@pytest.mark.parametrize("around", [NORM_GELU, IN_PLACE])
def test_rows_whose_mean_dwarfs_their_deviation(emulator, around):
    layer = Layer(100, 256, 384, around, mean=50.0)
    emulated = emulate(emulator, layer)
    assert emulated.error is None
    layer.check(emulated.results, emulated.moments)


@pytest.mark.parametrize("columns", [256, 192])
def test_schedules(emulator, columns):
    """Whatever comes first, the results are the same."""
    layer = Layer(300, 2 * columns, 256, IN_PLACE)
    runs = [emulate(emulator, layer, columns=columns, seed=seed) for seed in range(4)]
    assert [r.error for r in runs] == [None] * len(runs)
    assert all(torch.equal(r.results, runs[0].results) for r in runs)
    assert all(torch.equal(r.moments, runs[0].moments) for r in runs)


@pytest.mark.parametrize("fault", ["count", "warps", "bytes", "wait", "pending", "exit"])
def test_mistakes_show(emulator, fault):
    layer = Layer(300, 512, 384, PLAIN)
    runs = [emulate(emulator, layer, seed=seed, fault=fault) for seed in range(3)]
    assert all(r.error is not None and r.error.startswith("emulator: ") for r in runs)


def test_registers(ptxas_output):
    output = ptxas_output("linear.cu")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", output)
    assert frames == [("0", "0")] * 10
    # What 384 threads may have at the start; consumers then take what producers give.
    assert re.findall(r"Used (\d+) registers", output) == ["168"] * 10


def test_products_are_not_serialised(ptxas_output):
    assert not re.findall(r"C75\d\d", ptxas_output("linear.cu"))


def arguments(**changed):
    """What the extension's function takes, at addresses that nobody follows."""
    library = extension.load().cuda
    half, single = (library.types.index(name) for name in ("bfloat16", "float32"))
    call = {
        "x": (512, half),
        "weight": (512, half),
        "bias": (512, single),
        "row_sum": (512, single),
        "moments": (512, single),
        "residual": None,
        "out": (512, half),
        "out_moments": None,
    }
    call |= {"rows": 5, "columns": 768, "inner": 768, "parts": 1, "tile_columns": 256, "gelu": False}
    return [*(call | changed).values(), 0, 0]


@pytest.mark.skipif(extension.obstacle("cuda") is not None, reason="the CUDA kernels are not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": 384}, "expected a positive multiple of 256 results"),
        ({"columns": 256, "tile_columns": 192}, "expected a positive multiple of 192 results"),
        ({"tile_columns": 128}, "expected tiles of 256 or 192 columns, not 128"),
        ({"inner": 800}, "expected rows of a multiple of 64 numbers, at least 192"),
        ({"inner": 128}, "expected rows of a multiple of 64 numbers, at least 192"),
        ({"rows": -1}, "expected no negative number of rows"),
        ({"parts": 5}, "expected moments of parts that divide the row, got 5 parts"),
        ({"moments": None}, "expected moments of parts that divide the row, got 1 parts"),
        ({"residual": (512, 2)}, "expected neither moments nor gelu together with a residual"),
        ({"out_moments": (512, 1)}, "expected no out_moments without a residual"),
        ({"x": (520, 2)}, "expected x aligned to 16 bytes"),
        ({"moments": (516, 1)}, "expected moments aligned to 8 bytes"),
        ({"x": (512, 1)}, "x: expected bfloat16, got float32"),
        ({"row_sum": (512, 2)}, "row_sum: expected float32, got bfloat16"),
    ],
)
def test_refusals(changed, message):
    """Errors name the kernel, and come before anything is asked of a GPU."""
    with pytest.raises(ValueError, match=rf"linear_sm90_kernel.*{message}"):
        extension.load().cuda.linear_sm90(*arguments(**changed))


def on_a_gpu(layer):
    """Results and moments of :func:`linear` on a GPU of compute capability 9.0, by the compiled kernel alone."""
    around, folded = layer.around, Folded(*(t.cuda() for t in layer.folded()))
    x, residual = layer.x.cuda(), layer.residual.cuda()
    given = row_moments(layer.x, around.parts).cuda() if around.parts else None
    (M, K), N = x.shape, len(layer.weight)
    columns = compiled.linear_columns(M, N, K, 132)
    results = torch.full((M + GUARD, N), torch.nan, dtype=x.dtype, device="cuda")
    moments = torch.full((M + GUARD, N // columns, 2), torch.nan, device="cuda")
    if around.residual == 2:
        results[:M] = residual
        residual = results[:M]
    options = {"residual": residual} if around.residual else {}
    with compiled.compiled_kernels(("norm_linear",)), common.recorded_launches(("", 90)) as launches:
        linear(
            x,
            folded,
            given,
            gelu=around.gelu,
            want_moments=around.moments,
            out=results,
            out_moments=moments,
            **options,
        )
    assert not launches
    assert results[M:].isnan().all()
    assert moments[M if around.moments else 0 :].isnan().all()
    return results[:M].cpu(), moments[:M].cpu()


@pytest.mark.skipif(
    extension.obstacle("cuda") is not None or not torch.cuda.is_available(),
    reason="needs a GPU and the compiled CUDA kernels",
)
@pytest.mark.parametrize("around", [PLAIN, GELU, NORM, NORM_GELU, ADDED, IN_PLACE])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(16_895, 256, 192), (8447, 768, 3072), (20_001, 3072, 768), (16_000, 384, 384)]
)
def test_on_a_gpu(M, N, K, around):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    layer = Layer(M, N, K, around)
    layer.check(*on_a_gpu(layer))
