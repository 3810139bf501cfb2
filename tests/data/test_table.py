"""A table of one's own: what is read, what is held out, what training may see, what is refused."""

import importlib.util

import numpy as np
import polars as pl
import pytest
import torch

from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError

# 40 users with 3 to 8 of 15 items each; ids with leading zeros; two features a side.
_rng = np.random.default_rng(0)
USERS = pl.DataFrame(
    {
        "user_id": [f"{u:03d}" for u in range(40)],
        "age": _rng.integers(18, 80, 40),
        "town": _rng.choice(["Lima", "Oslo", "Rome"], 40),
    }
)
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{i:02d}" for i in range(15)],
        "price": _rng.uniform(1, 9, 15).round(2),
        "kind": _rng.choice(["book", "game"], 15),
    }
)
_pairs = [
    (user, item)
    for user in USERS["user_id"]
    for item in _rng.choice(ITEMS["item_id"].to_numpy()[:13], _rng.integers(3, 9), replace=False)
]
ROWS = pl.DataFrame(_pairs, schema=["user_id", "item_id"], orient="row").with_columns(
    rating=pl.Series(_rng.integers(1, 6, len(_pairs))),
    at=pl.Series(_rng.permutation(len(_pairs))),
)
FEATURES = {
    "user_numeric": ["age"],
    "user_categorical": ["town"],
    "item_numeric": ["price"],
    "item_categorical": ["kind"],
}


def make(**options):
    return TableData(**{"interactions": ROWS, **options})


def with_features(**options):
    return make(users=USERS, items=ITEMS, **FEATURES, **options)


def named(splits, pairs):
    """(user row, item id) of each pair."""
    return list(zip(pairs.user.tolist(), [splits.item_ids[i] for i in pairs.item], strict=True))


def user_ids(frame):
    return sorted(frame["user_id"].unique())


def rows_of(frame=ROWS):
    """{(user row, item id)} of the interactions."""
    ids = user_ids(frame)
    return {
        (ids.index(user), item) for user, item in frame.select("user_id", "item_id").iter_rows()
    }


def lists(splits, ragged, users):
    """{user row: [item ids]}."""
    values, offsets = ragged.values.tolist(), ragged.offsets.tolist()
    return {
        user: [splits.item_ids[i] for i in values[a:b]]
        for user, a, b in zip(users.tolist(), offsets, offsets[1:], strict=False)
    }


def write(folder, **frames):
    for name, frame in frames.items():
        frame.write_csv(folder / f"{name}.csv")


# What is read


def test_files_and_frames_give_the_same_sets(tmp_path):
    write(tmp_path, rows=ROWS, users=USERS, items=ITEMS)
    ROWS.write_parquet(tmp_path / "rows.parquet")
    of_frames = with_features().splits
    for rows in ("rows.csv", "rows.parquet"):
        of_files = make(
            interactions=tmp_path / rows,
            users=str(tmp_path / "users.csv"),
            items=tmp_path / "items.csv",
            **FEATURES,
        ).splits
        for side in ("users", "items"):
            for mine, theirs in zip(getattr(of_files, side), getattr(of_frames, side), strict=True):
                assert torch.equal(mine, theirs)
        assert all(map(torch.equal, of_files.train, of_frames.train))
        assert of_files.user_schema == of_frames.user_schema
        assert of_files.item_ids == of_frames.item_ids


def test_other_data_frames_are_taken():
    plain = {name: ROWS[name].to_list() for name in ROWS.columns}
    sources = [plain, ROWS.lazy()]
    if importlib.util.find_spec("pandas"):  # no dependency of ours, not even to test with
        sources.append(importlib.import_module("pandas").DataFrame(plain))
    for source in sources:
        assert all(map(torch.equal, make(interactions=source).splits.train, make().splits.train))
    with pytest.raises(
        UserError, match="interactions: expected a Polars or pandas data frame, got object"
    ):
        _ = make(interactions=object()).splits


