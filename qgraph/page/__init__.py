"""Reports as pages for a browser: one file each, that needs no network and no other file.

    of_report       what `qgraph optimize` did
    of_findings     what `qgraph compare` and `qgraph eval` measured

Trees instead of templates: `elements` escapes all text, `charts` draws, `tables` sorts, `document` is the shell.
"""

from __future__ import annotations

from qgraph.page.of_findings import of_findings
from qgraph.page.of_report import of_report

__all__ = ["of_findings", "of_report"]
