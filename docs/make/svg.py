"""What the pictures that are drawn as SVG have in common."""

from collections.abc import Iterable


def document(title: str, style: str, parts: Iterable[str], width: float, height: float) -> str:
    """A whole SVG file.

    Args:
        title: what it shows, for readers who cannot see it.
        style: CSS.
        parts: elements, a line each.
    """
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="{width}">'
    return f"{head}\n<title>{title}</title>\n<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
