"""How a web server is started, whoever starts it."""

import resource
from argparse import ArgumentTypeError

from django.conf import settings
from django.core.management.base import CommandError, CommandParser

# Connections that wait to be accepted. A drop begins with thousands in one moment, and who finds
# no place comes again after a second. The system may allow fewer (net.core.somaxconn).
BACKLOG = 16_384
# For what isn't a client's connection, and for requests beside the sockets.
OTHER_FILES = 2000


def add_server_options(parser: CommandParser, *, server: str) -> None:
    """Add what a command that starts a web server can be told; ``server`` is the default."""
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument(
        "--port", type=port_number, default=settings.PORT, help="default: %(default)s"
    )
    parser.add_argument(
        "--server", choices=["daphne", "uvicorn"], default=server, help="default: %(default)s"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes; uvicorn only. SIGHUP to it replaces them one after the other",
    )


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ArgumentTypeError("must be from 1 to 65535")
    return int(text)


def check_server_options(server: str, workers: int) -> None:
    """Refuse what the server can't do.

    Raises:
        CommandError: says what to do instead.
    """
    if workers < 1:
        raise CommandError("--workers must be 1 or more.")
    if workers > 1 and server == "daphne":
        raise CommandError("daphne runs one process; for several use --server uvicorn.")


def allow_open_files() -> str | None:
    """Let this process and those it starts have a file for each connection that settings allow.

    As a rule a process may have 1,024 at first, and as many as it needs once it asks for them.

    Returns:
        What to tell people where the system doesn't allow so many; else None.
    """
    wanted = settings.SOCKETS_PER_PROCESS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return None
    is_enough = hard == unlimited or hard >= wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if is_enough else hard, hard))
    if is_enough:
        return None
    return (
        f"A process may have {hard:,} open files here (ulimit -Hn), and SOCKETS_PER_PROCESS "
        f"asks for {wanted:,}."
    )


def server_command(server: str, host: str, port: int, workers: int) -> list[str]:
    """Return the arguments with which Python runs a web server, its module first."""
    if server == "daphne":
        # Its own queue of 50: with a longer one, who opens thousands of sockets has more of them at
        # once, and takes twice the memory.
        return ["-m", "daphne", "-v", "0", "-b", host, "-p", str(port), "config.asgi:application"]
    return [
        *("-m", "uvicorn", "config.asgi:application", "--host", host, "--port", str(port)),
        *("--workers", str(workers), "--backlog", str(BACKLOG)),
        *("--log-level", "warning", "--no-access-log"),
        *("--no-proxy-headers", "--lifespan", "off"),
        *("--ws", "websockets-sansio", "--ws-max-size", str(settings.SOCKET_MESSAGE_BYTES)),
        # Small frames hardly shrink, and each socket would pay for it with memory and time.
        *("--ws-per-message-deflate", "false"),
        *("--timeout-graceful-shutdown", str(settings.SHUTDOWN_SECONDS)),
    ]
