"""Let a Llama-style model rank the candidates of another recommender by titles (LlamaRec).

``history → retriever → candidates → prompt with letters → logits of the letters at the last token → order``
(Yue et al. 2023, arXiv 2311.02089).

Legend: U users (or samples), C candidates, K places, B rows of tokens, L tokens, W weights.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from recsys_ssm.batches import NO_ITEM
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import find
from recsys_ssm.models.histories import History, histories_of
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.text_recommender import Sample, TextRecommender
from recsys_ssm.text.extra import require
from recsys_ssm.text.prompts import latest_that_fit, padded
from recsys_ssm.text.weights import TINY, transformers_model

if TYPE_CHECKING:
    from recsys_ssm.batches import HistoryBatch, SequenceBatch

BEFORE = "User history:"
MIDDLE = ". Candidates:"
AFTER = ". Answer:"
BETWEEN = ";"
LETTERS = string.ascii_uppercase

WEIGHTS = tuple(i / 10 for i in range(11))
"""Weights of the language model that validation chooses from."""


class LlamaRec(TextRecommender):
    """Rank the candidates of a trained recommender with a language model.

    The retriever, a finished run, finds ``n_candidates`` items for a history. The prompt shows the latest titles of the
    history and the candidates' titles, each behind a letter, in a random order. The letters' logits at the last token
    rank the candidates; whatever the retriever ranks below them follows in its order. So a user whose target is not
    among the candidates has the target at the retriever's rank.

    Training examples are positions that the dataset trains on, and the target is their next item. By default an example
    has the retriever's candidates, and positions whose next item is not among them are left out, as they are undecided
    in use: a target that was put among the retriever's items would be known by its difference from them. The order of
    the candidates is drawn at random, in use as well (there it follows from the candidates), so it says nothing.

    With the weights of a folder, a low-rank adapter (LoRA) on the query and value projections is trained; the
    checkpoint holds the adapter, and reads the rest from that folder again. A tiny model is trained whole.

    Args:
        retriever: A trained recommender; None: that of a checkpoint.
        retriever_spec: Class and arguments of the retriever, which a checkpoint passes.
        n_candidates: Candidates of a user, at most 26.
        n_titles: Latest items of a history whose titles are read.
        train_candidates: ``retrieved``: see above; ``random``: the target, and random items outside the history,
            as published.
        mix: Weight w of the language model: candidates are ordered by (1 - w) log p of the retriever + w log p of the
            language model, both among the candidates. 1: the language model alone, as published. None: that of 0, 0.1,
            …, 1 with the highest NDCG@10 of a validation, if it is above the retriever's by two standard errors of the
            paired difference, else 0; the checkpoint holds it.
        prompt_tokens: Tokens of a prompt at most; the oldest items of a longer history are left out.
        rank_batch: Users whose candidates are ranked at once.
        lora_rank, lora_alpha, lora_dropout: Rank, scale and dropout of the adapter.
        four_bit: Keep the weights of a folder in 4 bits (needs the package ``bitsandbytes`` and a CUDA device).
        base: See :class:`~recsys_ssm.models.text_recommender.TextRecommender`.

    Raises:
        UserError: An option is wrong, or the language model or the retriever cannot be used.
    """

    # NOTE[DIFF] The public code trains on the next item and items drawn from the catalogue (train_candidates=random),
    # ranks by the language model alone (mix=1), and shows the candidates of a test in the retriever's order.

    families = ("llama",)
    phrases = (BEFORE, MIDDLE, AFTER)

    def __init__(
        self,
        *,
        retriever: Recommender | None = None,
        retriever_spec: Mapping[str, Any] | None = None,
        n_candidates: int = 20,
        n_titles: int = 20,
        train_candidates: Literal["retrieved", "random"] = "retrieved",
        mix: float | None = None,
        prompt_tokens: int = 2048,
        rank_batch: int = 64,
        lora_rank: int = 8,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        four_bit: bool = False,
        **base: Any,
    ) -> None:
        if not 2 <= n_candidates <= len(LETTERS):
            raise UserError(
                f"model.n_candidates={n_candidates}: give 2 to {len(LETTERS)}, a letter for each"
            )
        if mix is not None and not 0 <= mix <= 1:
            raise UserError(f"model.mix={mix}: give a weight from 0 to 1, or null")
        for option, value in (
            ("n_titles", n_titles),
            ("rank_batch", rank_batch),
            ("lora_rank", lora_rank),
        ):
            if value < 1:
                raise UserError(f"model.{option}={value}: give at least 1")
        if train_candidates not in ("retrieved", "random"):
            raise UserError(
                f"model.train_candidates={train_candidates}: expected retrieved or random"
            )
        self.mix, self.n_candidates, self.n_titles = mix, n_candidates, n_titles
        self.train_candidates = train_candidates
        super().__init__(**base)
        self.rank_batch = rank_batch
        self.retriever = self._retriever(retriever, retriever_spec)
        self.hparams["retriever_spec"] = {
            "model": f"{type(self.retriever).__module__}.{type(self.retriever).__qualname__}",
            "arguments": dict(self.retriever.hparams),
        }
        tokenizer = self.tokenizer
        letters = [tokenizer.encode(letter)[-1:] for letter in LETTERS[:n_candidates]]
        if len({tuple(each) for each in letters}) < n_candidates or [] in letters:
            raise UserError(
                f"text.model={self.weights.model}: its tokenizer has not a token for each of the letters A to "
                f"{LETTERS[n_candidates - 1]}; give fewer candidates with model.n_candidates, or another model"
            )
        self.letters = [each[0] for each in letters]
        first = [] if tokenizer.bos is None else [tokenizer.bos]
        self.before = [*first, *tokenizer.encode(BEFORE)]
        self.middle, self.after = tokenizer.encode(MIDDLE), tokenizer.encode(AFTER)
        self.between = tokenizer.encode(BETWEEN)
        title_tokens = int(self.hparams["title_tokens"])
        longest = len(self.before) + len(self.middle) + len(self.after)
        longest += n_candidates * (1 + title_tokens) + title_tokens
        if prompt_tokens < longest:
            raise UserError(
                f"model.prompt_tokens={prompt_tokens}: {n_candidates} candidates and a title of model.title_tokens="
                f"{title_tokens} may need {longest}; give at least so many"
            )
        self.prompt_tokens = prompt_tokens
        self._make_lm(prompt_tokens, lora_rank, lora_alpha, lora_dropout, four_bit)
        self.register_buffer("mix_weight", torch.tensor(1.0 if mix is None else mix))
        self.mix_weight: Tensor
        self.val_gains: Any = nn.ModuleList(MeanMetric() for _ in WEIGHTS)
        self.val_squares: Any = nn.ModuleList(MeanMetric() for _ in WEIGHTS)
        self.val_users = SumMetric()
        self.retrieved = MeanMetric()

    # What it is made of

    def _retriever(self, model: Recommender | None, spec: Mapping[str, Any] | None) -> Recommender:
        """Return the retriever, frozen: the object, or one made from a checkpoint's spec."""
        if model is None:
            if spec is None:
                raise UserError(
                    "retriever: not set, and LlamaRec ranks what another model retrieves; give retriever=<folder of a "
                    "finished run of the same dataset>"
                )
            found = find(spec["model"], "retriever", Recommender)
            model = found(**spec["arguments"])
        if not hasattr(model, "candidates"):
            raise UserError(
                f"retriever: a {type(model).__name__} does not read histories; give a run of a next-item model"
            )
        if model.item_ids != self.item_ids:
            raise UserError(
                "retriever: its items are not those of the dataset; give a run that was trained on the same data"
            )
        return model.requires_grad_(False)

    def _make_lm(self, length: int, rank: int, alpha: int, dropout: float, four_bit: bool) -> None:
        weights, source = self.weights, self.source
        self.adapted = weights.model != TINY
        config = source.config or {
            "vocab_size": self.tokenizer.n_tokens,
            "hidden_size": weights.d_model,
            "intermediate_size": 4 * weights.d_model,
            "num_hidden_layers": weights.n_layers,
            "num_attention_heads": weights.n_heads,
            "num_key_value_heads": weights.n_heads,
            "max_position_embeddings": length,
            "tie_word_embeddings": True,
            "bos_token_id": self.tokenizer.bos,
            "eos_token_id": self.tokenizer.eos,
            "pad_token_id": None,
        }
        # The adapter alone is in a checkpoint.
        self.lm: Any
        folder = weights.find_folder() if self.adapted and source.folder is None else source.folder
        self.lm, made = transformers_model(
            "LlamaForCausalLM", config, folder, four_bit=four_bit and self.adapted
        )
        positions = made["max_position_embeddings"]
        if positions < length:
            raise UserError(
                f"model.prompt_tokens={length}: the language model has {positions} positions; give at most so many"
            )
        self.keep_language(made)
        if self.adapted:
            peft = require("peft", "model=llamarec with text.model=<folder>")
            adapter = peft.LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=["q_proj", "v_proj"],
            )
            self.lm.requires_grad_(False)
            self.lm = peft.inject_adapter_in_model(adapter, self.lm)
            frozen = {name for name, p in self.lm.named_parameters() if not p.requires_grad}
            self.lm.register_state_dict_post_hook(_without(frozen))
            self.lm.register_load_state_dict_post_hook(_expect_absent(frozen))

    def set_metrics(self, metrics: Sequence[str]) -> None:
        """Set the ranking metrics that validation and test report; each weight of the mix has its own."""
        super().set_metrics(metrics)
        self.val_metrics_by_weight: Any = nn.ModuleList(
            self.ranking_metrics(metrics) for _ in (WEIGHTS if self.mix is None else ())
        )
        self.test_metrics_retriever = self.ranking_metrics(metrics)

    # Prompts

    def prompt(self, history: History, candidates: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt: the latest titles of the history, then the candidates in their order."""
        pool = [
            token
            for letter, item in zip(self.letters, candidates, strict=False)
            for token in (letter, *self.titles[item])
        ]
        tail = [*self.middle, *pool, *self.after]
        titles = [self.titles[item] for item in history[-self.n_titles :]]
        room = self.prompt_tokens - len(self.before) - len(tail)
        return [*self.before, *latest_that_fit(titles, self.between, room), *tail]

    def examples(self, samples: list[Sample]) -> tuple[list[Sample], list[list[int]], Tensor]:
        """Return the samples to train on, their candidates in a random order, and the target's place among them.

        Returns:
            U samples, C candidates of each, and (U,) int64.
        """
        if self.train_candidates == "random":
            pools = [self._random_pool(sample) for sample in samples]
        else:
            found_UC, _ = self.retriever.candidates(  # type: ignore[operator]
                [sample.history for sample in samples],
                self.n_candidates,
                filter_seen=self.filter_seen,
            )
            pools = [[item for item in row if item != NO_ITEM] for row in found_UC.tolist()]
        kept, candidates, place = [], [], []
        for sample, pool in zip(samples, pools, strict=True):
            if sample.target in pool:
                order = torch.randperm(len(pool)).tolist()
                kept.append(sample)
                candidates.append([pool[i] for i in order])
                place.append(order.index(pool.index(sample.target)))
        return kept, candidates, torch.tensor(place, dtype=torch.long)

    def _random_pool(self, sample: Sample) -> list[int]:
        """Return the target and items drawn from the catalogue that are not in the history."""
        known = {sample.target, *sample.history}
        drawn = torch.randperm(len(self.item_ids))[: self.n_candidates + len(known)].tolist()
        others = [item for item in drawn if item not in known]
        return [sample.target, *others[: self.n_candidates - 1]]

    def sample_loss(self, samples: list[Sample], batch: SequenceBatch) -> tuple[Tensor, int]:
        """Return the cross-entropy of the target's letter among all tokens, and the number of samples it is of."""
        kept, candidates, place = self.examples(samples)
        if not kept:
            trained = next(p for p in self.lm.parameters() if p.requires_grad)
            return trained.sum() * 0, 0
        prompts = [
            self.prompt(sample.history, pool) for sample, pool in zip(kept, candidates, strict=True)
        ]
        answer = torch.tensor(self.letters)[place].to(self.device)
        return F.cross_entropy(self._logits(prompts), answer), len(kept)

    def _logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (B, tokens of the vocabulary) after the last token of each prompt."""
        tokens, mask = (each.to(self.device) for each in padded(prompts, self.tokenizer.pad))
        hidden = self.lm.model(tokens, attention_mask=mask).last_hidden_state
        last = mask.sum(1) - 1
        return self.lm.lm_head(hidden[torch.arange(len(last), device=last.device), last])

    # Ranking

    def log_probabilities(self, histories: list[History], candidates: Tensor) -> Tensor:
        """Return the language model's log-probability of each candidate among those of its user.

        Args:
            histories: Whole histories.
            candidates: (U, C) catalogue indices, -1 where there is none.

        Returns:
            (U, C) on the CPU; -inf where there is no candidate.
        """
        found = torch.full(candidates.shape, -torch.inf)
        for start in range(0, len(histories), self.rank_batch):
            block = range(start, min(start + self.rank_batch, len(histories)))
            orders, prompts = [], []
            for row in block:
                there = (candidates[row] >= 0).nonzero().squeeze(1)
                order = there[_shuffle(candidates[row, there])]
                orders.append(order)
                prompts.append(self.prompt(histories[row], candidates[row, order].tolist()))
            logits = self._logits(prompts)[:, self.letters].float().cpu()
            for row, order, one in zip(block, orders, logits, strict=True):
                found[row, order] = one[: len(order)].log_softmax(0)
        return found

    def candidates_of(
        self, histories: list[History], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the retriever's ranking (U, at least C) and both log-probabilities of its first C, (U, C) each."""
        ranked, scores = self.retriever.candidates(  # type: ignore[operator]
            histories, max(k, self.n_candidates), filter_seen=filter_seen
        )
        head = ranked[:, : self.n_candidates]
        scores = scores[:, : self.n_candidates].float().masked_fill(head < 0, -torch.inf)
        return ranked, scores.log_softmax(1), self.log_probabilities(histories, head)

    def read(self, histories: list[History]) -> None:
        """Return None: the candidates depend on the items that are left out, so :meth:`top` reads."""

    def top(
        self, reading: None, histories: list[History], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Rank in two stages; the score of an item that is not a candidate is NaN."""
        with self.inference():
            ranked, first, second = self.candidates_of(histories, k, filter_seen=filter_seen)
        return _cut(*mixed(ranked, first, second, float(self.mix_weight)), k)

    # Validation and test

    def validate_users(self, histories: list[History], target: Tensor) -> None:
        """Rank for users of the validation, by every weight if validation chooses it."""
        if self.mix is not None:
            super().validate_users(histories, target)
            return
        k = self.val_metrics.max_k
        ranked, first, second = self.candidates_of(histories, k, filter_seen=self.filter_seen)
        alone_U = _gains(ranked[:, :10], target.cpu())
        self.val_users.update(len(histories))
        for weight, gains, squares, metrics in zip(
            WEIGHTS, self.val_gains, self.val_squares, self.val_metrics_by_weight, strict=True
        ):
            order_UK, _ = mixed(ranked, first, second, weight)
            more_U = _gains(order_UK[:, :10], target.cpu()) - alone_U
            gains.update(more_U)
            squares.update(more_U.square())
            top_UK, _ = _cut(order_UK, order_UK, k)
            metrics.update_from_top(top_UK.to(target.device), target)

    def on_validation_epoch_end(self) -> None:
        """Choose the weight and log its metrics."""
        if self.mix is None and self.val_gains[0].update_called:
            gains, squares = (
                torch.stack([each.compute() for each in metrics])
                for metrics in (self.val_gains, self.val_squares)
            )
            best = best_weight(gains, squares, int(self.val_users.compute()))
            self.mix_weight.fill_(WEIGHTS[best])
            chosen = self.val_metrics_by_weight[best]
            values = {"loss": self.val_loss.compute(), **chosen.compute()}
            own = (self.val_loss, self.val_users, *self.val_gains, *self.val_squares)
            for each in (*own, *self.val_metrics_by_weight):
                each.reset()
            self.log_dict({f"val/{name}": value.float() for name, value in values.items()})
        else:
            super().on_validation_epoch_end()
        self.log("val/mix", self.mix_weight.clone())

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.test_metrics_retriever.reset()
        self.retrieved.reset()

    def test_step(self, batch: HistoryBatch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if batch.target.numel():
            k = max(self.test_metrics.max_k, self.n_candidates)
            ranked, _ = self.retriever.candidates(  # type: ignore[operator]
                histories_of(batch.seen), k, filter_seen=self.filter_seen
            )
            ranked = ranked.to(batch.target.device)
            top_UK, _ = _cut(ranked, ranked, self.test_metrics.max_k)
            self.test_metrics_retriever.update_from_top(top_UK, batch.target)
            found = ranked[:, : self.n_candidates] == batch.target.unsqueeze(1)
            self.retrieved.update(found.any(1).float())

    def test_results(self) -> dict[str, Any]:
        """Return the metrics of both stages on all users, those of the retriever alone, and what was retrieved.

        Beside the metrics of :class:`TextRecommender`: ``baselines`` with ``retriever``, and ``two_stages`` with the
        ``share`` of users whose target is among the ``n_candidates``, and the ``weight`` of the language model.
        """
        alone = {
            name: float(value) for name, value in self.test_metrics_retriever.compute().items()
        }
        return {
            **super().test_results(),
            "baselines": {"retriever": alone},
            "two_stages": {
                "share": float(self.retrieved.compute()),
                "n_candidates": self.n_candidates,
                "weight": float(self.mix_weight),
            },
        }

    def parameter_counts(self) -> dict[str, int]:
        """Count the language model's parameters, also without the embeddings of tokens, those trained, the retriever's.

        An output layer that is tied to the embedding counts once.
        """
        total = sum(p.numel() for p in self.lm.parameters())
        return {
            "total": total,
            "without_embeddings": total - self.lm.get_input_embeddings().weight.numel(),
            "trained": sum(p.numel() for p in self.lm.parameters() if p.requires_grad),
            "retriever": sum(p.numel() for p in self.retriever.parameters()),
        }


def mixed(ranked: Tensor, first: Tensor, second: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Order the first C of a ranking by both stages; the rest stays.

    Args:
        ranked: (U, K) catalogue indices by the retriever, -1 where no item is left, K at least C.
        first: (U, C) log-probabilities of the retriever; -inf where there is no candidate.
        second: (U, C) log-probabilities of the language model; -inf where there is no candidate.
        weight: Weight of the second, from 0 to 1.

    Returns:
        The ranking (U, K), and scores (U, K): the weighted sum, NaN behind the candidates. Of equal scores, the one
        that the retriever ranks first comes first.
    """
    C = first.shape[1]
    absent = ranked[:, :C] < 0
    scores = (1 - weight) * first.masked_fill(absent, 0) + weight * second.masked_fill(absent, 0)
    scores = scores.masked_fill(absent, -torch.inf)
    best = scores.argsort(dim=1, descending=True, stable=True)
    order = torch.cat((ranked[:, :C].gather(1, best), ranked[:, C:]), 1)
    behind = torch.full((len(ranked), ranked.shape[1] - C), torch.nan)
    return order, torch.cat((scores.gather(1, best), behind), 1)


def best_weight(gains: Tensor, squares: Tensor, n_users: int) -> int:
    """Return the index of the weight with the largest gain that is not a matter of chance, 0 if there is none.

    Args:
        gains: (W,) mean difference of the users' NDCG from that of the first weight.
        squares: (W,) mean of the differences' squares.
        n_users: Number of users.
    """
    error = ((squares - gains.square()).clamp(min=0) / max(n_users, 1)).sqrt()
    sure = gains > 2 * error
    return int(gains.masked_fill(~sure, 0).argmax())


def _cut(order: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first k places, filled up with -1 and NaN where there are fewer."""
    more = max(0, k - order.shape[1])
    scores = scores.float() if more else scores
    return F.pad(order, (0, more), value=NO_ITEM)[:, :k], F.pad(scores, (0, more), value=torch.nan)[
        :, :k
    ]


def _gains(top: Tensor, target: Tensor) -> Tensor:
    """Return the NDCG of users with one target each, (U,)."""
    hit = top == target.unsqueeze(1)
    return (hit / (torch.arange(top.shape[1]) + 2).log2()).sum(1)


def _shuffle(items: Tensor) -> Tensor:
    """Return a random order that follows from the items alone, so that the same candidates always have the same."""
    seed = int((items.sort().values * torch.arange(1, items.numel() + 1)).sum()) % 2**31
    return torch.randperm(items.numel(), generator=torch.Generator().manual_seed(seed))


def _without(frozen: set[str]) -> Any:
    """Return a hook that leaves frozen weights out of a state."""

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in list(state):
            if name.startswith(prefix) and name.removeprefix(prefix) in frozen:
                del state[name]

    return hook


def _expect_absent(frozen: set[str]) -> Any:
    """Return a hook that accepts a state without the frozen weights."""

    def hook(module: nn.Module, incompatible: Any) -> None:
        kept = [
            name for name in incompatible.missing_keys if name.removeprefix("lm.") not in frozen
        ]
        incompatible.missing_keys[:] = kept

    return hook
