"""Install each peer in a virtual environment of its own.

    python benchmarks/peers/install.py [recbole rectools skrecsys] [--folder ~/.cache/recsys_ssm/peers]

torch stays below 2.14, because later versions bring gigabytes of CUDA libraries.
"""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

FOLDER = Path.home() / ".cache" / "recsys_ssm" / "peers"
PACKAGES = {
    # RecBole 1.2.1 needs numpy 1, pandas 2 and a setuptools with pkg_resources.
    "recbole": ["recbole==1.2.1", "numpy==1.26.4", "pandas<3", "scipy<1.15", "setuptools<81"],
    "rectools": ["rectools[torch]==0.19.0"],
    "skrecsys": ["skrecsys[nn]==0.9.0"],
}


def python_of(folder: Path, peer: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return folder.expanduser() / peer / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", choices=[[], *PACKAGES], help="default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    for peer in args.peers or PACKAGES:
        python = python_of(args.folder, peer)
        if not python.exists():
            venv.create(python.parent.parent, with_pip=True)
        command = [python, "-m", "pip", "install", "--quiet", "torch>=2.6,<2.14", *PACKAGES[peer]]
        subprocess.run(command, check=True)
        print(f"{peer}: {python}")


if __name__ == "__main__":
    main()
