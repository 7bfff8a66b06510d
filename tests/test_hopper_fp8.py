"""The Hopper kernels of the MLPs in 8-bit floating point without a GPU, and what surrounds them."""

from __future__ import annotations

import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_IMPLS
from fp8_reference import columns_of_operand, film_mlp_fp8, quantised, residual_mlp_fp8

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton, whose module folds the weights, cannot be used here", allow_module_level=True)

from test_hopper_mlp import D, emulate, emulate_film, film_inputs, guarded, inputs, needs_a_gpu, to_gpu
from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.triton.film_mlp import FilmBuffers
from vitup_fast.kernels.triton.film_mlp import film_mlp as launch_film_mlp
from vitup_fast.kernels.triton.residual_mlp import fold_mlp, forward_fp8
from vitup_fast.kernels.triton.residual_mlp import residual_mlp as launch_residual_mlp

from vitup_fast import InputError, ViTUpConfig, extension
from vitup_fast.network.weights import collect
from vitup_fast.ops import film_mlp, residual_mlp
from vitup_fast.ops.coordinates import nearest_token
from vitup_fast.testing import cast, random_network, relative_error
from vitup_fast.walks import Settings, choose_walk

implementations = importlib.import_module("vitup_fast.ops.implementations")

# Relative to what the MLP adds, measured: each of the four roundings to e4m3 costs 0.026, together 0.051, and the sums
# of 13 bits 0.005 against exact ones.
ERROR, SUMS = 0.056, 0.008


def assert_near(results, truth, x, share, name, eager=None):
    """Errors are at most eager's, or of rounding to bfloat16, together with a share of what was added to the rows."""
    eager = truth.bfloat16() if eager is None else eager
    added, rounding = (truth - x.double()).norm(), (eager.double() - truth).norm()
    error, allowed = (results.double() - truth).norm(), (rounding**2 + (share * added) ** 2) ** 0.5
    assert error <= allowed, f"{name}: error {error:.4g}, allowed {allowed:.4g}"


emulate, emulate_film = partial(emulate, fp8=True), partial(emulate_film, fp8=True)


# Rows: one, a tile's, one more, one consumer without any, a last tile that only the first thread block sees.
@pytest.mark.parametrize(
    ("rows", "hidden", "clusters", "mean"),
    [(1, 64, 1, 0), (256, 32, 1, 0), (257, 96, 1, 0), (192, 160, 1, 50), (700, 64, 2, 0), (128, 768, 1, 0)],
)
def test_error(emulator, rows, hidden, clusters, mean):
    """Against float64, and against the same roundings in PyTorch."""
    x, weights = inputs(rows, hidden, seed=rows, mean=mean)
    emulated = emulate(emulator, x[0], weights, clusters=clusters, seed=rows, in_place=rows % 2 == 0)
    assert emulated.error is None
    assert emulated.untouched
    exact = residual_mlp(**cast({"x": x, "weights": weights}, torch.float64), impl="reference")[0]
    assert_near(emulated.results, exact, x[0], ERROR, "float64")
    same = residual_mlp_fp8(x[0], weights)
    assert_near(emulated.results, same, x[0], SUMS, "the same roundings")
    # Moments are those of the results before they are rounded; another rounding of a hidden value moves a row's.
    assert ((emulated.moments[:, 0] - same.mean(1)).abs() / same.std(1)).max() < 1e-2
    assert relative_error(emulated.moments[:, 1], same.var(1, correction=0) * D) < 1e-2


def indices(arguments, modulation):
    """Token and row of ``[gamma, beta]`` of every query, ``[B, N]`` each."""
    B, N, _ = arguments["x"].shape
    if modulation.row is not None:
        return modulation.token.expand(B, N), modulation.row.expand(B, N)
    token, _ = nearest_token(modulation.coords, arguments["tokens"].shape[1:3])
    return token, torch.arange(B * N).view(B, N)


