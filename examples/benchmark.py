"""How fast the module is, beside process pools and mpi4py; a fresh process measures each cell.

    python examples/benchmark.py                      # the pools, at 256 MiB: ten minutes
    python examples/benchmark.py --verbs              # the verbs, from 8 B to 64 MiB: five minutes
    python examples/benchmark.py --verbs --plot benchmark.png
    python examples/benchmark.py --growth             # on 2, 4, ..., 32 processes: five minutes
    python examples/benchmark.py --quick              # does it work? its times say little
    mpiexec -n 4 python examples/benchmark.py --mpi   # the verbs on these ranks, of any cluster

For pools, a cell is the best of several repeats on a pool that is open and warm (unless its row
says otherwise). For verbs, a cell is the mean of the slowest rank. All ranks meet before each call,
in a barrier that is not timed: otherwise, a sender would run ahead, and the next call would hide
the costs of this one. Both are medians over the rounds; in each round, the peers take turns. Every
result is checked, and an array that stays on another process is checked by a sample. joblib (loky),
mpire, schwimmbad and mpi4py are measured if they are installed. A pool computes on `nprocs`
workers; parallelizer and MPI compute on `nprocs` processes, main among them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import operator
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallelizer import MPIParallelizer, MultiprocessingParallelizer, Parallelizer

MIB = (1 << 20) // 8  # in numbers of 8 bytes
PATIENCE = 3.0  # seconds after which a cell is not repeated again
LIMIT = 600.0  # seconds after which a cell counts as failed
MPIEXEC = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
RATIOS = (("first", "broadcast"), ("growth 16", "growth 2"))  # pairs of rows, compared at the end
UNEVEN = [0.020] * 8 + [0.001] * 56  # seconds that a task takes

Array = NDArray[np.float64]
Results = dict[str, dict[str, list[float]]]  # seconds of each round, by row and peer
Table = dict[str, dict[str, float]]  # their medians, in milliseconds


class Setting(NamedTuple):
    """The sizes and counts with which a cell is measured."""

    nprocs: int
    length: int  # of the big array, in numbers; with raw MPI, all ranks must know it
    items: int
    repeats: int
    start_method: str


# The columns: how each peer is opened. All pools get one interface.

load = importlib.import_module  # for optional packages


def world_of(peer: str) -> Any:
    """Return mpi4py's communicator of all ranks, or for other peers a stand-in for main alone."""
    if peer == "mpi4py":
        return load("mpi4py.MPI").COMM_WORLD
    return SimpleNamespace(rank=0, Barrier=lambda: None, Abort=sys.exit)


@contextlib.contextmanager
def opened(
    pool: Any,
    call: Any = lambda pool, func, item: pool.apply(func, (item,)),
    over: Any = lambda pool, func, items, chunk: pool.map(func, items, chunksize=chunk),
) -> Iterator[SimpleNamespace]:
    """Enter a pool; `call` and `over` say how it calls and maps, if not like a `Pool`."""
    with pool:
        yield SimpleNamespace(call=functools.partial(call, pool), map=functools.partial(over, pool))


def open_joblib(s: Setting) -> Any:
    """Open a `joblib.Parallel`; its workers outlive it, so only the first opening is cold."""
    joblib = load("joblib")
    return opened(
        joblib.Parallel(n_jobs=s.nprocs),
        lambda pool, func, item: pool([joblib.delayed(func)(item)])[0],
        lambda pool, func, items, _: pool(joblib.delayed(func)(item) for item in items),
    )


