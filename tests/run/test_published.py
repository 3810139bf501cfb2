"""Published figures: one home, the row that fits a run, and its protocol in the run's table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys_ssm.metrics import COUNTS
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.reports.shipped import compose_shipped
from recsys_ssm.run.defaults import known_class, option, with_defaults
from recsys_ssm.run.published import (
    all_rows,
    best_of,
    published_for,
    published_results,
    rows_of,
)
from recsys_ssm.run.table import results_table


def test_no_published_figure_stands_in_a_config() -> None:
    metric = re.compile(r"(p|r|mrr|hr|ndcg|map)@\d+")

    def figures(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [f"{key}: {value}" for key, value in node.items() if metric.fullmatch(str(key))]
            return own + [each for value in node.values() for each in figures(value)]
        return []

    for path in CONF_DIR.rglob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert not figures(config), path
        assert not [key for key in config or {} if str(key).startswith("published")], path


def test_every_row_can_be_found_by_a_run() -> None:
    """Datasets, backbones and conditions are those of this project."""
    for row in all_rows():
        assert (CONF_DIR / "dataset" / f"{row.dataset}.yaml").is_file(), row
        assert row.metrics and all(0 < value < 1 for value in row.metrics.values())
        assert not set(row.metrics) & set(COUNTS)
        assert row.seen_items in ("allowed", "left out", "none")
        if row.backbone is None:
            continue
        grid = tuple((k, v) for k, v in row.when.items() if k.startswith("dataset."))
        config = compose_shipped(row.dataset, row.backbone, grid)
        assert config is not None and published_for(config) == row
        for key in row.when:
            assert option(config, key) is not None, f"{key} is not an option"


@pytest.mark.parametrize(
    ("dataset", "backbone", "metrics"),
    [
        ("spotify", "mamba", {"p@5": 0.952, "mrr@10": 0.985, "hr@10": 0.998}),
        ("hm", "transformer", {"hr@1": 0.226, "map@12": 0.0335}),
        ("ml_1m", "mamba", {"hr@10": 0.306, "ndcg@10": 0.178, "mrr@10": 0.138}),
        ("amazon_games_2023", "transformer", {"hr@10": 0.119, "ndcg@10": 0.073, "mrr@10": 0.059}),
        ("amazon_beauty_2014", "hydra", {"hr@10": 0.07, "ndcg@10": 0.043, "mrr@10": 0.035}),
    ],
)
def test_figures_as_printed(dataset: str, backbone: str, metrics: dict[str, float]) -> None:
    config = compose_shipped(dataset, backbone)
    assert config is not None
    row = published_for(config)
    assert row is not None and metrics.items() <= row.metrics.items()


def test_a_model_of_another_size_is_compared_with_the_best_on_the_file() -> None:
    config = compose_shipped("amazon_beauty_2014", "mamba2", (), "next_item/best")
    assert config is not None
    row = published_for(config)
    assert row is not None and row.model == "WEARec"
    assert row.metrics == {"hr@10": 0.1041, "ndcg@10": 0.0614}
    assert row.label == "published, WEARec (seen items left out)"
    sports = published_for(config | {"dataset": {"name": "amazon_sports_2014"}})
    assert sports is not None and sports.metrics["ndcg@10"] == 0.0367
    assert best_of([]) is None


def test_conditions_hold_for_options_that_a_config_leaves_out() -> None:
    """The home of a default is the signature: a config without k has the k of the class."""
    dataset = {"_target_": "recsys_ssm.data.vaccine.VaccineData", "name": "vaccine"}
    backbone = {"_target_": "recsys_ssm.models.backbones.mamba.Mamba"}
    row = published_for({"dataset": dataset, "backbone": backbone})
    assert row is not None and row.metrics["hr@1"] == 0.5351
    other = published_for({"dataset": dataset | {"k": 26}, "backbone": backbone})
    assert other is None
    assert published_for({}) is None


def test_only_known_modules_are_looked_into(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stranger_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert known_class("stranger_module.Thing") is None
    assert known_class("recsys_ssm.nowhere.Thing") is None and known_class(None) is None
    assert known_class("os.system") is None
    spec = {"_target_": "stranger_module.Thing", "a": 1}
    assert with_defaults({"backbone": spec}) == {"backbone": spec}


def test_a_row_that_its_source_prints_elsewhere_is_in_both_tables() -> None:
    for dataset in ("amazon_beauty_2014", "amazon_beauty_2023"):
        assert "Hydra4Rec" in [row.model for row in rows_of(dataset)]
    cells = rows_of("vaccine", {"dataset.k": 50, "dataset.n_messages": 100})
    assert [row.model for row in cells] == ["FT-Mamba", "FT-Transformer"]


def test_another_tokenizer_makes_another_model_than_the_published_one() -> None:
    plain = compose_shipped("spotify", "mamba")
    assert plain is not None and published_results(plain)["published_label"] == "published"
    target = "recsys_ssm.models.tokenizers.MambularTokenizer"
    other = {**plain, "tokenizer": {"_target_": target}}
    row = published_for(other)
    assert row is not None and not row.shipped_recipe
    assert published_results(other)["published_label"] == "published, FT-Mamba"


def test_a_runs_table_says_the_protocol_of_what_was_published() -> None:
    config = compose_shipped("ml_1m", "mamba")
    assert config is not None
    results = {"metrics": {"hr@10": 0.3}, **published_results(config)}
    assert results["published"] == {"hr@10": 0.306, "ndcg@10": 0.178, "mrr@10": 0.138}
    heads = [str(column.header) for column in results_table(results, width=200).columns]
    assert "published (seen items allowed)" in heads
    assert published_results({"dataset": {"name": "mine"}}) == {"published": {}}
