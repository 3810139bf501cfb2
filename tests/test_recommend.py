"""Test the command that recommends: users in, a file of recommendations out."""

from __future__ import annotations

import random
from pathlib import Path

import polars as pl
import pytest
import torch

from recsys_ssm.data.table import TableData
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.two_tower import TwoTower

N_ITEMS = 15
SMALL = (
    "backbone=mamba",
    "backbone.d_model=16",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "name=small",
)


def only_run(folder: Path) -> Path:
    [run] = folder.glob("runs/*/*")
    return run


def write_rows(path: Path, rows: list[tuple], header: str = "user_id,item_id,timestamp") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


@pytest.fixture
def next_item(cli, tmp_path: Path) -> Path:
    generator = random.Random(0)
    rows = []
    for user in range(40):
        start = generator.randrange(N_ITEMS)
        rows += [(f"u{user}", f"i{(start + t) % N_ITEMS}", t) for t in range(4 + user % 6)]
    write_rows(tmp_path / "mine.csv", rows)
    data = ("dataset=interactions", f"dataset.interactions={tmp_path / 'mine.csv'}")
    assert cli("train", *data, *SMALL, "trainer.max_epochs=1").code == 0
    return only_run(tmp_path)


def test_new_histories_as_the_model_would(cli, next_item: Path, tmp_path: Path) -> None:
    """The file has unsorted rows, a user with unknown items only, and an unknown item."""
    rows = [
        ("ann", "i3", 9),
        ("bob", "i7", 1),
        ("ann", "i2", 5),
        ("ann", "new", 7),
        ("eve", "x", 1),
    ]
    write_rows(tmp_path / "new.csv", rows)
    outcome = cli(
        "recommend",
        f"run={next_item}",
        "users=new.csv",
        "k=4",
        "batch_size=1",
        "output=out/top.csv",
    )
    assert outcome.code == 0, outcome.text
    assert "1 of 3 users have no item of the catalogue and get the most popular" in outcome.text
    assert "the first is eve" in outcome.text and "3 users: out/top.csv" in outcome.text
    found = pl.read_csv(tmp_path / "out/top.csv")
    assert found.columns == ["user", "rank", "item", "score"]
    model = NextItem.load_from_checkpoint(next_item / "checkpoints/best.ckpt", weights_only=True)
    expected = model.recommend([["i2", "i3"], ["i7"], []], 4)
    assert found["user"].to_list() == ["ann"] * 4 + ["bob"] * 4 + ["eve"] * 4
    assert found["rank"].to_list() == [1, 2, 3, 4] * 3
    assert found["item"].to_list() == expected["item"].to_list()
    found, expected = found.filter(pl.col("user") != "eve"), expected.filter(pl.col("user") < 2)
    assert found["score"].to_numpy() == pytest.approx(expected["score"].to_numpy(), rel=1e-4)
    assert not {"i2", "i3"} & set(found.filter(user="ann")["item"])


def test_everyone_of_the_training_whole_histories(cli, next_item: Path, tmp_path: Path) -> None:
    assert cli("recommend", f"run={next_item}", "k=1", "filter_seen=false").code == 0
    found = pl.read_parquet(tmp_path / "recommendations.parquet")
    assert found["user"].n_unique() == found.height == 40
    model = NextItem.load_from_checkpoint(next_item / "checkpoints/best.ckpt", weights_only=True)
    rows = pl.read_csv(tmp_path / "mine.csv").filter(user_id="u9")["item_id"].to_list()
    expected = model.recommend([rows], 1, filter_seen=False)["item"].item()
    assert found.filter(user="u9")["item"].item() == expected
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.csv", "runs", "recommendations.parquet"}


