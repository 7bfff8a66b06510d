"""What the five operations have in common, written once: every test runs for each of them."""

from __future__ import annotations

import pytest
import torch
from conftest import FAST_IMPLS, FLOAT64_IMPLS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitup_fast.errors import InputError
from vitup_fast.ops import implementations
from vitup_fast.ops.operator import Operator
from vitup_fast.testing import (
    OPERATIONS,
    Sizes,
    assert_within_budget,
    cast,
    differentiable_tensors,
    poisoned_allocations,
    tensors_of,
    with_tensors,
)

SMALL = Sizes(B=2, N=5, D=8, token_grid=(3, 4), patch_grid=(4, 5))
# GPU kernels take widths that are multiples of 64, and heads from 32 channels; CPU kernels multiples of 16.
SMALL_GPU = SMALL._replace(D=64, expansion=1)
SMALL_CPU = SMALL._replace(D=32)
# Powers of two, so that a table and the coordinates it stands for agree in float32.
LARGE = Sizes(B=2, N=500, D=64, token_grid=(4, 8), patch_grid=(6, 5))
LOW = (torch.float32, torch.bfloat16, torch.float16)
GPU_IMPLS = ("triton", "cuda")
WITH_COORDS = ("bilinear_sample", "rope_cross_attention", "film_mlp")


def is_available(impl):
    return any(i.available for i in implementations() if i.name == impl)


def small(impl, **changes):
    sizes = SMALL_GPU if impl in GPU_IMPLS else SMALL_CPU if impl in ("cpu", "cpu_int8") else SMALL
    return sizes._replace(**changes)


def run(operation, arguments, impl="torch", cotangent=None):
    """Output and the gradients of the tensors that it depends on."""
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable_tensors(arguments).items()}
    output = operation.function(**with_tensors(arguments, leaves), impl=impl)
    cotangent = torch.ones_like(output) if cotangent is None else cotangent.to(output.dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    return output.detach(), {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


def gradcheck(operation, arguments, impl):
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable_tensors(arguments).items()}
    if impl == "reference":
        leaves = {name: t for name, t in leaves.items() if not name.startswith("table.")}

    def function(*tensors):
        replaced = with_tensors(arguments, dict(zip(leaves, tensors, strict=True)))
        return operation.function(**replaced, impl=impl)

    # Kernels run slowly in the interpreter: one random direction per tensor instead of every element.
    return torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=impl in GPU_IMPLS)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_output_is_as_exact_as_eager(operation, generator, fast, dtype):
    arguments = operation.inputs(LARGE, generator, dtype=dtype)
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    eager = operation.function(**arguments, impl="reference")
    assert eager.dtype == dtype
    with poisoned_allocations():
        actual = operation.function(**arguments, impl=fast)
    assert_within_budget(actual, eager, exact, factor=1.5)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_output_at_real_width_is_as_exact_as_eager(operation, generator, fast, dtype):
    sizes = Sizes(B=1, N=256, D=384, heads=6, token_grid=(32, 32), patch_grid=(32, 32), expansion=4)
    arguments = operation.inputs(sizes, generator, dtype=dtype)
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    eager = operation.function(**arguments, impl="reference")
    assert_within_budget(operation.function(**arguments, impl=fast), eager, exact, factor=1.5)


@pytest.mark.parametrize("impl", FLOAT64_IMPLS)
def test_equals_reference_in_float64(operation, generator, impl):
    arguments = operation.inputs(LARGE, generator, dtype=torch.float64)
    outputs, gradients = zip(*(run(operation, arguments, name) for name in (impl, "reference")), strict=True)
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    for name, exact in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_are_as_exact_as_eager(operation, generator, fast, dtype):
    arguments = operation.inputs(LARGE, generator, dtype=dtype)
    shape = operation.function(**arguments).shape
    cotangent = torch.randn(shape, generator=generator).to(dtype)
    _, exact = run(operation, cast(arguments, torch.float64), "reference", cotangent)
    _, eager = run(operation, arguments, "reference", cotangent)
    with poisoned_allocations():
        _, actual = run(operation, arguments, fast, cotangent)
    assert set(actual) == set(differentiable_tensors(arguments))
    for name in eager:
        assert_within_budget(actual[name], eager[name], exact[name], factor=1.5, name=f"gradient of {name}")


