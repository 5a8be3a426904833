"""What comes from outside: conversation files, data sets and models.

Dirty rows of many formats become `Conversation`s, a `Ledger` counts what is dropped or repaired, and `split` keeps the
parts of one conversation on one side. Nothing that is read here is trusted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversations": ["Conversation", "Message", "clean", "one_per_answer", "only_last_answer"],
        "download": ["find_data", "find_model"],
        "ledger": ["Ledger"],
        "read_files": ["read", "rows_of"],
        "splits": ["origin", "split"],
    },
)
