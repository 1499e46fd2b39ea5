"""Prompt templates: which is chosen, what it writes, and which tokens end a reply."""

import os

import pytest
from tiny import EOS_ID, save_tiny_checkpoint, surround, tiny_config, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from cllm.checkpoints import PUBLISHED, published_for, published_record
from cllm.errors import UsageError
from cllm.models import load_model, load_tokenizer, read_record, stop_token_ids, write_record
from cllm.prompts import DIALOGUES, PromptTemplate, choose_template, prompt_ids

TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]
SYSTEM = {"role": "system", "content": "S."}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("vicuna", f"{VICUNA} USER: q1 ASSISTANT:", f"{VICUNA} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"),
        (
            "abel",
            "Question:\nq1\nAnswer:\nLet's think step by step.\n",
            "Question:\nq1\nAnswer:\nLet's think step by step.\na1\n\nQuestion:\nq2\nAnswer:\nLet's think step by step.\n",
        ),
        (
            "deepseek-instruct",
            "### Instruction:\nq1\n### Response:\n",
            "### Instruction:\nq1\n### Response:\na1\n<|EOT|>\n### Instruction:\nq2\n### Response:\n",
        ),
        ("Q: {question}\nA:", "Q: q1\nA:", "Q: q1\nA:a1\n\nQ: q2\nA:"),
    ],
)
def test_dialogues(name, one, two):
    template = PromptTemplate(name)
    assert template.render(TALK[:1]) == one and template.render(TALK) == two
    assert template.render([SYSTEM, *TALK]).startswith("S.") and VICUNA not in template.render([SYSTEM, *TALK])


@pytest.mark.parametrize("name", DIALOGUES)
def test_a_template_text_equal_to_a_dialogue_is_one(name):
    """A task's plain template may be such a text; further turns are then written as in the dialogue."""
    assert PromptTemplate(DIALOGUES[name].text).render(TALK) == PromptTemplate(name).render(TALK)


def test_placeholders_in_a_question_are_kept():
    assert (
        PromptTemplate("vicuna").render([{"role": "user", "content": "{question} {reply}"}]).endswith("USER: {question} {reply} ASSISTANT:")
    )


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="one of chat, plain, abel, deepseek-instruct, vicuna, or a text that"):
        PromptTemplate("llama")


@pytest.mark.parametrize(
    ("option", "record", "chat", "expected"),
    [
        (None, {}, True, "chat"),
        (None, {}, False, "P {question}"),
        (None, {"prompt_template": "vicuna"}, True, "vicuna"),
        ("abel", {"prompt_template": "vicuna"}, True, "abel"),
        ("plain", {"prompt_template": "vicuna"}, True, "P {question}"),
        ("A\\n{question}", {}, True, "A\n{question}"),
    ],
)
def test_choice_of_template(option, record, chat, expected):
    assert choose_template(option, "P {question}", tiny_tokenizer(chat), record).text == expected


def test_published_checkpoints_match_by_full_name(tmp_path):
    assert len(PUBLISHED) == 8 and len({c.name for c in PUBLISHED}) == 8
    assert {c.prompt_template for c in PUBLISHED} <= set(DIALOGUES)
    names = {c.name for c in PUBLISHED}
    assert all(c.target is None or c.target in names for c in PUBLISHED)
    assert all(len(published_for(c.task)) == 2 for c in PUBLISHED)
    config = tiny_config()
    config._name_or_path = "cllm/consistency-llm-7b-math"
    assert read_record(config) == {"prompt_template": "abel", "task": "gsm8k", "target_model": "GAIR/Abel-7B-001"}
    for other in ("/models/cllm/consistency-llm-7b-math", "consistency-llm-7b-math", "x/abel-vicuna-spider", "", None):
        config._name_or_path = other
        assert read_record(config) == published_record(other) == {}


def test_the_checkpoints_record_takes_precedence():
    config = tiny_config()
    config._name_or_path = "GAIR/Abel-7B-001"
    write_record(config, {"prompt_template": "chat"})
    assert read_record(config) == {"prompt_template": "chat"}


