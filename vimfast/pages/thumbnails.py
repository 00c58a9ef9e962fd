"""Images, small enough to lie inside a page."""

from __future__ import annotations

import io

from PIL import Image

SIDE = 160  # pixels, of the longer side: sharp on screens of two pixels a point
_SMALL = 64  # an image of fewer pixels is enlarged, so that its own pixels show


def thumbnail(encoded: bytes) -> bytes | None:
    """A JPEG of the image whose longer side is `SIDE` pixels; None if these bytes cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG is decoded at a fraction of its size
            shown = image.convert("RGB")
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise nearly anything on garbage
        return None
    scale = SIDE / max(shown.size)
    size = max(1, round(shown.width * scale)), max(1, round(shown.height * scale))
    enlarged = max(shown.size) < _SMALL
    shown = shown.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=82)
    return out.getvalue()