# Rows as above; of several images, whose borders lie within a tile, and in the last one.
@pytest.mark.parametrize(
    ("shape", "hidden", "source", "clusters", "mean"),
    [
        ((1, 1), 64, "table", 1, 0),
        ((2, 128), 32, "float32", 1, 0),
        ((1, 257), 96, "table", 1, 0),
        ((2, 96), 160, "float64", 1, 50),
        ((7, 100), 64, "float32", 2, 0),
        ((1, 128), 768, "table", 1, 0),
    ],
)
def test_film_error(emulator, shape, hidden, source, clusters, mean):
    rows = shape[0] * shape[1]
    arguments, modulation = film_inputs(shape, hidden, source, seed=rows, mean=mean)
    options = {"clusters": clusters, "seed": rows, "in_place": rows % 2 == 0}
    emulated = emulate_film(emulator, arguments, modulation, **options)
    assert emulated.error is None
    assert emulated.untouched
    x = arguments["x"].flatten(0, 1)
    exact = film_mlp(**cast(arguments, torch.float64), impl="reference").flatten(0, 1)
    # Modulated tokens are rounded to bfloat16 before they are normalised, as in eager.
    eager = film_mlp(**arguments, impl="reference").flatten(0, 1)
    assert_near(emulated.results, exact, x, ERROR, "float64", eager)
    where = (modulation.gamma_beta, *indices(arguments, modulation))
    same = film_mlp_fp8(arguments["x"], arguments["tokens"], where, arguments["weights"]).flatten(0, 1)
    assert_near(emulated.results, same, x, SUMS, "the same roundings")
    assert relative_error(emulated.moments[:, 1], same.var(1, correction=0) * D) < 1e-2


def test_outliers(emulator):
    """Rows and weights of any size: scales follow weights, and nothing overflows."""
    x, weights = inputs(64, 64, seed=2)
    x = x.clone()
    x[0, 0, 5], x[0, 1] = 1e4, 0
    for scale1, scale2 in ((1e3, 1.0), (1e-4, 1e4), (0.0, 1.0)):
        rows = torch.linspace(0, 1, 64)[:, None]  # some of them tiny, one zero
        changed = weights._replace(
            weight1=(weights.weight1 * rows * scale1).bfloat16(), weight2=weights.weight2 * scale2
        )
        emulated = emulate(emulator, x[0], changed)
        exact = residual_mlp(**cast({"x": x, "weights": changed}, torch.float64), impl="reference")[0]
        assert_near(emulated.results, exact, x[0], ERROR, f"scales {scale1}, {scale2}")


def test_bad_row_stays_alone(emulator):
    x, weights = inputs(130, 64, seed=3)
    expected = emulate(emulator, x[0], weights).results
    for bad in (float("nan"), float("inf")):
        changed = x[0].clone()
        changed[70, 3] = bad
        results = emulate(emulator, changed, weights).results
        others = torch.arange(130) != 70
        assert torch.equal(results[others], expected[others])
        assert results[70].isnan().all()


