"""What the public stream doesn't tell, for the dashboard: sent by itself, to staff only."""

import asyncio
import contextlib
import json
from datetime import UTC, datetime
from typing import Any

from channels.auth import get_user
from channels.db import database_sync_to_async

from realtime.consumers import INVALID_IDENTITY, TOO_MANY_NEW, Closing, Consumer, why
from realtime.hub import OUTAGES
from realtime.presence import count_sockets
from reservations.services import seconds_overdue
from users.sessions import SessionStore

PULSE_SECONDS = 2.0
NOT_ALLOWED = 4403


class ControlConsumer(Consumer):
    """``/ws/control``: a ``PULSE`` every two seconds. Staff know each other by their session."""

    pulse: asyncio.Task | None = None

    async def connect(self) -> None:
        await self.accept()
        try:
            self._enter()
            await self._check_rate("socket", TOO_MANY_NEW)
            if not await self.is_allowed():
                raise Closing(NOT_ALLOWED, "for staff who may view drops")
        except (Closing, *OUTAGES) as exc:
            return await self.close(*why(exc))
        self.pulse = asyncio.create_task(self.send_pulse())

    async def is_allowed(self) -> bool:
        """Ask the database each time: staff sign out, are switched off, and lose rights."""
        session = SessionStore(self.scope["session"].session_key)
        return await database_sync_to_async(may_view_drops)(await get_user({"session": session}))

    async def disconnect(self, code: int) -> None:
        await super().disconnect(code)
        if self.pulse is not None:
            self.pulse.cancel()

    async def send_pulse(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                # While the database is away there is nothing to tell; the page sees the silence.
                with contextlib.suppress(*OUTAGES):
                    if not await self.is_allowed():
                        return await self.close(INVALID_IDENTITY, "no longer signed in, or allowed")
                    await self.send(text_data=await pulse_frame())
                await asyncio.sleep(PULSE_SECONDS)


def may_view_drops(user: Any) -> bool:
    return user.is_active and user.is_staff and user.has_perm("drops.view_drop")


async def pulse_frame() -> str:
    overdue = await database_sync_to_async(seconds_overdue)()
    sockets = await count_sockets()
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    data = {"oldestOverdueSeconds": round(overdue, 1), "sockets": sockets}
    return json.dumps({"type": "PULSE", "ts": now, "data": data})
