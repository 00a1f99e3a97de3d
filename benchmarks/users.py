"""Numbered users: scripts in Lua, SQL and Python name the same ones."""

# Spreads the numbers over all ids (Knuth's multiplicative hash, without collisions), so that
# index entries of users who come one after the other don't lie side by side.
MULTIPLIER = 2654435761

CREATE_USERS = """
    INSERT INTO users_user (id, username, password, email, is_superuser, is_staff, is_active,
                            date_joined)
    SELECT concat(lpad(to_hex(number * 2654435761 % 4294967296), 8, '0'), '-0000-4000-8000-',
                  lpad(to_hex(number), 12, '0'))::uuid,
           'user_' || number, '', '', false, false, true, now()
    FROM generate_series(%s::bigint, %s::bigint) AS number
"""


def user_id(number: int) -> str:
    """Return the id of the user ``number``; the same as in lua/common.lua."""
    return f"{number * MULTIPLIER % 2**32:08x}-0000-4000-8000-{number:012x}"
