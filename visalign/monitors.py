"""What tells a better model from a hacked reward: statistics of pictures, their spectrum and diversity, and alarms on a run's rows.

All are measured on fixed prompts and seeds and read against the base model. They look at what no preference score sees: saturated or dark
pictures, grids (a pattern repeated every 2, 8 or 16 pixels), one layout for every seed, one tone for every prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DARK = 0.2  # luminance below which a pixel is dark
EDGE = 0.1  # luminance slope per pixel above which a pixel lies on an edge
BINS = 8  # per channel, for the colour entropy

# --- pictures ----------------------------------------------------------------------------------------------------------


def luminance(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, H, W), Rec. 709 weights on the stored values."""
    return (images * images.new_tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(1)


def _saturation(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, H, W): HSV's S."""
    high, low = images.amax(1), images.amin(1)
    return (high - low) / high.clamp_min(1e-6)


def _edges(grey: Tensor) -> Tensor:
    """(N, H, W) -> (N,): share of pixels on an edge (Sobel)."""
    across = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    slopes = F.conv2d(grey[:, None], torch.stack([across, across.T])[:, None])
    return (slopes.norm(dim=1) > EDGE).float().mean((-2, -1))


def _entropy(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N,): bits of each picture's histogram over 8 × 8 × 8 colours."""
    level = (images * BINS).long().clamp(0, BINS - 1)
    colour = ((level[:, 0] * BINS + level[:, 1]) * BINS + level[:, 2]).flatten(1)
    counts = torch.zeros(len(images), BINS**3, device=images.device).scatter_add_(1, colour, torch.ones_like(colour, dtype=torch.float32))
    share = counts / counts.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1) / math.log(2)


def image_statistics(images: Tensor) -> dict[str, float]:
    """Mean over pictures of six statistics, and under NAME_std their spread over pictures: the unit of an alarm's z.

    Args:
        images: (N, 3, H, W) float in [0, 1].

    Returns:
        luminance, saturation, contrast (std of the luminance), dark and edges (shares of pixels), entropy (bits, at most 9).
    """
    images = images.float()
    grey = luminance(images)
    return _summary(
        luminance=grey.mean((-2, -1)),
        saturation=_saturation(images).mean((-2, -1)),
        contrast=_contrast(grey),
        dark=(grey < DARK).float().mean((-2, -1)),
        edges=_edges(grey),
        entropy=_entropy(images),
    )


def spectral(images: Tensor) -> dict[str, float]:
    """Traces of grids in the luminance's power spectrum; names and NAME_std as in `image_statistics`.

    Args:
        images: (N, 3, H, W) float in [0, 1], at least 16 pixels a side.

    Returns:
        high_frequency: share of the energy above 0.6 of the Nyquist frequency.
        peaks: decades by which the highest of the lines at 1/2, 1/8 and 1/16 cycles a pixel (horizontal, vertical, diagonal) stands
            above the median of its surroundings. Toybox scenes: 0.7 ± 0.2; with a grid of period 8 and amplitude 0.06: 2.3.
    """
    grey = luminance(images.float())
    height, width = grey.shape[-2:]
    window = torch.hann_window(height, device=grey.device)[:, None] * torch.hann_window(width, device=grey.device)
    power = torch.fft.fft2((grey - grey.mean((-2, -1), keepdim=True)) * window).abs().square()
    radius = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij")).to(grey.device)
    total = power.sum((-2, -1)).clamp_min(1e-12)
    peaks = [_peak(power, y * height, x * width) for f in (1 / 2, 1 / 8, 1 / 16) for y, x in ((f, 0), (0, f), (f, f))]
    return _summary(high_frequency=(power * (radius > 0.3)).sum((-2, -1)) / total, peaks=torch.stack(peaks).amax(0))


def motion(videos: Tensor) -> dict[str, float]:
    """Mean absolute change from frame to frame, over videos (N, F, 3, H, W) in [0, 1]; rewards of single frames may end it."""
    change = (videos[:, 1:] - videos[:, :-1]).abs().flatten(1)
    return _summary(motion=change.mean(1))


