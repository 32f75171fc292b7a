"""Writers: each turns labels, keywords or documents into requests to the frozen model."""
