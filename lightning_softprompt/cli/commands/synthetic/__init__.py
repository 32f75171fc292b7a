"""Commands that write and filter rows."""
