"""What goes to W&B and comes back, without its server: recorded answers, offline files, its own schemas."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from recsys_ssm.errors import UserError
from recsys_ssm.reports import on_wandb
from recsys_ssm.reports.build import build
from recsys_ssm.reports.collect import collect
from recsys_ssm.reports.tables import Options
from recsys_ssm.run.loggers import STEP, define_metrics, results_of_summary, run_summary
from reports.fake import fake_run


def as_wandb_has_it(folder: Path, state: str = "finished") -> SimpleNamespace:
    """A run as ``wandb.Api`` gives it, with what a training logs."""
    results = json.loads((folder / "metrics.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    history = json.loads((folder / "history.json").read_text())
    rows = [{STEP: r["step"], "_step": i, **r} for i, r in enumerate(history)]
    noise = {"val/hr@5": {"max": 0.5}, "train/loss": 0.1, "lr-Adam": 1e-4, "_runtime": 3, STEP: 9}
    return SimpleNamespace(
        id=folder.name,
        name=results["name"],
        state=state,
        config=config,
        summary=run_summary(results) | noise,
        scan_history=lambda: iter(rows),
    )


class Api:
    """Answers as recorded; remembers what was asked."""

    def __init__(self, runs: list[Any]) -> None:
        self.found, self.asked = runs, []

    def runs(self, path: str, filters: dict[str, str] | None) -> list[Any]:
        self.asked.append((path, filters))
        return self.found


def test_a_summary_is_the_results_again(tmp_path: Path) -> None:
    results = json.loads((fake_run(tmp_path) / "metrics.json").read_text())
    back = results_of_summary(run_summary(results) | {"lr-Adam": 1e-4, "_wandb": {}, "val/x": 1})
    for part in ("metrics", "metrics_all_users", "baselines", "cost", "parameters", "seed"):
        assert back[part] == results[part]
    assert set(back) <= set(results)


def test_runs_on_the_server_are_those_in_the_folder(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path, seed=seed) for seed in range(3)]
    report = SimpleNamespace(config={}, state="finished", id="r", summary={}, name="report")
    crashed = as_wandb_has_it(fake_run(tmp_path / "other", seed=7), state="crashed")
    api = Api([*map(as_wandb_has_it, folders), report, crashed])
    runs, problems = on_wandb.read_runs("wandb:team/recsys/sweep-1", api)
    assert api.asked == [("team/recsys", {"group": "sweep-1"})]
    assert [problem.what for problem in problems] == ["not finished: crashed"]
    [there], [here] = collect([], runs).cells, collect([tmp_path]).cells[:1]
    assert (there.task, there.setting, there.backbone) == (here.task, here.setting, here.backbone)
    for metric in ("p@5", "hr@10"):
        assert there.values(metric).items() <= here.values(metric).items()
    assert there.n == 3 and there.validations().items() <= here.validations().items()
    on_wandb.read_runs("wandb:team/recsys", api)
    assert api.asked[-1] == ("team/recsys", None)
    with pytest.raises(UserError, match="expected wandb:entity/project"):
        on_wandb.read_runs("wandb:team", api)


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down:
        def runs(self, path: str, filters: Any) -> Any:
            raise OSError("connection refused")

    with pytest.raises(UserError, match="wandb:a/b: connection refused"):
        on_wandb.read_runs("wandb:a/b", Down())


def test_a_reports_tables_and_figures_are_logged_offline(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs")
    document = build(collect([tmp_path / "runs"]), "x", Options())
    on_wandb.log_report(document, "team/recsys", tmp_path / "out")
    [media] = (tmp_path / "out").glob("wandb/offline-run-*/files/media")
    tables = [json.loads(path.read_text()) for path in media.glob("table/**/*.json")]
    assert {len(table["data"]) > 0 for table in tables} == {True}
    first = next(
        table for table in tables if "p@5" in table["columns"] and "model" in table["columns"]
    )
    assert ["Spotify", "FT-Mamba", "paper", "no", "100", ".952"] in [
        row[:6] for row in first["data"]
    ]
    assert len(list(media.glob("images/**/*.png"))) == len(document.images)


def test_axes_and_summaries() -> None:
    class Run:
        def __init__(self) -> None:
            self.defined: dict[str, dict[str, Any]] = {}

        def define_metric(self, name: str, **how: Any) -> None:
            self.defined[name] = how

    run = Run()
    define_metrics(run, "val/ndcg@10", "max")
    assert all(how["step_metric"] == STEP for how in run.defined.values())
    assert run.defined["val/ndcg@10"]["summary"] == "max,last"
    assert run.defined["val/loss"]["summary"] == "min,last"


# -------------------------------------------------------------------------------------------- scripts


@pytest.fixture
def dashboard(repository: Path) -> ModuleType:
    pytest.importorskip("wandb_workspaces")
    spec = importlib.util.spec_from_file_location(
        "dashboard", repository / "scripts" / "wandb_dashboard.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_is_what_wandb_can_show(dashboard: ModuleType, tmp_path: Path) -> None:
    made = dashboard.workspace("team", "recsys", "sweep-1", "Backbones")
    text = made._to_model().model_dump_json(by_alias=True, exclude_none=True)
    view = json.loads(text)
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections][:2] == ["Through training", "Test"]
    curve = sections[0]["panels"][0]["config"]
    assert curve["xAxis"] == STEP and curve["groupBy"].endswith("_target_")
    assert curve["groupAgg"] == "mean" and curve["groupArea"] == "stderr"
    assert "sweep-1" in text
    # Everything drawn is something a run logs.
    results = json.loads((fake_run(tmp_path) / "metrics.json").read_text())
    logged = set(run_summary(results)) | {"random/hr@10"}
    for metric in (*dashboard.FINAL, *dashboard.BASELINES, *dashboard.COST):
        assert metric in logged, metric


def test_the_wandb_sweep_composes(repository: Path) -> None:
    import hydra

    from recsys_ssm.cli.resolvers import register_resolvers
    from recsys_ssm.paths import CONF_DIR

    sweep = yaml.safe_load((repository / "scripts" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][1:4] == ["python", "-m", "recsys_ssm.train"]
    register_resolvers()
    overrides = []
    for name, parameter in sweep["parameters"].items():
        values = parameter.get("values") or [parameter.get("value", parameter.get("min"))]
        overrides.append(f"{name}={values[-1]}")
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = hydra.compose("train", [*overrides, "output_dir=.", "name=x"])
    assert cfg.test is None and cfg.optimizer.lr == 1e-5
    # The name in the history: early stopping looks there, and the search takes the best of it.
    assert sweep["metric"] == {"name": cfg.monitor, "goal": f"{cfg.monitor_mode}imize"}
