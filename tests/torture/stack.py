"""The servers that are tortured, and what can be done to them."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import redis

from benchmarks.processes import tree
from benchmarks.stack import TABLES, Stack
from benchmarks.users import CREATE_USERS

PATIENCE_SECONDS = 30
# Rate limits that are kept in Redis, for scenarios in which it fails.
LIMITED = {f"RATE_LIMIT_{action}": "60/minute" for action in ("RESERVE", "PURCHASE", "SOCKET")}


class TortureStack(Stack):
    """A throwaway PostgreSQL that writes each commit out, and a Valkey behind a cable."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Few users ask very often here; see ``LIMITED`` for where that is tried as well.
        self.environment |= dict.fromkeys(LIMITED, "off")

    def __enter__(self) -> "TortureStack":
        super().__enter__()
        self.cable = Cable(self._servers.redis_url.removeprefix("unix://"))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cable.close()
        super().__exit__(*exc_info)

    def empty(self) -> None:
        self.execute(f"TRUNCATE {TABLES}, users_user RESTART IDENTITY CASCADE")

    def populate(self) -> None:
        """Leave nothing but the numbered users."""
        self.empty()
        self.execute(CREATE_USERS, first=1, last=self.users)

    def connect(self, name: str | None = None) -> psycopg.Connection:
        return psycopg.connect(
            host=self.database["HOST"],
            port=self.database["PORT"],
            user=self.database["USER"],
            dbname=name or self.database["NAME"],
            autocommit=True,
        )

    def reconnect(self) -> None:
        """Forget all connections of this process: the database was restarted."""
        from django.db import connection

        connection.close()
        connection.close_pool()  # type: ignore[attr-defined]
        self._sql.close()
        self._sql = wait_for(self.connect, psycopg.OperationalError)

    # --- PostgreSQL ---------------------------------------------------------------------

    def restart_postgres(self) -> None:
        self._servers.restart_postgres("immediate")

    def stop_postgres(self) -> None:
        self._servers._postgres.stop(signal.SIGQUIT)

    def start_postgres(self) -> None:
        self._servers._postgres.start(self.postgres_bin / "postgres", lambda message: None)

    @contextmanager
    def postgres_frozen(self) -> Iterator[None]:
        """Stop every process of PostgreSQL in its tracks; connections stay open."""
        pids = tree(self.postgres_pid)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def terminate_backends(self) -> int:
        """End every connection but this one; return how many there were."""
        return len(
            self.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )

    @contextmanager
    def connections_used_up(self) -> Iterator[None]:
        """Take every connection there is, those of the web processes included."""
        taken: list[psycopg.Connection] = []
        is_over = threading.Event()

        def take() -> None:
            while not is_over.is_set():
                try:
                    taken.append(self.connect("postgres"))
                except psycopg.OperationalError:
                    is_over.wait(0.002)

        takers = [threading.Thread(target=take, daemon=True) for _ in range(4)]
        for taker in takers:
            taker.start()
        time.sleep(0.5)
        self.terminate_backends()
        try:
            yield
        finally:
            is_over.set()
            for taker in takers:
                taker.join()
            for connection in taken:
                connection.close()

    def deadlocks(self) -> int:
        query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        return self.execute(query)[0][0]

    # --- Redis --------------------------------------------------------------------------

    @property
    def valkey_pid(self) -> int:
        pid = self._servers.valkey_pid
        assert pid is not None
        return pid

    def redis_clients(self) -> int:
        """Return how many clients are connected, this one not counted."""
        with redis.Redis.from_url(self._servers.redis_url) as client:
            return len(client.client_list()) - 1

    def kill_redis(self) -> None:
        os.kill(self.valkey_pid, signal.SIGKILL)

    def start_redis(self) -> None:
        self._servers.start_valkey()

    @contextmanager
    def redis_killed(self) -> Iterator[None]:
        self.kill_redis()
        try:
            yield
        finally:
            self.start_redis()

    @contextmanager
    def redis_frozen(self) -> Iterator[None]:
        pid = self.valkey_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def redis_cut_off(self) -> Iterator[None]:
        self.cable.is_cut.set()
        try:
            yield
        finally:
            self.cable.mend()


class Cable:
    """A TCP port that leads to a unix socket, and that can be cut.

    Cut, it takes connections and bytes and passes nothing on, as a network does that drops
    packets. Mended, what was connected meanwhile is closed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_cut = threading.Event()
        self.port = 0
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[is_ready], daemon=True)
        self._thread.start()
        is_ready.wait(PATIENCE_SECONDS)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def mend(self) -> None:
        self.is_cut.clear()
        self._loop.call_soon_threadsafe(self._close_all)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_SECONDS)

    def _run(self, is_ready: threading.Event) -> None:
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0)
        )
        self.port = server.sockets[0].getsockname()[1]
        is_ready.set()
        self._loop.run_forever()

    def _close_all(self) -> None:
        for writer in list(self._connections):
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            there_reader, there_writer = await asyncio.open_unix_connection(self.path)
        except OSError:
            writer.close()
            self._connections.discard(writer)
            return
        ways = [self._pass(reader, there_writer), self._pass(there_reader, writer)]
        await asyncio.wait(
            [asyncio.ensure_future(way) for way in ways], return_when=asyncio.FIRST_COMPLETED
        )
        self._connections.discard(writer)
        writer.close()
        there_writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if not self.is_cut.is_set():
                    writer.write(data)
                    await writer.drain()


def wait_for(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Return what ``call`` returns, once it returns something without one of ``errors``."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if result := call():
                return result
        except errors:
            if time.monotonic() > give_up_at:
                raise
        else:
            assert time.monotonic() < give_up_at, f"{call} never came true"
        time.sleep(0.02)
