"""What judges are asked of a picture and a prompt, and how an explanation is cut where its verdict begins."""

from __future__ import annotations

TASKS = {  # what to look at, said before the prompt
    "alignment": "Check the objects, their number, colours and positions.",
    "quality": "Check sharpness, artefacts, anatomy and composition.",
    "style": "Check the style and the medium.",
    "text": "Check the words that are written in the picture.",
}
POINT = "{task} Text: {prompt}. Does the picture show exactly this? Answer yes or no."
PAIR = "{task} Text: {prompt}. Does the second picture fit the text better than the first? Answer yes or no."
REASON = "{task} Text: {prompt}. Does the picture show exactly this? Say what is wrong, then answer yes or no."
RATE = "{task} Text: {prompt}. How well does the picture fit the text? Answer with a number from 1 to 5."
CAPTION = "Describe the picture."


def fill(template: str, prompt: str, task: str = "alignment") -> str:
    """A question about a prompt; `task` is a key of TASKS, or a sentence of one's own."""
    return template.format(task=TASKS.get(task, task), prompt=prompt.strip().rstrip(".")).strip()


def before_verdict(text: str) -> str:
    """An explanation up to the place where its verdict stands, so that the verdict's probability can be read there."""
    kept = text.strip()
    for verdict in ("yes", "no"):
        if kept.lower().rstrip(".").endswith(verdict):
            return kept[: len(kept.rstrip(".")) - len(verdict)].rstrip()
    return f"{kept}. Answer:".removeprefix(". ")
