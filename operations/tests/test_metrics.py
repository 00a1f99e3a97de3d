import asyncio
import os
import re
import threading
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from django.conf import settings as project
from django.core.management import call_command
from django.utils import timezone
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from config.problems import RateLimited
from config.rate_limits import Limit
from drops.tests.factories import DropFactory
from operations import exposition, metrics
from operations.metrics import Count, Spread, SummedHistogram
from operations.requests import RequestLog
from purchases.services import purchase
from realtime.conflation import Outbox
from realtime.frames import EventFrame
from realtime.hub import Feed, Hub
from realtime.models import EventType
from reservations.models import Reservation
from reservations.services import Claim, expire_all_due, reserve
from tests.hot import hot_lane, viewset_lane
from tests.servers import WebServer, running_web_servers
from users.tests.factories import UserFactory

TOKEN = "a-token-of-thirty-two-characters"


def read(text: bytes | str) -> dict[tuple[str, frozenset], float]:
    """Return the value of each sample by its name and labels."""
    text = text.decode() if isinstance(text, bytes) else text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples, name, **labels) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


@contextmanager
def growth():
    """Give a function that says by how much a sample has grown within the block."""
    metrics.flush()
    before = read(exposition.generate_latest(metrics.REGISTRY))

    def grown(name, **labels):
        metrics.flush()
        after = read(exposition.generate_latest(metrics.REGISTRY))
        return value(after, name, **labels) - value(before, name, **labels)

    yield grown


# --- Who may see them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_debug", "token", "authorization", "status"),
    [
        (True, "", "", 200),
        (False, "", "", 404),
        (False, "", f"Bearer {TOKEN}", 404),
        (False, TOKEN, "", 401),
        (False, TOKEN, f"Bearer {TOKEN}x", 401),
        (False, TOKEN, TOKEN, 401),
        (False, TOKEN, "Bearer tökén", 401),
        (False, TOKEN, f"Bearer {TOKEN}", 200),
        (True, TOKEN, "", 401),
    ],
)
@pytest.mark.django_db(transaction=True)
def test_metrics_are_shown_to_who_has_the_token(
    client, settings, is_debug, token, authorization, status
):
    settings.DEBUG, settings.METRICS_TOKEN = is_debug, token

    response = client.get("/metrics", HTTP_AUTHORIZATION=authorization, HTTP_HOST="10.0.0.1")

    assert response.status_code == status
    assert (b"drops_database_up" in response.content) == (status == 200)


# --- Gathering ----------------------------------------------------------------------------


def test_a_spread_is_what_the_histogram_itself_would_have_counted():
    values = [0.0, 0.1, 0.1000001, 0.5, 1.0, 7.0, 7.5]
    plain, gathered = CollectorRegistry(), CollectorRegistry()
    bounds = (0.1, 0.5, 1.0, 7.0)
    histogram = SummedHistogram("h", "", buckets=bounds, registry=plain)
    for one in values:
        histogram.observe(one)
    spread = Spread(SummedHistogram("h", "", buckets=bounds, registry=gathered))
    spread.observe_all(values)

    spread.flush()
    spread.flush()

    def shown(registry):
        samples = read(exposition.generate_latest(registry))
        return {key: round(v, 6) for key, v in samples.items() if "created" not in key[0]}

    assert shown(gathered) == shown(plain)


def test_nothing_is_lost_between_threads():
    registry = CollectorRegistry()
    counter = metrics.Counter("c", "", registry=registry)
    gathered = Count(counter)
    stop = threading.Event()

    def flush():
        while not stop.is_set():
            gathered.flush()

    flusher = threading.Thread(target=flush)
    adders = [
        threading.Thread(target=lambda: [gathered.add() for _ in range(5000)]) for _ in range(4)
    ]
    flusher.start()
    for thread in adders:
        thread.start()
    for thread in adders:
        thread.join()
    stop.set()
    flusher.join()
    gathered.flush()

    assert registry.get_sample_value("c_total") == 20_000


# --- What is counted ------------------------------------------------------------------------


