"""Train RecTools' SASRec on an exchange file with its own data preparation and trainer: a target at every position.

    ~/.cache/recsys_ssm/peers/rectools/bin/python benchmarks/peers/rectools_model.py --data FILE --out FOLDER

--layers chooses the layers: `sasrec` (the authors'), `preln` or `ligr` (eSASRec).
"""

from __future__ import annotations

import os
import time
import warnings

import numpy as np
import pandas as pd
import torch
from common import PLACES, Data, Run, arguments, clocks
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers
from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers

LAYERS = {
    "sasrec": SASRecTransformerLayers,
    "preln": PreLNTransformerLayers,
    "ligr": LiGRLayers,
}


def table(user: np.ndarray, item: np.ndarray) -> pd.DataFrame:
    """Return events as RecTools' table; they get rising times, by which RecTools sorts."""
    return pd.DataFrame(
        {
            Columns.User: user,
            Columns.Item: item,
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(np.arange(user.size), unit="s"),
        }
    )


def lists(reco: pd.DataFrame, n_users: int) -> np.ndarray:
    """Return the places (U, PLACES) of a table of recommendations."""
    top = np.full((n_users, PLACES), -1, dtype=np.int32)
    top[reco[Columns.User].to_numpy(), reco[Columns.Rank].to_numpy() - 1] = reco[Columns.Item]
    return top


class Clock(Callback):
    """Callback that times epochs."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __deepcopy__(self, memo: object) -> Clock:
        """Return self: RecTools trains with a copy of the trainer, and the times are needed here."""
        return self

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        self.run.epoch(
            trainer.current_epoch + 1,
            float(trainer.callback_metrics["train_loss"]),
            {"wall": wall, "cpu": cpu},
            len(trainer.train_dataloader),
        )


def main() -> None:
    args = arguments(__doc__, layers="sasrec", loss="softmax", negatives=128)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    os.environ["NUMBA_NUM_THREADS"] = str(args.threads)
    data = Data.read(args.data)
    seed_everything(args.seed)
    train = Dataset.construct(table(*data.before(2)))
    known = {"val": train, "test": Dataset.construct(table(*data.before(1)))}
    run = Run("rectools", args, ("rectools", "torch", "pytorch-lightning", "numpy", "pandas"))

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=args.epochs,
            limit_train_batches=args.batches or 1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            enable_checkpointing=False,
            devices=1,
            accelerator="cpu",
            callbacks=[Clock(run)],
        )

    model = SASRecModel(
        n_blocks=args.n_layers,
        n_heads=args.n_heads,
        n_factors=args.d_model,
        dropout_rate=args.dropout,
        session_max_len=args.max_length,
        loss=args.loss,
        n_negatives=args.negatives,
        lr=args.lr,
        batch_size=args.batch_size,
        epochs=args.epochs,
        transformer_layers_type=LAYERS[args.layers],
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
        recommend_n_threads=args.threads,
        verbose=0,
    )

    def evaluate(epoch: int) -> None:
        for split, dataset in known.items():
            top = {}
            for name, filtered in (("all", False), ("unseen", True)):
                with clocks() as took:
                    reco = model.recommend(
                        users=np.arange(data.n_users),
                        dataset=dataset,
                        k=PLACES,
                        filter_viewed=filtered,
                    )
                top[name] = lists(reco, data.n_users)
                run.evaluations.append(
                    {"epoch": epoch, "split": split, "filter_seen": filtered, **took}
                )
            run.save(split, epoch, top)
        run.write()

    done, step = 0, args.evaluate_every or args.epochs
    while done < args.epochs:
        now = min(step, args.epochs - done)
        model.fit_partial(train, min_epochs=now, max_epochs=now)
        done += now
        evaluate(done)


if __name__ == "__main__":
    main()
