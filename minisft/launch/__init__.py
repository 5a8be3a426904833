"""Turns settings into a finished run: prepares its folder, starts its command, watches its ranks.

`prepare` writes the folder and the command. `launch` starts a supervisor, which runs the command on
this machine or on several, and ends every process whatever happens.
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
