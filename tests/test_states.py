"""The operations in whatever state PyTorch is in: global defaults, modes, transforms, tracers, threads."""

from __future__ import annotations

import contextlib
import functools
import threading

import pytest
import torch
from conftest import FAST_IMPLS, default_dtype
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vitup_fast.errors import InputError
from vitup_fast.ops import norm_linear_argmax
from vitup_fast.ops.checks import are_plain
from vitup_fast.testing import (
    OPERATIONS,
    Sizes,
    differentiable_tensors,
    poisoned_allocations,
    tensors_of,
    with_tensors,
)

SIZES = Sizes(B=2, N=7, D=32, token_grid=(4, 4), patch_grid=(4, 5))
# GPU kernels run slowly in the interpreter, and their memory and operators are made as those of the others are.
IMPLS = tuple(name for name in FAST_IMPLS if name not in ("triton", "cuda"))
DTYPES = (torch.float32, torch.bfloat16)


def inputs(name, dtype=torch.float32, **sizes):
    return OPERATIONS[name].inputs(SIZES._replace(**sizes), torch.Generator().manual_seed(0), dtype=dtype)


def gradients(name, arguments, impl):
    """Output and the gradients of all that it depends on."""
    leaves = {n: t.detach().requires_grad_() for n, t in differentiable_tensors(arguments).items()}
    output = OPERATIONS[name].function(**with_tensors(arguments, leaves), impl=impl)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device="cpu").view(output.shape)
    found = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    return {"output": output.detach(), **{n: g for n, g in zip(leaves, found, strict=True) if g is not None}}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


def feature_and_function(name, impl, argument=None):
    """One tensor of an operation's arguments, and the operation as a function of it."""
    arguments = inputs(name)
    argument = argument or ("grid" if "grid" in arguments else "x")

    def function(tensor, impl=impl):
        return OPERATIONS[name].function(**with_tensors(arguments, {argument: tensor}), impl=impl)

    return tensors_of(arguments)[argument], function


def squares(function):
    """A loss on what a function returns."""
    return lambda tensor: function(tensor).square().sum()


