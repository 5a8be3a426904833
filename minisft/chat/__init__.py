"""Chat templates and tokenizers: turn a conversation into segments, and segments into token ids.

A template labels each segment with its role and whether it is trained. A tokenizer encodes every
segment alone, so text never becomes a control token. mistral-common is the reference.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "mistral": ["VERSIONS", "MistralTemplate"],
        "own_template": ["template_of"],
        "registry": ["TEMPLATES", "template_for"],
        "template": ["ChatTemplate", "Segment"],
        "mistral_reference": ["reference"],
        "tokenizers": ["load_tokenizer"],
    },
)
