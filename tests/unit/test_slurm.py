"""The job script, with scripts in place of the commands of SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "slurm" / "fit.sbatch"


@pytest.mark.parametrize("code", [0, 2, 143])
def test_only_a_job_that_received_a_stop_signal_is_requeued(tmp_path, code):
    for name, exit_code in (("srun", code), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*"\nexit {exit_code}\n')
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "--config", "a b.yaml"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    first, *rest = completed.stdout.splitlines()
    assert completed.returncode == code
    assert first.startswith("srun softprompt fit --config a b.yaml --run.experiment job-7 --ckpt_path last ")
    assert first.endswith("--trainer.num_nodes 2 --trainer.devices 4")
    assert rest == (["scontrol requeue 7"] if code == 143 else [])
    assert "#SBATCH --signal=USR1@" in SCRIPT.read_text()
