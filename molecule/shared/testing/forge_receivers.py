"""Receivers of alerts on the host itself: an HTTPS server, a mail server with STARTTLS and a login, a pager's command.

The scenario's inventory names them: https://localhost:18443, localhost:2587, /usr/local/bin/page-somebody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from forge_scenario import until
from testinfra.host import Host

FOLDER = "/run/receivers"
SECONDS = 60
PAGER = "/usr/local/bin/page-somebody"
SEALED = "systemd-creds decrypt --name={0} /etc/credstore.encrypted/forge-alerts.{0} -"

CERTIFICATE = f"""
mkdir --parents --mode=0700 {FOLDER} && cd {FOLDER} && test -e key.pem || {{
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=receivers \\
        -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem 2> /dev/null
    cp cert.pem /usr/local/share/ca-certificates/receivers.crt
    update-ca-certificates > /dev/null 2>&1
}}
"""
# Writes what was posted, one JSON object a line; answers what the file `status` says.
HOOK = """
import http.server, json, pathlib, ssl, sys, time
folder = pathlib.Path(sys.argv[1])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        status = folder / "status"
        code = int(status.read_text()) if status.exists() else 204
        line = {"path": self.path, "body": body, "answer": code, "headers": dict(self.headers), "at": time.time()}
        with (folder / "posts").open("a") as file:
            file.write(json.dumps(line) + "\\n")
        self.send_response(code)
        self.end_headers()

    def log_message(self, *_arguments):
        # It would have the URL in the journal.
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 18443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
MAIL = """
import asyncio, email, email.policy, json, pathlib, ssl, sys
from aiosmtpd.smtp import SMTP, AuthResult
folder = pathlib.Path(sys.argv[1])

class Handler:
    async def handle_DATA(self, server, session, envelope):
        mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
        line = {"to": envelope.rcpt_tos, "from": envelope.mail_from, "tls": session.ssl is not None,
                "user": session.auth_data, "subject": mail["Subject"], "id": mail["Message-ID"],
                "text": mail.get_content()}
        with (folder / "mails").open("a") as file:
            file.write(json.dumps(line) + "\\n")
        return "250 taken"

def check(server, session, envelope, mechanism, data):
    login, password = data.login.decode(), data.password.decode()
    right = (folder / "password").read_text()
    return AuthResult(success=(login, password) == ("forge", right), auth_data=login)

async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    make = lambda: SMTP(Handler(), require_starttls=True, tls_context=context, auth_required=True, authenticator=check)
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 2587)
    await server.serve_forever()

asyncio.run(main())
"""
# As whoever runs it has nothing but the network, it posts as well.
PAGE = """#!/bin/sh
exec curl --silent --show-error --fail --data-binary @- --header "X-Subject: $FORGE_ALERT_SUBJECT" \\
    --header "X-User: $(id --user)" "https://localhost:18443/page/$1"
"""


class Receivers:
    """The three, and what they got."""

    def __init__(self, host: Host) -> None:
        self._host = host
        host.check_output(CERTIFICATE)
        # sudo logs what it is called with.
        host.check_output(f"{SEALED.format('mail_password')} > {FOLDER}/password")
        for name, text in {"hook.py": HOOK, "mail.py": MAIL}.items():
            host.check_output(f"printf %%s %s > {FOLDER}/{name}", text)
        host.check_output(f"printf %%s %s > {PAGER} && chmod 0755 {PAGER}", PAGE)
        self.start()

    def start(self, *names: str) -> None:
        """Have them run, or these of them."""
        for name in names or ("hook", "mail"):
            self._host.check_output(
                "systemctl is-active --quiet forge-test-%s || systemd-run --quiet --unit=forge-test-%s --collect "
                "/usr/bin/python3 %s/%s.py %s",
                *(name, name, FOLDER, name, FOLDER),
            )
        for port in {"hook": "18443", "mail": "2587"}.values() if not names else ():
            until(lambda port=port: self._host.socket(f"tcp://127.0.0.1:{port}").is_listening, 30)  # type: ignore[misc]

    def stop(self, *names: str) -> None:
        """Take them away."""
        for name in names:
            self._host.run("systemctl stop forge-test-%s", name)

    def answer(self, status: int) -> None:
        """Have the HTTPS server answer so from now on."""
        self._host.check_output(f"echo {status} > {FOLDER}/status")

    def posts(self, prefix: str = "/hook/", answer: int = 204) -> list[dict[str, Any]]:
        """What was posted below a path, and answered so."""
        found = self._lines("posts")
        return [each for each in found if each["path"].startswith(prefix) and each["answer"] == answer]

    def documents(self) -> list[dict[str, Any]]:
        """What the webhook took, as it was posted."""
        return [json.loads(each["body"]) for each in self.posts()]

    def texts(self) -> list[str]:
        """Each alert that the webhook took, in its order."""
        return [alert["text"] for document in self.documents() for alert in document["alerts"]]

    def mails(self) -> list[dict[str, Any]]:
        """The mails that were taken."""
        return self._lines("mails")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        said = self._host.run(f"cat {FOLDER}/{name}").stdout
        return [json.loads(line) for line in said.splitlines()]


@pytest.fixture(scope="module")
def receivers(host: Host) -> Iterator[Receivers]:
    """They take what comes, and before the first test what is left from earlier ones has arrived."""
    found = Receivers(host)
    # Whatever waited for a receiver is through, or waits no longer.
    host.check_output("systemctl restart forge-alerts.service")
    host.check_output("forgectl alerts test --wait 90")
    yield found
    # Gone already where a test has rebooted the host.
    host.run(f"rm --force {FOLDER}/status")


def mail_password(host: Host) -> str:
    """The password of the scenario's mail user, as the unit has it."""
    return str(host.check_output(SEALED.format("mail_password")))


def webhook_url(host: Host) -> str:
    """The URL of the scenario's webhook, as the unit has it."""
    return str(host.check_output(SEALED.format("webhook_url")))


def alert(host: Host, text: str, subject: str = "inbox") -> None:
    """Write an alert line, as the platform does."""
    host.check_output("echo %s | systemd-cat --identifier=forge-test --priority=err", f"ALERT {subject}: {text}")


def state(host: Host, channel: str) -> dict[str, Any]:
    """What a channel remembers."""
    found: dict[str, Any] = json.loads(host.check_output("cat /var/lib/forge-alerts/%s.json", channel))
    return found
