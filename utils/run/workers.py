"""Many jobs at once, in processes of their own: what one does to its process, no other suffers."""

import signal
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from contextlib import suppress

import joblib
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import TerminatedWorkerError

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""As torch reads it when it is imported."""

Jobs = Mapping[Hashable, object]
Results = Iterator[tuple[Hashable, object]]


class Killed(Exception):
    """The result of a job that kills its worker, even if it is the only one."""

    def __str__(self) -> str:
        return "its worker was killed again and again: is memory short?"


def workers_for(device: object) -> int:
    """How many workers suit a torch device: one for each core of a CPU, a single one for a GPU."""
    return joblib.cpu_count() if str(device) == "cpu" else 1


def in_workers(call: Callable, jobs: Jobs, *, workers: int | Executor) -> Results:
    """Key and result of every job as they come; `jobs` maps a key to the argument of `call`.

    `workers` processes of one torch thread each do them (a single one, too, is not this process: a
    job could kill it), or an Executor, such as that of a Dask client. They are gone when this ends,
    even by Ctrl-C. Where `call` raises, the exception is the result, and the other jobs go on.

    If a worker is killed, what is not done is begun once more, and then one by one: the result of a
    job whose worker is killed then, too, is `Killed`.
    """
    waiting = dict(jobs)
    for alone in (False, False, True):
        parts = [{key: job} for key, job in waiting.items()] if alone else [dict(waiting)]
        for part in filter(None, parts):  # nothing left to do: no processes
            for key, result in _results(call, part, workers):
                del waiting[key]
                yield key, result
    yield from ((key, Killed()) for key in waiting)


def _results(call: Callable, jobs: Jobs, workers: int | Executor) -> Results:
    """Key and result of the jobs as they come, without those under way when a worker is killed."""
    own = isinstance(workers, int)
    # A Ctrl-C, which reaches all processes of a terminal or a notebook, ends a worker silently.
    ends_by_signal = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    pool = ProcessPoolExecutor(workers, env=ONE_THREAD, **ends_by_signal) if own else workers
    keys = {}
    try:
        with suppress(TerminatedWorkerError):  # by the first jobs, before the last is handed out
            for key, job in jobs.items():
                keys[pool.submit(call, job)] = key
        while keys:
            # The limit: Windows sees a Ctrl-C between two waits only.
            for future in wait(keys, timeout=1, return_when=FIRST_COMPLETED).done:
                key, error = keys.pop(future), future.exception()
                if type(error).__name__ == "KilledWorker":  # Dask has tried it again and again
                    error = Killed()
                if not isinstance(error, TerminatedWorkerError):
                    yield key, future.result() if error is None else error
    finally:
        if own:
            pool.shutdown(kill_workers=bool(keys))  # with jobs left: they are not waited for
