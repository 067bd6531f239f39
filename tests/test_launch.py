"""The launch scripts against stubs that record how they were called."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
STUB = f"""#!{sys.executable}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
if [name, *sys.argv[1:2]] == ["git", "status"]:  # it changes nothing
    sys.exit(print(os.environ.get("DIRTY", ""), end=""))
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if "describe" in sys.argv:  # the next of the states
    states = pathlib.Path(os.environ["STATES"])
    first, *rest = states.read_text().split()
    states.write_text(" ".join(rest or [first]))
    if first == "absent":
        sys.exit("ERROR: (gcloud) NOT_FOUND: no such slice")
    if first == "fails":
        sys.exit("ERROR: (gcloud) UNAVAILABLE: try again")
    print(first)
sys.exit(int(os.environ.get("STATUS", 0)))
"""
SLICE = ["--name", "s", "--zone=z"]
KIND = ["--type", "v5litepod-16", "--runtime", "v2"]
# What a shell could get wrong.
HARD = ["--config", "my config.py", '--config.data.template=It\'s "$HOME" `x` \\ {q}\n', ""]
TRAIN = [".venv/bin/python", "-m", "gemma_lora.train"]


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """launch(script, *arguments, states=...) -> (process, calls: the argv of each stub)."""
    for name in ("gcloud", "ssh", "scp", "sbatch", "git"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    calls, states = tmp_path / "calls", tmp_path / "states"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in (("CALLS", calls), ("STATES", states), ("TMPDIR", tmp_path)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TPU_VM_POLL", "0")

    def run(script, *arguments, after="ACTIVE"):
        calls.write_text("")
        states.write_text(after)
        line = ["bash", str(LAUNCH / script), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        return done, [json.loads(x) for x in calls.read_text().splitlines()]

    return run


def verbs(calls) -> list[str]:
    """'describe', 'create', 'ssh', ... of each call of gcloud, and the names of the others."""
    return [c[4] if c[0] == "gcloud" else c[0] for c in calls]


def in_a_shell(command: str, directory: Path) -> list[str]:
    """What the training gets from a command that a host runs; its Python is a stub there."""
    home = directory / "gemma_lora"
    (home / ".venv" / "bin").mkdir(parents=True)
    python = home / ".venv" / "bin" / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    seen = directory / "seen"
    environment = os.environ | {"CALLS": str(seen), "STATUS": "7"}
    done = subprocess.run(["bash", "-c", command], cwd=directory, env=environment, timeout=60)
    follow = 'cd gemma_lora; tail --pid="$(cat run.pid)" -f /dev/null'
    subprocess.run(["bash", "-c", follow], cwd=directory, timeout=60, check=False)
    assert done.returncode in (0, 7)
    [line] = seen.read_text().splitlines()
    return json.loads(line)[1:]


def test_create_waits(launch):
    done, calls = launch(
        "tpu_vm.sh", "create", *SLICE, *KIND, "--spot", "--project=p",
        after="WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    where = ["s", "--zone=z", "--project=p"]
    assert calls[0] == [
        *queued, "create", *where, "--node-id=s", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2", "--spot",
    ]  # fmt: skip
    assert calls[1:] == [[*queued, "describe", *where, "--format=value(state.state)"]] * 3
    done, calls = launch("tpu_vm.sh", "create", *SLICE, *KIND, after="PROVISIONING FAILED")
    assert done.returncode == 2 and "--spot" not in calls[0]
    assert done.stderr.splitlines()[-1] == "error: the slice s is FAILED, expected ACTIVE"


def test_install_puts_the_tree_on_every_host(launch):
    done, calls = launch("tpu_vm.sh", "install", *SLICE, "--nfs", "10.0.0.2:/a b")
    assert done.returncode == 0 and verbs(calls) == ["ssh", "git", "scp", "ssh", "ssh"], done.stderr
    assert "a run is under way" in calls.pop(0)[-1]
    archive = calls[0][3].removeprefix("--output=")
    assert calls[1][5:] == [archive, "s:gemma_lora.tar.gz", "--zone=z", "--worker=all"]
    assert all("--worker=all" in c for c in calls[1:])
    assert calls[2][-1].endswith("cd gemma_lora && bash launch/setup.sh .venv tpu,gs")
    assert "mount -t nfs -o lookupcache=positive '10.0.0.2:/a b' share" in calls[3][-1]
    assert "not copied" not in done.stderr


def test_setup_says_what_it_takes():
    done = subprocess.run(["bash", str(LAUNCH / "setup.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "usage: bash launch/setup.sh VENV EXTRAS"
    )
    for wrong in ("tets", "dependencies", "d.mo"):  # the second is a list of pyproject.toml
        done = subprocess.run(
            ["bash", str(LAUNCH / "setup.sh"), "/nowhere/venv", f"demo,{wrong}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert f"there is no extra {wrong}; expected some of: tpu gpu clean gs demo" in done.stderr


@pytest.mark.once
def test_setup_repairs_a_venv_whose_python_is_gone(tmp_path):
    """Asked not to fetch anything, pip fails; by then the Python is there again."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(tmp_path / "gone")
    (venv / ".gemma_lora").write_text("an older stamp")
    nothing = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(["bash", str(LAUNCH / "setup.sh"), str(venv), "demo"],
                          env=os.environ | nothing, capture_output=True, text=True)  # fmt: skip
    assert done.returncode and "No such file" not in done.stderr, done.stderr
    assert subprocess.run([venv / "bin" / "python", "-c", ""]).returncode == 0
    assert (venv / ".gemma_lora").read_text() == "incomplete\n"


