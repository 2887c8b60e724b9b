"""`python -m tools.reference [--check]`."""

from __future__ import annotations

import sys

from tools.reference import ROOT, files


def main() -> None:
    differing = {path: text for path, text in files().items() if path.read_text() != text}
    check = "--check" in sys.argv
    for path, text in differing.items():
        if not check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'differs from the code: make reference' if check else 'written'}")
    sys.exit(check and bool(differing))


if __name__ == "__main__":
    main()
