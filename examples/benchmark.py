"""7. How fast it is, beside the process pools and mpi4py: every cell in a fresh process.

    python examples/benchmark.py                      # the whole table at 256 MiB: ten minutes
    python examples/benchmark.py --rounds 5 --plot benchmark.png
    python examples/benchmark.py --quick              # does it work? its times say little
    mpiexec -n 4 python examples/benchmark.py         # the rows of MPI alone, on these ranks

A cell is the best of several repeats on a pool that is open and warm (unless its row says
otherwise), and the median of that over the rounds; in a round the peers take turns, row by row.
Every result is checked; an array that stays on another process, by a sample. Of joblib (loky),
mpire, schwimmbad and mpi4py, those are measured that are installed. A pool computes on `nprocs`
workers; parallelizer and MPI on as many processes, main among them.
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

MIB = (1 << 20) // 8  # in numbers
PATIENCE = 3.0  # seconds after which a cell is repeated no more
LIMIT = 600.0  # seconds after which it counts as failed
MPIEXEC = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
RATIOS = (("first", "broadcast"), ("growth 16", "growth 2"))  # rows, compared at the end
UNEVEN = [0.020] * 8 + [0.001] * 56  # seconds that a task takes

Array = NDArray[np.float64]
Results = dict[str, dict[str, list[float]]]  # seconds of each round, by row and peer
Table = dict[str, dict[str, float]]  # their medians, in milliseconds


class Setting(NamedTuple):
    """What a cell is measured with."""

    nprocs: int
    length: int  # of the big array, in numbers; the ranks of raw MPI must know that
    items: int
    repeats: int
    start_method: str


# The columns: how each peer is opened, and the pools brought to one interface.

load = importlib.import_module  # of what is optional


def world_of(peer: str) -> Any:
    """All ranks, as mpi4py sees them; or main alone, where the peer is another."""
    if peer in OVER_MPI:
        return load("mpi4py.MPI").COMM_WORLD
    return SimpleNamespace(rank=0, Barrier=lambda: None, Abort=sys.exit)


@contextlib.contextmanager
def opened(
    pool: Any,
    call: Any = lambda pool, func, item: pool.apply(func, (item,)),
    over: Any = lambda pool, func, items, chunk: pool.map(func, items, chunksize=chunk),
) -> Iterator[SimpleNamespace]:
    """Enter a pool; `call` and `over` are how it calls and maps, where not as multiprocessing's."""
    with pool:
        yield SimpleNamespace(call=functools.partial(call, pool), map=functools.partial(over, pool))


def open_joblib(s: Setting) -> Any:
    """Open a `joblib.Parallel`; its workers outlive it, so that only the first opening is cold."""
    joblib = load("joblib")
    return opened(
        joblib.Parallel(n_jobs=s.nprocs),
        lambda pool, func, item: pool([joblib.delayed(func)(item)])[0],
        lambda pool, func, items, _: pool(joblib.delayed(func)(item) for item in items),
    )


# By name: the module whose import is timed, and how to open it. An Executor gets the chunks of
# Pool, as its own hold one item each.
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
    "MPIParallelizer": ("mpi4py", lambda _: MPIParallelizer()),
    "mpi4py": ("mpi4py", lambda _: contextlib.nullcontext(world_of("mpi4py"))),
}  # fmt: skip
OVER_MPI = ("MPIParallelizer", "mpi4py")


