"""Make the two tables that ``dataset=spotify`` ships with.

    python scripts/make_spotify_tables.py --source data/spotify

The source is a folder of 20 genre playlists ``<genre>.csv`` and the Top 50 ``top50.csv``. Each row is a song:
Spotify's track id and ten attributes, scaled into [0, 1]. This is the data of the environment in Dereventsov, Starnes
and Webster, arXiv:2211.11869. The script writes

- ``spotify_genres.csv`` (20 rows): the mean of each attribute over a genre's songs, by name;
- ``spotify_songs.csv`` (50 rows): the songs of "Top 50 - Global" by rank, unchanged.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import polars as pl

from recsys_ssm.data.files import read_table
from recsys_ssm.data.spotify import ASSETS, ATTRIBUTES, GENRES_FILE, SONGS_FILE
from recsys_ssm.features import numeric_column

TOP50 = "top50"


def make_tables(source: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the genre means (``genre``, attributes) and the songs (``rank``, ``id``, attributes)."""
    genres = sorted(path.stem for path in source.glob("*.csv") if path.stem != TOP50)
    means = [_attributes(source / f"{genre}.csv").mean() for genre in genres]
    top50 = read_table(source / f"{TOP50}.csv", columns=["id"])
    songs = _attributes(source / f"{TOP50}.csv")
    ranks = pl.Series("rank", range(1, songs.height + 1))
    return (
        pl.concat(means).insert_column(0, pl.Series("genre", genres)),
        songs.insert_column(0, ranks).insert_column(1, top50["id"]),
    )


def _attributes(path: Path) -> pl.DataFrame:
    table = read_table(path, columns=ATTRIBUTES)
    return pl.DataFrame({name: numeric_column(table, name, str(path)) for name in ATTRIBUTES})


def main() -> None:
    default = Path(os.environ.get("RECSYS_SSM_DATA", "data")) / "spotify"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=default, help="folder of the 21 playlists")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, table in zip((GENRES_FILE, SONGS_FILE), make_tables(arguments.source), strict=True):
        beside = arguments.out / f"{name}.part"
        table.write_csv(beside)
        beside.replace(arguments.out / name)
        print(f"{arguments.out / name}: {table.height} rows, {table.width} columns")


if __name__ == "__main__":
    main()
