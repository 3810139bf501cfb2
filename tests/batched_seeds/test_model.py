"""Train models of several seeds at once: each ends as if it were trained alone."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_ssm.batched_seeds.data import SeedsData
from recsys_ssm.batched_seeds.model import BatchableSoftmax, Seeds
from recsys_ssm.data.spotify import SpotifyData
from recsys_ssm.errors import UserError
from recsys_ssm.models.losses import InBatchSoftmax
from recsys_ssm.models.two_tower import TwoTower

_BACKBONES = "recsys_ssm.models.backbones"
BACKBONES: dict[str, dict[str, Any]] = {
    "mamba": {"_target_": f"{_BACKBONES}.mamba.Mamba", "n_layers": 1, "d_conv": 4},
    "transformer": {"_target_": f"{_BACKBONES}.transformer.Transformer", "dim_feedforward": 32},
    "mamba2": {
        "_target_": f"{_BACKBONES}.mamba2.Mamba2",
        "n_layers": 1,
        "headdim": 8,
        "d_state": 8,
    },
    "mamba3": {
        "_target_": f"{_BACKBONES}.mamba3.Mamba3",
        "n_layers": 1,
        "headdim": 8,
        "d_state": 8,
    },
    "hydra": {"_target_": f"{_BACKBONES}.hydra.Hydra", "n_layers": 1, "headdim": 8, "d_state": 8},
    "identity": {"_target_": f"{_BACKBONES}.identity.Identity"},
}
ADAM = {"_target_": "torch.optim.Adam", "lr": 3e-3}


def data_of(seed: int) -> SpotifyData:
    return SpotifyData(
        name="spotify",
        seed=seed,
        n_train=64,
        n_val=16,
        n_val_users=20,
        n_test_users=10,
        batch_size=8,
    )


def model_of(seed: int, backbone: str = "mamba", **options: Any) -> TwoTower:
    L.seed_everything(seed, verbose=False)
    spec = {**BACKBONES[backbone], "d_model": 16, **options.pop("backbone", {})}
    return TwoTower.for_data(data_of(seed), **{"backbone": spec, "optimizer": ADAM, **options})


def trainer_in(folder: Path, steps: int, **options: Any) -> L.Trainer:
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "precision": "64-true",
        "accelerator": "cpu",
    }
    return L.Trainer(default_root_dir=folder, **{**settings, **options})


def alone(folder: Path, seed: int, steps: int, options: dict, trainer: dict) -> TwoTower:
    model = model_of(seed, **options)
    trainer_in(folder, steps, **trainer).fit(model, datamodule=data_of(seed))
    return model


def at_once(folder: Path, seeds: list[int], steps: int, options: dict, trainer: dict) -> Seeds:
    models = Seeds([model_of(seed, **options) for seed in seeds], seeds)
    data = SeedsData([data_of(seed) for seed in seeds])
    trainer_in(folder, steps, **trainer).fit(models, datamodule=data)
    return models


def furthest(models: Seeds, number: int, model: TwoTower) -> float:
    wanted, found = model.state_dict(), models.state_of(number)
    assert wanted.keys() == found.keys()
    return max(
        float((wanted[name] - found[name]).abs().max()) for name in wanted if wanted[name].numel()
    )


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
def test_each_seed_is_its_single_run(tmp_path: Path, backbone: str) -> None:
    """Check 200 steps in float64, within 1e-8."""
    seeds = [3, 4]
    models = at_once(tmp_path, seeds, 200, {"backbone": backbone}, {})
    assert models.user_tower.head[0].weight.dtype == torch.float64
    for number, seed in enumerate(seeds):
        model = alone(tmp_path, seed, 200, {"backbone": backbone}, {})
        start = model_of(seed, backbone)
        moved = max(
            float((a - b).detach().abs().max())
            for a, b in zip(model.parameters(), start.parameters(), strict=True)
            if a.numel()
        )
        assert moved > 0.1
        assert furthest(models, number, model) < 1e-8


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({"backbone": "mamba2"}, {}),
        ({"backbone": "mamba3"}, {}),
        ({"backbone": "hydra"}, {}),
        ({"backbone": "identity"}, {}),
        ({"loss": {"_target_": "recsys_ssm.models.losses.InBatchSoftmax"}}, {}),
        ({"loss": {"_target_": "recsys_ssm.models.losses.BinaryCrossEntropy"}}, {}),
        (
            {"optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.3}},
            {"gradient_clip_val": 0.02},
        ),
        (
            {
                "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
                "scheduler": {
                    "_target_": "recsys_ssm.models.optim.WarmupCosine",
                    "warmup_steps": 3,
                    "total_steps": 12,
                },
            },
            {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
        ),
        ({}, {"accumulate_grad_batches": 2}),
    ],
    ids=str,
)
def test_other_models_losses_and_optimizers(tmp_path: Path, options: dict, trainer: dict) -> None:
    models = at_once(tmp_path, [0, 1], 12, options, trainer)
    for number in range(2):
        assert furthest(models, number, alone(tmp_path, number, 12, options, trainer)) < 1e-8


def test_float32_runs_on_the_kernels(tmp_path: Path) -> None:
    """Check that rounding alone separates the runs: after few steps they are close, and seeds differ."""
    models = at_once(tmp_path, [0, 1], 5, {}, {"precision": "32-true"})
    for number in range(2):
        model = alone(tmp_path, number, 5, {}, {"precision": "32-true"})
        assert furthest(models, number, model) < 2e-4
        assert furthest(models, 1 - number, model) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_is_as_many_calls_for_any_number_of_seeds(backbone: str, dtype: torch.dtype) -> None:
    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    def counted(n: int) -> Counter[str]:
        models = Seeds([model_of(seed, backbone) for seed in range(n)], range(n)).to(dtype)
        optimizer = models.configure_optimizers()
        batch = next(iter(SeedsData([data_of(seed) for seed in range(n)]).train_dataloader()))
        if dtype == torch.float64:
            floats = (x.double() for x in (batch.user.numeric, batch.item.numeric, batch.target))
            user, item, target = floats
            batch = batch._replace(
                user=batch.user._replace(numeric=user),
                item=batch.item._replace(numeric=item),
                target=target,
            )
        with warnings.catch_warnings(), Calls() as mode:
            warnings.simplefilter("error")  # that vmap goes one by one
            models(batch).sum().backward()
            optimizer.step()
        return mode.counts

    found = counted(2)
    assert found == counted(5)
    assert found.total() > 50


@pytest.mark.parametrize("option", [{"logq": True}, {"negatives": 3}])
def test_a_loss_that_is_not_batched_is_refused(option: dict) -> None:
    loss = {"_target_": "recsys_ssm.models.losses.InBatchSoftmax", **option}
    with pytest.raises(UserError, match=f"loss.{next(iter(option))}=.* train the seeds one by one"):
        Seeds([model_of(seed, loss=loss) for seed in (0, 1)], (0, 1))


def test_softmax_of_fixed_shapes_is_the_softmax() -> None:
    torch.manual_seed(0)
    user, item = torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(5, (12,))
    for target in (torch.randint(-1, 2, (12,)), torch.zeros(12)):
        found = BatchableSoftmax()(user, item, target, index)
        wanted = InBatchSoftmax()(user, item, target, index)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(
            torch.autograd.grad(found, (user, item)),
            torch.autograd.grad(wanted, (user, item), allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_validation_is_the_single_models(tmp_path: Path) -> None:
    options = {"limit_val_batches": None, "val_check_interval": 4, "precision": "32-true"}
    models = Seeds([model_of(seed) for seed in (0, 1)], (0, 1))
    data = SeedsData([data_of(seed) for seed in (0, 1)])
    trainer = trainer_in(tmp_path, 4, **options, check_val_every_n_epoch=None)
    trainer.fit(models, datamodule=data)
    metrics = trainer.callback_metrics
    for number in (0, 1):
        model = model_of(number)
        model.load_state_dict(models.state_of(number))
        single = trainer_in(tmp_path, 4, limit_val_batches=None, precision="32-true")
        single.validate(model, datamodule=data_of(number), verbose=False)
        wanted = {name: float(value) for name, value in single.callback_metrics.items()}
        assert models.validated[number] == pytest.approx(wanted)
        for name, value in wanted.items():
            assert metrics[f"{name}/seed{number}"] == pytest.approx(value)
    for name in wanted:
        mean = sum(found[name] for found in models.validated) / 2
        assert metrics[f"{name}/mean"] == pytest.approx(mean)


def test_each_seed_keeps_its_best_state(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Seeds([model_of(seed, "identity") for seed in (0, 1, 2)], (0, 1, 2))
    monkeypatch.setattr(Seeds, "global_step", 0)
    nan = float("nan")
    for step, values in enumerate(([0.1, nan, 0.5], [0.3, 0.2, 0.4], [0.3, 0.1, nan]), start=1):
        monkeypatch.setattr(Seeds, "global_step", step)
        with torch.no_grad():
            models.user_tower.head[0].bias.fill_(step)
        models.validated = [{"val/ndcg@10": value} for value in values]
        models._keep_best()
    assert models.best_values == [0.3, 0.2, 0.5] and models.best_steps == [2, 2, 1]
    name = "user_tower.head.0.bias"
    assert [int(models.best_of(i)[name][0]) for i in range(3)] == [2, 2, 1]
    assert int(models.state_of(0)[name][0]) == 3
    checkpoint: dict = {}
    models.on_save_checkpoint(checkpoint)
    again = Seeds([model_of(seed, "identity") for seed in (0, 1, 2)], (0, 1, 2))
    again.on_load_checkpoint(checkpoint)
    assert again.best_values == models.best_values and int(again.best_of(2)[name][0]) == 1
    models.monitor = "val/hits@10"
    with pytest.raises(UserError, match=r"val/hits@10.*choose from val/ndcg@10"):
        models._keep_best()


def test_seeds_of_the_same_bins_share_them() -> None:
    """The quantiles are of the data, not trained: a seed's state has them whole."""
    bins = {"_target_": "recsys_ssm.models.tokenizers.MambularTokenizer"}
    models = []
    for seed in (0, 1):
        L.seed_everything(seed, verbose=False)
        models.append(TwoTower.for_data(data_of(0), backbone=spec_of("mamba"), tokenizer=bins))
    expected = [{n: x.clone() for n, x in model.state_dict().items()} for model in models]
    seeds = Seeds(models, (0, 1))
    for number in (0, 1):
        state = seeds.state_of(number)
        assert state.keys() == expected[number].keys()
        for name, value in expected[number].items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def spec_of(backbone: str) -> dict[str, Any]:
    return {**BACKBONES[backbone], "d_model": 16}


