"""The search for secrets finds what is there, in every form, and nothing else."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from urllib.parse import quote

import pytest
from forge_search import Found, Search

SECRET = "Zk3-first_part_0'\"$\\`{}%#@:/&= é€ßlast_part-9_x7Qw"
OTHER = "quite-another-secret-of-some-length"

FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "json": lambda secret: json.dumps({"key": secret}).encode(),
    "url": lambda secret: quote(secret, safe="").encode(),
    "hex": lambda secret: secret.encode().hex().encode(),
    "HEX": lambda secret: secret.encode().hex().upper().encode(),
    "base64": lambda secret: base64.b64encode(secret.encode()),
    "base64, moved by one": lambda secret: base64.b64encode(b"x" + secret.encode() + b"y"),
    "base64, moved by two": lambda secret: base64.urlsafe_b64encode(b"xx" + secret.encode()),
    "beginning": lambda secret: secret[:20].encode(),
    "end": lambda secret: secret[-20:].encode(),
    "after zeros": lambda secret: b"\0" * (1 << 21) + secret.encode() + b"\0" * 5,
}


def archive(**members: bytes) -> io.BytesIO:
    """A tar archive; two underscores in a name are a dot."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"var/{name.replace('__', '.')}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("form", FORMS)
def test_found_in_every_form(form: str) -> None:
    """In the midst of other things; the secret that is not there is not found."""
    content = b"before \xff\n" + FORMS[form](SECRET) + b"\nafter"
    found = Search({"mine": SECRET, "other": OTHER}).text(content, "here")
    assert {(each.place, each.secret) for each in found} == {("here", "mine")}


@pytest.mark.parametrize(
    "secret", ['with spaces and "quotes", é€ß at the end é€ß\\é', "first line\nsecond\r\nthird line"]
)
def test_awkward_at_its_ends(secret: str) -> None:
    """What an encoding changes is found in that encoding."""
    search = Search({"mine": secret})
    for form in ("json", "url", "hex", "base64"):
        assert {each.secret for each in search.text(FORMS[form](secret), "here")} == {"mine"}, form
    assert search.text(json.dumps(secret, ensure_ascii=False), "here")


def test_a_chance_likeness_is_not_found() -> None:
    """All but a character of either end."""
    assert Search({"mine": SECRET}).text(SECRET[1:15] + " " + SECRET[-15:-1], "here") == set()


def test_places_in_an_archive() -> None:
    """The member that holds it, by content or by name; a compressed log is looked into."""
    inside = archive(
        clean=b"nothing" * 1000,
        log=b"x" * 100_000 + SECRET.encode(),
        rotated__gz=gzip.compress(OTHER.encode() * 2),
        last=b"",
        **{OTHER: b""},
    )
    assert Search({"mine": SECRET, "other": OTHER}).archive(inside) == {
        Found("var/log", "mine", "plain"),
        Found("var/rotated.gz", "other", "plain"),
        Found(f"var/{OTHER}", "other", "plain"),
    }


def test_short_secrets_are_refused() -> None:
    """A search that may find by chance proves nothing."""
    with pytest.raises(ValueError, match=r"found shorter: mine$"):
        Search({"mine": "too short", "other": OTHER})
