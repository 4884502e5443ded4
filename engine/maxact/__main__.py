"""`python -m maxact`: the command line."""

from maxact.cli import main

raise SystemExit(main())
