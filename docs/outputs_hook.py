"""Build step of the documentation: what a block printed when its page was run stands under it.

    python docs/outputs_hook.py how-to/evaluate.md ...    # runs pages as a reader would, records what they print
    python docs/outputs_hook.py                           # all recorded pages, anew

An output, kept in docs/results/outputs.json, belongs to the exact code that printed it and to all blocks above it:
where one of them changes, nothing is shown until the page is run again, and a test asks for that.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RECORD = DOCS / "results" / "outputs.json"
BLOCK = re.compile(r'^```python(?P<title> title="[^"\n]*")?\n(?P<code>.*?)^```\n', re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Print the outputs of a page under its blocks."""
    return shown(markdown, read().get(page.file.src_uri, {}))


def read() -> dict[str, dict[str, str]]:
    """Page by page what each block printed, by the block's key."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def blocks(markdown: str) -> list[tuple[re.Match[str], str]]:
    """The blocks of a page that run without another library, each with a key of its code and all above it."""
    keys, digest = [], hashlib.sha256()
    for match in BLOCK.finditer(markdown):
        if match["title"] is None:
            digest.update(match["code"].encode())
            keys.append((match, digest.hexdigest()[:16]))
    return keys


def shown(markdown: str, outputs: dict[str, str]) -> str:
    """A page with a block of text under each block of code that printed something."""
    for match, key in reversed(blocks(markdown)):
        if outputs.get(key):
            output = f'\n```text title="prints"\n{outputs[key]}\n```\n'
            markdown = markdown[: match.end()] + output + markdown[match.end() :]
    return markdown


def printed(markdown: str) -> dict[str, str]:
    """Run a page as a reader would, in an empty folder, and give what each block printed."""
    outputs, namespace, home = {}, {"__name__": "__main__"}, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for match, key in blocks(markdown):
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    exec(compile(match["code"], "<page>", "exec"), namespace)
                outputs[key] = said.getvalue().rstrip()
        finally:
            os.chdir(home)
    return outputs


def main(names: list[str]) -> None:
    """Record pages."""
    record = read()
    for name in names or list(record):
        outputs = printed((DOCS / name).read_text(encoding="utf-8"))
        record[name] = {key: output for key, output in outputs.items() if output}
        print(f"{name}: {len(record[name])} of {len(outputs)} blocks print something")
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
