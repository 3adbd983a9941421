"""What the machine and its launchers give to a process, read without torch."""
