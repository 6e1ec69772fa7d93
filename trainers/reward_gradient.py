"""Direct reward gradients: what a differentiable reward says of a picture flows back through the sampler into the weights.

One trainer, whose options are the published methods:

1. DRaFT-K (arXiv 2309.17400): `depth: K`, the last K steps; null is all of them. DRaFT-LV: `renoise: n`.
2. AlignProp (arXiv 2310.03739): `depth: [1, T]`, drawn anew for every micro-batch, and `objective: distance`.
3. ReFL (arXiv 2304.05977): `estimate: [30, 40]`, the clean estimate at a random late step; `objective: margin, goal: 2`.
4. InstructVideo (arXiv 2312.12490): `clean: SOURCE, strength: 0.6`, pictures that are noised in part and denoised again.
5. D²-Align, stage 2 (arXiv 2512.24146): `clean: SOURCE, estimate: [0, T]`, with the reward `directional`.
6. Ctrl-U (arXiv 2410.11236): `clean: SOURCE, estimate: [low, T], view: 1`, with the reward `uncertainty` of a `condition`.

Collect → credit → loss, as everywhere. A collection draws without a graph; it keeps the states from which gradients will flow, and the
gradient of each reward by the latents that it judged. Credit is that gradient times the slope of the objective: a number for every latent
element, where other algorithms have one for the sample. The loss takes the kept steps again, with a graph, and moves their end along the
credit. So decoder and reward are differentiated once, and their graph is gone before the denoiser's is built.

Differs from the authors' code: steps that teach nothing have no graph (AlignProp runs all with one); AlignProp's K is drawn once, as in its
paper, and not anew at every step; ReFL's gradient is taken at the time of its step (theirs passes the step's number for it); instead of a
pretraining loss (ReFL, Ctrl-U) there is a penalty `kl` against the model before training.
"""

from __future__ import annotations

import random
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from visalign.backprop import denoise, predict
from visalign.config import AtLeastZero, Fraction, Positive
from visalign.errors import UserError
from visalign.losses import Loss, velocity_kl
from visalign.noise import gaussian, seed_for
from visalign.paths import endpoints, mix
from visalign.pathwise import Judged, Verdict, Walk, joined, judge, trajectory
from visalign.references import References
from visalign.rollout import Condition, Minibatch, Prompts, Rollout
from visalign.trainer import Session, Trainer

PICTURES = 4  # of a prompt, at most, to start from
Count = Annotated[int, Field(ge=0)]


