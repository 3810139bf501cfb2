"""The Mamba language model: public checkpoints in and out, one token at a time and from a state, bad folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra text is not installed")
import transformers
from safetensors.torch import load_file, save_file

from recsys_ssm import MambaLM, UserError

SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 5, "conv_kernel": 3, "layer_norm_epsilon": 1e-3},
    "mamba2": {"num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 7, "layer_norm_epsilon": 1e-3},
}  # fmt: skip
KINDS = list(SIZES)
NAMES = {"mamba": "Mamba", "mamba2": "Mamba2"}


def theirs_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, **SIZES[kind], **options}
    config = getattr(transformers, f"{NAMES[kind]}Config")(**size)
    return getattr(transformers, f"{NAMES[kind]}ForCausalLM")(config).eval()


def tokens() -> torch.Tensor:
    return torch.randint(40, (3, 21), generator=torch.Generator().manual_seed(1))


def logits(lm: MambaLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm.logits(lm(ids))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_is_loaded_and_written(
    kind: str, shards: int, tied: bool, tmp_path: Path
) -> None:
    theirs = theirs_of(kind, tie_word_embeddings=tied, use_bias=not tied)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="10GB" if shards == 1 else "12KB")
    assert (len(list((tmp_path / "in").glob("*.safetensors"))) > 1) == (shards > 1)
    lm = MambaLM.load(tmp_path / "in").eval()
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    assert (logits(lm, tokens()) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert sum(p.numel() for p in lm.parameters()) == sum(p.numel() for p in theirs.parameters())
    lm.save(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert again(tokens()).logits.equal(wanted)
    assert not list((tmp_path / "out").glob("*.tmp"))


def original(kind: str, folder: Path, **config: Any) -> Any:
    """Write a folder in the layout of mamba_ssm with the weights of a model of transformers, which is returned."""
    options = {"vocab_size": 40, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5}
    theirs = theirs_of(kind, **options)
    folder.mkdir()
    tensors = {
        name.replace("embeddings", "embedding"): tensor.clone()
        for name, tensor in theirs.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    cfg = {
        "mamba": {"d_state": 5, "d_conv": 3},
        "mamba2": {"layer": "Mamba2", "d_state": 7, "headdim": 8, "ngroups": 2},
    }
    config = {"d_model": 24, "n_layer": 2, "vocab_size": 37, "ssm_cfg": cfg[kind], "rms_norm": True,
              "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_mamba_ssm_is_loaded_and_written_for_transformers(
    kind: str, tmp_path: Path
) -> None:
    theirs = original(kind, tmp_path / "in")
    lm = MambaLM.load(tmp_path / "in").eval()
    with torch.no_grad():
        wanted = theirs(tokens()).logits
    assert (logits(lm, tokens()) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    lm.save(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert again(tokens()).logits.equal(wanted)


def test_parameters_of_mamba_130m() -> None:
    size = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
    with torch.device("meta"):
        ours = MambaLM({"model_type": "mamba", **size})
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**size))
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 129_135_360


def test_defaults_are_those_of_transformers() -> None:
    for kind in KINDS:
        given = {"model_type": kind, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
        if kind == "mamba2":
            given |= {"num_heads": 2, "head_dim": 64, "n_groups": 1}
        config = getattr(transformers, f"{NAMES[kind]}Config")(**given)
        for name, value in MambaLM(given).config.items():
            theirs = getattr(config, name)
            assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value, name


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_parts_are_the_whole(kind: str) -> None:
    lm = MambaLM(theirs_of(kind).config.to_dict()).double().eval()
    ids = tokens()
    with torch.no_grad():
        whole = lm(ids)
        state, found = lm.init_state(3), []
        for token in ids.unbind(1):
            x, state = lm.step(token, state)
            found.append(x)
        torch.testing.assert_close(torch.stack(found, 1), whole)
        first, state = lm.extend(ids[:, :8], lm.init_state(3))
        second, state = lm.extend(ids[:, 8:10], state)  # shorter than the convolution
        third = lm.follow(ids[:, 10:], state)
        torch.testing.assert_close(torch.cat([first, second, third], 1), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_after_the_last_token_of_each_row(kind: str) -> None:
    lm = MambaLM(theirs_of(kind).config.to_dict()).double().eval()
    ids, lengths = tokens(), (21, 2, 9)
    mask = torch.stack([(torch.arange(21) < n).long() for n in lengths])
    with torch.no_grad():
        _, state = lm.extend(ids, lm.init_state(3), mask - 1)
        after = lm.follow(ids[:, :4], state)
        for row, n in enumerate(lengths):
            alone = torch.cat([ids[row : row + 1, :n], ids[row : row + 1, :4]], 1)
            torch.testing.assert_close(after[row : row + 1], lm(alone)[:, n:])


def test_log_likelihood_is_the_log_softmax() -> None:
    lm = MambaLM(
        {"model_type": "mamba", "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1}
    )
    x, token = torch.randn(23000, 8), torch.randint(40, (23000,))  # several chunks
    wanted = lm.logits(x).log_softmax(-1)[torch.arange(23000), token]
    torch.testing.assert_close(lm.log_likelihood(x, token), wanted)
    assert lm.log_likelihood(x[:0], token[:0]).shape == (0,)


def test_no_output_depends_on_later_tokens() -> None:
    for kind in KINDS:
        lm = MambaLM(theirs_of(kind).config.to_dict()).eval()
        ids, other = tokens(), tokens()
        other[:, 11:] = (other[:, 11:] + 1) % 40
        with torch.no_grad():
            assert lm(ids)[:, :11].equal(lm(other)[:, :11])


# Folders that cannot be used


def pickle_only(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return "pytorch_model.bin, and reading such a file can run code"


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no model.safetensors"


def broken(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors: not readable .*; fetch the file again"


def a_tensor_is_absent(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.layers.1.mixer.A_log"]
    save_file(tensors, folder / "model.safetensors")
    return "its weights lack backbone.layers.1.mixer.A_log"


def a_tensor_is_unknown(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.7.mixer.D"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    return "have backbone.layers.7.mixer.D, which a MambaForCausalLM does not have"


def changed(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def another_shape(folder: Path) -> str:
    changed(vocab_size=41)(folder)
    return r"embeddings.weight is \(40, 24\) and its config.json says \(41, 24\)"


def another_family(folder: Path) -> str:
    changed(model_type="gpt2")(folder)
    return "model_type is 'gpt2'; give a language model of mamba or mamba2"


def another_activation(folder: Path) -> str:
    changed(hidden_act="gelu")(folder)
    return "hidden_act is 'gelu'; only silu"


def text_for_a_number(folder: Path) -> str:
    changed(num_hidden_layers="many")(folder)
    return "num_hidden_layers is 'many'; expected a whole number"


def a_shard_is_outside(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"backbone.norm_f.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "outside the folder"


def a_shard_is_absent(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"backbone.norm_f.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "no model-1.safetensors, which its index names"


@pytest.mark.parametrize(
    "fault",
    [
        pickle_only, no_weights, broken, a_tensor_is_absent, a_tensor_is_unknown, another_shape, another_family,
        another_activation, text_for_a_number, a_shard_is_outside, a_shard_is_absent,
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_one_line(
    fault: Callable[[Path], str], tmp_path: Path
) -> None:
    theirs_of("mamba").save_pretrained(tmp_path / "in")
    message = fault(tmp_path / "in")
    with pytest.raises(UserError, match=message) as caught:
        MambaLM.load(tmp_path / "in")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 48}, "d_intermediate"),
        ({"rms_norm": False}, "rms_norm"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer"),
    ],
)
def test_another_model_of_mamba_ssm_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    original("mamba", tmp_path / "in", **config)
    with pytest.raises(UserError, match=f"config.json: {message} is not that of a Mamba"):
        MambaLM.load(tmp_path / "in")


def test_limits_of_the_step_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="time_step_limit"):
        MambaLM(theirs_of("mamba2", time_step_limit=(0.0, 0.1)).config.to_dict())
