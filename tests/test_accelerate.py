from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import multiprocessing
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from vitup_fast import InputError, ViTUp, ViTUpConfig, accelerate
from vitup_fast.network import weights

D, HEADS, LAYERS = 32, 2, (0, 1, 2)
IMAGES, TOKENS, PATCHES, QUERIES = 2, (3, 4), (12, 16), 11


# A stand-in for the authors' network, written from the paper: the published parameters and call, as modules that are
# called. Settings make it compute something else, as their configuration files can.
class Mlp(nn.Module):
    def __init__(self, *sizes: int, norm=True, residual=False, activation=nn.GELU, eps=1e-5):
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(sizes[0], eps)] if norm else []
        for n_in, n_out in itertools.pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), activation()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.use_residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) if self.use_residual else self.mlp(x)


def rotate(x: Tensor, angles: Tensor) -> Tensor:  # [B, n, Hh, d], [B, n, d / 2]
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous().to(angles.dtype))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dropout: float, window: int):
        super().__init__()
        self.num_heads, self.attn_dropout, self.cross_attn_window_size = HEADS, dropout, window
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))
        self.proj_dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, tokens: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (
            p(y).unflatten(-1, (self.num_heads, -1))
            for p, y in ((self.q_proj, x), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        if angles is not None:
            q, k = rotate(q, angles[0]), rotate(k, angles[1])
        p = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=p)
        return self.proj_dropout(self.out_proj(y.transpose(1, 2).flatten(2)))


class Film(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_input = nn.LayerNorm(D)
        self.gamma_beta_mlp = Mlp(66, D, 2 * D, norm=False)
        self.post_mlp = Mlp(D, 4 * D, D)
        nn.init.zeros_(self.gamma_beta_mlp.mlp[-1].weight)
        nn.init.zeros_(self.gamma_beta_mlp.mlp[-1].bias)

    def forward(self, token: Tensor, code: Tensor) -> Tensor:
        gamma, beta = self.gamma_beta_mlp(code).chunk(2, -1)
        return self.post_mlp((1 + gamma) * self.norm_input(token) + beta)


class Block(nn.Module):
    def __init__(self, activation, residual, eps, dropout, window):
        super().__init__()
        self.transition_mlp = Mlp(D, 2 * D, D, residual=residual, activation=activation, eps=eps)
        self.cross_attention, self.featx = Attention(dropout, window), Film()
        self.norm_q_global, self.norm_h_global = nn.LayerNorm(D), nn.LayerNorm(D)
        self.norm_h_local, self.norm_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = Mlp(D, 4 * D, D, norm=False)

    def forward(self, q: Tensor, hidden: Tensor, nearest: Tensor, code: Tensor, angles) -> Tensor:
        q = self.transition_mlp(q)
        q = q + self.cross_attention(self.norm_q_global(q), self.norm_h_global(hidden), angles)
        token = hidden.gather(1, nearest.unsqueeze(-1).expand(-1, -1, D))
        q = q + self.norm_h_local(self.featx(token, code))
        return q + self.mlp(self.norm_post(q))


class PositionCode(nn.Module):
    def __init__(self, max_resolution: float):
        super().__init__()
        self.register_buffer("freqs", torch.linspace(0, math.log(max_resolution), 16).exp())

    def forward(self, r: Tensor) -> Tensor:
        angles = (math.pi * r.unsqueeze(-1) * self.freqs).flatten(-2)
        return torch.cat((r, angles.sin(), angles.cos()), -1)


class Rope(nn.Module):
    def __init__(self, base: float, scale: float):
        super().__init__()
        self.base, self.scale, n = base, scale, D // HEADS // 4
        self.register_buffer("inv_freq", 1 / base ** (torch.arange(n) / n), persistent=False)

    def forward(self, xy: Tensor) -> Tensor:
        return (self.scale * xy.unsqueeze(-1) * self.inv_freq).flatten(-2)


class QueryEncoder(nn.Module):
    def __init__(self, out_proj: nn.Module):
        super().__init__()
        self.out_proj = out_proj

    def maybe_compute_cache_data(self, pixel_values=None, backbone=None, cache_data=None):
        return cache_data or backbone(pixel_values)["query_embedding_cache_data"]

    def forward(self, xy: Tensor, data: dict) -> Tensor:
        grid = data["last_hidden_state_hwc"].movedim(-1, 1)
        points = (2 * xy.unsqueeze(2) - 1).to(grid.dtype)
        q = F.grid_sample(grid, points, padding_mode="border", align_corners=False)
        return self.out_proj(q.squeeze(-1).transpose(1, 2))


class TheirViTUp(nn.Module):
    def __init__(
        self,
        *,
        activation=nn.GELU,
        residual=True,
        eps=1e-5,
        dropout=0.0,
        window=32,
        base=100.0,
        scale=2 * math.pi,
        rope=True,
        max_resolution=10.0,
        out_proj=None,
        seed=0,
    ):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer_indices = list(LAYERS)
            self.query_embedding = QueryEncoder(out_proj or nn.Identity())
            self.rel_pos_enc = PositionCode(max_resolution)
            self.vit_up_blocks = nn.ModuleList(
                Block(activation, residual, eps, dropout, window) for _ in LAYERS[1:]
            )
            self.q_rope_embeddings = Rope(base, scale) if rope else None
            self.decoder_mlp = nn.ModuleList(Mlp(D, D) for _ in LAYERS)

    def maybe_compute_cache_data(
        self, pixel_values=None, backbone=None, hidden_layer_img_size=None, cache_data=None
    ):
        return cache_data or backbone(pixel_values)

    def forward(
        self, pixel_values, q_xy_normalized, backbone=None, hidden_layer_img_size=None, cache_data=None
    ):
        data = self.maybe_compute_cache_data(pixel_values, backbone, hidden_layer_img_size, cache_data)
        xy, states = q_xy_normalized, data["layer_hidden_states_hwc"]
        query_data = self.query_embedding.maybe_compute_cache_data(
            pixel_values, backbone, data["query_embedding_cache_data"]
        )
        q = self.query_embedding(xy, query_data)
        h, w = states[0].shape[1:3]
        size = torch.tensor((w, h), device=xy.device)
        cell = torch.minimum((xy * size - 0.5).round().clamp_min(0), size - 1)
        code = self.rel_pos_enc((xy - ((cell + 0.5).float() / size)) * size).to(q.dtype)
        nearest = (cell[..., 1] * w + cell[..., 0]).long()
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        centres = torch.stack((x, y), -1).flatten(0, 1).to(xy)
        rope = self.q_rope_embeddings
        angles = None if rope is None else (rope(xy * size), rope(centres).unsqueeze(0))
        outputs = [self.decoder_mlp[0](q)]
        for block, decoder, hidden in zip(self.vit_up_blocks, self.decoder_mlp[1:], states[1:], strict=True):
            q = block(q, hidden.flatten(1, 2), nearest, code, angles)
            outputs.append(decoder(q))
        return outputs


def theirs(**settings: object) -> TheirViTUp:
    """A network whose every parameter matters."""
    network, generator = TheirViTUp(**settings), torch.Generator().manual_seed(settings.get("seed", 0))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def fast(**settings: object) -> TheirViTUp:
    return accelerate(theirs(**settings))


def image(seed: int = 0, batch: int = IMAGES) -> dict:
    generator = torch.Generator().manual_seed(100 + seed)
    hidden = [torch.randn(batch, *TOKENS, D, generator=generator) for _ in LAYERS]
    grid = torch.randn(batch, *PATCHES, D, generator=generator)
    return {"layer_hidden_states_hwc": hidden, "query_embedding_cache_data": {"last_hidden_state_hwc": grid}}


def tensors(data: dict) -> list[Tensor]:
    return [*data["layer_hidden_states_hwc"], data["query_embedding_cache_data"]["last_hidden_state_hwc"]]


def mapped(data: dict, fn: Callable[[Tensor], Tensor]) -> dict:
    *hidden, grid = (fn(t) for t in tensors(data))
    return {"layer_hidden_states_hwc": hidden, "query_embedding_cache_data": {"last_hidden_state_hwc": grid}}


def coords(batch: int = IMAGES, count: int = QUERIES) -> Tensor:
    return torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(9))


def original(network: nn.Module, xy: Tensor, data: dict) -> list[Tensor]:
    """The original forward over what an accelerated network holds now, in float64."""
    with torch.no_grad(), torch.inference_mode(False):
        twin = copy.deepcopy(network).double()
        data = mapped(data, lambda t: t.detach().clone().double())
        return TheirViTUp.forward(twin, None, xy.detach().clone().double(), cache_data=data)


def difference(actual: list[Tensor], exact: list[Tensor]) -> float:
    assert [t.shape for t in actual] == [t.shape for t in exact]
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True))


