from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitup_fast
import vitup_fast.ops
import vitup_fast.testing

ROOT = Path(__file__).parents[1]
# From the ground up: nothing imports anything of a later row, and within a row nothing runs in a circle.
ROWS = (
    ("errors", "extension"),
    ("ops.",),
    ("kernels.",),
    (
        "network.config",
        "network.layers",
        "network.weights",
        "network.image_cache",
        "network.grid",
        "network.adaptive",
        "network.patch_grid",
        "network.onnx_file",
        "heads",
        "files",
        "images",
        "matching",
        "pictures",
    ),
    ("walks.",),
    ("network.model", "network.backbone", "network.checkpoint"),
    ("sources",),
    ("upsampler", "accelerate"),
    ("training.", "export"),
    ("__init__", "testing"),
    ("evaluation.", "tiling."),
    ("bench.",),
    ("cli.",),
)

OPTIONAL = (
    "timm",
    "triton",
    "safetensors",
    "PIL",
    "tqdm",
    "yaml",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torchvision",
    "hypothesis",
    "pytest",
    "zarr",
    "tifffile",
    "openslide",
    "rasterio",
    "pyarrow",
    "distributed",
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
import vitup_fast, vitup_fast.ops, vitup_fast.heads, vitup_fast.testing, vitup_fast.tiling
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


def module_files():
    """Every file of the package under its module's name, without ``vitup_fast.``; rooms at the top level too."""
    rooms = {"vitup_fast": "", "kernels": "kernels.", "bench": "bench."}
    for folder, prefix in rooms.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = prefix + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            yield name.removesuffix(".__init__") if name != "__init__" else name, path


def imports_of(name, path, modules):
    """Modules of the package that a file imports anywhere: inside functions and under TYPE_CHECKING too."""
    package = ["vitup_fast", *name.removesuffix("__init__").split(".")]
    package = [part for part in (package if path.stem == "__init__" else package[:-1]) if part]
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            targets = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            targets = (
                [str(node.args[0].value)] if function in ("import_module", "require", "__import__") else []
            )
        for target in targets:
            if f"{target}.".startswith("vitup_fast."):
                short = target.removeprefix("vitup_fast").removeprefix(".")
                while short and short not in modules:
                    short = short.rpartition(".")[0]
                yield short or "__init__"


def import_graph():
    files = dict(module_files())
    return {name: {m for m in imports_of(name, path, files) if m != name} for name, path in files.items()}


def row_of(name):
    """Number of a module's row; an entry that ends with a dot stands for a room and all in it."""
    for number, row in enumerate(ROWS):
        if name in row or any(entry.endswith(".") and f"{name}.".startswith(entry) for entry in row):
            return number
    return None


def test_imports_run_one_way():
    graph = import_graph()
    assert len(graph) > 50
    rows = {name: row_of(name) for name in graph}
    unplaced = {name for name, row in rows.items() if row is None}
    assert unplaced == {"network"}, "say in ROWS what may import them"
    # The package's own version is read where it is said.
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others - {"__init__", "network"}
        if rows[name] is not None and rows[other] > rows[name]
    ]
    assert upward == []


def test_imports_form_no_circle():
    graph = {name: others - {"__init__"} for name, others in import_graph().items()}
    TopologicalSorter(graph).prepare()  # raises on a circle, and names it


@pytest.mark.parametrize(
    "line",
    [
        "from .walks import cpu",
        "def f():\n    from .upsampler import load",
        "if TYPE_CHECKING:\n    from .network.model import ViTUp",
        "importlib.import_module('vitup_fast.cli')",
        "import vitup_fast.walks.cpu",
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, line):
    path = tmp_path / "errors.py"
    path.write_text(line)
    files = dict(module_files())
    (found,) = imports_of("errors", path, files)
    assert row_of(found) > row_of("errors")


FACTORIES = (
    *(
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_permuted",
        "empty_strided",
        "eye",
        "full",
        "linspace",
    ),
    *(
        "logspace",
        "normal",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "range",
        "scalar_tensor",
        "tensor",
    ),
    *("tril_indices", "triu_indices", "zeros"),
)
# These take what they do not name from a tensor, its strides among it: a kernel knows of none.
ALIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "randint_like", "zeros_like")


def careless_factories(source, is_kernel):
    """Lines that make memory in a dtype or on a device that PyTorch's global defaults decide."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        given, name = {keyword.arg for keyword in node.keywords}, node.func.attr
        if name in FACTORIES and not {"dtype", "device"} <= given:
            yield node.lineno, f"torch.{name} names no dtype or no device"
        if name == "frombuffer" and "dtype" not in given:
            yield node.lineno, "torch.frombuffer names no dtype"
        if name in ALIKE and is_kernel and "memory_format" not in given:
            yield node.lineno, f"torch.{name} keeps strides; use new_empty and its kin"


def test_careless_factories_are_found():
    source = "a = torch.empty(3, dtype=x.dtype)\nb = torch.zeros(3, device='cpu')\nc = torch.empty_like(a)"
    assert [line for line, _ in careless_factories(source, True)] == [1, 2, 3]
    assert not list(careless_factories("torch.empty(3, dtype=torch.int8, device=x.device)", True))


def test_factories_name_dtype_and_device():
    root = Path(vitup_fast.__file__).parents[1]
    found = [
        f"{path.relative_to(root)}:{line}: {message}"
        for folder in ("vitup_fast", "kernels", "bench")
        for path in sorted((root / folder).rglob("*.py"))
        for line, message in careless_factories(path.read_text(), folder == "kernels")
    ]
    assert not found, "\n".join(found)
