from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from vitup_fast.bench import (
    bilinear_sample,
    correctness,
    end_to_end,
    film_mlp,
    harness,
    kernel_times,
    norm_linear,
    operations,
    peaks,
    reference,
    residual_mlp,
    roofline,
    rope_cross_attention,
)
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.harness import (
    Case,
    Goal,
    Peaks,
    Sizes,
    Work,
    check_implementations,
    cpu_stopwatch,
    failed_checks,
    interleave,
    make_parser,
    measure,
    operation_case,
    parse,
    peak_probes,
    publish,
    refusals,
    write_json,
)

from vitup_fast import InputError, ViTUp, ViTUpConfig, cli
from vitup_fast.testing import OPERATIONS

CPU = torch.device("cpu")
TINY = ViTUpConfig.preset("tiny")
ROOT = Path(__file__).resolve().parent.parent
FAKE_PRODUCT, FAKE_COPY = 2 * 16**3, 2 * 64


@pytest.fixture
def fake_probes(monkeypatch):
    """Peaks of tiny runs, so that a fake stopwatch can name their times."""
    probes = {
        "torch.mm": (lambda: "product", Work(FAKE_PRODUCT)),
        "memory copy": (lambda: "copy", Work(0, FAKE_COPY)),
    }
    monkeypatch.setattr("vitup_fast.bench.harness.peak_probes", lambda device, dtype: probes)


def fake_stopwatch(seconds):
    """Take the time of a run from a table instead of a clock, by what the run returns."""
    calls = []

    def time_one(run):
        label = run()
        label = label if isinstance(label, str) else f"{label.sum().item():g}"
        calls.append(label)
        return next(seconds[label])

    return time_one, calls


def case_of(providers, exact, eager, baseline="eager", **options):
    return Case(
        title="a sum",
        count=100,
        unit="queries",
        work=Work(flops=FAKE_PRODUCT, bytes=FAKE_COPY),
        eager=lambda: eager,
        providers={name: (lambda value=value: value) for name, value in providers.items()},
        exact=lambda: exact,
        baseline=baseline,
        device=CPU,
        dtype=torch.float32,
        **options,
    )


def test_interleave_takes_turns_and_drops_the_warmup():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    clock = iter(range(100))
    times = interleave(runs, lambda run: (run(), next(clock))[1], repeats=2, warmup=1)
    assert order == list("abc" * 3)
    assert times == {"a": [3, 6], "b": [4, 7], "c": [5, 8]}


def test_figures_follow_from_the_times(fake_probes):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # The label of a provider's fake run is the sum of its result; both have the same.
    providers = {"fast": torch.tensor([1.0, 2.0])}
    stopwatch, calls = fake_stopwatch(
        {
            "product": iter([9.0, 2.0, 1.0, 4.0]),
            "copy": iter([9.0, 1.0, 2.0, 0.5]),
            "3": iter([9.0, 9.0, 8.0, 2.0, 6.0, 4.0, 7.0, 3.0]),
        }
    )
    report = measure(case_of(providers, exact, torch.tensor([1.0, 2.0])), 3, stopwatch)
    assert calls == ["product", "copy", "3", "3"] * 4
    eager, fast = report.rows
    assert (eager.provider, fast.provider) == ("eager", "fast")
    assert report.peaks == Peaks(FAKE_PRODUCT / 1.0, "torch.mm", FAKE_COPY / 0.5)
    assert (eager.seconds, eager.fastest_seconds, eager.speedup) == (7.0, 6.0, 1.0)
    assert (fast.seconds, fast.fastest_seconds) == (3.0, 2.0)
    assert (eager.quartiles, fast.quartiles) == ((6.5, 7.5), (2.5, 3.5))
    assert (eager.unsteady, fast.unsteady) == (False, True)
    lines = {line.split()[0]: line for line in report.table().splitlines()}
    assert "7000.00 " in lines["eager"]
    assert "3000.00!" in lines["fast"]
    assert "2500.00 - 3500.00" in lines["fast"]
    assert "median over 1.3 x minimum" in lines["!"]
    assert fast.rate == pytest.approx(100 / 3)
    assert fast.speedup == pytest.approx(7 / 3)
    assert fast.fraction_of_peak == pytest.approx(1 / 3)  # the product needs 1 s, the copy 0.5 s


