"""Work on independent items: add 1 to ten numbers, item by item and block by block."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from parallelizer import Parallelizer


def add(x: Any, increment: int) -> Any:
    """Add `increment` to `x`, which is one number, or a block of shape (n,)."""
    return x + increment


def run_job(parallelizer: Parallelizer) -> tuple[Any, Any]:
    """Map `add` over 0..9 in both ways.

    Returns
    -------
    itemwise : list of int64
        One result per item, in order. On main; a falsy sentinel on workers.
    blockwise : ndarray of int64, shape (10,)
        The blocks' results, concatenated. On main; a falsy sentinel on workers.
    """
    data = np.arange(10) if parallelizer.on_main else None
    itemwise = parallelizer.map(add, data, extra_args=(1,))
    blockwise = parallelizer.map(add, data, extra_args=(1,), vectorized=True)
    return itemwise, blockwise


def main() -> None:
    """Run the job on the backend named on the command line and print both results."""
    parser = argparse.ArgumentParser(description=__doc__)
    Parallelizer.add_arguments(parser)
    with Parallelizer.from_arguments(parser.parse_args()) as parallelizer:
        itemwise, blockwise = parallelizer.run(run_job)
        if parallelizer.on_main:
            print("itemwise: ", [int(y) for y in itemwise])
            print("blockwise:", blockwise.tolist())


if __name__ == "__main__":
    main()
