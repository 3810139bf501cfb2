"""Recommendations by workers of a Ray cluster: the bytes of one process, whatever becomes of a worker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from small import SMALL_MAMBA

from recsys_ssm import recommend
from recsys_ssm.run.ranking import Parts

SLOW = """
import os, time
from pathlib import Path
from recsys_ssm.models.next_item import NextItem
step = NextItem.predict_step
def slow(self, batch, *rest):
    (Path(os.environ["SEEN"]) / str(os.getpid())).touch()
    time.sleep(0.3)
    return step(self, batch, *rest)
NextItem.predict_step = slow
"""


def events(n_users: int) -> pl.DataFrame:
    rng = random.Random(1)
    rows = [
        (f"u{user:05d}", f"i{rng.randrange(40)}", t)
        for user in range(n_users)
        for t in range(rng.randrange(3, 9))
    ]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


@pytest.fixture
def run(cli, tmp_path: Path) -> Path:
    events(150).write_csv(tmp_path / "mine.csv")
    options = ("dataset=interactions", f"dataset.interactions={tmp_path / 'mine.csv'}", "logger=none",
               *SMALL_MAMBA, "trainer.max_epochs=1", "name=small",
               "trainer.enable_progress_bar=false")  # fmt: skip
    assert cli("train", *options).code == 0
    [run] = tmp_path.glob("runs/*/*")
    return run


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch) -> Iterator[str]:
    """The address of a cluster of two nodes' worth of processes, of a CPU each."""
    pytest.importorskip("ray.data", reason="needs the extra ray", exc_type=ImportError)
    from ray.cluster_utils import Cluster

    (tmp_path / "seen").mkdir()
    monkeypatch.setenv(
        "SEEN", str(tmp_path / "seen")
    )  # the workers' environment is that of their node
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        yield cluster.address
    finally:
        cluster.shutdown()


def command(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start a command of small parts; it works in ``folder``."""
    script = "import recsys_ssm.recommend as r\nr.PART_SIZE = 16\nr.main()\n"
    return subprocess.Popen(
        [sys.executable, "-c", script, "users=some.parquet", "batch_size=16", "k=5", *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_worker_killed_in_the_middle_changes_nothing(
    cli, run: Path, two_nodes: str, tmp_path: Path
) -> None:
    events(260).write_parquet(tmp_path / "some.parquet")
    alone = cli("recommend", f"run={run}", "users=some.parquet", "batch_size=16", "k=5",
                "output=alone.parquet")  # fmt: skip
    assert alone.code == 0, alone.text
    (tmp_path / "slow.py").write_text(SLOW)
    job = command(tmp_path, f"run={run}", "output=cluster.parquet", "engine=ray", "devices=2",
                  f"address={two_nodes}", "import=slow.py")  # fmt: skip
    parts, seen = tmp_path / "cluster.parquet.parts", tmp_path / "seen"
    try:
        while len(list(parts.glob("*.npy"))) < 3:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.01)
        killed, *_ = sorted(seen.iterdir())
        before = {each.name for each in seen.iterdir()}
        os.kill(int(killed.name), signal.SIGKILL)
        text, _ = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, text
    assert "Traceback" not in text
    assert len(list(seen.iterdir())) >= 2 and killed.name in before
    assert (tmp_path / "cluster.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()
    found = pl.read_parquet(tmp_path / "cluster.parquet")
    assert found.sort("user", "rank").equals(
        pl.read_parquet(tmp_path / "alone.parquet").sort("user", "rank")
    )
    assert found["user"].n_unique() == 260
    assert not parts.exists()


def test_two_towers_on_a_cluster_of_the_job(cli, tmp_path: Path, monkeypatch) -> None:
    """A job that was stopped goes on with the parts that are missing, also on a cluster."""
    pytest.importorskip("ray.data", reason="needs the extra ray", exc_type=ImportError)
    import ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(recommend, "PART_SIZE", 16)
    rows = events(70).select("user_id", "item_id").unique(maintain_order=True)
    rows.write_csv(tmp_path / "likes.csv")
    people = [f"u{user:05d},{user % 4}" for user in range(70)]
    (tmp_path / "people.csv").write_text("\n".join(["user_id,kind", *people]) + "\n")
    (tmp_path / "not.csv").write_text("user_id,item_id\nu00003,i2\nu00040,i3\n")
    options = ("dataset=table", f"dataset.interactions={tmp_path / 'likes.csv'}", "logger=none",
               f"dataset.users={tmp_path / 'people.csv'}", "dataset.user_categorical=[kind]")  # fmt: skip
    outcome = cli("train", *options, *SMALL_MAMBA, "trainer.max_steps=3", "validations=1")
    assert outcome.code == 0, outcome.text
    [run] = tmp_path.glob("runs/*/*")
    asked = (
        f"run={run}",
        "users=people.csv",
        "user=user_id",
        "k=3",
        "batch_size=16",
        "deny=not.csv",
    )
    assert cli("recommend", *asked, "output=alone.parquet").code == 0
    write, written = Parts.write, []

    def stopped(self, number, top):
        write(self, number, top)
        written.append(number)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", stopped)
        outcome = cli("recommend", *asked, "engine=ray", "output=cluster.parquet")
    assert outcome.code == 1 and not ray.is_initialized()
    outcome = cli("recommend", *asked, "engine=ray", "output=cluster.parquet")
    assert outcome.code == 0, outcome.text
    assert "resumed: 2 of 5 parts" in outcome.text and not ray.is_initialized()
    assert (tmp_path / "cluster.parquet").read_bytes() == (tmp_path / "alone.parquet").read_bytes()


def test_a_missing_package_and_a_missing_cluster_are_one_line(cli, run: Path, monkeypatch) -> None:
    outcome = cli("recommend", f"run={run}", "engine=spark")
    assert outcome.code == 1 and outcome.err == "error: engine=spark: expected local or ray\n"
    outcome = cli("recommend", f"run={run}", "address=auto")
    assert outcome.code == 1 and "address=auto: " in outcome.err
    outcome = cli("recommend", f"run={run}", "engine=ray", "cpus=0")
    assert outcome.code == 1 and "cpus=0: give a whole number above 0" in outcome.err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        outcome = cli("recommend", f"run={run}", "engine=ray")
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        "error: engine=ray needs Ray Data; pip install 'recsys-ssm[ray]'"
    ]
    pytest.importorskip("ray.data", reason="needs the extra ray", exc_type=ImportError)
    outcome = cli("recommend", f"run={run}", "engine=ray", "address=192.0.2.1")
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert "error: address=192.0.2.1: no Ray cluster to connect to (" in outcome.err
