"""Which rank a process is: torchrun's and srun's environments, and their absence."""

import pytest

from megatron_evolve.substrate.ranks import FIRST_PORT, NUM_PORTS, Place, first_host, place_in

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


def test_alone() -> None:
    assert place_in({}) == place_in({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Place(0, 1, 0, "")
    assert place_in({}).alone and not place_in(TORCHRUN).alone


def test_torchrun_counts_also_under_srun() -> None:
    assert place_in(SRUN | TORCHRUN) == Place(3, 4, 1, "tcp://a:5")


def test_srun_s_own_ranks_meet_at_the_step_s_first_node() -> None:
    place = place_in(SRUN)
    assert (place.rank, place.world_size, place.local_rank) == (5, 16, 1)
    host, port = place.meet.removeprefix("tcp://").split(":")
    assert host == "gpu07" and FIRST_PORT <= int(port) < FIRST_PORT + NUM_PORTS
    assert place_in(SRUN | {"SLURM_STEP_ID": "3"}).meet != place.meet  # two steps of one job on one node
    assert place_in(SRUN | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}).meet == "tcp://h:9"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("n[03,07-9],m1", "n03"),
        ("a[1-2]-ib,b", "a1-ib"),
        ("x-[10]", "x-10"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_half_an_environment_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="RANK is not set: start it with torchrun"):
        place_in({name: value for name, value in TORCHRUN.items() if name != "RANK"})
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host("")