def test_a_folder_named_like_a_published_model_does_not_match(tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "cllm" / "consistency-llm-7b-math")
    assert read_record(load_model(str(folder), device="cpu").config) == {}


# -------------------------------------------------------------------- stops

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer(special=True):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "</s>", "<|EOT|>"], special_tokens=special)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_the_chat_templates_end_of_turn_stops_a_reply():
    tokenizer = chatml_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert PromptTemplate("chat").stop_ids(tokenizer) == [end] and PromptTemplate("chat").end_id(tokenizer) == end
    model = tiny_model()
    assert stop_token_ids(model, tokenizer, PromptTemplate("chat")) == sorted({EOS_ID, end})
    assert stop_token_ids(model, tokenizer) == [EOS_ID]


def test_ordinary_text_after_a_reply_does_not_stop_it():
    assert PromptTemplate("chat").stop_ids(tiny_tokenizer()) == []
    assert PromptTemplate("chat").end_id(tiny_tokenizer()) == EOS_ID
    assert PromptTemplate("chat").stop_ids(chatml_tokenizer(special=False)) == []


def test_a_template_that_refuses_replies_gives_no_stop():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert PromptTemplate("chat").stop_ids(tokenizer) == []


def test_named_templates_stop_at_their_tokens():
    tokenizer = chatml_tokenizer()
    for name, stop in {"vicuna": "</s>", "deepseek-instruct": "<|EOT|>"}.items():
        assert PromptTemplate(name).stop_ids(tokenizer) == [tokenizer.convert_tokens_to_ids(stop)]
        assert PromptTemplate(name).stop_ids(tiny_tokenizer()) == []
    assert PromptTemplate("abel").stop_ids(tokenizer) == PromptTemplate("{question}").stop_ids(tokenizer) == []


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('by turns') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)


def test_a_chat_template_without_system_messages():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    template = PromptTemplate("chat")
    assert tokenizer.decode(template.encode([SYSTEM, *TALK], tokenizer)) == "[user]S.\n\nq1[assistant]a1[user]q2"
    with pytest.raises(UsageError, match="refuses the conversation: by turns"):
        template.encode([SYSTEM, TALK[0], TALK[2]], tokenizer)


def template_of(user: str, system: str | None = None) -> str:
    """A chat template that writes contents with one Jinja snippet, optionally those of system messages with another."""
    content = user if system is None else f"{{% if m.role == 'system' %}}{system}{{% else %}}{user}{{% endif %}}"
    return f"{{% for m in messages %}}<{{{{ m.role }}}}>{content}{{% endfor %}}<reply>"


TEXT = "{{ m.content }}"
LOOP = "{% for part in m.content %}{% if part.type == 'text' %}({{ part.text | trim }}){% endif %}{% endfor %}"
EITHER = f"{{% if m.content is string %}}{TEXT}{{% else %}}{LOOP}{{% endif %}}"
FIRST = "{{ m.content[0]['text'] }}"
FILTER = "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}"
STRICT = "{{ 'says: ' + m.content[0].text }}"  # fails on a plain text
SHOUT = "{{ m.content | upper }}"
JSON = "{{ m.content | tojson }}"
ASKED = [{"role": "system", "content": "be Kind"}, {"role": "user", "content": "how are you?"}]
IN_PARTS = [
    ASKED[0],
    {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "are you?"}]},
]


