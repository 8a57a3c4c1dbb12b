"""From a chart to SVG: a file that stands alone, and a piece of an HTML page.

Rendering needs no browser and no network (vl-convert carries its own renderer).
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import vl_convert
from markupsafe import Markup

SVG = "{http://www.w3.org/2000/svg}"
ALLOWED = frozenset(
    f"{SVG}{tag}"
    for tag in ("svg", "g", "path", "rect", "line", "text", "tspan", "title", "defs", "clipPath")
)


def render(chart: Any, description: str) -> str:
    """Return the chart as an SVG document with a title for readers who cannot see it."""
    spec = chart.to_dict()
    major, minor = spec["$schema"].rsplit("/v", 1)[1].removesuffix(".json").split(".")[:2]
    text = vl_convert.vegalite_to_svg(spec, vl_version=f"{major}.{minor}", allowed_base_urls=[])
    root = ElementTree.fromstring(text)
    for element in list(root.iter()):
        _tidy_(element)
    root.set("role", "img")
    root.set("aria-label", description)
    title = ElementTree.Element(f"{SVG}title")
    title.text = description
    root.insert(0, title)
    ElementTree.register_namespace("", SVG[1:-1])
    return ElementTree.tostring(root, encoding="unicode")


def _tidy_(element: ElementTree.Element) -> None:
    """Turn a mark's description into a hover title, and drop roles that only repeat the picture."""
    assert element.tag in ALLOWED, f"the renderer wrote an element we do not know: {element.tag}"
    label = element.attrib.pop("aria-label", None)
    role = element.attrib.pop("aria-roledescription", None)
    for name in ("role", "aria-hidden", "class"):
        element.attrib.pop(name, None)
    if (
        label
        and role
        and element.tag == f"{SVG}path"
        and "axis" not in role
        and "legend" not in role
    ):
        ElementTree.SubElement(element, f"{SVG}title").text = label


def inline(svg: str, prefix: str, css_class: str) -> Markup:
    """Return an SVG document as an element of an HTML page that scales with its container.

    Args:
        svg: what `render` returned.
        prefix: put before ids inside, as a page has many SVGs.
        css_class: class of the element.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            elif value.startswith("url(#"):
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    root.attrib.pop("height", None)
    natural = root.attrib.pop("width", None)
    root.set("class", css_class)
    if natural:
        root.set("style", f"max-width:{round(float(natural))}px")
    return Markup(ElementTree.tostring(root, encoding="unicode"))