@pytest.mark.parametrize("wrong", [[1.0, 2.1], [1.0, math.nan], [1.0]])
def test_inaccurate_provider_gets_no_time(fake_probes, wrong):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    case = case_of({"wrong": torch.tensor(wrong)}, exact, torch.tensor([1.0, 2.0]), baseline="wrong")
    report = measure(case, 2, cpu_stopwatch)
    eager, row = report.rows
    assert not row.accurate
    assert row.seconds is row.fastest_seconds is row.rate is row.speedup is row.fraction_of_peak is None
    assert row.error_ratio > 1.5
    assert eager.accurate
    assert eager.seconds is not None
    assert eager.speedup is None  # nothing to compare with
    line = next(line for line in report.table().splitlines() if line.startswith("  wrong"))
    assert "inaccurate" in line
    assert not report.passed


def test_failing_provider_hides_no_other(fake_probes):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def fail():
        raise RuntimeError("no such kernel\nand more")

    def exhaust():
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = case_of({"fast": exact.float()}, exact, exact.float(), refused={"refused": "failed its check"})
    case.providers.update(broken=fail, compiled=exhaust, refused=fail)
    report = measure(case, 1, cpu_stopwatch)
    failures = {row.provider: row.failure for row in report.rows}
    assert failures == {
        "eager": None,
        "fast": None,
        "broken": "RuntimeError: no such kernel",
        "compiled": "out of memory",
        "refused": "failed its check",
    }
    assert report.rows[1].seconds is not None
    assert "out of memory" in report.table()
    assert not report.passed


def test_only_failures_of_this_library_count(fake_probes):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    case = case_of({"compiled": exact.float() * 2, "fast": exact.float()}, exact, exact.float())
    assert measure(case, 1, cpu_stopwatch).passed


def test_check_is_judged_in_place_of_the_run(fake_probes):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    whole = torch.tensor([9.0, 1.0, 2.0])
    checks = {"fast": lambda: whole[1:], "wrong": lambda: whole[:2]}
    case = case_of({"fast": whole, "wrong": whole}, exact, exact.float(), checks=checks)
    assert [row.accurate for row in measure(case, 1, cpu_stopwatch).rows] == [True, True, False]


def test_no_round_begins_after_the_patience_is_spent():
    clock = iter(range(100))
    times = interleave({"a": lambda: None}, lambda run: next(clock), repeats=50, patience=0.0)
    assert len(times["a"]) == harness.LEAST_ROUNDS


def test_goal_stands_beside_the_figure(fake_probes):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    goal = Goal("H100", 0.017, 0.0126, 2.5, 128 * 10**6)
    table = measure(
        case_of({"fast": exact.float()}, exact, exact.float(), goal=goal), 1, cpu_stopwatch
    ).table()
    assert "goal on H100: 17.0 ms (floor 12.6), 2.5 x the compiled reference, 128 MB beyond" in table
    eager, fast = (line.split() for line in table.splitlines()[-2:])
    assert "17.00" in fast
    assert "17.00" not in eager
    assert "goal" not in measure(case_of({}, exact, exact.float()), 1, cpu_stopwatch).table()


def test_memory_is_measured_on_a_gpu(fake_probes, monkeypatch):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    # In use before and after the check of eager, before its run; the same of the other, which keeps 3 MB.
    in_use = iter([0, 0, 0, 0, 3 * 10**6, 3 * 10**6])
    peaks = iter([10**6 + 8, 7 * 10**6 + 8])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(in_use))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    case = case_of({"fast": exact.float()}, exact, exact.float(), cache_bytes=2 * 10**6)
    case = dataclasses.replace(case, device=torch.device("cuda"))
    rows = harness.judge_all(case, {"eager": case.eager, **case.providers})
    # The result has 8 bytes.
    assert [(row.memory, row.kept) for row in rows] == [(-(10**6), 0), (2 * 10**6, 3 * 10**6)]