def test_two_towers_from_features(cli, tmp_path: Path) -> None:
    generator = random.Random(0)
    people = [(f"p{i}", generator.choice("abc"), generator.randrange(20, 60)) for i in range(60)]
    write_rows(tmp_path / "people.csv", people, "user_id,kind,age")
    likes = [(user, f"i{ord(kind) % 5}") for user, kind, _ in people]
    likes += [(user, f"i{generator.randrange(9)}") for user, *_ in people]
    write_rows(tmp_path / "likes.csv", sorted(set(likes)), "user_id,item_id")
    options = (
        "dataset=table",
        f"dataset.interactions={tmp_path / 'likes.csv'}",
        f"dataset.users={tmp_path / 'people.csv'}",
        "dataset.user_categorical=[kind]",
        "dataset.user_numeric=[age]",
    )
    outcome = cli("train", *options, *SMALL, "backbone.n_layers=1", "trainer.max_steps=3")
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    outcome = cli("recommend", f"run={run}", "users=people.csv", "user=user_id", "k=2")
    assert outcome.code == 0, outcome.text
    found = pl.read_parquet(tmp_path / "recommendations.parquet")
    assert found["user"].to_list() == [user for user, *_ in people for _ in range(2)]
    model = TwoTower.load_from_checkpoint(run / "checkpoints/best.ckpt", weights_only=True)
    table = pl.read_csv(tmp_path / "people.csv", infer_schema=False)
    exclude = torch.tensor([[(u, i) in set(likes) for i in model.item_ids] for u, *_ in people])
    expected = model.recommend(table, 2, exclude)
    assert found["item"].to_list() == expected["item"].to_list()
    assert "60 of 60 users are known" in outcome.text
    assert not set(found.select("user", "item").iter_rows()) & set(likes)
    again = cli("recommend", f"run={run}", "users=people.csv", "k=2", "filter_seen=false")
    assert again.code == 0
    kept = pl.read_parquet(tmp_path / "recommendations.parquet")
    assert kept["item"].to_list() == model.recommend(table, 2)["item"].to_list()
    outcome = cli("recommend", f"run={run}", "users=people.csv", "k=2", "output=rows.csv")
    assert outcome.code == 0 and pl.read_csv(tmp_path / "rows.csv")["user"][2] == 1

    write_rows(tmp_path / "no_age.csv", [("p1", "a")], "user_id,kind")
    for arguments, message in [
        ([], "users=null: two towers need a table of users; name one with the columns"),
        (["users=no_age.csv"], "no_age.csv: no column 'age'"),
        (["users=people.csv", "user=id"], "people.csv: no column 'id'"),
    ]:
        outcome = cli("recommend", f"run={run}", *arguments)
        assert outcome.code == 1 and message in outcome.err, outcome.text
        assert outcome.err.count("\n") == 1


def test_what_counts_as_had_is_the_same_in_training_test_and_use(cli, tmp_path: Path) -> None:
    """A row counts whatever its rating; rows that the training's filter leaves out do not."""
    generator = random.Random(0)
    rows = [
        (f"p{u}", f"i{i:02d}", generator.randrange(1, 6), "seen" if i == 0 else "bought")
        for u in range(60)
        for i in [0, *generator.sample(range(1, 20), 6)]
    ]
    write_rows(tmp_path / "stars.csv", rows, "user_id,item_id,stars,kind")
    options = ("dataset=table", "dataset.interactions=stars.csv", "dataset.target=stars")
    rules = ("dataset.relevant_above=3", "dataset.filter='kind == \"bought\"'", "loss=bce")
    outcome = cli("train", *options, *rules, *SMALL, "trainer.max_steps=2", "seed=0")
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    model = TwoTower.load_from_checkpoint(run / "checkpoints/best.ckpt", weights_only=True)
    assert model.loss.relevant_above == 3 and "i00" not in model.item_ids

    data = TableData(
        interactions=str(tmp_path / "stars.csv"), target="stars", relevant_above=3,
        filter='kind == "bought"',
    )  # fmt: skip
    splits, batch = data.splits, next(iter(data.predict_dataloader()))
    tested = next(iter(data.test_dataloader()))
    assert batch.seen is not None and tested.seen is not None
    had = batch.seen.mask(0, splits.users.n_rows, len(splits.item_ids))
    assert torch.equal(had[tested.user_index], tested.seen)
    assert had.sum() == splits.train.user.numel() > int((splits.train.target > 3).sum())

    people = [(f"p{u}",) for u in range(60)]
    write_rows(tmp_path / "people.csv", people, "user_id")
    everything = f"k={len(model.item_ids)}"
    outcome = cli("recommend", f"run={run}", "users=people.csv", "user=user_id", everything)
    assert outcome.code == 0, outcome.text
    found = pl.read_parquet(tmp_path / "recommendations.parquet")
    bought = {(user, item) for user, item, _, kind in rows if kind == "bought"}
    every = {(user, item) for (user,) in people for item in model.item_ids}
    assert set(found.select("user", "item").iter_rows()) == every - bought
    refused = cli("train", *options, "dataset.relevant_above=-1", "dataset.negatives=1", *SMALL)
    assert refused.code == 1 and "drawn negatives have target 0" in refused.err


