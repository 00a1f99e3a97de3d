"""The capacity model's arithmetic, and that the documents show what it says."""

import re
from dataclasses import fields, replace

import pytest

from benchmarks.capacity import EXAMPLES, Costs, Sale, main, needs_of, table
from benchmarks.proxies import find
from benchmarks.report import figure
from benchmarks.scaling import FIGURES, read_arguments
from benchmarks.stack import BASE_DIR

COSTS = Costs(
    reserve_web_ms=0.5,
    reserve_postgres_ms=0.1,
    reserve_redis_ms=0.02,
    purchase_web_ms=1.0,
    purchase_postgres_ms=0.2,
    refusal_web_ms=0.1,
    refusal_postgres_ms=0.01,
    list_web_ms=0.2,
    list_postgres_ms=0.0,
    frame_web_ms=0.01,
    drop_reserves_per_second=2000,
    reservation_bytes=500,
    purchase_bytes=300,
    event_bytes=400,
    wal_bytes_per_reserve=1000,
    redis_bytes_per_signature=100,
    socket_kib=20,
    process_mb=100,
)
SALE = Sale(users=10_000, drops=2, seconds=10, stock=1000, paying=0.5)


def test_adds_up_what_a_sale_takes():
    needs = needs_of(SALE, COSTS)

    # Reserves, refusals, purchases, lists, and 10 frames a second for each socket.
    web_ms = 1000 * 0.5 + 9000 * 0.1 + 500 * 1.0 + 10_000 * 0.2 + 10_000 * 10 * 10 * 0.01
    assert needs.web_cores == pytest.approx(web_ms / 10_000)
    assert needs.postgres_cores == pytest.approx((1000 * 0.1 + 9000 * 0.01 + 500 * 0.2) / 10_000)
    assert (needs.processes, needs.processes_for) == (3, "CPU")
    assert needs.connections == 3 * 12 + 2
    assert needs.web_gb == pytest.approx((3 * 100 + 10_000 * 20 / 1024) / 1024)
    assert needs.disk_mb == pytest.approx((1000 * 500 + 500 * 300 + 2000 * 400) / 1e6)
    assert needs.wal_mb_per_second == pytest.approx(0.15)
    assert needs.redis_mb == pytest.approx(1.05)
    assert needs.lock_busy == pytest.approx(1000 / 2 / 10 / 2000)


def test_sockets_get_no_more_frames_than_there_are_events():
    # 0.5 events a second of each drop.
    slow = replace(SALE, seconds=2000)

    assert needs_of(slow, COSTS).web_cores == pytest.approx(
        (500 + 900 + 500 + 2000 + 10_000 * 0.5 * 2000 * 0.01) / 2_000_000
    )


@pytest.mark.parametrize(
    ("users", "seconds", "processes", "because"),
    [(100, 60, 2, "the spare"), (50_000, 3600, 10, "sockets")],
)
def test_names_what_the_number_of_processes_comes_from(users, seconds, processes, because):
    needs = needs_of(Sale(users, 1, seconds, 10), replace(COSTS, frame_web_ms=0))

    assert (needs.processes, needs.processes_for) == (processes, because)


def test_the_command_prints_the_needs_by_the_measured_costs(capsys):
    main(["--users", "5000", "--seconds", "60", "--stock", "500"])

    assert capsys.readouterr().out == table({"this": Sale(5000, 1, 60, 500)}, Costs.read()) + "\n"


def test_the_document_shows_the_measured_costs_and_their_table():
    text, costs = FIGURES.read_text(), Costs.read()

    assert table(EXAMPLES, costs) in text
    for field in fields(costs):
        assert f"| `{field.name}` | {getattr(costs, field.name):g} |" in text


def test_the_check_in_the_document_is_of_the_measured_costs():
    """Of one process the prediction is what its own CPU allows, here as there."""
    found = re.search(r"^\| 1 process, 1 drop \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$",
                      FIGURES.read_text(), re.MULTILINE)  # fmt: skip

    assert found is not None
    predicted, measured = (float(found[n].replace(",", "")) for n in (1, 2))
    assert predicted <= round(1000 / Costs.read().reserve_web_ms) + 1
    assert found[3] == figure(measured / predicted)


def test_the_formulas_name_every_cost():
    text = (BASE_DIR / "docs/scaling.md").read_text()

    for field in fields(Costs):
        name = field.name
        assert (
            f"`{name}`" in text
            or name.endswith(("_postgres_ms", "_redis_ms"))
            or (name == "wal_bytes_per_reserve")
        )


def test_a_quick_run_is_one_short_repeat():
    quick, full = read_arguments(["--quick"]), read_arguments([])

    assert (quick.repeats, quick.seconds) == (1, 1)
    assert (full.repeats, full.seconds) == (3, 3)


def test_programs_are_found_where_debian_puts_them(monkeypatch):
    monkeypatch.setattr("benchmarks.proxies.PLACES", "/nowhere")

    assert find("pgbouncer") is None
