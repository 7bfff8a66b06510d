"""The network in every state of PyTorch: right, or refused in one sentence; float64 by definition is the judge."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.utils.prune
from conftest import FAST_IMPLS, default_dtype
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vitup_fast import InputError, ViTUp, ViTUpConfig
from vitup_fast.network.weights import Look, Memory, Snapshot, _portable_checksum
from vitup_fast.testing import assert_within_budget, random_coords, random_image, random_network

CONFIG = ViTUpConfig(dim=64, num_heads=2, layer_indices=(0, 1, 2))
IMPLS = [name for name in FAST_IMPLS if name in ("torch", "cpu", "triton")]
COUNT = 50


def make_image(seed):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return random_image(CONFIG, generator, token_grid=(4, 6), patch_grid=(8, 12))


@pytest.fixture(scope="module")
def network():
    return random_network(CONFIG, torch.Generator().manual_seed(1)).requires_grad_(False)


@pytest.fixture
def changing(network):
    """A copy that a test may change."""
    return copy.deepcopy(network)


@pytest.fixture(scope="module")
def coords():
    return random_coords(torch.Generator().manual_seed(2), 1, COUNT)


def definition(network, image, coords, dtype, *, grad=False):
    """Features by the definition in a dtype, from the network as it is now; with gradients of what requires them."""
    wide = copy.deepcopy(network).to(dtype)
    hidden_states, grid = image
    with nullcontext() if grad else torch.no_grad():
        cache = wide.prepare([h.to(dtype) for h in hidden_states], grid.to(dtype), impl="reference")
        return wide(cache, coords.to(torch.promote_types(dtype, torch.float32)), impl="reference")


def assert_right(actual, network, image, coords):
    exact = definition(network, image, coords, torch.float64)
    assert_within_budget(actual, definition(network, image, coords, torch.float32), exact, factor=1.5)


def features(network, image, coords, impl):
    return network(network.prepare(*image, impl=impl), coords, impl=impl)


STATES = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autograd": torch.enable_grad,
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("state", STATES)
def test_global_states_change_nothing(network, coords, state, impl):
    image = make_image(3)
    with STATES[state]():
        actual = features(network, image, coords, impl)
        dense = network.dense(network.prepare(*image, impl=impl), (5, 7), impl=impl)
    assert_right(actual, network, image, coords)
    assert torch.equal(dense, network.dense(network.prepare(*image, impl=impl), (5, 7), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("state", ["default bfloat16", "default float64", "meta device"])
def test_global_states_change_no_gradient(network, coords, state, impl):
    image, leaf = make_image(3), coords.clone().requires_grad_()
    with STATES[state]():
        features(network, image, leaf, impl).sum().backward()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        exact_leaf = coords.clone().to(dtype).requires_grad_()
        definition(network, image, exact_leaf, dtype, grad=True).sum().backward()
        gradients.append(exact_leaf.grad)
    assert_within_budget(leaf.grad, *gradients, factor=1.5, name="coords")


@pytest.mark.parametrize("state", STATES)
def test_constants_do_not_depend_on_the_state_they_are_made_in(network, coords, state):
    with STATES[state]():
        made = ViTUp(CONFIG)
    if state == "meta device":
        made = made.to_empty(device="cpu")
    made = made.float()
    with STATES[state]() if state == "inference mode" else nullcontext():
        weights = {k: v.clone() for k, v in network.state_dict().items() if "freqs" not in k}
        made.load_state_dict(weights, strict=False)
    for name, constant in (("rel_pos_enc", "freqs"), ("rope", "inv_freq")):
        expected = getattr(getattr(network, name), constant)
        assert torch.equal(getattr(getattr(made, name), constant), expected)
        assert expected.dtype == torch.float32
    assert_right(features(made, make_image(3), coords, "auto"), network, make_image(3), coords)


# Traced, faked, transformed


class Queried(nn.Module):
    def __init__(self, network, cache):
        super().__init__()
        self.network, self.cache = network, cache

    def forward(self, coords):
        return self.network(self.cache, coords)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", ["trace", "make_fx", "export", "strict export", "compile"])
def test_traced_networks_are_right(changing, how, warm):
    """At coordinates that were not seen while tracing, also after calls that remember packed weights."""
    image, seen = make_image(3), random_coords(torch.Generator().manual_seed(4), 1, COUNT)
    module = Queried(changing, changing.prepare(*image))
    if warm:
        module(seen)
    torch._dynamo.reset()
    traced = {
        "trace": lambda: torch.jit.trace(module, (seen,), check_trace=False),
        "make_fx": lambda: make_fx(module)(seen),
        "export": lambda: torch.export.export(module, (seen,), strict=False).module(),
        "strict export": lambda: torch.export.export(module, (seen,), strict=True).module(),
        "compile": lambda: torch.compile(module, fullgraph=True, backend="aot_eager"),
    }[how]()
    other = random_coords(torch.Generator().manual_seed(5), 1, COUNT)
    assert_right(traced(other), changing, image, other)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_networks_take_any_number_of_queries(network, strict):
    image, seen = make_image(3), random_coords(torch.Generator().manual_seed(4), 1, COUNT)
    module = Queried(network, network.prepare(*image))
    shapes = ({1: torch.export.Dim("count", min=2, max=100_000)},)
    exported = torch.export.export(module, (seen,), dynamic_shapes=shapes, strict=strict).module()
    other = random_coords(torch.Generator().manual_seed(5), 1, 3 * COUNT)
    assert_right(exported(other), network, image, other)


def test_dense_compiles_as_one_graph(network):
    image, size = make_image(3), (5, 7)
    cache = network.prepare(*image)
    torch._dynamo.reset()
    compiled = torch.compile(lambda cache: network.dense(cache, size), fullgraph=True, backend="aot_eager")
    exact = copy.deepcopy(network).double().dense(cache.to(torch.float64), size, impl="reference")
    assert_within_budget(compiled(cache), network.dense(cache, size, impl="reference"), exact, factor=1.5)


def test_fake_tensors_give_fake_tensors(network, coords):
    mode = FakeTensorMode()
    cache = network.prepare(*make_image(3))
    state = {**network.state_dict(), "rope.inv_freq": network.rope.inv_freq}
    state, cache, coords = pytree.tree_map(mode.from_tensor, (state, cache, coords))
    with mode:
        output = torch.func.functional_call(network, state, (cache, coords))
    assert type(output).__name__ == "FakeTensor"
    assert output.shape == (1, COUNT, 64)


def test_meta_networks_give_meta_tensors(network, coords):
    meta = copy.deepcopy(network).to("meta")
    image = [h.to("meta") for h in make_image(3)[0]], make_image(3)[1].to("meta")
    assert meta(meta.prepare(*image), coords.to("meta")).device.type == "meta"


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "functional_call", "vmap", "jvp"])
def test_transforms_are_right(network, coords, transform):
    image = make_image(3)
    cache = network.prepare(*image)
    wide, wide_cache = copy.deepcopy(network).double(), cache.to(torch.float64)

    def run(network, cache, coords, impl):
        query = lambda c: network(cache, c, impl=impl)  # noqa: E731
        ones = torch.ones_like(coords)
        if transform == "grad":
            return torch.func.grad(lambda c: query(c).sum())(coords)
        if transform == "vjp":
            output, pull = torch.func.vjp(query, coords)
            return pull(torch.ones_like(output))[0]
        if transform == "jacrev":
            return torch.func.jacrev(lambda c: query(c).sum((1, 2)))(coords)
        if transform == "vmap":
            return torch.func.vmap(lambda c: query(c[None])[0])(torch.cat((coords, coords.flip(1))))
        if transform == "jvp":
            return torch.func.jvp(query, (coords,), (ones,))[1]
        state = {name: t * 1.5 for name, t in network.named_parameters()}
        return torch.func.functional_call(network, state, (cache, coords), {"impl": impl})

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = run(wide, wide_cache, coords.double(), "reference")
        eager = run(network, cache, coords, "reference")
    assert_within_budget(run(network, cache, coords, "auto"), eager, exact, factor=1.5)


def test_a_cache_is_a_pytree(network):
    cache = network.prepare(*make_image(3))
    leaves, spec = pytree.tree_flatten(cache)
    assert len(leaves) == len(cache.tensors)
    again = pytree.tree_unflatten([t * 2 for t in leaves], spec)
    assert type(again) is type(cache)
    assert torch.equal(again.keys[1], cache.keys[1] * 2)
    assert torch.equal(again.patch_grid, cache.patch_grid * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"return_all_layers": True}])
def test_weights_packed_by_pytorch_pass_the_checks(network, coords, dtype, options):
    """Several chunks pack weights for oneDNN where the CPU has it."""
    image = [h.to(dtype) for h in make_image(3)[0]], make_image(3)[1].to(dtype)
    low = copy.deepcopy(network).to(dtype)
    cache = low.prepare(*image, impl="torch")
    chunked, whole = (low(cache, coords, impl="torch", query_chunk_size=n, **options) for n in (20, COUNT))
    torch.testing.assert_close(chunked, whole, rtol=2e-2, atol=2e-2)


# Weights that change


def replace_linear(network):
    layer = nn.Linear(64, 64).requires_grad_(False)
    network.decoder_mlp[2].mlp[1] = layer


def replace_parameter(network):
    network.vit_up_blocks[0].mlp.mlp[0].weight = nn.Parameter(torch.randn(256, 64), requires_grad=False)


def swap_memory(network):
    weight = network.vit_up_blocks[0].cross_attention.q_proj.weight
    weight.data = weight.data.t()


def write_numpy(network):
    network.vit_up_blocks[0].featx.gamma_beta_mlp.mlp[0].weight.detach().numpy()[7] = 0.3


COUNTED = {
    "copy_": lambda n: n.vit_up_blocks[1].mlp.mlp[2].weight.mul_(1.1),
    "norm": lambda n: n.vit_up_blocks[1].norm_post.bias.add_(0.5),
    "load_state_dict": lambda n: n.load_state_dict({k: v * 1.1 for k, v in n.state_dict().items()}),
    "assign": lambda n: n.load_state_dict({k: v * 1.1 for k, v in n.state_dict().items()}, assign=True),
    "replaced layer": replace_linear,
    "replaced parameter": replace_parameter,
    "replaced block": lambda n: n.vit_up_blocks.__setitem__(0, copy.deepcopy(n.vit_up_blocks[1])),
    "memory of another layout": swap_memory,
    "memory of other values": lambda n: setattr(n.decoder_mlp[2].mlp[1].weight, "data", torch.randn(64, 64)),
    "frequencies": lambda n: n.rel_pos_enc.freqs.mul_(0.9),
}
UNCOUNTED = {
    "an element": lambda n: n.decoder_mlp[2].mlp[1].weight.data[5].__setitem__(3, 2.0),
    "a row": lambda n: n.decoder_mlp[2].mlp[1].weight.data.__setitem__(5, 0.0),
    "a bias": lambda n: n.vit_up_blocks[0].mlp.mlp[0].bias.data.__setitem__(-1, 3.0),
    "the last value": lambda n: n.vit_up_blocks[1].mlp.mlp[2].weight.data[-1].__setitem__(-1, 3.0),
    "everything": lambda n: [p.data.mul_(0.9) for p in n.parameters()],
    "signs": lambda n: n.vit_up_blocks[0].mlp.mlp[0].weight.data.neg_(),
    "order": lambda n: (lambda w: w.copy_(w.flip(0).clone()))(n.vit_up_blocks[0].mlp.mlp[0].weight.data),
    "numpy": write_numpy,
    "a key projection": lambda n: n.vit_up_blocks[1].cross_attention.k_proj.weight.data.__setitem__(9, 0.0),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change", [*COUNTED, *UNCOUNTED])
def test_changed_weights_are_noticed_with_a_new_image(changing, coords, impl, change):
    with torch.no_grad():
        features(changing, make_image(3), coords, impl)
        {**COUNTED, **UNCOUNTED}[change](changing)
        actual = features(changing, make_image(4), coords, impl)
    changing.requires_grad_(False)
    assert_right(actual, changing, make_image(4), coords)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("change", [*COUNTED, "a row", "a bias", "everything", "signs", "order", "numpy"])
def test_changed_weights_are_noticed_with_the_same_image(changing, coords, impl, change):
    if impl == "triton" and change in UNCOUNTED:
        pytest.skip("a GPU reads its weights with a new image alone")
    with torch.no_grad():
        cache = changing.prepare(*make_image(3), impl=impl)
        changing(cache, coords, impl=impl)
        {**COUNTED, **UNCOUNTED}[change](changing)
        actual = changing(cache, coords, impl=impl)
        eager = changing(cache, coords, impl="reference")
        wide = copy.deepcopy(changing).double()
        exact = wide(cache.to(torch.float64), coords.double(), impl="reference")
    assert_within_budget(actual, eager, exact, factor=1.5)


def test_every_value_is_compared_in_large_calls(changing):
    coords = random_coords(torch.Generator().manual_seed(6), 1, 4096)
    cache = changing.prepare(*make_image(3))
    changing(cache, coords)
    UNCOUNTED["an element"](changing)
    exact = copy.deepcopy(changing).double()(cache.to(torch.float64), coords.double(), impl="reference")
    assert_within_budget(
        changing(cache, coords), changing(cache, coords, impl="reference"), exact, factor=1.5
    )


def compiled_checksum(tensors):
    return Memory.of([t.contiguous() for t in tensors]).checksum(Look.EVERY_VALUE)


@pytest.mark.parametrize("checksum", [compiled_checksum, _portable_checksum])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_checksums_see_every_value_and_its_place(checksum, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(0, 100, shape, generator=generator).to(dtype)
        for shape in ((5, 7), (3,), (1, 1), (4, 4))
    ]
    seen = {checksum(tensors)}
    for t in tensors:
        for place in range(t.numel()):
            t.view(-1)[place] += 1
            seen.add(checksum(tensors))
            t.view(-1)[place] -= 1
    assert len(seen) == 1 + sum(t.numel() for t in tensors)
    for changed in ([t.flip(0) for t in tensors], tensors[::-1], tensors[1:]):
        assert checksum(changed) not in seen


def test_snapshots_know_tensors_by_themselves():
    tensors = [torch.randn(4, 4), torch.randn(4)]
    snapshot = Snapshot(tensors)
    assert snapshot.holds(tensors)
    assert not snapshot.holds([tensors[0].clone(), tensors[1]])
    assert not snapshot.holds([tensors[0].detach(), tensors[1]])  # the same memory, another tensor
    assert not snapshot.holds(tensors[:1])
    tensors[1].add_(1)
    assert not snapshot.holds(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looks_at_large_matrices_see_rows_or_the_whole(dtype):
    """What calls that cannot afford to read every value notice."""
    matrices = [
        torch.randn(1024, 384).to(dtype),
        torch.randn(384, 1024).to(dtype),
        torch.randn(384).to(dtype),
    ]
    snapshot = Snapshot(matrices, checksums=True)
    assert all(snapshot.holds(matrices, look) for look in Look)
    for matrix in matrices[:2]:
        for row in (0, 1, 5, len(matrix) - 1):
            kept = matrix[row].clone()
            matrix.data[row] = 0
            assert not snapshot.holds(matrices, Look.EVERY_ROW)
            matrix.data[row] = kept
        assert snapshot.holds(matrices, Look.EVERY_VALUE)
        matrix.data[7, 300] += 1
        assert not snapshot.holds(matrices, Look.EVERY_VALUE)
        matrix.data.mul_(0.9)
        assert not snapshot.holds(matrices, Look.SOME_ROWS)
        snapshot = Snapshot(matrices, checksums=True)
    matrices[2].data[383] = 3
    assert not snapshot.holds(matrices, Look.SOME_ROWS)


# Images that change


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("impl", IMPLS)
def test_images_may_be_overwritten_in_place(network, coords, impl, mode):
    """A video loop: the same buffers, the next frame."""
    with mode():
        buffers = [t.clone() for t in make_image(3)[0]], make_image(3)[1].clone()
        for seed in (3, 4, 5):
            frame = make_image(seed)
            for buffer, values in zip((*buffers[0], buffers[1]), (*frame[0], frame[1]), strict=True):
                buffer.copy_(values)
            actual = features(network, buffers, coords, impl)
            assert_right(actual, network, frame, coords)


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("part", ["keys", "values", "tokens", "patch_grid"])
def test_caches_may_be_overwritten_in_place(network, coords, impl, made, part):
    with made():
        cache = network.prepare(*make_image(3), impl=impl).map(torch.clone)
        for _ in range(3):
            network(cache, coords, impl=impl)
            tensors = getattr(cache, part)
            (tensors if part == "patch_grid" else tensors[0]).mul_(1.3)
            actual = network(cache, coords, impl=impl)
            eager = network(cache, coords, impl="reference")
            exact = copy.deepcopy(network).double()(
                cache.to(torch.float64), coords.double(), impl="reference"
            )
            assert_within_budget(actual, eager, exact, factor=1.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_caches_are_caches_of_their_own(network, impl):
    """Slices, transposed images and other views share memory, not meaning."""
    generator = torch.Generator().manual_seed(7)
    hidden_states, grid = random_image(CONFIG, generator, batch=3, token_grid=(4, 4), patch_grid=(8, 8))
    coords = random_coords(generator, 3, COUNT)
    with torch.no_grad():
        whole = network.prepare(hidden_states, grid, impl=impl)
        expected = network(whole, coords, impl=impl)
        for images in (slice(0, 2), slice(1, 3), [2, 0], 1):
            where = coords[images] if not isinstance(images, int) else coords[images : images + 1]
            part = expected[images] if not isinstance(images, int) else expected[images : images + 1]
            torch.testing.assert_close(network(whole[images], where, impl=impl), part, rtol=1e-5, atol=1e-5)
        turned = [h.transpose(1, 2) for h in hidden_states], grid.transpose(1, 2)
        actual = features(network, turned, coords, impl)
    assert_right(actual, network, turned, coords)


# Modes in which images and networks are made


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("what", ["image", "network", "both", "coords"])
def test_what_is_made_in_inference_mode_takes_part_in_gradients(network, coords, impl, what):
    image, leaf = make_image(3), coords.clone().requires_grad_()
    used = network
    with torch.inference_mode():
        if what in ("network", "both"):
            used = ViTUp(CONFIG)
            used.load_state_dict(network.state_dict())
        if what in ("image", "both"):
            image = [h.clone() for h in image[0]], image[1].clone()
            cache = used.prepare(*image, impl=impl)
        others = coords.clone()
    if what in ("network", "coords"):
        cache = used.prepare(*image, impl=impl)
    if what == "coords":
        used = copy.deepcopy(network).requires_grad_()
        used(cache, others, impl=impl).sum().backward()
        assert all(p.grad.isfinite().all() for p in used.decoder_mlp[2].parameters())
        return
    used(cache, leaf, impl=impl).sum().backward()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        exact_leaf = coords.clone().to(dtype).requires_grad_()
        definition(network, make_image(3), exact_leaf, dtype, grad=True).sum().backward()
        gradients.append(exact_leaf.grad)
    assert_within_budget(leaf.grad, *gradients, factor=1.5, name="coords")


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_narrows_nothing_that_is_used_outside(network, coords, impl):
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            narrow = network.prepare(*make_image(3), impl=impl)
            network(narrow, coords, impl=impl)
        with pytest.raises(
            InputError, match=r"cache: expected keys and values in torch.float32.*prepare it again"
        ):
            network(narrow, coords, impl=impl)
        wide = network.prepare(*make_image(3), impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(wide, coords, impl=impl).dtype == torch.bfloat16
        assert_right(network(wide, coords, impl=impl), network, make_image(3), coords)


# Layers that are read, not called


class LowRank(nn.Module):
    """A wrapper that shows its layer's weight, as adapters do."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + x.mean()


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def set_child(network, name, child):
    owner, _, leaf = name.rpartition(".")
    network.get_submodule(owner)._modules[leaf] = child