# Float32 passes of a few layers; what is wrong differs by a thousand times as much.
FLOAT32 = 5e-6


def is_right(network: nn.Module, data: dict, xy: Tensor | None = None, limit: float = FLOAT32) -> bool:
    xy = coords() if xy is None else xy
    actual, exact = network(None, xy, cache_data=data), original(network, xy, data)
    return difference(actual, exact) < limit


def test_call_outputs_and_parameters_stay():
    network, data = theirs(), image()
    exact = original(network, coords(), data)
    state, text = {k: v.clone() for k, v in network.state_dict().items()}, repr(network)
    holder = SimpleNamespace(vit_up=network)
    assert accelerate(holder) is holder
    with torch.no_grad():
        assert difference(network(None, coords(), cache_data=data), exact) < FLOAT32
        assert difference(network(None, coords(), backbone=lambda _: data), exact) < FLOAT32
        half_data = {**data, "query_embedding_cache_data": None}
        assert difference(network(None, coords(), lambda _: data, None, half_data), exact) < FLOAT32
    assert isinstance(network, TheirViTUp)
    assert type(network).__name__ == "TheirViTUp"
    assert type(network).__module__ == TheirViTUp.__module__
    assert repr(network) == text
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert state.keys() == network.state_dict().keys()
    kind = type(network)
    assert type(accelerate(network)) is kind  # twice is once


