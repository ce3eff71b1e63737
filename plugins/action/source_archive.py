"""Pack the source folder of an app on the control machine: the same bytes for the same content.

Inside a git work tree it packs what git tracks and what it does not ignore; elsewhere every file. Caches, virtual
environments and files named `.env*` never get in. The archive is a cache and no state of a host, so the task never
reports a change.

Arguments: `source`, the folder; `whole`, whether every file in it belongs to the release, also what a .gitignore around
it leaves out; `additions`, a folder that is laid over it; `lock`, with the file that had to be `resolved` and where to
`keep` it beside the inventory; `cache_dir`, the folder of the archives, of which the newest stay. Returns `digest`,
the archive's SHA-256 as 64 hexadecimal digits, which is also its name; `path`, in check mode that which it would have;
`files`, their number; `bytes`, its size.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.plugins.action import ActionBase

# Ansible looks for a project's own module_utils only when it packs a module, never on the control machine.
_UTILS = str(Path(__file__).resolve().parents[1] / "module_utils")
if _UTILS not in ansible.module_utils.__path__:
    ansible.module_utils.__path__.append(_UTILS)

from ansible.module_utils.forge.source_archive import build, location, pack  # noqa: E402
from ansible.module_utils.forge.source_files import SourceError  # noqa: E402


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action behind tasks that pack something."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Pack, or in check mode only compute the digest."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "source": {"type": "path", "required": True},
                "cache_dir": {"type": "path", "required": True},
                "whole": {"type": "bool", "default": False},
                "additions": {"type": "path"},
                "lock": {"type": "dict", "options": {"resolved": {"type": "path"}, "keep": {"type": "path"}}},
            }
        )
        source, cache = Path(arguments["source"]), Path(arguments["cache_dir"])
        parts = {
            "whole": arguments["whole"],
            "additions": Path(arguments["additions"]) if arguments["additions"] else None,
        }
        if not source.is_dir():
            return result | _failure(f"expected a folder at {source}; found none; correct `source`")
        try:
            archive = pack(source, **parts) if self._task.check_mode else build(source, cache, **parts)
            # The task also runs in a check, for the plan; what is to be committed is written by a run alone.
            lock = arguments["lock"] or {}
            if lock.get("resolved") and not (task_vars or {}).get("ansible_check_mode"):
                _keep(Path(lock["resolved"]), Path(lock["keep"]))
        except SourceError as error:
            return result | _failure(str(error))
        except OSError as error:
            return result | _failure(
                f"expected to write {error.filename or cache}; found: {error.strerror}; make it writable for this user"
            )
        return result | {
            "changed": False,
            "digest": archive.digest,
            "path": str(location(cache, archive)),
            "files": archive.files,
            "bytes": archive.size,
        }


def _keep(resolved: Path, kept: Path) -> None:
    """Move what was resolved to where it is kept: who removes it there wants another."""
    if resolved == kept:
        return
    try:
        content = resolved.read_bytes()
    except FileNotFoundError:
        return  # The run of another host was faster.
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, prefix=".", delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(kept)
    resolved.unlink(missing_ok=True)


def _failure(message: str) -> dict[str, Any]:
    return {"failed": True, "msg": message}
