#!/usr/bin/env bash
#SBATCH --job-name=uft-table
#SBATCH --ntasks=1
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# The last job of a sweep: one table of all its runs. Submitted by sweep.sh: table.sh RECIPES SWEEP [key=value ...]
set -uo pipefail
original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\/table\.sh\).*/\1/p' | head -n 1)
# shellcheck source=slurm/launch.sh
. "$(dirname "$original")/launch.sh" || { echo "no launch.sh beside $original" >&2; exit 2; }
rm -rf "$1"     # the recipes of the jobs, which have ended
shift
_uft sweep "$@" --table
