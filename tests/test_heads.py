from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from vitup_fast import InputError
from vitup_fast.heads import fold_head, head_parameters
from vitup_fast.ops.checks import check_coords, check_features

D, C = 32, 5


def linear_head(bias=True):
    torch.manual_seed(0)
    return nn.Linear(D, C, bias=bias).double()


def convolution(bias=True):
    head = nn.Conv2d(D, C, 1, bias=bias).double()
    head.load_state_dict(
        {
            n: t.view(p.shape)
            for (n, p), t in zip(head.named_parameters(), linear_head(bias).parameters(), strict=True)
        }
    )
    return head


HEADS = {
    "linear": linear_head,
    "linear without bias": lambda: linear_head(bias=False),
    "convolution": convolution,
    "convolution without bias": lambda: convolution(bias=False),
    "tuple": lambda: tuple(linear_head().parameters()),
    "tuple without bias": lambda: (linear_head().weight, None),
}


def apply(head, features):
    weight, bias = head_parameters(head, D)
    return nn.functional.linear(features, weight, bias)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_head_of_the_features(network, cache, coords, impl, head):
    head = head()
    with torch.no_grad():
        expected = apply(head, network(cache, coords))
        actual = network(cache, coords, head=head, query_chunk_size=11, impl=impl)
        assert actual.shape == (3, 29, C)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        dense = network.dense(cache, (6, 9), head=head, impl=impl)
        expected = apply(head, network.dense(cache, (6, 9)))
        torch.testing.assert_close(dense, expected, rtol=1e-11, atol=1e-11)


def test_convolution_equals_its_module(network, cache):
    head = convolution()
    with torch.no_grad():
        features = network.dense(cache, (6, 9)).permute(0, 3, 1, 2)
        scores = network.dense(cache, (6, 9), head=head).permute(0, 3, 1, 2)
        torch.testing.assert_close(scores, head(features), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_head_and_network(network, image, coords, frozen):
    network = copy.deepcopy(network).requires_grad_(not frozen)
    head = linear_head()
    parameters = [*head.parameters(), *([] if frozen else network.parameters())]
    grads = []
    for run in (
        lambda cache: network(cache, coords, head=head, query_chunk_size=11),
        lambda cache: head(network(cache, coords)),
    ):
        scores = run(network.prepare(*image))
        grads.append(torch.autograd.grad(scores.square().sum(), parameters, allow_unused=True))
    assert grads[0][0].any()
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_folding_is_exact_under_autocast(generator):
    weight, bias = torch.randn(D, D, generator=generator), torch.randn(D, generator=generator)
    head = linear_head().float()
    expected = fold_head(head, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        actual = fold_head(head, weight, bias)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_folding_in_low_precision_rounds_once(generator):
    weight, bias = (torch.randn(s, generator=generator).bfloat16() for s in ((D, D), (D,)))
    head = linear_head().bfloat16()
    exact = fold_head(copy.deepcopy(head).double(), weight.double(), bias.double())
    for actual, e in zip(fold_head(head, weight, bias), exact, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - e).norm() <= 1.01 * (e.bfloat16().double() - e).norm()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(D + 1, C), r"head: expected a weight of shape \(C, 32\), got \(5, 33\)"),
        (nn.Conv2d(D, C, 3), r"head: expected a weight of shape \(C, 32\), got \(5, 32, 3, 3\)"),
        (
            nn.ReLU(),
            r"head: expected nn.Linear, 1x1 nn.Conv2d or \(weight, bias\), got torch.nn.modules.activation.ReLU",
        ),
        (lambda x: x, "head: expected nn.Linear, .*, got function"),
        ((torch.zeros(C, D), torch.zeros(C + 1)), r"head: expected a bias of shape \(5,\), got \(6,\)"),
        ((torch.zeros(C, D),), "head: expected nn.Linear, .*, got tuple"),
        ((torch.zeros(D), None), r"head: expected a weight of shape \(C, 32\), got \(32,\)"),
    ],
)
def test_not_a_head(network, cache, coords, head, message):
    with pytest.raises(InputError, match=message):
        network(cache, coords, head=head)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


