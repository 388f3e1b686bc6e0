"""The contract of `parallelizer`, written once as tests and run on every backend.

A test that takes the fixture `p`, an open parallelizer, or `fresh`, a closed one, runs on serial
and on multiprocessing with each start method. Under MPI the same tests run by way of
`test_contract_under_mpi`, which starts `mpiexec` on several numbers of ranks: each rank runs the
same tests in the same order, and the outer test checks that all of them ran and passed on each.

How to write a test: the functions that `p.run` is given ("bodies") stand at module level, so that
every start method can pickle them. A body may assert on any process. What `p.run` returns is
main's under multiprocessing and each rank's own under MPI, so it goes through `expect`, which
looks at it on main and lets the other ranks know.

Several processes share the work (`pytest_runtestloop`), so a test must not need that another has
run before it.

::

    pytest test_parallelizer.py                       everything
    pytest test_parallelizer.py -k on_spawn           one engine
    PARALLELIZER_TEST_ENGINE=mpi mpiexec -n 3 python test_parallelizer.py FOLDER -k "on_mpi and map"
"""

from __future__ import annotations

import array
import ast
import builtins
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import decimal
import faulthandler
import functools
import gc
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import operator
import os
import pickle
import py_compile
import queue
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from sys import exit as exit_bound_early
from typing import Any, ClassVar, NamedTuple, TextIO

import numpy as np

# To import pytest takes half the start of a process that the tests start, and most need none of it.
if os.environ.get("PARALLELIZER_TEST_PROGRAM"):

    class Later(types.ModuleType):
        """Imports pytest when a function uses it; what decorates tests only gives itself back."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name in ("mark", "fixture", "param"):
                return self
            if sys.modules["pytest"] is self:
                del sys.modules["pytest"]
            return getattr(importlib.import_module("pytest"), name)

        def parametrize(self, *_: object, **__: object) -> Any:
            return self

        filterwarnings = skipif = timeout = __call__ = parametrize

    sys.modules["pytest"] = Later("pytest")

import pytest

# The tests of a copy under another name see it as this one.
if copied := os.environ.get("PARALLELIZER_TEST_MODULE"):
    sys.modules["parallelizer"] = importlib.import_module(copied)

from parallelizer import (
    ClientServerRunner,
    ContractError,
    MPIParallelizer,
    MultiprocessingParallelizer,
    PackingError,
    Parallelizer,
    ParallelizerError,
    RemoteTraceback,
    RunEnded,
    SerialNonParallelizer,
    WaitTimeout,
    WorkerDied,
    WorkerError,
)

Array = np.ndarray[Any, np.dtype[Any]]
Par = Any  # a Parallelizer, given also what its annotations forbid

pytestmark = pytest.mark.filterwarnings("error")

UNDER_MPI = os.environ.get("PARALLELIZER_TEST_ENGINE") == "mpi"
MULTIPROCESSING = ["fork", "forkserver", "spawn"]
ENGINES = ["mpi"] if UNDER_MPI else ["serial", *MULTIPROCESSING]
NPROCS = 3
HERE = Path(__file__).parent
CLOUDPICKLE = importlib.util.find_spec("cloudpickle") is not None  # so that closures travel
MODULE = copied or "parallelizer"
internals: Any = sys.modules[Parallelizer.__module__]
MIB = 2**20


# ---------------------------------------------------------------------------------------------
# Fixtures: the engines, and what must hold around every test


def create(engine: str, nprocs: int = NPROCS) -> Par:
    """Make a closed parallelizer; only multiprocessing is free to choose `nprocs`."""
    if engine == "serial":
        return SerialNonParallelizer()
    if engine == "mpi":
        return MPIParallelizer()
    return MultiprocessingParallelizer(nprocs=nprocs, start_method=engine)


@pytest.fixture(scope="module", params=[pytest.param(name, id=f"on_{name}") for name in ENGINES])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def p(engine: str) -> Iterator[Par]:
    """Keep a parallelizer open for all tests on its engine."""
    with create(engine) as parallelizer:
        yield parallelizer


@pytest.fixture
def fresh(engine: str) -> Par:
    """Make a closed parallelizer of the test's own."""
    return create(engine)


@pytest.fixture(scope="session", autouse=True)
def _children_warn_strictly_and_heed_interrupts() -> Iterator[None]:
    # Who is started in the background of a shell script inherits that this signal is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "error")
        patch.setenv("PARALLELIZER_TEST_PROGRAM", "1")
        # The server of forks imports this module once, or each of its processes would.
        multiprocessing.set_forkserver_preload(["__main__", __name__])
        # Numpy's threads would otherwise wait for work at full speed as soon as it is imported.
        patch.setenv("OPENBLAS_THREAD_TIMEOUT", "4")
        # What is compiled before the tests is for all that they start (`pytest_runtestloop`).
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session")
def terminal(pytestconfig: pytest.Config) -> Iterator[TextIO]:
    """Pass on the real stderr, which pytest's capturing covers while a test runs."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        duplicate = os.dup(2)
    with os.fdopen(duplicate, "w") as stream:
        yield stream


@pytest.fixture(autouse=True)
def _deadline(request: pytest.FixtureRequest, terminal: TextIO) -> Iterator[None]:
    """End the tests with the tracebacks of all threads when one of them hangs."""
    marker = request.node.get_closest_marker("timeout")
    faulthandler.dump_traceback_later(marker.args[0] if marker else 60, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that a test leaves no process and no shared memory behind."""
    shared = request.getfixturevalue("p") if "p" in request.fixturenames else None
    processes, memory = descendants(), shared_memory()
    yield
    # A test may make the shared pool replace its workers, so they are counted, not compared.
    replaced = (shared.nprocs or 1) - 1 if isinstance(shared, MultiprocessingParallelizer) else 0
    left = descendants()
    assert len(left) <= max(len(processes), replaced), f"processes left: {left - processes}"
    # Other programs make and unlink files there, too; what is left is what stays.
    appeared = shared_memory() - memory
    deadline = time.monotonic() + 10
    while appeared and time.monotonic() < deadline:
        time.sleep(0.01)
        appeared &= shared_memory()
    assert not appeared, f"left in /dev/shm: {appeared}"


def descendants() -> set[int]:
    """Find the pids of all descendants, multiprocessing's own two helpers excepted."""
    found = set()
    for pid in children_of(os.getpid()):
        if pid in HELPERS:
            continue
        if not is_helper(pid):
            found.add(pid)
        found |= set(descend(pid))
    return found | {child.pid for child in multiprocessing.active_children() if child.pid}


def descend(pid: int) -> Iterator[int]:
    for child in children_of(pid):
        yield child
        yield from descend(child)


def children_of(pid: int) -> list[int]:
    """List the children of a process as Linux tells them; nothing elsewhere."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def is_helper(pid: int) -> bool:
    """Tell the forkserver and the resource tracker, which live as long as the interpreter."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        helpers = (b"multiprocessing.forkserver import", b"multiprocessing.resource_tracker import")
        return any(helper in command for helper in helpers)
    return False


def shared_memory() -> set[str]:
    """List the files in shared memory that this module or multiprocessing could have made."""
    folder, ours = Path("/dev/shm"), ("parallelizer", "psm_", "pym-", "sem.mp-")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names if name.startswith(ours)}


# ---------------------------------------------------------------------------------------------
# Who runs which test

# Pytest takes this module for a plugin, too, and so asks it how the tests are to be run.
pytest_plugins = __name__

HELPERS: set[int] = set()  # their pids


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Have processes help: a test is run by who takes it first, and they begin with the last ones.

    Those are the tests under MPI, which take long. pytest-xdist cannot do this: in each of its
    processes a thread waits for tests, and a process with threads must not fork, as many tests do.
    """
    options = session.config.option
    if options.collectonly or session.testsfailed:
        return None  # pytest's own loop
    # Else each search for garbage, in all processes, would look through what is there already.
    gc.freeze()
    if UNDER_MPI:
        return None
    # The tests start a thousand interpreters, which need not compile these two.
    for source in (__file__, str(sys.modules[MODULE].__file__)):
        py_compile.compile(source)
    seen = options.usepdb or options.capture == "no"
    if seen or len(session.items) < 200:
        return None
    # Where all make their temporary folders is settled here, before there are several processes.
    taken: Path = session.config._tmp_path_factory.mktemp("taken")  # type: ignore[attr-defined]
    with contextlib.ExitStack() as at_end:
        # One more process than CPUs, as tests also wait.
        count = internals._available_cpus()
        pipes = [start_helper(session, taken, at_end) for _ in range(count)]
        others = Others(session, pipes)
        session.config.pluginmanager.register(others)
        run_tests(session, untaken(session.items, taken))
        others.wait()
    return True


def untaken(items: Sequence[pytest.Item], taken: Path, step: int = 1) -> Iterator[pytest.Item]:
    """Take one after the other, forwards or backwards, that no other process has taken."""
    for number in range(len(items))[::step]:
        with contextlib.suppress(FileExistsError):
            (taken / str(number)).touch(exist_ok=False)
            yield items[number]


def run_tests(session: pytest.Session, items: Iterator[pytest.Item]) -> None:
    item = next(items, None)
    while item is not None:
        following = next(items, None)  # the fixtures that it needs, too, stay
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following


def start_helper(session: pytest.Session, taken: Path, at_end: contextlib.ExitStack) -> Any:
    """Fork a process, which does not return from here; the pipe by which its reports come."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    if pid := os.fork():
        HELPERS.add(pid)
        at_end.callback(HELPERS.remove, pid)
        at_end.callback(os.waitpid, pid, 0)
        at_end.callback(os.kill, pid, signal.SIGKILL)
        sender.close()
        return receiver
    try:
        receiver.close()
        capture = session.config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # into files that are the first process's, too
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        capture.start_global_capturing()
        session.config.pluginmanager.register(Helper(session.config, sender))
        run_tests(session, untaken(session.items, taken, -1))
    finally:
        os._exit(0)


class Helper:
    """A pytest plugin that passes on what has become of this process's tests."""

    def __init__(self, config: pytest.Config, pipe: Any) -> None:
        self.config, self.pipe = config, pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook
        data = hook.pytest_report_to_serializable(config=self.config, report=report)
        self.pipe.send(data)


class Others:
    """A pytest plugin that reports what has become of the helpers' tests."""

    def __init__(self, session: pytest.Session, pipes: Sequence[Any]) -> None:
        self.config, self.pipes = session.config, pipes
        self.unreported = {item.nodeid: item for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            del self.unreported[report.nodeid]

    def pytest_runtest_logfinish(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(EOFError):
                while pipe.poll():
                    self.report(pipe.recv())

    def wait(self) -> None:
        """Report all the rest, those tests as failed that a helper has taken and not ended."""
        for pipe in self.pipes:
            with contextlib.suppress(EOFError):
                while True:
                    self.report(pipe.recv())
        for item in self.unreported.values():
            told = "the process that took this test has ended, and said nothing of it"
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", told, "call")
            self.config.hook.pytest_runtest_logreport(report=report)

    def report(self, data: Any) -> None:
        hook = self.config.hook
        report = hook.pytest_report_from_serializable(config=self.config, data=data)
        hook.pytest_runtest_logreport(report=report)


# ---------------------------------------------------------------------------------------------
# Helpers: bitwise comparison, and checks that hold on every rank


def difference(found: Any, wanted: Any, where: str = "result") -> str:
    """Say where `found` differs from `wanted` in type or in any bit; empty where it does not."""
    if type(found) is type(wanted):
        if isinstance(wanted, np.ndarray):
            return array_difference(found, wanted, where)
        if dataclasses.is_dataclass(wanted):
            return difference(vars(found), vars(wanted), where)
        if isinstance(wanted, dict):
            return difference([*found.items()], [*wanted.items()], where)
        if isinstance(wanted, list | tuple) and len(found) == len(wanted):
            parts = enumerate(zip(found, wanted, strict=True))
            return next(filter(None, (difference(*part, f"{where}[{i}]") for i, part in parts)), "")
        if repr(found) == repr(wanted):  # which tells NaN from a number and -0.0 from 0.0
            return ""
    return f"{where} is {found!r:.200} and not {wanted!r:.200}"


def array_difference(found: Any, wanted: Any, where: str) -> str:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{where} is {found.dtype}{found.shape} and not {wanted.dtype}{wanted.shape}"
    if isinstance(wanted, np.ma.MaskedArray):
        return difference((found.data, found.mask), (wanted.data, wanted.mask), where)
    if wanted.dtype.names is not None:  # field by field: padding holds no value
        fields = (difference(found[n], wanted[n], f"{where}[{n!r}]") for n in wanted.dtype.names)
        return next(filter(None, fields), "")
    if wanted.dtype.hasobject:
        return difference(found.tolist(), wanted.tolist(), where)
    return "" if found.tobytes() == wanted.tobytes() else f"{where} differs in its values"


def check(found: object, wanted: object, where: str = "result") -> None:
    problem = difference(found, wanted, where)
    assert not problem, problem


def overwrite(found: object, where: str = "result") -> None:
    """Write to an array (anything else is passed over), which must not disturb anybody else's."""
    if isinstance(found, np.ndarray):
        assert found.flags.writeable, f"{where} is read-only"
        found[...] = np.zeros((), found.dtype)


def expect(p: Par, result: object, wanted: object) -> None:
    """Assert on main that `result` is what it should be; the MPI ranks share the verdict."""
    problem = difference(result, wanted) if p.on_main else ""
    if UNDER_MPI:
        problem = importlib.import_module("mpi4py.MPI").COMM_WORLD.bcast(problem)
    assert not problem, problem


def caught_from(call: Callable[..., Any], *args: Any) -> Exception | None:
    """Call, and pass on what was raised on this process; under MPI not all need raise it."""
    try:
        call(*args)
    except Exception as error:
        return error
    return None


def failure(p: Par, body: Callable[..., Any], *args: Any, **options: Any) -> Exception:
    """Run a `body` that must fail, and pass on what `run` raised on this process."""
    try:
        result = p.run(body, *args, **options)
    except Exception as error:
        return error
    raise AssertionError(f"run returned {result!r} and raised nothing")


def expect_failure(
    p: Par, kind: type[Exception], body: Callable[..., Any], *args: Any, **options: Any
) -> str:
    """Check the type of what `body` raises, and that `p` works afterwards; return the text."""
    error = failure(p, body, *args, **options)
    expect(p, f"{type(error)}: {error}" * (not isinstance(error, kind)), "")
    expect_to_work(p)
    return str(error)


def expect_to_work(p: Par) -> None:
    with p:
        expect(p, p.run(roll_call), (list(range(p.nprocs)), sum(range(100))))


def roll_call(*, parallelizer: Par) -> Any:
    block = parallelizer.scatter(np.arange(100) if parallelizer.on_main else None)
    total = parallelizer.allreduce(int(block.sum()))
    return parallelizer.allgather(parallelizer.id), total


def drive(p: Par, client: Callable[..., Any], *args: Any) -> Any:
    """Call `client` on main alone, with the workers serving."""
    return ClientServerRunner(functools.partial(client, *args), parallelizer=p).run()


def spmd(p: Par, body: Callable[..., Any], *args: Any) -> Any:
    """Call `body` on every process."""
    return p.run(body, *args)


def block_of(data: Any, rank: int, nprocs: int) -> Any:
    """Slice out the block that the contract gives to `rank`."""
    size, longer = divmod(len(data), nprocs)
    start = rank * size + min(rank, longer)
    return data[start : start + size + (rank < longer)]


def joined(parts: list[Any]) -> Array:
    """Concatenate arrays, empty ones left out; of one dtype, it keeps the order of bytes."""
    parts = [part for part in parts if len(part)] or parts
    if len({part.dtype for part in parts}) > 1:
        return np.concatenate(parts)
    whole: Array = np.ndarray((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    rows = itertools.accumulate(map(len, parts))
    for end, part in zip(rows, parts, strict=True):
        whole[end - len(part) : end] = part
    return whole


def in_worker(value: object) -> bool:
    return value is Parallelizer.InWorkerProcess


class JobError(Exception):
    """An exception with arguments and attributes of its own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code
        self.detail = {"rank": code}


# ---------------------------------------------------------------------------------------------
# Roles and life


def role(*, parallelizer: Par) -> Any:
    assert parallelizer.on_main is (parallelizer.id == 0)
    name, number = type(parallelizer).__name__, parallelizer.nprocs
    assert repr(parallelizer) == f"{name}(id={parallelizer.id}, nprocs={number})"
    return parallelizer.allgather((parallelizer.id, parallelizer.nprocs))


def process_ids(*, parallelizer: Par) -> Any:
    return parallelizer.allgather(os.getpid())


def test_roles(p: Par) -> None:
    expect(p, p.run(role), [(rank, p.nprocs) for rank in range(p.nprocs)])
    pids = p.run(process_ids)
    assert len(set(pids)) == p.nprocs
    expect(p, pids[0], os.getpid())


def test_a_serial_parallelizer_is_always_up() -> None:
    p = SerialNonParallelizer()
    assert (p.id, p.nprocs, p.on_main) == (0, 1, True)
    assert repr(p) == "SerialNonParallelizer(id=0, nprocs=1)"
    assert p.run(role) == [(0, 1)]


@pytest.mark.parametrize("start_method", MULTIPROCESSING)
def test_a_pool_has_no_role_while_it_is_not_up(start_method: str) -> None:
    p = MultiprocessingParallelizer(nprocs=2, start_method=start_method)
    closed = "MultiprocessingParallelizer(id=None, nprocs=None)"
    for _ in range(2):
        assert (p.id, p.nprocs, repr(p)) == (None, None, closed)
        with p:
            assert (p.id, p.nprocs) == (0, 2)
            assert repr(p) == "MultiprocessingParallelizer(id=0, nprocs=2)"
    assert (p.id, p.nprocs, repr(p)) == (None, None, closed)
    assert p.run(role) == [(0, 2), (1, 2)]
    assert repr(p) == closed


INHERITED: list[int] = []


def inherited(*, parallelizer: Par) -> Any:
    return parallelizer.gather((bool(INHERITED), os.getppid()))


@pytest.mark.parametrize("start_method", MULTIPROCESSING)
def test_the_start_method_is_the_one_asked_for(start_method: str) -> None:
    INHERITED.append(1)
    try:
        found = MultiprocessingParallelizer(nprocs=2, start_method=start_method).run(inherited)
    finally:
        INHERITED.clear()
    assert found[1][0] is (start_method == "fork")
    assert (found[1][1] == os.getpid()) is (start_method != "forkserver")


def test_with_keeps_the_processes(fresh: Par) -> None:
    with fresh as opened:
        assert opened is fresh
        pids = fresh.run(process_ids)
        with fresh:
            expect(fresh, fresh.run(process_ids), pids)
        expect(fresh, fresh.run(process_ids), pids)
        expect(fresh, fresh.apply(process_ids), pids)


def test_with_makes_the_default(p: Par, fresh: Par) -> None:
    assert Parallelizer.lookup(None) is p
    with fresh:
        assert Parallelizer.lookup() is fresh
        with SerialNonParallelizer() as inner:
            assert Parallelizer.lookup(None) is inner
            with fresh:
                assert Parallelizer.lookup(None) is fresh
            assert Parallelizer.lookup(None) is inner
        assert Parallelizer.lookup(None) is fresh
    assert Parallelizer.lookup(None) is p


def leave_by_an_exception(p: Par) -> None:
    with p:
        p.run(role)
        raise KeyError("mine")


def test_with_ends_by_an_exception(fresh: Par) -> None:
    with pytest.raises(KeyError, match="mine"):
        leave_by_an_exception(fresh)
    assert Parallelizer.lookup(None) is not fresh
    assert fresh.id is None or not isinstance(fresh, MultiprocessingParallelizer)
    expect_to_work(fresh)


def test_run_opens_the_parallelizer_itself(fresh: Par) -> None:
    first, second = (set(fresh.run(process_ids)) for _ in range(2))
    assert len(first) == len(second)
    if isinstance(fresh, MultiprocessingParallelizer):
        assert fresh.id is None
        assert first & second == {os.getpid()}


def arguments(*args: Any, parallelizer: Par, **options: Any) -> Any:
    return parallelizer.allgather((args, options))


def test_run_passes_arguments(p: Par) -> None:
    result = p.run(arguments, 1, [2.5], word="yes", main_kwargs={"only": "main"})
    everywhere = ((1, [2.5]), {"word": "yes"})
    on_main = ((1, [2.5]), {"word": "yes", "only": "main"})
    expect(p, result, [on_main] + [everywhere] * (p.nprocs - 1))


def own_id(*, parallelizer: Par) -> Any:
    return parallelizer.id


def test_run_returns_the_result_of_main_or_of_the_rank(p: Par) -> None:
    assert p.run(own_id) == p.id


SUBSETS: dict[str, Callable[[int], set[int]]] = {
    "main": lambda n: {0} & set(range(n)),
    "both ends": lambda n: {0, n - 1},
    "all but the last": lambda n: {0, *range(n - 1)},
    "all": lambda n: set(range(n)),
}


@pytest.mark.parametrize("kind", SUBSETS)
def test_run_on_a_subset(p: Par, kind: str) -> None:
    members = sorted(SUBSETS[kind](p.nprocs))
    pids = p.run(process_ids)
    result = p.run(subset, len(members), comm=members)
    if p.id in members:
        check(result, ([pids[rank] for rank in members], list(range(len(members))), [0, 1, 4]))
    else:
        assert in_worker(result)
    expect_to_work(p)


def subset(nprocs: int, *, parallelizer: Par) -> Any:
    assert parallelizer.nprocs == nprocs
    squares = parallelizer.map(square, range(3))
    squares = parallelizer.broadcast(squares)
    return parallelizer.allgather(os.getpid()), parallelizer.allgather(parallelizer.id), squares


def square(x: Any) -> Any:
    return x * x


if UNDER_MPI:

    def test_run_on_a_communicator_of_ones_own(p: Par) -> None:
        world = importlib.import_module("mpi4py.MPI").COMM_WORLD
        half = world.Split(world.rank % 2)
        own = MPIParallelizer(half)
        with own:
            assert (own.id, own.nprocs) == (half.rank, half.size)
            check(own.run(roll_call), (list(range(half.size)), sum(range(100))))
        # More of them than MPI has communicators.
        for _ in range(2500):
            assert MPIParallelizer(half).id == half.rank
        expect_to_work(p)


def nested(*, parallelizer: Par) -> Any:
    own = parallelizer.run(own_id)
    assert own == parallelizer.id
    everywhere = parallelizer.run(arguments, 1, key=2, main_kwargs={"only": 3})
    members = sorted({0, parallelizer.nprocs - 1})
    inner = parallelizer.run(role, comm=members)
    if parallelizer.id not in members:
        assert in_worker(inner)
        inner = None
    assert Parallelizer.lookup(None) is parallelizer
    return everywhere, parallelizer.allgather(inner), parallelizer.run(role)


def test_a_nested_run_is_a_plain_call(p: Par) -> None:
    n = p.nprocs
    calls = [((1,), {"key": 2, "only": 3})] + [((1,), {"key": 2})] * (n - 1)
    members = sorted({0, n - 1})
    roles = [(rank, len(members)) for rank in range(len(members))]
    inner = [roles if rank in members else None for rank in range(n)]
    expect(p, p.run(nested), (calls, inner, [(rank, n) for rank in range(n)]))
    assert repr(p) == f"{type(p).__name__}(id={p.id}, nprocs={n})"


def sevens(*, parallelizer: Par) -> Any:
    data = np.arange(1000) if parallelizer.on_main else None
    flag = parallelizer.broadcast("woop" if parallelizer.on_main else None)
    block = parallelizer.scatter(data)
    assert flag == "woop"
    return parallelizer.gather(len(block))


def test_quickstart(p: Par) -> None:
    expect(p, p.run(sevens), [len(block_of(range(1000), r, p.nprocs)) for r in range(p.nprocs)])


def test_quickstart_on_other_numbers_of_processes() -> None:
    assert SerialNonParallelizer().run(sevens) == [1000]
    for nprocs, lengths in {15: [67] * 10 + [66] * 5, 2: [500, 500], 1: [1000]}.items():
        assert MultiprocessingParallelizer(nprocs, start_method="fork").run(sevens) == lengths


# ---------------------------------------------------------------------------------------------
# Messages: arrays of every dtype in every layout, bitwise


DTYPES = {
    "bool": np.dtype("?"),
    **{code: np.dtype(code) for code in ["i1", "u2", "i4", "i8", "u8", "f2", "f4", "f8", "g"]},
    **{code: np.dtype(code) for code in ["F", "D", "M8[ns]", "M8[D]", "m8[s]", "U5", "S4", "O"]},
    **{f"{code} swapped": np.dtype(f">{code}") for code in ["i4", "f8", "c16", "U3"]},
    **{code: np.dtype(code) for code in ["V7", "V0"]},
    "U0": np.dtype([("nothing", "U0"), ("n", "i2")])["nothing"],
    "no fields": np.dtype([]),
    "packed": np.dtype([("a", "i1"), ("b", ">f8"), ("c", "U2")]),
    "padded": np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True),
    "nested": np.dtype([("a", "f4", (2, 3)), ("b", [("c", "M8[us]"), ("d", "S0")])]),
    "with objects": np.dtype([("o", "O"), ("n", "i4")]),
}
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "C": lambda a: a,
    "F": np.asfortranarray,
    "1-d": lambda a: a[:, 0, 0],
    "strided": lambda a: a[::2, 1::2],
    "reversed": lambda a: a[::-1, :, ::-1],
    "transposed": lambda a: a.transpose(1, 2, 0),
    "repeated": lambda a: np.broadcast_to(a[0, 0], (5, *a.shape[2:])),
    "one row": lambda a: a[3:4],
    "no rows": lambda a: a[:0],
    "no columns": lambda a: a[:, :0],
    "read-only": lambda a: read_only(a.copy()),
    "0-d": lambda a: a[1, 1, 1, ...],
}


@dataclasses.dataclass
class Holder:
    """A dataclass with an array in it."""

    array: Array
    label: str


def read_only(a: Array) -> Array:
    a.flags.writeable = False
    return a


THINGS = [None, "text", 2**70, (1.5, b"x"), {"k": [1]}]


def values(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int = 0) -> Array:
    """Fill an array with any bits that its dtype takes, the same on every process."""
    made: Array = np.ndarray(shape, dtype)
    rng = np.random.default_rng([seed, *shape])
    if dtype.names is not None:
        for name in dtype.names:
            made[name] = values(made[name].dtype, made[name].shape, seed + 1)
    elif dtype.kind == "O":
        made.flat[:] = [THINGS[i % len(THINGS)] for i in range(made.size)]
    elif dtype.itemsize == 0:
        pass  # no bits to choose; and numpy 1.26 writes beyond such an array
    elif dtype.kind in "US":
        words = np.array(["", "a", "\u00e9t\u00e9", "\U0001f600z", "longer than it"])
        made.flat[:] = words[rng.integers(0, 5 if dtype.kind == "U" else 2, made.size)]
    elif dtype.kind == "b":
        made.flat[:] = rng.integers(0, 2, made.size)
    else:
        made.flat[:] = np.frombuffer(rng.bytes(made.nbytes), dtype)
    return made


def every_layout(dtype: str, *, rank: int = 0) -> dict[str, Array]:
    return {name: lay(values(DTYPES[dtype], (7, 4, 3), rank)) for name, lay in LAYOUTS.items()}


def broadcasts(dtype: str, *, parallelizer: Par) -> None:
    junk = threading.Lock()  # what workers pass is ignored, whatever it is
    for name, one in every_layout(dtype).items():
        found = parallelizer.broadcast(one if parallelizer.on_main else junk)
        check(found, one, name)
        if not parallelizer.on_main:
            overwrite(found, name)
    many: Any = every_layout(dtype)
    many = {"dict": many, "list": [*many.values()], "class": Holder(many["strided"], "yes")}
    found = parallelizer.broadcast(many if parallelizer.on_main else None)
    check(found, many)
    if not parallelizer.on_main:
        for one in [*found["list"], *found["dict"].values(), found["class"].array]:
            overwrite(one)


def scatters(dtype: str, *, parallelizer: Par) -> None:
    for name, one in every_layout(dtype).items():
        if one.ndim:
            found = parallelizer.scatter(one if parallelizer.on_main else None)
            wanted = block_of(every_layout(dtype)[name], parallelizer.id, parallelizer.nprocs)
            check(found, wanted, name)
            overwrite(found, name)
    many = [Holder(one, name) for name, one in every_layout(dtype).items()]
    found = parallelizer.scatter(many if parallelizer.on_main else None)
    check(found, block_of(many, parallelizer.id, parallelizer.nprocs))


def gathers(dtype: str, *, parallelizer: Par) -> None:
    everyone = [every_layout(dtype, rank=rank) for rank in range(parallelizer.nprocs)]
    for name, one in everyone[parallelizer.id].items():
        found = parallelizer.gather(one)
        if parallelizer.on_main:
            parts = [arrays[name] for arrays in everyone]
            check(found, joined(parts) if one.ndim else parts, name)
            if parallelizer.nprocs > 1:
                overwrite(found, name)
        else:
            assert in_worker(found)
    found = parallelizer.gather({"nested": [Holder(everyone[parallelizer.id]["C"], "x")]})
    if parallelizer.on_main:
        check(found, [{"nested": [Holder(arrays["C"], "x")]} for arrays in everyone])


def allgathers(dtype: str, *, parallelizer: Par) -> None:
    everyone = [every_layout(dtype, rank=rank) for rank in range(parallelizer.nprocs)]
    for name, one in everyone[parallelizer.id].items():
        found = parallelizer.allgather(one)
        parts = [arrays[name] for arrays in everyone]
        check(found, joined(parts) if one.ndim else parts, name)
        if parallelizer.nprocs > 1:
            overwrite(found, name)
    check(parallelizer.allgather(everyone[parallelizer.id]), everyone)


def sends(dtype: str, *, parallelizer: Par) -> None:
    left = (parallelizer.id - 1) % parallelizer.nprocs
    right = (parallelizer.id + 1) % parallelizer.nprocs
    mine, theirs = (every_layout(dtype, rank=rank) for rank in (parallelizer.id, left))
    for name, one in mine.items():
        parallelizer.send(one, right)
        found = parallelizer.receive(left)
        check(found, theirs[name], name)
        if parallelizer.nprocs > 1:
            overwrite(found, name)
    nested = [Holder(one, name) for name, one in mine.items()]
    parallelizer.send({"many": nested}, right, tag=3)
    found = parallelizer.receive(left, tag=3)
    check(found, {"many": [Holder(one, name) for name, one in theirs.items()]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verb", [broadcasts, scatters, gathers, allgathers, sends])
def test_arrays_arrive_bitwise(p: Par, verb: Callable[..., None], dtype: str) -> None:
    p.run(verb, dtype)


def subclasses(*, parallelizer: Par) -> None:
    records = values(DTYPES["padded"], (9,)).view(np.recarray)
    masked = np.ma.MaskedArray(np.arange(9.0), mask=[True, False, False] * 3)
    for one in (records, masked):
        given = one if parallelizer.on_main else None
        check(parallelizer.broadcast(given), one)
        check(parallelizer.scatter(given), block_of(one, parallelizer.id, parallelizer.nprocs))


def test_array_subclasses_stay_what_they_are(p: Par) -> None:
    p.run(subclasses)


# Sizes around those at which a transport may change its way: pipe, ring, slot, several slots.
PART_SIZES = (5000, 0, 4097, 1, 65_536, 65_535, 0, 30_000, MIB + 1, 4096, 200_000, 9000, 0, 0)


def moves_many_parts(repeats: int, *, parallelizer: Par) -> Any:
    def parts(seed: int) -> list[np.ndarray[Any, Any]]:
        sizes = PART_SIZES * repeats
        return [np.arange(seed + i, seed + i + n).astype("u1") for i, n in enumerate(sizes)]

    def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(map(np.array_equal, a, b))

    here, size = parallelizer.id, parallelizer.nprocs
    found = parallelizer.broadcast(parts(0) if here == 0 else None)
    right = [same(found, parts(0)), all(part.flags.writeable for part in found)]
    gathered = parallelizer.gather(parts(here), concatenate=False)
    right += [same(g, parts(i)) for i, g in enumerate(gathered)] if here == 0 else []
    mine = parallelizer.scatter([parts(i) for i in range(size)] if here == 0 else None)
    right.append(same(mine[0], parts(here)))
    if here == size - 1:
        parallelizer.send(parts(7), 0)
    if here == 0:
        right.append(same(parallelizer.receive(size - 1), parts(7)))
    return parallelizer.allreduce(all(right), "min")


@pytest.mark.parametrize("repeats", [1, 7])
def test_objects_of_many_buffers_of_all_sizes(p: Par, repeats: int) -> None:
    expect(p, p.run(moves_many_parts, repeats), True)


SIZES = [size + by for size in (4096, 64 * 1024, MIB, 2 * MIB, 4 * MIB) for by in (-1, 0, 1)]
SIZES += [0, 1, 10 * MIB + 7]


def stamped(size: int, rank: int) -> Array:
    """Make `size` bytes that differ from rank to rank and from place to place."""
    pattern = np.random.default_rng(rank).integers(0, 256, 4099, np.uint8)  # no power of two
    return np.resize(pattern, size)


def from_every_rank_to_every_rank(*, parallelizer: Par) -> None:
    everyone = range(parallelizer.nprocs)
    for size in SIZES:
        mine = stamped(size, parallelizer.id)
        for rank in everyone:
            parallelizer.send(mine, rank, tag=1)
        received = [parallelizer.receive(rank, tag=1) for rank in everyone]
        check(received, [stamped(size, rank) for rank in everyone], f"{size} bytes")


def as_bytes(*, parallelizer: Par) -> None:
    left = (parallelizer.id - 1) % parallelizer.nprocs
    for size in SIZES:
        for kind in (bytes, bytearray):
            parallelizer.send(
                kind(stamped(size, parallelizer.id)), (parallelizer.id + 1) % parallelizer.nprocs
            )
            check(parallelizer.receive(left) == kind(stamped(size, left)), True, f"{size} bytes")


def collectively(*, parallelizer: Par) -> None:
    """Keep every array to the end, so that none shares its memory with a later message."""
    kept: list[tuple[Array, Array]] = []
    everyone = range(parallelizer.nprocs)
    for size in SIZES:
        one = stamped(size, 0)
        given = one if parallelizer.on_main else None
        kept.append((parallelizer.broadcast(given), one))
        kept.append((parallelizer.scatter(given), block_of(one, parallelizer.id, len(everyone))))
        both = np.concatenate([stamped(size, rank) for rank in everyone])
        kept.append((parallelizer.allgather(stamped(size, parallelizer.id)), both))
        gathered = parallelizer.gather(stamped(size, parallelizer.id))
        if parallelizer.on_main:
            kept.append((gathered, both))
    for found, wanted in kept:
        check(found, wanted, f"{wanted.size} bytes")


def with_heads_of_all_lengths(*, parallelizer: Par) -> None:
    """What announces an array grows byte by byte, past all that a card or a cell has room for."""
    here, everyone = parallelizer.id, range(parallelizer.nprocs)
    arrays = [stamped(8192, rank) for rank in everyone]
    for length in range(0, 520, 1 if UNDER_MPI else 13):
        name = "x" * length
        parts = [(name, one) for one in arrays]
        found = parallelizer.allgather(parts[here], concatenate=False)
        check(found, parts, f"allgather, {length}")
        found = parallelizer.alltoall([parts[here]] * len(everyone))
        check(found, parts, f"alltoall, {length}")
        check(parallelizer.scatter(parts), [parts[here]], f"scatter, {length}")
        check(parallelizer.broadcast(parts[0]), parts[0], f"broadcast, {length}")


@pytest.mark.parametrize(
    "body",
    [from_every_rank_to_every_rank, as_bytes, collectively, with_heads_of_all_lengths],
)
def test_sizes(p: Par, body: Callable[..., None]) -> None:
    p.run(body)


# ---------------------------------------------------------------------------------------------
# Messages: broadcast, scatter, gather


def copies(*, parallelizer: Par) -> Any:
    mine: Any = [np.zeros(300_000), {"list": [1]}, bytearray(3)]
    mine = parallelizer.broadcast(mine if parallelizer.on_main else None)
    mine[0][:] = mine[2][0] = parallelizer.id
    mine[1]["list"].append(parallelizer.id)
    parallelizer.wait()
    assert set(mine[0]) == {parallelizer.id}
    return parallelizer.gather((mine[1]["list"], mine[2][0]))


def test_broadcast_gives_everyone_a_copy_of_its_own(p: Par) -> None:
    expect(p, p.run(copies), [([1, rank], rank) for rank in range(p.nprocs)])


OBJECTS: list[Any] = [
    None,
    True,
    0,
    -(2**80),
    1.5,
    float("nan"),
    1j,
    "",
    "\u00e9",
    b"\x00",
    (),
    [],
    {},
    set(),
]


def objects(*, parallelizer: Par) -> None:
    for one in [*OBJECTS, OBJECTS, np.float32(1.5), np.str_("x"), np.datetime64("2020-01-01"), int]:
        check(parallelizer.broadcast(one if parallelizer.on_main else "ignored"), one)
        found = parallelizer.gather(one)
        if parallelizer.on_main:
            check(found, [one] * parallelizer.nprocs)
        check(parallelizer.allgather(one), [one] * parallelizer.nprocs)
        parallelizer.send(one, parallelizer.id)
        check(parallelizer.receive(parallelizer.id), one)


def test_any_object_travels(p: Par) -> None:
    p.run(objects)


SEQUENCES: dict[str, Callable[[int], Any]] = {
    "list": lambda n: list(range(n)),
    "list of objects": lambda n: [{"i": i} for i in range(n)],
    "tuple": lambda n: tuple(range(n)),
    "str": lambda n: "abcdefg" * n,
    "bytes": lambda n: b"abcdefg" * n,
    "range": lambda n: range(0, 3 * n, 3),
    "user's own": lambda n: collections.UserList("x" * n),
    "array.array": lambda n: array.array("d", range(n)),
    "iterator": lambda n: iter(range(n)),
    "generator": lambda n: (str(i) for i in range(n)),
    "zip": lambda n: zip(range(n), range(n), strict=True),
}


def splits(kind: str, *, parallelizer: Par) -> None:
    for length in (0, 1, 2, parallelizer.nprocs - 1, parallelizer.nprocs + 1, 10, 1000):
        data, same = SEQUENCES[kind](length), SEQUENCES[kind](length)
        found = parallelizer.scatter(data if parallelizer.on_main else "ignored")
        split = list(same) if isinstance(same, Iterator) else same
        check(found, block_of(split, parallelizer.id, parallelizer.nprocs), f"{length}")


@pytest.mark.parametrize("kind", SEQUENCES)
def test_scatter_slices_any_sequence(p: Par, kind: str) -> None:
    p.run(splits, kind)


class NotByRows:
    """It has a length, but cannot be sliced, as a sparse matrix of blocks."""

    shape = 3, 3

    def __len__(self) -> int:
        return 3

    def __getitem__(self, _: slice) -> Any:
        raise NotImplementedError


NOT_TO_BE_SPLIT: dict[str, Any] = {
    "an int": 5,
    "a float": 2.5,
    "None": None,
    "a dict": {"a": 1},
    "a 0-d array": np.array(3.0),
    "a numpy scalar": np.float64(1.0),
    "an object": object,
    "an object that has no slices": NotByRows(),
}


def refuses_to_scatter(kind: str, *, parallelizer: Par) -> Any:
    for _ in range(2):
        with pytest.raises(TypeError):
            parallelizer.scatter(NOT_TO_BE_SPLIT[kind] if parallelizer.on_main else [1])
    return parallelizer.allgather(parallelizer.id)


def scatters_badly(kind: str, *, parallelizer: Par) -> None:
    parallelizer.scatter(NOT_TO_BE_SPLIT[kind] if parallelizer.on_main else None)


@pytest.mark.parametrize("kind", NOT_TO_BE_SPLIT)
def test_what_cannot_be_split_is_refused_everywhere(p: Par, kind: str) -> None:
    expect(p, p.run(refuses_to_scatter, kind), list(range(p.nprocs)))
    expect_failure(p, TypeError, scatters_badly, kind)


# What `n` ranks gather. Fitting arrays are concatenated, the others come back as a list.
FITTING: dict[str, Callable[[int], list[Any]]] = {
    "arrays": lambda n: [np.arange(3) + r for r in range(n)],
    "several lengths": lambda n: [np.full((r + 1, 2), r, "f4") for r in range(n)],
    "arrays of objects": lambda n: [np.array([None, r, "x"], object) for r in range(n)],
    "empty arrays": lambda n: [np.empty((0, 4), "i2")] * n,
    "an empty one last": lambda n: [*[np.ones((2, 3), "f4")] * (n - 1), np.ones((0, 3), "f4")],
    "an empty one first": lambda n: [np.ones((0, 3), "f4"), *[np.ones((2, 3), "f4")] * (n - 1)],
    "an alien empty one last": lambda n: [*[np.ones((2, 3), "i2")] * (n - 1), np.array([])],
    "an alien empty one first": lambda n: [np.array([]), *[np.ones((2, 3), "i2")] * (n - 1)],
    "precisions": lambda n: [np.ones(3, "f4"), *[np.zeros(3, "f8")] * (n - 1)],
    "kinds of numbers": lambda n: [np.ones(3, "?ifD"[r % 4]) for r in range(n)],
    "byte orders": lambda n: [np.ones(3, "<i4"), *[np.zeros(3, ">i4")] * (n - 1)],
    "units": lambda n: [np.ones(3, "m8[s]"), *[np.ones(3, "m8[ms]")] * (n - 1)],
    "lengths of text": lambda n: [np.array(["x" * (r + 1)]) for r in range(n)],
    "fields": lambda n: [np.ones(2, [("a", "if"[r % 2]), ("b", "i1")]) for r in range(n)],
    "objects and numbers": lambda n: [np.ones(2, object), *[np.zeros(2)] * (n - 1)],
}
UNFIT: dict[str, Callable[[int], list[Any]]] = {
    "numbers": lambda n: [r + 0.5 for r in range(n)],
    "numpy scalars": lambda n: [np.int16(r) for r in range(n)],
    "0-d arrays": lambda n: [np.array(r) for r in range(n)],
    "lists": lambda n: [[r] * r for r in range(n)],
    "strings": lambda n: ["x" * r for r in range(n)],
    "dicts of arrays": lambda n: [{"a": np.arange(r)} for r in range(n)],
    "nothing": lambda n: [None] * n,
}
# On one process there is only the first array, which fits.
DISAGREEING: dict[str, Callable[[int], list[Any]]] = {
    "dtypes of different kinds": lambda n: [np.zeros(3, "M8[s]"), *[np.zeros(3)] * (n - 1)],
    "trailing shapes": lambda n: [np.zeros((2, 3)), *[np.zeros((2, 4))] * (n - 1)],
    "numbers of axes": lambda n: [np.zeros(2), *[np.zeros((2, 1))] * (n - 1)],
    "arrays and lists": lambda n: [np.zeros(2), *[[0.0]] * (n - 1)],
    "arrays and None": lambda n: [np.zeros(2), *[None] * (n - 1)],
    "arrays and 0-d arrays": lambda n: [np.zeros(2), *[np.zeros(())] * (n - 1)],
}
GATHERED = FITTING | UNFIT | DISAGREEING


def gathers_by_rule(kind: str, *, parallelizer: Par) -> None:
    parts = GATHERED[kind](parallelizer.nprocs)
    mine = parts[parallelizer.id]
    fit = kind in FITTING or (kind in DISAGREEING and parallelizer.nprocs == 1)
    wanted = joined(parts) if fit else parts
    results = [parallelizer.gather(mine), parallelizer.gather(mine, concatenate=False)]
    if fit:
        results.append(parallelizer.gather(mine, concatenate=True))
    if parallelizer.on_main:
        check(results, [wanted, parts, wanted][: len(results)])
    else:
        assert all(in_worker(result) for result in results)
    check(parallelizer.allgather(mine), wanted)


@pytest.mark.parametrize("kind", GATHERED)
def test_gather_concatenates_arrays_that_agree(p: Par, kind: str) -> None:
    p.run(gathers_by_rule, kind)


def gathers_as_array(kind: str, *, parallelizer: Par) -> None:
    parallelizer.gather(GATHERED[kind](parallelizer.nprocs)[parallelizer.id], concatenate=True)


@pytest.mark.parametrize("kind", UNFIT | DISAGREEING)
def test_gather_fails_where_nothing_can_be_concatenated(p: Par, kind: str) -> None:
    if kind in DISAGREEING and p.nprocs == 1:
        p.run(gathers_as_array, kind)
    else:
        error = failure(p, gathers_as_array, kind)
        expect(p, isinstance(error, ValueError | TypeError), True)
    expect_to_work(p)


# ---------------------------------------------------------------------------------------------
# Messages: reduce, allreduce


def in_brackets(a: Any, b: Any) -> str:
    return f"({a} {b})"


def minus(a: Any, b: Any) -> Any:
    return a - b


def smallest(a: Any, b: Any) -> Any:
    return np.minimum(a, b) if isinstance(a, np.ndarray) else min(a, b)


def greatest(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, np.ndarray) else max(a, b)


OPS: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "sum": ("sum", operator.add),
    "prod": ("prod", operator.mul),
    "min": ("min", smallest),
    "max": ("max", greatest),
    "a function": (minus, minus),
    "not associative": (in_brackets, in_brackets),
}
REDUCED: dict[str, Callable[[int], Any]] = {
    "int": lambda r: 2 * r + 1,
    "big int": lambda r: 2**70 + r,
    "float": lambda r: 0.1 * 3.0 ** (-1) ** r / (r + 1),
    "numpy scalar": lambda r: np.float32(0.1 * (r + 1)),
    "array": lambda r: np.random.default_rng(r).standard_normal((50, 3)),
    "integer array": lambda r: (np.arange(5) * (r + 1)).astype("i2"),
    "big array": lambda r: np.random.default_rng(r).standard_normal(200_000),
    "empty array": lambda r: np.full((0, 2), r),
}


def reduces(op: str, kind: str, *, parallelizer: Par) -> None:
    verb, step = OPS[op]
    make = REDUCED[kind]
    mine = make(parallelizer.id)
    wanted = functools.reduce(step, map(make, range(parallelizer.nprocs)))
    everywhere = parallelizer.allreduce(mine, verb) if op != "sum" else parallelizer.allreduce(mine)
    check(everywhere, wanted)
    on_main = parallelizer.reduce(mine, op=verb)
    if parallelizer.on_main:
        check(on_main, wanted)
    else:
        assert in_worker(on_main)
    check(mine, make(parallelizer.id), "what was passed")
    if parallelizer.nprocs > 1:
        overwrite(everywhere)
    parallelizer.wait()
    check(parallelizer.allreduce(mine, verb), wanted)


@pytest.mark.parametrize("kind", REDUCED)
@pytest.mark.parametrize("op", OPS)
def test_reduce_folds_in_rank_order(p: Par, op: str, kind: str) -> None:
    p.run(reduces, op, kind)


NUMBERS = "?bhiqBHIQefdgFDG"  # the kinds of numpy, by their letters


def numbers_of_all_kinds(letter: str, size: int, rank: int) -> Array:
    """Of floats, a quarter are what numbers seldom are: zeros of both signs, NaN, infinity."""
    draw = np.random.default_rng([rank, size])
    if letter in "?bhiqBHIQ":
        return draw.integers(0, 2 if letter == "?" else 100, size).astype(letter)
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324])
    values = draw.standard_normal((2, size))
    chosen = draw.integers(0, 4, values.shape) == 0
    values[chosen] = draw.choice(special, chosen.sum())
    numbers: Array = values[0] + 1j * values[1] if letter in "FDG" else values[0]
    return numbers.astype(letter)


def bits(array: Array) -> Array:
    """The bytes of an array, without those between long doubles that nobody sets.

    All NaN count as the same: which of two gives a sum its sign depends in numpy 1 on where in
    memory they lie.
    """
    parts = np.array(array).reshape(-1)
    if parts.dtype.kind in "fc":
        parts = parts.view(parts.real.dtype)
        parts[np.isnan(parts)] = np.nan
    whole = parts.view(np.uint8)
    is_padded = array.dtype.char in "gG" and np.finfo("g").nmant == 63
    return whole.reshape(-1, 16)[:, :10] if is_padded else whole


def folds_numbers(op: str, size: int, layout: str, *, parallelizer: Par) -> None:
    p = parallelizer
    fold = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op]
    with np.errstate(all="ignore"):
        for letter in NUMBERS if size < 10**6 else "d":

            def own(rank: int, letter: str = letter) -> Array:
                flat = numbers_of_all_kinds(letter, size, rank)
                return {
                    "flat": flat,
                    "strided": np.repeat(flat, 2)[::2],
                    "rows": flat[: size // 3 * 3].reshape(-1, 3),
                    "columns": flat[: size // 3 * 3].reshape(-1, 3).T,
                }[layout]

            # Each as it is sent: numpy gives NaN other signs where arrays are strided.
            sent = [np.array(own(rank), order="A") for rank in range(p.nprocs)]
            wanted = functools.reduce(fold, sent)
            found = [p.allreduce(own(p.id), op), p.reduce(own(p.id), op)]
            for one in found[: 1 + p.on_main]:
                assert type(one) is np.ndarray
                assert (one.dtype, one.shape) == (wanted.dtype, wanted.shape)
                assert one.flags.writeable
                assert one.flags.c_contiguous == wanted.flags.c_contiguous
                assert np.array_equal(bits(one), bits(wanted)), letter


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, "flat"), (130, "flat"), (5000, "strided"), (20_001, "rows"), (20_001, "columns"),
     (1_300_001, "flat")],
)  # fmt: skip
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
def test_arrays_of_numbers_are_folded_as_by_one_process(
    p: Par, op: str, size: int, layout: str
) -> None:
    """Bit by bit, signs of zero among them, in whatever segments they are folded."""
    p.run(folds_numbers, op, size, layout)


def overflows_on_some(size: int, *, parallelizer: Par) -> Any:
    p = parallelizer
    data = np.ones(size)
    data[[size // 3, -1]] = 1e308
    told = []
    with np.errstate(over="raise"):
        for verb in (p.allreduce, p.reduce):
            with pytest.raises(FloatingPointError, match="overflow encountered in multiply"):
                verb(data, "prod")
            told.append(p.allreduce(1))
    return told


@pytest.mark.parametrize("size", [3, 5000, 700_000])
def test_an_overflow_that_numpy_is_to_raise(p: Par, size: int) -> None:
    """It is raised on all ranks, whoever has folded that segment, and all are in step."""
    if p.nprocs > 1:
        expect(p, p.run(overflows_on_some, size), [p.nprocs] * 2)


def memory_of_verbs(size: int, *, parallelizer: Par) -> dict[str, int]:
    """MiB that each verb takes beside what is passed and what comes of it, at its peak."""
    p, n = parallelizer, parallelizer.nprocs
    whole, part = np.ones(size), np.ones(size // n)
    used = {}
    calls: dict[str, tuple[Callable[[], Any], bool]] = {
        "broadcast": (lambda: p.broadcast(whole), not p.on_main),
        "scatter": (lambda: p.scatter(whole), not p.on_main),
        "gather": (lambda: p.gather(part), p.on_main),
        "allgather": (lambda: p.allgather(part), True),
        "reduce": (lambda: p.reduce(whole), p.on_main),
        "allreduce": (lambda: p.allreduce(whole), True),
    }
    for name, (call, receives) in calls.items():
        p.wait()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, result = most_resident(), call()
        received = result.nbytes if receives else 0
        used[name] = (most_resident() - before - received) // MIB
    return used


def most_resident() -> int:
    """Count the bytes of memory that this process has held at its peak."""
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def test_verbs_need_no_memory_beside_the_arrays(p: Par) -> None:
    """What comes is written to its place, and what goes is read where it lies."""
    for used in p.run(gathers_memory_of_verbs, 8 * MIB):
        assert all(megabytes < 16 for megabytes in used.values()), used


def gathers_memory_of_verbs(size: int, *, parallelizer: Par) -> Any:
    return parallelizer.allgather(memory_of_verbs(size, parallelizer=parallelizer))


def reduces_objects(*, parallelizer: Par) -> Any:
    words = parallelizer.allreduce([str(parallelizer.id)], "sum")
    assert parallelizer.allreduce("ab"[parallelizer.id % 2], "max") == "ab"[parallelizer.nprocs > 1]
    return words


def test_reduce_takes_any_object(p: Par) -> None:
    expect(p, p.run(reduces_objects), [str(rank) for rank in range(p.nprocs)])


def refuses_to_fold(a: Any, b: Any) -> Any:
    raise KeyError(a, b)


def folds_into_a_failure(*, parallelizer: Par) -> None:
    parallelizer.allreduce(parallelizer.id, refuses_to_fold)


def test_an_op_that_fails(p: Par) -> None:
    if p.nprocs == 1:
        p.run(folds_into_a_failure)
    else:
        expect_failure(p, KeyError, folds_into_a_failure)


def survives_a_failed_fold(size: int, *, parallelizer: Par) -> Any:
    data = np.full(size, parallelizer.id)
    if parallelizer.nprocs > 1:
        with pytest.raises(KeyError):
            parallelizer.allreduce(data, refuses_to_fold)
        with pytest.raises(KeyError):
            parallelizer.reduce(data, refuses_to_fold)
    return parallelizer.allreduce(parallelizer.id)


@pytest.mark.parametrize("size", [0, 10, 2 * MIB])
def test_a_failed_fold_can_be_caught(p: Par, size: int) -> None:
    expect(p, p.run(survives_a_failed_fold, size), sum(range(p.nprocs)))


def folds_badly_beside_a_failure(*, parallelizer: Par) -> None:
    """Rank 1 fails while main folds its value, and rank 2 has most of its own still to send."""
    main_folds = Path(parallelizer.broadcast(f"{tempfile.gettempdir()}/fold-{os.getpid()}"))

    def refuses(a: Any, b: Any) -> Any:
        main_folds.touch()
        time.sleep(0.2)
        raise KeyError(a, b)

    parallelizer.reduce(np.zeros(4 * MIB if parallelizer.id == 2 else 1), refuses)
    if parallelizer.id == 1:
        while not main_folds.exists():
            time.sleep(0.01)
        main_folds.unlink()
        raise ValueError("rank 1")


def test_an_op_that_fails_beside_another_rank(p: Par) -> None:
    if p.nprocs > 2:
        expect_failure(p, KeyError, folds_badly_beside_a_failure)


def raises_what_cannot_be_formatted(failing: int, *, parallelizer: Par) -> None:
    if parallelizer.id == failing:
        whose_text_is_no_text: Any = ("page.html", 3, 2, 123)
        raise SyntaxError("bad template", whose_text_is_no_text)
    parallelizer.wait()


@pytest.mark.parametrize("failing", [0, 2])
def test_an_exception_that_cannot_be_formatted(p: Par, failing: int) -> None:
    rank = min(failing, p.nprocs - 1)
    assert "bad template" in expect_failure(p, SyntaxError, raises_what_cannot_be_formatted, rank)


def naps_unless_on(main: int, _: int) -> None:
    time.sleep(0 if os.getpid() == main else 5)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_interrupts_an_imap_is_what_it_raises(method: str) -> None:
    with create(method, 2) as par:
        alarm = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 1)
        try:
            with pytest.raises(KeyboardInterrupt):
                list(par.imap(functools.partial(naps_unless_on, os.getpid()), range(3)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        expect_to_work(par)


def with_a_ctrl_c(main: int, value: int) -> int:
    if os.getpid() == main:
        signal.raise_signal(signal.SIGINT)
    return value


class InterruptsMain(NamedTuple):
    """Becomes its value where it is unpacked, which interrupts main."""

    main: int
    value: int

    def __reduce__(self) -> Any:
        return with_a_ctrl_c, (self.main, self.value)


def interrupts_main_once(value: int, main: int) -> Any:
    return value or InterruptsMain(main, value)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_ctrl_c_between_results_ends_an_imap(method: str) -> None:
    """Even while somebody holds the traceback; and of the results that had come, none is lost."""
    with MultiprocessingParallelizer(2, start_method=method, main_computes=False) as par:
        results = par.imap(interrupts_main_once, range(20), 3, (os.getpid(),))
        with pytest.raises(KeyboardInterrupt) as held:
            next(results)
        expect_to_work(par)
        assert list(results) == [0, 1, 2]
        del held


def memory_of_a_reduction(verb: str, *, parallelizer: Par) -> Any:
    data = np.ones(MIB)
    if parallelizer.on_main:
        tracemalloc.start()
    try:
        getattr(parallelizer, verb)(data)
        return tracemalloc.get_traced_memory()[1] / data.nbytes if parallelizer.on_main else 0
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("verb", ["reduce", "allreduce"])
def test_a_reduction_holds_few_values_at_once(engine: str, verb: str) -> None:
    """Namely what is folded already, the next value, and what becomes of the two."""
    par = create(engine, 5)
    peak = par.run(memory_of_a_reduction, verb)
    expect(par, par.on_main and peak > 3.5, False)


UNLIKE: dict[str, tuple[Any, Any]] = {
    "blocks": (np.ones(2), np.ones(1)),
    "an empty block": (np.ones(1), np.ones(0)),
    "a row": (np.ones((2, 3)), np.ones(3)),
    "an array and a number": (np.ones(2), 1.0),
    "a number and an array": (1, np.ones(2)),
    "a list and an array": ([1.0, 2.0], np.ones(2)),
    "numpy's scalar and an array": (np.float32(1), np.ones(1)),
}


def reduces_unlike(op: str, kind: str, *, parallelizer: Par) -> Any:
    mine = UNLIKE[kind][parallelizer.id > 0]
    for verb in (parallelizer.reduce, parallelizer.allreduce):
        with pytest.raises(ValueError, match=r"rank 0 has .* rank 1 has "):
            verb(mine, op)
    return parallelizer.allreduce(mine, lambda a, b: np.size(a) + np.size(b))


@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
@pytest.mark.parametrize("kind", UNLIKE)
def test_values_of_unlike_shape_are_refused_on_every_rank(p: Par, op: str, kind: str) -> None:
    if p.nprocs > 1:
        error = caught_from(p.run, reduces_unlike, op, kind)
        expect(p, str(error), "None")


NOT_NUMBERS: dict[str, list[Any]] = {
    "float": [0.5, float("nan"), -1.0],
    "float32": [np.float32(0.5), np.float32("nan"), np.float32(-1)],
    "float and float64": [np.float64(0.5), float("nan"), -1.0],
    "datetime64": [np.datetime64(day, "D") for day in (3, "NaT", 1)],
    "array": [np.array([0.5, 1]), np.array([float("nan"), 2]), np.array([-1.0, 3])],
}


def reduces_not_numbers(kind: str, *, parallelizer: Par) -> None:
    for op, place in itertools.product(["min", "max"], range(parallelizer.nprocs)):
        mine = NOT_NUMBERS[kind][1 if parallelizer.id == place else 2 * (parallelizer.id % 2)]
        found = parallelizer.allreduce(mine, op)
        check(type(found), type(mine) if kind != "float and float64" else float)
        assert np.ravel(found)[0] != np.ravel(found)[0], f"{op} of NaN on rank {place} is {found}"


@pytest.mark.parametrize("kind", NOT_NUMBERS)
def test_what_is_no_number_wins_wherever_it_is(p: Par, kind: str) -> None:
    p.run(reduces_not_numbers, kind)


def reduces_badly(op: Any, *, parallelizer: Par) -> None:
    parallelizer.reduce(1, op)


@pytest.mark.parametrize("op", ["nonsense", 3, None])
def test_an_unknown_op_is_refused(p: Par, op: Any) -> None:
    error = failure(p, reduces_badly, op)
    expect(p, isinstance(error, ValueError | TypeError | LookupError), True)
    expect_to_work(p)


# ---------------------------------------------------------------------------------------------
# Messages: send, receive, wait


def keeps_the_order(*, parallelizer: Par) -> None:
    everyone = range(parallelizer.nprocs)
    for number in range(5):
        for rank in everyone:
            for tag in (0, 7):
                parallelizer.send((parallelizer.id, tag, number), rank, tag=tag)
    for tag in (7, 0):
        for rank in reversed(everyone):
            found = [parallelizer.receive(rank, tag=tag) for _ in range(5)]
            check(found, [(rank, tag, number) for number in range(5)])


def takes_tags_in_any_order(*, parallelizer: Par) -> None:
    right = (parallelizer.id + 1) % parallelizer.nprocs
    left = (parallelizer.id - 1) % parallelizer.nprocs
    for tag in (1, 2, 3, 1):
        parallelizer.send(np.full(3, tag), right, tag)
    for tag in (3, 1, 1, 2):
        check(parallelizer.receive(left, tag), np.full(3, tag))


def mixes_with_collectives(*, parallelizer: Par) -> None:
    right = (parallelizer.id + 1) % parallelizer.nprocs
    left = (parallelizer.id - 1) % parallelizer.nprocs
    parallelizer.send(("first", parallelizer.id), right)
    parallelizer.wait()
    assert parallelizer.broadcast(5 if parallelizer.on_main else None) == 5
    parallelizer.send(("second", parallelizer.id), right)
    assert parallelizer.allgather(parallelizer.id) == list(range(parallelizer.nprocs))
    check([parallelizer.receive(left) for _ in "12"], [("first", left), ("second", left)])


def large_ring(*, parallelizer: Par) -> None:
    right = (parallelizer.id + 1) % parallelizer.nprocs
    left = (parallelizer.id - 1) % parallelizer.nprocs
    for size in (3 * MIB + 1, 20 * MIB):
        parallelizer.send(stamped(size, parallelizer.id), right)
        check(parallelizer.receive(left), stamped(size, left))


def to_main_and_back(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        for rank in reversed(range(1, parallelizer.nprocs)):
            parallelizer.send(parallelizer.receive(rank) * 2, rank)
    else:
        parallelizer.send(np.arange(100_000) + parallelizer.id, 0)
        check(parallelizer.receive(0), (np.arange(100_000) + parallelizer.id) * 2)


@pytest.mark.parametrize(
    "body",
    [
        keeps_the_order,
        takes_tags_in_any_order,
        mixes_with_collectives,
        large_ring,
        to_main_and_back,
    ],
)
def test_messages_between_two(p: Par, body: Callable[..., None]) -> None:
    p.run(body)


def talks_to_nobody(verb: str, rank: int, *, parallelizer: Par) -> None:
    if verb == "send":
        parallelizer.send(1, rank)
    else:
        parallelizer.receive(rank)


@pytest.mark.parametrize("rank", [-1, 99])
@pytest.mark.parametrize("verb", ["send", "receive"])
def test_a_rank_that_is_not_there(p: Par, verb: str, rank: int) -> None:
    error = failure(p, talks_to_nobody, verb, rank)
    expect(p, isinstance(error, ValueError | LookupError), True)
    expect_to_work(p)


COLLECTIVES: dict[str, Callable[[Par, Array], object]] = {
    "wait": lambda par, _: par.wait(),
    "broadcast": lambda par, given: par.broadcast(given),
    "scatter": lambda par, given: par.scatter(given),
    "gather": lambda par, given: par.gather(given),
    "allgather": lambda par, given: par.allgather(given),
    "alltoall": lambda par, given: par.alltoall([given] * par.nprocs),
    "reduce": lambda par, given: par.reduce(given),
    "allreduce": lambda par, given: par.allreduce(given),
    "reduce with a function": lambda par, given: par.reduce(given, np.add),
    "share": lambda par, given: par.share(given),
}


def comes_late(verb: str, size: int, *, parallelizer: Par) -> Any:
    """When each process came to a verb and left it, with each of them the last to come."""
    given, found = np.ones(size), []
    for last in range(parallelizer.nprocs):
        parallelizer.wait()
        time.sleep(0.02 * (parallelizer.id == last))
        came = time.monotonic()
        COLLECTIVES[verb](parallelizer, given)
        found.append((came, time.monotonic()))
    return parallelizer.allgather(found, concatenate=False)


@pytest.mark.parametrize("size", [1, 3 * MIB // 8])
@pytest.mark.parametrize("verb", COLLECTIVES)
def test_a_collective_lets_nobody_go_before_all_have_come(p: Par, verb: str, size: int) -> None:
    for times in zip(*p.run(comes_late, verb, size), strict=True):
        came, went = zip(*times, strict=True)
        assert max(came) <= min(went)


def cpu_seconds(*, parallelizer: Par) -> Any:
    return parallelizer.allgather(time.process_time())


def receives_from(par: Par, sender: int) -> None:
    for rank in range(par.nprocs):
        if par.id == sender:
            par.send("mail", rank)
    par.receive(sender)


WAITED_FOR: dict[str, Callable[[Par, int], object]] = {
    "in a verb": lambda par, _: par.gather(0),
    "for mail": receives_from,
    "in a map": lambda par, _: par.map(abs, range(20)),
}


def sleeps_in_turn(wait: str, *, parallelizer: Par) -> Any:
    """How long main has computed, and each worker, while it waited for one that slept."""
    found = []
    for sleeper in {0, parallelizer.nprocs - 1}:
        parallelizer.wait()
        begun = time.process_time()
        time.sleep(0.5 * (parallelizer.id == sleeper))
        WAITED_FOR[wait](parallelizer, sleeper)
        found.append(time.process_time() - begun)
    return parallelizer.allgather(max(found))


@pytest.mark.parametrize("wait", WAITED_FOR)
def test_who_waits_computes_nothing(p: Par, wait: str) -> None:
    """Who looked again and again would compute for half a second."""
    assert max(p.run(sleeps_in_turn, wait)) < 0.3


def leaves_workers_idle(*, parallelizer: Par) -> Any:
    """By a client: what each process computes while main sleeps, and while one item does."""
    before = parallelizer.run(cpu_seconds)
    time.sleep(0.5)
    parallelizer.map(time.sleep, [0.0, 0.5, 0.0], chunksize=1)
    return [new - old for new, old in zip(parallelizer.run(cpu_seconds), before, strict=True)]


def test_who_has_nothing_to_do_computes_nothing(p: Par) -> None:
    expect(p, [spent for spent in drive(p, leaves_workers_idle) or [] if spent > 0.3], [])


MORE_THAN_2_GIB = 2**31 + 9
MARKS = [0, 2**31 - 1, 2**31, MORE_THAN_2_GIB - 1]


def marked() -> Array:
    """As most pages are never written to, they take no memory."""
    array = np.zeros(MORE_THAN_2_GIB, bool)
    array[MARKS] = True
    return array


def moves_more_than_2_gib(*, parallelizer: Par) -> None:
    par, data = parallelizer, marked() if parallelizer.on_main else None
    if par.on_main:
        par.send(data, 1)
    found = [par.broadcast(data)] if par.on_main else [par.receive(0), par.broadcast(None)]
    while found:
        array = found.pop()
        assert len(array) == MORE_THAN_2_GIB
        assert int(np.count_nonzero(array)) == np.count_nonzero(array[MARKS]) == len(MARKS)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("engine", ["fork", "mpi"])
def test_an_array_may_be_larger_than_2_gib(engine: str) -> None:
    """It takes two processes, and 5 GiB of memory."""
    call = f"import test_parallelizer as t; t.create({engine!r}, 2).run(t.moves_more_than_2_gib)"
    run_program("-c", call, ranks=2 if engine == "mpi" else None)


# ---------------------------------------------------------------------------------------------
# print


def prints_to(where: str, *, parallelizer: Par) -> Any:
    stream = io.StringIO()
    parallelizer.print("a", 1, [2], sep="-", end="!\n", where=where, file=stream)
    parallelizer.print("two\nlines", where=where, file=stream, flush=True)
    return parallelizer.gather(stream.getvalue())


def is_headed(line: str, rank: int, text: str) -> bool:
    """Tell whether `line` is `text` behind a head that names the rank."""
    head = line.removesuffix(text)
    return head != line and bool(head) and re.search(rf"\b{rank}\b", head) is not None


@pytest.mark.parametrize("where", ["both", "main", "worker"])
def test_print(p: Par, where: str) -> None:
    texts = p.run(prints_to, where)
    if not p.on_main:
        return
    wanted = ["a-1-[2]!", "two", "lines"]
    assert texts[0].splitlines() == (wanted if where != "worker" else [])
    for rank in range(1, p.nprocs):
        lines = texts[rank].splitlines()
        assert len(lines) == (len(wanted) if where != "main" else 0)
        for line, text in zip(lines, wanted, strict=False):
            assert is_headed(line, rank, text), line


def prints(*, parallelizer: Par) -> None:
    parallelizer.print("number", parallelizer.id)
    parallelizer.print("only main", where="main")
    parallelizer.print("only", "workers", where="worker", sep="_")


def program_that_prints(engine: str) -> None:
    """Run as a program of its own by the test below; `run` prints nothing by itself."""
    with create(engine) as p:
        p.run(roll_call)
        p.run(prints)


@pytest.mark.parametrize("engine_name", ["serial", *MULTIPROCESSING, "mpi"])
def test_prints_reach_the_terminal(engine_name: str) -> None:
    call = f"import test_parallelizer; test_parallelizer.program_that_prints({engine_name!r})"
    ranks = NPROCS if engine_name == "mpi" else None
    lines = run_program("-c", call, ranks=ranks).splitlines()
    nprocs = 1 if engine_name == "serial" else NPROCS
    assert len(lines) == 2 * nprocs
    assert lines.count("number 0") == lines.count("only main") == 1
    for rank in range(1, nprocs):
        for text in (f"number {rank}", "only_workers"):
            assert sum(is_headed(line, rank, text) for line in lines) == 1, lines


# ---------------------------------------------------------------------------------------------
# Mapping, by all processes inside `run` and by main alone in driver mode


BOTH_WAYS = pytest.mark.parametrize("way", [spmd, drive])

ITEMS: dict[str, Callable[[], Any]] = {
    "list": lambda: [3, "x", None, 2.5],
    "tuple": lambda: (1, 2),
    "range": lambda: range(0, 100, 7),
    "long range": lambda: range(5000),
    "nothing": list,
    "one": lambda: [1],
    "array": lambda: np.linspace(0, 1, 11),
    "rows": lambda: np.arange(12.0).reshape(4, 3),
    "no rows": lambda: np.zeros((0, 3)),
    "string": lambda: "abcdefgh",
    "set": lambda: set(range(20)),
    "dict": lambda: dict.fromkeys(range(20)),
    "generator": lambda: (i * i for i in range(20)),
    "iterator": lambda: iter([1, 2, 3]),
    "big items": lambda: [np.full(200_000, i) for i in range(7)],
}


def annotated(x: Any, *extra: Any, **options: Any) -> Any:
    return x, extra, options


def maps(kind: str, options: dict[str, Any], *, parallelizer: Par) -> Any:
    data = ITEMS[kind]() if parallelizer.on_main else "ignored"
    result = parallelizer.map(annotated, data, (1, "two"), {"three": 3}, **options)
    assert parallelizer.on_main or in_worker(result)
    return result


@pytest.mark.parametrize("kind", ITEMS)
@BOTH_WAYS
def test_map_is_a_comprehension(p: Par, way: Any, kind: str) -> None:
    wanted = [annotated(x, 1, "two", three=3) for x in ITEMS[kind]()]
    expect(p, way(p, maps, kind, {}), wanted)


@pytest.mark.parametrize("chunksize", [1, 7, 100_000])
@BOTH_WAYS
def test_map_in_chunks(p: Par, way: Any, chunksize: int) -> None:
    wanted = [annotated(x, 1, "two", three=3) for x in range(0, 100, 7)]
    expect(p, way(p, maps, "range", {"chunksize": chunksize}), wanted)


CALLS: list[int] = []


def slow_at_times(x: int) -> tuple[int, int]:
    CALLS.append(x)
    time.sleep(0.05 if x % 10 == 3 else 0.001)
    return x, -x


def maps_uneven_tasks(*, parallelizer: Par) -> Any:
    CALLS.clear()
    result = parallelizer.map(slow_at_times, range(60))
    calls = parallelizer.gather(CALLS)
    return result, parallelizer.on_main and sorted(itertools.chain(*calls))


def test_map_does_every_item_once(p: Par) -> None:
    expect(p, p.run(maps_uneven_tasks), ([(x, -x) for x in range(60)], list(range(60))))


def starmaps(*, parallelizer: Par) -> Any:
    data = [(i, str(i)) for i in range(9)] if parallelizer.on_main else None
    return [
        parallelizer.starmap(annotated, data),
        parallelizer.starmap(annotated, data, extra_args=(1,), extra_kwargs={"k": 2}),
        parallelizer.starmap(pow, zip(range(5), range(5), strict=True), chunksize=2),
        parallelizer.starmap(annotated, []),
    ]


@BOTH_WAYS
def test_starmap_unpacks_its_items(p: Par, way: Any) -> None:
    plain: list[Any] = [((i), (str(i),), {}) for i in range(9)]
    extra: list[Any] = [((i), (str(i), 1), {"k": 2}) for i in range(9)]
    expect(p, way(p, starmaps), [plain, extra, [pow(i, i) for i in range(5)], []])


def blockwise(kind: str, factor: int, block: Any) -> Any:
    assert type(block).__name__ == kind, f"a block is a {type(block)}"
    return block * factor if isinstance(block, np.ndarray) else [x * factor for x in block]


BLOCKS: dict[str, tuple[str, Callable[[], Any], Any]] = {
    # name: the type of a block, the data, what comes back
    "array": ("ndarray", lambda: np.arange(10.0), np.arange(10.0) * 3),
    "rows": ("ndarray", lambda: np.ones((7, 2), "i2"), np.full((7, 2), 3, "i2")),
    "short array": ("ndarray", lambda: np.ones(1), np.full(1, 3.0)),
    "empty array": ("ndarray", lambda: np.ones((0, 2)), np.ones((0, 2))),
    "list": ("list", lambda: [1, "x", 2.5], [3, "xxx", 7.5]),
    "tuple": ("tuple", lambda: tuple(range(10)), list(range(0, 30, 3))),
    "range": ("range", lambda: range(10), list(range(0, 30, 3))),
    "generator": ("list", lambda: (i for i in range(10)), list(range(0, 30, 3))),
    "empty list": ("list", list, []),
}


def maps_blocks(kind: str, *, parallelizer: Par) -> Any:
    name, make, _ = BLOCKS[kind]
    func = functools.partial(blockwise, name, 3)
    return parallelizer.map(func, make() if parallelizer.on_main else None, vectorized=True)


@pytest.mark.parametrize("kind", BLOCKS)
@BOTH_WAYS
def test_map_over_blocks(p: Par, way: Any, kind: str) -> None:
    expect(p, way(p, maps_blocks, kind), BLOCKS[kind][2])


def by_content(block: Any) -> Array:
    return np.array([["yes" * x, x, x + 0.5, x + 1j][min(x, 3)] for x in block])


def picks(block: Any, table: Array) -> Array:
    return table[block[0] : block[-1] + 1]


def maps_blocks_to_arrays(*, parallelizer: Par) -> Any:
    """Map to arrays whose dtypes are the blocks' own, or which lie in shared or mapped memory."""
    par, n = parallelizer, parallelizer.nprocs
    found: list[Any] = [par.map(by_content, data, vectorized=True) for data in ([1, 1, 3], [1] * 9)]
    found.append(par.map(by_content, [2, 1, 3], (), vectorized=True, concatenate=False))
    table = par.share(np.arange(50.0).reshape(25, 2)) if par._runs_here() else np.ones((25, 2))
    found.append(par.map(picks, range(25), (table,), vectorized=True))
    wanted = [
        *(joined([by_content(block_of(data, r, n)) for r in range(n) if len(block_of(data, r, n))])
          for data in ([1, 1, 3], [1] * 9)),
        [by_content(block_of([2, 1, 3], r, n)) for r in range(n) if len(block_of([2, 1, 3], r, n))],
        np.array(table),
    ]  # fmt: skip
    return difference(found, wanted) if par.on_main else None


@BOTH_WAYS
def test_blocks_of_arrays_become_one_array_whatever_their_dtypes(p: Par, way: Any) -> None:
    expect(p, way(p, maps_blocks_to_arrays), "")


class Labelled:
    """Numbers whose slices go by their labels, as in pandas 2 where those are floats."""

    def __init__(self, numbers: Sequence[float], labels: Sequence[float]) -> None:
        self.numbers, self.labels = list(numbers), list(labels)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> Labelled:
        keep = [i for i, label in enumerate(self.labels) if part.start <= label <= part.stop]
        return self.taken(keep)

    def taken(self, keep: Sequence[int]) -> Labelled:
        return Labelled([self.numbers[i] for i in keep], [self.labels[i] for i in keep])

    @property
    def iloc(self) -> Any:
        """Slice by position."""
        return _ByPosition(self)


class _ByPosition:
    def __init__(self, whole: Labelled) -> None:
        self.whole = whole

    def __getitem__(self, part: slice) -> Labelled:
        return self.whole.taken(range(len(self.whole))[part])


def numbers_of(block: Any) -> list[float]:
    return [float(x) for x in getattr(block, "numbers", block)]


def pandas_series(numbers: Sequence[float], labels: Sequence[float]) -> Any:
    return importlib.import_module("pandas").Series(numbers, labels)


def splits_labelled(make: Callable[..., Any], *, parallelizer: Par) -> Any:
    data, labels = list(range(10)), [0.0, 0.5, 1, 1.5, 2, 9, 8, 7, 6, 5]
    series = make(data, labels) if parallelizer.on_main else None
    mapped = parallelizer.map(numbers_of, series, vectorized=True)
    return parallelizer.allreduce(numbers_of(parallelizer.scatter(series))), mapped


def test_labelled_data_are_split_by_position(p: Par) -> None:
    expect(p, p.run(splits_labelled, Labelled), ([float(x) for x in range(10)],) * 2)


def test_ecosystem_of_labelled_data(p: Par) -> None:
    expect(p, p.run(splits_labelled, pandas_series), ([float(x) for x in range(10)],) * 2)


def scaled(block: Any, factor: float, *, shift: float) -> Any:
    return block * factor + shift


def maps_blocks_with_arguments(*, parallelizer: Par) -> Any:
    data = np.arange(10) if parallelizer.on_main else None
    return [
        parallelizer.map(scaled, data, (2,), {"shift": 1}, vectorized=True),
        parallelizer.map(len, data, vectorized=True),
    ]


@BOTH_WAYS
def test_map_over_blocks_takes_arguments(p: Par, way: Any) -> None:
    lengths = [len(block_of(range(10), rank, p.nprocs)) for rank in range(p.nprocs)]
    expect(p, way(p, maps_blocks_with_arguments), [np.arange(10) * 2 + 1, lengths])


def noise(*args: Any, rng: np.random.Generator) -> Any:
    return args, rng.standard_normal(3)


def draws(*, parallelizer: Par) -> Any:
    return [
        parallelizer.map(noise, range(20), seed=7),
        parallelizer.map(noise, (i for i in range(20)), ("extra",), seed=7, chunksize=3),
        parallelizer.starmap(noise, [(1, 2), (3, 4)], seed=8),
        parallelizer.map(annotated, [1]),
    ]


@BOTH_WAYS
def test_seeded_maps_give_every_item_its_own_numbers(p: Par, way: Any) -> None:
    def streams(seed: int, count: int) -> list[np.random.Generator]:
        return [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(count)]

    plain = [noise(x, rng=rng) for x, rng in enumerate(streams(7, 20))]
    extra = [noise(x, "extra", rng=rng) for x, rng in enumerate(streams(7, 20))]
    starred = [noise(*x, rng=r) for x, r in zip([(1, 2), (3, 4)], streams(8, 2), strict=True)]
    expect(p, way(p, draws), [plain, extra, starred, [(1, (), {})]])


def fails_at_five(x: int) -> int:
    if x == 5:
        raise JobError("item five", 5)
    return x


def stops_at_five(x: int) -> int:
    if x == 5:
        raise StopIteration("item five", 5)
    return x


def maps_into_a_failure(func: Callable[..., Any], *, parallelizer: Par) -> Any:
    return parallelizer.map(func, range(20))


@pytest.mark.parametrize("func", [fails_at_five, stops_at_five])
@BOTH_WAYS
def test_map_passes_on_what_an_item_raises(p: Par, way: Any, func: Callable[..., Any]) -> None:
    error = caught_from(way, p, maps_into_a_failure, func)
    kind = JobError if func is fails_at_five else StopIteration
    expect(p, (type(error), error and error.args), (kind, ("item five", 5)))
    expect_to_work(p)


def imaps(kind: str, ordered: bool, chunksize: int, *, parallelizer: Par) -> Any:
    data = ITEMS[kind]() if parallelizer.on_main else None
    imap = parallelizer.imap if ordered else parallelizer.imap_unordered
    results = list(imap(annotated, data, chunksize, (1, "two"), {"three": 3}))
    assert parallelizer.on_main or results == []
    return results if ordered else sorted(results, key=repr)


@pytest.mark.parametrize(
    ("kind", "chunksize"),
    [("list", 1), ("long range", 7), ("array", 2), ("generator", 1), ("dict", 3), ("nothing", 1),
     ("big items", 1)],
)  # fmt: skip
@pytest.mark.parametrize("ordered", [True, False])
@BOTH_WAYS
def test_imap_gives_what_map_gives(
    p: Par, way: Any, kind: str, chunksize: int, ordered: bool
) -> None:
    wanted = [annotated(x, 1, "two", three=3) for x in ITEMS[kind]()]
    found = way(p, imaps, kind, ordered, chunksize)
    expect(p, found, wanted if ordered else sorted(wanted, key=repr))


def takes_from_an_endless_one(ordered: bool, *, parallelizer: Par) -> Any:
    drawn = itertools.count()
    imap = parallelizer.imap if ordered else parallelizer.imap_unordered
    stream = imap(square, drawn)
    first = list(itertools.islice(stream, 40))
    if parallelizer.on_main:
        stream.close()
    again = parallelizer.map(square, range(5))
    if not parallelizer.on_main:
        return None
    few = next(drawn) <= 40 + 104 * parallelizer.nprocs  # drawn ahead of what was taken
    right = len(set(first)) == 40 and all(round(x**0.5) ** 2 == x for x in first)
    return few, right and (not ordered or first == [x * x for x in range(40)]), again


@pytest.mark.parametrize("ordered", [True, False])
@BOTH_WAYS
def test_imap_takes_endless_data_and_may_be_left_early(p: Par, way: Any, ordered: bool) -> None:
    found = way(p, takes_from_an_endless_one, ordered)
    expect(p, found, (True, True, [0, 1, 4, 9, 16]))
    expect_to_work(p)


def waits_for_the_others_or_gives_much(item: int, file: str) -> int | np.ndarray:
    if item > 0:
        with Path(file).open("a") as computed:
            computed.write(".")
        return np.full(2**20, float(item))
    size = -1
    while size < (size := Path(file).stat().st_size):  # until the others come to rest
        time.sleep(0.3)
    return size


def streams_what_is_large(count: int, file: str, *, parallelizer: Par) -> Any:
    stream = parallelizer.imap(waits_for_the_others_or_gives_much, range(count), extra_args=(file,))
    results = list(stream)
    return results and (results[0], [result[0] for result in results[1:]])


@pytest.mark.parametrize("count", [30, 60])  # all of 30 are dealt before one result has come
@BOTH_WAYS
def test_large_results_are_not_piled_up_behind_a_slow_one(
    p: Par, way: Any, count: int, tmp_path: Any
) -> None:
    (tmp_path / "computed").write_text("")
    found = way(p, streams_what_is_large, count, str(tmp_path / "computed"))
    if p.on_main:
        ahead, numbers = found
        assert ahead < 40  # before the first result has come, 16 are dealt to each
        assert numbers == list(range(1, count))


def streams_into_a_failure(*, parallelizer: Par) -> Any:
    return list(parallelizer.imap(fails_at_five, range(50)))


@BOTH_WAYS
def test_imap_passes_on_what_an_item_raises(p: Par, way: Any) -> None:
    error = caught_from(way, p, streams_into_a_failure)
    expect(p, (type(error), error and error.args), (JobError, ("item five", 5)))
    expect_to_work(p)


def runs_amid_a_stream(*, parallelizer: Par) -> Any:
    stream = parallelizer.imap(square, range(100))
    first = next(stream)
    error = caught_from(parallelizer.map, square, range(3))
    return first, type(error), list(stream) == [x * x for x in range(1, 100)]


def test_nothing_else_runs_amid_a_stream(p: Par) -> None:
    """But for the serial one, which has nobody to keep busy."""
    kind = type(None) if isinstance(p, SerialNonParallelizer) else ContractError
    expect(p, drive(p, runs_amid_a_stream), (0, kind, True))
    expect_to_work(p)


def leaves_a_stream(*, parallelizer: Par) -> Any:
    LEFT[:] = [parallelizer.imap(square, itertools.count())]
    return next(LEFT[0])


LEFT: list[Iterator[int]] = []


def test_closing_gives_up_a_stream_and_says_so(fresh: Par) -> None:
    expect(fresh, drive(fresh, leaves_a_stream), 0)
    alone = isinstance(fresh, SerialNonParallelizer)  # which keeps nobody busy
    if alone:
        assert next(LEFT[0]) == 1
    elif LEFT:  # on main
        with pytest.raises(ContractError, match="closed before its map was at its end"):
            next(LEFT[0])
    LEFT.clear()


def elsewhere(call: Callable[..., Any], *args: Any) -> Any:
    """Call on another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(call, *args).result()


def ends_a_stream(how: str, parallelizer: Par) -> Any:
    """Begin, advance and end an imap, each on a thread of its own; it is a part of a cycle."""
    held = [parallelizer.imap(square, range(60))]
    held.append(held)
    found = [elsewhere(next, held[0]), next(held[0])] if parallelizer.on_main else []
    if how == "exhausted":
        found += elsewhere(list, held[0])
    elif how == "closed" and parallelizer.on_main:
        elsewhere(held[0].close)
    elif how == "dropped":
        elsewhere(held.clear)
    del held
    if how == "collected":
        elsewhere(gc.collect)
    return found[:3]


def ends_streams(how: str, *, parallelizer: Par) -> Any:
    found = ends_a_stream(how, parallelizer), parallelizer.map(square, range(5))
    return found if parallelizer.on_main else None


ENDS_OF_STREAMS = ["exhausted", "closed", "dropped", "collected"]


@pytest.mark.parametrize("how", ENDS_OF_STREAMS)
@BOTH_WAYS
def test_a_stream_may_end_on_another_thread(p: Par, way: Any, how: str) -> None:
    wanted = [0, 1, 4][: 3 if how == "exhausted" else 2]
    expect(p, way(p, ends_streams, how), (wanted, [0, 1, 4, 9, 16]))
    expect_to_work(p)


def runs_on_threads_amid_a_stream(*, parallelizer: Par) -> Any:
    stream = parallelizer.imap(square, range(9))
    begun = elsewhere(next, stream)
    # Who has made it would wait for itself; another thread waits for its end.
    own = caught_from(parallelizer.map, square, range(3))
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        other = executor.submit(parallelizer.map, square, range(3))
        rest = sorted(executor.map(next, [stream] * 8))
        end = executor.submit(next, stream, "end").result()
        return begun, type(own), rest, end, other.result()


def test_who_has_a_part_in_a_stream_may_not_run_amid_it(p: Par) -> None:
    kind = type(None) if isinstance(p, SerialNonParallelizer) else ContractError
    wanted = (0, kind, [x * x for x in range(1, 9)], "end", [0, 1, 4])
    expect(p, drive(p, runs_on_threads_amid_a_stream), wanted)
    expect_to_work(p)


def takes_too_late(*, parallelizer: Par) -> Any:
    stream = parallelizer.imap(square, itertools.count())
    if parallelizer.on_main:
        LEFT[:] = [stream]
        return next(stream)
    return None


def test_a_stream_ends_with_its_run(p: Par) -> None:
    if p.nprocs > 1:
        expect_failure(p, ContractError, takes_too_late)
        late = caught_from(next, LEFT[0]) if LEFT else None
        expect(p, "has ended" in str(late), True)
    LEFT.clear()
    expect_to_work(p)


def hears(*, parallelizer: Par) -> Any:
    heard: list[Any] = []
    results = parallelizer.map(square, range(30), callback=heard.append)
    blocks: list[Any] = []
    whole = parallelizer.map(square, np.arange(9), vectorized=True, callback=blocks.append)
    return heard == results, results, len(blocks), whole


@BOTH_WAYS
def test_callbacks_hear_each_result_on_main(p: Par, way: Any) -> None:
    wanted = (True, [x * x for x in range(30)], 1, np.arange(9) ** 2)
    expect(p, way(p, hears), wanted)


class CountsReads:
    """Numbers, of which it is known how many there are and how many have been read."""

    def __init__(self, length: int, heard: list[int]) -> None:
        self.length, self.heard, self.read = length, heard, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for number in range(self.length):
            self.read += 1
            if self.read > self.length // 2 and not self.heard:
                time.sleep(0.01)  # whoever computes the first of them may be late
            yield number


def hears_early(*, parallelizer: Par) -> Any:
    then: list[int] = []
    numbers = CountsReads(6400, then)
    parallelizer.map(square, numbers, callback=lambda _: then.append(numbers.read))
    return then[0] if parallelizer.on_main else None


@BOTH_WAYS
def test_callbacks_hear_before_all_is_read_and_items_travel_together(p: Par, way: Any) -> None:
    read = way(p, hears_early)
    chunk = 6400 // (32 * p.nprocs)
    expect(p, p.on_main and chunk <= read < 6400, p.on_main)


def spoils(item: list[int]) -> list[int]:
    item.append(len(item))
    return item


def spoils_its_items(*, parallelizer: Par) -> Any:
    items: list[list[int]] = [[] for _ in range(40)]
    results = [
        parallelizer.map(spoils, items),
        list(parallelizer.imap(spoils, items)),
        parallelizer.map(spoils, items, chunksize=3),
    ]
    return results, items


def counts_up(record: Any) -> int:
    record["n"] += 1
    return int(record["n"])


def spoils_its_records(*, parallelizer: Par) -> Any:
    """How many different results there are, and what has become of the items."""
    items = [np.zeros(1, [("n", int)])[0] for _ in range(40)]
    found = {*(parallelizer.map(counts_up, items) or ()), *parallelizer.imap(counts_up, items)}
    return len(found), [int(item["n"]) for item in items]


@BOTH_WAYS
def test_it_does_not_matter_who_computes_what_on_a_changed_item(p: Par, way: Any) -> None:
    """Of several processes, each has copies; a single one has the items themselves."""
    found, of_records = way(p, spoils_its_items), way(p, spoils_its_records)
    if p.nprocs > 1:
        expect(p, found, ([[[0]] * 40] * 3, [[]] * 40))
        expect(p, of_records, (1, [0] * 40))
    else:
        expect(p, found, ([[[0, 1, 2]] * 40] * 3, [[0, 1, 2]] * 40))
        expect(p, of_records, (2, [2] * 40))


class Molecule:
    """Loses what it has computed when it is pickled."""

    def __init__(self, number: int) -> None:
        self.number, self.energy = number, 2.5

    def __getstate__(self) -> dict[str, Any]:
        return {"number": self.number}


def has_energy(one: Any, *_: Any) -> bool:
    return hasattr(one, "energy")


def molecules(block: Sequence[int]) -> list[Molecule]:
    return [Molecule(x) for x in block]


def tells_copies(*, parallelizer: Par) -> set[bool]:
    """Send objects in every way, and see whether what arrives has what its pickle has not."""
    par, ours = parallelizer, [Molecule(x) for x in range(12)]
    heard: list[Any] = []
    par.map(Molecule, range(12), callback=heard.append)
    found = [*heard, *par.imap(Molecule, range(12)), *par.imap_unordered(Molecule, range(12), 2)]
    if par.on_main:
        found += par.map(Molecule, range(12)) + par.starmap(Molecule, [(x,) for x in range(12)])
        found += par.map(molecules, range(12), vectorized=True)
        told = par.map(has_energy, ours)
    else:
        par.map(Molecule, None), par.starmap(Molecule, None)
        par.map(molecules, None, vectorized=True), par.map(has_energy, None)
        told = []
    if par._runs_here():
        found += [*par.scatter(ours), *itertools.chain(*par.allgather(ours))]
        found += par.allreduce([ours[0]], operator.add)
    return {*told, *map(has_energy, found)}


def merges_copies(*, parallelizer: Par) -> set[bool]:
    return set().union(*parallelizer.allgather(tells_copies(parallelizer=parallelizer)))


@BOTH_WAYS
def test_results_do_not_tell_who_computed_them(p: Par, way: Any) -> None:
    """Of several processes, all have copies; a single one has the objects themselves."""
    found = way(p, merges_copies if way is spmd else tells_copies)
    expect(p, found if p.on_main else None, {p.nprocs == 1})


# Of what is passed to a verb, main's words count on every process.


def says_its_own(way: str, *, parallelizer: Par) -> Any:
    par, main = parallelizer, parallelizer.on_main
    options: dict[str, Any] = {"extra_kwargs": {"k": "main's"}, "seed": 5, "chunksize": 2}
    others = {"extra_kwargs": {"k": par.id}, "seed": par.id, "chunksize": "nonsense"}
    data, extra = (range(9), ("main's",)) if main else (None, None)
    if way == "blocks":
        options = {"extra_kwargs": {"k": "main's"}, "vectorized": True, "concatenate": False}
    heard: list[Any] = []
    if way == "callback":
        options["callback"] = heard.append
    given: Any = options if main else others
    result: Any
    if way in ("imap", "imap_unordered"):
        result = sorted(getattr(par, way)(quotes, data, extra_args=extra, **given))
        return result or Parallelizer.InWorkerProcess
    if way == "starmap":
        result = par.starmap(quotes, data and [(x,) for x in data], extra, **given)
    else:
        result = par.map(quotes, data, extra, **given)
    if way == "callback" and main:
        check(heard, result)
    assert main or in_worker(result)
    return result


def quotes(item: Any, *extra: Any, rng: Any = None, **options: Any) -> Any:
    return str((item, extra, options, rng and rng.random()))


@pytest.mark.parametrize("way", ["map", "starmap", "imap", "imap_unordered", "callback", "blocks"])
def test_only_main_s_words_count(p: Par, way: str) -> None:
    rngs = [np.random.default_rng(np.random.SeedSequence(5, spawn_key=(i,))) for i in range(9)]
    wanted = [quotes(i, "main's", k="main's", rng=rng) for i, rng in enumerate(rngs)]
    if way == "blocks":
        blocks = [block_of(range(9), rank, p.nprocs) for rank in range(p.nprocs)]
        wanted = [quotes(block, "main's", k="main's") for block in blocks]
    expect(p, p.run(says_its_own, way), wanted)


REFUSED_OPTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ((range(3), [1]), TypeError, "extra_args.*chunksize"),
    "a word": ((range(3), "ab"), TypeError, "extra_args.*chunksize"),
    "an array": ((range(3), np.arange(1)), TypeError, "extra_args.*chunksize"),
    "no items": ((range(3), 0), ValueError, "chunksize must be at least 1"),
    "twice": ((range(3), 2, None, {"chunksize": 2}), TypeError, "chunksize is given twice"),
    "half": ((range(3), (), None, {"chunksize": 1.5}), TypeError, "chunksize must be a number"),
    "no blocks": ((range(3), (), None, {"concatenate": False}), ValueError, "vectorized=True"),
    "no data": ((None, ()), TypeError, "iter"),
}


def refuses_on_every_rank(kind: str, *, parallelizer: Par) -> Any:
    (data, *rest), error, match = REFUSED_OPTIONS[kind]
    options = rest.pop() if len(rest) == 3 else {}
    if not parallelizer.on_main:
        data, rest, options = None, [], {}
    for verb in (parallelizer.map, parallelizer.starmap):
        with pytest.raises(error, match=match):
            verb(square, data, *rest, **options)
    return parallelizer.allgather(parallelizer.id)


@pytest.mark.parametrize("kind", REFUSED_OPTIONS)
def test_what_main_cannot_mean_is_refused_on_every_rank(p: Par, kind: str) -> None:
    expect(p, p.run(refuses_on_every_rank, kind), list(range(p.nprocs)))


def maps_as_pools_do(*, parallelizer: Par) -> Any:
    return [
        parallelizer.map(annotated, range(9), 4),
        parallelizer.map(annotated, range(9), None),
        parallelizer.starmap(annotated, zip(range(9), strict=True), np.int64(2)),
    ]


@BOTH_WAYS
def test_the_third_argument_may_be_chunksize(p: Par, way: Any) -> None:
    expect(
        p, way(p, maps_as_pools_do), [[(x, (), {}) for x in range(9)]] * 3 if p.on_main else None
    )


def fails_in_consequence(*, parallelizer: Par) -> None:
    if parallelizer.id == 2:
        raise JobError("the cause", 1)
    if parallelizer.id == 0:
        parallelizer.gather(0)


def test_a_cause_is_told_before_its_consequences(p: Par) -> None:
    """Rank 1 returns early, upon which main raises a ContractError; but rank 2 has failed."""
    if p.nprocs > 2:
        expect_failure(p, JobError, fails_in_consequence)


def draws_by_stream(*, parallelizer: Par) -> Any:
    return list(parallelizer.imap(noise, range(20), 3, seed=7)), parallelizer.map(
        noise, range(20), seed=7
    )


@BOTH_WAYS
def test_seeded_streams_draw_what_seeded_maps_draw(p: Par, way: Any) -> None:
    found = way(p, draws_by_stream)
    expect(p, p.on_main and difference(*found), "")


def hear_of_errors(kind: str, flag: int) -> None:
    """Stand as numpy's errcall."""


@contextlib.contextmanager
def buffers_of(size: int) -> Iterator[None]:
    before = np.setbufsize(size)
    yield
    np.setbufsize(before)


UP = decimal.Context(prec=50, rounding=decimal.ROUND_UP, traps=[decimal.FloatOperation])
SETTINGS: dict[str, Callable[[], Any]] = {
    "defaults": contextlib.nullcontext,
    "errors": lambda: np.errstate(divide="raise", under="raise"),
    "handler": lambda: np.errstate(all="call", call=hear_of_errors),
    "buffers": lambda: buffers_of(32),
    "decimal": lambda: decimal.localcontext(UP),
}
SMALL = (np.linspace(0, 1, 9999) ** 3).astype(">f4")  # whose sum depends on numpy's buffers


def settings(_: object = None) -> str:
    context = decimal.getcontext()
    traps = [trap.__name__ for trap, is_set in context.traps.items() if is_set]
    handler = np.geterrcall()
    return repr((
        np.geterr(), handler and handler.__name__, np.getbufsize(), float(SMALL.sum()).hex(),  # type: ignore[union-attr]
        decimal.Decimal(1) / 3, context.rounding, context.Emax, traps,
    ))  # fmt: skip


def settings_of_an_item(_: object) -> str:
    """Tell them, and leave others behind."""
    found = settings()
    np.seterr(all="ignore", over="call")
    np.seterrcall(print)
    np.setbufsize(64)
    decimal.getcontext().prec = 5
    return found


def settings_of_a_block(block: list[int]) -> list[str]:
    return [settings_of_an_item(block)] * len(block)


def settings_of_a_pair(one: int, two: int) -> str:
    return settings_of_an_item((one, two))


def settings_anywhere(case: str, *, parallelizer: Par) -> Any:
    """What they are for main and for the items of all kinds of map; only main sets anything."""
    before = settings()
    with SETTINGS[case]() if parallelizer.on_main else contextlib.nullcontext():
        wanted = settings()
        found = [
            *parallelizer.map(settings_of_an_item, range(20), chunksize=1),
            *parallelizer.starmap(settings_of_a_pair, [(1, 2)] * 20, chunksize=1),
            *parallelizer.map(settings_of_a_block, [*range(20)], vectorized=True),
            *parallelizer.map(settings_of_an_item, range(20), callback=len),
        ] if parallelizer.on_main else [
            parallelizer.map(settings_of_an_item, None, chunksize=1),
            parallelizer.starmap(settings_of_a_pair, None, chunksize=1),
            parallelizer.map(settings_of_a_block, None, vectorized=True),
            parallelizer.map(settings_of_an_item, None, callback=len),
        ]  # fmt: skip
        stream = parallelizer.imap(settings_of_an_item, range(20))
    found += stream  # whose items main computes when it has other settings again
    return sorted({*map(str, found)}), wanted, settings() == before


@pytest.mark.parametrize("case", SETTINGS)
@BOTH_WAYS
def test_items_are_computed_with_the_settings_of_main(p: Par, way: Any, case: str) -> None:
    found, wanted, are_back = way(p, settings_anywhere, case) if p.on_main else (0, 0, 0)
    if not p.on_main:
        way(p, settings_anywhere, case)
    expect(p, (found, are_back), ([wanted], True))


def settings_everywhere(leave: bool, *, parallelizer: Par) -> Any:
    found = parallelizer.gather(settings())
    if leave and not parallelizer.on_main:
        settings_of_an_item(0)
    return found


@pytest.mark.parametrize("case", SETTINGS)
def test_a_run_has_the_settings_of_main(fresh: Par, case: str) -> None:
    """Not those that workers were forked with, nor those that an earlier run has left there."""
    with SETTINGS["errors"](), SETTINGS["decimal"](), fresh:
        fresh.run(ranks)  # which brings the workers up
        for wanted in (case, "defaults", case):
            with (
                np.errstate(divide="warn", under="ignore"),
                decimal.localcontext(decimal.Context()),
                SETTINGS[wanted](),
            ):
                found, here = fresh.run(settings_everywhere, not UNDER_MPI), settings()
                expect(fresh, found, [here] * fresh.nprocs)


def own_numbers(*, parallelizer: Par) -> Any:
    mine = [parallelizer.rng(3).random(), parallelizer.rng(3).random(), parallelizer.rng().random()]
    return parallelizer.gather([*mine, np.random.random(), parallelizer.rng(4).random()])  # noqa: NPY002


def test_every_process_has_a_random_stream_of_its_own(fresh: Par) -> None:
    if not UNDER_MPI:  # whose ranks would all do so
        np.random.seed(1)  # noqa: NPY002 - a fork must not go on from here on every process
    found = fresh.run(own_numbers)
    again = fresh.run(own_numbers)
    if fresh.on_main:
        seeded = [numbers[0] for numbers in found]
        assert seeded == [numbers[1] for numbers in found] == [numbers[0] for numbers in again]
        independent = [x for numbers in (*found, *again) for x in numbers[2:4]]
        spawned = np.random.SeedSequence(3).spawn(len(found))  # what a seeded map would draw
        items = [np.random.default_rng(one).random() for one in spawned]
        everything = [*seeded, *(numbers[4] for numbers in found), *independent, *items]
        assert len(set(everything)) == len(everything)


SEEDING_MODULE = """
import random
import time
import numpy as np

random.seed(7)
np.random.seed(7)


class Thing:
    def __call__(self, *, parallelizer):
        return parallelizer.gather(draws())


def draws(*_, **__):
    time.sleep(0.02)  # so that all take some
    return random.random(), float(np.random.random())
"""

# `late_*` are copies of that, first imported where a worker unpickles a function or its arguments.
SEEDING_SCRIPT = """
import fractions
import random
import sys
import time
import numpy as np
import parallelizer

random.seed(7)
np.random.seed(7)


def draws(*_, **__):
    time.sleep(0.02)  # so that all take some
    return random.random(), float(np.random.random())


def gathers(*_, parallelizer):
    return parallelizer.gather(draws())


def block_of_draws(block):
    return [draws()]


def seeds_itself(*, parallelizer):
    random.seed(parallelizer.id)
    np.random.seed(parallelizer.id)
    first = draws()
    parallelizer.broadcast(late("value").Thing() if parallelizer.on_main else None)
    parallelizer.map(abs, [fractions.Fraction(1)] * 9 if parallelizer.on_main else None)
    return parallelizer.gather((first, draws()))


def late(name):
    return __import__(f"late_{name}")


if __name__ == "__main__":
    with parallelizer.MultiprocessingParallelizer(3, start_method=sys.argv[1]) as p:
        first = p.run(gathers)
        closure = late("closure")
        told = {
            "script": first,
            "again": p.run(gathers),
            "function": p.run(late("function").Thing()),
            "argument": p.run(gathers, late("argument").Thing()),
            "mapped": p.map(late("mapped").draws, range(12), chunksize=1),
            "extra": p.map(draws, range(12), (late("extra").Thing(),), chunksize=1),
            "items": p.map(draws, [late("items").Thing()] * 12, chunksize=1),
            "block": p.map(block_of_draws, [late("block").Thing()] * 3, vectorized=True),
            "closure": p.map(lambda _: closure.draws(), range(12), chunksize=1),
            "streamed": [*p.imap(draws, [late("streamed").Thing()] * 12)],
        }
        for way, drawn in told.items():
            for numbers in zip(*drawn):
                assert len(set(numbers)) == len(numbers), (way, drawn)
        for rank, found in enumerate(p.run(seeds_itself)[1:], 1):
            one, other = random.Random(rank), np.random.RandomState(rank)
            assert found == tuple((one.random(), other.random()) for _ in "12"), found
    print("all differ")
"""


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_what_seeds_the_global_generators_seeds_no_two_workers_alike(
    method: str, tmp_path: Path
) -> None:
    for name in re.findall(r'late\("(\w+)"', SEEDING_SCRIPT):
        (tmp_path / f"late_{name}.py").write_text(SEEDING_MODULE)
    script = tmp_path / "script.py"
    script.write_text(SEEDING_SCRIPT)
    assert run_program(str(script), method) == "all differ\n"


def works_and_talks(*, parallelizer: Par) -> Any:
    parallelizer.broadcast(np.ones(MIB // 8) if parallelizer.on_main else None)
    return parallelizer.map(square, range(50))


def test_stats_say_what_each_rank_did(p: Par) -> None:
    p.run(works_and_talks)
    stats = p.stats
    expect(p, [type(rank).__name__ for rank in stats], ["RankStats"] * p.nprocs)
    expect(p, sum(rank.tasks for rank in stats), 50)
    for rank in stats:
        assert 0 <= rank.waiting <= rank.collectives <= rank.seconds
        assert 10 * MIB < rank.peak_memory < 10 * 1024 * MIB
    # Main copies what it broadcasts once, however many processes there are.
    expect(p, MIB <= stats[0].bytes_sent < 1.1 * MIB, p.nprocs > 1)
    assert re.match(r"\d+ ranks?, .* s: busy from .* MB sent", str(stats))
    expect(p, "tasks" in str(stats), True)  # on a rank that was too late for any, not
    assert "\n" not in str(stats)


def holds_for_a_while(mib: int, *, parallelizer: Par) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        np.ones(mib * MIB, np.uint8)
    parallelizer.wait()


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_the_peak_of_memory_is_that_of_each_process(method: str) -> None:
    ballast = np.ones(300 * MIB, np.uint8)  # which a program that is started must not inherit
    ballast.resize(1)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        par.run(holds_for_a_while, 0)
        before = par.stats
        par.run(holds_for_a_while, 100)
        after = par.stats
    assert before is not None
    assert after is not None
    assert before[0].peak_memory > 300 * MIB > max(before[1].peak_memory, before[2].peak_memory)
    assert after[2].peak_memory - before[2].peak_memory > 90 * MIB
    assert after[1].peak_memory - before[1].peak_memory < 50 * MIB


def talks_and_waits(*, parallelizer: Par) -> Any:
    parallelizer.broadcast(np.ones(1000) if parallelizer.on_main else None)
    time.sleep(0.05 * (parallelizer.id == parallelizer.nprocs - 1))  # for which all others wait
    parallelizer.wait()
    if parallelizer.id > 0:
        parallelizer.send("hello", 0)
    others = range(1, parallelizer.nprocs) if parallelizer.on_main else []
    return [parallelizer.receive(rank) for rank in others]


def waits_and_fails(*, parallelizer: Par) -> None:
    parallelizer.wait()
    raise Odd(parallelizer.id, detail="drawn")


def spans_of(path: Path) -> dict[int, list[Any]]:
    """Read a trace: by rank, the names of what was done, each with its beginning and its end."""
    events = json.loads(path.read_text())["traceEvents"]
    spans: dict[int, list[Any]] = {}
    for event in events:
        if event["ph"] == "X":
            span = (event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
            spans.setdefault(event["tid"], []).append(span)
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert named == set(spans)
    return spans


def test_a_trace_shows_what_each_rank_did(p: Par, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    p.trace(path)
    p.run(talks_and_waits)
    first = spans_of(path) if p.on_main else None
    caught_from(p.run, waits_and_fails)
    second = spans_of(path) if p.on_main else None
    p.trace(None)
    p.run(talks_and_waits)
    expect(p, p.on_main and spans_of(path) == second, True)
    if first is None or second is None:
        return
    assert sorted(first) == list(range(p.nprocs))
    for rank, spans in first.items():
        name, begun, ended, _ = spans[-1]
        assert name == "run talks_and_waits"
        assert all(begun <= start <= stop <= ended for _, start, stop, _ in spans)
        if p.nprocs > 1:
            verbs = [name for name, *_ in spans if name not in ("waiting", "run talks_and_waits")]
            assert verbs == [
                "broadcast",
                "wait",
                *(["send"] if rank else ["receive"] * (p.nprocs - 1)),
            ]
            (bytes_sent,) = (of["bytes"] for name, _, _, of in spans if name == "broadcast")
            assert (bytes_sent >= 8000) is (rank == 0)
            longest = max(stop - start for name, start, stop, _ in spans if name == "wait")
            assert (longest > 4e4) is (rank < p.nprocs - 1)  # microseconds
    assert len(second[0]) > len(first[0])
    assert "run waits_and_fails" in [name for name, *_ in second[0]]


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_trace_of_maps_that_the_environment_asks_for(method: str, tmp_path: Path) -> None:
    path, script = tmp_path / "run.json", tmp_path / "script.py"
    script.write_text(f"""
from {MODULE} import MultiprocessingParallelizer, SerialNonParallelizer
def halve(x):
    return SerialNonParallelizer().run(own_half, x)  # in a worker's own process
def own_half(x, parallelizer):
    return x / 2
if __name__ == "__main__":
    with MultiprocessingParallelizer(2, start_method={method!r}) as p:
        print(p.map(halve, range(20), chunksize=5), list(p.imap(halve, range(3))))
        print(p.map(len, range(10), vectorized=True, concatenate=False))
    SerialNonParallelizer().run(own_half, 3)
""")
    run_program(str(script), PARALLELIZER_TRACE=str(path))
    spans = spans_of(path)
    chunks = [of for rank in spans.values() for name, _, _, of in rank if name == "chunk"]
    assert sorted((of["first"], of["items"]) for of in chunks[:]) == sorted(
        [(0, 5), (5, 5), (10, 5), (15, 5), (0, 1), (1, 1), (2, 1)]
    )
    blocks = [of["items"] for rank in spans.values() for name, _, _, of in rank if name == "block"]
    assert blocks == [5, 5]
    runs = {name for name, *_ in spans[1] if " " in name and name != "end of map"}
    assert runs == {"map halve", "imap halve", "map len"}
    assert "run own_half" in [name for name, *_ in spans[0]]


def test_a_trace_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.json"
    with MultiprocessingParallelizer(2) as par:
        for nowhere in (tmp_path / "no" / "run.json", Path("/dev/full")):
            with pytest.raises(OSError, match=r"No (such file|space)"):
                par.trace(nowhere)
        with pytest.raises(ContractError, match="inside a run"):
            par.run(traces_itself)
        par.trace(path)
        path.unlink()
        assert [par.run(own_id), par.run(own_id)] == [0, 0]
    assert [record.message[-60:] for record in caplog.records] == [
        f"cannot be written and is abandoned: [Errno 2] No such file or directory: '{path}'"[-60:]
    ]


def traces_itself(*, parallelizer: Par) -> None:
    parallelizer.trace("run.json")


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_trace_that_somebody_else_writes_to(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.json"
    monkeypatch.chdir(tmp_path)
    with MultiprocessingParallelizer(2, start_method=method) as par:
        par.trace(path.name)
        monkeypatch.chdir("/")
        par.run(own_id)
        spans_of(path)
        path.write_text("")
        error = caught_from(par.run, waits_and_fails)
        assert isinstance(error, Odd)  # and not what the trace has met with
        assert path.read_text() == ""
        par.trace(path)
        other = SerialNonParallelizer()
        other.trace(path)
        other.run(waits_once)
        par.run(own_id)  # leaves the file to the other one
        assert [name for name, *_ in spans_of(path)[0]] == ["run waits_once"]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "another program has written to it, or has replaced it"
    ] * 2


def test_a_trace_that_the_environment_wants_nowhere(
    p: Par, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARALLELIZER_TRACE", str(tmp_path / "no" / "run.json"))
    for _ in range(2):
        expect(p, p.run(ranks), list(range(p.nprocs)))
    told = [record.message for record in caplog.records if "is abandoned" in record.message]
    assert len(told) == p.on_main


def waits_once(*, parallelizer: Par) -> None:
    parallelizer.wait()


def test_a_trace_of_parallelizers_of_several_threads(tmp_path: Path) -> None:
    path, script = tmp_path / "run.json", tmp_path / "script.py"
    script.write_text(f"""
import threading
from {MODULE} import MultiprocessingParallelizer
def run_often():
    with MultiprocessingParallelizer(2, start_method="forkserver") as par:
        for _ in range(100):
            par.map(abs, range(4))
if __name__ == "__main__":
    threads = [threading.Thread(target=run_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
""")
    run_program(str(script), PARALLELIZER_TRACE=str(path))
    assert [name for name, *_ in spans_of(path)[0]].count("map abs") == 300


LOGGING_SCRIPT = """
import logging, sys, threading, warnings
from MODULE import MPIParallelizer, MultiprocessingParallelizer
log = logging.getLogger("my.library")
logging.basicConfig(format="%(message)s", level="WARNING")  # of all processes that import this

class Strange:
    def __reduce__(self):
        raise TypeError

class Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []
    def emit(self, record):
        self.records.append(record)

def talks(lines, parallelizer):
    rank = parallelizer.id
    log.info("begins, %s", rank, extra={"place": {"x": rank}, "strange": Strange()})
    log.debug("not asked for")
    if rank == 1:
        warnings.warn("careful")
    thread = threading.Thread(target=log.warning, args=("thread",))
    thread.start()
    thread.join()
    parallelizer.wait()
    for _ in range(lines):
        log.info("long " + 1000 * "x")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("ends")
    if lines < 0 and rank == 2:
        raise KeyError(rank)

def told(kept, p):
    if p.on_main:
        for rank in range(3):
            own = [one for one in kept.records if getattr(one, "rank", 0) == rank]
            starts = [one.getMessage().splitlines()[0][-16:] for one in own[:5]]
            print(rank, *starts, len(own), sep="|")
        for one in kept.records:
            if hasattr(one, "rank") and hasattr(one, "place"):
                assert one.place == {"x": one.rank} and "Strange" in str(one.strange), vars(one)
            assert "ends" not in one.getMessage() or not hasattr(one, "rank") or "1 / 0" in one.msg
        kept.records.clear()
    p.run(meets)  # before anybody logs more

def meets(parallelizer):
    parallelizer.wait()

def main(engine, logs):
    kept = Kept()
    logging.getLogger().handlers = [kept]
    log.setLevel("INFO")
    options = {"logs": True} if logs else {}
    if engine == "mpi":
        p = MPIParallelizer(**options)
    else:
        p = MultiprocessingParallelizer(3, start_method=engine, **options)
    with p:
        for lines in (0, 3000):
            p.run(talks, lines)
            told(kept, p)
        try:
            p.run(talks, -1)
        except KeyError as error:
            if p.on_main:
                print(repr(error))
        told(kept, p)

if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
"""


@pytest.mark.parametrize(
    ("engine", "logs"),
    [
        ("fork", True), ("forkserver", False), ("spawn", False), ("spawn", True),
        ("mpi", True), ("fork", False), ("mpi", False),
    ],
)  # fmt: skip
def test_what_workers_log_reaches_main_once(engine: str, logs: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOGGING_SCRIPT.replace("MODULE", MODULE))
    arguments = [str(script), engine, *(["logs"] if logs else [])]
    ranks = 3 if engine == "mpi" else None
    code, out, err = finish(*arguments, ranks=ranks, PYTHONWARNINGS="default")
    assert code == 0, err
    lines = out.splitlines()
    own = ["0|begins, 0|thread|ends|3", "0|begins, 0|thread|xxxxxxxxxxxxxxxx|xxxxxxxxxxxxxxxx"]
    assert lines[0] == own[0]
    assert lines[3].startswith(own[1])
    if logs or engine in ("forkserver", "spawn"):
        assert not err
        assert lines[1] == "1|begins, 1|Warning: careful|thread|ends|4"
        assert lines[2] == "2|begins, 2|thread|ends|3"
        assert [line.rpartition("|")[2] for line in lines[3:6]] == ["3003", "3003", "3003"]
        assert lines[6] == "KeyError(2)"
        assert lines[-1] == lines[2]  # what was logged before the error is not lost
    else:  # said by the process itself
        assert [lines[1], lines[2]] == ["1|0", "2|0"]
    assert "ends" not in err


def logs_into_a_file(path: str) -> None:
    logging.getLogger("kept").addHandler(logging.FileHandler(path))


def logs_for_its_file(*, parallelizer: Par) -> None:
    logging.getLogger("kept").warning("rank %d", parallelizer.id)


@pytest.mark.parametrize("logs", [None, True, False])
def test_a_handler_of_a_worker_keeps_what_it_takes(
    logs: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "worker.log"
    par = MultiprocessingParallelizer(
        2, start_method="spawn", initializer=logs_into_a_file, initargs=(str(path),), logs=logs
    )
    par.run(logs_for_its_file)
    assert path.read_text() == "rank 1\n"
    ranks = [getattr(record, "rank", 0) for record in caplog.records]
    assert ranks == ([0, 1] if logs else [0])


def logs_much_until_ended(path: Path, *, parallelizer: Par) -> None:
    if parallelizer.on_main:
        wait_until(path.exists)
        raise Odd(1, detail="ends it")
    try:
        for n in range(200):
            logging.getLogger("kept").warning("%d %s", n, "x" * 50_000)
        path.touch()
        time.sleep(60)
    finally:
        logging.getLogger("kept").warning("unwound")


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_what_was_logged_before_a_run_was_called_off(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MultiprocessingParallelizer(2, start_method=method, logs=True) as par:
        error = caught_from(par.run, logs_much_until_ended, tmp_path / "logged")
    assert isinstance(error, Odd)
    told = [record.message.split()[0] for record in caplog.records if record.name == "kept"]
    assert told == [*map(str, range(200)), "unwound"]


LEVELS_SCRIPT = """
import logging, sys
from MODULE import MultiprocessingParallelizer
log = logging.getLogger("my.library")

class Strange:
    def __reduce__(self):
        raise TypeError
    def __repr__(self):
        raise TypeError("of repr")

def says(what, parallelizer=None):
    if parallelizer is None or parallelizer.id:
        log.info(what, extra={"strange": Strange()})

class Prints(logging.Handler):
    def emit(self, record):
        if record.name == log.name:
            print(record.rank, record.getMessage(), record.strange)

if __name__ == "__main__":
    logging.getLogger().addHandler(Prints())
    log.setLevel("INFO")
    with MultiprocessingParallelizer(
        2, start_method=sys.argv[1], logs=True, initializer=says, initargs=("is born",)
    ) as p:
        p.run(says, "one")
        log.setLevel("ERROR")
        p.run(says, "two")
        log.setLevel("NOTSET")
        p.run(says, "three")
        logging.getLogger().setLevel("NOTSET")
        p.run(says, "four")
        logging.disable()
        p.run(says, "five")
        logging.disable("NOTSET")
        p.run(says, "six")
"""


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_workers_log_what_main_s_levels_let_pass(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LEVELS_SCRIPT.replace("MODULE", MODULE))
    told = run_program(str(script), method).splitlines()
    end = "a Strange, which cannot be shown: TypeError: of repr"
    assert told == [f"1 {what} {end}" for what in ("is born", "one", "four", "six")]


class Failing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "rank", 0):
            raise ValueError(f"given {record.getMessage()}")


def logs_often(*, parallelizer: Par) -> None:
    for n in range(3):
        logging.getLogger("kept").warning("record %d", n)
    parallelizer.wait()


def test_a_failing_handler_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    handler = Failing()
    logging.getLogger("kept").addHandler(handler)
    try:
        with MultiprocessingParallelizer(2, start_method="spawn") as par:
            par.run(logs_often)
            told = capsys.readouterr().err
            assert par.run(own_id) == 0
    finally:
        logging.getLogger("kept").removeHandler(handler)
    assert "in a handler of logging:" in told
    assert re.findall(r"ValueError: given (.*)", told) == ["record 0", "record 1", "record 2"]


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_chunks_are_taken_and_not_sent(method: str) -> None:
    """Where processes share memory, main need not answer for each chunk that somebody wants."""
    with MultiprocessingParallelizer(3, start_method=method) as par:
        par.run(maps_with, square, 2000)
        assert par.stats is not None
        assert par.stats[0].bytes_sent < 2000  # the call itself


def maps_again(x: int) -> list[int]:
    inner: Any = Parallelizer.lookup(None)
    return [*inner.map(square, [x, x + 1]), *inner.imap(square, range(2))]


def maps_inside_a_map(*, parallelizer: Par) -> Any:
    return parallelizer.map(maps_again, range(20)), list(parallelizer.imap(maps_again, range(20)))


@BOTH_WAYS
def test_map_inside_a_mapped_function_is_that_process_s_own(p: Par, way: Any) -> None:
    wanted = [[x * x, (x + 1) ** 2, 0, 1] for x in range(20)]
    expect(p, way(p, maps_inside_a_map), (wanted, wanted))


def gathers_for_an_item(x: int) -> Any:
    return Parallelizer.lookup(None).gather(x)


def gathers_inside_a_map(*, parallelizer: Par) -> Any:
    return parallelizer.map(gathers_for_an_item, range(20))


def test_a_collective_inside_a_mapped_function_is_an_error(p: Par) -> None:
    if p.nprocs > 1:
        expect_failure(p, ContractError, gathers_inside_a_map)
    else:
        expect(p, p.run(gathers_inside_a_map), [[x] for x in range(20)])


# The last digits of what is computed from an array depend on how it lies in memory, so all
# processes must find it laid out alike: row by row where it is cut into items or blocks, else as
# it was passed where that is contiguous, in either order, and row by row where it is not.

ODD_LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "every second": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "part": lambda a: np.pad(a, 3)[3:-3, 3:-3],
    "field": lambda a: np.rec.fromarrays([a, a], names="x,y")["x"],
    "misaligned": lambda a: np.frombuffer(b"-" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "big-endian": lambda a: a.astype(">f8")[::-1],
}


def digits(*values: Any, **options: Any) -> str:
    """Spell all bits of products and sums of the arrays that these values hold."""
    found = []
    for a in arrays_in([values, options]):
        found += [a @ a.T, a.sum(axis=0), np.fft.fft(a)]
        found += [a.T @ np.ones(len(a)), a.mean(axis=-1)] if a.ndim > 1 else []
    return "".join(np.asarray(result).tobytes().hex() for result in found)


def arrays_in(value: Any) -> Iterator[Array]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | Holder):
        yield from arrays_in([*(value if isinstance(value, dict) else vars(value)).values()])
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(arrays_in, value))


def sent(value: Any) -> Any:
    """Lay arrays out as another process gets them."""
    if isinstance(value, np.ndarray):
        return np.array(value, order="A", copy=True)
    if isinstance(value, Holder):
        return Holder(sent(value.array), value.label)
    if isinstance(value, dict):
        return dict(zip(value, map(sent, value.values()), strict=True))
    return type(value)(map(sent, value)) if isinstance(value, list | tuple) else value


def digits_of_each(block: Any) -> list[str]:
    return [digits(item) for item in block]


# Each calls verbs of `par` on numbers that lie in memory in the way of `a`, and says what digits
# came out, and by which calls of `digits` they must have.
Calls = tuple[Sequence[str], Sequence[tuple[Any, ...]]]


def by_rows(par: Par, a: Array) -> Calls:
    extra = a[:, 3], {"k": [a[1:9], Holder(a[:, 4], "x")]}
    calls = [(np.ascontiguousarray(row), *extra) for row in a]
    found = par.map(digits, a, extra) or []
    found += par.imap(digits, a, 2, extra)
    return found, calls * 2 * par.on_main


def by_items(par: Par, a: Array) -> Calls:
    bare = [a[:, i] for i in range(30)]
    found: list[str] = []
    calls: list[tuple[Any, ...]] = []
    for items in (bare, [[one] for one in bare], [Holder(one, "x") for one in bare]):
        par.map(digits, iter(items), (), {"k": bare[3]}, callback=found.append)
        found += par.map(digits, tuple(items), None, {"k": bare[3]}) or []
        found += par.imap(digits, iter(items), 3, None, {"k": bare[3]})
        calls += [(item, bare[3]) for item in items] * 3
    return found, calls * par.on_main


class Product:
    """A function that holds arrays, as itself and as a method, and counts its calls."""

    def __init__(self, *held: Any) -> None:
        self.held, self.calls = held, [0]

    def __call__(self, item: Any) -> str:
        self.calls[0] += 1
        return digits(item, *self.held)


def by_stars(par: Par, a: Array) -> Calls:
    pairs = [(a[:, i], {"k": a[:, i + 1]}) for i in range(20)]
    found = par.starmap(digits, pairs) or []
    return found, pairs * par.on_main


def by_functions(par: Par, a: Array) -> Calls:
    column = a[:, 7]
    product = Product(column, a)
    functions: list[Any] = [functools.partial(digits, k=column, l=a), product, product.__call__]
    functions.append(functools.partial(product))
    if par._runs_here():  # where each process has its own, and need not pickle it
        functions.append(lambda x: digits(x, column, a))
    found = [digits for f in functions for digits in par.map(f, range(5)) or []]
    found += [*par.imap(product, range(5))]
    assert product.calls == [20] or par.nprocs > 1  # what it counts by is its own
    return found, [(column, a)] * 5 * (len(functions) + 1) * par.on_main


def by_blocks(par: Par, a: Array) -> Calls:
    columns = [a[:, i] for i in range(20)]
    found = par.map(digits_of_each, a, vectorized=True) or []
    found += par.map(digits_of_each, columns, vectorized=True) or []
    calls = [(one,) for one in [*map(np.ascontiguousarray, a), *columns]]
    return found, calls * par.on_main


def column(a: Array, i: int) -> Array:
    return a[:, i]


def by_results(par: Par, a: Array) -> Calls:
    take = functools.partial(column, a)
    results = [*(par.map(take, range(20)) or []), *par.imap(take, range(20))]
    return [digits(one) for one in results], [(a[:, i],) for i in range(20)] * 2 * par.on_main


def by_broadcast(par: Par, a: Array) -> Calls:
    values = [a, a[:, 3], [a[:, 4]], {"k": (a[1:9], a.T)}, Holder(a[2:5, ::3], "x")]
    return [digits(par.broadcast(one)) for one in values], [(one,) for one in values]


def by_scatter(par: Par, a: Array) -> Calls:
    items = [a, [a[:, i] for i in range(20)], [Holder(a[:, i], "x") for i in range(20)]]
    blocks: list[Any] = [block_of(one, par.id, par.nprocs) for one in items]
    blocks[0] = np.ascontiguousarray(blocks[0])
    return [digits(par.scatter(one)) for one in items], [(block,) for block in blocks]


def by_gather(par: Par, a: Array) -> Calls:
    values = [a[:, 3], [a[:, 4]], Holder(a[2:5, ::3], "x")]
    found = [par.allgather(one, concatenate=False) for one in values]
    found += [par.gather(one, concatenate=False) for one in values] if par.on_main else []
    if not par.on_main:
        assert all(in_worker(par.gather(one, concatenate=False)) for one in values)
    calls = [([one] * par.nprocs,) for one in values] * (1 + par.on_main)
    found.append(par.allgather(a[:, ::2]))
    calls.append((joined([a[:, ::2]] * par.nprocs),))
    return [digits(one) for one in found], calls


def by_reduction(par: Par, a: Array) -> Calls:
    found = [par.allreduce(a[:, 3], "max"), par.allreduce(a, lambda _, y: y[:, ::2])]
    calls = [(a[:, 3],), (sent(a)[:, ::2] if par.nprocs > 1 else a,)]
    return [digits(one) for one in found], calls


def by_messages(par: Par, a: Array) -> Calls:
    for rank in range(par.nprocs):
        par.send([a[:, 3], a], rank)
    found = [par.receive(rank) for rank in range(par.nprocs)]
    return [digits(one) for one in found], [([a[:, 3], a],)] * par.nprocs


WAYS = [by_rows, by_items, by_stars, by_functions, by_blocks, by_results]
IN_RUN = [by_broadcast, by_scatter, by_gather, by_reduction, by_messages]


def keeps_the_bits(way: Callable[..., Calls], parallelizer: Par) -> None:
    numbers = np.random.default_rng(1).standard_normal((36, 300)) * np.logspace(0, 9, 300)
    for name, lay in ODD_LAYOUTS.items():
        found, calls = way(parallelizer, lay(numbers))
        wanted = [digits(*sent(call)) for call in calls]
        check(found, wanted, f"{way.__name__} of {name}")


@pytest.mark.parametrize("way", [*WAYS, *IN_RUN])
def test_bits_do_not_depend_on_the_layout_of_what_was_passed(p: Par, way: Any) -> None:
    p.run(functools.partial(keeps_the_bits, way))
    if way in WAYS:
        drive(p, keeps_the_bits, way)


def gathers_digits(*args: Any, parallelizer: Par, **options: Any) -> Any:
    return parallelizer.gather(digits(*args, **options))


def test_arguments_of_run_are_laid_out_alike(p: Par) -> None:
    numbers = np.random.default_rng(1).standard_normal((36, 300)) * np.logspace(0, 9, 300)
    for lay in ODD_LAYOUTS.values():
        a = lay(numbers)
        args, options = (a, [a[:, 3]], Holder(a[:, 4], "x")), {"k": a[:, 5], "l": {"m": a[1:7]}}
        wanted = digits(*sent((*args, *options.values())))
        expect(p, p.run(gathers_digits, *args, **options), [wanted] * p.nprocs)
        partial = functools.partial(gathers_digits, *args)
        expect(p, p.run(partial, **options), [wanted] * p.nprocs)


def gathers_dtypes(array: Array, *, parallelizer: Par) -> Any:
    return parallelizer.gather(array.dtype.str), parallelizer.map(dtype_of, [0] * 9, (array,))


def dtype_of(_: int, array: Array) -> str:
    return str(array.dtype.str)


def test_arguments_have_the_same_order_of_bytes_everywhere(p: Par) -> None:
    """That of a subclass which numpy pickles, as it is when numpy unpickles it."""
    found = p.run(gathers_dtypes, np.arange(9.0).astype(">f8").view(Quantity))
    native = np.dtype("f8").str
    expect(p, found, ([native] * p.nprocs, [native] * 9))


def maps_with_a_bar(*, parallelizer: Par) -> Any:
    result = parallelizer.map(square, range(5), progress=True)
    stream = list(parallelizer.imap(square, range(5), progress=True))
    assert stream == (result if parallelizer.on_main else [])
    return result


def test_map_shows_its_progress(p: Par) -> None:
    if importlib.util.find_spec("tqdm"):
        expect(p, p.run(maps_with_a_bar), [0, 1, 4, 9, 16])
    else:
        error = failure(p, maps_with_a_bar)
        expect(p, isinstance(error, ImportError) and "pip install" in str(error), True)
    expect_to_work(p)


class Bar:
    """Stands for tqdm's, and notes how far it has come."""

    told: ClassVar[list[int]] = []

    def __init__(self, **_: Any) -> None:
        self.n = 0

    def update(self, count: int) -> None:
        self.n += count
        self.told.append(self.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        """It stays where it is."""


@pytest.mark.parametrize("verb", ["map", "imap"])
def test_progress_is_shown_when_it_is_made(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(Bar, "told", [])
    mapped = getattr(SerialNonParallelizer(), verb)(square, range(50), 10, progress=True)
    assert list(mapped) == [x * x for x in range(50)]
    assert Bar.told[:5] == [10, 20, 30, 40, 50]


class PickyError(Exception):
    """Is made of other arguments than its `args`, and holds more than them."""

    def __init__(self, item: int, *, why: str) -> None:
        super().__init__(f"item {item}: {why}")
        self.item = item


def third_fails(item: int, scale: int = 1, *, rng: Any = None) -> Any:
    """Raise for each third item; one of the exceptions cannot be pickled."""
    if item == 9:
        raise type("LocalError", (Exception,), {})("of a class that only one process knows")
    if item % 3 == 0:
        raise PickyError(item, why="a third")
    return (item * scale, rng.random()) if rng is not None else item * scale


def maps_with_errors(verb: str, options: dict[str, Any], *, parallelizer: Par) -> Any:
    items = [(n,) for n in range(20)] if verb == "starmap" else range(20)
    results = getattr(parallelizer, verb)(third_fails, items, on_error="return", **options)
    return list(results) if verb.startswith("imap") else results


def told_of_results(results: list[Any]) -> list[Any]:
    """Of exceptions, what they say and hold, and what caused them."""
    return [
        (
            type(one).__name__,
            re.sub(r"rank \d", "a rank", str(one).partition("\n")[0])[:40],
            vars(one),
            type(one.__cause__),
        )
        if isinstance(one, Exception)
        else one
        for one in results
    ]


@pytest.mark.parametrize("where", ["run", "drive"])
@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("map", {}),
        ("map", {"chunksize": 1, "seed": 3}),
        ("map", {"extra_args": (5,), "callback": str}),
        ("starmap", {"chunksize": 7}),
        ("imap", {"chunksize": 3}),
        ("imap_unordered", {"seed": 3}),
    ],
)
def test_an_error_may_cost_its_item_alone(
    p: Par, verb: str, options: dict[str, Any], where: str
) -> None:
    alone = SerialNonParallelizer()
    wanted = told_of_results(maps_with_errors(verb, options, parallelizer=alone))
    assert [type(one) is tuple and one[0] for one in wanted].count("PickyError") == 6
    if where == "run":
        results = p.run(maps_with_errors, verb, options)
    else:
        results = maps_with_errors(verb, options, parallelizer=p)
    if p.on_main:
        found = told_of_results(results)
        assert sorted(map(repr, found)) == sorted(map(repr, wanted))
        assert verb == "imap_unordered" or found == wanted
        assert "third_fails" in str(
            results[0].__cause__ if verb != "imap_unordered" else "third_fails"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_error": "ignore"}, "must be"), ({"on_error": "return", "vectorized": True}, "items")],
)
def test_what_to_do_on_an_error_is_checked(p: Par, options: dict[str, Any], message: str) -> None:
    expect_failure(p, ValueError, maps_wrongly, options, message)


def maps_wrongly(options: dict[str, Any], message: str, *, parallelizer: Par) -> None:
    with pytest.raises(ValueError, match=message):
        parallelizer.map(third_fails, range(5), **options)
    raise ValueError(message)


# ---------------------------------------------------------------------------------------------
# Other people's programs, which ask for a pool: the libraries themselves, against their own
# serial runs


def log_density(x: Array, width: float = 1.0) -> float:
    return float(-0.5 * np.sum((x / width) ** 2))


def unit_cube(u: Array) -> Array:
    return 10 * u - 5


def rosenbrock(x: Array) -> float:
    return float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2))


def by_emcee(pool: Any) -> Any:
    emcee = importlib.import_module("emcee")
    start = np.random.default_rng(1).normal(size=(8, 2))
    sampler = emcee.EnsembleSampler(8, 2, log_density, args=(2.0,), pool=pool)
    sampler.random_state = np.random.RandomState(2).get_state()
    sampler.run_mcmc(start, 20)
    return sampler.get_chain(), sampler.get_log_prob()


def by_dynesty(pool: Any) -> Any:
    dynesty = importlib.import_module("dynesty")
    rng = np.random.default_rng(3)
    # As many at a time with and without a pool, as that decides which points are tried.
    mapper = pool or types.SimpleNamespace(map=lambda f, xs, **_: [*map(f, xs)], size=4)
    sampler = dynesty.NestedSampler(
        log_density, unit_cube, 2, nlive=30, rstate=rng, pool=mapper, queue_size=4
    )
    sampler.run_nested(dlogz=2.0, print_progress=False)
    return sampler.results.samples, sampler.results.logz


def by_scipy(pool: Any) -> Any:
    optimize = importlib.import_module("scipy.optimize")
    workers = 1 if pool is None else pool.map
    options = {"maxiter": 5, "popsize": 5, "polish": False, "updating": "deferred"}
    best = optimize.differential_evolution(
        rosenbrock, [(-2, 2)] * 3, rng=np.random.default_rng(4), workers=workers, **options
    )
    return best.x, best.fun, best.nfev


def by_a_user_of_pools(pool: Any) -> Any:
    with contextlib.ExitStack() as stack:
        if pool is None:
            pool = stack.enter_context(multiprocessing.Pool(2))
        return [
            pool.map(square, {1, 2, 3}),
            pool.map(square, (x for x in range(7)), chunksize=2),
            pool.starmap(pow, [(2, 3), (3, 2)], chunksize=1),
            list(pool.imap(square, range(9), 2)),
            next(pool.imap(square, iter([5]))),
            sorted(pool.imap_unordered(square, range(9), chunksize=2)),
        ]


def lends_itself(program: Callable[[Any], Any], *, parallelizer: Par) -> Any:
    return program(parallelizer)


@pytest.mark.parametrize("program", [by_emcee, by_dynesty, by_scipy, by_a_user_of_pools])
def test_ecosystem(p: Par, program: Callable[[Any], Any]) -> None:
    expect(p, drive(p, lends_itself, program), program(None) if p.on_main else None)


def who_computes(item: Any, extra: int = 0) -> Any:
    return item, extra, os.getpid()


def maps_without_main(*, parallelizer: Par) -> Any:
    """Results, and who computed them, by each way to map."""
    p, data = parallelizer, list(range(40))
    found = [
        p.map(who_computes, data, (1,)),
        p.map(who_computes, data, chunksize=1, callback=str),
        p.starmap(who_computes, zip(data, data, strict=True)),
        list(p.imap(who_computes, iter(data))),
        list(p.imap_unordered(who_computes, data, 3)),
        p.map(who_computes_a_block, np.arange(41), vectorized=True, concatenate=False),
    ]
    return found if p.on_main else None


def who_computes_a_block(block: Any) -> Any:
    return block.tolist(), os.getpid()


def check_without_main(found: Any, nprocs: int) -> None:
    main, (with_extra, called_back, starred, *streams, blocks) = os.getpid(), found
    assert with_extra == [(n, 1, pid) for n, (_, _, pid) in enumerate(with_extra)]
    assert called_back == [(n, 0, pid) for n, (_, _, pid) in enumerate(called_back)]
    assert starred == [(n, n, pid) for n, (_, _, pid) in enumerate(starred)]
    for stream in streams:
        assert sorted(n for n, _, _ in stream) == list(range(40))
    assert [n for block, _ in blocks for n in block] == list(range(41))
    workers = {pid for some in (with_extra, called_back, starred, *streams) for *_, pid in some}
    workers |= {pid for _, pid in blocks}
    if nprocs == 1:
        assert workers == {main}
    else:
        assert main not in workers
        assert len(blocks) == nprocs - 1


@pytest.mark.parametrize("where", ["run", "drive", "client"])
@pytest.mark.parametrize(("method", "nprocs"), [*((m, 3) for m in MULTIPROCESSING), ("fork", 1)])
def test_main_may_compute_nothing(method: str, nprocs: int, where: str) -> None:
    alone = where != "client"
    par = MultiprocessingParallelizer(nprocs, start_method=method, main_computes=not alone)
    with par:
        if where == "run":
            found = par.run(maps_without_main)
        elif where == "drive":
            found = maps_without_main(parallelizer=par)
        else:
            client = ClientServerRunner(maps_without_main, parallelizer=par, main_computes=False)
            found = client.run()
        check_without_main(found, nprocs)
        assert par.main_computes == (where == "client")
        if where == "client":
            assert os.getpid() in {pid for *_, pid in par.map(who_computes, range(300))}


def test_a_client_may_compute_nothing(p: Par) -> None:
    found = ClientServerRunner(maps_without_main, parallelizer=p, main_computes=False).run()
    if p.on_main:
        check_without_main(found, p.nprocs)


def crashes(item: int) -> None:  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_costs_main_nothing_where_it_computes_nothing() -> None:
    with MultiprocessingParallelizer(2, main_computes=False) as par:
        with pytest.raises(WorkerDied, match="SIGSEGV"):
            par.map(crashes, range(3))
        assert par.map(abs, [-1, -2]) == [1, 2]


def notes_and_dies(item: int, folder: str, deadly: tuple[int, ...], rng: Any = None) -> Any:
    """Note that it was called; a deadly item kills its process the first time it is computed."""
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{item}\n")
    if item in deadly and multiprocessing.parent_process() is not None:
        with contextlib.suppress(FileExistsError):
            (Path(folder) / str(item)).touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    return np.arange(item), None if rng is None else rng.random()


def calls_in(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "calls").read_text().split()]


@pytest.mark.parametrize("main_computes", [True, False])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_deaths_cost_what_was_being_computed(
    method: str, main_computes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deadly = (3, 41)
    wanted = SerialNonParallelizer().map(notes_and_dies, range(60), (str(tmp_path), ()), seed=5)
    (tmp_path / "calls").unlink()
    called_back: list[Any] = []
    par = MultiprocessingParallelizer(3, start_method=method, main_computes=main_computes)
    with par, caplog.at_level("WARNING", "parallelizer"):
        found = par.map(
            notes_and_dies, range(60), (str(tmp_path), deadly), retries=2,
            callback=called_back.append, seed=5, chunksize=3,
        )  # fmt: skip
        check(found, wanted)
        check(called_back, wanted)
        calls = calls_in(tmp_path)
        assert set(calls) == set(range(60))
        # At each death, the chunk of the dead, and those that others had in hand, or on their way.
        assert len(calls) < 2 * 60
        # Unless main came to it, which does not die of it.
        messages = [record.getMessage() for record in caplog.records]
        told = [message for message in messages if "died" in message]
        assert len(told) <= 2
        told_of = r"computing item (3|41) of a map\. It held [\d.]+ GiB when last seen"
        assert all(re.search(told_of, one) for one in told)
        assert par.map(abs, [-1]) == [1]


def kills(item: int) -> int:
    if item == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_an_item_that_kills_every_worker_is_named(method: str) -> None:
    with MultiprocessingParallelizer(2, start_method=method, main_computes=False) as par:
        with pytest.raises(WorkerDied, match=r"item 13 of a map") as caught:
            par.map(kills, range(20), chunksize=1, retries=2)
        assert any(
            re.match(r"\d+ of 20 results had been received", n) for n in caught.value.__notes__
        )
        assert par.map(kills, range(5), retries=1) == list(range(5))


def test_retries_and_checkpoints_are_checked(p: Par) -> None:
    if p.nprocs > 1:
        expect_failure(p, ContractError, retries_within_a_run)
    expect_failure(p, ValueError, maps_wrongly, {"retries": -1}, "retries must be")
    blocks = {"retries": 1, "vectorized": True}
    expect_failure(p, ValueError, maps_wrongly, blocks, "are for the results of items")


def retries_within_a_run(*, parallelizer: Par) -> None:
    parallelizer.map(abs, range(3), retries=1)


def sleeps_or_sticks(item: int, folder: str) -> int:
    if item == 3:
        time.sleep(60)
    if item == 5:
        try:
            Path(folder, "stuck").touch(exist_ok=False)
        except FileExistsError:
            return 25
        sum(range(10**13))  # which holds the interpreter for hours
    return item * item


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_an_item_that_takes_too_long(method: str, tmp_path: Path) -> None:
    given = (str(tmp_path),)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        with pytest.raises(TimeoutError, match=r"took longer than 1 s"):
            par.map(sleeps_or_sticks, range(5), given, item_timeout=1)
        told = r"did not heed item_timeout=1 within 1 s. It was computing item 1 of a map"
        with pytest.raises(WorkerDied, match=told):
            par.map(sleeps_or_sticks, range(4, 9), given, item_timeout=1, chunksize=1)
        (tmp_path / "stuck").unlink()
        found = par.map(
            sleeps_or_sticks, range(9), given, item_timeout=1, retries=1, on_error="return"
        )
        assert found[:3] + found[4:] == [0, 1, 4, 16, 25, 36, 49, 64]
        assert type(found[3]) is TimeoutError
        assert par.map(abs, [-1]) == [1]


def test_an_item_that_takes_too_long_on_one_process() -> None:
    before = signal.getsignal(signal.SIGALRM)
    found = SerialNonParallelizer().map(
        time.sleep, [0.0, 10.0, 0.0], item_timeout=1, on_error="return"
    )
    assert (found[0], type(found[1]), found[2]) == (None, TimeoutError, None)
    assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(ValueError, match="item_timeout must be"):
        SerialNonParallelizer().map(abs, [1], item_timeout=0)


def slow_square(item: int, folder: str, bad: int | None) -> int:
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{item}\n")
    time.sleep(0.05)
    if item == bad:
        raise KeyError(item)
    return item * item


def lasts(backend: str, folder: str, bad: int | None = None) -> None:
    """The program of the tests below: main is a client, as it must be under MPI."""

    def client(*, parallelizer: Par) -> Any:
        path = Path(folder) / "checkpoint"
        given = (folder, bad)
        return parallelizer.map(slow_square, range(80), given, chunksize=2, checkpoint=path)

    options = {} if backend in ("serial", "mpi") else {"nprocs": 3, "start_method": backend}
    par = Parallelizer.from_config("multiprocessing" if options else backend, **options)
    found = ClientServerRunner(client, parallelizer=par).run()
    if par.on_main:
        assert found == [n * n for n in range(80)]
        print("whole", flush=True)


def check_that_it_goes_on(backend: str, folder: Path) -> None:
    before = calls_in(folder)
    assert 10 < len(before) < 80
    with (folder / "checkpoint").open("ab") as file:
        file.write(b"\x50\0\0\0\0\0\0\0torn")  # a record that was being written
    call = f"import test_parallelizer as t; t.lasts({backend!r}, {str(folder)!r})"
    code, out, err = finish("-c", call, ranks=3 if backend == "mpi" else None)
    assert (code, out) == (0, "whole\n"), err
    calls = calls_in(folder)
    assert set(calls) == set(range(80))
    # A chunk for each process, and what was on its way.
    assert len([n for n in calls[len(before) :] if n in before]) <= 3 * 2 * 3


@pytest.mark.parametrize("backend", ["serial", *MULTIPROCESSING])
def test_a_map_goes_on_where_its_program_was_killed(backend: str, tmp_path: Path) -> None:
    call = f"import test_parallelizer as t; t.lasts({backend!r}, {str(tmp_path)!r})"
    checkpoint = tmp_path / "checkpoint"
    with started(call) as program:
        wait_until(lambda: checkpoint.exists() and checkpoint.stat().st_size > 1000)
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        wait_until(lambda: not group_members(program.pid))
    check_that_it_goes_on(backend, tmp_path)


def test_a_map_goes_on_where_its_mpi_job_has_failed(tmp_path: Path) -> None:
    call = f"import test_parallelizer as t; t.lasts('mpi', {str(tmp_path)!r}, 50)"
    code, _, err = finish("-c", call, ranks=3)
    assert code == 1
    assert "KeyError: 50" in err
    check_that_it_goes_on("mpi", tmp_path)


def test_a_checkpoint_is_of_one_map(tmp_path: Path) -> None:
    alone, path = SerialNonParallelizer(), tmp_path / "some" / "checkpoint"
    with pytest.raises(FileNotFoundError):
        alone.map(abs, range(3), checkpoint=path)
    path.parent.mkdir()
    assert alone.map(abs, range(-3, 0), checkpoint=path) == [3, 2, 1]
    whole = path.read_bytes()
    assert alone.map(abs, range(-3, 0), checkpoint=path) == [3, 2, 1]
    assert path.read_bytes() == whole
    path.write_bytes(whole[:50])  # torn within its head: the program was killed at the beginning
    assert alone.map(abs, range(-3, 0), checkpoint=path) == [3, 2, 1]
    assert path.read_bytes() == whole
    others: list[tuple[Any, Any, Any, str]] = [
        (abs, range(4), {}, "items: 3 there, 4 here"),
        (float, range(3), {}, "function: 'builtins.abs' there, 'builtins.float' here"),
        (adds_noise, range(3), {"seed": 2}, "seed: 'None' there, "),
    ]
    for func, items, options, differs in others:
        with pytest.raises(ValueError, match=differs):
            alone.map(func, items, checkpoint=path, **options)
    assert path.read_bytes() == whole
    path.write_bytes(b"what somebody has written, and nobody may lose")
    with pytest.raises(ValueError, match="is not the checkpoint of a map"):
        alone.map(abs, range(3), checkpoint=path)
    assert path.read_bytes().startswith(b"what somebody")


def adds_noise(item: int, rng: Any) -> float:
    return float(item + rng.random())


def test_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    """What was written is there, and a later call goes on from it."""
    path = tmp_path / "checkpoint"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MultiprocessingParallelizer(2) as par:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
            with pytest.raises(OSError, match="too large"):
                par.map(adds_noise, range(200), seed=1, checkpoint=path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert 1000 < path.stat().st_size <= 3000
        wanted = par.map(adds_noise, range(200), seed=1)
        assert par.map(adds_noise, range(200), seed=1, checkpoint=path) == wanted


class ExitsWhereItArrives:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def holds_what_exits() -> ExitsWhereItArrives:
    return ExitsWhereItArrives()


def submits(executor_module: Any, par: Par) -> None:
    """What an executor must do, on workers of any kind."""
    kind = executor_module.ParallelizerExecutor
    with kind(par) as executor:
        squares = {executor.submit(square, number): number for number in range(50)}
        for future in concurrent.futures.as_completed(squares):
            assert future.result() == squares[future] ** 2
        deeper = executor.submit(square, executor.submit(square, 3).result())  # of what has come
        assert deeper.result() == 81
        array = np.arange(1e5)
        check(executor.submit(np.sqrt, array).result(), np.sqrt(array))
        failed = executor.submit(raises_odd, 7)
        with pytest.raises(Odd) as caught:
            failed.result()
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "raises_odd" in str(caught.value.__cause__)
        for bad in (executor.submit(abs, threading.Lock()), executor.submit(threading.Lock)):
            assert isinstance(bad.exception(), TypeError)
        assert isinstance(executor.submit(holds_what_exits).exception(), SystemExit)
        assert list(executor.map(square, range(3))) == [0, 1, 4]
        slow = [executor.submit(time.sleep, 0.2) for _ in range(40)]
        assert slow[-1].cancel()
        executor.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(abs, 1)
    assert not concurrent.futures.wait(slow, timeout=20).not_done
    assert any(future.cancelled() for future in slow[:-1])


def raises_odd(code: int) -> None:
    raise Odd(code, detail="in a job")


@pytest.fixture
def executor_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE / "examples"))
    return importlib.import_module("executor")


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_an_executor(method: str, executor_module: Any) -> None:
    submits(executor_module, MultiprocessingParallelizer(3, start_method=method))


def test_an_executor_that_cannot_work_says_so(executor_module: Any) -> None:
    """It neither waits for a parallelizer that is busy, nor deals to workers that never come up."""
    kind = executor_module.ParallelizerExecutor
    with MultiprocessingParallelizer(2) as par:
        with kind(par) as executor, pytest.raises(ContractError, match="busy"):
            kind(par)
        with pytest.raises(ContractError, match="busy"):
            par.run(opens_an_executor)
        with kind(par) as executor:
            assert executor.submit(square, 3).result() == 9
    with pytest.raises(JobError):
        kind(MultiprocessingParallelizer(2, initializer=raises_job_error))


def opens_an_executor(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        importlib.import_module("executor").ParallelizerExecutor(parallelizer)


def raises_job_error() -> None:
    raise JobError("at birth", 1)


def test_an_executor_limits_and_kills(executor_module: Any) -> None:
    """At most so many jobs at a time, none by main; what computes is killed if so told."""
    with MultiprocessingParallelizer(4) as par:
        with executor_module.ParallelizerExecutor(par, 2) as executor:
            spans = [executor.submit(sleeps_and_tells, 0.05) for _ in range(8)]
            found = [one.result() for one in spans]
            assert os.getpid() not in {pid for pid, *_ in found}
            for _, begun, _ in found:
                assert sum(start <= begun < end for _, start, end in found) <= 2
            asleep = [executor.submit(time.sleep, 1000) for _ in range(4)]
            assert not concurrent.futures.wait(asleep, timeout=0.5).done
            executor.kill_workers()
            assert [one.cancelled() for one in asleep] == [False, False, True, True]
        assert par.main_computes
        assert par.map(square, range(3)) == [0, 1, 4]


def sleeps_and_tells(seconds: float) -> tuple[int, float, float]:
    begun = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), begun, time.monotonic()


@pytest.mark.parametrize("method", MULTIPROCESSING if CLOUDPICKLE else [])
def test_an_executor_of_a_program_that_is_no_file(method: str) -> None:
    program = f"""
        from executor import ParallelizerExecutor
        from parallelizer import MultiprocessingParallelizer

        class Point:
            def __init__(self, x): self.x = x

        def doubled(point): return Point(2 * point.x)

        parallelizer = MultiprocessingParallelizer(2, start_method={method!r})
        with ParallelizerExecutor(parallelizer) as executor:
            found = executor.submit(doubled, Point(4)).result()
            print(isinstance(found, Point), found.x)
    """
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    assert run_program("-c", textwrap.dedent(program), PYTHONPATH=folders) == "True 8\n"


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_an_executor_outlives_its_workers(method: str, executor_module: Any) -> None:
    par = MultiprocessingParallelizer(2, start_method=method)
    with executor_module.ParallelizerExecutor(par) as executor:
        for _ in range(3):
            died = executor.submit(os._exit, 3)
            with pytest.raises(concurrent.futures.process.BrokenProcessPool) as caught:
                died.result()
            assert isinstance(caught.value.__cause__, WorkerDied)
            assert executor.submit(square, 3).result() == 9


def test_the_example_of_an_executor() -> None:
    wanted = f"{[(n, divmod(n, 7)) for n in range(3)]}\n"
    assert run_program("examples/executor.py") == wanted  # and no warning: it forks before threads
    assert run_program("examples/executor.py", "--mpi", ranks=3) == wanted


def scores(jobs: int) -> list[Any]:
    """What scikit-learn finds, by two estimators that have random numbers and BLAS in them."""
    datasets, ensemble, linear_model, selection = (
        importlib.import_module(f"sklearn.{name}")
        for name in ("datasets", "ensemble", "linear_model", "model_selection")
    )
    features, labels = datasets.make_classification(200, random_state=0)
    model = ensemble.RandomForestClassifier(5, random_state=0)
    search = selection.GridSearchCV(model, {"max_depth": [1, 2, 4]}, n_jobs=jobs)
    search.fit(features, labels)
    model = linear_model.LogisticRegression()
    folds = selection.cross_val_score(model, features, labels, n_jobs=jobs)
    return [search.best_params_, search.cv_results_["mean_test_score"], folds]


def uses_joblib(*, parallelizer: Par) -> None:
    """What joblib's users expect, on workers of any kind."""
    joblib: Any = importlib.import_module("joblib")
    importlib.import_module("joblib_backend")
    tasks, limits = joblib.Parallel, importlib.import_module("threadpoolctl").threadpool_limits
    with limits(1):  # as on the workers, where the last digits depend on it
        wanted = scores(1)
    one_thread = joblib.parallel_config(
        "parallelizer", parallelizer=parallelizer, inner_max_num_threads=1
    )
    with one_thread:
        assert joblib.effective_n_jobs(-1) == joblib.effective_n_jobs(7) == 2
        check(scores(-1), wanted)
        assert os.getpid() not in tasks(2)(joblib.delayed(os.getpid)() for _ in range(9))
        assert tasks(2)(joblib.delayed(calls_in_a_call)(x) for x in range(5)) == [0, 1, 3, 6, 10]
        error = caught_from(tasks(2), (joblib.delayed(raises_odd)(x) for x in range(9)))
        assert type(error) is Odd
        assert isinstance(error.__cause__, RemoteTraceback)
        results = tasks(2, return_as="generator")(joblib.delayed(square)(x) for x in range(99))
        assert next(results) == 0
        assert tasks(2)(joblib.delayed(square)(x) for x in range(3)) == [0, 1, 4]  # meanwhile
        assert list(results) == [x * x for x in range(1, 99)]
    for threads in (1, 2):
        with joblib.parallel_config("parallelizer", inner_max_num_threads=threads):
            found = tasks(2)(joblib.delayed(threads_of_blas)() for _ in range(4))
            assert found == [{threads}] * 4
    assert parallelizer.run(uses_joblib_in_run) == [0, 1, 4]
    if isinstance(parallelizer, MultiprocessingParallelizer):  # elsewhere, a death ends the job
        with joblib.parallel_config("parallelizer", n_jobs=2):
            loses_workers(joblib)
    print("joblib is content")


def loses_workers(joblib: Any) -> None:
    died = caught_from(joblib.Parallel(), (joblib.delayed(os._exit)(3) for _ in range(9)))
    assert isinstance(died, concurrent.futures.process.BrokenProcessPool)
    assert isinstance(died.__cause__, WorkerDied)
    endless = (joblib.delayed(time.sleep)(1000) for _ in range(9))
    assert isinstance(
        caught_from(joblib.Parallel(timeout=0.1), endless), joblib.parallel.TimeoutError
    )
    assert joblib.Parallel()(joblib.delayed(square)(x) for x in range(3)) == [0, 1, 4]


def use_joblib(engine: str) -> None:
    """A program of its own, as libraries that run threads come with scikit-learn."""
    ClientServerRunner(uses_joblib, parallelizer=create(engine)).run()


@pytest.mark.parametrize("engine", ["forkserver", "spawn", "mpi"])
def test_joblib_and_scikit_learn(engine: str) -> None:
    call = f"import test_parallelizer; test_parallelizer.use_joblib({engine!r})"
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    ranks = 3 if engine == "mpi" else None
    assert run_program("-c", call, ranks=ranks, PYTHONPATH=folders) == "joblib is content\n"


def test_joblib_without_a_parallelizer() -> None:
    """Processes come up for the call, with what was given for them; what is no file travels."""
    program = """
        import joblib
        import os
        from joblib_backend import ParallelizerBackend

        def told(x): return x, os.environ["TOLD"], os.environ["OMP_NUM_THREADS"]

        def tell(): os.environ["TOLD"] = "yes"

        options = {"initializer": tell, "start_method": "forkserver", "inner_max_num_threads": 2}
        with joblib.parallel_config("parallelizer", n_jobs=2, **options):
            print(joblib.Parallel()(joblib.delayed(told)(x) for x in range(3)))
    """
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    found = run_program("-c", textwrap.dedent(program), PYTHONPATH=folders)
    assert found == f"{[(x, 'yes', '2') for x in range(3)]}\n"


def calls_in_a_call(number: int) -> int:
    """On a worker: sums up by both kinds of call that may be in there."""
    joblib: Any = importlib.import_module("joblib")
    by_default, by_name = joblib.Parallel(2), joblib.Parallel(2, "parallelizer")
    parts = by_default(joblib.delayed(abs)(-x) for x in range(number + 1))
    assert by_name(joblib.delayed(abs)(-x) for x in range(number + 1)) == parts
    return sum(parts)


def threads_of_blas() -> set[int]:
    limits: Any = importlib.import_module("threadpoolctl")
    return {found["num_threads"] for found in limits.threadpool_info()}


def uses_joblib_in_run(*, parallelizer: Par) -> list[int] | None:
    if not parallelizer.on_main:
        return None
    joblib: Any = importlib.import_module("joblib")
    found: list[int] = joblib.Parallel(2, "parallelizer")(
        joblib.delayed(square)(x) for x in range(3)
    )
    return found


def test_what_samplers_look_for_in_a_pool(p: Par) -> None:
    assert p.size == p._processes == p.nprocs
    assert callable(p.map)
    assert not hasattr(p, "no_such_thing")
    for name, instead in {"apply_async": "imap_unordered", "map_async": "imap(f, items)"}.items():
        assert not hasattr(p, name)
        with pytest.raises(AttributeError, match=re.escape(instead)):
            getattr(p, name)
    with p, pytest.raises(TypeError, match=r"write starmap\(f, \[args\]\)\[0\]"):
        p.apply(halved, (7,))


def halved(number: float) -> float:
    return number / 2


def test_closed_as_a_pool_is(fresh: Par) -> None:
    fresh.__enter__()
    fresh.__enter__()
    if not isinstance(fresh, MPIParallelizer):  # there, map is called inside a run, or by a client
        assert fresh.map(abs, [-1]) == [1]
    with pytest.raises(ValueError, match="still open"):
        fresh.join()
    with pytest.raises(ContractError, match="inside its own run"):
        fresh.run(closes_itself)
    fresh.terminate()
    fresh.join()
    fresh.close()
    with fresh:
        expect(fresh, fresh.run(ranks), list(range(fresh.nprocs)))


def closes_itself(*, parallelizer: Par) -> None:
    parallelizer.close()


def works_until(began: Path, over: Path, item: int) -> int:
    began.touch()
    while not over.exists():
        time.sleep(0.01)
    return item


def waits_for(began: Path, over: Path, *, parallelizer: Par) -> Any:
    return parallelizer.gather(works_until(began, over, parallelizer.id))


WORK_TO_CLOSE: dict[str, Callable[[Par, Any], Any]] = {
    "run": lambda par, paths: par.run(waits_for, *paths),
    "map": lambda par, paths: par.starmap(works_until, [(*paths, n) for n in range(3)]),
    "imap": lambda par, paths: list(par.imap(functools.partial(works_until, *paths), range(99))),
    "retries": lambda par, paths: par.map(
        functools.partial(works_until, *paths), range(99), retries=3
    ),
}


@pytest.mark.parametrize("method", MULTIPROCESSING)
@pytest.mark.parametrize("how", ["close", "terminate"])
@pytest.mark.parametrize("work", WORK_TO_CLOSE)
def test_closed_by_another_thread(method: str, how: str, work: str, tmp_path: Path) -> None:
    began, over = tmp_path / "began", tmp_path / "over"
    par = MultiprocessingParallelizer(3, start_method=method).__enter__()
    ends: list[Any] = []

    def end_it() -> None:
        wait_until(began.exists)
        try:
            if how == "close":
                threading.Timer(0.2, over.touch).start()  # while it waits, if it does
            getattr(par, how)()
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=end_it)
    thread.start()
    try:
        if how == "close" and work in ("run", "map"):
            assert WORK_TO_CLOSE[work](par, (began, over)) == [0, 1, 2]
        else:
            with pytest.raises(ContractError, match=r"closed before its map|called terminate"):
                WORK_TO_CLOSE[work](par, (began, over))
    finally:
        over.touch()
        thread.join()
    assert ends == []
    assert par.id is None
    assert par.map(abs, [-1]) == [1]  # as one that is not open


@pytest.mark.parametrize("method", MULTIPROCESSING)
@pytest.mark.parametrize("how", ["close", "terminate"])
def test_closed_by_a_handler_amid_an_imap(method: str, how: str, tmp_path: Path) -> None:
    over = tmp_path / "over"
    found: list[Exception | None] = []

    def end_it(*_: object) -> None:
        found.append(caught_from(getattr(par, how)))
        over.touch()

    before = signal.signal(signal.SIGALRM, end_it)
    try:
        with MultiprocessingParallelizer(2, start_method=method, main_computes=False) as par:
            asks = functools.partial(asks_to_end, os.getpid(), over)
            assert list(par.imap(asks, range(3))) == [0, 1, 2]
            (error,) = found
            assert isinstance(error, ContractError)
            assert "closed inside its own run" in str(error)
            expect_to_work(par)
    finally:
        signal.signal(signal.SIGALRM, before)


def asks_to_end(pid: int, over: Path, item: int) -> int:
    if item == 0:
        os.kill(pid, signal.SIGALRM)
    wait_until(over.exists)
    return item


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_workers_are_replaced_where_that_is_asked_for(method: str) -> None:
    with MultiprocessingParallelizer(3, start_method=method) as par:
        before = par.run(pids)
        stream = par.imap(abs, itertools.count())
        next(stream)
        with pytest.raises(ContractError, match="while an imap is in progress"):
            par.restart()
        stream.close()  # type: ignore[attr-defined]
        par.restart()
        after = par.run(pids)
        assert after[0] == before[0]
        assert not set(after[1:]) & set(before[1:])
        with pytest.raises(ContractError, match="inside a run"):
            par.run(restarts)
    par.restart()  # which does nothing to one that is closed
    assert par.run(ranks) == [0, 1, 2]


def restarts(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        parallelizer.restart()


# What the initializers of the tests below have left on this process.
INITIALIZED: list[Any] = []


def note_initialization(*what: Any) -> None:
    INITIALIZED.append([os.getpid(), *what])


def fails_to_initialize(attempts: str) -> None:
    """Fail on each worker until the file says that it has been tried often enough."""
    with Path(attempts).open("a") as file:
        file.write(".")
    if len(Path(attempts).read_text()) <= 2:
        raise PickyError(3, why="too early")
    note_initialization("late")


def what_was_initialized(*, parallelizer: Par) -> Any:
    own = [noted[1:] for noted in INITIALIZED if noted[0] == os.getpid()]  # not of a fork's parent
    return parallelizer.gather([os.getpid(), own])


@pytest.mark.parametrize("on_main", [False, True])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_workers_are_initialized(method: str, on_main: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules[__name__], "INITIALIZED", [])
    par = MultiprocessingParallelizer(
        3, start_method=method, initializer=note_initialization, initargs=[np.arange(3), "x"],
        initialize_main=on_main,
    )  # fmt: skip
    with par:
        workers: list[Any] = []
        for _ in range(2):
            (_, main), *workers = par.run(what_was_initialized)
            assert len(main) == on_main
            for _, noted in workers:
                assert len(noted) == 1
                check(noted[0], [np.arange(3), "x"])
        os.kill(workers[1][0], signal.SIGKILL)
        with pytest.raises(WorkerDied):
            par.run(deaths_are_noticed)
        (_, _), before, after = par.run(what_was_initialized)
        assert before[0] == workers[0][0]
        assert after[0] != workers[1][0]
        assert len(after[1]) == 1


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_workers_are_initialized_at_birth(method: str, tmp_path: Path) -> None:
    """Also those that have no part in the first run."""
    made = tmp_path / "made"
    with MultiprocessingParallelizer(
        2, start_method=method, initializer=Path.touch, initargs=[made]
    ) as par:
        par.run(own_id, comm=[0])
        wait_until(made.exists)


def deaths_are_noticed(*, parallelizer: Par) -> None:
    for _ in range(1000):
        parallelizer.wait()
        time.sleep(0.01)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_an_initializer_that_fails_is_called_again(method: str, tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    with MultiprocessingParallelizer(
        2, start_method=method, initializer=fails_to_initialize, initargs=(str(attempts),)
    ) as par:
        for _ in range(2):  # at birth, which is told in the first run, and in the second
            with pytest.raises(PickyError, match="too early") as caught:
                par.run(what_was_initialized)
            assert "fails_to_initialize" in str(caught.value.__cause__)
        assert par.run(what_was_initialized)[1][1] == [["late"]]
    assert attempts.read_text() == "..."


def test_an_initializer_is_checked() -> None:
    with pytest.raises(TypeError, match="must be callable"):
        MultiprocessingParallelizer(2, initializer="setup")  # type: ignore[arg-type]


def fails_on_main() -> None:
    raise KeyError("main")


def test_an_initializer_that_fails_on_main() -> None:
    par = MultiprocessingParallelizer(2, initializer=fails_on_main, initialize_main=True)
    with pytest.raises(KeyError, match="main"), par:
        raise AssertionError("it must not open")


# ---------------------------------------------------------------------------------------------
# Finding a parallelizer


def test_lookup(p: Par) -> None:
    assert Parallelizer.lookup(p) is p
    assert type(Parallelizer.lookup("serial")) is SerialNonParallelizer
    assert type(Parallelizer.from_config(mode="serial")) is SerialNonParallelizer
    if UNDER_MPI:
        assert type(Parallelizer.lookup("mpi")) is MPIParallelizer
        assert type(Parallelizer.lookup({"mode": "mpi"})) is MPIParallelizer


def test_lookup_takes_another_where_a_name_is_unknown(p: Par) -> None:
    assert Parallelizer.lookup("dask", default=p) is p
    assert type(Parallelizer.lookup({"mode": "dask"}, default="serial")) is SerialNonParallelizer
    assert Parallelizer.lookup("dask", default=None) is p
    assert type(Parallelizer.lookup("serial", default=p)) is SerialNonParallelizer
    with pytest.raises(LookupError, match="ray"):
        Parallelizer.lookup("dask", default="ray")


def test_lookup_of_a_pool() -> None:
    pools = [
        Parallelizer.lookup("multiprocessing", nprocs=2),
        Parallelizer.lookup({"mode": "multiprocessing", "nprocs": 2}),
        Parallelizer.from_config(mode="multiprocessing", nprocs=2),
    ]
    for pool in pools:
        assert type(pool) is MultiprocessingParallelizer
        assert pool.run(role) == [(0, 2), (1, 2)]


def test_lookup_auto(p: Par, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    kind = MPIParallelizer if UNDER_MPI and p.nprocs > 1 else SerialNonParallelizer
    assert type(Parallelizer.lookup("auto")) is kind


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("told", "ranks"),
    [
        ({}, 0),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, 0),  # of a script that sbatch starts
        (STEP, 4),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # of salloc
        ({**STEP, "PMI_SIZE": "3", "SLURM_STEP_NUM_TASKS": "1"}, 3),
    ],
)
def test_what_launchers_tell(
    told: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI", "OMPI_", "MPI_", "PALS_")):
            monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert internals._launched_ranks() == ranks


@pytest.mark.parametrize("name", ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"])
def test_no_more_cpus_than_slurm_grants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert internals._available_cpus() == 1
    monkeypatch.setenv(name, "1000")
    assert 1 <= internals._available_cpus() <= (os.cpu_count() or 1)


def seats(*, parallelizer: Par) -> Any:
    return parallelizer.gather((parallelizer.local_id, parallelizer.local_size))


def seats_of_a_part(*, parallelizer: Par) -> Any:
    found = parallelizer.run(seats, comm=range(max(parallelizer.nprocs - 1, 1)))
    return found if parallelizer.on_main else None


def test_where_a_process_stands_on_its_machine(p: Par) -> None:
    expect(p, p.run(seats), [(rank, p.nprocs) for rank in range(p.nprocs)])
    part = max(p.nprocs - 1, 1)
    found = p.run(seats_of_a_part)
    if found is not Parallelizer.InWorkerProcess and found is not None:
        check(found, [(rank, part) for rank in range(part)])


def test_the_communicator_of_mpi4py_has_a_public_name(p: Par) -> None:
    if isinstance(p, MPIParallelizer):
        assert p.comm is importlib.import_module("mpi4py.MPI").COMM_WORLD
        assert p.comm.allgather(p.id) == list(range(p.nprocs))
    else:
        assert not hasattr(p, "comm")


def test_lookup_finds_the_one_that_runs(p: Par) -> None:
    expect(p, p.run(finds_itself), [True] * p.nprocs)


def finds_itself(*, parallelizer: Par) -> Any:
    found = Parallelizer.lookup(None) is parallelizer
    with SerialNonParallelizer() as inner:
        found = found and Parallelizer.lookup(None) is inner
    return parallelizer.gather(found and Parallelizer.lookup(None) is parallelizer)


def test_register(p: Par) -> None:
    p.register("mine")
    try:
        assert Parallelizer.lookup("mine") is p
        p.register("mine")
        with pytest.raises(ValueError, match="mine"):
            SerialNonParallelizer().register("mine")
        assert Parallelizer.lookup("mine") is p
        with pytest.raises(LookupError, match="mine"):
            Parallelizer.lookup("another")
    finally:
        Parallelizer.unregister("mine")
    with pytest.raises(LookupError):
        Parallelizer.lookup("mine")
    expect_to_work(p)


@pytest.mark.parametrize(
    "key", ["nonsense", "", {"mode": "nonsense"}, {"mode": "nonsense", "nprocs": 2}]
)
def test_an_unknown_name_lists_what_there_is(p: Par, key: Any) -> None:
    with pytest.raises(LookupError) as caught:
        Parallelizer.lookup(key)
    for name in ["serial", "multiprocessing", "mpi"]:
        assert name in str(caught.value)
    expect_to_work(p)


def test_an_unknown_mode() -> None:
    with pytest.raises(LookupError, match="multiprocessing"):
        Parallelizer.from_config(mode="nonsense")


# ---------------------------------------------------------------------------------------------
# Decorators, sentinels, objects that hold a parallelizer


@Parallelizer.main_restricted
def main_part(x: int, *, parallelizer: Par = None) -> Any:
    """Run on main."""
    assert parallelizer is not None
    return x, parallelizer.id


@Parallelizer.worker_restricted
def worker_part(x: int, *, parallelizer: Par = None) -> Any:
    """Run on workers."""
    assert parallelizer is not None
    return x, parallelizer.id


class Job:
    """A program as a class: it holds a parallelizer, and `run` is given its bound methods."""

    def __init__(self, par: Par) -> None:
        self.par = par
        self.history: list[Any] = []

    @Parallelizer.main_restricted
    def start(self, x: int, *, parallelizer: Par = None) -> Any:
        assert parallelizer is self.par
        self.history.append(x)
        return x, parallelizer.id

    @Parallelizer.worker_restricted
    def follow(self, x: int, *, parallelizer: Par = None) -> Any:
        assert parallelizer is self.par
        return x, parallelizer.id

    def compute(self, data: Any, *, parallelizer: Par) -> Any:
        assert self.par is parallelizer
        assert restricted_here(self.start, self.follow, self.par)
        block = self.par.scatter(data if self.par.on_main else None)
        return self.par.gather(self.scale(block))

    def scale(self, x: Any) -> Any:
        assert self.par.nprocs >= 1
        return x * 3

    def run(self, data: Any) -> Any:
        return self.par.run(self.compute, data)


def restricted_here(on_main: Any, on_workers: Any, parallelizer: Par) -> bool:
    """Check what both kinds of restricted functions return here, with and without the keyword."""
    here = (7, parallelizer.id)
    mains = [on_main(7, parallelizer=parallelizer), on_main(7), on_main(7, parallelizer=None)]
    workers = [on_workers(7, parallelizer=parallelizer), on_workers(x=7)]
    if parallelizer.on_main:
        return mains == [here] * 3 and all(w is Parallelizer.InMainProcess for w in workers)
    return all(in_worker(value) for value in mains) and workers == [here] * 2


def restricted(*, parallelizer: Par) -> Any:
    return parallelizer.gather(restricted_here(main_part, worker_part, parallelizer))


def test_restricted_functions(p: Par) -> None:
    expect(p, p.run(restricted), [True] * p.nprocs)
    assert restricted_here(main_part, worker_part, p)
    assert (main_part.__name__, main_part.__doc__) == ("main_part", "Run on main.")
    assert (worker_part.__name__, worker_part.__doc__) == ("worker_part", "Run on workers.")


def test_objects_hold_a_parallelizer(p: Par) -> None:
    expect(p, Job(p).run(np.arange(10)), np.arange(10) * 3)
    expect(p, p.run(identities, [{"job": Job(p)}, p]), [True] * p.nprocs)


def test_objects_hold_a_closed_parallelizer(fresh: Par) -> None:
    result = Job(fresh).run(np.arange(10))
    with fresh:
        expect(fresh, result, np.arange(10) * 3)


def identities(held: Any, *, parallelizer: Par) -> Any:
    found = [held[0]["job"].par, held[1], pickle.loads(pickle.dumps(parallelizer))]
    found.append(parallelizer.broadcast(Job(parallelizer)).par)
    found.append(parallelizer.broadcast(Job(parallelizer).compute).__self__.par)
    return parallelizer.gather(all(one is parallelizer for one in found))


ABSENT = "was pickled by another program or for other processes"


def refuses_everything(held: Par, *, closed: bool = False) -> bool:
    """Check that one of other processes does nothing; a closed one may be opened."""
    calls: list[Callable[[], object]] = [
        functools.partial(getattr(held, verb), *args) for verb, args in OUTSIDE.items()
    ]
    if not closed:
        calls += [
            lambda: held.run(own_id),
            lambda: held.apply(own_id),
            lambda: held.map(square, [1, 2]),
            lambda: held.map(square, np.arange(2), vectorized=True),
            lambda: held.starmap(pow, [(1, 2)]),
            lambda: next(held.imap(square, [1, 2])),
            lambda: next(held.imap_unordered(square, [1, 2])),
            lambda: held.share(np.arange(2)),
            lambda: held.print("nothing"),
            lambda: held.rng(1),
            held.serve,
            lambda: held.on_main,
            held.__enter__,
            lambda: main_part(7, parallelizer=held),
            lambda: ClientServerRunner(own_id, parallelizer=held).run(),
        ]
    errors = [caught_from(call) for call in calls]
    assert all(type(error) is ContractError for error in errors), errors
    assert all(ABSENT in str(error) for error in errors), errors
    assert (held.id, held.nprocs) == (None, None)
    assert repr(held) == f"{type(held).__name__}(id=None, nprocs=None)"
    assert Parallelizer.lookup(held) is held is copy.deepcopy([held])[0]
    return True


def look_at_held(held: dict[str, Par], *, parallelizer: Par) -> Any:
    """Be one of the processes of some of these, and none of the others'."""
    job = copy.deepcopy(Job(held["own"]))
    assert held["own"] is job.par is pickle.loads(pickle.dumps(parallelizer)) is parallelizer
    assert held["serial"].run(roll_call) == ([0], sum(range(100)))
    if not parallelizer.on_main:
        assert refuses_everything(held["open"])
        assert refuses_everything(held["closed"], closed=True)
        assert held["closed"].run(roll_call)[0] == [0, 1, 2, 3]
        assert Parallelizer.lookup(None) is parallelizer
        # On its way from one to the next it stays what it is.
        parallelizer.send(held["open"], 3 - parallelizer.id)
        assert refuses_everything(parallelizer.receive(3 - parallelizer.id))
    return parallelizer.gather(held)


@pytest.mark.parametrize("start_method", MULTIPROCESSING)
def test_an_object_does_not_get_another_pool(start_method: str) -> None:
    make = functools.partial(MultiprocessingParallelizer, start_method=start_method)
    held = {"own": make(3), "open": make(2), "closed": make(4), "serial": SerialNonParallelizer()}
    with held["open"], held["own"]:
        returned = held["own"].run(look_at_held, held)
        assert held["own"].map(holds_another, [Job(held["open"])] * 9) == [held["open"]] * 9
        assert (
            held["open"].run(identities, [{"job": Job(held["open"])}, held["open"]]) == [True] * 2
        )
    for one in returned:  # which have come back from where they were others
        assert all(one[name] is par for name, par in held.items())
    key = weakref.ref(held.pop("closed"))
    del returned, one
    gc.collect()
    assert key() is None


def holds_another(job: Job) -> Any:
    assert job.par is not Parallelizer.lookup(None)
    return job.par


def save_parallelizers(path: str) -> None:
    """Run as a program of its own by the test below, under MPI."""
    kept: Any = {"data": np.arange(3), "mpi": MPIParallelizer(), "serial": SerialNonParallelizer()}
    with MultiprocessingParallelizer(2, start_method="spawn") as pool:
        assert pool.run(own_id) == 0
        if kept["mpi"].on_main:
            Path(path).write_bytes(pickle.dumps({**kept, "pool": pool, "again": pool}))


def open_parallelizers(path: str, mpi: bool) -> None:
    """Run as a program of its own by the test below, with MPI and without it."""
    if not mpi:
        sys.modules["mpi4py"] = None  # type: ignore[assignment]  # as Python marks what is missing
    kept = pickle.loads(Path(path).read_bytes())
    assert "mpi4py.MPI" not in sys.modules
    check(kept["data"], np.arange(3))
    assert kept["serial"].run(roll_call) == ([0], sum(range(100)))
    assert kept["pool"] is kept["again"]
    assert kept["pool"].run(roll_call)[0] == [0, 1]
    with kept["pool"].register("kept"):
        assert Parallelizer.lookup(None) is Parallelizer.lookup("kept") is kept["pool"]
        assert kept["pool"].map(square, [1, 2]) == [1, 4]
    for saved in (kept["mpi"], pickle.loads(Path(path).read_bytes())["mpi"]):
        with MPIParallelizer() if mpi else contextlib.nullcontext() as present:
            assert refuses_everything(saved)
            assert saved is not present
        assert refuses_everything(pickle.loads(pickle.dumps(saved)))


@pytest.mark.timeout(100)
def test_what_another_program_has_saved_can_be_opened(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    call = "import test_parallelizer as t; t."
    for ranks, saves in [(2, f"save_parallelizers({path!r})"),
                         (None, f"open_parallelizers({path!r}, False)"),
                         (2, f"open_parallelizers({path!r}, True)")]:  # fmt: skip
        run_program("-c", call + saves, ranks=ranks)


if UNDER_MPI:

    def test_an_object_does_not_get_another_communicator(p: Par) -> None:
        world = importlib.import_module("mpi4py.MPI").COMM_WORLD
        part = world.Split(world.rank >= 2)  # 0 and 1, and the others
        inner = MPIParallelizer(part)
        # Of many on one communicator, an object gets the very one that holds it elsewhere.
        others = [MPIParallelizer(part) for _ in range(3)]
        with p, others[1]:
            check(inner.run(broadcasts_another, p, inner, others), True)
        # Of the other part, p's ranks know nothing.
        p.run(broadcasts_of_a_part, inner, part.rank == world.rank)
        # One rank alone may unpickle one: that takes no collective.
        pickled = world.bcast(pickle.dumps(p))
        for rank in range(world.size):
            if world.rank == rank:
                assert pickle.loads(pickled) is p
            world.Barrier()
        # Made, dropped and made again, or dropped only, it is of the same communicator.
        dropped, reference = pickle.dumps(others[2]), weakref.ref(others.pop())
        gc.collect()
        assert reference() is None
        again = pickle.loads(dropped)
        assert again is not inner
        check(again.run(roll_call), (list(range(part.size)), sum(range(100))))
        assert MPIParallelizer(part).run(roll_call)[0] == list(range(part.size))

    def broadcasts_another(outer: Par, inner: Par, others: list[Par], *, parallelizer: Par) -> bool:
        found = parallelizer.broadcast([Job(one) for one in (outer, inner, *others)])
        assert [job.par for job in found] == [outer, inner, *others]
        assert found[0].par.nprocs == importlib.import_module("mpi4py.MPI").COMM_WORLD.size
        return True

    def broadcasts_of_a_part(inner: Par, is_mine: bool, *, parallelizer: Par) -> None:
        found = parallelizer.broadcast(Job(inner)).par
        assert found is inner if is_mine else refuses_everything(found)
        # It comes home as what it was.
        back = parallelizer.gather(found, concatenate=False)
        assert not parallelizer.on_main or back == [inner] * parallelizer.nprocs


def test_bound_methods_are_mapped(p: Par) -> None:
    expect(p, drive(p, map_a_method), [0, 3, 6])


def map_a_method(*, parallelizer: Par) -> Any:
    return parallelizer.map(Job(parallelizer).scale, range(3))


SENTINELS = {"InWorkerProcess": "worker", "InMainProcess": "main"}


@pytest.mark.parametrize("name", SENTINELS)
def test_sentinels(name: str) -> None:
    sentinel = getattr(Parallelizer, name)
    assert not sentinel
    assert SENTINELS[name] in repr(sentinel).lower()
    assert " at 0x" not in repr(sentinel)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps([sentinel], protocol))[0] is sentinel
    assert copy.copy(sentinel) is copy.deepcopy(sentinel) is sentinel


def test_sentinels_travel(p: Par) -> None:
    expect(p, p.run(sends_sentinels), [True] * p.nprocs)


def sends_sentinels(*, parallelizer: Par) -> Any:
    wanted = [Parallelizer.InWorkerProcess, Parallelizer.InMainProcess]
    found = [*parallelizer.broadcast(wanted), *parallelizer.allgather(wanted)[-1]]
    same = all(one is other for one, other in zip(found, wanted * 2, strict=True))
    return parallelizer.gather(same)


# ---------------------------------------------------------------------------------------------
# Driver mode, client and server


def alone(factor: int, *, parallelizer: Par) -> Any:
    """Drive the workers from main: maps and runs in any order."""
    assert parallelizer.on_main
    assert Parallelizer.lookup(None) is parallelizer
    first = parallelizer.map(scaled, [1, 2], (factor,), {"shift": 0})
    everyone = parallelizer.run(roll_call)
    second = parallelizer.starmap(pow, [(2, 3), (3, 2)])
    return first, everyone, second, parallelizer.run(arguments, 1, main_kwargs={"k": 2})


def driven(p: Par) -> Any:
    calls = [((1,), {"k": 2})] + [((1,), {})] * (p.nprocs - 1)
    return [2, 4], (list(range(p.nprocs)), sum(range(100))), [8, 9], calls


def test_a_client_drives_workers_that_serve(p: Par) -> None:
    for _ in range(2):
        expect(p, drive(p, alone, 2), driven(p))
    expect_to_work(p)


def test_a_client_on_a_closed_parallelizer(fresh: Par) -> None:
    result = drive(fresh, alone, 2)
    with fresh:
        expect(fresh, result, driven(fresh))


@pytest.mark.parametrize("own", ["serial", *MULTIPROCESSING])
def test_an_open_parallelizer_is_driven_by_main(own: str) -> None:
    with create(own) as p:
        assert alone(2, parallelizer=p) == driven(p)


def clients_within(*, parallelizer: Par) -> Any:
    """Their ends are not that of the workers' service."""
    results = [drive(parallelizer, alone, 2)]
    error = caught_from(ClientServerRunner(fails_as_a_client, parallelizer=parallelizer).run)
    assert isinstance(error, JobError)
    parallelizer.serve()
    if UNDER_MPI:  # another one of the same ranks
        with MPIParallelizer() as other:
            results += [drive(other, alone, 2), alone(2, parallelizer=other)]
    return [*results, alone(2, parallelizer=parallelizer)]


def test_clients_within_a_client(p: Par) -> None:
    results = drive(p, clients_within)
    expect(p, results, [driven(p)] * (4 if UNDER_MPI else 2))
    expect_to_work(p)


def serves(how: str, *, parallelizer: Par) -> Any:
    if how == "client":
        return drive(parallelizer, returns)
    return parallelizer.serve()


@pytest.mark.parametrize("how", ["serve", "client"])
def test_nobody_serves_inside_run(p: Par, how: str) -> None:
    if p.nprocs > 1:
        assert "serve was called inside run" in expect_failure(p, ContractError, serves, how)
    else:
        p.run(serves, how)


def client(*, parallelizer: Par) -> Any:
    assert parallelizer.on_main
    for rank in range(1, parallelizer.nprocs):
        parallelizer.send(np.arange(5) * rank, rank)
    return [parallelizer.receive(rank) for rank in range(1, parallelizer.nprocs)]


def server(*, parallelizer: Par) -> None:
    assert not parallelizer.on_main
    parallelizer.send(parallelizer.receive(0) ** 2, 0)


def test_a_client_and_a_server_of_its_own(p: Par) -> None:
    squares = [(np.arange(5) * rank) ** 2 for rank in range(1, p.nprocs)]
    expect(p, ClientServerRunner(client, server, parallelizer=p).run(), squares)
    expect(p, ClientServerRunner(client, server).run(), squares)  # by lookup(None)
    expect_to_work(p)


def fails_as_a_client(*, parallelizer: Par) -> None:
    assert parallelizer.on_main
    raise JobError("client", 1)


def fails_as_a_server(*, parallelizer: Par) -> None:
    raise JobError("server", parallelizer.id)


def waits_as_a_client(*, parallelizer: Par) -> None:
    for rank in range(1, parallelizer.nprocs):
        parallelizer.receive(rank)


def test_a_client_that_fails(p: Par) -> None:
    for servers in (None, server):
        error = caught_from(ClientServerRunner(fails_as_a_client, servers, parallelizer=p).run)
        expect(p, (type(error), error and error.args), (JobError, ("client", 1)))
        expect_to_work(p)


def test_a_server_that_fails(p: Par) -> None:
    error = caught_from(ClientServerRunner(waits_as_a_client, fails_as_a_server, p).run)
    # Of several servers, the first to fail may end the others before they come to it.
    ranks = range(1, p.nprocs)
    expect(p, error is None or (error.args[0] == "server" and error.args[1] in ranks), True)
    expect(p, error is None, p.nprocs == 1)
    expect_to_work(p)


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("nprocs", "kind"),
    [(0, ValueError), (-1, ValueError), ("x", TypeError), (2.5, TypeError), ([2], TypeError)],
)
def test_bad_nprocs(nprocs: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="nprocs"):
        MultiprocessingParallelizer(nprocs=nprocs)
    with pytest.raises(kind, match="nprocs"):
        Parallelizer.lookup("multiprocessing", nprocs=nprocs)


def test_a_timeout_may_be_infinite() -> None:
    for timeout in (1e300, float("inf")):
        p = MultiprocessingParallelizer(2, timeout=timeout)
        assert p.run(roll_call) == ([0, 1], sum(range(100)))


def test_bad_start_method() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        MultiprocessingParallelizer(nprocs=2, start_method="nonsense")


def test_ranks_that_do_not_exist_are_ignored_on_one_process(p: Par) -> None:
    if p.nprocs == 1:
        assert p.run(own_id, comm=[0, 1, 99]) == 0
        p.run(runs_on, [0, 3, 3])


@pytest.mark.parametrize("comm", [[], [1], [0, 0], [0, -1], [0, 99], [1, 2], [0, 1, 1]])
def test_bad_comm(p: Par, comm: list[int]) -> None:
    if p.nprocs == 1 and max(comm, default=0) > 0:
        comm = [-1, *comm]
    with pytest.raises(ValueError, match=r"comm|rank"):
        p.run(own_id, comm=comm)
    expect_to_work(p)
    expect_failure(p, ValueError, runs_on, comm)


def runs_on(comm: list[int], *, parallelizer: Par) -> None:
    parallelizer.run(own_id, comm=comm)


@pytest.mark.parametrize("func", [None, 3, "text", [own_id]])
def test_bad_func(p: Par, func: Any) -> None:
    with pytest.raises(TypeError, match=r"callable|function"):
        p.run(func)
    with pytest.raises(TypeError, match=r"callable|function"):
        p.apply(func)
    expect_failure(p, TypeError, maps_badly, func)
    expect_to_work(p)


def maps_badly(func: Any, *, parallelizer: Par) -> None:
    parallelizer.map(func, [1, 2])


@pytest.mark.parametrize("data", [5, None])
@BOTH_WAYS
def test_data_that_cannot_be_mapped(p: Par, way: Any, data: Any) -> None:
    expect(p, type(caught_from(way, p, maps_nothing, data)), TypeError)
    expect_to_work(p)


def maps_nothing(data: Any, *, parallelizer: Par) -> None:
    parallelizer.map(square, data)


def test_run_passes_the_parallelizer_itself(p: Par) -> None:
    with pytest.raises(TypeError, match="leave it out"):
        p.run(roll_call, parallelizer=SerialNonParallelizer())


def test_bad_where(p: Par) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        p.print("text", where="nonsense")
    expect_failure(p, ValueError, prints_to, "nonsense")


def halves(number: int) -> tuple[int, ...]:
    return (number // 2,) * 2 if number > 1 else ()


def feeds_its_producer(ordered: bool, *, parallelizer: Par) -> Any:
    """As a search does, whose results are what is to be searched next."""
    imap = parallelizer.imap if ordered else parallelizer.imap_unordered
    found, missing = queue.SimpleQueue[int | None](), 1
    found.put(16)
    count = 0
    for parts in imap(halves, iter(found.get, None)):
        count += 1
        missing += len(parts) - 1
        for part in parts:
            found.put(part)
        if missing == 0:
            found.put(None)
    return count


@pytest.mark.parametrize("ordered", [True, False])
@BOTH_WAYS
def test_a_producer_may_wait_for_results(p: Par, way: Any, ordered: bool) -> None:
    expect(p, way(p, feeds_its_producer, ordered), 31)


def fails_after(count: int) -> Iterator[int]:
    yield from range(count)
    raise JobError("of the producer", count)


def refuses(number: int, item: int) -> int:
    if item == number:
        raise JobError("of the item", item)
    return item


def returns_a_lock(_: object) -> Any:
    return threading.Lock()


def yields_before_it_fails(
    func: Any, data: Callable[[], Any], chunksize: int, *, parallelizer: Par
) -> Any:
    results: list[Any] = []
    try:
        for result in parallelizer.imap(func, data(), chunksize):
            results.append(result)  # noqa: PERF402 - those before an error are wanted
    except Exception as error:
        return results, error
    return results, None


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize(
    ("func", "data", "count", "kind"),
    [
        (abs, functools.partial(fails_after, 30), 30, JobError),
        (functools.partial(refuses, 21), functools.partial(range, 90), 21, JobError),
        (functools.partial(refuses, 21), functools.partial(fails_after, 30), 21, JobError),
        (returns_a_lock, functools.partial(range, 90), 0, PackingError),
    ],
)
def test_what_comes_before_an_error_is_yielded(
    p: Par, func: Any, data: Any, count: int, kind: type, chunksize: int
) -> None:
    if kind is PackingError and p.nprocs == 1:
        kind = type(None)
        count = 90
    results, error = yields_before_it_fails(func, data, chunksize, parallelizer=p)
    expect(p, (len(results), type(error)), (count, kind))
    if kind is JobError:
        expect(p, results, [*range(count)])
    expect_to_work(p)


class IteratedOnce:
    """Data whose second iteration is an error."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        self.count += 1
        assert self.count == 1
        return iter(range(10))


@pytest.mark.parametrize("verb", ["map", "imap", "imap_unordered", "with callback"])
@BOTH_WAYS
def test_data_are_iterated_over_once(p: Par, way: Any, verb: str) -> None:
    found = way(p, iterates_once, verb)
    expect(p, found, [*range(10)])


def iterates_once(verb: str, *, parallelizer: Par) -> Any:
    if verb == "with callback":
        return parallelizer.map(abs, IteratedOnce(), callback=abs)
    results = getattr(parallelizer, verb)(abs, IteratedOnce())
    return sorted(results) if parallelizer.on_main else None


def blocked_producer(until: threading.Event) -> Iterator[int]:
    yield from range(3)
    until.wait(60)


@pytest.mark.parametrize("fault", ["raise", "die", "interrupt", "leave"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_faults_while_the_producer_blocks(method: str, fault: str) -> None:
    blocked = threading.Event()
    with MultiprocessingParallelizer(2, start_method=method) as par:
        main = os.getpid()
        func = functools.partial(ends_with, fault, main)
        stream = par.imap_unordered(func, blocked_producer(blocked))
        if fault == "leave":
            assert next(stream) in range(3)
            del stream
        else:
            kind = {"raise": JobError, "die": WorkerDied, "interrupt": KeyboardInterrupt}[fault]
            with pytest.raises(kind):
                list(stream)
        blocked.set()
        for thread in threading.enumerate():
            if thread.name.startswith("parallelizer-reader"):
                thread.join(30)
                assert not thread.is_alive()
        expect_to_work(par)


def ends_with(fault: str, main: int, item: int) -> int:
    """On the worker, after the producer has begun to block."""
    if os.getpid() == main:
        return item
    time.sleep(0.2)
    if fault == "raise":
        raise JobError("of a worker", item)
    if fault == "die":
        os._exit(3)
    if fault == "interrupt":
        os.kill(main, signal.SIGINT)
    return item


COMPUTED = collections.Counter[int]()  # items, by the process that has computed them


def fails_at_first(item: int) -> int:
    if item == 0:
        raise JobError("at the first item", item)
    time.sleep(0.05)
    COMPUTED[os.getpid()] += 1
    return item


MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "map": ("map", {}),
    "with callback": ("map", {"callback": abs}),
    "imap": ("imap", {}),
    "imap_unordered": ("imap_unordered", {}),
}


def maps_what_fails(verb: str, *, parallelizer: Par) -> None:
    name, keywords = MAPS[verb]
    results = getattr(parallelizer, name)(fails_at_first, range(600), chunksize=200, **keywords)
    if parallelizer.on_main:
        list(results)


def computed_here(*, parallelizer: Par) -> Any:
    count = COMPUTED.pop(os.getpid(), 0)
    return parallelizer.gather(count)


@pytest.mark.parametrize("verb", [*MAPS])
@BOTH_WAYS
def test_a_failure_is_heard_between_two_items_of_a_chunk(p: Par, way: Any, verb: str) -> None:
    error = caught_from(way, p, maps_what_fails, verb)
    assert type(error) is JobError or not p.on_main
    counts = p.run(computed_here)
    if p.on_main:
        assert max(counts) < 150, counts


def needs_what_came_before(folder: Path, item: int) -> int:
    if item == 1:
        time.sleep(0.3)
    if item == 2:
        wait_until((folder / "first").exists, 60)
    return item


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_slow_items_do_not_hold_back_earlier_results_of_their_chunk(
    method: str, ordered: bool, tmp_path: Path
) -> None:
    func = functools.partial(needs_what_came_before, tmp_path)
    found = []
    with MultiprocessingParallelizer(2, start_method=method) as par:
        par.main_computes = False
        for result in (par.imap if ordered else par.imap_unordered)(func, range(6), 3):
            found.append(result)
            if result == 0:
                (tmp_path / "first").touch()
    assert sorted(found) == [*range(6)]


class Loaded:
    """An item that each process counts when it unpickles it."""

    count = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return load_one, (self.number,)


def load_one(number: int) -> Loaded:
    Loaded.count += 1
    return Loaded(number)


def number_of(item: Loaded) -> tuple[int, int]:
    return item.number, os.getpid()


def counts_what_it_loads(verb: str, *, parallelizer: Par) -> Any:
    Loaded.count = 0
    items = [Loaded(number) for number in range(90)] if parallelizer.on_main else None
    results = getattr(parallelizer, verb)(number_of, items)
    results = list(results) if parallelizer.on_main else []
    return parallelizer.gather((os.getpid(), Loaded.count)), results


@pytest.mark.parametrize("verb", ["map", "imap"])
def test_a_process_unpickles_what_it_computes_and_no_more(p: Par, verb: str) -> None:
    found = p.run(counts_what_it_loads, verb)
    if p.on_main:
        loaded, results = found
        assert [number for number, _ in results] == [*range(90)]
        computed = collections.Counter(pid for _, pid in results)
        for pid, count in loaded[1:]:
            assert count == computed[pid]


def twice(block: np.ndarray[Any, Any]) -> Any:
    return block[:2] * 2


def test_chunks_may_be_larger_than_the_place_for_them() -> None:
    blocks = [np.full(MIB, number, float) for number in range(20)]
    blocks[7] = np.full(10 * MIB, 7.0)
    wanted = [[2.0 * number] * 2 for number in range(20)]
    with MultiprocessingParallelizer(3) as par:
        for _ in range(2):
            assert [list(pair) for pair in par.map(twice, blocks)] == wanted
            assert [list(pair) for pair in par.imap(twice, iter(blocks))] == wanted


def gives_up_and_goes_on(*, parallelizer: Par) -> Any:
    right = []
    for number in range(60):
        imap = parallelizer.imap_unordered if number % 2 else parallelizer.imap
        stream = imap(square, itertools.count() if number % 3 else range(number))
        for _ in range(number % 7):
            next(stream, None)
        del stream
        right.append(parallelizer.map(square, range(number)) == [x * x for x in range(number)])
    return all(right) if parallelizer.on_main else None


@BOTH_WAYS
def test_nothing_of_a_stream_that_is_given_up_is_met_later(p: Par, way: Any) -> None:
    expect(p, way(p, gives_up_and_goes_on), True)


def waits_on_main_for_others(main: int, folder: Path, item: int) -> int:
    if os.getpid() != main:
        (folder / str(item)).touch()
        return item
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < 40:
        assert time.monotonic() < deadline, "nobody computes while main does"
        time.sleep(0.01)
    return item


@pytest.mark.parametrize("verb", ["map", "imap", "imap_unordered", "with callback"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_others_compute_while_main_does(method: str, verb: str, tmp_path: Path) -> None:
    func = functools.partial(waits_on_main_for_others, os.getpid(), tmp_path)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        if verb == "with callback":
            results = par.map(func, range(60), 1, callback=abs)
        else:
            results = sorted(getattr(par, verb)(func, range(60), chunksize=1))
    assert results == [*range(60)]


def is_refused_and_goes_on(*, parallelizer: Par) -> Any:
    for verb in (parallelizer.map, parallelizer.imap):
        with pytest.raises(PackingError):
            list(verb(square, range(9), extra_kwargs={"x": threading.Lock()}))
    return parallelizer.map(square, range(9))


def test_after_a_map_that_is_refused_the_next_one_is_not(p: Par) -> None:
    if p.nprocs > 1:
        expect(p, p.run(is_refused_and_goes_on), [x * x for x in range(9)])


def dies_once(main: int, flag: Path, number: int) -> int:
    """On the first worker that comes here."""
    if os.getpid() == main:
        wait_until(flag.exists, 60)
    with contextlib.suppress(FileExistsError):
        flag.touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("verb", ["map", "imap", "imap_unordered"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_death_amid_a_chunk(method: str, verb: str, tmp_path: Path) -> None:
    with MultiprocessingParallelizer(3, start_method=method) as par:
        for flag in (tmp_path / "first", tmp_path / "second"):
            func = functools.partial(dies_once, os.getpid(), flag)
            with pytest.raises(WorkerDied, match="SIGKILL"):
                list(getattr(par, verb)(func, range(900), chunksize=4))
            assert par.map(square, range(9)) == [x * x for x in range(9)]


SLOW_MODULE = """
import pathlib, time
pathlib.Path(__file__).with_suffix(".begun").touch()
time.sleep(0.5)
"""


REMEMBERED: dict[str, int] = {}


def remembers_its_rank(*, parallelizer: Par) -> None:
    REMEMBERED["rank"] = parallelizer.id


def imports_on_rank_one(folder: str) -> None:
    if REMEMBERED["rank"] == 1:
        sys.path.insert(0, folder)
        importlib.import_module("slow_module")


class ImportsOnRankOne:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return imports_on_rank_one, (self.folder,)


def fails_while_another_imports(_: Any, begun: Path, *, parallelizer: Par) -> None:
    if parallelizer.id == 2:
        wait_until(begun.exists, 60)
        raise JobError("not well", 2)
    parallelizer.wait()


def what_is_imported(*, parallelizer: Par) -> Any:
    return parallelizer.gather((os.getpid(), "slow_module" in sys.modules))


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_failure_elsewhere_breaks_off_no_import(method: str, tmp_path: Path) -> None:
    """What is left of a module can mostly not be imported again: `name '_abc' is not defined`."""
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        par.run(remembers_its_rank)
        before = par.run(what_is_imported)
        with pytest.raises(JobError):
            par.run(
                fails_while_another_imports,
                ImportsOnRankOne(tmp_path),
                tmp_path / "slow_module.begun",
            )
        after = par.run(what_is_imported)
    assert [pid for pid, _ in after] == [pid for pid, _ in before]
    assert [imported for _, imported in after] == [False, True, False]


def one_long_item(*, parallelizer: Par) -> Any:
    """Longer than it takes to find out that others, which idle, wait for main."""
    return [*parallelizer.imap(sleeps, [1.5, 0.0])]


def sleeps(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_idle_workers_are_not_waited_for(p: Par) -> None:
    expect(p, p.run(one_long_item), [1.5, 0.0])


def is_left_early(*, parallelizer: Par) -> Any:
    stream = parallelizer.imap_unordered(sleeps, [0.1, 0.1, 1.0])
    if parallelizer.on_main:
        next(stream)
    del stream
    return parallelizer.map(abs, [0, 1])


def test_who_is_late_from_an_earlier_stream_is_waited_for(p: Par) -> None:
    expect(p, p.run(is_left_early), [0, 1])


def tells(word: str, item: int) -> tuple[str, int]:
    time.sleep(0.002)
    return word, item


def streams_in_nested_runs(*, parallelizer: Par) -> Any:
    everybody = range(parallelizer.nprocs)
    parallelizer.run(leaves_one_of_thirty, comm=everybody)
    return parallelizer.run(takes_all_thirty, comm=everybody)


def leaves_one_of_thirty(*, parallelizer: Par) -> None:
    stream = parallelizer.imap(functools.partial(tells, "old"), range(30))
    if parallelizer.on_main:
        next(stream)


def takes_all_thirty(*, parallelizer: Par) -> Any:
    return [*parallelizer.imap(functools.partial(tells, "new"), range(30))]


def test_no_result_of_an_earlier_stream_is_taken_for_one_of_this(p: Par) -> None:
    expect(p, p.run(streams_in_nested_runs), [("new", item) for item in range(30)])


def uses_its_reader(how: str, parallelizer: Par) -> Iterator[int]:
    yield 1
    if how == "map":
        yield sum(parallelizer.map(abs, range(5)))
    else:
        yield from parallelizer.imap(abs, range(5))


@pytest.mark.parametrize("how", ["map", "imap"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_an_iterator_cannot_use_who_reads_it(method: str, how: str) -> None:
    with MultiprocessingParallelizer(2, start_method=method) as par:
        with pytest.raises(ContractError, match="an iterator that imap reads has used the"):
            list(par.imap(abs, uses_its_reader(how, par)))
        with pytest.raises(ContractError, match="an iterator that imap reads has used the"):
            list(par.imap(abs, par.imap(abs, range(10))))
        with MultiprocessingParallelizer(2, start_method=method) as other:
            assert list(par.imap(abs, other.imap(abs, range(10)))) == [*range(10)]
        expect_to_work(par)


def lock_or_item(item: int) -> Any:
    return threading.Lock() if item == 21 else item


def locks_at(place: int) -> list[Any]:
    return [threading.Lock() if number == place else number for number in range(30)]


@pytest.mark.parametrize(
    ("func", "data"), [(lock_or_item, range(30)), (repr, locks_at(21))], ids=["result", "item"]
)
@pytest.mark.parametrize("chunksize", [1, 4])
def test_what_comes_before_what_cannot_be_packed_is_yielded(
    p: Par, func: Any, data: Any, chunksize: int
) -> None:
    results, error = yields_before_it_fails(func, lambda: data, chunksize, parallelizer=p)
    wanted = (30, type(None)) if p.nprocs == 1 else (21, PackingError)
    expect(p, (len(results), type(error)), wanted)
    expect_to_work(p)


def ends_by(kind: type[BaseException]) -> Iterator[int]:
    yield from range(5)
    raise kind


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_however_an_iterator_ends_what_it_gave_is_yielded(
    method: str, kind: type[BaseException]
) -> None:
    found: list[int] = []
    with MultiprocessingParallelizer(2, start_method=method) as par:
        with pytest.raises(kind):
            found.extend(par.imap(abs, ends_by(kind)))
        expect_to_work(par)
    assert found == [*range(5)]


def raises_value_error(_: object) -> None:
    raise ValueError


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_after_a_callback_has_raised_the_pool_is_free(method: str) -> None:
    with MultiprocessingParallelizer(2, start_method=method) as par:
        try:
            par.map(abs, range(100), callback=raises_value_error)
        except ValueError:
            assert par.map(abs, range(3)) == [0, 1, 2]  # while the traceback lives


@pytest.mark.parametrize("verb", ["map", "imap", "with callback"])
def test_what_cannot_tell_its_length_is_iterated_over(p: Par, verb: str) -> None:
    found = drive(p, iterates_without_length, verb)
    expect(p, found, [1, 2, 3])


def iterates_without_length(verb: str, *, parallelizer: Par) -> Any:
    class Dataset:
        def __iter__(self) -> Iterator[int]:
            return iter([1, 2, 3])

        def __len__(self) -> int:
            raise TypeError("of an iterable dataset")

    if verb == "with callback":
        return parallelizer.map(abs, Dataset(), callback=abs)
    results = getattr(parallelizer, verb)(abs, Dataset())
    return list(results) if parallelizer.on_main else None


def test_streams_outside_run(p: Par) -> None:
    """Which under MPI all ranks call, before the first run and between two of them."""
    for _ in range(2):
        for verb in (p.imap, p.imap_unordered):
            expect(p, sorted(verb(abs, range(-20, 0))), [*range(1, 21)] if p.on_main else [])
        given_up = p.imap(abs, range(-20, 0))
        expect(p, next(given_up, None), 20 if p.on_main else None)
        del given_up
        expect_to_work(p)


OUTSIDE: dict[str, tuple[Any, ...]] = {
    "broadcast": (1,),
    "scatter": ([1],),
    "gather": (1,),
    "allgather": (1,),
    "reduce": (1,),
    "allreduce": (1,),
    "send": (1, 1),
    "receive": (1,),
    "wait": (),
}


@pytest.mark.parametrize("start_method", MULTIPROCESSING)
def test_collectives_outside_run(start_method: str) -> None:
    p = MultiprocessingParallelizer(nprocs=2, start_method=start_method)
    for verb, args in OUTSIDE.items():
        with pytest.raises(ContractError, match=verb):
            getattr(p, verb)(*args)
    with p:
        for verb, args in OUTSIDE.items():
            with pytest.raises(ContractError, match=verb):
                getattr(p, verb)(*args)
        expect_to_work(p)


def test_apply_needs_an_open_pool() -> None:
    p = MultiprocessingParallelizer(nprocs=2)
    with pytest.raises(ParallelizerError):
        p.apply(own_id)
    assert p.run(own_id) == 0


# ---------------------------------------------------------------------------------------------
# Errors: what a function raises


class UnpicklableError(Exception):
    """An exception with a member that cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


def returns(*, parallelizer: Par) -> Any:
    return parallelizer.nprocs


def gathers_once(*, parallelizer: Par) -> None:
    parallelizer.gather(1)


def broadcasts_once(*, parallelizer: Par) -> None:
    parallelizer.broadcast(np.zeros(3 * MIB) if parallelizer.on_main else None)


def receives_from_the_failing(*, parallelizer: Par) -> None:
    parallelizer.receive(0 if parallelizer.id else parallelizer.nprocs - 1)


def raises_there(
    where: str, others: Callable[..., Any], kind: str = "JobError", *, parallelizer: Par
) -> Any:
    ranks = {"main": [0], "last": [parallelizer.nprocs - 1], "all": range(parallelizer.nprocs)}
    parallelizer.wait()
    if parallelizer.id not in ranks[where]:
        return others(parallelizer=parallelizer)
    if kind == "unpicklable":
        raise UnpicklableError("has a lock")
    if kind == "assertion":
        assert parallelizer.id is None, "not here"
    try:
        raise KeyError("the reason")
    except KeyError as reason:
        raise JobError("on purpose", parallelizer.id) from reason


@pytest.mark.parametrize(
    "others", [returns, gathers_once, broadcasts_once, receives_from_the_failing]
)
@pytest.mark.parametrize("where", ["main", "last", "all"])
def test_an_exception_comes_back_as_it_was(p: Par, where: str, others: Callable[..., Any]) -> None:
    pids = p.run(process_ids)
    error = failure(p, raises_there, where, others)
    rank = p.nprocs - 1 if where == "last" else 0
    found = (type(error), error.args, vars(error).get("code"), vars(error).get("detail"))
    expect(p, found, (JobError, ("on purpose", rank), rank, {"rank": rank}))
    if rank > 0:
        remote = isinstance(error.__cause__, RemoteTraceback)
        text = str(error.__cause__)
        facts = [f"rank {rank}", socket.gethostname(), str(pids[rank]), "raises_there", "KeyError"]
        expect(p, remote and [fact for fact in facts if fact not in text], [])
    else:
        expect(p, type(error.__cause__), KeyError)
    expect_to_work(p)


def raises_on_workers(*, parallelizer: Par) -> None:
    if not parallelizer.on_main:
        raise JobError("on purpose", parallelizer.id)


def test_of_several_exceptions_the_lowest_rank_counts(p: Par) -> None:
    """The first failure ends the run for all, so that not every rank may come to its own."""
    if p.nprocs == 1:
        p.run(raises_on_workers)
        return
    error = failure(p, raises_on_workers)
    rank = error.args[1]
    expect(p, (type(error), error.args), (JobError, ("on purpose", rank)))
    if sys.version_info >= (3, 11):
        noted = re.findall(r"rank (\d+)", "\n".join(getattr(error, "__notes__", [])))
        expect(p, [number for number in noted if int(number) <= rank], [])
    expect_to_work(p)


@pytest.mark.parametrize("where", ["main", "last", "all"])
def test_an_assertion_surfaces(p: Par, where: str) -> None:
    text = expect_failure(p, AssertionError, raises_there, where, returns, "assertion")
    expect(p, "not here" in text, True)


def test_an_exception_that_cannot_be_pickled(p: Par) -> None:
    error = failure(p, raises_there, "last", gathers_once, "unpicklable")
    if p.nprocs == 1:
        expect(p, (type(error), error.args), (UnpicklableError, ("has a lock",)))
    else:
        expect(p, isinstance(error, WorkerError), True)
        expect(p, "UnpicklableError" in str(error) and "has a lock" in str(error), True)
        expect(p, isinstance(error.__cause__, RemoteTraceback), True)
        expect(p, "raises_there" in str(error.__cause__), True)
    expect_to_work(p)


# -- exceptions arrive as they were, and are not constructed anew ---------------------------------

CONSTRUCTED: list[str] = []  # by constructors of this file, on this process


class Counted(Exception):
    """Says in its text what it was given, so that to be constructed from that doubles it."""

    def __init__(self, name: object, *, code: int = 3) -> None:
        CONSTRUCTED.append(type(self).__name__)
        super().__init__(f"parameter {name} must be positive")
        self.code = code


class NeedsKeywords(Counted):
    def __init__(self, *, reason: object) -> None:
        super().__init__(reason)
        self.reason = reason


class MadeByNew(Counted):
    def __new__(cls, one: int, two: int) -> MadeByNew:  # noqa: ARG004
        return super().__new__(cls, "of", "new")

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


class Slotted(Counted):
    __slots__ = ("__hidden", "none", "seen", "unset")

    def __init__(self) -> None:
        super().__init__("slotted")
        self.__hidden, self.seen, self.none = "hidden", [1, 2], None

    def __str__(self) -> str:
        return f"{self.__hidden} {hasattr(self, 'unset')} {self.none}"


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    x: float
    name: str = "frozen"

    def __post_init__(self) -> None:
        CONSTRUCTED.append("Frozen")


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted(Exception):
    x: float


class Bothered(Counted):  # noqa: PLW1641 - that it has no hash is part of it
    """Minds whatever is done with it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "code":
            raise RuntimeError(f"{name} is not to be set")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} is not to be had")

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not to be compared")

    def __str__(self) -> str:
        raise RuntimeError("not to be told")


class TwoKinds(Counted, KeyError, AttributeError):
    """Of two kinds of which the second has the members."""


class FileMissing(OSError):
    """Python passes a number on to it that it would make another class of."""


class FileWanted(OSError):
    def __init__(self, name: str) -> None:
        CONSTRUCTED.append("FileWanted")
        super().__init__(2, "is wanted", name)


class ItsOwnWay(Exception):
    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name}: {code}")
        self.name, self.code = name, code

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.code)


class InheritsItsWay(ItsOwnWay):
    """Its constructor does not take what its base would call it with."""

    def __init__(self, name: str) -> None:
        super().__init__(name, 7)


class HasNoWay(Counted):
    def __reduce__(self) -> Any:
        raise RuntimeError("no way")


class ComesAsAnother(Counted):
    def __reduce__(self) -> Any:
        return RuntimeError, ("another",)


def with_changed_args() -> Exception:
    error = Counted("first")
    error.args = ("second", {"third": 3})
    return error


def of_a_local_class() -> Exception:
    class Local(Exception):
        def __init__(self, name: str) -> None:
            super().__init__(f"local {name}")

    return Local("class")


def found_in_itself() -> Exception:
    error = Counted("itself")
    error.__dict__["itself"] = [error]
    return error


# How each is made; by a name, as not all can be pickled.
TO_RAISE: dict[str, Callable[[], BaseException]] = {
    "doubled text": lambda: Counted("x"),
    "keywords": lambda: NeedsKeywords(reason="none"),
    "its own __new__": lambda: MadeByNew(1, 2),
    "changed args": with_changed_args,
    "slots": Slotted,
    "frozen": lambda: Frozen(1.5),
    "frozen slots": lambda: FrozenSlotted(1.5),
    "bothered": lambda: Bothered("x"),
    "two kinds": lambda: TwoKinds("x"),
    **({"local class": of_a_local_class} if CLOUDPICKLE else {}),
    "arrays": lambda: NeedsKeywords(reason=np.arange(1000.0).reshape(10, 100).T),
    "parallelizer": lambda: NeedsKeywords(reason=Parallelizer.lookup("serial")),
    "itself": found_in_itself,
    "own way": lambda: ItsOwnWay("name", 3),
    "inherited way": lambda: InheritsItsWay("name"),
    "no way": lambda: HasNoWay("x"),
    "another's way": lambda: ComesAsAnother("x"),
    "KeyError": lambda: KeyError("a\nkey"),
    "SystemExit": lambda: SystemExit(3),
    "BaseException": lambda: BaseException("base"),
    "StopIteration": lambda: StopIteration([5]),
    "OSError": lambda: OSError(2, "gone", "from", None, "to"),
    "FileNotFoundError": lambda: FileNotFoundError("by its text"),
    "BlockingIOError": lambda: BlockingIOError(11, "later", 5),
    "FileMissing": lambda: FileMissing(2, "is missing", b"name"),
    "FileWanted": lambda: FileWanted("name"),
    "ImportError": lambda: ImportError("none", name="it", path="there"),
    "SyntaxError": lambda: SyntaxError("bad", ("file.py", 3, 5, "x = = 3", 3, 6)),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "no start"),
    "UnicodeTranslateError": lambda: UnicodeTranslateError("text", 1, 2, "no"),
    "AxisError": lambda: getattr(np, "exceptions", np).AxisError(5, 2, "here"),
    "LinAlgError": lambda: np.linalg.LinAlgError("singular"),
    "JSONDecodeError": lambda: json.JSONDecodeError("bad", "{", 1),
    "CalledProcessError": lambda: subprocess.CalledProcessError(3, "ls", "out"),
    "WaitTimeout": lambda: WaitTimeout("long"),
}
if sys.version_info >= (3, 11):

    class OwnGroup(builtins.ExceptionGroup[Exception]):
        """Its constructor takes something else than its base's."""

        def __new__(cls, code: int) -> OwnGroup:
            return super().__new__(cls, f"code {code}", [NeedsKeywords(reason="x"), Frozen(2.0)])

    TO_RAISE["OwnGroup"] = lambda: OwnGroup(5)
    TO_RAISE["ExceptionGroup"] = lambda: builtins.ExceptionGroup(
        "two", [Frozen(1), OSError(2, "x")]
    )

AS_PICKLE_HAS_IT = {"inherited way", "another's way"}  # an exception that is a value
CONSTRUCTED_ANEW = {"own way", "inherited way", "another's way", "JSONDecodeError"}


def raise_in_full(name: str) -> None:
    error = TO_RAISE[name]()
    vars(error)["__notes__"] = [f"noted of {name}"]
    try:
        raise LookupError("the context")
    except LookupError:
        raise error from Counted("the cause")


def caught_in_full(name: str) -> BaseException:
    try:
        raise_in_full(name)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def seen(error: BaseException | None, depth: int = 0) -> Any:
    """Describe an exception by all that can be seen of it; its causes are those of its origin."""
    if error is None or depth > 3:
        return None
    causes = error.__cause__ if isinstance(error.__cause__, RemoteTraceback) else error
    told = {}
    for name in ("__str__", "__repr__", *sorted({*dir(error)} - {"with_traceback", "add_note"})):
        if not name.startswith("__") or name in ("__notes__", "__str__", "__repr__", "__dict__"):
            try:
                found = getattr(error, name)
                found = found() if callable(found) else found
            except Exception as why:
                found = why
            nested = isinstance(found, tuple | list) and any(
                isinstance(one, BaseException) for one in found
            )
            told[name] = [seen(one, depth + 1) for one in found] if nested else repr(found)
    told.pop("__dict__" if "itself" in vars(error) else "", None)
    return (
        type(error).__name__,
        told,
        causes.__suppress_context__,
        seen(causes.__cause__, depth + 1),
        seen(causes.__context__, depth + 1),
    )


def raises_in_full(name: str, rank: int, *, parallelizer: Par) -> None:
    parallelizer.wait()
    if parallelizer.id == rank:
        raise_in_full(name)
    parallelizer.wait()


def counts_constructions(*, parallelizer: Par) -> Any:
    return sum(parallelizer.allgather(len(CONSTRUCTED)))


@pytest.mark.parametrize("name", TO_RAISE)
def test_an_exception_arrives_as_it_was(p: Par, name: str) -> None:
    original = caught_in_full(name)
    for rank in {0, p.nprocs - 1}:
        before = p.run(counts_constructions)
        error: Any = None
        try:
            p.run(raises_in_full, name, rank)
        except BaseException as raised:
            error = raised
        constructed = p.run(counts_constructions) - before
        expect(p, seen(error), seen(original))
        expect(p, name == "local class" or type(error) is type(original), True)
        if name not in CONSTRUCTED_ANEW:
            before = len(CONSTRUCTED)
            caught_in_full(name)
            expect(p, constructed, len(CONSTRUCTED) - before)
        remote = isinstance(error.__cause__, RemoteTraceback)
        expect(p, remote and "raise_in_full" in str(error.__cause__), rank > 0)
        expect_to_work(p)


def hands_on(name: str, *, parallelizer: Par) -> Any:
    error = caught_in_full(name)
    gathered = parallelizer.gather([error])
    mapped = parallelizer.map(caught_in_full, [name] * 6, chunksize=1)
    came = parallelizer.broadcast({"error": error} if parallelizer.on_main else None)["error"]
    told = parallelizer.gather(seen(came))
    if not parallelizer.on_main:
        return None
    return [*(seen(one) for (one,) in gathered), *map(seen, mapped), *told]


@pytest.mark.parametrize("name", [name for name in TO_RAISE if name not in AS_PICKLE_HAS_IT])
def test_an_exception_that_is_a_value_stays_as_it_was(p: Par, name: str) -> None:
    wanted = seen(caught_in_full(name))
    for found in p.run(hands_on, name) or []:
        expect(p, found, wanted) if p.on_main else None


def refuses_an_item(x: int) -> int:
    if x == 5:
        raise Frozen(5.0)
    return x


def refuses_in(what: str, *, parallelizer: Par) -> Any:
    """Let an exception that refuses attributes pass what the module does around a function."""
    if what == "subset":
        return parallelizer.run(refuses_in, "map", comm=[0])
    if what == "imap":
        return list(parallelizer.imap(refuses_an_item, range(20)))
    return parallelizer.map(refuses_an_item, range(20), progress=what == "bar")


@pytest.mark.parametrize(
    "what", ["map", "subset", "imap", *(["bar"] if importlib.util.find_spec("tqdm") else [])]
)
@BOTH_WAYS
def test_an_exception_that_refuses_attributes_passes_everywhere(
    p: Par, way: Any, what: str
) -> None:
    error = caught_from(way, p, refuses_in, what)
    expect(p, (type(error), error and vars(error).get("x")), (Frozen, 5.0))
    expect_to_work(p)


def notes_oddly(notes: Any, *, parallelizer: Par) -> None:
    error = Frozen(float(parallelizer.id))
    vars(error)["__notes__"] = notes
    parallelizer.wait()
    raise error


@pytest.mark.parametrize("notes", [None, "text", ("a", "tuple"), 5, ["a list"]])
def test_odd_notes_disturb_nobody(p: Par, notes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallelizer._SETTLING", 5)  # main goes on once all have failed
    error = failure(p, notes_oddly, notes)
    kept = [*notes] if isinstance(notes, list | tuple) else [notes] if notes is not None else []
    wanted = [*kept, *(f"rank {rank} failed too" for rank in range(1, p.nprocs))]
    found = vars(error)["__notes__"]
    if p.on_main and p.nprocs > 1:
        found = [note if note in kept else note[:17] for note in found]
    expect(p, (type(error), found), (Frozen, wanted if p.nprocs > 1 else notes))


def has_a_cause_with_a_lock(where: str, *, parallelizer: Par) -> Any:
    error = Counted("x")
    error.__cause__ = UnpicklableError("has a lock")
    if where == "value":
        found = parallelizer.gather({"error": error})
        return [(type(one["error"]), str(one["error"].__cause__)) for one in found or []]
    if parallelizer.id == parallelizer.nprocs - 1:
        raise error
    return parallelizer.gather(0)


def test_an_exception_arrives_without_what_cannot_be_pickled(p: Par) -> None:
    for kind, cause in p.run(has_a_cause_with_a_lock, "value") or []:
        expect(p, (kind, "has a lock" in cause), (Counted, True))
    error = failure(p, has_a_cause_with_a_lock, "raised")
    expect(p, (type(error), "has a lock" in str(error.__cause__)), (Counted, True))
    expect_to_work(p)


class Interrupts(Exception):
    """Is interrupted where it is pickled, or where it is unpickled."""

    def __init__(self, when: str) -> None:
        super().__init__(when)

    def __reduce__(self) -> Any:
        if self.args == ("pickled",):
            raise KeyboardInterrupt(*self.args)
        return interrupt, self.args


def interrupt(when: str) -> None:
    raise KeyboardInterrupt(when)


def fails_to_interrupt(when: str, *, parallelizer: Par) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        raise Interrupts(when)
    parallelizer.wait()


def test_an_interrupt_amid_an_exception_is_not_swallowed(p: Par) -> None:
    """Nor does main wait for the word of a process that was interrupted."""
    for when in ("pickled", "unpickled"):
        raised: BaseException | None = None
        try:
            p.run(fails_to_interrupt, when)
        except BaseException as error:
            raised = error
        kind = {"pickled": WorkerError, "unpickled": KeyboardInterrupt}[when]
        expect(p, type(raised), kind if p.nprocs > 1 else Interrupts)
        expect_to_work(p)


def items_amid_a_ctrl_c() -> Iterator[int]:
    yield 1
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("amid the items") from None


def reads_amid_a_ctrl_c(verb: str, *, parallelizer: Par) -> None:
    data = items_amid_a_ctrl_c() if parallelizer.on_main else range(parallelizer.nprocs)
    options = {"vectorized": True} if verb == "map of blocks" else {}
    if "map" in verb:
        parallelizer.map(square, data, **options)
    else:
        getattr(parallelizer, verb)(data)


@pytest.mark.parametrize("verb", ["map", "map of blocks", "scatter", "alltoall"])
def test_a_ctrl_c_acts_while_main_reads_its_items(p: Par, verb: str) -> None:
    """The iterator may wait, even for ever."""
    raised: BaseException | None = None
    try:
        p.run(reads_amid_a_ctrl_c, verb)
    except BaseException as error:
        raised = error
    expect(p, repr(raised), "KeyboardInterrupt('amid the items')")
    expect_to_work(p)


def raises_what_main_does_not_know(*, parallelizer: Par) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        kind = type("KnownHere", (Counted,), {"__module__": __name__})
        globals()["KnownHere"] = kind
        raise kind("of a class that is not known")
    parallelizer.wait()


def test_an_exception_of_a_class_that_main_does_not_know(p: Par) -> None:
    error = failure(p, raises_what_main_does_not_know)
    kind = "KnownHere" if p.nprocs == 1 else "WorkerError"
    expect(p, (type(error).__name__, "is not known" in str(error)), (kind, True))
    globals().pop("KnownHere", None)
    expect_to_work(p)


def catches_its_own(*, parallelizer: Par) -> Any:
    try:
        raise JobError("mine", 1)
    except JobError:
        return parallelizer.allgather(parallelizer.id)


def test_an_exception_that_is_handled_disturbs_nobody(p: Par) -> None:
    expect(p, p.run(catches_its_own), list(range(p.nprocs)))


def fails_inside(*, parallelizer: Par) -> None:
    if parallelizer.id == 1:
        raise JobError("inside", 1)
    parallelizer.wait()


def disagrees_inside(*, parallelizer: Par) -> None:
    if parallelizer.id == 1:
        parallelizer.wait()
    else:
        parallelizer.gather(0)


def leaves_inside(*, parallelizer: Par) -> None:
    if parallelizer.id == 0:
        parallelizer.gather(0)


def stays_inside(*, parallelizer: Par) -> None:
    for _ in range(5):
        parallelizer.wait()


def nests(inner: Callable[..., Any], handled: bool, *, parallelizer: Par) -> None:
    """Run `inner` on the first two; where all goes well there, the last one fails outside."""
    if parallelizer.id == parallelizer.nprocs - 1 and inner is stays_inside:
        raise JobError("outside", 1)
    try:
        parallelizer.run(inner, comm=[0, 1])
    except JobError:
        if not handled:
            raise
    parallelizer.wait()


@pytest.mark.parametrize(
    ("inner", "handled", "kind"),
    [(fails_inside, False, "JobError"), (stays_inside, False, "JobError"),
     (disagrees_inside, False, "ContractError"), (leaves_inside, False, "ContractError"),
     (fails_inside, True, "")],
)  # fmt: skip
def test_faults_in_and_beside_a_nested_run(
    p: Par, inner: Callable[..., Any], handled: bool, kind: str
) -> None:
    if p.nprocs < 3:
        inner, handled, kind = fails_inside if p.nprocs > 1 else stays_inside, False, "JobError"
    for _ in range(3):  # the first makes the communicator, where there is one
        if kind:
            error = failure(p, nests, inner, handled)
            expect(p, type(error).__name__, kind)
        else:  # all of the group have caught it
            p.run(nests, inner, handled)
        expect_to_work(p)


def raises_at_length(culprit: int, length: int, *, parallelizer: Par) -> None:
    if parallelizer.id == culprit:
        raise JobError("x" * length, culprit)
    parallelizer.gather(1)


@pytest.mark.parametrize("length", [10_000, 100_000, 10_000_000])
def test_an_exception_may_be_long(p: Par, length: int) -> None:
    for culprit in {0, p.nprocs - 1}:
        error = failure(p, raises_at_length, culprit, length)
        expect(p, (type(error), error.args), (JobError, ("x" * length, culprit)))
        expect_to_work(p)


def dies_beside(*, parallelizer: Par) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        os._exit(3)
    for _ in range(2):
        parallelizer.run(meets, comm=[0, 1])
    parallelizer.gather(1)


def meets(*, parallelizer: Par) -> None:
    time.sleep(0.2)
    parallelizer.wait()


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_death_beside_a_nested_run(method: str) -> None:
    with create(method) as parallelizer:
        with pytest.raises(WorkerDied, match="rank 2"):
            parallelizer.run(dies_beside)
        expect_to_work(parallelizer)


def strays(seconds: float, *, parallelizer: Par) -> None:
    if parallelizer.on_main:
        time.sleep(seconds)
    if parallelizer.id == 2:
        parallelizer.wait()
    else:
        parallelizer.allgather(0)


@pytest.mark.parametrize("seconds", [0.0, 1.3])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_late_main_does_not_change_who_is_named(method: str, seconds: float) -> None:
    with create(method) as parallelizer:
        for _ in range(2):
            with pytest.raises(ContractError) as caught:
                parallelizer.run(strays, seconds)
            text = str(caught.value)
            assert "deadlock" not in text
            assert "allgather #1" in text
            assert (
                "rank 2 called wait #1" in text
                or "rank 2 waits in wait #1" in text
                or ("where rank 2 called wait #1" in text)
            )
            expect_to_work(parallelizer)


def goes_on_after_a_disagreement(times: int, *, parallelizer: Par) -> Any:
    verbs = [functools.partial(strays, 0.0, parallelizer=parallelizer)] * times
    verbs += [
        parallelizer.wait,
        functools.partial(parallelizer.broadcast, 1),
        functools.partial(parallelizer.send, 1, 0),
    ]
    errors = [caught_from(verb) for verb in verbs]
    assert type(errors[0]) is ContractError
    assert all(error is errors[0] for error in errors)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_disagreement_ends_the_run_for_good(method: str, times: int) -> None:
    """Whoever catches it gets it again, and so does who has called `run`."""
    with create(method) as parallelizer:
        with pytest.raises(ContractError, match=r"called wait #1|allgather #1"):
            parallelizer.run(goes_on_after_a_disagreement, times)
        expect_to_work(parallelizer)


def leaves_a_note_late(file: Path, *, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        time.sleep(0.3)
        file.write_text("through")
    return parallelizer.gather(parallelizer.id)


def sits_out(file: Path, *, parallelizer: Par) -> Any:
    found = parallelizer.run(leaves_a_note_late, file, comm=[0, 1])
    through = file.exists()
    return found, parallelizer.gather((parallelizer.id, through))


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_who_is_in_no_group_waits_until_it_is_through(method: str, tmp_path: Path) -> None:
    with create(method) as parallelizer:
        found, all_through = parallelizer.run(sits_out, tmp_path / "note")
        assert found == [0, 1]
        assert all_through == [(0, True), (1, True), (2, True)]


def fails_in_a_group(who: int, *, parallelizer: Par) -> Any:
    parallelizer.wait()
    if parallelizer.id == who:
        raise JobError("in a group", who)
    return parallelizer.gather(parallelizer.id)


def catches_what_a_group_raises(who: int, *, parallelizer: Par) -> Any:
    fails = functools.partial(parallelizer.run, fails_in_a_group, who, comm=[0, 2])
    errors = [caught_from(fails) for _ in range(3)]
    caught = [error.args for error in errors if isinstance(error, JobError)]
    nested = parallelizer.run(nests_once_more, comm=[0, 1])
    return parallelizer.gather((parallelizer.id, caught)), nested


def nests_once_more(*, parallelizer: Par) -> Any:
    alone = parallelizer.run(fails_alone, comm=[0]) if parallelizer.on_main else None
    if not parallelizer.on_main:
        parallelizer.run(fails_alone, comm=[0])
    return parallelizer.gather((parallelizer.id, alone))


def fails_alone(*, parallelizer: Par) -> Any:
    return parallelizer.allgather("alone")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_what_one_raises_in_a_group_all_of_it_may_catch(method: str, who: int) -> None:
    with create(method) as parallelizer:
        for _ in range(2):
            gathered, nested = parallelizer.run(catches_what_a_group_raises, who)
            caught = [("in a group", who)] * 3
            assert gathered == [(0, caught), (1, []), (2, caught)]
            assert nested == [(0, ["alone"]), (1, None)]


LONG = 300_000  # numbers: several slots


def moves(verb: str, like: int, sizes: list[int], step: int, p: Par) -> None:
    """Call a verb with arrays of `sizes`, by rank, or one `like` these, and check what comes."""
    me, rank_of_all = p.id, range(p.nprocs)
    if verb == "broadcast":
        found = p.broadcast({"x": np.full(like, step)} if p.on_main else None)
        assert np.array_equal(found["x"], np.full(like, step))
    elif verb == "scatter":
        found = p.scatter([np.full(size, step) for size in sizes] if p.on_main else None)
        assert np.array_equal(found[0], np.full(sizes[me], step))
    elif "gather" in verb:
        found = getattr(p, verb)(np.full(sizes[me], me))
        if p.on_main or verb == "allgather":
            assert np.array_equal(found, np.repeat(rank_of_all, sizes))
    elif "reduce" in verb:
        found = getattr(p, verb)(np.full(like, me + step))
        if p.on_main or verb == "allreduce":
            assert np.array_equal(found, np.full(like, sum(rank_of_all) + step * p.nprocs))


def draws_verbs(seed: int, steps: int, *, parallelizer: Par) -> None:
    """The same verbs on all, of the same sizes."""
    p, draw, me = parallelizer, np.random.default_rng(seed), parallelizer.id
    verbs = ["broadcast", "scatter", "gather", "allgather", "reduce", "allreduce"]
    for step in range(steps):
        verb = draw.choice([*verbs, "wait", "ring", "group", "map"])
        sizes = draw.choice([0, 1, 100, LONG], p.nprocs).tolist()
        like, before = sizes[-1], (me - 1) % p.nprocs
        if draw.random() < 0.1:
            time.sleep(0.002 * me)
        if verb == "wait":
            p.wait()
        elif verb == "ring":
            p.send(np.full(sizes[me], step), (me + 1) % p.nprocs)
            assert np.array_equal(p.receive(before), np.full(sizes[before], step))
        elif verb == "group":
            members = {0, *draw.choice(p.nprocs, 2).tolist()}
            p.run(draws_verbs, int(draw.integers(2**31)), 3, comm=sorted(members))
        elif verb == "map":
            found = p.map(square, range(like % 1000))
            assert not p.on_main or found == [x * x for x in range(like % 1000)]
        else:
            moves(str(verb), like, sizes, step, p)


@pytest.mark.parametrize("nprocs", [2, 3, 5])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_random_verbs(method: str, nprocs: int) -> None:
    with create(method, nprocs) as parallelizer:
        for seed in range(6):
            parallelizer.run(draws_verbs, seed, 40)


def raises_beside_a_nested_group(*, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        raise JobError("in a group", 1)
    return parallelizer.run(fails_alone, comm=[0])


def raises_much(*, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        raise JobError("x" * 5_000_000, 1)
    return parallelizer.gather(0)


def swallows_and_goes_on(verbs: int, *, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        raise JobError("in a group", 1)
    for _ in range(1 + verbs):
        with contextlib.suppress(JobError):
            parallelizer.wait()
    return "fine"


def catches_from_groups(*, parallelizer: Par) -> Any:
    p = parallelizer
    functions = [
        raises_beside_a_nested_group,
        raises_much,
        functools.partial(swallows_and_goes_on, 0),
        functools.partial(swallows_and_goes_on, 2),
    ]
    kinds = [
        type(caught_from(functools.partial(p.run, func, comm=[0, 1]))).__name__
        for func in functions
    ]
    return p.allgather(kinds)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_group_fails_as_one_whatever_its_members_do(method: str) -> None:
    with create(method) as parallelizer:
        failed = ["JobError"] * 3
        found = parallelizer.run(catches_from_groups)
        assert found == [
            ["JobError", "WorkerError", *failed[1:]],
            [*failed, "JobError"],
            ["NoneType"] * 4,
        ]


def skips_a_call(*, parallelizer: Par) -> Any:
    mine = (x for x in [1]) if parallelizer.id == 1 else "first"
    try:
        return parallelizer.allgather(mine)
    except PackingError:
        return parallelizer.allgather("second")


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_calls_of_other_numbers_do_not_meet(method: str) -> None:
    with create(method) as parallelizer:
        with pytest.raises((ContractError, PackingError), match=r"allgather #[12]|cannot pickle"):
            parallelizer.run(skips_a_call)
        expect_to_work(parallelizer)


def reduces_by_other_words(size: int, *, parallelizer: Par) -> Any:
    op = "max" if parallelizer.id else "sum"
    found = parallelizer.allreduce(np.full(size, parallelizer.id), op)
    return parallelizer.allgather(sorted({*found.tolist()}), concatenate=False)


@pytest.mark.parametrize("size", [1, LONG])
def test_the_word_of_main_counts_in_allreduce(p: Par, size: int) -> None:
    expect(p, p.run(reduces_by_other_words, size), [[sum(range(p.nprocs))]] * p.nprocs)


def exchanges_arrays(sizes: list[int], *, parallelizer: Par) -> Any:
    p, ranks = parallelizer, range(parallelizer.nprocs)

    def sent(source: int, target: int) -> Array:
        return np.full(sizes[(source + target) % len(sizes)], 10 * source + target)

    found = p.alltoall([sent(p.id, rank) for rank in ranks])
    right = [np.array_equal(found[rank], sent(rank, p.id)) for rank in ranks]
    return p.allgather((all(right), all(array.flags.writeable for array in found)))


@pytest.mark.parametrize("sizes", [[1], [0, 3, 7], [LONG, 0, 5], [LONG, LONG]], ids=str)
def test_alltoall_moves_what_is_at_each_place(p: Par, sizes: list[int]) -> None:
    expect(p, p.run(exchanges_arrays, sizes), [(True, True)] * p.nprocs)


def exchanges_objects(*, parallelizer: Par) -> Any:
    p = parallelizer
    strided = np.arange(12.0).reshape(3, 4).T
    found = p.alltoall([{"from": p.id, "to": rank, "what": strided} for rank in range(p.nprocs)])
    laid_out = all(
        one["what"].flags.c_contiguous or one["what"].flags.f_contiguous for one in found
    )
    return p.allgather([(one["from"], one["to"], laid_out) for one in found])


def test_alltoall_of_objects(p: Par) -> None:
    wanted = [[(source, me, True) for source in range(p.nprocs)] for me in range(p.nprocs)]
    expect(p, p.run(exchanges_objects), wanted)


def exchanges_badly(fault: str, culprit: int, *, parallelizer: Par) -> Any:
    p, data = parallelizer, list(range(parallelizer.nprocs))
    brings = {
        "longer": [*data, 0], "shorter": data[1:], "none": None,
        "unpicklable": [threading.Lock() for _ in data],
    }  # fmt: skip
    bad = p.id == min(culprit, p.nprocs - 1)
    error = caught_from(p.alltoall, brings[fault] if bad else data)
    # In step: all have heard of it at the same call, and go on together.
    return p.allgather(type(error).__name__), p.allgather(p.alltoall(data))


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("fault", ["longer", "shorter", "none", "unpicklable"])
def test_what_one_rank_cannot_exchange_is_told_on_all(p: Par, fault: str, culprit: int) -> None:
    told = {"none": "TypeError", "unpicklable": "PackingError"}.get(fault, "ValueError")
    if p.nprocs == 1 and fault == "unpicklable":
        told = "NoneType"  # there is nobody to pack it for
    expect(p, p.run(exchanges_badly, fault, culprit), (
        [told] * p.nprocs, [[rank] * p.nprocs for rank in range(p.nprocs)],
    ))  # fmt: skip


def counts_rounds(*, parallelizer: Par) -> Any:
    p, array = parallelizer, np.ones(3)
    verbs: dict[str, Callable[[], Any]] = {
        "wait": p.wait,
        "broadcast": lambda: p.broadcast(array),
        "scatter": lambda: p.scatter(range(9)),
        "gather": lambda: p.gather(array),
        "allgather": lambda: p.allgather({"a": array}),
        "allreduce": lambda: p.allreduce(array),
        "alltoall": lambda: p.alltoall(range(p.nprocs)),
    }
    counts = {}
    for verb, call in verbs.items():
        before = p._comm._round
        call()
        counts[verb] = p._comm._round - before
    return p.allgather(counts)


def test_a_small_verb_is_one_round() -> None:
    with MultiprocessingParallelizer(3) as parallelizer:
        for counts in parallelizer.run(counts_rounds):
            assert set(counts.values()) == {1}, counts


def counts_calls(*, parallelizer: Par) -> Any:
    """How many Python functions a verb calls on this rank, beside those that wait for others."""
    p, waits = parallelizer, ("look", "_await_words", "wake_others")
    verbs: dict[str, Callable[[], Any]] = {
        "wait": p.wait,
        "broadcast": lambda: p.broadcast(1),
        "gather": lambda: p.gather(1),
        "allreduce": lambda: p.allreduce(1.0),
    }
    counts = {}
    for name, verb in verbs.items():
        for _ in range(3):
            verb()
        calls, depth = 0, 0

        def count(frame: types.FrameType, event: str, _: object) -> None:
            nonlocal calls, depth
            if frame.f_code.co_name in waits:
                depth += {"call": 1, "return": -1}.get(event, 0)
            elif event == "call" and depth == 0:
                calls += 1

        sys.setprofile(count)
        verb()
        sys.setprofile(None)
        counts[name] = calls
    return p.allgather(counts)


def test_python_calls_do_not_grow_with_the_ranks() -> None:
    """But for what has to be unpacked: a few for each rank whose value comes here."""
    few, many = (MultiprocessingParallelizer(n).run(counts_calls) for n in (2, 5))
    for rank in range(2):
        for verb in ("wait", "broadcast", *(["gather"] if rank else [])):
            assert many[rank][verb] == few[rank][verb], (rank, verb)
        for verb in ("gather", "allreduce"):
            assert many[rank][verb] <= few[rank][verb] + 3 * 10, (rank, verb)
    assert max(few[0].values()) < 60, few


def sends_across(*, parallelizer: Par) -> Any:
    """Send outside what is received inside a nested run, and the other way round."""
    if parallelizer.id == 1:
        parallelizer.send("from outside", 0)
    received = parallelizer.run(receives_across, comm=[0, 1])
    return received, parallelizer.receive(1, tag=1) if parallelizer.on_main else None


def receives_across(*, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        parallelizer.send("from inside", 0, tag=1)
        return None
    return parallelizer.receive(1)


def test_messages_cross_the_bounds_of_a_nested_run(p: Par) -> None:
    if p.nprocs > 1:
        expect(p, p.run(sends_across), ("from outside", "from inside"))
    else:
        expect(p, type(failure(p, sends_across)), ValueError)  # of comm=[0, 1]


def test_one_class_heads_the_errors() -> None:
    assert issubclass(ParallelizerError, RuntimeError)
    for kind in (WorkerError, WorkerDied, ContractError, PackingError, WaitTimeout):
        assert issubclass(kind, ParallelizerError)
    assert issubclass(WaitTimeout, TimeoutError)


def broadcasts_a_lock(where: str, *, parallelizer: Par) -> None:
    if where == "broadcast":
        parallelizer.broadcast({"lock": threading.Lock()})
    else:
        parallelizer.gather(None if parallelizer.on_main else {"lock": threading.Lock()})


@pytest.mark.parametrize("where", ["broadcast", "gather"])
def test_what_cannot_be_pickled(p: Par, where: str) -> None:
    if p.nprocs == 1:
        p.run(broadcasts_a_lock, where)
    else:
        expect(p, "lock" in expect_failure(p, PackingError, broadcasts_a_lock, where), True)


# ---------------------------------------------------------------------------------------------
# Errors: processes that disagree


def opens_with_two_calls(parallelizer: Par) -> Any:
    """Make two collective calls, so that the next is #3, and tell whether this is the last rank."""
    parallelizer.broadcast(1)
    parallelizer.wait()
    return parallelizer.id == parallelizer.nprocs - 1


def other_verbs(*, parallelizer: Par) -> None:
    if opens_with_two_calls(parallelizer):
        parallelizer.gather(1)
    else:
        parallelizer.scatter([1])


def other_verbs_with_data(*, parallelizer: Par) -> None:
    if opens_with_two_calls(parallelizer):
        parallelizer.broadcast(np.zeros(MIB))
    else:
        parallelizer.gather(np.zeros(MIB))


def last_returns(*, parallelizer: Par) -> None:
    if not opens_with_two_calls(parallelizer):
        parallelizer.gather(1)


def main_returns(*, parallelizer: Par) -> None:
    opens_with_two_calls(parallelizer)
    if not parallelizer.on_main:
        parallelizer.gather(1)


def last_waits(*, parallelizer: Par) -> None:
    if opens_with_two_calls(parallelizer):
        parallelizer.wait()


def last_calls_once_more(*, parallelizer: Par) -> None:
    if opens_with_two_calls(parallelizer):
        parallelizer.allreduce(1)
    parallelizer.allgather(1)


def last_receives(*, parallelizer: Par) -> None:
    if opens_with_two_calls(parallelizer):
        parallelizer.receive(0)


DISAGREEMENTS: dict[Callable[..., None], list[str]] = {
    # body: what the error must say, beside the number of the last rank
    other_verbs: ["gather #3", "scatter #3"],
    other_verbs_with_data: ["broadcast #3", "gather #3"],
    last_returns: ["gather #3", "returned"],
    main_returns: ["gather #3", "rank 0 returned"],
    last_waits: ["wait #3", "returned"],
    last_calls_once_more: ["allreduce #3", "allgather #3"],
    last_receives: ["receive", "rank 0 returned"],
}


@pytest.mark.parametrize("body", DISAGREEMENTS)
def test_processes_that_disagree(p: Par, body: Callable[..., None]) -> None:
    if p.nprocs > 1:
        text = expect_failure(p, ContractError, body)
        expect(p, [fact for fact in DISAGREEMENTS[body] if fact not in text] and text, [])
        ranks = set(re.findall(r"rank (\d+)", text))
        expect(p, len(ranks) >= 2 and (body is main_returns or str(p.nprocs - 1) in ranks), True)
    elif body is last_receives:
        expect_failure(p, ContractError, body)
    else:
        p.run(body)


# ---------------------------------------------------------------------------------------------
# Connections, sockets, and what else belongs to the processes of a machine


def tell(word: int, end: Any) -> None:
    """Write a number to a connection, or to one in an object or list."""
    if isinstance(end, list | Holder):
        tell(word, end.array if isinstance(end, Holder) else end[0])
    else:
        end.send_bytes(bytes([word]))


def tell_all(ends: Any) -> None:
    for word, end in ends:
        tell(word, end)


def heard(end: Any, count: int) -> list[int]:
    """Read so many numbers, in whatever order they come."""
    return sorted(end.recv_bytes()[0] for _ in range(count) if end.poll(30))


def pipe() -> tuple[Any, Any]:
    return multiprocessing.Pipe(duplex=False)


WORDS = range(40)

# Outside run, main has all words told to an end.
TELLERS: dict[str, Callable[[Par, Any], object]] = {
    "extra_args": lambda par, end: par.map(tell, WORDS, ([end],)),
    "extra_kwargs": lambda par, end: par.map(tell, WORDS, (), {"end": Holder(end, "")}),
    "items": lambda par, end: par.starmap(tell, [(i, end) for i in WORDS]),
    "imap": lambda par, end: list(par.imap(tell_all, [[(i, end)] for i in WORDS], 2)),
    "blocks": lambda par, end: par.map(tell_all, [(i, end) for i in WORDS], vectorized=True),
    "run": lambda par, end: par.run(tells_its_share, end, end=[end]),
}
if CLOUDPICKLE:
    TELLERS["closure"] = lambda par, end: par.map(lambda i: tell(i, end), WORDS)


def tells_its_share(_: Any, end: Any, *, parallelizer: Par) -> None:
    for word in WORDS[parallelizer.id :: parallelizer.nprocs]:
        tell(word, end)


if not UNDER_MPI:

    def test_connections_can_be_passed_on(p: Par) -> None:
        readable, writable = pipe()
        with readable, writable:
            for name, teller in TELLERS.items():
                teller(p, writable)
                check(heard(readable, len(WORDS)), [*WORDS], name)
            check(p.run(exchanges_ends), [[rank] * 3 for rank in range(p.nprocs)])
            tell(1, writable)  # which is still main's own
            check(heard(readable, 1), [1])
            assert internals._safe_start_method("fork", 2) == "fork"  # as before

    def test_sockets_can_be_passed_on(p: Par) -> None:
        readable, writable = socket.socketpair()
        with readable, writable:
            p.run(uses_sockets, writable)
            check(len(readable.recv(99)), 2 * p.nprocs)


class Registered:
    """Stands for what a library registers: only multiprocessing knows how it is sent."""

    def __init__(self, word: str) -> None:
        self.word = word


def restored(word: str) -> Registered:
    return Registered(word + ", by its reducer")


def sends_registered(*, parallelizer: Par) -> Any:
    par = parallelizer
    reduction = importlib.import_module("multiprocessing.reduction")
    reduction.register(Registered, lambda one: (restored, (one.word,)))
    try:
        return par.allgather(par.broadcast([Registered("sent")] if par.on_main else None)[0].word)
    except PackingError as refused:
        return par.allgather("a Registered belongs" in str(refused))


def test_what_is_registered_with_multiprocessing_is_sent_by_it(p: Par) -> None:
    there = UNDER_MPI or "sent, by its reducer"
    expect(
        p,
        p.run(sends_registered),
        [there if UNDER_MPI and p.nprocs > 1 else "sent"] + [there] * (p.nprocs - 1),
    )


def exchanges_ends(*, parallelizer: Par) -> Any:
    """Send ends from main to all, from all to main, and from each to the next one."""
    par = parallelizer
    ends = [pipe() for _ in range(par.nprocs)] if par.on_main else None
    readable, writable = par.broadcast(ends)[par.id]
    again = par.scatter([pair[1] for pair in ends] if ends else None)
    for one in (writable, again[0]):
        tell(par.id, one)
    own = pipe()
    par.send({"x": [own[0]]}, (par.id + 1) % par.nprocs)
    left = par.receive((par.id - 1) % par.nprocs)["x"][0]
    tell((par.id + 1) % par.nprocs, own[1])
    found = heard(readable, 2) + heard(left, 1)
    mine = pipe()
    tell_all([(par.id, end) for end in par.allgather(mine[1])])
    check(heard(mine[0], par.nprocs), [*range(par.nprocs)])
    par.wait()
    return par.gather(found)


def uses_sockets(end: socket.socket, *, parallelizer: Par) -> None:
    par = parallelizer
    with contextlib.ExitStack() as stack:
        for one in (end, par.broadcast(end)):
            one.sendall(bytes([par.id]))
            if not par.on_main:
                stack.enter_context(one)
        ours = [stack.enter_context(one) for one in socket.socketpair()]
        for one in par.gather(ours[1]) or ():
            stack.enter_context(one).sendall(b"7")
        check(ours[0].recv(1), b"7")
        par.wait()


if UNDER_MPI:

    def test_what_belongs_to_a_machine_is_refused_by_name(p: Par) -> None:
        if p.nprocs > 1:
            found = failure(p, sends_connections)
            expect(p, type(found), PackingError)
            expect(p, "a Connection belongs to this machine's processes" in str(found), True)
        expect_to_work(p)
        expect(p, p.run(keeps_connections), [True] * p.nprocs)


def sends_connections(*, parallelizer: Par) -> None:
    given = [pipe()[1]] if parallelizer.on_main else None
    for verb in (parallelizer.broadcast, lambda x: parallelizer.scatter(x and x * 9)):
        error = caught_from(verb, given)
        assert isinstance(error, PackingError)
        assert "a Connection belongs" in str(error)
    parallelizer.map(tell, WORDS, (given,))


def keeps_connections(*, parallelizer: Par) -> Any:
    """Send one to oneself, and lay out anew what holds one."""
    ends = multiprocessing.Pipe()
    held = [ends[0], np.ones((9, 9))[:, 3]]
    parallelizer.send(held, parallelizer.id)
    found = parallelizer.receive(parallelizer.id)
    del held
    gc.collect()
    ends[1].send(1)
    return parallelizer.allgather(found[0] is ends[0] and found[0].recv() == 1)


def test_connections_of_ones_own_are_kept(p: Par) -> None:
    expect(p, p.run(keeps_connections), [True] * p.nprocs)
    ends = multiprocessing.Pipe()
    with ends[0], ends[1]:
        p.run(roll_call_with, [ends[1], np.ones((9, 9))[:, 3]]) if p.nprocs == 1 else None
        gc.collect()
        ends[1].send(1)
        assert ends[0].recv() == 1


def roll_call_with(_: Any, *, parallelizer: Par) -> Any:
    return roll_call(parallelizer=parallelizer)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_what_multiprocessing_does_not_send_is_refused(method: str) -> None:
    context = multiprocessing.get_context(method)
    with MultiprocessingParallelizer(2, start_method=method) as par:
        error = None
        for make in (context.Lock, context.Event, context.Queue, context.SimpleQueue):
            error = caught_from(par.run, roll_call_with, [make()])
            check((type(error), "inheritance" in str(error)), (PackingError, True))
        del error
        gc.collect()  # the semaphores go with what holds them
        assert par.run(roll_call)[0] == [0, 1]


# ---------------------------------------------------------------------------------------------
# Memory-mapped files


def on_file(path: Path, mode: str, order: Any = "C") -> Any:
    """Map a new file of numbers from 0 on, behind a head of some length."""
    make: Any = np.memmap
    whole = make(path, float, "w+", 4100, (72, 12), order)
    whole[...] = np.arange(864.0).reshape(72, 12)
    return whole if mode == "w+" else make(path, float, mode, 4100, (72, 12), order)


@contextlib.contextmanager
def folder_of(par: Par) -> Iterator[Path]:
    """Make a folder, the same on all processes, which goes when main leaves it."""
    with tempfile.TemporaryDirectory() if par.on_main else contextlib.nullcontext() as made:
        yield Path(par.broadcast(made))
        par.wait()


def negate(row: Array, *_: Any) -> None:
    row[...] = -row


def negates(block: Any) -> None:
    for row in block:
        negate(row)


def by_map(par: Par, table: Any) -> None:
    par.map(negate, table, chunksize=1)


def by_list(par: Par, table: Any) -> None:
    par.map(negate, None if table is None else list(table))


def by_argument(par: Par, table: Any) -> None:
    rows = range(0 if table is None else len(table))
    par.starmap(negate_row, [(i,) for i in rows], None, {"table": table})
    par.map(negate_row, rows, (table,))
    list(par.imap(negate_row, rows, 2, (table,)))


def negate_row(i: int, table: Array) -> None:
    negate(table[i])


def by_blocks_of_it(par: Par, table: Any) -> None:
    par.map(negates, table, vectorized=True)


def by_scattering_it(par: Par, table: Any) -> None:
    negate(par.scatter(table))


def by_broadcasting_it(par: Par, table: Any) -> None:
    table = par.broadcast({"table": [table]})["table"][0]
    negate(table[par.id :: par.nprocs])


def by_sending_it(par: Par, table: Any) -> None:
    if par.on_main:
        for rank, (start, stop) in enumerate(internals._block_bounds(len(table), par.nprocs)):
            par.send(table[start:stop], rank)
    negate(par.receive(0))


SCRIBES: list[Callable[[Par, Any], None]] = [
    by_map, by_list, by_argument, by_blocks_of_it, by_scattering_it, by_broadcasting_it,
    by_sending_it,
]  # fmt: skip

PARTS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda m: m,
    "plain": np.asarray,
    "columns": lambda m: m.T,
    "part": lambda m: m[3:70:2, 9:1:-3],
    "plain part": lambda m: np.asarray(m)[::-1, 1:],
    "matrix": lambda m: np.asarray(m).view(np.matrix),
}


def writes(scribe: Callable[[Par, Any], None], *, parallelizer: Par) -> Any:
    """Have all rows negated, in each mode, and look into the file."""
    par, found = parallelizer, []
    with folder_of(par) if par._runs_here() else tempfile.TemporaryDirectory() as folder:
        for (name, part), (mode, order) in itertools.product(PARTS.items(), MODES):
            path = Path(folder, f"{name} {mode}")
            table = on_file(path, mode, order) if par.on_main else None
            wanted = None if table is None else np.array(table, order="K")
            scribe(par, None if table is None else part(table))
            if par._runs_here():
                par.wait()
            if wanted is not None:
                negate(part(wanted))
                written = np.fromfile(path, offset=4100).reshape(72, 12, order=order)
                found.append(difference(written, np.ascontiguousarray(wanted)))
    return found


MODES: list[tuple[str, Any]] = [("w+", "C"), ("r+", "F")]


@pytest.mark.parametrize("scribe", SCRIBES)
def test_rows_that_are_written_are_in_the_file(p: Par, scribe: Callable[[Par, Any], None]) -> None:
    good = [""] * len(PARTS) * len(MODES)
    expect(p, p.run(writes, scribe), good)
    if scribe in (by_map, by_list, by_argument, by_blocks_of_it):
        expect(p, drive(p, writes, scribe), good)


def negates_its_rows(table: Any, *, parallelizer: Par) -> None:
    parallelizer.wait()
    negate(table[parallelizer.id :: parallelizer.nprocs])


def test_rows_are_written_by_arguments_of_run_and_closures(engine: str) -> None:
    p = create(engine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table")
        table = on_file(path, "r+")
        p.run(negates_its_rows, table)  # under MPI each rank has a file of its own, here and below
        p.run(functools.partial(negates_its_rows, table))
        again: Any = functools.partial(negates_its_rows, table=table)
        if CLOUDPICKLE or engine in ("serial", "mpi"):
            again = lambda parallelizer: negates_its_rows(table, parallelizer=parallelizer)  # noqa: E731
        p.run(again)
        rows = slice(p.id, None, p.nprocs) if UNDER_MPI else slice(None)
        wanted = np.arange(864.0).reshape(72, 12)
        negate(wanted[rows])
        check(np.fromfile(path, offset=4100).reshape(72, 12), wanted)


def receives_memmaps(*, parallelizer: Par) -> None:
    par, numbers = parallelizer, np.arange(864.0).reshape(72, 12)
    with folder_of(par) as folder:
        for mode, (name, view) in itertools.product(("r", "r+", "w+"), (PARTS | VIEWS).items()):
            path = folder / f"{name} {mode}"
            one = view(on_file(path, mode)) if par.on_main else None
            for found in (par.broadcast(one), par.broadcast({"x": [one]})["x"][0]):
                check(np.array(found), np.array(view(numbers)), f"{name} {mode}")
                told: Any = type(found), found.strides, found.flags.writeable
                check(par.broadcast(told), told)
                assert isinstance(internals._owner_of_memory(found), mmap.mmap)
                if type(found) is np.memmap and not par.on_main:
                    told = (found.filename, found.offset, found.mode)
                    check(told, (path, 4100, "r" if mode == "r" else "r+"))
                    found.flush()


def test_views_of_memmaps_arrive_as_views_of_the_file(p: Par) -> None:
    p.run(receives_memmaps)


def lost_files(folder: Path) -> list[Any]:
    """Map what others cannot find, or must not write to."""
    found = [on_file(folder / str(i), "r+") for i in range(3)] + [on_file(folder / "c", "c")]
    (folder / "0").unlink()
    on_file(folder / "other", "w+").fill(-1)
    (folder / "other").replace(folder / "1")
    (folder / "2").rename(folder / "3")
    on_file(folder / "2", "w+").fill(-2)
    found.append(found[0].copy())  # of memmap's type, in memory of its own
    with tempfile.TemporaryFile() as file:
        file.write(np.arange(864.0).tobytes())
        found.append(np.memmap(file, float, "r+", 0, (72, 12)))
    with (folder / "replaced later").open("wb") as file:
        file.write(np.arange(864.0).tobytes())
    found.append(np.memmap(folder / "replaced later", float, "r", 0, (72, 12)))
    internals._dumps(found[-1])
    (folder / "other").write_bytes(bytes(864 * 8))
    (folder / "other").replace(folder / "replaced later")
    return found


def copies_memmaps(*, parallelizer: Par) -> None:
    par = parallelizer
    with folder_of(par) as folder:
        given = lost_files(folder) if par.on_main else []
        for found in [*par.broadcast(given), *par.allgather(given)[0]]:
            check(np.array(found), np.arange(864.0).reshape(72, 12))
            assert type(found) is np.memmap


def test_memmaps_of_files_that_others_cannot_find_are_copied(p: Par) -> None:
    p.run(copies_memmaps)


def loses_a_file(*, parallelizer: Par) -> Any:
    par = parallelizer
    with folder_of(par) as folder:
        if par.on_main:
            table = on_file(folder / "table", "r")
            par.send([table], par.nprocs - 1)
            on_file(folder / "table 2", "w+")
            (folder / "table 2").replace(folder / "table")
        par.wait()
        error = caught_from(par.receive, 0) if par.id == par.nprocs - 1 else None
    return par.allgather((type(error), str(error)))[-1]


def test_another_file_of_the_same_name_is_not_opened(p: Par) -> None:
    kind, text = p.run(loses_a_file)
    if p.nprocs > 1:
        expect(p, (kind, "travels as the name of its file" in text), (PackingError, True))


@pytest.mark.parametrize("host", ["", "another host"])
def test_a_file_on_a_disk_is_not_taken_for_that_of_another_machine(host: str) -> None:
    """Even if the name, the inode and the number of the device are the same there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        table = on_file(Path(folder, "table"), "r")
        internals._dumps(table)
        handle = internals._HANDLES[table._mmap]
        handle = handle._replace(host=host or handle.host)
        check(np.frombuffer(internals._attach(handle), offset=4), np.arange(864.0))
        elsewhere = handle._replace(machine="of another boot")
        error = caught_from(internals._attach, elsewhere)
        assert "table is a different file here" in str(error)
        exported = elsewhere._replace(machine="")  # its sender does not have the file on a disk
        check(np.frombuffer(internals._attach(exported), offset=4), np.arange(864.0))


def combines_memmaps(*, parallelizer: Par) -> Any:
    par = parallelizer
    with folder_of(par) as folder:
        table = par.broadcast(on_file(folder / "table", "r+") if par.on_main else None)
        part = block_of(table, par.id, par.nprocs)
        found = [
            par.allgather(part), par.allgather(np.asarray(part)), par.allreduce(part[:1]),
            par.allgather(par.map(itself, [0], (part,), vectorized=True))[0],
        ]  # fmt: skip
        found += par.allgather(part, concatenate=False)
        read_only = on_file(folder / "read", "r") if par.on_main else None
        found.append(par.scatter(read_only))
        for one in found:
            assert type(one) is np.ndarray
            overwrite(one)
        par.wait()
        check(np.array(table), np.arange(864.0).reshape(72, 12))


def itself(_: Any, value: Any) -> Any:
    return value


def test_gathered_memmaps_are_arrays_of_ones_own(p: Par) -> None:
    p.run(combines_memmaps)


# ---------------------------------------------------------------------------------------------
# Shared arrays


def share_it(name: str, array: Any, parallelizer: Par) -> Any:
    """Share, look at it everywhere, and send views of it around as handles."""
    shared = parallelizer.share(array if parallelizer.on_main else None)
    wanted = parallelizer.broadcast(array)
    assert not shared.flags.writeable, name
    assert (shared.dtype, shared.shape) == (wanted.dtype, wanted.shape), name
    assert shared.tobytes() == wanted.tobytes(), name
    view = parallelizer.broadcast({"view": shared[::-2]})["view"]
    assert view.tobytes() == wanted[::-2].tobytes()
    assert parallelizer.on_main or not view.flags.writeable
    assert {type(shared), type(shared[:0] == shared[:0])} == {np.ndarray}
    return parallelizer.gather(sum(shared.tobytes()))


SHAREABLE = {
    "1-d": np.arange(100_000.0),
    "2-d, Fortran": np.asfortranarray(np.arange(12, dtype="i2").reshape(3, 4)),
    "strided": np.arange(30, dtype="c16")[::3],
    "structured": np.zeros(5, [("a", "i1"), ("b", ">f8")]),
    "dates": np.arange(4).astype("M8[D]"),
    "empty": np.zeros((0, 3), "U5"),
}


@pytest.mark.parametrize("name", SHAREABLE)
def test_shared_arrays(p: Par, name: str) -> None:
    array = SHAREABLE[name]
    result = p.run(share_it, name, array)
    if p.on_main:
        assert result == [sum(array.tobytes())] * p.nprocs


def sum_from(start: int, array: Array) -> float:
    return float(array[start:].sum())


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_shared_array_travels_as_a_handle_and_is_released(method: str) -> None:
    array = np.arange(2 * MIB, dtype=float)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        par.run(ranks)
        before = open_descriptors()
        shared = par.share(array)
        assert par.map(sum_from, range(10), (shared,)) == [array[i:].sum() for i in range(10)]
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 1
        assert open_descriptors() != before
        del shared
        assert open_descriptors() == before


def gathers_shared(*, parallelizer: Par) -> Any:
    shared = parallelizer.share(np.arange(12.0) if parallelizer.on_main else None)
    blocks = parallelizer.gather(parallelizer.scatter(shared))
    return blocks, parallelizer.gather(shared[:2]), parallelizer.gather(shared[[0, 1]])


def test_shared_arrays_are_gathered_as_arrays(p: Par) -> None:
    twos = np.tile([0.0, 1.0], p.nprocs)
    expect(p, p.run(gathers_shared), (np.arange(12.0), twos, twos))


# Of numbers in shape (6 n, 12): views of any kind lie where the whole does.
VIEWS: dict[str, Callable[[Array], Array]] = {
    "itself": lambda a: a,
    "rows": lambda a: a[2:4],
    "a part": lambda a: a[1:5:2, 3:-2],
    "reversed": lambda a: a[::-1, ::-3],
    "transposed": lambda a: a.T,
    "another shape": lambda a: a.reshape(3, -1, 12)[:, 1],
    "another dtype": lambda a: a.view("<i2")[:, 1::3],
    "as bytes": lambda a: a.reshape(-1).view("u1")[5:40],
    "windows": lambda a: np.lib.stride_tricks.sliding_window_view(a, 3, axis=1),
    "repeated": lambda a: np.broadcast_to(a[0], (4, 12)),
    "one number": lambda a: a[3, 4, ...],
    "none": lambda a: a[len(a) :],
    "by way of a buffer": lambda a: np.frombuffer(memoryview(a), a.dtype)[7:],
    "fields": lambda a: a.view([("x", "<f8"), ("y", ">f8")])["y"][1:],
}  # fmt: skip


def digits_of_shared(*, parallelizer: Par) -> Any:
    """Compute from views of shared arrays of any layout, by the roads that arguments take."""
    par, found = parallelizer, []
    numbers = np.random.default_rng(1).standard_normal((36, 300)) * np.logspace(0, 9, 300)
    for lay in ODD_LAYOUTS.values():
        shared = par.share(lay(numbers) if par.on_main else None)
        views = [shared, shared[:, 3], shared[::2, 1::3], shared.T]
        found += [digits(view) for view in [*views, *par.broadcast(views)]]
        found += (
            par.map(digits, [1.0] * par.nprocs, (views, shared[:, 4]))[:1] if par.on_main else []
        )
        if not par.on_main:
            par.map(digits, None)
    return found


def test_views_of_shared_arrays_give_the_same_bits(p: Par) -> None:
    expect(p, p.run(digits_of_shared), digits_of_shared(parallelizer=SerialNonParallelizer()))


def sends_views(*, parallelizer: Par) -> Any:
    """Send views, bare and in objects, from main to all, on to others and back."""
    par, whole = parallelizer, np.arange(72.0).reshape(6, 12)
    shared = par.share(whole if par.on_main else None)
    found: list[Any] = [shared]
    for view in VIEWS.values():
        one = view(shared)
        found += [par.broadcast(one), par.broadcast({"x": [one]})["x"][0]]
        par.send(one, (par.id + 1) % par.nprocs)
        found += [par.receive((par.id - 1) % par.nprocs), par.allgather([one])[-1][0]]
        for other in found[-4:]:
            assert (type(other), other.strides) == (np.ndarray, one.strides)
            assert not other.flags.writeable
    check(found, [whole] + [view(whole) for view in VIEWS.values() for _ in range(4)])
    if par.nprocs > 1:
        assert len({internals._owner_of_memory(one) for one in found}) == 1
    own = [shared.copy(), shared + 0, shared[[1, 2]], np.array(shared), np.sqrt(shared)]
    for one in par.broadcast(own):
        assert type(one) is np.ndarray
        overwrite(one)
    return par.gather(float(shared.sum()))


def test_an_array_is_known_to_be_shared_by_its_memory(p: Par) -> None:
    expect(p, p.run(sends_views), [2556.0] * p.nprocs)


def multiplies(given: Array, *, parallelizer: Par) -> Any:
    own = parallelizer.share(np.array(given) if parallelizer.on_main else None)
    column = np.arange(3.0).reshape(3, 1).view(np.matrix)  # as the mean of a sparse matrix is
    return parallelizer.allgather([[one * column, one == 1, one] for one in (given, own, own[::2])])


def test_a_shared_array_is_an_operand_as_any_other(p: Par) -> None:
    plain = np.arange(15.0).reshape(5, 3)
    given = plain if UNDER_MPI else p.share(plain)
    column = np.arange(3.0).reshape(3, 1).view(np.matrix)
    wanted = [[one * column, one == 1, one] for one in (plain, plain, plain[::2])]
    expect(p, p.run(multiplies, given), [wanted] * p.nprocs)


class Quantity(np.ndarray):
    """Numbers with a unit."""

    unit = "m"


class Plain(np.ndarray):
    """A subclass that adds nothing to what is pickled."""


MANY = np.arange(30_000.0)
EVERY_THIRD = MANY % 3 == 0
LARGE_SUBCLASSES: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
    "matrix": lambda: MANY.reshape(2, 15_000).view(np.matrix),
    "records": lambda: np.rec.fromarrays([MANY, -MANY], names="x, y"),
    "of another order": lambda: MANY.astype(">f8").view(Plain),
    "masked": lambda: np.ma.masked_array(MANY, EVERY_THIRD, fill_value=7.0),
    "without a mask": lambda: np.ma.masked_array(MANY),
    "with a hard mask": lambda: np.ma.masked_array(MANY, EVERY_THIRD, hard_mask=True),
    "masked matrix": lambda: np.ma.masked_array(MANY.view(np.matrix), EVERY_THIRD),
    "masked, cut": lambda: np.ma.masked_array(MANY, EVERY_THIRD).reshape(300, 100).T[::2],
    "masked fields": lambda: np.ma.masked_array(np.ones(9000, "f8, i4"), [(True, False)] * 9000),
}  # fmt: skip


def all_of_it(array: np.ndarray[Any, Any]) -> list[Any]:
    found: list[Any] = [type(array), array.dtype.type]
    if isinstance(array, np.ma.MaskedArray):
        bare = array.mask is np.ma.nomask
        found += [bare, array.hardmask, array.fill_value, type(array.data), np.array(array.mask)]
        array = array.data
    return [*found, array.tolist()]


def sent_and_shared(value: Any, *, parallelizer: Par) -> Any:
    """What ranks have got, how much is in a pickle, and whether it may be written to."""
    sent = parallelizer.broadcast(value)
    shared = parallelizer.share({"x": value} if parallelizer.on_main else None)["x"]
    small = len(internals._pack(sent, "it").pickled) < 1000
    may_write = [np.ma.getdata(it).flags.writeable for it in (sent, shared)]
    found = all_of_it(sent), all_of_it(shared), small, may_write
    return parallelizer.gather(found, concatenate=False)


@pytest.mark.parametrize("name", LARGE_SUBCLASSES)
def test_subclasses_of_arrays_travel_apart_from_the_pickle(p: Par, name: str) -> None:
    value = LARGE_SUBCLASSES[name]()
    whole = all_of_it(value)
    wanted = whole, whole, True, [True, False]
    expect(p, p.run(sent_and_shared, value), [wanted] * p.nprocs)


# Arrays of numpy's subclasses and of other libraries, as far as these are installed.


def row_numbers() -> Array:
    return np.arange(3000.0) % 7 - 3


def mixed_frame(pandas: Any) -> Any:
    number = np.arange(3000)
    return pandas.DataFrame({
        "integers": number,
        "numbers": row_numbers(),
        "objects": [None, (1, "x"), "text"] * 1000,
        "times": pandas.date_range("2020", periods=3000, freq="h", tz="UTC"),
        "periods": pandas.period_range("2000", periods=3000, freq="D"),
        "kinds": pandas.Categorical(["a", "b", "c"] * 1000, ordered=True),
        "Int64": pandas.array([1, None, 3] * 1000, dtype="Int64"),
        "text": pandas.array(["a", None, "c"] * 1000, dtype="string[python]"),
        "sparse": pandas.arrays.SparseArray(row_numbers(), fill_value=0.0),
    })  # fmt: skip


def leveled_frame(pandas: Any) -> Any:
    rows = pandas.MultiIndex.from_product([range(100), [*"abcdefghij"]], names=["u", "v"])
    columns = pandas.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)])
    return pandas.DataFrame(row_numbers().reshape(1000, 3), rows, columns)


def arrow_frame(pandas: Any) -> Any:
    numbers = pandas.array(row_numbers(), dtype="double[pyarrow]")
    text = pandas.array([f"text {i}" for i in range(3000)], dtype="string[pyarrow]")
    return pandas.DataFrame({"numbers": numbers, "text": text})


def arrow_table(pyarrow: Any) -> Any:
    text = pyarrow.array([f"text {i}" for i in range(3000)])
    gaps = pyarrow.array([1, None, 3] * 1000)
    kinds = pyarrow.array(["a", "b", "c"] * 1000).dictionary_encode()
    return pyarrow.table({"n": row_numbers(), "text": text, "gaps": gaps, "kinds": kinds})


def labelled_array(xarray: Any) -> Any:
    labels = {"t": np.arange(1000), "c": list("abc"), "phase": ("t", np.arange(1000.0))}
    numbers = row_numbers().reshape(1000, 3)
    return xarray.DataArray(numbers, labels, ("t", "c"), "q", {"unit": "m"})


def sparse(kind: str, sparse: Any) -> Any:
    return getattr(sparse, kind)(np.where(np.eye(300), row_numbers()[:300], 0.0))


def tensor(torch: Any, dtype: str = "float64") -> Any:
    return torch.from_numpy(np.tile(row_numbers(), 3).reshape(3000, 3)).to(getattr(torch, dtype))


# Words before a colon are the modules that it takes, of which the first makes it.
OF_LIBRARIES: dict[str, Callable[[Any], Any]] = {
    "numpy: structured": lambda np: np.ones(3000, [("a", "i1"), ("b", "f8")]),
    "numpy: records": lambda np: np.rec.fromarrays([row_numbers(), -row_numbers()], names="x, y"),
    "numpy: matrix": lambda np: row_numbers().reshape(1000, 3).view(np.matrix),
    "numpy: masked": lambda np: np.ma.masked_array(row_numbers(), row_numbers() > 0, fill_value=7),
    "numpy: masked rows": lambda np: np.ma.masked_equal(row_numbers().reshape(1000, 3), 2.0),
    "numpy: without a mask": lambda np: np.ma.masked_array(row_numbers()),
    "numpy: masked fields": lambda np: np.ma.masked_array(
        np.ones(3000, "f8, i4"), [(True, False)] * 3000
    ),
    "pandas: numbers": lambda pandas: pandas.DataFrame(row_numbers().reshape(1000, 3)),
    "pandas: series": lambda pandas: pandas.Series(row_numbers(), np.arange(3000)[::-1], name="q"),
    "pandas: mixed": mixed_frame,
    "pandas: levels": leveled_frame,
    "pandas pyarrow: columns": arrow_frame,
    "pyarrow: table": arrow_table,
    "pyarrow: array": lambda pyarrow: pyarrow.array(np.arange(9000.0))[3000:6000],
    "xarray: array": labelled_array,
    "xarray: dataset": lambda xarray: xarray.Dataset({"q": labelled_array(xarray)}),
    **{
        f"scipy.sparse: {form}_{kind}": functools.partial(sparse, f"{form}_{kind}")
        for form in ("csr", "csc", "coo", "dia", "bsr")
        for kind in ("array", "matrix")
    },
    "torch: float64": tensor,
    "torch: bfloat16": functools.partial(tensor, dtype="bfloat16"),
    "torch: bool": functools.partial(tensor, dtype="bool"),
    "torch: complex64": functools.partial(tensor, dtype="complex64"),
    "torch: transposed": lambda torch: tensor(torch).reshape(3, 3000).T,
    "torch: strided": lambda torch: tensor(torch).reshape(1500, 6)[:, ::2],
    "torch: with gradient": lambda torch: tensor(torch).requires_grad_(),
    "torch: parameter": lambda torch: torch.nn.Parameter(tensor(torch)),
    "torch: sparse": lambda torch: torch.eye(100).to_sparse(),
    "jax.numpy: float32": lambda jnp: jnp.asarray(row_numbers().reshape(1000, 3), "float32"),
    "jax.numpy: bfloat16": lambda jnp: jnp.asarray(row_numbers(), "bfloat16"),
}


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library.partition(".")[0]) is not None


OF_LIBRARIES = {
    name: make
    for name, make in OF_LIBRARIES.items()
    if all(map(is_installed, name.partition(":")[0].split()))
}
# What starts threads, so that the processes of other tests could not be forked any more.
WITH_THREADS = [name for name in OF_LIBRARIES if name.startswith(("torch", "jax"))]
WITHOUT_THREADS = [name for name in OF_LIBRARIES if name not in WITH_THREADS]
NOT_CUT = ("dataset", "coo", "dia", "bsr", "torch: sparse")
NOT_ADDED = ("numpy: structured", "numpy: records", "masked fields", "mixed", "pyarrow")


def made(name: str) -> Any:
    return OF_LIBRARIES[name](importlib.import_module(name.partition(":")[0].split()[0]))


def has_rows(name: str) -> bool:
    return not any(word in name for word in NOT_CUT)


def refuses_to_cut(*, parallelizer: Par) -> Any:
    for name in OF_LIBRARIES:
        if re.search("dataset|dia|bsr", name):
            with pytest.raises(TypeError, match="scatter splits arrays with a first axis"):
                parallelizer.scatter(made(name) if parallelizer.on_main else None)
    return parallelizer.allgather(parallelizer.id)


def test_what_has_no_rows_is_refused_everywhere(p: Par) -> None:
    expect(p, p.run(refuses_to_cut), list(range(p.nprocs)))


def length_of(value: Any) -> int:
    return int(value.shape[0]) if hasattr(value, "shape") else len(value)


def rows_of(value: Any, part: slice) -> Any:
    return getattr(value, "iloc", value)[part]


def is_same(found: Any, wanted: Any) -> bool:
    """Whether the types are the same, and all that the values hold."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(is_same, found, wanted))
    if isinstance(wanted, np.ndarray):
        traits = [repr(all_of_it(it)[:-1]) for it in (found, wanted)]
        return traits[0] == traits[1] and not difference(found, wanted)
    compare: dict[str, Callable[[Any, Any], bool]] = {
        "pandas": is_same_of_pandas,
        "pyarrow": lambda found, wanted: bool(found.equals(wanted)),
        "xarray": lambda found, wanted: bool(found.identical(wanted)),
        "scipy": lambda found, wanted: is_same(found.toarray(), wanted.toarray()),
        "torch": is_same_of_torch,
        "jaxlib": lambda found, wanted: is_same(np.asarray(found), np.asarray(wanted)),
    }
    return compare[type(wanted).__module__.partition(".")[0]](found, wanted)


def is_same_of_pandas(found: Any, wanted: Any) -> bool:
    testing = importlib.import_module("pandas.testing")
    kind = "frame" if wanted.ndim > 1 else "series"
    getattr(testing, f"assert_{kind}_equal")(found, wanted, check_exact=True)
    return True


def is_same_of_torch(found: Any, wanted: Any) -> bool:
    torch = importlib.import_module("torch")
    if wanted.layout is not torch.strided:
        return found.layout is wanted.layout and torch.equal(found.to_dense(), wanted.to_dense())
    traits = [(it.dtype, it.requires_grad, it.clone().stride()) for it in (found, wanted)]
    return traits[0] == traits[1] and torch.equal(found, wanted)


def travels(name: str, *, parallelizer: Par) -> Any:
    """Names of the verbs by which something else comes than was sent."""
    p, value = parallelizer, made(name)
    mine = value if p.on_main else None
    everyones = [value] * p.nprocs
    p.send([value], (p.id + 1) % p.nprocs)
    pairs = {
        "receive": (p.receive((p.id - 1) % p.nprocs), [value]),
        "broadcast": (p.broadcast(mine), value),
        "allgather": (p.allgather(value, concatenate=False), everyones),
        "alltoall": (p.alltoall(everyones), everyones),
        "share": (p.share({"it": value} if p.on_main else None)["it"], value),
    }
    gathered, mapped = p.gather(value), p.map(operator.itemgetter(0), [[value]] * 5)
    if p.on_main:
        is_plain = type(value) is np.ndarray
        pairs["gather"] = gathered, joined(everyones) if is_plain else everyones
        pairs["map"] = mapped, [value] * 5
    if has_rows(name):
        bounds = [block_of(range(length_of(value)), rank, p.nprocs) for rank in range(p.nprocs)]
        blocks = [rows_of(value, slice(rows.start, rows.stop)) for rows in bounds]
        found = p.scatter(mine)
        pairs["scatter"] = found, leaf(blocks[p.id])
        mapped = p.map(copy.copy, mine, vectorized=True, concatenate=False)
        if p.on_main:
            pairs["map over blocks"] = mapped, [*map(leaf, blocks)]
    if not any(word in name for word in NOT_ADDED):
        pairs["allreduce"] = p.allreduce(value), functools.reduce(operator.add, everyones)
    wrong = [verb for verb, (found, wanted) in pairs.items() if not is_same(found, leaf(wanted))]
    if name == "torch: float64" and not p.on_main:
        pairs["broadcast"][0].zero_()  # a copy, as whatever has been sent
    p.wait()
    return p.gather(wrong + ["untouched"] * (not is_same(value, made(name))), concatenate=False)


def leaf(value: Any) -> Any:
    """Itself; of a tensor that has been computed, what it is where it has no history."""
    has_history = getattr(value, "grad_fn", None) is not None
    return value.detach().requires_grad_() if has_history else value


def moves_only_what_it_must(name: str) -> None:
    """Check that the numbers are apart from the pickle, and that a part takes no more than that."""
    whole = internals._pack(made(name), "it")
    assert len(whole.pickled) < whole.nbytes // 2 or "sparse" in name
    if has_rows(name):
        value = made(name)
        part = internals._pack(rows_of(value, slice(length_of(value) // 10)), "it")
        assert part.nbytes < max(whole.nbytes // 4, 3000)


@pytest.mark.parametrize("name", WITHOUT_THREADS)
def test_ecosystem_of_arrays(p: Par, name: str) -> None:
    expect(p, p.run(travels, name), [[]] * p.nprocs)


@pytest.mark.parametrize("name", [name for name in WITHOUT_THREADS if "mixed" not in name])
def test_what_is_cut_travels_without_the_rest(name: str) -> None:
    moves_only_what_it_must(name)


def writes_to_shared_tensor(*, parallelizer: Par) -> Any:
    torch = importlib.import_module("torch")
    mine = torch.zeros(2000).share_memory_() if parallelizer.on_main else None
    tensor = parallelizer.broadcast(mine)
    tensor[parallelizer.id] += 1
    parallelizer.wait()
    return parallelizer.gather(float(tensor.sum()))


def all_with_threads_travel(engine: str) -> None:
    with create(engine) as p:
        for name in WITH_THREADS:
            wrong = p.run(travels, name)
            assert not p.on_main or wrong == [[]] * p.nprocs, (name, wrong)
            moves_only_what_it_must(name)
        if is_installed("torch") and engine != "mpi":
            assert p.run(writes_to_shared_tensor) == [float(p.nprocs)] * p.nprocs


if WITH_THREADS:

    @pytest.mark.parametrize("engine_name", ["serial", *MULTIPROCESSING, "mpi"])
    def test_arrays_of_libraries_with_threads(engine_name: str) -> None:
        call = f"import test_parallelizer as t; t.all_with_threads_travel({engine_name!r})"
        run_program("-c", call, ranks=2 if engine_name == "mpi" else None)


# What is more than numbers is shared as what it is.
SHARED_AS_OBJECTS: dict[str, Callable[[], Any]] = {
    "objects": lambda: np.array([None, 1.5, "x"]),
    "masked": lambda: np.ma.masked_array([1.0, 1e20], [False, True]),
    "matrix": lambda: np.ones((2, 2)).view(np.matrix),
    "records": lambda: np.rec.fromarrays([[1, 2]], names="x"),
    "quantity": lambda: np.ones(2).view(Quantity),
    "array.array": lambda: array.array("d", [1, 2]),
    "dict": lambda: {"x": np.arange(3.0), "y": [1, "z"]},
    "list of objects": lambda: [1, None, np.arange(2)],
    "list of masked": lambda: [[np.ma.masked_array([1.0], [True])]],
    "ragged list": lambda: [[1], [2, 3]],
    "Series": lambda: importlib.import_module("pandas").Series([1.0], index=["x"]),
    "DataFrame": lambda: importlib.import_module("pandas").DataFrame({"x": [1.0]}),
    "sparse": lambda: importlib.import_module("scipy.sparse").eye(3),
}
NOT_TO_BE_SHARED: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "text",
    "tuple": lambda: (1, 2),
    "range": lambda: range(3),
}


def shares_an_object(name: str, *, parallelizer: Par) -> Any:
    """Whether it is one object on each rank, by whatever road it comes; and what it looks like."""
    par = parallelizer
    shared = par.share(SHARED_AS_OBJECTS[name]() if par.on_main else None)
    again = par.broadcast({"in a dict": [shared]})["in a dict"][0]
    return par.allgather((again is shared, type(shared).__mro__[:-1], repr(shared)))


def shares_what_cannot_be(name: str, *, parallelizer: Par) -> Any:
    given = NOT_TO_BE_SHARED[name]() if parallelizer.on_main else np.ones(2)
    error = caught_from(parallelizer.share, given)
    return parallelizer.allgather((type(error), str(error)))


for kind, library in {"Series": "pandas", "DataFrame": "pandas", "sparse": "scipy"}.items():
    if importlib.util.find_spec(library) is None:
        del SHARED_AS_OBJECTS[kind]


@pytest.mark.parametrize("name", SHARED_AS_OBJECTS)
def test_what_is_more_than_numbers_stays_what_it_is(p: Par, name: str) -> None:
    given = SHARED_AS_OBJECTS[name]()
    for is_one, kinds, looks in p.run(shares_an_object, name):
        assert is_one
        assert type(given) in kinds
        assert looks == repr(given)


@pytest.mark.parametrize("name", NOT_TO_BE_SHARED)
def test_what_cannot_be_weakly_referenced_is_not_shared(p: Par, name: str) -> None:
    given = NOT_TO_BE_SHARED[name]()
    with pytest.raises(TypeError, match="share needs an array, a list, a dict, or an") as caught:
        SerialNonParallelizer().share(given)
    expect(p, p.run(shares_what_cannot_be, name), [(TypeError, str(caught.value))] * p.nprocs)
    if not UNDER_MPI:
        with pytest.raises(TypeError) as caught_outside:
            p.share(given)
        assert str(caught_outside.value) == str(caught.value)


OPENED_MODELS: list[int] = []  # by the pid, as a fork inherits them


class Model:
    """What samplers evaluate: much data, of which all need the same."""

    def __init__(self, size: int) -> None:
        self.data, self.few, self.name = np.arange(float(size)), np.arange(3.0), "model"
        self.__setstate__(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        OPENED_MODELS.append(os.getpid())

    def log_prob(self, x: float) -> tuple[float, int, int, bool]:
        index = int(x)
        has_own_memory = self.data.flags.writeable or self.few.flags.writeable
        times = OPENED_MODELS.count(os.getpid())
        return float(self.data[index]), os.getpid(), times, has_own_memory


def maps_a_method(*, parallelizer: Par) -> Any:
    """By a client: a method, what holds the model, and a closure over it; then let it go."""
    p = parallelizer
    model = p.share(Model(1000))
    message = internals._pack(model.log_prob, "a method")
    assert message.nbytes < 800, message
    first = p.map(model.log_prob, range(60))
    holder = functools.partial(asks, {"model": [model]})
    second = p.map(holder, range(60), chunksize=1)
    assert p.run(knows_one_model, model)
    before = len(internals._SHARED.living)
    del model, holder
    gc.collect()
    assert p.map(abs, [-1]) == [1]
    return first, second, before - len(internals._SHARED.living)


def asks(given: dict[str, list[Model]], x: float) -> Any:
    return given["model"][0].log_prob(x)


def knows_one_model(model: Model, *, parallelizer: Par) -> bool:
    same = parallelizer.broadcast([model])[0] is model
    return all(parallelizer.allgather(same and not model.data.flags.writeable))


def test_an_object_is_sent_once(p: Par) -> None:
    OPENED_MODELS.clear()
    found = ClientServerRunner(maps_a_method, parallelizer=p).run()
    if not p.on_main:
        return
    first, second, released = found
    for results in (first, second):
        assert [value for value, *_ in results] == [float(n) for n in range(60)]
        assert not any(writeable for *_, writeable in results)
    # On main it was made, and opened as the others have it; there, what a fork has inherited.
    most = {pid: times for _, pid, times, _ in [*first, *second]}
    assert all(times == 1 for pid, times in most.items() if pid != os.getpid()), most
    assert released == 1


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_shared_object_is_there_once(method: str) -> None:
    """In memory, on replaced workers too; and is let go of."""
    with MultiprocessingParallelizer(4, start_method=method) as par:
        par.run(ranks)
        gc.collect()  # or what earlier tests have left would be let go of in between
        before = open_descriptors()
        model = par.share(Model(50 * MIB))
        file = memory_of_shared()
        *_, died = par.run(memory_of_a_model, model)
        os.kill(died[1], signal.SIGKILL)
        with pytest.raises(WorkerDied):
            par.run(deaths_are_noticed)
        for private, _ in par.run(memory_of_a_model, model)[1:]:
            assert private < 32 * MIB
        assert os.fstat(file).st_blocks * 512 >= 400 * MIB
        del model
        gc.collect()
        par.run(ranks)
        assert os.fstat(file).st_blocks == 0
        os.close(file)
        assert len(open_descriptors()) == len(before)


def memory_of_a_model(model: Model, *, parallelizer: Par) -> Any:
    """Bytes of its own that it takes to read all of it, and the pid."""
    before = resident(os.getpid())
    assert model.data.sum() == 25 * MIB * (50 * MIB - 1)
    return parallelizer.gather((resident(os.getpid()) - before, os.getpid()))


class FatalToOpen(Model):
    """Kills the first worker that opens it."""

    def __init__(self, size: int, mark: str) -> None:
        self.mark = mark
        super().__init__(size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if multiprocessing.parent_process() is not None:
            with contextlib.suppress(FileExistsError):
                Path(self.mark).touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_sharing_goes_wrong_and_well_again(method: str, tmp_path: Path) -> None:
    before = len(internals._SHARED.living)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        par.run(ranks)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
            with pytest.raises(OSError, match="share cannot keep"):
                par.share(Model(1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        model = par.share(FatalToOpen(1000, str(tmp_path / "mark")))
        with pytest.raises(WorkerDied):
            par.run(knows_one_model, model)
        assert par.run(knows_one_model, model)
        with pytest.raises(TypeError, match="holds something that belongs to one process"):
            par.share({"x": multiprocessing.Pipe()[0]})
        del model
        gc.collect()
        assert par.map(abs, [-1]) == [1]
    assert len(internals._SHARED.living) == before


def slice_of(i: int, table: Array) -> Array:
    return table[i : i + 2]


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_checkpoint_holds_no_handles(method: str, tmp_path: Path) -> None:
    """Of shared arrays, shared objects and memmaps, it has copies."""
    table = np.memmap(tmp_path / "table", float, "w+", shape=10)
    table[:] = range(10)
    wanted = [np.arange(i, i + 2.0) for i in range(3)]
    with MultiprocessingParallelizer(2, start_method=method) as par:
        for number, given in enumerate([par.share(np.arange(10.0)), table]):
            path = tmp_path / f"checkpoint {number}"
            found = par.map(slice_of, range(3), (given,), checkpoint=path)
            check([np.array(one) for one in found], wanted)
    table[:] = 9
    for number in range(2):
        path = tmp_path / f"checkpoint {number}"
        check(SerialNonParallelizer().map(slice_of, range(3), checkpoint=path), wanted)
    with pytest.raises(ValueError, match="function with a name"):
        SerialNonParallelizer().map(lambda x: x, [1], checkpoint=tmp_path / "other")


def ignores_alarms(item: int, mark: str) -> int:
    if item == 0:
        with contextlib.suppress(FileExistsError):
            Path(mark).touch(exist_ok=False)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            subprocess.Popen(["sleep", "60"])
            time.sleep(60)
    time.sleep(0.1)
    return item


def test_who_is_stuck_is_killed_while_others_go_on(tmp_path: Path) -> None:
    begun = time.monotonic()
    with MultiprocessingParallelizer(3) as par:
        given = (str(tmp_path / "mark"),)
        found = par.map(ignores_alarms, range(60), given, item_timeout=2, retries=1, chunksize=1)
        assert found == list(range(60))
        assert time.monotonic() - begun < 30
        # What an earlier map has left half-done is not taken for an item of this one.
        assert par.map(time.sleep, [0.1] * 4, item_timeout=5) == [None] * 4


def swallows(item: int) -> int:
    for _ in range(60):
        with contextlib.suppress(TimeoutError):
            time.sleep(0.1)
    return item


def maps_within(item: int) -> Any:
    SerialNonParallelizer().map(time.sleep, [0.01], item_timeout=5)
    time.sleep(20)
    return item


def test_an_item_timeout_comes_again() -> None:
    alone = SerialNonParallelizer()
    found = alone.map(maps_within, [0], item_timeout=1, on_error="return")
    assert type(found[0]) is TimeoutError
    with MultiprocessingParallelizer(2) as par, pytest.raises(WorkerDied, match="not heed"):
        par.map(swallows, [0], item_timeout=0.2)


def maps_as_a_worker() -> None:
    Parallelizer.lookup().map(abs, [1, 2])


def closes(par: Par, _: Any) -> None:
    par.close()


def test_maps_that_cannot_be_led_to_their_end() -> None:
    led_by_worker = pytest.raises(ContractError, match="was called on a worker outside a run")
    with MultiprocessingParallelizer(2, initializer=maps_as_a_worker) as par, led_by_worker:
        par.run(ranks)
    closed = pytest.raises(ContractError, match="closed before its map was at its end")
    with MultiprocessingParallelizer(2) as par, closed:
        par.map(abs, range(10), callback=functools.partial(closes, par))


def test_what_is_shared_already_stays_so() -> None:
    with MultiprocessingParallelizer(2) as par:
        first = par.share({"a": np.ones(3)})
        assert par.share(first) is first
        assert par.map(asks_for_a, range(4), (first,), chunksize=1) == [3.0] * 4
    alone = SerialNonParallelizer()
    held = alone.share({"a": alone.share(np.arange(3.0))})
    check(held["a"], np.arange(3.0))
    for items in ([1, "a"], [b"ab\0"], [2**63 + 1, -1]):
        assert list(alone.share(items)) == items
    assert type(alone.share([1.0, math.nan])) is np.ndarray


def asks_for_a(_: int, held: dict[str, Array]) -> float:
    return float(held["a"].sum())


def interrupts_at(stop: int, results: list[Any], result: Any) -> None:
    results.append(result)
    if len(results) == stop:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_lasting_map_is_interrupted(method: str, tmp_path: Path) -> None:
    path, told = tmp_path / "checkpoint", list[Any]()
    with MultiprocessingParallelizer(3, start_method=method) as par:
        with pytest.raises(KeyboardInterrupt):
            par.map(
                adds_noise, range(200), seed=1, checkpoint=path, retries=1, chunksize=1,
                callback=functools.partial(interrupts_at, 20, told),
            )  # fmt: skip
        assert 20 <= len(told) < 200
        again: list[Any] = []
        found = par.map(adds_noise, range(200), seed=1, checkpoint=path, callback=again.append)
        assert found == again == SerialNonParallelizer().map(adds_noise, range(200), seed=1)


def writes_together(*, parallelizer: Par) -> Any:
    p = parallelizer
    shared = p.share(np.zeros((p.nprocs, 3)) if p.on_main else None, writable=True)
    shared[p.id] = p.id + 1
    p.wait()
    found = shared.sum(axis=1).tolist()
    p.wait()
    p.broadcast(shared)[(p.id + 1) % p.nprocs, 0] += 0.5
    p.wait()
    return p.allgather((found, shared[:, 0].tolist()))


def test_an_array_that_all_write_to(p: Par) -> None:
    wanted = [3.0 * (n + 1) for n in range(p.nprocs)]
    first = [n + 1.5 for n in range(p.nprocs)]
    expect(p, p.run(writes_together), [(wanted, first)] * p.nprocs)
    with pytest.raises(TypeError, match="needs an array of plain numbers"):
        SerialNonParallelizer().share({}, writable=True)


def shares_numbers(*, parallelizer: Par) -> Any:
    given: list[Any] = [1, 2.5, True, 1j, np.float32(3), [[1, 2], [3, 4.5]], ["a", "bcd"], [b"x"]]
    given += [[np.arange(3), [4, 5, 6]], np.array("2020", "M8[Y]"), np.zeros(2, "i1,f8")]
    shared = [parallelizer.share(one if parallelizer.on_main else None) for one in given]
    return parallelizer.allgather(difference(shared, [np.asarray(one) for one in given]))


def test_numbers_and_lists_of_them_are_shared(p: Par) -> None:
    expect(p, p.run(shares_numbers), [""] * p.nprocs)


TABLES: list[Array] = []  # on a worker, what it keeps of a run


def keeps(table: Array, rank: int, *, parallelizer: Par) -> float:
    if parallelizer.id == rank:
        TABLES.append(table)
    parallelizer.wait()
    return float(table.sum())


def lets_go(*, parallelizer: Par) -> Any:
    found = parallelizer.gather(sum(float(table[-1]) for table in TABLES))
    TABLES.clear()
    return found


def memory_of_shared() -> int:
    """Open the file of the array that this process shares, the only one."""
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:parallelizer-share" in str(file.readlink()):
                return os.open(file, os.O_RDONLY)
    raise AssertionError("nothing is shared")


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_what_was_shared_before_a_fork_is_released(method: str) -> None:
    numbers = np.ones(MIB // 8)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        before = open_descriptors()
        shared = par.share(numbers)
        file = memory_of_shared()
        try:
            assert par.run(keeps, shared, 2) == len(numbers)  # with which the workers are born
            assert par.run(keeps, shared[1:], -1) == len(numbers) - 1
            del shared
            assert os.fstat(file).st_blocks > 0  # because one of them has kept it
            assert par.run(lets_go) == [0, 0, 1]
            wait_until(lambda: os.fstat(file).st_blocks == 0)
            again = par.share(numbers)
            assert par.run(keeps, again, -1) == len(numbers)
            os.close(file)
            file = memory_of_shared()
            del again
            wait_until(lambda: os.fstat(file).st_blocks == 0)
        finally:
            os.close(file)
        assert open_descriptors() != before or method != "fork"


def test_a_child_goes_on_with_the_shared_array_that_it_has_inherited() -> None:
    with MultiprocessingParallelizer(2, start_method="fork") as par:
        shared = par.share(np.ones(MIB // 8))
        file = memory_of_shared()
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writable)
            os.read(readable, 1)
            os._exit(int(shared.sum()) != MIB // 8)
        del shared
        assert os.fstat(file).st_blocks > 0
        os.close(writable)
        check(os.waitpid(child, 0)[1], 0)
        for one in (file, readable):
            os.close(one)


def resident(pid: int) -> int:
    """Count the bytes of memory that a process holds of its own."""
    (line,) = re.findall(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) * 1024


def uses_much(what: str, given: Any, *, parallelizer: Par) -> Any:
    par, much = parallelizer, (np.ones(4 * MIB) if parallelizer.on_main else None)
    if what == "result":
        return np.ones(4 * MIB)
    if what == "broadcast":
        par.broadcast([much])
    elif what == "scatter":
        par.scatter([much] * par.nprocs)
    elif what == "gather":
        par.gather([np.ones(4 * MIB)])
    elif what == "map":
        par.map(operator.itemgetter(0), [[much]] * 9, chunksize=1)
    elif what == "extra_args":
        list(par.imap(itself, range(9), 1, ([much],)))
    elif what == "unread":
        par.send(np.ones(4 * MIB), (par.id + 1) % par.nprocs)
    elif what == "failure" and par.id == par.nprocs - 1:
        par.broadcast([much])
        raise ValueError(given)
    elif what == "failure":
        par.broadcast([much])
        # Under MPI, what is under way goes when it has arrived, which is in the next call.
        par.wait() if UNDER_MPI else par.gather(np.ones(4 * MIB))
    return None


USES = ["argument", "result", "broadcast", "scatter", "gather", "map", "extra_args"]
if not UNDER_MPI:  # where a message may be received between two runs
    USES.append("unread")


@pytest.mark.parametrize("what", [*USES, "failure"])
def test_nothing_of_a_call_stays_behind(fresh: Par, what: str) -> None:
    with fresh as par:
        pids = par.run(process_ids)
        par.run(uses_much, "gather", None)  # what stays for good
        baseline = {pid: resident(pid) for pid in pids}
        for _ in range(2):
            given = np.ones(4 * MIB) if what == "argument" else np.ones(1)
            with contextlib.suppress(ValueError):
                par.run(uses_much, what, given)
            reference = weakref.ref(given)
            del given
            assert reference() is None
            if UNDER_MPI:
                assert resident(os.getpid()) < baseline[os.getpid()] + 16 * MIB
            else:
                wait_until(lambda: all(resident(x) < baseline[x] + 16 * MIB for x in pids))


def sends_under_many_tags(*, parallelizer: Par) -> Any:
    par = parallelizer
    for tag in range(3000):
        par.send(tag, (par.id + 1) % par.nprocs, tag)
        assert par.receive((par.id - 1) % par.nprocs, tag) == tag
    return par.allgather(len(par._comm._mail))


def test_mail_that_was_read_leaves_nothing(p: Par) -> None:
    expect(p, p.run(sends_under_many_tags), [0] * p.nprocs)


# ---------------------------------------------------------------------------------------------
# Rounds, by seeded schedules
# ---------------------------------------------------------------------------------------------
#
# The processes are threads, of which one runs at a time. Whenever it touches the board, or would
# sleep, the schedule says who goes on: the same seed, the same order of loads and stores. The clock
# stands still for as long as anybody can go on, so that a wake-up that is lost is seen: time passes
# that should not, or all sleep for ever.


class Stalled(Exception):
    """All processes sleep, and nobody is left to wake them."""


class Killed(BaseException):
    """Ends a thread as SIGKILL does a process: the board cannot be touched any more."""


class Life(threading.Thread):
    """A process, from its start to its end."""

    def __init__(self, schedule: Schedule, work: Callable[[], None], steps: float) -> None:
        super().__init__()
        self.schedule = schedule
        self.work = work
        self.steps_left = steps  # of which each touches the board, until it is killed
        self.turn = threading.Lock()  # held by others, but when it is its turn
        self.turn.acquire()
        schedule.waiting[self] = (lambda: True), math.inf
        self.start()

    def run(self) -> None:
        self.turn.acquire()
        try:
            with contextlib.suppress(Killed):
                self.work()
        finally:
            del self.schedule.waiting[self]
            self.schedule.pass_on()


class Schedule:
    """Who goes on, and what time it is."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        # Of each that lives, what it waits for, and until when.
        self.waiting: dict[Life, tuple[Callable[[], object], float]] = {}
        self._draw = np.random.default_rng(seed)
        self._drawn: list[float] = []

    def switch(self, until: Callable[[], object] = lambda: True, seconds: float = math.inf) -> None:
        """Let another one go on, or this one, but not before this is true or time has passed."""
        life = threading.current_thread()
        if not isinstance(life, Life):
            return  # the test, which looks at the board
        self.waiting[life] = until, self.now + seconds
        self.pass_on()
        life.turn.acquire()
        if self.now == math.inf:
            raise Stalled
        life.steps_left -= 1
        if life.steps_left < 0:
            raise Killed

    def pass_on(self) -> None:
        while self.waiting and not (able := list(filter(self._can_go_on, self.waiting))):
            self.now = min(deadline for _, deadline in self.waiting.values())
        if self.waiting:
            self._drawn = self._drawn or self._draw.random(1000).tolist()
            able[int(self._drawn.pop() * len(able))].turn.release()

    def _can_go_on(self, life: Life) -> bool:
        until, deadline = self.waiting[life]
        return life.steps_left <= 0 or bool(until()) or self.now >= deadline


class ScheduledBoard(internals._Board):  # type: ignore[misc]
    """One that all share, before each of whose loads and stores another process may go on."""

    def __init__(self, ranks: int, schedule: Schedule) -> None:
        self._switch: Callable[[], None] = lambda: None
        super().__init__(ranks)
        self.looks, self.crowded = 3, False
        self._switch = schedule.switch

    def __getattribute__(self, name: str) -> Any:
        if name in ("_words", "_called", "_left", "_run", "_written", "_read", "_view", "memory"):
            object.__getattribute__(self, "_switch")()
        return super().__getattribute__(name)


class ScheduledDoorbell:
    """The pipes of all, as lists; a handle to wait for is the process whose death it tells of."""

    def __init__(self, rank: int, pool: ScheduledPool) -> None:
        self._rank, self._pool = rank, pool

    def ring(self, process: int) -> None:
        self._pool.system_calls += 1
        self._pool.schedule.switch()
        self._pool.rung[process] = True

    def wait(self, others: Iterable[int], seconds: float) -> list[int]:
        pool = self._pool

        def dead() -> list[int]:
            return [h for h in others if h > 0 and pool.processes[h] not in pool.schedule.waiting]

        if seconds > 0:
            pool.system_calls += 1
            seconds = max(seconds, 1e-3)  # as poll has it, too
            pool.schedule.switch(lambda: pool.rung[self._rank] or dead(), seconds)
        pool.rung[self._rank] = False
        return dead()


class ScheduledPool:
    """What main asks of its workers."""

    queue = limit = None
    owned = True

    def __init__(self, board: ScheduledBoard, schedule: Schedule, lifetimes: list[float]) -> None:
        self.board, self.schedule = board, schedule
        self.rung = [False] * board.nprocs
        self.system_calls = 0
        self.doorbell = ScheduledDoorbell(0, self)
        self.processes: dict[int, Any] = {}
        self.work: Callable[[Any], None]
        self._lifetimes = lifetimes

    @property
    def sentinels(self) -> dict[int, int]:
        return {process: process for process in self.processes}

    def main_logs_for_workers(self) -> bool:
        return False

    def start_missing(self) -> None:
        for rank in range(1, self.board.nprocs):
            if rank not in self.processes:
                self.board.renew(rank)
                self.rung[rank] = False
                life = Life(self.schedule, functools.partial(self._live, rank), math.inf)
                life.pid = None  # type: ignore[attr-defined]
                life.steps_left, self._lifetimes[rank] = self._lifetimes[rank], math.inf
                self.processes[rank] = life

    def _live(self, rank: int) -> None:
        self.work(internals._WorkerEnd(types.SimpleNamespace(
            process=rank, board=self.board, doorbell=ScheduledDoorbell(rank, self), queue=None,
            timeout=None, limit=None, main_pid=None,
            life=types.SimpleNamespace(fileno=lambda: -1),
        )))  # fmt: skip

    def bury(self, process: int) -> WorkerDied:
        del self.processes[process]
        return WorkerDied(f"rank {process}")

    def _is_gone(self, life: Life) -> bool:
        return life not in self.schedule.waiting

    def kill(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            life = self.processes[number]
            life.steps_left = 0
            self.schedule.switch(functools.partial(self._is_gone, life))
            self.bury(number)


def brings(rank: int, step: int) -> Array:
    """What a rank brings: none, few, or what takes several slots."""
    return np.full([0, 3, 2000, 5000][(5 * step + 3 * rank) % 4], 100 * step + rank)


def is_late(comm: Any, verb: str) -> None:
    if verb == "late" or comm.rank == 0:
        comm._doorbell._pool.schedule.switch(lambda: False, 0.3)


def call_verb(comm: Any, verb: str, step: int) -> Any:
    if verb in ("late", "main is late"):
        return is_late(comm, verb)
    if verb == "raise":
        raise KeyError(step)
    if verb == "exchange":
        return exchange(comm, step)
    if verb == "allreduce":
        return folds_together(comm, step)
    brought = internals._pack([brings(comm.rank, step)], "numbers")
    plan = internals.GatherPlan(False)
    with comm.enter(verb):
        if verb == "wait":
            return comm.barrier()
        if verb == "broadcast":
            messages = [comm.broadcast(brought if comm.rank == 0 else None)]
        elif verb == "scatter":
            several = [internals._pack([brings(r, step)], "numbers") for r in range(comm.size)]
            messages = [comm.scatter(several if comm.rank == 0 else None)]
        elif verb == "alltoall":
            several = [brings(comm.rank + r, step) for r in range(comm.size)]
            messages = comm.alltoall([internals._pack([one], "numbers") for one in several])
        elif verb == "reduce":
            messages = list(comm.gather_in_turn(brought))
        else:
            messages = getattr(comm, verb)(brought, plan) or []
    return [internals._unpack(message, "numbers")[0].tolist() for message in messages]


def to_fold(rank: int, step: int) -> Array:
    """Of one length on all ranks; now and then, their sum is too large at the end."""
    own = np.full([70, 700, 2000, 5000][step % 4], float(100 * step + rank))
    own[-1] = 1.2e308 if step % 3 == 0 else rank
    return own


def folds_together(comm: Any, step: int) -> Any:
    own = to_fold(comm.rank, step)
    result = np.empty_like(own)
    with comm.enter("allreduce"), np.errstate(over="raise"):
        try:
            if comm.portion_bytes:
                comm.fold_segments(own, np.add, result, range(comm.size))
            else:
                shown = comm.show_all(internals._pack(own, "numbers"))
                result = sum(internals._unpack(one, "numbers") for one in shown)
        except FloatingPointError as error:
            return str(error)
    return result.tolist()


def exchange(comm: Any, step: int) -> Any:
    """Messages to the next rank and to itself, and from the one before; all send at first."""
    for tag in (step, 1000 + step):
        with comm.enter("send"):
            message = internals._pack([brings(comm.rank, tag)], "numbers")
            comm.send(message, (comm.rank + 1) % comm.size, tag)
    before, found = (comm.rank - 1) % comm.size, []
    for tag in (1000 + step, step):
        with comm.enter("receive"):
            message = comm.receive(before, tag)
        found.append(internals._unpack(message, "numbers")[0].tolist())
    return found


def expected(verb: str, step: int, rank: int, size: int) -> Any:
    of_all = [brings(one, step).tolist() for one in range(size)]
    before = (rank - 1) % size
    with np.errstate(over="ignore"):
        total = sum(to_fold(one, step) for one in range(size)).tolist()  # type: ignore[union-attr]
    return {
        "late": None,
        "main is late": None,
        "wait": None,
        "allreduce": "overflow encountered in add" if math.inf in total else total,
        "broadcast": of_all[:1],
        "scatter": [of_all[rank]],
        "reduce": of_all[1:] if rank == 0 else [],
        "gather": of_all if rank == 0 else [],
        "allgather": of_all,
        "alltoall": [brings(one + rank, step).tolist() for one in range(size)],
        "exchange": [brings(before, tag).tolist() for tag in (1000 + step, step)],
    }[verb]


class Group(NamedTuple):
    """A step of a script: some ranks call verbs among themselves, and one of them may then fail."""

    ranks: list[int]
    verbs: list[str]
    culprit: int | None  # among these

    def call(self, comm: Any, step: int) -> Any:
        def work() -> Any:
            found = [call_verb(comm, v, 10 * step + i) for i, v in enumerate(self.verbs)]
            if comm.rank == self.culprit:
                raise KeyError(step)
            if self.culprit is not None and step % 2:
                with comm.enter("receive"):  # for what will not come
                    comm.receive(self.culprit, 77)
            if self.culprit is not None:
                call_verb(comm, "gather", step)
            return found

        try:
            return comm.in_group(self.ranks, work)
        except KeyError as error:
            return repr(error)

    def expected(self, step: int, rank: int) -> Any:
        if rank not in self.ranks:
            return Parallelizer.InWorkerProcess
        if self.culprit is not None:
            return repr(KeyError(step))
        place, size = self.ranks.index(rank), len(self.ranks)
        return [expected(v, 10 * step + i, place, size) for i, v in enumerate(self.verbs)]


_Script = list["str | Group"]


def perform(comm: Any, script: _Script, told: list[Any]) -> None:
    """Call verbs, catch what they raise, and go on; what each has given, and the return."""
    with comm.restricted_to(range(comm.size)):
        try:
            comm.begin_run()
            for step, one in enumerate(script):
                call = (
                    one.call if isinstance(one, Group) else functools.partial(call_verb, verb=one)
                )
                try:
                    told.append(call(comm, step=step))
                except (ParallelizerError, RunEnded) as error:
                    told.append(error)
            comm.finish_run(b"report")
            told.append("returned")
        except (Exception, RunEnded) as error:
            told.append(comm.fail_run(error))


class Told(NamedTuple):
    """Of a simulation."""

    rows: list[list[list[Any]]]  # what each process has been told in each run
    seconds: float  # how long it took
    system_calls: int  # how often anybody has rung, or slept


def play(runs: list[list[_Script]], seed: int, lifetimes: list[float], looks: int = 3) -> Told:
    """What comes of these runs on the schedule of this seed."""
    schedule = Schedule(seed)
    ranks = len(runs[0])
    board = ScheduledBoard(ranks, schedule)
    board.looks = looks
    pool = ScheduledPool(board, schedule, lifetimes)
    told: list[list[list[Any]]] = [[[] for _ in range(ranks)] for _ in runs]

    def serve(comm: Any) -> None:
        try:
            while (message := comm.next_command()) is not None:
                run = pickle.loads(message.pickled)[0]
                told[run][comm.process].append("begun")
                perform(comm, runs[run][comm.process], told[run][comm.process])
        except Stalled as error:
            told[-1][comm.process].append(error)

    def lead() -> None:
        try:
            comm = internals._MainEnd(pool, None)
            for run, scripts in enumerate(runs):
                comm.start_others()
                command = pickle.dumps((run, b"." * int(seed % 3 * 20000)))
                comm.command([internals.Message(command, [])])
                told[run][0].append("begun")
                perform(comm, scripts[0], told[run][0])
            comm.command(None)
        except Stalled as error:
            told[-1][0].append(error)

    pool.work = serve
    with pytest.MonkeyPatch.context() as patch:
        clock = types.SimpleNamespace(
            perf_counter=lambda: schedule.now, monotonic=lambda: schedule.now
        )
        patch.setattr(internals, "time", clock)
        Life(schedule, lead, math.inf)
        schedule.pass_on()
        while left := list(schedule.waiting):
            left[0].join()
    board.close()
    return Told(told, schedule.now, pool.system_calls)


def scripts_of(draw: np.random.Generator, ranks: int) -> _Script:
    verbs = ["wait", "broadcast", "scatter", "gather", "allgather", "reduce", "alltoall"]
    verbs += ["allreduce", "exchange", "late"]
    script: _Script = draw.choice(verbs, 4).tolist()
    if draw.random() < 0.4 and ranks > 2:
        members = [0, *range(2, ranks)]
        culprit = int(draw.integers(len(members))) if draw.random() < 0.5 else None
        script[draw.integers(4)] = Group(members, draw.choice(verbs[:8], 2).tolist(), culprit)
    return script


def faulty_scripts(draw: np.random.Generator, ranks: int) -> tuple[str, list[_Script]]:
    """A fault, and what each rank does then."""
    script = scripts_of(draw, ranks)
    scripts, culprit = [script] * ranks, draw.integers(ranks)
    fault = str(draw.choice(["none", "raise", "stray", "die"]))
    if fault == "raise":
        scripts[culprit] = [*script[: draw.integers(4)], "raise"]
    if fault == "stray":
        other = draw.choice(["wait", "gather", "reduce", "allgather"], draw.integers(3)).tolist()
        scripts[culprit] = script[: draw.integers(4)] + other
        if [one for one in scripts[culprit] if one != "late"] == [o for o in script if o != "late"]:
            fault = "none"
    return fault, scripts


def wanted(scripts: list[_Script], rank: int) -> list[Any]:
    found = ["begun"]
    for step, one in enumerate(scripts[rank]):
        if isinstance(one, Group):
            found.append(one.expected(step, rank))
        elif one != "raise":
            found.append(expected(one, step, rank, len(scripts)))
    return [*found, "returned"]


@pytest.mark.parametrize("seeds", [range(first, first + 60) for first in range(0, 240, 60)])
def test_runs_on_seeded_schedules(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever; errors are told, and are for good; and the next run is well."""
    monkeypatch.setattr(internals, "_SLOT_BYTES", 1 << 14)
    monkeypatch.setattr(internals.BoardCommunicator, "portion_bytes", 1 << 13)
    monkeypatch.setattr(internals, "_RING_BYTES", 1000)
    monkeypatch.setattr(internals, "_MAINS_RING_BYTES", 9000)
    for seed in seeds:
        draw = np.random.default_rng(seed)
        ranks = int(draw.integers(2, 5))
        fault, faulty = faulty_scripts(draw, ranks)
        well = [scripts_of(draw, ranks)] * ranks
        lifetimes, doomed = [math.inf] * ranks, None
        if fault == "die":
            doomed = draw.integers(1, ranks)
            lifetimes[doomed] = float(draw.integers(1500))
        told, seconds, _ = play([faulty, well, well], seed, lifetimes)
        if fault == "none":  # nobody sleeps who could go on
            late = sum(max(one.count("late") for one in run) for run in (faulty, well, well))
            assert seconds <= 0.3 * late + 1e-6, f"seed {seed}: {seconds} s, {faulty}, {well}"
        deaths = [row[0] for row in told if type(row[0][-1]) is WorkerDied]
        for scripts, run in zip([faulty, well, well], told, strict=True):
            rows = [[one if isinstance(one, BaseException) else "." for one in row] for row in run]
            context = f"seed {seed}, {fault}: {scripts} told {rows}"
            main = run[0]
            if type(main[-1]) is WorkerDied:
                assert (fault, len(deaths)) == ("die", 1), context
            elif scripts is well or fault in ("none", "die"):
                for rank, row in enumerate(run):
                    whole = wanted(scripts, rank)  # of which who dies may not see the end
                    assert row == whole[: len(row) if doomed == rank else None], context
            else:
                assert type(main[-1]) is (KeyError if fault == "raise" else ContractError), context
            for rank, row in enumerate(run):
                errors = [one for one in row if isinstance(one, BaseException)]
                kinds = {type(one) for one in errors[: len(errors) - (rank == 0)]}
                assert not any(issubclass(kind, Stalled) for kind in kinds), context
                assert len(kinds) < 2, context
                if RunEnded not in kinds and rank > 0:
                    assert len({id(one) for one in errors}) < 2, context
                good = next((i for i, one in enumerate(row) if one in errors), len(row))
                assert row[:good] == wanted(scripts, rank)[:good], context
                assert all(one is None or one in errors for one in row[good:]), context


@pytest.mark.parametrize("scripts", [("gather", "wait", "raise"), ("allgather", "raise", "wait")])
def test_what_is_raised_beside_a_disagreement_is_told(scripts: Sequence[str]) -> None:
    """Main hears the last words of who has left, however late they come."""
    for seed in range(400):
        told, _, _ = play([[[one] for one in scripts]], seed, [math.inf] * 3)
        assert type(told[0][0][-1]) is KeyError, f"seed {seed}: {told}"


class CallCounter:
    """Counts the calls of Python functions on this thread, but those of a wait."""

    def __init__(self) -> None:
        self.calls = 0
        self._waiting = 0  # how deep in it

    def __call__(self, frame: types.FrameType, event: str, _: object) -> None:
        is_wait = frame.f_code.co_name in ("_await_words", "_await_cards", "sleepers", "ring")
        if event == "call":
            self.calls += not (self._waiting or is_wait)
            self._waiting += is_wait
        elif event == "return":
            self._waiting -= is_wait


# Rounds, and Python calls at most, of verbs on a number, or an array of so many numbers.
COSTS: dict[str, tuple[Callable[[Par], Any], int, int]] = {
    "wait": (lambda p: p.wait(), 1, 20),
    "broadcast a number": (lambda p: p.broadcast(1), 1, 32),
    "broadcast an array": (lambda p: p.broadcast(np.ones(9)), 1, 41),
    "scatter a list": (lambda p: p.scatter([1.0] * p.nprocs), 1, 42),
    "gather a number": (lambda p: p.gather(1), 1, 37),
    "gather an array": (lambda p: p.gather(np.ones(9)), 1, 46),
    "allgather an array": (lambda p: p.allgather(np.ones(9)), 1, 56),
    "allreduce a number": (lambda p: p.allreduce(1.0), 1, 57),
    "allreduce an array": (lambda p: p.allreduce(np.ones(9)), 1, 64),
    "reduce a number": (lambda p: p.reduce(1), 1, 57),
    "alltoall": (lambda p: p.alltoall([0] * p.nprocs), 1, 60),
}


def counts_costs(verb: str, *, parallelizer: Par) -> list[tuple[int, int]]:
    """Rounds and calls on each rank, when it is not the first time, and nothing comes between."""
    call, _, _ = COSTS[verb]
    costs = []
    gc.disable()
    try:
        for _ in range(6):
            parallelizer.wait()
            comm, counter = parallelizer._communicator(), CallCounter()
            before = comm._round
            sys.setprofile(counter)
            call(parallelizer)
            sys.setprofile(None)
            costs.append((comm._round - before, counter.calls))
    finally:
        gc.enable()
    told: list[tuple[int, int]] = parallelizer.allgather(min(costs))
    return told


@pytest.mark.parametrize("verb", COSTS)
def test_what_a_verb_costs(p: Par, verb: str) -> None:
    """In what does not depend on the machine; it is no more for more ranks but for their values."""
    if p.nprocs > 1:
        _, rounds, calls = COSTS[verb]
        for counted_rounds, counted_calls in p.run(counts_costs, verb):
            assert counted_rounds == rounds
            assert counted_calls <= calls + 14 * (p.nprocs - 2)


def counts_rounds_of_segments(size: int, *, parallelizer: Par) -> int:
    comm, data = parallelizer._communicator(), np.ones(size)
    before = comm._round
    parallelizer.allreduce(data)
    return int(comm._round - before)


def test_rounds_of_a_fold_by_segments(p: Par) -> None:
    """One to agree; on processes one for each portion, else none; and one to end it."""
    if p.nprocs > 1:
        portion = p._communicator().portion_bytes // (512 * p.nprocs) * 64 * p.nprocs
        count = 5 if isinstance(p, MultiprocessingParallelizer) else 0
        check(p.run(counts_rounds_of_segments, 5 * portion), 2 + count)


# The same where each gets copies of the cards of all, once all have come, as it is under MPI: no
# round can be left, and there is nobody who could end another one's part in a run.


class CardTable:
    """What lies between the processes of a simulation."""

    def __init__(self, ranks: int, schedule: Schedule) -> None:
        self.schedule = schedule
        self.cards: list[list[tuple[int, bytes]]] = [[(0, b"")] * ranks for _ in range(2)]
        self.mail: list[list[Any]] = [[] for _ in range(ranks)]


class CardCommunicator(internals.Communicator):  # type: ignore[misc]
    """The base class does all else."""

    def __init__(self, process: int, table: CardTable) -> None:
        super().__init__(process, len(table.mail))
        self.table, self.brought, self.seen = table, b"", table.cards[0]
        self.in_round = False
        self._doorbell = types.SimpleNamespace(_pool=table)  # by which "late" finds the schedule

    def _exchange(self, word: int, wanted: bytes) -> bool:
        table = self.table
        table.schedule.switch()
        table.cards[self._round & 1][self.process] = word, self.brought
        self.seen, self.in_round = table.cards[self._round & 1], True
        self._await_all()
        self.seen, self.in_round = list(self.seen), False
        table.schedule.switch()
        return self._words() == np.frombuffer(wanted, np.uint64).tolist()

    def _words(self) -> list[int]:
        return [word for word, _ in self.seen]

    def _lay(self, *messages: Any) -> None:
        self.brought = b"".join(self._described(messages)[0])

    def _place_of(self, process: int, parity: int) -> tuple[bytes, int]:
        return self.seen[process][1], 0

    def _post(self, process: int, parcel: Any) -> None:
        self.table.schedule.switch()
        self.table.mail[process].append((self.process, parcel))

    def _progress(self, seconds: float) -> None:
        mail = self.table.mail[self.process]
        if seconds > 0:
            self.table.schedule.switch(lambda: mail or self.is_complete(), seconds)
        while mail:
            self._deliver(*mail.pop(0))

    def wake(self) -> None:
        raise AssertionError("nobody reads ahead here")

    def is_complete(self) -> bool:
        return self.in_round and all(word >> 16 == self._round for word, _ in self.seen)


def play_cards(runs: list[list[_Script]], seed: int) -> Told:
    """As `play`, where each process calls each run by itself."""
    schedule = Schedule(seed)
    ranks = len(runs[0])
    table = CardTable(ranks, schedule)
    told: list[list[list[Any]]] = [[[] for _ in range(ranks)] for _ in runs]

    def live(rank: int) -> None:
        comm = CardCommunicator(rank, table)
        try:
            for run, scripts in enumerate(runs):
                told[run][rank].append("begun")
                perform(comm, scripts[rank], told[run][rank])
        except Stalled as error:
            told[-1][rank].append(error)

    with pytest.MonkeyPatch.context() as patch:
        clock = types.SimpleNamespace(
            perf_counter=lambda: schedule.now, monotonic=lambda: schedule.now
        )
        patch.setattr(internals, "time", clock)
        for rank in range(ranks):
            Life(schedule, functools.partial(live, rank), math.inf)
        schedule.pass_on()
        while left := list(schedule.waiting):
            left[0].join()
    return Told(told, schedule.now, 0)


@pytest.mark.parametrize("seeds", [range(first, first + 200) for first in range(0, 400, 200)])
def test_cards_on_seeded_schedules(seeds: range) -> None:
    """All are told of a fault, by the same kind of error, and for good; the next run is well."""
    for seed in seeds:
        draw = np.random.default_rng(seed)
        ranks = int(draw.integers(2, 5))
        fault, faulty = faulty_scripts(draw, ranks)
        well = [scripts_of(draw, ranks)] * ranks
        told, seconds, _ = play_cards([faulty, well, well], seed)
        if fault in ("none", "die"):  # nobody waits who could go on
            late = sum(max(one.count("late") for one in run) for run in (faulty, well, well))
            assert seconds <= 0.3 * late + 1e-6, f"seed {seed}: {seconds} s, {faulty}, {well}"
        for scripts, run in zip([faulty, well, well], told, strict=True):
            rows = [[one if isinstance(one, BaseException) else "." for one in row] for row in run]
            context = f"seed {seed}, {fault}: {scripts} told {rows}"
            if scripts is well or fault in ("none", "die"):
                assert run == [wanted(scripts, rank) for rank in range(ranks)], context
                continue
            kind = KeyError if fault == "raise" else ContractError
            alike = [len(set(map(str, step))) == 1 for step in zip(*scripts, strict=False)]
            for rank, row in enumerate(run):
                assert type(row[-1]) is kind, context
                errors = [one for one in row if isinstance(one, BaseException)]
                good = row.index(errors[0])
                if fault == "stray":  # later, they bring what belongs to different steps
                    good = min(good, 1 + [*alike, False].index(False))
                assert row[:good] == wanted(scripts, rank)[:good], context
                after = row[row.index(errors[0]) :]
                assert all(one is None or one in errors for one in after), context
                assert {type(one) for one in errors} <= {RunEnded, kind}, context


def test_who_is_awake_makes_no_system_call() -> None:
    """However late the others are: as long as nobody falls asleep, nobody rings."""
    script: _Script = ["wait", "broadcast", "gather", "allgather", "reduce", "exchange", "scatter"]
    script.append("allreduce")
    for seed in range(3):
        told = play([[script] * 3] * 2, seed, [math.inf] * 3, looks=10**9)
        assert all(
            row == wanted([script] * 3, rank) for run in told.rows for rank, row in enumerate(run)
        )
        assert told.system_calls == 0


def test_who_has_woken_up_is_not_rung_for() -> None:
    """What is slept over costs system calls, and nothing that comes afterwards."""
    late: _Script = ["main is late", "wait"]

    def calls(script: _Script) -> int:
        told = play([[script] * 3], 1, [math.inf] * 3, looks=4000)
        assert told.rows == [[wanted([script] * 3, rank) for rank in range(3)]]
        return told.system_calls

    assert 0 < calls(late) == calls([*late, *["allgather", "exchange", "wait"] * 4])


# ---------------------------------------------------------------------------------------------
# Faults: nothing hangs, nothing is lost
# ---------------------------------------------------------------------------------------------


class Odd(Exception):
    """Its constructor does not accept its own `args`, and it has attributes beside."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"odd {code}")
        self.code = code
        self.detail = detail


def go_wrong(fault: str, par: Par) -> None:
    if fault == "raise":
        raise Odd(7, detail="seven")
    if fault == "unpicklable exception":
        raise ValueError(threading.Lock())
    if fault == "sys.exit":
        sys.exit(3)
    if fault == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if fault == "unpicklable value":
        par.gather(threading.Lock())
    if fault == "unpicklable at arrival":
        par.broadcast(1)  # never comes to that: see `Trap`
    if fault == "os._exit":
        os._exit(7)
    faulthandler.disable()  # or it would write of a fault that is meant
    os.kill(os.getpid(), getattr(signal, fault))


def go_on(stage: str, par: Par) -> None:
    """What the processes do that nothing is wrong with, for longer than any test takes."""
    if stage == "sleep":
        time.sleep(100)
    while stage == "compute":
        pass
    if stage.startswith("large"):
        large, right = np.zeros(3 * MIB), (par.id + 1) % par.nprocs  # 24 MiB
        verb = stage.removeprefix("large ")
        for _ in range(1000):
            getattr(par, verb)(large, *([right] if verb == "send" else []))
    arguments: dict[str, list[Any]] = {"wait": [], "receive": [(par.id + 1) % par.nprocs]}
    getattr(par, stage)(*arguments.get(stage, [list(range(par.nprocs))]))
    par.gather(0)


def faulty(fault: str, culprits: list[int], stage: str, parallelizer: Par) -> None:
    if parallelizer.id in culprits:
        time.sleep(0.05)  # let the others get to their stage
        go_wrong(fault, parallelizer)
    go_on(stage, parallelizer)


def ranks(parallelizer: Par) -> Any:
    return parallelizer.gather(parallelizer.id)


EXCEPTIONS: dict[str, type[BaseException]] = {
    "raise": Odd,
    "unpicklable exception": WorkerError,
    "sys.exit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "unpicklable value": PackingError,
}
DEATHS = {"os._exit": "7", "SIGKILL": "SIGKILL", "SIGSEGV": "SIGSEGV"}
STAGES = ["gather", "broadcast", "scatter", "wait", "receive", "large broadcast", "large gather",
          "large send", "sleep", "compute"]  # fmt: skip


# A fork server differs from spawn in how workers are born, which other tests look at.
@pytest.fixture(params=["fork", "spawn"], ids="on_{}".format)
def pool(request: pytest.FixtureRequest) -> Iterator[MultiprocessingParallelizer]:
    with pool_of_four(request.param) as par:
        yield par


# How workers were started matters when one that died is replaced, whatever stage it was at.
PLACES = [*itertools.product(["fork"], STAGES), *itertools.product(["spawn"], STAGES[::3])]


@pytest.fixture(scope="class", params=PLACES, ids=lambda place: "on_{}-{}".format(*place))
def pool_at_stage(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[MultiprocessingParallelizer, str]]:
    """The same pool for all tests on a stage, which pytest runs one after the other."""
    method, stage = request.param
    with pool_of_four(method) as par:
        yield par, stage


@contextlib.contextmanager
def pool_of_four(method: str) -> Iterator[MultiprocessingParallelizer]:
    """An open parallelizer of four processes, which must serve the next run whatever happens."""
    MultiprocessingParallelizer(2, start_method=method).run(ranks)  # its servers stay
    before = open_descriptors()
    with MultiprocessingParallelizer(4, start_method=method) as par:
        assert par.run(ranks) == [0, 1, 2, 3]
        yield par
        assert par.run(ranks) == [0, 1, 2, 3]
    assert open_descriptors() == before


def open_descriptors() -> list[str]:
    """What the open files of this process are, so that a leak names itself."""
    files = Path("/proc/self/fd")
    found = []
    for file in files.iterdir() if files.is_dir() else ():
        with contextlib.suppress(OSError):  # the one that lists the folder
            found.append(f"{file.name} {file.readlink()}")
    return sorted(found)


class TestFaultsAtAStage:
    def test_an_exception_ends_the_run_everywhere(
        self, pool_at_stage: tuple[MultiprocessingParallelizer, str]
    ) -> None:
        pool, stage = pool_at_stage
        for fault, kind in EXCEPTIONS.items():
            for culprits in ([3], [1, 2, 3]):
                with pytest.raises(kind) as caught:
                    pool.run(faulty, fault, culprits, stage)
                assert type(caught.value) is kind
                assert isinstance(caught.value.__cause__, RemoteTraceback)
                assert (
                    f"rank {culprits[0]} of 4 on {socket.gethostname()}"
                    in str(caught.value.__cause__)
                    or len(culprits) > 1
                )
                if isinstance(caught.value, Odd):
                    assert (caught.value.args, caught.value.code) == (("odd 7",), 7)
                    assert caught.value.detail == "seven"
            assert pool.run(ranks) == [0, 1, 2, 3]

    def test_an_exception_of_main_is_raised_as_it_is(
        self, pool_at_stage: tuple[MultiprocessingParallelizer, str]
    ) -> None:
        pool, stage = pool_at_stage
        for fault in ("raise", "sys.exit", "KeyboardInterrupt"):
            for culprits in ([0], [0, 1, 2, 3]):
                with pytest.raises(EXCEPTIONS[fault]) as caught:
                    pool.run(faulty, fault, culprits, stage)
                assert len(culprits) > 1 or caught.value.__cause__ is None
            assert pool.run(ranks) == [0, 1, 2, 3]

    def test_a_death_is_told_with_rank_and_cause(
        self, pool_at_stage: tuple[MultiprocessingParallelizer, str]
    ) -> None:
        pool, stage = pool_at_stage
        for fault, word in DEATHS.items():
            for culprits in ([2], [1, 2, 3])[: 1 + (fault == "SIGKILL")]:
                with pytest.raises(WorkerDied, match=word) as caught:
                    pool.run(faulty, fault, culprits, stage)
                assert f"rank {culprits[0]} " in str(caught.value) or len(culprits) > 1
                assert pool.run(ranks) == [0, 1, 2, 3]


CTRL_C_AT_A_LINE = """
import linecache, multiprocessing, os, signal, sys
import parallelizer

main, fault, first, step = os.getpid(), sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

class Interruption:
    '''Presses Ctrl-C at one line of the module, by its number in the order of execution.'''
    def __init__(self, line):
        self.left, self.place = line, None
    def __call__(self, frame, event, _):
        if os.getpid() == main and frame.f_code.co_filename == parallelizer.__file__:
            return self.at_line
    def at_line(self, frame, event, _):
        # Python takes what is raised at the very word `try` past the handlers around it. Only a
        # trace can do that: signals are heeded at calls and jumps.
        line = linecache.getline(parallelizer.__file__, frame.f_lineno).strip()
        self.left -= event == "line" and line != "try:" and os.getpid() == main
        if self.left == 0 and self.place is None:
            self.place = frame.f_code.co_name, frame.f_lineno
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return self.at_line

def roll_call(*, parallelizer, fault=None):
    parallelizer.wait()
    if fault == "die" and parallelizer.id == 1:
        os._exit(3)
    ranks = parallelizer.gather(parallelizer.id)
    if fault == "raise" and parallelizer.id == 1:
        raise KeyError
    return ranks

def work(pool, fault):
    if fault == "map":
        return pool.map(abs, [0, -1], retries=1)
    return pool.run(roll_call, fault=fault)

def interrupted(line):
    interruption, told = Interruption(line), None
    sys.settrace(interruption)
    try:
        with parallelizer.MultiprocessingParallelizer(2, start_method="fork") as pool:
            try:
                work(pool, fault)
            finally:
                if interruption.place:
                    assert work(pool, "map" if fault == "map" else "none") == [0, 1]
    except (Exception, KeyboardInterrupt) as error:
        told = repr(error)  # whose traceback holds what its frames hold
    sys.settrace(None)
    return interruption.place, told

def descriptors():
    return sorted(os.listdir("/proc/self/fd"))

if __name__ == "__main__":
    interrupted(10**9)
    before, seen = descriptors(), 0
    for line in range(first, 10**9, step):
        place, told = interrupted(line)
        if place is None:
            break
        seen += 1
        assert told == "KeyboardInterrupt()", (place, told)
        assert descriptors() == before, place
        assert not multiprocessing.active_children(), place
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, place
    print(seen)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
@pytest.mark.parametrize("fault", ["none", "raise", "die", "map"])
def test_a_ctrl_c_at_any_line_leaves_nothing_behind(fault: str, tmp_path: Path) -> None:
    """Of opening, of a run and its end, of burying and closing; and the next run is well."""
    program = tmp_path / "ctrl_c.py"
    program.write_text(CTRL_C_AT_A_LINE)
    first, step = {"none": (3, 40), "raise": (17, 120), "die": (29, 40), "map": (11, 40)}[fault]
    assert int(run_program(str(program), fault, str(first), str(step))) > 30


VERBS_AND_THEIR_CALLS: dict[str, Callable[[Par], Any]] = {
    "wait": lambda p: p.wait(),
    "broadcast": lambda p: p.broadcast(1),
    "scatter": lambda p: p.scatter(range(9)),
    "gather": lambda p: p.gather(np.ones(3)),
    "allgather": lambda p: p.allgather("x"),
    "reduce": lambda p: p.reduce(np.ones(3)),
    "allreduce": lambda p: p.allreduce(1.0),
    "alltoall": lambda p: p.alltoall(range(p.nprocs)),
    "map": lambda p: p.map(abs, range(9)),
    "imap": lambda p: list(p.imap(abs, range(9))),
    "share": lambda p: p.share(np.ones(3)),
    "send": lambda p: p.send(1, p.id),
    "receive": lambda p: p.receive((p.id + 1) % p.nprocs, tag=7),
}


def goes_wrong_and_goes_on(
    verb: str, kind: str, catches: int, late: int, *, parallelizer: Par
) -> None:
    """Something ends the run; what each further call raises is caught a few times, then passes."""
    p = parallelizer

    def at_first() -> None:
        if p.id == late:
            time.sleep(0.05)
        if kind.startswith("disagreement"):
            p.allgather(0) if p.id == int(kind[-1]) else p.wait()
        elif kind == "death" and p.id == 1:
            os._exit(9)
        elif kind == "timeout" and p.id == 1:
            time.sleep(0.5)
        elif kind == "exception" and p.id == 1:
            raise Odd(7, detail="seven")
        p.wait()

    def error_of(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ContractError, WaitTimeout, RunEnded) as error:
            return error

    again = functools.partial(VERBS_AND_THEIR_CALLS[verb], p)
    first, *others = caught = [error_of(at_first), *(error_of(again) for _ in range(catches))]
    assert all(type(error) is type(first) for error in others), (verb, kind, caught)
    assert type(first) is RunEnded or all(error is first for error in others), (verb, kind, caught)
    raise first


@pytest.mark.parametrize("verb", VERBS_AND_THEIR_CALLS)
def test_what_ends_a_run_ends_it_for_good(verb: str) -> None:
    """Caught never, once, or twice, by whoever is late: it stays the same, and then all is well."""
    wanted = {
        "disagreement of 0": ContractError, "disagreement of 1": ContractError,
        "death": WorkerDied, "timeout": WaitTimeout, "exception": Odd,
    }  # fmt: skip
    ways = [*itertools.product(range(3), (0, 2))]
    for number, (kind, error) in enumerate(wanted.items(), [*VERBS_AND_THEIR_CALLS].index(verb)):
        timeout = 0.2 if kind == "timeout" else None
        with MultiprocessingParallelizer(3, start_method="fork", timeout=timeout) as par:
            for catches, late in (ways[number % 6], ways[-number % 6 - 3]):
                with pytest.raises(error) as caught:
                    par.run(goes_wrong_and_goes_on, verb, kind, catches, late)
                assert type(caught.value) is error, (kind, catches, late)
                assert "neither can go on" not in str(caught.value)
                assert par.run(ranks) == [0, 1, 2], (kind, catches, late)


def sends_to_one_gone(*, parallelizer: Par) -> None:
    """Rank 2 has returned, and is killed while rank 1 sends to it."""
    victim = parallelizer.broadcast(parallelizer.allgather(os.getpid())[2])
    if parallelizer.id == 1:
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        parallelizer.send(np.zeros(10 * MIB), 2)


def test_a_death_of_who_has_returned(pool: MultiprocessingParallelizer) -> None:
    """It may come to light after the run, which was well, and then ends the next one."""
    error = caught_from(pool.run, sends_to_one_gone) or caught_from(pool.run, ranks)
    assert (type(error), "rank 2" in str(error)) == (WorkerDied, True)


def test_a_death_between_runs_is_told_by_the_next(pool: MultiprocessingParallelizer) -> None:
    victim = pool.run(pids)[2]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not alive(victim))
    with pytest.raises(WorkerDied, match="rank 2"):
        pool.run(ranks)


def hears_a_question_before_the_mail(*, parallelizer: Par) -> Any:
    """Rank 1 is asked what it waits for while it sleeps, and rank 2 sends it that, and returns."""
    p = parallelizer
    sleeper = p.allgather(os.getpid())[1]
    if p.id == 2:
        time.sleep(0.2)
        os.kill(sleeper, signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 2.5; kill -CONT {sleeper}"])
        time.sleep(1.5)  # in which rank 0 asks, as it does after half a second
        p.send("the last", 1)
    elif p.id == 1:
        p.send(p.receive(2), 0)
    return p.receive(1) if p.on_main else None


def test_mail_that_has_come_is_received_whoever_asks_meanwhile() -> None:
    with MultiprocessingParallelizer(3, start_method="fork") as par:
        assert par.run(hears_a_question_before_the_mail) == "the last"


def test_workers_that_are_buried_need_no_killing(pool: MultiprocessingParallelizer) -> None:
    """One of several that a Ctrl-C dooms may have died in the meantime."""
    communicator: Any = pool._communicator()
    workers = communicator._workers
    workers.kill([1])
    workers.kill([1, 2])
    assert pool.run(ranks) == [0, 1, 2, 3]


def pids(parallelizer: Par) -> Any:
    return parallelizer.gather(os.getpid())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while this reads
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], object], limit: float = 20) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def kill_in_transfer(direction: str, parallelizer: Par) -> None:
    if parallelizer.id == 1:
        killer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL))
        killer.start()
    large = np.ones(13 * MIB)  # 104 MiB
    while True:
        if direction == "out":
            parallelizer.broadcast(large)
        elif direction == "in":
            parallelizer.gather(large)
        else:
            parallelizer.map(np.sum, [large] * 4)


@pytest.mark.parametrize("direction", ["out", "in", "map"])
def test_a_death_in_a_transfer(pool: MultiprocessingParallelizer, direction: str) -> None:
    with pytest.raises(WorkerDied, match=r"rank 1 .*SIGKILL"):
        pool.run(kill_in_transfer, direction)


class Trap:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return spring, ()


def spring() -> None:
    raise OSError("sprung")


def broadcast_it(value: Any, parallelizer: Par) -> Any:
    return parallelizer.broadcast(value)


def gather_it(kind: type, parallelizer: Par) -> Any:
    return parallelizer.gather(kind())


def return_lock(_: object) -> Any:
    return threading.Lock()


def test_what_cannot_be_pickled_or_unpickled(pool: MultiprocessingParallelizer) -> None:
    lock = threading.Lock()
    with pytest.raises(PackingError, match="lock"):
        pool.run(broadcast_it, lock)
    with pytest.raises(PackingError, match="lock"):
        pool.map(abs, [1, lock])
    with pytest.raises(PackingError, match="lock"):
        pool.map(return_lock, range(8), chunksize=1)
    with pytest.raises(PackingError, match="sprung"):
        pool.run(broadcast_it, Trap())
    with pytest.raises(PackingError, match="sprung"):
        pool.run(gather_it, Trap)
    assert pool.run(ranks) == [0, 1, 2, 3]


def hear_a_signal(parallelizer: Par) -> Any:
    os.kill(os.getpid(), signal.SIGURG)  # as one that comes late from another parallelizer's worker
    return parallelizer.gather(parallelizer.id)


def test_a_stray_signal_disturbs_nobody(p: Par) -> None:
    expect(p, p.run(hear_a_signal), list(range(p.nprocs)))


class SlowToDie:
    """Its finalizer goes on while others tell that they have failed."""

    def __init__(self, told: Path) -> None:
        self.told = told

    def __del__(self) -> None:
        self.told.touch()
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            pass


def fails_amid_a_finalizer(told: Path, ended: Path, *, parallelizer: Par) -> None:
    if parallelizer.on_main:
        while not told.exists():
            time.sleep(0.001)
        raise KeyError("of main")
    if parallelizer.id == 1:
        kept = SlowToDie(told)
        try:
            del kept  # where what a signal's handler raised would be lost
            computes_for_a_minute()
        finally:
            ended.touch()


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_news_amid_a_finalizer_end_the_function_after_it(method: str, tmp_path: Path) -> None:
    with MultiprocessingParallelizer(3, start_method=method) as par:
        before = par.run(pids)
        with pytest.raises(KeyError, match="of main"):
            par.run(fails_amid_a_finalizer, tmp_path / "told", tmp_path / "ended")
        assert (tmp_path / "ended").exists()  # and not killed
        assert par.run(pids) == before


def cleans_up_while_a_worker_fails(kind: type[BaseException], *, parallelizer: Par) -> None:
    if not parallelizer.on_main:
        time.sleep(0.1)
        raise JobError("of a worker", parallelizer.id)
    try:
        raise kind
    finally:
        computes_for_a_minute()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_no_failure_takes_the_place_of_what_ends_the_program(
    method: str, kind: type[BaseException]
) -> None:
    with MultiprocessingParallelizer(2, start_method=method) as par:
        with pytest.raises(kind) as caught:
            par.run(cleans_up_while_a_worker_fails, kind)
        (note,) = vars(caught.value)["__notes__"]
        assert re.search("rank 1 failed too: .*of a worker", note)
        expect_to_work(par)


def stuck(parallelizer: Par) -> None:
    if parallelizer.id == 2:
        signal.signal(signal.SIGURG, signal.SIG_IGN)  # as in compiled code: nothing gets through
        time.sleep(100)
    parallelizer.gather(0)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_timeout_names_the_missing_and_replaces_them(method: str) -> None:
    with MultiprocessingParallelizer(4, start_method=method) as par:
        before = par.run(pids)
        par.timeout = 1
        with pytest.raises(WaitTimeout, match=r"rank\(s\) 2\b") as caught:
            par.run(stuck)
        assert isinstance(caught.value, TimeoutError)
        par.timeout = None
        after = par.run(pids)
        assert [old == new for old, new in zip(before, after, strict=True)] == [
            True, True, False, True,
        ]  # fmt: skip


def waits_for_a_sleeper(verb: str, sleeper: int, parallelizer: Par) -> None:
    if parallelizer.id == sleeper:
        time.sleep(100)
    use_verb(verb, parallelizer)


def use_verb(verb: str, par: Par) -> None:
    if verb == "large send":
        par.send(np.zeros(10**7), 1)
    elif verb == "imap":
        list(par.imap(sleeps_on_workers, itertools.repeat(os.getpid(), 20)))
    elif verb == "map":
        par.map(abs, range(100))
    elif verb == "receive":
        par.receive(0)
    else:
        getattr(par, verb)(*([] if verb == "wait" else [np.zeros(9)]))


def sleeps_on_workers(main: int) -> None:
    if os.getpid() != main:
        time.sleep(100)


WAITS = [(0, verb) for verb in ("broadcast", "scatter", "receive", "allreduce", "wait", "map")]
WAITS += [
    (1, verb) for verb in ("gather", "large send", "allreduce", "wait", "map", "share", "imap")
]


@pytest.mark.parametrize(("sleeper", "verb"), WAITS)
def test_timeout_bounds_every_wait(sleeper: int, verb: str) -> None:
    begun = time.monotonic()
    with MultiprocessingParallelizer(2, start_method="fork", timeout=0.5) as par:
        with pytest.raises(WaitTimeout, match=r"waited 0.5 s in .*for rank\(s\) [01],"):
            par.run(waits_for_a_sleeper, verb, -1 if verb == "imap" else sleeper)
        expect_to_work(par)
    assert time.monotonic() - begun < 20


# Programs that are interrupted, killed or ended. Each prints "ready" when it is at its stage.


def announce() -> None:
    print("ready", flush=True)


def interrupted(stage: str, method: str) -> None:
    """The program of the tests of Ctrl-C."""
    par = MultiprocessingParallelizer(4, start_method=method)
    try:
        if stage == "start":
            announce()
            stage = "sleep"  # should the signal come late
        with par:
            print("pids", *par.run(pids), flush=True)
            if stage == "idle":
                announce()
                time.sleep(60)
            par.run(until_interrupted, stage)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        assert par.run(ranks) == [0, 1, 2, 3]
        print("works", flush=True)
        raise


def until_interrupted(stage: str, parallelizer: Par) -> None:
    parallelizer.wait()
    if parallelizer.on_main:
        announce()
    go_on(stage, parallelizer)


INTERRUPTED = [
    ("start", "group"),
    ("start", "main"),
    ("compute", "group"),
    ("large broadcast", "main"),
    ("idle", "group"),
    ("sleep", "group"),
    ("compute", "main"),
    ("large broadcast", "group"),
    ("receive", "group"),
]


# What a signal does to workers that are up does not depend on how they were started.
@pytest.mark.parametrize(
    ("method", "stage", "target"),
    [(m, *at) for m in MULTIPROCESSING for at in INTERRUPTED[: 9 if m == "fork" else 4]],
)
def test_one_interrupt_is_one_traceback(method: str, stage: str, target: str) -> None:
    call = f"import test_parallelizer as t; t.interrupted({stage!r}, {method!r})"
    with started(call) as program:
        read_until(program, "ready")
        time.sleep(0.02)
        if target == "group":
            os.killpg(program.pid, signal.SIGINT)
        else:
            os.kill(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=30)
        assert "interrupted\nworks\n" in out
        assert err.count("Traceback (most recent call last)") == 1, err
        assert err.rstrip().endswith("KeyboardInterrupt"), err
        assert "resource_tracker:" not in err  # what it warns of; the signal may hit its start
        assert "leaked" not in err
        assert program.returncode == -signal.SIGINT
        wait_until(lambda: not group_members(program.pid))


# Some of what may be sent to all processes at once. Main handles the first half from the beginning,
# the others only when the workers are up.
REQUESTS = ["SIGTERM", "SIGUSR1", "SIGALRM", "SIGRTMIN", "SIGWINCH", "SIGPIPE",
            "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR2", "SIGXCPU", "SIGCONT"]  # fmt: skip


def asked(method: str) -> None:
    """Main handles what is sent to the whole group, and goes on."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        print(REQUESTS[len(set(heard)) - 1], os.getpid() == main, flush=True)

    main, half = os.getpid(), len(REQUESTS) // 2
    numbers = [getattr(signal, name) for name in REQUESTS]
    for number in numbers[:half]:
        signal.signal(number, hear)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        before = par.run(pids)
        for number in numbers[half:]:
            signal.signal(number, hear)
        par.run(computes_until, main_kwargs={"ready": lambda: heard == numbers})
        assert par.run(pids) == before
    assert heard == numbers


def computes_until(ready: Callable[[], bool] = bool, *, parallelizer: Par) -> None:
    parallelizer.wait()
    if parallelizer.on_main:
        announce()
        while not ready():
            time.sleep(0.01)
    parallelizer.wait()


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_main_alone_hears_what_is_sent_to_the_whole_group(method: str) -> None:
    with started(f"import test_parallelizer as t; t.asked({method!r})") as program:
        read_until(program, "ready")
        for name in REQUESTS:
            os.killpg(program.pid, getattr(signal, name))
            read_until(program, f"{name} True")
        assert program.communicate(timeout=30) == ("", "")
        assert program.returncode == 0


def terminated(handled: bool, stage: str, method: str) -> None:
    def save(*_: object) -> None:
        print("saved", flush=True)
        sys.exit(3)

    if handled:
        signal.signal(signal.SIGTERM, save)
    with MultiprocessingParallelizer(3, start_method=method) as par:
        par.run(unwinds, stage)


def unwinds(stage: str, *, parallelizer: Par) -> None:
    try:
        parallelizer.wait()
        if parallelizer.on_main:
            announce()
            if stage == "verb":
                parallelizer.gather(0)
        time.sleep(100)
    finally:
        os.write(1, b"unwound\n")  # whole, whoever else writes


@pytest.mark.parametrize("stage", ["function", "verb"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_termination_that_main_handles_is_a_failed_run(method: str, stage: str) -> None:
    call = f"import test_parallelizer as t; t.terminated(True, {stage!r}, {method!r})"
    with started(call, OMP_NUM_THREADS="1") as program:  # or threadpoolctl would be missed
        read_until(program, "ready")
        os.killpg(program.pid, signal.SIGTERM)
        out, err = program.communicate(timeout=30)
        assert (sorted(out.split()), err) == (["saved", "unwound", "unwound", "unwound"], "")
        assert program.returncode == 3
        wait_until(lambda: not group_members(program.pid))


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_termination_that_main_does_not_handle_ends_all_at_once(method: str) -> None:
    call = f"import test_parallelizer as t; t.terminated(False, 'function', {method!r})"
    with started(call, OMP_NUM_THREADS="1") as program:  # or threadpoolctl would be missed
        read_until(program, "ready")
        os.killpg(program.pid, signal.SIGTERM)
        assert program.communicate(timeout=30) == ("", "")
        assert program.returncode == -signal.SIGTERM
        wait_until(lambda: not group_members(program.pid))


def signals_itself(numbers: list[int], *, parallelizer: Par) -> Any:
    if not parallelizer.on_main:
        for number in numbers:
            os.kill(os.getpid(), number)
        solver = "import signal; print(signal.getsignal(signal.SIGTERM), signal.sigpending())"
        out = subprocess.check_output([sys.executable, "-c", solver], text=True)
        assert out == "0 set()\n", out
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return parallelizer.gather(0)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_workers_inherit_no_handling_of_signals(method: str) -> None:
    """Neither functions of Python, nor what tells asyncio of them, nor a mask."""
    own, main = {signal.SIGURG, signal.SIGCHLD}, os.getpid()  # which main gets of its workers
    numbers = [*own, *(getattr(signal, name) for name in REQUESTS)]
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    def hear(*_: object) -> None:
        if os.getpid() != main:
            theirs.send(b"x")

    with ours, theirs:
        before = {number: signal.signal(number, hear) for number in numbers}
        file = signal.set_wakeup_fd(theirs.fileno())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
        try:
            with MultiprocessingParallelizer(2, start_method=method) as par:
                assert par.run(signals_itself, numbers) == [0, 0]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            signal.set_wakeup_fd(file)
            for number, handler in before.items():
                signal.signal(number, handler)
        theirs.send(bytes(own))
        assert {*ours.recv(1000)} == own


STARTED: list[Any] = []


def start_all(rank: int) -> None:
    """Start what stays: not all on one rank, as Python 3.12 warns of forks beside threads."""
    if not os.fork():
        while True:
            signal.pause()
    shell = ["sh", "-c", "sleep 100 & sleep 101; true"]
    STARTED.append(subprocess.Popen(shell, start_new_session=True))
    context = multiprocessing.get_context("fork")
    if rank == 1:
        STARTED.append(concurrent.futures.ProcessPoolExecutor(2, context))
        assert [*STARTED[-1].map(abs, [1, -2])] == [1, 2]
    elif rank == 2:
        STARTED.append(context.Pool(2))
    else:
        STARTED.append(MultiprocessingParallelizer(2, start_method="fork").__enter__())
        STARTED[-1].run(starts_one)


def starts_one(*, parallelizer: Par) -> None:
    if not parallelizer.on_main:
        STARTED.append(subprocess.Popen(["sleep", "102"]))


def starts_all(ending: str, *, parallelizer: Par) -> None:
    if not parallelizer.on_main:
        start_all(parallelizer.id)
    parallelizer.wait()
    if parallelizer.on_main:
        print(*descend(os.getpid()))
        announce()
    if ending == "closed":
        return
    if ending == "failed" and parallelizer.id == 2:
        raise Odd(2, detail="two")
    if not parallelizer.on_main:
        time.sleep(100)
    parallelizer.gather(0)


def leaves_much(ending: str, method: str) -> None:
    with contextlib.suppress(Odd), MultiprocessingParallelizer(4, start_method=method) as par:
        par.run(starts_all, ending)


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGKILL", "failed", "closed"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_what_workers_have_started_ends_with_them(method: str, ending: str) -> None:
    call = f"import test_parallelizer as t; t.leaves_much({ending!r}, {method!r})"
    with started(call) as program:
        pids = [int(pid) for pid in read_until(program, "ready")[0].split()]
        assert len(pids) >= 3 + 3 * 4 + 2 + 2 + 2
        if ending.startswith("SIG"):
            program.send_signal(getattr(signal, ending))
        program.communicate(timeout=30)
        wait_until(lambda: not any(map(alive, pids)))
        wait_until(lambda: not group_members(program.pid))


def waits_for_its_own(*, parallelizer: Par) -> None:
    parallelizer.wait()
    if parallelizer.on_main:
        announce()
        parallelizer.gather(0)
    context = multiprocessing.get_context("fork")
    try:
        if parallelizer.id == 1:
            with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
                executor.submit(time.sleep, 100).result()
        subprocess.run(["sleep", "100"], check=True)
    finally:
        os.write(1, b"unwound %d\n" % parallelizer.id)


def is_interrupted(method: str) -> None:
    with MultiprocessingParallelizer(3, start_method=method) as par:
        par.run(waits_for_its_own)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_at_an_interrupt_workers_leave_what_they_can_in_time(method: str) -> None:
    """That of rank 1 waits for its executor, so that it is killed with it."""
    with started(f"import test_parallelizer as t; t.is_interrupted({method!r})") as program:
        read_until(program, "ready")
        wait_until(lambda: len([*descend(program.pid)]) >= 4)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=30)
        assert out == "unwound 2\n"
        assert "rank(s) [1] did not leave" in err
        assert err.count("Traceback (most recent call last)") == 1, err
        assert program.returncode == -signal.SIGINT
        wait_until(lambda: not group_members(program.pid))


@contextlib.contextmanager
def started(call: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A program in a process group of its own, as a terminal would start it."""
    # Python itself leaves the file open whose import a signal ends; its importer goes by another
    # name once `importlib` is imported.
    strictly = ["-W", "error"]
    for importer in ("_frozen_importlib_external", "importlib._bootstrap_external"):
        strictly += ["-W", f"ignore::ResourceWarning:{importer}"]
    program = subprocess.Popen(
        [sys.executable, *strictly, "-c", call], cwd=HERE, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | env,
    )  # fmt: skip
    with program:
        try:
            yield program
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)


def read_until(program: subprocess.Popen[str], word: str) -> list[str]:
    lines: list[str] = []
    assert program.stdout is not None
    for line in program.stdout:
        lines.append(line.strip())
        if lines[-1] == word:
            return lines
    raise AssertionError(
        f"{word!r} did not come: {lines}, {program.stderr and program.stderr.read()}"
    )


def group_members(session: int) -> list[int]:
    """Processes of a session; zombies that nobody waits for do not count."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                members.append(int(entry.parent.name))
    return members


def gives_up(how: str, parallelizer: Par) -> None:
    """Main ends its program, or what holds the workers, amid an imap."""
    assert parallelizer.map(square, range(3)) == [0, 1, 4]
    LEFT[:] = [parallelizer.imap(square, itertools.count())]
    if how == "asyncio":
        asyncio = importlib.import_module("asyncio")

        asyncio.run(reads_on_threads(LEFT[0]))
    elif how == "fork":
        assert next(LEFT[0]) == 0
        child = os.fork()
        if not child:
            LEFT.clear()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert next(LEFT[0]) == 1
    else:
        assert next(LEFT[0]) == 0
    if how == "exit":
        sys.exit()


async def reads_on_threads(stream: Iterator[int]) -> None:
    """Read by the threads of asyncio, and give up amid that."""
    asyncio = importlib.import_module("asyncio")

    loop = asyncio.get_running_loop()
    found = [loop.run_in_executor(None, next, stream) for _ in range(9)]
    assert sorted(await asyncio.gather(*found)) == [x * x for x in range(9)]
    for _ in range(9):
        loop.run_in_executor(None, next, stream).cancel()


def program_that_gives_up(engine: str, how: str) -> None:
    par = create(engine)
    if engine == "mpi":
        drive(par, functools.partial(gives_up, how))
    elif how == "with":
        with par:
            gives_up(how, par)
        with par:
            gives_up(how, par)
    else:
        par.__enter__()
        gives_up(how, par)


WAYS_TO_GIVE_UP = ["with", "end", "exit", "asyncio", "fork"]


@pytest.mark.parametrize(
    ("engine_name", "how"),
    [*itertools.product(["serial", *MULTIPROCESSING], WAYS_TO_GIVE_UP),
     *(("mpi", how) for how in WAYS_TO_GIVE_UP if how != "fork")],
)  # fmt: skip
def test_a_program_may_end_amid_a_stream(engine_name: str, how: str) -> None:
    call = f"import test_parallelizer as t; t.program_that_gives_up({engine_name!r}, {how!r})"
    ranks = {"mpi": 3}.get(engine_name)
    code, out, err = finish("-W", "error", "-c", call, ranks=ranks)
    assert (code, out) == (0, ""), err
    assert ranks or not err
    assert "Exception ignored" not in err
    assert "Traceback" not in err


def killed(stage: str, method: str) -> None:
    with MultiprocessingParallelizer(4, start_method=method) as par:
        par.run(ranks)
        if stage == "idle":
            announce()
            time.sleep(60)
        par.run(until_interrupted, stage)


def without_a_shell() -> None:
    def spawns_nothing(*_: object, **__: object) -> int:
        raise FileNotFoundError("/bin/sh")

    os.posix_spawn = spawns_nothing
    with MultiprocessingParallelizer(3, start_method="fork") as par:
        before = par.run(pids)
        assert par.run(pids) == before
        announce()
        time.sleep(60)


def test_workers_end_with_main_where_there_is_no_shell() -> None:
    with started("import test_parallelizer as t; t.without_a_shell()") as program:
        read_until(program, "ready")
        program.kill()
        wait_until(lambda: not group_members(program.pid))


@pytest.mark.parametrize("stage", ["idle", "sleep", "compute", "large gather", "receive"])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_workers_end_when_main_is_killed(method: str, stage: str) -> None:
    call = f"import test_parallelizer as t; t.killed({stage!r}, {method!r})"
    with started(call) as program:
        read_until(program, "ready")
        program.kill()
        wait_until(lambda: not group_members(program.pid))


ENDINGS = {
    "never closed": "p.__enter__(); p.run(t.ranks)",
    "closed by an exception": "exec('with p: p.run(t.ranks); raise SystemExit')",
    "collected": "p.__enter__(); p.run(t.ranks); del p; gc.collect(); "
    "assert not multiprocessing.active_children()",
    "exits inside": "p.__enter__(); sys.exit(p.run(t.ranks)[0])",
    "run in a thread": "x = threading.Thread(target=p.run, args=(t.ranks,)); x.start(); x.join()",
    "runs in threads": "p.__enter__(); xs = [threading.Thread(target=t.run_often, args=(p,)) for _ "
    "in range(4)]; [x.start() for x in xs]; [x.join() for x in xs]; p.__exit__()",
    "nested": "assert p.run(t.nested_pools) == [[0, 1]] * 3",
    "the user forks": "p.__enter__(); p.run(t.ranks); pid = os.fork(); pid or os._exit(0); "
    "os.waitpid(pid, 0); assert p.run(t.ranks) == [0, 1, 2]; p.__exit__()",
}


def adopts_orphans() -> None:
    """As the first process of a container does."""
    becomes_a_subreaper = 36
    importlib.import_module("ctypes").CDLL(None).prctl(becomes_a_subreaper, 1)
    for _ in range(2):
        assert MultiprocessingParallelizer(2, start_method="fork").run(ranks) == [0, 1]
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_who_adopts_orphans_gets_none() -> None:
    run_program("-c", "import test_parallelizer as t; t.adopts_orphans()")


def run_often(par: MultiprocessingParallelizer) -> None:
    for _ in range(20):
        assert par.run(ranks) == [0, 1, 2]


def nested_pools(parallelizer: Par) -> Any:
    inner = MultiprocessingParallelizer(2, start_method="spawn" if parallelizer.id else None)
    return parallelizer.gather(inner.run(ranks))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_endings_leave_nothing_behind(method: str, ending: str) -> None:
    call = "import gc, multiprocessing, os, sys, threading, test_parallelizer as t; "
    call += f"p = t.MultiprocessingParallelizer(3, start_method={method!r}); {ENDINGS[ending]}"
    with started(call) as program:
        out, err = program.communicate(timeout=40)
        if "thread" in ending and method == "fork":  # which is not done while threads run
            assert err == "" or "forkserver is used" in err
            err = ""
        assert (program.returncode, out, err) == (0, "", "")
        wait_until(lambda: not group_members(program.pid))


# What every Python of the program does first, so that the module takes the branches of another
# system: without the names that Linux alone has; with ports that block, and no signals.
ELSEWHERE = {
    "macos": """
        import fcntl, os, sys
        import multiprocessing.popen_spawn_posix, multiprocessing.resource_tracker, tempfile
        for module, name in [(os, "memfd_create"), (os, "pidfd_open"), (os, "sched_getaffinity"),
                             (fcntl, "F_SETSIG"), (fcntl, "F_GETPIPE_SZ")]:
            vars(module).pop(name, None)
        if hasattr(os, "process_cpu_count"):  # what it is without sched_getaffinity
            os.process_cpu_count = os.cpu_count
        sys.modules["threadpoolctl"] = None  # it would look for the libraries of that system
        sys.platform = "darwin"
    """,
    "windows": """
        import importlib.machinery, os, sys
        class Finder:
            def find_spec(name, path, target=None):
                if name != MODULE:
                    return None
                spec = importlib.machinery.PathFinder.find_spec(name, path)
                execute = spec.loader.exec_module
                def exec_module(module):
                    os.name = "nt"
                    execute(module)
                    os.name = "posix"
                    module._URGENT = None
                spec.loader.exec_module = exec_module
                return spec
        sys.meta_path.insert(0, Finder)
    """,
}

WORK_ELSEWHERE = """
import functools, importlib, sys, numpy
parallelizer = importlib.import_module(sys.argv[2])
make = functools.partial(parallelizer.MultiprocessingParallelizer, 3, start_method="spawn")
assert parallelizer._test_backend(sys.argv[1], make)
with make() as p:
    assert list(p.imap(abs, range(-9, 9))) == list(map(abs, range(-9, 9)))
    assert p.map(numpy.sum, [p.share(numpy.arange(5))] * 3) == [10] * 3
print(parallelizer._POSIX, sys.platform)
"""


@pytest.mark.parametrize(("system", "told"), [("macos", "True darwin"), ("windows", "False linux")])
def test_the_branches_of_other_systems(system: str, told: str, tmp_path: Path) -> None:
    module = Parallelizer.__module__
    first = f"MODULE = {module!r}\n" + textwrap.dedent(ELSEWHERE[system])
    (tmp_path / "sitecustomize.py").write_text(first)
    path = os.pathsep.join([str(tmp_path), str(HERE)])
    out = run_program("-c", WORK_ELSEWHERE, system, module, PYTHONPATH=path)
    assert "5 checks passed" in out
    assert out.splitlines()[-1] == told


def all_verbs(parallelizer: Par) -> Any:
    large = np.arange(2 * MIB)
    assert (parallelizer.broadcast(large if parallelizer.on_main else None) == large).all()
    total = parallelizer.gather(parallelizer.scatter(large))
    assert not parallelizer.on_main or (total == large).all()
    parallelizer.send(large, (parallelizer.id + 1) % parallelizer.nprocs)
    assert (parallelizer.receive((parallelizer.id - 1) % parallelizer.nprocs) == large).all()
    return parallelizer.allreduce(parallelizer.id)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_64_descriptors_are_enough_for_8_processes(method: str) -> None:
    call = "import resource, test_parallelizer as t; "
    call += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    call += f"print(t.MultiprocessingParallelizer(8, start_method={method!r}).run(t.all_verbs))"
    with started(call) as program:
        out, err = program.communicate(timeout=60)
        assert (program.returncode, out, err) == (0, "28\n", "")


def memory_held() -> float:
    """MiB of shared memory that all processes of the parallelizers of this process have used."""
    files = [int(told.split()[0]) for told in open_descriptors() if "memfd:parallelizer" in told]
    status = map(os.fstat, files)
    return sum({one.st_ino: one.st_blocks for one in status}.values()) * 512 / MIB


def sends_large_data(*, parallelizer: Par) -> None:
    for verb in COLLECTIVES.values():
        verb(parallelizer, np.ones(MIB))
    for sender, receiver in itertools.permutations(range(parallelizer.nprocs), 2):
        if parallelizer.id == sender:
            parallelizer.send(np.ones(MIB), receiver)
        if parallelizer.id == receiver:
            parallelizer.receive(sender)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_processes_hold_no_more_shared_memory_than_the_readme_says(method: str) -> None:
    gc.collect()
    before, large = memory_held(), np.ones(MIB // 2)
    with MultiprocessingParallelizer(4, start_method=method) as par:
        par.run(ranks)
        assert memory_held() - before < 1
        par.run(sends_large_data)
        processes = memory_held() - before
        assert 16 < processes < 4 * 4 + 3 * 2 + 6 / 16 + 0.1
        found: list[float] = []
        tell = found.append
        par.map(np.sum, [large] * 40, chunksize=1, callback=lambda *_: tell(memory_held()))
        assert max(found) - before - processes < 64.1
        par.map(np.size, [np.ones(MIB * 10)], chunksize=1)
        assert 80 <= memory_held() - before - processes < 80.1
        par.map(abs, [1])
        assert memory_held() - before - processes < 64.1
    gc.collect()
    assert memory_held() <= before


def error_where_files_are_limited(nbytes: int, call: str) -> str:
    """What a program says that fails at `call`, where no file may be larger than so many bytes."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({nbytes}, {nbytes}))"
    with started(f"import resource, test_parallelizer as t; {limit}; {call}") as program:
        _, err = program.communicate(timeout=60)
        assert program.returncode == 1
    return err


def test_too_little_shared_memory_is_an_error_that_says_so() -> None:
    call = "t.MultiprocessingParallelizer(8).run(t.ranks)"
    err = error_where_files_are_limited(1 << 16, call)
    assert "ParallelizerError: no shared memory: 8 processes need 32 MiB" in err
    assert "ulimit -f" in err


def fails_for_want_of_descriptors() -> None:
    resource = importlib.import_module("resource")
    with SerialNonParallelizer() as serial:
        serial.run(ranks)
    for most in range(16, 31):  # at each step of the start it may be the last one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, 1024))
        error = caught_from(MultiprocessingParallelizer(5, start_method="fork").run, ranks)
        assert "ulimit -n" in str(error), (most, error)
    print("ulimit -n", flush=True)


def test_too_few_descriptors_are_an_error_that_says_so() -> None:
    with started("import test_parallelizer as t; t.fails_for_want_of_descriptors()") as program:
        out, err = program.communicate(timeout=60)
        assert out == "ulimit -n\n", err
        wait_until(lambda: not group_members(program.pid))


STARTS = """
import os, sys, test_parallelizer as t
sys.stdout.write("waits to be flushed")
try:
    t.MultiprocessingParallelizer(2, start_method=sys.argv[1]).run(t.ranks)
except Exception as error:
    os.write(2, f"{type(error).__name__}: {error}".encode())
os._exit(0)
"""


def told_of_the_start(method: str, stdout: int, **env: str) -> str:
    """Run STARTS, and return what it has written of its error."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = subprocess.run(
        [sys.executable, "-c", STARTS, method],
        env=inherited | {"PYTHONPATH": str(HERE), "PARALLELIZER_TEST_PROGRAM": "1"} | env,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return program.stderr


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_errors_of_the_start_mean_what_they_say(method: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert told_of_the_start(method, writer) == "BrokenPipeError: [Errno 32] Broken pipe"
    os.close(writer)
    full = os.open("/dev/full", os.O_WRONLY)
    assert told_of_the_start(method, full) == "OSError: [Errno 28] No space left on device"
    os.close(full)
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    told = told_of_the_start(method, subprocess.DEVNULL, TMPDIR=str(folder))
    # Before Python 3.14, sockets are made there at any cost.
    assert not told or (method == "forkserver" and "set TMPDIR" in told and str(folder) in told)
    assert told or method != "forkserver" or sys.version_info >= (3, 14)


def leave_little_memory(*, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        resource = importlib.import_module("resource")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 64 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    return parallelizer.gather(os.getpid())


def is_given(value: Any, *, parallelizer: Par) -> Any:
    return parallelizer.gather(len(value))


def is_sent(value: Any = None, *, parallelizer: Par) -> None:
    if parallelizer.on_main:
        parallelizer.send(value[0], 1)
    elif parallelizer.id == 1:
        parallelizer.receive(0)
    parallelizer.wait()


def is_broadcast_twice(value: Any = None, *, parallelizer: Par) -> Any:
    for _ in range(2):  # who catches the error is in step
        with contextlib.suppress(MemoryError):
            parallelizer.broadcast(value[0] if parallelizer.on_main else None)
    return parallelizer.gather(os.getpid())


def lasts_long_on_workers(_: object, main: int) -> None:
    """So that rank 1 gets an item, too."""
    time.sleep(0.05 if os.getpid() == main else 1)


LARGE: dict[str, Callable[[], Any]] = {
    "array": lambda: np.zeros(128 * MIB, np.uint8),
    "pickle": lambda: b"x" * (128 * MIB),
}
RECEIVED: dict[str, Callable[[Par, Any], object]] = {
    "argument": lambda par, value: par.run(is_given, value),
    "message": lambda par, value: par.run(is_sent, main_kwargs={"value": [value]}),
    "item": lambda par, value: par.map(lasts_long_on_workers, [value] * 6, (os.getpid(),)),
    "stream": lambda par, value: [*par.imap(lasts_long_on_workers, [value] * 6, 1, (os.getpid(),))],
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_worker_says_that_it_is_out_of_memory(method: str, kind: str) -> None:
    value = LARGE[kind]()
    with MultiprocessingParallelizer(3, start_method=method) as par:
        pids = par.run(leave_little_memory)
        for receives in RECEIVED.values():
            with pytest.raises(MemoryError, match="rank 1 is out of memory for what rank 0 has"):
                receives(par, value)
        caught = par.run(is_broadcast_twice, main_kwargs={"value": [value]})
        assert caught == pids  # none has died


def in_a_daemon(method: str, results: Any = None) -> Any:
    told = [str(caught_from(MultiprocessingParallelizer(2, start_method=method).run, ranks))]
    told += [MultiprocessingParallelizer(1, start_method=method).run(ranks)]
    return told if results is None else results.send(told)


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_daemonic_process_is_told_to_run_serially(method: str) -> None:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=in_a_daemon, args=(method, writer), daemon=True)
    process.start()
    with reader, writer:
        told, serial = reader.recv()
    process.join()
    assert "a daemonic process, such as a worker of multiprocessing.Pool" in told
    assert serial == [0]


def shares_much(*, parallelizer: Par) -> Any:
    return parallelizer.share(np.ones(4 * MIB))


def test_share_names_the_limit_that_it_meets() -> None:
    call = "t.MultiprocessingParallelizer(2).run(t.shares_much)"
    err = error_where_files_are_limited(24 << 20, call)
    assert "share cannot keep 33554432 bytes in shared memory" in err
    assert "ulimit -f" in err


def prints_nowhere(*, parallelizer: Par) -> Any:
    with contextlib.redirect_stdout(None):  # as in a program without a console
        parallelizer.print("lost", flush=True)
    return parallelizer.gather(parallelizer.id)


def test_print_without_stdout_prints_nothing(p: Par) -> None:
    expect(p, p.run(prints_nowhere), [*range(p.nprocs)])


def has_a_child_and_dies(path: str, *, parallelizer: Par) -> None:
    if parallelizer.id == 1:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        Path(path).write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    parallelizer.wait()


@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_a_death_is_told_though_a_grandchild_lives(method: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    with MultiprocessingParallelizer(2, start_method=method) as par:
        error = failure(par, has_a_child_and_dies, str(tmp_path / "pid"))
    assert isinstance(error, WorkerDied)
    assert time.monotonic() - begun < 20
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_threads_may_share_a_pool() -> None:
    with MultiprocessingParallelizer(2, start_method="fork") as par:
        results: dict[int, Any] = {}

        def use(factor: int) -> None:
            results[factor] = [par.map(square, range(factor * 10)) for _ in range(10)]

        threads = [threading.Thread(target=use, args=(factor,)) for factor in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {f: [[x * x for x in range(f * 10)]] * 10 for f in (1, 2, 3)}


def finds_by_name(*, parallelizer: Par) -> Any:
    return parallelizer.gather(Parallelizer.lookup("given later") is parallelizer)


def test_workers_know_names_that_are_given_later() -> None:
    with MultiprocessingParallelizer(2, start_method="fork") as par:
        par.run(roll_call)
        par.register("given later")
        try:
            assert par.run(finds_by_name) == [True, True]
        finally:
            Parallelizer.unregister("given later")
        assert isinstance(failure(par, finds_by_name), LookupError)


def test_fork_is_not_used_while_threads_run() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        par = MultiprocessingParallelizer(2, start_method="fork")
        assert par.run(parent_is_main) is False
    finally:
        release.set()
        thread.join()


def start_a_native_thread() -> None:
    """As a library in C would: Python does not know of it. It waits for a lock that is held."""
    ctypes: Any = importlib.import_module("ctypes")
    libc, lock, thread = ctypes.CDLL(None), ctypes.create_string_buffer(64), ctypes.c_ulong()
    HELD.append(lock)
    libc.pthread_mutex_lock(lock)
    assert libc.pthread_create(ctypes.byref(thread), None, libc.pthread_mutex_lock, lock) == 0


def multiply(*, parallelizer: Par) -> Any:
    return parallelizer.gather(float((np.ones((200, 200)) @ np.ones((200, 200))).sum()))


def forks_beside(threads: str) -> None:
    """Run as a program of its own by the test below."""
    pools = [MultiprocessingParallelizer(3, start_method="fork") for _ in range(3)]
    if threads == "watchdog":  # started anew, now that pytest is no more
        faulthandler.dump_traceback_later(100)
    multiply(parallelizer=SerialNonParallelizer())
    if threads == "library after numpy":
        assert pools[0].run(multiply) == [8e6] * 3  # ends the threads of numpy
    if threads.startswith("library"):
        start_a_native_thread()
    with pools[1] as par:
        if threads == "late library":
            start_a_native_thread()
        print(par.run(parent_is_main), par.run(multiply) == [8e6] * 3)
        if threads == "threads amid runs":
            start_a_native_thread()
            multiply(parallelizer=SerialNonParallelizer())
        victim = par.run(pids)[1]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not alive(victim))
        assert isinstance(caught_from(par.run, pids), WorkerDied)
        print(par.run(parent_is_main), par.run(multiply) == [8e6] * 3)
    print(pools[2].run(parent_is_main), pools[2].run(multiply) == [8e6] * 3)


FORKS_BESIDE = {
    # Which of the three times it forked.
    "numpy": [True, True, True],
    "watchdog": [True, True, True],
    "library": [False, False, False],
    "library after numpy": [False, False, False],
    "late library": [False, False, False],
    "threads amid runs": [True, False, False],
}


@pytest.mark.parametrize("threadpoolctl", [True, False])
@pytest.mark.parametrize("threads", FORKS_BESIDE)
def test_fork_is_not_used_beside_threads_that_it_does_not_stop(
    threads: str, threadpoolctl: bool
) -> None:
    hide = "" if threadpoolctl else "sys.modules['threadpoolctl'] = None; "
    call = f"import sys; {hide}import test_parallelizer as t; t.forks_beside({threads!r})"
    code, out, err = finish("-W", "error", "-c", call, OMP_NUM_THREADS="2")  # so numpy has some
    assert code == 0, err
    assert out.splitlines() == [f"{forked} True" for forked in FORKS_BESIDE[threads]]
    told = [] if threads in ("numpy", "watchdog") else ["a library runs threads of its own"]
    assert [line[:33] for line in err.splitlines()] == told


def parent_is_main(parallelizer: Par) -> Any:
    mains, parents = parallelizer.allgather(os.getpid()), parallelizer.allgather(os.getppid())
    return mains[0] == parents[1]


# -- a pool in a process that an MPI launcher has started ------------------------------------------


OPENS_POOLS = """
import os, sys
from parallelizer import MultiprocessingParallelizer
if sys.argv[1] == "main imports MPI":
    from mpi4py import MPI

def gathers(*, parallelizer):
    here = "MPI4PY_RC_INITIALIZE" in os.environ  # programs that it starts would inherit that
    if parallelizer.id > 0:
        from mpi4py import MPI
        here = here or MPI.Is_initialized()
    return parallelizer.gather(here)

if __name__ == "__main__":
    for method in (None, "fork", "forkserver", "spawn"):
        with MultiprocessingParallelizer(3, start_method=method) as p:
            assert p.run(gathers) == [False, False, False], method
    from mpi4py import MPI
    total = MPI.COMM_WORLD.allreduce(1)
    if MPI.COMM_WORLD.rank == 0:
        print(total)
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("importer", ["main imports MPI", "workers import MPI"])
def test_a_pool_takes_no_part_in_the_mpi_job(importer: str, ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(OPENS_POOLS)
    told = run_program(str(script), importer, ranks=ranks, limit=180)
    assert told == f"{ranks}\n"


CALLS_MPI = """
from mpi4py import MPI
rank = MPI.COMM_WORLD.Get_rank()
from parallelizer import MultiprocessingParallelizer
if __name__ == "__main__":
    MultiprocessingParallelizer(2).map(abs, [1])
"""


def test_a_script_that_calls_mpi_in_workers_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CALLS_MPI)
    code, _, err = finish(str(script), ranks=1)
    assert code != 0
    assert "WorkerDied" in err
    assert "MPI at its top level, and MPI is not initialized" in err


def kills_its_fork_server(*, parallelizer: Par) -> Any:
    if parallelizer.id == 1:
        server = os.getppid()
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not alive(server))
    return pids(parallelizer)


def test_workers_outlive_their_fork_server() -> None:
    with MultiprocessingParallelizer(4, start_method="forkserver", timeout=30) as par:
        before = par.run(pids)
        assert par.run(kills_its_fork_server) == before
        # Multiprocessing takes them for dead.
        assert not {child.pid for child in multiprocessing.active_children()} & {*before}
        assert par.run(pids) == before
        # By a new one.
        os.kill(before[3], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="rank 3"):
            par.run(stuck)
        after = par.run(pids)
        assert [old == new for old, new in zip(before, after, strict=True)] == [
            True, True, False, False,
        ]  # fmt: skip
        assert not any(map(alive, before[2:]))  # or two would read what is for one
        assert par.run(pids) == after


def test_without_pidfds_workers_end_with_their_fork_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with MultiprocessingParallelizer(3, start_method="forkserver", timeout=30) as par:
        before = par.run(pids)
        with pytest.raises(WorkerDied, match="the fork server was killed first"):
            par.run(kills_its_fork_server)
        after = par.run(pids)
        wait_until(lambda: not any(map(alive, before[1:])))
        assert par.run(pids) == after


def test_a_fork_server_that_has_died_is_replaced() -> None:
    par = MultiprocessingParallelizer(2, start_method="forkserver")
    for _ in range(2):
        assert par.run(kills_its_fork_server)[0] == os.getpid()
    assert par.run(ranks) == [0, 1]


def masks(*, parallelizer: Par) -> Any:
    return parallelizer.gather(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_what_others_start_has_no_mask_of_ours() -> None:
    """Run as a program of its own, whose fork server nobody has started before."""
    run_program("-c", "import test_parallelizer as t; t.mask_nobody()")


def mask_nobody() -> None:
    own = {signal.SIGUSR2, signal.SIGURG}
    for method in MULTIPROCESSING:
        signal.pthread_sigmask(signal.SIG_BLOCK, own)
        assert MultiprocessingParallelizer(2, start_method=method).run(masks) == [own, set()]
        assert signal.pthread_sigmask(signal.SIG_UNBLOCK, own) == own
        assert MultiprocessingParallelizer(2, start_method=method).run(masks) == [set(), set()]
        pool = futures.ProcessPoolExecutor(1, multiprocessing.get_context(method))
        with pool:
            assert pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result() == set()
            handler = pool.submit(signal.getsignal, signal.SIGINT).result()
            assert handler is signal.default_int_handler


def nests_by_a_fork_server(*, parallelizer: Par) -> Any:
    inner = MultiprocessingParallelizer(2, start_method="forkserver")
    return parallelizer.gather(len(set(inner.run(pids))))


def test_a_fork_server_is_not_its_child_s() -> None:
    assert MultiprocessingParallelizer(2, start_method="forkserver").run(ranks) == [0, 1]
    par = MultiprocessingParallelizer(2, start_method="fork")
    assert par.run(nests_by_a_fork_server) == [2, 2]


def forks(way: str, culprits: Sequence[int], *, parallelizer: Par) -> Any:
    """Tell the exit status of a child that leaves this function in its own way."""
    parallelizer.wait()
    sys.stdout.write(f"function of {parallelizer.id}\n")  # what the child does not write again
    status = None
    if parallelizer.id in culprits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the watchdog's thread
            child = os.fork()
        if not child:
            return leave(way, parallelizer)
        # It must not stay; there is no wait for a child with a limit.
        wait_until(lambda: not alive(child))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return parallelizer.allgather(status)


def leave(way: str, par: Par) -> None:
    sys.stdout.write(f"child of {par.id}\n")
    if way.startswith("exit"):
        sys.exit(way[5:] if way == "exit told" else int(way[5:]))
    elif way == "raise":
        raise JobError("in a child", 1)
    elif way == "catch":
        with pytest.raises(ParallelizerError):
            par.broadcast(1)
    elif way == "map":
        par.map(square, range(100))
    elif way == "receive":
        par.receive(0)
    elif way != "return":
        getattr(par, way)(*([1] if way == "gather" else []))


FORKED_WAYS = {"return": 0, "exit 0": 0, "exit 7": 7, "exit told": 1, "raise": 1}
FORKED_VERBS = {"gather": 1, "wait": 1, "map": 1, "receive": 1, "catch": 0}


@pytest.mark.parametrize("way", FORKED_WAYS | FORKED_VERBS)
def test_a_child_that_is_forked_in_a_run_takes_no_part(p: Par, way: str) -> None:
    if p.nprocs == 1 and way in FORKED_VERBS:
        return  # has nobody to talk to
    before = p.run(process_ids)
    for culprits in ([0], [p.nprocs - 1], range(p.nprocs)):
        status = (FORKED_WAYS | FORKED_VERBS)[way]
        found = p.run(forks, way, culprits)
        expect(p, found, [status if rank in culprits else None for rank in range(p.nprocs)])
        expect(p, p.run(process_ids), before)


def program_that_forks(engine: str) -> None:
    """Run as a program of its own by the test below."""
    with create(engine) as par:
        par.run(forks, "return", range(par.nprocs))


@pytest.mark.parametrize("engine_name", ["serial", *MULTIPROCESSING, "mpi"])
def test_a_forked_child_writes_its_own_words_alone(engine_name: str) -> None:
    call = f"import test_parallelizer as t; t.program_that_forks({engine_name!r})"
    ranks = range(1 if engine_name == "serial" else NPROCS)
    mpi = NPROCS if engine_name == "mpi" else None
    out = run_program("-c", call, ranks=mpi, PYTHONUNBUFFERED="")
    lines = [f"{whose} {rank}" for rank in ranks for whose in ("child of", "function of")]
    assert sorted(out.splitlines()) == sorted(lines)


def forks_for_an_item(_: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    return os.waitpid(child, 0)[1] if child else None


def maps_forks(vectorized: bool, *, parallelizer: Par) -> Any:
    if vectorized:
        return parallelizer.map(forks_for_a_block, range(60), vectorized=True)
    return parallelizer.map(forks_for_an_item, range(60), chunksize=15)


def forks_for_a_block(block: Sequence[int]) -> list[Any]:
    return [forks_for_an_item(block)] * len(block)


@pytest.mark.parametrize("vectorized", [False, True])
@BOTH_WAYS
def test_a_child_that_is_forked_for_an_item_computes_no_other(
    p: Par, way: Any, vectorized: bool
) -> None:
    expect(p, way(p, maps_forks, vectorized), [0] * 60)
    if not vectorized:
        expect(p, way(p, streams_forks), [0] * 60)


def streams_forks(*, parallelizer: Par) -> Any:
    return list(parallelizer.imap(forks_for_an_item, range(60), 15))


def forks_amid_a_stream(way: str, method: str) -> None:
    """Run as a program of its own by the test below."""
    with create(method) as par:
        found = []
        for result in par.imap(square, range(100)):
            found.append(result)
            if result == 16 and os.fork() == 0:
                if way == "break":
                    break
                if way == "exit":
                    sys.exit(7)
        else:
            status = os.waitstatus_to_exitcode(os.wait()[1])
            assert status == {"exit": 7, "break": 3, "go on": 1}[way]
            assert found == [x * x for x in range(100)]
            expect_to_work(par)
            print("all well")
            return
        expect_to_work(par)  # the child is a program of its own
    sys.exit(3)


@pytest.mark.parametrize("way", ["exit", "break", "go on"])
@pytest.mark.parametrize("method", ["serial", *MULTIPROCESSING])
def test_a_child_that_is_forked_amid_a_stream_disturbs_nobody(method: str, way: str) -> None:
    call = f"import test_parallelizer as t; t.forks_amid_a_stream({way!r}, {method!r})"
    code, out, err = finish("-c", call, limit=40)
    if method == "serial" and way == "go on":  # there is nothing to disturb
        return
    assert (code, out) == (0, "all well\n"), err
    if way == "go on":
        assert "takes no part in the run" in err
    else:
        assert err == ""


# -- faults under MPI ----------------------------------------------------------------------------


def mpi_program(fault: str, stage: str) -> None:
    """One rank goes wrong and nobody handles it."""
    par = MPIParallelizer()
    if stage == "between runs":
        par.run(ranks)
        if par.id == 1:
            go_wrong(fault, par)
        par.run(ranks)
    else:
        par.run(faulty, fault, [1] if fault != "all raise" else [0, 1, 2], stage)


@pytest.mark.parametrize("stage", ["gather", "receive", "large broadcast", "sleep", "between runs"])
@pytest.mark.parametrize("fault", ["raise", "sys.exit", "SIGKILL"])
def test_an_unhandled_fault_ends_the_mpi_job(fault: str, stage: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_program({fault!r}, {stage!r})"
    code, _, err = finish("-c", call, ranks=3, limit=60)
    assert code == 3 if fault == "sys.exit" else code != 0
    tracebacks = err.count("Traceback (most recent call last)")
    assert tracebacks == (1 if fault == "raise" else 0), err
    if fault == "raise":
        assert "### rank 1 of 3 on" in err
        assert "Odd: odd 7" in err


def mpi_handled() -> None:
    """Every rank handles the same exception, and the job goes on."""
    par = MPIParallelizer()
    for stage in ("gather", "broadcast", "receive", "large send", "large gather", "wait"):
        for culprits in ([1], [0], [0, 1, 2]):
            for fault in ("raise", "sys.exit", "unpicklable value"):
                with pytest.raises(EXCEPTIONS[fault]):
                    par.run(faulty, fault, culprits, stage)
                assert par.run(ranks) == (
                    [0, 1, 2] if par.on_main else Parallelizer.InWorkerProcess
                )
    par.print("all handled", where="main")


@pytest.mark.timeout(100)
def test_a_handled_fault_does_not_end_the_mpi_job() -> None:
    call = "import test_parallelizer as t; t.mpi_handled()"
    assert run_program("-c", call, ranks=3, limit=60) == "all handled\n"


def late(parallelizer: Par) -> Any:
    if parallelizer.id == 2:
        time.sleep(4)
    return parallelizer.gather(parallelizer.id)


def in_a_subset(mode: str, parallelizer: Par) -> Any:
    """Of the members of a nested run, rank 2 comes, does not come, or raises."""
    if parallelizer.id == 2 and mode == "elsewhere":
        return parallelizer.gather(0)
    if parallelizer.id == 2 and mode == "raises":
        raise Odd(1, detail="")
    return parallelizer.gather(parallelizer.run(ranks, comm=[0, 2]))


def brings_an_array_late(*, parallelizer: Par) -> Any:
    if parallelizer.on_main:
        time.sleep(3)
    return parallelizer.broadcast(np.ones(MIB))


def late_is_told(par: Par) -> str:
    """What is told of rank 2, which is late: to itself, that the others are gone."""
    return r"rank\(s\) 2 on \S+, which" if par.id < 2 else "gave up its wait in gather #1"


def mpi_late_and_absent() -> None:
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    par = MPIParallelizer(timeout=1)
    with pytest.raises(WaitTimeout if par.id < 2 else ContractError, match=late_is_told(par)):
        par.run(late)
    for _ in range(2):
        with pytest.raises(ContractError, match=r"cannot be used any more, because rank [01] gave"):
            par.run(late)
    par = MPIParallelizer(world.Dup(), timeout=1)
    # The round is complete when main comes to it, and nobody is left to move the array.
    with pytest.raises(ContractError if par.on_main else WaitTimeout, match=r"in broadcast #1"):
        par.run(brings_an_array_late)
    par = MPIParallelizer(world.Dup(), timeout=1)
    told = pytest.raises(WaitTimeout, match="send")
    with told if par.id < 2 else contextlib.nullcontext():
        par.run(floods, comm=[0, 1])
    par = MPIParallelizer(world.Dup())
    for mode, kind in (("elsewhere", ContractError), ("raises", Odd), ("elsewhere", ContractError)):
        with pytest.raises(kind):
            par.run(in_a_subset, mode)
        par.run(in_a_subset, "comes")
        assert par.run(ranks) == ([0, 1, 2] if par.on_main else Parallelizer.InWorkerProcess)
    par.print("all told", where="main")


@pytest.mark.timeout(100)
def test_ranks_that_are_late_or_absent_under_mpi() -> None:
    call = "import test_parallelizer as t; t.mpi_late_and_absent()"
    assert run_program("-c", call, ranks=3, limit=60) == "all told\n"


def mpi_meetings() -> None:
    """Ranks that are rightly in another run than main, and a main that is interrupted."""
    par = MPIParallelizer()
    # Rank 1 sits a run out, and fails in the next while main is in the first.
    found = par.run(slowly, comm=[0, 2, 3])
    assert found == (Parallelizer.InWorkerProcess if par.id == 1 else [0, 1, 2])
    if par.id == 3:
        par.send("between two runs", 1)
    assert par.id != 1 or par.receive(3) == "between two runs"
    with pytest.raises(Odd):
        par.run(faulty, "raise", [1], "gather")
    # Two parallelizers of the same ranks, the one used inside a run of the other.
    with pytest.raises(Odd):
        par.run(in_two)
    # Main has failed, and is interrupted while it waits for a late rank to hear of that.
    signal.signal(signal.SIGALRM, cry)
    if par.on_main:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(TimeoutError if par.on_main else Odd):
        par.run(fails_with_a_late_rank)
    # The program ends while rank 3, served by way of rank 2, waits for it to come.
    ClientServerRunner(catches, parallelizer=par).run()
    par.print("all met", where="main")


def slowly(*, parallelizer: Par) -> Any:
    time.sleep(0.3)
    return parallelizer.allgather(parallelizer.id)


def in_two(*, parallelizer: Par) -> None:
    assert MPIParallelizer().run(slowly) == [0, 1, 2, 3]
    faulty("raise", [1], "gather", parallelizer=parallelizer)


def cry(*_: object) -> None:
    raise TimeoutError


def fails_with_a_late_rank(*, parallelizer: Par) -> None:
    if parallelizer.id == 2:
        time.sleep(2)
    faulty("raise", [0], "gather", parallelizer=parallelizer)


def catches(*, parallelizer: Par) -> None:
    with pytest.raises(Odd):
        parallelizer.run(fails_with_a_late_rank)


@pytest.mark.timeout(100)
def test_ranks_that_are_in_another_run() -> None:
    call = "import test_parallelizer as t; t.mpi_meetings()"
    assert run_program("-c", call, ranks=4, limit=60) == "all met\n"


def fails_while_others_compute(culprits: list[int], *, parallelizer: Par) -> Any:
    parallelizer.wait()  # until all have begun
    if parallelizer.id in culprits:
        raise Odd(parallelizer.id, detail="")
    time.sleep(2)
    return parallelizer.gather(parallelizer.id)


def mpi_handled_alone(culprits: list[int], most_by_allgather: int) -> None:
    """Who fails raises before the others know of it, and meets them again in the next run."""
    internals._MOST_BY_ALLGATHER = most_by_allgather
    par = MPIParallelizer()
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(Odd) as caught:
            par.run(fails_while_others_compute, culprits)
        assert (
            caught.value.args == Odd(par.id if par.id in culprits else culprits[0], detail="").args
        )
        assert (time.monotonic() - begun < 1.9) == (par.id in culprits)
        if par.id not in culprits:
            notes = [f"rank {one} failed too: {__name__}.Odd: odd {one}" for one in culprits[1:]]
            assert getattr(caught.value, "__notes__", []) == notes
        assert par.run(ranks) == ([0, 1, 2] if par.on_main else Parallelizer.InWorkerProcess)
    par.print("all met", where="main")


@pytest.mark.parametrize(
    ("culprits", "most_by_allgather"), [([0], 3), ([2], 2), ([0, 2], 3), ([0, 2], 2)]
)
def test_a_rank_that_fails_while_others_compute_raises_alone(
    culprits: list[int], most_by_allgather: int
) -> None:
    call = f"import test_parallelizer as t; t.mpi_handled_alone({culprits}, {most_by_allgather})"
    assert run_program("-c", call, ranks=3, limit=60) == "all met\n"


def mpi_interrupted() -> None:
    """A signal's handler raises amid a collective call, to which one rank does not come."""
    par = MPIParallelizer()
    signal.signal(signal.SIGALRM, cry)
    if par.on_main:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    par.run(late)


@pytest.mark.timeout(100)
def test_what_interrupts_a_collective_call_of_mpi_ends_the_job() -> None:
    call = "import test_parallelizer as t; t.mpi_interrupted()"
    code, _, err = finish("-c", call, ranks=3, limit=60)
    assert code != 0
    told = (
        "TimeoutError\nthe other ranks cannot leave the collective call that this has interrupted"
    )
    assert (err.count("Traceback"), err.count(told)) == (1, 1), err


def mpi_early_end(verb: str) -> None:
    par = MPIParallelizer()
    if par.id != (0 if verb == "serve" else 1):
        arguments: dict[str, list[Any]] = {"gather": ["x"], "receive": [1], "run": [does_nothing]}
        getattr(par, verb)(*arguments.get(verb, []))


def does_nothing(*, parallelizer: Par) -> None:
    """A run without a verb."""


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("gather", "rank 1 ended its program while rank 0 waits in gather #1"),
        ("receive", "rank 1 ended its program while rank 0 waits in receive(1, tag=0)"),
        ("run", "rank 1 ended its program while rank 0 waits in return"),
        (
            "serve",
            "rank 0 ended its program while rank 1 waits in serve; if main alone is to call map",
        ),
    ],
)
def test_a_program_that_ends_early_is_told(verb: str, told: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_early_end({verb!r})"
    code, _, err = finish("-c", call, ranks=3, limit=60)
    assert code != 0
    assert err.count(f"ContractError: {told}" + "\n" * (verb != "serve")) == 1, err


def mpi_vain(verbs: Sequence[str]) -> None:
    """Two ranks wait for each other, after calls outside a run, which all have the same number."""
    par = MPIParallelizer()
    par.wait()
    arguments = {"gather": [0], "receive": [1 - par.id], "serve": []}
    getattr(par, verbs[par.id])(*arguments[verbs[par.id]])


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("verbs", "told"),
    [
        (
            ["gather", "receive"],
            "rank 0 waits in gather #1 while rank 1 waits in receive(0, tag=0): neither can go on",
        ),
        (
            ["receive", "serve"],
            "rank 1 waits in serve while rank 0 waits in receive(1, tag=0): neither can go on; if",
        ),
    ],
)
def test_who_waits_in_vain_outside_a_run_is_told_why(verbs: list[str], told: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_vain({verbs})"
    code, _, err = finish("-c", call, ranks=2, limit=60)
    assert code != 0
    assert f"ContractError: {told}" in err, err


def mpi_idiom(idiom: str, verb: str) -> None:
    """What other pools have workers do while main maps."""
    par = MPIParallelizer()
    if not par.on_main:
        if idiom != "sys.exit":
            getattr(par, idiom)()
        sys.exit(0)
    list(getattr(par, verb)(abs, range(10)))


@pytest.mark.parametrize("verb", ["map", "imap"])
@pytest.mark.parametrize("idiom", ["wait", "sys.exit", "serve"])
def test_who_takes_mpi_for_a_pool_is_told_of_client_and_server(idiom: str, verb: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_idiom({idiom!r}, {verb!r})"
    code, _, err = finish("-c", call, ranks=3, limit=60)
    assert code == 1
    told = {"wait": "called wait #1", "sys.exit": "ended its program while",
            "serve": "waits in serve while"}  # fmt: skip
    lines = [line for line in err.splitlines() if "ContractError: " in line]
    assert lines, err
    for line in lines:  # of whichever rank has found it
        assert told[idiom] in line
        assert verb in line
        assert "call ClientServerRunner(client).run() on all ranks" in line


def mpi_late(late: int) -> None:
    """One rank comes to its verb after another has ended the program, as that may."""
    par = MPIParallelizer()
    if par.id == late:
        time.sleep(2)
    if late == 1:
        print_on_main(par.gather([par.id]), par)
    elif par.id == 1:
        print(par.receive(2), flush=True)
    elif par.id == 2:
        par.send([0, 1, 2], 1)


def print_on_main(result: object, par: Par) -> None:
    if par.on_main:
        print(result, flush=True)


@pytest.mark.parametrize("late", [1, 2])
def test_who_has_done_its_part_may_end_its_program(late: int) -> None:
    call = f"import test_parallelizer as t; t.mpi_late({late})"
    wanted = "[[0], [1], [2]]\n" if late == 1 else "[0, 1, 2]\n"
    assert run_program("-c", call, ranks=3, limit=60) == wanted


def mpi_half(fault: str, whole: bool) -> None:
    """In the second half of the ranks one goes wrong, on its own account."""
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    if whole:
        MPIParallelizer().run(ranks)
    par = MPIParallelizer(comm=world.Split(world.rank // 2))
    par.run(ranks)
    if world.rank == 3 and fault != "end":
        go_wrong(fault, par)
    if world.rank != 3:
        par.allgather(world.rank)


@pytest.mark.parametrize(
    ("fault", "whole"), [("raise", False), ("sys.exit", True), ("end", False), ("end", True)]
)
def test_a_fault_among_a_part_of_the_ranks_ends_the_mpi_job(fault: str, whole: bool) -> None:
    call = f"import test_parallelizer as t; t.mpi_half({fault!r}, {whole})"
    code, _, err = finish("-c", call, ranks=4, limit=60)
    assert code == 3 if fault == "sys.exit" else code != 0
    assert err.count("Traceback (most recent call last)") == (fault != "sys.exit"), err
    told = {
        "raise": "Odd: odd 7",
        "sys.exit": "### rank 3 ended its program with status 3 while others go on",
        "end": "ContractError: rank 1 ended its program while rank 0 waits in allgather #1",
    }
    assert told[fault] in err
    if fault != "sys.exit":
        assert f"### rank {3 if fault == 'raise' else 2} of 4 on" in err


def mpi_part() -> None:
    """Where this module is for some of the ranks alone, and the others need not know of it."""
    mpi = importlib.import_module("mpi4py.MPI")
    part = mpi.COMM_WORLD.Split(0 if mpi.COMM_WORLD.rank < 2 else mpi.UNDEFINED)
    if part:
        par = MPIParallelizer(comm=part)
        print_on_main(par.run(ranks), par)


def test_a_program_for_a_part_of_the_ranks_comes_to_its_end() -> None:
    call = "import test_parallelizer as t; t.mpi_part()"
    assert run_program("-c", call, ranks=3, limit=60) == "[0, 1]\n"


def ends_unseen(how: str, stage: str, *, parallelizer: Par) -> None:
    if parallelizer.id == 1:
        if how == "exit":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    if stage == "computes":
        computes_for_a_minute()
    parallelizer.wait()


def dies_and_is_seen(how: str, stage: str) -> None:
    MPIParallelizer().run(ends_unseen, how, stage)


@pytest.mark.parametrize("how", ["exit", "kill"])
@pytest.mark.parametrize("stage", ["waits", "computes"])
def test_ranks_of_a_machine_see_each_other_die(how: str, stage: str) -> None:
    call = f"import test_parallelizer as t; t.dies_and_is_seen({how!r}, {stage!r})"
    begun = time.monotonic()
    code, _, err = finish("-c", call, ranks=3, options=["-disable-auto-cleanup"])
    assert code != 0
    # The launcher may end a job of which one rank is killed, whatever it has been told.
    told = f"WorkerDied: rank 1 on {internals._hostname()} (pid "
    assert told in err or (how == "kill" and "WorkerDied" not in err)
    assert time.monotonic() - begun < 20


def is_stopped_amid_broadcasts(*, parallelizer: Par) -> None:
    if parallelizer.id == 1:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGSTOP]).start()
    while True:
        parallelizer.broadcast(np.ones(4 * MIB) if parallelizer.on_main else None)


def broadcasts_to_one_that_stops() -> None:
    MPIParallelizer(timeout=1).run(is_stopped_amid_broadcasts)


def test_a_timeout_ends_a_transfer_under_mpi() -> None:
    """Or the round before it: which of them it meets is chance."""
    call = "import test_parallelizer as t; t.broadcasts_to_one_that_stops()"
    code, _, err = finish("-c", call, ranks=2)
    assert code != 0
    assert "WaitTimeout: rank 0 waited 1 s in broadcast #" in err


# -- the end of an MPI job -----------------------------------------------------------------------


def tell_shortly(kind: type[BaseException], *_: object) -> None:
    """Stand in for the excepthooks of rich or sentry."""
    print("a hook tells of", kind.__name__, file=sys.stderr, flush=True)


def end_by(road: str) -> None:
    if road == "late excepthook":
        sys.excepthook = tell_shortly
    if road in ("raise", "late excepthook"):
        raise Odd(7, detail="seven")
    if road == "sys.exit":
        sys.exit(3)
    if road == "sys.exit(text)":
        sys.exit("a last word")
    if road == "raise SystemExit":
        raise SystemExit(3)
    if road == "exit":
        exit(3)
    exit_bound_early(3)


def prints_and_ends(road: str, culprits: list[int], others: str, *, parallelizer: Par) -> None:
    if parallelizer.id in culprits:
        end_by(road)
    if others == "compute":
        time.sleep(100)
    if others == "barrier":
        importlib.import_module("mpi4py.MPI").COMM_WORLD.Barrier()
    parallelizer.gather(0)


def print_lines(rank: int) -> None:
    for number in range(10):
        print(f"line {number} of rank {rank}")


def lines_of(ranks: int) -> list[str]:
    return sorted(f"line {number} of rank {rank}" for rank in range(ranks) for number in range(10))


def mpi_end(road: str, culprits: list[int], place: str, others: str) -> None:
    if others == "own stdout":
        # Nothing makes that line buffered.
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    par = MPIParallelizer()
    print_lines(par.id)
    par.print("a line of main", where="main")
    if place == "in run":
        par.run(prints_and_ends, road, culprits, others)
    else:
        prints_and_ends(road, culprits, others, parallelizer=par)


# What else than `sys.exit` sets a status is known from Python 3.12 on.
ROADS = ["raise", "sys.exit", "sys.exit(text)"]
if sys.version_info >= (3, 12):
    ROADS += ["late excepthook", "raise SystemExit", "exit", "exit bound early"]
ENDS = [(road, [1], "outside", "barrier") for road in ROADS]
for road in ("raise", ROADS[-2]):
    ENDS += [
        (road, [0], "in run", "compute"),
        (road, [1], "in run", "own stdout"),
        (road, [0], "outside", "compute"),
        (road, [1], "outside", "own stdout"),
    ]
if sys.version_info >= (3, 12):
    for road in ("raise", "sys.exit(text)", "late excepthook"):
        ENDS += [(road, [0, 1, 2], "outside", "gather"), (road, [1], "in run", "gather")]


@pytest.mark.parametrize(("road", "culprits", "place", "others"), ENDS)
def test_the_end_of_an_mpi_job_has_a_status_one_word_and_all_lines(
    road: str, culprits: list[int], place: str, others: str
) -> None:
    call = f"import test_parallelizer as t; t.mpi_end({road!r}, {culprits}, {place!r}, {others!r})"
    code, out, err = finish("-c", call, ranks=3, limit=60, PYTHONUNBUFFERED="")
    assert code == (1 if road in ("raise", "late excepthook", "sys.exit(text)") else 3), err
    assert sorted(out.splitlines()) == ["a line of main", *lines_of(3)]
    assert err.count("Traceback (most recent call last)") == (road == "raise"), err
    assert err.count("a hook tells of Odd") == (road == "late excepthook"), err
    assert err.count("a last word") == (road == "sys.exit(text)"), err


class Unusable:
    """A stdout that fails in a way of its own."""

    def write(self, _: str) -> None:
        raise RuntimeError

    flush = write


def mpi_without_stdout(kind: str, fault: str) -> None:
    if kind == "a full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout.write("does not fit in")
    elif kind == "closed":
        sys.stdout.close()
    else:
        sys.stdout = None if kind == "none" else Unusable()
    par = MPIParallelizer()
    if par.id == 1:
        go_wrong(fault, par)
    par.gather(0)


@pytest.mark.parametrize("fault", ["raise", "sys.exit"])
@pytest.mark.parametrize("kind", ["a full disk", "closed", "none", "of the user's own"])
def test_an_unusable_stdout_does_not_keep_up_the_end_of_an_mpi_job(kind: str, fault: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_without_stdout({kind!r}, {fault!r})"
    code, _, err = finish("-c", call, ranks=3, limit=60, PYTHONUNBUFFERED="")
    assert code == (1 if fault == "raise" else 3), err
    told = "Odd: odd 7" if fault == "raise" else "### rank 1 ended its program with status 3"
    assert err.count(told) == 1, err


def mpi_end_before(road: str) -> None:
    """One rank does not get to its MPIParallelizer, where the others wait."""
    rank = importlib.import_module("mpi4py.MPI").COMM_WORLD.rank
    print_lines(rank)
    if rank == 1:
        end_by(road)
    MPIParallelizer()


@pytest.mark.parametrize(
    ("road", "first"), [("raise", "from mpi4py import MPI; "), *((road, "") for road in ROADS)]
)
def test_an_end_before_the_first_mpi_parallelizer_ends_the_job(road: str, first: str) -> None:
    call = f"{first}import test_parallelizer as t; t.mpi_end_before({road!r})"
    code, out, err = finish("-c", call, ranks=3, limit=60, PYTHONUNBUFFERED="")
    assert code == (1 if road in ("raise", "late excepthook", "sys.exit(text)") else 3), err
    assert sorted(out.splitlines()) == lines_of(3)
    assert err.count("Traceback (most recent call last)") == (road == "raise"), err


def mpi_abort(stage: str) -> None:
    """Rank 1 ends the job itself, instead of this module, when an exception has ended a run."""
    abort = functools.partial(importlib.import_module("mpi4py.MPI").COMM_WORLD.Abort, 7)
    par = MPIParallelizer()
    if stage == "excepthook" and par.id == 1:
        sys.excepthook = lambda *_: abort()
    try:
        par.run(faulty, "raise", [1], "gather")
    except Odd:
        if stage == "excepthook":
            raise
        if par.id == 1:
            abort()
        par.wait()


@pytest.mark.parametrize("stage", ["handler", "excepthook"])
def test_an_abort_by_the_program_comes_first(stage: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_abort({stage!r})"
    code, _, err = finish("-c", call, ranks=3, limit=60)
    assert code == 7, err
    assert "Traceback" not in err


def mpi_finalize(how: str) -> None:
    mpi = importlib.import_module("mpi4py.MPI")
    par = MPIParallelizer()
    main = par.on_main
    assert par.run(maps_with, abs, 100) == ([*range(100)] if main else par.InWorkerProcess)
    if how == "at exit":
        importlib.import_module("atexit").register(mpi.Finalize)
    else:
        time.sleep(par.id / 4)
        mpi.Finalize()
        for call in (par.wait, functools.partial(par.run, ranks), par.serve):
            with pytest.raises(ContractError, match=r"has been freed, by .* or by MPI.Finalize"):
                call()
        with pytest.raises(ParallelizerError, match="MPI has been finalized"):
            MPIParallelizer()
    print_on_main("well", par)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("how", ["by the program", "at exit"])
def test_a_program_may_finalize_mpi_itself(how: str) -> None:
    call = f"import test_parallelizer as t; t.mpi_finalize({how!r})"
    assert run_program("-c", call, ranks=3, limit=60) == "well\n"


def mpi_uninitialized() -> None:
    importlib.import_module("mpi4py").rc.initialize = False
    with pytest.raises(ParallelizerError, match=r"MPI is not initialized.*MPI.Init\(\)"):
        MPIParallelizer()
    mpi = importlib.import_module("mpi4py.MPI")
    mpi.Init()
    par = MPIParallelizer()
    print_on_main(par.run(ranks), par)
    mpi.Finalize()  # which is the program's then, too


def test_mpi_that_is_not_initialized_is_told() -> None:
    call = "import test_parallelizer as t; t.mpi_uninitialized()"
    assert run_program("-c", call, ranks=2, limit=60) == "[0, 1]\n"


def mpi_other_ends() -> None:
    """What is no end of the program has no status."""
    par = MPIParallelizer()
    if par.id == 1:
        with contextlib.suppress(SystemExit):
            sys.exit(3)
        thread = threading.Thread(target=sys.exit, args=(3,))
        thread.start()
        thread.join()
    time.sleep(2 if par.on_main else 0)
    print_on_main("well", par)


# As debuggers and profilers may: then hooks tell of the end, as they do before Python 3.12.
TAKE_ALL_MONITORS = """import sys
for tool in (3, 4, 5) if hasattr(sys, "monitoring") else ():
    sys.monitoring.use_tool_id(tool, "another")
"""


@pytest.mark.parametrize("first", ["", TAKE_ALL_MONITORS], ids=["monitors", "hooks"])
def test_an_exit_that_does_not_end_the_program_does_not_end_the_mpi_job(first: str) -> None:
    call = f"{first}import test_parallelizer as t; t.mpi_other_ends()"
    assert run_program("-c", call, ranks=2, limit=60) == "well\n"


def leaves_mail(*, parallelizer: Par) -> Any:
    """What nobody receives must not come to the next communicator."""
    right = (parallelizer.id + 1) % parallelizer.nprocs
    parallelizer.send(np.zeros(50_000), right)
    parallelizer.send("unread", right)
    return parallelizer.allgather(parallelizer.id)


def mpi_free(rounds: int) -> None:
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    par = MPIParallelizer()
    for number in range(rounds):
        comm = world.Dup()
        par = MPIParallelizer(comm)
        if number % 50 == 0:
            par.run(leaves_mail)
            for members in (None, [0, 1]):
                par.run(maps_with, abs, 10, comm=members)
            with pytest.raises(Odd):
                par.run(faulty, "raise", [1], "gather")
        assert par.run(ranks) == ([0, 1, 2] if par.on_main else par.InWorkerProcess)
        comm.Free()
    for call in (par.wait, functools.partial(par.run, ranks)):
        with pytest.raises(ContractError, match="has been freed"):
            call()
    print_on_main("well", MPIParallelizer())


def mpi_no_intracomm() -> None:
    mpi = importlib.import_module("mpi4py.MPI")
    world = mpi.COMM_WORLD
    main_alone = world.rank == 0
    half = world.Split(main_alone)
    inter = half.Create_intercomm(0, world, int(main_alone))
    none = world.Split(0 if main_alone else mpi.UNDEFINED)
    wrong = [inter, mpi.COMM_NULL, world.rank, *([] if main_alone else [none])]
    for comm, name in zip(wrong, ["a Intercomm", "COMM_NULL", "a int", "COMM_NULL"]):  # noqa: B905
        with pytest.raises(TypeError, match=f"has this rank, but got {name}: "):
            MPIParallelizer(comm)
    for comm in (inter.Merge(), world.Create_cart([3])):
        assert len(MPIParallelizer(comm).run(everyone_s_id)) == 3
    print_on_main("well", MPIParallelizer())


def everyone_s_id(*, parallelizer: Par) -> Any:
    return parallelizer.allgather(parallelizer.id)


def test_only_a_communicator_with_this_rank_is_taken() -> None:
    call = "import test_parallelizer as t; t.mpi_no_intracomm()"
    assert run_program("-c", call, ranks=3, limit=60) == "well\n"


@pytest.mark.timeout(200)
def test_free_of_a_communicator_frees_what_was_made_for_it() -> None:
    call = "import test_parallelizer as t; t.mpi_free(1030)"  # MPICH has 2048
    assert run_program("-c", call, ranks=3, limit=180) == "well\n"


def mpi_free_alone() -> None:
    comm = importlib.import_module("mpi4py.MPI").COMM_WORLD.Dup()
    par = MPIParallelizer(comm)
    if par.on_main:
        comm.Free()


def test_free_on_one_rank_alone_is_told() -> None:
    call = "import test_parallelizer as t; t.mpi_free_alone()"
    code, _, err = finish("-c", call, ranks=2, limit=60)
    assert code == 1
    told = "rank 1 ended its program while rank 0 waits in Free of its communicator"
    assert err.count(told) == 1, err


# -- what is left over ---------------------------------------------------------------------------


def streams_once_more(ordered: bool, *, parallelizer: Par) -> Any:
    imap = parallelizer.imap if ordered else parallelizer.imap_unordered
    stream = imap(square, itertools.count(1000) if parallelizer.on_main else None)
    first = next(stream, None)
    if parallelizer.on_main:
        stream.close()
    return first is not None, sorted(imap(square, range(100)))


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_gets_nothing_of_one_that_was_left_early(p: Par, ordered: bool) -> None:
    expect(p, p.run(streams_once_more, ordered), (True, [x * x for x in range(100)]))


def lingers(x: int) -> int:
    time.sleep(0.01)
    return x


def test_a_timeout_is_not_for_workers_that_main_leaves_without_items() -> None:
    with MultiprocessingParallelizer(3, timeout=1) as par:
        par.run(ranks)
        stream = par.imap(lingers, range(100))
        found = [next(stream)]
        time.sleep(1.5)  # what main does with a result may take its time
        assert found + list(stream) == list(range(100))


class Slow:
    """Takes its time to be pickled."""

    def __reduce__(self) -> Any:
        time.sleep(0.4)
        return int, ()


def computes_after_a_slow_verb(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        parallelizer.receive(1)
        raise JobError("while rank 1 is in a verb", 1)
    parallelizer.send("ready", 0)
    parallelizer.send(Slow(), 0)
    while True:
        pass


def goes_on_after_all(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        parallelizer.receive(1)
        raise JobError("while rank 1 computes", 1)
    parallelizer.send("ready", 0)
    with contextlib.suppress(BaseException):  # the end of the run, too
        time.sleep(100)
    parallelizer.send("one more", 0)
    while True:
        pass


@pytest.mark.parametrize("body", [computes_after_a_slow_verb, goes_on_after_all])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_news_that_come_within_a_verb_are_heard_at_its_end(
    method: str, body: Callable[..., None]
) -> None:
    with MultiprocessingParallelizer(2, start_method=method) as par:
        before = par.run(pids)
        with pytest.raises(JobError):
            par.run(body)
        assert par.run(pids) == before  # else it would have had to be killed


def nests_a_failing_pool(*, parallelizer: Par) -> Any:
    if not parallelizer.on_main:
        return parallelizer.send("for main alone", 0)
    time.sleep(0.2)
    inner = MultiprocessingParallelizer(3, start_method="fork")
    with pytest.raises(Odd):
        inner.run(faulty, "raise", [0], "compute")
    return [parallelizer.receive(rank) for rank in range(1, parallelizer.nprocs)]


def test_workers_of_an_inner_pool_take_nothing_from_the_outer_main() -> None:
    with MultiprocessingParallelizer(3, start_method="fork", timeout=10) as par:
        assert par.run(nests_a_failing_pool) == ["for main alone"] * 2


def floods(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        for _ in range(10_000):
            parallelizer.send(bytes(3000), 1)
    elif parallelizer.id == 1:
        time.sleep(3)


def test_who_sends_waits_for_who_does_not_receive() -> None:
    """Small messages do not pile up without end."""
    with MultiprocessingParallelizer(2, timeout=1) as par:
        par.run(ranks)
        with pytest.raises(WaitTimeout, match="send"):
            par.run(floods)


def test_a_handle_of_a_released_array_is_not_taken_for_another_one() -> None:
    with MultiprocessingParallelizer(2) as par:
        first = par.share(np.zeros(1000))
        handle, where = internals._dumps(first), open_descriptors()
        del first
        second = par.share(np.ones(1000))
        assert len(open_descriptors()) == len(where)  # it may lie in the place of the first
        with pytest.raises(ParallelizerError, match="released"):
            internals._loads(handle)
        assert internals._loads(internals._dumps(second)).sum() == 1000


def draws_of(seeds: list[np.random.SeedSequence], *, parallelizer: Par) -> Any:
    return [parallelizer.map(noise, range(3), seed=seed) for seed in seeds]


def test_seeds_that_were_spawned_draw_as_their_own_children_do(p: Par) -> None:
    seeds = np.random.SeedSequence(9).spawn(2)
    wanted = [
        [noise(x, rng=np.random.default_rng(child)) for x, child in enumerate(seed.spawn(3))]
        for seed in np.random.SeedSequence(9).spawn(2)
    ]
    expect(p, p.run(draws_of, seeds), wanted)


def nests_a_gather(nested: bool, *, parallelizer: Par) -> None:
    if nested or parallelizer.id == parallelizer.nprocs - 1:
        comm = [0, parallelizer.nprocs - 1]
        parallelizer.run(ranks, comm=comm)
    else:
        parallelizer.gather(0)


def disagrees_in_a_group(*, parallelizer: Par) -> None:
    parallelizer.run(gathers_on_main_alone, comm=[0, parallelizer.nprocs - 1])


def gathers_on_main_alone(*, parallelizer: Par) -> None:
    parallelizer.gather(0) if parallelizer.on_main else parallelizer.wait()


def test_a_disagreement_is_told_by_the_calls_of_its_own_run(p: Par) -> None:
    if p.nprocs > 1:
        p.run(nests_a_gather, True)
        text = expect_failure(p, ContractError, nests_a_gather, False)
        expect(p, "run(comm=...) #1" in text and "gather #1" in text, True)
        expect(p, "nested" in text, False)
        text = expect_failure(p, ContractError, disagrees_in_a_group)
        expect(p, "called wait #1 of a run nested 1 deep" in text, True)


def names_other_ranks(*, parallelizer: Par) -> None:
    last = parallelizer.nprocs - 1
    parallelizer.run(ranks, comm=[0, last] if parallelizer.id == last else [0])


def test_a_disagreement_about_the_members_of_a_group_is_told(p: Par) -> None:
    if p.nprocs > 1:
        text = expect_failure(p, ContractError, names_other_ranks)
        expect(p, "called run(comm=...) for [" in text, True)
        expect_to_work(p)


def leaves_a_message(*, parallelizer: Par) -> Any:
    for rank in range(parallelizer.nprocs):
        parallelizer.send("nobody receives this", rank)
    return parallelizer.allgather(0)


def counts_objects(*, parallelizer: Par) -> Any:
    gc.collect()
    return parallelizer.gather(len(gc.get_objects()))


def test_runs_leave_nothing_in_memory(p: Par) -> None:
    def grown(times: int) -> list[int]:
        before = p.run(counts_objects)
        for _ in range(times):
            p.run(leaves_a_message)
        after = p.run(counts_objects)
        return [new - old for new, old in zip(after, before, strict=True)] if p.on_main else []

    grown(10)
    expect(p, [growth for growth in grown(100) if growth > 50], [])


HELD: list[Any] = []


def fails_amid_a_gather(*, parallelizer: Par) -> None:
    large = np.zeros(3 * MIB)
    HELD[:] = [weakref.ref(large)]
    if parallelizer.on_main:
        time.sleep(0.2)
        raise JobError("amid a gather", 1)
    parallelizer.gather(large)


def holds(*, parallelizer: Par) -> Any:
    gc.collect()
    return parallelizer.gather([one() is not None for one in HELD])


def test_what_a_failed_run_has_held_is_let_go_of(p: Par) -> None:
    before = p.run(pids)
    assert isinstance(caught_from(p.run, fails_amid_a_gather), JobError)
    gc.collect()
    expect(p, [one() for one in HELD], [None])
    expect_to_work(p)
    expect(p, p.run(holds), [[False]] * p.nprocs)
    expect(p, p.run(pids), before)


def fails_on_the_last(*, parallelizer: Par) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        raise JobError("here", 1)
    parallelizer.wait()


def test_an_exception_has_a_remote_cause_only_where_it_comes_from_elsewhere(p: Par) -> None:
    cause = failure(p, fails_on_the_last).__cause__
    assert (cause is None) == (p.id == p.nprocs - 1), cause
    assert cause is None or isinstance(cause, RemoteTraceback)


def forks_and_computes() -> None:
    par = MultiprocessingParallelizer(3)
    par.__enter__()
    print("pids", *par.run(pids)[1:], flush=True)
    if os.fork():
        announce()
    time.sleep(100)


def test_workers_end_with_main_though_its_child_lives() -> None:
    with started("import test_parallelizer as t; t.forks_and_computes()") as program:
        workers = [int(pid) for pid in read_until(program, "ready")[0].split()[1:]]
        assert len(workers) == 2
        program.kill()
        wait_until(lambda: not any(map(alive, workers)))
        assert group_members(program.pid)  # the child, who lives


def forgets_what_it_got(*, parallelizer: Par) -> Any:
    buffers = []
    for _ in range(6):
        got = parallelizer.broadcast(np.zeros(MIB // 4) if parallelizer.on_main else None)
        buffers.append(weakref.ref(got if got.base is None else got.base))
        del got
    parallelizer.wait()
    return parallelizer.gather(sum(buffer() is not None for buffer in buffers))


def test_what_has_been_sent_or_received_is_let_go_of(p: Par) -> None:
    expect(p, [kept for kept in p.run(forgets_what_it_got) or [] if kept > 2], [])


SENT_LAST: list[Any] = []  # weak references


def sends_last(*, parallelizer: Par) -> None:
    """Nothing is sent afterwards that could take its place."""
    array = np.zeros(MIB // 4)
    SENT_LAST[:] = [weakref.ref(array)]
    if parallelizer.id == parallelizer.nprocs - 1:
        parallelizer.send(array, 0)
    if parallelizer.on_main:
        parallelizer.receive(parallelizer.nprocs - 1)


def counts_sent_last(*, parallelizer: Par) -> Any:
    return parallelizer.allreduce(sum(one() is not None for one in SENT_LAST))


def test_what_is_sent_last_in_a_run_is_let_go_of_at_its_end(p: Par) -> None:
    p.run(sends_last)
    expect(p, p.run(counts_sent_last), 0)


def late_or_wrong(x: int) -> int:
    rank = MPIParallelizer().id
    if rank == 1:
        time.sleep(0.1)
        raise JobError("while rank 2 computes", 1)
    time.sleep(2.5 if rank == 2 and not LATE else 0.01)
    LATE.append(x)
    return x


LATE: list[int] = []


def takes_a_while(x: int) -> int:
    time.sleep(0.2)
    return x


def mpi_tickets() -> None:
    """Rank 2 goes on to map in a run that has failed, while the others map in the next."""
    par = MPIParallelizer()
    with pytest.raises(JobError):
        par.run(maps_with, late_or_wrong, 60)
    print_on_main(par.run(maps_with, takes_a_while, 20) == list(range(20)), par)


def maps_with(func: Callable[..., Any], count: int, *, parallelizer: Par) -> Any:
    return parallelizer.map(func, range(count), chunksize=1)


@pytest.mark.timeout(100)
def test_who_is_late_takes_no_items_of_the_next_run() -> None:
    call = "import test_parallelizer as t; t.mpi_tickets()"
    assert run_program("-c", call, ranks=3, limit=60) == "True\n"


def test_the_others_that_failed_are_noted(p: Par, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallelizer._SETTLING", 5)  # main goes on once all have failed
    error = failure(p, talks_to_nobody, "send", 99)
    told = [f"rank {rank} failed too: ValueError" for rank in range(1, p.nprocs)]
    notes = getattr(error, "__notes__", [])
    expect(p, [note[: len(start)] for note, start in zip(notes, told, strict=False)], told)


def test_more_chunks_are_asked_for_than_there_are_tickets(p: Par) -> None:
    expect(p, p.run(maps_with, square, 40_000), [x * x for x in range(40_000)])


def test_the_order_of_comm_does_not_matter(p: Par) -> None:
    found = p.run(process_ids, comm=list(reversed(range(p.nprocs))))
    expect(p, found, p.run(process_ids))


def goes_on_after_an_interrupt(*, parallelizer: Par) -> None:
    if parallelizer.on_main:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            parallelizer.receive(1)
        signal.signal(signal.SIGALRM, before)
    else:
        time.sleep(0.5)
    parallelizer.gather(0)


def test_no_verb_goes_on_after_one_that_was_interrupted() -> None:
    with MultiprocessingParallelizer(2) as par:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):  # the next verb raises it again
                par.run(goes_on_after_an_interrupt)


def forks_and_runs() -> None:
    with MultiprocessingParallelizer(3) as par:
        par.run(ranks)
        child = os.fork()
        if not child:
            os._exit(par.run(ranks) != [0, 1, 2])
        assert os.waitpid(child, 0)[1] == 0
        assert par.run(ranks) == [0, 1, 2]


def test_a_forked_child_runs_on_a_pool_of_its_own() -> None:
    run_program("-c", "import test_parallelizer as t; t.forks_and_runs()", limit=20)


def test_the_environment_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = held_variables()
    make = functools.partial(MultiprocessingParallelizer, 2, start_method="spawn")
    assert make(threads_per_process=1).run(ranks) == [0, 1]
    assert held_variables() == before
    with make(threads_per_process=2):
        os.environ["OMP_NUM_THREADS"] = "4"  # while there is a limit
        assert make(threads_per_process=1).run(ranks) == [0, 1]
        assert os.environ["OMP_NUM_THREADS"] == "4"
    assert held_variables() == before | {"OMP_NUM_THREADS": "4"}


# -- soak: seeded disorder -----------------------------------------------------------------------

SOAK_SECONDS = float(os.environ.get("PARALLELIZER_SOAK_SECONDS", "8"))


def soak_step(seed: int, faults: bool, parallelizer: Par) -> list[Any]:
    """Random verbs on random data, the same choices on every process; a digest of the results."""
    rng = np.random.default_rng(seed)
    digests: list[Any] = []
    for _ in range(rng.integers(1, 8)):
        fault = str(rng.choice(["raise", "SIGKILL", "os._exit", "sys.exit"]))
        culprit = int(rng.integers(1000)) % parallelizer.nprocs
        if rng.random() < 0.08 and faults and 0 < culprit == parallelizer.id:
            go_wrong(fault, parallelizer)
        verb = str(rng.choice(["broadcast", "blocks", "map", "allreduce"]))
        length = int(rng.choice([0, 1, 7, 1000, 131_071, 131_073, 400_000]))
        dtype = str(rng.choice(["f8", "i4", "c16", "U3", "M8[s]", "?"]))
        data = rng.integers(0, 100, length).astype("i8").astype(dtype)
        if verb == "broadcast":
            digests.append(parallelizer.broadcast(data).tobytes()[:99])
        elif verb == "blocks":
            whole = parallelizer.allgather(parallelizer.scatter(data))
            digests.append((whole.dtype.str, whole.tobytes()[-99:]))
        elif verb == "map":
            values = parallelizer.map(str, data[:300])
            digests.append(parallelizer.broadcast(values))
        else:
            digests.append(parallelizer.allreduce(seed, max))
    return digests


@pytest.mark.timeout(SOAK_SECONDS + 100)
def test_soak() -> None:
    """PARALLELIZER_SOAK_SECONDS=600 for a long one; the seed of a failure is in its message."""
    end = time.monotonic() + SOAK_SECONDS
    seed = int(os.environ.get("PARALLELIZER_SOAK_SEED", "0"))
    outcomes: collections.Counter[str] = collections.Counter()
    while time.monotonic() < end:
        rng = np.random.default_rng(seed)
        method, nprocs = str(rng.choice(MULTIPROCESSING)), int(rng.integers(2, 6))
        with MultiprocessingParallelizer(nprocs, start_method=method, timeout=20) as par:
            for _ in range(20):
                seed += 1
                wanted = SerialNonParallelizer().run(soak_step, seed, False)
                try:
                    found = par.run(soak_step, seed, True)
                except (Odd, SystemExit, WorkerDied) as error:
                    outcomes[type(error).__name__] += 1
                else:
                    outcomes["agreed"] += 1
                    assert found == wanted, f"seed {seed}, {method}, {nprocs} processes"
    print(f"soak: seeds up to {seed}: {dict(outcomes)}")
    assert outcomes["agreed"] > 0


def computes_for_a_minute(minutes: float = 1) -> None:
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline:
        pass


def leaves_an_outer_run(how: str, began: Path, *, parallelizer: Par) -> None:
    if not parallelizer.on_main:
        if how == "unwinds":
            raise ValueError("of the inner run")
        computes_for_a_minute()
    if how != "unwinds":
        began.touch()
    if how == "computes":
        computes_for_a_minute()
    try:
        parallelizer.gather(0)
    finally:
        if how == "unwinds":
            with contextlib.suppress(internals.RunEnded):  # of the inner run, once more
                computes_for_a_minute(1 / 30)
            began.touch()
            computes_for_a_minute()


def has_a_pool_of_its_own(where: int, how: str, folder: Path, *, parallelizer: Par) -> None:
    if parallelizer.id != where:
        wait_until((folder / "began").exists, 60)
        raise KeyError("of the outer run")
    with MultiprocessingParallelizer(2) as inner:
        inner.run(ranks)
        with contextlib.suppress(Exception):
            inner.run(leaves_an_outer_run, how, folder / "began")
        (folder / "went on").touch()


@pytest.mark.parametrize("how", ["computes", "waits", "unwinds"])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("method", MULTIPROCESSING)
def test_the_end_of_an_outer_run_passes_through_an_inner_pool(
    method: str, where: int, how: str, tmp_path: Path
) -> None:
    with MultiprocessingParallelizer(2, start_method=method) as par:
        before = par.run(pids)
        with pytest.raises(KeyError, match="of the outer run"):
            par.run(has_a_pool_of_its_own, where, how, tmp_path)
        assert not (tmp_path / "went on").exists()
        assert par.run(pids) == before  # else it would have had to be killed


def gathers_in_the_outer(other: str, outer: Par, *, parallelizer: Par) -> None:
    """Main does; and the other rank does what this says."""
    outer.send(None, 2)
    if other == "receives" and not parallelizer.on_main:
        parallelizer.receive(0)
    if other == "raises" and not parallelizer.on_main:
        raise ValueError("of the inner run")
    try:
        if parallelizer.on_main or other in ("too", "raises then"):
            outer.gather(0)
    finally:
        if other == "raises then" and not parallelizer.on_main:
            raise ValueError("of the inner run")
    parallelizer.gather(0)


def has_an_inner_run_of_two(inner: Par | None, other: str, *, parallelizer: Par) -> None:
    if inner is None:
        parallelizer.receive(0), parallelizer.receive(1)  # when the inner run has begun
        raise KeyError("of the outer run")
    with contextlib.suppress(Exception):
        inner.run(gathers_in_the_outer, other, parallelizer)
    # Who has raised for itself need not have heard of it yet.
    if parallelizer.on_main or not other.startswith("raises"):
        print("went on", flush=True)


def mpi_outer_end() -> None:
    mpi: Any = importlib.import_module("mpi4py.MPI")
    world = MPIParallelizer()
    part = mpi.COMM_WORLD.Split(0 if world.id < 2 else mpi.UNDEFINED)
    inner = MPIParallelizer(comm=part) if world.id < 2 else None
    for other in ("gathers in the inner", "too", "receives", "raises", "raises then"):
        with pytest.raises(KeyError, match="of the outer run"):
            world.run(has_an_inner_run_of_two, inner, other)
    if isinstance(all_ranks := world.run(ranks), list):
        print(all_ranks)


def test_the_end_of_an_outer_run_passes_through_a_run_of_some_mpi_ranks() -> None:
    out = run_program("-c", "import test_parallelizer as t; t.mpi_outer_end()", ranks=3)
    assert out == "[0, 1, 2]\n"


def fails_while_main_computes(*, parallelizer: Any) -> None:
    if not parallelizer.on_main:
        raise KeyError("of a worker")
    computes_for_a_minute()


def crossed_handlers() -> None:
    """Two copies of the module, and handlers of the user's below and above theirs."""
    spec = importlib.util.spec_from_file_location("vendored", HERE / "parallelizer.py")
    assert spec is not None
    assert spec.loader is not None
    vendored = sys.modules["vendored"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vendored)
    heard: list[str] = []

    def chained(number: int, frame: Any) -> None:
        heard.append("above")
        before(number, frame)

    signal.signal(signal.SIGURG, lambda *_: heard.append("below"))
    with contextlib.ExitStack() as stack:
        kinds = (MultiprocessingParallelizer, vendored.MultiprocessingParallelizer)
        pools = [stack.enter_context(kind(2)) for kind in kinds]
        before: Any = signal.signal(signal.SIGURG, chained)
        pools += [stack.enter_context(kind(2)) for kind in kinds]
        for pool in pools:
            heard.clear()
            with pytest.raises(KeyError, match="of a worker"):
                pool.run(fails_while_main_computes)
            assert heard == ["below", "above"] * (len(heard) // 2) != []
            pool.run(ranks)
        with MultiprocessingParallelizer(2) as inner:  # above what comes meanwhile, and gone again
            signal.signal(signal.SIGURG, own := lambda *_: heard.append("meanwhile"))
            with MultiprocessingParallelizer(2):
                assert signal.getsignal(signal.SIGURG) is not own
            assert signal.getsignal(signal.SIGURG) is own
            signal.signal(signal.SIGURG, chained)
            inner.run(ranks)
    assert signal.getsignal(signal.SIGURG) is chained


def test_handlers_that_call_each_other_end_a_run_once() -> None:
    run_program("-c", "import test_parallelizer as t; t.crossed_handlers()")


# ---------------------------------------------------------------------------------------------
# Programs: MPI, the examples, the command line


def run_program(
    *argv: str, ranks: int | None = None, limit: float = 100, cwd: Path = HERE, **env: str
) -> str:
    """Run Python with `argv`, on `ranks` MPI ranks if given; its stdout, after a good end."""
    code, out, err = finish(*argv, ranks=ranks, limit=limit, cwd=cwd, **env)
    assert code == 0, f"{argv} ended with {code}\n{out[-20000:]}\n{err[-20000:]}"
    assert ranks or not err, f"{argv} wrote to stderr:\n{err[-20000:]}"  # an MPI may warn there
    return out


def finish(
    *argv: str,
    ranks: int | None = None,
    options: Sequence[str] = (),
    limit: float = 100,
    cwd: Path = HERE,
    **env: str,
) -> tuple[int, str, str]:
    """Run Python with `argv` to its end, or kill its whole process group at the `limit`."""
    command = [*(mpiexec(ranks) if ranks else []), *options, sys.executable, *argv]
    return finish_command(command, limit=limit, cwd=cwd, **env)


def start_command(command: Sequence[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(HERE)} | MPI_SETTINGS | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish_command(
    command: Sequence[str], *, limit: float = 100, cwd: Path = HERE, **env: str
) -> tuple[int, str, str]:
    """Run a command to its end, or kill its whole process group at the `limit`."""
    process = start_command(command, cwd, **env)
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # mpiexec passes it on to its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{command} did not end in {limit} s\n{out[-20000:]}\n{err[-20000:]}")
    return process.returncode, out, err


# Open MPI as root, with more ranks than CPUs; others ignore these.
MPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    # Of MPICH, which otherwise looks a thousand times before it leaves the CPU to another rank.
    "MPIR_CVAR_POLLS_BEFORE_YIELD": "1",
    "OMP_NUM_THREADS": "1",
}


def mpiexec(ranks: int) -> list[str]:
    """Find the launcher that belongs to this interpreter's mpi4py: beside it, else on the path."""
    beside = str(Path(sys.executable).parent)
    launcher = shutil.which("mpiexec", path=beside) or shutil.which("mpiexec")
    if launcher is None or importlib.util.find_spec("mpi4py") is None:
        pytest.fail("these tests need mpi4py and mpiexec: run `pip install .[test]`")
    return [launcher, "-n", str(ranks)]


# What does not depend on the number of ranks, if there are at least two: how things are packed, and
# moved in pieces; how long a rank waits, what it holds meanwhile, and what it refuses by itself.
ON_TWO_RANKS = (
    "(arrays_arrive or bits_do_not_depend or subclasses_of_arrays or exception_arrives or "
    "exception_comes or exception_that_is or exception_may_be or ecosystem or rows_that_are or "
    "stays_behind or a_child_that_is or sizes or large_results or more_than_numbers or "
    "who_waits or idle_workers or nothing_to_do or is_heard_between or who_is_late or in_memory or "
    "no_memory or let_go_of or with_the_settings or connections_of or memmaps or bad_)"
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_contract_under_mpi(ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    chosen = "on_mpi and " + "not " * (ranks != 2) + ON_TWO_RANKS
    argv = [sys.executable, str(Path(__file__)), str(folder), "-k", chosen]
    env = {"PARALLELIZER_TEST_ENGINE": "mpi", "PARALLELIZER_TEST_PROGRAM": ""}
    code, *told = finish_command([*mpiexec(ranks), *argv], cwd=HERE, limit=800, **env)
    texts = [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]
    tails = "\n".join(text[-8000:] for text in texts if " failed" in text or code)
    assert code == 0, f"mpiexec ended with {code}\n{tails}\n{told}"
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    assert [report["nprocs"] for report in reports] == [ranks] * ranks
    collected = reports[0]["collected"]
    assert len(collected) > 100
    for report in reports:
        assert report["collected"] == report["passed"] == collected


class Tally:
    """A pytest plugin that counts, so that the outer test can prove that the inner ones ran."""

    def __init__(self) -> None:
        self.collected: list[str] = []
        self.passed: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def run_as_rank(folder: Path, *options: str) -> int:
    """Run the contract's tests as one rank of `mpiexec`; output and counts go to `folder`."""
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    with (folder / f"rank-{world.rank}.txt").open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if world.size > 3:
        internals._MOST_BY_ALLGATHER = 2  # or that of many ranks would never be tried
    tally = Tally()
    argv = [
        __file__,
        "-k",
        "on_mpi",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        f"--basetemp={folder}/rank-{world.rank}",  # all clean up in the common one at once
        *(["-v"] if os.environ.get("VV") else ["-q"]),
        *options,
    ]
    code = int(pytest.main(argv, plugins=[tally]))
    report = {"nprocs": world.size, **vars(tally)}
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(report))
    return code


EXAMPLES = ["quickstart", "mapping", "sample_program", "client_server", "hessian", "imbalance"]


def example(name: str, backend: str) -> list[str]:
    """Run an example on four processes; its lines of output."""
    argv = [str(HERE / "examples" / f"{name}.py"), "--backend", backend]
    argv += ["--nprocs", "4"] if backend == "multiprocessing" else []
    argv += ["--cells", "3"] if name == "hessian" else []
    return run_program(*argv, ranks=4 if backend == "mpi" else None).splitlines()


def results_of(lines: Sequence[str]) -> list[str]:
    """Leave out the lines that name the backend or tell times."""
    return [line for line in lines if not re.search(r"Running with|speed-up", line)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_give_the_same_numbers_on_every_backend(name: str) -> None:
    outputs = {mode: example(name, mode) for mode in ("serial", "multiprocessing", "mpi")}
    if name == "quickstart":
        assert outputs["serial"] == ["[1000]"]
        assert outputs["multiprocessing"] == outputs["mpi"] == ["[250, 250, 250, 250]"]
        return
    if name == "sample_program":
        assert "Running with SerialNonParallelizer(id=0, nprocs=1)" in outputs["serial"]
        closed = "Running with MultiprocessingParallelizer(id=None, nprocs=None)"
        assert closed in outputs["multiprocessing"]
    assert results_of(outputs["serial"])
    assert results_of(outputs["multiprocessing"]) == results_of(outputs["serial"])
    assert results_of(outputs["mpi"]) == results_of(outputs["serial"])


@pytest.mark.parametrize("name", ["hessian", "imbalance"])
def test_an_example_ends_in_a_picture(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    argv = ["--backend", "multiprocessing", "--nprocs", "2", "--plot", str(picture)]
    argv += ["--cells", "2"] if name == "hessian" else []
    run_program(str(HERE / "examples" / f"{name}.py"), *argv, MPLBACKEND="Agg")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(200)
def test_the_benchmark_measures_what_it_checks(tmp_path: Path) -> None:
    argv = [str(HERE / "examples" / "benchmark.py"), "--quick"]
    code, told, err = finish(*argv, "--rows", "map", "broadcast", limit=150)
    assert code == 0, err
    for row in ["map of trivial items", "the array to every process"]:
        assert re.search(rf"\| {row} +\| \d\S* +\| \d", told), told  # ours, and a peer's
    picture = tmp_path / "benchmark.png"
    code, told, err = finish(*argv, "--verbs", "--plot", str(picture), limit=150)
    assert code == 0, err
    for verb, size in [("broadcast", "8 B"), ("round trip", "128 KiB")]:
        assert re.search(rf"\| {verb} +\| {size} +\| \d\S* +\| \d", told), told
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = run_program(*argv, "--mpi", ranks=3)
    assert re.search(r"\| round trip +\| 8 B +\| \d\S* +\| \d", told), told


@pytest.mark.timeout(200)
def test_the_benchmark_measures_growth() -> None:
    argv = [str(HERE / "examples" / "benchmark.py"), "--quick", "--growth"]
    code, told, err = finish(*argv, limit=180)
    assert code == 0, err
    for verb in ["wait", "run", "map", "broadcast, 1 MiB", "allreduce, 8 B"]:
        for engine in ["processes", "MPI"]:
            assert re.search(rf"\| {verb} +\| {engine} +\| \d\S* +\| \d", told), told


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("argv", "ranks"), [(["self-test"], None), ([], 4)])
def test_self_test(argv: list[str], ranks: int | None) -> None:
    table = run_program("-m", MODULE, *argv, ranks=ranks, limit=180)
    for word in ["Python", "numpy", "mpi4py", np.__version__]:
        assert word in table


@pytest.mark.parametrize("nprocs", [1, 2, 5])
def test_a_backend_of_ones_own(nprocs: int) -> None:
    argv = ["self-test", "--backend", "threads_backend:ThreadParallelizer", "--nprocs", str(nprocs)]
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    told = run_program("-m", "parallelizer", *argv, PYTHONPATH=folders)
    assert re.search(rf" {nprocs} on \S+ .* 5 checks passed\n", told)


BROKEN_BACKEND = """
import parallelizer

class Broken(parallelizer.SerialNonParallelizer):
    def __init__(self, nprocs):
        super().__init__()

    def allgather(self, data, **options):
        return []
"""


def test_the_self_test_tells_what_has_failed(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN_BACKEND)
    folders = os.pathsep.join([str(HERE), str(tmp_path)])
    argv = ["-m", "parallelizer", "--backend", "broken:Broken"]
    code, out, err = finish(*argv, PYTHONPATH=folders)
    assert code == 1
    assert re.fullmatch(r"broken:Broken +1 on .* FAILED\n", out)
    assert "_contract must raise None, but raised Traceback" in err


@pytest.mark.parametrize("argv", [["package/copied.py"], ["-m", "package.copied"]])
def test_a_copy_checks_itself_in_place(argv: list[str], tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    source = Path(str(sys.modules[MODULE].__file__)).read_text()
    marked = re.sub("^__version__ = .*", "__version__ = 'of a copy'", source, flags=re.MULTILINE)
    (tmp_path / "package" / "copied.py").write_text(marked)
    table = run_program(*argv, cwd=tmp_path, PYTHONPATH="", OMP_NUM_THREADS="1")
    assert table.startswith("parallelizer of a copy, Python")
    engines = ["serial", *(f"multiprocessing, {method}" for method in MULTIPROCESSING), "mpi"]
    for name in engines:
        assert re.search(rf"^{name} .* 5 checks passed$", table, re.MULTILINE), table


def test_the_self_test_says_what_it_takes() -> None:
    code, _, err = finish("-m", "parallelizer", "--backend", "serial")
    assert code == 2
    assert "--backend serial is neither PACKAGE.MODULE:CLASS nor mpi" in err


def test_docstrings_show_what_happens() -> None:
    path = str(sys.modules[MODULE].__file__)
    assert run_program("-m", "doctest", path, OMP_NUM_THREADS="1") == ""
    public = [getattr(Parallelizer, name) for name in vars(Parallelizer) if name[0] != "_"]
    undocumented = [f"{one}" for one in public if not (one.__doc__ or "").strip()]
    assert not undocumented


README = (HERE / "README.md").read_text()
BLOCKS_OF_README = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS_OF_README)))
def test_the_code_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BLOCKS_OF_README[number])
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    assert run_program(str(script), cwd=tmp_path, PYTHONPATH=folders)
    if re.search(r'MPI|"auto"|from_arguments', script.read_text()):
        assert run_program(str(script), ranks=3, cwd=tmp_path)


HEADINGS_AND_BLOCKS = re.compile(
    r"^#+ (?P<heading>[^\n]+)$|^```\w+\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def blocks_under(heading: str) -> list[str]:
    """Find the blocks of code, in any language, under a heading of README."""
    blocks, current = [], ""
    for match in HEADINGS_AND_BLOCKS.finditer(README):
        current = match["heading"] or current
        if current == heading and match["code"]:
            blocks.append(match["code"])
    assert blocks, f"README has no code under {heading!r}"
    return blocks


def test_an_error_of_a_rank_hangs_mpi4py_and_ends_our_job(tmp_path: Path) -> None:
    script, session = blocks_under("What happens when one rank fails")
    (tmp_path / "demo.py").write_text(script)
    code, out, err = finish("demo.py", ranks=4, cwd=tmp_path)
    assert (code, out) == (1, "")
    told = [line for line in session.splitlines() if "Error" in line or "Traceback" in line]
    assert len(told) == 2
    assert all(err.count(line) == 1 for line in told), err
    assert err.startswith("### rank 2 of 4")

    command = [*mpiexec(4), sys.executable, "demo.py", "mpi4py"]
    with start_command(command, tmp_path) as program:
        try:
            assert program.stderr is not None
            assert any(told[-1] in line for line in program.stderr)
            with pytest.raises(subprocess.TimeoutExpired):
                program.wait(timeout=3)
        finally:
            os.killpg(program.pid, signal.SIGTERM)  # mpiexec passes it on to its ranks
        program.communicate(timeout=20)
    wait_until(lambda: not group_members(program.pid))


def rows_for_users_of(library: str) -> list[tuple[str, str]]:
    """Read a table of README: what is written with a library, and what stands for it here."""
    _, found, rest = README.partition(f"\n| {library} | parallelizer |\n| --- | --- |\n")
    assert found, f"README has no table for {library}"
    rows = [re.findall("`(.+?)`", row) for row in rest.partition("\n\n")[0].splitlines()]
    return [(theirs, ours) for theirs, ours in rows]


def value_of(code: str, names: dict[str, Any]) -> Any:
    """Evaluate an expression, or execute statements and take what they have assigned to ``y``."""
    names = dict(names)
    try:
        found = eval(code, names)
    except SyntaxError:
        exec(code, names)
        found = names.get("y")
    return None if found is Parallelizer.InWorkerProcess else found


def set_factor(factor: int) -> None:
    os.environ["FACTOR"] = str(factor)


def scales_and_tells_threads(x: int) -> tuple[int, str]:
    return int(os.environ.get("FACTOR", "1")) * x, os.environ["OMP_NUM_THREADS"]


def adds_sum(x: int, y: Any) -> int:
    return x + int(np.sum(y))


def compute_rows_of_mpi4py(by_us: bool, *, parallelizer: Par) -> None:
    """Print a line for each row of the table: the values on all ranks."""
    rank, size = parallelizer.id, parallelizer.nprocs
    names = {
        "p": parallelizer, "np": np, "x": rank + 1, "xs": [10 * rank + n for n in range(size)],
        "a": np.arange(10) * 1.5, "f": scales_and_tells_threads,
        "counts": [len(block_of(range(10), n, size)) for n in range(size)],
    }  # fmt: skip
    if not by_us:
        names["MPI"] = importlib.import_module("mpi4py.MPI")
        names["comm"] = names["MPI"].COMM_WORLD
    for row in rows_for_users_of("mpi4py"):
        if by_us or "MPIPoolExecutor" not in row[0]:
            everywhere = parallelizer.allgather([value_of(row[by_us], names)], concatenate=False)
            parallelizer.print([value for (value,) in everywhere], where="main")


def compute_row_of_mpi4py_futures() -> None:
    """Print what the last row of the table gives on main, under ``-m mpi4py.futures``."""
    rows = rows_for_users_of("mpi4py")
    executor = importlib.import_module("mpi4py.futures").MPIPoolExecutor
    names = {"MPIPoolExecutor": executor, "f": scales_and_tells_threads, "xs": [0, 1, 2]}
    print([value_of(rows[-1][0], names), None, None])


@pytest.mark.timeout(150)
def test_what_stands_for_the_calls_of_mpi4py(tmp_path: Path) -> None:
    def run(kind: str, by_us: bool, ranks: int | None = None) -> str:
        call = f"import test_parallelizer as t; t.{kind}.run(t.compute_rows_of_mpi4py, {by_us})"
        return run_program("-c", call, ranks=ranks)

    theirs = run("MPIParallelizer()", False, ranks=3)
    script = tmp_path / "script.py"
    script.write_text(
        "import test_parallelizer\n"
        "if __name__ == '__main__':  # its workers import this\n"
        "    test_parallelizer.compute_row_of_mpi4py_futures()\n"
    )
    theirs += run_program("-m", "mpi4py.futures", str(script), ranks=3)
    assert len(theirs.splitlines()) == len(rows_for_users_of("mpi4py")) > 10
    assert run("MPIParallelizer()", True, ranks=3) == theirs
    assert run("MultiprocessingParallelizer(3)", True) == theirs


LIBRARIES = {"multiprocessing": "Pool", "joblib": "", "schwimmbad": "MultiPool"}


def compute_rows_of_pools(library: str, by_us: bool, *, parallelizer: Par = None) -> None:
    """Print a line for each row of a table: its value, by the library or by a parallelizer."""
    names = {
        "f": scales_and_tells_threads, "g": adds_sum, "xs": [*range(20)], "init": set_factor,
        "pairs": [(n, n * n) for n in range(20)], "a": np.ones(300_000, int), "p": parallelizer,
        "Parallelizer": Parallelizer, "MultiprocessingParallelizer": MultiprocessingParallelizer,
        "args": types.SimpleNamespace(mpi=False, n=2, backend="multiprocessing", nprocs=2),
    }  # fmt: skip
    if not by_us:
        names |= vars(importlib.import_module(library))
    for row in rows_for_users_of(library):
        os.environ.pop("FACTOR", None)
        with contextlib.ExitStack() as stack:
            if not by_us and re.search(r"\bpool\.", row[0]) and "with" not in row[0]:
                names["pool"] = stack.enter_context(names[LIBRARIES[library]](2))
            print(value_of(row[by_us], names))


def compute_our_rows_of_pools(library: str) -> None:
    with MultiprocessingParallelizer(2) as parallelizer:
        compute_rows_of_pools(library, True, parallelizer=parallelizer)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_stands_for_the_calls_of_a_pool(library: str) -> None:
    def run(call: str) -> str:
        call = f"import test_parallelizer as t; t.{call}"
        return run_program("-c", call, OMP_NUM_THREADS="2")

    theirs = run(f"compute_rows_of_pools({library!r}, False)")
    assert len(theirs.splitlines()) == len(rows_for_users_of(library)) > 2
    assert run(f"compute_our_rows_of_pools({library!r})") == theirs


def test_what_stands_for_the_mpi_pool_of_schwimmbad(tmp_path: Path) -> None:
    heading = "Coming from mpi4py, multiprocessing, joblib or schwimmbad"
    head = "import sys\nfrom math import sqrt as f\nfrom {} import {}\nxs = range(10)\n"
    imports = [("schwimmbad", "MPIPool"), ("parallelizer", "ClientServerRunner")]
    outputs = []
    for names, block in zip(imports, blocks_under(heading), strict=True):
        (tmp_path / "script.py").write_text(head.format(*names) + block)
        outputs.append(run_program("script.py", ranks=3, cwd=tmp_path))
    assert outputs == [f"{[math.sqrt(x) for x in range(10)]}\n"] * 2


def write_script(heading: str, folder: Path) -> str:
    """Write the one Python program under a heading of README to ``script.py``; its text."""
    (script,) = [block for block in blocks_under(heading) if "import" in block]
    (folder / "script.py").write_text(script)
    return script


def test_groups_of_ranks_find_what_the_readme_says(tmp_path: Path) -> None:
    assert "[280, 308] on 4 ranks" in write_script("Groups of ranks", tmp_path)
    assert run_program("script.py", ranks=4, cwd=tmp_path) == "[280, 308]\n"


WORKERS_WITH_GPUS = """
import os

from parallelizer import MultiprocessingParallelizer
from script import GPUS, choose_gpu


def visible(*, parallelizer):
    return parallelizer.gather(os.environ["CUDA_VISIBLE_DEVICES"])


if __name__ == "__main__":
    for method in ["fork", "forkserver", "spawn"]:
        with MultiprocessingParallelizer(
            4, start_method=method, initializer=choose_gpu, initargs=(GPUS,), main_computes=False
        ) as p:
            print(p.run(visible))
"""


def test_each_rank_sees_a_gpu(tmp_path: Path) -> None:
    write_script("One GPU per rank", tmp_path)
    (tmp_path / "workers.py").write_text(WORKERS_WITH_GPUS)

    def run(script: str, ranks: int | None = None) -> str:
        path = os.pathsep.join([str(tmp_path), str(HERE)])
        return run_program(
            script, ranks=ranks, cwd=tmp_path, PYTHONPATH=path, CUDA_VISIBLE_DEVICES="4,7"
        )

    assert run("script.py", ranks=3) == "['4', '7', '4']\n"
    cpus = internals._available_cpus()
    assert run("script.py") == f"{[*itertools.islice(itertools.cycle('47'), cpus)]}\n"
    assert run("workers.py").splitlines() == ["['4,7', '7', '4', '7']"] * 3


def test_rows_in_hdf5_are_the_same_from_processes_and_ranks(tmp_path: Path) -> None:
    write_script("Write results to HDF5 as they come", tmp_path)
    found = []
    for ranks in (None, 3):
        run_program("script.py", ranks=ranks, cwd=tmp_path)
        with importlib.import_module("h5py").File(tmp_path / "results.h5") as file:
            found.append(file["rows"][:])
    check(found[0], found[1])
    assert np.isfinite(found[0]).all()


def test_asyncio_awaits_jobs(tmp_path: Path) -> None:
    write_script("Await results with asyncio", tmp_path)
    folders = os.pathsep.join([str(HERE), str(HERE / "examples")])
    assert run_program("script.py", cwd=tmp_path, PYTHONPATH=folders) == "[0, 1, 4, 9, 16]\n"


async def awaits_results(call: str) -> list[int]:
    asyncio = importlib.import_module("asyncio")

    with MultiprocessingParallelizer(2) as par:
        names = {"asyncio": asyncio, "results": par.imap(square, range(3))}
        return [await asyncio.wait_for(eval(call, names), 20) for _ in range(4)]


def test_asyncio_awaits_the_results_of_imap() -> None:
    asyncio = importlib.import_module("asyncio")

    (call,) = re.findall(r"`await (asyncio\.to_thread\(.*\))`", README)
    assert asyncio.run(awaits_results(call)) == [0, 1, 4, None]


def beside_python() -> str:
    """Make a PATH on which this interpreter, and what belongs to it, comes first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def test_a_task_of_a_slurm_array_resumes_where_it_was_killed(tmp_path: Path) -> None:
    job, script = blocks_under("A Slurm array that resumes")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    told = "    os.write(1, f'computes {parameter}\\n'.encode())\n    time.sleep(0.02)\n    return"
    for folder, text in [
        (undisturbed, script),
        (killed, "import time\n" + script.replace("    return", told, 1)),
    ]:
        folder.mkdir()
        (folder / "job.sh").write_text(job)
        (folder / "scan.py").write_text(text)

    def finish_job(folder: Path) -> str:
        code, out, err = finish_command(
            ["bash", "job.sh"], cwd=folder, PATH=beside_python(), SLURM_ARRAY_TASK_ID="3"
        )
        assert code == 0, err
        return out

    wanted = finish_job(undisturbed)
    assert wanted.startswith("3 100 ")
    checkpoint = killed / "scan-3.checkpoint"
    with start_command(
        ["bash", "job.sh"], killed, PATH=beside_python(), SLURM_ARRAY_TASK_ID="3"
    ) as program:
        try:
            wait_until(lambda: checkpoint.exists() and checkpoint.stat().st_size > 1000)
        finally:
            os.killpg(program.pid, signal.SIGKILL)
        before, _ = program.communicate(timeout=20)
    wait_until(lambda: not group_members(program.pid))
    *again, result = finish_job(killed).splitlines()
    assert f"{result}\n" == wanted
    assert {*before.splitlines(), *again} == {f"computes {n}" for n in range(3, 1000, 10)}
    assert 0 < len(again) < 100


def test_tests_take_a_parallelizer_from_a_fixture(tmp_path: Path) -> None:
    tests, command = blocks_under("Test on every backend with pytest")
    (tmp_path / "test_total.py").write_text(tests)
    told = run_program("-m", "pytest", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "2 passed" in told
    code, told, err = finish_command(["bash", "-c", command], cwd=tmp_path, PATH=beside_python())
    assert code == 0, err
    assert told.count("1 passed") == 3
    (tmp_path / "test_total.py").write_text(tests.replace("== 45", "== 46"))
    code, told, _ = finish_command(["bash", "-c", command], cwd=tmp_path, PATH=beside_python())
    assert code == 1
    assert "assert 45 == 46" in told


def messages_of_the_module() -> Iterator[list[str]]:
    """Find the fixed parts of the text of each exception that is made, and of each warning."""
    for node in ast.walk(ast.parse((HERE / "parallelizer.py").read_text())):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            name = node.func.attr if isinstance(node.func, ast.Attribute) else name
            if name.endswith(("Error", "Died", "Timeout", "tell", "warning")):
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                fixed = [str(x.value) for x in parts if isinstance(x, ast.Constant)]
                yield [part.strip() for part in itertools.chain(*(x.split("%s") for x in fixed))]


def test_the_readme_tells_what_is_new_in_this_version() -> None:
    source = Path(str(sys.modules[MODULE].__file__)).read_text()
    _, changes = README.split("\n## Changes\n")
    assert re.findall(r"\*\*([\d.]+)\*\*", changes)[0] == sys.modules[MODULE].__version__
    assert "Permission is hereby granted, free of charge" in source  # which a copy carries along


def test_the_readme_explains_every_message() -> None:
    words = " ".join(README.split())
    # Of its fixed parts, those that are long enough to find it by.
    found = [[part for part in parts if len(part) > 11] for parts in messages_of_the_module()]
    assert len([*filter(None, found)]) > 40
    for parts in filter(None, found):
        internal = re.match("expected|the last rank|there is one process", parts[0])
        assert internal or any(part[:20] in words for part in parts), parts


COPIED = "otherproject._vendor.par"


def vendor(folder: Path) -> None:
    """Copy the module, and nothing else, under another name into a package of another project."""
    package = folder / "otherproject" / "_vendor"
    package.mkdir(parents=True)
    for path in (package.parent, package):
        (path / "__init__.py").touch()
    shutil.copy(HERE / "parallelizer.py", package / "par.py")


@pytest.fixture
def otherproject(tmp_path: Path) -> str:
    """Vendor the module; the path to both copies."""
    vendor(tmp_path)
    return os.pathsep.join([str(tmp_path), str(HERE)])


def test_two_copies_in_one_process(otherproject: str) -> None:
    call = "import test_parallelizer; test_parallelizer.use_two_copies"
    told = run_program("-c", f"{call}(*test_parallelizer.MULTIPROCESSING)", PYTHONPATH=otherproject)
    assert told.splitlines() == ["[(0, 1), (1, 1)]"] * 3
    told = run_program("-c", f"{call}('mpi')", PYTHONPATH=otherproject, ranks=2)
    assert told.splitlines() == ["[(0, 2), (1, 2)]"]


def use_two_copies(*engines: str) -> None:
    """Run as a program of its own by the test above: copies beside and inside each other."""
    other = importlib.import_module(COPIED)
    for engine in engines:
        ours: Par = create(engine, 2)
        theirs: Par = (
            other.MPIParallelizer()
            if engine == "mpi"
            else other.MultiprocessingParallelizer(2, start_method=engine)
        )
        ours.register("the name")
        theirs.register("the name")
        assert Parallelizer.lookup("the name") is ours
        assert other.Parallelizer.lookup("the name") is theirs
        with ours, theirs:
            for one in (ours, theirs, ours):
                error = caught_from(one.run, last_fails)
                assert type(error) is JobError, error
            result = ours.run(runs_the_other, "mpi" if engine == "mpi" else "serial")
        Parallelizer.unregister("the name")
        other.Parallelizer.unregister("the name")
        if ours.on_main:
            print(result)


def last_fails(*, parallelizer: Par) -> None:
    if parallelizer.id == parallelizer.nprocs - 1:
        raise JobError("the last", 1)
    time.sleep(0.1)  # which a signal may interrupt
    parallelizer.wait()


def counts_all(*, parallelizer: Par) -> Any:
    return parallelizer.allreduce(1)


def runs_the_other(backend: str, *, parallelizer: Par) -> Any:
    total = importlib.import_module(COPIED).Parallelizer.lookup(backend).run(counts_all)
    return parallelizer.gather((parallelizer.id, total))


def test_import_is_quiet_and_takes_numpy_alone() -> None:
    call = "import sys, numpy; before = set(sys.modules); "
    call += f"import {MODULE}; "
    call += "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}; "
    call += "print(sorted(loaded - sys.stdlib_module_names - {'numpy', '__mp_main__'}))"
    assert run_program("-W", "error", "-c", call) == f"{[MODULE.partition('.')[0]]}\n"


# Under a name of its own, the module is imported for the first time.
IMPORTS_A_COPY = """
import atexit, gc, logging, numpy as np, os, pathlib, random, signal, sys, threading, warnings

def state():
    return [
        [signal.getsignal(number) for number in signal.valid_signals()],
        signal.pthread_sigmask(signal.SIG_BLOCK, []), os.listdir('/proc/self/fd'), os.getcwd(),
        dict(os.environ), threading.enumerate(), threading.excepthook, sys.excepthook, sys.exit,
        atexit._ncallbacks(), gc.callbacks[:], np.geterr(), random.getstate(), sys.stdout,
        warnings.filters[:], logging.root.handlers[:], sys.stdout.line_buffering,
        pathlib.Path('/proc/self/task/%d/children' % os.getpid()).read_text(),
    ]

os.environ.clear()  # it may hold what the import has set in the program of the tests
before = state()
import copied
after = state()
for old, new in zip(before, after, strict=True):
    assert new == old, (old, new)
"""


def test_import_only_makes_definitions(tmp_path: Path) -> None:
    shutil.copyfile(str(sys.modules[MODULE].__file__), tmp_path / "copied.py")
    run_program("-c", IMPORTS_A_COPY, cwd=tmp_path, PYTHONPATH="")


def without_mpi4py() -> None:
    """Run as a program of its own by the test below."""
    sys.modules["mpi4py"] = None  # type: ignore[assignment]  # as Python marks what is missing
    try:
        MPIParallelizer()
    except ImportError as error:
        print(error)


def test_without_mpi4py_the_error_says_how_to_install_it() -> None:
    call = "import test_parallelizer; test_parallelizer.without_mpi4py()"
    assert "pip install" in run_program("-c", call)


@pytest.mark.parametrize(
    ("named", "found"),
    [("", "SerialNonParallelizer(id=0, nprocs=1) 1"), ("mpi", "MPIParallelizer(id=0, nprocs=1) 1"),
     ("multiprocessing:2", "MultiprocessingParallelizer(id=None, nprocs=None) 2"),
     ("dask", "LookupError"), ("mpi:3", "LookupError")],
)  # fmt: skip
def test_lookup_heeds_the_environment_where_nothing_is_open(
    named: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLELIZER", named)
    call = "import test_parallelizer; test_parallelizer.look_up_what_is_open()"
    assert run_program("-c", call) == found + "\n"


def look_up_what_is_open() -> None:
    """Run as a program of its own by the test above."""
    try:
        found = Parallelizer.lookup(None)
    except LookupError:
        print("LookupError")
    else:
        assert Parallelizer.lookup(None) is found or isinstance(found, SerialNonParallelizer)
        print(found, found.run(roll_call)[0][-1] + 1)


def test_a_launcher_of_another_mpi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")  # as if by the other MPI's mpiexec
    call = "import test_parallelizer; test_parallelizer.meet_the_wrong_launcher()"
    told = run_program("-c", call, PYTHONWARNINGS="ignore")  # mpi4py may warn of it, too
    for word in ["4 ranks", "sees one", "mpiexec", "pip install"]:
        assert word in told


@pytest.mark.parametrize("rank", [0, 1])
def test_what_srun_has_not_told_is_said_by_one_rank(rank: int) -> None:
    step: Any = STEP | {"SLURM_PROCID": str(rank), "PYTHONWARNINGS": "ignore"}
    code, out, err = finish("-c", f"import {MODULE} as m; m.MPIParallelizer()", **step)
    assert (code, out) == (1, "")
    assert ("start it by srun --mpi=pmi2" in err) == (rank == 0)
    assert err or rank > 0


def meet_the_wrong_launcher() -> None:
    try:
        MPIParallelizer()
    except ParallelizerError as error:
        print(error)


CELLS = [
    f"from {MODULE} import MultiprocessingParallelizer, WorkerError",
    """
    import dataclasses
    factor = 3
    def scaled(x):
        return factor * x
    @dataclasses.dataclass
    class Point:
        x: float
    class Trouble(Exception): pass
    def fails(*, parallelizer):
        if parallelizer.id == 1:
            raise Trouble("in a cell")
        parallelizer.gather(0)
    """,
    """
    for method in ["fork", "forkserver", "spawn"]:
        with MultiprocessingParallelizer(2, start_method=method) as p:
            def adder(n):
                return lambda x: scaled(x) + n  # a closure, defined after the workers were born
            print(p.map(adder(1), range(4)), p.map(Point, [1.5, 2.5]) == [Point(1.5), Point(2.5)])
            print(p.run(lambda parallelizer: parallelizer.gather(Point(parallelizer.id))))
            try:
                p.run(fails)
            except Trouble as error:
                print(repr(error))
    """,
]


def execute_a_notebook() -> None:
    """Run as a program of its own by the test below."""
    nbformat, nbclient = map(importlib.import_module, ["nbformat", "nbclient"])
    notebook = nbformat.v4.new_notebook()
    cells = [textwrap.dedent(cell).strip() for cell in CELLS]
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    # In its stderr stands that a kernel, which has threads, is not forked: forkserver takes over.
    for output in notebook.cells[-1].outputs:
        print(output["text"] if output["name"] == "stdout" else "", end="")


def test_functions_of_a_notebook_travel() -> None:
    call = "import test_parallelizer; test_parallelizer.execute_a_notebook()"
    told = "[1, 4, 7, 10] True\n[Point(x=0), Point(x=1)]\nTrouble('in a cell')\n"
    code, out, err = finish("-c", call, PYTHONWARNINGS="ignore")  # Jupyter's own, like its stderr
    assert (code, out) == (0, told * 3), err


# A program whose functions, class and exception its workers may be unable to import.
MAIN_PROGRAM = """
import dataclasses
import os
import sys
import threading
from parallelizer import MultiprocessingParallelizer, PackingError

seen = []


class Trouble(Exception):
    pass


@dataclasses.dataclass
class Point:
    x: int


class Own(MultiprocessingParallelizer):
    pass


if "NO_CLOUDPICKLE" in os.environ:
    sys.modules["cloudpickle"] = None
    Own = MultiprocessingParallelizer


def main(point, parallelizer=None):  # a name that the main program of a fork server has, too
    if point.x > 8:
        raise Trouble(point.x)
    return Point(point.x + len(seen))


def remembers(*, parallelizer):
    if not parallelizer.on_main:
        seen.append("run")
    return parallelizer.gather(len(seen))


if __name__ == "__main__":
    for method in sys.argv[1:]:
        with Own(2, start_method=method) as p:
            try:
                assert p.map(main, [Point(n) for n in range(4)]) == [Point(n) for n in range(4)]
                try:
                    p.map(main, [Point(9)])
                except Trouble as error:
                    p.run(remembers)
                    print(method, repr(error), p.run(remembers))
                lock = threading.Lock()
                p.run(lambda parallelizer: lock)
            except PackingError as error:
                print(error)
"""

MAIN_PROGRAMS = ["script", "module", "package", "stdin", "archive", "deleted"]


def run_as_main(way: str, folder: Path, *methods: str, **env: str) -> list[str]:
    """Run MAIN_PROGRAM as this kind of `__main__`; the lines it printed."""
    package = folder / "apackage"
    package.mkdir()
    for name in ("__init__.py", "__main__.py", "amodule.py"):
        (package / name).write_text(MAIN_PROGRAM * (name != "__init__.py"))
    shutil.make_archive(str(folder / "app"), "zip", package)
    gone = "import os, sys\nos.unlink(sys.argv[0])\n" * (way == "deleted")
    (folder / "script.py").write_text(gone + MAIN_PROGRAM)
    arguments = {
        "module": ["-m", "apackage.amodule"],
        "package": ["-m", "apackage"],
        "stdin": ["-"],
        "archive": [str(folder / "app.zip")],
    }.get(way, [str(folder / "script.py")])
    path = os.pathsep.join([str(folder), str(HERE)])
    program = subprocess.run(
        [sys.executable, *arguments, *methods],
        env=os.environ | {"PYTHONPATH": path} | env,
        input=MAIN_PROGRAM if way == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (program.returncode, program.stderr) == (0, ""), program.stderr
    return program.stdout.splitlines()


if CLOUDPICKLE:

    @pytest.mark.parametrize("way", MAIN_PROGRAMS)
    def test_functions_of_every_main_program_travel(way: str, tmp_path: Path) -> None:
        # By name, where that is possible, a function finds on a worker what it has left there.
        by_name = MULTIPROCESSING if way in ("script", "module") else ["fork"]
        told = run_as_main(way, tmp_path, *MULTIPROCESSING)
        for method, line, refusal in zip(MULTIPROCESSING, told[::2], told[1::2], strict=True):
            assert line == f"{method} Trouble(9) {[0, 2 if method in by_name else 1]}"
            assert "cannot pickle '_thread.lock' object" in refusal
            assert "cloudpickle" not in refusal  # which is installed


def test_without_cloudpickle_it_is_said_that_the_main_program_needs_it(tmp_path: Path) -> None:
    told = run_as_main("package", tmp_path, *MULTIPROCESSING, NO_CLOUDPICKLE="1")
    assert told[0] == "fork Trouble(9) [0, 2]"
    for error in told[1:]:
        assert "pip install cloudpickle" in error
    for error in told[2:]:
        assert "main is defined in a main program that workers which are not forked cannot" in error


def count_threads(*, parallelizer: Par) -> Any:
    threadpoolctl = importlib.import_module("threadpoolctl")
    np.ones((20, 20)) @ np.ones((20, 20))
    pools = threadpoolctl.threadpool_info()
    return parallelizer.gather({pool["num_threads"] for pool in pools})


@pytest.mark.parametrize("start_method", MULTIPROCESSING)
def test_processes_share_the_cpus_among_their_threads(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = SerialNonParallelizer().run(count_threads)
    with MultiprocessingParallelizer() as everything:
        share = max(1, everything.nprocs // 2)
    make = functools.partial(MultiprocessingParallelizer, 2, start_method=start_method)
    assert make(threads_per_process=2).run(count_threads) == [{2}, {2}]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's word, after which nothing is limited
    assert make().run(count_threads) == [before, before]
    for name in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    assert make().run(count_threads) == [{share}, {share}]
    assert SerialNonParallelizer().run(count_threads) == [before]


# Of the programs below, which need not find what the test's own environment says. To each of the
# libraries, an empty word is none.
NO_THREADS_SET: dict[str, Any] = {
    f"{name}_THREADS": ""
    for name in ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM", "NUMEXPR_NUM")
}


def threads_of_all(*, parallelizer: Par) -> Any:
    """Threads of each library, of which scipy brings one that may have to be loaded for this."""
    importlib.import_module("scipy.linalg")
    pools = importlib.import_module("threadpoolctl").threadpool_info()
    return parallelizer.allgather({pool["filepath"]: pool["num_threads"] for pool in pools})


def threads_of_a_program(*, parallelizer: Par) -> Any:
    """Of one that is started by the function, which has nothing but its environment."""
    call = "import numpy, threadpoolctl as t; print(t.threadpool_info()[0]['num_threads'])"
    env: dict[str, Any] = held_variables()
    return parallelizer.gather(int(run_program("-c", call, **env)))


def held_variables() -> dict[str, str]:
    return {name: os.environ.get(name, "") for name in NO_THREADS_SET}


def variables_of_a_child(method: str) -> dict[str, str]:
    """Of the user's own process, which may come from a fork server that a pool has started."""
    context: Any = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    with reader, writer:
        child = context.Process(target=tell_variables, args=(writer,))
        child.start()
        found: dict[str, str] = reader.recv()
        child.join()
    return found


def tell_variables(writer: Any) -> None:
    writer.send(held_variables())


def threads_of_inner_pools(*, parallelizer: Par) -> Any:
    inner = MultiprocessingParallelizer(2, start_method="spawn").run(threads_of_all)
    return [*itertools.chain(*parallelizer.allgather(inner, concatenate=False))]


def same_threads(method: str) -> None:
    """Print how many threads each process has, after making sure that it is one number on all."""
    limits = importlib.import_module("threadpoolctl").threadpool_limits
    make = functools.partial(MultiprocessingParallelizer, 2, start_method=method)

    def tell(situation: str, found: list[dict[str, int]], libraries: int = 2) -> None:
        (numbers,) = {tuple(sorted(one.items())) for one in found}  # the same on all
        assert len(numbers) == libraries, (situation, numbers)
        print(situation, *sorted({number for _, number in numbers}), sep=", ", flush=True)

    def now() -> Any:
        return SerialNonParallelizer().run(threads_of_all)

    cpus, environment = len(os.sched_getaffinity(0)), held_variables()
    assert "scipy.linalg" not in sys.modules
    with make() as p:
        tell("loaded late", p.run(threads_of_all))
        print(*p.run(threads_of_a_program))
    tell("afterwards", now())
    assert held_variables() == environment == variables_of_a_child(method)
    tell("asked for", make(threads_per_process=cpus).run(threads_of_all))
    with limits(1):
        tell("limited by the program", MultiprocessingParallelizer(1).run(threads_of_all))
        tell("limited by the program", make().run(threads_of_all))
    with make() as p:
        tell("not yet limited", p.run(threads_of_all))
        with limits(cpus):
            tell("limited for a call", p.run(threads_of_all))
            tell("limited for a call", p.map(threads_of_an_item, range(8)))
        tell("limited no more", p.run(threads_of_all))
    with make(threads_per_process=cpus) as first:
        second = make(threads_per_process=1)
        with second:
            tell("beside another", second.run(threads_of_all))
            tell("beside another", first.run(threads_of_all))
            tell("after another", first.run(inside_another, main_kwargs={"inner": second}))
            first.__exit__()
            tell("when the first is closed", second.run(threads_of_all))
            first.__enter__()
    tell("afterwards", now())
    assert held_variables() == environment
    tell("nested", make(threads_per_process=cpus).run(threads_of_inner_pools))
    os.environ["OMP_NUM_THREADS"] = "1"  # which comes too late
    tell("set late", make().run(threads_of_all))


def inside_another(*, inner: Any = None, parallelizer: Par) -> Any:
    """Have main use another pool, after which all have their own numbers again."""
    if inner is not None:
        inner.run(threads_of_all)
    return threads_of_all(parallelizer=parallelizer)


def threads_of_an_item(_: int) -> dict[str, int]:
    (found,) = SerialNonParallelizer().run(threads_of_all)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("start_method", MULTIPROCESSING)
def test_every_process_has_the_same_number_of_threads(start_method: str) -> None:
    call = f"import test_parallelizer as t; t.same_threads({start_method!r})"
    cpus = len(os.sched_getaffinity(0))
    share = max(1, cpus // 2)
    told = run_program("-c", call, **NO_THREADS_SET)
    assert told.splitlines() == [
        f"loaded late, {share}",
        f"{share} {share}",
        f"afterwards, {cpus}",
        f"asked for, {cpus}",
        *["limited by the program, 1"] * 2,
        f"not yet limited, {share}",
        *[f"limited for a call, {cpus}"] * 2,
        f"limited no more, {share}",
        "beside another, 1",
        f"beside another, {cpus}",
        f"after another, {cpus}",
        "when the first is closed, 1",
        f"afterwards, {cpus}",
        f"nested, {share}",
        f"set late, {cpus}",
    ]


def product(_: int) -> float:
    """Whose last digits depend on the number of threads."""
    left, right = np.random.default_rng(1).random((2, 10**6))
    return float(left @ right)


def products(set_late: bool, methods: list[str], threads: int | None) -> None:
    """Print whether many equal products have one value, that of a serial one, by each method."""
    if set_late:
        os.environ["OMP_NUM_THREADS"] = "1"
    for method in methods:
        with MultiprocessingParallelizer(2, start_method=method, threads_per_process=threads) as p:
            print(set(p.map(product, range(40))) == {product(0)})


@pytest.fixture
def no_threadpoolctl(tmp_path: Path) -> str:
    """Make its import fail; the path on which it does."""
    (tmp_path / "threadpoolctl.py").write_text("raise ModuleNotFoundError('it is not installed')")
    return os.pathsep.join([str(tmp_path), str(HERE)])


NOT_LIMITED = "threads of BLAS and OpenMP cannot be limited without threadpoolctl"


@pytest.mark.parametrize(
    ("call", "variables", "warned"),
    [
        ("False, t.MULTIPROCESSING, None", {}, "each of 2 processes uses as many"),
        ("False, t.MULTIPROCESSING, 2", {"OMP_NUM_THREADS": "1"}, "each of 2 processes"),
        ("False, t.MULTIPROCESSING, 1", {"OMP_NUM_THREADS": "1"}, ""),
        ("False, t.MULTIPROCESSING, None", {"OPENBLAS_NUM_THREADS": "1"}, ""),
        ("True, ['fork'], None", {}, ""),
        ("True, ['spawn'], None", {}, "workers may use a different number of threads from main"),
    ],
)
def test_without_threadpoolctl_no_process_is_limited(
    call: str, variables: dict[str, str], warned: str, no_threadpoolctl: str
) -> None:
    call = f"import test_parallelizer as t; t.products({call})"
    env = NO_THREADS_SET | {"PYTHONPATH": no_threadpoolctl} | variables
    code, out, err = finish("-c", call, **env)
    assert code == 0, err
    if "different" not in warned:
        assert set(out.split()) == {"True"}
    assert len(err.splitlines()) == bool(warned), err  # once, whatever is opened
    if warned:
        assert err.startswith(NOT_LIMITED)
        assert warned in err
        assert "pip install threadpoolctl" in err


def mpi_threads(body: Callable[..., Any]) -> None:
    """Print how many threads ranks have: of a pair, of which one is in another one, too; of all."""
    world = importlib.import_module("mpi4py.MPI").COMM_WORLD
    groups = [world.group.Incl(pair) for pair in ([0, 1], [1, 2]) if world.rank in pair]
    pairs = [MPIParallelizer(world.Create_group(group)) for group in groups]
    first, *_ = [pair.run(body) for pair in pairs]
    whole = MPIParallelizer()
    told = [first, whole.run(body)]
    first, *_ = [pair.run(body) for pair in pairs]
    told += [first, ClientServerRunner(drives_under_a_limit, parallelizer=whole).run()]
    if whole.on_main:
        print([{number for found in one for number in found.values()} for one in told])


def drives_under_a_limit(parallelizer: Par) -> Any:
    with contextlib.suppress(ModuleNotFoundError):
        threadpoolctl = importlib.import_module("threadpoolctl")
        with threadpoolctl.threadpool_limits(2):
            return parallelizer.map(threads_of_an_item, range(9), chunksize=1)
    return []


def products_of_all(*, parallelizer: Par) -> Any:
    return parallelizer.allgather({"product": product(0)})


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_ranks_have_the_same_number_of_threads(
    alike: bool, limited: bool, no_threadpoolctl: str
) -> None:
    rank = "int(os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK'])"
    call = "import os; "
    call += "" if alike else f"os.environ['OMP_NUM_THREADS'] = str(3 - {rank}); "
    call += "import test_parallelizer as t; "
    call += f"t.mpi_threads(t.{'threads_of_all' if limited else 'products_of_all'})"
    variables = NO_THREADS_SET | ({} if limited else {"PYTHONPATH": no_threadpoolctl})
    code, out, err = finish("-c", call, ranks=3, **variables)
    assert code == 0, err
    told = ast.literal_eval(out)
    if limited:
        pair, whole, pair_again, driven = told
        assert len(pair) == len(whole) == 1
        assert pair == pair_again
        assert alike or whole == {1}
        assert driven == {2}
    elif alike:
        assert [len(one) for one in told] == [1, 1, 1, 0]
    assert err.count(NOT_LIMITED) == (not limited and not alike), err


def test_what_the_user_has_told_each_library_is_left_alone() -> None:
    """Though libraries of one kind then have different numbers: it is the same on all ranks."""
    call = "import os, test_parallelizer as t; t.MPIParallelizer(); print(' %s ' % sorted("
    call += "(k, v) for k, v in os.environ.items() if k.endswith('_NUM_THREADS') and v))"
    numbers = {"MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "2"}
    told = run_program("-c", call, ranks=2, **(NO_THREADS_SET | numbers))
    assert told.split() == str([*numbers.items()]).split() * 2


# ---------------------------------------------------------------------------------------------
# Some of these tests again, on a copy of the module under another name

# Where the name of the module could matter: what is found by name, pickled and unpickled.
OF_A_COPY = (
    "((on_spawn or on_forkserver) and (role or lookup or register or restricted or hold_a "
    "or sentinel or bound_methods or any_object or exception_comes or streams_outside "
    "or numbers_and_lists or views_of_shared)) "
    "or (on_serial and (lookup or register or restricted or hold_a))"
)


@pytest.mark.timeout(900)
def test_a_copy_under_another_name_passes_the_tests(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    vendor(folder)
    for name in ("test_parallelizer.py", "README.md", "pyproject.toml"):
        shutil.copy(HERE / name, folder)
    (folder / "parallelizer.py").write_text("raise ImportError('a copy does without this one')\n")
    # The other way round, so that no test needs another.
    last_first = "def pytest_collection_modifyitems(items):\n    items.reverse()\n"
    (folder / "conftest.py").write_text(last_first)
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no"]
    env = {"PARALLELIZER_TEST_MODULE": COPIED, "PARALLELIZER_TEST_PROGRAM": ""}
    env["PYTHONPATH"] = str(folder)
    code, told, err = finish_command([*argv, "-k", OF_A_COPY], cwd=folder, limit=800, **env)
    # None failed, was skipped, or did not come to its end.
    counts = re.search(r"^=+ (\d+) passed, (\d+) deselected in .*=\n\Z", told, re.MULTILINE)
    assert code == 0, told[-20000:] + err
    assert counts, told[-20000:]
    assert int(counts[1]) > 60


if __name__ == "__main__":
    sys.exit(run_as_rank(Path(sys.argv[1]), *sys.argv[2:]))
