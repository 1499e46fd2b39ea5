"""Running generated programs and their tests without harm: one process of its own for each program.

What protects, from the strongest to the weakest; :func:`protection` finds the first that works here:

``namespaces`` (Linux; root, or user namespaces permitted). The program sees a file system of its own: Python and the
    system libraries read-only, a small empty folder, a few devices; none of your files, not even to read. It sees no
    process but its own and no network. When it ends, or is ended, the kernel kills whatever it has started, ``setsid`` and
    double forks included. Total memory is bounded, and so is the size of the folder.
``limits`` (Linux; root, or a kernel with Landlock). The program runs as a user that owns nothing (root) and may write
    only in its own temporary folder (Landlock). What it leaves running is found by descent, by that user, or by a
    mark in the environment, and killed. Files that everybody may read can be read; the network is closed for TCP from
    Landlock 4 on, otherwise open; signals to your other processes are held off by the other user or by Landlock 6,
    otherwise they are not. Where that user cannot enter Python's folder, as in root's home, programs run in a copy with the
    standard library alone.

Always: an environment without your variables, a session of its own, no standard input, limits on CPU time, wall time, address
space, file size, number of processes, open files and output; no capabilities and no way to get any (``no_new_privs``).
Where neither kind works (other systems than Linux, old kernels without root), programs are refused.

A program passes only when the tests have run to their end: a random token, which waits in a pipe meanwhile, is then handed to
the supervising process. ``sys.exit(0)``, ``os._exit(0)``, a printed "passed", changed built-ins, or results that claim to
equal everything do not pass. What this does *not* stop: a program that was written against this very file can, running
in the same process as its tests, look for that pipe and forge the token. There is no filter on system calls either:
a hole in the kernel is a hole here. For models' answers that is enough; for a stranger's exploits use a virtual machine.
"""

import ast
import functools
import itertools
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cllm.errors import UsageError
from cllm.files import StrPath

logger = logging.getLogger(__name__)

NAMESPACES, LIMITS = "namespaces", "limits"
PASSED = "passed"
PATIENCE = 5  # times the wall time on a busy machine
GRACE = 60  # seconds for starting and ending the processes around the program
MARK = "CLLM_SANDBOX"
_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_FIRST_UID, _UIDS = 61184, 4000  # user ids that systemd keeps for throw-away users; nobody's files belong to them
_USERS = itertools.count(secrets.randbelow(_UIDS))  # so that no two programs of this process run as the same user
_MODULES = ("copy", "json", "math", "random", "re")  # what tests stand on
_PARSER = threading.Lock()  # ast.parse of CPython 3.11 is not safe in several threads at once


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 5  # of each process; all together may use twice as much
    wall_seconds: float = 20.0  # of the whole; waiting for a processor on a busy machine is not counted
    memory_bytes: int = 1 << 30  # address space of each process; all processes together may use twice as much
    file_bytes: int = 16 << 20  # one file
    folder_bytes: int = 64 << 20  # all files
    output_bytes: int = 8 << 20  # standard output and error together
    processes: int = 32  # threads count


@dataclass(frozen=True)
class Program:
    """A program and the test that it must pass. The test sees the program's names.

    ``entry_points`` are the functions under test; they may be called like a built-in function, other names may not.
    """

    source: str
    test: str
    entry_points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """``reason``: passed, failed (an assertion), error (another exception), exited, crashed (a signal), time, memory,
    output, tampering, or sandbox (the sandbox's own processes died, which a program can bring about under ``limits``).
    """

    reason: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.reason == PASSED


@dataclass(frozen=True)
class Protection:
    """What is in force here. ``kind`` is NAMESPACES or LIMITS, ``text`` says it to people."""

    kind: str
    text: str


