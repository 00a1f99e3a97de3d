"""``/metrics``: what all processes of this machine count, and what the database knows."""

import logging
import os
import threading
from collections.abc import Iterator
from hmac import compare_digest
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from django.conf import settings
from django.db import DatabaseError, connection
from django.http import Http404, HttpRequest, HttpResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from psycopg_pool import PoolTimeout

from operations import health, heartbeats, metrics
from realtime.hub import seconds_behind
from realtime.limits import open_connections
from reservations.services import seconds_overdue

logger = logging.getLogger(__name__)

AUDIT = "audit_stock"


def metrics_view(request: HttpRequest) -> HttpResponse:
    """Show the metrics to whoever has the token; in DEBUG, without a token, to everybody.

    Raises:
        Http404: outside DEBUG where no token is set, there is no such page.
    """
    if not settings.METRICS_TOKEN and not settings.DEBUG:
        raise Http404
    if not is_allowed(request.headers.get("Authorization", "")):
        return HttpResponse(
            "The token is missing or wrong.\n",
            status=401,
            content_type="text/plain",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return HttpResponse(
        exposition(), content_type=CONTENT_TYPE_LATEST, headers={"Cache-Control": "no-store"}
    )


def is_allowed(authorization: str) -> bool:
    expected = f"Bearer {settings.METRICS_TOKEN}"
    return not settings.METRICS_TOKEN or compare_digest(authorization.encode(), expected.encode())


def exposition() -> bytes:
    """Return all metrics in Prometheus' format."""
    installation = CollectorRegistry()
    installation.register(Installation())
    return generate_latest(processes()) + generate_latest(installation)


def processes() -> CollectorRegistry:
    """Return what this process counts, or all processes that share ``METRICS_DIR``."""
    if not settings.METRICS_DIR:
        metrics.flush()
        return metrics.REGISTRY
    forget_the_dead(Path(settings.METRICS_DIR))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, settings.METRICS_DIR)
    return registry


def forget_the_dead(folder: Path) -> None:
    """Remove the gauges of processes that are gone; what they counted stays counted.

    No server tells us when one of its workers has died.
    """
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not is_running(pid):
            multiprocess.mark_process_dead(pid, str(folder))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Installation(Collector):
    """What is true of all machines together, read when somebody asks.

    While the database is away, only that is said.
    """

    def collect(self) -> Iterator[GaugeMetricFamily]:
        states = health.check()
        yield gauge("drops_database_up", "1 while the database answers.", is_ok(states, "database"))
        yield gauge("drops_redis_up", "1 while Redis answers.", is_ok(states, "redis"))
        if states["migrations"] != health.OK:
            return
        try:
            yield from self._stored()
        except (DatabaseError, PoolTimeout) as exc:
            logger.warning("metrics of the database are missing: %s", exc)
        finally:
            connection.close()

    def _stored(self) -> Iterator[GaugeMetricFamily]:
        yield gauge(
            "drops_expiry_lag_seconds",
            "How long the oldest overdue hold has been waiting for an expiry loop.",
            seconds_overdue(),
        )
        signs = heartbeats.read(health.HEARTBEAT_SECONDS)
        expiry = signs.get(health.EXPIRY)
        yield gauge("drops_expiry_loops", "Living expiry loops.", expiry.alive if expiry else 0)
        if expiry is not None:
            yield gauge(
                "drops_expiry_heartbeat_age_seconds",
                "Age of the newest heartbeat of an expiry loop.",
                expiry.age_seconds,
            )
        if audit := signs.get(AUDIT):
            yield gauge(
                "drops_audit_differences",
                "What the last whole audit_stock found to differ.",
                audit.differences or 0,
            )
            yield gauge("drops_audit_age_seconds", "Time since that audit.", audit.age_seconds)


def gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value=value)


def is_ok(states: dict[str, str], name: str) -> int:
    return int(states[name] == health.OK)


# --- Sampled once a second in each web process --------------------------------------------


def sample_sockets() -> None:
    metrics.sockets.set(open_connections.total)
    metrics.sockets_used_ratio.set(open_connections.total / settings.SOCKETS_PER_PROCESS)
    metrics.hub_behind_seconds.set(seconds_behind())


def sample_pool() -> None:
    """Add what happened at the pool since the last time."""
    pool = connection.pool  # type: ignore[attr-defined]
    if pool is None:
        return
    stats = pool.pop_stats()
    metrics.pool_waits.add(stats.get("requests_queued", 0))
    metrics.pool_wait_seconds.add(stats.get("requests_wait_ms", 0) / 1000)
    metrics.pool_timeouts.add(stats.get("requests_errors", 0))
    idle = stats.get("pool_available", 0)
    metrics.pool_connections.labels("idle").set(idle)
    metrics.pool_connections.labels("used").set(stats.get("pool_size", 0) - idle)
    metrics.pool_connections.labels("most").set(pool.max_size)


SAMPLERS = (sample_sockets, sample_pool)


# --- Processes without a web server -------------------------------------------------------


class QuietHandler(WSGIRequestHandler):
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: each scrape would be a line."""


def serve_metrics(port: int) -> None:
    """Serve this process's metrics on a port of their own, from a thread, under the token."""
    from django.core.handlers.wsgi import WSGIRequest

    def application(environ: dict, start_response: Any) -> list[bytes]:
        request = WSGIRequest(environ)
        try:
            if request.path != "/metrics":
                raise Http404
            response = metrics_view(request)
        except Http404:
            response = HttpResponse("Not found\n", status=404, content_type="text/plain")
        start_response(f"{response.status_code} {response.reason_phrase}", [*response.items()])
        return [response.content]

    server = make_server("0.0.0.0", port, application, handler_class=QuietHandler)  # noqa: S104
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
