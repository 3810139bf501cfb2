"""Where the shipped configs are."""

from pathlib import Path

__all__ = ["CONF_DIR"]


def _conf_dir() -> Path:
    package = Path(__file__).resolve().parent
    inside = package / "conf"  # a wheel carries the configs within the package
    return inside if inside.is_dir() else package.parent / "conf"  # a checkout, beside it


CONF_DIR: Path = _conf_dir()
"""The folder of the shipped Hydra configs: ``recsys_ssm/conf`` when installed from a wheel,
``conf`` beside the package in a checkout."""
