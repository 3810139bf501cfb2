"""Train several seeds at once by the command: each seed's folder is like a single run's."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from kill import kill_after_checkpoint
from small import SMALL_MAMBA, TINY

QUICK = (*TINY, *SMALL_MAMBA, "logger=none", "trainer.log_every_n_steps=2", "optimizer.lr=0.01")
DOUBLE = "trainer.precision=64-true"
FILES = {
    "metrics.json",
    "config.yaml",
    "history.json",
    "test_users.parquet",
    "items.parquet",
    "curves.png",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
}


COMMAND = "batched_seeds.__main__"


def only(folder: Path, root: str = "runs") -> Path:
    [run] = folder.glob(f"{root}/*/*")
    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_each_seed_ends_as_its_single_run(cli, tmp_path: Path) -> None:
    outcome = cli(COMMAND, *QUICK, DOUBLE, "seed=3", "seeds=2")
    assert outcome.code == 0, outcome.text
    run = only(tmp_path)
    for seed in (3, 4):
        assert cli("train", *QUICK, DOUBLE, f"seed={seed}", f"output_root=s{seed}").code == 0
        single, own = only(tmp_path, f"s{seed}"), run / f"seed{seed}"
        assert all((own / name).stat().st_size > 0 for name in FILES)
        wanted, found = read(single / "metrics.json"), read(own / "metrics.json")
        assert found.keys() == wanted.keys()
        for name in ("name", "seed", "steps", "metrics", "metrics_all_users", "baselines", "notes"):
            assert found[name] == wanted[name], name
        assert found["cost"].keys() - wanted["cost"].keys() == {"seeds_at_once"}
        assert found["cost"]["seeds_at_once"] == 2
        assert not [each for each in found["overrides"] if each.startswith("seeds")]
        config = yaml.safe_load((own / "config.yaml").read_text())
        expected = yaml.safe_load((single / "config.yaml").read_text())
        assert config["seed"] == config["dataset"]["seed"] == seed
        assert config.keys() == expected.keys()
        for option in ("backbone", "dataset", "optimizer", "head", "loss", "model", "name"):
            assert config[option] == expected[option], option
        records, others = read(own / "history.json"), read(single / "history.json")
        assert len(records) == len(others)
        for one, other in zip(records, others, strict=True):
            one.pop("seconds", None), other.pop("seconds", None)
            assert one == pytest.approx(other, rel=1e-8)
        for which in ("best", "last"):
            a, b = (
                torch.load(folder / f"checkpoints/{which}.ckpt", weights_only=True)
                for folder in (own, single)
            )
            assert a["global_step"] == b["global_step"]
            assert a["hyper_parameters"] == b["hyper_parameters"]
            for name, tensor in b["state_dict"].items():
                torch.testing.assert_close(a["state_dict"][name], tensor, rtol=0, atol=1e-8)
        users = (pl.read_parquet(folder / "test_users.parquet") for folder in (own, single))
        assert next(users).equals(next(users))


def test_the_whole_run_reports_means(cli, tmp_path: Path) -> None:
    outcome = cli(COMMAND, *QUICK, "seeds=3")
    assert outcome.code == 0, outcome.text
    for word in ("mean of 3", "± 95 %", "oracle", "hr@10", "spotify-mamba-seeds0-2"):
        assert word in outcome.out
    run = only(tmp_path)
    assert run.parent.name == "spotify-mamba-seeds0-2", (
        "ckpt_path=last of a single run must not find it"
    )
    results = read(run / "metrics.json")
    each = [read(run / f"seed{seed}" / "metrics.json") for seed in range(3)]
    assert results["seeds"] == [0, 1, 2] and results["cost"]["seeds_at_once"] == 3
    values = [one["metrics"]["ndcg@10"] for one in each]
    assert len(set(values)) == 3
    assert results["metrics"]["ndcg@10"] == pytest.approx(sum(values) / 3)
    spread = torch.tensor(values, dtype=torch.float64).std().item() / 3**0.5
    assert results["half_widths"]["ndcg@10"] == pytest.approx(4.302653 * spread, rel=1e-5)
    means = read(run / "history.json")
    losses = [read(run / f"seed{seed}" / "history.json")[0]["train/loss"] for seed in range(3)]
    assert means[0]["train/loss"] == pytest.approx(sum(losses) / 3)
    assert (run / "curves.png").exists() and (run / "checkpoints/last.ckpt").exists()
    assert not (run / "checkpoints/best.ckpt").exists()


def test_a_seeds_folder_is_evaluated_like_a_run(cli, tmp_path: Path) -> None:
    assert cli(COMMAND, *QUICK, "seeds=2").code == 0
    own = only(tmp_path) / "seed1"
    outcome = cli("evaluate", f"run={own}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    assert read(tmp_path / "again/metrics.json")["metrics"] == read(own / "metrics.json")["metrics"]


@pytest.mark.parametrize("test", ["last", "null"])
def test_the_last_state_or_none_is_tested(cli, tmp_path: Path, test: str) -> None:
    assert cli(COMMAND, *QUICK, "seeds=2", f"test={test}", "monitor_mode=min").code == 0
    run = only(tmp_path)
    if test == "null":
        assert "metrics" not in read(run / "seed0/metrics.json")
        return
    assert read(run / "seed0/metrics.json")["checkpoint"].endswith("seed0/checkpoints/last.ckpt")
    outcome = cli("evaluate", f"run={run / 'seed0'}", "checkpoint=last", "output_dir=again")
    assert outcome.code == 0, outcome.text
    found = read(tmp_path / "again/metrics.json")["metrics"]
    assert found == read(run / "seed0/metrics.json")["metrics"]


def test_killed_and_resumed_is_as_if_never_stopped(cli, tmp_path: Path) -> None:
    base = [*QUICK, "seeds=2", "trainer.max_steps=60", "validations=30"]
    kill_after_checkpoint(tmp_path, base, "batched_seeds", timeout_s=300)

    outcome = cli(COMMAND, *base, "ckpt_path=last")
    assert outcome.code == 0, outcome.text
    assert cli(COMMAND, *base, "output_root=whole").code == 0
    resumed, whole = only(tmp_path), only(tmp_path, "whole")
    for seed in (0, 1):
        a, b = (read(run / f"seed{seed}" / "metrics.json") for run in (resumed, whole))
        assert a["metrics"] == b["metrics"]
        a, b = (read(run / f"seed{seed}" / "history.json") for run in (resumed, whole))
        for one, other in zip(a, b, strict=True):
            one.pop("seconds", None), other.pop("seconds", None)
            assert one == other
        a, b = (
            torch.load(run / f"seed{seed}/checkpoints/best.ckpt", weights_only=True)
            for run in (resumed, whole)
        )
        assert a["global_step"] == b["global_step"] <= 60
        assert all(torch.equal(a["state_dict"][n], b["state_dict"][n]) for n in a["state_dict"])


def test_a_checkpoint_of_another_number_of_seeds(cli, tmp_path: Path) -> None:
    assert cli(COMMAND, *QUICK, "seeds=2").code == 0
    last = only(tmp_path) / "checkpoints/last.ckpt"
    outcome = cli(COMMAND, *QUICK, "seeds=3", f"ckpt_path={last}")
    assert outcome.code == 1 and "a checkpoint of another architecture" in outcome.err
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeds=0"], "seeds=0: not a number of seeds; give 1 or more"),
        (["seeds=two"], "seeds=two: not a number of seeds"),
        (["optimizer=sgd", "optimizer._target_=torch.optim.LBFGS"], "element by element"),
        (["callbacks=early_stopping"], "callbacks.early_stopping: it would stop all 2 seeds"),
        (["callbacks=ema"], "callbacks.ema: the best weights of each seed are kept without"),
        (["monitor=val/hits"], "monitor=val/hits: validation has no such value"),
        (["monitor=val/hits@3"], "unknown metric 'hits@3'"),
        (["trainer.devices=2", "trainer.accelerator=cpu"], "2 devices"),
    ],
)
def test_what_seeds_at_once_cannot_do_is_one_line(cli, arguments: list, message: str) -> None:
    if "optimizer=sgd" in arguments:
        arguments = [*arguments, "~optimizer.momentum"]
    quick = [a for a in QUICK if not a.startswith("optimizer.lr")]
    outcome = cli(COMMAND, *quick, "seeds=2", *arguments)
    assert outcome.code == 1
    assert message in outcome.err, outcome.err
    assert "Traceback" not in outcome.text


def test_next_item_models_are_refused(cli) -> None:
    outcome = cli(COMMAND, "dataset=ml_100k", "backbone=mamba", "seeds=2", "logger=none")
    assert outcome.code == 1
    assert "NextItem is not one; use python -m recsys_ssm.train --multirun" in outcome.err


def test_wandb_has_means_and_each_seed(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    logged: dict = {}
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lambda self, data, **_: logged.update(data))
    arguments = [a for a in QUICK if a != "logger=none"]
    outcome = cli(COMMAND, *arguments, "seeds=2", "logger=wandb", "logger.mode=offline")
    assert outcome.code == 0, outcome.text
    for name in ("val/ndcg@10/mean", "val/ndcg@10/seed0", "val/ndcg@10/seed1", "train/loss"):
        assert name in logged
