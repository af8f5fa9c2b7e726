"""Text from outside, such as labels and paths, made harmless where it is shown.

Labels, names of models and messages of libraries may hold anything: escape sequences
that a terminal obeys, line breaks that fake lines of the output, Markdown, HTML.
"""

import re

_UNSEEN = (
    "\x00-\x1f\x7f-\x9f"  # controls, among them ESC and the 8-bit CSI
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of what follows
    "\u2028\u2029\ufeff\ufff9-\ufffb"  # line breaks and marks that are not seen
    "\ud800-\udfff"  # halves of characters, which no encoding writes
)
_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str) -> str:
    r"""Return text with every character that a terminal obeys written out.

    Args:
        text: Any text, also one with halves of surrogate pairs.

    Returns:
        One line: control characters and marks of direction as ``\n``, ``\x1b`` or
        ``\u202e``, all others as they are.

    Example:
        >>> print(printable("good\x1b[2J\nbad"))
        good\x1b[2J\nbad
    """
    return re.sub(f"[{_UNSEEN}]", lambda match: _written(match[0]), text)


def printable_json(text: str) -> str:
    r"""Return JSON with what a terminal obeys inside its strings written out.

    Args:
        text: JSON, whose line breaks are between values.

    Returns:
        JSON of the same values.

    Example:
        >>> print(printable_json('["\x9b2J"]'))
        ["\u009b2J"]
    """
    unseen = _UNSEEN.replace("\x00-\x1f", "")
    return re.sub(f"[{unseen}]", lambda match: f"\\u{ord(match[0]):04x}", text)


def markdown(text: str) -> str:
    r"""Return text escaped for Markdown, also within a table or at a line's start.

    Args:
        text: Any text; runs of white space become a space.

    Example:
        >>> print(markdown("a|b <script> *c*"))
        a\|b &lt;script> \*c\*
    """
    text = printable(" ".join(text.split()))
    text = re.sub(r"([\\|*_`\[\]#~$])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    # At the start of a line these quote, begin a list or underline a heading.
    return re.sub(r"^(>|[-+=](?=\s|$|[-=])|\d+(?=[.)]\s))", _at_start, text)


def markdown_code(text: str) -> str:
    """Return text as code within a line of Markdown.

    Args:
        text: Any text; runs of white space become a space.

    Example:
        >>> markdown_code("rows:3"), markdown_code("a`b")
        ('`rows:3`', '``a`b``')
    """
    text = printable(" ".join(text.split()))
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _written(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _at_start(match: re.Match[str]) -> str:
    mark = match[1]
    # A backslash escapes marks alone; after a number the dot or bracket is the mark.
    return f"&#{ord(mark[0])};{mark[1:]}" if mark.isdigit() else f"\\{mark}"
