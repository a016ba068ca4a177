"""Who a process is, as its launcher says; the environments are what the real ones were seen to set."""

import json
import os
import re
import socket
import subprocess
import sys
import uuid

import pytest
import torch.distributed as dist

from esper_telemetry.ranks.identity import MAX_RUN_ID, given_run_id, run_info

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "3",
    "SLURMD_NODENAME": "gpu7",
}
SBATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURMD_NODENAME": "gpu7",
}
SALLOC = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16"}
SALLOC_STEP = SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
SALLOC_STEP |= {"SLURM_LOCALID": "0", "SLURM_PTY_PORT": "26934"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "6", "PMI_SIZE": "8", "MPI_LOCALRANKID": "2"}
DAEMON = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}

PREFIXES = ("ESPER_", "TORCHELASTIC_", "SLURM", "OMPI_", "PMI_", "MPI_")
NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """Begin where no launcher has been."""
    for name in [name for name in os.environ if name.startswith(PREFIXES) or name in NAMES]:
        monkeypatch.delenv(name)
    return monkeypatch


def told(environ, variables):
    for name, value in variables.items():
        environ.setenv(name, value)
    run = run_info()
    return run.rank, run.world_size, run.local_rank


def test_without_a_launcher_a_process_is_the_whole_run():
    run, other = run_info(), run_info()
    assert (run.rank, run.world_size, run.local_rank, run.attempt) == (0, 1, 0, 0)
    assert (run.host, run.pid) == (socket.gethostname(), os.getpid())
    assert run.run_id != other.run_id


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, (5, 8, 1)),
        (SRUN, (9, 16, 3)),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}, (1, 2, 1)),
        (MPIRUN, (3, 4, 1)),
        (HYDRA, (6, 8, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 1)),
        ({"ESPER_RANK": "1", "ESPER_WORLD_SIZE": "2", "ESPER_LOCAL_RANK": "0"}, (1, 2, 0)),
    ],
    ids=["torchrun", "srun", "srun, four variables handed into a container", "Open MPI", "MPICH", "PMI", "esper"],
)
def test_a_launcher_says_who_this_process_is(environ, variables, expected):
    assert told(environ, variables) == expected


@pytest.mark.parametrize(
    "variables",
    [SALLOC, SBATCH, SALLOC_STEP, SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "1"}],
    ids=["salloc", "sbatch", "salloc with an interactive step", "srun --pty"],
)
def test_in_a_shell_of_slurm_every_process_is_a_run_of_its_own(environ, variables):
    assert told(environ, variables) == (0, 1, 0)
    assert given_run_id() is None


def test_a_step_that_was_started_from_an_interactive_shell_is_a_step(environ):
    assert told(environ, SRUN | {"SLURM_PTY_PORT": "26934"}) == (9, 16, 3)


@pytest.mark.parametrize(("launcher", "expected"), [(MPIRUN, (3, 4, 1)), (HYDRA, (6, 8, 2))], ids=["mpirun", "hydra"])
def test_slurms_numbers_of_the_daemons_of_mpirun_are_nobodys_ranks(environ, launcher, expected):
    assert told(environ, DAEMON | launcher) == expected


def test_the_order_is_esper_torchrun_slurm_open_mpi_pmi(environ):
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert told(environ, HYDRA) == (6, 8, 2)
    assert told(environ, mpi) == (3, 16, 1)
    assert told(environ, SRUN) == (9, 16, 3)
    assert told(environ, TORCHRUN) == (5, 8, 1)
    assert told(environ, {"ESPER_RANK": "0", "ESPER_WORLD_SIZE": "2", "ESPER_LOCAL_RANK": "7"}) == (0, 2, 7)


def test_torch_is_asked_once_it_is_initialised(environ, tmp_path):
    before = told(environ, SRUN | {"RANK": "1", "WORLD_SIZE": "2"})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert (before, told(environ, {})) == ((1, 2, 3), (0, 1, 3))
        assert told(environ, {"ESPER_RANK": "1", "ESPER_WORLD_SIZE": "2"}) == (1, 2, 3)
    finally:
        dist.destroy_process_group()


def test_torch_is_not_imported_to_be_asked():
    script = (
        "import sys; from esper_telemetry.ranks.identity import run_info; run_info(); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc"}, "RANK: expected a whole number of at least 0, got 'abc'"),
        ({"RANK": "-1"}, "RANK: expected a whole number of at least 0, got '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number of at least 1, got '0'"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK: expected a whole number of at least 0, got '1.5'"),
        ({"ESPER_RANK": "two"}, "ESPER_RANK: expected a whole number of at least 0, got 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected less than WORLD_SIZE=2, got 2"),
        ({"ESPER_RANK": "2"}, "ESPER_RANK: expected a world size too, got 2"),
        ({"ESPER_RUN_ID": "a\tb"}, r"ESPER_RUN_ID: expected no control characters, got 'a\tb'"),
    ],
)
def test_a_variable_that_is_no_good_is_one_line(environ, variables, message):
    with pytest.raises(ValueError, match="expected") as error:
        told(environ, variables)
    assert str(error.value) == message


