"""Recommendations in parts: resumed, by several processes, filtered, scored; always the same rows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from recsys_ssm import NextItem, UserError
from recsys_ssm.batches import TopItems
from recsys_ssm.run.ranking import FORMATS, Parts, write_frames

N_ITEMS = 40


def events(n_users: int) -> pl.DataFrame:
    rng = random.Random(1)
    rows = [
        (f"u{user:05d}", f"i{rng.randrange(N_ITEMS)}", t)
        for user in range(n_users)
        for t in range(rng.randrange(3, 9))
    ]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


@pytest.fixture
def run(cli, tmp_path: Path) -> Path:
    events(150).write_csv(tmp_path / "mine.csv")
    options = ("dataset=interactions", f"dataset.interactions={tmp_path / 'mine.csv'}", "logger=none",
               "backbone=mamba", "backbone.d_model=16", "trainer.max_epochs=1", "name=small",
               "trainer.enable_progress_bar=false")  # fmt: skip
    assert cli("train", *options).code == 0
    [run] = tmp_path.glob("runs/*/*")
    return run


def test_killed_at_any_moment_and_resumed_to_the_same_file(run: Path, tmp_path: Path) -> None:
    """Twenty parts of one batch each; the job is killed as soon as it has written another one."""
    events(2560).write_csv(tmp_path / "all.csv")
    script = (
        "import recsys_ssm.recommend as r, recsys_ssm.run.ranking as p, time\n"
        "r.PART_SIZE = 128\nwrite = p.Parts.write\n"
        "def slow(*a):\n    write(*a)\n    time.sleep(.05)\n"
        "p.Parts.write = slow\nr.main()\n"
    )
    command = [sys.executable, "-c", script, f"run={run}", "users=all.csv", "k=5", "batch_size=128"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    whole = subprocess.run([*command, "output=whole.parquet"], cwd=tmp_path, env=env, check=True,
                           capture_output=True, text=True)  # fmt: skip
    assert "resumed" not in whole.stdout
    parts, n_kills = tmp_path / "again.parquet.parts", 0
    while n_kills < 3:
        before = len(list(parts.glob("*.npy")))
        job = subprocess.Popen([*command, "output=again.parquet"], cwd=tmp_path, env=env,
                               stdout=subprocess.DEVNULL)  # fmt: skip
        while len(list(parts.glob("*.npy"))) < before + 2:
            assert job.poll() is None
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
        job.wait()
        n_kills += 1
        assert not (tmp_path / "again.parquet").exists()
    (parts / "part-000001.npy").write_bytes(b"half")  # a damaged part is computed again
    last = subprocess.run([*command, "output=again.parquet"], cwd=tmp_path, env=env, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert "resumed: " in last.stdout and "of 20 parts" in last.stdout
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not parts.exists()
    model = NextItem.load_from_checkpoint(run / "checkpoints/best.ckpt", weights_only=True)
    table = events(2560)
    histories = table.group_by("user_id", maintain_order=True).agg("item_id")
    expected = model.recommend(histories["item_id"].to_list(), 5)
    found = pl.read_parquet(tmp_path / "whole.parquet")
    assert found["user"].to_list() == histories["user_id"].gather(expected["user"]).to_list()
    same = found["item"] == expected["item"]
    gap = (found["score"] - expected["score"]).abs()
    assert same.mean() > 0.99 and gap.max() < 1e-5  # sums of another order decide ties


def test_two_processes_write_the_file_of_one(run: Path, tmp_path: Path) -> None:
    events(131).write_csv(tmp_path / "some.csv")
    script = "import recsys_ssm.recommend as r\nr.PART_SIZE = 16\nr.main()\n"
    (tmp_path / "job.py").write_text(script)
    files = []
    for n in (1, 2):
        options = [
            f"run={run}",
            "users=some.csv",
            "batch_size=16",
            f"devices={n}",
            "accelerator=cpu",
        ]
        done = subprocess.run(
            [sys.executable, "job.py", *options, f"output=of{n}.parquet"], cwd=tmp_path, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        files.append((tmp_path / f"of{n}.parquet").read_bytes())
    assert files[0] == files[1]


def test_allow_deny_titles_pairs_and_similar_items(cli, run: Path, tmp_path: Path) -> None:
    model = NextItem.load_from_checkpoint(run / "checkpoints/best.ckpt", weights_only=True)
    table = events(150)
    seen = set(table.select("user_id", "item_id").iter_rows())
    (tmp_path / "few.csv").write_text("item_id\ni1\ni2\ni3\ni4\nnobody\n")
    (tmp_path / "not.csv").write_text("user,item\nu00003,i2\nu00004,i3\nstranger,i1\n")
    (tmp_path / "titles.csv").write_text("item_id,title\ni1,One\ni2,Two\ni4,Four\n")
    outcome = cli("recommend", f"run={run}", "allow=few.csv", "deny=not.csv", "k=3",
                  "item_file=titles.csv", "item_columns=[title]", "output=top.csv")  # fmt: skip
    assert outcome.code == 0, outcome.text
    assert "allow=few.csv: 1 of 5 rows have an item that is not in the catalogue" in outcome.text
    found = pl.read_csv(tmp_path / "top.csv")
    assert found.columns == ["user", "rank", "item", "score", "title"]
    titles = {"i1": "One", "i2": "Two", "i4": "Four", "i3": None}
    assert found["title"].to_list() == [titles[item] for item in found["item"]]
    pairs = {
        (user, item) for user in table["user_id"].unique() for item in ("i1", "i2", "i3", "i4")
    }
    pairs -= seen | {("u00003", "i2"), ("u00004", "i3")}
    histories = table.group_by("user_id", maintain_order=True).agg("item_id")
    rows = {user: row for row, user in enumerate(histories["user_id"])}
    asked = pl.DataFrame(
        {"user": [rows[u] for u, _ in sorted(pairs)], "item": [i for _, i in sorted(pairs)]}
    )
    scores = model.score(histories["item_id"].to_list(), asked)["score"]
    score_of = dict(zip(sorted(pairs), scores, strict=True))
    for user in rows:
        mine = sorted((p for p in pairs if p[0] == user), key=lambda p: -score_of[p])[:3]
        got = found.filter(user=user)
        assert got["item"].to_list() == [item for _, item in mine]
        assert got["score"].to_list() == pytest.approx([score_of[p] for p in mine], abs=1e-5)

    # Pairs that are allowed, then the same pairs scored.
    asked.select(pl.Series("user", [u for u, _ in sorted(pairs)]), "item").write_csv(
        tmp_path / "pairs.csv"
    )
    assert cli("recommend", f"run={run}", "allow=pairs.csv", "k=3", "output=of_pairs.csv").code == 0
    assert pl.read_csv(tmp_path / "of_pairs.csv").drop("score").equals(found.drop("score", "title"))
    (tmp_path / "more.csv").write_text(
        (tmp_path / "pairs.csv").read_text() + "new,i1\nu00003,none\n"
    )
    outcome = cli("recommend", f"run={run}", "pairs=more.csv", "output=scores.csv")
    assert outcome.code == 0 and "2 have none" in outcome.text, outcome.text
    scored = pl.read_csv(tmp_path / "scores.csv")
    assert scored["score"][:-2].to_list() == pytest.approx(scores.to_list(), abs=1e-5)
    assert scored["score"][-2:].null_count() == 2

    assert cli("recommend", f"run={run}", "similar=[i1,i7]", "k=4", "output=like.csv").code == 0
    like = pl.read_csv(tmp_path / "like.csv")
    vectors = torch.nn.functional.normalize(model._items().detach(), dim=1)
    cosines = vectors @ vectors[model.item_ids.index("i1")]
    cosines[model.item_ids.index("i1")] = -2
    best = [model.item_ids[i] for i in cosines.argsort(descending=True)[:4]]
    assert like.filter(item="i1")["similar"].to_list() == best

    for options, message in (
        (["similar=[zzz]"], "items: 'zzz' is not in the catalogue"),
        (["allow=titles.csv", "deny=few.csv"], "deny=few.csv: no item is left to recommend"),
        (
            ["deny=mine.csv", "item_columns=[title]"],
            "item_columns: the dataset has no file of items",
        ),
        (["item_columns=[score]"], "item_columns: score is a column of the output"),
        (["pairs=few.csv"], "pairs=few.csv: no column of users"),
        (["checkpoint=none.ckpt"], "checkpoint=none.ckpt: expected best or last, or a file in"),
    ):
        outcome = cli("recommend", f"run={run}", *options)
        assert outcome.code == 1 and message in outcome.err, outcome.text
    assert cli("recommend", f"run={run}", "checkpoint=last.ckpt", "output=last.csv").code == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_frames_are_one_file(tmp_path: Path, suffix: str) -> None:
    whole = pl.DataFrame(
        {"user": ["a", "b", "ü"] * 50, "rank": range(150), "score": [0.5, None, 1.0] * 50}
    )
    frames = (whole[start : start + 7] for start in range(0, 150, 7))
    path = write_frames(tmp_path / f"x{suffix}", frames, whole.schema)
    read = {".parquet": pl.read_parquet, ".csv": pl.read_csv, ".json": pl.read_json, ".jsonl": pl.read_ndjson,
            ".tsv": lambda p: pl.read_csv(p, separator="\t")}[suffix]  # fmt: skip
    assert read(path).equals(whole)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_parts_of_another_job_or_a_strangers_folder(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "x.parts", {"job": "a"}, 5, 2, 3)
    assert parts.prepare() == [0, 1, 2]
    top = TopItems(
        torch.tensor([4]), torch.tensor([[1, 0, -1]]), torch.tensor([[2.0, torch.nan, 0]])
    )
    parts.write(2, [top])
    assert parts.prepare() == [0, 1] and parts.count() == 1
    assert Parts(tmp_path / "x.parts", {"job": "b"}, 5, 2, 3).prepare() == [0, 1, 2]
    (tmp_path / "y.parts").mkdir()
    (tmp_path / "y.parts" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="has other files"):
        Parts(tmp_path / "y.parts", {"job": "b"}, 5, 2, 3).prepare()
