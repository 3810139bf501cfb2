"""Turn a backbone's outputs into embeddings whose inner products are scores.

Legend: B rows, P positions, I items, D = d_model, S = size of the embedding that is compared.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ssm.instantiate import Configurable


class TowerHead(Configurable, nn.Sequential):
    """Map a tower's output to its embedding: D → hidden (ReLU) → S.

    Args:
        d_model: D.
        hidden: Width of the hidden layer; the paper's is 64.
        output: S; the paper's is 32.
        final_relu: Apply a ReLU after the last layer too. The paper's wording allows it, but scores are then ≥ 0 while
            Spotify has targets of -1; docs/results.md compares both.
    """

    def __init__(
        self, *, d_model: int, hidden: int = 64, output: int = 32, final_relu: bool = False
    ) -> None:
        super().__init__(
            nn.Linear(d_model, hidden),
            nn.ReLU(),
            nn.Linear(hidden, output),
            nn.ReLU() if final_relu else nn.Identity(),
        )


class NextItemHead(Configurable, nn.Module):
    """Prepare outputs and item embeddings so that their inner products are scores.

    Args:
        temperature: None: the score is the inner product. A number: the score is the cosine divided by it, so that no
            item scores high by its length alone.

    Raises:
        ValueError: ``temperature`` is not above 0.
    """

    def __init__(self, *, temperature: float | None = None) -> None:
        super().__init__()
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature={temperature}: give a number above 0, or null")
        self.temperature = temperature

    def query(self, x_PD: Tensor) -> Tensor:
        """Return the (P, D) vectors that are multiplied with the items."""
        if self.temperature is None:
            return x_PD
        return F.normalize(x_PD, dim=-1) / self.temperature

    def items(self, items_ID: Tensor) -> Tensor:
        """Return the (I, D) vectors that queries are multiplied with."""
        return items_ID if self.temperature is None else F.normalize(items_ID, dim=-1)
