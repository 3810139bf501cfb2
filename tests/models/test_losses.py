import math

import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.models.heads import TowerHead
from recsys_ssm.models.losses import (
    BinaryCrossEntropy,
    InBatchSoftmax,
    MeanSquaredError,
    NextItemLoss,
)

bce, in_batch_softmax, mse = BinaryCrossEntropy(), InBatchSoftmax(), MeanSquaredError()

USER = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], requires_grad=True)
ITEM = torch.tensor([[0.5, 0.0], [1.0, 1.0], [0.5, 0.0]])
TARGET = torch.tensor([1.0, -1.0, 1.0])
INDEX = torch.tensor([3, 4, 3])


def test_mse_by_hand() -> None:
    # scores .5, 2, .5
    assert mse(USER, ITEM, TARGET, INDEX).item() == pytest.approx((0.25 + 9 + 0.25) / 3)


def test_bce_by_hand() -> None:
    def p(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = -(math.log(p(0.5)) + math.log(1 - p(2)) + math.log(p(0.5))) / 3
    assert bce(USER, ITEM, TARGET, INDEX).item() == pytest.approx(expected)


def test_softmax_by_hand() -> None:
    # Pairs 0 and 2 are positive and share an item: each sees its own and item 4 only.
    expected = 0.0
    for user, own in ((0, 0), (2, 2)):
        scores = USER.detach()[user] @ ITEM.T
        kept = [own, 1]
        expected += -math.log(scores[own].exp() / sum(scores[j].exp() for j in kept)) / 2
    assert in_batch_softmax(USER, ITEM, TARGET, INDEX).item() == pytest.approx(expected)


def test_relevant_pairs_of_ratings() -> None:
    """A rating of 1 of 5 was a positive pair, though the test took ratings above 3 alone for relevant."""
    stars = torch.tensor([5.0, 1.0, 4.0])
    for kind in (BinaryCrossEntropy, InBatchSoftmax):
        expected = kind()(USER, ITEM, TARGET, INDEX)
        assert torch.equal(kind(relevant_above=3)(USER, ITEM, stars, INDEX), expected)
        assert not torch.equal(kind()(USER, ITEM, stars, INDEX), expected)
    static = InBatchSoftmax(relevant_above=3).with_static_shapes(USER, ITEM, stars, INDEX)
    assert static.item() == pytest.approx(in_batch_softmax(USER, ITEM, TARGET, INDEX).item())


def test_softmax_without_a_positive_pair_is_zero_and_differentiable() -> None:
    loss = in_batch_softmax(USER, ITEM, -torch.ones(3), INDEX)
    loss.backward()
    assert loss.item() == 0 and USER.grad is not None and not USER.grad.any()


def test_final_relu_is_an_option() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    assert (TowerHead(d_model=8)(x) < 0).any()
    assert (TowerHead(d_model=8, final_relu=True)(x) >= 0).all()
    assert TowerHead(d_model=8, hidden=5, output=3)(x).shape == (64, 3)


def next_item_inputs(P: int = 6, I: int = 40, D: int = 8):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(P, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(I, D, generator=generator, dtype=torch.float64)
    return x, weight, torch.randint(I, (P,), generator=generator)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("shared", [True, False])
def test_with_logq_the_sampled_sum_estimates_the_whole_one(sampling: str, shared: bool) -> None:
    x, weight, target = next_item_inputs()
    counts = torch.arange(40) ** 2
    options = {"n_items": 40, "item_counts": counts, "sampling": sampling, "shared": shared}
    whole = NextItemLoss(n_items=40)(x, weight, target)
    torch.manual_seed(0)
    many = NextItemLoss(kind="sampled_softmax", negatives=200_000, **options)
    assert many(x, weight, target).item() == pytest.approx(whole.item(), rel=0.01)
    raw = NextItemLoss(kind="sampled_softmax", negatives=200_000, logq=False, **options)
    assert raw(x, weight, target).item() > whole.item() + 1


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce", "gbce"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_next_item_is_no_negative_of_itself(loss: str, shared: bool, monkeypatch) -> None:
    x, weight, target = next_item_inputs(P=3)
    head = NextItemLoss(n_items=40, kind=loss, negatives=4, shared=shared, logq=False)
    others = torch.tensor([7, 11, int(target[0]), 3])
    drawn = others if shared else others.expand(3, 4)
    monkeypatch.setattr(head, "draw", lambda shape: drawn)
    found = head(x, weight, target)
    expected = []
    for p in range(3):
        own = x[p] @ weight[target[p]]
        negatives = torch.stack([x[p] @ weight[j] for j in others.tolist() if j != target[p]])
        if loss == "sampled_softmax":
            expected.append(torch.cat([own[None], negatives]).logsumexp(0) - own)
        else:
            share = 4 / 39
            beta = 1.0 if loss == "bce" else share * (0.75 * (1 - 1 / share) + 1 / share)
            own_loss = -(torch.sigmoid(own) ** beta).log()
            expected.append((own_loss - (1 - torch.sigmoid(negatives)).log().sum()) / 5)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_items_are_drawn_as_often_as_they_were_bought() -> None:
    counts = torch.tensor([0, 9, 0, 29])
    torch.manual_seed(0)
    head = NextItemLoss(n_items=4, item_counts=counts, sampling="popularity")
    share = torch.bincount(head.draw((200_000,)), minlength=4) / 200_000
    expected = (counts + 1) / (counts + 1).sum()
    torch.testing.assert_close(share, expected, atol=0.004, rtol=0)
    torch.testing.assert_close(head.log_expected(torch.arange(4)).exp(), 256 * expected)


def test_gbce_between_bce_and_full_calibration() -> None:
    assert NextItemLoss(n_items=101, negatives=10, gbce_t=0.0).beta() == pytest.approx(1)
    assert NextItemLoss(n_items=101, negatives=10, gbce_t=1.0).beta() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="gbce_t=2"):
        NextItemLoss(n_items=3, gbce_t=2)
    with pytest.raises(ValueError, match="negatives=0"):
        NextItemLoss(n_items=3, negatives=0)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_label_smoothing_is_that_of_pytorch(smoothing: float) -> None:
    x, weight, target = (t.double() if t.is_floating_point() else t for t in next_item_inputs())
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = NextItemLoss(n_items=weight.shape[0], label_smoothing=smoothing)(x, weight, target)
    expected = torch.nn.functional.cross_entropy(x @ weight.T, target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    found, want = (torch.autograd.grad(value, (x, weight)) for value in (loss, expected))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_label_smoothing_belongs_to_the_softmax() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 needs kind=softmax"):
        NextItemLoss(n_items=3, kind="bce", label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing=1"):
        NextItemLoss(n_items=3, label_smoothing=1)


def pairs_of(counts: torch.Tensor, B: int, generator: torch.Generator):
    """Return the users' embeddings, items drawn by their counts, and the embeddings of all items."""
    table = torch.randn(len(counts), 4, generator=generator, dtype=torch.float64)
    index = torch.multinomial(counts.double(), B, replacement=True, generator=generator)
    return torch.randn(B, 4, generator=generator, dtype=torch.float64), index, table


@pytest.mark.parametrize("negatives", [0, 300])
def test_logq_estimates_the_softmax_over_the_catalogue(negatives: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.arange(20, 80)  # none so rare that its weight has a large variance
    user, index, table = pairs_of(counts, 3_000, generator)
    loss = InBatchSoftmax(logq=True, negatives=negatives)
    loss.set_item_counts(counts)
    index = torch.cat([index, torch.randint(60, (negatives,), generator=generator)])
    target = torch.ones(3_000, dtype=torch.float64)
    log_n = loss.log_expected(target, index)
    found = loss(user, table[index], target, index)
    raw = InBatchSoftmax()(user, table[index], target, index)
    # By hand, in float64: every item of the batch, divided by how often it is expected there.
    share = counts.double() / counts.sum()
    expected_n = 3_000 * share + negatives / 60
    torch.testing.assert_close(log_n.double(), expected_n[index].log(), rtol=1e-6, atol=1e-6)
    terms = (user @ table[index].T - expected_n[index].log()).double()
    own = torch.arange(3_000)
    same = index[:3_000, None] == index
    same[own, own] = False
    by_hand = terms.masked_fill(same, -torch.inf).log_softmax(1)[own, own]
    assert found.item() == pytest.approx(-by_hand.mean().item(), rel=1e-6)
    # What the sum over the batch without the user's own item estimates is the sum over the other items.
    others = terms.masked_fill(index[:3_000, None] == index, -torch.inf).exp().sum(1)
    own_item = index[:3_000]
    all_others = (user @ table.T).exp().scatter(1, own_item[:, None], 0).sum(1)
    torch.testing.assert_close((others / all_others).mean().item(), 1.0, rtol=0.03, atol=0)
    assert abs(found.item() - raw.item()) > 0.01


def test_logq_knows_both_kinds_of_pairs_and_every_item() -> None:
    loss = InBatchSoftmax(logq=True)
    loss.set_item_counts(torch.tensor([0, 30, 70, 0]))
    target, index = torch.tensor([1.0, 1.0, 0.0, -1.0]), torch.tensor([1, 3, 2, 0])
    # Two positive pairs and two of others among four items; an item without a pair counts as one with one.
    expected = torch.tensor([2 * 0.3, 2 * 0.01, 2 * 0.7, 2 * 0.01]) + 2 / 4
    torch.testing.assert_close(loss.log_expected(target, index).exp(), expected)


@pytest.mark.parametrize("logq", [False, True])
def test_static_shapes_give_the_same_with_more_items_than_pairs(logq: bool) -> None:
    torch.manual_seed(0)
    loss = InBatchSoftmax(logq=logq, negatives=5)
    loss.set_item_counts(torch.tensor([3, 0, 2, 7, 1, 1]))
    user, item = torch.randn(9, 4, requires_grad=True), torch.randn(14, 4, requires_grad=True)
    index = torch.randint(6, (14,))
    target = torch.randint(-1, 2, (9,)).float()
    one, other = loss(user, item, target, index), loss.with_static_shapes(user, item, target, index)
    torch.testing.assert_close(one, other)
    for a, b in zip(
        torch.autograd.grad(one, (user, item)),
        torch.autograd.grad(other, (user, item)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_logq_needs_the_training_pairs() -> None:
    loss = InBatchSoftmax(logq=True)
    with pytest.raises(UserError, match=r"loss\.logq=true needs the items' training pairs"):
        loss(USER, ITEM, TARGET, INDEX)
    loss.set_item_counts(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(UserError, match=r"loss\.logq=true"):
        loss(USER, ITEM, TARGET, INDEX)
    with pytest.raises(ValueError, match="negatives=-1"):
        InBatchSoftmax(negatives=-1)
