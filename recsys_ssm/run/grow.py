"""Begin a training from the weights of a finished run on another catalogue (option ``init_from``).

Rows of items and of categories are taken over by their ids, all other weights as they are. A new item begins from the
mean of the items that stand near it in the histories, or of the items whose features are most like its own. Items that
the dataset does not have any more are dropped.

Legend: I items of the new catalogue, N of them new; D the length of an embedding; U users, K places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from recsys_ssm.data.base import RecommenderData
from recsys_ssm.data.sequences import SequenceData, SequenceSplits, first_unseen
from recsys_ssm.errors import UserError
from recsys_ssm.features import MISSING, Features
from recsys_ssm.metrics import per_user
from recsys_ssm.models.histories import HistoryRecommender, histories_of
from recsys_ssm.models.recommender import Recommender, RowName
from recsys_ssm.run.trained import load_model, named_by, open_run

NEW_ITEMS = ("neighbours", "features", "random")
"""Where the rows of new items begin; see ``init_items`` in ``conf/train.yaml``."""

REACH = 5
"""Places before and after a new item whose items are its neighbours."""

N_ALIKE = 10
"""Items of the most similar features whose mean a new item begins from."""

K = 10
"""Places of the figures before and after."""

_BLOCK = 64
"""New items whose features are compared at once."""


@dataclass(frozen=True)
class Growth:
    """A model that has taken over the weights of a run.

    Attributes:
        run: The run's folder.
        before: Its model.
        place: (I,) catalogue index of each item in the run's catalogue, -1 for a new item.
        counts: Number of items by what was done: ``old``, ``new``, ``dropped``, and ``from_neighbours``,
            ``from_features``, ``from_all`` of the new ones.
    """

    run: str
    before: Recommender
    place: Tensor
    counts: dict[str, int]

    def __str__(self) -> str:
        counts = self.counts
        begun = ", ".join(
            f"{counts[key]:,} from {what}"
            for key, what in (
                ("from_neighbours", "the mean of their neighbours"),
                ("from_features", "items of similar features"),
                ("from_all", "the mean of all items"),
            )
            if counts.get(key)
        )
        return (
            f"{counts['old']:,} items taken over by id, {counts['new']:,} new{f' ({begun})' if begun else ''}, "
            f"{counts['dropped']:,} dropped"
        )


def begin_from(cfg: DictConfig, data: RecommenderData[Any], model: Recommender) -> Growth | None:
    """Take over the weights of the run that ``init_from`` names; None if it names none.

    Args:
        cfg: The config.
        data: The dataset.
        model: The model, which is changed.

    Raises:
        UserError: There is no such run, or its model has another architecture.
    """
    if cfg.init_items not in NEW_ITEMS:
        raise UserError(f"init_items={cfg.init_items}: expected one of {', '.join(NEW_ITEMS)}")
    if cfg.init_from is None:
        return None
    with named_by("init_from"):
        run = open_run(str(cfg.init_from), root=cfg.output_root)
        old, _ = load_model(run)
    where = f"init_from={cfg.init_from}"
    if type(old) is not type(model):
        raise UserError(
            f"{where}: a run of {type(old).__name__}, and the model is {type(model).__name__}; give the options it was "
            "trained with"
        )
    place = old.index_of(model.ids)
    _check_titles(old, model, place, where)
    is_new = (place < 0).numpy()
    counts = {
        "old": int((~is_new).sum()),
        "new": int(is_new.sum()),
        "dropped": len(old.item_ids) - int((~is_new).sum()),
    }
    if not counts["old"]:
        raise UserError(
            f"{where}: none of its {len(old.item_ids):,} items is in the dataset, for example {old.item_ids[0]!r:.60}; "
            "check that ids are written alike"
        )
    take_over(model, old, where)
    table = getattr(getattr(model, "tokenizer", None), "embedding", None)
    if isinstance(table, torch.nn.Embedding) and counts["new"] and cfg.init_items != "random":
        with torch.no_grad():
            rows = table.weight[1:]
            counts |= begin_new_items(rows, is_new, data, by_features=cfg.init_items == "features")
    return Growth(str(run.folder), old, place, counts)


def take_over(model: Recommender, old: Recommender, where: str) -> None:
    """Copy the parameters of a model; rows of items and categories by their names.

    A category that the old model does not have begins from the mean of its feature's other rows.

    Args:
        model: The model to change.
        old: The model to copy from.
        where: Beginning of messages.

    Raises:
        UserError: A parameter has another shape, or one of the models does not have it.
    """
    have, want = dict(old.named_parameters()), dict(model.named_parameters())
    names_before, names_now = old.row_names(), model.row_names()
    with torch.no_grad():
        for name in dict.fromkeys((*want, *have)):
            rows = int(name in names_now)
            before, now = (
                None if part is None else tuple(part.shape[rows:])
                for part in (have.get(name), want.get(name))
            )
            if before != now:
                raise UserError(
                    f"{where}: a run of another architecture: {name} is {_shape(have.get(name))} there and "
                    f"{_shape(want.get(name))} here; give the backbone, features and sizes it was trained with"
                )
            if rows:
                _take_rows(want[name], have[name], names_now[name], names_before[name])
            else:
                want[name].copy_(have[name])


def _take_rows(new: Tensor, old: Tensor, names: list[RowName], known: list[RowName]) -> None:
    at = {name: row for row, name in enumerate(known)}
    source = torch.tensor([at.get(name, -1) for name in names])
    new[source >= 0] = old[source[source >= 0]]
    by_feature: dict[str, list[int]] = {}
    for row, (feature, _) in enumerate(known):
        by_feature.setdefault(feature, []).append(row)
    for row in (source < 0).nonzero().flatten().tolist():
        feature = names[row][0]
        if feature != "item" and feature in by_feature:
            new[row] = old[by_feature[feature]].mean(0)


def _shape(parameter: Tensor | None) -> str:
    return "absent" if parameter is None else str(tuple(parameter.shape))


def _check_titles(old: Recommender, model: Recommender, place: Tensor, where: str) -> None:
    """Check that the vectors of titles are those of the run.

    Raises:
        UserError: An item's vector differs: TF-IDF makes other vectors for another catalogue.
    """
    before, now = (
        getattr(getattr(each, "tokenizer", None), "vectors", None) for each in (old, model)
    )
    if before is None or now is None or before.shape[1] != now.shape[1]:
        return  # other shapes are found among the parameters
    known = place >= 0
    if not torch.allclose(now[known], before[place[known]], atol=1e-4):
        raise UserError(
            f"{where}: the vectors of its items' titles are others (TF-IDF depends on the catalogue); give "
            "tokenizer.text a sentence encoder, or leave it out"
        )


def begin_new_items(
    rows: Tensor, is_new: np.ndarray, data: RecommenderData[Any], *, by_features: bool
) -> dict[str, int]:
    """Set the embeddings of new items.

    Args:
        rows: (I, D) embeddings; those of old items are taken over already.
        is_new: (I,) bool.
        data: The dataset.
        by_features: Use similar features first, not neighbours.

    Returns:
        Number of new items by where they begin: ``from_neighbours``, ``from_features``, ``from_all``.

    Raises:
        UserError: ``by_features``, and the dataset has no features of items.
    """
    splits, features = data.splits, getattr(data.splits, "items", None)
    if by_features and features is None:
        raise UserError(
            "init_items=features: the dataset's items have no features; name them with dataset.items, or give "
            "init_items=neighbours"
        )
    sums, n = torch.zeros_like(rows), torch.zeros(len(rows))
    if not by_features and isinstance(splits, SequenceSplits):
        new, near = neighbours(splits, is_new)
        sums.index_add_(0, torch.from_numpy(new), rows[torch.from_numpy(near)])
        n += torch.bincount(torch.from_numpy(new), minlength=len(rows))
    found = n > 0
    rows[found] = sums[found] / n[found].unsqueeze(1)
    left = torch.from_numpy(is_new) & ~found
    counts = {"from_neighbours": int(found.sum())}
    old = torch.from_numpy(~is_new)
    if features is not None and bool(left.any()):
        rows[left] = _mean_of_alike(features, left, old, rows)
        counts["from_features"] = int(left.sum())
    elif bool(left.any()):
        rows[left] = rows[old].mean(0)
        counts["from_all"] = int(left.sum())
    return counts


def neighbours(splits: SequenceSplits, is_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of a new item and an old one at most :data:`REACH` places apart in the training events of a user.

    Args:
        splits: The histories.
        is_new: (I,) bool.

    Returns:
        Catalogue indices of the new items and of the old ones, int64; a pair as often as it stands in the events.
    """
    events, offsets = splits.histories
    owner = np.repeat(np.arange(offsets.size - 1, dtype=np.int32), np.diff(offsets))
    owner[np.arange(events.size) >= splits.train_stop[owner]] = -1
    pairs = []
    for step in range(1, REACH + 1):
        same = np.flatnonzero((owner[:-step] == owner[step:]) & (owner[step:] >= 0))
        one, other = events[same], events[same + step]
        for a, b in ((one, other), (other, one)):
            wanted = is_new[a] & ~is_new[b]
            pairs.append((a[wanted], b[wanted]))
    new, near = (np.concatenate(each).astype(np.int64) for each in zip(*pairs, strict=True))
    return new, near


