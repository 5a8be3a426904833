"""Notebook-only code: predictions, exercises, example bugs, figures, experiments and the runner.

Only the command line imports this subpackage.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bug_museum": ["BUGS", "logits_moved"],
        "buggy_rows": ["right_row", "talk"],
        "classroom": ["exercise", "predict", "reveal", "review"],
        "small_model": ["small_model"],
    },
)
