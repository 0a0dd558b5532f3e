"""The packages as a whole: versions, shipped configs, package data, docs and their snippets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import app
import lvdm
import odvae
from odvae.utils.config import find_config, load_config, shipped_configs
from odvae.utils.errors import UserError

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> str:
    """Run a module of ours in `cwd`; return its stdout."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout


@pytest.mark.parametrize(("module", "program"), [("odvae", "odvae"), ("lvdm", "lvdm"), ("app", "lvdm-app")])
def test_version_option_prints_the_one_version(module, program):
    assert run(module, "--version") == f"{program} {odvae.__version__}\n"
    assert app.__version__ == lvdm.__version__ == odvae.__version__


def test_configs_command_lists_each_config_on_a_line(tmp_path):
    lines = run("odvae", "configs", cwd=tmp_path).splitlines()
    assert len(lines) == len(list(ROOT.glob("configs/**/*.yaml")))
    assert any(line.startswith("lvdm train demo.yaml ") and "17-frame windows" in line for line in lines)
    assert all(line.endswith(".") for line in lines)  # the first comment line of each config is a sentence


@pytest.mark.parametrize("package", ["odvae", "lvdm", "app"])
def test_shipped_configs_are_valid(package):
    from app.config import AppConfig
    from lvdm.training.train import TrainConfig as LVDMConfig
    from odvae.training.distill import DistillConfig
    from odvae.training.train import TrainConfig as VAEConfig

    schemas = {"odvae": VAEConfig, "lvdm": LVDMConfig, "app": AppConfig}
    for path in shipped_configs(package):
        load_config(DistillConfig if path.name.startswith("distill") else schemas[package], path.name)


def test_a_config_is_found_by_name_after_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("demo.yaml", "lvdm") == ROOT / "configs/lvdm/demo.yaml"
    assert find_config("ucf101.yaml", "lvdm") == ROOT / "configs/recipes/lvdm/ucf101.yaml"
    assert find_config("other/demo.yaml", "lvdm") == Path("other/demo.yaml")  # only bare names
    Path("demo.yaml").touch()
    assert find_config("demo.yaml", "lvdm") == Path("demo.yaml")


def test_a_missing_config_is_reported_by_name(tmp_path, monkeypatch):
    from app.config import AppConfig

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot read the config nowhere\.yaml"):
        load_config(AppConfig, "nowhere.yaml")


def test_a_wheel_contains_all_data_files():
    """Every kind of file beside the modules is one of the package data's patterns."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("odvae", "lvdm", "app"):
        packed = {path for pattern in [*patterns["*"], *patterns.get(package, [])]
                  for path in (ROOT / package).glob(pattern)}
        others = {path for path in (ROOT / package).rglob("*")
                  if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != ".DS_Store"}
        assert others == packed


def test_the_tree_in_the_docs_names_every_module():
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    named, above = set(), [""] * 9
    for line in filter(str.strip, tree.splitlines()):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above[depth + 1] = above[depth] + name
        named.add(above[depth + 1])
    modules = {str(path.relative_to(ROOT)) for package in ("odvae", "lvdm", "app") for path in
               (ROOT / package).rglob("*.py") if not path.name.startswith("__")}
    folders = ("app/ui/html/", "app/ui/tabs/")  # named without their modules
    python = {name for name in named if name.endswith(".py")}
    assert {name for name in modules if not name.startswith(folders)} == python
    assert all((ROOT / name).exists() for name in named - {"app/ui/templates/"})


SNIPPETS = [pytest.param(snippet, id=f"{name}-{i}") for name in ("README.md", "docs/generate.md") for i, snippet in
            enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE))]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    exec(compile(snippet, "snippet", "exec"), {})


def test_links_in_the_docs_are_valid():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
