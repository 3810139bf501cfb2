"""What the README shows runs as written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
from pages import blocks, commands
from small import SMALL_MAMBA, TINY

README = Path(__file__).resolve().parents[2] / "README.md"


def command_with(*words: str) -> list[str]:
    """Return the arguments of the one command of the README that has some words."""
    (found,) = [line for line in commands(README) if set(words) <= set(line)]
    return found[3:]


def test_it_is_short_and_keeps_its_generated_tables() -> None:
    text = README.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 118
    for part in ("readme", "readme next-item"):
        assert f"<!-- results: {part} -->\n|" in text
        assert f"<!-- end of results: {part} -->" in text


def test_speeds_are_those_that_were_measured(repository: Path) -> None:
    peers = (repository / "benchmarks" / "peers" / "README.md").read_text()
    rows = re.findall(
        r"^\| .*one epoch \| (\w+ [\d.]+) \| ([\d.]+) s \| ([\d.]+) s \| \*\*([\d.]+) ×\*\* \| ([\d.]+) × less",
        README.read_text(),
        re.MULTILINE,
    )
    assert len(rows) == 4
    for _, theirs, here, factor, memory in rows:
        assert f"| {theirs} |" in peers
        (line,) = [line for line in peers.splitlines() if f"| {here} ({factor}x) |" in line]
        if here == "0.23":  # the page gives the two sizes, in MiB
            assert line.endswith("| 513 |") and round(964 / 513, 1) == float(memory)
        else:
            assert line.endswith(f"({memory}x) |")
    kernels = (repository / "docs" / "kernels.md").read_text()
    section = kernels.partition("## Selective scan")[2].partition("\n## ")[0]
    table = [line.split("|")[1:-1] for line in section.splitlines() if re.match(r"\| \d", line)]
    for column, shown in ((6, "12–26"), (7, "36–145")):
        factors = [float(f) for row in table for f in re.findall(r"[\d.]+", row[column])]
        low, high = map(int, shown.split("–"))
        assert (round(min(factors)), round(max(factors))) == (low, high)
        assert f"**{shown} ×**" in README.read_text()


def test_the_lines_of_python(tmp_path: Path) -> None:
    (block,) = [block for block in blocks(README) if block.language == "python"]
    assert len([line for line in block.text.splitlines() if line and line[0] != "#"]) <= 10
    (tmp_path / "readme.py").write_text(block.text)
    done = subprocess.run(
        [sys.executable, "readme.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(README.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"shape: \(10, 4\)", done.stdout)


def test_the_first_command_and_those_after_it(cli: Callable[..., object], tmp_path: Path) -> None:
    quick = [*TINY, *SMALL_MAMBA[1:], "logger=none"]
    outcome = cli("train", *command_with("dataset=spotify", "backbone=mamba"), *quick)
    assert outcome.code == 0, outcome.text
    (folder,) = (tmp_path / "runs" / "spotify-mamba-seed0").iterdir()
    assert {"metrics.json", "config.yaml", "curves.png"} <= {path.name for path in folder.iterdir()}
    baselines = json.loads((folder / "metrics.json").read_text())["baselines"]
    assert set(baselines) == {"random", "popularity", "oracle"}
    evaluate = [a.replace("<time>", folder.name) for a in command_with("recsys_ssm.evaluate")]
    outcome = cli("evaluate", *evaluate)
    assert outcome.code == 0, outcome.text


def test_your_data(cli: Callable[..., object], tmp_path: Path) -> None:
    rows = [(f"c{user}", f"a{(user + step) % 20}", step) for user in range(30) for step in range(6)]
    pl.DataFrame(rows, ["customer", "article", "time"], orient="row").write_csv(
        tmp_path / "events.csv"
    )
    quick = ["trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=none"]
    outcome = cli("train", *command_with("dataset.interactions=events.csv"), *quick)
    assert outcome.code == 0, outcome.text
    (folder,) = (tmp_path / "runs" / "interactions-mamba2-seed0").iterdir()
    recommend = [a.replace("<time>", folder.name) for a in command_with("recsys_ssm.recommend")]
    outcome = cli("recommend", *recommend)
    assert outcome.code == 0, outcome.text
    top = pl.read_csv(tmp_path / "top.csv")
    assert top.columns == ["user", "rank", "item", "score"]
    assert top["user"].n_unique() == 30
