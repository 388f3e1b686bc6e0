"""A `concurrent.futures.Executor` whose work is done by a parallelizer's other processes.

    python examples/executor.py                     # on processes of this machine
    mpiexec -n 4 python examples/executor.py --mpi  # on the ranks of a job, also over several hosts

What is submitted is dealt to whoever is free, also what is submitted because a result has come: so
adaptive programs need no loop of their own. Main computes nothing; give it one process more.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import itertools
import pickle
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from parallelizer import (
    ClientServerRunner,
    MultiprocessingParallelizer,
    Parallelizer,
    ParallelizerError,
    RemoteTraceback,
)

Packed = tuple[bytes, list[np.ndarray[Any, Any]]]  # a pickle, and the arrays that are apart from it
Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def pack(*content: object) -> Packed:
    """Pickle here, so that what cannot be pickled is the error of one future alone."""
    buffers: list[pickle.PickleBuffer] = []
    try:
        pickled = pickle.dumps(content, 5, buffer_callback=buffers.append)
    except Exception:
        if importlib.util.find_spec("cloudpickle") is None:  # by which closures travel, too
            raise
        buffers.clear()
        by_value = importlib.import_module("cloudpickle")
        pickled = by_value.dumps(content, 5, buffer_callback=buffers.append)
    return pickled, [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


Outcome = tuple[int, Packed | None, BaseException | None, str]


def compute(job: tuple[int, Packed]) -> Outcome:
    """On a worker: the number of a job, and its result, packed, or its exception and traceback."""
    number, (pickled, arrays) = job
    try:
        func, args, kwargs = pickle.loads(pickled, buffers=arrays)
        return number, pack(func(*args, **kwargs)), None, ""
    except BaseException as error:
        told = f"\n{traceback.format_exc()}"
        return number, None, portable(error), told


def portable(error: BaseException) -> BaseException:
    """The exception, which travels whatever its constructor takes, if what it holds does."""
    try:
        pickle.dumps((type(error), error.args, vars(error)))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error.with_traceback(None)


class Jobs:
    """What is submitted and not dealt out yet, for one stream of jobs after the other."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self.is_closed = False
        self.stream = 0

    def put(self, job: Job) -> None:
        """Append one, unless it is too late."""
        with self._changed:
            if self.is_closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting.append(job)
            self._changed.notify_all()

    def get(self, stream: int) -> Job | None:
        """The next one; None where there will be none, or where it is for a later stream."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.is_closed or self.stream != stream)
            return self._waiting.popleft() if self._waiting and self.stream == stream else None

    def begin_stream(self) -> int:
        """Let a further stream have what comes; its number."""
        with self._changed:
            self.stream += 1
            self._changed.notify_all()
            return self.stream

    def are_over(self) -> bool:
        """Whether there is none, and none will come."""
        with self._changed:
            return self.is_closed and not self._waiting

    def close(self, *, cancel: bool = False) -> None:
        """Take no more, and cancel those that wait if so told."""
        with self._changed:
            self.is_closed = True
            while cancel and self._waiting:
                self._waiting.popleft()[0].cancel()
            self._changed.notify_all()


class ParallelizerExecutor(Executor):
    """Runs jobs on the workers of a parallelizer, which is open for as long as this is.

    Where a worker dies, the futures whose jobs had been dealt out raise `BrokenProcessPool`, caused
    by the `WorkerDied`; the worker is replaced, and all others are computed.
    """

    def __init__(self, parallelizer: Parallelizer) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(parallelizer)
            parallelizer.map(abs, ())  # starts the workers now, because a thread would forbid fork
            stack.pop_all()  # `drive` closes it
        self._jobs = Jobs()
        self._driver = threading.Thread(target=drive, args=(parallelizer, self._jobs), daemon=True)
        self._driver.start()
        weakref.finalize(self, self._jobs.close)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As that of `concurrent.futures`."""
        future: Future[Any] = Future()
        self._jobs.put((future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As that of `concurrent.futures`."""
        self._jobs.close(cancel=cancel_futures)
        if wait:
            self._driver.join()


def drive(parallelizer: Parallelizer, jobs: Jobs) -> None:
    """On a thread of its own: deal jobs out and pass on what comes back, until all is closed."""
    dealt: dict[int, Future[Any]] = {}
    numbers = itertools.count()

    def begin(job: Job) -> tuple[int, Packed] | None:
        future, *content = job
        if future.set_running_or_notify_cancel():
            try:
                packed = pack(*content)
            except Exception as error:
                future.set_exception(error)
            else:
                dealt[number := next(numbers)] = future
                return number, packed
        return None

    def deal(stream: int) -> Iterator[tuple[int, Packed]]:
        while (job := jobs.get(stream)) is not None:
            begun = begin(job)
            del job  # or it, and its result, would live until the next one comes
            if begun is not None:
                yield begun

    try:
        while not jobs.are_over():
            with break_all(dealt):
                results = parallelizer.imap_unordered(compute, deal(jobs.begin_stream()))
                for number, packed, error, told in results:
                    settle(dealt.pop(number), packed, error, told)
    finally:
        parallelizer.__exit__()


@contextlib.contextmanager
def break_all(dealt: dict[int, Future[Any]]) -> Iterator[None]:
    """Have an error of the parallelizer be that of all jobs which had been dealt out."""
    try:
        yield
    except ParallelizerError as error:
        for future in dealt.values():
            broken = BrokenProcessPool("a worker died, or was lost, when this had been dealt out")
            broken.__cause__ = error
            future.set_exception(broken)
        dealt.clear()


def settle(
    future: Future[Any], packed: Packed | None, error: BaseException | None, told: str
) -> None:
    """Give a future what its job has come to."""
    if error is not None:
        error.__cause__ = RemoteTraceback(told)
    elif packed is not None:
        try:
            (result,) = pickle.loads(packed[0], buffers=packed[1])
            future.set_result(result)
            return
        except BaseException as why:  # sys.exit, too, in what a result calls to be unpickled
            error = why
    future.set_exception(error)


def client(*, parallelizer: Parallelizer) -> None:
    """Divide some numbers, and print what the first of them have come to."""
    with ParallelizerExecutor(parallelizer) as executor:
        points = {executor.submit(divmod, x, 7): x for x in range(20)}
        done = {points[future]: future.result() for future in as_completed(points)}
    print(sorted(done.items())[:3])


if __name__ == "__main__":
    by_mpi = "--mpi" in sys.argv
    ClientServerRunner(
        client, parallelizer="mpi" if by_mpi else MultiprocessingParallelizer(3)
    ).run()
