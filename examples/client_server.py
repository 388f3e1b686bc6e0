"""Two roles: a client on main and servers elsewhere integrate 4 / (1 + x**2) from 0 to 1."""

from __future__ import annotations

import argparse
import math

import numpy as np

from parallelizer import ClientServerRunner, Parallelizer

SLICES = 64
POINTS = 20_000


def integrate(index: int) -> float:
    """Integrate over slice `index` of `SLICES` equal ones, by the midpoint rule."""
    width = 1.0 / SLICES
    x = (index + (np.arange(POINTS) + 0.5) / POINTS) * width
    return float(np.sum(4.0 / (1.0 + x**2)) * width / POINTS)


def driving_client(parallelizer: Parallelizer) -> float:
    """Drive the workers, which serve: only main calls `map`."""
    return math.fsum(parallelizer.map(integrate, range(SLICES)))


def client(parallelizer: Parallelizer) -> float:
    """Send each server its slices, integrate main's own, then collect all parts."""
    nprocs = parallelizer.nprocs
    for rank in range(1, nprocs):
        parallelizer.send(range(rank, SLICES, nprocs), rank)
    parts = [integrate(index) for index in range(0, SLICES, nprocs)]
    for rank in range(1, nprocs):
        parts += parallelizer.receive(rank)
    return math.fsum(parts)  # exact, so the order of the parts does not matter


def server(parallelizer: Parallelizer) -> None:
    """Integrate the slices that main asks for and send the results back."""
    parallelizer.send([integrate(index) for index in parallelizer.receive(0)], 0)


def main() -> None:
    """Run both variants on the backend named on the command line and print their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    Parallelizer.add_arguments(parser)
    with Parallelizer.from_arguments(parser.parse_args()) as parallelizer:
        driven = ClientServerRunner(driving_client, parallelizer=parallelizer).run()
        served = ClientServerRunner(client, server, parallelizer=parallelizer).run()
        if parallelizer.on_main:
            print("serving workers:     ", driven)
            print("a server of its own: ", served)


if __name__ == "__main__":
    main()
