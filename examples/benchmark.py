"""Measure parallelizer against the process pools and mpi4py: every cell in a fresh process.

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
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallelizer import MPIParallelizer, MultiprocessingParallelizer, Parallelizer

MIB = 1 << 20
PATIENCE = 3.0  # seconds after which a cell is repeated no more
LIMIT = 600.0  # seconds after which it counts as failed
UNEVEN = [0.020] * 8 + [0.001] * 56  # seconds that a task takes

Array = NDArray[np.float64]
Results = dict[str, dict[str, list[float]]]  # seconds of each round, by row and peer


class Setting(NamedTuple):
    """What a cell is measured with: sizes in bytes."""

    nprocs: int
    size: int
    items: int
    repeats: int
    start_method: str


# The peers: how each is opened, and the pools brought to one interface.


def load(module: str) -> Any:
    """Import what is optional, and not known to the type checker."""
    return importlib.import_module(module)


class Pool(NamedTuple):
    """What the process pools have in common."""

    call: Callable[[Callable[[Any], Any], Any], Any]  # func(item), on a worker
    map: Callable[[Callable[[Any], Any], Sequence[Any], int | None], Any]  # with chunksize


@contextlib.contextmanager
def opened(pool: Any, chunk: str = "chunksize", **options: Any) -> Iterator[Pool]:
    """Enter a pool that has `apply`, and `map` with the size of its chunks in a keyword."""
    with pool:
        yield Pool(
            lambda func, item: pool.apply(func, (item,)),
            lambda func, items, size: pool.map(func, items, **{chunk: size}, **options),
        )


@contextlib.contextmanager
def open_executor(s: Setting) -> Iterator[Pool]:
    """Open a `ProcessPoolExecutor`, with the chunks of `Pool`, as its own hold one item each."""
    context = multiprocessing.get_context(s.start_method)
    with ProcessPoolExecutor(s.nprocs, mp_context=context) as pool:
        yield Pool(
            lambda func, item: pool.submit(func, item).result(),
            lambda func, items, size: list(
                pool.map(func, items, chunksize=size or -(-len(items) // (4 * s.nprocs)))
            ),
        )


@contextlib.contextmanager
def open_joblib(s: Setting) -> Iterator[Pool]:
    """Open a `joblib.Parallel`; its workers outlive it, so that only the first opening is cold."""
    joblib = load("joblib")
    with joblib.Parallel(n_jobs=s.nprocs) as pool:
        yield Pool(
            lambda func, item: pool([joblib.delayed(func)(item)])[0],
            lambda func, items, _: pool(joblib.delayed(func)(item) for item in items),
        )


def mpi_world() -> Any:
    """All ranks, as mpi4py sees them."""
    return load("mpi4py.MPI").COMM_WORLD


class Peer(NamedTuple):
    """A column: the module whose import is timed, and how to open it."""

    module: str
    open: Callable[[Setting], AbstractContextManager[Any]]


PEERS = {
    "parallelizer": Peer("parallelizer", lambda s: MultiprocessingParallelizer(
        s.nprocs, start_method=s.start_method)),
    "Pool": Peer("multiprocessing.pool", lambda s: opened(
        multiprocessing.get_context(s.start_method).Pool(s.nprocs))),
    "Executor": Peer("concurrent.futures.process", open_executor),
    "joblib": Peer("joblib", open_joblib),
    "mpire": Peer("mpire", lambda s: opened(
        load("mpire").WorkerPool(s.nprocs, start_method=s.start_method, keep_alive=True),
        chunk="chunk_size", concatenate_numpy_output=False)),
    "schwimmbad": Peer("schwimmbad", lambda s: opened(load("schwimmbad").MultiPool(s.nprocs))),
    "local copy": Peer("numpy", lambda _: nullcontext()),
    "MPIParallelizer": Peer("mpi4py", lambda _: MPIParallelizer()),
    "mpi4py": Peer("mpi4py", lambda _: nullcontext(mpi_world())),
}  # fmt: skip
POOLS = ("Pool", "Executor", "joblib", "mpire", "schwimmbad")
OVER_MPI = ("MPIParallelizer", "mpi4py")


# The work: first what the processes do, then how the peers are asked to.


def length(s: Setting) -> int:
    """Numbers in the big array; a user of raw MPI must know that on every rank."""
    return s.size // 8 // s.nprocs * s.nprocs


@functools.cache
def big(s: Setting) -> Array:
    """Make the big array, shape (n,), of whole numbers, so that its sums are exact."""
    return np.resize(np.arange(1021.0), length(s))


def blocks(s: Setting) -> list[Array]:
    """Split the big array, for a pool."""
    return np.array_split(big(s), s.nprocs)


def same(item: Any) -> Any:
    """Return `item`."""
    return item


def square(number: int) -> int:
    """Do next to nothing."""
    return number * number


def burn(seconds: float) -> float:
    """Keep a processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def total(block: Array) -> float:
    """Reduce a block to a number."""
    return float(block.sum())


