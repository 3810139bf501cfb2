"""Streams answer as a pass over the whole history does, from a state that each event advances."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recsys_ssm import (
    EventHistories,
    FilterMamba2,
    Hydra,
    Identity,
    Mamba,
    Mamba2,
    Mamba3,
    MaTrRec,
    NextItem,
    StreamingRecommender,
    Transformer,
    UserError,
)
from recsys_ssm.data.sequences import Histories
from recsys_ssm.features import FeatureSchema

N_ITEMS = 40
STEPPED = {
    "mamba": lambda: Mamba(d_model=16, n_layers=2, d_state=8, d_conv=4, residual=True),
    "mamba2": lambda: Mamba2(d_model=16, n_layers=2, d_state=8, headdim=8, norm="pre", ffn=2),
    "mamba3": lambda: Mamba3(d_model=16, n_layers=1, d_state=8, headdim=8, mimo_rank=2),
    "filter_mamba2": lambda: FilterMamba2(
        d_model=16, n_layers=1, d_state=8, headdim=8, filter_length=6
    ),
    "identity": lambda: Identity(d_model=16),
}
WINDOWED = {
    "transformer": lambda: Transformer(d_model=16, n_layers=1, dim_feedforward=32, causal=True),
    "matrrec": lambda: MaTrRec(d_model=16, d_state=8),
}


def model_of(backbone: Any, max_length: int = 64, **options: Any) -> NextItem:
    torch.manual_seed(0)
    options.setdefault("tokenizer", {"dropout": 0.0, "init_std": 0.3})
    counts = torch.arange(N_ITEMS) % 7
    model = NextItem(
        item_ids=[f"i{number:02}" for number in range(N_ITEMS)], max_length=max_length,
        backbone=backbone, item_counts=counts, **options,
    )  # fmt: skip
    return model.eval()


def random_histories(n: int, longest: int, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [
        [f"i{rng.randrange(N_ITEMS):02}" for _ in range(rng.randrange(longest + 1))]
        for _ in range(n)
    ]


def feed(stream: StreamingRecommender, histories: list[list[str]], seed: int = 0) -> list[str]:
    """Add the events of all users in turns, and ask in between, so that states stop at many places."""
    rng = random.Random(seed)
    users = [f"u{row}" for row in range(len(histories))]
    done = [0] * len(users)
    while any(n < len(history) for n, history in zip(done, histories, strict=True)):
        events = []
        for row, history in enumerate(histories):
            n = rng.choice((0, 1, 2, 9, 20))
            events += [(users[row], item) for item in history[done[row] : done[row] + n]]
            done[row] += n
        stream.add(events)
        stream.recommend(rng.sample(users, min(len(users), 7)), k=3)
    return users


def assert_equal(found: pl.DataFrame, expected: pl.DataFrame, users: list[str]) -> None:
    """Check for equal lists, with scores within 1e-5 of 1, or of the largest score if that is more."""
    names = pl.Series("user", users).gather(expected["user"])
    assert found["user"].to_list() == names.to_list()
    assert found["rank"].to_list() == expected["rank"].to_list()
    ours, theirs = (table["score"].to_numpy().astype(float) for table in (found, expected))
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    warm = ~np.isnan(ours)
    limit = 1e-5 * max(1, np.abs(theirs[warm]).max(initial=0))
    assert np.abs(ours - theirs)[warm].max(initial=0) <= limit
    # Where items differ, their scores are equal within the limit, since the lists' scores are.
    assert (found["item"] != expected["item"]).mean() < 0.01


@pytest.mark.parametrize("start_token", [False, True])
@pytest.mark.parametrize("name", STEPPED)
def test_equal_to_recommend(name: str, start_token: bool) -> None:
    model = model_of(STEPPED[name](), start_token=start_token)
    stream = StreamingRecommender(model, in_memory=20)
    assert stream.why_window is None and stream.state_size > 0
    histories = random_histories(50, 63)
    histories[0] = []
    users = feed(stream, histories)
    for filter_seen in (True, False, None):
        found = stream.recommend(users, k=5, filter_seen=filter_seen)
        assert_equal(found, model.recommend(histories, k=5, filter_seen=filter_seen), users)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_state_that_grows_is_not_kept(name: str) -> None:
    model = model_of(WINDOWED[name](), max_length=10)
    stream = StreamingRecommender(model)
    assert stream.why_window is not None and "grows with the history" in stream.why_window
    assert stream.state_size == stream.n_states == 0
    histories = random_histories(20, 30)
    users = feed(stream, histories)
    assert_equal(stream.recommend(users), model.recommend(histories), users)


def test_a_model_that_sees_the_whole_history_reads_windows() -> None:
    hydra = Hydra(d_model=16, n_layers=1, d_state=8, headdim=16)
    for objective in ("last", "masked"):
        model = model_of(hydra, max_length=10, objective=objective)
        stream = StreamingRecommender(model)
        assert "sees the whole history" in str(stream.why_window)
        histories = random_histories(20, 30)
        users = feed(stream, histories)
        assert_equal(stream.recommend(users), model.recommend(histories), users)


@pytest.mark.parametrize("position_from", ["start", "end"])
@pytest.mark.parametrize("start_token", [False, True])
def test_with_positions_the_window_counts(position_from: str, start_token: bool) -> None:
    positions = {"positions": "max_length", "position_from": position_from, "dropout": 0.0}
    model = model_of(
        STEPPED["mamba"](), max_length=12, tokenizer=positions, start_token=start_token
    )
    stream = StreamingRecommender(model)
    assert (stream.why_window is None) == (position_from == "start")
    histories = [*random_histories(40, 40), *([f"i{t:02}" for t in range(n)] for n in (11, 12, 13))]
    users = feed(stream, histories)
    assert_equal(stream.recommend(users), model.recommend(histories), users)


def test_beyond_the_length_the_state_goes_on_or_the_window_counts() -> None:
    short, long = (model_of(STEPPED["mamba"](), max_length=n) for n in (8, 64))
    long.load_state_dict(short.state_dict())
    histories = random_histories(40, 63)
    for model, beyond in ((long, "state"), (short, "window")):
        stream = StreamingRecommender(short, beyond=beyond)
        users = feed(stream, histories)
        assert_equal(stream.recommend(users), model.recommend(histories), users)


@pytest.mark.parametrize(("in_memory", "on_disk"), [(1, 0), (3, 0), (3, 4), (3, 100), (100, 0)])
def test_bounds_change_no_answer(tmp_path, in_memory: int, on_disk: int) -> None:
    model = model_of(STEPPED["mamba2"]())
    stream = StreamingRecommender(
        model, in_memory=in_memory, on_disk=on_disk, folder=tmp_path / "states"
    )
    histories = random_histories(12, 30)
    users = feed(stream, histories)
    assert_equal(stream.recommend(users), model.recommend(histories), users)
    assert stream.n_states <= in_memory + on_disk
    if on_disk == 100:
        assert stream.n_states == sum(map(bool, histories))


def test_states_on_disk_are_read_and_not_computed_again(tmp_path, monkeypatch) -> None:
    model = model_of(STEPPED["mamba"]())
    stream = StreamingRecommender(model, in_memory=2, on_disk=50, folder=tmp_path)
    histories = [history for history in random_histories(20, 30) if history]
    users = feed(stream, histories)
    stream.recommend(users)
    expected = model.recommend(histories)
    steps = []
    step = type(model.backbone).step
    monkeypatch.setattr(type(model.backbone), "step", lambda *args: steps.append(1) or step(*args))
    assert_equal(stream.recommend(users), expected, users)
    assert not steps
    stream.add([(users[3], "i05")])
    stream.recommend(users)
    assert len(steps) == 1
    assert not list(tmp_path.iterdir())  # the file has no name, so that no kill leaves it


def test_unknown_items_and_users() -> None:
    model = model_of(STEPPED["mamba"](), max_length=5)
    stream = StreamingRecommender(model)
    stream.add([("a", "new"), ("b", "i01"), ("b", "new"), ("b", "i02"), ("b", "other")])
    found = stream.recommend(["a", "b", "nobody", "b"], k=4)
    expected = model.recommend([["new"], ["i01", "new", "i02"], [], ["i01", "i02"]], k=4)
    assert_equal(found, expected, ["a", "b", "nobody", "b"])
    assert stream.histories.names("b") == ["i01", "new", "i02", "other"]
    assert stream.recommend([], k=4).height == 0


def test_windows_skip_unknown_items() -> None:
    model = model_of(WINDOWED["transformer"](), max_length=4)
    stream = StreamingRecommender(model)
    history = ["i01", "i02", "i03", "i04", "i05", *["new"] * 30, "i06"]
    stream.add([("a", item) for item in history])
    assert_equal(stream.recommend(["a"]), model.recommend([history]), ["a"])


def test_it_begins_with_the_histories_of_a_dataset() -> None:
    model = model_of(STEPPED["mamba"]())
    items = ["gone", *model.item_ids[::-1]]
    events = np.array([0, 1, 2, 3, 4, 0, 5], np.int32)
    first = Histories(events, np.array([0, 3, 3, 7]))
    stream = StreamingRecommender(model, EventHistories(items, pl.Series([10, 11, 12]), first))
    stream.add([("12", "i20"), ("12", "i21"), ("11", "gone")])
    histories = [
        [items[i] for i in events[:3]],
        ["gone"],
        [*(items[i] for i in events[3:]), "i20", "i21"],
    ]
    users = ["10", "11", "12"]
    assert [stream.histories.names(user) for user in users] == histories
    assert stream.histories.names("12", 3) == ["i35", "i20", "i21"]
    assert len(stream.histories) == 3 and "11" in stream.histories and "9" not in stream.histories
    assert_equal(stream.recommend(users), model.recommend(histories), users)


def test_scores() -> None:
    model = model_of(STEPPED["mamba"]())
    stream = StreamingRecommender(model)
    stream.add([("a", "i01"), ("b", "i05"), ("a", "i02")])
    pairs = [("a", "i07"), ("b", "i07"), ("nobody", "i07"), ("a", "new"), ("a", "i01")]
    asked = pl.DataFrame({"user": [0, 1, 2, 0, 0], "item": [item for _, item in pairs]})
    expected = model.score([["i01", "i02"], ["i05"], []], asked)["score"].to_list()
    found = stream.score(pairs)
    assert [each is None for each in found] == [each is None for each in expected]
    assert found[2] is None and found[3] is None
    assert np.allclose(
        [each for each in found if each is not None],
        [each for each in expected if each is not None],
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_item_features_and_double_precision() -> None:
    frame = pl.DataFrame({"price": np.linspace(0, 3, N_ITEMS), "kind": ["a", "b"] * (N_ITEMS // 2)})
    schema = FeatureSchema.fit(frame, numeric=["price"], categorical=["kind"])
    model = model_of(
        STEPPED["mamba"](), item_schema=schema.to_dict(), items=schema.encode(frame)
    ).double()
    stream = StreamingRecommender(model)
    histories = random_histories(10, 20)
    users = feed(stream, histories)
    found, expected = stream.recommend(users), model.recommend(histories)
    assert_equal(found, expected, users)
    difference = found["score"].fill_null(0) - expected["score"].fill_null(0)
    assert difference.abs().max() < 1e-6


def test_several_threads() -> None:
    model = model_of(STEPPED["mamba"]())
    stream = StreamingRecommender(model, in_memory=5)
    histories = random_histories(12, 20)

    def live(row: int) -> None:
        for item in histories[row]:
            stream.add([(f"u{row}", item)])
            stream.recommend([f"u{row}"], k=2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(12)))
    users = [f"u{row}" for row in range(12)]
    assert_equal(stream.recommend(users), model.recommend(histories), users)


def test_mistakes() -> None:
    model = model_of(STEPPED["mamba"]())
    for options, words in (
        ({"in_memory": 0}, "in_memory=0: give a whole number, at least 1"),
        ({"on_disk": -1}, "on_disk=-1"),
        ({"beyond": "all"}, "beyond=all: expected state or window"),
    ):
        with pytest.raises(UserError, match=words):
            StreamingRecommender(model, **options)
    with pytest.raises(UserError, match="k=0: give a whole number, at least 1"):
        StreamingRecommender(model).recommend(["a"], k=0)
    with pytest.raises(UserError, match="Linear cannot be streamed"):
        StreamingRecommender(torch.nn.Linear(1, 1))


def test_no_room_on_disk_is_one_line(tmp_path) -> None:
    model = model_of(STEPPED["mamba"]())
    with pytest.raises(UserError, match=r"no room for the states of .* users, .* GiB"):
        StreamingRecommender(model, on_disk=10**13, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba3"])
def test_a_thousand_long_histories(name: str) -> None:
    """1,000 random histories of up to 2,000 events: the same scores as one pass over each."""
    model = model_of(STEPPED[name](), max_length=2000)
    stream = StreamingRecommender(model, in_memory=1000)
    histories = random_histories(1000, 2000)
    users = [f"u{row}" for row in range(1000)]
    rng = random.Random(1)
    for share in (0.3, 1.0):  # each state stops once on the way
        stream.add(
            (user, item)
            for user, history in zip(users, histories, strict=True)
            for item in history[stream.histories.length(user) : int(share * len(history))]
        )
        stream.recommend(rng.sample(users, 500), k=10)
    assert_equal(
        stream.recommend(users, filter_seen=False),
        model.recommend(histories, filter_seen=False),
        users,
    )
