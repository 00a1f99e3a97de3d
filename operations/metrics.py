"""What is counted and measured; docs/observability.md says what each metric means.

A call of prometheus-client costs one to three microseconds in the mode for several processes,
which writes to a shared file; a request of the hot path has a dozen in all. So values are
gathered in plain Python, at about a tenth of that, and handed over once a second (``flush``).

Every app may import this module; it imports none of theirs.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

FLUSH_SECONDS = 1.0

REGISTRY = CollectorRegistry()


class SummedHistogram(Histogram):
    """A histogram that takes many observations at once."""

    @property
    def bounds(self) -> Sequence[float]:
        return self._upper_bounds

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add ``counts[i]`` observations to the bucket ``i``, whose values sum up to ``total``."""
        self._raise_if_not_observable()
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)


class Tally(Protocol):
    """What was gathered of one metric with one set of labels; safe in any thread."""

    def flush(self) -> None: ...


class Count:
    __slots__ = ("_amount", "_child", "_lock")

    def __init__(self, child: Counter) -> None:
        self._child = child
        self._lock = Lock()
        self._amount: float = 0

    def add(self, amount: float = 1) -> None:
        with self._lock:
            self._amount += amount

    def flush(self) -> None:
        if self._amount:
            with self._lock:
                amount, self._amount = self._amount, 0
            self._child.inc(amount)


class Spread:
    __slots__ = ("_bounds", "_child", "_counts", "_lock", "_total")

    def __init__(self, child: SummedHistogram) -> None:
        self._child = child
        self._lock = Lock()
        self._bounds = child.bounds
        self._start()

    def _start(self) -> None:
        self._counts = [0] * len(self._bounds)
        self._total = 0.0

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value

    def observe_all(self, values: Iterable[float]) -> None:
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._total += value

    def flush(self) -> None:
        with self._lock:
            counts, total = self._counts, self._total
            if not any(counts):
                return
            self._start()
        self._child.add(counts, total)


Kind = TypeVar("Kind", Count, Spread)


class Tallied(Generic[Kind]):
    """A metric with labels: one tally per set of values, found by one look into a dict."""

    def __init__(self, metric: MetricWrapperBase, kind: Callable[[Any], Kind]) -> None:
        self._metric = metric
        self._kind: Callable[[Any], Kind] = kind
        self._children: dict[tuple[str, ...], Kind] = {}
        self._making = Lock()

    def of(self, *labels: str) -> Kind:
        child = self._children.get(labels)
        return child if child is not None else self._make(labels)

    def _make(self, labels: tuple[str, ...]) -> Kind:
        with self._making:
            if labels not in self._children:
                made = self._kind(self._metric.labels(*labels))
                _tallies.append(made)
                self._children[labels] = made
            return self._children[labels]


_tallies: list[Tally] = []


def flush() -> None:
    """Hand over what was gathered since the last time; every process does it once a second."""
    for tally in list(_tallies):
        tally.flush()


def count(name: str, meaning: str) -> Count:
    made = Count(Counter(name, meaning, registry=REGISTRY))
    _tallies.append(made)
    return made


def counts(name: str, meaning: str, *labels: str) -> Tallied[Count]:
    return Tallied(Counter(name, meaning, labels, registry=REGISTRY), Count)


def spread(name: str, meaning: str, buckets: Sequence[float]) -> Spread:
    made = Spread(SummedHistogram(name, meaning, buckets=buckets, registry=REGISTRY))
    _tallies.append(made)
    return made


def spreads(name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Tallied[Spread]:
    return Tallied(
        SummedHistogram(name, meaning, labels, buckets=buckets, registry=REGISTRY), Spread
    )


def gauge(name: str, meaning: str, mode: Any, *labels: str) -> Gauge:
    """Make a gauge; ``mode`` says how the values of several processes become one."""
    return Gauge(name, meaning, labels, multiprocess_mode=mode, registry=REGISTRY)


QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SLOW = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 300, 600, 1800, 3600)

request_seconds = spreads(
    "drops_http_request_seconds",
    "Time from a request's head to the end of its answer.",
    QUICK,
    *("lane", "method", "route", "status"),
)
claims = counts(
    "drops_claims",
    "Answers to reserve and purchase, by outcome.",
    *("action", "code", "lane"),
)
rate_limited = counts(
    "drops_rate_limited", "Requests and sockets refused for their number.", "action", "kind"
)

batch_claims = spread(
    "drops_batch_claims", "Claims settled in one transaction.", (1, 2, 4, 8, 16, 32, 64, 128, 256)
)
batch_seconds = spread("drops_batch_seconds", "Time a batch took, commit included.", QUICK)
queue_wait_seconds = spread(
    "drops_queue_wait_seconds", "Time that the first claim of a batch waited for it.", QUICK
)

hold_age_seconds = spreads(
    "drops_hold_age_seconds", "Age of a hold at its end, by how it ended.", SLOW, "end"
)
expiry_delay_seconds = spread(
    "drops_expiry_delay_seconds", "From a hold's deadline until its units were back.", SLOW
)

event_lag_seconds = spread(
    "drops_event_lag_seconds", "From an event's commit until its frame went to the sockets.", QUICK
)
frames_sent = count("drops_frames_sent", "Frames handed to sockets.")
frames_conflated = count(
    "drops_frames_conflated", "Events that a newer one of the drop made unnecessary to send."
)
frames_dropped = count("drops_frames_dropped", "Events left out for a socket that reads slowly.")
sockets = gauge("drops_sockets", "Open sockets and event streams.", "livesum")
sockets_used_ratio = gauge(
    "drops_sockets_used_ratio", "Sockets of the fullest process by its limit.", "livemax"
)
hub_behind_seconds = gauge(
    "drops_hub_behind_seconds",
    "Time since the hub that is furthest behind was last level with the event log.",
    "livemax",
)

pool_waits = count("drops_database_pool_waits", "Requests that had to wait for a connection.")
pool_wait_seconds = count("drops_database_pool_wait_seconds", "Time they waited, in sum.")
pool_timeouts = count("drops_database_pool_timeouts", "Requests that waited in vain.")
pool_connections = gauge(
    "drops_database_pool_connections", "Connections of the pools, by state.", "livesum", "state"
)