# Makes "venvs" that hold itself, and notes what pip is asked for.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") [ -z "$FAILS" ] || exit 1; mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >>"$CALLS" ;;
  "-c "*version_info\\[:2*) echo 3.13 ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """setup(extras, **environment) -> (process, what pip was asked to install, or None)."""
    python, calls = tmp_path / "a python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(extras, **environment):
        calls.write_text("")
        line = ["bash", str(LAUNCH / "setup.sh"), str(tmp_path / "a venv"), extras]
        given = {"PYTHON": str(python), "CALLS": str(calls)} | environment
        done = subprocess.run(line, env=os.environ | given, capture_output=True, text=True)
        asked = calls.read_text().split()
        return done, asked[-1] if asked else None

    return run


def test_setup_keeps_what_a_venv_has(setup, tmp_path):
    done, asked = setup("demo,gpu")
    assert (done.returncode, asked) == (0, ".[demo,gpu]"), done.stderr
    mine = tmp_path / "a venv" / "mine"
    mine.touch()
    for extras, environment in (
        ("gpu,demo", {}),
        ("demo", {"PYTHON": "", "PYTHON_VERSIONS": "3.12 3.13"}),
    ):
        done, asked = setup(extras, **environment)
        assert (done.returncode, asked, done.stdout) == (0, None, ""), done.stderr
    done, asked = setup("test,demo", PYTHON="")
    assert (done.returncode, asked) == (0, ".[demo,gpu,test]")
    assert mine.exists()
    done, asked = setup("demo", PYTHON="/no/such")
    assert done.returncode == 1 and "PYTHON=/no/such is no Python" in done.stderr
    done, asked = setup("test")  # nothing was touched
    assert (done.returncode, asked) == (0, None) and mine.exists()
    # Of other pins it is made anew, with the extras it had.
    stamp = tmp_path / "a venv" / ".gemma_lora"
    stamp.write_text("other" + stamp.read_text())
    done, asked = setup("demo")
    assert (done.returncode, asked) == (0, ".[demo,gpu,test]") and not mine.exists()


def test_setup_that_was_interrupted_begins_anew(setup):
    done, asked = setup("demo", FAILS="1")
    assert (done.returncode, asked) == (1, None)
    done, asked = setup("demo")
    assert (done.returncode, asked) == (0, ".[demo]"), done.stderr