READ = [
    "vit_up_blocks.0.transition_mlp.mlp.1",
    "vit_up_blocks.1.cross_attention.k_proj",
    "vit_up_blocks.0.featx.gamma_beta_mlp.mlp.2",
    "vit_up_blocks.0.norm_h_local",
    "decoder_mlp.2.mlp.1",
]
LINEAR = [name for name in READ if "norm" not in name]
CONTAINERS = [
    "vit_up_blocks",
    "vit_up_blocks.0",
    "vit_up_blocks.1.featx",
    "vit_up_blocks.0.mlp.mlp",
    "decoder_mlp.0",
]


@pytest.mark.parametrize("name", READ + CONTAINERS)
@pytest.mark.parametrize(
    "hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "forward"]
)
def test_hooks_are_refused_by_name(changing, coords, name, hook):
    cache, module = changing.prepare(*make_image(3)), changing.get_submodule(name)
    if hook == "forward":
        module.forward = lambda x: x
    else:
        getattr(module, hook)(lambda *_: None)
    with pytest.raises(InputError, match=rf"^{name}: expected a plain "):
        changing(cache, coords)
    with pytest.raises(InputError, match=rf"^{name}: expected a plain "):
        changing.prepare(*make_image(3))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("wrap", ["adapter", "subclass", "prune", "weight_norm", "no bias"])
