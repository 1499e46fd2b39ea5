"""The inside of the sandbox: isolates itself, then runs one program and its tests. See :mod:`cllm.scoring.sandbox`.

This file runs as a script, once per program, and is never imported. It reads a job (JSON) from standard input and writes a
report (JSON) to standard output. There are up to three processes:

    launcher     creates the namespaces and waits
    supervisor   the first process of the new pid namespace (without namespaces, the launcher itself): sets up the file system
                 and monitors time, memory and output; when it ends, the kernel kills everything in its namespace
    program      drops its privileges, runs the program and then the tests

It uses only the standard library, and relies only on modules imported before the program starts.
"""

import builtins
import collections
import ctypes
import functools
import importlib
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import threading
import time
import types
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 24, 36, 38
WRITE_RIGHTS = 0x1FF2  # Landlock 1: write, remove, make; not execute, read
OLD_ROOT = "/old"
PROGRAM, TEST = "<program>", "<test>"  # file names of the compiled sources
TICK = 0.05  # seconds between checks for the program's end
LOOK = 0.1  # seconds between checks of its resource usage
LONGEST_MESSAGE = 2000  # bytes that the program's process may report about its end

Job = dict[str, Any]


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    if job["namespaces"]:
        unshare(job["uid"] is None)
        first = os.fork()
        if first:
            os.waitpid(first, 0)
            return
        new_root(job["visible"], job["folder"], job["limits"]["folder_bytes"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a pid namespace ignores signals by default
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    report = supervise(job)
    if not job["namespaces"]:
        kill_descendants()
    sys.stdout.write(json.dumps(report))


def check(result: int, action: str) -> None:
    """Raise OSError if a system call failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{action}: {os.strerror(code)}")


# ---- isolation ----


def unshare(with_user: bool) -> None:
    """Enter new namespaces: mounts, host name, processes, network (without interfaces up), IPC, and without root also users."""
    uid, gid = os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    check(LIBC.unshare(flags | (CLONE_NEWUSER if with_user else 0)), "unshare")
    if with_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    text = [None if part is None else part.encode() for part in (source, target, kind, data)]
    check(LIBC.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]), f"mount {target}")


def new_root(visible: list[str], folder: str, folder_bytes: int) -> None:
    """Change to a root with the ``visible`` paths, all read-only, /proc, and a small writable folder."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    os.mkdir("/tmp" + OLD_ROOT)
    check(LIBC.pivot_root(b"/tmp", ("/tmp" + OLD_ROOT).encode()), "pivot_root")
    os.chdir("/")
    for path in sorted(visible):
        expose(path)
    for path in ("/proc", "/dev", folder):
        os.makedirs(path, exist_ok=True)
    for path in ("/tmp", "/dev/shm"):
        if not os.path.lexists(path):
            os.symlink(folder, path)
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        pass  # some containers forbid it; programs can do without
    check(LIBC.umount2(OLD_ROOT.encode(), MNT_DETACH), "umount")
    os.rmdir(OLD_ROOT)
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    check(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size), "mount_setattr")
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0777,size={folder_bytes},nr_inodes=4096")


def expose(path: str) -> None:
    """Make ``path`` of the old root visible in the new one, if it exists."""
    if os.path.lexists(path):
        return  # inside a folder that is already visible
    try:
        mode = os.lstat(OLD_ROOT + path).st_mode
    except FileNotFoundError:
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(OLD_ROOT + path), path)
        return
    if stat.S_ISDIR(mode):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    mount(OLD_ROOT + path, path, None, MS_BIND | MS_REC)


