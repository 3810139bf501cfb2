"""The cache of prepared data: what is served again, and what is made anew."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from events import IN_ORDER, frame, histories, splits_of, write

from recsys_ssm.data import cache
from recsys_ssm.data.interactions import Interactions, Preparation
from recsys_ssm.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table(tmp_path) -> Path:
    frame().write_csv(tmp_path / "rows.csv")
    return tmp_path / "rows.csv"


def entries(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "interactions").glob("*.json"))


def count_preparations(monkeypatch) -> list[int]:
    made = []
    prepare = Preparation.prepare
    monkeypatch.setattr(
        Preparation, "prepare", lambda self, source: made.append(1) or prepare(self, source)
    )
    return made


def test_prepared_data_is_kept_and_memory_mapped(tmp_path, table, monkeypatch):
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    made = count_preparations(monkeypatch)
    first, second = splits_of(table), splits_of(table)
    assert len(made) == 1
    for splits in (first, second):
        base = splits.histories.events
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and base.mode == "r"
        assert not splits.histories.events.flags.writeable
        assert histories(splits) == IN_ORDER
    assert first.notes == second.notes
    assert Interactions(interactions=table, cache_dir=tmp_path / "other").splits.notes
    assert (tmp_path / "other").is_dir() and len(made) == 2


def test_a_changed_file_is_read_anew_whatever_its_date_and_size(table, monkeypatch):
    made = count_preparations(monkeypatch)
    assert histories(splits_of(table))["u1"] == list("abcd")
    before = table.stat()
    table.write_text(table.read_text().replace("u1,c", "u1,e"))
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert table.stat().st_size == before.st_size
    assert histories(splits_of(table))["u1"] == list("abed")
    assert len(made) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"k_core": 2},
        {"rating": "rating", "min_rating": 3},
        {"duplicates": "keep"},
        {"timestamp": None},
        {"user": "item_id", "item": "user_id"},
        {"split": "time"},
        {"split": "time", "val_share": 0.2},
        {"split": "time", "val_from": 20, "test_from": 30},
    ],
)
def test_other_settings_are_another_entry(tmp_path, table, options):
    def again(**options):
        with contextlib.suppress(UserError):  # too little data for that split: kept all the same
            splits_of(table, **options)

    again()
    again(split="time")
    n = len(entries(tmp_path))
    again(**options)
    known = options == {"split": "time"}
    assert len(entries(tmp_path)) == n + (not known)


def test_options_of_the_loader_share_an_entry(tmp_path, table):
    splits_of(table, name="my/set")
    assert entries(tmp_path)[0].name.startswith("my_set-")
    entries(tmp_path)[0].unlink()
    splits_of(table)
    splits_of(table, max_length=3, batch_positions=9, objective="last", seed=4)
    assert len(entries(tmp_path)) == 1


NOT_PREPARATION = {
    *("interactions", "root", "download", "source", "cache_dir", "name"),  # how the file is found
    *("items", "items_id", "item_numeric", "item_categorical", "item_names"),  # read at every start
    *("items_separator", "item_title", "titles", "title_names"),
}
"""Options that the prepared data does not depend on."""


def test_no_option_can_be_forgotten_in_the_fingerprint():
    """The preparation sees its fields alone, and the fingerprint is of all of them."""
    fields = {field.name for field in dataclasses.fields(Preparation)}
    options = {
        name
        for name, parameter in inspect.signature(Interactions).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert options - fields == NOT_PREPARATION and not fields - options
    preparation = Interactions(interactions="x.csv").preparation
    others = {
        "format": "csv",
        "names": ("a",),
        "separator": ";",
        "rating": "stars",
        "filter": "a == 1",
        "timestamp": ("day", "hour"),
        "missing": (),
        "duplicates": "keep",
        "split": "time",
        "val_from": 1,
        "test_from": 2,
    }

    def fingerprint(preparation):
        return cache.hash_values(dataclasses.asdict(preparation))

    seen = {fingerprint(preparation)}
    for name in fields:
        value = getattr(preparation, name)
        if name in others:
            other = others[name]
        else:
            other = value + "2" if isinstance(value, str) else (value or 0) + 0.25
        changed = dataclasses.replace(preparation)
        object.__setattr__(changed, name, other)
        seen.add(fingerprint(changed))
    assert len(seen) == len(fields) + 1

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithOneMore(Preparation):
        new: int = 0

    more = [WithOneMore(**dataclasses.asdict(preparation), new=new) for new in (0, 1)]
    assert len({fingerprint(preparation), *map(fingerprint, more)}) == 3


def count_digests(monkeypatch) -> list[str]:
    read = []
    digest = cache.hashlib.file_digest
    monkeypatch.setattr(
        cache.hashlib, "file_digest", lambda file, kind: read.append(kind) or digest(file, kind)
    )
    return read


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path, table, monkeypatch):
    read, own = count_digests(monkeypatch), tmp_path / "cache"
    for _ in range(2):  # just written: it may change once more without another date
        first = cache.hash_file(table, own)
    assert read == ["sha256"] * 2 and not (own / "hashes").exists()
    monkeypatch.setattr(cache, "_SETTLED", 0)
    for _ in range(3):
        assert cache.hash_file(table, own) == first
    assert len(read) == 3
    before = table.stat()
    table.write_text(table.read_text().replace("u1,c", "u1,e"))
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = cache.hash_file(table, own)
    assert second != first and len(read) == 4
    (record,) = (own / "hashes").iterdir()
    record.write_text("{")
    assert cache.hash_file(table, own) == second and len(read) == 5
    write(tmp_path / "file", "")
    assert cache.hash_file(table, tmp_path / "file") == second, "a cache that cannot be written"


def test_a_start_reads_neither_the_file_nor_the_arrays(table, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED", 0)
    splits_of(table)
    read = count_digests(monkeypatch)
    assert histories(splits_of(table)) == IN_ORDER
    assert read == []


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_entry_that_is_truncated_in_place(tmp_path, table, monkeypatch, in_memory):
    """Truncated before a start, it is made again; truncated during a run, a small one is in memory already."""
    monkeypatch.setattr(cache, "IN_MEMORY", cache.IN_MEMORY if in_memory else 0)
    made = count_preparations(monkeypatch)
    first = splits_of(table)
    (index,) = entries(tmp_path)
    folder = index.parent / json.loads(index.read_text())["folder"]
    assert all(path.stat().st_mode & 0o222 == 0 for path in folder.glob("*.npy"))
    if in_memory:
        for path in folder.iterdir():
            os.truncate(path, 0)
        assert histories(first) == IN_ORDER
    else:
        del first
        os.truncate(folder / "events.npy", 100)
    assert histories(splits_of(table)) == IN_ORDER
    assert len(made) == 2


def test_an_entry_that_was_copied_is_checked_by_its_sums(tmp_path, table, monkeypatch):
    made = count_preparations(monkeypatch)
    splits_of(table)
    (index,) = entries(tmp_path)
    for path in (index.parent / json.loads(index.read_text())["folder"]).iterdir():
        os.utime(path, ns=(1, 1))
    assert histories(splits_of(table)) == IN_ORDER
    assert len(made) == 1


def test_data_frames_are_known_by_their_content(tmp_path, monkeypatch):
    made = count_preparations(monkeypatch)
    whole = frame()
    for same in (whole, pl.concat([whole[:4], whole[4:]]), whole.with_columns(unused=1)):
        assert histories(splits_of(same)) == IN_ORDER
    assert len(made) == 1
    splits_of(whole.with_columns(timestamp=pl.col("timestamp") + 1))
    splits_of(whole.with_columns(pl.col("timestamp").cast(pl.Float64)))
    splits_of(whole.reverse())
    assert len(made) == 4


def test_hashes_of_data_frames_are_of_what_they_say():
    def of(*cells, kind=pl.String):
        return cache.hash_frame(pl.DataFrame({"a": pl.Series(cells, dtype=kind)}))

    assert of("x", "y", kind=pl.Categorical) == of("x", "y", kind=pl.Categorical)
    assert of("x", "y", kind=pl.Categorical) != of("x", "z", kind=pl.Categorical)
    assert len({of("x", "y"), of("xy", ""), of("x", None), of(None, "x"), of("x")}) == 5
    long = pl.DataFrame({"a": ["a text of more than twelve letters", "b", "c"]})
    assert cache.hash_frame(long[1:]) == of("b", "c")


def test_another_version_is_another_entry(tmp_path, table, monkeypatch):
    splits_of(table)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    splits_of(table)
    assert len(entries(tmp_path)) == 2


def garble(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-1] + b"\x55")


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda index, folder: garble(folder / "events.npy"),
        lambda index, folder: (folder / "offsets.npy").unlink(),
        lambda index, folder: overwrite(folder / "item_ids.parquet", b""),
        lambda index, folder: garble(folder / "notes.json"),
        lambda index, folder: index.write_text("{"),
        lambda index, folder: index.write_text("[]"),
        lambda index, folder: index.write_text('{"folder": "..", "files": {}}'),
        lambda index, folder: index.unlink(),
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path, table, damage, monkeypatch):
    made = count_preparations(monkeypatch)
    splits_of(table)
    (index,) = entries(tmp_path)
    folder = index.parent / json.loads(index.read_text())["folder"]
    damage(index, folder)
    assert histories(splits_of(table)) == IN_ORDER
    assert histories(splits_of(table)) == IN_ORDER
    assert len(made) == 2
    assert len(entries(tmp_path)) == 1


def test_an_interrupted_preparation_leaves_nothing(tmp_path, table, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        splits_of(table)
    assert list((tmp_path / "cache" / "interactions").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, table, monkeypatch):
    prepare = Preparation.prepare

    def meanwhile(self, path):
        prepared = prepare(self, path)
        path.write_text(path.read_text() + "u9,a,1,1\n")
        return prepared

    monkeypatch.setattr(Preparation, "prepare", meanwhile)
    with pytest.raises(UserError, match="changed while it was being read"):
        splits_of(table)
    assert not (tmp_path / "cache" / "interactions").exists()


_TOGETHER = """
import sys, time
from pathlib import Path
import numpy as np, polars as pl
from recsys_ssm.data.cache import Prepared, load_or_make
folder, me = Path(sys.argv[1]), sys.argv[2]

