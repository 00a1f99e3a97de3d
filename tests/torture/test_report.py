"""The report of the torture: of one run, and of scenarios that were run again."""

import json

import pytest

from tests.torture import report
from tests.torture.run import Result


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPORT", tmp_path / "report.md")
    monkeypatch.setattr(report, "DATA", tmp_path / "report.json")


def text() -> str:
    return report.REPORT.read_text()


def test_a_scenario_that_is_run_again_replaces_its_row_and_says_so():
    bad = Result("Storm", "Many.", operations=5, problems=["two effects"])
    report.write([Result("Kills", "Some."), bad, Result("Soak", "Long.")], {"seed": "1"})
    assert "**Something did not hold.** 5 operations" in text()
    assert "Storm: two effects" in text()
    assert "## The run\n" in text()

    report.write_again([Result("Storm", "Many.", operations=7)], {"seed": "2"})

    assert "**Everything held.** 7 operations" in text()
    assert "two effects" not in text()
    assert "## Run 1: the others\n" in text()
    assert "## Run 2: Storm\n" in text()
    assert [r["name"] for r in json.loads(report.DATA.read_text())["results"]] == [
        "Kills",
        "Storm",
        "Soak",
    ]


def test_a_run_of_which_nothing_is_left_is_no_longer_told():
    report.write([Result("Kills", "Some.")], {"seed": "1"})
    report.write_again([Result("Kills", "Some.", lost=1)], {"seed": "2"})
    assert "Kills: 1 lost" in text()
    assert "| seed | 2 |" in text()
    assert "| seed | 1 |" not in text()
