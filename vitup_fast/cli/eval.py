"""``vitup-fast eval``: how good features are, and scenes to judge them by."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, brief, expected, require
from ..evaluation import (
    FeatureFunction,
    Journal,
    LabelledFolder,
    faithfulness_table,
    make_scenes,
    matching_table,
    measure_faithfulness,
    measure_matching,
    measure_segmentation,
    read_pairs,
    segmentation_table,
)
from ..evaluation.faithfulness import SCALES
from ..evaluation.features import BUILT_IN
from ..files import digest_tensors, write_json
from ..images import write_atomically
from ..network.backbone import Backbone
from ..network.model import check_size
from ..sources import backbone_source, build_backbone
from ..upsampler import Upsampler
from . import outputs
from .guards import interruptible
from .outputs import shown
from .upsample import add_model_arguments, load_model


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Describe the subcommand and its own."""
    parser = commands.add_parser("eval", help="measure how good features are, or make scenes to measure on")
    kinds = parser.add_subparsers(required=True, metavar="{faithfulness,segmentation,matching,make-scenes}")

    faithfulness = kinds.add_parser("faithfulness", help="compare features with those of a larger image")
    faithfulness.add_argument(
        "pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders of them"
    )
    faithfulness.add_argument(
        "--scales",
        nargs="+",
        type=int,
        default=list(SCALES),
        help="tokens of the larger image per token (2 4)",
    )
    _add_common(faithfulness, _faithfulness)

    segmentation = kinds.add_parser(
        "segmentation", help="train and judge linear heads on pictures with masks"
    )
    segmentation.add_argument(
        "folder", type=Path, help="folder with images/, masks/ (PNG, class indices) and perhaps scenes.json"
    )
    segmentation.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="rows and columns that are judged (all pixels)"
    )
    _add_common(segmentation, _segmentation)

    matching = kinds.add_parser("matching", help="find points of one picture in another")
    matching.add_argument("pairs", type=Path, help="JSON file, or a folder of them, in the form of SPair-71k")
    matching.add_argument("--images", type=Path, help="folder of the pictures (images/ beside the file)")
    _add_common(matching, _matching)

    scenes = kinds.add_parser(
        "make-scenes", help="paste cut-outs on photographs: exact masks and correspondences"
    )
    scenes.add_argument(
        "cutouts", type=Path, help="folder with a folder of pictures with alpha for each class"
    )
    scenes.add_argument("photographs", type=Path, help="folder of pictures")
    scenes.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    scenes.add_argument("--scenes", type=int, default=60, help="number of scenes, even (60)")
    scenes.add_argument("--seed", type=int, default=0, help="seeds everything (0)")
    scenes.add_argument("--size", type=int, default=448, help="height and width in pixels (448)")
    scenes.set_defaults(run=_interruptible(_make_scenes))


def _add_common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Describe what all measurements take."""
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME=FILE.py:FUNCTION",
        help="compare another upsampler, function(image, size, input_size) -> (H, W, D); a module may name it too",
    )
    parser.add_argument(
        "--teacher-weights", help="file of the backbone without adapters, if those are merged"
    )
    add_model_arguments(parser)
    parser.set_defaults(run=_interruptible(run), measurement=parser.prog.rpartition(" ")[2])


def _interruptible(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Let Ctrl-C end a command cleanly, once everything is imported."""

    def interruptible_run(args: argparse.Namespace) -> int:
        require("tqdm", "demo", "showing progress")
        require("PIL.Image", "demo", "reading pictures")
        with interruptible():
            return run(args)

    return interruptible_run


def _faithfulness(args: argparse.Namespace) -> int:
    """Measure faithfulness, and draw features."""
    pictures = outputs.find_images(args.pictures)
    drawings = args.output / "features"
    outputs.make_folder(drawings)
    measure = partial(measure_faithfulness, pictures=pictures, scales=args.scales, drawings=drawings)
    return _measure(args, {"scales": args.scales}, measure, faithfulness_table, len(pictures))


