"""Messages of a conversation to the text that a model was trained to answer: the image's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typebar.host.facts import ImageFacts
from typebar.isa.errors import TypebarError

Messages = Sequence[Mapping[str, str]]
"""Each with `role` (such as system, user or assistant) and `content`."""


def chat_prompt(facts: ImageFacts, messages: Messages) -> str:
    """The text of a conversation up to where the model's answer begins.

    Raises:
        TypebarError: the image has no chat template, the messages are none, or the template refuses them.
    """
    if facts.chat_template is None:
        raise TypebarError("the image has no chat template: give a prompt instead of messages")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not len(messages):
        raise TypebarError(f"messages must be a list of at least one, each with role and content, not {messages!r}")
    plain = []
    for item in messages:
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in ("role", "content")):
            raise TypebarError(f"a message needs role and content, both text, not {item!r}")
        plain.append(dict(item))
    try:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise TypebarError(f"chat templates need jinja2 ({error}): pip install jinja2") from None
    try:
        texts, _ = render_jinja_template(
            [plain], chat_template=facts.chat_template, add_generation_prompt=True, **facts.special_tokens
        )
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TypebarError(f"the image's chat template refuses the messages: {line}") from None
    text: str = texts[0]
    return text
