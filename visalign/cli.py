"""The `visalign` command: train, check, evaluate, sample, score, export, demo, plan, list."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from visalign.errors import UserError


class Parser(argparse.ArgumentParser):
    """Errors are one line that names the offending word, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())} (see visalign --help)")


def parser() -> Parser:
    """Every command with its options."""
    top = Parser("visalign", description="Align image and video generators with reward models.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    recipe: dict[str, Any] = {"nargs": "*", "metavar": "[CONFIG] [key.sub=value …]", "help": "a recipe (default: toybox) and overrides"}
    commands.add_parser("train", help="train by a recipe").add_argument("words", **recipe)
    one = commands.add_parser("check", help="preflight: is this recipe's training correct?")
    one.add_argument("words", **recipe)
    one.add_argument("--rewards", type=int, metavar="N", help="also measure every reward on N pictures of the model: 64 are enough")
    one = commands.add_parser("evaluate", help="judge a recipe's base model, or a run")
    one.add_argument("source", help="a recipe or a run folder")
    one.add_argument("--reward", action="append", default=[], metavar="NAME[=WEIGHT]", help="judges (default: the recipe's eval.rewards)")
    one.add_argument("--images", type=int, help="pictures (default: the recipe's)")
    one.add_argument("--guidance", type=float)
    one.add_argument("--out", type=Path, help="write the figures as JSON here")
    one = commands.add_parser("sample", help="draw pictures, plain or guided by rewards")
    one.add_argument("texts", nargs="*", metavar="PROMPT")
    one.add_argument("--prompts", metavar="FILE", help="a .txt or .jsonl with a prompt a line, instead")
    one.add_argument("--model", default="toybox", help="toybox, a pipeline's folder or hub id, or a run folder (default: toybox)")
    one.add_argument("--reward", action="append", default=[], metavar="NAME[=WEIGHT]", help="what is searched by")
    one.add_argument("--judge", action="append", default=[], metavar="NAME[=WEIGHT]", help="scores the result, unseen by the search")
    one.add_argument("--method", default="plain", metavar="NAME", help="see `visalign list steering` (default: plain)")
    one.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method")
    one.add_argument("--budget", action="append", default=[], metavar="KEY=VALUE", help="nfe or reward_calls per picture, seconds, memory")
    one.add_argument("--n", type=int, default=1, help="pictures per prompt")
    one.add_argument("--steps", type=int, default=10, help="of the sampler")
    one.add_argument("--guidance", type=float, default=1.0, help="of classifier-free guidance; 1 is none")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--device", default="auto")
    one.add_argument("--batch", type=int, default=16, help="latents per forward; halved where memory runs out")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="pictures and scores; an interrupted command goes on there")
    one = commands.add_parser("score", help="score picture files")
    one.add_argument("files", nargs="+", metavar="FILE")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt for all files")
    what.add_argument("--prompts", help="a .txt or .jsonl with a prompt for each file, in order")
    one.add_argument("--reward", action="append", required=True, metavar="NAME[=WEIGHT]")
    one.add_argument("--checkpoint", help="weights of the rewards (default: their own)")
    one = commands.add_parser("export", help="a run as stock diffusers weights")
    one.add_argument("run", type=Path, metavar="RUN")
    one.add_argument("--out", type=Path, required=True, metavar="DIR")
    one.add_argument("--merge", action="store_true", help="the whole pipeline with the adapter merged")
    one.add_argument("--blend", metavar="RUN=SHARE", help="merge, and mix in a share of another run's weights, from 0 to 1")
    one = commands.add_parser("demo", help="a page to generate, score and look at runs, in a browser")
    offered = {"--model": "offered (default: toybox)", "--reward": "offered (default: the toybox's)", "--judge": "held out"}
    for flag, text in offered.items():
        one.add_argument(flag, action="append", default=[], metavar="NAME", help=f"{text}; may be given again")
    one.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="run folders below it are shown (default: runs)")
    one.add_argument("--device", default="auto")
    one.add_argument("--host", default="127.0.0.1", help="127.0.0.1 (default) lets this machine alone in, 0.0.0.0 everybody")
    one.add_argument("--port", type=int, help="default: the first that is free from 7860 on")
    one = commands.add_parser("list", help="what there is")
    one.add_argument("kind", nargs="?", choices=["rewards", "trainers", "families", "steering", "configs", "schema"])
    one = commands.add_parser("plan", help="memory, time and geometry of a recipe, before any weights are loaded")
    one.add_argument("words", **recipe)
    one.add_argument("--gpu", default="h100", metavar="NAME", help="by its table of GPUs (default: h100)")
    one.add_argument("--gpus", type=int, default=1, metavar="N", help="how many")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 1 for a failed check or a loss that is not finite, 2 for bad input, 130 when interrupted."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails once more as it flushes
        return 0
    except UserError as error:
        return _say(error, 2)
    except RuntimeError as error:
        from visalign.scoring import RewardError
        from visalign.trainer import NonFiniteError

        if not isinstance(error, NonFiniteError | RewardError):
            raise
        return _say(error, 2 if isinstance(error, RewardError) else 1)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on from the newest checkpoint, if there is one", 130)


