"""Recommend with a trained model: ``python -m recsys_ssm.recommend run=<folder of a run> users=<file>``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from omegaconf import DictConfig
from tqdm import tqdm

from recsys_ssm.cli.command import command
from recsys_ssm.data.columns import keys, open_table
from recsys_ssm.data.files import read_table
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.text_recommender import TextRecommender
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.run.assemble import check_writable
from recsys_ssm.run.files import write_table, write_text
from recsys_ssm.run.trained import TrainedRun, load_model, make_data, open_run

log = logging.getLogger(__name__)

WRITERS: dict[str, Callable[[Path, pl.DataFrame], Path]] = {
    ".parquet": write_table,
    ".csv": lambda path, table: write_text(path, table.write_csv()),
    ".tsv": lambda path, table: write_text(path, table.write_csv(separator="\t")),
    ".json": lambda path, table: write_text(path, table.write_json()),
    ".jsonl": lambda path, table: write_text(path, table.write_ndjson()),
}
"""Formats of the output, by the suffix of its name."""


class _Job(NamedTuple):
    """Blocks of recommendations to compute, and the number of users in all of them."""

    blocks: Iterator[tuple[pl.Series, pl.DataFrame]]
    n_users: int


def recommend(cfg: DictConfig) -> Path:
    """Write the ``cfg.k`` best items for each of ``cfg.users`` to ``cfg.output`` (``conf/recommend.yaml``).

    Raises:
        UserError: There is no such run or file, the file does not fit the model, or an option is wrong.
    """
    for option in ("k", "batch_size"):
        if isinstance(cfg[option], bool) or not isinstance(cfg[option], int) or cfg[option] < 1:
            raise UserError(f"{option}={cfg[option]}: give a whole number above 0")
    if cfg.filter_seen not in (True, False, None):
        raise UserError(f"filter_seen={cfg.filter_seen}: expected true, false or null")
    path = Path(str(cfg.output)).expanduser()
    if path.is_dir():
        raise UserError(f"output={path} is a folder; name a file")
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise UserError(f"output={path}: unknown format; end the name with {', '.join(WRITERS)}")
    device = _device(cfg.accelerator)
    check_writable(path.parent, "output")
    run = open_run(str(cfg.run), cfg.checkpoint, cfg.output_root)
    model, _ = load_model(run)
    if isinstance(model, NextItem | TextRecommender):
        job = _by_history(cfg, run, model)
    elif isinstance(model, TwoTower):
        job = _by_features(cfg, run, model)
    else:
        raise UserError(
            f"run={run.folder}: cannot recommend with a {type(model).__name__}; give a run of another model"
        )
    model.to(device)
    with tqdm(total=job.n_users, unit="user", disable=None) as bar:
        tables = []
        for users, table in job.blocks:
            tables.append(table.with_columns(user=users.gather(table["user"])))
            bar.update(users.len())
    write(path, pl.concat(tables))
    log.info("%d items for each of %s users: %s", cfg.k, f"{job.n_users:,}", path)
    return path


def _by_history(cfg: DictConfig, run: TrainedRun, model: NextItem | TextRecommender) -> _Job:
    """Return the blocks of items that follow users' histories."""
    data = make_data(run, cfg.dataset)
    if not isinstance(data, Interactions):
        raise UserError(
            f"run={cfg.run}: its dataset, {data.name}, is not read from interactions; give a run whose dataset is"
        )
    if cfg.user is not None:
        raise UserError(
            f"user={cfg.user}: this run reads users by dataset.user; give dataset.user={cfg.user}"
        )
    if cfg.users is None:
        splits = data.splits
        user_ids, item_ids, (events, offsets) = splits.user_ids, splits.item_ids, splits.histories
    else:
        user_ids, item_ids, (events, offsets) = data.read_histories(str(cfg.users))
    items = np.array(item_ids, dtype=object)
    histories = [
        items[events[offsets[user] : offsets[user + 1]]].tolist() for user in range(user_ids.len())
    ]
    if cfg.users is not None:
        earlier = _earlier_histories(data, user_ids)
        if cfg.join_training:
            histories = [
                [*earlier.get(user, ()), *own]
                for user, own in zip(user_ids, histories, strict=True)
            ]
        if earlier:
            log.warning(
                "%s of %s users were in the training data; their items there are %s",
                f"{len(earlier):,}",
                f"{user_ids.len():,}",
                "put before those of the file"
                if cfg.join_training
                else "not used: join_training=true puts them before those of the file",
            )
    catalogue = set(model.item_ids)
    unknown = [
        user for user, own in zip(user_ids, histories, strict=True) if catalogue.isdisjoint(own)
    ]
    if unknown:
        log.warning(
            "%s of %s users have no item of the catalogue and get the most popular items, the first is %s",
            f"{len(unknown):,}",
            f"{user_ids.len():,}",
            unknown[0],
        )
    if len(unknown) == user_ids.len():
        raise UserError(
            f"users={cfg.users}: no user has an item of the model's catalogue; "
            "check that ids are spelt as in the training"
        )

    def blocks() -> Iterator[tuple[pl.Series, pl.DataFrame]]:
        for start in range(0, len(histories), cfg.batch_size):
            block = slice(start, start + cfg.batch_size)
            found = model.recommend(histories[block], cfg.k, filter_seen=cfg.filter_seen)
            yield user_ids[block], found

    return _Job(blocks(), len(histories))


