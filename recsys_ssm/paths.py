"""Locate the shipped configs."""

from pathlib import Path

__all__ = ["CONF_DIR"]


def _conf_dir() -> Path:
    package = Path(__file__).resolve().parent
    inside = package / "conf"  # in a wheel
    return inside if inside.is_dir() else package.parent / "conf"  # in a checkout


CONF_DIR: Path = _conf_dir()
"""Folder of the shipped Hydra configs: ``recsys_ssm/conf`` when installed from a wheel, ``conf`` beside the package in
a checkout."""
