"""Scenarios in which processes, the database and Redis die under a sale."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx

from benchmarks.data import hold
from benchmarks.users import user_id
from tests.servers import WebServer, running_web_servers
from tests.torture.failpoints import FAILPOINTS
from tests.torture.processes import Child, Nursery
from tests.torture.run import RECOVERY_SECONDS, Result, Run
from tests.torture.sale import Sale
from tests.torture.screens import Screens
from tests.torture.stack import LIMITED, wait_for

CUSTOMERS = 200
CUSTOMERS_WITHOUT_REDIS = 40
WARM_UP_SECONDS = 1.0
DEATH_SECONDS = 10
STANDSTILL_SECONDS = 0.5
SCREENS = 20
# How long after the last change a screen may still be wrong.
LATE_SECONDS = 7


def kills(run: Run) -> None:
    seconds, every = run.size(10, 60), 2.0
    what = f"kill -9 of one of three web processes every {every:g} s, {CUSTOMERS} customers."
    with run.scenario("Web processes killed", what) as result, Nursery() as nursery:
        servers = [nursery.web() for _ in range(3)]
        sale = run.sale(lambda: [server.port or 0 for server in servers], CUSTOMERS)
        with sale.open():
            for number in range(int(seconds / every)):
                sale.run_for(every)
                victim = run.random.randrange(len(servers))
                servers[victim].kill()
                servers[victim] = nursery.web()
                result.faults += 1
                run.say(f"Web processes killed: {number + 1} of {int(seconds / every)}")
        result.recovered(sale.longest_silence())
        finish(result, sale)


def failpoints(run: Run) -> None:
    times = run.size(2, 20)
    what = f"A web process dies at a chosen point of its work, {times} times at each."
    with run.scenario("Web processes that die in mid-work", what) as result, Nursery() as nursery:
        healthy = nursery.web()
        ports = [healthy.port or 0]
        sale = run.sale(lambda: list(ports), 40, pause_seconds=0.1)
        with sale.open():
            for name in FAILPOINTS:
                for _ in range(times):
                    doomed = nursery.web(name, run.random.randint(1, 6))
                    ports[:] = [healthy.port or 0, doomed.port or 0]
                    died = doomed.wait_until_dead(DEATH_SECONDS)
                    ports[:] = [healthy.port or 0]
                    doomed.kill()
                    result.expect(died, f"nobody died {name}")
                    result.faults += died
                run.say(f"Web processes that die in mid-work: {result.faults} deaths")
        finish(result, sale)


def database(run: Run) -> None:
    """Let the database fail in every way under the same web processes, never restarted."""
    with web_servers() as servers:
        ports = [server.port for server in servers]

        def sale_with(
            name: str, what: str, fault: Callable[[Sale, Result], None], customers: int = CUSTOMERS
        ) -> None:
            with run.scenario(name, what) as result:
                sale = run.sale(lambda: ports, customers)
                with sale.open():
                    sale.run_for(WARM_UP_SECONDS)
                    fault(sale, result)
                run.stack.reconnect()
                finish(result, sale)
                result.expect(
                    all(server.is_running for server in servers), "a web process has ended"
                )
                printed = "".join(server.log for server in servers)
                result.expect("Traceback" not in printed, f"a traceback:\n{printed[-3000:]}")

        def restarts(sale: Sale, result: Result) -> None:
            for _ in range(run.size(2, 10)):
                run.stack.restart_postgres()
                ready = time.monotonic()
                result.faults += 1
                result.recovered(sale.wait_for_success(ports, ready))
                run.say(f"PostgreSQL restarted: {result.faults} times")
                sale.run_for(0.5)

        def outage(sale: Sale, result: Result) -> None:
            run.stack.stop_postgres()
            sale.run_for(run.size(8, 20))
            run.stack.start_postgres()
            result.faults = 1
            result.recovered(sale.wait_for_success(ports, time.monotonic()))

        def terminations(sale: Sale, result: Result) -> None:
            for _ in range(run.size(4, 30)):
                run.stack.terminate_backends()
                result.faults += 1
                sale.run_for(1)
            result.recovered(sale.longest_silence())

        def frozen(sale: Sale, result: Result) -> None:
            with run.stack.postgres_frozen():
                sale.run_for(10)
            result.faults = 1
            result.recovered(sale.wait_for_success(ports, time.monotonic()))
            result.facts.append(f"slowest answer {sale.slowest_seconds:.1f} s")
            result.expect(
                sale.slowest_seconds < RECOVERY_SECONDS + 2,
                f"somebody waited {sale.slowest_seconds:.1f} s for an answer",
            )

        def used_up(sale: Sale, result: Result) -> None:
            with run.stack.connections_used_up():
                sale.run_for(run.size(5, 10))
            result.faults = 1
            result.recovered(sale.wait_for_success(ports, time.monotonic()))

        sale_with("PostgreSQL restarted", "`pg_ctl restart -m immediate` under load.", restarts)
        sale_with("PostgreSQL away", "Stopped for a while, under load.", outage)
        sale_with("PostgreSQL backends terminated", "All of them, each second.", terminations)
        sale_with("PostgreSQL frozen", "SIGSTOP to all its processes.", frozen)
        sale_with("Connections used up", "A stranger takes them all, ours included.", used_up)


def redis(run: Run) -> None:
    """Let Redis fail in every way; the sale must not notice."""
    with web_servers(REDIS_URL=run.stack.cable.url, **LIMITED) as servers:
        ports = [server.port for server in servers]
        faults: list[tuple[str, str, Callable[[], AbstractContextManager[None]]]] = [
            ("Redis killed", "kill -9, and gone for a while.", run.stack.redis_killed),
            ("Redis frozen", "SIGSTOP.", run.stack.redis_frozen),
            ("Redis cut off", "The network swallows all bytes.", run.stack.redis_cut_off),
        ]
        for name, what, fault in faults:
            with run.scenario(name, what) as result:
                # Few enough that nobody is turned away because the machine is slow.
                sale = run.sale(lambda: ports, CUSTOMERS_WITHOUT_REDIS)
                screens = Screens(lambda n: f"{servers[n % 2].ws_url}/ws/drops", SCREENS)
                with screens.lit():
                    with sale.open():
                        sale.run_for(WARM_UP_SECONDS)
                        with fault():
                            sale.run_for(run.size(4, 12))
                        sale.run_for(1)
                    late = screens.seconds_until_true(run.stack)
                result.faults = 1
                result.expect(late <= LATE_SECONDS, f"a screen was right only after {late:.1f} s")
                result.expect(screens.gaps == 0, f"{screens.gaps} frames were missed")
                finish(result, sale)
                # Not even once: nothing in a sale waits for Redis. Where this process itself
                # stood still for a moment, the machine had no time for anybody.
                result.expect(
                    not sale.failures or sale.longest_lag_seconds > STANDSTILL_SECONDS,
                    f"{len(sale.failures)} refused: {Counter(o for _, o in sale.failures)}",
                )
                result.facts.append(
                    f"{len(sale.failures)} requests refused, "
                    f"longest silence {sale.longest_silence():.2f} s, "
                    f"{SCREENS} screens right {late:.1f} s after the last change"
                )


@contextmanager
def web_servers(**environment: str) -> Iterator[tuple[WebServer, ...]]:
    servers = WebServer("uvicorn", **environment), WebServer("daphne", **environment)
    with running_web_servers(*servers):
        yield servers


def finish(result: Result, sale: Sale) -> None:
    """Judge the sale, and how long the servers needed."""
    verdict = result.add(sale)
    refused = len(sale.failures)
    result.facts.append(
        f"{verdict.confirmed:,} answers confirmed, {sale.broken:,} connections lost, "
        f"{refused:,} times 503 or 429"
    )
    result.expect(verdict.confirmed > 0, "nothing was confirmed")
    if result.recovery_seconds is not None:
        result.expect(
            result.recovery_seconds <= RECOVERY_SECONDS,
            f"serving again only after {result.recovery_seconds:.1f} s",
        )


def expiry(run: Run) -> None:
    count, seconds = run.size(800, 5000), run.size(6, 25)
    every = run.size(1, 3)
    what = f"Three loops, one killed every {every} s; {count:,} holds."
    with run.scenario("Expiry loops killed", what) as result, Nursery() as nursery:
        (drop,) = run.stack.fresh(stock=count)
        begin = time.time() + 1
        for step in range(10):
            first = 1 + step * count // 10
            hold(run.stack, drop, first, count // 10, begin + (step + 1) * seconds / 10)
        loops = [nursery.expiry_loop() for _ in range(3)]
        while time.time() < begin + seconds:
            time.sleep(every)
            loops.pop(0).kill()
            loops.append(nursery.expiry_loop())
            result.faults += 1
        back_at = wait_until_back(run, drop.drop_id, count)
        result.recovered(max(0.0, back_at - begin - seconds))
        check_expired(run, result, drop.drop_id, count)

    what = "A loop dies in the middle of a batch, before and after its commit."
    times = run.size(2, 20)
    with run.scenario("Expiry loops that die in mid-work", what) as result, Nursery() as nursery:
        points = [name for name in FAILPOINTS if "answer" not in name]
        count = len(points) * times * 60
        (drop,) = run.stack.fresh(stock=count)
        hold(run.stack, drop, 1, count, ends := time.time() + 2)
        time.sleep(max(0.0, ends - time.time()))
        for name in points:
            for _ in range(times):
                loop = nursery.expiry_loop(name, run.random.randint(1, 2))
                died = loop.wait_until_dead(DEATH_SECONDS)
                loop.kill()
                result.expect(died, f"no loop died {name}")
                result.faults += died
        nursery.expiry_loop()
        wait_until_back(run, drop.drop_id, count)
        check_expired(run, result, drop.drop_id, count)

    what = "All loops are down while holds end; nobody buys late, and then they are caught up."
    with run.scenario("No expiry loop at all", what) as result, Nursery() as nursery:
        count = run.size(100, 1000)
        (drop,) = run.stack.fresh(stock=count)
        web = nursery.web()
        ends = time.time() + 1
        hold(run.stack, drop, 1, count, ends)
        time.sleep(max(0.0, ends + run.size(1, 30) - time.time()))
        late = [purchase(web, drop.drop_id, number) for number in range(1, 51)]
        result.operations = len(late)
        result.expect(
            set(late) == {(409, "reservation_expired")}, f"bought late, or worse: {set(late)}"
        )
        started = time.time()
        nursery.expiry_loop()
        result.recovered(max(0.0, wait_until_back(run, drop.drop_id, count) - started))
        result.expect((result.recovery_seconds or 0) <= RECOVERY_SECONDS, "caught up too late")
        check_expired(run, result, drop.drop_id, count)


def purchase(web: Child, drop_id: str, number: int) -> tuple[int, str | None]:
    """Let a numbered user purchase; return the status and the code of a refusal."""
    answer = httpx.post(
        f"http://127.0.0.1:{web.port}/api/drops/{drop_id}/purchase",
        headers={"X-User-Id": user_id(number)},
        trust_env=False,
    )
    return answer.status_code, answer.json().get("code")


def wait_until_back(run: Run, drop_id: str, count: int) -> float:
    """Return when all units of the drop are available again."""
    query = "SELECT available_stock FROM drops_drop WHERE id = %(id)s"
    wait_for(lambda: run.stack.execute(query, id=drop_id)[0][0] == count)
    return time.time()


def check_expired(run: Run, result: Result, drop_id: str, count: int) -> None:
    """Check that each hold ended once; the audit compares with the events."""
    expired = run.stack.execute(
        "SELECT count(*) FROM reservations_reservation WHERE drop_id = %(id)s"
        " AND status = 'EXPIRED'",
        id=drop_id,
    )[0][0]
    result.operations += expired
    result.expect(expired == count, f"{expired} of {count} holds expired")
    result.problems += run.stack.audit()
