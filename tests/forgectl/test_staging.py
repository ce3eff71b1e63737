"""staging.py: making, checking and pruning releases."""

import errno
import io
import os
import pwd
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from conftest import describe, no_room, staged
from forgectl import config, release, report, staging, venv
from forgectl.errors import Refused
from forgectl.layout import Layout, replace_symlink, walk

PARTS_OF_A_VENV = {"bin", "lib", ".complete", "pyvenv.cfg", "lock.txt"}
GROUP = pwd.getpwuid(os.getuid()).pw_gid


def archive(path: Path, members: dict[str, str | bytes], links: dict[str, str] | None = None) -> Path:
    # Ansible uploads a plain one, a person may have compressed it.
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE
            member.linkname = target
            tar.addfile(member)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return archive(
        tmp_path / "source.tar",
        {"requirements.txt": "x==1\n", "src/inbox/main.py": "app = 1\n", "run.sh": "#!/bin/sh\n"},
        {"src/link.py": "inbox/main.py"},
    )


def app(layout: Layout) -> config.App:
    return config.load(layout.description)


def stage(layout: Layout, path: Path, digest: str = "d" * 64, source_digest: str = "s" * 64) -> staging.Record:
    return restage(layout, path, None, digest, source_digest)


def restage(
    layout: Layout,
    path: Path | None,
    donor: staging.Record | None,
    digest: str = "e" * 64,
    source_digest: str = "s" * 64,
) -> staging.Record:
    """Stage an archive, or the source of another release."""
    return staging.stage(
        layout, app(layout), digest=digest, source_digest=source_digest, archive=path, donor=donor, group=GROUP
    )


def test_a_staged_release_is_whole_and_read_only(layout: Layout, source: Path) -> None:
    record = stage(layout, source)
    folder = layout.releases / record.id
    assert record.id.endswith("-" + "d" * 12)
    assert (folder / "settings.toml").read_bytes() == layout.description.read_bytes()
    assert (folder / "slot.conf").read_bytes() == (layout.inputs / "slot.conf").read_bytes()
    assert (folder / "source/src/link.py").read_text() == "app = 1\n"
    assert (folder / "venv").readlink().name == venv.name(b"x==1\n") == record.venv
    # Whoever imports it, root too, finds bytecode and writes none.
    assert list((folder / "source/src/inbox/__pycache__").glob("main.*.pyc"))
    assert list((folder / "__pycache__").glob("forge_worker.*.pyc"))
    for path in folder.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o227 == 0, path  # nobody writes, others do not even read
            assert path.stat().st_gid == GROUP
    assert (folder / "source/run.sh").stat().st_mode & 0o110 == 0o110
    assert [each.id for each in staging.records(layout)] == [record.id]
    assert not list(layout.releases.glob(".*"))


def test_a_record_says_where_its_source_comes_from(layout: Layout, tmp_path: Path) -> None:
    """As the control machine wrote it down; what it wrote is no file of the app's in a report."""
    old, new = (
        archive(
            tmp_path / f"{commit}.tar",
            {"requirements.txt": "x==1\n", ".forge/source.json": f'{{"kind": "git", "commit": "{commit}"}}'},
        )
        for commit in ("aa", "bb")
    )
    first = stage(layout, old)
    second = stage(layout, new, "e" * 64)
    assert (first.source, second.source) == ({"kind": "git", "commit": "aa"}, {"kind": "git", "commit": "bb"})
    assert [each.source for each in staging.records(layout)] == [first.source, second.source]
    before, after = (report.Candidate.of(layout, each) for each in (first, second))
    assert report.differences(before, after) == ["source commit: aa -> bb"]
    assert report.differences(before, before) == ["no difference"]


def test_a_source_that_says_nonsense_of_itself_is_refused(layout: Layout, tmp_path: Path) -> None:
    path = archive(tmp_path / "odd.tar", {"requirements.txt": "x==1\n", ".forge/source.json": '{"kind": []}'})
    with pytest.raises(Refused, match=r"expected names and texts in source\.json; found: .*; pack the source again"):
        stage(layout, path)