def _earlier_histories(data: Interactions, user_ids: pl.Series) -> dict[str, list[str]]:
    """Return the items that users have in a run's own data; none if that data is not there."""
    try:
        splits = data.splits
    except UserError as error:
        log.warning("the data of the training cannot be read (%s)", str(error).partition(";")[0])
        return {}
    events, offsets = splits.histories
    place = {user: row for row, user in enumerate(splits.user_ids)}
    return {
        user: [splits.item_ids[i] for i in events[offsets[row] : offsets[row + 1]]]
        for user in user_ids
        if (row := place.get(user)) is not None
    }


def _by_features(cfg: DictConfig, run: TrainedRun, model: TwoTower) -> _Job:
    """Return the blocks of items that suit users' features."""
    if cfg.users is None:
        raise UserError(
            "users=null: two towers need a table of users; name one with the columns "
            + ", ".join(model.user_schema.names)
        )
    if cfg.join_training:
        raise UserError("join_training=true: two towers have no histories; leave it out")
    columns = [*model.user_schema.names, *([] if cfg.user is None else [str(cfg.user)])]
    data = make_data(run, cfg.dataset)
    separator = getattr(data, "separator", None) or ","
    table = read_table(str(cfg.users), columns=list(dict.fromkeys(columns)), separator=separator)
    rows = pl.Series("user", range(table.height)) if cfg.user is None else table[str(cfg.user)]
    seen = (
        None if cfg.filter_seen is False else _seen_items(cfg, data, model, table.height, separator)
    )

    def blocks() -> Iterator[tuple[pl.Series, pl.DataFrame]]:
        catalogue = model.item_embeddings()
        for start in range(0, table.height, cfg.batch_size):
            part = table[start : start + cfg.batch_size]
            exclude = None
            if seen is not None:
                exclude = seen.mask(start, start + part.height, len(model.item_ids))
            found = model.recommend(part, cfg.k, exclude, item_embeddings=catalogue)
            yield rows[start : start + cfg.batch_size], found

    return _Job(blocks(), table.height)


class _Seen(NamedTuple):
    """Items that users had, as pairs sorted by the user's row."""

    user: np.ndarray
    item: np.ndarray

    def mask(self, start: int, stop: int, n_items: int) -> torch.Tensor:
        """Return the pairs of the users from ``start`` to ``stop`` as (users, items) bool."""
        first, last = np.searchsorted(self.user, [start, stop])
        mask = torch.zeros(stop - start, n_items, dtype=torch.bool)
        mask[torch.tensor(self.user[first:last] - start), torch.tensor(self.item[first:last])] = (
            True
        )
        return mask


def _seen_items(
    cfg: DictConfig, data: Any, model: TwoTower, n_users: int, separator: str
) -> _Seen | None:
    """Return the items that known users of a table had in the interactions; None if they cannot be looked up."""
    given = cfg.interactions is not None or cfg.filter_seen is True
    if not isinstance(data, TableData):
        if given:
            raise UserError(
                f"filter_seen=true: dataset {data.name} has no file of interactions to look seen items up in; "
                "leave it out"
            )
        return None
    column = data.user if cfg.user is None else str(cfg.user)
    source = data.interactions if cfg.interactions is None else str(cfg.interactions)
    try:
        ids = keys(
            read_table(str(cfg.users), columns=[column], separator=separator),
            column,
            str(cfg.users),
        )
        frame, where = open_table(
            source, "interactions", [data.user, data.item], separator=data.separator
        )
        pairs = pl.DataFrame(
            {"id": keys(frame, data.user, where), "item": keys(frame, data.item, where)}
        ).unique()
    except UserError as error:
        if given:
            raise
        log.warning(
            "seen items are not left out: %s; name the users' column with user=, the file with interactions=, or "
            "give filter_seen=false",
            str(error).partition(";")[0],
        )
        return None
    users = pl.DataFrame({"id": ids, "row": np.arange(n_users)})
    catalogue = pl.DataFrame(
        {"item": model.item_ids, "at": np.arange(len(model.item_ids))},
        schema_overrides={"item": pl.String},
    )
    found = users.join(pairs, on="id").join(catalogue, on="item").sort("row")
    log.info(
        "%s of %s users are known from %s: their items there are left out (filter_seen=false keeps them)",
        f"{found['row'].n_unique():,}",
        f"{n_users:,}",
        where,
    )
    return _Seen(found["row"].to_numpy(), found["at"].to_numpy())


def _device(accelerator: str) -> torch.device:
    """Return the device on which the accelerator of a Lightning name computes."""
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if accelerator not in AcceleratorRegistry:
        known = ", ".join(["auto", *AcceleratorRegistry.available_accelerators()])
        raise UserError(f"accelerator={accelerator}: expected one of {known}")
    return torch.device({"gpu": "cuda"}.get(accelerator, accelerator))


main = command("recommend")(recommend)

if __name__ == "__main__":
    main()
