"""Next-item models that use the times and the columns of events: what they see, and what they are not shown."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
import pytest
import torch

from recsys_ssm.batches import EventTimes
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.hstu import HSTU
from recsys_ssm.models.backbones.mamba2 import Mamba2
from recsys_ssm.models.next_item import NextItem

N_ITEMS = 12


def events() -> pl.DataFrame:
    """Users who walk round a circle of items: one place on after a short break, two after a long one.

    The column ``kind`` says which break follows, for half of the events.
    """
    generator = random.Random(0)
    rows = []
    for user in range(120):
        item, second = generator.randrange(N_ITEMS), 10**6
        for _ in range(generator.randrange(5, 10)):
            long = generator.random() < 0.5
            rows.append((f"u{user}", f"i{item:02}", second, "long" if long else "short"))
            second += 5000 if long else 3
            item = (item + (2 if long else 1)) % N_ITEMS
    return pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "kind"], orient="row")


FRAME = events()


def data_of(tmp_path: Path, **options: Any) -> Interactions:
    return Interactions(
        interactions=FRAME,
        cache_dir=tmp_path,
        **{"max_length": 8, "batch_positions": 64, "duplicates": "keep", **options},
    )


def model_of(data: Interactions, backbone: Any = None, **options: Any) -> NextItem:
    torch.manual_seed(0)
    backbone = backbone or Mamba2(
        d_model=16, n_layers=1, d_state=8, headdim=8, residual=True, norm="pre", ffn=2
    )
    options["tokenizer"] = {"norm": False, "dropout": 0.0} | options.get("tokenizer", {})
    return NextItem.for_data(data, backbone=backbone, optimizer={"lr": 1e-2}, **options)


def trained(data: Interactions, folder: Path, epochs: int = 25, **options: Any) -> NextItem:
    model = model_of(data, **options)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        max_epochs=epochs,
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    return model


GAPS = {"tokenizer": {"gap_buckets": 40}}


def test_a_model_that_sees_the_moment_knows_what_follows(tmp_path: Path) -> None:
    """The break before the next event decides the next item: only a model that sees it can know."""
    data = data_of(tmp_path, times=True)
    told = trained(data, tmp_path, query_time=True, **GAPS)
    not_told = trained(data, tmp_path, **GAPS)
    assert told.sees_query_time and not not_told.sees_query_time
    assert told.test_results()["metrics_unfiltered"]["hr@1"] > 0.9
    assert not_told.test_results()["metrics_unfiltered"]["hr@1"] < 0.7
    soon = told.recommend([["i03"]], k=1, times=[[0]], at=3, filter_seen=False)
    late = told.recommend([["i03"]], k=1, times=[[0]], at=[5000], filter_seen=False)
    assert (soon["item"].item(), late["item"].item()) == ("i04", "i05")


def test_columns_of_events_take_part(tmp_path: Path) -> None:
    data = data_of(tmp_path, event_columns="kind")
    model = trained(data, tmp_path)
    assert model.test_results()["metrics_unfiltered"]["hr@1"] > 0.9
    found = [
        model.recommend([["i03"]], k=1, columns={"kind": [[kind]]}, filter_seen=False)[
            "item"
        ].item()
        for kind in ("short", "long")
    ]
    assert found == ["i04", "i05"]
    model.recommend([["i03", "i04"]], k=1, columns={"kind": [["never seen", None]]})


BACKBONES = {
    "gaps": (lambda: None, GAPS),
    "mamba2": (
        lambda: Mamba2(d_model=16, n_layers=1, d_state=8, headdim=8, scale_by_time=True),
        {},
    ),
    "hstu": (lambda: HSTU(d_model=16, n_layers=1, max_length=8, time_bias=True), {}),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("query_time", [False, True])
def test_only_a_model_that_may_see_the_next_time_depends_on_it(
    tmp_path: Path, name: str, query_time: bool
) -> None:
    if name == "mamba2" and query_time:
        pytest.skip("Mamba-2 scales its steps by the time before an event alone")
    make, options = BACKBONES[name]
    backbone = make()
    data = data_of(tmp_path, times=True)
    model = model_of(data, backbone, query_time=query_time, **options).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    batch = next(iter(data.test_dataloader()))

    def outputs(times: EventTimes) -> torch.Tensor:
        with torch.no_grad():
            return model(*batch[:3], None, times)

    before = outputs(batch.times)
    hidden = outputs(batch.times._replace(next=batch.times.next + 10**6))
    assert torch.equal(before, hidden) != query_time
    earlier = outputs(batch.times._replace(event=batch.times.event - batch.position * 10**4))
    assert (earlier - before).abs().max() > 1e-6
    # Only differences within a history count.
    shift = (batch.seq_idx + 1) * 1000
    moved = outputs(EventTimes(batch.times.event + shift, batch.times.next + shift))
    torch.testing.assert_close(moved, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("start_token", [False, True])
def test_test_and_recommend_agree(tmp_path: Path, name: str, start_token: bool) -> None:
    make, options = BACKBONES[name]
    backbone = make()
    query_time = name != "mamba2"
    data = data_of(tmp_path, times=True, event_columns=["kind"], start_token=start_token)
    model = model_of(data, backbone, query_time=query_time, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    splits = data.splits
    (event_items, offsets), context = splits.histories, splits.context
    histories, times, at, kinds = [], [], [], []
    for user, target in zip(*splits.test, strict=True):
        own = slice(offsets[user], target)
        histories.append([splits.item_ids[i] for i in event_items[own]])
        times.append(context.times[own].tolist())
        at.append(int(context.times[target]))
        values = [None, *splits.event_columns["kind"]]
        kinds.append([values[c] for c in context.codes[own, 0]])
    moment = {"at": at} if query_time else {}
    found = model.recommend(histories, k=3, times=times, columns={"kind": kinds}, **moment)
    with torch.no_grad():
        top = torch.cat([model.top(batch, 3)[1] for batch in data.test_dataloader()])
    assert found["item"].to_list() == [splits.item_ids[i] for i in top.flatten().tolist()]


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    plain, timed = data_of(tmp_path), data_of(tmp_path, times=True, event_columns=["kind"])
    with pytest.raises(UserError, match=r"tokenizer.gap_buckets uses the times of events; give"):
        model_of(plain, **GAPS)
    with pytest.raises(UserError, match=r"model.query_time=true: no part of the model uses times"):
        model_of(timed, query_time=True)
    model = model_of(timed, query_time=True, **GAPS)
    kind = {"kind": [["long"]]}
    for given, message in (
        ({}, "uses the times of events; pass times="),
        ({"times": [[1]]}, "pass at="),
        ({"times": [[1]], "at": 2}, "has columns of events; pass columns="),
        ({"times": [[1, 2]], "at": 2, "columns": kind}, "history 0 has 1 items and 2 times"),
        ({"times": [[1]], "at": [2, 3], "columns": kind}, "2 times in at= for 1 histories"),
        ({"times": [[1]], "at": 2, "columns": {"shop": [["a"]]}}, "pass kind"),
    ):
        with pytest.raises(UserError, match=message):
            model.recommend([["i01"]], **given)
    for given in ({"times": [[1]]}, {"at": 1}, {"columns": kind}):
        with pytest.raises(UserError, match="leave out"):
            model_of(plain).recommend([["i01"]], **given)
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    for model, data, message in (
        (model_of(timed), plain, r"dataset.event_columns=none: the model is for kind"),
        (
            model_of(data_of(tmp_path, times=True), **GAPS),
            plain,
            r"dataset.times=false: the model uses times",
        ),
    ):
        with pytest.raises(UserError, match=message):
            trainer.test(model, datamodule=data, verbose=False)
