"""Train several seeds at once: ``python -m recsys_ssm.batched_seeds dataset=spotify backbone=mamba seeds=4``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
from omegaconf import OmegaConf

from recsys_ssm.batched_seeds.train import name_of_seeds, train_seeds
from recsys_ssm.cli.command import command

OmegaConf.register_new_resolver("name_of_seeds", name_of_seeds, replace=True)

main = command("batched_seeds")(train_seeds)

if __name__ == "__main__":
    main()
