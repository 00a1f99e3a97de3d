"""``manage.py rehearse`` against real servers: it says what is true, and leaves nothing behind."""

import json
import os
import signal
import time
import uuid
from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from config.ids import REHEARSAL_IDS
from drops.models import Drop, Variant
from drops.tests.factories import DropFactory
from operations.http_client import Server
from operations.management.commands import rehearse as command
from operations.rehearsals import create_rehearsal, discard_rehearsals
from operations.shoppers import Plan
from purchases.models import Purchase
from realtime.models import Event
from reservations.models import Reservation
from tests.identities import AUDIENCE, ISSUER, SECRETS, identity_mode, public_pem, token
from tests.servers import Process, WebServer
from users.models import User

pytestmark = pytest.mark.slow

TABLES = (Drop, Variant, Reservation, Purchase, Event, User)
SMALL = {"users": 60, "stock": 10, "ttl": 2, "watchers": 10, "arrive_seconds": 0.5}


def counts():
    return {model.__name__: model.objects.count() for model in TABLES}


def rehearse(server, **options):
    """Return the exit code and what the command printed, read as JSON."""
    out = StringIO()
    try:
        call_command("rehearse", url=server.url, json=True, stdout=out, **SMALL | options)
    except SystemExit as end:
        return end.code, json.loads(out.getvalue())
    return 0, json.loads(out.getvalue())


def broken(verdict):
    return {check["name"] for check in verdict["checks"] if not check["met"]}


@pytest.fixture(autouse=True)
def allowed_hosts(settings):
    # Django's test runner allows "testserver" alone.
    settings.ALLOWED_HOSTS = ["127.0.0.1", "localhost"]


@pytest.fixture
def start_server(transactional_db):
    servers = []

    def start(application="config.asgi:application", **environment):
        server = WebServer("uvicorn", application, **environment)
        servers.append(server)
        return server.wait_until_ready()

    yield start
    for server in servers:
        server.stop()


def test_a_working_installation_is_ready_and_nothing_is_left(web_servers, start_expiry):
    start_expiry()
    DropFactory()
    before = counts()

    code, verdict = rehearse(
        web_servers[0], users=150, stock=20, p99_ms=10_000, event_p99_ms=10_000
    )

    assert broken(verdict) == set()
    assert (code, verdict["ready"]) == (0, True)
    assert verdict["shoppers"] == 150
    # Who let a hold expire made room for others.
    assert verdict["confirmed"]["reservations"] >= 20
    assert verdict["stock"]["sold"] == verdict["confirmed"]["purchases"] > 0
    assert verdict["stored"]["reservations"] == verdict["confirmed"]["reservations"]
    assert verdict["requests"]["reserve"]["outcomes"]["201"] >= 20
    assert verdict["events"]["frames"] > 0
    assert counts() == before


def test_a_confirmed_purchase_that_is_not_stored_is_noticed(start_server, start_expiry):
    start_expiry()

    code, verdict = rehearse(start_server("tests.lying_asgi:confirms_without_storing"))

    assert (code, verdict["ready"]) == (1, False)
    assert "confirmed, but not in the database" in broken(verdict)
    assert Drop.objects.count() == User.objects.count() == 0


def test_a_watcher_that_is_shown_a_wrong_stock_is_noticed(start_server, start_expiry):
    start_expiry()

    code, verdict = rehearse(start_server("tests.lying_asgi:shows_one_unit_more"))

    assert code == 1
    assert "watchers that end with a wrong stock" in broken(verdict)


def test_errors_of_the_server_are_noticed(start_server, start_expiry):
    start_expiry()

    code, verdict = rehearse(start_server("tests.lying_asgi:fails_some"))

    assert code == 1
    assert "errors of the server" in broken(verdict)


def test_holds_that_nothing_gives_back_are_noticed(web_servers, monkeypatch):
    monkeypatch.setattr("operations.management.commands.rehearse.EXPIRY_GRACE_SECONDS", 0.0)

    # Nobody buys, nobody asks again, and no expiry loop runs.
    code, verdict = rehearse(web_servers[0], users=5, conversion=0.0)

    assert code == 1
    assert "holds not returned after their time" in broken(verdict)


def test_too_slow_is_not_ready(web_servers, start_expiry):
    start_expiry()

    code, verdict = rehearse(web_servers[0], p99_ms=1, event_p99_ms=60_000)

    assert code == 1
    assert "reserve, p99" in broken(verdict)


def test_rate_limits_are_named_as_what_limited_it(start_server, start_expiry):
    start_expiry()
    server = start_server(RATE_LIMIT_RESERVE_PER_ADDRESS="5/minute")

    code, verdict = rehearse(server, users=20)

    assert code == 1
    assert "requests given up on" in broken(verdict)
    assert any(reason.startswith("Rate limits: ") for reason in verdict["limited_by"])


def test_shoppers_are_signed_for_as_by_the_gateway(start_server, start_expiry):
    start_expiry()
    server = start_server(IDENTITY_MODE="gateway", GATEWAY_SECRETS=",".join(SECRETS))

    with identity_mode("gateway"):
        code, verdict = rehearse(server, p99_ms=10_000, event_p99_ms=10_000)

    assert (code, broken(verdict)) == (0, set())


