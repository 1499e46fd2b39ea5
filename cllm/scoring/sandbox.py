"""Running generated programs and their tests in a sandbox, each in a process of its own.

There are two kinds of protection. :func:`protection` picks the first that works here:

``namespaces`` (Linux; as root, or with user namespaces permitted). The program has its own file system: Python and the system
    libraries read-only, a small empty folder, a few devices, and none of your files. It sees no network and no processes but
    its own. When it ends, the kernel kills everything it has started, ``setsid`` and double forks included. Total memory and
    the size of the folder are bounded.
``limits`` (Linux; as root, or on a kernel with Landlock). The program runs as a user that owns nothing (if started as root) and
    may write only to its own temporary folder (if the kernel has Landlock). Leftover processes are found by descent, by that
    user, or by a marker in the environment, and killed. World-readable files are readable. TCP is blocked from Landlock 4 on.
    Signals to your other processes are blocked by the other user or from Landlock 6 on. Where that user cannot enter Python's
    folder, as in root's home, programs run in a copy that has the standard library only.

Both drop your environment variables, start a new session without standard input, limit CPU time, wall time, address space,
file size, processes, open files and output, and drop all capabilities for good (``no_new_privs``). Where neither works (other
systems than Linux; old kernels without root), programs are refused.

A program passes only if its tests run to the end: only then does a random token, which waits in a pipe, reach the supervising
process. ``sys.exit(0)``, ``os._exit(0)``, a printed "passed", modified built-ins, or results that claim to equal everything do
not pass. This does *not* stop a program written against this very file: it runs in the same process as its tests, so it can
find the pipe and forge the token. System calls are not filtered either, so a hole in the kernel is a hole here. That is enough
for models' answers; for a stranger's exploits use a virtual machine.
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
PATIENCE = 5  # factor on the wall time for busy machines
GRACE = 60  # seconds to start and end the processes around the program
MARKER = "CLLM_SANDBOX"  # environment variable that marks the program's processes
_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_FIRST_UID, _UIDS = 61184, 4000  # user ids that systemd reserves for transient users, who own no files
_USERS = itertools.count(secrets.randbelow(_UIDS))  # a different user for each program of this process
_MODULES = ("copy", "json", "math", "random", "re")  # modules that tests rely on
_PARSER = threading.Lock()  # ast.parse of CPython 3.11 is not safe in several threads at once


@dataclass(frozen=True)
class Limits:
    """The resources that one program may use."""

    cpu_seconds: int = 5  # per process; all processes together may use twice as much
    wall_seconds: float = 20.0  # in total, not counting time spent waiting for a processor on a busy machine
    memory_bytes: int = 1 << 30  # address space per process; all processes together may use twice as much
    file_bytes: int = 16 << 20  # per file
    folder_bytes: int = 64 << 20  # all files together
    output_bytes: int = 8 << 20  # standard output and error together
    processes: int = 32  # processes and threads


@dataclass(frozen=True)
class Program:
    """A program and the test that it must pass, which sees the program's names.

    ``entry_points`` are the functions under test. Only they may shadow built-in functions.
    """

    source: str
    test: str
    entry_points: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of one program.

    ``reason`` is passed, failed (an assertion), error (another exception), exited, crashed (a signal), time, memory, output,
    tampering, or sandbox (the sandbox's own processes died, which a program can cause under ``limits``).
    """

    reason: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.reason == PASSED


@dataclass(frozen=True)
class Protection:
    """The protection in force: ``kind`` is NAMESPACES or LIMITS, ``text`` describes it for people."""

    kind: str
    text: str


def run(program: Program, limits: Limits | None = None, *, kind: str | None = None) -> Verdict:
    """Run one program and its test. Returns soon after ``wall_seconds``, whatever the program does.

    ``kind`` forces a kind of protection, for tests. Raises UsageError if this system supports none.
    """
    kind = kind or protection().kind
    try:
        return _run(program, limits or Limits(), kind)
    except SandboxFailure as error:
        return Verdict("sandbox", str(error))


def run_all(programs: Sequence[Program], limits: Limits | None = None, workers: int | None = None) -> list[Verdict]:
    """The verdicts on many programs, in order; ``workers`` of them run in parallel (default: one per usable core)."""
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
    """The number of usable processor cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def protection() -> Protection:
    """The strongest protection that works here, tested once. Raises UsageError if there is none."""
    failures = []
    for kind in (NAMESPACES, LIMITS):
        found = protection_of(kind)
        if isinstance(found, Protection):
            logger.info("sandbox for generated programs: %s", found.text)
            return found
        failures.append(f"{kind}: {found}")
    raise UsageError(
        f"generated programs cannot be run safely here: that needs Linux with user namespaces, root, or Landlock ({'; '.join(failures)})"
    )


def protection_of(kind: str) -> Protection | str:
    """Protection of this kind, or the reason why it is unavailable."""
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
    """The kernel's Landlock version; 0 without Landlock."""
    import ctypes

    return max(0, ctypes.CDLL(None, use_errno=True).syscall(444, None, ctypes.c_size_t(0), 1))


