"""Recommend with a trained model: ``python -m recsys_ssm.recommend run=<folder of a run> users=<file>``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import functools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import polars as pl
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from omegaconf import DictConfig
from torch import Tensor

from recsys_ssm.batches import Ragged, Selection
from recsys_ssm.cli.command import command
from recsys_ssm.data.base import content_hash
from recsys_ssm.data.cache import cache_folder, hash_file
from recsys_ssm.data.columns import keys, open_table
from recsys_ssm.data.files import header_of, is_parquet, listed, read_table, scan_table
from recsys_ssm.data.interactions import Interactions, filtered
from recsys_ssm.data.loaders import BlockLoader, PartLoader
from recsys_ssm.data.packing import join_ranges
from recsys_ssm.data.sequences import HeldOut, Histories, HistoryLoader
from recsys_ssm.data.table import TableData
from recsys_ssm.data.two_tower import UserLoader
from recsys_ssm.errors import UserError
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.text_recommender import TextRecommender
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.run.assemble import as_list, check_writable
from recsys_ssm.run.on_ray import Cluster, rank
from recsys_ssm.run.ranking import FORMATS, Parts, PartsWriter, ToRank, write_frames
from recsys_ssm.run.trained import TrainedRun, load_model, make_data, open_run

log = logging.getLogger(__name__)

PART_SIZE = 1 << 14
"""Users of a part, about."""

ENGINES = ("local", "ray")
"""Choices of what ranks: processes of this machine, or workers of a Ray cluster."""


class _Job(NamedTuple):
    """Users to recommend to."""

    users: pl.Series
    """(U,) their names."""
    loader: BlockLoader[Any]
    key: str
    """Hash of all that is read about them."""


def recommend(cfg: DictConfig) -> Path:
    """Write the ``cfg.k`` best items for each of ``cfg.users`` to ``cfg.output`` (``conf/recommend.yaml``).

    Raises:
        UserError: There is no such run or file, the file does not fit the model, or an option is wrong.
    """
    for option in ("k", "batch_size", "devices", "cpus"):
        if isinstance(cfg[option], bool) or not isinstance(cfg[option], int) or cfg[option] < 1:
            raise UserError(f"{option}={cfg[option]}: give a whole number above 0")
    if cfg.engine not in ENGINES:
        raise UserError(f"engine={cfg.engine}: expected {' or '.join(ENGINES)}")
    if cfg.engine != "ray" and cfg.address is not None:
        raise UserError(f"address={cfg.address}: the address of a Ray cluster; give engine=ray too")
    if cfg.engine == "ray" and cfg.strategy != "auto":
        raise UserError(f"strategy={cfg.strategy}: a strategy of engine=local; leave it out")
    if cfg.filter_seen not in (True, False, None):
        raise UserError(f"filter_seen={cfg.filter_seen}: expected true, false or null")
    if cfg.layout not in ("rows", "kaggle"):
        raise UserError(f"layout={cfg.layout}: expected rows or kaggle")
    path = Path(str(cfg.output)).expanduser()
    if path.is_dir():
        raise UserError(f"output={path} is a folder; name a file")
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"output={path}: unknown format; end the name with {', '.join(FORMATS)}")
    device = _device(cfg.accelerator)
    check_writable(path.parent, "output")
    run = open_run(str(cfg.run), str(cfg.checkpoint), cfg.output_root)
    model, _ = load_model(run)
    if not isinstance(model, NextItem | TwoTower | TextRecommender):
        raise UserError(
            f"run={run.folder}: cannot recommend with a {type(model).__name__}; give a run of another model"
        )
    if isinstance(model, TextRecommender):
        for option in ("allow", "deny", "pairs", "similar"):
            if cfg[option] is not None:
                raise UserError(
                    f"{option}={cfg[option]}: a {type(model).__name__} has no vectors of items; leave it out"
                )
    data = make_data(run, cfg.dataset)
    if cfg.similar is not None and not isinstance(model, TextRecommender):
        return _write_similar(cfg, data, model.to(device), path)
    columns = _item_columns(cfg, data, model)
    if cfg.pairs is not None and not isinstance(model, TextRecommender):
        return _write_scores(cfg, run, data, model.to(device), path)
    job = (
        _by_history(cfg, data, model)
        if isinstance(model, NextItem | TextRecommender)
        else _by_features(cfg, data, model)
    )
    model.selection = _selection(cfg, data, model, job.users)
    part_size = -(-PART_SIZE // cfg.batch_size) * cfg.batch_size
    key = content_hash(
        job.key,
        hash_file(run.checkpoint, cache_folder()),
        str((cfg.filter_seen, cfg.batch_size)),
        *(x for x in (model.selection.allowed,) if x is not None),
        *(
            x
            for pairs in (model.selection.allowed_pairs, model.selection.denied_pairs)
            if pairs is not None
            for x in pairs
        ),
        str([x is None for x in (model.selection.allowed_pairs, model.selection.denied_pairs)]),
    )
    n_users, k = job.users.len(), min(cfg.k, len(model.item_ids))
    parts = Parts(path.with_name(f"{path.name}.parts"), {"job": key}, n_users, part_size, k)
    if cfg.engine == "ray":
        cluster = Cluster(cfg.address, cfg.devices, cfg.cpus, device)
        rank(run, model.selection, job.loader, parts, cluster, as_list(cfg["import"]))
        is_first = True
    else:
        is_first = _predict(cfg, model, job.loader, parts).is_global_zero
    if is_first:
        schema = {"user": job.users.dtype, "rank": pl.Int64, "item": pl.String, "score": pl.Float32}
        if columns is not None:
            schema |= columns.schema
        frames = parts.frames(job.users, model.ids, columns)
        if cfg.layout == "kaggle":
            schema = dict.fromkeys(("customer_id", "prediction"), pl.String)
            frames = map(_kaggle, frames)
        write_frames(path, frames, schema)
        parts.remove()
    n_items = len(model.item_ids)
    if cfg.k > n_items:
        log.warning("k=%d: the catalogue has %d items, so all of them are ranked", cfg.k, n_items)
    log.info("%d items for each of %s users: %s", min(cfg.k, n_items), f"{n_users:,}", path)
    return path


def _kaggle(rows: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each user, as the H&M competition wants it: its items in one cell, the best first."""
    of_user = rows.group_by("user", maintain_order=True)
    lists = of_user.agg(pl.col("item").str.join(" "))
    return lists.select(
        pl.col("user").cast(pl.String).alias("customer_id"), pl.col("item").alias("prediction")
    )


