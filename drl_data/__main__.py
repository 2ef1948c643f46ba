"""`python -m drl_data` is `drl`."""

from drl_data.cli import main

main()
