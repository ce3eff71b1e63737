"""Nginx is killed, stopped, can't read its files, or serves a certificate that has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from forge_events import nginx_workers
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import CONTAINER, main_pid, podman, until
from testinfra.host import Host

DOWN, EXPIRING = "nginx-down", "certificate-expiring"
OVER = "See that it is mended"
CA = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls"
TLS = "/etc/nginx/tls"
BY_HAND = "/etc/nginx/conf.d/by-hand.conf"


def kill(host: Host) -> None:
    """Kill the first process of Nginx."""
    host.check_output("kill -KILL %s", str(main_pid(host, "nginx.service")))


def test_killed(fault: FaultContext, host: Host) -> None:
    """It is back within seconds, on the ports that its workers had."""
    was = main_pid(host, "nginx.service")
    with fault("Nginx killed"):
        kill(host)
        until(lambda: main_pid(host, "nginx.service") not in (0, was), 30)


@pytest.mark.exhaustive
def test_configuration_broken(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """What serves goes on. Killed, it comes back as soon as the file is out of the way, however long that takes."""
    with fault("Nginx's configuration broken") as happening:
        before = nginx_workers(host)
        host.check_output("echo 'no_such_directive on;' > %s", BY_HAND)
        try:
            assert host.run("systemctl reload nginx.service").rc != 0
            happening.told("F802")
            assert (nginx_workers(host), happening.hurt) == (before, [])
            kill(host)
            # More often than systemd lets a unit fail by itself.
            until(lambda: int(host.check_output("systemctl show --value --property=NRestarts nginx.service")) > 6, 60)
            happening.told("F801", "F802")
            runbooks.follow(DOWN, "What you see")
            assert BY_HAND in runbooks.follow(DOWN, "Look")
            happening.mended_by(DOWN)
            runbooks.follow(DOWN, "A file that is not the project's", {"file": BY_HAND})
        finally:
            host.run("rm --force %s", BY_HAND)
    runbooks.follow(DOWN, OVER)


@pytest.mark.exhaustive
def test_stopped(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """By somebody, who disabled it as well."""
    with fault("Nginx stopped") as happening:
        host.check_output("systemctl disable --now nginx.service")
        happening.told("F801")
        runbooks.follow(DOWN, "What you see")
        assert "Nginx does not run" in runbooks.follow(DOWN, "Look")
        happening.mended_by(DOWN)
        runbooks.follow(DOWN, "It was stopped")
    assert host.check_output("systemctl is-enabled nginx.service") == "enabled"
    runbooks.follow(DOWN, OVER)


@pytest.mark.exhaustive
def test_changed_by_hand(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """In a file of the project: clients notice nothing, not even that the inventory puts it right."""
    with fault("Nginx's configuration changed by hand") as happening:
        host.check_output("sed --in-place 's/proxy_pass /proxy_pas /' /etc/nginx/forge/inbox.conf")
        happening.told("F802")
        assert "/etc/nginx/forge/inbox.conf" in runbooks.follow(DOWN, "Look")
        happening.mended_by(DOWN)
        runbooks.follow(DOWN, "A file of the project")
    assert happening.hurt == []
    runbooks.follow(DOWN, OVER)


@contextmanager
def expired(host: Host) -> Iterator[None]:
    """Have clients get a certificate that ended yesterday, as one that nobody renewed."""
    name = host.check_output("cat %s/inbox.pem", TLS)
    leaf = x509.load_pem_x509_certificate(name.encode())
    signer = serialization.load_pem_private_key((CA / "ca.key").read_bytes(), None)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(leaf.issuer)
        .public_key(leaf.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=366))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in leaf.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pem = builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
    install = f"cat > {TLS}/inbox.pem && cat {TLS}/inbox.key {TLS}/inbox.pem > {TLS}/live/inbox.pem"
    podman("exec", "--interactive", CONTAINER, "sh", "-c", install, input=pem)
    host.check_output("systemctl reload nginx.service")
    yield


@pytest.mark.exhaustive
def test_certificate_expired(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Every client refuses, until the inventory's source gives another; nobody has to reload anything."""
    with fault("certificate expired") as happening, expired(host):
        host.check_output("systemctl start forge-certificates.service")
        until(lambda: happening.hurt, 60)
        happening.told("F102")
        assert "ended on" in runbooks.follow(EXPIRING, "What you see")
        happening.mended_by(EXPIRING)
        runbooks.follow(EXPIRING, "From a CA of your own")