@pytest.mark.parametrize(
    ("template", "texts", "parts"),
    [
        (template_of(TEXT), "<system>be Kind<user>how are you?", None),
        (template_of(LOOP), "<system>(be Kind)<user>(how are you?)", "<system>(be Kind)<user>(how)(are you?)"),
        (template_of(EITHER), "<system>be Kind<user>how are you?", "<system>be Kind<user>(how)(are you?)"),
        (template_of(LOOP, system=TEXT), "<system>be Kind<user>(how are you?)", "<system>be Kind<user>(how)(are you?)"),
        (template_of(TEXT, system=LOOP), "<system>(be Kind)<user>how are you?", None),
        (template_of(FIRST), "<system>be Kind<user>how are you?", None),
        (template_of(FILTER), "<system>be Kind<user>how are you?", None),
        (template_of(STRICT), "<system>says: be Kind<user>says: how are you?", None),
        (template_of(SHOUT), "<system>BE KIND<user>HOW ARE YOU?", None),
        (template_of(JSON), '<system>"be Kind"<user>"how are you?"', None),
        (template_of(LOOP, system=""), "<user>(be Kind\n\nhow are you?)", None),  # it drops system messages
        (template_of(TEXT, system=""), "<user>be Kind\n\nhow are you?", None),
    ],
)
def test_a_chat_template_gets_contents_in_the_form_it_supports(template, texts, parts):
    """Nothing is lost, whether the template writes texts, loops over parts, or both; parts stay separate where it can."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    encoded = {name: PromptTemplate("chat").encode(talk, tokenizer) for name, talk in (("texts", ASKED), ("parts", IN_PARTS))}
    assert tokenizer.decode(encoded["texts"]) == texts + "<reply>"
    assert tokenizer.decode(encoded["parts"]) == (parts or texts) + "<reply>"


IMAGES = "{% for part in m.content %}{{ part.image }}{% endfor %}"


@pytest.mark.parametrize("template", ["nothing", "{{ messages[-1].content }}", template_of(IMAGES)])
def test_a_chat_template_that_leaves_something_out_is_refused(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="leaves out message 1, from the user"):
        PromptTemplate("chat").encode(TALK, tokenizer)


def test_a_system_message_alone_is_not_lost():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    assert tokenizer.decode(PromptTemplate("chat").encode([SYSTEM], tokenizer)) == "[user]S."


@pytest.mark.parametrize("name", ["vicuna", "abel", "Q: {question}"])
def test_parts_in_templates_that_take_texts_only(name):
    assert PromptTemplate(name).render(IN_PARTS) == PromptTemplate(name).render(ASKED)


def test_the_turn_end_of_a_template_that_loops_over_parts():
    tokenizer = chatml_tokenizer()
    loop = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer.chat_template = CHATML.replace("{{ m['content'] }}", loop)
    assert PromptTemplate("chat").stop_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize(
    ("around", "text", "tokens"),
    [
        ("$A <eos>", "hi", "hi"),
        ("<pad> $A <eos>", "hi", "<pad>hi"),
        ("<pad> $A <eos> <unk>", "hi", "<pad>hi"),
        ("<pad> $A", "hi", "<pad>hi"),
        ("$A <eos>", "a<eos>b<eos>", "a<eos>b<eos>"),  # an end token in the text is kept
        ("<pad> $A <eos>", "<pad>hi", "<pad>hi"),  # a start token in the text is not doubled
        ("<pad> $A <eos>", "", "<pad>"),
    ],
)
@pytest.mark.parametrize("template", [None, "{question}"])
def test_a_prompt_does_not_end_before_its_reply(around, text, tokens, template):
    tokenizer = surround(tiny_tokenizer(), around)
    tokenizer.bos_token = "<pad>"
    if template:
        found = PromptTemplate(template).encode([{"role": "user", "content": text}], tokenizer)
    else:
        found = prompt_ids(text, tokenizer)
    assert tokenizer.decode(found) == tokens


@pytest.fixture
def smollm():
    path = os.environ.get("CLLM_TEST_MODEL")
    if not path:
        pytest.skip("CLLM_TEST_MODEL does not name a model")
    return load_tokenizer(path)


@pytest.mark.real_model
def test_smollm_stops_at_its_turn_end(smollm):
    assert PromptTemplate("chat").stop_ids(smollm) == [smollm.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.real_model
def test_smollm_with_an_end_after_every_text(smollm):
    template, question = PromptTemplate("Q: {question}\nA:"), [{"role": "user", "content": "How many?"}]
    plain = template.encode(question, smollm)
    end = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", smollm.eos_token_id)])
    smollm.backend_tokenizer.post_processor = end
    assert smollm("A:").input_ids[-1] == smollm.eos_token_id
    assert template.encode(question, smollm) == plain and plain[-1] != smollm.eos_token_id
