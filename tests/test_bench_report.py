"""superfine_bench.report: every row is on the page, whatever became of it, and the page needs nothing else."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from superfine_bench import Ceilings, Row, Run, charts, records, report
from superfine_bench.display import number, rate, size, times

OK = Row(
    op="adamw",
    case="85M",
    dtype="float32",
    work="one step",
    provider="torch fused",
    device="cpu",
    status="ok",
    baseline="torch fused",
    cache="cold",
    calls=45,
    turns=15,
    median_ms=100.0,
    p20_ms=98.0,
    p80_ms=110.0,
    low_ms=99.0,
    high_ms=101.0,
    wall_ms=100.5,
    ratio=1.0,
    ratio_low=1.0,
    ratio_high=1.0,
    bytes=2_000_000_000,
    flops=1_000_000_000,
    gb_per_s=20.0,
    tflop_per_s=0.01,
    traffic="4r3w",
    ceiling_gb_per_s=25.0,
    percent_of_ceiling=80.0,
    peak_memory=3 * 2**20,
    clock_mhz=2700.0,
    error=0.2,
)
BLANK = Row("lamb", "<empty>", "bfloat16", "nothing & more", "peer", "cpu", "ok")
PARTS = {"forward": 6.0, "backward": 3.0, "optimizer": 1.0}


def failing(status):
    return dataclasses.replace(
        BLANK, op="adamw", provider=f"{status} peer", status=status, note=f"<why> {status}"
    )


ROWS = [
    OK,
    dataclasses.replace(OK, provider="superfine", ratio=1.5, ratio_low=1.4, ratio_high=1.6, median_ms=66.7),
    dataclasses.replace(OK, provider="superfine, in place", status="suspect", note="above 102%", ratio=9.0),
    *[failing(status) for status in ("wrong", "error", "unavailable", "timeout", "out of memory", "skipped")],
    dataclasses.replace(OK, op="train_step", provider="torch eager", baseline="torch eager", split=PARTS),
    dataclasses.replace(
        OK, op="train_step", provider="superfine", baseline="torch eager", split=PARTS, ratio=1.1
    ),
    BLANK,
]
CEILINGS = Ceilings(
    "cpu", {"copy": [(2**25, 60.0), (2**30, 20.0)], "4r3w": [(2**30, 25.0)]}, {"float32": 0.2}, 1.5
)
RUN = Run(
    {"device": "cpu", "cpu": {"model": "Xeon & Co", "isa": "avx2", "threads": 2}}, CEILINGS, ROWS, broken=2
)


class Page(HTMLParser):
    """The addresses that a page asks for, the text of its scripts, and of the cells of all its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href", "action")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = "cell"
        elif tag == "script":
            self.scripts.append("")
            self._inside = "script"

    def handle_data(self, text):
        if self._inside == "script":
            self.scripts[-1] += text
        elif self._inside == "cell":
            self.rows[-1][-1] += text

    def handle_endtag(self, tag):
        if tag in ("td", "th", "script"):
            self._inside = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    assert report.write(RUN, folder) == [folder / name for name in ("bench.csv", "bench.png", "report.html")]
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def test_the_page_asks_nothing_of_the_network(folder, page):
    assert page.addresses != []
    assert [address for address in page.addresses if not address.startswith("data:image/png;base64,")] == []
    assert (
        re.findall(r"https?:|//[a-z]|@import|url\(", (folder / "report.html").read_text().split("<body>")[0])
        == []
    )
    assert "prefers-color-scheme: dark" in (folder / "report.html").read_text()


def test_the_page_carries_every_row_as_json(page):
    (script,) = page.scripts
    assert [Row(**row) for row in json.loads(script)] == ROWS


def test_the_page_shows_every_row_with_its_status_and_note(page):
    shown = {(row[0], row[1]) for row in page.rows if len(row) > 2}
    assert {(row.provider, row.status) for row in ROWS} <= shown
    remarks = {row[0] for row in page.rows if len(row) == 1}
    assert {f"{row.provider}: {row.note}" for row in ROWS if row.note} <= remarks
    assert "superfine: forward 6.00 ms, backward 3.00 ms, optimizer 1.00 ms" in remarks


def test_the_raw_table_has_every_field_of_every_row(page):
    fields = [item.name for item in dataclasses.fields(Row)]
    start = page.rows.index(fields)
    raw = page.rows[start + 1 : start + 1 + len(ROWS)]
    assert [row[fields.index("provider")] for row in raw] == [row.provider for row in ROWS]
    assert raw[1][fields.index("median_ms")] == "66.7"


def test_the_page_shows_ceilings_environment_and_what_was_unreadable(folder, page):
    assert ["4r3w stream", "25.0 GB/s at 1.00 GiB"] in page.rows
    assert ["model", "Xeon & Co"] in page.rows
    assert "2 lines of the results could not be read" in (folder / "report.html").read_text()