def emulation(kind, emulator, rows, hidden):
    """What runs one kernel, given a seed and other options."""
    if kind == "residual":
        x, weights = inputs(rows, hidden, seed=1)
        return partial(emulate, emulator, x[0], weights)
    return partial(emulate_film, emulator, *film_inputs((2, rows // 2), hidden, "table", seed=1))


@pytest.mark.parametrize("kind", ["residual", "film"])
def test_schedules(emulator, kind):
    """Whatever comes first, the results are the same."""
    run = emulation(kind, emulator, 258, 64)
    runs = [run(seed=seed) for seed in range(4)]
    assert [r.error for r in runs] == [None] * len(runs)
    assert all(torch.equal(r.results, runs[0].results) for r in runs)
    assert all(torch.equal(r.moments, runs[0].moments) for r in runs)


@pytest.mark.parametrize("kind", ["residual", "film"])
@pytest.mark.parametrize("fault", ["count", "warps", "bytes", "wait", "fence", "exit", "sync"])
def test_mistakes_show(emulator, kind, fault):
    run = emulation(kind, emulator, 600, 128)
    runs = [run(seed=seed, fault=fault) for seed in range(2)]
    shows = [r.error is not None and r.error.startswith("emulator: ") for r in runs]
    # Whether a thread block that leaves is missed depends on what the other has still to do.
    assert any(shows) if fault == "exit" else all(shows)


def test_columns_are_in_the_order_of_operands():
    order = compiled._operand_order(torch.device("cpu"))
    assert order.tolist() == columns_of_operand()
    assert sorted(order.tolist()) == list(range(compiled.FP8_CHUNK))


def test_quantised_weights():
    """Scales undo what they did, and no row that LayerNorm makes exceeds what hidden values are scaled by."""
    _, weights = inputs(1, 96, seed=4)
    layers, mlp = fold_mlp(*weights), quantised(weights)
    weight1 = mlp.weight1.float() * mlp.scale1[:, None] * compiled.NORMED_SCALE
    assert relative_error(weight1, layers.first.weight.double()) < 0.03
    weight2 = torch.empty(D, 3, 32)
    weight2[..., columns_of_operand()] = mlp.weight2.float().transpose(0, 1)
    weight2 = weight2.flatten(1) * mlp.scale2[:, None] * mlp.hidden_scale
    assert relative_error(weight2, layers.second.weight.double()) < 0.03
    # The worst row for a hidden value is a multiple of its weights.
    first = layers.first.weight.float()
    worst = F.layer_norm(first - first.mean(1, keepdim=True), (D,))
    hidden = (first @ worst.T + layers.first.bias[:, None]) * mlp.hidden_scale
    assert 100 < hidden.max() <= compiled.E4M3_MOST


@pytest.mark.skipif(extension.obstacle("cuda") is not None, reason="the CUDA kernels are not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dim": 768}, "expected rows of 384 numbers"),
        ({"hidden": 40}, "expected a hidden width that is a positive multiple of 32"),
        ({"hidden": 1 << 27}, "expected a hidden width of at most 2\\^26"),
        ({"scale": 520}, "expected hidden_scale aligned to 16 bytes"),
        ({"rows": -1}, "expected no negative number of rows"),
        ({"x": 520}, "expected x aligned to 16 bytes"),
        ({"kind": "bfloat16"}, "weight1: expected float8_e4m3fn, got bfloat16"),
    ],
)
def test_refusals(changed, message):
    """Errors name the kernel, and come before anything is asked of a GPU."""
    call = {"x": 512, "scale": 512, "kind": "float8_e4m3fn", "rows": 6, "dim": D, "hidden": 768, **changed}
    library = extension.load().cuda
    numbers = {name: library.types.index(name) for name in ("bfloat16", "float32", "float8_e4m3fn")}
    half, single, quantised = numbers.values()
    first = [(call["x"], half), (512, numbers[call["kind"]]), (512, single), (512, quantised), (512, single)]
    mlp = (*first, (512, half), None, (512, single), (512, single), (call["scale"], single))
    sizes = call["rows"], call["dim"], call["hidden"]
    with pytest.raises(ValueError, match=rf"residual_mlp_fp8_sm90_kernel.*{message}"):
        library.residual_mlp_fp8_sm90(*mlp, *sizes, 0, 0)
    film = [(512, half), *[(512, single)] * 4, (512, half), (512, half)]
    with pytest.raises(ValueError, match=rf"film_mlp_fp8_sm90_kernel.*{message}"):
        library.film_mlp_fp8_sm90(*mlp, *film, *sizes, 3, 5, 7, False, 0, 0)


@pytest.fixture
def calls(monkeypatch):
    """What the kernel is called with."""
    found = []

    class Host:
        types = ("float32", "bfloat16", "float8_e4m3fn", "int64")
        residual_mlp_fp8_sm90 = film_mlp_fp8_sm90 = staticmethod(lambda *args: found.append(args))

    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(host=Host))
    return found


def described(*tensors):
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64)
    return [(t.data_ptr(), kinds.index(t.dtype)) for t in tensors]