def _predict(
    cfg: DictConfig, model: Recommender, loader: BlockLoader[Any], parts: Parts
) -> L.Trainer:
    """Compute the missing parts, and wait for all processes."""
    try:
        trainer = L.Trainer(
            accelerator=cfg.accelerator,
            devices=cfg.devices,
            strategy=cfg.strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[PartsWriter(parts)],
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"accelerator={cfg.accelerator}, devices={cfg.devices}, strategy={cfg.strategy}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    make = functools.partial(_loader_of, loader, parts.part_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*couldn't infer the batch indices")
        trainer.predict(model, datamodule=ToRank(make, parts), return_predictions=False)
    trainer.strategy.barrier()
    return trainer


def _loader_of(loader: BlockLoader[Any], part_size: int, numbers: list[int]) -> PartLoader[Any]:
    return PartLoader(loader, numbers, part_size)


def _by_history(cfg: DictConfig, data: Any, model: NextItem | TextRecommender) -> _Job:
    """Return users and their histories, as the catalogue's indices."""
    if not isinstance(data, Interactions):
        raise UserError(
            f"run={cfg.run}: its dataset, {data.name}, is not read from interactions; give a run whose dataset is"
        )
    if cfg.user is not None:
        raise UserError(
            f"user={cfg.user}: this run reads users by dataset.user; give dataset.user={cfg.user}"
        )
    if getattr(model, "event_columns", None) or getattr(model, "typical_gap", None) is not None:
        raise UserError(
            f"run={cfg.run}: the model uses times or columns of events, which this command does not read; call "
            "NextItem.recommend in Python with times= and columns="
        )
    if cfg.users is None:
        splits = data.splits
        user_ids, histories = (
            splits.user_ids,
            _in_catalogue(splits.histories, splits.item_ids, model),
        )
    else:
        user_ids, item_ids, histories = data.read_histories(str(cfg.users))
        histories = _in_catalogue(histories, item_ids, model)
        earlier, n_known = _earlier_histories(data, user_ids, model)
        if cfg.join_training and n_known:
            histories = _joined(earlier, histories)
        if n_known:
            log.warning(
                "%s of %s users were in the training data; their items there are %s",
                f"{n_known:,}",
                f"{user_ids.len():,}",
                "put before those of the file"
                if cfg.join_training
                else "not used: join_training=true puts them before those of the file",
            )
    cold = np.flatnonzero(np.diff(histories.offsets) == 0)
    if cold.size:
        log.warning(
            "%s of %s users have no item of the catalogue and get the most popular items, the first is %s",
            f"{cold.size:,}",
            f"{user_ids.len():,}",
            user_ids[int(cold[0])],
        )
    if cold.size == user_ids.len():
        raise UserError(
            f"users={cfg.users}: no user has an item of the model's catalogue; "
            "check that ids are spelt as in the training"
        )
    loader = HistoryLoader(
        histories,
        HeldOut(np.arange(user_ids.len()), histories.offsets[1:]),
        max_length=model.max_length,
        row_length=model.max_length,
        batch_size=cfg.batch_size,
        masked=getattr(model, "objective", None) == "masked",
        start_token=getattr(model, "start_token", False),
    )
    return _Job(user_ids, loader, content_hash(*histories, _hash_ids(user_ids)))


