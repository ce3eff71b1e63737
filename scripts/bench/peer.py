"""The peer: Fujin (https://github.com/Tobi-De/fujin) with Caddy, the same app, database and number of workers.

It is set up the way `fujin init` and `fujin server bootstrap` would, save that Caddy is Debian's and Python the
system's, where the bootstrap would fetch both from GitHub. In its favour the wheels are built beforehand: a build would
be part of each `fujin deploy`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

from demo import ROOT, VENV

from bench.hosts import CONTROL, DOMAIN, PEER_VENV, STATE, USER, Host, run
from bench.load import Site

SETUP = """
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# A name for itself and no browser's store of CAs is all that Caddy lacks without the recommended packages.
apt-get install -qq --no-install-recommends caddy curl postgresql rsync sqlite3 wrk > /dev/null 2>&1
install -D -o {user} -g {user} /root/uv /home/{user}/.local/bin/uv
install -D /dev/null /etc/uv/uv.toml
echo 'system-certs = true' > /etc/uv/uv.toml
groupadd -f fujin
usermod -aG fujin {user}
install -d -g fujin -m 775 /opt/fujin /opt/fujin/.python
install -d -o {user} -g {user} /opt/fujin/inbox /opt/fujin/inbox/.install
# Fujin takes an environment that is there; it would make one with a Python from GitHub.
su {user} -c '~/.local/bin/uv venv --quiet --python /usr/bin/python3 /opt/fujin/inbox/.install/.venv'
install -d /etc/caddy/conf.d
echo 'import conf.d/*.caddy' > /etc/caddy/Caddyfile
systemctl restart caddy
sed -i '1i local inbox inbox scram-sha-256' /etc/postgresql/*/main/pg_hba.conf
systemctl reload postgresql
su postgres -c 'psql --quiet --set ON_ERROR_STOP=1'
"""

DATABASE = """
CREATE ROLE inbox LOGIN PASSWORD '{password}';
CREATE DATABASE inbox OWNER inbox;
ALTER DATABASE inbox SET forge.environment = 'production';
"""

MIGRATE = """
set -a
. /opt/fujin/inbox/.install/.env
cd /root/app
/opt/fujin/inbox/.install/.venv/bin/python -m alembic upgrade head
systemctl restart inbox-web
"""

SETTINGS = """
app = "inbox"
version = "{version}"
build_command = "true"
distfile = "dist/inbox-{{version}}-py3-none-any.whl"
requirements = "requirements.txt"
installation_mode = "python-package"
python_version = "3"

[[hosts]]
address = "{address}"
user = "{user}"
key_filename = "{key}"
envfile = ".env"
"""

# The template of Fujin 0.27, with Gunicorn as this project runs it.
UNIT = """
[Unit]
Description={{app_name}} web
After=network.target postgresql.service

[Service]
Type=simple
User={{app_user}}
WorkingDirectory={{app_dir}}
EnvironmentFile={{install_dir}}/.env
RuntimeDirectory={{app_name}}
RuntimeDirectoryMode=0755
UMask=0002
ExecStart={{install_dir}}/.venv/bin/gunicorn inbox.main:app --bind 127.0.0.1:8000 \
    --workers {workers} --worker-class uvicorn_worker.UvicornWorker \
    --keep-alive 75 --timeout 120 --graceful-timeout 65
{reload}
Restart=on-failure
RestartSec=5s
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ProtectHome=true
ReadWritePaths={{app_dir}}

[Install]
WantedBy=multi-user.target
"""

CADDY = """
{domain} {{
    tls internal
    reverse_proxy localhost:8000
}}
"""
READY_SECONDS = 30
HUNG_SECONDS = 60
CADDY_CA = "/var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt"


class Fujin:
    """The peer's project folder and host."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.workers = 2
        self.number = 0

    def prepare(self, releases: int) -> None:
        """Set the host up and build the wheels of all releases."""
        password = secrets.token_urlsafe(24)
        self.host.copy_in(VENV / "uv", "/root/uv")
        self.host.copy_in(ROOT / "app", "/root/app")
        self.host.root(SETUP.format(user=USER), given=DATABASE.format(password=password))
        (self.folder / ".fujin" / "systemd").mkdir(parents=True)
        self._write(
            ".env",
            f"""
            FORGE_ENVIRONMENT=production
            FORGE_DATABASE_URL=postgresql+asyncpg://inbox@%2Fvar%2Frun%2Fpostgresql/inbox
            FORGE_DATABASE_PASSWORD={password}
            FORGE_SIGNING_KEY={secrets.token_urlsafe(48)}
            """.replace(" " * 12, ""),
        )
        self._write(".fujin/Caddyfile", CADDY.format(domain=DOMAIN))
        lock = (ROOT / "app" / "requirements.txt").read_text()
        pins = re.findall(r"^[a-z0-9].*?(?= \\$)", lock, flags=re.MULTILINE)
        self._write("requirements.txt", "\n".join(pins) + "\n")
        for number in range(1, releases + 1):
            self._build(number)

    def _build(self, number: int) -> None:
        source = self.folder / "source"
        shutil.copytree(ROOT / "app", source, ignore=shutil.ignore_patterns("__pycache__", ".*", "tests"))
        project = source / "pyproject.toml"
        project.write_text(re.sub(r"(?m)^version = .*$", f'version = "1.0.{number}"', project.read_text(), count=1))
        revise(source, number)
        command = [str(VENV / "uv"), "build", "--quiet", "--system-certs", "--wheel", "--out-dir", "../dist"]
        run(command, f"wheel {number}", cwd=source)
        shutil.rmtree(source)

    def begin(self, workers: int) -> Site:
        """Release the first version and migrate the database; return the site that then serves."""
        self.workers = workers
        self.restart_by("")
        self.deploy()
        self.host.root(MIGRATE)
        cafile = STATE / "caddy.pem"
        cafile.write_text(self.host.root(f"cat {CADDY_CA}"))
        return Site(self.host, cafile)

    def restart_by(self, reload: str) -> None:
        """Have the unit reload by a command, or restart where there is none."""
        line = f"ExecReload={reload}" if reload else ""
        self._write(".fujin/systemd/web.service", UNIT.format(workers=self.workers, reload=line))

    def deploy(self) -> dict[str, Any]:
        """Release the next version."""
        self.number += 1
        settings = SETTINGS.format(
            version=f"1.0.{self.number}", address=self.host.address, user=USER, key=STATE / "id_ed25519"
        )
        self._write("fujin.toml", settings)
        return self._fujin("deploy", "--no-input")

    def rollback(self) -> dict[str, Any]:
        """Go back to the version before."""
        return self._fujin("rollback", "--previous")

    def wait_until_ready(self) -> None:
        """Wait until the app answers again.

        Raises:
            BenchError: it does not.
        """
        self.host.root(
            f"for each in $(seq {READY_SECONDS}); do"
            " curl --silent --fail --output /dev/null http://127.0.0.1:8000/ready && exit; sleep 1; done; exit 1"
        )

    def _fujin(self, *arguments: str) -> dict[str, Any]:
        # As from a terminal at which nobody types: at an input that has ended Fujin polls without a pause.
        silent, kept_open = os.pipe()
        try:
            command = [*CONTROL, str(PEER_VENV / "bin" / "fujin"), *arguments]
            run(command, f"fujin {arguments[0]}", cwd=self.folder, stdin=silent, timeout=HUNG_SECONDS)
        except subprocess.TimeoutExpired:
            # Seen in 0.27.1: the command on the host is over, and Fujin goes on waiting for its end.
            self.host.root("rm -f /opt/fujin/inbox/.install/.deploy_lock")
            return {"hung": True}
        finally:
            os.close(silent)
            os.close(kept_open)
        return {"hung": False}

    def _write(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content.lstrip("\n"))


def revise(source: Path, number: int) -> None:
    """Change the app's code, and nothing but its code."""
    with (source / "src" / "inbox" / "__init__.py").open("a") as file:
        file.write(f"# Revision {number}\n")


def versions(host: Host) -> dict[str, str]:
    """Versions of the peer's parts."""
    fujin = run([str(PEER_VENV / "bin" / "fujin"), "--version"], "a version").strip()
    return {"fujin": fujin, "caddy": host.root("caddy version").split()[0]}
