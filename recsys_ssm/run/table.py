"""Print the table at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from recsys_ssm.metrics import COUNTS


def results_table(results: Mapping[str, Any], width: int = 80) -> Table:
    """Return the table at the end of a run: one row for each metric, with this run, published figures and baselines.

    Args:
        results: ``name`` and ``metrics`` (of this run, name -> value). Optional: ``generated`` (True marks the
            title), ``metrics_all_users`` (the same with zeros for users without a relevant item; shown if there are
            such users), ``metrics_unfiltered`` or ``metrics_filtered`` (the same with seen items allowed, or left out,
            where ``metrics`` are the other way), ``published`` (with ``published_label``, the head of its column),
            ``baselines`` (name -> its metrics), and ``sees_query_time`` (True if the model sees the time of the item
            that it predicts; ``published_sees_query_time`` says it of the published row).
        width: Columns of the terminal; headers that do not fit are broken at spaces.

    Returns:
        A table whose columns are as wide as their numbers, even if it is then wider than ``width``.
    """
    metrics, label = results["metrics"], results.get("published_label", "published")
    columns: dict[str, Mapping[str, Any]] = {"this run": metrics}
    if metrics.get("n_users_without_relevant") and results.get("metrics_all_users"):
        columns["all users"] = results["metrics_all_users"]
    if results.get("metrics_filtered"):
        columns["seen items left out"] = results["metrics_filtered"]
    elif results.get("metrics_unfiltered"):
        columns["seen items allowed"] = results["metrics_unfiltered"]
    if results.get("published"):
        columns[label] = results["published"]
    columns |= results.get("baselines") or {}

    title = str(results.get("name", "results"))
    if results.get("generated"):
        title += " (generated data)"
    names = [name for name in metrics if name not in COUNTS]
    # With one relevant item a user these are all the hit ratio at the first place.
    names = [
        name
        for name in names
        if name not in ("mrr@1", "ndcg@1")
        or any(v.get(name) != v.get("hr@1") for v in columns.values())
    ]
    cells = {"metric": list(map(str, names))}
    for head, values in columns.items():
        numbers = [format_number(values.get(name), exact=head == label) for name in names]
        digits = max(map(len, numbers), default=0)
        cells[head] = [number.rjust(digits) for number in numbers]
    if "sees_query_time" in results:
        cells["metric"].append("query time")
        sees = {
            "this run": results["sees_query_time"],
            "all users": results["sees_query_time"],
            "seen items left out": results["sees_query_time"],
            "seen items allowed": results["sees_query_time"],
            label: results.get("published_sees_query_time"),
        }
        for head in columns:
            cells[head].append("yes" if sees.get(head) else "no")

    table = _WholeTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(title),
        title_style="bold",
        title_justify="left",
    )
    fits = sum(max(map(len, [head, *cells[head]])) + 2 for head in cells) <= width
    for head, column in cells.items():
        table.add_column(
            Text(head if fits else head.replace("_", " ")),
            width=max(map(len, [*([head] if fits else head.replace("_", " ").split()), *column])),
            vertical="bottom",
            style="bold" if head == "this run" else "",
        )
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def growth_table(growth: Mapping[str, Any]) -> Table:
    """Return the table of a model that began from a run: old and new items, before and after.

    Args:
        growth: As of :func:`recsys_ssm.run.grow.compare`, for next items.
    """
    counts, names = growth["items"], (f"hr@{growth['k']}", f"ndcg@{growth['k']}")
    table = _WholeTable(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(f"items, begun from {growth['run']}: {counts['dropped']:,} dropped"),
        title_style="bold",
        title_justify="left",
    )
    for head in ("items", "number", "test users", "metric", "before", "after", "popularity"):
        table.add_column(head, justify="left" if head in ("items", "metric") else "right")
    for kind in ("old", "new"):
        part = growth[kind]
        for name in names if part["n_users"] else ("-",):
            figures = (
                format_number(part.get(by, {}).get(name))
                for by in ("before", "after", "popularity")
            )
            table.add_row(kind, f"{counts[kind]:,}", f"{part['n_users']:,}", name, *figures)
    return table


class _WholeTable(Table):
    """Table that is never cut: Rich would drop columns on a narrow terminal, and a wrapped line loses nothing."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return super().__rich_console__(console, options.update(max_width=10_000))


def format_number(value: SupportsFloat | None, *, exact: bool = False) -> str:
    """Format with four decimals; ``exact`` keeps only the digits there are, with decimal points aligned."""
    number = math.nan if value is None else float(value)
    if math.isnan(number):
        return "-"
    text = f"{number:.4f}"
    if number and not float(text):
        return f"{number:.1e}"
    return text.rstrip("0").rstrip(".").ljust(len(text)) if exact else text


def _footnotes(results: Mapping[str, Any]) -> list[str]:
    notes = []
    metrics = results["metrics"]
    if "n_users" in metrics:
        n_users, n_without = (int(metrics.get(count) or 0) for count in COUNTS)
        note = f"{n_users:,} test users"
        if n_without:
            note += (
                f", {n_without:,} of them without a relevant item: these are left out of the "
                "averages"
            )
            if results.get("metrics_all_users"):
                note += ", except in the column 'all users', where they count as zeros"
        notes.append(f"{note}.")
    if results.get("metrics_filtered"):
        notes.append(
            "Users often take items again, so seen items may be recommended (model.filter_seen=false). "
            "'seen items left out': such a target is then a miss."
        )
    elif results.get("metrics_unfiltered"):
        notes.append(
            "'seen items allowed': items a user had already may be recommended again (RecBole's "
            "protocol). The other columns leave them out; a target seen before is then a miss."
        )
    if stages := results.get("two_stages"):
        notes.append(
            f"Two stages: the target of {stages['share']:.1%} of the users is among the {stages['n_candidates']} "
            "candidates of the retriever, the others keep its order. The language model has the weight "
            f"{stages['weight']:g} (model.mix)."
        )
    if below := _below_popularity(results):
        notes.append(below)
    if results.get("generated"):
        notes.append("Generated data: these figures say nothing about the real dataset.")
    return notes


def _below_popularity(results: Mapping[str, Any]) -> str | None:
    """Return a warning if the model ranks no better than by popularity; None if it does, or that is not known."""
    unfiltered = results.get("filter_seen") is False
    popularity = (results.get("baselines") or {}).get(
        "popularity_unfiltered" if unfiltered else "popularity"
    )
    for name in ("ndcg@10", "hr@10"):
        ours, theirs = results["metrics"].get(name), (popularity or {}).get(name)
        if ours is not None and theirs is not None:
            if float(ours) > float(theirs):
                return None
            return (
                f"The model is not better than popularity on {name} ({float(ours):.4f} against {float(theirs):.4f}): "
                "train longer, or try another learning rate (optimizer.lr)."
            )
    return None


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print `results_table` and the notes a reader needs.

    The text has no control codes if the output is not a terminal. A table that does not fit the
    terminal is printed at the width it needs, so a number is never cut.

    Args:
        results: As for `results_table`; without ``metrics`` (no test was run) nothing is printed.
        console: Console to print to; None: standard output.
    """
    if not results.get("metrics"):
        return
    console = console or Console(highlight=False)
    console.print(results_table(results, console.width), crop=False)
    if results.get("growth", {}).get("k"):
        console.print(growth_table(results["growth"]), crop=False)
    for note in _footnotes(results):
        console.print(Text(note, style="dim"))
