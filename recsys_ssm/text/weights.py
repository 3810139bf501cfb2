"""Find the weights of a language model: a folder, a name on the hub, or small random ones (``text.model=tiny``).

No code of a folder is run: weights are read from safetensors alone, and the classes are those of ``transformers``.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import Configurable
from recsys_ssm.text.checkpoints import mamba_config
from recsys_ssm.text.extra import require
from recsys_ssm.text.tokenizer import TextTokenizer, read_json

TINY = "tiny"
"""Name of the small random model."""

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of a folder beside the weights; the last two may be absent."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WAIT_S = 5
"""Seconds that the hub has to accept a connection."""

# What a config may say of where code is, how weights are packed, and of classes.
_NEVER = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "_name_or_path",
          "experts_implementation", "_experts_implementation", "transformers_version", "id2label",
          "label2id")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Tokenizer, config and weights of a language model.

    Attributes:
        tokenizer: Its tokenizer.
        config: Its ``config.json`` as plain data; None: a small random model, whose config the model makes.
        folder: Folder with its weights; None: they are random, or come with a checkpoint.
    """

    tokenizer: TextTokenizer
    config: dict[str, Any] | None = None
    folder: Path | None = None

    def to_dict(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint needs to make the model again, beside its weights."""
        return {"config": dict(config), "tokenizer": self.tokenizer.to_dict()}


class Weights(Configurable):
    """Say where the weights of a language model come from.

    Args:
        model: A folder in the layout of ``transformers``; a name on the hub, with ``revision``; or ``tiny``: a small
            random model and a tokenizer trained on the titles, which need no file.
        revision: Commit of a name on the hub, 40 hexadecimal digits.
        vocabulary: Tokens of the tiny model at most.
        d_model: Width of the tiny model.
        n_layers: Layers of the tiny model.
        n_heads: Attention heads of the tiny model, if it has attention.

    Raises:
        UserError: A number is too small, or the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        model: str = TINY,
        revision: str | None = None,
        vocabulary: int = 2000,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 2,
    ) -> None:
        for option, value in (("d_model", d_model), ("n_layers", n_layers), ("n_heads", n_heads)):
            if value < 1:
                raise UserError(f"text.{option}={value}: give at least 1")
        if d_model % n_heads:
            raise UserError(f"text.n_heads={n_heads}: does not divide text.d_model={d_model}")
        self.model, self.revision = model, revision
        self.vocabulary, self.d_model = vocabulary, d_model
        self.n_layers, self.n_heads = n_layers, n_heads

    def resolve(
        self, texts: Sequence[str], families: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> Source:
        """Return tokenizer, config and folder.

        Args:
            texts: Texts to train the tokenizer of a tiny model on.
            families: Values of ``model_type`` that the caller can use.
            kept: :meth:`Source.to_dict` from a checkpoint, whose weights are in it as well; no file is read then.

        Raises:
            UserError: A file is absent or cannot be used, or the model is of another family.
        """
        if kept is not None:
            try:
                config = plain_config(kept["config"])
                tokenizer = TextTokenizer.from_dict(kept["tokenizer"])
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"language: not the language model of a checkpoint ({error}); give another checkpoint"
                ) from error
            check_family(config, families, "language")
            return Source(tokenizer, config)
        if self.model == TINY:
            return Source(TextTokenizer.train(texts, self.vocabulary))
        folder = self.find_folder()
        config = plain_config(mamba_config(read_json(folder / "config.json")))
        check_family(config, families, f"text.model={self.model}")
        tokenizer = TextTokenizer.from_folder(folder)
        rows = config.get("vocab_size")
        if isinstance(rows, int) and rows < tokenizer.n_tokens:
            raise UserError(
                f"text.model={self.model}: the tokenizer has {tokenizer.n_tokens:,} tokens and the model embeds "
                f"{rows:,}; use the tokenizer that the model was trained with"
            )
        return Source(tokenizer, config, folder)

    def find_folder(self) -> Path:
        """Return the folder of the model, which is fetched if it is on the hub and there is a network.

        Raises:
            UserError: It is not there and cannot be fetched, or lacks a file, or has its weights as pickle alone.
        """
        path = Path(self.model).expanduser()
        if path.is_dir():
            check_folder(path)
            return path
        if (
            path.is_absolute()
            or self.model.startswith((".", "~"))
            or not _ON_HUB.fullmatch(self.model)
        ):
            raise UserError(f"text.model={self.model}: no such folder; {_needed()}")
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            raise UserError(
                f"text.model={self.model}, text.revision={self.revision}: not a folder here, and a name on the hub may "
                "change what it holds; give the commit (40 hexadecimal digits) with text.revision, or a folder"
            )
        return _from_hub(self.model, self.revision)


def _needed() -> str:
    return "put config.json, tokenizer.json, tokenizer_config.json and model.safetensors there, or give another folder"