def test_ids_are_text_and_the_catalogue_is_sorted_by_them():
    frame = pl.DataFrame({"user_id": [1, 2, 3, 10] * 2, "item_id": ["2", "10", "010", "2"] * 2})
    frame = frame.with_columns(
        item_id=pl.when(pl.arange(8) > 3).then(pl.lit("x")).otherwise("item_id")
    )
    splits = make(interactions=frame, held_out=0.5).splits
    assert splits.item_ids == ["010", "10", "2", "x"]
    assert set(splits.user_schema.categorical[0].values) <= {"1", "2", "3", "10"}


def test_features_belong_to_their_rows():
    splits = with_features().splits
    age = splits.user_schema.numeric[0]
    ages = splits.users.numeric[:, 0] * age.std + age.mean
    torch.testing.assert_close(ages, USERS["age"].to_torch().float())
    kinds = splits.item_schema.categorical[1]
    assert kinds.name == "kind"
    assert [kinds.values[code - 1] for code in splits.items.categorical[:, 1]] == ITEMS[
        "kind"
    ].to_list()


def test_the_order_of_the_features_files_does_not_matter():
    shuffled = USERS.sample(fraction=1, shuffle=True, seed=1), ITEMS.reverse()
    one, two = with_features().splits, make(users=shuffled[0], items=shuffled[1], **FEATURES).splits
    assert torch.equal(one.users.categorical, two.users.categorical)
    assert torch.equal(one.items.numeric, two.items.numeric)
    assert one.item_ids == two.item_ids


def test_repeated_pairs_count_once_with_their_last_row():
    frame = pl.concat([ROWS, ROWS.with_columns(rating=pl.lit(9, pl.Int64), at=pl.col("at") + 1000)])
    splits = make(interactions=frame, target="rating", relevant_above=8).splits
    assert set(splits.train.target.tolist()) == {9.0}
    assert f"{ROWS.height:,} rows repeat a (user, item) pair" in splits.notes[0]
    by_time = make(
        interactions=frame.reverse(), target="rating", relevant_above=8, timestamp="at"
    ).splits
    assert set(by_time.train.target.tolist()) == {9.0}
    in_file_order = make(interactions=frame.reverse(), target="rating").splits
    assert 9.0 not in in_file_order.train.target.tolist()


# What is held out


def test_whole_users_are_held_out_of_training():
    splits = with_features(n_test_users=7, n_val_users=5).splits
    test, val = splits.test_ranking.user, splits.val_ranking.user
    assert (test.numel(), val.numel()) == (7, 5)
    groups = [set(x.tolist()) for x in (test, val, splits.train.user)]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert len(groups[2]) == 40 - 12
    assert set(splits.val.user.tolist()) == groups[1]
    assert splits.test_ranking.seen is None
    assert splits.val_ranking.seen is None
    for ranking in (splits.test_ranking, splits.val_ranking):
        relevant = lists(splits, ranking.relevant, ranking.user)
        for user, items in relevant.items():
            assert sorted(items) == sorted(item for u, item in rows_of() if u == user)
    assert any(
        "whole users" in note and "split=auto: users have features" in note for note in splits.notes
    )


def test_a_share_of_some_users_rows_is_held_out_and_what_was_trained_on_is_not_ranked():
    splits = make(n_test_users=10, n_val_users=6, held_out=0.4).splits
    positives = {
        pair for pair, t in zip(named(splits, splits.train), splits.train.target, strict=True) if t
    }
    everything = rows_of()
    held = set()
    for ranking, n in ((splits.test_ranking, 10), (splits.val_ranking, 6)):
        relevant = lists(splits, ranking.relevant, ranking.user)
        seen = lists(splits, ranking.seen, ranking.user)
        assert len(relevant) == n
        for user in relevant:
            own = {item for u, item in everything if u == user}
            assert set(relevant[user]) | set(seen[user]) == own
            assert not set(relevant[user]) & set(seen[user])
            assert len(relevant[user]) == max(1, round(0.4 * len(own)))
            assert {(user, item) for item in seen[user]} <= positives
            held |= {(user, item) for item in relevant[user]}
    assert positives == everything - held
    assert not set(named(splits, splits.train)) & {p for p in held if p in positives}
    val_users = set(splits.val_ranking.user.tolist())
    val_positives = {
        p for p, t in zip(named(splits, splits.val), splits.val.target, strict=True) if t
    }
    assert val_positives == {pair for pair in held if pair[0] in val_users}
    assert any("split=auto: users have no features" in note for note in splits.notes)


