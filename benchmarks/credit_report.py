"""The page that `benchmarks.credit` writes of its result; every number and verdict in it is taken from there."""

from __future__ import annotations

import math
from typing import Any

INTRODUCTION = """# What a credit says of a denoising step, against the truth

Written by `python -m benchmarks.credit`. The truth about a step is V(after) - V(before), V(x) the mean reward of what the stochastic policy
makes of x: a closed form in the Gaussian world, nested Monte Carlo in the mixture. Rollouts, completions and credits are the library's:
{steps} steps of Flow-SDE, all but the last stochastic, reward exp(-‖x - target‖²/2w²), groups that share their initial noise unless it says
"own noise", no division by the group's spread unless it says "over std" (`value` always divides).

- **NFE**: forwards per picture, and per step that gets a credit of its own; shared states count once. **scored**: rewards per picture.
- **ρ**: correlation with the truth within groups, mean over steps ± standard error; **ρ of all** pools the steps, so that sizes count, too.
- **bias**, **variance**: the mean square error over that of a credit of 0 is bias² + variance; bias is what is linear in the truth. What
  has no unit of reward is scaled to the truth first.
- **× NFE**: variance times NFE per credited step, the price of averaging it away.
- **cosine**: between the exact gradient of E[r] and an estimate from {budget} NFE, mean of {repeats} estimates ± standard error; **of the
  mean**: of all these estimates together; what it lacks of 1 is bias in direction, and noise where single estimates are far off.
- "mean of m": terminal credit whose reward is the mean over m continuations of the state after the step, which is what NFE can buy it.
"""
NOTE = """
Completions by the ODE keep differences that the stochastic sampler forgets: early gains come out too large, which is their bias. One step
to the end (n = 1, value) is the mean of what may follow, and these rewards take any point; on pictures that mean is a blur, outside a
reward's domain, where DenseGRPO finds n = 1 worse than terminal credit: the rank of n = 1 here does not carry over. `own_branch` is judged
by the truth of the fully stochastic policy, though its own is stochastic at one step only. A tree has few nodes at its early depths, and a
node is part of its own baseline: one of n keeps 1 - 1/n of its gradient, so that early steps count for less than they should.
"""
HEAD = ["credit", "pictures per group", "NFE per picture", "NFE per step", "scored"]
HEAD += ["ρ", "ρ of all", "bias", "variance", "× NFE", "cosine", "of the mean"]
Row = dict[str, Any]


def compared(ours: Row, other: Row, key: str, error: str) -> str:
    """Whether three standard errors tell `ours` from `other`."""
    apart = (ours[key] - other[key]) / math.hypot(ours[error], other[error])
    word = "clearly better" if apart > 3 else "clearly worse" if apart < -3 else "no clear difference"
    values = [f"{row[key]:.3f} ± {row[error]:.3f}" for row in (ours, other)]
    return f"`{ours['name']}` {values[0]} against {values[1]} of `{other['name']}`, {word}"


def verdict(rows: dict[str, Row]) -> str:
    """What follows from a world's table."""
    gain, mean, chain, small, tree = (rows[n] for n in ("gain, n = t", "terminal, mean of 2", "terminal", "tree", "tree, 32 leaves"))
    group = {row["name"]: f"{row['nfe'] * row['size']:.0f}" for row in (chain, small, tree)}
    directions = "; ".join(compared(row, chain, "cosine", "cosine_error") for row in (gain, small))
    return (
        f"ρ at equal NFE: {compared(gain, mean, 'correlation', 'error')} ({gain['nfe']:.1f} and {mean['nfe']:.1f} NFE per picture); "
        f"{compared(tree, chain, 'correlation', 'error')} ({group[tree['name']]} and {group['terminal']} NFE per group); "
        f"{compared(small, chain, 'correlation', 'error')} ({group['tree']} NFE per group). Direction of the gradient at equal NFE: "
        f"{directions}. The best direction is that of `{max(rows.values(), key=lambda row: row['cosine'])['name']}`."
    )


def cells(row: Row) -> list[str]:
    """A row of a world's table."""
    return [
        f"`{row['name']}`",
        str(row["size"]),
        *(f"{row[key]:.1f}" for key in ("nfe", "nfe_per_step", "scored")),
        f"{row['correlation']:.3f} ± {row['error']:.3f}",
        *(f"{row[key]:.2f}" for key in ("overall", "bias", "variance")),
        f"{row['variance'] * row['nfe_per_step']:.2f}",
        f"{row['cosine']:.3f} ± {row['cosine_error']:.3f}",
        f"{row['cosine_of_mean']:.3f}",
    ]


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def section(name: str, rows: list[Row]) -> str:
    """A world's part of the page."""
    steps = [[f"`{row['name']}`", *(f"{value:.2f}" for value in row["by_step"])] for row in rows]
    by_step = grid(["ρ at step", *map(str, range(len(steps[0]) - 1))], steps)
    found = verdict({row["name"]: row for row in rows})
    return "\n\n".join([f"## {name.capitalize()}", grid(HEAD, [cells(row) for row in rows]), found, by_step])


def report(found: Row) -> str:
    """The page of a result."""
    sections = [section(name, rows) for name, rows in found["worlds"].items()]
    return "\n\n".join([INTRODUCTION.format(**found).rstrip(), *sections, NOTE.strip()]) + "\n"
