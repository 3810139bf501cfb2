"""Let GPT-2 write search queries from a history, and BM25 find items whose titles answer them (GPT4Rec).

``titles of a history → prompt → GPT-2, beam search → m queries → BM25 over titles → k/m items a query``
(Li et al. 2023, arXiv 2304.03879).

Legend: U users, I items, K places, M queries of a user, B rows of tokens, L tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.batches import NO_ITEM
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import rank_top_k
from recsys_ssm.models.histories import History
from recsys_ssm.models.text_recommender import Sample, TextRecommender
from recsys_ssm.text.extra import require
from recsys_ssm.text.prompts import latest_that_fit, padded
from recsys_ssm.text.search import TitleSearch
from recsys_ssm.text.weights import transformers_model

if TYPE_CHECKING:
    from recsys_ssm.batches import SequenceBatch

BEFORE = "Previously bought:"
AFTER = ". Wants to buy:"
BETWEEN = ";"


class Gpt4Rec(TextRecommender):
    """Rank items by what GPT-2 would search for after a history.

    The prompt is ``Previously bought: title; title. Wants to buy:``, and GPT-2 is trained to go on with the title of
    the next item. It writes ``n_queries`` queries by beam search. The ranking takes the best item of each query in the
    order of the queries, then the second best of each, and so on, every item once; so its first k items are about
    k / n_queries of each query, whatever k is. Items that share no word with a query are never retrieved.

    Args:
        n_queries: Queries of a user (M), the beams of the search.
        query_tokens: Tokens of a query at most.
        prompt_tokens: Tokens of a prompt and a query at most; the oldest items of a longer history are left out.
        history_loss: Train on the titles of the history as well, not on the next title alone.
        generate_batch: Users for whom queries are written at once.
        k1: Saturation of repeated words in BM25.
        b: Weight of a title's length in BM25.
        dropout: Dropout of a tiny model.
        base: See :class:`~recsys_ssm.models.text_recommender.TextRecommender`.

    Raises:
        UserError: An option is wrong, or the language model cannot be used.
    """

    # NOTE[DIFF] The paper orders the items of all queries in a way that it does not give; here they take turns.

    labels: ClassVar[Mapping[str, str]] = {"next_item": "GPT4Rec"}
    families = ("gpt2",)
    phrases = (BEFORE, AFTER)

    def __init__(
        self,
        *,
        n_queries: int = 5,
        query_tokens: int = 24,
        prompt_tokens: int = 512,
        history_loss: bool = True,
        generate_batch: int = 128,
        k1: float = 1.5,
        b: float = 0.75,
        dropout: float = 0.1,
        **base: Any,
    ) -> None:
        for option, value in (
            ("n_queries", n_queries),
            ("query_tokens", query_tokens),
            ("generate_batch", generate_batch),
        ):
            if value < 1:
                raise UserError(f"model.{option}={value}: give at least 1")
        super().__init__(**base)
        self.n_queries, self.query_tokens, self.prompt_tokens = (
            n_queries,
            query_tokens,
            prompt_tokens,
        )
        self.history_loss, self.generate_batch = history_loss, generate_batch
        tokenizer = self.tokenizer
        if tokenizer.eos is None:
            raise UserError(
                f"text.model={self.weights.model}: its tokenizer has no token for the end of a text, which ends a "
                "query; name one as eos_token in tokenizer_config.json"
            )
        self.end = int(tokenizer.eos)
        config = self.source.config or {
            "vocab_size": tokenizer.n_tokens,
            "n_embd": self.weights.d_model,
            "n_layer": self.weights.n_layers,
            "n_head": self.weights.n_heads,
            "n_positions": prompt_tokens,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
        }
        first = self.end if tokenizer.bos is None else tokenizer.bos
        self.before: list[int] = [first, *tokenizer.encode(BEFORE)]
        self.after, self.between = tokenizer.encode(AFTER), tokenizer.encode(BETWEEN)
        fixed = len(self.before) + len(self.after) + query_tokens + 1
        if prompt_tokens <= fixed:
            raise UserError(
                f"model.prompt_tokens={prompt_tokens}: no room for a title beside the prompt's own words and a query "
                f"of model.query_tokens={query_tokens}; give more than {fixed}"
            )
        self.lm: Any
        self.lm, made = transformers_model("GPT2LMHeadModel", config, self.source.folder)
        positions = made["n_positions"]
        if positions < prompt_tokens:
            raise UserError(
                f"model.prompt_tokens={prompt_tokens}: the language model has {positions} positions; give at most so "
                "many"
            )
        self.keep_language(made)
        self.room = prompt_tokens - fixed
        self.search = TitleSearch(self.item_titles, k1=k1, b=b)

    def prompt(self, history: History) -> list[int]:
        """Return the tokens of a history's prompt, the latest titles last."""
        titles = [self.titles[item] for item in history[-self.max_length :]]
        return [*self.before, *latest_that_fit(titles, self.between, self.room), *self.after]

    def sample_loss(self, samples: list[Sample], batch: SequenceBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy per token of what the prompts go on with, and the number of these tokens."""
        rows, begins = [], []
        for history, target in samples:
            prompt = self.prompt(history)
            rows.append([*prompt, *self.titles[target][: self.query_tokens], self.end])
            begins.append(len(self.before) if self.history_loss else len(prompt))
        tokens, mask = (each.to(self.device) for each in padded(rows, self.tokenizer.pad))
        trained = torch.arange(tokens.shape[1], device=self.device) >= torch.tensor(
            begins, device=self.device
        ).unsqueeze(1)
        label = tokens.masked_fill(~(trained & (mask > 0)), -100)[:, 1:]
        # Padding and the prompt's own words never reach the vocabulary.
        hidden = self.lm.transformer(tokens, attention_mask=mask).last_hidden_state[:, :-1]
        where = label >= 0
        loss = F.cross_entropy(self.lm.lm_head(hidden[where]), label[where])
        return loss, int(where.sum())

    def read(self, histories: list[History]) -> list[list[str]]:
        """Write the queries of each history, the likeliest first, each once."""
        queries: list[list[str]] = []
        for start in range(0, len(histories), self.generate_batch):
            prompts = [self.prompt(each) for each in histories[start : start + self.generate_batch]]
            queries += self._generate(prompts)
        return queries

    def _generate(self, prompts: Sequence[Sequence[int]]) -> list[list[str]]:
        transformers = require("transformers", "model=gpt4rec")
        tokens, mask = padded(prompts, self.tokenizer.pad, left=True)
        how = transformers.GenerationConfig(
            num_beams=self.n_queries,
            num_return_sequences=self.n_queries,
            max_new_tokens=self.query_tokens,
            do_sample=False,
            early_stopping=True,
            eos_token_id=self.end,
            pad_token_id=self.tokenizer.pad,
            bos_token_id=self.tokenizer.bos,
        )
        with self.inference():
            written = self.lm.generate(
                tokens.to(self.device), attention_mask=mask.to(self.device), generation_config=how
            )
        found = [
            self.tokenizer.decode(row).strip() for row in written[:, tokens.shape[1] :].tolist()
        ]
        return [
            list(dict.fromkeys(found[at : at + self.n_queries]))
            for at in range(0, len(found), self.n_queries)
        ]

    def top(
        self, reading: list[list[str]], histories: list[History], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the items that the queries find; the score is BM25's for the query that an item is from."""
        top_UK = torch.full((len(histories), k), NO_ITEM)
        scores_UK = torch.full((len(histories), k), torch.nan)
        known: dict[str, Tensor] = {}
        for user, (queries, history) in enumerate(zip(reading, histories, strict=True)):
            for query in queries:
                if query not in known:
                    known[query] = self.search.scores(query)
            scores_MI = torch.stack([known[query] for query in queries])
            if filter_seen:
                scores_MI[:, history] = 0
            order_MK = rank_top_k(scores_MI, min(k, scores_MI.shape[1]))
            best_MK = scores_MI.gather(1, order_MK)
            pairs = zip(order_MK.T.flatten().tolist(), best_MK.T.flatten().tolist(), strict=True)
            # An item keeps its first place.
            found: dict[int, float] = {}
            for item, score in pairs:
                if score > 0:
                    found.setdefault(item, score)
            first = dict(itertools.islice(found.items(), k))
            top_UK[user, : len(first)] = torch.tensor(list(first), dtype=torch.long)
            scores_UK[user, : len(first)] = torch.tensor(list(first.values()))
        return top_UK, scores_UK

    def parameter_counts(self) -> dict[str, int]:
        """Count all parameters, and those without the embeddings of tokens and positions."""
        total = sum(p.numel() for p in self.lm.parameters())
        tables = (self.lm.transformer.wte, self.lm.transformer.wpe)
        return {
            "total": total,
            "without_embeddings": total - sum(table.weight.numel() for table in tables),
        }