class RewardGradient(Trainer):
    """Draw, differentiate the reward, and take the last steps again with a graph."""

    class Config(Trainer.Config):
        group_size: Positive = 1  # only rewards that compare pictures need more
        depth: Positive | tuple[Positive, Positive] | None = 1  # gradients flow through the last K steps; null: all; a pair: from, to
        renoise: Count = 0  # how often a picture is noised again to the start of the last step, and teaches that step once more
        estimate: tuple[Count, Positive] | None = None  # judge the clean estimate at a step drawn from [low, high) instead of the end
        clean: str | None = None  # begin at noised pictures: own (the policy's), toybox, a folder, a .jsonl of prompts; null: at noise
        strength: Fraction = 0.6  # clean: share of the steps that are taken again; an estimate's noise is that of its own step
        view: Positive | None = None  # clean: a second estimate from the same noise, so many steps earlier, for rewards that compare views
        objective: Literal["reward", "margin", "distance"] = "reward"  # maximise R, or minimise max(0, goal - R) or |R - goal|
        goal: float | None = None
        kl: AtLeastZero = 0.0  # weight of mean‖Δprediction‖² against the model before training, at the states where gradients begin
        checkpointing: bool = True  # recompute each of several steps in the backward pass, instead of keeping their activations

    compares = False
    deviation = "replay/max_deviation"

    def __init__(self, session: Session):
        super().__init__(session)
        self.steps, self.guidance = self.config.policy.steps, self.config.policy.guidance
        self.sigmas = self.policy.family.grid(self.steps).to(self.device)
        self.entry = 0 if self.settings.clean is None else self.steps - max(1, round(self.settings.strength * self.steps))
        self._check_options()
        self._check_rewards()
        source = self.settings.clean
        self.pictures = None if source in (None, "own") else References("trainer.clean", source, PICTURES, self._with_latents)
        if self.settings.kl:
            self.policy.keep_reference()

    @classmethod
    def climbs(cls, settings: Config) -> bool:
        return True

    # --- collect -------------------------------------------------------------------------------------------------------

    def collect(self, prompts: Prompts, step: int) -> Judged:
        before, condition = self.policy.nfe, self.policy.family.encode(prompts.texts, prompts.metadata)
        walks: list[Walk] = []
        verdicts: list[Verdict] = []
        for number, rows in enumerate(torch.arange(len(prompts)).split(self.settings.micro_batch)):
            rng = random.Random(seed_for("depth", self.config.run.seed, step, number))  # alike on all processes: as many forwards each
            walks.append(self._walk(prompts.take(rows), condition.take(rows), rng))
            verdicts.append(judge(self.policy, self.session.rewards, prompts.take(rows), walks[-1], self.settings.view is not None))
        found = joined(verdicts)
        flat = self.processes.mean((~found.slopes.flatten(1).any(1)).float().mean().to(self.device)).item()
        return Judged(
            prompts,
            condition,
            trajectory(walks, self.sigmas, (self.policy.nfe - before) / len(prompts)),
            found.images,
            found.rewards,
            errors=found.errors,
            values=found.values,
            slopes=found.slopes,
            metrics=self._describe_rewards(found.rewards, prompts.groups) | {"gradient/none": flat},
        )

    @torch.no_grad()
    def _walk(self, prompts: Prompts, condition: Condition, rng: random.Random) -> Walk:
        """Without a graph to where gradients begin, and on to the latents that are judged."""
        settings, path = self.settings, self.policy.family.path
        noise, at = self._noise(prompts, 0), self._begin(prompts, rng)
        clean, pictures = self._clean(prompts, condition)
        if clean is not None and settings.estimate:
            x = mix(path, clean, noise, self.sigmas[at])
        else:
            x = noise if clean is None else mix(path, clean, noise, self.sigmas[self.entry])
            options = {"steps": self.steps, "guidance": self.guidance, "first": self.entry, "last": int(at[0])}
            x = denoise(self.policy, x, condition, **options)
        starts, steps = [x], [at]
        if settings.view and clean is not None:
            starts.append(mix(path, clean, noise, self.sigmas[at - settings.view]))
            steps.append(at - settings.view)
        ends = [self.finish(start, step, condition) for start, step in zip(starts, steps, strict=True)]
        last = torch.full_like(at, self.steps - 1)
        for number in range(settings.renoise):
            starts.append(mix(path, ends[0], self._noise(prompts, f"renoise {number}"), self.sigmas[last]))
            steps.append(last)
            ends.append(self.finish(starts[-1], last, condition))
        return Walk(starts, ends, steps, pictures)

    def _begin(self, prompts: Prompts, rng: random.Random) -> Tensor:
        """(B,) int64, on the CPU: the steps at which gradients begin; one for all, unless noise is mixed in right there."""
        settings = self.settings
        if settings.estimate and settings.clean:
            seeds = [seed_for("estimate", self.config.run.seed, number) for number in prompts.ids.tolist()]
            return torch.tensor([random.Random(seed).randrange(*settings.estimate) for seed in seeds])
        if settings.estimate:
            begin = rng.randrange(*settings.estimate)
        elif isinstance(settings.depth, tuple):
            begin = self.steps - rng.randint(*settings.depth)
        else:
            begin = self.entry if settings.depth is None else self.steps - settings.depth
        return torch.full((len(prompts),), begin)

    def _clean(self, prompts: Prompts, condition: Condition) -> tuple[Tensor | None, list[Tensor] | None]:
        """The clean latents (B, ...) to begin with, and B given pictures (1, 3, H, W) of them; None where there are none."""
        if self.settings.clean is None:
            return None, None
        if self.pictures is None:
            options = {"steps": self.steps, "guidance": self.guidance}
            return denoise(self.policy, self._noise(prompts, "own"), condition, **options), None
        known = self.pictures.prepare(prompts.texts, prompts.metadata)
        rows = [random.Random(seed_for("picture", self.config.run.seed, number)) for number in prompts.ids.tolist()]
        chosen = [(each, rng.randrange(len(each[0]))) for each, rng in zip(known, rows, strict=True)]
        return torch.stack([latents[n] for (_, latents), n in chosen]), [images[n : n + 1] for (images, _), n in chosen]

    def _with_latents(self, images: Tensor) -> tuple[Tensor, ...]:
        """(R, 3, H, W) pictures, and their latents (R, ...)."""
        images = images.to(self.device)
        return images, self.policy.family.encode_images(images)

    def _noise(self, prompts: Prompts, stream: int | str) -> Tensor:
        names = prompts.ids if stream else prompts.noise_ids
        return gaussian(self.policy.family.latent_shape, self.config.run.seed, names, stream, device=self.device)

    # --- credit, loss --------------------------------------------------------------------------------------------------

    def credit(self, rollout: Rollout) -> Tensor:
        """(N, S, ...) minus the gradient of the objective by each judged latent."""
        assert isinstance(rollout, Judged)
        assert rollout.slopes is not None
        assert rollout.values is not None
        pull = self.objective(rollout.values)[1].to(self.device)
        return pull.reshape(*pull.shape, *(1 for _ in rollout.slopes.shape[2:])) * rollout.slopes.to(self.device)

    def objective(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, and minus its slope, of rewards of any shape."""
        goal = self.settings.goal
        if self.settings.objective == "reward":
            return -rewards, torch.ones_like(rewards)
        if self.settings.objective == "margin":
            return (goal - rewards).relu(), (rewards < goal).to(rewards)
        return (rewards - goal).abs(), (goal - rewards).sign().nan_to_num(0.0)

    def loss(self, batch: Minibatch) -> Loss:
        """Its value is the penalty's alone, because the end is still where it was judged; `learn` adds the objective."""
        several = self.settings.checkpointing and self.settings.estimate is None and self.settings.depth != 1
        said = predict(self.policy, batch.x, batch.sigma, batch.condition, self.guidance, checkpointing=several)
        moved = self.finish(batch.x, batch.step, batch.condition, said) - batch.x_next
        value = -(batch.advantage.reshape(len(batch), -1) * moved.flatten(1)).sum(1).mean()
        metrics = {self.deviation: moved.detach().abs().max()}
        if not self.settings.kl:
            return Loss(value, metrics)
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.predict(batch.x, batch.sigma, batch.condition, self.guidance)
        kl = velocity_kl(said, reference).mean()
        return Loss(value + self.settings.kl * kl, metrics | {"kl": kl.detach()})

    def finish(self, x: Tensor, step: Tensor, condition: Condition, prediction: Tensor | None = None) -> Tensor:
        """Clean latents (B, ...) from x (B, ...) at the start of `step` (B,), of which the network says `prediction`: along the grid from
        the step of the first on, or, for estimates, at once."""
        if self.settings.estimate is None:
            options = {"steps": self.steps, "guidance": self.guidance, "first": int(step[0]), "checkpointing": self.settings.checkpointing}
            return denoise(self.policy, x, condition, prediction=prediction, **options)
        time = self.sigmas[step]
        said = predict(self.policy, x, time, condition, self.guidance) if prediction is None else prediction
        return endpoints(self.policy.family.path, x, said, time)[0]

    def learn(self, rollout: Rollout, step: int) -> dict[str, float]:
        metrics = super().learn(rollout, step)
        assert rollout.values is not None
        objective = self.processes.mean(self.objective(rollout.values)[0].nanmean().to(self.device)).item()
        steps = rollout.trajectory.steps
        taken = steps.numel() if self.settings.estimate else (self.steps - steps).sum().item()
        halves = 1 if self.guidance == 1.0 else 2
        return metrics | {"loss": metrics["loss"] + objective, "nfe_backward": halves * taken / len(steps)}

    # --- what is refused -----------------------------------------------------------------------------------------------

    def _check_options(self) -> None:
        settings, steps = self.settings, self.steps
        low, high = settings.depth if isinstance(settings.depth, tuple) else (settings.depth or 1, settings.depth or 1)
        wrong: list[tuple[bool, str]] = [
            (
                not low <= high <= steps - self.entry,
                f"depth={settings.depth}: at most {steps - self.entry} steps are taken",
            ),
            (
                settings.renoise > 0 and bool(settings.clean or settings.estimate),
                "renoise: is for whole chains; no clean, no estimate",
            ),
            (settings.view is not None and not (settings.clean and settings.estimate), "view: needs clean and estimate"),
            ((settings.goal is None) != (settings.objective == "reward"), f"goal: objective={settings.objective} needs {_goal(settings)}"),
            (settings.updates > 1, "updates: the gradient of a reward is for the weights that drew the picture; use 1"),
            (settings.stacked_timesteps > 1, "stacked_timesteps: steps are taken one after the other; use 1"),
        ]
        if settings.estimate:
            first, end = settings.estimate
            least = settings.view or 0
            wrong.append((not least <= first < end <= steps, f"estimate=[{first}, {end}]: expected {least} <= low < high <= {steps}"))
        for bad, message in wrong:
            if bad:
                raise UserError(f"trainer.{message}")

    def _check_rewards(self) -> None:
        panel, views = self.session.rewards, False
        for alias, reward in panel.rewards.items():
            spec = reward.spec
            views |= "views" in spec.needs
            if panel.weights[alias] and not spec.differentiable:  # with these options; its class alone was asked before it was loaded
                raise UserError(f"rewards.{alias}: {spec.name} has no gradient; use one that has, such as clip_score, or weight 0")
            if spec.scope != "point" and self.settings.micro_batch % self.settings.group_size:
                raise UserError(
                    f"trainer.micro_batch={self.settings.micro_batch}: {spec.name} compares the pictures of a group, so it must be a "
                    f"multiple of group_size={self.settings.group_size}"
                )
        if views != (self.settings.view is not None):
            raise UserError(
                f"trainer.view: {'a reward compares views; set it to 1' if views else 'no reward compares views; leave it out'}"
            )


def _goal(settings: RewardGradient.Config) -> str:
    return "none" if settings.objective == "reward" else "a number"
