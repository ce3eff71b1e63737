"""What the chosen source of certificates asks of the inventory, and of the files that it names."""

from __future__ import annotations

import importlib.util
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from .problems import Problem
from .specs import Options
from .values import kind, nearest

ACME, FILES = "acme", "files"
# Let's Encrypt's limit; nobody is known to allow more.
MOST_NAMES = 100
_RANGES = {"nginx_certificate_check_hours": (1, 24), "nginx_certificate_alert_days": (1, 365)}

Read = Callable[[Path], bytes]
"""Reads a file of the control machine, decrypted where it is encrypted with ansible-vault."""


def problems(
    options: Options,
    raw: Mapping[str, Any],
    values: Mapping[str, Any],
    entries: Mapping[str, Mapping[str, Any]],
    roles: Path,
    read: Read,
) -> list[Problem]:
    """Return what is wrong with the variables of certificates, and with those that were brought along.

    `options` are those of the role `nginx`, `raw` the variables as they stand in the inventory, `values` those of them
    that could be templated, `entries` the apps. What has no valid type is left alone: it was reported with its type.
    """
    found = [
        Problem(name, f"a number from {least} to {most}", str(values[name]), "correct it")
        for name, (least, most) in _RANGES.items()
        if isinstance(values.get(name), int) and not least <= values[name] <= most
    ]
    source = values.get("nginx_tls_source") or options.get("nginx_tls_source", {}).get("default")
    if source == ACME:
        found += _acme(options, values, entries, read)
    elif source == FILES:
        # Where it can be filled in only later, nothing can be said of it.
        pairs = values.get("nginx_tls_certificates", None if "nginx_tls_certificates" in raw else {})
        if isinstance(pairs, Mapping):
            found += _files(pairs, entries, roles, read)
    return found


def _acme(
    options: Options, values: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], read: Read
) -> Iterator[Problem]:
    def value(name: str) -> str:
        return str(values.get(name, options.get(name, {}).get("default", "")))

    directory, email, ca_file = (value(f"nginx_acme_{name}") for name in ("directory", "email", "ca_file"))
    if urlsplit(directory).scheme != "https" or not urlsplit(directory).hostname:
        yield Problem(
            "nginx_acme_directory",
            "the https URL of an ACME server's directory",
            directory or "an empty string",
            "correct it, or leave it out for Let's Encrypt",
        )
    if email and (email.count("@") != 1 or not all(email.split("@")) or any(char.isspace() for char in email)):
        yield Problem("nginx_acme_email", "an address such as ops@example.com", email, "correct it, or leave it out")
    if ca_file:
        try:
            readable = b"-----BEGIN CERTIFICATE-----" in read(Path(ca_file))
            why = "a file without one"
        except OSError as error:
            readable, why = False, f"{ca_file}: {error.strerror or error}"
        if not readable:
            yield Problem("nginx_acme_ca_file", "a certificate in PEM on the control machine", why, "correct the path")
    for name, entry in entries.items():
        aliases = entry.get("aliases")
        names = [entry.get("domain"), *(aliases if isinstance(aliases, list) else [])]
        if "localhost" in names:
            do = "give it a name that the ACME server can reach, or choose another nginx_tls_source"
            yield Problem(f"apps.{name}.domain", "a name that an ACME server can reach", "localhost", do)
        if len(names) > MOST_NAMES:
            expected = f"at most {MOST_NAMES} names in one certificate"
            yield Problem(f"apps.{name}.aliases", expected, str(len(names)), "split the app's names over two entries")


def _files(
    pairs: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], roles: Path, read: Read
) -> Iterator[Problem]:
    for name in pairs:
        if name not in entries:
            near = nearest(str(name), entries)
            do = f"did you mean `{near}`?" if near else "remove it"
            yield Problem(f"nginx_tls_certificates.{name}", "the name of an app", str(name), do)
    try:
        program = _program(roles)
    except ImportError as error:
        do = "install requirements.txt on the control machine"
        yield Problem("Python on the control machine", "the package cryptography", str(error), do)
        return
    for name, entry in entries.items():
        where, pair = f"nginx_tls_certificates.{name}", pairs.get(name)
        if not isinstance(pair, Mapping) or set(pair) != {"certificate", "key"}:
            has = f"a mapping with {', '.join(map(str, pair))}" if isinstance(pair, Mapping) else kind(pair)
            expected = "a mapping with certificate and key, because nginx_tls_source is files"
            yield Problem(where, expected, has, "name the two files of this app")
            continue
        contents: dict[str, bytes] = {}
        for part, path in pair.items():
            if not Path(str(path)).is_absolute():
                expected, do = "an absolute path on the control machine", "begin it with the folder of the inventory"
                yield Problem(f"{where}.{part}", expected, str(path), do)
                continue
            try:
                contents[part] = read(Path(str(path)))
            except OSError as error:
                expected = "a file that can be read on the control machine"
                yield Problem(f"{where}.{part}", expected, f"{path}: {error.strerror or error}", "correct the path")
        if len(contents) == len(pair):
            names = [entry["domain"], *(entry.get("aliases") or [])] if entry.get("domain") else []
            for mistake in program.mistakes(
                contents["certificate"], contents["key"], names, datetime.now(UTC), lambda: _roots(program)
            ):
                yield Problem(f"{where}.{mistake.part}", mistake.expected, mistake.found, mistake.do)


def _program(roles: Path) -> ModuleType:
    """Load the program that judges the same pairs on the host."""
    name = "forge_certificates"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, roles / "nginx" / "files" / f"{name}.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their own module up.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _roots(program: ModuleType) -> set[bytes]:
    """Return the subjects of the CAs that the control machine trusts."""
    paths = ssl.get_default_verify_paths()
    files = [Path(path) for path in (paths.cafile, "/etc/ssl/certs/ca-certificates.crt") if path]
    for file in files:
        if file.is_file():
            return {each.subject.public_bytes() for each in program.read_chain(file.read_bytes())}
    return set()
