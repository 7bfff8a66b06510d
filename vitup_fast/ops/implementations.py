"""Which implementation of an operation runs on this machine for these tensors, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import extension
from ..errors import MissingPackageError, expected
from .checks import is_dual
from .operator import backend, transforms

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
    fp8 = _cuda_fp8_obstacle()
    return [
        Implementation(
            "triton", obstacle is None, obstacle or "fused kernels for NVIDIA GPUs and their tensors"
        ),
        Implementation(
            "cuda",
            cuda is None,
            cuda or "the same with compiled kernels where there are some, not yet measured",
        ),
        Implementation(
            "cuda_fp8",
            fp8 is None,
            fp8 or "the same with MLPs in 8-bit floating point; only when asked for",
        ),
        Implementation("cpu", cpu is None, cpu or f"compiled kernels for CPU tensors ({_instruction_set()})"),
        Implementation(
            "cpu_int8", int8 is None, int8 or "the same with products in 8-bit integers; only when asked for"
        ),
        Implementation("torch", True, f"tuned PyTorch calls, any device ({onednn} oneDNN on the CPU)"),
        Implementation("reference", True, "the definition: plain PyTorch, any dtype up to float64"),
    ]


NAMES = ("triton", "cuda", "cuda_fp8", "cpu", "cpu_int8", "torch", "reference")
# Those that launch kernels on a GPU.
GPU_NAMES = ("triton", "cuda", "cuda_fp8")
# Operations with compiled CUDA kernels; norm_linear is also all products that belong to no other.
COMPILED = ("bilinear_sample", "residual_mlp", "film_mlp", "norm_linear")
# Where the kernel with 8-bit products runs, and the width that it is written for.
FP8_CAPABILITY, FP8_ARCHITECTURE, FP8_WIDTH = (9, 0), "90a", 384
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


def _major_minor(found: str) -> tuple[int, int]:
    """Major and minor number of a package's version."""
    major, minor = found.split(".")[:2]
    return int(major), int(minor)


@cache
def _triton_package_obstacle() -> str | None:
    """Why Triton cannot be used in this environment, or None."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "the package triton is not installed (pip install triton)"
    if _major_minor(found) < OLDEST_TRITON:
        return f"triton {found} is older than 3.6 (pip install --upgrade torch triton)"
    return None


@cache
def _interpreter_obstacle() -> str | None:
    """Why Triton's interpreter cannot run the kernels in this environment, or None.

    That of Triton 3.6 makes integers of arrays with one dimension, which NumPy refuses from 2.4 on.
    """
    found, numpy = version("triton"), version("numpy")
    if _major_minor(found) < (3, 7) and _major_minor(numpy) >= (2, 4):
        return (
            f"the interpreter of triton {found} cannot work with numpy {numpy} "
            "(pip install 'numpy<2.4', or triton 3.7 and later)"
        )
    return None


@_constant_to_compiler
def _triton_obstacle() -> str | None:
    """Why the Triton kernels cannot run on this machine, or None."""
    obstacle = _triton_package_obstacle()
    if obstacle is None and interpreted():
        return _interpreter_obstacle()
    if obstacle is None and not (torch.version.cuda and torch.cuda.is_available()):
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
def _fp8_obstacle_on(device_index: int) -> str | None:
    """Why the kernel with 8-bit products cannot run on a GPU, or None."""
    built, capability = extension.load().cuda.architectures(), torch.cuda.get_device_capability(device_index)
    if capability != FP8_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device_index), capability
        return f"its 8-bit products need compute capability 9.0 (H100, H200), and {name} has {major}.{minor}"
    if FP8_ARCHITECTURE not in built:
        return (
            f"its 8-bit products need the CUDA kernels built for 90a, not only for {', '.join(built)} "
            "(build with VITUP_FAST_CUDA_ARCHITECTURES=90a)"
        )
    return None


@_constant_to_compiler
def _cuda_fp8_obstacle() -> str | None:
    """Why the compiled CUDA kernels cannot compute in 8-bit floating point on any GPU of this machine, or None."""
    if interpreted():
        return _triton_package_obstacle() or "Triton's interpreter has no 8-bit products"
    obstacle = _cuda_obstacle()
    if obstacle is not None:
        return obstacle
    obstacles = [_fp8_obstacle_on(index) for index in range(torch.cuda.device_count())]
    return None if None in obstacles else obstacles[0]


def _cuda_fp8_obstacle_for(x: Tensor, widths: Mapping[str, int], head_dim: int | None) -> str | None:
    """Why the compiled CUDA kernels cannot take these features in 8-bit floating point, or None."""
    if interpreted():
        return _cuda_fp8_obstacle()
    obstacle = (
        _triton_obstacle_for(x, widths, head_dim) or _cuda_obstacle() or _fp8_obstacle_on(x.device.index)
    )
    if obstacle is None and x.dtype != torch.bfloat16:
        return f"its 8-bit products take bfloat16 features, not {str(x.dtype).removeprefix('torch.')}"
    if obstacle is None and x.shape[-1] != FP8_WIDTH:
        return f"its 8-bit products are written for a width of {FP8_WIDTH}, not {x.shape[-1]}"
    return obstacle


@_constant_to_compiler
def _faster_widths(operation: str, device_index: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Widths at which measurements show an operation to be faster with compiled kernels on a GPU."""
    return backend("cuda").faster_widths(operation, torch.cuda.get_device_name(device_index), dtype)


