"""A joblib backend: what scikit-learn does with `n_jobs` is done by a parallelizer's processes.

    python examples/joblib_backend.py                     # on processes of this machine
    mpiexec -n 4 python examples/joblib_backend.py --mpi  # on the ranks of a job

To import this file registers the backend "parallelizer". Copy it, and `executor.py`, on which it
stands, beside the module. It takes joblib 1.5 or later and threadpoolctl. Main computes nothing.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import joblib.parallel as jp
from executor import ParallelizerExecutor
from threadpoolctl import threadpool_limits

from parallelizer import (
    ClientServerRunner,
    ContractError,
    MultiprocessingParallelizer,
    Parallelizer,
)


class ParallelizerBackend(jp.AutoBatchingMixin, jp.ParallelBackendBase):  # type: ignore[misc]
    """Has batches of tasks computed by the workers of an open parallelizer, `n_jobs` at a time.

    That is the given one, or the innermost open one that has workers. Without any, each `Parallel`
    opens one, by the `options`. Within a task, threads or a loop make the call; a loop does, too,
    within a `run`, and while the parallelizer serves something else, such as a generator. On an
    error or a timeout, processes that compute are killed and replaced; MPI's ranks are waited for.
    """

    supports_retrieve_callback = True  # and so generators and timeouts, which joblib sees to
    supports_inner_max_num_threads = True
    _workers: Any = None  # a ParallelizerExecutor, while a call is served

    def __init__(self, parallelizer: Parallelizer | None = None, **options: Any) -> None:
        super().__init__(**options)
        if parallelizer is not None and parallelizer.nprocs is None:
            raise ValueError(f"{parallelizer!r} is not open; open it with a 'with' statement")
        self._given = parallelizer

    def _opened(self) -> Parallelizer | None:
        found = self._given or Parallelizer.lookup(None)
        return found if found is self._given or (found.nprocs or 1) > 1 else None

    def effective_n_jobs(self, n_jobs: int | None) -> Any:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        n_jobs = 1 if n_jobs is None or self.nesting_level else n_jobs
        opened = self._opened()
        most = jp.cpu_count() if opened is None else (opened.nprocs - 1) * opened.on_main
        wanted = n_jobs if n_jobs > 0 else most + 1 + n_jobs
        return max(wanted if opened is None else min(wanted, most), 1)

    def configure(self, n_jobs: int = 1, parallel: Any = None, *_: Any, **options: Any) -> Any:
        self.parallel, self._n_jobs = parallel, self.effective_n_jobs(n_jobs)
        own = {key: options[key] for key in options if key in ("initializer", "initargs")}
        self._options = self.backend_kwargs | own
        if self._n_jobs > 1:
            with contextlib.suppress(ContractError):  # it serves something else
                self._begin()
                return self._n_jobs
        raise jp.FallbackToBackend(jp.SequentialBackend(nesting_level=self.nesting_level))

    def _begin(self) -> None:
        opened = self._opened()
        if opened is not None and self._options:
            raise TypeError(f"{opened!r} is up already, so that it takes no {[*self._options]}")
        serving = opened or MultiprocessingParallelizer(
            self._n_jobs + 1, threads_per_process=self.inner_max_num_threads, **self._options
        )
        self._workers = ParallelizerExecutor(serving, self._n_jobs)

    def submit(self, func: Any, callback: Any = None) -> Any:
        future = self._workers.submit(compute_batch, func, self.inner_max_num_threads)
        future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Any) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        with self.parallel._lock:  # so that no callback is about to submit a batch
            self._workers.shutdown(wait=False, cancel_futures=True)
        self._workers.kill_workers()
        self.terminate()
        if ensure_ready:
            self._begin()

    def terminate(self) -> None:
        if self._workers is not None:
            self._workers.shutdown()
        self._workers = None
        self.reset_batch_stats()


def compute_batch(batch: Any, threads: int | None) -> Any:
    """On a worker, where the backend is known, too, as this file is imported."""
    with threadpool_limits(threads) if threads else contextlib.nullcontext():
        return batch()


jp.register_parallel_backend("parallelizer", ParallelizerBackend)


def client(*, parallelizer: Parallelizer) -> None:
    """Print absolute values that the workers have taken."""
    with jp.parallel_config("parallelizer", parallelizer=parallelizer, n_jobs=-1):
        print(jp.Parallel()(jp.delayed(abs)(-x) for x in range(5)))


if __name__ == "__main__":
    by: Any = "mpi" if "--mpi" in sys.argv else MultiprocessingParallelizer(3)
    ClientServerRunner(client, parallelizer=by).run()
