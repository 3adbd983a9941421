#!/usr/bin/env bash
#
# cluster.sh - a real, throw-away Slurm cluster of N "nodes" on one machine.
#
# For testing sbatch scripts (multi-node, requeue, pre-emption, arrays, node
# loss) in CI or on a laptop.  slurmctld + N slurmd + munged, all owned by the
# calling user (root or not), all bound to 127.0.0.1, all files below one state
# directory.  Nothing is installed: Debian's packages are downloaded (3.7 MB)
# and unpacked with dpkg -x, so no postinst runs, no service starts, /etc is
# not touched, and systemd is not needed.
#
#   cluster.sh up [--nodes N] [--gpus G] [--cpus C] [--mem MB] [--grace S]
#   eval "$(cluster.sh env)"       # puts sbatch, srun, ... on PATH
#   sbatch --wait my_job.sh ; squeue ; scontrol show job 1 ; sacct -c
#   cluster.sh status
#   cluster.sh kill-node node2     # power cut: slurmd, slurmstepd, tasks: SIGKILL
#   cluster.sh stop-node node2     # only its slurmd dies; the tasks live on
#   cluster.sh start-node node2    # the node comes back
#   cluster.sh down [--purge]      # ends everything by pid; --purge drops logs too
#
# Options (each also as an environment variable):
#   --nodes N     SLURM_FIXTURE_NODES  nodes node1..nodeN               [2]
#   --gpus G      SLURM_FIXTURE_GPUS   fake GPUs a node, 0 for none     [8]
#   --cpus C      SLURM_FIXTURE_CPUS   CPUs a node claims to have       [64]
#   --mem MB      SLURM_FIXTURE_MEM    memory a node claims to have     [512000]
#   --grace S     SLURM_FIXTURE_GRACE  seconds from SIGTERM to SIGKILL
#                                      when a job is pre-empted         [10]
#   --state DIR   SLURM_FIXTURE_DIR    state, one per cluster [/tmp/slurm-fixture-$UID]
#   --cache DIR   SLURM_FIXTURE_CACHE  unpacked packages, kept and shared
#                                      between clusters     [~/.cache/slurm-fixture]
#   Two clusters may run at once when their --state differs.
#
# What the cluster is like:
#   * partition "batch" (default): jobs can be pre-empted: SIGCONT+SIGTERM, S
#     seconds of grace, SIGKILL, requeue.  Partition "urgent" pre-empts it.
#   * fake GPUs are links to /dev/null: --gres=gpu:8, --gpus-per-node=8 and
#     --gpus-per-task=1 are granted and CUDA_VISIBLE_DEVICES is set; nothing
#     can compute on them.
#   * CPUs and memory are not enforced (task/none, no cgroups).
#   * node1..nodeN resolve to 127.0.0.11, .12, ... inside jobs, by libnss_wrapper
#     (LD_PRELOAD set through TaskProlog); `eval "$(... env)"` does so outside.
#     All nodes share one network stack and one hostname: a script that wrongly
#     uses localhost as the master address still works here, so assert on
#     MASTER_ADDR in the test.  SLURMD_NODENAME tells the nodes apart.
#   * sacct needs slurmdbd + MariaDB and says "accounting storage is disabled";
#     `sacct -c` (jobcomp/filetxt) and `scontrol show job` (ended jobs are kept
#     for an hour) serve tests instead.
#   * short timers: a requeued job may start again after 5 s (production: 120 s),
#     a dead slurmd is noticed in 10-20 s (300 s), KillWait 5 s (30 s).
#   * time limits are whole minutes and looked at every 30 s: to test
#     `#SBATCH --signal=B:USR1@120` without waiting for minutes, send the signal:
#     scancel --batch --signal=USR1 JOBID   (for B:) or
#     scancel --signal=USR1 JOBID           (steps only, no B:).
set -euo pipefail

NODES=${SLURM_FIXTURE_NODES:-2}
GPUS=${SLURM_FIXTURE_GPUS:-8}
CPUS=${SLURM_FIXTURE_CPUS:-64}
MEM=${SLURM_FIXTURE_MEM:-512000}
GRACE=${SLURM_FIXTURE_GRACE:-10}
STATE=${SLURM_FIXTURE_DIR:-/tmp/slurm-fixture-$(id -u)}
CACHE=${SLURM_FIXTURE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/slurm-fixture}
PURGE=0
UP_TIMEOUT=60

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# --------------------------------------------------------------- packages ----