def test_an_empty_variable_is_none(environ):
    assert told(environ, {"ESPER_RANK": "", "ESPER_RUN_ID": "", "RANK": "1", "WORLD_SIZE": "2"}) == (1, 2, 1)
    assert given_run_id() is None


@pytest.mark.parametrize(
    ("given", "run_id"),
    [
        (42, "42"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("exp/run1", "exp/run1"),
        ("sweep(seed=1", "sweep(seed=1"),
        ("lr=1e-3|bs=256", "lr=1e-3|bs=256"),
        ('a "b" \\ {c}', 'a "b" \\ {c}'),
        ("Übung 8: größer", "Übung 8: größer"),
        ("x" * MAX_RUN_ID, "x" * MAX_RUN_ID),
    ],
)
def test_a_run_may_have_any_name(given, run_id):
    assert run_info(given).run_id == run_id


class Nameless:
    def __str__(self):
        raise RuntimeError("no name\nat all")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "expected 1 to 256 characters, got ''"),
        ("  ", "expected 1 to 256 characters, got '  '"),
        ("x" * 257, "expected 1 to 256 characters, got 257 characters"),
        ("a\nb", r"expected no control characters, got 'a\nb'"),
        ("a\x00b", r"expected no control characters, got 'a\x00b'"),
        ("\ud800", r"expected no control characters, got '\ud800'"),
        (Nameless(), r"expected something with a name, got Nameless: RuntimeError('no name\nat all')"),
    ],
)
def test_a_name_that_cannot_be_taken_is_one_line(given, message):
    with pytest.raises(ValueError, match="expected") as error:
        run_info(given)
    assert str(error.value) == f"run_id: {message}"


def test_the_order_of_names_is_argument_esper_torchrun_slurm(environ):
    assert told(environ, SRUN)
    assert run_info().run_id == "4711"
    environ.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_info().run_id == "4711"
    environ.setenv("TORCHELASTIC_RUN_ID", "elastic")
    assert run_info().run_id == "elastic"
    environ.setenv("ESPER_RUN_ID", "mine")
    assert run_info().run_id == "mine"
    assert run_info("argument").run_id == "argument"


def test_steps_of_one_job_are_runs_of_their_own(environ):
    assert told(environ, SRUN | {"SLURM_STEP_ID": "3"})
    assert run_info().run_id == "4711.3"


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN | {"SLURM_RESTART_COUNT": "2"}], ids=["torchrun", "requeued"])
def test_a_run_that_was_started_again_says_how_often(environ, variables):
    assert told(environ, variables)
    assert run_info().attempt == 2


PROCESS = """
import json, sys
import torch
from esper_telemetry import start_textfile, watch

model = torch.nn.Linear(6, 1)
monitor = watch(model)
run = monitor.snapshot.run
exporter = start_textfile(monitor, sys.argv[1])
model(torch.full((1, 6), float("nan") if run.rank else 1.0)).sum().backward()
print(json.dumps([run.run_id, run.rank, run.world_size, run.local_rank, exporter.path.name]))
sys.stdin.read()
exporter.close()
"""


def nans(path):
    return float(re.search(r"^esper_nan_grad_recent_max{.*} (\S+)$", path.read_text(), re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("common", "of_rank", "run_id"),
    [
        ({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2"}, ("SLURM_PROCID", "SLURM_LOCALID"), "4711"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), None),
        ({"PMI_SIZE": "2"}, ("PMI_RANK",), None),
    ],
    ids=["srun", "mpirun", "pmi"],
)
def test_two_processes_of_a_launcher_share_neither_a_textfile_nor_a_port(common, of_rank, run_id, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    environments = [os.environ | common | dict.fromkeys(of_rank, str(rank)) for rank in range(2)]
    runs = [subprocess.Popen(command, env=environment, **pipes) for environment in environments]
    said = [json.loads(run.stdout.readline()) for run in runs]
    names = set(os.listdir(tmp_path))
    worst = [nans(tmp_path / name) for *_, name in said]
    for run in runs:
        run.communicate()
    assert [(rank, world_size, local_rank) for _, rank, world_size, local_rank, _ in said] == [(0, 2, 0), (1, 2, 1)]
    assert {name for *_, name in said} == names
    assert (len(names), worst) == (2, [0, 6])
    assert run_id is None or {each for each, *_ in said} == {run_id}