def _peak(power: Tensor, y: float, x: float) -> Tensor:
    """(N, H, W) power -> (N,): decades of the bin (y, x) over the median of the 7 × 7 around it, less the inner 3 × 3 (a widened line)."""
    height, width = power.shape[-2:]
    offsets = torch.arange(-3, 4, device=power.device)
    around = power[:, (round(y) + offsets)[:, None] % height, (round(x) + offsets) % width]
    far = (offsets.abs()[:, None] > 1) | (offsets.abs() > 1)
    floor = 1e-6 * power.mean((-2, -1)) + 1e-9  # an empty surrounding is no evidence: flat pictures, pure tones
    return torch.log10((around[:, 3, 3] + floor) / (around[:, far].median(1).values + floor))


def _contrast(grey: Tensor) -> Tensor:
    """(N, H, W) -> (N,): population std of the luminance."""
    return grey.flatten(1).std(1, correction=0)


def _summary(**values: Tensor) -> dict[str, float]:
    mean = {name: value.mean().item() for name, value in values.items()}
    return mean | {f"{name}_std": value.std(correction=0).item() for name, value in values.items()}


# --- diversity ---------------------------------------------------------------------------------------------------------


def tonal_diversity(images: Tensor) -> float:
    """PVS of DivGenBench: std over pictures of mean saturation + of mean HSV value + of contrast; 0 = one tone. (N, 3, H, W) in [0, 1]."""
    return tones(images).std(0, correction=0).sum().item()


def tones(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 3): mean saturation, mean HSV value and contrast of each picture."""
    images = images.float()
    return torch.stack([_saturation(images).mean((-2, -1)), images.amax(1).mean((-2, -1)), _contrast(luminance(images))], 1)


def diversity(embeddings: Tensor, groups: Tensor) -> float:
    """Mean over groups of the mean pairwise (1 - cosine), which is the mean leave-one-out distance; 0 = copies.

    Args:
        embeddings: (N, D).
        groups: (N,) int; groups of one are left out.

    Returns:
        in [0, 2]; NaN when no group has two members.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    _, group = groups.to(unit.device).unique(return_inverse=True)
    size = torch.bincount(group).double()
    total = unit.new_zeros(len(size), unit.shape[1]).index_add_(0, group, unit)
    pairs = size * (size - 1)
    cosine = (total.square().sum(1) - size) / pairs  # |Σe|² counts every ordered pair, and each vector with itself
    return (1 - cosine)[pairs > 0].mean().item()


def vendi(embeddings: Tensor) -> float:
    """Vendi score: exp of the entropy of the eigenvalues of K / N with the cosine kernel K; from 1 (copies) to N (orthogonal). (N, D)."""
    return effective_number(embeddings).item()


def effective_number(embeddings: Tensor) -> Tensor:
    """The Vendi score as a differentiable () float64."""
    unit = F.normalize(embeddings.double(), dim=1)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(1e-12)  # where the entropy's slope is still finite
    return torch.special.entr(eigenvalues).sum().exp()


# --- alarms ------------------------------------------------------------------------------------------------------------

Row = dict[str, float]
WINDOW = 6  # evaluations that a trend is read from
STUDENT = {2: 4.30, 3: 3.18, 4: 2.78}  # two-sided 95 % of Student's t by degrees of freedom: few evaluations prove little
RECENT = 5  # rows that "now" and "at the start" are averaged over


def alarms(rows: Sequence[Row]) -> list[str]:
    """What looks wrong in a run's rows, one sentence each: the metric, its figures, what to do. Rows without a key are passed over."""
    checks: tuple[Callable[[Sequence[Row]], list[str]], ...] = (_hacking, _spread, _zero_spread, _images, _diversity)
    return [alarm for check in checks for alarm in check(rows)]