def test_mistakes_are_one_line(cli, next_item: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "short.csv", [("ann", "i3")], "user_id,item_id")
    write_rows(tmp_path / "strange.csv", [("ann", "x", 1)])
    (tmp_path / "taken").write_text("")
    for arguments, message in [
        (["run=nowhere"], "run=nowhere: no checkpoints/best.ckpt in it"),
        ([f"run={next_item}", "k=0"], "k=0: give a whole number above 0"),
        ([f"run={next_item}", "users=absent.csv"], "absent.csv: no such file"),
        ([f"run={next_item}", "users=short.csv"], "short.csv: no column 'timestamp'"),
        ([f"run={next_item}", "users=strange.csv"], "no user has an item of the model's"),
        ([f"run={next_item}", "user=id"], "this run reads users by dataset.user"),
        ([f"run={next_item}", "output=taken/x.parquet"], "output=taken: cannot write there"),
        ([f"run={next_item}", "output=runs"], "output=runs is a folder; name a file"),
        ([f"run={next_item}", "accelerator=tpuu"], "accelerator=tpuu: expected one of auto"),
        ([f"run={next_item}", "kk=3"], "kk: no such option; did you mean"),
    ]:
        outcome = cli("recommend", *arguments)
        assert outcome.code == 1 and message in outcome.err, (arguments, outcome.text)
        assert "Traceback" not in outcome.err


def test_known_users_and_their_earlier_items(cli, next_item: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "new.csv", [("u3", "i1", 99), ("new", "i1", 99)])
    options = (f"run={next_item}", "users=new.csv", "k=3", "output=top.csv")
    outcome = cli("recommend", *options)
    assert outcome.code == 0, outcome.text
    assert "1 of 2 users were in the training data" in outcome.text
    assert "not used: join_training=true" in outcome.text
    outcome = cli("recommend", *options, "join_training=true")
    assert outcome.code == 0 and "put before those of the file" in outcome.text
    rows = pl.read_csv(tmp_path / "mine.csv").filter(user_id="u3")["item_id"].to_list()
    model = NextItem.load_from_checkpoint(next_item / "checkpoints/best.ckpt", weights_only=True)
    expected = model.recommend([["i1"], [*rows, "i1"]], 3)
    found = pl.read_csv(tmp_path / "top.csv")
    assert found["user"].to_list() == ["new"] * 3 + ["u3"] * 3
    assert found["item"].to_list() == expected["item"].to_list()


def test_the_suffix_decides_the_format(cli, next_item: Path, tmp_path: Path) -> None:
    for name, read in (
        ("top.parquet", pl.read_parquet),
        ("top.CSV", pl.read_csv),
        ("top.tsv", lambda path: pl.read_csv(path, separator="\t")),
        ("top.json", pl.read_json),
        ("top.jsonl", pl.read_ndjson),
    ):
        assert cli("recommend", f"run={next_item}", "k=2", f"output={name}").code == 0
        found = read(tmp_path / name)
        assert found.columns == ["user", "rank", "item", "score"] and found.height == 80
    outcome = cli("recommend", f"run={next_item}", "output=top.xlsx")
    assert outcome.code == 1 and "output=top.xlsx: unknown format; end the name with" in outcome.err
    assert not (tmp_path / "top.xlsx").exists()


