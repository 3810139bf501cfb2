"""Print the table a run ends with."""

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
    """The end-of-run table: a row a metric; this run, what was published, and the baselines.

    Args:
        results: ``name``, ``metrics`` (this run's, name -> value), and where there are such
            ``generated`` (True marks the title), ``metrics_all_users`` (the same with zeros for
            users without a relevant item; shown if there are such users), ``metrics_unfiltered``
            (items a user has seen may be recommended too), ``published`` (with the head of its column,
            ``published_label``) and ``baselines`` (name -> its metrics).
        width: columns of the terminal; headers are broken at spaces where it does not fit.

    Returns:
        A table whose columns are as wide as their numbers, also if it then is wider than ``width``.
    """
    metrics, label = results["metrics"], results.get("published_label", "published")
    columns: dict[str, Mapping[str, Any]] = {"this run": metrics}
    if metrics.get("n_users_without_relevant") and results.get("metrics_all_users"):
        columns["all users"] = results["metrics_all_users"]
    if results.get("metrics_unfiltered"):
        columns["seen items allowed"] = results["metrics_unfiltered"]
    if results.get("published"):
        columns[label] = results["published"]
    columns |= results.get("baselines") or {}

    title = str(results.get("name", "results"))
    if results.get("generated"):
        title += " (generated data)"
    names = [name for name in metrics if name not in COUNTS]
    cells = {"metric": list(map(str, names))}
    for head, values in columns.items():
        numbers = [format_number(values.get(name), exact=head == label) for name in names]
        digits = max(map(len, numbers), default=0)
        cells[head] = [number.rjust(digits) for number in numbers]

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


class _WholeTable(Table):
    """Rich cuts cells and drops columns where a terminal is narrow; a wrapped line loses nothing."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return super().__rich_console__(console, options.update(max_width=10_000))


def format_number(value: SupportsFloat | None, *, exact: bool = False) -> str:
    """Four decimals; ``exact`` gives only the digits there are, decimal points still aligned."""
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
    if results.get("metrics_unfiltered"):
        notes.append(
            "'seen items allowed': what a user had already may be recommended once more (RecBole's "
            "protocol); everywhere else it is left out, the item held out excepted."
        )
    if results.get("generated"):
        notes.append("Generated data: these figures say nothing about the real data set.")
    return notes


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints `results_table` and what one has to know to read it.

    Plain text without control codes where the output is no terminal. A table that does not fit the
    terminal is printed at the width it needs: a number is never cut.

    Args:
        results: as for `results_table`; without ``metrics`` (no test was run) nothing is printed.
        console: standard output if None.
    """
    if not results.get("metrics"):
        return
    console = console or Console(highlight=False)
    console.print(results_table(results, console.width), crop=False)
    for note in _footnotes(results):
        console.print(Text(note, style="dim"))
