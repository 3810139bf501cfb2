"""Finding runs, naming the others with the reason, and grouping the seeds of one setting."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from recsys_ssm.errors import UserError
from recsys_ssm.reports import archive
from recsys_ssm.reports.collect import collect
from recsys_ssm.reports.names import model_name, styles
from recsys_ssm.reports.runs import Cell, Setting, Task
from recsys_ssm.reports.tables import best_setting, cost
from reports.fake import fake_run


def test_runs_are_put_together_by_what_they_are_seeds_of(night: Path) -> None:
    found = collect([night])
    cells = {(c.task.label, c.backbone, c.setting.label): c for c in found.cells}
    spotify = cells["Spotify", "mamba", "published setting"]
    assert [run.seed for run in spotify.runs] == [*range(12), 50, 51]
    assert cells["Spotify", "transformer", "published setting"].n == 12
    assert cells["Spotify", "mamba", "optimizer.lr=0.0003"].n == 3
    assert cells["Vaccine 25/50", "mamba", "published setting"].n == 3
    assert cells["H&M, generated data", "mamba", "published setting"].n == 3
    assert len(cells) == 9
    labels = list(dict.fromkeys(c.task.label for c in found.cells))
    assert labels == ["Spotify", "H&M, generated data", "Vaccine 25/25", "Vaccine 25/50"]
    # By hand, from the files.
    values = {
        json.loads(path.read_text())["metrics"]["p@5"]
        for path in night.glob("spotify-transformer-*/metrics.json")
    }
    assert (
        set(cells["Spotify", "transformer", "published setting"].values("p@5").values()) == values
    )


def test_what_is_no_finished_run_is_named_with_its_reason(night: Path) -> None:
    problems = {problem.folder.name: problem.what for problem in collect([night]).problems}
    assert problems == {
        "empty": "empty",
        "foreign": "metrics.json is of another program: no name, dataset and versions",
        "list": "metrics.json is of another program: no name, dataset and versions",
        "cut": problems["cut"],
        "untested": "not tested (test=null)",
        "half": "not finished: no metrics.json",
        "no_config": problems["no_config"],
        "bad_config": problems["bad_config"],
        "failed": "failed: RuntimeError: diverged",
    }
    assert problems["cut"].startswith("metrics.json is broken")
    assert problems["no_config"].startswith("config.yaml: ")
    assert problems["bad_config"].startswith("config.yaml: cannot be read")
    with pytest.raises(UserError, match="no such folder"):
        collect([night / "nowhere"])


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("metrics.json", "", "metrics.json is broken"),
        ("metrics.json", b"\xff\xfe", "metrics.json is broken"),
        ("metrics.json", "[" * 100_000, "metrics.json is broken"),
        ("metrics.json", ('"metrics": {', '"metrics": {}, "x": {'), "no finite figure"),
        ("metrics.json", ('"baselines": {', '"baselines": [1], "x": {'), r"broken \(baselines"),
        ("metrics.json", ('"cost": {', '"cost": "low", "x": {'), r"broken \(cost"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml: cannot be read"),
        ("config.yaml", "backbone: {}\ndataset: {name: spotify}", r"no backbone\._target_"),
        ("config.yaml", "backbone: {_target_: a.B}\ndataset: {name: [1]}", r"no dataset\.name"),
    ],
)
def test_a_broken_run_is_named_and_the_others_reported(
    tmp_path: Path, name: str, text: str | bytes | tuple[str, str], what: str
) -> None:
    fake_run(tmp_path, seed=0)
    path = fake_run(tmp_path, seed=1) / name
    if isinstance(text, tuple):
        before = path.read_text()
        path.write_text(before.replace(*text))
        assert path.read_text() != before
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = collect([tmp_path])
    assert [[run.seed for run in cell.runs] for cell in found.cells] == [[0]]
    [problem] = found.problems
    assert problem.folder == path.parent and re.search(what, problem.what)


def test_options_of_a_vaccine_cell_that_are_no_numbers(tmp_path: Path) -> None:
    fake_run(tmp_path, "vaccine", options={"dataset.k": [3]})
    assert [cell.task.grid for cell in collect([tmp_path]).cells] == [()]


def test_a_report_written_into_the_sweep_itself_does_not_hide_it(tmp_path: Path) -> None:
    fake_run(tmp_path)
    (tmp_path / "report.html").touch()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").touch()
    found = collect([tmp_path])
    assert [cell.n for cell in found.cells] == [1] and not found.problems


def test_two_sweeps_one_of_them_still_running(tmp_path: Path) -> None:
    fake_run(tmp_path / "one", seed=0)
    fake_run(tmp_path / "two", seed=1)
    job = tmp_path / "two" / "job"
    status = {"state": "running", "host": socket.gethostname(), "pid": os.getpid()}
    for name, text in {"job_status.json": json.dumps(status), "history.json": "[{"}.items():
        job.mkdir(exist_ok=True)
        (job / name).write_text(text)
    found = collect([tmp_path / "one", tmp_path / "two"])
    assert [[run.seed for run in cell.runs] for cell in found.cells] == [[0, 1]]
    assert found.problems == [(job, "still running")]


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    first = fake_run(tmp_path, seed=1)
    shutil.copytree(first, tmp_path / "again")
    found = collect([tmp_path, tmp_path])
    assert [cell.n for cell in found.cells] == [1]
    assert all("the same run again" in problem.what for problem in found.problems)


def test_seeds_trained_at_once_are_runs_of_their_own(tmp_path: Path) -> None:
    fake_run(tmp_path, seed=0)
    together = tmp_path / "together"
    for seed in (1, 2):
        folder = fake_run(together, seed=seed)
        results = json.loads((folder / "metrics.json").read_text())
        results["cost"]["seeds_at_once"] = 2
        (folder / "metrics.json").write_text(json.dumps(results))
    group = {key: results[key] for key in ("name", "dataset", "versions", "metrics")}
    (together / "metrics.json").write_text(json.dumps(group | {"seeds": [1, 2]}))
    (together / "config.yaml").write_text("train: {seeds: 2}")
    (together / "checkpoints").mkdir()
    found = collect([tmp_path])
    assert [[run.seed for run in cell.runs] for cell in found.cells] == [[0, 1, 2]]
    assert not found.problems
    machines = [row[-1] for row in cost(found).rows]
    assert len(machines) == 2 and machines[1].endswith("2 seeds at once")


def test_data_with_other_options_is_another_task_and_logging_is_no_option(tmp_path: Path) -> None:
    fake_run(tmp_path, "vaccine", cell=(25, 25))
    fake_run(tmp_path, "vaccine", cell=(25, 25), seed=1, options={"dataset.p_same": 0.9})
    fake_run(
        tmp_path,
        "vaccine",
        cell=(25, 25),
        seed=2,
        options={"logger._target_": "x", "trainer.log_every_n_steps": 7, "tags": ["a"]},
    )
    fake_run(tmp_path, "vaccine", cell=(25, 30), seed=3)
    found = collect([tmp_path])
    labels = {cell.task.label: [run.seed for run in cell.runs] for cell in found.cells}
    assert labels == {
        "Vaccine 25/25": [0, 2],
        "Vaccine 25/25 (dataset.p_same=0.9)": [1],
        "Vaccine 25/30": [3],
    }
    # The paper does not have a cell of 25 clusters and 30 messages.
    published = {cell.task.label: cell.setting.is_published for cell in found.cells}
    assert published["Vaccine 25/25"] and not published["Vaccine 25/30"]


def test_runs_of_a_users_own_dataset_and_of_older_versions(tmp_path: Path) -> None:
    for seed, lr in ((0, 0.1), (1, 0.1), (0, 0.2)):
        folder = fake_run(tmp_path, seed=seed, options={"optimizer.lr": lr})
        for name in ("config.yaml", "metrics.json"):
            text = (folder / name).read_text().replace("name: spotify", "name: mine")
            (folder / name).write_text(text.replace('"dataset": "spotify"', '"dataset": "mine"'))
        if seed == 1:  # as runs were before they kept these
            for name in ("history.json", "test_users.parquet", "items.parquet"):
                (folder / name).unlink()
            results = json.loads((folder / "metrics.json").read_text())
            for key in ("cost", "overrides", "parameters", "baselines"):
                del results[key]
            (folder / "metrics.json").write_text(json.dumps(results))
    found = collect([tmp_path])
    assert sorted(cell.n for cell in found.cells) == [1, 2] and not found.problems
    assert {cell.task.label for cell in found.cells} == {"mine"}
    # Named by comparison with the shipped dataset of the same class.
    labels = {cell.setting.label for cell in found.cells}
    assert labels == {"optimizer.lr=0.1", "optimizer.lr=0.2"}


def test_the_best_setting_is_chosen_on_validation_over_the_seeds_all_have(night: Path) -> None:
    found = collect([night])
    [spotify] = [task for task in found.tasks if task.dataset == "spotify"]
    best = best_setting(found.of(spotify, "mamba"))
    assert best is not None and best.setting.label == "optimizer.lr=0.0003"
    assert best_setting([]) is None
    # Better on validation by its lucky seeds alone.
    cells = found.of(spotify, "mamba")
    for cell, values in zip(cells, ([0.5, 0.9, 0.9], [0.6]), strict=True):
        cell.runs = cell.runs[: len(values)]
        for run, value in zip(cell.runs, values, strict=True):
            run.validation = value
    assert best_setting(cells) is cells[1]


def test_cells_are_kept_and_read_again(night: Path, tmp_path: Path) -> None:
    cells = collect([night]).cells
    for cell in cells:
        if len(cell.runs) > 1:  # an older run: any other one's options will do
            cell.runs[0].results.pop("overrides", None)
    written = archive.write_cells(cells, tmp_path)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    read = archive.read_cells(tmp_path)
    for before, after in zip(cells, read, strict=True):
        assert (before.task, before.backbone, before.setting) == (
            after.task,
            after.backbone,
            after.setting,
        )
        assert after.values("p@5") == pytest.approx(before.values("p@5"), rel=1e-5)
        assert after.baseline("oracle", "p@5") == before.baseline("oracle", "p@5")
        assert after.validations() == pytest.approx(before.validations())
    [record] = [json.loads((tmp_path / "spotify_transformer.json").read_text())]
    expected = (
        "python -m recsys_ssm.train --multirun dataset=spotify backbone=transformer "
        "'seed=range(12)'"
    )
    assert record["command"] == expected
    assert record["seeds"] == list(range(12)) and record["machines"] == [
        "A Processor, cpu, threads: 1"
    ]
    assert record["per_seed"]["3"]["versions"]["torch"] == "2.13.0"
    assert record["means"]["p@5"]["n"] == 12 and record["options"]["optimizer.lr"] == 1e-4
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: not the results of a cell"):
        archive.read_cells(tmp_path)


def test_a_cell_without_figures() -> None:
    cell = Cell(Task("spotify"), "mamba", Setting(), [])
    assert cell.values("p@5") == {} and cell.validations() == {}
    assert math.isnan(float("nan"))


# ------------------------------------------------------------------------------------ a stranger's code

GRU = {"backbone._target_": "my_models.gru.GRU", "backbone.layers": 2}
SHOP = {
    "dataset": {
        "_target_": "my_data.Shop",
        "name": "bazaar",
        "files": [f"part-{i}.parquet" for i in range(200)],
        **{f"option_{i}": i for i in range(40)},
    }
}


def test_a_strangers_dataset_and_backbone_have_short_labels(tmp_path: Path) -> None:
    for seed in range(2):
        for lr in (0.1, 0.2):
            options = SHOP | GRU | {"optimizer.lr": lr}
            fake_run(tmp_path, seed=seed, options=options)
    for path in tmp_path.glob("*/metrics.json"):
        path.write_text(path.read_text().replace('"dataset": "spotify"', '"dataset": "bazaar"'))
    found = collect([tmp_path])
    labels = {(cell.task.label, model_name(cell), cell.setting.label) for cell in found.cells}
    assert labels == {
        ("bazaar", "GRU", "optimizer.lr=0.1"),
        ("bazaar", "GRU", "optimizer.lr=0.2"),
    }
    assert [cell.n for cell in found.cells] == [2, 2]


def test_a_strangers_dataset_with_other_options_is_another_task(tmp_path: Path) -> None:
    for k_core in (5, 10):
        shop = {"dataset": {**SHOP["dataset"], "k_core": k_core}}
        fake_run(tmp_path, options=shop)
    labels = [cell.task.changed for cell in collect([tmp_path]).cells]
    assert labels == [(("dataset.k_core", "10"),), (("dataset.k_core", "5"),)]


def test_a_strangers_backbone_shares_the_task_of_the_shipped_ones(tmp_path: Path) -> None:
    fake_run(tmp_path, "ml_1m", "mamba")
    fake_run(tmp_path, "ml_1m", "mamba2", options=GRU)
    found = collect([tmp_path])
    assert {cell.task.label for cell in found.cells} == {"ml_1m"}
    assert {cell.task.kind for cell in found.cells} == {"next_item"}
    assert {model_name(cell) for cell in found.cells} == {"GRU", "Mamba4Rec"}


def test_every_backbone_has_a_style_of_its_own(tmp_path: Path) -> None:
    names = [f"Model{i}" for i in range(12)]
    for name in names:
        fake_run(tmp_path, options={"backbone._target_": f"my_models.{name}"})
    for backbone in ("mamba", "transformer", "mamba2", "hydra"):
        fake_run(tmp_path, backbone=backbone)
    looks = styles(collect([tmp_path]).cells)
    assert len(looks) == 16
    assert len({tuple(sorted(style.items())) for style in looks.values()}) == 16
    assert looks["mamba"] == {"color": "#0b3c5d", "linestyle": "-", "marker": "o"}


def test_a_subclass_does_not_take_the_name_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import ModuleType

    from recsys_ssm.models.backbones.mamba import Mamba

    module = ModuleType("my_models")
    module.Better = type("Better", (Mamba,), {"__module__": "my_models"})
    monkeypatch.setitem(sys.modules, "my_models", module)
    fake_run(tmp_path, options={"backbone._target_": "my_models.Better"})
    fake_run(tmp_path)
    found = collect([tmp_path]).cells
    assert {model_name(cell) for cell in found} == {"Better", "FT-Mamba"}
    assert len({str(style) for style in styles(found).values()}) == 2


def test_a_run_of_an_experiment_is_named_after_it(tmp_path: Path) -> None:
    from recsys_ssm.reports.shipped import compose_shipped

    best = compose_shipped("amazon_beauty_2014", "mamba2", (), "next_item/best")
    for seed, lr in ((0, best["optimizer"]["lr"]), (1, 1e-3)):
        options = {key: value for key, value in best.items() if key not in ("seed", "name")}
        options["optimizer"] = {**best["optimizer"], "lr": lr}
        fake_run(
            tmp_path,
            "amazon_beauty_2014",
            "mamba2",
            seed,
            options=options,
            overrides=("experiment=next_item/best",),
        )
    labels = {cell.setting.label for cell in collect([tmp_path]).cells}
    assert labels == {"next_item/best", "next_item/best optimizer.lr=0.001"}


def test_nothing_in_a_runs_folder_is_run_or_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    marker = tmp_path / "marker"
    code = tmp_path / "stranger"
    code.mkdir()
    (code / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(code)
    runs = tmp_path / "runs"
    hostile = {
        "backbone._target_": "evil_module.Model",
        "dataset._target_": "os.system",
        "dataset.command": f"touch {marker}",
        "tags": "${oc.env:SECRET}",
        "scheduler": {"_target_": "time.time"},  # without a signature
        "optimizer.lr": "${oc.env:SECRET}",
    }
    fake_run(runs, options=hostile, overrides=("experiment=../../../stranger",))
    found = collect([runs])
    assert [cell.n for cell in found.cells] == [1] and not marker.exists()
    archive.write_cells(found.cells, tmp_path / "kept")
    assert all("hunter2" not in path.read_text() for path in (tmp_path / "kept").iterdir())
    python_yaml = fake_run(runs, seed=1) / "config.yaml"
    python_yaml.write_text(f'a: !!python/object/apply:os.system ["touch {marker}"]')
    bomb = fake_run(runs, seed=2) / "config.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    bomb.write_text("\n".join(lines))
    problems = {problem.folder.name[:19]: problem.what for problem in collect([runs]).problems}
    assert problems["spotify-mamba-seed1"].startswith("config.yaml: cannot be read")
    assert "more than 100,000 options" in problems["spotify-mamba-seed2"]
    assert not marker.exists()


def test_trials_of_a_search_are_listed_and_not_grouped(tmp_path: Path) -> None:
    fake_run(tmp_path, seed=0)
    for trial in range(3):
        folder = fake_run(tmp_path / "search", options={"optimizer.lr": 1e-3 * (trial + 1)})
        results = json.loads((folder / "metrics.json").read_text())
        for part in ("metrics", "metrics_all_users", "baselines", "published"):
            del results[part]
        (folder / "metrics.json").write_text(json.dumps(results))
    found = collect([tmp_path])
    assert [cell.n for cell in found.cells] == [1] and not found.problems
    labels = {run.setting.label for run in found.trials}
    assert labels == {"optimizer.lr=0.001", "optimizer.lr=0.002", "optimizer.lr=0.003"}
    assert all(math.isfinite(run.validation) for run in found.trials)


def test_pruned_trials_and_the_files_of_loggers(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    for path in ("csv/version_0/metrics.csv", "lightning_logs/version_0/hparams.yaml"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("x")
    (folder / "mlruns" / "0" / "artifacts").mkdir(parents=True)
    pruned = tmp_path / "trial"
    pruned.mkdir()
    (pruned / "job_status.json").write_text('{"state": "pruned"}')
    found = collect([tmp_path])
    assert [cell.n for cell in found.cells] == [1]
    assert found.problems == [(pruned, "pruned by its search")]


def test_cells_of_the_first_version_stay_readable(tmp_path: Path) -> None:
    """Their task has a pair of numbers for its grid and no kind, their setting no name."""
    fake_run(tmp_path / "runs", "vaccine", cell=(25, 50))
    fake_run(tmp_path / "runs", "ml_1m", "hydra")
    for path in archive.write_cells(collect([tmp_path / "runs"]).cells, tmp_path / "cells"):
        record = json.loads(path.read_text())
        grid = [value for _, value in record["task"].pop("grid")]
        record["task"]["cell"] = grid or None
        del record["task"]["kind"], record["task"]["name"], record["setting"]["name"]
        path.write_text(json.dumps(record))
    vaccine, movies = archive.read_cells(tmp_path / "cells")
    assert vaccine.task.label == "Vaccine 25/50" and vaccine.task.kind == "two_tower"
    assert vaccine.task.grid == (("dataset.k", 25), ("dataset.n_messages", 50))
    assert movies.task.kind == "next_item" and model_name(movies) == "Hydra4Rec"
    assert movies.runs[0].data is None


def test_the_hashes_of_the_data_are_kept(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs", "ml_1m", data={"ratings.dat": "ab" * 32})
    archive.write_cells(collect([tmp_path / "runs"]).cells, tmp_path / "cells")
    [cell] = archive.read_cells(tmp_path / "cells")
    assert cell.runs[0].data == {"ratings.dat": "ab" * 32}


def test_a_file_has_the_name_that_it_has_below_the_data_folder(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "a")
    record = json.loads((folder / "metrics.json").read_text())
    record["data"] = {"/home/me/data/ml/u.txt": "ab", "/else/where/x.csv": "cd", "own.csv": "ef"}
    (folder / "metrics.json").write_text(json.dumps(record))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["dataset"]["root"] = "/home/me/data"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    [cell] = collect([tmp_path]).cells
    named = {"ml/u.txt": "ab", "where/x.csv": "cd", "own.csv": "ef"}
    assert cell.runs[0].data == named
    [path] = archive.write_cells([cell], tmp_path / "kept")
    [figures] = json.loads(path.read_text())["per_seed"].values()
    assert figures["data"] == named
