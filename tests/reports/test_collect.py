"""What is a run, what is none and why, and which runs are seeds of one setting."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from recsys_ssm.errors import UserError
from recsys_ssm.reports import archive
from recsys_ssm.reports.collect import Cell, Setting, Task, collect
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
    assert problems["no_config"].startswith("config.yaml: cannot be read")
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
    fake_run(tmp_path, options={"dataset.k": [3]})
    assert [cell.task.cell for cell in collect([tmp_path]).cells] == [None]


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
    # The paper has no cell of 25 clusters and 30 messages.
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
