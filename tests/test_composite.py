"""What rewards made of rewards add up to, what stays visible of their members, and what they learn before training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from visalign.composite import Calibrated, Composite, Members
from visalign.errors import UserError
from visalign.scoring import Panel, Reward, RewardError, RewardInput, RewardOutput, RewardSpec, Scores


class Mean(Reward):
    """The mean of a picture, with everything that an output may hold; pictures above `limit` can't be scored."""

    def __init__(self, limit: float = 2.0, name: str = "mean", weight: float | None = None, differentiable: bool = True):
        needs = frozenset({"prompt"})
        self.spec = RewardSpec(name, differentiable=differentiable, needs=needs, range=(0, 1), licence="MIT", model_id=f"m/{name}")
        self.limit, self.weight = limit, weight
        self.prepared: list[str] = []

    def score(self, batch: RewardInput) -> RewardOutput:
        mean = batch.images.mean((1, 2, 3))
        scores = torch.where(mean > self.limit, math.nan, mean)
        errors = ["too bright" if bad else None for bad in scores.isnan().tolist()]
        weight = None if self.weight is None else torch.where(scores.isnan(), 0.0, self.weight)
        return RewardOutput.of(
            scores, components={"twice": 2 * mean}, embeddings={"e": mean[:, None]}, weight=weight, info={"errors": errors, "v": 1}
        )

    def prepare(self, prompts: object, metadata: object) -> None:
        self.prepared += list(prompts)  # type: ignore[call-overload]


class Learner(Mean):
    """Counts its updates."""

    def __init__(self) -> None:
        super().__init__(name="learner")
        self.spec = RewardSpec("learner", scope="group", trainable=True, needs=frozenset({"groups"}), deterministic=False, licence="MIT")
        self.count = torch.zeros(1)

    def update(self, real: RewardInput, fake: RewardInput) -> dict[str, float]:
        self.count += 1
        self.spec = RewardSpec("learner", version=f"after {int(self.count.item())}", trainable=True)
        return {"loss": 0.5}

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count = state["count"].clone()


class Sum(Composite):
    def __init__(self, of: Reward | Members):
        super().__init__(of, name="sum")

    def score(self, batch: RewardInput) -> RewardOutput:
        scored = self.panel.score(batch)
        return self.result(scored, scored.total)


class Above(Calibrated):
    """A reward less its mean over the untrained model's pictures."""

    def __init__(self, of: Reward, file: str | None = None):
        super().__init__(of, learns=["mean"], pictures=8, file=file, name="above")

    def score(self, batch: RewardInput) -> RewardOutput:
        scored = self.panel.score(batch)
        return self.result(scored, scored.total - self.known("mean"))

    def learn(self, base: RewardInput, scored: Scores) -> dict[str, Tensor]:
        return {"mean": scored.total.nanmean()[None]}


def flat(*values: float) -> RewardInput:
    images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4).clone()
    return RewardInput(images, [f"p{n}" for n in range(len(values))], groups=torch.zeros(len(values), dtype=torch.int64))


def test_promises_add_up() -> None:
    spec = Sum({"a": (Mean(), 1.0), "b": (Mean(name="other", differentiable=False), 0.0), "c": (Learner(), 0.0)}).spec
    assert (spec.name, spec.scope, spec.modality, spec.licence) == ("sum", "group", "image", "MIT")
    assert spec.differentiable, "a member without a weight needs no gradient"
    assert spec.trainable
    assert not spec.deterministic
    assert spec.needs == {"prompt", "groups"}
    assert spec.model_id == "m/mean, m/other"
    assert not Sum({"a": (Mean(), 1.0), "b": (Mean(differentiable=False), 0.1)}).spec.differentiable
    with pytest.raises(UserError, match="sum: no reward in `of` has a weight"):
        Sum({"a": (Mean(), 0.0)})


