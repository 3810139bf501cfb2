"""Train RecBole's SASRec on an exchange file with its own data pipeline and trainer: a sample a prefix, full softmax.

~/.cache/recsys_ssm/peers/recbole/bin/python benchmarks/peers/recbole_model.py --data FILE --out FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import Data, Run, arguments, clocks, top_lists
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def write_atomic_file(data: Data, folder: Path) -> None:
    """Write RecBole's format; a user's events get rising timestamps, so that their order is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    user, item = data.before(0)
    place = np.arange(user.size)
    with (folder / f"{folder.name}.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        file.writelines(f"u{u}\ti{i}\t{t}\n" for u, i, t in zip(user, item, place, strict=True))


class First:
    """First batches of a loader."""

    def __init__(self, loader: torch.utils.data.DataLoader, n: int) -> None:
        self.loader, self.n = loader, n

    def __iter__(self) -> Iterator[object]:
        return islice(self.loader, self.n)


def main() -> None:
    args = arguments(__doc__, batch_size=2048, inner=256)
    torch.set_num_threads(args.threads)
    data = Data.read(args.data)
    write_atomic_file(data, args.out / "exchange")
    config = Config(
        model="SASRec",
        dataset="exchange",
        config_dict={
            "data_path": str(args.out),
            "checkpoint_dir": str(args.out),
            "use_gpu": False,
            "show_progress": False,
            "seed": args.seed,
            "epochs": args.epochs,
            "MAX_ITEM_LIST_LENGTH": args.max_length,
            "train_batch_size": args.batch_size,
            "train_neg_sample_args": None,
            "learning_rate": args.lr,
            "hidden_size": args.d_model,
            "inner_size": args.inner,
            "n_layers": args.n_layers,
            "n_heads": args.n_heads,
            "hidden_dropout_prob": args.dropout,
            "attn_dropout_prob": args.dropout,
            "loss_type": "CE",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "group_by": "user",
                "order": "TO",
                "mode": "full",
            },
            "metrics": ["Hit", "NDCG", "MRR"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "eval_batch_size": 4096,
            "metric_decimal_place": 6,
        },
    )
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, val, test = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model("SASRec")(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)

    # RecBole has its own numbers of users and items; 0 is padding.
    users = dataset.field2id_token["user_id"][1:]
    row_of = np.array([int(token[1:]) for token in users])
    items = dataset.field2id_token["item_id"][1:]
    item_of = np.array([int(token[1:]) for token in items])

    def scores(loader: torch.utils.data.DataLoader) -> np.ndarray:
        """Return scores (U, I) by our indices; items without an event keep the lowest score."""
        found = np.full((data.n_users, data.n_items), -np.inf, dtype=np.float32)
        model.eval()
        with torch.no_grad():
            for interaction, *_ in loader:
                block = model.full_sort_predict(interaction).view(len(interaction), -1)
                rows = row_of[interaction["user_id"].numpy() - 1]
                found[np.ix_(rows, item_of)] = block[:, 1:].numpy()
        return found

    run = Run("recbole", args, ("recbole", "torch", "numpy", "pandas"))
    run.notes.append(f"{len(train.dataset)} training samples, each a prefix")
    for epoch in range(1, args.epochs + 1):
        with clocks() as took:
            part = First(train, args.batches) if args.batches else train
            loss = trainer._train_epoch(part, epoch - 1, show_progress=False)
        run.epoch(epoch, float(loss), took, len(train))
        if epoch != args.epochs and (not args.evaluate_every or epoch % args.evaluate_every):
            continue
        for split, loader in (("val", val), ("test", test)):
            with clocks() as took:
                own = trainer.evaluate(loader, load_best_model=False, show_progress=False)
            table = scores(loader)
            run.save(split, epoch, top_lists(lambda a, b, t=table: t[a:b], data, split))
            run.evaluations.append({"epoch": epoch, "split": split, "own": dict(own), **took})
        run.write()


if __name__ == "__main__":
    main()
