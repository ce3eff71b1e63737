"""Refuse bad input before anything on a host changes, and compute what all roles share.

Runs on the control machine; the only thing it runs on the host is `host_probe`, which reads. The task takes the options
of the role `preflight` without their prefix. `apps` and the variables of the other roles are read from the host's
variables rather than from arguments of the task, because Ansible quotes a task's arguments in errors and at high
verbosity, and an inventory that has to be refused may hold secrets.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

# Ansible looks for a project's own module_utils only when it packs a module, never on the control machine.
_UTILS = str(Path(__file__).resolve().parents[1] / "module_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.forge import access, alerts, inventory_lint, secret_scan  # noqa: E402
from ansible.module_utils.forge.preflight import Inventory, Outcome, Settings, examine  # noqa: E402
from ansible.module_utils.forge.problems import Problem, render  # noqa: E402
from ansible.module_utils.forge.programs import Desk  # noqa: E402
from ansible.module_utils.forge.specs import read_roles  # noqa: E402
from ansible.module_utils.forge.values import nearest, plain  # noqa: E402

# Set by this role and by later ones; a template that needs them cannot be judged before they exist.
_LATER = ("forge_apps", "forge_host", "ansible_facts", "__")


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action behind the task of the role `preflight`."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _VALID_ARGS = frozenset(field.name for field in fields(Settings))

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `apps` and `host`, or a failure whose message lists every problem."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        settings = Settings(**plain({name: self._task.args.get(name) for name in self._VALID_ARGS}))
        inventory, problems = self._inventory(variables)
        probe, unreachable, found = self._probe(variables)
        if unreachable:
            return unreachable
        outcome: Outcome = examine(inventory, probe, settings)
        problems += [*outcome.problems, *found]
        # A run prints what an action returns, so nothing of the inventory is in a refusal but the masked message.
        result["changed"] = False
        if problems:
            secrets = inventory_lint.secret_values(inventory.apps, inventory.raw)
            result["failed"] = True
            result["msg"] = render(problems, str(variables.get("inventory_hostname", "the host")), secrets)
            return result
        if outcome.warnings:
            result["warnings"] = outcome.warnings
        result["apps"] = outcome.apps
        result["host"] = outcome.host
        result["_ansible_verbose_override"] = True
        return result

    def _probe(self, variables: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[Problem]]:
        """Return what the host says; or the result of a host that cannot be reached; or why it could not be read."""
        answer = self._execute_module(module_name="host_probe", module_args={}, task_vars=variables)
        if answer.get("unreachable"):
            return None, answer, []
        if "probe" in answer:
            return answer["probe"], None, []
        said = str(answer.get("msg") or answer.get("module_stderr") or answer.get("module_stdout") or "no answer")
        problem = Problem(
            "Python on the host",
            "Python 3.9 or newer at the path in ansible_python_interpreter",
            " ".join(said.split())[:300],
            "install python3 on the host, or correct the path or the rights of the remote user",
        )
        return None, None, [problem]

    def _inventory(self, variables: dict[str, Any]) -> tuple[Inventory, list[Problem]]:
        roles = Path(str(variables["role_path"])).parent
        specs = read_roles(roles)
        problems: list[Problem] = []
        raw_apps = variables.get("apps")
        apps = self._rendered(raw_apps, "apps", problems, judge_later=False)
        options = {name for role in specs.values() for name in role}
        raw = {name: value for name, value in variables.items() if _concerns(name, specs)}
        values = {}
        roles_that_run = _roles_that_run(variables)
        # One that a lookup did not find today is seen before anything changes.
        now = alerts.SECRETS if alerts.ROLE in roles_that_run else ()
        for name in sorted(options & raw.keys()):
            value = self._rendered(raw[name], name, problems, judge_later=name not in now)
            if value is not _UNJUDGED:
                values[name] = value
        inventory = Inventory(
            root=roles.parent,
            roles=roles,
            play_roles=roles_that_run,
            apps=apps,
            raw_apps=raw_apps,
            raw=raw,
            values=values,
            hosts_of=_hosts_of(variables),
            read=self._read,
            connection=self._reached(),
            desk=self._desk(variables, roles.parent, problems),
        )
        return inventory, problems

    def _desk(self, variables: dict[str, Any], root: Path, problems: list[Problem]) -> Desk:
        index = self._rendered(variables.get("base_package_index_url") or "", "base_package_index_url", problems, False)
        # None for a host that no file names.
        beside = Path(str(variables.get("inventory_dir") or root))
        return Desk(root / ".cache" / "sources", beside / "locks", str(index))

    def _read(self, path: Path) -> bytes:
        """Return the content of a file of the control machine, decrypted where it is encrypted with ansible-vault."""
        # As `copy` does; an OSError says more than the loader's own error.
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        real = self._loader.get_real_file(str(path))
        try:
            return Path(real).read_bytes()
        finally:
            self._loader.cleanup_tmp_file(real)

    def _reached(self) -> access.Connection:
        """Tell how Ansible reaches the host."""
        # Neither every plugin nor every version of one knows of passwords.
        try:
            password = bool(self._connection.get_option("password") or self._play_context.password)
        except KeyError:
            password = False
        return access.Connection(str(self._connection.transport).rpartition(".")[2], password)

    def _rendered(self, value: Any, where: str, problems: list[Problem], judge_later: bool) -> Any:
        """Return `value` as plain data, its templates filled in leaf by leaf, so that a mistake names its place."""
        if isinstance(value, Mapping):
            rendered = {
                str(key): self._rendered(item, f"{where}.{key}", problems, judge_later) for key, item in value.items()
            }
            return _UNJUDGED if _UNJUDGED in rendered.values() else rendered
        if isinstance(value, (list, tuple)):
            items = [self._rendered(item, f"{where}[{i}]", problems, judge_later) for i, item in enumerate(value)]
            return _UNJUDGED if _UNJUDGED in items else items
        # A lookup may ask Vault or run a command; the role that needs it does that, once.
        later = judge_later and isinstance(value, str) and secret_scan.is_template(value)
        if later and any(name in value for name in ("lookup(", "query(", *_LATER)):
            return _UNJUDGED
        try:
            return plain(self._templar.template(value))
        except AnsibleError as error:
            if judge_later and any(name in str(error) for name in _LATER):
                return _UNJUDGED
            problems.append(
                Problem(
                    where, "a value whose template can be filled in", _first_line(error), "define what it refers to"
                )
            )
            return _UNJUDGED if judge_later else ""


def _roles_that_run(variables: Mapping[str, Any]) -> list[str]:
    """Return the play's roles, without `hardening` where --tags or --skip-tags leave it out: it judges the connection.

    The others are judged all the same; what they need is in the inventory.
    """
    tags, skipped = (set(variables.get(name) or []) for name in ("ansible_run_tags", "ansible_skip_tags"))
    left_out = access.ROLE in skipped or not tags & {"all", "tagged", access.ROLE}
    names = [str(name) for name in variables.get("ansible_play_role_names") or []]
    return [name for name in names if not (left_out and name == access.ROLE)]


class _Unjudged:
    """A value that exists only later in the run."""


_UNJUDGED = _Unjudged()


def _concerns(name: str, roles: Mapping[str, Any]) -> bool:
    """Tell whether a variable carries the prefix of a role, or one so close that it may be a slip."""
    prefix, separator, _ = name.partition("_")
    if not separator or name.startswith(("ansible_", "__")):
        return False
    return prefix in roles or nearest(prefix, roles) is not None


def _hosts_of(variables: Mapping[str, Any]) -> dict[str, int]:
    """Count, for each app whose database is elsewhere, the hosts of the inventory that run it, despite `--limit`.

    A host counts when its inventory spells the database's URL in the same way, so that those of another environment,
    with a database of their own, do not.
    """
    own = _external_databases(variables.get("apps"))
    if not own:
        return {}
    hosts = variables.get("groups", {}).get("all", [])
    databases = [_external_databases(variables["hostvars"].raw_get(host).get("apps")) for host in hosts]
    return {name: sum(there.get(name) == url for there in databases) for name, url in own.items()}


def _external_databases(raw: Any) -> dict[str, str]:
    """Return the URL, as it stands in the inventory, of each app's external database."""
    entries = raw.items() if isinstance(raw, Mapping) else ()
    return {
        str(name): str(entry["database"].get("url"))
        for name, entry in entries
        if isinstance(entry, Mapping)
        and isinstance(entry.get("database"), Mapping)
        and entry["database"].get("placement", "local") != "local"
    }


def _first_line(error: Exception) -> str:
    return str(getattr(error, "message", error)).strip().partition("\n")[0][:200]
