from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import vitup_fast
from vitup_fast import extension

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULE = f"_C{SUFFIX}"
SWITCHES = ("VITUP_FAST_CPU", "VITUP_FAST_CUDA", "VITUP_FAST_CUDA_ARCHITECTURES")
TOOLS = ("CXX", "CUDACXX", "CUDA_HOME", "CXXFLAGS")

builds = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or shutil.which("c++") is None,
    reason="needs a checkout and a C++ compiler",
)


def environment(**variables: object) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in SWITCHES + TOOLS + ("PYTHONPATH",)}
    return kept | {k: str(v) for k, v in variables.items()}


def python(
    *arguments: object, cwd: Path, check: bool = True, **variables: object
) -> subprocess.CompletedProcess:
    """Run Python away from any terminal, which setup.py would write to."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, start_new_session=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def build_in_place(tree: Path, check: bool = True, **variables: object) -> subprocess.CompletedProcess:
    return python("setup.py", "build_ext", "--inplace", cwd=tree, check=check, **variables)


def report(folder: Path) -> dict[str, str | None]:
    return json.loads((folder / "build.json").read_text())


def needed_libraries(module: Path) -> str:
    return subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout


# --- builds: one of the whole, from the source distribution, and many of a small module ---


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A source distribution of a copy of the checkout that holds a built module."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    package = folder / "checkout" / "vitup_fast"
    for name in (MODULE, "_C.cpython-399-x86_64-linux-gnu.so", "build.json"):
        (package / name).write_text("built")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    python("-c", code, cwd=folder / "checkout")
    return next(folder.glob("*.tar.gz"))


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory) -> Path:
    """The unpacked source distribution, in which the wheel is built."""
    return unpack(sdist, tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    switches = {"VITUP_FAST_CPU": 1, "VITUP_FAST_CUDA": 0}
    arguments = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ".")
    python(*arguments, cwd=tree, **switches)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


SMALL_MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "version", VITUP_FAST_VERSION);
  PyModule_AddStringConstant(module, "cpu", "small");
  return module;
}
"""


@pytest.fixture
def small(sdist, tmp_path) -> Path:
    """The source distribution with a module that compiles in no time."""
    tree = unpack(sdist, tmp_path / "small")
    for source in (tree / "csrc" / "cpu").iterdir():
        source.unlink()
    for name in ("csrc/cpu/kernels.cpp", "csrc/cpu/cpu.cpp", "csrc/cuda/host.cpp"):
        (tree / name).write_text("")
    (tree / "csrc/bindings.cpp").write_text(SMALL_MODULE)
    return tree


@builds
def test_sdist_holds_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    others = [
        "CMakeLists.txt",
        "setup.py",
        "hubconf.py",
        "kernels/triton/film_mlp.py",
        "kernels/cpu/film_mlp.py",
        "kernels/configs/sm_90.json",
        "bench/harness.py",
    ]
    assert {*sources, *others, "tests/test_extension.py", "LICENSE", "README.md"} <= names
    assert any(name.startswith("csrc/cuda/") and name.endswith(".cu") for name in names)
    assert [n for n in names if n.endswith((".so", ".pyc", "build.json"))] == []


@builds
def test_wheel_holds_the_module_and_no_sources(wheel):
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read(f"vitup_fast/{MODULE}")[:4] != b"built"
    expected = [
        MODULE,
        "build.json",
        "py.typed",
        "extension.py",
        "kernels/triton/film_mlp.py",
        "kernels/cpu/film_mlp.py",
        "kernels/configs/sm_90.json",
    ]
    assert {f"vitup_fast/{name}" for name in [*expected, "bench/harness.py"]} <= set(names)
    assert [
        n
        for n in names
        if n.split("/")[0]
        not in ("vitup_fast", "vitup_fast_start.py", f"vitup_fast-{vitup_fast.__version__}.dist-info")
    ] == []
    assert [n for n in names if n.endswith((".cpp", ".cu", ".cuh", ".h", ".o", ".part"))] == []
    assert [n for n in names if "_C." in n] == [f"vitup_fast/{MODULE}"]


