"""``python -m weft`` is the command ``weft``; ``torchrun -m weft`` needs it."""

from weft.recipes.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