def sample(data: Array) -> float:
    """Look at a thousand values of `data`, shape (n,), to prove that it is there."""
    return float(data[:: len(data) // 1000 or 1].sum())


def absolute(number: int, *, parallelizer: Parallelizer) -> int:  # noqa: ARG001
    """As `abs`, on every process."""
    return abs(number)


def gather_zero(*, parallelizer: Parallelizer) -> Any:
    """Talk once."""
    return parallelizer.gather(0)


def gather_sample(data: Array, *, parallelizer: Parallelizer) -> Any:
    """Receive the big array as an argument."""
    return parallelizer.gather(sample(data))


def gather_last(data: Array, *, parallelizer: Parallelizer) -> Any:
    """Receive a number, or an array that costs no more than one."""
    return parallelizer.gather(float(np.ravel(data)[-1]))


def sample_beside(_: int, data: Array) -> float:
    """Receive the big array beside an item."""
    return sample(data)


@functools.cache
def shared(p: Parallelizer, s: Setting) -> Any:
    """Share the big array."""
    return p.share(big(s))


def broadcast_sample(data: Array | None = None, *, parallelizer: Parallelizer) -> Any:
    """Receive the big array by `broadcast`; main alone has been given it."""
    received: Any = parallelizer.broadcast(data)
    return parallelizer.gather(sample(received))


def our_broadcast(p: Parallelizer, s: Setting) -> Any:
    """Bring the big array to every process."""
    return p.run(broadcast_sample, main_kwargs={"data": big(s)})


def mpi_broadcast(p: Parallelizer, s: Setting) -> Any:
    """Do the same where all ranks run the script."""
    return broadcast_sample(big(s) if p.on_main else None, parallelizer=p)


def raw_broadcast(world: Any, s: Setting) -> Any:
    """Do the same by mpi4py, into memory of each rank's own."""
    data = big(s) if world.rank == 0 else np.empty(length(s))
    world.Bcast(data)
    return world.gather(sample(data))


def raw_round_trip(world: Any, s: Setting) -> Any:
    """Bring blocks of the big array to the ranks, and the whole back."""
    block = np.empty(length(s) // world.size)
    world.Scatter(big(s) if world.rank == 0 else None, block)
    result = np.empty(length(s)) if world.rank == 0 else None
    world.Gather(block, result)
    return result


def mpi_object(p: Parallelizer, s: Setting) -> Any:
    """Bring the big array to every rank in a dict."""
    data: Any = p.broadcast({"data": big(s)} if p.on_main else None)
    return p.gather(sample(data["data"]))


def raw_object(world: Any, s: Setting) -> Any:
    """Do the same by mpi4py, which pickles it."""
    data = world.bcast({"data": big(s)} if world.rank == 0 else None)
    return world.gather(sample(data["data"]))


# The table of cases.


class Case(NamedTuple):
    """A row."""

    title: str
    works: Mapping[str, Callable[[Any, Setting], Any]]  # by peer; compared with the first
    expected: Callable[[Setting], Any]
    loops: int = 1  # calls that are timed together
    warm: bool = True  # whether the work was done before
    anew: bool = False  # whether the peer is opened for it
    nprocs: int | None = None  # where not the setting's
    size: int | None = None  # likewise, at most


def with_pools(ours: Any, pool: Any, **others: Any) -> dict[str, Any]:
    """Give all pools the same work."""
    return {"parallelizer": ours, **dict.fromkeys(POOLS, pool), **others}


def with_mpi(ours: Any, raw: Any) -> dict[str, Any]:
    """Compare the MPI backend with mpi4py itself."""
    return {"MPIParallelizer": ours, "mpi4py": raw}


def samples(s: Setting) -> list[float]:
    """Expect the big array on every process."""
    return [sample(big(s))] * s.nprocs


CALL = with_pools(lambda p, _: p.run(absolute, 7), lambda pool, _: pool.call(abs, 7))
BROADCASTS: dict[str, Any] = {
    "parallelizer": our_broadcast,
    "local copy": lambda _, s: [sample(big(s).copy())] * s.nprocs,
    "mpi4py": raw_broadcast,
}
GROWTH = {
    f"growth {n}": Case(f"64 MiB to {n} processes", BROADCASTS, samples, nprocs=n, size=64 * MIB)
    for n in (2, 4, 8, 16)
}
CASES = {
    "open": Case("open, one call, close", CALL, lambda _: 7, anew=True),
    "call": Case("one call, open pool", CALL, lambda _: 7, loops=50),
    "gather": Case(
        "run with one gather(0) / apply",
        {"parallelizer": lambda p, _: p.run(gather_zero),
         "Pool": lambda pool, s: [pool.call(abs, 0)] * s.nprocs},
        lambda s: [0] * s.nprocs, loops=50),
    "map": Case(
        "map of trivial items",
        with_pools(lambda p, s: p.map(square, range(s.items)),
                   lambda pool, s: pool.map(square, range(s.items), None)),
        lambda s: [number * number for number in range(s.items)]),
    "uneven": Case(
        "map of 8 x 20 ms and 56 x 1 ms",
        with_pools(lambda p, _: p.map(burn, UNEVEN), lambda pool, _: pool.map(burn, UNEVEN, 1)),
        lambda _: UNEVEN),
    "blocks": Case(
        "blocks out, a number each back",
        with_pools(lambda p, s: p.map(total, big(s), vectorized=True),
                   lambda pool, s: pool.map(total, blocks(s), 1)),
        lambda s: [total(block) for block in blocks(s)]),
    "round trip": Case(
        "blocks out, the array back",
        with_pools(lambda p, s: p.map(same, big(s), vectorized=True),
                   lambda pool, s: np.concatenate(pool.map(same, blocks(s), 1)),
                   mpi4py=raw_round_trip), big),
    "broadcast": Case(
        "the array to every process",
        {**BROADCASTS,
         **dict.fromkeys(POOLS, lambda pool, s: pool.map(sample, [big(s)] * s.nprocs, 1))},
        samples),
    # Of a local copy too, as memory that no process has used yet can be slow to come by.
    "first": Case("the same, first transfer", BROADCASTS, samples, warm=False),
    "argument": Case(
        "the array as an argument of run",
        {"parallelizer": lambda p, s: p.run(gather_sample, big(s))}, samples),
    "extra": Case(
        "the array in extra_args of map",
        {"parallelizer": lambda p, s: p.map(sample_beside, range(s.nprocs), (big(s),))}, samples),
    "number": Case(
        "run with a number as an argument",
        {"parallelizer": lambda p, s: p.run(gather_last, big(s)[-1])},
        lambda s: [float(big(s)[-1])] * s.nprocs, loops=50),
    "shared": Case(
        "run with the array, shared before",
        {"parallelizer": lambda p, s: p.run(gather_last, shared(p, s))},
        lambda s: [float(big(s)[-1])] * s.nprocs, loops=50),
    **GROWTH,
    "import": Case("import, beyond numpy's", with_pools(None, None), lambda _: None),
    "MPI broadcast": Case("array: broadcast", with_mpi(mpi_broadcast, raw_broadcast), samples),
    "MPI 1 MiB": Case(
        "1 MiB: broadcast", with_mpi(mpi_broadcast, raw_broadcast), samples, loops=20, size=MIB),
    "MPI round trip": Case(
        "array: scatter, gather",
        with_mpi(lambda p, s: p.gather(p.scatter(big(s) if p.on_main else None)), raw_round_trip),
        big),
    "MPI object": Case("array in a dict: broadcast", with_mpi(mpi_object, raw_object), samples),
    "MPI small broadcast": Case(
        "small object: broadcast",
        with_mpi(lambda p, _: p.broadcast({"a": 1}), lambda world, _: world.bcast({"a": 1})),
        lambda _: {"a": 1}, loops=200),
    "MPI small gather": Case(
        "small object: gather",
        with_mpi(lambda p, _: p.gather({"a": 1}), lambda world, _: world.gather({"a": 1})),
        lambda s: [{"a": 1}] * s.nprocs, loops=200),
}  # fmt: skip


# Measuring one cell: in a process of its own, or on the ranks that a launcher has started.


def import_seconds(module: str) -> float:
    """Import `module` where nothing but numpy has been imported; twice, as the first compiles."""
    code = f"import numpy, time; t = time.perf_counter(); import {module}; "
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t)"]
    env = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    run = functools.partial(subprocess.run, command, env=env, stdout=subprocess.PIPE, check=True)
    return min(float(run().stdout) for _ in range(2))


def measure(row: str, peer: str, s: Setting) -> float:
    """Seconds of the best repeat, on main; under MPI all ranks call this together."""
    case, (module, opener) = CASES[row], PEERS[peer]
    if row == "import":
        return import_seconds(module)
    s = s._replace(size=min(case.size or s.size, s.size))
    if not case.warm:
        np.ones(s.size // 2)  # a virtual machine may give out again only slowly what lay idle
    on_main = peer not in OVER_MPI or mpi_world().rank == 0

    def work() -> Any:
        with opener(s) if case.anew else nullcontext(held) as handle:
            return case.works[peer](handle, s)

    with nullcontext() if case.anew else opener(s) as held:
        if peer in CALL and not case.anew:
            CALL[peer](held, s)  # lazy pools start their workers now
        # Made after the workers, so that these do not inherit it.
        expected = case.expected(s) if on_main else None
        seconds: list[float] = []
        while len(seconds) < (1 + s.repeats if case.warm else 1):
            seconds.append(timed(work, case.loops, peer, expected))
            # The ranks of MPI must agree on the number of repeats.
            if len(seconds) > 1 and sum(seconds) * case.loops > PATIENCE and peer not in OVER_MPI:
                break
    return min(seconds[1:] or seconds)


def timed(work: Callable[[], Any], loops: int, peer: str, expected: Any) -> float:
    """Seconds that one call takes until it has ended on all ranks; main checks the last result."""
    meet: Callable[[], Any] = mpi_world().Barrier if peer in OVER_MPI else lambda: None
    meet()
    begun = time.perf_counter()
    for _ in range(loops - 1):
        work()
    result = work()
    meet()
    seconds = (time.perf_counter() - begun) / loops
    is_array = isinstance(expected, np.ndarray)
    right = np.array_equal(result, expected) if is_array else result == expected
    if expected is not None and not right:
        wrong = f"{peer}: expected {str(expected)[:200]}, but got {str(result)[:200]}"
        print(wrong, file=sys.stderr, flush=True)
        if peer in OVER_MPI:
            mpi_world().Abort(1)  # or the other ranks would wait
        raise SystemExit(1)
    return seconds


def cell(request: str) -> None:
    """Measure the rows that `request` names; print them as JSON, on main."""
    peer, setting, rows = json.loads(request)
    seconds = {row: measure(row, peer, Setting(*setting)) for row in rows}
    if peer not in OVER_MPI or mpi_world().rank == 0:
        print(json.dumps(seconds), flush=True)


# All cells, round by round.


def find_launcher() -> str | None:
    """Look for mpiexec beside this Python, which need not be on the PATH, then there."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpiexec", path=beside)


def available(peer: str) -> bool:
    """Whether a column can be measured here."""
    found = importlib.util.find_spec(PEERS[peer].module.partition(".")[0])
    return found is not None and (peer not in OVER_MPI or find_launcher() is not None)


def measure_apart(peer: str, s: Setting, rows: list[str]) -> dict[str, float]:
    """Seconds by row, measured by a fresh process (or `nprocs` ranks); none where it failed."""
    command = [sys.executable, __file__, "cell", json.dumps([peer, s, rows])]
    if peer in OVER_MPI:
        command = [find_launcher() or "mpiexec", "-n", str(s.nprocs), *command]
    # Open MPI counts cores, and wants a word before it runs as root.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    run = functools.partial(subprocess.run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        done = run(command, env={**allowed, **os.environ}, timeout=LIMIT, check=True)
        seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.SubprocessError as error:
        print(f"{peer}: {rows}: {error}", file=sys.stderr)
        return {}
    return seconds


def plan(
    s: Setting, quick: bool, launched: bool, chosen: Sequence[str] = (), number: int = 0
) -> list[tuple[str, Setting, list[str]]]:
    """What the steps of a round measure: a cell each; if `quick`, a column each.

    In each round another peer begins, as the first to use memory may pay for all.
    """
    steps: dict[Any, tuple[str, Setting, list[str]]] = {}
    for row, case in CASES.items():
        if chosen and row not in chosen:
            continue
        if (launched and not row.startswith("MPI")) or (quick and (case.nprocs or 0) > 2):
            continue
        peers = [peer for peer in case.works if launched or available(peer)]
        for peer in [*peers[number % len(peers) :], *peers[: number % len(peers)]] if peers else []:
            its = s._replace(nprocs=case.nprocs or s.nprocs)
            step = steps.setdefault((peer, its if quick else row), (peer, its, []))
            step[2].append(row)
    return list(steps.values())


def measure_all(
    s: Setting, rounds: int, quick: bool, launched: bool, chosen: Sequence[str]
) -> Results:
    """Go round by round through fresh processes, or stay on the ranks that were launched."""
    results: Results = {row: {} for row in CASES}
    for number in range(1, rounds + 1):
        for peer, its, rows in plan(s, quick, launched, chosen, number):
            if not launched:
                print(f"round {number} of {rounds}: {peer}: {', '.join(rows)}", file=sys.stderr)
                seconds = measure_apart(peer, its, rows)
            else:
                seconds = {row: measure(row, peer, its) for row in rows}
            for row in seconds:
                results[row].setdefault(peer, []).append(seconds[row])
    return results


# The table and the picture.


def medians(results: Results, row: str) -> dict[str, float]:
    """Milliseconds of a row, by peer, in the order of the columns."""
    rounds = results.get(row, {})
    return {peer: 1e3 * statistics.median(rounds[peer]) for peer in PEERS if peer in rounds}


def sections(results: Results) -> list[list[str]]:
    """Rows that were measured, those of multiprocessing and those of MPI apart."""
    measured = [row for row in CASES if results.get(row)]
    groups = itertools.groupby(measured, lambda row: row.startswith("MPI"))
    return [list(rows) for _, rows in groups]


def entry(milliseconds: float | None, ours: float | None) -> str:
    """A peer's time, and its ratio to ours where that is another."""
    if milliseconds is None:
        return "-"
    text = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
    return text if ours in (None, milliseconds) else f"{text} ({milliseconds / ours:.2g}x)"


def print_table(results: Results, rows: Sequence[str]) -> None:
    """Print aligned columns, which Markdown takes for a table too."""
    peers = [peer for peer in PEERS if any(peer in CASES[row].works for row in rows)]
    lines = [["milliseconds (ratio to ours)", *peers]]
    for row in rows:
        values, ours = medians(results, row), next(iter(CASES[row].works))
        cells = [entry(values.get(peer), values.get(ours)) for peer in peers]
        lines.append([CASES[row].title, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(padded)} |")
    print()


def report(results: Results, s: Setting, rounds: int) -> None:
    """Print what was measured, where, and the tables."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("numpy", "joblib", "mpire", "schwimmbad", "mpi4py"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {', '.join(versions)}")
    print(f"{s.nprocs} processes ({s.start_method}), {s.size / MIB:g} MiB of float64, "
          f"{s.items} items, rounds: {rounds}\n")  # fmt: skip
    for rows in sections(results):
        print_table(results, rows)
    for first, second in (("first", "broadcast"), ("growth 16", "growth 2")):
        values = [medians(results, row).get("parallelizer") for row in (first, second)]
        if values[0] and values[1]:
            print(f"{CASES[first].title} / {CASES[second].title}: {values[0] / values[1]:.2f}")


def draw(results: Results, filename: str) -> None:
    """Draw a group of bars for each row, a bar for each peer, on a logarithmic scale."""
    try:
        pyplot = load("matplotlib.pyplot")
    except ModuleNotFoundError as why:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from why
    parts = sections(results)
    heights = [1 + 0.6 * len(rows) for rows in parts]
    options = {"squeeze": False, "layout": "constrained", "height_ratios": heights}
    figure, axes = pyplot.subplots(len(parts), figsize=(10, sum(heights)), **options)
    for axis, rows in zip(axes[:, 0], parts, strict=True):
        for number, peer in enumerate(PEERS):
            bars = []  # of a row, the bars stand close, whichever peers it has
            for position, row in enumerate(rows):
                values = medians(results, row)
                if peer in values:
                    offset = list(values).index(peer) - (len(values) - 1) / 2
                    bars.append((position + 0.11 * offset, values[peer]))
            if bars:
                axis.barh(*zip(*bars, strict=True), height=0.1, color=f"C{number}", label=peer)
        axis.set(xscale="log", xlabel="milliseconds")
        axis.set_yticks(range(len(rows)), [CASES[row].title for row in rows])
        axis.invert_yaxis()
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
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
    add("--rows", nargs="+", choices=CASES, default=[], metavar="ROW", help="only these")
    add("--quick", action="store_true", help="small sizes, one round")
    return parser.parse_args()


def main() -> int:
    """Measure what can be measured here; print it, and draw it."""
    options = command_line()
    rounds = 1 if options.quick else options.rounds
    s = Setting(options.nprocs, int(options.size * MIB), 100_000, 5, options.start_method)
    if options.quick:
        s = s._replace(size=MIB, items=2000, repeats=1)
    ours = Parallelizer.lookup("auto")  # over MPI where a launcher has started this
    launched = isinstance(ours, MPIParallelizer)
    if launched:
        s = s._replace(nprocs=ours.nprocs, start_method="MPI")
    results = measure_all(s, rounds, options.quick, launched, options.rows)
    if launched and not ours.on_main:
        return 0
    report(results, s, rounds)
    if not launched and not available("mpi4py"):
        print("MPI was not measured: it needs mpi4py and mpiexec (pip install mpi4py mpich)")
    if options.plot:
        draw(results, options.plot)
    steps = plan(s, options.quick, launched, options.rows)
    counts = [len(results[row].get(peer, ())) for peer, _, rows in steps for row in rows]
    return 0 if min(counts) == rounds else 1  # what failed has been said


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        cell(sys.argv[2])
    else:
        sys.exit(main())
