"""The model: reading its config, safe loading, attention without padding, and the loss.

`minisft.zero` predicts the memory of these computations, and `minisft.training` runs them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configs": ["model_config"],
        "loading": ["load_model"],
    },
)
