"""Look up published figures: ``published.yaml`` is their one home, read by a run's table and by reports."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from recsys_ssm.run.defaults import option, with_defaults

FILE = Path(__file__).with_suffix(".yaml")

SeenItems = Literal["allowed", "left out", "none"]

PLAIN = tuple(
    f"recsys_ssm.models.tokenizers.{name}" for name in ("FeatureTokenizer", "ItemTokenizer")
)
"""Tokenizers of the models that published rows are of."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Hold a row of a published table, with the conditions to compare it under.

    Attributes:
        source: key of the source in ``published.yaml``.
        source_label: the word that marks the source's rows in a table.
        reference: the source in full.
        notes: errata of the source.
        dataset: name of the dataset here.
        model: name of the model in print.
        backbone: class name of the backbone here in lower case, or of a model that has none; None where this project
            lacks the model.
        metrics: metric -> value.
        seeds: number of runs behind each value.
        seen_items: ``allowed`` if items of a user's history may be ranked for that user.
        max_length: longest history in events; None if unknown or not applicable.
        when: options that a run must have to be compared with the row.
        cost: latency and parameter counts as printed.
        printed_as: the dataset that the source prints, where it is another one.
        shipped_recipe: True if the defaults of this project are the recipe of the source.
        sees_query_time: True if the model sees the time of the item that it predicts.
        note: a remark on this row.
    """

    source: str
    source_label: str
    reference: str
    notes: tuple[str, ...]
    dataset: str
    model: str
    metrics: Mapping[str, float]
    seeds: int
    seen_items: SeenItems
    shipped_recipe: bool
    backbone: str | None = None
    max_length: int | None = None
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    printed_as: str | None = None
    sees_query_time: bool = False
    note: str | None = None

    @property
    def protocol(self) -> str:
        """Return the protocol in words; empty where users have no history."""
        parts = [] if self.seen_items == "none" else [f"seen items {self.seen_items}"]
        return ", ".join(parts + [f"length {self.max_length}"] * (self.max_length is not None))

    @property
    def label(self) -> str:
        """Return the head of the row's column in a run's table: ``published (seen items allowed)``."""
        words = "published" if self.backbone else f"published, {self.model}"
        return words if self.seen_items == "none" else f"{words} (seen items {self.seen_items})"

    def applies_to(self, options: Mapping[str, Any]) -> bool:
        """Return True if ``options`` (dotted option -> value) agree with ``when``; absent ones are not held."""
        return all(options.get(key, value) == value for key, value in self.when.items())


@functools.cache
def all_rows() -> tuple[Row, ...]:
    """Return every published row, in the order of the file."""
    sources = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    rows = []
    for key, source in sources.items():
        shared = {
            "source": key,
            "source_label": source["label"],
            "reference": source["reference"],
            "seeds": source["seeds"],
            "seen_items": source["seen_items"],
            "shipped_recipe": source["shipped_recipe"],
        }
        for dataset, entries in source["rows"].items():
            notes = tuple(_notes(source["notes"], dataset))
            rows += [Row(**shared, dataset=dataset, notes=notes, **entry) for entry in entries]
    return tuple(rows)


def _notes(notes: Iterable[str | Mapping[str, Any]], dataset: str) -> Iterator[str]:
    """Yield the notes of a source that are about a dataset."""
    for note in notes:
        if isinstance(note, str):
            yield note
        elif dataset in note["of"]:
            yield note["text"]


def rows_of(dataset: str, options: Mapping[str, Any] | None = None) -> list[Row]:
    """Return the published rows of a dataset, also those that their source prints under its name.

    Args:
        dataset: Name of the dataset.
        options: Dotted option -> value; rows with other conditions are left out.
    """
    return [
        row
        for row in all_rows()
        if dataset in (row.dataset, row.printed_as) and row.applies_to(options or {})
    ]


def published_for(config: Mapping[str, Any]) -> Row | None:
    """Return the published row to show beside a run, or None.

    The row is that of the run's own model on its dataset; else the best row of the field on the same data file, by
    ndcg@10; seen items are left out in it, as in the headline of a run, and it sees the time of the query only if the
    run does.

    Args:
        config: A run's config as plain data; options that it leaves out have the defaults of their classes.
    """
    filled = with_defaults(config)
    dataset = option(filled, "dataset.name")
    backbone = backbone_name(filled)
    rows = [row for row in all_rows() if row.dataset == dataset and _holds(row, filled)]
    own = [row for row in rows if row.backbone == backbone]
    another_tokenizer = option(filled, "tokenizer._target_", PLAIN[0]) not in PLAIN
    if own and (another_tokenizer or option(filled, "dataset.objective") == "masked"):
        # MambaTab or BERT4Rec, for example: the backbone of the row, but another model. The column names the row's.
        return dataclasses.replace(own[0], backbone=None, shipped_recipe=False)
    if own:
        return own[0]
    sees = option(filled, "model.query_time") is True
    best = best_of(
        row for row in rows if row.seen_items == "left out" and row.sees_query_time <= sees
    )
    # Another model than the run's: the column names it.
    return None if best is None else dataclasses.replace(best, backbone=None)


def published_results(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a run's results that hold its published row: the figures and the head of their column."""
    row = published_for(config)
    if row is None:
        return {"published": {}}
    return {
        "published": dict(row.metrics),
        "published_label": row.label,
        "published_sees_query_time": row.sees_query_time,
    }


def best_of(rows: Iterable[Row]) -> Row | None:
    """Return the row with the highest ndcg@10; None where no row has one."""
    known = [row for row in rows if "ndcg@10" in row.metrics]
    return max(known, key=lambda row: row.metrics["ndcg@10"], default=None)


def backbone_name(config: Mapping[str, Any]) -> str:
    """Return the class name of a config's backbone (:func:`backbone_class`) in lower case."""
    return backbone_class(config).rpartition(".")[2].lower()


def backbone_class(config: Mapping[str, Any]) -> str:
    """Return the dotted path of a config's backbone, or of its model where that has none; empty: there is neither."""
    backbone, model = (option(config, f"{part}._target_") for part in ("backbone", "model"))
    of_titles = str(model) if isinstance(model, str) and config.get("text") is not None else ""
    return backbone if isinstance(backbone, str) else of_titles


def _holds(row: Row, config: Mapping[str, Any]) -> bool:
    return all(option(config, key) == value for key, value in row.when.items())