def run(program: Program, limits: Limits | None = None, *, kind: str | None = None) -> Verdict:
    """Run one program and its test. Returns within ``wall_seconds`` plus a little, whatever the program does.

    ``kind`` forces a protection, for tests. Raises UsageError when there is none on this system.
    """
    kind = kind or protection().kind
    try:
        return _run(program, limits or Limits(), kind)
    except SandboxFailure as error:
        return Verdict("sandbox", str(error))


def run_all(programs: Sequence[Program], limits: Limits | None = None, workers: int | None = None) -> list[Verdict]:
    """The verdicts of many programs, in order; ``workers`` (default: one for each usable core) run side by side."""
    if not programs:
        return []
    protection()
    with ThreadPoolExecutor(workers or cores()) as pool:
        try:
            return list(pool.map(lambda program: run(program, limits), programs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def protection() -> Protection:
    """The strongest protection that works here, tried out once. Raises UsageError when there is none."""
    failures = []
    for kind in (NAMESPACES, LIMITS):
        found = protection_of(kind)
        if isinstance(found, Protection):
            logger.info("sandbox for generated programs: %s", found.text)
            return found
        failures.append(f"{kind}: {found}")
    raise UsageError(
        f"generated programs cannot be run safely here: Linux with user namespaces, root, or Landlock is needed ({'; '.join(failures)})"
    )


def protection_of(kind: str) -> Protection | str:
    """Protection of this kind, or why there is none."""
    if not sys.platform.startswith("linux"):
        return "not Linux"
    root, landlock = os.geteuid() == 0, _landlock()
    if kind == LIMITS and not root and not landlock:
        return "neither root nor Landlock"
    trial = Program("import dataclasses, decimal, heapq, statistics", "import json\nassert json.loads('1') == 1")
    try:
        verdict = _run(trial, Limits(), kind)
    except (OSError, SandboxFailure) as error:
        return str(error)
    if not verdict.passed:
        return f"a harmless program fails: {verdict.detail or verdict.reason}"
    if kind == NAMESPACES:
        return Protection(kind, "namespaces (own files, no network, no other processes, all children killed) and limits")
    files = "another user" if root else f"Landlock {landlock} (writes only in its folder)"
    network = "no TCP" if landlock >= 4 else "network open"
    return Protection(kind, f"limits, {files}, {network}; no namespaces, so files can be read")


def _landlock() -> int:
    """The kernel's Landlock version, 0 without it."""
    import ctypes

    return max(0, ctypes.CDLL(None, use_errno=True).syscall(444, None, ctypes.c_size_t(0), 1))


def _python_is_public() -> bool:
    """Whether every user may enter the folder of the standard library."""
    folder = Path(os.__file__).resolve().parent
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


@functools.lru_cache(maxsize=1)
def _public_python() -> tempfile.TemporaryDirectory[str]:
    """A folder with a Python that every user may run: hard links to this one's files, copies where there can be none."""
    folder = tempfile.TemporaryDirectory(prefix="cllm-python-")
    library, place = Path(os.__file__).resolve().parent, Path(folder.name, sys.platlibdir)
    unneeded = shutil.ignore_patterns("site-packages", "test", "idlelib", "ensurepip", "config-*")
    shutil.copytree(library, place / library.name, ignore=unneeded, copy_function=_link)
    for shared in library.parent.glob("libpython*.so*"):
        _link(os.path.realpath(shared), place / shared.name)
    _link(os.path.realpath(sys.executable), Path(folder.name, "python"))
    os.chmod(folder.name, 0o755)
    return folder


def _link(source: str, target: StrPath) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)


class SandboxFailure(Exception):
    """The processes around the program failed."""


@dataclass
class _Place:
    """Where a program runs: its folder, user and mark."""

    kind: str
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    uid: int | None = field(default_factory=lambda: _FIRST_UID + next(_USERS) % _UIDS if os.geteuid() == 0 else None)
    folder: str = "/box"  # in the program's own file system

    def __enter__(self) -> "_Place":
        if self.kind == LIMITS:
            self.folder = tempfile.mkdtemp(prefix="cllm-program-")
            if self.uid is not None:
                os.chown(self.folder, self.uid, self.uid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.kind == LIMITS:
            self.sweep()
            shutil.rmtree(self.folder, onerror=_open_up)

    def sweep(self) -> None:
        """Kill what the program has left running: stop all first, so that none can start more, until none is found."""
        for _ in range(100):
            found = [pid for pid in _processes() if self.owns(pid)]
            if not found:
                return
            for sign in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    _kill(pid, sign)
            time.sleep(0.01)
        logger.warning("processes of a generated program are still there: %s", found)

    def owns(self, pid: int) -> bool:
        try:
            facts = Path(f"/proc/{pid}")
            if "\nState:\tZ" in (status := (facts / "status").read_text()):
                return False
            if self.uid is not None:
                return f"\nUid:\t{self.uid}\t" in status
            return f"{MARK}={self.mark}".encode() in (facts / "environ").read_bytes()
        except OSError:
            return False


def _run(program: Program, limits: Limits, kind: str) -> Verdict:
    with _Place(kind) as place:
        job = {
            "program": _encodable(program.source),
            "test": program.test,
            "entry_points": program.entry_points,
            "modules": sorted({*_MODULES, *_imports(program.test)}),
            "limits": asdict(limits) | {"processes": limits.processes + _running(place)},
            "namespaces": kind == NAMESPACES,
            "visible": _visible() if kind == NAMESPACES else [],
            "folder": place.folder,
            "uid": place.uid,
        }
        answer, complaint = _launch(json.dumps(job).encode(), place, PATIENCE * limits.wall_seconds + GRACE)
    try:
        return Verdict(**json.loads(answer))
    except (ValueError, TypeError):
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise SandboxFailure(lines[-1] if lines else "the supervising process was killed") from None


def _launch(job: bytes, place: _Place, seconds: float) -> tuple[bytes, bytes]:
    """The supervising process's standard output and error."""
    python, found_with = _python(place)
    environment = {
        **found_with,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        MARK: place.mark,
    }
    process = subprocess.Popen(
        [python, "-P", "-s", "-B", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
    try:
        return process.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        return b"", b"the supervising process hung"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # launcher and supervisor; with it goes its pid namespace
            place.sweep() if place.kind == LIMITS else None
            process.communicate()


def _python(place: _Place) -> tuple[str, dict[str, str]]:
    """A Python that the program's user may run, and the variables that it needs."""
    if place.kind == NAMESPACES or place.uid is None or _python_is_public():
        return sys.executable, {}
    home = Path(_public_python().name)
    return str(home / "python"), {"LD_LIBRARY_PATH": str(home / sys.platlibdir)}


def _visible() -> list[str]:
    """What a program may see of the file system: this Python, the system's libraries, harmless devices."""
    pythons = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    return sorted({*_SYSTEM, *_DEVICES, *pythons, *map(os.path.realpath, pythons)})


def _imports(test: str) -> set[str]:
    """Modules of the standard library that a test imports."""
    try:
        with _PARSER:
            nodes = list(ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name for name in names if name.partition(".")[0] in sys.stdlib_module_names}


def _running(place: _Place) -> int:
    """How many threads the program's user has already, which its limit counts too."""
    if place.uid is not None:
        return 0
    if place.kind == NAMESPACES:
        return 3  # since Linux 5.14 each user namespace has its own count: launcher and supervisor
    uid, count = f"\nUid:\t{os.getuid()}\t", 0
    for pid in _processes():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        if uid in status:
            count += int(status.partition("\nThreads:\t")[2].partition("\n")[0])
    return count


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _kill(pid: int, sign: int) -> None:
    try:
        os.kill(pid, sign)
    except OSError:
        pass


def _encodable(source: str) -> str:
    return source.encode("utf-8", "backslashreplace").decode()


def _open_up(function: Any, path: str, _: object) -> None:
    """Make a folder that a program has locked removable."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
    except OSError:
        logger.warning("cannot remove %s", path)
