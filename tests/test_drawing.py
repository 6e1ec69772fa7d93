"""`visalign.sample`: results, streams, what is refused before anything is loaded, and pipelines that come back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import visalign
from tests.toy_rewards import Closeness, Flaky
from visalign import api, drawing
from visalign.errors import UserError
from visalign.policy import Policy
from visalign.scoring import Panel, Reward

CLOSE = "tests.toy_rewards:Closeness"


@pytest.fixture
def policy() -> Policy:
    return visalign.load("toy:gaussian", device="cpu")


class Unloadable(Reward):
    """A reward that costs too much to load for a mistake in the call to be found afterwards."""

    spec = Closeness.spec

    def __init__(self) -> None:
        raise AssertionError("loaded")

    def score(self, batch: Any) -> Any:
        raise AssertionError


# --- results -----------------------------------------------------------------------------------------------------------


def test_a_result_says_what_was_found_and_what_it_cost(policy: Policy) -> None:
    result = visalign.sample(policy, ["a", "b"], CLOSE, "zero_order", n=3, steps=5, budget={"nfe": 30}, judges={"jpeg": 2.0}, neighbours=2)
    assert result.images.shape == (6, 3, 16, 16)
    assert {name: tuple(score.shape) for name, score in result.scores.items()} == {CLOSE: (6,), "total": (6,)}
    assert torch.equal(result.held_out["total"], 2 * result.held_out["jpeg"])
    assert (result.nfe, result.nfe_backward, result.reward_calls) == (30, 0, 6 * 6), "the judges' calls are not the search's"
    assert [row["nfe"] for row in result.trace] == [5, 15, 25, 30]
    best = [row["best"] for row in result.trace]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(result.scores["total"].mean().item())
    assert result.trace[-1]["seconds"] <= result.seconds
    assert torch.equal(api.score(result.images, ["a"] * 6, CLOSE)["total"], result.scores["total"])


def test_pictures_have_numbers_so_that_parts_of_a_list_can_be_drawn_apart(policy: Policy) -> None:
    whole = visalign.sample(policy, ["a", "b", "c"], CLOSE, "best_of_n", n=2)
    part = visalign.sample(policy, ["b", "c"], CLOSE, "best_of_n", n=2, first_id=2)
    assert torch.allclose(whole.images[2:], part.images, atol=1e-6)
    assert drawing.listed(["a", "b", "c"], 2).take(slice(2, 6)).groups.tolist() == drawing.listed(["b", "c"], 2, first_id=2).groups.tolist()


def test_a_panel_and_objects_are_taken_as_they_are(policy: Policy) -> None:
    reward = Closeness()
    by_object, by_panel, by_name = (
        visalign.sample(policy, "a", given, "best_of_n").scores["total"]
        for given in (reward, Panel({"close": (reward, 1.0)}), {"close": {"use": CLOSE, "weight": 1.0}})
    )
    assert torch.equal(by_object, by_panel)
    assert torch.equal(by_object, by_name)


def test_metadata_reaches_the_rewards(policy: Policy) -> None:
    class Told(Closeness):
        def score(self, batch: Any) -> Any:
            assert [known["number"] for known in batch.metadata] == sorted([1, 2] * (len(batch) // 2))
            return super().score(batch)

    visalign.sample(policy, ["a", "b"], Told(), "feynman_kac", metadata=[{"number": 1}, {"number": 2}], budget={"nfe": 30})


# --- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_shows_pictures_on_their_way_and_ends_with_the_result(policy: Policy) -> None:
    states = list(visalign.sample_stream(policy, "a", CLOSE, "plain", n=2, steps=4, seed=3))
    assert [state.step for state in states] == [1, 2, 3, 4, 4]
    assert all(state.images.shape == (2, 3, 16, 16) for state in states)
    assert [state.best is None for state in states] == [True, True, True, False, False]
    assert [state.result is None for state in states] == [True, True, True, True, False]
    distance = [(state.images - states[-1].images).abs().max().item() for state in states]
    assert distance[0] > distance[1] > distance[3] == 0
    assert torch.equal(states[-1].result.images, visalign.sample(policy, "a", CLOSE, n=2, steps=4, seed=3).images)


def test_a_stream_can_be_left_and_leaves_autograd_alone(policy: Policy) -> None:
    stream = visalign.sample_stream(policy, "a", CLOSE, "gradient", budget={"nfe": 1000})
    for state in stream:
        assert torch.is_grad_enabled(), "between two states the caller's settings hold"
        if state.step == 3:
            break
    spent = policy.nfe
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert policy.nfe == spent


def test_two_streams_on_one_policy_count_for_themselves(policy: Policy) -> None:
    streams = [visalign.sample_stream(policy, "a", CLOSE, "best_of_n", candidates=5, batch=1) for _ in range(2)]
    pairs = list(zip(*streams, strict=True))
    assert [(first.nfe, second.nfe) for first, second in pairs][-1] == (50, 50)


def test_callback_and_bar(policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    visalign.sample(policy, "a", CLOSE, "best_of_n", candidates=3, batch=1, callback=lambda state: steps.append(state.step), progress=True)
    assert steps == [1, 2, 3, 3]
    assert "best_of_n" in capsys.readouterr().err
    visalign.sample(policy, "a", CLOSE, "best_of_n")
    assert not capsys.readouterr().err


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best_of_m"}, "no sampling method named 'best_of_m'; did you mean best_of_n?"),
        ({"method": "best_of_n", "candidtes": 3}, "best_of_n.candidtes is unknown; did you mean candidates?"),
        ({"method": "best_of_n", "candidates": 0}, "best_of_n.candidates: expected greater than or equal to 1, got 0"),
        ({"budget": {"nfe": 0}}, "budget.nfe: expected greater than 0, got 0"),
        ({"budget": {"seconds": -1}}, "budget.seconds: expected greater than 0, got -1"),
        ({"budget": {"nfes": 10}}, "budget.nfes is unknown; did you mean nfe?"),
        ({"budget": 400}, "budget: expected "),
        ({"prompts": " "}, "the prompt is empty"),
        ({"prompts": ["a", ""]}, "prompt 2 is empty"),
        ({"prompts": []}, "no prompt given"),
        ({"n": 0}, "n=0: expected 1 or more"),
        ({"metadata": [{}, {}]}, "1 prompts and metadata of 2: expected one each"),
        ({"reward": {"clip": "yes"}}, "rewards.clip: expected a weight"),
        ({"reward": {}}, "rewards: expected a name"),
        ({"judges": "jpg"}, "no reward named 'jpg'; did you mean jpeg?"),
        ({"reward": None, "method": "svdd"}, "svdd needs a reward to search by"),
        (
            {"reward": {"a": {"use": "tests.test_drawing:Unloadable"}, "size": {"use": "jpeg"}}, "method": "gradient"},
            "and rewards.size (jpeg) has none",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prompts": "a", "reward": "tests.test_drawing:Unloadable"} | arguments
    with pytest.raises(UserError) as error:
        visalign.sample_stream("/no/such/model", **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_that_turn_out_without_a_gradient_and_judges_that_only_judge(policy: Policy) -> None:
    class Blunt(Flaky):
        spec = visalign.RewardSpec("blunt")

    class Judge(Closeness):
        held_out_only = True

    with pytest.raises(UserError, match=r"and rewards.blunt \(blunt\) has none"):
        visalign.sample(policy, "a", Blunt(), "gradient")
    visalign.sample(policy, "a", {"close": Closeness(), "blunt": {"use": "jpeg", "weight": 0.0}}, "gradient")
    with pytest.raises(UserError, match="judges only"):
        visalign.sample(policy, "a", Judge(), "best_of_n")
    assert visalign.sample(policy, "a", Judge()).reward_calls == 1
    with pytest.raises(UserError, match="42 is nothing to sample from"):
        visalign.sample(42, "a")


# --- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["best_of_n", "gradient"])
def test_a_stock_pipeline_comes_back_as_it_was(tiny_sd3: Path, method: str) -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    pipeline.set_progress_bar_config(desc="mine")
    pipeline.scheduler.set_timesteps(7)
    pipeline.transformer.train()
    pipeline.vae.encoder.requires_grad_(False)
    scheduler = pipeline.scheduler
    before = looks(pipeline)
    kwargs: dict[str, Any] = {"steps": 3, "guidance": 2.0, "n": 2, "budget": {"nfe": 24}}
    guided = visalign.sample(pipeline, "two red circles", "tests.toy_rewards:Brightness", method, **kwargs)
    assert guided.images.shape == (2, 3, 64, 64)
    assert guided.nfe + 2 * guided.nfe_backward <= 24
    after = looks(pipeline)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name] for name, value in before.items()
    )
    assert pipeline.scheduler is scheduler
    plain = visalign.sample(pipeline, "two red circles", "tests.toy_rewards:Brightness", steps=3, guidance=2.0, n=2)
    assert (guided.scores["total"] >= plain.scores["total"]).all()
    assert (guided.scores["total"] > plain.scores["total"]).any()
    left = visalign.sample_stream(pipeline, "two red circles", steps=3)
    next(left)
    left.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert pipeline.scheduler is scheduler, "also where the search is broken off"
    assert pipeline.transformer.training


def looks(pipeline: Any) -> dict[str, Any]:
    """Everything of a pipeline that sampling might touch."""
    found: dict[str, Any] = {"bar": dict(pipeline._progress_bar_config), "scheduler": dict(pipeline.scheduler.config)}
    for name, value in vars(pipeline.scheduler).items():
        found[f"scheduler/{name}"] = value.clone() if isinstance(value, torch.Tensor) else value
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipeline, part)
        found |= {f"{part}/{name}": value.clone() for name, value in module.state_dict().items()}
        found |= {f"{part}/{name}/wants": parameter.requires_grad for name, parameter in module.named_parameters()}
        found |= {f"{part}/{name}/mode": inner.training for name, inner in module.named_modules()}
        found |= {f"{part}/{name}/device": parameter.device for name, parameter in module.named_parameters()}
        found |= {f"{part}/{name}/grad": parameter.grad is None for name, parameter in module.named_parameters()}
    return found
