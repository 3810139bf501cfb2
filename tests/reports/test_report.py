"""The report itself: its cells, its three forms, and its figures."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from recsys_ssm.reports import figures, tables
from recsys_ssm.reports.build import build
from recsys_ssm.reports.collect import collect
from recsys_ssm.reports.document import (
    Document,
    Heading,
    Paragraph,
    Table,
    tex,
    to_html,
    to_latex,
    to_markdown,
)
from recsys_ssm.reports.names import styles
from recsys_ssm.reports.runs import Collection
from recsys_ssm.reports.tables import METRICS, Options
from recsys_ssm.run.files import write_table
from reports.fake import fake_run


@pytest.fixture(scope="module")
def collection(night: Path) -> Collection:
    return collect([night])


@pytest.fixture(scope="module")
def document(collection: Collection) -> Document:
    return build(collection, "A night & a half", Options())


def table(document: Document, label: str) -> list[dict[str, str]]:
    [found] = [b for b in document.blocks if isinstance(b, Table) and b.label == label]
    return [dict(zip(found.head, row, strict=True)) for row in found.rows]


def rows(document: Document, label: str, **wanted: str) -> list[dict[str, str]]:
    return [row for row in table(document, label) if all(row[key] == wanted[key] for key in wanted)]


# ------------------------------------------------------------------------------------------- tables


def test_published_figures_stand_beside_ours_as_they_were_printed(document: Document) -> None:
    paper, ours, *_ = rows(document, "results-spotify", data="Spotify", model="FT-Mamba")
    assert [paper[m] for m in METRICS] == (
        [".952", ".906", ".374", ".671", ".985", ".985", ".977", ".996", ".998"]
    )
    assert paper["setting"] == "paper" and paper["seeds"] == "100"
    assert ours["setting"] == "published setting" and ours["seeds"] == "14"
    assert re.fullmatch(r"\*\*\.\d{3} ± \.\d{3}\*\*", ours["p@5"])
    # All six published cells are there, run or not.
    published = rows(document, "results-vaccine", setting="paper", model="FT-Transformer")
    assert [row["hr@10"] for row in published] == [
        ".9119", ".7241", ".5664", ".4629", ".3354", ".1595",
    ]  # fmt: skip


def test_few_seeds_and_generated_data_are_said_in_the_cell(document: Document) -> None:
    [vaccine] = rows(
        document,
        "results-vaccine",
        data="Vaccine 25/50",
        model="FT-Mamba",
        setting="published setting",
    )
    assert all(vaccine[m].endswith("(n = 3)**") for m in METRICS)
    [hm] = rows(document, "results-hm", data="H&M, generated data", model="FT-Mamba")
    assert all(hm[m].endswith("(n = 3, generated)**") for m in METRICS)
    [real] = rows(document, "results-hm", data="H&M", model="FT-Mamba")
    assert real["setting"] == "paper" and real["p@5"] == ".1566"
    [baseline] = rows(document, "results-hm", data="H&M, generated data", model="popularity")
    assert "generated" in baseline["p@5"]


def test_published_and_best_setting_side_by_side(document: Document) -> None:
    settings = [
        row["setting"]
        for row in rows(document, "results-spotify", data="Spotify", model="FT-Mamba")
    ]
    assert settings == [
        "paper", "published setting", "… all users", "best: optimizer.lr=0.0003", "… all users",
    ]  # fmt: skip


def test_baselines_count_each_seed_once(document: Document) -> None:
    [oracle] = rows(document, "results-spotify", data="Spotify", model="oracle")
    assert oracle["seeds"] == "14" and oracle["p@5"] == "1.000 ± .000"


def test_paired_differences(document: Document, collection: Collection) -> None:
    shipped, best = rows(document, "paired", data="Spotify")
    assert shipped["difference"] == "FT-Mamba − FT-Transformer" and shipped["seeds"] == "12"
    assert best["settings"] == "best settings" and "(n = 3)" in best["p@5"]
    # .971 against .899 on three seeds: found; what the seeds share drops out of the interval.
    [spotify] = [task for task in collection.tasks if task.dataset == "spotify"]
    [comparison, _] = [
        c for c in tables.comparisons(collection, Options()) if c.first.task == spotify
    ]
    difference = comparison.differences["p@5"]
    unpaired = tables.estimate(list(comparison.second.values("p@5").values()))
    assert difference.half_width < 0.6 * unpaired.half_width


def test_digits() -> None:
    assert tables.show(0.9524) == ".952" and tables.show(-0.01251, 4) == "-.0125"
    assert tables.show(1.0) == "1.000" and tables.show(float("nan")) == "–"
    assert tables.show_exact(0.22) == ".22" and tables.show_exact(1.0) == "1"
    assert tables.show_p(0.0004) == "< .001" and tables.show_p(0.04) == ".040"


def test_cost_and_settings(document: Document) -> None:
    cost = rows(document, "cost", data="Spotify", model="FT-Transformer")
    assert [row["step, ms"] for row in cost] == ["50.0"]
    assert cost[0]["memory, MiB"] == "512" and cost[0]["parameters"] == "2,100"
    assert cost[0]["training, min"] == "10.1"  # median of 600 … 611 s
    tried = rows(document, "settings", data="Spotify", model="FT-Mamba")
    assert [row["setting"] for row in tried] == ["published setting", "optimizer.lr=0.0003"]


def test_next_item_tables_have_published_rows_with_their_protocol(tmp_path: Path) -> None:
    fake_run(tmp_path, "ml_1m", data={"ratings.dat": "0123456789abcdef" * 4})
    document = build(collect([tmp_path]), "x", Options())
    found = table(document, "next-item-ml_1m")
    assert [row["model"] for row in found[:2]] == ["SASRec", "Mamba4Rec"]
    assert found[0]["setting"] == "paper" and found[0]["length"] == "50"
    assert found[1]["HR@10"] == ".306" and found[1]["without embeddings"] == "78,624"
    [wearec, _] = [row for row in found if row["model"] == "WEARec"]
    assert wearec["HR@10"] == "–" and wearec["HR@10, new"] == ".3334", "seen items are left out"
    [ours] = [row for row in found if row["setting"] == "default setting"]
    assert ours["model"] == "Mamba4Rec"
    assert ours["without embeddings"] == "72,256" and ours["latency"] == "0.0020 s"
    assert ours["latency, 256"] == "0.3000 s"
    assert ours["trained on"] == "all" and ours["length"] == "200"
    assert "(n = 1)" in ours["HR@10"]
    [caption] = [b.caption for b in document.blocks if getattr(b, "label", "") == "next-item-ml_1m"]
    for words in (
        "ratings.dat (SHA-256 0123456789ab…)",
        "Equal scores are ranked in catalogue order",
        "seen items allowed",
        "Seeds: 1;",
        "95% confidence interval",
    ):
        assert words in caption


def test_every_table_says_which_models_see_the_time_of_the_query(tmp_path: Path) -> None:
    for seed in range(3):
        timed = fake_run(tmp_path, "ml_100k", "mamba2", seed, options={"model.query_time": True})
        results = json.loads((timed / "metrics.json").read_text())
        (timed / "metrics.json").write_text(json.dumps({**results, "sees_query_time": True}))
        fake_run(tmp_path, "ml_100k", "mamba", seed)
        fake_run(tmp_path, "spotify", "mamba", seed)
    found = build(collect([tmp_path]), "title", Options())
    tables_found = [block for block in found.blocks if isinstance(block, Table)]
    assert {each.label for each in tables_found} >= {
        "results-spotify", "next-item-ml_100k", "paired", "cost", "settings",
    }  # fmt: skip
    assert all("query time" in each.head for each in tables_found)
    for label in ("next-item-ml_100k", "cost", "settings"):
        sees = {row["model"]: row["query time"] for row in table(found, label)}
        assert sees["2Mamba4Rec"] == "yes" and sees["Mamba4Rec"] == "no", label
    (pair,) = rows(found, "paired", settings="best settings")
    assert sorted(pair["query time"].split(", ")) == ["no", "yes"]


def test_a_language_model_from_scratch_is_marked(tmp_path: Path) -> None:
    for backbone, model in (("mamba", "tiny"), ("transformer", "weights/gpt2")):
        fake_run(tmp_path, "ml_1m", backbone, options={"text.model": model})
    document = build(collect([tmp_path]), "x", Options())
    ours = [
        row["model"]
        for row in table(document, "next-item-ml_1m")
        if row["seeds"] == "1" and row["setting"] not in ("paper", "published", "same users")
    ]
    assert sorted(ours) == ["Mamba4Rec, tiny", "SASRec"]
    [caption] = [b.caption for b in document.blocks if getattr(b, "label", "") == "next-item-ml_1m"]
    assert "with random weights" in caption


def test_every_result_table_names_data_protocol_ties_and_interval(document: Document) -> None:
    captions = [
        block.caption
        for block in document.blocks
        if isinstance(block, Table) and block.label.startswith("results-")
    ]
    assert len(captions) == 3
    for caption in captions:
        for words in (
            "Data: ",
            "out of that user's ranking",
            "Equal scores",
            "Seeds: ",
            "Student's t",
        ):
            assert words in caption, caption
    assert any("files generated from a fixed seed" in caption for caption in captions)


def test_two_equal_differences_are_not_a_finding(tmp_path: Path) -> None:
    """At n = 2 the interval ± .000 and p < .001 stood in bold."""
    for seed in range(2):
        for backbone, value in (("mamba", 0.8), ("transformer", 0.7)):
            path = fake_run(tmp_path, backbone=backbone, seed=seed) / "metrics.json"
            results = json.loads(path.read_text())
            results["metrics"] |= dict.fromkeys(METRICS, value + seed * 1e-7)
            path.write_text(json.dumps(results))
    [row] = rows(build(collect([tmp_path]), "x", Options()), "paired")
    assert row["hr@10"] == "+.100 ± .000 (n = 2)"


def test_the_trials_of_a_search_have_a_table(tmp_path: Path) -> None:
    for lr in (1e-3, 2e-3):
        path = fake_run(tmp_path, options={"optimizer.lr": lr}, level=lr * 100) / "metrics.json"
        results = json.loads(path.read_text())
        del results["metrics"]
        path.write_text(json.dumps(results))
    found = table(build(collect([tmp_path]), "x", Options()), "trials")
    assert [row["setting"] for row in found] == ["optimizer.lr=0.002", "optimizer.lr=0.001"]


# ------------------------------------------------------------------------------------------ figures


def test_recommended_minus_liked_by_hand(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    write_table(
        folder / "test_users.parquet",
        pl.DataFrame(
            {
                "user": [0, 1, 2],
                "n_relevant": [2, 1, 0],
                "recommended": [[0, 3, 1], [3, 0, 1], [2, 1, 0]],
                "relevant": [[0, 1], [1], []],
            },
            schema_overrides={"relevant": pl.List(pl.Int64)},
        ),
    )
    items = pl.DataFrame({"item": list("abcd"), "train_count": [1, 2, 3, 4]})
    write_table(folder / "items.parquet", items)
    [cell] = collect([tmp_path]).cells
    # Liked: 1 twice, 0 once. Recommended (two to the first, one to the second): 3 twice, 0 once.
    assert figures.rank_differences(cell.runs[0]).tolist() == [-2, 0, 0, 2]


def test_lists_too_short_for_what_a_user_likes_are_not_drawn(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    users = pl.read_parquet(folder / "test_users.parquet")
    write_table(
        folder / "test_users.parquet", users.with_columns(pl.col("recommended").list.head(5))
    )
    [cell] = collect([tmp_path]).cells
    assert figures.rank_differences(cell.runs[0]) is None


def test_a_large_catalogue_is_drawn_in_bins(tmp_path: Path) -> None:
    fake_run(tmp_path, n_items=1000)
    [cell] = collect([tmp_path]).cells
    difference = figures.rank_differences(cell.runs[0])
    assert difference is not None and len(difference) == 50
    assert abs(difference.sum()) < 1e-9  # as many recommended as liked


def test_figures_are_there_and_legible_in_grey(
    document: Document, collection: Collection, tmp_path: Path
) -> None:
    names = [image.name for image in document.images]
    assert {"training-spotify", "popularity-spotify", "grid-vaccine"} <= set(names)
    assert "training-hm-generated" in names and len(names) == len(set(names))
    for image in document.images:
        path = tmp_path / "figure.png"
        path.write_bytes(image.png)
        with Image.open(path) as picture:
            assert picture.width == 2 * image.width  # sharp at the size it is shown at
            grey = np.asarray(picture.convert("L"))
        assert grey.min() < 60 and (grey > 250).mean() > 0.5  # dark lines on white
        assert "(n = " in image.alt
    one, other = styles(collection.cells).values()
    assert one["linestyle"] != other["linestyle"] and one["marker"] != other["marker"]


def test_both_backbones_are_drawn_when_an_option_is_not_the_published_one(tmp_path: Path) -> None:
    fake_run(tmp_path, backbone="mamba")
    fake_run(tmp_path, backbone="transformer", options={"optimizer.lr": 3e-4})
    [training, *_] = build(collect([tmp_path]), "x", Options()).images
    assert "FT-Mamba (n = 1" in training.alt
    assert "FT-Transformer, optimizer.lr=0.0003 (n = 1" in training.alt


def test_the_better_of_two_runs_is_drawn(tmp_path: Path) -> None:
    fake_run(tmp_path, level=0.3, options={"optimizer.lr": 1e-5})
    fake_run(tmp_path, level=0.9, options={"optimizer.lr": 3e-4})
    found = collect([tmp_path])
    [cell] = figures.drawn_cells(found, found.tasks[0])
    assert cell.setting.label == "optimizer.lr=0.0003"
    fake_run(tmp_path, level=0.6)  # the shipped setting is drawn beside the best
    found = collect([tmp_path])
    labels = [cell.setting.label for cell in figures.drawn_cells(found, found.tasks[0])]
    assert labels == ["published setting", "optimizer.lr=0.0003"]


def test_a_grid_is_drawn_with_both_backbones_whatever_their_setting(tmp_path: Path) -> None:
    for cell in ((25, 25), (25, 50)):
        fake_run(tmp_path, "vaccine", "mamba", cell=cell)
        fake_run(tmp_path, "vaccine", "transformer", cell=cell, options={"optimizer.lr": 3e-4})
    [grid] = [i for i in build(collect([tmp_path]), "x", Options()).images if "grid" in i.name]
    assert grid.alt.count("FT-Mamba (n = 1)") == grid.alt.count("FT-Transformer (n = 1)") == 2


def test_curves_stand_on_steps_all_seeds_have(collection: Collection) -> None:
    [cell] = [
        c for c in collection.cells if c.task.dataset == "spotify" and c.backbone == "transformer"
    ]
    steps, values = figures._curves(cell.runs, ["hr@5"])["hr@5"]
    assert values.shape == (12, 20) and steps[0] == 250 and steps[-1] == 5000


# -------------------------------------------------------------------------------------------- forms


class Page(HTMLParser):
    """What a browser would fetch, run or complain about."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_needs_nothing_else(document: Document) -> None:
    text = to_html(document)
    page = Page()
    page.feed(text)
    assert not page.open
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed")]
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert len(attributes["alt"] or "") > 40
    assert "@import" not in text and "url(" not in text
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert links == anchors - {a for a in anchors if a not in links} and links
    assert "<title>A night &amp; a half</title>" in text and 'lang="en"' in text
    assert text.count("<table>") == text.count("<caption>") == 6


