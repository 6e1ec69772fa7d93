"""Plug-ins are found by file name, and a user's own by dotted path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visalign import registry, sources
from visalign.config import RewardSection
from visalign.errors import UserError
from visalign.families.toy import Toy
from visalign.guiding import Method
from visalign.loop import Job
from visalign.policy import Family
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.steering.best_of_n import BestOfN
from visalign.trainers.flow_grpo import FlowGRPO

BASES = {"rewards": Reward, "trainers": Job, "families": Family, "steering": Method}


class Constant(Reward):
    """A user's reward."""

    spec = RewardSpec("constant")

    def __init__(self, value: float = 0.0, size: tuple[int, int] = (1, 1)):
        self.value, self.size = value, size

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(torch.full((len(batch),), self.value))


class Doubled(Reward):
    """A user's wrapper."""

    spec = RewardSpec("doubled")

    def __init__(self, of: Reward):
        self.of = of

    def score(self, batch: RewardInput) -> RewardOutput:
        return RewardOutput.of(2 * self.of.score(batch).scores)


class Free(Constant):
    """A user's reward that takes any option."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options


class MyTrainer(FlowGRPO):
    """A user's trainer."""


class MyFamily(Toy):
    """A user's family."""


class MyMethod(BestOfN):
    """A user's sampling method."""


NOT_A_REWARD = dict


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in registry.KINDS for name in registry.names(kind)])
def test_every_file_loads_by_its_stem(kind: str, name: str) -> None:
    found = registry.load(kind, name)
    assert issubclass(found, BASES[kind])
    assert found.__module__ == f"visalign.{kind}.{name}"
    assert sources.summary(kind, name).strip("."), "the first line of the module says what it is"
    assert registry.load(kind, name) is found


@pytest.mark.parametrize(
    ("kind", "expected"), [("rewards", Constant), ("trainers", MyTrainer), ("families", MyFamily), ("steering", MyMethod)]
)
def test_a_users_own_class_loads_by_its_dotted_path(kind: str, expected: type) -> None:
    assert registry.load(kind, f"{__name__}:{expected.__name__}") is expected


