"""The command ``fastkd``, also as ``python -m fastkd``."""

import os
import sys

# How often a thread of GNU's OpenMP looks for work before it sleeps; by default it hardly ever does. Beside programs
# that are at work, threads which only look keep each other from the cores; see docs/what_distillation_costs.md.
SPINS = "1000"


def main() -> int:
    """Run the command of the command line; returns the exit status."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # before torch is loaded, which reads it
    from fastkd.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
