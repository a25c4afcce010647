"""The commands, as a person runs them: exit codes, one clear line for bad input, the same numbers everywhere."""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from minipar import World, cli, corpus, doctor, gpt
from minipar.__main__ import main
from minipar.model import Config

ROOT = Path(__file__).parents[1]
SMALL = "--depth 2 --width 32 --heads 4 --context 16 --rows 8 --microbatches 2 --steps 2"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """One run with everything on: the process, and the trace that it wrote."""
    trace = tmp_path_factory.mktemp("trace") / "step.json"
    arguments = f"{SMALL} --dp 2 --pp 2 --tp 2 --sequence-parallel --tied --check --trace {trace}"
    return run("minipar", "train", *arguments.split()), trace


def test_a_checked_run_says_that_its_gradients_are_those_of_one_process(hybrid):
    done, _ = hybrid
    assert done.returncode == 0, done.stderr
    assert "check: equal." in done.stdout
    assert 0 < float(re.search(r"process's than (\S+) of", done.stdout)[1]) < 1e-12
    assert re.search(r"^it writes: The.+$", done.stdout, re.M)
    assert "100%" in done.stderr and "tokens/s" in done.stderr, "the bar reaches its end"
    assert "tokens/s (in float64, the time of the check not counted)" in done.stdout
    assert not re.search(r"it/s|s/it", done.stderr), "one speed, not two"


def test_tokens_a_second_do_not_count_the_check():
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    words = "train --steps 2 --rows 4 --context 8 --check --microbatches 2"
    settings = {name: value for name, value in vars(parser.parse_args(words.split())).items() if name != "run"}
    config = Config(depth=1, width=8, heads=2, context=8)

    def with_slow_checks() -> float:
        right = cli._difference
        cli._difference = lambda *some: time.sleep(1) or right(*some)
        cli._progress = lambda where: nullcontext(lambda what: None)
        return cli._train(cli.Mesh(), config, settings, None).tokens_per_second

    with World(1) as world:
        assert world.run(with_slow_checks)[0] > 4 * 8, "two steps of 32 tokens take less than 2 s"


def test_the_trace_is_one_that_perfetto_opens(hybrid):
    _, trace = hybrid
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == set(range(8))
    forwards = [event for event in spans if event["cat"] == "F"]
    assert len(forwards) == 8 * 2, "each of 8 ranks has 2 microbatches"
    assert all(event["dur"] > 0 and event["ts"] >= 0 for event in spans)


def test_every_layout_and_launcher_trains_to_the_same_loss(capsys):
    def loss(arguments: str) -> str:
        code = main(["train", *SMALL.split(), *arguments.split()])
        out, err = capsys.readouterr()
        assert code == 0, err
        return _loss(out)

    alone = loss("")
    assert loss("--dp 2 --pp 2 --schedule gpipe") == alone
    assert loss("--seed 1") != alone
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minipar", "train", "--tp=2")
    launched = run(*torchrun, *SMALL.split())
    assert launched.returncode == 0, launched.stderr
    assert _loss(launched.stdout) == alone


