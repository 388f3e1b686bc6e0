"""An application: vibrations of solid argon from a numerical Hessian, one column per task."""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallelizer import Parallelizer, SerialNonParallelizer

EPSILON = 1.654e-21  # well depth of the Lennard-Jones potential, J
SIGMA = 3.405e-10  # diameter in the Lennard-Jones potential, m
MASS = 6.6335e-26  # of an argon atom, kg
LATTICE = 5.26 / 3.405  # lattice constant, in SIGMA
STEP = 1e-4  # displacement of an atom, in SIGMA


def fcc_crystal(cells: int) -> NDArray[np.float64]:
    """Place 4 * cells**3 atoms on the sites of a cube of fcc cells; shape (natoms, 3), in SIGMA."""
    half_steps = np.indices((2 * cells,) * 3, dtype=np.float64).reshape(3, -1).T
    return LATTICE / 2 * half_steps.compress(half_steps.sum(axis=1) % 2 == 0, axis=0)


def gradient(atoms: NDArray[np.float64], box: float) -> NDArray[np.float64]:
    """Return the energy's gradient in a periodic cube, in EPSILON / SIGMA; shape (natoms, 3)."""
    pairs = atoms[:, np.newaxis] - atoms
    pairs -= box * np.rint(pairs / box)
    r2 = np.einsum("ijk,ijk->ij", pairs, pairs)
    r2[(r2 == 0.0) | (r2 > (box / 2 - LATTICE / 10) ** 2)] = np.inf  # cut between two shells
    r6 = 1.0 / (r2 * r2 * r2)
    slopes: NDArray[np.float64] = np.einsum("ij,ijk->ik", 24.0 * (r6 - 2.0 * r6 * r6) / r2, pairs)
    return slopes


def hessian_column(index: int, atoms: NDArray[np.float64], box: float) -> NDArray[np.float64]:
    """Return column `index`, by central differences of the gradient; shape (3 * natoms,)."""
    shift = STEP * np.eye(1, atoms.size, index).reshape(atoms.shape)
    return (gradient(atoms + shift, box) - gradient(atoms - shift, box)).ravel() / (2.0 * STEP)


def hessian(cells: int, parallelizer: Parallelizer) -> tuple[Any, float]:
    """Return the columns of the Hessian, a list on main, and the seconds that they took."""
    atoms, box = fcc_crystal(cells), LATTICE * cells
    start = time.perf_counter()
    columns = parallelizer.map(hessian_column, range(atoms.size), extra_args=(atoms, box))
    return columns, time.perf_counter() - start


def main() -> None:
    """Compute the Hessian in parallel and serially; print the frequency, times and speed-up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=4, help="fcc cells along an edge")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the spectrum, by matplotlib")
    Parallelizer.add_arguments(parser)
    arguments = parser.parse_args()
    with Parallelizer.from_arguments(arguments) as parallelizer:
        columns, seconds = parallelizer.run(hessian, arguments.cells)
        if not parallelizer.on_main:
            return
        expected, serial = SerialNonParallelizer().run(hessian, arguments.cells)
        if not np.array_equal(columns, expected):
            raise SystemExit("The parallel Hessian differs from the serial one.")
        squares = np.linalg.eigvalsh(columns).clip(0)  # three are 0: the whole crystal moves
        modes = np.sqrt(squares * EPSILON / MASS) / (2e12 * np.pi * SIGMA)
        print(f"{len(modes)} modes, the highest at {modes[-1]:.4f} THz, bit by bit as serially")
        times = f"{serial:.2f} s serially, {seconds:.2f} s on {parallelizer.nprocs} processes"
        print(f"{times}: a speed-up of {serial / seconds:.2f}")
        if arguments.plot:
            pyplot = importlib.import_module("matplotlib.pyplot")  # pip install matplotlib
            pyplot.hist(modes, bins=60)
            pyplot.xlabel("frequency of the vibrations of solid argon (THz)")
            pyplot.savefig(arguments.plot)


if __name__ == "__main__":
    main()
