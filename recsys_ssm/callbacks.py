"""Lightning callbacks of our own."""

from __future__ import annotations

from typing import Any

import lightning as L


class History(L.Callback):
    """Keeps what the curves are drawn from: training loss and validation metrics by step, across a resume."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == 1:
            self.records.append(
                {"step": trainer.global_step, "train/loss": float(trainer.callback_metrics["train/loss"])}
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            values = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            self.records.append({"step": trainer.global_step, **values})

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = state_dict["records"]