def _python_is_public() -> bool:
    """Whether every user may enter the folder of the standard library."""
    folder = Path(os.__file__).resolve().parent
    return all(path.stat().st_mode & stat.S_IXOTH for path in (folder, *folder.parents))


@functools.lru_cache(maxsize=1)
def _public_python() -> tempfile.TemporaryDirectory[str]:
    """A folder with a Python that every user may run: hard links to this Python's files, or copies where links fail."""
    folder = tempfile.TemporaryDirectory(prefix="cllm-python-")
    library, target = Path(os.__file__).resolve().parent, Path(folder.name, sys.platlibdir)
    unneeded = shutil.ignore_patterns("site-packages", "test", "idlelib", "ensurepip", "config-*")
    shutil.copytree(library, target / library.name, ignore=unneeded, copy_function=_link)
    for shared in library.parent.glob("libpython*.so*"):
        _link(os.path.realpath(shared), target / shared.name)
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
class _Workspace:
    """Where a program runs: its folder, user and marker."""

    kind: str
    marker: str = field(default_factory=lambda: secrets.token_hex(8))
    uid: int | None = field(default_factory=lambda: _FIRST_UID + next(_USERS) % _UIDS if os.geteuid() == 0 else None)
    folder: str = "/box"  # in the program's own file system

    def __enter__(self) -> "_Workspace":
        if self.kind == LIMITS:
            self.folder = tempfile.mkdtemp(prefix="cllm-program-")
            if self.uid is not None:
                os.chown(self.folder, self.uid, self.uid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.kind == LIMITS:
            self.sweep()
            shutil.rmtree(self.folder, onerror=_unlock)

    def sweep(self) -> None:
        """Kill leftover processes of the program until none is found; stop them first, so that they cannot start others."""
        for _ in range(100):
            found = [pid for pid in _processes() if self.owns(pid)]
            if not found:
                return
            for sign in (signal.SIGSTOP, signal.SIGKILL):
                for pid in found:
                    _kill(pid, sign)
            time.sleep(0.01)
        logger.warning("processes of a generated program are still running: %s", found)

    def owns(self, pid: int) -> bool:
        """Whether a running process belongs to the program."""
        try:
            facts = Path(f"/proc/{pid}")
            if "\nState:\tZ" in (status := (facts / "status").read_text()):
                return False
            if self.uid is not None:
                return f"\nUid:\t{self.uid}\t" in status
            return f"{MARKER}={self.marker}".encode() in (facts / "environ").read_bytes()
        except OSError:
            return False


def _run(program: Program, limits: Limits, kind: str) -> Verdict:
    with _Workspace(kind) as workspace:
        job = {
            "program": _encodable(program.source),
            "test": program.test,
            "entry_points": program.entry_points,
            "modules": sorted({*_MODULES, *_imports(program.test)}),
            "limits": asdict(limits) | {"processes": limits.processes + _running(workspace)},
            "namespaces": kind == NAMESPACES,
            "visible": _visible() if kind == NAMESPACES else [],
            "folder": workspace.folder,
            "uid": workspace.uid,
        }
        answer, complaint = _launch(json.dumps(job).encode(), workspace, PATIENCE * limits.wall_seconds + GRACE)
    try:
        return Verdict(**json.loads(answer))
    except (ValueError, TypeError):
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise SandboxFailure(lines[-1] if lines else "the supervising process was killed") from None


def _launch(job: bytes, workspace: _Workspace, seconds: float) -> tuple[bytes, bytes]:
    """The supervising process's standard output and error."""
    python, variables = _python(workspace)
    environment = {
        **variables,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        MARKER: workspace.marker,
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
            os.killpg(process.pid, signal.SIGKILL)  # launcher and supervisor; the pid namespace dies with them
            workspace.sweep() if workspace.kind == LIMITS else None
            process.communicate()


def _python(workspace: _Workspace) -> tuple[str, dict[str, str]]:
    """A Python that the program's user may run, and the environment variables that it needs."""
    if workspace.kind == NAMESPACES or workspace.uid is None or _python_is_public():
        return sys.executable, {}
    home = Path(_public_python().name)
    return str(home / "python"), {"LD_LIBRARY_PATH": str(home / sys.platlibdir)}


def _visible() -> list[str]:
    """The paths that a program may see: this Python, system libraries, harmless devices."""
    pythons = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    return sorted({*_SYSTEM, *_DEVICES, *pythons, *map(os.path.realpath, pythons)})


def _imports(test: str) -> set[str]:
    """The standard library modules that a test imports."""
    try:
        with _PARSER:
            nodes = list(ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name for name in names if name.partition(".")[0] in sys.stdlib_module_names}


def _running(workspace: _Workspace) -> int:
    """The number of threads that the program's user already has, since the system's limit counts them."""
    if workspace.uid is not None:
        return 0
    if workspace.kind == NAMESPACES:
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


def _unlock(function: Any, path: str, _: object) -> None:
    """Retry removing a path after restoring the permissions that a program has taken away."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
    except OSError:
        logger.warning("cannot remove %s", path)
