"""Qwen-Image-Edit and its Plus (2509): what loads as `QwenImageEditPipeline` or `QwenImageEditPlusPipeline`. Prompts bring a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from torch import Tensor

from visalign.errors import UserError
from visalign.families.qwen_image import QwenImage
from visalign.pictures import to_image

SHOWN = 1024 * 1024  # pixels in which the stock pipelines show the model a picture, whatever its own size
READ = 384 * 384  # and in which the Plus pipeline shows it to the text encoder


class QwenImageEdit(QwenImage):
    """Args: those of `visalign.families.qwen_image`; but prompts are not cut. Pictures of one call need one ratio of width to height; the
    Plus pipeline, which can take several for one prompt, is given one."""

    pipeline_classes = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    needs_picture = True

    def embed(self, texts: list[str], pictures: Sequence[Any]) -> dict[str, Tensor]:
        pixels = [self.pipeline.image_processor.preprocess(image).to(self.pipeline.vae.device) for image in self._resized(pictures, SHOWN)]
        return super().embed(texts, self._read(pictures)) | {"picture": torch.cat([self.encoded(image) for image in pixels])}

    def unconditional(self, pictures: Sequence[Any]) -> dict[str, Tensor] | None:
        return super().embed([self.negative_prompt] * len(pictures), self._read(pictures))  # the text encoder sees the picture, too

    def tokens(self, text: str, picture: Any) -> Tensor:
        return self.pipeline.encode_prompt(text, image=picture, device=self.pipeline.text_encoder.device)[0][0]

    def _read(self, pictures: Sequence[Any]) -> list[Any]:
        """Condition pictures as the text encoder sees them."""
        return self._resized(pictures, READ if type(self.pipeline).__name__ == "QwenImageEditPlusPipeline" else SHOWN)

    def _resized(self, pictures: Sequence[Any], area: int) -> list[Any]:
        """Condition pictures in so many pixels, as the stock pipeline scales them.

        Raises:
            UserError: they end up in different sizes.
        """
        images = [to_image(self.opened(picture)) for picture in pictures]
        sizes = [calculate_dimensions(area, image.width / image.height)[1::-1] for image in images]
        if len(set(sizes)) > 1:
            own = ", ".join(sorted({f"{image.width}x{image.height}" for image in images}))
            raise UserError(f"pictures to edit of {own}: one call needs one ratio of width to height; crop them alike")
        return [self.pipeline.image_processor.resize(image, *sizes[0]) for image in images]

    def seen(self, x: Tensor, condition: dict[str, Tensor]) -> list[Tensor]:
        return [x, condition["picture"]]

    def call(self, texts: Sequence[str], guidance: float, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().call(texts, guidance, metadata) | {"image": to_image(self.opened(metadata[0]["condition"]))}

    def stock(self, texts: Sequence[str], noise: Tensor, steps: int, guidance: float, metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        one_by_one = (([texts[n]], noise[n : n + 1], steps, guidance, [metadata[n]]) for n in range(len(texts)))
        return torch.cat([super(QwenImageEdit, self).stock(*each) for each in one_by_one])  # it scales no picture of a list
