"""Turn titles into vectors for models that rank items by vectors: frozen, made once, kept in the checkpoint.

Legend: I items, W words, E length of a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.text.extra import require
from recsys_ssm.text.search import words_of
from recsys_ssm.text.tokenizer import read_json
from recsys_ssm.text.weights import Weights, plain_config

TFIDF = "tfidf"
"""Name of the vectors that are made of the titles alone."""

_BATCH = 256
_LONGEST = 256


def title_vectors(
    titles: Sequence[str], source: str, *, revision: str | None = None, size: int = 64
) -> Tensor:
    """Return a vector of length 1 for each title, (I, E) float32, after the mean of all titles is subtracted.

    Args:
        titles: I titles.
        source: ``tfidf``: the first singular vectors of the titles' weighted words, made of these titles alone; or a
            folder in the layout of ``transformers`` (a name on the hub, with ``revision``), whose encoder's outputs
            are averaged over the tokens of a title, as sentence encoders are used.
        revision: Commit of a name on the hub.
        size: E of ``tfidf``, at most; a folder has its own.

    Raises:
        UserError: The titles are too few or too poor in words, or the folder cannot be used.
    """
    if source == TFIDF:
        found = _tfidf(titles, size)
    else:
        found = _encoded(titles, source, revision)
    return torch.nn.functional.normalize(found - found.mean(0), dim=1)


def _tfidf(titles: Sequence[str], size: int) -> Tensor:
    """Return the first left singular vectors of the words' TF-IDF matrix, times the singular values."""
    if size < 1:
        raise UserError(f"tokenizer.text_size={size}: give at least 1")
    counts = [Counter(words_of(title)) for title in titles]
    seen_in = Counter(word for each in counts for word in each)
    # A word of a single title says nothing of others.
    words = {word: i for i, word in enumerate(sorted(w for w, n in seen_in.items() if n > 1))}
    entries = [
        (row, words[word], np.log1p(n) * np.log(len(titles) / seen_in[word]))
        for row, each in enumerate(counts)
        for word, n in each.items()
        if word in words
    ]
    rank = min(size, min(len(titles), len(words)) - 1)
    if rank < 1:
        raise UserError(
            "tokenizer.text=tfidf: the titles have fewer than two words in common; leave the option out, or give the "
            "folder of a sentence encoder"
        )
    row, column, value = zip(*entries, strict=True)
    matrix = csr_matrix((value, (row, column)), shape=(len(titles), len(words)))
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1))).ravel()
    matrix = csr_matrix(matrix.multiply(1 / np.maximum(norm, 1e-12)[:, None]))
    left, values = _singular(matrix, rank)
    # The sign of a singular vector is arbitrary: its largest entry is positive here.
    left = left * np.sign(left[np.abs(left).argmax(0), np.arange(rank)])
    return torch.from_numpy(left * values).float()


def _singular(matrix: csr_matrix, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first left singular vectors and the values (Halko et al. 2011): the same ones in every call."""
    drawn = np.random.default_rng(0).normal(size=(matrix.shape[1], min(rank + 10, *matrix.shape)))
    basis, _ = np.linalg.qr(matrix @ drawn)
    for _ in range(6):
        basis, _ = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])
    left, values, _ = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank]


def _encoded(titles: Sequence[str], source: str, revision: str | None) -> Tensor:
    """Return the mean outputs of a sentence encoder over a title's tokens."""
    transformers = require("transformers", f"tokenizer.text={source}")
    tokenizers = require("tokenizers", f"tokenizer.text={source}")
    try:
        folder = Weights(model=source, revision=revision).find_folder()
        config = plain_config(read_json(folder / "config.json"))
        tokenizer = _tokenizer(tokenizers, folder)
        model = _encoder(transformers, config, folder)
    except UserError as error:
        message = str(error).replace("text.model=", "tokenizer.text=")
        raise UserError(message.replace("text.revision", "tokenizer.text_revision")) from error
    longest = min(_LONGEST, int(config.get("max_position_embeddings") or _LONGEST) - 2)
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    found = []
    for start in range(0, len(titles), _BATCH):
        rows = [each.ids for each in tokenizer.encode_batch(list(titles[start : start + _BATCH]))]
        length = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        with torch.no_grad():
            out_BLE = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        shown = mask.unsqueeze(-1).to(out_BLE.dtype)
        found.append((out_BLE * shown).sum(1) / shown.sum(1).clamp(min=1))
    return torch.cat(found).float()


def _tokenizer(tokenizers: Any, folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer.json; give the folder of a sentence encoder")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise UserError(
            f"{path}: not a readable tokenizer ({_first_line(error)}); fetch the file again"
        ) from error


def _encoder(transformers: Any, config: dict[str, Any], folder: Path) -> Any:
    """Return the encoder of a folder in float32, in evaluation mode.

    Raises:
        UserError: The folder does not hold an encoder of ``transformers``.
    """
    try:
        kind = str(config.pop("model_type", ""))
        made = transformers.AutoConfig.for_model(kind, **config)
        model, report = transformers.AutoModel.from_pretrained(
            folder,
            config=made,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a foreign config or file makes the package raise
        raise UserError(
            f"text.model={folder}: not an encoder of transformers ({_first_line(error)}); give the folder of a "
            "sentence encoder"
        ) from error
    absent = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if absent:
        raise UserError(
            f"text.model={folder}: its weights lack {absent[0]} ({len(absent):,} tensors in all); give the folder of a "
            "sentence encoder"
        )
    return model.eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
