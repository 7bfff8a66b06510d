from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

# Read when Triton is first imported: its interpreter runs the kernels on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

from vitup_fast.network.config import ViTUpConfig
from vitup_fast.ops import implementations
from vitup_fast.testing import OPERATIONS, random_coords, random_image, random_network
from vitup_fast.walks import Settings, choose_walk
from vitup_fast.walks.plan import PLACE_BYTES

# The tests are many and small: threads would mostly wait for each other.
torch.set_num_threads(1)

IMPLS = ("torch", "reference")
FAST_IMPLS = tuple(
    i.name for i in reversed(implementations()) if i.available and i.name not in ("reference", "cpu_int8")
)
FLOAT64_IMPLS = tuple(name for name in FAST_IMPLS if name != "cpu")
HOPPER_SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
HOST_OPERATIONS = ("bilinear_sample", "film_mlp")
if "triton" in FAST_IMPLS:
    from triton_interpreter import mend_bfloat16

    mend_bfloat16()


def pytest_collection_modifyitems(config, items):
    """Leave out operations without compiled CUDA kernels that host code stands in for: they are Triton's again."""

    def is_repeated(item):
        values = getattr(item, "callspec", None) and item.callspec.params.values()
        names = [v for v in values or () if isinstance(v, str) and v in OPERATIONS]
        return "cuda" in (values or ()) and any(n.split("_table")[0] not in HOST_OPERATIONS for n in names)

    repeated = [item for item in items if is_repeated(item)]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if item not in repeated]


@contextlib.contextmanager
def default_dtype(dtype):
    """PyTorch's default dtype, and the former one afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def query_bytes(network, impl):
    """Memory that a budget counts for one query of the last depth."""
    settings = Settings(impl, impl, network.config.num_heads, network.dtype, network.device, True)
    dim, dtype = network.config.dim, network.dtype
    return choose_walk(settings).query_bytes(dim, dtype) + dim * dtype.itemsize + PLACE_BYTES


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """Runs a Hopper kernel of ``csrc/cuda`` on the CPU: the bytes that it wrote, and an error or None."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    program, read, written = (folder / name for name in ("hopper_emulator", "in", "out"))
    source = Path(__file__).with_name("hopper_emulator.cpp")
    flags = ("-std=c++17", "-O2", "-Wall", "-Wno-sign-compare", "-Wno-unknown-pragmas", "-Werror")
    subprocess.run([compiler, *flags, f"-I{HOPPER_SOURCES}", source, "-o", program], check=True)

    def run(kernel, tensors, sizes, clusters=1, seed=0, fault="none"):
        read.write_bytes(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors))
        words = (program, kernel, read, written, clusters, seed, fault, *sizes)
        done = subprocess.run([*map(str, words)], capture_output=True, text=True)
        if done.returncode:
            return None, done.stderr or f"exit code {done.returncode}"
        return torch.frombuffer(bytearray(written.read_bytes()), dtype=torch.uint8), None

    return run


@pytest.fixture(scope="session")
def ptxas_output(tmp_path_factory):
    """What ptxas says of the kernels of a source file for sm_90a."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")

    @functools.cache
    def compile_file(name, *flags):
        target = (tmp_path_factory.mktemp("nvcc") / name).with_suffix(".o")
        source = HOPPER_SOURCES / name
        command = ["nvcc", "-arch=sm_90a", "-std=c++17", "-O3", *flags, "-Xptxas=-v", "-c", source]
        done = subprocess.run([*command, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return compile_file


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=FAST_IMPLS)
def fast(request):
    """Name of an implementation other than the definition."""
    return request.param


CONFIG = ViTUpConfig(dim=32, num_heads=2, layer_indices=(0, 1, 2))
TOKENS, PATCHES = (5, 7), (10, 14)


@pytest.fixture(scope="session")
def network():
    """A random float64 network; tests that change it work on a copy."""
    return random_network(CONFIG, torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def image():
    """Hidden states and patch grid of three images, in float64."""
    generator = torch.Generator().manual_seed(2)
    return random_image(
        CONFIG, generator, batch=3, token_grid=TOKENS, patch_grid=PATCHES, dtype=torch.float64
    )


@pytest.fixture(scope="session")
def cache(network, image):
    with torch.no_grad():
        return network.prepare(*image)


@pytest.fixture(scope="session")
def coords():
    """Coordinates of 29 queries for each of the three images."""
    return random_coords(torch.Generator().manual_seed(3), 3, 29)