def test_what_is_written_in_a_file_cannot_become_code() -> None:
    nasty = '<script>alert("x")</script> & 5_000 $x$ {a} \\input{y} 100% #1 a^b ~ `<b>`'
    document = Document(nasty, [Heading(nasty), Paragraph(nasty), Table(nasty, [nasty], [[nasty]])])
    page = to_html(document)
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
    latex = to_latex(document)
    assert "\\input{" not in latex and r"5\_000 \$x\$ \{a\}" in latex and r"100\% \#1" in latex


def test_latex_of_what_a_user_names(tmp_path: Path) -> None:
    """The end of a row takes a [ after it for an option; pdflatex ends at letters it has no font for."""
    assert tex("[a] ü 日") == "{[}a{]} ü U+65E5"


def test_latex_is_balanced(document: Document) -> None:
    text = to_latex(document)
    begun = re.findall(r"\\begin\{(\w+)\}", text)
    assert sorted(begun) == sorted(re.findall(r"\\end\{(\w+)\}", text))
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.isascii() or not [c for c in text if ord(c) > 0x2000], "a character T1 lacks"
    for columns, body in re.findall(
        r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL
    ):
        for line in body.splitlines():
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1


def test_markdown_tables_are_rectangular(document: Document) -> None:
    lines = to_markdown(document).splitlines()
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.count("|") == below.count("|")


