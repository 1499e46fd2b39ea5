"""cllm.scoring.sandbox: right programs pass, wrong ones fail, and hostile ones neither pass nor do harm nor hang."""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cllm.errors import UsageError
from cllm.scoring import sandbox
from cllm.scoring.sandbox import LIMITS, NAMESPACES, Limits, Program, Protection, protection_of, run, run_all

QUICK = Limits(cpu_seconds=1, wall_seconds=3.0, memory_bytes=256 << 20)
SOLUTION = "def double(x):\n    return 2 * x\n"
TEST = """import math
def check(candidate):
    assert abs(candidate(2) - 4) < 1e-6
    assert candidate(0) == 0
check(double)"""


@pytest.fixture(scope="module", params=[NAMESPACES, LIMITS])
def kind(request: pytest.FixtureRequest) -> str:
    found = protection_of(request.param)
    if not isinstance(found, Protection):
        pytest.skip(f"{request.param}: {found}")
    return request.param


def program(source: str, test: str = TEST) -> Program:
    return Program(source, test, ("double",))


# With a careless harness, each of these would pass, do harm or hang. Where possible, it is a right solution plus an attack.
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
    "endless loop": "while True:\n    pass\n",
    "endless sleep": "import time, signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ntime.sleep(1000)\n",
    "memory hog": "hog = []\nwhile True:\n    hog.append(bytearray(1 << 24))\n",
    "memory hog of many processes": "import os\nfor _ in range(5):\n    os.fork()\nhog = b'x' * (200 << 20)\n"
    "import time\ntime.sleep(100)\n",
    "writing outside": "open({outside!r} + '/made', 'w').write('x')\n" + SOLUTION,
    "deleting files": "import shutil\nshutil.rmtree({outside!r})\n" + SOLUTION,
    "huge file": "with open('big', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))\n",
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill({parent}, signal.SIGKILL)\n",
    "reading stdin": "x = input()\n" + SOLUTION,
    "huge output": "while True:\n    print('x' * 10000)\n",
    "sys.exit(0)": "import sys\ndef double(x):\n    sys.exit(0)\n",
    "os._exit(0)": "import os\ndef double(x):\n    os._exit(0)\n",
    "exit at once": "raise SystemExit(0)\n",
    "a fork goes on": "import os\nif os.fork():\n    os._exit(0)\n" + SOLUTION,
    "monkeypatching abs": "import builtins\nbuiltins.abs = lambda x: 0\ndef double(x):\n    return x\n",
    "monkeypatching late": "def double(x):\n    import builtins\n    builtins.abs = lambda x: 0\n    return x\n",
    "monkeypatching a right answer": "import builtins\nbuiltins.len = lambda x: 7\n" + SOLUTION,
    "own abs": "def abs(x):\n    return 0\ndef double(x):\n    return x\n",
    "own builtins": "__builtins__ = {{'abs': lambda x: 0, '__import__': __import__}}\ndef double(x):\n    return x\n",
    "equal to everything": "class All(int):\n    def __eq__(self, other): return True\n"
    "    def __sub__(self, other): return 0\ndef double(x):\n    return All()\n",
    "a class instead of the function": "class double(int):\n    def __new__(cls, x): return int.__new__(cls, 0)\n"
    "    def __eq__(self, other): return True\n    def __sub__(self, other): return 0\n",
    "a callable that claims to be a type hint": "class Hint:\n    __module__ = 'typing'\n"
    "    def __call__(self, x): return All()\nclass All(int):\n    def __eq__(self, other): return True\n"
    "    def __sub__(self, other): return 0\ndouble = Hint()\n",
    "fakes in a mapping": "import collections\nclass All(int):\n    def __eq__(self, other): return True\n"
    "def double(x):\n    return collections.ChainMap({{'n': All()}})\n",
    "fake harness": "import __main__, sys\nfor name in list(vars(__main__)):\n    pass\n"
    "sys.stdout.write('passed'); sys.stderr.write('{{\"reason\": \"passed\"}}')\nsys.exit(0)\n",
    "own check": "def check(candidate):\n    pass\ndef double(x):\n    return x\n",
    "own assertion": "import builtins\nbuiltins.AssertionError = Exception\ndef double(x):\n    return None\n",
    "threads that never end": "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()\n" + SOLUTION,
    "daemon threads that never end": "import threading\ndef spin():\n    while True: pass\n"
    "threading.Thread(target=spin, daemon=True).start()\n" + SOLUTION,
    "recursion": "def double(x):\n    return double(x + 1)\n",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef double(x):\n    return double(x + 1)\n",
    "no exception to show": "class E(Exception):\n    def __str__(self): raise self\ndef double(x):\n    raise E\n",
    "syntax": "def double(x:\n",
    "nul": "x = '\0'",
    "surrogate": "x = '\ud800'\n",
}