@pytest.mark.parametrize("impl", [*FLOAT64_IMPLS, "reference"])
def test_gradcheck(operation, generator, impl):
    assert gradcheck(operation, operation.inputs(small(impl), generator, dtype=torch.float64), impl)


@pytest.mark.parametrize("N", [5, 0])
def test_opcheck(operation, generator, monkeypatch, fast, N):
    calls = []

    def recorded(operator):
        return lambda *args: calls.append((operator, args)) or operator(*args)

    def record(self, *args, impl):
        monkeypatch.setattr(self, "forward", recorded(self.forward))
        monkeypatch.setattr(self, "backward", recorded(self.backward))
        return call(self, *args, impl=impl)

    call = Operator.__call__
    monkeypatch.setattr(Operator, "__call__", record)
    run(operation, operation.inputs(small(fast, N=N), generator), fast)
    assert len(calls) == 2
    for operator, args in calls:
        opcheck(operator, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
    opcheck(*calls[0])  # with arguments that require gradients


def test_compiles_once_for_all_sizes(operation, generator, fast):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(tensors, arguments):
        return operation.function(**with_tensors(arguments, tensors), impl=fast)

    for N in (5, 9, 14, 23):
        arguments = operation.inputs(small(fast, N=N), generator)
        leaves = {name: t.detach().requires_grad_() for name, t in differentiable_tensors(arguments).items()}
        output = compiled(leaves, arguments)
        grads = torch.autograd.grad(output.sum(), list(leaves.values()))
        expected, expected_grads = run(operation, arguments, fast)
        torch.testing.assert_close(output.detach(), expected)
        for name, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(grad, expected_grads[name])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
def test_autocast_equals_casting_features_and_weights(operation, generator, impl):
    arguments = operation.inputs(LARGE, generator)
    leaves = {name: t.requires_grad_() for name, t in differentiable_tensors(arguments).items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = operation.function(**with_tensors(arguments, leaves), impl=impl)
        if impl != "cpu":
            float64 = operation.function(**cast(arguments, torch.float64), impl=impl)
            assert float64.dtype == torch.float64
    expected = operation.function(**cast(arguments, torch.bfloat16), impl=impl)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    grads = torch.autograd.grad(actual.sum(), list(leaves.values()), allow_unused=impl == "reference")
    assert all(g.dtype == torch.float32 for g in grads if g is not None)


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
@pytest.mark.parametrize("name", WITH_COORDS)
def test_coordinates_keep_float32_under_autocast(generator, impl, name):
    operation = OPERATIONS[name]
    arguments = operation.inputs(LARGE._replace(token_grid=(28, 28), patch_grid=(64, 64)), generator)
    coords = arguments["coords"].clamp(0.5, 0.99)
    moved = coords * (1 + 2**-10)
    assert torch.equal(moved.bfloat16(), (moved.bfloat16() + 2**-12).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [operation.function(**{**arguments, "coords": c}, impl=impl) for c in (coords, moved)]
    assert (outputs[0] != outputs[1]).any(dim=-1).float().mean() > 0.9


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
def test_second_derivative_works_or_says_so(operation, generator, impl):
    dtype = torch.float32 if impl == "cpu" else torch.float64
    arguments = operation.inputs(small(impl), generator, dtype=dtype)
    name = "grid" if "grid" in arguments else "x"
    leaf = arguments[name].requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        output = operation.function(**{**arguments, name: leaf}, impl=impl)
    cotangent = torch.ones_like(output).requires_grad_()
    (grad,) = torch.autograd.grad(output, leaf, cotangent, create_graph=True)
    loss = grad.square().sum()
    if impl != "reference":
        with pytest.raises(NotImplementedError, match=r"second derivative; .* impl='reference'"):
            torch.autograd.grad(loss, cotangent)
    else:
        (second,) = torch.autograd.grad(loss, cotangent)
        assert second.isfinite().all()
        assert second.any()


def misaligned(tensor):
    """The same numbers at an address that is no multiple of their size."""
    memory = bytearray(tensor.nbytes + tensor.itemsize)
    start = max(1, tensor.itemsize // 2)
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return view.view(tensor.shape).copy_(tensor)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other number": lambda t: torch.stack((t, t), -1)[..., 0],
    "every other row": lambda t: torch.stack((t, t), 1)[:, 0],
    "expanded": lambda t: (t[:1] if t.dim() > 2 else t[..., :1]).expand_as(t),
    "offset": lambda t: t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t),
    "misaligned": misaligned,
}


@pytest.mark.parametrize(
    ("impl", "layout"),
    [
        (impl, layout)
        for impl in (*FAST_IMPLS, "cpu_int8")
        for layout in LAYOUTS
        if impl not in GPU_IMPLS or layout == "transposed"
    ],
)
def test_memory_layout_does_not_matter(operation, generator, impl, layout):
    """Each tensor in turn, and the gradient that comes; all at once on kernels that are interpreted, slowly."""
    if impl == "cpu_int8" and not is_available(impl):
        pytest.skip("no 8-bit products on this CPU")
    arguments = operation.inputs(small(impl), generator)
    cotangent = torch.randn(operation.function(**arguments).shape, generator=generator)

    def results(changed, cotangent):
        if impl == "cpu_int8":
            return {"output": operation.function(**with_tensors(arguments, changed), impl=impl)}
        output, grads = run(operation, with_tensors(arguments, changed), impl, cotangent=cotangent)
        return {"output": output, **grads}

    def compare(names, cotangents):
        views = {name: LAYOUTS[layout](tensors_of(arguments)[name]) for name in names}
        plain = {name: t.contiguous().clone() for name, t in views.items()}
        actual, expected = results(views, cotangents[0]), results(plain, cotangents[1])
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)

    names, view = list(tensors_of(arguments)), LAYOUTS[layout](cotangent)
    for group in [names] if impl in GPU_IMPLS else [[], *([name] for name in names)]:
        compare(group, (view, view.contiguous().clone()))


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
def test_no_queries(operation, generator, impl):
    arguments = operation.inputs(small(impl, N=0), generator)
    output, grads = run(operation, arguments, impl)
    assert output.shape[:2] == (2, 0)
    for name, grad in grads.items():
        assert grad.shape == differentiable_tensors(arguments)[name].shape
        assert not grad.any()


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
def test_images_of_a_batch_do_not_mix(operation, generator, impl):
    arguments = operation.inputs(small(impl, B=3), generator)
    whole = operation.function(**arguments, impl=impl)
    for b in range(3):
        per_image = {
            name: t[b : b + 1] for name, t in tensors_of(arguments).items() if t.dim() > 2 and len(t) == 3
        }
        alone = operation.function(**with_tensors(arguments, per_image), impl=impl)
        torch.testing.assert_close(whole[b : b + 1], alone)


@pytest.mark.parametrize("name", [*WITH_COORDS, "film_mlp_table"])
@pytest.mark.parametrize("impl", [*FLOAT64_IMPLS, "reference"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1)], ids=str)
def test_smallest_grids(generator, name, grid, impl):
    operation = OPERATIONS[name]
    arguments = operation.inputs(small(impl, token_grid=grid, patch_grid=grid), generator)
    arguments = {**cast(arguments, torch.float64), "coords": arguments["coords"].double()}
    assert gradcheck(operation, arguments, impl)


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
@pytest.mark.parametrize("name", WITH_COORDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e20, -3e38], ids=str)
def test_bad_coordinate_stays_in_its_row(generator, impl, name, bad):
    operation = OPERATIONS[name]
    arguments = operation.inputs(small(impl), generator)
    coords = arguments["coords"].clone()
    coords[1, 2, 0] = bad
    cotangent = torch.randn(operation.function(**arguments).shape, generator=generator)
    cotangent[1, 2] = 0
    others = torch.ones(2, SMALL.N, dtype=torch.bool)
    others[1, 2] = False
    expected, expected_grads = run(operation, arguments, impl, cotangent)
    actual, grads = run(operation, {**arguments, "coords": coords}, impl, cotangent)
    torch.testing.assert_close(actual[others], expected[others])
    torch.testing.assert_close(grads["coords"][others], expected_grads["coords"][others])
    # PyTorch's attention takes NaN scores for masked ones.
    if bad != bad and (name != "rope_cross_attention" or impl not in ("torch", "reference")):
        assert actual[1, 2].isnan().all()
    elif name == "bilinear_sample":
        assert actual.isfinite().all()


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "cpu_int8", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_bad_feature_stays_in_its_row(operation, generator, impl, bad):
    if impl == "cpu_int8" and not is_available(impl):
        pytest.skip("no 8-bit products on this CPU")
    arguments = operation.inputs(small(impl), generator)
    if "x" not in arguments:
        pytest.skip("a grid is not rows of queries")
    x = arguments["x"].clone()
    x[1, 2, 3] = bad
    expected = operation.function(**arguments, impl=impl)
    actual = operation.function(**{**arguments, "x": x}, impl=impl)
    others = torch.ones(2, SMALL.N, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(actual[others], expected[others])
    assert not actual[1, 2].isfinite().all()


@pytest.mark.parametrize("impl", [*FAST_IMPLS, "reference"])
def test_no_images(operation, generator, impl):
    arguments = operation.inputs(small(impl), generator)
    empty = {n: t[:0] for n, t in tensors_of(arguments).items() if t.dim() > 2}
    output, grads = run(operation, with_tensors(arguments, empty), impl)
    assert output.shape[:2] == (0, SMALL.N if "table" in arguments or "x" in arguments else output.shape[1])
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("impl", ["auto", *FAST_IMPLS, "reference"])
def test_widths_of_nothing_are_refused(operation, generator, impl):
    arguments = operation.inputs(small(impl), generator)
    tensors = tensors_of(arguments)
    name = "grid" if "grid" in arguments else "x"
    with pytest.raises(InputError, match=f"{name}: expected a width of at least 1, got"):
        operation.function(**with_tensors(arguments, {name: tensors[name][..., :0]}), impl=impl)
    for hidden in ("weights.", "weights.mlp."):
        if f"{hidden}weight1" not in tensors:
            continue
        nothing = {f"{hidden}{n}": tensors[f"{hidden}{n}"][:0] for n in ("weight1", "bias1")}
        nothing[f"{hidden}weight2"] = tensors[f"{hidden}weight2"][:, :0]
        with pytest.raises(InputError, match=f"{hidden}weight1: expected a hidden width of at least 1, got"):
            operation.function(**with_tensors(arguments, nothing), impl=impl)


def test_unknown_implementation(operation, generator):
    with pytest.raises(InputError, match=r"impl: expected .*'triton', .*'torch', 'reference'.*, got 'fast'"):
        operation.function(**operation.inputs(SMALL, generator), impl="fast")


def test_auto_is_an_implementation(operation, generator):
    arguments = operation.inputs(SMALL, generator)
    assert torch.equal(operation.function(**arguments), operation.function(**arguments, impl="torch"))


def test_every_tensor_is_checked(operation, generator):
    """A wrong rank, last size or dtype is an error that names the tensor, or one that it is held against."""
    arguments = operation.inputs(SMALL, generator)
    tensors = tensors_of(arguments)
    set_the_sizes = ("x", "grid", "tokens", "key", "weight", "weight1")
    for name, tensor in tensors.items():
        if name in ("freqs", "inv_freq") or ("table" in arguments and name.startswith("position.")):
            continue
        wrong = [tensor.unsqueeze(0), tensor.to(torch.int32)]
        wrong += [] if name == "grid" else [torch.cat((tensor, tensor[..., :1]), dim=-1)]
        wrong += [] if name in ("grid", "table.gamma_beta") else [tensor.half()]
        for bad in wrong:
            with pytest.raises(InputError, match=r": expected .*, got .*") as caught:
                operation.function(**with_tensors(arguments, {name: bad}))
            blamed = str(caught.value).split(":")[0]
            assert blamed == name or (name.split(".")[-1] in set_the_sizes and blamed in tensors)


def test_inductor_runs_the_operators(generator):
    pytest.importorskip("torch._inductor")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    arguments = {
        name: operation.inputs(SMALL, generator)
        for name, operation in OPERATIONS.items()
        if name != "norm_linear"
    }

    def chain(all_arguments):
        x = None
        for name, own in all_arguments.items():
            x = OPERATIONS[name].function(**(own if x is None else {**own, "x": x}))
        return x

    torch.testing.assert_close(torch.compile(chain, fullgraph=True)(arguments), chain(arguments))
