"""The Hopper kernel of the residual MLP in 8-bit floating point without a GPU, and what surrounds it."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_IMPLS
from fp8_reference import columns_of_operand, quantised, residual_mlp_fp8

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton, whose module folds the weights, cannot be used here", allow_module_level=True)

from test_hopper_mlp import GUARD, D, inputs
from vitup_fast.kernels import cuda as compiled
from vitup_fast.kernels.triton.residual_mlp import fold_mlp, forward_fp8
from vitup_fast.kernels.triton.residual_mlp import residual_mlp as launch_residual_mlp

from vitup_fast import InputError, ViTUpConfig, extension
from vitup_fast.network.weights import collect
from vitup_fast.ops import residual_mlp
from vitup_fast.testing import cast, random_network, relative_error
from vitup_fast.walks import Settings, choose_walk

implementations = importlib.import_module("vitup_fast.ops.implementations")

# Relative to what the MLP adds, measured: each of the four roundings to e4m3 costs 0.026, together 0.051, and the sums
# of 13 bits 0.005 against exact ones.
ERROR, SUMS = 0.056, 0.008


def emulate(emulator, x, weights, *, clusters=1, seed=0, in_place=False, fault="none"):
    """Results and moments of the kernel for rows ``[N, D]``, and what it did to memory beyond them."""
    mlp = fold_mlp(*weights, fp8=True).quantised
    rows, hidden = x.shape[0], mlp.weight1.shape[0]
    written, error = emulator(
        "residual_mlp_fp8", (x, *mlp), (rows, hidden, int(in_place)), clusters, seed, fault
    )
    if error is not None:
        return SimpleNamespace(error=error)
    split = (rows + GUARD) * D * 2
    results = written[:split].view(torch.bfloat16).view(-1, D)
    moments = written[split:].view(torch.float32).view(-1, 2)
    beyond = (results[rows:].isnan() & moments[rows:, :1].isnan()).all()
    return SimpleNamespace(error=None, results=results[:rows], moments=moments[:rows], untouched=beyond)


def assert_near(results, truth, x, share, name):
    """Errors are at most rounding to bfloat16 together with a share of what was added to the rows."""
    added, rounding = (truth - x.double()).norm(), (truth.bfloat16().double() - truth).norm()
    error, allowed = (results.double() - truth).norm(), (rounding**2 + (share * added) ** 2) ** 0.5
    assert error <= allowed, f"{name}: error {error:.4g}, allowed {allowed:.4g}"


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


def test_schedules(emulator):
    """Whatever comes first, the results are the same."""
    x, weights = inputs(257, 64, seed=1)
    runs = [emulate(emulator, x[0], weights, seed=seed) for seed in range(4)]
    assert [r.error for r in runs] == [None] * len(runs)
    assert all(torch.equal(r.results, runs[0].results) for r in runs)
    assert all(torch.equal(r.moments, runs[0].moments) for r in runs)


@pytest.mark.parametrize("fault", ["count", "warps", "bytes", "wait", "fence", "exit", "sync"])
def test_mistakes_show(emulator, fault):
    x, weights = inputs(600, 128, seed=1)
    runs = [emulate(emulator, x[0], weights, seed=seed, fault=fault) for seed in range(2)]
    assert all(r.error is not None and r.error.startswith("emulator: ") for r in runs)


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


def test_registers(ptxas_output):
    output = ptxas_output("residual_mlp_fp8.cu")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in output
    # What 384 threads may have at the start; consumers then take what producers give.
    assert re.search(r"Used 168 registers", output)


def test_products_are_not_serialised(ptxas_output):
    assert not re.findall(r"C75\d\d", ptxas_output("residual_mlp_fp8.cu"))


@pytest.mark.skipif(extension.obstacle("cuda") is not None, reason="the CUDA kernels are not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dim": 768}, "expected rows of 384 numbers"),
        ({"hidden": 40}, "expected a hidden width that is a positive multiple of 32"),
        ({"hidden": 1 << 27}, "and at most 2\\^26"),
        ({"rows": -1}, "expected no negative number of rows"),
        ({"x": 520}, "expected x aligned to 16 bytes"),
        ({"kind": "bfloat16"}, "weight1: expected float8_e4m3fn, got bfloat16"),
    ],
)
def test_refusals(changed, message):
    """Errors name the kernel, and come before anything is asked of a GPU."""
    call = {"x": 512, "kind": "float8_e4m3fn", "rows": 5, "dim": D, "hidden": 768, **changed}
    library = extension.load().cuda
    kinds = ("bfloat16", call["kind"], "float8_e4m3fn", *["float32"] * 5, "bfloat16")
    tensors = [(512, library.types.index(kind)) for kind in kinds]
    tensors[0] = (call["x"], tensors[0][1])
    with pytest.raises(ValueError, match=rf"residual_mlp_fp8_sm90_kernel.*{message}"):
        library.residual_mlp_fp8_sm90(*tensors, None, call["rows"], call["dim"], call["hidden"], 0, 0)


@pytest.fixture
def calls(monkeypatch):
    """What the kernel is called with."""
    found = []

    class Host:
        types = ("float32", "bfloat16", "float8_e4m3fn")
        residual_mlp_fp8_sm90 = staticmethod(lambda *args: found.append(args))

    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(host=Host))
    return found


def described(*tensors):
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    return [(t.data_ptr(), kinds.index(t.dtype)) for t in tensors]


@pytest.mark.parametrize("want_moments", [False, True])
def test_what_the_kernel_is_given(calls, want_moments):
    x, weights = inputs(5, 64, seed=5)
    layers = fold_mlp(*weights, fp8=True)
    state, memory = torch.empty(9, D, dtype=torch.bfloat16), torch.empty(99)
    result, moments = launch_residual_mlp(
        x[0], None, layers, out=state, out_moments=memory, want_moments=want_moments
    )
    given = described(x[0], *layers.quantised, state)
    last = described(memory)[0] if want_moments else None
    assert calls == [(*given, last, 5, D, 64, 0, 0)]
    assert (result.shape, result.data_ptr()) == ((5, D), state.data_ptr())
    assert (moments is not None) == want_moments


def test_rows_at_odd_addresses_are_copied(calls):
    x, weights = inputs(5, 64, seed=5)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    odd = memory[1:].view(x.shape).copy_(x)
    assert forward_fp8(odd, *weights).shape == x.shape
    assert calls[0][0][0] % 16 == 0


def test_the_walk_quantises_once(monkeypatch):
    """Weights of residual MLPs alone, as the walk is made; the FiLM MLP stays as it is."""
    network = random_network(
        ViTUpConfig(D, 6, (0, 1, 2)), torch.Generator().manual_seed(0), dtype=torch.bfloat16
    )
    settings = Settings("cuda_fp8", "cuda_fp8", 6, torch.bfloat16, torch.device("cpu"), in_place=True)
    walk = choose_walk(settings)(collect(network), settings)
    for block, weights in zip(walk.constants.blocks, walk.weights.blocks, strict=True):
        assert block.film.quantised is None
        for folded, own in ((block.transition, weights.transition), (block.mlp, weights.mlp)):
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
    exact = residual_mlp(**cast({"x": x, "weights": weights}, torch.float64), impl="reference")[0]
    results = torch.full((rows + GUARD, D), torch.nan, dtype=x.dtype, device="cuda")
    moments = torch.full((rows + GUARD, 1, 2), torch.nan, device="cuda")
    mlp = fold_mlp(*weights, fp8=True).quantised
    compiled.residual_mlp_fp8(x[0], mlp, results[:rows], moments[:rows])
    assert_near(results[:rows], exact, x[0], ERROR, "float64")
    assert results[rows:].isnan().all()
    assert moments[rows:].isnan().all()
    torch.testing.assert_close(moments[:rows, 0, 0].double(), exact.mean(1), rtol=0, atol=3e-2)
