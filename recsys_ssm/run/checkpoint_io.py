"""Write checkpoints whole or not at all, and recognise damaged ones.

Lightning writes a checkpoint to the folder for temporary files and moves it, which is not atomic where that folder is
on another file system: a kill or a full disk then leaves half a file in place of the good one. Here the file is
written beside its name and renamed.

A file ``<name>.ckpt.sha256`` beside a checkpoint lists the hashes a whole checkpoint may have. The new hash is added
before the rename and the old one removed after it, so a kill at any moment leaves a checkpoint that matches its list.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from recsys_ssm.errors import UserError
from recsys_ssm.run.files import write_text

HASHES = ".sha256"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their name, rename them, and keep their hash."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            UserError: The file cannot be written; the one before is still there.
        """
        if "://" in str(path):  # object storage replaces files as a whole
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        digest = hashlib.sha256(content).hexdigest()
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                write_text(_list_of(path), "\n".join([digest, *read_hashes(path)[:1], ""]))
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path}: the checkpoint cannot be written ({error.strerror or error}); free some space, or choose "
                "another folder with output_root"
            ) from error
        write_text(_list_of(path), f"{digest}\n")

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; a run's folder may have been moved or copied since it was written."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        if "://" not in str(path):
            relocate(checkpoint, Path(path).resolve().parent)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its hash."""
        super().remove_checkpoint(path)
        if "://" not in str(path):
            _list_of(Path(path)).unlink(missing_ok=True)


def relocate(checkpoint: dict[str, Any], folder: Path) -> None:
    """Let the states of checkpoint callbacks name the folder that their files are in now.

    Lightning forgets the best score if the folder differs, and a worse checkpoint would replace the best one.
    """
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict) or not {"dirpath", "best_model_path"} <= state.keys():
            continue
        best, before = state["best_model_path"], state["dirpath"]
        if not (
            isinstance(best, str) and isinstance(before, str) and Path(before).name == folder.name
        ):
            continue
        state["dirpath"] = str(folder)
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if isinstance(value := state.get(name), str) and value:
                state[name] = str(folder / Path(value).name)
        if isinstance(kept := state.get("best_k_models"), dict):
            state["best_k_models"] = {str(folder / Path(key).name): v for key, v in kept.items()}


def read_hashes(path: Path) -> list[str]:
    """Return the hashes that a checkpoint may have; none if there is no list."""
    try:
        return _list_of(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


def is_whole(path: Path) -> bool:
    """Return True if a checkpoint matches its hash, or if no hash was kept for it."""
    hashes = read_hashes(path)
    if not hashes:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() in hashes


def _list_of(path: Path) -> Path:
    return path.with_name(path.name + HASHES)