def test_goals_are_those_of_one_gpu(monkeypatch):
    cuda, splus, base = torch.device("cuda"), *map(ViTUpConfig.preset, ("dinov3_splus", "dinov3_base"))
    monkeypatch.setattr(end_to_end, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    bf16 = torch.bfloat16
    assert end_to_end.goal_for(splus, 448**2, 448, False, cuda, bf16) == Goal(
        "H100", 17e-3, 12.6e-3, 2.5, 128 * 10**6
    )
    assert end_to_end.goal_for(base, 448**2, 448, False, cuda, bf16).seconds == 62e-3
    assert end_to_end.goal_for(base, 4096, None, False, cuda, bf16) == Goal("H100", memory=128 * 10**6)
    assert end_to_end.goal_for(base, 75000, None, True, cuda, bf16) == Goal("H100", 94e-3)
    assert end_to_end.goal_for(splus, 448**2, 448, False, cuda, torch.float32) is None
    assert end_to_end.goal_for(splus, 448**2, 448, False, CPU, bf16) is None
    monkeypatch.setattr(end_to_end, "device_name", lambda device: "another GPU")
    assert end_to_end.goal_for(splus, 448**2, 448, False, cuda, bf16) is None


def test_another_dtype_is_inaccurate(fake_probes):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    report = measure(case_of({"wide": exact}, exact, exact.float()), 1, cpu_stopwatch)
    assert not report.rows[1].accurate


def test_error_is_measured_in_units_of_eager(fake_probes):
    exact = torch.zeros(2, dtype=torch.float64) + 1
    case = case_of({"close": torch.tensor([1.014, 1.0])}, exact, torch.tensor([1.01, 1.0]))
    close = measure(case, 1, cpu_stopwatch).rows[1]
    assert close.accurate
    assert close.error_ratio == pytest.approx(1.4, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_probes_run(monkeypatch, dtype):
    zeros = torch.zeros
    monkeypatch.setattr("torch.randn", lambda *_, **options: zeros(2, 16, 16, **options))
    monkeypatch.setattr("torch.zeros", lambda size, **kwargs: zeros(64, **kwargs))
    probes = peak_probes(CPU, dtype)
    assert {"torch.mm", "F.linear", "memory copy"} <= set(probes)
    assert ("multiply-adds" in probes) == any(
        i.name == "cpu" and i.available for i in harness.implementations()
    )
    for run, _ in probes.values():
        run()
    found = harness.peaks_of(probes, dict.fromkeys(probes, 0.5))
    assert found.matrix == 2 * 2 * 2048**3
    assert (found.copy, found.l2) == (2 * 2 * 2**27, None)


def test_peaks_know_the_l2_cache():
    probes = {"torch.mm": (None, Work(8)), "memory copy": (None, Work(0, 6)), "L2 copy": (None, Work(0, 6))}
    assert harness.peaks_of(probes, {"torch.mm": 2, "memory copy": 3, "L2 copy": 1}) == Peaks(
        4, "torch.mm", 2, 6
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "benchmark", [bilinear_sample, film_mlp, norm_linear, residual_mlp, rope_cross_attention]
)
def test_operation_cases_agree(benchmark, backward):
    for case in benchmark.cases(TINY, 50, 4):
        small = case._replace(sizes=Sizes(1, 50, 64, 2, (4, 4), (8, 8), case.sizes.expansion))
        case = operation_case(small, CPU, torch.float32, backward=backward, compiled=False)
        assert case.work.flops + case.work.bytes > 0
        eager = case.eager()
        for run in [case.exact, *case.providers.values()]:
            torch.testing.assert_close(run(), eager, check_dtype=False, atol=1e-3, rtol=1e-3)


def test_operation_command_writes_json(fake_probes, tmp_path, capsys):
    path = tmp_path / "norm_linear.json"
    arguments = ["--preset", "tiny", "--queries", "40", "--repeats", "1", "--no-compile", "--json", str(path)]
    assert norm_linear.main(arguments) == 0
    reports = json.loads(path.read_text())
    assert [r["dtype"] for r in reports] == ["float32", "bfloat16"]
    assert reports[0]["work"]["flops"] == 2 * 40 * 64**2
    assert "norm_linear" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("judged", [49, 9])
@pytest.mark.parametrize("mode", ["dense", "scattered", "backward", "training", "autocast", "prepared"])
def test_network_case_agrees(dtype, mode, judged):
    if mode == "autocast" and dtype == torch.float32:
        pytest.skip("autocast to float32 is none")
    case = end_to_end.network_case(
        ViTUpConfig.preset("tiny"),
        49,
        mode not in ("scattered", "training"),
        CPU,
        dtype,
        backward=mode in ("backward", "training"),
        autocast=mode == "autocast",
        prepared=mode == "prepared",
        compiled=False,
        chunks=[20],
        judged=judged,
        token_grid=(5, 5),
        patch_grid=(9, 9),
    )
    kept = ["torch, checkpoint op", "torch, checkpoint block"] if mode == "training" else []
    assert list(case.providers) == ["torch", "torch, chunk 20", *kept]
    assert list_of(case.eager())[0].shape[1] == 49
    assert list_of(case.exact())[0].shape[1] == judged
    assert case.work.bytes > 0
    exact, eager = case.exact(), case.checks["eager"]()
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    for name, run in case.providers.items():
        assert list_of(run())[0].shape[1] == 49
        result = case.checks[name]()
        for actual, plain, truth in zip(*map(list_of, (result, eager, exact)), strict=True):
            assert actual.shape == plain.shape == truth.shape
            assert actual.dtype == plain.dtype
            error = (actual.double() - truth).norm() / truth.norm()
            assert error < tolerance


def list_of(result):
    return [result] if isinstance(result, torch.Tensor) else result


def test_network_command_writes_the_promised_fields(fake_probes, tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = [
        "--preset",
        "tiny",
        "--queries",
        "49",
        "--repeats",
        "2",
        "--dtype",
        "float32",
        "--no-compile",
    ]
    assert end_to_end.main([*arguments, "--json", str(path)]) == 0
    dense, scattered = json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    assert dense["versions"]["torch"] == torch.__version__
    assert dense["threads"] == torch.get_num_threads()
    assert dense["count"] == 49
    assert {"title", "dtype", "device", "peaks", "repeats", "baseline", "detail"} <= set(dense)
    assert dense["work"]["flops"] < scattered["work"]["flops"]
    names = [row["provider"] for row in dense["rows"]]
    assert names == ["eager", "cpu", "torch"]
    for row in dense["rows"]:
        assert set(row) == {
            *("provider", "error", "error_ratio", "accurate", "failure", "memory", "kept"),
            *("seconds", "fastest_seconds", "quartiles", "rate", "speedup", "fraction_of_peak"),
        }
    assert "torch" in capsys.readouterr().out


def test_work_is_that_of_the_cost_table():
    splus, base = ViTUpConfig.preset("dinov3_splus"), ViTUpConfig.preset("dinov3_base")
    assert end_to_end.query_flops(splus, 784, True) == pytest.approx(50e6, rel=0.01)
    assert end_to_end.query_flops(base, 784, True) == pytest.approx(185e6, rel=0.01)
    D = splus.dim
    difference = end_to_end.query_flops(splus, 784, True) - end_to_end.query_flops(splus, 784, False)
    assert difference == 6 * (4 * D**2 + 132 * D)
    work = end_to_end.least_work(splus, 784, 448**2, True)
    assert work.flops == pytest.approx(10e12, rel=0.02)


def test_grid_coords_are_cell_centres():
    coords = end_to_end.grid_coords(2, CPU)
    assert coords.tolist() == [[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]]


def test_memory_of_a_dense_pass():
    report = end_to_end.dense_memory_apart(ViTUpConfig.preset("tiny"), 160, CPU, torch.float32)
    assert report.output == 160 * 160 * 64 * 4
    assert 0 < report.weights < report.resident
    assert 0 < report.beyond_output < report.goal
    assert report.beyond_output < report.first_pass < report.goal
    assert "beyond the output" in report.table()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "tpu9"], "--device"),
        (["--device", "meta"], "--device"),
        (["--device", f"cuda:{torch.cuda.device_count()}"], "--device"),
        (["--queries", "0"], "--queries"),
        (["--queries", "50", "--preset", "tiny"], "--queries"),
        (["--repeats", "-1"], "--repeats"),
        (["--json", "/no/such/directory/figures.json"], "--json"),
        (["--autocast", "--dtype", "float32"], "--autocast"),
        (["--prepared", "--backward"], "--prepared"),
        (["--dense", "0"], "--dense"),
        (["--sparse", "-3"], "--sparse"),
        (["--impl", "torhc"], "--impl"),
        (["--impl", "reference"], "--impl"),
        (["--correctness", "/no/such/file.json"], "--correctness"),
        (["--roofline", "/no/such/directory/roofline.png"], "--roofline"),
    ],
)
def test_mistakes_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        end_to_end.main([*arguments, "--no-compile", "--quick"])


