"""People who only look: sockets that follow all drops, and what they have been shown."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import websockets

from tests.torture.stack import TortureStack

LOOK_AGAIN_SECONDS = 0.2
ENDS_WITHIN_SECONDS = 60


class Screen:
    """What one socket has shown."""

    def __init__(self) -> None:
        self.frames = 0
        # Frames that follow one that never came, while the socket stayed open.
        self.gaps = 0
        self.seqs: dict[str, int] = {}

    async def follow(self, url: str) -> None:
        """Show what a socket brings, until it ends."""
        with suppress(OSError, websockets.WebSocketException):
            async with websockets.connect(url, open_timeout=20, proxy=None) as socket:
                async for text in socket:
                    self.take(json.loads(text))

    def take(self, frame: dict[str, Any]) -> None:
        self.frames += 1
        if frame["type"] == "SNAPSHOT":
            self.seqs |= {drop["id"]: drop["seq"] for drop in frame["data"]["drops"]}
        elif frame.get("seq") and frame.get("dropId"):
            if self.seqs.get(frame["dropId"], frame["prev"]) < frame["prev"]:
                self.gaps += 1
            self.seqs[frame["dropId"]] = frame["seq"]


class Screens:
    """Sockets that connect again when they are cut off; with ``come_and_go`` some always leave."""

    def __init__(self, url: Callable[[int], str], count: int, *, come_and_go: bool = False) -> None:
        self.url = url
        self.count = count
        self.come_and_go = come_and_go
        self.opened: list[Screen] = []
        self._lit: dict[asyncio.Task[None], Screen] = {}
        self._is_over = threading.Event()

    @contextmanager
    def lit(self) -> Iterator["Screens"]:
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(asyncio.run, self._keep_lit())
            try:
                yield self
            finally:
                self._is_over.set()
                working.result(ENDS_WITHIN_SECONDS)

    @property
    def frames(self) -> int:
        return sum(screen.frames for screen in self.opened)

    @property
    def gaps(self) -> int:
        return sum(screen.gaps for screen in self.opened)

    def seconds_until_true(self, stack: TortureStack, patience_seconds: float = 30) -> float:
        """Return how long until each screen shows the newest state of every drop."""
        started = time.monotonic()
        rows = stack.execute("SELECT id::text, seq FROM drops_drop")
        newest = dict(rows)
        while time.monotonic() - started < patience_seconds:
            shown = [screen.seqs for screen in list(self._lit.values())]
            if len(shown) >= self.count and all(seqs == newest for seqs in shown):
                break
            time.sleep(0.05)
        return time.monotonic() - started

    async def _keep_lit(self) -> None:
        try:
            while not self._is_over.is_set():
                self._lit = {task: seen for task, seen in self._lit.items() if not task.done()}
                if self.come_and_go and len(self._lit) >= self.count:
                    # One leaves without a word, as people do; which one changes each time.
                    leaving = list(self._lit)[len(self.opened) * 7919 % len(self._lit)]
                    leaving.cancel()
                    del self._lit[leaving]
                for _ in range(min(self.count - len(self._lit), 10)):
                    screen = Screen()
                    task = asyncio.create_task(screen.follow(self.url(len(self.opened))))
                    self.opened.append(screen)
                    self._lit[task] = screen
                await asyncio.sleep(LOOK_AGAIN_SECONDS)
        finally:
            for task in self._lit:
                task.cancel()
            await asyncio.gather(*self._lit, return_exceptions=True)
