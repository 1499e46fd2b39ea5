"""The FastChat adapter, tested with the real package if it is installed."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from types import ModuleType
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from tiny import EOS_ID, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoConfig

from cllm.cli import fastchat as command
from cllm.decoding import JacobiDecoder
from cllm.errors import UsageError
from cllm.models import write_record
from cllm.prompts import PromptTemplate
from cllm.serving import fastchat as ours

needs_fastchat = pytest.mark.skipif(find_spec("fastchat") is None, reason="fschat is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
MESSAGES = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe {kind}.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def cllm(tmp_path_factory):
    return make_cllm(tmp_path_factory.mktemp("models") / "vicuna-of-mine", prompt_template="chat")


def make_cllm(folder, **record):
    """A checkpoint with our record in config.json and a name that would mislead a match by parts of the path."""
    save_tiny_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    write_record(config, {"block_size": 5, **record})
    config.save_pretrained(folder)
    return folder


# -------------------------------------------------------------- generating


def stream(prompt, model=None, tokenizer=None, **params):
    model, tokenizer = model or tiny_model(), tokenizer or tiny_tokenizer()
    params = {"prompt": prompt, "temperature": 0, "max_new_tokens": 20, "echo": False} | params
    return list(ours.generate_stream(model, tokenizer, params, "cpu", 256))


def greedy(prompt, count=20):
    tokenizer = tiny_tokenizer()
    result = JacobiDecoder(tiny_model(), 1, eos_token_ids=[EOS_ID]).generate([tokenizer(prompt).input_ids], max_new_tokens=count)
    return tokenizer.decode(result[0].token_ids, skip_special_tokens=True), result[0]


def test_stream_grows_to_the_greedy_text():
    text, result = greedy("Hello there")
    items = stream("Hello there")
    assert items[-1]["text"] == text and len(items) > 2
    for before, after in zip(items, items[1:]):
        assert after["text"].startswith(before["text"]) and before["finish_reason"] is None
    count = len(result.token_ids)
    assert items[-1]["usage"] == {"prompt_tokens": 11, "completion_tokens": count, "total_tokens": 11 + count}
    assert items[-1]["finish_reason"] == ("stop" if result.stop == "eos" else "length")
    json.dumps(items)  # as the worker does


def test_echo_puts_the_prompt_first():
    assert stream("Hello", echo=True)[-1]["text"] == "Hello" + stream("Hello")[-1]["text"]


def test_stop_string_ends_the_text_and_is_never_shown():
    text, _ = greedy("Hello there")
    stop = text[6:8]
    items = stream("Hello there", stop=stop)
    assert items[-1]["text"] == text[: text.index(stop)] and items[-1]["finish_reason"] == "stop"
    assert not any(stop in item["text"] for item in items)
    assert stream("Hello there", stop=["\x00", "", stop])[-1] == items[-1]


def test_stop_tokens_of_the_request():
    _, result = greedy("Hello there")
    token = result.token_ids[4]
    items = stream("Hello there", stop_token_ids=[token])
    assert items[-1]["finish_reason"] == "stop"
    assert items[-1]["usage"]["completion_tokens"] == result.token_ids.index(token) + 1


def test_long_prompt_keeps_its_end():
    items = list(ours.generate_stream(tiny_model(), tiny_tokenizer(), {"prompt": "x" * 300 + "Hello", "max_new_tokens": 20}, "cpu", 64))
    assert items[-1]["usage"]["prompt_tokens"] == 64 - 20 - 1 and items[-1]["usage"]["completion_tokens"] <= 20


def test_unsupported_requests():
    with pytest.raises(ValueError, match="log-probabilities"):
        stream("x", logprobs=1)
    with pytest.raises(ValueError, match="empty"):
        stream("")
    with pytest.raises(ValueError, match="top_p must be between 0 and 1, got 1.5"):
        stream("Hello", temperature=0.7, top_p=1.5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": "hot"},
        {"temperature": float("inf")},
        {"temperature": 1.0, "top_p": [0.5]},
        {"temperature": 1.0, "top_k": 10**30},
        {"temperature": 1.0, "top_k": float("inf")},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 10**400},
        {"max_new_tokens": float("inf")},
        {"max_new_tokens": float("nan")},
        {"max_new_tokens": {}},
        {"stop_token_ids": ["x"]},
        {"stop_token_ids": {"a": 1}},
        {"stop": [1]},
        {"stop": 7},
    ],
)
def test_bad_requests_raise_only_value_errors(params):
    """On any other exception, FastChat's worker would not answer the client and would never free the request's slot."""
    with pytest.raises(ValueError):
        stream("Hello", **params)


def test_null_and_extreme_parameters():
    text = greedy("Hello")[0]
    nothing = dict.fromkeys(("top_p", "top_k", "repetition_penalty", "stop", "stop_token_ids"))
    for params in (nothing, {"stop": ["", "never"]}):
        assert stream("Hello", **params)[-1]["text"] == text
    assert stream("Hello", stop_token_ids=[10**30, -(10**30)], max_new_tokens=20)[-1]["text"] == text


def test_sampling_parameters():
    assert len({stream("Hello", temperature=1.0, top_k=-1, top_p=0.95)[-1]["text"] for _ in range(4)}) > 1
    text, _ = greedy("Hello")
    for almost in ({"temperature": 1e-6}, {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_k": 1}):
        assert stream("Hello", **almost)[-1]["text"] == text
    assert stream("Hello", repetition_penalty=1.5)[-1]["text"] != text


# ------------------------------------------------------------- conversations


def rendered(parts, messages, system=None):
    """FastChat's SeparatorStyle.NO_COLON_TWO, as documented."""
    text = parts["system_template"].format(system_message=parts["system_message"] if system is None else system)
    for n, message in enumerate(messages):
        text += parts["roles"][n % 2] + message["content"] + (parts["sep2"] if n % 2 else "")
    return text + parts["roles"][1]


