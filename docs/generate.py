"""Write the parts of the documentation that come from other files of the repository, into docs/_generated."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "_generated"


def main():
    """Write all parts."""
    OUT.mkdir(exist_ok=True)
