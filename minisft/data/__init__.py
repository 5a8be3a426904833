"""Read conversation files, data sets and model folders that come from outside.

Dirty rows of many formats become `Conversation` objects, a `Ledger` counts what is dropped or
repaired, and `split` keeps the parts of one conversation on the same side. None of the input is
trusted.
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
