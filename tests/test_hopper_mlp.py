"""The Hopper kernels of the MLPs without a GPU: their source in an emulator, and what the compiler makes of it."""

from __future__ import annotations

import itertools
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton, whose module folds the weights, cannot be used here", allow_module_level=True)

from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.triton.film_mlp import Modulation
from vitup_fast.kernels.triton.residual_mlp import fold_mlp

from vitup_fast import extension
from vitup_fast.ops import film_mlp, residual_mlp
from vitup_fast.ops.coordinates import nearest_token
from vitup_fast.ops.film_mlp import film_gamma_beta
from vitup_fast.testing import OPERATIONS, Sizes, assert_within_budget, cast, residual_mlp_inputs

D, GUARD = 384, 300


def emulate(
    emulator, x, weights, *, film=((), ()), clusters=1, seed=0, in_place=False, fault="none", fp8=False
):
    """Results and moments of the kernel for rows ``[N, D]``, and what it did to memory beyond them.

    ``film`` makes it the FiLM MLP: further sizes and tensors. With ``fp8`` its products are of 8-bit numbers.
    """
    weight1, bias1, weight2, bias2, *scales = fold_mlp(*weights, fp8=fp8).one_kernel
    rows, hidden = x.shape[0], weight1.shape[0]
    tensors = (x, weight1, weight2, bias1, bias2, *scales, *film[1])
    kernel = ("film_mlp" if film[0] else "residual_mlp") + "_fp8" * fp8
    sizes = (rows, hidden, int(in_place), *film[0])
    written, error = emulator(kernel, tensors, sizes, clusters, seed, fault)
    if error is not None:
        return SimpleNamespace(error=error)
    split = (rows + GUARD) * D * 2
    results, moments = (
        written[:split].view(torch.bfloat16).view(-1, D),
        written[split:].view(torch.float32).view(-1, 2),
    )
    beyond = (results[rows:].isnan() & moments[rows:, :1].isnan()).all()
    return SimpleNamespace(error=None, results=results[:rows], moments=moments[:rows], untouched=beyond)


def narrowed(weights, hidden):
    """An MLP's first hidden columns, the scale of its results kept."""
    return weights._replace(
        weight1=weights.weight1[:hidden].contiguous(),
        bias1=weights.bias1[:hidden].contiguous(),
        weight2=(weights.weight2[:, :hidden] * (weights.weight1.shape[0] / hidden) ** 0.5).contiguous(),
    )


def inputs(rows, hidden, seed, mean=0.0):
    """Rows ``[1, N, D]`` in bfloat16 and weights of a hidden width."""
    generator = torch.Generator().manual_seed(seed)
    arguments = residual_mlp_inputs(Sizes(B=1, N=rows, D=D, expansion=4), generator, dtype=torch.bfloat16)
    return arguments["x"] + mean, narrowed(arguments["weights"], hidden)


