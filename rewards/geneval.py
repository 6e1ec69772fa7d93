"""GenEval: does the picture hold the objects, numbers, colours and positions that its metadata asks for?

Ghosh et al. 2023, arXiv:2310.11513. The official verifier needs mmdet 2 and torch 2.1. This one runs the same detector and colour
classifier on transformers, at the official input size, and applies the same rules to what they find. Differences from the published code:
masks come from our own post-processing (transformers' own squeezes every picture to 384 x 384); the dense RL reward (Flow-GRPO,
arXiv:2505.05470) counts a position as 1 or 0 (the released server adds a 1 even after a failure) and is never negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.errors import UserError
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# The 80 COCO classes in the order of the detector's outputs, spelled as GenEval spells them.
_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,"
    "horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,"
    "orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,"
    "computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_NAMES.split(","))
FORMS: tuple[str, ...] = ("official", "strict", "dense")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Attributes:
        label: one of CLASSES.
        score: confidence in [0, 1].
        box: left, top, right, bottom in pixels; right and bottom are exclusive.
        mask: (H, W) bool; None for hand-made detections.
        color: one of COLORS, where a clause asks for it.
    """

    label: str
    score: float
    box: Box
    mask: Tensor | None = None
    color: str | None = None


def select(detections: Sequence[Detection], confidence: float, max_objects: int = 16) -> list[Detection]:
    """Those above the confidence, the surest first, at most `max_objects` of a class. Nothing is suppressed for overlapping."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > confidence and sum(d.label == detection.label for d in kept) < max_objects:
            kept.append(detection)
    return kept


def relations(box: Box, other: Box, margin: float = 0.1) -> set[str]:
    """Where `box` lies seen from `other`, a subset of RELATIONS.

    The offset of the centres is shrunk by `margin` x (sum of the sizes) along each axis, not below zero, and divided by its length before
    shrinking; beyond ±0.5 along an axis, the relation holds (GenEval, appendix on spatial position).
    """
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - margin * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    dx, dy = (s / math.hypot(*offset) for s in shrunk)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}


def official(detections: Sequence[Detection], metadata: dict[str, Any], margin: float = 0.1) -> bool:
    """GenEval's binary score of one picture.

    Every clause of `include` finds at least its count; the surest `count` objects all have the colour and the position (towards all
    objects of the earlier clause); no clause of `exclude` finds its count.

    Args:
        detections: selected (see `select`), with colours where `metadata` asks for them; order does not matter.
        metadata: `include` [{class, count, color?, position? [relation, clause]}] and `exclude` [{class, count}].
    """
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        found = _of_class(detections, clause)[: clause["count"]]
        complete = len(found) == clause["count"] and all(d.color == clause.get("color", d.color) for d in found)
        matched.append(found if complete and _placed(found, clause, matched, margin) else None)
    return None not in matched and not _excluded(detections, metadata)


def dense(detections: Sequence[Detection], metadata: dict[str, Any], margin: float = 0.1) -> tuple[float, bool]:
    """Partial credit in [0, 1] of one picture, and whether it is strictly right; arguments as of `official`.

    Per clause of `include`: max(0, 1 - |count - found| / count); then, if it asks for a colour or a position, 0 where the count is off,
    else 1 - |count - painted| / count for the colour and, all colours being right, 1 or 0 for the position. The credit is the mean of all
    these; `exclude` has no part in it. Strictly right: exact counts, colours and positions, and nothing excluded.
    """
    credit: list[float] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        count, found = clause["count"], _of_class(detections, clause)
        credit.append(max(0.0, 1 - abs(count - len(found)) / count))
        right = len(found) == count
        if not right and ("color" in clause or "position" in clause):
            credit.append(0.0)
        if right and "color" in clause:
            painted = sum(d.color == clause["color"] for d in found)
            credit.append(painted / count)
            right = painted == count
        if right and "position" in clause:
            right = _placed(found, clause, matched, margin)
            credit.append(float(right))
        matched.append(found if right else None)
    return sum(credit) / len(credit), None not in matched and not _excluded(detections, metadata)


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raise UserError unless every clause can be verified."""
    for index, clause in enumerate(metadata["include"] + metadata.get("exclude", [])):
        where = f"geneval metadata of {metadata.get('prompt', '?')!r}: clause {index}"
        if clause.get("class") not in CLASSES:
            raise UserError(f"{where} has class {clause.get('class')!r}, want a COCO class in GenEval's spelling, e.g. 'computer mouse'")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise UserError(f"{where} has count {clause.get('count')!r}, want a whole number from 1")
        if "color" in clause and clause["color"] not in COLORS:
            raise UserError(f"{where} has color {clause['color']!r}, want one of {', '.join(COLORS)}")
        position = clause.get("position", ())
        if position and (len(position) != 2 or position[0] not in RELATIONS or position[1] not in range(index)):
            raise UserError(f"{where} has position {position}, want [one of {RELATIONS}, number of an earlier clause]")


