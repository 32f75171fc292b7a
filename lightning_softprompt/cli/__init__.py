"""The command line: `softprompt`. No module imports torch before a command needs it."""
