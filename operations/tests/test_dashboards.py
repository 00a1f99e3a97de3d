"""The dashboard and the alerts speak of metrics that exist, and of runbooks that do."""

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from django.conf import settings

from operations.tests.test_metrics import metric_names

DASHBOARD = settings.BASE_DIR / "deploy/grafana-dashboard.json"
ALERTS = settings.BASE_DIR / "deploy/alerts.yml"
EXPECTED = {
    *("ExpiryLoopSilent", "ExpiryLagHigh", "EventLagHigh", "StockDrift"),
    *("DatabasePoolExhausted", "QueueWaitHigh", "ErrorRateHigh", "RedisAway"),
    *("SocketsNearLimit", "WebProcessDown"),
}


def alerts() -> list[dict]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def queries(node) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("expr"), str):
            yield node["expr"]
        for inner in node.values():
            yield from queries(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from queries(inner)


def names_in(query: str) -> set[str]:
    """Return the metrics that a query names; of a histogram, the histogram."""
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"\bdrops_\w+", query)}


def test_the_dashboard_asks_for_what_there_is():
    asked = list(queries(json.loads(DASHBOARD.read_text())))

    assert len(asked) >= 15
    assert set().union(*map(names_in, asked)) <= metric_names()
    assert all(names_in(query) or "up{" in query for query in asked)


def test_the_dashboard_shows_everything_that_is_measured():
    shown = set().union(*map(names_in, queries(json.loads(DASHBOARD.read_text()))))

    assert metric_names() - shown == set()


def test_every_panel_has_a_place_of_its_own():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_there_is_an_alert_for_each_thing_that_can_go_wrong():
    assert {alert["alert"] for alert in alerts()} == EXPECTED


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_what_there_is_and_names_its_runbook(alert):
    names = names_in(alert["expr"])
    assert names <= metric_names()
    assert names or "up{" in alert["expr"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"]
    path, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor == alert["alert"].lower()
    text = (settings.BASE_DIR / path).read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert anchor in anchors
