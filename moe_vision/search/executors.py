"""Where jobs run: here one after the other, in processes of this machine, or as tasks of a Ray cluster.

An executor takes independent jobs and gives each back when it has ended, with its result or the error that it raised.
What is not a fault of the job, a full disk or a lost cluster, ends the search instead.
"""

import errno
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import torch
from accelerate.utils import patch_environment

from moe_vision.search.config import LocalExecutor, RayExecutor
from moe_vision.search.jobs import Job, Result, end_with, run_job
from moe_vision.search.methods import SearchError
from moe_vision.training.checkpoints import WriteError
from moe_vision.training.output import OutputError

ATTEMPTS = 3
"""How often a job may take its process with it before it counts as failed."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Ended = tuple[Job, Result | str]
"""A job with its result, or what went wrong."""

Begun = Callable[[Job], None]


class Executor(Protocol):
    def run(self, jobs: Sequence[Job], begun: Begun) -> Iterator[Ended]:
        """Run jobs, telling `begun` of each as it starts; yields each as it ends."""
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...


def executor_of(config: LocalExecutor | RayExecutor, processes_per_trial: int) -> Executor:
    """Raises SearchError where it cannot work here."""
    if isinstance(config, RayExecutor):
        return Ray(config)
    return InTurn(config.threads) if config.processes == 1 else Processes(config, processes_per_trial)


def attempt(job: Job) -> Result | str:
    """The result of a job, or its error as text. Raises WriteError and OSError where there is no room to write, and
    SearchError where the job's folder is another's: that is no fault of the job."""
    try:
        return run_job(job)
    except Exception as error:
        if isinstance(error, WriteError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
            raise
        if isinstance(error, OutputError):
            raise SearchError(
                f"{error}. Was this search's output moved or copied? Its trials name its place: put it back"
            ) from error
        where = traceback.format_exc(limit=-3)
        return f"{type(error).__name__}: {error}\n{where}"


class InTurn:
    """In this process, one after the other."""

    def __init__(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)

    def run(self, jobs: Sequence[Job], begun: Begun) -> Iterator[Ended]:
        for job in jobs:
            begun(job)
            yield job, attempt(job)

    def close(self) -> None:
        pass


def enter_worker(threads: int, driver: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=end_with, args=(driver,), daemon=True).start()


class Worker:
    """A process that does one job after the other. gpus: those it sees, as CUDA_VISIBLE_DEVICES names them; all that
    the driver sees if null."""

    def __init__(self, threads: int, gpus: str | None) -> None:
        others = set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), enter_worker, (threads, os.getpid()))
        # A process takes its variables with it when it begins; once libraries are imported CUDA may know them already.
        with patch_environment(**({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})):
            self.pool.submit(os.getpid)
        self.processes = set(multiprocessing.active_children()) - others

    def close(self) -> None:
        # Else Python would wait for what it is at: one that trains ends its job when it is told to end, not itself.
        for process in self.processes:
            process.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)


class Processes:
    """In processes of this machine, which share its GPUs; one that dies takes no other job with it.

    gpus: how many a job trains on.
    """

    def __init__(self, config: LocalExecutor, gpus: int = 1) -> None:
        self.threads = config.threads or max(1, (os.cpu_count() or 1) // config.processes)
        self.gpus = [gpus_of(place, gpus) for place in range(config.processes)]
        self.workers: dict[int, Worker] = {}

    def run(self, jobs: Sequence[Job], begun: Begun) -> Iterator[Ended]:
        waiting, suspects = list(jobs), list[Job]()
        running = dict[Future[Result | str], tuple[Job, int]]()
        deaths: dict[str, int] = {}
        while waiting or suspects or running:
            free = [place for place in range(len(self.gpus)) if place not in {taken for _, taken in running.values()}]
            while waiting and free and not suspects:
                self.submit(waiting.pop(0), free.pop(0), running, begun)
            if suspects and not running:  # alone, so that its death is its own: what grew beside it may be the cause
                self.submit(suspects.pop(0), free.pop(0), running, begun)
            alone = len(running) == 1
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, place = running.pop(future)
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield job, future.result()
                    continue
                self.workers.pop(place).close()
                deaths[job.key] = deaths.get(job.key, 0) + alone
                if deaths[job.key] < ATTEMPTS:
                    suspects.append(job)
                else:
                    yield job, f"its process died {ATTEMPTS} times while nothing else ran: out of memory, or killed"

    def submit(
        self, job: Job, place: int, running: dict[Future[Result | str], tuple[Job, int]], begun: Begun
    ) -> None:  # fmt: skip
        begun(job)
        if place not in self.workers:
            self.workers[place] = Worker(self.threads, self.gpus[place])
        try:
            future = self.workers[place].pool.submit(attempt, job)
        except BrokenProcessPool:  # it died with nothing to do
            self.workers[place] = Worker(self.threads, self.gpus[place])
            future = self.workers[place].pool.submit(attempt, job)
        running[future] = job, place

    def close(self) -> None:
        while self.workers:
            self.workers.popitem()[1].close()


def gpus_of(place: int, count: int) -> str | None:
    """The GPUs of the process at this place, `count` of those that are here, in turn; null where that is all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = range(torch.cuda.device_count())
    names = visible.split(",")[: len(here)] if visible else [str(number) for number in here]
    if len(names) <= count:
        return None
    return ",".join(names[(place * count + number) % len(names)] for number in range(count))


class Ray:
    """As tasks of a Ray cluster: the one at `address`, or one that is started on this machine. Ray runs a task again
    whose worker or machine is lost."""

    def __init__(self, config: RayExecutor) -> None:
        try:
            import ray
        except ImportError:
            raise SearchError(
                "executor ray needs Ray: pip install 'moe-vision[ray]', or leave the executor out"
            ) from None
        self.ray: Any = ray
        self.mine = not ray.is_initialized()
        if self.mine:
            ray.init(
                address=config.address, log_to_driver=False, include_dashboard=False if not config.address else None
            )
        offered = ray.cluster_resources()
        for what, wanted in (("CPU", config.cpus), ("GPU", config.gpus)):
            if wanted > offered.get(what, 0):
                self.close()
                raise SearchError(f"executor ray asks for {wanted:g} {what} a trial, the cluster has "
                                  f"{offered.get(what, 0):g}: ask for less, or join machines to it")  # fmt: skip
        self.task = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=ATTEMPTS)(attempt_with)
        self.threads = max(1, int(config.cpus))

    def run(self, jobs: Sequence[Job], begun: Begun) -> Iterator[Ended]:
        running = {}
        for job in jobs:
            begun(job)
            running[self.task.remote(job, self.threads)] = job
        while running:
            (reference,), _ = self.ray.wait(list(running), num_returns=1)
            job = running.pop(reference)
            try:
                yield job, self.ray.get(reference)
            except self.ray.exceptions.WorkerCrashedError as error:
                yield job, f"its worker died {ATTEMPTS + 1} times: {error}"

    def close(self) -> None:
        if self.mine:
            self.ray.shutdown()


def attempt_with(job: Job, threads: int) -> Result | str:
    torch.set_num_threads(threads)
    return attempt(job)