def test_directory_is_no_json_file(tmp_path):
    with pytest.raises(InputError, match="--json"):
        check_writable(tmp_path)


def test_exit_code_of_a_mistake(capsys):
    def main():
        raise InputError("--device: expected a GPU")

    assert exit_code(main) == 2
    assert capsys.readouterr().err == "--device: expected a GPU\n"


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "figures.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_publish_prints_every_table(fake_probes, capsys):
    exact = torch.tensor([1.0], dtype=torch.float64)
    report = measure(case_of({}, exact, exact.float()), 1, cpu_stopwatch)
    publish([report, report], None)
    assert capsys.readouterr().out.count("a sum, float32") == 2


def test_suite_and_lists_of_sizes():
    def sizes(*arguments):
        options = argparse.Namespace(queries=49, dense=None, sparse=None, suite=False)
        vars(options).update(arguments)
        return end_to_end.sizes(options)

    assert sizes() == [(49, True), (49, False)]
    assert sizes(("dense", [2, 3])) == [(4, True), (9, True)]
    assert sizes(("dense", [2]), ("sparse", [7])) == [(4, True), (7, False)]
    suite = [(s**2, True) for s in (224, 448, 896, 1024, 2048)] + [(n, False) for n in (100, 1000, 4096)]
    assert sizes(("suite", True)) == suite


