"""What is taken out of a support bundle: known values in every form, what has the shape of a secret, and no more."""

import base64
import html
import json
import time
from urllib.parse import quote, quote_plus

import pytest
from conftest import HARD_VALUES
from forgectl.scrub import Scrubber, forms

# Put together here, so that no file of the repository holds anything of the shape of a secret.
LONG = "4kZq9" * 9 + "+/=&?ü"
TOKEN = "hvs." + "Ab1" * 24
OLD_TOKEN = "s." + "Ab1" * 8
DATABASE = "postgresql://shop:" + "hunter2hunter2" + "@db.example.com/shop"
PEM = "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIabc\n+/xyz\n-----END RSA PRIVATE " + "KEY-----"
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9" + "." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0" + "." + "dozjgNryP4J3jVmNHl0w5N"


@pytest.mark.parametrize("value", [LONG, "päss wörd%20'\"\\$", *HARD_VALUES.values()])
def test_known_value_in_every_form(value: str) -> None:
    scrub = Scrubber({value: "KEY of inbox"})
    written = {
        "plain": value,
        "URL": quote(value, safe=""),
        "path": quote(value),
        "form": quote_plus(value),
        "lower": quote(value, safe="").lower() if value.islower() else quote(value, safe=""),
        "JSON": json.dumps({"a": value}),
        "JSON, as it is": json.dumps({"a": value}, ensure_ascii=False),
        "Python": repr(value),
        "HTML": html.escape(value),
        "base64": base64.b64encode(value.encode()).decode(),
        "URL's base64": base64.urlsafe_b64encode(value.encode()).decode(),
        "hexadecimal": value.encode().hex(),
    }
    for how, text in written.items():
        found = scrub(f"before {text} after")
        assert found.startswith("before "), how
        assert found.endswith(" after"), how
        assert scrub.leak(found) == "", how
        # The middle of it, wherever a form begins and ends.
        assert quote(value)[10:20] not in found or len(value) < 20, how
    assert scrub.counts["KEY of inbox"] >= len(written)


def test_lines_of_a_value_that_a_journal_takes_apart() -> None:
    scrub = Scrubber({PEM: "KEY"})
    found = scrub("a MIIabc\nb +/xyz\nc MIIabcMIIabc")
    # Short ones are parts of words, so these go by the shape of the whole alone.
    assert "MIIabc" in found
    long = PEM.replace("MIIabc", "MIIabcdefgh")
    assert "MIIabcdefgh" not in Scrubber({long: "KEY"})("one MIIabcdefgh two")


def test_half_of_a_long_value() -> None:
    """Where a log line was cut."""
    scrub = Scrubber({LONG: "KEY"})
    for text in (f"a {LONG[:30]} ... b", f"a ... {LONG[-30:]} b", f"a {LONG[:-1]} b"):
        found = scrub(text)
        assert LONG[:23] not in found
        assert LONG[-23:] not in found
        assert (found.startswith("a "), found.endswith(" b")) == (True, True)


def test_short_values_go_as_words_alone() -> None:
    scrub = Scrubber({"bob1": "USER", "abc": "TINY", "": "EMPTY"})
    assert scrub("bob1 bob12 xbob1 /bob1/ abc") == "<scrubbed: USER> bob12 xbob1 /<scrubbed: USER>/ abc"
    assert (scrub.too_short, scrub.leak("bob12"), scrub.leak("a bob1")) == (["TINY"], "", "USER")


def test_what_is_public_stays() -> None:
    scrub = Scrubber({"inbox": "USER", "true": "FLAG", "signing_key_": "KEY"}, ["inbox", "signing_key"])
    text = '{"inbox": true}\nFORGE_SIGNING_KEY = "signing_key"'
    assert scrub(text) == text


def test_one_value_inside_another() -> None:
    scrub = Scrubber({"abcdefgh": "SHORT", "abcdefghijkl": "LONG"})
    assert scrub("abcdefghijkl abcdefgh") == "<scrubbed: LONG> <scrubbed: SHORT>"


def test_secret_parts_of_a_url() -> None:
    """The path of a hook, the password of a database."""
    hook = "https://hooks.example.com/services/T0123456/B7654321/Xy1Xy2Xy3Xy4Xy5Xy6Xy7"
    scrub = Scrubber({hook: "webhook_url", DATABASE: "URL"})
    found = scrub("POST /services/T0123456/B7654321/Xy1Xy2Xy3Xy4Xy5Xy6Xy7 and Xy1Xy2Xy3Xy4Xy5Xy6Xy7; hunter2hunter2")
    assert "Xy1" not in found
    assert "T0123456" not in found
    assert "hunter2" not in found
    assert scrub("to shop at db.example.com") == "to shop at db.example.com"


