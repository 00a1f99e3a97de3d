"""Let a command's loop end between two steps when it is asked to stop, and its children with it."""

import ctypes
import os
import select
import signal
import sys
from types import FrameType, TracebackType

# Loaded here, because between fork and exec a library can't be loaded safely.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Notice SIGINT and SIGTERM while the ``with`` block runs; wait for them with a timeout.

    ``threading.Event`` would do for the flag, but its ``set`` inside a signal handler can
    deadlock with a ``wait`` that the handler interrupted.
    """

    is_set = False

    def __enter__(self) -> "StopRequest":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end)
        self._handlers_before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read_end)
        os.close(self._write_end)

    def wait(self, seconds: float) -> bool:
        """Sleep for ``seconds``, less if a stop is asked for; return whether it is."""
        if not self.is_set:
            readable, _, _ = select.select([self._read_end], [], [], seconds)
            if readable:
                os.read(self._read_end, 64)
        return self.is_set

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


def end_with_parent() -> None:
    """Ask Linux to stop this process when its parent dies, even by ``kill -9``."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
