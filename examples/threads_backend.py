"""A backend of one's own: threads of this process, which talk through queues.

It is complete: `python -m parallelizer self-test --backend threads_backend:ThreadParallelizer`
(with this folder on PYTHONPATH) checks it. Threads compute at the same time where Python does
without the global lock (3.13t, 3.14t), or where compiled code lets go of it.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Sequence
from typing import Any

from parallelizer import Communicator, Parallelizer, Parcel

Inbox = queue.SimpleQueue[tuple[int, Parcel]]  # each with its sender


class ThreadCommunicator(Communicator):
    """Puts parcels into the inboxes of the others, and tickets into a queue for all."""

    def __init__(self, process: int, inboxes: Sequence[Inbox], tickets: Any) -> None:
        super().__init__(process, len(inboxes))
        self._inboxes = inboxes
        self._tickets = tickets

    def _post(self, process: int, parcel: Parcel) -> None:
        self._inboxes[process].put((self.process, parcel))

    def _progress(self, seconds: float) -> None:
        wait = None if seconds == math.inf else max(seconds, 0)
        with contextlib.suppress(queue.Empty):
            while True:
                self._deliver(*self._inboxes[self.process].get(timeout=wait))
                wait = 0

    def open_tickets(self, count: int) -> None:
        if self.rank == 0:
            while self.take_ticket(count) is not None:
                pass  # left over from a map that has failed
            for number in range(count):
                self._tickets.put(number)

    def take_ticket(self, count: int) -> int | None:
        with contextlib.suppress(queue.Empty):
            return int(self._tickets.get_nowait())
        return None


class ThreadParallelizer(Parallelizer):
    """Runs on `nprocs` threads, of which the caller's is main.

    On a worker, `lookup` and objects that hold the parallelizer find the worker's own.
    """

    _drives_workers = True
    _main: ThreadParallelizer | None = None  # of a worker's object, main's
    _current = threading.local()  # in whose `worker` a worker's thread finds its object

    def __init__(self, nprocs: int = 2, *, timeout: float | None = None) -> None:
        super().__init__(timeout=timeout)
        if nprocs < 1:
            raise ValueError(f"nprocs must be a number of threads from 1, not {nprocs}")
        self._count = nprocs
        self._threads: list[threading.Thread] = []

    def _options(self) -> dict[str, Any]:
        return {"nprocs": self._count, **super()._options()}

    def _here(self) -> Parallelizer:
        main, worker = self._main or self, getattr(self._current, "worker", None)
        return worker if worker is not None and worker._main is main else main

    def _start(self) -> None:
        inboxes: list[Inbox] = [queue.SimpleQueue() for _ in range(self._count)]
        tickets: Any = queue.SimpleQueue()
        self._comm, *others = [ThreadCommunicator(n, inboxes, tickets) for n in range(self._count)]
        try:
            for one in others:
                thread = threading.Thread(target=self._work, args=(one,), daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # too many threads
            self._stop()
            raise

    def _work(self, communicator: ThreadCommunicator) -> None:
        """Be one of the workers, with a parallelizer of its own."""
        worker = ThreadParallelizer(self._count, timeout=self.timeout)
        worker._comm = communicator
        worker._entered = 1  # so that a function's `with parallelizer` starts nothing
        worker._main = self
        self._current.worker = worker
        worker.serve()

    def _stop(self) -> None:
        communicator, self._comm = self._communicator(), None
        threads, self._threads = self._threads, []
        communicator.command(None)
        for thread in threads:
            thread.join(self.timeout)


def count_primes(start: int, stop: int) -> int:
    """Work for a thread."""
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(start, 2), stop))


def main() -> None:
    """Count the primes below 20,000 on four threads."""
    with ThreadParallelizer(4) as parallelizer:
        counts = parallelizer.starmap(count_primes, [(n, n + 1000) for n in range(0, 20_000, 1000)])
        print(sum(counts), "primes;", parallelizer.stats)


if __name__ == "__main__":
    main()
