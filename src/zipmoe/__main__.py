"""`python -m zipmoe` is the command `zipmoe`."""

from .cli import main

main()
