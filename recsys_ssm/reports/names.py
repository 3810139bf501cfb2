"""Name backbones in reports and choose their colour, line and marker."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from recsys_ssm.reports.runs import Cell, Run
from recsys_ssm.run.defaults import known_class
from recsys_ssm.run.published import backbone_class

# Lines differ by dash and marker as well as by colour, so a grey print stays legible.
_COLORS = ("#e69f00", "#56b4e9", "#882255", "#332288", "#999933", "#117733")
_LINES = ("--", "-.", ":", "-")
_MARKERS = ("P", "X", "*", "<", ">", "p", "h", "d")


def model_name(cell: Cell) -> str:
    """Return a cell's model name: the label that its backbone's class has for the task, else the class's name."""
    return name_of_run(cell.runs[0])


def name_of_run(run: Run) -> str:
    """Return a run's model name, as :func:`model_name`."""
    target = backbone_class(run.config)
    labels = _own(target, "labels")
    return str(labels.get(run.task.kind) or target.rpartition(".")[2] or run.backbone)


def styles(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """Return ``color``, ``linestyle`` and ``marker`` of each backbone; no two backbones share a style.

    A class has a style of its own in ``Backbone.style``. Other backbones get the next free one, in the order of their
    names.
    """
    targets = {c.backbone: backbone_class(c.runs[0].config) for c in cells}
    found: dict[str, dict[str, Any]] = {}
    free = (
        {"color": color, "linestyle": line, "marker": marker}
        for (marker, color), line in zip(
            itertools.cycle(itertools.product(_MARKERS, _COLORS)),
            itertools.cycle(_LINES),
            strict=False,
        )
    )
    for name in sorted(targets, key=lambda name: (not _own(targets[name], "style"), name)):
        style = dict(_own(targets[name], "style"))
        while not style or style in found.values():
            style = next(free)
        found[name] = style
    return found


def _own(target: str, attribute: str) -> Mapping[str, Any]:
    """Return a mapping that a class itself declares; its base classes' names and styles are not its own."""
    cls = known_class(target)
    found = vars(cls).get(attribute, {}) if cls is not None else {}
    return found if isinstance(found, Mapping) else {}
