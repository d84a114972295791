"""Text drawn with Pillow in whatever script it is: in a font that has its letters, or as escapes, never as empty boxes.

Pillow's own font has little more than ASCII. Beyond that, fonts of the system are tried, and the one that matplotlib
brings along.
"""

from __future__ import annotations

from functools import cache, cached_property
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

# Fonts with Chinese, Japanese and Korean letters as systems name them; Pillow looks in the system's font folders.
CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "NotoSansSC-Regular.ttf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "uming.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "simsun.ttc",
    "msgothic.ttc",
    "malgun.ttf",
)
_NO_LETTER = "\U0010ffff"  # no font has it, so it shows how each draws what it does not have

Font = ImageFont.FreeTypeFont


class Lettering:
    """Measures and draws lines of text of one size.

    Args:
        size: in pixels.

    Attributes:
        escaped: whether some letter had to be written as an escape, such as \\u4e2d, for want of a font.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.escaped = False
        own = ImageFont.load_default(size)
        assert isinstance(own, Font)  # Pillow has a bitmap for those who name no size
        self._own: Font = own

    @property
    def line_height(self) -> int:
        """From one line to the next, in pixels."""
        return round(1.4 * self.size)

    def drawable(self, text: str) -> str:
        """The text on one line, with an escape for each letter that no font has."""
        flat = " ".join(text.split())
        if all(map(self._font_of, flat)):
            return flat
        self.escaped = True
        return "".join(letter if self._font_of(letter) else letter.encode("unicode_escape").decode() for letter in flat)

    def wrap(self, text: str, width: int, most: int) -> list[str]:
        """Cut drawable text into at most `most` lines of at most `width` pixels, at spaces if there are any."""
        lines = [""]
        for word in text.split(" "):
            joined = f"{lines[-1]} {word}" if lines[-1] else word
            if self.width(joined) <= width:
                lines[-1] = joined
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:  # a word that is longer than a line, or Chinese, which has no spaces
                if lines[-1] and self.width(lines[-1] + letter) > width:
                    lines.append("")
                lines[-1] += letter
                if len(lines) > most:
                    break
            if len(lines) > most:
                break
        if len(lines) > most:
            lines = lines[:most]
            while lines[-1] and self.width(lines[-1] + "…") > width:
                lines[-1] = lines[-1][:-1]
            lines[-1] += "…"
        return lines

    def width(self, text: str) -> float:
        """The width of drawable text, in pixels."""
        return sum(font.getlength(part) for font, part in self._parts(text))

    def draw(self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: str) -> None:
        """Draw one line of drawable text with its upper left corner at `place`."""
        x, y = place
        base = y + self.size  # lines of different fonts share one base line
        for font, part in self._parts(text):
            canvas.text((x, base), part, fill=colour, font=font, anchor="ls")
            x += font.getlength(part)

    def _parts(self, text: str) -> list[tuple[Font, str]]:
        """One font for the whole if one has all its letters, else a font for each run of letters."""
        for font in self._fonts_in_use(text):
            if all(letter.isspace() or _has(font, letter) for letter in text):
                return [(font, text)]
        return [(font or self._own, "".join(run)) for font, run in groupby(text, lambda letter: self._font_of(letter))]

    def _fonts_in_use(self, text: str) -> list[Font]:
        return [self._own] if text.isascii() else [self._own, *self._others]

    def _font_of(self, letter: str) -> Font | None:
        if letter.isspace() or _has(self._own, letter):
            return self._own
        return next((font for font in self._others if _has(font, letter)), None)

    @cached_property
    def _others(self) -> list[Font]:
        found: list[Font] = []
        for name in (_latin_font(), *CJK_FONTS):
            try:
                found.append(ImageFont.truetype(name, self.size))
            except OSError:
                continue  # this system does not have it
        return found


def _latin_font() -> str:
    """A font of accents, Greek, Cyrillic and more that lies in one of our own dependencies."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def _has(font: Font, letter: str) -> bool:
    """Whether a font has a letter; what it does not have it draws alike."""
    return _ink(font, letter) != _ink(font, _NO_LETTER)


@cache
def _ink(font: Font, letter: str) -> tuple[bytes, tuple[int, int]]:
    mask = font.getmask(letter)
    return bytes(mask), mask.size
