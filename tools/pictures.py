"""The pictures of the pack: icon, banner, and one for each example workflow in the page's list of templates.

    python tools/pictures.py

writes ``assets/icon.svg``, ``assets/icon.png``, ``assets/banner.png`` and ``example_workflows/*.jpg`` anew. All show
blocks of a model, of which some stay on the GPU and others stream to it. Needs Pillow, which ComfyUI has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TOOLS = Path(__file__).absolute().parent
# Said here because embedded interpreters do not put a script's folder on the path.
sys.path.insert(0, str(TOOLS))

from host import PACK_ROOT  # noqa: E402

ASSETS = PACK_ROOT / "assets"
EXAMPLES = PACK_ROOT / "example_workflows"

NIGHT, PANEL, EDGE = "#10161f", "#1a2431", "#2c3b4e"
KEPT, STREAM, PALE, WHITE = "#3fb8af", "#f2a541", "#7f93a8", "#f3f6f9"
SMOOTH = 4  # Drawn this much larger and made smaller again: Pillow's shapes have hard edges.

ICON_SIZE = 400
BANNER_SIZE = (1260, 540)
CARD_SIZE = 512


@dataclass(frozen=True)
class Box:
    """A rectangle with round corners, by its left upper corner."""

    x: float
    y: float
    width: float
    height: float
    color: str
    radius: float = 0.0

    def scaled(self, by: float, dx: float = 0.0, dy: float = 0.0) -> Box:
        x, y, width, height, radius = (by * n for n in (self.x, self.y, self.width, self.height, self.radius))
        return Box(x + dx, y + dy, width, height, self.color, radius)

    @property
    def svg(self) -> str:
        size = f'width="{self.width:g}" height="{self.height:g}" rx="{self.radius:g}"'
        return f'<rect x="{self.x:g}" y="{self.y:g}" {size} fill="{self.color}"/>'


@dataclass(frozen=True)
class Words:
    """A line of text, by its left upper corner."""

    x: float
    y: float
    text: str
    size: float
    color: str = WHITE


def mark() -> Iterator[Box]:
    """The sign of the pack in 100 x 100: rows of blocks, those that stay at the right, those on the way at the left."""
    for row, (kept, on_the_way) in enumerate(((2, (0, 1)), (1, (0, 1, 2)), (2, (1,)), (1, (0, 2)))):
        y = 14 + row * 19
        for place in range(4):
            x = 9 + place * 21.5
            if place >= 4 - kept:
                yield Box(x, y, 17.5, 14, KEPT, 3)
            elif place in on_the_way:
                # The nearer to the GPU, the longer.
                width = 8 + 4.5 * place
                yield Box(x + 17.5 - width, y, width, 14, STREAM, 3)


def icon() -> list[Box]:
    return [Box(0, 0, 100, 100, NIGHT, 20), *mark()]


def picture(
    size: tuple[int, int], boxes: Sequence[Box], words: Sequence[Words] = (), back: str | None = None
) -> Image.Image:
    large = Image.new("RGBA", (size[0] * SMOOTH, size[1] * SMOOTH), back or (0, 0, 0, 0))
    draw = ImageDraw.Draw(large)
    for box in (box.scaled(SMOOTH) for box in boxes):
        corners = (box.x, box.y, box.x + box.width - 1, box.y + box.height - 1)
        draw.rounded_rectangle(corners, box.radius, fill=box.color)
    for line in words:
        font = ImageFont.load_default(line.size * SMOOTH)
        draw.text((line.x * SMOOTH, line.y * SMOOTH), line.text, fill=line.color, font=font)
    return large.resize(size, Image.Resampling.LANCZOS)


def svg(boxes: Sequence[Box]) -> str:
    shapes = "\n".join(f"  {box.svg}" for box in boxes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" width="400" height="400">\n{shapes}\n</svg>\n'
    )


def banner() -> Image.Image:
    boxes = [box.scaled(3.6, 90, 90) for box in mark()]
    words = [
        Words(510, 160, "WeightStream", 92),
        Words(514, 285, "Models larger than VRAM,", 40, PALE),
        Words(514, 337, "at nearly the speed of ones that fit", 40, PALE),
    ]
    return picture(BANNER_SIZE, boxes, words, NIGHT)


# -- one picture for each example workflow: GPUs as panels, with what stays and what streams in each -------------------


@dataclass(frozen=True)
class Gpu:
    """One GPU of a card: its name; for each row how many blocks stay there; and what else is there."""

    name: str
    rows: tuple[int, ...] = ()
    other: str = ""


CARDS: dict[str, tuple[str, tuple[Gpu, ...]]] = {
    "flux1-dev_one_small_gpu": ("FLUX.1-dev", (Gpu("gpu:0", (2, 1, 2, 1, 2)),)),
    "flux1-dev_encoder_on_gpu1": ("FLUX.1-dev", (Gpu("gpu:0", (3, 2)), Gpu("gpu:1", other="text encoder"))),
    "flux1-dev_two_gpus_parallel": ("FLUX.1-dev", (Gpu("gpu:0", (2, 3)), Gpu("gpu:1", (2, 3)))),
    "qwen-image_two_gpus": ("Qwen-Image", (Gpu("gpu:0", (3, 2)), Gpu("gpu:1", (2, 3)))),
    "wan2.2-14b_lora": ("Wan 2.2 14B + LoRA", (Gpu("gpu:0", (1, 2, 1, 1, 1)),)),
}
COLUMNS, STEP, ROW = 7, 62, 48


def card(title: str, gpus: Sequence[Gpu]) -> Image.Image:
    boxes, words = [], [Words(36, 30, title, 46)]
    height = (CARD_SIZE - 116 - 24 * len(gpus)) / len(gpus)
    for place, gpu in enumerate(gpus):
        top = 110 + place * (height + 24)
        boxes += [Box(148, top, 328, height, EDGE, 14), Box(151, top + 3, 322, height - 6, PANEL, 12)]
        words.append(Words(168, top + 12, gpu.name, 26, PALE))
        middle = top + 46 + (height - 58 - ROW * len(gpu.rows)) / 2
        for row, kept in enumerate(gpu.rows):
            boxes += _row(middle + row * ROW, kept, late=row % 2)
        if gpu.other:
            boxes.append(Box(168, top + 52, 288, height - 70, KEPT, 8))
            words.append(Words(188, top + 52 + (height - 70) / 2 - 18, gpu.other, 32, NIGHT))
    return picture((CARD_SIZE, CARD_SIZE), boxes, words, NIGHT).convert("RGB")


def _row(y: float, kept: int, late: int) -> Iterator[Box]:
    """At the right the blocks that stay, at the left those that stream; those of a late row are not as far yet."""
    for place in range(kept):
        yield Box(36 + (COLUMNS - 1 - place) * STEP, y, 50, 36, KEPT, 6)
    for place in range(COLUMNS - kept - 1 - late):
        yield Box(36 + place * STEP + late * STEP / 2, y, 44, 36, STREAM, 6)


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / "icon.svg").write_text(svg(icon()), "utf-8")
    by = ICON_SIZE / 100
    picture((ICON_SIZE, ICON_SIZE), [box.scaled(by) for box in icon()]).save(ASSETS / "icon.png", optimize=True)
    banner().convert("RGB").save(ASSETS / "banner.png", optimize=True)
    for name, (title, gpus) in CARDS.items():
        card(title, gpus).save(EXAMPLES / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
