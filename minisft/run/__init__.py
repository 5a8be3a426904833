"""A run: its settings, and the folder that the notebook and the training process share.

The two never share memory. A run folder may come from somebody else, so every file in it is read into a checked shape.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["RunConfig"],
        "folder": ["Run", "all_runs", "outputs_root"],
    },
)
