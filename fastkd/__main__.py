"""The command ``fastkd``, also as ``python -m fastkd``."""

import os
import sys

# How often a thread of GNU's OpenMP looks for work before it sleeps. By default it hardly ever sleeps; where other
# programs run too, such spinning threads take the cores from threads with work; see docs/what_distillation_costs.md.
SPINS = "1000"


def main() -> int:
    """Run the ``fastkd`` command with the arguments of the command line; returns the exit status."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # before torch is loaded, which reads it
    from fastkd.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
