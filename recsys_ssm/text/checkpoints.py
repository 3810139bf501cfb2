"""Read and write folders of language models: ``config.json`` beside weights as safetensors, one file or several."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.text.extra import require
from recsys_ssm.text.tokenizer import read_json

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder, on the CPU.

    Raises:
        UserError: There is no such file, or one is broken, or the index names a file outside the folder.
    """
    load = require("safetensors.torch", "a folder of weights").load_file
    if (folder / _FILE).is_file():
        names = [_FILE]
    else:
        index = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(index, Mapping) or not index:
            raise UserError(f"{folder}: neither {_FILE} nor {_INDEX} with a weight_map; fetch them")
        names = sorted({str(name) for name in index.values()})
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise UserError(
                f"{folder / _INDEX}: names {name!r:.80}, outside the folder; fetch the index again"
            )
        if not path.is_file():
            raise UserError(f"{folder}: no {name}, which its index names; fetch that file as well")
        try:
            tensors |= load(path)
        except Exception as error:  # the package has classes of its own for a broken file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{path}: not readable ({reason}); fetch the file again") from error
    return tensors


def write_safetensors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a config and tensors; each file is there whole or not at all.

    Raises:
        UserError: The folder cannot be written.
    """
    save = require("safetensors.torch", "saving a language model").save_file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / f"{_FILE}.{os.getpid()}.tmp"
        save(dict(tensors), weights, metadata={"format": "pt"})
        weights.replace(folder / _FILE)
        text = folder / f"config.json.{os.getpid()}.tmp"
        # json writes an infinite limit as Infinity, as transformers does.
        text.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        text.replace(folder / "config.json")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); give another folder"
        ) from error


def mamba_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a config of the original ``mamba_ssm`` to that of ``transformers``; return others as they are.

    Raises:
        UserError: The model has parts that Mamba's and Mamba-2's language models do not have.
    """
    if "model_type" in config or not {"d_model", "n_layer"} <= config.keys():
        return dict(config)
    options = config.get("ssm_cfg") or {}
    if not isinstance(options, Mapping):
        raise UserError("config.json: ssm_cfg is not a mapping; fetch the file again")
    layer = options.get("layer", "Mamba1")
    unlike = [
        name
        for name, unwanted in (
            ("layer", layer not in ("Mamba1", "Mamba2")),
            ("attn_layer_idx", config.get("attn_layer_idx")),
            ("d_intermediate", config.get("d_intermediate")),
            ("rms_norm", not config.get("rms_norm", True)),
            ("norm_before_gate", options.get("norm_before_gate")),
            ("D_has_hdim", options.get("D_has_hdim")),
            ("rmsnorm", not options.get("rmsnorm", True)),
        )
        if unwanted
    ]
    if unlike:
        raise UserError(
            f"config.json: {unlike[0]} is not that of a Mamba or Mamba-2 language model; give another folder"
        )
    d_model, expand = config["d_model"], options.get("expand", 2)
    multiple = config.get("pad_vocab_size_multiple", 8)
    found: dict[str, Any] = {
        "hidden_size": d_model,
        "num_hidden_layers": config["n_layer"],
        "vocab_size": -(-config.get("vocab_size", 50277) // multiple) * multiple,
        "expand": expand,
        "conv_kernel": options.get("d_conv", 4),
        "use_bias": options.get("bias", False),
        "use_conv_bias": options.get("conv_bias", True),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
    }
    if layer == "Mamba1":
        rank = options.get("dt_rank", "auto")
        return {
            "model_type": "mamba",
            **found,
            "state_size": options.get("d_state", 16),
            "time_step_rank": math.ceil(d_model / 16) if rank == "auto" else rank,
        }
    headdim = options.get("headdim", 64)
    return {
        "model_type": "mamba2",
        **found,
        "state_size": options.get("d_state", 128),
        "head_dim": headdim,
        "num_heads": expand * d_model // headdim,
        "n_groups": options.get("ngroups", 1),
        "time_step_limit": list(options.get("dt_limit", (0.0, math.inf))),
    }