@pytest.mark.parametrize(
    ("count", "limit", "lengths"),
    [(10, 10, [10]), (12, 5, [4, 4, 4]), (16, 6, [4] * 4), (1024**2, 448**2, [2**17] * 8), (7, 3, [2, 2, 3])],
)
def test_pieces_are_equal_where_they_can_be(count, limit, lengths):
    spans = end_to_end.pieces(count, limit)
    assert [s.stop - s.start for s in spans] == lengths
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert spans[-1].stop == count


def test_a_prepared_image_is_prepared_once(monkeypatch):
    images, prepare = [], ViTUp.prepare
    monkeypatch.setattr(ViTUp, "prepare", lambda *a, **k: images.append(a[1][0].dtype) or prepare(*a, **k))
    options = {"compiled": False, "token_grid": (5, 5), "patch_grid": (9, 9)}
    work = [end_to_end.network_case(TINY, 49, False, CPU, torch.float32, **options).work]
    case = end_to_end.network_case(TINY, 49, False, CPU, torch.float32, prepared=True, **options)
    assert case.title.endswith("49 scattered queries, image prepared before")
    assert case.work.flops < work[0].flops
    for _ in range(3):
        case.providers["torch"]()
    assert images == [torch.float32]


def test_pieces_do_not_change_the_definition(monkeypatch):
    sizes = {"token_grid": (5, 5), "patch_grid": (9, 9), "compiled": False}
    for backward in (False, True):
        case = end_to_end.network_case(TINY, 49, True, CPU, torch.float32, backward=backward, **sizes)
        whole = case.checks["eager"]()
        with monkeypatch.context() as patch:
            patch.setattr(end_to_end, "pieces", lambda count: [slice(0, 9), slice(9, 20), slice(20, count)])
            parts = case.checks["eager"]()
        assert len(whole) == (TINY.num_layers + 3 if backward else 1)
        for part, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


def test_implementations_of_a_device(monkeypatch):
    listed = [
        argparse.Namespace(name="triton", available=True, reason="for GPUs"),
        argparse.Namespace(name="cuda", available=False, reason="it is not built"),
        argparse.Namespace(name="cpu", available=True, reason="for CPUs"),
        argparse.Namespace(name="torch", available=True, reason=""),
        argparse.Namespace(name="reference", available=True, reason=""),
    ]
    monkeypatch.setattr(harness, "implementations", lambda: listed)
    cuda = torch.device("cuda")
    assert check_implementations(None, cuda) == ["triton", "torch"]
    assert check_implementations(["torch"], cuda) == ["torch"]
    assert check_implementations(None, CPU) == ["cpu", "torch"]
    with pytest.raises(InputError, match="it is not built"):
        check_implementations(["cuda"], cuda)
    with pytest.raises(InputError, match="runs on a CPU"):
        check_implementations(["cpu"], cuda)
    monkeypatch.setattr(harness, "interpreted", lambda: False)
    with pytest.raises(InputError, match="runs on a GPU"):
        check_implementations(["triton"], CPU)
    monkeypatch.setattr(harness, "interpreted", lambda: True)
    assert check_implementations(["triton"], CPU) == ["triton"]


def test_what_failed_its_checks_is_not_timed(fake_probes, tmp_path, capsys):
    def check(**facts):
        facts = {
            "operation": "norm_linear",
            "impl": "torch",
            "dtype": "float32",
            "direction": "forward",
            "width": 64,
        } | facts
        return facts | {"passed": False}

    path = tmp_path / "correctness.json"
    passed = check() | {"passed": True}
    write_json(path, {"checks": [check(dtype="bfloat16"), check(direction="backward"), passed]})
    options = parse(make_parser(""), ["--preset", "tiny", "--correctness", str(path)])
    assert refusals(options, "norm_linear", torch.float32, 64) == {}
    assert refusals(options, "norm_linear", torch.bfloat16, 64) == {
        "torch": "failed the forward check of norm_linear at D = 64"
    }
    # One red check refuses its own timing alone.
    assert refusals(options, "norm_linear", torch.bfloat16, 384) == {}
    assert refusals(options, "film_mlp", torch.bfloat16, 64) == {}
    assert refusals(options, "network", torch.bfloat16, 64) == {}
    options.backward = True
    assert refusals(options, "norm_linear", torch.float32, 64) != {}

    figures = tmp_path / "figures.json"
    arguments = ["--preset", "tiny", "--queries", "40", "--repeats", "1", "--no-compile"]
    assert norm_linear.main([*arguments, "--correctness", str(path), "--json", str(figures)]) == 1
    wide, narrow = ({r["provider"]: r for r in report["rows"]} for report in json.loads(figures.read_text()))
    assert wide["torch"]["seconds"] is not None
    assert narrow["eager"]["seconds"] is not None
    assert narrow["torch"]["seconds"] is None
    assert "failed the forward check" in capsys.readouterr().out

    path.write_text("[1]")
    with pytest.raises(InputError, match="--correctness"):
        failed_checks(path)


