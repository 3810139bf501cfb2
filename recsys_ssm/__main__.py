"""Print the version and the commands: ``python -m recsys_ssm``."""

import sys

from recsys_ssm import __version__

COMMANDS = {
    "train": "train, test and report one run, or a sweep with --multirun",
    "evaluate": "test a trained model again",
    "recommend": "write recommendations of a trained model to a file",
    "report": "tables and figures of finished runs",
    "search": "search hyperparameters with Optuna",
    "batched_seeds": "train several seeds of a two-tower model as one computation",
}


def main() -> None:
    """Print the version, or the list of commands."""
    if "--version" in sys.argv[1:] or "-V" in sys.argv[1:]:
        print(f"recsys-ssm {__version__}")
        return
    print(f"recsys-ssm {__version__}\n\nCommands (python -m recsys_ssm.<command> option=value …):")
    for name, does in COMMANDS.items():
        print(f"  {name:<14} {does}")
    print(
        "\nStart with:  python -m recsys_ssm.train dataset=spotify backbone=mamba"
        "\nAll options: python -m recsys_ssm.train --cfg job"
    )
    if sys.argv[1:] not in ([], ["--help"], ["-h"]):
        sys.exit(f"error: {' '.join(sys.argv[1:])}: not an option; name a command as above")


if __name__ == "__main__":
    main()
