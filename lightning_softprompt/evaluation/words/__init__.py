"""The prediction of single words and terms in documents."""