def test_every_parameter_is_trained():
    network, plain, data = fast(), theirs(), image()
    for n in (network, plain):
        sum(layer.square().sum() for layer in n(None, coords(), cache_data=data)).backward()
    for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-4, name


def other_linear() -> nn.Linear:
    return copy.deepcopy(theirs(seed=5).vit_up_blocks[0].cross_attention.k_proj)


def replace_parameter(network: TheirViTUp) -> None:
    network.vit_up_blocks[0].mlp.mlp[0].weight = nn.Parameter(
        theirs(seed=5).vit_up_blocks[0].mlp.mlp[0].weight.data
    )


def replace_linear(network: TheirViTUp) -> None:
    network.vit_up_blocks[1].cross_attention.k_proj = other_linear()


def replace_blocks(network: TheirViTUp) -> None:
    network.vit_up_blocks = theirs(seed=5).vit_up_blocks


def step(network: TheirViTUp) -> None:
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    with torch.enable_grad():
        sum(layer.square().mean() for layer in network(None, coords(), cache_data=image(3))).backward()
    optimiser.step()


def other_freqs(network: TheirViTUp) -> None:
    network.rel_pos_enc.freqs = 0.9 * network.rel_pos_enc.freqs


def parametrize_weight(network: TheirViTUp) -> None:
    nn.utils.parametrizations.weight_norm(network.vit_up_blocks[0].cross_attention.v_proj)
    network.vit_up_blocks[0].cross_attention.v_proj.parametrizations.weight.original0.data *= 1.5


