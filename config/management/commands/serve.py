import signal
import sys
from typing import Any

import uvicorn.main
from daphne.cli import CommandLineInterface
from django.core.management.base import BaseCommand, CommandParser

from config.serving import (
    add_server_options,
    allow_open_files,
    check_server_options,
    server_command,
)


class Command(BaseCommand):
    help = (
        "Run one web server, for production. SIGTERM has it answer what is in flight, close "
        "its sockets with 1012 and exit with 0."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        add_server_options(parser, server="uvicorn")

    def handle(self, *, host: str, port: int, server: str, workers: int, **options: Any) -> None:
        check_server_options(server, workers)
        if warning := allow_open_files():
            self.stderr.write(warning)
        # uvicorn raises the signal again once it is done, which would look like a violent end.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        arguments = server_command(server, host, port, workers)[2:]
        if server == "daphne":
            CommandLineInterface().run(arguments)
        else:
            uvicorn.main.main(arguments, prog_name="uvicorn", standalone_mode=False)
