"""Apply self-attention to packed rows, causal or not. PyTorch's ``nn.MultiheadAttention`` holds the weights.

Legend: B rows, L tokens, D = d_model, H heads of P = D / H channels, T tokens seen so far.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Mixer
from recsys_ssm.ops.dropout import dropout


class AttentionState(NamedTuple):
    """Keys and values of all tokens so far."""

    key: Tensor
    """(B, H, T, P)."""
    value: Tensor
    """(B, H, T, P)."""


def attention_mask(tokens: Tensor, seq_idx: Tensor | None, causal: bool) -> Tensor | None:
    """Return the mask that is added to the scores, 0 or -inf, for all layers and heads.

    Args:
        tokens: (B, L, D), for length, dtype and device.
        seq_idx: (B, L), as in :meth:`Backbone.forward`. Padding sees padding, so each row of the softmax has an entry.
        causal: Hide later tokens.

    Returns:
        (B, 1, L, L), (L, L) if all rows are alike, or None if every token sees every other.
    """
    if seq_idx is None and not causal:
        return None
    length = tokens.shape[1]
    hidden = torch.full((length, length), causal, device=tokens.device).triu(1)
    if seq_idx is not None:
        hidden = hidden | (seq_idx.unsqueeze(2) != seq_idx.unsqueeze(1)).unsqueeze(1)
    return tokens.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)


def attend(weights: nn.MultiheadAttention, x_BLD: Tensor, mask: Tensor | None) -> Tensor:
    """Apply multi-head self-attention (B, L, D), with dropout on the attention weights during training.

    Args:
        weights: Holder of the weights.
        x_BLD: (B, L, D).
        mask: Result of :func:`attention_mask`.
    """
    q_BHLP, k_BHLP, v_BHLP = (heads.transpose(1, 2) for heads in _project(weights, x_BLD))
    p = weights.dropout if weights.training else 0.0
    if p and x_BLD.device.type == "cpu":  # PyTorch has no fused kernel for this case
        scores_BHLL = (q_BHLP * weights.head_dim**-0.5) @ k_BHLP.transpose(2, 3)
        if mask is not None:
            scores_BHLL += mask
        y_BHLP = dropout(scores_BHLL.softmax(-1), p) @ v_BHLP
    else:
        y_BHLP = F.scaled_dot_product_attention(q_BHLP, k_BHLP, v_BHLP, attn_mask=mask, dropout_p=p)
    return weights.out_proj(y_BHLP.transpose(1, 2).flatten(2))


def attend_step(
    weights: nn.MultiheadAttention, x_BD: Tensor, state: AttentionState
) -> tuple[Tensor, AttentionState]:
    """Apply :func:`attend` at the next position; the time of a call grows with T."""
    q_BH1P, k_BH1P, v_BH1P = (heads.unsqueeze(2) for heads in _project(weights, x_BD))
    state = AttentionState(
        torch.cat((state.key, k_BH1P), dim=2), torch.cat((state.value, v_BH1P), dim=2)
    )
    y_BH1P = F.scaled_dot_product_attention(q_BH1P, state.key, state.value)
    return weights.out_proj(y_BH1P.flatten(1)), state


def no_tokens(weights: nn.MultiheadAttention, batch_size: int) -> AttentionState:
    """Return the state before the first token: an empty cache of keys and values."""
    empty = weights.in_proj_weight.new_empty(batch_size, weights.num_heads, 0, weights.head_dim)
    return AttentionState(empty, empty)


def _project(weights: nn.MultiheadAttention, x_D: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values (…, H, P)."""
    qkv = F.linear(x_D, weights.in_proj_weight, weights.in_proj_bias)
    return qkv.unflatten(-1, (3, weights.num_heads, weights.head_dim)).unbind(-3)


class CausalAttention(Mixer):
    """Causal self-attention as the mixer of a layer; its context is the mask of :func:`attention_mask`.

    Raises:
        ValueError: ``d_model`` is not a multiple of ``nhead``.
    """

    def __init__(self, *, d_model: int, nhead: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(
                f"d_model={d_model} is not a multiple of nhead={nhead}; change one of them"
            )
        self.attention = nn.MultiheadAttention(d_model, nhead, dropout, batch_first=True)

    def forward(self, x_BLD: Tensor, context: Tensor | None = None) -> Tensor:
        return attend(self.attention, x_BLD, context)

    def init_state(self, batch_size: int) -> AttentionState:
        return no_tokens(self.attention, batch_size)

    def step(self, x_BD: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        return attend_step(self.attention, x_BD, state)
