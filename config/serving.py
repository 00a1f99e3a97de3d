"""How a web server is started, whoever starts it."""

from django.conf import settings
from django.core.management.base import CommandError, CommandParser


def add_server_options(parser: CommandParser, *, server: str) -> None:
    """Add what a command that starts a web server can be told; ``server`` is the default."""
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=settings.PORT, help="default: %(default)s")
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


def check_server_options(server: str, workers: int) -> None:
    """Refuse what the server can't do.

    Raises:
        CommandError: says what to do instead.
    """
    if workers > 1 and server == "daphne":
        raise CommandError("daphne runs one process; for several use --server uvicorn.")


def server_command(server: str, host: str, port: int, workers: int) -> list[str]:
    """Return the arguments with which Python runs a web server, its module first."""
    if server == "daphne":
        return ["-m", "daphne", "-v", "0", "-b", host, "-p", str(port), "config.asgi:application"]
    return [
        *("-m", "uvicorn", "config.asgi:application", "--host", host, "--port", str(port)),
        *("--workers", str(workers), "--log-level", "warning", "--no-access-log"),
        *("--no-proxy-headers", "--lifespan", "off"),
        *("--ws", "websockets-sansio", "--ws-max-size", str(settings.SOCKET_MESSAGE_BYTES)),
        # Small frames hardly shrink, and each socket would pay for it with memory and time.
        *("--ws-per-message-deflate", "false"),
        *("--timeout-graceful-shutdown", str(settings.SHUTDOWN_SECONDS)),
    ]
