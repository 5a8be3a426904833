"""The `minisft` command: a thin layer over the package, one function per verb."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"entry": ["main"]})