def test_all_that_members_say_stays_visible() -> None:
    output = Sum({"a": (Mean(weight=0.5), 1.0), "b": (Sum(Mean(0.5, weight=0.5)), 2.0), "c": (Mean(0.1, weight=0), 0.0)}).score(
        flat(0.2, 0.8)
    )
    assert set(output.components) == {"a", "a/twice", "b", "b/mean", "b/mean/twice", "c", "c/twice"}
    assert set(output.embeddings) == {"a/e", "b/mean/e", "c/e"}
    assert output.info["errors"] == ["too bright", "too bright"]
    assert output.info["b/mean/v"] == 1
    torch.testing.assert_close(output.scores, torch.tensor([0.6, math.nan]), equal_nan=True)
    assert output.valid.tolist() == [True, False], "invalid where a member with a weight is"
    torch.testing.assert_close(output.components["b/mean"], torch.tensor([0.2, math.nan]), equal_nan=True)
    assert output.weight is not None
    assert output.weight.tolist() == [0.25, 0.0]


def test_members_are_prepared_updated_and_saved() -> None:
    plain, learner = Mean(), Learner()
    outer = Sum({"a": (plain, 1.0), "b": (Sum({"l": (learner, 1.0)}), 1.0)})
    outer.prepare(["x"], [{}])
    assert plain.prepared == learner.prepared == ["x"]
    before = outer.spec.version
    assert outer.update(flat(0.1), flat(0.2)) == {"b/l/loss": 0.5}
    assert outer.spec.version != before
    assert {name: value.tolist() for name, value in outer.state_dict().items()} == {"b/l/count": [1.0]}
    again = Sum({"a": (Mean(), 1.0), "b": (Sum({"l": (Learner(), 1.0)}), 1.0)})
    again.load_state_dict(outer.state_dict())
    assert again.state_dict() == outer.state_dict()
    with pytest.raises(RewardError, match="no member that keeps"):
        outer.load_state_dict({"z/count": torch.zeros(1)})
    with pytest.raises(RewardError, match="not trainable"):
        Sum(Mean()).update(flat(0.1), flat(0.2))


def test_a_member_that_breaks_the_contract_is_named() -> None:
    class Wide(Mean):
        def score(self, batch: RewardInput) -> RewardOutput:
            return RewardOutput.of(batch.images.mean((2, 3)))

    with pytest.raises(RewardError, match="wide returned"):
        Sum(Wide(name="wide")).score(flat(0.1))


def test_calibration_is_learned_once_saved_and_part_of_the_version(tmp_path: Path) -> None:
    reward = Sum({"x": (Above(Mean()), 1.0)})
    assert reward.base_pictures == 8
    with pytest.raises(UserError, match="above must see pictures of the untrained model first"):
        reward.score(flat(0.5))
    before = reward.spec.version
    reward.calibrate(flat(0.2, 0.4))
    assert reward.base_pictures == 0
    assert reward.spec.version != before
    torch.testing.assert_close(reward.score(flat(0.5)).scores, torch.tensor([0.2]))
    reward.calibrate(flat(0.9))
    torch.testing.assert_close(reward.score(flat(0.5)).scores, torch.tensor([0.2]))
    again = Sum({"x": (Above(Mean()), 1.0)})
    again.load_state_dict(reward.state_dict())
    assert again.spec == reward.spec
    save_file({f"rewards/safe/{name}": value for name, value in reward.state_dict().items()}, tmp_path / "base.safetensors")
    torch.testing.assert_close(Above(Mean(), str(tmp_path / "base.safetensors")).score(flat(0.5)).scores, torch.tensor([0.2]))
    save_file({"a/mean": torch.zeros(1), "b/mean": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name, message in (("two", "holds 2 tensors named 'mean'"), ("none", "can't be read")):
        with pytest.raises(UserError, match=message):
            Above(Mean(), str(tmp_path / f"{name}.safetensors"))


def test_a_panel_multiplies_weights_and_collects_errors() -> None:
    scores = Panel({"a": (Mean(0.5, weight=0.5), 1.0), "b": (Mean(weight=0.4), 1.0), "c": (Mean(weight=0.0), 0.0)}).score(
        flat(0.2, 0.8, 0.9)
    )
    assert scores.weight is not None
    torch.testing.assert_close(scores.weight, torch.tensor([0.2, 0.0, 0.0]))
    assert scores.errors == {"a": ["too bright"], "b": [], "c": []}
    assert Panel({"a": (Mean(), 1.0)}).score(flat(0.2)).weight is None
