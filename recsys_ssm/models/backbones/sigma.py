"""SIGMA: Mamba forwards and over a partly flipped sequence, and a GRU (Liu et al. 2024, arXiv 2408.11451).

One Mamba block, with the same weights, reads the sequence twice: as it is, and with the first part back to front, so
that the end of the sequence follows its beginning. Each output is scaled by a gate that is computed from the tokens.
The third branch, FE-GRU, is a convolution over three tokens and a GRU, for short histories. Three weights mix them.

    x' = x with its first k tokens back to front
    g  = drop(W_silu · SiLU(x + W1 x) + W_sig · sigmoid(x + W1 x))
    g' = drop(W_silu · SiLU(x' + W2 x') + W_sig · sigmoid(g))
    out_proj(m0 · gru(conv(x)) + m1 · mamba(x') · (1 + g') + m2 · mamba(x) · (1 + g))

The outputs of the flipped sequence are not put back in order. A token sees later ones in two ways: the flip brings
tokens from up to k - 1 places ahead, and the convolution sees one step ahead. So SIGMA is trained on the last position
of each prefix, or on masked items.

Legend: B rows, L tokens, D = d_model, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from recsys_ssm.models.backbones.base import Init, Mixer, Stack
from recsys_ssm.models.backbones.mamba import MambaBlock
from recsys_ssm.ops._dispatch import is_exporting
from recsys_ssm.ops.dropout import Dropout

Mixing = Literal["softmax", "raw", "fixed"]

PUBLISHED_FLIP = 45
"""Tokens that the public code flips, of its rows of 50."""


class Places(NamedTuple):
    """Where each position is in its sequence, (B, L) each."""

    seq_idx: Tensor | None
    """As in :meth:`Backbone.forward`."""
    place: Tensor
    """Place in its sequence, from 0. Adjacent positions of padding count as a sequence."""
    length: Tensor
    """Length of its sequence."""


def places_of(tokens: Tensor, seq_idx: Tensor | None) -> Places:
    """Return the place of each position in its sequence.

    Args:
        tokens: (B, L, D).
        seq_idx: (B, L), as in :meth:`Backbone.forward`.
    """
    B, L, _ = tokens.shape
    here_L = torch.arange(L, device=tokens.device)
    if seq_idx is None:
        return Places(None, here_L.expand(B, L), here_L.new_full((B, L), L))
    other_BM = seq_idx[:, 1:] != seq_idx[:, :-1]
    first_BL, last_BL = F.pad(other_BM, (1, 0), value=True), F.pad(other_BM, (0, 1), value=True)
    start_BL = torch.where(first_BL, here_L, 0).cummax(1).values
    stop_BL = torch.where(last_BL, here_L + 1, L).flip(1).cummin(1).values.flip(1)
    return Places(seq_idx, here_L - start_BL, stop_BL - start_BL)


class SigmaBlock(Mixer):
    """One SIGMA block: Mamba over the sequence and over the flipped one, FE-GRU, gates and mixing.

    Args:
        d_model: D.
        d_state, d_conv, expand: As in :class:`~recsys_ssm.models.backbones.mamba.MambaBlock`.
        flip: Share of a sequence's length to flip, rounded down.
        published: Flip the first :data:`PUBLISHED_FLIP` tokens instead.
        mixing: Weights of the branches: ``softmax``, ``raw`` or ``fixed``.
        gate_dropout: Dropout rate of the gates.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 32,
        d_conv: int = 4,
        expand: int = 2,
        flip: float = 0.9,
        published: bool = False,
        mixing: Mixing = "softmax",
        gate_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.flip, self.published, self.mixing = flip, published, mixing
        weights = torch.tensor([0.1, 0.1, 0.8])
        self.mix = nn.Parameter(weights, requires_grad=mixing != "fixed")
        self.ahead = nn.Linear(d_model, d_model)
        self.flipped = nn.Linear(d_model, d_model)
        self.gate_silu = nn.Linear(d_model, d_model)
        self.gate_sigmoid = nn.Linear(d_model, d_model)
        self.gate_dropout = Dropout(gate_dropout)
        self.mamba = MambaBlock(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        # nn.Conv1d gives the parameters their shapes and initialisation; _convolve computes.
        self.conv1d = nn.Conv1d(d_model, d_model, kernel_size=3, padding=1)
        self.gru = nn.GRU(d_model, d_model, bias=False, batch_first=True)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x_BLD: Tensor, context: Places | None = None) -> Tensor:
        places = places_of(x_BLD, None) if context is None else context
        flipped_BLD = self._flip(x_BLD, places)
        gate_BLD = self._gate(x_BLD + self.ahead(x_BLD))
        # As in the public code, the second gate's sigmoid reads the first gate.
        flipped_gate_BLD = self._gate(flipped_BLD + self.flipped(flipped_BLD), gate_BLD)
        m_BLD = self.mamba(x_BLD, places.seq_idx)
        flipped_m_BLD = self.mamba(flipped_BLD, places.seq_idx)
        weights = self.mix if self.mixing == "raw" else self.mix.softmax(0)
        mixed_BLD = (
            weights[0] * self._recur(self._convolve(x_BLD, places), places)
            + weights[1] * (flipped_m_BLD + flipped_m_BLD * flipped_gate_BLD)
            + weights[2] * (m_BLD + m_BLD * gate_BLD)
        )
        return self.out_proj(mixed_BLD)

    def _gate(self, x_BLD: Tensor, other_BLD: Tensor | None = None) -> Tensor:
        inner_BLD = x_BLD if other_BLD is None else other_BLD
        gate_BLD = self.gate_silu(F.silu(x_BLD)) + self.gate_sigmoid(inner_BLD.sigmoid())
        return self.gate_dropout(gate_BLD)

    def _flip(self, x_BLD: Tensor, places: Places) -> Tensor:
        """Put the first tokens of each sequence back to front."""
        place, length = places.place, places.length
        if self.published:
            n_flipped = torch.full_like(length, PUBLISHED_FLIP)
        else:
            n_flipped = (length * self.flip + 1e-6).long()
        source = torch.where(place < n_flipped, n_flipped - 1 - place, place)
        offset_BL = source.clamp(max=length - 1) - place
        here_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        x_BLD = x_BLD.gather(1, (here_L + offset_BL).unsqueeze(-1).expand_as(x_BLD))
        # NOTE[DIFF] Where the public code flips padding into place, its tokens are the LayerNorm's bias; here zeros.
        return x_BLD * (source < length).unsqueeze(-1) if self.published else x_BLD

    def _convolve(self, x_BLD: Tensor, places: Places) -> Tensor:
        """Apply the convolution within each sequence."""
        first = (places.place == 0).unsqueeze(-1)
        last = (places.place == places.length - 1).unsqueeze(-1)
        before_BLD = F.pad(x_BLD[:, :-1], (0, 0, 1, 0)).masked_fill(first, 0)
        after_BLD = F.pad(x_BLD[:, 1:], (0, 0, 0, 1)).masked_fill(last, 0)
        weight = self.conv1d.weight.transpose(1, 2).flatten(1)
        return F.linear(torch.cat((before_BLD, x_BLD, after_BLD), -1), weight, self.conv1d.bias)

    def _recur(self, x_BLD: Tensor, places: Places) -> Tensor:
        """Run the GRU over each sequence."""
        if is_exporting():  # one sequence a row, padding at its end
            return _gru_operator(self.gru, x_BLD)
        if places.seq_idx is None:
            return self.gru(x_BLD)[0]
        first_BL = places.place == 0
        sequence_BL = first_BL.flatten().cumsum(0).view_as(first_BL) - 1
        length_S = places.length[first_BL]
        x_SLD = x_BLD.new_zeros(length_S.numel(), int(length_S.max()), x_BLD.shape[2])
        x_SLD = x_SLD.index_put((sequence_BL, places.place), x_BLD)
        packed = pack_padded_sequence(x_SLD, length_S.cpu(), batch_first=True, enforce_sorted=False)
        y_SLD, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return y_SLD[sequence_BL, places.place]


