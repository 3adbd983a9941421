"""The subcommands of `uft`: they parse, call and print."""
