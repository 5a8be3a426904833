"""minisft: supervised fine-tuning and ZeRO, small enough to read, exact enough to trust.

Importing this package loads neither torch nor transformers; each module imports what it needs.
"""

__version__ = "0.1.0"
