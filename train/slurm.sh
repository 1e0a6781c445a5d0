#!/usr/bin/env bash
#SBATCH --job-name=tokgen
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# sbatch train/slurm.sh -c tokenizers/vqgan.yaml -c train/ddp.yaml
# sbatch --nodes 4 train/slurm.sh …
# Two minutes before the time is up every rank gets SIGUSR1: the run saves at the end of its step, puts the job back into
# the queue, and ends with code 143; it goes on where it was. SIGTERM, before a preemption, does the same.
# The run itself requeues, and not this script by the code: srun also gives 143 when one rank fails while the others still
# start, since it ends those with SIGTERM.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if [ -d .venv ]; then source .venv/bin/activate; fi
exec srun --kill-on-bad-exit=1 python -m tokgen fit "$@" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:-8}" --ckpt_path auto
