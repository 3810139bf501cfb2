"""Rank for the users of a job on a Ray cluster: a Ray Data job whose workers load the model once.

The process of the command prepares the users, as it does without a cluster. Ray stores them once on each machine, where
all its workers read them. A block of the Ray dataset is a part of the job (:class:`~recsys_ssm.run.ranking.Parts`): a
worker returns the part's items and scores, and the process of the command writes them. So the result is that of one
process to the last bit, a worker that ends has its part computed by another one, and a job that is stopped goes on with
the parts that are missing.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from recsys_ssm.batches import Selection, TopItems
from recsys_ssm.data.loaders import BlockLoader, PartLoader
from recsys_ssm.data.sequences import Histories, HistoryLoader
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import import_modules
from recsys_ssm.run.ranking import Parts, Progress
from recsys_ssm.run.trained import TrainedRun, load_model

log = logging.getLogger(__name__)

_BLOCKS = 1024
"""Most blocks of a Ray dataset."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what a job takes of it.

    Args:
        address: As :func:`ray.init` takes it, ``auto`` for that of this machine; None: start one here for the job.
        n_workers: Workers, each with a model.
        n_cpus: CPUs of a worker.
        device: Where a worker computes; ``cuda`` takes a GPU for each.
    """

    address: str | None
    n_workers: int
    n_cpus: int
    device: torch.device

    @contextlib.contextmanager
    def connect(self) -> Iterator[Any]:
        """Connect to the cluster, and yield the module ``ray``.

        Raises:
            UserError: Ray is not installed, or there is no cluster at the address.
        """
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError("engine=ray needs Ray Data; pip install 'recsys-ssm[ray]'") from error
        if ray.is_initialized():
            yield ray
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray Data's own actors cause an error line that nobody can act upon.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        own: dict[str, Any] = {}
        if self.address is None:
            own = {"num_cpus": self.n_workers * self.n_cpus, "include_dashboard": False}
        try:
            ray.init(
                self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"address={self.address}: no Ray cluster to connect to ({' '.join(str(error).split())[:150]}); start "
                "one with ray start --head, or leave address= out"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class _Work:
    """All that a worker needs besides the users."""

    run: TrainedRun
    selection: Selection
    modules: Sequence[str]
    device: torch.device
    part_size: int


class _Ranker:
    """Rank for the users of parts; an object lives in a Ray worker.

    Args:
        work: What to rank with.
        users: Reference to the loader of all users, in a list: Ray passes it on as it is.
    """

    def __init__(self, work: _Work, users: list[Any]) -> None:
        import ray

        import_modules(work.modules)
        self.loader: BlockLoader[Any] = ray.get(users[0])
        self.model, _ = load_model(work.run)
        self.model.to(work.device)
        self.model.selection = work.selection
        self.part_size = work.part_size
        with self.model.inference():
            self.model.on_predict_start()

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        import pyarrow as pa

        types = {
            "number": pa.int64(),
            "item": pa.list_(pa.int32()),
            "score": pa.list_(pa.float32()),
        }
        found: dict[str, list[Any]] = {name: [] for name in types}
        with torch.inference_mode():
            for number in batch["item"].tolist():
                top = [
                    self.model.predict_step(move_data_to_device(users, self.model.device))
                    for users in PartLoader(self.loader, [number], self.part_size)
                ]
                found["number"].append(number)
                found["item"].append(torch.cat([each.item for each in top]).int().numpy().ravel())
                found["score"].append(torch.cat([each.score for each in top]).numpy().ravel())
        return pa.table(found, schema=pa.schema(types))


def rank(
    run: TrainedRun,
    selection: Selection,
    loader: BlockLoader[Any],
    parts: Parts,
    cluster: Cluster,
    modules: Sequence[str] = (),
) -> None:
    """Compute the missing parts of a job on a Ray cluster.

    Args:
        run: The run, in a folder that the cluster's machines have as well.
        selection: Items that may be recommended.
        loader: Loader of all users of the job.
        parts: The parts of the job.
        cluster: Where.
        modules: The user's own modules, which the workers import as well.

    Raises:
        UserError: Ray is not installed, there is no such cluster, or a part cannot be written.
    """
    with cluster.connect() as ray:
        missing = parts.prepare()
        if not missing:
            return
        free = ray.cluster_resources()
        for name, needed in _needs(cluster).items():
            if free.get(name, 0) < needed * cluster.n_workers:
                log.warning(
                    "the cluster has %g %ss of the %g that devices=%d workers need",
                    free.get(name, 0),
                    name,
                    needed * cluster.n_workers,
                    cluster.n_workers,
                )
        _quiet(ray)
        work = _Work(_absolute(run), selection, list(modules), cluster.device, parts.part_size)
        shared = ray.put(_in_memory(loader))
        needs = _needs(cluster)
        dataset = ray.data.from_items(missing, override_num_blocks=min(len(missing), _BLOCKS))
        dataset = dataset.map_batches(
            _Ranker,
            fn_constructor_args=(work, [shared]),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(cluster.n_workers, len(missing))),
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU"),
        )
        progress = Progress(parts)
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for number, item, score in zip(
                *(block.column(name) for name in ("number", "item", "score")), strict=True
            ):
                users = parts.users_of(number.as_py())
                shape = len(users), parts.k
                parts.write(
                    number.as_py(),
                    [
                        TopItems(
                            torch.arange(users.start, users.stop),
                            *(
                                torch.from_numpy(np.array(values.values).reshape(shape))
                                for values in (item, score)
                            ),
                        )
                    ],
                )
                progress.update(len(users))
        progress.close()


def _needs(cluster: Cluster) -> dict[str, float]:
    """Return what a worker takes of the cluster."""
    gpu = {"GPU": 1.0} if cluster.device.type == "cuda" else {}
    return {"CPU": float(cluster.n_cpus), **gpu}


def _absolute(run: TrainedRun) -> TrainedRun:
    return TrainedRun(run.folder.absolute(), run.checkpoint.absolute(), run.config)


def _in_memory(loader: BlockLoader[Any]) -> BlockLoader[Any]:
    """Return a loader whose arrays are plain ones, which Ray's workers read where they are, without a copy each."""
    loader = copy.copy(loader)
    loader.num_workers = 0
    if isinstance(loader, HistoryLoader):
        loader.histories = Histories(*(np.asarray(each) for each in loader.histories))
    return loader


def _quiet(ray: Any) -> None:
    """Leave out Ray Data's own progress lines."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
