import os

# GNU OpenMP's threads spin for milliseconds after every parallel part, in case another follows. On processors that
# other work wants as well, that starves them all: with two busy processes on two cores a training step takes 2.3
# times as long as with a tenth of a millisecond, which costs nothing on an idle machine (docs/kernels.md); asleep at
# once, a step of many small parts takes half as long again. Read when PyTorch is loaded, so it is set before that.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"

__version__ = "0.1.0"