@pytest.mark.parametrize("name", ["abel", "deepseek-instruct", "Q: {question}\nA: ", "tiny", "chatml"])
def test_dialogue_parts_render_the_templates_prompts(name):
    tokenizer = tiny_tokenizer()
    if name == "chatml":
        tokenizer.chat_template = CHATML
    template = PromptTemplate("chat" if name in ("tiny", "chatml") else name)
    parts = ours.dialogue_parts(template, tokenizer)
    for messages in (MESSAGES[:1], MESSAGES):
        assert rendered(parts, messages) == ours._render(template, messages, tokenizer)
    if name == "chatml":
        assert parts["system_message"] == "Be {kind}." and parts["roles"][0].endswith("<|im_start|>user\n")
        system = [{"role": "system", "content": "Be terse."}]
        assert rendered(parts, MESSAGES, "Be terse.") == ours._render(template, system + MESSAGES, tokenizer)


IN_PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_template_that_loops_over_parts():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = IN_PARTS
    parts = ours.dialogue_parts(PromptTemplate("chat"), tokenizer)
    assert rendered(parts, MESSAGES) == "<user>q1<assistant>a1<user>q2<assistant>"


def test_template_that_refuses_system_messages():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = IN_PARTS + "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}"
    assert rendered(ours.dialogue_parts(PromptTemplate("chat"), tokenizer), MESSAGES[:1]) == "<user>q1<assistant>"


def test_template_that_drops_turns_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}>"
    with pytest.raises(UsageError, match="leaves out message 1, from the user"):
        ours.dialogue_parts(PromptTemplate("chat"), tokenizer)


def test_only_cllms_match(cllm, tiny_model_dir, tmp_path):
    adapter = ours.CllmAdapter()
    assert adapter.match(str(cllm)) and adapter.match("cllm/consistency-llm-7b-sharegpt48k")
    for other in (str(tiny_model_dir), "GAIR/Abel-7B-001", "lmsys/vicuna-7b-v1.5", "consistency-llm", str(tmp_path)):
        assert not adapter.match(other)
    (tmp_path / "config.json").write_text("[]")
    assert not adapter.match(str(tmp_path))


# ------------------------------------------------------- the real package


@pytest.fixture
def fastchat(monkeypatch, tmp_path):
    """FastChat with our adapter, restored afterwards."""
    monkeypatch.chdir(tmp_path)  # the worker writes a log file
    from fastchat import utils
    from fastchat.model import model_adapter as adapters

    places = {"get_model_adapter": adapters, "get_generate_stream_function": adapters, "get_context_length": utils}
    theirs = {name: getattr(module, name) for name, module in places.items()}
    known = list(adapters.model_adapters)
    ours.register()
    changed = {name: getattr(module, name) for name, module in places.items()}
    yield adapters
    adapters.model_adapters[:] = known
    for name in places:
        ours._replace(name, changed[name], theirs[name])


