"""The training command, as people use it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from small import SMALL_MAMBA, TINY

from recsys_ssm import ops

QUICK = (*TINY, *SMALL_MAMBA, "logger=none")


def only_run(folder: Path) -> Path:
    [run] = folder.glob("runs/*/*")
    return run


def test_who_was_recommended_what_is_kept(cli, tmp_path: Path) -> None:
    outcome = cli("train", "dataset=spotify", *QUICK)
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    users = pl.read_parquet(run / "test_users.parquet")
    assert users.height == 20 and users["user"].is_sorted() and users["user"].n_unique() == 20
    assert (users["n_relevant"] == users["relevant"].list.len()).all()
    # Up to the largest cut-off, map@12, and to as many as the user likes.
    most = users["n_relevant"].clip(lower_bound=12)
    assert (users["recommended"].list.len() == most).all()
    # The table's figure follows from the rows.
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    hits = users.filter(pl.col("n_relevant") > 0).select(
        pl.col("recommended").list.head(5).list.set_intersection("relevant").list.len() / 5
    )
    assert hits.to_series().mean() == pytest.approx(metrics["p@5"])
    items = pl.read_parquet(run / "items.parquet")
    assert items.height == 50 and items["train_count"].sum() > 0
    history = json.loads((run / "history.json").read_text())
    validations = [record for record in history if "val/ndcg@10" in record]
    assert [record["step"] for record in validations] == [4, 8]
    assert validations[0]["seconds"] < validations[1]["seconds"]


def test_the_operators_backend_is_an_option(cli) -> None:
    outcome = cli("train", "dataset=spotify", *QUICK, "ops.backend=cuda")
    assert outcome.code == 1
    assert "ops.backend=cuda: must be one of auto, triton, mamba_ssm, reference" in outcome.err
    outcome = cli("train", "dataset=spotify", *QUICK, "ops.backend=reference")
    ops.set_backend("auto")
    assert outcome.code == 0, outcome.text
    assert "on cpu: plain PyTorch" in outcome.out


def test_a_run_ends_with_the_table_and_its_files(cli, tmp_path: Path) -> None:
    outcome = cli("train", "dataset=spotify", *QUICK)
    assert outcome.code == 0, outcome.text
    assert ops.describe_backends() in outcome.out  # nobody is slow without being told
    for word in (
        "this run",
        "published",
        "popularity",
        "random",
        "oracle",
        "hr@10",
        "20 test users",
    ):
        assert word in outcome.out
    run = only_run(tmp_path)
    for name in (
        "metrics.json",
        "config.yaml",
        "curves.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "train.log",
    ):
        assert (run / name).stat().st_size > 0
    for name in ("metrics.json", "config.yaml", "curves.png"):
        assert str(run / name) in outcome.out
    results = json.loads((run / "metrics.json").read_text())
    assert results["name"] == "spotify-mamba-seed0" and results["steps"] == 8
    assert results["generated"] is False and results["seed"] == 0
    assert set(results["baselines"]) == {"random", "popularity", "oracle"}
    assert results["baselines"]["oracle"]["p@1"] == 1.0
    assert results["published"]["p@5"] == 0.952
    assert results["metrics"]["n_users"] == 20
    cost = results["cost"]
    assert cost["seconds_per_step"] > 0 and cost["peak_memory_bytes"] > 1e8 and cost["machine"]
    assert results["overrides"][0] == "dataset=spotify"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["backbone"]["d_model"] == 16 and config["dataset"]["n_train"] == 512


def test_a_run_says_what_it_read_and_why_it_ended(cli, tmp_path: Path) -> None:
    """Both were silent: whether item features are used, and early stopping."""
    patient = "callbacks.early_stopping.patience"
    small = (*SMALL_MAMBA, "trainer.accelerator=cpu", "logger=none")
    options = ("dataset=shop", *small, "trainer.max_epochs=30", f"{patient}=1", "optimizer.lr=1e-9")
    outcome = cli("train", *options)
    assert outcome.code == 0, outcome.text
    assert "shop: features of items: price (number), kind (8 values)" in outcome.out
    results = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert (
        f"early stopping at step {results['steps']}: val/ndcg@10 was not better than" in outcome.out
    )
    assert f"in 1 validations in a row ({patient})" in outcome.out and results["steps"] < 60
    assert "smaller than the logging interval" not in outcome.text


def test_same_seed_same_digits_other_seed_other(cli, tmp_path: Path) -> None:
    def run(folder: str, seed: int) -> dict[str, float]:
        assert cli("train", *QUICK, f"output_root={folder}", f"seed={seed}").code == 0
        [path] = tmp_path.glob(f"{folder}/*/*/metrics.json")
        return json.loads(path.read_text())["metrics"]

    first, again, other = run("a", 3), run("b", 3), run("c", 4)
    assert first == again
    assert first != other


def test_the_best_checkpoint_is_tested_not_the_last(cli, tmp_path: Path) -> None:
    """What is best is turned around, so that it is the checkpoint that has learnt least."""
    quick = (
        *QUICK,
        "optimizer.lr=0.01",
        "trainer.max_steps=60",
        "validations=6",
        "monitor_mode=min",
    )
    assert cli("train", *quick).code == 0
    run = only_run(tmp_path)
    results = json.loads((run / "metrics.json").read_text())
    best, last = (
        torch.load(run / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("best", "last")
    )
    assert best["global_step"] < last["global_step"] == 60
    assert results["checkpoint"].endswith("best.ckpt")
    assert cli("evaluate", f"run={run}", "checkpoint=best", "output_dir=eval_best").code == 0
    assert cli("evaluate", f"run={run}", "checkpoint=last", "output_dir=eval_last").code == 0
    of_best, of_last = (
        json.loads((tmp_path / f"eval_{n}" / "metrics.json").read_text())["metrics"]
        for n in ("best", "last")
    )
    assert results["metrics"] == of_best != of_last


def test_resuming_ends_as_if_never_stopped(cli, tmp_path: Path) -> None:
    steps = "trainer.val_check_interval=4"
    assert cli("train", *QUICK, steps, "trainer.max_steps=16", "output_root=whole").code == 0
    assert cli("train", *QUICK, steps, "trainer.max_steps=8", "output_root=runs").code == 0
    outcome = cli(
        "train", *QUICK, steps, "trainer.max_steps=16", "output_root=runs", "ckpt_path=last"
    )
    assert outcome.code == 0, outcome.text
    whole, resumed = (
        next(tmp_path.glob("whole/*/*")),
        only_run(tmp_path),
    )  # one folder: the run went on in its own
    a, b = (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, resumed)
    )
    assert a["global_step"] == b["global_step"] == 16
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    [history] = [
        state["records"] for key, state in b["callbacks"].items() if key.startswith("History")
    ]
    assert [record["step"] for record in history if "val/loss" in record] == [4, 8, 12, 16]


def test_multirun_and_a_failing_job(cli, tmp_path: Path) -> None:
    # Options on both sides of the flag, as people write it.
    outcome = cli("train", *QUICK, "--multirun", "seed=0,1", "tokenizer.init=zeros,normal")
    assert outcome.code == 1
    assert (
        outcome.err.count("expected one of normal, uniform") == 2 and "Traceback" not in outcome.err
    )
    done = sorted(tmp_path.glob("runs/multirun/*/*/metrics.json"))
    assert len(done) == 2
    assert {json.loads(path.read_text())["seed"] for path in done} == {0, 1}


@pytest.mark.parametrize("backbone", ["mamba", "transformer", "identity"])
@pytest.mark.parametrize("dataset", ["spotify", "vaccine"])
def test_every_backbone_on_every_embedded_dataset(cli, dataset: str, backbone: str) -> None:
    small = [
        f"dataset={dataset}",
        f"backbone={backbone}",
        "backbone.d_model=16",
        "logger=none",
        "trainer.max_steps=2",
    ]
    if dataset == "vaccine":
        small.append("dataset.n_users=2000")
    outcome = cli("train", *TINY[:4], "trainer.enable_progress_bar=false", "validations=1", *small)
    assert outcome.code == 0, outcome.text
    assert "oracle" in outcome.out


def test_generated_is_written_everywhere(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECSYS_SSM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = (
        "dataset=hm",
        "dataset.n_train=512",
        "dataset.n_val=64",
        "dataset.n_val_users=20",
        *SMALL_MAMBA,
    )
    outcome = cli("train", *options, "trainer.max_steps=2", "validations=1", "logger=csv")
    assert outcome.code == 0, outcome.text
    [run] = tmp_path.glob("runs/*/*")
    results = json.loads((run / "metrics.json").read_text())
    assert results["generated"] is True and results["name"].endswith("-generated")
    assert "(generated data)" in outcome.out and "GENERATED" in outcome.text.upper()
    assert yaml.safe_load((run / "config.yaml").read_text())["name"].endswith("-generated")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=spotfy"], "Available options in 'dataset'"),
        (["datset=spotify"], "datset: no such option; did you mean 'dataset'"),
        (["trainer.max_steps=abc"], "trainer.max_steps='abc': expected int, got str"),
        (["trainer.max_step=3"], "trainer.max_step: no such option; did you mean 'max_steps'"),
        (["backbone.d_modle=3"], "backbone.d_modle: no such option; did you mean 'd_model'"),
        (["dataset.batch_size=0"], "dataset.batch_size=0"),
        (["dataset.nusers=0"], "dataset.nusers: no such option"),
        (["tokenizer.init=zeros"], "tokenizer.init='zeros': expected one of normal, uniform"),
        (["metrics=[hits@3]"], "unknown metric 'hits@3'"),
        (["monitor=val/hits@3"], "unknown metric 'hits@3'"),
        (["name=a/b"], "name=a/b: not the name of a folder"),
        (["test=middle"], "test=middle"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: no such file"),
        (["ckpt_path=last"], "ckpt_path=last: no earlier run"),
        (["optimizer.lr=fast"], "optimizer.lr='fast': expected float"),
        (["callbacks.checkpoint.moniter=x"], "callbacks.checkpoint.moniter: no such option"),
        (["+logger.x=1", "logger=csv"], "logger.x: no such option"),
        (["seed=one"], "seed"),
        (
            ["scheduler=cosine", "scheduler.total_steps=0"],
            "scheduler.total_steps=0: give at least 1",
        ),
        (["monitor=val/hits"], "val/hits"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(cli, arguments: list[str], message: str) -> None:
    outcome = cli(
        "train",
        *[a for a in QUICK if a.partition("=")[0] not in {b.partition("=")[0] for b in arguments}],
        *arguments,
    )
    assert outcome.code == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.text
    assert len([line for line in outcome.err.splitlines() if line.strip()]) == 1, outcome.err


def test_a_checkpoint_of_another_architecture(cli, tmp_path: Path) -> None:
    assert cli("train", *QUICK).code == 0
    checkpoint = only_run(tmp_path) / "checkpoints" / "last.ckpt"
    outcome = cli("train", *QUICK, "backbone.n_layers=2", f"ckpt_path={checkpoint}")
    assert (
        outcome.code == 1
        and "a checkpoint of another architecture: user_tower.backbone.layers.1" in outcome.err
        and "Traceback" not in outcome.text
    )
    (tmp_path / "junk.ckpt").write_bytes(b"not a checkpoint")
    outcome = cli("train", *QUICK, "ckpt_path=junk.ckpt")
    assert (
        outcome.code == 1
        and "junk.ckpt: not a readable checkpoint" in outcome.err
        and "Traceback" not in outcome.text
    )


def test_a_folder_one_may_not_write_to(cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = cli("train", *QUICK, "output_root=file")
    assert outcome.code == 1 and "file" in outcome.err and "Traceback" not in outcome.text


@pytest.mark.parametrize("debug", ["fast", "overfit", "profiler", "anomaly"])
def test_debug_options(cli, tmp_path: Path, debug: str) -> None:
    outcome = cli(
        "train", f"debug={debug}", *TINY[:4], *SMALL_MAMBA, "trainer.enable_progress_bar=false"
    )
    assert outcome.code == 0, outcome.text
    run = next(tmp_path.glob("runs/debug-spotify-mamba-seed0/*"))
    results = json.loads((run / "metrics.json").read_text())
    if debug == "overfit":
        last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        [history] = [
            state["records"]
            for key, state in last["callbacks"].items()
            if key.startswith("History")
        ]
        losses = [record["train/loss"] for record in history if "train/loss" in record]
        assert losses[-1] < 0.1 * losses[0]
    if debug == "profiler":
        assert "Profiler Report" in outcome.text
    if debug in ("fast", "anomaly"):
        assert results["steps"] == 5


def test_lightning_options_as_lightning_users_know_them(cli) -> None:
    outcome = cli(
        "train",
        *QUICK,
        "trainer.gradient_clip_val=1.0",
        "trainer.precision=bf16-mixed",
        "scheduler=cosine",
        "scheduler.warmup_steps=2",
        "callbacks=early_stopping",
        "optimizer=adamw",
        "loss=in_batch_softmax",
    )
    assert outcome.code == 0, outcome.text


def test_config_shows_and_published_recipe(cli) -> None:
    outcome = cli("train", "--cfg", "job", "dataset=spotify", "backbone=transformer")
    config = yaml.safe_load(outcome.out.replace("${hydra:runtime.choices.backbone}", "x"))
    assert config["optimizer"]["lr"] == 1e-4 and config["optimizer"]["weight_decay"] == 0
    assert config["backbone"]["dim_feedforward"] == 2048
    outcome = cli("train", "--cfg", "job", "dataset=vaccine", "backbone=mamba", "optimizer.lr=0.5")
    assert yaml.safe_load(outcome.out)["optimizer"]["lr"] == 0.5


def test_a_users_own_option(cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "backbone").mkdir(parents=True)
    (tmp_path / "mine" / "backbone" / "narrow.yaml").write_text(
        "defaults: [mamba, _self_]\nd_model: 8\nn_layers: 1\n"
    )
    outcome = cli("train", "--config-dir", "mine", "backbone=narrow", *TINY, "logger=none")
    assert outcome.code == 0, outcome.text
    [run] = tmp_path.glob("runs/spotify-narrow-seed0/*")
    assert yaml.safe_load((run / "config.yaml").read_text())["backbone"]["d_model"] == 8


def test_two_processes_test_every_user_once(cli, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "recsys_ssm.train",
        *QUICK,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "dataset.n_test_users=21",
    ]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert results["metrics"]["n_users"] == 21
    assert results["baselines"]["oracle"]["n_users"] == 21
    assert done.stdout.count("this run") == 1
    assert "sync_dist" not in done.stdout + done.stderr

    # One process, on the same users: the same to the last digits but those of the order of a sum.
    assert cli("evaluate", f"run={only_run(tmp_path)}", "output_dir=alone").code == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert results["metrics"] == pytest.approx(alone["metrics"], rel=1e-12)


def test_from_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", *QUICK],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "this run" in done.stdout and "\x1b" not in done.stdout
    assert len(list(tmp_path.iterdir())) == 1  # runs/, and nothing beside it
    wrong = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", "dataset=x"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        wrong.returncode == 1
        and wrong.stderr.startswith("error: ")
        and wrong.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed_is_as_if_never_stopped(
    cli, tmp_path: Path, how: signal.Signals
) -> None:
    """Ctrl-C, or killed outright: the run goes on in its folder and ends with the same figures."""
    base = [*QUICK, "trainer.max_steps=600", "validations=30"]
    command = [sys.executable, "-m", "recsys_ssm.train", *base]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job is born deaf to Ctrl-C, and passes that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("runs/*/*/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert "ckpt_path=last continues" in err and "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/*/metrics.json"))

    assert cli("train", *base, "ckpt_path=last").code == 0
    assert cli("train", *base, "output_root=whole").code == 0
    [resumed], [whole] = (
        list(tmp_path.glob(f"{root}/*/*/metrics.json")) for root in ("runs", "whole")
    )
    assert json.loads(resumed.read_text())["metrics"] == json.loads(whole.read_text())["metrics"]
