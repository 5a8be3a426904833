"""ZeRO: what each strategy splits, and the bytes and traffic that follow from it, predicted and measured.

A prediction needs a model's config alone; a live engine is measured with the same owners, so the two can be compared
byte by byte.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "activation_trace": ["trace_activations"],
        "communication": ["bytes_sent", "predict_traffic"],
        "lint_config": ["lint"],
        "memory_report": ["Batch", "memory_of_model"],
        "parameter_shapes": ["Shapes"],
        "planner": ["plan"],
        "state_memory": [
            "FORMULAS",
            "OWNERS",
            "bytes_on_gpu",
            "generated_config",
            "paper_formula",
            "predict_states",
            "total_bytes",
        ],
    },
)
