"""The command line of transformers, as it is installed: `transformers_command serve FOLDER …`."""

from transformers.cli.transformers import main

main()
