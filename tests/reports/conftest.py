"""Make the folder of a sweep after a bad night."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reports.fake import fake_run


@pytest.fixture(scope="session")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seeds of Spotify, three of two vaccine cells, generated H&M, a tuned setting, and broken folders."""
    root = tmp_path_factory.mktemp("night")
    for seed in range(12):
        fake_run(root, "spotify", "mamba", seed)
        fake_run(root, "spotify", "transformer", seed, level=0.899)
    for seed in range(3):
        for backbone in ("mamba", "transformer"):
            for cell in ((25, 25), (25, 50)):
                fake_run(root / "deep" / "er", "vaccine", backbone, seed, cell)
            fake_run(root, "hm", backbone, seed, level=0.15, generated=True)
        fake_run(root, "spotify", "mamba", seed, level=0.97, options={"optimizer.lr": 3e-4})

    good = fake_run(root / "bad", "spotify", "mamba", 50)
    (root / "bad" / "empty").mkdir()
    for name, text in {
        "foreign": '{"loss": 0.5}',
        "cut": '{"name": "x", "metrics": {"p@5": 0.',
        "untested": '{"name": "x", "dataset": "spotify", "versions": {}, "seed": 1}',
        "list": "[1, 2]",
    }.items():
        (root / "bad" / name).mkdir()
        (root / "bad" / name / "metrics.json").write_text(text)
    for name in ("half", "no_config", "bad_config", "bad_history"):
        shutil.copytree(good, root / "bad" / name)
    (root / "bad" / "half" / "metrics.json").unlink()
    (root / "bad" / "no_config" / "config.yaml").unlink()
    (root / "bad" / "bad_config" / "config.yaml").write_text("a: [1")
    # Not a reason to leave it out: it has its figures. A seed of its own.
    history = root / "bad" / "bad_history"
    (history / "history.json").write_text("[{")
    (history / "test_users.parquet").write_bytes(b"PAR1")
    text = (history / "metrics.json").read_text().replace('"seed": 50', '"seed": 51')
    (history / "metrics.json").write_text(text)
    failed = root / "bad" / "failed"
    failed.mkdir()
    (failed / "job_status.json").write_text(
        '{"state": "failed", "error": "Traceback …\\nRuntimeError: diverged"}'
    )
    return root
