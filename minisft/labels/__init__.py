"""Make token ids and labels: which tokens of a row are trained.

`encode` turns one conversation into a row, `encode_stream` encodes whole data sets on all cores,
the invariants check rows, and the token lens shows them.
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
