"""``vitup-fast giga``: answers for every cell, or features of points, of images larger than memory."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..errors import brief, expected, require
from ..tiling import Estimate, upsample, upsample_points
from ..tiling.answers import FEATURES
from ..tiling.points import SUFFIXES as POINT_SUFFIXES
from ..tiling.run import MAX_MEMORY
from ..tiling.write import FORMATS
from .guards import interruptible
from .upsample import SOME_FAILED, add_model_arguments, load_model

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _OnlyEstimate(Exception):
    """Ends a run after its estimate."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Describe the subcommand."""
    parser = commands.add_parser(
        "giga", help="labels, scores, pictures or features of images larger than memory"
    )
    parser.add_argument(
        "image", type=Path, metavar="INPUT", help="TIFF, slide, GeoTIFF, zarr, npy or picture"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help=f"a file that ends with {', '.join(FORMATS)}; or a folder",
    )
    asked = parser.add_argument_group("what to write, at least one")
    asked.add_argument("--labels", action="store_true", help="the head's best class")
    asked.add_argument("--scores", action="store_true", help="the head's scores")
    asked.add_argument("--head", help="linear head: safetensors or npz with weight (C, D) and bias (C)")
    asked.add_argument(
        "--pca", metavar="K|FILE", help="principal components as colours; FILE is an earlier pca.safetensors"
    )
    asked.add_argument(
        "--similar", metavar="FILE", help="cosine to the vectors (Q, D) of a npy, npz or safetensors file"
    )
    asked.add_argument("--features", choices=FEATURES, help="the features themselves")
    asked.add_argument("--stride", default="1", help="pixels between cells, such as 16, 0.5 or 1/3 (1)")
    asked.add_argument(
        "--format", default=FORMATS[0], choices=FORMATS, help="of the files in a folder (.ome.zarr)"
    )
    asked.add_argument(
        "--points",
        metavar="FILE",
        help="answers (features, if nothing is asked) at the points of a CSV, Parquet or GeoJSON file, in pixels of "
        f"level 0, and nothing else; OUTPUT ends with {', '.join(POINT_SUFFIXES)}",
    )
    pixels = parser.add_argument_group("how to read the image")
    pixels.add_argument("--level", type=int, default=0, help="resolution to work at (0)")
    pixels.add_argument("--mpp", type=float, help="micrometres per pixel to work at")
    pixels.add_argument(
        "--source-mpp", type=float, help="micrometres per pixel of the image, if it does not say"
    )
    pixels.add_argument("--bands", type=int, nargs="+", metavar="N", help="one or three channels, from 1")
    pixels.add_argument(
        "--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="values of black and white"
    )
    pixels.add_argument("--mask", metavar="FILE|otsu", help="foreground: a file, or the tissue of a slide")
    pixels.add_argument("--strict", action="store_true", help="stop at a tile that cannot be decoded")
    windows = parser.add_argument_group("windows and work")
    windows.add_argument(
        "--window", type=int, help="side of a window in pixels (that of --hidden-layer-img-size)"
    )
    windows.add_argument(
        "--overlap", type=float, default=0.5, help="share of a window that the next one sees (0.5)"
    )
    windows.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="interpolate cells where that is expected to be off by less, such as 0.1, or 1 for labels alone "
        "(compute all)",
    )
    windows.add_argument("--batch", type=int, help="windows at once (8 on a GPU, 1 on a CPU)")
    windows.add_argument("--max-memory", default=f"{MAX_MEMORY >> 30}G", help="of all workers' buffers (4G)")
    windows.add_argument("--workers", type=int, default=1, help="processes on this machine (1)")
    windows.add_argument(
        "--shard", default="1/1", metavar="I/N", help="make one of N shares, in a shared folder"
    )
    windows.add_argument("--dask", metavar="ADDRESS", help="of a Dask scheduler that shares out the work")
    windows.add_argument("--dry-run", action="store_true", help="say what it will take, and end")
    add_model_arguments(parser.add_argument_group("the model"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the job; return the exit code: 3 if some tiles of the input could not be decoded."""
    # Imported before Ctrl-C raises an exception, which importing may lose.
    require("tqdm", "giga", "showing progress")
    require("PIL.Image", "giga", "drawing a report")
    require("timm", "giga", "building a backbone")
    if args.points and args.mask:
        raise expected("--points", "no --mask beside it", args.mask)
    if args.points and args.tolerance is not None:
        remedy = "Points have no lattice to interpolate on."
        raise expected("--points", "no --tolerance beside it", args.tolerance, remedy)
    shard, max_memory = _shard(args.shard), _bytes(args.max_memory)
    with interruptible():
        try:
            return _giga(args, shard, max_memory)
        except KeyboardInterrupt:
            print(f"\nvitup-fast: the same command goes on from {brief(args.output, 500)}.", file=sys.stderr)
            raise


def _giga(args: argparse.Namespace, shard: tuple[int, int], max_memory: int) -> int:
    """Load the model, compute, and say what was made."""

    def announce(estimate: Estimate) -> None:
        print(f"{brief(args.image, 500)}: {estimate}", flush=True)
        if args.dry_run:
            raise _OnlyEstimate

    model = load_model(args)
    asked = {
        "head": args.head,
        "labels": args.labels,
        "scores": args.scores,
        "pca": int(args.pca) if args.pca and args.pca.isdecimal() else args.pca,
        "similar": args.similar,
    }
    options = {
        "level": args.level,
        "mpp": args.mpp,
        "source_mpp": args.source_mpp,
        "bands": args.bands,
        "scale": args.scale,
        "strict": args.strict,
        "window": args.window,
        "batch": args.batch,
        "workers": args.workers,
        "shard": shard,
        "dask": args.dask,
        "announce": announce,
        "progress": True,
    }
    try:
        if args.points:
            features = True if args.features else None
            summary = upsample_points(
                args.image, args.points, args.output, model, features=features, **asked, **options
            )
        else:
            summary = upsample(
                args.image,
                args.output,
                model,
                features=args.features,
                stride=args.stride,
                overlap=args.overlap,
                tolerance=args.tolerance,
                mask=args.mask,
                format=args.format,
                max_memory=max_memory,
                **asked,
                **options,
            )
    except _OnlyEstimate:
        return 0
    for name, path in summary.outputs.items():
        print(f"{name} -> {brief(path, 500)}")
    if summary.spent is not None:
        (error,) = summary.spent.error
        print(
            f"{summary.spent.share:.1%} of the {summary.spent.cells:,} cells of all windows computed, "
            f"the rest interpolated with an estimated error of {error:.2%}."
        )
    if summary.missing:
        print(f"{summary.windows:,} windows computed; {summary.missing:,} parts are left for other shares.")
    if summary.faults:
        print(
            f"vitup-fast: {len(summary.faults)} tiles could not be decoded, and are left out:",
            file=sys.stderr,
        )
        print(*(f"  {fault}" for fault in summary.faults), sep="\n", file=sys.stderr)
        return SOME_FAILED
    return 0


def _shard(text: str) -> tuple[int, int]:
    """Read I/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise expected("--shard", "I/N, such as 1/8", text)
    return int(found[1]), int(found[2])


def _bytes(text: str) -> int:
    """Read a number of bytes with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise expected("--max-memory", "bytes such as 800M or 4G", text)
    return int(float(found[1]) * _UNITS[found[2].upper()])
