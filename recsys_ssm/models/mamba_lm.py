"""Mamba and Mamba-2 as language models, on this package's operators, with the public checkpoints' names.

``tokens (B, L) → embedding → n × (x + block(RMSNorm(x))) → RMSNorm → inner products with the embedding → (B, L, V)``
(Gu and Dao 2023, arXiv 2312.00752; Dao and Gu 2024, arXiv 2405.21060).

:meth:`MambaLM.load` reads a folder in the layout of ``transformers`` (``MambaForCausalLM``, ``Mamba2ForCausalLM``) or
of the original ``mamba_ssm``; :meth:`MambaLM.save` writes the former. Weights are read from safetensors alone.

Legend: B rows, L tokens, D = d_model, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.mamba import MambaBlock
from recsys_ssm.models.backbones.mamba2 import Mamba2Block
from recsys_ssm.ops.dropout import Dropout
from recsys_ssm.text.checkpoints import (
    mamba_config,
    read_safetensors,
    write_safetensors,
)
from recsys_ssm.text.tokenizer import read_json
from recsys_ssm.text.weights import check_folder, plain_config

FAMILIES = ("mamba", "mamba2")
"""Values of ``model_type`` in a ``config.json``."""

_CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}

# The defaults of transformers' configs, which a config.json may leave out.
_COMMON: dict[str, Any] = {
    "state_size": 16, "num_hidden_layers": 32, "layer_norm_epsilon": 1e-5, "expand": 2,
    "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
    "residual_in_fp32": True, "time_step_min": 0.001, "time_step_max": 0.1,
    "time_step_floor": 1e-4, "tie_word_embeddings": True,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {**_COMMON, "vocab_size": 50280, "hidden_size": 768, "time_step_rank": "auto"},
    "mamba2": {
        **_COMMON, "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64,
        "state_size": 128, "num_heads": 128, "head_dim": 64, "n_groups": 8, "chunk_size": 256,
        "time_step_limit": [0.0, math.inf], "tie_word_embeddings": False,
    },
}  # fmt: skip

# How versions of transformers write from zero to infinity.
_NO_LIMITS: tuple[Any, ...] = (
    None, [0, math.inf], (0, math.inf), [0, {"__float__": "Infinity"}],
)  # fmt: skip


class _Backbone(nn.Module):
    """The parts that checkpoints name ``backbone``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(
            _LanguageLayer(config) for _ in range(config["num_hidden_layers"])
        )
        self.norm_f = nn.RMSNorm(config["hidden_size"], eps=config["layer_norm_epsilon"])


