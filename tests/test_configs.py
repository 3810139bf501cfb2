"""Every option composes and is what its class takes: a new file is tested without being named here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.instantiate import check, plain
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import make_model

GROUPS = (
    "backbone",
    "optimizer",
    "scheduler",
    "trainer",
    "callbacks",
    "logger",
    "debug",
    "head",
    "tokenizer",
    "dataset",
)
OPTIONS = [
    (group, path.stem) for group in GROUPS for path in sorted((CONF_DIR / group).glob("*.yaml"))
]


@pytest.fixture(autouse=True)
def composing() -> Iterator[None]:
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield


def compose(*overrides: str) -> DictConfig:
    cfg = hydra.compose("train", [*overrides, "output_dir=out", "name=test"])
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))


EXPERIMENTS = sorted(
    str(path.relative_to(CONF_DIR / "experiment").with_suffix(""))
    for path in (CONF_DIR / "experiment").rglob("*.yaml")
)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_fits_its_classes(experiment: str) -> None:
    cfg = compose(f"experiment={experiment}")
    check(cfg, "dataset", "backbone", "optimizer", "scheduler", "trainer")
    assert plain(cfg.published), "an experiment is a row of a paper's table or has figures of ours"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_fits_its_class(group: str, option: str) -> None:
    cfg = compose(f"{group}={option}")
    check(
        cfg,
        "dataset",
        "backbone",
        "optimizer",
        "scheduler",
        "trainer",
        "logger",
        *(f"callbacks.{name}" for name in cfg.callbacks),
    )
    assert (CONF_DIR / group / f"{option}.yaml").read_text().lstrip().startswith("#"), (
        "say in a first line what it is"
    )


@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "recipe").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_is_found_by_its_name_and_wins_over_the_defaults(path: Path) -> None:
    dataset, _, backbone = path.stem.partition("_")
    recipe = OmegaConf.load(path)
    cfg = plain(compose(f"dataset={dataset}", f"backbone={backbone}"))
    assert cfg["published"], "a recipe is a published one"
    assert cfg["optimizer"]["lr"] == recipe.optimizer.lr
    assert cfg["trainer"]["max_steps"] == 5000


def test_recipes_of_the_paper() -> None:
    rates = {"spotify": 1e-4, "hm": 1e-4, "vaccine": 1e-5}
    for dataset, rate in rates.items():
        for backbone in ("mamba", "transformer"):
            cfg = plain(compose(f"dataset={dataset}", f"backbone={backbone}"))
            assert (
                cfg["optimizer"]["_target_"] == "torch.optim.Adam"
                and cfg["optimizer"]["lr"] == rate
            )
            assert cfg["dataset"]["batch_size"] == 32 and cfg["backbone"]["d_model"] == 128
            head = cfg["head"]
            assert head.pop("_target_") == "recsys_ssm.models.two_tower.TwoTower"
            assert head.pop("metrics") == cfg["metrics"]
            assert head == {"hidden": 64, "output": 32, "final_relu": False, "loss": "mse"}


def test_the_published_cell_follows_the_dataset() -> None:
    cell = plain(compose("dataset=vaccine", "dataset.k=50", "dataset.n_messages=100"))["published"]
    assert cell["p@5"] == 0.0884 and cell["hr@10"] == 0.4272
    assert not plain(compose("dataset=vaccine", "dataset.k=30", "dataset.n_messages=30"))[
        "published"
    ]


def test_validations_are_spread_over_the_training() -> None:
    assert compose("trainer.max_steps=100", "validations=4").trainer.val_check_interval == 25
    assert compose("trainer.max_steps=1", "validations=4").trainer.val_check_interval == 1


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
    )
    data = SimpleNamespace(
        splits=splits,
        name="ml_1m",
        max_length=cfg.dataset.max_length,
        objective=cfg.dataset.objective,
    )
    model = make_model(cfg, data)
    assert model.parameter_counts() == {"total": total, "without_embeddings": without_embeddings}
