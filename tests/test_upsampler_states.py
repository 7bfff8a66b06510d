"""The Upsampler in every state of PyTorch: each call answers for its own images and the present weights."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch

import vitup_fast
from vitup_fast import InputError, Upsampler
from vitup_fast.sources import seeded_network

TINY = vitup_fast.ViTUpConfig.preset("tiny")
SIZES = ((70, 90), (64, 64))  # what strips and what folds into the patch embedding


def make_model():
    network, vit = seeded_network(TINY)
    return Upsampler(network, vit).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_image(seed, size=SIZES[0], batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def make_coords(seed=0, batch=1):
    return torch.rand(batch, 20, 2, generator=torch.Generator().manual_seed(seed))


def fresh(model, image, coords):
    """Features by a model that has never seen another image or other weights."""
    copied = make_model().to(model.dtype)
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        return copied(image, coords)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_threads_get_features_of_their_own_images():
    model, coords = make_model(), make_coords()
    images = [make_image(seed, SIZES[1]) for seed in range(4)]
    expected = [model(image, coords) for image in images]
    dense = [model.dense(image, (3, 5)) for image in images]
    failures = []

    def work(i):
        for _ in range(40):
            if not torch.equal(model(images[i], coords), expected[i]):
                failures.append(i)
            if not torch.equal(model.dense(images[i], (3, 5)), dense[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def scaled_state(model):
    return {k: v * 1.05 if v.is_floating_point() else v for k, v in model.state_dict().items()}


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(scaled_state(m)),
    "assign": lambda m: m.load_state_dict(scaled_state(m), assign=True),
    "backbone": lambda m: m.backbone.model.blocks[0].attn.qkv.weight.mul_(5),
    "patch embedding": lambda m: m.backbone.model.patch_embed.proj.bias.add_(0.1),
    "keys": lambda m: m.vit_up.vit_up_blocks[0].cross_attention.k_proj.weight.mul_(1.1),
    "replaced block": lambda m: m.backbone.model.blocks.__setitem__(
        0, copy.deepcopy(m.backbone.model.blocks[1])
    ),
    "dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["forward", "dense", "points", "cache"])
def test_weights_may_change_after_images_are_set(change, method):
    model, image, coords = make_model(), make_image(1), make_coords()
    kept = list(model.parameters())  # old parameters that live on change nothing

    def ask(model):
        if method == "forward":
            return model(query_coords=coords)
        if method == "dense":
            return model.dense(size=(3, 5))
        if method == "points":
            return model.points(coords * 60)
        return model.get_cache_data().keys[0]

    with torch.no_grad():
        model.set_images(image)
        before = ask(model)
        CHANGES[change](model)
        actual = ask(model)
        again = make_model().to(model.dtype)
        again.load_state_dict(model.state_dict())
        again.set_images(image)
        close(actual, ask(again))
    assert change == "dtype" or not torch.allclose(actual, before)
    assert kept


def test_training_on_one_image_follows_its_weights():
    model, coords = make_model().requires_grad_(), make_coords()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model.set_images(make_image(1))
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(query_coords=coords).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    with torch.no_grad():
        close(model(query_coords=coords), fresh(model, make_image(1), coords))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("state", ["new", "set", "trained"])
def test_copies(how, state):
    model, image, coords = make_model(), make_image(1), make_coords()
    if state == "trained":
        model.requires_grad_()
        model(image, coords).sum().backward()
    elif state == "set":
        model.set_images(image)
    file = io.BytesIO()
    if how == "torch.save":
        torch.save(model, file)
        file.seek(0)
    copied = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }[how]()
    with torch.no_grad():
        close(copied(image, coords), model(image, coords))
        copied = copy.deepcopy(model) if how == "deepcopy" else copied
        for parameter in model.parameters():
            parameter.mul_(0.9)
        if how == "deepcopy" and state != "new":
            close(copied(query_coords=coords), fresh(copied, image, coords))
    if how != "deepcopy":
        other = pickle.loads(pickle.dumps(model))
        with pytest.raises(InputError, match="images: expected images, or a call of set_images before"):
            other(query_coords=coords)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["export", "strict export", "compile", "trace"])
def test_traced_upsamplers_are_right(size, how):
    model, seen, coords = make_model(), make_image(1, size), make_coords()
    model(seen, coords)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = {
            "export": lambda: torch.export.export(model, (seen, coords), strict=False).module(),
            "strict export": lambda: torch.export.export(model, (seen, coords), strict=True).module(),
            "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
            "trace": lambda: torch.jit.trace(model, (seen, coords), check_trace=False),
        }[how]()
    other, where = make_image(2, size), make_coords(5)
    close(traced(other, where), fresh(model, other, where))
    close(model(query_coords=coords), fresh(model, seen, coords))  # what was set before is still there


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("argument", ["coords", "image"])
def test_functional_gradients(model, size, argument):
    image, coords = make_image(1, size), make_coords()
    functions = {
        "coords": (coords, lambda c: model(image, c).square().sum()),
        "image": (image, lambda i: model(i, coords).square().sum()),
    }
    value, function = functions[argument]
    leaf = value.clone().requires_grad_()
    function(leaf).backward()
    torch.testing.assert_close(torch.func.grad(function)(value), leaf.grad, rtol=1e-3, atol=1e-3)
    model.set_images(image)
    close(model(query_coords=coords), fresh(model, image, coords))


@pytest.mark.parametrize("order", [("autocast", "plain"), ("plain", "autocast")])
def test_images_set_under_autocast(order):
    model, image, coords = make_model(), make_image(1), make_coords()

    def mode(name):
        return torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast")

    with torch.no_grad():
        with mode(order[0]):
            model.set_images(image)
            model(query_coords=coords)
        with mode(order[1]):
            actual = model(query_coords=coords)
            expected = make_model()(image, coords)
    assert actual.dtype == (torch.bfloat16 if order[1] == "autocast" else torch.float32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("made", ["load", "set_images", "both"])
def test_inference_mode_leaves_models_that_can_learn(made):
    image, coords = make_image(1), make_coords()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if made == "set_images":
            model = vitup_fast.load("tiny", "random", device="cpu")
        with torch.inference_mode():
            if made != "set_images":
                model = vitup_fast.load("tiny", "random", device="cpu")
            if made != "load":
                model.set_images(image.clone())
    leaf = coords.clone().requires_grad_()
    model(None if made != "load" else image, leaf).sum().backward()
    exact = coords.clone().requires_grad_()
    make_model()(image, exact).sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-3, atol=1e-3)
    model.requires_grad_()
    model(image, coords).sum().backward()
    assert all(p.grad is not None for p in model.vit_up.decoder_mlp[-1].parameters())


@pytest.mark.parametrize("size", [64, np.int64(64), (64, 64), [np.int32(64), 64], torch.Size((64, 64))])
def test_sizes_are_integers_of_any_kind(size):
    network, vit = seeded_network(TINY)
    model = Upsampler(network, vit, hidden_layer_img_size=size)
    assert model.hidden_layer_img_size == (64, 64)
    assert {type(n) for n in model.hidden_layer_img_size} == {int}


@pytest.mark.parametrize(
    "options", [{"query_chunk_size": 0}, {"query_chunk_size": True}, {"max_memory": -1}, {"max_memory": 1.5}]
)
def test_budgets_are_checked_at_once(options):
    network, vit = seeded_network(TINY)
    (name,) = options
    with pytest.raises(InputError, match=f"{name}: expected a positive integer"):
        Upsampler(network, vit, **options)


@pytest.mark.parametrize("name", ["images", "query_coords", "pixels"])
def test_tensors_without_values_are_refused_by_name(model, name):
    image, coords = make_image(1), make_coords()
    calls = {
        "images": lambda: model.set_images(image.to("meta")),
        "query_coords": lambda: model(image, coords.to("meta")),
        "pixels": lambda: model.points(coords.to("meta"), image),
    }
    with pytest.raises(InputError, match=f"{name}: expected a tensor that holds values"):
        calls[name]()