def _say(what: object, code: int) -> int:
    print(f"visalign: {what}", file=sys.stderr)
    return code


def _run(words: list[str]) -> int:
    top = parser()
    if words and not words[0].startswith("-"):
        _known(words[0])
    parsed, unknown = top.parse_known_args(words)  # what a later version knows is no mistake in this one
    if hasattr(parsed, "words"):  # overrides may follow options
        parsed.words += [word for word in unknown if not word.startswith("-")]
    if strange := [word for word in unknown if word not in getattr(parsed, "words", [])]:
        top.error(f"unknown option {strange[0]}")
    if parsed.command is None:
        top.print_help()
        return 0
    return globals()[f"_{parsed.command}"](parsed)


def _known(command: str) -> None:
    from visalign.explain import nearest

    known = ["train", "check", "evaluate", "sample", "score", "export", "demo", "plan", "list"]
    if command not in known:
        raise UserError(f"no command {command!r}{nearest(command, known)}")


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """(recipe, overrides) of a command line."""
    rest = list(words)
    return (rest.pop(0) if rest and "=" not in rest[0] else "toybox"), rest


def _train(parsed: argparse.Namespace) -> int:
    from visalign import train

    return train.main(parsed.words)


def _check(parsed: argparse.Namespace) -> int:
    from visalign import check, config

    recipe, overrides = split(parsed.words)
    passed = True
    for finding in check.run(config.load(recipe, overrides), parsed.rewards):
        print(finding, flush=True)
        passed &= finding.passed
    return 0 if passed else 1


def _evaluate(parsed: argparse.Namespace) -> int:
    from visalign import build, config, evaluation, prompts
    from visalign.distributed import Processes

    if parsed.images is not None and parsed.images < 1:
        raise UserError(f"--images {parsed.images}: expected 1 or more")
    source = Path(parsed.source)
    is_run = (source / "config.yaml").is_file()
    recipe = config.load(source / "config.yaml" if is_run else source)
    processes = Processes(recipe.run.device)
    policy = build.restore(source, processes.device) if is_run else build.policy(recipe, processes.device)
    sections = _rewards(parsed.reward) or recipe.eval.rewards or recipe.rewards
    judges = build.judges(recipe, sections, policy, processes, source if is_run else None)
    drawn = prompts.load(recipe.prompts.test).evaluation(parsed.images or recipe.eval.images, recipe.prompts.balance)
    scales = (parsed.guidance, recipe.eval.guidance, recipe.policy.guidance)
    guidance = next(scale for scale in scales if scale is not None)
    steps = recipe.eval.steps or recipe.policy.steps
    found = evaluation.evaluate(policy, drawn, judges, steps=steps, guidance=guidance, seed=recipe.run.seed, batch=recipe.eval.batch)
    figures = {name: value for name, value in found.metrics.items() if name.startswith("eval/")}
    figures |= {"images": len(drawn), "steps": steps, "guidance": guidance}
    print("\n".join(f"{name.removeprefix('eval/'):<20} {value:.4g}" for name, value in figures.items()))
    if parsed.out:
        _write(parsed.out, figures)
    return 0


