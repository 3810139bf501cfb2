"""The page on one's own dataset does what it says, from the first line to the last."""

import json
import re
import shlex
import subprocess
import sys

import pytest

QUICK = "trainer.max_steps=3 validations=1 trainer.enable_progress_bar=false backbone.n_layers=1 logger=none"


@pytest.fixture(scope="module")
def blocks(repository):
    """(language, text) of each code block of the page, made quick where it trains."""
    page = (repository / "docs" / "own_dataset.md").read_text()
    found = re.findall(r"```(bash|python)\n(.*?)```", page, flags=re.DOTALL)
    text = json.dumps(found)
    assert text.count("trainer.max_steps=300") == 2
    assert text.count("max_epochs=2)") == 1
    return json.loads(
        text.replace("trainer.max_steps=300", QUICK).replace("max_epochs=2)", "max_epochs=1)")
    )


@pytest.fixture(scope="module")
def folder(blocks, tmp_path_factory):
    """Where everything was run, each block on top of those before it."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "page.py").write_text("".join(code for kind, code in blocks if kind == "python"))
    script = "".join(code for kind, code in blocks if kind == "bash")
    # What is typed is what is tested: `python` is this interpreter.
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    script = f"set -e\n{python}\n{script}python page.py\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    (folder / "said").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_both_commands_train_and_test(folder):
    results = {
        path.parent.parent.name: json.loads(path.read_text())
        for path in folder.glob("runs/*/*/metrics.json")
    }
    assert set(results) == {"my_shop-mamba-seed0", "orders-mamba-seed0"}
    for result in results.values():
        assert result["steps"] == 3
        assert result["metrics"]["n_users"] == 30
        assert 0 <= result["metrics"]["ndcg@10"] <= 1
        assert result["baselines"]["popularity"]["ndcg@10"] > 0
        assert not result["generated"]
    notes = " ".join(results["my_shop-mamba-seed0"]["notes"])
    assert "300 users, 60 items" in notes
    assert "whole users are held out" in notes
    assert "the last by day" in " ".join(results["orders-mamba-seed0"]["notes"])


def test_the_example_in_python_recommends_ten_items(folder):
    said = (folder / "said").read_text()
    assert re.search(r"shape: \(10, 4\)", said)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "dataset.user_categorical=[age] dataset.user_numeric=[town]",
            "customers.csv, row 1, column 'town': ",
        ),
        ("dataset.split=time", "dataset.split='time': expected one of auto, users, interactions"),
        ("dataset.negative=2", "dataset.negative: no such option"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_results(folder, overrides, message):
    command = [
        "--config-dir",
        "my_conf",
        "dataset=my_shop",
        "logger=none",
        "name=mistake",
        *overrides.split(),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not list(folder.glob("runs/mistake/*/metrics.json"))
