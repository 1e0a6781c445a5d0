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
# Two minutes before the time is up every rank gets SIGUSR1: the run saves at the end of its step, ends with code 143,
# and is queued again; it goes on where it was.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -d .venv ] && source .venv/bin/activate
srun --kill-on-bad-exit=1 python -m tokgen fit "$@" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:-8}" --ckpt_path auto
code=$?
if [ "$code" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