def restrict(limits: dict[str, int]) -> None:
    """Set the resource limits. Soft limits equal hard limits, so they cannot be raised."""
    cpu = limits["cpu_seconds"]
    values = {
        "CPU": cpu,
        "AS": limits["memory_bytes"],
        "FSIZE": limits["file_bytes"],
        "NPROC": limits["processes"],
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def drop_privileges(uid: int | None) -> None:
    """Become ``uid`` (None: keep the user) and drop all capabilities for good."""
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(LIBC.capset(header, nothing), "capset")
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def landlock(folder: str) -> None:
    """Allow writing only in ``folder`` and to /dev/null; block TCP and signals to others where the kernel supports it."""
    abi = LIBC.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    rights = WRITE_RIGHTS | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    parts = [rights] + ([3] if abi >= 4 else []) + ([3] if abi >= 6 else [])
    attributes = struct.pack(f"{len(parts)}Q", *parts)
    ruleset = LIBC.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    check(ruleset, "landlock")
    for path, allowed in ((folder, rights), ("/dev/null", 2)):
        handle = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed, handle)
        check(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), "landlock rule")
        os.close(handle)
    check(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock restrict")
    os.close(ruleset)


# ---- supervisor ----


def supervise(job: Job) -> dict[str, Any]:
    """Run the program in a child and report how it ended. Returns whatever the child does."""
    limits = job["limits"]
    output_r, output_w = os.pipe()  # what the program prints
    result_r, result_w = os.pipe()  # the token, or the reason for its absence
    token_r, token_w = os.pipe()  # holds the token until the tests have finished
    started = looked = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            become_program(job, output_w, result_w, token_r)
        finally:
            os._exit(1)
    for handle in (output_w, result_w, token_r):
        os.close(handle)
    token = os.urandom(16).hex().encode()  # created after the fork, so the program's process has it only in the pipe
    os.write(token_w, token)
    ended = b""
    printed = 0
    why = ""
    poller = select.poll()
    for handle in (output_r, result_r):
        os.set_blocking(handle, False)
        poller.register(handle, select.POLLIN)
    poller.register(exit_r := os.pidfd_open(child), select.POLLIN)
    while True:
        events = poller.poll(TICK * 1000)
        for handle, _ in events:
            if handle == exit_r:
                continue
            data = read_available(handle)
            if not data:
                poller.unregister(handle)
            elif handle == output_r:
                printed += len(data)
            elif len(ended) < LONGEST_MESSAGE:
                ended += data
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if printed > limits["output_bytes"]:
            why = "output"
        elif now > looked + LOOK:
            looked = now
            why = exceeded_limit(child, now - started, limits)
        if why:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
    ended += read_available(result_r)
    code = os.waitstatus_to_exitcode(status)
    passed = ended == token and code == 0 and not why
    cpu = usage.ru_utime + usage.ru_stime
    reason, detail = ("passed", "") if passed else failure(why, code, ended, cpu, limits)
    return {"reason": reason, "detail": detail}


def failure(why: str, code: int, ended: bytes, cpu: float, limits: dict[str, int]) -> tuple[str, str]:
    """(reason, detail) for a program that did not pass."""
    if why:
        return why, f"over the limit of {why}"
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= limits["cpu_seconds"] - 0.5):
        return "time", f"over {limits['cpu_seconds']} s of CPU time"
    if code < 0:
        return "crashed", f"ended by signal {-code}"
    try:
        message = json.loads(ended)
        return str(message["reason"]), str(message["detail"])
    except (ValueError, KeyError, TypeError):
        return "exited", f"ended with status {code} before its tests"


def kill_descendants() -> None:
    """Kill what the program has left running. Orphans of any session have become our own children."""
    me = os.getpid()
    for _ in range(200):
        found = descendants(me)
        for sign in (signal.SIGSTOP, signal.SIGKILL):  # stop all first, so that none starts others
            for pid in found:
                try:
                    os.kill(pid, sign)
                except OSError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # no children left
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """All descendants of ``pid``."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                children.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
        except OSError:
            pass  # it has just ended
    found = list(children.get(pid, []))
    for child in found:
        found.extend(children.get(child, []))
    return found


def read_available(handle: int) -> bytes:
    """What can be read without blocking; b"" if nothing is available or at the end."""
    try:
        return os.read(handle, 1 << 16)
    except BlockingIOError:
        return b""


def exceeded_limit(child: int, elapsed: float, limits: dict[str, Any]) -> str:
    """The overall limit that the program exceeds, or "".

    Time spent waiting for a processor on a busy machine does not count, up to four times the limit.
    """
    memory, cpu = usage_of([child, *descendants(child)] if os.getpid() != 1 else namespace_pids())
    if memory > 2 * limits["memory_bytes"]:
        return "memory"
    if cpu > 2 * limits["cpu_seconds"]:
        return "time"
    allowed = limits["wall_seconds"]
    return "time" if elapsed > allowed and elapsed - min(run_queue_wait(child), 4 * allowed) > allowed else ""


def namespace_pids() -> list[int]:
    """All processes of this pid namespace except the supervisor, which is its first."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    except OSError:
        return []


def usage_of(pids: list[int]) -> tuple[int, float]:
    """(bytes of resident memory, seconds of CPU time) of these processes together."""
    pages = ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                facts = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it has just ended
        pages += int(facts[21])
        ticks += int(facts[11]) + int(facts[12])
    return pages * resource.getpagesize(), ticks / os.sysconf("SC_CLK_TCK")


def run_queue_wait(pid: int) -> float:
    """Seconds that a process has waited for a processor while ready to run; 0 where the kernel does not report it."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


# ---- program ----


def become_program(job: Job, output_fd: int, result_fd: int, token_fd: int) -> None:
    """Turn this process into the program's: close everything else, drop privileges, and run it."""
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    kept = sorted((result_fd, token_fd))
    os.closerange(3, kept[0])
    os.closerange(kept[0] + 1, kept[1])
    os.closerange(kept[1] + 1, 256)
    os.chdir(job["folder"])
    os.environ.update(HOME=job["folder"], TMPDIR=job["folder"])
    for name in job["modules"]:
        try:
            importlib.import_module(name)
        except Exception:
            pass  # the test will report it
    restrict(job["limits"])
    drop_privileges(job["uid"])
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else the marker in its environment could not be read
    if not job["namespaces"]:
        landlock(job["folder"])
    run(job, result_fd, token_fd)


