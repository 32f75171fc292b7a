"""Small data sets for the quickstarts."""
