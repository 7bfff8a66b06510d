"""Correctness of every implementation on a device: operations, network and golden files against float64.

``python -m vitup_fast.bench.correctness --device cuda --json correctness.json``

Errors may be at most 1.5 times those of plain eager PyTorch in the same dtype. Implementations in fewer bits than it
has, which run only when named, pass by their cosine to float64, and forward alone. Memory that a kernel leaves
unwritten holds NaN. Every check prints a line and the rest go on after a failure; benchmarks do not time what failed
when they are given the file (``--correctness``). ``--quick`` keeps the smallest sizes, for a memory checker;
``--chunk`` checks two blocks at the size of a network's chunk alone, whose launches are those of the network.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vitup_fast.bench.command import check_writable, exit_code
from vitup_fast.bench.harness import (
    COSINE_LIMITS,
    DTYPES,
    ERROR_LIMIT,
    check_device,
    check_implementations,
    device_name,
    reason,
    versions,
    write_json,
)

from vitup_fast import ViTUp, ViTUpConfig
from vitup_fast.errors import expected, require
from vitup_fast.ops.implementations import FP8_WIDTH
from vitup_fast.testing import (
    OPERATIONS,
    Arguments,
    Operation,
    Sizes,
    assert_within_budget,
    cast,
    differentiable_tensors,
    poisoned_allocations,
    random_coords,
    random_image,
    random_network,
    relative_error,
    with_tensors,
)
from vitup_fast.walks.plan import gpu_chunk

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "data"
QUICK_SIZES = (
    Sizes(B=2, N=37, D=64, heads=2, token_grid=(5, 7), patch_grid=(9, 12)),
    Sizes(B=1, N=1, D=64, heads=2, token_grid=(5, 7), patch_grid=(9, 12), expansion=4),
    Sizes(B=1, N=130, D=64, heads=1, token_grid=(5, 7), patch_grid=(9, 12), expansion=4),
)
SIZES = (
    *QUICK_SIZES,
    Sizes(B=2, N=1000, D=64, heads=1, token_grid=(28, 28), patch_grid=(20, 28), expansion=4),
    Sizes(B=2, N=37, D=384, heads=6, token_grid=(5, 7), patch_grid=(20, 28), expansion=2),
    Sizes(B=2, N=1000, D=384, heads=6, token_grid=(28, 28), patch_grid=(56, 56), expansion=4),
    Sizes(B=2, N=1000, D=768, heads=12, token_grid=(28, 28), patch_grid=(28, 28), expansion=4),
)
# Powers of two, at which float32 holds the coordinates that a table stands for exactly.
TABLE_GRIDS = {(5, 7): (4, 8), (28, 28): (32, 32)}
# The error of a single query's coordinate gradient, two numbers, is chance.
LEAST_QUERIES_BACKWARD = 16
GOLDEN_FLOAT64_ERROR = 1e-9
# Earlier queries of the golden file lie on cell borders, where float32 may choose the other token.
SAME_TOKEN_FROM = 11

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One check and how it ended.

    Attributes:
        operation: key in :data:`vitup_fast.testing.OPERATIONS`, ``"network"`` or ``"golden"``.
        impl: the implementation under test.
        dtype: compute type.
        direction: ``"forward"`` or ``"backward"``.
        detail: sizes, or which part of the network.
        width: feature width D; None for golden files.
        passed: whether it held.
        worst: largest error in units of its budget at factor 1; None if there is no result.
        message: what failed.
        seconds: time of the check, compilation included.
    """

    operation: str
    impl: str
    dtype: str
    direction: str
    detail: str
    width: int | None
    passed: bool
    worst: float | None
    message: str
    seconds: float

    def line(self) -> str:
        """Return the check as one line."""
        worst = "" if self.worst is None else f" {self.worst:.2f} x eager"
        message = "" if self.passed else f": {self.message}"
        name = f"{self.operation} {self.impl} {self.dtype} {self.direction}"
        return f"{'ok  ' if self.passed else 'FAIL'} {name}, {self.detail}{worst}{message}"


class Task(NamedTuple):
    """A check to be done.

    Attributes:
        operation: see :class:`Check`.
        impl: see :class:`Check`.
        dtype: see :class:`Check`.
        direction: see :class:`Check`.
        detail: see :class:`Check`.
        width: see :class:`Check`.
        compare: returns the tensors of the implementation, of eager, and of float64, by name.
    """

    operation: str
    impl: str
    dtype: torch.dtype
    direction: str
    detail: str
    width: int | None
    compare: Callable[[], tuple[Results, Results, Results]]


