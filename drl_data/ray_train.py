"""A training on workers of Ray Train: who starts them, hears of them, and tells them to stop.

Ray Train places the workers, joins them in a process group of PyTorch, and when one dies starts
all of them again; they continue from the newest checkpoint. Checkpoints are written where Ray Train
keeps those of the run, as the same files as without Ray, so that either continues what the other
began. Features never travel through Ray's object store: each worker opens the stores itself.

    driver    starts the trainer in a thread, asks the link for news, passes signals on
    link      an actor beside the driver: progress, errors, the wish to stop
    workers   `work(venue)`, in step with each other
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from drl_data.errors import DrlDataError, ExecutionError, StoppedError, UserError, redacted
from drl_data.executors import POLL_S, WARN_AFTER_S, connected_ray
from drl_data.progress import SILENT, Bar, Progress
from drl_data.ranks import Ranks
from drl_data.stopping import Stop
from drl_data.train_checkpoints import RAY_RUNS, Checkpoints
from drl_data.train_spec import TrainRunSpec
from drl_data.training import Venue

try:
    import ray
    import ray.train
    import ray.train.torch
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise UserError(
        f"executor: ray needs Ray Train, which cannot be imported ({error}); install it with "
        "`pip install 'drl-data[train]'`"
    ) from error

log = logging.getLogger(__name__)

OTHERS_S = 5.0
"""A worker that failed waits so long for the others to fail too."""

Work = Callable[[Venue], None]
"""What every worker does; it must be importable, and its arguments are pickled."""


@dataclass
class News:
    """What the link knows of the workers."""

    ready: set[int] = field(default_factory=set)
    """Ranks that began, of the present start."""
    bar: tuple[str, int, str] | None = None
    done: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    errors: dict[int, tuple[bool, str]] = field(default_factory=dict)
    """Rank -> (whether it is the user's mistake, message) of errors that another start would meet
    again."""
    stops: bool = False


class _Link:
    """The actor between the driver and the workers."""

    def __init__(self) -> None:
        self._news = News()

    def news(self) -> News:
        """For the driver."""
        return self._news

    def stop(self) -> None:
        """The driver's wish."""
        self._news.stops = True

    def stops(self) -> bool:
        """For the workers, while they train."""
        return self._news.stops

    def begin(self, rank: int) -> bool:
        """A worker began; whether there is anything to do for it."""
        if rank in self._news.ready:  # all of them were started again
            self._news.ready.clear()
        self._news.ready.add(rank)
        return not self._news.errors and not self._news.stops

    def fail(self, rank: int, is_users: bool, message: str) -> None:
        """An error of a worker."""
        self._news.errors[rank] = (is_users, message)

    def n_failed(self) -> int:
        """Workers that told an error."""
        return len(self._news.errors)

    def show(self, label: str, total: int, unit: str) -> None:
        """A bar of the first worker."""
        self._news.bar, self._news.done = (label, total, unit), 0

    def advance(self, n: int, numbers: dict[str, float]) -> None:
        """Of that bar."""
        self._news.done += n
        self._news.numbers = numbers


def train_on_ray(
    work: Work,
    root: Path,
    spec: TrainRunSpec,
    *,
    stop: Stop | None = None,
    progress: Progress = SILENT,
) -> None:
    """Run `work(venue)` on `spec.workers` workers of Ray Train until it ends on all of them.

    Checkpoints go to `root`, a folder that all machines share. GPUs are given out if the cluster
    has any.

    Raises:
        UserError: what a worker found wrong.
        StoppedError: the run was told to stop; there is a checkpoint, if the workers had the time.
        ExecutionError: a worker failed, or workers died more often than allowed.
    """
    stop = stop or Stop()
    root.mkdir(parents=True, exist_ok=True)
    # Every checkpoint waits until Ray Train's controller looks; by default it does every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    with connected_ray(spec.address), stop.heeded():
        link = (
            ray.remote(num_cpus=0)(_Link)
            .options(
                max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                ),
            )
            .remote()
        )
        run = f"{RAY_RUNS}{time.time_ns()}"
        thread = _Fitting(_trainer(work, link, root, run, spec))
        thread.start()
        news = _follow(thread, link, spec, stop, progress)
    for _, (is_users, message) in sorted(news.errors.items()):
        raise (UserError if is_users else ExecutionError)(message)
    if stop.requested:
        raise StoppedError("the training was told to stop; run the same command again to resume")
    if isinstance(thread.error, ray.train.WorkerGroupError):
        raise ExecutionError(
            f"the workers failed more often than run.max_failures ({spec.max_failures}) allows; "
            f"the last time: {_short(thread.error)}"
        ) from thread.error
    if thread.error is not None:
        raise ExecutionError(f"Ray Train failed: {_short(thread.error)}") from thread.error
    Checkpoints(root).prune(spec.keep)


