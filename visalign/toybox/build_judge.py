"""Weights of the second judge: a detector trained on pictures of a renderer of its own.

`render_smooth` shares only the geometry of the shapes with `scenes.render`: it evaluates signed distances (after Quilez, "2D distance
functions") instead of rasterising polygons, and varies colours, ground, edges and noise. A quarter of the objects are melted: half-way
between two shapes, bumpy, cut in half or blurred. The network must see those and call them "unknown".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from visalign.toybox.judge import KINDS, STRIDE, Detector
from visalign.toybox.pretrain import Progress, warm_then_fall
from visalign.toybox.scenes import COLOURS, GROUND, SHAPES, SIZE, Object

WIDTH, STEPS, BATCH, SEED = 48, 1000, 64, 77
SLOTS, CELLS = 5, SIZE // STRIDE
UNKNOWN = len(SHAPES)
Scene = dict[str, Tensor]


def build(out: Path, work: Path, device: torch.device) -> None:
    """Train the detector and save it to `out`/judge."""
    torch.manual_seed(SEED)
    network = Detector(WIDTH).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    progress = Progress(work / "judge.pt", {"network": network, "optimizer": optimizer})
    for step in progress.steps(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warm_then_fall(step, STEPS, hold=0.3)
        scene = random_scenes(BATCH, torch.Generator().manual_seed(SEED * 1_000_000 + step))
        images = render_smooth(scene, torch.Generator().manual_seed(SEED * 2_000_000 + step))
        loss = detection_loss(network(images.to(device)), {name: value.to(device) for name, value in scene.items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        progress.note = {"loss": loss.item()}
    folder = out / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"width": WIDTH, "steps": STEPS, "seed": SEED}, indent=2) + "\n")


# --- scenes ------------------------------------------------------------------------------------------------------------


def random_scenes(count: int, rng: torch.Generator) -> Scene:
    """`count` scenes of up to five objects that may nearly touch: (N, 5) each of present, x, y, radius, angle, shape, other, blend, colour.

    `shape` is what the judge must say (6 = unknown), `form` what is drawn; a melted object is drawn `blend` of the way towards shape
    `other`, with `bumps`, `cut` and `blur`.
    """
    draw = lambda low, high: low + (high - low) * torch.rand(count, SLOTS, generator=rng)  # noqa: E731
    pick = lambda high: torch.randint(high, (count, SLOTS), generator=rng)  # noqa: E731
    wanted = torch.randint(SLOTS + 1, (count, 1), generator=rng)
    biggest = torch.tensor([18.0, 18.0, 15.0, 13.0, 11.5, 10.5])[wanted]
    radius = draw(0.65, 1.0) * biggest
    x, y = (radius + (SIZE - 2 * radius) * torch.rand(count, SLOTS, generator=rng) for _ in range(2))
    present = torch.arange(SLOTS) < wanted
    for k in range(1, SLOTS):  # an object that would overlap an earlier one is left out
        gap = torch.hypot(x[:, :k] - x[:, k, None], y[:, :k] - y[:, k, None]) - 0.95 * (radius[:, :k] + radius[:, k, None])
        present[:, k] &= ((gap > 0) | ~present[:, :k]).all(1)
    form, way = pick(len(SHAPES)), pick(4)
    melted = draw(0, 1) < 0.25
    return {
        "present": present,
        "x": x,
        "y": y,
        "radius": radius,
        "angle": torch.deg2rad(draw(-18, 18)),
        "colour": pick(len(COLOURS)),
        "form": form,
        "shape": torch.where(melted, UNKNOWN, form),
        "other": (form + 1 + pick(len(SHAPES) - 1)) % len(SHAPES),
        "blend": draw(0.38, 0.62) * (melted & (way == 0)),
        "bumps": draw(0.16, 0.35) * (melted & (way == 1)),
        "cut": melted & (way == 2),
        "blur": torch.where(melted & (way == 3), draw(0.45, 0.8) * radius, draw(0.6, 2.6)),
        "phase": draw(0, 2 * math.pi),
    }


# --- renderer ----------------------------------------------------------------------------------------------------------


def as_scene(layouts: list[list[Object]]) -> Scene:
    """Layouts of `scenes.lay_out` as input of `render_smooth`."""
    width = max(map(len, layouts))
    padded = [[*layout, *[Object("circle", "red", 0, 0)] * (width - len(layout))] for layout in layouts]

    def column(read: Callable[[Object], float]) -> Tensor:
        return torch.tensor([[read(o) for o in row] for row in padded])

    form = column(lambda o: SHAPES.index(o.shape))
    nothing = torch.zeros_like(form, dtype=torch.float32)
    return {
        "present": torch.arange(width) < torch.tensor([[len(layout)] for layout in layouts]),
        "x": column(lambda o: o.x),
        "y": column(lambda o: o.y),
        "radius": column(lambda o: o.radius),
        "angle": torch.deg2rad(column(lambda o: o.angle)),
        "colour": column(lambda o: list(COLOURS).index(o.colour)),
        "form": form,
        "shape": form,
        "other": form,
        "blend": nothing,
        "bumps": nothing,
        "cut": nothing.bool(),
        "blur": nothing + 1.2,
        "phase": nothing,
    }


def render_smooth(scene: Scene, rng: torch.Generator) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]: distance-based edges, jittered colours, a faint gradient on the ground, noise of up to 0.05."""
    count, slots = scene["x"].shape
    noise = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    cells = (torch.arange(SIZE) + 0.5).expand(count, SIZE, SIZE)
    slope = noise(2, count, 1, 1, 1) * 0.02
    ramp = (cells / SIZE - 0.5)[:, None]
    image = torch.tensor(GROUND)[:, None, None] / 255 + noise(count, 3, 1, 1) * 0.02 + slope[0] * ramp + slope[1] * ramp.mT
    palette = torch.tensor(list(COLOURS.values())) / 255
    for k in range(slots):
        own = {name: value[:, k] for name, value in scene.items()}
        at = [value.reshape(-1, 1, 1) for value in (own["x"], own["y"], own["radius"], own["angle"])]
        u, v = (cells - at[0]) / at[2], (cells.mT - at[1]) / at[2]
        cosine, sine = at[3].cos(), at[3].sin()
        distance = _distance(own, cosine * u + sine * v, cosine * v - sine * u) * at[2]
        cover = torch.sigmoid(-4 * distance / own["blur"].reshape(-1, 1, 1)) * own["present"].reshape(-1, 1, 1)
        colour = palette[own["colour"]] + noise(count, 3) * 0.04
        image = image + cover[:, None] * (colour[:, :, None, None] - image)
    strength = 0.05 * torch.rand(count, 1, 1, 1, generator=rng)
    return (image + strength * noise(*image.shape)).clamp(0, 1)


