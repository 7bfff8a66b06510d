"""Maps the repository's rooms to packages and builds vitup_fast._C with CMake; the rest is in pyproject.toml.

What cannot be built on this machine is left out with a word. VITUP_FAST_CPU and VITUP_FAST_CUDA (0 or 1) and
VITUP_FAST_CUDA_ARCHITECTURES ("90a;120") say what must be built, and then a failure is an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "vitup_fast"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
REPORT = "build.json"
ARCHITECTURES = ("80", "90a", "100a", "120")
OLDEST_CMAKE = (3, 24)
TITLES = {"cpu": "C++ kernels for CPUs", "cuda": "CUDA kernels"}


class Plan(NamedTuple):
    """What to build here.

    Attributes:
        possible: parts, "cpu" and "cuda", that can be tried here and are not switched off.
        forced: parts that must be built.
        reasons: for every part that cannot be tried, why.
        architectures: compute capabilities of the CUDA kernels.
        nvcc: path of the CUDA compiler, empty without CUDA.
        remarks: what else to tell.
    """

    possible: frozenset[str]
    forced: frozenset[str]
    reasons: dict[str, str]
    architectures: tuple[str, ...]
    nvcc: str
    remarks: tuple[str, ...]

    def refusal(self) -> str | None:
        """Why nothing may be built, as something is forced that is not possible, or None."""
        for part in sorted(self.forced - self.possible):
            return f"the {TITLES[part]} were asked for, but {self.reasons[part]}"
        return None

    def candidates(self) -> list[frozenset[str]]:
        """Return the sets of parts to try, the best first."""
        sets = [frozenset(s) for s in (("cpu", "cuda"), ("cpu",), ("cuda",), ())]
        return [s for s in sets if self.forced <= s <= self.possible]


class BuildError(Exception):
    """The compiler or CMake failed; the message is the first error."""


def switch(name: str) -> bool | None:
    """Read an environment variable that is 0, 1 or not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def wanted_architectures() -> tuple[str, ...] | None:
    """Read the compute capabilities that CUDA kernels must be built for, or None."""
    name = "VITUP_FAST_CUDA_ARCHITECTURES"
    value = os.environ.get(name, "")
    if not value:
        return None
    words = tuple(value.split(";"))
    if not all(re.fullmatch(r"\d{2,3}[af]?", w) and int(w.rstrip("af")) >= 80 for w in words):
        raise SystemExit(f'{name}: expected compute capabilities from 80 on, as in "90a;120", got {value!r}')
    return tuple(dict.fromkeys(words))