def assert_cosine(actual: Tensor, truth: Tensor, limit: float, name: str) -> None:
    """Check the cosine of every row to float64."""
    least = F.cosine_similarity(actual.to(truth), truth, dim=-1).min().item()
    if not least >= limit:
        raise AssertionError(f"{name}: a cosine to float64 of {least:.5f} is below {limit}")


def takes(impl: str, dtype: torch.dtype, width: int | None, direction: str) -> bool:
    """Whether an implementation is written for a check: those in fewer bits run forward, ``cuda_fp8`` at one width."""
    if impl not in COSINE_LIMITS:
        return True
    fits = impl != "cuda_fp8" or (dtype == torch.bfloat16 and width == FP8_WIDTH)
    return fits and direction == "forward"


def done(task: Task) -> Check:
    """Do a check; whatever it raises is its failure."""
    begin = time.perf_counter()
    worst, message = None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # poisoning asks for deterministic algorithms where there are some
            actual, eager, exact = task.compare()
        ratios = []
        for name, truth in exact.items():
            if name not in actual:
                raise AssertionError(f"{name}: there is none")
            rounding = relative_error(truth.to(actual[name].dtype), truth)
            limit = max(relative_error(eager[name], truth), rounding, torch.finfo(torch.float64).tiny)
            ratios.append(relative_error(actual[name], truth) / limit)
        worst = max(ratios, key=lambda ratio: (ratio != ratio, ratio))
        for name, truth in exact.items():
            if task.impl in COSINE_LIMITS:
                assert_cosine(actual[name], truth, COSINE_LIMITS[task.impl], name)
                continue
            assert_within_budget(actual[name], eager[name], truth, factor=ERROR_LIMIT, name=name)
    except AssertionError as error:
        message = str(error)
    except Exception as error:
        message = reason(error)
    seconds = time.perf_counter() - begin
    dtype = str(task.dtype).removeprefix("torch.")
    return Check(*task[:2], dtype, *task[3:6], not message, worst, message, round(seconds, 3))


def run_operation(operation: Operation, arguments: Arguments, impl: str, cotangent: Tensor | None) -> Results:
    """Return an operation's output, or with a cotangent the gradients of all tensors that it depends on."""
    if cotangent is None:
        with torch.no_grad():
            return {"output": operation.function(**arguments, impl=impl)}
    leaves = {
        name: t.detach().clone().requires_grad_() for name, t in differentiable_tensors(arguments).items()
    }
    output = operation.function(**with_tensors(arguments, leaves), impl=impl)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype), allow_unused=True)
    return {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}


def compare_operation(
    name: str, impl: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, backward: bool
) -> tuple[Results, Results, Results]:
    """Run an operation in an implementation, in eager PyTorch, and in float64."""
    operation, generator = OPERATIONS[name], torch.Generator().manual_seed(0)
    arguments = operation.inputs(sizes, generator, dtype=dtype, device=device)
    wide = cast(arguments, torch.float64)
    cotangent = None
    if backward:
        width = run_operation(operation, arguments, "reference", None)["output"].shape
        cotangent = torch.randn(width, generator=generator, dtype=torch.float32, device="cpu").to(
            device, dtype
        )
    exact = run_operation(operation, wide, "reference", cotangent)
    eager = run_operation(operation, arguments, "reference", cotangent)
    if backward and name == "film_mlp_table":
        # The definition does not read the table; plain PyTorch calls do.
        exact |= {n: g for n, g in run_operation(operation, wide, "torch", cotangent).items() if "table" in n}
        eager |= {
            n: g for n, g in run_operation(operation, arguments, "torch", cotangent).items() if "table" in n
        }
    with poisoned_allocations():
        actual = run_operation(operation, arguments, impl, cotangent)
    return actual, eager, exact


