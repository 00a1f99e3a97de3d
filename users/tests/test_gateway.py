"""IDENTITY_MODE=gateway: only what a gateway has signed is believed, and once."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from django.conf import settings

from drops.tests.factories import DropFactory
from tests.hot import Request, hot_lane
from tests.identities import SECRETS, identity_mode, signed
from users import replays
from users.exceptions import InvalidIdentity
from users.identity import Asking, Identity, identify
from users.models import User
from users.tests.factories import UserFactory

ADA = "1b4e28ba-2fa1-4d2e-883f-b9a761bde3fb"
EXAMPLES = settings.BASE_DIR / "docs" / "examples"
TARGET = f"/api/drops/{ADA}/reserve?x=1"


@pytest.fixture(autouse=True)
def gateway():
    with identity_mode("gateway"):
        yield


def asking(headers, method="POST", target=TARGET, body=b""):
    lower = {name.lower(): value for name, value in headers.items()}
    return Asking(method, target.encode(), lower.get, lambda: body)


def test_believes_a_signed_identity():
    identity = identify(asking(signed("POST", TARGET, ADA, b"{}", name="Ada"), body=b"{}"))

    assert identity == Identity(uuid.UUID(ADA), "Ada")
    assert len(identity.signature) == 32


@pytest.mark.parametrize("at", [time.time, lambda: str(int(time.time())), lambda: time.time() - 59])
def test_takes_whole_seconds_and_a_clock_that_is_a_little_off(at):
    assert identify(asking(signed("POST", TARGET, ADA, at=at())))


def test_takes_the_second_secret_too():
    assert identify(asking(signed("POST", TARGET, ADA, secret=SECRETS[1])))


def test_nobody_says_nothing():
    assert identify(asking({})) is None


CHANGES = {
    "another method": {"method": "DELETE"},
    "another address": {"target": f"/api/drops/{ADA}/purchase?x=1"},
    "another query": {"target": TARGET[:-1] + "2"},
    "no query": {"target": TARGET[:-4]},
    "another body": {"body": b"{} "},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_signature_is_for_one_request(change):
    headers = signed("POST", TARGET, ADA, b"{}")

    with pytest.raises(InvalidIdentity, match="does not belong"):
        identify(asking(headers, **{"body": b"{}"} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"X-User-Id": ADA.replace("1b", "1c")},
        {"X-User-Id": ADA.upper()},
        {"X-User-Name": "Grace"},
        {"X-User-Name": ""},
    ],
)
def test_a_signature_is_for_one_user_and_name(change):
    with pytest.raises(InvalidIdentity):
        identify(asking(signed("POST", TARGET, ADA, name="Ada") | change))


NOW = int(time.time())
ODD_SIGNATURES = {
    "none": None,
    "an empty one": "",
    "a word": "trust me",
    "without a time": f"v1={'0' * 64}",
    "without a hash": f"t={NOW}",
    "a short hash": f"t={NOW},v1={'0' * 63}",
    "a long hash": f"t={NOW},v1={'0' * 65}",
    "a hash in capitals": f"t={NOW},v1={'A' * 64}",
    "a hash of zeros": f"t={NOW},v1={'0' * 64}",
    "another version": f"t={NOW},v0={'0' * 64}",
    "a negative time": f"t=-{NOW},v1={'0' * 64}",
    "an exponent": f"t=1e9,v1={'0' * 64}",
    "a time that is none": f"t=NaN,v1={'0' * 64}",
    "Arabic digits": f"t=\u0661\u0662,v1={'0' * 64}",
    "5,000 digits": f"t={'9' * 5000},v1={'0' * 64}",
    "twice": f"t={NOW},v1={'0' * 64},t={NOW},v1={'0' * 64}",
    "10 kB": "t=" + "a" * 10_000,
}


@pytest.mark.parametrize("signature", ODD_SIGNATURES.values(), ids=ODD_SIGNATURES.keys())
def test_refuses_an_odd_signature(signature):
    headers = {"X-User-Id": ADA}
    if signature is not None:
        headers["X-Auth-Signature"] = signature

    with pytest.raises(InvalidIdentity):
        identify(asking(headers))


@pytest.mark.parametrize("seconds", [-61, 61, -1e9, 1e9])
def test_refuses_a_time_that_is_too_far_away(seconds):
    with pytest.raises(InvalidIdentity, match="60 seconds"):
        identify(asking(signed("POST", TARGET, ADA, at=time.time() + seconds)))


def test_refuses_a_signature_without_a_user():
    headers = signed("POST", TARGET, ADA)
    del headers["X-User-Id"]

    with pytest.raises(InvalidIdentity):
        identify(asking(headers))


def test_refuses_the_other_reading_of_a_name_that_looks_like_a_user():
    """``target.ADA.GRACE`` is Ada at ``target`` under Grace's id as a name, or Grace elsewhere."""
    grace = "2c5f39cb-30b2-4e3f-994a-caba72cef40c"
    headers = signed("POST", f"{TARGET}&y=", ADA, name=grace)
    assert identify(asking(headers, target=f"{TARGET}&y=")).user_id == uuid.UUID(ADA)
    del headers["X-User-Name"]

    with pytest.raises(InvalidIdentity):
        identify(asking(headers | {"X-User-Id": grace}, target=f"{TARGET}&y=.{ADA}"))