def test_wrapped_layers_are_refused_by_name(changing, coords, name, wrap):
    cache, layer = changing.prepare(*make_image(3)), changing.get_submodule(name)
    out, width = layer.weight.shape
    if wrap == "adapter":
        set_child(changing, name, LowRank(layer))
    elif wrap == "subclass":
        set_child(changing, name, Louder(width, out))
    elif wrap == "no bias":
        set_child(changing, name, nn.Linear(width, out, bias=False))
    elif wrap == "prune":
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
    else:
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(layer)
    with pytest.raises(InputError, match=rf"^{name}: expected a "):
        changing(cache, coords)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LINEAR)
def test_parametrizations_are_honoured(changing, coords, name, impl):
    class Scaled(nn.Module):
        factor = 1.5

        def forward(self, weight):
            return weight * self.factor

    layer = changing.get_submodule(name)
    with torch.no_grad():
        features(changing, make_image(3), coords, impl)
        merged = copy.deepcopy(changing)
        merged.get_submodule(name).weight.mul_(1.5)
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
        assert_right(features(changing, make_image(3), coords, impl), merged, make_image(3), coords)
        Scaled.factor = 0.5
        merged.get_submodule(name).weight.mul_(0.5 / 1.5)
        assert_right(features(changing, make_image(3), coords, impl), merged, make_image(3), coords)


