from __future__ import annotations

import pytest
import torch

from vitup_fast.testing import OPERATIONS

IMPLS = ("torch", "reference")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param
