#!/usr/bin/env bash
# A run on GPU nodes under SLURM, one task a GPU. Set the lines below to your cluster, then
#
#   sbatch --nodes=2 launch/slurm.sh launch.safepatch --config=configs/llama3_8b_instruct.py --mesh=fsdp:-1 \
#       --model.source=/shared/llama3 --workdir=/shared/runs/llama3 --run.cache_dir=/shared/cache
#
# Five minutes before the time limit SLURM sends SIGTERM: training is saved, and the job is queued again, which resumes the
# run. So does the same command at any later time; scancel ends it for good. Model, data, workdir and cache lie on a file
# system that all nodes share. Start it in this repository, whose .venv all nodes see (pip install -e '.[cuda]').
#SBATCH --job-name=safepatch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=safepatch-%j.log
set -euo pipefail

if [[ ${1-} != launch.* ]]; then
  printf 'error: name a launcher first, such as launch.safepatch; its flags follow.\n' >&2
  exit 2
fi
launcher=$1
shift
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92} # JAX's own share is 0.75

code=0
srun .venv/bin/python -m "$launcher" --distributed "$@" || code=$?
# 143: SIGTERM, 75: another host vanished. In both cases the same command goes on from what is saved.
if [[ ($code -eq 143 || $code -eq 75) && ${SLURM_RESTART_COUNT:-0} -lt 20 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
