"""Makes the modules of the example importable, as they are for its own scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "earnings"))
