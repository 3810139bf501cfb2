"""Tokenizers: trained on titles or read from a folder, the same from a checkpoint, and safe on any text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="the extra text is not installed")

from recsys_ssm import UserError
from recsys_ssm.text.tokenizer import TextTokenizer

TITLES = ["Toy Story (1995)", "GoldenEye (1995)", "Story of Us, The (1999)"]
ODD = (
    "\N{OK HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "C\u00e9r\u00e9monie",
    "x" * 10_000,
    "<|endoftext|",
)


def test_any_text_comes_back_from_its_tokens() -> None:
    tokenizer = TextTokenizer.train(TITLES, 300)
    for text in (*TITLES, *ODD):
        tokens = tokenizer.encode(f" {text}")
        assert tokenizer.decode(tokens) == f" {text}"
        assert max(tokens) < tokenizer.n_tokens <= 300


def test_titles_are_cut_at_their_number_of_tokens() -> None:
    tokenizer = TextTokenizer.train(TITLES, 300)
    whole, cut = tokenizer.encode(ODD[3]), tokenizer.encode(ODD[3], most=32)
    assert len(whole) > 1000 and cut == whole[:32]
    assert tokenizer.encode_all([ODD[3], "Toy"], most=32)[0] == cut


def test_the_same_titles_give_the_same_tokenizer_in_another_process_and_with_other_threads() -> (
    None
):
    code = (
        "from recsys_ssm.text.tokenizer import TextTokenizer;"
        "titles = [f'{w} number {i % 7} of {i}' for i in range(500) for w in ('Red', 'Blue', 'Green')];"
        "print(TextTokenizer.train(titles, 400).tokenizer.to_str())"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        ).stdout
        for threads in ("1", "4")
    }
    assert len(made) == 1


def test_a_checkpoint_holds_the_tokenizer() -> None:
    tokenizer = TextTokenizer.train(TITLES, 300)
    again = TextTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.bos, again.eos, again.pad) == (0, 0, 0)
    assert again.encode("Toy Story") == tokenizer.encode("Toy Story")
    for wrong in ({}, {**tokenizer.to_dict(), "tokenizer": "{}"}):
        with pytest.raises(UserError, match="not a tokenizer"):
            TextTokenizer.from_dict(wrong)
    with pytest.raises(UserError, match="its eos token has the id 5000, outside its vocabulary"):
        TextTokenizer.from_dict({**tokenizer.to_dict(), "eos": 5000})


def test_a_folder_may_lack_a_token_for_padding(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train(TITLES, 300)
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    none = TextTokenizer.from_folder(tmp_path)
    assert (none.bos, none.eos, none.pad) == (None, None, 0)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [7, 8]}))
    numbered = TextTokenizer.from_folder(tmp_path)
    assert (numbered.bos, numbered.eos, numbered.pad) == (1, 7, 7)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "pad_token": None})
    )
    named = TextTokenizer.from_folder(tmp_path)
    assert (named.bos, named.eos, named.pad) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x", "", "no tokenizer.json; save it there"),
        ("tokenizer.json", "{", "tokenizer.json: not a readable tokenizer"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: not a JSON object"),
        ("config.json", "{", "config.json: not readable"),
        ("config.json", '{"eos_token_id": 10000000}', "outside its vocabulary"),
    ],
)
def test_a_wrong_folder_is_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name != "x":
        TextTokenizer.train(TITLES, 300).tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        TextTokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_has_room_for_the_bytes() -> None:
    with pytest.raises(UserError, match=r"text\.vocabulary=256: give at least 257"):
        TextTokenizer.train(TITLES, 256)
