"""Make a W&B workspace for a project's runs: curves by backbone with seeds as band, final metrics, cost.

python scripts/wandb_dashboard.py ENTITY/PROJECT [--sweep NAME] [--name TITLE]

It needs `pip install "recsys-ssm[dashboard]"` and `wandb login`, and prints the workspace's address.
"""

from __future__ import annotations

import argparse

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws

from recsys_ssm.run.loggers import STEP

# The path of the backbone's class groups the runs.
BACKBONE = panels.Config("backbone._target_")
CURVES = ("val/ndcg@10", "val/hr@1", "val/hr@5", "val/hr@10", "val/loss", "train/loss")
FINAL = ("test/p@5", "test/p@10", "test/r@10", "test/ndcg@10", "test/hr@1", "test/hr@10")
BASELINES = ("oracle/hr@10", "popularity/hr@10", "random/hr@10")
COST = ("cost/seconds_per_step", "cost/peak_memory_bytes", "train_seconds", "parameters/total")


def curve(metric: str) -> panels.LinePlot:
    return panels.LinePlot(
        title=metric,
        x=STEP,
        y=[metric],
        title_x="training step",
        groupby=BACKBONE,
        groupby_aggfunc="mean",
        groupby_rangefunc="stderr",
        log_y=metric.endswith("loss"),
    )


def bars(metric: str) -> panels.BarPlot:
    return panels.BarPlot(
        title=metric,
        metrics=[panels.SummaryMetric(metric)],
        groupby=BACKBONE,
        groupby_aggfunc="mean",
        groupby_rangefunc="stderr",
        orientation="h",
    )


def workspace(entity: str, project: str, sweep: str | None, name: str) -> ws.Workspace:
    """Return the workspace; it is not saved yet."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name="Through training", panels=[*map(curve, CURVES)], is_open=True),
            ws.Section(name="Test", panels=[*map(bars, FINAL)], is_open=True),
            ws.Section(name="Baselines on the same users", panels=[*map(bars, BASELINES)]),
            ws.Section(name="Cost", panels=[*map(bars, COST)], is_open=True),
            ws.Section(
                name="Tables and figures of reports",
                panels=[panels.MediaBrowser(media_keys=["curves"])],
            ),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=200),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group") == sweep) if sweep else "",
            groupby=[ws.Config("backbone._target_")],
            order=[ws.Ordering(ws.Summary("test/ndcg@10"), ascending=False)],
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("project", help="entity/project")
    parser.add_argument("--sweep", help="only this sweep's runs (their W&B group)")
    parser.add_argument("--name", default="Backbones, seeds as band")
    arguments = parser.parse_args()
    entity, _, project = arguments.project.partition("/")
    if not project:
        parser.error(f"{arguments.project}: expected entity/project")
    made = workspace(entity, project, arguments.sweep, arguments.name)
    made.save()
    print(made.url)


if __name__ == "__main__":
    main()