# The work, as far as processes must find it by its name.


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
    """Look at a thousand values of an array, the last argument, to prove that it is there."""
    data = arguments[-1]
    return float(data[:: len(data) // 1000 or 1].sum())


def absolute(number: int, *, parallelizer: Parallelizer) -> int:  # noqa: ARG001
    """As `abs`, on every process."""
    return abs(number)


def everywhere(func: Callable[[Any], Any], data: Any, *, parallelizer: Parallelizer) -> Any:
    """Call `func(data)` on every process, and gather what it returns."""
    return parallelizer.gather(func(data))


def broadcast(data: Array | None = None, *, parallelizer: Parallelizer) -> Any:
    """Bring `data`, which main alone was given, to every process."""
    received: Any = parallelizer.broadcast(data)
    return parallelizer.gather(sample(received))


def raw_broadcast(world: Any, s: Setting) -> Any:
    """Do the same by mpi4py, into memory of each rank's own."""
    data = big(s) if world.rank == 0 else np.empty(s.length)
    world.Bcast(data)
    return world.gather(sample(data))


def raw_round_trip(world: Any, s: Setting) -> Any:
    """Bring blocks of the big array to the ranks, and the whole back."""
    block = np.empty(s.length // world.size)
    world.Scatter(big(s) if world.rank == 0 else None, block)
    result = np.empty(s.length) if world.rank == 0 else None
    world.Gather(block, result)
    return result


# The rows: by peer, what it does, of which the first is ours; p is a parallelizer, q a pool, c a
# communicator, and s the setting.


class Case(NamedTuple):
    """A row."""

    title: str
    works: dict[str, Any]
    expected: Callable[[Setting], Any] = lambda s: [sample(big(s))] * s.nprocs
    loops: int = 1  # calls that are timed together
    warm: bool = True  # whether the work was done before
    anew: bool = False  # whether the peer is opened for it
    nprocs: int | None = None  # where not the setting's
    length: int = sys.maxsize  # at most


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
MPI_BROADCAST: dict[str, Any] = {
    "MPIParallelizer": lambda p, s: broadcast(big(s) if p.on_main else None, parallelizer=p),
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
    # Of a local copy too, as memory that no process has used yet can be slow to come by.
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
    "MPI broadcast": Case("array: broadcast", MPI_BROADCAST),
    "MPI 1 MiB": Case("1 MiB: broadcast", MPI_BROADCAST, loops=20, length=MIB),
    "MPI round trip": Case("array: scatter, gather", {
        "MPIParallelizer": lambda p, s: p.gather(p.scatter(big(s) if p.on_main else None)),
        "mpi4py": raw_round_trip,
    }, big),
    "MPI object": Case("array in a dict: broadcast", {
        "MPIParallelizer": lambda p, s: p.gather(
            sample(p.broadcast({"data": big(s)} if p.on_main else None)["data"])),
        "mpi4py": lambda c, s: c.gather(
            sample(c.bcast({"data": big(s)} if c.rank == 0 else None)["data"])),
    }),
    "MPI small broadcast": Case("small object: broadcast", {
        "MPIParallelizer": lambda p, _: p.broadcast({"a": 1}),
        "mpi4py": lambda c, _: c.bcast({"a": 1}),
    }, lambda _: {"a": 1}, loops=200),
    "MPI small gather": Case("small object: gather", {
        "MPIParallelizer": lambda p, _: p.gather({"a": 1}),
        "mpi4py": lambda c, _: c.gather({"a": 1}),
    }, lambda s: [{"a": 1}] * s.nprocs, loops=200),
}  # fmt: skip


# A cell: measured in a process of its own, or on the ranks that a launcher has started.


def import_seconds(module: str) -> float:
    """Import `module` where nothing but numpy has been imported; twice, as the first compiles."""
    code = f"import numpy, time; t = time.perf_counter(); import {module}; "
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t)"]
    env = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    return min(float(subprocess.check_output(command, env=env)) for _ in range(2))


def measure(row: str, peer: str, s: Setting) -> float:
    """Seconds of the best repeat; under MPI all ranks call this together, and main checks."""
    case, (module, opener), world = CASES[row], PEERS[peer], world_of(peer)
    if row == "import":
        return import_seconds(module)
    if not case.warm:
        np.ones(4 * s.length)  # a virtual machine may give out again only slowly what lay idle

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
            CALL[peer](held, s)  # lazy pools start their workers now
        # Made after the workers, so that these do not inherit it.
        expected: Any = case.expected(s) if world.rank == 0 else None
        seconds = [repeat()]
        while case.warm and len(seconds) <= s.repeats:
            seconds.append(repeat())
            # The ranks of MPI must agree on the number of repeats.
            if sum(seconds) * case.loops > PATIENCE and peer not in OVER_MPI:
                break
    return min(seconds[1:] or seconds)


def measure_apart(row: str, peer: str, s: Setting) -> list[float]:
    """Seconds as measured by a fresh process (or `nprocs` ranks); none where it failed."""
    command = [sys.executable, __file__, "cell", json.dumps([row, peer, s])]
    if peer in OVER_MPI:
        command = [MPIEXEC or "mpiexec", "-n", str(s.nprocs), *command]
    # Open MPI counts cores, and wants a word before it runs as root.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    run = functools.partial(subprocess.check_output, stdin=subprocess.DEVNULL, timeout=LIMIT)
    try:
        return [float(run(command, env={**allowed, **os.environ}).splitlines()[-1])]
    except subprocess.SubprocessError as error:
        print(f"{row}: {peer}: {error}", file=sys.stderr)
        return []


# All cells, round by round.


def available(peer: str) -> bool:
    """Whether a column can be measured here."""
    found = importlib.util.find_spec(PEERS[peer][0].partition(".")[0])
    return found is not None and (peer not in OVER_MPI or MPIEXEC is not None)


def measure_all(s: Setting, rounds: int, rows: list[str], launched: bool) -> Results:
    """Take a cell at a time; in each round another peer begins, as the first may pay for all."""
    results: Results = {}
    for number, row in itertools.product(range(1, rounds + 1), rows):
        case = CASES[row]
        nprocs = case.nprocs or s.nprocs
        its = s._replace(nprocs=nprocs, length=min(case.length, s.length) // nprocs * nprocs)
        peers = [peer for peer in case.works if launched or available(peer)]
        for turn in range(len(peers)):
            peer = peers[(number + turn) % len(peers)]
            if launched:
                seconds = [measure(row, peer, its)]
            else:
                print(f"round {number} of {rounds}: {row}: {peer}", file=sys.stderr)
                seconds = measure_apart(row, peer, its)
            results.setdefault(row, {}).setdefault(peer, []).extend(seconds)
    return results


# The table and the picture.


def tables(results: Results) -> list[Table]:
    """Milliseconds, the medians; the rows of multiprocessing and those of MPI apart."""
    groups = itertools.groupby(results, lambda row: row.startswith("MPI"))
    return [
        {row: {p: 1e3 * statistics.median(results[row][p]) for p in PEERS if results[row].get(p)}
         for row in rows}
        for _, rows in groups
    ]  # fmt: skip


def entry(milliseconds: float | None, ours: float | None) -> str:
    """A peer's time, and its ratio to ours where that is another."""
    if milliseconds is None:
        return "-"
    text = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
    return text if ours in (None, milliseconds) else f"{text} ({milliseconds / ours:.2g}x)"


def print_table(part: Table) -> None:
    """Print aligned columns, which Markdown takes for a table too."""
    peers = [peer for peer in PEERS if any(peer in CASES[row].works for row in part)]
    lines = [["milliseconds (ratio to ours)", *peers]]
    for row, values in part.items():
        ours = values.get(next(iter(CASES[row].works)))
        lines.append([CASES[row].title, *(entry(values.get(peer), ours) for peer in peers)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print(f"| {' | '.join(map(str.ljust, line, widths))} |")
    print()


def report(parts: list[Table], s: Setting, rounds: int) -> None:
    """Print what was measured, where, and the tables."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("numpy", "joblib", "mpire", "schwimmbad", "mpi4py"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {', '.join(versions)}")
    print(f"{s.nprocs} processes ({s.start_method}), {s.length / MIB:g} MiB of float64, "
          f"{s.items} items, rounds: {rounds}\n")  # fmt: skip
    for part in parts:
        print_table(part)
    for part, (first, second) in itertools.product(parts[:1], RATIOS):
        if "parallelizer" in part.get(first, {}) and "parallelizer" in part.get(second, {}):
            ratio = part[first]["parallelizer"] / part[second]["parallelizer"]
            print(f"{CASES[first].title} / {CASES[second].title}: {ratio:.2f}")


def draw(parts: list[Table], filename: str) -> None:
    """Draw a group of bars for each row, a bar for each peer, on a logarithmic scale."""
    heights = [1 + 0.6 * len(part) for part in parts]
    options = {"squeeze": False, "layout": "constrained", "height_ratios": heights}
    pyplot = load("matplotlib.pyplot")  # pip install matplotlib
    figure, axes = pyplot.subplots(len(parts), figsize=(10, sum(heights)), **options)
    for axis, part in zip(axes[:, 0], parts, strict=True):
        bars = {}  # of each peer the last, for the legend
        for position, values in enumerate(part.values()):
            for number, peer in enumerate(values):
                place = position + 0.11 * (number - (len(values) - 1) / 2)
                color = f"C{list(PEERS).index(peer)}"
                bars[peer] = axis.barh(place, values[peer], 0.1, color=color)
        axis.set(xscale="log", xlabel="milliseconds")
        axis.set_yticks(range(len(part)), [CASES[row].title for row in part])
        axis.margins(y=0.01)
        axis.invert_yaxis()
        axis.legend(bars.values(), bars, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(filename, dpi=150)


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
    add("--plot", metavar="FILE.png", help="draw the table, with matplotlib")
    add("--rows", nargs="+", choices=CASES, default=list(CASES), metavar="ROW", help="only these")
    add("--quick", action="store_true", help="small sizes, one round")
    return parser.parse_args()


def main() -> int:
    """Measure what can be measured here; print it, and draw it."""
    options = command_line()
    rounds, rows = options.rounds, [row for row in CASES if row in options.rows]
    s = Setting(options.nprocs, int(options.size * MIB), 100_000, 5, options.start_method)
    if options.quick:
        rounds, rows = 1, [row for row in rows if (CASES[row].nprocs or 0) <= 2]
        s = s._replace(length=MIB, items=2000, repeats=1)
    ours = Parallelizer.lookup("auto")  # over MPI where a launcher has started this
    launched = isinstance(ours, MPIParallelizer)
    if launched:
        rows = [row for row in rows if row.startswith("MPI")]
        s = s._replace(nprocs=ours.nprocs, start_method="MPI")
    results = measure_all(s, rounds, rows, launched)
    if launched and not ours.on_main:
        return 0
    parts = tables(results)
    report(parts, s, rounds)
    if not launched and not available("mpi4py"):
        print("MPI was not measured: it needs mpi4py and mpiexec (pip install mpi4py mpich)")
    if options.plot:
        draw(parts, options.plot)
    # What failed has been said.
    return int(any(len(cell) < rounds for row in results.values() for cell in row.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        row, peer, setting = json.loads(sys.argv[2])
        seconds = measure(row, peer, Setting(*setting))
        if world_of(peer).rank == 0:
            print(seconds)
    else:
        sys.exit(main())
