"""Which implementation of an operation runs, and how an operation becomes a PyTorch operator."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import extension
from ..errors import MissingPackageError, expected

NAMESPACE = "vitup_fast"
Result = TypeVar("Result")


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
    obstacle = _triton_obstacle()
    cuda, cpu, int8 = _cuda_obstacle(), _cpu_obstacle(int8=False), _cpu_obstacle(int8=True)
    return [
        Implementation(
            "triton", obstacle is None, obstacle or "fused kernels for NVIDIA GPUs and their tensors"
        ),
        Implementation(
            "cuda",
            cuda is None,
            cuda or "the same with compiled kernels where there are some, not yet measured",
        ),
        Implementation("cpu", cpu is None, cpu or f"compiled kernels for CPU tensors ({_instruction_set()})"),
        Implementation(
            "cpu_int8", int8 is None, int8 or "the same with products in 8-bit integers; only when asked for"
        ),
        Implementation("torch", True, f"tuned PyTorch calls, any device ({onednn} oneDNN on the CPU)"),
        Implementation("reference", True, "the definition: plain PyTorch, any dtype up to float64"),
    ]


NAMES = ("triton", "cuda", "cpu", "cpu_int8", "torch", "reference")
# Operations with compiled CUDA kernels.
COMPILED = ("bilinear_sample", "residual_mlp", "film_mlp")
OLDEST_TRITON = (3, 6)
HEAD_DIMS = (32, 64, 128)


def _constant_to_compiler(function: Callable[..., Result]) -> Callable[..., Result]:
    """Mark what depends on the machine alone, and how it is found cannot be traced.

    This is all that ``torch.compiler.assume_constant_result`` does, but that would load the compiler at import.
    """
    function._dynamo_marked_constant = True
    return function


@_constant_to_compiler
def interpreted() -> bool:
    """Whether Triton's interpreter is switched on, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _triton_package_obstacle() -> str | None:
    """Why Triton cannot be used in this environment, or None."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "the package triton is not installed (pip install triton)"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {found} is older than 3.6 (pip install --upgrade torch triton)"
    return None


@_constant_to_compiler
def _triton_obstacle() -> str | None:
    """Why the Triton kernels cannot run on this machine, or None."""
    obstacle = _triton_package_obstacle()
    if obstacle is None and not interpreted() and not (torch.version.cuda and torch.cuda.is_available()):
        return "no NVIDIA GPU is available"
    return obstacle


@_constant_to_compiler
def _too_old(device_index: int) -> str | None:
    """Why a GPU is too old for the kernels, or None."""
    if torch.cuda.get_device_capability(device_index) >= (8, 0):
        return None
    return f"{torch.cuda.get_device_name(device_index)} is older than compute capability 8.0"


def _triton_obstacle_for(x: Tensor, widths: Mapping[str, int], head_dim: int | None) -> str | None:
    """Why the Triton kernels cannot take these features, or None."""
    obstacle = _triton_obstacle()
    if obstacle is not None:
        return obstacle
    if not interpreted():
        if not x.is_cuda:
            return f"the features are on {x.device}, not on a GPU"
        too_old = _too_old(x.device.index)
        if too_old is not None:
            return too_old
        if x.dtype == torch.float64:
            return "the kernels take bfloat16, float16 and float32, not float64"
    for name, width in widths.items():
        if width % 64:
            return f"{name} = {width} is not a multiple of 64"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"the head width {head_dim} is none of {HEAD_DIMS}"
    return None


@_constant_to_compiler
def _cuda_obstacle() -> str | None:
    """Why the compiled CUDA kernels, and Triton's for the rest, cannot run on this machine, or None."""
    obstacle = _triton_obstacle()
    if obstacle is None and interpreted():
        try:
            extension.load()
        except MissingPackageError as error:
            return str(error)
    elif obstacle is None:
        return extension.obstacle("cuda")
    return obstacle


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for architectures such as ``"80"`` and ``"90a"`` runs on a GPU of a compute capability.

    Code runs on later minor revisions, and its PTX on all later GPUs, unless an ``a`` binds it to one or an ``f`` to
    one major revision.
    """
    for architecture in architectures:
        number = int("".join(c for c in architecture if c.isdigit()))
        built = divmod(number, 10)
        if architecture.endswith("a"):
            fits = capability == built
        elif architecture.endswith(("f", "-real")):
            fits = capability[0] == built[0] and capability >= built
        else:
            fits = capability >= built
        if fits:
            return True
    return False


@_constant_to_compiler
def _not_built_for(device_index: int) -> str | None:
    """Why the compiled CUDA kernels cannot run on a GPU, or None."""
    built, capability = extension.load().cuda.architectures(), torch.cuda.get_device_capability(device_index)
    if runs_on(built, capability):
        return None
    name, (major, minor) = torch.cuda.get_device_name(device_index), capability
    return (
        f"the CUDA kernels are built for {', '.join(built)}, and {name} has compute capability {major}.{minor} "
        f"(build with VITUP_FAST_CUDA_ARCHITECTURES={major}{minor}{'a' if (major, minor) == (9, 0) else ''})"
    )


def _cuda_obstacle_for(x: Tensor, widths: Mapping[str, int], head_dim: int | None) -> str | None:
    """Why the compiled CUDA kernels, and Triton's for the rest, cannot take these features, or None."""
    obstacle = _triton_obstacle_for(x, widths, head_dim) or _cuda_obstacle()
    if obstacle is None and x.is_cuda:
        return _not_built_for(x.device.index)
    return obstacle


