"""The parts of a reply that may hold the answer: no reasoning, nothing after a special token, no further question.

Every extractor takes the first of :func:`answer_candidates` in which it finds an answer.
"""

import re

_THOUGHT = "think(?:ing)?|thoughts?|reasoning|reflection"
_THINKING = re.compile(
    rf"""(["'`])</?(?:{_THOUGHT})>\1                                    # mentioned in quotes
    | (?P<start><(?:{_THOUGHT})(?:\s[^<>\n]*)?(?<!/)> | \[THINK\] | <\|begin_of_thought\|>
        | <\|channel\|>(?:analysis|commentary)<\|message\|>)
    | (?P<end></(?:{_THOUGHT})\s*> | \[/THINK\] | <\|end_of_thought\|> | <\|channel\|>final<\|message\|>)""",
    re.IGNORECASE | re.VERBOSE,
)
_TOKEN = r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad)>|<(?:start|end)_of_turn>|\[/?INST\]|\[EOS\]"
_SPECIAL = re.compile(rf"""(["'`])(?:{_TOKEN})\1|(?P<token>{_TOKEN})""")
_OPENING = re.compile(
    r"""(?:\s*(?:<s>|<bos>|\[/INST\]|<start_of_turn>(?:model\b)?|<\|im_start\|>(?:assistant\b)?|<[|｜]assistant[|｜]>
    |<\|start_header_id\|>assistant<\|end_header_id\|>|<\|start\|>assistant|<\|message\|>
    |<[|｜](?:begin[_▁]of[_▁](?:text|sentence|solution)|startoftext)[|｜]>))+""",
    re.IGNORECASE | re.VERBOSE,
)
_ASKING = "Question|Problem|Exercise|Instruction|Prompt|User|Human"
_NEXT_QUESTION = re.compile(
    rf"""^[ ]{{0,3}}(?![ ])(?:
        (?:\#\#++|[->*_ ]){{0,8}}+ (?:
            (?i:(?:(?:Here(?:'s|[ ]is)[ ])?(?:Next|The[ ]next|New|A[ ]new|Another)[ ])?
              (?:{_ASKING}|Q)[ ]?\#?[0-9]{{0,3}}[ ]?[*_]{{0,2}}[:.)])
            (?![ ]*[\w.]+(?:\[[^\]\n]*\])?[ ]*=)           # which is Python: "Q: deque = deque()"
          | (?<=\#[ ]|\#\#)(?:{_ASKING})[ ]*\#?[0-9]{{0,3}}[*: ]*$ )
      | Question\b
      | (?:user|human)[ ]*$ )""",
    re.MULTILINE | re.VERBOSE,
)


def answer_candidates(reply: str) -> list[str]:
    """The texts of a reply that may hold the answer, the likeliest first.

    Text after the reasoning comes before text that precedes it; unfinished reasoning is left out. A special token ends the
    reply. A question in mid-reply starts a new candidate: models go on with another question, but also restate theirs before
    they answer.
    """
    texts = []
    for text in _outside_thinking(reply):
        opening = _OPENING.match(text)
        start = opening.end() if opening else 0
        ends = (match.start() for match in _SPECIAL.finditer(text, start) if match["token"])
        end = next(ends, None)
        texts.append(text[start:end])
        if end is not None:
            break
    return [part for text in reversed(texts) for part in _questions(text) if part.strip()]


def _outside_thinking(reply: str) -> list[str]:
    texts, start, inside = [], 0, False
    for mark in _THINKING.finditer(reply):
        if mark["start"] and not inside:
            texts.append(reply[start : mark.start()])
            inside = True
        elif mark["end"]:
            if not inside:  # the prompt opened it
                texts.clear()
            start, inside = mark.end(), False
    return texts if inside else [*texts, reply[start:]]


def _questions(text: str) -> list[str]:
    starts = [0, *(match.start() for match in _NEXT_QUESTION.finditer(text)), len(text)]
    return [text[start:end] for start, end in zip(starts, starts[1:])]
