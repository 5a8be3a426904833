"""How good a checkpoint is: its answers, BLEU and chrF with intervals, its loss, and test questions it has seen.

Every score is computed on the same prompts that training's template builds, and is kept with what it was computed from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["answer_loss", "ask", "load_to_answer"],
        "bleu_breakdown": ["break_down_bleu"],
        "chat_session": ["SideBySideChat"],
        "contamination": ["Prompt", "find_overlaps", "trained_texts"],
        "eval_set": ["EvalSettings", "load_template", "make_eval_set", "prompt_ids"],
        "evaluate_checkpoints": ["evaluate_runs", "results_of"],
        "metrics": ["paired_bootstrap"],
        "report": ["side_by_side", "through_training"],
    },
)
