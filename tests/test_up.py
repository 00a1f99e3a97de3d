"""``manage.py up`` with several web processes."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from django.core.management import CommandError, call_command

from config.management.commands import up
from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.models import Purchase
from tests.servers import Up, running_web_servers
from users.models import User
from users.tests.factories import UserFactory

SHOPPERS_PER_WORKER = 5


def descendants(pid: int) -> list[int]:
    """Return the processes under ``pid``, parents before their children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [found for child in children for found in (child, *descendants(child))]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def is_running(pid: int) -> bool:
    """Say whether a process runs; one that ended may wait for its parent to notice."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


@contextmanager
def halted(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.django_db(transaction=True)
def test_each_of_two_workers_sells_and_all_end_together():
    drop = DropFactory(total_stock=100)
    bought = set()

    with running_web_servers(Up("uvicorn", "--workers", "2")) as (server,):
        server.wait_for_line("Ctrl-C stops everything.")
        processes = descendants(server.pid)
        workers = [pid for pid in processes if "spawn_main" in command_line(pid)]
        assert len(workers) == 2
        assert any("expire_reservations" in command_line(pid) for pid in processes)
        for other in workers:
            # So whoever is served now is served by the one that is left.
            with halted(other):
                for user in UserFactory.create_batch(SHOPPERS_PER_WORKER):
                    headers = {"X-User-Id": str(user.pk)}
                    address = f"{server.url}/api/drops/{drop.pk}"
                    # Connections of their own, so that no answer waits for the halted one.
                    with httpx.Client(trust_env=False, timeout=20, headers=headers) as client:
                        assert client.post(f"{address}/reserve").status_code == 201
                        purchase = client.post(f"{address}/purchase")
                    assert purchase.status_code == 201
                    bought.add(purchase.json()["id"])
        assert len(bought) == 2 * SHOPPERS_PER_WORKER
        server.send_signal(signal.SIGTERM)

        assert server.wait(30) == 0, server.log
        assert "Traceback" not in server.log
        assert not [command_line(pid) for pid in processes if is_running(pid)]

    assert {str(pk) for pk in Purchase.objects.values_list("pk", flat=True)} == bought
    drop.refresh_from_db()
    assert (drop.available_stock, drop.sold_stock) == (100 - len(bought), len(bought))
    assert audit_stock().differences == []


@pytest.mark.parametrize("command", ["up", "serve"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"server": "daphne", "workers": 2},
            "daphne runs one process; for several use --server uvicorn.",
        ),
        ({"server": "uvicorn", "workers": 0}, "--workers must be 1 or more."),
        ({"server": "daphne", "workers": -1}, "--workers must be 1 or more."),
    ],
)
def test_refuses_workers_that_a_server_cannot_have(command, options, message):
    with pytest.raises(CommandError) as refused:
        call_command(command, **options)

    assert str(refused.value) == message


@pytest.mark.parametrize("command", ["up", "serve"])
@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_refuses_what_is_no_port(command, port):
    with pytest.raises(CommandError, match=r"argument --port: must be from 1 to 65535"):
        call_command(command, f"--port={port}")


def test_says_why_nobody_can_listen_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=rf"^Port {port} is taken\."):
            call_command("up", "--port", str(port))

    # An address that is nobody's (RFC 5737).
    with pytest.raises(CommandError, match=r"^Nobody can listen on 192\.0\.2\.1, port 4000: cann"):
        call_command("up", "--host", "192.0.2.1", "--port", "4000")


@pytest.mark.django_db(transaction=True)
def test_demo_data_leaves_alone_who_is_there_before_the_first_drop(settings):
    settings.DEBUG = True
    User.objects.create_superuser("me", password="mine")

    up.Command().prepare_database()

    assert Drop.objects.exists()
    assert User.objects.get(username="me").check_password("mine")
