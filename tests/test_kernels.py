"""What the Triton kernels promise beyond the operations: settings, widths, offsets, labels and clear failures."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import FAST_IMPLS

if "triton" not in FAST_IMPLS:
    pytest.skip("Triton cannot be used here", allow_module_level=True)

from triton.runtime.errors import OutOfResources
from vitup_fast.kernels.triton import common, linear
from vitup_fast.kernels.triton.bilinear_sample import sample

from vitup_fast.errors import InputError, KernelError, brief
from vitup_fast.ops import norm_linear_argmax
from vitup_fast.testing import (
    OPERATIONS,
    Sizes,
    assert_within_budget,
    cast,
    differentiable_tensors,
    poisoned_allocations,
    relative_error,
    with_tensors,
)

implementations = importlib.import_module("vitup_fast.ops.implementations")

TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# Blocks so small that every loop runs several times and every edge is ragged.
SMALL_BLOCKS = {
    "linear": {**TILES, "TILES": 1},
    "linear_rows": {**TILES, "TILES": 3},
    "linear_narrow": {**TILES, "TILES": 1},
    "linear_few_rows": {**TILES, "TILES": 1},
    "linear_argmax": TILES,
    "hidden_backward": TILES,
    "weight_gradient": TILES,
    "attention": TILES,
    "attention_query_backward": {k: v for k, v in TILES.items() if k != "BLOCK_K"},
    "attention_key_backward": {k: v for k, v in TILES.items() if k != "BLOCK_K"},
}


def run(operation, arguments, impl, cotangent):
    leaves = {name: t.detach().requires_grad_() for name, t in differentiable_tensors(arguments).items()}
    output = operation.function(**with_tensors(arguments, leaves), impl=impl)
    grads = torch.autograd.grad(
        output, list(leaves.values()), cotangent.to(output.dtype), allow_unused=impl == "reference"
    )
    return [output.detach(), *grads]


def assert_equals_reference(operation, arguments, tolerance=1e-10):
    shape = operation.function(**arguments, impl="torch").shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = run(operation, arguments, "reference", cotangent)
    with poisoned_allocations():
        actual = run(operation, arguments, "triton", cotangent)
    for mine, exact in zip(actual, expected, strict=True):
        if exact is not None:
            torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("D", [64, 192, 320])
def test_blocks_do_not_change_results(operation, generator, D):
    """Widths of one, three and five tiles of 64; LayerNorm of complete rows inside and outside of the product."""
    sizes = Sizes(B=2, N=45, D=D, heads=D // 64, token_grid=(4, 8), patch_grid=(4, 5), expansion=1)
    arguments = operation.inputs(sizes, generator, dtype=torch.float64)
    with common.overridden_settings(SMALL_BLOCKS):
        assert_equals_reference(operation, arguments)


@pytest.mark.parametrize("name", ["residual_mlp", "film_mlp_table"])
def test_few_rows_are_spread_over_the_gpu(generator, monkeypatch, name):
    """Where large blocks would leave multiprocessors idle, small ones give the same, LayerNorm of rows included."""
    arguments = OPERATIONS[name].inputs(
        Sizes(B=1, N=45, D=128, token_grid=(4, 8)), generator, dtype=torch.float64
    )
    variants = []
    launch = linear.launch
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 6)
    monkeypatch.setattr(
        linear,
        "launch",
        lambda *args, **options: variants.append(options["variant"]) or launch(*args, **options),
    )
    with common.overridden_settings({"linear": {**TILES, "BLOCK_N": 128, "TILES": 1}}):
        assert_equals_reference(OPERATIONS[name], arguments)
    assert {"linear_narrow", "linear_few_rows"} & {*variants}


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("tokens", [(1, 1), (4, 8), (5, 13)], ids=str)
def test_heads_and_token_counts(generator, width, tokens):
    """Keys in complete blocks alone, in a tail alone, and in both."""
    sizes = Sizes(B=2, N=33, D=128, heads=128 // width, token_grid=tokens)
    arguments = OPERATIONS["rope_cross_attention"].inputs(sizes, generator, dtype=torch.float64)
    with common.overridden_settings(SMALL_BLOCKS):
        assert_equals_reference(OPERATIONS["rope_cross_attention"], arguments)


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_of_the_rows_add_up(generator, monkeypatch, splits):
    monkeypatch.setattr(linear, "splits_of", lambda *_: splits)
    left, right = torch.randn(2, 100, 64, generator=generator, dtype=torch.float64)
    with common.overridden_settings(SMALL_BLOCKS), poisoned_allocations():
        torch.testing.assert_close(
            linear.weight_gradient(left, right), left.T @ right, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("programs", [1, 9, 36, 78, 144, 1000])
@pytest.mark.parametrize("length", [1, 500, 16896])
def test_no_other_number_of_splits_leaves_less_work(monkeypatch, programs, length):
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 132)
    chosen = linear.splits_of(length, 512, programs, torch.device("cpu"))

    def work(splits):
        return -(-programs * splits // 132) * -(-length // splits)

    assert chosen == 1 or length / chosen > 512 - chosen
    possible = [n for n in range(1, 265) if n <= -(-length // 512) and programs * (n - 1) < linear.FULL_GRID]
    assert work(chosen) == min(map(work, possible or [1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["residual_mlp", "norm_linear", "rope_cross_attention"])
def test_rows_whose_mean_dwarfs_their_deviation(generator, name, dtype):
    """Folding LayerNorm subtracts two large numbers; that must cost no more than eager PyTorch loses."""
    operation = OPERATIONS[name]
    arguments = operation.inputs(Sizes(B=1, N=64, D=128), generator, dtype=dtype)
    arguments["x"] = (arguments["x"].float() + 50).to(dtype)
    exact = operation.function(**cast(arguments, torch.float64), impl="reference")
    eager = operation.function(**arguments, impl="reference")
    actual = operation.function(**arguments, impl="triton")
    if name == "norm_linear":
        assert_within_budget(actual, eager, exact, factor=1.5)
    else:  # what the layer adds, not the large residual
        x, wide = arguments["x"].double(), torch.float64
        change = [t.to(wide) - x for t in (actual, eager, exact)]
        rounding = (exact.to(dtype).to(wide) - x) - change[2]
        budget = max(relative_error(change[1], change[2]), (rounding.norm() / change[2].norm()).item())
        assert relative_error(change[0], change[2]) <= 1.5 * budget


def test_offsets_beyond_31_bits():
    """The grid has more than 2^31 elements; memory that nobody touches costs nothing."""
    D, P, Q = 64, 4, (1 << 23) + 8
    grid = torch.empty(1, P, Q, D, dtype=torch.float16)
    assert grid.numel() > 1 << 31
    columns = torch.tensor([3, Q - 2])
    values = torch.randn(2, D, dtype=torch.float16)
    for row in (P - 2, P - 1):
        grid[0, row, columns], grid[0, row, columns + 1] = values, values
    centre = ((columns.double() + 1.0) / Q, torch.full((2,), (P - 1) / P, dtype=torch.float64))
    with poisoned_allocations():
        sampled = sample(grid, torch.stack(centre, -1)[None])
    torch.testing.assert_close(sampled[0], values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize(
    ("classes", "dtype"), [(1, torch.uint8), (150, torch.uint8), (256, torch.uint8), (257, torch.int16)]
)
def test_labels(generator, impl, classes, dtype):
    arguments = OPERATIONS["norm_linear"].inputs(Sizes(B=2, N=37, D=64), generator)
    arguments |= {"weight": torch.randn(classes, 64, generator=generator), "bias": torch.zeros(classes)}
    labels = norm_linear_argmax(**arguments, impl=impl)
    scores = OPERATIONS["norm_linear"].function(**cast(arguments, torch.float64), impl="reference")
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), scores.argmax(-1))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_first_of_equal_scores_wins(generator, impl):
    arguments = OPERATIONS["norm_linear"].inputs(Sizes(B=1, N=5, D=64), generator)
    arguments |= {"weight": torch.zeros(90, 64), "bias": (torch.arange(90) % 40 == 7).float()}
    assert (norm_linear_argmax(**arguments, impl=impl) == 7).all()


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        (
            {"_triton_package_obstacle": lambda: "the package triton is not installed (pip install triton)"},
            "pip",
        ),
        ({"interpreted": lambda: False}, "no NVIDIA GPU is available"),
    ],
)
def test_why_kernels_cannot_run(generator, monkeypatch, patches, reason):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in patches.items():
        monkeypatch.setattr(implementations, name, value)
    arguments = OPERATIONS["residual_mlp"].inputs(Sizes(D=64), generator)
    with pytest.raises(InputError, match=rf"impl: expected .* got 'triton': .*{reason}"):
        OPERATIONS["residual_mlp"].function(**arguments, impl="triton")
    assert not implementations.implementations()[0].available
    assert reason in implementations.implementations()[0].reason
    OPERATIONS["residual_mlp"].function(**arguments, impl="auto")


@pytest.mark.parametrize(("found", "obstacle"), [("3.5.1", "older than 3.6"), ("3.6.0", None), ("4.0", None)])
def test_triton_versions(monkeypatch, found, obstacle):
    monkeypatch.setattr(implementations, "version", lambda name: found)
    implementations._triton_package_obstacle.cache_clear()
    try:
        assert (implementations._triton_package_obstacle() or "").count(obstacle or "\0") == (
            obstacle is not None
        )
    finally:
        implementations._triton_package_obstacle.cache_clear()


@pytest.mark.parametrize(
    ("found", "numpy", "obstacle"),
    [("3.6.0", "2.4.6", "numpy<2.4"), ("3.6.1", "2.3.5", None), ("3.7.0", "2.5.0", None)],
)
def test_versions_of_the_interpreter(generator, monkeypatch, found, numpy, obstacle):
    versions = {"triton": found, "numpy": numpy}
    monkeypatch.setattr(implementations, "version", versions.__getitem__)
    monkeypatch.setattr(
        implementations, "_interpreter_obstacle", implementations._interpreter_obstacle.__wrapped__
    )
    arguments = OPERATIONS["norm_linear"].inputs(Sizes(B=1, N=2, D=64), generator)
    expected = nullcontext() if obstacle is None else pytest.raises(InputError, match=obstacle)
    with expected:
        OPERATIONS["norm_linear"].function(**arguments, impl="triton")
    assert (obstacle or "fused kernels") in implementations.implementations()[0].reason


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("residual_mlp", Sizes(D=96), "the width D = 96 is not a multiple of 64"),
        ("rope_cross_attention", Sizes(D=128, heads=8), "the head width 16 is none of"),
        ("film_mlp", Sizes(D=32), "the width D = 32 is not a multiple of 64"),
    ],
)
def test_sizes_that_kernels_cannot_take(generator, name, sizes, reason):
    arguments = OPERATIONS[name].inputs(sizes, generator)
    with pytest.raises(InputError, match=reason):
        OPERATIONS[name].function(**arguments, impl="triton")


def test_a_kernel_that_does_not_fit_is_named(generator, monkeypatch):
    class Failing:
        fn = linear.linear_kernel.fn

        def __getitem__(self, grid):
            def launch(*args, **options):
                raise OutOfResources(300000, 232448, "shared memory")

            return launch

    monkeypatch.setattr(linear, "linear_kernel", Failing())
    arguments = OPERATIONS["norm_linear"].inputs(Sizes(D=64), generator)
    with pytest.raises(
        KernelError, match=r"linear_kernel \(linear\) failed on .*BLOCK_M.*shared memory.*tune"
    ):
        OPERATIONS["norm_linear"].function(**arguments, impl="triton")


@pytest.fixture
def fresh_settings(monkeypatch, tmp_path):
    """Settings as for a GPU seen for the first time, with a user's directory of its own."""
    monkeypatch.setenv("VITUP_FAST_CACHE", str(tmp_path))
    for cached in (common._tables, common._setting):
        cached.cache_clear()
    yield tmp_path
    for cached in (common._tables, common._setting):
        cached.cache_clear()


