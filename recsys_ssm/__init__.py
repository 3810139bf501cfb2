"""State space models for recommender systems.

The names below are imported when they are first used, so ``import recsys_ssm`` is quick and changes nothing in the
program.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "recsys_ssm.data.hm": ("HmData",),
    "recsys_ssm.data.interactions": ("Interactions",),
    "recsys_ssm.data.shop": ("GeneratedShop",),
    "recsys_ssm.data.spotify": ("SpotifyData",),
    "recsys_ssm.data.table": ("TableData",),
    "recsys_ssm.data.vaccine": ("VaccineData",),
    "recsys_ssm.errors": ("UserError",),
    "recsys_ssm.features": ("Features", "FeatureSchema"),
    "recsys_ssm.metrics": ("RankingMetrics",),
    "recsys_ssm.models.backbones.base": ("Backbone", "Stack"),
    "recsys_ssm.models.backbones.filter_mamba2": ("FilterMamba2",),
    "recsys_ssm.models.backbones.hstu": ("HSTU",),
    "recsys_ssm.models.backbones.hydra": ("Hydra",),
    "recsys_ssm.models.backbones.identity": ("Identity",),
    "recsys_ssm.models.backbones.ligr": ("Ligr",),
    "recsys_ssm.models.backbones.mamba": ("Mamba",),
    "recsys_ssm.models.backbones.mamba2": ("Mamba2",),
    "recsys_ssm.models.backbones.mamba3": ("Mamba3",),
    "recsys_ssm.models.backbones.matrrec": ("MaTrRec",),
    "recsys_ssm.models.backbones.sigma": ("Sigma",),
    "recsys_ssm.models.backbones.transformer": ("Transformer",),
    "recsys_ssm.models.backbones.wearec": ("WEARec",),
    "recsys_ssm.models.gpt4rec": ("Gpt4Rec",),
    "recsys_ssm.models.heads": ("NextItemHead", "TowerHead"),
    "recsys_ssm.models.llamarec": ("LlamaRec",),
    "recsys_ssm.models.losses": (
        "BinaryCrossEntropy",
        "InBatchSoftmax",
        "MeanSquaredError",
        "NextItemLoss",
    ),
    "recsys_ssm.models.mamba_lm": ("MambaLM",),
    "recsys_ssm.models.mamrec": ("MamRec",),
    "recsys_ssm.models.next_item": ("NextItem",),
    "recsys_ssm.models.tokenizers": (
        "FeatureTokenizer",
        "ItemTokenizer",
        "MambaTabTokenizer",
        "MambularTokenizer",
    ),
    "recsys_ssm.models.two_tower": ("TwoTower",),
    "recsys_ssm.streaming.histories": ("EventHistories",),
    "recsys_ssm.streaming.recommender": ("StreamingRecommender",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from recsys_ssm.data.hm import HmData
    from recsys_ssm.data.interactions import Interactions
    from recsys_ssm.data.shop import GeneratedShop
    from recsys_ssm.data.spotify import SpotifyData
    from recsys_ssm.data.table import TableData
    from recsys_ssm.data.vaccine import VaccineData
    from recsys_ssm.errors import UserError
    from recsys_ssm.features import Features, FeatureSchema
    from recsys_ssm.metrics import RankingMetrics
    from recsys_ssm.models.backbones.base import Backbone, Stack
    from recsys_ssm.models.backbones.filter_mamba2 import FilterMamba2
    from recsys_ssm.models.backbones.hstu import HSTU
    from recsys_ssm.models.backbones.hydra import Hydra
    from recsys_ssm.models.backbones.identity import Identity
    from recsys_ssm.models.backbones.ligr import Ligr
    from recsys_ssm.models.backbones.mamba import Mamba
    from recsys_ssm.models.backbones.mamba2 import Mamba2
    from recsys_ssm.models.backbones.mamba3 import Mamba3
    from recsys_ssm.models.backbones.matrrec import MaTrRec
    from recsys_ssm.models.backbones.sigma import Sigma
    from recsys_ssm.models.backbones.transformer import Transformer
    from recsys_ssm.models.backbones.wearec import WEARec
    from recsys_ssm.models.gpt4rec import Gpt4Rec
    from recsys_ssm.models.heads import NextItemHead, TowerHead
    from recsys_ssm.models.llamarec import LlamaRec
    from recsys_ssm.models.losses import (
        BinaryCrossEntropy,
        InBatchSoftmax,
        MeanSquaredError,
        NextItemLoss,
    )
    from recsys_ssm.models.mamba_lm import MambaLM
    from recsys_ssm.models.mamrec import MamRec
    from recsys_ssm.models.next_item import NextItem
    from recsys_ssm.models.tokenizers import (
        FeatureTokenizer,
        ItemTokenizer,
        MambaTabTokenizer,
        MambularTokenizer,
    )
    from recsys_ssm.models.two_tower import TwoTower
    from recsys_ssm.streaming.histories import EventHistories
    from recsys_ssm.streaming.recommender import StreamingRecommender

__all__ = [
    "HSTU",
    "Backbone",
    "BinaryCrossEntropy",
    "EventHistories",
    "FeatureSchema",
    "FeatureTokenizer",
    "Features",
    "FilterMamba2",
    "GeneratedShop",
    "Gpt4Rec",
    "HmData",
    "Hydra",
    "Identity",
    "InBatchSoftmax",
    "Interactions",
    "ItemTokenizer",
    "Ligr",
    "LlamaRec",
    "MaTrRec",
    "MamRec",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLM",
    "MambaTabTokenizer",
    "MambularTokenizer",
    "MeanSquaredError",
    "NextItem",
    "NextItemHead",
    "NextItemLoss",
    "RankingMetrics",
    "Sigma",
    "SpotifyData",
    "Stack",
    "StreamingRecommender",
    "TableData",
    "TowerHead",
    "Transformer",
    "TwoTower",
    "UserError",
    "VaccineData",
    "WEARec",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
