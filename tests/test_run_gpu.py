"""The script for a borrowed GPU: its calls rehearsed with a fake device, and on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from vitup_fast.bench.harness import write_json

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "run_gpu.sh"
CALLS = {
    1: [
        "environment",
        "check",
        "dense",
        "profile",
        "base",
        "chunks",
        "sparse",
        "peaks",
        "l2",
        "hopper",
        "hopper_film",
        "fp8",
    ],
    2: ["correctness", "compiled", "compiled_base", "large", "training", "operations"],
    3: ["memcheck", "bits", "racecheck", "synccheck", "kernels", "check_compiled", "tune"],
}
LIMIT = 9 * 60


def run_gpu(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture
def fake_device(tmp_path):
    """Tools that note how they are called, and a clock's worth of limits: each command as (limit, words)."""
    tools, noted = tmp_path / "tools", tmp_path / "noted"
    tools.mkdir()
    scripts = {
        "timeout": f'printf "%s\\x1f" "$2" "${{@:3}}" >>{noted}\nprintf "\\x1e" >>{noted}\n[[ "$*" != *"$FAILS"* ]]',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)

    def call(number, *arguments, fails="nothing fails", **environment):
        noted.write_text("")
        environment |= {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "FAILS": fails,
            "PYTHON": str(tools / "python"),
        }
        run = run_gpu(tmp_path / "results", number, *arguments, **environment)
        words = [line.split("\x1f")[:-1] for line in noted.read_text().split("\x1e")[:-1]]
        return run, [(int(limit), command) for limit, *command in words]

    return call


def names_of(run):
    return [line.split(":")[0] for line in run.stdout.split("\n\n")[0].splitlines() if ": " in line[:20]]


@pytest.fixture
def extension(monkeypatch):
    """A place for the extension that is carried along."""
    folder = SCRIPT.parent.parent / "build" / "gpu"
    before = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / "_C.rehearsal.so"
    built.touch()
    yield
    built.unlink()
    if not before:
        folder.rmdir()


@pytest.mark.parametrize("number", CALLS)
def test_rehearsal(fake_device, extension, number):
    """Order, times and arguments of every command, which each program reads without a fault."""
    run, commands = fake_device(number)
    assert run.returncode == 0, run.stdout + run.stderr
    assert names_of(run) == CALLS[number]
    limits = [limit for limit, _ in commands]
    assert len(limits) == len(CALLS[number])
    assert min(limits) >= 30
    assert sum(limits) + 5 * len(limits) <= LIMIT + 30
    assert sum(limits) <= LIMIT
    for _, command in commands:
        modules = [word for word in command if word.startswith("vitup_fast.bench.")]
        if modules:
            assert_read(modules[0], command[command.index(modules[0]) + 1 :])


class Read(Exception):
    """The arguments were read."""


def assert_read(name, arguments):
    module = importlib.import_module(name)

    def check_device(device):
        assert device == "cuda"
        raise Read

    with pytest.MonkeyPatch.context() as patch:
        for holder in (module, importlib.import_module("vitup_fast.bench.harness")):
            if hasattr(holder, "check_device"):
                patch.setattr(holder, "check_device", check_device)
        with pytest.raises(Read):
            module.main(arguments)


def test_what_is_carried_back_is_one_file_after_every_step(fake_device, tmp_path):
    archive = tmp_path / "out" / "first.tar.gz"
    run, _ = fake_device(1, "environment", "check", "--archive", archive)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [path.name for path in archive.parent.iterdir()] == ["first.tar.gz"]
    with tarfile.open(archive) as packed:
        assert {"environment.log", "check.log", "summary.txt"} <= set(packed.getnames())


def test_a_failure_ends_its_own_step(fake_device):
    run, commands = fake_device(2, fails="--backward")
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "failed: training"
    assert "training: FAIL (exit code 1)" in run.stdout
    assert len(commands) == len(CALLS[2])


def test_no_step_begins_that_has_no_time(fake_device):
    run, commands = fake_device(3, VITUP_BENCH_SECONDS="29")
    assert run.returncode == 1
    assert commands == []
    assert re.search(r"tune: left out, \d+ s are left", run.stdout)
    begin = time.monotonic()
    run, commands = fake_device(3, "tune", VITUP_BENCH_SECONDS="200")
    (limit,) = [limit for limit, _ in commands]
    assert 200 - math.ceil(time.monotonic() - begin) <= limit <= 200


def test_times_are_refused_by_what_failed(fake_device, tmp_path):
    _, commands = fake_device(1, "dense")
    assert "--correctness" not in commands[0][1]
    results = tmp_path / "results"
    for name in ("check", "correctness"):
        write_json(results / f"{name}.json", {"checks": []})
        _, commands = fake_device(1, "dense")
        words = commands[0][1]
        assert words[words.index("--correctness") + 1] == str(results / f"{name}.json")


@pytest.mark.parametrize(
    ("number", "steps"), [(1, ["environment", "check", "profile", "chunks"]), (2, ["training"])]
)
def test_on_the_cpu(tmp_path, number, steps):
    """Programs of each kind really run, at tiny sizes."""
    run = run_gpu(tmp_path, number, *steps, VITUP_BENCH_DEVICE="cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert names_of(run) == steps
    for name in {"chunks", "training"} & {*steps}:
        reports = json.loads((tmp_path / f"{name}.json").read_text())
        assert all(row["seconds"] > 0 for report in reports for row in report["rows"])
    with tarfile.open(tmp_path / f"call{number}.tar.gz") as packed:
        assert {f"{name}.log" for name in steps} <= set(packed.getnames())


def test_what_needs_a_gpu_is_left_out(tmp_path):
    run = run_gpu(tmp_path, 3, VITUP_BENCH_DEVICE="cpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert [f"{name}: left out, it needs a GPU" for name in CALLS[3]] == run.stdout.splitlines()[
        : len(CALLS[3])
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no directory"),
        (["out"], "no call"),
        (["out", "4"], "no call 4"),
        (["out", "1", "speed"], "call 1 has no step speed"),
        (["out", "2", "dense"], "call 2 has no step dense"),
        (["out", "--gpu"], "unknown option --gpu"),
        (["out", "1", "--device"], "--device needs a value"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    run = run_gpu(*[str(tmp_path / a) if a == "out" else a for a in arguments])
    assert run.returncode == 2
    assert message in run.stderr
