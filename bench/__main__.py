"""``python -m bench NAME ...`` runs ``bench/NAME.py`` or ``bench/NAME/__main__.py``; without a name, lists them."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path


def names() -> dict[str, str]:
    """Benchmarks that can be run -> first line of what they say about themselves."""
    found = {}
    here = Path(__file__).resolve().parent
    for path in (*here.glob("[!_]*.py"), *here.glob("*/__main__.py")):
        text = path.read_text()
        if 'if __name__ == "__main__"' in text:
            name = path.parent.name if path.stem == "__main__" else path.stem
            found[name] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return dict(sorted(found.items()))


def main() -> int:
    known = names()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in known:
        print("usage: python -m bench NAME ...   (python -m bench NAME --help)\n")
        width = max(map(len, known))
        for one, about in known.items():
            print(f"  {one:{width}}  {about}")
        if name and name not in ("-h", "--help"):
            print(f"\nno benchmark {name!r}", file=sys.stderr)
            return 2
        return 0
    sys.argv = [f"python -m bench {name}", *sys.argv[2:]]
    runpy.run_module(f"bench.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
