"""Weights: safetensors of a folder or of a commit on the hub; what cannot be used is one line, nothing hangs."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra text is not installed")

from recsys_ssm import UserError
from recsys_ssm.text import extra, weights
from recsys_ssm.text.tokenizer import TextTokenizer
from recsys_ssm.text.weights import Weights, transformers_model

TITLES = [f"Film number {i}" for i in range(20)]
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300, "bos_token_id": 0,
        "eos_token_id": 0}  # fmt: skip
COMMIT = "0123456789" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small GPT-2 in the layout of transformers."""
    model, _ = transformers_model("GPT2LMHeadModel", GPT2, None)
    model.save_pretrained(tmp_path / "gpt2")
    TextTokenizer.train(TITLES, 300).tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    return tmp_path / "gpt2"


def resolve(model: object, **options: object) -> weights.Source:
    return Weights(model=str(model), **options).resolve(TITLES, ["gpt2"])


def test_a_folder_gives_its_own_weights(folder: Path) -> None:
    source = resolve(folder)
    made, config = transformers_model("GPT2LMHeadModel", source.config, source.folder)
    again, _ = transformers_model("GPT2LMHeadModel", source.config, source.folder)
    other, _ = transformers_model("GPT2LMHeadModel", source.config, None)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert made.state_dict()[name].equal(again.state_dict()[name])
    assert not made.state_dict()[name].equal(other.state_dict()[name])
    assert config["n_embd"] == 16 and config["model_type"] == "gpt2"
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_a_checkpoint_needs_no_folder(folder: Path) -> None:
    source = resolve(folder)
    _, config = transformers_model("GPT2LMHeadModel", source.config, source.folder)
    kept = json.loads(json.dumps(source.to_dict(config)))
    shutil.rmtree(folder)
    again = Weights(model=str(folder)).resolve(TITLES, ["gpt2"], kept)
    assert again.folder is None and again.config == config
    assert again.tokenizer.encode("Film") == source.tokenizer.encode("Film")
    with pytest.raises(UserError, match="language: not the language model of a checkpoint"):
        Weights().resolve(TITLES, ["gpt2"], {})


def test_tiny_needs_no_file() -> None:
    source = resolve("tiny", vocabulary=300)
    assert source.folder is None and source.config is None and source.tokenizer.n_tokens <= 300


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    model, _ = transformers_model("GPT2LMHeadModel", GPT2, None)
    model.half().save_pretrained(folder)
    made, _ = transformers_model("GPT2LMHeadModel", resolve(folder).config, folder)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_pickles_are_refused_and_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"weights are in pytorch_model.bin, .* can run code"
    ) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)


def test_code_of_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["attn_implementation"] = config["_attn_implementation"] = "someone/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    source = resolve(folder)
    model, plain = transformers_model("GPT2LMHeadModel", source.config, source.folder)
    assert not (tmp_path / "ran").exists() and "auto_map" not in plain
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "no config.json in it; put config.json, tokenizer",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in it; put"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json; save it there"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            "its config.json says model_type 'bert'; this model needs gpt2",
        ),
        (
            lambda f: (f / "config.json").write_text(
                '{"model_type": "gpt2", "vocab_size": 10, "n_embd": 16}'
            ),
            "the tokenizer has 300 tokens and the model embeds 10",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(
    folder: Path, change: object, message: str
) -> None:
    TextTokenizer.train([str(i) for i in range(9999)], 300).tokenizer.save(
        str(folder / "tokenizer.json")
    )
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"garbage", "not a GPT2LMHeadModel"), (None, "its weights lack .* tensors in all")],
)
def test_weights_of_another_model_are_one_line(
    folder: Path, content: bytes | None, message: str
) -> None:
    path = folder / "model.safetensors"
    if content is None:
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        transformers_model("GPT2LMHeadModel", resolve(folder).config, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["/no/such/folder", "./mine", "~/mine", "a b", "a/b/c"])
def test_a_folder_that_is_not_there_is_one_line(model: str) -> None:
    with pytest.raises(UserError, match=r"no such folder; put config.json"):
        resolve(model)


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_name_on_the_hub_needs_a_commit(revision: str | None) -> None:
    with pytest.raises(UserError, match=r"give the commit \(40 hexadecimal digits\)"):
        resolve("someone/gpt2", revision=revision)


def test_without_a_network_one_line_says_what_to_fetch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr(weights, "_WAIT_S", 0.2)

    def never(*_: object, **__: object) -> None:
        time.sleep(8)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", never)
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"the hub cannot be reached; .* fetch config.json"
    ) as caught:
        resolve("someone/gpt2", revision=COMMIT)
    assert time.monotonic() - start < 20 and "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve("someone/gpt2", revision=COMMIT)


def test_a_commit_in_the_cache_is_used_without_a_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    kept = tmp_path / "models--someone--gpt2" / "snapshots" / COMMIT
    shutil.copytree(folder, kept)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "_answers", lambda _: pytest.fail("asked the network"))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: real(*args, **{**kwargs, "cache_dir": str(tmp_path)}),
    )
    assert resolve("someone/gpt2", revision=COMMIT).folder == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 0}, "text.n_layers=0: give at least 1"),
        ({"d_model": 30, "n_heads": 4}, "text.n_heads=4: does not divide text.d_model=30"),
    ],
)
def test_sizes_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Weights(**options)


def test_an_absent_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package tokenizers; pip install 'recsys-ssm\[text\]'"
    ):
        resolve("tiny")
