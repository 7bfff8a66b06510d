"""The training loop: read pictures, ask the teacher, correct the student, save; over any number of processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import InputError, brief, expected, require
from ..images import colours, panels, principal_colours, write_atomically
from ..network.config import ViTUpConfig
from ..upsampler import Upsampler
from .configuration import STARTS, TrainingConfig
from .data import STEP, Crops, Placement
from .start import start_as_interpolation
from .supervision import Batch, Geometry, accumulate_gradients
from .teacher import Cache, Example, Teacher, pixels

CHECKPOINT, CONFIG, LOG, PICTURE, NETWORK = (
    "checkpoint.pt",
    "config.yaml",
    "log.jsonl",
    "picture.png",
    "network.safetensors",
)
BAD_BATCH = "bad_batch.pt"
LOG_EVERY = 20
START_CROPS = 8
# A run may go on with other values of these, and is the same run.
FREE = {
    "cache",
    "workers",
    "save_every",
    "picture_every",
    "blocks_per_backward",
    "checkpoint",
    "data",
    "cutouts",
}


class Interrupted(Exception):
    """Training was asked to stop, and has saved; ``signal`` is the number of the signal."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        self.signal = number
        super().__init__(f"stopped after step {step}, and saved; go on with the same command and --resume.")


class World(NamedTuple):
    """The processes that train together."""

    rank: int
    size: int

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device) -> Iterator[World]:
        """Join the processes that torchrun started, if it did."""
        if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
            yield cls(0, 1)
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    def sum(self, tensors: list[Tensor]) -> None:
        """Add the tensors of all processes, in place, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view_as(t))


class Examples:
    """The examples of each step, read ahead by worker processes; cached ones are made when first needed."""

    def __init__(self, config: TrainingConfig, crops: Crops, teacher: Teacher) -> None:
        self.config, self.crops, self.teacher = config, crops, teacher
        self.cache = Cache(config.cache, crops, teacher) if config.cache else None

    def ordered(self, first: int, step: int, total: int) -> list[int]:
        """Numbers of the crops that a process sees, from its first to the run's last, ``step`` apart."""
        numbers = range(first, total, step)
        samples = self.config.samples
        if not samples:
            return list(numbers)
        return [_shuffled(self.config.seed, *divmod(number, samples), samples) for number in numbers]

    def stream(self, numbers: list[int]) -> Iterator[Example]:
        """Yield the examples of crops, in order."""
        if self.cache is not None:
            for k in numbers:
                if not self.cache.path(k).exists():
                    self.cache.fill([k])
                yield self.cache[k]
            return
        loader = DataLoader(self.crops, batch_size=None, sampler=numbers, num_workers=self.config.workers)
        for crop in loader:
            features = self.teacher(pixels(crop[None], self.teacher.backbone))
            yield Example(crop, {size: [layer[0] for layer in layers] for size, layers in features.items()})


def _shuffled(seed: int, epoch: int, place: int, samples: int) -> int:
    """Which of the fixed crops comes at a place of an epoch; the first epoch goes in order."""
    if epoch == 0:
        return place
    return int(np.random.default_rng([seed, STEP, epoch, samples]).permutation(samples)[place])


