"""What a build says of itself: its report, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_cache import SHAPE, tiny_vae

from odvae.cache import build_cache
from odvae.cli import main


def test_a_report_is_written_and_too_many_rejects_are_an_error(source: Path, tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    for name in ("bad", "worse"):
        (source / f"{name}.mp4").write_text("no video")
    (source / "notes.md").touch()
    build = ["cache", "build", str(source), str(tmp_path / "cache"), "--frames", "5", "--size", "16", "16", "--workers",
             "1", "--vae", str(tmp_path / "vae"), "--max-rejects"]
    assert main([*build, "1"]) == 3 and "2 files and clips were set aside, more than --max-rejects 1" in (
        capsys.readouterr().err)
    report = json.loads((tmp_path / "cache/build-report.json").read_text())
    assert (report["files"], report["encoded"], report["reused"], report["frames"]) == (9, 7, 0, 35)
    assert sum(report["rejects"].values()) == 2 and report["left_out"] == {".md": 1}
    sizes = [path.stat().st_size for path in source.glob("*.mp4")]
    assert sum(sizes) <= report["bytes_read"] <= 2 * sum(sizes) and report["bytes_fetched"] == 0
    shards = (tmp_path / "cache").rglob("*.safetensors")
    assert report["bytes_written"] == sum(path.stat().st_size for path in shards)
    assert report["seconds_by_stage"]["decode"] > 0 < report["share_encoding"] <= 1
    assert main([*build, "2"]) == 0
    again = json.loads((tmp_path / "cache/build-report.json").read_text())
    assert (again["encoded"], again["reused"], again["bytes_read"]) == (0, 7, 0)


def test_each_part_has_a_report(source: Path, tmp_path: Path) -> None:
    for part in ((1, 2), (2, 2)):
        build_cache(source, tmp_path / "cache", tiny_vae(), partitions=4, part=part, **SHAPE)
    reports = [json.loads((tmp_path / f"cache/build-report-{i}-of-2.json").read_text()) for i in (1, 2)]
    assert sum(report["encoded"] for report in reports) == 7 == sum(report["files"] for report in reports)