@pytest.mark.parametrize("end", ["", ".", ".Hopper"])
def test_refuses_the_other_reading_of_an_address_that_looks_like_a_user(end):
    """``target.GRACE.ADA`` is Ada at an address of her choice, or Grace named after Ada's id."""
    grace = "2c5f39cb-30b2-4e3f-994a-caba72cef40c"
    headers = signed("POST", f"{TARGET}.{grace}{end}", ADA, name="Ada")
    name = f"{end}.{ADA}.Ada".removeprefix(".")

    with pytest.raises(InvalidIdentity):
        identify(asking(headers | {"X-User-Id": grace, "X-User-Name": name}))


# --- Once -------------------------------------------------------------------------------


def identity_of(**changes):
    return identify(asking(signed("POST", TARGET, ADA, **changes)))


def test_a_signed_request_passes_once_in_all_processes(servers):
    identity = identity_of()
    replays.refuse_replay(identity)

    for process in (replays._used, replays.UsedSignatures()):
        assert not process.use(identity.signature).result(timeout=5)
    with pytest.raises(InvalidIdentity, match="already"):
        replays.refuse_replay(identity)
    assert replays.UsedSignatures().use(identity_of().signature).result(timeout=5)


def test_many_that_arrive_together_pass_once_each(servers):
    processes = [replays.UsedSignatures(), replays.UsedSignatures()]
    signatures = [identity_of(at=time.time() + n / 1000).signature for n in range(50)]

    uses = [process.use(signature) for signature in signatures * 2 for process in processes]

    assert sum(use.result(timeout=5) for use in uses) == 50


def test_a_signed_read_may_be_repeated():
    identity = identify(asking(signed("GET", TARGET, ADA), method="GET"))

    assert identity.signature is None
    replays.refuse_replay(identity)
    replays.refuse_replay(identity)


def test_without_redis_each_process_refuses_its_own_replays(monkeypatch):
    monkeypatch.setattr(replays, "ask_redis", lambda ask, instead: instead())
    identity, process = identity_of(), replays.UsedSignatures()

    assert process.use(identity.signature).result(timeout=5)
    assert not process.use(identity.signature).result(timeout=5)


def test_an_unexpected_error_leaves_nobody_waiting(monkeypatch, caplog):
    monkeypatch.setattr(replays, "ask_redis", lambda ask, instead: 1 / 0)
    process = replays.UsedSignatures()

    for number in range(3):
        assert process.use(number.to_bytes(32)).result(timeout=5)
        assert not process.use(number.to_bytes(32)).result(timeout=5)
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 3


def test_own_signatures_are_forgotten_when_they_are_too_many_or_too_old(monkeypatch):
    monkeypatch.setattr(replays, "ask_redis", lambda ask, instead: instead())
    monkeypatch.setattr(replays, "MAX_OWN", 10)
    process = replays.UsedSignatures()

    for number in range(30):
        assert process.use(number.to_bytes(32)).result(timeout=5)
    assert len(process._own) == 10
    monkeypatch.setattr(replays, "LIFETIME_SECONDS", -1)
    assert process.use(b"x" * 32).result(timeout=5)
    assert process.use(b"x" * 32).result(timeout=5)