def test_operations_are_all_there():
    cases = operations.cases(TINY, 50, 4)
    assert {case.operation for case in cases} == set(OPERATIONS)


# Correctness


def test_correctness_passes_and_writes_its_checks(tmp_path, capsys):
    path = tmp_path / "correctness.json"
    arguments = ["--quick", "--operation", "norm_linear", "film_mlp_table", "golden", "--dtype", "float32"]
    assert correctness.main([*arguments, "--json", str(path)]) == 0
    assert failed_checks(path) == frozenset()
    checks = json.loads(path.read_text())["checks"]
    kinds = {(c["operation"], c["direction"]) for c in checks}
    operations = ("norm_linear", "film_mlp_table", "golden")
    assert kinds == {(o, d) for o in operations for d in ("forward", "backward")}
    assert any(c["impl"] == "reference" and c["dtype"] == "float64" for c in checks)
    assert len(capsys.readouterr().out.splitlines()) == len(checks) + 1


@pytest.mark.parametrize("part", correctness.NETWORK_PARTS)
def test_every_part_of_the_network_is_checked(part):
    tasks = correctness.network_tasks(["torch"], [torch.bfloat16], CPU, correctness.network_cases(True))
    checks = [correctness.done(task) for task in tasks if f" {part}" == task.detail[4:].split(", chunks")[0]]
    assert [check.passed for check in checks] == [True, True], checks


@pytest.mark.parametrize("fault", ["error", "nan", "wrong", "fewer"])
def test_correctness_names_what_fails_and_goes_on(monkeypatch, tmp_path, capsys, fault):
    def broken(*, impl, weight, **arguments):
        if impl == "reference":
            return good.function(impl=impl, weight=weight, **arguments)
        if fault == "error":
            raise RuntimeError("no kernel")
        if fault == "nan":  # unwritten memory
            return torch.empty(*arguments["x"].shape[:-1], len(weight), dtype=weight.dtype)
        if fault == "wrong":
            return good.function(impl=impl, weight=weight * 1.001, **arguments)
        return good.function(impl=impl, weight=weight, **arguments)[:, :-1]

    good = OPERATIONS["norm_linear"]
    monkeypatch.setitem(OPERATIONS, "norm_linear", good._replace(function=broken))
    path = tmp_path / "correctness.json"
    arguments = ["--quick", "--operation", "bilinear_sample", "norm_linear", "--dtype", "float32"]
    assert correctness.main([*arguments, "--impl", "torch", "--json", str(path)]) == 1
    output = capsys.readouterr().out
    assert "FAIL norm_linear torch float32 forward" in output
    failed = failed_checks(path)
    assert ("norm_linear", "torch", "float32", "forward", 64) in failed
    assert {name for name, *_ in failed} == {"norm_linear"}
    assert output.count("ok   bilinear_sample") == 5


def test_a_golden_file_that_differs_fails(monkeypatch, tmp_path):
    load = correctness.golden_file

    def altered(folder, name, device):
        golden = load(folder, name, device)
        golden["outputs.0"] = golden["outputs.0"] * (1 + 1e-6)
        return golden

    monkeypatch.setattr(correctness, "golden_file", altered)
    checks = [correctness.done(t) for t in correctness.golden_tasks(correctness.GOLDENS, [], [], CPU)]
    assert [check.passed for check in checks] == [False, False]
    monkeypatch.undo()
    with pytest.raises(InputError, match="--goldens"):
        correctness.main(["--operation", "golden", "--goldens", str(tmp_path)])


# The authors' implementation

