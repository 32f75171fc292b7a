"""Files, locks, hosts and other services of the operating system."""
