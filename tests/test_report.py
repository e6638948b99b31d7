"""superfine.report: a picture and a page from a run, also from one that was killed or is of another kind."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from superfine import report

TRAIN = [
    {
        "event": "train",
        "step": step,
        "epoch": step / 10,
        "loss": 1.0 / step,
        "lr": 1e-4 * step,
        "grad_norm": 2.0,
        "ms_forward": 6.0,
        "ms_backward": 3.0,
        "ms_optimizer": 1.0,
    }
    for step in range(1, 11)
]
VALIDATION = [
    {"event": "validation", "step": step, "epoch": step / 10, "loss": loss, "accuracy": 0.5, "f1_macro": 0.4}
    for step, loss in ((5, 0.9), (10, 0.7))
]
TEST = {
    "event": "test",
    "loss": 0.71,
    "accuracy": 0.8,
    "f1_macro": 0.75,
    "labels": ["bad", "<good>"],
    "confusion": [[30, 10], [10, 50]],
}
BASELINE = TEST | {"event": "baseline", "loss": 1.21, "accuracy": 0.3}
CONFIG = '[data]\npath = "texts & labels.csv"\n[train]\nepochs = 3\nselectors = ["last:2", "head"]\n'


class Page(HTMLParser):
    """Cells, text and picture of a page; every tag that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells, self.text, self.images, self.open = [], "", [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag in ("meta", "img"):
            self.images += [dict(attrs)["src"]] if tag == "img" else []
            return
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data.strip()


def make_run(folder, events, config=CONFIG, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail)
    if config is not None:
        (folder / "config.toml").write_text(config)
    return folder


def write(folder) -> Page:
    report.write_report(folder)
    picture = (folder / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert len(page.images) == 1
    assert page.images[0].startswith("data:image/png;base64,")
    assert {path.name for path in folder.iterdir()} <= {
        "metrics.jsonl",
        "config.toml",
        "curves.png",
        "report.html",
    }
    return page


def test_shows_comparison_confusion_times_and_configuration(tmp_path):
    page = write(make_run(tmp_path / "tweets", [*TRAIN, *VALIDATION, TEST, BASELINE]))
    cells = page.cells
    row = cells.index("accuracy", cells.index("change"))
    assert cells[row : row + 4] == ["accuracy", "0.3", "0.8", "+0.5"]
    row = cells.index("bad", cells.index("precision"))
    # precision 30/40, recall 30/40
    assert cells[row : row + 7] == ["bad", "30", "10", "0.750", "0.750", "0.750", "40"]
    row = cells.index("forward + loss")
    assert cells[row : row + 3] == ["forward + loss", "6", "60.0%"]
    assert cells[cells.index("selectors") + 1] == "last:2, head"
    assert "not finished" not in page.text


def test_text_from_data_and_config_is_escaped(tmp_path):
    folder = make_run(tmp_path / "run", [*TRAIN, TEST])
    page = write(folder)
    assert "<good>" in page.cells  # as text: the parser saw no such tag
    assert "texts & labels.csv" in page.cells


def test_a_truncated_last_line_is_left_out_and_mentioned(tmp_path):
    page = write(make_run(tmp_path / "run", [*TRAIN, *VALIDATION], tail='{"event": "train", "st'))
    assert "1 line of metrics.jsonl could not be read" in page.text
    assert "no test results" in page.text


@pytest.mark.parametrize("events", [[], TRAIN[:1], VALIDATION, [TEST], [BASELINE], [*TRAIN, BASELINE]])
def test_missing_events_leave_their_section_out(tmp_path, events):
    page = write(make_run(tmp_path / "run", events, config=None))
    assert ("untouched base and tuned" in page.text) == (TEST in events)
    assert "Configuration" not in page.text


def test_regression_metrics(tmp_path):
    scores = {"mse": 0.25, "mae": 0.4, "pearson": 0.9}
    events = [
        *TRAIN,
        {"event": "validation", "step": 10, "epoch": 1.0, "loss": 0.3, **scores},
        {"event": "test", "loss": 0.25, **scores},
        {"event": "baseline", "loss": 1.25, **scores, "mse": 1.25},
    ]
    page = write(make_run(tmp_path / "run", events))
    row = page.cells.index("MSE", page.cells.index("change"))
    assert page.cells[row : row + 4] == ["MSE", "1.25", "0.25", "-1"]
    assert "Pearson r" in page.cells
    assert "Confusion" not in page.text


def test_values_that_are_not_finite_are_not_drawn(tmp_path):
    bad = [event | {"loss": float("nan"), "grad_norm": float("inf")} for event in TRAIN[3:6]]
    events = [*TRAIN[:3], *bad, *TRAIN[6:], VALIDATION[0] | {"loss": float("nan")}]
    assert "nan" in write(make_run(tmp_path / "run", events)).cells


@pytest.mark.parametrize(("steps", "marker"), [(1, "o"), (30, "o"), (31, "")])
def test_few_steps_are_drawn_with_markers(tmp_path, steps, marker):
    # Between them there are lines; a single one would not be seen.
    events = [TRAIN[0] | {"step": step} for step in range(1, steps + 1)]
    run = report.read_run(make_run(tmp_path / "run", events))
    loss, rate = Figure().subplots(2)
    report._draw_loss(loss, run)
    report._draw_line(rate, "Learning rate", *report._series(run.train, "lr"))
    assert [line.get_marker() for line in (*loss.lines, *rate.lines)] == [marker] * 3


def test_a_step_repeated_by_a_resumed_run_counts_once(tmp_path):
    folder = make_run(tmp_path / "run", [*TRAIN, TRAIN[-1] | {"loss": 7.0}])
    run = report.read_run(folder)
    assert [event["step"] for event in run.train] == list(range(1, 11))
    assert run.train[-1]["loss"] == 7.0


def test_the_environment_of_the_run_is_shown_when_it_was_recorded(tmp_path):
    summary = {"event": "summary", "environment": {"cpu": {"model": "Abacus 3000"}}}
    page = write(make_run(tmp_path / "run", [*TRAIN, summary]))
    assert "Abacus 3000" in page.cells
    assert "Where this page was written" not in page.text


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"write_report: run_dir is .*expected a folder that holds metrics\.jsonl"
    ):
        report.write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_broken_config_is_an_error_and_the_old_report_stays(tmp_path):
    folder = make_run(tmp_path / "run", TRAIN)
    report.write_report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "config.toml").write_text("[data\n")
    with pytest.raises(ValueError, match=r"write_report: config\.toml"):
        report.write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert report.smooth([3.0, 3.0, 3.0], 10) == pytest.approx([3.0, 3.0, 3.0])
    assert report.smooth([4.0, 0.0], 2) == pytest.approx([4.0, 4.0 / 3])
    assert report.smooth([], 5) == []
