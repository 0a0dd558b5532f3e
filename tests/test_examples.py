"""The job files in examples/ are valid, and give every part of a build to one task."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from odvae.cli import parser

CLUSTER = Path(__file__).parents[1] / "examples/cluster"


def shell_words(script: str, arguments: list[str], tmp_path: Path, **variables: str) -> list[str]:
    """Return the arguments that a script gives to `odvae`."""
    program = tmp_path / "odvae"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(["sh", "-ec", script, "job", *arguments], capture_output=True, text=True, check=True,
                          env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables})
    return done.stdout.splitlines()


def parts(commands: list[list[str]]) -> set[tuple[int, int]]:
    parsed: list[Any] = [parser().parse_args(command) for command in commands]
    assert all(args.partitions % args.part[1] == 0 for args in parsed)
    return {args.part for args in parsed}


def test_the_slurm_job_builds_every_part(tmp_path: Path) -> None:
    script = (CLUSTER / "slurm.sh").read_text()
    [array] = [line for line in script.splitlines() if line.startswith("#SBATCH --array=")]
    first, last = map(int, array.partition("=")[2].split("-"))
    commands = [shell_words(script, ["videos", "cache"], tmp_path, SLURM_ARRAY_TASK_ID=str(task))
                for task in range(first, last + 1)]
    assert commands[0][:4] == ["cache", "build", "videos", "cache"]
    assert parts(commands) == {(i, 16) for i in range(1, 17)}


def test_the_kubernetes_job_builds_every_part(tmp_path: Path) -> None:
    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())["spec"]
    [container] = job["template"]["spec"]["containers"]
    [script] = container["args"]
    commands = [shell_words(script, [], tmp_path, JOB_COMPLETION_INDEX=str(index))
                for index in range(job["completions"])]
    assert container["command"] == ["sh", "-c"] and job["completionMode"] == "Indexed"
    assert parts(commands) == {(i, 16) for i in range(1, 17)}


COMPRESS = (Path(__file__).parents[1] / "docs/compress.md").read_text()


@pytest.mark.parametrize("line", [line.partition("#")[0] for line in COMPRESS.splitlines()
                                  if line.startswith("    odvae cache build ")])
def test_the_builds_in_the_documentation_parse(line: str) -> None:
    words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "1"))
    assert parser().parse_args(words[1:]).action == "build"
