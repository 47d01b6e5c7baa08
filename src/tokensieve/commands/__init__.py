"""The subcommands of ``tokensieve``, one file each. Nothing here imports torch before a command runs."""
