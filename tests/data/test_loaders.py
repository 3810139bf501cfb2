"""Loaders: order, resuming within an epoch, shards, worker processes."""

from __future__ import annotations

import itertools
import logging
import pickle
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from pairs import N, PairData, Recorder, features, flat, loader, users_of
from torch.utils.data._utils.pin_memory import pin_memory

from recsys_ssm.batches import Ragged
from recsys_ssm.data.loaders import _Batches
from recsys_ssm.data.two_tower import Ranking, RankingLoader
from recsys_ssm.errors import UserError
from recsys_ssm.models.optim import configure_optimizers

# Order


def test_an_epoch_has_every_pair_once_in_batches_of_the_size_asked_for():
    one = loader()
    batches = users_of(one)
    assert len(batches) == len(one) == 6
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert sorted(itertools.chain(*batches)) == list(range(N))
    assert batches != users_of(loader(shuffle=False))


def test_order_depends_on_seed_and_epoch_alone():
    one, two, other = loader(), loader(), loader(seed=1)
    epochs = [users_of(one) for _ in range(3)]
    assert epochs == [users_of(two) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert users_of(other) != epochs[0]
    # Not on the global generators either.
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the one that must not matter)
    assert users_of(loader()) == epochs[0]
    late = loader()
    late.set_epoch(2)
    assert users_of(late) == epochs[2]


def test_without_shuffling_every_epoch_is_the_same():
    one = loader(shuffle=False)
    assert flat(one) == flat(one) == list(range(N))


def test_iterating_anew_begins_the_epoch_anew():
    one = loader()
    first = next(iter(one)).user_index.tolist()
    assert next(iter(one)).user_index.tolist() == first


# Resuming


@pytest.mark.parametrize("given_out", range(14))
def test_a_killed_run_goes_on_with_the_next_batch(given_out):
    """Six batches an epoch: killed after each of the first fourteen, ends of epochs among them."""
    endless = loader()
    whole = [batch for _ in range(3) for batch in users_of(endless)]

    killed = loader()
    stream = itertools.chain.from_iterable(killed for _ in range(3))
    for _ in range(given_out):
        next(stream)
    state = killed.state_dict()

    resumed = loader()
    resumed.load_state_dict(state)
    rest = [batch for _ in range(3) for batch in users_of(resumed)]
    assert rest[: len(whole) - given_out] == whole[given_out:]


def test_an_epoch_ends_with_its_last_batch_not_with_a_request_for_one_more():
    """Lightning counts a sized loader's batches and never asks for the one after the last."""
    one, whole = loader(), loader()
    epochs = [users_of(whole) for _ in range(2)]
    iterator = iter(one)
    assert [next(iterator).user_index.tolist() for _ in range(len(one))] == epochs[0]
    assert one.state_dict() == {"epoch": 1, "position": 0}
    assert users_of(one) == epochs[1]


def _fit(folder, ckpt_path=None, **trainer):
    model = Recorder()
    keep_all = L.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=1
    )
    L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep_all] if ckpt_path is None else [],
        enable_checkpointing=ckpt_path is None,
        **trainer,
    ).fit(model, PairData(batch_size=3), ckpt_path=ckpt_path, weights_only=True)
    return model.batches


