"""No request, however broken, gets a 500, and a refused one stores nothing."""

import gzip
import json
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from django.db import connection

from drops.models import Drop
from drops.tests.factories import DropFactory
from reservations.tests.factories import ReservationFactory
from users.tests.factories import UserFactory

SOMEBODY = "1b4e28ba-2fa1-4d2e-883f-b9a761bde3fb"
NEW_DROP = {"name": "Aurora", "price": "199.00", "total_stock": 5}
OVERRIDE = "\u202eAurora"
CLAIM = ("POST", "drops/{live}/reserve")


@dataclass(frozen=True)
class Bad:
    """A bad request and what it gets; ``{...}`` in the path names a row of ``world``."""

    method: str
    path: str
    status: int
    code: str
    body: Any = b""  # bytes go out as they are, anything else as JSON
    wrong: str | None = None  # the only field that is named
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def invalid(method: str, path: str, body: Any, wrong: str | None = None) -> Bad:
    return Bad(method, path, 400, "validation_error", body, wrong)


def new(name: str, value: Any, wrong: str | None = None) -> Bad:
    """A new drop that is fine but for one field."""
    return invalid("POST", "drops", NEW_DROP | {name: value}, wrong or name)


def sizes(value: Any, wrong: str) -> Bad:
    body = {"name": "Aurora", "price": "199.00", "variants": value}
    return invalid("POST", "drops", body, wrong)


def change(name: str, value: Any) -> Bad:
    return invalid("PATCH", "drops/{live}", {name: value}, name)


def claim(name: str, value: Any) -> Bad:
    return invalid("POST", "drops/{live}/reserve", {name: value}, name)


def claim_of(body: bytes, wrong: str) -> Bad:
    return invalid(*CLAIM, body, wrong)


def malformed(
    body: bytes, method: str = "POST", path: str = "drops", encoding: str | None = None
) -> Bad:
    headers = {"HTTP_CONTENT_ENCODING": encoding} if encoding else {}
    return Bad(method, path, 400, "malformed_body", body, headers=headers)


def identity(value: str) -> Bad:
    return Bad(
        "POST", "drops/{live}/reserve", 401, "invalid_identity", headers={"HTTP_X_USER_ID": value}
    )


def key(value: str) -> Bad:
    headers = {"HTTP_IDEMPOTENCY_KEY": value}
    return Bad(
        "POST", "drops", 400, "validation_error", NEW_DROP, "Idempotency-Key", headers=headers
    )


def missing(method: str, path: str, body: Any = b"") -> Bad:
    return Bad(method, path, 404, "not_found", body)


def wrong_method(method: str, path: str) -> Bad:
    return Bad(method, path, 405, "method_not_allowed", {})


def wrong_type(
    content_type: str,
    body: bytes = b'{"name": "Aurora"}',
    method: str = "POST",
    path: str = "drops",
) -> Bad:
    return Bad(method, path, 415, "unsupported_media_type", body, content_type=content_type)


def query(path: str, wrong: str) -> Bad:
    return invalid("GET", path, b"", wrong)


def accept(value: str) -> Bad:
    return Bad("GET", "drops", 406, "not_acceptable", headers={"HTTP_ACCEPT": value})


def size(**changes: Any) -> dict[str, Any]:
    return {"label": "EU 42", "total_stock": 1} | changes


