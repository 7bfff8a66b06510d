"""What operations and walks take of a network, and whether it has changed since.

Layers are read, never called. What a layer wraps or hooks is therefore honoured (parametrizations) or refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import extension
from ..errors import expected
from ..ops import AttentionWeights, FilmWeights, MLPWeights, PositionWeights
from ..ops.checks import check_layer
from ..ops.primitives import LAYER_NORM_EPS

Nested = TypeVar("Nested")

# Where reading every weight costs at most two percent of a call: queries, or bytes of all weights.
EVERY_VALUE_QUERIES = 4096
EVERY_VALUE_BYTES = 4 << 20
# Bytes of tensors that PyTorch is given at once for a checksum.
CHECKSUM_BYTES = 16 << 20
# Tensors that are read as a whole wherever some of them are: vectors, and matrices of short rows.
SMALL_BYTES = 1 << 17


class ImageWeights(NamedTuple):
    """Parameters of one block that the image alone passes through: LNg, Wk, bk, Wv, bv, LNin."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    key_weight: Tensor  # [D, D]
    key_bias: Tensor  # [D]
    value_weight: Tensor  # [D, D]
    value_bias: Tensor  # [D]
    token_norm_weight: Tensor  # [D]
    token_norm_bias: Tensor  # [D]


class BlockWeights(NamedTuple):
    """Parameters of one block as the operations take them."""

    transition: MLPWeights
    attention: AttentionWeights
    position: PositionWeights
    film: FilmWeights
    mlp: MLPWeights
    image: ImageWeights


class DecoderWeights(NamedTuple):
    """Parameters of one decoder as :func:`vitup_fast.ops.norm_linear` takes them."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    weight: Tensor  # [E, D]
    bias: Tensor  # [E]


class NetworkWeights(NamedTuple):
    """Parameters and constants of a whole network."""

    blocks: list[BlockWeights]
    decoders: list[DecoderWeights]
    freqs: Tensor  # [F] float32
    inv_freq: Tensor  # [d / 4] float32

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        groups = [*self.decoders]
        for transition, attention, position, film, mlp, image in self.blocks:
            groups += (transition, attention, position, film[0], film[1:], mlp, image)
        return list(chain.from_iterable(groups))

    @property
    def tensors(self) -> list[Tensor]:
        """Everything: parameters and constants."""
        return [*self.parameters, self.freqs, self.inv_freq]

    def map(self, fn: Callable[[Tensor], Tensor]) -> NetworkWeights:
        """Apply a function to every parameter."""
        return self._replace(blocks=_map(self.blocks, fn), decoders=_map(self.decoders, fn))

    def recordable(self) -> NetworkWeights:
        """Everything as autograd can save it."""
        constants = {"freqs": recordable(self.freqs), "inv_freq": recordable(self.inv_freq)}
        return self.map(recordable)._replace(**constants)


def _map(value: Nested, fn: Callable[[Tensor], Tensor]) -> Nested:
    """Apply ``fn`` to every tensor of nested named tuples and lists."""
    if isinstance(value, Tensor):
        return fn(value)
    mapped = [_map(v, fn) for v in value]
    return mapped if isinstance(value, list) else type(value)(*mapped)


def collect(root: nn.Module) -> NetworkWeights:
    """Read the parameters of a network whose modules carry the published names.

    Raises:
        InputError: a layer wraps, hooks or is something else than what is read of it.
    """
    blocks = _open(root._modules, "", "vit_up_blocks")
    decoders = _open(root._modules, "", "decoder_mlp")
    block_weights = [_block(*_open(*blocks, part)) for part in blocks[0]]
    decoder_weights = [
        DecoderWeights(*_mlp(*decoders, part, (nn.LayerNorm, nn.Linear))) for part in decoders[0]
    ]
    device = decoder_weights[0].weight.device  # also a meta device, to which constants do not move
    constants = root.rel_pos_enc.freqs.to(device), root.rope.inv_freq.to(device)
    return NetworkWeights(block_weights, decoder_weights, *constants)


_Children = dict[str, nn.Module]
_TWO_LAYERS = (nn.Linear, nn.GELU, nn.Linear)
_NORM_AND_TWO_LAYERS = (nn.LayerNorm, *_TWO_LAYERS)


def _block(children: _Children, name: str) -> BlockWeights:
    """Collect the parameters of one block."""
    attention, featx = _open(children, name, "cross_attention"), _open(children, name, "featx")

    def norm(part: str, of: tuple[_Children, str] = (children, name)) -> tuple[Tensor, Tensor]:
        return _read(*of, part, nn.LayerNorm)

    query, key, value, out = (_read(*attention, f"{part}_proj", nn.Linear) for part in ("q", "k", "v", "out"))
    post = MLPWeights(*_mlp(*featx, "post_mlp", _NORM_AND_TWO_LAYERS))
    return BlockWeights(
        MLPWeights(*_mlp(children, name, "transition_mlp", _NORM_AND_TWO_LAYERS)),
        AttentionWeights(*norm("norm_q_global"), *query, *out),
        PositionWeights(*_mlp(*featx, "gamma_beta_mlp", _TWO_LAYERS)),
        FilmWeights(post, *norm("norm_h_local")),
        MLPWeights(*norm("norm_post"), *_mlp(children, name, "mlp", _TWO_LAYERS)),
        ImageWeights(*norm("norm_h_global"), *key, *value, *norm("norm_input", featx)),
    )


def _open(children: _Children, parent: str, part: str) -> tuple[_Children, str]:
    """Look into a module that is passed through: its children, and its name."""
    module, name = children.get(part), f"{parent}.{part}" if parent else part
    if module is None:
        raise expected(parent or "network", f"a module that holds {part}", ", ".join(children) or "none")
    if _is_wrapped(module):
        check_layer(name, module, type(module))
    return module._modules, name


def _mlp(children: _Children, parent: str, part: str, kinds: Sequence[type[nn.Module]]) -> list[Tensor]:
    """Parameters of an MLP, a sequence of layers of the given kinds called ``mlp``."""
    layers, name = _open(*_open(children, parent, part), "mlp")
    # Dropout does nothing in evaluation, and at a rate of zero.
    kept = [k for k, m in layers.items() if not (isinstance(m, nn.Dropout) and (m.p == 0 or not m.training))]
    if len(kept) != len(kinds):
        wanted, found = (", ".join(k.__name__ for k in t) for t in (kinds, map(type, layers.values())))
        raise expected(name, f"the layers {wanted}", found or "none")
    tensors: list[Tensor] = []
    for key, kind in zip(kept, kinds, strict=True):
        if kind is not nn.GELU:
            tensors += _read(layers, name, key, kind)
        elif type(layers[key]) is not nn.GELU or layers[key].approximate != "none":
            raise expected(f"{name}.{key}", "nn.GELU(), the exact one", repr(layers[key]))
        elif _is_wrapped(layers[key]):
            check_layer(f"{name}.{key}", layers[key], nn.GELU)
    return tensors


def _read(children: _Children, parent: str, part: str, kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer or LayerNorm."""
    layer = children.get(part)
    if type(layer) is not kind or _is_wrapped(layer):
        if not isinstance(layer, nn.Module):
            raise expected(parent, f"a module that holds {part}", ", ".join(children) or "none")
        check_layer(f"{parent}.{part}", layer, kind)
    parameters = layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None:  # computed by a parametrization, or plain tensors in a replica
        weight, bias = layer.weight, layer.bias
    if weight is None or bias is None:
        raise expected(f"{parent}.{part}", "a layer with weight and bias", repr(layer))
    if kind is nn.LayerNorm and layer.eps != LAYER_NORM_EPS:
        raise expected(f"{parent}.{part}", f"eps = {LAYER_NORM_EPS}", layer.eps)
    return weight, bias


