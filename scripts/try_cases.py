"""Run the commands of a folder of cases, inputs that once went wrong, and print what came out of each as a table."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tries import Answer, call, inside

QUICK = (
    "dataset=interactions",
    "backbone=mamba",
    "logger=none",
    "trainer.enable_progress_bar=false",
)
ONE = (*QUICK, "trainer.max_epochs=1")
TABLE = ("dataset=table", "backbone=mamba", "logger=none", "trainer.max_steps=5")


def train(*options: str) -> Answer:
    return call("train", *options)


def says(answer: Answer, *parts: str, code: int = 0) -> tuple[bool, str]:
    """Return whether an answer has an exit code and texts, and its line that matters."""
    text = answer.out + answer.err
    lines = [line for line in text.splitlines() if any(part in line for part in parts)]
    right = answer.code == code and all(part in text for part in parts) and "Traceback" not in text
    shown = lines or text.strip().splitlines()[-1:]
    return right, f"exit {answer.code}: {' / '.join(shown)}"


def read(file: str, *options: str) -> Answer:
    return train(*ONE, f"dataset.interactions={file}", *options)


def metrics() -> dict[str, float]:
    [path] = Path().glob("runs/*/*/metrics.json")
    found: dict[str, float] = json.loads(path.read_text())
    return found


def replaced() -> tuple[bool, str]:
    shutil.copy("monday.csv", "clicks.csv")
    train(*ONE, "dataset.interactions=clicks.csv")
    shutil.copy("tuesday.csv", "clicks.csv")
    answer = read("clicks.csv", "ckpt_path=last", "trainer.max_epochs=2")
    return says(answer, "items and split are not those of the training", code=1)


def other_split() -> tuple[bool, str]:
    names = (
        "dataset.name=mem",
        "dataset.interactions=orders.csv",
        "dataset.user=customer",
        "dataset.item=product",
    )
    train("dataset=table", *names, "backbone=identity", "logger=none", "trainer.max_steps=5")
    answer = call("evaluate", "run=last", "dataset.seed=7")
    return says(answer, "rows that were trained on would be tested", code=1)


def repeat_last() -> tuple[bool, str]:
    answer = read("plays.csv")
    found = metrics()
    text = json.dumps(found.get("baselines"))
    values = re.findall(r'"repeat_last_unfiltered": {[^}]*"hr@10": ([\d.]+)', text)
    values = values or re.findall(r'"hr@10": ([\d.]+)', text)
    return answer.code == 0 and any(
        0.7 < float(v) < 0.76 for v in values
    ), f"hr@10 of baselines {values}"


def monitor() -> tuple[bool, str]:
    answer = read("base.csv", "monitor=val/loss", "trainer.max_epochs=3")
    [config] = Path().glob("runs/*/*/config.yaml")
    found = "monitor_mode: min" in config.read_text()
    return answer.code == 0 and found, "monitor_mode " + ("min" if found else "max")


def changed_option(first: str, then: str, option: str) -> Callable[[], tuple[bool, str]]:
    def run() -> tuple[bool, str]:
        read("base.csv", first)
        answer = read("base.csv", then, "ckpt_path=last", "trainer.max_epochs=2")
        return says(answer, option, "a resumed run keeps that", code=1)

    return run


def changed_sweep() -> tuple[bool, str]:
    options = ("--multirun", "sweep=daily", *ONE, "dataset.interactions=clicks.csv")
    shutil.copy("clicks_1.csv", "clicks.csv")
    train(*options, "seed=range(1)")
    shutil.copy("clicks_2.csv", "clicks.csv")
    return says(train(*options, "seed=range(2)"), "has changed since", code=1)


def flat_list() -> tuple[bool, str]:
    """Run api.py: every wrong call is one clear message, every right one an answer."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path("api.py")
        message = "no error"
    except ValueError as error:
        message = f"{type(error).__name__}: {error}"
    return "UserError: history 0 is '12': expected a list" in message, message


def frames() -> tuple[bool, str]:
    import pandas as pd

    from recsys_ssm.data.interactions import Interactions
    from recsys_ssm.models.next_item import NextItem

    data = Interactions(interactions=pd.read_csv("num.csv"))
    backbone = {"_target_": "recsys_ssm.models.backbones.mamba.Mamba"}
    model = NextItem.for_data(data, backbone=backbone)
    rows = model.recommend([["12", "3"]], k=2).height, model.recommend([], k=2).height
    return rows == (2, 0) and len(data.splits.item_ids) == 30, f"{rows} rows, 30 items"


