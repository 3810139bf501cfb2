"""Test the files, the table and the picture that a run ends with."""

import io
import json
import math
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from recsys_ssm.errors import UserError
from recsys_ssm.run.curves import plot_curves, read_history
from recsys_ssm.run.files import versions, write_json, write_text
from recsys_ssm.run.table import print_results, results_table


class TestWriteJson:
    def test_what_is_read_is_what_was_written(self, tmp_path):
        results = {
            "z": 1 / 3,
            "a": {"p@5": torch.tensor(0.1, dtype=torch.float64), "n": np.int64(3), "ok": True},
            "list": [1, (2.5, None), torch.tensor([1, 2])],
            "bad": [math.nan, math.inf, -math.inf, torch.tensor(math.nan)],
            "path": Path("runs") / "1",
        }
        path = write_json(tmp_path / "metrics.json", results)
        assert path == tmp_path / "metrics.json"
        text = path.read_text(encoding="utf-8")
        assert json.loads(text) == {
            "z": 1 / 3,
            "a": {"p@5": 0.1, "n": 3, "ok": True},
            "list": [1, [2.5, None], [1, 2]],
            "bad": [None] * 4,
            "path": str(Path("runs") / "1"),
        }
        keys = [line.split('"')[1] for line in text.splitlines() if line.startswith('  "')]
        assert keys == ["a", "bad", "list", "path", "z"]

    def test_a_failed_write_leaves_the_old_file_and_no_scrap(self, tmp_path, monkeypatch):
        path = write_json(tmp_path / "metrics.json", {"p@5": 1})

        def disk_full(self, content):
            with self.open("wb") as file:
                file.write(content[:3])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(UserError, match=r"cannot write .*metrics.json \(No space left"):
            write_json(path, {"p@5": 2})
        assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]
        assert json.loads(path.read_text()) == {"p@5": 1}

    def test_who_reads_meanwhile_reads_the_old_file_whole(self, tmp_path):
        path = write_json(tmp_path / "metrics.json", {"p@5": 1})
        with path.open(encoding="utf-8") as reader:
            write_json(path, {"p@5": 2})
            assert json.load(reader) == {"p@5": 1}
        assert json.loads(path.read_text(encoding="utf-8")) == {"p@5": 2}

    def test_text(self, tmp_path):
        path = write_text(tmp_path / "config.yaml", "name: café\n")
        assert path.read_bytes() == "name: café\n".encode()

    def test_a_value_without_a_word_in_json_is_named(self, tmp_path):
        with pytest.raises(TypeError, match=r"results\.a\[1\] is of type object"):
            write_json(tmp_path / "metrics.json", {"a": [1, object()]})
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="choose another folder"):
            write_json(tmp_path / "file" / "metrics.json", {})


def test_versions_name_what_numbers_depend_on():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] in (
        torch.__version__
    )
    assert {"python", "platform", "recsys-ssm", "lightning", "numpy"} <= set(found)


METRICS = {"p@5": 0.96712, "r@5": 0.38149, "map@12": 0.03421, "coverage@10": 0.00001}
RESULTS = {
    "name": "hm-mamba",
    "metrics": {**METRICS, "n_users": 1200.0, "n_users_without_relevant": 34.0},
    "metrics_all_users": {**METRICS, "p@5": 0.93972},
    "published": {"p@5": 0.952, "hr@1": 0.977},
    "baselines": {"popularity": {**METRICS, "p@5": 0.50001}, "oracle": {"p@5": 1.0}},
}


def printed(results, width=80, **console) -> str:
    out = io.StringIO()
    print_results(results, Console(file=out, width=width, **console))
    return out.getvalue()


def cells(text: str, metric: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [metric]]
    return line.split()[1:]