STAND_IN = """
import math
import torch
from torch import nn
import vitup_fast

class ViTUp(nn.Module):
    def __init__(self, layer_indices, query_embedding, rel_pos_enc, vit_up_blocks, decoder_mlp, q_rope_embeddings):
        super().__init__()
        dim, heads = decoder_mlp[0].widths[0], vit_up_blocks[0].heads
        config = vitup_fast.ViTUpConfig(dim=dim, num_heads=heads, layer_indices=tuple(layer_indices))
        self.net = vitup_fast.ViTUp(config)
        assert [m.widths for m in decoder_mlp] == [[dim, dim]] * len(layer_indices)

    def load_state_dict(self, state, strict):
        return self.net.load_state_dict(state, strict=strict)

    def named_parameters(self, *args, **options):
        return self.net.named_parameters(*args, **options)

    def forward(self, pixels, coords, cache_data):
        hidden = [h.float() for h in cache_data["layer_hidden_states_hwc"]]
        grid = cache_data["query_embedding_cache_data"]["last_hidden_state_hwc"].float()
        self.net.float()
        with torch.autocast(coords.device.type, enabled=False):
            cache = self.net.prepare(hidden, grid)
            layers = self.net(cache, coords, return_all_layers=True)
        return [y.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else y for y in layers]

class ViTUpBlock(nn.Module):
    def __init__(self, cross_attention, **parts):
        super().__init__()
        self.heads = cross_attention.heads

class Part(nn.Module):
    def __init__(self, *values, num_heads=None, **options):
        super().__init__()
        self.widths, self.heads = values[0] if values else None, num_heads

SimpleMLP = SimpleFiLMV2 = CrossAttention = QueryEncoder = FourierPositionalEncoding = ContinuousRoPE2D = Part
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A checkout whose modules have the names of the authors', around this library's network."""
    for name in ("", "model", "layers"):
        folder = tmp_path / "vit_up" / name
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (tmp_path / "vit_up" / "model" / "vit_up.py").write_text(STAND_IN)
    for name in ("query_encoder", "pos_enc", "continuous_rope", "cross_attention", "film", "mlp"):
        (tmp_path / "vit_up" / "layers" / f"{name}.py").write_text("from vit_up.model.vit_up import *")
    monkeypatch.setenv(reference.VARIABLE, str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "vit_up"]:
        del sys.modules[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_a_provider(stand_in, fake_probes, dtype):
    path = list(sys.path)
    options = {"compiled": False, "token_grid": (5, 5), "patch_grid": (9, 9)}
    case = end_to_end.network_case(TINY, 49, True, CPU, dtype, **options)
    assert sys.path == path
    assert list(case.providers) == ["reference", "torch"]
    assert case.baseline == "reference"
    report = measure(case, 1)
    assert [row.failure for row in report.rows] == [None] * 3
    assert report.rows[2].speedup is not None


def test_reference_gets_the_weights(stand_in):
    net, *_ = end_to_end.network_and_image(TINY, torch.float32, CPU, (5, 5), (9, 9))
    theirs = reference.build(reference.checkout(), net)
    for (name, ours), (other, copied) in zip(net.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, copied)
        assert ours.data_ptr() != copied.data_ptr()
    odd = copy.deepcopy(net)
    odd.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match=f"{reference.VARIABLE}.*extra"):
        reference.build(reference.checkout(), odd)


def test_reference_must_be_a_checkout(stand_in, monkeypatch, tmp_path):
    net, *_ = end_to_end.network_and_image(TINY, torch.float32, CPU, (5, 5), (9, 9))
    (stand_in / "vit_up" / "layers" / "film.py").write_text("import no_such_package")
    with pytest.raises(InputError, match="no_such_package"):
        reference.build(reference.checkout(), net)
    (stand_in / "vit_up" / "layers" / "film.py").write_text("")
    with pytest.raises(InputError, match=reference.VARIABLE):
        reference.build(reference.checkout(), net)
    monkeypatch.setenv(reference.VARIABLE, str(tmp_path / "vit_up"))
    with pytest.raises(InputError, match=f"{reference.VARIABLE}: expected a checkout"):
        end_to_end.main(["--preset", "tiny", "--no-compile"])
    monkeypatch.delenv(reference.VARIABLE)
    assert reference.checkout() is None


# Picture and profile


def report_of(title, flops, traffic, seconds, dtype="bfloat16", l2=5e12):
    rows = [{"provider": name, "seconds": s} for name, s in seconds.items()]
    found = {"matrix": 8e14, "copy": 3e12, "l2": l2}
    work = {"flops": flops, "bytes": traffic}
    return {"title": title, "device": "a GPU", "dtype": dtype, "work": work, "peaks": found, "rows": rows}