def test_a_run_goes_on_from_its_checkpoint_on_another_layout(tmp_path, capsys):
    def last_loss(arguments: str, steps: str, when: str = "") -> str:
        code = main(["train", *SMALL.replace("--steps 2", f"--steps {steps}").split(), *arguments.split()])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert f"{steps}/{steps}" in err, "the bar counts the steps before, too"
        return re.search(rf"-> (\S+) in {when or f'{steps} steps'},", out)[1]

    wanted = last_loss("--dropout 0.1", "5")
    last_loss(f"--dropout 0.1 --tp 2 --save {tmp_path} --save-every 2", "3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert last_loss(f"--dropout 0.1 --dp 2 --save {tmp_path} --resume", "5", when="steps 4 to 5") == wanted
    for arguments, said in {
        f"--save {tmp_path}": "has step-000005: go on from it with --resume, or name another folder",
        f"--save {tmp_path} --resume": f"--steps 2: the run in {tmp_path} is at step 5 already",
        f"--save {tmp_path} --resume --seed 3": f"--seed 3: the run in {tmp_path} had --seed 0",
        f"--save {tmp_path} --resume --depth 3": "(16 tensors of the model are missing)",
    }.items():
        assert main(["train", *SMALL.split(), *arguments.split()]) == 2
        assert said in capsys.readouterr().err


def _loss(said: str) -> str:
    (line,) = re.findall(r"^Mesh\(.*\): loss (\S+ -> \S+) in 2 steps", said, re.M)
    return line


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize(("example", "classes"), list(zip(EXAMPLES, (512, 6), strict=True)), ids=["train", "fine_tune"])
def test_the_examples_of_the_readme_run_as_they_stand(tmp_path, example, classes):
    """But for the number of steps. As scripts without a guard, which no rank imports again."""
    assert example.count(", 20)") == 1
    script = tmp_path / "example.py"
    script.write_text(example.replace(", 20)", ", 1)"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert abs(float(done.stdout) - math.log(classes)) < 0.25, "that of a model that knows nothing"


def test_the_check_sees_a_wrong_gradient(capsys):
    torch.manual_seed(0)
    model = gpt(Config(depth=1, width=8, heads=2, context=4)).double()
    ((tokens, targets),) = corpus.batches(1, rows=2, context=4)
    assert cli._difference({n: torch.zeros_like(p) for n, p in model.named_parameters()}, model, tokens, targets) == 1
    right = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert cli._difference(right, model, tokens, targets) == 0
    broken = {name: torch.full_like(gradient, torch.nan) for name, gradient in right.items()}
    not_a_number = cli._difference(broken, model, tokens, targets)
    assert math.isnan(not_a_number)
    for difference in (1e-6, not_a_number):
        report = cli.Report(losses=[1.0], before=0, tokens_per_second=1, difference=difference, text="")
        assert cli._tell(cli.Mesh(), report) == 1
        assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--heads 6 --width 128", "width 128 is not divisible by heads 6; heads can be one of [1, 2, 4,"),
        ("--depth 2 --pp 4", "pp=4"),
        ("--rows 3 --dp 2 --microbatches 2", "--rows 3 is too few for 2 data ranks x 2 microbatches: at least 4"),
        ("--dp 0", "--dp: '0' is not a whole number, at least 1"),
        ("--lr fast", "--lr: 'fast' is not a number, at least 0"),
        ("--schedule zigzag", "invalid choice: 'zigzag' (choose from"),
        ("--layers 4", "unrecognized arguments: --layers 4"),
        ("--context 9999999", "context=9999999 does not fit: the corpus has"),
        ("--dropout 1.5", "dropout=1.5"),
        ("--resume", "--resume needs --save FOLDER, where the checkpoints are"),
        ("--check --resume", "--check compares from the first step on: it does not go with --resume"),
        ("--save pyproject.toml", "--save pyproject.toml: it must be a folder"),
        ("--check --dropout 0.1", "--check fits --dropout 0 only"),
        ("--check --dtype bfloat16", "--check fits --dtype float32 only"),
        ("--trace no/such/folder.json", "--trace no/such/folder.json: it must be a file in a folder that"),
    ],
)
def test_bad_input_is_answered_in_one_line(arguments, said, capsys):
    try:
        code = main(["train", *arguments.split()])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2
    assert said in err and err.startswith("python -m minipar")
    assert err.count("\n") == 1 and not out


def test_bad_input_that_a_rank_finds_is_answered_without_its_traceback(capsys):
    assert main(["train", "--tp", "3"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"python -m minipar train: .*tp=3.*\n", said), said


def test_bad_input_ends_the_process_with_2():
    assert run("minipar", "train", "--dp", "0").returncode == 2


def test_the_doctor_finds_this_machine_fit():
    done = run("minipar", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["torch"] == torch.__version__
    assert said.keys() >= {"Python", "transformers", "jupyterlab", "cores", "memory", "devices", "loopback", "ranks"}
    assert re.fullmatch(r"right: 1 MiB in \d+\.\d ms", said["all-reduce"])


def _wrong_sum():
    return 7.0, 0.001, 1, "gloo"


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [
        ("_sum_over_ranks", _wrong_sum, "WRONG"),
        ("World", lambda *_, **__: World(0), "do not work"),
    ],
)
def test_the_doctor_says_what_does_not_work(name, broken, said, monkeypatch, capsys):
    monkeypatch.setattr(doctor, name, broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert said in out and "-> " in out
