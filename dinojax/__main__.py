"""`python -m dinojax VERB ...` is `dinojax VERB ...`."""

import sys

from dinojax.cli import main

if __name__ == "__main__":
    sys.exit(main())