ARCH=$(gcc -print-multiarch 2>/dev/null || true)
[ -n "$ARCH" ] || ARCH=$(uname -m)-linux-gnu

# Two clusters may start at once, and two apt-get in one folder damage each
# other's lists.  The lock ends with the subshell: daemons must not inherit it.
fetch_packages() {
    mkdir -p "$CACHE"
    (flock 9; if [ ! -e "$CACHE/root/.complete" ]; then unpack_packages; fi) 9>"$CACHE/lock"
}

# Unpacks Debian's Slurm below $CACHE/root, with whatever libraries this
# machine lacks.  apt's lists and archives live in $CACHE too: no root, and no
# lock of apt's own.
unpack_packages() {
    command -v apt-get >/dev/null || die "needs apt-get (Debian or Ubuntu)"
    mkdir -p "$CACHE/apt/lists/partial" "$CACHE/apt/archives/partial" "$CACHE/debs"
    local -a apt=(-qq -o "Dir::State::lists=$CACHE/apt/lists" -o "Dir::Cache=$CACHE/apt"
                  -o Debug::NoLocking=1 -o "APT::Sandbox::User=$(id -un)")
    local -a want=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libmunge2 libnss-wrapper)
    local -a missing
    say "fetching Debian's Slurm into $CACHE"
    apt-get "${apt[@]}" update
    # what apt would add to this machine, plus our own list even if it is installed
    mapfile -t missing < <({ apt-get "${apt[@]}" -s --no-install-recommends install "${want[@]}" |
                             awk '/^Inst /{print $2}'; printf '%s\n' "${want[@]}"; } | sort -u)
    (cd "$CACHE/debs" && apt-get "${apt[@]}" download "${missing[@]}")
    rm -rf "$CACHE/root.new"
    mkdir -p "$CACHE/root.new"
    local deb
    for deb in "$CACHE"/debs/*.deb; do dpkg -x "$deb" "$CACHE/root.new"; done
    # The daemons look at their own name (run_in_daemon("slurmctld,slurmd")):
    # started as slurmd-wlm, as Debian calls the file, they ignore Gres=.
    local b
    for b in slurmctld slurmd slurmstepd; do
        [ -e "$CACHE/root.new/usr/sbin/$b" ] || ln -s "$b-wlm" "$CACHE/root.new/usr/sbin/$b"
    done
    touch "$CACHE/root.new/.complete"
    rm -rf "$CACHE/root" && mv "$CACHE/root.new" "$CACHE/root"
}

set_paths() {
    ROOT=$CACHE/root
    LIB=$ROOT/usr/lib/$ARCH
    LIBPATH=$LIB:$LIB/slurm-wlm:$ROOT/lib/$ARCH
    CONF=$STATE/slurm.conf
    for LD_SO in /lib64/ld-linux-x86-64.so.2 /lib/ld-linux-aarch64.so.1; do
        [ ! -e "$LD_SO" ] || break
    done
}

# Runs a program from the unpacked root.  The client commands go through the
# loader's --library-path, so that no LD_LIBRARY_PATH leaks into jobs.
daemon() { env -u SLURM_CONF LD_LIBRARY_PATH="$LIBPATH" "$@"; }
client() { SLURM_CONF=$CONF "$STATE/bin/$1" "${@:2}"; }

# ------------------------------------------------------------------ files ----

free_port_base() {
    local want=$((2 + NODES)) base p try
    for try in $(seq 50); do
        base=$((20000 + (RANDOM % 10000)))      # below the ephemeral range
        for ((p = base; p < base + want; p++)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null; then continue 2; fi
        done
        echo "$base"
        return
    done
    die "no free ports"
}

write_files() {
    local user base i prog
    user=$(id -un)
    base=$(free_port_base)
    mkdir -p "$STATE"/{bin,ctld,dev,log,munge,pid,run,spool}
    chmod 755 "$STATE" "$STATE/run"             # munged insists
    chmod 700 "$STATE/munge"

    (umask 077; head -c 128 /dev/urandom >"$STATE/munge/munge.key")

    printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$STATE/hosts"
    for ((i = 1; i <= NODES; i++)); do
        # the v4-mapped line: libnss_wrapper answers an AF_INET6 query for a name
        # with only an IPv4 line by an error on which torch's TCPStore gives up
        printf '127.0.0.%d node%d\n::ffff:127.0.0.%d node%d\n' $((10 + i)) "$i" $((10 + i)) "$i" >>"$STATE/hosts"
    done
    for ((i = 0; i < GPUS; i++)); do ln -sf /dev/null "$STATE/dev/nvidia$i"; done

    for prog in "$ROOT"/usr/bin/{s[a-z]*,munge,unmunge}; do
        prog=${prog##*/}
        cat >"$STATE/bin/$prog" <<-SH
	#!/bin/sh
	export SLURM_CONF='$CONF'
	exec $LD_SO --argv0 $prog --library-path '$LIBPATH' '$ROOT/usr/bin/$prog' "\$@"
	SH
        chmod +x "$STATE/bin/$prog"
    done

    # Runs before each batch script and task; its "export" lines land in their environment.
    cat >"$STATE/bin/task_prolog" <<-SH
	#!/bin/sh
	case ":\$PATH:" in *:'$STATE/bin':*) ;; *) echo "export PATH=$STATE/bin:\$PATH" ;; esac
	echo "export SLURM_CONF=$CONF"
	echo "export NSS_WRAPPER_HOSTS=$STATE/hosts"
	echo "export LD_PRELOAD=$LIB/libnss_wrapper.so"
	SH
    chmod +x "$STATE/bin/task_prolog"

    cat >"$CONF" <<-CONF
	ClusterName=fixture
	SlurmctldHost=$(hostname -s)(127.0.0.1)
	SlurmctldPort=$base
	SlurmUser=$user
	SlurmdUser=$user
	# loopback only
	CommunicationParameters=NoInAddrAny
	AuthType=auth/munge
	CredType=cred/munge
	# cred_expire is also how long a requeued job waits before it may start
	AuthInfo=socket=$STATE/run/munge.sock,cred_expire=5
	PluginDir=$LIB/slurm-wlm
	StateSaveLocation=$STATE/ctld
	SlurmdSpoolDir=$STATE/spool/%n
	SlurmctldPidFile=$STATE/pid/slurmctld
	SlurmdPidFile=$STATE/pid/slurmd-%n
	SlurmctldLogFile=$STATE/log/slurmctld.log
	SlurmdLogFile=$STATE/log/slurmd-%n.log
	TaskProlog=$STATE/bin/task_prolog
	MailProg=/bin/true
	# nothing that needs root, cgroups or a database
	ProctrackType=proctrack/linuxproc
	TaskPlugin=task/none
	JobAcctGatherType=jobacct_gather/none
	AccountingStorageType=accounting_storage/none
	JobCompType=jobcomp/filetxt
	JobCompLoc=$STATE/log/jobcomp.log
	MpiDefault=none
	SwitchType=switch/none
	# as production clusters do
	SelectType=select/cons_tres
	SelectTypeParameters=CR_Core_Memory
	DefMemPerCPU=1000
	# believe slurm.conf, not the hardware
	SlurmdParameters=config_overrides
	PreemptType=preempt/partition_prio
	PreemptMode=REQUEUE
	JobRequeue=1
	# quick
	SchedulerType=sched/backfill
	SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
	KillWait=5
	SlurmdTimeout=10
	SlurmctldTimeout=10
	BatchStartTimeout=10
	MessageTimeout=10
	UnkillableStepTimeout=15
	InactiveLimit=0
	MinJobAge=3600
	ReturnToService=2
	CONF
    local gres=
    if [ "$GPUS" -gt 0 ]; then
        echo 'GresTypes=gpu' >>"$CONF"
        gres="Gres=gpu:$GPUS"
        printf 'AutoDetect=off\nNodeName=node[1-%d] Name=gpu File=%s/dev/nvidia[0-%d]\n' \
            "$NODES" "$STATE" $((GPUS - 1)) >"$STATE/gres.conf"
    fi
    for ((i = 1; i <= NODES; i++)); do
        echo "NodeName=node$i NodeAddr=127.0.0.1 Port=$((base + i)) CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN" >>"$CONF"
    done
    cat >>"$CONF" <<-CONF
	PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE MaxTime=INFINITE State=UP
	PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
	CONF
    sed -i 's/^\t*//' "$CONF"
}

