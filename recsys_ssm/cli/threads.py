"""Set how long OpenMP's threads spin, before PyTorch loads OpenMP. Every command imports this module first.

After a parallel part, the threads of GNU OpenMP spin for milliseconds and wait for the next one. On processors that
other work needs too, this starves everything: with two busy processes on two cores a training step takes 2.3 times as
long as with a tenth of a millisecond, which costs nothing on an idle machine (docs/kernels.md). Threads that sleep at
once make a step of many small parts half as long again.

Only a command's own process changes (``python -m recsys_ssm.train``) and, through the environment, its children. A
program that imports the package sets ``GOMP_SPINCOUNT`` itself.
"""

import os
import sys

SPIN_COUNT = "10000"
"""About a tenth of a millisecond."""


def spin_briefly() -> None:
    """Set ``GOMP_SPINCOUNT`` unless the user has chosen how threads wait."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def _is_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] == "recsys_ssm"


if _is_command():
    spin_briefly()
