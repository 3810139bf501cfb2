"""Check that training steps compile to one graph, and that towers are exported with any batch size."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from recsys_ssm import Hydra, Interactions, Mamba, Mamba2, Mamba3, NextItem, TableData, TwoTower
from recsys_ssm.features import Features
from recsys_ssm.models.losses import InBatchSoftmax, MeanSquaredError

EVENTS = pl.DataFrame(
    {
        "user_id": [u for u in range(30) for _ in range(5)],
        "item_id": [(u + i) % 12 for u in range(30) for i in range(5)],
        "timestamp": [i for _ in range(30) for i in range(5)],
    }
)
MAMBA = Mamba(d_model=16, n_layers=1)

FRESH = """
import torch
from recsys_ssm.ops import causal_conv1d, selective_scan, ssd
def f(u, A, B):
    x = causal_conv1d(u, u[0, :3].T, activation="silu")
    y = selective_scan(x, u.exp(), A, B, B)
    return y + ssd(u.unsqueeze(2), u[..., :1].exp(), A[0, :1], B.unsqueeze(2), B.unsqueeze(2)).squeeze(2)
inputs = [torch.randn(2, 5, 4, requires_grad=True), -torch.rand(4, 3), torch.randn(2, 5, 3)]
found = torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs)
found.sum().backward()
torch.testing.assert_close(found, f(*inputs))
"""


@pytest.fixture
def dynamic_shapes() -> Iterator[None]:
    """Let graphs hold the number of targets, which depends on the batch."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def check_one_graph(model: Any, loss: Any, batch: Any) -> None:
    """Check that the loss is one graph, and has the value and the gradients of eager mode for the same seed."""
    model.train()
    report = torch._dynamo.explain(loss)(batch)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons
    torch._dynamo.reset()

    def run(loss: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        value = loss(batch)
        value.backward()
        return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    found = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    expected = run(loss)
    assert len(found) == len(expected) > 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_first_call_of_a_process_compiles_to_one_graph() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["softmax", "sampled_softmax", "gbce"])
def test_a_step_of_next_items_is_one_graph(kind: str, dynamic_shapes: None) -> None:
    data = Interactions(interactions=EVENTS)
    data.prepare_data()
    data.setup("fit")
    model = NextItem.for_data(data, backbone=MAMBA, loss={"kind": kind, "negatives": 4})
    check_one_graph(model, lambda batch: model._loss(batch)[0], next(iter(data.train_dataloader())))


@pytest.mark.parametrize("loss", [MeanSquaredError, InBatchSoftmax])
def test_a_step_of_two_towers_is_one_graph(loss: type) -> None:
    torch._dynamo.reset()
    data = table()
    model = TwoTower.for_data(data, backbone=MAMBA, loss=loss)
    check_one_graph(model, model._loss, next(iter(data.train_dataloader())))


def test_popular_negatives_are_drawn_in_a_graph(dynamic_shapes: None) -> None:
    data = Interactions(interactions=EVENTS)
    data.prepare_data()
    data.setup("fit")
    loss = NextItem.for_data(data, backbone=MAMBA, loss={"sampling": "popularity"}).loss
    loss.cumulative = torch.tensor([0, 1, 1, 4] + [4] * 8)
    drawn = torch.compile(loss.draw, fullgraph=True, backend="aot_eager")((4000,))
    assert torch.bincount(drawn).tolist()[1] == pytest.approx(1000, abs=150)
    assert sorted(drawn.unique().tolist()) == [1, 3]


@pytest.mark.parametrize(
    "backbone",
    [
        MAMBA,
        Mamba2(d_model=16, n_layers=1, headdim=8),
        Mamba3(d_model=16, n_layers=1, headdim=8),
        Hydra(d_model=16, n_layers=1, headdim=8),
    ],
)
def test_a_tower_is_exported_saved_and_loaded(backbone: Any) -> None:
    """The user side has no categories."""
    tower = TwoTower.for_data(table(), backbone=backbone).user_tower.eval()
    exported = _Exported(tower)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(
        exported,
        (torch.randn(4, 1), torch.zeros(4, 0).long()),
        dynamic_shapes=({0: batch}, {0: batch}),
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    more = torch.randn(7, 1), torch.zeros(7, 0).long()
    torch.testing.assert_close(again(*more), exported(*more))


class _Exported(torch.nn.Module):
    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        return self.tower(Features(numeric, categorical))


def table() -> TableData:
    users = pl.DataFrame({"user_id": range(30), "age": [float(u % 7) for u in range(30)]})
    data = TableData(
        interactions=EVENTS.select("user_id", "item_id"), users=users, user_numeric=["age"]
    )
    data.prepare_data()
    data.setup("fit")
    return data
