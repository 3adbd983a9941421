"""The subcommands of `uft`: they parse, call and print.

Each command imports what it needs when it runs, so that `uft --help` does not wait for torch.
"""
