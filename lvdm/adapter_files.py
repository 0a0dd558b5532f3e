"""LoRA files: which layers they adapt, and whether a pipeline has these, by the files' headers alone, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from odvae.utils.errors import UserError

from .capabilities import PIPELINES, pipeline_kind
from .weights import DEMO_TRANSFORMER

DEFAULT_NAME = "pytorch_lora_weights.safetensors"  # in an adapter's folder
TRANSFORMERS = ("transformer", "transformer_2")  # components, whose layers' names begin with theirs in diffusers' files
MAX_HEADER = 2**22  # bytes; that of an adapter is smaller
FLOATS = ("F16", "BF16", "F32")
HALVES = {"lora_A": 0, "lora_down": 0, "lora.down": 0, "lora_B": 1, "lora_up": 1, "lora.up": 1}  # A reads, B writes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LoraFile:
    """An adapter's file or folder, the weight that its update is multiplied by, and its name ("": that of the file)."""

    path: Path
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        """Name it: peft takes the name as a module's, which has no dots."""
        object.__setattr__(self, "name", (self.name or _stem(self.path)).replace(".", "_") or "adapter")

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Parse FILE or FILE:weight. Raises UserError for a weight that is not finite."""
        path, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text))
        try:
            value = float(weight)
        except ValueError:
            return cls(Path(text))
        if not math.isfinite(value):
            raise UserError(f"--lora {text}: the weight must be a finite number")
        return cls(Path(path), value)


def _stem(path: Path) -> str:
    """A file's name, or that of the folder of a file with diffusers' default name; of a training's, the run's."""
    folder = path.parent if path.name == DEFAULT_NAME else None if path.suffix == ".safetensors" else path
    if folder is None:
        return path.stem
    return folder.absolute().parent.name if folder.name == "lora" else folder.name


@dataclass(frozen=True)
class LoraHeader:
    """What an adapter's file says of its layers.

    Attributes:
        layers: by name (outputs, inputs ...) of the weight that is adapted.
        rank: the largest.
    """

    layers: Shapes
    rank: int

    def of(self, transformer: str) -> Shapes:
        """Return the layers of one of `TRANSFORMERS`, by their names in it."""
        prefix = f"{transformer}."
        return {name.removeprefix(prefix): shape for name, shape in self.layers.items() if name.startswith(prefix)}


def read_lora_header(path: Path) -> LoraHeader | None:
    """Read the header of an adapter's file, or of the one in its folder; None if it is none."""
    file = _file(path)
    try:
        stat = file.stat()
    except OSError:
        return None
    return _lora_header(file, stat.st_mtime_ns, stat.st_size)


def lora_modified(path: Path) -> int:
    """Return when an adapter's file was written, in nanoseconds; 0 if it is gone."""
    try:
        return _file(path).stat().st_mtime_ns
    except OSError:
        return 0


def _file(path: Path) -> Path:
    return path / DEFAULT_NAME if path.is_dir() else path


@lru_cache(maxsize=4096)
def _lora_header(file: Path, changed: int, size: int) -> LoraHeader | None:
    halves: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, (_, shape) in _read_header(file, MAX_HEADER).items():
        half = next((half for half in HALVES if f".{half}." in name), None)
        if half is not None and len(shape) > 1:
            halves.setdefault(name.partition(f".{half}.")[0], {})[HALVES[half]] = shape
    pairs = {name: pair for name, pair in halves.items() if len(pair) == 2}
    if not pairs:
        return None
    layers = {name: (pair[1][0], *pair[0][1:]) for name, pair in pairs.items()}
    return LoraHeader(layers, max(pair[0][0] for pair in pairs.values()))


def _read_header(file: Path, limit: int = 2**26) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and shape of each tensor of a .safetensors file; none if it cannot be read."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: Any = json.loads(opened.read(length)) if 0 < length <= limit else {}
        return {str(name): (str(entry["dtype"]), tuple(map(int, entry["shape"])))
                for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check_adapters(files: Sequence[LoraFile], pipeline: Path | None) -> None:
    """Check that adapters can be loaded into the pipeline in a folder (None: the shipped one), all together.

    Raises:
        UserError: one cannot, which the message names; two have one name; peft is not installed.
    """
    if files:
        check_peft()
    for file in files:
        if reason := misfit(file, pipeline):
            raise UserError(f"LoRA {file.path}: {reason}")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"adapters are named after their files, and two have one name ({', '.join(names)}); rename one")


def check_peft() -> None:
    """Raise UserError unless the package that adapters need is installed."""
    if find_spec("peft") is None:
        raise UserError("a LoRA needs peft, which is not installed; pip install peft")


def misfit(file: LoraFile, pipeline: Path | None) -> str:
    """Say why an adapter cannot be loaded into a pipeline; "" if it can."""
    kind = pipeline_kind(pipeline)
    if reason := PIPELINES[kind].unsupported.get("loras"):
        return f"a {kind} takes no LoRA: {reason}"
    if not file.path.exists():
        return "there is no such file; give a .safetensors file, or its folder, and its weight as FILE:weight"
    if (header := read_lora_header(file.path)) is None:
        return "is not a LoRA in a .safetensors file, whose weights come in pairs (lora_A, lora_B)"
    folders = {"transformer": DEMO_TRANSFORMER} if pipeline is None else {
        name: pipeline / name for name in TRANSFORMERS if (pipeline / name).is_dir()}
    if header.of("transformer_2") and "transformer_2" not in folders:
        return f"is for a pipeline with two transformers, and this {kind} has one"
    first = next(iter(folders.values()), pipeline or DEMO_TRANSFORMER)  # of those that it has
    named = {name: layers for name in TRANSFORMERS if (layers := header.of(name))}
    for name, layers in named.items():
        if reason := _misfit(layers, transformer_shapes(folders.get(name, first)), kind):
            return reason
    if named:
        return ""
    if kind in ("LVDMPipeline", "OpenSoraPipeline"):
        return "holds no weights of a transformer's LoRA, whose names begin with \"transformer.\""
    # Names as the model's authors give them, which diffusers converts: only the sizes can be compared.
    weights = transformer_shapes(first)
    if weights and not set(header.layers.values()) & set(weights.values()):
        return f"is for another model than this {kind}: none of its layers has the size of one of the pipeline's"
    return ""


def _misfit(layers: Shapes, weights: Shapes, kind: str) -> str:
    if not weights:  # quantized, or in another format: left to loading
        return ""
    if missing := [name for name in layers if name not in weights]:
        return (f"is for another model than this {kind}, which has no layer {missing[0]} "
                f"({len(missing)} of its {len(layers)} layers are missing)")
    for name, shape in layers.items():
        if shape != weights[name]:
            return (f"is for another model than this {kind}: the layer {name} is {_size(shape)} there, and "
                    f"{_size(weights[name])} in the pipeline")
    return ""


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def transformer_shapes(folder: Path) -> Shapes:
    """Return the shapes of the weights in a transformer's folder by the layers' names; none if they are quantized, or
    cannot be read."""
    try:
        files = tuple((file, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors")))
    except OSError:
        return {}
    return _weight_shapes(files)


@lru_cache(maxsize=64)
def _weight_shapes(files: tuple[tuple[Path, int], ...]) -> Shapes:
    tensors = {name: entry for file, _ in files for name, entry in _read_header(file).items()}
    if any(name.endswith(".weight") and dtype not in FLOATS for name, (dtype, _) in tensors.items()):
        return {}
    return {name.removesuffix(".weight"): shape for name, (_, shape) in tensors.items() if name.endswith(".weight")}
