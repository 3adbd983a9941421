# shellcheck shell=bash
# Functions that the batch scripts in this folder share; sourced, not run.
#
#   train RECIPE [key=value ...]     train on all nodes of this job, or resume the run in the output folder
#   submit_itself SCRIPT [...]       submit the script, if it is not in a job; ends this shell
#   with_recipe FUNCTION DEFAULT [RECIPE] [key=value ...]      call the function with the recipe, or else with DEFAULT
#
# It returns 0 if the run is done, 2 for an invalid recipe or invalid data, 3 if a check failed; such jobs are not started
# again. After a request to stop (time limit, pre-emption) or a crash (a rank killed, a node lost), the job is requeued and
# resumes from its newest checkpoint.
#
# Settings, in the environment or in site.env in this folder (site.env.example shows one), which each job also reads:
#   UFT_VENV             virtual environment with uft_ds                       [the active one]
#   UFT_EXEC             prefix of each command, such as a container's run     []
#   UFT_RANKS_PER_NODE   processes per node                                    [number of GPUs; 2 without GPUs]
#   UFT_NODE_TMP         folder on each node's own disk, for built kernels     [$TMPDIR, or /tmp]
#   UFT_MAX_RESTARTS     most restarts of a job, for any reason                [50]
#   UFT_MAX_CRASHES      most ends in a row without a new checkpoint           [3]
#   UFT_OFFLINE          1: models and data come from local caches only        [1]
#   UFT_SBATCH           options of sbatch when `bash slurm/...` submits       []

UFT_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -f "$UFT_SLURM/site.env" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$UFT_SLURM/site.env"
    set +a
fi
if [ -n "${UFT_VENV:-}" ]; then
    [ -x "$UFT_VENV/bin/python" ] || { echo "UFT_VENV=$UFT_VENV: no bin/python there" >&2; exit 2; }
    export PATH="$UFT_VENV/bin:$PATH"
fi

# SLURM_JOB_ID of the last array task equals the array's own ID, which means all tasks: use the ARRAY_TASK form instead.
_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
_job=${_job:-${SLURM_JOB_ID:-}}
_step=-1            # number of the newest job step: each srun is one
_asked=0            # 1 once the batch shell has received USR1
_ending=0           # 1 once it has received TERM: Slurm ends the job
_on=()              # options of srun: the nodes that train, if they are not all
_ended=0            # ends in a row without a new checkpoint; kept in a file from one start to the next
_ends=$PWD/.uft-ends-$_job
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! -f "$_ends" ] || read -r _ended <"$_ends"
[ -z "$_job" ] || rm -f "$_ends"

# shellcheck disable=SC2086
_run() { ${UFT_EXEC:-} "$@"; }
_uft() { _run python -m uft_ds "$@"; }
# Path and modification time: if a damaged checkpoint is set aside and its step is written again, that is progress. The
# checkpoint of step 0 has no time, because each start from it writes it again.
_newest_checkpoint() {
    find "$1/checkpoints" -maxdepth 1 -name 'step-*[0-9]' -printf '%p %T@\n' 2>/dev/null | sort | tail -n 1 |
        sed -E 's/(step-0+) .*/\1/'
}

# Retry: the job must not fail because the controller is busy for a moment.
_scontrol() {
    local tries
    for tries in 1 2 3 4 5 6; do
        scontrol "$@" && return 0
        [ "$tries" = 6 ] || sleep 10
    done
    return 1
}
_job_field() { _scontrol show job -o "$_job" | head -n 1 | grep -oE "(^| )$1=[^ ]*" | head -n 1 | sed 's/^[^=]*=//'; }

# Run a job step and wait for it, even if this shell receives signals in the meantime. After a request to stop, signal
# the step's processes repeatedly until they have ended: a process that has just started does not handle signals yet.
_step_of_job() {
    _step=$((_step + 1))
    srun "$@" &
    local srun_pid=$!
    while :; do
        if [ "$_asked" = 1 ]; then
            scancel --signal=USR1 "$_job.$_step" 2>/dev/null
            sleep 10 &
            wait -n "$srun_pid" $!
        else
            wait "$srun_pid"
        fi
        kill -0 "$srun_pid" 2>/dev/null || break
    done
    wait "$srun_pid" 2>/dev/null     # srun's own exit code: a signal may have ended the wait above
}

