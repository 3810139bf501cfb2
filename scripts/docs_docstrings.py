"""Adapt docstrings to the documentation site (a griffe extension of mkdocs.yml).

Roles (``:class:`~package.Name```) become code, an entry of several arguments (``rows, columns: …``) becomes one entry
for each, and an example becomes a code block.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?(?:[\w.]*\.)?(\w+)`")
SEVERAL = re.compile(r"^( {4,8})(\w+(?:, \w+)+):(.*(?:\n\1 {4}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrite the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = SEVERAL.sub(_one_entry_each, obj.docstring.value)
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = ROLE.sub(r"`\1`", text)


def _one_entry_each(match: re.Match[str]) -> str:
    indent, names, text = match.groups()
    return "\n".join(f"{indent}{name}:{text}" for name in names.split(", "))
