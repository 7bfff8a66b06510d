"""What operations and walks take of a network, and whether it has changed since.

Layers are read, never called. What a layer wraps or hooks is therefore honoured (parametrizations) or refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import extension
from ..errors import expected
from ..ops import AttentionWeights, FilmWeights, MLPWeights, PositionWeights
from ..ops.checks import check_layer
from ..ops.primitives import LAYER_NORM_EPS

Nested = TypeVar("Nested")

# Queries of a call in which reading every weight costs at most two percent; calls of fewer read some of each row.
EVERY_VALUE_QUERIES = 1024
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
        return [*_leaves(self.blocks), *_leaves(self.decoders)]

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


def _leaves(value: object) -> Iterator[Tensor]:
    """Every tensor of nested named tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _leaves(part)


def collect(root: nn.Module) -> NetworkWeights:
    """Read the parameters of a network whose modules carry the published names.

    Raises:
        InputError: a layer wraps, hooks or is something else than what is read of it.
    """
    blocks = [_block(*named) for named in _children(root.vit_up_blocks, "vit_up_blocks")]
    decoders = [
        DecoderWeights(*_layers(_mlp(decoder, name, norm=True, gelu=False)))
        for decoder, name in _children(root.decoder_mlp, "decoder_mlp")
    ]
    device = decoders[0].weight.device  # also a meta device, to which constants do not move
    return NetworkWeights(blocks, decoders, root.rel_pos_enc.freqs.to(device), root.rope.inv_freq.to(device))


def _block(block: nn.Module, name: str) -> BlockWeights:
    """Collect the parameters of one block."""
    parts = _named(block, name)
    attention, featx = _named(*parts("cross_attention")), _named(*parts("featx"))
    query, key, value, out = (attention(f"{part}_proj") for part in ("q", "k", "v", "out"))
    return BlockWeights(
        MLPWeights(*_layers(_mlp(*parts("transition_mlp"), norm=True))),
        AttentionWeights(*_layers((parts("norm_q_global"), query, out))),
        PositionWeights(*_layers(_mlp(*featx("gamma_beta_mlp"), norm=False))),
        FilmWeights(
            MLPWeights(*_layers(_mlp(*featx("post_mlp"), norm=True))), *_layers((parts("norm_h_local"),))
        ),
        MLPWeights(*_layers((parts("norm_post"), *_mlp(*parts("mlp"), norm=False)))),
        ImageWeights(*_layers((parts("norm_h_global"), key, value, featx("norm_input")))),
    )


_Named = tuple[nn.Module, str]


def _named(module: nn.Module, name: str) -> Callable[[str], _Named]:
    """Look up the children of a module that is passed through, with their names."""
    _check_container(module, name)
    children = module._modules

    def child(part: str) -> _Named:
        if part not in children:
            raise expected(name, f"a module that holds {part}", type(module).__name__)
        return children[part], f"{name}.{part}"

    return child


def _children(modules: nn.Module, name: str) -> Iterator[_Named]:
    """Every child of a list of modules, with its name."""
    _check_container(modules, name)
    for part, child in modules._modules.items():
        yield child, f"{name}.{part}"


def _check_container(module: nn.Module, name: str) -> None:
    """Refuse what a module that is passed through would run around its forward, or in its place."""
    if _wrapped(module):
        check_layer(name, module, type(module))


def _mlp(module: nn.Module, name: str, *, norm: bool, gelu: bool = True) -> list[_Named]:
    """The layers with parameters of an MLP: a LayerNorm if ``norm``, and one linear layer or two with GELU between."""
    (sequence, sequence_name) = _named(module, name)("mlp")
    layers = list(_children(sequence, sequence_name))
    # Dropout does nothing in evaluation, and at a rate of zero.
    kept = [(m, n) for m, n in layers if not (isinstance(m, nn.Dropout) and (m.p == 0 or not m.training))]
    kinds = (*((nn.LayerNorm,) if norm else ()), *((nn.Linear, nn.GELU) if gelu else ()), nn.Linear)
    if len(kept) != len(kinds):
        found = ", ".join(type(m).__name__ for m, _ in layers)
        raise expected(sequence_name, f"the layers {', '.join(k.__name__ for k in kinds)}", found)
    for (layer, layer_name), kind in zip(kept, kinds, strict=True):
        if kind is nn.GELU and not (type(layer) is nn.GELU and layer.approximate == "none"):
            raise expected(layer_name, "nn.GELU(), the exact one", repr(layer))
    return [layer for layer, kind in zip(kept, kinds, strict=True) if kind is not nn.GELU]


