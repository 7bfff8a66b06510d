"""The compiled CUDA kernels: which of them run, and how a launch reaches them.

A compiled kernel has the name and the arguments of the Triton kernel whose place it takes, so that all around a launch
is the same. It reads its settings from the sizes. Where Triton is interpreted, the same source runs on the host.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..errors import KernelError

# Per operation its kernels, with the constants that a compiled one takes.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "bilinear_sample": {
        "bilinear_sample_kernel": ("D", "MOMENTS"),
        "bilinear_sample_coords_backward_kernel": ("D", "COORDS"),
        "bilinear_sample_grid_backward_kernel": ("D",),
    },
    "film_mlp": {
        "modulate_kernel": ("D", "TABLE"),
        "modulate_backward_kernel": ("D", "TABLE"),
        "segment_sum_kernel": ("D",),
    },
}
# These learn their number of rows from the launch's grid.
COUNTED_BY_GRID = ("bilinear_sample_grid_backward_kernel", "segment_sum_kernel")
RESIDUAL_MLP, FILM_MLP = "residual_mlp_sm90", "film_mlp_sm90"
RESIDUAL_MLP_FP8, FILM_MLP_FP8 = "residual_mlp_fp8_sm90", "film_mlp_fp8_sm90"
# Most that an e4m3 number holds, what the kernel multiplies normalised rows by, and its hidden columns at a time.
E4M3_MOST, NORMED_SCALE, FP8_CHUNK = 448.0, 16.0, 32
LINEAR = "linear_sm90"
# Rows that a cluster of the compiled product takes at once, and columns.
LINEAR_ROWS, LINEAR_COLUMNS = 256, (256, 192)
# Where compiled kernels were measured to be faster; `vitup_fast.bench.choose_compiled` writes it.
FASTER = Path(__file__).parent / "configs" / "compiled.json"

_chosen: ContextVar[frozenset[str]] = ContextVar("operations whose compiled kernels run", default=frozenset())


@contextlib.contextmanager
def compiled_kernels(operations: Collection[str]) -> Iterator[None]:
    """Run the compiled kernels of these operations, and Triton's for the rest."""
    token = _chosen.set(frozenset(operations))
    try:
        yield
    finally:
        _chosen.reset(token)


def runs_compiled(kernel: str) -> bool:
    """Whether launches of a kernel go to the compiled one."""
    return any(kernel in KERNELS.get(operation, ()) for operation in _chosen.get())


@cache
def _faster() -> Mapping[str, Mapping[str, Mapping[str, list[int]]]]:
    """Widths at which compiled kernels are faster, by GPU, operation and dtype."""
    return json.loads(FASTER.read_text())


def faster_widths(operation: str, device_name: str, dtype: torch.dtype) -> tuple[int, ...]:
    """Widths at which an operation was measured to be faster with compiled kernels on a GPU of this name."""
    by_dtype = _faster().get(device_name, {}).get(operation, {})
    return tuple(by_dtype.get(str(dtype).removeprefix("torch."), ()))


def fills_waves(rows: int, multiprocessors: int) -> bool:
    """Whether an MLP of so many rows is faster in one kernel than in several, as bench/NOTES.md predicts.

    Clusters of two multiprocessors take 256 rows at a time, and as long for fewer; of their places two thirds pay.
    """
    tiles, places = -(-rows // 256), multiprocessors // 2
    return 3 * tiles >= 2 * -(-tiles // places) * places


def fits_one_kernel(operation: str, hidden: int, x: Tensor, *others: Tensor) -> bool:
    """Whether an MLP of rows ``x [..., D]`` runs as one compiled kernel.

    The kernels of ``"residual_mlp"`` and ``"film_mlp"`` are written for bfloat16, D = 384, compute capability 9.0 and
    aligned tensors alone, and pay for rows that fill the GPU; what else there is takes several kernels, of which some
    may be compiled.
    """
    if operation not in _chosen.get() or not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    if x.shape[-1] != 384 or hidden % 64 or any(t.data_ptr() % 16 for t in (x, *others)):
        return False
    if not _on_hopper(x.device):
        return False
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return fills_waves(x.numel() // 384, processors)


def _on_hopper(device: torch.device) -> bool:
    """Whether kernels for compute capability 9.0 alone can run on a GPU."""
    capability = torch.cuda.get_device_capability(device)
    return capability == (9, 0) and "90a" in extension.load().cuda.architectures()


def residual_mlp(
    x: Tensor,  # [M, D]
    mlp: tuple[Tensor, ...],  # [E, D], [E], [D, E], [D], or a QuantisedMLP
    out: Tensor,  # [M, D]
    out_moments: Tensor | None,  # [M, 1, 2]
) -> None:
    """``x + W2 gelu(W1 LN(x) + b1) + b2`` in one kernel, LayerNorm's scale and shift folded into W1 and b1.

    Raises:
        KernelError: CUDA refuses the launch, or the kernel its arguments; names the kernel and its sizes.
    """
    (M, D), E, scales = x.shape, mlp[0].shape[0], mlp[4:]
    tensors = (x, *mlp[:4], out, out_moments, *scales)
    _call(RESIDUAL_MLP_FP8 if scales else RESIDUAL_MLP, x, tensors, (M, D, E))


def film_mlp(
    x: Tensor,  # [B, N, D]
    tokens: Tensor,  # [B, h, w, D]
    gamma_beta: Tensor,  # [R, 2 D] float32, or [B * N, 2 D] without a table
    pointers: tuple[Tensor, Tensor, Tensor],  # as modulate_kernel takes them
    table: bool,
    mlp: tuple[Tensor, ...],  # [E, D], [E], [D, E], [D], or a QuantisedMLP
    out_norm: tuple[Tensor, Tensor],  # [D], [D]
    out: Tensor,  # [B * N, D]
    out_moments: Tensor | None,  # [B * N, 1, 2]
) -> None:
    """``x + LNl(W2 gelu(W1 LN1(m) + b1) + b2)`` of the modulated tokens m in one kernel, LN1 folded into W1 and b1.

    Raises:
        KernelError: CUDA refuses the launch, or the kernel its arguments; names the kernel and its sizes.
    """
    (B, N, D), E, scales = x.shape, mlp[0].shape[0], mlp[4:]
    tensors = (x, *mlp[:4], out, out_moments, *scales, tokens, gamma_beta, *pointers, *out_norm)
    _call(FILM_MLP_FP8 if scales else FILM_MLP, x, tensors, (B * N, D, E, N, *tokens.shape[1:3], table))


class QuantisedMLP(NamedTuple):
    """An MLP for kernels with 8-bit products; ``weight * scale`` are the weights that are meant."""

    weight1: Tensor  # [E, D] float8_e4m3fn
    bias1: Tensor  # [E] float32
    weight2: Tensor  # [E / 32, D, 32] float8_e4m3fn, columns in the order of _operand_order
    bias2: Tensor  # [D] float32
    scale1: Tensor  # [E] float32, for normalised rows that were multiplied by NORMED_SCALE
    scale2: Tensor  # [D] float32, for hidden values that were multiplied by hidden_scale
    hidden_scale: Tensor  # [1] float32


def aligned(tensor: Tensor) -> Tensor:
    """A contiguous tensor, copied if it lies where kernels cannot load 16 bytes at once."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _operand_order(device: torch.device) -> Tensor:
    """Hidden columns of a chunk in the order in which a thread's sums are its operand; hopper_layout.h says why."""
    k = torch.arange(FP8_CHUNK, dtype=torch.int64, device=device)
    return k // 16 * 16 + k % 4 // 2 * 8 + k % 16 // 4 * 2 + k % 2


def _quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix as e4m3 with a scale for each row."""
    scale = matrix.abs().amax(-1, keepdim=True) / E4M3_MOST
    scale = torch.where(scale == 0, 1.0, scale)
    return (matrix / scale).to(torch.float8_e4m3fn), scale[..., 0]


def quantise_mlp(
    weight1: Tensor,  # [E, D]
    bias1: Tensor,  # [E]
    weight2: Tensor,  # [D, E]
    bias2: Tensor,  # [D]
) -> QuantisedMLP:
    """Quantise an MLP whose LayerNorm is folded into the first layer.

    Hidden values are scaled by what no row can exceed: normalised, it is ``sqrt(D)`` long.
    """
    D, E = weight2.shape
    first, second, bias1, bias2 = (t.detach().float() for t in (weight1, weight2, bias1, bias2))
    most = (first.norm(dim=1) * D**0.5 + bias1.abs()).amax(0, keepdim=True)
    hidden_scale = E4M3_MOST / most.clamp_min(1e-6)
    quantised1, scale1 = _quantise_rows(first)
    order = _operand_order(second.device)
    quantised2, scale2 = _quantise_rows(second.view(D, E // FP8_CHUNK, FP8_CHUNK)[..., order].flatten(1))
    chunks = quantised2.view(torch.uint8).view(D, -1, FP8_CHUNK).transpose(0, 1).contiguous()
    return QuantisedMLP(
        quantised1.contiguous(),
        bias1.contiguous(),
        chunks.view(torch.float8_e4m3fn),
        bias2.contiguous(),
        scale1 / NORMED_SCALE,
        scale2 / hidden_scale,
        hidden_scale,
    )


def linear_columns(M: int, N: int, K: int, multiprocessors: int) -> int | None:
    """Columns of the tiles in which the compiled kernel takes a product ``[M, K] x [K, N]``, or None if it does not.

    K is a multiple of 64 from 192 on. Of the widths that divide N it is that whose busiest cluster reads least, if
    there are tiles for two thirds of the places that clusters of two multiprocessors have.
    """
    clusters, rows = multiprocessors // 2, -(-M // LINEAR_ROWS)
    widths = [columns for columns in LINEAR_COLUMNS if N % columns == 0]
    if K % 64 or K < 192 or not widths or not clusters:
        return None

    def rounds(columns: int) -> int:
        return -(-rows * (N // columns) // clusters)

    best = min(widths, key=lambda columns: rounds(columns) * (LINEAR_ROWS + columns))
    return best if 3 * rows * (N // best) >= 2 * rounds(best) * clusters else None


def fits_linear(
    operation: str,
    x: Tensor,  # [M, K]
    N: int,
    out_dtype: torch.dtype,
    multiprocessors: int,
    *others: Tensor | None,
) -> int | None:
    """Columns of the tiles in which the compiled kernel takes a product of rows with N results, or None.

    It does where its operation runs compiled, in bfloat16, on compute capability 9.0, in sizes of
    :func:`linear_columns`, ``x`` and ``others`` aligned. What does not fit is left to Triton's kernel.
    """
    if operation not in _chosen.get() or not x.is_cuda or x.dtype != torch.bfloat16 or out_dtype != x.dtype:
        return None
    if any(t is not None and t.data_ptr() % 16 for t in (x, *others)) or not _on_hopper(x.device):
        return None
    return linear_columns(x.shape[0], N, x.shape[1], multiprocessors)


def linear(
    x: Tensor,  # [M, K]
    layer: tuple[Tensor, Tensor, Tensor],  # [N, K], [N], [N]
    columns: int,
    moments: Tensor | None,  # [M, parts, 2]
    gelu: bool,
    residual: Tensor | None,  # [M, N]
    out: Tensor,  # [M, N]
    out_moments: Tensor | None,  # [M, N / columns, 2]
) -> None:
    """``residual + gelu(W LN(x) + b)`` in one kernel, weight, bias and sums over the weight's rows as folded.

    Tiles have 256 or 192 ``columns``. A residual goes without LayerNorm and GELU, moments of the result with one alone.

    Raises:
        KernelError: CUDA refuses the launch, or the kernel its arguments; names the kernel and its sizes.
    """
    (M, K), N = x.shape, layer[0].shape[0]
    parts = 0 if moments is None else moments.shape[1]
    _call(LINEAR, x, (x, *layer, moments, residual, out, out_moments), (M, N, K, parts, columns, gelu))


@cache
def _types(part: ModuleType) -> dict[torch.dtype, int]:
    """Numbers by which the extension knows dtypes."""
    return {getattr(torch, name): number for number, name in enumerate(part.types)}


def launch_compiled(
    kernel: str, grid: tuple[int, ...], arguments: tuple[object, ...], options: Mapping[str, Any]
) -> None:
    """Launch a compiled kernel on the device of its first tensor and the current stream.

    Args:
        kernel: its name.
        grid: the Triton kernel's grid.
        arguments: the Triton kernel's arguments.
        options: its constants and settings.

    Raises:
        KernelError: CUDA refuses the launch, or the kernel its arguments; names the kernel and its sizes.
    """
    first = next(a for a in arguments if isinstance(a, Tensor))
    operation = next(kernels for kernels in KERNELS.values() if kernel in kernels)
    constants = [options[name] for name in operation[kernel]]
    count = [grid[0]] if kernel in COUNTED_BY_GRID else []
    _call(kernel, first, arguments, (*constants, *count))


def _call(name: str, first: Tensor, arguments: tuple[object, ...], sizes: tuple[object, ...]) -> None:
    """Call a function of the extension with tensors as addresses, on the device of ``first`` and its stream."""
    device, stream, part = 0, 0, "host"
    if first.is_cuda:
        device, part = first.device.index, "cuda"
        stream = torch.cuda.current_stream(first.device).cuda_stream
    library = getattr(extension.load(), part)
    types = _types(library)
    plain = [(a.data_ptr(), types.get(a.dtype, -1)) if isinstance(a, Tensor) else a for a in arguments]
    try:
        getattr(library, name)(*plain, *sizes, device, stream)
    except (RuntimeError, ValueError) as error:
        raise KernelError(
            f"{error} (compiled kernel on {first.device}; impl='triton' runs without it)"
        ) from error
