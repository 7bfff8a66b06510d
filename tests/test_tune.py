from __future__ import annotations

import json

import pytest
import torch
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton cannot be used here", allow_module_level=True)

from vitup_fast.bench import tune
from vitup_fast.kernels.triton import common, linear

from vitup_fast.errors import KernelError
from vitup_fast.testing import Sizes

SIZES = Sizes(B=1, N=40, D=64, heads=2, token_grid=(2, 4), expansion=1)
BLOCKS = {"BLOCK_M": (32, 64), "BLOCK_N": (32,), "BLOCK_K": (32,), "TILES": (1,), "num_warps": (4,)}


@pytest.fixture
def two_candidates(monkeypatch, tmp_path):
    """A variant with two candidates, of which the stopwatch finds 64 rows three times as fast as anything else."""
    monkeypatch.setitem(tune.VARIANTS, "linear", tune.Variant("residual_mlp", False, BLOCKS))
    monkeypatch.setenv("VITUP_FAST_CACHE", str(tmp_path))
    for cached in (common._tables, common._setting):
        cached.cache_clear()
    yield lambda run: 1.0 if common._overrides["linear"]["BLOCK_M"] == 64 else 3.0
    for cached in (common._tables, common._setting):
        cached.cache_clear()


@pytest.mark.parametrize("name", tune.VARIANTS)
def test_candidates_run(name):
    variant = tune.VARIANTS[name]
    every = list(tune.candidates(variant))
    assert len(every) > 10
    assert {*variant.candidates} == {*every[0]}
    used = common.settings_for(name, torch.empty(0), 384)
    assert {*used} <= {*every[0]}  # what a kernel is launched with is what is searched


def test_the_fastest_wins(two_candidates):
    best, least, before = tune.tune_role("linear", SIZES, torch.float32, torch.device("cpu"), two_candidates)
    assert best["BLOCK_M"] == 64
    assert (least, before) == (
        1.0,
        1.0 if common.settings_for("linear", torch.empty(0), 64)["BLOCK_M"] == 64 else 3.0,
    )


def test_wrong_and_failing_candidates_are_passed_over(two_candidates, monkeypatch):
    launch = linear.launch

    def spoiled(kernel, grid, *arguments, **options):
        if options["variant"] == "linear" and options["BLOCK_M"] == 64:
            raise KernelError("does not fit")
        launch(kernel, grid, *arguments, **options)
        if options["variant"] == "linear" and options["BLOCK_M"] == 32:
            arguments[8].mul_(1.01)

    monkeypatch.setattr(linear, "launch", spoiled)
    used = common.settings_for("linear", torch.empty(0), 64)
    best, least, before = tune.tune_role("linear", SIZES, torch.float32, torch.device("cpu"), lambda run: 1.0)
    assert best == used
    assert least == before == float("inf")  # on this "GPU" nothing works, and nothing is recommended


def test_settings_are_written_found_and_resumed(two_candidates, monkeypatch, capsys):
    monkeypatch.setattr(tune, "stopwatch_for", lambda device: two_candidates)
    monkeypatch.setattr(tune.ViTUpConfig, "preset", lambda name: tune.ViTUpConfig(64, 2, (0, 1)))
    command = ["--device", "cpu", "--preset", "dinov3_splus", "--dtype", "float32", "--variants", "linear"]
    assert tune.main([*command, "--queries", "40"]) == 0
    path = common.user_settings_path("interpreter")
    (kinds,) = json.loads(path.read_text()).values()
    assert kinds["float32"]["linear"]["64"]["BLOCK_M"] == 64
    assert common.settings_for("linear", torch.empty(0), 64) == kinds["float32"]["linear"]["64"]
    assert "was" in capsys.readouterr().out
    assert tune.main([*command, "--queries", "40"]) == 0
    assert "was" not in capsys.readouterr().out
    assert tune.main([*command, "--queries", "40", "--again"]) == 0
    assert "was" in capsys.readouterr().out
