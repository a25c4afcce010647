"""Chapter 07's files: jobs for clusters that run, a dictionary that is true of minipar, a workflow that grades."""

import ast
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

import minipar
from minipar import Config, Mesh, schedule
from minipar.course import dictionary
from minipar.course.dictionary import read_megatron
from minipar.train import Options, Parallel

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster"
TRAIN = CLUSTER / "train.py"
DEADLINE = 200  # seconds, on a machine that has other work, too

# -- the dictionary --------------------------------------------------------------------------------------------------

DEFAULTS = Options(schedule.one_f_one_b, 1, lambda *_: None, False, None, 0, False, "none", None, None, None)
NAMES = {**vars(schedule), "Mesh": Mesh, "Config": Config, "torch": torch, "minipar": minipar, "model": Parallel}


def is_true_of_minipar(cell: str) -> bool:
    """A Mesh or a Config that can be made, options that parallelize takes, or a name that is there."""
    if keyword := re.fullmatch(r"(\w+)=(.+)", cell):
        replace(DEFAULTS, **{keyword[1]: eval(keyword[2], dict(NAMES))})  # TypeError, ValueError for what is wrong
        return True
    code = ast.parse(cell.removeprefix("always, see "), mode="eval").body
    if isinstance(code, ast.Call) and isinstance(code.func, ast.Name):
        return eval(cell, dict(NAMES)) is not None
    dotted = ast.unparse(code.func if isinstance(code, ast.Call) else code)
    head, *rest = dotted.split(".")
    here = NAMES.get(head) or getattr(minipar, head)
    for name in rest:
        here = getattr(here, name)
    return callable(here)


@pytest.mark.parametrize("row", dictionary.ROWS, ids=lambda row: row.what)
def test_minipars_side_of_the_dictionary_exists(row):
    assert is_true_of_minipar(row.minipar)
    assert any(row[2:]), "nobody else has it"


@pytest.mark.parametrize("cell", ["Mesh(pt=2)", "zero=4", "zeros=1", "schedule=two_f", "model.clip", "data.Gradient"])
def test_what_minipar_does_not_have_is_found(cell):
    with pytest.raises((TypeError, ValueError, NameError, AttributeError)):
        assert is_true_of_minipar(cell)


def test_every_option_of_an_axis_and_every_axis_has_its_row():
    ours = " ".join(row.minipar for row in dictionary.ROWS)
    assert all(f"{axis}=" in ours for axis in Mesh().shape)
    left = {field.name for field in fields(Options)} - set(re.findall(r"(\w+)=", ours))
    assert left == {"loss", "plan", "whole_gradients", "wrap", "pace"}, "an option that others have no word for"


def test_every_framework_has_a_source_and_is_looked_up_by_any_of_its_words():
    assert dictionary.FRAMEWORKS.keys() == dictionary.SOURCES.keys() == set(dictionary.Row._fields[2:])
    assert [row.minipar for row in dictionary.lookup("autotp_size")] == ["Mesh(tp=4)"]
    assert dictionary.lookup("no such word") == []


@pytest.mark.parametrize(
    "command, ranks, axes, options",
    [
        ("", 8, {"dp": 8}, {}),
        ("--tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 32", 8, {"dp": 4, "tp": 2}, 4),
        ("--pipeline-model-parallel-size=4", 8, {"dp": 2, "pp": 4}, {"schedule": "one_f_one_b"}),
        ("--pipeline_model_parallel_size 4 --bf16", 4, {"pp": 4}, {"schedule": "one_f_one_b", "dtype": "bfloat16"}),
        ("--expert-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 16", 8, {"dp": 2, "ep": 4}, 2),
        ("--use-distributed-optimizer", 2, {"dp": 2}, {"zero": 1}),
        ("--data-parallel-sharding-strategy optim_grads_params", 2, {"dp": 2}, {"zero": 3}),
        ("--data-parallel-sharding-strategy no_shard", 2, {"dp": 2}, {}),
        ("--sequence-parallel --recompute-activations", 1, {}, {"sequence_parallel": True, "recompute": "selective"}),
        ("--recompute-granularity full --fp16", 1, {}, {"recompute": "full", "dtype": "float16"}),
    ],
)
def test_a_command_line_of_megatron_is_read(command, ranks, axes, options):
    found, more = read_megatron(command, ranks)
    assert Mesh(**found) == Mesh(**axes)
    assert more == (options if isinstance(options, dict) else {"microbatches": options})


