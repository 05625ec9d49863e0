# First process of the test cluster's namespaces: starts munged, slurmctld and a slurmd for each node, then waits for its end.
#
#   unshare --mount --uts --pid --fork --kill-child --mount-proc sh inside.sh DIR NODES CPUS CONTROLLER_PORT
#
# Nodes n1..nN are at 127.0.0.11 and up, each with its own host name, CPUS processors and two GPUs that are null devices.
# The network is the machine's own, so that the tests talk to the controller from outside. DIR/ready appears when all
# nodes are idle.
set -eu
dir=$1 nodes=$2 cpus=$3 port=$4
mkdir -p "$dir/etc" "$dir/state" "$dir/spool" "$dir/log" "$dir/run" "$dir/dev"
chmod 700 "$dir/etc"

# Ranks find each other by the nodes' names.
{
    echo "127.0.0.1 localhost"
    for i in $(seq "$nodes"); do echo "127.0.0.$((10 + i)) n$i"; done
} >"$dir/hosts"
mount --make-rprivate /
mount --bind "$dir/hosts" /etc/hosts

for i in 0 1; do mknod "$dir/dev/gpu$i" c 1 3; done
echo "Name=gpu File=$dir/dev/gpu[0-1]" >"$dir/etc/gres.conf"
dd if=/dev/urandom bs=128 count=1 of="$dir/etc/munge.key" status=none
chmod 400 "$dir/etc/munge.key"

cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again; below 5 s the default of 120 s holds
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=300
SlurmdTimeout=8
InactiveLimit=0
TCPTimeout=2
TreeWidth=65533
GresTypes=gpu
NodeName=DEFAULT CPUs=$cpus RealMemory=8192 Gres=gpu:2 Feature=big State=UNKNOWN
CONF
for i in $(seq "$nodes"); do
    echo "NodeName=n$i NodeAddr=127.0.0.$((10 + i)) Port=$((port + i))" >>"$dir/etc/slurm.conf"
done
cat >>"$dir/etc/slurm.conf" <<CONF
PartitionName=DEFAULT Nodes=n[1-$nodes] MaxTime=INFINITE DefaultTime=10 State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=high PriorityTier=100 PreemptMode=OFF
PartitionName=spot PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
CONF

export SLURM_CONF="$dir/etc/slurm.conf"
munged --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed" --num-threads=2 --force 2>"$dir/log/munged.err"
slurmctld -c
for i in $(seq "$nodes"); do
    # A host name of its own makes a node: whatever it starts is in the same UTS namespace.
    unshare --uts sh -c "hostname n$i; exec slurmd -N n$i"
done
until [ "$(sinfo --noheader --states=idle --format=%D --partition=main 2>/dev/null)" = "$nodes" ]; do sleep 0.1; done
touch "$dir/ready"
exec sleep infinity
