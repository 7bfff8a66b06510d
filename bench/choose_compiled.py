"""Say where the compiled CUDA kernels take the place of Triton's, from the measurements in ``bench/results``.

``python -m vitup_fast.bench.choose_compiled`` writes ``kernels/configs/compiled.json``, which ``impl="auto"`` reads:
per GPU, operation and dtype the widths at which ``"cuda"`` was faster than ``"triton"`` in every report with both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitup_fast.bench.command import exit_code, write_text
from vitup_fast.kernels.cuda import FASTER

from vitup_fast.errors import expected
from vitup_fast.ops.implementations import COMPILED

RESULTS = Path(__file__).parent / "results"
# Less is noise.
LEAST_GAIN = 1.02

Choice = dict[str, dict[str, dict[str, list[int]]]]


def reports_in(folder: Path) -> list[Mapping[str, Any]]:
    """Read the reports of all operations in a folder of results.

    Raises:
        InputError: a file that is not JSON.
    """
    reports = []
    for path in sorted(folder.glob("**/*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise expected(str(path), "JSON", error) from error
        reports += (
            [r for r in content if isinstance(r, dict) and "rows" in r] if isinstance(content, list) else []
        )
    return reports


def choose(reports: Iterable[Mapping[str, Any]]) -> Choice:
    """Widths at which compiled kernels were faster, by GPU, operation and dtype.

    One report in which they were not, or were too inaccurate to be timed, rules a width out.
    """
    verdicts: dict[tuple[str, str, str, int], bool] = {}
    for report in reports:
        operation = report["title"].replace(",", " ").split()[0]
        rows = {row["provider"]: row for row in report["rows"]}
        if operation not in COMPILED or not {"triton", "cuda"} <= rows.keys():
            continue
        mine, other = rows["cuda"].get("seconds"), rows["triton"].get("seconds")
        faster = mine is not None and (other is None or mine * LEAST_GAIN <= other)
        key = (report["device"], operation, report["dtype"], int(report["detail"]["D"]))
        verdicts[key] = verdicts.get(key, True) and faster
    choice: Choice = {}
    for (device, operation, dtype, width), faster in sorted(verdicts.items()):
        if faster:
            choice.setdefault(device, {}).setdefault(operation, {}).setdefault(dtype, []).append(width)
    return choice


def main(argv: Sequence[str] | None = None) -> int:
    """Write the choice; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    parser.add_argument("--output", type=Path, default=FASTER, metavar="PATH", help="default: the package's")
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        raise expected("--results", "a folder with JSON files of the benchmarks", str(options.results))
    choice = choose(reports_in(options.results))
    write_text(options.output, json.dumps(choice, indent=2) + "\n")
    for device, operations in choice.items():
        print(f"{device}: {operations}")
    if not choice:
        print("no measurement shows compiled kernels to be faster: 'auto' picks Triton's")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