def _hash_ids(ids: pl.Series) -> str:
    return str(
        int(
            np.bitwise_xor.reduce(
                ids.hash(seed=1).to_numpy() * np.arange(1, 2 * ids.len(), 2, dtype=np.uint64)
            )
        )
    )


def _in_catalogue(histories: Histories, item_ids: list[str], model: Recommender) -> Histories:
    """Return histories of the catalogue's indices, without items that it does not have."""
    events, offsets = histories
    if item_ids == model.item_ids:
        return histories
    events = model.index_of(pl.Series(item_ids, dtype=pl.String)).numpy()[events]
    known = events >= 0
    kept = np.concatenate([[0], np.cumsum(known)])
    return Histories(events[known].astype(np.int32), kept[offsets].astype(np.int64))


def _earlier_histories(
    data: Interactions, user_ids: pl.Series, model: Recommender
) -> tuple[Histories, int]:
    """Return what users have in a run's own data, and how many of them are there."""
    nothing = Histories(np.zeros(0, np.int32), np.zeros(user_ids.len() + 1, np.int64))
    try:
        splits = data.splits
    except UserError as error:
        log.warning("the data of the training cannot be read (%s)", str(error).partition(";")[0])
        return nothing, 0
    events, offsets = _in_catalogue(splits.histories, splits.item_ids, model)
    known = pl.DataFrame({"user": splits.user_ids, "row": np.arange(splits.user_ids.len())})
    row = (
        pl.DataFrame({"user": user_ids})
        .join(known, on="user", how="left", maintain_order="left")["row"]
        .fill_null(-1)
        .to_numpy()
    )
    length = np.where(row >= 0, np.diff(offsets)[row], 0)
    start = np.where(row >= 0, offsets[:-1][row], 0)
    earlier = Histories(
        events[join_ranges(start, length)], np.concatenate([[0], np.cumsum(length)])
    )
    return earlier, int((row >= 0).sum())


def _joined(first: Histories, second: Histories) -> Histories:
    """Return the events of each user in ``first``, then those in ``second``."""
    events = np.concatenate([first.events, second.events])
    start = np.stack([first.offsets[:-1], second.offsets[:-1] + first.events.size], 1)
    length = np.stack([np.diff(first.offsets), np.diff(second.offsets)], 1)
    offsets = np.concatenate([[0], np.cumsum(length.sum(1))])
    return Histories(events[join_ranges(start.ravel(), length.ravel())], offsets)


def _by_features(cfg: DictConfig, data: Any, model: TwoTower) -> _Job:
    """Return users and their features."""
    if cfg.users is None:
        return _of_training(cfg, data, model)
    if cfg.join_training:
        raise UserError("join_training=true: two towers have no histories; leave it out")
    columns = [*model.user_schema.names, *([] if cfg.user is None else [str(cfg.user)])]
    separator = getattr(data, "separator", None) or ","
    table = read_table(str(cfg.users), columns=list(dict.fromkeys(columns)), separator=separator)
    users = pl.Series("user", range(table.height)) if cfg.user is None else table[str(cfg.user)]
    seen = (
        None if cfg.filter_seen is False else _seen_items(cfg, data, model, table.height, separator)
    )
    table = data.clean_users(table, str(cfg.users))
    features = model.user_schema.encode(table, where=str(cfg.users))
    key = content_hash(
        *features, *(() if seen is None else seen), _hash_ids(users), str(seen is None)
    )
    return _Job(users, UserLoader(features, seen, batch_size=cfg.batch_size), key)