def film_inputs(shape, hidden, source, seed, mean=0.0):
    """Arguments of :func:`film_mlp` for ``shape`` images and queries, and its modulation.

    Whose ``mean`` dwarfs their deviation: states, tokens, with little modulation, and what LN' normalises.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = Sizes(
        B=shape[0], N=shape[1], D=D, expansion=4, token_grid=(4, 8) if source == "table" else (5, 7)
    )
    name = "film_mlp_table" if source == "table" else "film_mlp"
    arguments = OPERATIONS[name].inputs(sizes, generator, dtype=torch.bfloat16)
    weights, position = arguments["weights"], arguments["position"]
    mlp = narrowed(weights.mlp, hidden)
    if mean:
        position = position._replace(weight2=position.weight2 / 64, bias2=position.bias2 / 64)
        mlp = mlp._replace(bias2=mlp.bias2 + mean)
        arguments |= {"x": arguments["x"] + mean, "tokens": arguments["tokens"] + mean}
    arguments |= {"weights": weights._replace(mlp=mlp), "position": position}
    if source == "table":
        table = arguments["table"]
        if mean:
            arguments["table"] = table = table._replace(gamma_beta=table.gamma_beta / 64)
        return arguments, Modulation(table.gamma_beta, None, table.row, table.token)
    coords = arguments["coords"].to(getattr(torch, source))
    arguments["coords"] = coords
    _, relative = nearest_token(coords, sizes.token_grid)
    wide = type(position)(*(t.float() for t in position))
    gamma_beta = film_gamma_beta(relative, arguments["freqs"], wide).float()
    return arguments, Modulation(gamma_beta.flatten(0, 1), coords, None, None)


def emulate_film(emulator, arguments, modulation, **options):
    """:func:`emulate` for the FiLM MLP."""
    x, tokens, weights = arguments["x"], arguments["tokens"], arguments["weights"]
    where = (modulation.coords,) if modulation.row is None else (modulation.token, modulation.row)
    bits = 8 * modulation.coords.itemsize if modulation.row is None else 0
    sizes = (x.shape[1], *tokens.shape[1:3], len(modulation.gamma_beta), bits)
    film = sizes, (tokens, modulation.gamma_beta, *weights[1:], *where)
    return emulate(emulator, x.flatten(0, 1), weights.mlp, film=film, **options)


def row_moments(rows):
    """Mean and sum of squared deviations of each row."""
    mean = rows.mean(1, keepdim=True)
    return mean[:, 0], (rows - mean).square().sum(1)


def assert_exact(operation, arguments, results, moments, factor):
    """Rows ``[M, D]`` and their moments ``[M, 2]`` against the definition in float64, and eager's error."""
    exact = operation(**cast(arguments, torch.float64), impl="reference").flatten(0, 1)
    eager = operation(**arguments, impl="reference").flatten(0, 1)
    assert_within_budget(results, eager, exact, factor=factor)
    assert moments.isfinite().all()
    if len(exact) == 1:  # a single number's error is chance
        return
    for i, name in enumerate(("mean", "squares")):
        truth, of_eager = row_moments(exact)[i], row_moments(eager.double())[i].float()
        assert_within_budget(moments[:, i], of_eager, truth, factor=factor, name=name)


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
    # One row's error is a matter of chance, and that of rows that dwarf what is added to them one of rounding alone.
    factor = 1.1 if rows == 1 or mean else 1.0
    arguments = {"x": x, "weights": weights}
    assert_exact(residual_mlp, arguments, emulated.results, emulated.moments, factor)


# Rows as above; of several images, whose borders lie within a tile, and in the last one.
@pytest.mark.parametrize(
    ("shape", "hidden", "source", "clusters", "mean"),
    [
        ((1, 1), 64, "table", 1, 0),
        ((2, 128), 32, "float32", 1, 0),
        ((1, 257), 96, "table", 1, 0),
        ((2, 96), 160, "float64", 1, 50),
        ((3, 64), 160, "table", 1, 50),
        ((7, 100), 128, "float32", 2, 0),
        ((3, 100), 1536, "table", 1, 0),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_film_against_float64(emulator, shape, hidden, source, clusters, mean, in_place):
    rows = shape[0] * shape[1]
    arguments, modulation = film_inputs(shape, hidden, source, seed=rows, mean=mean)
    options = {"clusters": clusters, "seed": rows, "in_place": in_place}
    emulated = emulate_film(emulator, arguments, modulation, **options)
    assert emulated.error is None
    assert emulated.untouched
    factor = 1.1 if rows == 1 or mean else 1.0
    assert_exact(film_mlp, arguments, emulated.results, emulated.moments, factor)


def emulation(kind, emulator, rows, hidden):
    """What runs one kernel, given a seed and other options."""
    if kind == "residual":
        x, weights = inputs(rows, hidden, seed=1)
        return partial(emulate, emulator, x[0], weights)
    arguments, modulation = film_inputs((2, rows // 2), hidden, "table", seed=1)
    return partial(emulate_film, emulator, arguments, modulation)


@pytest.mark.parametrize("kind", ["residual", "film"])
def test_schedules(emulator, kind):
    """Whatever comes first, the results are the same."""
    # Two tiles, one after the other.
    run = emulation(kind, emulator, 300, 96)
    runs = [run(seed=seed) for seed in range(8)]
    assert [r.error for r in runs] == [None] * len(runs)
    assert all(torch.equal(r.results, runs[0].results) for r in runs)
    assert all(torch.equal(r.moments, runs[0].moments) for r in runs)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *itertools.product(("residual", "film"), ("count", "warps", "bytes", "wait", "fence", "exit")),
        ("film", "sync"),
    ],
)
def test_mistakes_show(emulator, kind, fault):
    run = emulation(kind, emulator, 600, 128)
    runs = [run(seed=seed, fault=fault) for seed in range(3)]
    shows = [r.error is not None and r.error.startswith("emulator: ") for r in runs]
    # Whether a thread block that leaves is missed depends on what the other has still to do.
    assert any(shows) if fault == "exit" else all(shows)


def test_registers(ptxas_output):
    output = ptxas_output("residual_mlp.cu", "-fmad=false")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert frames == [("0", "0", "0")] * 4
    # What 384 threads may have at the start; consumers then take what producers give.
    assert re.findall(r"Used (\d+) registers", output) == ["168"] * 4


def test_products_are_not_serialised(ptxas_output):
    assert not re.findall(r"C75\d\d", ptxas_output("residual_mlp.cu", "-fmad=false"))


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


@pytest.mark.skipif(extension.obstacle("cuda") is not None, reason="the CUDA kernels are not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dim": 768}, "expected rows of 384 numbers"),
        ({"rows": 1 << 31}, "expected at most 1073741824 rows"),
        ({"queries": 4}, "expected as many queries in every image, not 4"),
        ({"token_rows": 0}, "expected at least one token"),
        ({"address": 520}, "expected tokens aligned to 16 bytes"),
        ({"tokens": "float16"}, "tokens: expected bfloat16, got float16"),
        ({"gamma_beta": "bfloat16"}, "gamma_beta: expected float32, got bfloat16"),
        ({"coords": "bfloat16"}, "coords: expected float32 or float64"),
        ({"row": "float32", "table": True}, "table_row: expected int64, got float32"),
    ],
)
def test_film_refusals(changed, message):
    call = {"rows": 6, "dim": D, "queries": 3, "token_rows": 5, "address": 512, "table": False}
    call |= {"tokens": "bfloat16", "gamma_beta": "float32", "coords": "float32", "row": "int64"} | changed
    library = extension.load().cuda
    token = "int64" if call["table"] else call["coords"]
    kinds = ("bfloat16", "bfloat16", "float32", "bfloat16", "float32", "bfloat16")
    kinds += (call["tokens"], call["gamma_beta"], token, token, call["row"], "bfloat16", "bfloat16")
    tensors = [(512, library.types.index(kind)) for kind in kinds]
    tensors[6] = (call["address"], tensors[6][1])
    sizes = (call["rows"], call["dim"], 1536, call["queries"], call["token_rows"], 7, call["table"])
    with pytest.raises(ValueError, match=rf"film_mlp_sm90_kernel.*{message}"):
        library.film_mlp_sm90(*tensors[:6], None, *tensors[6:], *sizes, 0, 0)


