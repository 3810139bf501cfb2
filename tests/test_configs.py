"""Every option composes and is what its class takes: a new file is tested without being named here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.cli.command import complete
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.features import FeatureSchema
from recsys_ssm.instantiate import defaults_of, import_target, plain
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import check_config, make_model
from recsys_ssm.run.published import published_for

GROUPS = ("backbone", "callbacks", "dataset", "debug", "optimizer", "scheduler", "text", "trainer")
OPTIONS = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))
]
LOGGERS = sorted(path.stem for path in (CONF_DIR / "logger").glob("*.yaml"))
EXPERIMENTS = sorted(
    str(path.relative_to(CONF_DIR / "experiment").with_suffix(""))
    for path in (CONF_DIR / "experiment").rglob("*.yaml")
)
PARTS = ("tokenizer", "head", "loss", "backbone", "model")


@pytest.fixture(autouse=True)
def composing() -> Iterator[None]:
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield


def compose(*overrides: str) -> DictConfig:
    cfg = hydra.compose("train", [*overrides, "output_dir=out", "name=test"])
    return complete(OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))


def files_of(*overrides: str) -> list[str]:
    """Return the files of ``conf/`` that a run is made of, as ``--info defaults`` lists them."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list("train", list(overrides), RunMode.RUN)
    paths = [f"{each.config_path}.yaml" for each in defaults.defaults]
    return [path for path in dict.fromkeys(paths) if (CONF_DIR / path).is_file()]