def _series(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever the key is there and finite."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def _names(rows: Sequence[Row], prefix: str) -> list[str]:
    """Names under a prefix, in order of appearance."""
    return list(dict.fromkeys(key.removeprefix(prefix) for row in rows for key in row if key.startswith(prefix)))


def _trend(points: Sequence[tuple[float, float]]) -> int:
    """1 rising, -1 falling, 0 neither: the least-squares slope against the 95 % of its own standard error (at least 4 points)."""
    freedom = len(points) - 2
    if freedom < 2:
        return 0
    step, value = torch.tensor(points, dtype=torch.float64).T
    step, value = step - step.mean(), value - value.mean()
    slope = (step @ value / (step @ step)).item()
    error = math.sqrt((value - slope * step).square().sum().item() / freedom / (step @ step).item())
    return int(math.copysign(1, slope)) if abs(slope) > STUDENT.get(freedom, 2.0) * error + 1e-12 else 0


def _hacking(rows: Sequence[Row]) -> list[str]:
    """The training reward rises while judges that it was not trained on fall."""
    judges = [name for name in _names(rows, "eval/") if name not in ("diversity", "tonal")]
    trained = _names(rows, "reward/")
    judges = [name for name in judges if name not in trained] or judges
    recent = {name: _series(rows, f"eval/{name}")[-WINDOW:] for name in judges}
    falling = [name for name, points in recent.items() if _trend(points) < 0]
    if not falling or len(falling) < min(2, len(judges)):
        return []
    since = recent[falling[0]][0][0]
    reward = [point for point in _series(rows, "reward/mean") if point[0] >= since]
    if _trend(reward) <= 0:
        return []
    figures = ", ".join(f"eval/{name} fell {recent[name][0][1]:.3g} → {recent[name][-1][1]:.3g}" for name in falling)
    first, last = _mean(reward[:RECENT]), _mean(reward[-RECENT:])
    return [
        f"Reward hacking: since step {since:.0f} reward/mean rose {first:.3g} → {last:.3g} while {figures}; stop and go back to the "
        "checkpoint with the best held-out score, then lower the learning rate, raise the KL weight or add a reward for what was lost."
    ]


def _mean(points: Sequence[tuple[float, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _spread(rows: Sequence[Row]) -> list[str]:
    found: list[str] = []
    for name in _names(rows, "spread/"):
        points = _series(rows, f"spread/{name}")
        if len(points) < 2 * RECENT:
            continue
        start, now = _mean(points[:RECENT]), _mean(points[-RECENT:])
        if now < 0.25 * start:
            found.append(
                f"Reward spread: spread/{name} shrank {start:.3g} → {now:.3g}, below a quarter of its start, so differences within a group "
                "are becoming noise; use harder prompts, more exploration, or a reward with finer grades."
            )
    return found


def _zero_spread(rows: Sequence[Row]) -> list[str]:
    found: list[str] = []
    for name in _names(rows, "zero_spread/"):
        points = _series(rows, f"zero_spread/{name}")[-RECENT:]
        if points and _mean(points) > 0.5:
            found.append(
                f"Groups without signal: zero_spread/{name} is {_mean(points):.0%} over the last {len(points)} steps (limit 50 %), those "
                "groups teach nothing; use harder prompts, larger groups, or a dense reward."
            )
    return found


def _images(rows: Sequence[Row]) -> list[str]:
    """Statistics far from the base model's, in units of the base's own spread over pictures."""
    measured = [row for row in rows if any(key.startswith("image/") for key in row)]
    found: list[str] = []
    for name in [name for name in _names(measured, "image/") if not name.endswith("_std")]:
        base, now = measured[0].get(f"image/{name}", math.nan), measured[-1].get(f"image/{name}", math.nan)
        z = (now - base) / max(measured[0].get(f"image/{name}_std", math.nan), 0.01)  # below 0.01 a spread is that of one flat tone
        if abs(z) > 3:
            found.append(
                f"Picture statistics: image/{name} went {base:.3g} → {now:.3g} (z = {z:+.1f} against the base model, limit 3); look at "
                "samples/, and if the pictures are worse, lower the learning rate, raise the KL weight or gate the reward."
            )
    return found


def _diversity(rows: Sequence[Row]) -> list[str]:
    found: list[str] = []
    for key in ("eval/diversity", "eval/tonal"):
        points = _series(rows, key)
        if len(points) > 1 and points[-1][1] < 0.5 * points[0][1]:
            found.append(
                f"Diversity: {key} fell {points[0][1]:.3g} → {points[-1][1]:.3g}, below half of the base model's; raise the KL weight, "
                "stop earlier, or average the weights with the base model's."
            )
    return found
