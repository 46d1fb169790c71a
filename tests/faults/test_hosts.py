"""Ranks on hosts of their own train to the bits of as many ranks on one host, whoever launches them."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults.conftest import run_faults
from support.hosts import INTERFACE, Host, hosts, why_no_hosts
from support.hosts_job import flags_of
from support.launches import PROGRAMS, ROOT, environment, make_model_folder, make_tasks, same_bits, weights
from support.stream_runs import Material

REASON, PORT = why_no_hosts(), 29611
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_a_rank_on_each_host_trains_as_on_one(num_hosts: int, tmp_path: Path) -> None:
    """Weights, mask, delta, scores and texts, and every logged loss."""
    (found,) = run_faults("hosts_job", tmp_path, str(num_hosts)).values()
    assert not any(found["together"] + found["apart"]), found["log"][-4000:]
    assert found["different"] == []
    assert found["compared"] == 3


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    made = Material(tmp_path_factory.mktemp("launchers"))
    make_model_folder(made.base)
    make_tasks(made.tasks)
    return made


def torchrun(number: int, first: Host) -> tuple[list[str], dict[str, str]]:
    return [
        str(PROGRAMS / "torchrun"),
        "--nnodes",
        "2",
        "--node_rank",
        str(number),
        "--nproc_per_node",
        "1",
        "--master_addr",
        first.address,
        "--master_port",
        str(PORT),
    ], {}


def deepspeed(number: int, first: Host) -> tuple[list[str], dict[str, str]]:
    return [
        str(PROGRAMS / "deepspeed"),
        "--no_ssh",
        "--node_rank",
        str(number),
        "--hostfile",
        "HOSTFILE",
        "--master_addr",
        first.address,
        "--master_port",
        str(PORT),
    ], {}


def accelerate(number: int, first: Host) -> tuple[list[str], dict[str, str]]:
    """--multi_gpu is its word for one process a rank."""
    return [
        str(PROGRAMS / "accelerate"),
        "launch",
        "--multi_gpu",
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--machine_rank",
        str(number),
        "--main_process_ip",
        first.address,
        "--main_process_port",
        str(PORT),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ], {}


def srun(number: int, first: Host) -> tuple[list[str], dict[str, str]]:
    """What launch/slurm.sbatch makes of srun's variables: torch's, in the task's own shell."""
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    inner = script.partition("bash -c '")[2].partition("' bash ")[0]
    return ["bash", "-c", inner, "bash"], {
        "SLURM_PROCID": str(number),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": first.address,
        "MASTER_PORT": str(PORT),
    }


LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed, "accelerate": accelerate, "srun": srun}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_start_the_same_script_on_two_hosts(name: str, material: Material) -> None:
    expected = material.out("one-host")
    if not expected.exists():
        command = [str(PROGRAMS / "torchrun"), "--nproc_per_node", "2", "--master_port", str(PORT)]
        script = [str(ROOT / "launch" / "train.py"), *flags_of(material, "one-host")]
        subprocess.run([*command, *script], env=environment(), cwd=ROOT, check=True, capture_output=True, timeout=900)
    runs, flags = [], flags_of(material, name)
    with hosts(2) as two, ExitStack() as stack:
        (material.root / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in two))
        for number, host in enumerate(two):
            starter, variables = LAUNCHERS[name](number, two[0])
            starter = [str(material.root / "hostfile") if item == "HOSTFILE" else item for item in starter]
            program = [sys.executable] if name == "srun" else []
            command = host.command(*starter, *program, str(ROOT / "launch" / "train.py"), *flags)
            log = stack.enter_context(open(material.root / f"{name}{number}.log", "w+"))
            variables = {**environment(), "GLOO_SOCKET_IFNAME": INTERFACE, **variables}
            runs.append((subprocess.Popen(command, env=variables, cwd=ROOT, stdout=log, stderr=log), log))
        codes = [run.wait(900) for run, _ in runs]
        logs = []
        for _, log in runs:
            log.seek(0)
            logs.append(log.read()[-3000:])
    assert codes == [0, 0], "\n".join(logs)
    assert same_bits(weights(expected / "00-train" / "model"), weights(material.out(name) / "00-train" / "model"))
    assert json.loads((material.out(name) / "run.json").read_text())["world_size"] == 2