class TestTable:
    def test_every_figure_under_its_header(self):
        text = printed(RESULTS)
        header = next(line for line in text.splitlines() if "metric" in line)
        places = [header.index(name) for name in ("this run", "all users", "published")]
        assert places == sorted(places)
        assert header.index("published") < header.index("popularity") < header.index("oracle")
        assert cells(text, "p@5") == ["0.9671", "0.9397", "0.952", "0.5000", "1.0000"]
        assert cells(text, "r@5") == ["0.3815", "0.3815", "-", "0.3815", "-"]
        assert cells(text, "coverage@10")[0] == "1.0e-05"
        # Metrics that this run did not measure have no row. Counts are footnotes.
        assert "hr@1" not in text
        assert "n_users" not in text

    def test_decimal_points_stand_below_each_other(self):
        published = {"p@5": 0.952, "r@5": 0.3816, "map@12": 1.0}
        lines = printed({"metrics": METRICS, "published": published}).splitlines()
        rows = [line for line in lines if line.startswith(("p@5", "r@5"))]
        assert rows[0].rindex(".") == rows[1].rindex(".")
        assert cells("\n".join(lines), "map@12") == ["0.0342", "1"]
        (small,) = [line for line in lines if "1.0e-05" in line]
        assert small.index("1.0e-05") + 7 == rows[0].index("0.9671") + 6

    def test_footnotes_give_the_users_and_the_rule(self):
        text = " ".join(printed(RESULTS).split())
        assert "1,200 test users, 34 of them without a relevant item" in text
        assert "left out of the averages, except in the column 'all users'" in text
        everyone = {**METRICS, "n_users": 7.0, "n_users_without_relevant": 0.0}
        text = printed({**RESULTS, "metrics": everyone})
        assert "7 test users." in text
        assert "all users" not in text

    def test_generated_data_is_marked(self):
        text = printed({**RESULTS, "generated": True})
        assert text.splitlines()[0].startswith("hm-mamba (generated data)")
        assert "Generated data: these figures say nothing about the real dataset." in text
        assert "enerated" not in printed({**RESULTS, "generated": False})

    @pytest.mark.parametrize("width", [10, 40, 80, 200])
    def test_no_number_is_cut_at_any_width(self, width):
        text = printed(RESULTS, width)
        assert "…" not in text
        assert cells(text, "p@5") == ["0.9671", "0.9397", "0.952", "0.5000", "1.0000"]

    def test_fits_80_columns_with_all_there_is(self):
        many = dict.fromkeys(("random", "popularity", "oracle"), METRICS)
        text = printed({**RESULTS, "baselines": many, "generated": True})
        assert max(map(len, text.splitlines())) <= 80

    @pytest.mark.parametrize("sees", [True, False])
    def test_says_which_models_see_the_time_of_the_query(self, sees):
        text = printed({**RESULTS, "sees_query_time": sees, "published_sees_query_time": not sees})
        (row,) = [line for line in text.splitlines() if line.startswith("query time")]
        own, others = ("yes", "no") if sees else ("no", "yes")
        assert row.split()[2:] == [own, own, others, "no", "no"]
        assert "query time" not in printed(RESULTS)

    def test_plain_text_unless_a_terminal(self, monkeypatch):
        for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
            monkeypatch.delenv(variable, raising=False)
        assert "\x1b" not in printed(RESULTS)
        assert "\x1b" in printed(RESULTS, force_terminal=True, color_system="standard")

    def test_a_terminal_that_knows_only_ascii(self):
        raw = io.BytesIO()
        out = io.TextIOWrapper(raw, encoding="ascii")
        print_results(RESULTS, Console(file=out, width=80))
        out.flush()
        assert b"0.9671" in raw.getvalue()

    def test_names_are_not_markup(self):
        results = {
            "name": "[red]run",
            "metrics": {**METRICS, "[i]loss": 1.0},
            "baselines": {"[bold]x": METRICS},
        }
        text = printed(results)
        assert "[red]run" in text
        assert "[bold]x" in text
        assert cells(text, "[i]loss") == ["1.0000", "-"]

    def test_nan_and_null_are_a_dash(self):
        metrics = {"p@5": math.nan, "r@5": None, "map@12": 0.0}
        text = printed({"metrics": metrics})
        assert [cells(text, name) for name in metrics] == [["-"], ["-"], ["0.0000"]]

    def test_a_run_without_a_test_prints_nothing(self, capsys):
        print_results({"name": "debug"})
        assert capsys.readouterr().out == ""
        print_results(RESULTS)
        assert "0.9671" in capsys.readouterr().out

    def test_does_not_change_the_results(self):
        before = json.dumps(RESULTS)
        results_table(RESULTS)
        assert json.dumps(RESULTS) == before


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved, so that tests can inspect them."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def line_of(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


HISTORY = [{"step": step, "train/loss": 1 / step} for step in range(1, 101)]
HISTORY += [
    {
        "step": step,
        "val/loss": 2 / step,
        "val/n_users": 50,
        **{
            f"val/{family}@{k}": q / k for family in ("p", "r", "mrr", "hr", "ndcg") for k in (5, 9)
        },
        "val/coverage@9": 1.0,
    }
    for step, q in ((30, 0.3), (90, 0.5), (60, 0.9))  # in any order
]


