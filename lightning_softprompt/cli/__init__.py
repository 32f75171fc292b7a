"""The command line: `softprompt`. Nothing here imports torch before a command needs it."""
