"""Detection of the launcher from the environment."""

import pytest

from faccel.errors import TopologyError
from faccel.runtime.detect import detect, first_host

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "77",
}
# Values that no launcher sets: huge, empty lists of thousands of brackets, ports out of range.
ODD = (
    SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x" + "9" * 12 + ")", "SLURM_NODEID": "9" * 8},
    SLURM | {"SLURM_STEP_TASKS_PER_NODE": "9" * 5000},
    SLURM | {"SLURM_PROCID": "9" * 30},
    TORCHRUN | {"WORLD_SIZE": "9" * 5000},
    TORCHRUN | {"WORLD_SIZE": "9" * 30},
    TORCHRUN | {"MASTER_PORT": "70000"},
    TORCHRUN | {"MASTER_PORT": "-1"},
    {"RANK": "x" * 10**6},
)
FAR = {"MASTER_ADDR": "head", "MASTER_PORT": "1"}
OMPI_FAR = OMPI | FAR | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
PMI = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
MV2 = {
    f"MV2_COMM_WORLD_{k}": v
    for k, v in {"RANK": "2", "SIZE": "3", "LOCAL_RANK": "2", "LOCAL_SIZE": "3"}.items()
}
LSF = {
    "LSB_JOBID": "9",
    "LSB_MCPU_HOSTS": "login 1 node1 42 node2 42",
    **{
        f"JSM_NAMESPACE_{k}": v
        for k, v in {"RANK": "4", "SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "4"}.items()
    },
}
KUBEFLOW = {
    "KUBERNETES_PORT": "tcp://x",
    "RANK": "1",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "m",
    "MASTER_PORT": "23456",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t0,t1", "PJRT_DEVICE": "TPU"}


def without(env, *keys):
    return {k: v for k, v in env.items() if k not in keys}


# environment -> source, rank, world size, local rank, local world size, node rank, num nodes,
# address
WORLDS = {
    "nothing": ({}, ("single", 0, 1, 0, 1, 0, 1, "")),
    "unrelated": ({"PATH": "/bin", "SLURM_CONF": "x"}, ("single", 0, 1, 0, 1, 0, 1, "")),
    "torchrun": (TORCHRUN, ("torchrun", 3, 4, 1, 2, 1, 2, "host")),
    "torchrun without groups": (
        without(TORCHRUN, "GROUP_RANK", "GROUP_WORLD_SIZE"),
        ("torchrun", 3, 4, 1, 2, 1, 2, "host"),
    ),
    "torchrun of one": (
        TORCHRUN
        | {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
        },
        ("torchrun", 0, 1, 0, 1, 0, 1, "host"),
    ),
    "srun": (SLURM, ("SLURM", 5, 7, 1, 3, 1, 2, "gpu03")),
    "srun, first node": (
        SLURM | {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"},
        ("SLURM", 3, 7, 3, 4, 0, 2, "gpu03"),
    ),
    "srun, equal nodes": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8"},
        ("SLURM", 5, 8, 1, 4, 1, 2, "gpu03"),
    ),
    "srun with an address": (SLURM | FAR, ("SLURM", 5, 7, 1, 3, 1, 2, "head")),
    "srun -n1": (
        SLURM
        | {
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_TASKS_PER_NODE": "1",
            "SLURM_STEP_NODELIST": "n7",
        },
        ("SLURM", 0, 1, 0, 1, 0, 1, "n7"),
    ),
    "salloc, outside a step": (
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n1"},
        ("single", 0, 1, 0, 1, 0, 1, ""),
    ),
    "batch script itself": (
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
        },
        ("single", 0, 1, 0, 1, 0, 1, ""),
    ),
    "srun --mpi=pmix": (SLURM | {"PMIX_RANK": "5"}, ("SLURM", 5, 7, 1, 3, 1, 2, "gpu03")),
    "mpirun, one node": (OMPI, ("Open MPI", 1, 2, 1, 2, 0, 1, "127.0.0.1")),
    "mpirun, two nodes": (OMPI_FAR, ("Open MPI", 3, 4, 1, 2, 1, 2, "head")),
    "Open MPI 5": (OMPI | {"PMIX_RANK": "1"}, ("Open MPI", 1, 2, 1, 2, 0, 1, "127.0.0.1")),
    "MPICH": (PMI, ("PMI", 0, 2, 0, 2, 0, 1, "127.0.0.1")),
    "MVAPICH": (MV2, ("MVAPICH", 2, 3, 2, 3, 0, 1, "127.0.0.1")),
    "jsrun": (LSF, ("LSF", 4, 8, 0, 4, 1, 2, "node1")),
    "jsrun, no hosts": (without(LSF, "LSB_MCPU_HOSTS"), ("LSF", 4, 8, 0, 4, 1, 2, "127.0.0.1")),
    "LSF outside jsrun": ({"LSB_JOBID": "9"}, ("single", 0, 1, 0, 1, 0, 1, "")),
    "Kubeflow": (KUBEFLOW, ("Kubeflow", 1, 3, 0, 1, 1, 3, "m")),
    "a pod without a job": ({"KUBERNETES_PORT": "x"}, ("single", 0, 1, 0, 1, 0, 1, "")),
    "torchrun in a pod": (
        TORCHRUN | {"KUBERNETES_PORT": "x"},
        ("torchrun", 3, 4, 1, 2, 1, 2, "host"),
    ),
    # Ambient variables of a TPU VM: its launcher reads them, `init` does not.
    "a host of a TPU pod": (TPU, ("single", 0, 1, 0, 1, 0, 1, "")),
    "a TPU VM of one host": (
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        ("single", 0, 1, 0, 1, 0, 1, ""),
    ),
    "half of a TPU pod": ({"TPU_WORKER_ID": "1"}, ("single", 0, 1, 0, 1, 0, 1, "")),
    "torchrun on a host of a TPU pod": (TORCHRUN | TPU, ("torchrun", 3, 4, 1, 2, 1, 2, "host")),
    "srun torchrun, one per node": (
        TORCHRUN
        | SLURM
        | {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        },
        ("torchrun", 3, 4, 1, 2, 1, 2, "host"),
    ),
    "srun -n1 torchrun": (
        TORCHRUN
        | SLURM
        | {
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1",
        },
        ("torchrun", 3, 4, 1, 2, 1, 2, "host"),
    ),
    "mpirun in a SLURM job": (
        OMPI_FAR
        | SLURM
        | {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "1",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        },
        ("Open MPI", 3, 4, 1, 2, 1, 2, "head"),
    ),
    "mpirun torchrun, one per node": (
        TORCHRUN | OMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        ("torchrun", 3, 4, 1, 2, 1, 2, "host"),
    ),
    "two that agree": (
        TORCHRUN | PMI | {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
        ("torchrun", 3, 4, 1, 2, 1, 2, "host"),
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_environment_of_a_launcher_determines_the_topology(name):
    env, expected = WORLDS[name]
    t = detect(env)
    got = (
        t.source,
        t.rank,
        t.world_size,
        t.local_rank,
        t.local_world_size,
        t.node_rank,
        t.num_nodes,
        t.main_address,
    )
    assert got == expected


# environment -> parts of the error message
BROKEN = {
    **{
        f"torchrun, no {key}": (without(TORCHRUN, key), [f"`{key}`", "torchrun"])
        for key in list(TORCHRUN)[:4]
    },
    "torchrun, no address": (without(TORCHRUN, "MASTER_ADDR"), ["`MASTER_ADDR`"]),
    "torchrun, no port": (without(TORCHRUN, "MASTER_PORT"), ["`MASTER_PORT`"]),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, ["`RANK`", "WORLD_SIZE=2"]),
    "rank too large": (TORCHRUN | {"RANK": "4"}, ["rank=4"]),
    "a negative rank": (TORCHRUN | {"RANK": "-1"}, ["rank=-1"]),
    "local rank too large": (TORCHRUN | {"LOCAL_RANK": "2"}, ["local_rank=2"]),
    "not a number": (TORCHRUN | {"WORLD_SIZE": "two"}, ["`WORLD_SIZE`", "'two'"]),
    "an empty port": (TORCHRUN | {"MASTER_PORT": ""}, ["`MASTER_PORT`"]),
    "half a step": (without(SLURM, "SLURM_PROCID"), ["`SLURM_PROCID`", "srun"]),
    "a node without tasks": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4"}, ["tasks per node"]),
    "half of Open MPI": (without(OMPI, "OMPI_COMM_WORLD_SIZE"), ["`OMPI_COMM_WORLD_SIZE`"]),
    "nodes without an address": (OMPI | {"OMPI_COMM_WORLD_SIZE": "4"}, ["mpirun -x MASTER_ADDR"]),
    "PMIx alone": ({"PMIX_RANK": "1"}, ["PMIX_RANK=1", "torchrun"]),
    "half of Kubeflow": (without(KUBEFLOW, "WORLD_SIZE"), ["`WORLD_SIZE`", "Kubeflow"]),
    "srun -n7 torchrun --standalone": (
        TORCHRUN | SLURM,
        ["SLURM: rank 5 of 7", "torchrun: rank 3 of 4"],
    ),
    "torchrun and another mpirun": (
        TORCHRUN | OMPI | {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"},
        ["torchrun: rank 3 of 4", "Open MPI: rank 1 of 3"],
    ),
    "two ranks of one world": (
        TORCHRUN | PMI | {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"},
        ["rank 3 of 4", "rank 2 of 4"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_incomplete_environment_is_an_error_that_names_the_variables(name):
    env, words = BROKEN[name]
    with pytest.raises(TopologyError) as error:
        detect(env)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_ranks_of_a_job_use_one_port_and_other_jobs_use_others():
    ports = {detect(SLURM | {"SLURM_STEP_ID": str(step)}).main_port for step in range(50)}
    assert len(ports) > 45
    assert (
        detect(SLURM).main_port
        == detect(SLURM | {"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}).main_port
    )


def test_ranks_of_an_mpich_job_use_one_port_although_their_descriptors_differ():
    first, second = (
        detect(PMI | {"PMI_RANK": r, "MPI_LOCALRANKID": r, "PMI_FD": f})
        for r, f in (("0", "7"), ("1", "9"))
    )
    assert first.main_port == second.main_port


def test_the_attempt_is_the_restart_count_of_torchrun():
    t = detect(
        TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    )
    assert (t.attempt, t.store_is_hosted) == (2, True)
    assert (detect(TORCHRUN).attempt, detect(TORCHRUN).store_is_hosted) == (0, False)


@pytest.mark.parametrize("env", ODD, ids=range(len(ODD)))
def test_a_value_that_no_launcher_sets_is_an_error_with_a_short_message(env):
    with pytest.raises(TopologyError) as caught:
        detect(env)
    assert len(str(caught.value)) < 1000


def test_the_first_host_of_any_list_is_found_in_linear_time():
    for text in ("[" * 20_000, "[1" * 20_000, "a[" + "1-" * 20_000, "n[" + "1," * 20_000 + "]"):
        first_host(text)
    assert first_host("gpu[03-05,9],login1") == "gpu03"