def _of_class(detections: Sequence[Detection], clause: dict[str, Any]) -> list[Detection]:
    return sorted((d for d in detections if d.label == clause["class"]), key=lambda d: -d.score)


def _placed(found: list[Detection], clause: dict[str, Any], matched: list[list[Detection] | None], margin: float) -> bool:
    """Every found object has the asked relation to every object of the target clause, which must have matched itself."""
    if "position" not in clause:
        return True
    relation, target = clause["position"]
    others = matched[target]
    return others is not None and all(relation in relations(d.box, other.box, margin) for d in found for other in others)


def _excluded(detections: Sequence[Detection], metadata: dict[str, Any]) -> bool:
    return any(len(_of_class(detections, clause)) >= clause["count"] for clause in metadata.get("exclude", []))


def instances(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], confidence: float) -> list[Detection]:
    """The instances that one picture's queries stand for.

    Args:
        class_logits: (Q, 81), the last one "no object".
        mask_logits: (Q, h, w).
        size: height and width of the picture.
        confidence: least class probability x mean foreground probability within the mask (Mask2Former, arXiv:2112.01527, section 4).
    """
    probability = class_logits.softmax(-1)[:, :-1]
    queries, labels = (probability > confidence).nonzero(as_tuple=True)  # the mask factor is at most 1: the others cannot pass
    if not len(queries):
        return []
    logits = F.interpolate(mask_logits[queries].unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    quality = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    scores = probability[queries, labels] * quality  # 0 for an empty mask
    found = []
    for score, label, mask in zip(scores.tolist(), labels.tolist(), masks, strict=True):
        if score > confidence:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.append(Detection(CLASSES[label], score, box, mask))
    return found


class GenEval(Reward):
    """GenEval's verifier as a reward; samples without `include` in their metadata are invalid.

    Args:
        checkpoint: folder or hub id of a Mask2Former that segments the 80 COCO classes.
        color_checkpoint: folder or hub id of a CLIP with its processor, for zero-shot colours.
        form: the component that is the score: "dense" (partial credit), "strict" (exact counts) or "official" (the benchmark's).
        confidence, counting_confidence: a detection counts above it; the second one for prompts with the tag "counting".
        max_objects, margin: see `select` and `relations`.
        short_side: pixels of the shorter side the detector sees; the longer one is at most 5/3 of it.
        batch_size: most pictures the detector sees at once.

    Components, each (N,): official, strict, dense.
    """

    def __init__(
        self,
        checkpoint: str = "facebook/mask2former-swin-small-coco-instance",
        color_checkpoint: str = "openai/clip-vit-large-patch14",
        form: Literal["strict", "dense", "official"] = "dense",
        confidence: float = 0.3,
        counting_confidence: float = 0.9,
        max_objects: int = 16,
        margin: float = 0.1,
        short_side: int = 800,
        batch_size: int = 8,
    ):
        if form not in FORMS:
            raise UserError(f"geneval: form is {form!r}, want one of {', '.join(FORMS)}")
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        self.spec = RewardSpec("geneval", needs=frozenset({"metadata:include"}), range=(0.0, 1.0), licence="see card", model_id=checkpoint)
        self.form, self.max_objects, self.margin, self.short_side, self.batch_size = form, max_objects, margin, short_side, batch_size
        self.confidence, self.counting_confidence = confidence, counting_confidence
        self.processor = _load(AutoImageProcessor, checkpoint)
        self.detector = _load(Mask2FormerForUniversalSegmentation, checkpoint).eval().requires_grad_(False)
        if self.detector.config.num_labels != len(CLASSES):
            raise UserError(f"geneval: {checkpoint} knows {self.detector.config.num_labels} classes, want the {len(CLASSES)} of COCO")
        self.color_processor = _load(AutoImageProcessor, color_checkpoint)
        self.tokenizer = _load(AutoTokenizer, color_checkpoint)
        self.clip = _load(CLIPModel, color_checkpoint).eval().requires_grad_(False)
        self._color_texts: dict[str, Tensor] = {}

    def prepare(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        for record in metadata:
            if record.get("include"):
                check_metadata(record)
                for name in {clause["class"] for clause in record["include"] if "color" in clause}:
                    self._color_features(name)

    @torch.no_grad()
    def score(self, batch: RewardInput) -> RewardOutput:
        """Scores in [0, 1]; NaN without `include` in the metadata or for a picture with non-finite pixels."""
        table = torch.full((len(batch), 3), math.nan)  # a column for each of FORMS
        finite = batch.images.flatten(1).isfinite().all(1).tolist()
        rows = [n for n, record in enumerate(batch.metadata) if record.get("include") and finite[n]]
        for n in rows:
            check_metadata(batch.metadata[n])
        pictures = (batch.images[rows].clamp(0, 1) * 255).round().to(torch.uint8).to(self.detector.device)
        for n, picture, detections in zip(rows, pictures, self.detect(pictures), strict=True):
            record = batch.metadata[n]
            least = self.counting_confidence if record.get("tag") == "counting" else self.confidence
            kept = self._colored(picture, select(detections, least, self.max_objects), record)
            credit, strict = dense(kept, record, self.margin)
            table[n] = torch.tensor([float(official(kept, record, self.margin)), float(strict), credit])
        components = dict(zip(FORMS, table.to(batch.images.device).unbind(1), strict=True))
        return RewardOutput.of(components[self.form], components=components)

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """Objects of every picture above the lower confidence. images: (N, 3, H, W) uint8."""
        size = {"shortest_edge": self.short_side, "longest_edge": self.short_side * 5 // 3}
        least = min(self.confidence, self.counting_confidence)
        found: list[list[Detection]] = []
        for part in images.split(self.batch_size) if len(images) else ():
            output = self.detector(**self.processor(images=list(part), size=size, return_tensors="pt").to(self.detector.device))
            pairs = zip(output.class_queries_logits.float(), output.masks_queries_logits.float(), strict=True)
            found += [instances(classes, masks, (images.shape[2], images.shape[3]), least) for classes, masks in pairs]
        return found

    def _colored(self, picture: Tensor, detections: list[Detection], metadata: dict[str, Any]) -> list[Detection]:
        """The detections, with colours for the surest `count` of every clause that asks for one."""
        for clause in metadata["include"]:
            if "color" in clause and (wanted := _of_class(detections, clause)[: clause["count"]]):
                rest = [d for d in detections if all(d is not other for other in wanted)]
                colors = self.colors(picture, wanted)
                detections = rest + [replace(d, color=color) for d, color in zip(wanted, colors, strict=True)]
        return detections

    def colors(self, picture: Tensor, objects: list[Detection]) -> list[str]:
        """The colour of each object, all of one class: its box with the surroundings greyed. picture: (3, H, W) uint8."""
        crops = []
        for left, top, right, bottom, mask in ((*map(int, d.box), d.mask) for d in objects):
            alone = picture if mask is None else picture.where(mask, picture.new_tensor(0x99))
            crops.append(alone[:, top:bottom, left:right])
        pixels = self.color_processor(images=crops, return_tensors="pt").to(self.clip.device)
        features = F.normalize(self.clip.get_image_features(**pixels).pooler_output, dim=-1)
        best = (features @ self._color_features(objects[0].label).T).argmax(-1)
        return [COLORS[n] for n in best.tolist()]

    @torch.no_grad()
    def _color_features(self, name: str) -> Tensor:
        """(10, D) unit features of the class in each colour, mean over the templates."""
        if name not in self._color_texts:
            templates = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object")
            texts = [template.format(color) for color in COLORS for template in templates]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
            features = F.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)
            self._color_texts[name] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)
        return self._color_texts[name].to(self.clip.device)


def _load(kind: Any, checkpoint: str) -> Any:
    try:
        return kind.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"geneval: no {kind.__name__} from {checkpoint!r}; give a folder or a hub id within reach ({reason})") from error
