"""A run: its settings, and the folder that connects the notebook and the training processes.

They share no memory. A run folder may come from somebody else, so every file in it is validated
against a declared shape when it is read.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["RunConfig"],
        "folder": ["Run", "all_runs", "outputs_root"],
    },
)
