"""From settings to a finished run: prepare its folder, start its command, watch the ranks, leave no process behind.

`prepare` writes the folder and the command; `launch` starts a supervisor, which starts the command on this machine or
on many, and ends every process whatever happens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "commands": ["explain", "slurm_script"],
        "compare_runs": ["comparison_frames", "verdict"],
        "hosts": ["Place"],
        "launch_run": ["launch"],
        "prepare_run": ["prepare"],
    },
)
