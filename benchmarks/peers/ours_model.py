"""Train this package on an exchange file's data with the Lightning trainer of `recsys_ssm.train`.

    python benchmarks/peers/ours_model.py --data FILE --out FOLDER -- dataset=ml_100k backbone=transformer

Overrides of conf/train.yaml follow `--` and choose model and data. The exchange file only lists the users. Epochs are
timed as the peers' are, and evaluations rank in both ways.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from common import PLACES, Data, Run, arguments, clocks

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import config

from recsys_ssm.run.assemble import make_data, make_model


class Clock(L.Callback):
    """Callback that times epochs, and evaluates after them."""

    def __init__(self, run: Run, evaluate: Any) -> None:
        self.run, self.evaluate = run, evaluate

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        epoch, loss = trainer.current_epoch + 1, float(trainer.callback_metrics["train/loss"])
        n_batches = len(trainer.train_dataloader)
        self.run.epoch(epoch, loss, {"wall": wall, "cpu": cpu}, n_batches)
        every = self.run.args.evaluate_every or self.run.args.epochs
        if epoch % every == 0 or epoch == self.run.args.epochs:
            self.evaluate(epoch)


def main() -> None:
    split_at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    overrides, sys.argv = sys.argv[split_at + 1 :], sys.argv[:split_at]
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    L.seed_everything(args.seed)
    cfg = config([*overrides, f"seed={args.seed}"])
    data: Any = make_data(cfg)
    exchange = Data.read(args.data)
    model: Any = make_model(cfg, data)
    run = Run("recsys_ssm", args, ("recsys_ssm", "torch", "lightning", "numpy"))
    run.notes.append(" ".join(overrides))

    @torch.no_grad()
    def evaluate(epoch: int) -> None:
        model.eval()
        loaders = {"val": data.val_dataloader()[1], "test": data.test_dataloader()}
        for split, loader in loaders.items():
            top = {name: np.full((exchange.n_users, PLACES), -1) for name in ("all", "unseen")}
            for name, found in top.items():
                with clocks() as took:
                    for batch in loader:
                        everything, unseen = model.top(batch, PLACES, seen_too=name == "all")
                        found[batch.user] = unseen if everything is None else everything
                run.evaluations.append(
                    {"epoch": epoch, "split": split, "filter_seen": name == "unseen", **took}
                )
            run.save(split, epoch, top)
        run.write()
        model.train()

    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=args.batches or 1.0,
        limit_val_batches=0,
        callbacks=[Clock(run, evaluate)],
    )
    trainer.fit(model, data.train_dataloader())


if __name__ == "__main__":
    main()
