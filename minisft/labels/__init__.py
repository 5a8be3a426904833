"""Token ids and labels: which tokens of a row are trained.

`encode` makes one row of one conversation, `encode_stream` does so for whole data sets on all cores, the invariants
check every row, and the token lens shows it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "encode_dataset": ["encode_stream"],
        "encode_row": ["IGNORE_INDEX", "TRUNCATIONS", "Row", "encode"],
        "token_lens": ["lens", "token_losses"],
    },
)