class Run:
    """A training run in a folder.

    Args:
        config: its settings.
        folder: for checkpoints, log and pictures; made if need be.
        backbone_weights: see :meth:`Upsampler.create`.
        device: None takes a GPU if there is one.
        resume: go on from the folder's checkpoint, if there is one; otherwise the folder must not hold a run.

    Raises:
        InputError: settings that do not fit data, backbone or each other, a folder that holds another run, or a
            checkpoint of other settings (which are named).
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: str | os.PathLike[str],
        *,
        backbone_weights: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.folder = config, Path(folder)
        self.checkpoint = self.folder / CHECKPOINT
        network = ViTUpConfig.preset(config.network)
        self.crops = Crops(config)
        saved = self._saved(resume)
        torch.manual_seed(config.seed)
        self.upsampler = Upsampler.create(
            network,
            weights=None if config.start in STARTS or saved is not None else config.start,
            backbone_weights=backbone_weights,
            device=device,
        )
        backbone = self.upsampler.backbone
        self.geometry = Geometry.of(config, backbone.patch_size)
        if config.blocks > self.geometry.blocks:
            raise expected("blocks", f"at most the {self.geometry.blocks} of a crop", config.blocks)
        backbone.model.eval()
        self.teacher = Teacher(backbone, config)
        self.examples = Examples(config, self.crops, self.teacher)
        if config.lora_rank and not backbone.lora_parameters():
            backbone.add_lora(config.lora_rank)
        self.parameters = dict(self.upsampler.vit_up.named_parameters())
        self.parameters |= {f"lora.{n}": p for n, p in enumerate(backbone.lora_parameters())}
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if config.ema else {}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step = 0
        if saved is not None:
            self._restore(saved)

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.upsampler.device

    def train(self, progress: bool = True) -> Path:
        """Train until the last step, and return the file with the network.

        Raises:
            InputError: pictures, cache or disk fail; or a loss that is not finite, whose batch is saved then.
            Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
        """
        config = self.config
        with World.joined(self.device) as world, _signals() as stop:
            if config.batch_size % world.size:
                raise expected("batch_size", f"a multiple of the {world.size} processes", config.batch_size)
            if world.rank == 0:
                self._make_folder()
            if self.step == 0 and config.start == "interpolation":
                self._start()
            local = config.batch_size // world.size
            numbers = self._numbers(world, local)
            stream = self.examples.stream(numbers)
            self._log = _Log(self.folder / LOG, self.step) if world.rank == 0 else None
            with _bar(config.steps, self.step, progress and world.rank == 0) as bar:
                while self.step < config.steps:
                    began = time.perf_counter()
                    batch = self._batch([next(stream) for _ in range(local)], world, local)
                    loss, norm = self._update(batch, world)
                    self.step += 1
                    if world.rank == 0:
                        queries = config.batch_size * batch.blocks.shape[1] * self.geometry.block**2
                        self._report(bar, loss, norm, queries, time.perf_counter() - began, batch)
                    stopped = _any(stop.number, world, self.device)
                    last = self.step == config.steps
                    if world.rank == 0 and (last or stopped or self.step % config.save_every == 0):
                        self.save()
                    if stopped and not last:
                        raise Interrupted(stopped, self.step, self.folder)
            if world.rank == 0:
                self.export(self.folder / NETWORK)
        return self.folder / NETWORK

    def _numbers(self, world: World, local: int) -> list[int]:
        """Numbers of the crops of this process, in the order of its steps."""
        config = self.config
        total = config.steps * config.batch_size
        ordered = self.examples.ordered(self.step * config.batch_size, 1, total)
        return [
            number
            for step in range(0, len(ordered), config.batch_size)
            for number in ordered[step + world.rank * local :][:local]
        ]

    def _batch(self, examples: list[Example], world: World, local: int) -> Batch:
        """Draw places, blocks and the student's size; the same numbers whatever the number of processes."""
        config, device = self.config, self.device
        common = np.random.default_rng([config.seed, STEP, self.step])
        size = int(common.choice(config.student_sizes))
        first = world.rank * local
        rngs = [np.random.default_rng([config.seed, STEP, self.step, first + i]) for i in range(local)]
        fills = bool(config.fill_probability) and common.random() < config.fill_probability
        placements = [Placement.draw(config, rng, fills) for rng in rngs]
        count = config.blocks or self.geometry.blocks
        blocks = np.stack([rng.permutation(self.geometry.blocks)[:count] for rng in rngs])
        features = {
            teacher: [
                torch.stack([example.features[teacher][depth].to(device) for example in examples])
                for depth in range(self.upsampler.vit_up.config.num_layers)
            ]
            for teacher in config.teacher_sizes
        }
        crops = torch.stack([example.crop for example in examples]).to(device)
        return Batch(crops, features, placements, torch.from_numpy(blocks).to(device), size, rngs)

    def _update(self, batch: Batch, world: World) -> tuple[float, float]:
        """Make a step; return loss and norm of the gradient."""
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        with self._autocast():
            total = accumulate_gradients(self.upsampler, config, self.geometry, batch, 1 / world.size)
        loss = torch.tensor([total], dtype=torch.float64, device=self.device)
        world.sum([loss])
        if not loss.isfinite():
            self._give_up(batch, loss.item(), world)
        gradients = [parameter.grad for parameter in self.parameters.values()]
        world.sum(gradients)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        if not norm.isfinite():
            self._give_up(batch, loss.item(), world)
        self.optimiser.step()
        for name, mean in self.average.items():
            mean.lerp_(
                self.parameters[name].detach(), 1 - min(config.ema, (self.step + 1) / (self.step + 10))
            )
        return loss.item(), norm.item()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.bfloat16)

    def _give_up(self, batch: Batch, loss: float, world: World) -> None:
        """Save the batch of a loss or a gradient that is not finite, and stop."""
        path = self.folder / (BAD_BATCH if world.rank == 0 else f"{world.rank}_{BAD_BATCH}")
        state = {**batch._asdict(), "noise": None, "placements": [tuple(p) for p in batch.placements]}
        write_atomically(path, lambda file: torch.save({"step": self.step, **state}, file))
        raise expected(
            "training",
            "a finite loss and gradient",
            f"loss {loss} at step {self.step}",
            f"The batch is in {path}; the last checkpoint is sound. Lower the learning rate.",
        )

    def _start(self) -> None:
        """Let the network begin by interpolating hidden states."""
        backbone, network = self.upsampler.backbone, self.upsampler.vit_up
        size = max(self.config.student_sizes)
        side = size // backbone.patch_size * network.config.patch_grid_density
        images = [pixels(self.crops[k][None], backbone) for k in range(START_CROPS)]
        with self._autocast():
            start_as_interpolation(network, backbone, images, (size, size), (side, side))
        for name, mean in self.average.items():
            mean.copy_(self.parameters[name].detach())

    def _report(self, bar: Any, loss: float, norm: float, queries: int, seconds: float, batch: Batch) -> None:
        """Show how it goes, log it, and draw a picture now and then."""
        rate = learning_rate(self.config, self.step - 1)
        bar.update(1)
        bar.set_postfix(
            loss=f"{loss:.4f}",
            lr=f"{rate:.1e}",
            queries=f"{queries / seconds:.0f}/s",
            memory=_memory(self.device),
        )
        self._log.add(self.step, loss, norm, rate, queries / seconds)
        for picture, error in self.crops.broken.errors.items():
            self._log.broken(bar, picture.name, error)
        every = self.config.picture_every
        if every and (self.step % every == 0 or self.step == self.config.steps):
            self.draw(batch).save(self.folder / PICTURE)

    @torch.no_grad()
    def draw(self, batch: Batch) -> Any:
        """Draw the first crop of a batch: input, the teacher's features, the student's enlarged and ours."""
        size, side = self.config.student_sizes[0], self.geometry.sides[-1]
        backbone = self.upsampler.backbone
        crop = pixels(batch.crops[:1], backbone)
        density = self.upsampler.vit_up.config.patch_grid_density
        with self._autocast():
            states = backbone.hidden_states(crop, (size, size))
            fine = (size // backbone.patch_size * density,) * 2
            cache = self.upsampler.vit_up.prepare(states, backbone.patch_grid(crop, fine))
            ours = self.upsampler.vit_up.dense(cache, (side, side))[0].float()
        teacher = batch.features[self.config.teacher_sizes[-1]][-1][0].float()  # [h, h, D]
        coarse = states[-1].float().permute(0, 3, 1, 2)
        bilinear = nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0].permute(1, 2, 0)
        basis = principal_colours(teacher.reshape(-1, teacher.shape[-1]))
        shown = [
            ("input", batch.crops[0].permute(1, 2, 0).cpu().numpy()),
            (f"teacher {self.config.teacher_sizes[-1]} px", colours(teacher, basis)),
            (f"student {size} px, bilinear", colours(bilinear, basis)),
            (f"student {size} px, ViT-Up", colours(ours, basis)),
        ]
        return panels(shown, (448, 448))

    def _make_folder(self) -> None:
        """Make the folder and write the settings."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"output: {brief(self.folder, 300)} cannot be made ({error.strerror})."
            ) from error
        needed = 8 * sum(p.numel() * p.element_size() for p in self.parameters.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise expected(
                "output", f"{needed / 2**20:.0f} MiB free in {self.folder}", f"{free / 2**20:.0f} MiB"
            )
        if self.examples.cache is not None:
            self.examples.cache.check_space(len(self.examples.cache.missing()))
        self.config.write(self.folder / CONFIG)

    def _saved(self, resume: bool) -> dict[str, Any] | None:
        """Read the folder's checkpoint, and refuse it if it is another run's."""
        if not self.checkpoint.exists():
            return None
        if not resume:
            raise expected(
                "output",
                "a folder without a run",
                f"{self.checkpoint}",
                "Go on with it (--resume), or choose another folder.",
            )
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            before = TrainingConfig().changed(saved["config"])
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.checkpoint}: is no checkpoint of a run ({brief(error, 200)})."
            ) from error
        now, then = dataclasses.asdict(self.config), dataclasses.asdict(before)
        changed = [
            f"{name} {then[name]} -> {now[name]}"
            for name in now
            if name not in FREE and now[name] != then[name]
        ]
        if bool(self.config.cache) != bool(before.cache):
            changed.append("cache: its features are rounded, so with or without")
        if saved["crops"] != self.crops.digest:
            changed.append("data: other pictures")
        if changed:
            raise expected(
                "--resume", "the settings of the run", "; ".join(changed), "Choose another folder for them."
            )
        return saved

    def save(self) -> None:
        """Write the checkpoint, replacing the one before when it is whole."""
        state = {
            "config": {
                n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(self.config).items()
            },
            "crops": self.crops.digest,
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def _restore(self, saved: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        parameters = saved["parameters"]
        shapes = {name: tuple(t.shape) for name, t in parameters.items()}
        if shapes != {name: tuple(p.shape) for name, p in self.parameters.items()}:
            raise expected(str(self.checkpoint), "parameters of this network", "others")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(parameters[name])
            for name, mean in self.average.items():
                mean.copy_(saved["average"][name])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step = int(saved["step"])

    def export(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """Write the network, averaged if the run averages, and its adapters, for ``load(path)``; no backbone."""
        with self.averaged():
            self.upsampler.save_pretrained(path, include_backbone=False, dtype=dtype)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters be their moving averages inside the ``with`` block, where the run keeps these."""
        before = {name: self.parameters[name].detach().clone() for name in self.average}
        try:
            with torch.no_grad():
                for name, mean in self.average.items():
                    self.parameters[name].copy_(mean)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.parameters[name].copy_(value)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up from a hundredth, then a cosine to the final rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (0.01 + 0.99 * step / config.warmup_steps)
    passed = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = min(config.final_learning_rate, config.learning_rate)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))