# Check that every node answers, sees its GPUs, the environment and the working folder, and can write to its own disk.
# It takes seconds; a start takes minutes. It ignores signals: a check that is killed says nothing of its node.
_check_nodes() {
    # shellcheck disable=SC2016
    _step_of_job --ntasks-per-node=1 --kill-on-bad-exit=1 --label \
        bash -c 'trap "" USR1 TERM; exec timeout --signal=KILL 300 bash -c "$@"' ignore '
        bad() { echo "$SLURMD_NODENAME: $*"; exit 1; }
        if [ "$1" -gt 0 ]; then
            command -v nvidia-smi >/dev/null || bad "$1 GPUs are granted, and there is no nvidia-smi"
            [ "$(nvidia-smi -L | wc -l)" -ge "$1" ] || bad "nvidia-smi sees fewer than the $1 GPUs that are granted"
        fi
        [ -d "$2" ] || bad "$2 is not there: is the file system shared?"
        probe=$3/.uft-$SLURM_JOB_ID-$SLURM_PROCID
        mkdir -p "$3" && touch "$probe" && rm "$probe" || bad "$3 cannot be written (UFT_NODE_TMP)"
        ${UFT_EXEC:-} python -c "import sys, torch, uft_ds; sys.exit(torch.cuda.device_count() < $1)" ||
            bad "uft_ds and torch cannot be imported by $(command -v python), or torch sees fewer than $1 GPUs (UFT_VENV)"
    ' check "${SLURM_GPUS_ON_NODE:-0}" "$PWD" "${UFT_NODE_TMP:-${TMPDIR:-/tmp}}"
}

_log_environment() {
    echo "=== job $_job restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST $(date -Is)"
    echo "=== master $MASTER_ADDR:$MASTER_PORT, $_num_nodes nodes x $_ranks ranks"
    echo "=== $(_uft --version), git $(git -C "$UFT_SLURM" describe --always --dirty --abbrev=40 2>/dev/null || echo none)"
    env | grep -E '^(SLURM_JOB|SLURM_NNODES|SLURM_GPUS|CUDA|NCCL|GLOO|TORCH|TRITON|HF_|TRANSFORMERS|OMP|UFT)' |
        grep -viE 'token|key|secret|password' | sort
}

_warn_of_a_short_limit() {
    local end seconds
    end=$(date -d "$(_job_field EndTime)" +%s 2>/dev/null) || return 0
    seconds=$((end - $(date +%s)))
    [ "$seconds" -ge 1200 ] ||
        echo "=== warning: $seconds s to the time limit, and the signal to save comes 600 s before it (#SBATCH --signal)"
}

submit_itself() {
    [ -n "${SLURM_JOB_ID:-}" ] && return
    # shellcheck disable=SC2086
    exec sbatch ${UFT_SBATCH:-} "$@"
}

with_recipe() {
    local function=$1 recipe=$2
    shift 2
    if [ -f "${1:-}" ] || { [ -n "${1:-}" ] && [[ $1 != *=* ]]; }; then
        recipe=$1
        shift
    fi
    "$function" "$recipe" "$@"
}

train() {
    mapfile -t _hosts < <(_job_hosts)
    _prepare "$@" || return $?
    _launch "$@"
    _decide
}

# Never localhost as a master: then each node would train alone.
_job_hosts() { _scontrol show hostnames "$SLURM_JOB_NODELIST"; }

_listen() {
    trap '_asked=1; echo "=== USR1: asked to stop, before the time limit or by hand $(date -Is)"' USR1
    trap '_ending=1; echo "=== TERM $(date -Is)"' TERM     # Slurm signals the steps itself; this shell must survive TERM
}

# The port must be free on the first node that trains, and this shell may be on another one.
_free_port() {
    local on=()
    [ "$1" = "${SLURMD_NODENAME:-$1}" ] || on=(timeout 300 srun --nodes=1 --ntasks=1 --nodelist="$1")
    # shellcheck disable=SC2086
    "${on[@]}" ${UFT_EXEC:-} python -c 'from uft_ds.host.ports import free_port; print(free_port())'
}

# Everything before the launch on the nodes in _hosts. If it does not return 0, nothing was started, and its code is the
# job's; a job that was asked to stop has been requeued.
_prepare() {
    local recipe=$1
    shift
    _listen
    _folder=$(_uft recipe show "$recipe" "$@" --key output) || return $?
    _ranks=${UFT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
    [ "$_ranks" -gt 0 ] || _ranks=2
    _num_nodes=${#_hosts[@]}
    MASTER_ADDR=${_hosts[0]:-}
    [ -n "$MASTER_ADDR" ] || { echo "no host name for $SLURM_JOB_NODELIST" >&2; return 1; }
    MASTER_PORT=$(_free_port "$MASTER_ADDR") || { echo "=== $MASTER_ADDR gives no free port" >&2; return 1; }
    [ "$MASTER_ADDR" = "${SLURMD_NODENAME:-$MASTER_ADDR}" ] || _step=$((_step + 1))     # that was a job step
    export MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_ON_NODE:-1} > _ranks ? SLURM_CPUS_ON_NODE / _ranks : 1))}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    if [ "${UFT_OFFLINE:-1}" = 1 ]; then export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1; fi
    # A new folder at each start, on the node's own disk: a build that was killed leaves a lock at which every later start
    # hangs (pytorch#189245), and nodes that share a folder race for that lock.
    UFT_NODE_CACHE=${UFT_NODE_TMP:-${TMPDIR:-/tmp}}/uft-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    export UFT_NODE_CACHE TORCH_EXTENSIONS_DIR=$UFT_NODE_CACHE/torch TRITON_CACHE_DIR=$UFT_NODE_CACHE/triton
    # A file for the outcome of this start: the status in the run's folder may be from an earlier start.
    UFT_OUTCOME=$PWD/.uft-outcome-$_job-${SLURM_RESTART_COUNT:-0}-$((_step + 1))
    export UFT_OUTCOME
    rm -f "$UFT_OUTCOME"

    _log_environment
    echo "=== recipe $recipe $*"
    _uft recipe show "$recipe" "$@" || return $?
    _warn_of_a_short_limit
    _before=$(_newest_checkpoint "$_folder")
    if ! _check_nodes || [ "$_asked" = 1 ]; then
        _is_asked_to_stop || [ "$(_job_field JobState)" != RUNNING ] || {
            echo "=== a node is not fit (above); nothing was started" >&2
            return 1
        }
        _come_back 85
        return $?
    fi
}