# For each name, the module whose import is timed, and how to open the peer. An Executor is given
# the chunk size of Pool, because its own default is one item.
PEERS: dict[str, tuple[str, Callable[[Setting], Any]]] = {
    "parallelizer": ("parallelizer", lambda s: MultiprocessingParallelizer(
        s.nprocs, start_method=s.start_method)),
    "Pool": ("multiprocessing.pool", lambda s: opened(
        multiprocessing.get_context(s.start_method).Pool(s.nprocs))),
    "Executor": ("concurrent.futures.process", lambda s: opened(
        ProcessPoolExecutor(s.nprocs, multiprocessing.get_context(s.start_method)),
        lambda pool, func, item: pool.submit(func, item).result(),
        lambda pool, func, items, chunk: list(
            pool.map(func, items, chunksize=chunk or -(-len(items) // (4 * s.nprocs)))))),
    "joblib": ("joblib", open_joblib),
    "mpire": ("mpire", lambda s: opened(
        load("mpire").WorkerPool(s.nprocs, start_method=s.start_method, keep_alive=True),
        over=lambda pool, func, items, chunk: pool.map(
            func, items, chunk_size=chunk, concatenate_numpy_output=False))),
    "schwimmbad": ("schwimmbad", lambda s: opened(load("schwimmbad").MultiPool(s.nprocs))),
    "local copy": ("numpy", lambda _: contextlib.nullcontext()),
    "mpi4py": ("mpi4py", lambda _: contextlib.nullcontext(world_of("mpi4py"))),
}  # fmt: skip


# The functions that processes must find by name.


@functools.cache
def big(s: Setting) -> Array:
    """Make the big array, shape (n,), of whole numbers, so that its sums are exact."""
    return np.resize(np.arange(1021.0), s.length)


def split(s: Setting) -> list[Array]:
    """Cut the big array into blocks, for a pool."""
    return np.array_split(big(s), s.nprocs)


def square(number: int) -> int:
    """Do next to nothing."""
    return number * number


def burn(seconds: float) -> float:
    """Keep a processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def sample(*arguments: Any) -> float:
    """Sum a thousand values of an array, the last argument, to prove that it has come."""
    data = arguments[-1]
    return float(data[:: len(data) // 1000 or 1].sum())


def absolute(number: int, *, parallelizer: Parallelizer) -> int:  # noqa: ARG001
    """Return `abs(number)`, on every process."""
    return abs(number)


def everywhere(func: Callable[[Any], Any], data: Any, *, parallelizer: Parallelizer) -> Any:
    """Call `func(data)` on every process, and gather what it returns."""
    return parallelizer.gather(func(data))


def broadcast(data: Array | None = None, *, parallelizer: Parallelizer) -> Any:
    """Send `data`, which only main has, to every process."""
    received: Any = parallelizer.broadcast(data)
    return parallelizer.gather(sample(received))


def raw_broadcast(world: Any, s: Setting) -> Any:
    """Broadcast the big array with mpi4py, into memory of each rank's own."""
    data = big(s) if world.rank == 0 else np.empty(s.length)
    world.Bcast(data)
    return world.gather(sample(data))


def raw_round_trip(world: Any, s: Setting) -> Any:
    """Send blocks of the big array to the ranks, and the whole array back."""
    block = np.empty(s.length // world.size)
    world.Scatter(big(s) if world.rank == 0 else None, block)
    result = np.empty(s.length) if world.rank == 0 else None
    world.Gather(block, result)
    return result


# The rows: what each peer does, the first of them this module. p is a parallelizer, q a pool, c a
# communicator, and s the setting.


class Case(NamedTuple):
    """A row."""

    title: str
    works: dict[str, Any]
    expected: Callable[[Setting], Any] = lambda s: [sample(big(s))] * s.nprocs
    loops: int = 1  # calls that are timed together
    warm: bool = True  # whether the work is done once before it is timed
    anew: bool = False  # whether the peer is opened for each call
    nprocs: int | None = None  # if not the setting's
    length: int = sys.maxsize  # at most, in numbers


def pools(work: Any) -> dict[str, Any]:
    """Give all process pools the same work."""
    return dict.fromkeys(("Pool", "Executor", "joblib", "mpire", "schwimmbad"), work)


share = functools.cache(lambda p, s: p.share(big(s)))
CALL = {"parallelizer": lambda p, _: p.run(absolute, 7), **pools(lambda q, _: q.call(abs, 7))}
BROADCAST: dict[str, Any] = {
    "parallelizer": lambda p, s: p.run(broadcast, main_kwargs={"data": big(s)}),
    "local copy": lambda _, s: [sample(big(s).copy())] * s.nprocs,
    "mpi4py": raw_broadcast,
}
CASES = {
    "open": Case("open, one call, close", CALL, lambda _: 7, anew=True),
    "call": Case("one call, open pool", CALL, lambda _: 7, loops=50),
    "gather": Case("run with one gather(0) / apply", {
        "parallelizer": lambda p, _: p.run(everywhere, abs, 0),
        "Pool": lambda q, s: [q.call(abs, 0)] * s.nprocs,
    }, lambda s: [0] * s.nprocs, loops=50),
    "map": Case("map of trivial items", {
        "parallelizer": lambda p, s: p.map(square, range(s.items)),
        **pools(lambda q, s: q.map(square, range(s.items), None)),
    }, lambda s: [number * number for number in range(s.items)]),
    "uneven": Case("map of 8 x 20 ms and 56 x 1 ms", {
        "parallelizer": lambda p, _: p.map(burn, UNEVEN),
        **pools(lambda q, _: q.map(burn, UNEVEN, 1)),
    }, lambda _: UNEVEN),
    "blocks": Case("blocks out, a number each back", {
        "parallelizer": lambda p, s: p.map(np.sum, big(s), vectorized=True),
        **pools(lambda q, s: q.map(np.sum, split(s), 1)),
    }, lambda s: [block.sum() for block in split(s)]),
    "round trip": Case("blocks out, the array back", {
        "parallelizer": lambda p, s: p.map(np.asarray, big(s), vectorized=True),
        **pools(lambda q, s: np.concatenate(q.map(np.asarray, split(s), 1))),
        "mpi4py": raw_round_trip,
    }, big),
    "broadcast": Case("the array to every process", {
        **BROADCAST, **pools(lambda q, s: q.map(sample, [big(s)] * s.nprocs, 1))}),
    # A local copy is measured, too, because the first use of memory can be slow.
    "first": Case("the same, first transfer", BROADCAST, warm=False),
    "argument": Case("the array as an argument of run", {
        "parallelizer": lambda p, s: p.run(everywhere, sample, big(s))}),
    "extra": Case("the array in extra_args of map", {
        "parallelizer": lambda p, s: p.map(sample, range(s.nprocs), (big(s),))}),
    "number": Case("run with a number as an argument", {
        "parallelizer": lambda p, s: p.run(everywhere, float, big(s)[-1]),
    }, lambda s: [big(s)[-1]] * s.nprocs, loops=50),
    "shared": Case("run with the array, shared before", {
        "parallelizer": lambda p, s: p.run(everywhere, operator.itemgetter(-1), share(p, s)),
    }, lambda s: [big(s)[-1]] * s.nprocs, loops=50),
    **{f"growth {n}": Case(f"64 MiB to {n} processes", BROADCAST, nprocs=n, length=64 * MIB)
       for n in (2, 4, 8, 16)},
    "import": Case("import, beyond numpy's", dict.fromkeys(CALL)),
}  # fmt: skip


# How a cell is measured, in a process of its own.


def import_seconds(module: str) -> float:
    """Time an import beyond numpy's, twice, because the first one compiles the module."""
    code = f"import numpy, time; t = time.perf_counter(); import {module}; "
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t)"]
    env = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    return min(float(subprocess.check_output(command, env=env)) for _ in range(2))


def measure(row: str, peer: str, s: Setting) -> float:
    """Return the seconds of the best repeat; all ranks of MPI call this, and main checks."""
    case, (module, opener), world = CASES[row], PEERS[peer], world_of(peer)
    if row == "import":
        return import_seconds(module)
    if not case.warm:
        # Touched first, because a virtual machine may be slow to provide memory that lay idle.
        np.ones(4 * s.length)

    def repeat() -> float:
        result: Any = None
        world.Barrier()
        begun = time.perf_counter()
        for _ in range(case.loops):
            with opener(s) if case.anew else contextlib.nullcontext(held) as handle:
                result = case.works[peer](handle, s)
        world.Barrier()
        seconds = (time.perf_counter() - begun) / case.loops
        if world.rank == 0 and not np.array_equal(result, expected):
            wrong = f"{row}: {peer}: expected {str(expected)[:200]}, but got {str(result)[:200]}"
            print(wrong, file=sys.stderr, flush=True)
            world.Abort(1)
        return seconds

    with contextlib.nullcontext() if case.anew else opener(s) as held:
        if peer in CALL and not case.anew:
            CALL[peer](held, s)  # so that lazy pools start their workers now
        # Made after the workers have started, so that they do not inherit it.
        expected: Any = case.expected(s) if world.rank == 0 else None
        seconds = [repeat()]
        while case.warm and len(seconds) <= s.repeats:
            seconds.append(repeat())
            # The ranks of MPI must agree on the number of repeats.
            if sum(seconds) * case.loops > PATIENCE and peer != "mpi4py":
                break
    return min(seconds[1:] or seconds)


def apart(nprocs: int, over_mpi: bool, *cell: Any) -> Any:
    """Measure in a fresh process, or on `nprocs` ranks of MPI; return None if that fails."""
    command = [sys.executable, __file__, "cell", json.dumps(cell)]
    if over_mpi:
        command = [MPIEXEC or "mpiexec", "-n", str(nprocs), *command]
    # By default, Open MPI runs no more ranks than there are cores, and does not run as root.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    run = functools.partial(subprocess.check_output, stdin=subprocess.DEVNULL, timeout=LIMIT)
    try:
        return json.loads(run(command, env={**allowed, **os.environ}).splitlines()[-1])
    except subprocess.SubprocessError as error:
        print(f"{cell}: {error}", file=sys.stderr)
        return None


# The verbs: each one by size, on every engine, and on more and more processes.

SIZES: list[int] = [8, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 26]
VERBS = ("broadcast", "allgather", "allreduce", "round trip")
GROWTH: list[int] = [2, 4, 8, 16, 32]
Calls = dict[str, Callable[[], Any]]


def verbs_of_ours(p: Parallelizer, data: Array) -> Calls:
    """Return the calls of a parallelizer; a round trip sends blocks out and the whole back."""
    block = data[: max(1, len(data) // (p.nprocs or 1))]
    return {
        "broadcast": lambda: p.broadcast(data),
        "allgather": lambda: p.allgather(block),
        "allreduce": lambda: p.allreduce(data),
        "round trip": lambda: p.gather(p.scatter(data)),
        "wait": p.wait,
        "run": lambda: None,  # measured by `measure_engine`, outside the run
        "map": lambda: p.map(square, range(1000)),
    }


def verbs_of_buffers(c: Any, data: Array) -> Calls:
    """Return mpi4py's calls on buffers, allocated in each call, as all engines do."""
    block = data[: max(1, len(data) // c.size)]
    whole, on_main = np.resize(data, len(block) * c.size), c.rank == 0

    def broadcast() -> None:
        c.Bcast(data if on_main else np.empty_like(data))

    def round_trip() -> None:
        received = np.empty_like(block)
        c.Scatter(whole if on_main else None, received)
        c.Gather(received, np.empty_like(whole) if on_main else None)

    return {
        "broadcast": broadcast,
        "allgather": lambda: c.Allgather(block, np.empty_like(whole)),
        "allreduce": lambda: c.Allreduce(data, np.empty_like(data)),
        "round trip": round_trip,
        "wait": c.Barrier,
    }


def verbs_of_objects(c: Any, data: Array) -> Calls:
    """Return mpi4py's calls on objects: its lower-case verbs, which pickle."""
    blocks = np.array_split(data, c.size)

    def round_trip() -> None:
        received = c.gather(c.scatter(blocks if c.rank == 0 else None))
        if received is not None:
            np.concatenate(received)

    return {
        "broadcast": lambda: c.bcast(data),
        "allgather": lambda: np.concatenate(c.allgather(blocks[0])),
        "allreduce": lambda: c.allreduce(data),
        "round trip": round_trip,
        "wait": c.barrier,
    }


def verbs_of_pools(q: Any, data: Array, nprocs: int) -> Calls:
    """Return the calls of a pool, for the verbs that it has; it pickles."""
    blocks = np.array_split(data, nprocs)
    return {
        "broadcast": lambda: q.map(len, [data] * nprocs, 1),
        "round trip": lambda: np.concatenate(q.map(np.asarray, blocks, 1)),
        "run": lambda: q.map(square, range(nprocs), 1),
        "map": lambda: q.map(square, range(1000), None),
    }


def microseconds(call: Callable[[], Any], meet: Callable[[], Any], repeats: int) -> float:
    """Return the mean time of a call; all ranks `meet` before each call."""
    total = 0.0
    for number in range(-max(1, repeats // 10), repeats):
        meet()
        begun = time.perf_counter()
        call()
        total += (time.perf_counter() - begun) * (number >= 0)
    meet()
    return 1e6 * total / repeats


def measure_calls(
    verbs: list[str],
    sizes: list[int],
    calls_on: Callable[[Array], Calls],
    meet: Callable[[], Any],
    most: int,
) -> dict[str, float]:
    """Return the microseconds of this rank, by verb and size."""
    measured = {}
    for size in sizes:
        calls = calls_on(np.arange(size / 8))
        repeats = max(4, min(most, (1 << 28) // (size + (1 << 18))))
        for verb in verbs:
            if verb in calls:
                count = repeats // 10 + 1 if verb in ("run", "map") else repeats
                measured[f"{verb} {size}"] = microseconds(calls[verb], meet, count)
    return measured


def measure_ours(
    verbs: list[str], sizes: list[int], most: int, *, parallelizer: Parallelizer
) -> Any:
    """Check two verbs; return the slowest rank's microseconds on every rank."""
    p = parallelizer
    data = np.arange(1000.0 * (p.nprocs or 1))
    assert np.array_equal(p.broadcast(data if p.on_main else data[:1]), data)
    assert np.array_equal(p.allreduce(data), data * p.nprocs)
    own = measure_calls(verbs, sizes, functools.partial(verbs_of_ours, p), p.wait, most)
    return {name: p.allreduce(value, "max") for name, value in own.items()}


def nothing(*, parallelizer: Parallelizer) -> None:
    """Do nothing, on all processes."""


def measure_engine(engine: str, nprocs: int, verbs: list[str], sizes: list[int], most: int) -> Any:
    """Return microseconds by verb and size; under MPI, all ranks call this together."""
    if engine in ("processes", "MPI"):
        ours = MPIParallelizer() if engine == "MPI" else MultiprocessingParallelizer(nprocs)
        with ours as p:
            told = p.run(measure_ours, [verb for verb in verbs if verb != "run"], sizes, most)
            if "run" in verbs:
                told[f"run {sizes[0]}"] = microseconds(lambda: p.run(nothing), int, most)
            return told
    if engine in ("Pool", "joblib"):
        setting = Setting(nprocs, 0, 0, 0, multiprocessing.get_all_start_methods()[0])
        with PEERS[engine][1](setting) as pool:
            return measure_calls(
                verbs, sizes, lambda data: verbs_of_pools(pool, data, nprocs), int, most // 10
            )
    c = world_of("mpi4py")
    calls_on = verbs_of_buffers if engine == "mpi4py, buffers" else verbs_of_objects
    own = measure_calls(verbs, sizes, functools.partial(calls_on, c), c.Barrier, most)
    return {name: max(c.allgather(value)) for name, value in own.items()}


ENGINES = ("processes", "Pool", "joblib", "MPI", "mpi4py, buffers", "mpi4py, objects")


def measure_engines(
    rounds: int,
    verbs: list[str],
    sizes: list[int],
    counts: list[int],
    engines: list[str],
    most: int,
) -> dict[str, dict[str, float]]:
    """Return medians by engine and then by verb, size and number of processes."""
    told: dict[str, dict[str, list[float]]] = {engine: {} for engine in engines}
    for number, nprocs in itertools.product(range(rounds), counts):
        for turn in range(len(engines)):
            engine = engines[(number + turn) % len(engines)]
            print(f"round {number + 1} of {rounds}: {engine}, {nprocs}", file=sys.stderr)
            measured = apart(nprocs, "MPI" in engine or "mpi4py" in engine,
                             "verbs", engine, nprocs, verbs, sizes, 2 * most // nprocs)  # fmt: skip
            for name, value in (measured or {}).items():
                told[engine].setdefault(f"{name} {nprocs}", []).append(value)
    return {
        engine: {name: statistics.median(values) for name, values in row.items()}
        for engine, row in told.items()
    }


def in_bytes(size: int) -> str:
    """Return a size as text, with its unit."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def print_lines(lines: list[list[str]]) -> None:
    """Print aligned columns, as a table that is valid Markdown."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in [lines[0], ["-" * width for width in widths], *lines[1:]]:
        print(f"| {' | '.join(map(str.ljust, line, widths))} |")
    print()


def number(value: float | None) -> str:
    """Return a number as text, with three digits or more."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_verbs(told: dict[str, dict[str, float]], nprocs: int, sizes: list[int]) -> None:
    """Print a line for each verb and size, with a column for each engine."""
    lines = [["microseconds", "", *told]]
    for verb, size in itertools.product(VERBS, sizes):
        name = f"{verb} {size} {nprocs}"
        lines.append([verb, in_bytes(size), *(number(told[one].get(name)) for one in told)])
    print_lines(lines)


def print_growth(told: dict[str, dict[str, float]], counts: list[int]) -> None:
    """Print a line for each verb, size and engine, with a column for each process count."""
    lines = [["microseconds", "", *map(str, counts)]]
    names = {name.rsplit(" ", 1)[0]: None for row in told.values() for name in row}
    for name, engine in itertools.product(names, told):
        verb, size = name.rsplit(" ", 1)
        what = f"{verb}, {in_bytes(int(size))}" if verb in VERBS else verb
        values = [told[engine].get(f"{name} {count}") for count in counts]
        if any(values):
            lines.append([what, engine, *map(number, values)])
    print_lines(lines)


def draw_verbs(
    told: dict[str, dict[str, float]], nprocs: int, sizes: list[int], filename: str
) -> None:
    """Draw time against size, both on a logarithmic scale, with a panel for each verb."""
    pyplot = load("matplotlib.pyplot")  # pip install matplotlib
    figure, axes = pyplot.subplots(1, len(VERBS), figsize=(14, 4.2), sharey=True,
                                   layout="constrained")  # fmt: skip
    for axis, verb in zip(axes, VERBS, strict=True):
        for place, (engine, row) in enumerate(told.items()):
            points = [(size, row.get(f"{verb} {size} {nprocs}")) for size in sizes]
            known = [point for point in points if point[1] is not None]
            ours = engine in ("processes", "MPI")
            style = {"color": f"C{place}", "marker": "o" if ours else ".",
                     "linewidth": 2.5 if ours else 1.2}  # fmt: skip
            axis.plot(*zip(*known or [(8, math.nan)], strict=True), label=engine, **style)
        axis.set(xscale="log", yscale="log", title=verb, xlabel="bytes")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds")
    axes[-1].legend(fontsize="small")
    figure.savefig(filename, dpi=110)


# How all cells of the pools are measured, round by round.


def available(peer: str) -> bool:
    """Whether a column can be measured here."""
    found = importlib.util.find_spec(PEERS[peer][0].partition(".")[0])
    return found is not None and (peer != "mpi4py" or MPIEXEC is not None)


def measure_all(s: Setting, rounds: int, rows: list[str]) -> Results:
    """Measure cell by cell; in each round another peer begins, because the first may pay more."""
    results: Results = {}
    for number, row in itertools.product(range(1, rounds + 1), rows):
        case = CASES[row]
        nprocs = case.nprocs or s.nprocs
        its = s._replace(nprocs=nprocs, length=min(case.length, s.length) // nprocs * nprocs)
        peers = [peer for peer in case.works if available(peer)]
        for turn in range(len(peers)):
            peer = peers[(number + turn) % len(peers)]
            print(f"round {number} of {rounds}: {row}: {peer}", file=sys.stderr)
            seconds = apart(nprocs, peer == "mpi4py", "pools", row, peer, its)
            cell = results.setdefault(row, {}).setdefault(peer, [])
            cell += [] if seconds is None else [seconds]
    return results


# The table and the picture.


def medians(results: Results) -> Table:
    """Return the median milliseconds of each cell."""
    return {
        row: {p: 1e3 * statistics.median(cells[p]) for p in PEERS if cells.get(p)}
        for row, cells in results.items()
    }


def entry(milliseconds: float | None, ours: float | None) -> str:
    """Return a peer's time as text, with its ratio to ours if it is not ours."""
    if milliseconds is None:
        return "-"
    text = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
    return text if ours in (None, milliseconds) else f"{text} ({milliseconds / ours:.2g}x)"


def print_pools(table: Table) -> None:
    """Print a line for each row, with a column for each peer; then the `RATIOS`."""
    peers = [peer for peer in PEERS if any(peer in CASES[row].works for row in table)]
    lines = [["milliseconds (ratio to ours)", *peers]]
    for row, values in table.items():
        ours = values.get("parallelizer")
        lines.append([CASES[row].title, *(entry(values.get(peer), ours) for peer in peers)])
    print_lines(lines)
    for first, second in RATIOS:
        if "parallelizer" in table.get(first, {}) and "parallelizer" in table.get(second, {}):
            ratio = table[first]["parallelizer"] / table[second]["parallelizer"]
            print(f"{CASES[first].title} / {CASES[second].title}: {ratio:.2f}")


def describe_machine() -> str:
    """Return the system, the number of CPUs, and the versions of all that is measured."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("numpy", "joblib", "mpire", "schwimmbad", "mpi4py"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    if MPIEXEC is not None:
        with contextlib.suppress(ImportError):
            versions.append(load("mpi4py.MPI").Get_library_version().splitlines()[0].strip())
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {', '.join(versions)}"


def command_line() -> argparse.Namespace:
    """Read the options."""
    methods = sorted(multiprocessing.get_all_start_methods())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, metavar="N", help="default: 3")
    add("--size", type=float, default=256, metavar="MiB", help="of the big array; default: 256")
    add("--nprocs", type=int, default=2, metavar="N", help="default: 2; a launcher's count instead")
    add("--start-method", choices=methods, default=methods[0], help="default: fork if there is")
    add("--verbs", action="store_true", help="the verbs, by size, beside mpi4py's and the pools'")
    add("--growth", action="store_true", help="verbs on ever more processes")
    add("--mpi", action="store_true", help="the verbs on the ranks that a launcher has started")
    add("--plot", metavar="FILE.png", help="draw the verbs, with matplotlib")
    add("--rows", nargs="+", choices=CASES, default=list(CASES), metavar="ROW",
        help="of the pools, only these")  # fmt: skip
    add("--quick", action="store_true", help="small sizes, one round")
    return parser.parse_args()


def on_these_ranks(sizes: list[int], most: int) -> None:
    """Measure our verbs and mpi4py's, on the ranks that a launcher has started."""
    c = world_of("mpi4py")
    told = {}
    for engine in ("MPI", "mpi4py, buffers", "mpi4py, objects"):
        measured = measure_engine(engine, c.size, [*VERBS, "wait"], sizes, most)
        told[engine] = {f"{name} {c.size}": value for name, value in measured.items()}
    if c.rank == 0:
        print(f"{describe_machine()}, {c.size} ranks\n")
        print_verbs(told, c.size, sizes)


def main() -> int:
    """Measure all peers that are available here; print the tables, and draw the picture."""
    options = command_line()
    rounds = 1 if options.quick else options.rounds
    sizes, counts, most = SIZES, GROWTH, 1000
    if options.quick:
        sizes, counts, most = [8, 1 << 17], [2, 3], 30
    if options.mpi:
        on_these_ranks(sizes, most)
        return 0
    print(f"{describe_machine()}, rounds: {rounds}\n", flush=True)
    with_mpi = available("mpi4py")
    engines = [one for one in ENGINES if with_mpi or one in ("processes", "Pool", "joblib")]
    engines = [one for one in engines if one != "joblib" or available("joblib")]
    if not with_mpi:
        print("MPI is not measured: it needs mpi4py and mpiexec (pip install mpi4py mpich)\n")
    if options.verbs:
        told = measure_engines(rounds, list(VERBS), sizes, [options.nprocs], engines, most)
        print_verbs(told, options.nprocs, sizes)
        if options.plot:
            draw_verbs(told, options.nprocs, sizes, options.plot)
    if options.growth:
        engines = [one for one in engines if one not in ("joblib", "mpi4py, objects")]
        verbs = ["broadcast", "allreduce"]
        small = measure_engines(rounds, ["wait", "run", "map", *verbs], [8], counts, engines, most)
        large = measure_engines(rounds, verbs, [1 << 20], counts, engines, most)
        print_growth({one: {**small[one], **large[one]} for one in engines}, counts)
    if options.verbs or options.growth:
        return 0
    rows = [row for row in CASES if row in options.rows]
    s = Setting(options.nprocs, int(options.size * MIB), 100_000, 5, options.start_method)
    if options.quick:
        rows = [row for row in rows if (CASES[row].nprocs or 0) <= 2]
        s = s._replace(length=MIB, items=2000, repeats=1)
    print(f"{s.nprocs} processes ({s.start_method}), {s.length / MIB:g} MiB of float64, "
          f"{s.items} items\n")  # fmt: skip
    results = measure_all(s, rounds, rows)
    print_pools(medians(results))
    # Failures have been reported already, by `apart`.
    return int(any(len(cell) < rounds for row in results.values() for cell in row.values()))


def measure_cell(kind: str, *cell: Any) -> None:
    """Measure the cell that `apart` has started this process for, and print it as JSON."""
    if kind == "verbs":
        told, over = measure_engine(*cell), cell[0]
    else:
        row, over, setting = cell
        told = measure(row, over, Setting(*setting))
    is_over_mpi = "MPI" in over or "mpi4py" in over
    if world_of("mpi4py" if is_over_mpi else "").rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        measure_cell(*json.loads(sys.argv[2]))
    else:
        sys.exit(main())
