"""Scenarios about two promises: keys are used once, and only the database's clock counts."""

import asyncio
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from datetime import datetime, timedelta

from benchmarks.data import hold
from benchmarks.users import user_id
from tests.torture.faults import purchase, wait_until_back
from tests.torture.processes import Child, Nursery
from tests.torture.run import Result, Run
from tests.torture.sale import Answer, ask_once

TWINS = 100
KEYS_AT_ONCE = 4
WRONG_SECONDS = 300
TTL_SECONDS = 3600


def storm(run: Run) -> None:
    keys = run.size(12, 100)
    what = f"{keys} keys, {TWINS} requests at once with each, to two servers."
    with run.scenario("Idempotency storm", what) as result, Nursery() as nursery:
        (drop,) = run.stack.fresh()
        servers = [nursery.web(), nursery.web()]
        sent = {str(uuid.UUID(int=run.random.getrandbits(128))): n for n in range(1, keys + 1)}
        bodies = asyncio.run(rain(result, servers, drop.drop_id, sent))
        stored = run.stack.count_reservations()
        result.doubled += max(0, stored - keys)
        result.lost += max(0, keys - stored)
        run.say("Idempotency storm: other bodies, other users, a crash")
        asyncio.run(afterwards(result, servers[0], drop.drop_id, sent, bodies))
        for server in servers:
            server.kill()
        asyncio.run(replay(result, nursery.web(), drop.drop_id, sent, bodies))
        result.expect(run.stack.count_reservations() == 2 * keys, "a replay had an effect")
        result.faults = 2
        result.problems += run.stack.audit()


async def rain(
    result: Result, servers: list[Child], drop_id: str, sent: dict[str, int]
) -> dict[str, bytes]:
    """Send every key many times at once; return the one answer that each must have."""
    bodies: dict[str, bytes] = {}
    waiting = asyncio.Semaphore(KEYS_AT_ONCE)
    outcomes: Counter[tuple[int, str | None]] = Counter()

    async def send_all(key: str, number: int) -> None:
        async with waiting:
            answers = await asyncio.gather(
                *(
                    reserve(servers[twin % len(servers)], drop_id, number, key)
                    for twin in range(TWINS)
                )
            )
        outcomes.update(answer.outcome for answer in answers)
        done = [answer for answer in answers if answer.status == 201]
        first = [answer for answer in done if not is_replayed(answer)]
        result.expect(len(first) <= 1, f"{len(first)} first answers for one key")
        result.expect(len({answer.body for answer in done}) == 1, "answers of one key differ")
        bodies[key] = done[0].body if done else b""

    await asyncio.gather(*(send_all(key, number) for key, number in sent.items()))
    result.operations = sum(outcomes.values())
    allowed = {(201, None), (409, "idempotency_in_progress"), (503, "busy")}
    result.expect(set(outcomes) <= allowed, f"unexpected answers: {outcomes}")
    counted = (f"{count:,} × {status}" for (status, _), count in outcomes.items())
    result.facts.append(", ".join(counted))
    return bodies


async def afterwards(
    result: Result, server: Child, drop_id: str, sent: dict[str, int], bodies: dict[str, bytes]
) -> None:
    """Use the same keys with another body, and as other users."""
    for key, number in sent.items():
        other_body = await reserve(server, drop_id, number, key, '{"quantity": 2}')
        result.expect(
            other_body.outcome == (422, "idempotency_key_reused"),
            f"another body got {other_body.outcome}",
        )
        other = number + len(sent)
        answer = await reserve(server, drop_id, other, key)
        result.expect(
            answer.status == 201
            and not is_replayed(answer)
            and answer.document["user_id"] == user_id(other)
            and answer.body != bodies[key],
            "another user saw the first one's answer",
        )


async def replay(
    result: Result, server: Child, drop_id: str, sent: dict[str, int], bodies: dict[str, bytes]
) -> None:
    """Ask again after all servers have died."""
    for key, number in sent.items():
        again = await reserve(server, drop_id, number, key)
        is_same = again.body == bodies[key] and is_replayed(again)
        result.expect(is_same, "after a crash a key has another answer")


async def reserve(server: Child, drop_id: str, number: int, key: str, body: str = "") -> Answer:
    path = f"/api/drops/{drop_id}/reserve"
    return await ask_once(server.port or 0, "POST", path, user_id(number), key, body)


def is_replayed(answer: Answer) -> bool:
    return "idempotent-replayed" in answer.headers


def clocks(run: Run) -> None:
    what = f"Web processes and loops whose clock is {WRONG_SECONDS} s fast or slow."
    with run.scenario("Wrong clocks", what) as result, ExitStack() as stack:
        fast, slow = (
            stack.enter_context(Nursery(NURSERY_CLOCK_SECONDS=str(seconds)))
            for seconds in (WRONG_SECONDS, -WRONG_SECONDS)
        )
        webs = {"fast": fast.web(), "slow": slow.web()}
        for name, web in webs.items():
            (drop,) = run.stack.fresh()
            ends = time.time() + 3
            hold(run.stack, drop, 2, 20, ends)
            held = asyncio.run(reserve(web, drop.drop_id, 1, f"{name} clock")).document
            off = datetime.fromisoformat(held["expires_at"]) - now(run)
            right = timedelta(seconds=TTL_SECONDS)
            result.expect(
                abs(off - right) < timedelta(seconds=30)
                and TTL_SECONDS - 30 < held["expires_in"] <= TTL_SECONDS,
                f"a hold of the {name} one lasts {off}",
            )
            in_time = [purchase(web, drop.drop_id, number) for number in range(2, 7)]
            result.expect(set(in_time) == {(201, None)}, f"the {name} one sold {in_time}")
            # Later than all deadlines, and long before any of the two clocks says so, or after.
            time.sleep(max(0.0, ends + 0.5 - time.time()))
            late = [purchase(web, drop.drop_id, number) for number in range(7, 22)]
            result.expect(
                set(late) == {(409, "reservation_expired")}, f"the {name} one sold late: {late}"
            )
            result.operations += 1 + len(in_time) + len(late)
            result.problems += run.stack.audit()
        for name, nursery in {"fast": fast, "slow": slow}.items():
            (drop,) = run.stack.fresh(stock=60)
            hold(run.stack, drop, 1, 30, time.time() + 2)
            hold(run.stack, drop, 31, 30, time.time() + 60)
            loop = nursery.expiry_loop()
            wait_until_back(run, drop.drop_id, 30)
            time.sleep(0.5)
            loop.kill()
            query = "SELECT available_stock FROM drops_drop WHERE id = %(id)s"
            back = run.stack.execute(query, id=drop.drop_id)[0][0]
            result.expect(back == 30, f"the {name} loop expired {back} holds instead of 30")
            result.operations += back
            result.problems += run.stack.audit()


def now(run: Run) -> datetime:
    return run.stack.execute("SELECT clock_timestamp()")[0][0]