@needs_fastchat
def test_registered_once_and_first(fastchat, cllm, tiny_model_dir):
    ours.register()
    assert sum(isinstance(a, ours.CllmAdapter) for a in fastchat.model_adapters) == 1
    assert isinstance(fastchat.get_model_adapter(str(cllm)), ours.CllmAdapter)
    assert not isinstance(fastchat.get_model_adapter("lmsys/vicuna-7b-v1.5"), ours.CllmAdapter)
    assert fastchat.get_generate_stream_function(tiny_model(), str(cllm)) is ours.generate_stream
    assert fastchat.get_generate_stream_function(tiny_model(), str(tiny_model_dir)) is not ours.generate_stream


@needs_fastchat
def test_conversation_of_a_chat_template(fastchat, cllm):
    conversation = fastchat.get_conversation_template(str(cllm))
    for message in MESSAGES:
        conversation.append_message(conversation.roles[message["role"] == "assistant"], message["content"])
    conversation.append_message(conversation.roles[1], None)
    tokenizer = tiny_tokenizer()
    assert tokenizer(conversation.get_prompt()).input_ids == PromptTemplate("chat").encode(MESSAGES, tokenizer)
    assert fastchat.get_conversation_template(str(cllm)).messages == []


@needs_fastchat
def test_conversation_of_vicuna_is_exact(fastchat, tmp_path):
    conversation = fastchat.get_conversation_template(str(make_cllm(tmp_path / "m", prompt_template="vicuna")))
    for message in MESSAGES:
        conversation.append_message(conversation.roles[message["role"] == "assistant"], message["content"])
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == PromptTemplate("vicuna").render(MESSAGES)


@needs_fastchat
def test_fastchats_cli_chats_with_a_cllm(fastchat, cllm, monkeypatch, capsys):
    """`cllm fastchat cli`, from the command line to the end of the conversation."""
    lines = iter(["Hi", "And then?", "!!exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    decoded = []
    iterate = JacobiDecoder.iterate
    monkeypatch.setattr(
        JacobiDecoder,
        "iterate",
        lambda self, prompts, **k: decoded.append((self.block_size, prompts[0])) or iterate(self, prompts, **k),
    )
    argv = list(sys.argv)
    command.main(["cli", "--model-path", str(cllm), "--device", "cpu", "--temperature", "0", "--max-new-tokens", "12"])
    assert sys.argv == argv
    tokenizer = tiny_tokenizer()
    (size, first), (_, second) = decoded
    assert size == 5 and first == PromptTemplate("chat").encode([{"role": "user", "content": "Hi"}], tokenizer)
    reply = greedy(tokenizer.decode(first), 12)[0].strip()
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " ".join(reply.split(" "))}]
    assert second == PromptTemplate("chat").encode([*talk, {"role": "user", "content": "And then?"}], tokenizer)
    assert reply.split()[0] in capsys.readouterr().out


@needs_fastchat
def test_fastchats_model_worker_streams_a_cllm(fastchat, cllm):
    pytest.importorskip("uvicorn")
    from fastchat.serve.model_worker import ModelWorker

    worker = ModelWorker(
        "http://127.0.0.1:1", "http://127.0.0.1:2", "w", str(cllm), ["mine"], 1, no_register=True, device="cpu",
        num_gpus=1, max_gpu_memory=None,
    )  # fmt: skip
    prompt = "[user]Hi\n[assistant]"
    params = {"prompt": prompt, "temperature": 0, "max_new_tokens": 12, "echo": False}
    chunks = [json.loads(chunk[:-1]) for chunk in worker.generate_stream_gate(params)]
    assert [chunk["error_code"] for chunk in chunks] == [0] * len(chunks)
    assert chunks[-1]["text"] == greedy(prompt, 12)[0] and chunks[-1]["finish_reason"] in ("stop", "length")
    assert worker.context_len == 256
    failed = json.loads(next(worker.generate_stream_gate(params | {"logprobs": 1}))[:-1])
    assert failed["error_code"] != 0 and "log-probabilities" in failed["text"]


