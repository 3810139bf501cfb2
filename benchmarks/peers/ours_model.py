"""This package on an exchange file's data, through the same Lightning trainer that `recsys_ssm.train` uses.

    python benchmarks/peers/ours_model.py --data FILE --out FOLDER -- dataset=ml_100k backbone=transformer

What follows `--` are overrides of conf/train.yaml; they say which model and which data (the file only tells of whom
the lists are). Epochs are timed as the peers' are, evaluations include both ways of ranking.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from common import PLACES, Data, Run, arguments, clocks
from hydra import compose, initialize_config_dir

from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.instantiate import make, plain, spec
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.paths import CONF_DIR


class Clock(L.Callback):
    """Times epochs, and evaluates after them."""

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
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", [*overrides, f"seed={args.seed}", "name=peer", "output_dir=."])
    data = make(cfg.dataset, "dataset")
    exchange = Data.read(args.data)
    model = NextItem.for_data(
        data,
        tokenizer=plain(cfg.tokenizer),
        backbone=spec(cfg.backbone, "backbone"),
        head={k: v for k, v in plain(cfg.head).items() if k not in ("_target_", "metrics")},
        optimizer=spec(cfg.optimizer, "optimizer"),
        scheduler=spec(cfg.scheduler, "scheduler"),
    )
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
