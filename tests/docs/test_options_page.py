"""docs/options.md is what scripts/options_page.py writes, and says something on every option."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from recsys_ssm import Mamba2, NextItemLoss, TableData, Transformer


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "options_page", repository / "scripts" / "options_page.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text() == script.page(), "run python scripts/options_page.py"


def test_every_option_has_a_meaning(script: ModuleType) -> None:
    empty = [line for line in script.page().splitlines() if line.startswith("|") and "|  |" in line]
    assert not empty


def test_defaults_types_and_first_sentences(script: ModuleType) -> None:
    options = {option.name: option for option in script.options_of(NextItemLoss)}
    assert options["negatives"].default == 256
    assert options["negatives"].type == "int"
    assert options["matmul"].type == "one of float32, bfloat16, auto"
    assert "item_counts" not in options  # passed by the program
    table = {option.name for option in script.options_of(TableData)}
    assert {"interactions", "held_out", "batch_size", "seed"} <= table


def test_a_reference_to_another_class_is_followed(script: ModuleType) -> None:
    for kind in (Mamba2, Transformer):
        meanings = script.argument_texts(kind)
        assert meanings["init"]
        assert not any(text.startswith("As ") for text in meanings.values())


def test_spelling_is_that_of_the_command_line(script: ModuleType) -> None:
    assert script.spell(None) == "null"
    assert script.spell(value=True) == "true"
    assert script.spell(("a", 1)) == "[a, 1]"
