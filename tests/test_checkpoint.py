"""Checkpoints outlive a kill at any moment, and say in one line when they are spoilt."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from visalign import checkpoint
from visalign.errors import UserError

ROOT = Path(__file__).parents[1]
WRITER = """  # for every line of input a child that writes until it is killed
import os, sys
from pathlib import Path
import torch
from visalign import checkpoint

folder = Path(sys.argv[1])
torch.set_num_threads(1)

def run():
    step = int(checkpoint.found(folder)[-1].name[5:]) if checkpoint.found(folder) else 0
    while True:
        step += 1
        value = torch.full((100_000,), float(step))
        optimizer = {"state": {0: {"exp_avg": value}}, "param_groups": []}
        checkpoint.save(folder, step, {"trainable": {"weight": value}}, optimizer, {"updates": step})
        checkpoint.prune(folder, 2)

for _ in sys.stdin:
    child = os.fork()
    if not child:
        run()
    print(child, flush=True)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


def write(folder: Path, step: int) -> Path:
    return checkpoint.save(
        folder, step, {"trainable": {"weight": torch.full((3,), float(step))}, "rewards": {}}, {"state": {}}, {"updates": 2}
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    weights = {"half": torch.rand(2, 3).half(), "turned": torch.rand(2, 3).T, "empty": torch.empty(0), "learning": network.weight}
    path = checkpoint.save(tmp_path, 7, {"trainable": weights, "rewards": {}}, optimizer.state_dict(), {"updates": 3})
    tensors, state, values = checkpoint.load(path, ["trainable", "rewards"])
    assert path.name == "step_7"
    assert values == {"step": 7, "updates": 3}
    assert tensors["rewards"] == {}
    assert tensors["trainable"].keys() == weights.keys()
    assert all(torch.equal(tensors["trainable"][name], weights[name]) for name in weights)
    assert all(torch.equal(state["state"][0][name], value) for name, value in optimizer.state_dict()["state"][0].items())


def test_a_kill_while_writing_loses_no_complete_checkpoint(tmp_path: Path) -> None:
    draw, newest = random.Random(0), 0
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin
        assert writer.stdout
        for _ in range(12):
            print(file=writer.stdin, flush=True)
            child = int(writer.stdout.readline())
            while _newest(tmp_path) == newest:  # however slow the machine
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            assert int(writer.stdout.readline()) == signal.SIGKILL, "the child failed by itself"
            assert _newest(tmp_path) > newest, "what was complete is still there"
            newest = _newest(tmp_path)
            for path in checkpoint.found(tmp_path):
                tensors, optimizer, state = checkpoint.load(path, ["trainable"])
                assert path.name == f"step_{state['step']}"
                assert (tensors["trainable"]["weight"] == state["step"]).all()
                assert (optimizer["state"][0]["exp_avg"] == state["step"]).all()
        writer.stdin.close()
    checkpoint.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {f"step_{newest - 1}", f"step_{newest}"}, "nothing half-written stays"


def _newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoint.found(folder)), default=0)


def test_prune_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        write(tmp_path, step)
    (tmp_path / "step_11.new").mkdir()
    (tmp_path / "step_12").mkdir()  # no state.json: no checkpoint
    (tmp_path / "step_last").mkdir()
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step_2", "step_9", "step_10"]
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step_9", "step_10"]
    assert not (tmp_path / "step_11.new").exists()


def test_a_run_that_went_back_leaves_its_old_course(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    write(tmp_path, 2)  # resumed from step_1
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step_1", "step_2"]
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_an_interrupted_write_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "step_3.new").mkdir()
    (tmp_path / "step_3.new" / "stale.safetensors").write_text("half")
    (tmp_path / "step_3.old").mkdir()
    (tmp_path / "step_3.old" / "stale").write_text("old")
    write(tmp_path, 3)
    assert "stale.safetensors" not in [file.name for file in write(tmp_path, 3).iterdir()]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("trainable.safetensors", b""),
        ("trainable.safetensors", b"\xff" * 64),
        ("optimizer.pt", b""),
        ("optimizer.pt", b"garbage"),
        ("optimizer.pt", b"PK\x03\x04 no archive"),
        ("state.json", b"{"),
        ("state.json", b"\xff"),
    ],
)
def test_a_spoilt_checkpoint_is_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    path = write(tmp_path, 5)
    (path / file).write_bytes(content)
    with pytest.raises(UserError, match="can't be read") as error:
        checkpoint.load(path, ["trainable"])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_loading_runs_no_code(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    code = f"import torch, os\nclass Bad:\n    def __reduce__(self): return (os.mkdir, ({str(tmp_path / 'ran')!r},))\n"
    code += f"torch.save(Bad(), {str(path / 'optimizer.pt')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load(path, ["trainable"])
    assert not (tmp_path / "ran").exists()


def test_what_resume_means(tmp_path: Path) -> None:
    assert checkpoint.to_resume(tmp_path, "auto") is None
    assert checkpoint.to_resume(tmp_path, "never") is None
    with pytest.raises(UserError, match=r"run\.resume: no checkpoint at 'step_3' \(expected auto, never, or a checkpoint's folder\)$"):
        checkpoint.to_resume(tmp_path, "step_3")
    third, seventh = (write(tmp_path / "checkpoints", step) for step in (3, 7))
    assert checkpoint.to_resume(tmp_path, "auto") == seventh
    for words in ("step_3", "checkpoints/step_3", str(third)):
        assert checkpoint.to_resume(tmp_path, words) == third
    with pytest.raises(UserError, match=r"already holds checkpoints up to step_7; choose another run\.path, or run\.resume=auto to go on"):
        checkpoint.to_resume(tmp_path, "never")
    with pytest.raises(UserError, match="has step_3, step_7"):
        checkpoint.to_resume(tmp_path, "step_5")
