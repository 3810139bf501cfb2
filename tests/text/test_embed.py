"""Vectors of titles: alike titles have alike vectors, the encoder's are averages over real tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recsys_ssm import UserError
from recsys_ssm.text.embed import title_vectors

TITLES = [
    "Star Wars", "Star Trek: Generations", "Star Trek: First Contact", "Toy Story", "Story of Us",
    "First Wives Club", "Toy Soldiers", "Wars of Us", "\N{OK HAND SIGN}", "item 9",
]  # fmt: skip


def test_words_in_common_make_vectors_alike() -> None:
    vectors = title_vectors(TITLES, "tfidf", size=6)
    assert vectors.shape == (10, 6) and vectors.dtype == torch.float32
    assert vectors.norm(dim=1) == pytest.approx(torch.ones(10).numpy(), abs=1e-5)
    alike = vectors @ vectors.T
    assert alike[1, 2] > 0.5 > 0.2 > alike[1, 3]
    assert vectors.equal(title_vectors(TITLES, "tfidf", size=6))


def test_singular_vectors_are_those_of_the_whole_decomposition() -> None:
    import numpy as np
    from scipy.sparse import random as draw

    from recsys_ssm.text.embed import _singular

    matrix = draw(60, 40, density=0.2, random_state=np.random.default_rng(1)).tocsr()
    left, values = _singular(matrix, 5)
    whole, expected, _ = np.linalg.svd(matrix.toarray())
    np.testing.assert_allclose(values, expected[:5], rtol=1e-3)
    np.testing.assert_allclose(np.abs(left.T @ whole[:, :5]), np.eye(5), atol=0.05)


def test_a_few_words_give_short_vectors_and_none_an_error() -> None:
    assert title_vectors(["a b", "a b", "b c", "c a"], "tfidf").shape == (4, 2)
    with pytest.raises(UserError, match="fewer than two words in common"):
        title_vectors(["a", "b", "c"], "tfidf")
    with pytest.raises(UserError, match=r"tokenizer\.text_size=0: give at least 1"):
        title_vectors(TITLES, "tfidf", size=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT in the layout of transformers."""
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    from recsys_ssm.text.tokenizer import TextTokenizer

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    TextTokenizer.train(TITLES, 300).tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    return tmp_path / "bert"


def test_an_encoders_vector_is_the_mean_over_a_titles_own_tokens(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer

    titles = [*TITLES, "x" * 10_000]
    vectors = title_vectors(titles, str(folder))
    model = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    one_by_one = []
    for title in titles:  # without padding
        tokens = torch.tensor([tokenizer.encode(title).ids[:62]])
        with torch.no_grad():
            one_by_one.append(model(tokens).last_hidden_state[0].mean(0))
    found = torch.stack(one_by_one)
    expected = torch.nn.functional.normalize(found - found.mean(0), dim=1)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


def test_a_folder_that_cannot_be_used_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.text=/no/folder: no such folder"):
        title_vectors(TITLES, "/no/folder")
    with pytest.raises(UserError, match=r"give the commit .* with tokenizer\.text_revision"):
        title_vectors(TITLES, "someone/encoder")
    (folder / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(UserError, match="not an encoder of transformers") as caught:
        title_vectors(TITLES, str(folder))
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="reading such a file can run code"):
        title_vectors(TITLES, str(folder))
