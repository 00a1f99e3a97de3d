import signal
import sys
from typing import Any

import uvicorn.main
from daphne.cli import CommandLineInterface
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.serving import server_command


class Command(BaseCommand):
    help = (
        "Run one web server, for production. SIGTERM has it answer what is in flight, close "
        "its sockets with 1012 and exit with 0."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
        parser.add_argument("--port", type=int, default=settings.PORT, help="default: %(default)s")
        parser.add_argument("--server", choices=["daphne", "uvicorn"], default="uvicorn")
        parser.add_argument(
            "--workers",
            type=int,
            default=1,
            metavar="N",
            help="processes; uvicorn only. SIGHUP replaces them one after the other",
        )

    def handle(self, *, host: str, port: int, server: str, workers: int, **options: Any) -> None:
        if workers > 1 and server == "daphne":
            raise CommandError("daphne runs one process; for several use --server uvicorn.")
        # uvicorn raises the signal again once it is done, which would look like a violent end.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        arguments = server_command(server, host, port, workers)[2:]
        if server == "daphne":
            CommandLineInterface().run(arguments)
        else:
            uvicorn.main.main(arguments, prog_name="uvicorn", standalone_mode=False)
