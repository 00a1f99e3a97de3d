import math

import pytest

from benchmarks.client import percentile
from benchmarks.load import GeneratorError, parse_pgbench, parse_wrk
from benchmarks.users import user_id

WRK = """Running 2s test @ http://127.0.0.1:4000/
  1 threads and 128 connections
Requests/sec:   4961.55
{"seconds": 2.000000, "answers": {"201": 9000, "503": 3}, "socket_errors": 1, "body_bytes": 397, \
"p50_us": 24300, "p99_us": 35800, "p999_us": 36600}
"""
PGBENCH = """pgbench (18.4)
query mode: prepared
number of transactions actually processed: 4977
number of failed transactions: 0 (0.000%)
latency average = 0.401 ms
tps = 2488.123456 (without initial connection time)
"""


def test_reads_what_wrk_counted():
    load = parse_wrk(WRK)

    assert load.count("201") / load.seconds == 4500
    assert (load.p50_ms, load.p99_ms, load.p999_ms) == (24.3, 35.8, 36.6)
    assert load.unexpected("201") == {"503": 3, "socket errors": 1}


def test_refuses_a_run_of_wrk_without_figures():
    with pytest.raises(GeneratorError, match="unable to connect"):
        parse_wrk("unable to connect to 127.0.0.1:4000 Connection refused\n")


def test_reads_the_rate_of_pgbench():
    done = parse_pgbench(PGBENCH)

    assert (done.count, done.per_second) == (4977, 2488.123456)


def test_refuses_a_run_of_pgbench_with_failures():
    with pytest.raises(GeneratorError):
        parse_pgbench(PGBENCH.replace("failed transactions: 0", "failed transactions: 7"))


def test_takes_the_nearest_rank_as_percentile():
    assert percentile([3, 1, 2, 4], 50) == 2
    assert percentile(range(1, 101), 99) == 99
    assert math.isnan(percentile([], 99))


def test_users_have_ids_in_no_order_and_all_different():
    ids = [user_id(number) for number in range(1, 10_001)]

    assert ids[0] == "9e3779b1-0000-4000-8000-000000000001"
    assert len({user[:8] for user in ids}) == 10_000
