"""Every figure of a run, recomputed from the raw file without the package (:mod:`tests.recomputed`).

The files have repeats, equal times, equal scores, items of the held-out part alone, and users with few rows. The
figures are those of the commands people use: train, evaluate, recommend.
"""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest
import torch

from recsys_ssm.run.checkpoint_io import AtomicCheckpointIO
from tests.recomputed import (
    NAMES,
    figures,
    kept_lists,
    next_item_lists,
    next_item_scores,
    next_item_truth,
    results,
    two_tower_lists,
    two_tower_scores,
    two_tower_truth,
    with_zeros,
)

SMALL = (
    "backbone.d_model=16",
    "backbone.n_layers=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "name=truth",
    f"metrics=[{','.join(NAMES)}]",
    "monitor=val/ndcg@10",
)


def only_run(folder: Path) -> Path:
    [run] = folder.glob("runs/truth/*")
    return run


def clicks(path: Path) -> pl.DataFrame:
    """Write 90 users' events in no order: items again, equal times, rows twice, items that come last alone."""
    rng = random.Random(5)
    rows = []
    for user in range(90):
        mine: list[str] = []
        for event in range(rng.choice([1, 2, 3, 4, 6, 9, 14])):
            again = mine and rng.random() < 0.35
            mine.append(rng.choice(mine) if again else f"{rng.randrange(24):02d}")
            time = rng.randrange(0, 400) if user % 3 else 100 * (event // 2) + user
            rows.append((f"u{user}", mine[-1], time))
        if user % 7 == 0:
            rows.append((f"u{user}", f"new{user}", 390 + user))
    rows += rng.sample(rows, 40)
    rng.shuffle(rows)
    table = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    table.write_csv(path)
    return table


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def equal_items(run: Path) -> Path:
    """Write a checkpoint in which some items have the same vector, so their scores are equal."""
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    weight = checkpoint["state_dict"]["tokenizer.embedding.weight"]
    for first, same in ((2, (5, 11, 12)), (7, (3, 20))):
        weight[list(same)] = weight[first].clone()
    AtomicCheckpointIO().save_checkpoint(checkpoint, run / "checkpoints/equal.ckpt")
    return run / "checkpoints/equal.ckpt"


def printed(text: str, names: list[str], columns: list[dict[str, float]]) -> None:
    """Check the table that a command printed."""
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "@" in line}
    for name in names:
        if name in ("mrr@1", "ndcg@1"):
            continue
        assert lines[name] == [f"{column[name]:.4f}" for column in columns], name


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize(
    ("split", "options"),
    [
        ("leave_one_out", ("backbone=mamba", "dataset.max_length=5")),
        ("time", ("backbone=transformer", "dataset.duplicates=keep")),
        (
            "leave_one_out",
            (
                "backbone=hydra",
                "backbone.headdim=16",
                "dataset.objective=masked",
                "dataset.max_length=6",
            ),
        ),
    ],
    ids=["mamba", "transformer-by-time", "masked"],
)
def test_next_items(
    cli, tmp_path: Path, split: str, options: tuple[str, ...], filter_seen: bool
) -> None:
    table = clicks(tmp_path / "clicks.csv")
    outcome = cli(
        "train", "dataset=interactions", "dataset.interactions=clicks.csv", f"dataset.split={split}",
        *options, *SMALL, "trainer.max_epochs=2", f"model.filter_seen={str(filter_seen).lower()}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    keep = "dataset.duplicates=keep" in options
    truth = next_item_truth(table, split, duplicates="keep" if keep else "identical")
    counts = truth.counts
    trained = set(counts)
    assert any(not asked.relevant <= trained for asked in truth.asked), "an item of the test alone"
    assert any(asked.relevant <= {item for item, _ in asked.history} for asked in truth.asked)
    relevant = [asked.relevant for asked in truth.asked]
    columns = ("metrics", "metrics_unfiltered") if filter_seen else ("metrics", "metrics_filtered")

    for checkpoint, output, text in (
        (run / "checkpoints/best.ckpt", run, outcome.text),
        (equal_items(run), tmp_path / "evaluated", None),
    ):
        if text is None:
            again = cli("evaluate", f"run={checkpoint}", f"output_dir={output}", "accelerator=cpu")
            assert again.code == 0, again.text
            text = again.text
        lists = next_item_lists(truth, next_item_scores(checkpoint, truth))
        values = {
            column: figures(own, relevant, truth.catalogue, counts) for column, own in lists.items()
        }
        ours, other = ("filtered", "unfiltered") if filter_seen else ("unfiltered", "filtered")
        written = results(output)
        assert written["filter_seen"] is filter_seen
        close(written["metrics"], values[ours])
        close(written[columns[1]], values[other])
        if not filter_seen:
            close(written["metrics_unfiltered"], values[ours])
        baselines = ["popularity", "popularity_unfiltered", "repeat_last_unfiltered"]
        assert list(written["baselines"]) == baselines
        for name in baselines:
            close(written["baselines"][name], values[name])
        printed(text, list(NAMES), [values[name] for name in (ours, other, *baselines)])
        served(cli, tmp_path, checkpoint, output, truth, lists, filter_seen)
    items = pl.read_parquet(run / "items.parquet")
    assert items["item"].to_list() == truth.catalogue
    assert items["train_count"].to_list() == [counts[item] for item in truth.catalogue]


def served(cli, folder: Path, checkpoint: Path, output: Path, truth, lists, filter_seen) -> None:
    """Check that ``recommend`` returns the lists of the headline, and under the other choice those of the other column.

    The file of histories has rows of items that the model does not know, and a user with no others.
    """
    ours, other = ("filtered", "unfiltered") if filter_seen else ("unfiltered", "filtered")
    kept = kept_lists(output, truth.users)
    assert list(kept) == [asked.user for asked in truth.asked]
    for asked, own in zip(truth.asked, lists[ours], strict=True):
        assert kept[asked.user] == (own, asked.relevant)
    rows = [(asked.user, *event) for asked in truth.asked for event in asked.history]
    rows += [(truth.asked[0].user, "unknown", -5), ("stranger", "unheard", 3)]
    pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row").write_csv(
        folder / "histories.csv"
    )
    for choice, column in (
        ("null", ours),
        (str(filter_seen).lower(), ours),
        (str(not filter_seen).lower(), other),
    ):
        outcome = cli(
            "recommend", f"run={checkpoint}", "users=histories.csv", f"k={len(truth.catalogue)}",
            f"filter_seen={choice}", "batch_size=7", "accelerator=cpu",
        )  # fmt: skip
        assert outcome.code == 0, outcome.text
        found = pl.read_parquet(folder / "recommendations.parquet")
        got = dict(found.group_by("user", maintain_order=True).agg("item").iter_rows())
        popular = got.pop("stranger")
        assert popular == lists["popularity_unfiltered"][0]
        assert got == {
            asked.user: own for asked, own in zip(truth.asked, lists[column], strict=True)
        }


