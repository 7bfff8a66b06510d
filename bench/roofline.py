"""Roofline plot of benchmark reports: what each provider reached under the roofs measured in the same runs.

``python -m vitup_fast.bench.roofline roofline.png operations.json end_to_end.json``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitup_fast.bench.command import check_writable, exit_code

from vitup_fast.errors import expected, require

MARKERS = [*"osD^vPX<>hd*", *(f"${letter}$" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")]
Report = Mapping[str, Any]


def points_of(reports: Sequence[Report]) -> list[tuple[str, str, float, float]]:
    """List title, provider, FLOP per byte and FLOP/s of all that was timed and whose traffic is known."""
    found = []
    for report in reports:
        flops, traffic = report["work"]["flops"], report["work"]["bytes"]
        for row in report["rows"]:
            if row["seconds"] is not None and flops and traffic:
                found.append((report["title"], row["provider"], flops / traffic, flops / row["seconds"]))
    return found


def draw(reports: Sequence[Report], path: Path) -> None:
    """Draw one panel per dtype and device, and write a PNG.

    Roofs are the highest peaks of the panel's reports. Intensity counts the least traffic of the task, so a point's
    distance from its roof is the whole gap, extra traffic included.

    Args:
        reports: reports of benchmarks as in their JSON files.
        path: where to write.

    Raises:
        InputError: nothing that could be drawn.
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "bench", "drawing the roofline").use("Agg")
    pyplot = require("matplotlib.pyplot", "bench", "drawing the roofline")

    panels: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        if points_of([report]):
            panels.setdefault((report["device"], report["dtype"]), []).append(report)
    if not panels:
        raise expected("reports", "at least one time of a task with known traffic", "none")
    providers = list(dict.fromkeys(p for _, p, *_ in points_of(reports)))
    titles = list(dict.fromkeys(t for t, *_ in points_of(reports)))
    colours = {p: pyplot.get_cmap("tab10")(i % 10) for i, p in enumerate(providers)}
    markers = {t: MARKERS[i % len(MARKERS)] for i, t in enumerate(titles)}
    height = max(5.0, 0.24 * (len(providers) + len(titles)) + 1.5)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.4 * len(panels) + 3.6, height), squeeze=False, layout="constrained"
    )
    for axis, ((device, dtype), part) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, part, colours, markers)
        axis.set_title(f"{device}, {dtype}", fontsize=10)
    axes[0][0].set_ylabel("TFLOP/s")
    marks = [
        pyplot.Line2D([], [], linestyle="", marker="o", color=colours[p], label=p, markersize=8)
        for p in providers
    ]
    marks += [
        pyplot.Line2D([], [], linestyle="", marker=markers[t], color="0.35", label=t, markersize=7)
        for t in titles
    ]
    figure.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        figure.savefig(temporary, format="png", dpi=130)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        pyplot.close(figure)


def _draw_panel(axis: Any, reports: Sequence[Report], colours: Mapping, markers: Mapping) -> None:
    """Draw the roofs of one panel and the points below them."""
    points = points_of(reports)
    peaks = [report["peaks"] for report in reports]
    matrix = max(peak["matrix"] for peak in peaks)
    roofs = {"copy": max(peak["copy"] for peak in peaks)}
    if any(peak.get("l2") for peak in peaks):
        roofs["L2 copy"] = max(peak["l2"] for peak in peaks if peak.get("l2"))
    ridge = matrix / min(roofs.values())
    left = min(*(x for *_, x, _ in points), ridge) / 4
    right = max(*(x for *_, x, _ in points), ridge) * 4
    axis.hlines(matrix / 1e12, matrix / max(roofs.values()), right, color="black", linewidth=1.5)
    axis.annotate(
        f"matrix product {matrix / 1e12:.3g} TFLOP/s",
        (right, matrix / 1e12),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    for (name, rate), style in zip(roofs.items(), ("-", "--"), strict=False):
        top = matrix / rate
        axis.plot([left, top], [left * rate / 1e12, matrix / 1e12], style, color="black", linewidth=1.5)
        middle = (left * top) ** 0.5
        above = rate > min(roofs.values())
        axis.annotate(
            f"{name} {rate / 1e9:.0f} GB/s",
            (middle, middle * rate / 1e12),
            xytext=(-6, 4) if above else (6, -8),
            textcoords="offset points",
            ha="right" if above else "left",
            fontsize=8,
        )
    for title, provider, intensity, rate in points:
        axis.plot(
            intensity,
            rate / 1e12,
            marker=markers[title],
            color=colours[provider],
            markersize=7,
            markeredgecolor=colours[provider] if "$" in markers[title] else "white",
            markeredgewidth=0.6,
            alpha=0.9,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(top=2 * max(matrix, *(rate for *_, rate in points)) / 1e12)
    axis.set_xlabel("FLOP per byte of least traffic")
    axis.grid(True, which="major", linewidth=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the reports of JSON files; see ``--help``.

    Raises:
        InputError: a file that no benchmark wrote, a path that cannot be written.
    """
    parser = argparse.ArgumentParser(description="Roofline plot of benchmark reports.")
    parser.add_argument("png", type=Path, help="picture to write")
    parser.add_argument("reports", type=Path, nargs="+", metavar="JSON", help="files that benchmarks wrote")
    options = parser.parse_args(argv)
    check_writable(options.png, "png")
    reports: list[Report] = []
    for path in options.reports:
        try:
            read = json.loads(path.read_text())
            points_of(read)
            reports += read
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise expected("JSON", "a file that a benchmark wrote with --json", str(path)) from error
    draw(reports, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
