"""What only the lessons need: exercises, the bug museum, figures, experiments, and the notebook runner.

Nothing else in the package imports this room.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bug_museum": ["BUGS", "logits_moved", "right_row", "talk"],
        "exercises": ["check", "small_model"],
    },
)
