"""The Generate tab's handler: what is shown while it runs and in the end, and what it refuses."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pytest
import torch

import visalign
from tests.demo.conftest import CLOSE, FLAKY
from visalign.demo import generate, watching
from visalign.demo.watching import Wish
from visalign.demo.workshop import Workshop

FIELDS: dict[str, Any] = {"prompt": "a point", "model": "toy:gaussian", "method": "best_of_n", "nfe": 60, "count": 2, "steps": 5}
FIELDS |= {"guidance": 1.0, "seed": 3, "chosen": [CLOSE]}
WEIGHTS = (1.0, 1.0, 1.0)  # of closeness, flaky and jpeg


@pytest.fixture
def every(monkeypatch: pytest.MonkeyPatch) -> None:
    """No view is passed over."""
    monkeypatch.setattr(watching, "EVERY", 0.0)


def wish(**changes: Any) -> Wish:
    given: dict[str, Any] = {"prompt": "a point", "model": "toy:gaussian", "weights": {CLOSE: 1.0}, "method": "best_of_n", "nfe": 60}
    return Wish(**given | {"pictures": 2, "steps": 5, "seed": 3} | changes)


@pytest.mark.parametrize("method", ["best_of_n", "zero_order", "feynman_kac", "gradient"])
@pytest.mark.usefixtures("every")
def test_first_the_plain_picture_then_the_search_that_sample_makes(workshop: Workshop, method: str) -> None:
    views = list(watching.watch(workshop, wish(method=method)))
    assert views[0].text == "Loading toy:gaussian"
    plain = next(n for n, view in enumerate(views) if view.scores)
    assert all(view.after is None for view in views[: plain + 1])
    assert plain >= 5, "its steps are seen"
    assert all(view.after is not None and view.share is not None for view in views[plain + 1 : -1])
    best = [value for _, value in views[-1].best]
    assert best == sorted(best)
    assert len(best) >= 2
    costs = [cost for cost, _ in views[-1].best]
    assert costs == sorted(costs)
    assert costs[-1] <= 60
    same = visalign.sample("toy:gaussian", "a point", CLOSE, method, n=2, steps=5, seed=3, budget={"nfe": 60}, batch=watching.FEW)
    assert views[-1].after is not None
    assert torch.equal(views[-1].after, same.images)
    name, weight, before, after = views[-1].scores[0]
    assert (name, weight) == (CLOSE, 1.0)
    assert before is not None
    assert after == pytest.approx(same.scores["total"].mean().item())
    assert after >= before
    assert views[-1].scores[1][:2] == ("brightness", None), "held out"
    assert views[-1].share is None


def test_plain_shows_one_picture_each(workshop: Workshop) -> None:
    *_, last = watching.watch(workshop, wish(method="plain", weights={}))
    state, pictures, curve = generate.shown(last, list(workshop.held_out))
    assert last.after is None
    assert pictures.count("<img") == 2
    assert "plain: done, 5 network evaluations a picture" in state
    assert "held out" in pictures
    assert not curve


def test_views_are_not_too_close_to_each_other(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVERY", 100.0)
    views = list(watching.watch(workshop, wish(nfe=2000)))
    assert len(views) == 4, "loading, the first, and the end of each search"
    assert views[-1].share is None


def test_what_is_typed_is_shown_as_text(workshop: Workshop) -> None:
    script = "<script>alert(1)</script> ${alert(2)} {{3}} <img src=x onerror=alert(4)>"
    *_, last = handled(workshop, prompt=script)
    assert "<script" not in "".join(last)
    assert "onerror=alert(4)&gt;" in last[1]
    assert last[1].count("<img") == 4


def handled(workshop: Workshop, weights: tuple[Any, ...] = WEIGHTS, **changes: Any) -> list[list[str]]:
    """HTML of every view."""
    fields = FIELDS | changes
    draw, _ = generate.handlers(workshop)
    return [list(outputs) for outputs in draw(gr.Request(session_hash="one"), *fields.values(), *weights)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  \n"}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": ["a"]}, "the prompt is empty"),
        ({"prompt": "a" * 301}, "the prompt has 301 characters; at most 300 are read"),
        ({"model": "../../etc"}, "no model is named &#x27;../../etc&#x27;"),
        ({"model": None}, "no model is named none"),
        ({"method": "best_of_m"}, "no method is named &#x27;best_of_m&#x27;; did you mean best_of_n?"),
        ({"method": "os:system"}, "no method is named &#x27;os:system&#x27;"),
        ({"chosen": ["os:system"]}, "no reward is named &#x27;os:system&#x27;"),
        ({"chosen": []}, "best_of_n needs a reward to search by"),
        ({"method": "gradient", "chosen": ["jpeg"]}, "gradient climbs the gradients of rewards, and rewards.jpeg (jpeg) has none"),
        ({"method": "hybrid"}, "hybrid: toy:gaussian has nothing learned to mix with its base"),
        ({"nfe": 4}, "budget.nfe=4 is less than one picture: 5 steps at guidance 1 are 5 NFE"),
        ({"nfe": 10**9}, "budget: expected a number from 1 to 2000, got 1000000000"),
        ({"nfe": "__import__('os')"}, "budget: expected a number from 1 to 2000, got __import__(&#x27;os&#x27;)"),
        ({"count": 5}, "pictures: expected a number from 1 to 4, got 5"),
        ({"count": True}, "pictures: expected a number from 1 to 4, got True"),
        ({"seed": float("nan")}, "seed: expected a number from 0 to"),
        ({"seed": None}, "seed: expected a number from 0 to"),
        ({"guidance": 7.5, "nfe": 60}, "has no unconditional half to guide away from"),
        ({"weights": (None, 1.0, 1.0)}, f"weight of {CLOSE}: expected a number from -5 to 5, got None"),
        ({"weights": (99, 1.0, 1.0)}, f"weight of {CLOSE}: expected a number from -5 to 5, got 99"),
        ({"chosen": [FLAKY]}, f"{FLAKY} has no score for &#x27;a point&#x27;: it can&#x27;t read this prompt"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing_in_the_log(
    workshop: Workshop, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(gr.Error) as error:
        handled(workshop, **changes)
    assert message in error.value.message
    assert not error.value.print_exception
    assert not capfd.readouterr().err


@pytest.mark.usefixtures("every")
def test_cancelling_ends_ones_own_search_alone(workshop: Workshop) -> None:
    draw, stop = generate.handlers(workshop)
    one, other = gr.Request(session_hash="one"), gr.Request(session_hash="other")
    fields = FIELDS | {"nfe": 200}
    mine, theirs = (draw(visitor, *fields.values(), *WEIGHTS) for visitor in (one, other))
    for outputs in mine:
        next(theirs)
        if "best_of_n: " in outputs[0]:
            break
    stop(one)
    stop(gr.Request(session_hash="nobody"))
    left = list(mine)
    assert len(left) == 1
    assert "Cancelled; this is how far it came." in left[0][0]
    assert left[0][1].count("<img") == 4
    *_, last = theirs
    assert "best_of_n: done, 200 network evaluations" in last[0]
    *_, last = draw(one, *FIELDS.values(), *WEIGHTS)
    assert "best_of_n: done, 60 network evaluations" in last[0], "and the next one is not affected"


def test_who_leaves_costs_no_more(workshop: Workshop) -> None:
    policy = workshop.turn(lambda: workshop.policy("toy:gaussian"))
    views = watching.watch(workshop, wish(nfe=2000))
    while next(views).after is None:
        pass
    views.close()  # pyright: ignore[reportAttributeAccessIssue]
    spent = workshop.turn(lambda: policy.nfe)
    assert spent == workshop.turn(lambda: policy.nfe)