BAD = {
    # JSON that is none
    "half an object": malformed(b"{"),
    "half a list": malformed(b"[1,"),
    "only a bracket": malformed(b"}"),
    "blanks": malformed(b"   "),
    "a trailing comma": malformed(b'{"name": "Aurora",}'),
    "single quotes": malformed(b"{'name': 'Aurora'}"),
    "a bare key": malformed(b'{name: "Aurora"}'),
    "a comment": malformed(b'{"name": "Aurora"} // five pairs'),
    "two documents": malformed(b'{"name": "Aurora"}{"name": "Aurora"}'),
    "a byte order mark": malformed(b"\xef\xbb\xbf" + json.dumps(NEW_DROP).encode()),
    "UTF-16": malformed(json.dumps(NEW_DROP).encode("utf-16")),
    "no UTF-8": malformed(b'{"name": "\xff\xfe"}'),
    "overlong UTF-8": malformed(b'{"name": "\xc0\x80"}'),
    "a surrogate in UTF-8": malformed(b'{"name": "\xed\xa0\x80"}'),
    "a raw NUL": malformed(b'{"name": "Au\x00rora"}'),
    "only a NUL": malformed(b"\x00"),
    "a raw line break": malformed(b'{"name": "Au\nrora"}'),
    "NaN": malformed(b'{"name": "Aurora", "price": NaN, "total_stock": 5}'),
    "Infinity": malformed(b'{"name": "Aurora", "price": 1, "total_stock": Infinity}'),
    "minus Infinity": malformed(b'{"name": "Aurora", "price": -Infinity, "total_stock": 5}'),
    "a leading zero": malformed(b'{"name": "Aurora", "price": 01, "total_stock": 5}'),
    "a plus sign": malformed(b'{"name": "Aurora", "price": +1, "total_stock": 5}'),
    "hexadecimal": malformed(b'{"name": "Aurora", "price": 1, "total_stock": 0x10}'),
    "5,000 digits": malformed(b'{"name": "Aurora", "price": 1' + b"0" * 5000 + b"}"),
    "nested 100,000 deep": malformed(b"[" * 100_000),
    "nested 5,000 deep and closed": malformed(b"[" * 5_000 + b"]" * 5_000),
    "objects nested 5,000 deep": malformed(b'{"name":' * 5_000 + b"1" + b"}" * 5_000),
    "a form in disguise": malformed(b"name=Aurora&price=1&total_stock=5"),
    # JSON that is no object
    "null": invalid("POST", "drops", b"null", ""),
    "a list": invalid("POST", "drops", [NEW_DROP], ""),
    "an empty list": invalid("POST", "drops/{live}/reserve", b"[]", ""),
    "a string": invalid("POST", "drops/{live}/reserve", b'"EU 42"', ""),
    "a number": invalid("POST", "drops/{live}/reserve", b"0", ""),
    "false": invalid("POST", "drops/{held}/purchase", b"false", ""),
    "a list to change by": invalid("PATCH", "drops/{live}", b"[]", ""),
    # Names and texts
    "no body": invalid("POST", "drops", b""),
    "an empty object": invalid("POST", "drops", {}),
    "no name": invalid("POST", "drops", {"price": 1, "total_stock": 5}, "name"),
    "an empty name": new("name", ""),
    "a blank name": new("name", " \t\n "),
    "a null name": new("name", None),
    "a number as a name": new("name", 42),
    "true as a name": new("name", True),
    "a list as a name": new("name", ["Aurora"]),
    "an object as a name": new("name", {"en": "Aurora"}),
    "201 characters": new("name", "x" * 201),
    "a name of 10 kB": new("name", "x" * 10_240),
    "a name of 10 kB of emoji": new("name", "\U0001f45f" * 2_560),
    "a NUL": new("name", "Au\x00rora"),
    "an escape character": new("name", "\x1b[31mAurora"),
    "a C1 control": new("name", "Au\x85rora"),
    "a lone high surrogate": new("name", "\ud83d"),
    "a lone low surrogate": new("name", "Aurora\udc5f"),
    "surrogates the wrong way round": new("name", "\udc5f\ud83d"),
    "a script": new("name", "<script>alert(1)</script>"),
    "an image": new("name", "<img src=x onerror=alert(1)>"),
    "a closing tag": new("name", "Aurora</b>"),
    "an HTML comment": new("name", "<!-- Aurora"),
    "markup in the description": new("description", "<b>Five</b> pairs."),
    "a description of 5 kB": new("description", "x" * 5_000),
    "a null description": new("description", None),
    "right-to-left override": new("name", OVERRIDE),
    "left-to-right override": new("name", "\u202dAurora"),
    "an isolate": new("name", "\u2066Aurora\u2069"),
    "a right-to-left mark": new("name", "Aurora\u200f"),
    "an Arabic letter mark": new("name", "Aurora\u061c"),
    "an override in the description": new("description", OVERRIDE),
    "an override in a label": sizes([size(label=OVERRIDE)], "variants[0].label"),
    "a script as an image": new("image_url", "javascript:alert(1)"),
    "data as an image": new("image_url", "data:text/html,Aurora"),
    "another site's scheme": new("image_url", "//evil.example/a.png"),
    "an image by FTP": new("image_url", "ftp://example.com/a.png"),
    "a space in an image": new("image_url", "https://example.com/a b.png"),
    "a long image": new("image_url", "https://example.com/" + "x" * 500),
    # Amounts
    "no price": invalid("POST", "drops", {"name": "Aurora", "total_stock": 5}, "price"),
    "a null price": new("price", None),
    "a word as a price": new("price", "free"),
    "an empty price": new("price", ""),
    "true as a price": new("price", True),
    "a list as a price": new("price", [1]),
    "an object as a price": new("price", {"amount": 1}),
    "a negative price": new("price", "-0.01"),
    "a negative number as a price": new("price", -1),
    "a comma in a price": new("price", "1,50"),
    "an underscore in a price": new("price", "1_000"),
    "a currency in a price": new("price", "$5"),
    "Arabic digits in a price": new("price", "\u0665"),
    "NaN in a string": new("price", "NaN"),
    "signalling NaN": new("price", "sNaN"),
    "Infinity in a string": new("price", "Infinity"),
    "1e400": invalid(
        "POST", "drops", b'{"name": "Aurora", "price": 1e400, "total_stock": 5}', "price"
    ),
    "1e400 in a string": new("price", "1e400"),
    "10^400 as a price": new("price", 10**400),
    "1,001 digits": new("price", "1" * 1_001),
    "ten whole digits": new("price", "1000000000"),
    "three decimals of a dollar": new("price", "199.001"),
    "four decimals": new("price", "199.0001"),
    "one tenth of a millionth": new("price", 1e-7),
    "half a yen": invalid("POST", "drops", NEW_DROP | {"currency": "JPY", "price": 0.5}, "price"),
    "a hundredth of a yen": invalid(
        "POST", "drops", NEW_DROP | {"currency": "JPY", "price": "199.01"}, "price"
    ),
    "four decimals of a dinar": invalid(
        "POST", "drops", NEW_DROP | {"currency": "KWD", "price": "1.0001"}, "price"
    ),
    "half a yen later": invalid("PATCH", "drops/{yen}", {"price": "0.5"}, "price"),
    "an unknown currency": new("currency", "XYZ"),
    "a currency in lower case": new("currency", "usd"),
    "a short currency": new("currency", "US"),
    "a long currency": new("currency", "USDT"),
    "an empty currency": new("currency", ""),
    "a null currency": new("currency", None),
    "a currency by number": new("currency", 840),
    "a wide currency": new("currency", "\uff35\uff33\uff24"),
    # Stock and limits
    "no stock": invalid("POST", "drops", {"name": "Aurora", "price": 1}, "total_stock"),
    "null stock": new("total_stock", None),
    "negative stock": new("total_stock", -1),
    "fractional stock": new("total_stock", 1.5),
    "a float as stock": new("total_stock", 5.0),
    "stock in a string": new("total_stock", "5"),
    "true as stock": new("total_stock", True),
    "a list as stock": new("total_stock", [5]),
    "stock of 2^31": new("total_stock", 2**31),
    "stock of -2^31": new("total_stock", -(2**31)),
    "stock of 2^32": new("total_stock", 2**32),
    "stock of 2^63": new("total_stock", 2**63),
    "stock of 2^64": new("total_stock", 2**64),
    "stock of 10^400": new("total_stock", 10**400),
    "a limit of none": new("max_per_user", 0),
    "a negative limit": new("max_per_user", -1),
    "a limit of 2^31": new("max_per_user", 2**31),
    "half a limit": new("max_per_user", 0.5),
    "a limit in a string": new("max_per_user", "1"),
    "a cooldown in a string": new("hold_cooldown_seconds", "60"),
    "a negative cooldown": new("hold_cooldown_seconds", -1),
    "a cooldown of a year": new("hold_cooldown_seconds", 365 * 24 * 3600),
    "true as a cooldown": new("hold_cooldown_seconds", True),
    "a cooldown after no hold": new("max_expired_holds", 0),
    "a cooldown after half a hold": new("max_expired_holds", 0.5),
    "a cooldown after 2^31 holds": new("max_expired_holds", 2**31),
    # Sizes
    "null sizes": sizes(None, "variants"),
    "no sizes": sizes([], "variants"),
    "sizes in an object": sizes({"EU 42": 1}, "variants"),
    "sizes in a string": sizes("EU 42", "variants"),
    "a size as a string": sizes(["EU 42"], "variants[0]"),
    "51 sizes": sizes([size(label=str(number)) for number in range(51)], "variants"),
    "a size twice": sizes([size(), size()], "variants"),
    "a size twice but for blanks": sizes([size(), size(label=" EU 42 ")], "variants"),
    "a size without a label": sizes([{"total_stock": 1}], "variants[0].label"),
    "a size without stock": sizes([{"label": "EU 42"}], "variants[0].total_stock"),
    "a size with negative stock": sizes([size(total_stock=-1)], "variants[0].total_stock"),
    "a size with stock of 2^31": sizes([size(total_stock=2**31)], "variants[0].total_stock"),
    "sizes with stock of 2^31 together": sizes(
        [size(total_stock=2**30), size(label="EU 43", total_stock=2**30)], "variants"
    ),
    "a label of 51": sizes([size(label="x" * 51)], "variants[0].label"),
    "a number as a label": sizes([size(label=42)], "variants[0].label"),
    "a size with an unknown field": sizes([size(sold=1)], "variants[0].sold"),
    "a total that is not the sum": invalid(
        "POST", "drops", NEW_DROP | {"variants": [size()]}, "total_stock"
    ),
    # Times and states
    "a naive time": new("starts_at", "2026-11-22T18:00:00"),
    "a date without a time": new("starts_at", "2026-11-22"),
    "an empty time": new("starts_at", ""),
    "a word as a time": new("starts_at", "tomorrow"),
    "a Unix time": new("starts_at", 1795370400),
    "true as a time": new("starts_at", True),
    "a list as a time": new("starts_at", ["2026-11-22T18:00:00Z"]),
    "month 13": new("starts_at", "2026-13-01T00:00:00Z"),
    "30 February": new("starts_at", "2026-02-30T00:00:00Z"),
    "hour 25": new("starts_at", "2026-11-22T25:00:00Z"),
    "a leap second": new("starts_at", "2026-12-31T23:59:60Z"),
    "an offset of 99 hours": new("starts_at", "2026-11-22T18:00:00+99:00"),
    "the last century": new("starts_at", "1999-12-31T23:59:59Z"),
    "the next century": new("ends_at", "2100-01-01T00:00:00Z"),
    "the year 1": new("starts_at", "0001-01-01T00:00:00+14:00"),
    "the year 9999": new("ends_at", "9999-12-31T23:59:59-14:00"),
    "the year 275760": new("ends_at", "+275760-09-13T00:00:00Z"),
    "a NUL in a time": new("starts_at", "2026-11-22T18:00:00Z\x00"),
    "an end before the start": invalid(
        "POST",
        "drops",
        NEW_DROP | {"starts_at": "2026-11-22T18:00:00Z", "ends_at": "2026-11-22T17:59:59Z"},
        "ends_at",
    ),
    "an end at the start": invalid(
        "POST",
        "drops",
        NEW_DROP | {"starts_at": "2026-11-22T18:00:00Z", "ends_at": "2026-11-22T19:00:00+01:00"},
        "ends_at",
    ),
    "scheduled for no time": new("status", "scheduled"),
    "an unknown status": new("status", "open"),
    "a status in capitals": new("status", "LIVE"),
    "an empty status": new("status", ""),
    "a null status": new("status", None),
    "a number as a status": new("status", 1),
    "a list as a status": new("status", ["live"]),
    "a surrogate as a status": new("status", "\ud800"),
    # Fields that nobody knows
    "stock that is decided here": new("available_stock", 5),
    "an id of one's own": new("id", SOMEBODY),
    "a creator of one's own": new("created_by", SOMEBODY),
    "a field in capitals": new("Name", "Aurora"),
    "a field with a blank": new("name ", "Aurora"),
    "a field without a name": new("", "Aurora"),
    "a prototype": new("__proto__", {"is_staff": True}),
    "a surrogate as a field": new("\ud800", 1, "?"),
    "a NUL as a field": new("\x00", 1),
    "a field of 10 kB": new("x" * 10_240, 1),
    "an error's name as a field": invalid("POST", "drops", NEW_DROP | {"non_field_errors": 1}, ""),
    "a field twice, then wrong": invalid(
        "POST", "drops", b'{"name": "Aurora", "name": 5, "price": 1, "total_stock": 5}', "name"
    ),
    # Changes
    "stock by a change": change("total_stock", 50),
    "sizes by a change": change("variants", [size()]),
    "a currency by a change": change("currency", "EUR"),
    "back to a draft": change("status", "draft"),
    "a name taken away": change("name", None),
    "a price taken away": change("price", None),
    "a price below nothing": change("price", "-1"),
    "a naive end": change("ends_at", "2026-11-22T18:00:00"),
    "a negative cooldown by a change": change("hold_cooldown_seconds", -1),
    "a cooldown after no hold by a change": change("max_expired_holds", 0),
    "an override by a change": change("name", OVERRIDE),
    # Claims
    "no units": claim("quantity", 0),
    "minus one unit": claim("quantity", -1),
    "half a unit": claim("quantity", 0.5),
    "one unit as a float": claim("quantity", 1.0),
    "one unit in a string": claim("quantity", "1"),
    "true as a quantity": claim("quantity", True),
    "a null quantity": claim("quantity", None),
    "2^31 units": claim("quantity", 2**31),
    "2^63 units": claim("quantity", 2**63),
    "10^400 units": claim("quantity", 10**400),
    "a list as a quantity": claim("quantity", [1]),
    "a label as a variant": claim("variant", "EU 42"),
    "a null variant": claim("variant", None),
    "an empty variant": claim("variant", ""),
    "a number as a variant": claim("variant", 42),
    "a negative variant": claim("variant", -1),
    "10^400 as a variant": claim("variant", 10**400),
    "true as a variant": claim("variant", True),
    "a list as a variant": claim("variant", [SOMEBODY]),
    "an unknown variant": claim("variant", SOMEBODY),
    "a nil variant": claim("variant", "00000000-0000-0000-0000-000000000000"),
    "a price of one's own": claim("unit_price", "0.01"),
    "another user's claim": claim("user_id", SOMEBODY),
    "a quantity to purchase": invalid("POST", "drops/{held}/purchase", {"quantity": 2}, "quantity"),
    "units twice, then wrong": claim_of(b'{"quantity": 1, "quantity": 0}', "quantity"),
    "1e400 units": claim_of(b'{"quantity": 1e400}', "quantity"),
    "minus zero units": claim_of(b'{"quantity": -0}', "quantity"),
    "an object as a quantity": claim("quantity", {"units": 1}),
    "units in capitals": claim("Quantity", 1),
    "a variant with a NUL": claim("variant", f"{SOMEBODY}\x00"),
    "a surrogate as a variant": claim("variant", "\ud800"),
    "an object as a variant": claim("variant", {"id": SOMEBODY}),
    "a variant of 10 kB": claim("variant", "a" * 10_240),
    "half a claim": malformed(b'{"quantity": 1', *CLAIM),
    "NaN units": malformed(b'{"quantity": NaN}', *CLAIM),
    "a byte order mark before a claim": malformed(b"\xef\xbb\xbf{}", *CLAIM),
    "a claim in UTF-16": malformed('{"quantity": 1}'.encode("utf-16"), *CLAIM),
    "a compressed claim": malformed(gzip.compress(b"{}", mtime=0), *CLAIM, "gzip"),
    "half a purchase": malformed(b"{", "POST", "drops/{held}/purchase"),
    "half a change": malformed(b"{", "PATCH", "drops/{live}"),
    # Identity
    "an empty identity": identity(""),
    "a word as an identity": identity("alice"),
    "a nil identity": identity("00000000-0000-0000-0000-000000000000"),
    "a repeated identity": identity(f"{SOMEBODY}, {SOMEBODY}"),
    "an identity in braces": identity(f"{{{SOMEBODY}}}"),
    "a urn as an identity": identity(f"urn:uuid:{SOMEBODY}"),
    "an identity without hyphens": identity(SOMEBODY.replace("-", "")),
    "an identity with more": identity(f"{SOMEBODY}' OR 1=1 --"),
    "an identity with a NUL": identity(f"{SOMEBODY}\x00"),
    "an identity of 10 kB": identity("a" * 10_240),
    # Idempotency keys
    "an empty key": key(""),
    "a key of 256": key("k" * 256),
    "a key of 10 kB": key("k" * 10_240),
    "a key with a NUL": key("a\x00b"),
    "a key with an accent": key("\u00e9"),
    "a key with a line break": key("a\nb"),
    # Addresses
    "an unknown drop": missing("GET", f"drops/{SOMEBODY}"),
    "an unknown drop to change": missing("PATCH", f"drops/{SOMEBODY}", {"name": "Mine"}),
    "an unknown drop to reserve": missing("POST", f"drops/{SOMEBODY}/reserve"),
    "an unknown drop to purchase": missing("POST", f"drops/{SOMEBODY}/purchase"),
    "an unknown reservation": missing("DELETE", f"reservations/{SOMEBODY}"),
    "an unknown purchase": missing("GET", f"purchases/{SOMEBODY}"),
    "another's reservation": missing("DELETE", "reservations/{theirs}"),
    "a number as an id": missing("GET", "drops/1"),
    "a word as an id": missing("POST", "drops/nothing/reserve"),
    "a nil id": missing("GET", "drops/00000000-0000-0000-0000-000000000000"),
    "an id in braces": missing("GET", "drops/%7B{live}%7D"),
    "a urn as an id": missing("GET", "drops/urn:uuid:{live}"),
    "an id with 300 hyphens": missing("POST", "drops/" + "-" * 300 + "{live}/reserve"),
    "an id with a NUL": missing("GET", "drops/{live}%00"),
    "an id with a quote": missing("GET", "drops/{live}'"),
    "an id that is no UTF-8": missing("POST", "drops/%ff%fe/reserve"),
    "an id of 10 kB": missing("POST", "drops/" + "a" * 10_240 + "/purchase"),
    "a way up": missing("GET", "drops/%2e%2e/%2e%2e/etc/passwd"),
    "two slashes": missing("GET", "drops//"),
    "an address that nobody knows": missing("POST", "drops/{live}/steal"),
    "a line break in an id": missing("POST", "drops/{live}%0a/reserve"),
    "a line break at the end": missing("POST", "drops/{live}/reserve%0a"),
    "a line break after all drops": missing("GET", "drops%0a"),
    "two slashes before an id": missing("GET", "drops//{live}"),
    "two slashes before a claim": missing("POST", "drops/{live}//reserve"),
    "two slashes after a claim": missing("POST", "drops/{live}/reserve//"),
    "two slashes before it all": missing("GET", "/drops"),
    "an id encoded twice": missing("GET", "drops/%257B{live}%257D"),
    "an id with a parameter": missing("GET", "drops/{live};version=1"),
    "an id with an ending": missing("GET", "drops/{live}.json"),
    "an id after a blank": missing("POST", "drops/%20{live}/purchase"),
    "a claim in capitals": missing("POST", "drops/{live}/RESERVE"),
    "a NUL as a reservation": missing("DELETE", "reservations/%00"),
    "a purchase that is no UTF-8": missing("GET", "purchases/%ff"),
    "an unknown drop's events": missing("GET", f"drops/{SOMEBODY}/events"),
    "a word as a drop with events": missing("GET", "drops/nothing/events"),
    # Methods
    "PUT a drop": wrong_method("PUT", "drops/{live}"),
    "DELETE a drop": wrong_method("DELETE", "drops/{live}"),
    "POST to a drop": wrong_method("POST", "drops/{live}"),
    "DELETE all drops": wrong_method("DELETE", "drops"),
    "GET a claim": wrong_method("GET", "drops/{live}/reserve"),
    "PUT a claim": wrong_method("PUT", "drops/{live}/reserve"),
    "DELETE a purchase": wrong_method("DELETE", "drops/{held}/purchase"),
    "POST a reservation": wrong_method("POST", "reservations"),
    "PATCH a reservation": wrong_method("PATCH", "reservations/{hold}"),
    "POST a purchase": wrong_method("POST", "purchases"),
    "POST oneself": wrong_method("POST", "me"),
    "GET an expiry": wrong_method("GET", "internal/expire-now"),
    "TRACE": wrong_method("TRACE", "drops"),
    "an unknown method": wrong_method("STEAL", "drops/{live}"),
    "CONNECT": wrong_method("CONNECT", "drops"),
    "PATCH all drops": wrong_method("PATCH", "drops"),
    "POST an event": wrong_method("POST", "drops/{live}/events"),
    "GET a ticket": wrong_method("GET", "ws-ticket"),
    "POST a document": wrong_method("POST", "asyncapi.json"),
    "DELETE a document": wrong_method("DELETE", "asyncapi"),
    "a method in a header": Bad(
        *("POST", "me", 405, "method_not_allowed"),
        headers={"HTTP_X_HTTP_METHOD_OVERRIDE": "GET"},
    ),
    # Content types, and what is asked for
    "plain text": wrong_type("text/plain"),
    "a form": wrong_type("application/x-www-form-urlencoded", b"name=Aurora"),
    "a multipart form": wrong_type("multipart/form-data; boundary=x", b"--x--"),
    "a multipart form without a boundary": wrong_type("multipart/form-data"),
    "XML": wrong_type("application/xml", b"<drop/>"),
    "a JSON patch": wrong_type("application/json-patch+json"),
    "no content type": wrong_type(""),
    "garbage as a content type": wrong_type(";;;=\x00"),
    "a content type of 10 kB": wrong_type("x" * 10_240),
    "a claim in plain text": wrong_type("text/plain", b"{}", *CLAIM),
    "a claim in a form": wrong_type("application/x-www-form-urlencoded", b"quantity=1", *CLAIM),
    "a purchase in XML": wrong_type("application/xml", b"<a/>", "POST", "drops/{held}/purchase"),
    "a change as a merge patch": wrong_type(
        "application/merge-patch+json", b'{"name": "Ember"}', "PATCH", "drops/{live}"
    ),
    "a stream of all drops": accept("text/event-stream"),
    "an answer in HTML": accept("text/html"),
    "an answer in XML": accept("application/xml;q=0.9, text/xml"),
    "an answer in garbage": accept(";;;,=/=,\x00"),
    "an answer in 10 kB": accept("a/b," * 2_560),
    # Queries
    "no limit": query("drops?limit=", "limit"),
    "a limit of 0": query("drops?limit=0", "limit"),
    "a limit of -1": query("drops?limit=-1", "limit"),
    "a limit of 101": query("drops?limit=101", "limit"),
    "a limit of 10^400": query("drops?limit=1" + "0" * 400, "limit"),
    "a limit of 5,000 digits": query("drops?limit=1" + "0" * 5_000, "limit"),
    "a limit of 1.5": query("reservations?limit=1.5", "limit"),
    "a limit in Arabic digits": query("drops?limit=%D9%A5", "limit"),
    "a limit in wide digits": query("drops?limit=%EF%BC%95", "limit"),
    "a limit with an underscore": query("drops?limit=1_0", "limit"),
    "a limit with a plus": query("drops?limit=%2B5", "limit"),
    "a limit with a blank": query("drops?limit=%205", "limit"),
    "a limit of 5.0": query("drops?limit=5.0", "limit"),
    "an offset in Arabic digits": query("drops?offset=%D9%A5", "offset"),
    "a limit of NaN": query("purchases?limit=NaN", "limit"),
    "a limit with a NUL": query("drops?limit=1%00", "limit"),
    "an offset of -1": query("drops?offset=-1", "offset"),
    "an offset of 2^63": query("drops?offset=9223372036854775808", "offset"),
    "a status nobody has": query("drops?status=open", "status"),
    "an empty status to list": query("drops?status=", "status"),
    "a status with a NUL": query("drops?status=live%00", "status"),
    "a status that is no UTF-8": query("drops?status=%ed%a0%80", "status"),
    "a status twice, then wrong": query("drops?status=live&status=open", "status"),
    "a reservation's status in lower case": query("reservations?status=active", "status"),
    "a purchase's offset of -1": query("purchases?offset=-1", "offset"),
    "a NUL as a drop to list": query("reservations?drop=%00", "drop"),
    "events after -1": query("drops/{live}/events?after=-1", "after"),
    "events after nothing": query("drops/{live}/events?after=", "after"),
    "events after a word": query("drops/{live}/events?after=x", "after"),
    "events after 2^63": query("drops/{live}/events?after=9223372036854775808", "after"),
    "no events": query("drops/{live}/events?limit=0", "limit"),
    "1,001 events": query("drops/{live}/events?limit=1001", "limit"),
    "a format that there is not": missing("GET", "drops?format=xml"),
    "a word as a drop to list": query("reservations?drop=aurora", "drop"),
    "an empty drop to list": query("reservations?drop=", "drop"),
}


