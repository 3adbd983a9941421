#!/usr/bin/env bash
#SBATCH --job-name=uft-online
#SBATCH --nodes=2                    # two or more: the first one serves, the others train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600          # ten minutes before the limit: checkpoint, requeue, resume
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --wait-all-nodes=1
#SBATCH --output=%x-%j.out
#
# Train online: a vLLM server on the job's first node gives the policy's answers, the other nodes train.
#
#   sbatch slurm/online.sh [RECIPE] [key=value ...]          without a recipe: uft_online_qwen32b
#   bash slurm/online.sh my.yaml                             submits itself, with the SBATCH_* of site.env
#
# UFT_VLLM must name vLLM's own environment (site.env.example); server.sh lists the settings. generator.by and
# generator.url are set here. The output must be on a disk that all nodes see: the server reads adapters from it.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$here/server.sh" ]; then
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\.sh\).*/\1/p' | head -n 1)
    here=$(dirname "$original")
fi
# shellcheck source=slurm/server.sh
. "$here/server.sh" || { echo "$here: no server.sh and launch.sh; they must lie beside the script that is submitted" >&2; exit 2; }
submit_itself "$here/$(basename "$0")" "$@"
with_recipe train_online uft_online_qwen32b "$@"
