"""Every sentence that the shop says about a drop, in one place.

The templates take them from here, and the page's script from a copy inside the page.
``{time}`` and the other names in braces are filled in by the script as the time passes;
``{hold}`` is known beforehand.
"""

from collections.abc import Mapping
from typing import Any

from django.conf import settings

# What holds for everybody. label: on the picture; line: on a card; headline and detail: on the
# drop's own page.
STATES: dict[str, dict[str, str]] = {
    "available": {
        "label": "Live",
        "label_last": "Last {n}",
        "line": "Be the first to buy one",
        "headline": "Get yours",
        "detail": "Reserve, and it is yours alone for {hold}. Then buy it or let it go.",
    },
    "fully_reserved": {
        "label": "All held",
        "line": "All held, some may come back",
        "line_counting": "All held, may come back in {time}",
        "headline": "All held right now",
        "headline_counting": "May come back in {time}",
        "detail": "Others hold the last ones and have a moment to buy. What they let go shows up "
        "here at once, and the button wakes up. Stay close.",
    },
    "sold_out": {
        "label": "Sold out",
        "line": "Every one was bought",
        "headline": "Sold out",
        "detail": "Every one was bought. Nobody is holding any, so don't wait for this one.",
    },
    "scheduled": {
        "label": "Soon",
        "line": "Not started yet",
        "headline": "Not started yet",
        "headline_counting": "Starts in {time}",
        "detail": "Choose your size now. The button wakes up by itself when the drop starts.",
    },
    "paused": {
        "label": "Paused",
        "line": "Paused for the moment",
        "headline": "Paused for the moment",
        "detail": "The shop has stopped the sale for now. It goes on right here, without a reload.",
    },
    "ended": {
        "label": "Ended",
        "line": "This drop is over",
        "headline": "This drop is over",
        "detail": "Nothing more is sold of it.",
    },
    "cancelled": {
        "label": "Cancelled",
        "line": "This drop was cancelled",
        "headline": "This drop was cancelled",
        "detail": "Nothing is sold of it. Whoever has paid gets the money back.",
    },
}

# What holds for the visitor alone.
SITUATIONS: dict[str, dict[str, str]] = {
    "holding": {
        "headline": "Yours for {time}",
        "detail": "Nobody else can take it until then.",
    },
    "holding_last_seconds": {
        "headline": "Only {time} left",
        "detail": "Buy it now, or it goes back to everybody.",
    },
    "holding_paused": {
        "headline": "Yours for {time}, but paused",
        "detail": "The sale is stopped for the moment, so it can't be bought just now.",
    },
    "expired": {
        "headline": "Your time ran out",
        "detail": "It went back to everybody. If there is one left, be quicker this time.",
    },
    "released": {
        "headline": "You let it go",
        "detail": "Somebody else can have it now.",
    },
    "voided": {
        "headline": "The shop took your hold back",
        "detail": "If there is one left, you may reserve again.",
    },
    "bought": {
        "headline": "It's yours",
        "detail": "{what} for {amount}. Order {order}.",
    },
    "limit_reached": {
        "headline": "You have yours",
        "detail": "{limit} per person, so that more people get one. You bought {used}.",
    },
    "cooldown": {
        "headline": "Take a breath: {time}",
        "detail": "Several of your holds ran out unused. After this pause you may reserve again.",
    },
}

# What went wrong and what to do next, by the code of the problem document; another code shows
# the document's own sentence.
PROBLEMS: dict[str, str] = {
    "unreachable": "The shop can't be reached. Press again when you are back online: a repeat is "
    "safe, you will not get two.",
    "unavailable": "The shop is catching its breath. Press again in a moment: a repeat is safe.",
    "busy": "Very many people are asking at once. Press again: a repeat is safe.",
    "rate_limited": "That was a lot of clicks. Wait {seconds} s, then press again.",
    "sold_out": "Somebody was faster: this size is sold out. Try another size.",
    "fully_reserved": "Somebody was faster: all of this size are held. One may come back in "
    "{time}; stay on this page.",
    "too_many": "So many are not free: of this size {left} can be had now. Choose fewer.",
    "variant_required": "Choose a size first.",
    "already_reserved": "You hold another size of this drop. Let that go first, or buy it.",
    "reservation_required": "You hold nothing of this drop any more. Reserve again.",
    "reservation_expired": "Your time ran out before the purchase arrived. Nothing was charged. "
    "Reserve again if one is left.",
    "reservation_not_active": "This hold is over already. Reserve again if one is left.",
    "drop_not_started": "Not yet: this drop starts in {time}.",
    "drop_paused": "The shop has just paused this drop. Stay: the button wakes up when it goes on.",
    "drop_ended": "This drop has just ended.",
    "drop_cancelled": "This drop was cancelled.",
    "identity_required": "Say who you are first.",
    "unknown_user": "The shop does not know you any more. Say again who you are.",
    "invalid_identity": "The shop does not know you any more. Say again who you are.",
    "internal_error": "Something broke on our side. Press again: a repeat is safe.",
    "name_too_short": "A name has 3 to 50 characters.",
}

CONNECTION: dict[str, str] = {
    "connecting": "Connecting",
    "live": "Live",
    "reconnecting": "Reconnecting",
    "offline": "Offline",
    "lost": "Connection lost. What you see is from {at} and may be old; trying again.",
    "no_network": "Your device is offline. What you see is from {at}; it goes on by itself.",
    "refused": "This page can't be kept live. Reload it to see the true stock.",
    "back": "Back, and up to date. Nothing happened while you were away.",
    "back_with_news": "Back, and up to date: {count} that you missed came in.",
}


def all_words() -> dict[str, Any]:
    """Return what the page's script needs."""
    return {
        "states": filled(STATES),
        "situations": SITUATIONS,
        "problems": PROBLEMS,
        "connection": CONNECTION,
    }


def filled(words: Any) -> Any:
    """Return the words with the length of a hold in them."""
    if isinstance(words, Mapping):
        return {key: filled(text) for key, text in words.items()}
    return words.replace("{hold}", hold_text(settings.RESERVATION_TTL_SECONDS))


def hold_text(seconds: int) -> str:
    if seconds % 60 == 0 and seconds > 60:
        return f"{seconds // 60} minutes"
    return "one second" if seconds == 1 else f"{seconds} seconds"
