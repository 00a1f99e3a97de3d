"""IDENTITY_MODE=jwt: only good tokens of our own provider are believed."""

import asyncio
import json
import time
import uuid

import jwt
import pytest

from drops.tests.factories import DropFactory
from tests.hot import hot_lane, viewset_lane
from tests.identities import (
    AUDIENCE,
    ISSUER,
    base64url,
    bearer,
    encoded,
    identity_mode,
    private_key,
    public_pem,
    swapped_algorithm,
    token,
    without_algorithm,
)
from users import tokens
from users.exceptions import InvalidIdentity
from users.identity import Asking, Identity, identify
from users.models import User

ADA = "1b4e28ba-2fa1-4d2e-883f-b9a761bde3fb"


@pytest.fixture(autouse=True)
def jwt_mode():
    with identity_mode("jwt"):
        yield


def identity_of(headers):
    lower = {name.lower(): value for name, value in headers.items()}
    return identify(Asking("POST", b"/api/me", lower.get, bytes))


def test_believes_a_good_token_each_time():
    headers = bearer(ADA, name="Ada Lovelace")

    assert identity_of(headers) == Identity(uuid.UUID(ADA), "Ada Lovelace")
    assert identity_of(headers) == Identity(uuid.UUID(ADA), "Ada Lovelace")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", " Bearer "])
def test_takes_the_scheme_in_any_case(scheme):
    assert identity_of({"Authorization": f"{scheme} {token(ADA)}"})


def test_names_a_user_after_the_claims():
    assert identity_of(bearer(ADA, preferred_username="ada")).name == "ada"
    assert identity_of(bearer(ADA, name="Zo\u202eë", preferred_username="z")).name == "Zoë"
    assert identity_of(bearer(ADA, name=["Ada"])).name is None


@pytest.mark.parametrize(
    "name",
    [
        *("\ud800Ada", "Ada\u061c", "A\u180eda", "Ada\U000e0041\U000e007f"),
        *("A\u00adda", "Ada\u3164", "\u115fAda\u1160", "\uffa0Ada", "Ada\u2800", "A\u034fda\ufff9"),
    ],
)
def test_a_name_keeps_no_halves_of_characters_and_nothing_invisible(client_of, db, name):
    response = client_of().get("/api/me", headers=bearer(ADA, name=name))

    assert response.json() == {"id": ADA, "username": "Ada"}


def test_a_subject_that_is_no_uuid_stands_for_the_same_user_each_time():
    first, second = (identity_of(bearer("auth0|5f7c8ec7", jti=jti)) for jti in "ab")

    assert first.user_id == second.user_id != identity_of(bearer("auth0|5f7c8ec8")).user_id


@pytest.mark.parametrize(
    "subject", [f"{{{ADA}}}", f"urn:uuid:{ADA}", ADA.replace("-", ""), f" {ADA}", f"{ADA}\n"]
)
def test_a_subject_that_only_looks_like_a_uuid_is_somebody_else(subject):
    assert identity_of(bearer(ADA.upper())).user_id == uuid.UUID(ADA)
    assert identity_of(bearer(subject)).user_id == uuid.uuid5(
        uuid.NAMESPACE_URL, f"{ISSUER}\n{subject}"
    )


def test_plain_headers_say_nothing_here():
    assert identity_of({"X-User-Id": ADA}) is None


def bad_tokens():
    good = token(ADA)
    head, claims, signature = good.split(".")
    now = int(time.time())
    return {
        "nothing": "",
        "a word": "token",
        "two parts": f"{head}.{claims}",
        "four parts": f"{good}.{signature}",
        "no signature": f"{head}.{claims}.",
        "another signature": token(ADA, key=private_key(1)),
        "a changed claim": f"{head}.{encoded({'sub': ADA})}.{signature}",
        "alg=none": without_algorithm(ADA)["Authorization"][7:],
        "a swapped algorithm": swapped_algorithm(ADA)["Authorization"][7:],
        "an algorithm not on the list": token(ADA, algorithm="RS512"),
        "a wrong audience": token(ADA, aud="another shop"),
        "a wrong issuer": token(ADA, iss="https://evil.example/"),
        "expired": token(ADA, exp=now - 60),
        "not yet valid": token(ADA, nbf=now + 600),
        "without exp": token(ADA, exp=None),
        "without aud": token(ADA, aud=None),
        "without iss": token(ADA, iss=None),
        "without sub": token(ADA, sub=None),
        "a number as a subject": jwt.encode(
            {"sub": 5, "aud": AUDIENCE, "iss": ISSUER, "exp": now + 60}, private_key(), "RS256"
        ),
        "half a character in the subject": token("\ud800x"),
        "the nil UUID": token("00000000-0000-0000-0000-000000000000"),
        "exp as a word": token(ADA, exp="soon"),
        "exp beyond all time": token(ADA, exp=10**400),
        "exp as infinity": token(ADA, exp=float("inf")),
        "a critical header": jwt.encode(
            {"sub": ADA, "aud": AUDIENCE, "iss": ISSUER, "exp": now + 60},
            private_key(),
            "RS256",
            headers={"crit": ["exp"]},
        ),
        "no JSON": f"{base64url(b'{')}.{claims}.{signature}",
        "deep JSON": f"{base64url(b'[' * 5000)}.{claims}.{signature}",
        "no ASCII": f"{head}.{claims}.ü",
        "9 kB": "a" * 9000,
    }


