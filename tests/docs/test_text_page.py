"""The page on titles and language models does what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("transformers", "peft", "bm25s"):
    pytest.importorskip(package, reason="the extra text is not installed")


@pytest.mark.slow
def test_text_page(run_page: Callable[[Path], Path], repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs" / "text.md").read_text()
    install = "```bash\npip install 'recsys-ssm[text]'\n```\n"
    assert install in page
    (tmp_path / "text.md").write_text(page.replace(install, ""))
    folder = run_page(tmp_path / "text.md")
    runs = {path.parent.parent.name: path for path in folder.glob("runs/*/*/metrics.json")}
    assert set(runs) == {
        "first", "shop-gpt4rec-seed0", "shop-llamarec-seed0", "shop-mamba-seed0", "shop-mamrec-seed0",
    }  # fmt: skip
    llamarec = json.loads(runs["shop-llamarec-seed0"].read_text())
    assert llamarec["two_stages"]["n_candidates"] == 20
    output = (folder / "output.txt").read_text()
    assert "Two stages: the target of" in output and "g00" in output
