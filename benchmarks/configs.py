"""Compose the configs of benchmarks as the commands do."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from recsys_ssm.cli.command import complete, open_options
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.paths import CONF_DIR

__all__ = ["config"]


def config(overrides: Sequence[str]) -> DictConfig:
    """Return the config of ``python -m recsys_ssm.train`` with these overrides, defaults filled in."""
    register_resolvers()
    arguments = open_options([*overrides, "name=benchmark", "output_dir=."])
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return complete(compose("train", arguments))
