"""Chat templates and tokenizers: from a conversation to segments of text and control tokens.

A template says who speaks in each segment and whether it is trained; a tokenizer encodes every segment alone, so text
never becomes a control token. Mistral's own library is the reference.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "mistral": ["VERSIONS", "MistralTemplate"],
        "registry": ["TEMPLATES", "template_for"],
        "template": ["ChatTemplate", "Segment"],
        "mistral_reference": ["reference"],
        "tokenizers": ["load_tokenizer"],
    },
)
