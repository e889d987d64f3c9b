"""Independent jobs on many machines or cores: through Ray, through processes, or one after another in this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, TypeVar

from typebar.isa.errors import TypebarError

KINDS = ("auto", "ray", "processes", "inline")
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class WorkerError(TypebarError):
    """A worker, or the cluster, was lost; the message says what to do."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Executor:
    """Where jobs run: `kind` is one of KINDS, `address` a running Ray cluster's ("auto" finds one on this machine).

    `auto` is Ray where it is installed, else processes; and neither for a single worker without an address.
    """

    kind: str = "auto"
    workers: int = field(default_factory=cores)
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            TypebarError: an unknown kind, no workers, or an address for what has none.
        """
        if self.kind not in KINDS:
            raise TypebarError(f"executor cannot be {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.workers < 1:
            raise TypebarError(f"workers must be at least 1, not {self.workers}")
        if self.address is not None and self.kind not in ("auto", "ray"):
            raise TypebarError(f"address is a Ray cluster's, and {self.kind} has none: leave one of the two out")

    def chosen(self) -> str:
        """The kind that `auto` comes to here."""
        if self.kind != "auto":
            return self.kind
        if self.address is not None:
            return "ray"
        if self.workers == 1:
            return "inline"
        return "ray" if find_spec("ray") is not None else "processes"


def run_all(
    executor: Executor, function: Callable[[_Job], _Result], jobs: Sequence[_Job]
) -> tuple[Iterator[_Result], Callable[[], str]]:
    """The results of a function, importable by name, on every job, as they come; and what ran them, in words.

    Closing the iterator, or an interruption, ends all that was started. The words are complete once it is exhausted.

    Raises:
        TypebarError: from the iterator, if Ray is wanted and missing or no cluster answers, or a worker is lost.
    """
    kind = executor.chosen()
    words = [{"inline": "this process", "processes": f"{executor.workers} processes"}.get(kind, "Ray")]
    if executor.kind == "auto" and kind == "processes":
        words[0] += " (Ray is not installed: pip install 'typebar[explore]' to use many machines)"
    if kind == "ray":
        return _ray(executor, function, jobs, words), lambda: words[0]
    runs = _processes(executor.workers, function, jobs) if kind == "processes" else map(function, jobs)
    return iter(runs), lambda: words[0]


def _ray(
    executor: Executor, function: Callable[[_Job], _Result], jobs: Sequence[_Job], words: list[str]
) -> Iterator[_Result]:
    """Through a cluster that is there, or one of this machine's that ends with the iterator."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call its makers
    try:
        import ray
    except ImportError:
        raise TypebarError("Ray is not installed: pip install 'typebar[explore]', or choose processes") from None
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if executor.address is None:
            ray.init(address="local", num_cpus=executor.workers, include_dashboard=False, **quiet)
        else:
            ray.init(address=executor.address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise WorkerError(f"no Ray cluster at {executor.address or 'this machine'}: {text}") from None
    try:
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        words[0] = f"Ray, {int(ray.cluster_resources().get('CPU', 0))} CPUs on {nodes} machine{'s' * (nodes != 1)}"
        remote = ray.remote(function)
        waiting = [remote.remote(job) for job in jobs]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayError as error:
        raise WorkerError(f"Ray lost a job: {' '.join(str(error).split())}") from None
    finally:
        ray.shutdown()


def _processes(workers: int, function: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
    """Through fresh processes (threads of torch and Numba do not survive a fork), ended with the iterator."""
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)) or 1, context, initializer=_leave_interrupts_to_parent)
    try:
        for run in as_completed([pool.submit(function, job) for job in jobs]):
            yield run.result()
    except BrokenProcessPool:
        raise WorkerError("a worker process was lost, perhaps for want of memory: use fewer workers") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