def options_set_in(path: str) -> set[str]:
    """Return the dotted options that a config file sets, with the place its content goes to."""
    text = (CONF_DIR / path).read_text()
    node = yaml.safe_load(text) or {}
    node.pop("defaults", None)
    node.pop("hydra", None)
    prefix = (
        ""
        if "@package _global_" in text or "/" not in path
        else f"{path.split('/', maxsplit=1)[0]}."
    )

    def leaves(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    return set(leaves(node, prefix))


@pytest.mark.parametrize(
    ("overrides", "at_most"),
    [(["dataset=hm", "backbone=mamba"], 8), (["experiment=next_item/best"], 10)],
)
def test_a_run_is_made_of_few_files_and_each_option_stands_in_one(
    overrides: list[str], at_most: int
) -> None:
    files = files_of(*overrides)
    assert len(files) <= at_most, files
    seen: dict[str, str] = {}
    for path in files:
        for option in options_set_in(path):
            # An experiment has a name of its own, and other classes than the task's.
            is_choice = option.endswith("_target_") or option == "name"
            # A dataset built on another names itself and its files.
            inherited = path.startswith("dataset/") and seen.get(option, "").startswith("dataset/")
            assert option not in seen or is_choice or inherited, (option, seen[option], path)
            seen[option] = path


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_names_only_what_deviates_from_its_class(path: Path) -> None:
    # The choice itself; a default that older versions of Optuna do not have.
    exempt = ("name", "kind", "constant_liar")

    def check(node: Any, where: str) -> None:
        if not isinstance(node, dict):
            return
        if isinstance(node.get("_target_"), str):
            defaults = defaults_of(import_target(node["_target_"], where))
            same = [
                key
                for key, value in node.items()
                if key in defaults and value == defaults[key] and key not in exempt
            ]
            assert not same, f"{where}: {same} repeat the class's defaults"
        for key, value in node.items():
            check(value, f"{where}.{key}")

    check(yaml.safe_load(path.read_text()) or {}, path.stem)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_fits_its_classes(experiment: str) -> None:
    cfg = compose(f"experiment={experiment}")
    check_config(cfg)
    has_figures = bool(published_for(plain(cfg)))
    # The paper has no figures of all articles.
    assert has_figures == (experiment != "two_tower/hm_full"), "compare with published figures"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_fits_its_class(group: str, option: str) -> None:
    check_config(compose(f"{group}={option}"))
    assert (CONF_DIR / group / f"{option}.yaml").read_text().lstrip().startswith("#"), (
        "say in a first line what it is"
    )


@pytest.mark.parametrize("option", LOGGERS)
def test_every_logger_composes(option: str) -> None:
    cfg = compose(f"logger={option}")
    try:
        check_config(cfg)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def data_of_task(task: str) -> Any:
    """Return what a model asks of a dataset: 3 items, one feature of a user."""
    schema = FeatureSchema.from_dict({"numeric": [], "categorical": []})
    common = {"item_ids": ["a", "b", "c"], "items": None, "generated": False, "notes": []}
    if task == "two_tower":
        splits = SimpleNamespace(
            user_schema=schema, item_schema=schema, relevant_above=0.0, **common
        )
        return SimpleNamespace(splits=splits, name="tiny")
    splits = SimpleNamespace(
        histories=None,
        item_schema=None,
        item_counts=torch.ones(3, dtype=torch.long),
        repeat_share=0.0,
        **common,
    )
    return SimpleNamespace(splits=splits, name="tiny", max_length=5, objective="all")


@pytest.mark.parametrize(
    ("task", "group", "option"),
    [
        (task, group, path.stem)
        for group in ("tokenizer", "head", "loss")
        for path in sorted((CONF_DIR / group).glob("*.yaml"))
        for task in ("two_tower", "next_item")
        if ("two towers" in path.read_text().partition("\n")[0]) == (task == "two_tower")
    ],
)
def test_tokenizer_head_and_loss_are_choices_of_their_own(
    task: str, group: str, option: str
) -> None:
    dataset = {"two_tower": "spotify", "next_item": "interactions"}[task]
    cfg = compose(f"dataset={dataset}", "backbone=mamba", f"{group}={option}")
    model = make_model(cfg, data_of_task(task))
    made = getattr(model if task == "next_item" else model.user_tower, group, None)
    made = made if made is not None else model.loss
    assert type(made) is import_target(cfg[group]["_target_"], group)


@pytest.mark.parametrize("task", ["two_tower", "next_item"])
def test_hydras_own_instantiate_makes_every_part(task: str) -> None:
    """A ``_target_`` means what it means to Hydra: the arguments beside it, run-time objects as keyword arguments."""
    dataset = {"two_tower": "spotify", "next_item": "interactions"}[task]
    cfg = hydra.compose("train", [f"dataset={dataset}", "backbone=mamba", "output_dir=out"])
    data = data_of_task(task)
    parts = {name: plain(cfg[name]) for name in ("tokenizer", "head", "loss", "backbone")}
    facts = import_target(cfg.model["_target_"], "model").arguments_from(data)
    model = hydra.utils.instantiate(cfg.model, **facts, **parts, _recursive_=False)
    backbone = hydra.utils.instantiate(cfg.backbone)
    assert backbone.d_model == plain(complete(cfg).backbone)["d_model"]
    if task == "two_tower":
        schema = FeatureSchema.from_dict(facts["user_schema"])
        tokenizer = hydra.utils.instantiate(cfg.tokenizer, schema=schema, d_model=8)
        head = hydra.utils.instantiate(cfg.head, d_model=8)
        hydra.utils.instantiate(cfg.loss)
    else:
        tokenizer = hydra.utils.instantiate(cfg.tokenizer, n_items=3, d_model=8, max_length=5)
        head = hydra.utils.instantiate(cfg.head)
        hydra.utils.instantiate(cfg.loss, n_items=3)
    optimizer = hydra.utils.instantiate(cfg.optimizer, params=model.parameters())
    assert type(optimizer).__name__ == "Adam" and tokenizer is not None and head is not None
    for callback in cfg.callbacks.values():
        hydra.utils.instantiate(callback)
    trainer = hydra.utils.instantiate(cfg.trainer, logger=False, barebones=False)
    assert trainer.max_steps == (5000 if task == "two_tower" else -1)


@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "recipe").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_is_found_by_its_name_and_wins_over_the_defaults(path: Path) -> None:
    dataset, _, backbone = path.stem.partition("_")
    recipe = OmegaConf.load(path)
    cfg = plain(compose(f"dataset={dataset}", f"backbone={backbone}"))
    assert published_for(cfg), "a recipe is a published one"
    assert cfg["optimizer"]["lr"] == recipe.optimizer.lr


