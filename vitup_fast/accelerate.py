"""The drop-in: the network of the paper's authors, run by this library."""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import InputError, expected
from .network.config import ViTUpConfig
from .network.image_cache import ImageCache
from .network.layers import PositionCode, RotaryFrequencies
from .network.model import ViTUp
from .network.weights import Look, Snapshot, affordable_look, collect
from .ops.checks import HOOKS, are_plain, module_hooks

# Where an accelerated network keeps its _Binding: in its __dict__, outside of modules and state_dict.
_BINDING = "_vitup_fast"
# What PyTorch itself keeps in a module's __dict__, replicas of DataParallel and compile() included.
_MODULE_KEYS = (frozenset(vars(nn.Module())) - {"training"}) | {
    "_is_replica",
    "_former_parameters",
    "_compiled_call_impl",
}
_SHARDING_KEYS = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
# Our modules whose counterparts are read, never called.
_READ = ("vit_up_blocks", "decoder_mlp")
# What two float64 passes may differ by: frequencies and the centres of the tokens are float32 numbers in both.
_PROBE_TOLERANCE = 1e-6
# An odd number of queries, tokens and patches of different sides, so that no two axes can be confused.
_PROBE_IMAGES, _PROBE_QUERIES, _PROBE_TOKENS, _PROBE_PATCHES = 2, 9, (3, 4), (5, 7)


def accelerate(model: nn.Module) -> nn.Module:
    """Make a ViTUp of the paper's authors, or an object that holds one as ``.vit_up``, run on this library.

    Signature, outputs and parameters stay theirs: the modules of the network are read at each call, so that training,
    ``load_state_dict``, replaced parameters and modules, casts, copies and pickles see no difference. What the modules
    compute is compared with this library's definition, here and again after a change, for a few random queries and
    random weights in float64 on the CPU; the network's own weights, gradients and generators stay as they are. What
    is accelerated already is returned as it is.

    Args:
        model: changed in place.

    Returns:
        The same object.

    Raises:
        InputError: not such a network; one that computes something else; or one with hooks, wrappers or forwards on
            its submodules, which would not run.
    """
    target = model if hasattr(model, "vit_up_blocks") else getattr(model, "vit_up", None)
    target = getattr(target, "_orig_mod", target)
    if not isinstance(target, nn.Module):
        raise expected("model", "a ViTUp, or an object that holds one as .vit_up", type(model).__name__)
    if isinstance(target, ViTUp):
        raise expected("model", "another implementation's ViTUp", "this library's own", "It is fast already.")
    if isinstance(target, _Accelerated):
        return model
    if "forward" in vars(target):
        raise expected(
            "model",
            "a network that runs the forward of its class",
            "one whose forward was replaced",
            "Accelerate it first, then replace its forward.",
        )
    if any(key.startswith(_SHARDING_KEYS) for key in vars(target)):
        raise expected(
            "model", "a network that is not sharded", "a sharded one", "Accelerate it before fully_shard."
        )
    kind = _accelerated_class(type(target))
    binding = _bind(target, kind, None)
    # Another class rather than an attribute: copies of the object then run on their own parameters.
    target.__class__ = kind
    vars(target)[_BINDING] = binding
    target._compiled_call_impl = None
    return model


