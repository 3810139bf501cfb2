"""Compute ranking metrics over the full catalogue, vectorised and exact.

    scores (U, I) ──rank_top_k──► top (U, K) ──per_user──► {"p@5": (U,), …} ──mean──► {"p@5": (), …}
                  └──────────────────────────── RankingMetrics ────────────────────────────┘

A metric is named ``family@k``, for example ``"ndcg@10"``; `METRICS` defines each family.
To add a metric that has a value for each user, add a function to `_PER_USER` and its definition there.

Two rules hold everywhere:

*Ties.* Of items with equal scores, the one with the lower catalogue index comes first, on every
device. A model that gives many items the same score is therefore ranked by catalogue order, which
flatters it where the catalogue happens to be sorted by popularity.

*Users without a relevant item* have no recall. They are left out of the averages, and counted in
``n_users_without_relevant``. `over_all_users` gives the other convention, which counts them as zeros.

Dimension key: U users, I items of the catalogue, K places of the longest ranking requested.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torchmetrics
from torch import Tensor

from recsys_ssm.errors import UserError

# Apple's GPUs have no float64: the sums stay on the CPU there, only the ranking runs on the GPU.
_DEVICES_WITHOUT_FLOAT64 = frozenset({"mps"})

# Items in a block of the CPU pre-selection of `_top_values`: enough to vectorise the maximum.
_BLOCK_ITEMS = 64

# Scores ranked at a time on the CPU. Copies of this size reuse memory of the process.
# Larger ones would be fetched from the system, page by page, each time.
_BLOCK_ELEMENTS = 1 << 20


class _Hits(NamedTuple):
    """Input of a per-user metric: the first k places of each user's ranking."""

    hit_UK: Tensor  # float64; 1 where the item at that place is relevant
    rank_K: Tensor  # float64; 1, 2, …
    n_relevant_U: Tensor  # float64; 0 makes the value NaN, whatever the function returns
    k: int


def _precision(h: _Hits) -> Tensor:
    return h.hit_UK.sum(1) / h.k


def _recall(h: _Hits) -> Tensor:
    return h.hit_UK.sum(1) / h.n_relevant_U


def _reciprocal_rank(h: _Hits) -> Tensor:
    return (h.hit_UK / h.rank_K).amax(1)


def _hit_rate(h: _Hits) -> Tensor:
    return h.hit_UK.amax(1)


def _ndcg(h: _Hits) -> Tensor:
    discount_K = 1 / torch.log2(h.rank_K + 1)
    ideal_U = discount_K.cumsum(0)[h.n_relevant_U.clamp(1, h.k).long() - 1]
    return (h.hit_UK * discount_K).sum(1) / ideal_U


def _average_precision(h: _Hits) -> Tensor:
    precision_UK = h.hit_UK.cumsum(1) / h.rank_K
    return (h.hit_UK * precision_UK).sum(1) / h.n_relevant_U.clamp(max=h.k)


_PER_USER: dict[str, Callable[[_Hits], Tensor]] = {
    "p": _precision,
    "r": _recall,
    "mrr": _reciprocal_rank,
    "hr": _hit_rate,
    "ndcg": _ndcg,
    "map": _average_precision,
}

METRICS: dict[str, str] = {
    "p": "precision: relevant items among the first k, divided by k",
    "r": "recall: relevant items among the first k, divided by all relevant items of the user",
    "mrr": "1 / rank of the first relevant item, 0 if it comes after place k",
    "hr": "hit ratio: 1 if any of the first k items is relevant, else 0",
    "ndcg": "DCG with gain 1 and discount 1 / log2(rank + 1), divided by the best DCG possible, "
    "that of min(k, relevant items) hits",
    "map": "sum of precision@rank over the hits among the first k, divided by min(k, relevant "
    "items): Kaggle's MAP@12 of the H&M competition",
    "coverage": "share of the catalogue that is among the first k of at least one user, with or "
    "without a relevant item",
    "popularity": "training interactions of a recommended item, mean over all that are among the "
    "first k of a user: ARP of Yin et al. (2012)",
}
"""Every family of metrics and its definition."""