def test_recipes_of_the_paper() -> None:
    rates = {"spotify": 1e-4, "hm": 1e-4, "vaccine": 1e-5}
    for dataset, rate in rates.items():
        for backbone in ("mamba", "transformer"):
            cfg = plain(compose(f"dataset={dataset}", f"backbone={backbone}"))
            assert cfg["optimizer"]["_target_"] == "torch.optim.Adam"
            assert cfg["optimizer"]["lr"] == rate and cfg["trainer"]["max_steps"] == 5000
            assert cfg["dataset"]["batch_size"] == 32 and cfg["backbone"]["d_model"] == 128
            assert cfg["head"] == {
                "_target_": "recsys_ssm.models.heads.TowerHead",
                "hidden": 64,
                "output": 32,
                "final_relu": False,
            }
            assert cfg["loss"] == {"_target_": "recsys_ssm.models.losses.MeanSquaredError"}


def test_the_published_cell_follows_the_dataset() -> None:
    row = published_for(
        plain(compose("dataset=vaccine", "++dataset.k=50", "++dataset.n_messages=100"))
    )
    assert row is not None and row.metrics["p@5"] == 0.0884 and row.metrics["hr@10"] == 0.4272
    other = plain(compose("dataset=vaccine", "++dataset.k=30", "++dataset.n_messages=30"))
    assert published_for(other) is None


def test_validations_are_spread_over_the_training() -> None:
    assert compose("trainer.max_steps=100", "validations=4").trainer.val_check_interval == 25
    assert compose("trainer.max_steps=1", "validations=4").trainer.val_check_interval == 1


@pytest.mark.parametrize("dataset", ["spotify", "interactions"])
def test_steps_and_epochs_mean_what_they_say_on_any_dataset(dataset: str) -> None:
    epochs = compose(f"dataset={dataset}", "++trainer.max_epochs=3").trainer
    assert epochs.max_epochs == 3 and epochs.max_steps == -1
    assert epochs.val_check_interval in (None, 1.0) and epochs.check_val_every_n_epoch == 1
    steps = compose(f"dataset={dataset}", "++trainer.max_steps=700").trainer
    assert steps.max_steps == 700 and steps.max_epochs in (None, -1)


@pytest.mark.parametrize(
    ("experiment", "total", "without_embeddings"),
    [
        ("sasrec", 321_984, 100_096),
        ("mamba4rec", 290_944, 72_256),
        ("2mamba4rec", 297_312, 78_624),
        ("hydra4rec", 286_854, 68_166),
    ],
)
def test_next_item_models_have_the_papers_parameters(
    experiment: str, total: int, without_embeddings: int
) -> None:
    """At ML-1M's 3,417 rows, padding included. (For Mamba4Rec the paper prints the next row's count.)"""
    cfg = compose(f"experiment=ml_1m/{experiment}")
    splits = SimpleNamespace(
        histories=None,
        item_ids=[str(i) for i in range(3416)],
        item_schema=None,
        items=None,
        item_counts=torch.ones(3416, dtype=torch.long),
        repeat_share=0.0,
    )
    data = SimpleNamespace(
        splits=splits,
        name="ml_1m",
        max_length=cfg.dataset.max_length,
        objective=cfg.dataset.objective,
    )
    model = make_model(cfg, data)
    assert model.parameter_counts() == {"total": total, "without_embeddings": without_embeddings}


def test_no_config_names_a_folder_of_ours() -> None:
    for path in CONF_DIR.rglob("*.yaml"):
        assert not re.search(r"shared/|/work/|/home/", path.read_text()), path
