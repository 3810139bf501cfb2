"""Measure the properties that generated H&M data reproduces; write ``data/assets/hm_marginals.json``.

Only aggregates leave this script (shares, quantiles, counts of counts). The output holds no row of the files.

    python scripts/measure_hm_marginals.py data/hm
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

PROFILE = ("FN", "Active", "club_member_status", "fashion_news_frequency")


def gini(counts: np.ndarray) -> float:
    """Return the Gini coefficient of non-negative counts: 0 if all are equal, near 1 if one has all."""
    ordered = np.sort(counts)
    n = ordered.size
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def histogram(values: np.ndarray) -> list[list[int]]:
    """Return pairs [value, number of occurrences], by value."""
    return np.column_stack(np.unique(values, return_counts=True)).tolist()


def measure(root: Path) -> dict[str, Any]:
    """Return the aggregates of the official files in ``root``."""
    customers = pl.read_csv(root / "customers.csv", infer_schema=False)
    transactions = pl.read_csv(root / "transactions_train.csv", infer_schema=False)
    profiles = customers.group_by(PROFILE).len("n").sort("n", *PROFILE, descending=True)
    age = customers["age"].cast(pl.Float64)
    sales = transactions.group_by("article_id").len("n")["n"].to_numpy().astype(np.int64)
    bought = transactions.group_by("customer_id").len("n")["n"].to_numpy().astype(np.int64)
    price = transactions["price"].cast(pl.Float64).to_numpy()
    return {
        "customers": customers.height,
        "transactions": transactions.height,
        # How many customers have each combination; null is an empty cell.
        "profile_columns": list(PROFILE),
        "profiles": [list(row) for row in profiles.iter_rows()],
        "age_missing": age.null_count() / customers.height,
        # [age in years, customers of that age].
        "ages": histogram(age.drop_nulls().cast(pl.Int64).to_numpy()),
        # [times sold, articles sold that often]: the whole popularity distribution.
        "article_sales": histogram(sales),
        "gini_articles_sold": gini(sales),
        "gini_top_100": gini(np.sort(sales)[-100:]),
        # Coefficient of variation of purchases a customer: how unequally active customers are.
        "purchases_cv": float(bought.std() / bought.mean()),
        "online_share": float((transactions["sales_channel_id"] == "2").mean()),
        "price_deciles": [float(p) for p in np.percentile(price, range(0, 101, 10))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root", type=Path, help="folder of customers.csv and transactions_train.csv"
    )
    target = Path(__file__).parents[1] / "recsys_ssm" / "data" / "assets" / "hm_marginals.json"
    parser.add_argument("--out", type=Path, default=target)
    arguments = parser.parse_args()
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in measure(arguments.root).items()]
    arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