@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("vit_up_blocks.0.mlp.mlp.1", nn.ReLU()),
        ("vit_up_blocks.0.mlp.mlp.1", nn.GELU(approximate="tanh")),
        ("vit_up_blocks.1.norm_post", nn.LayerNorm(64, eps=1e-6)),
        ("vit_up_blocks.1.norm_post", nn.LayerNorm(64, elementwise_affine=False)),
        ("vit_up_blocks.0.mlp.mlp", nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))),
        ("vit_up_blocks.0.featx", nn.Identity()),
    ],
)
def test_other_layers_are_refused_by_name(changing, coords, name, child):
    cache = changing.prepare(*make_image(3))
    set_child(changing, name, child)
    with pytest.raises(InputError, match=rf"^{name}.*: expected "):
        changing(cache, coords)


# Copies, files, threads


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_run_on_weights_of_their_own(changing, coords, how):
    cache = changing.prepare(*make_image(3))
    changing(cache, coords)
    file = io.BytesIO()
    if how == "torch.save":
        torch.save(changing, file)
        file.seek(0)
    copied = {
        "pickle": lambda: pickle.loads(pickle.dumps(changing)),
        "deepcopy": lambda: copy.deepcopy(changing),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }[how]()
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(0.5)
        assert_right(features(copied, make_image(3), coords, "auto"), copied, make_image(3), coords)
        assert not torch.allclose(copied(cache, coords), changing(cache, coords))


def test_threads_with_images_of_their_own(network, coords):
    expected = [features(network, make_image(seed), coords, "auto") for seed in range(4)]
    failures = []

    def work(seed):
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(features(network, make_image(seed), coords, "auto"), expected[seed]):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Sizes


@pytest.mark.parametrize("size", [(10**7, 10**7), (2**40, 1), (1, 2**40)])
@pytest.mark.parametrize("options", [{}, {"head": (torch.ones(3, 64), None), "labels": True}])
def test_results_larger_than_memory_are_refused_at_once(network, size, options):
    with pytest.raises(InputError, match=r"size: expected a result that fits the .* GiB of cpu"):
        network.dense(network.prepare(*make_image(3)), size, **options)
