"""The house's rules, read off the source: who imports whom, names, lengths, annotations, what is forbidden."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "families", "steering", "toybox", "demo", "rewards", "trainers")
SOURCES = {  # module name -> file
    ".".join(part for part in ("visalign", folder, file.stem) if part): file
    for folder in FOLDERS
    for file in sorted((ROOT / "visalign" / folder).glob("*.py"))
}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in SOURCES.items()}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

ANYONE = {"errors"}
DATA = {"rollout"}
MATHEMATICS = {"paths", "schedules", "transitions", "credit", "losses", "matching", "noise", "calibration", "whiteness"}
ACTING = {"policy", "sampling", "solvers", "branching", "scoring", "features", "preprocess", "judges", "monitors", "pictures", "heads"}
ACTING |= {"composite", "perturb", "reward_check", "judge_client", "questions", "weights", "qwen_pixels", "qwen_reader", "vision", "replay"}
ACTING |= {"snapshots", "backprop", "climbing", "pathwise", "shifted_noise", "pipeline_family", "video_family"}
ACTING |= {"attention", "frugal", "embeddings"}
PLUMBING = {"trainer", "config", "overrides", "registry", "prompts", "distributed", "checkpoint", "tracking", "report", "evaluation"}
PLUMBING |= {"build", "summary", "check", "axes", "explain", "charts", "comparison", "base_pictures", "patience", "rewarding"}
PLUMBING |= {"loop", "preferences", "feedback", "forward_process", "searches", "findings", "tasks", "guiding", "borrowing", "sources"}
TRAINING = {"sampling", "scoring", "features", "judges", "heads", "loop", "trainer", "config", "axes", "preferences", "feedback"}
TRAINING |= {"distributed", "questions", "backprop", "noise", "forward_process", "solvers", "policy", "references"}
TRAINING |= {"snapshots", "pathwise", "climbing", "composite", "searches", "shifted_noise"}
ACTING_FOR_REWARDS = ACTING - {"policy", "sampling", "solvers", "branching", "reward_check", "judge_client"}
REFERENCES = {"references"}
PLUMBING |= {"ledger", "skeletons", "dry_run", "planning", "plan_report"}
DOORS = {"train", "cli", "api", "drawing", "gallery", "demo"}
MAY_IMPORT = {  # group -> what of visalign its files may import, besides each other and errors
    "data": set(),
    "mathematics": DATA,
    "acting": DATA | MATHEMATICS,
    "plumbing": DATA | MATHEMATICS | ACTING,
    "families": {
        "families",
        "policy",
        "pipeline_family",
        "video_family",
        "paths",
        "preprocess",
        "schedules",
        "rollout",
        "sampling",
        "pictures",
    },
    "references": {"pictures", "preprocess", "scoring", "toybox"},
    "rewards": DATA | ACTING_FOR_REWARDS | REFERENCES | {"toybox"},
    "steering": DATA
    | MATHEMATICS
    | {"sampling", "backprop", "climbing", "scoring", "config", "policy"}
    | {"guiding", "tasks", "findings", "steering"},
    "trainers": DATA | MATHEMATICS | TRAINING | {"trainers", "steering"},
    "toybox": {"scoring", "toybox", "schedules", "judges", "questions"},
    "doors": DATA | MATHEMATICS | ACTING | PLUMBING,
    "demo": DATA | MATHEMATICS | ACTING | PLUMBING | DOORS | {"toybox"},
}
GROUPS = {"data": DATA, "mathematics": MATHEMATICS, "acting": ACTING, "plumbing": PLUMBING, "references": REFERENCES, "doors": DOORS}
HEIRS = ("families", "trainers")  # a file may build on one other of its folder
PLUG_INS = ("families", "rewards", "trainers")  # steering: trainers may build on its files


def group(module: str) -> str:
    """The group of a module: its folder, or the table's row that names it."""
    _, first, *rest = module.split(".")
    if rest:
        return first
    return next((name for name, members in GROUPS.items() if first in members), "")


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield name, node


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported, wherever in the file; `from visalign import x` is visalign.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "visalign" else [node.module or ""]


def at_module_level(tree: ast.Module) -> Iterator[str]:
    yield from imports(ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], []))


def where(name: str, node: ast.AST) -> str:
    return f"{SOURCES[name].relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def test_every_file_has_its_place() -> None:
    homeless = [name for name in TREES if name not in ("visalign.__init__", "visalign.errors") and not group(name)]
    assert not homeless, "add it to a group above, and mind what it may import"


@pytest.mark.parametrize("module", [name for name in TREES if name not in ("visalign.__init__", "visalign.errors")])
def test_imports_go_downwards(module: str) -> None:
    own = group(module)
    allowed = MAY_IMPORT[own] | GROUPS.get(own, set()) | ANYONE
    wanted = {name.split(".")[1] for name in imports(TREES[module]) if name.startswith("visalign.")}
    assert wanted <= allowed, f"{own} may not import {sorted(wanted - allowed)}"