def settings_on(name, capability, variant="linear", dtype=torch.bfloat16, width=384):
    common._tables.cache_clear()
    common._setting.cache_clear()
    with common.recorded_launches((name, capability)):
        return common.settings_for(variant, torch.empty(1, 1, dtype=dtype), width)


def test_settings_of_unknown_gpus(fresh_settings):
    shipped = json.loads((common.CONFIGS / "sm_90.json").read_text())
    oldest = shipped[min(shipped, key=common._version)]["half"]["linear"]["default"]
    assert settings_on("a GPU from the future", 90) == oldest
    assert settings_on("a GPU between two", 87) == settings_on("the older one", 80)
    assert settings_on("a GPU of tomorrow", 150) == settings_on("the newest known", 120)
    for path in common.CONFIGS.glob("sm_*.json"):
        for kinds in json.loads(path.read_text()).values():
            assert {variant for kind in kinds.values() for variant in kind} == set(SMALL_BLOCKS)


def linear_settings(block_m=64, **others):
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 64,
        "BLOCK_K": 32,
        "TILES": 1,
        "num_warps": 4,
        "num_stages": 2,
        **others,
    }


def written(content, name="Some GPU"):
    path = common.user_settings_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_settings_by_version_width_and_user(fresh_settings, monkeypatch):
    def table(m, other):
        return {"half": {"linear": {"default": linear_settings(m), "768": linear_settings(other)}}}

    written({"3.6": table(16, 32), "3.10": table(64, 128)})
    monkeypatch.setattr(common.triton, "__version__", "3.9.1")
    assert settings_on("Some GPU", 90)["BLOCK_M"] == 16
    assert settings_on("Some GPU", 90, width=768)["BLOCK_M"] == 32
    # what the user did not tune is shipped
    assert settings_on("Some GPU", 90, variant="attention") == settings_on(
        "another GPU", 90, variant="attention"
    )
    assert settings_on("Some GPU", 90, dtype=torch.float32) == settings_on(
        "another GPU", 90, dtype=torch.float32
    )
    monkeypatch.setattr(common.triton, "__version__", "3.11.0")
    assert settings_on("Some GPU", 90)["BLOCK_M"] == 64


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"3.6": {}},
        {"3.6": {"float32": {}}},
        {"3.6": {"half": {"attention": {}}}},
        {"3.6": {"half": {"linear": {}}}},
        {"3.6": {"half": {"linear": {"768": linear_settings(32)}}}},
    ],
    ids=str,
)
def test_settings_for_something_else_leave_the_shipped_ones(fresh_settings, settings):
    written(settings)
    assert settings_on("Some GPU", 90) == settings_on("another GPU", 90)


