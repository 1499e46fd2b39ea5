"""Stages run once each, whatever interrupts them, and anew where what they were made from has changed."""

import json
from pathlib import Path

import pytest

from cllm.errors import UsageError
from cllm.making.stages import FILE, Stage, Stages


class Killed(BaseException):
    """No handler in the code catches it."""


class Work:
    """Three stages of two files each; every write but the ``mortal`` one succeeds."""

    def __init__(self, folder: Path, mortal: int | None = None, **inputs: int) -> None:
        self.folder, self.left, self.ran = folder, mortal, []
        self.inputs = {"a": 1, "b": 2, "c": 3} | inputs

    def write(self, path: Path, text: str) -> None:
        if self.left == 0:
            raise Killed
        self.left = None if self.left is None else self.left - 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def stage(self, name: str, before: str | None, together: bool = False) -> Stage:
        def run() -> None:
            self.ran.append(name)
            text = str(self.inputs[name]) + ((self.folder / before / "2").read_text() if before else "")
            for number in (1, 2):
                if not (self.folder / name / str(number)).exists():
                    self.write(self.folder / name / str(number), text)

        return Stage(name, f"doing {name}", run, [self.folder / name], {"input": self.inputs[name]}, together)

    def run(self, rank: int = 0, stages: int = 3) -> dict[str, str]:
        all_three = [self.stage("a", None), self.stage("b", "a", together=True), self.stage("c", "b")]
        Stages(self.folder, all_three[:stages], rank).run()
        return {str(path.relative_to(self.folder)): path.read_text() for path in self.folder.glob("?/?")}


def test_a_run_that_is_killed_anywhere_ends_with_the_same_files(tmp_path: Path) -> None:
    expected = Work(tmp_path / "whole").run()
    for mortal in range(6):
        folder = tmp_path / str(mortal)
        with pytest.raises(Killed):
            Work(folder, mortal).run()
        again = Work(folder)
        assert again.run() == expected and again.ran == ["a", "b", "c"][mortal // 2 :]
        assert Work(folder).run() == expected


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    Work(tmp_path).run()
    again = Work(tmp_path)
    again.run()
    assert again.ran == []


@pytest.mark.parametrize(("changed", "anew"), [("a", "abc"), ("b", "bc"), ("c", "c")])
def test_a_changed_input_starts_its_stage_and_those_after_it_anew(tmp_path: Path, changed: str, anew: str) -> None:
    Work(tmp_path).run()
    again = Work(tmp_path, **{changed: 7})
    assert again.run() == Work(tmp_path / "new", **{changed: 7}).run() and again.ran == list(anew)


def test_a_killed_run_with_other_inputs_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Work(tmp_path, mortal=3).run()  # half of b is there
    assert Work(tmp_path, b=7).run() == Work(tmp_path / "new", b=7).run()


def test_a_killed_stage_does_not_resume_where_an_earlier_one_was_done_anew(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Work(tmp_path, mortal=5).run()  # half of c is there
    half = (tmp_path / "c" / "1").stat().st_mtime_ns
    Work(tmp_path, a=7).run(stages=2)
    expected = Work(tmp_path / "new").run()
    assert Work(tmp_path).run() == expected and (tmp_path / "c" / "1").stat().st_mtime_ns > half


def test_an_output_that_is_gone_is_made_again_and_what_came_of_it(tmp_path: Path) -> None:
    expected = Work(tmp_path).run()
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    (tmp_path / "b").rmdir()
    again = Work(tmp_path)
    assert again.run() == expected and again.ran == ["b", "c"]


def test_other_processes_run_what_is_done_together(tmp_path: Path) -> None:
    Work(tmp_path).run()
    (tmp_path / FILE).write_text("{}")
    other = Work(tmp_path)
    other.run(rank=1)
    assert other.ran == ["b"] and (tmp_path / FILE).read_text() == "{}"


def test_seconds_and_damage(tmp_path: Path) -> None:
    Work(tmp_path).run()
    assert set(Stages(tmp_path, []).seconds()) == {"a", "b", "c"}
    assert all(facts["ended"] for facts in json.loads((tmp_path / FILE).read_text()).values())
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UsageError, match=f"cannot read .*{FILE}"):
        Work(tmp_path).run()
