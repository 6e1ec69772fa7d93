"""Drawing pictures, plain or guided by rewards, from any family: `visalign.sample`, and `visalign.sample_stream` for whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from visalign import api, registry
from visalign.borrowing import untouched
from visalign.config import validate
from visalign.errors import UserError
from visalign.findings import Budget, State
from visalign.guiding import Method, search
from visalign.policy import Policy
from visalign.rollout import Prompts
from visalign.scoring import Panel
from visalign.tasks import Task


@dataclass(frozen=True)
class Result:
    """What `sample` returns.

    Attributes:
        images: (N, 3, H, W) float in [0, 1], the best that was found.
        scores: reward name -> (N,), with "total"; empty without a reward.
        held_out: judge -> (N,), with "total": scores that the search has not seen; empty without judges.
        trace: for every state of a search that has found something its step, its costs so far, the mean of the best scores and more.
        nfe, nfe_backward: denoiser forwards and backwards per returned picture; compare methods by nfe + 2·nfe_backward.
        reward_calls: pictures scored, all together, by all rewards at once; the judges' are not counted.
        seconds: of the search, once everything was loaded.
    """

    images: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    held_out: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    trace: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    nfe: float = 0.0
    nfe_backward: float = 0.0
    reward_calls: int = 0
    seconds: float = 0.0


def sample(
    policy: Any,
    prompts: str | Sequence[str] | Prompts,
    reward: Any = None,
    method: str = "plain",
    n: int = 1,
    steps: int = 10,
    guidance: float = 1.0,
    seed: int = 0,
    *,
    budget: Mapping[str, Any] | None = None,
    callback: Callable[[State], object] | None = None,
    progress: bool = False,
    **more: Any,
) -> Result:
    """Draw pictures, guided by rewards or plain.

    Args:
        policy: from `load`; or a diffusers pipeline, which comes back as it was; or what `load` takes.
        prompts: one or more texts.
        reward: what is searched by, in any form that `panel` takes; None scores nothing, which "plain" and "hybrid" allow.
        method: of `visalign list steering`; "plain" is the model as it is.
        n: pictures per prompt, in the order of the prompts.
        steps, guidance, seed: of the sampler; the same seed gives the same pictures.
        budget: `nfe` and `reward_calls` per returned picture, `seconds`, `memory` in GB; see `visalign.findings.Budget`.
        callback: called with every `State` of the search.
        progress: show a bar.
        more: `judges`, `metadata`, `first_id` and `batch` of `sample_stream`, and the method's own options.

    Raises:
        UserError: whatever the user can mend; names, options and budget before anything is loaded.
    """
    states = sample_stream(policy, prompts, reward, method, n, steps, guidance, seed, budget=budget, **more)
    state = None
    with tqdm(desc=method, leave=False, disable=not progress) as bar:
        for state in states:
            bar.total = state.steps or None
            bar.update(state.step - bar.n)
            if state.best is not None and state.best.scores:
                bar.set_postfix(best=f"{state.best.scores['total'].nanmean().item():.4g}")
            if callback:
                callback(state)
    assert state is not None, "the last state of a stream has the result"
    return state.result


def sample_stream(
    policy: Any,
    prompts: str | Sequence[str] | Prompts,
    reward: Any = None,
    method: str = "plain",
    n: int = 1,
    steps: int = 10,
    guidance: float = 1.0,
    seed: int = 0,
    *,
    budget: Mapping[str, Any] | None = None,
    judges: Any = None,
    metadata: Sequence[Mapping[str, Any]] = (),
    first_id: int = 0,
    batch: int = 16,
    **options: Any,
) -> Iterator[State]:
    """The states of a search while it runs, for user interfaces: `state.images` now, `state.best` so far; the last one has the `result`.

    To cancel, stop iterating (and `close()` the generator, if it is kept): nothing runs between two states.

    Args:
        policy, prompts, reward, method, n, steps, guidance, seed, budget: as in `sample`.
        judges: score the result without being searched by, in any form that `panel` takes.
        metadata: what is known of each prompt, for rewards that need it; as many dicts as prompts, or none.
        first_id: number of the first picture: a picture's noise depends on seed and number alone, so that parts of a list can be drawn
            apart.
        batch: latents per forward; halved where memory runs out.
        options: of the method.

    Raises:
        UserError: as in `sample`, at the call itself.
    """
    chosen, limits = plan(method, options, budget, reward, judges)
    for name, value in (("n", n), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name}={value}: expected 1 or more")
    drawn = prompts if isinstance(prompts, Prompts) else listed(prompts, n, metadata, first_id)
    sampler: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "batch": batch, "budget": limits}
    return _states(policy, drawn, chosen, reward, judges, sampler)


def plan(
    method: str, options: Mapping[str, Any] | None = None, budget: Mapping[str, Any] | None = None, reward: Any = None, judges: Any = None
) -> tuple[Method, Budget]:
    """A method with its options, and a budget, checked together with the names of rewards; nothing is loaded.

    Raises:
        UserError: an unknown method, option, reward or budget, a budget of 0, or rewards that this method can't search by.
    """
    chosen: Method = registry.load("steering", method)(method, options)
    limits = validate(Budget, dict(budget) if isinstance(budget, Mapping) else {} if budget is None else budget, "budget")
    api.split(judges, "judges") if judges is not None else None
    if reward is None:
        if chosen.needs_reward:
            raise UserError(f"{method} needs a reward to search by; name one, such as clip_score")
        return chosen, limits
    objects, sections = api.split(reward)
    if chosen.needs_gradient:
        lost = registry.without_gradient(sections) or climbable(objects)
        if lost:
            raise UserError(f"{method} climbs the gradients of rewards, and {lost} has none; leave it out, or search by best_of_n")
    return chosen, limits


def climbable(objects: Mapping[str, tuple[Any, float]]) -> str | None:
    """The first built reward with a weight that has no gradient, for messages."""
    for alias, (reward, weight) in objects.items():
        if weight and not reward.spec.differentiable:
            return f"rewards.{alias} ({reward.spec.name})"
    return None


def listed(texts: str | Sequence[str], n: int, metadata: Sequence[Mapping[str, Any]] = (), first_id: int = 0) -> Prompts:
    """n pictures of each prompt as a group, numbered from `first_id`.

    Raises:
        UserError: no prompt, an empty one, or metadata of another length.
    """
    each = [texts] if isinstance(texts, str) else list(texts)
    if not each:
        raise UserError("no prompt given")
    for number, text in enumerate(each, 1):
        if not text.strip():
            raise UserError("the prompt is empty" if len(each) == 1 else f"prompt {number} is empty")
    if metadata and len(metadata) != len(each):
        raise UserError(f"{len(each)} prompts and metadata of {len(metadata)}: expected one each")
    known = [dict(record) for record in metadata] or [{} for _ in each]
    drawn = Prompts.of([text for text in each for _ in range(n)], [record for record in known for _ in range(n)], first_id)
    return replace(drawn, groups=drawn.ids.div(n, rounding_mode="floor"))


def _states(policy: Any, prompts: Prompts, method: Method, rewards: Any, judges: Any, sampler: dict[str, Any]) -> Iterator[State]:
    with opened(policy) as ready:
        panel, held_out = (None if one is None else api.panel(one, ready.name, ready.device) for one in (rewards, judges))
        if panel and method.needs_gradient:
            built = {alias: (panel.rewards[alias], weight) for alias, weight in panel.weights.items()}
            if lost := climbable(built):
                raise UserError(f"{method.name} climbs the gradients of rewards, and {lost} has none as it is set up; search by best_of_n")
        for alias, reward in panel.rewards.items() if panel and method.needs_reward else ():
            if getattr(reward, "held_out_only", False):
                raise UserError(f"rewards.{alias}: {reward.spec.name} judges only; a judge that is searched by judges nothing (use judges)")
        task = Task(ready, prompts, panel, **sampler)
        state, trace = None, list[dict[str, float]]()
        for state in search(method, task):
            if state.best is not None and state.best.scores:
                trace.append(state.record())
            yield state
        assert state is not None
        yield replace(state, best=task.best, result=_result(task, trace, held_out))


def _result(task: Task, trace: list[dict[str, float]], judges: Panel | None) -> Result:
    assert task.best is not None, "a search finishes its first picture"
    seconds, images = task.seconds, task.best.images
    judged: dict[str, Tensor] = {}
    if judges:
        with torch.no_grad():
            judged = judges.score(replace(task.inputs(task.rows()), images=images)).by_name()
    return Result(images, task.best.scores, judged, trace, task.nfe, task.nfe_backward, task.scored, seconds)


@contextmanager
def opened(source: Any) -> Iterator[Policy]:
    """A policy as it is; whatever `load` takes, loaded; or a diffusers pipeline for the time of the block, on its own device."""
    if isinstance(source, Policy):
        yield source
    elif isinstance(source, str):
        yield api.load(source)
    elif not hasattr(source, "components"):
        raise UserError(f"{source!r} is nothing to sample from; expected a policy, a diffusers pipeline, or what visalign.load takes")
    else:
        with untouched(source):
            loaded = registry.load_policy(source)
            yield loaded.to(next(loaded.family.network.parameters()).device)