def test_other_extras_and_what_is_not_committed(launch, monkeypatch):
    monkeypatch.setenv("DIRTY", "?? configs/mine.py\n")
    for line in (
        ["tpu_vm.sh", "install", *SLICE, "--extras", "tpu,demo"],
        ["gpu.sh", "install", "--hosts=a", "--extras", "tpu,demo"],
    ):
        done, calls = launch(*line)
        assert done.returncode == 0 and "note: what is not committed is not copied" in done.stderr
        assert calls[-1][-1].endswith("bash launch/setup.sh .venv tpu,demo")


def test_run_on_every_host(launch, tmp_path):
    done, [call] = launch("tpu_vm.sh", "run", *SLICE, "--", *HARD)
    assert done.returncode == 0, done.stderr
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "s"]
    assert call[7] == "--worker=all"
    command = call[-1].removeprefix("--command=")
    assert in_a_shell(command, tmp_path) == [*TRAIN[1:], "--coordinator", "auto", *HARD]
    assert (tmp_path / "gemma_lora" / "run.status").read_text() == "7\n"
    (tmp_path / "gemma_lora" / "run.pid").write_text(str(os.getpgrp()))
    again = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr == "error: a run is under way\n"


def test_logs_end_as_the_run_did(launch, tmp_path):
    done, [call] = launch("tpu_vm.sh", "logs", *SLICE, "--worker", "3")
    assert done.returncode == 0 and call[-2] == "--worker=3"
    home = tmp_path / "gemma_lora"
    home.mkdir()
    for name, text in (("run.log", "step 1\n"), ("run.status", "75\n"), ("run.pid", "999999999")):
        (home / name).write_text(text)
    command = call[-1].removeprefix("--command=")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "step 1\n")
    (home / "run.status").unlink()
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: the run was killed, or its host")


STOPPED = f"""#!{sys.executable}
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # it saves, and ends as train does
print("training", flush=True)
signal.pause()
"""


def test_stop_lets_the_run_save(launch, tmp_path):
    """The training gets the signal, its shell outlives it and writes how it ended."""
    _, [call] = launch("tpu_vm.sh", "run", *SLICE, "--", *HARD)
    start = call[-1].removeprefix("--command=")
    _, [call] = launch("tpu_vm.sh", "stop", *SLICE)
    assert call[7] == "--worker=all"
    stop = call[-1].removeprefix("--command=")
    bin_ = tmp_path / "gemma_lora" / ".venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").write_text(STOPPED)
    (bin_ / "python").chmod(0o755)

    def host(command):
        line = ["bash", "-c", command]
        return subprocess.run(line, cwd=tmp_path, timeout=60, stderr=subprocess.PIPE, text=True)

    assert host(stop).stderr == "error: no run is under way\n"
    assert host(start).returncode == 0
    assert host("until grep -q training gemma_lora/run.log; do sleep 0.1; done").returncode == 0
    assert host(start).stderr == "error: a run is under way\n"
    assert host(stop).returncode == 0
    host(stop)  # too late, or of no effect
    host('tail --pid="$(cat gemma_lora/run.pid)" -f /dev/null')
    assert (tmp_path / "gemma_lora" / "run.status").read_text() == "130\n"
    assert host(stop).returncode == 2


@pytest.mark.parametrize(
    "states,expected",
    [
        ("ACTIVE", ["describe", "ssh", "git", "scp", "ssh", "ssh"]),
        (
            "SUSPENDED ACTIVE",
            ["describe", "delete", "create", "describe", "ssh", "git", "scp", "ssh", "ssh"],
        ),
        (
            "WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
            ["describe", "describe", "describe", "ssh", "git", "scp", "ssh", "ssh"],
        ),
        ("absent ACTIVE", ["describe", "create", "describe", "ssh", "git", "scp", "ssh", "ssh"]),
        (
            "PROVISIONING fails fails ACTIVE",
            ["describe", "describe", "describe", "describe", "ssh", "git", "scp", "ssh", "ssh"],
        ),
    ],
)
def test_resume_makes_anew_what_was_preempted(states, expected, launch):
    done, calls = launch("tpu_vm.sh", "resume", *SLICE, *KIND, "--", *HARD, after=states)
    assert done.returncode == 0 and verbs(calls) == expected, done.stderr
    assert "gemma_lora.train" in calls[-1][-1]


