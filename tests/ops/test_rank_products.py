"""Check that every path of rank_products follows the rule of rank_top_k and never holds all scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_ssm import metrics as metrics_module
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import rank_top_k
from recsys_ssm.ops import rank_products
from recsys_ssm.ops._dispatch import Operator
from tests.ops.conftest import available_isas


@pytest.fixture(params=["plain", *(isa for isa in available_isas() if isa != "plain")])
def path(request: pytest.FixtureRequest, use: Callable[..., None]) -> str:
    """Run the test on every path of this machine."""
    if request.param == "plain":
        use(RECSYS_SSM_NO_KERNELS="1")
    else:
        use(RECSYS_SSM_MAX_ISA=request.param)
    has_kernel = Operator.registered["rank_products"].takes(torch.zeros(1))
    assert has_kernel == (request.param != "plain")
    return request.param


def whole_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Make vectors with many ties, whose products do not depend on the order of the sum."""
    return torch.randint(-2, 3, shape, generator=generator).float()


def test_equals_ranking_the_whole_product(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    for case in range(60):
        monkeypatch.setattr(metrics_module, "_BLOCK_ELEMENTS", (1, 40, 1 << 20)[case % 3])
        n_users, n_items, dim, k = draw(40), draw((8, 60, 300)[case % 3]), draw(20), draw(40)
        query, items = (whole_numbers(generator, n, dim) for n in (n_users, n_items))
        mask = torch.rand(n_users, n_items, generator=generator) < (0.05, 0.4, 0.95)[case % 3]
        mask[draw(n_users + 1) - 1] = True  # nothing left for a user
        mask[draw(n_users + 1) - 1] = False
        user, item = mask.nonzero(as_tuple=True)
        order = torch.randperm(len(user), generator=generator)
        pairs = user[order], item[order]
        everything, without = rank_products(query, items, k, pairs)
        assert torch.equal(everything, rank_top_k(query @ items.T, k))
        assert torch.equal(without, rank_top_k(query @ items.T, k, mask))
        none, again = rank_products(query, items, k, pairs, everything=False)
        assert none is None
        assert torch.equal(again, without)
        same, all_of_them = rank_products(query, items, k)
        assert torch.equal(same, everything)
        assert torch.equal(all_of_them, everything)


@pytest.mark.parametrize("ascending", [False, True])
def test_large_catalogue(path: str, ascending: bool) -> None:
    """Rank real numbers for more users than one task takes, also with every item better than the last."""
    generator = torch.Generator().manual_seed(1)
    query, items = (torch.randn(n, 64, generator=generator) for n in (1100, 3001))
    if ascending:
        query, items = query.abs(), items.abs() * torch.linspace(0.1, 9, 3001)[:, None]
    scores = query.double() @ items.double().T
    mask = torch.rand(1100, 3001, generator=generator) < 0.01
    top = rank_products(query, items, 20, mask.nonzero(as_tuple=True), everything=False)[1]
    assert not mask.gather(1, top).any()
    found = scores.gather(1, top)
    best = scores.masked_fill(mask, -math.inf).topk(20).values
    assert (found - best).abs().max() < 1e-4 * scores.abs().max()
    assert (top.sort().values.diff() > 0).all()  # no item twice


def test_items_with_equal_vectors_are_ranked_by_index(path: str) -> None:
    """Check equal vectors at all positions: their scores are the same sum in the same order."""
    if path == "plain":
        pytest.skip("a matrix product sums in another order at its edge")
    generator = torch.Generator().manual_seed(2)
    items = torch.randn(10, 33, generator=generator).repeat(41, 1)
    for n_users in (1, 2, 3, 9, 50):
        query = torch.randn(n_users, 33, generator=generator)
        top = rank_products(query, items, 41)[1]
        assert torch.equal(top, top[:, :1] + torch.arange(41) * 10)


def test_any_layout(path: str) -> None:
    generator = torch.Generator().manual_seed(3)
    wide, tall = whole_numbers(generator, 9, 10), whole_numbers(generator, 10, 70)
    expected = rank_top_k(wide[:, 1:9:2] @ tall[1:9:2], 5)
    assert torch.equal(rank_products(wide[:, 1:9:2], tall[1:9:2].T, 5)[1], expected)
    halves = rank_products(wide.bfloat16(), tall.T.bfloat16(), 5)[1]
    assert torch.equal(halves, rank_top_k(wide @ tall, 5))  # whole numbers, exact in bfloat16
    in_double = rank_products(wide.double(), tall.T.double(), 5)[1]
    assert torch.equal(in_double, rank_top_k(wide @ tall, 5))


def test_threads_change_nothing(path: str, threads: Callable[[int], None]) -> None:
    """Check that the other users do not matter, with products that differ only by rounding."""
    if path == "plain":
        pytest.skip("a matrix product sums as its shape suggests")
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(37, generator=generator)
    items = torch.stack([values[torch.randperm(37, generator=generator)] for _ in range(300)])
    found = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        found += rank_products(torch.ones(17, 37), items, 10)[1].tolist()
    assert all(top == found[0] for top in found)


def test_all_scores_are_never_in_memory_at_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(metrics_module, "_BLOCK_ELEMENTS", 2000)
    query, items = torch.randn(300, 4), torch.randn(200, 4)
    with Largest() as largest:
        rank_products(query, items, 5, (torch.arange(300), torch.arange(300) % 200))
    assert 1500 <= largest.elements < 4000  # of 300 · 200 scores


def test_of_no_user(path: str) -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    everything, others = rank_products(
        torch.zeros(0, 2), torch.ones(3, 2), 2, pairs := (nobody, nobody)
    )
    assert everything.shape == others.shape == (0, 2)
    assert rank_products(torch.zeros(4, 0), torch.ones(3, 0), 2, pairs)[1].tolist() == [[0, 1]] * 4


def test_a_score_of_minus_infinity_is_not_excluded(path: str) -> None:
    query, items = torch.tensor([[1.0]]), torch.tensor([[-math.inf], [1.0], [2.0]])
    pairs = (torch.tensor([0]), torch.tensor([2]))
    assert rank_products(query, items, 3, pairs)[1].tolist() == [[1, 0, -1]]
    # It ranks with the lowest number.
    items[1] = torch.finfo(torch.float32).min
    assert rank_products(query, items, 3, pairs)[1].tolist() == [[0, 1, -1]]


def test_infinity_is_first(path: str) -> None:
    items = torch.cat([torch.ones(100, 1), torch.tensor([[math.inf]]), torch.ones(100, 1)])
    assert rank_products(torch.ones(1, 1), items, 3)[1].tolist() == [[100, 0, 1]]


@pytest.mark.parametrize("where", [0, 57, 99])
def test_nan_is_told(path: str, where: int) -> None:
    items = torch.linspace(3, 1, 100)[:, None]  # the best come first
    items[where] = math.nan
    with pytest.raises(UserError, match="user 0 of this batch contain NaN"):
        rank_products(torch.ones(5, 1), items, 2)
    query = torch.ones(21, 1)
    query[20] = math.nan
    with pytest.raises(UserError, match="NaN"):
        rank_products(query, torch.ones(3, 1), 1)


def test_nan_of_an_excluded_item_takes_no_part(path: str) -> None:
    items = torch.tensor([[1.0], [math.nan], [2.0]])
    pairs = (torch.tensor([0]), torch.tensor([1]))
    top = rank_products(torch.ones(1, 1), items, 2, pairs, everything=False)[1]
    assert top.tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("query", "items", "k", "pairs", "message"),
    [
        ((2, 3), (4, 2), 1, None, r"\(U, D\) and \(I, D\)"),
        ((2, 3), (0, 3), 1, None, "items is empty"),
        ((2, 3), (4, 3), 0, None, "k must be at least 1"),
        ((2, 3), (4, 3), 1, ([0, 1], [0]), "equal numbers of users and items"),
        ((2, 3), (4, 3), 1, ([0, 2], [0, 0]), "user 2 and item 0.* of 2 users and 4 items"),
        ((2, 3), (4, 3), 1, ([0, 1], [0, 4]), "user 1 and item 4"),
        ((2, 3), (4, 3), 1, ([0, -1], [0, 0]), "from -1"),
    ],
)
def test_what_does_not_fit_is_told(
    path: str,
    query: tuple[int, int],
    items: tuple[int, int],
    k: int,
    pairs: tuple[list[int], list[int]] | None,
    message: str,
) -> None:
    exclude = None if pairs is None else (torch.tensor(pairs[0]), torch.tensor(pairs[1]))
    with pytest.raises(UserError, match=message):
        rank_products(torch.zeros(query), torch.zeros(items), k, exclude)