def test_a_replayed_claim_changes_nothing(client_of, db):
    drop, user = DropFactory(max_per_user=None), UserFactory()
    path = f"/api/drops/{drop.pk}/reserve"
    headers = signed("POST", path, user)
    send = lambda: client_of().post(path, headers=headers)  # noqa: E731

    assert [send().status_code, send().json()["code"]] == [201, "invalid_identity"]
    drop.refresh_from_db()
    assert drop.available_stock == 9


# --- Users, and the examples ------------------------------------------------------------


def test_a_signed_stranger_becomes_a_user(client_of, db):
    headers = signed("GET", "/api/me", ADA, name="Ada")

    response = client_of().get("/api/me", headers=headers)

    assert response.json() == {"id": ADA, "username": "Ada"}
    assert User.objects.get().pk == uuid.UUID(ADA)


@pytest.mark.django_db(transaction=True)
def test_a_signed_stranger_buys_in_production_too(settings):
    settings.DEBUG, settings.ALLOWED_HOSTS = False, ["testserver"]
    drop, known, absent = DropFactory(), UserFactory(), uuid.uuid4()

    async def claims(lane):
        async def claim(user, drop_id=drop.pk):
            path = f"/api/drops/{drop_id}/reserve"
            headers = signed("POST", path, user, name="Ada")
            return await lane.send(Request("POST", path, headers=tuple(headers.items())))

        return await asyncio.gather(
            claim(ADA), claim(known), claim(uuid.uuid4()), claim(uuid.uuid4(), absent)
        )

    with hot_lane() as lane:
        answers = asyncio.run(claims(lane))

    assert [answer.status for answer in answers] == [201, 201, 201, 404]
    assert User.objects.get(pk=ADA).username.startswith("Ada")
    drop.refresh_from_db()
    assert drop.available_stock == 7


@pytest.mark.django_db(transaction=True)
def test_a_signed_stranger_stays_one_where_users_are_made_elsewhere(settings):
    settings.DEBUG, settings.ALLOWED_HOSTS = False, ["testserver"]
    settings.CREATE_UNKNOWN_USERS = False
    path = f"/api/drops/{DropFactory().pk}/reserve"
    headers = tuple(signed("POST", path, ADA).items())

    with hot_lane() as lane:
        answer = asyncio.run(lane.send(Request("POST", path, headers=headers)))

    assert (answer.status, answer.json()["code"]) == (401, "unknown_user")
    assert not User.objects.filter(pk=ADA).exists()


def test_a_stranger_without_a_signature_becomes_nobody(client_of, db):
    response = client_of(ADA).get("/api/me")

    assert (response.status_code, response.json()["code"]) == (401, "invalid_identity")
    assert response["WWW-Authenticate"] == "X-Auth-Signature"
    assert not User.objects.exists()


def python_example(*arguments):
    spec = importlib.util.spec_from_file_location("sign", EXAMPLES / "sign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    headers = module.sign(*arguments)
    return {
        name: value.decode("latin-1") if isinstance(value, bytes) else value
        for name, value in headers.items()
    }


def javascript_example(secret, method, target, user_id, name, body):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = (
        f"import {{ sign }} from {json.dumps(str(EXAMPLES / 'sign.mjs'))};"
        f"const given = {json.dumps([secret, method, target, user_id, name, body.decode()])};"
        "console.log(JSON.stringify(sign(...given)));"
    )
    command = [node, "--input-type=module", "-e", script]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)


@pytest.mark.parametrize("example", [python_example, javascript_example])
@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("", b""),
        (" Zoë 👟 ", '{"quantity": 1, "ü": 0}'.encode()),
        # Their last bytes are blanks in Latin-1.
        ("Nicolà", b""),
        ("SOFÅ", b""),
        ("Лёх", b""),
    ],
)
def test_the_examples_sign_what_is_believed(example, name, body):
    headers = example(SECRETS[0], "POST", TARGET, ADA, name, body)

    identity = identify(asking(headers, body=body))

    assert identity == Identity(uuid.UUID(ADA), name.strip() or None)


@pytest.mark.parametrize("file", ["sign.py", "sign.mjs"])
def test_the_examples_are_short(file):
    assert len(Path(EXAMPLES / file).read_text().splitlines()) <= 21
