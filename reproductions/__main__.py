"""`python -m reproductions`: says what is missing, or runs the command line."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    missing = [name for name in ("einops", "matplotlib", "numpy", "timm") if find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed; run: pip install 'eulernet[repro]'")

    from reproductions.cli import main

    main()
