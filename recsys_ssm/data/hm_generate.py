"""Generate data like H&M's: the three official files, from measured aggregates and a known rule.

P(article | customer) ∝ weight_a · exp(strength · x_u · b_a), where x_u are traits computed from the customer's features
and b_a are the traits an article appeals to. The weights are fitted so that the articles are as popular as in the real
files. Since the rule is known, the best possible ranking (the oracle) is known too.

The aggregates (``assets/hm_marginals.json``) were measured on a slice of the real files by
``scripts/measure_hm_marginals.py``: shares, histograms, counts of counts; they contain no row.

Legend: U customers, A articles, K traits, P profiles (distinct rows of traits).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys_ssm.errors import UserError

SETTINGS_FILE = "generator.json"
"""Name of the file beside generated CSV files with the settings they were made from; real data has none."""

_CELLS = 1 << 24
"""Probabilities of profiles and articles in memory at once, about."""
_ROWS = 1 << 20
"""Transactions to write at once, about."""

# Version of the rule, part of the fingerprint: files of another rule are not read.
_VERSION = 1

_FIRST_DAY, _DAYS = date(2018, 9, 20), 734  # the dates of the official files

# An article's appeal comes from its index group, its type (name, product group) and itself.
_INDEX_GROUPS = ("Women", "Men", "Young", "Children", "Sport")
_TYPES = (
    ("T-shirt", "Tops"),
    ("Sweater", "Tops"),
    ("Blouse", "Tops"),
    ("Trousers", "Bottoms"),
    ("Skirt", "Bottoms"),
    ("Dress", "Full body"),
    ("Jacket", "Outerwear"),
    ("Socks", "Accessories"),
)
_COLOURS = ("Black", "White", "Blue", "Red", "Green", "Beige", "Pink")
_PATTERNS = ("Solid", "Stripe", "Dotted", "Print")


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """Size and rule of the generated data.

    Args:
        n_customers: Rows of ``customers.csv``.
        n_articles: Rows of ``articles.csv``.
        n_transactions: Rows of ``transactions_train.csv``.
        feature_strength: Influence of a customer's features on purchases; 0: popularity alone decides.
        seed: Seed of the files.

    Raises:
        UserError: A value is out of range.
    """

    n_customers: int = 40_000
    n_articles: int = 2_000
    n_transactions: int = 400_000
    feature_strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in {
            "n_customers": 1,
            "n_articles": 1,
            "n_transactions": 1,
            "feature_strength": 0,
            "seed": 0,
        }.items():
            if not least <= (value := getattr(self, option)) < math.inf:
                raise UserError(f"dataset.generator.{option}={value}: give at least {least}")

    @property
    def fingerprint(self) -> str:
        """Hash of the settings, the version of the rule and the aggregates; part of the folder's name."""
        text = json.dumps([_VERSION, asdict(self), _marginals()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _marginals() -> dict[str, Any]:
    path = Path(__file__).parent / "assets" / "hm_marginals.json"
    marginals: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return marginals


class Shop:
    """Customers, articles and purchases, determined by the settings."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self.settings = settings
        self.articles, self._appeal_AK = _make_articles(settings)
        self.customers = _make_customers(settings)
        self._row_of = {article: row for row, article in enumerate(self.articles["article_id"])}
        traits_UK = traits(self.customers)
        self._traits_PK, self._profile_U, size_P = np.unique(
            traits_UK, axis=0, return_inverse=True, return_counts=True
        )
        self._log_weight_A = self._fit_weights(size_P / size_P.sum())

    def log_probability(self, customers: pl.DataFrame, article_ids: Sequence[str]) -> np.ndarray:
        """Return the logarithm of P(article | customer), the oracle's scores.

        Args:
            customers: The feature columns of ``customers.csv``; null is unknown.
            article_ids: Ids of the articles, as in ``articles.csv``.

        Returns:
            (len(customers), len(article_ids)) float32.
        """
        # Many customers share a profile: normalise over all articles once a profile.
        traits_PK, profile = np.unique(traits(customers), axis=0, return_inverse=True)
        log_p_PA = self._log_probability(traits_PK)
        columns = [self._row_of[article] for article in article_ids]
        return log_p_PA[:, columns].astype(np.float32)[profile]

    def purchases(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the customer row and the article row of each transaction, two (n_transactions,) arrays."""
        rng = _stream(self.settings, "purchases")
        shape = _marginals()["purchases_cv"] ** -2
        activity = rng.gamma(shape, size=self.settings.n_customers)
        count_U = rng.multinomial(self.settings.n_transactions, activity / activity.sum())
        customer = np.repeat(np.arange(self.settings.n_customers), count_U)
        profile = self._profile_U[customer]
        order = np.argsort(profile, kind="stable")
        bounds = np.searchsorted(profile[order], np.arange(len(self._traits_PK) + 1))
        draw = rng.random(customer.size)
        article = np.empty(customer.size, dtype=np.int64)
        at_once = max(1, _CELLS // self.settings.n_articles)
        for first in range(0, len(self._traits_PK), at_once):
            block = slice(first, first + at_once)
            cumulative_PA = np.exp(self._log_probability(self._traits_PK[block])).cumsum(axis=1)
            edges = pairwise(bounds[first : first + len(cumulative_PA) + 1])
            for cumulative_A, (start, stop) in zip(cumulative_PA, edges, strict=True):
                rows = order[start:stop]
                article[rows] = np.searchsorted(cumulative_A[:-1], draw[rows] * cumulative_A[-1])
        return customer, article

    def _log_probability(self, traits_PK: np.ndarray) -> np.ndarray:
        logit_PA = self._affinity(traits_PK) + self._log_weight_A
        logit_PA -= logit_PA.max(axis=1, keepdims=True)
        return logit_PA - np.log(np.exp(logit_PA).sum(axis=1, keepdims=True))

    def _affinity(self, traits_PK: np.ndarray) -> np.ndarray:
        return self.settings.feature_strength * traits_PK @ self._appeal_AK.T

    def _fit_weights(self, share_P: np.ndarray) -> np.ndarray:
        """Fit log weights (A,) by iterative scaling, so that each article has its measured share of purchases."""
        times, articles = np.array(_marginals()["article_sales"]).T
        quantile_A = (np.arange(self.settings.n_articles) + 0.5) / self.settings.n_articles
        sold_A = times[np.searchsorted(articles.cumsum() / articles.sum(), quantile_A)]
        target_A = _stream(self.settings, "popularity").permutation(sold_A / sold_A.sum())
        odds_PA = self._affinity(self._traits_PK)
        np.exp(odds_PA, out=odds_PA)
        weight_A = target_A
        for _ in range(50):
            share_A = weight_A * (odds_PA.T @ (share_P / (odds_PA @ weight_A)))
            weight_A = weight_A * target_A / share_A
        return np.log(weight_A)


def traits(customers: pl.DataFrame) -> np.ndarray:
    """Return the traits that purchases depend on, (U, 7) float64, each of about unit scale.

    They are: age and its square, news by post (FN), activity without news, news read regularly, club membership begun,
    age unknown. An unknown customer has an empty cell in every column.
    """
    age = customers["age"].cast(pl.Float64)
    z = ((age - 36.0) / 14.0).clip(-2.0, 2.5)
    fn, active = (customers[name].cast(pl.Float64).fill_null(0.0) for name in ("FN", "Active"))
    columns = (
        z.fill_null(0.0),
        (z**2 - 1.0).fill_null(0.0) / 1.5,
        fn,
        active - fn,
        (customers["fashion_news_frequency"] == "Regularly").fill_null(value=False),
        (customers["club_member_status"] == "PRE-CREATE").fill_null(value=False),
        age.is_null(),
    )
    return np.column_stack([column.cast(pl.Float64).to_numpy() for column in columns])


def settings_of(root: Path) -> GeneratorSettings | None:
    """Return the settings that the files in ``root`` were generated by; None if they are not generated.

    Raises:
        UserError: The settings beside the files are damaged or of another version.
    """
    path = root / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        settings = GeneratorSettings(**plain["settings"])
        current = plain["fingerprint"] == settings.fingerprint
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); delete the folder {root}") from error
    if not current:
        raise UserError(f"{path}: made by another version; delete the folder {root}")
    return settings


def generate(settings: GeneratorSettings, root: Path) -> Path:
    """Generate the files in a folder under ``root``, unless they exist, and return the folder.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = root / f"hm-{settings.fingerprint}"
    if folder.is_dir():
        return folder
    unfinished = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=root, prefix=".hm-"))
        _write(Shop(settings), unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run has just written the same files
                raise
        return folder
    except OSError as error:
        raise UserError(
            f"{root}: the generated H&M files cannot be written there ({error.strerror or error}); "
            "name another folder with dataset.generated_root="
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(shop: Shop, folder: Path) -> None:
    shop.articles.write_csv(folder / "articles.csv")
    shop.customers.write_csv(folder / "customers.csv")
    customer, article = shop.purchases()
    rng = _stream(shop.settings, "transactions")
    price_A = np.interp(
        rng.random(shop.settings.n_articles), np.linspace(0, 1, 11), _marginals()["price_deciles"]
    )
    days = pl.Series([_FIRST_DAY + timedelta(days=d) for d in range(_DAYS)])
    day = rng.integers(_DAYS, size=customer.size).astype(np.int16)
    online = rng.random(customer.size) < _marginals()["online_share"]
    by_day = np.argsort(day, kind="stable") if day.size > _ROWS else np.arange(day.size)
    with (folder / "transactions_train.csv").open("wb") as file:
        # The first column to sort by is the day, so blocks of days can be sorted one by one.
        for start, stop in _blocks_of(np.bincount(day, minlength=_DAYS), _ROWS):
            rows = by_day[start:stop]
            pl.DataFrame(
                {
                    "t_dat": days.gather(day[rows]),
                    "customer_id": shop.customers["customer_id"].gather(customer[rows]),
                    "article_id": shop.articles["article_id"].gather(article[rows]),
                    "price": price_A[article[rows]],
                    "sales_channel_id": 1 + online[rows],
                }
            ).sort("t_dat", "customer_id", "article_id").write_csv(file, include_header=start == 0)
    made_by = {"fingerprint": shop.settings.fingerprint, "settings": asdict(shop.settings)}
    (folder / SETTINGS_FILE).write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")


def _blocks_of(sizes: np.ndarray, at_least: int) -> Iterator[tuple[int, int]]:
    """Join consecutive groups of these sizes to blocks of ``at_least`` rows, and yield first row and end of each."""
    start = stop = 0
    for size in sizes.tolist():
        stop += size
        if stop - start >= at_least:
            yield start, stop
            start = stop
    if stop > start:
        yield start, stop


def _make_customers(settings: GeneratorSettings) -> pl.DataFrame:
    """Make the official columns; shares are filled by quota, so they hold at any size and seed."""
    rng = _stream(settings, "customers")
    marginals, n = _marginals(), settings.n_customers
    profiles = marginals["profiles"]
    profile_U = rng.permutation(_quota([row[-1] for row in profiles], n))
    unknown = marginals["age_missing"] * marginals["customers"]
    ages = [None, *(age for age, _ in marginals["ages"])]
    age_U = rng.permutation(_quota([unknown, *(count for _, count in marginals["ages"])], n))
    columns = {
        name: pl.Series([row[j] for row in profiles], dtype=pl.String).gather(profile_U)
        for j, name in enumerate(marginals["profile_columns"])
    }
    areas = _hex_ids(rng, -(-n // 4))
    return pl.DataFrame(
        {
            "customer_id": _hex_ids(rng, n),
            **columns,
            "age": pl.Series(ages, dtype=pl.Float64).gather(age_U),
            "postal_code": pl.Series(areas).gather(rng.integers(len(areas), size=n)),
        }
    )


def _make_articles(settings: GeneratorSettings) -> tuple[pl.DataFrame, np.ndarray]:
    """Make the official columns, and the traits each article appeals to, (A, K)."""
    rng = _stream(settings, "articles")
    n = settings.n_articles
    product = np.sort(rng.choice(np.arange(100_000, 1_000_000), size=-(-n // 2), replace=False))
    codes = np.repeat(product, 2)[:n]  # two variants a product
    group = np.repeat(rng.integers(len(_INDEX_GROUPS), size=product.size), 2)[:n]
    kind = np.repeat(rng.integers(len(_TYPES), size=product.size), 2)[:n]
    colour, pattern = rng.integers(len(_COLOURS), size=n), rng.integers(len(_PATTERNS), size=n)
    n_traits = 7
    appeal_AK = (
        0.5 * rng.standard_normal((len(_INDEX_GROUPS), n_traits))[group]
        + 0.5 * rng.standard_normal((len(_TYPES), n_traits))[kind]
        + 0.5 * rng.standard_normal((n, n_traits))
    )

    def names(values: Sequence[str], index: np.ndarray) -> pl.Series:
        return pl.Series(values).gather(index)

    types, type_groups = zip(*_TYPES, strict=True)
    type_names, group_names = names(types, kind), names(_INDEX_GROUPS, group)
    colour_names, pattern_names = names(_COLOURS, colour), names(_PATTERNS, pattern)
    section = names([f"{g} {t}" for g in _INDEX_GROUPS for t in types], group * len(types) + kind)
    frame = pl.DataFrame(
        {
            "article_id": [f"0{code}{1 + i % 2:03d}" for i, code in enumerate(codes)],
            "product_code": [f"0{code}" for code in codes],
            "prod_name": section,
            "product_type_no": 100 + kind,
            "product_type_name": type_names,
            "product_group_name": names(type_groups, kind),
            "graphical_appearance_no": 1_010_001 + pattern,
            "graphical_appearance_name": pattern_names,
            "colour_group_code": 1 + colour,
            "colour_group_name": colour_names,
            "perceived_colour_value_id": 1 + colour,
            "perceived_colour_value_name": colour_names,
            "perceived_colour_master_id": 1 + colour,
            "perceived_colour_master_name": colour_names,
            "department_no": 1_000 + group * len(types) + kind,
            "department_name": section,
            "index_code": names(tuple("ABCDE"), group),
            "index_name": group_names,
            "index_group_no": 1 + group,
            "index_group_name": group_names,
            "section_no": 1 + group * len(types) + kind,
            "section_name": section,
            "garment_group_no": 1_001 + kind,
            "garment_group_name": type_names,
            "detail_desc": colour_names + " " + pattern_names + " " + type_names,
        }
    )
    return frame, appeal_AK


def _stream(settings: GeneratorSettings, part: str) -> np.random.Generator:
    """Return the random numbers of one part, so that more customers do not change the articles."""
    return np.random.default_rng([settings.seed, *part.encode()])


def _quota(weights: Sequence[float], n: int) -> np.ndarray:
    """Return n categories in proportion to ``weights``, sorted; the largest remainders fill up."""
    exact = np.asarray(weights, dtype=float) * n / sum(weights)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: n - counts.sum()]] += 1
    return np.repeat(np.arange(len(counts)), counts)


def _hex_ids(rng: np.random.Generator, n: int) -> list[str]:
    text = rng.bytes(32 * n).hex()
    return [text[i : i + 64] for i in range(0, 64 * n, 64)]
