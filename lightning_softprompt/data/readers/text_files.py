"""Documents that are files: text, Markdown, HTML and PDF, each as its title and its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_softprompt.data.readers.sources import BOM, DataError

ABOUT_A_FOLDER = frozenset(("readme", "license", "licence", "notice", "changelog"))
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)


def find_text_files(folder: Path) -> list[Path]:
    """The files of text in a folder and those below it, by name; hidden ones are left out.

    Raises:
        DataError: If there is none.
    """
    found = _text_files(folder)
    if not found:
        raise DataError(f"{folder} has no files of rows, nor of text; expected one of {', '.join(TEXT_FILES)}")
    return found


def has_text_files(folder: Path) -> bool:
    """Whether a folder, or those below it, hold files of text other than those about the folder itself."""
    return any(path.stem.lower() not in ABOUT_A_FOLDER for path in _text_files(folder))


def _text_files(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in TEXT_FILES and path.is_file())
    return sorted(path for path in paths if not is_hidden(path.relative_to(folder)))


def read_text_file(path: Path) -> tuple[str, str]:
    """Title and text of a file.

    Raises:
        DataError: If it cannot be read, or has no text.
        ValueError: If a package is missing.
    """
    title, text = TEXT_FILES[path.suffix.lower()](path)
    if not text.strip():
        raise DataError(f"{path} has no text{'; scanned pages require OCR first' if path.suffix == '.pdf' else ''}")
    return title or path.stem, text


def is_hidden(path: Path) -> bool:
    """Whether a part of a path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _text(path: Path) -> tuple[str, str]:
    return "", _read(path)


def _markdown(path: Path) -> tuple[str, str]:
    text = _read(path)
    found = HEADING.search(text)
    return found.group(1) if found else "", text


def _html(path: Path) -> tuple[str, str]:
    bs4 = _extractor("bs4")
    content = path.read_bytes()
    pairs = ((b"<", b">"), (b"<!--", b"-->"))  # the parser searches to the end of the file for each that is not closed
    unclosed = max(content.count(opening) - content.count(closing) for opening, closing in pairs)
    if unclosed > UNCLOSED:
        raise DataError(f"{path} cannot be read as HTML: {unclosed:,} of its tags or comments are not closed")
    parsed = bs4.BeautifulSoup(content, "html.parser")
    title = " ".join(parsed.title.get_text().split()) if parsed.title else ""
    return title, re.sub(r"\s*\n\s*", "\n\n", "".join(_html_texts(parsed, bs4))).strip()


def _html_texts(parsed: Any, bs4: Any) -> Iterator[str]:
    """The texts of a page in their order, with an empty line after each block.

    The tree is walked by a stack, and is not changed, since pages may be nested deeply or have very many parts.
    """
    stack = [parsed]
    while stack:
        part = stack.pop()
        if isinstance(part, str) and not isinstance(part, bs4.NavigableString):
            yield part  # the end of a block
        elif type(part) is bs4.NavigableString:  # comments are strings too
            yield re.sub(r"\s+", " ", part)
        elif isinstance(part, bs4.Tag) and part.name not in SKIPPED:
            stack.extend(["\n\n"] if part.name in BLOCKS else [])
            stack.extend(reversed(part.contents))


def _pdf(path: Path) -> tuple[str, str]:
    pypdf = _extractor("pypdf")
    try:
        with pypdf.PdfReader(path) as reader:
            title = reader.metadata.title if reader.metadata else None
            return title or "", "\n\n".join(page.extract_text() for page in reader.pages)
    except Exception as error:  # pypdf raises many kinds of errors for broken files
        raise DataError(f"{path} cannot be read as PDF ({type(error).__name__}: {error})") from error


def _extractor(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(
            f"reading these files requires the package {module}; pip install 'lightning-softprompt[documents]'"
        ) from None


UNCLOSED = 1000
SKIPPED = ("script", "style", "noscript", "template", "head", "nav")
BLOCKS = "p div section article li tr h1 h2 h3 h4 h5 h6 blockquote pre table ul ol dd dt br".split()  # noqa: SIM905
TEXT_FILES: dict[str, Callable[[Path], tuple[str, str]]] = {
    ".txt": _text,
    ".text": _text,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".pdf": _pdf,
}
