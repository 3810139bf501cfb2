"""Turn titles into tokens of a language model: a tokenizer of a folder, or one that is trained on the titles.

A tokenizer travels in a checkpoint as plain data (:meth:`TextTokenizer.to_dict`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from recsys_ssm.errors import UserError
from recsys_ssm.text.extra import require

END = "<|endoftext|>"
"""Token between texts in tokenizers that are trained here."""


class TextTokenizer:
    """A tokenizer and its special tokens.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
        bos, eos, pad: Ids of the tokens at the beginning and the end of a text, and of padding; None: there is none.

    Raises:
        UserError: An id is outside the vocabulary.

    Without a token for padding the end token serves: padding is always masked, so its id does not matter.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.n_tokens = int(tokenizer.get_vocab_size(with_added_tokens=True))
        for name, number in (("bos", bos), ("eos", eos), ("pad", pad)):
            if number is not None and not 0 <= number < self.n_tokens:
                raise UserError(
                    f"tokenizer: its {name} token has the id {number}, outside its vocabulary of {self.n_tokens:,}; "
                    "correct its tokenizer_config.json or config.json"
                )
        self.bos, self.eos = bos, eos
        self.pad = next((each for each in (pad, eos, bos) if each is not None), 0)
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Self:
        """Train a byte-level BPE tokenizer: the same texts give the same tokenizer, and any text can be encoded.

        Args:
            texts: The texts.
            vocabulary: Tokens at most; 256 of them are the bytes.

        Raises:
            UserError: The vocabulary has not a token for each byte.
        """
        if vocabulary < 257:
            raise UserError(f"text.vocabulary={vocabulary}: give at least 257, one for each byte")
        tokenizers = require("tokenizers", "text.model=tiny")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # Titles follow a blank in a prompt, and so do the words that merges are learnt from.
        tokenizer.train_from_iterator((f" {text}" for text in texts), trainer)
        return cls(tokenizer, bos=0, eos=0, pad=0)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read the tokenizer of a folder in the layout of ``transformers``; no code of the folder is run.

        Raises:
            UserError: There is no ``tokenizer.json``, or it cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{folder}: no tokenizer.json; save it there with transformers: "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        tokenizers = require("tokenizers", f"text.model={folder}")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises Exception itself
            raise UserError(
                f"{path}: not a readable tokenizer ({_first_line(error)}); fetch the file again"
            ) from error
        return cls(tokenizer, **_special_tokens(folder, tokenizer))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Make a tokenizer from the plain data in a checkpoint.

        Raises:
            UserError: It is not such data.
        """
        tokenizers = require("tokenizers", "this model")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(plain["tokenizer"])
            special = {name: plain[name] for name in ("bos", "eos", "pad")}
        except Exception as error:  # the package raises Exception itself
            raise UserError(
                f"not a tokenizer ({_first_line(error)}); give another checkpoint"
            ) from error
        return cls(tokenizer, **special)

    def to_dict(self) -> dict[str, Any]:
        """Return the tokenizer as plain data."""
        return {
            "tokenizer": self.tokenizer.to_str(),
            "bos": self.bos,
            "eos": self.eos,
            "pad": self.pad,
        }

    def encode(self, text: str, *, most: int | None = None) -> list[int]:
        """Return the tokens of a text, the first ``most``; special tokens are not added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids[:most]

    def encode_all(self, texts: Sequence[str], *, most: int | None = None) -> list[list[int]]:
        """Return the tokens of each text, the first ``most`` of them; special tokens are not added."""
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [each.ids[:most] for each in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _special_tokens(folder: Path, tokenizer: Any) -> dict[str, int | None]:
    """Return the ids of the special tokens that a folder names, by text or by number."""
    named = {
        **read_json(folder / "special_tokens_map.json"),
        **read_json(folder / "tokenizer_config.json"),
    }
    config = read_json(folder / "config.json")
    found: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        token = named.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        number = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if number is None:
            number = config.get(f"{name}_token_id")
        if isinstance(number, list) and number:  # several tokens may end a text
            number = number[0]
        found[name] = number if isinstance(number, int) and number >= 0 else None
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; an empty one if there is no such file.

    Raises:
        UserError: The file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable ({_first_line(error)}); fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
