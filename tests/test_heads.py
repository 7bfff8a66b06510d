from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitup_fast import InputError
from vitup_fast.heads import fold_head, head_parameters

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
        (nn.ReLU(), r"head: expected nn.Linear, 1x1 nn.Conv2d or \(weight, bias\), got ReLU"),
        (lambda x: x, "head: expected nn.Linear, .*, got function"),
        ((torch.zeros(C, D), torch.zeros(C + 1)), r"head: expected a bias of shape \(5,\), got \(6,\)"),
        ((torch.zeros(C, D),), "head: expected nn.Linear, .*, got tuple"),
        ((torch.zeros(D), None), r"head: expected a weight of shape \(C, 32\), got \(32,\)"),
    ],
)
def test_not_a_head(network, cache, coords, head, message):
    with pytest.raises(InputError, match=message):
        network(cache, coords, head=head)