@builds
def test_installed_module_loads_and_explains_itself(installed):
    code = f"""
import sys, vitup_fast
from vitup_fast import cli, extension
assert vitup_fast.__file__.startswith({str(installed)!r}), vitup_fast.__file__
assert "vitup_fast._C" not in sys.modules, "import loads the extension"
assert extension.load().version == vitup_fast.__version__
assert extension.obstacle("cpu") is None, extension.obstacle("cpu")
assert extension.load().cpu.instruction_set() in extension.load().cpu.instruction_sets()
assert "VITUP_FAST_CUDA=0 left them out" in extension.obstacle("cuda"), extension.obstacle("cuda")
cli.main(["info"])
print(extension.load().cpu.instruction_set())
"""
    output = python("-c", code, cwd=installed, PYTHONPATH=installed).stdout
    chosen = output.splitlines()[-1]
    assert "built C++ kernels for CPUs; no CUDA kernels: VITUP_FAST_CUDA=0 left them out\n" in output
    assert f"  cpu              {chosen} (runs here:" in output


@builds
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_code_for_newer_processors_stays_among_itself(tree, wheel):
    """No function compiled for one instruction set can be linked into, or run in, code for another."""
    objects = sorted(tree.glob("build/cmake-*/CMakeFiles/kernels_*.dir/csrc/cpu/kernels.cpp.o"))
    assert len(objects) == (4 if sysconfig.get_platform().endswith("x86_64") else 1)
    for file in objects:
        isa = file.parents[2].name.removeprefix("kernels_").removesuffix(".dir")
        symbols = subprocess.run(["nm", "-P", "--defined-only", file], capture_output=True, text=True).stdout
        kinds = {name: kind for name, kind, *_ in map(str.split, symbols.splitlines())}
        exported = [name for name, kind in kinds.items() if not kind.islower() or kind in "uvw"]
        assert len(exported) == 1, exported
        assert exported[0].endswith(f"kernels_{isa}E"), exported
        assert [name for name in kinds if "GLOBAL__sub_I" in name] == [], (
            "code that runs when the module is loaded"
        )


@builds
def test_builds_in_place_and_only_what_changed(small):
    package = small / "vitup_fast"
    first = build_in_place(small, VITUP_FAST_CUDA=0)
    assert (
        "vitup_fast: built C++ kernels for CPUs; no CUDA kernels: VITUP_FAST_CUDA=0 left them out\n"
        in first.stderr
    )
    assert report(package)["cpu"] is None
    assert "Building CXX" in first.stdout
    assert "Building CXX" not in build_in_place(small, VITUP_FAST_CUDA=0).stdout
    (small / "csrc/cpu/kernels.cpp").write_text("// changed\n")
    third = build_in_place(small, VITUP_FAST_CUDA=0).stdout
    assert "kernels_baseline.dir" in third
    assert "_C.dir" not in third
    # Nothing to build: the old module goes, and what the report says is true.
    build_in_place(small, VITUP_FAST_CUDA=0, VITUP_FAST_CPU=0)
    assert not (package / MODULE).exists()
    assert "left them out" in report(package)["cpu"]
    assert list(package.glob(".*.part")) == []