def _of_training(cfg: DictConfig, data: Any, model: TwoTower) -> _Job:
    """Return the users of the run's own dataset."""
    if cfg.user is not None:
        raise UserError(
            f"user={cfg.user}: with users=null the dataset names its users; leave it out"
        )
    splits = data.splits
    if splits.user_ids is None:
        raise UserError(
            "users=null: two towers need a table of users; name one with the columns "
            + ", ".join(model.user_schema.names)
        )
    if not model.fits(data):
        raise UserError(
            f"users=null: the columns or items of dataset {data.name} are not those of the training; name a table of "
            "users"
        )
    seen = data.predict_dataloader().seen if cfg.filter_seen is True else None
    key = content_hash(*splits.users, *(() if seen is None else seen), str(seen is None))
    return _Job(splits.user_ids, UserLoader(splits.users, seen, batch_size=cfg.batch_size), key)


def _seen_items(
    cfg: DictConfig, data: Any, model: TwoTower, n_users: int, separator: str
) -> Ragged | None:
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
        # The rows of the training: those that dataset.filter keeps.
        kept = data.filter if cfg.interactions is None else None
        columns = [data.user, data.item, *(data.filter_columns if kept else [])]
        frame, where = open_table(source, "interactions", columns, separator=data.separator)
        if kept:
            frame = filtered(frame, kept, where, [])
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
    found = _rows(ids, pairs["id"], pairs["item"], model)
    log.info(
        "%s of %s users are known from %s: their items there are left out (filter_seen=false keeps them)",
        f"{int((found.lengths > 0).sum()):,}",
        f"{n_users:,}",
        where,
    )
    return found


def _rows(users: pl.Series, user: pl.Series, item: pl.Series, model: Recommender) -> Ragged:
    """Return the items of pairs of names for each of ``users`` (U,), without names that are not known."""
    known = pl.DataFrame({"id": users.cast(pl.String), "row": np.arange(users.len())})
    pairs = pl.DataFrame({"id": user.cast(pl.String), "at": model.index_of(item).numpy()})
    found = known.join(pairs.filter(pl.col("at") >= 0), on="id").sort("row", "at")
    row, at = (torch.from_numpy(found[name].to_numpy().copy()) for name in ("row", "at"))
    return Ragged.from_pairs(row, at, users.len())


class _Named(NamedTuple):
    """Items of a file, or pairs of user and item."""

    item: pl.Series
    user: pl.Series | None


def _read_names(path: str, option: str, data: Any) -> _Named:
    """Read a file of items, or of pairs of user and item.

    Raises:
        UserError: It cannot be read, or has no column of items.
    """
    file = Path(path).expanduser()
    source = getattr(data, "preparation", data)
    sides = [[getattr(source, side, side), side, f"{side}_id"] for side in ("item", "user")]
    present = (
        scan_table(file).collect_schema().names() if is_parquet(file) or file.is_dir() else None
    )
    if present is None:
        scan_table(file)
        present = header_of(file, ",")
    item, user = (next((name for name in names if name in present), None) for names in sides)
    if item is None:
        raise UserError(
            f"{option}={path}: no column {' or '.join(dict.fromkeys(sides[0]))}; its columns are {listed(present)}"
        )
    frame, where = open_table(str(file), option, [item] if user is None else [user, item])
    return _Named(keys(frame, item, where), None if user is None else keys(frame, user, where))


def _selection(cfg: DictConfig, data: Any, model: Recommender, users: pl.Series) -> Selection:
    """Return what may be recommended, from the options and the files that they name."""
    allowed: Tensor | None = None
    pairs: dict[str, Ragged | None] = {"allow": None, "deny": None}
    for option in ("allow", "deny"):
        if cfg[option] is None:
            continue
        named = _read_names(str(cfg[option]), option, data)
        at = model.index_of(named.item)
        if unknown := int((at < 0).sum()):
            log.warning(
                "%s=%s: %s of %s rows have an item that is not in the catalogue",
                option,
                cfg[option],
                f"{unknown:,}",
                f"{len(at):,}",
            )
        if named.user is not None:
            pairs[option] = _rows(users, named.user, named.item, model)
            continue
        of_file = torch.zeros(len(model.item_ids), dtype=torch.bool)
        of_file[at[at >= 0]] = True
        mask = of_file if option == "allow" else ~of_file
        if allowed is not None:
            mask &= torch.zeros_like(mask).index_fill(0, allowed, value=True)
        allowed = mask.nonzero().squeeze(1)
        if not len(allowed):
            raise UserError(
                f"{option}={cfg[option]}: no item is left to recommend; correct the file"
            )
    return Selection(cfg.k, cfg.filter_seen, allowed, pairs["allow"], pairs["deny"])


