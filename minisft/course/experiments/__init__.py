"""Experiments that a notebook runs: each starts real processes or trains a real model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "resharding": ["resume_matrix"],
        "rounding": ["distance_to_next", "move"],
    },
)
