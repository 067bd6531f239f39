"""Chat templates: messages -> text, rendered as transformers renders them.

A template is a jinja2 program that comes with a tokenizer. It runs in jinja2's immutable sandbox.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from gemma_lora.errors import UserError

Message = dict[str, Any]  # 'role' and 'content', and what else a template may read

_GEMMA = (
    "{{ bos_token }}{% set prefix = '' %}{% if messages[0]['role'] == 'system' %}"
    "SYSTEM"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the published templates of models whose files have none write for conversations in text: a
# token of the vocabulary -> template. The first that is there counts: the later model's words hold
# those of the earlier one.
BUILT_IN: dict[str, str] = {
    # Gemma 3, instruction-tuned.
    "<start_of_image>": _GEMMA.replace(
        "SYSTEM",
        "{% set prefix = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}",
    ),
    # Gemma 1 and 2, instruction-tuned.
    "<start_of_turn>": _GEMMA.replace(
        "SYSTEM", "{{ raise_exception('System role not supported') }}"
    ),
    # Qwen2.5-Instruct.
    "<tool_call>": _QWEN.replace(
        "SYSTEM", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    # Qwen2-Instruct.
    "<|im_start|>": _QWEN.replace("SYSTEM", "You are a helpful assistant."),
}


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
) -> str:
    """The conversation as text; with add_generation_prompt, and how the assistant's turn begins.

    Raises UserError for a template that is damaged or refuses the messages.
    """
    # A key whose value is None counts as absent, as in transformers.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        return _compiled(template).render(
            messages=messages,
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except Exception as e:  # a template is a program: it may raise anything
        raise UserError(f"the chat template refuses the conversation: {e}") from e


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's text, and renders as it."""

    tags = {"generation"}  # noqa: RUF012 jinja2's own declaration

    def parse(self, parser: Any) -> list[Any]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """transformers.utils.chat_template_utils' environment."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
