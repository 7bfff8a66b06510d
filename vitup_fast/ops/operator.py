"""How an operation becomes a PyTorch operator, and the table of kernels that backends fill by name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMESPACE = "vitup_fast"

Result = TypeVar("Result")


class Kernels(NamedTuple):
    """Forward and backward of one operation in one implementation.

    ``forward(*arguments) -> Tensor`` and ``backward(grad, *arguments, needs_grad) -> list[Tensor]``, which
    returns contiguous gradients of those differentiable arguments whose flag is set, in their order.

    Where recomputing costs more than memory, ``kept_bytes(*arguments)`` says how much of its work the forward pass can
    leave to the backward pass: both then take ``kept=``, bytes of that size, or None where nothing is kept.
    ``argmax(*arguments, dtype) -> Tensor`` gives labels without writing scores, where an operation has such.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., list[Tensor]]
    kept_bytes: Callable[..., int] | None = None
    argmax: Callable[..., Tensor] | None = None


# Most that a call keeps for its backward pass; a longer one recomputes.
KEPT_BYTES = 64 << 20

_KEEPS_INPUTS_ALONE: ContextVar[bool] = ContextVar("keeps_inputs_alone", default=False)


@contextlib.contextmanager
def inputs_alone() -> Iterator[None]:
    """Let operators keep nothing but their inputs for the backward pass, which recomputes the rest."""
    token = _KEEPS_INPUTS_ALONE.set(True)
    try:
        yield
    finally:
        _KEEPS_INPUTS_ALONE.reset(token)


class Backend(NamedTuple):
    """Kernels that are kept outside of :mod:`vitup_fast.ops`, under the name of an implementation.

    Attributes:
        kernels: those of each operation; what they need is imported when they run.
        faster_widths: widths at which ``"auto"`` prefers them, of an operation, a device's name and a dtype.
    """

    kernels: Mapping[str, Kernels]
    faster_widths: Callable[[str, str, torch.dtype], tuple[int, ...]] = lambda *_: ()