DEFAULT_METRICS: tuple[str, ...] = (
    *(f"{family}@{k}" for family in ("p", "r", "mrr", "hr", "ndcg") for k in (1, 5, 10)),
    "map@12",
    "coverage@10",
)

COUNTS: tuple[str, ...] = ("n_users", "n_users_without_relevant")
"""Names of the two counts that `RankingMetrics.compute` returns beside the metrics."""


class MetricName(NamedTuple):
    """Name of a metric in two parts: ``"p@5"`` is ``MetricName("p", 5)``."""

    family: str
    k: int

    def __str__(self) -> str:
        return f"{self.family}@{self.k}"

    @classmethod
    def parse(cls, name: str) -> "MetricName":
        """Split a name such as ``"p@5"`` into its parts.

        Raises:
            UserError: The family is unknown, or the cut-off is not a whole number above 0.
        """
        family, _, k = name.partition("@")
        if family not in METRICS:
            raise UserError(
                f"unknown metric {name!r}; write family@k with one of the families {', '.join(METRICS)}, "
                "for example ndcg@10"
            )
        if not (k.isascii() and k.isdecimal() and int(k) > 0):
            raise UserError(
                f"metric {name!r}: the cut-off is not a whole number above 0; write for example {family}@10"
            )
        return cls(family, int(k))