class _LanguageLayer(nn.Module):
    """A block with its RMSNorm before it; the residual connection is around both."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["layer_norm_epsilon"])
        self.mixer: Any = _block(config)


def _block(config: Mapping[str, Any]) -> MambaBlock | Mamba2Block:
    common: dict[str, Any] = {
        "d_model": config["hidden_size"],
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        "expand": config["expand"],
        "conv_bias": config["use_conv_bias"],
        "bias": config["use_bias"],
        "dt_min": config["time_step_min"],
        "dt_max": config["time_step_max"],
        "dt_init_floor": config["time_step_floor"],
    }
    if config["model_type"] == "mamba":
        return MambaBlock(**common, dt_rank=config["time_step_rank"])
    return Mamba2Block(
        **common,
        headdim=config["head_dim"],
        ngroups=config["n_groups"],
        norm_eps=config["layer_norm_epsilon"],
    )


class MambaLM(nn.Module):
    """A Mamba or Mamba-2 language model.

    Args:
        config: The ``config.json`` of ``transformers``; what it leaves out has the default there.
        dropout: Dropout of the embedding and of each block's output, in training.

    Raises:
        UserError: The config is of another model, or asks for what is not computed here.

    Example:
        >>> import torch
        >>> from recsys_ssm import MambaLM
        >>> lm = MambaLM({"model_type": "mamba", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2})
        >>> lm.logits(lm(torch.randint(50, (2, 5)))).shape
        torch.Size([2, 5, 50])
    """

    def __init__(self, config: Mapping[str, Any], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = _checked(config)
        self.backbone = _Backbone(self.config)
        d_model, vocabulary = self.config["hidden_size"], self.config["vocab_size"]
        self.lm_head = nn.Linear(d_model, vocabulary, bias=False)
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:
                # The residual sum of n layers starts at the scale of one.
                layer.mixer.out_proj.weight.div_(math.sqrt(len(self.layers)))
        if self.config["tie_word_embeddings"]:
            self.lm_head.weight = self.backbone.embeddings.weight

    @property
    def layers(self) -> list[_LanguageLayer]:
        """Blocks with their norms, the first one first."""
        return [layer for layer in self.backbone.layers if isinstance(layer, _LanguageLayer)]

    def forward(self, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Return the normalised outputs (B, L, D) of tokens (B, L); :meth:`logits` makes scores of them.

        ``seq_idx`` (B, L): number of the text at each position, -1 at padding, as in :func:`recsys_ssm.ops.ssd`.
        """
        x_BLD = self._embed(tokens)
        for layer in self.layers:
            x_BLD = x_BLD + self.dropout(layer.mixer(layer.norm(x_BLD), seq_idx))
        return self.backbone.norm_f(x_BLD)

    def logits(self, x_D: Tensor) -> Tensor:
        """Return the scores of all tokens to come next: (…, D) to (…, V)."""
        return self.lm_head(x_D)

    def init_state(self, batch_size: int) -> list[Any]:
        """Return the state before any token."""
        return [layer.mixer.init_state(batch_size) for layer in self.layers]

    def extend(
        self, tokens: Tensor, state: list[Any], seq_idx: Tensor | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Read tokens (B, L) after those of ``state``; return outputs (B, L, D) and the state after them.

        With ``seq_idx`` (0 at tokens, -1 at the padding behind them) the state is that after each row's last token.
        """
        x_BLD, after = self._embed(tokens), []
        for layer, before in zip(self.layers, state, strict=True):
            y_BLD, new = layer.mixer.extend(layer.norm(x_BLD), before, seq_idx)
            x_BLD = x_BLD + self.dropout(y_BLD)
            after.append(new)
        return self.backbone.norm_f(x_BLD), after

    def follow(self, tokens: Tensor, state: list[Any]) -> Tensor:
        """Return the outputs of :meth:`extend` alone."""
        x_BLD = self._embed(tokens)
        for layer, before in zip(self.layers, state, strict=True):
            x_BLD = x_BLD + self.dropout(layer.mixer.follow(layer.norm(x_BLD), before))
        return self.backbone.norm_f(x_BLD)

    def step(self, token: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Read one token (B,); return outputs (B, D) and the next state, in constant time."""
        x_BD, after = self._embed(token), []
        for layer, before in zip(self.layers, state, strict=True):
            y_BD, new = layer.mixer.step(layer.norm(x_BD), before)
            x_BD = x_BD + self.dropout(y_BD)
            after.append(new)
        return self.backbone.norm_f(x_BD), after

    def log_likelihood(self, x_ND: Tensor, token_N: Tensor) -> Tensor:
        """Return log p(token) after outputs ``x_ND``, (N,) float32, with the logits of a few rows in memory."""
        found = []
        # About one MiB of logits stays in the cache between the passes over it.
        chunk = max(16, 2**18 // self.config["vocab_size"])
        for x_CD, token_C in zip(x_ND.split(chunk), token_N.split(chunk), strict=True):
            logits_CV = self.logits(x_CD).float()
            own_C = logits_CV.gather(1, token_C[:, None]).squeeze(1)
            found.append(own_C - logits_CV.logsumexp(1))
        return torch.cat(found) if found else x_ND.new_zeros(0)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.backbone.embeddings(tokens))

    # Files

    @classmethod
    def load(cls, folder: str | Path, *, dropout: float = 0.0) -> Self:
        """Load a language model from a folder with ``config.json`` and ``model.safetensors``, one file or several.

        The layout is that of ``transformers`` or of the original ``mamba_ssm``. Nothing in the folder is executed.

        Raises:
            UserError: A file is absent or broken, or the weights are there as pickle alone, or are of another model.
        """
        folder = Path(folder).expanduser()
        check_folder(folder)
        model = cls(plain_config(mamba_config(read_json(folder / "config.json"))), dropout=dropout)
        model.load_weights(folder)
        return model

    def load_weights(self, folder: Path) -> None:
        """Fill the weights from a folder whose config fits.

        Raises:
            UserError: A file is absent or broken, or a tensor is absent, unknown or of another shape.
        """
        found = {
            name.replace("backbone.embedding.", "backbone.embeddings."): tensor
            for name, tensor in read_safetensors(folder).items()
        }
        if self.config["tie_word_embeddings"]:
            found.pop("lm_head.weight", None)
        wanted = self.state_dict()
        if self.config["tie_word_embeddings"]:
            del wanted["lm_head.weight"]
        for name, tensor in wanted.items():
            if name not in found:
                raise UserError(
                    f"{folder}: its weights lack {name}; give the weights of a {self.class_name}"
                )
            if found[name].shape != tensor.shape:
                raise UserError(
                    f"{folder}: {name} is {tuple(found[name].shape)} and its config.json says {tuple(tensor.shape)}; "
                    "use weights and config of one model"
                )
        if unknown := sorted(found.keys() - wanted.keys()):
            raise UserError(
                f"{folder}: its weights have {unknown[0]}, which a {self.class_name} does not have; give the weights "
                "of another folder"
            )
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which ``transformers`` loads: ``AutoModelForCausalLM``.

        Raises:
            UserError: The folder cannot be written.
        """
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        if self.config["tie_word_embeddings"]:
            del tensors["lm_head.weight"]
        config = {"architectures": [self.class_name], **self.config}
        write_safetensors(Path(folder).expanduser(), config, tensors)

    @property
    def class_name(self) -> str:
        """Name of the class in ``transformers``."""
        return _CLASSES[self.config["model_type"]]


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults filled in.

    Raises:
        UserError: It is of another model, a number is not one, or it asks for what is not computed here.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type is {kind!r:.40}; give a language model of {' or '.join(FAMILIES)}"
        )
    full = {**_DEFAULTS[kind], **config}
    whole = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "state_size",
        "conv_kernel",
        "expand",
    ]
    if kind == "mamba2":
        whole += ["num_heads", "head_dim", "n_groups"]
        if full["time_step_limit"] not in _NO_LIMITS:
            raise UserError(
                f"config.json: time_step_limit is {full['time_step_limit']!r:.60}; only a model without limits of its "
                "step sizes is computed here"
            )
        full["time_step_limit"] = [0.0, math.inf]
    elif full["time_step_rank"] == "auto":
        full["time_step_rank"] = math.ceil(full["hidden_size"] / 16)
    else:
        whole.append("time_step_rank")
    for name in whole:
        value = full[name]
        if isinstance(value, float) and value.is_integer():
            value = full[name] = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"config.json: {name} is {value!r:.40}; expected a whole number from 1")
    if (
        kind == "mamba2"
        and full["num_heads"] * full["head_dim"] != full["expand"] * full["hidden_size"]
    ):
        raise UserError(
            f"config.json: {full['num_heads']} heads of {full['head_dim']} are not expand × hidden_size = "
            f"{full['expand'] * full['hidden_size']}; correct one of them"
        )
    if kind == "mamba2" and full["num_heads"] % full["n_groups"]:
        raise UserError(
            f"config.json: n_groups {full['n_groups']} does not divide the {full['num_heads']} heads; correct it"
        )
    if full["hidden_act"] not in ("silu", "swish"):
        raise UserError(
            f"config.json: hidden_act is {full['hidden_act']!r:.40}; only silu is computed here"
        )
    return full