@pytest.mark.parametrize(
    "trainer",
    [
        {"max_epochs": 3},
        {"max_steps": 11, "max_epochs": -1, "check_val_every_n_epoch": None},
        {"max_epochs": 3, "limit_train_batches": 2},
        {"max_epochs": 3, "val_check_interval": 2},
    ],
    ids=["epochs", "steps", "limited", "validation within the epoch"],
)
@pytest.mark.filterwarnings("ignore")
def test_lightning_sees_full_epochs_and_resumes_after_any_step(tmp_path, trainer, caplog):
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")
    whole = _fit(tmp_path, **trainer)
    batches = trainer.get("limit_train_batches", 4)
    steps = trainer.get("max_steps", 3 * batches)
    assert [(epoch, index) for epoch, index, _ in whole] == [
        (step // batches, step % batches) for step in range(steps)
    ]
    reference = loader(10, batch_size=3)
    for epoch in range(2):
        got = [users for at, _, users in whole if at == epoch]
        assert got == users_of(reference)[:batches]
    for step in (1, 2, batches, batches + 1, steps - 1):
        rest = _fit(tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt", **trainer)
        assert rest == whole[step:], f"resumed after step {step}"


# Shards


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shards_of_a_shuffled_epoch_are_disjoint_and_take_the_same_number_of_steps(world_size):
    shards = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        given = [flat(shard) for shard in shards]
        assert len({len(one) for one in given}) == 1
        together = list(itertools.chain(*given))
        assert len(together) == len(set(together)) == N - N % world_size
    assert len({len(shard) for shard in shards}) == 1


def test_what_one_epoch_leaves_out_another_has():
    shards = [loader(rank=rank, world_size=5) for rank in range(5)]
    seen = {user for _ in range(20) for shard in shards for user in flat(shard)}
    assert seen == set(range(N))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shards_of_an_unshuffled_pass_are_disjoint_and_complete(world_size):
    """Validation pairs: none is left out, none is counted twice."""
    shards = [loader(rank=r, world_size=world_size, shuffle=False) for r in range(world_size)]
    given = [flat(shard) for shard in shards]
    assert sorted(itertools.chain(*given)) == list(range(N))
    assert [len(shard) for shard in shards] == [-(-len(one) // 4) for one in given]


# A checkpoint within an epoch, with a schedule that counts the training's steps


class _CosineRecorder(Recorder):
    """Asks for the number of steps before a checkpoint is restored, as experiment=next_item/best does."""

    def configure_optimizers(self):
        cosine = {
            "_target_": "recsys_ssm.models.optim.WarmupCosine",
            "warmup_steps": 1,
            "total_steps": -1,
        }
        sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
        return configure_optimizers(self, sgd, cosine)

    def on_train_start(self):
        self.factor = self.lr_schedulers().lr_lambdas[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_schedule_that_counts_the_steps_does_not_lose_the_place_in_the_epoch(
    tmp_path, num_workers
):
    def fit(ckpt_path=None):
        model = _CosineRecorder()
        checkpoints = L.pytorch.callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False
        )
        L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=2,
            val_check_interval=0.5,
            num_sanity_val_steps=0,
            callbacks=[checkpoints] if ckpt_path is None else [],
            enable_checkpointing=ckpt_path is None,
        ).fit(
            model,
            PairData(batch_size=3, num_workers=num_workers),
            ckpt_path=ckpt_path,
            weights_only=True,
        )
        assert model.factor(8) == 0 < model.factor(7), "two epochs of four batches are eight steps"
        return model.batches

    whole = fit()
    assert len(whole) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step={n}.ckpt" for n in (2, 4, 6, 8)
    ]
    for step in (2, 4, 6):
        assert fit(tmp_path / f"step={step}.ckpt") == whole[step:], f"resumed after step {step}"


# Workers


def ranking_loader(**options):
    user = torch.arange(17) + 3
    ranking = Ranking(user, Ragged.from_pairs(torch.arange(17), torch.arange(17) % 7, 17))
    return RankingLoader(features(N), ranking, 7, batch_size=4, **options)


@pytest.mark.filterwarnings("ignore:.*worker processes")
@pytest.mark.parametrize("make", [loader, ranking_loader])
def test_workers_make_the_same_batches_in_the_same_order(make):
    plain, ahead = make(), make(num_workers=2)
    for _ in range(2):
        for one, other in zip(plain, ahead, strict=True):
            assert torch.equal(one.user_index, other.user_index)
            assert torch.equal(one.user.numeric, other.user.numeric)
            assert type(one) is type(other)


@pytest.mark.filterwarnings("ignore:.*worker processes")
@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 3)])
@pytest.mark.parametrize("given_out", [0, 1, 5, 6, 7])
def test_a_run_may_go_on_with_another_number_of_workers(before, after, given_out):
    endless = loader()
    whole = [batch for _ in range(3) for batch in users_of(endless)]
    killed = loader(num_workers=before)
    stream = itertools.chain.from_iterable(killed for _ in range(3))
    for _ in range(given_out):
        next(stream)
    resumed = loader(num_workers=after)
    resumed.load_state_dict(killed.state_dict())
    rest = [batch for _ in range(3) for batch in users_of(resumed)]
    assert rest[: len(whole) - given_out] == whole[given_out:]


@pytest.mark.filterwarnings("ignore:.*worker processes")
def test_an_epoch_set_after_iteration_is_asked_for_is_the_one_that_is_made():
    """Lightning makes the iterator of a run's first epoch before it calls set_epoch."""
    one = loader(num_workers=2)
    iterator = iter(one)
    one.set_epoch(2)
    late = loader()
    late.set_epoch(2)
    assert users_of(iterator) == users_of(late)


def test_what_workers_get_can_be_pickled():
    """Other platforms start workers as new processes."""
    batches = _Batches(loader()._begin(np.random.default_rng(0)))
    again = pickle.loads(pickle.dumps(batches))
    assert torch.equal(again[1].user_index, batches[1].user_index)
    ranking = pickle.loads(pickle.dumps(_Batches(ranking_loader()._at)))
    assert ranking[4].user_index.tolist() == [19]


def test_workers_are_counted_from_0():
    for make in (loader, ranking_loader, PairData):
        with pytest.raises(UserError, match=r"dataset\.num_workers=-1: give 0 or more"):
            make(num_workers=-1)


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_memory_is_pinned_for_cuda_alone(device, pinned):
    data = PairData(num_workers=3)
    assert not data.train_dataloader().pin_memory
    root = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(strategy=root, global_rank=0, world_size=1)
    loaders = [data.train_dataloader(), *data.val_dataloader(), data.test_dataloader()]
    assert [(one.pin_memory, one.num_workers) for one in loaders] == [(pinned, 3)] * 4


@pytest.mark.filterwarnings("ignore")
def test_pinning_does_not_change_the_batches():
    assert users_of(loader(pin_memory=True)) == users_of(loader())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a CUDA device")
def test_every_tensor_of_a_batch_is_pinned():
    (batch, *_) = loader(pin_memory=True)
    assert batch.target.is_pinned() and batch.user.numeric.is_pinned()
    ragged = pin_memory(Ragged.from_mask(torch.eye(3) > 0))
    assert ragged.values.is_pinned() and ragged.offsets.is_pinned()
