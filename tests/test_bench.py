from __future__ import annotations

import json
import math

import pytest
import torch
from vitup_fast.bench import (
    bilinear_sample,
    end_to_end,
    film_mlp,
    norm_linear,
    residual_mlp,
    rope_cross_attention,
)
from vitup_fast.bench.harness import (
    Case,
    Peaks,
    Sizes,
    Work,
    check_writable,
    cpu_stopwatch,
    exit_code,
    interleave,
    make_parser,
    measure,
    operation_case,
    parse,
    peak_probes,
    publish,
    write_json,
)

from vitup_fast import InputError, ViTUpConfig

CPU = torch.device("cpu")
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


def case_of(providers, exact, eager, baseline="eager"):
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
    monkeypatch.setattr("torch.randn", lambda *_, device: zeros(2, 16, 16, device=device))
    monkeypatch.setattr("torch.zeros", lambda size, **kwargs: zeros(64, **kwargs))
    probes = peak_probes(CPU, dtype)
    assert {"torch.mm", "F.linear", "memory copy"} <= set(probes)
    for run, _ in probes.values():
        run()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "benchmark", [bilinear_sample, film_mlp, norm_linear, residual_mlp, rope_cross_attention]
)
def test_operation_cases_agree(benchmark, backward):
    options = parse(make_parser(""), ["--preset", "tiny", "--queries", "50"])
    for case in benchmark.cases(options, 4):
        small = case._replace(sizes=Sizes(1, 50, 64, 2, (4, 4), (8, 8), case.sizes.expansion))
        case = operation_case(small, CPU, torch.float32, backward, compiled=False)
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
@pytest.mark.parametrize("mode", ["dense", "scattered", "backward", "autocast"])
def test_network_case_agrees(dtype, mode):
    if mode == "autocast" and dtype == torch.float32:
        pytest.skip("autocast to float32 is none")
    case = end_to_end.network_case(
        ViTUpConfig.preset("tiny"),
        49,
        mode != "scattered",
        CPU,
        dtype,
        backward=mode == "backward",
        autocast=mode == "autocast",
        compiled=False,
        chunks=[20],
        token_grid=(5, 5),
        patch_grid=(9, 9),
    )
    assert list(case.providers) == ["vitup_fast", "vitup_fast, chunk 20"]
    exact, eager = case.exact(), case.eager()
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    for run in case.providers.values():
        result = run()
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
    assert names == ["eager", "vitup_fast"]
    for row in dense["rows"]:
        assert set(row) == {
            *("provider", "error", "error_ratio", "accurate"),
            *("seconds", "fastest_seconds", "rate", "speedup", "fraction_of_peak"),
        }
    assert "vitup_fast" in capsys.readouterr().out


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
    report = end_to_end.dense_memory_apart(ViTUpConfig.preset("tiny"), 300, CPU, torch.float32)
    assert report.output == 300 * 300 * 64 * 4
    assert 0 < report.weights < report.resident
    assert 0 < report.beyond_output < report.goal
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