def _gru_operator(gru: nn.GRU, x_BLD: Tensor) -> Tensor:
    """Run a GRU without bias as one ``scan`` operator, which any length can be exported with."""
    from torch._higher_order_ops.scan import scan

    weights_hh, weights_ih = cast(Tensor, gru.weight_hh_l0), cast(Tensor, gru.weight_ih_l0)

    def step(h_BD: Tensor, x_BX: Tensor) -> tuple[Tensor, Tensor]:
        x_r, x_z, x_n = x_BX.split(gru.hidden_size, dim=1)
        h_r, h_z, h_n = F.linear(h_BD, weights_hh).split(gru.hidden_size, dim=1)
        new_BD = torch.tanh(x_n + (x_r + h_r).sigmoid() * h_n)
        h_BD = new_BD + (x_z + h_z).sigmoid() * (h_BD - new_BD)
        return h_BD, h_BD.clone()

    x_LBX = F.linear(x_BLD, weights_ih).transpose(0, 1)
    return scan(step, torch.zeros_like(x_BLD[:, 0]), x_LBX)[1].transpose(0, 1)


class Sigma(Stack):
    """SIGMA blocks in a :class:`Stack`; a loss at every position is refused.

    The defaults are the published layer: 129,859 parameters, 129,987 with the LayerNorm of the item embeddings, which
    belongs to the tokenizer. The public code applies dropout before that LayerNorm, our tokenizer after it.

    The public code flips the first 45 tokens of right-padded rows of 50. So the last item of a history of up to 22
    items sees nothing but padding in the flipped branch. ``flip`` is a share of the history's own length instead.

    Args:
        d_model, d_state, d_conv, expand: As in :class:`SigmaBlock`.
        n_layers: Number of layers.
        flip: Share of a history's length to flip, rounded down; below 1, so that its last item stays last.
        published: Flip the first 45 tokens of every history, padding included, and let ``mixing`` be ``fixed``.
        mixing: Weights of the three branches, which start at .1, .1 and .8. ``softmax``: their softmax, trained.
            ``fixed``: their softmax, not trained. ``raw``: the three numbers themselves, trained; the public code
            computes a softmax without a gradient, does not use it, and multiplies by these numbers. None: ``softmax``,
            or ``fixed`` with ``published``.
        gate_dropout: Dropout rate of the gates.
        residual: Add a layer's input to its block's output. None: if there are several layers.
        dropout, norm_eps, ffn, init, stack: Options of :class:`Stack`.

    Raises:
        ValueError: ``flip`` or ``mixing`` is out of its range, or as :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import Sigma
        >>> backbone = Sigma(d_model=8, d_state=4)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    causal = False
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-SIGMA", "next_item": "SIGMA"}
    style: ClassVar[Mapping[str, str]] = {"color": "#e69f00", "linestyle": "-.", "marker": "P"}

    def __init__(
        self,
        *,
        d_model: int = 64,
        n_layers: int = 1,
        d_state: int = 32,
        d_conv: int = 4,
        expand: int = 2,
        flip: float = 0.9,
        published: bool = False,
        mixing: Mixing | None = None,
        gate_dropout: float = 0.2,
        residual: bool | None = None,
        dropout: float = 0.2,
        norm_eps: float = 1e-12,
        ffn: int = 4,
        init: Init = "normal",
        **stack: Any,
    ) -> None:
        if not 0 <= flip < 1:
            raise ValueError(f"flip={flip}: expected a share from 0 to below 1")
        if mixing is None:
            mixing = "fixed" if published else "softmax"
        if mixing not in ("softmax", "raw", "fixed"):
            raise ValueError(f"mixing={mixing!r}: expected 'softmax', 'raw' or 'fixed'")
        super().__init__(
            *(
                SigmaBlock(
                    d_model=d_model,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    flip=flip,
                    published=published,
                    mixing=mixing,
                    gate_dropout=gate_dropout,
                )
                for _ in range(n_layers)
            ),
            d_model=d_model,
            residual=n_layers > 1 if residual is None else residual,
            dropout=dropout,
            norm_eps=norm_eps,
            ffn=ffn,
            init=init,
            **stack,
        )

    def context(self, tokens: Tensor, seq_idx: Tensor | None) -> Places:
        """Return the place of each position in its sequence, which all layers share."""
        return places_of(tokens, seq_idx)
