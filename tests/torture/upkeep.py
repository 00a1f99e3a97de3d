"""Scenarios of those who run it: a backup in mid-sale, migrations, and the code before."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from django.apps import apps
from django.core.management import call_command
from django.db import connections
from django.db.migrations.executor import MigrationExecutor

from benchmarks.stack import BASE_DIR, free_port
from tests.servers import Process, WebServer, running_web_servers
from tests.torture.faults import finish
from tests.torture.run import Result, Run

RESTORED = "restored"
# Whoever refers to others comes before them on the way back.
OWN_APPS = ("realtime", "purchases", "reservations", "drops", "users")


def backup(run: Run) -> None:
    what = "pg_dump in mid-sale, pg_restore, audit; the newest migrations back and forth on it."
    with (
        run.scenario("Backup", what) as result,
        tempfile.TemporaryDirectory() as folder,
        running_web_servers(WebServer("uvicorn")) as (server,),
    ):
        dump = Path(folder, "dump")
        sale = run.sale(lambda: [server.port], 60)
        with sale.open():
            sale.run_for(run.size(2, 5))
            postgres(
                run, "pg_dump", "--format=custom", f"--file={dump}", run.stack.database["NAME"]
            )
            told_before = len(sale.confirmed)
            sale.run_for(1)
        finish(result, sale)
        with restored(run):
            postgres(run, "pg_restore", f"--dbname={RESTORED}", "--exit-on-error", str(dump))
            audited = audit(run, result, "of the restored database")
            result.expect(audited["drops"] == 2, "the restored database lacks a drop")
            rows = rows_of_purchases(run)
            result.facts.append(
                f"{told_before:,} answers confirmed before the dump was done; "
                f"{rows:,} reservations in it, audit clean"
            )
            back_and_forth(run, result)


def back_and_forth(run: Run, result: Result) -> None:
    """Undo and redo each migration that is the last of all, with the sale's rows in the tables."""
    before = schema(run)
    for app in OWN_APPS:
        executor = MigrationExecutor(connections[RESTORED])
        names = sorted(name for label, name in executor.loader.disk_migrations if label == app)
        # Those that others build upon can't be undone alone, and not without their rows.
        if len(names) > 1 and len(executor.migration_plan([(app, names[-2])])) == 1:
            migrate(app, names[-2])
            migrate()
            result.facts.append(f"`{app}.{names[-1]}` undone and done again")
    result.expect(schema(run) == before, "the schema is another one after back and forth")
    audit(run, result, "after back and forth")


def migrations(run: Run) -> None:
    what = "All migrations on an empty database, all undone, all done again: the same schema."
    with run.scenario("Migrations", what) as result, restored(run):
        migrate()
        first = schema(run)
        for app in OWN_APPS:
            migrate(app, "zero")
        migrate()
        result.expect(schema(run) == first, "forth, back and forth leads to another schema")
        result.operations = sum(
            len(list(apps.get_app_config(app).get_models())) for app in OWN_APPS
        )
        result.facts.append(f"{result.operations} tables")


def code_before(run: Run) -> None:
    what = "The code before the newest migration, on the schema after it."
    with run.scenario("Previous code", what) as result, tempfile.TemporaryDirectory() as folder:
        commit = unpack_code_before(Path(folder))
        if commit is None:
            result.facts.append("not tried: no history in this checkout")
            return
        result.facts.append(f"commit {commit}")
        server = ServerOfCode(folder)
        with running_web_servers(server):
            sale = run.sale(lambda: [server.port], 40)
            with sale.open():
                sale.run_for(run.size(3, 10))
            finish(result, sale)


class ServerOfCode(WebServer):
    """uvicorn with the code of another folder."""

    def __init__(self, folder: str) -> None:
        self.server = "uvicorn"
        self.port = free_port()
        Process.__init__(
            self,
            *("-m", "uvicorn", "--app-dir", folder, "config.asgi:application"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--lifespan", "off", "--no-access-log", "--log-level", "warning"),
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws_url = f"ws://127.0.0.1:{self.port}"


def unpack_code_before(folder: Path) -> str | None:
    """Put the code as it was before the last change of a migration into ``folder``."""
    # Along the main line: within a branch there may be commits that never ran.
    migrations = ("--", ":(glob)*/migrations/0*.py")
    commits = git("log", "--first-parent", "--format=%h", "-1", *migrations)
    newest = commits.decode().strip() if commits else ""
    archive = git("archive", f"{newest}~1") if newest else None
    if not archive:
        return None
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return f"before {newest}"


def git(*arguments: str) -> bytes | None:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=BASE_DIR,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def restored(run: Run) -> Iterator[None]:
    """Make a second, empty database, known to Django by its name, for the time of the block."""
    run.stack.execute(f"DROP DATABASE IF EXISTS {RESTORED} WITH (FORCE)")
    run.stack.execute(f"CREATE DATABASE {RESTORED}")
    connections.databases[RESTORED] = connections.databases["default"] | {"NAME": RESTORED}
    try:
        yield
    finally:
        connections[RESTORED].close()
        connections[RESTORED].close_pool()
        del connections.databases[RESTORED]
        delattr(connections._connections, RESTORED)
        run.stack.execute(f"DROP DATABASE {RESTORED} WITH (FORCE)")


def migrate(*target: str) -> None:
    call_command("migrate", *target, database=RESTORED, verbosity=0, interactive=False)


def schema(run: Run) -> str:
    text = postgres(run, "pg_dump", "--schema-only", RESTORED).decode()
    # Newer versions fence the dump with a random word.
    return "\n".join(line for line in text.splitlines() if not line.startswith("\\"))


def rows_of_purchases(run: Run) -> int:
    with connections[RESTORED].cursor() as cursor:
        cursor.execute("SELECT count(*) FROM reservations_reservation")
        return cursor.fetchone()[0]


def audit(run: Run, result: Result, when: str) -> dict:
    """Run the command on the second database, as an operator would."""
    host = quote(run.stack.database["HOST"], safe="")
    url = f"postgres://{run.stack.database['USER']}@{host}:{run.stack.database['PORT']}/{RESTORED}"
    done = subprocess.run(
        [sys.executable, "manage.py", "audit_stock", "--json"],
        cwd=BASE_DIR,
        env=os.environ | {"DATABASE_URL": url},
        capture_output=True,
        check=False,
        text=True,
    )
    found = json.loads(done.stdout)
    result.expect(done.returncode == 0, f"the audit {when} found {found['differences'][:3]}")
    return found


def postgres(run: Run, program: str, *arguments: str) -> bytes:
    """Run one of PostgreSQL's programs on the stack's server."""
    database = run.stack.database
    place = ["-h", database["HOST"], "-p", database["PORT"], "-U", database["USER"]]
    done = subprocess.run(
        [run.stack.postgres_bin / program, *place, *arguments], capture_output=True, check=False
    )
    assert done.returncode == 0, f"{program} failed: {done.stderr.decode(errors='replace')}"
    return done.stdout