@pytest.mark.parametrize(("lane", "name"), [(hot_lane, "hot"), (viewset_lane, "viewset")])
@pytest.mark.django_db(transaction=True)
def test_counts_the_outcomes_of_claims_in_both_lanes(lane, name):
    drop, user = DropFactory(total_stock=1), UserFactory()
    address = f"/api/drops/{drop.pk}"

    async def ask(application):
        await application.post(f"{address}/reserve", user)
        await application.post(f"{address}/reserve", user)
        await application.post(f"{address}/reserve", UserFactory.build())
        await application.post(f"{address}/purchase", user)
        await application.post(f"{address}/purchase", user)
        await application.post(f"{address}/purchase", user, None, Idempotency_Key="a b")
        await application.post(f"/api/drops/{uuid.uuid4()}/reserve", user)

    with growth() as grown, lane() as application:
        application.application = RequestLog(application.application, None)
        asyncio.run(ask(application))

    def claims(action, code):
        return grown("drops_claims_total", action=action, code=code, lane=name)

    assert claims("reserve", "created") == 1
    assert claims("reserve", "repeated") == 1
    assert claims("reserve", "fully_reserved") == 1
    assert claims("reserve", "not_found") == 1
    assert claims("purchase", "created") == 1
    assert claims("purchase", "repeated") == 2
    labels = {"lane": name, "method": "POST", "route": "/api/drops/{id}/reserve"}
    assert grown("drops_http_request_seconds_count", status="201", **labels) == 1
    assert grown("drops_http_request_seconds_count", status="409", **labels) == 1
    if name == "hot":
        assert grown("drops_batch_claims_count") > 0
        assert grown("drops_batch_claims_sum") == 7
        assert grown("drops_queue_wait_seconds_count") == grown("drops_batch_seconds_count")


@pytest.mark.django_db(transaction=True)
def test_measures_how_holds_end():
    drop, user = DropFactory(total_stock=3), UserFactory()
    for somebody in (user, UserFactory()):
        reserve(drop.pk, Claim(somebody.pk))

    with growth() as grown:
        purchase(drop.pk, user.pk)
        now = timezone.now()
        Reservation.objects.active().update(
            created_at=now - timedelta(seconds=70), expires_at=now - timedelta(seconds=10)
        )
        expire_all_due()

    assert grown("drops_hold_age_seconds_count", end="purchase") == 1
    assert grown("drops_hold_age_seconds_count", end="expiry") == 1
    assert 70 <= grown("drops_hold_age_seconds_sum", end="expiry") < 75
    assert 10 <= grown("drops_expiry_delay_seconds_sum") < 15


@pytest.mark.django_db(transaction=True)
def test_tells_what_the_last_audit_found(client):
    drop = DropFactory(total_stock=3)
    call_command("audit_stock")
    assert value(read(client.get("/metrics").content), "drops_audit_differences") == 0

    type(drop).objects.filter(pk=drop.pk).update(available_stock=1)
    with pytest.raises(SystemExit):
        call_command("audit_stock", "--json")
    samples = read(client.get("/metrics").content)

    assert value(samples, "drops_audit_differences") > 0
    assert value(samples, "drops_audit_age_seconds") < 60
    assert value(samples, "drops_database_up") == 1
    assert value(samples, "drops_expiry_loops") == 0


def test_says_that_the_database_is_away_and_nothing_it_does_not_know(monkeypatch):
    silent = {"database": "failing", "migrations": "unknown", "expiry": "unknown", "redis": "ok"}
    monkeypatch.setattr("operations.health.check", lambda: silent)

    samples = read(exposition.exposition())

    assert value(samples, "drops_database_up") == 0
    assert value(samples, "drops_redis_up") == 1
    assert not [name for name, _ in samples if name.startswith("drops_expiry_lag")]


def test_every_name_is_explained():
    text = (project.BASE_DIR / "docs/observability.md").read_text()
    explained = set(re.findall(r"^\| `(drops_\w+)`", text, re.M))
    assert explained == metric_names()


def metric_names() -> set[str]:
    """Return the names of all metrics, as queries begin with them."""
    counted = {
        f"{metric.name}_total" if metric.type == "counter" else metric.name
        for metric in metrics.REGISTRY.collect()
    }
    at_scrape = re.findall(r'"(drops_\w+)"', Path(exposition.__file__).read_text())
    return counted | set(at_scrape)