@torch.no_grad()
def rank_top_k(scores: Tensor, k: int, exclude: Tensor | None = None) -> Tensor:
    """Return the exact k best items of every user, best first.

    Of equal scores the item with the lower index comes first. Excluded items never appear; places
    for which no item is left hold -1. A score of -inf ranks with the lowest finite number, so an
    item that is not excluded is never lost.

    Args:
        scores: (U, I), any real dtype; compared as they are, integers as float64.
        k: Number of places, at least 1; may be more than I.
        exclude: (U, I) bool, True for items not to recommend (those a user has already seen).

    Returns:
        (U, k) int64 catalogue indices on the device of ``scores``.

    Raises:
        UserError: A score that takes part is NaN, which means that the model has diverged.
        ValueError: Wrong shape, dtype or k.
    """
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be (users, items) with items > 0, got {tuple(scores.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scores = scores if scores.is_floating_point() else scores.double()
    if exclude is not None:
        _check_mask("exclude", exclude, scores.shape)
    tops = []
    for start, block in user_blocks(scores, scores.shape[1]):
        seen = None if exclude is None else exclude[start : start + len(block)]
        tops.append(_rank_block(block, min(k, scores.shape[1]), seen, start))
    top = torch.cat(tops)
    return torch.nn.functional.pad(top, (0, k - top.shape[1]), value=-1)


def user_blocks(rows: Tensor, n_items: int) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of users' rows with the row each starts at; on the CPU their scores then stay in cache.

    There is at least one block, also without users.
    """
    n_users = len(rows)
    size = max(1, n_users if rows.device.type != "cpu" else _BLOCK_ELEMENTS // n_items)
    for start in range(0, max(1, n_users), size):
        yield start, rows[start : start + size]


def diverged(user: int) -> UserError:
    """Return the error to raise if a user of a batch has a score that is NaN."""
    return UserError(
        f"the scores of user {user} of this batch contain NaN: the model has diverged; "
        "try a smaller learning rate, gradient clipping or trainer.precision=32"
    )


def _rank_block(scores: Tensor, k: int, exclude: Tensor | None, first_user: int) -> Tensor:
    """Apply `rank_top_k` to a few users, with floating point scores and k <= I."""
    n_items = scores.shape[1]
    if exclude is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.clamp(min=lowest).masked_fill_(exclude, -math.inf)
    # One place more than requested shows if a tie crosses the cut-off.
    value, top = _top_values(scores, min(k + 1, n_items))
    nan_U = value[:, 0].isnan()  # topk and amax put NaN above all numbers
    if nan_U.any():
        raise diverged(first_user + int(nan_U.nonzero()[0, 0]))

    if k < n_items:
        # Of the items that tie at the cut-off, topk takes any. Their places go to the items with the
        # lowest indices. One comparison of the row replaces a stable sort.
        cut_U1 = value[:, k - 1 : k]
        row_T = (value[:, k : k + 1] == cut_U1).nonzero()[:, 0]  # T users with such a tie
        if row_T.numel():
            cut_T1 = cut_U1[row_T]
            n_above_T = (value[row_T, :k] > cut_T1).sum(1)  # these places are right already
            tied, item = (scores[row_T] == cut_T1).nonzero().unbind(1)  # by user, then by index
            n_tied_T = torch.bincount(tied, minlength=row_T.numel())
            first_T = n_tied_T.cumsum(0) - n_tied_T
            place = n_above_T[tied] + torch.arange(tied.numel(), device=tied.device) - first_T[tied]
            fits = place < k
            top[row_T[tied[fits]], place[fits]] = item[fits]

    # Ties inside the cut-off: sort by index first, then stably by score. Adding 0 turns -0 into
    # 0, since a radix sort would put -0 below.
    top = top[:, :k].sort(dim=1).values
    value, order = (scores.gather(1, top) + 0.0).sort(dim=1, descending=True, stable=True)
    top = top.gather(1, order)
    return top if exclude is None else top.masked_fill_(value == -math.inf, -1)


def _top_values(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ``scores.topk(k)``, on the CPU by way of block maxima if the catalogue is large.

    The k largest values lie in the k blocks with the largest maxima: if an item outside these blocks were
    larger than the k-th value found, k block maxima would be larger too. Finding maxima is a vectorised
    pass over the memory, and topk is not.
    """
    n_users, n_items = scores.shape
    n_blocks = n_items // _BLOCK_ITEMS
    if scores.device.type != "cpu" or n_blocks < 8 * k:
        value, index = scores.topk(k, dim=1)
        return value, index
    blocks = scores[:, : n_blocks * _BLOCK_ITEMS].view(n_users, n_blocks, _BLOCK_ITEMS)
    best = blocks.amax(2).topk(k, dim=1, sorted=False).indices
    offset = torch.arange(_BLOCK_ITEMS)
    candidate = (best[:, :, None] * _BLOCK_ITEMS + offset).flatten(1)
    rest = torch.arange(n_blocks * _BLOCK_ITEMS, n_items).expand(n_users, -1)
    candidate = torch.cat([candidate, rest], dim=1)
    value, place = scores.gather(1, candidate).topk(k, dim=1)
    return value, candidate.gather(1, place)


@torch.no_grad()
def per_user(top: Tensor, relevant: Tensor, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Compute each user's value of each metric.

    With k above the catalogue's size, the places beyond it count as misses.

    Args:
        top: (U, K) int64 from `rank_top_k`, K at least the largest cut-off; -1 is an empty place.
        relevant: (U, I) bool; or (U,) int64, the one relevant item of each user. A relevant item
            that was excluded from the ranking counts as missed.
        metrics: Names such as ``"p@5"``; all but ``coverage`` and ``popularity``, which have no
            value for one user.

    Returns:
        Name -> (U,) float64 on the device of ``top`` (the CPU if the device has no float64); NaN
        for users without a relevant item.

    Raises:
        UserError: A name is unknown, or is ``coverage`` or ``popularity``.
        ValueError: ``top`` has fewer places than a metric needs.
    """
    names = [MetricName.parse(metric) for metric in metrics]
    if other := [name.family for name in names if name.family not in _PER_USER]:
        raise UserError(
            f"metric {other[0]} has no value for one user; choose from {', '.join(_PER_USER)}"
        )
    if any(name.k > top.shape[1] for name in names):
        raise ValueError(f"top has {top.shape[1]} places, too few for {list(metrics)}")

    hit_UK, n_relevant_U = _hits(top, relevant)
    if top.device.type in _DEVICES_WITHOUT_FLOAT64:
        hit_UK, n_relevant_U = hit_UK.cpu(), n_relevant_U.cpu()
    hit_UK, n_relevant_U = hit_UK.double(), n_relevant_U.double()
    rank_K = torch.arange(1, top.shape[1] + 1, device=hit_UK.device, dtype=torch.float64)
    without_U = n_relevant_U == 0
    values = {}
    for name in names:
        hits = _Hits(hit_UK[:, : name.k], rank_K[: name.k], n_relevant_U, name.k)
        values[str(name)] = _PER_USER[name.family](hits).masked_fill(without_U, math.nan)
    return values


def _hits(top: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places that hold a relevant item, (U, K) bool, and the number of relevant items, (U,)."""
    if relevant.dim() == 1:
        if relevant.dtype != torch.int64 or relevant.shape != top.shape[:1]:
            raise ValueError(
                f"one relevant item a user must be int64 of shape {tuple(top.shape[:1])}, "
                f"got {relevant.dtype} {tuple(relevant.shape)}"
            )
        return (top == relevant[:, None]) & (top >= 0), (relevant >= 0).to(torch.int32)
    _check_mask("relevant", relevant, (top.shape[0], relevant.shape[-1]))
    return relevant.gather(1, top.clamp(min=0)) & (top >= 0), _count_relevant(relevant)


class RankingMetrics(torchmetrics.Metric):
    """Means of ranking metrics over users, exact for any batches and any number of processes.

    The states are sums and counts that are added up over processes, so no process needs to see
    all users, and no user may be counted twice (a padding sampler would do that). They are float64 and
    int64, and stay so when a trainer casts the model to half precision.

    Args:
        metrics: Names such as ``("p@5", "map@12", "coverage@10")``, see `METRICS`.
        n_items: I, the catalogue's size.
        item_counts: (I,) training interactions of each item, which ``popularity`` needs.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        UserError: A metric is unknown, or ``popularity`` comes without ``item_counts``.

    Example:
        >>> import torch
        >>> from recsys_ssm import RankingMetrics
        >>> metrics = RankingMetrics(["hr@1", "mrr@2"], n_items=3)
        >>> metrics.update(torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.5]]), torch.tensor([0, 2]))
        >>> {name: float(value) for name, value in metrics.compute().items()}
        {'hr@1': 0.5, 'mrr@2': 0.75, 'n_users': 2.0, 'n_users_without_relevant': 0.0}
    """

    full_state_update = False
    is_differentiable = False

    sums: Tensor  # (number of per-user metrics,) float64
    n_users: Tensor  # () int64, all users seen
    n_users_without_relevant: Tensor  # () int64

    def __init__(
        self,
        metrics: Sequence[str] = DEFAULT_METRICS,
        *,
        n_items: int,
        item_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not metrics:
            raise UserError("metrics is empty; name at least one, for example ndcg@10")
        names = list(dict.fromkeys(MetricName.parse(metric) for metric in metrics))
        self.n_items = n_items
        self.names = names
        self.max_k = max(name.k for name in names)
        self._averaged = [str(name) for name in names if name.family in _PER_USER]
        # Not a copy: a model's counts are read from its checkpoint after its metrics are made.
        self._item_counts = item_counts
        if self._item_counts is None and any(name.family == "popularity" for name in names):
            raise UserError(
                "metric popularity needs the items' training counts; pass item_counts, or leave popularity out"
            )
        # Coverage and popularity follow from the number of times each item was recommended.
        self._counted_ks = sorted({name.k for name in names if name.family not in _PER_USER})
        zero = torch.tensor(0)
        self.add_state("sums", torch.zeros(len(self._averaged)).double(), dist_reduce_fx="sum")
        self.add_state("n_users", zero, dist_reduce_fx="sum")
        self.add_state("n_users_without_relevant", zero.clone(), dist_reduce_fx="sum")
        for k in self._counted_ks:  # times each item was among the first k
            counts = torch.zeros(n_items, dtype=torch.int64)
            self.add_state(f"recommended_{k}", counts, dist_reduce_fx="sum")

    def update(self, scores: Tensor, relevant: Tensor, exclude: Tensor | None = None) -> None:
        """Add a batch of users.

        Args:
            scores: (U, I), the higher the better.
            relevant: (U, I) bool; or (U,) int64, the one relevant item of each user.
            exclude: (U, I) bool, items that are not to be recommended.

        Raises:
            UserError: A score is NaN.
            ValueError: Wrong shape or dtype.
        """
        if scores.dim() != 2 or scores.shape[1] != self.n_items:
            raise ValueError(
                f"scores must be (users, {self.n_items} items), got {tuple(scores.shape)}"
            )
        if relevant.dim() != 1:
            _check_mask("relevant", relevant, scores.shape)
        self.update_from_top(rank_top_k(scores, self.max_k, exclude), relevant)

    def update_from_top(self, top: Tensor, relevant: Tensor) -> None:
        """Add users that are ranked already, for example to write `per_user` beside the means.

        Args:
            top: (U, K) from `rank_top_k`, K at least ``max_k``.
            relevant: As for `update`.
        """
        # torchmetrics does this around `update`; without it compute() would return the earlier value and warn.
        self._computed = None
        self._update_count += 1
        values = per_user(top, relevant, self._averaged)
        n_without = (_hits(top[:, :1], relevant)[1] == 0).sum()
        if values:
            sums = torch.stack([value.nan_to_num(0).sum() for value in values.values()])
            self.sums += sums.to(self.sums.device)
        self.n_users += top.shape[0]
        self.n_users_without_relevant += n_without.to(self.n_users.device)
        for k in self._counted_ks:
            places = top[:, :k].to(self.n_users.device)
            counts = getattr(self, f"recommended_{k}")
            counts += torch.bincount(places[places >= 0], minlength=self.n_items)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics in the order requested, then ``n_users`` and ``n_users_without_relevant``.

        All are float64 scalars, ready for ``log_dict``. An average over zero users is NaN.
        """
        n_averaged = self.n_users - self.n_users_without_relevant
        means = dict(zip(self._averaged, self.sums / n_averaged, strict=True))
        means_device = self.sums.device
        values = {}
        for name in self.names:
            if name.family in _PER_USER:
                values[str(name)] = means[str(name)]
                continue
            counts = getattr(self, f"recommended_{name.k}")
            if self._item_counts is None or name.family == "coverage":
                values[str(name)] = (counts > 0).double().mean()
            else:
                shown = counts.cpu().double()
                popularity = shown @ self._item_counts.cpu().double() / shown.sum()
                values[str(name)] = popularity.to(means_device)
        return values | {count: getattr(self, count).double() for count in COUNTS}

    def set_item_counts(self, item_counts: Tensor) -> None:
        """Replace the items' popularity, (I,), which the metric ``popularity`` reads."""
        self._item_counts = item_counts

    def _apply(
        self, fn: Callable[..., Tensor], exclude_state: Sequence[str] = ""
    ) -> torch.nn.Module:
        # Follow a move to another device but never a cast: a trainer's "bf16-true" would otherwise
        # turn the sums into bfloat16, and bfloat16 cannot count beyond 256.
        device = fn(torch.zeros(1, device=self.device)).device
        if device.type in _DEVICES_WITHOUT_FLOAT64:
            return self
        return super()._apply(lambda state: state.to(device), exclude_state)


def _count_relevant(relevant: Tensor) -> Tensor:
    """Count relevant items: (U, I) bool to (U,) int32."""
    return torch.cat(
        [block.sum(1, dtype=torch.int32) for _, block in user_blocks(relevant, relevant.shape[1])]
    )


def over_all_users(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Convert metrics to the second convention: users without a relevant item count as zeros.

    Args:
        values: Result of `RankingMetrics.compute`: names such as ``"p@5"`` and both counts. Coverage
            and other entries are kept as they are.

    Returns:
        The same keys.
    """
    n_users, n_without = (float(values[count]) for count in COUNTS)
    every = {name: float(value) for name, value in values.items()}
    for name, mean in every.items():
        if name.partition("@")[0] in _PER_USER:
            # If no user has a relevant item, the mean is NaN and only zeros remain.
            total = mean * (n_users - n_without) if n_without < n_users else 0.0
            every[name] = total / n_users if n_users else math.nan
    return every


def _check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Check that a mask is bool: an index of -1 would otherwise be read as True."""
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be bool of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )
