"""What an inventory may ask of Nginx for an app."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forge import edge
from forge.problems import Problem

POLICY = "default-src 'none'; frame-ancestors 'none'"
SOUND: dict[str, Any] = {
    "client_limits": {"requests_per_second": 1, "burst": 0, "concurrent_requests": 65_535, "streams": 1},
    "body_limits": {"/v1/uploads": 20_480, "/v1/small/": 1},
    "content_security_policy": POLICY,
    "static": {"/assets/": "dist/assets"},
    "metrics_path": "/metrics",
}


def problems(**changes: Any) -> list[Problem]:
    """Examine an entry with changes."""
    return edge.entry_problems(SOUND | changes, "apps.shop")


def test_sound_options_pass() -> None:
    """All of them, an empty policy, and options that were never set."""
    assert problems() == []
    assert problems(content_security_policy="") == []
    assert edge.entry_problems({}, "apps.shop") == []


@pytest.mark.parametrize(
    ("changes", "where", "expected"),
    [
        ({"client_limits": {"streams": 0}}, "client_limits.streams", "a number from 1 to 65535"),
        ({"client_limits": {"burst": -1}}, "client_limits.burst", "a number from 0 to"),
        ({"body_limits": {"uploads": 5}}, "body_limits.uploads", "a path such as /v1/uploads"),
        ({"body_limits": {"/": 5}}, "body_limits./", "a path such as /v1/uploads"),
        ({"body_limits": {"/a b": 5}}, "body_limits./a b", "a path such as"),
        ({"body_limits": {"/a{": 5}}, "body_limits./a{", "a path such as"),
        ({"body_limits": {"/a": 0}}, "body_limits./a", "a number of KiB"),
        ({"body_limits": {"/a": "5m"}}, "body_limits./a", "a number of KiB"),
        ({"body_limits": {"/a": 5, "/a/": 6}}, "body_limits./a/", "a path that nothing else claims"),
        ({"body_limits": {"/metrics": 5}}, "body_limits./metrics", "a path that nothing else claims"),
        ({"body_limits": {"/assets": 5}}, "static./assets/", "a path that nothing else claims"),
        ({"content_security_policy": "x\r\nSet-Cookie: a=b"}, "content_security_policy", "one line of printable"),
        ({"content_security_policy": "x $request_id"}, "content_security_policy", "one line of printable"),
        ({"static": {"/": "dist"}}, "static./", "a path prefix that begins and ends with /"),
        ({"static": {"/assets": "dist"}}, "static./assets", "a path prefix that begins and ends with /"),
        ({"static": {"/a/": "../dist"}}, "static./a/", "a folder inside the source"),
        ({"static": {"/a/": "/etc"}}, "static./a/", "a folder inside the source"),
        ({"static": {"/a/": "dist/.git"}}, "static./a/", "a folder inside the source"),
        ({"static": {"/a/": "."}}, "static./a/", "a folder inside the source"),
        ({"static": {"/a/": "a/../.."}}, "static./a/", "a folder inside the source"),
        ({"static": {"/a/": ["dist"]}}, "static./a/", "a folder inside the source"),
    ],
)
def test_unsound_options_are_refused(changes: dict[str, Any], where: str, expected: str) -> None:
    """One problem each, which names its place."""
    (found,) = problems(**changes)
    assert found.where == f"apps.shop.{where}"
    assert found.expected.startswith(expected)


def test_static_folder_holds_no_code(tmp_path: Path) -> None:
    """Nor may it be missing, or lead out of the source."""
    source = tmp_path / "shop"
    (source / "dist/deep").mkdir(parents=True)
    (source / "dist/deep/app.1a.js").write_text("x")
    (source / "out").symlink_to(tmp_path)
    (source / "src").mkdir()
    (source / "src/main.py").write_text("x")

    def of(folder: str) -> list[str]:
        return [problem.found for problem in edge.source_problems({"static": {"/a/": folder}}, source, "apps.shop")]

    assert of("dist") == of("dist/deep") == []
    assert of("src") == ["src/main.py, which is code"]
    assert of("none") == ["none, which is none"]
    assert of("out") == ["out, which is none"]


@pytest.mark.parametrize(
    ("wanted", "distribution", "version", "refused"),
    [
        (True, "Debian", "13", False),
        (True, "Debian", "12", True),
        (True, "Ubuntu", "24.04", True),
        ("true", "Debian", "12", True),
        (True, "Debian", "", True),
        (False, "Debian", "12", False),
        (None, "Debian", "12", False),
        ("perhaps", "Debian", "12", False),
    ],
)
def test_http3_needs_an_nginx_that_has_it(wanted: object, distribution: str, version: str, refused: bool) -> None:
    """Debian 13 does."""
    found = edge.http3_problems(wanted, distribution, version)
    assert [problem.where for problem in found] == ["nginx_http3"] * refused
