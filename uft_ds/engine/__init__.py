"""The sharded engine (DeepSpeed) and the ranks that it runs on."""
