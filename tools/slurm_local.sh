#!/usr/bin/env bash
# A real one-node Slurm on loopback for tests, with two pretend GPUs. Needs Debian's slurm-wlm and munge, and root.
#
#   tools/slurm_local.sh up [FOLDER]       starts munged, slurmctld and slurmd; prints the line to put into a shell
#   tools/slurm_local.sh status [FOLDER]   exit code 0 when the node takes jobs
#   tools/slurm_local.sh down [FOLDER]     cancels its jobs and stops the daemons that `up` started, no others
#
# All files, logs and sockets are in FOLDER (default: /tmp/slurm_local), so an installed Slurm or munge is left alone.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
fail() { echo "error: $*" >&2; exit 2; }
(($# >= 1 && $# <= 2)) || usage
action=$1
dir=${2:-/tmp/slurm_local}
[[ $dir = /* ]] || dir=$PWD/$dir
[[ $dir != *' '* ]] || fail "Slurm reads no paths with spaces: choose another folder than $dir"
export SLURM_CONF=$dir/slurm.conf

# ours DAEMON: it runs, by its pid file, and is not some other process that got the number of one that is gone.
ours() {
    local file=$dir/run/$1.pid
    [[ -s $file && $(cat "/proc/$(<"$file")/comm" 2>/dev/null) == "$1" ]] &&
        tr '\0' '\n' <"/proc/$(<"$file")/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"
}

gone() { ! kill -0 "$1" 2>/dev/null; }
no_jobs() { [[ -z $(squeue --noheader) ]]; }

await() { # await SECONDS COMMAND...
    local tries=$(($1 * 5)); shift
    until "$@" >/dev/null 2>&1; do ((tries-- > 0)) || return 1; sleep 0.2; done
}

ready() { sinfo --noheader --format=%T --partition=debug | grep -qE '^(idle|mixed|allocated|completing)$'; }

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

configure() {
    local host cpus memory
    host=$(hostname -s)
    cpus=$(nproc)
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    # Two tasks must fit whatever the machine: on one core the node pretends to have two.
    ((cpus >= 2)) || cpus=2
    mkdir -p "$dir"/{state,spool,log,run}
    touch "$dir"/gpu0 "$dir"/gpu1
    chown munge: "$dir/run" 2>/dev/null || true
    head -c 1024 /dev/urandom >"$dir/run/munge.key"
    chown munge: "$dir/run/munge.key"
    chmod 600 "$dir/run/munge.key"
    chmod 755 "$dir" "$dir/run"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits cred_expire: 120 s by default, and also where less than 5 is given.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=requeue_delay=1,sched_interval=5,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=5
MinJobAge=60
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
    echo "NodeName=$host Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf"
    echo "CgroupAutomount=no" >"$dir/cgroup.conf"
}

up() {
    local tool
    for tool in munged slurmctld slurmd sinfo; do
        command -v "$tool" >/dev/null || fail "there is no $tool: apt-get install slurm-wlm munge"
    done
    ((EUID == 0)) || fail "starting Slurm needs root"
    if ours slurmctld; then fail "a cluster of this script is up in $dir: take it down first"; fi
    configure
    trap 'trap - ERR INT TERM; down; tail -n 5 "$dir"/log/*.log >&2; fail "Slurm did not start, see $dir/log"' \
        ERR INT TERM
    # munged wants to own its folder, and refuses one that others may enter through a writable parent.
    runuser -u munge -- munged --force --key-file="$dir/run/munge.key" --socket="$dir/run/munge.socket" \
        --pid-file="$dir/run/munged.pid" --log-file="$dir/run/munged.log" --seed-file="$dir/run/munge.seed" \
        2>>"$dir/log/munged.log"
    await 10 test -S "$dir/run/munge.socket"
    slurmctld 2>>"$dir/log/slurmctld.log"
    await 20 scontrol ping
    slurmd 2>>"$dir/log/slurmd.log"
    await 30 ready
    trap - ERR INT TERM
    echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
    local daemon pid
    if ours slurmctld && ours slurmd; then
        scancel --partition=debug --quiet || true
        await 20 no_jobs || true # their processes would outlive slurmd
    fi
    for daemon in slurmd slurmctld munged; do
        if ours "$daemon"; then
            pid=$(<"$dir/run/$daemon.pid")
            kill "$pid"
            await 10 gone "$pid" || kill -9 "$pid"
        fi
        rm -f "$dir/run/$daemon.pid"
    done
}

status() {
    local daemon
    for daemon in munged slurmctld slurmd; do
        ours "$daemon" || { echo "$daemon is not running"; return 1; }
    done
    sinfo
    ready
}

case $action in
    up | down | status) "$action" ;;
    *) usage ;;
esac
