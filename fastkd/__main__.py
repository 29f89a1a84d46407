"""The command ``fastkd``, also as ``python -m fastkd``."""

import os
import sys

# How often an idle thread of GNU's OpenMP checks for work before it sleeps; by default it hardly ever sleeps. When
# other programs need the cores, such spinning threads take time from the threads that work; see
# docs/what_distillation_costs.md.
SPINS = "1000"


def main() -> int:
    """Run the command of the command line and return its exit status."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # torch reads it when it is loaded
    from fastkd.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
