"""A matplotlib figure as a part of an HTML page: texts stay texts, and nothing in it points out of the page."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from . import plot

TAGS = {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect"}
"""What a figure may be made of."""
_LINE_STYLE = {"stroke-linejoin": "round", "stroke-linecap": "butt"}
"""What matplotlib says in a style sheet, which would hold for the whole page."""
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def inline(figure: Any, *, name: str, salt: str) -> Markup:
    """An `<svg>` element as wide as its box.

    Args:
        figure: of matplotlib.
        name: what a screen reader says.
        salt: makes the ids of this figure differ from those of the page's others.
    """
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}), plot.drawing():
        figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(_NO_XML.sub("", text.getvalue()))
    _strip(root)
    for element in root.iter():
        _simplify(element)
    box = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": _NO_XML.sub("", name)}
    root.attrib.clear()
    root.attrib.update(box | _LINE_STYLE)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _strip(element: ElementTree.Element) -> None:
    """Takes out what a page does not need: metadata with addresses, and the style sheet."""
    for child in list(element):
        if _local(child.tag) in ("metadata", "style"):
            element.remove(child)
        else:
            _strip(child)


def _simplify(element: ElementTree.Element) -> None:
    """Names without namespaces, ids where they are used, fonts of the page."""
    element.tag = _local(element.tag)
    if element.tag not in TAGS:
        raise ValueError(f"svg: a figure holds <{element.tag}>, expected one of {', '.join(sorted(TAGS))}.")
    known = {_local(name): value for name, value in element.attrib.items()}
    if element.tag == "g":
        known.pop("id", None)
    if "style" in known:
        known["style"] = re.sub(r"font: ([\d.]+px) [^;]+", r"font-size: \1", known["style"])
        known["style"] = re.sub(r"font-family: [^;]+;? ?", "", known["style"])
    element.attrib.clear()
    element.attrib.update(known)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
