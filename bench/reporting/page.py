"""A report's Markdown as one HTML page that needs nothing else: charts inlined, no scripts."""

import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

# Whatever a chart names, another chart on the page may name too.
IDS = re.compile(r'(\bid="|url\(#|href="#)')
PROLOGUE = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>", re.DOTALL)
SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*"(?=[^>]*viewBox)')


def page(markdown: str, pictures: Mapping[str, str], language: str) -> str:
    """The page; `pictures`: name -> SVG text of every image the Markdown shows.

    Light or dark as the reader's system is; pictures keep a white ground.
    """
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(markdown)
    name_headings(tokens)
    parser.add_render_rule("image", lambda _, *found: picture(found[0][found[1]], pictures))
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    body = parser.renderer.render(tokens, parser.options, {})
    style = (files("bench") / "templates" / "report.css").read_text(encoding="utf-8")
    heading = next((t.content for t in tokens if t.type == "inline"), "report")
    return (
        f'<!DOCTYPE html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(unescaped(heading))}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def anchor(heading: str) -> str:
    """The name under which GitHub finds a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def name_headings(tokens: list[Token]) -> None:
    """Give headings the names that links of the page use."""
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrSet("id", anchor(unescaped(inline.content)))


def unescaped(markdown: str) -> str:
    """The text of a heading without the backslashes and backticks of Markdown."""
    return re.sub(r"\\(\W|_)", r"\1", markdown).replace("`", "")


def picture(token: Any, pictures: Mapping[str, str]) -> str:
    """An image as the SVG itself."""
    source = str(token.attrs["src"])
    name = source.removesuffix(".svg")
    svg = SIZE.sub(r"\1", PROLOGUE.sub("", pictures[source]))
    svg = IDS.sub(rf"\g<1>{name}-", svg)
    label = f'<svg role="img" aria-label="{escape(token.content)}"'
    return svg.replace("<svg", label, 1).strip()