# -------------------------------------------------------------- processes ----

# The pid in pid file $1, if it is alive and really ours (its command line
# names this state directory): a reused pid is never signalled.
live_pid() {
    local pid
    pid=$(cat "$STATE/pid/$1" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] || return 1
    grep -qF "$STATE/" <({ tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null) || return 1
    echo "$pid"
}

stop_one() {            # pid file, signal
    local pid i
    pid=$(live_pid "$1") || { rm -f "$STATE/pid/$1"; return 0; }
    kill "-${2:-TERM}" "$pid" 2>/dev/null || true
    for i in $(seq 50); do
        live_pid "$1" >/dev/null || break
        sleep 0.1
    done
    if pid=$(live_pid "$1"); then kill -KILL "$pid" 2>/dev/null || true; fi
    rm -f "$STATE/pid/$1"
}

# Processes of this cluster's jobs (on node $1, or on all): slurmstepd and what
# it started.  Both conditions are needed: the caller's own shell has SLURM_CONF
# too, and other clusters have jobs too.
job_pids() {
    local d pid env
    for d in /proc/[0-9]*; do
        pid=${d#/proc/}
        [ "$pid" != $$ ] && [ -O "$d" ] || continue
        env=$({ tr '\0' '\n' <"$d/environ"; } 2>/dev/null) || continue
        if grep -qxF "SLURM_CONF=$CONF" <<<"$env" && grep -q '^SLURM_JOB_ID=' <<<"$env"; then
            [ -z "${1:-}" ] || grep -qxF "SLURMD_NODENAME=$1" <<<"$env" || continue
            echo "$pid"
        fi
    done
    # slurmstepd renames itself; its socket in the spool directory names it
    for d in "$STATE/spool/${1:-}"*/*_[0-9]*.*; do
        [ -S "$d" ] || continue
        stepd_pid "$d"
    done
    return 0
}

stepd_pid() {           # the process listening on unix socket $1
    local inode p
    inode=$(awk -v s="$1" '$8 == s && $4 == "00010000" {print $7; exit}' /proc/net/unix)
    [ -n "$inode" ] || return 0
    for p in /proc/[0-9]*; do
        [ "$(cat "$p/comm" 2>/dev/null)" = slurmstepd ] || continue
        if ls -l "$p/fd" 2>/dev/null | grep -qF "socket:[$inode]"; then echo "${p#/proc/}"; return 0; fi
    done
}

start_node() {
    live_pid "slurmd-$1" >/dev/null && return
    mkdir -p "$STATE/spool/$1"
    daemon "$ROOT/usr/sbin/slurmd" -N "$1" -f "$CONF" -d "$ROOT/usr/sbin/slurmstepd"
}

# --------------------------------------------------------------- commands ----

cmd_up() {
    local i t0=$SECONDS
    [ "$NODES" -ge 1 ] && [ "$NODES" -le 200 ] || die "--nodes must be 1..200"
    if live_pid slurmctld >/dev/null; then die "already up in $STATE (down first)"; fi
    fetch_packages
    set_paths
    cmd_down_quiet
    rm -rf "$STATE"
    write_files
    trap 'say "could not start; logs: $STATE/log"; tail -n 5 "$STATE"/log/*.log >&2 || true; cmd_down_quiet' ERR
    daemon "$ROOT/usr/sbin/munged" --num-threads=4 \
        --socket="$STATE/run/munge.sock" --key-file="$STATE/munge/munge.key" \
        --log-file="$STATE/munge/munged.log" --pid-file="$STATE/munge/munged.pid" \
        --seed-file="$STATE/munge/munged.seed"
    cp "$STATE/munge/munged.pid" "$STATE/pid/munged"
    daemon "$ROOT/usr/sbin/slurmctld" -c -f "$CONF"
    for ((i = 1; i <= NODES; i++)); do start_node "node$i"; done
    for ((i = 0; i < UP_TIMEOUT * 5; i++)); do
        [ "$(client sinfo -h -N -p batch -t idle -o %N 2>/dev/null | wc -l)" = "$NODES" ] && break
        sleep 0.2
    done
    [ "$(client sinfo -h -N -p batch -t idle -o %N | wc -l)" = "$NODES" ]
    trap - ERR
    say "up: $NODES nodes, $GPUS fake GPUs each, in $((SECONDS - t0)) s; eval \"\$($0 env --state $STATE)\""
}

cmd_down_quiet() {
    local f pid i left
    [ -d "$STATE/pid" ] || return 0
    if live_pid slurmctld >/dev/null && live_pid munged >/dev/null; then
        timeout 10 env SLURM_CONF="$CONF" "$STATE/bin/squeue" -h -o %A 2>/dev/null |
            sort -u | xargs -r timeout 10 env SLURM_CONF="$CONF" "$STATE/bin/scancel" 2>/dev/null || true
        for i in $(seq 40); do
            [ -z "$(timeout 5 env SLURM_CONF="$CONF" "$STATE/bin/squeue" -h 2>/dev/null)" ] && break
            sleep 0.25
        done
    fi
    left=$(job_pids)
    for f in "$STATE"/pid/slurmd-*; do [ -e "$f" ] && stop_one "${f##*/}"; done
    stop_one slurmctld
    for pid in $left; do kill -KILL "$pid" 2>/dev/null || true; done
    stop_one munged
}

cmd_status() {
    local f name rc=0
    [ -d "$STATE/pid" ] || { echo "down (no $STATE)"; return 3; }
    for name in munged slurmctld $(cd "$STATE/pid" && ls -d slurmd-* 2>/dev/null); do
        if f=$(live_pid "$name"); then echo "$name: pid $f"; else echo "$name: not running"; rc=3; fi
    done
    if live_pid slurmctld >/dev/null; then client sinfo -N -l; client squeue; fi
    return $rc
}

cmd_env() {
    [ -e "$CONF" ] || die "no cluster in $STATE"
    cat <<-SH
	export SLURM_CONF='$CONF'
	export NSS_WRAPPER_HOSTS='$STATE/hosts'
	case ":\$PATH:" in *:'$STATE/bin':*) ;; *) export PATH='$STATE/bin':"\$PATH" ;; esac
	SH
}