@builds
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_leaves_the_old_module(small, tmp_path, stop):
    build_in_place(small, VITUP_FAST_CUDA=0)
    package = small / "vitup_fast"
    before = {p.name: p.read_bytes() for p in package.iterdir() if p.is_file()}
    compiler, marker = tmp_path / "slow-c++", tmp_path / "compiling"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *bindings*) touch {marker}; sleep 60;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    variables = environment(VITUP_FAST_CUDA=0, CXX=compiler)
    build = subprocess.Popen(
        command,
        cwd=small,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell starts what runs in the background with interrupts ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < deadline
        assert build.poll() is None
        time.sleep(0.05)
    os.killpg(build.pid, stop)
    assert build.wait(timeout=30) != 0
    assert {p.name: p.read_bytes() for p in package.iterdir() if p.is_file()} == before
    next(small.glob("build/cmake-*/tools.json")).write_text('["half-writ')
    # What was killed may still be starting the old file, which cannot be written to then.
    compiler.unlink()
    compiler.write_text('#!/bin/sh\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    build_in_place(small, VITUP_FAST_CUDA=0, CXX=compiler)
    code = "from vitup_fast import extension; assert extension.load().cpu == 'small'"
    python("-c", code, cwd=small, PYTHONPATH=small)


@builds
def test_what_does_not_compile_is_left_out_loudly(small):
    package = small / "vitup_fast"
    build_in_place(small, VITUP_FAST_CUDA=0)
    # Code that does not compile, in CUDA, where even the compiler is none.
    compiler = small / "nvcc"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    done = build_in_place(small, CUDACXX=compiler)
    assert "built C++ kernels for CPUs; no CUDA kernels: they do not compile (" in done.stderr
    assert report(package)["cpu"] is None
    assert "do not compile" in report(package)["cuda"]
    done = build_in_place(small, check=False, CUDACXX=compiler, VITUP_FAST_CUDA=1)
    assert done.returncode != 0
    assert "CUDA kernels were asked for, but do not compile: " in done.stderr.splitlines()[-1]

    (small / "csrc/cpu/kernels.cpp").write_text("#error no such code\n")
    done = build_in_place(small, check=False, VITUP_FAST_CPU=1, VITUP_FAST_CUDA=0)
    assert done.returncode != 0
    assert "C++ kernels for CPUs were asked for, but do not compile: csrc/cpu/kernels.cpp:1" in done.stderr
    assert (package / MODULE).exists()
    done = build_in_place(small, VITUP_FAST_CUDA=0)
    assert (
        "built pure Python; no C++ kernels for CPUs: they do not compile (csrc/cpu/kernels.cpp:1"
        in done.stderr
    )
    assert "no such code" in report(package)["cpu"]
    assert not (package / MODULE).exists()
    code = "from vitup_fast import extension; print(extension.obstacle('cpu'))"
    assert "no such code" in python("-c", code, cwd=small, PYTHONPATH=small).stdout


@builds
def test_without_a_compiler(small):
    done = build_in_place(small, CXX="/nonexistent", VITUP_FAST_CUDA=0)
    # CMake's own sentence, which differs from version to version.
    reason = r"they do not compile \(Could not find .*environment variable CXX: /nonexistent"
    assert re.search(f"built pure Python; no C\\+\\+ kernels for CPUs: {reason}", done.stderr)
    done = build_in_place(small, check=False, CXX="/nonexistent", VITUP_FAST_CPU=1, VITUP_FAST_CUDA=0)
    assert done.returncode != 0
    assert "C++ kernels for CPUs were asked for, but do not compile: " in done.stderr
    assert "/nonexistent" in done.stderr


@builds
def test_wheel_without_compiled_code_is_for_every_machine(small, tmp_path):
    arguments = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".")
    python(*arguments, cwd=small, VITUP_FAST_CPU=0, VITUP_FAST_CUDA=0)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "vitup_fast/build.json" in archive.namelist()
        assert [n for n in archive.namelist() if "_C." in n] == []


# --- what setup.py makes of variables and tools ---


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """The functions of setup.py, in an environment without CUDA; tools of `tmp_path/bin` are found first."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a checkout")
    for name in SWITCHES + TOOLS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    names = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    which = shutil.which
    monkeypatch.setattr(
        shutil,
        "which",
        lambda c: (
            which(c, path=str(tmp_path / "bin"))
            if c == "nvcc"
            else None
            if "/usr/local/cuda" in c
            else which(c)
        ),
    )
    return names


def fake_nvcc(path: Path, known: str = "80 90a 100a 120") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = "|".join(f"*code=sm_{a}*" for a in known.split())
    path.write_text(f'#!/bin/sh\ncase "$*" in {cases}) exit 0;; esac\nexit 1\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VITUP_FAST_CPU", "yes"),
        ("VITUP_FAST_CUDA", "2"),
        ("VITUP_FAST_CUDA_ARCHITECTURES", "sm_90"),
        ("VITUP_FAST_CUDA_ARCHITECTURES", "90a,120"),
        ("VITUP_FAST_CUDA_ARCHITECTURES", "75"),
        ("VITUP_FAST_CUDA_ARCHITECTURES", "80;"),
    ],
)
def test_bad_variables(setup, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name}: expected .*, got '{value}'"):
        setup["make_plan"]()


def test_nvcc_is_found_where_it_may_be(setup, monkeypatch, tmp_path):
    assert setup["find_nvcc"]() is None
    for variable, value, path in (
        ("PATH", os.environ["PATH"], tmp_path / "bin/nvcc"),
        ("CUDA_HOME", tmp_path / "home", tmp_path / "home/bin/nvcc"),
        ("CUDACXX", tmp_path / "own-nvcc", tmp_path / "own-nvcc"),
    ):
        fake_nvcc(path)
        monkeypatch.setenv(variable, str(value))
        assert setup["find_nvcc"]() == str(path)
    monkeypatch.setenv("CUDACXX", "/nonexistent")  # named, so no other is taken
    assert setup["find_nvcc"]() is None


def test_cuda_without_nvcc(setup, monkeypatch):
    plan = setup["make_plan"]()
    assert plan.refusal() is None
    assert plan.candidates() == [{"cpu"}, set()]
    line = setup["describe"](frozenset({"cpu"}), plan, plan.reasons)
    assert line.startswith("built C++ kernels for CPUs; no CUDA kernels: nvcc was not found")
    for name, value in (("VITUP_FAST_CUDA", "1"), ("VITUP_FAST_CUDA_ARCHITECTURES", "90a")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "CUDA kernels were asked for, but nvcc was not found" in setup["make_plan"]().refusal()


@builds
def test_refusal_ends_the_build(small):
    done = build_in_place(small, check=False, CUDACXX="/nonexistent", VITUP_FAST_CUDA=1)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        "vitup_fast: the CUDA kernels were asked for, but nvcc was not"
    )
    assert not (small / "vitup_fast" / MODULE).exists()


def test_too_old_nvcc(setup, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path / "bin/nvcc", known="80 90a")
    plan = setup["make_plan"]()
    assert plan.architectures == ("80", "90a")
    line = setup["describe"](frozenset({"cpu", "cuda"}), plan, plan.reasons)
    assert line == f"built C++ kernels for CPUs and CUDA kernels for 80, 90a; {nvcc} is too old for 100a, 120"
    monkeypatch.setenv("VITUP_FAST_CUDA_ARCHITECTURES", "90a;120")
    refusal = setup["make_plan"]().refusal()
    assert refusal == f"the CUDA kernels were asked for, but {nvcc} does not compile for 120"
    monkeypatch.setenv("VITUP_FAST_CUDA_ARCHITECTURES", "90a")
    assert setup["make_plan"]().architectures == ("90a",)
    assert setup["make_plan"]().candidates() == [{"cpu", "cuda"}, {"cuda"}]


def test_first_error_is_found_among_other_output(setup):
    cases = {
        "make -Werror\na.cpp:3:1: warning: an error\na.cpp:4:2: error: no\nmore: error: x": "a.cpp:4:2: error: no",
        "a.cu(17): error: unknown": "a.cu(17): error: unknown",
        "x\nnvcc fatal   : Unsupported gpu": "nvcc fatal   : Unsupported gpu",
        "-- ok\nCMake Error at CMakeLists.txt:3 (find):\n  Not\n  found.\n\n\n-- Incomplete, error: x": "Not found.",
        "silent": "silent",
        "": "no output",
    }
    assert {output: setup["first_error"](output) for output in cases} == cases


def test_missing_tools(setup, monkeypatch):
    for tool, reason in (("cmake", "CMake was not found"), ("ninja", "ninja was not found")):
        with monkeypatch.context() as patch:
            which = shutil.which
            patch.setattr(shutil, "which", lambda c, t=tool, w=which: None if c == t else w(c))
            assert setup["make_plan"]().reasons["cpu"].startswith(reason)
            assert setup["make_plan"]().candidates() == [set()]
    monkeypatch.setitem(sys.modules, "pybind11", None)
    monkeypatch.setenv("VITUP_FAST_CPU", "1")
    assert "asked for, but pybind11 was not found" in setup["make_plan"]().refusal()


# --- what is said when there is no module, or a wrong one ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with the same finder, whose module is what a test puts there."""
    folder = tmp_path / f"sample{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "__init__.py").write_text('__version__ = "1.1"\n')
    for name in ("extension.py", "errors.py"):
        shutil.copy(Path(vitup_fast.__file__).parent / name, folder)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def finder(package: Path):
    return importlib.import_module(f"{package.name}.extension")


def reason(package: Path, part: str = "cpu") -> str:
    """Why the module is missing, which `load` says as well."""
    found = finder(package)
    with pytest.raises(ImportError, match=r"in a checkout: pip install --force-reinstall"):
        found.load()
    assert "\n" not in found.obstacle(part)
    return found.obstacle(part)


def test_not_built(package):
    assert "no installation has tried to build it" in reason(package)


def test_not_built_for_a_reason(package):
    (package / "build.json").write_text(
        json.dumps(
            {
                "summary": "built pure Python; no ...",
                "cpu": "CMake was not found",
                "cuda": "nvcc was not found",
            }
        )
    )
    assert reason(package).startswith(
        "the C++ kernels for CPUs are not built: CMake was not found (in a checkout: VITUP_"
    )
    assert "nvcc was not found" in reason(package, "cuda")


def test_half_written_report(package):
    (package / "build.json").write_text('{"summary": ')
    assert "no installation has tried" in reason(package)


def test_built_for_another_python(package):
    (package / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    assert "another Python" in reason(package)
    assert "_C.cpython-399-x86_64-linux-gnu.so" in reason(package)


def test_cannot_be_loaded(package):
    (package / MODULE).write_bytes(b"\x7fELF")
    assert reason(package).startswith("the extension cannot be loaded: ")
    assert MODULE in reason(package)


def test_of_another_version(package):
    (package / "_C.py").write_text('version = "1.0"\ncpu = None\n')
    assert "_C.py is of vitup_fast 1.0, not 1.1" in reason(package)


def test_part_left_out(package):
    (package / "_C.py").write_text('version = "1.1"\ncpu = None\n')
    found = finder(package)
    assert found.load().version == "1.1"
    assert found.obstacle("cpu") is None
    assert found.obstacle("cuda").startswith("the CUDA kernels are not built: built by hand")


def test_compiler_takes_the_reason_for_constant():
    @torch.compile(fullgraph=True, backend="eager")
    def add(x):
        return x + (1 if extension.obstacle("cuda") is None else 2)

    expected = 1 if extension.obstacle("cuda") is None else 2
    torch.testing.assert_close(add(torch.zeros(3)), torch.full((3,), float(expected)))


@pytest.mark.skipif(extension.obstacle("cpu") is not None, reason=str(extension.obstacle("cpu")))
def test_fork_after_load(tmp_path):
    code = """
import os
from vitup_fast import extension
chosen = extension.load().cpu.instruction_set()
child = os.fork()
if child == 0:
    os._exit(0 if extension.load().cpu.instruction_set() == chosen and extension.obstacle("cpu") is None else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    python("-c", code, cwd=tmp_path, PYTHONPATH=Path(vitup_fast.__file__).parent.parent)


@pytest.mark.skipif(extension.obstacle("cuda") is not None, reason="the CUDA kernels are not built here")
def test_cuda_kernels_need_no_driver_to_be_loaded():
    module = extension.load()
    assert "libcuda" not in needed_libraries(Path(module.__file__))
    assert module.cuda_architectures.split()


# --- how the sources hang together ---

# Functions and types at the left margin: those of a namespace.
FUNCTION = re.compile(
    r"^(?!static_assert|return|using)(?:[\w:<>,&*]+ )+[*&]?(\w+)\([^;{}]*(?:\{\}[^;{}]*)*\) *(?:const )?\{",
    re.M,
)
DECLARATION = re.compile(r"^(?!static_assert|return|using)(?:[\w:<>,&*]+ )+[*&]?\w+\([^;{}]*\);", re.M)
TYPE = re.compile(r"^(?:struct|class|enum class) (?:\w+\([^)]*\) )?(\w+)[^;({]*\{", re.M)
PARAMETER = re.compile(r"& (\w+)(?=[,)])|class (\w+)(?=[,>])")
USE = re.compile(r"(?<![.>\w])(\w+)(?=[(<])|(?<![.>\w])([A-Z]\w+)")


def dependencies(folder: Path) -> dict[str, set[str]]:
    """For every C++ or CUDA file, which others it includes or has functions and types of."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))
    code = {p: re.sub(r"//.*", "", p.read_text()) for p in files}
    defined = {p: {*FUNCTION.findall(text), *TYPE.findall(text)} for p, text in code.items()}
    found = {}
    for path, text in code.items():
        used = {name for pair in USE.findall(DECLARATION.sub("", text)) for name in pair}
        used -= defined[path] | {name for pair in PARAMETER.findall(text) for name in pair}
        # Rooms have namespaces of their own.
        others = {q for q in files if q.parent == path.parent and q != path and defined[q] & used}
        included = {path.parent / name for name in re.findall(r'#include "([^"]+)"', text)}
        found[path.name if path.parent == folder else f"{path.parent.name}/{path.name}"] = {
            str(q.relative_to(folder)) for q in others | included
        }
    return found


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs a checkout")
def test_sources_depend_on_each_other_one_way():
    graph = dependencies(ROOT / "csrc")
    # What each rule alone finds: an include, a function, a type.
    assert "cuda/kernels.h" in graph["cuda/numeric.h"]
    assert {"cpu/matmul.h", "cpu/kernels.h"} < graph["cpu/tile.h"]
    assert "cpu/vector.h" not in graph["cpu/parallel.cpp"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_a_circle_among_sources_is_found(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room/low.h").write_text("inline int low() { return 1; }\n")
    (tmp_path / "room/high.h").write_text(
        "template <class T>\ninline T high(T x) {\n  return x + low();\n}\n"
    )
    graph = dependencies(tmp_path)
    assert graph == {"room/low.h": set(), "room/high.h": {"room/low.h"}}
    for upward in ("inline int low() { return high(1); }\n", '#include "high.h"\nint low() { return 1; }\n'):
        (tmp_path / "room/low.h").write_text(upward)
        with pytest.raises(CycleError, match=r"room/high\.h"):
            TopologicalSorter(dependencies(tmp_path)).prepare()


def test_versions_agree():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("needs a checkout")
    assert f'\nversion = "{vitup_fast.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