def test_a_users_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("from tests.test_registry import Constant\nclass Mine(Constant): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    assert registry.load("rewards", "mine_alone:Mine").__name__ == "Mine"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("rewards", "clip_scor", "no reward named 'clip_scor'; did you mean clip_score?"),
        ("trainers", "flow_gpro", "no trainer named 'flow_gpro'; did you mean flow_grpo?"),
        ("families", "sd33", "no family named 'sd33'; did you mean sd3?"),
        ("steering", "svd", "no sampling method named 'svd'; did you mean svdd?"),
        ("families", "__init__", "no family named '__init__'; known: "),
        ("rewards", "../jpeg", "no reward named '../jpeg'"),
        ("rewards", "no_such_module:Mine", "no_such_module:Mine: No module named 'no_such_module'; expected package.module:Class"),
        ("rewards", f"{__name__}:Absent", "has no attribute 'Absent'"),
        ("rewards", f"{__name__}:NOT_A_REWARD", "is no subclass of visalign's Reward"),
        ("trainers", f"{__name__}:Constant", "is no subclass of visalign's Job"),
    ],
)
def test_what_is_not_there_is_one_line(kind: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load(kind, name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_has_no_gradient_is_known_before_anything_is_loaded() -> None:
    def lost(**rewards: Any) -> str | None:
        return registry.without_gradient({alias: RewardSection.model_validate(section) for alias, section in rewards.items()})

    assert lost(clip={"use": "clip_score"}, dino={"use": "dino"}) is None
    assert lost(clip={"use": "clip_score"}, size={"use": "jpeg"}) == "rewards.size (jpeg)"
    assert lost(clip={"use": "clip_score"}, size={"use": "jpeg", "weight": 0.0}) is None
    assert lost(judge={"use": "vlm_yes"}) is None, "its model decides"
    assert lost(judge={"use": "vlm_yes", "server": "http://localhost:1/v1"}) == "rewards.judge (vlm_yes)"
    assert lost(judge={"use": "vlm_yes", "reason": True}) == "rewards.judge (vlm_yes)"
    safe = {"use": "uncertainty", "of": {"use": "toybox"}}
    assert lost(safe=safe) == "rewards.safe.of (toybox)"
    assert (
        lost(both={"use": "geometric", "of": {"clip": {"use": "clip_score"}, "exact": {"use": "toybox"}}})
        == "rewards.both.of.exact (toybox)"
    )


# --- options -----------------------------------------------------------------------------------------------------------


def test_options_are_checked_and_converted_by_the_annotations() -> None:
    reward = registry.load_reward(f"{__name__}:Constant", value="1e-1", size=[2, 3])
    assert isinstance(reward, Constant)
    assert (reward.value, reward.size) == (0.1, (2, 3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jpeg", {"qualty": 50}, "reward jpeg.qualty is unknown; did you mean quality?"),
        ("jpeg", {"quality": "high"}, "reward jpeg.quality: expected a valid integer, unable to parse string as an integer, got 'high'"),
        ("jpeg", {"quality": 500}, "jpeg: quality must be 1 to 95, got 500"),
        (f"{__name__}:Doubled", {}, f"reward {__name__}:Doubled.of is missing"),
        (f"{__name__}:Doubled", {"of": 3}, f"reward {__name__}:Doubled.of: expected an instance of Reward, got 3"),
        (f"{__name__}:Doubled", {"of": {"quality": 3}}, f"reward {__name__}:Doubled.of.use is missing"),
        (f"{__name__}:Doubled", {"of": {"use": "jpg"}}, f"reward {__name__}:Doubled.of.use: no reward named 'jpg'; did you mean jpeg?"),
        ("geometric", {"of": {"use": "jpeg"}}, "reward geometric.of.use: expected a weight or {use: NAME, weight: 1.0, …}, got 'jpeg'"),
        ("geometric", {"of": {"jpeg": {"qualty": 1}}}, "reward geometric.of.jpeg.qualty is unknown; did you mean quality?"),
    ],
)
def test_a_wrong_option_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load_reward(name, **options)
    assert str(error.value) == message


def test_a_class_that_takes_any_option_gets_them_all() -> None:
    reward = registry.load_reward(f"{__name__}:Free", anything=1)
    assert isinstance(reward, Free)
    assert reward.options == {"anything": 1}


def test_a_wrapper_receives_a_built_reward() -> None:
    reward = registry.load_reward(f"{__name__}:Doubled", of={"use": f"{__name__}:Constant", "value": 3})
    assert reward.score(RewardInput(torch.rand(2, 3, 4, 4), ["a", "b"])).scores.tolist() == [6, 6]


def test_rewards_of_rewards_nest_to_any_depth() -> None:
    inner = {"use": "uncertainty", "of": {"use": "clip_score", "checkpoint": "toybox"}, "form": "weight"}
    reward = registry.load_reward("geometric", of={"clip": inner | {"weight": 2}, "toybox": 1})
    scores = reward.score(RewardInput(torch.rand(2, 3, 64, 64), ["a red star", "a ring"]))
    assert set(scores.components) >= {"clip", "clip/clip_score", "clip/clip_score/cosine", "toybox", "toybox/dense"}
    with pytest.raises(UserError, match=r"^reward geometric\.of\.clip\.of\.use: no reward named 'clip_scor'; did you mean clip_score\?$"):
        registry.load_reward("geometric", of={"clip": {"use": "uncertainty", "of": {"use": "clip_scor"}}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"use": "uncertainty", "of": {"quality": 3}}, "eval.rewards.safe.of.quality.use: no reward named"),
        ({"use": "uncertainty", "of": {"use": "jpeg", "qualty": 3}}, "eval.rewards.safe.of.qualty is unknown; did you mean quality?"),
        ({"use": "uncertainty", "of": {"use": "jpeg"}, "kapa": 3}, "eval.rewards.safe.kapa is unknown; did you mean kappa?"),
        ({"use": "uncertainty"}, "eval.rewards.safe.of is missing"),
        ({"use": "geometric", "of": {"a": "x"}}, "eval.rewards.safe.of.a: expected a weight or {use: NAME, weight: 1.0, …}, got 'x'"),
        ({"use": "shaped", "of": {"weight": 3}}, "eval.rewards.safe.of.use is missing"),
    ],
)
def test_what_is_wrong_inside_a_wrapper_is_named_by_its_path(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.check_rewards({"safe": RewardSection.model_validate(section)}, "eval.rewards")
    assert str(error.value).startswith(message)


def test_rewards_are_refused_before_any_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.load("rewards", "clip_score"), "__init__", _never)
    with pytest.raises(UserError, match="option"):
        registry.check_rewards({"clip": RewardSection.model_validate({"use": "clip_score", "optoin": 1})})


def _never(self: Reward, option: int = 0) -> None:
    raise AssertionError("built")


# --- policies ----------------------------------------------------------------------------------------------------------


