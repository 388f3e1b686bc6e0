"""Which rank do all others wait for? A trace shows it.

The program counts primes, first in blocks of equal length, then item by item. Larger numbers take
longer, so the last block is late, and the other ranks wait for it. Items, in contrast, go to
whichever rank is free. ``--trace FILE.json`` keeps the trace, which https://ui.perfetto.dev shows,
and ``--plot FILE.png`` draws it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from parallelizer import Parallelizer

LENGTH = 1000
COLORS = {"block": "tab:green", "chunk": "tab:olive", "waiting": "tab:red"}


def count_primes(start: int) -> int:
    """Count the primes among the `LENGTH` numbers from `start` on."""
    numbers = np.arange(max(start, 2), start + LENGTH)
    divisors = np.arange(2, int(numbers[-1] ** 0.5) + 1)
    divides = (numbers[:, None] % divisors == 0) & (divisors < numbers[:, None])
    return int((~divides.any(axis=1)).sum())


def count_in_block(starts: Any) -> list[int]:
    """Count the primes after each start in a block."""
    return [count_primes(int(start)) for start in starts]


def run_job(parallelizer: Parallelizer) -> tuple[int, int] | None:
    """Count the primes below 200,000 in both ways; return both counts on main."""
    starts = range(0, 200_000, LENGTH) if parallelizer.on_main else None
    in_blocks = parallelizer.map(count_in_block, starts, vectorized=True)
    by_items = parallelizer.map(count_primes, starts)
    return (sum(in_blocks), sum(by_items)) if parallelizer.on_main else None


def draw(trace: Path, image: str) -> None:
    """Draw a trace, with a bar for each rank; in white parts, the module itself is at work."""
    pyplot = importlib.import_module("matplotlib.pyplot")  # pip install matplotlib
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    begun = min(event["ts"] for event in spans if event["name"] in COLORS)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len({event["tid"] for event in spans})))
    for name, color in COLORS.items():
        chosen = [event for event in spans if event["name"] == name]
        axes.barh(
            [event["tid"] for event in chosen],
            [event["dur"] / 1e6 for event in chosen],
            left=[(event["ts"] - begun) / 1e6 for event in chosen],
            color=color, edgecolor="white", linewidth=0.3, label=name,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="seconds", ylabel="rank", yticks=sorted({event["tid"] for event in spans}))
    axes.legend(ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(image, dpi=110)


def main() -> None:
    """Count on the backend named on the command line, and draw the trace if asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    Parallelizer.add_arguments(parser)
    parser.add_argument("--trace", metavar="FILE.json", help="keep the trace in this file")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it into this file")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Parallelizer.from_arguments(arguments) as parallelizer,
    ):
        path = Path(arguments.trace or folder, "" if arguments.trace else "trace.json")
        parallelizer.trace(path)
        found = parallelizer.run(run_job)
        if parallelizer.on_main:
            print("primes, in blocks and by items:", found)
            if arguments.plot:
                draw(path, arguments.plot)


if __name__ == "__main__":
    main()
