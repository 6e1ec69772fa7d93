"""HPSv3: a Qwen2-VL-7B that rates a picture for its prompt as a Gaussian; its mean is the score, its spread the uncertainty.

Differs from the published code: gradients to the picture by an antialiased resize that equals the processor's (the published differentiable
path is bilinear without antialiasing), and the prompt cannot smuggle in special tokens. The instruction of the training is data of the
authors and is read from a file; see `template`.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from visalign.qwen_reader import Precision, QwenReader, converted, harmless, load_template
from visalign.scoring import Reward, RewardInput, RewardOutput, RewardSpec
from visalign.weights import fetch, read_weights

TOKEN = "<|Reward|>"
AREA = 256 * 28 * 28  # pixels after scaling, at most and at least, up to whole tokens
TEMPLATE = f"""
Look at the picture and judge how well it was generated from the text below, with a number from 0 (worst) to 10 (best). Consider its visual
quality: whether it is free of errors, clear, rich in detail, beautiful and safe. Consider as well how far it follows the text: the subject,
the style, the surroundings, the attributes and the meaning as a whole.
Text - {{prompt}}

Rating of the picture: {TOKEN}
"""


def head(width: int) -> nn.Sequential:
    """State to (mean, log of the std); numbered as in the published weights, whose third layer is a dropout."""
    layers = {"0": nn.Linear(width, 1024), "1": nn.ReLU(), "3": nn.Linear(1024, 16), "4": nn.ReLU(), "5": nn.Linear(16, 2)}
    return nn.Sequential(OrderedDict(layers))


class HumanPreferenceScore3(Reward):
    """μ of N(μ, σ²), differentiable (Ma et al. 2025, arXiv 2508.03789, section 4); `uncertainty` is σ.

    The loss of the training samples the difference of two such Gaussians, so σ is in the unit of the scores. Scores are unbounded.

    Args:
        checkpoint: the default hub id, a folder or a file with the weights (`HPSv3.safetensors` or `model.safetensors`).
        base: config, tokenizer and picture processor, a folder or hub id; None means the checkpoint's folder if it has a config.json, or
            else the published one.
        template: a text file with the instruction, `{prompt}` and `<|Reward|>` once each; None means `template.txt` beside the weights.
            Without either the instruction is in our own words, with a warning, and scores are not the published ones.
        dtype: of the frozen backbone; the head computes in float32.

    Raises:
        UserError: a checkpoint, base or template that cannot be loaded or doesn't fit.
    """

    spec = RewardSpec(
        name="hps3",
        differentiable=True,
        needs=frozenset({"prompt"}),
        licence="MIT",
        model_id="MizzenAI/HPSv3",
    )
    base_id = "Qwen/Qwen2-VL-7B-Instruct"

    def __init__(self, checkpoint: str = spec.model_id, base: str | None = None, template: str | None = None, dtype: Precision = "bf16"):
        path = fetch(checkpoint, "HPSv3.safetensors", "model.safetensors")
        base = base or (str(path.parent) if path.with_name("config.json").is_file() else self.base_id)
        self.template = load_template(template, path.parent, TEMPLATE, ("{prompt}", TOKEN), "hps3")
        weights = converted(read_weights(path))
        self.reader = QwenReader(base, weights, [TOKEN], head, AREA, AREA, dtype, f"hps3's checkpoint {checkpoint!r}")

    def score(self, batch: RewardInput) -> RewardOutput:
        """(N,) float32; uncertainty (N,) is σ in the unit of the scores."""
        texts = [self.template.replace("{prompt}", harmless(prompt)) for prompt in batch.prompts]
        mean, log_std = self.reader(list(batch.images), texts)[:, 0].unbind(-1)
        return RewardOutput.of(mean, uncertainty=log_std.exp())
