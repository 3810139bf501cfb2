"""Turn one side of a batch (features, or histories of items) into tokens.

Legend: B rows, L positions, I items, Fn numeric and Fc categorical features, F = Fn + Fc, D = d_model.
"""

from __future__ import annotations

import abc
import itertools
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recsys_ssm.batches import MASK
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.instantiate import Configurable
from recsys_ssm.models.backbones.base import time_buckets


class Tokenizer(Configurable, nn.Module, abc.ABC):
    """Define the contract of a tokenizer: one side of a batch in, tokens (B, L, D) out.

    A model passes ``d_model`` and what it knows of the data when it builds a tokenizer; the other arguments are the
    tokenizer's options. A new tokenizer is a subclass of one of the two below, and one file in ``conf/tokenizer``.
    """

    @abc.abstractmethod
    def forward(self, *side: Any) -> Tensor:
        """Return the tokens (B, L, D) of one side of a batch."""


class TableTokenizer(Tokenizer):
    """Define the contract of a tokenizer of tables, for two towers: ``(schema, d_model, **options)``.

    The backbone's last token stands for the row, or the mean token, as ``pooling`` says.
    """

    pooling: Literal["last", "mean"] | None = None
    """Output that represents the whole row; None: as the backbone's ``pooling`` says. An attribute of the class, or of
    the instance where an option decides."""
    across_rows: bool = False
    """True if the backbone reads the rows of a batch as one sequence, for each token of a row."""

    @abc.abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Return the tokens (B, L, D) of B rows."""


class HistoryTokenizer(Tokenizer):
    """Define the contract of a tokenizer of histories: ``(n_items, d_model, schema, max_length, **options)``.

    A model with ``objective=masked`` also passes ``mask=True``: then an item may be :data:`~recsys_ssm.batches.MASK`.
    """

    embedding: nn.Embedding
    position: nn.Embedding | None
    uses_times: bool = False
    """True if :meth:`forward` takes ``gaps``."""
    uses_columns: bool = False
    """True if :meth:`forward` takes ``columns``."""
    position_from: Literal["start", "end"] = "start"
    """End of a history that positions are counted from; the model passes positions so counted."""

    @abc.abstractmethod
    def items(self, features: Features | None) -> Tensor:
        """Return the (I, D) vectors that scores are inner products with; ``features`` are the catalogue's."""

    @abc.abstractmethod
    def forward(self, item: Tensor, position: Tensor, features: Features | None = None) -> Tensor:
        """Return the tokens (B, L, D) of histories.

        Args:
            item: (B, L) catalogue indices, -1 at padding, :data:`~recsys_ssm.batches.MASK` at a hidden item,
                :data:`~recsys_ssm.batches.START` before the first.
            position: (B, L) places in the history, from 0, counted from ``position_from``.
            features: The catalogue's, I rows, where there is a schema.
        """