# Train on the nodes of _hosts; srun's exit code is left in _code.
_launch() {
    # Signals are ignored until a rank has installed its handler, and torchrun ignores them always: Slurm signals all
    # processes, and torchrun must survive that and must not shorten a pre-emption's grace time to its own 30 seconds.
    # shellcheck disable=SC2016
    _step_of_job "${_on[@]}" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --kill-on-bad-exit=1 \
        --wait=60 --label bash -c '
            trap "" USR1 TERM
            mkdir -p "$UFT_NODE_CACHE"
            exec ${UFT_EXEC:-} bash -c '\''
                trap "" USR1 TERM
                nodes=$1 ranks=$2; shift 2
                exec python -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks" \
                    --node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
                    --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT -m uft_ds.train "$@" --resume
            '\'' "$@"
        ' launch train "$_num_nodes" "$_ranks" "$@"
    _code=$?
    # shellcheck disable=SC2016
    srun "${_on[@]}" --ntasks-per-node=1 --overlap bash -c 'rm -rf "$UFT_NODE_CACHE"' 2>/dev/null
    _step=$((_step + 1))
}

# Decide by the outcome file (of rank 0, or of the first rank that failed) and by DONE, not by exit codes: srun has been
# seen to return 0 for a job that had lost a node, and launchers turn all codes into 1.
_decide() {
    local outcome=1
    if [ -f "$UFT_OUTCOME" ]; then
        outcome=$(sed -n 's/.*"exit_code": *\([0-9]*\).*/\1/p' "$UFT_OUTCOME")
        [ "$outcome" = 0 ] || echo "=== what torchrun and srun print above is their way to report this end:"
        _run python -c 'import json, sys; print(json.load(open(sys.argv[1]))["message"])' "$UFT_OUTCOME" | sed 's/^/=== /'
        rm -f "$UFT_OUTCOME"
    fi
    echo "=== outcome ${outcome:=1}, srun $_code $(date -Is)"
    case $outcome in
        2 | 3) return "$outcome" ;;
        0)
            if [ -e "$_folder/DONE" ]; then
                [ "$(_newest_checkpoint "$_folder")" = "$_before" ] || _ended=0    # not for a stage that was done already
                echo "=== done: $_folder"
                return 0
            fi
            outcome=1
            ;;
    esac
    if [ "$(_newest_checkpoint "$_folder")" = "$_before" ] && ! _is_preempted; then
        _may_end_without_progress || return 1
    else
        _ended=0
    fi
    _come_back "$outcome"
}

# Requeue the job, unless Slurm has already decided: after scancel, a lost node or Slurm's own requeue the job's state is
# COMPLETING, and a requeue would undo a scancel.
_come_back() {
    local outcome=$1 state
    state=$(_job_field JobState)
    if [ -n "$state" ] && [ "$state" != RUNNING ]; then
        echo "=== the job is $state"
        return "$outcome"
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${UFT_MAX_RESTARTS:-50}" ]; then
        echo "=== restarted ${SLURM_RESTART_COUNT} times (UFT_MAX_RESTARTS): giving up; sbatch it again to continue"
        return "$outcome"
    fi
    echo "=== requeued"
    [ "$_ended" = 0 ] || echo "$_ended" >"$_ends"
    if _scontrol requeue "$_job"; then
        sleep 600     # Slurm now ends the job and this shell
    else
        rm -f "$_ends"
    fi
    return "$outcome"
}

_is_asked_to_stop() { [ "$_asked" = 1 ] || _is_preempted; }

_is_preempted() {
    local preempted started
    preempted=$(_job_field PreemptTime)
    started=$(_job_field StartTime)
    [ -n "$preempted" ] && [ "$preempted" != None ] && [[ ! $preempted < $started ]]
}

# Count crashes and stops in a row without a new checkpoint, also if the run has no folder yet.
_may_end_without_progress() {
    _ended=$((_ended + 1))
    echo "=== ended $_ended times without a new checkpoint (UFT_MAX_CRASHES=${UFT_MAX_CRASHES:-3})"
    [ "$_ended" -lt "${UFT_MAX_CRASHES:-3}" ]
}
