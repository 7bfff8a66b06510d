"""Batches of windows from bytes to scores: image preparation, backbone, upsampler and head, as tiling runs them.

``vitup-fast bench windows --batch 1 4 8``. All providers prepare windows alike and run the same timm backbone;
``eager`` embeds the fine patch grid as the paper does, from the enlarged window, and then follows the definition.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vitup_fast.bench.command import exit_code
from vitup_fast.bench.end_to_end import by_definition, grid_coords, least_work, pieces
from vitup_fast.bench.harness import (
    Case,
    Report,
    Run,
    Work,
    finish,
    fresh_start,
    make_parser,
    measure,
    parse,
    refusals,
)

from vitup_fast import Upsampler, ViTUpConfig
from vitup_fast.errors import expected
from vitup_fast.network.backbone import Backbone
from vitup_fast.sources import seeded_network
from vitup_fast.tiling.work import Pixels, Source

CLASSES = 8


@functools.lru_cache(maxsize=1)
def _model(config: ViTUpConfig, dtype: torch.dtype, device: torch.device) -> Upsampler:
    """A network and its backbone with seeded random weights."""
    network, backbone = seeded_network(config)
    return Upsampler(network, backbone).eval().requires_grad_(False).to(device, dtype)


def windows_case(
    config: ViTUpConfig,
    batch: int,
    stride: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    impls: Sequence[str] = ("torch",),
    refused: Mapping[str, str] | None = None,
    compiled: bool = True,
) -> Case:
    """Set up batches of windows of the network's image size.

    Args:
        config: sizes of the network.
        batch: windows at once.
        stride: pixels between cells, a divisor of the window's side.
        device: where to run.
        dtype: dtype of parameters.
        impls: implementations of this library to include.
        refused: implementations that shall not run, with the reason.
        compiled: include ``torch.compile`` of the definition.

    Raises:
        InputError: no window, or a stride that does not divide it.
    """
    model = _model(config, dtype, device)
    window = model.hidden_layer_img_size[0]
    if batch < 1:
        raise expected("--batch", "positive integers", batch)
    if stride < 1 or window % stride:
        raise expected("--stride", f"a divisor of the window's {window} pixels", stride)
    side = window // stride
    generator = np.random.default_rng(0)
    windows = list(generator.integers(0, 256, (batch, window, window, 3), dtype=np.uint8))
    # Random backbones see noise alone; edges make hidden states differ from place to place.
    for i, pixels in enumerate(windows):
        pixels[window // 4 :, : window // (2 + i % 3)] //= 4
    weight = torch.randn(
        (CLASSES, config.dim),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    ).to(device)
    reader = SimpleNamespace(dtype=np.dtype(np.uint8), channels=3)
    plane: Any = SimpleNamespace(reader=reader)
    prepared = Pixels(plane, Source(Path("windows")), model)
    coords = grid_coords(side, device)

    def plain(model: Upsampler, definition: Any) -> Run:
        """Follow the definition, window by window."""
        kind = model.dtype
        embedding = Backbone(model.backbone.model, (0,))
        patch = model.backbone.patch_size
        enlarged = tuple(n * patch for n in model.patch_grid_size)

        def run() -> Tensor:  # [B, side * side, CLASSES]
            found = []
            with torch.no_grad():
                images = prepared.normalised(windows)
                images = images.double() if kind == torch.float64 else images
                hidden = model.backbone.hidden_states(images, model.hidden_layer_img_size)
                for i in range(batch):
                    own = [h[i : i + 1] for h in hidden]
                    grid = embedding.hidden_states(images[i : i + 1], enlarged)[0]
                    at = coords if kind == torch.float64 else coords.float()
                    layers = [definition(model.vit_up, own, grid, at[:, s])[-1] for s in pieces(side**2)]
                    found.append(torch.cat(layers, dim=1) @ weight.to(kind).T)
            return torch.cat(found)

        return run

    def by_library(impl: str) -> Run:
        """Run all windows together, with the head folded into the decoder."""

        def run() -> Tensor:  # [B, side * side, CLASSES]
            with torch.no_grad():
                images = prepared.normalised(windows)
                hidden = model.backbone.hidden_states(images, model.hidden_layer_img_size)
                grid = model.backbone.patch_grid(images, model.patch_grid_size)
                cache = model.vit_up.prepare(hidden, grid, impl=impl)
                scores = model.vit_up.dense(cache, (side, side), head=(weight, None), impl=impl)
            return scores.flatten(1, 2)

        return run

    providers = {}
    if compiled:
        providers["compiled"] = plain(model, torch.compile(by_definition, dynamic=False))
    providers |= {impl: by_library(impl) for impl in impls}
    tokens = (window // model.backbone.patch_size) ** 2
    D, depth = config.dim, max(config.layer_indices)
    blocks = sum(p.numel() for block in model.backbone.model.blocks[:depth] for p in block.parameters())
    of_backbone = 2 * blocks * tokens + 4 * depth * tokens**2 * D
    of_network = least_work(config, tokens, side**2, position_mlp=False).flops
    parameters = sum(p.nbytes for p in model.parameters())
    double = copy.deepcopy(model).double()
    return Case(
        title=f"ViT-Up D={D}, {batch} windows of {window} pixels to {CLASSES} scores every {stride} pixels",
        count=batch,
        unit="windows",
        work=Work(batch * (of_backbone + of_network), parameters + batch * window**2 * 3),
        eager=plain(model, by_definition),
        providers=providers,
        exact=plain(double, by_definition),
        baseline="compiled" if compiled else "eager",
        device=device,
        dtype=dtype,
        detail={"GFLOP of the backbone": round(batch * of_backbone / 1e9, 1)},
        refused=dict(refused or {}),
        cache_bytes=batch * (config.num_layers - 1) * 3 * tokens * D * dtype.itemsize,
    )


def reports(options: argparse.Namespace) -> Iterator[Report]:
    """Measure one batch after the other."""
    for config in options.configs.values():
        for dtype in options.dtype:
            for batch in options.batch:
                fresh_start()
                case = windows_case(
                    config,
                    batch,
                    options.stride,
                    options.device,
                    dtype,
                    impls=options.impl,
                    refused=refusals(options, "network", dtype, config.dim),
                    compiled=options.compile,
                )
                yield measure(case, options.repeats, patience=options.seconds)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; see ``--help``.

    Args:
        argv: command line without the program's name; None takes that of the process.
        prog: the program's name in messages; None takes that of the process.

    Raises:
        InputError: a device that is not there, a number that does not fit, a JSON path that cannot be written.
    """
    parser = make_parser(
        "Benchmark of batches of windows, from bytes to scores; --queries means nothing here."
    )
    parser.prog = prog or parser.prog
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="windows at once (1 and 4)")
    parser.add_argument("--stride", type=int, default=8, help="pixels between the cells of a window (8)")
    options = parse(parser, argv)
    if options.backward:
        raise expected("--backward", "no windows", "windows", "Windows are not trained on.")
    return finish(reports(options), options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