def test_the_summary_leaves_out_what_is_suspect():
    assert report.summary(ROWS[:3]) == (
        "1.50x as fast as torch fused; best: 85M, fp32 (1 of 1 case; rows: 1 suspect)"
    )
    assert report.summary([BLANK]) == "nothing of ours to compare in 1 case"


@pytest.mark.parametrize(
    "run",
    [
        Run(),
        Run(rows=[BLANK]),
        Run(rows=[failing("error")], ceilings=Ceilings("cpu", {})),
        Run(rows=[dataclasses.replace(OK, ratio=None, ratio_low=None, ratio_high=None)]),
        Run(rows=[dataclasses.replace(OK, device="cuda:0")], environment={"device": "cuda:0", "git": None}),
    ],
    ids=["nothing", "no numbers", "failed", "no baseline", "unknown GPU"],
)
def test_takes_runs_where_everything_is_missing(run, tmp_path):
    paths = report.write(run, tmp_path)
    assert [path.name for path in paths if path.stat().st_size == 0] == []
    (script,) = Page((tmp_path / "report.html").read_text()).scripts
    assert [Row(**row) for row in json.loads(script)] == run.rows
    console = Console(file=io.StringIO(), width=110)
    report.print_tables(console, run.rows)
    assert all(row.status in console.file.getvalue() for row in run.rows)


def test_text_of_a_row_cannot_leave_its_place_on_the_page(tmp_path):
    hostile = dataclasses.replace(BLANK, note="</script><script>alert(1)</script>")
    report.write(Run(rows=[hostile]), tmp_path)
    (script,) = Page((tmp_path / "report.html").read_text()).scripts
    assert json.loads(script)[0]["note"] == hostile.note


def test_infinite_numbers_do_not_break_the_json(tmp_path):
    report.write(Run(rows=[dataclasses.replace(OK, status="wrong", error=float("inf"))]), tmp_path)
    (script,) = Page((tmp_path / "report.html").read_text()).scripts
    assert json.loads(script)[0]["error"] is None


def test_the_csv_holds_what_the_rows_hold(folder):
    with open(folder / "bench.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(ROWS)
    for shown, row in zip(table, ROWS, strict=True):
        for name, value in dataclasses.asdict(row).items():
            if name == "split":
                assert json.loads(shown[name]) == value
            else:
                assert shown[name] == ("" if value is None else str(value))


def test_console_tables_fit_110_columns_and_name_the_rate_that_counts():
    bound = dataclasses.replace(
        OK,
        device="cuda:0",
        provider="torch single-tensor",
        flops=10**13,
        tflop_per_s=99.5,
        ceiling_tflop_per_s=120.0,
        status="out of memory",
        note="x [bold] " * 30,
    )
    console = Console(file=io.StringIO(), width=110)
    report.print_tables(console, [*ROWS, bound])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 110
    shown = next(line for line in lines if "torch single-tensor" in line)
    assert "99.5 TFLOP/s" in shown
    assert "out of memory" in shown
    ours = next(line for line in lines if line.startswith(" superfine "))
    assert re.split(r"\s{2,}", ours.strip()) == [
        "superfine", "66.7", "1.50x", "1.40-1.60", "20.0 GB/s", "80%", "3.00 MiB", "ok",
    ]  # fmt: skip


def test_providers_keep_their_colour_and_ours_are_apart():
    shades = charts.colours(ROWS)
    assert shades.keys() == {row.provider for row in ROWS}
    assert shades["superfine"] in charts.OURS
    assert shades["torch fused"] in charts.BASELINES
    assert shades["superfine"] != shades["superfine, in place"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, ""), (0.0542, "0.0542"), (5.0, "5.00"), (99.96, "100"), (2934.4, "2934"), (0.0, "0.00")],
)
def test_numbers_have_three_digits_and_no_needless_exponent(value, shown):
    assert number(value) == shown


def test_ratios_sizes_and_rates_carry_their_unit():
    assert (times(1.518), times(10.94), times(None)) == ("1.52x", "10.9x", "")
    assert (size(None), size(12), size(3 * 2**29)) == ("", "12 B", "1.50 GiB")
    assert (rate(OK), rate(BLANK)) == ("20.0 GB/s", "")


# --- the file behind it --------------------


def test_a_file_cut_short_is_read_up_to_its_last_whole_line(tmp_path):
    file = tmp_path / records.FILE
    records.append(file, "environment", RUN.environment)
    records.append(file, "ceilings", dataclasses.asdict(CEILINGS))
    for row in ROWS[:3]:
        records.append_row(file, row)
    file.write_bytes(file.read_bytes()[:-40])
    run = records.read(tmp_path)
    assert run.rows == ROWS[:2]
    assert run.broken == 1
    records.append_row(file, ROWS[2])  # a resumed run goes on below the broken line
    assert records.read(file).rows == ROWS[:3]
    assert [path.name for path in report.write(run, tmp_path)][-1] == "report.html"
