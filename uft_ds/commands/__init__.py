"""The subcommands of `uft`: they parse, call and print.

They import what they need when they run: `uft --help` should not wait for torch.
"""
