"""Argument checks that the operations share: each failure names the argument, what was expected, what came."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import expected

FEATURE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COORDINATE_DTYPES = (torch.float32, torch.float64)
# What PyTorch runs around a module's forward when the module is called, and only then.
HOOKS = {
    "_forward_pre_hooks": "a hook before it",
    "_forward_hooks": "a hook after it",
    "_backward_pre_hooks": "a hook before its backward pass",
    "_backward_hooks": "a hook on its backward pass",
}


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return a whole number of at least ``least``: a Python or NumPy integer, no boolean, float or tensor."""
    try:
        count = None if isinstance(value, bool | Tensor) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise expected(name, kind, repr(value))
    return count


def check_budget(query_chunk_size: object, max_memory: object) -> tuple[int | None, int | None]:
    """Return queries per chunk and bytes of memory, of which one at most may be given."""
    if query_chunk_size is not None and max_memory is not None:
        raise expected("query_chunk_size and max_memory", "one of the two", "both")
    return (
        None if query_chunk_size is None else check_count("query_chunk_size", query_chunk_size),
        None if max_memory is None else check_count("max_memory", max_memory),
    )


def module_hooks(module: nn.Module) -> list[str]:
    """Name the hooks of a module, which run only when it is called."""
    return [
        f"{text}: {getattr(hook, '__name__', type(hook).__name__)}"
        for attribute, text in HOOKS.items()
        for hook in getattr(module, attribute).values()
    ]


def check_layer(name: str, layer: nn.Module, kind: type[nn.Module]) -> None:
    """Check a layer that is read and never called: its weight and bias must say all that it computes.

    Parametrizations of them are honoured. Wrappers, subclasses with a ``forward`` of their own, and hooks are
    refused; the old ``weight_norm`` and ``spectral_norm`` and ``prune`` are such hooks.
    """
    inherited = all(
        method not in vars(layer) and getattr(type(layer), method, None) is getattr(kind, method, None)
        for method in ("__call__", "forward", "_conv_forward")
    )
    hooks = module_hooks(layer)
    if hooks or not inherited:
        raise expected(
            name,
            f"a plain {kind.__name__}, since its parameters are read and it is never called",
            ", ".join(hooks)
            if inherited
            else f"{type(layer).__module__}.{type(layer).__qualname__} with a forward of its own",
            "Merge what wraps it and remove its hooks; parametrizations (torch.nn.utils.parametrize) are honoured.",
        )


def check_plain(name: str, tensor: Tensor) -> None:
    """Check that a tensor is dense: not sparse, nested, packed for oneDNN, or spread over processes."""
    if tensor.is_nested or tensor.layout != torch.strided:
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise expected(name, "a dense tensor", got, "Use to_dense() or to_padded_tensor().")
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        raise expected(name, "a plain tensor", type(tensor).__name__)


