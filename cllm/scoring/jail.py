"""The inside of the sandbox: builds the walls, then runs one program and its tests. See :mod:`cllm.scoring.sandbox`.

This file is started as a script, once for each program, and never imported. It reads a job (JSON) from its standard
input and writes a report (JSON) to its standard output. Up to three processes take part:

    launcher     makes the namespaces and waits
    supervisor   first process of the new pid namespace (without namespaces it is the launcher): sets up the file
                 system, watches time, memory and output; when it ends the kernel kills everything in its namespace
    program      gives up its rights, runs the program and then the tests

Only the standard library is used, and only what has been imported before the program starts is relied on.
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
TICK = 0.05  # seconds between two looks at the program's end
LOOK = 0.1  # and at what it uses
LONGEST_MESSAGE = 2000  # bytes that the program's process may say about its end

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
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a pid namespace is deaf to default signals
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    report = supervise(job)
    if not job["namespaces"]:
        kill_descendants()
    sys.stdout.write(json.dumps(report))


def check(result: int, doing: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")


# ---- walls ----


def unshare(with_user: bool) -> None:
    """Enter new namespaces: mounts, processes, network (without any interface up), IPC; without root also users."""
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
    """Change to a root that has the ``visible`` folders and devices, all read-only, /proc, and a small writable folder."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=1m")
    os.mkdir("/tmp" + OLD_ROOT)
    check(LIBC.pivot_root(b"/tmp", ("/tmp" + OLD_ROOT).encode()), "pivot_root")
    os.chdir("/")
    for path in sorted(visible):
        show(path)
    for path in ("/proc", "/dev", folder):
        os.makedirs(path, exist_ok=True)
    for path in ("/tmp", "/dev/shm"):
        if not os.path.lexists(path):
            os.symlink(folder, path)
    try:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:
        pass  # some containers forbid it; programs do without
    check(LIBC.umount2(OLD_ROOT.encode(), MNT_DETACH), "umount")
    os.rmdir(OLD_ROOT)
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    check(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, size), "mount_setattr")
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=0777,size={folder_bytes},nr_inodes=4096")


def show(path: str) -> None:
    """Make ``path`` of the old root visible in the new one; what is not there is passed over."""
    if os.path.lexists(path):
        return  # inside a folder that is visible already
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
    """Set the resource limits. Hard and soft are equal, so that they cannot be raised."""
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


def drop_rights(uid: int | None) -> None:
    """Become ``uid`` (None: stay), without any capability, and never get any again."""
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
    """Allow writing in ``folder`` and to /dev/null alone; no TCP and no signals to others where the kernel can do that."""
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
    """Run the program in a child and report how it ended. Whatever the child says or does, this returns."""
    limits = job["limits"]
    said_r, said_w = os.pipe()  # what the program prints
    end_r, end_w = os.pipe()  # the token, or why there is none
    ticket_r, ticket_w = os.pipe()  # holds the token until the tests have ended
    started = looked = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            become_program(job, said_w, end_w, ticket_r)
        finally:
            os._exit(1)
    for handle in (said_w, end_w, ticket_r):
        os.close(handle)
    token = os.urandom(16).hex().encode()  # made after the fork: the program's process has it nowhere but in the pipe
    os.write(ticket_w, token)
    ended = b""
    printed = 0
    why = ""
    poller = select.poll()
    for handle in (said_r, end_r):
        os.set_blocking(handle, False)
        poller.register(handle, select.POLLIN)
    poller.register(exit_r := os.pidfd_open(child), select.POLLIN)
    while True:
        events = poller.poll(TICK * 1000)
        for handle, _ in events:
            if handle == exit_r:
                continue
            data = take(handle)
            if not data:
                poller.unregister(handle)
            elif handle == said_r:
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
            why = excess(child, now - started, limits)
        if why:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
    ended += take(end_r)
    code = os.waitstatus_to_exitcode(status)
    passed = ended == token and code == 0 and not why
    cpu = usage.ru_utime + usage.ru_stime
    reason, detail = ("passed", "") if passed else account(why, code, ended, cpu, limits)
    return {"reason": reason, "detail": detail}


def account(why: str, code: int, ended: bytes, cpu: float, limits: dict[str, int]) -> tuple[str, str]:
    """(reason, detail) of a program that did not pass."""
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
        return "exited", f"ended with status {code} before the tests had"


def kill_descendants() -> None:
    """Kill all that the program has left; orphans have become our own children, whatever session they are in."""
    me = os.getpid()
    for _ in range(200):
        found = descendants(me)
        for sign in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none makes new ones meanwhile
            for pid in found:
                try:
                    os.kill(pid, sign)
                except OSError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return  # no child is left
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    below: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                below.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
        except OSError:
            pass  # it has just ended
    found = list(below.get(pid, []))
    for child in found:
        found.extend(below.get(child, []))
    return found


def take(handle: int) -> bytes:
    """What can be read now; nothing at the end or where nothing is there."""
    try:
        return os.read(handle, 1 << 16)
    except BlockingIOError:
        return b""