def test_a_slice_in_another_state_is_left_alone(launch):
    done, calls = launch("tpu_vm.sh", "resume", *SLICE, *KIND, "--", *HARD, after="DELETING")
    assert done.returncode == 2 and verbs(calls) == ["describe"]
    assert "the slice s is 'DELETING'" in done.stderr


def test_what_gcloud_does_not_tell_is_not_made_anew(launch):
    done, calls = launch("tpu_vm.sh", "resume", *SLICE, *KIND, "--", *HARD, after="fails")
    assert done.returncode == 2 and verbs(calls) == ["describe"]
    assert "UNAVAILABLE" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: gcloud does not tell the state of the slice s"
    done, calls = launch("tpu_vm.sh", "create", *SLICE, *KIND, after="fails")
    assert done.returncode == 2 and verbs(calls) == ["create"] + ["describe"] * 10


def test_a_host_without_an_installation_says_so(launch, tmp_path):
    _, [call] = launch("tpu_vm.sh", "run", *SLICE, "--", *HARD)
    command = call[-1].removeprefix("--command=")
    for home in (tmp_path / "gemma_lora", None):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "nothing is installed" in done.stderr
        assert not list(tmp_path.glob("run.*"))
        if home:
            home.mkdir()


def test_delete(launch):
    done, [call] = launch("tpu_vm.sh", "delete", *SLICE)
    assert done.returncode == 0
    assert call[4:] == ["delete", "s", "--zone=z", "--force", "--quiet"]


@pytest.mark.parametrize(
    "line",
    [
        ["tpu_vm.sh", "create", *SLICE, *KIND],
        ["tpu_vm.sh", "install", *SLICE],
        ["tpu_vm.sh", "run", *SLICE, "--", *HARD],
        ["tpu_vm.sh", "logs", *SLICE],
        ["tpu_vm.sh", "resume", *SLICE, *KIND, "--", *HARD],
        ["tpu_vm.sh", "delete", *SLICE],
        ["gpu.sh", "install", "--hosts", "a,b"],
        ["gpu.sh", "run", "--hosts", "a,b", "--", *HARD],
        ["gpu.sh", "slurm", "--nodes", "2", "--gpus", "8", "--", *HARD],
    ],
    ids=lambda line: f"{line[0]} {line[1]}",
)
def test_dry_run_prints_what_would_be_called(line, launch):
    done, calls = launch(line[0], line[1], "--dry-run", *line[2:])
    assert done.returncode == 0 and calls == [] and done.stderr == ""
    words = shlex.split(done.stdout, comments=True)
    real, calls = launch(*line, after="SUSPENDED ACTIVE" if "resume" in line else "ACTIVE")
    assert real.returncode == 0
    called = sorted(word for call in calls for word in call)  # hosts answer in any order
    assert sorted(words) == called


def test_gpus_of_several_hosts(launch, tmp_path):
    done, calls = launch("gpu.sh", "run", "--hosts", "me@a,b", "--port=99", "--", *HARD)
    assert done.returncode == 0, done.stderr
    calls.sort(key=lambda call: call[1], reverse=True)
    assert [c[:2] for c in calls] == [["ssh", "me@a"], ["ssh", "b"]]
    for i, (_, host, command) in enumerate(calls):
        place = ["--coordinator", "a:99", "--processes", "2", "--process", str(i)]
        (tmp_path / host).mkdir()
        assert in_a_shell(command, tmp_path / host) == [*TRAIN[1:], *place, *HARD]


