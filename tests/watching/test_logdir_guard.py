"""The guard of a program's own logdir: every way by which Python code could change a file there is refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

# In a process of its own: an audit hook stays for the life of the process.
PROGRAM = """
    import os, shutil, sqlite3, sys, threading
    from stepguard.watching.logdir_guard import LogdirGuard

    root, own = sys.argv[1], sys.argv[1] + "/run"
    told = []
    guard = LogdirGuard(lambda kind, path: told.append((kind, path.removeprefix(root))))
    here = os.open(own, os.O_RDONLY)
    guard.number(own)

    def refused(call, *arguments, **options):
        try:
            call(*arguments, **options)
        except PermissionError as error:
            return "is a trial of `stepguard prove`" in str(error)
        return False

    changes = {
        "open": (open, f"{own}/best", "w"),
        "through a link": (open, f"{root}/link/best", "w"),
        "a link to the file": (open, f"{root}/best-link", "a"),
        "replace into it": (os.replace, f"{root}/other", f"{own}/best"),
        "rename out of it": (os.rename, f"{own}/best", f"{root}/mine"),
        "rename it": (os.rename, own, f"{root}/older"),
        "rename what it is in": (os.rename, root, f"{root}-older"),
        "link into it": (os.link, f"{root}/other", f"{own}/linked"),
        "symlink into it": (os.symlink, "/etc/hosts", f"{own}/linked"),
        "remove": (os.remove, f"{own}/best"),
        "touch": (os.utime, f"{own}/best"),
        "truncate": (os.truncate, f"{own}/best", 0),
        "rmtree": (shutil.rmtree, own),
        "rmtree of what it is in": (shutil.rmtree, root),
        "a database": (sqlite3.connect, f"{own}/best"),
        "a directory in it": (os.mkdir, f"{own}/more"),
    }
    for name, (call, *arguments) in changes.items():
        assert refused(call, *arguments), name
    for name, call, arguments, options in (
        ("remove by a directory", os.remove, ("best",), {"dir_fd": here}),
        ("rmdir by a directory", os.rmdir, ("run",), {"dir_fd": os.open(root, os.O_RDONLY)}),
        ("rename by a directory", os.replace, (f"{root}/other", "best"), {"dst_dir_fd": here}),
    ):
        assert refused(call, *arguments, **options), name

    assert open(f"{own}/best").read() == "the best"
    assert ("read", "/run/best") in told
    os.replace(f"{root}/other", f"{root}/another")
    os.symlink(f"{own}/best", f"{root}/outside")
    os.makedirs(own, exist_ok=True)
    shutil.rmtree(f"{own}/is-not-there", ignore_errors=True)

    # One thread tells, which opens files: another that writes meanwhile is heard.
    begun, goes_on, found = threading.Event(), threading.Event(), []
    guard._tell = lambda kind, path: (begun.set(), goes_on.wait(60))
    telling = threading.Thread(target=lambda: open(f"{own}/best", "rb").close())
    guard._told.clear()
    telling.start()
    begun.wait(60)
    guard._tell = lambda kind, path: None
    found.append(refused(open, f"{own}/best", "w"))
    goes_on.set()
    telling.join()
    assert found == [True]
    print("all refused")
"""


def test_whatever_would_change_a_file_there_is_refused_and_reading_is_told(tmp_path: Path) -> None:
    own = tmp_path / "run"
    own.mkdir()
    (own / "best").write_text("the best")
    (tmp_path / "other").write_text("of the trial")
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "best-link").symlink_to(own / "best")

    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.stdout == "all refused\n", ended.stderr
    assert {one.name: one.read_text() for one in own.iterdir()} == {"best": "the best"}
