"""A `concurrent.futures.Executor` whose work is done by a parallelizer's other processes.

    python examples/executor.py                     # on processes of this machine
    mpiexec -n 4 python examples/executor.py --mpi  # on the ranks of a job, also over several hosts

What is submitted is dealt to whoever is free, also what is submitted because a result has come: so
adaptive programs need no loop of their own. Main computes nothing; give it one process more.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import math
import pickle
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from parallelizer import (
    ClientServerRunner,
    ContractError,
    MultiprocessingParallelizer,
    Parallelizer,
    ParallelizerError,
    RemoteTraceback,
)

Packed = tuple[bytes, list[np.ndarray[Any, Any]]]  # a pickle, and the arrays that are apart from it
Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def pack(*content: object) -> Packed:
    """Pickle here, so that what cannot be pickled is the error of one future alone."""
    by_value = importlib.util.find_spec("cloudpickle") is not None  # by which closures travel, too
    if by_value and main_is_lost_to_others():
        return pickled_by("cloudpickle", content)
    try:
        return pickled_by("pickle", content)
    except Exception:
        if not by_value:
            raise
        return pickled_by("cloudpickle", content)


def pickled_by(module: str, content: object) -> Packed:
    """By the function `dumps` of that module."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = importlib.import_module(module).dumps(content, 5, buffer_callback=buffers.append)
    return pickled, [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def main_is_lost_to_others() -> bool:
    """Whether workers cannot import the main program, or a notebook's cells may have changed it."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    return name.endswith("__main__") or not Path(getattr(main, "__file__", "")).is_file()


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
    """What is submitted and has not come to its end, for one stream of jobs after the other.

    At most `most` are dealt out at a time.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._waiting: collections.deque[Job] = collections.deque()
        self._dealt: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self._why_broken: BaseException | None = None
        self._stream = 0

    def put(self, job: Job) -> None:
        """Append one, unless it is too late."""
        with self._changed:
            if self._why_broken is not None:
                raise BrokenProcessPool("the workers cannot be used") from self._why_broken
            if self._is_closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting.append(job)
            self._changed.notify_all()

    def take(self, stream: int) -> tuple[int, list[Any]] | None:
        """The next one and its number; None where there will be none for this stream any more."""
        with self._changed:
            while self._stream == stream and (self._waiting or not self._is_closed):
                if not self._waiting or len(self._dealt) >= self._most:
                    self._changed.wait()
                    continue
                future, *content = self._waiting.popleft()
                if future.set_running_or_notify_cancel():
                    self._dealt[number := next(self._numbers)] = future
                    return number, content
            return None

    def settled(self, number: int) -> Future[Any] | None:
        """The future of one that has come to its end; None where it has been broken."""
        with self._changed:
            self._changed.notify_all()
            return self._dealt.pop(number, None)

    def begin_stream(self) -> int:
        """Let a further stream have what comes; its number."""
        with self._changed:
            self._stream += 1
            self._changed.notify_all()
            return self._stream

    def are_over(self) -> bool:
        """Whether there is none, and none will come."""
        with self._changed:
            return self._is_closed and not self._waiting

    def close(self, *, cancel: bool = False) -> None:
        """Take no more, and cancel those that wait if so told."""
        dropped: list[Job] = []
        with self._changed:
            self._is_closed = True
            while cancel and self._waiting:
                dropped.append(self._waiting.popleft())
            self._changed.notify_all()
        for future, *_ in dropped:  # out of the lock, as this calls what users have added
            future.cancel()
            future.set_running_or_notify_cancel()  # or `wait` would wait for it for ever

    def break_off(self, error: BaseException) -> None:
        """Have an error be that of all which are dealt out; of all, if none is or none can be."""
        with self._changed:
            broken = list(self._dealt.values())
            self._dealt.clear()
            self._stream += 1  # for which a reader that is late takes no more
            if not broken or not isinstance(error, ParallelizerError):
                self._is_closed, self._why_broken = True, error
                waiting = (future for future, *_ in self._waiting)
                broken += [one for one in waiting if one.set_running_or_notify_cancel()]
                self._waiting.clear()
        for future in broken:
            why = BrokenProcessPool("a worker died, or was lost, before this had come to its end")
            why.__cause__ = error
            future.set_exception(why)


SERVED: weakref.WeakSet[Parallelizer] = weakref.WeakSet()  # those that work for an executor


class ParallelizerExecutor(Executor):
    """Runs jobs on the workers of a parallelizer, which is open for as long as this is.

    Where a worker dies, the futures whose jobs had been dealt out raise `BrokenProcessPool`, caused
    by the `WorkerDied`; the worker is replaced, and all others are computed. Where workers cannot
    even begin (their initializer fails, say), that holds for all futures.

    Parameters
    ----------
    parallelizer : Parallelizer
        Opened here if it is not open.
    max_workers : int, optional
        How many jobs are computed at a time; by default as many as there are workers.

    Raises
    ------
    ContractError
        Inside a run, and while the parallelizer serves another executor or an imap.
    """

    def __init__(self, parallelizer: Parallelizer, max_workers: int | None = None) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError("max_workers must be greater than 0")
        if parallelizer in SERVED or parallelizer._runs_here():
            raise ContractError(f"an executor needs {parallelizer!r} for itself, but it is busy")
        self._parallelizer, self._was_open = parallelizer, parallelizer.nprocs is not None
        with parallelizer:
            # By this thread, because a fork beside others is not safe.
            list(parallelizer.imap_unordered(compute, ()))
            parallelizer.__enter__()
        SERVED.add(parallelizer)
        self._jobs = Jobs(max_workers or math.inf)
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

    def kill_workers(self) -> None:
        """As that of a `ProcessPoolExecutor`: end this at once, whatever the workers compute.

        A parallelizer that was open before gets new ones. Ranks of MPI are waited for.
        """
        self.shutdown(wait=False, cancel_futures=True)
        if killed := isinstance(self._parallelizer, MultiprocessingParallelizer):
            self._parallelizer.terminate()
        self.shutdown()
        if killed and self._was_open:
            self._parallelizer.__enter__()


def drive(parallelizer: Parallelizer, jobs: Jobs) -> None:
    """On a thread of its own: have one stream after the other computed, until all is closed."""
    main_computes, parallelizer.main_computes = parallelizer.main_computes, False
    try:
        while not jobs.are_over():
            compute_stream(parallelizer, jobs, jobs.begin_stream())
    finally:
        parallelizer.main_computes = main_computes
        parallelizer.__exit__()
        SERVED.discard(parallelizer)


def compute_stream(parallelizer: Parallelizer, jobs: Jobs, stream: int) -> None:
    """Deal jobs out and pass on what comes back, until all is closed or there is an error."""
    try:
        results = parallelizer.imap_unordered(compute, deal(jobs, stream))
        for number, packed, error, told in results:
            settle(jobs.settled(number), packed, error, told)
    except BaseException as error:  # whatever an initializer may raise
        jobs.break_off(error)


def deal(jobs: Jobs, stream: int) -> Iterator[tuple[int, Packed]]:
    """What is sent for each job; those that cannot be sent have come to their end."""
    while (job := jobs.take(stream)) is not None:
        number, content = job
        try:
            packed = pack(*content)
        except Exception as error:
            settle(jobs.settled(number), None, error, "")
            continue
        finally:
            del job, content  # or they would live until the next one comes
        yield number, packed


def settle(
    future: Future[Any] | None, packed: Packed | None, error: BaseException | None, told: str
) -> None:
    """Give a future what its job has come to."""
    if future is None:  # broken before
        return
    if told and error is not None:
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
