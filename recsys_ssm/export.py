"""Export a trained model: ``python -m recsys_ssm.export run=<folder of a run> format=onnx``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
from pathlib import Path

from omegaconf import DictConfig

from recsys_ssm.cli.command import command
from recsys_ssm.errors import UserError
from recsys_ssm.exporting.formats import export_model
from recsys_ssm.run.trained import load_model, open_run

log = logging.getLogger(__name__)


def export(cfg: DictConfig) -> list[Path]:
    """Write the model of ``cfg.run`` in ``cfg.format`` to the folder ``cfg.output`` (``conf/export.yaml``).

    Raises:
        UserError: There is no such run, an option is wrong, or the model cannot be exported.
    """
    if cfg.filter_seen not in (True, False, None):
        raise UserError(f"filter_seen={cfg.filter_seen}: expected true, false or null")
    run = open_run(str(cfg.run), cfg.checkpoint, cfg.output_root)
    model, _ = load_model(run)
    folder = Path(str(cfg.output)).expanduser()
    files = export_model(model, folder, str(cfg.format), filter_seen=cfg.filter_seen)
    for path in files:
        log.info("%s  %.1f MB", path, path.stat().st_size / 1e6)
    return files


main = command("export")(export)

if __name__ == "__main__":
    main()