[ $# -ge 1 ] || { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
CMD=$1; shift
NODE=
while [ $# -gt 0 ]; do
    case $1 in
        --nodes) NODES=$2; shift 2 ;;
        --gpus)  GPUS=$2;  shift 2 ;;
        --cpus)  CPUS=$2;  shift 2 ;;
        --mem)   MEM=$2;   shift 2 ;;
        --grace) GRACE=$2; shift 2 ;;
        --state) STATE=$2; shift 2 ;;
        --cache) CACHE=$2; shift 2 ;;
        --purge) PURGE=1;  shift ;;
        node[0-9]*) NODE=$1; shift ;;
        *) die "unknown argument: $1" ;;
    esac
done
case $STATE in /*) ;; *) STATE=$PWD/$STATE ;; esac
case $CACHE in /*) ;; *) CACHE=$PWD/$CACHE ;; esac
set_paths

case $CMD in
    up)     cmd_up ;;
    down)   cmd_down_quiet; [ "$PURGE" = 0 ] || rm -rf "$STATE"; say "down" ;;
    status) cmd_status ;;
    env)    cmd_env ;;
    start-node) [ -n "$NODE" ] || die "which node?"; start_node "$NODE" ;;
    stop-node)  [ -n "$NODE" ] || die "which node?"; stop_one "slurmd-$NODE" ;;
    kill-node)  [ -n "$NODE" ] || die "which node?"
                pids=$(job_pids "$NODE"); stop_one "slurmd-$NODE" KILL
                for pid in $pids; do kill -KILL "$pid" 2>/dev/null || true; done ;;
    *) die "unknown command: $CMD" ;;
esac
