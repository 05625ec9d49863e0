#!/bin/sh
# A training run started by hand, on this machine or on several that each start this script.
#
#   launch/torchrun.sh RANKS LAYOUT --substrate DIR --candidate candidate.json --seed N --out RUNDIR
#
#   RANKS     processes on each machine, one for each GPU
#   LAYOUT    parallel sizes such as tp=2,ep=4; "" for data parallelism alone
#   PYTHON    interpreter with the package installed (default: python3)
#   NODES     machines (default: 1); from two on also
#   MEET      HOST:PORT of one of them, reached by all, the same for all
set -eu

[ $# -ge 3 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
ranks=$1 layout=$2 python=${PYTHON:-python3}
shift 2
set -- -m megatron_evolve.substrate.train.run --layout "$layout" "$@"

# What cannot be trained so is said once, before any rank starts.
"$python" "$@" --check $((ranks * ${NODES:-1}))

if [ "${NODES:-1}" -gt 1 ]; then
    : "${MEET:?several machines need MEET=HOST:PORT, reached by all of them}"
    set -- --nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="$MEET" --rdzv-id="${MEET##*:}" \
        --nproc-per-node="$ranks" "$@"
else
    set -- --standalone --nproc-per-node="$ranks" "$@"
fi
# One thread a rank: ranks fill the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run "$@"
