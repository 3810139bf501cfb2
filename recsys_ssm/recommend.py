"""Recommend with a trained model: ``python -m recsys_ssm.recommend run=<folder of a run> users=<file>``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from recsys_ssm.cli.command import command
from recsys_ssm.data.files import read_table
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.errors import UserError
from recsys_ssm.evaluate import find_run, load_config, load_model, model_class
from recsys_ssm.instantiate import instantiate
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.run.assemble import check_writable
from recsys_ssm.run.files import write_table, write_text

log = logging.getLogger(__name__)


def recommend(cfg: DictConfig) -> Path:
    """Write the ``cfg.k`` best items for each of ``cfg.users`` to ``cfg.output``.

    Raises:
        UserError: There is no such run or file, the file does not fit the model, or an option is wrong.
    """
    for option in ("k", "batch_size"):
        if not isinstance(cfg[option], int) or cfg[option] < 1:
            raise UserError(f"{option}={cfg[option]}: give a whole number above 0")
    path = Path(cfg.output)
    if path.is_dir():
        raise UserError(f"output={path} is a folder; name a file")
    check_writable(path.parent, "output")
    checkpoint, run = find_run(cfg.run, cfg.checkpoint)
    trained = load_config(run)
    model = load_model(checkpoint, model_class(trained, run))
    if isinstance(model, NextItem):
        blocks, n_users = _by_history(cfg, trained, model)
    elif isinstance(model, TwoTower):
        blocks, n_users = _by_features(cfg, model)
    else:
        raise UserError(
            f"run={run}: cannot recommend with a {type(model).__name__}; give a run of TwoTower or NextItem"
        )
    model.to(_device(cfg.accelerator))
    with tqdm(total=n_users, unit="user", disable=None) as bar:
        tables = []
        for users, table in blocks:
            tables.append(table.with_columns(user=users.gather(table["user"])))
            bar.update(users.len())
    if not tables:
        raise UserError(
            f"users={cfg.users}: no user has an item of the model's catalogue; "
            "check that ids are spelt as in the training"
        )
    table = pl.concat(tables)
    if path.suffix == ".csv":
        write_text(path, table.write_csv())
    else:
        write_table(path, table)
    log.info("%d items for each of %s users: %s", cfg.k, f"{n_users:,}", path)
    return path


def _by_history(
    cfg: DictConfig, trained: DictConfig, model: NextItem
) -> tuple[Iterator[tuple[pl.Series, pl.DataFrame]], int]:
    """Return blocks of users with the items that follow their histories, and the number of users."""
    data = instantiate(OmegaConf.merge(trained.dataset, cfg.dataset), "dataset")
    if not isinstance(data, Interactions):
        raise UserError(
            f"run={cfg.run}: its dataset, {data.name}, is not read from interactions; give a run whose dataset is"
        )
    if cfg.user is not None:
        raise UserError(
            f"user={cfg.user}: this run reads users by dataset.user; give dataset.user={cfg.user}"
        )
    if cfg.users is None:
        data.setup("test")
        splits = data.splits
        user_ids, item_ids, (events, offsets) = splits.user_ids, splits.item_ids, splits.histories
    else:
        user_ids, item_ids, (events, offsets) = data.read_histories(cfg.users)
    catalogue = set(model.item_ids)
    known = np.array([item in catalogue for item in item_ids], dtype=bool)
    hits = np.concatenate([[0], np.cumsum(known[events])])
    has_any = np.diff(hits[offsets]) > 0
    users = has_any.nonzero()[0].tolist()
    if left_out := has_any.size - len(users):
        first = user_ids[int(has_any.argmin())]
        log.warning(
            "%s of %s users have no item of the catalogue and are left out, the first is %s",
            f"{left_out:,}",
            f"{has_any.size:,}",
            first,
        )

    def blocks() -> Iterator[tuple[pl.Series, pl.DataFrame]]:
        for start in range(0, len(users), cfg.batch_size):
            block = users[start : start + cfg.batch_size]
            histories = [
                [item_ids[i] for i in events[offsets[user] : offsets[user + 1]].tolist()]
                for user in block
            ]
            found = model.recommend(histories, cfg.k, filter_seen=cfg.filter_seen)
            yield user_ids.gather(block), found

    return blocks(), len(users)


def _by_features(
    cfg: DictConfig, model: TwoTower
) -> tuple[Iterator[tuple[pl.Series, pl.DataFrame]], int]:
    """Return blocks of users with the items that suit their features, and the number of users."""
    if cfg.users is None:
        raise UserError(
            "users=null: two towers need a table of users; name one with the columns "
            + ", ".join(model.user_schema.names)
        )
    columns = [*model.user_schema.names, *([] if cfg.user is None else [cfg.user])]
    table = read_table(
        cfg.users, columns=list(dict.fromkeys(columns)), separator=cfg.dataset.get("separator", ",")
    )
    rows = pl.Series("user", range(table.height)) if cfg.user is None else table[cfg.user]

    def blocks() -> Iterator[tuple[pl.Series, pl.DataFrame]]:
        catalogue = model.item_embeddings()
        for start in range(0, table.height, cfg.batch_size):
            part = table[start : start + cfg.batch_size]
            found = model.recommend(part, cfg.k, item_embeddings=catalogue)
            yield rows[start : start + cfg.batch_size], found

    return blocks(), table.height


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