def nested(value):
    return {"3.6": {"half": {"linear": {"default": value}}}}


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("{", "Expecting"),
        ("", "Expecting"),
        ("[" * 100_000, "recursion"),
        (json.dumps(nested(linear_settings())) + "}", "Extra data"),
        *(
            (json.dumps(value), f"{re.escape(json.dumps(value))} as the file")
            for value in (None, [], [1], 3, "x", True)
        ),
        ({"3.6": None}, r"null as '3\.6' in the file"),
        ({"3.6": {"half": []}}, r"\[\] as 'half' in '3\.6' in the file"),
        ({"3.6": {"half": {"linear": 64}}}, "64 as 'linear' in 'half'"),
        (nested("fast"), "\"fast\" as 'default' in 'linear'"),
        (nested({}), r"\{\} as 'default'"),
        ({"newest": nested({})}, "the Triton version 'newest' in the file"),
        ({"": {}}, "the Triton version ''"),
        ({"3": {}}, "the Triton version '3'"),
        ({"x" * 5000: {}}, r"the Triton version 'x+\.\.\.x+'"),
        (nested(linear_settings(BLOCK_Q=16)), "unknown .'BLOCK_Q'."),
        (nested({"BLOCK_M": 64}), "none of .'BLOCK_K', 'BLOCK_N', 'TILES', 'num_stages', 'num_warps'."),
        *(
            (nested(linear_settings(**{key: value})), f"{json.dumps(value)} as '{key}' in 'default'")
            for key in ("BLOCK_M", "BLOCK_K", "TILES", "num_warps", "num_stages")
            for value in (0, -16, 1.5, 64.0, "64", None, True, 2**40)
        ),
        *((nested(linear_settings(n)), f"{n} as 'BLOCK_M'") for n in (8, 48, 100)),
        *((nested(linear_settings(num_warps=n)), f"{n} as 'num_warps'") for n in (3, 64)),
    ],
    ids=lambda value: brief(value, 60),
)
def test_bad_settings_are_one_sentence(fresh_settings, content, place):
    written(content)
    with pytest.raises(InputError, match=rf"Some_GPU.json: expected .*{place}.*`vitup-fast tune`") as caught:
        settings_on("Some GPU", 90)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_settings_that_cannot_be_opened(fresh_settings, monkeypatch):
    path = written(nested(linear_settings()))
    path.unlink()
    path.symlink_to(path.with_suffix(".gone"))
    assert settings_on("Some GPU", 90) == settings_on("another GPU", 90)
    path.unlink()
    for make in (Path.mkdir, os.mkfifo):
        make(path)
        with pytest.raises(InputError, match=r"Some_GPU.json: expected .*not a file"):
            settings_on("Some GPU", 90)
        path.rmdir() if path.is_dir() else path.unlink()
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"Some_GPU.json: expected"):
        settings_on("Some GPU", 90)

    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(InputError, match=r"Some_GPU.json: expected .*got Permission denied"):
        settings_on("Some GPU", 90)


