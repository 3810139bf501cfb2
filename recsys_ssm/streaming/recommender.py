"""Recommend to users whose events come one by one.

A causal backbone with a state of fixed size (Mamba, Mamba-2, Mamba-3, their filters) reads each event once: time and
memory of an event do not grow with the history. Other models read the window of a user's latest events again.

Legend: B users, n pairs, D = d_model, W numbers of a state, K places.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.batches import START
from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.tokenizers import ItemTokenizer
from recsys_ssm.streaming.histories import EventHistories
from recsys_ssm.streaming.store import StateStore, Stored

Beyond = Literal["state", "window"]


class _Form(NamedTuple):
    """Shape of a backbone's state for one user."""

    example: Any
    """The state of one user before the first event."""
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]

    @property
    def width(self) -> int:
        return sum(shape.numel() for shape in self.shapes)


def _check_whole(option: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{option}={value}: give a whole number, at least {least}")


def _leaves(state: Any) -> list[Tensor]:
    """Return the tensors of a state in their order.

    Raises:
        TypeError: It has something other than tensors, None, tuples and lists.
    """
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, tuple | list):
        return [leaf for part in state for leaf in _leaves(part)]
    raise TypeError(f"a {type(state).__name__} in the state")


def _built(example: Any, leaves: Iterator[Tensor]) -> Any:
    """Return a state that is built like ``example``, of other tensors."""
    if example is None:
        return None
    if isinstance(example, Tensor):
        return next(leaves)
    parts = [_built(part, leaves) for part in example]
    return type(example)(*parts) if hasattr(example, "_fields") else type(example)(parts)


