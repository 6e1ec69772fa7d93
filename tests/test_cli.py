"""The commands: bad input is one line that names the offender and exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visalign import checkpoint, cli
from visalign.families.toy import Toy
from visalign.scoring import Panel, Reward, RewardError, RewardInput, RewardOutput, RewardSpec
from visalign.trainer import NonFiniteError, Trainer
from visalign.trainers.flow_grpo import FlowGRPO

Refused = Callable[..., str]


class Told(Reward):
    """The brightness that the metadata tells."""

    spec = RewardSpec("told")

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(torch.tensor([float(known["brightness"]) for known in batch.metadata]))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns its one line."""

    def run(*words: str | Path) -> str:
        assert cli.main([str(word) for word in words]) == 2
        output = capsys.readouterr()
        lines = [line for line in output.err.replace("\r", "\n").splitlines() if "%|" not in line and line.strip()]  # progress bars
        assert len(lines) == 1, output.err
        assert "Traceback" not in output.err + output.out
        return lines[0].removeprefix("visalign: ")

    return run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\n")
    return path


def written(path: Path, model: str, prompts: Path, rewards: dict[str, Any]) -> Path:
    recipe = {
        "run": {"steps": 2, "path": str(path / "run"), "device": "cpu", "checkpoint_every": 1},
        "policy": {"model": model, "lora": None, "steps": 3},
        "prompts": {"train": str(prompts), "test": str(prompts)},
        "rewards": rewards,
        "eval": {"images": 2, "every": 2, "grid": 2},
        "trainer": {"prompts": 1, "group_size": 2, "micro_batch": 2},
    }
    file = path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def toy(tmp_path: Path, prompts: Path) -> Path:
    """A recipe whose model and reward cost nothing to load."""
    return written(tmp_path, "toy:gaussian", prompts, {"close": {"use": "tests.toy_rewards:Closeness"}})