def test_plug_ins_are_loaded_by_the_registry_alone() -> None:
    found = [
        (module, name)
        for module, tree in TREES.items()
        for name in imports(tree)
        if name.startswith(tuple(f"visalign.{p}." for p in PLUG_INS))
        and not (group(module) in HEIRS and name.startswith(f"visalign.{group(module)}."))  # a parent: the next test
    ]
    assert not found
    dynamic = {name for name, node in nodes(ast.Name) if isinstance(node, ast.Name) and node.id == "import_module"}
    assert {name for name in dynamic if "toybox" not in name} <= {"visalign.registry", "visalign.__init__"}


def test_a_trainer_or_family_builds_on_one_other_at_most() -> None:
    for module, tree in TREES.items():
        if group(module) in HEIRS:
            assert len({name for name in imports(tree) if name.startswith(f"visalign.{group(module)}.")}) <= 1, module


def test_only_plumbing_knows_accelerate() -> None:
    users = {module for module, tree in TREES.items() for name in imports(tree) if name.split(".")[0] == "accelerate"}
    assert users <= {"visalign.distributed", "visalign.trainer", "visalign.checkpoint"}


def test_model_libraries_are_imported_at_the_border_alone() -> None:
    heavy = {"diffusers", "transformers", "open_clip", "peft"}
    allowed = {name for name in TREES if group(name) == "families" or name.startswith("visalign.toybox.build_")}
    found = {(module, name) for module, tree in TREES.items() for name in at_module_level(tree) if name.split(".")[0] in heavy}
    assert {module for module, _ in found} <= allowed


def test_mathematics_knows_torch_alone() -> None:
    for module, tree in TREES.items():
        if group(module) in ("data", "mathematics"):
            outside = {name.split(".")[0] for name in imports(tree)} - set(sys.stdlib_module_names) - {"torch", "visalign"}
            assert not outside, module


def test_no_file_hides_a_module_of_python_or_of_a_dependency() -> None:
    # train.py as a script puts visalign/ first on the path; `build` is our wheel builder, which no training imports
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - {"visalign", "build"}
    names = {path.stem for path in (ROOT / "visalign").iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"}
    assert not names & taken
    assert names - {path.stem for path in SOURCES.values()} <= {*FOLDERS}, "a folder that no test looks at"


def test_functions_and_files_are_short() -> None:
    long = [
        f"{name} has {len(file.read_text().splitlines())} lines"
        for name, file in SOURCES.items()
        if len(file.read_text().splitlines()) > 300
    ]
    for name, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (node.end_lineno or 0) - node.lineno + 1 > 60:
            long.append(f"{where(name, node)} {node.name}")
    assert not long, "at most 60 lines a function, 300 a file"
    assert len((ROOT / "visalign" / "train.py").read_text().splitlines()) <= 80


def test_every_function_is_annotated() -> None:
    bare: list[str] = []
    for name, node in nodes(ast.FunctionDef):
        assert isinstance(node, ast.FunctionDef)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        open_ones = [a.arg for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls")]
        if open_ones or (node.returns is None and node.name != "__init__"):
            bare.append(f"{where(name, node)} {node.name} {open_ones}")
    assert not bare


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, tree in TREES.items() if not ast.get_docstring(tree)]
    assert not silent


def test_no_bare_squeeze_and_no_pickle() -> None:
    found: list[str] = []
    for name, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        function = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if function == "squeeze" and not node.args and not node.keywords:
            found.append(f"{where(name, node)}: squeeze() without a dimension drops a batch of one")
        if function == "load" and ast.unparse(node.func) == "torch.load" and "weights_only=True" not in ast.unparse(node):
            found.append(f"{where(name, node)}: torch.load without weights_only=True")
    found += [f"{module} imports pickle" for module, tree in TREES.items() if {"pickle", "dill", "joblib"} & set(imports(tree))]
    assert not found


def test_import_visalign_is_light() -> None:
    loaded = "print(*{'diffusers', 'transformers', 'open_clip'} & set(sys.modules))"
    code = f"import sys, visalign; {loaded}; visalign.Reward; print(visalign.score.__name__); {loaded}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:3] == ["", "score", ""]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_packaged_recipes_are_short_and_complete(path: Path) -> None:
    from visalign import config, registry
    from visalign.trainer import Trainer

    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    recipe = config.load(path)
    assert config.purpose(path.stem)
    assert path.stem in str(recipe.run.path), "recipes do not write into each other's folders"
    kind = registry.load("trainers", recipe.trainer.name)
    settings = config.validate(kind.Config, recipe.trainer.options, "trainer")
    if issubclass(kind, Trainer):
        drawn = settings.prompts * settings.group_size  # rpo trains as many of the subject's beside them
        assert drawn % min(drawn, settings.micro_batch) == 0
    registry.check_rewards(recipe.rewards | recipe.eval.rewards)
    assert config.parse(recipe.model_dump(mode="json")) == recipe, "config.yaml of a run is a recipe"