def test_a_users_family_takes_the_place_of_the_packaged_one() -> None:
    policy = registry.load_policy("toy:gaussian", family=f"{__name__}:MyFamily", steps=4)
    assert isinstance(policy.family, MyFamily)
    assert policy.family.steps == 4


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("toybox/nothing", {}, "no toybox part 'toybox/nothing'"),
        ("/no/such/folder", {}, "model '/no/such/folder' is no diffusers pipeline: no such folder"),
        ("toy:gauss", {}, "no toy world 'gauss'; known: gaussian, mixture"),
        ("toy:gaussian", {"stesp": 3}, "policy.options.stesp is unknown; did you mean steps?"),
        ("toy:gaussian", {"precision": "fp8"}, "policy.precision: expected fp32, bf16, fp16, got 'fp8'"),
    ],
)
def test_a_wrong_model_is_one_line(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        registry.load_policy(source, **options)
    assert message in str(error.value)


def test_a_folder_without_an_index_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no model_index\.json"):
        registry.load_policy(str(tmp_path))
    (tmp_path / "model_index.json").write_text("not json")
    with pytest.raises(UserError, match="cannot find model"):
        registry.load_policy(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableAudioPipeline"}')
    with pytest.raises(UserError, match=r"is a StableAudioPipeline; known pipelines: .*StableDiffusion3Pipeline"):
        registry.load_policy(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}'
    )
    with pytest.raises(UserError, match="cannot load model"):
        registry.load_policy(str(tmp_path))


def test_an_object_of_another_kind_is_no_pipeline() -> None:
    with pytest.raises(UserError, match="known pipelines"):
        registry.load_policy(object())


def test_auto_checkpoint_is_the_toyboxs_with_a_toybox_policy_and_the_hubs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"clip": RewardSection.model_validate({"use": "clip_score", "checkpoint": "auto"}), "jpeg": RewardSection(use="jpeg")}

    def choice(model: str | None, reachable: bool) -> object:
        monkeypatch.setattr(registry, "hub_has", lambda model_id: reachable)
        return registry.resolved(sections, model)["clip"].options["checkpoint"]

    hub_id = registry.load("rewards", "clip_score").spec.model_id
    assert choice("toybox", True) == "toybox/clip"
    assert choice("stabilityai/stable-diffusion-3.5-medium", False) == hub_id
    assert choice(None, True) == hub_id
    assert choice(None, False) == "toybox/clip"


def test_auto_checkpoint_is_resolved_inside_wrappers_and_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "hub_has", lambda model_id: False)
    inner = {"use": "uncertainty", "of": {"use": "clip_score", "scale": 2.5}}
    sections = {"safe": RewardSection.model_validate({"use": "geometric", "of": {"sure": inner, "toybox": 2}})}
    found = registry.resolved(sections, None)["safe"]
    clip = {"use": "clip_score", "weight": 1.0, "scale": 2.5, "checkpoint": "toybox/clip"}
    sure = {"use": "uncertainty", "weight": 1.0, "of": clip}
    assert found.options == {"of": {"sure": sure, "toybox": {"use": "toybox", "weight": 2.0}}}
    assert "visalign: safe.of.sure.of: the hub can't be reached" in capsys.readouterr().err
    assert registry.resolved({"safe": found}, "some/model") == {"safe": found}, "a choice once made stays"


@pytest.mark.parametrize("name", registry.names("families"))
def test_what_a_family_wraps_is_read_without_importing_it(name: str) -> None:
    assert (sources.constant("families", name, "pipeline_classes") or ()) == registry.load("families", name).pipeline_classes


def test_a_reward_may_have_a_device_to_itself() -> None:
    sections = {"jpeg": RewardSection.model_validate({"use": "jpeg", "device": "cpu", "quality": 50})}
    assert sections["jpeg"].options == {"quality": 50}
    assert registry.resolved(sections, None)["jpeg"].device == "cpu"
    assert "jpeg" in registry.build_panel(sections, None, "meta").rewards
    sections["jpeg"] = sections["jpeg"].model_copy(update={"device": "abacus"})
    with pytest.raises(UserError, match=r"rewards\.jpeg\.device: 'abacus' can't be used here"):
        registry.build_panel(sections, None)
    held = {"safe": RewardSection.model_validate({"use": "uncertainty", "of": {"use": "vlm_yes", "device": "cpu"}})}
    with pytest.raises(UserError, match=r"rewards\.safe\.of\.device: a member is on the device of what it is a member of"):
        registry.check_rewards(held)