class Tampering(Exception):
    """The program has modified something that its tests rely on."""


class IntegrityGuard:
    """Detects changes to built-in names and to modules that the test imports, and undoes them."""

    def __init__(self, modules: list[str]) -> None:
        spaces = [vars(sys.modules[name]) for name in ("builtins", *modules) if name in sys.modules]
        self._spaces = [(space, dict(space)) for space in spaces]
        self._kind = Tampering

    def check(self) -> None:
        """Raise Tampering on a change. Uses no built-in name, since any of them may be fake."""
        changed = None
        for space, before in self._spaces:
            for name, value in before.items():
                if name not in space or space[name] is not value:
                    changed = name
        self.restore()
        if changed is not None:
            raise self._kind("changed " + changed)

    def restore(self) -> None:
        for space, before in self._spaces:
            space.update(before)


def run(job: Job, result_fd: int, token_fd: int) -> NoReturn:
    """Run program and test. If both run to the end and leave no threads, copy the token from ``token_fd`` to ``result_fd``."""
    me, getpid, read, write, leave = os.getpid(), os.getpid, os.read, os.write, os._exit
    join_threads, count_threads, sleep = threading._shutdown, sys.modules["_thread"]._count, time.sleep  # type: ignore[attr-defined]
    execute, compiled, explained = exec, compile, explain
    guard = IntegrityGuard(job["modules"])
    module = types.ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = module
    try:
        execute(compiled(job["program"], PROGRAM, "exec", 0, True), module.__dict__)
        guard.check()
        names = names_for_test(module.__dict__, job["entry_points"], guard)
        execute(compiled(job["test"], TEST, "exec", 0, True), names)
        join_threads()
        if count_threads():
            sleep(0.2)
        if count_threads():
            raise RuntimeError("threads that do not end")
        guard.check()
    except BaseException as error:
        guard.restore()
        write(result_fd, explained(error, job["test"]))
        leave(1)
    if getpid() == me:  # a fork of the program must not pass for it
        write(result_fd, read(token_fd, 64))
        leave(0)
    leave(1)


def names_for_test(space: dict[str, Any], entry_points: list[str], guard: IntegrityGuard) -> dict[str, Any]:
    """The program's names plus the real built-ins. Only entry points may shadow built-ins."""
    real = vars(builtins)
    names = {name: checked(value, guard, name in entry_points) for name, value in space.items() if name not in real or name in entry_points}
    return names | {"__builtins__": real, "__name__": "test"}


def checked(value: Any, guard: IntegrityGuard, entry_point: bool) -> Any:
    """The program's function wrapped for the tests: a call raises if it modifies built-ins or returns a forged object.

    Classes and type hints are not wrapped unless they are under test.
    """
    named_type = isinstance(value, type) or type(value).__module__ == "typing"
    if not callable(value) or (named_type and not entry_point):
        return value
    is_forged = has_forged_comparisons

    @functools.wraps(value, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        result = value(*args, **kwargs)
        guard.check()
        if is_forged(result):
            raise Tampering("returned an object that overrides comparisons")
        return result

    return call


COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__sub__", "__rsub__", "__abs__", "__len__")
BUILT_IN = (types.WrapperDescriptorType, types.MethodDescriptorType, type(None))
LIBRARY = ("/", "<frozen ")  # prefixes of the standard library's file names; the program's is PROGRAM
WRAPPERS = collections.ChainMap | collections.UserDict | collections.UserList  # these compare their attributes


def has_forged_comparisons(value: Any) -> bool:
    """Whether a result, or something in it, has comparisons written by the program, so that it might equal everything."""
    stack, visited = [value], 0
    while stack and visited < 100_000:
        item = stack.pop()
        visited += 1
        kind = type(item)
        if kind in (int, str, float, bool, type(None)):
            continue
        for name in COMPARISONS:
            method = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
            if isinstance(method, BUILT_IN):
                continue
            if not isinstance(method, types.FunctionType) or not method.__code__.co_filename.startswith(LIBRARY):
                return True
        if isinstance(item, dict):
            stack.extend(dict.keys(item))
            stack.extend(dict.values(item))
        elif isinstance(item, list | tuple | set | frozenset):
            stack.extend(item)
        elif isinstance(item, WRAPPERS):
            stack.extend(vars(item).values())
    return False


def explain(error: BaseException, test: str) -> bytes:
    """Why there is no token, as JSON short enough for the pipe."""
    reasons = ((AssertionError, "failed"), (MemoryError, "memory"), (SystemExit, "exited"), (Tampering, "tampering"))
    reason = next((name for kind, name in reasons if isinstance(error, kind)), "error")
    try:
        detail = f"{type(error).__name__}: {error}"[:300]
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == TEST:
                line = trace.tb_lineno
            trace = trace.tb_next
        if line:
            detail += f" in the test's line {line}: {test.splitlines()[line - 1].strip()[:200]}"
    except BaseException:
        detail = "an exception that cannot be shown"
    return json.dumps({"reason": reason, "detail": detail}).encode()


if __name__ == "__main__":
    main()
