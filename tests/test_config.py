"""Recipes: what is accepted, and the one line that says what is wrong with the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visalign import config
from visalign.errors import UserError
from visalign.trainers.flow_grpo import FlowGRPO

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {steps: 7}\nrewards: {toybox: 1.0, strict: {use: toybox, form: strict}}\neval: {rewards: {jpeg: 0.5}}\n")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        config.load(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.steps=20", "run", "steps", 20),
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("run.path=some/where", "run", "path", Path("some/where")),
        ("policy.lora=null", "policy", "lora", None),
        ("policy.lora=", "policy", "lora", None),
        ("ratio.clip=[1e-4, 2e-4]", "ratio", "clip", (1e-4, 2e-4)),
        ("exploration.range=[0, 4]", "exploration", "range", (0, 4)),
        ("exploration.shared_noise=true", "exploration", "shared_noise", True),
        ("eval.scan=[]", "eval", "scan", []),
        ("policy.model=a=b", "policy", "model", "a=b"),
    ],
)
def test_overrides_are_yaml(recipe: Path, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(config.load(recipe, [override]), section), key) == value


def test_overrides_may_be_a_mapping_and_the_last_one_counts(recipe: Path) -> None:
    found = config.load(recipe, {"run.steps": 20, "policy.lora.rank": 4, "log": ["wandb"]})
    assert (found.run.steps, found.log) == (20, ["wandb"])
    assert found.policy.lora
    assert found.policy.lora.rank == 4
    assert config.load(recipe, ["run.steps=1", "run.steps=2"]).run.steps == 2


def test_a_mapping_given_by_the_caller_is_not_changed(recipe: Path) -> None:
    own = {"use": "jpeg"}
    assert config.load(recipe, {"rewards.mine": own, "rewards.mine.quality": 50}).rewards["mine"].options == {"quality": 50}
    assert own == {"use": "jpeg"}


# --- rewards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "alias", "use", "weight", "options"),
    [
        ([], "toybox", "toybox", 1.0, {}),
        ([], "strict", "toybox", 1.0, {"form": "strict"}),
        (["rewards.toybox=2"], "toybox", "toybox", 2.0, {}),
        (["rewards.toybox.weight=2"], "toybox", "toybox", 2.0, {}),
        (["rewards.toybox=2e-1"], "toybox", "toybox", 0.2, {}),
        (["rewards.toybox.form=strict"], "toybox", "toybox", 1.0, {"form": "strict"}),
        (["rewards.strict=3"], "strict", "toybox", 3.0, {"form": "strict"}),
        (["rewards.sharp.use=jpeg", "rewards.sharp.quality=50"], "sharp", "jpeg", 1.0, {"quality": 50}),
        (["rewards.clip_score=0.5"], "clip_score", "clip_score", 0.5, {}),
        (["rewards.clip_score.use=tests.toy_rewards:Closeness"], "clip_score", "tests.toy_rewards:Closeness", 1.0, {}),
        (["rewards={jpeg: 2}"], "jpeg", "jpeg", 2.0, {}),
    ],
)
def test_short_forms_of_a_reward(recipe: Path, overrides: list[str], alias: str, use: str, weight: float, options: dict[str, Any]) -> None:
    section = config.load(recipe, overrides).rewards[alias]
    assert (section.use, section.weight, section.options) == (use, weight, options)


def test_held_out_rewards_have_the_same_short_forms(recipe: Path) -> None:
    found = config.load(recipe, ["eval.rewards.jpeg.quality=50", "eval.rewards.toybox=1"]).eval.rewards
    assert (found["jpeg"].weight, found["jpeg"].options) == (0.5, {"quality": 50})
    assert found["toybox"].use == "toybox"


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rnu.steps=3", "rnu is unknown; did you mean run?"),
        ("run.stpes=3", "run.stpes is unknown; did you mean steps?"),
        ("policy.lora.rnk=3", "policy.lora.rnk is unknown; did you mean rank?"),
        ("eval.image=3", "eval.image is unknown; did you mean images?"),
        ("ratio.zzz=3", "ratio.zzz is unknown; known: clip, clip_steps, kind, weight"),
        ("run.steps=abc", "run.steps: expected a valid integer, unable to parse string as an integer, got 'abc'"),
        ("run.steps=0", "run.steps: expected greater than or equal to 1, got 0"),
        ("run=3", "run: expected keys with values, got 3"),
        ("run.steps.x=3", "override run.steps.x: run.steps is 7, which has no keys"),
        ("optimizer.lr=-1", "optimizer.lr: expected greater than or equal to 0, got -1"),
        ("optimizer.lr=.nan", "optimizer.lr: expected a finite number, got nan"),
        ("exploration.kind=al", "exploration.kind: expected 'all', 'window', 'tree' or 'one_branch', got 'al'"),
        ("exploration.range=3", "exploration.range: expected a list, got 3"),
        ("ratio.clip=abc", "ratio.clip: expected a valid number, unable to parse string as a number, got 'abc'"),
        ("ratio.clip=[1, b]", "ratio.clip.1: expected a valid number, unable to parse string as a number, got 'b'"),
        ("ratio.clip=[1]", "ratio.clip.1 is missing"),
        ("ratio.clip=-1", "ratio.clip: expected greater than 0, got -1"),
        ("log=[mlflow]", "log.0: expected 'tensorboard', 'wandb' or 'trackio', got 'mlflow'"),
        ("rewards=3", "rewards: expected a mapping of alias: weight or alias: {use: NAME, …}, got 3"),
        ("eval.rewards.a=true", "eval.rewards.a: expected a weight or {use: NAME, weight: 1.0, …}, got True"),
        ("rewards.toybox.weight=x", "rewards.toybox.weight: expected a valid number, unable to parse string as a number, got 'x'"),
        ("run.steps", "override 'run.steps': expected key.sub=value, such as run.steps=20"),
        ("=3", "override '=3': expected key.sub=value, such as run.steps=20"),
        ("eval.scan=[1", "override 'eval.scan=[1': '[1' is not valid YAML"),
    ],
)
def test_one_line_names_the_key_and_what_was_expected(recipe: Path, override: str, message: str) -> None:
    assert refused(recipe, override) == message


def test_the_trainers_own_section_is_checked_alike(recipe: Path) -> None:
    options = config.load(recipe, ["trainer.micro_bach=4"]).trainer.options
    with pytest.raises(UserError, match=r"^trainer\.micro_bach is unknown; did you mean micro_batch\?$"):
        config.validate(FlowGRPO.Config, options, "trainer")
    with pytest.raises(UserError, match=r"^trainer\.kl_form: expected 'velocity', 'path' or 'flow_grpo', got 'l2'$"):
        config.validate(FlowGRPO.Config, {"kl_form": "l2"}, "trainer")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("toybx", "did you mean toybox?"),
        ("configs/toybox_ful.yaml", "did you mean toybox_full?"),
        ("elsewhere/toybox.yaml", "no config 'elsewhere/toybox.yaml'"),  # a wrong path is not quietly another file
        ("zzz", "known: awm_sd35_pickscore, "),
    ],
)
def test_a_missing_file_names_the_nearest_recipe(name: str, word: str) -> None:
    with pytest.raises(UserError) as error:
        config.load(name)
    assert word in str(error.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        config.load(tmp_path)


@pytest.mark.parametrize("name", ["toybox", "toybox.yaml", "configs/toybox.yaml", str(ROOT / "configs" / "toybox.yaml")])
def test_a_packaged_recipe_is_found_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toybox").mkdir()  # a folder of that name is not in the way
    assert config.load(name).policy.model == "toybox"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"run: {steps: 3", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- run\n- policy", "expected sections such as `run:` and `policy:`, got list"),
        (b"", "got nothing"),
        (b"just words", "got str"),
        (b"run:\n", "run: expected keys with values, got None"),
        (b"1: 2\n", "1"),
        (b"!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path: Path, text: bytes, word: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    assert word in refused(path)


# --- schema ------------------------------------------------------------------------------------------------------------


def test_the_schema_file_is_current() -> None:
    saved = json.loads((ROOT / "configs" / "schema.json").read_text(encoding="utf-8"))
    assert saved == config.schema(), "run `visalign list schema > configs/schema.json`"


def test_the_schema_allows_the_short_forms() -> None:
    found = config.schema()
    assert {"type": "number"} in found["properties"]["rewards"]["additionalProperties"]["anyOf"]
    assert {"type": "number"} in found["$defs"]["EvalSection"]["properties"]["rewards"]["additionalProperties"]["anyOf"]
