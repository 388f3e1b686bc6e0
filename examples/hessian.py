"""An application: vibrations of solid argon by a numerical Hessian, one column a task."""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallelizer import Parallelizer, SerialNonParallelizer

EPSILON = 1.654e-21  # well depth of the Lennard-Jones potential, J
SIGMA = 3.405e-10  # its diameter, m
MASS = 6.6335e-26  # of an argon atom, kg
LATTICE = 5.26 / 3.405  # lattice constant, in SIGMA
STEP = 1e-4  # displacement of an atom, in SIGMA

Array = NDArray[np.float64]


def fcc_crystal(cells: int) -> Array:
    """Place 4 * cells**3 atoms on the sites of a cube of fcc cells; shape (natoms, 3), in SIGMA."""
    corners: Array = np.array(list(np.ndindex(cells, cells, cells)), dtype=float)
    basis: Array = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    return LATTICE * (np.repeat(corners, 4, axis=0) + np.tile(basis, (cells**3, 1)))


def gradient(atoms: Array, box: float) -> Array:
    """Differentiate the energy, in EPSILON / SIGMA, of a periodic cube; shape (natoms, 3)."""
    slopes = np.empty_like(atoms)
    for i, atom in enumerate(atoms):
        pairs = atom - atoms
        pairs -= box * np.rint(pairs / box)
        r2 = np.einsum("jk,jk->j", pairs, pairs)
        r2[(r2 == 0.0) | (r2 > (box / 2 - LATTICE / 10) ** 2)] = np.inf  # cut between two shells
        r6 = 1.0 / (r2 * r2 * r2)
        slopes[i] = np.einsum("j,jk->k", 24.0 * (r6 - 2.0 * r6 * r6) / r2, pairs)
    return slopes


def hessian_column(index: int, atoms: Array, box: float) -> Array:
    """Differentiate the gradient by coordinate `index`, by central differences; (3 * natoms,)."""
    shift = np.zeros_like(atoms)
    shift.flat[index] = STEP
    return (gradient(atoms + shift, box) - gradient(atoms - shift, box)).ravel() / (2.0 * STEP)


def hessian(cells: int, parallelizer: Parallelizer) -> tuple[Any, float]:
    """Compute the columns of the Hessian, a list on main, and the seconds that it took."""
    atoms, box = fcc_crystal(cells), LATTICE * cells
    start = time.perf_counter()
    columns = parallelizer.map(hessian_column, range(atoms.size), extra_args=(atoms, box))
    return columns, time.perf_counter() - start


def main() -> None:
    """Compute the Hessian in parallel and serially; print frequency, times and speed-up."""
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
        matrix = (np.array(columns) + np.array(columns).T) / 2 * EPSILON / (MASS * SIGMA**2)
        squares = np.linalg.eigvalsh(matrix).clip(0)  # three are 0: the crystal as a whole moves
        modes = np.sqrt(squares) / (2e12 * np.pi)
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