def excess(child: int, elapsed: float, limits: dict[str, Any]) -> str:
    """Which limit on the whole, if any, the program is over.

    Time that a busy machine made it wait for a processor is not the program's, up to four times the limit.
    """
    memory, cpu = used([child, *descendants(child)] if os.getpid() != 1 else everything())
    if memory > 2 * limits["memory_bytes"]:
        return "memory"
    if cpu > 2 * limits["cpu_seconds"]:
        return "time"
    allowed = limits["wall_seconds"]
    return "time" if elapsed > allowed and elapsed - min(waited(child), 4 * allowed) > allowed else ""


def everything() -> list[int]:
    """All processes of this pid namespace but its first, the supervisor."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    except OSError:
        return []


def used(pids: list[int]) -> tuple[int, float]:
    """(bytes of memory, seconds of CPU) that these processes use or have used."""
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


def waited(pid: int) -> float:
    """Seconds that a process was ready to run but had no processor; 0 where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


# ---- program ----


def become_program(job: Job, said: int, end: int, ticket: int) -> None:
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    kept = sorted((end, ticket))
    os.closerange(3, kept[0])
    os.closerange(kept[0] + 1, kept[1])
    os.closerange(kept[1] + 1, 256)
    os.chdir(job["folder"])
    os.environ.update(HOME=job["folder"], TMPDIR=job["folder"])
    for name in job["modules"]:
        try:
            importlib.import_module(name)
        except Exception:
            pass  # the test will say so
    restrict(job["limits"])
    drop_rights(job["uid"])
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else the mark in its environment could not be read
    if not job["namespaces"]:
        landlock(job["folder"])
    run(job, end, ticket)


class Tampering(Exception):
    """The program has changed what its tests stand on."""


class Watch:
    """Notices when built-in names or modules that the test imports have been changed, and sets them right again."""

    def __init__(self, modules: list[str]) -> None:
        spaces = [vars(sys.modules[name]) for name in ("builtins", *modules) if name in sys.modules]
        self._spaces = [(space, dict(space)) for space in spaces]
        self._kind = Tampering

    def check(self) -> None:
        """Raise Tampering if so. Uses no built-in name: any of them may be a fake."""
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


def run(job: Job, end: int, ticket: int) -> NoReturn:
    """Run program and test. The token goes from ``ticket`` to ``end`` if both have run to their ends, with no thread left."""
    me, getpid, read, write, leave = os.getpid(), os.getpid, os.read, os.write, os._exit
    join_threads, count_threads, sleep = threading._shutdown, sys.modules["_thread"]._count, time.sleep  # type: ignore[attr-defined]
    execute, compiled, explained = exec, compile, explain
    watch = Watch(job["modules"])
    module = types.ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = module
    try:
        execute(compiled(job["program"], PROGRAM, "exec", 0, True), module.__dict__)
        watch.check()
        names = seen_by_tests(module.__dict__, job["entry_points"], watch)
        execute(compiled(job["test"], TEST, "exec", 0, True), names)
        join_threads()
        if count_threads():
            sleep(0.2)
        if count_threads():
            raise RuntimeError("threads that do not end")
        watch.check()
    except BaseException as error:
        watch.restore()
        write(end, explained(error, job["test"]))
        leave(1)
    if getpid() == me:  # a fork of the program is not the program
        write(end, read(ticket, 64))
        leave(0)
    leave(1)


def seen_by_tests(space: dict[str, Any], entry_points: list[str], watch: Watch) -> dict[str, Any]:
    """The program's names, without those that would hide a built-in one unless it is asked for, and real built-ins."""
    real = vars(builtins)
    names = {name: guarded(value, watch, name in entry_points) for name, value in space.items() if name not in real or name in entry_points}
    return names | {"__builtins__": real, "__name__": "test"}


def guarded(value: Any, watch: Watch, entry_point: bool) -> Any:
    """A function of the program as the tests see it: a call that changes built-ins, or returns a fake, raises.

    Classes and type hints stay what they are, unless they are what is tested.
    """
    named_type = isinstance(value, type) or type(value).__module__ == "typing"
    if not callable(value) or (named_type and not entry_point):
        return value
    is_forged = forged

    @functools.wraps(value, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        result = value(*args, **kwargs)
        watch.check()
        if is_forged(result):
            raise Tampering("returned an object with comparisons of its own")
        return result

    return call


COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__sub__", "__rsub__", "__abs__", "__len__")
BUILT_IN = (types.WrapperDescriptorType, types.MethodDescriptorType, type(None))
LIBRARY = ("/", "<frozen ")  # how the file names of the standard library start; the program's own is PROGRAM
WRAPPERS = collections.ChainMap | collections.UserDict | collections.UserList  # compare what is in their attributes


def forged(value: Any) -> bool:
    """Whether a result, or something in it, brings comparisons that the program wrote: it might equal everything."""
    stack, looked_at = [value], 0
    while stack and looked_at < 100_000:
        item = stack.pop()
        looked_at += 1
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
    """Why there is no token, as JSON that is short enough for the pipe."""
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
