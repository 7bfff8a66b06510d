"""What a training run is made of: one dataclass, written to and read from YAML."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import InputError, brief, expected, require
from ..images import write_atomically
from ..network.config import PRESETS
from ..network.model import CHECKPOINTS

STARTS = ("random", "interpolation")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run (ViT-Up, arXiv 2606.14024, training details).

    Attributes:
        network: preset of :class:`~vitup_fast.network.config.ViTUpConfig` that is trained.
        start: ``"random"``; ``"interpolation"``: the network begins by interpolating the backbone's hidden states,
            which few pictures suffice to improve on; or the path of a trained network to go on from.
        data: folders of pictures, searched through, and tar files of them (WebDataset shards).
        cutouts: folder of pictures with alpha that are pasted on the crops; empty for none.
        cutout_probability: share of the crops that get cut-outs.
        samples: number of fixed crops that are gone through again and again; 0 means ever new ones.
        cache: folder where the teacher's features of fixed crops are kept; empty computes them in each step.
        crop_size: side of a crop and of the container in pixels; the teacher sees nothing larger.
        crop_scale: least and largest side of a crop relative to the picture's shorter side.
        colour_jitter: largest relative change of brightness, contrast and saturation of a crop.
        relative_size: least and largest side of the crop relative to its container; the rest is noise.
        fill_probability: share of the steps whose crops fill their containers, as whole pictures do in use.
        teacher_sizes: sides in pixels at which the teacher sees the crop; the largest gives one query a token.
        student_sizes: sides in pixels at which the student sees the container, one of them drawn a step.
        batch_size: crops a step, over all processes.
        blocks: blocks of queries of each crop that a step uses, drawn at random; 0 means all. A block is the
            queries of one token of the smallest teacher size.
        blocks_per_backward: blocks that go forward and backward together: the memory of a step.
        checkpoint: what the forward pass keeps, see :meth:`~vitup_fast.ViTUp.forward`: ``"none"`` is the fastest,
            ``"op"`` and ``"block"`` need less memory.
        size_weights: weight of the loss at each of ``teacher_sizes``; empty for equal ones.
        depth_weights: weight of the loss at each depth; empty for equal ones.
        l2: weight of the normalised squared error.
        cosine: weight of one minus the cosine.
        similarity: weight of the divergence between the tokens' similarities.
        lora_rank: rank of the adapters of the student's backbone; 0 leaves it frozen.
        learning_rate: of AdamW, at its highest.
        final_learning_rate: at the end of the cosine.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up from a hundredth.
        steps: steps of the whole run.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the parameters that is saved beside them; 0 for none.
        bfloat16: whether the network runs under bfloat16 autocast.
        seed: of everything drawn.
        workers: processes that read pictures.
        save_every: steps between checkpoints.
        picture_every: steps between pictures of the first crop; 0 for none.

    Raises:
        InputError: a value of another type or out of its range, or values that do not fit each other.
    """

    network: str = "dinov3_splus"
    start: str = "random"
    data: tuple[str, ...] = ()
    cutouts: str = ""
    cutout_probability: float = 0.5
    samples: int = 0
    cache: str = ""
    crop_size: int = 896
    crop_scale: tuple[float, float] = (0.3, 1.0)
    colour_jitter: float = 0.2
    relative_size: tuple[float, float] = (0.1, 1.0)
    fill_probability: float = 0.0
    teacher_sizes: tuple[int, ...] = (224, 448, 896)
    student_sizes: tuple[int, ...] = (448,)
    batch_size: int = 24
    blocks: int = 0
    blocks_per_backward: int = 49
    checkpoint: str = "none"
    size_weights: tuple[float, ...] = ()
    depth_weights: tuple[float, ...] = ()
    l2: float = 1.0
    cosine: float = 1.0
    similarity: float = 1.0
    lora_rank: int = 16
    learning_rate: float = 2e-4
    final_learning_rate: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: int = 2669
    steps: int = 53381
    clip: float = 1.0
    ema: float = 0.0
    bfloat16: bool = True
    seed: int = 0
    workers: int = 2
    save_every: int = 500
    picture_every: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, _checked(field.name, getattr(self, field.name), field.default)
            )
        if self.network not in PRESETS:
            raise expected("network", f"one of {sorted(PRESETS)}", repr(self.network))
        if self.start not in STARTS and not Path(self.start).is_file():
            raise expected("start", f"one of {STARTS}, or the path of a network", repr(self.start))
        if self.checkpoint not in CHECKPOINTS:
            raise expected("checkpoint", f"one of {CHECKPOINTS}", repr(self.checkpoint))
        for name in ("crop_scale", "relative_size"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise expected(name, "two ascending numbers in (0, 1]", (low, high))
        for name in ("crop_size", "batch_size", "blocks_per_backward", "steps", "save_every"):
            if getattr(self, name) < 1:
                raise expected(name, "a positive integer", getattr(self, name))
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise expected(name, "a number above zero", getattr(self, name))
        for name in ("cutout_probability", "fill_probability", "colour_jitter", "ema"):
            if getattr(self, name) > 1:
                raise expected(name, "a number from 0 to 1", getattr(self, name))
        if self.l2 == self.cosine == self.similarity == 0:
            raise expected("l2, cosine and similarity", "one of them above zero", "0, 0 and 0")
        sizes = self.teacher_sizes
        if not sizes or sizes != tuple(sorted(set(sizes))) or any(sizes[-1] % size for size in sizes):
            raise expected("teacher_sizes", "ascending divisors of the last, the largest", sizes)
        depths = PRESETS[self.network].num_layers
        for name, count in (("size_weights", len(sizes)), ("depth_weights", depths)):
            weights = getattr(self, name)
            if weights and (len(weights) != count or sum(weights) == 0):
                raise expected(name, f"{count} numbers of at least 0, not all 0, or none", weights)
        if not self.student_sizes:
            raise expected("student_sizes", "at least one side in pixels", self.student_sizes)
        if self.crop_size < sizes[-1]:
            remedy = "Enlarge crop_size: the teacher would see enlarged pixels."
            raise expected("teacher_sizes", f"sizes up to crop_size {self.crop_size}", sizes, remedy)
        if self.cache and not self.samples:
            raise expected("samples", "the number of fixed crops to cache", 0, "Or leave cache empty.")

    @classmethod
    def preset(cls, name: str) -> TrainingConfig:
        """Return the settings of a preset; pictures and places are the user's.

        ``"dinov3_splus"`` and ``"dinov3_base"`` have the authors' numbers, ``"dinov2_small"`` what served best for
        the network that comes with the package, ``"tiny"`` learns in minutes on a CPU.

        Raises:
            InputError: the name is unknown.
        """
        if name not in TRAINING_PRESETS:
            raise expected("preset", f"one of {sorted(TRAINING_PRESETS)}", repr(name))
        return TRAINING_PRESETS[name]

    @classmethod
    def read(cls, path: str | os.PathLike[str], base: TrainingConfig | None = None) -> TrainingConfig:
        """Read settings from a YAML file; what it leaves out comes from ``base``, or from the preset it names.

        Raises:
            InputError: no such file, no YAML, an unknown setting (named, with the one it resembles), or a bad value.
            MissingPackageError: PyYAML is not installed.
        """
        yaml = require("yaml", "train", "reading a training configuration")
        name = brief(path, 300)
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror or error}).") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{name}: is no YAML ({brief(error, 300)}).") from error
        if not isinstance(values, dict):
            raise expected(name, "settings, one 'name: value' a line", type(values).__name__)
        preset = values.pop("preset", None)
        if preset is not None:
            base = cls.preset(preset)
        return (base or cls()).changed(values)

    def changed(self, values: dict[str, Any]) -> TrainingConfig:
        """Return these settings with some replaced.

        Raises:
            InputError: an unknown setting, or a bad value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in values:
            if name not in known:
                import difflib

                close = difflib.get_close_matches(str(name), known, 1)
                remedy = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}."
                raise expected("settings", "known names", repr(name), remedy)
        return dataclasses.replace(self, **values)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all settings as YAML."""
        yaml = require("yaml", "train", "writing a training configuration")
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        text = yaml.safe_dump(plain, sort_keys=False)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _checked(name: str, value: object, default: object) -> object:
    """Return a setting in the type of its default, or refuse it."""
    if isinstance(default, tuple):
        hint = get_type_hints(TrainingConfig)[name].__args__[0]
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise expected(name, "a list", repr(value))
        if len(default) == 2 and hint is float and len(value) != 2:
            raise expected(name, "two numbers", repr(value))
        return tuple(_checked(name, item, hint()) for item in value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise expected(name, "true or false", repr(value))
        return value
    if isinstance(default, str):
        if not isinstance(value, str | os.PathLike):
            raise expected(name, "a text", repr(value))
        return str(value)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a text
        try:
            value, number = float(value), True
        except ValueError:
            number = False
    kind = "an integer" if isinstance(default, int) else "a finite number"
    if (
        not number
        or not math.isfinite(value)
        or value < 0
        or (isinstance(default, int) and value != int(value))
    ):
        raise expected(name, f"{kind} of at least 0", repr(value))
    return type(default)(value)


TRAINING_PRESETS = {
    "dinov3_splus": TrainingConfig(network="dinov3_splus"),
    "dinov3_base": TrainingConfig(network="dinov3_base"),
    "dinov2_small": TrainingConfig(
        network="dinov2_small",
        start="interpolation",
        samples=700,
        relative_size=(0.7, 1.0),
        fill_probability=0.5,
        student_sizes=(448, 448, 448, 224),
        batch_size=2,
        blocks=64,
        blocks_per_backward=64,
        size_weights=(0.0, 0.25, 1.0),
        depth_weights=(0.25, 0.5, 0.5, 1.0),
        similarity=0.0,
        lora_rank=0,
        learning_rate=5e-4,
        warmup_steps=100,
        steps=3000,
        ema=0.998,
        workers=0,
    ),
    "tiny": TrainingConfig(
        network="tiny",
        start="interpolation",
        samples=32,
        crop_size=256,
        teacher_sizes=(64, 128, 256),
        student_sizes=(128,),
        relative_size=(0.5, 1.0),
        batch_size=2,
        blocks=8,
        blocks_per_backward=8,
        lora_rank=4,
        learning_rate=1e-3,
        warmup_steps=10,
        steps=200,
        bfloat16=False,
        workers=0,
        save_every=50,
        picture_every=100,
    ),
}
