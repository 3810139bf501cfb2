"""Make tables and figures of finished runs: ``python -m recsys_ssm.report <folder> [<folder> …]``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
import sys
from pathlib import Path

from omegaconf import DictConfig

from recsys_ssm.cli.command import command
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import plain
from recsys_ssm.reports import archive, build, on_wandb
from recsys_ssm.reports.collect import collect
from recsys_ssm.reports.runs import Collection
from recsys_ssm.reports.tables import Options
from recsys_ssm.run.files import write_bytes

log = logging.getLogger(__name__)

FORMATS = ("md", "tex", "html")


def report(cfg: DictConfig) -> Collection:
    """Write the report that ``cfg`` (``conf/report.yaml``) describes, and return what it was made from.

    Raises:
        UserError: A folder does not exist or holds no run, or an option has an invalid value.
    """
    sources = [cfg.sweep] if isinstance(cfg.sweep, str) else plain(cfg.sweep)
    formats = [cfg.formats] if isinstance(cfg.formats, str) else plain(cfg.formats)
    if unknown := set(formats) - set(FORMATS):
        raise UserError(f"formats={', '.join(sorted(unknown))}: choose from {', '.join(FORMATS)}")
    if not 0 < cfg.confidence < 1:
        raise UserError(f"confidence={cfg.confidence}: choose a number between 0 and 1")
    options = Options(int(cfg.min_seeds), float(cfg.confidence))

    folders = [Path(source) for source in sources if not source.startswith(on_wandb.PREFIX)]
    others, problems = [], []
    for source in sources:
        if source.startswith(on_wandb.PREFIX):
            found, left_out = on_wandb.read_runs(source)
            others += found
            problems += left_out
    collection = collect(folders, others)
    collection.problems.extend(problems)
    for problem in collection.problems:
        log.info("left out  %s: %s", *problem)
    if not collection.cells and not collection.trials:
        where = ", ".join(map(str, sources))
        raise UserError(
            f"sweep={where}: no finished run in it ({len(collection.problems)} others); give a folder of runs"
        )
    document = build.build(collection, str(cfg.title), options)
    output = Path(cfg.output or (folders[0] / "report" if folders else "report"))
    for path in build.write(document, output, formats):
        log.info("report    %s", path)
    if cfg.wandb:
        on_wandb.log_report(document, str(cfg.wandb), output)
    if cfg.results:
        results = Path(cfg.results)
        for path in archive.write_cells(collection.cells, results):
            log.info("results   %s", path)
        (results / "figures").mkdir(exist_ok=True)
        for image in document.images:
            write_bytes(results / "figures" / f"{image.name}.png", image.png)
    return collection


def folders_first(arguments: list[str]) -> list[str]:
    """Turn the folders of a command line, given as plain words, into the option ``sweep``."""
    words = [each for each in arguments if not each.startswith("-") and "=" not in each]
    if not words:
        return arguments
    quoted = ",".join("'{}'".format(word.replace("'", "\\'")) for word in words)
    return [f"sweep=[{quoted}]", *(each for each in arguments if each not in words)]


_command = command("report")(report)


def main() -> None:
    sys.argv[1:] = folders_first(sys.argv[1:])
    _command()


if __name__ == "__main__":
    main()
