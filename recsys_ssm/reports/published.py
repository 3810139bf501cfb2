"""Figures that other people published and that no recipe of ours carries: the second paper's three tables.

The first paper's are in ``conf/recipe/``, beside what they were reached with.
"""

from __future__ import annotations

from typing import NamedTuple


class NextItemRow(NamedTuple):
    """A row of the second paper's tables; None where it prints nothing."""

    model: str
    hr10: float
    ndcg10: float | None
    mrr10: float | None
    latency: float | None
    parameters: str
    without_embeddings: str


# "Exploring State Space Models' Application to Recommender Systems", tables 1 to 3, by dataset of ours.
# The paper gives latency no unit.
NEXT_ITEM: dict[str, tuple[NextItemRow, ...]] = {
    "amazon_beauty_2023": (
        NextItemRow("SASRec", 0.048, 0.028, 0.022, 0.117, "13,636,224", "100,096"),
        NextItemRow("Mamba4Rec", 0.046, 0.027, 0.028, 0.078, "13,605,184", "78,624"),
        NextItemRow("2Mamba4Rec", 0.048, 0.030, 0.025, 0.096, "13,605,184", "78,624"),
        NextItemRow("Hydra4Rec", 0.070, 0.043, 0.035, 0.0005, "842,694", "–"),
        NextItemRow("MamRec", 0.031, 0.020, 0.017, 2.51, "130M", "–"),
        NextItemRow("GPT4Rec", 0.030, 0.025, 0.015, 2.32, "117M", "–"),
        NextItemRow("LlamaRec", 0.093, 0.040, 0.040, None, "7B", "–"),
    ),
    "amazon_games_2023": (
        NextItemRow("SASRec", 0.119, 0.073, 0.059, 0.129, "1,790,016", "100,096"),
        NextItemRow("Mamba4Rec", 0.107, 0.061, 0.048, 0.077, "1,765,344", "78,624"),
        NextItemRow("2Mamba4Rec", 0.110, 0.061, 0.047, 0.127, "1,765,344", "78,624"),
        NextItemRow("Hydra4Rec", 0.112, 0.059, 0.044, 0.0005, "751,238", "–"),
        NextItemRow("MamRec", 0.083, 0.033, 0.025, 2.51, "130M", "–"),
        NextItemRow("GPT4Rec", 0.080, 0.042, 0.026, 2.32, "117M", "–"),
        NextItemRow("LlamaRec", 0.150, 0.098, 0.064, None, "7B", "–"),
    ),
    "ml_1m": (
        NextItemRow("SASRec", 0.224, 0.117, 0.084, 0.128, "321,984", "100,096"),
        NextItemRow("Mamba4Rec", 0.306, 0.178, 0.138, 0.016, "297,312", "78,624"),
        NextItemRow("2Mamba4Rec", 0.340, 0.193, 0.148, 0.021, "297,312", "78,624"),
        NextItemRow("Hydra4Rec", 0.308, 0.179, 0.140, 0.0005, "286,854", "–"),
        NextItemRow("MamRec", 0.201, 0.072, 0.064, 2.51, "130M", "–"),
        NextItemRow("GPT4Rec", 0.212, 0.074, 0.060, 3.23, "117M", "–"),
        NextItemRow("LlamaRec", 0.148, 0.067, None, None, "7B", "–"),
    ),
}

ERRATA = (
    "The second paper's Mamba4Rec on Beauty has MRR@10 above NDCG@10, which cannot be with one relevant item a user; "
    "its Mamba4Rec counts 78,624 parameters, the public code of that model 72,256; its Hydra4Rec counts are those of "
    "the Amazon data sets of 2014, not of 2023. It gives latency no unit."
)
