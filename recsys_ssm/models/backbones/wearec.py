"""WEARec: filters over the frequencies and the wavelets of a history (Xu et al. 2026, arXiv 2511.07028).

A history is padded at its front to rows of M positions, so that its latest item is always at place M - 1. Each layer
mixes two filtered versions of the row:

- *frequencies*: a real Fourier transform over the positions, times one number for each head and frequency. The number
  is learned, and scaled by a network that reads the mean token of the row.
- *wavelets*: each pair of neighbouring positions as their mean and their half difference (one level of Haar wavelets);
  the half difference is multiplied by a learned weight.

    x = norm(x + drop(alpha · frequencies(x) + (1 - alpha) · wavelets(x)))
    x = norm(x + drop(W2 gelu(W1 x)))

Empty places at the front hold one random vector, which is not trained, plus the embedding of their position, and take
part in the transforms. So the embeddings of positions belong to this backbone, and the tokenizer passes the items'
embeddings as they are. A token of zeros (a start token) is an empty place, too.

A token sees later ones: WEARec is trained on the last position of each prefix, or on masked items.

Legend: S histories, M = max_length positions, D = d_model, H heads of E = D / H channels, N = M // 2 + 1 frequencies,
K = M // 2 pairs of positions, P outputs that are wanted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.ops._dispatch import is_exporting
from recsys_ssm.ops.dropout import Dropout
from recsys_ssm.ops.sequences import sequences_of


@functools.lru_cache(maxsize=16)
def fourier(length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices of the real Fourier transform over ``length`` positions and of its inverse.

    Both are scaled as ``torch.fft.rfft(…, norm="ortho")``. On a CPU two matrix products over so few positions take half
    the time of the fast transform.

    Returns:
        (2 · N, M), the real parts of all frequencies above the imaginary parts, and (M, 2 · N).
    """
    frequency = torch.arange(length // 2 + 1, dtype=torch.float64, device=device).unsqueeze(1)
    place = torch.arange(length, dtype=torch.float64, device=device)
    angle = 2 * math.pi / length * (frequency * place % length)
    cos, sin = angle.cos() / math.sqrt(length), angle.sin() / math.sqrt(length)
    # All frequencies but the first, and the last of an even length, also stand for their mirror image.
    times = torch.full_like(frequency, 2)
    times[0] = 1
    if length % 2 == 0:
        times[-1] = 1
    inverse = torch.cat((cos * times, -sin * times)).T
    return torch.cat((cos, -sin)).to(dtype), inverse.to(dtype).contiguous()


class WEARecLayer(nn.Module):
    """Mix the positions of padded rows by two filters, then a feed-forward network; parameters are the public code's.

    Args:
        d_model: D.
        n_heads: H.
        alpha: Share of the frequencies in the mixture; the rest is that of the wavelets.
        max_length: M.
        ffn: Width of the feed-forward network as a multiple of D.
        dropout: Dropout rate of the mixture and of the network's output.
        norm_eps: Number that LayerNorm adds to the variance.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        alpha: float,
        max_length: int,
        ffn: int,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        n_frequencies = max_length // 2 + 1
        self.alpha, self.n_heads = alpha, n_heads
        self.detail = nn.Parameter(torch.empty(max_length // 2, d_model))
        self.filter = nn.Parameter(torch.empty(n_heads, n_frequencies))
        self.filter_bias = nn.Parameter(torch.empty(n_heads, n_frequencies))
        self.adapt1 = nn.Linear(d_model, d_model)
        self.adapt2 = nn.Linear(d_model, n_heads * n_frequencies * 2)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.linear1 = nn.Linear(d_model, ffn * d_model)
        self.linear2 = nn.Linear(ffn * d_model, d_model)
        self.ffn_norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = Dropout(dropout)

    def reset_parameters(self, std: float) -> None:
        """Draw the weights as the public code does."""
        nn.init.normal_(self.detail, std=0.02)
        nn.init.ones_(self.filter)
        nn.init.constant_(self.filter_bias, -0.1)
        for linear in (self.adapt1, self.adapt2, self.linear1, self.linear2):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_SMD: Tensor, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the outputs of all places (S, M, D), or of the places ``at`` alone (P, D).

        Args:
            x_SMD: Padded rows.
            at: (P,) rows and (P,) places in them.
        """
        mixed = self.alpha * self._frequencies(x_SMD, at)
        mixed = mixed + (1 - self.alpha) * self._wavelets(x_SMD, at)
        x = x_SMD if at is None else x_SMD[at]
        x = self.norm(x + self.dropout(mixed))
        inner = self.linear2(F.gelu(self.linear1(x)))
        return self.ffn_norm(x + self.dropout(inner))

    def _frequencies(self, x_SMD: Tensor, at: tuple[Tensor, Tensor] | None) -> Tensor:
        S, M, _ = x_SMD.shape
        forward_FM, inverse_MF = (fourier.__wrapped__ if is_exporting() else fourier)(
            M, x_SMD.dtype, x_SMD.device
        )
        change = self.adapt2(F.gelu(self.adapt1(x_SMD.mean(1)))).view(S, self.n_heads, -1, 2)
        scale_SHN = self.filter * (1 + change[..., 0])
        bias_SHN = self.filter_bias + change[..., 1]
        z_SFD = torch.matmul(forward_FM, x_SMD)
        z_SFHE = z_SFD.unflatten(2, (self.n_heads, -1))
        # The same number for the real and the imaginary part; the bias belongs to the real part.
        scale_SFH = torch.cat((scale_SHN, scale_SHN), 2).transpose(1, 2)
        bias_SFH = torch.cat((bias_SHN, torch.zeros_like(bias_SHN)), 2).transpose(1, 2)
        z_SFD = torch.addcmul(bias_SFH.unsqueeze(3), z_SFHE, scale_SFH.unsqueeze(3)).flatten(2)
        if at is None:
            return torch.matmul(inverse_MF, z_SFD)
        row_P, place_P = at
        return torch.bmm(inverse_MF[place_P].unsqueeze(1), z_SFD[row_P]).squeeze(1)

    def _wavelets(self, x_SMD: Tensor, at: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return each place's share of its pair's mean and of the weighted half difference.

        With an odd number of positions the last has no pair, and its output is zero, as in the public code.
        """
        M = x_SMD.shape[1]
        K = M // 2
        own_KD, other_KD = (1 + self.detail) / 2, (1 - self.detail) / 2
        if at is None:
            x_SK2D = x_SMD[:, : 2 * K].unflatten(1, (K, 2))
            y_SK2D = x_SK2D * own_KD.unsqueeze(1) + x_SK2D.flip(2) * other_KD.unsqueeze(1)
            return F.pad(y_SK2D.flatten(1, 2), (0, 0, 0, M - 2 * K))
        row_P, place_P = at
        paired = place_P < 2 * K
        place_P = place_P.where(paired, 0)
        pair_P, partner_P = place_P // 2, place_P ^ 1
        if not K:
            return torch.zeros_like(x_SMD[row_P, place_P])
        y_PD = x_SMD[row_P, place_P] * own_KD[pair_P] + x_SMD[row_P, partner_P] * other_KD[pair_P]
        return y_PD * paired.unsqueeze(1)


class WEARec(Backbone):
    """Embed positions from the end of a history, then :class:`WEARecLayer`; a loss at every position is refused.

    The defaults are those of the public Beauty model. Its 910,978 parameters there are 774,528 item embeddings, 3,328
    of positions and their LayerNorm, and 66,560 + 1 a layer; the one is a gate that the public code never uses and that
    is absent here. The tokenizer belongs to it: ``tokenizer.norm=false tokenizer.dropout=0``.

    Args:
        d_model: D.
        n_layers: Number of layers.
        n_heads, alpha: As in :class:`WEARecLayer`. The public models have 8 and .2 (Beauty), 4 and .3 (Sports), 2 and
            .3 (ML-1M, length 50).
        max_length: M, the longest history: ``dataset.max_length``.
        ffn, norm_eps: As in :class:`WEARecLayer`.
        dropout: Dropout rate of the tokens and of the layers.
        init_std: Standard deviation of initial weights and positions.

    Raises:
        ValueError: ``n_heads`` does not divide ``d_model``, ``alpha`` is not a share, or a size is below 1.

    Example:
        >>> import torch
        >>> from recsys_ssm import WEARec
        >>> backbone = WEARec(d_model=8, n_heads=2, max_length=10)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    # NOTE[DIFF] The vector of empty places is the embedding of padding in the public code, which also counts as an item
    # in its softmax; here it is a buffer and not an item.

    causal = False
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-WEARec", "next_item": "WEARec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#56b4e9", "linestyle": ":", "marker": "*"}

    def __init__(
        self,
        *,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 8,
        alpha: float = 0.2,
        max_length: int = 50,
        ffn: int = 4,
        dropout: float = 0.5,
        norm_eps: float = 1e-12,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value in (("n_layers", n_layers), ("n_heads", n_heads), ("ffn", ffn)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: give at least 1")
        if d_model % n_heads:
            raise ValueError(
                f"n_heads={n_heads} does not divide d_model={d_model}; change one of them"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: expected a share from 0 to 1")
        self.d_model, self.max_length = d_model, max_length
        self.position = nn.Embedding(max_length, d_model)
        nn.init.normal_(self.position.weight, std=init_std)
        self.register_buffer("empty", torch.empty(d_model).normal_(std=init_std))
        self.empty: Tensor
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            layer = WEARecLayer(
                d_model=d_model,
                n_heads=n_heads,
                alpha=alpha,
                max_length=max_length,
                ffn=ffn,
                dropout=dropout,
                norm_eps=norm_eps,
            )
            layer.reset_parameters(init_std)
            self.layers.append(layer)

    def forward(
        self, tokens: Tensor, seq_idx: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Mix the tokens of each row, as :meth:`Backbone.forward`.

        Raises:
            UserError: A history is longer than ``max_length``.
        """
        B, L, D = tokens.shape
        if seq_idx is None:
            seq_idx = torch.zeros(B, L, dtype=torch.long, device=tokens.device)
        if is_exporting():
            return self._one_a_row(tokens, seq_idx, at)
        begin_row_S, start_S, length_S = sequences_of(seq_idx)
        longest = int(length_S.max()) if length_S.numel() else 0
        if longest > self.max_length:
            raise UserError(
                f"backbone.max_length={self.max_length}: a history has {longest} items; give "
                "backbone.max_length=${dataset.max_length}"
            )
        # Places (B·L) of the valid positions, and where each is in the padded rows: history and place.
        valid_V = (seq_idx >= 0).flatten().nonzero().squeeze(1)
        S = length_S.numel()
        history_V = torch.arange(S, device=tokens.device).repeat_interleave(length_S)
        end_S = begin_row_S * L + start_S + length_S
        place_V = self.max_length + valid_V - end_S[history_V]
        cell_V = history_V * self.max_length + place_V
        x_VD = tokens.flatten(0, 1)[valid_V]
        x_VD = x_VD + self.empty * (x_VD == 0).all(1, keepdim=True)
        flat = self.empty.to(x_VD.dtype).repeat(S * self.max_length, 1)
        x_SMD = flat.index_copy(0, cell_V, x_VD).unflatten(0, (S, self.max_length))
        x_SMD = self.dropout(self.norm(x_SMD + self.position.weight))
        *earlier, last = self.layers
        for layer in earlier:
            x_SMD = layer(x_SMD)
        if at is None:
            y_VD = last(x_SMD).flatten(0, 1)[cell_V]
            return y_VD.new_zeros(B * L, D).index_copy(0, valid_V, y_VD).view(B, L, D)
        where = torch.zeros(B * L, dtype=torch.long, device=tokens.device)
        where[valid_V] = torch.arange(valid_V.numel(), device=tokens.device)
        wanted_P = where[at]
        y_PD = last(x_SMD, (history_V[wanted_P], place_V[wanted_P]))
        return y_PD.masked_fill((seq_idx.flatten()[at] < 0).unsqueeze(1), 0)

    def _one_a_row(self, tokens: Tensor, seq_idx: Tensor, at: Tensor | None) -> Tensor:
        """Compute :meth:`forward` for rows of one sequence each, by operators of fixed sizes alone."""
        B, L, D = tokens.shape
        M = self.max_length
        length_B = (seq_idx >= 0).sum(1)
        source_BM1 = (
            torch.arange(M, device=tokens.device) - (M - length_B).unsqueeze(1)
        ).unsqueeze(2)
        x_BMD = tokens.gather(1, source_BM1.clamp(min=0).expand(B, M, D))
        x_BMD = x_BMD + self.empty * (x_BMD == 0).all(2, keepdim=True)
        x_BMD = torch.where(source_BM1 >= 0, x_BMD, self.empty)
        x_BMD = self.dropout(self.norm(x_BMD + self.position.weight))
        *earlier, last = self.layers
        for layer in earlier:
            x_BMD = layer(x_BMD)
        if at is None:
            place_BL = (M - length_B).unsqueeze(1) + torch.arange(L, device=tokens.device)
            return last(x_BMD).gather(1, place_BL.clamp(max=M - 1).unsqueeze(2).expand(B, L, D))
        row_P = at // L
        place_P = (M - length_B[row_P] + at - row_P * L).clamp(max=M - 1)
        return last(x_BMD, (row_P, place_P))