def _is_wrapped(module: nn.Module) -> bool:
    """Whether calling a module would run more than the forward of its class."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def parameters_and_buffers(root: nn.Module) -> list[Tensor]:
    """All parameters and buffers below a module, in a fraction of the time that its own iterators take."""
    found: list[Tensor] = []
    modules = [root]
    while modules:
        module = modules.pop()
        found += [t for t in module._parameters.values() if t is not None]
        found += [t for t in module._buffers.values() if t is not None]
        modules += [m for m in module._modules.values() if m is not None]
    return found


def recordable(t: Tensor) -> Tensor:
    """The tensor itself, or a copy of an inference tensor, which autograd could not save."""
    if torch.compiler.is_compiling() or not t.is_inference() or torch.is_inference_mode_enabled():
        return t
    return t.clone()


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """In inference mode, compute without gradients but make tensors that outlive the mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class Look(IntEnum):
    """How closely tensors are looked at for writes that PyTorch does not count; rows are those of matrices."""

    NONE = -1
    EVERY_VALUE = 0
    EVERY_ROW = 1  # 64 bytes of each
    SOME_ROWS = 32  # 64 bytes of each that many


def affordable_look(tensors: Sequence[Tensor], queries: int | None) -> Look:
    """How closely to look at weights, so that it costs at most two percent of what it precedes.

    Args:
        tensors: the weights.
        queries: of the call that it precedes; None for the projection of a new image.
    """
    if tensors[0].device.type != "cpu":
        # A GPU reads everything at once, but has to be waited for.
        return Look.EVERY_VALUE if queries is None else Look.NONE
    large_call = queries is not None and queries >= EVERY_VALUE_QUERIES
    if large_call or sum(t.nbytes for t in tensors) <= EVERY_VALUE_BYTES:
        return Look.EVERY_VALUE
    return Look.EVERY_ROW if queries is None else Look.SOME_ROWS