@pytest.mark.parametrize("name", bad_tokens().keys())
def test_refuses_a_bad_token(name):
    for _ in range(2):  # nothing bad is remembered as good
        with pytest.raises(InvalidIdentity):
            identity_of({"Authorization": f"Bearer {bad_tokens()[name]}"})


@pytest.mark.parametrize("header", ["", "Basic YWRtaW46YWRtaW4=", "Bearer", f"Token {ADA}"])
def test_refuses_another_scheme(header):
    with pytest.raises(InvalidIdentity):
        identity_of({"Authorization": header})


def test_a_remembered_token_ends_on_time(monkeypatch):
    headers = bearer(ADA, exp=int(time.time()) + 30)
    assert identity_of(headers)
    ends = time.time() + 30 + tokens.LEEWAY_SECONDS + 1
    monkeypatch.setattr(tokens.time, "time", lambda: ends)

    with pytest.raises(InvalidIdentity, match="expired"):
        identity_of(headers)


def test_remembers_no_more_tokens_than_it_may(monkeypatch):
    monkeypatch.setattr(tokens, "MAX_REMEMBERED", 5)

    for number in range(12):
        identity_of(bearer(ADA, jti=str(number)))

    assert len(tokens._verified) <= 5


def jwks(*numbers):
    algorithm = jwt.algorithms.RSAAlgorithm
    keys = [
        algorithm.to_jwk(private_key(number).public_key(), as_dict=True)
        | {"kid": f"key-{number}", "alg": "RS256", "use": "sig"}
        for number in numbers
    ]
    return json.dumps({"keys": keys})


def signed_by(number, kid=None):
    claims = {"sub": ADA, "aud": AUDIENCE, "iss": ISSUER, "exp": int(time.time()) + 60}
    headers = {"kid": kid} if kid else None
    token = jwt.encode(claims, private_key(number), "RS256", headers=headers)
    return {"Authorization": f"Bearer {token}"}


def test_chooses_a_key_of_the_file_and_hears_of_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "FILE_SECONDS", 0)
    file = tmp_path / "jwks.json"
    file.write_text(jwks(0, 1))
    with identity_mode("jwt", JWT_KEY="", JWT_JWKS_FILE=str(file)):
        old = signed_by(0, "key-0")
        assert identity_of(old)
        assert identity_of(signed_by(1, "key-1"))
        for wrong in (signed_by(0, "key-1"), signed_by(0, "key-7"), signed_by(0)):
            with pytest.raises(InvalidIdentity):
                identity_of(wrong)

        for unusable in ("{ half", "[]", '{"keys": []}'):
            file.write_text(unusable)
            assert identity_of(old)

        (tmp_path / "new.json").write_text(jwks(1))
        (tmp_path / "new.json").replace(file)
        assert identity_of(signed_by(1))
        with pytest.raises(InvalidIdentity):
            identity_of(old)


def test_a_key_that_is_taken_away_while_its_token_is_read_opens_nothing_later(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tokens, "FILE_SECONDS", 0)
    file = tmp_path / "jwks.json"
    file.write_text(jwks(0))
    read_claims = tokens.read_claims

    def read_slowly(given):
        claims = read_claims(given)
        # Another thread has a token, too, and finds the new file.
        (tmp_path / "new.json").write_text(jwks(1))
        (tmp_path / "new.json").replace(file)
        tokens.key_file.refresh()
        return claims

    with identity_mode("jwt", JWT_KEY="", JWT_JWKS_FILE=str(file)):
        old = signed_by(0)
        monkeypatch.setattr(tokens, "read_claims", read_slowly)
        assert identity_of(old)
        monkeypatch.setattr(tokens, "read_claims", read_claims)

        with pytest.raises(InvalidIdentity):
            identity_of(old)


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_half_a_character_that_a_refusal_quotes_is_no_error_of_the_server(lane):
    head = encoded({"alg": "RS256", "typ": "JWT", "crit": ["\ud800"]})
    headers = {"Authorization": f"Bearer {head}.{token(ADA).partition('.')[2]}"}
    drop = DropFactory()

    async def ask(application):
        return [
            await application.post(f"/api/drops/{drop.pk}/reserve", None, **headers),
            await application.get("/api/drops", **headers),
        ]

    with lane() as application:
        answers = asyncio.run(ask(application))

    for answer in answers:
        assert (answer.status, answer.json()["code"]) == (401, "invalid_identity")
        assert answer.json()["detail"].endswith("Unsupported critical extension: ?")


def test_a_verified_stranger_becomes_a_user(client_of, db):
    response = client_of().get("/api/me", headers=bearer(ADA, name="Ada"))

    assert response.json() == {"id": ADA, "username": "Ada"}
    assert User.objects.get().pk == uuid.UUID(ADA)


def test_asks_for_a_bearer_token(client_of, db):
    response = client_of().get("/api/me")

    assert (response.status_code, response["WWW-Authenticate"]) == (401, "Bearer")
    assert public_pem() not in response.text