def make():
    (folder / f"ready{me}").touch()
    while len(list(folder.glob("ready*"))) < 3:  # all have found nothing
        time.sleep(0.01)
    return Prepared({"numbers": np.arange(9)}, {"names": pl.Series(["a"])}, ["made"])

entry = load_or_make(folder / "cache", "x", lambda: {"input": "a hash"}, {}, make)
assert entry.arrays["numbers"].tolist() == list(range(9)), entry
assert entry.texts["names"].to_list() == ["a"] and entry.notes == ["made"]
"""


def test_processes_may_prepare_the_same_at_once(tmp_path):
    command = [sys.executable, "-c", _TOGETHER, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    (index,) = (tmp_path / "cache").glob("*.json")
    kept = [path.name for path in index.parent.iterdir() if path.is_dir()]
    assert kept == [json.loads(index.read_text())["folder"]]


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"none: not readable \(No such file"):
        cache.hash_file(tmp_path / "none", tmp_path)


def test_a_cache_that_cannot_be_written_is_told(tmp_path, table):
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"dataset.cache_dir or the variable RECSYS_SSM_CACHE"):
        splits_of(table, cache_dir=tmp_path / "file")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache.cache_folder("/zero") == Path("/zero")
    assert cache.cache_folder() == Path("/one")
    monkeypatch.delenv("RECSYS_SSM_CACHE")
    assert cache.cache_folder() == Path("/two/recsys_ssm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("~/.cache/recsys_ssm").expanduser()
