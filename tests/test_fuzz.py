"""Requests of every shape that the OpenAPI document allows, and of shapes that it doesn't.

Each identity mode is asked by the hot routes, as a server calls them: no 5xx, and nothing
that the document doesn't say. ``FUZZ_CASES=20000 pytest -m slow tests/test_fuzz.py``
asks for longer.
"""

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import schemathesis
from django.conf import settings
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from config.openapi import IDENTITY_SCHEMES
from drops.tests.factories import DropFactory
from reservations.tests.factories import ReservationFactory
from tests.hot import Lane, Request, Response, hot_lane
from tests.identities import bearer, identity_mode, signed
from users.tests.factories import UserFactory

# Per mode; CI asks for more (see .ci/run).
CASES = int(os.environ.get("FUZZ_CASES", "40"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ORIGIN = "http://testserver"


def proof(mode: str, user: Any, method: str, target: str, body: bytes) -> dict[str, str]:
    if mode == "header":
        return {"X-User-Id": str(user.pk)}
    return signed(method, target, user, body) if mode == "gateway" else bearer(user)


class Fuzzer:
    """Sends what schemathesis makes up, and checks the answers against the document."""

    def __init__(self, mode: str, lane: Lane, runner: asyncio.Runner) -> None:
        self.mode, self.lane, self.runner = mode, lane, runner
        self.user = UserFactory(is_staff=True)
        self.drop = DropFactory(created_by=self.user, total_stock=1_000_000, max_per_user=None)
        self.hold = ReservationFactory(user=self.user)
        self.sent = 0

    def send(self, case: Any) -> None:
        self.sent += 1
        # Most made-up ids name nothing; every other request is about something that exists.
        if self.sent % 2:
            known = {"drop_id": self.drop.pk, "id": self.drop.pk}
            if "reservations" in case.path:
                known["id"] = self.hold.pk
            for name in case.path_parameters or {}:
                case.path_parameters[name] = str(known.get(name, self.drop.pk))
        prepared = requests.Request(**case.as_transport_kwargs(base_url=ORIGIN)).prepare()
        body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body or b""
        if self.sent % 5:
            # The rest comes without an identity, or with one that is made up.
            prepared.headers.update(
                proof(self.mode, self.user, str(prepared.method), prepared.path_url, body)
            )
        answer = self.runner.run(self.lane.send(as_asgi(prepared, body)))
        case.validate_response(as_response(answer, prepared), checks=CHECKS)


def as_asgi(prepared: requests.PreparedRequest, body: bytes) -> Request:
    headers = tuple(
        (str(name), value if isinstance(value, bytes) else str(value).encode(errors="replace"))
        for name, value in prepared.headers.items()
        if name.lower() not in ("content-length", "transfer-encoding")
    )
    return Request(str(prepared.method), prepared.path_url, (body,) if body else (), headers)


def as_response(answer: Response, prepared: requests.PreparedRequest) -> schemathesis.Response:
    headers: dict[str, list[str]] = {}
    for name, value in answer.headers:
        headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return schemathesis.Response(answer.status, headers, answer.body, prepared, 0.0, verify=True)


@pytest.mark.slow
@pytest.mark.timeout(max(120, CASES // 10))
@pytest.mark.parametrize("mode", IDENTITY_SCHEMES)
@pytest.mark.django_db(transaction=True)
def test_the_api_is_what_its_document_says(mode):
    # Nobody fuzzes within a limit.
    unlimited = dict.fromkeys(settings.RATE_LIMITS, ("", ""))
    with identity_mode(mode, RATE_LIMITS=unlimited), hot_lane() as lane, asyncio.Runner() as runner:
        document = runner.run(lane.get("/api/schema?format=json")).json()
        schema = schemathesis.openapi.from_dict(document)
        operations = [found.ok() for found in schema.get_all_operations()]
        fuzzer = Fuzzer(mode, lane, runner)
        kinds = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        for operation in operations:
            for kind in kinds:
                fuzz(fuzzer, operation, kind, CASES // (len(operations) * len(kinds)) + 1)

    assert len(operations) >= 13
    assert fuzzer.sent >= CASES * 0.8


def fuzz(fuzzer: Fuzzer, operation: Any, kind: GenerationMode, cases: int) -> None:
    @seed(20251122)
    @hypothesis_settings(
        max_examples=cases,
        database=None,
        deadline=None,
        # A failure is named as it is; making it smaller would send it many times more.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=kind))
    def send(case: Any) -> None:
        fuzzer.send(case)

    send()


def test_the_parts_of_an_address_survive_the_way():
    """What is signed must be what arrives, or the fuzz test would prove nothing."""
    prepared = requests.Request("GET", f"{ORIGIN}/api/drops/%2F?x=%20").prepare()

    request = as_asgi(prepared, b"")

    assert request.address == "/api/drops/%2F?x=%20"
    assert urlsplit(request.address).query == "x=%20"
