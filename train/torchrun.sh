#!/usr/bin/env bash
# Train on all GPUs of this machine, or of several:
#   train/torchrun.sh -c tokenizers/vqgan.yaml -c train/ddp.yaml
#   NODES=4 NODE_RANK=0 MASTER=host:29500 train/torchrun.sh …      (on each machine, with its own NODE_RANK)
#   GPUS=2 train/torchrun.sh -c … -c train/cpu.yaml                 (without a GPU: that many processes)
# A rank that dies is restarted with all others, from the last checkpoint, up to RESTARTS times. SIGTERM and SIGUSR1 reach
# the ranks: the run saves at the end of its step and ends. torchrun kills what is left after 30 seconds, or after
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT.
set -euo pipefail
cd "$(dirname "$0")/.."
# without this, restarted ranks can meet the addresses of the dead attempt (pytorch/pytorch#135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
gpus=${GPUS:-$(python -c 'import torch; print(max(torch.accelerator.device_count(), 1))')}
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$gpus" \
  --rdzv-backend "${RDZV:-c10d}" --rdzv-endpoint "${MASTER:-localhost:29500}" --max-restarts "${RESTARTS:-2}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m tokgen fit "$@" --trainer.num_nodes "${NODES:-1}" --trainer.devices "$gpus" --ckpt_path auto
