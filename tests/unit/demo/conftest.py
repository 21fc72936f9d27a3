import sys
from pathlib import Path

# The model's workshop is not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "packaging"))