def test_roofline_draws_what_was_timed(tmp_path):
    reports = [
        report_of("dense", 1e13, 2e8, {"eager": 0.1, "triton": 0.02, "torch": None}),
        report_of("dense", 1e13, 4e8, {"eager": 0.3, "triton": 0.1}, dtype="float32", l2=None),
        report_of("unknown traffic", 1e13, 0, {"eager": 0.3}),
    ]
    points = roofline.points_of(reports)
    assert points[:2] == [("dense", "eager", 5e4, 1e14), ("dense", "triton", 5e4, 5e14)]
    assert len(points) == 4
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    write_json(files[0], reports[:1])
    write_json(files[1], reports[1:])
    picture = tmp_path / "roofline.png"
    assert roofline.main([str(picture), *map(str, files)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [*files, picture]
    with pytest.raises(InputError, match="at least one time"):
        roofline.draw(reports[2:], picture)
    write_json(files[0], {"checks": []})
    with pytest.raises(InputError, match=r"a\.json"):
        roofline.main([str(picture), *map(str, files)])


def test_benchmark_draws_its_own_roofline(fake_probes, tmp_path, capsys):
    picture = tmp_path / "roofline.png"
    arguments = [
        "--preset",
        "tiny",
        "--queries",
        "40",
        "--repeats",
        "1",
        "--no-compile",
        "--dtype",
        "float32",
    ]
    assert norm_linear.main([*arguments, "--roofline", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_kernel_times_add_up(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert (
        kernel_times.main(["--preset", "tiny", "--side", "10", "--impl", "torch", "--json", str(path)]) == 0
    )
    (found,) = json.loads(path.read_text())
    times = [kernel["seconds"] for kernel in found["kernels"]]
    assert times == sorted(times, reverse=True)
    assert found["seconds"] == pytest.approx(sum(times))
    assert any("attention" in kernel["name"] for kernel in found["kernels"])
    assert "ms in kernels" in capsys.readouterr().out
    with pytest.raises(InputError, match="--side"):
        kernel_times.main(["--side", "0"])


def test_peaks_are_written_with_what_they_depend_on(fake_probes, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peaks, "peak_probes", harness.peak_probes)
    path = tmp_path / "peaks.json"
    assert peaks.main(["--dtype", "float32", "--repeats", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["peaks"]["float32"]["matrix"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert {"torch", "reference"} <= {impl["name"] for impl in found["implementations"]}
    assert "float32" in capsys.readouterr().out


def test_images_are_timed_part_by_part(tmp_path, capsys):
    pytest.importorskip("timm")
    path = tmp_path / "images.json"
    arguments = ["images", "--preset", "tiny", "--dtype", "float32", "--repeats", "1", "--json", str(path)]
    assert cli.main(["bench", *arguments, "--image-size", "50", "40"]) == 0
    reports = json.loads(path.read_text())
    parts = ["Backbone", "Fine patch grid of 32 x 32", "Keys, values and tokens"]
    assert [r["title"].partition(",")[0] for r in reports[:2]] == parts[:2]
    assert reports[2]["title"].startswith(parts[2])
    assert len(reports) == 3
    assert "50 x 40 pixels" in reports[0]["title"]
    assert [row["provider"] for row in reports[1]["rows"]] == ["eager", "library", "library, 100 points"]
    assert all(row["seconds"] > 0 for report in reports for row in report["rows"])
    assert "quartiles ms" in capsys.readouterr().out
    for wrong in (["--image-size", "3"], ["--backward"], ["--dim", "64"]):
        assert cli.main(["bench", *arguments[:-2], *wrong]) == 2


def test_any_configuration_is_measured(tmp_path):
    path = tmp_path / "own.json"
    sizes = ["--dim", "128", "--heads", "4", "--depths", "0", "2", "5", "--tokens", "3", "5", "--dense", "4"]
    options = ["--dtype", "float32", "--impl", "torch", "--no-compile", "--repeats", "1", "--json", str(path)]
    assert cli.main(["bench", *sizes, *options]) == 0
    (report,) = json.loads(path.read_text())
    assert report["title"] == "ViT-Up D=128, grid 4 x 4"
    config = ViTUpConfig(dim=128, num_heads=4, layer_indices=(0, 2, 5))
    flops = end_to_end.least_work(config, 15, 16, position_mlp=False).flops
    assert report["work"]["flops"] == flops
    assert cli.main(["bench", "--heads", "5"]) == 2
    assert cli.main(["bench", "--tokens", "0", "5"]) == 2