@pytest.fixture
def world(db):
    """Return the rows that the requests name, by the name they use."""
    user = UserFactory()
    hold = ReservationFactory(user=user)
    return {
        "user": user.pk,
        "live": DropFactory(created_by=user, max_per_user=None).pk,
        "yen": DropFactory(created_by=user, currency="JPY", price="25000").pk,
        "held": hold.drop.pk,
        "hold": hold.pk,
        "theirs": ReservationFactory().pk,
    }


@pytest.fixture
def send(client_of, world):
    """Return a function that sends a request as the user of ``world``."""
    client = client_of()
    # The handler's answer is the subject, not the exception that it hides.
    client.raise_request_exception = False

    def call(bad):
        path = bad.path
        for name, pk in world.items():
            path = path.replace(f"{{{name}}}", str(pk))
        headers = {"HTTP_X_USER_ID": str(world["user"])} | bad.headers
        return client.generic(
            bad.method, f"/api/{path}", bad.raw, content_type=bad.content_type, **headers
        )

    return call


def everything():
    """Return a digest of the rows of each table."""
    with connection.cursor() as cursor:
        tables = connection.introspection.table_names(cursor)
        cursor.execute(
            " UNION ALL ".join(
                f"SELECT '{table}', count(*), md5(string_agg(t::text, ',' ORDER BY t::text))"
                f" FROM {table} t"
                for table in tables
            )
        )
        # In no order of their own: PostgreSQL may read the tables side by side.
        return sorted(cursor.fetchall())


