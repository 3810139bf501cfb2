"""Read mutated files and check that no row vanishes: ``python scripts/fuzz_files.py --n 3000``.

Each file begins as a small table of purchases (CSV, Parquet, JSON lines, ``.inter``, ``.dat`` or sequences), is
mutated, and is read as both kinds of datasets read it. Either the message is one line of at most 400 characters, or
``rows in the file = rows used + rows reported``. The rows in a text file are counted here by a parser of its own that
knows quotation; the rows used are those of the prepared histories.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError

Row = tuple[str, str, str, str]
NAMES = ("user_id", "item_id", "timestamp", "title")
LONGEST = 400


def rows_of(rng: random.Random, n: int) -> list[Row]:
    """Return purchases: user, item, time and a title that may need quotation."""
    titles = ["Track 8", "", "é ü", "Thing", "naïve", "x" * 30]
    return [
        (f"u{row % 11}", f"i{rng.randrange(9)}", str(1_600_000_000 + row), rng.choice(titles))
        for row in range(n)
    ]


def as_csv(rows: list[Row], separator: str = ",", header: bool = True) -> bytes:
    lines = [separator.join(NAMES)] if header else []
    lines += [separator.join(row) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def as_inter(rows: list[Row]) -> bytes:
    header = "user_id:token\titem_id:token\ttimestamp:float\ttitle:token_seq\n"
    return header.encode() + as_csv(rows, "\t", header=False)


def as_dat(rows: list[Row]) -> bytes:
    return ("\n".join("::".join((u, i, "5", t)) for u, i, t, _ in rows) + "\n").encode()


def as_json(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(dict(zip(NAMES, row, strict=True))).encode() + b"\n" for row in rows)


def as_sequences(rows: list[Row]) -> bytes:
    histories: dict[str, list[str]] = collections.defaultdict(list)
    for user, item, _, _ in rows:
        histories[user].append(item)
    return "".join(f"{user} {' '.join(items)}\n" for user, items in histories.items()).encode()


def as_parquet(rows: list[Row], path: Path) -> None:
    pl.DataFrame(rows, list(NAMES), orient="row").write_parquet(path)


# Mutations: from the content and the random numbers to the content


def at_line(content: bytes, rng: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    lines = content.split(b"\n")
    row = rng.randrange(len(lines))
    lines[row] = change(lines[row])
    return b"\n".join(lines)


def in_cell(content: bytes, rng: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    def changed(line: bytes) -> bytes:
        mark = next((m for m in (b"::", b"\t", b",", b";", b" ") if m in line), b",")
        cells = line.split(mark)
        # Half of the changes are in a column that is not read.
        number = rng.choice([rng.randrange(len(cells)), len(cells) - 1])
        cells[number] = change(cells[number])
        return mark.join(cells)

    return at_line(content, rng, changed)


def stray_quotes(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 2, 2, 2, 3, 4])):
        where = rng.random()
        content = in_cell(
            content,
            rng,
            lambda cell, where=where: (
                b'"' + cell
                if where < 0.4
                else cell + b'"'
                if where < 0.7
                else cell[:1] + b'"' + cell[1:]
            ),
        )
    return content


def quoted_cells(content: bytes, rng: random.Random) -> bytes:
    inner = rng.choice(
        [b"a, b", b'say ""hi""', b"two\nlines", b"three\nlines\nhere", b"", b"a;b\tc"]
    )
    for _ in range(rng.randrange(1, 4)):
        content = in_cell(content, rng, lambda _: b'"' + inner + b'"')
    return content


def quotes_of_both_kinds(content: bytes, rng: random.Random) -> bytes:
    return stray_quotes(quoted_cells(content, rng), rng)


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def nuls(content: bytes, rng: random.Random) -> bytes:
    where = rng.randrange(len(content))
    return content[:where] + b"\0" * rng.choice([1, 5, 4096]) + content[where:]


def garbage(content: bytes, rng: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


def byte_order_mark(content: bytes, rng: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + content


def line_ends(content: bytes, rng: random.Random) -> bytes:
    end = rng.choice([b"\r\n", b"\r", b"\n\n", b"\r\r\n"])
    if rng.random() < 0.5:
        return content.replace(b"\n", end)
    return at_line(content, rng, lambda line: line + end.removesuffix(b"\n"))


def blank_lines(content: bytes, rng: random.Random) -> bytes:
    return at_line(content, rng, lambda line: rng.choice([b"\n", b" \n", b"\n\n\n"]) + line)


def other_encodings(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(
        rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252"]), "replace"
    )


def huge_cells(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice([1000, 140_000, 1_000_000])
    quote = rng.choice([b"", b"", b'"'])
    return in_cell(content, rng, lambda cell: quote + cell + b"x" * size + quote)


def other_cells(content: bytes, rng: random.Random) -> bytes:
    cells = [b"", b"NA", b"nan", b"-inf", b"1e400", b"2020-01-01", b"\\N", b"12.0", b"12", b" "]
    cells += [b"99999999999999999999", b"{}", b"[1]", b"'", b"'a, b'", b"\xe2\x80\xa8", b"\xc2\x85"]
    for _ in range(rng.randrange(1, 4)):
        content = in_cell(content, rng, lambda _: rng.choice(cells))
    return content


def other_widths(content: bytes, rng: random.Random) -> bytes:
    return at_line(
        content, rng, lambda line: rng.choice([line + b",x", line[: len(line) // 2], line * 2])
    )


def headers_again(content: bytes, rng: random.Random) -> bytes:
    head = content.partition(b"\n")[0]
    return at_line(content, rng, lambda line: head + b"\n" + line)


def names_twice(content: bytes, rng: random.Random) -> bytes:
    return content.replace(b"title", rng.choice([b"user_id", b"item_id", b"", b"timestamp"]), 1)


def as_it_is(content: bytes, rng: random.Random) -> bytes:
    return content


MUTATIONS = (
    as_it_is,
    stray_quotes,
    stray_quotes,
    stray_quotes,
    quoted_cells,
    quotes_of_both_kinds,
    truncated,
    nuls,
    garbage,
    byte_order_mark,
    line_ends,
    blank_lines,
    other_encodings,
    huge_cells,
    other_cells,
    other_widths,
    headers_again,
    names_twice,
)
FORMATS = (
    "csv",
    "tsv",
    "semicolon",
    "inter",
    "dat",
    "json",
    "sequences",
    "parquet",
    "gzip",
    "zstd",
)
STEMS = ("x", "a?", "data[12]", "*", "sp ace", "é", "a{b,c}", "[", "x\\y", "#", "100%", "x=1,y")


def make(folder: Path, rng: random.Random) -> tuple[str, str, Path, dict[str, Any]]:
    """Write a mutated file; return its format, the mutation, its path and the options to read it."""
    form, mutation = rng.choice(FORMATS), rng.choice(MUTATIONS)
    rows = rows_of(rng, rng.choice([40, 60, 400]))
    stem = rng.choice(STEMS) if rng.random() < 0.5 else "x"
    place = folder / (stem if rng.random() < 0.2 else "folder")
    place.mkdir(exist_ok=True)
    options: dict[str, Any] = {}
    if form == "parquet":
        path = place / f"{stem}.parquet"
        as_parquet(rows, path)
        content = path.read_bytes()
        if rng.random() < 0.5:
            mutation = as_it_is
    else:
        suffix = {"semicolon": "csv", "sequences": "txt", "gzip": "csv.gz", "zstd": "csv.zst"}
        path = place / f"{stem}.{suffix.get(form, form)}"
        content = {
            "csv": lambda: as_csv(rows),
            "gzip": lambda: as_csv(rows),
            "zstd": lambda: as_csv(rows),
            "tsv": lambda: as_csv(rows, "\t"),
            "semicolon": lambda: as_csv(rows, ";"),
            "inter": lambda: as_inter(rows),
            "dat": lambda: as_dat(rows),
            "json": lambda: as_json(rows),
            "sequences": lambda: as_sequences(rows),
        }[form]()
        if form == "semicolon":
            options["separator"] = ";"
    content = mutation(content, rng)
    if form == "gzip":
        content = gzip.compress(content)
        content = content if rng.random() < 0.8 else content[: rng.randrange(len(content))]
    if form == "zstd":
        content = zstd(content)
    if stem != "x" and rng.random() < 0.5:  # files that a pattern would find
        (place / f"a1{path.suffix}").write_bytes(as_csv(rows_of(rng, 7)))
        for near in ("data1", "data2"):
            (folder / near).mkdir(exist_ok=True)
            (folder / near / path.name).write_bytes(content)
    path.write_bytes(content)
    return form, mutation.__name__, path, options


def zstd(content: bytes) -> bytes:
    """Return a zstd frame that holds the content uncompressed."""
    size = len(content)
    frame = b"\x28\xb5\x2f\xfd" + bytes([0xA0]) + size.to_bytes(4, "little")
    for start in range(0, max(size, 1), 1 << 16):
        block = content[start : start + (1 << 16)]
        last = start + (1 << 16) >= size
        frame += (len(block) << 3 | last).to_bytes(3, "little") + block
    return frame


# The count of rows, by another way than the package's


def count_rows(form: str, path: Path) -> list[int]:
    """Return the numbers of rows that a file may have: line by line, and with quotation."""
    if form == "parquet":
        return [pl.read_parquet(path.read_bytes(), columns=list(NAMES[:3])).height]
    content = path.read_bytes()
    if form == "gzip":
        content = gzip.decompress(content)
    if form == "zstd":
        content = (
            pl.scan_lines(path, name="x", glob=False).collect()["x"].str.join("\n")[0].encode()
            + b"\n"
        )
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    if form == "sequences":
        return [sum(max(0, len(line.decode("utf-8").split()) - 1) for line in lines)]
    if form == "json":
        return [sum(1 for line in lines if line.strip())]
    if form == "dat":
        return [len(lines), len(lines) - 1]
    while lines and not lines[0].strip(b"\r"):
        lines.pop(0)
    by_line = len(lines) - 1
    if form == "inter":
        return [by_line]
    return [by_line, quoted_rows(b"\n".join(lines)) - 1]


def quoted_rows(content: bytes) -> int:
    """Count records where a quotation mark at the beginning of a cell opens it, up to the next single one."""
    rows, inside, start = 1, False, True
    place = 0
    while place < len(content):
        byte = content[place : place + 1]
        if inside:
            if byte == b'"':
                if content[place + 1 : place + 2] == b'"':
                    place += 1
                else:
                    inside = False
        elif byte == b'"' and start:
            inside = True
        elif byte == b"\n":
            rows += 1
        start = not inside and byte in (b",", b";", b"\t", b"\n")
        place += 1
    return rows


def reported(notes: list[str]) -> int:
    """Return the number of rows that notes report as left out."""
    n = 0
    for note in notes:
        for pattern in (
            r"([\d,]+) rows repeat the header line",
            r"([\d,]+) rows are blank in every column",
            r"([\d,]+) rows repeat the user, item and timestamp",
            r"([\d,]+) rows with an empty list",
            r"([\d,]+) of [\d,]+ rows are left out",
            r"([\d,]+) rows repeat a \(user, item\) pair",
        ):
            n += sum(int(found.replace(",", "")) for found in re.findall(pattern, note))
    return n


def check(form: str, path: Path, options: dict[str, Any], kind: str) -> str:
    """Read a file as a dataset; return what came of it, ``read …``, ``refused`` or a failure."""
    try:
        if kind == "interactions":
            data = Interactions(interactions=path, **options)
            splits: Any = data.splits
            used = splits.histories.events.size
        else:
            separator = options.get("separator")
            data = TableData(interactions=path, timestamp="timestamp", separator=separator)  # type: ignore[assignment]
            splits = data.splits
            (pairs,) = re.findall(r"of ([\d,]+) pairs are trained on", " ".join(splits.notes))
            used = int(pairs.replace(",", ""))
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > LONGEST:
            return f"FAIL: a message of {len(text)} characters: {text[:200]!r}"
        if "rows are in the file, but" in text:
            return "refused by the count of rows"
        return "refused"
    except Exception as error:  # what the check is for
        return f"FAIL: {type(error).__name__}: {str(error)[:200]}"
    total = used + reported(splits.notes)
    if any(len(note) > LONGEST for note in splits.notes):
        return f"FAIL: a note of more than {LONGEST} characters"
    rows = count_rows(form, path)
    if total not in rows:
        return f"FAIL: rows in the file {rows}, used and reported {total}: {splits.notes}"
    by_line = rows[0]
    if (
        total != by_line
        and not any("several lines" in note for note in splits.notes)
        and form != "dat"
    ):
        return f"FAIL: {by_line} lines are {total} rows, and no note says so: {splits.notes}"
    return (
        "read, with notes on marks" if any("quotation" in note for note in splits.notes) else "read"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=3000, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to keep files in whose check fails")
    arguments = parser.parse_args()
    warnings.simplefilter(
        "error", pl.exceptions.PolarsWarning if hasattr(pl.exceptions, "PolarsWarning") else Warning
    )
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.n):
            rng = random.Random(f"{arguments.seed} {number}")
            folder = Path(scratch) / str(number)
            folder.mkdir()
            os.environ["RECSYS_SSM_CACHE"] = str(folder / "cache")
            form, mutation, path, options = make(folder, rng)
            kinds = ["interactions"] + (["table"] if form not in ("dat", "sequences") else [])
            for kind in kinds:
                outcome = check(form, path, options, kind)
                if outcome.startswith("FAIL"):
                    failures += 1
                    print(
                        f"file {number} ({form}, {mutation}, {path.name}, {kind}): {outcome}",
                        file=sys.stderr,
                    )
                    if arguments.keep:
                        arguments.keep.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, arguments.keep / f"{number}-{path.name}")
                    outcome = "FAIL"
                found[mutation, outcome] += 1
            shutil.rmtree(folder)
    outcomes = sorted({outcome for _, outcome in found})
    print(f"{'mutation':22}" + "".join(f"{outcome:>30}" for outcome in outcomes))
    for mutation in sorted({mutation for mutation, _ in found}):
        print(
            f"{mutation:22}" + "".join(f"{found[mutation, outcome]:>30,}" for outcome in outcomes)
        )
    print(f"{arguments.n:,} files, {found.total():,} readings, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
