"""Which clips a source gives: policies, buckets, places."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
import torch
from tiny_cache import SHAPE, tiny_vae, write_noise

from odvae.cache import LatentCache, build_cache
from odvae.cache.build.plan import ClipPolicy, nearest_size
from odvae.data.listing import list_entries
from odvae.data.transforms import resize_crop, to_tensor
from odvae.data.video.reader import VideoReader, count_readable, read_clip, write_video
from odvae.utils.errors import UserError

RATE = 8.0


def test_unknown_policies_are_refused() -> None:
    for wrong in ("every", "every:0", "uniform:1.5", "whole:3", "nonsense"):
        with pytest.raises(UserError, match="give back-to-back, every:SECONDS"):
            ClipPolicy.parse(wrong)


@pytest.mark.parametrize(("picture", "size"), [
    ((720, 1280), (256, 448)), ((1280, 720), (448, 256)), ((500, 500), (256, 256)), ((120, 210), (128, 224)),
    ((90, 100), (256, 256))])
def test_a_clip_takes_the_size_that_is_nearest_in_shape(picture: tuple[int, int], size: tuple[int, int]) -> None:
    assert nearest_size(*picture, [(128, 224), (256, 448), (448, 256), (256, 256)]) == size


def test_a_whole_video_is_one_clip_and_streams(tmp_path: Path) -> None:
    """Also where it is long: encoded in chunks, with the latents of the whole."""
    from odvae.cache.build import shard_encoder

    write_noise(tmp_path / "v" / "long.mp4", 0, 62)
    write_noise(tmp_path / "v" / "short.mp4", 1, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_encoder, "LONG_BYTES", 12 * 20 * 16 * 16)
        patch.setattr(shard_encoder, "CHUNK_BYTES", 7 * 16 * 16 * 3)
        build_cache(tmp_path / "v", tmp_path / "cache", tiny_vae(), clips="whole", dtype="float32", **SHAPE)
    cache = LatentCache(tmp_path / "cache")
    assert sorted(cache.buckets) == ["61x16x16", "9x16x16"]
    i = int(cache.buckets["61x16x16"][0])
    x = to_tensor(resize_crop(read_clip(tmp_path / "v/long.mp4", 0, 61, RATE), 16, 16))[None]
    with torch.inference_mode():
        assert torch.allclose(cache.entry(i), tiny_vae().encode(x).latent_dist.mean[0], atol=2e-5)
    assert cache.column("motion")[i].as_py() > 0


def test_clips_do_not_cross_scene_cuts(tmp_path: Path) -> None:
    pictures = [np.full((64, 64, 3), grey, np.uint8) for grey in (20, 230, 120)]
    for picture, ref in zip(pictures, (0, 20, 40), strict=True):
        picture[ref:ref + 20, 10:50] = (200, 30, 60)
    write_video(tmp_path / "v" / "cut.mp4", [np.stack([pictures[k // 8] for k in range(24)])], RATE)
    build_cache(tmp_path / "v", tmp_path / "cache", tiny_vae(), clips="scenes", **SHAPE)
    assert sorted(LatentCache(tmp_path / "cache").column("start").to_pylist()) == pytest.approx([0, 1, 2])
    build_cache(tmp_path / "v", tmp_path / "cache", tiny_vae(), clips="back-to-back", **SHAPE)  # one more policy
    assert set(LatentCache(tmp_path / "cache").column("start").to_pylist()) == {0, 1, 2, .625, 1.25, 1.875}


def test_what_can_be_read_of_a_file_that_is_cut_off_is_kept_on_request(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    whole = write_noise(tmp_path / "whole.mp4", 0, 40, size=(64, 64)).read_bytes()
    (tmp_path / "v/cut.mp4").write_bytes(whole[:len(whole) * 3 // 5])
    shutil.copy(write_noise(tmp_path / "short.mp4", 0, 4), tmp_path / "v/short.mp4")
    first = build_cache(tmp_path / "v", tmp_path / "cache", tiny_vae(), **SHAPE)
    assert first.done == 0 and {(entry.path, entry.kind) for entry in first.set_aside} == {
        ("cut.mp4", "truncated"), ("short.mp4", "too short")}
    assert "its 0.50 s give 4 frames" in next(e.reason for e in first.set_aside if e.kind == "too short")
    kept = build_cache(tmp_path / "v", tmp_path / "cache", tiny_vae(), keep_truncated=True, **SHAPE)
    assert 2 <= kept.done <= 5 and [entry.path for entry in kept.set_aside] == ["short.mp4"]
    readable = count_readable(tmp_path / "v/cut.mp4")
    with VideoReader(tmp_path / "v/cut.mp4", readable) as video:
        assert len(video.clip()) == readable  # to the last one
    expected = resize_crop(read_clip(tmp_path / "whole.mp4", 0, 5, RATE), 16, 16)
    cache = LatentCache(tmp_path / "cache")
    with torch.inference_mode():
        mean = tiny_vae().encode(to_tensor(expected)[None]).latent_dist.mean[0]
    assert torch.allclose(cache.entry(cache.column("start").to_pylist().index(0.0)).float(), mean, atol=4e-3)


def rows_of(cache: Path) -> dict[str, str]:
    opened = LatentCache(cache)
    return dict(zip(opened.column("path").to_pylist(), opened.captions, strict=True))


def test_the_same_clips_from_tars_and_remote_folders(tmp_path: Path) -> None:
    """A folder, WebDataset tars, a remote folder, remote tars and lists of URLs give the same latents."""
    folder = tmp_path / "v"
    for k in range(3):
        write_noise(folder / f"clip_{k}.mp4", k)
    (folder / "clip_0.txt").write_text("nought")
    build_cache(folder, tmp_path / "cache", tiny_vae(), **SHAPE)
    tar = tmp_path / "tars" / "00.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as archive:
        texts = {"clip_0.txt": b"nought", "clip_1.json": json.dumps({"caption": "one"}).encode(), "clip_2.cls": b"7"}
        for k in range(3):
            archive.add(folder / f"clip_{k}.mp4", f"clip_{k}.mp4")
        for name, data in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    # A file system of fsspec's that worker processes reach too.
    remote = (tmp_path / "remote").as_uri().replace("file://", "local://")
    shutil.copytree(folder, tmp_path / "remote")
    shutil.copytree(tar.parent, tmp_path / "remote_tars")
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(
        {"path": f"{remote}/clip_{k}.mp4", "caption": f"c{k}"}) + "\n" for k in range(3)))
    said = LatentCache(tmp_path / "cache")
    expected = {name: said.entry(i) for i, name in enumerate(said.ids)}
    for source, captions in [
            (tar.parent, {"00.tar::clip_0.mp4": "nought", "00.tar::clip_1.mp4": "one", "00.tar::clip_2.mp4": "7"}),
            (tar, {"00.tar::clip_0.mp4": "nought", "00.tar::clip_1.mp4": "one", "00.tar::clip_2.mp4": "7"}),
            (remote, {"clip_0.mp4": "nought", "clip_1.mp4": "clip 1", "clip_2.mp4": "clip 2"}),
            (f"{remote}_tars", {f"00.tar::clip_{k}.mp4": c for k, c in enumerate(("nought", "one", "7"))}),
            (tmp_path / "list.jsonl", {f"{remote}/clip_{k}.mp4": f"c{k}" for k in range(3)})]:
        cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
        summary = build_cache(source, cache, tiny_vae(), **SHAPE)
        assert summary.done == 3 and not summary.set_aside and rows_of(cache) == captions
        opened = LatentCache(cache)
        assert set(opened.ids) == expected.keys()
        assert all(opened.entry(i).equal(expected[name]) for i, name in enumerate(opened.ids))
        # What has not changed is not fetched again, and what moves is not encoded again.
        assert build_cache(source, cache, tiny_vae(), **SHAPE).reused == 3
    assert build_cache(tar, tmp_path / "cache", tiny_vae(), **SHAPE).done == 0


def test_sources_that_are_not_there() -> None:
    fsspec.filesystem("memory").pipe("/empty/notes.txt", b"")
    for source, message in (("memory://empty", "holds no videos"), ("nonsense://x", "cannot reach"),
                            ("/nowhere/at/all", "there is no folder")):
        with pytest.raises(UserError, match=message):
            list_entries(source)


def test_a_tar_that_is_cut_off_is_reported(tmp_path: Path) -> None:
    write_noise(tmp_path / "clip.mp4")
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for name in ("a.mp4", "b.mp4"):
            archive.add(tmp_path / "clip.mp4", name)
    data = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/cut.tar").write_bytes(data[:tarfile.BLOCKSIZE * 3])
    (tmp_path / "tars/good.tar").write_bytes(data)
    summary = build_cache(tmp_path / "tars", tmp_path / "cache", tiny_vae(), **SHAPE)
    assert summary.done == 1 and summary.duplicates >= 1 and summary.set_aside
    assert all("cut.tar" in entry.path for entry in summary.set_aside)


def test_rotation_and_presentation_time_reach_the_cache(tmp_path: Path) -> None:
    """A clip at 8 a second of a file at 24 holds every third picture; a rotated file falls into the upright bucket."""
    (tmp_path / "v").mkdir()
    pictures = np.random.default_rng(0).integers(0, 255, (30, 8, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(tmp_path / "v/fast.mp4"), "w") as out:
        stream = out.add_stream("libx264", 24, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 32, 64, "yuv444p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    vae = tiny_vae()
    build_cache(tmp_path / "v", tmp_path / "cache", vae, **SHAPE | {"sizes": [(32, 16), (16, 32), (16, 16)]})
    cache = LatentCache(tmp_path / "cache")
    assert sorted(cache.buckets) == ["5x32x16"]
    stored = read_clip(tmp_path / "v/fast.mp4")
    with torch.inference_mode():
        expected = vae.encode(to_tensor(resize_crop(stored[:13:3], 32, 16))[None]).latent_dist.mean[0]
    i = cache.column("start").to_pylist().index(0.0)
    assert torch.allclose(cache.entry(i).float(), expected, atol=4e-3)