def test_there_are_enough_bad_requests():
    assert len(BAD) >= 200


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_refused_and_stores_nothing(send, bad):
    before = everything()

    response = send(bad)

    assert (response.status_code, response["Content-Type"]) == (
        bad.status,
        "application/problem+json",
    ), response.content[:300]
    # Stricter than the json module: it takes no lone surrogates.
    document = orjson.loads(response.content)
    assert (document["status"], document["code"]) == (bad.status, bad.code)
    assert "Traceback" not in response.text
    if bad.wrong is not None:
        assert {error["field"] for error in document["errors"]} == {bad.wrong}
    assert everything() == before


@pytest.mark.parametrize("field", ["name", "price", "status", "starts_at", "total_stock"])
def test_nesting_is_refused_at_every_depth(send, field):
    """Also where the parser still manages and what comes after it would not."""
    before = everything()

    for depth in (1, 10, 100, *range(300, 1000, 20), 2000):
        nested = f"{'[' * depth}{']' * depth}"
        body = f'{{"name": "Aurora", "price": 1, "total_stock": 5, "{field}": {nested}}}'
        response = send(Bad("POST", "drops", 400, "", body.encode()))
        assert response.status_code == 400, depth
        assert response.json()["code"] in {"malformed_body", "validation_error"}

    assert everything() == before