@pytest.mark.parametrize("times", ["numbers", "text", "dates", "datetimes"])
def test_with_times_the_last_rows_are_held_out(times):
    day = pl.date(2020, 1, 1) + pl.duration(days=pl.col("at"))
    at = {
        "numbers": pl.col("at") * 1.5,
        "text": pl.col("at").cast(pl.String),
        "dates": day.cast(pl.String),
        "datetimes": day.cast(pl.Datetime),
    }[times]
    frame = ROWS.with_columns(at=at)
    splits = make(interactions=frame, timestamp="at", held_out=0.34, n_test_users=20).splits
    order = {
        (user, item): at
        for (user, item), at in zip(
            ROWS.select("user_id", "item_id").iter_rows(), ROWS["at"], strict=True
        )
    }
    ids = user_ids(ROWS)
    seen = lists(splits, splits.test_ranking.seen, splits.test_ranking.user)
    for user, items in lists(
        splits, splits.test_ranking.relevant, splits.test_ranking.user
    ).items():
        first_held = min(order[ids[user], item] for item in items)
        assert first_held > max(order[ids[user], item] for item in seen[user])


def test_of_equal_times_the_last_in_the_file_are_held_out():
    frame = ROWS.with_columns(at=pl.lit(7))
    splits = make(interactions=frame, timestamp="at", n_test_users=10).splits
    ids = user_ids(ROWS)
    for user, items in lists(
        splits, splits.test_ranking.relevant, splits.test_ranking.user
    ).items():
        own = ROWS.filter(pl.col("user_id") == ids[user])["item_id"].to_list()
        assert sorted(items) == sorted(own[-len(items) :])


