"""Titles of items: where they are read from, what happens to items without one, and what stops a run."""

from __future__ import annotations

from pathlib import Path

import hydra
import polars as pl
import pytest
from events import frame, lines, write

from recsys_ssm import GeneratedShop, Interactions, UserError
from recsys_ssm.data.titles import LONGEST, clean, shortened
from recsys_ssm.paths import CONF_DIR

TITLES = {"a": "Ape", "b": "Bear", "c": "Cat", "d": "Dog", "e": "Eel"}


def of(titles: object, **options: object) -> Interactions:
    return Interactions(interactions=frame(), titles=titles, item_title="title", **options)


def table(titles: dict[str, str | None]) -> pl.DataFrame:
    return pl.DataFrame({"item_id": list(titles), "title": list(titles.values())})


def test_titles_are_in_the_order_of_the_catalogue() -> None:
    data = of(table(dict(reversed(TITLES.items()))))
    assert data.splits.item_ids == list("abcde")
    assert data.item_titles() == ["Ape", "Bear", "Cat", "Dog", "Eel"]
    assert data.splits.notes[-1] == "items: titles of 5 of 5 items"
    assert "titles" in data.sources


def test_rows_read_are_used_or_reported() -> None:
    data = of(table({"a": "Ape", "b": None, "c": " \t ", "d": "Dog", "x": "Xenops"}))
    assert data.item_titles() == ["Ape", "item b", "item c", "Dog", "item e"]
    assert data.splits.notes[-1] == (
        "items: titles of 2 of 5 items; 3 items have none (1 without a row, 2 with an empty cell), the first is 'b': "
        "called by their id, as 'item b'; 1 rows are of items without an interaction: left out"
    )
    assert data.item_titles() is data.item_titles() and len(data.splits.notes[-1]) < 300


def test_a_title_is_one_line_of_limited_length() -> None:
    long = "word " * 2000
    titles = {
        "a": "two\nlines\tand\x00a\u202e mark",
        "b": long,
        "c": "x" * 10_000,
        "d": "\N{OK HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} film",
        "e": "\u05e9\u05dc\u05d5\u05dd",
    }
    data = of(table(titles))
    a, b, c, d, e = data.item_titles()
    assert a == "two lines and a mark"
    assert len(b) <= LONGEST and long.startswith(b) and b.endswith("word")
    assert c == "x" * LONGEST
    assert (d, e) == (titles["d"], titles["e"])
    assert "2 titles have more than 1,000 characters" in data.splits.notes[-1]


def test_a_blank_alone_is_not_a_title() -> None:
    assert clean(" \u2066\u202e\n") == "" and shortened("ab") == "ab"


def test_a_column_of_the_features_file_serves(tmp_path: Path) -> None:
    rows = lines([(i, t, 1) for i, t in TITLES.items()], header="item_id,title,price\n")
    path = write(tmp_path / "items.csv", rows)
    data = Interactions(interactions=frame(), items=path, item_title="title", item_numeric="price")
    assert data.splits.item_schema is not None and data.item_titles()[0] == "Ape"
    data = Interactions(interactions=frame(), items=path, item_title="title")
    assert data.splits.item_schema is None and data.item_titles()[4] == "Eel"


def test_grouplens_files_are_read_as_they_are(tmp_path: Path) -> None:
    genres = "|0" * 19
    films = [("a", "Misérables, Les (1995)"), ("b", "Star: Wars"), *list(TITLES.items())[2:]]
    rows = "".join(f"{i}|{t}|01-Jan-1995||http://x.y/{t}{genres}\n" for i, t in films)
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "u.item").write_bytes(rows.encode("latin-1"))
    names = composed("ml_100k")
    data = of_config(names, tmp_path)
    assert data.item_titles()[:3] == ["Misérables, Les (1995)", "Star: Wars", "Cat"]
    (tmp_path / "ml-1m").mkdir()
    text = "".join(f"{i}::{t}::Drama|War\n" for i, t in films)
    (tmp_path / "ml-1m" / "movies.dat").write_bytes(text.encode("latin-1"))
    assert of_config(composed("ml_1m"), tmp_path).item_titles()[:2] == [films[0][1], films[1][1]]


def composed(dataset: str) -> dict[str, object]:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = hydra.compose("train", [f"dataset={dataset}", "name=x", "output_dir=x"])
    return {key: cfg.dataset[key] for key in ("titles", "item_title", "title_names")}


def of_config(options: dict[str, object], root: Path) -> Interactions:
    options = {
        key: value if isinstance(value, str) else list(value) for key, value in options.items()
    }
    return Interactions(interactions=frame(), root=root, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dataset.item_title: not set, and language models read the titles"),
        ({"item_title": "t"}, "dataset.item_title: not set"),
        (
            {"item_title": "t", "titles": ["m/a.item", "m/b.item"], "source": "example.org"},
            "a.item: no such file .*put a.item or b.item there, from example.org, or name another file",
        ),
        ({"item_title": "t", "titles": table(TITLES)}, "items: no column 't'"),
        ({"item_title": "title", "titles": table({"q": "Q"})}, "none of the 5 items"),
    ],
)
def test_titles_that_cannot_be_read_are_one_line(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    data = Interactions(interactions=frame(), root=tmp_path, **options)
    assert data.splits.item_ids == list("abcde")  # other models need no titles
    with pytest.raises(UserError, match=message) as caught:
        data.item_titles()
    assert "\n" not in str(caught.value)


def test_ids_are_not_titles() -> None:
    with pytest.raises(UserError, match=r"dataset\.item_title=item_id: that is the column of ids"):
        Interactions(interactions=frame(), item_title="item_id")


def test_the_shop_has_titles() -> None:
    titles = GeneratedShop(n_items=20).item_titles()
    assert len(set(titles)) == 20 and titles[0].startswith("Book ")
