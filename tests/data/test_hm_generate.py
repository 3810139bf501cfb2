"""Generated H&M data: its columns, its marginals, and the rule that purchases follow."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hm_files import CUSTOMERS, OFFICIAL_ARTICLES, SMALL, note, relevant

from recsys_ssm.data import hm_generate
from recsys_ssm.data.hm import CATEGORICAL, HmData
from recsys_ssm.data.hm_generate import GeneratorSettings, Shop, generate
from recsys_ssm.errors import UserError


@pytest.fixture(scope="module")
def sample(shared_data: Path) -> Path:
    root = shared_data / "hm-sample"
    if not root.is_dir():
        pytest.skip(f"no slice of the H&M files at {root}")
    return root


def script() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "measure_hm_marginals.py"
    spec = importlib.util.spec_from_file_location("measure_hm_marginals", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_aggregates_are_what_the_script_measures(sample: Path) -> None:
    path = Path(hm_generate.__file__).parent / "assets" / "hm_marginals.json"
    shipped, measured = json.loads(path.read_text()), script().measure(sample)
    rounded = ("price_deciles", "purchases_cv", "gini_articles_sold", "gini_top_100")
    for name in rounded:
        assert measured.pop(name) == pytest.approx(shipped.pop(name), rel=1e-9)
    assert measured == shipped


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(GeneratorSettings(), tmp_path_factory.mktemp("generated"))


def test_generated_data_has_the_official_columns(generated: Path) -> None:
    headers = {p.name: p.read_text().split("\n", 1)[0].split(",") for p in generated.glob("*.csv")}
    assert headers == {
        "articles.csv": OFFICIAL_ARTICLES,
        "customers.csv": CUSTOMERS.splitlines()[0].split(","),
        "transactions_train.csv": [
            "t_dat",
            "customer_id",
            "article_id",
            "price",
            "sales_channel_id",
        ],
    }
    first = pl.read_csv(generated / "transactions_train.csv", infer_schema=False).row(0, named=True)
    assert len(first["customer_id"]) == 64
    assert len(first["article_id"]) == 10
    assert first["article_id"][0] == "0"
    assert first["t_dat"] == "2018-09-20"


def test_generated_data_has_the_marginals_of_the_slice(generated: Path, sample: Path) -> None:
    made, real = (
        pl.read_csv(root / "customers.csv", infer_schema=False).with_columns(
            pl.col("age").cast(pl.Float64)
        )
        for root in (generated, sample)
    )

    def shares(column: pl.Series) -> dict[str | None, float]:
        counts = column.rename("v").to_frame().group_by("v").len()
        return {value: n / column.len() for value, n in counts.iter_rows()}

    for name in CATEGORICAL:
        expected = shares(real[name])  # the missing share among them
        assert shares(made[name]).keys() == expected.keys()
        assert shares(made[name]) == pytest.approx(expected, abs=0.01)
    assert shares(made["age"].is_null()) == pytest.approx(shares(real["age"].is_null()), abs=0.01)
    bands = [15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 100]
    expected, found = (
        np.histogram(table["age"].drop_nulls().to_numpy(), bands)[0] / table["age"].count()
        for table in (real, made)
    )
    assert found == pytest.approx(expected, abs=0.01)
    assert made["age"].mean() == pytest.approx(real["age"].mean(), abs=1)


def test_generated_data_has_the_popularity_of_the_slice(generated: Path, sample: Path) -> None:
    gini = script().gini
    made, real = (
        pl.read_csv(root / "transactions_train.csv", infer_schema=False)
        .group_by("article_id")
        .len()["len"]
        .sort(descending=True)
        .to_numpy()
        .astype(np.int64)
        for root in (generated, sample)
    )
    assert gini(np.array([1, 1, 1, 1])) == 0
    assert gini(np.array([0, 0, 0, 4])) == 0.75
    assert gini(made) == pytest.approx(gini(real), abs=0.05)  # of all articles sold
    assert gini(made[:100]) == pytest.approx(gini(real[:100]), abs=0.05)  # of the catalogue


def test_generated_data_gives_enough_to_train_and_test_on(
    generated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        splits = HmData(name="hm", root=str(generated)).splits
    assert splits.generated
    assert splits.notes[0].startswith("GENERATED DATA")
    assert "GENERATED DATA" in caplog.text
    assert splits.train.user.numel() == 160_000
    assert "drawn from" in note(splits, "train pairs")
    assert splits.test_ranking.user.numel() == splits.val_ranking.user.numel() == 100
    assert "validation users: 100 with at least 5" in splits.notes


def test_purchases_depend_on_features_and_the_oracle_knows_how(generated: Path) -> None:
    """Popularity < a table of age and news learnt from the training pairs < oracle."""
    splits = HmData(name="hm", root=str(generated), n_test_users=3_000, n_train=None).splits
    hits = relevant(splits, splits.test_ranking).float()

    def precision(scores: torch.Tensor) -> float:
        return hits.gather(1, scores.topk(5, dim=1).indices).mean().item()

    test = splits.test_ranking.user
    group = (splits.users.numeric[:, 0] * 2).round().long().clamp(-3, 4) + 3
    group = group * 2 + (splits.users.categorical[:, 0] > 0)
    bought = splits.train.target == 1
    table = torch.zeros(16, 100)
    table.index_put_(
        (group[splits.train.user[bought]], splits.train.item[bought]),
        torch.ones(int(bought.sum())),
        accumulate=True,
    )
    popularity = precision(splits.baselines["popularity"](test))
    oracle = precision(splits.baselines["oracle"](test))
    learnt = precision(table[group[test]])
    assert popularity + 0.02 < learnt < oracle
    assert oracle > 1.3 * popularity


def test_oracle_is_the_share_of_purchases() -> None:
    """Probabilities sum to one, and what is bought follows them."""
    settings = GeneratorSettings(**{**SMALL, "n_articles": 20, "n_transactions": 200_000})
    shop = Shop(settings)
    log_p = shop.log_probability(shop.customers, shop.articles["article_id"].to_list())
    p = np.exp(log_p.astype(float))
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-5)
    customer, article = shop.purchases()
    assert customer.size == 200_000
    # Of customers under 25: how often each article was expected, and how often it was bought.
    young = (shop.customers["age"] < 25).fill_null(value=False).to_numpy()[customer]
    expected = p[customer[young]].sum(axis=0)
    found = np.bincount(article[young], minlength=20)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max())
    everyone = np.bincount(article, minlength=20) / 200_000
    assert np.abs(found / young.sum() - everyone).max() > 0.01


def test_features_can_be_made_to_matter_not_at_all() -> None:
    shop = Shop(GeneratorSettings(**SMALL, feature_strength=0.0))
    log_p = shop.log_probability(shop.customers, shop.articles["article_id"].to_list())
    assert np.ptp(log_p, axis=0).max() == pytest.approx(0, abs=1e-6)


def test_generated_data_is_a_function_of_its_settings(tmp_path: Path) -> None:
    small = GeneratorSettings(**SMALL)
    first = generate(small, tmp_path / "a")
    again = generate(small, tmp_path / "b")
    other = generate(GeneratorSettings(**SMALL, seed=1), tmp_path / "a")
    assert first.name == again.name != other.name
    for name in ("articles.csv", "customers.csv", "transactions_train.csv"):
        content = (first / name).read_bytes()
        assert content == (again / name).read_bytes()
        assert content != (other / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([first.name, other.name])


def test_files_that_are_made_in_pieces_have_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = GeneratorSettings(**SMALL)
    whole = generate(small, tmp_path / "whole")
    monkeypatch.setattr(hm_generate, "_ROWS", 7_000)
    monkeypatch.setattr(hm_generate, "_CELLS", 20 * SMALL["n_articles"])
    pieces = generate(small, tmp_path / "pieces")
    one, other = (
        pl.read_csv(folder / "transactions_train.csv", infer_schema=False)
        for folder in (whole, pieces)
    )
    keys = ["t_dat", "customer_id", "article_id"]
    assert other.select(keys).equals(other.select(keys).sort(keys))
    assert one.sort(one.columns).equals(other.sort(other.columns))
    for name in ("articles.csv", "customers.csv"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes()


def test_generated_data_is_written_once(tmp_path: Path) -> None:
    folder = generate(GeneratorSettings(**SMALL), tmp_path)
    before = (folder / "customers.csv").stat().st_mtime_ns
    assert generate(GeneratorSettings(**SMALL), tmp_path) == folder
    assert (folder / "customers.csv").stat().st_mtime_ns == before


def test_interrupted_generation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Shop) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Shop, "purchases", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(GeneratorSettings(**SMALL), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind")
def test_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied.*dataset\.generated_root="):
        generate(GeneratorSettings(**SMALL), tmp_path / "new")


def test_generated_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"cannot be written there .*dataset\.generated_root="):
        generate(GeneratorSettings(**SMALL), tmp_path / "taken")
