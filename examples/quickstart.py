"""First steps: broadcast a flag, scatter an array and gather the lengths of the blocks."""

from __future__ import annotations

import argparse

import numpy as np

from parallelizer import Parallelizer


def run_job(parallelizer: Parallelizer) -> list[int]:
    """Return how many of 1000 numbers each process gets.

    Returns
    -------
    list of int, shape (nprocs,)
        The block lengths in rank order, on main; a falsy sentinel on workers.
    """
    data = np.arange(1000) if parallelizer.on_main else None
    flag = parallelizer.broadcast("woop" if parallelizer.on_main else None)
    block = parallelizer.scatter(data)
    if flag != "woop":
        raise AssertionError(f"main broadcast 'woop', rank {parallelizer.id} got {flag!r}")
    lengths: list[int] = parallelizer.gather(len(block))
    return lengths


def main() -> None:
    """Run the job on the backend named on the command line and print its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    Parallelizer.add_arguments(parser)
    with Parallelizer.from_arguments(parser.parse_args()) as parallelizer:
        lengths = parallelizer.run(run_job)
        if parallelizer.on_main:
            print(lengths)


if __name__ == "__main__":
    main()