@pytest.mark.parametrize(
    ("text", "gone", "stays"),
    [
        (f"token is {TOKEN} here", TOKEN, "token is"),
        (f"VAULT {OLD_TOKEN}, x", OLD_TOKEN, ", x"),
        (f"a\n{PEM}\nb", "MIIabc", "\nb"),
        ("a " + PEM.replace("\n", "\\n") + " b", "MIIabc", " b"),
        (DATABASE, "hunter2", "@db.example.com/shop"),
        (f"cookie is {JWT}", JWT, ""),
        ('"Authorization": "Bearer abcdef0123456789"', "abcdef0123456789", "Authorization"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz", "Authorization"),
        ("cookie: session=abc; other=def", "other=def", "cookie"),
        ("X-Api-Key: 0a1b2c", "0a1b2c", "X-Api-Key"),
        ('"GET /v1/events?token=abc123&page=2 HTTP/1.1"', "abc123", "&page=2 HTTP/1.1"),
        ('"uri": "/x?page=2&access_token=abc123"', "abc123", "page=2"),
        ("next=%3Ftoken%3Dabc123%26page%3D2", "abc123", "page%3D2"),
        ("FORGE_DATABASE_PASSWORD=hunter2 x", "hunter2", " x"),
        ('{"password": "hunter2", "user": "bob"}', "hunter2", '"user": "bob"'),  # pragma: allowlist secret
        ('{\\"api_key\\": \\"hunter2\\", \\"a\\": 1}', "hunter2", '\\"a\\": 1'),
        ("secret_id: 6f0f9d2e-9a0b-4a40-8d9c-0f2a7c3f1c11", "6f0f9d2e", "secret_id"),
        ("export STRIPE_KEY=sk_live_1234", "sk_live_1234", "STRIPE_KEY"),
        ("curl https://hooks.slack.com/" + "services/T0/B0/Xyz", "T0/B0/Xyz", "hooks.slack.com"),
        ("AKIA" + "ABCDEFGHIJKLMNOP", "ABCDEFGHIJKLMNOP", ""),
    ],
)
def test_shapes(text: str, gone: str, stays: str) -> None:
    """What nobody here knows, as it looks."""
    found = Scrubber({})(text)
    assert gone not in found
    assert stays in found
    assert "<scrubbed: " in found


@pytest.mark.parametrize(
    "text",
    [
        "ALERT inbox: Vault rejected this host's role id or secret id: renew it",
        'password_key = "database_password"\ntoken_ttl = 1200\nLoadCredentialEncrypted=forge.inbox:/etc/credstore',
        '{"secrets": {"app": true}, "lock": null, "keys": 5}',
        "proxy_pass http://unix:/run/inbox/live.sock",
        "https://inbox.example.com:443/v1/events?page=2",
        "password authentication failed for user inbox_app",
        "2026-11-22T12:00:00.123456+00:00 nginx[5]: x",
        "",
    ],
)
def test_what_helps_stays(text: str) -> None:
    scrub = Scrubber({})
    assert scrub(text) == text
    assert not scrub.counts


def test_scrubbed_once_stays_as_it_is() -> None:
    scrub = Scrubber({LONG: "FORGE_SIGNING_KEY of inbox"})
    once = scrub(f"password={LONG}\nAuthorization: Bearer {LONG}\n/x?token={LONG}\n{PEM}")
    assert scrub(once) == once


@pytest.mark.parametrize("piece", ["a", "a-", "-", "password", "http://", "x=", "?token", "eyJ", "-----BEGIN "])
def test_no_text_takes_for_ever(piece: str) -> None:
    """Whoever can write to a log does not choose how long this takes."""
    text = piece * (200_000 // len(piece))
    began = time.monotonic()
    Scrubber({LONG: "KEY"})(text)
    assert time.monotonic() - began < 20


def test_forms_are_no_fragments() -> None:
    assert all(len(form) >= 8 for form in forms("abcdefgh"))


@pytest.mark.parametrize(
    "text",
    [
        '{"db_password": "correct horse, battery", "name": "inbox"}',  # pragma: allowlist secret
        "password='correct; horse & battery' name=inbox",  # pragma: allowlist secret
        'SECRET_KEY: "correct-horse-battery" name: inbox',  # pragma: allowlist secret
        '{"secretKey":"correct-horse-battery","name":"inbox"}',  # pragma: allowlist secret
        "session_secret_key=correct-horse-battery name=inbox",  # pragma: allowlist secret
    ],
)
def test_a_value_goes_to_its_end(text: str) -> None:
    """What comes after a blank in quotes is of the secret as well."""
    found = Scrubber({})(text)
    assert not any(word in found for word in ("correct", "horse", "battery"))
    assert "inbox" in found


def test_marks_stay_whole() -> None:
    """A short secret may be a word of a mark, or of the name of another that stands in one."""
    values = {"scrubbed": "A", "path": "B", "part": "C", "header": "D", LONG: "the path of inbox"}
    scrub = Scrubber(values)
    found = scrub(f"{LONG} x {LONG[:30]} path\nX-Api-Key: 0a1b2c\nvalue scrubbed")
    assert found == (
        "<scrubbed: the path of inbox> x <scrubbed: part of the path of inbox> <scrubbed: B>\n"
        "X-Api-Key: <scrubbed: header>\nvalue <scrubbed: A>"
    )
    assert scrub(found) == found
    assert scrub.leak(found) == ""
    assert scrub.leak(f"{found} path") == "B"


def test_what_only_looks_like_a_mark_hides_nothing() -> None:
    """Whoever writes to a log may write one; and the character that stands for one while it is scrubbed."""
    scrub = Scrubber({"hunter2hunter2": "KEY", "se\U000f0000cret-value": "ODD"})
    assert "hunter2" not in scrub("<scrubbed: hunter2hunter2> <scrubbed: KEY hunter2hunter2>")
    assert scrub("a \U000f0000 b") == "a \ufffd b"
    assert "cret-value" not in scrub("a se\U000f0000cret-value b")


def test_what_is_left_beside_a_mark_goes() -> None:
    """A known value may be a part of another that has the shape of one."""
    scrub = Scrubber({"knownknown": "KEY"})
    assert "MIIabc" not in scrub(PEM.replace("+/xyz", "knownknown"))
    assert "rest" not in scrub("/x?token=knownknown-rest")
    assert "rest" not in scrub('"password": "knownknown rest"')  # pragma: allowlist secret
