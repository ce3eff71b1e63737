"""What holds of every file of the repository."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ansible_collections
import pytest
import yaml
from forge import lock, secret_scan
from forge.specs import read_options, read_roles

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@cache
def files() -> dict[str, str]:
    """Return the text files under version control, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
    found = {name: ROOT / name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()}
    return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in found.items()}


def tracked() -> set[str]:
    """Return the names of the files under version control."""
    command = ["git", "ls-files", "-z"]
    return set(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0"))


def lines(pattern: str, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Return where a line matches, as `file:line`, in files with such an ending; this folder apart."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, content in files().items()
        if name.endswith(suffixes) and not name.startswith("tests/policy/")
        for number, line in enumerate(content.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_development_server() -> None:
    """Nothing that reloads code, and no debug mode, in anything that runs."""
    pattern = r"--reload\b|\breload\s*=\s*True|\bdebug\s*=\s*True|fastapi dev|FORGE_DEBUG\b.*\b(true|1)\b"
    found = lines(pattern, (".py", ".yml", ".j2", ".service", ".conf", "Makefile", ".toml", ".sh", "/run"))
    assert [line for line in found if "tests/" not in line] == []


def test_no_secret_of_known_shape() -> None:
    """Vault tokens, private keys, URLs with passwords and the like: a second pair of eyes beside detect-secrets."""
    found = {name: secret_scan.shape(content) for name, content in files().items()}
    # Passwords in the URLs of a throwaway database, and the patterns themselves.
    allowed = {"app/tests/test_settings.py"}
    assert {name: shape for name, shape in found.items() if shape and name not in allowed} == {}


def test_tasks_say_why_they_report_no_change() -> None:
    """`changed_when: false` needs its reason beside it, and no task hides its failure."""
    assert lines(r"changed_when: (false|no)\s*$", (".yml",)) == []
    assert lines(r"ignore_errors|failed_when: (false|no)\b", (".yml",)) == []


def test_lint_is_suppressed_only_with_a_reason() -> None:
    """In YAML and shell a suppression names the rule and says why."""
    assert lines(r"#\s*noqa(?!: \S+ - \S)", (".yml",)) == []
    assert lines(r"#\s*yamllint disable|^\s*skip_list|^\s*warn_list", (".yml", ".ansible-lint")) == []
    assert [line for line in lines(r"# shellcheck disable=") if not re.search(r"disable=SC\d+\s+# \S", line)] == []


def test_templates_say_that_they_are_managed() -> None:
    """An operator who opens the file on the host is told; a part that others include is not a file."""
    included = {name for content in files().values() for name in re.findall(r"{% include '(\S+)' %}", content)}
    templates = {name: content for name, content in files().items() if name.endswith(".j2")}
    assert len(templates) > 10
    assert [
        name
        for name, content in templates.items()
        if not re.match(r"{{ ansible_managed \| comment(\('\w+'\))? }}\n", content) and Path(name).name not in included
    ] == []


def test_shell_scripts_stop_at_errors_and_are_checked() -> None:
    """`set -eu`, and shellcheck gets each of them."""
    scripts = {name for name, text in files().items() if re.match(r"#!.*\b(ba|da|k|z)?sh\b", text)}
    assert len(scripts) > 5
    assert [name for name in scripts if not re.search(r"^set -eu", files()[name], re.MULTILINE)] == []
    command = ["make", "--dry-run", "--no-print-directory", "lint-shell"]
    recipe = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    (checked,) = [line.split()[1:] for line in recipe.splitlines() if line.startswith("shellcheck ")]
    assert set(checked) == scripts & tracked()


@pytest.mark.parametrize("name", [name for name in files() if re.search(r"requirements[\w-]*\.txt$", name)])
def test_locks_are_pinned_by_hash_and_tied_to_no_index(name: str) -> None:
    """Where packages come from is the machine's business."""
    pins, strange = lock.parse(files()[name])
    assert pins
    assert strange == []
    assert [pin.name for pin in pins if not pin.hashed] == []
    assert re.findall(r"^\s*(--\w*index\S*|--find-links|--trusted-host)|(\w+://)", files()[name], re.MULTILINE) == []


def collections_used() -> set[str]:
    """Return the collections whose modules, plugins or connections the project's YAML names."""
    text = "\n".join(content for name, content in files().items() if name.endswith((".yml", ".j2")))
    installed = {
        f"{folder.parent.name}.{folder.name}"
        for base in ansible_collections.__path__
        for folder in Path(base).glob("*/*")
        if (folder / "MANIFEST.json").exists()
    }
    return {name for name in installed if re.search(rf"(?<![\w./]){re.escape(name)}\.\w+", text)}


def test_collections_are_those_of_the_ansible_package() -> None:
    """Whoever installs requirements.yml on ansible-core alone gets the same; nothing used is missing."""
    wanted = {item["name"]: item["version"] for item in yaml.safe_load(files()["requirements.yml"])["collections"]}
    (base,) = [Path(path) for path in ansible_collections.__path__ if (Path(path) / "community").is_dir()]
    carried = {
        name: json.loads((base / name.replace(".", "/") / "MANIFEST.json").read_text())["collection_info"]["version"]
        for name in wanted
    }
    assert wanted == carried
    assert set(wanted) == collections_used()


def options(specs: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every option with its path, nested ones as well."""
    for name, spec in specs.items():
        yield f"{where}{name}", spec
        yield from options(spec.get("options") or {}, f"{where}{name}.")


def test_every_role_is_specified() -> None:
    """Types and descriptions of all options, whole sentences."""
    assert set(read_roles(ROLES)) == {folder.name for folder in ROLES.iterdir() if folder.is_dir()}
    everything = [*options({name: {"options": spec} for name, spec in read_roles(ROLES).items()}, "")]
    everything += options(read_options(ROLES, "app", "entry"), "apps.NAME.")
    described = [(name, spec) for name, spec in everything if "." in name]
    assert len(described) > 60
    assert [name for name, spec in described if "type" not in spec] == []
    texts = {name: spec.get("description") or "" for name, spec in described}
    assert [
        name for name, text in texts.items() if not (text if isinstance(text, str) else text[-1]).endswith(".")
    ] == []


@pytest.mark.parametrize("role", sorted(read_roles(ROLES)))
def test_defaults_are_those_of_the_specification(role: str) -> None:
    """Each variable is required, optional, or has the same default in both places; no default goes unspecified."""
    file = ROLES / role / "defaults" / "main.yml"
    defaults: dict[str, Any] = yaml.safe_load(file.read_text()) if file.exists() else {}
    specs = read_options(ROLES, role)
    assert set(defaults) <= set(specs)
    for name, spec in specs.items():
        if spec.get("required"):
            assert name not in defaults
        elif "default" in spec:
            assert defaults[name] == spec["default"], name
        else:
            # A default that Ansible has to work out.
            assert "{{" in str(defaults.get(name, "{{")), name


def test_the_page_of_variables_is_up_to_date() -> None:
    """What `make docs` would write is what is there."""
    command = [str(ROOT / "scripts" / "document"), "--print"]
    page = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert (ROOT / "docs" / "variables.md").read_text() == page


def scenarios() -> list[Path]:
    """Return the folders of the scenarios under version control."""
    return [ROOT / Path(name).parent for name in tracked() if re.fullmatch(r"molecule/[\w-]+/molecule\.yml", name)]


def test_every_scenario_has_tests() -> None:
    """Of its own, or borrowed by a symlink."""
    found = {folder.name: [*folder.glob("tests/**/test_*.py")] for folder in scenarios()}
    assert {"default", "alternative"} <= set(found)
    assert [name for name, tests in found.items() if not any("def test_" in test.read_text() for test in tests)] == []


def targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z][\w-]*):", files()["Makefile"], re.MULTILINE))


def commands(workflow: Path) -> Iterator[str]:
    """Yield the commands of a workflow's steps."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_pinned_and_frugal(workflow: Path) -> None:
    """No moving versions, least rights, an end to every job, and no older run beside a newer one."""
    document = yaml.safe_load(workflow.read_text())
    assert document["permissions"] == {"contents": "read"}
    assert document["concurrency"]["cancel-in-progress"]
    for job in document["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w./-]+@(v\d+|[0-9a-f]{40})", step.get("uses", "a/b@v1")), step
            assert step.get("with", {}).get("persist-credentials", False) is False
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


def test_workflows_and_hooks_call_what_people_call() -> None:
    """Make targets and nothing else, so that a red check is red at home as well."""
    assert WORKFLOWS
    called = [command for workflow in WORKFLOWS for command in commands(workflow)]
    hooks = yaml.safe_load(files()[".pre-commit-config.yaml"])["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    called += [hook["entry"] for hook in hooks[0]["hooks"]]
    assert [command for command in called if not re.fullmatch(r"make [\w-]+( [A-Z]+=\${{ [\w.]+ }})*", command)] == []
    assert {command.split()[1] for command in called} <= targets()
    assert {"make check", "make secrets"} <= set(called)


def test_the_matrix_has_every_scenario_on_both_distributions() -> None:
    """A new scenario is in CI from its first day."""
    (matrix,) = [
        job["strategy"]["matrix"]
        for workflow in WORKFLOWS
        for job in yaml.safe_load(workflow.read_text())["jobs"].values()
        if "strategy" in job
    ]
    assert set(matrix["scenario"]) == {folder.name for folder in scenarios()}
    assert set(matrix["distribution"]) == {"bookworm", "trixie"}


def headings(text: str) -> set[str]:
    """Return the anchors of a page, as its host makes them of headings."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", [name for name in files() if name.endswith(".md")])
def test_links_in_pages_lead_somewhere(name: str) -> None:
    """Files and headings; addresses elsewhere are left alone."""
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", files()[name]):
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        if "://" not in target and (not page.exists() or (anchor and anchor not in headings(page.read_text()))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("name", [name for name in files() if name.endswith((".md", ".yml", ".py", "ci/run"))])
def test_make_targets_that_are_named_exist(name: str) -> None:
    """In pages, messages and workflows."""
    named = re.findall(r"`(?:sudo )?make ([a-z][\w-]*)|^\s*make ([a-z][\w-]*)", files()[name], re.MULTILINE)
    assert {first or second for first, second in named} <= targets()


def test_the_apps_waits_for_its_database_end_before_its_request() -> None:
    """Those of the example app, which goes by the default of `request_timeout`."""
    code = (ROOT / "app/src/inbox/database.py").read_text()
    waits = {name: int(seconds) for name, seconds in re.findall(r"^(\w+)_TIMEOUT_S = (\d+)$", code, re.MULTILINE)}
    request = read_options(ROLES, "app", "entry")["request_timeout"]["default"]
    assert waits["POOL"] + waits["CONNECT"] + waits["COMMAND"] < request
    assert waits["STATEMENT"] < waits["COMMAND"]