# --- Several processes ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.django_db(transaction=True)
def test_processes_of_one_machine_tell_what_all_of_them_counted(tmp_path):
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "METRICS_TOKEN": TOKEN}
    drop = DropFactory(total_stock=50)
    servers = [WebServer("uvicorn", **environment), WebServer("daphne", **environment)]

    with running_web_servers(*servers), httpx.Client(trust_env=False) as web:
        for number in range(10):
            answer = web.post(
                f"{servers[number % 2].url}/api/drops/{drop.pk}/reserve",
                headers={"X-User-Id": str(uuid.uuid4())},
            )
            assert answer.status_code == 201

        def scrape(server):
            headers = {"Authorization": f"Bearer {TOKEN}"}
            return read(web.get(f"{server.url}/metrics", headers=headers).text)

        created = {"action": "reserve", "code": "created", "lane": "hot"}
        # Each process hands over what it counted once a second.
        threading.Event().wait(1.5)
        seen = [value(scrape(server), "drops_claims_total", **created) for server in servers]
        most = value(scrape(servers[0]), "drops_database_pool_connections", state="most")
        servers[1].send_signal(9)
        servers[1].wait()
        after = scrape(servers[0])

    assert seen == [10, 10]
    # What a process counted outlives it; what it held does not.
    assert value(after, "drops_claims_total", **created) == 10
    assert most == 2 * value(after, "drops_database_pool_connections", state="most") > 0


@pytest.mark.slow
@pytest.mark.servers
def test_the_expiry_loop_has_a_port_for_its_own(start_expiry):
    from tests.servers import free_port

    port = free_port()
    loop = start_expiry(EXPIRY_METRICS_PORT=str(port), METRICS_TOKEN=TOKEN)
    loop.wait_for_line("stop with Ctrl-C")

    with httpx.Client(trust_env=False, base_url=f"http://127.0.0.1:{port}") as web:
        refused = web.get("/metrics")
        shown = web.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        other = web.get("/", headers={"Authorization": f"Bearer {TOKEN}"})

    assert (refused.status_code, shown.status_code, other.status_code) == (401, 200, 404)
    assert "drops_expiry_delay_seconds_bucket" in shown.text


def test_up_shares_a_folder_and_removes_it(settings, monkeypatch):
    from contextlib import ExitStack

    from config.management.commands.up import share_metrics

    settings.METRICS_DIR = ""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with ExitStack() as stack:
        share_metrics(stack)
        folder = os.environ["PROMETHEUS_MULTIPROC_DIR"]
        assert os.path.isdir(folder)

    assert not os.path.exists(folder)
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


# --- Sockets --------------------------------------------------------------------------------


DROP_ID = "00000000-0000-4000-8000-00000000000d"


def test_counts_what_is_left_out_for_the_newest():
    def frame(seq):
        return EventFrame(DROP_ID, seq, EventType.STOCK_UPDATED, datetime.now(UTC), {})

    class Listener:
        def offer(self, frame, prev, message, *, is_early=False): ...

    async def turn():
        hub = Hub()
        feed = hub._feeds[DROP_ID] = Feed(0)
        hub.watch(Listener(), DROP_ID)
        hub.watch(Listener(), DROP_ID)
        hub._pass_on(
            DROP_ID, [(seq, EventType.STOCK_UPDATED, datetime.now(UTC), {}) for seq in (1, 2)]
        )
        await hub._take_turn(DROP_ID)
        return feed.sent

    with growth() as grown:
        assert asyncio.run(turn()) == 2
        outbox = Outbox()
        for seq in (1, 2, 3):
            outbox.add(frame(seq), seq - 1)
        assert outbox.pop() is not None

    assert grown("drops_frames_sent_total") == 2
    assert grown("drops_frames_conflated_total") == 1
    assert grown("drops_frames_dropped_total") == 2
    assert grown("drops_event_lag_seconds_count") == 1


def test_counts_who_was_refused_for_their_number():
    limit = Limit("reserve", "address", "1/minute")
    with growth() as grown:
        raised = limit.refusal(3)

    assert isinstance(raised, RateLimited)
    assert grown("drops_rate_limited_total", action="reserve", kind="address") == 1