class _Accelerated:
    """What an accelerated class does otherwise than the class of the authors that it inherits from."""

    _original: ClassVar[type[nn.Module]]
    _probed: ClassVar[set[tuple]]  # descriptions of networks that compute what ours does

    def forward(
        self,
        pixel_values: Tensor | None,
        q_xy_normalized: Tensor,  # [B, N, 2]
        backbone: nn.Module | None = None,
        hidden_layer_img_size: int | None = None,
        cache_data: Any = None,
    ) -> list[Tensor]:  # L times [B, N, D]
        """Predict the features of all depths, with the arguments and results of the authors' ``ViTUp.forward``."""
        cache_data = self.maybe_compute_cache_data(
            pixel_values=pixel_values,
            backbone=backbone,
            hidden_layer_img_size=hidden_layer_img_size,
            cache_data=cache_data,
        )
        query_data = cache_data["query_embedding_cache_data"]
        if query_data is None:
            query_data = self.query_embedding.maybe_compute_cache_data(
                pixel_values=pixel_values, backbone=backbone
            )
        hidden, grid = list(cache_data["layer_hidden_states_hwc"]), query_data["last_hidden_state_hwc"]
        binding = _current(self)
        if q_xy_normalized.dtype in (torch.bfloat16, torch.float16):
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"q_xy_normalized came in {q_xy_normalized.dtype}, which moves queries by up to a pixel; "
                    "pass float32 coordinates, or use vitup_fast.load, which keeps them.",
                    stacklevel=2,
                )
            q_xy_normalized = q_xy_normalized.float()
        cache = binding.prepare(hidden, grid, q_xy_normalized.shape[:2].numel())
        binding.check_window(q_xy_normalized, cache.token_grid)
        return binding.network(cache, q_xy_normalized, return_all_layers=True)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != _BINDING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # For a call that is compiled; the next other one checks it, and says what does not fit.
        with suppress(InputError):
            vars(self)[_BINDING] = _Binding(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # Pickle finds the authors' class by its name, and would not find this one.
        return _new, (self._original,), self.__getstate__()


@functools.cache
def _accelerated_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of accelerated networks whose class was ``original``; it goes by the same name."""
    names = {key: vars(original)[key] for key in ("__module__", "__doc__")}
    body = {**names, "__qualname__": original.__qualname__, "_original": original, "_probed": set()}
    return type(original.__name__, (_Accelerated, original), body)


def _new(original: type[nn.Module]) -> nn.Module:
    """Make an accelerated network without content, as copies and pickles start."""
    kind = _accelerated_class(original)
    return kind.__new__(kind)


def _reference(config: ViTUpConfig) -> ViTUp:
    """Our network with the published constants on the CPU, and without numbers in its parameters."""
    with torch.inference_mode(False), torch.device("meta"):
        network = ViTUp(config)
    with torch.inference_mode(False), torch.device("cpu"):
        network.rel_pos_enc, network.rope = PositionCode(), RotaryFrequencies(config.head_dim)
    return network


_kept_reference = functools.lru_cache(maxsize=8)(_reference)


def _over(target: nn.Module, config: ViTUpConfig) -> ViTUp:
    """Build our network over the modules of another implementation, with constants of its own."""
    shared = {name: getattr(target, name) for name in _READ}
    freqs = getattr(getattr(target, "rel_pos_enc", None), "freqs", None)
    with torch.inference_mode(False), torch.no_grad():
        if are_plain():
            reference = _kept_reference(config)
            # A copy of everything but the modules that are shared.
            network = copy.deepcopy(reference, {id(getattr(reference, n)): m for n, m in shared.items()})
        else:
            # What is made of fake tensors is of no use later, and is not to be copied.
            network = _reference(config)
            for name, module in shared.items():
                setattr(network, name, module)
        if freqs is not None:
            network.rel_pos_enc.freqs = _restored(freqs, network.rel_pos_enc.freqs)
        for constants in (network.rel_pos_enc, network.rope):
            constants.to(network.device)
    return network


def _restored(buffer: Tensor, published: Tensor) -> Tensor:
    """Float32 numbers of a buffer, or the published ones where it holds these, as cast to half precision or not."""
    if buffer.is_meta:
        return published
    if are_plain(buffer):
        held = buffer.detach().float().cpu()
        rounded = (published.to(dtype).float() for dtype in (torch.bfloat16, torch.float16))
        if held.shape == published.shape and any(torch.equal(held, numbers) for numbers in rounded):
            return published
    return buffer.detach().float()


class _Watch:
    """What the modules of a network said of themselves when they were checked, parameters apart."""

    def __init__(self, target: nn.Module) -> None:
        self.settings = {key: _snapshot(value) for key, value in _settings(target).items()}
        self.children = dict(target._modules)
        # Without the network itself, which holds this: it would wait for the garbage collector to be freed.
        self.modules = [module for module in target.modules() if module is not target]
        states = [vars(module) for module in self.modules]
        self.kinds, self.sizes = [type(module) for module in self.modules], [len(state) for state in states]
        self.entries = [itemgetter("_modules", *HOOKS, *_settings(module)) for module in self.modules]
        self.values = [
            tuple(value if isinstance(value, OrderedDict) else _snapshot(value) for value in entries(state))
            for entries, state in zip(self.entries, states, strict=True)
        ]
        self.hooks = [state[key] for state in states for key in HOOKS]  # all of them empty
        self.buffers = [
            (*buffer, _version(buffer[-1])) for module in target.modules() for buffer in _buffers(module)
        ]
        # What the hidden states of an image pass through.
        self.image_layers = [
            layer
            for block in target.vit_up_blocks
            for layer in (
                block.norm_h_global,
                block.cross_attention.k_proj,
                block.cross_attention.v_proj,
                block.featx.norm_input,
            )
        ]

    def is_unchanged(self, target: nn.Module) -> bool:
        """Whether they say the same now; it takes about a microsecond for each two of them."""
        states = [vars(module) for module in self.modules]
        try:
            return (
                [type(module) for module in self.modules] == self.kinds
                and [len(state) for state in states] == self.sizes
                and [e(s) for e, s in zip(self.entries, states, strict=True)] == self.values
                and not any(self.hooks)
                and self.children == target._modules
                and self.settings == _settings(target)
                and all(o.get(k) is t and _version(t) == version for o, k, t, version in self.buffers)
            )
        # Entries that went, and values that do not compare to one truth, such as arrays.
        except (KeyError, ValueError):
            return False


class _Remembered(NamedTuple):
    """The image prepared last, and what it was prepared from."""

    image: Snapshot
    weights: Snapshot
    dtype: torch.dtype  # of the computation
    cache: ImageCache


class _Binding:
    """Our network over the modules of an accelerated one, and all that tells whether it still is."""

    def __init__(self, target: nn.Module) -> None:
        try:
            attention = [block.cross_attention for block in target.vit_up_blocks]
            windows = [int(getattr(a, "cross_attn_window_size", 0)) for a in attention]
            config = ViTUpConfig(
                dim=attention[0].q_proj.weight.shape[1],
                num_heads=int(attention[0].num_heads),
                layer_indices=tuple(target.layer_indices),
            )
            self.network = _over(target, config)
        except (AttributeError, IndexError, TypeError, NotImplementedError) as error:
            raise expected("model", "a ViTUp as published", f"one that differs ({error})") from error
        self.window = min((window for window in windows if window > 0), default=0)
        self.watch: _Watch | None = None  # once it was checked
        self.remembered: _Remembered | None = None

    def is_current(self, target: nn.Module) -> bool:
        """Whether the target was checked as it is now."""
        return (
            self.watch is not None and "_original" in vars(type(target)) and self.watch.is_unchanged(target)
        )

    def serves(self, network: ViTUp) -> bool:
        """Whether our network here does what another does, so that what it remembers is of use."""
        mine, other = self.network, network
        return (
            all(getattr(mine, name) is getattr(other, name) for name in _READ)
            and mine.config == other.config
            and mine.rope.inv_freq.device == other.rope.inv_freq.device
            and are_plain(mine.rel_pos_enc.freqs, other.rel_pos_enc.freqs)
            and torch.equal(mine.rel_pos_enc.freqs, other.rel_pos_enc.freqs)
        )

    def prepare(self, hidden: list[Tensor], grid: Tensor, queries: int) -> ImageCache:
        """Prepare an image for so many queries, or return what was prepared of the same tensors and weights."""
        network, tensors = self.network, [*hidden, grid]
        if self.watch is None or not all(isinstance(t, Tensor) for t in tensors) or not are_plain(*tensors):
            return network.prepare(hidden, grid)
        weights = [t for layer in self.watch.image_layers for t in (layer.weight, layer.bias)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *weights)):
            return network.prepare(hidden, grid)
        on_cpu, dtype = network.device.type == "cpu", network.compute_dtype
        known = self.remembered
        if known is not None and known.dtype == dtype:
            # A grid that is kept as it came shows by itself what is written into it.
            image = hidden[1:] if known.cache.patch_grid is grid else [*hidden[1:], grid]
            # For writes that PyTorch does not count; a GPU would have to be waited for.
            at_image, at_weights = Look.NONE, Look.NONE
            if on_cpu:
                at_image, at_weights = Look.EVERY_VALUE, affordable_look(weights, queries)
            if known.image.holds(image, at_image) and known.weights.holds(weights, at_weights):
                return known.cache
        with torch.no_grad():
            cache = network.prepare(hidden, grid)
        image = hidden[1:] if cache.patch_grid is grid else [*hidden[1:], grid]
        sources = (Snapshot(tensors, checksums=on_cpu) for tensors in (image, weights))
        self.remembered = _Remembered(*sources, dtype, cache)
        return cache

    def check_window(self, coords: Tensor, token_grid: tuple[int, int]) -> None:
        """Refuse queries that the authors' cross-attention takes for a grid and attends to through a window."""
        tokens, window = token_grid[0] * token_grid[1], 2 * (self.window // 2) + 1
        if not self.window or window**2 >= tokens or coords.shape[1] != tokens:
            return
        if math.isqrt(tokens) ** 2 == tokens:
            raise expected(
                "q_xy_normalized",
                f"another number of queries than there are tokens, or cross_attn_window_size=0 instead of "
                f"{self.window}, since attention here is global",
                f"{tokens} queries for {tokens} tokens",
                "Pass the queries in two calls of different lengths.",
            )


def _current(target: nn.Module) -> _Binding:
    """What binds an accelerated network to this library, made anew after a change of its modules."""
    binding = getattr(target, _BINDING, None)
    if torch.compiler.is_compiling() or (binding is not None and binding.is_current(target)):
        return binding
    binding = _bind(target, type(target), binding)
    # What was made of fake or transformed buffers is for this call only.
    if are_plain(*(tensor for module in target.modules() for _, _, tensor in _buffers(module))):
        vars(target)[_BINDING] = binding
    return binding


def _bind(target: nn.Module, kind: type[nn.Module], previous: _Binding | None) -> _Binding:
    """Check that a network computes what ours does, and build ours over its modules."""
    binding = _Binding(target)
    _check_modules(target, binding.network)
    description = _describe(target)
    if previous is None or description not in kind._probed:
        if not are_plain():
            return binding
        _probe(target, kind._original, binding.network.config)
        kind._probed.add(description)
    binding.watch = _Watch(target)
    # Sharded parameters (fully_shard) are gathered anew for each call, without a change of their version.
    sharded = "_original" not in vars(kind)
    if previous is not None and not sharded and previous.serves(binding.network):
        binding.network, binding.remembered = previous.network, previous.remembered
    return binding


def _check_modules(target: nn.Module, network: ViTUp) -> None:
    """Check names, shapes and kinds of the modules that are read, and that no module has a call of its own."""
    for name, module in target.named_modules():
        hooks = [] if module is target else module_hooks(module)
        if hooks or (module is not target and "forward" in vars(module)):
            raise expected(
                name,
                "no hooks and no forward of its own, since this library reads it and never calls it",
                ", ".join(hooks) or "a forward that was replaced",
                "Remove them, or put them on the whole network, which is called.",
            )
    reference = _kept_reference(network.config) if are_plain() else _reference(network.config)
    ours = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    theirs = {_published_name(name) for name, _ in target.named_parameters()}
    shapes = [tuple(weight.shape) for weight in collect(network).parameters]
    wrong = theirs - {*ours}
    if shapes != [tuple(weight.shape) for weight in collect(reference).parameters]:
        wrong |= {name for name, shape in ours.items() if getattr(_at(target, name), "shape", None) != shape}
    if wrong:
        raise expected("model", "the published parameters", f"a difference at {', '.join(sorted(wrong)[:8])}")


def _at(target: nn.Module, name: str) -> Any:
    """Return the module or tensor of a published name, if there is one."""
    try:
        return attrgetter(name)(target)
    except AttributeError:
        return None


def _published_name(name: str) -> str:
    """Return the published name of a parameter, which may be one of those that parametrize it."""
    owner, _, inner = name.partition(".parametrizations.")
    return f"{owner}.{inner.split('.')[0]}" if inner else name


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module says of itself: whether it trains, and all of its attributes that are no tensors."""
    return {
        key: value
        for key, value in vars(module).items()
        if not (
            key in _MODULE_KEYS
            or key == _BINDING
            or isinstance(value, Tensor)
            or key.startswith(_SHARDING_KEYS)
        )
    }


def _snapshot(value: Any) -> Any:
    """Copy a collection, whose items may change."""
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _buffers(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Tensors of a module that are no parameters: the dictionary that holds each, its key, and the tensor."""
    parameters = vars(module).get("_former_parameters", ())
    for owner in (module._buffers, vars(module)):
        for key, value in owner.items():
            if isinstance(value, Tensor) and key not in parameters:
                yield owner, key, value


def _describe(target: nn.Module) -> tuple:
    """Describe all that decides what a network computes, its parameters apart, in values that compare."""
    return tuple(
        (
            name,
            None if module is target else type(module),
            _freeze(_settings(module)),
            tuple((key, _freeze(tensor)) for _, key, tensor in _buffers(module)),
        )
        for name, module in target.named_modules()
    )


def _freeze(value: Any) -> Any:
    """Turn a setting into a value that compares and hashes; of other objects, their type."""
    if value is None or isinstance(
        value, int | float | complex | str | bytes | type | torch.dtype | torch.device
    ):
        return value
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return value
    if isinstance(value, dict):
        return tuple((str(key), _freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, functools.partial):
        return value.func, _freeze(value.args), _freeze(value.keywords)
    if isinstance(value, Tensor):
        numbers = tuple(value.detach().flatten().tolist()) if are_plain(value) else None
        return tuple(value.shape), value.dtype, numbers
    return type(value)


def _version(tensor: Tensor) -> int:
    """Count of the writes into a tensor, where PyTorch counts them."""
    return -1 if tensor.is_inference() else tensor._version


def _probe(target: nn.Module, original: type[nn.Module], config: ViTUpConfig) -> None:
    """Compare a network with ours on a few random queries and weights, in float64 on the CPU.

    Raises:
        InputError: the two differ, or the other does not run.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with ExitStack() as stack:
        for mode in (
            torch.no_grad(),
            torch.device("cpu"),
            torch.random.fork_rng(devices=[]),
            # Parametrizations may change with each look at a weight: both networks are to see the same.
            parametrize.cached(),
        ):
            stack.enter_context(mode)
        B, D, L = _PROBE_IMAGES, config.dim, config.num_layers
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64, device="cpu")
        # Small numbers, so that what a LayerNorm adds to their variance counts.
        hidden = [0.1 * draw(B, *_PROBE_TOKENS, D) for _ in range(L)]
        grid = 0.1 * draw(B, *_PROBE_PATCHES, D)
        coords = 0.5 + 0.3 * draw(B, _PROBE_QUERIES, 2)  # some beyond the image
        data = {
            "layer_hidden_states_hwc": hidden,
            "query_embedding_cache_data": {"last_hidden_state_hwc": grid},
        }
        try:
            twin = _twin(target, original, config)
            theirs = original.forward(twin, pixel_values=None, q_xy_normalized=coords, cache_data=data)
        except Exception as error:
            raise expected(
                "model", "a ViTUp that runs as published", f"{type(error).__name__}: {error}"
            ) from error
        network = _over(twin, config)
        cache = network.prepare(hidden, grid, impl="reference")
        ours = network(cache, coords, return_all_layers=True, impl="reference")
    shapes = [getattr(t, "shape", None) for t in theirs] if isinstance(theirs, list | tuple) else []
    if shapes != [t.shape for t in ours]:
        raise expected("model", f"a ViTUp that returns the features of {len(ours)} depths", shapes or theirs)
    differences = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(theirs, ours, strict=True)]
    if not all(difference <= _PROBE_TOLERANCE for difference in differences):
        depth = max(
            range(len(ours)), key=lambda i: math.inf if math.isnan(differences[i]) else differences[i]
        )
        training = " in training mode" if target.training else ""
        raise expected(
            "model",
            "a network that computes what ViT-Up (arXiv 2606.14024) defines",
            f"a relative difference of {differences[depth]:.1e} at layer {target.layer_indices[depth]}, the "
            f"largest, for random weights and queries in float64{training}",
            "Look for another activation, normalisation, residual, position code or rotary embedding"
            + (", or for dropout, which is not done here." if training else "."),
        )


def _twin(target: nn.Module, original: type[nn.Module], config: ViTUpConfig) -> nn.Module:
    """Copy a network to the CPU in float64, with random weights; the matrices of all blocks share their numbers."""
    generator = torch.Generator("cpu").manual_seed(1)
    reference = _kept_reference(config)
    published = {
        "rel_pos_enc.freqs": reference.rel_pos_enc.freqs,
        "q_rope_embeddings.inv_freq": reference.rope.inv_freq,
    }
    copies: dict[int, Tensor] = {}
    matrices: dict[tuple, Tensor] = {}
    for name, module in target.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            draw = functools.partial(
                torch.randn, shape, generator=generator, dtype=torch.float64, device="cpu"
            )
            if len(shape) > 1:
                role = (re.sub(r"\.\d+", "", name, count=1), key, shape)
                if role not in matrices:
                    matrices[role] = draw() / math.prod(shape[1:]) ** 0.5
                numbers = matrices[role]
            else:
                numbers = 0.2 * draw() + (key == "weight")
            copies[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
        for _, key, tensor in _buffers(module):
            path = f"{name}.{key}"
            held = _restored(tensor, published[path]) if path in published else tensor.detach()
            held = torch.zeros_like(held, device="cpu") if held.is_meta else held.cpu()
            copies[id(tensor)] = held.double() if held.is_floating_point() else held
    twin = original.__new__(original)
    nn.Module.__init__(twin)
    kept = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    state = {key: vars(target)[key] for key in kept} | _settings(target)
    state |= {key: tensor for owner, key, tensor in _buffers(target) if owner is vars(target)}
    vars(twin).update(copy.deepcopy(state, copies))
    return twin