@pytest.fixture(scope="module")
def finished(tiny_sd3: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of two steps that has been made, in a folder of its own; not to be written to."""
    file = written(tmp_path_factory.mktemp("finished"), str(tiny_sd3), prompts, {"jpeg": 1.0})
    assert cli.main(["train", str(file)]) == 0
    return file


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    file = tmp_path / "recipe.yaml"
    file.write_text(finished.read_text().replace(str(finished.parent), str(tmp_path)))
    return file


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_noise((24, 16), 64).convert("RGB").save(path)
    return path


# --- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "no command 'tran'; did you mean train?"),
        (["--steps"], "unknown option --steps (see visalign --help)"),
        (["train", "--step", "3"], "unknown option --step (see visalign --help)"),
        (["train", "toybox", "more"], "override 'more': expected key.sub=value, such as run.steps=20"),
        (["train", "toybx"], "no config 'toybx', neither as a file nor among the packaged recipes; did you mean toybox?"),
        (["check", "toybx"], "no config 'toybx', neither as a file nor among the packaged recipes; did you mean toybox?"),
        (["evaluate", "toybx"], "no config 'toybx', neither as a file nor among the packaged recipes; did you mean toybox?"),
        (["evaluate"], "the following arguments are required: source (see visalign --help)"),
        (["evaluate", "toybox", "--images", "many"], "argument --images: invalid int value: 'many' (see visalign --help)"),
        (["evaluate", "toybox", "--images", "0"], "--images 0: expected 1 or more"),
        (["list", "reward"], "'reward'"),
        (["score", "a.png", "--reward", "jpeg"], "one of the arguments --prompt --prompts is required (see visalign --help)"),
        (["export", "nowhere", "--out", "there"], "nowhere is no run folder: it has no config.yaml"),
        (["plan", "toybox", "--gpu", "h1000"], "--gpu h1000: not in the table; did you mean h100?"),
        (["plan", "toybox", "--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["demo", "--reward", "jpg"], "no reward named 'jpg'; did you mean jpeg?"),
        (["demo", "--reward", "diversity"], "--reward diversity: it compares pictures; the demo scores one by one"),
        (["demo", "--device", "abacus"], "'abacus' can't be used here"),
    ],
)
def test_a_wrong_word(refused: Refused, words: list[str], message: str) -> None:
    assert message in refused(*words)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    for command in (["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as done:  # argparse leaves by itself
            cli.main(command)
        assert done.value.code == 0
        assert "usage: visalign" in capsys.readouterr().out
    assert all(name in overview for name in ("train", "check", "evaluate", "sample", "score", "export", "demo", "plan", "list"))


# --- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stpes=3", "run.stpes is unknown; did you mean steps?"),
        ("run.steps=many", "run.steps: expected a valid integer"),
        ("trainer.group_sise=2", "trainer.group_sise is unknown; did you mean group_size?"),
        ("trainer.name=flow_grop", "no trainer named 'flow_grop'; did you mean flow_grpo?"),
        ("trainer.group_size=1", "trainer.group_size=1: a group of one has nothing to be compared with"),
        ("trainer.prompts=3 trainer.micro_batch=4", "trainer.micro_batch=4"),
        ("rewards.jpg=1", "no reward named 'jpg'; did you mean jpeg?"),
        ("rewards.jpeg.qualty=1", "rewards.jpeg.qualty is unknown; did you mean quality?"),
        ("rewards.jpeg.quality=best", "rewards.jpeg.quality: expected a valid integer"),
        ("eval.rewards.toybox.formm=strict", "eval.rewards.toybox.formm is unknown; did you mean form?"),
        ("rewards={}", "rewards: none given"),
        ("policy.model=/nowhere", "model '/nowhere' is no diffusers pipeline: no such folder"),
        ("policy.model=toy:circle", "no toy world 'circle'; known: gaussian, mixture"),
        ("policy.family=sd33", "no family named 'sd33'; did you mean sd3?"),
        ("policy.options.size=3", "policy.options.size is unknown"),
        ("policy.lora.rank=4", "policy.lora: toy:gaussian can't hold an adapter; use policy.lora=null"),
        ("prompts.balance=tag", "has no 'tag' to balance by"),
        ("run.device=abacus", "run.device: 'abacus' can't be used here"),
        ("run.resume=step_7", "run.resume: no checkpoint at 'step_7'"),
        ("exploration.kind=window exploration.size=9", "exploration: no window of 9 steps"),
        ("exploration.kind=window exploration.range=[2,9]", "exploration: no window of 2 steps in [2, 9)"),
        ("optimizer.lr=0", "optimizer.lr=0 trains nothing"),
    ],
)
def test_a_wrong_recipe(refused: Refused, toy: Path, override: str, message: str) -> None:
    assert message in refused("train", toy, *override.split(" "))
    assert not (toy.parent / "run" / "metrics.jsonl").exists()


def test_a_broken_recipe(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("run: {steps: [}")
    assert "broken.yaml is not valid YAML" in refused("train", file)
    assert f"{tmp_path} is a folder" in refused("train", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "\n# only a comment\n", "empty.txt has no prompts"),
        ("broken.jsonl", '{"prompt": "fine"}\n{"prompt": ', "broken.jsonl, line 2: broken JSON"),
        ("textless.jsonl", '{"text": "a circle"}\n', 'textless.jsonl, line 1: expected an object with a text under "prompt"'),
        ("absent.txt", None, "absent.txt: no such prompt list"),
        ("list.csv", "a circle\n", "expected a prompt list, .txt or .jsonl, not '.csv'"),
    ],
)
def test_wrong_prompts(refused: Refused, toy: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert message in refused("train", toy, f"prompts.train={tmp_path / name}")
    assert message in refused("train", toy, f"prompts.test={tmp_path / name}")


def test_a_folder_that_is_no_model(refused: Refused, toy: Path, tmp_path: Path) -> None:
    assert "it has no model_index.json" in refused("train", toy, f"policy.model={tmp_path}")


def test_a_run_folder_that_cannot_be_made(refused: Refused, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert f"run.path: cannot write to {tmp_path}/file" in refused("train", toy, f"run.path={tmp_path}/file")
    assert "choose another folder" in refused("train", toy, f"run.path={tmp_path}/file/run")


# --- runs --------------------------------------------------------------------------------------------------------------


def test_train_prints_a_summary_and_goes_on_where_it_stopped(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(again), "run.steps=3"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("step 3: 6 pictures")
    assert "jpeg" in output
    assert "report.html" in output
    run = again.parent / "run"
    assert [path.name for path in checkpoint.found(run / "checkpoints")] == ["step_2", "step_3"]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_a_used_folder_is_refused_untouched_with_resume_never(refused: Refused, again: Path) -> None:
    before = (again.parent / "run" / "config.yaml").read_text()
    assert "already holds checkpoints up to step_2" in refused("train", again, "run.resume=never", "run.seed=5")
    assert (again.parent / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize("name", ["trainable.safetensors", "average.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "absent"])
def test_a_damaged_checkpoint(refused: Refused, again: Path, name: str, damage: str) -> None:
    file = again.parent / "run" / "checkpoints" / "step_2" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "garbage":
        file.write_bytes(b"\x80\x02garbage" * 20)
    else:
        file.unlink()
    line = refused("train", again, "run.steps=3")
    assert f"checkpoint {file.parent} can't be read (" in line
    assert "delete it to go on from the one before" in line
    if name == "average.safetensors":  # what export reads
        assert f"checkpoint {file.parent} can't be read (" in refused("export", again.parent / "run", "--out", again.parent / "out")


def test_a_checkpoint_of_other_weights(refused: Refused, again: Path) -> None:
    assert "holds other weights than this recipe trains" in refused("train", again, "run.steps=3", "policy.lora.rank=2")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NonFiniteError("the loss is nan"), 1, "visalign: the loss is nan"),
        (RewardError("mine returned (3,), want (2,)"), 2, "visalign: mine returned (3,), want (2,)"),
        (KeyboardInterrupt(), 130, "visalign: interrupted; the same command goes on from the newest checkpoint"),
    ],
)
def test_what_stops_a_run_is_one_line_and_its_checkpoints_stay(
    again: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def stop(self: Trainer, step: int) -> dict[str, float]:
        raise error

    monkeypatch.setattr(FlowGRPO, "step", stop)
    assert cli.main(["train", str(again), "run.steps=3"]) == code
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output
    assert checkpoint.to_resume(again.parent / "run", "auto") == again.parent / "run" / "checkpoints" / "step_2"


def test_a_fault_of_ours_keeps_its_traceback(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(self: Panel, batch: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Panel, "score", fault)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", str(again), "run.steps=3"])


def test_check_on_the_toy(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(toy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 8
    assert all(line.startswith("ok  ") for line in lines)
    assert not (toy.parent / "run").exists()


def test_check_measures_rewards(toy: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(toy), "--rewards", "8"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("ok   reward close ")
    assert "valid 100%" in line
    assert "blind to the prompt" in line
    recipe = yaml.safe_load(toy.read_text()) | {"rewards": {"flat": {"use": "tests.toy_rewards:Flat"}}}
    toy.write_text(yaml.safe_dump(recipe))
    assert cli.main(["check", str(toy), "--rewards", "8"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL reward flat "), "constant scores teach nothing"
    assert "--rewards 1: expected 2 pictures or more" in refused("check", toy, "--rewards", "1")


def test_check_fails_where_replay_is_not_exact(toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Toy.forward
    calls = iter(range(10**6))

    def drifting(self: Toy, *arguments: Any) -> torch.Tensor:
        return exact(self, *arguments) + 1e-3 * next(calls)

    monkeypatch.setattr(Toy, "forward", drifting)
    assert cli.main(["check", str(toy)]) == 1
    assert any(line.startswith("FAIL replay ") for line in capsys.readouterr().out.splitlines())


def test_evaluate_a_run_and_a_recipe(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures" / "eval.json"
    run = finished.parent / "run"
    assert cli.main(["evaluate", str(run), "--images", "2", "--guidance", "0", "--out", str(out)]) == 0
    assert "jpeg" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["images"], found["guidance"]) == (2, 0)
    assert cli.main(["evaluate", str(finished), "--images", "2", "--reward", "toybox=2"]) == 0
    assert "toybox" in capsys.readouterr().out


def test_evaluate_measures_as_the_run_did(toy: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = yaml.safe_load(toy.read_text()), toy.parent / "run"
    recipe["rewards"] = {"kept": {"use": "shaped", "of": {"use": "tests.toy_rewards:Closeness"}, "pictures": 4}}
    toy.write_text(yaml.safe_dump(recipe))
    assert cli.main(["evaluate", str(toy), "--images", "2"]) == 0, "the model itself, measured against its own pictures"
    assert not run.exists()
    assert cli.main(["train", str(toy)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--images", "2"]) == 0
    assert "kept" in capsys.readouterr().out
    learned = run / "base_rewards.safetensors"
    known = load_file(learned)
    with safe_open(learned, "pt") as content:
        save_file({name: value + 1 if "scores" in name else value for name, value in known.items()}, learned, content.metadata())
    figures = [run / f"{name}.json" for name in ("moved", "own")]
    assert cli.main(["evaluate", str(run), "--images", "2", "--out", str(figures[0])]) == 0
    save_file(known, learned)
    assert cli.main(["evaluate", str(run), "--images", "2", "--out", str(figures[1])]) == 0
    moved, own = (json.loads(file.read_text())["eval/kept"] for file in figures)
    assert moved < own, "held against better pictures"
    learned.write_bytes(learned.read_bytes()[:100])
    assert "base_rewards.safetensors can't be read" in refused("evaluate", run, "--images", "2")


def test_evaluate_refuses(refused: Refused, finished: Path, tmp_path: Path) -> None:
    assert "--reward jpeg.weight: expected a valid number" in refused("evaluate", finished, "--reward", "jpeg=much")
    assert "no reward named 'jpg'; did you mean jpeg?" in refused("evaluate", finished, "--reward", "jpg")
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused("evaluate", finished, "--images", "2", "--out", tmp_path / "file" / "eval.json")


def test_export_writes_a_pipeline(finished: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished.parent / "run"
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "pipeline" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_index.json").is_file()
    (tmp_path / "file").write_text("in the way")
    assert "--out: cannot write to" in refused("export", run, "--out", tmp_path / "file")


def test_export_of_two_runs_blended(finished: Path, again: Path, tmp_path: Path, refused: Refused) -> None:
    run, other = finished.parent / "run", again.parent / "run"
    weights = other / "checkpoints" / "step_2" / "average.safetensors"
    known = load_file(weights)
    name = next(iter(known))
    save_file(known | {name: known[name] + 1}, weights)
    assert cli.main(["export", str(run), "--blend", f"{other}=0.25", "--out", str(tmp_path / "out")]) == 0
    mixed = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(mixed[name], known[name] + 0.25)
    assert "--blend half: expected RUN=SHARE" in refused("export", run, "--blend", "half", "--out", tmp_path / "out")
    assert "with a share from 0 to 1" in refused("export", run, "--blend", f"{other}=2", "--out", tmp_path / "out")


def test_export_before_the_first_checkpoint(refused: Refused, again: Path) -> None:
    shutil.rmtree(again.parent / "run" / "checkpoints")
    assert "has no checkpoint yet" in refused("export", again.parent / "run", "--out", again.parent / "out")


# --- score -------------------------------------------------------------------------------------------------------------


def test_score_files(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat.png"
    Image.new("RGB", (64, 48), "red").save(flat)  # another size
    assert cli.main(["score", str(picture), str(flat), "--prompt", "noise", "--reward", "jpeg=2"]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first[:2] == [str(picture), "jpeg"]
    assert float(first[-1]) == pytest.approx(2 * float(first[2]), abs=1e-3)  # the total
    assert float(first[2]) != float(second[2])


def test_score_passes_what_a_prompt_list_knows(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"prompt": "one red circle", "tag": "single_object", "brightness": 0.25}
    (tmp_path / "list.jsonl").write_text(json.dumps(record) + "\n")
    words = ["score", str(picture), "--prompts", str(tmp_path / "list.jsonl"), "--reward", "tests.test_cli:Told"]
    assert cli.main(words) == 0
    assert "total 0.2500" in capsys.readouterr().out


def test_score_refuses(refused: Refused, picture: Path, prompts: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    common = ["--prompt", "noise", "--reward", "jpeg"]
    assert f"{text} can't be read as a picture" in refused("score", text, *common)
    assert f"{tmp_path}/absent.png: no such file" in refused("score", tmp_path / "absent.png", *common)
    assert "can't be read as a picture" in refused("score", tmp_path, *common)
    assert "1 pictures and 2 prompts" in refused("score", picture, "--prompts", prompts, "--reward", "jpeg")
    assert "absent.txt: no such prompt list" in refused("score", picture, "--prompts", tmp_path / "absent.txt", "--reward", "jpeg")
    assert "no reward named 'jpg'; did you mean jpeg?" in refused("score", picture, "--prompt", "noise", "--reward", "jpg")
    assert "--reward jpeg.weight: expected a valid number" in refused("score", picture, "--prompt", "noise", "--reward", "jpeg=x")
    assert "rewards.jpeg.checkpoint is unknown" in refused("score", picture, *common, "--checkpoint", "somewhere")


# --- sample ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a circle", "--reward", "jpg"], "no reward named 'jpg'; did you mean jpeg?"),
        (["a circle", "--judge", "jpg"], "no reward named 'jpg'; did you mean jpeg?"),
        (["a circle", "--reward", "jpeg=much"], "--reward jpeg.weight: expected a valid number"),
        (["a circle", "--method", "best_of_m"], "no sampling method named 'best_of_m'; did you mean best_of_n?"),
        (["a circle", "--method", "best_of_n"], "best_of_n needs a reward to search by"),
        (
            ["a circle", "--method", "gradient", "--reward", "jpeg"],
            "gradient climbs the gradients of rewards, and rewards.jpeg (jpeg) has none",
        ),
        (
            ["a circle", "--method", "svdd", "--reward", "jpeg", "--option", "proposal=2"],
            "svdd.proposal is unknown; did you mean proposals?",
        ),
        (["a circle", "--method", "svdd", "--reward", "jpeg", "--option", "proposals"], "--option 'proposals': expected KEY=VALUE"),
        (["a circle", "--budget", "nfe=0"], "budget.nfe: expected greater than 0, got 0"),
        (["a circle", "--budget", "reward_calls=0"], "budget.reward_calls: expected greater than or equal to 1, got 0"),
        (["a circle", "--budget", "nef=100"], "budget.nef is unknown; did you mean nfe?"),
        (["a circle", "--budget", "100"], "--budget '100': expected KEY=VALUE"),
        (
            ["a circle", "--budget", "nfe=5", "--model", "toy:gaussian"],
            "budget.nfe=5 is less than one picture: 10 steps at guidance 1 are 10 NFE",
        ),
        (["a circle", "--budget", "memory=4", "--model", "toy:gaussian", "--device", "cpu"], "budget.memory: only a CUDA device's memory"),
        (["a circle", "--n", "0"], "--n 0 --steps 10 --batch 16: expected 1 or more of each"),
        ([""], "the prompt is empty"),
        (["a circle", "  "], "prompt 2 is empty"),
        ([], "no prompt given; name some, or --prompts FILE"),
        (["a circle", "--prompts", "list.txt"], "--prompts: give prompts or a file, not both"),
        (["--prompts", "absent.txt"], "absent.txt: no such prompt list"),
        (["a circle", "--model", "/nowhere"], "model '/nowhere' is no diffusers pipeline: no such folder"),
    ],
)
def test_sample_refuses(refused: Refused, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in refused("sample", *words, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))


def test_sample_needs_a_folder(refused: Refused, tmp_path: Path) -> None:
    assert "required: --out" in refused("sample", "a circle")
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused("sample", "a circle", "--model", "toy:gaussian", "--out", tmp_path / "file" / "out")


def test_sample_draws_searches_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "one", "two", "--model", "toy:gaussian", "--reward", "tests.toy_rewards:Closeness=2", "--judge", "jpeg", "--n", "3"]
    words += [
        "--method",
        "feynman_kac",
        "--option",
        "strength=3",
        "--option",
        "at=[0.5]",
        "--budget",
        "nfe=40",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "6 pictures of 2 prompts, 40 NFE and 0 backwards a picture" in said
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(found["means"]) == {"scores/tests.toy_rewards:Closeness", "scores/total", "held_out/jpeg", "held_out/total"}
    assert [record["prompt"] for record in found["prompts"]] == ["one", "two"]
    record = json.loads((tmp_path / "out" / "00001.json").read_text())
    assert record["pictures"] == ["00001-0.png", "00001-1.png", "00001-2.png"]
    close = record["scores"]["tests.toy_rewards:Closeness"]
    assert record["scores"]["total"] == pytest.approx([2 * score for score in close])
    assert [row["step"] for row in record["trace"]] == [10]
    assert all((tmp_path / "out" / name).is_file() for name in (*record["pictures"], "sheet.png"))


def test_sample_from_a_run_mixes_what_it_learned_with_its_base(finished: Path, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--model", str(finished.parent / "run"), "--method", "hybrid", "--steps", "3", "--device", "cpu"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "00000-0.png").size == (64, 64)


# --- list --------------------------------------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("toybox", "jpeg", "flow_grpo", "sd3", "feynman_kac"):
        assert any(line.startswith(f"  {name} ") and len(line.split()) > 3 for line in lines), name
    assert cli.main(["list", "steering"]) == 0
    assert "SVDD" in capsys.readouterr().out
    assert cli.main(["list", "trainers"]) == 0
    assert "jpeg" not in capsys.readouterr().out


def test_list_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["run"]


def test_the_default_recipe_is_the_toybox() -> None:
    assert cli.split([]) == ("toybox", [])
    assert cli.split(["run.steps=2"]) == ("toybox", ["run.steps=2"])
    assert cli.split(["mine.yaml", "run.steps=2"]) == ("mine.yaml", ["run.steps=2"])


def test_the_script_for_accelerate_launch_is_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    script = Path(cli.__file__).with_name("train.py")
    said: list[Any] = []
    monkeypatch.setattr(sys, "argv", [str(script), "mine.yaml", "run.steps=2"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(cli, "main", lambda words: said.append(words) or 2)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(script), run_name="__main__")
    assert (done.value.code, said) == (2, [["train", "mine.yaml", "run.steps=2"]])
    assert str(script.parent) not in sys.path


def test_a_reader_that_has_had_enough_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["list"]) == 0