def find_nvcc() -> str | None:
    """Return the path of the CUDA compiler: CUDACXX, CUDA_HOME, PATH or /usr/local/cuda, in this order."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME")
    names = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, names) if path), None)


def compiles_for(nvcc: str, architecture: str) -> bool:
    """Whether a CUDA compiler knows a compute capability."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull, "-gencode", target]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def version_of(program: str) -> str:
    """Return what a program says of its version, or nothing if it does not run."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""


def missing_tool() -> str | None:
    """Why nothing can be compiled, for want of CMake, ninja or pybind11, or None."""
    if sys.platform == "win32":
        return "they are written for GCC and Clang on Linux and macOS"
    cmake = shutil.which("cmake")
    if cmake is None:
        return "CMake was not found (pip install cmake)"
    found = re.search(r"\d+\.\d+", version_of(cmake))
    if found is None or tuple(map(int, found[0].split("."))) < OLDEST_CMAKE:
        return f"{cmake} is older than 3.24 or does not run (pip install cmake)"
    if shutil.which("ninja") is None:
        return "ninja was not found (pip install ninja)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 was not found (pip install pybind11)"
    return None


def make_plan() -> Plan:
    """Decide what to build from the environment variables and the tools of this machine."""
    cpu, cuda, wanted = switch("VITUP_FAST_CPU"), switch("VITUP_FAST_CUDA"), wanted_architectures()
    if wanted and cuda is None:
        cuda = True
    reasons, remarks = {}, []
    obstacle = missing_tool()
    if cpu is False:
        reasons["cpu"] = "VITUP_FAST_CPU=0 left them out"
    elif obstacle:
        reasons["cpu"] = obstacle

    nvcc = find_nvcc()
    architectures = wanted or ARCHITECTURES
    unknown = [a for a in architectures if cuda is not False and nvcc and not compiles_for(nvcc, a)]
    known = tuple(a for a in architectures if a not in unknown)
    if cuda is False:
        reasons["cuda"] = "VITUP_FAST_CUDA=0 left them out"
    elif obstacle:
        reasons["cuda"] = obstacle
    elif nvcc is None:
        reasons["cuda"] = "nvcc was not found (set CUDA_HOME, or CUDACXX to its path)"
    elif unknown and (cuda or not known):
        reasons["cuda"] = f"{nvcc} does not compile for {', '.join(unknown)}"
    elif unknown:
        remarks.append(f"{nvcc} is too old for {', '.join(unknown)}")
    forced = {part for part, value in (("cpu", cpu), ("cuda", cuda)) if value}
    possible = frozenset({"cpu", "cuda"} - reasons.keys())
    return Plan(
        possible, frozenset(forced), reasons, known, nvcc if "cuda" in possible else "", tuple(remarks)
    )


def describe(parts: frozenset[str], plan: Plan, reasons: dict[str, str]) -> str:
    """Say in one line what was built and why not the rest."""
    titles = dict(TITLES, cuda=f"{TITLES['cuda']} for {', '.join(plan.architectures)}")
    built = " and ".join(titles[p] for p in sorted(parts))
    missing = [f"no {TITLES[p]}: {reasons[p]}" for p in ("cpu", "cuda") if p not in parts]
    remarks = plan.remarks if "cuda" in parts else ()
    return "; ".join([f"built {built}" if built else "built pure Python", *remarks, *missing])


def first_error(output: str) -> str:
    """Return what CMake or a compiler complained of first, in one line."""
    lines = output.splitlines()
    for index, line in enumerate(lines):
        if line.startswith("CMake Error"):
            paragraph = []
            for text in lines[index + 1 :]:
                if text and not text.startswith("  "):
                    break
                paragraph += text.split()
            return " ".join(paragraph)[:300] or line
        if re.search(r"\b(error|fatal)( #\d+)?\s*:", line):
            return line.strip()[:300]
    return (lines or ["no output"])[-1].strip()[:300]


def run(command: list[str], env: dict[str, str]) -> None:
    """Run a command and pass on what it prints.

    Raises:
        BuildError: the command failed.
    """
    output = []
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if process.returncode:
        raise BuildError(first_error("".join(output)).replace(f"{ROOT}/", ""))


def compile_module(folder: Path, parts: frozenset[str], plan: Plan) -> Path:
    """Compile the module in a folder, taking up what an earlier build with the same tools left there.

    Raises:
        BuildError: it does not compile.
    """
    import pybind11

    env = dict(os.environ, CUDACXX=plan.nvcc) if plan.nvcc else dict(os.environ)
    variables = ("CXX", "CUDACXX", "CUDAHOSTCXX", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")
    tools = [
        sys.version,
        sys.executable,
        str(ROOT),
        pybind11.__version__,
        *(f"{name}={env.get(name)}" for name in variables),
    ]
    programs = ["cmake", (env.get("CXX") or "c++").split()[0], plan.nvcc]
    tools += [version_of(program) for program in programs if program]
    fingerprint = folder / "tools.json"
    if not fingerprint.exists() or fingerprint.read_text() != json.dumps(tools):
        shutil.rmtree(folder, ignore_errors=True)
        # A copy stays in its place and as old as it is, unlike what pip installs for one build.
        shutil.copytree(Path(pybind11.get_include()) / "pybind11", folder / "include" / "pybind11")
        fingerprint.write_text(json.dumps(tools))

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(plan.architectures),
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_INCLUDE": folder / "include",
        "VITUP_FAST_CPU": "cpu" in parts,
        "VITUP_FAST_CUDA": "cuda" in parts,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *defines], env)
    jobs = env.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(usable_cores())
    run(["cmake", "--build", str(folder), "--parallel", jobs], env)
    return folder / MODULE


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place(content: bytes, target: Path) -> None:
    """Write a file as a whole, or not at all."""
    staged = target.with_name(f".{target.name}.part")
    try:
        staged.write_bytes(content)
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


def tell(line: str) -> None:
    """Print a line, past pip too, which hides what a successful build prints."""
    print(line, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{line}\n")


class BuildExtension(build_ext):
    """Builds the best of what is possible and writes down what and why."""

    def run(self) -> None:
        """Compile the module, put it and the report in place, and say what was built."""
        if refusal := PLAN.refusal():
            raise SystemExit(f"{PACKAGE}: {refusal}")
        # Next to the sources in editable installs too, where setuptools would have a new folder each time.
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        destination = Path(self.destination())
        destination.mkdir(parents=True, exist_ok=True)
        reasons = dict(PLAN.reasons)
        candidates = PLAN.candidates()
        for parts in candidates:
            if not parts:
                (destination / MODULE).unlink(missing_ok=True)
                break
            try:
                module = compile_module(folder, parts, PLAN)
            except BuildError as error:
                if parts == candidates[-1]:
                    asked = " and ".join(TITLES[part] for part in sorted(parts))
                    raise SystemExit(
                        f"{PACKAGE}: the {asked} were asked for, but do not compile: {error}"
                    ) from None
                reasons.update(dict.fromkeys(parts, f"they do not compile ({error})"))
            else:
                place(module.read_bytes(), destination / MODULE)
                break
        line = describe(parts, PLAN, reasons)
        report = {"summary": line, **{part: None if part in parts else reasons[part] for part in TITLES}}
        place(json.dumps(report, indent=2).encode(), destination / REPORT)
        tell(f"{PACKAGE}: {line}")

    def destination(self) -> str:
        """Return the package's folder, among the sources or in the build."""
        if self.inplace:
            return self.get_finalized_command("build_py").get_package_dir(PACKAGE)
        return os.path.join(self.build_lib, PACKAGE)

    def get_outputs(self) -> list[str]:
        """Return the files that this command wrote or will write."""
        return [os.path.join(self.build_lib, PACKAGE, name) for name in (MODULE, REPORT)]

    def get_output_mapping(self) -> dict[str, str]:
        """Return where an editable install finds each output among the sources."""
        if not self.inplace:
            return {}
        found = {
            path: os.path.join(self.destination(), os.path.basename(path)) for path in self.get_outputs()
        }
        return {path: source for path, source in found.items() if os.path.exists(source)}


class Build(build):
    """Runs build_ext even where nothing can be compiled, for its report."""

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else needed) for name, needed in build.sub_commands
    ]


if __name__ == "__main__":
    PLAN = make_plan()
    setup(
        packages=[
            "vitup_fast",
            "vitup_fast.bench",
            "vitup_fast.cli",
            "vitup_fast.kernels",
            "vitup_fast.kernels.cpu",
            "vitup_fast.kernels.triton",
            "vitup_fast.network",
            "vitup_fast.ops",
            "vitup_fast.tiling",
            "vitup_fast.walks",
        ],
        py_modules=["vitup_fast_start"],
        package_dir={"vitup_fast.kernels": "kernels", "vitup_fast.bench": "bench"},
        include_package_data=False,
        package_data={
            "vitup_fast": ["py.typed", "weights/*"],
            "vitup_fast.kernels": ["configs/*.json"],
            "vitup_fast.bench": ["run_gpu.sh", "compile_report.json", "cuda_report.json"],
        },
        ext_modules=[Extension("vitup_fast._C", [])] if PLAN.possible else [],
        cmdclass={"build": Build, "build_ext": BuildExtension},
    )
