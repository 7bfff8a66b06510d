"""Which implementation of an operation runs, and how an operation becomes a PyTorch operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import expected

NAMESPACE = "vitup_fast"


class Implementation(NamedTuple):
    """One way to run the five operations, and whether it can run here.

    Attributes:
        name: what to pass as ``impl``.
        available: whether it runs on this machine.
        reason: why, in one sentence.
    """

    name: str
    available: bool
    reason: str


def implementations() -> list[Implementation]:
    """List every implementation with whether and why it is available, the preferred one first."""
    onednn = "with" if torch.backends.mkldnn.is_available() else "without"
    return [
        Implementation("torch", True, f"tuned PyTorch calls, any device ({onednn} oneDNN on the CPU)"),
        Implementation("reference", True, "the definition: plain PyTorch, any dtype up to float64"),
    ]


def resolve(impl: str) -> str:
    """Return the name of the implementation that runs for ``impl``; ``"auto"`` picks the preferred one.

    Raises:
        InputError: the name is unknown.
    """
    if impl == "auto":
        return "torch"
    if impl not in ("torch", "reference"):
        raise expected("impl", "'auto' or one of ['torch', 'reference']", repr(impl))
    return impl


class Kernels(NamedTuple):
    """Forward and backward of one operation in one implementation.

    ``forward(*arguments) -> Tensor`` and ``backward(grad, *arguments, needs_grad) -> list[Tensor]``, which
    returns contiguous gradients of those differentiable arguments whose flag is set, in their order.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., list[Tensor]]


class Operator:
    """A PyTorch operator ``vitup_fast::name`` with fake, autograd and one kernel pair per implementation.

    The backward pass recomputes what it needs from the operator's inputs; nothing else is saved.

    Args:
        name: the operator's name.
        arguments: its schema without parentheses, differentiable tensors first.
        differentiable: number of leading arguments that gradients may be asked for.
        output_shape: shape of the output from the arguments; its dtype and device are the first argument's.
        kernels: kernels per implementation.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        differentiable: int,
        output_shape: Callable[..., Sequence[int]],
        kernels: dict[str, Kernels],
    ) -> None:
        qualified = f"{NAMESPACE}::{name}"
        tags = (torch.Tag.pt2_compliant_tag,)
        torch.library.define(qualified, f"({arguments}, str impl) -> Tensor", tags=tags)
        torch.library.define(
            f"{qualified}_backward",
            f"(Tensor grad, {arguments}, bool[] needs_grad, str impl) -> Tensor[]",
            tags=tags,
        )
        self.forward = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
        self.kernels = kernels

        def run_forward(*args: object) -> Tensor:
            *arguments, impl = args
            with torch.autocast(arguments[0].device.type, enabled=False):
                return kernels[impl].forward(*arguments)

        def run_backward(grad: Tensor, *args: object) -> list[Tensor]:
            *arguments, needs_grad, impl = args
            with torch.autocast(grad.device.type, enabled=False):
                return kernels[impl].backward(grad.contiguous(), *arguments, needs_grad)

        def fake_forward(*args: object) -> Tensor:
            return args[0].new_empty(output_shape(*args[:-1]))

        def fake_backward(grad: Tensor, *args: object) -> list[Tensor]:
            needs_grad = args[-2]
            return [a.new_empty(a.shape) for a, needed in zip(args, needs_grad, strict=False) if needed]

        def setup_context(ctx: object, inputs: tuple, output: Tensor) -> None:
            is_tensor = [isinstance(a, Tensor) for a in inputs]
            ctx.save_for_backward(*(a for a, t in zip(inputs, is_tensor, strict=True) if t))
            ctx.others = [None if t else a for a, t in zip(inputs, is_tensor, strict=True)]
            ctx.is_tensor = is_tensor

        def differentiate(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if t else other for t, other in zip(ctx.is_tensor, ctx.others, strict=True)]
            needs_grad = list(ctx.needs_input_grad[:differentiable])
            grads = iter(self.backward(grad, *inputs[:-1], needs_grad, inputs[-1]))
            needed = needs_grad + [False] * (len(inputs) - differentiable)
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

    def __call__(self, *arguments: object, impl: str) -> Tensor:
        """Run the operator; arguments have been checked."""
        return self.forward(*arguments, impl)


def run_reference(definition: Callable[..., Tensor], x: Tensor, *arguments: object) -> Tensor:
    """Run a definition; its arguments have been cast, and autocast shall not cast within."""
    with torch.autocast(x.device.type, enabled=False):
        return definition(x, *arguments)


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast features and weights to the autocast dtype if autocast is on; coordinates never go through here."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return [x, *tensors]
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None else t.to(dtype) for t in (x, *tensors)]