def test_where_settings_are_looked_for(fresh_settings, monkeypatch, tmp_path):
    shipped = settings_on("Some GPU", 90)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for cache, folder in [
        ("~/kept here", tmp_path / "home" / "kept here"),
        ("relative", Path("relative")),
        ("", tmp_path / "home" / ".cache" / "vitup_fast"),
    ]:
        monkeypatch.setenv("VITUP_FAST_CACHE", cache)
        assert common.user_settings_path("Some GPU") == folder / "configs" / "Some_GPU.json"
        assert settings_on("Some GPU", 90) == shipped
        written(nested(linear_settings(16)))
        assert settings_on("Some GPU", 90)["BLOCK_M"] == 16
    for cache in ("x" * 5000, "~nobody-of-this-name/cache", str(written({}))):
        monkeypatch.setenv("VITUP_FAST_CACHE", cache)
        with pytest.raises(InputError, match="VITUP_FAST_CACHE: expected a folder") as caught:
            settings_on("Some GPU", 90)
        assert len(str(caught.value)) < 500


def test_without_a_home_folder_there_are_no_users_settings(fresh_settings, monkeypatch):
    shipped = settings_on("Some GPU", 90)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VITUP_FAST_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    assert settings_on("Some GPU", 90) == shipped
    with pytest.raises(InputError, match=r"VITUP_FAST_CACHE: expected a folder .* no home folder"):
        common.user_settings_path("Some GPU")
    closed = Path("/proc/1/root") / "x"  # no way in for most users
    monkeypatch.setattr(Path, "home", lambda: closed)
    assert settings_on("Some GPU", 90) == shipped


REPORT = [sys.executable, "-m", "vitup_fast.bench.compile_report"]


def report(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([*REPORT, *arguments], capture_output=True, text=True, env=environment)


def test_compile_report_is_true():
    """It covers every kernel and shipped setting, comes from the present sources, and holds no fault."""
    content = json.loads((Path(__file__).parent.parent / "bench" / "compile_report.json").read_text())
    checked = report()
    if common.triton.__version__.rpartition(".")[0] not in content:
        pytest.skip(f"the report was not made with Triton {common.triton.__version__}")
    assert checked.returncode == 0, checked.stdout[-2000:] + checked.stderr[-2000:]
    for entries in content.values():
        assert not any(entry["faults"] for entry in entries.values())


def test_compile_report_meets_the_compiler():
    """Kernels that spill, or that the compiler refuses, would differ from the report."""
    if common.triton.__version__.rpartition(".")[0] not in json.loads(
        (Path(__file__).parent.parent / "bench" / "compile_report.json").read_text()
    ):
        pytest.skip("the report was not made with this Triton")
    checked = report("--recompile", "--sm", "90", "--dtype", "bfloat16", "--kernel", "rope_cross_attention")
    assert checked.returncode == 0, checked.stdout[-2000:] + checked.stderr[-2000:]