# ----------------------------------------------------------------------------------------- the command


def test_the_command(cli, night: Path, tmp_path: Path) -> None:
    outcome = cli("report", str(night), f"output={tmp_path / 'out'}", f"results={tmp_path / 'r'}")
    assert outcome.code == 0, outcome.text
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Recommenders")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".tex", ".html", ""}
    assert len(list((tmp_path / "out" / "figures").iterdir())) == len(
        list((tmp_path / "r" / "figures").iterdir())
    )
    assert len(list((tmp_path / "r").glob("*.json"))) == 9
    assert "left out" in outcome.out and "diverged" in outcome.out
    assert not (tmp_path / ".hydra").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["."], "no finished run in it"),
        ([], "sweep"),
        ([".", "formats=[pdf]"], "formats=pdf: choose from md, tex, html"),
        ([".", "confidence=95"], "confidence=95: choose a number between 0 and 1"),
        ([".", "min_seed=3"], "min_seed: no such option; did you mean 'min_seeds'"),
    ],
)
def test_a_mistake_is_one_line(cli, arguments: list[str], message: str) -> None:
    outcome = cli("report", *arguments)
    assert outcome.code == 1 and message in outcome.err and "Traceback" not in outcome.text


def test_a_report_is_not_reported(cli, tmp_path: Path) -> None:
    fake_run(tmp_path / "runs")
    assert cli("report", "runs").code == 0
    again = cli("report", "runs")
    assert again.code == 0 and "left out" not in again.text
    assert (tmp_path / "runs" / "report" / "report.html").exists()