class Snapshot:
    """Which tensors something was made from, and what they held then.

    Tensors are known by themselves, their memory, layout and version; none but parameters is kept alive. Writes that
    PyTorch does not count (through ``.data``, NumPy, or to inference tensors) show in checksums over their bytes.

    Args:
        tensors: what it was made from.
        checksums: whether checksums are taken too; of inference tensors they are in any case.
    """

    def __init__(self, tensors: Sequence[Tensor], *, checksums: bool = False) -> None:
        # Parameters are held: torch.utils.swap_tensors refuses those with weak references.
        self._references = [
            partial(_itself, t) if isinstance(t, nn.Parameter) else weakref.ref(t) for t in tensors
        ]
        self._facts = [_facts(t) for t in tensors]
        self._uncounted = any(t.is_inference() for t in tensors)
        self._compiled = extension.obstacle("cpu") is None and all(t.device.type == "cpu" for t in tensors)
        contiguous = all(t.is_contiguous() for t in tensors)
        self._memory = Memory.of(tensors) if self._compiled and contiguous else None
        looks = [Look.EVERY_VALUE] if checksums or self._uncounted else []
        looks += [Look.EVERY_ROW, Look.SOME_ROWS] if checksums else []
        self._checksums = {look: self._checksum(tensors, look) for look in looks}

    def holds(self, tensors: Sequence[Tensor], look: Look = Look.NONE) -> bool:
        """Whether these are still the same tensors with the same values, as far as a look at them shows."""
        if len(tensors) != len(self._references):
            return False
        for t, reference, facts in zip(tensors, self._references, self._facts, strict=True):
            if reference() is not t or _facts(t) != facts:
                return False
        look = Look.EVERY_VALUE if self._uncounted else look
        return look == Look.NONE or self._checksums[look] == self._checksum(tensors, look)

    def _checksum(self, tensors: Sequence[Tensor], look: Look) -> int:
        """Checksum of what the tensors hold now."""
        if self._memory is not None:
            return self._memory.checksum(look)
        if not self._compiled:  # other devices read all of it as fast as some
            return _portable_checksum(tensors) if look == Look.EVERY_VALUE else 0
        contiguous = [t.contiguous() for t in tensors]  # held until their memory has been read
        return Memory.of(contiguous).checksum(look)


def _itself(t: Tensor) -> Tensor:
    return t


def _facts(t: Tensor) -> tuple[object, ...]:
    """Where a tensor's memory lies, how it is laid out, and how often PyTorch wrote to it."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, None if t.is_inference() else t._version


class _Regions(NamedTuple):
    """Pieces of memory."""

    addresses: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Regions:
        """Look up where contiguous tensors lie."""
        return cls([t.data_ptr() for t in tensors], [t.nbytes for t in tensors])


class Memory(NamedTuple):
    """Where contiguous tensors of the CPU lie; the caller keeps them alive."""

    everything: _Regions
    small: _Regions  # read as a whole wherever they are looked at
    large: _Regions
    row: int  # bytes of the shortest row of a large one

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Memory:
        """Look up where tensors lie."""
        small = [t for t in tensors if t.nbytes <= SMALL_BYTES]
        large = [t for t in tensors if t.nbytes > SMALL_BYTES]
        row = min((t.shape[-1] * t.itemsize for t in large), default=0)
        return cls(_Regions.of(tensors), _Regions.of(small), _Regions.of(large), row)

    def checksum(self, look: Look) -> int:
        """Checksum over the bytes and their places."""
        if look == Look.EVERY_VALUE:
            return _checksum(self.everything)
        return _checksum(self.small) ^ _checksum(self.large, look * self.row)


def _checksum(regions: _Regions, stride: int = 0) -> int:
    """Checksum over memory of the CPU, or over 64 of every ``stride`` bytes of each region."""
    stride = stride if stride >= 64 else 0
    return extension.load().cpu.fingerprint(*regions, stride, threads=torch.get_num_threads())


def _portable_checksum(tensors: Sequence[Tensor]) -> int:
    """The same by PyTorch, on any device, with one synchronisation and little memory."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    batch: list[Tensor] = []
    for i, t in enumerate(tensors):
        batch.append(t.detach().flatten().view(torch.uint8))
        if i + 1 == len(tensors) or sum(b.numel() for b in batch) >= CHECKSUM_BYTES:
            padding = torch.zeros(-sum(b.numel() for b in batch) % 4, dtype=torch.uint8, device=total.device)
            words = torch.cat([*batch, padding]).view(torch.int32)
            factors = torch.arange(1, 2 * words.numel(), 2, dtype=torch.int32, device=total.device)
            total = total * 1_000_003 + (words * factors).sum(dtype=torch.int64)
            batch = []
    return int(total)
