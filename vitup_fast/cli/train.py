"""``vitup-fast train``: train a network on pictures."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from ..errors import expected, require
from ..training import Interrupted, Run, TrainingConfig
from ..training.configuration import TRAINING_PRESETS
from ..training.teacher import Cache


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Describe the subcommand."""
    parser = commands.add_parser(
        "train",
        help="train a network on pictures",
        epilog="Several GPUs or machines: torchrun --nproc-per-node N -m vitup_fast.cli train ...",
    )
    parser.add_argument("-o", "--output", type=Path, help="folder of the run")
    parser.add_argument(
        "--preset", default="dinov2_small", choices=sorted(TRAINING_PRESETS), help="settings to begin with"
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings that replace the preset's")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="folders of pictures, or .tar files of them (WebDataset)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="any setting, as YAML: learning_rate=1e-4 teacher_sizes=[448,896]",
    )
    parser.add_argument(
        "--backbone-weights", help="backbone file, or 'random' (published weights from the hub)"
    )
    parser.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the folder's checkpoint, if there is one"
    )
    parser.add_argument("--settings", action="store_true", help="print the settings as YAML, and end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code."""
    yaml = require("yaml", "train", "reading settings")
    config = TrainingConfig.preset(args.preset)
    if args.config is not None:
        config = TrainingConfig.read(args.config, config)
    changes: dict[str, Any] = {}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise expected("--set", "NAME=VALUE", setting)
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise expected(f"--set {name}", "a value as in YAML", value) from error
    if args.data:
        changes["data"] = args.data
    config = config.changed(changes)
    if args.settings:
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(config).items()}
        print(yaml.safe_dump(plain, sort_keys=False), end="")
        return 0
    if args.output is None:
        raise expected("--output", "a folder for the run", None)
    require("tqdm", "train", "showing progress")
    require("PIL.Image", "train", "reading pictures")
    training = Run(
        config,
        args.output,
        backbone_weights=args.backbone_weights,
        device=args.device,
        resume=args.resume,
    )
    cache = training.examples.cache
    if cache is not None:
        _announce(cache)
    try:
        path = training.train()
    except Interrupted as interrupt:
        print(f"vitup-fast train: {interrupt}", file=sys.stderr)
        return 128 + interrupt.signal
    print(f"{path}: trained {config.steps} steps")
    return 0


def _announce(cache: Cache) -> None:
    """Say what the cache will hold before it does."""
    missing = len(cache.missing())
    size = missing * cache.example_bytes / 2**30
    print(f"{cache.folder}: {missing} crops to be cached in the first epoch, {size:.1f} GiB", file=sys.stderr)
