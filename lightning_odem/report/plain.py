"""Names as they are shown; names from files must not control the terminal."""


def plain(text: str) -> str:
    r"""Text with control characters as escapes.

    Example:
        >>> print(plain("a\x1b[2Jb\n"))
        a\x1b[2Jb\n
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
