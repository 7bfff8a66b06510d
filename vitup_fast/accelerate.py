"""The drop-in: the network of the paper's authors, run by this library."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .errors import expected
from .network.config import ViTUpConfig
from .network.model import ImageCache, ViTUp
from .ops.checks import COORDINATE_DTYPES


def parameter_state(tensors):
    """Address and version of each tensor, which change when it is replaced or written in place."""
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


@dataclass
class _Adopted:
    """Our network over the parameters of another implementation, and the images it prepared last."""

    network: ViTUp
    state: tuple = ()
    tensors: list[Tensor] = field(default_factory=list)
    cache: ImageCache | None = None


_ADOPTED: WeakKeyDictionary[nn.Module, _Adopted] = WeakKeyDictionary()


def accelerate(model: nn.Module) -> nn.Module:
    """Make a ViTUp of the paper's authors, or an object that holds one as ``.vit_up``, run on this library.

    Signature, outputs and parameters stay theirs: the parameters are shared, so that training, ``state_dict`` and
    ``load_state_dict`` see no difference.

    Args:
        model: changed in place.

    Returns:
        The same object.

    Raises:
        InputError: not such a network.
    """
    target = model if hasattr(model, "vit_up_blocks") else getattr(model, "vit_up", None)
    if not isinstance(target, nn.Module):
        raise expected("model", "a ViTUp, or an object that holds one as .vit_up", type(model).__name__)
    if isinstance(target, ViTUp):
        raise expected("model", "another implementation's ViTUp", "this library's own", "It is fast already.")
    _ADOPTED[target] = _Adopted(_adopt(target))
    # Another class rather than an attribute: copies of the object then run on their own parameters.
    target.__class__ = type(type(target).__name__, (type(target),), {"forward": _accelerated_forward})
    target._compiled_call_impl = None
    return model


def _adopt(target: nn.Module) -> ViTUp:
    """Build our network over the parameters of another implementation."""
    try:
        attention = target.vit_up_blocks[0].cross_attention
        config = ViTUpConfig(
            dim=attention.q_proj.weight.shape[1],
            num_heads=int(attention.num_heads),
            layer_indices=tuple(target.layer_indices),
        )
    except (AttributeError, IndexError, TypeError) as error:
        raise expected("model", "a ViTUp as published", f"one that differs ({error})") from error
    network = ViTUp(config)
    theirs = dict(target.named_parameters())
    ours = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    wrong = [n for n in sorted({*theirs, *ours}) if n not in theirs or tuple(theirs[n].shape) != ours.get(n)]
    if wrong:
        raise expected("model", "the published parameters", f"a difference at {', '.join(wrong[:8])}")
    for name, parameter in theirs.items():
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, parameter)
    freqs = dict(target.named_buffers()).get("rel_pos_enc.freqs")
    # A buffer cast to half precision has lost its digits; ours holds the published numbers.
    if freqs is not None and freqs.dtype in COORDINATE_DTYPES:
        network.rel_pos_enc.freqs = freqs.detach().float()
    return network


def _accelerated_forward(
    self: nn.Module,
    pixel_values: Tensor | None,
    q_xy_normalized: Tensor,
    backbone: nn.Module | None = None,
    hidden_layer_img_size: int | None = None,
    cache_data: Any = None,
) -> list[Tensor]:
    """Predict the features of all depths, with the arguments and results of the authors' ``ViTUp.forward``."""
    if cache_data is None:
        cache_data = self.maybe_compute_cache_data(
            pixel_values=pixel_values, backbone=backbone, hidden_layer_img_size=hidden_layer_img_size
        )
    adopted = _ADOPTED.get(self)
    if adopted is None:
        adopted = _ADOPTED[self] = _Adopted(_adopt(self))
    network = adopted.network
    for constants in (network.rel_pos_enc, network.rope):
        constants.to(network.device)
    if q_xy_normalized.dtype not in COORDINATE_DTYPES:
        warnings.warn(
            f"q_xy_normalized came in {q_xy_normalized.dtype}, which moves queries by up to a pixel; "
            "pass float32 coordinates, or use vitup_fast.load, which keeps them.",
            stacklevel=2,
        )
        q_xy_normalized = q_xy_normalized.float()
    tensors = [
        *cache_data["layer_hidden_states_hwc"],
        cache_data["query_embedding_cache_data"]["last_hidden_state_hwc"],
    ]
    keeps_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *network.parameters()))
    state = parameter_state([*tensors, *network.parameters()])
    if keeps_graph or adopted.cache is None or state != adopted.state:
        cache = network.prepare(tensors[:-1], tensors[-1])
        if keeps_graph:
            return network(cache, q_xy_normalized, return_all_layers=True)
        adopted.state, adopted.tensors, adopted.cache = state, tensors, cache
    return network(adopted.cache, q_xy_normalized, return_all_layers=True)
