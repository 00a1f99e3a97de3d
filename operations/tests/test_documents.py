"""What the documents tell operators to type, typed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from django.conf import settings
from django.db import connection

from drops.tests.factories import DropFactory
from purchases.services import purchase
from reservations.services import Claim, reserve
from tests.servers import database_url
from users.tests.factories import UserFactory

OPERATIONS = settings.BASE_DIR / "docs/operations.md"
SCALING = settings.BASE_DIR / "docs/scaling.md"
RESTORED = "restored_by_the_documents"
ALERTS = {
    *("StockDrift", "WebProcessDown", "ErrorRateHigh", "DatabasePoolExhausted", "QueueWaitHigh"),
    *("ExpiryLoopSilent", "ExpiryLagHigh", "EventLagHigh", "RedisAway", "SocketsNearLimit"),
}

pytestmark = [pytest.mark.slow, pytest.mark.servers]


def block(document: Path, kind: str) -> str:
    """Return the code block of ``document`` whose fence says ``kind``."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture
def shell(transactional_db, servers, tmp_path):
    """Return a function that runs a script as an operator of the test database would."""
    if servers is None:
        pytest.skip("PostgreSQL is elsewhere, and so may be its programs")
    url = database_url().rstrip("?")
    restored = urlunsplit(urlsplit(url)._replace(path=f"/{RESTORED}"))
    path = [str(servers.postgres_bin), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {
        "PATH": os.pathsep.join(path),
        "DATABASE_URL": url,
        "REDIS_URL": settings.REDIS_URL,
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "RESTORED_NAME": RESTORED,
        "RESTORED_URL": restored,
        "BACKUP": str(tmp_path / "drops.dump"),
    }

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=settings.BASE_DIR,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    yield run
    with connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {RESTORED} WITH (FORCE)")


def sell_some() -> None:
    drop = DropFactory(total_stock=5)
    for user in UserFactory.create_batch(3):
        reserve(drop.pk, Claim(user.pk))
    purchase(drop.pk, user.pk)


QUERY = "SELECT total_stock, available_stock, sold_stock FROM drops_drop"


def test_a_backup_comes_back_and_the_books_balance(shell):
    sell_some()

    shell(block(OPERATIONS, "sh backup"))
    sell_some()  # after the backup
    told = shell(block(OPERATIONS, "sh restore"))

    assert "1 drops audited: every unit is accounted for." in told
    assert shell(f'psql -At "$RESTORED_URL" -c "{QUERY}"') == "5|2|1\n"


RESERVE_MORE = """
import django; django.setup()
from django.contrib.auth import get_user_model
from drops.models import Drop
from realtime.services import prune_events
from reservations.services import Claim, reserve
drop, user = Drop.objects.get(), get_user_model().objects.create(username="late")
reserve(drop.pk, Claim(user.pk))
print(*drop.events.order_by("seq").values_list("seq", flat=True))
print(prune_events(24, 100))
"""


def test_the_event_log_can_be_partitioned(shell):
    sell_some()
    shell(block(OPERATIONS, "sh backup"))
    shell(block(OPERATIONS, "sh restore"))
    before = shell('psql -At "$RESTORED_URL" -c "SELECT count(*) FROM realtime_event"')

    script = block(SCALING, "sql partition")
    shell(f"psql --quiet -v ON_ERROR_STOP=1 \"$RESTORED_URL\" <<'SQL'\n{script}\nSQL")

    told = shell(f"DATABASE_URL=$RESTORED_URL python - <<'EOF'{RESERVE_MORE}EOF")
    numbers = [*range(1, int(before) + 2)]
    assert told.splitlines() == [" ".join(map(str, numbers)), "0"]
    assert "every unit" in shell("DATABASE_URL=$RESTORED_URL python manage.py audit_stock")
    partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'realtime_event'::regclass"
    assert shell(f'psql -At "$RESTORED_URL" -c "{partitions}"') == "8\n"


def test_each_alert_has_its_runbook():
    _, alerts = OPERATIONS.read_text().split("\n## Alerts\n")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", alerts, re.MULTILINE | re.DOTALL))

    assert set(sections) == ALERTS
    for name, text in sections.items():
        for part in ("**Users notice**", "**Look at**", "**Do**", "**Wake somebody**"):
            assert part in text, (name, part)
