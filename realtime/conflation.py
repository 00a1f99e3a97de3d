"""What waits to be sent, and what of it is left out; see docs/adr/0008-conflation.md."""

from collections import deque

from operations import metrics
from realtime.frames import STATES, EventFrame, Message

# Waiting events of one drop that carry no state: purchases, expired holds.
MAX_WAITING_SINGLES = 100
# The same where one socket is behind.
MAX_WAITING_SINGLES_OF_SOCKET = 20


class Waiting:
    """Frames of one drop: of each kind of state the newest, of the others the newest few.

    The newest frame of all is always kept, so whoever gets the rest is up to date.
    """

    __slots__ = ("added", "singles", "states")

    def __init__(self, max_singles: int = MAX_WAITING_SINGLES) -> None:
        # How many came, with those that are replaced or left out by now.
        self.added = 0
        self.states: dict[str, EventFrame] = {}
        self.singles: deque[EventFrame] = deque(maxlen=max_singles)

    def add(self, frame: EventFrame) -> None:
        self.added += 1
        if frame.type in STATES:
            self.states[frame.type] = frame
        else:
            self.singles.append(frame)

    def only_state(self, kind: str) -> EventFrame | None:
        """Return the frame of this kind if nothing else waits."""
        if self.singles or len(self.states) != 1:
            return None
        return self.states.get(kind)

    def take(self, max_singles: int | None = None) -> list[EventFrame]:
        """Return all frames in the order of their events, and keep none of them."""
        singles = list(self.singles)
        if max_singles is not None:
            singles = singles[max(0, len(singles) - max_singles) :]
        frames = sorted([*self.states.values(), *singles], key=lambda frame: frame.seq)
        self.states.clear()
        self.singles.clear()
        self.added = 0
        return frames


class Outbox:
    """What waits for one socket: because the client reads slowly, or a state is being read.

    Bounded by the number of watched drops: states are replaced, of other events the newest
    are kept. ``prev`` of what is sent then is the ``seq`` of what was sent before it.
    """

    __slots__ = ("_after", "_events", "_last", "_messages", "is_all_held", "held")

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        # In the order in which the drops began to wait.
        self._events: dict[str, Waiting] = {}
        # By drop, the newest frame that the client has, or will have by then.
        self._after: dict[str, int] = {}
        # Heartbeats count what was sent before them, so they come last.
        self._last: dict[str, Message] = {}
        self.held: set[str] = set()
        self.is_all_held = False

    @property
    def is_holding(self) -> bool:
        return self.is_all_held or bool(self.held)

    @property
    def has_messages(self) -> bool:
        """Whether something waits that must be sent before all that is added now."""
        return bool(self._messages)

    def put(self, message: Message) -> None:
        """Add something that isn't replaced; whoever calls this bounds how often."""
        self._messages.append(message)

    def put_last(self, key: str, message: Message) -> None:
        self._last[key] = message

    def add(self, frame: EventFrame, prev: int) -> None:
        waiting = self._events.get(frame.drop_id)
        if waiting is None:
            waiting = self._events[frame.drop_id] = Waiting(MAX_WAITING_SINGLES_OF_SOCKET)
            self._after.setdefault(frame.drop_id, prev)
        waiting.add(frame)

    def continue_from(self, drop_id: str, seq: int) -> bool:
        """Leave out what is told already: the client has, or gets first, all up to ``seq``.

        Returns:
            Whether newer frames of the drop wait.
        """
        self.held.discard(drop_id)
        waiting = self._events.pop(drop_id, None)
        self._after.pop(drop_id, None)
        for frame in waiting.take() if waiting else ():
            if frame.seq > seq:
                self.add(frame, seq)
        return drop_id in self._events

    def discard(self, drop_id: str) -> None:
        self.held.discard(drop_id)
        self._events.pop(drop_id, None)
        self._after.pop(drop_id, None)
        self._last.pop(drop_id, None)

    def pop(self) -> Message | None:
        """Return what is to be sent next, or None while there is nothing that may be."""
        if not self._messages:
            self._move_events()
        if self._messages:
            return self._messages.popleft()
        if self._last and not self.is_holding:
            return self._last.pop(next(iter(self._last)))
        return None

    def _move_events(self) -> None:
        """Make messages of one drop's frames; those of the others may still be replaced."""
        if self.is_all_held:
            return
        drop_id = next((drop_id for drop_id in self._events if drop_id not in self.held), None)
        if drop_id is None:
            return
        prev = self._after.pop(drop_id)
        waiting = self._events.pop(drop_id)
        came, frames = waiting.added, waiting.take()
        metrics.frames_dropped.add(came - len(frames))
        for frame in frames:
            self._messages.append(frame.message_after(prev))
            prev = frame.seq
