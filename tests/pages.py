"""A page as it is written, and what every page must keep."""

import re

from msvae.report.page import write_report


def written(report, path):
    """The page's text, after checks that it needs nothing from outside."""
    write_report(path, report)
    text = path.read_text()
    assert path.stat().st_size < 15_000_000
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert text.count("<html") == 1
    for address in re.findall(r"""\b(?:src|srcset|href|action|data)\s*=\s*["']([^"']*)""", text):
        assert address.startswith(("data:", "#")) or address == "", address
    assert not re.search(r"url\(\s*[\"']?(?!#|data:)", text)
    assert not re.search(r"@import|<iframe|<base|fetch\(|XMLHttpRequest|import\(", text)
    return text