def check_values(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds values, as those on the meta device, fake and lazy ones do not."""
    kinds = {
        "on the meta device": tensor.is_meta,
        "that is fake": is_fake(tensor),
        "not yet made": is_lazy(tensor),
    }
    for kind, found in kinds.items():
        if found:
            raise expected(name, "a tensor that holds values", f"one {kind}")


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether kernels may be given the addresses of these tensors, and of memory allocated now, past PyTorch.

    Not so while PyTorch traces, compiles, transforms or otherwise watches what is called; nor for a fake, batched or
    dual tensor, a subclass (DTensor), one without memory of its own numbers (meta, sparse, quantised, oneDNN's blocked
    layout), or a view that stands for the conjugate or negative of its memory. Gradients are the caller's concern.
    """
    if torch.compiler.is_compiling():
        return False
    watched = (
        torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    return not watched and all(t is None or _is_plain(t) for t in tensors)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers at its address."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not torch._is_functional_tensor(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not is_dual(tensor)
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def is_dual(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def check_tensor(name: str, tensor: Tensor, shape: str | Sequence[int]) -> None:
    """Check that an argument is a tensor, and a dense one."""
    if not isinstance(tensor, Tensor):
        shape = shape if isinstance(shape, str) else tuple(shape)
        raise expected(name, f"a tensor of shape {shape}", type(tensor).__name__)
    check_plain(name, tensor)


def check_features(name: str, x: Tensor, shape: str, width: int | None = None) -> None:
    """Check a feature tensor: ``shape`` such as ``"(B, N, D)"`` gives its rank, ``width`` its last size."""
    rank = shape.count(",") + 1
    check_tensor(name, x, shape)
    if x.dim() != rank:
        raise expected(name, f"shape {shape}", tuple(x.shape))
    if x.dtype not in FEATURE_DTYPES:
        raise expected(name, "a floating dtype", x.dtype)
    if width is not None and x.shape[-1] != width:
        raise expected(name, f"shape {shape} with last size {width}", tuple(x.shape))
    if x.shape[-1] == 0:
        raise expected(name, "a width of at least 1", tuple(x.shape))


def check_coords(coords: Tensor, batch: int | None = None, count: int | None = None) -> None:
    """Check coordinates: ``(B, N, 2)``, float32 or float64, with the given B and N where known."""
    check_tensor("coords", coords, "(B, N, 2)")
    if coords.dim() != 3 or coords.shape[-1] != 2:
        raise expected("coords", "shape (B, N, 2) holding (x, y) in [0, 1]", tuple(coords.shape))
    if coords.dtype not in COORDINATE_DTYPES:
        raise expected(
            "coords",
            "dtype float32 or float64",
            coords.dtype,
            "Half-precision coordinates are off by up to a pixel; build them in float32.",
        )
    if batch is not None and coords.shape[0] != batch:
        raise expected("coords", f"batch size {batch}", f"{coords.shape[0]} in shape {tuple(coords.shape)}")
    if count is not None and coords.shape[1] != count:
        raise expected("coords", f"{count} queries", f"{coords.shape[1]} in shape {tuple(coords.shape)}")


def check_matrix(name: str, weight: Tensor, shape: str) -> None:
    """Check that a parameter is a matrix, so that its sizes can be asked for; packed ones are this library's own."""
    if not (isinstance(weight, Tensor) and weight.is_mkldnn):
        check_features(name, weight, shape)


def check_weight(name: str, weight: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Check a parameter's shape, and that dtype and device are those of the features it meets."""
    if not (isinstance(weight, Tensor) and weight.is_mkldnn):  # packed weights are this library's own
        check_tensor(name, weight, shape)
    if tuple(weight.shape) != tuple(shape):
        raise expected(name, f"shape {tuple(shape)}", tuple(weight.shape))
    check_alike(name, weight, like)


def check_alike(name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that a tensor has the dtype and device of the features it meets."""
    if tensor.dtype != like.dtype:
        raise expected(name, f"dtype {like.dtype} like the features", tensor.dtype)
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that a tensor lies on the device of the features it meets."""
    if tensor.device != like.device:
        raise expected(name, f"device {like.device} like the features", tensor.device)


def check_frequencies(name: str, frequencies: Tensor, like: Tensor, count: int | None = None) -> Tensor:
    """Check frequencies, ``count`` of them where known, and return them as float32: as that they are taken."""
    check_tensor(name, frequencies, "(F,)")
    if frequencies.dim() != 1 or frequencies.shape[0] == 0:
        raise expected(name, "shape (F,) with at least one frequency", tuple(frequencies.shape))
    if frequencies.dtype not in FEATURE_DTYPES:
        raise expected(name, "a floating dtype", frequencies.dtype)
    if count is not None and frequencies.shape[0] != count:
        raise expected(name, f"{count} frequencies", tuple(frequencies.shape))
    check_device(name, frequencies, like)
    return frequencies.to(torch.float32)


def check_token_grid(token_grid: Sequence[int]) -> tuple[int, int]:
    """Check rows and columns of the tokens, and return them as integers."""
    try:
        h, w = (n if isinstance(n, torch.SymInt) else operator.index(n) for n in token_grid)
    except (TypeError, ValueError):
        raise expected("token_grid", "two integers (h, w)", repr(token_grid)) from None
    if h < 1 or w < 1:
        raise expected("token_grid", "at least one row and one column", (h, w))
    return h, w