def check_folder(folder: Path) -> None:
    """Check that a folder has a config and weights as safetensors.

    Raises:
        UserError: A file is absent, or the weights are there as pickle alone.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"text.model={folder}: no config.json in it; {_needed()}")
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"text.model={folder}: its weights are in {pickles[0]}, and reading such a file can run code; give a "
            "folder with model.safetensors (transformers: model.save_pretrained(…) writes it)"
        )
    raise UserError(f"text.model={folder}: no model.safetensors in it; {_needed()}")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config without what names code, or how weights are packed.

    Raises:
        UserError: It is not a mapping of plain data.
    """
    if not isinstance(config, Mapping):
        raise UserError("config.json: not a JSON object; fetch the file again")
    return {str(name): value for name, value in config.items() if name not in _NEVER}


def check_family(config: Mapping[str, Any], families: Sequence[str], option: str) -> None:
    """Check that a model is of a family that the caller can use.

    Raises:
        UserError: It is not.
    """
    if (kind := config.get("model_type")) not in families:
        raise UserError(
            f"{option}: its config.json says model_type {kind!r:.40}; this model needs {' or '.join(families)}"
        )


def _from_hub(name: str, revision: str) -> Path:
    """Return the folder of a commit of the hub: from the cache of ``huggingface_hub``, or else from the network.

    Raises:
        UserError: It is not in the cache, and the hub does not answer or does not have it.
    """
    hub = require("huggingface_hub", f"text.model={name}")
    wanted = [*FILES, "*.safetensors", "model.safetensors.index.json"]
    options = {"revision": revision, "allow_patterns": wanted}
    try:
        folder = Path(hub.snapshot_download(name, local_files_only=True, **options))
        check_folder(folder)
        return folder
    except UserError:  # a fetch that was stopped: the network has the rest
        pass
    except Exception:  # noqa: S110 - not in the cache; its classes differ from version to version
        pass
    advice = (
        f"text.model={name}: not in the cache, and %s; on a machine with a network fetch config.json, tokenizer.json, "
        f"tokenizer_config.json and *.safetensors of commit {revision[:12]}…, put them into a folder here, and give "
        "text.model=<folder>"
    )
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(advice % "HF_HUB_OFFLINE is set")
    if not _answers(hub.constants.ENDPOINT):
        raise UserError(advice % "the hub cannot be reached")
    try:
        folder = Path(hub.snapshot_download(name, etag_timeout=_WAIT_S, **options))
    except Exception as error:  # of the network, or of the hub's answer
        raise UserError(advice % f"the hub refused ({_first_line(error)})") from error
    check_folder(folder)
    return folder


def _answers(endpoint: str) -> bool:
    """Return True if a server accepts a connection in time, its name looked up included."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # the proxy's to say
    url = urllib.parse.urlsplit(endpoint)
    port = url.port or (80 if url.scheme == "http" else 443)
    found: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout=_WAIT_S).close()
            found.append(True)
        except OSError:
            pass

    # Looking up a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_WAIT_S + 1)
    return bool(found)


def transformers_model(
    model_class: str, config: Mapping[str, Any], folder: Path | None, *, four_bit: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Make a model of ``transformers`` in float32, with the weights of a folder or random ones.

    Args:
        model_class: Name of the class, ``GPT2LMHeadModel``.
        config: Arguments of its config.
        folder: Folder with ``model.safetensors``; None: random weights.
        four_bit: Keep the weights of a folder in 4 bits; the rest is computed in bfloat16.

    Returns:
        The model, and its config as plain data.

    Raises:
        UserError: The package is absent, or config or weights cannot be used.
    """
    transformers = require("transformers", f"a {model_class}")
    quantized: dict[str, Any] = {}
    if four_bit and folder is not None:
        require("bitsandbytes", "model.four_bit=true")
        if not torch.cuda.is_available():
            raise UserError("model.four_bit=true: needs a CUDA device; leave it out")
        quantized["device_map"] = {"": torch.cuda.current_device()}
        quantized["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    kind = getattr(transformers, model_class)
    where = "config.json" if folder is None else f"text.model={folder}"
    try:
        arguments = plain_config(config)
        arguments.pop("model_type", None)
        made = kind.config_class(**arguments)
        made._attn_implementation = "sdpa"
        if folder is None:
            model = kind(made)
        else:
            with _quiet(transformers):
                model, report = kind.from_pretrained(
                    folder,
                    config=made,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **quantized,
                )
            absent = sorted(report["missing_keys"])
            if absent:
                raise UserError(
                    f"{where}: its weights lack {absent[0]} ({len(absent):,} tensors in all); give the weights of a "
                    f"{model_class}"
                )
    except UserError:
        raise
    except Exception as error:  # whatever a foreign config or file makes the package raise
        raise UserError(f"{where}: not a {model_class} ({_first_line(error)})") from error
    plain = {"model_type": made.model_type, **plain_config(made.to_dict())}
    return model if quantized else model.float(), plain


class _quiet:  # noqa: N801 - used as a statement
    """Leave out what ``transformers`` logs of a file that is read; what matters is checked by the caller."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.level = self.logging.get_verbosity()
        self.bars = getattr(self.logging, "is_progress_bar_enabled", lambda: False)()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
