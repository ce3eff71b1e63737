"""What Nginx shall do for an app beyond passing requests on: limits, headers, paths of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.parsing.convert_bool import boolean

from .problems import Problem

# Least and most; Nginx counts connections in 16 bits.
_LIMITS: dict[str, tuple[int, int]] = {
    "requests_per_second": (1, 100_000),
    "burst": (0, 1_000_000),
    "concurrent_requests": (1, 65_535),
    "streams": (1, 65_535),
}
_LARGEST_BODY_KIB = 1024 * 1024
# What needs no escape in a URL, and means nothing to Nginx; no segment begins with a dot.
_SEGMENTS = r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+"
_PATH = re.compile(rf"{_SEGMENTS}/?")
_PREFIX = re.compile(rf"{_SEGMENTS}/")
_FOLDER = re.compile(_SEGMENTS)
# A quote's escape is the template's; a `$` would be a variable of Nginx's.
_HEADER = re.compile(r"[ !\"#%-~]*")

# The oldest release of a distribution whose Nginx speaks HTTP/3 (1.25).
_HTTP3 = {"Debian": 13}


def entry_problems(entry: Mapping[str, Any], where: str) -> list[Problem]:
    """Return what is wrong with the options of an entry that are about Nginx alone."""
    return [
        *_limit_problems(entry.get("client_limits"), f"{where}.client_limits"),
        *_body_problems(entry.get("body_limits"), f"{where}.body_limits"),
        *_policy_problems(entry.get("content_security_policy"), f"{where}.content_security_policy"),
        *_static_problems(entry.get("static"), f"{where}.static"),
        *_claim_problems(entry, where),
    ]


def _limit_problems(limits: Any, where: str) -> Iterator[Problem]:
    for option, (least, most) in _LIMITS.items():
        number = limits.get(option) if isinstance(limits, Mapping) else None
        if isinstance(number, int) and not least <= number <= most:
            yield Problem(f"{where}.{option}", f"a number from {least} to {most}", str(number), f"correct {option}")


def _body_problems(limits: Any, where: str) -> Iterator[Problem]:
    for path, kib in limits.items() if isinstance(limits, Mapping) else ():
        if not _PATH.fullmatch(str(path)):
            yield Problem(
                f"{where}.{path}",
                "a path such as /v1/uploads, of letters, digits and . _ ~ -",
                str(path),
                "correct it; the limit of all other paths is max_body_kib",
            )
        if not isinstance(kib, int) or isinstance(kib, bool) or not 1 <= kib <= _LARGEST_BODY_KIB:
            expected = f"a number of KiB from 1 to {_LARGEST_BODY_KIB}"
            yield Problem(f"{where}.{path}", expected, str(kib), "write the largest body in KiB")


def _policy_problems(policy: Any, where: str) -> Iterator[Problem]:
    if isinstance(policy, str) and not _HEADER.fullmatch(policy):
        yield Problem(
            where,
            "one line of printable ASCII without $",
            "another character",
            "write the policy as the header shall have it",
        )


def _static_problems(static: Any, where: str) -> Iterator[Problem]:
    for path, folder in static.items() if isinstance(static, Mapping) else ():
        if not _PREFIX.fullmatch(str(path)):
            yield Problem(
                f"{where}.{path}",
                "a path prefix that begins and ends with /, such as /assets/",
                str(path),
                "correct it; / itself is the app's",
            )
        if not isinstance(folder, str) or not _FOLDER.fullmatch(f"/{folder}"):
            yield Problem(
                f"{where}.{path}",
                "a folder inside the source, such as dist/assets, no part of it hidden",
                str(folder),
                "name the folder that holds nothing but what everybody may have",
            )


def _claim_problems(entry: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield the paths that two options claim: Nginx takes each location once."""
    metrics = entry.get("metrics_path")
    owners = {str(metrics).rstrip("/"): "metrics_path"} if metrics else {}
    for option in ("body_limits", "static"):
        paths = entry.get(option)
        for path in paths if isinstance(paths, Mapping) else ():
            bare = str(path).rstrip("/")
            if bare in owners:
                yield Problem(
                    f"{where}.{option}.{path}",
                    "a path that nothing else claims",
                    f"{bare}, which {owners[bare]} has already",
                    "remove one of them",
                )
            owners[bare] = option


def source_problems(entry: Mapping[str, Any], source: Path, where: str) -> list[Problem]:
    """Return the static folders of an entry that are not in its source, or hold its code."""
    problems = []
    static = entry.get("static")
    for path, folder in static.items() if isinstance(static, Mapping) else ():
        here, inside = f"{where}.static.{path}", source / str(folder)
        if not isinstance(folder, str) or not _FOLDER.fullmatch(f"/{folder}"):
            continue  # Reported with the entry.
        if not inside.is_dir() or not inside.resolve().is_relative_to(source.resolve()):
            problems.append(
                Problem(here, f"a folder in {source}", f"{folder}, which is none", "build it first, or correct it")
            )
        elif code := next(inside.rglob("*.py"), None):
            problems.append(
                Problem(
                    here,
                    "a folder that holds nothing but what everybody may have",
                    f"{code.relative_to(source)}, which is code",
                    "move the files for clients to a folder of their own",
                )
            )
    return problems


def http3_problems(wanted: Any, distribution: str, version: str) -> list[Problem]:
    """Return why the host's Nginx can't speak HTTP/3, if it shall."""
    major = version.partition(".")[0]
    there = major.isdigit() and int(major) >= _HTTP3.get(distribution, 10**6)
    # A value that is no boolean has been reported with its role variable.
    if there or not boolean(wanted, strict=False):
        return []
    return [
        Problem(
            "nginx_http3",
            "false, or a distribution whose Nginx speaks HTTP/3: Debian 13",
            f"true on {distribution} {version}",
            "remove it for this host; HTTP/2 is there in any case",
        )
    ]
