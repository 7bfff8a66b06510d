from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import vitup_fast
import vitup_fast.ops
import vitup_fast.testing

OPTIONAL = (
    "timm",
    "triton",
    "safetensors",
    "PIL",
    "tqdm",
    "huggingface_hub",
    "torchvision",
    "hypothesis",
    "pytest",
)

SCRIPT = f"""
import random, sys
import numpy, torch

for name in {OPTIONAL!r}:
    sys.modules[name] = None

def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state()),
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.enabled, sys.getrecursionlimit(),
    )

before = state()
import vitup_fast, vitup_fast.ops, vitup_fast.heads, vitup_fast.testing
assert state() == before, "a global state changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert "torch._inductor" not in sys.modules, "a compiler was loaded"

network = vitup_fast.ViTUp(vitup_fast.ViTUpConfig(dim=16, num_heads=1, layer_indices=(0, 1)))
cache = network.prepare([torch.zeros(1, 2, 2, 16)] * 2, torch.zeros(1, 4, 4, 16))
assert network(cache, torch.rand(1, 3, 2)).shape == (1, 3, 16)
"""


def test_import_needs_torch_alone_and_changes_nothing():
    run = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


def public(module):
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    values = [(n, getattr(module, n)) for n in names]
    return [(n, v) for n, v in values if (inspect.isclass(v) or inspect.isfunction(v))]


@pytest.mark.parametrize("module", [vitup_fast, vitup_fast.ops, vitup_fast.testing], ids=lambda m: m.__name__)
def test_public_names_are_documented(module):
    names = public(module)
    assert names
    for name, value in names:
        if not value.__module__.startswith("vitup_fast"):
            continue
        assert value.__doc__, name
        assert not value.__doc__.startswith(f"{name}("), f"{name} has only a generated docstring"
        members = vars(value).items() if inspect.isclass(value) else ()
        for member, function in members:
            if inspect.isfunction(function) and not member.startswith("_"):
                assert function.__doc__, f"{name}.{member}"


def test_exported_names_exist():
    for module in (vitup_fast, vitup_fast.ops):
        assert sorted(set(module.__all__)) == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
