"""Numbered users: scripts in Lua, SQL and Python name the same ones."""

# Spreads the numbers over all ids (Knuth's multiplicative hash, without collisions), so that
# index entries of users who come one after the other don't lie side by side.
MULTIPLIER = 2654435761

# SQL for the id of the user ``number``, a bigint; the same as in sql/reserve.sql.
USER_ID = (
    f"concat(lpad(to_hex(number * {MULTIPLIER} %% 4294967296), 8, '0'), '-0000-4000-8000-', "
    "lpad(to_hex(number), 12, '0'))::uuid"
)
CREATE_USERS = f"""
    INSERT INTO users_user (id, username, password, email, is_superuser, is_staff, is_active,
                            date_joined)
    SELECT {USER_ID}, 'user_' || number, '', '', false, false, true, now()
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS number
"""  # noqa: S608 - the constant above


def user_id(number: int) -> str:
    """Return the id of the user ``number``; the same as in lua/common.lua."""
    return f"{number * MULTIPLIER % 2**32:08x}-0000-4000-8000-{number:012x}"
