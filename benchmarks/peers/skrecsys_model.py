"""Train skrecsys' Mamba4Rec on an exchange file: a target at every position, full softmax, a scan in Python.

    ~/.cache/recsys_ssm/peers/skrecsys/bin/python benchmarks/peers/skrecsys_model.py --data FILE --out FOLDER

It scores only the histories it was trained on, so only the validation is ranked.
"""

from __future__ import annotations

import numpy as np
import torch
from common import PLACES, Data, Run, arguments, clocks
from skrecsys.nn import Mamba4Rec


def main() -> None:
    args = arguments(__doc__, batch_size=64, n_layers=1, d_state=32)
    if args.batches:
        raise SystemExit(
            "skrecsys trains whole epochs only; give compare.py --users rather than --batches"
        )
    torch.set_num_threads(args.threads)
    data = Data.read(args.data)
    interactions = np.stack(data.before(2), axis=1)
    run = Run("skrecsys", args, ("skrecsys", "torch", "numpy"))

    def fit(epochs: int) -> tuple[Mamba4Rec, dict[str, float]]:
        model = Mamba4Rec(
            n_factors=args.d_model,
            n_blocks=args.n_layers,
            d_state=args.d_state,
            max_sequence_length=args.max_length,
            dropout=args.dropout,
            learning_rate=args.lr,
            max_iter=epochs,
            batch_size=args.batch_size,
            random_state=args.seed,
            n_jobs=args.threads,
            learning_rate_schedule="constant",
            early_stopping=False,
        )
        with clocks() as took:
            model.fit(interactions)
        return model, took

    # A fit also reads the data and encodes all users. A fit of 0 epochs measures that part.
    _, overhead = fit(0)
    model, took = fit(args.epochs)
    each = {clock: (took[clock] - overhead[clock]) / args.epochs for clock in took}
    for epoch, loss in enumerate(model.loss_curve_, 1):
        run.epoch(epoch, float(loss), each, 1)
    top = {}
    for name, filtered in (("all", False), ("unseen", True)):
        with clocks() as took:
            items, _ = model.recommend(
                np.arange(data.n_users), n_recommendations=PLACES, exclude_seen=filtered
            )
        top[name] = np.asarray(items)
        run.evaluations.append(
            {"epoch": args.epochs, "split": "val", "filter_seen": filtered, **took}
        )
    run.save("val", args.epochs, top)
    run.write()


if __name__ == "__main__":
    main()