def _layers(layers: Iterable[_Named]) -> Iterator[Tensor]:
    """Weight and bias of each linear layer or LayerNorm in turn."""
    for layer, name in layers:
        kind = nn.LayerNorm if isinstance(layer, nn.LayerNorm) else nn.Linear
        if type(layer) is not kind or _wrapped(layer):
            check_layer(name, layer, kind)
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or bias is None:  # computed by a parametrization, or plain tensors in a replica
            weight, bias = layer.weight, layer.bias
        if weight is None or bias is None:
            raise expected(name, "a layer with weight and bias", repr(layer))
        if kind is nn.LayerNorm and layer.eps != LAYER_NORM_EPS:
            raise expected(name, f"eps = {LAYER_NORM_EPS}", layer.eps)
        yield weight
        yield bias


def _wrapped(module: nn.Module) -> bool:
    """Whether calling a module would run more than the forward of its class."""
    attributes = module.__dict__
    return "forward" in attributes or bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
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


class Snapshot:
    """Which tensors something was made from, and what they held: it holds no tensor.

    Tensors are known by themselves (weakly), their memory, layout and version. Writes that PyTorch does not count
    (through ``.data``, NumPy, or to inference tensors) show in a checksum over their bytes.

    Args:
        tensors: what it was made from.
        checksums: whether checksums are taken too; inference tensors have one in any case.
    """

    def __init__(self, tensors: Sequence[Tensor], *, checksums: bool = False) -> None:
        self._references = [weakref.ref(t) for t in tensors]
        self._facts = [_facts(t) for t in tensors]
        self._uncounted = any(t.is_inference() for t in tensors)
        self._sum = fingerprint(tensors) if checksums or self._uncounted else None
        self._some = fingerprint(tensors, every_value=False) if checksums else None

    def holds(self, tensors: Sequence[Tensor], *, every_value: bool | None = None) -> bool:
        """Whether these are still the same tensors with the same values.

        Args:
            tensors: what there is now.
            every_value: compare checksums over every value (True) or over some of each row (False), or none (None).
        """
        if len(tensors) != len(self._references):
            return False
        for t, reference, facts in zip(tensors, self._references, self._facts, strict=True):
            if reference() is not t or _facts(t) != facts:
                return False
        if every_value or self._uncounted:
            return self._sum == fingerprint(tensors)
        return every_value is None or self._some == fingerprint(tensors, every_value=False)


def _facts(t: Tensor) -> tuple[object, ...]:
    """Where a tensor's memory lies, how it is laid out, and how often PyTorch wrote to it."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, None if t.is_inference() else t._version


def fingerprint(tensors: Sequence[Tensor], *, every_value: bool = True) -> int:
    """Checksum over the bytes of tensors and their places.

    Args:
        tensors: on one device, any dtype.
        every_value: read all of them; otherwise small tensors, and of large ones 64 bytes of every row, and that on
            the CPU alone (elsewhere nothing).
    """
    with torch.no_grad():
        plain = [t.detach().contiguous() for t in tensors]
    if not plain:
        return 0
    if plain[0].device.type != "cpu" or extension.obstacle("cpu") is not None:
        return _portable_fingerprint(plain) if every_value else 0
    small = [t for t in plain if every_value or t.nbytes <= SMALL_BYTES]
    large = [t for t in plain if not every_value and t.nbytes > SMALL_BYTES]
    row = min((t.shape[-1] * t.itemsize for t in large), default=0)
    return _memory_fingerprint(small, 0) ^ _memory_fingerprint(large, row if row >= 64 else 0)


def _memory_fingerprint(tensors: Sequence[Tensor], stride: int) -> int:
    """Checksum over contiguous memory of the CPU, or over 64 of every ``stride`` bytes of each tensor."""
    addresses, sizes = [t.data_ptr() for t in tensors], [t.nbytes for t in tensors]
    return extension.load().cpu.fingerprint(addresses, sizes, stride, threads=torch.get_num_threads())


def _portable_fingerprint(tensors: Sequence[Tensor]) -> int:
    """The same by PyTorch, on any device, with one synchronisation."""
    flat = [t.flatten().view(torch.uint8) for t in tensors]
    padding = torch.zeros(-sum(t.numel() for t in flat) % 4, dtype=torch.uint8, device=flat[0].device)
    words = torch.cat([*flat, padding]).view(torch.int32)
    factors = torch.arange(1, 2 * words.numel(), 2, dtype=torch.int32, device=words.device)
    return int((words * factors).sum(dtype=torch.int64))
