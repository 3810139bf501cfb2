"""H&M data: what is read from the three files, who is held out, what is refused."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hm_files import CUSTOMERS, SMALL, note, relevant

from recsys_ssm.data.hm import CATEGORICAL, HmData
from recsys_ssm.data.hm_generate import GeneratorSettings, generate
from recsys_ssm.data.two_tower import Pairs, TwoTowerSplits
from recsys_ssm.errors import UserError

# Customer u buys what PURCHASES[u] says, articles by letter; a capital one is not in the catalogue
# of five. Sales: b 7, c 6, a 5, d 5, e 4, Y 3, Z 3.
PURCHASES = {
    "u1": "abcd",
    "u2": "abcde",
    "u3": "aabb",
    "u4": "bcY",
    "u5": "cd",
    "u6": "abZ",
    "u7": "deY",
    "u8": "bce",
    "u9": "cdeZ",
    "v1": "YZ",
}
ARTICLE = {name: f"0{100 + i}" for i, name in enumerate("Yabcde")} | {"Z": "0200"}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The three files with ten customers; u9 is not in the customer file."""
    root = tmp_path / "hm"
    root.mkdir()
    lines = [f"{ARTICLE[name]},{name},Colour {ord(name) % 2}\n" for name in "ZedcbaY"]
    (root / "articles.csv").write_text("article_id,prod_name,colour_group_name\n" + "".join(lines))
    (root / "customers.csv").write_text(CUSTOMERS)
    bought = [(user, ARTICLE[name]) for user, names in PURCHASES.items() for name in names]
    lines = [f"2020-01-01,{user},{article},0.01,2\n" for user, article in bought]
    header = "t_dat,customer_id,article_id,price,sales_channel_id\n"
    (root / "transactions_train.csv").write_text(header + "".join(lines))
    return root


def data(root: Path | None, **options: Any) -> HmData:
    few = {"n_items": 5, "n_train": None, "n_test_users": 1, "n_val_users": 1, "min_relevant": 4}
    return HmData(**{"name": "hm", "root": root and str(root), **few, **options})


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def letters(splits: TwoTowerSplits) -> str:
    """The catalogue by the letters of the hand-written files."""
    name = {article.zfill(10): letter for letter, article in ARTICLE.items()}
    return "".join(name[item] for item in splits.item_ids)


def people(splits: TwoTowerSplits) -> list[str]:
    """Whom a row of the user table is: buyers by id."""
    return sorted(user for user, names in PURCHASES.items() if set(names) & set(letters(splits)))


def bought(splits: TwoTowerSplits, pairs: Pairs, target: float) -> dict[str, str]:
    """Articles with ``target`` by customer, sorted."""
    catalogue, users = letters(splits), people(splits)
    found: dict[str, list[str]] = {}
    for user, item, value in zip(*(part.tolist() for part in pairs), strict=True):
        if value == target:
            found.setdefault(users[user], []).append(catalogue[item])
    return {user: "".join(sorted(names)) for user, names in found.items()}


# --- the reader, on files written by hand ---------------------------------------------------------


def test_catalogue_is_what_is_bought_most_in_order_of_id(official: Path) -> None:
    # By popularity (b 7, c 6, a 5, …) the order would be another.
    assert letters(data(official).splits) == "abcde"
    assert letters(data(official, n_items=3, min_relevant=3).splits) == "abc"


def test_ties_at_the_border_of_the_catalogue_go_to_the_lower_id(official: Path) -> None:
    # Y and Z were sold as often; Z stands first in articles.csv, Y first in the order of ids.
    assert letters(data(official, n_items=6).splits) == "Yabcde"


