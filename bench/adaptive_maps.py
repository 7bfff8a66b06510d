"""How near adaptive maps come to whole ones, and for how many queries, on photographs and a trained network.

``python -m vitup_fast.bench.adaptive_maps PICTURE... --model vit_up_dinov2_small --backbone-weights FILE``

The whole map of each picture is computed once, and every tolerance then answered from it by the library's own code, so
that a curve costs little more than the maps. Labels are those of linear heads, trained on the pictures' tokens to tell
clusters of them apart. Per picture one adaptive map is also computed by the network: it must be the same, and its time
beside the whole map's shows what choosing and interpolating cost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vitup_fast.bench.command import check_writable, exit_code

from vitup_fast import Upsampler, load
from vitup_fast.errors import require
from vitup_fast.evaluation.features import hidden_states
from vitup_fast.evaluation.segmentation import fit_head
from vitup_fast.images import open_image, write_atomically
from vitup_fast.network.adaptive import Refinement
from vitup_fast.network.model import check_size

TOLERANCES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
LABEL_TOLERANCES = (0.5, 1.0, 1.5, 2.0, 3.0, 6.0)
MOST = 1568  # cells at once, as on a CPU


class Row(NamedTuple):
    """One picture at one tolerance."""

    tolerance: float
    share: float
    estimate: float
    measured: float  # relative root mean square error, or share of other labels
    cosine: float = float("nan")
    percentile: float = float("nan")


def clusters(tokens: Tensor, count: int) -> Tensor:  # [N, D] -> [N]
    """Cluster tokens by k-means, from seeded starting points."""
    start = np.random.default_rng(0).permutation(len(tokens))[:count]
    centres = tokens[start]
    for _ in range(40):
        nearest = torch.cdist(tokens, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, tokens)
        counts = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return torch.cdist(tokens, centres).argmin(1)


def token_head(tokens: Sequence[Tensor], classes: int) -> tuple[Tensor, Tensor]:  # [h, w, D] each
    """Train a linear head on tokens; its classes are clusters of them, smoothed over 3 x 3 tokens as objects are."""
    flat = torch.cat([t.flatten(0, 1) for t in tokens])
    found = F.one_hot(clusters(flat, classes), classes).float()
    shares = []
    for t, labels in zip(tokens, found.split([t.shape[0] * t.shape[1] for t in tokens]), strict=True):
        maps = labels.unflatten(0, t.shape[:2]).permute(2, 0, 1)[None]
        smooth = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)[0].flatten(1).T
        shares.append(smooth)
    return fit_head(flat, torch.cat(shares))


def fill(
    whole: Tensor, refinement: Refinement, tolerance: float, by_margin: bool
) -> tuple[Tensor, float, float]:
    """Answer an adaptive map from the whole one.  # [H, W, E]"""
    answers = whole.flatten(0, 1)
    filled = torch.full_like(answers, torch.nan)
    look_up = lambda cells: [answers[cells]]  # noqa: E731
    asked, error = refinement.fill([filled], look_up, tolerance, by_margin, MOST)
    return filled.view_as(whole), asked / len(answers), error.item()


def judge_features(whole: Tensor, refinement: Refinement, tolerance: float) -> Row:
    """Compare features by cosine and by relative error."""
    filled, share, estimate = fill(whole, refinement, tolerance, False)
    cosine = torch.cat([F.cosine_similarity(a, b, dim=-1) for a, b in zip(filled, whole, strict=True)])
    error = ((filled - whole).square().mean() / whole.square().mean()).sqrt().item()
    lowest = cosine.kthvalue(max(1, round(0.01 * len(cosine)))).values.item()
    return Row(tolerance, share, estimate, error, cosine.mean().item(), lowest)


def judge_labels(scores: Tensor, refinement: Refinement, tolerance: float) -> Row:
    """Compare labels."""
    filled, share, estimate = fill(scores, refinement, tolerance, True)
    return Row(tolerance, share, estimate, (filled.argmax(-1) != scores.argmax(-1)).float().mean().item())


