"""What every reward promises, checked for every file of rewards/."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from visalign import registry
from visalign.composite import Composite
from visalign.scoring import Panel, Reward, RewardError, RewardInput, RewardOutput

NAMES = registry.names("rewards")
MEDIA = {"image": "images", "video": "video", "latent": "latents"}  # the field that carries gradients


@dataclass(frozen=True)
class Subject:
    """A reward, inputs it can score, and its output for them before `prepare` was ever called."""

    reward: Reward
    batch: RewardInput
    output: RewardOutput
    fresh: Callable[[], Reward]

    @property
    def media(self) -> str:
        return MEDIA[self.reward.spec.modality]


@pytest.fixture(scope="module", params=NAMES)
def subject(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    build_reward: Callable[[str, Path], Reward],
    batch_of: Callable[[str], RewardInput],
) -> Subject:
    name = request.param
    reward, batch = build_reward(name, tmp_path_factory.mktemp(name)), batch_of(name)
    return Subject(reward, batch, reward.score(batch), lambda: build_reward(name, tmp_path_factory.mktemp(name)))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance, equal_nan=True)


def modules(reward: Reward) -> list[nn.Module]:
    own = [value for value in vars(reward).values() if isinstance(value, nn.Module)]
    members = reward.panel.rewards.values() if isinstance(reward, Composite) else ()
    return own + [module for member in members for module in modules(member)]


@pytest.mark.parametrize("name", NAMES)
def test_one_class_in_a_file(name: str) -> None:
    module = import_module(f"visalign.rewards.{name}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Reward) and c.__module__ == module.__name__]
    assert len(classes) == 1
    assert classes[0].__doc__
    assert module.__doc__


def test_name_is_the_files(subject: Subject) -> None:
    assert subject.reward.spec.name == type(subject.reward).__module__.rpartition(".")[2]


def test_shapes(subject: Subject) -> None:
    output, count = subject.output, len(subject.batch)
    assert tuple(output.scores.shape) == tuple(output.valid.shape) == (count,)
    assert output.scores.dtype == torch.float32
    assert output.valid.dtype == torch.bool
    assert torch.equal(output.scores.isfinite(), output.valid)
    assert output.valid.all(), "a reward must be able to score its batch in conftest.py"
    assert all(len(value) == count for value in [*output.components.values(), *output.embeddings.values()])
    low, high = subject.reward.spec.range
    assert bool(((output.scores >= low - 1e-5) & (output.scores <= high + 1e-5)).all())


def test_batch_equals_singles(subject: Subject) -> None:
    if subject.reward.spec.scope != "point":
        pytest.skip("compares the members of a group")
    singles = [subject.reward.score(subject.batch.take(slice(n, n + 1))) for n in range(len(subject.batch))]
    assert all(tuple(single.scores.shape) == (1,) for single in singles)
    close(torch.cat([single.scores for single in singles]), subject.output.scores)


def test_seven_inputs(subject: Subject) -> None:
    order = torch.tensor([3, 1, 0, 2, 1, 0, 3]) % len(subject.batch)
    output = subject.reward.score(subject.batch.take(order))
    assert tuple(output.scores.shape) == (7,)
    assert torch.equal(output.scores.isfinite(), output.valid)
    if subject.reward.spec.scope == "point":
        close(output.scores, subject.output.scores[order])


def test_groups_are_names_and_know_nothing_of_each_other(subject: Subject) -> None:
    batch = subject.batch
    if batch.groups is None:
        pytest.skip("its batch has no groups")
    close(subject.reward.score(replace(batch, groups=100 - batch.groups)).scores, subject.output.scores)
    if subject.reward.spec.scope in ("point", "group"):
        rows = (batch.groups == batch.groups[0]).nonzero()[:, 0]
        close(subject.reward.score(batch.take(rows)).scores, subject.output.scores[rows])


def test_order_of_inputs_is_kept(subject: Subject) -> None:
    order = torch.arange(len(subject.batch)).roll(1)
    output = subject.reward.score(subject.batch.take(order))
    close(output.scores, subject.output.scores[order])
    for name, value in output.components.items():
        close(value.float(), subject.output.components[name][order].float())


def test_broken_media_is_invalid_and_alone(subject: Subject) -> None:
    media = getattr(subject.batch, subject.media).clone()
    media[1] = torch.nan
    output = subject.reward.score(replace(subject.batch, **{subject.media: media}))
    assert torch.equal(output.scores.isfinite(), output.valid)
    assert not output.valid[1]
    if subject.reward.spec.scope == "point":
        rest = [n for n in range(len(subject.batch)) if n != 1]
        close(output.scores[rest], subject.output.scores[rest])


def test_frozen_weights_get_no_gradient(subject: Subject) -> None:
    media = getattr(subject.batch, subject.media).clone().requires_grad_()
    scores = subject.reward.score(replace(subject.batch, **{subject.media: media})).scores
    assert scores.requires_grad == subject.reward.spec.differentiable
    if scores.requires_grad:
        scores.sum().backward()
    if not subject.reward.spec.trainable:
        parameters = [p for module in modules(subject.reward) for p in module.parameters()]
        assert not any(p.requires_grad or p.grad is not None for p in parameters)


def test_gradient(subject: Subject) -> None:
    if not subject.reward.spec.differentiable:
        pytest.skip("not differentiable")
    media = getattr(subject.batch, subject.media).clone().requires_grad_()

    def total(at: Tensor) -> Tensor:
        return subject.reward.score(replace(subject.batch, **{subject.media: at})).scores.sum()

    (gradient,) = torch.autograd.grad(total(media), media)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).gt(0).all()
    # A random direction, tilted towards the gradient so that the difference stands above float32's rounding.
    noise = torch.randn(media.shape, generator=torch.Generator().manual_seed(1))
    direction = gradient / gradient.norm() + noise / noise.norm()
    step = 1e-2
    with torch.no_grad():
        measured = (total(media + step * direction) - total(media - step * direction)) / (2 * step)
    close(measured, (gradient * direction).sum(), 2e-2)


def test_prepare_changes_no_score(subject: Subject) -> None:
    reward = subject.fresh()
    reward.prepare(subject.batch.prompts, subject.batch.metadata)
    close(reward.score(subject.batch).scores, subject.output.scores)


def test_eight_bits_are_enough(subject: Subject) -> None:
    if subject.reward.spec.modality == "latent":
        pytest.skip("latents are not stored in 8 bits")
    rounded = (getattr(subject.batch, subject.media) * 255).round() / 255
    close(subject.reward.score(replace(subject.batch, **{subject.media: rounded})).scores, subject.output.scores, 2e-2)


def test_works_in_a_panel(subject: Subject) -> None:
    scores = Panel({"it": (subject.reward, 0.5)}).score(subject.batch)
    close(scores.total, 0.5 * subject.output.scores)


def test_keeps_its_own_state(subject: Subject) -> None:
    assert subject.reward.to("cpu") is subject.reward
    subject.reward.load_state_dict(subject.reward.state_dict())


def test_an_update_changes_the_version(subject: Subject) -> None:
    if not subject.reward.spec.trainable:
        with pytest.raises(RewardError, match="not trainable"):
            subject.reward.update(subject.batch, subject.batch)
        return
    learner = subject.fresh()
    metrics = learner.update(learner.real(subject.batch), subject.batch)
    assert metrics
    assert learner.spec.version != subject.reward.spec.version
    after = learner.score(subject.batch).scores
    assert not torch.equal(after, subject.output.scores)
    restored = subject.fresh()
    restored.load_state_dict(learner.state_dict())
    assert restored.spec.version == learner.spec.version
    assert torch.equal(restored.score(subject.batch).scores, after)
