from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton cannot be used here", allow_module_level=True)

from vitup_fast.bench import launches, tune
from vitup_fast.bench.harness import judge
from vitup_fast.kernels.triton import common, linear

from vitup_fast import ViTUpConfig
from vitup_fast.errors import KernelError
from vitup_fast.testing import Sizes

CPU = torch.device("cpu")
SIZES = Sizes(B=1, N=40, D=64, heads=2, token_grid=(2, 4), expansion=1)
TASK = tune.Task("linear", SIZES, torch.float32, CPU)
BLOCKS = {
    "BLOCK_M": (32, 64),
    "BLOCK_N": (32,),
    "BLOCK_K": (32,),
    "TILES": (1,),
    "num_warps": (4,),
    "num_stages": (2,),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("VITUP_FAST_CACHE", str(tmp_path))
    for cached in (common._tables, common._setting, tune.prepared):
        cached.cache_clear()
    yield
    for cached in (common._tables, common._setting, tune.prepared):
        cached.cache_clear()


@pytest.fixture
def two_candidates(monkeypatch):
    """A variant with two candidates, of which the stopwatch finds 64 rows three times as fast as anything else."""
    monkeypatch.setitem(tune.VARIANTS, "linear", tune.VARIANTS["linear"]._replace(candidates=BLOCKS))

    def stopwatch(run):
        used = common.settings_for("linear", torch.empty(0), 64)
        return 1.0 if used["BLOCK_M"] == 64 and "linear" in common._overrides else 3.0

    return stopwatch


def seconds_by(stopwatch):
    return lambda task, settings: tune.candidate_seconds(task, settings, stopwatch)


@pytest.mark.parametrize("name", tune.VARIANTS)
def test_candidates_run(name):
    variant = tune.VARIANTS[name]
    every = list(tune.candidates(variant))
    assert len(every) > 10
    assert {*variant.candidates} == {*every[0]}
    used = common.settings_for(name, torch.empty(0), 384)
    assert {*used} <= {*every[0]}  # what a kernel is launched with is what is searched


def test_wide_tiles_are_tried_with_sixteen_warps():
    every = list(tune.candidates(tune.VARIANTS["linear"]))
    assert any((c["BLOCK_M"], c["BLOCK_N"], c["num_warps"]) == (128, 256, 16) for c in every)


@pytest.mark.parametrize("name", tune.VARIANTS)
def test_what_is_timed_is_that_variant_and_exact(name):
    """Every trial launches its own kernel, and its check passes by the definition."""
    trial = tune.VARIANTS[name].trial(SIZES, torch.float32, CPU)
    with launches.recording(90) as found, common.overridden_settings({}, name):
        trial.run()
    assert name in {launch.variant for launch in found}
    with common.overridden_settings({}, name):
        checked = trial.check()
    assert judge(name, checked, trial.define(torch.float32), trial.define(torch.float64)).accurate


@pytest.mark.parametrize(("name", "call"), [("linear", "dense 448"), ("linear_rows", "dense 448")])
def test_what_is_timed_is_what_the_network_launches(name, call, monkeypatch):
    """Same kernel, constants and settings at the same size."""
    monkeypatch.setattr(torch, "randn", lambda shape, **options: torch.zeros(shape))
    config = ViTUpConfig.preset("dinov3_splus")
    rows = 132 * 128
    trial = tune.VARIANTS[name].trial(Sizes(1, rows, 384, 6, (28, 28), (224, 224), 4), torch.bfloat16, CPU)
    with launches.recording(90) as found, common.overridden_settings({}, name):
        trial.run()
    (network,) = launches.network_launches(config, torch.bfloat16, 90, (call,)).values()

    def kinds(recorded):
        sizes = {(launch.arguments[0].shape, *sorted(launch.options.items(), key=str)) for launch in recorded}
        return {str(s) for s in sizes}

    assert kinds(found)
    assert kinds(found) <= kinds(network)


def test_the_fastest_wins(two_candidates):
    best, least, before = tune.tune_role(TASK, seconds_by(two_candidates))
    assert best["BLOCK_M"] == 64
    assert (least, before) == (1.0, 3.0)


def test_wrong_and_failing_candidates_are_passed_over(two_candidates, monkeypatch):
    launch = linear.launch

    def spoiled(kernel, grid, *arguments, **options):
        if options["variant"] == "linear" and options["BLOCK_M"] == 64:
            raise KernelError("does not fit")
        launch(kernel, grid, *arguments, **options)
        if options["variant"] == "linear":
            arguments[8].mul_(1.01)

    monkeypatch.setattr(linear, "launch", spoiled)
    best, least, before = tune.tune_role(TASK, seconds_by(lambda run: 1.0))
    assert best is None
    assert least == before == float("inf")  # on this "GPU" nothing works, and nothing is recommended


def test_settings_are_written_found_and_resumed(two_candidates, monkeypatch, capsys):
    monkeypatch.setattr(tune, "stopwatch_for", lambda device: two_candidates)
    monkeypatch.setattr(tune.Worker, "each", lambda self, function, arguments, progress: None)
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


def test_a_crash_ends_one_candidate_alone(capsys):
    done = []
    with tune.Worker() as worker:
        assert worker.call(abs, -1, otherwise=None) == 1
        assert worker.call(os._exit, 3, otherwise=float("inf")) == float("inf")
        # A GPU's errors outlive a call.
        assert worker.call(exec, "raise RuntimeError('CUDA error: illegal')", otherwise=0.5) == 0.5
        assert worker.call(abs, -1, otherwise=None) == 1
        worker.each(exec, [("pass",), ("import os; os._exit(3)",), ("pass",)], lambda: done.append(True))
    assert len(done) == 3
    assert "CUDA error" in capsys.readouterr().err
