import pytest

from benchmarks.profiling import busiest
from benchmarks.report import figure, from_json, to_json, to_markdown, verdict
from benchmarks.results import Goal, Result, Run, ratios


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.4, 1.2, 9.0], "**not met**"),
        ([1.6, 1.5, 1.4], "met"),
        ([2.4, 2.6, 2.5], "met, and the stretch"),
    ],
)
def test_judges_by_the_median(values, expected):
    assert verdict(Goal("reserve ÷ L1", values, "at least", 1.5, 2.5)) == expected


def test_an_exact_goal_must_be_reached_in_every_repeat():
    assert Goal("winners", [500, 500], "exactly", 500).is_met
    assert not Goal("winners", [500, 499, 500], "exactly", 500).is_met


def test_takes_ratios_repeat_by_repeat():
    rows = {"a": [Run(per_second=10), Run(per_second=30)], "b": [Run(per_second=5)] * 2}

    assert ratios(rows, "a", "b") == [2, 6]


def test_shows_three_digits():
    assert [figure(x) for x in (0.1834, 12.34, 5043.9, None)] == ["0.183", "12.3", "5,044", "–"]


def test_writes_goals_runs_and_problems():
    result = Result(
        "herd",
        "The herd",
        "Many users.",
        {"uvicorn": [Run(per_second=5000, p99_ms=20), Run(per_second=6000, p99_ms=40)]},
        [Goal("everybody answered", [1.5, 0.9], "at most", 2, 1, " s")],
        problems=["audit: something"],
    )

    text = to_markdown([result], {"cores": "2"})

    assert "| everybody answered | **1.20 s** | 0.900 to 1.50 | ≤ 2 s | ≤ 1 s | met |" in text
    assert "| uvicorn | 5,500 (5,000 to 6,000) | – | 30.0 | – | – | – | – |" in text
    assert "- audit: something" in text
    assert from_json(to_json([result], {})) == [result]


def test_sums_up_a_profile():
    text = busiest("main (a.py);run (b.py) 3\nmain (a.py) 1\n")

    assert text.splitlines()[3:] == [
        " 75.0%   75.0%  run (b.py)",
        " 25.0%  100.0%  main (a.py)",
    ]