class FeatureTokenizer(TableTokenizer):
    """Make one token of each feature, and a CLS token at the END (Gorishniy et al. 2021, arXiv 2106.11959; FT-Mamba).

    Numeric feature j becomes ``x_j w_j + b_j``, a categorical one ``W_j[x_j] + b_j``; CLS is a numeric feature whose
    value is always 1. FT-Transformer puts CLS first; here it is last, where a causal backbone has seen all tokens.

    Args:
        schema: The features: Fn numeric and Fc categorical ones.
        d_model: D.
        init: ``normal``, N(0, init_scale²), PyTorch's default for embeddings; or ``uniform`` in
            ±init_scale/√D, FT-Transformer's. The choice matters: see docs/results.md.
        init_scale: As above.
    """

    def __init__(
        self,
        *,
        schema: FeatureSchema,
        d_model: int,
        init: Literal["normal", "uniform"] = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        n_numeric = len(schema.numeric)
        cardinalities = [field.n_codes for field in schema.categorical]
        if init not in ("normal", "uniform"):
            raise ValueError(f"init={init!r}: expected 'normal' or 'uniform'")
        self.init, self.init_scale = init, init_scale
        self.weight = nn.Parameter(torch.empty(n_numeric + 1, d_model))
        # A parameter without rows is trouble for FSDP, vmap and torch.export.save.
        self.embedding = (
            nn.Parameter(torch.empty(sum(cardinalities), d_model)) if cardinalities else None
        )
        self.bias = nn.Parameter(torch.empty(n_numeric + len(cardinalities) + 1, d_model))
        first_rows = [0, *itertools.accumulate(cardinalities)][: len(cardinalities)]
        self.register_buffer(
            "offsets", torch.tensor(first_rows, dtype=torch.long), persistent=False
        )
        self.offsets: Tensor
        self.n_numeric = n_numeric
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if self.init == "normal":
                nn.init.normal_(parameter, std=self.init_scale)
            else:
                bound = self.init_scale * parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, features: Features) -> Tensor:
        """Return the tokens (B, F + 1, D) of B rows."""
        numeric, categorical = features
        x_BFD = numeric.unsqueeze(-1) * self.weight[: self.n_numeric]
        tokens = [x_BFD]
        if self.embedding is not None:
            tokens.append(nn.functional.embedding(categorical + self.offsets, self.embedding))
        tokens.append(self.weight[self.n_numeric :].expand(numeric.shape[0], 1, -1))
        return torch.cat(tokens, dim=1) + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a state; leave out the empty ``embedding`` of version 0.1, which no parameter has now."""
        name = f"{prefix}embedding"
        if self.embedding is None and name in state_dict and not state_dict[name].numel():
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class MambaTabTokenizer(TableTokenizer):
    """Make one token of all features of a row: ``relu(norm(W x + b))`` (Ahamed and Cheng 2024, arXiv 2401.08867).

    Numbers are scaled to 0 to 1 by the range in the training rows. A categorical feature is its code, scaled to 0 to 1.

    MambaTab is this tokenizer with ``backbone=mamba``, d_model 32, one layer, d_state 32, d_conv 4 and ``norm=none``.
    Its 13,601 parameters at 15 features are 576 of the tokenizer, 12,992 of the Mamba block and 33 of a linear layer,
    in whose place a two-tower model has its head.

    Args:
        schema: The features: Fn numeric and Fc categorical ones.
        d_model: D.
        published: Let the backbone read the rows of a batch as one sequence, as the public code does. Then the scores
            of a row depend on the rows before it in its batch. The default treats each row by itself.

    Raises:
        UserError: The schema does not know the range of a numeric column.
    """

    # NOTE[DIFF] The public code fills an empty cell with the most frequent value. Here an empty number is the mean, and
    # an empty category has a code of its own.

    def __init__(self, *, schema: FeatureSchema, d_model: int, published: bool = False) -> None:
        super().__init__()
        if published:
            warnings.warn(
                "tokenizer.published=true: the scores of a row depend on the other rows of its batch, as in MambaTab's "
                "public code; leave it out to treat each row by itself",
                stacklevel=2,
            )
        self.across_rows = published
        limits = [field.edges(1) for field in schema.numeric]
        lowest = [*(edge[0] for edge in limits), *(0.0 for _ in schema.categorical)]
        width = [
            *(edge[1] - edge[0] for edge in limits),
            *(max(field.n_codes - 1, 1) for field in schema.categorical),
        ]
        self.register_buffer("lowest", torch.tensor(lowest, dtype=torch.float32), persistent=False)
        self.register_buffer("width", torch.tensor(width, dtype=torch.float32), persistent=False)
        self.lowest: Tensor
        self.width: Tensor
        self.linear = nn.Linear(schema.n_features, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, features: Features) -> Tensor:
        """Return the tokens (B, 1, D) of B rows."""
        x_BF = torch.cat((features.numeric, features.categorical.to(features.numeric.dtype)), dim=1)
        x_BF = (x_BF - self.lowest) / self.width
        return self.norm(self.linear(x_BF)).relu().unsqueeze(1)


class MambularTokenizer(TableTokenizer):
    """Make one token of each feature, categorical ones first, without CLS (Thielmann et al. 2024, arXiv 2408.06291).

    A categorical feature is a row of an embedding. A number is encoded, and a linear layer of its own without a bias
    follows. The mean token stands for the row. The encodings are of the package ``rtdl-num-embeddings``.

    Mambular is this tokenizer with ``backbone=mamba``, d_model 64, four layers, d_state 128, d_conv 4, dt_rank 4,
    ``conv_bias=false``, ``norm=pre``, ``norm_kind=rms`` and ``residual=true``: 75,584 parameters a layer.

    Args:
        schema: The features: Fn numeric and Fc categorical ones.
        d_model: D.
        encoding: ``piecewise``, piecewise-linear in the bins of the training rows; or ``periodic``, cosines and sines
            of learned frequencies.
        n_bins: Bins of a number, at most 48; equal edges count once.
        n_frequencies: Frequencies of each number.
        frequency_scale: Deviation of the initial frequencies.

    Raises:
        UserError: The package is absent, ``encoding`` is another word, or the schema does not know the quantiles.
    """

    # NOTE[DIFF] The public code takes bins from decision trees on the targets; a row of a two-tower model has no target
    # of its own, so bins are quantiles here. The public code normalises the mean token; a Stack each token.

    pooling = "mean"

    def __init__(
        self,
        *,
        schema: FeatureSchema,
        d_model: int,
        encoding: Literal["piecewise", "periodic"] = "piecewise",
        n_bins: int = 48,
        n_frequencies: int = 48,
        frequency_scale: float = 0.01,
    ) -> None:
        super().__init__()
        if encoding not in ("piecewise", "periodic"):
            raise UserError(f"tokenizer.encoding={encoding}: expected piecewise or periodic")
        try:
            import rtdl_num_embeddings as rtdl
        except ModuleNotFoundError as error:
            raise UserError(
                "tokenizer=mambular needs the package rtdl-num-embeddings; pip install 'recsys-ssm[tabular]'"
            ) from error
        cardinalities = [field.n_codes for field in schema.categorical]
        first_rows = [0, *itertools.accumulate(cardinalities)][: len(cardinalities)]
        self.register_buffer(
            "offsets", torch.tensor(first_rows, dtype=torch.long), persistent=False
        )
        self.offsets: Tensor
        self.embedding = nn.Parameter(torch.randn(sum(cardinalities), d_model))
        self.numbers: nn.Module | None = None
        if schema.numeric and encoding == "periodic":
            self.numbers = rtdl.PeriodicEmbeddings(
                len(schema.numeric),
                d_model,
                n_frequencies=n_frequencies,
                frequency_init_scale=frequency_scale,
                activation=False,
                lite=False,
            )
        elif schema.numeric:
            edges = [torch.from_numpy(field.edges(n_bins)).float() for field in schema.numeric]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*just two bin edges")
                self.numbers = rtdl.PiecewiseLinearEmbeddings(
                    edges, d_model, activation=False, version="A"
                )
        if self.numbers is not None:
            self.numbers.linear.register_parameter("bias", None)  # type: ignore[union-attr]

    def forward(self, features: Features) -> Tensor:
        """Return the tokens (B, F, D) of B rows."""
        numeric, categorical = features
        tokens_BFD = nn.functional.embedding(categorical + self.offsets, self.embedding)
        if self.numbers is None:
            return tokens_BFD
        return torch.cat((tokens_BFD, self.numbers(numeric)), dim=1)


class ItemTokenizer(HistoryTokenizer):
    """Make one token of each item in a history: its embedding, its position if asked for, LayerNorm, dropout.

    The embedding has a row for padding before the items' own, as public implementations count it; this row stays zero
    and is never scored. It is also the embedding of a start token. Where the catalogue has features, an item's row is
    its id's embedding plus the sum of its features' tokens, both as input and in the softmax (SASRec's tied embedding).

    Args:
        n_items: I.
        d_model: D.
        schema: Schema of the items' features. None: the id alone.
        max_length: Items of a history that the model sees.
        positions: Number of learned position embeddings (SASRec); ``max_length``: as many as that; 0: none, as state
            space models need none.
        position_from: Count positions from the ``start`` of a history, or from its ``end``: the latest item is 0. With
            ``dataset.objective=all`` a position from the end also shows how many items follow in the window, which are
            none in the test.
        item_dropout: Probability of hiding an item of a history in training: its embedding is replaced by zeros.
        norm: Apply LayerNorm to the sum, as in SASRec and Mamba4Rec.
        dropout: Dropout after the LayerNorm.
        init_std: Standard deviation of the initial embeddings; RecBole's is .02.
        norm_eps: Epsilon of the LayerNorm; RecBole's is 1e-12.
        gap_buckets: Embeddings of the time since the event before, which is added to a token, in buckets as in
            :func:`time_buckets`; 0: none. Where the model sees the time of the next event
            (``model.query_time``), as many embeddings of the time until it are added, too.
        mask: Have a token for hidden items; a model passes it with ``objective=masked``.
        text: Add the items' titles: ``tfidf``, or the folder of a sentence encoder (:mod:`recsys_ssm.text.embed`). An
            item's row is then its id's embedding plus a linear map of its title's frozen vector, also an item without
            a training event. None: no titles.
        text_revision: Commit of a sentence encoder that is a name on the hub.
        text_size: Length of the vectors of ``tfidf``.
        vectors: (I, E) vectors of the titles; the model passes them.
        query_time: Have embeddings of the time until the next event; a model passes it.
        column_sizes: Codes of each column of the events, whose embeddings are added to a token; a model passes them.
    """

    def __init__(
        self,
        *,
        n_items: int,
        d_model: int,
        schema: FeatureSchema | None = None,
        max_length: int | None = None,
        positions: int | Literal["max_length"] = 0,
        position_from: Literal["start", "end"] = "start",
        item_dropout: float = 0.0,
        norm: bool = True,
        dropout: float = 0.2,
        init_std: float = 0.02,
        norm_eps: float = 1e-12,
        gap_buckets: int = 0,
        mask: bool = False,
        text: str | None = None,
        text_revision: str | None = None,
        text_size: int = 64,
        vectors: Tensor | None = None,
        query_time: bool = False,
        column_sizes: Sequence[int] = (),
    ) -> None:
        if gap_buckets < 0:
            raise ValueError(f"gap_buckets={gap_buckets}: give 0 (none) or more")
        if (text is None) != (vectors is None):
            raise ValueError(
                f"text={text}: the vectors of the titles are {'absent' if vectors is None else 'given'}; build the "
                "model by for_data, which makes them where text is set"
            )
        if positions == "max_length":
            if max_length is None:
                raise ValueError("positions=max_length: pass max_length too")
            positions = max_length
        if position_from not in ("start", "end"):
            raise ValueError(f"position_from={position_from!r}: expected 'start' or 'end'")
        if position_from == "end" and not positions:
            raise ValueError(
                "position_from=end: there are no positions to count; give positions=max_length too"
            )
        if not 0 <= item_dropout < 1:
            raise ValueError(f"item_dropout={item_dropout}: expected 0 to below 1")
        super().__init__()
        self.position_from, self.item_dropout = position_from, item_dropout
        self.embedding = nn.Embedding(n_items + 1, d_model, padding_idx=0)
        self.position = nn.Embedding(positions, d_model) if positions else None
        self.norm = nn.LayerNorm(d_model, eps=norm_eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.features = (
            FeatureTokenizer(schema=schema, d_model=d_model, init_scale=init_std)
            if schema is not None
            else None
        )
        with torch.no_grad():
            for table in (self.embedding, self.position):
                if table is not None:
                    nn.init.normal_(table.weight, std=init_std)
            self.embedding.weight[0].zero_()
        self.mask = nn.Parameter(torch.empty(d_model).normal_(std=init_std)) if mask else None
        self.register_buffer("vectors", vectors)
        self.vectors: Tensor | None
        self.projection: nn.Linear | None = None
        if vectors is not None:
            self.projection = nn.Linear(vectors.shape[1], d_model, bias=False)
            # Vectors have length 1, so their images are as large as the ids' embeddings.
            nn.init.normal_(self.projection.weight, std=init_std)
        sizes = {"before": gap_buckets + 1, "after": gap_buckets + 1} if gap_buckets else {}
        if not query_time:
            sizes.pop("after", None)
        self.gaps = nn.ModuleDict({name: nn.Embedding(n, d_model) for name, n in sizes.items()})
        self.columns = nn.ModuleList(nn.Embedding(n, d_model) for n in column_sizes)
        for embedding in (*self.gaps.values(), *self.columns):
            nn.init.normal_(embedding.weight, std=init_std)
        self.uses_times, self.uses_columns = bool(gap_buckets), bool(self.columns)
        self.gap_buckets = gap_buckets

    def items(self, features: Features | None) -> Tensor:
        """Return (I, D): each item as a token and as a row of the softmax; ``features`` are the catalogue's."""
        rows_ID = self.embedding.weight[1:]
        if self.projection is not None:
            rows_ID = rows_ID + self.projection(self.vectors)
        if self.features is None:
            return rows_ID
        assert features is not None, "the catalogue's features"
        return rows_ID + self.features(features).sum(1)

    def forward(
        self,
        item: Tensor,
        position: Tensor,
        features: Features | None = None,
        gaps: tuple[Tensor, Tensor] | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens of histories.

        Args:
            item: (B, L) catalogue indices, -1 at padding, :data:`~recsys_ssm.batches.MASK` at a hidden item,
                :data:`~recsys_ssm.batches.START` before the first.
            position: (B, L) places in the history, from 0, counted from ``position_from``.
            features: The catalogue's, I rows, where there is a schema.
            gaps: (B, L) each, seconds from the event before and until the next one, where times are used.
            columns: (B, L, C), codes of the events' columns, where there are columns.

        Returns:
            (B, L, D).

        Raises:
            UserError: A history is longer than there are positions.
        """
        if self.features is None and self.projection is None:
            # padding_idx keeps the padding row's gradient out.
            tokens_BLD = self.embedding(item.clamp(min=-1) + 1)
        else:
            items_ID = self.items(features)
            tokens_BLD = nn.functional.embedding(item.clamp(min=0), items_ID)
            tokens_BLD = tokens_BLD * (item >= 0).unsqueeze(-1)
        if self.item_dropout and self.training:
            shown = torch.rand(item.shape, device=item.device) >= self.item_dropout
            tokens_BLD = tokens_BLD * shown.unsqueeze(-1)
        if self.mask is not None:
            tokens_BLD = torch.where((item == MASK).unsqueeze(-1), self.mask, tokens_BLD)
        if self.position is not None:
            # A compiled graph does not read values; there the embedding raises an IndexError.
            if not torch.compiler.is_compiling() and (
                position.numel() and int(position.max()) >= self.position.num_embeddings
            ):
                raise UserError(
                    f"a history has {int(position.max()) + 1} items, and tokenizer.positions="
                    f"{self.position.num_embeddings}; give tokenizer.positions=max_length"
                )
            tokens_BLD = tokens_BLD + self.position(position)
        if gaps is not None:
            for embedding, seconds in zip(self.gaps.values(), gaps, strict=False):
                tokens_BLD = tokens_BLD + embedding(time_buckets(seconds, self.gap_buckets))
        if columns is not None:
            for c, embedding in enumerate(self.columns):
                tokens_BLD = tokens_BLD + embedding(columns[..., c])
        return self.dropout(self.norm(tokens_BLD))
