"""A run's folder may be a stranger's: nothing in it is executed, and a broken one is one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from small import SMALL_MAMBA, TINY

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import TRUSTED, find
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.run.checkpoint_io import AtomicCheckpointIO, relocate
from recsys_ssm.run.settings import read_config
from recsys_ssm.run.trained import load_model, make_data, open_run

QUICK = (*TINY, *SMALL_MAMBA, "logger=none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to keep the first test's run in."""
    return tmp_path_factory.mktemp("trained") / "runs"


@pytest.fixture
def run(cli, tmp_path: Path, trained: Path) -> Path:
    if not trained.exists():
        assert cli("train", *QUICK).code == 0
        shutil.copytree(tmp_path / "runs", trained)
    else:
        shutil.copytree(trained, tmp_path / "runs")
    [folder] = tmp_path.glob("runs/*/*")
    return folder


@pytest.fixture
def change(run: Path):
    """Write the run's config with changes in it."""
    text = (run / "config.yaml").read_text()

    def write(path: str, value: object) -> None:
        config = yaml.safe_load(text)
        node = config
        *parents, name = path.split(".")
        for each in parents:
            node = node[each]
        node[name] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return write


def test_no_class_of_a_stranger_is_called(run: Path, change, cli, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "stranger.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for part in ("dataset", "model"):
        for target, arguments in (
            ("os.system", {"command": f"touch {mark}"}),
            ("subprocess.Popen", {"args": ["touch", str(mark)]}),
            ("builtins.exec", {"source": f"open({str(mark)!r}, 'w')"}),
            ("pathlib.Path.touch", {"self": str(mark)}),
            ("recsys_ssm.run.files.write_text", {"path": str(mark), "text": "x"}),
            ("recsys_ssm.instantiate.import_modules", {"names": ["stranger"]}),
            ("recsys_ssm.data.interactions.collect", {}),
            ("stranger.Thing", {}),
        ):
            change(part, {"_target_": target, **arguments})
            for command in ("evaluate", "recommend"):
                option = (
                    f"users={run / 'config.yaml'}" if command == "recommend" else "metrics=hr@1"
                )
                outcome = cli(command, f"run={run}", option)
                assert outcome.code == 1 and outcome.err.count("\n") == 1, outcome.text
                assert "_target_" in outcome.err and len(outcome.err) < 400
            assert not mark.exists(), target


def test_the_environment_is_not_read(run: Path, change, cli, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    change("name", "${oc.env:SECRET}")
    assert cli("evaluate", f"run={run}", "output_dir=out").code == 0
    found = [path for path in Path("out").rglob("*") if path.is_file()]
    assert found and not any(b"hunter2" in path.read_bytes() for path in found)
    assert b"${oc.env:SECRET}" in Path("out/metrics.json").read_bytes()


def test_a_strangers_dataset_fetches_and_writes_nothing(run: Path, change, tmp_path: Path) -> None:
    change(
        "dataset",
        {
            "_target_": "recsys_ssm.data.interactions.Interactions",
            "interactions": "absent.csv",
            "cache_dir": str(tmp_path / "elsewhere"),
            "download": {"url": "https://example.org/x.zip", "md5": "0" * 32, "member": "x"},
        },
    )
    data = make_data(open_run(str(run)), {})
    assert data.download is None and "elsewhere" not in str(data.cache)  # type: ignore[attr-defined]


BROKEN = {
    "empty": b"",
    "text": b"hello",
    "list": b"- 1\n- 2\n",
    "binary": bytes(range(256)),
    "utf-16": "dataset: {}".encode("utf-16"),
    "tab": b"a:\n\tb: 1\n",
    "python tag": b"!!python/object/apply:os.system ['touch mark']\n",
    "bad date": b"a: 2024-99-99\n",
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*b%d" % (i - 1) if i else b"*a"] * 9))
        for i in range(9)
    ),
    "recursive": b"a: &a [*a]\n",
    "deep": b"a: " + b"[" * 100_000,
    "no dataset": b"model: {_target_: recsys_ssm.models.two_tower.TwoTower}\n",
    "no model": b"dataset: {_target_: recsys_ssm.data.spotify.SpotifyData}\n",
    "model is text": b"model: TwoTower\ndataset: {_target_: recsys_ssm.data.spotify.SpotifyData}\n",
    "dataset is a list": b"model: {_target_: recsys_ssm.models.two_tower.TwoTower}\ndataset: [1]\n",
    "target is a number": b"model: {_target_: 3}\ndataset: {_target_: 4}\n",
    "target is a list": b"model: {_target_: [x]}\ndataset: {_target_: [x]}\n",
    "no target": b"model: {}\ndataset: {}\n",
    "abstract": b"model: {_target_: recsys_ssm.models.two_tower.TwoTower}\n"
    b"dataset: {_target_: recsys_ssm.data.two_tower.TwoTowerData}\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_config_is_one_line(run: Path, kind: str, cli) -> None:
    (run / "config.yaml").write_bytes(BROKEN[kind])
    outcome = cli("evaluate", f"run={run}")
    assert outcome.code == 1 and outcome.err.startswith("error: "), outcome.text
    assert outcome.err.count("\n") == 1 and len(outcome.err) < 400
    assert not Path("mark").exists()


@pytest.mark.parametrize("value", [None, "x", 1.5, [1], {"a": 1}, -1, True])
@pytest.mark.parametrize("option", ["n_test_users", "seed", "name", "batch_size"])
def test_wrong_values_are_one_line(run: Path, change, option: str, value: object) -> None:
    change(f"dataset.{option}", value)
    if value is None and option == "name":
        pytest.skip("no name")
    try:
        make_data(open_run(str(run)), {})
    except UserError as error:
        message = str(error)
    else:
        message = ""  # a value that is possible
    assert "\n" not in message and len(message) < 400


def test_only_exact_classes_are_found() -> None:
    for path in (
        "os.system",
        "subprocess.Popen",
        "torch.nn.Linear",
        "torch.optim.adam.torch",
        "torch.optim.Adam.step",
        "recsys_ssm.run.trained.open_run",
        "recsys_ssm.models.backbones.base.Path",
        "recsys_ssm.models.next_item.pl",
        "recsys_ssm.data.interactions.Path",
        "recsys_ssm.data.interactions.fetch_member",
        "recsys_ssm.cli.command.command",
        "recsys_ssm..x",
        "",
        "x",
    ):
        with pytest.raises(UserError):
            find(path, "part", Backbone)
    assert find("torch.optim.Adam", "optimizer", torch.optim.Optimizer) is torch.optim.Adam
    for path in ("recsys_ssm.Mamba", "recsys_ssm.models.backbones.mamba.Mamba"):
        assert find(path, "backbone", Backbone).__name__ == "Mamba"


def test_every_class_that_a_shipped_config_names_is_trusted(repository: Path) -> None:
    run_classes = ("recsys_ssm.run.", "recsys_ssm.sweeps.")  # never built from a run's folder
    for path in (repository / "conf").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            name = line.partition("_target_:")[2].strip()
            if name.startswith("recsys_ssm.") and not name.startswith(run_classes):
                assert name.rpartition(".")[0] in TRUSTED, name


def test_a_checkpoint_of_another_model_is_one_line(run: Path, change) -> None:
    change("model._target_", "recsys_ssm.models.next_item.NextItem")
    with pytest.raises(UserError, match="not a checkpoint of a NextItem model") as caught:
        load_model(open_run(str(run)))
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_moved_run_keeps_its_best_checkpoint(run: Path, cli, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    run.parent.rename(tmp_path / "moved" / run.parent.name)
    folder = tmp_path / "moved" / run.parent.name / run.name / "checkpoints"
    checkpoint = AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt", weights_only=True)
    states = [state for state in checkpoint["callbacks"].values() if "dirpath" in state]
    assert len(states) == 2 and all(state["dirpath"] == str(folder) for state in states)
    [best] = [state for state in states if state["monitor"]]
    assert best["best_model_path"] == str(folder / "best.ckpt")
    assert list(best["best_k_models"]) == [str(folder / "best.ckpt")]
    relocate({"callbacks": {"x": [1], "y": {"dirpath": 3, "best_model_path": 4}}}, folder)
    more = ("output_root=moved", "trainer.max_steps=16", "ckpt_path=last")
    assert cli("train", *QUICK, *more).code == 0


def test_weights_alone_are_not_resumed_from(cli) -> None:
    option = "callbacks.checkpoint_last.save_weights_only=true"
    assert cli("train", *QUICK, option).code == 0
    outcome = cli("train", *QUICK, option, "trainer.max_steps=16", "ckpt_path=last")
    assert outcome.code == 1 and "holds weights alone (save_weights_only=true)" in outcome.err
    assert outcome.err.count("\n") == 1


def test_read_config_reads_a_run(run: Path) -> None:
    assert read_config(run / "config.yaml")["seed"] == 0
