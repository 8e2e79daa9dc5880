"""matplotlib's SVG made small and fit for a page: styles become classes and theme variables, markers are shared."""

import io
import re
from typing import Any
from xml.etree import ElementTree

from .style import ROLES

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_VARIABLES = {colour.light: f"var(--{role})" for role, colour in ROLES.items()}
_FONT = re.compile(r"(?:(bold|[1-9]00) )?([\d.]+)px (.*)")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def _short(numbers: str) -> str:
    """To a tenth of a pixel."""

    def shortened(found: "re.Match[str]") -> str:
        text = f"{float(found[0]):.1f}".removesuffix(".0")
        return "0" if text == "-0" else text

    return _NUMBER.sub(shortened, numbers)


def _path(d: str) -> str:
    """The same path in fewer letters: level and upright lines give one number."""
    parts: list[str] = []
    at = ("", "")
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", _short(d)):
        words = numbers.split()
        to = (words[-2], words[-1]) if len(words) > 1 else at
        if command == "L" and to[1] == at[1]:
            parts.append(f"H{to[0]}")
        elif command == "L" and to[0] == at[0]:
            parts.append(f"V{to[1]}")
        else:
            parts.append(command + " ".join(words))
        at = to
    return "".join(parts)


class Sheet:
    """What the charts of one page share: the classes of their styles and the shapes of their marks."""

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}
        self._shapes: dict[str, str] = {}
        self._charts = 0

    def css(self) -> str:
        return "\n".join(f".{name}{{{style}}}" for style, name in self._classes.items())

    def shapes(self) -> str:
        """An SVG that shows nothing and defines the marks."""
        paths = "".join(f'<path id="{name}" d="{d}"/>' for name, d in self._shapes.items())
        return f'<svg class="shapes" aria-hidden="true"><defs>{paths}</defs></svg>'

    def _class(self, style: str) -> str:
        parts = []
        for part in style.split(";"):
            name, _, value = (word.strip() for word in part.partition(":"))
            if name == "font":
                parts += self._font(value)
            elif name and (name, value) not in (("stroke-linejoin", "miter"), ("stroke-linecap", "butt")):
                parts.append(f"{name}:{_VARIABLES.get(value, value)}")
        text = ";".join(parts)
        return self._classes.setdefault(text, f"c{len(self._classes)}") if text else ""

    @staticmethod
    def _font(value: str) -> list[str]:
        """The page chooses the family; what is set in a fixed width stays so."""
        found = _FONT.match(value)
        assert found, value
        weight, size, family = found.groups()
        parts = [f"font-size:{_short(size)}px"]
        if weight not in (None, "400"):
            parts.append("font-weight:600")
        if "Mono" in family:
            parts.append("font-family:var(--mono)")
        return parts

    def _rename(self, element: ElementTree.Element, names: dict[str, str]) -> None:
        """Of a mark's definition: a short id for its shape, shared with every chart that has the same."""
        d = _path(element.get("d", ""))
        known = next((name for name, shape in self._shapes.items() if shape == d), None)
        name = known or f"m{len(self._shapes)}"
        self._shapes[name] = d
        names[element.get("id", "")] = name

    def _put(self, element: ElementTree.Element, names: dict[str, str]) -> str:
        tag = element.tag.removeprefix(_SVG)
        if tag in ("metadata", "style", "clipPath"):
            return ""
        if tag == "defs":
            for child in element:
                if child.tag == f"{_SVG}path":
                    self._rename(child, names)
            return ""
        inside = "".join(self._put(child, names) for child in element)
        if tag == "g":
            return inside
        attributes = self._attributes(tag, element, names)
        if tag == "text":
            inside = _escaped(element.text or "")
        if tag == "path" and not attributes.get("d"):
            return ""
        words = "".join(f' {name}="{_escaped(value)}"' for name, value in attributes.items())
        return f"<{tag}{words}>{inside}</{tag}>" if inside else f"<{tag}{words}/>"

    def _attributes(self, tag: str, element: ElementTree.Element, names: dict[str, str]) -> dict[str, str]:
        attributes: dict[str, str] = {}
        if tag == "path":
            attributes["d"] = _path(element.get("d", ""))
        if tag == "use":
            attributes["href"] = "#" + names[element.get(_LINK, "")[1:]]
        attributes |= {name: _short(element.get(name, "")) for name in ("x", "y") if element.get(name)}
        turned = element.get("transform", "")
        if tag == "text" and not re.match(r"rotate\(-?0[ .)]", turned) and turned:
            attributes["transform"] = _short(turned)
        name = self._class(element.get("style", ""))
        return attributes | ({"class": name} if name else {})

    def chart(self, figure: Any, title: str, description: str) -> str:
        """The figure as an SVG element with a title and a description for those who do not see it."""
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        root = ElementTree.fromstring(written.getvalue())
        names: dict[str, str] = {}
        for definitions in root.iter(f"{_SVG}defs"):  # a mark may be used before it is defined
            self._put(definitions, names)
        drawn = "".join(self._put(child, names) for child in root)
        self._charts += 1
        ids = f"t{self._charts}", f"d{self._charts}"
        return (
            f'<svg class="chart" viewBox="{_short(root.get("viewBox", ""))}" role="img" '
            f'aria-labelledby="{ids[0]} {ids[1]}"><title id="{ids[0]}">{_escaped(title)}</title>'
            f'<desc id="{ids[1]}">{_escaped(description)}</desc>{drawn}</svg>'
        )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
