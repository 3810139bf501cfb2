"""Rank items by how likely a Mamba language model finds their titles after those of the history (MamRec).

``titles of a history → prompt → Mamba → state → every title of the catalogue from that state → log-likelihoods``

The state of a Mamba after the prompt has the same size however long the history is. So the prompt is read once, and
all titles are read from its state side by side: for I titles of T tokens and a prompt of L tokens that takes L + I·T
tokens of work, not I·(L + T). The result is that of the whole texts.

Legend: U users, I items, S different titles, R rows of a batch of titles, T tokens of a title, D = d_model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.batches import NO_ITEM
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import rank_top_k
from recsys_ssm.models.histories import History
from recsys_ssm.models.mamba_lm import FAMILIES, MambaLM
from recsys_ssm.models.text_recommender import Sample, TextRecommender
from recsys_ssm.text.prompts import padded

if TYPE_CHECKING:
    from recsys_ssm.batches import SequenceBatch

END = "\n"
"""Text that ends a title; a title itself is one line."""

Score = Literal["sum", "mean"]
Family = Literal["mamba", "mamba2"]


class MamRec(TextRecommender):
    """Rank items by the likelihood of their titles under a Mamba language model.

    A history is the text of its titles, a line each. The model is trained to go on with the titles, and an item's score
    is the log-likelihood of its line after the history's. The end of the line counts as well, so the probabilities of
    all texts sum to one, and a title that begins another one is not preferred.

    Args:
        score: ``sum``: log-likelihood of the title; ``mean``: the same per token, which prefers longer titles.
        family: Kind of a tiny model: ``mamba`` or ``mamba2``. Given weights have their own.
        val_users: Users to rank for in a validation, the first ones; None: all. The test ranks for all users.
        score_rows: Titles that are read at once.
        dropout: Dropout of the language model in training.
        base: See :class:`~recsys_ssm.models.text_recommender.TextRecommender`.

    Raises:
        UserError: An option is wrong, or the language model cannot be used.
    """

    # NOTE[DIFF] The paper does not give MamRec's prompt, loss and score.

    families = FAMILIES
    latency_calls = 1  # a call for 256 users takes minutes

    def __init__(
        self,
        *,
        score: Score = "sum",
        family: Family = "mamba",
        val_users: int | None = None,
        score_rows: int = 1024,
        dropout: float = 0.1,
        **base: Any,
    ) -> None:
        for option, value, choices in (("score", score, Score), ("family", family, Family)):
            if value not in get_args(choices):
                raise UserError(
                    f"model.{option}={value}: expected {' or '.join(get_args(choices))}"
                )
        for name, count in (("val_users", val_users), ("score_rows", score_rows)):
            if count is not None and count < 1:
                raise UserError(f"model.{name}={count}: give at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout={dropout}: give a probability, from 0 to below 1")
        super().__init__(**base)
        self.score, self.val_users, self.score_rows = score, val_users, score_rows
        self._n_validated = 0
        self.lm = MambaLM(self.source.config or self._tiny(family), dropout=dropout)
        if self.source.folder is not None:
            self.lm.load_weights(self.source.folder)
        self.keep_language(self.lm.config)
        self.end = self.tokenizer.encode(END)
        self.start = self.end if self.tokenizer.bos is None else [self.tokenizer.bos]
        # A title without any token, and one of white space alone, would be an empty line.
        self.lines = [[*title, *self.end] for title in self.titles]
        known: dict[tuple[int, ...], int] = {}
        number = [known.setdefault(tuple(line), len(known)) for line in self.lines]
        # Items of the same title have exactly equal scores, whatever batch they are in.
        self.register_buffer("title_of_item", torch.tensor(number), persistent=False)
        self.title_of_item: Tensor
        self.distinct = list(known)
        self.batches = _batches(self.distinct, score_rows, self.tokenizer.pad)

    def _tiny(self, family: str) -> dict[str, Any]:
        weights, tokenizer = self.weights, self.tokenizer
        config = {
            "model_type": family,
            "vocab_size": tokenizer.n_tokens,
            "hidden_size": weights.d_model,
            "num_hidden_layers": weights.n_layers,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
            "pad_token_id": tokenizer.pad,
            "tie_word_embeddings": True,
        }
        if family == "mamba2":
            headdim = min(64, 2 * weights.d_model)
            if 2 * weights.d_model % headdim:
                raise UserError(
                    f"text.d_model={weights.d_model}: with model.family=mamba2 give a multiple of 32"
                )
            heads = 2 * weights.d_model // headdim
            config |= {"head_dim": headdim, "num_heads": heads, "n_groups": 1, "state_size": 64}
        return config

    # Training

    def sample_loss(self, samples: list[Sample], batch: SequenceBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy per token of the titles that follow a history, and the number of these tokens.

        A window is one text, whose titles are read once; each title that is a target counts.
        """
        del samples  # prefixes of one window would be read again and again
        tokens, seq_idx, counts = self._texts(batch)
        tokens, seq_idx, counts = (each.to(self.device) for each in (tokens, seq_idx, counts))
        x_TD = self.lm(tokens[None], seq_idx[None])[0]
        # Position t predicts token t + 1.
        where = counts[1:].nonzero().squeeze(1)
        loss = F.cross_entropy(self.lm.logits(x_TD[where]), tokens[where + 1])
        return loss, where.numel()

    def _texts(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch's windows as texts in one row: tokens, number of the text, True where a token counts."""
        tokens: list[int] = []
        number: list[int] = []
        counts: list[bool] = []
        n_texts = 0
        for items, seqs, targets in zip(
            batch.item.tolist(), batch.seq_idx.tolist(), batch.target.tolist(), strict=True
        ):
            last: int | None = None
            for place, (item, seq, target) in enumerate(zip(items, seqs, targets, strict=True)):
                if seq < 0:
                    continue
                if seq != last:
                    last = int(seq)
                    n_texts += 1
                    # A start token has no title.
                    text = [*self.start, *(self.lines[item] if item >= 0 else ())]
                    tokens += text
                    counts += [False] * len(text)
                ends = place + 1 == len(seqs) or seqs[place + 1] != seq
                # The next title: the target, or, within the window, the next item.
                after = target if ends or target >= 0 else items[place + 1]
                if after >= 0:
                    tokens += self.lines[after]
                    counts += [target >= 0] * len(self.lines[after])
                number += [n_texts - 1] * (len(tokens) - len(number))
        return torch.tensor(tokens), torch.tensor(number), torch.tensor(counts)

    # Ranking

    def prompt(self, history: History) -> list[int]:
        """Return the tokens of a history's text, the latest title last."""
        lines = [self.lines[item] for item in history[-self.max_length :]]
        return [*self.start, *itertools.chain.from_iterable(lines)]

    def read(self, histories: list[History]) -> Tensor:
        """Return the scores of all items after each history, (U, I)."""
        tokens, mask = padded([self.prompt(each) for each in histories], self.tokenizer.pad)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        with self.inference():
            x_ULD, state = self.lm.extend(tokens, self.lm.init_state(len(histories)), mask - 1)
            last_U = mask.sum(1) - 1
            first_UV = self.lm.logits(
                x_ULD[torch.arange(len(histories), device=self.device), last_U]
            )
            log_p_UV = first_UV.float().log_softmax(-1)
            scores_US = torch.stack(
                [
                    self._title_scores(log_p_UV[user], _row(state, user))
                    for user in range(len(histories))
                ]
            )
        return scores_US[:, self.title_of_item]

    def _title_scores(self, log_p_V: Tensor, state: list[Any]) -> Tensor:
        """Return the score (S,) of each different title from the log-probabilities and the state after a prompt."""
        scores_S = log_p_V.new_empty(len(self.distinct))
        for rows, tokens, mask in self.batches:
            tokens, real = tokens.to(self.device), mask[:, 1:].to(self.device)
            found_R = log_p_V[tokens[:, 0]]
            if tokens.shape[1] > 1:
                x_RTD = self.lm.follow(tokens[:, :-1], _repeated(state, len(rows)))
                each_N = self.lm.log_likelihood(x_RTD[real], tokens[:, 1:][real])
                found_RT = torch.zeros_like(real, dtype=each_N.dtype)
                found_RT[real] = each_N
                found_R = found_R + found_RT.sum(1)
            if self.score == "mean":
                found_R = found_R / (real.sum(1) + 1)
            scores_S[rows.to(self.device)] = found_R
        return scores_S

    def top(
        self, reading: Tensor, histories: list[History], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the items of the likeliest titles; the score is the log-likelihood."""
        scores_UI = reading.clone()
        if filter_seen:
            for user, history in enumerate(histories):
                scores_UI[user, history] = -torch.inf
        found = min(k, scores_UI.shape[1])
        top_UK = rank_top_k(scores_UI, found)
        scores_UK = scores_UI.gather(1, top_UK)
        top_UK = top_UK.masked_fill(scores_UK == -torch.inf, NO_ITEM)
        missing = (0, k - found)
        return (
            F.pad(top_UK, missing, value=NO_ITEM).cpu(),
            F.pad(scores_UK, missing, value=torch.nan).cpu(),
        )

    def on_validation_epoch_start(self) -> None:
        """Count the users of this validation from none."""
        self._n_validated = 0

    def validate_users(self, histories: list[History], target: Tensor) -> None:
        """Rank for the users of the validation, at most ``val_users``."""
        left = len(histories) if self.val_users is None else self.val_users - self._n_validated
        histories, target = histories[: max(left, 0)], target[: max(left, 0)]
        self._n_validated += len(histories)
        if histories:
            super().validate_users(histories, target)

    def parameter_counts(self) -> dict[str, int]:
        """Count all parameters, and those without the embedding of the tokens."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return {
            "total": total,
            "without_embeddings": total - self.lm.backbone.embeddings.weight.numel(),
        }


def _row(state: list[Any], user: int) -> list[Any]:
    """Return one user's part of a state, with a batch of one."""
    return [type(each)(*(part[user : user + 1] for part in each)) for each in state]


def _repeated(state: list[Any], rows: int) -> list[Any]:
    """Return a state of one row for many rows, without a copy."""
    return [type(each)(*(part.expand(rows, *part.shape[1:]) for part in each)) for each in state]


def _batches(
    lines: Sequence[tuple[int, ...]], most: int, pad: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Put titles of similar length together: row numbers (R,), tokens (R, T), and which of them are real (R, T)."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lines)), key=lambda i: (len(lines[i]), i)):
        last = groups[-1] if groups else []
        if last and len(last) < most and len(lines[row]) <= 1.25 * len(lines[last[0]]):
            last.append(row)
        else:
            groups.append([row])
    found = []
    for group in groups:
        tokens, mask = padded([lines[row] for row in group], pad)
        found.append((torch.tensor(group), tokens, mask > 0))
    return found
