"""Safe loading: which classes and values a file may contain, checked before anything is created."""