def shop(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    """Write ratings, people and items: pairs several times, equal times, items alike, people and items not in files."""
    rng = random.Random(11)
    kinds = [rng.choice("abc") for _ in range(30)]
    items = [(f"i{n:02d}", kinds[n]) for n in range(28)]  # i28 and i29 are not in the file
    people = [(f"u{n}", rng.choice("xyz"), rng.randrange(18, 80)) for n in range(125)]
    rows = []
    for n in range(130):  # the last are not in the file of people
        for _ in range(rng.randrange(2, 12)):
            item = rng.randrange(28) if rng.random() < 0.9 else 29
            rows.append((f"u{n}", f"i{item:02d}", rng.randrange(1, 6), rng.randrange(8)))
    rng.shuffle(rows)
    ratings = pl.DataFrame(rows, ["user_id", "item_id", "stars", "timestamp"], orient="row")
    table = pl.DataFrame(people, ["user_id", "town", "age"], orient="row")
    ratings.write_csv(folder / "ratings.csv")
    table.write_csv(folder / "people.csv")
    pl.DataFrame(items, ["item_id", "kind"], orient="row").write_csv(folder / "items.csv")
    catalogue = {item for item, _ in items} | set(ratings["item_id"])
    return ratings, table, sorted(catalogue)


@pytest.mark.parametrize("min_relevant", [1, 2])
@pytest.mark.parametrize("split", ["interactions", "users"])
def test_two_towers(cli, tmp_path: Path, split: str, min_relevant: int) -> None:
    ratings, people, catalogue = shop(tmp_path)
    id_feature = (
        "true" if min_relevant == 1 else "false"
    )  # without it, items of a kind have equal scores
    outcome = cli(
        "train", "dataset=table", "dataset.interactions=ratings.csv", "dataset.users=people.csv",
        "dataset.items=items.csv", "dataset.user_categorical=[town]", "dataset.user_numeric=[age]",
        "dataset.item_categorical=[kind]", f"dataset.item_id_feature={id_feature}", "seed=3",
        "dataset.timestamp=timestamp", "dataset.target=stars", "dataset.relevant_above=3",
        f"dataset.min_relevant={min_relevant}", f"dataset.split={split}", "dataset.eval_batch_size=5",
        "backbone=mamba", *SMALL, "trainer.max_steps=20", "validations=1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    truth = two_tower_truth(
        ratings, catalogue, split, seed=3, relevant_above=3, min_relevant=min_relevant
    )
    relevant = [asked.relevant for asked in truth.asked]
    lists = two_tower_lists(truth, two_tower_scores(run / "checkpoints/best.ckpt", truth, people))
    values = {
        column: figures(own, relevant, truth.catalogue, truth.counts)
        for column, own in lists.items()
    }
    again = cli("evaluate", f"run={run}", "output_dir=evaluated", "accelerator=cpu")
    assert again.code == 0, again.text
    columns = [values["model"], values["random"], values["popularity"]]
    for output, text in ((run, outcome.text), (tmp_path / "evaluated", again.text)):
        written = results(output)
        close(written["metrics"], values["model"])
        close(written["metrics_all_users"], with_zeros(values["model"]))
        assert written["baselines"].keys() == {"random", "popularity"}
        for name in written["baselines"]:
            close(written["baselines"][name], values[name])
        printed(text, list(NAMES), columns)
        kept = kept_lists(output, truth.users)
        assert list(kept) == [asked.user for asked in truth.asked]
        for asked, own in zip(truth.asked, lists["model"], strict=True):
            assert kept[asked.user] == (own, asked.relevant)
    counted = pl.read_parquet(run / "items.parquet")
    assert counted["item"].to_list() == truth.catalogue
    assert counted["train_count"].to_list() == [truth.counts[item] for item in truth.catalogue]

    # Recommend what the test ranked: the users' training rows are what they had.
    truth.trained.write_csv(tmp_path / "trained.csv")
    asked_for = pl.DataFrame({"user_id": [asked.user for asked in truth.asked]})
    asked_for.join(people, on="user_id", how="left", maintain_order="left").write_csv(
        tmp_path / "asked.csv"
    )
    for options, column in (
        (("interactions=trained.csv",), lists["model"]),
        (("filter_seen=false",), None),
    ):
        outcome = cli(
            "recommend", f"run={run}", "users=asked.csv", "user=user_id", *options, "accelerator=cpu",
            f"k={len(catalogue)}", "batch_size=7",
        )  # fmt: skip
        assert outcome.code == 0, outcome.text
        found = pl.read_parquet(tmp_path / "recommendations.parquet")
        got = dict(found.group_by("user", maintain_order=True).agg("item").iter_rows())
        if column is None:
            scores = two_tower_scores(run / "checkpoints/best.ckpt", truth, people)
            column = two_tower_lists(truth._replace(seen=[set()] * len(scores)), scores)["model"]
        assert got == {asked.user: own for asked, own in zip(truth.asked, column, strict=True)}


def test_the_length_of_a_list_depends_on_its_user_alone(cli, tmp_path: Path) -> None:
    """The longest metric's places, or as many as the user has relevant items, whatever else is in the batch."""
    _, _, catalogue = shop(tmp_path)
    options = (
        "dataset=table", "dataset.interactions=ratings.csv", "dataset.timestamp=timestamp",
        "dataset.held_out=0.5", "backbone=mamba", *SMALL, "metrics=[ndcg@1]", "monitor=val/loss",
        "trainer.max_steps=2", "validations=1", "dataset.n_test_users=30",
    )  # fmt: skip
    assert cli("train", *options, "dataset.eval_batch_size=30").code == 0
    run = only_run(tmp_path)
    changed = ("dataset.eval_batch_size=4", "output_dir=evaluated", "accelerator=cpu")
    assert cli("evaluate", f"run={run}", *changed).code == 0
    first, second = (
        pl.read_parquet(folder / "test_users.parquet") for folder in (run, tmp_path / "evaluated")
    )
    assert first.equals(second)
    assert first["recommended"].list.len().to_list() == first["n_relevant"].clip(1).to_list()
    assert first["n_relevant"].n_unique() > 1 and len(catalogue) > first["n_relevant"].max()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["leave_one_out", "time"])