_BACKENDS: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Offer kernels as the implementation ``name`` of every operation."""
    _BACKENDS[name] = backend


def backend(name: str) -> Backend:
    """Return the kernels that were offered under a name."""
    return _BACKENDS[name]


class Operator:
    """A PyTorch operator ``vitup_fast::name`` with fake, autograd and one kernel pair per implementation.

    The backward pass recomputes what it needs from the operator's inputs, but for what its kernels keep.

    Args:
        name: the operator's name.
        arguments: its schema without parentheses, differentiable tensors first.
        differentiable: number of leading arguments that gradients may be asked for.
        output_shape: shape of the output from the arguments; its dtype and device are the first argument's.
        torch_kernels: kernels of the implementation ``"torch"``; those of others come from their backends.
        residual: whether the first argument is only added to the result: no backward pass reads its values, none
            is kept, and the gradient, of the same shape and dtype, takes its place.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        differentiable: int,
        output_shape: Callable[..., Sequence[int]],
        torch_kernels: Kernels,
        residual: bool = False,
    ) -> None:
        qualified = f"{NAMESPACE}::{name}"
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(qualified, f"({arguments}, bool keep, str impl) -> (Tensor, Tensor)", tags=tags)
        torch.library.define(
            f"{qualified}_backward",
            f"(Tensor grad, {arguments}, Tensor kept, bool[] needs_grad, str impl) -> Tensor[]",
            tags=tags,
        )
        self.forward = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
        self.name = name
        self.differentiable = differentiable
        self._torch_kernels = torch_kernels
        kernels = self.kernels

        def empty_kept(keep: bool, impl: str, arguments: Sequence[Any]) -> Tensor:
            size = kernels(impl).kept_bytes(*arguments) if keep else 0
            return arguments[0].new_empty(size, dtype=torch.uint8)

        @uncompiled
        def run_forward(*args: object) -> tuple[Tensor, Tensor]:
            *arguments, keep, impl = args
            kept = empty_kept(keep, impl, arguments)
            keeping = {"kept": kept} if keep else {}
            with without_autocast(arguments[0]):
                return kernels(impl).forward(*arguments, **keeping), kept

        @uncompiled
        def run_backward(grad: Tensor, *args: object) -> list[Tensor]:
            *arguments, kept, needs_grad, impl = args
            keeping = {"kept": kept if kept.numel() else None} if kernels(impl).kept_bytes else {}
            with without_autocast(grad):
                return kernels(impl).backward(grad.contiguous(), *arguments, needs_grad, **keeping)

        def fake_forward(*args: object) -> tuple[Tensor, Tensor]:
            *arguments, keep, impl = args
            return args[0].new_empty(output_shape(*arguments)), empty_kept(keep, impl, arguments)

        def fake_backward(grad: Tensor, *args: object) -> list[Tensor]:
            needs_grad = args[-2]
            return [a.new_empty(a.shape) for a, needed in zip(args, needs_grad, strict=False) if needed]

        def setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
            *arguments, _, impl = inputs
            is_tensor = [isinstance(a, Tensor) for a in arguments]
            kept = output[1]
            ctx.mark_non_differentiable(kept)
            ctx.set_materialize_grads(False)  # or what is kept gets a gradient of zeros
            tensors = [a for a, t in zip(arguments, is_tensor, strict=True) if t]
            ctx.save_for_backward(kept, *tensors[1 if residual else 0 :])
            ctx.others = [None if t else a for a, t in zip(arguments, is_tensor, strict=True)]
            ctx.is_tensor, ctx.impl = is_tensor, impl

        def differentiate(ctx: object, grad: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            if torch._C._functorch.is_legacy_batchedtensor(grad):
                raise NotImplementedError(
                    f"{qualified} takes one gradient at a time; for many (is_grads_batched, vectorize=True) use "
                    "torch.func.jacrev or torch.func.vjp."
                )
            kept, *tensors = ctx.saved_tensors
            saved = iter((grad, *tensors) if residual else tensors)
            arguments = [
                next(saved) if t else other for t, other in zip(ctx.is_tensor, ctx.others, strict=True)
            ]
            needs_grad = list(ctx.needs_input_grad[:differentiable])
            backward = transformed_backward.apply if transforms() else self.backward
            grads = iter(backward(grad, *arguments, kept, needs_grad, ctx.impl))
            needed = needs_grad + [False] * (len(arguments) + 2 - differentiable)
            return tuple(next(grads) if n else None for n in needed)

        def differentiate_twice(ctx: object, *grads: Tensor) -> None:
            raise NotImplementedError(
                f"{qualified} has no second derivative; for double backward use impl='reference' under "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
            )

        torch.library.impl(qualified, "default", run_forward)
        torch.library.impl(f"{qualified}_backward", "default", run_backward)
        torch.library.register_fake(qualified, fake_forward)
        torch.library.register_fake(f"{qualified}_backward", fake_backward)
        torch.library.register_autograd(qualified, differentiate, setup_context=setup_context)
        torch.library.register_autograd(f"{qualified}_backward", differentiate_twice)
        torch.library.register_vmap(qualified, _one_by_one(self.forward))
        torch.library.register_vmap(f"{qualified}_backward", _one_by_one(self.backward))
        # The functions that register_autograd makes are not for torch.func.
        self.transformed = _function(lambda *args: self.forward(*args), setup_context, differentiate)
        transformed_backward = _function(
            lambda *args: tuple(self.backward(*args)), lambda *_: None, differentiate_twice
        )

    def kernels(self, impl: str) -> Kernels:
        """Return the kernels of an implementation."""
        return self._torch_kernels if impl == "torch" else _BACKENDS[impl].kernels[self.name]

    def __call__(self, *arguments: object, impl: str) -> Tensor:
        """Run the operator; arguments have been checked."""
        if not set(transforms()) <= {"Functionalize"}:
            return self.transformed.apply(*arguments, False, impl)[0]
        kept_bytes = self.kernels(impl).kept_bytes
        keep = (
            kept_bytes is not None
            and torch.is_grad_enabled()
            and (torch.compiler.is_compiling() or not _KEEPS_INPUTS_ALONE.get())
            and any(isinstance(a, Tensor) and a.requires_grad for a in arguments[: self.differentiable])
            and kept_bytes(*arguments) <= KEPT_BYTES
        )
        return self.forward(*arguments, keep, impl)[0]


def uncompiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keep ``torch.compile`` out of a function and of all that it calls, which deal in addresses.

    Where a graph breaks, the compiler tries every Python function that runs, those of kernels too. Without a compiler
    none is loaded.
    """
    disabled = None

    def run(*arguments: object) -> Result:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*arguments)
            disabled = torch.compiler.disable(function)
        return disabled(*arguments)

    return run


def transforms() -> tuple[str, ...]:
    """Transforms of ``torch.func`` that are at work, the outermost first: Grad, Vmap, Jvp, Functionalize."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return tuple(level.key().name for level in levels)


# To the compiler, which knows them as well, they are a constant of the code that it traces.
transforms._dynamo_marked_constant = True


def _function(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An autograd function that ``torch.func`` takes."""
    functions = {"forward": forward, "setup_context": setup_context, "backward": backward}
    members = {name: staticmethod(function) for name, function in functions.items()}
    return type("TransformedOperator", (torch.autograd.Function,), {**members, "generate_vmap_rule": True})


def _one_by_one(operator: Callable[..., Sequence[Tensor]]) -> Callable[..., tuple]:
    """Rule for ``torch.vmap``: run an operator for one example after the other."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def example(i: int) -> list[Any]:
            return [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]

        outputs = [operator(*example(i)) for i in range(info.batch_size)]
        stacked = [torch.stack(parts) for parts in zip(*outputs, strict=True)]
        return stacked, [0] * len(stacked)

    return rule


def run_reference(definition: Callable[..., Tensor], x: Tensor, *arguments: object) -> Tensor:
    """Run a definition; its arguments have been cast, and autocast shall not cast within."""
    with without_autocast(x):
        if forward_ad._current_level < 0 and not transforms():
            return definition(x, *arguments)
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other attentions have no such derivatives
            return definition(x, *arguments)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``, if it has such."""
    kind = x.device.type
    return (
        torch.autocast(kind, enabled=False)
        if torch.amp.is_autocast_available(kind)
        else contextlib.nullcontext()
    )


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast features and weights to the autocast dtype if autocast is on; coordinates never go through here."""
    kind = x.device.type
    if (
        not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
        or x.dtype == torch.float64
    ):
        return [x, *tensors]
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None else t.to(dtype) for t in (x, *tensors)]