@pytest.mark.parametrize(
    "charset", ["utf-8", "UTF8", "utf-16", "latin-1", "zlib", "bz2", "rot13", "hex", "nonsense"]
)
def test_json_is_utf8_whatever_the_charset_says(send, charset):
    good = Bad(
        *("POST", "drops", 201, ""),
        (json.dumps(NEW_DROP | {"name": "Auróra"}, ensure_ascii=False)).encode(),
        content_type=f"application/json; charset={charset}",
    )

    response = send(good)

    assert (response.status_code, response.json()["name"]) == (201, "Auróra")


@pytest.mark.parametrize(
    "name",
    [
        "حذاء الفجر",
        "נעלי שחר",
        "オーロラ",
        "Aurora 👟🏽 👩‍👩‍👧",
        'Zoë\'s "Ember" & Co. — 5 < 6 > 4',
        "می‌خواهم",
        "x" * 200,
    ],
)
def test_people_write_names_as_they_do(send, name):
    response = send(Bad("POST", "drops", 201, "", NEW_DROP | {"name": name}))

    assert (response.status_code, response.json()["name"]) == (201, name)
    assert Drop.objects.get(pk=response.json()["id"]).name == name


@pytest.mark.parametrize("page", ["/admin/", "/admin/login/", "/", "/api/me"])
@pytest.mark.parametrize(
    "cookie",
    [
        'sessionid="aaaaaaaa\\000"; csrftoken="\\000"; messages="\\000"',
        "sessionid=aaaaaaaa\x00",
        "sessionid=" + "\xff" * 32,
        "sessionid=" + "a" * 5_000,
        "=;=;;",
    ],
)
def test_a_cookie_may_hold_anything(db, client, page, cookie):
    answer = client.get(page, headers={"Cookie": cookie})

    assert answer.status_code == {"/admin/": 302, "/api/me": 401}.get(page, 200)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"quantity": 1}'])
@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8"])
def test_a_claim_may_leave_its_body_out(send, body, content_type):
    claim = Bad("POST", "drops/{live}/reserve", 201, "", body, content_type=content_type)

    assert send(claim).status_code == 201
