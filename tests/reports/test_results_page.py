"""The pages' generated parts: made from the cells, the words around them left alone, and never out of date."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from recsys_ssm.reports.archive import write_cells
from recsys_ssm.reports.collect import collect
from reports.fake import fake_run


@pytest.fixture
def page(repository: Path) -> ModuleType:
    path = repository / "scripts" / "results_page.py"
    spec = importlib.util.spec_from_file_location("results_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_are_filled_and_words_stay(page: ModuleType, tmp_path: Path) -> None:
    for backbone in ("mamba", "transformer"):
        for seed in range(2):
            fake_run(tmp_path / "runs", backbone=backbone, seed=seed)
    write_cells(collect([tmp_path / "runs"]).cells, tmp_path / "results")
    made = page.parts(tmp_path / "results")
    before = (
        "Words.\n\n<!-- results: spotify -->\nold\n<!-- end of results: spotify -->\n\nMore.\n"
        "<!-- results: vaccine -->\nkept\n<!-- end of results: vaccine -->\n"
    )
    after = page.fill(before, made)
    assert after.startswith("Words.\n\n<!-- results: spotify -->\n| data |")
    assert "old" not in after and "\nMore.\n" in after and "\nkept\n" in after
    assert page.fill(after, made) == after
    assert "| Spotify | FT-Transformer | paper | 100 | .803 |" in after
    assert (
        "FT-Mamba, here (2 seeds)" in made["readme"]
        and "| FT-Mamba, paper | .952 |" in made["readme"]
    )
    assert "'seed=range(2)'`" in made["commands"]
    assert "p-value" in made["differences"]


def test_the_pages_are_what_the_results_say(page: ModuleType, repository: Path) -> None:
    made = page.parts(repository / "results")
    for name in page.PAGES:
        text = (repository / name).read_text(encoding="utf-8")
        assert page.fill(text, made) == text, f"{name} is out of date: run `make results`"