def _item_columns(cfg: DictConfig, data: Any, model: Recommender) -> pl.DataFrame | None:
    """Return the columns of the item file to write beside each item, (I,) rows; null for an item without a row."""
    columns = as_list(cfg.item_columns)
    if not columns:
        if cfg.item_file is not None:
            raise UserError(
                f"item_file={cfg.item_file}: name the columns to write with item_columns="
            )
        return None
    if taken := {"user", "rank", "item", "score"} & set(columns):
        raise UserError(f"item_columns: {min(taken)} is a column of the output; leave it out")
    table = data.items if isinstance(data, Interactions) else None
    if isinstance(data, TableData):
        table = data.item_side.table
    source = cfg.item_file if cfg.item_file is not None else None if table is None else table.source
    if source is None:
        raise UserError("item_columns: the dataset has no file of items; name one with item_file=")
    key = "item_id" if table is None else table.key
    frame, where = open_table(
        source if not isinstance(source, str) else str(Path(source).expanduser()),
        "items",
        [key, *columns],
        names=() if table is None else table.names,
        separator=None if table is None else table.separator,
        names_option=None if table is None else table.names_option,
    )
    known = frame.select(columns).with_columns(keys(frame, key, where).alias("\0id"))
    known = known.unique("\0id", keep="first", maintain_order=True)
    return (
        pl.DataFrame({"\0id": model.ids})
        .join(known, on="\0id", how="left", maintain_order="left")
        .select(columns)
    )


def _write_similar(cfg: DictConfig, data: Any, model: NextItem | TwoTower, path: Path) -> Path:
    """Write the items that are like those of ``cfg.similar``."""
    asked = as_list(cfg.similar)
    if asked == ["all"]:
        items = model.ids
    elif len(asked) == 1 and Path(asked[0]).expanduser().is_file():
        items = _read_names(asked[0], "similar", data).item
    else:
        items = pl.Series(asked, dtype=pl.String)
    columns = _item_columns(cfg, data, model)

    def frames() -> Iterator[pl.DataFrame]:
        for start in range(0, items.len(), cfg.batch_size):
            table = model.similar(items[start : start + cfg.batch_size].to_list(), cfg.k)
            if columns is not None:
                table = table.hstack(columns[model.index_of(table["similar"]).numpy()])
            yield table

    schema = {"item": pl.String, "rank": pl.Int64, "similar": pl.String, "score": pl.Float32}
    write_frames(path, frames(), schema | ({} if columns is None else dict(columns.schema)))
    log.info("%d items like each of %s: %s", cfg.k, f"{items.len():,}", path)
    return path


def _write_scores(
    cfg: DictConfig, run: TrainedRun, data: Any, model: NextItem | TwoTower, path: Path
) -> Path:
    """Write the scores of the pairs of ``cfg.pairs``, in the order of the file."""
    named = _read_names(str(cfg.pairs), "pairs", data)
    if named.user is None:
        raise UserError(
            f"pairs={cfg.pairs}: no column of users; give a user and an item in each row"
        )
    job = (
        _by_history(cfg, data, model)
        if isinstance(model, NextItem)
        else _by_features(cfg, data, model)
    )
    known = pl.DataFrame({"user": job.users.cast(pl.String), "row": np.arange(job.users.len())})
    pairs = pl.DataFrame({"user": named.user, "item": named.item}).with_columns(
        at=model.index_of(named.item).numpy(), place=np.arange(named.item.len())
    )
    found = pairs.join(known.unique("user", keep="first"), on="user", how="left").sort("place")
    usable = found.filter(pl.col("row").is_not_null() & (pl.col("at") >= 0)).sort("row", "place")
    scores = np.full(found.height, np.nan, dtype=np.float32)
    row, at, place = (usable[name].to_numpy() for name in ("row", "at", "place"))
    with model.inference():
        model.on_predict_start()
        blocks = np.unique(row // cfg.batch_size)
        for number in blocks.tolist():
            start = number * cfg.batch_size
            first, last = np.searchsorted(row, [start, start + cfg.batch_size])
            scores[place[first:last]] = model.pairs_of(
                job.loader._block(start, min(start + cfg.batch_size, job.users.len())),
                torch.from_numpy(row[first:last] - start),
                torch.from_numpy(at[first:last].copy()),
            )
        model.on_predict_end()
    table = found.select("user", "item").with_columns(pl.Series("score", scores).fill_nan(None))
    write_frames(path, iter([table]), table.schema)
    log.info(
        "scores of %s pairs: %s; %s have none (user or item not known)",
        f"{table.height:,}",
        path,
        f"{table['score'].null_count():,}",
    )
    return path


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