def operation_tasks(
    names: Sequence[str],
    impls: Sequence[str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    sizes: Sequence[Sizes],
) -> Iterator[Task]:
    """List the checks of single operations, forward and backward."""
    for size in sizes:
        for name in names:
            fitting = size
            if name == "film_mlp_table":
                fitting = size._replace(token_grid=TABLE_GRIDS.get(size.token_grid, size.token_grid))
            h, w = fitting.token_grid
            detail = f"B={size.B} N={size.N} D={size.D} heads={size.heads} tokens={h}x{w} expansion={size.expansion}"
            for dtype in dtypes:
                for impl in impls:
                    for direction in ("forward", "backward")[: 1 if size.N < LEAST_QUERIES_BACKWARD else 2]:

                        def compare(
                            name: str = name,
                            impl: str = impl,
                            sizes: Sizes = fitting,
                            dtype: torch.dtype = dtype,
                            backward: bool = direction == "backward",
                        ) -> tuple[Results, Results, Results]:
                            return compare_operation(name, impl, sizes, dtype, device, backward)

                        yield Task(name, impl, dtype, direction, detail, size.D, compare)


class Setting(NamedTuple):
    """A network with images and queries.

    Attributes:
        net: the network, in the compute type.
        hidden: hidden states, L times ``[B, h, w, D]``.
        grid: fine patch grid ``[B, P, Q, D]``.
        coords: coordinates ``[B, N, 2]``.
    """

    net: ViTUp
    hidden: list[Tensor]
    grid: Tensor
    coords: Tensor

    def to(self, dtype: torch.dtype) -> Setting:
        """Copy it in another dtype; coordinates stay."""
        hidden = [h.to(dtype) for h in self.hidden]
        return Setting(copy.deepcopy(self.net).to(dtype), hidden, self.grid.to(dtype), self.coords)


def network_results(
    setting: Setting, impl: str, part: str, chunk: int | None = None, size: tuple[int, int] | None = None
) -> Results:
    """Run one part of the network's interface; ``size`` is that of a dense map, by default four cells a token."""
    net, hidden, grid, coords = setting
    options = {"impl": impl, "query_chunk_size": chunk}
    if part == "gradients":
        return network_gradients(setting, impl, chunk)
    with torch.no_grad():
        cache = net.prepare(hidden, grid, impl=impl)
        if part == "all layers":
            layers = net(cache, coords, return_all_layers=True, **options)
            return {f"depth {i}": layer for i, layer in enumerate(layers)}
        if part == "forward":
            return {"features": net(cache, coords, **options)}
        if size is None:
            ragged = part == "dense, ragged"
            size = (23, 41) if ragged else (4 * hidden[0].shape[1], 4 * hidden[0].shape[2])
        head = None
        if part == "dense with head":
            head = nn.Linear(net.config.dim, 5).to(net.device)
            weight = torch.randn(
                5,
                net.config.dim,
                generator=torch.Generator("cpu").manual_seed(2),
                dtype=torch.float32,
                device="cpu",
            )
            head.weight.copy_(weight / net.config.dim**0.5)
            head.bias.zero_()
            head = head.to(net.dtype)
        return {"features": net.dense(cache, size, head=head, **options)}


def network_gradients(
    setting: Setting, impl: str, chunk: int | None, cotangents: list[Tensor] | None = None
) -> Results:
    """Return gradients of parameters, hidden states, patch grid and coordinates, each group in one tensor."""
    net = copy.deepcopy(setting.net).requires_grad_()
    hidden, grid, coords = (
        [h.clone().requires_grad_() for h in setting.hidden],
        setting.grid.clone().requires_grad_(),
        setting.coords.clone().requires_grad_(),
    )
    cache = net.prepare(hidden, grid, impl=impl)
    outputs = net(cache, coords, return_all_layers=True, impl=impl, query_chunk_size=chunk)
    if cotangents is None:
        generator = torch.Generator().manual_seed(3)
        cotangents = [
            torch.randn(y.shape, generator=generator, dtype=torch.float32, device="cpu") for y in outputs
        ]
    seeds = [c.to(y) for c, y in zip(cotangents, outputs, strict=True)]
    weights = list(net.parameters())
    leaves = [*weights, *hidden[1:], grid, coords]
    grads = torch.autograd.grad(outputs, leaves, seeds)
    inner = grads[len(weights) : -2]
    return {
        "gradient of parameters": torch.cat([g.flatten() for g in grads[: len(weights)]]),
        "gradient of hidden states": torch.stack(inner),
        "gradient of patch grid": grads[-2],
        "gradient of coordinates": grads[-1],
    }


NETWORK_PARTS = ("forward", "all layers", "dense", "dense, ragged", "dense with head", "gradients")


class NetworkCase(NamedTuple):
    """A network to check.

    Attributes:
        config: its sizes.
        tokens: rows and columns of the tokens.
        patches: those of the fine patch grid.
        batch: images.
        count: scattered queries.
        size: of a dense map; None takes four cells a token.
        parts: of :data:`NETWORK_PARTS`.
        chunks: queries at a time; None leaves it to the network.
    """

    config: ViTUpConfig
    tokens: tuple[int, int]
    patches: tuple[int, int]
    batch: int
    count: int
    size: tuple[int, int] | None = None
    parts: Sequence[str] = NETWORK_PARTS
    chunks: Sequence[int | None] = (None, 53)

    def setting(self, dtype: torch.dtype, device: torch.device) -> Setting:
        """Draw it."""
        generator = torch.Generator().manual_seed(1)
        net = random_network(self.config, generator, dtype=dtype, device=device)
        options = {"token_grid": self.tokens, "patch_grid": self.patches, "dtype": dtype, "device": device}
        image = random_image(self.config, generator, batch=self.batch, **options)
        return Setting(net, *image, random_coords(generator, self.batch, self.count, device=device))


def network_cases(quick: bool) -> list[NetworkCase]:
    """Small networks, and without ``quick`` a wide one."""
    cases = [NetworkCase(ViTUpConfig(64, 2, (0, 1, 2)), (5, 7), (10, 14), 2, 137)]
    if not quick:
        cases.append(NetworkCase(ViTUpConfig(384, 6, (0, 2, 4)), (28, 28), (56, 56), 1, 1000))
    return cases


def chunk_cases(device: torch.device) -> list[NetworkCase]:
    """Two blocks of each width at the size of a whole chunk, on a grid and scattered: what the network launches."""
    from vitup_fast.kernels.triton.common import multiprocessors

    cases = []
    for width in (384, 768):
        chunk = gpu_chunk(multiprocessors(device), width)
        sizes = {"size": (chunk // 128, 128), "parts": ("forward", "dense"), "chunks": (None,)}
        config = ViTUpConfig(width, width // 64, (0, 1, 2))
        cases.append(NetworkCase(config, (28, 28), (56, 56), 1, chunk, **sizes))
    return cases


def network_tasks(
    impls: Sequence[str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    cases: Sequence[NetworkCase],
) -> Iterator[Task]:
    """List the checks of whole networks, each part with the default chunk and with ragged ones."""
    for case, dtype, impl in itertools.product(cases, dtypes, impls):
        for part, chunk in itertools.product(case.parts, case.chunks):

            def compare(
                case: NetworkCase = case,
                impl: str = impl,
                dtype: torch.dtype = dtype,
                part: str = part,
                chunk: int | None = chunk,
            ) -> tuple[Results, Results, Results]:
                setting = case.setting(dtype, device)
                exact = network_results(setting.to(torch.float64), "reference", part, size=case.size)
                eager = network_results(setting, "reference", part, size=case.size)
                with poisoned_allocations():
                    return network_results(setting, impl, part, chunk, case.size), eager, exact

            direction = "backward" if part == "gradients" else "forward"
            detail = f"D={case.config.dim} {part}" + ("" if chunk is None else f", chunks of {chunk}")
            yield Task("network", impl, dtype, direction, detail, case.config.dim, compare)


def golden_file(folder: Path, name: str, device: torch.device) -> Results:
    """Read a golden file.

    Raises:
        InputError: it is not there.
        MissingPackageError: safetensors is not installed.
    """
    path = folder / name
    if not path.is_file():
        raise expected("--goldens", f"a folder with {name}", str(folder))
    load = require("safetensors.torch", "timm", "reading golden files").load_file
    return {key: tensor.to(device) for key, tensor in load(path).items()}


def golden_setting(golden: Results, prefix: str, dtype: torch.dtype, device: torch.device) -> Setting:
    """Build the network of a golden file with its images and queries."""
    layers = sum(key.startswith("hidden_states.") for key in golden)
    names = (key.removeprefix(prefix) for key in golden if key.startswith(prefix))
    weights = {name: golden[prefix + name] for name in names if not name.startswith("backbone.")}
    weights = {name.removeprefix("vit_up."): tensor for name, tensor in weights.items()}
    net = ViTUp(ViTUpConfig(dim=64, num_heads=2, layer_indices=range(layers)))
    net.load_state_dict(weights, strict=True)
    hidden = [golden[f"hidden_states.{i}"].to(dtype) for i in range(layers)]
    return Setting(net.to(device, dtype), hidden, golden["patch_grid"].to(dtype), golden["coords"])


def golden_tasks(
    folder: Path, impls: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device
) -> Iterator[Task]:
    """List the checks against stored numbers of the published implementation.

    In float64 the definition must meet them; in the compute types errors against them stay within the budget.
    """
    files = (("vitup_tiny.safetensors", "weights."), ("dinov3_lora_tiny.safetensors", "published."))
    for name, prefix in files:

        def compare(
            impl: str,
            dtype: torch.dtype,
            backward: bool,
            name: str = name,
            prefix: str = prefix,
        ) -> tuple[Results, Results, Results]:
            golden = golden_file(folder, name, device)
            case = golden_setting(golden, prefix, dtype, device)
            start = SAME_TOKEN_FROM if prefix == "weights." and dtype != torch.float64 else 0
            if not backward:
                exact = {f"depth {i}": golden[f"outputs.{i}"][:, start:] for i in range(len(case.hidden))}

                def results(impl: str) -> Results:
                    layers = network_results(case, impl, "all layers")
                    return {depth: layer[:, start:] for depth, layer in layers.items()}
            else:
                # Cotangents of queries on cell borders would reach the gradients of another token.
                seeds = [golden[f"cotangents.{i}"].clone() for i in range(len(case.hidden))]
                for seed in seeds:
                    seed[:, :start] = 0
                wide = golden_setting(golden, prefix, torch.float64, device)
                exact = network_gradients(wide, "reference", None, seeds)

                def results(impl: str) -> Results:
                    return network_gradients(case, impl, None, seeds)

            if dtype == torch.float64:
                actual = results(impl)
                for part, truth in exact.items():
                    error = relative_error(actual[part], truth)
                    if not error <= GOLDEN_FLOAT64_ERROR:
                        raise AssertionError(
                            f"{part}: relative error {error:.3e} exceeds {GOLDEN_FLOAT64_ERROR}"
                        )
                return exact, exact, exact
            eager = results("reference")
            with poisoned_allocations():
                return results(impl), eager, exact

        def task(
            impl: str, dtype: torch.dtype, backward: bool, name: str = name, compare: Callable = compare
        ) -> Task:
            direction = "backward" if backward else "forward"
            return Task("golden", impl, dtype, direction, name, None, lambda: compare(impl, dtype, backward))

        yield task("reference", torch.float64, False)
        for dtype in dtypes:
            for impl in impls:
                yield task(impl, dtype, False)
                if prefix == "weights.":
                    yield task(impl, dtype, True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; see ``--help``.

    Returns:
        Exit code: 0 if all passed, 1 if one failed.

    Raises:
        InputError: a device or an implementation that is not there, no golden files, a path that cannot be written.
    """
    parser = argparse.ArgumentParser(description="Correctness of every implementation against float64.")
    add = parser.add_argument
    add("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    add("--impl", nargs="+", metavar="NAME", help="implementations (default: all that run on the device)")
    add(
        "--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="compute types (default: all)"
    )
    add(
        "--operation", nargs="+", choices=(*OPERATIONS, "network", "golden"), help="only these (default: all)"
    )
    add("--quick", action="store_true", help="the smallest sizes only")
    add("--chunk", action="store_true", help="two blocks at the size of a network's chunk only")
    add("--goldens", type=Path, default=GOLDENS, metavar="DIR", help="golden files (default: tests/data)")
    add("--json", type=Path, metavar="PATH", help="write the checks to this file, after each of them")
    options = parser.parse_args(argv)
    device = check_device(options.device)
    impls = check_implementations(options.impl, device)
    dtypes = [DTYPES[name] for name in options.dtype]
    chosen = options.operation or [*OPERATIONS, "network", "golden"]
    if options.json is not None:
        check_writable(options.json)
    if "golden" in chosen:
        golden_file(options.goldens, "vitup_tiny.safetensors", torch.device("cpu"))

    def tasks() -> Iterator[Task]:
        if options.chunk:
            yield from network_tasks(impls, dtypes, device, chunk_cases(device))
            return
        names = [name for name in OPERATIONS if name in chosen]
        if "golden" in chosen:
            yield from golden_tasks(options.goldens, impls, dtypes, device)
        yield from operation_tasks(names, impls, dtypes, device, QUICK_SIZES)
        if "network" in chosen:
            yield from network_tasks(impls, dtypes, device, network_cases(options.quick))
        if not options.quick:
            yield from operation_tasks(names, impls, dtypes, device, SIZES[len(QUICK_SIZES) :])

    checks: list[Check] = []
    for task in tasks():
        if not takes(task.impl, task.dtype, task.width, task.direction):
            continue
        checks.append(done(task))
        print(checks[-1].line(), flush=True)
        if options.json is not None:
            content = {
                "device": device_name(device),
                "versions": versions(),
                "checks": [asdict(c) for c in checks],
            }
            write_json(options.json, content)
    failed = [check for check in checks if not check.passed]
    print(
        f"{len(checks) - len(failed)} of {len(checks)} checks passed, {sum(c.seconds for c in checks):.0f} s"
    )
    for check in failed:
        print(check.line())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
