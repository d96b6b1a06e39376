"""Lets the tests of the format import their brute force."""

import sys
from pathlib import Path

# pytest's importlib mode puts no folder on the path, so a helper beside the tests needs this line
sys.path.append(str(Path(__file__).parent))
