"""The chat templates by name. To add one, add an entry: no code outside `chat/` compares names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minisft.chat.mistral import VERSIONS, MistralTemplate
from minisft.chat.own_template import OwnTemplate
from minisft.chat.template import ChatTemplate
from minisft.errors import UserError

if TYPE_CHECKING:
    from minisft.chat.tokenizers import Tokenizer

OWN = "own"
TEMPLATES: dict[str, ChatTemplate] = {name: MistralTemplate(name) for name in VERSIONS} | {OWN: OwnTemplate()}
DEFAULT = "v1"  # its markers are plain text, so it works with every tokenizer and adds no embeddings


def template_named(name: str) -> ChatTemplate:
    """The template called `name`, not fitted to a tokenizer.

    Raises `UserError` if there is none.
    """
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is not known: use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def other_template(tokenizer: Tokenizer) -> str:
    """One sentence if the model has a chat template of its own and another one is used; else ""."""
    if tokenizer.template_name == OWN or not getattr(getattr(tokenizer, "hf", None), "chat_template", None):
        return ""
    return (
        f"{tokenizer.name} has a chat template of its own, and {tokenizer.template_name} is used instead: "
        "--template own uses it"
    )


def template_for(tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """The template that `tokenizer` is set up for.

    Raises `UserError` if `name` is another template.
    """
    if name is not None and template_named(name).name != tokenizer.template_name:
        raise UserError(f"tokenizer {tokenizer.name} is set up for template {tokenizer.template_name}, not {name}")
    return template_named(tokenizer.template_name).fitted_to(tokenizer)