needs_a_gpu = pytest.mark.skipif(
    extension.obstacle("cuda") is not None
    or not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0 and the compiled CUDA kernels",
)


def guarded(rows):
    """Memory for results and moments, and rows behind them that nobody may touch."""
    results = torch.full((rows + GUARD, D), torch.nan, dtype=torch.bfloat16, device="cuda")
    return results, torch.full((rows + GUARD, 1, 2), torch.nan, device="cuda")


def to_gpu(value):
    """Tensors in tuples, also named ones, and dictionaries on the GPU."""
    if isinstance(value, dict):
        return {name: to_gpu(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(to_gpu, value))
    return value if value is None else value.cuda()


@needs_a_gpu
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (255, 768), (4096, 1536), (100_003, 768)])
def test_on_a_gpu(rows, hidden):
    x, weights = to_gpu(dict(enumerate(inputs(rows, hidden, seed=rows)))).values()
    layers = fold_mlp(*weights)
    results, moments = guarded(rows)
    compiled.residual_mlp(x[0], (*layers.first[:2], *layers.second[:2]), results[:rows], moments[:rows])
    factor = 1.1 if rows == 1 else 1.0
    assert_exact(residual_mlp, {"x": x, "weights": weights}, results[:rows], moments[:rows, 0], factor)
    assert results[rows:].isnan().all()
    assert moments[rows:].isnan().all()


@needs_a_gpu
@pytest.mark.parametrize(
    ("shape", "hidden", "source"),
    [
        ((1, 1), 64, "table"),
        ((3, 85), 768, "float32"),
        ((1, 4096), 1536, "table"),
        ((2, 50_001), 1536, "float64"),
    ],
)
def test_film_on_a_gpu(shape, hidden, source):
    rows = shape[0] * shape[1]
    arguments, modulation = to_gpu(dict(enumerate(film_inputs(shape, hidden, source, seed=rows)))).values()
    layers, out_norm = fold_mlp(*arguments["weights"].mlp), arguments["weights"][1:]
    results, moments = guarded(rows)
    compiled.film_mlp(
        arguments["x"],
        arguments["tokens"],
        modulation.gamma_beta,
        modulation.pointers(),
        modulation.row is not None,
        (*layers.first[:2], *layers.second[:2]),
        out_norm,
        results[:rows],
        moments[:rows],
    )
    factor = 1.1 if rows == 1 else 1.0
    assert_exact(film_mlp, arguments, results[:rows], moments[:rows, 0], factor)
    assert results[rows:].isnan().all()
    assert moments[rows:].isnan().all()