def convert_by_swapping(network: TheirViTUp) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        network.double().float()
        network.load_state_dict(theirs(seed=5).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "load": lambda n: n.load_state_dict(theirs(seed=5).state_dict()),
    "load_assign": lambda n: n.load_state_dict(theirs(seed=5).state_dict(), assign=True),
    "parameter": replace_parameter,
    "parameter_data": lambda n: setattr(n.decoder_mlp[2].mlp[1].weight, "data", torch.eye(D)),
    "linear": replace_linear,
    "block": lambda n: n.vit_up_blocks.__setitem__(1, theirs(seed=5).vit_up_blocks[1]),
    "blocks": replace_blocks,
    "decoders": lambda n: setattr(n, "decoder_mlp", theirs(seed=5).decoder_mlp),
    "in_place": lambda n: [p.mul_(1.1) for p in n.parameters()],
    "step": step,
    "freqs_assigned": other_freqs,
    "freqs_in_place": lambda n: n.rel_pos_enc.freqs.mul_(0.9),
    "freqs_loaded": lambda n: n.load_state_dict(theirs(seed=5, max_resolution=7.0).state_dict(), assign=True),
    "parametrization": parametrize_weight,
    "swapped_content": lambda n: torch.utils.swap_tensors(
        n.vit_up_blocks[0].mlp.mlp[0].weight, theirs(seed=5).vit_up_blocks[0].mlp.mlp[0].weight
    ),
    "converted_by_swapping": convert_by_swapping,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    network, data = fast(), image()
    with torch.no_grad():
        before = network(None, coords(), cache_data=data)
        CHANGES[change](network)
        assert is_right(network, data)  # the same image: nothing that was remembered of it is left over
        assert difference(network(None, coords(), cache_data=data), [t.double() for t in before]) > 1e-3


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_writes_past_versions_are_noticed_on_the_same_image(mode):
    network, data, xy = fast(), image(), coords()
    with getattr(torch, mode)():
        assert is_right(network, data, xy)
        network.vit_up_blocks[1].cross_attention.k_proj.weight.data.mul_(1.5)
        assert is_right(network, data, xy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casts(dtype):
    limit = {torch.float64: 1e-12, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    network, data = fast(), image()
    with torch.no_grad():
        exact = original(network, coords(), data)
        network(None, coords(), cache_data=data)
        network.to(dtype)
        data = mapped(data, lambda t: t.to(dtype))
        assert network.rel_pos_enc.freqs.dtype == dtype
        features = network(None, coords().to(torch.promote_types(dtype, torch.float32)), cache_data=data)
        assert features[-1].dtype == dtype
        assert difference(features, exact) < max(limit, FLOAT32 if dtype == torch.float64 else 0)
        network.float()  # constants that were rounded on the way are restored
        data = mapped(data, Tensor.float)
        again = network(None, coords(), cache_data=data)
        exact = original(theirs_like(network), coords(), data)
        assert difference(again, exact) < FLOAT32


def theirs_like(network: TheirViTUp) -> TheirViTUp:
    """A network that never was accelerated or cast, with the parameters of another."""
    plain = TheirViTUp()
    plain.load_state_dict(network.state_dict())
    plain.rel_pos_enc = PositionCode(10.0)
    return plain


def test_accelerate_in_bfloat16():
    network, data = theirs(), image()
    exact = original(network, coords(), data)
    network.to(torch.bfloat16)
    accelerate(network)
    with torch.no_grad():
        assert difference(network(None, coords(), cache_data=data), exact) < 0.05
        with pytest.warns(UserWarning, match="moves queries"):
            network(None, coords().bfloat16(), cache_data=data)


def test_functional_call():
    network, other, data = fast(), theirs(seed=5), image()
    kwargs = {"cache_data": data}
    with torch.no_grad():
        before = network(None, coords(), **kwargs)
        called = torch.func.functional_call(network, other.state_dict(), (None, coords()), kwargs)
        assert difference(called, original(other, coords(), data)) < FLOAT32
        assert difference(network(None, coords(), **kwargs), [t.double() for t in before]) == 0
    parameters = {k: v.detach().requires_grad_() for k, v in other.named_parameters()}
    sum(torch.func.functional_call(network, parameters, (None, coords()), kwargs)).sum().backward()
    assert all(p.grad is not None for p in parameters.values())
    assert all(p.grad is None for p in network.parameters())


def replicate(network: nn.Module) -> nn.Module:
    """What DataParallel makes of a network for one of its devices."""
    replicas = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            tensor = parameter * 1  # what Broadcast returns: a tensor with a graph, no Parameter
            setattr(replica, name, tensor)
            replica._former_parameters[name] = tensor
    return replicas[network]


def test_replicas_of_data_parallel():
    network, data = fast(), image()
    with torch.no_grad():
        exact = original(network, coords(), data)
        network(None, coords(), cache_data=data)
        replica = replicate(network)
        assert difference(replica(None, coords(), cache_data=data), exact) < FLOAT32
        network.vit_up_blocks[0].mlp.mlp[0].weight.mul_(2)
        changed = original(network, coords(), data)
        assert difference(replicate(network)(None, coords(), cache_data=data), changed) < FLOAT32
        assert difference(replica(None, coords(), cache_data=data), exact) < FLOAT32
        assert is_right(network, data)
    sum(layer.sum() for layer in replicate(network)(None, coords(), cache_data=data)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.decoder_mlp.parameters())


def test_sharded_parameters(monkeypatch):
    # What is gathered anew has the same tensors and versions, and may have the same memory; a GPU reads no values.
    monkeypatch.setattr(weights.Memory, "checksum", lambda *_: 0)
    monkeypatch.setattr(weights, "_facts", lambda t: (t.shape, t.dtype, t._version))
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        data = image()
        network, plain = fast(), theirs()
        with torch.no_grad():
            network(None, coords(), cache_data=data)
        fully_shard(network, mesh=mesh)
        optimisers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (network, plain)]
        for _ in range(5):
            with torch.no_grad():
                exact = original(plain, coords(), data)
                assert difference(network(None, coords(), cache_data=data), exact) < FLOAT32
            for n, optimiser in zip((network, plain), optimisers, strict=True):
                optimiser.zero_grad()
                sum(layer.square().mean() for layer in n(None, coords(), cache_data=data)).backward()
                optimiser.step()
        network.reshard()
        with pytest.raises(InputError, match="got DTensor"):
            network.forward(None, coords(), cache_data=data)  # past the hooks that gather parameters
        blocks = fast()
        fully_shard(blocks.vit_up_blocks[0], mesh=mesh)
        with pytest.raises(InputError, match=r"vit_up_blocks\.0: expected no hooks"):
            blocks(None, coords(), cache_data=data)
        sharded = theirs()
        fully_shard(sharded, mesh=mesh)
        with pytest.raises(InputError, match="before fully_shard"):
            accelerate(sharded)
    finally:
        distributed.destroy_process_group()


class Adapter(nn.Linear):
    """A LoRA wrapper that offers the weight of what it wraps, as peft's does."""

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.base = D, D, base
        self.lora = nn.Parameter(torch.ones(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrap_linear(network: TheirViTUp) -> None:
    attention = network.vit_up_blocks[0].cross_attention
    attention.q_proj = Adapter(attention.q_proj)


def subclass_linear(network: TheirViTUp) -> None:
    network.vit_up_blocks[0].cross_attention.q_proj.__class__ = Doubled


def hook(*path: str, kind: str = "forward", names: bool = False) -> Callable[[TheirViTUp], object]:
    def register(network: TheirViTUp) -> object:
        module = network.get_submodule(".".join(path))
        return getattr(module, f"register_{kind}_hook")(lambda *_: None)

    return register


def override_forward(network: TheirViTUp) -> None:
    block = network.vit_up_blocks[0]
    block.forward = functools.partial(Block.forward, block)


def wrap_block(network: TheirViTUp) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.inner = block

        def forward(self, *args: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, *args, use_reentrant=False)

    network.vit_up_blocks[0] = Checkpointed(network.vit_up_blocks[0])


def compile_block(network: TheirViTUp) -> None:
    network.vit_up_blocks[0] = torch.compile(network.vit_up_blocks[0], backend="eager")


def scale_decoder(network: TheirViTUp) -> None:
    class Scaled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    network.decoder_mlp[1].__class__ = Scaled


def reorder_blocks(network: TheirViTUp) -> None:
    class Reversed(nn.ModuleList):
        def __iter__(self):
            return reversed(list(super().__iter__()))

    network.vit_up_blocks.__class__ = Reversed


def set_all(kind: type[nn.Module], **attributes: object) -> Callable[[TheirViTUp], None]:
    def change(network: TheirViTUp) -> None:
        for module in network.modules():
            if isinstance(module, kind):
                vars(module).update(attributes)

    return change


def replace_all(kind: type[nn.Module], new: nn.Module) -> Callable[[TheirViTUp], None]:
    def change(network: TheirViTUp) -> None:
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, kind):
                    setattr(module, name, new)

    return change


NOT_CALLED = {
    "adapter": (wrap_linear, r"cross_attention\.q_proj: expected a plain"),
    "subclass": (subclass_linear, r"cross_attention\.q_proj: expected a plain"),
    "hook_on_linear": (
        hook("vit_up_blocks", "0", "mlp", "mlp", "0"),
        r"vit_up_blocks\.0\.mlp\.mlp\.0: .*hook",
    ),
    "hook_on_block": (hook("vit_up_blocks", "0"), r"vit_up_blocks\.0: .*hook after"),
    "hook_on_gelu": (hook("vit_up_blocks", "0", "mlp", "mlp", "1"), r"vit_up_blocks\.0\.mlp\.mlp\.1: .*hook"),
    "hook_on_dropout": (
        hook("vit_up_blocks", "0", "cross_attention", "proj_dropout"),
        "proj_dropout: .*hook",
    ),
    "hook_on_list": (hook("decoder_mlp", kind="forward_pre"), "decoder_mlp: .*hook before"),
    "hook_on_rope": (hook("q_rope_embeddings"), "q_rope_embeddings: .*hook"),
    "hook_on_position_code": (hook("rel_pos_enc"), "rel_pos_enc: .*hook"),
    "hook_on_query_encoder": (hook("query_embedding"), "query_embedding: .*hook"),
    "hook_on_backward": (
        hook("vit_up_blocks", "1", "featx", kind="full_backward"),
        "featx: .*hook on its backward",
    ),
    "pruned": (
        lambda n: nn.utils.prune.l1_unstructured(n.vit_up_blocks[0].mlp.mlp[0], "weight", 0.5),
        r"mlp\.mlp\.0: .*L1Unstructured",
    ),
    "old_weight_norm": (
        lambda n: nn.utils.weight_norm(n.vit_up_blocks[0].mlp.mlp[0]),
        r"mlp\.mlp\.0: .*WeightNorm",
    ),
    "own_forward": (override_forward, r"vit_up_blocks\.0: .*forward that was replaced"),
    "checkpointed": (wrap_block, r"Checkpointed.*no attribute .cross_attention"),
    "compiled_block": (compile_block, r"vit_up_blocks\.0: expected .*no forward of its own"),
}
OTHER_RESULTS = {
    "relu": (replace_all(nn.GELU, nn.ReLU()), r"mlp\.2: expected nn\.GELU"),
    "gelu_tanh": (set_all(nn.GELU, approximate="tanh"), r"mlp\.2: expected nn\.GELU"),
    "gelu_of_its_own": (
        replace_all(nn.GELU, type("GELU", (nn.GELU,), {"forward": lambda self, x: F.relu(x)})()),
        "expected nn.GELU",
    ),
    "no_residual": (lambda n: setattr(n.vit_up_blocks[1].transition_mlp, "use_residual", False), "relative"),
    "another_residual": (lambda n: setattr(n.vit_up_blocks[0].mlp, "use_residual", True), "relative"),
    "rope_base": (lambda n: setattr(n, "q_rope_embeddings", Rope(1e4, 2 * math.pi)), "relative difference"),
    "rope_scale": (lambda n: setattr(n.q_rope_embeddings, "scale", 1.0), "relative difference"),
    "rope_buffer": (lambda n: n.q_rope_embeddings.inv_freq.mul_(1.01), "relative difference"),
    "no_rope": (lambda n: setattr(n, "q_rope_embeddings", None), "relative difference"),
    "heads": (lambda n: setattr(n.vit_up_blocks[1].cross_attention, "num_heads", 1), "as published, got"),
    "projected_queries": (
        lambda n: setattr(n.query_embedding, "out_proj", nn.Linear(D, D)),
        r"query_embedding\.out_proj\.bias",
    ),
    "normalised_queries": (
        lambda n: setattr(n.query_embedding, "out_proj", nn.LayerNorm(D, elementwise_affine=False)),
        "relative difference",
    ),
    "norm_eps": (set_all(nn.LayerNorm, eps=1e-6), "eps = 1e-05"),
    "one_norm_eps": (lambda n: setattr(n.decoder_mlp[1].mlp[0], "eps", 1e-3), r"decoder_mlp\.1\.mlp\.0"),
    "dropout": (set_all(nn.Dropout, p=0.1), "in training mode.*dropout"),
    "attention_dropout": (set_all(Attention, attn_dropout=0.1), "in training mode.*dropout"),
    "decoder_class": (scale_decoder, "at layer 1"),
    "order": (reorder_blocks, "relative difference"),
    "more_layers": (lambda n: n.decoder_mlp[0].mlp.append(nn.Tanh()), r"decoder_mlp\.0\.mlp: expected"),
    "one_block_less": (lambda n: n.vit_up_blocks.__delitem__(1), "published"),
    "extra": (lambda n: setattr(n, "extra", nn.Linear(2, 2)), r"extra\.bias"),
    "another_shape": (
        lambda n: setattr(n.decoder_mlp[0].mlp, "1", nn.Linear(D, D + 1)),
        r"decoder_mlp\.0\.mlp\.1",
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [*NOT_CALLED, *OTHER_RESULTS])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_computes_something_else_is_refused(change, when):
    make, message = (NOT_CALLED | OTHER_RESULTS)[change]
    network, data = theirs(), image()
    if when == "after":
        accelerate(network)
        with torch.no_grad():
            assert is_right(network, data)
    with torch.no_grad():
        make(network)
    with pytest.raises(InputError, match=message):
        accelerate(network) if when == "before" else network(None, coords(), cache_data=data)
    if when == "before":
        assert type(network) is TheirViTUp


class FlippedCode(PositionCode):
    def forward(self, r: Tensor) -> Tensor:
        return super().forward(r.flip(-1))


def test_a_probe_sees_past_weights_that_hide_a_change():
    network = TheirViTUp()  # no modulation, LayerNorms that change nothing
    network.rel_pos_enc.forward = None
    del network.rel_pos_enc.forward
    network.rel_pos_enc = type(
        "Code", (PositionCode,), {"forward": lambda self, r: PositionCode.forward(self, r.flip(-1))}
    )(10.0)
    with pytest.raises(InputError, match="relative difference"):
        accelerate(network)


def test_dropout_that_does_nothing_is_accepted():
    network, data = theirs(dropout=0.3).eval(), image()
    accelerate(network)
    assert is_right(network, data)
    network.train()
    with pytest.raises(InputError, match="dropout"):
        network(None, coords(), cache_data=data)
    assert is_right(network.eval(), data)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_parametrizations_are_honoured(kind):
    network, data = theirs(), image()
    getattr(nn.utils.parametrizations, kind)(network.vit_up_blocks[0].cross_attention.v_proj)
    accelerate(network)  # also where each look at a weight changes it, as spectral_norm does in training
    assert is_right(network.eval(), data)
    sum(layer.sum() for layer in network(None, coords(), cache_data=data)).backward()
    assert all(p.grad is not None for p in network.vit_up_blocks[0].cross_attention.v_proj.parameters())


def test_hooks_on_the_whole_network_run():
    network, data, seen = fast(), image(), []
    network.register_forward_pre_hook(lambda *_: seen.append("before"))
    network.register_forward_hook(lambda *_: seen.append("after"))
    network(None, coords(), cache_data=data)
    assert seen == ["before", "after"]


def test_a_window_is_refused_where_the_authors_use_it():
    network, data = fast(window=2), image()
    hidden = [torch.randn(1, 4, 4, D) for _ in LAYERS]
    square = {**image(batch=1), "layer_hidden_states_hwc": hidden}
    assert is_right(network, data)
    assert is_right(network, square, coords(1, 15))
    with pytest.raises(InputError, match=r"cross_attn_window_size=0.*16 queries for 16 tokens"):
        network(None, coords(1, 16), cache_data=square)
    assert is_right(fast(window=32), square, coords(1, 16))  # it covers all tokens


def test_the_probe_leaves_no_trace():
    network = theirs(dropout=0.0)
    state = {k: (v, v._version, v.clone()) for k, v in network.state_dict(keep_vars=True).items()}
    generator = torch.get_rng_state()
    dtype = torch.get_default_dtype()
    accelerate(network)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_default_dtype() == dtype
    for name, value in network.state_dict(keep_vars=True).items():
        known, version, numbers = state[name]
        assert value is known
        assert value._version == version
        assert torch.equal(value, numbers)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    with pytest.raises(InputError, match="dropout"):
        accelerate(theirs(dropout=0.5))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "state", ["meta", "float64_default", "bfloat16_default", "inference_mode", "autocast"]
)
def test_accelerate_in_any_state(state):
    network, data = theirs(), image()
    if state == "meta":
        accelerate(network.to("meta"))
        network.to_empty(device="cpu")
        network.load_state_dict(theirs().state_dict())
        network.q_rope_embeddings = Rope(100.0, 2 * math.pi)
    elif state.endswith("default"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if state == "float64_default" else torch.bfloat16)
        try:
            accelerate(network)
        finally:
            torch.set_default_dtype(before)
    elif state == "autocast":
        with torch.autocast("cpu"):
            accelerate(network)
    else:
        with torch.inference_mode():
            accelerate(network)
    assert is_right(network, data)


def frames(count: int = 3) -> list[dict]:
    return [image(seed) for seed in range(count)]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
@pytest.mark.parametrize("write", ["copy_", "data", "numpy"])
def test_buffers_that_are_overwritten(mode, write):
    network = fast().requires_grad_(False)
    with getattr(torch, mode)():
        buffers = mapped(image(), torch.clone)
        for frame in frames():
            for buffer, t in zip(tensors(buffers), tensors(frame), strict=True):
                if write == "numpy":
                    buffer.numpy()[:] = t.numpy()
                else:
                    (buffer.data if write == "data" else buffer).copy_(t)
            assert is_right(network, buffers)


def test_layouts_slices_and_dtypes_are_told_apart():
    network = fast()
    data = mapped(image(), lambda t: t[:, :3, :3].contiguous())
    with torch.no_grad():
        assert is_right(network, data)
        assert is_right(network, mapped(data, lambda t: t.transpose(1, 2)))
        assert is_right(network, mapped(data, lambda t: t[:1]), coords(1))
        assert is_right(network, data)
        assert is_right(
            network, {**data, "query_embedding_cache_data": image(6)["query_embedding_cache_data"]}
        )
        assert is_right(network, data)
        for t in tensors(data)[:2]:
            t.transpose_(1, 2)  # the same tensor, read along its columns
            assert is_right(network, data)
        tensors(data)[-1].transpose_(1, 2)
        assert is_right(network, data)
        data["layer_hidden_states_hwc"][1].set_(image(4)["layer_hidden_states_hwc"][1][:, :3, :3])
        assert is_right(network, data)
        assert is_right(network, mapped(data, Tensor.double))
        assert is_right(network, mapped(data, lambda t: t.flip(0)))
        data["layer_hidden_states_hwc"][2] = image(5)["layer_hidden_states_hwc"][2][:, :3, :3]
        assert is_right(network, data)


def test_autocast_is_told_from_full_precision():
    network, data = fast(), image()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            low = network(None, coords(), cache_data=data)
        assert 1e-4 < difference(low, original(network, coords(), data)) < 0.05
        assert is_right(network, data)


def test_an_image_is_prepared_once(monkeypatch):
    network, data, calls = fast(), image(), []
    prepare = ViTUp.prepare

    def count(*args: object, impl: str = "auto") -> object:
        calls.extend([] if impl == "reference" else [impl])  # the probe's apart
        return prepare(*args, impl=impl)

    monkeypatch.setattr(ViTUp, "prepare", count)
    with torch.no_grad():
        for _ in range(3):
            network(None, coords(), cache_data=data)
        assert len(calls) == 1
        network.eval()
        network(None, coords(), cache_data=data)
        assert len(calls) == 1
    with torch.inference_mode():
        inferred = mapped(data, torch.clone)
        for _ in range(3):
            network(None, coords(), cache_data=inferred)
        assert len(calls) == 2


@pytest.mark.parametrize("prepared", ["no_grad", "inference_mode"])
def test_gradients_after_an_image_was_prepared_without(prepared):
    network = fast()
    with getattr(torch, prepared)():
        data = mapped(image(), torch.clone)
        network(None, coords(), cache_data=data)
    for trains in (True, False):
        network.requires_grad_(trains)
        xy, plain_xy = (coords().double().requires_grad_() for _ in range(2))
        sum(t.sum() for t in network(None, xy, cache_data=data)).backward()
        twin, exact = copy.deepcopy(network).double(), mapped(data, lambda t: t.clone().double())
        sum(t.sum() for t in TheirViTUp.forward(twin, None, plain_xy, cache_data=exact)).backward()
        assert (xy.grad - plain_xy.grad).norm() < 1e-4 * plain_xy.grad.norm()
        if trains:
            for p, q in zip(network.parameters(), twin.parameters(), strict=True):
                assert (p.grad - q.grad).norm() < 1e-4 * q.grad.norm() + 1e-4


def test_threads_with_images_of_their_own():
    network, images, wrong = fast(), frames(4), []
    exact = [original(network, coords(), data) for data in images]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                if difference(network(None, coords(), cache_data=images[i]), exact[i]) > FLOAT32:
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def save_and_load(network: TheirViTUp, path) -> TheirViTUp:
    torch.save(network, path)
    return torch.load(path, weights_only=False)


COPIES = {
    "deepcopy": lambda n, _: copy.deepcopy(n),
    "pickle": lambda n, _: pickle.loads(pickle.dumps(n)),
    "old_pickle": lambda n, _: pickle.loads(pickle.dumps(n, protocol=2)),
    "save": lambda n, path: save_and_load(n, path / "model.pt"),
    "held": lambda n, _: copy.deepcopy(nn.ModuleList([n]))[0],
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", COPIES)
def test_copies(kind, used, tmp_path):
    network, data = fast(), image()
    with torch.no_grad():
        if used:
            network(None, coords(), cache_data=data)
        twin = COPIES[kind](network, tmp_path)
        assert type(twin) is type(network)
        before = original(network, coords(), data)
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        assert is_right(twin, data)
        assert difference(network(None, coords(), cache_data=data), before) < FLOAT32
        assert difference(twin(None, coords(), cache_data=data), before) > 1e-3


def run_in_child(network: TheirViTUp, data: dict, queue) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(
            [
                type(network).__mro__[1].__name__,
                *(t.numpy() for t in network(None, coords(), cache_data=data)),
            ]
        )


def test_spawned_process():
    network, data = fast(), image()
    with torch.no_grad():
        exact = original(network, coords(), data)
        network(None, coords(), cache_data=data)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=run_in_child, args=(network.requires_grad_(False), data, queue))
    process.start()
    name, *outputs = queue.get()
    process.join()
    assert name == "_Accelerated"
    assert difference([torch.from_numpy(t) for t in outputs], exact) < FLOAT32


def no_backend(*_: object) -> None:
    raise AssertionError("compiled")


@pytest.mark.parametrize("how", ["used", "copied"])
def test_compile(how):
    torch.compiler.reset()
    network, options = theirs().requires_grad_(False), {"fullgraph": True, "backend": "eager"}
    network.compile(backend=no_backend)
    accelerate(network)
    if how == "used":
        network(None, coords(), cache_data=image())  # what was to be compiled before is forgotten
        compiled = torch.compile(network, **options)
    else:
        compiled = network = copy.deepcopy(network)
        network.compile(**options)
    for data in frames(2):
        exact = original(network, coords(), data)
        assert difference(compiled(None, coords(), cache_data=data), exact) < FLOAT32


def test_a_compiled_network_is_accelerated_inside():
    network = theirs()
    holder = SimpleNamespace(vit_up=torch.compile(network, backend="eager"))
    assert accelerate(holder) is holder
    assert type(network) is not TheirViTUp


@pytest.mark.parametrize(("strict", "used"), [(False, True), (True, False)])
def test_export(strict, used):
    torch.compiler.reset()
    network, data = fast().requires_grad_(False).eval(), image()
    if used:
        network(None, coords(), cache_data=data)
    program = torch.export.export(network, (None, coords()), {"cache_data": data}, strict=strict)
    other = image(2)
    features = program.module()(None, coords(), cache_data=other)
    assert difference(features, original(network, coords(), other)) < FLOAT32
    assert is_right(network, other)


def test_a_network_is_freed_with_its_last_reference():
    network, data = fast(), image()
    with torch.no_grad():
        network(None, coords(), cache_data=data)
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "wrong", [nn.Linear(2, 2), ViTUp(ViTUpConfig.preset("tiny")), SimpleNamespace(vit_up=3), None, 3]
)
def test_other_things_are_refused(wrong):
    with pytest.raises(InputError, match="model: expected"):
        accelerate(wrong)


def test_a_replaced_forward_is_refused():
    network = theirs()
    network.forward = functools.partial(TheirViTUp.forward, network)
    with pytest.raises(InputError, match="Accelerate it first"):
        accelerate(network)
