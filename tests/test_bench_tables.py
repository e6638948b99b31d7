"""superfine_bench.tables: what README and docs say was measured is what lies in bench/results."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from superfine_bench import Row, convergence, records, tables

ROOT = Path(__file__).resolve().parent.parent
BASE = Row(
    "adamw", "85M", "float32", "one step", "torch fused", "cpu", "ok",
    baseline="torch fused", median_ms=120.0, ratio=1.0,
)  # fmt: skip
OURS = replace(BASE, provider="superfine", median_ms=80.0, ratio=1.5, ratio_low=1.4, ratio_high=1.6)
ENVIRONMENT = {
    "device": "cpu",
    "cpu": {"model": "Xeon", "isa": "avx512", "threads": 2},
    "packages": {"torch": "2.13.0"},
    "git": {"commit": "0123456789", "modified": False},
}


@pytest.fixture
def project(tmp_path):
    """A folder with README, docs and one run's results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# P\n\n<!-- bench:here -->\nold\n<!-- /bench:here -->\n\nafter\n")
    (tmp_path / "docs" / "kernels.md").write_text("<!-- bench:ratios -->\n<!-- /bench:ratios -->\n")
    (tmp_path / "docs" / "other.md").write_text("no region\n")
    file = tmp_path / "bench" / "results" / "here" / records.FILE
    records.append(file, "environment", ENVIRONMENT)
    for row in (BASE, OURS, replace(OURS, case="300", ratio=6.0, ratio_low=None, ratio_high=None)):
        records.append_row(file, row)
    return tmp_path


def test_readme_and_docs_agree_with_the_results():
    stale = [str(path.relative_to(ROOT)) for path in tables.outdated(ROOT)]
    assert stale == []  # python -m superfine_bench.tables rewrites them


def test_the_readme_shows_every_results_folder_it_names_and_docs_show_ratios():
    assert "<!-- bench:cpu-avx512 -->\n| op |" in (ROOT / "README.md").read_text()
    assert "<!-- bench:ratios -->\n| op |" in (ROOT / "docs" / "kernels.md").read_text()
    assert "<!-- bench:convergence -->\n|  | bytes" in (ROOT / "docs" / "numerics.md").read_text()


def test_rewrites_regions_and_nothing_else(project):
    changed = {path.name: text for path, text in tables.outdated(project).items()}
    assert changed.keys() == {"README.md", "kernels.md"}
    readme = changed["README.md"]
    assert readme.startswith("# P\n\n<!-- bench:here -->\n| op |")
    assert readme.endswith("<!-- /bench:here -->\n\nafter\n")
    assert "| AdamW step | 85M, fp32 | torch fused: 120 ms | 80.0 ms | 1.50x (1.40-1.60) |" in readme
    assert (
        "Xeon (avx512, 2 threads), torch 2.13.0, commit `0123456`: [the file](bench/results/here/" in readme
    )
    assert "One run on Xeon" in readme
    assert "ratio is the median over turns" in readme
    assert "nclear" not in readme
    assert "| `adamw` | here | 2 | 1.50x to 6.00x | torch fused |" in changed["kernels.md"]


def test_a_ratio_whose_interval_holds_1_is_unclear(project):
    file = project / "bench" / "results" / "here" / records.FILE
    records.append_row(file, replace(OURS, ratio=1.2, ratio_low=0.9, ratio_high=1.6))
    changed = {path.name: text for path, text in tables.outdated(project).items()}
    assert "| 80.0 ms | unclear (0.900-1.60) |" in changed["README.md"]
    assert "Unclear: the interval of the ratio holds 1." in changed["README.md"]
    assert "| `adamw` | here | 2 | 6.00x, 1 unclear | torch fused |" in changed["kernels.md"]


def test_a_quick_run_is_called_so(project):
    file = project / "bench" / "results" / "here" / records.FILE
    records.append(file, "environment", ENVIRONMENT | {"settings": {"quick": True}})
    changed = {path.name: text for path, text in tables.outdated(project).items()}
    assert "One quick run on Xeon" in changed["README.md"]


def test_ours_that_does_other_work_than_the_case_is_in_no_table(project):
    file = project / "bench" / "results" / "here" / records.FILE
    records.append_row(file, replace(OURS, provider="superfine AdamW", ratio=99.0))
    changed = {path.name: text for path, text in tables.outdated(project).items()}
    assert "99.0" not in changed["README.md"] + changed["kernels.md"]


def test_training_runs_have_a_table_of_their_own(project):
    region = "<!-- bench:convergence -->\n<!-- /bench:convergence -->\n"
    (project / "docs" / "numerics.md").write_text(region)
    with pytest.raises(ValueError, match="region 'convergence'; expected one of ratios, here"):
        tables.outdated(project)
    file = project / "bench" / "results" / "here" / convergence.FILE
    settings = {"settings": {"batch": 32, "lr": {"adamw": 5e-5, "lamb": 2e-3}}}
    records.append(file, "environment", ENVIRONMENT | settings)
    result = convergence.Result("AdamW", 0, 120, 5e-5, 0.8, 0.8, 0.65, 0.8, 0.65, 0.0, 0.02, 4.0, 8.0, 30.0)
    records.append(file, "training", dataclasses.asdict(result))
    changed = {path.name: text for path, text in tables.outdated(project).items()}
    assert "| AdamW | 4 + 8 | 0.0% | 0.8000 | 0.8000 |" in changed["numerics.md"]
    assert "[the file](../bench/results/here/convergence.jsonl)" in changed["numerics.md"]
    assert "convergence" not in changed["README.md"]


def test_check_names_what_differs_and_changes_nothing(project, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", project)
    before = (project / "README.md").read_text()
    assert tables.main(["--check"]) == 1
    assert "README.md: differs" in capsys.readouterr().out
    assert (project / "README.md").read_text() == before
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0


def test_a_provider_without_a_speed_shows_its_status_and_no_ratio(project):
    file = project / "bench" / "results" / "here" / records.FILE
    records.append_row(file, replace(OURS, status="wrong"))
    records.append_row(file, replace(OURS, case="300", status="suspect"))
    changed = {path.name: text for path, text in tables.outdated(project).items()}
    assert "torch fused: 120 ms | wrong |  |" in changed["README.md"]
    assert "1.50x (1.40-1.60) \\* |" in changed["README.md"]
    assert "\\* suspect:" in changed["README.md"]
    assert "`adamw`" not in changed["kernels.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- bench:nowhere -->\n<!-- /bench:nowhere -->\n",
            "region 'nowhere'; expected one of ratios, here",
        ),
        ("<!-- bench:here -->\nnever closed\n", "expected the same regions"),
        ("<!-- bench:here -->\n<!-- /bench:ratios -->\n", "expected the same regions"),
    ],
)
def test_a_region_that_is_no_region_is_an_error(project, text, message):
    (project / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.outdated(project)