@_constant_to_compiler
def _faster_widths(operation: str, device_index: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Widths at which measurements show an operation to be faster with compiled kernels on a GPU."""
    from ..kernels.compiled import faster_widths

    return faster_widths(operation, torch.cuda.get_device_name(device_index), dtype)


def compiled_operations(impl: str, x: Tensor) -> tuple[str, ...]:
    """Operations that run with compiled CUDA kernels for ``impl``: all of them for ``"cuda"``.

    For ``"auto"`` those that measurements in ``bench/results`` show to be faster so, on the GPU of ``x``, in its dtype
    and at its width; none where the kernels cannot run.
    """
    if impl == "cuda":
        return COMPILED
    if impl != "auto" or not x.is_cuda or _cuda_obstacle_for(x, {}, None) is not None:
        return ()
    return tuple(n for n in COMPILED if x.shape[-1] in _faster_widths(n, x.device.index, x.dtype))


@_constant_to_compiler
def _instruction_set() -> str:
    """Instruction set that the compiled CPU kernels use."""
    return extension.load().cpu.instruction_set()


@_constant_to_compiler
def _cpu_obstacle(int8: bool) -> str | None:
    """Why the compiled CPU kernels cannot run on this machine, or None."""
    obstacle = extension.obstacle("cpu")
    if obstacle is None and int8 and _instruction_set() != "avx512_bf16":
        return "8-bit products need a CPU with AVX-512 VNNI"
    return obstacle


@_constant_to_compiler
def _onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether the CPU has matrix units that oneDNN uses and the compiled kernels do not, or no wide vectors."""
    if _instruction_set() == "baseline":
        return True
    return dtype != torch.float32 and torch.cpu._is_amx_tile_supported()


def _cpu_obstacle_for(x: Tensor, widths: Mapping[str, int], head_dim: int | None, int8: bool) -> str | None:
    """Why the compiled CPU kernels cannot take these features, or None."""
    if x.device.type != "cpu":
        return f"the features are on {x.device}, not on the CPU"
    obstacle = _cpu_obstacle(int8)
    if obstacle is not None:
        return obstacle
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16, float16 and float32, not {str(x.dtype).removeprefix('torch.')}"
    for name, width in (*widths.items(), ("the head width", head_dim or 16)):
        if width % 16:
            return f"{name} = {width} is not a multiple of 16"
    return None


def resolve(
    impl: str,
    x: Tensor,
    widths: Mapping[str, int],
    head_dim: int | None = None,
    operation: str | None = None,
) -> str:
    """Return the name of the implementation that runs for ``impl``.

    ``"auto"`` picks Triton kernels for tensors on a GPU and compiled ones on a CPU where they can take them and are
    the fastest, else tuned PyTorch calls; on a GPU compiled ones where :func:`compiled_operations` has the operation.

    Args:
        impl: ``"auto"`` or the name of an implementation.
        x: the features.
        widths: widths that kernels want as multiples of 64, by name.
        head_dim: width of an attention head, where there is one.
        operation: the operation, or None for a whole network.

    Raises:
        InputError: the name is unknown, or it cannot run; says why.
    """
    if impl in ("torch", "reference"):
        return impl
    if impl not in ("auto", *NAMES):
        raise expected("impl", f"'auto' or one of {list(NAMES)}", repr(impl))
    name = impl
    if impl == "auto":
        name = "triton" if x.is_cuda else "cpu"
    if name == "triton":
        obstacle = _triton_obstacle_for(x, widths, head_dim)
    elif name == "cuda":
        obstacle = _cuda_obstacle_for(x, widths, head_dim)
    else:
        obstacle = _cpu_obstacle_for(x, widths, head_dim, int8=name == "cpu_int8")
    if impl == "auto":
        if name == "triton" and obstacle is None and operation in compiled_operations(impl, x):
            return "cuda"
        slower = name == "cpu" and obstacle is None and _onednn_is_faster(x.dtype)
        return "torch" if obstacle is not None or slower else name
    if obstacle is None:
        return name
    raise expected(
        "impl", "an implementation that can run here", f"{name!r}: {obstacle}", "'auto' picks one."
    )


class Kernels(NamedTuple):
    """Forward and backward of one operation in one implementation.

    ``forward(*arguments) -> Tensor`` and ``backward(grad, *arguments, needs_grad) -> list[Tensor]``, which
    returns contiguous gradients of those differentiable arguments whose flag is set, in their order.

    Where recomputing costs more than memory, ``kept_bytes(*arguments)`` says how much of its work the forward pass can
    leave to the backward pass: both then take ``kept=``, bytes of that size, or None where nothing is kept.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., list[Tensor]]
    kept_bytes: Callable[..., int] | None = None


# Most that a call keeps for its backward pass; a longer one recomputes.
KEPT_BYTES = 64 << 20


def gpu_kernels(name: str) -> dict[str, Kernels]:
    """Kernels of :mod:`vitup_fast.kernels` as ``"triton"`` and, compiled where there are such, as ``"cuda"``.

    The module is imported when they first run.
    """

    def kernels(*compiled: str) -> Kernels:
        def runner(direction: str) -> Callable[..., Any]:
            def run(*arguments: object) -> Any:
                module = importlib.import_module(f"vitup_fast.kernels.{name}")
                if not compiled:
                    return getattr(module, direction)(*arguments)
                with importlib.import_module("vitup_fast.kernels.compiled").compiled_kernels(compiled):
                    return getattr(module, direction)(*arguments)

            return run

        return Kernels(runner("forward"), runner("backward"))

    return {"triton": kernels(), "cuda": kernels(*COMPILED)}


def cpu_kernels(name: str, kept_bytes: Callable[..., int] | None = None) -> dict[str, Kernels]:
    """The compiled CPU kernels of an operation, imported when they first run."""

    def run(function: str, *arguments: object, **kept: Tensor | None) -> Any:
        module = importlib.import_module("vitup_fast.cpu")
        module.begin_call()
        return getattr(module, f"{function}_{name}")(*arguments, **kept)

    def no_backward(*_: object) -> list[Tensor]:
        raise expected("impl", "an implementation with gradients", "'cpu_int8'", "Use 'cpu' or 'auto'.")

    return {
        "cpu": Kernels(partial(run, "forward", False), partial(run, "backward"), kept_bytes),
        "cpu_int8": Kernels(partial(run, "forward", True), no_backward),
    }


class Operator:
    """A PyTorch operator ``vitup_fast::name`` with fake, autograd and one kernel pair per implementation.

    The backward pass recomputes what it needs from the operator's inputs, but for what its kernels keep.

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
        torch.library.define(qualified, f"({arguments}, bool keep, str impl) -> (Tensor, Tensor)", tags=tags)
        torch.library.define(
            f"{qualified}_backward",
            f"(Tensor grad, {arguments}, Tensor kept, bool[] needs_grad, str impl) -> Tensor[]",
            tags=tags,
        )
        self.forward = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward").default
        self.kernels = kernels
        self.differentiable = differentiable

        def empty_kept(keep: bool, impl: str, arguments: Sequence[Any]) -> Tensor:
            size = kernels[impl].kept_bytes(*arguments) if keep else 0
            return arguments[0].new_empty(size, dtype=torch.uint8)

        def run_forward(*args: object) -> tuple[Tensor, Tensor]:
            *arguments, keep, impl = args
            kept = empty_kept(keep, impl, arguments)
            keeping = {"kept": kept} if keep else {}
            with torch.autocast(arguments[0].device.type, enabled=False):
                return kernels[impl].forward(*arguments, **keeping), kept

        def run_backward(grad: Tensor, *args: object) -> list[Tensor]:
            *arguments, kept, needs_grad, impl = args
            keeping = {"kept": kept if kept.numel() else None} if kernels[impl].kept_bytes else {}
            with torch.autocast(grad.device.type, enabled=False):
                return kernels[impl].backward(grad.contiguous(), *arguments, needs_grad, **keeping)

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
            ctx.save_for_backward(kept, *(a for a, t in zip(arguments, is_tensor, strict=True) if t))
            ctx.others = [None if t else a for a, t in zip(arguments, is_tensor, strict=True)]
            ctx.is_tensor, ctx.impl = is_tensor, impl

        def differentiate(ctx: object, grad: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(ctx.needs_input_grad)
            kept, *tensors = ctx.saved_tensors
            saved = iter(tensors)
            arguments = [
                next(saved) if t else other for t, other in zip(ctx.is_tensor, ctx.others, strict=True)
            ]
            needs_grad = list(ctx.needs_input_grad[:differentiable])
            grads = iter(self.backward(grad, *arguments, kept, needs_grad, ctx.impl))
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

    def __call__(self, *arguments: object, impl: str) -> Tensor:
        """Run the operator; arguments have been checked."""
        kept_bytes = self.kernels[impl].kept_bytes
        keep = (
            kept_bytes is not None
            and torch.is_grad_enabled()
            and any(isinstance(a, Tensor) and a.requires_grad for a in arguments[: self.differentiable])
            and kept_bytes(*arguments) <= KEPT_BYTES
        )
        return self.forward(*arguments, keep, impl)[0]


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
