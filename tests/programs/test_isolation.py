"""A run needs no network and shows no secret: a real one without any, with secrets in its environment."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastrl import train
from fastrl.base import faults
from fastrl.base.texts import secret_in
from fastrl.settings.run import configure

SECRETS = {
    "HF_TOKEN": "hf_CANARYaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "WANDB_API_KEY": "0123canary456789abcdef0123456789abcdef0",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYCANARY",
    "OPENAI_API_KEY": "sk-canary-cccccccccccccccc",
    "GITHUB_TOKEN": "ghp_canarydddddddddddddddddd",
    "DB_PASSWORD": "canary-correct-horse",
    "MY_SECRET": "canary-mine",
}
SHORT = [
    "--steps",
    "2",
    "--problems-per-step",
    "4",
    "--group-size",
    "4",
    "--eval-limit",
    "4",
    "--save-every",
    "1",
    "--rollouts-every",
    "1",
    "--sample-every",
    "1",
]
# the trainer, and what its own Python has asked of sockets
WATCHED = """
import sys
asked = []
def hook(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        asked.append((event, args[1]))
    elif event.startswith(("socket.get", "urllib.", "http.client.", "ftplib.", "smtplib.")):
        asked.append((event, args[:2]))
sys.addaudithook(hook)
from fastrl.train import main
code = main(sys.argv[1:])
print("ASKED", asked)
sys.exit(code)
"""
LOCAL = re.compile(r"sa_family=AF_(UNIX|NETLINK|UNSPEC)|inet_addr\(\"127\.|inet_pton\(AF_INET6, \"(::1|::ffff:127\.)")


def unshared(*command: str) -> list[str]:
    """The command without any network, or a skip where this user may not have that."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("unshare -rn is not permitted here, so a network cannot be taken away")
    return ["unshare", "-rn", *command]


def hits(folder: Path) -> list[str]:
    """Files below a folder that hold a secret."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [f"{path.name}: {name}" for name, value in SECRETS.items() if value.encode() in content]
    return found


@pytest.mark.promise("D6", trials=1)
@pytest.mark.promise("D7", trials=1)
def test_a_run_needs_no_network_and_shows_no_secret(tmp_path):
    command = unshared(sys.executable, "-c", WATCHED, *SHORT, "--reward", "last_character", "--reward", "math:0.1")
    environment = {**os.environ, **SECRETS}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("ASKED []")
    run = tmp_path / "runs" / "default"
    assert json.loads((run / "status.json").read_text())["reason"] == "done"
    files = {path.name for path in run.rglob("*")}
    assert {
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "state.json",
        "model.safetensors",
        "step_000001.jsonl",
    } <= files
    assert hits(tmp_path) == []
    assert not any(value in done.stdout + done.stderr for value in SECRETS.values())


# of torch.distributed.run: it asks for the address of its own host, and listens on all interfaces for its processes
RENDEZVOUS = re.compile(r"connect\(.*htons\(53\)|bind\(.*sin6_port=htons\(29617\), .*\"::\"")


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.promise("D6", trials=1)
def test_every_socket_is_on_this_machine(ranks, tmp_path):
    """Every socket call of the trainer, its libraries and its workers, seen from outside."""
    if not shutil.which("strace") or not shutil.which("ip"):
        pytest.skip("needs strace and ip")
    trace = tmp_path / "trace"
    several = "torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29617 -m"
    program = f"{sys.executable} -m {several if ranks == 2 else ''} fastrl.train {' '.join(SHORT)} --reward math"
    traced = f"strace -f -qq -e trace=socket,connect,bind,sendto,sendmsg -o {trace} {program}"
    done = subprocess.run(
        unshared("sh", "-c", f"ip link set lo up && {traced}"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls = trace.read_text().splitlines()
    assert ranks == 1 or len([line for line in calls if "127.0.0.1" in line]) > 5  # that is, calls are seen
    far = [line for line in calls if "sa_family" in line and not LOCAL.search(line)]
    assert [line for line in far if ranks == 1 or not RENDEZVOUS.search(line)] == []


@pytest.mark.promise("D7", trials=1)
def test_a_run_that_fails_shows_no_secret_either(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FASTRL_FAULT", "fail@optimizer:2")
    faults.from_environment.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="FASTRL_FAULT at optimizer"):
            train.main([*SHORT, "--out", str(tmp_path / "run")])
    finally:
        monkeypatch.undo()
        faults.from_environment.cache_clear()
    assert "FASTRL_FAULT at optimizer" in (tmp_path / "run" / "traceback.txt").read_text()
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "state.json").exists()
    assert hits(tmp_path) == []


@pytest.mark.parametrize(
    "flag", ["--model", "--name", "--log", "--data", "--instruction", "--eval", "--steps", "--objective"]
)
@pytest.mark.promise("D7", trials=1)
def test_a_secret_on_the_command_line_is_refused_without_repeating_it(flag, monkeypatch):
    """The command line and every setting stand in the run folder."""
    secret = SECRETS["HF_TOKEN"]
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(ValueError) as caught:
        configure([flag, f"x{secret}"])
    assert secret not in str(caught.value) and "holds the value of HF_TOKEN" in str(caught.value)
    assert flag.removeprefix("--") in str(caught.value)


def test_what_is_a_secret(monkeypatch):
    for name, value in {"MY_TOKEN": "short", "TOKENIZERS_PARALLELISM": "falsefalse", "HOME_KEY": "12345678"}.items():
        monkeypatch.setenv(name, value)
    assert secret_in("a short falsefalse") is None and secret_in("12345678") == "HOME_KEY"
