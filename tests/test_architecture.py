"""The house: imports run downwards, from package to package and from folder to folder, without circles; importing a
package costs nothing; functions are short; words that were given up stay away."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top to the bottom: a folder, or a module beside the folders, imports only from lines below its own.
LAYERS = [
    "app.cli", "app.server", "app.ui app.worker", "app.api", "app.tasks", "app.inference", "app.storage", "app.config",
    "lvdm.cli", "lvdm.cli_options",
    "lvdm.demo", "lvdm.evaluation", "lvdm.training", "lvdm.convert", "lvdm.generation", "lvdm.sampling",
    "lvdm.condition", "lvdm.text", "lvdm.model", "lvdm.flow_map", "lvdm.flow lvdm.diffusion", "lvdm.adapter_files",
    "lvdm.capabilities",
    "lvdm.defaults lvdm.weights",
    "odvae.cli", "odvae.cli_options",
    "odvae.evaluate odvae.training", "odvae.losses", "odvae.cache", "odvae.inference odvae.convert",
    "odvae.metrics", "odvae.data", "odvae.model", "odvae.trainer", "odvae.utils", "odvae.weights odvae.geometry"]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}


def name_of(path: Path) -> str:
    """A file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for top in ("odvae", "lvdm", "app") for path in (ROOT / top).rglob("*.py")}


def imports(module: str) -> set[str]:
    """What a module imports, anywhere in it, for type checking too; of our own, whole module names."""
    path = MODULES[module]
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            found |= {inner if (inner := f"{name}.{alias.name}") in MODULES else name for alias in node.names}
    return found - {module}


def test_imports_run_downwards():
    for module in MODULES:
        here = ".".join(module.split(".")[:2])
        for name in imports(module) & MODULES.keys():
            there = ".".join(name.split(".")[:2])
            if here != there and here in LAYER and "." in name:
                assert LAYER[here] < LAYER[there], f"{module} imports {name}"


def test_no_import_goes_in_circles():
    graph = {module: imports(module) & MODULES.keys() for module in MODULES}
    TopologicalSorter(graph).prepare()  # CycleError names the modules


# One name for one thing; a word of this list was another name of something that has one.
RETIRED = (
    "ANYTHING Asked Bench Card Cutting Desk Door GIVEN_UP Guard LEAN Looked Making NoisedWindows Noising "
    "Nursery Office Rooms SSIM_LEAST SetAside Site Watched Workers about_job as_damage as_failure "
    "begins_anew bury_the_dead captions_in command_line config_of decode_piece disfavour encode_piece "
    "giving_back glimpse glimpses handed_over jobs_in joined_column keep_stopped kind_of_run lean "
    "lines_done may_pass of_sets open_place other_parts pieces presence quitting read_beginning read_list "
    "read_made_by rung rungs seconds_a_second seen_pairs signature_of source_of still_counts told "
    "told_file turns_of unfavour whole_groups work_for ")


def test_words_that_were_given_up_stay_away():
    pattern = re.compile(rf"\b({'|'.join(RETIRED.split())})\b")
    for path in [*MODULES.values(), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        assert not (found := pattern.search(path.read_text())), f"{path}: {found[0]}"


# Where a long function reads well: arguments of a command, and what stands on a page.
LAYOUTS = ("app.api.routes", "app.ui.form_fields", "app.ui.tabs", "odvae.cache.cli", "odvae.cli")
BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.Match)


def depth(node: ast.AST) -> int:
    """How deeply ifs, loops and tries lie in one another; `elif` goes no deeper, nor does a function of its own."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
            deepest = max(deepest, depth(child) + (isinstance(child, BRANCHES) and not is_elif))
    return deepest


def test_modules_are_short_and_functions_fit_on_a_screen_and_are_not_deeply_nested():
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 300, module
        for node in ast.walk(ast.parse(path.read_text())):
            name = f"{module}.{getattr(node, 'name', '')}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60 or module.startswith(LAYOUTS), f"{name} has {lines} lines"
                assert depth(node) <= 3, f"{name} is nested {depth(node)} deep"


def test_gradio_stays_in_the_ui():
    for module in MODULES:
        if not module.startswith(("app.ui", "app.server")):
            assert not any(name.split(".")[0] == "gradio" for name in imports(module)), module


def test_importing_the_packages_loads_no_torch():
    code = "import sys, odvae, lvdm, app; sys.exit('torch' in sys.modules or 'gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_commands_of_the_vae_import_little_of_diffusers():
    """All its autoencoders, its transformers and peft come with one another, and take longer than torch itself."""
    code = "import sys, odvae.inference.codec, odvae.cache.build.builder; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"diffusers.models.transformers", "peft", "scipy"} & set(done.stdout.split())


# What `--help` imports beside Python's own library, and how many modules in all: so it is there within a second.
PYDANTIC = {"annotated_types", "cython_runtime", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection",
            "yaml"}


@pytest.mark.parametrize(("package", "allowed", "most"), [
    ("odvae", {"tqdm"}, 150), ("lvdm", {"tqdm"}, 150), ("app", {"tqdm", *PYDANTIC}, 280)])
def test_help_imports_next_to_nothing(package, allowed, most):
    code = (f"import atexit, runpy, sys; before = set(sys.modules); sys.argv[1:] = ['--help']; "
            f"atexit.register(lambda: print(*(set(sys.modules) - before), file=sys.stderr)); "
            f"runpy.run_module({package!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    modules = done.stderr.split()
    others = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"odvae", "lvdm", "app"}
    assert {name for name in others if not name.startswith("_")} <= allowed
    assert len(modules) <= most
