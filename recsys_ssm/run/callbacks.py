"""Record and show a training: progress, history, cost."""

from __future__ import annotations

import json
import logging
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from recsys_ssm.run.files import VALIDATIONS, write_text

log = logging.getLogger(__name__)


class Progress(ProgressBar):
    """One progress bar for the whole training: steps done, time left, loss, the latest validation.

    Without a terminal (a log file, CI), a line is logged every ``every_s`` seconds instead.

    Args:
        monitor: Validation metric to show.
        every_s: Seconds between lines without a terminal.
    """

    def __init__(self, *, monitor: str, every_s: float = 30.0) -> None:
        super().__init__()
        self.monitor, self.every_s = monitor, every_s
        self._bar: tqdm | None = None
        self._enabled = True
        self._start_step = 0
        self._shown: int | None = None
        self._start = self._logged = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = self._logged = time.monotonic()
        self._start_step = trainer.global_step
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total(trainer),
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._bar is not None:
            if trainer.global_step % 10 == 0 or trainer.global_step == self._bar.total:
                self._bar.n = trainer.global_step
                self._bar.set_postfix(self._values(trainer))
        elif self._enabled and time.monotonic() - self._logged > self.every_s:
            self._logged = time.monotonic()
            self._log_line(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._enabled:
            self._log_line(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log_line(self, trainer: L.Trainer) -> None:
        """Log steps, time left, loss and the monitored metric in one line."""
        done, total = trainer.global_step, self._total(trainer)
        if done == self._shown:  # the last step was logged already
            return
        self._shown = done
        rate = (done - self._start_step) / max(time.monotonic() - self._start, 1e-9)
        left = (
            f", {(total - done) / rate / 60:.1f} min left"
            if total and rate and done < total
            else ""
        )
        values = "".join(f", {name} {value}" for name, value in self._values(trainer).items())
        log.info(
            "step %d%s%s, %.1f steps/s%s", done, f" of {total}" if total else "", values, rate, left
        )

    def _values(self, trainer: L.Trainer) -> dict[str, str]:
        metrics = trainer.callback_metrics
        return {
            name: f"{metrics[name]:.4f}" for name in ("train/loss", self.monitor) if name in metrics
        }

    def _total(self, trainer: L.Trainer) -> int | None:
        total = trainer.estimated_stepping_batches
        return int(total) if total not in (float("inf"), -1) else None


class History(L.Callback):
    """Training loss and validation metrics by step. The curves are drawn from them, and a resumed run continues them.

    Args:
        every_n_steps: Steps between two records of the training loss.
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.records: list[dict[str, float]] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == 1:
            self.records.append(
                {
                    "step": trainer.global_step,
                    "train/loss": float(trainer.callback_metrics["train/loss"]),
                }
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


class ValidationLog(L.Callback):
    """Append the metrics of each validation to ``validations.jsonl`` while the run goes on.

    A resumed run keeps the lines up to its checkpoint's step, any other run begins the file anew.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / VALIDATIONS

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_text(self.path, "".join(self._lines_until(trainer.global_step)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            found = {
                name: number
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/") and math.isfinite(number := float(value))
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.global_step, **found}) + "\n")

    def _lines_until(self, step: int) -> list[str]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError:
            return []
        return [line for line in lines if step and _step_of(line) <= step]


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was cut short
        return math.inf


class Cost(L.Callback):
    """Time of a training step, and peak memory.

    A step's time runs from its start to the start of the next step, so it includes the loading of data and is right
    also for devices that compute asynchronously (CUDA). Steps before a validation or a checkpoint are left out.
    """

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._before: float | None = None
        self._start = 0.0
        self.seconds: dict[int, float] = {}
        """Wall time since the training began or was resumed, by the step of each validation."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._before is not None:
            self._steps.append(now - self._before)
        self._before = now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before = None
        self.seconds[trainer.global_step] = time.perf_counter() - self._start

    def summary(self, device: torch.device) -> dict[str, Any]:
        """Return the median time of a step, the peak memory, and the machine they were measured on."""
        seconds = statistics.median(self._steps) if self._steps else None
        return {
            "seconds_per_step": seconds,
            "steps_per_second": 1 / seconds if seconds else None,
            "peak_memory_bytes": peak_memory(device),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "machine": processor(),
        }


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: of a GPU if that is the device, else of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    """Return the name of the processor, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