def test_a_pair_for_every_purchase_and_one_for_something_not_bought(official: Path) -> None:
    for seed in range(5):
        splits = data(official, seed=seed).splits
        positives, negatives = (bought(splits, splits.train, target) for target in (1.0, 0.0))
        held_out = {
            people(splits)[u] for u in (*splits.test_ranking.user, *splits.val_ranking.user)
        }
        assert len(held_out) == 2
        assert set(positives) == set(people(splits)) - held_out - {"u2"}
        for user, names in positives.items():
            assert names == "".join(sorted(n for n in PURCHASES[user] if n.islower()))
            assert len(negatives[user]) == len(names)
            assert not set(negatives[user]) & set(PURCHASES[user])
        assert splits.train.target.tolist() == [1.0, 0.0] * (splits.train.target.numel() // 2)


def test_who_bought_everything_gives_no_pairs(official: Path) -> None:
    splits = data(official, seed=1).splits
    assert "u2" not in bought(splits, splits.train, 1.0)
    assert note(splits, "1 customers bought the whole catalogue")


def test_test_users_have_enough_different_articles(official: Path) -> None:
    # u3 bought four pieces, of two articles; only u1 and u2 have four different ones.
    splits = data(official, n_test_users=10).splits
    assert [people(splits)[u] for u in splits.test_ranking.user] == ["u1", "u2"]
    assert relevant(splits, splits.test_ranking).int().tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert splits.test_ranking.seen is None
    assert note(splits, "test users") == (
        "test users: 2 of the 2 with at least 4 different articles of the catalogue "
        "(all of them; n_test_users=10)"
    )


def test_held_out_purchases_are_not_in_training(official: Path) -> None:
    for seed in range(8):
        splits = data(official, n_test_users=2, n_val_users=3, seed=seed).splits
        test, val = set(splits.test_ranking.user.tolist()), set(splits.val_ranking.user.tolist())
        assert not test & val
        assert not (test | val) & set(splits.train.user.tolist())
        assert set(splits.val.user.tolist()) <= val


def test_validation_takes_the_next_best_where_too_few_have_enough(official: Path) -> None:
    # Both with four articles are test users; u8 and u9 are the ones with three.
    taken: dict[str, str] = {}
    for seed in range(10):
        splits = data(official, n_test_users=2, seed=seed).splits
        assert note(splits, "validation users") == "validation users: 1 with at least 3"
        taken |= bought(splits, splits.val, 1.0)
    assert taken == {"u8": "bce", "u9": "cde"}


def test_validation_takes_at_most_a_tenth_of_who_is_left(official: Path) -> None:
    splits = data(official, n_val_users=100).splits
    assert splits.val_ranking.user.numel() == 1


def test_an_empty_cell_is_a_category_of_its_own_and_an_unknown_age_the_mean(official: Path) -> None:
    splits = data(official, seed=0, min_relevant=5).splits  # u2 is tested
    schema = splits.user_schema
    assert [field.name for field in schema.categorical] == list(CATEGORICAL)
    assert schema.categorical[0].values == ("1",)
    u1, u3, u9 = (
        splits.users.rows(torch.tensor([people(splits).index(user)])) for user in ("u1", "u3", "u9")
    )
    assert u3.categorical.tolist() == u9.categorical.tolist() == [[0, 0, 0, 0]]
    assert u3.numeric.tolist() == u9.numeric.tolist() == [[0.0]]
    known = [
        field.values[code - 1]
        for field, code in zip(schema.categorical, u1.categorical[0].tolist(), strict=True)
    ]
    assert known == ["1", "1", "ACTIVE", "Regularly"]


def test_ages_are_scaled_by_those_of_training_alone(official: Path) -> None:
    splits = data(official, min_relevant=5).splits
    ages = {"u1": 20, "u2": 40, "u4": 30, "u5": 50, "u6": 60, "u7": 25, "u8": 35}
    train = {people(splits)[u] for u in splits.train.user.unique()}
    known = [age for user, age in ages.items() if user in train]
    (field,) = splits.user_schema.numeric
    assert field.mean == pytest.approx(np.mean(known))
    assert field.std == pytest.approx(np.std(known))
    row = people(splits).index("u6")
    assert splits.users.numeric[row].item() == pytest.approx((60 - field.mean) / field.std)


def test_what_was_read_and_left_out_is_told(official: Path) -> None:
    rewrite(official / "transactions_train.csv", lambda text: text + "2020-01-01,,0101,0.01,2\n")
    splits = data(official).splits
    assert splits.notes[0] == f"files of {official}"
    assert splits.notes[1] == "articles.csv: 7 articles read"
    assert splits.notes[2] == (
        "transactions_train.csv: 34 purchases read, 27 kept; left out: 1 without a customer_id, "
        "6 not of the 5 articles bought most"
    )
    assert splits.notes[3] == (
        "customers.csv: 10 customers read, 2 left out: they bought nothing of the catalogue"
    )
    assert splits.notes[4] == "1 of 9 buyers are not in customers.csv: kept, features unknown"
    assert not splits.generated
    assert set(splits.baselines) == {"random", "popularity"}


def test_ids_without_leading_zeros_and_an_index_column(official: Path) -> None:
    plain = data(official).splits

    def strip(text: str) -> str:
        header, *rows = text.splitlines()
        return "\n".join([f",{header}", *(f"{i},{row[1:]}" for i, row in enumerate(rows))]) + "\n"

    rewrite(official / "articles.csv", strip)
    # Some with, some without: as after joining exports.
    rewrite(official / "transactions_train.csv", lambda text: text.replace("0102,", "102,", 3))
    assert plain.item_ids == [ARTICLE[name].zfill(10) for name in "abcde"]
    again = data(official).splits
    assert again.item_ids == plain.item_ids
    for a, b in zip(again.train, plain.train, strict=True):
        assert torch.equal(a, b)


def test_order_of_the_rows_does_not_matter(official: Path) -> None:
    plain = data(official).splits

    def reverse(text: str) -> str:
        header, *rows = text.splitlines()
        return "\n".join([header, *reversed(rows)]) + "\n"

    for name in ("articles.csv", "customers.csv", "transactions_train.csv"):
        rewrite(official / name, reverse)
    again = data(official).splits
    assert torch.equal(again.test_ranking.user, plain.test_ranking.user)
    assert torch.equal(again.train.item, plain.train.item)
    assert torch.equal(again.users.numeric, plain.users.numeric)


def test_training_pairs_are_drawn_or_repeated(official: Path) -> None:
    fewer = data(official, n_train=8).splits
    assert fewer.train.user.numel() == 8
    assert "drawn from" in note(fewer, "train pairs")
    drawn = (
        bought(s, s.train, 1.0)
        for s in (data(official, n_train=4, seed=i).splits for i in range(20))
    )
    assert {"u3", "u5", "u6", "u7", "u9"} <= set().union(*drawn)
    more = data(official, n_train=1_000).splits
    positive = more.train.target == 1
    assert more.train.user.numel() == 1_000
    assert int(positive.sum()) == 500
    purchase, times = torch.stack([*more.train[:2]])[:, positive].unique(dim=1, return_counts=True)
    once = data(official).splits
    available = int((once.train.target == 1).sum())
    assert f"{available} purchases repeated {500 / available:.1f} times" in note(
        more, "train pairs"
    )
    # Repeat purchases (u3's) count as often as they were made, all others once a round.
    twice = torch.tensor([people(more)[u] == "u3" for u in purchase[0]])
    assert times[~twice].min() >= 500 // available
    assert times[~twice].max() <= 500 // available + 1
    # The negatives are drawn anew: over 500, everything a customer never bought turns up.
    negatives = bought(more, more.train, 0.0)
    for user, names in bought(more, more.train, 1.0).items():
        assert set(negatives[user]) == set("abcde") - set(names)


def test_seed(official: Path) -> None:
    a, b, c = (data(official, seed=seed, n_train=100).splits for seed in (0, 0, 1))
    assert torch.equal(a.train.item, b.train.item)
    assert torch.equal(a.test_ranking.user, b.test_ranking.user)
    assert not torch.equal(a.train.item, c.train.item)


def test_article_columns_as_features(official: Path) -> None:
    splits = data(official, item_features=["colour_group_name"]).splits
    (field,) = splits.item_schema.categorical
    assert field.values == ("Colour 0", "Colour 1")
    assert splits.items.categorical[:, 0].tolist() == [ord(name) % 2 + 1 for name in "abcde"]
    with pytest.raises(UserError, match=r"articles\.csv: no column 'color'"):
        _ = data(official, item_features="color").splits


# --- mistakes in the files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("customers.csv", ",40.0,", ",-40.0,", r"row 2, column 'age': '-40.0' is negative"),
        ("customers.csv", ",40.0,", ",NaN,", r"row 2, column 'age': 'NaN' is not a finite number"),
        ("customers.csv", ",40.0,", ",old,", r"row 2, column 'age': 'old' is not a finite number"),
        ("customers.csv", "u1,1.0", "u1,yes", r"row 1, column 'FN': 'yes' is not a finite number"),
        ("customers.csv", "\nu3,", "\nu1,", r"row 3, column 'customer_id': 'u1' is in an earl"),
        ("customers.csv", "\nu3,", "\n,", r"row 3, column 'customer_id': is empty"),
        ("customers.csv", "Active", "active", r"no column 'Active'; its columns are customer_id"),
        ("articles.csv", "0104,", "103,", r"row 4, column 'article_id': '0000000103' is in"),
        ("articles.csv", "article_id", "id", r"no column 'article_id'; its columns are id"),
        ("transactions_train.csv", "customer_id", "customer", r"no column 'customer_id'"),
        (
            "transactions_train.csv",
            "u2,0101",
            "u2,0777",
            r"row 5, column 'article_id': '0777' is in no row of articles.csv \(nor are 0 more\)",
        ),
        ("transactions_train.csv", "u2,0101", "u2,", r"row 5, column 'article_id': None is in no"),
    ],
)
def test_mistake_is_named_with_file_row_and_column(
    official: Path, name: str, old: str, new: str, message: str
) -> None:
    assert old in (official / name).read_text()
    rewrite(official / name, lambda text: text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        _ = data(official).splits
    assert str(caught.value).startswith(str(official / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["articles.csv", "customers.csv", "transactions_train.csv"])
def test_file_that_is_no_table(official: Path, name: str) -> None:
    path = official / name
    header = path.read_text().splitlines()[0]
    for content, message in {
        b"": "the file is empty",
        f"{header}\n".encode(): "no row below the header line",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR": "no column|not a readable CSV",
        f'{header}\n"a,b,c\n'.encode(): "not a readable CSV",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            _ = data(official).splits
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        _ = data(official).splits


def test_unknown_articles_can_be_left_out(official: Path) -> None:
    rewrite(official / "transactions_train.csv", lambda text: text.replace("u2,0101", "u2,0777"))
    splits = data(official, on_unknown_article="drop").splits
    assert "1 of articles articles.csv lacks" in note(
        splits, "transactions_train.csv: 33 purchases"
    )


def test_nobody_left_to_test(official: Path) -> None:
    with pytest.raises(
        UserError, match=r"no test user is left: .* more than 5 different .*; lower dataset"
    ):
        _ = data(official, min_relevant=6).splits


def test_nobody_left_to_train_on(official: Path) -> None:
    with pytest.raises(UserError, match="no training pair is left"):
        _ = data(official, n_test_users=100, min_relevant=1).splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_items": 1}, r"dataset\.n_items=1: give at least 2"),
        ({"n_train": 1}, r"dataset\.n_train=1: give at least 2"),
        ({"min_relevant": 0}, r"dataset\.min_relevant=0: give at least 1"),
        ({"item_features": []}, r"dataset\.item_features=\[\]"),
        ({"generator": {"n_customers": 0}}, r"dataset\.generator\.n_customers=0: give at least 1"),
        ({"generator": {"feature_strength": -1.0}}, r"feature_strength=-1\.0: give at least 0"),
        ({"generator": {"n_customers": "x"}}, r"generator\.n_customers='x': expected int"),
        ({"generator": {"customers": 5}}, r"generator\.customers: no such option"),
    ],
)
def test_wrong_option(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HmData(name="hm", **options)


# --- the real slice -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(shared_data: Path) -> Path:
    root = shared_data / "hm-sample"
    if not root.is_dir():
        pytest.skip(f"no slice of the H&M files at {root}")
    return root


def test_real_slice(sample: Path) -> None:
    splits = HmData(name="hm", root=str(sample)).splits
    # Counted apart, with nothing of the reader.
    rows = pl.read_csv(sample / "transactions_train.csv").select("customer_id", "article_id")
    sales = rows.group_by("article_id").len().sort(["len", "article_id"], descending=[True, False])
    top = sales["article_id"].head(100).sort()
    assert [int(item) for item in splits.item_ids] == top.to_list()
    assert all(len(item) == 10 for item in splits.item_ids)
    kept = rows.filter(pl.col("article_id").is_in(top.to_list()))
    distinct = kept.unique().group_by("customer_id").len()["len"]
    assert splits.users.n_rows == distinct.len()
    eligible = int((distinct >= 5).sum())
    assert 5 < eligible < 50
    assert splits.test_ranking.user.numel() == eligible
    assert f"test users: {eligible} of the {eligible}" in note(splits, "test users")
    lengths = distinct.filter(distinct >= 5).sort().to_list()
    assert sorted(splits.test_ranking.relevant.lengths.tolist()) == lengths
    known = pl.read_csv(sample / "customers.csv").join(kept, on="customer_id", how="semi").height
    assert note(splits, f"{distinct.len() - known} of {distinct.len()} buyers are not in")
    assert int((splits.users.categorical != 0).any(dim=1).sum()) == known
    assert f"10,000 purchases read, {kept.height:,} kept" in note(splits, "transactions_train.csv")
    assert splits.train.user.numel() == 160_000
    assert splits.train.target.mean() == 0.5
    assert not set(splits.train.user.tolist()) & set(splits.test_ranking.user.tolist())


def test_without_files_data_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RECSYS_SSM_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache" / "recsys_ssm"))
    with caplog.at_level(logging.WARNING):
        splits = HmData(name="hm", generator=SMALL).splits
    assert splits.generated
    assert f"no folder {tmp_path / 'nothing' / 'hm'}" in splits.notes[0]
    assert "GENERATED DATA" in caplog.text
    assert set(splits.baselines) == {"random", "popularity", "oracle"}
    assert list((tmp_path / "cache" / "recsys_ssm").glob("hm-*/generator.json"))
    with pytest.raises(UserError, match=r"dataset\.source=files, but there is no folder"):
        _ = HmData(name="hm", source="files").splits


def test_files_in_the_usual_place_are_read(
    official: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RECSYS_SSM_DATA", str(official.parent))
    assert not data(None).splits.generated
    made = data(
        None, source="generated", generated_root=str(tmp_path / "made"), generator=SMALL
    ).splits
    assert made.generated
    assert "dataset.source=generated" in made.notes[0]


def test_a_folder_that_was_named_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"articles\.csv: no such file"):
        _ = HmData(name="hm", root=str(tmp_path / "mistyped")).splits


def test_generated_files_do_not_pass_for_real(tmp_path: Path) -> None:
    folder = generate(GeneratorSettings(**SMALL), tmp_path)
    assert HmData(name="hm", root=str(folder)).splits.generated
    with pytest.raises(UserError, match="are generated"):
        _ = HmData(name="hm", root=str(folder), source="files").splits
    settings = folder / "generator.json"
    rewrite(settings, lambda text: text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"made by another version; delete the folder"):
        _ = HmData(name="hm", root=str(folder)).splits
    settings.write_text("{")
    with pytest.raises(UserError, match=r"generator\.json: damaged"):
        _ = HmData(name="hm", root=str(folder)).splits


def test_sources_are_hashes_of_the_files_or_of_the_settings(official: Path, tmp_path: Path) -> None:
    names = ("articles.csv", "customers.csv", "transactions_train.csv")
    assert data(official).sources == {
        str(official / name): hashlib.sha256((official / name).read_bytes()).hexdigest()
        for name in names
    }
    generated = [
        HmData(name="hm", source="generated", generated_root=str(tmp_path), generator=SMALL | more)
        for more in ({}, {"seed": 1}, {})
    ]
    one, other, again = (made.sources["hm_generate"] for made in generated)
    assert one == again != other


# --- the whole catalogue, by time ------------------------------------------------------------------

# Customer, article and day of September 2020. The last two days are the test, the two before the validation.
DATED = [
    ("u1", "a", 1),
    ("u1", "a", 2),
    ("u1", "b", 10),
    ("u2", "b", 2),
    ("u2", "c", 9),
    ("u3", "a", 3),
    ("u3", "a", 7),
    ("u3", "a", 9),
    ("u3", "d", 10),
    ("u3", "d", 10),
    ("u4", "e", 6),
    ("u9", "c", 5),
    ("u9", "d", 8),
]


@pytest.fixture
def dated(official: Path) -> Path:
    """The purchases of ``DATED``; nobody buys Y and Z."""
    lines = [f"2020-09-{day:02d},{u},{ARTICLE[a]},0.01,2\n" for u, a, day in DATED]
    header = "t_dat,customer_id,article_id,price,sales_channel_id\n"
    (official / "transactions_train.csv").write_text(header + "".join(lines))
    return official


def by_time(root: Path, **options: Any) -> HmData:
    given = {"split": "time", "test_days": 2, "n_test_users": None, "n_val_users": 9}
    return data(root, **{**given, "min_relevant": 1, "n_items": None, "n_val": 99, **options})


def named(splits: TwoTowerSplits, users: torch.Tensor, items: torch.Tensor) -> list[str]:
    assert splits.user_ids is not None
    found = zip(users.tolist(), items.tolist(), strict=True)
    return sorted(f"{splits.user_ids[u]} {letters(splits)[i]}" for u, i in found)


def test_the_last_days_are_held_out_and_every_article_is_in_the_catalogue(dated: Path) -> None:
    splits = by_time(dated, negatives=0).splits
    assert letters(splits) == "YabcdeZ"
    assert splits.user_ids is not None
    assert splits.user_ids.to_list() == [*sorted(f"u{i}" for i in range(1, 10)), "v1", "v2"]
    assert splits.users.n_rows == 11
    assert named(splits, splits.train.user, splits.train.item) == sorted(
        ["u1 a", "u1 a", "u2 b", "u3 a", "u4 e", "u9 c"]
    )
    assert named(splits, splits.val.user, splits.val.item) == ["u3 a", "u9 d"]
    assert splits.train.target.tolist() == [1.0] * 6
    rankings = {
        part: named(splits, ranking.user[owner], item)
        for part, ranking in (("val", splits.val_ranking), ("test", splits.test_ranking))
        for owner, item in [ranking.relevant.pairs()]
    }
    # An article that was bought before counts, and one that is bought twice counts once.
    assert rankings == {"val": ["u3 a", "u9 d"], "test": ["u1 b", "u2 c", "u3 a", "u3 d"]}
    assert note(splits, "training from") == (
        "training from 2020-09-01: 6 purchases; validation from 2020-09-07: 2; "
        "test from 2020-09-09 to 2020-09-10: 5"
    )
    assert note(splits, "5 of 7 articles were bought")
    assert note(splits, "customers.csv") == (
        "customers.csv: 10 customers read, 6 of them bought nothing of the catalogue"
    )
    # The last two days of the training are the 5th and the 6th.
    recent = splits.baselines["popularity_last_days"](torch.tensor([0]))
    assert recent.tolist() == [[0, 0, 0, 1, 0, 1, 0]]
    assert splits.item_counts is not None
    assert splits.item_counts.tolist() == [0, 3, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("negatives", [1, 3])
def test_negatives_by_time_are_articles_not_bought_in_training(dated: Path, negatives: int) -> None:
    splits = by_time(dated, negatives=negatives).splits
    target = splits.train.target.view(-1, 1 + negatives)
    assert (target[:, 0] == 1).all() and not target[:, 1:].any() and len(target) == 6
    user = splits.train.user.view(-1, 1 + negatives)
    assert (user == user[:, :1]).all()
    trained = {("u1", "a"), ("u2", "b"), ("u3", "a"), ("u4", "e"), ("u9", "c")}
    no = splits.train.target == 0
    for pair in named(splits, splits.train.user[no], splits.train.item[no]):
        assert tuple(pair.split()) not in trained
    plural = "as many random articles not bought" if negatives == 1 else "3 random articles not"
    assert plural in note(splits, "train pairs")


def test_features_of_customers_are_scaled_by_those_who_train(dated: Path) -> None:
    splits = by_time(dated).splits
    ages = [20.0, 40.0, 30.0]  # of u1, u2 and u4; u3's and u9's are unknown
    (field,) = splits.user_schema.numeric
    assert field.mean == pytest.approx(np.mean(ages))


def test_a_table_of_customers_is_read_as_the_training_read_it(official: Path) -> None:
    prepared = data(official)
    table = pl.read_csv(official / "customers.csv", infer_schema=False)
    given = prepared.clean_users(table, "customers.csv")
    found = prepared.splits.user_schema.encode(given)
    rows = [table["customer_id"].to_list().index(user) for user in ("u1", "u5", "u7")]
    users = prepared.splits.user_ids
    assert users is not None
    own = [users.to_list().index(user) for user in ("u1", "u5", "u7")]
    assert torch.equal(found.categorical[rows], prepared.splits.users.categorical[own])
    flags = [field.name for field in prepared.splits.user_schema.categorical].index("FN")
    assert found.categorical[rows[0], flags] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "weeks"}, "dataset.split=weeks: expected users or time"),
        ({"test_days": 0}, "dataset.test_days=0: give at least 1"),
        ({"negatives": -1}, "dataset.negatives=-1: give at least 0"),
        ({"test_days": 5}, "purchases of 10 days, and nothing is left to train on"),
        ({"min_relevant": 3}, "no test user is left: no customer bought more than 2 different"),
    ],
)
def test_wrong_option_by_time(dated: Path, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _ = by_time(dated, **options).splits


def test_a_date_that_is_none_is_named(dated: Path) -> None:
    rewrite(dated / "transactions_train.csv", lambda text: text.replace("2020-09-03", "3.9.2020"))
    with pytest.raises(UserError, match=r"row 6, column 't_dat': '3.9.2020' is not a date"):
        _ = by_time(dated).splits
    assert data(dated, min_relevant=1).splits.train.user.numel()
