import os
import time
import uuid


def new_id() -> uuid.UUID:
    """Return a new UUID that begins with the time in milliseconds (version 7).

    Rows made together stand together in the primary key's index, so a busy table writes
    few of its pages instead of all of them.
    Source: https://www.rfc-editor.org/rfc/rfc9562#name-uuid-version-7
    """
    return id_at(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10)))


def id_at(milliseconds: int, random: int) -> uuid.UUID:
    """Return the UUID of that time since 1970, with up to 80 random bits."""
    value = milliseconds << 80 | random
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0b11 << 62) | 0b10 << 62
    return uuid.UUID(int=value)


# Ids that begin like this ("rehear" in ASCII, version 8: a meaning of one's own) are those of
# rehearsals, drops and users alike, so whoever sees an id knows it without a query. See
# docs/adr/0018; the same range is in drops/migrations/0007.
REHEARSAL_PREFIX = "72656865-6172-8"
REHEARSAL_IDS = (
    uuid.UUID(f"{REHEARSAL_PREFIX}000-8000-000000000000"),
    uuid.UUID(f"{REHEARSAL_PREFIX}fff-bfff-ffffffffffff"),
)


def new_rehearsal_id() -> uuid.UUID:
    """Return a random id of the range that only rehearsals use."""
    first, last = REHEARSAL_IDS
    # Random in the bits that the first and the last of them don't share.
    return uuid.UUID(int=first.int | int.from_bytes(os.urandom(16)) & (first.int ^ last.int))


def is_rehearsal_id(value: uuid.UUID | str) -> bool:
    return str(value).startswith(REHEARSAL_PREFIX)
