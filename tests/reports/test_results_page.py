"""The generated parts of pages: made from the cells, the words around them kept, never out of date."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from types import ModuleType

import hydra
import pytest

from recsys_ssm.cli.command import open_options
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.paths import CONF_DIR
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
        for seed in range(3):
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
    assert "| Spotify | FT-Transformer | paper | no | 100 | .803 |" in after
    assert (
        "FT-Mamba, here (3 seeds)" in made["readme"]
        and "| FT-Mamba, paper | .952 |" in made["readme"]
    )
    assert "'seed=range(3)'`" in made["commands"]
    assert "p-value" in made["differences"]
    assert all("Equal scores" in made[part] for part in ("spotify", "differences", "settings"))


def test_next_item_figures_stand_beside_the_best_on_the_file(
    page: ModuleType, tmp_path: Path
) -> None:
    fake_run(tmp_path / "runs", "amazon_beauty_2014", "mamba2")
    write_cells(collect([tmp_path / "runs"]).cells, tmp_path / "results")
    made = page.parts(tmp_path / "results")["readme next-item"]
    assert "| amazon_beauty_2014, best published: WEARec | .1041 | .0614 |" in made


def test_the_systems_without_a_row_are_named_with_their_commands(
    page: ModuleType, tmp_path: Path
) -> None:
    for backbone, objective in (("mamba", "all"), ("transformer", "masked")):
        fake_run(tmp_path / "runs", "ml_1m", backbone, options={"dataset.objective": objective})
    for dataset in ("amazon_beauty_2014", "amazon_sports_2014"):
        fake_run(tmp_path / "runs", dataset, "mamba2")
    write_cells(collect([tmp_path / "runs"]).cells, tmp_path / "results")
    made = page.parts(tmp_path / "results")
    text = made["next-item ml_1m"]
    named = "SASRec, 2Mamba4Rec, Hydra4Rec, MaTrRec, SIGMA, MamRec, GPT4Rec, LlamaRec"
    assert f"Not run here yet: {named}." in " ".join(text.split())
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    assert len(commands) == 8 and commands[0].endswith(" experiment=ml_1m/sasrec")
    beauty = " ".join(made["next-item amazon_beauty_2014"].split())
    assert (
        "No row of MamRec, GPT4Rec, LlamaRec: the data have no titles. Not run here yet: SASRec"
        in beauty
    )
    assert "experiment=text/" not in beauty
    assert "Not run here yet" not in made["next-item amazon_sports_2014"]
    assert all(made["next-item"].count(f"\n### {name}\n") <= 1 for name in page.OF_THE_PAPERS)


@pytest.mark.parametrize("dataset", ["ml_100k", "ml_1m", "amazon_beauty_2014"])
def test_the_commands_of_missing_systems_are_composed(page: ModuleType, dataset: str) -> None:
    register_resolvers()
    for name in page.SYSTEMS:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            arguments = open_options(shlex.split(page.options(name, dataset)))
            cfg = hydra.compose("train", [*arguments, "output_dir=.", "name=x"])
        assert cfg.dataset.name == dataset


def test_the_pages_are_what_the_results_say(page: ModuleType, repository: Path) -> None:
    made = page.parts(repository / "results")
    for name in page.PAGES:
        text = (repository / name).read_text(encoding="utf-8")
        assert page.fill(text, made) == text, f"{name} is out of date: run `make results`"


def test_prose_has_short_lines(repository: Path) -> None:
    text = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


CELLS = sorted((Path(__file__).parents[2] / "results").glob("*.json"))


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_every_cell_has_a_command_for_a_fresh_machine_and_its_data(path: Path) -> None:
    record = json.loads(path.read_text())
    *_, program, multirun = shlex.split(record["command"])[:4]
    assert (program, multirun) == ("recsys_ssm.train", "--multirun")
    overrides = shlex.split(record["command"])[4:]
    assert not any(each.startswith(("ckpt_path", "output", "name")) for each in overrides)
    assert overrides[-1] == f"seed=range({len(record['seeds'])})"
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        arguments = open_options(overrides[:-1])
        cfg = hydra.compose("train", [*arguments, "output_dir=.", "name=x"])
    assert cfg.dataset.name == record["task"]["dataset"]
    for figures in record["per_seed"].values():
        assert all(len(digest) == 64 for digest in figures["data"].values())
    is_file = record["task"]["kind"] == "next_item"
    assert bool(figures["data"]) == is_file
