import json
import math
import socket
import subprocess
import sys

import pytest

from benchmarks.stack import free_port, listens
from benchmarks.watchers import Histogram, split


def text(payload: bytes) -> bytes:
    """Return a frame as a server sends it."""
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65_536:
        return bytes((0x81, 126)) + size.to_bytes(2) + payload
    return bytes((0x81, 127)) + size.to_bytes(8) + payload


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_splits_frames_of_every_length(size):
    payload = b"x" * size

    assert split(text(payload) + text(b"next")) == ([(1, payload), (1, b"next")], b"")


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 100])
def test_keeps_what_is_not_a_whole_frame(cut):
    frame = text(b"x" * 200)

    assert split(text(b"first") + frame[:cut]) == ([(1, b"first")], frame[:cut])


def test_a_histogram_counts_times_and_spans():
    histogram = Histogram()
    assert math.isnan(histogram.percentile_ms(99))
    for milliseconds in range(1, 101):
        histogram.add(milliseconds / 1000)
    assert histogram.percentile_ms(99) == pytest.approx(99, abs=0.2)
    assert histogram.percentile_ms(50) == pytest.approx(50, abs=0.2)

    spans = Histogram()
    spans.add_span(0.0, 0.050)
    spans.add_span(0.0, 0.050)
    assert spans.percentile_ms(50) == pytest.approx(25, abs=0.2)
    assert spans.percentile_ms(99) == pytest.approx(49.5, abs=0.2)


def test_sockets_see_each_change_of_the_bare_server():
    port, control_port = free_port(), free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.broadcast", str(port), str(control_port)]
    )
    try:
        while not (listens(port) and listens(control_port)):
            assert server.poll() is None
        plan = {"port": port, "path": "/", "sockets": 5, "changes": 3}
        plan |= {"post_port": control_port, "post_path": "/1"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.watchers", json.dumps(plan)],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    finally:
        server.terminate()
        server.wait()

    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert len(report["answers_ms"]) == len(report["last_ms"]) == 3
    assert report["seqs"] == [3, 3]
    assert report["stocks"] == [9_999_997, 9_999_997]
    assert (report["gaps"], report["repeats"], report["closed"]) == (0, 0, 0)


def test_sockets_that_can_not_connect_end_the_run():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    plan = {"port": port, "path": "/", "sockets": 1, "changes": 1}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.watchers", json.dumps(plan)],
        capture_output=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 1