class Network:
    """FastChat's controller, our worker and FastChat's OpenAI server, as separate processes on loopback."""

    def __init__(self, folder) -> None:
        self.folder, self.processes = folder, []

    def start(self, model) -> None:
        controller, worker, self.address = (f"http://127.0.0.1:{port}" for port in free_ports(3))
        self._start("controller", controller)
        self._wait(f"{controller}/test_connection", lambda answer: answer == "success")
        words = ["--worker-address", worker, "--model-path", str(model), "--model-names", "mine", "--device", "cpu"]
        self._start("model_worker", worker, "--controller-address", controller, *words)
        self._start("openai_api_server", self.address, "--controller-address", controller)
        self._wait(f"{self.address}/v1/models", lambda answer: [model["id"] for model in answer["data"]] == ["mine"])

    def _start(self, service, address, *words) -> None:
        host, port = address.removeprefix("http://").split(":")
        line = [sys.executable, "-m", "cllm", "fastchat", service, "--host", host, "--port", port, *words]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"{service}.out", "w") as out:
            self.processes.append(subprocess.Popen(line, cwd=self.folder, env=env, stdout=out, stderr=subprocess.STDOUT))

    def _wait(self, url, good, seconds=300) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if good(json.loads(open_url(url))):
                    return
            except (URLError, KeyError):
                pass
            logs = "".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), logs
            time.sleep(0.3)

    def ask(self, **options) -> str:
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": "mine", "messages": messages, "temperature": 0, "max_tokens": 20} | options
        return open_url(f"{self.address}/v1/chat/completions", json.dumps(body).encode())

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def open_url(url, body=None):
    return urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=60).read().decode()


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def network(cllm, tmp_path):
    for name in ("uvicorn", "tiktoken"):
        pytest.importorskip(name)
    network = Network(tmp_path)
    try:
        network.start(cllm)
        yield network
    finally:
        network.stop()


@needs_fastchat
@pytest.mark.slow
def test_fastchats_controller_worker_and_openai_server(network):
    text, result = greedy("[user]Hi\n[assistant]")
    whole = json.loads(network.ask())
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert whole["usage"]["completion_tokens"] == len(result.token_ids)
    events = [line.removeprefix("data: ") for line in network.ask(stream=True).splitlines() if line]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert events[-1] == "[DONE]" and "".join(pieces) == text and len(pieces) > 3


@needs_fastchat
def test_answers_and_judgments_load_in_fastchats_llm_judge(shared_data, tmp_path, monkeypatch):
    """Its module imports clients of paid services; they are empty modules here, since only its readers are used."""
    from cllm.tasks import get_task
    from cllm.tasks.source import load_examples

    for name in ("openai", "anthropic"):
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    common = pytest.importorskip("fastchat.llm_judge.common")
    questions = common.load_questions(str(shared_data / "mt_bench" / "question.jsonl"), None, None)
    task, path = get_task("sharegpt"), tmp_path / "model_answer" / "mine.jsonl"
    rows = [
        {"question": e.messages[-1]["content"], "target": e.target, "reply": "b", "replies": [f"a{n}", "b"]}
        for n, e in enumerate(load_examples(task, shared_data / "mt_bench" / "question.jsonl", "test"))
    ]
    assert task.export(rows, path)
    answers = common.load_model_answers(str(path.parent))
    judges = common.load_judge_prompts(str(shared_data / "mt_bench" / "judge_prompts.jsonl"))
    assert set(judges) >= {"single-v1", "single-math-v1-multi-turn"}
    common.check_data(questions, answers, {"gpt-4": {}}, ["mine"], {})
    assert len(answers["mine"]) == 80
    assert all(answers["mine"][q["question_id"]]["choices"][0]["turns"] == [f"a{n}", "b"] for n, q in enumerate(questions))


def test_command_without_fastchat_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "fastchat"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastchat", None)
    with pytest.raises(SystemExit) as exit_:
        command.main(["cli"])
    assert exit_.value.code == 2 and "pip install -e .[fastchat]" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["gradio"]])
def test_unknown_services(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(words)
    names = "{cli,controller,model_worker,multi_model_worker,openai_api_server}"
    assert exit_.value.code == 2 and names in capsys.readouterr().err
