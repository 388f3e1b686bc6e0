"""A complete program as a class, which takes a parallelizer, a registered name, or nothing."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallelizer import Parallelizer


class SampleProgram:
    """Square numbers in parallel, then post-process them on main.

    Parameters
    ----------
    size : int
        Number of values to square.
    par : Parallelizer, str or None
        What `Parallelizer.lookup` takes: a parallelizer, a registered name or a backend's name,
        or None for the innermost open parallelizer (a serial one where none is open).
    """

    def __init__(self, size: int, par: Parallelizer | str | None = None) -> None:
        self.size = size
        self.par = par

    def initialize_data(self) -> NDArray[np.float64]:
        """Make the input, shape (size,)."""
        return np.arange(self.size, dtype=np.float64)

    def eval_parallel(self, data: Any, parallelizer: Parallelizer) -> Any:
        """Square main's `data`, shape (size,), block by block; return the squares on main."""
        block = parallelizer.scatter(data)
        return parallelizer.gather(block**2)

    @Parallelizer.main_restricted
    def run_main(self, *, parallelizer: Parallelizer) -> float:
        """Sum the square roots of the squares (main only)."""
        squares = self.eval_parallel(self.initialize_data(), parallelizer)
        return float(np.sqrt(squares).sum())

    @Parallelizer.worker_restricted
    def run_worker(self, *, parallelizer: Parallelizer) -> None:
        """Take part in `eval_parallel` (workers only)."""
        self.eval_parallel(None, parallelizer)

    def run_both(self, *, parallelizer: Parallelizer) -> Any:
        """Run this process's part; each method returns a sentinel where it does not run."""
        self.run_worker(parallelizer=parallelizer)
        return self.run_main(parallelizer=parallelizer)

    def run(self) -> Any:
        """Find the parallelizer, run on it, and return main's result."""
        par = Parallelizer.lookup(self.par)
        par.print("Running with", par, where="main")
        return par.run(self.run_both)


def main() -> None:
    """Run the program with a parallelizer, with its name, and with the open parallelizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    Parallelizer.add_arguments(parser)
    parallelizer = Parallelizer.from_arguments(parser.parse_args())
    results = [SampleProgram(1001, parallelizer).run()]
    parallelizer.register("sample")
    results.append(SampleProgram(1001, "sample").run())
    Parallelizer.unregister("sample")
    with parallelizer:
        results.append(SampleProgram(1001).run())
        parallelizer.print("Results:", *results, where="main")


if __name__ == "__main__":
    main()
