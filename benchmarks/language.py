"""Measure transformers' Mamba and Mamba-2 language models with and without our kernels, side by side in one run.

    python benchmarks/language.py                   # two layers, d_model 768, 512 tokens, one thread
    python benchmarks/language.py --only mamba2 --layers 4 --json language.json

Both sides are one model of transformers with random weights: its own slow path, then the same after
``recsys_ssm.ops.use_in_transformers()``. "difference" is the largest one of the logits (forward), or the largest
relative one of a parameter's gradient (forward and backward). The errors are root mean squares of the logits'
differences from the same model in float64. The vocabulary is small by default, because the product with it costs the
same on both sides; ``--vocabulary 50280`` is that of the published weights. The slow backward pass of Mamba keeps and
copies the states of all tokens: about 1 GiB and half a minute a layer.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from timing import let_threads_sleep, machine, table, take_turns, write_json
from torch import Tensor, nn

from recsys_ssm import ops


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rows = []
    for name, make in MODELS.items():
        if options.only in ("", name):
            rows += _run(name, make(options), options)
            print(f"\n{table(rows[-2:])}", flush=True)
    facts = {
        "machine": machine(),
        "backends": ops.describe_backends(),
        "transformers": transformers.__version__,
    }
    print(f"\n{table(rows)}\n\n{facts}")
    if options.json:
        write_json(options.json, {**facts, "rows": rows})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", choices=["", *MODELS])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60, help="approximate seconds a contender")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args()


def _mamba(options: argparse.Namespace) -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.d_model,
        num_hidden_layers=options.layers,
        use_cache=False,
    )
    return transformers.MambaForCausalLM(config)


def _mamba2(options: argparse.Namespace) -> nn.Module:
    config = transformers.Mamba2Config(
        vocab_size=options.vocabulary,
        hidden_size=options.d_model,
        num_hidden_layers=options.layers,
        num_heads=2 * options.d_model // 64,
        head_dim=64,
        n_groups=1,
        chunk_size=256,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return transformers.Mamba2ForCausalLM(config)


MODELS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {"mamba": _mamba, "mamba2": _mamba2}


def _run(name: str, model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model.train()
    ids = torch.randint(options.vocabulary, (options.batch, options.tokens))

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    def both() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
    rows = []
    for what, call, difference in (
        ("forward", forward, _logits_difference),
        ("forward and backward", both, _gradient_difference),
    ):
        found: dict[str, Any] = {}

        def slow(call: Callable[[], Any] = call, found: dict[str, Any] = found) -> None:
            ops.undo_in_transformers()
            found["slow"] = call()

        def ours(call: Callable[[], Any] = call, found: dict[str, Any] = found) -> None:
            ops.use_in_transformers()
            found["ours"] = call()

        times = take_turns({"slow": slow, "ours": ours}, options.repetitions, options.budget)
        ops.undo_in_transformers()
        rows.append(
            {
                "model": name,
                "layers": options.layers,
                "pass": what,
                "transformers ms": times["slow"].cpu,
                "with our kernels ms": times["ours"].cpu,
                "times as fast": times["slow"].cpu / times["ours"].cpu,
                "by wall time": times["slow"].wall / times["ours"].wall,
                "difference": difference(found["ours"], found["slow"]),
                "transformers error": _error(found["slow"], exact),
                "our error": _error(found["ours"], exact),
            }
        )
    return rows


def _logits_difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(
        ((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)).item() for n in theirs
    )


def _error(found: Tensor | dict[str, Tensor], exact: Tensor) -> float | None:
    """Return the root mean square of the logits' errors; gradients have none here."""
    if not isinstance(found, Tensor):
        return None
    return (found - exact).square().mean().sqrt().item()


if __name__ == "__main__":
    let_threads_sleep()
    main()
