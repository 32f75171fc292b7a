"""What needs the Trainer."""
