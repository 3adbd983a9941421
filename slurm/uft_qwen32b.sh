#!/usr/bin/env bash
#SBATCH --job-name=uft
#SBATCH --nodes=1                    # any number
#SBATCH --ntasks-per-node=1          # one launcher per node, which starts one process per GPU
#SBATCH --gpus-per-node=8            # nodes without GPUs: sbatch --gpus-per-node=0
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600          # ten minutes before the limit: checkpoint, requeue, resume
#SBATCH --requeue
#SBATCH --open-mode=append           # a requeued job keeps its log
#SBATCH --wait-all-nodes=1
#SBATCH --output=%x-%j.out
#
# Fine-tune Qwen2.5-32B by the recipe uft_qwen32b, or any model by another recipe:
#
#   sbatch slurm/uft_qwen32b.sh [RECIPE] [key=value ...]
#   sbatch --nodes=4 --partition=h100 --account=me --time=12:00:00 slurm/uft_qwen32b.sh my.yaml train.lr=1e-5
#   bash slurm/uft_qwen32b.sh my.yaml        submits itself, with the SBATCH_* of site.env
#
# Submit it from the folder to which the recipe's relative paths refer. The same command resumes a run that has ended early.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$here/launch.sh" ]; then
    # Slurm runs a copy of this file from its spool folder: find the original, which the job was submitted with.
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\.sh\).*/\1/p' | head -n 1)
    here=$(dirname "$original")
fi
# shellcheck source=slurm/launch.sh
. "$here/launch.sh" || { echo "$here: no launch.sh; it must lie beside the script that is submitted" >&2; exit 2; }
submit_itself "$here/$(basename "$0")" "$@"
with_recipe train uft_qwen32b "$@"
