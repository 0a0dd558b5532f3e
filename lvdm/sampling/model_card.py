"""The README.md of a saved pipeline: the hub's model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from odvae.utils.format import format_bytes

from ..capabilities import VideoGrid
from .offload import component_bytes

FILE = "README.md"
GENERATED = "This model card has been automatically generated"  # what diffusers says in its own, which names no model

TEMPLATE = """---
{data}
---

# {name}

A text-to-video pipeline of [diffusers](https://github.com/huggingface/diffusers).

```python
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

pipeline = DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)
frames = pipeline("a prompt").frames[0]
export_to_video(frames, "video.mp4", fps={rate:g})
```

Videos are {height}x{width} pixels at {rate:g} frames per second by default; sides are multiples of {multiple}.

The packages `odvae` and `lvdm` must be installed; `trust_remote_code` lets diffusers import the pipeline's class from
them.

| component | class | weights |
|---|---|---|
{rows}
"""


def model_card(name: str, components: Mapping[str, Any], grid: VideoGrid, folder: str = "FOLDER") -> str:
    """Return the card of a pipeline of this class, of these components, whose videos have these sizes. `folder`: where
    it is loaded from."""
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", tags=[name])
    sizes = component_bytes(components)
    rows = [f"| `{key}` | {type(part).__name__} | {format_bytes(sizes[key]) if key in sizes else ''} |"
            for key, part in components.items() if part is not None]
    return TEMPLATE.format(data=data.to_yaml(), name=name, folder=folder, rate=grid.frame_rate, height=grid.height,
                           width=grid.width, multiple=grid.size_multiple, rows="\n".join(rows))


def is_generated(card: Path) -> bool:
    """Whether a card is one that diffusers generated, not of a person."""
    return card.exists() and GENERATED in card.read_text(encoding="utf-8")
