"""Everything inside a rank: rows, batches, steps, checkpoints, metrics and heartbeats.

transformers' Trainer runs the steps; this package gives it exact batches, one loss for every
strategy, and checkpoints that are written atomically.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint_health": ["checkpoint_problem"],
        "collators": ["PadRight"],
        "dataset": ["load_rows"],
        "heartbeat": ["read_heartbeats"],
    },
)
