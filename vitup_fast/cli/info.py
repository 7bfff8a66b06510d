"""``vitup-fast info``: versions, devices, what was compiled, and which implementations run here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from .. import __version__, extension
from ..ops import implementations

PACKAGES = ("torch", "triton", "timm", "safetensors", "huggingface_hub", "pillow", "tqdm", "zarr", "tifffile")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Describe the subcommand."""
    parser = commands.add_parser("info", help="show versions, devices and implementations")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print versions, devices, what was compiled, and implementations."""
    print(f"vitup-fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {package:16} {version}")
    print("devices")
    print(f"  cpu              {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        print(f"  cuda:{index:<11} {properties.name}, {memory}, compute capability {capability}")
    print("extension")
    print(f"  build            {extension.summary()}")
    for part in extension.KERNELS:
        print(f"  {part:16} {extension.obstacle(part) or _describe(part)}")
    print("implementations")
    for name, available, reason in implementations():
        print(f"  {name:16} {'yes' if available else 'no':4} {reason}")
    return 0


def _describe(part: str) -> str:
    """Say which machines a part of the extension serves."""
    module = extension.load()
    if part == "cuda":
        return f"for compute capabilities {module.cuda_architectures}"
    return f"{module.cpu.instruction_set()} (runs here: {', '.join(module.cpu.instruction_sets())})"
