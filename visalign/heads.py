"""Small trained networks on the features of frozen encoders, as rewards load them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visalign.errors import UserError
from visalign.features import locate


class PreferenceHead(nn.Module):
    """How good a picture is for a text: a multilayer perceptron on [image, text, image ∘ text] of a dual encoder.

    Args:
        encoder: the checkpoint whose features it reads, see `visalign.features.load_dual_encoder`.
        width: of the encoder's space, D.
        hidden: units of the one hidden layer.
    """

    def __init__(self, encoder: str, width: int, hidden: int = 256):
        super().__init__()
        self.encoder, self.width, self.hidden = encoder, width, hidden
        self.layers = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(N, D) and (N, D) of unit length to (N,) log-odds."""
        scale = math.sqrt(self.width)  # entries of a unit vector are small, those of a product of two are tiny
        return self.layers(torch.cat([scale * image, scale * text, scale * scale * image * text], -1))[:, 0]

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        encoder = self.encoder if self.encoder.startswith("toybox") else locate(self.encoder)  # a relative path means nothing elsewhere
        config = {"kind": "preference_head", "encoder": encoder, "width": self.width, "hidden": self.hidden}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str) -> PreferenceHead:
        """The head that `save` wrote, frozen.

        Raises:
            UserError: the folder has none.
        """
        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            head = cls(config["encoder"], config["width"], config["hidden"])
            head.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{folder} holds no preference head ({reason}); give RUN/reward of a reward_model run with kind=head") from None
        return head.eval().requires_grad_(False)
