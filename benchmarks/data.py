"""Rows that scenarios start from, written in bulk; they pass the stock audit."""

import time

from benchmarks.stack import Hot, Stack
from benchmarks.users import USER_ID

POLL_SECONDS = 0.005

HOLD = f"""
    WITH held AS (
        INSERT INTO reservations_reservation
            (id, drop_id, variant_id, user_id, quantity, unit_price, currency, status,
             created_at, expires_at)
        SELECT uuidv7(), d.id, %(variant)s, {USER_ID}, 1, d.price, d.currency, 'ACTIVE',
               now(), to_timestamp(%(ends)s)
        FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS number, drops_drop d
        WHERE d.id = %(drop)s
    ), variants AS (
        UPDATE drops_variant SET available_stock = available_stock - %(count)s
        WHERE id = %(variant)s
    )
    UPDATE drops_drop SET available_stock = available_stock - %(count)s WHERE id = %(drop)s
"""  # noqa: S608 - the constant above

SELL = f"""
    WITH held AS (
        INSERT INTO reservations_reservation
            (id, drop_id, variant_id, user_id, quantity, unit_price, currency, status,
             created_at, expires_at)
        SELECT uuidv7(), d.id, %(variant)s, {USER_ID}, 1, d.price, d.currency, 'CONSUMED',
               now() - number * interval '1 millisecond', now() + interval '1 hour'
        FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS number, drops_drop d
        WHERE d.id = %(drop)s
        RETURNING *
    ), sold AS (
        INSERT INTO purchases_purchase
            (id, reservation_id, drop_id, variant_id, user_id, quantity, amount, currency, status,
             created_at)
        SELECT uuidv7(), id, drop_id, variant_id, user_id, 1, unit_price, currency,
               'paid', created_at
        FROM held
    ), latest AS (
        SELECT jsonb_build_object(
            'user_id', user_id, 'username', 'user_' || row_number() OVER (), 'qty', 1,
            'created_at', to_char(created_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) AS entry
        FROM held
        ORDER BY created_at DESC
        LIMIT 3
    ), variants AS (
        UPDATE drops_variant
        SET available_stock = available_stock - %(count)s, sold_stock = sold_stock + %(count)s
        WHERE id = %(variant)s
    )
    UPDATE drops_drop
    SET available_stock = available_stock - %(count)s, sold_stock = sold_stock + %(count)s,
        latest_purchasers = (SELECT jsonb_agg(entry) FROM latest)
    WHERE id = %(drop)s
"""  # noqa: S608 - the constant above

# The log knows nothing of these rows: let it begin with the stock that they leave.
BEGIN_LOG = """
    UPDATE realtime_event
    SET type = 'DROP_UPDATED',
        data = jsonb_set(data, '{drop,available_stock}', to_jsonb(d.available_stock))
    FROM drops_drop d
    WHERE d.id = %(drop)s AND drop_id = d.id AND realtime_event.seq = 1
"""


def hold(stack: Stack, hot: Hot, first_user: int, count: int, ends: float) -> None:
    """Let ``count`` users hold a unit each, all until ``ends`` (Unix time)."""
    stack.execute(HOLD, **_users(hot, first_user, count), ends=ends)
    stack.execute(BEGIN_LOG, drop=hot.drop_id)


def sell(stack: Stack, hot: Hot, first_user: int, count: int) -> None:
    """Let ``count`` users have purchased a unit each."""
    stack.execute(SELL, **_users(hot, first_user, count))
    stack.execute(BEGIN_LOG, drop=hot.drop_id)


def _users(hot: Hot, first: int, count: int) -> dict[str, object]:
    last = first + count - 1
    return {
        "drop": hot.drop_id,
        "variant": hot.variant_id,
        "first": first,
        "last": last,
        "count": count,
    }


def held(stack: Stack, hot: Hot) -> int:
    """Return how many units are held, by the drop's counters."""
    query = "SELECT total_stock - available_stock - sold_stock FROM drops_drop WHERE id = %(id)s"
    return stack.execute(query, id=hot.drop_id)[0][0]


def wait_until_expired(
    stack: Stack, hot: Hot, due: float, others: int, until: float
) -> float | None:
    """Return when the last hold that ended at ``due`` was back in stock; None if not in time.

    While clearly more than the ``others`` are held, only the drop's row is read.
    """
    query = """
        SELECT EXISTS (SELECT FROM reservations_reservation
                       WHERE drop_id = %(id)s AND status = 'ACTIVE'
                         AND expires_at <= to_timestamp(%(due)s))
    """
    time.sleep(max(0.0, due - time.time()))
    while (now := time.time()) < until:
        is_nearly_done = held(stack, hot) <= others
        if is_nearly_done and not stack.execute(query, id=hot.drop_id, due=due)[0][0]:
            return time.time()
        time.sleep(max(0.0, now + POLL_SECONDS - time.time()))
    return None