def test_without_numbers_a_tenth_of_those_who_qualify_is_tested():
    splits = make().splits
    assert (splits.test_ranking.user.numel(), splits.val_ranking.user.numel()) == (4, 4)
    enough = ROWS.group_by("user_id").len().filter(pl.col("len") >= 5)["user_id"]
    splits = with_features(min_relevant=5).splits
    assert splits.test_ranking.user.numel() == max(1, enough.len() // 10)
    assert (splits.test_ranking.relevant.lengths >= 5).all()
    assert (splits.val_ranking.relevant.lengths >= 5).all()


def test_a_user_keeps_at_least_one_row():
    splits = make(held_out=0.99, n_test_users=20, n_val_users=20).splits
    assert (splits.test_ranking.seen.lengths == 1).all()


def test_the_seed_decides_and_nothing_else():
    one, same, other = make(seed=1).splits, make(seed=1).splits, make(seed=2).splits
    assert all(map(torch.equal, one.train, same.train))
    assert all(map(torch.equal, one.val, same.val))
    assert torch.equal(one.test_ranking.relevant.values, same.test_ranking.relevant.values)
    assert one.test_ranking.user.tolist() != other.test_ranking.user.tolist()


# Targets and negatives


@pytest.mark.parametrize("split", ["users", "interactions"])
@pytest.mark.parametrize("negatives", [1, 3])
def test_negatives_are_items_the_user_has_nothing_to_do_with_in_training(split, negatives):
    splits = with_features(negatives=negatives, split=split, n_test_users=9).splits
    pairs, target = named(splits, splits.train), splits.train.target
    positive = [pair for pair, t in zip(pairs, target, strict=True) if t == 1]
    negative = [pair for pair, t in zip(pairs, target, strict=True) if t == 0]
    assert len(negative) == negatives * len(positive)
    assert not set(negative) & set(positive)
    per_user = [
        np.bincount([user for user, _ in group], minlength=40) for group in (positive, negative)
    ]
    assert (per_user[1] == negatives * per_user[0]).all()
    # The whole items file is drawn from, held-out items too: that they are held out is not known.
    assert {item for _, item in negative} == set(splits.item_ids)
    if split == "interactions":
        held = lists(splits, splits.test_ranking.relevant, splits.test_ranking.user)
        held = {(user, item) for user, items in held.items() for item in items}
        assert held & set(negative)


def test_validation_negatives_are_no_interactions_at_all():
    for data in (with_features(n_val_users=15), make(n_val_users=15)):
        pairs = named(data.splits, data.splits.val)
        negative = {p for p, t in zip(pairs, data.splits.val.target, strict=True) if t == 0}
        assert negative
        assert not negative & rows_of()


def test_validation_pairs_can_be_limited():
    full = with_features(n_val_users=10).splits.val
    some = with_features(n_val_users=10, n_val_pairs=20).splits.val
    assert full.user.numel() > 20 == some.user.numel() == some.target.numel()
    triplets = {tuple(map(float, t)) for t in zip(*full, strict=True)}
    assert {tuple(map(float, t)) for t in zip(*some, strict=True)} <= triplets
    assert set(some.target.tolist()) == {0.0, 1.0}


def test_a_numeric_target_is_used_as_it_is_and_a_threshold_says_what_is_relevant():
    splits = make(target="rating", relevant_above=3, n_test_users=20, held_out=0.5).splits
    ids = user_ids(ROWS)
    rating = {(ids.index(u), i): r for u, i, r, _ in ROWS.iter_rows()}
    assert splits.train.target.tolist() == [rating[pair] for pair in named(splits, splits.train)]
    relevant = lists(splits, splits.test_ranking.relevant, splits.test_ranking.user)
    assert all(rating[user, item] > 3 for user, items in relevant.items() for item in items)
    # Held-out rows that are not relevant are in no training pair either.
    trained = set(named(splits, splits.train))
    seen = lists(splits, splits.test_ranking.seen, splits.test_ranking.user)
    for user in relevant:
        own = {item for u, item in rating if u == user}
        gone = {item for item in own if (user, item) not in trained}
        assert len(gone) == max(1, round(0.5 * len(own)))
        assert gone >= set(relevant[user])
        assert set(seen[user]) == own - gone
    # Popularity counts what is relevant, not what is merely there.
    good = [item for user, item in trained if rating[user, item] > 3]
    popularity = splits.baselines["popularity"](torch.tensor([0]))[0]
    assert popularity.tolist() == [good.count(item) for item in splits.item_ids]
    assert any("relevant: rating > 3" in note for note in splits.notes)


def test_negatives_beside_a_target_are_drawn_for_relevant_rows_only():
    splits = make(target="rating", relevant_above=3, negatives=2).splits
    target = splits.train.target
    assert (target == 0).sum() == 2 * (target > 3).sum()
    assert not any("cannot learn from them" in note for note in splits.notes)


def test_one_target_for_all_is_told():
    assert any("every target is 1" in note for note in make(negatives=0).splits.notes)


def test_users_who_have_everything_get_no_negatives():
    everything = pl.DataFrame(
        {"user_id": ["all"] * 13, "item_id": [f"i{i:02d}" for i in range(13)]}
    )
    frame = pl.concat([ROWS.select("user_id", "item_id"), everything])
    seeds = range(10)
    all_sets = [make(interactions=frame, seed=seed).splits for seed in seeds]
    told = [any("1 users have every item" in note for note in splits.notes) for splits in all_sets]
    assert any(told)
    user = user_ids(frame).index("all")
    for splits, is_told in zip(all_sets, told, strict=True):
        if is_told:
            assert (splits.train.target[splits.train.user == user] == 1).all()


# What training may see


def test_scaling_and_vocabularies_come_from_training_users_alone():
    splits = with_features(n_test_users=15, n_val_users=15).splits
    trained = sorted(set(splits.train.user.tolist()))
    ages = USERS["age"].to_numpy()[trained]
    age = splits.user_schema.numeric[0]
    assert age.mean == pytest.approx(ages.mean())
    assert age.std == pytest.approx(ages.std())

    held = int(splits.test_ranking.user[0])
    only_there = USERS.with_columns(
        town=pl.when(pl.arange(40) == held).then(pl.lit("Atlantis")).otherwise("town")
    )
    splits = make(users=only_there, items=ITEMS, **FEATURES, n_test_users=15, n_val_users=15).splits
    assert held in splits.test_ranking.user.tolist()
    assert "Atlantis" not in splits.user_schema.categorical[0].values
    assert splits.users.categorical[held, 0] == 0


def test_items_only_held_out_rows_name_are_ranked_but_unknown_to_training():
    extra = pl.DataFrame(
        {"user_id": user_ids(ROWS), "item_id": [f"new{u}" for u in range(40)], "at": 999}
    )
    frame = pl.concat([ROWS.select(extra.columns), extra.cast(ROWS.select(extra.columns).schema)])
    splits = make(
        interactions=frame, timestamp="at", n_test_users=10, n_val_users=1, held_out=0.05
    ).splits
    new = [f"new{user}" for user in splits.test_ranking.user.tolist()]
    assert set(new) <= set(splits.item_ids)
    assert not set(new) & set(splits.item_schema.categorical[0].values)
    rows = [splits.item_ids.index(item) for item in new]
    assert (splits.items.categorical[rows, 0] == 0).all()
    assert not set(rows) & set(splits.train.item.tolist())
    relevant = lists(splits, splits.test_ranking.relevant, splits.test_ranking.user)
    assert [relevant[u] for u in splits.test_ranking.user.tolist()] == [[item] for item in new]


def test_which_ids_are_features():
    assert make().splits.user_schema.names == ["user_id"]
    assert make().splits.item_schema.names == ["item_id"]
    splits = with_features().splits
    assert splits.user_schema.names == ["age", "town"]
    assert splits.item_schema.names == ["price", "item_id", "kind"]
    splits = with_features(user_id_feature=True, item_id_feature=False, split="interactions").splits
    assert splits.user_schema.names == ["age", "user_id", "town"]
    assert splits.item_schema.names == ["price", "kind"]


# Users and items that are absent from their file


def test_unknown_users_and_items_are_kept_with_missing_features_and_counted():
    splits = make(
        users=USERS[3:], items=ITEMS[1:], **FEATURES, n_test_users=2, n_val_users=2
    ).splits
    assert splits.users.n_rows == 40
    assert splits.users.numeric[:3, 0].tolist() == [0, 0, 0]
    assert splits.users.categorical[:3, 0].tolist() == [0, 0, 0]
    assert splits.item_ids == ITEMS["item_id"].to_list()
    assert splits.items.categorical[0, 1] == 0
    rows = ROWS.filter(pl.col("user_id").is_in(["000", "001", "002"])).height
    assert any(
        f"3 users of the interactions ({rows} rows) are not in it" in n for n in splits.notes
    )
    assert any("items: 1 items of the interactions" in note for note in splits.notes)


def test_idle_users_are_left_out_and_idle_items_are_ranked():
    splits = make(
        interactions=ROWS.filter(pl.col("user_id") > "004"), users=USERS, items=ITEMS, **FEATURES
    )
    splits = splits.splits
    assert splits.users.n_rows == 35
    assert "users: 5 users without an interaction: left out" in splits.notes
    assert "items: 2 items without an interaction: ranked like the others" in splits.notes
    assert "i14" in splits.item_ids


def test_unknown_ids_can_be_an_error_and_are_if_nothing_fits():
    with pytest.raises(UserError, match=r"users: no user '000', .*\(and 2 more\).*on_unknown=keep"):
        _ = make(users=USERS[3:], items=ITEMS, **FEATURES, on_unknown="error").splits
    with pytest.raises(UserError, match="items: no item 'i00'"):
        _ = make(users=USERS, items=ITEMS[1:], **FEATURES, on_unknown="error").splits
    numbers = USERS.with_columns(pl.col("user_id").cast(pl.Int64))
    with pytest.raises(UserError, match=r"users: none of the 40 users .* '000'; its first is '0'"):
        _ = make(users=numbers, items=ITEMS, **FEATURES).splits


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interactions": None}, "dataset.interactions: not set"),
        ({"negatives": -1}, "dataset.negatives=-1: give at least 0"),
        ({"n_test_users": 0}, "dataset.n_test_users=0: give at least 1"),
        ({"min_relevant": 0}, "dataset.min_relevant=0"),
        ({"split": "time"}, "dataset.split=time: expected one of auto, users, interactions"),
        ({"on_unknown": "drop"}, "dataset.on_unknown=drop"),
        ({"held_out": 1.0}, "dataset.held_out=1.0: give a share"),
        ({"split": "users"}, "held-out users need features"),
        ({"user_numeric": ["age"]}, r"dataset.users: not set, .*\(age\)"),
        ({"item_id_feature": False}, "an item has no feature"),
        ({"user_id_feature": False}, "a user has no feature"),
        (
            {"users": USERS, "user_numeric": ["age"], "user_categorical": ["age"]},
            "dataset.user_numeric and dataset.user_categorical: column 'age' is named twice",
        ),
        (
            {"items": ITEMS, "item_categorical": ["item_id"]},
            "'item_id' is the id column; leave it out, and set",
        ),
    ],
)
def test_options_that_are_not_possible(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def _with(frame, row, column, value):
    cells = frame[column].cast(pl.String).to_list()
    cells[row] = value
    return frame.with_columns(pl.Series(column, cells))


@pytest.mark.parametrize(
    ("option", "frame", "message"),
    [
        ("interactions", _with(ROWS, 4, "user_id", None), "row 5, column 'user_id': empty"),
        ("interactions", _with(ROWS, 0, "item_id", None), "row 1, column 'item_id': empty"),
        (
            "interactions",
            _with(ROWS, 6, "rating", None),
            "row 7, column 'rating': empty; every row needs a number .dataset.target",
        ),
        (
            "interactions",
            _with(ROWS, 6, "rating", "good"),
            "row 7, column 'rating': 'good' is not a",
        ),
        ("interactions", _with(ROWS, 6, "rating", "nan"), "row 7, column 'rating': 'nan' is not a"),
        (
            "interactions",
            _with(ROWS, 2, "at", "soon"),
            "row 3, column 'at': 'soon' is not a time",
        ),
        ("interactions", _with(ROWS, 2, "at", None), "row 3, column 'at': empty; give numbers"),
        ("interactions", ROWS.drop("item_id"), "no column 'item_id'; its columns are user_id"),
        ("interactions", ROWS.clear(), "no row"),
        (
            "users",
            _with(USERS, 8, "user_id", "003"),
            "row 9, column 'user_id': '003' is the id of row 4 already",
        ),
        ("users", _with(USERS, 8, "user_id", None), "row 9, column 'user_id': empty"),
        ("users", _with(USERS, 8, "age", "old"), "row 9, column 'age': 'old' is not a finite"),
        (
            "items",
            _with(ITEMS, 8, "item_id", "i01"),
            "row 9, column 'item_id': 'i01' is the id of row 2 already",
        ),
        (
            "items",
            _with(ITEMS, 1, "price", "free"),
            "row 2, column 'price': 'free' is not a finite",
        ),
        ("items", ITEMS.drop("kind"), "no column 'kind'"),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_cells_that_are_wrong_are_named(tmp_path, option, frame, message, as_file):
    source = frame
    if as_file:
        write(tmp_path, **{option: frame})
        source = tmp_path / f"{option}.csv"
    options = {"interactions": ROWS, "users": USERS, "items": ITEMS, option: source}
    with pytest.raises(UserError, match=message) as error:
        _ = TableData(**options, **FEATURES, target="rating", timestamp="at").splits
    assert str(error.value).startswith(str(source) if as_file else option)


def test_more_test_users_than_there_are():
    with pytest.raises(UserError, match=r"no test user is left: 40 users .* n_test_users=38"):
        _ = make(n_test_users=38).splits
    with pytest.raises(UserError, match="0 users have at least min_relevant=100"):
        _ = with_features(min_relevant=100).splits
    with pytest.raises(UserError, match="no training pair is left"):
        _ = with_features(n_test_users=30, n_val_users=10).splits