def compiled_operations(impl: str, x: Tensor) -> tuple[str, ...]:
    """Operations that run with compiled CUDA kernels for ``impl``: all of them for ``"cuda"`` and ``"cuda_fp8"``.

    For ``"auto"`` those that measurements in ``bench/results`` show to be faster so, on the GPU of ``x``, in its dtype
    and at its width; none where the kernels cannot run.
    """
    if impl in ("cuda", "cuda_fp8"):
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


def _beyond_operators(tensors: Iterable[Tensor | None]) -> str | None:
    """What PyTorch is about to do that operators have no rule for and the definition has, or None."""
    active = transforms()
    if "Jvp" in active or (
        forward_ad._current_level >= 0 and any(t is not None and is_dual(t) for t in tensors)
    ):
        return "forward-mode differentiation"
    if active and torch.compiler.is_compiling():
        return "torch.func inside torch.compile"
    if "Functionalize" in active and len(set(active)) > 1:
        return "functionalize() among other transforms"
    return None


def resolve(
    impl: str,
    x: Tensor,
    widths: Mapping[str, int],
    head_dim: int | None = None,
    operation: str | None = None,
    tensors: Iterable[Tensor | None] = (),
) -> str:
    """Return the name of the implementation that runs for ``impl``.

    ``"auto"`` picks Triton kernels for tensors on a GPU and compiled ones on a CPU where they can take them and are
    the fastest, else tuned PyTorch calls; on a GPU compiled ones where :func:`compiled_operations` has the operation;
    the definition for forward-mode differentiation and for second derivatives by ``torch.func``.

    Args:
        impl: ``"auto"`` or the name of an implementation.
        x: the features.
        widths: widths that kernels want as multiples of 64, by name.
        head_dim: width of an attention head, where there is one.
        operation: the operation, or None for a whole network.
        tensors: the other tensors that may carry a tangent of forward-mode differentiation.

    Raises:
        InputError: the name is unknown, or it cannot run; says why.
    """
    if impl == "reference":
        return impl
    beyond = _beyond_operators((x, *tensors))
    if impl == "auto" and (beyond is not None or transforms().count("Grad") > 1):
        return "reference"
    if beyond is not None and impl in NAMES:
        raise expected("impl", f"'auto' or 'reference' for {beyond}", repr(impl))
    if impl == "torch":
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
    elif name == "cuda_fp8":
        obstacle = _cuda_fp8_obstacle_for(x, widths, head_dim)
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