def test_everybody_may_read_the_static_folders_of_a_release_and_nothing_else(layout: Layout, tmp_path: Path) -> None:
    layout.description.write_text(f'static = ["dist/assets"]\n{describe()}')
    assets = dict.fromkeys(("app.1a.js", "deep/b.css", ".env", ".git/config", "tool.py", "tool.pyc"), "x")
    members: dict[str, str | bytes] = {"requirements.txt": "x==1\n", "main.py": "x", "dist/other.js": "x"}
    members |= {f"dist/assets/{name}": content for name, content in assets.items()}
    path = archive(tmp_path / "static.tar", members, {"dist/assets/link.js": "../../main.py"})
    folder = layout.releases / stage(layout, path).id
    modes = {str(each.relative_to(folder)): each.stat().st_mode for each in folder.rglob("*") if not each.is_symlink()}
    readable = {name for name, mode in modes.items() if mode & 0o004}
    assert readable == {f"source/dist/assets{name}" for name in ("", "/app.1a.js", "/deep", "/deep/b.css")}
    # On the way there, and nowhere else.
    assert {name for name, mode in modes.items() if mode & 0o007 == 0o001} == {"source", "source/dist"}
    assert folder.stat().st_mode & 0o777 == 0o551
    assert not any(mode & 0o222 for mode in modes.values())


def modes(folder: Path) -> dict[Path, tuple[int, int]]:
    """Mode and group of everything below a folder."""
    return {each: (each.lstat().st_mode, each.lstat().st_gid) for each in walk(folder)}


def test_wrong_permissions_are_put_right(layout: Layout, tmp_path: Path) -> None:
    """As they were staged, of the environment as well; what is right is left alone, and so it is said."""
    layout.description.write_text(f'static = ["dist"]\n{describe()}')
    members: dict[str, str | bytes] = {"requirements.txt": "x==1\n", "run.sh": "x", "dist/app.js": "x", "a/b.py": "x"}
    record = stage(layout, archive(tmp_path / "source.tar", members))
    folder, environment = layout.releases / record.id, layout.venvs / record.venv
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").touch(0o755)
    venv.seal(environment, GROUP)
    (environment / venv.COMPLETE).touch(0o444)
    before = modes(folder) | modes(environment / "bin")

    def put_right(*, dry_run: bool = False) -> bool:
        return staging.put_right(layout, app(layout), record, GROUP, dry_run=dry_run)

    assert not put_right()
    for path, mode in ((folder / "source/a", 0o700), (folder / "settings.toml", 0o660), (environment / "bin", 0o500)):
        path.chmod(mode)
        assert put_right(dry_run=True)
        assert modes(folder) | modes(environment / "bin") != before
        assert put_right()
        assert modes(folder) | modes(environment / "bin") == before


def test_a_static_folder_that_is_not_there_is_refused(layout: Layout, source: Path) -> None:
    layout.description.write_text(f'static = ["dist"]\n{describe()}')
    with pytest.raises(Refused, match="expected the static folder dist in the source; found none"):
        stage(layout, source)
    assert list(layout.releases.iterdir()) == []