class _Stop:
    """The signal that asked for an end, or zero."""

    number = 0


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Note SIGINT and SIGTERM instead of dying of them."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: FrameType | None) -> None:
        if stop.number:
            raise KeyboardInterrupt(number)  # asked twice: at once
        stop.number = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any(number: int, world: World, device: torch.device) -> int:
    """The signal that any process got."""
    if world.size == 1:
        return number
    flag = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag.item())


@contextmanager
def _bar(total: int, done: int, shown: bool) -> Iterator[Any]:
    """A progress bar over the steps."""
    tqdm = require("tqdm", "train", "showing progress").tqdm
    with tqdm(total=total, initial=done, unit="step", disable=not shown, dynamic_ncols=True) as bar:
        yield bar


def _memory(device: torch.device) -> str:
    """Memory that the process has used at most."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}GiB"
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}GiB"


class _Log:
    """One JSON line for every twenty steps; TensorBoard too, where it is installed."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.losses: list[float] = []
        self.named: set[str] = set()
        # Lines after the checkpoint that is gone on from are of steps that are made once more.
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomically(path, lambda file: file.write_text("".join(line + "\n" for line in kept)))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent), purge_step=step)
        except ImportError:
            self.board = None

    def add(self, step: int, loss: float, norm: float, rate: float, speed: float) -> None:
        """Note a step."""
        self.losses.append(loss)
        if step % LOG_EVERY:
            return
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "gradient_norm": norm,
            "learning_rate": rate,
            "queries_per_second": speed,
        }
        self.losses = []
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})
                + "\n"
            )
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def broken(self, bar: Any, name: str, error: str) -> None:
        """Name a picture that cannot be read, once."""
        if name not in self.named:
            self.named.add(name)
            bar.write(f"skipped: {error} ({len(self.named)} so far)")