# Global defaults


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES = {
    "float64 default": lambda: default_dtype(torch.float64),
    "bfloat16 default": lambda: default_dtype(torch.bfloat16),
    "float16 default": lambda: default_dtype(torch.float16),
    "with device meta": lambda: torch.device("meta"),
    "meta default": lambda: default_device("meta"),
    "deterministic": poisoned_allocations,
    "anomaly": torch.autograd.detect_anomaly,
    "flop counter": lambda: FlopCounterMode(display=False),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state", STATES)
def test_global_states_change_nothing(state, dtype):
    for name in OPERATIONS:
        arguments = inputs(name, dtype)
        for impl in (*IMPLS, "reference"):
            expected = gradients(name, arguments, impl)
            with STATES[state]():
                actual = gradients(name, arguments, impl)
            assert_equal(actual, expected)


@pytest.mark.skipif("triton" not in FAST_IMPLS, reason="no Triton")
def test_interpreted_kernels_in_global_states():
    arguments = inputs("film_mlp", D=64, expansion=1, N=3)
    expected = gradients("film_mlp", arguments, "triton")
    with default_dtype(torch.bfloat16), torch.device("meta"):
        assert_equal(gradients("film_mlp", arguments, "triton"), expected)


@pytest.mark.parametrize("state", STATES)
def test_inputs_for_tests_are_the_same_in_every_state(state):
    for name in OPERATIONS:
        expected = tensors_of(inputs(name))
        with STATES[state]():
            assert_equal(tensors_of(inputs(name)), expected)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("state", [*STATES, "nothing"])
def test_memory_of_a_thread_that_begins_in_any_state(mode, state):
    """Scratch memory that a thread makes in one state serves it in another."""
    results = []

    def work(name, arguments, impl):
        with STATES.get(state, contextlib.nullcontext)(), mode():
            output = OPERATIONS[name].function(**arguments, impl=impl)
        results.append((output, gradients(name, arguments, impl)))

    for name in ("residual_mlp", "rope_cross_attention", "film_mlp"):
        arguments = inputs(name)
        for impl in IMPLS:
            thread = threading.Thread(target=work, args=(name, arguments, impl))
            thread.start()
            thread.join()
            output, actual = results.pop()
            expected = gradients(name, arguments, impl)
            assert torch.equal(output, expected["output"])
            assert_equal(actual, expected)


# Transforms


@pytest.mark.parametrize("impl", [*IMPLS, "auto", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_func(name, impl):
    """Reverse mode and vmap for every implementation and every argument, in any nesting that needs one derivative."""
    arguments = inputs(name)
    for argument in differentiable_tensors(arguments):
        if argument.startswith("table.") and impl == "reference":
            continue
        tensor, function = feature_and_function(name, impl, argument)
        cotangent = torch.randn(function(tensor).shape, generator=torch.Generator().manual_seed(1))
        leaf = tensor.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf), leaf, cotangent)

        def loss(t, c, function=function):
            return (function(t) * c).sum()

        close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
        close(grad(loss)(tensor, cotangent), expected)
        close(vjp(function, tensor)[1](cotangent)[0], expected)
        examples, cotangents = torch.stack((tensor, 2 * tensor)), torch.stack((cotangent, 3 * cotangent))
        close(vmap(function)(examples), torch.stack([function(t) for t in examples]))
        each = torch.stack([grad(loss)(t, c) for t, c in zip(examples, cotangents, strict=True)])
        close(vmap(grad(loss))(examples, cotangents), each)
        close(grad(lambda t, c, f=function: (vmap(f)(t) * c).sum())(examples, cotangents), each)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("name", ["bilinear_sample", "rope_cross_attention", "film_mlp"])
def test_jacobian_of_coordinates(name, impl):
    coords, function = feature_and_function(name, impl, "coords")
    expected = jacrev(lambda c: function(c, "reference").sum(-1))(coords)
    torch.testing.assert_close(jacrev(lambda c: function(c).sum(-1))(coords), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
def test_functional_call(name):
    arguments = inputs(name)
    tensors = differentiable_tensors(arguments)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = torch.nn.ParameterDict(
                {n.replace(".", "/"): torch.zeros_like(t) for n, t in tensors.items()}
            )

        def forward(self, impl):
            replaced = {n.replace("/", "."): t for n, t in self.held.items()}
            return OPERATIONS[name].function(**with_tensors(arguments, replaced), impl=impl).square().sum()

    module, values = Module(), {f"held.{n.replace('.', '/')}": t for n, t in tensors.items()}
    for impl in IMPLS:
        found = grad(lambda v, impl=impl: functional_call(module, v, (impl,)))(values)
        leaves = {n: t.clone().requires_grad_() for n, t in values.items()}
        expected = torch.autograd.grad(functional_call(module, leaves, (impl,)), list(leaves.values()))
        for value, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value, other)


def pushed_forward(function, tensor, tangent):
    """Tangent of the output by forward-mode differentiation."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(tensor, tangent))).tangent


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_is_right_or_refused(name):
    arguments = inputs(name)
    wide = {n: t.double() for n, t in tensors_of(arguments).items() if t.is_floating_point()}
    for argument, tensor in differentiable_tensors(arguments).items():
        if argument.startswith("table."):
            continue
        tangent = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))

        def function(t, impl, argument=argument):
            return OPERATIONS[name].function(**with_tensors(arguments, {argument: t}), impl=impl)

        def moved(step, argument=argument, tensor=tensor, tangent=tangent):
            replaced = with_tensors(arguments, {**wide, argument: tensor.double() + step * tangent})
            return OPERATIONS[name].function(**replaced, impl="reference")

        expected = (moved(1e-7) - moved(-1e-7)) / 2e-7
        for impl in ("auto", "reference"):
            chosen = functools.partial(function, impl=impl)
            for found in (pushed_forward(chosen, tensor, tangent), jvp(chosen, (tensor,), (tangent,))[1]):
                torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
                assert found.any()
        for impl in IMPLS:
            chosen = functools.partial(function, impl=impl)
            with pytest.raises(
                InputError, match=f"impl: expected 'auto' or .* forward-mode .*, got '{impl}'"
            ):
                pushed_forward(chosen, tensor, tangent)
            with pytest.raises(InputError, match="forward-mode"):
                jacfwd(chosen)(tensor)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_level_of_forward_mode_without_tangents_changes_nothing(impl):
    tensor, function = feature_and_function("film_mlp", impl)
    with forward_ad.dual_level():
        assert torch.equal(function(tensor), function(tensor))


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_by_transforms(name):
    arguments = inputs(name, B=1, N=1, D=16, heads=1, token_grid=(2, 2), patch_grid=(1, 2))
    argument = "grid" if "grid" in arguments else "x"

    def loss(t, impl):
        replaced = {**with_tensors(arguments, {argument: t})}
        return OPERATIONS[name].function(**replaced, impl=impl).pow(3).sum()

    tensor = arguments[argument]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(functools.partial(loss, impl="reference"), tensor)
    assert expected.any()
    for transform in (hessian, lambda f: jacrev(jacrev(f))):
        second = transform(functools.partial(loss, impl="auto"))(tensor)
        torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-3)
    for impl in IMPLS:
        with pytest.raises(NotImplementedError, match=r"no second derivative; .* impl='reference'"):
            jacrev(jacrev(functools.partial(loss, impl=impl)))(tensor)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_batched_gradients_say_what_to_use(name, impl):
    tensor, function = feature_and_function(name, impl)
    leaf = tensor.clone().requires_grad_()
    output = function(leaf)
    with pytest.raises(NotImplementedError, match=r"one gradient at a time; .* torch.func.jacrev"):
        torch.autograd.grad(output, leaf, torch.ones(3, *output.shape), is_grads_batched=True)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_labels_under_transforms(impl):
    arguments = inputs("norm_linear")
    expected = norm_linear_argmax(**arguments, impl=impl)
    x = torch.stack((arguments["x"], arguments["x"].flip(1)))
    labels = vmap(lambda t: norm_linear_argmax(**{**arguments, "x": t}, impl=impl))(x)
    assert torch.equal(labels, torch.stack((expected, expected.flip(1))))


# Tracers and compilers


def test_jit_trace():
    for name in OPERATIONS:
        for impl in (*IMPLS, "reference"):
            tensor, function = feature_and_function(name, impl)
            traced = torch.jit.trace(lambda t, f=function: f(t), (tensor,), check_trace=False)
            leaf = (2 * tensor).requires_grad_()
            torch.testing.assert_close(traced(leaf), function(leaf))
            expected = torch.autograd.grad(function(leaf).sum(), leaf)
            torch.testing.assert_close(torch.autograd.grad(traced(leaf).sum(), leaf), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_fake_tensors(name):
    arguments = inputs(name)
    for impl in (*IMPLS, "reference"):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = {n: mode.from_tensor(t) for n, t in tensors_of(arguments).items()}
        some = dict(list(fakes.items())[::2])
        for tensors in (fakes, some):
            with mode:
                fake = gradients(name, with_tensors(arguments, tensors), impl)
            real = gradients(name, arguments, impl)
            assert {n: (t.shape, t.dtype) for n, t in fake.items()} == {
                n: (t.shape, t.dtype) for n, t in real.items()
            }
            assert type(fake["output"]) is not torch.Tensor


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_graphs(name, mode):
    for impl in IMPLS:
        tensor, function = feature_and_function(name, impl)
        gradient = grad(squares(function))
        graph = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(tensor)
        torch.testing.assert_close(graph(2 * tensor), gradient(2 * tensor))


@pytest.mark.parametrize("name", OPERATIONS)
def test_export_before_and_after_a_call(name):
    tensor, function = feature_and_function(name, "auto")

    class Module(torch.nn.Module):
        def forward(self, t):
            return function(t)

    for strict in (False, name == "film_mlp"):
        exported = torch.export.export(Module(), (tensor,), strict=strict).module()
        torch.testing.assert_close(exported(2 * tensor), function(2 * tensor))


@pytest.mark.parametrize("impl", IMPLS)
def test_kernels_where_a_graph_breaks(impl):
    """What runs beside a broken graph is offered to the compiler frame by frame; kernels are not for it."""
    tensor, function = feature_and_function("residual_mlp", impl)

    def broken(t):
        torch._dynamo.graph_break()
        return vmap(function)(t)

    torch._dynamo.reset()
    examples = torch.stack((tensor, 2 * tensor))
    expected = torch.stack([function(t) for t in examples])
    seen = set()

    def backend(graph, _):
        seen.update(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    torch.testing.assert_close(torch.compile(broken, backend=backend)(examples), expected)
    assert not any("/kernels/" in trace for trace in seen)


def test_transforms_inside_compile():
    torch._dynamo.reset()
    tensor, function = feature_and_function("film_mlp", "auto")
    compiled = torch.compile(grad(squares(function)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensor), grad(squares(function))(tensor))


# Tensors of other kinds


class Subclass(torch.Tensor):
    """A user's tensor that only has a type."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_subclasses(name):
    for impl in IMPLS:
        tensor, function = feature_and_function(name, impl)
        assert torch.equal(function(tensor.as_subclass(Subclass)).as_subclass(torch.Tensor), function(tensor))
        assert torch.equal(function(torch.nn.Parameter(tensor)), function(tensor))
        logged = function(LoggingTensor(tensor))
        assert type(logged) is LoggingTensor
        assert torch.equal(logged.elem, function(tensor))


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_layouts_are_refused(name):
    tensor, function = feature_and_function(name, "auto")
    for other in (tensor.to_sparse(), tensor.flatten(0, -2).to_sparse_csr()):
        with pytest.raises(InputError, match=r"(grid|x): expected .*, got "):
            function(other)
    with pytest.raises(InputError, match=r"expected device .* like the features|on meta"):
        function(tensor.to("meta"), IMPLS[-1])


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_shapes_on_the_meta_device(impl):
    for name in OPERATIONS:
        arguments = inputs(name)
        output = OPERATIONS[name].function(**arguments, impl=impl)
        arguments = with_tensors(arguments, {n: t.to("meta") for n, t in tensors_of(arguments).items()})
        on_meta = OPERATIONS[name].function(**arguments, impl=impl)
        assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == ("meta", output.shape, output.dtype)


def test_checkpointing():
    for name in OPERATIONS:
        for impl in IMPLS:
            tensor, function = feature_and_function(name, impl)
            leaf = tensor.clone().requires_grad_()
            expected = torch.autograd.grad(function(leaf).sum(), leaf)
            for reentrant in (False, True):
                output = checkpoint(function, leaf, use_reentrant=reentrant)
                leaf.grad = None
                output.sum().backward()
                assert torch.equal(leaf.grad, expected[0])


def test_plain_tensors():
    x = torch.ones(3, 4)
    assert are_plain(x, None, x.t(), x[:, ::2], torch.nn.Parameter(x), torch.nn.Buffer(x), torch.ones(0))
    with torch.inference_mode():
        assert are_plain(torch.ones(3))
    with torch.device("meta"):
        assert are_plain(x)
    freed = torch.ones(8)
    freed.untyped_storage().resize_(0)
    pairs = torch.ones(3, dtype=torch.complex64)
    for other in (
        x.to("meta"),
        x.to_sparse(),
        x.to_mkldnn(),
        x.as_subclass(Subclass),
        LoggingTensor(x),
        FakeTensorMode().from_tensor(x),
        pairs.conj(),
        pairs.conj().imag,
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        freed,
    ):
        assert not are_plain(x, other)


def test_nothing_is_plain_while_pytorch_watches():
    x, answers = torch.ones(3), []

    def ask(t):
        answers.append(are_plain(t) or are_plain(x))
        return t * 2

    for transform in (torch.func.functionalize, vmap, lambda f: grad(lambda t: f(t).sum())):
        transform(ask)(x)
    vjp(ask, x)
    jvp(ask, (x,), (x,))
    make_fx(ask)(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        ask(x)
    with FlopCounterMode(display=False):
        ask(x)
    with forward_ad.dual_level():
        answers.append(are_plain(forward_ad.make_dual(x, x)))
    assert len(answers) == 10
    assert not any(answers)
    compiled = torch.compile(lambda t: t * 2 if are_plain(t) else t * 3, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), 3 * x)