@pytest.mark.parametrize(
    "command, ranks, says",
    [
        ("--tensor-model-parallel-size 3", 8, "8 ranks are no multiple of 3"),
        ("--micro-batch-size 2 --global-batch-size 6", 2, "6 rows are no multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_told(command, ranks, says):
    with pytest.raises(ValueError, match=says):
        read_megatron(command, ranks)


# -- jobs ------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Where torchrun is this Python's, what listens listens on the loopback, and `folder`'s commands come first."""
    torchrun = folder / "torchrun"
    torchrun.write_text(f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(torchrun.stat().st_mode | stat.S_IXUSR)
    (folder / "bin").mkdir()
    (folder / "bin" / "activate").write_text("# a virtual environment that is there already\n")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    quiet = {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1", "PET_LOCAL_ADDR": "127.0.0.1"}
    return os.environ | {"PATH": path, "VENV": str(folder)} | quiet | more


def command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def losses(printed: str) -> dict[int, float]:
    return {
        int(step): float(loss) for step, loss in re.findall(r"^(?:\[0\] )?step (\d+): loss ([\d.]+)", printed, re.M)
    }


def meshes(printed: str) -> set[str]:
    return set(re.findall(r" on (Mesh\(.*\))$", printed, re.M))


@pytest.fixture(scope="module")
def alone() -> dict[int, float]:
    """The losses of four steps on four ranks of a World: dp=2, tp=2."""
    ran = subprocess.run(
        [sys.executable, TRAIN, "--tp=2", "--steps=4", "--ranks=4"], capture_output=True, text=True, timeout=DEADLINE
    )
    assert ran.returncode == 0, ran.stderr
    assert meshes(ran.stdout) == {f"{Mesh(dp=2, tp=2)}"}
    found = losses(ran.stdout)
    assert list(found) == [1, 2, 3, 4] and len(set(found.values())) == 4
    return found


SRUN = """\
#!/bin/bash
# As Slurm's srun: the command once on each node, with the variables of that node. Ends with a code that is not 0
while [[ "$1" == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURMD_NODENAME="node$node" "$@" &
done
code=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do wait -n || code=$?; done
exit $code
"""
SCONTROL = """\
#!/bin/bash
[[ "$1 $2 $3" == "show hostnames node[0-1]" ]] || exit 1
printf 'localhost\\nlocalhost\\n'
"""


def test_the_slurm_file_trains_on_two_nodes_and_goes_on_when_it_is_started_again(tmp_path, alone):
    command(tmp_path, "srun", SRUN)
    command(tmp_path, "scontrol", SCONTROL)
    job = 20_000 * 10_000 + free_port() % 10_000  # the file's port is 20000 + the last four digits
    slurm = {"SLURM_JOB_ID": f"{job}", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    given = {"SLURM_GPUS_ON_NODE": "2", "TP": "2", "CHECKPOINTS": str(tmp_path / "kept")}
    found, said = {}, ""
    for steps in ("2", "4"):
        env = environment(tmp_path / steps if (tmp_path / steps).mkdir() is None else tmp_path, STEPS=steps)
        env |= slurm | given | {"PATH": f"{tmp_path}{os.pathsep}{env['PATH']}"}
        ran = subprocess.run(
            ["bash", CLUSTER / "slurm.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=DEADLINE
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert not losses(ran.stdout).keys() & found.keys(), "a step was done twice"
        found |= losses(ran.stdout)
        said += ran.stdout
    assert meshes(said) == {f"{Mesh(dp=2, tp=2)}"}
    assert found == pytest.approx(alone, abs=2e-4)
    assert minipar.latest(tmp_path / "kept" / f"{job}").name == "step-000004"


def kubernetes() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    return service, job


def test_the_pods_of_kubernetes_train_together(tmp_path, alone):
    _, job = kubernetes()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert given["FIRST"] == "minipar-0.minipar" and given["NODES"] == "2"
    port = free_port()
    (line,) = container["args"]
    assert "--master-port 29500" in line
    words = [*container["command"], line.replace("29500", f"{port}")]
    changed = {"FIRST": "127.0.0.1", "RANKS_PER_NODE": "2", "CHECKPOINTS": f"{tmp_path}/kept", "TP": "2", "STEPS": "4"}
    env = environment(tmp_path) | given | changed
    pods = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=env | {"JOB_COMPLETION_INDEX": f"{index}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(job["spec"]["completions"])
    ]
    try:
        printed = [pod.communicate(timeout=DEADLINE)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(printed)
    assert losses(printed[0]) == pytest.approx(alone, abs=2e-4) and not losses(printed[1]), "pod 0 has rank 0"
    assert meshes(printed[0]) == {f"{Mesh(dp=2, tp=2)}"}


def test_the_pods_find_each_other():
    service, job = kubernetes()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    (container,) = pod["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(given["NODES"]) == spec["completions"]
    assert int(given["RANKS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["FIRST"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert [port["port"] for port in service["spec"]["ports"]] == [29500]
    mounts, volumes = ({entry["name"] for entry in some} for some in (container["volumeMounts"], pod["volumes"]))
    assert mounts == volumes
    assert given["CHECKPOINTS"] in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_kubernetes_own_schema_accepts_the_file():
    validator = pytest.importorskip("kubernetes_validate", reason="70 MB of schemas: pip install kubernetes-validate")
    for resource in kubernetes():
        validator.validate(resource, validator.latest_version(), strict=True)


def test_the_shell_scripts_are_sound():
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert checker, "shellcheck is one of the packages that development needs"
    checked = subprocess.run([checker, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.+))?$", script.read_text(), re.M))
    assert asked["ntasks-per-node"] == "1", "one torchrun a node"
    assert asked.keys() >= {"nodes", "gpus-per-node", "time", "requeue", "open-mode", "output"}


def test_on_ranks_that_do_not_fit_the_script_says_so():
    ran = subprocess.run(
        [sys.executable, TRAIN, "--tp=2", "--ranks=3", "--steps=1"], capture_output=True, text=True, timeout=DEADLINE
    )
    assert ran.returncode != 0 and "3 ranks are no multiple of pp=1 times tp=2" in ran.stderr


def test_the_workflow_grades_what_a_push_has_changed(tmp_path):
    """Its last step, run in a small repository in which one of two notebooks has changed."""
    workflow = yaml.safe_load((ROOT / "examples" / "github" / "grade.yml").read_text())
    assert workflow[True] == {"push": {"paths": ["exercises/*.ipynb"]}}, "YAML 1.1 takes on for true"
    (job,) = workflow["jobs"].values()
    *before, last = job["steps"]
    assert [step.get("run") for step in before] == [None, None, "make setup"]
    assert workflow["permissions"] == {"contents": "read"} and last["shell"] == "bash"
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    command(python.parent, "python", '#!/bin/bash\necho "$@"\nexit 1\n')
    (tmp_path / "exercises").mkdir()

    def git(*words: str) -> None:
        who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for text in ("before", "after"):
        (tmp_path / "exercises" / "02b.ipynb").write_text("same")
        (tmp_path / "exercises" / "03a.ipynb").write_text(text)
        git("add", "exercises")
        git("commit", "-m", text)
    summary = tmp_path / "summary"
    ran = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", last["run"]],
        cwd=tmp_path,
        env=os.environ | {"GITHUB_STEP_SUMMARY": str(summary)},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "-m minipar grade exercises/03a.ipynb\n" == summary.read_text()
    assert ran.returncode != 0, "a task that fails"
