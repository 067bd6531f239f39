"""Conversations: rendered as transformers renders them, tokenised with their mask; label rows."""

import dataclasses
import json
import types
import zlib

import common
import pytest
from tiny_tokenizer import CORPUS, write_qwen, write_sentencepiece

from gemma_lora import chat
from gemma_lora import config as configs
from gemma_lora.data.examples import tokenize
from gemma_lora.errors import UserError
from gemma_lora.tokenizer import Tokenizer

# As in the tokenizer_config.json of the instruction-tuned models.
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ "
    "'<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' "
    "+ message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What else the environment of transformers offers, in the syntax of blocks on their own lines.
EXTRAS = """{%- set found = namespace(n=0) %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% set found.n = found.n + 1 %}
{{ message | tojson }}{% generation %}{{ message.content }}{% endgeneration %}
{% endfor %}
{{ found.n }}{{ eos_token }}{% if tools is not none %}tools{% endif %}
{{ strftime_now('%Y')|length }}
"""
TURNS = [
    {"role": "user", "content": "  2 + 3? <b>'\"& \n"},
    {"role": "assistant", "content": "5", "tool_calls": None},
    {"role": "user", "content": "\n" + CORPUS[2]},
    {"role": "assistant", "content": CORPUS[1]},
]
SYSTEM = {"role": "system", "content": "Be brief. 漢字 "}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small tokenizers of both kinds as files of Hugging Face, without a chat template."""
    root = tmp_path_factory.mktemp("chat")
    write_sentencepiece(root / "gemma" / "tokenizer.model")
    tokens = {f"{k}_token": f"<{k}>" for k in ("bos", "eos", "pad", "unk")}
    config = {"tokenizer_class": "GemmaTokenizer", **tokens}
    (root / "gemma" / "tokenizer_config.json").write_text(json.dumps(config))
    write_qwen(root / "qwen2")
    return root


def conversations(system: bool):
    for head in ([], [SYSTEM]) if system else ([],):
        yield from ([*head, *TURNS[:n]] for n in range(1, 5))


@pytest.mark.parametrize(
    ("kind", "template", "system"),
    [
        ("gemma", GEMMA2, False),
        ("gemma", GEMMA3, True),
        ("qwen2", QWEN2, True),
        ("qwen2", EXTRAS, True),
    ],
)
def test_text_and_ids_are_those_of_transformers(folders, kind, template, system):
    transformers = common.needs("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders / kind)
    theirs.chat_template = template
    found = Tokenizer.from_dir(folders / kind)
    ours = Tokenizer(
        found.backend, found.bos_id, found.eos_id, found.pad_id, found.add_bos, template
    )
    for messages in conversations(system):
        for prompt in (False, True):
            text = ours.render_chat(messages, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert ours.encode(text) == ids


def renders_as(tokenizer, template, system):
    for messages in conversations(system):
        for prompt in (False, True):
            wanted = chat.render(
                template,
                messages,
                add_generation_prompt=prompt,
                bos_token="<bos>",
                eos_token="unused",
            )
            assert tokenizer.render_chat(messages, add_generation_prompt=prompt) == wanted


@pytest.mark.parametrize(("kind", "template"), [("gemma", GEMMA2), ("qwen2", QWEN2)])
def test_the_built_in_templates_are_the_published_ones(folders, kind, template):
    """Their control tokens end a turn, and the tokenizer keeps its template when it is saved."""
    tokenizer = Tokenizer.from_dir(folders / kind)
    tokenizer.save(folders / f"{kind}_saved")
    saved = Tokenizer.from_dir(folders / f"{kind}_saved")
    assert saved.chat_template == tokenizer.chat_template
    renders_as(saved, template, system=kind == "qwen2")
    end = {"gemma": "<end_of_turn>", "qwen2": "<|im_end|>"}[kind]
    assert saved.encode(end)[0] in saved.control_ids
    assert not set(saved.encode("The cat\n</iframe>")) & saved.control_ids


@pytest.mark.parametrize(
    ("kind", "token", "template"),
    [
        ("gemma", "<start_of_image>", GEMMA3),
        (
            "qwen2",
            "<tool_call>",
            QWEN2.replace("You are a", "You are Qwen, created by Alibaba Cloud. You are a"),
        ),
    ],
)
def test_words_of_the_later_model_choose_its_template(folders, tmp_path, kind, token, template):
    found = Tokenizer.from_dir(folders / kind)
    found.backend.add_special_tokens([token])
    dataclasses.replace(found, chat_template=None).save(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    renders_as(tokenizer, template, system=True)


def test_a_template_runs_in_a_sandbox():
    for template in ("{{ ''.__class__.__mro__ }}", "{% set x = messages.append(1) %}"):
        with pytest.raises(UserError, match="refuses the conversation"):
            chat.render(template, TURNS, add_generation_prompt=False, bos_token="", eos_token="")


# ---- rows -----------------------------------------------------------------------------------


def tokenized(rows, tokenizer, **data):
    c = configs.default()
    c.data.update({"chat": True, "seq_len": 400, **data})
    rows = [{"id": f"r{i}", **row} for i, row in enumerate(rows)]
    return tokenize(rows, tokenizer, c.data, "x.jsonl")


def turn(role, text):
    return f"<start_of_turn>{role}\n{text}<end_of_turn>\n"


def learnt(e, tokenizer):
    return tokenizer.decode(e.tokens[e.loss_from :], skip_special=False)


@pytest.mark.parametrize(
    ("row", "data", "user"),
    [
        ({"question": " 2+3? ", "answer": "5"}, {}, "2+3?"),
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, {}, "Add.\n\n2, 3"),
        ({"instruction": "Add.", "input": "", "output": "5"}, {}, "Add."),
        ({"prompt": "2+3?\n", "completion": "5"}, {}, "2+3?"),
        ({"q": "2+3?", "a": "5"}, {"template": "Q: {q}\nA: {a}"}, "Q: 2+3?\nA:"),
        (
            {"text": "2+3", "label": 1},
            {"labels": ("four", "5")},
            "Classify the text as one of: four, 5.\n\n2+3",
        ),
    ],
)
def test_a_row_becomes_two_turns(tokenizer, row, data, user):
    for loss_on in ("all", "completion"):
        [e] = tokenized([row], tokenizer, loss_on=loss_on, **data).examples
        assert e.text == "<bos>" + turn("user", user) + turn("model", "5")
        assert e.text[e.completion :] == "5<end_of_turn>\n"
        assert e.text[e.completion : e.end] == "5"
        assert tokenizer.decode(e.tokens, skip_special=False) == e.text
        assert list(e.tokens).count(tokenizer.bos_id) == 1 and tokenizer.eos_id not in e.tokens
        assert e.tokens[e.answer_from] == tokenizer.encode("5")[0]
        assert e.loss_from == (1 if loss_on == "all" else e.answer_from)
        assert learnt(e, tokenizer).endswith("5<end_of_turn>\n")


def test_an_empty_answer_has_no_text(tokenizer):
    [e] = tokenized([{"question": "2+3?", "answer": ""}], tokenizer).examples
    assert e.text[e.completion :] == "<end_of_turn>\n" and e.end == e.completion


def test_messages_train_the_last_turn(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    found = tokenized([{"messages": messages}], tokenizer, loss_on="completion")
    [e] = found.examples
    text = turn("user", "a") + turn("model", "b") + turn("user", "c") + turn("model", "d")
    assert e.text == "<bos>" + text and e.label == -1 and found.label_tokens == ()
    assert learnt(e, tokenizer) == "d<end_of_turn>\n"


def test_tools_reach_the_template(tokenizer):
    template = "{% if tools %}{{ tools[0].name }}: {% endif %}"
    template += "{{ messages|map(attribute='content')|join(', ') }}"
    with_tools = dataclasses.replace(tokenizer, chat_template=template)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    found = [tokenized([row | {"tools": t}], with_tools).examples[0].text
             for t in ([{"name": "add"}], [], None)]  # fmt: skip
    assert found == ["add: a, b", "a, b", "a, b"]
    with pytest.raises(UserError, match="tools is a str, expected a list"):
        tokenized([row | {"tools": "[]"}], with_tools)


def test_qwen2_has_no_bos_and_ends_in_its_turn(folders):
    tokenizer = Tokenizer.from_dir(folders / "qwen2")
    [e] = tokenized([{"messages": [SYSTEM, *TURNS[:2]]}], tokenizer, loss_on="completion").examples
    assert e.tokens.tolist() == tokenizer.encode(e.text)
    assert learnt(e, tokenizer) == "5<|im_end|>\n"
    [e] = tokenized([{"question": "2+3?", "answer": "5"}], tokenizer).examples
    assert e.text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_st")


def test_bos_and_eos_that_a_template_does_not_write(tokenizer):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    fields = {k: getattr(tokenizer, k) for k in ("backend", "bos_id", "eos_id", "pad_id")}
    other = Tokenizer(**fields, add_bos=True, chat_template=plain)
    [e] = tokenized([{"question": "q", "answer": "a"}], other).examples
    assert e.text == "user: q\nassistant: a\n"
    assert e.tokens.tolist() == [2, *tokenizer.encode(e.text), 1]
    backwards = Tokenizer(
        **fields,
        add_bos=True,
        chat_template="{{ messages | length }}{{ messages[0].content }}{{ messages[-1].content }}",
    )
    with pytest.raises(UserError, match=r"x\.jsonl, row r0: the chat template writes a prompt"):
        tokenized([{"question": "q", "answer": "a"}], backwards)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([SYSTEM, *TURNS], r"refuses the conversation: System role not supported"),
        ([TURNS[0], TURNS[2], TURNS[1]], r"roles must alternate"),
        (TURNS[:3], r"messages are by user, assistant, user; expected .* last by the assistant"),
        (TURNS[1:2], r"messages are by assistant; expected at least two"),
        ([], r"messages are by nobody"),
        ([{"role": "user"}, TURNS[1]], r"'messages' must be a list of objects"),
        ("hello", r"'messages' must be a list of objects"),
        ([{"role": "user", "content": "<bos>"}, TURNS[1]], r"the text itself holds the bos token"),
    ],
)
def test_refused_conversations(tokenizer, messages, message):
    rows = [{"messages": TURNS}, {"messages": messages}]
    with pytest.raises(UserError, match=rf"^x\.jsonl, row r1: .*{message}"):
        tokenized(rows, tokenizer)


def test_what_chat_needs(tokenizer):
    row = {"messages": TURNS}
    with pytest.raises(UserError, match=r"conversations need data\.chat=True"):
        tokenized([row], tokenizer, chat=False)
    bare = Tokenizer(tokenizer.backend, 2, 1, 0, True)
    with pytest.raises(UserError, match=r"row r0: the tokenizer has no chat template: .*im_start"):
        tokenized([row], bare)


# ---- labels ---------------------------------------------------------------------------------

REVIEWS = [{"text": "good film", "label": 1}, {"text": "a bad film", "label": "negative"}]


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("as_chat", [False, True])
def test_labels_of_examples(tokenizer, as_chat, loss_on):
    rows = [*REVIEWS, {"text": "a film", "label": 0}]
    found = tokenized(rows, tokenizer, chat=as_chat, loss_on=loss_on)
    assert found.label_tokens == tuple(tokenizer.encode("np"))
    assert [e.label for e in found.examples] == [1, 0, 0]
    for e in found.examples:
        assert e.tokens[e.answer_from] == found.label_tokens[e.label]
        assert e.text[e.completion :].startswith(("negative", "positive"))


def test_a_label_that_is_none_of_the_words(tokenizer):
    rows = [*REVIEWS, {"text": "t", "label": "neutral"}]
    for chat_on in (False, True):
        with pytest.raises(UserError, match=r"r\d+: label 'neutral', but data\.labels has 2 words"):
            tokenized(rows, tokenizer, chat=chat_on)
    asked = tokenized([{"label": "positive", "text": "t"}], tokenizer, template="{label}: {text}")
    assert asked.label_tokens == () and asked.examples[0].label == -1


def test_label_words_that_cannot_be_told_apart(tokenizer):
    for labels, message in (
        (("bad", "best"), r"'bad' and 'best' begin with the same token, 'b'"),
        (("", "positive"), r"data\.labels holds '', which has no token"),
    ):
        with pytest.raises(UserError, match=message):
            tokenized([{"text": "t", "label": 1}], tokenizer, chat=False, labels=labels)


def test_a_label_that_another_text_makes_another_token():
    """The word is joined with the end of the text before it."""

    class Pairs:
        add_bos, bos_id, eos_id = False, None, 1

        def encode_batch(self, texts):
            spans = [[(i, min(i + 2, len(t))) for i in range(0, len(t), 2)] for t in texts]
            return [
                types.SimpleNamespace(
                    ids=[zlib.crc32(t[a:b].encode()) & 0xFFFF for a, b in s], offsets=s
                )
                for t, s in zip(texts, spans, strict=True)
            ]

        def decode(self, ids):
            return str(ids)

    rows = [{"text": "ab", "label": 1}, {"text": "abc", "label": 1}]
    assert len(tokenized(rows[:1], Pairs(), chat=False, template="{text}{label}").label_tokens) == 2
    with pytest.raises(UserError, match=r"row r0: the label 'positive' is the first token, which"):
        tokenized([{"label": 1}], Pairs(), chat=False, template="{label}")
    with pytest.raises(UserError, match=r"row r1: the label 'positive' begins with another token"):
        tokenized(rows, Pairs(), chat=False, template="{text}{label}")


@pytest.mark.parametrize("loss_on", ["all", "completion"])
@pytest.mark.parametrize("as_chat", [False, True])
def test_a_long_labelled_row_keeps_its_label(tokenizer, as_chat, loss_on):
    rows = [{"text": "x" * n, "label": 1} for n in (1, 11, 12, 31)]
    data = {"chat": as_chat, "loss_on": loss_on}
    [shortest, fits, *_] = tokenized(rows, tokenizer, **data).examples
    head = len(shortest.tokens) - 1
    found = tokenized(rows, tokenizer, **data, seq_len=head + 11)
    assert found.truncated == ["r2", "r3"] and not found.dropped
    for e in found.examples[1:]:
        assert e.tokens.tolist() == fits.tokens.tolist()
        assert (e.loss_from, e.answer_from) == (fits.loss_from, fits.answer_from)
        assert e.label == 1
    # Not even without the text is there room: cut at the end, as any row.
    tight = tokenized(rows[3:], tokenizer, **data, seq_len=head - 12)
    assert tight.dropped == ([] if loss_on == "all" else ["r0"])
    for e in tight.examples:
        assert (e.label, e.answer_from) == (-1, -1) and len(e.tokens) == head - 12


def test_the_longest_field_is_shortened_by_whole_characters(tmp_path):
    path = write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_file(path)
    row = {"a": "The cat", "text": "sat on " + "\U00013000" * 9, "b": "mat", "label": 0}
    data = {"chat": False, "template": "{a} | {text} | {b}: {label}"}
    whole = tokenized([row], tokenizer, **data).examples[0]
    for less in range(1, 37):
        found = tokenized([row], tokenizer, **data, seq_len=len(whole.tokens) - less)
        [e] = found.examples
        kept = 9 - -(-less // 4)
        text = f"The cat | sat on {chr(0x13000) * kept} | mat: negative"
        assert tokenizer.decode(e.tokens) == text and found.truncated == ["r0"]
        assert e.tokens[e.answer_from] == found.label_tokens[0]


def test_other_long_rows_are_cut_at_their_end(tokenizer):
    row = {"question": "q" * 30, "answer": "a" * 30}
    [whole] = tokenized([row], tokenizer).examples
    found = tokenized([row], tokenizer, seq_len=len(whole.tokens) - 9)
    assert found.truncated == ["r0"]
    assert found.examples[0].tokens.tolist() == whole.tokens.tolist()[:-9]
