"""Windows, packing, order, resuming, shards, histories to rank for: what every next-item dataset shares."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import NamedTuple

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch

from recsys_ssm.batches import MASK, START, Ragged, SequenceBatch
from recsys_ssm.data.sequences import (
    HeldOut,
    Histories,
    HistoryLoader,
    SequenceData,
    SequenceLoader,
    SequenceSplits,
)
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features
from recsys_ssm.metrics import RankingMetrics

PLACES = 1000
"""Event t of user u is item ``u * PLACES + t``: an item tells whose it is and where it stands."""


def splits(lengths=(3, 9, 4, 1, 30, 2, 7, 5), **changes) -> SequenceSplits:
    """Users with so many events each, leave-one-out."""
    lengths = np.asarray(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = np.concatenate([u * PLACES + np.arange(n) for u, n in enumerate(lengths)])
    user = np.flatnonzero(lengths >= 3)
    train_stop = offsets[1:].copy()
    train_stop[user] -= 2
    parts = {
        "item_ids": [str(i) for i in range(lengths.size * PLACES)],
        "user_ids": pl.Series([str(u) for u in range(lengths.size)]),
        "histories": Histories(events.astype(np.int32), offsets),
        "train_stop": train_stop,
        "val": HeldOut(user, offsets[user + 1] - 2),
        "test": HeldOut(user, offsets[user + 1] - 1),
    }
    return SequenceSplits(**{**parts, **changes})


class Data(SequenceData):
    def __init__(self, prepared=None, **options):
        super().__init__(name="made up", **{"max_length": 8, "batch_positions": 24, **options})
        self.prepared = prepared or splits()

    def build(self):
        return self.prepared


RANDOM_LENGTHS = np.random.default_rng(0).geometric(0.12, 300) + 2


def random_data(**options) -> Data:
    return Data(splits(RANDOM_LENGTHS), **{"max_length": 20, "batch_positions": 200, **options})


class Window(NamedTuple):
    items: list[int]
    targets: list[int]


def windows_of(batch) -> list[Window]:
    """The windows of a batch, row by row; every claim the batch makes about its layout is checked."""
    found = []
    target = batch.target if isinstance(batch, SequenceBatch) else torch.full_like(batch.item, -1)
    for item, number, position, row_target in zip(
        batch.item, batch.seq_idx, batch.position, target, strict=True
    ):
        assert torch.equal(item < 0, number < 0)
        empty = number < 0
        assert (item[empty] == -1).all() and (number[empty] == -1).all()
        assert (position[empty] == 0).all() and (row_target[empty] == -1).all()
        assert not (empty[:-1] & ~empty[1:]).any(), "padding stands at the end of a row"
        n = int(number.max()) + 1
        assert n > 0, "no row is empty"
        for i in range(n):
            (where,) = (number == i).nonzero(as_tuple=True)
            assert where.tolist() == list(range(int(where[0]), int(where[-1]) + 1)), "contiguous"
            assert position[where].tolist() == list(range(where.numel()))
            found.append(Window(item[where].tolist(), row_target[where].tolist()))
    return found


def epoch_of(loader) -> list[Window]:
    return list(itertools.chain.from_iterable(windows_of(batch) for batch in loader))


def items_of(loader) -> list[list[list[int]]]:
    return [batch.item.tolist() for batch in loader]


def span(user: int, start: int, stop: int) -> list[int]:
    return [user * PLACES + t for t in range(start, stop)]


# Windows


def test_all_positions_one_window_a_user_with_the_next_item_as_target():
    lengths = (3, 9, 4, 1, 30, 2, 7, 5)
    trained = {u: n - 2 if n >= 3 else n for u, n in enumerate(lengths)}
    expected = []
    for user, n in trained.items():
        if n >= 2:
            start = max(0, n - 1 - 8)
            expected.append(Window(span(user, start, n - 1), span(user, start + 1, n)))
    assert sorted(epoch_of(Data().train_dataloader())) == sorted(expected)


def test_all_windows_of_a_long_history_have_each_item_as_a_target_once():
    lengths = (3, 9, 4, 1, 30, 2, 7, 5)
    expected = [
        Window(span(4, start, stop), span(4, start + 1, stop + 1))
        for start, stop in ((0, 3), (3, 11), (11, 19), (19, 27))
    ]
    for user, n in enumerate(lengths):
        n = n - 2 if n >= 3 else n
        if 2 <= n <= 9:
            expected.append(Window(span(user, 0, n - 1), span(user, 1, n)))
    assert sorted(epoch_of(Data(windows="all").train_dataloader())) == sorted(expected)
    last = Data(windows="all", objective="last").train_dataloader()
    assert epoch_of(last) == epoch_of(Data(objective="last").train_dataloader())


def test_every_prefix_is_a_sample_once_with_its_target_at_the_last_position():
    lengths = (3, 9, 4, 1, 30, 2, 7, 5)
    expected = []
    for user, n in enumerate(lengths):
        for t in range(1, n - 2 if n >= 3 else n):
            items = span(user, max(0, t - 8), t)
            expected.append(Window(items, [-1] * (len(items) - 1) + span(user, t, t + 1)))
    assert sorted(epoch_of(Data(objective="last").train_dataloader())) == sorted(expected)


def test_masked_a_user_is_one_window_of_all_training_items_each_its_own_target():
    """The model hides items of it; the last training item is a token, not a target alone."""
    windows = {}
    for batch in Data(objective="masked").train_dataloader():
        assert torch.equal(batch.item, batch.target)
        for row, numbers in zip(batch.item, batch.seq_idx, strict=True):
            for number in range(int(numbers.max()) + 1):
                items = row[numbers == number].tolist()
                windows[items[0] // PLACES] = [item % PLACES for item in items]
    # Users 0 to 7 have 3, 9, 4, 1, 30, 2, 7 and 5 events; two of each are held out where there are three.
    kept = {1: range(7), 2: range(2), 4: range(20, 28), 5: range(2), 6: range(5), 7: range(3)}
    assert windows == {user: list(places) for user, places in kept.items()}
    every = Data(objective="masked", windows="all").train_dataloader()
    items = torch.cat([batch.item[batch.item >= 4 * PLACES] for batch in every])
    own = items[items < 5 * PLACES]
    assert sorted(own.tolist()) == [4 * PLACES + t for t in range(28)]


def test_masked_the_held_out_item_is_hidden_at_the_end_of_its_history():
    data = Data(objective="masked")
    (loss, val), test = data.val_dataloader(), data.test_dataloader()
    for loader, held in ((val, 2), (test, 1)):
        batch = next(iter(loader))
        for u, target in enumerate(batch.target.tolist()):
            user, place = divmod(target, PLACES)
            row, column = divmod(int(batch.last[u]), batch.item.shape[1])
            own = batch.seq_idx[row] == batch.seq_idx[row, column]
            expected = [user * PLACES + t for t in range(max(0, place - 7), place)]
            assert batch.item[row, own].tolist() == [*expected, MASK]
            assert batch.position[row, own].tolist() == list(range(len(expected) + 1))
            assert place == [3, 9, 4, 1, 30, 2, 7, 5][user] - held
            assert batch.seen.values[batch.seen.offsets[u + 1] - 1] == target - 1
    for batch in loss:
        assert torch.equal(batch.item == MASK, batch.target >= 0)
        for row, column in (batch.target >= 0).nonzero().tolist():
            target = int(batch.target[row, column])
            assert batch.item[row, column - 1] == target - 1
            assert not (batch.item[row] == target).any()


@pytest.mark.parametrize("objective", ["all", "last", "masked"])
def test_no_held_out_item_is_in_training(objective):
    data = Data(objective=objective)
    events = data.splits.histories.events
    held = set(events[data.splits.val.event]) | set(events[data.splits.test.event])
    shown = set()
    for batch in data.train_dataloader():
        shown |= set(batch.item.flatten().tolist()) | set(batch.target.flatten().tolist())
    assert len(held) == 12 and not held & shown


def starts_of(loader) -> list[Window]:
    """The windows of an epoch; START, which stands for no event, is checked to be first alone."""
    found = []
    for batch in loader:
        for row, numbers, positions, targets in zip(*batch[:4], strict=True):
            for number in range(int(numbers.max()) + 1):
                own = numbers == number
                items = row[own].tolist()
                assert START not in items[1:]
                assert positions[own].tolist() == list(range(len(items)))
                found.append(Window(items, targets[own].tolist()))
    return found


@pytest.mark.parametrize("windows", ["latest", "all"])
def test_a_start_token_makes_the_first_item_a_target(windows):
    lengths = (3, 9, 4, 1, 30, 2, 7, 5)
    expected = []
    for user, n in enumerate(lengths):
        n = n - 2 if n >= 3 else n
        # Place -1 is the token's; a window of 8 places ends where the last target is.
        stops = range(n - 1, -1, -8) if windows == "all" else [n - 1]
        for stop in stops:
            begin = max(-1, stop - 8)
            items = [START if t < 0 else user * PLACES + t for t in range(begin, stop)]
            expected.append(Window(items, span(user, begin + 1, stop + 1)))
    loader = Data(start_token=True, windows=windows).train_dataloader()
    assert sorted(starts_of(loader)) == sorted(expected)


@pytest.mark.parametrize("windows", ["latest", "recent"])
def test_a_start_token_is_a_prefix_of_its_own(windows):
    """Every item is a target once; with ``recent`` the latest 8 training items, the history beginning there."""
    lengths = (3, 9, 4, 1, 30, 2, 7, 5)
    expected = []
    for user, n in enumerate(lengths):
        n = n - 2 if n >= 3 else n
        first = max(0, n - 8) if windows == "recent" else 0
        for t in range(first, n):
            items = [START, *span(user, first, t)][-8:]
            expected.append(Window(items, [-1] * (len(items) - 1) + span(user, t, t + 1)))
    options = {"objective": "last", "start_token": True, "windows": windows}
    assert sorted(starts_of(Data(**options).train_dataloader())) == sorted(expected)


def test_recent_prefixes_without_a_start_token():
    windows = epoch_of(Data(objective="last", windows="recent").train_dataloader())
    long = sorted(window.items for window in windows if window.items[0] >= 4 * PLACES)
    own = [items for items in long if items[0] < 5 * PLACES]
    assert own == [span(4, 20, t) for t in range(21, 28)]


def test_a_start_token_stands_before_histories_to_rank_for():
    data = Data(start_token=True)
    (loss, val), test = data.val_dataloader(), data.test_dataloader()
    for loader in (val, test):
        batch = next(iter(loader))
        for u, target in enumerate(batch.target.tolist()):
            user, place = divmod(target, PLACES)
            row, column = divmod(int(batch.last[u]), batch.item.shape[1])
            own = batch.seq_idx[row] == batch.seq_idx[row, column]
            assert batch.item[row, own].tolist() == [START, *span(user, 0, place)][-8:]
            seen = batch.seen.values[batch.seen.offsets[u] : batch.seen.offsets[u + 1]]
            assert seen.tolist() == span(user, 0, place)
    for window in starts_of(loss):
        (target,) = (t for t in window.targets if t >= 0)
        user, place = divmod(target, PLACES)
        assert window.items == [START, *span(user, 0, place)][-8:]


@pytest.mark.parametrize("objective", ["all", "last"])
def test_batches_of_a_number_of_samples_have_a_row_for_each(objective):
    loader = random_data(objective=objective, batch_samples=32).train_dataloader()
    rows = [batch.item.shape[0] for batch in loader]
    assert len(loader) == len(rows) and max(rows) <= 32 and max(rows) - min(rows) <= 1
    assert all(int(batch.seq_idx.max()) == 0 for batch in loader)
    together = random_data(objective=objective).train_dataloader()
    assert sorted(epoch_of(loader)) == sorted(epoch_of(together))


def test_validation_loss_is_on_the_held_out_item_alone():
    loader, _ = Data().val_dataloader()
    expected = []
    for user, n in enumerate((3, 9, 4, 1, 30, 2, 7, 5)):
        if n >= 3:
            items = span(user, max(0, n - 2 - 8), n - 2)
            expected.append(Window(items, [-1] * (len(items) - 1) + span(user, n - 2, n - 1)))
    assert sorted(epoch_of(loader)) == sorted(expected)
    few, _ = Data(n_val_loss=2, seed=1).val_dataloader()
    some = epoch_of(few)
    assert len(some) == 2 and all(window in expected for window in some)
    other = [epoch_of(Data(n_val_loss=2, seed=seed).val_dataloader()[0]) for seed in range(8)]
    assert len({str(windows) for windows in other}) > 1


# Packing


@pytest.mark.parametrize("objective", ["all", "last"])
def test_batches_are_nearly_full_and_of_the_size_asked_for(objective):
    loader = random_data(objective=objective).train_dataloader()
    valid = [int((batch.item >= 0).sum()) for batch in loader]
    cells = sum(batch.item.numel() for batch in loader)
    assert 1 - sum(valid) / cells < 0.03
    assert loader.padding_share == pytest.approx(1 - sum(valid) / cells, abs=0.005)
    assert min(valid) > 0.7 * 200 and max(valid) < 1.3 * 200
    assert abs(np.mean(valid) - 200) < 20
    assert len(loader) == len(valid)


def test_a_short_row_holds_one_window_and_a_long_one_several():
    one = Data(max_length=8, batch_positions=8)
    assert max(batch.item.shape[1] for batch in one.train_dataloader()) == 8
    longer = Data(max_length=8, row_length=24, batch_positions=24)
    batches = list(longer.train_dataloader())
    assert max(batch.item.shape[1] for batch in batches) > 16
    assert sorted(epoch_of(longer.train_dataloader())) == sorted(epoch_of(one.train_dataloader()))
    # The latest max_length alone, however long the row.
    assert max(len(window.items) for window in epoch_of(longer.train_dataloader())) == 8


# Order, resuming, shards


@pytest.mark.parametrize("objective", ["all", "last"])
def test_an_epoch_has_every_window_once_in_an_order_of_its_own(objective):
    loader = random_data(objective=objective).train_dataloader()
    epochs = [epoch_of(loader) for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({str(window.items) for window in epochs[0]}) == len(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2]
    # Windows of one length are shuffled among the rows, not rows alone.
    packed = [
        {
            str(item.tolist())
            for batch in loader
            for item, n in zip(batch.item, batch.seq_idx, strict=True)
            if n.max() > 0
        }
        for _ in range(2)
    ]
    assert len(packed[0] & packed[1]) < 0.1 * len(packed[0])


def test_order_depends_on_seed_and_epoch_alone():
    one, two, other = (
        random_data(seed=seed, objective="last").train_dataloader() for seed in (0, 0, 1)
    )
    epochs = [items_of(one) for _ in range(3)]
    assert epochs == [items_of(two) for _ in range(3)]
    assert items_of(other) != epochs[0]
    late = random_data(objective="last").train_dataloader()
    late.set_epoch(2)
    assert items_of(late) == epochs[2]


def test_without_shuffling_every_epoch_is_the_same():
    loader = random_data(shuffle=False).train_dataloader()
    assert items_of(loader) == items_of(loader)
    assert sorted(epoch_of(loader)) == sorted(epoch_of(random_data().train_dataloader()))


def test_a_killed_run_goes_on_with_the_next_batch():
    loader = random_data().train_dataloader()
    n = len(loader)
    whole = [batch for _ in range(3) for batch in items_of(loader)]
    for given_out in (0, 1, n - 1, n, n + 1, 2 * n - 1, 2 * n):
        killed = random_data().train_dataloader()
        stream = itertools.chain.from_iterable(killed for _ in range(3))
        for _ in range(given_out):
            next(stream)
        resumed = random_data().train_dataloader()
        resumed.load_state_dict(killed.state_dict())
        rest = [batch for _ in range(3) for batch in items_of(resumed)]
        assert rest[: len(whole) - given_out] == whole[given_out:]


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches, self.users = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch.item.tolist())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 1:
            self.users.append((batch.user.tolist(), batch.seen.lengths.tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_sees_every_batch_and_resumes_within_an_epoch(tmp_path):
    def fit(ckpt_path=None):
        model = Recorder()
        L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=2,
            callbacks=[
                L.pytorch.callbacks.ModelCheckpoint(
                    tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1
                )
            ],
        ).fit(model, random_data(), ckpt_path=ckpt_path, weights_only=True)
        return model

    whole = fit()
    loader = random_data().train_dataloader()
    assert whole.batches == [*items_of(loader), *items_of(loader)]
    users, lengths = (list(itertools.chain(*part)) for part in zip(*whole.users, strict=True))
    test = random_data().splits.val
    n_users = test.user.size
    assert users[-n_users:] == test.user.tolist()
    assert lengths[-n_users:] == (RANDOM_LENGTHS - 2).tolist()
    for step in (1, len(loader) - 1, len(loader), len(loader) + 2):
        rest = fit(tmp_path / f"step={step}.ckpt")
        assert rest.batches == whole.batches[step:], f"resumed after step {step}"


def sharded(loader: SequenceLoader, rank: int, world_size: int) -> SequenceLoader:
    return SequenceLoader(
        loader.events,
        loader.windows,
        every_position=loader.every_position,
        batch_positions=200,
        row_length=loader.row_length,
        shuffle=loader.shuffle,
        seed=loader.seed,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_shards_are_disjoint_and_take_the_same_number_of_steps(world_size):
    whole = random_data().train_dataloader()
    everything = {str(window.items) for window in epoch_of(whole)}
    shards = [sharded(whole, rank, world_size) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    seen = set()
    for _ in range(12):
        parts = [[str(w.items) for w in epoch_of(shard)] for shard in shards]
        together = list(itertools.chain(*parts))
        assert len(together) == len(set(together)) and set(together) <= everything
        assert len(together) >= 0.8 * len(everything)
        seen |= set(together)
    assert seen == everything, "what one epoch leaves out another has"


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_shards_of_the_validation_loss_are_complete(world_size):
    whole, _ = random_data(n_val_loss=None).val_dataloader()
    parts = [epoch_of(sharded(whole, rank, world_size)) for rank in range(world_size)]
    assert sorted(itertools.chain(*parts)) == sorted(epoch_of(whole))


# Histories to rank for


def histories_of(batch):
    """(items, seen, target, user) of each user of a batch."""
    windows = windows_of(batch)
    cells = batch.item.flatten()
    by_last = {window.items[-1]: window.items for window in windows}
    assert len(windows) == batch.user.numel() == batch.last.numel() == batch.target.numel()
    offsets = batch.seen.offsets.tolist()
    return [
        (
            by_last[int(cells[batch.last[i]])],
            batch.seen.values[offsets[i] : offsets[i + 1]].tolist(),
            int(batch.target[i]),
            int(batch.user[i]),
        )
        for i in range(len(windows))
    ]


@pytest.mark.parametrize("part", ["val", "test"])
def test_each_user_is_ranked_for_once_from_the_latest_of_the_whole_history(part):
    data = random_data(eval_batch_size=32)
    loader = data.val_dataloader()[1] if part == "val" else data.test_dataloader()
    got = list(itertools.chain.from_iterable(histories_of(batch) for batch in loader))
    expected = []
    for user, n in enumerate(RANDOM_LENGTHS):
        target = n - 2 if part == "val" else n - 1
        expected.append(
            (
                span(user, max(0, target - 20), target),
                span(user, 0, target),
                user * PLACES + target,
                user,
            )
        )
    assert got == expected
    assert len(loader) == 10 and [batch.user.numel() for batch in loader] == [32] * 9 + [12]


def test_histories_are_packed():
    loader = random_data(eval_batch_size=100).test_dataloader()
    cells = sum(batch.item.numel() for batch in loader)
    valid = sum(int((batch.item >= 0).sum()) for batch in loader)
    assert 1 - valid / cells < 0.04
    (alone,) = Data(splits((5,))).test_dataloader()
    assert alone.item.shape == (1, 4), "a row is no longer than what stands in it"


@pytest.mark.parametrize("world_size", [1, 3, 7, 400])
def test_processes_share_the_users_in_order_none_twice(world_size):
    prepared = random_data().splits
    users = []
    for rank in range(world_size):
        loader = HistoryLoader(
            prepared.histories,
            prepared.test,
            max_length=20,
            row_length=20,
            batch_size=16,
            rank=rank,
            world_size=world_size,
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        users += [batch.user for batch in batches]
    assert torch.cat(users).tolist() == prepared.test.user.tolist()


def test_batches_move_to_a_device_as_lightning_moves_them():
    from lightning.fabric.utilities import move_data_to_device

    batch = next(iter(Data().test_dataloader()))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert {moved.item.device.type, moved.seen.values.device.type} == {"meta"}
    assert moved.seen.offsets.shape == batch.seen.offsets.shape


# Splits and baselines


def test_training_counts_leave_out_what_is_held_out():
    counts = splits((4, 2, 1)).item_counts
    assert counts.nonzero().flatten().tolist() == [0, 1, PLACES, PLACES + 1, 2 * PLACES]
    assert counts.sum() == 5


def test_nothing_to_train_or_test_on_is_an_error():
    with pytest.raises(UserError, match="no training pair is left"):
        splits((3, 3))
    with pytest.raises(UserError, match="no validation user is left"):
        splits((2, 2))
    nobody = HeldOut(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    with pytest.raises(UserError, match="no test user is left"):
        splits((5, 5), test=nobody)


def test_baselines_equal_their_scores_ranked():
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, 50)
    events = generator.integers(0, 30, lengths.sum()).astype(np.int32)  # items come again
    made = splits(lengths)
    prepared = splits(
        lengths,
        histories=Histories(events, made.histories.offsets),
        item_ids=[str(i) for i in range(30)],
    )
    names = ["hr@1", "ndcg@5", "mrr@20", "coverage@5", "popularity@5"]
    data = Data(prepared, eval_batch_size=16)
    found = data.baseline_metrics(names)
    assert list(found) == ["popularity", "popularity_unfiltered", "repeat_last_unfiltered"]
    for name in ("popularity", "popularity_unfiltered"):
        ranking = RankingMetrics(names, n_items=30, item_counts=prepared.item_counts)
        for batch in data.test_dataloader():
            n = batch.user.numel()
            seen = batch.seen.mask(0, n, 30)  # a target that was seen before is a miss
            scores = prepared.item_counts.float().expand(n, -1)
            ranking.update(scores, batch.target, seen if name == "popularity" else None)
        assert found[name] == {key: float(value) for key, value in ranking.compute().items()}
    ranking = RankingMetrics(names, n_items=30, item_counts=prepared.item_counts)
    for user, event in zip(*prepared.test, strict=True):
        history = events[prepared.histories.offsets[user] : event][::-1].tolist()
        top = list(dict.fromkeys(history))
        top = torch.tensor([top + [-1] * (20 - len(top))])
        ranking.update_from_top(top, torch.tensor([int(events[event])]))
    assert int(ranking.n_users) == 50
    for key, value in ranking.compute().items():
        assert found["repeat_last_unfiltered"][key] == pytest.approx(float(value))


def test_baselines_where_the_catalogue_is_short():
    prepared = splits((3, 3, 5))
    events = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 1], dtype=np.int32)
    prepared = splits(
        (3, 3, 5), histories=Histories(events, prepared.histories.offsets), item_ids=["a", "b", "c"]
    )
    found = Data(prepared).baseline_metrics(["hr@20", "hr@1"])
    # Everything seen is left out: the target comes first, and for the third user there is nothing left.
    assert found["popularity"]["hr@1"] == found["popularity"]["hr@20"] == pytest.approx(2 / 3)
    assert found["popularity_unfiltered"]["hr@20"] == 1


def test_repeat_last_is_of_different_items_whatever_the_other_metrics():
    """The latest item may have come many times in a row."""
    events = np.array([0, 1, 2, 3, *(3, 2, 1), *[0] * 40, 1], dtype=np.int32)
    made = splits((4, events.size - 4))
    prepared = splits(
        (4, events.size - 4),
        histories=Histories(events, made.histories.offsets),
        item_ids=list("abcd"),
    )
    data = Data(prepared)
    alone = data.baseline_metrics(["hr@3", "mrr@3"])["repeat_last_unfiltered"]
    assert (alone["hr@3"], alone["mrr@3"]) == (0.5, pytest.approx(1 / 4))
    beside = data.baseline_metrics(["hr@3", "mrr@3", "hr@20"])["repeat_last_unfiltered"]
    assert alone == {name: beside[name] for name in alone}


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "dataset.max_length=0"),
        (
            {"batch_positions": 7},
            "dataset.batch_positions=7: a batch must have room for a row of 8",
        ),
        ({"row_length": 7}, "dataset.row_length=7"),
        ({"objective": "prefix"}, "dataset.objective=prefix: expected all, last or masked"),
        ({"windows": "some"}, "dataset.windows=some: expected latest, all or recent"),
        ({"eval_batch_size": 0}, "dataset.eval_batch_size=0"),
        ({"n_val_loss": 0}, "dataset.n_val_loss=0"),
        (
            {"objective": "masked", "max_length": 1},
            "dataset.max_length=1: with dataset.objective=masked",
        ),
        ({"batch_samples": 0}, "dataset.batch_samples=0"),
        ({"windows": "recent"}, "dataset.windows=recent: prefixes are samples"),
        ({"objective": "masked", "start_token": True}, "dataset.start_token=true"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Data(**options)


def test_maximal_lengths_at_and_above_16_bits():
    for max_length in (65_535, 65_536):
        data = Data(max_length=max_length, batch_positions=max_length)
        windows = epoch_of(data.train_dataloader())
        assert max(len(window.items) for window in windows) == 27 and len(windows) == 6


# Memory


def test_prefixes_are_never_copied():
    """Two million events as prefixes of up to 50 would be 800 MB; what is held is some bytes a sample."""
    n_users, n_events = 20_000, 2_000_000
    offsets = np.linspace(0, n_events, n_users + 1).astype(np.int64)
    events = np.random.default_rng(0).integers(0, 1000, n_events).astype(np.int32)
    user = np.arange(n_users)
    prepared = SequenceSplits(
        item_ids=[str(i) for i in range(1000)],
        user_ids=pl.Series(user).cast(pl.String),
        histories=Histories(events, offsets),
        train_stop=offsets[1:] - 2,
        val=HeldOut(user, offsets[1:] - 2),
        test=HeldOut(user, offsets[1:] - 1),
    )
    tracemalloc.start()
    loader = Data(
        prepared, objective="last", max_length=50, batch_positions=2048
    ).train_dataloader()
    batch = next(iter(loader))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loader.windows) == n_events - 3 * n_users
    assert int((batch.target >= 0).sum()) > 30
    assert peak < 100e6


def test_features_of_items_are_kept_beside_the_ids():
    features = Features(torch.zeros(2, 1), torch.zeros(2, 0, dtype=torch.long))
    assert splits(items=features).items is features


def test_ragged_moves():
    ragged = Ragged.from_pairs(torch.tensor([0, 1]), torch.tensor([3, 4]), 2)
    assert ragged.to("meta").values.device.type == "meta"


# Targets since an instant


@pytest.mark.parametrize("objective", ["all", "last"])
@pytest.mark.parametrize("windows", ["latest", "all", "recent"])
@pytest.mark.parametrize("start_token", [False, True])
def test_targets_are_the_training_events_since_an_instant(objective, windows, start_token):
    if windows == "recent" and objective == "all":
        pytest.skip("windows=recent is for prefixes")
    lengths = RANDOM_LENGTHS[:80]
    prepared = splits(lengths)
    offsets = prepared.histories.offsets
    rng = np.random.default_rng(1)
    since = offsets[:-1] + rng.integers(0, lengths + 1)
    prepared = splits(lengths, train_start=since)
    options = {"objective": objective, "windows": windows, "start_token": start_token}
    data = Data(prepared, **options)
    found = []
    for batch in data.train_dataloader():
        for item, seq, target in zip(batch.item, batch.seq_idx, batch.target, strict=True):
            for place in (target >= 0).nonzero().flatten().tolist():
                before = item[: place + 1][seq[: place + 1] == seq[place]].tolist()
                found.append((int(target[place]), tuple(before)))
    expected = []
    for user, (first, stop) in enumerate(zip(offsets[:-1], prepared.train_stop, strict=True)):
        n = int(stop - first)
        for t in range(0 if start_token else 1, n):
            if first + t < since[user]:
                continue
            at = n - 1 - t  # targets that follow
            if objective == "all":
                begin = -start_token
                end = n - 1
                if windows == "latest":
                    low = max(begin, end - data.max_length)
                else:
                    low = max(begin, end - data.max_length * (at // data.max_length + 1))
                if t - 1 < low:
                    continue
                events = range(low, t)
            else:
                low = -start_token
                if windows == "recent":
                    low = max(0, n - data.max_length) - start_token
                    if t <= low:
                        continue
                events = range(max(low, t - data.max_length), t)
            shown = tuple(START if e == -1 and start_token else user * PLACES + e for e in events)
            if windows == "recent" and start_token and low >= 0:
                shown = (START, *shown[1:]) if events[0] == low else shown
            expected.append((user * PLACES + t, shown))
    assert sorted(found) == sorted(expected)


def test_without_an_instant_nothing_changes():
    plain, all_new = splits(), splits(train_start=splits().histories.offsets[:-1])
    for objective in ("all", "last"):
        one, other = (
            Data(each, objective=objective).train_dataloader() for each in (plain, all_new)
        )
        for a, b in zip(one, other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert (x is None and y is None) or torch.equal(x, y)