def test_what_would_mix_seeds_or_does_not_stack_is_refused() -> None:
    models = [model_of(seed, "identity") for seed in (0, 1)]
    for target in ("torch.optim.LBFGS", "torch.optim.Muon", "mine.Adam"):
        models[0].optimizer_spec = {"_target_": target}
        with pytest.raises(UserError, match="element by element"):
            Seeds(models, (0, 1))
    wider = model_of(1, "identity", head={"hidden": 32})
    with pytest.raises(UserError, match=r"user_tower.head.0.weight is \(64, 16\) with seed 0 and"):
        Seeds([model_of(0, "identity"), wider], (0, 1))
    bins = {"_target_": "recsys_ssm.models.tokenizers.MambularTokenizer"}
    with pytest.raises(UserError, match=r"numbers.impl.weight is .* ranges or items\)"):
        Seeds([model_of(seed, tokenizer=bins) for seed in (0, 1)], (0, 1))
    other = SpotifyData(name="spotify", seed=1, n_train=65)
    with pytest.raises(UserError, match="64 training pairs with seed 0 and 65 with seed 1"):
        SeedsData([data_of(0), other])


def test_batches_are_each_seeds_own_and_go_on_where_they_stopped() -> None:
    loader = SeedsData([data_of(seed) for seed in (0, 1)]).train_dataloader()
    own = [list(data_of(seed).train_dataloader()) for seed in (0, 1)]
    found = list(loader)
    assert len(found) == len(loader) == 8
    for position, batch in enumerate(found):
        for seed in (0, 1):
            assert torch.equal(batch.user_index[seed], own[seed][position].user_index)
            assert torch.equal(batch.user.numeric[seed], own[seed][position].user.numeric)
    loader.set_epoch(1)
    second = list(loader)
    assert not torch.equal(second[0].user_index, found[0].user_index)

    loader.set_epoch(2)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    again = SeedsData([data_of(seed) for seed in (0, 1)]).train_dataloader()
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)).user_index, next(batches).user_index)


@pytest.mark.parametrize(
    ("options", "fused"),
    [({}, True), ({"foreach": None, "fused": None}, True), ({"foreach": True}, None)],
)
def test_adam_is_fused_on_the_cpu_unless_an_option_is_given(
    options: dict[str, Any], fused: bool | None
) -> None:
    models = Seeds([model_of(seed, optimizer={**ADAM, **options}) for seed in (0, 1)], [0, 1])
    assert models.configure_optimizers().defaults["fused"] == fused
