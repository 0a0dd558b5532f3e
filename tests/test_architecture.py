"""The house: imports run app -> lvdm -> odvae, and importing a package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {"odvae": set(), "lvdm": {"odvae"}, "app": {"odvae", "lvdm"}}
# Inside odvae: who may import whom. model and runtime know nothing of files of videos; nothing imports the commands.
ROOMS = {
    "model": {"geometry", "runtime"},
    "runtime": set(),
    "data": {"runtime"},
    "losses": {"metrics", "runtime"},
    "metrics": {"data", "runtime"},
    "cache": {"autoencoders", "data", "model", "runtime", "streaming", "weights"},
    "streaming": {"model", "runtime"},
    "inflate": {"model", "runtime"},
    "checkpoints": {"model", "runtime"},
    "stages": {"data", "losses", "runtime"},
}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth of it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
    return found


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_downwards(package):
    for path in (ROOT / package).rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in BELOW or top == package or top in BELOW[package], f"{path} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_odvae_import_only_what_lies_below(room):
    place = ROOT / "odvae" / room
    for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "odvae" and len(parts) > 1 and parts[1] != room:
                assert parts[1] in ROOMS[room], f"{path} imports {name}"


def test_gradio_stays_in_the_ui():
    for path in (ROOT / "app").rglob("*.py"):
        if path.parent.name != "ui" and path.name != "server.py":
            assert not any(name.split(".")[0] == "gradio" for name in imports(path)), path


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
    others = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - BELOW.keys()
    assert {name for name in others if not name.startswith("_")} <= allowed
    assert len(modules) <= most
