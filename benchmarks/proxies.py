"""Programs of the system that stand between clients, processes and PostgreSQL.

Each runs for the time of a block, unprivileged, on a port of 127.0.0.1, from a folder that is
thrown away.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from benchmarks.stack import Process, StackError, free_port, listens

# Debian has them where only root looks.
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])

PGBOUNCER = """
[databases]
* = host={HOST} port={PORT} user={USER}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
; Everybody on this machine may in, as with the server behind it: a production file has users.
auth_type = any
pool_mode = transaction
default_pool_size = {sessions}
max_client_conn = 1000
"""

# The same map as in deploy/nginx.conf.
NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
worker_processes 1;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;

    map $uri $drop_or_request {{
        "~^/api/drops/(?<drop>[0-9a-f-]{{36}})" $drop;
        default $request_id;
    }}
    upstream web {{
        {choice}
        {servers}
        keepalive 256;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{listen};
        keepalive_requests 1000000;
        location / {{
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_pass http://web;
        }}
    }}
}}
"""
FOLDER = "/var/run/folder"  # stands for the one that is made at the start
PINNED = "hash $drop_or_request consistent;"


def find(program: str) -> str | None:
    return shutil.which(program, path=PLACES)


@contextmanager
def pgbouncer(database: Mapping[str, str], sessions: int = 20) -> Iterator[tuple[Process, str]]:
    """Run PgBouncer in transaction mode; give its process and the ``DATABASE_URL`` through it.

    Args:
        database: HOST, PORT, USER and NAME of a PostgreSQL that trusts this machine.
        sessions: how many connections it may have there.
    Raises:
        StackError: it is not installed, or does not start.
    """
    port = free_port()
    text = PGBOUNCER.format(**database, listen=port, sessions=sessions)
    with _running("pgbouncer", port, "pgbouncer.ini", text) as process:
        login = f"{quote(database['USER'])}@127.0.0.1:{port}"
        yield process, f"postgres://{login}/{quote(database['NAME'])}"


@contextmanager
def nginx(ports: Sequence[int], *, is_pinned: bool) -> Iterator[tuple[Process, int]]:
    """Run nginx in front of web servers on these ports; give its process and its port.

    ``is_pinned``: each drop's requests go to one of the servers, else all take turns.
    """
    port = free_port()
    servers = "\n        ".join(f"server 127.0.0.1:{port};" for port in ports)
    choice = PINNED if is_pinned else ""
    text = NGINX.format(folder=FOLDER, choice=choice, servers=servers, listen=port)
    with _running("nginx", port, "nginx.conf", text, "-e", "stderr", "-c") as process:
        yield process, port


@contextmanager
def _running(program: str, port: int, file: str, text: str, *options: str) -> Iterator[Process]:
    path = find(program)
    if path is None:
        raise StackError(f"{program} is missing: apt-get install {program}.")
    with tempfile.TemporaryDirectory(prefix=f"{program}-") as folder:
        configuration = Path(folder, file)
        configuration.write_text(text.replace(FOLDER, folder))
        log = Path(folder, "log")
        # PgBouncer refuses to run as root, and nginx's workers must own their folder.
        as_nobody: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            as_nobody = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with log.open("wb") as output:
            process = Process(
                subprocess.Popen(  # type: ignore[call-overload] # noqa: S603
                    [path, *options, str(configuration)],
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **as_nobody,
                ),
                log,
            )
        try:
            process.wait_for(lambda: listens(port), program)
            yield process
            process.check()
        finally:
            process.stop()