class Adapter(nn.Module):
    """A wrapper as peft makes it: parameters of the layer in it, and another result."""

    def __init__(self):
        super().__init__()
        self.base_layer = linear_head()
        self.weight, self.bias = self.base_layer.weight, self.base_layer.bias

    def forward(self, x):
        return 2 * self.base_layer(x)


def replaced():
    head = linear_head()
    head.forward = lambda x: x
    return head


def hooked(register):
    head = linear_head()
    getattr(head, register)(lambda *_: None)
    return head


def weight(**options):
    return torch.zeros(C, D, **options)


BAD_HEADS = {
    "no classes": (lambda: (torch.zeros(0, D), None), "at least one class, got a weight of shape .0, 32."),
    "no classes in a layer": (lambda: nn.Conv2d(D, 0, 1), "at least one class"),
    "stride": (lambda: nn.Conv2d(D, C, 1, stride=2), "1x1 convolution .* got stride .2, 2., padding .0, 0."),
    "stride along one axis": (lambda: nn.Conv2d(D, C, 1, stride=(1, 2)), "1x1 convolution .* stride .1, 2."),
    "padding": (lambda: nn.Conv2d(D, C, 1, padding=1), "1x1 convolution .* padding .1, 1."),
    "groups": (lambda: nn.Conv2d(2 * D, C + 1, 1, groups=2), "1x1 convolution .* groups 2"),
    "transposed": (lambda: nn.ConvTranspose2d(D, C, 1), "nn.Linear, 1x1 .* got .*ConvTranspose2d"),
    "one axis": (lambda: nn.Conv1d(D, C, 1), "nn.Linear, 1x1 .* got .*Conv1d"),
    "lazy": (lambda: nn.LazyLinear(C), "plain Linear.*a hook before it: _infer_parameters"),
    "weight_norm": (lambda: weight_norm(linear_head()), "plain Linear.*a hook before it: WeightNorm"),
    "spectral_norm": (lambda: spectral_norm(convolution()), "plain Conv2d.*a hook before it: SpectralNorm"),
    "prune": (lambda: prune.l1_unstructured(linear_head(), "weight", 0.5), "before it: L1Unstructured"),
    "subclass": (lambda: Twice(D, C), "Twice with a forward of its own"),
    "forward replaced": (replaced, "Linear with a forward of its own"),
    "wrapper": (Adapter, "nn.Linear, 1x1 .* got .*Adapter"),
    **{
        register: (lambda register=register: hooked(register), "plain Linear.*got a hook .*<lambda>")
        for register in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
    "sparse": (lambda: (weight().to_sparse(), None), "dense tensor, got layout torch.sparse_coo"),
    "nested": (lambda: (torch.nested.nested_tensor([weight()]), None), "dense tensor, got a nested"),
    "meta": (lambda: (weight(device="meta"), None), "holds values, got one on the meta device"),
    "integer": (lambda: (weight(dtype=torch.int32), None), "floating dtype of .* got torch.int32"),
    "complex": (lambda: (weight(dtype=torch.complex64), None), "floating dtype of .* got torch.complex64"),
    "float8": (lambda: (weight().to(torch.float8_e5m2), None), "floating dtype of .* got torch.float8_e5m2"),
    "quantised": (
        lambda: (torch.quantize_per_tensor(weight(), 0.1, 0, torch.qint8), None),
        "floating dtype of .* got torch.qint8",
    ),
    "list as bias": (lambda: (weight(), [0.0] * C), "a tensor or None as bias, got list"),
    "integer bias": (lambda: (weight(), torch.zeros(C).int()), "floating dtype of .* got torch.int32"),
    "meta bias": (
        lambda: (weight(), torch.zeros(C, device="meta")),
        "holds values, got one on the meta device",
    ),
    "NumPy": (lambda: weight().numpy(), "nn.Linear, 1x1 .* got ndarray"),
}


@pytest.mark.parametrize(("head", "message"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_heads_that_compute_something_else_are_refused(network, cache, coords, head, message):
    for call in (
        lambda head: network(cache, coords, head=head),
        lambda head: network(cache, coords, head=head, labels=True),
        lambda head: network.dense(cache, (3, 4), head=head),
    ):
        with torch.no_grad(), pytest.raises(InputError, match=f"head.*: expected .*{message}") as caught:
            call(head())
        assert str(caught.value).isprintable()


def strided(t):
    return torch.stack((t, t), -1)[..., 0]


SAME_HEADS = {
    "parametrized": lambda: parametrizations.weight_norm(linear_head()),
    "orthogonal": lambda: parametrizations.orthogonal(linear_head()),
    "pruned for good": lambda: prune.remove(prune.l1_unstructured(linear_head(), "weight", 0.5), "weight"),
    "subclass": lambda: Renamed(D, C).double(),
    "dilation": lambda: nn.Conv2d(D, C, 1, dilation=3).double(),
    "no padding": lambda: nn.Conv2d(D, C, 1, padding="same").double(),
    "frozen": lambda: linear_head().requires_grad_(False),
    "float32": lambda: linear_head().float(),
    "strided": lambda: tuple(strided(p) for p in linear_head().parameters()),
    "expanded": lambda: (torch.ones(1, 1).double().expand(C, D), torch.ones(1).double().expand(C)),
    "inference": lambda: tuple(linear_head().parameters()),
}


@pytest.mark.parametrize("name", SAME_HEADS)
def test_heads_that_compute_what_their_parameters_say(network, cache, coords, name):
    with torch.inference_mode(name == "inference"):
        head = SAME_HEADS[name]()
    with torch.no_grad():
        features = network(cache, coords)
        if isinstance(head, tuple):
            want = nn.functional.linear(features, *head)
        elif isinstance(head, nn.Conv2d):
            want = head(features.mT.unsqueeze(-1))[..., 0].mT
        else:
            want = head.double()(features)
        actual = network(cache, coords, head=head)
        torch.testing.assert_close(actual, want, rtol=1e-10, atol=1e-10)


def test_gradients_reach_what_parametrizes_a_head(network, cache, coords):
    head = parametrizations.weight_norm(linear_head())
    parameters = list(head.parameters())
    scores = network(cache, coords, head=head)
    exact = head(network(cache, coords))
    grads, wanted = (torch.autograd.grad(s.square().sum(), parameters) for s in (scores, exact))
    for mine, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.to_sparse(), "dense tensor, got layout torch.sparse_coo"),
        (lambda t: t.to_mkldnn(), "dense tensor, got layout torch._mkldnn"),
        (lambda t: torch.nested.nested_tensor([t[0], t[0]]), "dense tensor, got a nested tensor"),
        (
            lambda t: torch.nested.nested_tensor([t[0], t[0]], layout=torch.jagged),
            "dense tensor, got a nested",
        ),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "dtype.* got torch.quint8"),
        (lambda t: t.to(torch.complex64), "dtype.* got torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "dtype.* got torch.float8_e4m3fn"),
        (lambda t: t.int(), "dtype.* got torch.int32"),
        (lambda t: t.numpy(), "a tensor of shape .* got ndarray"),
        (lambda t: t.tolist(), "a tensor of shape .* got list"),
        (lambda t: None, "a tensor of shape .* got NoneType"),
    ],
)
def test_coordinates_and_features_are_dense_floats(spoil, message):
    with pytest.raises(InputError, match=f"^coords: expected .*{message}"):
        check_coords(spoil(torch.zeros(3, 4, 2)))
    with pytest.raises(InputError, match=f"^x: expected .*{message}"):
        check_features("x", spoil(torch.zeros(3, 4, 2)), "(B, N, D)")


def test_coordinates_and_features_may_be_any_view():
    for view in (nn.Parameter, strided, lambda t: t[:1].expand(3, -1, -1), lambda t: t.to("meta")):
        check_coords(view(torch.zeros(3, 4, 2)), 3, 4)
        check_features("x", view(torch.zeros(3, 4, 2)), "(B, N, D)", 2)