@pytest.mark.parametrize("want_moments", [False, True])
def test_what_the_kernel_is_given(calls, want_moments):
    x, weights = inputs(5, 64, seed=5)
    layers = fold_mlp(*weights, fp8=True)
    state, memory = torch.empty(9, D, dtype=torch.bfloat16), torch.empty(99)
    result, moments = launch_residual_mlp(
        x[0], None, layers, out=state, out_moments=memory, want_moments=want_moments
    )
    given, scales = described(x[0], *layers.quantised[:4], state), described(*layers.quantised[4:])
    last = described(memory)[0] if want_moments else None
    assert calls == [(*given, last, *scales, 5, D, 64, 0, 0)]
    assert (result.shape, result.data_ptr()) == ((5, D), state.data_ptr())
    assert (moments is not None) == want_moments


@pytest.mark.parametrize("source", ["table", "float32"])
def test_what_the_kernel_of_the_film_mlp_is_given(calls, source):
    arguments, modulation = film_inputs((2, 9), 64, source, seed=5)
    layers, out_norm = fold_mlp(*arguments["weights"].mlp, fp8=True), arguments["weights"][1:]
    result, moments = launch_film_mlp(arguments["x"], arguments["tokens"], modulation, layers, out_norm)
    given, scales = described(arguments["x"], *layers.quantised[:4], result), described(*layers.quantised[4:])
    read = (arguments["tokens"], modulation.gamma_beta, *modulation.pointers(), *out_norm)
    h, w = arguments["tokens"].shape[1:3]
    assert calls == [(*given, None, *scales, *described(*read), 18, D, 64, 9, h, w, source == "table", 0, 0)]
    assert moments is None


def test_rows_at_odd_addresses_are_copied(calls):
    x, weights = inputs(5, 64, seed=5)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    odd = memory[1:].view(x.shape).copy_(x)
    assert forward_fp8(odd, *weights).shape == x.shape
    assert calls[0][0][0] % 16 == 0


def test_the_walk_quantises_once(monkeypatch):
    """Weights of MLPs, as the walk is made."""
    network = random_network(
        ViTUpConfig(D, 6, (0, 1, 2)), torch.Generator().manual_seed(0), dtype=torch.bfloat16
    )
    settings = Settings("cuda_fp8", "cuda_fp8", 6, torch.bfloat16, torch.device("cpu"), in_place=True)
    walk = choose_walk(settings)(collect(network), settings)
    assert not walk._film_beside(1)  # by kernels in 16 bits
    for block, weights in zip(walk.constants.blocks, walk.weights.blocks, strict=True):
        own_mlps = (weights.transition, weights.film.mlp, weights.mlp)
        for folded, own in zip((block.transition, block.film, block.mlp), own_mlps, strict=True):
            expected = fold_mlp(*own, fp8=True).quantised
            for tensor, same in zip(folded.quantised, expected, strict=True):
                assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8))


