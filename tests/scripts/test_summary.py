"""How scripts/test.py counts, and that it fails when anything in it does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with logs of its own; the standard library has a `test` already."""
    spec = importlib.util.spec_from_file_location("forge_test_runner", ROOT / "scripts" / "test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(sys, "argv", ["test.py"])
    return module


@pytest.mark.parametrize(
    ("output", "counted"),
    [
        ("===== 12 passed in 3.05s =====\n", (12, 0)),
        ("12 passed in 61.05s (0:01:01)\n", (12, 0)),
        ("= 2 failed, 31 passed, 4 warnings in 4.05s =\nnoise\n= 1 passed, 1 error in 0.1s =\n", (32, 3)),
        ("= 1 failed, 2 errors in 4.05s =\n", (0, 3)),
        ("it said: 3 passed in 2 minutes\nno tests ran in 0.01s\n", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_counts(runner: ModuleType, output: str, counted: tuple[int, int]) -> None:
    """Every pytest run in an output, and nothing else that looks like one."""
    assert runner.counted(output) == counted


def test_what_pytest_really_prints(runner: ModuleType, tmp_path: Path) -> None:
    """Of the version that is installed, with colours and without."""
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\ndef test_c(nothing): pass\n")
    for colour in ("yes", "no"):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--color={colour}", str(tmp_path)]
        output = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False).stdout
        assert runner.counted(runner.COLOUR.sub("", output)) == (1, 2)


@pytest.mark.parametrize(
    ("scripts", "status", "summary"),
    [
        (["echo 3 passed in 1s", "true"], 0, "5 passed, 0 failed"),
        (["echo '1 failed, 2 passed in 1s'; false", "echo 3 passed in 1s"], 1, "6 passed, 2 failed"),
        # A part may fail with no test in it, and the others run all the same.
        (["false", "echo 3 passed in 1s"], 1, "4 passed, 1 failed"),
        # A test that failed counts although its command hid it.
        (["echo 1 failed in 1s"], 1, "1 passed, 1 failed"),
    ],
)
def test_verdict(
    runner: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    scripts: list[str],
    status: int,
    summary: str,
) -> None:
    """The last line sums up, and the exit status says whether all of it passed."""
    parts = [runner.Part(f"part {number}", ("sh", "-c", script)) for number, script in enumerate(scripts)]
    monkeypatch.setattr(runner, "parts", lambda **_: parts)
    assert runner.main() == status
    assert capfd.readouterr().out.splitlines()[-1] == summary


def test_parts(runner: ModuleType) -> None:
    """The checks first, `default` on both distributions, every other scenario at least once."""
    scenarios = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")}
    names = [part.name for part in runner.parts(everywhere=False)]
    assert names[:3] == ["check", "default bookworm", "default trixie"]
    assert {name.split()[0] for name in names[1:]} == scenarios
    assert len(runner.parts(everywhere=True)) == 1 + 2 * len(scenarios)
    assert {part.options for part in runner.parts(everywhere=True)} == {""}
    assert {*runner.ALONE_IN_FULL} < scenarios


def test_exhaustive_tests_are_left_out(runner: ModuleType, tmp_path: Path) -> None:
    """Of the scenarios, by pytest itself, unless all of it runs everywhere."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = exhaustive: x\n")
    marked = "import pytest\n@pytest.mark.exhaustive\ndef test_long(): pass\ndef test_short(): pass\n"
    (tmp_path / "test_it.py").write_text(marked)
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path))
    runner.LOGS.mkdir()
    for everywhere, passed in ((False, 1), (True, 2)):
        options = runner.parts(everywhere=everywhere)[-1].options
        # The tests that passed, and the part.
        assert runner.run(runner.Part("part", command, options=options)) == (passed + 1, 0, ())


def test_failures_stand_at_the_very_end(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of all parts, above the sum, once all have run."""
    scripts = ["echo 'FAILED tests/test_it.py::test_a - assert 0'; echo '1 failed in 1s'; false", "exit 3", "seq 100"]
    parts = [runner.Part(f"part-{number}", ("sh", "-c", script)) for number, script in enumerate(scripts)]
    monkeypatch.setattr(runner, "parts", lambda **_: parts)
    monkeypatch.setattr(runner, "LANES", 1)
    assert runner.main() == 1
    assert capfd.readouterr().out.splitlines()[-3:] == [
        "part-0: FAILED tests/test_it.py::test_a - assert 0",
        f"part-1: exit status 3, see {runner.LOGS / 'part-1.log'}",
        "1 passed, 3 failed",
    ]


def test_a_failed_task_stands_at_the_end(runner: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    """With its heading and reason, as Ansible itself prints them; and nothing of those that passed."""
    runner.LOGS.mkdir()
    playbook = runner.LOGS / "playbook.yml"
    tasks = [
        {"name": "Pass", "ansible.builtin.debug": {"msg": "fatal: not this"}},
        {"name": "Break", "ansible.builtin.fail": {"msg": "for this reason"}},
        {"name": "Not reached", "ansible.builtin.debug": {}},
    ]
    play = [{"name": "Play", "hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}]
    playbook.write_text(json.dumps(play))
    outcome = runner.run(
        runner.Part("part", (sys.executable, "-m", "ansible", "playbook", "--inventory", "localhost,", str(playbook)))
    )
    assert (outcome.passed, outcome.failed) == (0, 1)
    task, part = outcome.failures
    assert task.startswith("part: TASK [Break] ")
    assert "for this reason" in task
    assert part.startswith("part: exit status 2, see ")
    assert "RECAP" not in task
    assert "    TASK [Break] " in capfd.readouterr().out


def test_failures_stand_last(runner: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    """Above the verdict of their part, however much was printed after them."""
    script = "echo 'FAILED tests/test_it.py::test_a - assert 0'; seq 100; false"
    runner.LOGS.mkdir()
    runner.run(runner.Part("part", ("sh", "-c", script)))
    assert capfd.readouterr().out.splitlines()[-2].strip() == "FAILED tests/test_it.py::test_a - assert 0"


def test_side_by_side(runner: ModuleType, tmp_path: Path) -> None:
    """Each of two lanes waits for what the other does, none runs a scenario that runs; what has to be alone is."""
    meet = "touch {0}; until test -e {1}; do sleep 0.01; done"
    script = {
        "check": meet.format("a", "b"),
        "default bookworm": f"{meet.format('b', 'a')}; {meet.format('c', 'd')}; sleep 0.3; touch bookworm",
        "default trixie": "test -e bookworm; touch default",
        "release trixie": "test -e default && test -e alternative",
        "alternative trixie": f"{meet.format('d', 'c')}; touch alternative",
    }
    shell = ("timeout", "20", "sh", "-euc")
    every = [runner.Part(name, (*shell, f"cd {tmp_path}; {script[name]}")) for name in script]
    runner.LOGS.mkdir()
    assert runner.run_all(every) == [(1, 0, ())] * 5