def _sample(parsed: argparse.Namespace) -> int:
    from visalign import gallery, overrides, prompts

    if bool(parsed.texts) == bool(parsed.prompts):
        raise UserError(
            "no prompt given; name some, or --prompts FILE" if not parsed.texts else "--prompts: give prompts or a file, not both"
        )
    listed = prompts.load(parsed.prompts) if parsed.prompts else prompts.PromptSet(parsed.texts, [{} for _ in parsed.texts])
    wanted = gallery.Wanted(
        model=parsed.model,
        rewards={name: section.model_dump() for name, section in _rewards(parsed.reward).items()},
        judges={name: section.model_dump() for name, section in _rewards(parsed.judge, "--judge").items()},
        method=parsed.method,
        options=overrides.pairs(parsed.option, "--option"),
        budget=overrides.pairs(parsed.budget, "--budget"),
        n=parsed.n,
        steps=parsed.steps,
        guidance=parsed.guidance,
        seed=parsed.seed,
    )
    print(gallery.fill(parsed.out, listed, wanted, parsed.device, parsed.batch))
    return 0


def _score(parsed: argparse.Namespace) -> int:
    from visalign import api, prompts

    texts, metadata = parsed.prompt, []
    if texts is None:
        listed = prompts.load(parsed.prompts)
        texts, metadata = listed.texts, listed.metadata
    extra = {"checkpoint": parsed.checkpoint} if parsed.checkpoint else {}
    rewards = {name: section.model_dump() | extra for name, section in _rewards(parsed.reward).items()}
    scores = api.score(parsed.files, texts, rewards, metadata)
    for n, file in enumerate(parsed.files):
        print(file + "  " + "  ".join(f"{name} {values[n]:.4f}" for name, values in scores.items()))
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from visalign import build
    from visalign.distributed import pick_device
    from visalign.policy import interpolated

    device = pick_device("cpu")
    policy = build.restore(parsed.run, device, whole=True)
    if parsed.blend:
        other, share = _blend(parsed.blend)
        policy.family.network.load_state_dict(interpolated(policy, build.restore(other, device, whole=True), share))
    kind = build.export(policy, parsed.out, parsed.merge)
    print(f"{kind} of {parsed.run} → {parsed.out}")
    return 0


def _blend(word: str) -> tuple[Path, float]:
    """`RUN=SHARE`."""
    run, _, number = word.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not run or not 0 <= share <= 1:
        raise UserError(f"--blend {word}: expected RUN=SHARE, such as runs/diverse=0.5, with a share from 0 to 1")
    return Path(run), share


def _plan(parsed: argparse.Namespace) -> int:
    from visalign import config, plan_report

    recipe, overrides = split(parsed.words)
    print(plan_report.text(config.load(recipe, overrides), parsed.gpu, parsed.gpus))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from visalign import demo

    return demo.serve(parsed.model, parsed.reward, parsed.judge, parsed.runs, parsed.device, parsed.host, parsed.port)


def _list(parsed: argparse.Namespace) -> int:
    from visalign import config, registry, sources

    if parsed.kind == "schema":
        print(json.dumps(config.schema(), indent=2))
        return 0
    for kind in [parsed.kind] if parsed.kind else ["rewards", "trainers", "families", "steering", "configs"]:
        print(f"{kind}:")
        names = config.packaged() if kind == "configs" else registry.names(kind)
        for name in names:
            text = config.purpose(name) if kind == "configs" else sources.summary(kind, name)
            print(f"  {name:<28} {text}")
    return 0


def _rewards(words: Sequence[str], flag: str = "--reward") -> dict[str, Any]:
    """`NAME[=WEIGHT]` words as reward sections."""
    from visalign.config import RewardSection, validate

    sections: dict[str, Any] = {}
    for word in words:
        name, sign, weight = word.partition("=")
        sections[name] = validate(RewardSection, {"use": name} | ({"weight": weight} if sign else {}), f"{flag} {name}")
    return sections


def _write(path: Path, figures: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main())