class StreamingRecommender:
    """Recommend to users whose events come one by one. Safe to call from several threads, one call at a time.

    Answers equal those of :meth:`NextItem.recommend` for a history within the model's length. Beyond it, ``beyond``
    decides. With learned positions the window of the latest events counts in any case.

    Args:
        model: The model. It must not change afterwards.
        histories: Events to begin with; None: none.
        in_memory: Users whose state is kept in memory.
        on_disk: Users whose state is kept in a temporary file, when memory has no room; 0: there is no file. Absent
            states are computed from the history again.
        folder: Folder of that file; None: that of temporary files.
        beyond: Answer for a history that is longer than ``model.max_length``. ``state``: the state goes on, as if the
            model's length were unlimited. ``window``: the latest events alone, as :meth:`NextItem.recommend`.

    Raises:
        UserError: The model reads more than items, or an option is wrong.

    Example:
        >>> import polars as pl
        >>> from recsys_ssm import Interactions, Mamba, NextItem, StreamingRecommender
        >>> clicks = pl.DataFrame({"user_id": [u for u in range(30) for _ in range(5)],
        ...                        "item_id": [(u + i) % 12 for u in range(30) for i in range(5)],
        ...                        "timestamp": [i for _ in range(30) for i in range(5)]})
        >>> model = NextItem.for_data(Interactions(interactions=clicks), backbone=Mamba(d_model=16, n_layers=1))
        >>> stream = StreamingRecommender(model)
        >>> stream.add([("ann", "3"), ("ann", "4"), ("bob", "7")])
        3
        >>> stream.recommend(["ann", "bob"], k=2)["user"].to_list()
        ['ann', 'ann', 'bob', 'bob']
    """

    def __init__(
        self,
        model: NextItem,
        histories: EventHistories | None = None,
        *,
        in_memory: int = 4096,
        on_disk: int = 0,
        folder: str | Path | None = None,
        beyond: Beyond = "state",
    ) -> None:
        if not isinstance(model, NextItem):
            raise UserError(
                f"a {type(model).__name__} cannot be streamed; pass a NextItem, whose users are histories"
            )
        for part in (model.tokenizer, model.backbone):
            if getattr(part, "uses_times", False) or getattr(part, "uses_columns", False):
                raise UserError(
                    f"{type(part).__name__} reads times or columns of events, and a stream has items alone; pass a "
                    "model without them"
                )
        _check_whole("in_memory", in_memory, 1)
        _check_whole("on_disk", on_disk, 0)
        if beyond not in get_args(Beyond):
            raise UserError(f"beyond={beyond}: expected state or window")
        model.check_items()
        self.model = model
        self.histories = EventHistories() if histories is None else histories
        self._catalogue = np.zeros(0, np.int64)
        self._lock = threading.RLock()
        with model.inference():
            self._items = model._items()
            self._form, self.why_window = _form_of(model)
        positions = model.tokenizer.position
        self.limit = model.max_length if beyond == "window" or positions is not None else None
        """Most tokens that a state stands for; of a longer history the window is read. None: there is no limit."""
        self._store: StateStore | None = None
        if self._form is not None:
            self._prepare(self._form, in_memory, on_disk, None if folder is None else Path(folder))

    def _prepare(self, form: _Form, in_memory: int, on_disk: int, folder: Path | None) -> None:
        """Make the store, the tokens of the catalogue, and the state before the first event."""
        model = self.model
        wide = torch.float64 if torch.float64 in form.dtypes else torch.float32
        self._dtype = torch.promote_types(wide, self._items.dtype)
        d_model = model.backbone.d_model
        self._width = d_model + form.width
        self._store = StateStore(
            self._width, in_memory=in_memory, on_disk=on_disk, folder=folder, dtype=self._dtype
        )
        with model.inference():
            self._tokens: Tensor | None = None
            if type(model.tokenizer) is ItemTokenizer and model.tokenizer.position is None:
                # The last row, which index -1 finds, is the start token's.
                every = torch.tensor([*range(len(model.item_ids)), START], device=model.device)
                self._tokens = model.tokenizer(
                    every.unsqueeze(1), torch.zeros_like(every).unsqueeze(1), model.features
                ).squeeze(1)
            output = self._items.new_zeros(1, d_model)
            state = model.backbone.init_state(1)
            if model.start_token:
                start = torch.tensor([START])
                output, state = model.backbone.step(self._token(start, torch.zeros(1)), state)
            self._initial = self._packed(output, state)

    @property
    def state_size(self) -> int:
        """Numbers of a user's state and output; 0 where the model reads windows."""
        return self._width if self._store is not None else 0

    @property
    def n_states(self) -> int:
        """Users whose state is in memory or in the file."""
        return 0 if self._store is None else len(self._store)

    # Events

    def add(self, events: Iterable[tuple[str, str]]) -> int:
        """Append events to the histories of their users, in the given order; return their number.

        Users and items may be new. A model ignores an item that its catalogue does not have.

        Args:
            events: Pairs of a user and an item.
        """
        with self._lock:
            count = 0
            for user, item in events:
                self.histories.add(str(user), (str(item),))
                count += 1
            return count

    # Answers

    def recommend(
        self, users: Sequence[str], k: int = 10, *, filter_seen: bool | None = None
    ) -> pl.DataFrame:
        """Return the ``k`` best items for each user.

        Args:
            users: Names of users. One without an item of the catalogue gets the most popular items, unless the model
                has a start token.
            k: Number of items, at least 1.
            filter_seen: Leave out the items of the user's whole history. None: as in the model's test.

        Returns:
            Columns ``user``, ``rank`` (from 1), ``item``, ``score`` (null for the most popular items).

        Raises:
            UserError: ``k`` is below 1.
        """
        _check_whole("k", k, 1)
        names = [str(user) for user in users]
        top, scores = self.best(names, k, filter_seen=filter_seen)
        table = self.model.as_table(top, scores).with_columns(pl.col("score").fill_nan(None))
        rows = table["user"].to_numpy()
        return table.with_columns(pl.Series("user", names, dtype=pl.String).gather(rows))

    def best(
        self, users: Sequence[str], k: int, *, filter_seen: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the catalogue indices of :meth:`recommend` (B, K), -1 where none is left, and their scores."""
        model = self.model
        filter_seen = model.filter_seen if filter_seen is None else filter_seen
        k = min(k, len(model.item_ids))
        with self._lock, model.inference():
            query, warm = self._queries(users)
            top, scores = model.most_popular(len(users), k)
            rows = warm.nonzero().squeeze(1)
            if rows.numel():
                seen = self._seen([users[row] for row in rows.tolist()]) if filter_seen else None
                found, values = model.best_items(query[rows], self._items, k, seen)
                top[rows], scores[rows] = found, values
            return top, scores

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return the score of an item for a user, for each pair; None if the model knows one of them not.

        Args:
            pairs: Pairs of a user and an item.
        """
        model = self.model
        users = list(dict.fromkeys(str(user) for user, _ in pairs))
        place = {user: row for row, user in enumerate(users)}
        item = model.index_of(pl.Series([str(item) for _, item in pairs], dtype=pl.String))
        owner = torch.tensor([place[str(user)] for user, _ in pairs], dtype=torch.long)
        with self._lock, model.inference():
            query, warm = self._queries(users)
            known = (item >= 0) & warm[owner]
            values = torch.full((len(pairs),), torch.nan)
            values[known] = model.pair_scores(query, self._items, owner[known], item[known])
        return [None if value != value else value for value in values.tolist()]

    # Queries

    def _queries(self, users: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, D) that rank the catalogue, and (B,) bool: False where there is no history."""
        distinct = list(dict.fromkeys(users))
        output = self._items.new_zeros(len(distinct), self.model.backbone.d_model)
        warm = torch.zeros(len(distinct), dtype=torch.bool)
        in_window = list(range(len(distinct)))
        if self._store is not None:
            in_window = []
            size = min(self._store.in_memory, _BLOCK)
            for start in range(0, len(distinct), size):
                block = slice(start, start + size)
                found, n_tokens = self._advance(distinct[block])
                output[block] = found.to(output)
                warm[block] = torch.from_numpy(n_tokens > 0)
                in_window += (start + np.flatnonzero(n_tokens < 0)).tolist()
        query = self.model.head.query(output)
        if in_window:
            windows = [self._window(distinct[row]) for row in in_window]
            some = [
                row
                for row, window in zip(in_window, windows, strict=True)
                if window or self.model.start_token
            ]
            shown = [window for window in windows if window or self.model.start_token]
            warm[some] = True
            if shown:
                query[some] = self.model._query(shown)
        if len(distinct) == len(users):
            return query, warm
        row_of = {user: row for row, user in enumerate(distinct)}
        rows = [row_of[user] for user in users]
        return query[rows], warm[rows]

    def _window(self, user: str) -> list[int]:
        """Return a user's latest items of the catalogue, at least as many as the model sees."""
        wanted, length = self.model.max_length, self.histories.length(user)
        begin = max(length - wanted, 0)
        while True:
            known = self._known(self.histories.since(user, begin))
            if begin == 0 or known.size >= wanted:
                return known.tolist()
            begin = max(begin - 2 * (length - begin), 0)

    def _known(self, numbers: np.ndarray) -> np.ndarray:
        """Return the catalogue indices of items, without those that the catalogue does not have."""
        items = self.histories.items
        if len(items) > self._catalogue.size:
            new = pl.Series(items[self._catalogue.size :], dtype=pl.String)
            self._catalogue = np.concatenate([self._catalogue, self.model.index_of(new).numpy()])
        found = self._catalogue[numbers]
        return found[found >= 0]

    def _seen(self, users: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return pairs of a row of ``users`` and an item that the user had."""
        had = [self._known(self.histories.since(user, 0)) for user in users]
        # An item that was had a thousand times is one pair.
        had = [items if items.size < _MANY else np.unique(items) for items in had]
        owner = np.repeat(np.arange(len(users)), [items.size for items in had])
        device = self.model.device
        return torch.from_numpy(owner).to(device), torch.from_numpy(np.concatenate(had)).to(device)

    def _advance(self, users: Sequence[str]) -> tuple[Tensor, np.ndarray]:
        """Bring states up to date; return outputs (B, D) and numbers of tokens (B,), -1 where the window counts."""
        assert self._store is not None and self._form is not None
        rows, read, tokens = self._store.load(users)
        absent = read < 0
        rows[torch.from_numpy(absent)] = self._initial
        read[absent], tokens[absent] = 0, int(self.model.start_token)
        length = np.array([self.histories.length(user) for user in users])
        new = [
            self._known(self.histories.since(user, place)) if place < n else _NOTHING
            for user, place, n in zip(users, read.tolist(), length.tolist(), strict=True)
        ]
        n_new = np.array([items.size for items in new])
        stays = np.full(len(users), True)
        if self.limit is not None:
            stays = tokens + n_new <= self.limit
        changed = np.flatnonzero((n_new > 0) & stays)
        if changed.size:
            order = changed[np.argsort(-n_new[changed], kind="stable")].tolist()
            rows[order] = self._stepped(rows[order], [new[i] for i in order], tokens[order])
            tokens = tokens + n_new
        moved = np.flatnonzero((length > read) & stays).tolist()
        if moved:
            state = Stored(rows[moved], length[moved], tokens[moved])
            self._store.save([users[i] for i in moved], state)
        return rows[:, : self.model.backbone.d_model], np.where(stays, tokens, -1)

    def _stepped(self, rows: Tensor, items: Sequence[np.ndarray], tokens: np.ndarray) -> Tensor:
        """Return the rows of states (B, W) after their new items; the users with the most items come first."""
        sizes = np.array([each.size for each in items])
        every = torch.from_numpy(np.concatenate(items))
        first = torch.from_numpy(np.cumsum(sizes) - sizes)
        position = torch.from_numpy(tokens)
        done = torch.empty_like(rows)
        output, state = self._unpacked(rows)
        n_active = len(items)
        for t in range(int(sizes[0])):
            n = int((sizes > t).sum())
            if n < n_active:
                done[n:n_active] = self._packed(output, state)[n:]
                state = self._first_rows(state, n)
                n_active = n
            output, state = self.model.backbone.step(
                self._token(every[first[:n] + t], position[:n] + t), state
            )
        done[:n_active] = self._packed(output, state)
        return done

    def _token(self, item: Tensor, position: Tensor) -> Tensor:
        """Return the tokens (B, D) of one item for each user."""
        device = self.model.device
        if self._tokens is not None:
            return self._tokens[item.clamp(min=-1).to(device)]
        item, position = item.unsqueeze(1).to(device), position.long().unsqueeze(1).to(device)
        return self.model.tokenizer(item, position, self.model.features).squeeze(1)

    # Rows of numbers

    def _packed(self, output: Tensor, state: Any) -> Tensor:
        """Return outputs (B, D) and states as rows (B, W) on the CPU."""
        parts = [output, *(leaf.flatten(1) for leaf in _leaves(state))]
        return torch.cat([part.to("cpu", self._dtype) for part in parts], dim=1)

    def _unpacked(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Return outputs (B, D) and states on the model's device from rows (B, W)."""
        form, device = self._form, self.model.device
        assert form is not None
        d_model = self.model.backbone.d_model
        sizes = [d_model, *(shape.numel() for shape in form.shapes)]
        output, *parts = rows.split(sizes, dim=1)
        leaves = [
            part.reshape(-1, *shape).to(device, dtype)
            for part, shape, dtype in zip(parts, form.shapes, form.dtypes, strict=True)
        ]
        return output.to(device, self._items.dtype), _built(form.example, iter(leaves))

    @staticmethod
    def _first_rows(state: Any, n: int) -> Any:
        return _built(state, (leaf[:n] for leaf in _leaves(state)))


_BLOCK = 256
"""Users whose states are advanced at once."""
_MANY = 1024
"""Events of a user from which the items are made distinct."""
_NOTHING = np.zeros(0, np.int64)


def _form_of(model: NextItem) -> tuple[_Form | None, str | None]:
    """Return the shape of a user's state, or None and the reason for which the model reads windows."""
    backbone: Backbone = model.backbone
    name = type(backbone).__name__
    if model.objective == "masked":
        return None, f"{name} sees the whole history (dataset.objective=masked)"
    if model.tokenizer.position_from == "end":
        return (
            None,
            "tokenizer.position_from=end: each event moves the positions of those before it",
        )
    try:
        one, two = (backbone.init_state(size) for size in (1, 2))
    except NotImplementedError:
        return None, f"{name} sees the whole history"
    token = next(model.parameters()).new_zeros(1, backbone.d_model)
    try:
        leaves, pairs = _leaves(one), _leaves(two)
        after = _leaves(backbone.step(token, one)[1])
    except TypeError as error:
        return None, f"{name} has {error}"
    if [leaf.shape for leaf in after] != [leaf.shape for leaf in leaves]:
        return None, f"the state of {name} grows with the history"
    if any(two.shape != (2, *one.shape[1:]) for one, two in zip(leaves, pairs, strict=True)):
        return None, f"the state of {name} has no row for each user"
    return _Form(one, [leaf.shape[1:] for leaf in leaves], [leaf.dtype for leaf in leaves]), None
