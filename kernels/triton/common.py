"""What the kernels share: device functions, LayerNorm and sums over segments, launch settings, the launch itself.

Prefixes in kernels: ``p_`` pointer, ``b_`` block in registers, ``o_`` offset, ``m_`` mask, ``i_`` program index.
Row *moments* are the mean of a row, or of each of several equal parts of it, and the sum of squared deviations from
it: ``[M, parts, 2]``. A producer writes them with its output, the LayerNorm that follows folds them into its product.
Counts of rows are not specialised (``do_not_specialize``): whether odd, 1 or a multiple of 16, the code is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ...errors import InputError, KernelError, brief, expected
from ...ops.primitives import LAYER_NORM_EPS
from ..cuda import launch_compiled, runs_compiled

# Triton's interpreter runs the kernels in NumPy, without inline assembly.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# Ways to compute GELU: exact, by a sigmoid good to 2.5e-5, the same by the hardware's tanh good to 2^-11.
GELU_NONE, GELU_EXACT, GELU_SIGMOID, GELU_TANH = (tl.constexpr(kind) for kind in range(4))
EPS = tl.constexpr(LAYER_NORM_EPS)
_GELU_KINDS = {torch.float16: GELU_SIGMOID.value, torch.bfloat16: GELU_TANH.value}


@triton.jit
def _gelu_logit(x):
    """Half the logit of the normal distribution function: ``Phi(x) = (1 + tanh(q)) / 2``, fitted to 2.5e-5."""
    square = tl.minimum(x * x, 36.0)
    return x * (square * (square * -3.516701170e-04 + 3.700658995e-02) + 7.975068470e-01)


@triton.jit
def normal_cdf(x, KIND: tl.constexpr):
    """Distribution function of the standard normal, as exact as ``KIND`` says."""
    if KIND == GELU_EXACT:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == GELU_TANH and not INTERPRETED:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [_gelu_logit(x)], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * tanh + 0.5
    else:
        return 1.0 / (1.0 + tl.exp2(_gelu_logit(x) * -2.8853900817779268))


@triton.jit
def gelu_with_gradient(x, KIND: tl.constexpr):
    """``gelu(x)`` and its derivative ``Phi(x) + x phi(x)``."""
    cdf = normal_cdf(x, KIND)
    density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
    return x * cdf, cdf + x * density


@triton.jit
def sine_cosine(turns, DTYPE: tl.constexpr):
    """Sine and cosine of an angle of at most half a turn, given in turns, as exact as ``DTYPE`` can show.

    To the last digits of float32, or by the hardware's instructions to 2^-20 for numbers of 16 bits.
    """
    if turns.dtype == tl.float64:
        return tl.sin(turns * 6.283185307179586), tl.cos(turns * 6.283185307179586)
    elif DTYPE.primitive_bitwidth == 16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $2; cos.approx.f32 $1, $2;",
            "=&r,=r,r",
            [turns * 6.283185307179586],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        quarters = tl.floor(turns * 4.0 + 0.5)
        x = (turns - quarters * 0.25) * 6.283185307179586  # at most pi / 4
        square = x * x
        sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x
        cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
        cosine = cosine * square * square - 0.5 * square + 1.0
        quadrant = quarters - 4.0 * tl.floor(quarters * 0.25)
        odd = (quadrant == 1.0) | (quadrant == 3.0)
        swapped_sine = tl.where(odd, cosine, sine)
        swapped_cosine = tl.where(odd, sine, cosine)
        return (
            tl.where(quadrant >= 2.0, -swapped_sine, swapped_sine),
            tl.where((quadrant == 1.0) | (quadrant == 2.0), -swapped_cosine, swapped_cosine),
        )


@triton.jit
def fractional_turns(turns, ACC: tl.constexpr):
    """The angle without whole turns, reduced in its own precision."""
    return (turns - tl.floor(turns + 0.5)).to(ACC)


@triton.jit
def nearest_index(position, COUNT):
    """Index of the nearest cell centre on an axis of ``COUNT`` cells, ties to even; NaN gets 0."""
    shifted = tl.where(position == position, position, 0.5) - 0.5
    shifted = tl.minimum(tl.maximum(shifted, -1.0), COUNT * 1.0)
    lower = tl.floor(shifted)
    fraction = shifted - lower
    lower_is_odd = lower - 2.0 * tl.floor(lower * 0.5) == 1.0
    nearest = lower + tl.where((fraction > 0.5) | ((fraction == 0.5) & lower_is_odd), 1.0, 0.0)
    return tl.minimum(tl.maximum(nearest, 0.0), COUNT - 1.0).to(tl.int32)


@triton.jit
def nearest_relative(coord, COUNT):
    """Index of the nearest token on an axis and the position relative to its centre, in units of one token."""
    index = nearest_index(coord * COUNT, COUNT)
    # Token centres are float32 numbers by definition, so the division must round correctly.
    middle = index.to(tl.float32) + 0.5
    centre = tl.div_rn(middle, tl.zeros_like(middle) + COUNT)
    return index, (coord - centre) * COUNT


@triton.jit
def row_moments(b_x, m_column, D, ACC: tl.constexpr):
    """Mean and sum of squared deviations of rows held in one block; masked columns must be zero."""
    mean = tl.sum(b_x, 1) / D
    deviation = tl.where(m_column, b_x - mean[:, None], 0.0).to(ACC)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def combined_moments(p_moments, o_row, m_row, D, PARTS: tl.constexpr):
    """Mean and reciprocal standard deviation of rows from the moments of their equal parts."""
    o_part = o_row.to(tl.int64) * (2 * PARTS)
    mean = tl.load(p_moments + o_part, mask=m_row, other=0.0)
    squares = tl.load(p_moments + o_part + 1, mask=m_row, other=0.0)
    for part in tl.static_range(1, PARTS):
        # Chan's update of the moments of `part` equal parts by one more.
        other = tl.load(p_moments + o_part + 2 * part, mask=m_row, other=0.0)
        difference = other - mean
        mean += difference * (1.0 / (part + 1))
        squares += tl.load(p_moments + o_part + 2 * part + 1, mask=m_row, other=0.0)
        squares += difference * difference * ((D // PARTS) * (part / (part + 1)))
    return mean, tl.rsqrt(squares / D + EPS)


@triton.jit(do_not_specialize=["M"])
def normalize_kernel(
    p_x,  # [M, D]
    p_normed,  # [M, D]
    p_moments,  # [M, 1, 2]
    M,
    D: tl.constexpr,
    STORE_NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Row moments, and rows with zero mean and unit variance if ``STORE_NORMED``."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row, m_column = o_row < M, (o_column < D)[None, :]
    mask = m_row[:, None] & m_column
    o_x = o_row.to(tl.int64)[:, None] * D + o_column[None, :]
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC)
    mean, squares = row_moments(b_x, m_column, D, ACC)
    if STORE_NORMED:
        normed = (b_x - mean[:, None]) * tl.rsqrt(squares / D + EPS)[:, None]
        tl.store(p_normed + o_x, normed.to(p_normed.dtype.element_ty), mask=mask)
    else:
        o_moments = o_row.to(tl.int64) * 2
        tl.store(p_moments + o_moments, mean, mask=m_row)
        tl.store(p_moments + o_moments + 1, squares, mask=m_row)


@triton.jit(do_not_specialize=["M"])
def add_layer_norm_kernel(
    p_x,  # [M, D]
    p_weight,  # [D]
    p_bias,  # [D]
    p_residual,  # [M, D]
    p_out,  # [M, D]
    p_moments,  # [M, 1, 2]
    M,
    D: tl.constexpr,
    STORE_MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """``residual + LN(x)`` and the moments of its rows, for rows too wide for the epilogue of a product."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_row, m_column = o_row < M, (o_column < D)[None, :]
    mask = m_row[:, None] & m_column
    o_x = o_row.to(tl.int64)[:, None] * D + o_column[None, :]
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC)
    mean, squares = row_moments(b_x, m_column, D, ACC)
    weight = tl.load(p_weight + o_column, mask=o_column < D, other=0.0).to(ACC)
    bias = tl.load(p_bias + o_column, mask=o_column < D, other=0.0).to(ACC)
    normed = (b_x - mean[:, None]) * tl.rsqrt(squares / D + EPS)[:, None] * weight[None, :] + bias[None, :]
    b_out = normed + tl.load(p_residual + o_x, mask=mask, other=0.0).to(ACC)
    b_out = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + o_x, b_out, mask=mask)
    if STORE_MOMENTS:
        mean, squares = row_moments(b_out.to(ACC), m_column, D, ACC)
        o_moments = o_row.to(tl.int64) * 2
        tl.store(p_moments + o_moments, mean, mask=m_row)
        tl.store(p_moments + o_moments + 1, squares, mask=m_row)


@triton.jit(do_not_specialize=["M"])
def layer_norm_backward_kernel(
    p_grad,  # [M, D]
    p_x,  # [M, D]
    p_weight,  # [D]
    p_residual,  # [M, D]
    p_grad_x,  # [M, D]
    p_partial,  # [programs, 2, D]
    M,
    D: tl.constexpr,
    AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of LayerNorm for x, plus a residual's; per program partial sums for weight and bias if ``AFFINE``."""
    i_program = tl.program_id(0)
    o_row = i_program * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_D)
    m_column = (o_column < D)[None, :]
    mask = (o_row < M)[:, None] & m_column
    o_x = o_row.to(tl.int64)[:, None] * D + o_column[None, :]
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(ACC)
    b_grad = tl.load(p_grad + o_x, mask=mask, other=0.0).to(ACC)
    mean, squares = row_moments(b_x, m_column, D, ACC)
    rstd = tl.rsqrt(squares / D + EPS)
    normed = tl.where(mask, (b_x - mean[:, None]) * rstd[:, None], 0.0)
    if AFFINE:
        o_partial = i_program.to(tl.int64) * 2 * D + o_column
        tl.store(p_partial + o_partial, tl.sum(b_grad * normed, 0), mask=o_column < D)
        tl.store(p_partial + o_partial + D, tl.sum(b_grad, 0), mask=o_column < D)
        b_grad *= tl.load(p_weight + o_column, mask=o_column < D, other=0.0).to(ACC)[None, :]
    along = tl.sum(b_grad * normed, 1) / D
    grad_x = (b_grad - (tl.sum(b_grad, 1) / D)[:, None] - normed * along[:, None]) * rstd[:, None]
    if RESIDUAL:
        grad_x += tl.load(p_residual + o_x, mask=mask, other=0.0).to(ACC)
    tl.store(p_grad_x + o_x, grad_x.to(p_grad_x.dtype.element_ty), mask=mask)


@triton.jit
def segment_sum_kernel(
    p_values,  # [M, D]
    p_order,  # [M]
    p_offsets,  # [S + 1]
    p_out,  # [S, D]
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum of the rows ``order[offsets[s] : offsets[s + 1]]`` for each segment s, always in the same order."""
    i_segment = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_column = (o_column < D)[None, :]
    first, last = tl.load(p_offsets + i_segment), tl.load(p_offsets + i_segment + 1)
    total = tl.zeros((BLOCK_D,), ACC)
    for start in tl.range(first, last, BLOCK_M):
        o_member = start + tl.arange(0, BLOCK_M)
        m_member = o_member < last
        row = tl.load(p_order + o_member, mask=m_member, other=0)
        mask = m_member[:, None] & m_column
        total += tl.sum(
            tl.load(p_values + row[:, None] * D + o_column[None, :], mask=mask, other=0.0).to(ACC), 0
        )
    tl.store(p_out + i_segment * D + o_column, total.to(p_out.dtype.element_ty), mask=o_column < D)


class Launch(NamedTuple):
    """One launch of a kernel, as :func:`recorded_launches` keeps it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    variant: str
    beside: bool = False  # whether it may run at the same time as those that follow


_recorder: list[Launch] | None = None
_beside: ContextVar[bool] = ContextVar("launches may run beside those that follow", default=False)
_overrides: Mapping[str, Mapping[str, Any]] = {}
_rung: str | None = None
_target: tuple[str, int] | None = None
CONFIGS = Path(__file__).parents[1] / "configs"
# What launches are recorded for.
TYPICAL_MULTIPROCESSORS = 132
# Blocks along the second and third axis of a CUDA grid.
MAX_GRID = 65535
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@contextlib.contextmanager
def recorded_launches(target: tuple[str, int]) -> Iterator[list[Launch]]:
    """Record launches for a GPU of a given (name, compute capability) instead of launching; for one thread."""
    global _recorder, _target
    _recorder, _target = [], target
    try:
        yield _recorder
    finally:
        _recorder = _target = None


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Tell a recording that these launches may run at the same time as those that follow."""
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


@contextlib.contextmanager
def overridden_settings(settings: Mapping[str, Mapping[str, Any]], rung: str | None = None) -> Iterator[None]:
    """Use other launch settings per variant: ``{"linear": {"BLOCK_M": 64, ...}}``; for tuning and tests.

    Args:
        settings: of the variants that shall have others.
        rung: the variant of a product to use whatever its size, where it can be.
    """
    global _overrides, _rung
    previous, _overrides, _rung = (_overrides, _rung), {**_overrides, **settings}, rung or _rung
    try:
        yield
    finally:
        _overrides, _rung = previous


def forced_rung() -> str | None:
    """The variant of a product that :func:`overridden_settings` demands."""
    return _rung


def user_settings_path(device_name: str) -> Path:
    """Where ``vitup-fast tune`` keeps settings of a GPU: below ``VITUP_FAST_CACHE``, by default in ``~/.cache``.

    Raises:
        InputError: there is no home folder to find it from.
    """
    chosen = os.environ.get("VITUP_FAST_CACHE")
    try:
        base = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "vitup_fast"
    except RuntimeError as error:
        got = repr(chosen) if chosen else "none, and there is no home folder"
        raise expected("VITUP_FAST_CACHE", "a folder for launch settings", got) from error
    return base / "configs" / config_file_name(device_name)


def config_file_name(device_name: str) -> str:
    """File name of a GPU's settings: its name, with anything but letters and digits as underscores."""
    return "".join(c if c.isalnum() else "_" for c in device_name) + ".json"


def _version(text: str) -> tuple[int, int]:
    """Major and minor version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def read_settings(path: Path) -> dict[str, Any]:
    """Read launch settings: Triton version, kind of dtype, variant and width (or ``"default"``) lead to numbers.

    Raises:
        InputError: the file cannot be read, or holds something else; names the place in it.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            raise IsADirectoryError("not a file")
        settings = json.loads(path.read_bytes())
        _check_settings(settings, ("Triton version", "kind", "variant", "width"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise expected(
            brief(path, 200),
            "launch settings as JSON",
            reason,
            "Remove the file, and run `vitup-fast tune` to make it anew.",
        ) from error
    return settings


def _check_settings(settings: object, levels: Sequence[str], place: str = "the file") -> None:
    """Raise a ValueError that names the first place where launch settings are something else."""
    if not isinstance(settings, dict) or not (settings or levels):
        raise ValueError(f"{brief(json.dumps(settings))} as {place}")
    for key, value in settings.items():
        name = f"{brief(key)!r} in {place}"
        if levels:
            if levels[0] == "Triton version" and not re.fullmatch(r"\d{1,9}\.\d{1,9}(\..*)?", key):
                raise ValueError(f"the Triton version {name}")
            _check_settings(value, levels[1:], name)
        else:
            least, most = (16, 1024) if key.startswith("BLOCK_") else (1, 32 if key == "num_warps" else 1024)
            power_of_two = key.startswith("BLOCK_") or key == "num_warps"
            valid = type(value) is int and least <= value <= most
            if not valid or (power_of_two and value & (value - 1)):
                raise ValueError(f"{brief(json.dumps(value))} as {name}")


def _for_this_triton(by_version: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of the newest Triton version that is not newer than the running one, else of the oldest."""
    running = _version(triton.__version__)
    known = sorted(by_version, key=_version)
    suitable = [v for v in known if _version(v) <= running]
    return by_version[suitable[-1] if suitable else known[0]] if known else {}


def _user_settings(device_name: str) -> list[Path]:
    """The user's settings file if there is one; without a home folder, or one that is closed, there is none."""
    try:
        path = user_settings_path(device_name)
        path.stat()
    except FileNotFoundError:
        return []
    except (OSError, InputError) as error:
        if not os.environ.get("VITUP_FAST_CACHE"):
            return []
        if isinstance(error, InputError):
            raise
        raise expected(
            "VITUP_FAST_CACHE", "a folder for launch settings", f"{brief(path.parents[1])} ({error.strerror})"
        ) from error
    return [path]


@cache
def _tables(device_name: str, capability: int) -> list[tuple[Path, Mapping[str, Any]]]:
    """Tables of settings to look up in turn: the user's, this GPU's, this architecture's, an older one's."""
    known = sorted(int(path.stem.removeprefix("sm_")) for path in CONFIGS.glob("sm_*.json"))
    architectures = [sm for sm in reversed(known) if sm <= capability] or known[:1]
    shipped = [CONFIGS / config_file_name(device_name), *(CONFIGS / f"sm_{sm}.json" for sm in architectures)]
    paths = [*_user_settings(device_name), *(path for path in shipped if path.is_file())]
    return [(path, _for_this_triton(read_settings(path))) for path in paths]


@cache
def _device(index: int) -> tuple[str, int]:
    """Name and compute capability of a GPU, such as 90."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), 10 * major + minor


def target_of(x: Tensor) -> tuple[str, int]:
    """Name and compute capability of the GPU that a tensor lies on; the interpreter passes for the oldest."""
    if _target is not None:
        return _target
    return _device(x.device.index) if x.is_cuda else ("interpreter", 80)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; the interpreter is one."""
    if _target is not None:
        return TYPICAL_MULTIPROCESSORS
    return _multiprocessors(device.index) if device.type == "cuda" else 1


@cache
def _setting(variant: str, kind: str, width: int, device_name: str, capability: int) -> dict[str, Any]:
    tables = _tables(device_name, capability)
    needed = tables[-1][1][kind][variant]["default"].keys()
    for path, table in tables:
        by_width = table.get(kind, {}).get(variant, {})
        settings = by_width.get(str(width), by_width.get("default"))
        if settings is None:
            continue
        missing, unknown = sorted(needed - settings), sorted(settings.keys() - needed - {*OPTIONS})
        if missing or unknown:
            fault = [f"none of {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown)
            raise expected(
                brief(path, 200),
                f"{sorted(needed)} for {variant} in {kind}",
                " and ".join(fault),
                "Run `vitup-fast tune`.",
            )
        return dict(settings)
    raise LookupError(f"no launch settings for {variant} in {kind}")


def settings_for(variant: str, x: Tensor, width: int) -> dict[str, Any]:
    """Launch settings of a kernel's variant for the dtype and GPU of ``x`` and a width."""
    if variant in _overrides:
        return dict(_overrides[variant])
    kind = "half" if x.dtype.itemsize == 2 else "float32"
    return _setting(variant, kind, width, *target_of(x))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, variant: str, **options: object) -> None:
    """Launch a kernel, or the compiled one in its place, on the device of its first tensor.

    Raises:
        InputError: more images than a grid has places for.
        KernelError: it does not compile or does not fit; names kernel, settings and GPU.
    """
    if max(grid[1:], default=0) > MAX_GRID:
        raise expected(
            "x", f"at most {MAX_GRID} images or parts of them at once", max(grid[1:]), "Split the batch."
        )
    if _recorder is not None:
        _recorder.append(Launch(kernel, arguments, options, variant, _beside.get()))
        return
    if 0 in grid:
        return
    if runs_compiled(kernel.fn.__name__):
        launch_compiled(kernel.fn.__name__, grid, arguments, options)
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
    guard = torch.cuda.device(first.device) if elsewhere else contextlib.nullcontext()
    try:
        with guard:
            kernel[grid](*arguments, **options, enable_fp_fusion=True)
    except (CompilationError, OutOfResources, PTXASError) as error:
        name, capability = target_of(first)
        settings = {k: v for k, v in options.items() if isinstance(v, int | str) and not isinstance(v, bool)}
        raise KernelError(
            f"{kernel.fn.__name__} ({variant}) failed on {name} (sm_{capability}) with Triton {triton.__version__}"
            f" and settings {settings}: {error}. Other settings may work: `vitup-fast tune`; or use impl='torch'."
        ) from error


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Dtype in which a kernel computes and accumulates: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The torch dtype of :func:`accumulator`."""
    return torch.promote_types(dtype, torch.float32)


def centers(dtype: torch.dtype) -> bool:
    """Whether rows are normalised before their product, not after it."""
    return dtype.itemsize > 2


def gelu_kind(dtype: torch.dtype) -> int:
    """How GELU is computed in a dtype: as exactly as the dtype can show."""
    return _GELU_KINDS.get(dtype, GELU_EXACT.value)


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: that of PyTorch's own, see ``torch.set_float32_matmul_precision``."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def dividing_block(width: int, block: int) -> int:
    """Largest power of two up to ``block`` that divides ``width``."""
    return min(block, width & -width)


def row_blocks(x: Tensor, D: int) -> dict[str, Any]:
    """Settings of kernels that hold whole rows in registers."""
    block_d = triton.next_power_of_2(D)
    block_m = max(1, 4096 // block_d)
    return {"BLOCK_M": block_m, "BLOCK_D": block_d, "ACC": accumulator(x.dtype), "num_warps": 4}


def positions(coords: Tensor, features: Tensor) -> Tensor:
    """Coordinates in the precision in which positions are computed: their own, or float64 with such features."""
    return coords.to(torch.promote_types(coords.dtype, features.dtype)).contiguous()


def measure_moments(x: Tensor) -> Tensor:
    """Moments of the rows of ``x``; ``[M, D] -> [M, 1, 2]``."""
    M, D = x.shape
    moments = torch.empty(M, 1, 2, dtype=wide(x.dtype), device=x.device)
    blocks = row_blocks(x, D)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]),)
    launch(normalize_kernel, grid, x, x, moments, M, D=D, STORE_NORMED=False, variant="rows", **blocks)
    return moments


def normalize(x: Tensor) -> Tensor:
    """Rows of ``x`` with zero mean and unit variance; ``[M, D] -> [M, D]``."""
    M, D = x.shape
    normed = x.new_empty(x.shape)
    blocks = row_blocks(x, D)
    grid = (triton.cdiv(M, blocks["BLOCK_M"]),)
    launch(normalize_kernel, grid, x, normed, normed, M, D=D, STORE_NORMED=True, variant="rows", **blocks)
    return normed


def layer_norm_backward(
    grad: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    weight: Tensor | None = None,  # [D]
    residual: Tensor | None = None,  # [M, D]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of LayerNorm for x plus a residual's; with a weight also those of weight and bias, summed wide."""
    M, D = x.shape
    blocks = row_blocks(x, D)
    programs = triton.cdiv(M, blocks["BLOCK_M"])
    grad_x = x.new_empty(x.shape)
    partial = (
        torch.empty(programs, 2, D, dtype=wide(x.dtype), device=x.device) if weight is not None else None
    )
    launch(
        layer_norm_backward_kernel,
        (programs,),
        grad,
        x,
        x if weight is None else weight,
        x if residual is None else residual,
        grad_x,
        grad_x if partial is None else partial,
        M,
        D=D,
        AFFINE=weight is not None,
        RESIDUAL=residual is not None,
        variant="rows",
        **blocks,
    )
    if partial is None:
        return grad_x, None, None
    return grad_x, partial[:, 0].sum(0), partial[:, 1].sum(0)


def segments(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Order that sorts row numbers by segment, and where each segment begins; ``[M] -> [M], [count + 1]``."""
    values, order = torch.sort(index, stable=True)
    bounds = torch.arange(count + 1, dtype=torch.int64, device=index.device)
    return order, torch.searchsorted(values, bounds)


def segment_sum(values: Tensor, index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each segment without atomics, so that the result is deterministic.

    Args:
        values: rows to sum.  # [M, D]
        index: segment of each row, int64.  # [M]
        count: number of segments S.
        dtype: dtype of the sums; they accumulate in float32 or better.

    Returns:
        Sums ``[S, D]``.
    """
    D = values.shape[1]
    order, offsets = segments(index, count)
    out = torch.empty(count, D, dtype=dtype, device=values.device)
    launch(
        segment_sum_kernel,
        (count, triton.cdiv(D, 128)),
        values,
        order,
        offsets,
        out,
        D=D,
        BLOCK_M=32,
        BLOCK_D=128,
        ACC=accumulator(values.dtype),
        variant="rows",
        num_warps=4,
    )
    return out