def separators() -> tuple[bool, str]:
    names = "dataset.names=[user_id,item_id,rating,timestamp]"
    items = (
        "dataset.items=products.csv",
        "dataset.items_id=itemId",
        "dataset.item_numeric=[pricelog2]",
    )
    return says(
        read("u.data", names, *items, "dataset.items_separator=';'"), "475 rows, 60 users, 30 items"
    )


def equals_in_a_path() -> tuple[bool, str]:
    return says(
        read("date=2024-05-01/clicks.csv"), "date=2024-05-01/clicks.csv: no such file", code=1
    )


CASES: dict[str, list[tuple[str, Callable[[], tuple[bool, str]]]]] = {
    "01": [
        ("475 rows", lambda: says(read("plays2.csv"), "475 rows")),
        ("475 rows", lambda: says(train(*TABLE, "dataset.interactions=plays2.csv"), "475 rows")),
        ("475 rows", lambda: says(read("b_open.tsv", "dataset.names=[user,time,artist_id,artist]",
            "dataset.user=user", "dataset.item=artist_id", "dataset.timestamp=time"), "475 rows")),
    ],
    "02": [
        ("30 items", lambda: says(read("checkins.txt", "dataset.names=[user,time,lat,lon,place]",
            "dataset.user=user", "dataset.item=place", "dataset.timestamp=time"), "30 items")),
        ("30 items", lambda: says(read("ml-1m.txt",
            "dataset.names=[user_id,item_id,rating,timestamp]"), "30 items")),
    ],
    "03": [("refused", replaced)],
    "04": [("refused", other_split)],
    "05": [("hr@10 .73", repeat_last)],
    "06": [("min", monitor)],
    "07": [
        ("refused", changed_option("optimizer.lr=0.001", "optimizer.lr=0.00001", "optimizer.lr")),
        ("refused", changed_option("callbacks.early_stopping.patience=2",
            "callbacks.early_stopping.patience=10", "callbacks.early_stopping.patience")),
    ],
    "08": [("refused", changed_sweep)],
    "09": [
        ("runs", lambda: says(train(*TABLE, "dataset.interactions=nozero.csv",
            "dataset.timestamp=timestamp"), "475 rows")),
        ("runs", lambda: says(train(*TABLE, "dataset.interactions=tz_mixed.csv",
            "dataset.timestamp=timestamp"), "475 rows")),
        ("runs", lambda: says(read("tz_same.csv"), "475 rows")),
    ],
    "10": [("runs", lambda p=p: says(read("base.csv", f"trainer.precision={p}"), "rows"))
        for p in ("bf16-true", "64-true")],
    "11": [
        ("runs", lambda: says(read("base.csv", "tags=nightly", "metrics=hr@10"), "rows")),
        ("one line", lambda: says(read("base.csv", "metrics=[10]"), "metric '10'", code=1)),
    ],
    "13": [("30 items", separators)],
    "14": [
        ("refused", lambda: says(read("views.csv", "dataset.separator=';'", "dataset.user=user_id",
            "dataset.item=item_id", "dataset.timestamp=eventdate"), "stands for a missing id", code=1)),
        ("noted", lambda: says(read("mixed_ids.csv"), "30 ids in two spellings")),
    ],
    "16": [("message", flat_list), ("2 and 0 rows", frames)],
    "17": [
        ("runs", lambda: says(read("user_artists.dat", "dataset.user=userID", "dataset.item=artistID",
            "dataset.timestamp=null"), "rows")),
        ("header left out", lambda: says(read("duphead.csv", "dataset.timestamp=null"), "repeat the header line")),
    ],
    "18": [("named", equals_in_a_path)],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path, help="folder with a folder for each case")
    parser.add_argument(
        "--only", nargs="*", default=list(CASES), help="numbers of the cases to run"
    )
    options = parser.parse_args()
    folder = options.cases.resolve()
    wrong = n_tries = 0
    print("| case | must come out | came out | |\n|---|---|---|---|")
    for name in options.only:
        for expected, run in CASES[name]:
            with tempfile.TemporaryDirectory() as temporary:
                work = Path(temporary) / name
                shutil.copytree(folder / name, work)
                work.chmod(0o755)
                for path in work.rglob("*"):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                with inside(work):
                    try:
                        right, found = run()
                    except Exception as error:  # a fault of the product: a row of the table
                        right, found = False, f"{type(error).__name__}: {error}"
            n_tries, wrong = n_tries + 1, wrong + (not right)
            found = " ".join(found.split()).replace("|", "\\|")[:200]
            print(
                f"| {name} | {expected} | {found} | {'right' if right else 'WRONG'} |", flush=True
            )
    print(f"{n_tries} tries, {wrong} faults")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
