"""A database user that Vault leases to one slot: the work of NAME-lease@SLOT.service.

It holds token and lease in memory and renews both, hands the user to forge-launch of its slot, has the app moved to a
fresh slot, with a user of its own, before the lease can be renewed no further, and revokes the token, and with it the
lease, once the slot has stopped.

What it holds lies in a memory file that systemd keeps for it, so that its own end, however it comes, ends no lease.
While Vault does not answer it tries again and again; nobody notices unless the lease ends before.
"""

import array
import json
import os
import pwd
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from forgectl import config, systemd
from forgectl.config import App
from forgectl.errors import ForgeError, Refused, SecretsError
from forgectl.launch import credential
from forgectl.layout import Layout

if TYPE_CHECKING:
    from forgectl.vault import Login

# Of what is left. Never the same for two hosts, nor twice for one.
RENEW_AT = (0.4, 0.6)
# What Vault grants is in whole seconds, of which one may be over when it says so.
SLACK_SECONDS, SLACK = 1.0, 0.1
# The share of its life that is left when the on-call has to know that a lease is about to end.
ALARMING = 0.25
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
# Near the end, half of what is left would be nothing.
LEAST_PAUSE_SECONDS = 0.5
# How long forge-launch waits for the first lease before it hears why there is none yet.
ANSWER_SECONDS = 5.0
# What the kernel may need to pass an answer on, whatever the host does.
CLIENT_SECONDS = ANSWER_SECONDS + 5.0
STORED = "lease"
# More than a token, a lease and a user are ever long; one page, which the kernel writes in one go.
STORED_BYTES = 4096


class Held(msgspec.Struct, forbid_unknown_fields=True):
    """A token and the database user that lives as long as it.

    `token_ttl` and `lease_ttl` are the seconds that were granted at first; `token_ends` and `lease_ends` are seconds of
    CLOCK_BOOTTIME, which no restart of a process and no change of the time of day moves. `token_goes_on` and
    `lease_goes_on`: whether renewing still gives all of those seconds.
    """

    token: str
    token_ttl: int
    token_ends: float
    lease: str
    lease_ttl: int
    lease_ends: float
    lease_goes_on: bool
    user: str
    password: str
    token_goes_on: bool = True

    @property
    def left(self) -> float:
        """The seconds until the user is gone."""
        return min(self.token_ends, self.lease_ends) - _now()

    @property
    def life(self) -> int:
        """The seconds that a renewal gives, as long as it gives all."""
        return min(self.token_ttl, self.lease_ttl)


class Store:
    """Memory that outlives this process: a memfd that systemd keeps for the unit's next start.

    See FDSTORE= in sd_notify(3), and "File Descriptor Store" of systemd.
    """

    def __init__(self) -> None:
        self._file = _handed_over()

    def load(self) -> Held | None:
        """What an earlier process of this unit held."""
        if self._file is None:
            return None
        try:
            return msgspec.json.decode(os.pread(self._file, STORED_BYTES, 0), type=Held | None)
        except msgspec.DecodeError:
            return None

    def save(self, held: Held | None) -> None:
        if self._file is None:
            self._file = os.memfd_create(STORED)
            _notify(f"FDSTORE=1\nFDNAME={STORED}", self._file)
        data = msgspec.json.encode(held)
        if len(data) > STORED_BYTES:
            raise ForgeError(
                f"expected a token and a lease within {STORED_BYTES} bytes; found {len(data)}; report this"
            )
        os.pwrite(self._file, data.ljust(STORED_BYTES), 0)


class Desk:
    """Hands the user out on a unix socket, to processes of one system user only."""

    def __init__(self, path: Path, uid: int, say: Callable[[str], None]) -> None:
        self._uid, self._say = uid, say
        self._answer = b""
        self._ready = threading.Event()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        # The folder is for the app's group; who it is is asked below.
        path.chmod(0o660)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def hand_out(self, held: Held) -> None:
        """Answer with a user and its password from now on."""
        self._set({"user": held.user, "password": held.password})

    def explain(self, error: SecretsError) -> None:
        """Answer with the reason why there is no user."""
        self._set({"state": error.state, "error": str(error)})

    def withdraw(self) -> None:
        """Let whoever asks wait for the next answer: this one is no good any more."""
        self._ready.clear()
        self._answer = b""

    def _set(self, answer: dict[str, str]) -> None:
        self._answer = json.dumps(answer).encode()
        self._ready.set()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                # Nobody would answer any more; the next process goes on with what is stored.
                self._say(f"expected to be asked for the database user; found: {error}")
                os._exit(1)
            with connection:
                peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                pid, uid, _ = struct.unpack("3i", peer)
                if uid != self._uid:
                    self._say(f"refused the database user to process {pid} of user {uid}; it is for user {self._uid}")
                    continue
                self._ready.wait(ANSWER_SECONDS)
                connection.settimeout(ANSWER_SECONDS)
                with suppress(OSError):
                    connection.sendall(self._answer)


