"""Turns Sphinx roles in docstrings, which editors and Lightning's own documentation use, into Markdown."""

import inspect
import re
from typing import Any

import griffe

_REFERENCE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`(~?)([\w.]+)`")
_MATH = re.compile(r":math:`([^`]*)`")
_BLOCK = re.compile(r"^( *)\.\. math:: (.*(?:\n(?=\1 +\S).*)*)", re.MULTILINE)
_LITERAL = re.compile(r"^Example::$((?:\n(?: .*)?)*)", re.MULTILINE)


def to_markdown(text: str) -> str:
    """The docstring with links, math and code blocks as Markdown has them."""

    def reference(match: re.Match[str]) -> str:
        short, path = match.groups()
        shown = path.rsplit(".", 1)[-1] if short else path
        # Optional: a reference to something without a page of its own is its name.
        return f'<autoref identifier="{path}" optional>`{shown}`</autoref>' if "." in path else f"`{shown}`"

    def literal(match: re.Match[str]) -> str:
        return f"Examples:\n    ```python{match[1].rstrip()}\n    ```\n"

    text = _BLOCK.sub(lambda match: f"{match[1]}$$ {match[2]} $$", text)
    text = _MATH.sub(r"$\1$", _REFERENCE.sub(reference, text))
    return re.sub(r"^Example:$", "Examples:", _LITERAL.sub(literal, text), flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(inspect.cleandoc(obj.docstring.value))
