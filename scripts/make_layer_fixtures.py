"""Write outputs and gradients of a peer's layers on random numbers to tests/fixtures/layers_<peer>.npz, in float64.

    <folder>/recbole/bin/python scripts/make_layer_fixtures.py recbole      # SASRec's encoder, two layers
    <folder>/rectools/bin/python scripts/make_layer_fixtures.py rectools    # LiGR, two layers (eSASRec)
    <folder>/skrecsys/bin/python scripts/make_layer_fixtures.py skrecsys    # Mamba4Rec, one layer and two

The environments are those of benchmarks/peers/install.py. The file holds only numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
D, LENGTH, ROWS = 8, 7, 3
Made = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]


def hidden() -> Tensor:
    """Return a mask (L, L) that is True where a position may not look."""
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def recbole() -> dict[str, Made]:
    from recbole.model.layers import TransformerEncoder

    encoder = TransformerEncoder(
        n_layers=2, n_heads=2, hidden_size=D, inner_size=4 * D, hidden_act="gelu"
    )
    mask = torch.where(hidden(), -10000.0, 0.0).double()[None, None]
    return {"sasrec": (encoder, lambda model, x: model(x, mask)[-1])}


def rectools() -> dict[str, Made]:
    from rectools.models.nn.transformers.ligr import LiGRLayers

    layers = LiGRLayers(n_blocks=2, n_factors=D, n_heads=2, dropout_rate=0.2)
    return {"ligr": (layers, lambda model, x: model(x, None, hidden(), None))}


def skrecsys() -> dict[str, Made]:
    from skrecsys.nn._mamba4rec import _Mamba4RecLayer

    def layers(n: int) -> nn.ModuleList:
        generator = torch.Generator().manual_seed(0)
        made = nn.ModuleList(
            _Mamba4RecLayer(D, 4, 4, 2 * D, 1, 4 * D, 0.2, residual=n > 1) for _ in range(n)
        )
        for layer in made:
            layer.reset_parameters(generator)
        return made

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        for layer in model:
            x = layer(x, None)
        return x

    return {f"mamba4rec_{n}": (layers(n), forward) for n in (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=["recbole", "rectools", "skrecsys"])
    peer = parser.parse_args().peer
    torch.manual_seed(0)
    stored: dict[str, np.ndarray] = {}
    for name, (model, forward) in globals()[peer]().items():
        model.double().eval()
        with torch.no_grad():  # biases of 0, norms of 1 and weights of 0.02 would hide mistakes
            for key, parameter in model.named_parameters():
                if "a_log" not in key:
                    parameter.copy_(torch.randn_like(parameter) / 3)
        x = torch.randn(ROWS, LENGTH, D, dtype=torch.float64, requires_grad=True)
        y = forward(model, x)
        dy = torch.randn_like(y)
        y.backward(dy)
        stored |= {f"{name}/x": x, f"{name}/y": y, f"{name}/dy": dy, f"{name}/dx": x.grad}
        for key, parameter in model.named_parameters():
            stored[f"{name}/parameter/{key}"] = parameter
            stored[f"{name}/gradient/{key}"] = parameter.grad
    path = FIXTURES / f"layers_{peer}.npz"
    np.savez_compressed(path, **{key: tensor.detach().numpy() for key, tensor in stored.items()})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
