"""How a web server is started, whoever starts it."""

from django.conf import settings


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