def test_a_release_is_on_the_disk_before_it_has_its_name(
    layout: Layout, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file and folder of it: after a power cut a name stands for the whole release."""
    flushed, fsync = set(), os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        if not list(layout.releases.glob("[0-9]*")):
            flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", record)
    release = layout.releases / stage(layout, source).id
    assert {path.stat().st_ino for path in (release, *release.rglob("*")) if not path.is_symlink()} <= flushed


def test_a_disk_that_is_full_when_it_has_to_write_leaves_nothing(
    layout: Layout, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may find that out as late as when it is asked to flush."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(Refused, match="No space left on device"):
            stage(layout, source)
    assert list(layout.releases.iterdir()) == []


def no_space(_descriptor: int) -> None:
    """What fsync(2) does on such a disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_new_settings_take_the_source_of_an_older_release(layout: Layout, source: Path) -> None:
    first = stage(layout, source)
    layout.description.write_text(describe().replace("count = 2", "count = 3"))
    second = restage(layout, None, first)
    assert (layout.releases / second.id / "source/src/inbox/main.py").read_text() == "app = 1\n"
    assert "count = 3" in (layout.releases / second.id / "settings.toml").read_text()


@pytest.mark.parametrize(
    ("members", "links", "expected"),
    [
        ({"../out": "x"}, {}, "names inside the source"),
        ({"/etc/out": "x"}, {}, "names inside the source"),
        ({}, {"out": "/etc/passwd"}, "links inside the source"),
        ({}, {"a/out": "../../x"}, "links inside the source"),
        # A link leads through another, so what it leads to is not what its words say.
        ({"a/b/c/x": "x"}, {"a/b/c/up": "../../..", "out": "a/b/c/up/../../x"}, "links inside"),
        ({"src/x": "x"}, {}, "expected the lock requirements.txt"),
    ],
)
def test_an_archive_that_is_unsafe_is_refused(
    layout: Layout, tmp_path: Path, members: dict[str, str | bytes], links: dict[str, str], expected: str
) -> None:
    with pytest.raises(Refused, match=expected):
        stage(layout, archive(tmp_path / "bad.tar", members, links))
    assert not list(layout.releases.iterdir())


def test_links_that_lead_to_each_other_stay_inside(tmp_path: Path) -> None:
    """Nobody can open them, and nothing is wrong with them otherwise."""
    staging.unpack(archive(tmp_path / "links.tar", {}, {"a": "b", "b": "a", "none": "gone/x"}), tmp_path / "target")
    assert len(list((tmp_path / "target").iterdir())) == 3


def test_nothing_is_written_through_a_link(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w:gz") as tar:
        for name, target in (("a", "b"), ("a/c", None)):
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    with pytest.raises(Refused, match="names inside the source"):
        stage(layout, path)


def test_devices_and_rubbish_are_refused(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("device")
        member.type = tarfile.CHRTYPE
        tar.addfile(member)
    with pytest.raises(Refused, match="files, folders and links"):
        stage(layout, path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(Refused, match=r"expected a tar or tar\.gz archive"):
        stage(layout, path)
    assert not list(layout.releases.iterdir())


@pytest.mark.parametrize(
    ("name", "damage"), [("bad.tar", "cut"), ("bad.tar.gz", "cut"), ("bad.tar.gz", "flipped"), ("bad.tar.gz", "sum")]
)
def test_a_damaged_upload_is_refused(layout: Layout, tmp_path: Path, name: str, damage: str) -> None:
    path = archive(tmp_path / name, {"requirements.txt": "x==1\n", "noise": os.urandom(50_000)})
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    else:
        data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(Refused, match=r"expected a tar or tar\.gz archive in .*; upload it again"):
        stage(layout, path)
    assert not list(layout.releases.iterdir())


@pytest.mark.parametrize("from_donor", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing(layout: Layout, source: Path, from_donor: bool) -> None:
    donor = stage(layout, source) if from_donor else None
    before = sorted(layout.releases.iterdir())
    with no_room(8), pytest.raises(Refused, match="make room") as caught:
        restage(layout, None if donor else source, donor)
    assert str(caught.value).startswith(f"expected to write {layout.releases}/.")
    assert sorted(layout.releases.iterdir()) == before


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that is killed before its `step`-th change of the file system; false if it ended."""
    steps = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps
        writes = event == "open" and isinstance(flags := arguments[2], int) and flags & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chown"):
            steps += 1
            if steps > step:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_step_of_staging(layout: Layout, source: Path) -> None:
    """A release is whole or not there, and the next attempt succeeds."""
    step = 0
    while killed_at(step, lambda: stage(layout, source)):
        step += 1
        for record in staging.records(layout):
            folder = layout.releases / record.id
            assert (folder / "source/src/inbox/main.py").read_text() == "app = 1\n"
            assert {path.stat().st_mode & 0o227 for path in folder.rglob("*") if not path.is_symlink()} == {0}
        layout.releases.rename(layout.root / f"after-{step}")
        layout.releases.mkdir()
    assert step > 20
    assert len(staging.records(layout)) == 1


def test_killed_at_any_step_of_pruning(layout: Layout) -> None:
    """What is half removed no longer counts as a release or as an environment."""
    step = 0
    while True:
        for number in range(4):
            make_release(layout, number)
        killed = killed_at(step, lambda: staging.prune(layout, app(layout), set()))
        left = staging.records(layout)
        assert len(left) >= 2
        for record in left:
            assert sorted(path.name for path in (layout.releases / record.id).iterdir()) == ["release.json", "source"]
        for path in layout.venvs.iterdir():
            assert not venv.is_complete(layout, path.name) or {each.name for each in path.iterdir()} == PARTS_OF_A_VENV
        if not killed:
            break
        step += 1
        for path in (*layout.releases.iterdir(), *layout.venvs.iterdir()):
            shutil.rmtree(path)
    assert step > 10
    assert len(left) == len(list(layout.venvs.iterdir())) == 2


@pytest.mark.parametrize("change", ["edited", "added", "removed", "linked"])
def test_a_release_that_was_tampered_with_is_refused(layout: Layout, source: Path, change: str) -> None:
    record = stage(layout, source)
    staging.check_intact(layout, record)
    target = layout.releases / record.id / "source/src/inbox/main.py"
    target.parent.chmod(0o750)
    if change == "edited":
        target.chmod(0o640)
        target.write_text("app = 2\n")
    elif change == "added":
        (target.parent / "more.py").touch()
    else:
        target.unlink()
        if change == "linked":
            target.symlink_to("/etc/passwd")
    with pytest.raises(Refused, match="as it was staged; found changed files"):
        staging.check_intact(layout, record)


def test_a_file_with_two_names_is_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "outside").write_text("x")
    os.link(tmp_path / "outside", tmp_path / "tree/inside")
    with pytest.raises(Exception, match="expected one link"):
        venv.seal(tmp_path / "tree", GROUP)


def test_every_input_changes_the_digest(layout: Layout) -> None:
    seen = {staging.digest_of(layout, "s" * 64), staging.digest_of(layout, "t" * 64)}
    for path in (layout.description, *(layout.inputs / name for name in staging.INPUTS)):
        path.write_text(path.read_text() + "# changed\n")
        seen.add(staging.digest_of(layout, "s" * 64))
    assert len(seen) == 6


def make_release(layout: Layout, number: int) -> str:
    """A release folder with an environment of its own."""
    name = f"20260101-00000{number}-{'a' * 12}"
    (layout.releases / name / "source").mkdir(parents=True)
    record = staging.Record(name, "d", "s", f"venv{number}", "now", "me")
    (layout.releases / name / "release.json").write_bytes(msgspec.json.encode(record))
    (layout.venvs / f"venv{number}").mkdir()
    for part in PARTS_OF_A_VENV:
        (layout.venvs / f"venv{number}" / part).touch()
    return name


def test_pruning_keeps_the_newest_what_is_needed_and_the_slots(layout: Layout) -> None:
    names = [make_release(layout, number) for number in range(7)]
    (layout.slots / "blue").symlink_to(f"../releases/{names[2]}")
    removed = staging.prune(layout, app(layout), {names[0], names[1]})
    kept = [0, 1, 2, 5, 6]  # keep_releases = 2
    assert [path.name for path in sorted(layout.releases.iterdir())] == [names[number] for number in kept]
    assert sorted(path.name for path in layout.venvs.iterdir()) == [f"venv{number}" for number in kept]
    assert removed == [names[3], names[4], "venv3", "venv4"]


def test_permissions_of_a_release_that_says_nothing_hold_no_recovery_up(layout: Layout) -> None:
    """What is under way has to be recovered, and doctor tells of the settings."""
    record = staged(layout, 1, "A")
    replace_symlink(layout.slots / "blue", f"../releases/{record.id}")
    layout.settings(record.id).chmod(0o644)
    layout.settings(record.id).write_text("name =")
    said: list[str] = []
    assert release.put_right(layout, dry_run=True, say=said.append) == []
    assert said[0].startswith(f"the permissions of {record.id} stay as they are: expected")