def test_the_data_is_found_from_another_folder(cli, tmp_path: Path, monkeypatch) -> None:
    rows = [(f"u{user}", f"i{(user + t) % 7}", t) for user in range(30) for t in range(5)]
    write_rows(tmp_path / "mine.csv", rows)
    data = ("dataset=interactions", "dataset.interactions=mine.csv")
    assert cli("train", *data, *SMALL, "trainer.max_epochs=1").code == 0
    run = only_run(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = cli("recommend", f"run={run}", "k=1")
    assert outcome.code == 0, outcome.text
    assert f"paths are relative to {tmp_path}, where the run was trained" in outcome.text
    assert pl.read_parquet("recommendations.parquet").height == 30
    outcome = cli("evaluate", f"run={run}", "output_dir=out")
    assert outcome.code == 0, outcome.text


def test_a_file_with_another_separator_is_read_as_the_message_says(
    cli, next_item: Path, tmp_path: Path
) -> None:
    (tmp_path / "semi.csv").write_text("user_id;item_id;timestamp\nann;i3;1\n")
    outcome = cli("recommend", f"run={next_item}", "users=semi.csv")
    assert outcome.code == 1 and "separator" in outcome.err
    outcome = cli("recommend", f"run={next_item}", "users=semi.csv", "dataset.separator=';'")
    assert outcome.code == 0, outcome.text


def test_the_submission_of_the_hm_competition(cli, tmp_path: Path) -> None:
    generator = {"n_customers": 300, "n_articles": 40, "n_transactions": 6_000}
    options = (
        "experiment=two_tower/hm_full",
        "dataset.source=generated",
        f"dataset.generated_root={tmp_path / 'made'}",
        *(f"+dataset.generator.{name}={value}" for name, value in generator.items()),
        "dataset.batch_size=256",
        "loss.negatives=32",
        "backbone.d_model=8",
        "logger=none",
        "trainer.max_steps=3",
        "output_root=runs",
    )
    outcome = cli("train", *options)
    assert outcome.code == 0, outcome.text
    run = only_run(tmp_path)
    outcome = cli("recommend", f"run={run}", "k=12", "layout=kaggle", "output=submission.csv")
    assert outcome.code == 0, outcome.text
    found = pl.read_csv(tmp_path / "submission.csv", infer_schema=False)
    assert found.columns == ["customer_id", "prediction"]
    (folder,) = (tmp_path / "made").glob("hm-*")
    customers = pl.read_csv(folder / "customers.csv", infer_schema=False)
    assert found["customer_id"].to_list() == customers["customer_id"].sort().to_list()
    articles = set(pl.read_csv(folder / "articles.csv", infer_schema=False)["article_id"])
    lists = [cell.split(" ") for cell in found["prediction"]]
    assert all(len(set(one)) == 12 and set(one) <= articles for one in lists)
    # The customers' own file gives the same.
    again = cli(
        "recommend",
        f"run={run}",
        f"users={folder / 'customers.csv'}",
        "user=customer_id",
        "k=12",
        "output=rows.parquet",
    )
    assert again.code == 0, again.text
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    by_user = {user: rows["item"].to_list() for (user,), rows in rows.group_by("user")}
    assert all(by_user[user] == one for user, one in zip(found["customer_id"], lists, strict=True))
    for arguments, message in [
        (["layout=wide"], "layout=wide: expected rows or kaggle"),
        (["user=customer_id"], "user=customer_id: with users=null the dataset names its users"),
    ]:
        outcome = cli("recommend", f"run={run}", *arguments)
        assert outcome.code == 1 and message in outcome.err, outcome.text
