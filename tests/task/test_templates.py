"""Templates that write calls and reasoning in their own ways: what is learnt is what the row says, or it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from twofold.task.text.chat import RefusedRowError, show
from twofold.task.text.formats import read_row
from twofold.tuning.tokens import IGNORED, encode, encode_rows

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
ASK = "{% if add_generation_prompt %}<A>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} ARGUMENTS]{% endfor %}"
CALLING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + CALLS + "</>{% endfor %}" + ASK.replace("A", "assistant")
)
WAYS = {  # to write the arguments of a call; the second list writes them otherwise than as JSON
    "{{ c.function.arguments | tojson }}": True,
    "{{ c.function.arguments }}": True,
    "{{ '' + c.function.arguments }}": True,
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}": True,
    "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v if v is string else v | tojson }}{% endfor %}": True,
    "{{ c.function.arguments | string | upper }}": False,
    "{% if c.function.arguments is string %}{{ raise_exception('no') }}{% endif %}{{ c.function.arguments }}": False,
    "": False,
}
VALUES = st.recursive(
    st.sampled_from([7, 1.5, True, None, "zü", 'a "b"']), lambda held: st.lists(held, max_size=2), max_leaves=3
)


def learnt(messages: list[dict[str, Any]], template: str) -> tuple[str, str, Any]:
    """Return the text of a row, what is learnt of it, and its example."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    example = encode(read_row({"messages": messages}, "a row"), tokenizer)
    words = tokenizer.decode([label for label in example.labels if label != IGNORED])
    return tokenizer.decode(example.input_ids), words, example


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, deadline=None)
@given(arguments=st.dictionaries(st.sampled_from("pq"), VALUES, min_size=1, max_size=2), said=st.booleans())
def test_the_arguments_of_calls_are_written_as_json_or_the_row_is_refused(way, arguments, said):
    words = json.dumps(arguments, ensure_ascii=False)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "area", "arguments": arguments}]}
    template = CALLING.replace("ARGUMENTS", way)
    asked = {**ASKED, "content": words if said else "Hi"}  # the same JSON elsewhere is not that of the call
    if not WAYS[way]:
        with pytest.raises(RefusedRowError, match="a row: the chat template"):
            learnt([asked, call], template)
        return
    _, answer, _ = learnt([asked, call], template)
    if "items" in way:
        each = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
        words = "".join(f"<{key}>{value}" for key, value in each.items())
    assert answer == f"[area {words}]</>"


# --- Reasoning

ONE = "{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ CONTENT }}</>{% endif %}"
STRIPS = "m.content.split('</think>')[-1] | trim"
THINK = "{% if add_generation_prompt %}<A><think>\n{% endif %}"
TEMPLATES = {
    "shows all": "{% for m in messages %}" + ONE.replace("CONTENT", "m.content") + "{% endfor %}" + THINK,
    "strips all (DeepSeek R1)": "{% for m in messages %}" + ONE.replace("CONTENT", STRIPS) + "{% endfor %}" + THINK,
    "strips earlier ones (Qwen3)": "{% for m in messages %}{% set shown = m.content if loop.last else (" + STRIPS + ") %}"
    + ONE.replace("CONTENT", "shown") + "{% endfor %}" + ASK,
}  # fmt: skip
REASONED = st.sampled_from(
    ["Ho", "It is 7.", "<t", "<think>\nHm.\n</think>\n\nHo", "<think>\nWhy?\n</think>\n\nIt is 7."]
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(answers=st.lists(REASONED, min_size=1, max_size=3))
def test_of_a_reasoning_template_whole_answers_are_learnt_and_the_others_are_said(name, answers):
    messages = [turn for said in answers for turn in (ASKED, {**SAID, "content": said})]
    text, words, example = learnt(messages, TEMPLATES[name])
    asks = "<think>\n" if THINK in TEMPLATES[name] else ""
    whole = [said for said in answers[:-1] if name == "shows all" or "</think>" not in said] + answers[-1:]
    assert words == "".join(said.removeprefix(asks) + "</>" for said in whole)
    assert text.endswith(f"<A>{answers[-1]}</>") and text.count("<A>") == len(answers)
    assert example.otherwise == len(answers) - len(whole)
    assert bool(example.unshown) == bool(example.otherwise)


def test_a_template_that_begins_the_last_answer_otherwise_teaches_that_one_alone():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ '<think></think>' if loop.last and m.role != 'user' }}"
        "{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    _, words, example = learnt([ASKED, SAID, ASKED, SAID], template)
    assert (words, example.otherwise) == ("<think></think>Ho</>", 1)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    row = read_row({"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]}, "a row")
    with pytest.raises(RefusedRowError, match="otherwise than the whole"):  # what has the weight 0 can't be told
        encode(row, tokenizer, loss="all")
    kept = read_row({"messages": [ASKED, SAID]}, "a row")
    assert len(encode_rows([kept, kept], tokenizer, length=99, held_out=0).train) == 2


def test_a_template_whose_beginnings_differ_is_a_bad_row_that_can_be_skipped():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATES["shows all"]
    row = read_row({"messages": [ASKED, SAID]}, "a row")
    assert show(row, tokenizer).text.startswith("2<U>Hi")
    with pytest.raises(RefusedRowError, match="otherwise than the whole"):
        encode(row, tokenizer)


@given(text=st.text("ab", min_size=1, max_size=4), ends=st.integers(0, 2), adds=st.booleans(), prompt=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_text_ends_with_the_end_token_once(text, ends, adds, prompt):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    if adds:
        around = {"single": "<bos> $A <eos>", "special_tokens": [("<bos>", 256), ("<eos>", 257)]}
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(**around)
    row = {"prompt": "q", "completion": text + "<eos>" * ends} if prompt else {"text": text + "<eos>" * ends}
    example = encode(read_row(row, "a row"), tokenizer)
    begin = "<bos>" * adds
    assert tokenizer.decode(example.input_ids) == f"{begin}{'q' * prompt}{text}<eos>"
    assert (
        tokenizer.decode([label for label in example.labels if label != IGNORED])
        == f"{begin * (not prompt)}{text}<eos>"
    )
