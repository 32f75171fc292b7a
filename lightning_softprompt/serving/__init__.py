"""An HTTP server for trained prompts: the rows of all prompts on one backbone run in shared batches."""
