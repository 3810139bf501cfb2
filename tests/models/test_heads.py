import math

import pytest
import torch

from recsys_ssm.models.heads import TowerHead, bce, in_batch_softmax, mse

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
