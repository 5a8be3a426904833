"""The model: its config, loading it safely, attention without padding, and the loss at the trained positions.

`zero` predicts the memory of what is computed here, and `training` runs it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configs": ["model_config"],
        "loading": ["load_model"],
    },
)