def test_ctrl_c_leaves_the_connections_to_the_hosts(launch, tmp_path):
    """It reaches ssh, too, through which the trainings print until they have saved."""
    ignored = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) != signal.SIG_IGN)"
    (tmp_path / "ssh").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{ignored}'\n")
    done, _ = launch("gpu.sh", "run", "--hosts", "a,b", "--", *HARD)
    assert done.returncode == 0, done.stderr


def test_a_host_that_fails_is_named(launch, monkeypatch):
    monkeypatch.setenv("STATUS", "75")
    done, _ = launch("gpu.sh", "run", "--hosts", "a,b", "--", *HARD)
    assert done.returncode == 75
    assert "error: a ended with status 75\nerror: b ended with status 75" in done.stderr


def test_slurm_job(launch):
    flags = ["--nodes", "2", "--gpus", "8", "--time", "1:00:00", "--partition=gpu", "--cpus=12"]
    done, [call] = launch("gpu.sh", "slurm", *flags, "--", *HARD)
    assert done.returncode == 0, done.stderr
    assert {
        "--nodes=2", "--ntasks-per-node=8", "--gres=gpu:8", "--time=1:00:00", "--partition=gpu",
        "--signal=TERM@120", "--cpus-per-task=12",
    } <= set(call)  # fmt: skip
    command = shlex.split(call[-1].removeprefix("--wrap="))
    assert command[:4] == ["exec", "srun", "--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert command[4:] == [*TRAIN, "--coordinator", "auto", *HARD]


@pytest.mark.parametrize(
    "line,message",
    [
        (["tpu_vm.sh"], "no verb, expected one of: create install"),
        (["tpu_vm.sh", "crate", *SLICE], "unknown verb 'crate', expected one of: create"),
        (["tpu_vm.sh", "delete", "--name", "s"], "delete needs --zone"),
        (["tpu_vm.sh", "delete", "--zone", "z"], "delete needs --name"),
        (["tpu_vm.sh", "delete", "--zone", "z", "--name"], "--name needs a value"),
        (["tpu_vm.sh", "delete", "--zone", "z", "--name="], "--name needs a value"),
        (["tpu_vm.sh", "create", *SLICE, "--type", "v5litepod-8"], "create needs --runtime"),
        (["tpu_vm.sh", "resume", *SLICE, "--", "x"], "resume needs --type"),
        (["tpu_vm.sh", "run", *SLICE], "run needs the training's flags after --"),
        (["tpu_vm.sh", "delete", *SLICE, "--", "x"], "delete takes nothing after --"),
        (["tpu_vm.sh", "run", *SLICE, "--config", "x"], "unknown flag '--config' of run"),
        (["gpu.sh", "run"], "run needs the training's flags after --"),
        (["gpu.sh", "slurm", "--nodes", "2", "--", "x"], "slurm needs --gpus"),
        (["gpu.sh", "slurm", "--nodes=two", "--gpus=8", "--", "x"], "'two' is no positive number"),
        (["gpu.sh", "run", "--hosts", "a,,b", "--", "x"], "--hosts is 'a,,b'"),
        (["gpu.sh", "run", "--nodes", "2", "--", "x"], "unknown flag '--nodes' of run"),
        (["gpu.sh", "slurm", "--hosts=a", "--", "x"], "unknown flag '--hosts=a' of slurm"),
        (["tpu_vm.sh", "run", *SLICE, "--nfs=a", "--", "x"], "unknown flag '--nfs=a' of run"),
        (["gpu.sh", "run", "--host", "a", "--", "x"], "unknown flag '--host' of run"),
    ],
)
def test_bad_calls(line, message, launch):
    done, calls = launch(*line)
    assert done.returncode == 2 and calls == [] and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gpu.sh"])
def test_help_is_the_header(script, monkeypatch):
    monkeypatch.chdir(LAUNCH.parent / "tests")
    line = ["bash", f"../launch/{script}", "--help"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and f"bash launch/{script} VERB" in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout


def test_shellcheck():
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    done = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