def _segmentation(args: argparse.Namespace) -> int:
    """Measure linear segmentation."""
    folder = LabelledFolder.read(args.folder)
    size = check_size("--size", tuple(args.size)) if args.size else None
    training = sum(not picture.held_out for picture in folder.pictures)
    steps = training + len(folder.pictures) * (len(BUILT_IN) + len(args.method))
    measure = partial(measure_segmentation, folder=folder, size=size)
    return _measure(args, {"size": size}, measure, segmentation_table, steps)


def _matching(args: argparse.Namespace) -> int:
    """Measure keypoint matching."""
    pairs = read_pairs(args.pairs, args.images)
    return _measure(args, {}, partial(measure_matching, pairs=pairs), matching_table, len(pairs))


def _measure(
    args: argparse.Namespace,
    settings: dict[str, Any],
    measure: Callable[..., Sequence[Any]],
    table: Callable[[Sequence[Any]], str],
    steps: int,
) -> int:
    """Load the model, measure with progress, and write the results as JSON and as a table in Markdown."""
    outputs.make_folder(args.output)
    functions = dict(map(_named_function, args.method))
    model = load_model(args)
    teacher = _teacher(args, model)
    settings = {
        "vitup_fast": __version__,
        "model": model.model_config["model_name"],
        "parameters": digest_tensors(model.state_dict().items()),
        "teacher": "the model's backbone"
        if teacher is None
        else digest_tensors(teacher.state_dict().items()),
        "dtype": model.model_config["dtype"],
        "hidden_layer_img_size": model.hidden_layer_img_size,
        "methods": args.method,
        **settings,
    }
    name = args.measurement
    journal = Journal(args.output / f".{name}.jsonl", settings)
    tqdm = require("tqdm", "demo", "showing progress").tqdm
    with tqdm(total=steps, desc=name, unit="picture") as bar:
        progress = {"journal": journal, "progress": bar.update}
        results = measure(model, teacher=teacher, functions=functions, **progress)
    shown_table = table(results)
    write_json(
        args.output / f"{name}.json", {"settings": settings, "results": [r._asdict() for r in results]}
    )
    write_atomically(args.output / f"{name}.md", lambda path: path.write_text(shown_table, "utf-8"))
    journal.finish()
    print(shown_table, end="")
    return 0


def _teacher(args: argparse.Namespace, model: Upsampler) -> Backbone | None:
    """Return the backbone without adapters where the model's own has them merged."""
    if not model.backbone.adapters_merged and args.teacher_weights is None:
        return None
    source = backbone_source(args.teacher_weights or args.backbone_weights)
    teacher = build_backbone(model.vit_up.config, source).to(model.device, model.dtype)
    return teacher.eval().requires_grad_(False)


def _named_function(text: str) -> tuple[str, FeatureFunction]:
    """Import what ``NAME=FILE.py:FUNCTION`` or ``NAME=MODULE:FUNCTION`` means."""
    name, _, place = text.partition("=")
    source, _, attribute = place.rpartition(":")
    if not (name and source and attribute):
        raise expected("--method", "NAME=FILE.py:FUNCTION or NAME=MODULE:FUNCTION", text)
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, attribute)
    except Exception as error:
        raise InputError(
            f"--method: {brief(place)} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    if not callable(function):
        raise expected("--method", f"a function at {brief(place)}", type(function).__name__)
    return name, function


def _make_scenes(args: argparse.Namespace) -> int:
    """Make scenes."""
    tqdm = require("tqdm", "demo", "showing progress").tqdm
    with tqdm(total=args.scenes, desc="scenes", unit="scene") as bar:
        options = {"scenes": args.scenes, "seed": args.seed, "size": args.size, "progress": bar.update}
        make_scenes(args.cutouts, args.photographs, args.output, **options)
    print(
        f"{shown(args.output)}: {args.scenes} scenes; judge features by: vitup-fast eval segmentation, matching"
    )
    return 0