class Keeper:
    """Gets a lease, keeps it, and has it replaced."""

    def __init__(self, layout: Layout, app: App, slot: str, say: Callable[[str], None]) -> None:
        if app.database is None or not app.leases:
            raise Refused(f"expected the release in slot {slot} to lease its database user; found that it does not")
        self._layout, self._app, self._slot, self._say = layout, app, slot, say
        self._mount, self._role = app.secrets.database_mount, app.database.vault_role
        self._store = Store()
        self._held = self._store.load()
        self._pause = FIRST_PAUSE_SECONDS
        self._trouble = ""
        self._alarmed = False
        folder = layout.lease_folder(slot)
        self._due = folder / "due"
        self._desk = Desk(folder / "socket", pwd.getpwnam(app.user).pw_uid, say)
        if self._held:
            self._desk.hand_out(self._held)
            say(f"goes on with the lease of {self._held.user}")
        _notify("READY=1")

    def step(self) -> float:
        """Do what is to be done now; returns the seconds until there is more."""
        held = self._held
        if held and held.left <= 0:
            return self._lost("it has ended")
        try:
            held = self._renew(held) if held else self._acquire()
        except SecretsError as error:
            if error.state == "lost":
                return self._lost(str(error))
            return self._failed(error)
        self._pause, self._trouble = FIRST_PAUSE_SECONDS, ""
        self._alarm(held)
        return max(held.left * random.uniform(*RENEW_AT), LEAST_PAUSE_SECONDS)

    def end(self) -> None:
        """Revoke what is held, unless the slot still needs it: then it waits in the store for the unit's next start."""
        if self._held is None:
            return
        if systemd.show(self._layout.service(self._slot))["ActiveState"] not in ("inactive", "failed"):
            self._say(
                f"slot {self._slot} still runs, so its lease is not revoked; it lasts {self._held.left:.0f} s more"
            )
            return
        from forgectl import vault

        with closing(vault.Vault(self._app.secrets)) as server:
            if not server.revoke(self._held.token):
                self._say(f"the lease of {self._held.user} could not be revoked; it ends in {self._held.left:.0f} s")
        self._store.save(None)
        self._held = None

    def _acquire(self) -> Held:
        from forgectl import vault

        with closing(vault.Vault(self._app.secrets)) as server:
            began = _now()
            login = server.identify(credential("role-id"), credential("secret-id"))
            try:
                check_kept(login)
                leased = server.lease_user(login.token, self._mount, self._role)
                held = Held(
                    token=login.token,
                    token_ttl=login.ttl,
                    token_ends=began + login.ttl,
                    lease=leased.lease,
                    lease_ttl=leased.ttl,
                    lease_ends=began + leased.ttl,
                    lease_goes_on=leased.renewable,
                    user=leased.user,
                    password=leased.password,
                )
                self._held = held
                self._store.save(held)
            except BaseException:
                self._held = None
                server.revoke(login.token)
                raise
        self._desk.hand_out(held)
        self._say(f"leased {held.user} for {held.life} s at a time")
        if why := due(self._layout, self._slot):
            # What runs in the slot has the user before; a fresh slot that was asked for then may have failed.
            self._replace(why)
        return held

    def _renew(self, held: Held) -> Held:
        from forgectl import vault

        with closing(vault.Vault(self._app.secrets)) as server:
            # What gives less than usual has reached its longest life, past which asking again is an error.
            if held.token_goes_on:
                began, granted = _now(), server.renew(held.token)
                held.token_ends, held.token_goes_on = began + granted, not _is_less(granted, held.token_ttl)
            if held.lease_goes_on:
                began, granted = _now(), server.renew(held.token, held.lease)
                held.lease_ends, held.lease_goes_on = began + granted, not _is_less(granted, held.lease_ttl)
        self._store.save(held)
        if not (held.token_goes_on and held.lease_goes_on):
            self._replace(f"the lease of its database user can be renewed no further and ends in {held.left:.0f} s")
        return held

    def _replace(self, why: str) -> None:
        """Ask for a fresh slot: forge-recycle@NAME.service finds it due. Whoever holds the lock may have it first."""
        self._due.write_text(why)
        try:
            systemd.start(f"forge-recycle@{self._app.name}.service", block=False)
        except ForgeError as error:
            self._say(f"asked for a fresh slot in vain: {error}")
        else:
            self._say(f"asked for a fresh slot: {why}")

    def _lost(self, why: str) -> float:
        user = self._held.user if self._held else ""
        self._held, self._alarmed, self._pause = None, False, FIRST_PAUSE_SECONDS
        self._desk.withdraw()
        self._store.save(None)
        self._alert(f"the lease of {user}, the database user of slot {self._slot}, is lost: {why}")
        self._replace("its database user is gone")
        return 0

    def _failed(self, error: SecretsError) -> float:
        self._trouble = str(error)
        pause = random.uniform(self._pause / 2, self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        if self._held:
            pause = min(pause, max(self._held.left / 2, 0.1))
            self._alarm(self._held)
        else:
            self._desk.explain(error)
        self._say(f"{error}; next attempt in {pause:.1f} s")
        if error.state in ("missing", "rejected", "address"):
            # systemd opens a secret id that was renewed meanwhile for the next start; until then this says why.
            time.sleep(pause)
            sys.exit(1)
        return pause

    def _alarm(self, held: Held) -> None:
        """Alert once when a lease is about to end and nothing has replaced it."""
        if held.left > held.life * ALARMING:
            self._alarmed = False
        elif not self._alarmed:
            self._alarmed = True
            why = self._trouble or f"no cutover has replaced it; see `forgectl history {self._app.name}`"
            self._alert(f"the database user of slot {self._slot} ends in {max(held.left, 0):.0f} s: {why}")

    def _alert(self, text: str) -> None:
        # The priority err of sd-daemon(3).
        self._say(f"<3>ALERT {self._app.name}: {text}")


def keep(layout: Layout, slot: str, say: Callable[[str], None]) -> None:
    """Keep the database user of a slot until a signal ends it."""
    keeper = Keeper(layout, config.load(layout.slots / slot / "settings.toml"), slot, say)
    try:
        while True:
            time.sleep(keeper.step())
    except KeyboardInterrupt:
        keeper.end()


def check_kept(login: "Login") -> None:
    """Check that a token lives as long as it is renewed.

    Raises:
        SecretsError: a batch token, or one of limited uses.
    """
    if not login.kept:
        raise SecretsError(
            "denied",
            f"expected a token of the AppRole {login.approle} that can be renewed as often as needed, because the "
            "leased database user ends with it; found a batch token, or one of limited uses; set token_type=service "
            "and token_num_uses=0 there",
        )


def check(app: App, role_id: str, secret_id: str) -> None:
    """Ask Vault whether the app may lease a database user and keep it, without leasing one.

    Raises:
        SecretsError: it may not.
    """
    from forgectl import vault

    if app.database is None:
        return
    needed = {
        f"{app.secrets.database_mount}/creds/{app.database.vault_role}": {"read"},
        "sys/leases/renew": {"update"},
        "auth/token/renew-self": {"update"},
    }
    with closing(vault.Vault(app.secrets)) as server:
        login = server.identify(role_id, secret_id)
        try:
            check_kept(login)
            lacking = server.lacking(login.token, needed)
        finally:
            server.revoke(login.token)
    if lacking:
        raise SecretsError(
            "denied",
            f"expected the AppRole {login.approle} to be allowed {', '.join(lacking)}; found that it is not; give it "
            "the policy of docs/vault.md",
        )


def ask(layout: Layout, slot: str) -> tuple[str, str]:
    """User and password of a slot, from the unit beside it.

    Raises:
        SecretsError: nobody answers, or there is no lease yet, and why.
    """
    path = layout.lease_folder(slot) / "socket"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(CLIENT_SECONDS)
            connection.connect(str(path))
            data = b"".join(iter(lambda: connection.recv(STORED_BYTES), b""))
    except OSError as error:
        raise SecretsError(
            "unreachable",
            f"expected the database user at {path}; found: {error.strerror or error}; see "
            f"`systemctl status {layout.lease_unit(slot)}`",
        ) from None
    answer = json.loads(data) if data else {}
    if "user" in answer:
        return answer["user"], answer["password"]
    unit = layout.lease_unit(slot)
    raise SecretsError(
        answer.get("state", "unreachable"), answer.get("error", f"{unit} has no database user yet; see its log")
    )


def due(layout: Layout, slot: str) -> str:
    """Why the database user of a slot has to be replaced; empty when it has not."""
    try:
        return (layout.lease_folder(slot) / "due").read_text()
    except FileNotFoundError:
        return ""


def _is_less(granted: float, usual: int) -> bool:
    """Whether a renewal gave noticeably less than the usual seconds, since the longest life is near."""
    return granted < usual - max(SLACK_SECONDS, usual * SLACK)


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _handed_over() -> int | None:
    """The memory file that systemd kept, by sd_listen_fds(3)."""
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    mine = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    os.environ.pop("LISTEN_FDS", None)
    if not mine or STORED not in names:
        return None
    descriptor = 3 + names.index(STORED)
    os.set_inheritable(descriptor, False)
    return descriptor


def _notify(text: str, *descriptors: int) -> None:
    """Tell systemd something, with open files: sd_notify(3)."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        return
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + name[1:] if name.startswith("@") else name)
        notify.sendmsg([text.encode()], rights)
