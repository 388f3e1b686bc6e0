"""A backend of one's own: threads of this process, which talk through queues.

It is complete: `python -m parallelizer self-test --backend threads_backend:ThreadParallelizer`
(with this folder on PYTHONPATH) checks it. Threads compute at the same time where Python does
without the global lock (3.13t, 3.14t), or where compiled code lets go of it.
"""

from __future__ import annotations

import collections
import contextlib
import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from parallelizer import (
    Call,
    Communicator,
    Failure,
    GatherPlan,
    Message,
    Parallelizer,
    Parcel,
    RunEnded,
)

Inbox = queue.SimpleQueue[tuple[str, int, int, Any]]  # kind, sender, stamp of the run, content


def copied(message: Message) -> Message:
    """Copy the buffers, which are the sender's own memory."""
    return Message(message.pickled, [buffer.copy() for buffer in message.buffers])


class ThreadCommunicator(Communicator):
    """Posts whole messages into the inboxes of the others."""

    def __init__(self, process: int, inboxes: Sequence[Inbox], tickets: Any) -> None:
        super().__init__(process, len(inboxes))
        self._inboxes = inboxes
        self._tickets = tickets
        # Of collectives, by sender and run; to return counts as one.
        self._arrived: dict[tuple[int, int], collections.deque[tuple[Call, Message]]]
        self._arrived = collections.defaultdict(collections.deque)
        self._commands: collections.deque[tuple[int, Message | None]] = collections.deque()
        self._in_run = False
        # Of main: the run to begin, who has not left the present one, and who has failed in it.
        self._command: Message | None = None
        self._busy: set[int] = set()
        self._failures: dict[int, BaseException] = {}
        # Of workers: the latest run that main has called off.
        self._called_off = 0

    def _post(self, process: int, kind: str, content: Any) -> None:
        self._inboxes[process].put((kind, self.process, self.stamp, content))

    def _post_control(self, process: int, content: object) -> None:
        self._post(process, "control", content)

    def _send(self, message: Message, process: int, tag: int) -> None:
        self._post(process, "send", (tag, copied(message)))

    def _progress(self, seconds: float) -> None:
        limit = None if seconds == math.inf else max(seconds, 0)
        with contextlib.suppress(queue.Empty):
            self._take(*self._inboxes[self.process].get(timeout=limit))

    def _take(self, kind: str, source: int, stamp: int, content: Any) -> None:
        if kind == "control":
            self._on_control(content)
        elif kind == "command":
            self._commands.append((stamp, content))
        elif kind == "abort":
            self._called_off = stamp
        elif kind == "send":
            self._mail[source, content[0], stamp].append(Parcel(content[1]))
        elif kind == "collective":
            self._arrived[source, stamp].append(content)
            if content[0].verb == "return" and stamp == self.stamp:
                self._busy.discard(source)
        elif stamp == self.stamp:  # else of a run that main has given up before
            self._busy.discard(source)
            if kind == "failed":
                self._failures[source] = content.exception()

    def _raise_failure(self) -> None:
        if self._failures or (self._in_run and self._called_off == self.stamp):
            raise RunEnded

    # -- collectives --------------------------------------------------------------------------

    def _tell(self, rank: int, message: Message) -> None:
        self._post(self.members[rank], "collective", (self.call, copied(message)))

    def _hear(self, rank: int) -> Message:
        process = self.members[rank]
        arrived = self._arrived[process, self.stamp]
        self._wait_until(lambda: arrived, lambda: [process])
        call, message = arrived.popleft()
        if call != self.call:
            raise self._disagreement(process, call)
        return message

    def broadcast(self, message: Message | None) -> Message:
        return self.scatter(None if message is None else [message] * self.size)

    def scatter(self, messages: Sequence[Message] | None) -> Message:
        if messages is None:
            return self._hear(0)
        for rank in range(1, self.size):
            self._tell(rank, messages[rank])
        return messages[0]

    def gather(self, message: Message, plan: GatherPlan) -> list[Message] | None:
        if self.rank > 0:
            self._tell(0, message)
            return None
        return [message, *map(self._hear, range(1, self.size))]

    def barrier(self) -> None:
        nothing = Message(b"", [])
        self.gather(nothing, GatherPlan(False))
        self.broadcast(nothing if self.rank == 0 else None)

    def open_tickets(self, count: int) -> None:
        if self.rank == 0:
            while self.take_ticket(count) is not None:
                pass
            for number in range(count):
                self._tickets.put(number)

    def take_ticket(self, count: int) -> int | None:
        with contextlib.suppress(queue.Empty):
            return int(self._tickets.get_nowait())
        return None

    # -- the life of a run --------------------------------------------------------------------

    def command(self, message: Message | None) -> None:
        self._command = message
        if message is None:
            for process in self.members[1:]:
                self._post(process, "command", None)

    def next_command(self) -> Message | None:
        self._in_run = False
        self._wait_until(lambda: self._commands, lambda: [0], "return", idle=True, watch=False)
        stamp, message = self._commands.popleft()
        self._begin(stamp)
        return message

    def _begin(self, stamp: int) -> None:
        """Forget the runs before; what a quick sibling has sent in this one already stays."""
        for letter in [key for key in self._mail if key[-1] < stamp]:
            del self._mail[letter]
        for arrival in [key for key in self._arrived if key[-1] < stamp]:
            del self._arrived[arrival]
        self.stamp, self._in_run = stamp, True

    def begin_run(self) -> None:
        super().begin_run()
        if self.process == 0:
            self._begin(self.stamp + 1)
            command, self._command = self._command, None
            assert command is not None
            self._busy = set(self.members[1:])
            for process in self._busy:
                self._post(process, "command", copied(command))

    def finish_run(self, report: bytes) -> list[bytes]:
        self.enter("return")
        reports = self.gather(Message(report, []), GatherPlan(False)) or [Message(report, [])]
        return [message.pickled for message in reports]

    def fail_run(self, error: BaseException) -> BaseException:
        if self.process > 0:
            told = isinstance(error, RunEnded)  # then main knows, and only waits for this one
            failure = None if told else Failure.of(error, self.process, len(self._inboxes))
            self._post(0, "left" if told else "failed", failure)
            return error
        if not isinstance(error, RunEnded) or not self._failures:  # it may be an outer run's
            self._failures[0] = error
        for process in self._busy:
            self._post(process, "abort", None)
        # A thread cannot be stopped: it leaves at its next verb.
        deadline = time.monotonic() + (self.timeout or math.inf)
        while self._busy and time.monotonic() < deadline:
            self._progress(deadline - time.monotonic())
        failures, self._failures = self._failures, {}
        return failures[min(failures)]


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
