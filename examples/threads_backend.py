"""A user-defined backend: threads of this process, which meet at a table.

The backend is complete. With this folder on PYTHONPATH, this command checks it:
`python -m parallelizer self-test --backend threads_backend:ThreadParallelizer`. Threads compute at
the same time in builds of Python without the global lock (3.13t, 3.14t), or while compiled code
releases it. The base classes that the backend is made of may change with a version of parallelizer.
"""

from __future__ import annotations

import collections
import math
import threading
from typing import Any

from parallelizer import Communicator, Message, Parallelizer, Parcel


class Table:
    """What all threads see: words and data of even and odd rounds, and mail."""

    def __init__(self, count: int) -> None:
        self.words = [[0] * count, [0] * count]
        self.brought = [[b""] * count, [b""] * count]
        self.mail = [collections.deque[tuple[int, Parcel]]() for _ in range(count)]
        self.changed = threading.Condition()
        self.changes = 0

    def change(self) -> None:
        """Wake all threads that wait for something."""
        with self.changed:
            self.changes += 1
            self.changed.notify_all()


class ThreadCommunicator(Communicator):
    """One thread's place at the table."""

    def __init__(self, process: int, table: Table) -> None:
        super().__init__(process, len(table.mail))
        self._table = table
        self._seen = 0  # changes that this thread has seen

    def _exchange(self, word: int, wanted: bytes) -> bool:
        self._table.words[self._round & 1][self.process] = word
        self._table.change()
        self._await_all()
        return self._words() == memoryview(wanted).cast("Q").tolist()

    def _words(self) -> list[int]:
        return list(self._table.words[self._round & 1])

    def _lay(self, *messages: Message) -> None:
        pieces, _ = self._described(messages)
        self._table.brought[self._round + 1 & 1][self.process] = b"".join(pieces)

    def _place_of(self, process: int, parity: int) -> tuple[bytes, int]:
        return self._table.brought[parity][process], 0

    def _post(self, process: int, parcel: Parcel) -> None:
        self._table.mail[process].append((self.process, parcel))
        self._table.change()

    def _progress(self, seconds: float) -> None:
        table, mail = self._table, self._table.mail[self.process]
        with table.changed:
            if not mail and table.changes == self._seen:
                table.changed.wait(None if seconds == math.inf else max(seconds, 0))
            self._seen = table.changes
        while mail:
            self._deliver(*mail.popleft())

    def wake(self) -> None:
        """Make the waiting thread look again; another thread calls this."""
        self._table.change()


class ThreadParallelizer(Parallelizer):
    """Runs on `nprocs` threads; main is the thread of the caller.

    On a worker, `lookup` and objects that hold the parallelizer find the worker's own.
    """

    _drives_workers = True
    _main: ThreadParallelizer | None = None  # on a worker's object: main's object
    _current = threading.local()  # `worker` is the object of this worker thread

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
        table = Table(self._count)
        self._comm, *others = [ThreadCommunicator(n, table) for n in range(self._count)]
        try:
            for one in others:
                thread = threading.Thread(target=self._work, args=(one,), daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # too many threads: those that have started wait, as daemons
            self._comm = None
            raise

    def _work(self, communicator: ThreadCommunicator) -> None:
        """Serve main on a worker thread, with a parallelizer of its own."""
        worker = ThreadParallelizer(self._count, timeout=self.timeout)
        worker._comm = communicator
        worker._entered = 1  # so that `with parallelizer` in a function starts nothing
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
    """Count the primes from `start` to `stop`; the work of one task."""
    return sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(max(start, 2), stop))


def main() -> None:
    """Count the primes below 20,000 on four threads."""
    with ThreadParallelizer(4) as parallelizer:
        counts = parallelizer.starmap(count_primes, [(n, n + 1000) for n in range(0, 20_000, 1000)])
        print(sum(counts), "primes;", parallelizer.stats)


if __name__ == "__main__":
    main()
