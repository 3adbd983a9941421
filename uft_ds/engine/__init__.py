"""The sharded engine, and the ranks that it runs on."""
