"""Open a trained run: its folder, its checkpoint, and the model and dataset that they describe.

A run's folder may be a stranger's. Its ``config.yaml`` is read as plain YAML: no interpolation is resolved, and a class
is used only if :func:`recsys_ssm.instantiate.find` trusts it. The same holds for a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import Spec, build, find, hints_of, plain
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import check_name
from recsys_ssm.run.checkpoints import read_checkpoint
from recsys_ssm.run.resume import KEY, fixed_options
from recsys_ssm.run.settings import read_config

log = logging.getLogger(__name__)

CHECKPOINTS = ("best", "last")


@dataclass(frozen=True)
class TrainedRun:
    """A run that was trained.

    Attributes:
        folder: Its folder.
        checkpoint: The checkpoint to use.
        config: Its ``config.yaml``, as plain data.
    """

    folder: Path
    checkpoint: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))


@contextlib.contextmanager
def named_by(option: str) -> Iterator[None]:
    """Put another option into the messages of :func:`open_run` and :func:`load_model`, which name ``run``.

    Raises:
        UserError: The error of the block, with ``option``.
    """
    try:
        yield
    except UserError as error:
        message = str(error)
        named = message.startswith("run=")
        raise UserError(
            f"{option}={message.removeprefix('run=')}" if named else f"{option}: {message}"
        ) from error


def open_run(run: str, which: str = "best", root: str | Path = "runs") -> TrainedRun:
    """Find a run and read its config.

    Args:
        run: A run's folder, the folder above it (its newest run), a checkpoint, a run's name under ``root``, or
            ``last``: the newest run under ``root``.
        which: ``best``, ``last`` or the name of a file in the folder of checkpoints, unless ``run`` is a checkpoint.
        root: ``output_root`` of the trainings.

    Raises:
        UserError: There is no such run, or its config cannot be used.
    """
    path = Path(run).expanduser()
    if which not in CHECKPOINTS:
        named = path / "checkpoints" / which
        if Path(which).name != which or not named.is_file():
            raise UserError(
                f"checkpoint={which}: expected best or last, or a file in {path / 'checkpoints'}"
            )
        return _checked(path, named)
    if path.is_file():
        return _checked(path.resolve().parent.parent, path)
    folder = _folder_of(run, path, Path(root))
    checkpoint = folder / "checkpoints" / f"{which}.ckpt"
    last = checkpoint.with_name("last.ckpt")
    if not checkpoint.is_file() and last.is_file():
        log.warning("%s: no %s in it, last.ckpt is used", folder, checkpoint.name)
        checkpoint = last
    if not checkpoint.is_file():
        raise UserError(
            f"run={run}: no checkpoints/{which}.ckpt in it; give a run's folder or a .ckpt file"
        )
    return _checked(folder, checkpoint)


def _folder_of(run: str, path: Path, root: Path) -> Path:
    """Return the folder of the run that ``run`` names."""
    if run == "last" and not path.is_dir():
        newest = _newest(root, "*/*/checkpoints")
        if newest is None:
            raise UserError(f"run=last: no trained run under {root}; give a run's folder")
    elif (path / "checkpoints").is_dir():
        return path
    else:
        found = _newest(path, "*/checkpoints") or _newest(root / path, "*/checkpoints")
        if found is None:
            return path
        newest = found
    log.info("run        %s", newest)
    return newest


def _newest(folder: Path, pattern: str) -> Path | None:
    """Return the newest run below a folder: the folders of runs are named after their time."""
    found = [path.parent for path in folder.glob(pattern) if any(path.glob("*.ckpt"))]
    return max(found, key=lambda each: each.name, default=None)


def _checked(folder: Path, checkpoint: Path) -> TrainedRun:
    """Read a run's config and check the parts that are used."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; it says which model and dataset the run has: give a run's folder"
        )
    config = read_config(path)
    for part in ("model", "dataset"):
        if not isinstance(config.get(part), Mapping):
            raise UserError(f"{path}: {part} is not a group of options; give the folder of a run")
        if not isinstance(config[part].get("_target_"), str):
            raise UserError(f"{path}: {part} has no class (_target_); give the folder of a run")
    return TrainedRun(folder, checkpoint, config)


def load_model(run: TrainedRun) -> tuple[Recommender, dict[str, Any]]:
    """Load the model of a run, and the record that its checkpoint has of the training (empty without one).

    Raises:
        UserError: The file is damaged, or is not a checkpoint of such a model.
    """
    target = run.config["model"]["_target_"]
    model_class = find(target, "model", Recommender)
    if not issubclass(model_class, Recommender):
        raise UserError(f"model._target_={target}: not a Recommender; give the folder of a run")
    record = read_checkpoint(run.checkpoint).get(KEY)
    try:
        model: Recommender = model_class.load_from_checkpoint(
            run.checkpoint, map_location="cpu", weights_only=True
        )
    except UserError as error:
        raise UserError(f"{run.checkpoint}: {error}") from error
    except Exception as error:  # whatever another model's or a stranger's hyperparameters cause
        raise UserError(
            f"{run.checkpoint}: not a checkpoint of a {model_class.__name__} model "
            f"({_first_line(error)}); give the checkpoint of this run"
        ) from error
    return model, dict(record) if isinstance(record, Mapping) else {}