# How programs end that never reach a solution.
ENDS = {
    "fork bomb": {"time"},
    "memory hog": {"memory"},
    "huge file": {"error"},
    "killing the parent": {"error", "sandbox"},
    "huge output": {"output"},
    "fake harness": {"exited"},
    "fakes in a mapping": {"tampering"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_neither_passes_nor_harms_nor_hangs(name: str, kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("here")
    outside.chmod(0o755)
    source = HOSTILE[name].format(outside=str(outside), parent=os.getpid()) if "{" in HOSTILE[name] else HOSTILE[name]
    started = time.monotonic()
    verdict = run(program(source), QUICK, kind=kind)
    assert verdict.reason in ENDS[name] if name in ENDS else not verdict.passed, verdict
    assert time.monotonic() - started < 60
    assert os.listdir(outside) == ["precious"] and (outside / "precious").read_text() == "here"


def test_right_program_passes_and_wrong_fails(kind: str) -> None:
    assert run(program(SOLUTION), kind=kind).passed
    wrong = run(program("def double(x):\n    return x\n"), kind=kind)
    assert wrong.reason == "failed" and "assert abs(candidate(2) - 4)" in wrong.detail


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.setrecursionlimit(10000)\ndef deep(n):\n    return n and deep(n - 1)\ndeep(5000)\n" + SOLUTION,
        "print('x' * 100000)\n" + SOLUTION,
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\n" + SOLUTION,
        "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\npool.submit(print).result()\n" + SOLUTION,
        "import dataclasses, functools\n@dataclasses.dataclass\nclass P:\n    x: 'int'\n"
        "@functools.lru_cache\ndef double(x):\n    return 2 * P(x).x\n",
        "import tempfile, subprocess, sys\nopen('here', 'w').write('x')\ntempfile.TemporaryFile().write(b'x')\n"
        "subprocess.run([sys.executable, '-c', 'pass'], check=True)\n" + SOLUTION,
        "import os\nif not os.fork():\n    os._exit(0)\n" + SOLUTION,
        "from __future__ import annotations\nfrom typing import List\ndef double(x: Later) -> List[int]:\n    return 2 * x\n",
        "if __name__ == '__main__':\n    raise SystemExit\n" + SOLUTION,
    ],
)
def test_unusual_but_right_programs_pass(source: str, kind: str) -> None:
    verdict = run(program(source), kind=kind)
    assert verdict.passed, verdict


@pytest.mark.parametrize("made", ["ChainMap({'a': x})", "UserDict({'a': x})", "Counter(a=x)", "OrderedDict(a=x)"])
def test_mappings_of_the_library_may_be_returned(made: str, kind: str) -> None:
    source = f"import collections\ndef double(x):\n    return collections.{made}\n"
    verdict = run(program(source, "assert double(2) == {'a': 2}\nassert double(3) != {'a': 2}"), kind=kind)
    assert verdict.passed, verdict


def test_a_class_under_test_can_be_right(kind: str) -> None:
    verdict = run(program("class double:\n    def __init__(self, x): self.x = 2 * x\n", "assert double(2).x == 4"), kind=kind)
    assert verdict.passed, verdict


def test_parallel_programs_run_as_different_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    users = {sandbox._Workspace(LIMITS).uid for _ in range(4000)}
    assert len(users) == 4000 and min(u for u in users if u) >= 61184 and max(u for u in users if u) < 65184


@pytest.mark.parametrize("linked", [True, False])
def test_a_private_python_is_copied(monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    """By hard links, or by copies to another file system; the process removes the copy when it ends."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    code = """
import errno, os
from cllm.scoring import sandbox
def refuse(*_): raise OSError(errno.EXDEV, "another file system")
if not {linked}: os.link = refuse
sandbox._python_is_public = lambda: False
test = "assert 'cllm-python-' in decimal.__file__\\nrun([sys.executable, '-m', 'this'], check=True)"
program = sandbox.Program("import decimal, sys\\nfrom subprocess import run", test)
print(sandbox.run(program, kind="limits").reason, sandbox._public_python().name)
"""
    done = subprocess.run([sys.executable, "-c", code.format(linked=linked)], capture_output=True, text=True)
    reason, _, folder = done.stdout.strip().partition(" ")
    assert reason == "passed" and "cllm-python-" in folder and not os.path.exists(folder), done.stdout + done.stderr


@pytest.mark.parametrize("escape", ["os.setsid()", "os.setsid()\n    os.fork() and os._exit(0)", "os.environ.clear()"])
def test_children_die_with_the_program(escape: str, kind: str) -> None:
    length = f"987{os.getpid()}{time.monotonic_ns() % 1000}"
    source = (
        f"import os, subprocess, time\nif not os.fork():\n    {escape}\n"
        f"    subprocess.run(['sleep', '{length}'])\n    os._exit(0)\ntime.sleep(0.5)\n"
    )
    assert run(program(source + SOLUTION), kind=kind).passed
    deadline = time.monotonic() + 5
    while _is_running(length) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(length)


def _is_running(argument: str) -> bool:
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and argument.encode() in (folder / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


def test_the_environment_is_dropped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    source = "import os\nassert 'MY_SECRET' not in os.environ\nassert os.listdir('.') == []\n" + SOLUTION
    assert run(program(source), kind=kind).passed


def test_namespaces_hide_files_network_and_processes(tmp_path: Path) -> None:
    if not isinstance(protection_of(NAMESPACES), Protection):
        pytest.skip("no namespaces")
    (tmp_path / "secret").write_text("x")
    tmp_path.chmod(0o755)
    with subprocess.Popen(["sleep", "30"]) as other:
        source = (
            f"import os, socket\nassert not os.path.exists({str(tmp_path / 'secret')!r})\n"
            f"assert not os.path.exists('/etc/passwd')\n"
            "pids = [int(n) for n in os.listdir('/proc') if n.isdigit()]\nassert len(pids) <= 3, pids\n"
            "names = [n for _, n in socket.if_nameindex()]\nassert set(names) <= {'lo', 'sit0', 'tunl0'}, names\n"
            "try:\n    socket.create_connection(('127.0.0.1', 22), 1)\n    raise SystemExit\nexcept OSError:\n    pass\n"
            "try:\n    open('/usr/made', 'w')\n    raise SystemExit\nexcept OSError:\n    pass\n"
        )
        verdict = run(program(source + SOLUTION), kind=NAMESPACES)
        other.kill()
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("source", "reason", "limits"),
    [
        ("while True: pass", "time", Limits(cpu_seconds=1, wall_seconds=60)),
        ("import time\ntime.sleep(100)", "time", Limits(wall_seconds=1)),
        ("while True: print('x' * 100000)", "output", Limits(output_bytes=1 << 20)),
        ("x = bytearray(1 << 40)", "memory", Limits()),
    ],
)
def test_exceeded_limits_are_named(source: str, reason: str, limits: Limits, kind: str) -> None:
    assert run(program(source), limits, kind=kind).reason == reason


def test_verdicts_keep_the_order_of_programs() -> None:
    programs = [program(SOLUTION if number % 2 else "def double(x): return x") for number in range(6)]
    assert [verdict.passed for verdict in run_all(programs, workers=3)] == [False, True] * 3
    assert run_all([]) == []


def test_programs_are_refused_without_protection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "protection_of", lambda kind: "no")
    with pytest.raises(UsageError, match="cannot be run safely"):
        sandbox.protection.__wrapped__()


@pytest.mark.slow
def test_humaneval_canonical_solutions_pass_and_stubs_fail(shared_data: Path) -> None:
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    programs, stubs = [], problems[::4]
    for body, chosen in ((None, problems), ("    pass\n", stubs)):
        for p in chosen:
            source = p["prompt"] + (p["canonical_solution"] if body is None else body)
            programs.append(Program(source, f"{p['test']}\ncheck({p['entry_point']})", (p["entry_point"],)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    verdicts = run_all(programs, workers=2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert [p["task_id"] for p, v in zip(problems, verdicts[:164]) if not v.passed] == []
    assert [p["task_id"] for p, v in zip(stubs, verdicts[164:]) if v.passed] == []
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu < 120  # CPU time, since wall time on a busy machine means nothing