class FakeGPUTensor:
    """What is asked of features on a GPU."""

    is_cuda = True
    device = SimpleNamespace(type="cuda", index=0)

    def __init__(self, dtype=torch.bfloat16, width=D):
        self.dtype, self.shape = dtype, (1, 8, 8, width)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A machine with an H100, as far as the choice of an implementation can tell."""
    machine = SimpleNamespace(capability=(9, 0), architectures=["80", "90a"])
    monkeypatch.setattr(implementations, "interpreted", lambda: False)
    monkeypatch.setattr(implementations, "_triton_obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(extension, "obstacle", lambda part: None)
    part = SimpleNamespace(architectures=lambda: machine.architectures)
    host = SimpleNamespace(instruction_set=lambda: "baseline")
    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(cuda=part, cpu=host))
    return machine


def test_where_it_runs(fake_gpu):
    def refusal(x):
        with pytest.raises(InputError, match=r"impl: expected .* got 'cuda_fp8': ") as caught:
            implementations.resolve("cuda_fp8", x, {"the width D": x.shape[-1]})
        return str(caught.value)

    def listed():
        return next(i for i in implementations.implementations() if i.name == "cuda_fp8")

    assert implementations.resolve("cuda_fp8", FakeGPUTensor(), {"the width D": D}) == "cuda_fp8"
    assert implementations.compiled_operations("cuda_fp8", FakeGPUTensor()) == implementations.COMPILED
    assert listed().available
    assert "take bfloat16 features, not float16" in refusal(FakeGPUTensor(torch.float16))
    assert "a width of 384, not 768" in refusal(FakeGPUTensor(width=768))
    assert "not on a GPU" in refusal(torch.empty(1, 8, D, dtype=torch.bfloat16))
    fake_gpu.architectures = ["80", "100a"]
    assert "built for 90a, not only for 80, 100a" in refusal(FakeGPUTensor())
    fake_gpu.capability = (8, 0)
    assert "need compute capability 9.0 (H100, H200), and NVIDIA H100 80GB HBM3 has 8.0" in refusal(
        FakeGPUTensor()
    )
    assert not listed().available
    assert "need compute capability 9.0" in listed().reason


def test_auto_never_chooses_it(fake_gpu):
    for operation in (None, "residual_mlp"):
        assert (
            implementations.resolve("auto", FakeGPUTensor(), {"the width D": D}, operation=operation)
            != "cuda_fp8"
        )


def test_the_interpreter_does_not_run_it():
    x, weights = inputs(5, 64, seed=5)
    with pytest.raises(InputError, match="got 'cuda_fp8': Triton's interpreter has no 8-bit products"):
        residual_mlp(x, weights, impl="cuda_fp8")


def test_it_has_no_gradients(fake_gpu, monkeypatch, calls):
    monkeypatch.setattr(implementations, "_cuda_fp8_obstacle_for", lambda *_: None)
    x, weights = inputs(5, 64, seed=5)
    output = residual_mlp(x.requires_grad_(), weights, impl="cuda_fp8")
    with pytest.raises(InputError, match="impl: expected an implementation with gradients, got 'cuda_fp8'"):
        output.sum().backward()


@needs_a_gpu
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (255, 768), (4096, 1536), (100_003, 768)])
def test_on_a_gpu(rows, hidden):
    x, weights = to_gpu(dict(enumerate(inputs(rows, hidden, seed=rows)))).values()
    exact = residual_mlp(**cast({"x": x, "weights": weights}, torch.float64), impl="reference")[0]
    results, moments = guarded(rows)
    compiled.residual_mlp(x[0], fold_mlp(*weights, fp8=True).one_kernel, results[:rows], moments[:rows])
    assert_near(results[:rows], exact, x[0], ERROR, "float64")
    assert results[rows:].isnan().all()
    assert moments[rows:].isnan().all()
    torch.testing.assert_close(moments[:rows, 0, 0].double(), exact.mean(1), rtol=0, atol=3e-2)


@needs_a_gpu
@pytest.mark.parametrize(
    ("shape", "hidden", "source"),
    [((1, 1), 64, "table"), ((3, 85), 768, "float32"), ((2, 50_001), 1536, "float64")],
)
def test_film_on_a_gpu(shape, hidden, source):
    rows = shape[0] * shape[1]
    arguments, modulation = to_gpu(dict(enumerate(film_inputs(shape, hidden, source, seed=rows)))).values()
    weights, x = arguments["weights"], arguments["x"]
    exact = film_mlp(**cast(arguments, torch.float64), impl="reference").flatten(0, 1)
    eager = film_mlp(**arguments, impl="reference").flatten(0, 1)
    results, moments = guarded(rows)
    layers = fold_mlp(*weights.mlp, fp8=True)
    buffers = FilmBuffers(out=results[:rows], out_moments=moments)
    launch_film_mlp(x, arguments["tokens"], modulation, layers, weights[1:], buffers, want_moments=True)
    assert_near(results[:rows], exact, x.flatten(0, 1), ERROR, "float64", eager)
    assert results[rows:].isnan().all()
    assert moments[rows:].isnan().all()
