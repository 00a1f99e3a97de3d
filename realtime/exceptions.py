from http import HTTPStatus

from config.problems import Busy, Refusal


class EventsGone(Refusal):
    """What happened after the given event is no longer in the log, or never was."""

    status_code = HTTPStatus.GONE
    default_code = "events_gone"
    default_detail = "The log no longer reaches back to this event. Read the drop instead."


class TooManyStreams(Refusal):
    status_code = HTTPStatus.TOO_MANY_REQUESTS
    default_code = "rate_limited"
    default_detail = "Too many sockets and event streams from this address."
    retry_after_seconds = 5


class ProcessIsFull(Busy):
    default_detail = "This process has as many sockets and event streams as it takes."
    retry_after_seconds = 5
