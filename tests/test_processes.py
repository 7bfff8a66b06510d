"""Processes that compute after a fork, or started anew, whatever ran before. This file is also their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitup_fast import ViTUpConfig, extension
from vitup_fast.testing import (
    OPERATIONS,
    Sizes,
    differentiable_tensors,
    random_coords,
    random_image,
    random_network,
    with_tensors,
)

SECONDS = 60  # that a child may take; it takes less than one, but for importing PyTorch


def operator_results() -> list[Tensor]:
    """An operator's output and its gradients, in which PyTorch itself computes nothing."""
    operation = OPERATIONS["residual_mlp"]
    arguments = operation.inputs(Sizes(N=97, D=64), torch.Generator("cpu").manual_seed(0))
    leaves = {n: t.requires_grad_() for n, t in differentiable_tensors(arguments).items()}
    output = operation.function(**with_tensors(arguments, leaves), impl="cpu")
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))]


def network_results() -> list[Tensor]:
    """A network's features and its gradients."""
    generator = torch.Generator("cpu").manual_seed(0)
    config = ViTUpConfig(dim=32, num_heads=2, layer_indices=(0, 1))
    network = random_network(config, generator)
    image = random_image(config, generator, token_grid=(4, 4), patch_grid=(8, 8))
    coords = random_coords(generator, 1, 40)
    with torch.no_grad():
        walked = network(network.prepare(*image, impl="cpu"), coords, impl="cpu")
    features = network(network.prepare(*image, impl="cpu"), coords, impl="cpu")
    gradients = torch.autograd.grad(features.square().sum(), list(network.parameters()), allow_unused=True)
    return [walked, features.detach(), *(g for g in gradients if g is not None)]


def compute_in_pytorch() -> None:
    """Operations that PyTorch and its matrix library share among threads."""
    numbers = torch.ones(512, 512, dtype=torch.float32, device="cpu")
    assert torch.all((numbers + 1).sigmoid() @ numbers > 0)


def check(expected: list[list[Tensor]], pytorch_threads: int, threads: int | None = 2) -> None:
    """Compute in this process, which ends if that takes for ever; by default on as many threads as there are."""
    signal.alarm(SECONDS)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.testing.assert_close(operator_results(), expected[0])
    torch.set_num_threads(min(pytorch_threads, torch.get_num_threads()))
    torch.testing.assert_close(network_results(), expected[1])
    compute_in_pytorch()
    signal.alarm(0)


class Checks(Dataset[int]):
    """Numbers of a worker, who has checked itself."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        # First on PyTorch's own number of threads for a worker, which is one.
        check(*self.arguments, threads=None if index == 0 else 2)
        return index


def is_loaded() -> bool:
    return "vitup_fast._C" in sys.modules


def exit_code_of_fork(*arguments: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            check(*arguments)
        except BaseException as error:
            print("os.fork:", error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def exit_codes_of_processes(*methods: str, arguments: tuple[Any, ...]) -> dict[str, int | None]:
    processes = {m: multiprocessing.get_context(m).Process(target=check, args=arguments) for m in methods}
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    return {method: process.exitcode for method, process in processes.items()}


def exit_code_of_workers(*arguments: Any) -> int:
    workers = DataLoader(
        Checks(*arguments), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=SECONDS
    )
    try:
        return int(list(workers) != [0, 1])
    except RuntimeError as error:
        print("DataLoader:", error, file=sys.stderr, flush=True)
        return 1


def exit_code_of_nested_fork(*arguments: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            check(*arguments)
            os._exit(exit_code_of_fork(*arguments) != 0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def failures(stage: str, expected: list[Tensor], pytorch_threads: int) -> Iterator[str]:
    codes = {
        "os.fork": exit_code_of_fork(expected, pytorch_threads),
        # A child that loads the extension itself is as safe to fork as PyTorch is.
        "fork of a fork": exit_code_of_nested_fork(expected, pytorch_threads if is_loaded() else 1),
        "DataLoader": exit_code_of_workers(expected, pytorch_threads),
        **exit_codes_of_processes("fork", arguments=(expected, pytorch_threads)),
    }
    yield from (f"{stage}: {name}: {code}" for name, code in codes.items() if code != 0)


def main(order: str, file: str) -> list[str]:
    """Run what comes before the forks, and fork."""
    torch.set_num_threads(2)
    expected = torch.load(file)
    found = []
    if order == "PyTorch first":
        found += failures("nothing before", expected, 2)
        compute_in_pytorch()
        # Where nobody has loaded the extension, PyTorch's operations work on one thread alone in a child, as ever.
        assert not is_loaded()
        found += failures("PyTorch before", expected, 1)
        check(expected, 2)
        found += failures("PyTorch, then kernels before", expected, 2)
    elif order == "kernels first":
        torch.testing.assert_close(operator_results(), expected[0])
        found += failures("kernels before", expected, 2)
    else:
        check(expected, 2)
        codes = exit_codes_of_processes("forkserver", "spawn", arguments=(expected, 2))
        found += [f"{method}: {code}" for method, code in codes.items() if code != 0]
    check(expected, 2)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("order", ["PyTorch first", "kernels first", "other methods"])
def test_children_compute_whatever_ran_before(order, tmp_path):
    if obstacle := extension.obstacle("cpu"):
        pytest.skip(obstacle)
    torch.save([operator_results(), network_results()], tmp_path / "expected.pt")
    command = [sys.executable, "-W", "ignore", __file__, order, tmp_path / "expected.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10 * SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    messages = main(*sys.argv[1:])
    sys.exit("\n".join(messages) or None)