def test_shoppers_have_tokens_where_the_key_is_a_shared_one(start_server, start_expiry):
    start_expiry()
    key = "a-key-that-both-sides-know-0123456789-0123456789"
    jwt = {"JWT_KEY": key, "JWT_AUDIENCE": "drops", "JWT_ISSUER": "https://id.example.com/"}
    server = start_server(IDENTITY_MODE="jwt", JWT_ALGORITHMS="HS256", **jwt)

    with identity_mode("jwt", JWT_ALGORITHMS=["HS256"], **jwt):
        code, verdict = rehearse(server, p99_ms=10_000, event_p99_ms=10_000)

    assert (code, broken(verdict)) == (0, set())


def test_with_public_keys_alone_it_asks_for_tokens(db):
    with identity_mode("jwt"), pytest.raises(CommandError, match="--tokens FILE") as error:
        call_command("rehearse")

    assert error.value.returncode == 2


def test_shoppers_are_test_accounts_where_tokens_are_given(start_server, start_expiry, tmp_path):
    start_expiry()
    accounts = [uuid.uuid4() for _ in range(8)]
    file = tmp_path / "tokens"
    file.write_text("\n".join(token(account) for account in accounts))
    server = start_server(
        IDENTITY_MODE="jwt",
        JWT_ALGORITHMS="RS256",
        JWT_KEY=public_pem(),
        JWT_AUDIENCE=AUDIENCE,
        JWT_ISSUER=ISSUER,
    )

    with identity_mode("jwt"):
        with pytest.raises(CommandError, match="tokens of 8 users only"):
            rehearse(server, tokens=file, users=9)
        code, verdict = rehearse(server, tokens=file, users=8, stock=4, p99_ms=10_000)

    assert (code, broken(verdict)) == (0, set())
    assert Drop.objects.count() == Reservation.objects.count() == Purchase.objects.count() == 0
    # They were somebody's before, so they stay.
    assert set(User.objects.values_list("pk", flat=True)) == set(accounts)


def test_a_token_that_is_not_valid_here_is_named(db, tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"{token(uuid.uuid4())}\nnonsense\n")

    with identity_mode("jwt"), pytest.raises(CommandError, match="token 2: The token is not valid"):
        call_command("rehearse", tokens=file, users=2)


def test_refuses_an_address_that_is_not_this_installations(db):
    with pytest.raises(CommandError, match="not in ALLOWED_HOSTS") as error:
        call_command("rehearse", url="https://shop.example.org")

    assert error.value.returncode == 2


def test_sends_nobody_where_another_installation_answers(transactional_db, start_server):
    server = start_server("tests.lying_asgi:knows_no_drop")

    with pytest.raises(CommandError, match="is not this installation") as error:
        rehearse(server)

    assert error.value.returncode == 2
    assert counts() == dict.fromkeys(counts(), 0)


def test_a_signal_stops_it_and_nothing_is_left(web_servers):
    before = counts()
    options = ["--users", "50", "--stock", "50", "--ttl", "60", "--url", web_servers[0].url]
    process = Process("manage.py", "rehearse", *options)
    try:
        deadline = time.monotonic() + 30
        while not Reservation.objects.exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # another process is to be caught in the middle
        process.send_signal(signal.SIGTERM)

        assert process.wait() == 130, process.log
    finally:
        process.stop()
    assert counts() == before


def test_who_presses_ctrl_c_twice_leaves_nothing_either(db, monkeypatch):
    before = counts()

    async def interrupted(*args):
        raise KeyboardInterrupt

    def discard():
        if Drop.objects.exists():
            os.kill(os.getpid(), signal.SIGINT)
        return discard_rehearsals()

    monkeypatch.setattr(command.Command, "run", interrupted)
    monkeypatch.setattr(command, "discard_rehearsals", discard)
    said = StringIO()

    with pytest.raises(SystemExit) as end:
        call_command("rehearse", stderr=said, **SMALL)

    assert (end.value.code, said.getvalue()) == (130, "Stopped; nothing is left behind.\n")
    assert counts() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_clean_removes_what_a_killed_rehearsal_left(db):
    DropFactory()
    before = counts()
    create_rehearsal(stock=5, hold_seconds=10, users=3)
    with pytest.raises(CommandError, match="rehearse --clean"):
        call_command("rehearse")

    out = StringIO()
    call_command("rehearse", clean=True, stdout=out)

    assert out.getvalue() == "Removed 1 rehearsal drop.\n"
    assert counts() == before
    assert not User.objects.filter(pk__range=REHEARSAL_IDS).exists()


@pytest.mark.parametrize(
    "url", ["ftp://localhost", "localhost:4000", "http://localhost/api", "http://"]
)
def test_an_address_is_scheme_and_host(url):
    with pytest.raises(ValueError, match="is not like"):
        Server.at(url)


def test_a_servers_addresses():
    assert Server.at("https://shop.example.com").url("ws") == "wss://shop.example.com"
    assert Server.at("http://[::1]:4000/").url("http") == "http://[::1]:4000"


def test_it_ends_by_itself_and_says_who_was_cut_short(web_servers, monkeypatch):
    monkeypatch.setattr(Plan, "longest_seconds", 2.0)

    code, verdict = rehearse(web_servers[0], users=10, stock=20, ttl=60, conversion=1.0)

    assert code == 1
    assert "shoppers whom the rehearsal's end cut short" in broken(verdict)
    assert Drop.objects.count() == 0
