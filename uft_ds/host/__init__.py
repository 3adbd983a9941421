"""Services of the machine and its launchers, used without torch: files, locks, signals, ports, environment."""