def _distance(own: Scene, u: Tensor, v: Tensor) -> Tensor:
    """(N, H, W) signed distance to each object in units of its radius, negative inside; melting included."""
    every = _distances(u, v)
    pick = lambda name: every.gather(0, own[name].reshape(1, -1, 1, 1).expand(1, *u.shape))[0]  # noqa: E731
    blend, bumps = own["blend"].reshape(-1, 1, 1), own["bumps"].reshape(-1, 1, 1)
    turn = torch.atan2(v, u) + own["phase"].reshape(-1, 1, 1)
    distance = pick("form") * (1 - blend) + pick("other") * blend
    distance = distance + bumps * (torch.sin(2 * turn) + 0.7 * torch.sin(5 * turn) * (u.square() + v.square()).clamp(max=1))
    half = torch.cos(own["phase"]).reshape(-1, 1, 1) * u + torch.sin(own["phase"]).reshape(-1, 1, 1) * v
    return torch.where(own["cut"].reshape(-1, 1, 1), torch.maximum(distance, half), distance)


def _distances(u: Tensor, v: Tensor) -> Tensor:
    """(6, N, H, W): signed distances of the points to the shapes of radius 1, in the order of `SHAPES`."""
    far = torch.hypot(u, v)
    bar = [_box(u, v, 0.3, 0.95), _box(u, v, 0.95, 0.3)]
    ring = torch.maximum(far - 0.92, 0.92 * 0.52 - far)
    parts = [far - 0.92, _box(u, v, 0.8, 0.8), _spikes(u, v, 3, 1.0, 0.5), torch.minimum(*bar), _spikes(u, v, 5, 1.05, 0.42), ring]
    return torch.stack(parts)


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    du, dv = u.abs() - width, v.abs() - height
    return torch.hypot(du.clamp(min=0), dv.clamp(min=0)) + torch.maximum(du, dv).clamp(max=0)


def _spikes(u: Tensor, v: Tensor, corners: int, outer: float, inner: float) -> Tensor:
    """Distance to the sides of a star with `corners` tips, the first one up; a regular polygon where `inner` lies on the sides."""
    sector = math.pi / corners
    turn = torch.remainder(torch.atan2(v, u) + math.pi / 2 + sector, 2 * sector) - sector
    far = torch.hypot(u, v)
    x, y = far * turn.cos(), far * turn.sin().abs()
    side = (inner * math.cos(sector) - outer, inner * math.sin(sector))
    return ((x - outer) * side[1] - y * side[0]) / math.hypot(*side)


# --- training ----------------------------------------------------------------------------------------------------------


def detection_loss(seen: dict[str, Tensor], scene: Scene) -> Tensor:
    """CenterNet's penalty-reduced focal loss on centres (its equation 1, α = 2, β = 4), plus shape, colour and offset at the centres."""
    x, y = scene["x"] / STRIDE, scene["y"] / STRIDE
    column, row = (value.long().clamp(0, CELLS - 1) for value in (x, y))
    cells = torch.arange(CELLS, device=x.device)
    bump = torch.exp(-((cells - column[..., None])[..., None, :] ** 2 + (cells - row[..., None])[..., :, None] ** 2) / 1.5)
    target = (bump * scene["present"][..., None, None]).amax(1)
    n, slot = scene["present"].nonzero(as_tuple=True)
    column, row, offset = column[n, slot], row[n, slot], torch.stack([x - column, y - row], -1)[n, slot]
    logits = seen["centre"][:, 0]
    hit, probability = target == 1, logits.sigmoid()
    focal = torch.where(
        hit,
        -((1 - probability) ** 2) * F.logsigmoid(logits),
        -((1 - target) ** 4) * probability**2 * F.logsigmoid(-logits),
    ).sum() / max(len(n), 1)
    at = {name: value[n, :, row, column] for name, value in seen.items()}
    shape = F.cross_entropy(at["shape"], scene["shape"][n, slot])
    colour = F.cross_entropy(at["colour"], scene["colour"][n, slot])
    offset = F.l1_loss(at["offset"], offset)
    return focal + shape + colour + offset


__all__ = ["KINDS", "as_scene", "build", "detection_loss", "random_scenes", "render_smooth"]
