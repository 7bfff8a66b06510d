"""What the network really launches: its own calls, recorded as for a GPU instead of run.

The compile report, the model and the tests take kernels, tiles and sizes from here, so that what is compiled, modelled
and checked is what runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vitup_fast.kernels.triton import common

from vitup_fast import ImageCache, ViTUp, ViTUpConfig
from vitup_fast.ops.operator import Backend, backend, register_backend
from vitup_fast.testing import random_coords
from vitup_fast.walks.plan import gpu_chunk

TOKENS, PATCHES, CLASSES = (28, 28), (224, 224), 150


@contextlib.contextmanager
def recording(capability: int) -> Iterator[list[common.Launch]]:
    """Record launches as for a GPU of a compute capability, of tensors that lie in the CPU's memory."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = (
        "1"  # kernels take tensors of the CPU then; they are recorded, not interpreted
    )
    try:
        with common.recorded_launches(("", capability)) as launches:
            yield launches
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


class Operation(NamedTuple):
    """An operation of PyTorch that computes or copies something.

    Attributes:
        name: its name.
        nbytes: what it reads and writes.
    """

    name: str
    nbytes: int


class _Operations(TorchDispatchMode):
    """Notes operations of PyTorch, but for views and those of this library, which contain others."""

    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), results))
        memory = {t.untyped_storage().data_ptr() for t in read}
        computes = function._schema.is_mutable or any(
            t.untyped_storage().data_ptr() not in memory for t in made
        )
        if computes and function.namespace == "aten" and "empty" not in function.__name__:
            self.found.append(Operation(function.__name__, sum(t.nbytes for t in (*read, *made))))
        return results


@contextlib.contextmanager
def recording_operations(found: list[Any]) -> Iterator[None]:
    """Record the operations of PyTorch as well, those between a kernel's launches too."""
    usual = backend("triton")

    def watched(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        def run(*arguments: object) -> Any:
            with _Operations(found):
                return function(*arguments)

        return function and run

    kernels = {
        name: k._replace(forward=watched(k.forward), backward=watched(k.backward))
        for name, k in usual.kernels.items()
    }
    register_backend("triton", Backend(kernels))
    try:
        with _Operations(found):
            yield
    finally:
        register_backend("triton", usual)


def network_and_cache(
    config: ViTUpConfig, dtype: torch.dtype, capability: int = 90
) -> tuple[ViTUp, list[Tensor], ImageCache]:
    """A network with an image of 28 x 28 tokens, whose numbers nobody reads: hidden states and cache."""
    net = ViTUp(config).to(dtype)
    hidden = [
        torch.zeros(1, *TOKENS, config.dim, dtype=dtype, device="cpu") for _ in range(config.num_layers)
    ]
    grid = torch.zeros(1, *PATCHES, config.dim, dtype=dtype, device="cpu")
    with recording(capability), torch.no_grad():
        cache = net.prepare(hidden, grid, impl="triton")
    return net, hidden, cache


def dense(net: ViTUp, hidden: list[Tensor], cache: ImageCache, side: int, **options: object) -> None:
    """A map of ``side`` x ``side`` queries."""
    with torch.no_grad():
        net.dense(cache, (side, side), impl="triton", **options)


def scattered(net: ViTUp, hidden: list[Tensor], cache: ImageCache, count: int) -> None:
    """Queries of an image that is prepared."""
    coords = random_coords(torch.Generator().manual_seed(0), 1, count)
    with torch.no_grad():
        net(cache, coords, impl="triton")


def prepared(net: ViTUp, hidden: list[Tensor], cache: ImageCache) -> None:
    """Another image."""
    with torch.no_grad():
        net.prepare(hidden, cache.patch_grid, impl="triton")


def labelled(net: ViTUp, hidden: list[Tensor], cache: ImageCache, labels: bool) -> None:
    """Scores or labels of a linear head."""
    weight = torch.zeros(CLASSES, net.config.dim, dtype=net.dtype, device="cpu")
    head = weight, torch.zeros(CLASSES, dtype=net.dtype, device="cpu")
    dense(net, hidden, cache, 448, head=head, labels=labels)


def trained(net: ViTUp, hidden: list[Tensor], cache: ImageCache) -> None:
    """Forward and backward pass of one chunk and one block, from hidden states to the gradients of everything.

    Other blocks and chunks launch the same, and what lies between the launches takes its time here.
    """
    net = ViTUp(ViTUpConfig(net.config.dim, net.config.num_heads, (0, 1))).to(net.dtype)
    differentiated(net, hidden[:2], cache)


def differentiated(net: ViTUp, hidden: list[Tensor], cache: ImageCache) -> None:
    """The same by a given network."""
    hidden = [h.clone().requires_grad_() for h in hidden]
    grid = cache.patch_grid.clone().requires_grad_()
    chunk = gpu_chunk(common.TYPICAL_MULTIPROCESSORS, net.config.dim)
    coords = random_coords(torch.Generator().manual_seed(0), 1, chunk).requires_grad_()
    outputs = net(net.prepare(hidden, grid, impl="triton"), coords, return_all_layers=True, impl="triton")
    torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])


# The calls that the goals and the benchmarks name.
CALLS: Mapping[str, Callable[[ViTUp, list[Tensor], ImageCache], None]] = {
    "prepare": prepared,
    "dense 448": partial(dense, side=448),
    "dense 1024": partial(dense, side=1024),
    "scattered 4096": partial(scattered, count=4096),
    "scores 448": partial(labelled, labels=False),
    "labels 448": partial(labelled, labels=True),
    "training": trained,
}


def network_launches(
    config: ViTUpConfig, dtype: torch.dtype, capability: int, calls: tuple[str, ...] = tuple(CALLS)
) -> dict[str, list[common.Launch]]:
    """The launches of each call, the second of its kind: weights are folded by then."""
    made = network_and_cache(config, dtype, capability)
    found = {}
    for name in calls:
        with recording(capability) as launches:
            CALLS[name](*made)
        found[name] = launches
    return found


def training_launches(
    config: ViTUpConfig, dtype: torch.dtype, capability: int
) -> tuple[int, list[common.Launch | Operation]]:
    """Queries of a chunk, and what their forward and backward pass through all blocks launches, PyTorch's too."""
    made = network_and_cache(config, dtype, capability)
    with recording(capability) as launches, recording_operations(launches):
        differentiated(*made)
    return gpu_chunk(common.TYPICAL_MULTIPROCESSORS, config.dim), launches
