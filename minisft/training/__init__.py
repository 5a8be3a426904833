"""What happens inside a rank: rows, batches, steps, checkpoints, metrics and heartbeats.

transformers' Trainer runs the steps; this room gives it exact batches, one loss for every strategy, and checkpoints
that appear whole or not at all.
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