def _mean_of_alike(features: Features, new: Tensor, old: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of the rows (N, D) of the old items with the most equal categories and the nearest numbers."""
    places, means = old.nonzero().squeeze(1), []
    known = features.rows(places)
    for block in new.nonzero().squeeze(1).split(_BLOCK):
        mine = features.rows(block)
        equal = (mine.categorical.unsqueeze(1) == known.categorical) & (
            known.categorical != MISSING
        )
        distance = (mine.numeric.unsqueeze(1) - known.numeric).abs().sum(2)
        alike = equal.sum(2) - distance
        best = alike.topk(min(N_ALIKE, len(places)), dim=1).indices
        means.append(rows[places[best]].mean(1))
    return torch.cat(means)


def compare(growth: Growth, model: Recommender, data: RecommenderData[Any]) -> dict[str, Any]:
    """Return what was done to old and new items, with figures of the test users by the kind of their target.

    Before: the run's model for the same users, with the run's catalogue. Popularity: the items with the most training
    events. All three leave out seen items if the model does.

    Args:
        growth: The growth.
        model: The model, tested.
        data: The dataset.

    Returns:
        ``run``, ``items`` (counts), and for next items ``k`` and ``old`` and ``new``, each with ``n_users``, and
        ``before`` (old items alone), ``after`` and ``popularity``: their ``hr@10`` and ``ndcg@10``.
    """
    done: dict[str, Any] = {"run": growth.run, "items": growth.counts}
    if not (isinstance(model, HistoryRecommender) and isinstance(data, SequenceData)):
        return done
    before = growth.before
    assert isinstance(before, HistoryRecommender)
    tested = model.test_rankings.frame()
    place = growth.place
    back = torch.full((len(before.item_ids) + 1,), -2)  # -2: no item of the new catalogue
    back[place[place >= 0]] = (place >= 0).nonzero().squeeze(1)
    popular = torch.argsort(data.item_counts(), descending=True, stable=True)
    tops: dict[str, list[Tensor]] = {"before": [], "popularity": []}
    users, targets = [], []
    for batch in data.test_batches():
        histories = [[int(place[item]) for item in each] for each in histories_of(batch.seen)]
        known = [[item for item in each if item >= 0] for each in histories]
        top, _ = before.best_or_popular(known, K, filter_seen=model.filter_seen)
        tops["before"].append(back[top])
        tops["popularity"].append(
            first_unseen(popular, batch.seen, K)
            if model.filter_seen
            else popular[:K].expand(len(batch.user), -1)
        )
        users.append(batch.user)
        targets.append(batch.target)
    user, target = torch.cat(users), torch.cat(targets)
    recommended = pl.DataFrame({"user": user.numpy()}).join(
        tested, on="user", how="left", maintain_order="left"
    )["recommended"]
    after = torch.tensor([(row.to_list() + [-1] * K)[:K] for row in recommended])
    ranked = {
        "before": torch.cat([_padded(each) for each in tops["before"]]),
        "after": after,
        "popularity": torch.cat([_padded(each) for each in tops["popularity"]]),
    }
    done["k"] = K
    for name, mine in (("old", place[target] >= 0), ("new", place[target] < 0)):
        done[name] = {
            "n_users": int(mine.sum()),
            **{
                by: _figures(top[mine], target[mine])
                for by, top in ranked.items()
                if (name, by) != ("new", "before")
            },
        }
    return done


def _padded(top: Tensor) -> Tensor:
    return torch.nn.functional.pad(top, (0, K - top.shape[1]), value=-1)


def _figures(top: Tensor, target: Tensor) -> dict[str, float]:
    """Return the hit ratio and NDCG of rankings (U, K) with one relevant item each (U,)."""
    values = per_user(top, target, (f"hr@{K}", f"ndcg@{K}"))
    return {name: float(value.mean()) for name, value in values.items() if len(target)}
