"""Figures for the notebooks: each returns a `Picture` with alt text and a title with its message."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "blocks": ["collectives", "stages_by_rank"],
        "evaluation": ["interval_widths", "scores_over_steps"],
        "masks": ["batch_layouts", "bugs_on_rows", "losses_before_and_after", "truncation_bars"],
        "plan": ["plan_bars"],
        "runs": ["before_and_after", "comparison", "loss_curves", "memory_bars"],
        "step_memory": ["step_timeline"],
        "tokens": ["token_flow", "token_lanes"],
        "zero": [
            "against_ranks",
            "communication",
            "paper_bars",
            "partition_map",
            "predicted_bars",
        ],
    },
)
