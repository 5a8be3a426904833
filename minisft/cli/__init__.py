"""The `minisft` command line: a thin layer over the package, with one function per command."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"entry": ["main"]})
