"""Measure checkpoints: answers, BLEU and chrF, loss, and contamination of test questions.

Every score uses prompts built by the training template, and is saved together with its inputs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["answer_loss", "ask", "load_to_answer"],
        "bleu_breakdown": ["break_down_bleu"],
        "chat_session": ["SideBySideChat"],
        "contamination": ["Beginning", "Prompt", "find_overlaps", "trained_texts", "words_of"],
        "eval_set": ["EvalSettings", "load_template", "make_eval_set", "prompt_ids"],
        "evaluate_checkpoints": ["evaluate_runs", "results_of"],
        "metrics": ["paired_bootstrap"],
        "report": ["side_by_side", "through_training"],
    },
)
