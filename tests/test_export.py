"""An exported model answers as the model does, also under onnxruntime, and the page's reader needs nothing else."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pages import ROOT

from recsys_ssm import (
    Backbone,
    FilterMamba2,
    Hydra,
    Identity,
    Interactions,
    ItemTokenizer,
    Ligr,
    Mamba,
    Mamba2,
    Mamba3,
    MaTrRec,
    NextItem,
    Sigma,
    TableData,
    Transformer,
    TwoTower,
    UserError,
    WEARec,
)
from recsys_ssm.exporting.formats import METADATA, export_model, load_safetensors

N_ITEMS = 40
LENGTH = 12
BACKBONES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": (Mamba(d_model=16, n_layers=2, d_state=4), {}),
    "mamba2": (Mamba2(d_model=16, n_layers=2, d_state=4, headdim=8), {}),
    "mamba3": (Mamba3(d_model=16, n_layers=2, d_state=4, headdim=8), {}),
    "mamba3_mimo": (Mamba3(d_model=16, n_layers=1, d_state=4, headdim=8, mimo_rank=2), {}),
    "filter_mamba2": (FilterMamba2(d_model=16, filter_length=LENGTH, d_state=4, headdim=8), {}),
    "sasrec": (
        Transformer(d_model=16, n_layers=1, causal=True),
        {"tokenizer": {"positions": "max_length"}},
    ),
    "from_end": (
        Transformer(d_model=16, n_layers=1),
        {"tokenizer": {"positions": LENGTH, "position_from": "end"}, "objective": "last"},
    ),
    "start": (Mamba(d_model=16, n_layers=1), {"start_token": True}),
    "hydra": (Hydra(d_model=16, n_layers=1, d_state=4, headdim=8), {"objective": "masked"}),
    "matrrec": (MaTrRec(d_model=16, d_state=4), {}),
    "sigma": (Sigma(d_model=16, d_state=4), {"objective": "last"}),
    "wearec": (WEARec(d_model=16, max_length=LENGTH), {"objective": "last"}),
    "ligr": (
        Ligr(d_model=16, n_layers=1),
        {"tokenizer": {"positions": "max_length"}},
    ),
    "cosine": (Identity(d_model=16), {"head": {"temperature": 0.1}}),
}


def model_of(name: str) -> NextItem:
    torch.manual_seed(0)
    backbone, options = BACKBONES[name]
    options = dict(options)
    for part, kind in (("tokenizer", "ItemTokenizer"), ("head", "NextItemHead")):
        if part in options:
            module = "tokenizers" if part == "tokenizer" else "heads"
            options[part] = {"_target_": f"recsys_ssm.models.{module}.{kind}", **options[part]}
    return NextItem(
        item_ids=[f"i{i}" for i in range(N_ITEMS)],
        max_length=LENGTH,
        item_counts=torch.arange(N_ITEMS) % 7,
        backbone=backbone,
        **options,
    ).eval()


def padded(histories: list[list[int]]) -> np.ndarray:
    rows = np.full((len(histories), max(1, *map(len, histories))), -1)
    for row, history in zip(rows, histories, strict=True):
        row[: len(history)] = history
    return rows


def assert_best(
    model: NextItem, histories: list[list[int]], items: np.ndarray, filter_seen: bool = True
) -> np.ndarray:
    """Check that ``items`` are the model's best up to ties, and return the model's scores of its own best.

    Two runtimes add up a product in another order, so items whose scores differ by less than a millionth may swap.
    """
    top, scores = model.candidates(histories, items.shape[1], filter_seen=filter_seen)
    with model.inference():
        table = model._items()
        found = (table[torch.tensor(items)] * model._query(histories)[:, None]).sum(2)
    different = torch.tensor(items) != top
    assert ((items >= 0) == (top >= 0).numpy()).all()
    gap = (found - scores).abs()[different]
    assert (gap <= 1e-6 * scores[different].abs().clamp(min=1)).all()
    for row in items:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    return scores.numpy()


def session_of(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


QUICK = ("mamba", "mamba2", "hydra", "sasrec")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in BACKBONES]
)
def test_onnx_is_the_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    model = model_of(name)
    (path,) = export_model(model, tmp_path, "onnx")
    session, rng = session_of(path), np.random.default_rng(0)
    for users, longest in ((1, 1), (1, 2), (3, LENGTH), (256, 3 * LENGTH), (2, 200)):
        histories = [
            rng.integers(0, N_ITEMS, size=rng.integers(1, longest + 1)).tolist()
            for _ in range(users)
        ]
        items, scores, _ = session.run(None, {"history": padded(histories), "k": np.array(10)})
        expected = assert_best(model, histories, items)
        real = items >= 0
        np.testing.assert_allclose(scores[real], expected[real], atol=1e-5)
    # Fewer items are left than places; a history without an item.
    everything = [list(range(N_ITEMS - 3)), []]
    items, scores, _ = session.run(None, {"history": padded(everything), "k": np.array(100)})
    assert items.shape == (2, N_ITEMS) and (items[0, 3:] == -1).all()
    cold = model.recommend([[]], k=N_ITEMS)["item"].to_list()
    assert [model.item_ids[i] for i in items[1]] == cold
    assert np.isnan(scores[1]).all() != model.start_token
    stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert stored["item_ids"] == model.item_ids and stored["filter_seen"] is True


def test_seen_items_may_be_recommended(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    model = model_of("mamba")
    (path,) = export_model(model, tmp_path, "onnx", filter_seen=False)
    items, _, _ = session_of(path).run(None, {"history": padded([[5, 6]]), "k": np.array(40)})
    assert_best(model, [[5, 6]], items, filter_seen=False)
    assert {5, 6} <= set(items[0].tolist())


@pytest.mark.parametrize(
    "name", ["mamba2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mamba", "hydra"))]
)
def test_torch_export_is_the_model(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    (path,) = export_model(model, tmp_path, "torch_export")
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[METADATA])["item_ids"] == model.item_ids
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("recsys" in target for target in targets)
    for histories in ([[1]], [[1, 2], [3]], [list(range(30)), [2] * 5, [7]]):
        found, _, _ = program.module()(torch.tensor(padded(histories)), torch.tensor(10))
        assert_best(model, histories, found.numpy())


@pytest.mark.parametrize("name", ["mamba", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_openvino_is_the_model(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra export is not installed")
    model = model_of(name)
    _, path = export_model(model, tmp_path, "openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    histories = [[1, 2, 3], [4], list(range(20))]
    found = compiled({"history": padded(histories), "k": np.array(10)})
    assert_best(model, histories, found["items"])


def sales() -> TableData:
    rows = [(u, (u * 3 + i) % 9) for u in range(40) for i in range(4)]
    users = {
        "user_id": range(40),
        "age": [20.0 + u if u % 5 else None for u in range(40)],
        "town": ["a", "b", None, "c"] * 10,
    }
    return TableData(
        interactions=pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row"),
        users=pl.DataFrame(users),
        user_numeric=["age"],
        user_categorical=["town"],
    )


def test_two_towers_are_two_graphs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    torch.manual_seed(0)
    model = TwoTower.for_data(sales(), backbone=Mamba(d_model=16, n_layers=1)).eval()
    users, items = export_model(model, tmp_path, "onnx")
    assert (users.name, items.name) == ("users.onnx", "items.onnx")
    session = session_of(users)
    stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    frame = pl.DataFrame({"age": [33.0, None, 90.0], "town": ["b", "elsewhere", None]})
    fields = {field["name"]: field["values"] for field in stored["users"]["categorical"]}
    towns = fields["town"]
    given = {
        "numeric": np.array([[33.0], [np.nan], [90.0]]),
        "categorical": np.array([[1 + towns.index("b")], [0], [0]]),
        "seen": np.array([[0, 3], [-1, -1], [8, -1]]),
        "k": np.array(9),
    }
    found, scores, _ = session.run(None, given)
    exclude = torch.zeros(3, len(model.item_ids), dtype=torch.bool)
    exclude[0, [0, 3]] = exclude[2, 8] = True
    expected = model.recommend(frame, k=9, exclude=exclude)
    for user in range(3):
        mine = expected.filter(pl.col("user") == user)
        left = found[user] >= 0
        assert [model.item_ids[i] for i in found[user][left]] == mine["item"].to_list()
        np.testing.assert_allclose(scores[user][left], mine["score"].to_numpy(), atol=1e-5)
    (vectors,) = session_of(items).run(None, {"categorical": model.items.categorical.numpy()})
    np.testing.assert_allclose(vectors, model.item_embeddings().numpy(), atol=1e-5)


def test_safetensors_give_the_model_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="the extra export is not installed")
    model = model_of("mamba")
    (path,) = export_model(model, tmp_path, "safetensors")
    again = load_safetensors(path)
    histories = [["i1", "i2"], ["i30"]]
    assert again.recommend(histories).equals(model.recommend(histories))  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a file of format=safetensors"):
        load_safetensors(path)


class Counts(Backbone):
    """A backbone that reads a value, which no graph of any size can."""

    causal = True

    def __init__(self, *, d_model: int = 16) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(
        self, tokens: torch.Tensor, seq_idx: Any = None, at: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = tokens * (1 if float(tokens.sum()) > 0 else 2)
        return tokens if at is None else tokens.flatten(0, 1)[at]


class Fixed(Counts):
    """A backbone that is traced for one length alone."""

    def forward(
        self, tokens: torch.Tensor, seq_idx: Any = None, at: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = sum(tokens[:, [i]] for i in range(tokens.shape[1])) + tokens
        return tokens if at is None else tokens.flatten(0, 1)[at]


@pytest.mark.parametrize("backbone", [Counts, Fixed])
def test_a_module_that_cannot_be_exported_is_one_line(backbone: type, tmp_path: Path) -> None:
    model = NextItem(item_ids=["a", "b", "c"], max_length=9, backbone=backbone()).eval()
    with pytest.raises(
        UserError, match=f"ItemTokenizer or {backbone.__name__} cannot be"
    ) as raised:
        export_model(model, tmp_path, "torch_export")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", ["times", "columns"])
def test_a_model_of_times_or_columns_of_events_is_one_line(given: str, tmp_path: Path) -> None:
    clicks = pl.DataFrame(
        {
            "user_id": [user for user in range(8) for _ in range(5)],
            "item_id": [(user + 2 * i) % 7 for user in range(8) for i in range(5)],
            "timestamp": [i for _ in range(8) for i in range(5)],
            "kind": [["view", "buy"][i % 2] for _ in range(8) for i in range(5)],
        }
    )
    options = {"times": True} if given == "times" else {"event_columns": ["kind"]}
    data = Interactions(interactions=clicks, cache_dir=tmp_path, **options)
    tokenizer = functools.partial(ItemTokenizer, gap_buckets=4 if given == "times" else 0)
    model = NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1), tokenizer=tokenizer)
    for form in ("onnx", "torch_export"):
        with pytest.raises(UserError, match="uses times or columns of events"):
            export_model(model, tmp_path / form, form)


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=tflite: expected one of onnx"):
        export_model(model_of("cosine"), tmp_path, "tflite")


def test_the_reader_of_the_page_needs_numpy_and_onnxruntime_alone(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    model = model_of("mamba2")
    export_model(model, tmp_path / "exported", "onnx")
    page = (ROOT / "docs/export.md").read_text()
    code = page.split("```python\n# recommend_onnx.py\n")[1].split("```")[0]
    code = code.replace('["50", "172", "181"]', '["i3", "i4", "unknown"]')
    code += "\nimport sys\nassert not {'torch', 'recsys_ssm'} & set(sys.modules)\n"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    expected = model.recommend([["i3", "i4"]], k=5)["item"].to_list()
    assert [line.split()[0] for line in found.stdout.splitlines()] == expected
