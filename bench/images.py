"""What an image costs before its first query: backbone, fine patch grid, and keys, values and tokens.

``vitup-fast bench images --image-size 448 448 1200 1600``. ``eager`` follows the definition: it makes the enlarged
image. The weights are random; times do not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from vitup_fast.bench.command import exit_code
from vitup_fast.bench.harness import (
    Case,
    Report,
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

POINTS = 100


@functools.lru_cache(maxsize=1)
def _model(config: ViTUpConfig, dtype: torch.dtype, device: torch.device) -> Upsampler:
    """A network and its backbone with seeded random weights."""
    network, backbone = seeded_network(config)
    return Upsampler(network, backbone).eval().requires_grad_(False).to(device, dtype)


def image_cases(
    config: ViTUpConfig,
    image_size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    impls: Sequence[str] = ("torch",),
    refused: dict[str, str] | None = None,
) -> Iterator[Case]:
    """Set up the three parts of preparing one image.

    Args:
        config: sizes of the network, and its backbone.
        image_size: height and width in pixels.
        device: where to run.
        dtype: dtype of parameters.
        impls: implementations of the network that prepare it.
        refused: implementations that shall not run, with the reason.
    """
    model = _model(config, dtype, device)
    double = copy.deepcopy(model).double()
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(1, 3, *image_size, generator=generator, dtype=torch.float32, device="cpu").to(device)
    coords = torch.rand(1, POINTS, 2, generator=generator, dtype=torch.float32, device="cpu").to(device)
    D, patch, depth = config.dim, model.backbone.patch_size, max(config.layer_indices)
    tokens = model.hidden_layer_img_size[0] * model.hidden_layer_img_size[1] // patch**2
    P, Q = model.patch_grid_size
    enlarged = (P * patch, Q * patch)
    blocks = sum(p.numel() for block in model.backbone.model.blocks[:depth] for p in block.parameters())
    where = f"{image_size[0]} x {image_size[1]} pixels, D={D}"
    shared = {"unit": "images", "count": 1, "baseline": "eager", "device": device, "dtype": dtype}

    @torch.no_grad()
    def hidden(model: Upsampler) -> list[Tensor]:
        """Hidden states, all depths."""
        return model.backbone.hidden_states(image.to(model.dtype), model.hidden_layer_img_size)

    @torch.no_grad()
    def grid_by_definition(model: Upsampler) -> Tensor:
        """The fine patch grid of the enlarged image."""
        return Backbone(model.backbone.model, (0,)).hidden_states(image.to(model.dtype), enlarged)[0]

    @torch.no_grad()
    def grid(coords: Tensor | None = None) -> Tensor:
        """The fine patch grid, or of it what points touch."""
        return model.backbone.patch_grid(image.to(dtype), (P, Q), coords)

    @torch.no_grad()
    def tables(model: Upsampler, states: list[Tensor], patches: Tensor, impl: str) -> list[Tensor]:
        """Keys, values and LayerNormed tokens."""
        cache = model.vit_up.prepare(states, patches, impl=impl)
        return [*cache.keys, *cache.values, *cache.tokens]

    yield Case(
        title=f"Backbone, {where}",
        work=Work(2 * blocks * tokens + 4 * depth * tokens**2 * D),
        eager=lambda: hidden(model),
        providers={},
        exact=lambda: hidden(double),
        **shared,
    )
    some = "library, 100 points"
    touched = grid(coords).ne(0).any(-1)
    yield Case(
        title=f"Fine patch grid of {P} x {Q}, {where}",
        work=Work(2 * P * Q * D * 3 * patch**2, P * Q * D * dtype.itemsize),
        eager=lambda: grid_by_definition(model),
        providers={"library": grid, some: lambda: grid(coords)},
        exact=lambda: grid_by_definition(double),
        # What is not touched is zero, and not asked for.
        checks={some: lambda: torch.where(touched[..., None], grid(coords), grid_by_definition(model))},
        **shared,
    )
    states, patches = hidden(model), grid()
    widened = [state.double() for state in states], patches.double()
    yield Case(
        title=f"Keys, values and tokens, {where}",
        work=Work((config.num_layers - 1) * 4 * D**2 * tokens),
        eager=lambda: tables(model, states, patches, "reference"),
        providers={impl: functools.partial(tables, model, states, patches, impl) for impl in impls},
        exact=lambda: tables(double, *widened, "reference"),
        refused=dict(refused or {}),
        **shared,
    )


def reports(options: argparse.Namespace) -> Iterator[Report]:
    """Measure one image size after the other."""
    for config in options.configs.values():
        for dtype in options.dtype:
            for size in zip(options.image_size[::2], options.image_size[1::2], strict=True):
                fresh_start()
                refused = refusals(options, "network", dtype, config.dim)
                for case in image_cases(
                    config, size, options.device, dtype, impls=options.impl, refused=refused
                ):
                    yield measure(case, options.repeats, patience=options.seconds)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the benchmark; see ``--help``.

    Args:
        argv: command line without the program's name; None takes that of the process.
        prog: the program's name in messages; None takes that of the process.

    Raises:
        InputError: a device that is not there, a number that does not fit, a JSON path that cannot be written.
    """
    parser = make_parser("Benchmark of preparing an image, part by part; --queries means nothing here.")
    parser.prog = prog or parser.prog
    parser.add_argument(
        "--image-size",
        nargs="+",
        type=int,
        default=[448, 448, 1200, 1600],
        metavar="H W",
        help="heights and widths of images in pixels, in turns (448 448 1200 1600)",
    )
    options = parse(parser, argv)
    if len(options.image_size) % 2 or min(options.image_size) < 1:
        raise expected("--image-size", "pairs of positive integers", options.image_size)
    if options.backward:
        raise expected("--backward", "no images", "images", "Preparing them is not trained alone.")
    if any(config.backbone is None for config in options.configs.values()):
        raise expected("--dim", "a preset, which names its backbone", "other sizes")
    return finish(reports(options), options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