def table(name: str, rows: Sequence[Sequence[Row]], labels: bool) -> str:
    """Mean over pictures, with the lowest and highest in brackets, as markdown; a row for each tolerance."""

    def spread(values: Sequence[float], form: str) -> str:
        low, high = (format(f(values), form) for f in (min, max))
        return f"{sum(values) / len(values):{form}} ({low}-{high})"

    quality = ["agreement"] if labels else ["cosine", "first percentile"]
    error = ["other labels", "estimated"] if labels else ["relative error", "estimated"]
    columns = ["tolerance", "queries", *quality, *error]
    lines = [f"**{name}**", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for same in zip(*rows, strict=True):
        if labels:
            cells = [spread([1 - r.measured for r in same], ".2%")]
            cells += [spread([r.measured for r in same], ".2%"), spread([r.estimate for r in same], ".2%")]
        else:
            cells = [spread([r.cosine for r in same], ".4f"), spread([r.percentile for r in same], ".3f")]
            cells += [spread([r.measured for r in same], ".3f"), spread([r.estimate for r in same], ".3f")]
        shares = spread([r.share for r in same], ".1%")
        lines.append(f"| {same[0].tolerance:g} | {shares} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, features: Sequence[Sequence[Row]], heads: dict[str, Sequence[Sequence[Row]]]) -> None:
    """Draw cosine and agreement against queries, a thin line for each picture and a thick one for their mean."""
    matplotlib = require("matplotlib", "bench", "drawing a curve")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")

    def curves(axes: object, rows: Sequence[Sequence[Row]], lost: object, colour: str, label: str) -> None:
        for picture in rows:
            axes.plot(
                [100 * r.share for r in picture], [lost(r) for r in picture], color=colour, lw=0.6, alpha=0.4
            )
        means = [
            (sum(r.share for r in s) / len(s), sum(lost(r) for r in s) / len(s))
            for s in zip(*rows, strict=True)
        ]
        axes.plot([100 * x for x, _ in means], [y for _, y in means], "o-", color=colour, ms=4, label=label)

    curves(left, features, lambda r: 1 - r.cosine, "C0", "mean")
    curves(left, features, lambda r: 1 - r.percentile, "C1", "first percentile")
    left.set(ylabel="1 - cosine to the whole map", yscale="log", title="features")
    for i, (name, rows) in enumerate(heads.items()):
        curves(right, rows, lambda r: 100 * max(r.measured, 1e-5), f"C{i + 2}", name)
    right.set(ylabel="% of cells with another label", yscale="log", title="labels")
    for axes in (left, right):
        axes.set(xlabel="% of cells asked for", xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    plt.close(figure)


@torch.no_grad()
def measure(
    model: Upsampler, pictures: Sequence[Path], size: tuple[int, int], args: argparse.Namespace
) -> str:
    """Measure all pictures and return the report."""
    tokens = [
        hidden_states(model.backbone, open_image(path), model.hidden_layer_img_size)[-1].float().cpu()
        for path in pictures
    ]
    heads = {f"{n} classes": token_head(tokens, n) for n in args.classes}
    features: list[list[Row]] = []
    labels: dict[str, list[list[Row]]] = {name: [] for name in heads}
    times = []
    for path in pictures:
        model.set_images(open_image(path))
        start = time.perf_counter()
        whole = model.dense(size=size)[0]
        middle = time.perf_counter()
        reports = []
        adaptive = model.dense(size=size, tolerance=args.timed, report=reports.append)[0]
        end = time.perf_counter()
        refinement = Refinement(size, tuple(tokens[0].shape[:2]), whole.device)
        filled, share, _ = fill(whole, refinement, args.timed, False)
        simulated = time.perf_counter() - end
        difference = (adaptive - filled).abs().max().item()
        times.append(
            (path.stem, share, (end - middle) / (middle - start), simulated / (middle - start), difference)
        )
        del adaptive, filled
        features.append([judge_features(whole.float(), refinement, t) for t in args.tolerances])
        for name, (weight, bias) in heads.items():
            scores = F.linear(whole.float(), weight.to(whole.device), bias.to(whole.device))
            labels[name].append([judge_labels(scores, refinement, t) for t in args.label_tolerances])
        print(f"{path.stem}: done", file=sys.stderr, flush=True)
    if args.plot is not None:
        draw(args.plot, features, labels)
    parts = [table("features", features, False)]
    parts += [table(f"labels, {name}", rows, True) for name, rows in labels.items()]
    lines = [
        f"| {name} | {share:.1%} | {ratio:.1%} | {extra:.1%} | {difference:.1e} |"
        for name, share, ratio, extra, difference in times
    ]
    head = f"| tolerance {args.timed:g} | queries | time | of it choosing and interpolating | largest difference |"
    parts.append("\n".join(["**time, relative to the whole map**", "", head, "| --- " * 5 + "|", *lines]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m vitup_fast.bench.adaptive_maps", description=__doc__)
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    parser.add_argument("--model", default="vit_up_dinov2_small", help="what vitup_fast.load takes")
    parser.add_argument("--weights", help="another file of weights of the network")
    parser.add_argument("--backbone-weights", help="file of the backbone's weights")
    parser.add_argument("--size", nargs=2, type=int, default=(448, 448), metavar=("H", "W"))
    parser.add_argument("--tolerances", nargs="+", type=float, default=TOLERANCES)
    parser.add_argument("--label-tolerances", nargs="+", type=float, default=LABEL_TOLERANCES)
    parser.add_argument("--classes", nargs="+", type=int, default=(8, 20), help="of the heads")
    parser.add_argument(
        "--timed", type=float, default=0.15, help="tolerance of the maps that the network computes"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device")
    parser.add_argument("--plot", type=Path, help="PNG of the curves")
    args = parser.parse_args(argv)
    size = check_size("--size", tuple(args.size))
    if args.plot is not None:
        check_writable(args.plot, "--plot")
    model = load(
        args.model,
        args.weights,
        backbone_weights=args.backbone_weights,
        device=args.device,
        dtype=getattr(torch, args.dtype),
    )
    print(measure(model, args.pictures, size, args))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
