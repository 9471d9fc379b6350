#!/usr/bin/env bash
# A real Slurm cluster with ssh on one Debian machine, for tests. Needs root, not systemd.
#
#   cluster.sh install            the packages, where they are missing
#   cluster.sh up N               start head and node1 .. nodeN in the background
#   cluster.sh down               end them; only packages are left
#   cluster.sh hold N             up, one line on stdout when all nodes are idle, down at the end of stdin
#   cluster.sh exec HOST CMD ...  run a command there, in this directory and environment
#   cluster.sh poweroff HOST | poweron HOST | link HOST up|down | status
#
# A host is a bash as PID 1 of network, hostname, IPC, mount and process namespaces of its own, with munged, sshd and
# slurmctld or slurmd. head (10.77.0.1) has the bridge; nothing is created outside the namespaces, and they have no way
# out. /tmp, /run and /dev/shm are private to a host, everything else is the machine's. Hosts die with the process that
# holds them. CLUSTER_DIR keeps keys, configuration and logs; CLUSTER_SHARED, a directory above it or the same, and this
# checkout are seen by all hosts even below /tmp. NODE_CPUS, NODE_MEMORY_MB and NODE_GPUS are what nodes pretend to have.
set -euo pipefail

self=$(readlink -f "${BASH_SOURCE[0]}")
checkout=$(dirname "$(dirname "$(dirname "$self")")")
dir=${CLUSTER_DIR:-/tmp/harness-cluster}
shared=${CLUSTER_SHARED:-$dir}
cpus=${NODE_CPUS:-4} memory=${NODE_MEMORY_MB:-4000} gpus=${NODE_GPUS:-4}
network=10.77.0
packages=(slurmctld slurmd slurm-client munge openssh-server pdsh openmpi-bin iproute2 procps)

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

wait_for() { # SECONDS CMD ...
    local deadline=$((SECONDS + $1))
    until "${@:2}"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.05
    done
}

install() {
    [ "$(id -u)" = 0 ] || fail "needs root"
    unshare --net --uts --ipc --mount --pid --fork --mount-proc true || fail "namespaces are not allowed here"
    ! dpkg -s "${packages[@]}" > /dev/null 2>&1 || return 0
    command -v apt-get > /dev/null || fail "needs these packages of Debian: ${packages[*]}"
    # Daemons that the packages start end with the process namespace.
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive unshare --pid --fork --mount-proc \
        apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2
}

configure() { # N
    mkdir -p "$dir"/{hosts,log,slurm,slurm-state,ssh,gpus}
    mkfifo "$dir/tether"
    (umask 077 && head -c 128 /dev/urandom > "$dir/munge.key")
    ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/host"
    ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/user"
    cat > "$dir/ssh/sshd_config" << END
HostKey $dir/ssh/host
AuthorizedKeysFile $dir/ssh/user.pub
StrictModes no
PermitRootLogin yes
MaxStartups 100
UseDNS no
PidFile none
END
    cat > "$dir/ssh/ssh_config" << END
Host *
    IdentityFile $dir/ssh/user
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
END
    echo "127.0.0.1 localhost" > "$dir/etc-hosts"
    for host in head $(nodes "$1"); do
        mkdir "$dir/hosts/$host"
        echo "$(address "$host") $host" >> "$dir/etc-hosts"
    done
    configure_slurm "$1"
}

configure_slurm() { # N
    local gpu
    for ((gpu = 0; gpu < gpus; gpu++)); do
        mknod "$dir/gpus/nvidia$gpu" c 1 3 # slurmd wants a character device and does not open it; these are /dev/null
    done
    echo "NodeName=node[1-$1] Name=gpu File=$dir/gpus/nvidia[0-$((gpus - 1))]" > "$dir/slurm/gres.conf"
    cat > "$dir/slurm/slurm.conf" << END
ClusterName=test
SlurmctldHost=head
SlurmUser=root
StateSaveLocation=$dir/slurm-state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdSpoolDir=/run/slurmd
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdPidFile=/run/slurmd.pid
MailProg=/bin/true
# No cgroups, no accounting, nodes with more cores than the machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
MinJobAge=3600
# Seconds where Slurm's own defaults are minutes. A requeued job waits for cred_expire before it starts again.
AuthInfo=cred_expire=5
SchedulerParameters=bf_interval=5,sched_interval=5
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=10
CompleteWait=0
UnkillableStepTimeout=20
ReturnToService=2
NodeName=node[1-$1] CPUs=$cpus RealMemory=$memory Gres=gpu:$gpus
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=debug Nodes=ALL MaxTime=10 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=15
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
}

nodes() { seq -f 'node%.0f' "$1"; }

address() { # HOST
    if [ "$1" = head ]; then echo "$network.1"; else echo "$network.$((10 + ${1#node}))"; fi
}

# The process that made the namespaces of a host and waits for its PID 1.
process() { cat "$dir/hosts/$1/pid" 2> /dev/null || fail "no host $1"; }

enter() { # HOST CMD ...
    local pid
    pid=$(process "$1")
    exec nsenter -t "$pid" --net --uts --ipc --mount --pid="/proc/$pid/ns/pid_for_children" --wdns="$PWD" "${@:2}"
}

on_head() { (enter head "$@"); }