def make_data(run: TrainedRun, changes: Any) -> RecommenderData[Any]:
    """Build the dataset of a run.

    Args:
        run: The run.
        changes: Options of the dataset that the user changes, as a config or plain data.

    Raises:
        UserError: The dataset is not one of this package or of a module that the user named, or an option is wrong.
    """
    spec = _located(_without_foreign(run.config["dataset"]), run)
    spec = _merged(spec, plain(changes) or {})
    if isinstance(spec.get("name"), str):
        check_name(spec["name"], "dataset.name")
    try:
        made: RecommenderData[Any] = build(spec, RecommenderData, "dataset")  # type: ignore[type-abstract]
    except UserError:
        raise
    except Exception as error:  # values of a type that the class does not expect
        raise UserError(
            f"{run.folder / 'config.yaml'}: dataset cannot be made ({_first_line(error)}); correct its options"
        ) from error
    return made


def check_same_data(
    run: TrainedRun, record: Mapping[str, Any], data: RecommenderData[Any], changes: Any
) -> None:
    """Check that a dataset has the items, the users and the split of a run's training.

    Args:
        run: The run.
        record: Record of its checkpoint.
        data: The dataset.
        changes: Options of the dataset that the user changed.

    Raises:
        UserError: They differ; the message names the option that was changed, if there is one.
    """
    now = {"dataset": _merged(run.config["dataset"], plain(changes) or {})}
    before = fixed_options({"dataset": run.config["dataset"]})
    changed = [key for key, value in fixed_options(now).items() if before.get(key) != value]
    known = record.get("data")
    if isinstance(known, Mapping):
        different = [key for key, value in data.identity().items() if known.get(key) != value]
        if not different:
            return
        what = " and ".join(different)
    elif changed:
        what = "split"
    else:
        return
    if changed:
        key = changed[0]
        value = fixed_options(now)[key]
        raise UserError(
            f"{key}={value}: the run was trained with {before.get(key, 'the default')}, and with this value the "
            f"{what} of the data would differ: rows that were trained on would be tested; leave it as in the training"
        )
    raise UserError(
        f"run={run.folder}: the data's {what} differ from those of the training (the files have changed); evaluate on "
        "the data the run was trained with, or train again"
    )


def _without_foreign(spec: Spec) -> dict[str, Any]:
    """Return a dataset's spec without the options by which a stranger could fetch or write files."""
    kept = {name: value for name, value in spec.items() if name != "cache_dir"}
    if kept.get("download") is not None and kept["download"] not in _shipped_downloads():
        del kept["download"]
    return kept


@functools.cache
def _shipped_downloads() -> list[Any]:
    """Return the downloads that the shipped configs name, also as runs of version 0.1 have them, without titles."""
    configs = [yaml.safe_load(path.read_text()) for path in (CONF_DIR / "dataset").glob("*.yaml")]
    downloads = [config["download"] for config in configs if config and config.get("download")]
    return downloads + [{k: v for k, v in each.items() if k != "titles"} for each in downloads]


def _located(spec: dict[str, Any], run: TrainedRun) -> dict[str, Any]:
    """Return a dataset's spec with relative paths that lead to the files of the training.

    Paths are relative to the folder that the training ran in, if the files are still there, else to the current one.
    """
    folder = _working_folder(run.folder)
    if folder is None or folder == Path.cwd():
        return spec
    hints = hints_of(find(spec["_target_"], "dataset", RecommenderData))
    moved = dict(spec)
    for name, value in spec.items():
        if Path not in get_args(hints.get(name)):
            continue
        if isinstance(value, str):
            moved[name] = _below(folder, value)
        elif isinstance(value, list):
            moved[name] = [
                _below(folder, each) if isinstance(each, str) else each for each in value
            ]
    if moved != spec:
        log.info("data       paths are relative to %s, where the run was trained", folder)
    return moved


def _below(folder: Path, path: str) -> str:
    """Return a path below a folder if it exists there; an absolute one, and any other, stays."""
    try:
        return str(folder / path) if (folder / path).exists() else path
    except (OSError, ValueError):  # too long, or with a null byte
        return path


def _working_folder(run: Path) -> Path | None:
    """Return the folder that a training ran in, which Hydra recorded; None if that is not known."""
    path = run / ".hydra" / "hydra.yaml"
    if not path.is_file():
        return None
    try:
        runtime = read_config(path).get("hydra", {}).get("runtime", {})
        folder = Path(runtime["cwd"])
        return folder if folder.is_dir() else None
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options with changes put in."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