def _trainer(
    work: Work, link: ray.actor.ActorHandle, root: Path, run: str, spec: TrainRunSpec
) -> ray.train.torch.TorchTrainer:
    gpus = _gpus(spec)

    def loop() -> None:
        _on_worker(work, link, root, run)

    return ray.train.torch.TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(
            num_workers=spec.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": spec.cpus_per_worker, "GPU": gpus},
        ),
        run_config=ray.train.RunConfig(
            name=run,
            storage_path=str(root.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=spec.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=spec.keep),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _gpus(spec: TrainRunSpec) -> int:
    """Of one worker; none where the cluster has none."""
    return spec.gpus_per_worker if ray.cluster_resources().get("GPU", 0) else 0


class _Fitting(threading.Thread):
    """`trainer.fit()` in a thread: in the main one Ray would take SIGINT for itself."""

    def __init__(self, trainer: ray.train.torch.TorchTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        """Wait for the end, or for what ended it."""
        try:
            self._trainer.fit()
        except Exception as error:  # told in the main thread
            self.error = error


def _follow(
    thread: _Fitting,
    link: ray.actor.ActorHandle,
    spec: TrainRunSpec,
    stop: Stop,
    progress: Progress,
) -> News:
    """Pass news and signals on until the training ends, or the time after a signal is over."""
    told, patience, news = False, _Patience(spec), News()
    with ExitStack() as bars:
        shown: Bar | None = None
        n_shown = 0
        while thread.is_alive():
            thread.join(POLL_S)
            try:
                news = ray.get(link.news.remote())
                if stop.requested and not told:
                    told = True
                    ray.get(link.stop.remote())
            except RayError as error:
                thread.error = thread.error or error
                break
            if shown is None and news.bar is not None:
                shown = bars.enter_context(progress.bar(*news.bar))
            if shown is not None and news.done > n_shown:  # less after a start from a checkpoint
                shown.advance(news.done - n_shown, **news.numbers)
                n_shown = news.done
            if told and stop.remaining_s == 0:
                log.warning("the workers did not stop within %g s", spec.grace_s)
                break
            patience.look(news)
    return news


class _Patience:
    """Says once that the workers do not begin, and why that may be."""

    def __init__(self, spec: TrainRunSpec) -> None:
        self._spec, self._since, self._said = spec, time.monotonic(), False

    def look(self, news: News) -> None:
        """Look whether all are there."""
        n_ready, spec = len(news.ready), self._spec
        if n_ready == spec.workers:
            self._since, self._said = time.monotonic(), False
        elif not self._said and time.monotonic() - self._since > WARN_AFTER_S:
            self._said = True
            total = ray.cluster_resources()
            log.warning(
                "%d of %d workers began; each wants %g CPUs and %d GPUs, and the cluster has %g "
                "and %g; the training waits for them",
                n_ready, spec.workers, spec.cpus_per_worker, _gpus(spec),
                total.get("CPU", 0), total.get("GPU", 0),
            )  # fmt: skip


def _short(error: Exception) -> str:
    """The end of what Ray says, which names the error."""
    return redacted(" ".join(str(error).split()))[-500:]


# --- on the workers -----------------------------------------------------------------------------


def _on_worker(work: Work, link: ray.actor.ActorHandle, root: Path, run: str) -> None:
    """One worker, from its start to its end."""
    ranks = Ranks(ray.train.torch.get_device())
    if not ray.get(link.begin.remote(ranks.rank)):
        return
    stop = Stop()
    threading.Thread(target=_listen, args=(link, stop), name="drl-listen", daemon=True).start()
    venue = Venue(
        ranks,
        Checkpoints(root, run=run, keep=None),  # Ray Train removes old ones
        stop,
        _Told(link) if ranks.leads else SILENT,
        _report,
    )
    try:
        work(venue)
    except StoppedError:
        return
    except DrlDataError as error:
        ray.get(link.fail.remote(ranks.rank, isinstance(error, UserError), str(error)))
        if not _all_failed(link, ranks.world_size):
            raise  # Ray ends the others, which may wait for this one; the next start does nothing


def _all_failed(link: ray.actor.ActorHandle, n: int) -> bool:
    """Whether the other workers meet an error too, as they do where it is the user's."""
    deadline = time.monotonic() + OTHERS_S
    while ray.get(link.n_failed.remote()) < n:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _listen(link: ray.actor.ActorHandle, stop: Stop) -> None:
    try:
        while not ray.get(link.stops.remote()):
            time.sleep(POLL_S)
    except RayError:
        pass  # the driver has gone, and this process goes with it
    stop.request(float("inf"))


def _report(folder: Path | None, step: int, loss: float) -> None:
    """Tell Ray Train of a checkpoint, which lies where it keeps them already."""
    ray.train.report(
        {"step": step, "loss": loss},
        checkpoint=None if folder is None else ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )


class _Told:
    """Progress that the driver shows."""

    def __init__(self, link: ray.actor.ActorHandle) -> None:
        self._link = link

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar at the driver."""
        self._link.show.remote(label, total, unit)
        yield self

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Of that bar."""
        self._link.advance.remote(n, numbers)