class TestCurves:
    def test_series_best_step_and_labels(self, tmp_path, drawn):
        path = plot_curves(
            HISTORY, tmp_path / "c.png", monitor="val/ndcg@9", title="run", loss="MSE"
        )
        assert path == tmp_path / "c.png"
        assert imread(path).shape[1] >= 1000
        (figure,) = drawn
        left, right = figure.axes
        assert line_of(left, "training").get_ydata().tolist() == [1 / s for s in range(1, 101)]
        assert line_of(left, "validation").get_xdata().tolist() == [30, 60, 90]
        assert line_of(right, "ndcg@9").get_ydata().tolist() == [0.3 / 9, 0.9 / 9, 0.5 / 9]
        names = [text.get_text() for text in right.get_legend().get_texts()]
        assert names == ["ndcg@9", "p@9", "r@9", "mrr@9"]
        assert (left.get_ylabel(), left.get_xlabel()) == ("MSE, log scale", "training step")
        assert left.get_xlim() == right.get_xlim()
        assert left.get_xlim()[0] == 0
        assert right.get_ylim()[0] == 0
        assert right.get_ylabel() == "mean over validation users"
        texts = [text.get_text() for text in figure.texts]
        assert "best val/ndcg@9: 0.1000 at step 60 (dotted line)" in texts
        assert "run" in texts or figure.get_suptitle() == "run"
        assert [line.get_xdata()[0] for line in left.lines if line.get_linewidth() == 1] == [60]

    @pytest.mark.parametrize(
        ("monitor", "mode", "step"),
        [("val/loss", None, 90), ("val/loss", "max", 30), ("val/p@5", "min", 30)],
    )
    def test_mode(self, tmp_path, drawn, monitor, mode, step):
        plot_curves(HISTORY, tmp_path / "c.png", monitor=monitor, mode=mode)
        assert any(f"at step {step} " in text.get_text() for text in drawn[0].texts)
        stars = [
            (panel, line.get_xdata()[0])
            for panel, axes in enumerate(drawn[0].axes)
            for line in axes.lines
            if line.get_marker() == "*"
        ]
        assert stars == ([(0, step)] if monitor == "val/loss" else [(1, step)])

    def test_the_running_mean_is_centred_and_ends_with_the_values(self, tmp_path, drawn):
        history = [{"step": step, "train/loss": float(step)} for step in range(1, 201)]
        plot_curves(history, tmp_path / "c.png")
        mean = line_of(drawn[0].axes[0], "training, running mean").get_ydata()
        assert mean[100] == pytest.approx(101)  # a lagging mean would be lower
        assert mean[0] == pytest.approx(np.mean([1, 2, 3, 4, 5]))
        assert mean[-1] == pytest.approx(np.mean([196, 197, 198, 199, 200]))

    def test_what_is_no_mean_over_users_is_not_drawn_unasked(self, tmp_path, drawn):
        values = {"val/ndcg@10": 0.03, "val/hr@10": 0.06, "val/coverage@10": 0.8}
        history = [{"step": 1, **values, "val/popularity@10": 400.0}]
        plot_curves(history, tmp_path / "c.png", monitor="val/ndcg@10")
        legend = drawn[0].axes[1].get_legend().get_texts()
        assert [each.get_text() for each in legend] == ["ndcg@10", "hr@10"]

    def test_metrics_asked_for(self, tmp_path, drawn):
        names = ["val/hr@5", "val/n_users", "val/p@5", "val/p@9", "val/r@5", "val/absent@5"]
        plot_curves(HISTORY, tmp_path / "c.png", metrics=names)
        legend = drawn[0].axes[1].get_legend().get_texts()
        assert [each.get_text() for each in legend] == ["hr@5", "n_users", "p@5", "p@9", "r@5"]

    @pytest.mark.parametrize(
        "history",
        [
            [],
            [{"step": 1}],
            [{"step": 1, "train/loss": 0.5}],
            [{"step": 1, "train/loss": math.nan, "val/p@5": math.inf}],
            [{"step": 1, "train/loss": None, "val/ndcg@10": 0.0}],
            [{"step": 0, "val/ndcg@10": 0.1}],
        ],
    )
    def test_short_histories(self, tmp_path, history, recwarn):
        path = plot_curves(history, tmp_path / "c.png", monitor="val/ndcg@10")
        assert imread(path).std() > 0
        assert not [str(each.message) for each in recwarn]

    def test_an_empty_panel_says_so(self, tmp_path, drawn):
        plot_curves([], tmp_path / "c.png")
        texts = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
        assert texts == ["no loss was recorded", "no validation metric was recorded"]

    def test_numbers_from_tensors_and_diverged_ones_left_out(self, tmp_path, drawn):
        history = [
            {"step": 1, "val/p@5": torch.tensor(0.25)},
            {"step": 2, "val/p@5": math.nan},
            {"step": 3, "val/p@5": 0.5},
            {"step": 3, "val/p@5": 0.75},
        ]
        plot_curves(history, tmp_path / "c.png", monitor="val/p@5")
        line = line_of(drawn[0].axes[1], "p@5")
        assert line.get_xdata().tolist() == [1, 3]
        assert line.get_ydata().tolist() == [0.25, 0.75]

    def test_leaves_the_users_pyplot_alone(self, tmp_path):
        import matplotlib.pyplot as plt

        before = (plt.get_fignums(), plt.get_backend(), dict(plt.rcParams))
        plot_curves(HISTORY, tmp_path / "c.png")
        assert (plt.get_fignums(), plt.get_backend(), dict(plt.rcParams)) == before

    def test_a_path_that_cannot_be_written(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot write .*c\.png"):
            plot_curves([], tmp_path / "absent" / "c.png")


class TestReadHistory:
    def test_lightnings_csv(self, tmp_path, drawn):
        path = tmp_path / "metrics.csv"
        path.write_text("epoch,step,train/loss,val/p@5\n0,9,0.5,\n0,9,,0.25\n0,19,0.4,\n")
        assert read_history(path) == [
            {"epoch": 0, "step": 9, "train/loss": 0.5},
            {"epoch": 0, "step": 9, "val/p@5": 0.25},
            {"epoch": 0, "step": 19, "train/loss": 0.4},
        ]
        plot_curves(path, tmp_path / "c.png", monitor="val/p@5")
        assert line_of(drawn[0].axes[0], "training").get_xdata().tolist() == [9, 19]

    def test_bad_files_in_one_line(self, tmp_path):
        with pytest.raises(UserError, match="cannot read the training history"):
            read_history(tmp_path / "absent.csv")
        path = tmp_path / "metrics.csv"
        path.write_text("step,val/p@5\n1,0.5\n2,high\n")
        with pytest.raises(UserError, match=r"line 3, column 'val/p@5': 'high' is not a number"):
            read_history(path)
        path.write_text("epoch,val/p@5\n1,0.5\n")
        with pytest.raises(UserError, match="needs a column 'step'"):
            read_history(path)


def test_a_model_below_popularity_is_said() -> None:
    better = {"metrics": {"ndcg@10": 0.3}, "baselines": {"popularity": {"ndcg@10": 0.2}}}
    worse = {"metrics": {"ndcg@10": 0.1}, "baselines": {"popularity": {"ndcg@10": 0.2}}}
    assert "popularity on" not in shown(better)
    assert "not better than popularity on ndcg@10 (0.1000 against 0.2000)" in shown(worse)
    again = {
        "metrics": {"ndcg@10": 0.3},
        "filter_seen": False,
        "baselines": {"popularity": {"ndcg@10": 0.2}, "popularity_unfiltered": {"ndcg@10": 0.4}},
    }
    assert "not better than popularity" in shown(again)


def test_one_figure_stands_once() -> None:
    same = {"hr@1": 0.5, "ndcg@1": 0.5, "mrr@1": 0.5, "hr@10": 0.7}
    assert "ndcg@1" not in shown({"metrics": same}).replace("ndcg@10", "")
    other = shown({"metrics": same, "baselines": {"x": {"hr@1": 0.1, "ndcg@1": 0.2}}})
    assert "ndcg@1" in other and "mrr@1" in other


def test_the_other_filter_is_a_column() -> None:
    text = shown(
        {"metrics": {"hr@10": 0.8}, "metrics_unfiltered": {"hr@10": 0.8}, "metrics_filtered": {"hr@10": 0.3}}
    )  # fmt: skip
    assert "seen items left out" in text and "seen items allowed" not in text


def shown(results: dict) -> str:
    console = Console(width=200, file=io.StringIO(), color_system=None)
    print_results(results, console)
    return " ".join(console.file.getvalue().split())
