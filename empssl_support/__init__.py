"""What the method needs and need not explain: data, runs, processes, flags, compiled ops."""

import os

# OpenMP's idle threads spin, so that a second program on the same cores costs both most of their
# speed. A thousand turns, and then they sleep. PyTorch's OpenMP reads this as torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