boot() { # HOST
    local head_network=/dev/null
    [ "$1" = head ] || head_network=/proc/$(process head)/ns/net
    rm -f "$dir/hosts/$1/ready"
    setsid unshare --net --uts --ipc --mount --pid --fork --mount-proc "$self" init "$1" \
        < /dev/null >> "$dir/log/$1.log" 2>&1 8>&- 9< "$head_network" &
    echo $! > "$dir/hosts/$1/pid"
}

is_ready() { [ -e "$dir/hosts/$1/ready" ] && (enter "$1" true); }

# PID 1 of a host.
init() { # HOST
    hostname "$1"
    make_private "$checkout" "$shared"
    mount --bind "$dir/etc-hosts" /etc/hosts
    mount --bind "$dir/ssh/ssh_config" /etc/ssh/ssh_config
    mount --bind "$dir/slurm" /etc/slurm
    connect "$1"
    exec 9<&-
    mkdir /run/munge /run/sshd
    munged --force --key-file "$dir/munge.key" --seed-file /run/munge/seed --log-file "$dir/log/munged.$1.log"
    /usr/sbin/sshd -f "$dir/ssh/sshd_config" -E "$dir/log/sshd.$1.log"
    if [ "$1" = head ]; then
        slurmctld
    else
        wait_for 60 is_controller_up # a slurmd that finds none waits long before it asks again
        slurmd -N "$1"
    fi
    touch "$dir/hosts/$1/ready"
    read -r < "$dir/tether" || true # until the holder has gone; bash reaps orphans meanwhile
}

is_controller_up() { timeout 2 scontrol ping | grep -q 'is UP'; }

make_private() { # what stays shared ...
    local i
    mount -t tmpfs -o mode=755 tmpfs /run
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    for ((i = 1; i <= $#; i++)); do
        mkdir "/run/$i"
        mount --bind "${!i}" "/run/$i"
    done
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    for ((i = 1; i <= $#; i++)); do
        mkdir -p "${!i}"
        mount --move "/run/$i" "${!i}"
    done
}

connect() { # HOST; descriptor 9 is the network of head
    ip link set lo up
    if [ "$1" = head ]; then
        ip link add eth0 type bridge forward_delay 0
    else
        ip link add eth0 type veth peer name "$1" netns /proc/self/fd/9
        nsenter --net=/proc/self/fd/9 ip link set "$1" master eth0 up
    fi
    ip address add "$(address "$1")/24" dev eth0
    ip link set eth0 up
}

up() { # N
    [[ $1 =~ ^[1-9][0-9]?$ ]] || fail "how many nodes? 1 to 99"
    install
    [ ! -e "$dir/hosts" ] || fail "$dir is in use; if no cluster is up, cluster.sh down removes it"
    trap clean_up EXIT
    trap 'exit 1' TERM INT HUP
    configure "$1"
    echo $$ > "$dir/holder"
    exec 8<> "$dir/tether"
    local host
    boot head
    wait_for 30 is_ready head || fail "head does not start: $(tail -n 20 "$dir/log/head.log")"
    for host in $(nodes "$1"); do boot "$host"; done
    wait_for 60 are_idle "$1" || fail "not all nodes are idle after a minute: $(on_head sinfo -N -l; tail "$dir"/log/*)"
}

are_idle() { [ "$(on_head timeout 3 sinfo -h -p main -t idle -o %D 2> /dev/null)" = "$1" ]; }

hold() { # N; until the end of the standard input
    up "$1"
    echo "$1 nodes are up"
    while read -r; do :; done
}

clean_up() {
    local host
    for host in "$dir"/hosts/*; do kill_host "${host##*/}"; done
    rm -rf "${dir:?}"/{hosts,log,slurm,slurm-state,ssh,gpus,tether,munge.key,etc-hosts,holder}
    rmdir --ignore-fail-on-non-empty "$dir"
}

is_gone() { ! grep -qzF cluster.sh "/proc/$1/cmdline" 2> /dev/null; }

kill_host() { # HOST
    local pid
    pid=$(cat "$dir/hosts/$1/pid" 2> /dev/null) || return 0
    is_gone "$pid" || pkill -KILL -P "$pid" || true
    wait_for 20 is_gone "$pid" || fail "$1 cannot be killed"
    rm "$dir/hosts/$1/pid"
}

power_off() { # HOST
    on_head ip link set "$1" down # first, for a power cut says no goodbye
    kill_host "$1"
    on_head ip link delete "$1" 2> /dev/null || true # unless it is gone with the host
}

power_on() { # HOST
    [ ! -e "$dir/hosts/$1/pid" ] || fail "$1 is on"
    boot "$1"
    wait_for 60 is_ready "$1" || fail "$1 does not start: $(tail -n 20 "$dir/log/$1.log")"
}

down() {
    local holder
    holder=$(cat "$dir/holder" 2> /dev/null) || return 0
    if is_gone "$holder"; then
        clean_up
    else
        kill "$holder"
        wait_for 60 is_gone "$holder" || fail "process $holder still holds the cluster"
    fi
}

case ${1:-} in
    install) install ;;
    up) read -r < <(exec setsid "$self" keep "${2:-}") || fail "no cluster" ;;
    keep) hold "${2:-}" <> <(:) ;;
    down) down ;;
    hold) hold "${2:-}" ;;
    exec) enter "${@:2}" ;;
    poweroff) power_off "$2" ;;
    poweron) power_on "$2" ;;
    link) on_head ip link set "$2" "$3" ;;
    status) on_head sinfo -N -l ;;
    init) init "$2" ;;
    *)
        sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$self"
        exit 2
        ;;
esac