def test_movielens(cli, tmp_path: Path, shared_data: Path, split: str) -> None:
    """Every column on ML-100K; equal to 1e-6 of the catalogue's scores, the lists are those of float64."""
    file = shared_data / "ml-100k" / "ml-100k.inter"
    table = pl.read_csv(file, separator="\t", infer_schema=False).select(
        user_id="user_id:token", item_id="item_id:token", timestamp="timestamp:float"
    )
    table = table.with_columns(pl.col("timestamp").cast(pl.Int64))
    outcome = cli(
        "train", "dataset=ml_100k", f"dataset.root={shared_data}", f"dataset.split={split}",
        "backbone=mamba", *SMALL, "trainer.max_epochs=1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    truth = next_item_truth(table, split)
    scores = next_item_scores(run / "checkpoints/best.ckpt", truth)
    lists = next_item_lists(truth, scores)
    written, relevant = results(run), [asked.relevant for asked in truth.asked]
    kept = kept_lists(run, truth.users)
    assert list(kept) == [asked.user for asked in truth.asked]
    for asked, own, score in zip(truth.asked, lists["filtered"], scores, strict=True):
        top, liked = kept[asked.user]
        assert liked == asked.relevant
        assert [score[item] for item in top] == pytest.approx(
            [score[item] for item in own], abs=1e-4
        )
    values = [kept[asked.user][0] for asked in truth.asked]
    close(written["metrics"], figures(values, relevant, truth.catalogue, truth.counts))
    for name in ("popularity", "popularity_unfiltered", "repeat_last_unfiltered"):
        expected = figures(lists[name], relevant, truth.catalogue, truth.counts)
        close(written["baselines"][name], expected)
    other = figures(lists["unfiltered"], relevant, truth.catalogue, truth.counts)
    for name, value in other.items():
        assert written["metrics_unfiltered"][name] == pytest.approx(value, rel=2e-3), name
