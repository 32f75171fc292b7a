"""What the first bytes of a file show: content that no reader of text can read, whatever the file's name."""

from __future__ import annotations

from lightning_softprompt.data.readers.rows import DataError

HEAD = 4096  # bytes that are looked at
PACKED = {b"\x1f\x8b": ("gzip", ".gz"), b"BZh91AY&SY": ("bzip2", ".bz2"), b"\xfd7zXZ\x00": ("xz", ".xz")}
MAGIC = {
    b"PK\x03\x04": "is a ZIP archive, as spreadsheets are, too; unpack it, or export it as CSV in UTF-8",
    b"\xff\xfe": "is UTF-16 or UTF-32, not UTF-8; save the file as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save the file as UTF-8",
}
TOO_MANY, FEW = 0.4, 0.05  # shares of zero bytes


def refuse_other_content(head: bytes, name: str, is_named: bool = True) -> None:
    """Refuses content that is not UTF-8 text.

    UTF-16 without a byte order mark is recognised by its zero bytes: in most scripts with letters, every second byte of
    a separator, digit or letter is zero.

    Args:
        head: The first bytes.
        name: Of the file.
        is_named: Whether another name of the file would say what it is; standard input has none.

    Raises:
        DataError: Saying what it is and what to do.
    """
    for magic, (program, ending) in PACKED.items():
        if head.startswith(magic):
            advice = f"add {ending} to its name" if is_named else "decompress it first"
            raise DataError(f"{name} is compressed by {program}; {advice}")
    found = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if found is None and _is_utf16(head):
        found = "is UTF-16 or UTF-32 without a byte order mark, not UTF-8; save the file as UTF-8"
    if found is not None:
        raise DataError(f"{name} {found}")


def _is_utf16(head: bytes) -> bool:
    if len(head) < 4:
        return False
    even, odd = head[:HEAD:2], head[1:HEAD:2]
    even_zeros = even.count(0) / max(1, len(even))
    odd_zeros = odd.count(0) / max(1, len(odd))
    if max(even_zeros, odd_zeros) <= TOO_MANY:
        return False
    return min(even_zeros, odd_zeros) < FEW or head.count(0) > len(head) / 2
